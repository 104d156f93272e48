"""kill -9 of real processes that use the store: at random moments, at every point, at every system call that writes."""

import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from tests.support import ledger_kit
from tests.support.ledger_kit import BASE, DATA_SET, complete, contract_id, new_store, terms
from tests.support.line_crash import Lines, in_a_child, in_memory
from tests.support.required import lacking

from fedpact_client.store import EgressKind, Ready, Reservation, Store
from fedpact_contract.canonical import sha256_hex
from fedpact_contract.keys import save_key
from fedpact_contract.ledger import attempts

CHILD = Path(ledger_kit.__file__).with_name("store_child.py")
ONE = contract_id()
RDP = Fraction(1, 10_000)

pytestmark = pytest.mark.e2e


@dataclass
class Operator:
    """What came out of the processes: rounds trained (each time), and the one answer to each round."""

    trained: Counter[int] = field(default_factory=Counter)
    sent: dict[int, tuple[str, str, str]] = field(default_factory=dict)

    def hear(self, lines: Iterable[str]) -> None:
        for line in lines:
            word, number, *rest = line.split()
            if word == "training":
                self.trained[int(number)] += 1
            elif word == "sent":
                answer = (rest[0], rest[1], rest[2])
                assert self.sent.setdefault(int(number), answer) == answer, "two answers to one round"


def digests(ready: Ready) -> tuple[str, str, str]:
    return (ready.kind, sha256_hex(ready.reply), sha256_hex(ready.array))


def prepare(root: Path, rounds: int, spares: int) -> tuple[Path, Path]:
    """A home with one running contract and its run key; a witness elsewhere."""
    home, witness = root / "home", root / "away" / "witness"
    home.mkdir(parents=True)
    witness.parent.mkdir()
    save_key(home / "run.pem", ledger_kit.key("run"))
    plan = terms(rounds=rounds, spare_attempts=spares, rdp=Decimal(RDP.numerator) / RDP.denominator)
    new_store(home, witness=witness, contracts=(plan,)).close()
    return home, witness


def check(store: Store, operator: Operator, rounds: Iterable[int]) -> None:
    """What must hold after each opening, which itself verified the chain, the signatures and the witness."""
    rows = store.rows(DATA_SET)
    charged = Fraction(store.budget(DATA_SET).charged)
    assert charged == RDP * attempts(rows, ONE)
    assert charged >= RDP * sum(operator.trained.values())
    assert charged >= RDP * sum(r.state == "spent" for r in rows)
    ended = Counter(r.round for r in rows if r.state in ("spent", "failed"))
    assert set(ended.values()) <= {1}
    assert set(operator.sent) <= set(ended)
    for number in rounds:
        ready = store.reserve(ONE, number, BASE, ledger_kit.key("run"))
        assert isinstance(ready, Ready)
        assert digests(ready) == operator.sent.get(number, digests(ready))
        if ready.kind == "update":
            assert store.sent_updates(ONE)[number] == next(r.update_digest for r in rows if _spent(r, number))
    assert store.rows(DATA_SET) == rows
    assert {e.round for e in store.egress()} >= set(operator.sent), "something left that the egress ledger lacks"
    assert store.witness_status() in ("current", "absent")


def _spent(row: Reservation, number: int) -> bool:
    return row.round == number and row.state == "spent"


def one_life(home: Path, witness: Path, lines: int, wait: float) -> list[str]:
    """Start a guard, let it say so many lines and go on for a moment, kill it; everything it said."""
    command = [sys.executable, str(CHILD), "loop", str(home), str(witness)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        said = [child.stdout.readline() for _ in range(lines)]
        time.sleep(wait)
        child.send_signal(signal.SIGKILL)
        said += child.stdout.read().splitlines()
        assert child.wait() == -signal.SIGKILL, child.stderr.read()
    assert said[0] == "ready\n"
    return said[1:]


@pytest.mark.slow
def test_thirty_kills_at_random_moments(tmp_path: Path):
    home, witness = prepare(tmp_path, rounds=20_000, spares=1000)
    operator = Operator()
    moments = random.Random(20261124)
    for life in range(30):
        operator.hear(one_life(home, witness, moments.randint(1, 12), moments.uniform(0, 0.01)))
        with Store(home / "agent.db", witness=witness) as store:
            ended = [r.round for r in store.rows(DATA_SET) if r.state in ("spent", "failed")]
            check(store, operator, ended if life == 29 else ended[-15:])
            store.check_integrity()
    assert len(operator.sent) > 30
    assert max(operator.trained.values()) > 1, "no kill ever hit between the two transactions"


def run_once(home: Path, witness: Path, deadly: int, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, str(CHILD), "once", str(home), str(witness), str(deadly)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def recover(home: Path, witness: Path, out: str) -> str:
    """Check what a dead process left, then answer the round as a new one would; what was left."""
    operator = Operator()
    operator.hear(line for line in out.splitlines() if line.startswith(("training", "sent")))
    with Store(home / "agent.db", witness=witness) as store:
        rows = store.rows(DATA_SET)
        left = "+".join(r.state for r in rows) or "nothing"
        check(store, operator, [1] if left.endswith("spent") else [])
        again = store.reserve(ONE, 1, BASE, ledger_kit.key("run"))
        if isinstance(again, Reservation):
            assert not operator.sent
            assert again.attempt == attempts(rows, ONE) + 1
            again = complete(store, again)
        assert operator.sent.get(1, digests(again)) == digests(again)
        assert Fraction(store.budget(DATA_SET).charged) == RDP * max(1, attempts(store.rows(DATA_SET), ONE))
    with Store(home / "agent.db", witness=witness) as store:
        store.check_integrity()
        assert store.witness_status() == "current"
    return left


def fresh(pristine: Path, tmp_path: Path, name: str = "here") -> tuple[Path, Path]:
    here = tmp_path / name
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(pristine, here)
    return here / "home", here / "away" / "witness"


def several(work: Callable[[Any], str], items: Iterable[Any]) -> Counter[str]:
    """What each left; two at a time, for most of it is waiting for processes and the disk."""
    with ThreadPoolExecutor(2) as pool:
        return Counter(pool.map(work, items))


@pytest.mark.slow
def test_a_kill_at_every_point_of_a_round(tmp_path: Path):
    pristine = tmp_path / "pristine"
    prepare(pristine, rounds=3, spares=1)
    home, witness = fresh(pristine, tmp_path)
    whole = run_once(home, witness, 0)
    points = int(whole.stdout.split()[-1])
    assert points > 30, whole.stderr
    assert recover(home, witness, whole.stdout) == "reserved+spent"

    def one(deadly: int) -> str:
        home, witness = fresh(pristine, tmp_path, f"point{deadly}")
        dead = run_once(home, witness, deadly)
        assert dead.returncode == -signal.SIGKILL, dead.stderr
        return recover(home, witness, dead.stdout)

    left = several(one, range(1, points))  # the last point is the line that says how many there were
    assert set(left) == {"nothing", "reserved", "reserved+spent"}
    assert min(left.values()) >= 5, left


CALLS = ("pwrite64", "fdatasync", "fsync", "ftruncate", "rename", "unlink")
"""System calls by which SQLite and the witness reach the disk."""


def strace(*options: str) -> tuple[str, ...]:
    return ("strace", "-f", "-qq", "-o", "/dev/null", *options)


def counted(home: Path, witness: Path, report: Path) -> dict[str, int]:
    """How often a whole round makes each call."""
    prefix = ("strace", "-f", "-qq", "-o", str(report), "-e", f"trace={','.join(CALLS)}")
    done = run_once(home, witness, 0, prefix)
    assert "points" in done.stdout, done.stderr
    text = report.read_text()
    return {call: text.count(f" {call}(") for call in CALLS}


@pytest.mark.slow
def test_a_kill_at_every_system_call_that_writes(tmp_path: Path):
    if shutil.which("strace") is None or subprocess.run([*strace(), "true"], check=False).returncode:
        lacking("needs strace, and the right to trace")
    pristine = tmp_path / "pristine"
    prepare(pristine, rounds=3, spares=1)
    calls = counted(*fresh(pristine, tmp_path), tmp_path / "report")
    assert calls["fdatasync"] + calls["fsync"] >= 8, calls

    def one(place: tuple[str, int]) -> str:
        call, number = place
        home, witness = fresh(pristine, tmp_path, f"{call}{number}")
        inject = f"inject={call}:signal=SIGKILL:when={number}"
        dead = run_once(home, witness, 0, strace("-e", f"trace={call}", "-e", inject))
        assert "points" not in dead.stdout, f"{call} {number} did not kill"
        return recover(home, witness, dead.stdout)

    left = several(one, [(call, number) for call, times in calls.items() for number in range(1, times + 1)])
    assert set(left) == {"nothing", "reserved", "reserved+spent"}


# Every line of the two transactions


def answered(home: Path, witness: Path, deadly: int, outcome: str, say: Callable[[str], None]) -> None:
    """Round 1 by a process that dies before the `deadly` line of the store's code. The same array each time."""
    lines, array, run_key = Lines(deadly), bytes(32), ledger_kit.key("run")
    with Store(home / "agent.db", witness=witness) as store, lines.counted():
        taken = store.reserve(ONE, 1, BASE, run_key)
        if isinstance(taken, Reservation):
            say(f"training 1 {taken.attempt}")
            if outcome == "failed":
                taken = store.fail(taken, "DATA_NAN", lambda head: b"reply " + head.encode(), run_key)
            else:
                taken = complete(store, taken, array)
        store.record_egress(EgressKind(taken.kind), ONE, 1, len(taken.reply), sha256_hex(taken.reply))
        say(f"sent 1 {' '.join(digests(taken))}")
    say(f"lines {lines.count}")


def remains(folder: Path) -> str:
    """A digest of every file, and of its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return sha256_hex(b"".join(str(path.relative_to(folder)).encode() + path.read_bytes() for path in files))


@pytest.mark.slow
@pytest.mark.parametrize(("outcome", "attempt"), [("spent", 1), ("failed", 1), ("spent", 2)])
def test_a_death_at_every_line_of_both_transactions(outcome: str, attempt: int):
    """Each leaves one of a few folders, byte for byte, and what was said before; each of those is recovered once."""
    with in_memory() as folder:
        deaths_at_every_line(folder, outcome, attempt)


def deaths_at_every_line(folder: Path, outcome: str, attempt: int) -> None:
    pristine = folder / "pristine"
    home, witness = prepare(pristine, rounds=3, spares=2)
    if attempt == 2:  # the first one died while it trained
        with Store(home / "agent.db", witness=witness) as store:
            ledger_kit.reserve(store)
    home, witness = fresh(pristine, folder)
    _, said = in_a_child(lambda say: answered(home, witness, 0, outcome, say))
    whole = int(said[-1][1])
    assert whole > 500, said
    seen: dict[tuple[str, str], str] = {}
    for deadly in range(1, whole + 1):
        home, witness = fresh(pristine, folder)
        died, said = in_a_child(lambda say, d=deadly, h=home, w=witness: answered(h, w, d, outcome, say))
        assert died, f"line {deadly} of {whole} was not reached"
        out = "\n".join(" ".join(words) for words in said)
        left = (remains(home.parent), out)
        if left not in seen:
            seen[left] = recover(home, witness, out)
    before = "reserved+" * (attempt - 1)
    wanted = {before + "reserved", f"{before}reserved+{outcome}", before[:-1] or "nothing"}
    assert set(seen.values()) == wanted, seen
