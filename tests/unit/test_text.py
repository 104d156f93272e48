"""The contract as a document: every value of the record stands in it, and none can act on a terminal."""

import unicodedata
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
from tests.support.auditor_kit import CLAUSE
from tests.support.settlement_kit import a_contract

from fedpact_contract.canonical import sha256_hex
from fedpact_contract.contract import Contract
from fedpact_contract.report import NOT_STOPPED
from fedpact_contract.text import render

FIXED = {"trust_model", "unit", "relation", "sampling", "kind", "game", "loss", "estimator", "currency", "rule"}
FIXED |= {"aggregation", "fallback", "missing", "clip", "wreckers"}
"""Words of which there is one, or which go with other values."""


def rich_contract() -> Contract:
    """A contract with every optional part, and as many different values as can be."""
    base = a_contract(counts=(1111, 2222, 3333), floors=(44, 55, 66), weights=("0.61", "0.28", "0.11"))
    ids = list(base.by_id())
    plain = base.plain()
    plain["title"], plain["purpose"] = "Heart disease, city wide", "disease-prediction"
    plain["data"] = {
        "columns": [
            {"name": "age", "kind": "number", "low": "-1.5", "high": "101.25", "missing": "fill", "fill": "47.5"},
            {"name": "bmi", "kind": "number", "low": "9", "high": "77", "missing": "drop"},
            {"name": "smoker", "kind": "category", "values": ["nay", "aye"], "missing": "fill", "fill": "nay"},
            {"name": "sex", "kind": "category", "values": ["female", "male"], "missing": "refuse"},
        ],
        "label": {"name": "troponin", "classes": ["low", "high"], "rule": "above", "threshold": "0.045"},
        "feature_scale": "1.75",
    }
    plain["model"] = {"kind": "mlp", "hidden": [63, 31], "initial_digest": "1" * 64}
    plain["training"] |= {"rounds": 24, "local_steps": 3, "learning_rate": "0.35", "server_rate": "0.95"}
    plain["privacy"] |= {
        "epsilon": "1.9",
        "delta": "0.0000071",
        "max_grad_norm": "1.3",
        "sample_rate": "0.17",
        "noise_multiplier": "2.468",
        "spare_attempts": 5,
        "accountant": "an accountant 9.8",
    }
    plain["participation"] = {
        "minimum": 3,
        "deadline_seconds": 321,
        "head_threshold": 2,
        "strict_heads": True,
        "missed_rounds_limit": 7,
    }
    for party, order in zip(plain["participants"], ("4.7", "8.9", "24.6"), strict=True):
        party["gate_order"] = order
        party["card"] = sha256_hex(order.encode())
    plain["contribution"]["validation"] = {
        "root": "2" * 64,
        "slices": [{"source": "operator", "count": 501}, {"source": ids[0], "count": 73}],
    }
    plain["settlement"]["close_days"] = 29
    plain["auditor"] = CLAUSE
    plain["defences"] = {"clip": "median-signal", "wreckers": "reject", "negatives": "0.135", "dispute_hours": 83}
    plain["defences"]["max_duplicates"] = "0.0375"
    plain["code"] = {"release": "9.9.9", "models_digest": "3" * 64, "shell_digest": "4" * 64}
    return Contract.parse(plain)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value


def replaced(plain: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    if not path:
        return value
    head, *rest = path
    copy = dict(plain) if isinstance(plain, dict) else list(plain)
    copy[head] = replaced(copy[head], tuple(rest), value)
    return copy


def another(value: Any) -> Any:
    """Another value of the same form."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if len(value) in (18, 64):
        return ("5" if value[0] != "5" else "6") + value[1:]
    if value.replace(".", "", 1).removeprefix("-").isdigit():
        return str(Decimal(value) + Decimal("0.0000001"))
    return value.replace("2026", "2025").replace("2099", "2098") if value.endswith("Z") else value + "X"


CONTRACT = rich_contract()
LEAVES = list(leaves(CONTRACT.plain()))


@pytest.mark.parametrize(("path", "value"), LEAVES, ids=[".".join(map(str, p)) for p, _ in LEAVES])
def test_every_value_stands_in_the_document(path: tuple[Any, ...], value: Any) -> None:
    shown = ("no", "yes")[value] if isinstance(value, bool) else str(value)
    assert shown in render(CONTRACT)


FREE = [
    leaf for leaf in LEAVES if leaf[0][-1] not in FIXED | {"source", "fill"} and leaf[0] != ("participants", 0, "key")
]
"""Values that can change alone: no reference to another one, and none refers to them."""


@pytest.mark.parametrize(("path", "value"), FREE, ids=[".".join(map(str, p)) for p, _ in FREE])
def test_no_value_can_change_without_the_document_changing(path: tuple[Any, ...], value: Any) -> None:
    """Beyond the id at its end."""
    plain = replaced(CONTRACT.plain(), path, another(value))
    changed = super(Contract, Contract).parse(plain, code="TEST")  # the form alone: rules may be broken by one change
    assert without_id(changed) != without_id(CONTRACT)


def without_id(contract: Contract) -> str:
    return render(contract).replace(contract.id, "")


def test_fingerprints_limits_and_id_stand_in_it() -> None:
    text = render(CONTRACT)
    for party in CONTRACT.parties().values():
        assert party.id in text
    for limit in NOT_STOPPED:
        assert limit in text
    assert text.endswith(f"{CONTRACT.id}\n")
    assert f"type {CONTRACT.TYPE}, version {CONTRACT.VERSION}" in text
    assert str(CONTRACT.planned_steps) in text


def test_privacy_is_said_in_words() -> None:
    text = render(CONTRACT)
    assert "6.69 times as likely (e^epsilon)" in text  # e^1.9 = 6.6859
    assert "at most 87.0 % of the time" in text  # 6.6859 / 7.6859 = .8699
    plain = CONTRACT.plain()
    plain["privacy"]["epsilon"] = "25"
    assert "no protection" in render(Contract.parse(plain))


@pytest.mark.parametrize(
    ("epsilon", "percent"), [("1.9", "87.0"), ("7", "99.91"), ("8", "99.97"), ("19", "99.9999995")]
)
def test_a_guess_is_never_called_certain(epsilon: str, percent: str) -> None:
    """e^7 : 1 is 99.9089, e^8 : 1 is 99.9665, e^19 : 1 is 99.99999944: rounded up, and below 100."""
    plain = rich_contract().plain()
    plain["privacy"]["epsilon"] = epsilon
    assert f"guesses right at most {percent} % of the time" in render(Contract.parse(plain))


def test_one_is_one_and_more_are_many() -> None:
    many = render(CONTRACT)
    for words in (
        "24 rounds",
        "3 training steps",
        "5 spare attempts",
        "321 seconds",
        "501 rows",
        "29 days",
        "83 hours",
    ):
        assert words in many
    plain = CONTRACT.plain()
    plain["training"] |= {"rounds": 1, "local_steps": 1}
    plain["privacy"]["spare_attempts"] = 1
    plain["participation"] |= {"deadline_seconds": 1, "head_threshold": 1, "missed_rounds_limit": 1}
    plain["settlement"]["close_days"] = 1
    one = render(super(Contract, Contract).parse(plain, code="TEST"))
    assert "The plan is 1 round and 1 spare attempt (after a crash) of 1 step each: 2 in all." in one
    assert "misses or refuses 1 round in a row" in one
    for noun in ("rounds", "steps", "attempts", "seconds", "countersignatures", "days"):
        assert f" 1 {noun}" not in one


def test_values_cannot_act_on_a_terminal() -> None:
    """Such a contract does not parse; the text relies on nothing."""
    first = CONTRACT.participants[0].model_copy(update={"name": "\u2066Hospital\ufeff"})
    hostile = {
        "title": "安全\u3000safe\u202etitle\u2028\x9b31m",
        "participants": (first, *CONTRACT.participants[1:]),
    }
    text = render(CONTRACT.model_copy(update=hostile))
    assert "safe\\u202etitle\\u2028\\x9b31m" in text
    assert all(c == "\n" or unicodedata.category(c)[0] != "C" for c in text)
    assert "\u2028" not in text


def test_the_fallback_and_strictness_are_said_as_they_are() -> None:
    plain = CONTRACT.plain()
    plain["settlement"]["fallback"], plain["participation"]["strict_heads"] = "equal", False
    text = render(Contract.parse(plain))
    assert 'the fallback is "equal": the pool is split equally' in text
    assert "raises an alarm (strict heads: no)" in text
    assert "refuses the order (strict heads: yes)" in render(CONTRACT)


@pytest.mark.parametrize(
    ("clause", "shown", "other"),
    [
        ({"clip": "none"}, "none is scaled down (clip: none)", "median-signal"),
        ({"wreckers": "report"}, "invited as before (wreckers: report)", "is invited no more"),
        ({"dispute_hours": 1}, "may dispute that for 1 hour,", "1 hours"),
        ({"negatives": "0.5"}, "above 50 % of the total value (negatives: 0.5)", "13.5 %"),
        (
            {"max_duplicates": "0.25"},
            "At most 25 % of a participant's contracted examples may be exact copies",
            "3.75 %",
        ),
        ({"max_duplicates": None}, "negatives: 0.135", "exact copies"),
    ],
)
def test_each_defence_is_said_as_it_is(clause: dict[str, Any], shown: str, other: str) -> None:
    plain = CONTRACT.plain()
    plain["defences"] |= clause
    text = render(Contract.parse(plain))
    assert shown in text
    assert other not in text
    assert "An alarm is a question and moves no money." in text


def test_in_the_renormalised_game_no_value_raises_an_alarm() -> None:
    plain = CONTRACT.plain()
    plain["contribution"]["game"] = "re-normalised"
    plain["defences"]["wreckers"] = "report"
    text = render(Contract.parse(plain))
    assert "it raises no alarm (wreckers: report)" in text
    assert "named by an alarm" not in text


def test_without_defences_there_is_no_such_section() -> None:
    plain = CONTRACT.plain()
    del plain["defences"]
    assert "DEFENCES" not in render(Contract.parse(plain)).upper()
