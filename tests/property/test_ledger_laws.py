"""Laws of the budget ledger: on the pure function against a small model, and on real files that crashes leave."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.ledger_kit import (
    BASE,
    DATA_SET,
    OTHER_BASE,
    card,
    complete,
    contract_id,
    key,
    new_store,
    signed_contract,
    terms,
    train,
)
from tests.support.line_crash import Lines, in_a_child, in_memory

from fedpact_client.store import Ready, Reservation, Store
from fedpact_contract.canonical import sha256_hex
from fedpact_contract.errors import FaultError, RefusedError
from fedpact_contract.keys import public_hex
from fedpact_contract.ledger import (
    LedgerRow,
    Request,
    Terms,
    charged,
    charged_steps,
    check_chain,
    check_plans,
    committed,
    ledger_head,
    next_failed,
    next_reserved,
    next_restored,
    next_spent,
    written_off,
)

NAMES = ("one", "two", "three")
BASES = (BASE, OTHER_BASE)
DIGEST = "d" * 64

MEASUREMENT = {"kind": "statistics", "steps": 4, "sample_rate": 1, "noise_multiplier": 20, "max_grad_norm": 1}

plans = st.builds(
    lambda rounds, spares, rdp, steps, measured: {
        "rounds": rounds,
        "spare_attempts": spares,
        "rdp": Decimal(rdp) / 1000,
        "steps": steps,
        "measurements": [MEASUREMENT | {"rdp": Decimal(measured) / 1000}] if measured else [],
    },
    st.integers(1, 5),
    st.integers(0, 2),
    st.integers(1, 700),
    st.integers(1, 5),
    st.one_of(st.just(0), st.integers(1, 300)),
)


@dataclass(frozen=True)
class Op:
    """Ask for a round, or as round 0 for the statistics; then, if it was reserved, what becomes of it.

    `late` ends the attempt before the last one.
    """

    contract: int
    round: int
    base: int
    end: str


ops = st.builds(
    Op,
    st.integers(0, 2),
    st.integers(0, 6),
    st.sampled_from([0, 0, 0, 1]),
    st.sampled_from(["spent", "spent", "spent", "failed", "crash", "crash", "late", "restore"]),
)
histories = st.tuples(st.lists(plans, min_size=1, max_size=3), st.lists(ops, max_size=18), st.integers(1, 3000))


@dataclass
class Model:
    """The rules again, in other words: what was tried at each key, and nothing else."""

    limit: Fraction
    tried: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    base: dict[tuple[str, int], str] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    charged: Fraction = Fraction(0)

    def verdict(self, asked: Request) -> str | None:
        of, number = asked.terms, asked.round
        at = (of.contract_id, number)
        mine = {r: ends for (c, r), ends in self.tried.items() if c == of.contract_id}
        spares_used = sum(len(ends) - 1 for ends in mine.values())
        ends = mine.get(number, [])
        rules = (
            ("LEDGER_RESTORED", of.contract_id in self.gone),
            ("ROUND_NOT_PLANNED", number > of.rounds),
            ("BASE_MODEL_CHANGED", bool(ends) and self.base[at] != asked.base_digest),
            ("ROUND_DONE", "spent" in ends),
            ("ROUND_FAILED", "failed" in ends),
            ("ROUND_BACKWARDS", any(r > number for r in mine)),
            ("ATTEMPTS_EXHAUSTED", bool(ends) and spares_used >= of.spare_attempts),
            ("BUDGET_EXCEEDED", self.charged + cost(asked) > self.limit),
        )
        if number == 0:
            rules = (
                ("LEDGER_RESTORED", of.contract_id in self.gone),
                ("MEASUREMENT_NOT_PLANNED", not of.measurements),
                ("MEASUREMENT_DONE", bool(ends)),
                ("BUDGET_EXCEEDED", self.charged + cost(asked) > self.limit),
            )
        return next((code for code, broken in rules if broken), None)

    def reserve(self, asked: Request) -> None:
        at = (asked.terms.contract_id, asked.round)
        self.tried.setdefault(at, []).append("open")
        self.base[at] = asked.base_digest
        self.charged += cost(asked)

    def end(self, row: LedgerRow) -> None:
        self.tried[(row.contract_id, row.round)][row.attempt - 1] = row.state


def ask(op: Op, of: list[Terms]) -> Request:
    kind = None if op.round else "statistics"
    return Request(terms=of[op.contract % len(of)], round=op.round, base_digest=BASES[op.base], kind=kind)


def cost(asked: Request) -> Fraction:
    """What an attempt at it is charged; 0 for statistics that nobody planned."""
    return (
        Fraction(asked.terms.rdp)
        if asked.round
        else sum((Fraction(m.rdp) for m in asked.terms.measurements), Fraction(0))
    )


def play(of: list[Terms], script: list[Op], limit: Decimal) -> Iterator[tuple[list[LedgerRow], Model]]:
    """Run a history; the rows and the model after each step. Refusals must be the model's."""
    rows: list[LedgerRow] = []
    model = Model(limit=Fraction(limit))
    reservations: list[LedgerRow] = []
    for op in script:
        asked = ask(op, of)
        if op.end == "restore":
            restore(rows, model, asked.terms)
            yield rows, model
            continue
        expected = model.verdict(asked)
        row = refused_or(lambda asked=asked: next_reserved(rows, asked, limit))
        if isinstance(row, str) or expected:
            assert row == expected
            continue
        rows.append(row)
        reservations.append(row)
        model.reserve(asked)
        yield rows, model
        if op.end in ("spent", "failed"):
            rows.append(end(rows, row, op.end))
            model.end(rows[-1])
        elif op.end == "late" and len(reservations) > 1:
            late(rows, reservations[-2], model)
        yield rows, model


def refused_or(call: Callable[[], Any]) -> Any:
    """What the call returns, or the code of its refusal."""
    try:
        return call()
    except RefusedError as err:
        return err.code


def end(rows: list[LedgerRow], row: LedgerRow, state: str) -> LedgerRow:
    return next_spent(rows, row, DIGEST) if state == "spent" else next_failed(rows, row, "DATA_NAN")


def restore(rows: list[LedgerRow], model: Model, of: Terms) -> None:
    if of.contract_id in model.gone:
        with pytest.raises(RefusedError, match="LEDGER_RESTORED"):
            next_restored(rows, of)
        return
    used = sum(len(ends) for (c, number), ends in model.tried.items() if c == of.contract_id and number)
    rows.append(next_restored(rows, of))
    model.gone.add(of.contract_id)
    model.charged += (of.planned_attempts - used) * Fraction(of.rdp)
    if (of.contract_id, 0) not in model.tried:
        model.charged += sum(Fraction(m.rdp) for m in of.measurements)


def late(rows: list[LedgerRow], row: LedgerRow, model: Model) -> None:
    """An attempt before the last one of all: it may end only if it is its contract's open one."""
    mine = [r for r in rows if r.contract_id == row.contract_id and (r.kind == row.kind or r.state == "restored")]
    if mine[-1] == row:
        rows.append(next_spent(rows, row, DIGEST))
        model.end(rows[-1])
        return
    with pytest.raises(RefusedError, match=r"ATTEMPT_(ENDED|SUPERSEDED)"):
        next_spent(rows, row, DIGEST)


@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(histories)
def test_the_ledger_obeys_its_laws(history: tuple[list[dict[str, Any]], list[Op], int]):
    of = [terms(name, **plan) for name, plan in zip(NAMES, history[0], strict=False)]
    limit = Decimal(history[2]) / 1000
    before = Fraction(0)
    rows: list[LedgerRow] = []
    for rows, model in play(of, history[1], limit):
        total = Fraction(charged(rows))
        assert total == model.charged >= before  # each attempt once, in full; what is spent stays spent
        if rows[-1].state == "reserved":
            assert total <= model.limit
        before = total
    check_chain(rows)
    spent = [(r.contract_id, r.round) for r in rows if r.state == "spent"]
    assert len(set(spent)) == len(spent)
    for one in of:
        tries = [r for r in rows if r.contract_id == one.contract_id and r.state == "reserved" and r.round]
        assert len(tries) <= one.planned_attempts
        assert len(tries) - len({r.round for r in tries}) <= one.spare_attempts
        assert len({(r.round, r.base_digest) for r in tries}) == len({r.round for r in tries})
        assert charged_steps(rows, one.contract_id) <= one.planned_attempts * one.steps
        if written_off(rows, one.contract_id):
            assert charged_steps(rows, one.contract_id) == one.planned_attempts * one.steps
    assert Fraction(committed(rows, of)) >= Fraction(charged(rows))


@settings(max_examples=500, deadline=None)
@given(histories)
def test_plans_that_fitted_at_signing_never_meet_the_wall(history: tuple[list[dict[str, Any]], list[Op], int]):
    limit = Decimal(history[2]) / 1000
    signed: list[Terms] = []
    for name, plan in zip(NAMES, history[0], strict=False):
        new = terms(name, **plan)
        refused = refused_or(lambda new=new: check_plans([], signed, new, limit))
        costs = [
            Fraction(t.rdp) * t.planned_attempts + sum(Fraction(m.rdp) for m in t.measurements) for t in [*signed, new]
        ]
        too_much = sum(costs) > Fraction(limit)
        assert refused == ("BUDGET_EXCEEDED" if too_much else None)
        if not refused:
            signed.append(new)
    if not signed:
        return
    for rows, model in play(signed, history[1], limit):
        assert Fraction(committed(rows, signed)) <= Fraction(limit)
        assert model.charged <= model.limit  # so no refusal was BUDGET_EXCEEDED: `play` compares each with the model


@settings(max_examples=300, deadline=None)
@given(histories, st.data())
def test_a_crash_anywhere_over_counts(history: tuple[list[dict[str, Any]], list[Op], int], data: st.DataObject):
    """Commits come one by one; the process dies after any of them, in memory only, and goes on from what is durable."""
    of = [terms(name, **plan) for name, plan in zip(NAMES, history[0], strict=False)]
    limit = Decimal(history[2]) / 1000
    rows: list[LedgerRow] = []
    truth, sent = Fraction(0), {}
    for op in history[1]:
        asked = ask(op, of)
        row = refused_or(lambda asked=asked: next_reserved(rows, asked, limit))
        if isinstance(row, str):
            continue
        died = data.draw(st.sampled_from(["before 1", "after 1", "training", "before 2", "after 2", "no"]))
        if died == "before 1":
            continue
        rows.append(row)
        if died != "after 1":
            truth += Fraction(row.rdp)  # the data was looked at
        if died in ("after 2", "no"):
            rows.append(end(rows, row, op.end if op.end == "failed" else "spent"))
            if rows[-1].state == "spent":
                assert sent.setdefault((row.contract_id, row.round), row.attempt) == row.attempt
        check_chain(rows)
        assert truth <= Fraction(charged(rows)) <= Fraction(limit)


@settings(max_examples=300, deadline=None)
@given(histories, st.data())
def test_any_changed_byte_of_a_row_that_has_a_successor_is_found(
    history: tuple[list[dict[str, Any]], list[Op], int], data: st.DataObject
):
    of = [terms(name, **plan) for name, plan in zip(NAMES, history[0], strict=False)]
    steps = list(play(of, history[1], Decimal(history[2]) / 1000))
    rows = steps[-1][0] if steps else []
    if len(rows) < 2:
        return
    index = data.draw(st.integers(0, len(rows) - 2))
    how = data.draw(st.sampled_from(["drop", "double", "swap", "rdp", "base"]))
    forged = list(rows)
    if how == "drop":
        del forged[index]
    elif how == "double":
        forged.insert(index, forged[index])
    elif how == "swap":
        forged[index], forged[index + 1] = forged[index + 1], forged[index]
    elif how == "rdp":
        forged[index] = rows[index].model_copy(update={"rdp": rows[index].rdp + Decimal("0.001")})
    else:
        forged[index] = rows[index].model_copy(update={"steps": rows[index].steps + 1})
    with pytest.raises(FaultError, match="LEDGER_CHAIN"):
        check_chain(forged)


# Real files


@dataclass(frozen=True)
class FileOp:
    """Answer a round in a process of its own, which dies at a line of the two transactions, or does not (0).

    `version`: contents that the training saw, which belong to the data set from then on.
    """

    contract: int
    round: int
    outcome: str
    deadly: int
    version: int


file_ops = st.builds(
    FileOp,
    st.integers(0, 1),
    st.integers(1, 4),
    st.sampled_from(["spent", "spent", "failed"]),
    st.one_of(st.just(0), st.integers(1, 650)),  # a round is some 600 lines
    st.integers(0, 2),
)


@dataclass
class World:
    """A home and a witness on disk, what the operator received, and how often the data was asked."""

    root: Path
    trained: int = 0
    sent: dict[tuple[str, int], str] = field(default_factory=dict)
    versions: set[str] = field(default_factory=set)

    def open(self) -> Store:
        return Store(self.root / "agent.db", witness=self.root / "away" / "witness")

    def live(self, op: FileOp) -> None:
        """One process; what it said is what happened, for the operator and for the data."""
        name = NAMES[op.contract]
        _, said = in_a_child(lambda say: one_round(self, op, say))
        for word, *rest in said:
            if word == "training":
                self.trained += 1
            elif word == "version":
                self.versions.add(rest[0])
            elif word == "sent":
                assert self.sent.setdefault((name, op.round), rest[0]) == rest[0], "two outputs for one key"
            else:
                assert rest[0] in ("ATTEMPTS_EXHAUSTED", "ROUND_BACKWARDS"), said


def one_round(world: World, op: FileOp, say: Callable[[str], None]) -> None:
    lines, run = Lines(op.deadly), key("run")
    with world.open() as store:
        try:
            with lines.counted():
                taken = store.reserve(contract_id(NAMES[op.contract]), op.round, BASE, run)
            if isinstance(taken, Reservation):
                say("training")
                array = train()
                store.add_version(DATA_SET, fingerprint(op.version))
                say(f"version {fingerprint(op.version)}")
                with lines.counted():
                    taken = finish(store, taken, array, op.outcome)
            say(f"sent {digest_of(taken)}")
        except RefusedError as err:
            say(f"refused {err.code}")


def fingerprint(version: int) -> str:
    return sha256_hex(f"rows {version}".encode())


def digest_of(ready: Ready) -> str:
    return sha256_hex(ready.kind.encode() + ready.reply + ready.array)


def finish(store: Store, taken: Reservation, array: bytes, outcome: str) -> Ready:
    if outcome == "failed":
        return store.fail(taken, "DATA_NAN", lambda head: b"reply " + head.encode(), key("run"))
    return complete(store, taken, array)


def check_disk(world: World, before: Fraction) -> Fraction:
    """What must hold after each life: opening verifies chain, signatures and witness. What is charged."""
    with world.open() as store:
        rows, budget = store.rows(DATA_SET), store.budget(DATA_SET)
        total = Fraction(budget.charged)
        assert total == Fraction(1, 10) * sum(r.state == "reserved" for r in rows)
        assert max(before, Fraction(1, 10) * world.trained) <= total <= Fraction(budget.limit)
        ended = [(r.contract_id, r.round) for r in rows if r.state in ("spent", "failed")]
        assert len(set(ended)) == len(ended)
        for (name, number), digest in world.sent.items():
            ready = store.reserve(contract_id(name), number, BASE, key("run"))
            assert isinstance(ready, Ready)
            assert digest_of(ready) == digest
        assert store.rows(DATA_SET) == rows
        assert store.witness_status() in ("current", "absent")
        assert ledger_head(rows) == store.ledger_head(DATA_SET)
        assert world.versions <= set(store.versions(DATA_SET))
        for version in store.versions(DATA_SET):  # appended, renamed, converted: the same data set's money
            refused = refused_or(lambda version=version: store.add_version("elsewhere", version))
            assert refused == "DATA_SET_KNOWN_ELSEWHERE"
    return total


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(file_ops, min_size=1, max_size=6))
def test_files_that_deaths_at_any_line_leave_over_count_and_send_the_same_bytes(script: list[FileOp]):
    with in_memory() as folder:
        world = World(root=folder)
        (world.root / "away").mkdir()
        both = tuple(terms(name, rounds=4, spare_attempts=2) for name in NAMES[:2])
        with new_store(world.root, witness=world.root / "away" / "witness", contracts=both) as store:
            store.declare(card("elsewhere"), Decimal(5))
            assert store.contract(contract_id("two")).signed == signed_contract("two")
            assert store.contract(contract_id("two")).run_public == public_hex(key("run"))
        total = Fraction(0)
        for op in script:
            world.live(op)
            total = check_disk(world, total)
