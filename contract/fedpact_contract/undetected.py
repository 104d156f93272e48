"""Attacks that the detectors do not, or not always, find, with what they gain: measured, and said in every report.

The figures are those of tests/benchmarks/test_bench_undetected.py, which measures them anew and holds this list to it.
"""

from dataclasses import dataclass
from typing import Any

from fedpact_contract.contract import ClientPrivacy, Contract


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """One attack by a party that controls its own agent, or was given what it should not have.

    Attributes:
        name: What the benchmark calls it.
        english: What the party does.
        chinese: The same.
        gain: Its share, all its identities together, over the share it would have had by honest work; the mean of
            `RUNS` runs, to a tenth.
        alarms: In how many of them a detector raised an alarm.
    """

    name: str
    english: str
    chinese: str
    gain: str
    alarms: int


RUNS = 40
"""Runs of each attack: one attacker among eight equal participants on the digits, five rounds, epsilon 2."""

MEASURED = (
    f"Measured in {RUNS} runs of each: one attacker among eight equal participants on handwritten digits, five rounds, "
    "epsilon 2, with the clip and all detectors. Other data, numbers and noise give other figures.",
    f"每项各测{RUNS}次：手写数字数据，八个相同规模的参与方中有一个攻击者，五轮，ε为2，启用缩减与全部检测程序。"
    "数据、规模或噪声不同，数值亦不同。",
)
"""How the figures came about, in English and Chinese."""

ATTACKS = (
    Attack(
        name="leaked validation set",
        english="It was given the validation rows, and trains on them.",
        chinese="获得泄露的验证集，并用其训练。",
        gain="1.1",
        alarms=0,
    ),
    Attack(
        name="leaked slice",
        english="It was given one giver's part of the validation rows, and trains on it.",
        chinese="获得某一提供方的验证样本，并用其训练。",
        gain="1.1",
        alarms=0,
    ),
    Attack(
        name="same rows, fresh noise",
        english="It takes part as two, with the same rows and fresh noise each.",
        chinese="以两个身份参与，数据行相同，各加新噪声。",
        gain="1.8",
        alarms=0,
    ),
    Attack(
        name="rows split in two",
        english="It takes part as two, with half of its rows each.",
        chinese="以两个身份参与，各持一半数据行。",
        gain="0.8",
        alarms=0,
    ),
    Attack(
        name="rows padded x2",
        english="With altered code it trains on each of its rows twice.",
        chinese="改动代码，每行数据用两次训练。",
        gain="1.8",
        alarms=31,
    ),
    Attack(
        name="best of 2, the spare attempt",
        english="It uses its spare attempt to choose the better one of two draws of noise.",
        chinese="借用备用次数，在两次噪声抽取中择优。",
        gain="1.0",
        alarms=0,
    ),
    Attack(
        name="best of 4 draws",
        english="With altered code it draws its noise 4 times a round, and sends the best update.",
        chinese="改动代码，每轮抽取4次噪声，择优发送更新。",
        gain="1.3",
        alarms=0,
    ),
    Attack(
        name="best of 16 draws",
        english="With altered code it draws its noise 16 times a round, and sends the best update.",
        chinese="改动代码，每轮抽取16次噪声，择优发送更新。",
        gain="1.4",
        alarms=0,
    ),
)


FEW = 5
"""With fewer participants the detectors that compare somebody with the others have no power."""

HERE = {
    "without": (
        "This contract has no defences: nothing is scaled down and no alarm is raised at all.",
        "本合同无防护条款：不缩减任何更新，也不触发任何警报。",
    ),
    "unclipped": ("This contract scales no update down.", "本合同不缩减任何更新。"),
    "few": (
        f"This contract has fewer than {FEW} participants: detectors that compare them have no power, and find none.",
        f"本合同的参与方少于{FEW}个：需要相互比较的检测程序没有检测力，均无法发现。",
    ),
    "re-normalised": (
        "In this contract's game the detectors look at updates alone, and other gains than these are made.",
        "本合同的博弈中检测程序只看更新本身，所得收益与此不同。",
    ),
}
"""Why the figures are not this contract's, in English and Chinese."""


def unlike_measured(contract: Contract) -> list[str]:
    """Which of `HERE` hold."""
    found = ["without"] if contract.defences is None else []
    if contract.defences is not None and contract.defences.clip == "none":
        found.append("unclipped")
    if contract.defences is not None and len(contract.participants) < FEW:
        found.append("few")
    return found + (["re-normalised"] if contract.contribution.game == "re-normalised" else [])


def undetected(contract: Contract) -> list[dict[str, Any]]:
    """The list as JSON, in its order; nothing at client level, where nobody's update is scored or looked at."""
    if isinstance(contract.privacy, ClientPrivacy):
        return []
    return [
        {"attack": attack.english, "gain": attack.gain, "alarms": attack.alarms, "runs": RUNS} for attack in ATTACKS
    ]
