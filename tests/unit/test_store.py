"""The guard's store: transactions, outbox, heads, old copies, the file and the lock."""

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from tests.support.ledger_kit import (
    BASE,
    DATA_SET,
    OTHER_BASE,
    card,
    complete,
    contract_id,
    key,
    new_store,
    reserve,
    signed_contract,
    terms,
    train,
)
from tests.support.required import lacking

from fedpact_client import store_witness
from fedpact_client.store import EgressKind, HomeLock, Ready, SeenHead, Store
from fedpact_contract.arrays import update_digest
from fedpact_contract.errors import FailedError, FaultError, FedpactError, InputError, RefusedError
from fedpact_contract.keys import fingerprint, public_hex
from fedpact_contract.ledger import GENESIS, NO_CONTRACT, LedgerRow
from fedpact_contract.record import open_signed, read_envelope

ONE = contract_id()
RUN = key("run")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with new_store(tmp_path) as made:
        yield made


@pytest.fixture
def witness(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder / "witness"


def code_of(error: type[FedpactError], call: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        call()
    return caught.value.code


def seen(size: int, root: str, checkpoint: bytes) -> SeenHead:
    return SeenHead(size=size, root=root, checkpoint=checkpoint)


def signed_rows(store: Store) -> list[bytes]:
    """The ledger's signed envelopes."""
    with store._db.reading():
        rows = store._db.all("SELECT envelope FROM ledger WHERE data_set = ? ORDER BY seq", (DATA_SET,))
    return [envelope for (envelope,) in rows]


def states(store: Store) -> list[str]:
    return [r.state for r in store.rows(DATA_SET)]


def charge(store: Store) -> Decimal:
    return store.budget(DATA_SET).charged


def again(store: Store, number: int = 1, base: str = BASE) -> Ready:
    found = store.reserve(ONE, number, base, RUN)
    assert isinstance(found, Ready)
    return found


# Data sets


def test_a_data_set_is_declared_once_and_its_card_may_be_renewed(store: Store):
    first = store.data_set(DATA_SET)
    assert (first.limit, first.alpha, first.epsilon) == (Decimal(5), Decimal("4.3"), Decimal(8))
    longer = card(num_examples=120)
    assert store.declare(longer, Decimal("5.0")).card == longer
    assert store.declare(first.card, Decimal(5)).card == first.card
    assert [d.data_set for d in store.data_sets()] == [DATA_SET]


@pytest.mark.parametrize("change", [{"epsilon": Decimal(9)}, {"delta": Decimal("0.000001")}, {"alpha": Decimal(5)}])
def test_a_declared_budget_stays(store: Store, change: dict[str, Decimal]):
    assert code_of(RefusedError, lambda: store.declare(card(**change), Decimal(5))) == "DATA_SET_BUDGET_FIXED"
    assert code_of(RefusedError, lambda: store.declare(card(), Decimal("5.1"))) == "DATA_SET_BUDGET_FIXED"
    assert store.data_set(DATA_SET).epsilon == 8


def test_a_card_is_signed_by_the_participant_that_it_names(store: Store):
    assert code_of(FaultError, lambda: store.declare(card("new", signer="stranger"), Decimal(5))) == "CARD_SIGNER"
    broken = card("new").replace(b'"value":"', b'"value":"00', 1)
    with pytest.raises(FedpactError):
        store.declare(broken, Decimal(5))
    assert code_of(InputError, lambda: store.declare(b"{}", Decimal(5))).startswith("ENVELOPE_FORM")
    assert code_of(InputError, lambda: store.data_set("new")) == "DATA_SET_UNKNOWN"


@pytest.mark.parametrize("limit", ["0", "-1", "NaN", "Infinity"])
def test_a_limit_is_a_positive_number(store: Store, limit: str):
    assert code_of(InputError, lambda: store.declare(card("new"), Decimal(limit))) == "DATA_SET_LIMIT"


def test_a_source_known_under_another_id_is_refused(store: Store):
    store.declare(card("copy"), Decimal(5))
    store.add_version(DATA_SET, "1" * 64)
    store.add_version(DATA_SET, "2" * 64)
    store.add_version(DATA_SET, "1" * 64)
    assert store.versions(DATA_SET) == ["1" * 64, "2" * 64]
    assert code_of(RefusedError, lambda: store.add_version("copy", "1" * 64)) == "DATA_SET_KNOWN_ELSEWHERE"
    assert code_of(RefusedError, lambda: store.add_version("copy", "4" * 64, "1" * 64)) == "DATA_SET_KNOWN_ELSEWHERE"
    assert store.versions("copy") == []
    store.add_version("copy", "4" * 64, "5" * 64)
    assert store.versions("copy") == ["4" * 64, "5" * 64]
    assert code_of(InputError, lambda: store.add_version("nowhere", "3" * 64)) == "DATA_SET_UNKNOWN"


# Contracts


def test_a_contract_is_kept_with_its_terms(store: Store):
    kept = store.contract(ONE)
    assert (kept.terms, kept.signed, kept.run_key_name) == (terms(), signed_contract("one"), "run.pem")
    assert (kept.state, kept.run_public) == ("running", public_hex(RUN))
    assert [c.contract_id for c in store.contracts()] == [ONE]


def test_a_plan_that_does_not_fit_beside_the_others_is_refused(tmp_path: Path):
    with new_store(tmp_path, limit="0.75") as store:
        add = lambda **values: store.add_contract(  # noqa: E731
            signed_contract("two"), terms("two", **values), "run.pem", public_hex(RUN)
        )
        assert code_of(RefusedError, add) == "BUDGET_EXCEEDED"
        assert code_of(InputError, lambda: store.contract(contract_id("two"))) == "CONTRACT_UNKNOWN"
        add(rounds=2)
        assert store.budget(DATA_SET).committed == Decimal("0.7")
        store.set_state(ONE, "withdrawn")
        assert store.budget(DATA_SET).committed == Decimal("0.3")


def test_a_contract_is_added_once_with_its_own_terms(store: Store):
    public = public_hex(RUN)
    add = lambda name, of: store.add_contract(signed_contract(name), of, "run.pem", public)  # noqa: E731
    assert code_of(InputError, lambda: add("one", terms())) == "CONTRACT_KNOWN"
    assert code_of(InputError, lambda: add("two", terms())) == "CONTRACT_ID"
    assert code_of(InputError, lambda: add("two", terms("two", data_set="nowhere"))) == "DATA_SET_UNKNOWN"
    assert code_of(InputError, lambda: store.add_contract(b"[]", terms("two"), "k", public)).startswith("SIGNED")
    bad = lambda: store.add_contract(signed_contract("two"), terms("two"), "k", "no key")  # noqa: E731
    assert code_of(InputError, bad) == "RUN_KEY_FORM"


def test_more_signatures_may_be_added_to_the_same_contract(store: Store):
    renewed = signed_contract("one").replace(b'"delegations":[]', b'"delegations":[]')
    store.replace_signed(ONE, renewed)
    assert store.contract(ONE).signed == renewed
    assert code_of(InputError, lambda: store.replace_signed(ONE, signed_contract("two"))) == "CONTRACT_ID"
    other = contract_id("two")
    assert code_of(InputError, lambda: store.replace_signed(other, signed_contract("two"))) == "CONTRACT_UNKNOWN"


def test_a_contract_goes_through_its_states_and_not_back(store: Store):
    for state in ("paused", "running", "running", "withdrawn"):
        store.set_state(ONE, state)
    assert code_of(InputError, lambda: store.set_state(ONE, "running")) == "CONTRACT_STATE"
    store.set_state(ONE, "closed")
    assert code_of(InputError, lambda: store.set_state(ONE, "withdrawn")) == "CONTRACT_STATE"
    assert code_of(InputError, lambda: store.set_state("0" * 64, "running")) == "CONTRACT_UNKNOWN"


# Heads


def test_every_head_is_kept_and_one_size_has_one_root(store: Store):
    store.add_heads(ONE, [seen(3, "3" * 64, b"signed 3")])
    store.add_heads(ONE, [seen(1, "1" * 64, b"signed 1")])
    store.add_heads(ONE, [seen(3, "3" * 64, b"signed 3 again")])
    assert [(h.size, h.root, h.checkpoint) for h in store.heads(ONE)] == [
        (1, "1" * 64, b"signed 1"),
        (3, "3" * 64, b"signed 3"),
    ]
    assert code_of(FaultError, lambda: store.add_heads(ONE, [seen(3, "4" * 64, b"forked")])) == "HEAD_FORK"
    assert code_of(InputError, lambda: store.add_heads("0" * 64, [seen(1, "1" * 64, b"")])) == "CONTRACT_UNKNOWN"


def test_answers_are_updates_and_refusals(store: Store):
    assert store.answers(ONE) == []
    store.refuse(ONE, 3, BASE, lambda _: b"no")
    store.refuse(ONE, 3, OTHER_BASE, lambda _: b"no")
    assert store.answers(ONE) == [3]
    assert store.sent_updates(ONE) == {}


def test_heads_of_one_order_are_kept_together_or_not_at_all(store: Store):
    store.add_heads(ONE, [seen(3, "3" * 64, b"signed 3")])
    heads = [SeenHead(size=size, root=str(size) * 64, checkpoint=b"") for size in (4, 5)]
    forked = SeenHead(size=3, root="f" * 64, checkpoint=b"")
    assert code_of(FaultError, lambda: store.add_heads(ONE, [*heads, forked])) == "HEAD_FORK"
    assert [h.size for h in store.heads(ONE)] == [3]
    store.add_heads(ONE, heads)
    assert [h.size for h in store.heads(ONE)] == [3, 4, 5]


def test_one_root_a_size_is_countersigned(store: Store):
    store.add_heads(ONE, [seen(3, "3" * 64, b"signed 3")])
    assert code_of(InputError, lambda: store.countersign(ONE, 4, "4" * 64)) == "HEAD_UNKNOWN"
    assert code_of(FaultError, lambda: store.countersign(ONE, 3, "4" * 64)) == "HEAD_FORK"
    assert not store.heads(ONE)[0].countersigned
    store.countersign(ONE, 3, "3" * 64)
    store.countersign(ONE, 3, "3" * 64)
    assert store.heads(ONE)[0].countersigned


# Reserve and complete


def test_a_round_is_charged_before_and_sent_after(store: Store):
    taken = reserve(store)
    assert (taken.state, taken.round, taken.attempt, taken.base_digest) == ("reserved", 1, 1, BASE)
    assert charge(store) == Decimal("0.1")
    array = train()
    ready = complete(store, taken, array)
    spent = store.rows(DATA_SET)[-1]
    assert (spent.state, spent.update_digest) == ("spent", update_digest(array))
    assert ready == Ready(kind="update", reply=b"reply " + spent.row_hash.encode(), array=array)
    assert store.ledger_head(DATA_SET) == spent.row_hash
    assert charge(store) == Decimal("0.1")
    assert store.sent_updates(ONE) == {1: update_digest(array)}
    assert store.answers(ONE) == [1]


def test_asked_again_the_same_bytes_are_sent(store: Store):
    ready = complete(store, reserve(store))
    assert again(store) == ready
    complete(store, reserve(store, 2))
    assert again(store) == ready
    assert states(store) == ["reserved", "spent"] * 2


def test_another_base_model_gets_neither_bytes_nor_training(store: Store):
    complete(store, reserve(store))
    call = lambda: store.reserve(ONE, 1, OTHER_BASE, RUN)  # noqa: E731
    assert code_of(RefusedError, call) == "BASE_MODEL_CHANGED"
    refusal = store.refuse(ONE, 1, OTHER_BASE, lambda head: b"refused at " + head.encode())
    assert refusal.kind == "refusal"
    assert again(store, base=OTHER_BASE) == refusal
    assert again(store).kind == "update"


def test_rows_are_signed_by_the_run_key(store: Store):
    complete(store, reserve(store))
    signed = signed_rows(store)
    opened = tuple(open_signed(read_envelope(data), LedgerRow, public_hex(RUN)) for data in signed)
    assert opened == store.rows(DATA_SET)


def test_only_the_delegated_run_key_charges(store: Store):
    stranger = key("stranger")
    assert code_of(InputError, lambda: store.reserve(ONE, 1, BASE, stranger)) == "RUN_KEY_WRONG"
    taken = reserve(store)
    array = train()
    wrong = lambda: store.complete(taken, lambda _: (b"", array), update_digest(array), stranger)  # noqa: E731
    assert code_of(InputError, wrong) == "RUN_KEY_WRONG"
    assert states(store) == ["reserved"]


def test_an_unknown_contract_and_a_malformed_request_charge_nothing(store: Store):
    assert code_of(InputError, lambda: store.reserve("0" * 64, 1, BASE, RUN)) == "CONTRACT_UNKNOWN"
    assert code_of(InputError, lambda: store.reserve(ONE, 0, BASE, RUN)) == "LEDGER_REQUEST"
    assert code_of(InputError, lambda: store.reserve(ONE, 1, "base", RUN)) == "LEDGER_REQUEST"
    assert code_of(FailedError, lambda: store.reserve(ONE, 2**70, BASE, RUN)) == "STORE_FAILED"
    assert states(store) == []


@pytest.mark.parametrize("state", ["paused", "withdrawn", "closed"])
def test_only_a_running_contract_trains(store: Store, state: str):
    ready = complete(store, reserve(store))
    store.set_state(ONE, state)
    code = {"paused": "PARTICIPANT_PAUSED", "withdrawn": "PARTICIPANT_WITHDRAWN"}.get(state, "CONTRACT_NOT_RUNNING")
    assert code_of(RefusedError, lambda: store.check_running(ONE)) == code
    assert code_of(RefusedError, lambda: store.reserve(ONE, 2, BASE, RUN)) == code
    if state == "paused":
        assert again(store) == ready
    else:
        assert code_of(RefusedError, lambda: store.reserve(ONE, 1, BASE, RUN)) == code


def test_a_contract_withdrawn_while_training_sends_nothing(store: Store):
    taken = reserve(store)
    store.set_state(ONE, "withdrawn")
    assert code_of(RefusedError, lambda: complete(store, taken)) == "PARTICIPANT_WITHDRAWN"
    assert states(store) == ["reserved"]
    assert store.answers(ONE) == []


def test_a_contract_only_signed_does_not_train(tmp_path: Path):
    with Store(tmp_path / "agent.db", create=True) as store:
        store.declare(card(), Decimal(5))
        store.add_contract(signed_contract("one"), terms(), "run.pem", public_hex(RUN))
        assert code_of(RefusedError, lambda: store.reserve(ONE, 1, BASE, RUN)) == "CONTRACT_NOT_RUNNING"
        store.set_state(ONE, "paused")
        assert code_of(RefusedError, lambda: store.reserve(ONE, 1, BASE, RUN)) == "PARTICIPANT_PAUSED"


def test_the_budget_wall_survives_a_restart(tmp_path: Path):
    with new_store(tmp_path, limit="0.4") as store:
        for number in (1, 1, 2, 3):
            reserve(store, number)
    with Store(tmp_path / "agent.db") as store:
        assert charge(store) == store.budget(DATA_SET).limit
        assert code_of(RefusedError, lambda: store.reserve(ONE, 3, BASE, RUN)) == "ATTEMPTS_EXHAUSTED"
        add = lambda: store.add_contract(  # noqa: E731
            signed_contract("two"), terms("two", rounds=1, spare_attempts=0), "run.pem", public_hex(RUN)
        )
        assert code_of(RefusedError, add) == "BUDGET_EXCEEDED"


def test_the_gate_holds_where_the_plans_were_not_checked(tmp_path: Path):
    with new_store(tmp_path, limit="0.4") as store:
        store._db.execute("UPDATE data_sets SET rdp_limit = '0.15'")
        reserve(store)
        assert code_of(RefusedError, lambda: store.reserve(ONE, 2, BASE, RUN)) == "BUDGET_EXCEEDED"
        assert states(store) == ["reserved"]


# Crashes within a process


def test_a_crashed_attempt_is_charged_and_tried_once_more(tmp_path: Path):
    with new_store(tmp_path) as store:
        first = reserve(store)
    with Store(tmp_path / "agent.db") as store:
        second = reserve(store)
        assert (second.attempt, charge(store)) == (2, Decimal("0.2"))
        assert code_of(RefusedError, lambda: complete(store, first)) == "ATTEMPT_SUPERSEDED"
        complete(store, second)
        assert code_of(RefusedError, lambda: complete(store, second)) == "ATTEMPT_ENDED"
        assert code_of(RefusedError, lambda: store.fail(second, "X", lambda _: b"", RUN)) == "ATTEMPT_ENDED"
        assert len(store.sent_updates(ONE)) == 1


class StoppedError(Exception):
    """Raised by a test inside a transaction."""


def test_if_building_the_reply_fails_nothing_has_happened(store: Store):
    taken = reserve(store)
    before = store.rows(DATA_SET)

    def build(head: str) -> tuple[bytes, bytes]:
        assert store.ledger_head(DATA_SET) == head  # the new row is there, inside this transaction
        raise StoppedError

    with pytest.raises(StoppedError):
        store.complete(taken, build, "d" * 64, RUN)
    assert store.rows(DATA_SET) == before
    assert store.answers(ONE) == []
    assert complete(store, taken).kind == "update"


def test_an_array_that_the_ledger_does_not_name_is_not_sent(store: Store):
    taken = reserve(store)
    call = lambda: store.complete(taken, lambda _: (b"reply", train()), update_digest(train()), RUN)  # noqa: E731
    assert code_of(InputError, call) == "UPDATE_DIGEST"
    assert states(store) == ["reserved"]


def test_a_transaction_within_a_transaction_is_a_programming_error(store: Store):
    taken = reserve(store)
    with pytest.raises(RuntimeError):
        store.complete(taken, lambda _: store.add_alarm("X", None, "inside") and (b"", b""), "d" * 64, RUN)
    assert store.alarms() == []


def test_threads_share_a_store(store: Store):
    store.declare(card("other"), Decimal(100))
    store.add_contract(signed_contract("two"), terms("two", data_set="other", rounds=40), "run.pem", public_hex(RUN))
    store.set_state(contract_id("two"), "running")
    faults: list[BaseException] = []

    def note() -> None:
        try:
            for number in range(20):
                store.record_egress(EgressKind.REQUEST, None, None, number, "0" * 64)
                assert store.rows("other") is not None
        except BaseException as err:  # noqa: BLE001 - shown by the assertion below
            faults.append(err)

    threads = [threading.Thread(target=note) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(1, 21):
        complete(store, reserve(store, number, name="two"))
    for thread in threads:
        thread.join()
    assert faults == []
    assert len(store.rows("other")) == 40
    assert [e.seq for e in store.egress()] == list(range(1, 41))


# Failures and refusals


def test_a_failure_of_data_is_charged_refused_and_final(store: Store):
    taken = reserve(store)
    ready = store.fail(taken, "DATA_NAN", lambda head: b"no " + head.encode(), RUN)
    row = store.rows(DATA_SET)[-1]
    assert (row.state, row.code) == ("failed", "DATA_NAN")
    assert ready == Ready(kind="refusal", reply=b"no " + row.row_hash.encode(), array=b"")
    assert again(store) == ready
    assert charge(store) == Decimal("0.1")
    assert store.sent_updates(ONE) == {}
    assert store.answers(ONE) == [1]
    assert code_of(RefusedError, lambda: complete(store, taken)) == "ATTEMPT_ENDED"


def test_a_refusal_by_policy_costs_nothing_and_is_final_for_its_order(store: Store):
    ready = store.refuse(ONE, 1, BASE, lambda head: b"no " + head.encode())
    assert ready.reply == b"no " + GENESIS.encode()
    assert store.refuse(ONE, 1, BASE, lambda _: b"another") == ready
    assert again(store) == ready
    assert charge(store) == 0
    assert isinstance(store.reserve(ONE, 2, BASE, RUN), LedgerRow)


def test_a_refusal_is_no_second_answer(store: Store):
    complete(store, reserve(store))
    assert code_of(RefusedError, lambda: store.refuse(ONE, 1, BASE, lambda _: b"no")) == "OUTBOX_TAKEN"
    assert again(store).kind == "update"
    assert code_of(InputError, lambda: store.refuse("0" * 64, 1, BASE, lambda _: b"no")) == "CONTRACT_UNKNOWN"


def test_an_attempt_whose_order_was_refused_meanwhile_cannot_complete(store: Store):
    taken = reserve(store)
    ready = store.refuse(ONE, 1, BASE, lambda _: b"no")
    assert code_of(RefusedError, lambda: complete(store, taken)) == "OUTBOX_TAKEN"
    assert states(store) == ["reserved"]
    assert again(store) == ready


def test_a_refusal_of_another_base_does_not_block_the_round(store: Store):
    store.refuse(ONE, 1, OTHER_BASE, lambda _: b"no")
    assert complete(store, reserve(store)).kind == "update"


def test_arrays_of_decided_rounds_can_be_discarded(store: Store):
    complete(store, reserve(store))
    kept = complete(store, reserve(store, 2))
    store.refuse(ONE, 3, BASE, lambda _: b"no")
    assert store.discard_arrays(ONE, 2) == 1
    assert store.discard_arrays(ONE, 2) == 0
    assert code_of(RefusedError, lambda: store.reserve(ONE, 1, BASE, RUN)) == "ROUND_DONE"
    assert code_of(RefusedError, lambda: store.refuse(ONE, 1, BASE, lambda _: b"no")) == "ROUND_DONE"
    assert again(store, 2) == kept
    assert again(store, 3).kind == "refusal"
    assert len(store.sent_updates(ONE)) == 2


@pytest.mark.parametrize("column", ["reply", "array"])
def test_changed_bytes_in_the_outbox_are_not_sent(store: Store, column: str):
    complete(store, reserve(store))
    store._db.execute(f"UPDATE outbox SET {column} = x'00000000'")
    assert code_of(FaultError, lambda: store.reserve(ONE, 1, BASE, RUN)) == "OUTBOX_DAMAGED"


# Egress, results, alarms


def test_what_leaves_is_entered_in_order_and_by_kind(store: Store):
    assert store.record_egress(EgressKind.UPDATE, ONE, 1, 10, "a" * 64) == 1
    assert store.record_egress(EgressKind.REQUEST, None, None, 0, "b" * 64, detail="GET /v1/head") == 2
    entries = store.egress()
    assert [(e.seq, e.kind, e.contract_id, e.round, e.size) for e in entries] == [
        (1, "update", ONE, 1, 10),
        (2, "request", None, None, 0),
    ]
    assert (entries[1].detail, entries[1].at) == ("GET /v1/head", "2026-11-24T12:00:00Z")
    call = lambda: store.record_egress("rows", ONE, 1, 10, "a" * 64)  # type: ignore[arg-type]  # noqa: E731
    assert code_of(InputError, call) == "EGRESS_KIND"
    assert len(store.egress()) == 2


def test_an_answer_that_leaves_again_is_counted_where_it_stands(store: Store):
    """However often an order is repeated; another answer, or what the agent itself sends again, is a row of its own."""
    for _ in range(1000):
        assert store.record_egress(EgressKind.UPDATE, ONE, 1, 10, "a" * 64) == 1
    store.record_egress(EgressKind.NO_REPLY, None, None, 4, "b" * 64, detail="LOST")
    store.record_egress(EgressKind.NO_REPLY, None, None, 4, "b" * 64, detail="LOST")
    others = (
        (EgressKind.UPDATE, ONE, 2, 10, "a" * 64),
        (EgressKind.UPDATE, "7" * 64, 1, 10, "a" * 64),
        (EgressKind.REFUSAL, ONE, 1, 10, "a" * 64),
        (EgressKind.UPDATE, ONE, 1, 10, "c" * 64),
        (EgressKind.REQUEST, ONE, None, 0, "d" * 64),
        (EgressKind.REQUEST, ONE, None, 0, "d" * 64),
    )
    for other in others:
        store.record_egress(*other)
    entries = store.egress()
    assert [(e.seq, e.times) for e in entries] == [(1, 1000), (2, 2), *((number, 1) for number in range(3, 9))]
    assert [e.last is None for e in entries] == [False, False, *[True] * 6]
    assert entries[0].at == entries[0].last == "2026-11-24T12:00:00Z"


def test_every_kind_that_may_leave():
    assert {k.value for k in EgressKind} == {
        "enrolment", "card", "signature", "update", "refusal", "countersignature", "objection", "request",
        "measurement", "statement", "no-reply", "notice", "revocation", "receipt",
    }  # fmt: skip


def test_egress_is_durable_before_it_returns(store: Store, tmp_path: Path):
    store.record_egress(EgressKind.CARD, None, None, 3, "a" * 64)
    with Store(tmp_path / "agent.db", read_only=True) as beside:
        assert len(beside.egress()) == 1


def test_results_are_kept_in_the_order_of_arrival(store: Store):
    store.add_result(ONE, 1, b"admitted")
    store.add_result(ONE, 2, b"rejected")
    store.add_result(ONE, 1, b"admitted")
    store.add_result(ONE, 1, b"under a later checkpoint")
    assert store.results(ONE) == [(1, b"admitted"), (2, b"rejected"), (1, b"under a later checkpoint")]
    assert code_of(InputError, lambda: store.add_result("0" * 64, 1, b"")) == "CONTRACT_UNKNOWN"


def test_alarms_keep_their_evidence(store: Store):
    store.add_alarm("HEAD_FORK", ONE, "two roots of size 3", b"signed")
    store.add_alarm("CLOCK", None, "")
    assert [(a.code, a.contract_id, a.detail, a.evidence) for a in store.alarms()] == [
        ("HEAD_FORK", ONE, "two roots of size 3", b"signed"),
        ("CLOCK", None, "", None),
    ]


# The chain on disk


def reopened_code(path: Path, error: type[FedpactError] = FaultError) -> str:
    return code_of(error, lambda: Store(path))


def forge(path: Path, sql: str) -> None:
    """Change the file as somebody would who ignores the triggers."""
    with sqlite3.connect(path) as raw:
        raw.execute("DROP TRIGGER ledger_no_update")
        raw.execute("DROP TRIGGER ledger_no_delete")
        raw.execute(sql)
    raw.close()


@pytest.fixture
def used(tmp_path: Path) -> Path:
    with new_store(tmp_path) as store:
        complete(store, reserve(store))
        complete(store, reserve(store, 2))
    return tmp_path / "agent.db"


def test_the_ledger_only_grows(store: Store):
    reserve(store)
    for sql in ("UPDATE ledger SET seq = 9", "DELETE FROM ledger"):
        assert code_of(FailedError, lambda sql=sql: store._db.execute(sql)) == "STORE_FAILED"
    assert states(store) == ["reserved"]


@pytest.mark.parametrize(
    ("sql", "row", "rule"),
    [
        ("DELETE FROM ledger WHERE seq = 1", 1, "numbered"),
        ("DELETE FROM ledger WHERE seq = 0", 0, "numbered"),
        ("UPDATE ledger SET round = 3 WHERE seq = 2", 2, "columns"),
        ("UPDATE ledger SET row_hash = 'x' WHERE seq = 2", 2, "columns"),
        ("UPDATE ledger SET envelope = (SELECT envelope FROM ledger WHERE seq = 0) WHERE seq = 2", 2, "columns"),
        ('UPDATE ledger SET envelope = replace(envelope, \'"value":"\', \'"value":"0\') WHERE seq = 1', 1, "ENVELOPE"),
        ("UPDATE ledger SET envelope = replace(envelope, 'row.v1', 'row.v2') WHERE seq = 1", 1, "ENVELOPE_TYPE"),
        ("UPDATE ledger SET envelope = replace(envelope, 'payload\":\"', 'payload\":\"!') WHERE seq = 1", 1, "PAYLOAD"),
        (
            "UPDATE contracts SET run_public = printf('%064d', 7)",
            0,
            "SIGNATURE_MISSING",
        ),
        ("DELETE FROM contracts", 0, "signed here"),
    ],
)
def test_a_changed_ledger_is_found_on_opening(used: Path, sql: str, row: int, rule: str):
    forge(used, sql)
    with pytest.raises(FaultError) as caught:
        Store(used)
    assert (caught.value.code, caught.value.field) == ("LEDGER_CHAIN", f"row {row}")
    assert rule in str(caught.value.rule)


def test_a_row_signed_for_something_else_is_found(used: Path):
    with Store(used) as store:
        data = signed_rows(store)[1]
    other = read_envelope(data)
    forged = other.model_copy(update={"signatures": read_envelope(card(signer="run")).signatures})
    with sqlite3.connect(used) as raw:
        raw.execute("DROP TRIGGER ledger_no_update")
        raw.execute("UPDATE ledger SET envelope = ? WHERE seq = 1", (forged.to_bytes(),))
    raw.close()
    with pytest.raises(FaultError, match="SIGNATURE_INVALID"):
        Store(used)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Two data sets of one enterprise, each with a contract that was charged."""
    with new_store(tmp_path) as store:
        complete(store, reserve(store))
        store.declare(card("lungs"), Decimal(5))
        other = terms("two", data_set="lungs")
        store.add_contract(signed_contract("two"), other, "run.pem", public_hex(key("run")))
        store.set_state(other.contract_id, "running")
        complete(store, reserve(store, name="two"))
    return tmp_path / "agent.db"


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE ledger SET data_set = 'lungs', seq = seq + 2 WHERE data_set = 'heart'",
        "UPDATE ledger SET envelope = "
        "(SELECT envelope FROM ledger o WHERE o.seq = ledger.seq AND o.data_set <> ledger.data_set)",
    ],
)
def test_a_ledger_from_another_data_set_is_refused(two: Path, sql: str):
    """Its rows say of which data set they are, under the run key's signature."""
    forge(two, sql)
    with pytest.raises(FaultError) as caught:
        Store(two)
    assert (caught.value.code, caught.value.rule) == ("LEDGER_CHAIN", "the columns beside a row are the row's")


def test_a_store_from_another_home_is_refused(used: Path):
    refused = code_of(RefusedError, lambda: Store(used, participant=fingerprint(public_hex(key("somebody else")))))
    assert refused == "STORE_OF_ANOTHER"


def test_rows_cut_off_at_the_end_need_a_witness_or_the_log(used: Path):
    forge(used, "DELETE FROM ledger WHERE seq = 3")
    with Store(used) as store:
        assert states(store) == ["reserved", "spent", "reserved"]


def test_rows_appended_by_another_process_are_seen(used: Path):
    with Store(used) as one, Store(used) as two:
        assert len(two.rows(DATA_SET)) == 4
        taken = reserve(one, 3)
        assert two.rows(DATA_SET)[-1] == taken
        complete(two, taken)
        assert one.rows(DATA_SET)[-1].state == "spent"


def test_a_row_that_changes_under_an_open_store_is_found(used: Path):
    with Store(used) as store:
        forge(used, "DELETE FROM ledger WHERE seq = 3")
        assert code_of(FaultError, lambda: store.reserve(ONE, 3, BASE, RUN)) == "LEDGER_CHAIN"


# Old copies


def test_a_head_that_the_log_has_must_be_on_the_chain(used: Path, tmp_path: Path):
    old = tmp_path / "old.db"
    with Store(used) as store:
        store.backup(old)
        hashes = [r.row_hash for r in store.rows(DATA_SET)]
        for head in (GENESIS, *hashes):
            store.check_logged_head(DATA_SET, head)
        complete(store, reserve(store, 3))
        head = store.ledger_head(DATA_SET)
    with Store(old) as store:
        assert code_of(RefusedError, lambda: store.check_logged_head(DATA_SET, head)) == "LEDGER_RESTORED"
        store.check_logged_head(DATA_SET, hashes[-1])


def test_the_witness_follows_each_commit(tmp_path: Path, witness: Path):
    with new_store(tmp_path, witness=witness) as store:
        assert store.witness_status() == "absent"
        taken = reserve(store)
        for _ in range(2):
            seen = store_witness.read_witness(witness)
            assert seen is not None
            mark = seen.marks[DATA_SET]
            assert (mark.rows, mark.head, mark.charged) == (
                len(store.rows(DATA_SET)),
                store.ledger_head(DATA_SET),
                charge(store),
            )
            assert store.witness_status() == "current"
            if taken.seq + 1 == mark.rows:
                complete(store, taken)
    assert [p.name for p in witness.parent.iterdir()] == ["witness"]


def test_without_a_witness_path_status_says_so(store: Store):
    reserve(store)
    assert store.witness_status() == "none"


def old_copy(tmp_path: Path, witness: Path) -> Path:
    """An old copy in place of the store: one round spent, then lost one spent and one reserved."""
    path, old = tmp_path / "agent.db", tmp_path / "old.db"
    with new_store(tmp_path, witness=witness) as store:
        complete(store, reserve(store))
        store.backup(old)
        complete(store, reserve(store, 2))
        reserve(store, 3)
    old.replace(path)
    return path


def test_a_restored_copy_is_refused_and_then_written_off(tmp_path: Path, witness: Path):
    path = old_copy(tmp_path, witness)
    for read_only in (False, True):
        with pytest.raises(RefusedError, match="LEDGER_RESTORED") as caught:
            Store(path, witness=witness, read_only=read_only)
        assert "restore" in caught.value.remedy
    with Store(path, witness=witness, restoring=True) as store:
        with pytest.raises(RuntimeError):
            reserve(store, 2)
        rows = store.write_off({ONE: RUN})
        assert [(r.state, r.rdp) for r in rows] == [("restored", Decimal("0.3"))]
    with Store(path, witness=witness) as store:
        assert store.witness_status() == "current"
        assert charge(store) == Decimal("0.4")
        assert code_of(RefusedError, lambda: store.reserve(ONE, 2, BASE, RUN)) == "LEDGER_RESTORED"
        assert again(store).kind == "update"
        assert store.write_off({ONE: RUN}) == []


def test_a_write_off_without_the_run_key_is_unsigned_and_one_with_a_wrong_key_refused(tmp_path: Path, witness: Path):
    path = old_copy(tmp_path, witness)
    with Store(path, witness=witness, restoring=True) as store:
        assert code_of(InputError, lambda: store.write_off({ONE: key("stranger")})) == "RUN_KEY_WRONG"
        assert states(store) == ["reserved", "spent"]
        store.write_off({})
        assert read_envelope(signed_rows(store)[-1]).signatures == ()
    with Store(path, witness=witness) as store:
        assert states(store)[-1] == "restored"


def test_what_an_unknown_contract_charged_is_charged_again(tmp_path: Path, witness: Path):
    path, old = tmp_path / "agent.db", tmp_path / "old.db"
    with new_store(tmp_path, witness=witness) as store:
        complete(store, reserve(store))
        store.set_state(ONE, "closed")
        store.backup(old)
        store.add_contract(signed_contract("two"), terms("two"), "run.pem", public_hex(RUN))
        store.set_state(contract_id("two"), "running")
        for number in (1, 1, 2):
            reserve(store, number, name="two")
        spent = charge(store)
    old.replace(path)
    with Store(path, witness=witness, restoring=True) as store:
        rows = store.write_off({})
        assert [(r.contract_id, r.rdp) for r in rows] == [(NO_CONTRACT, Decimal("0.3"))]
        assert charge(store) == spent
    with Store(path, witness=witness) as store:
        assert charge(store) == spent


def test_a_write_off_that_crashed_before_the_witness_is_done_again(tmp_path: Path, witness: Path, monkeypatch):
    path = old_copy(tmp_path, witness)
    with monkeypatch.context() as patch, Store(path, witness=witness, restoring=True) as store:
        patch.setattr(store_witness, "write_witness", lambda *_: (_ for _ in ()).throw(StoppedError))
        with pytest.raises(StoppedError):
            store.write_off({ONE: RUN})
    assert code_of(RefusedError, lambda: Store(path, witness=witness)) == "LEDGER_RESTORED"
    with Store(path, witness=witness, restoring=True) as store:
        assert store.write_off({ONE: RUN}) == []
    with Store(path, witness=witness) as store:
        assert charge(store) == Decimal("0.4")


def test_a_copy_from_before_the_data_set_was_declared_asks_for_it(tmp_path: Path, witness: Path):
    path, old = tmp_path / "agent.db", tmp_path / "old.db"
    with Store(path, create=True) as store:
        store.backup(old)
    path.unlink()
    with new_store(tmp_path, witness=witness) as store:
        complete(store, reserve(store))
    old.replace(path)
    assert code_of(RefusedError, lambda: Store(path, witness=witness)) == "LEDGER_RESTORED"
    with Store(path, witness=witness, restoring=True) as store:
        assert code_of(InputError, lambda: store.write_off({})) == "DATA_SET_UNKNOWN"
        store.declare(card(), Decimal(5))
        assert [r.rdp for r in store.write_off({})] == [Decimal("0.1")]


def test_a_fresh_store_beside_an_old_witness_is_refused(tmp_path: Path, witness: Path):
    with new_store(tmp_path, witness=witness) as store:
        reserve(store)
    (tmp_path / "agent.db").unlink()
    assert code_of(InputError, lambda: Store(tmp_path / "agent.db", witness=witness)) == "STORE_MISSING"
    assert (
        code_of(RefusedError, lambda: Store(tmp_path / "agent.db", witness=witness, create=True)) == "LEDGER_RESTORED"
    )


def test_a_witness_left_behind_by_a_crash_catches_up_on_opening(tmp_path: Path, witness: Path):
    with new_store(tmp_path, witness=witness) as store:
        taken = reserve(store)
        behind = witness.read_bytes()
        complete(store, taken)
        current = witness.read_bytes()
    witness.write_bytes(behind)
    with Store(tmp_path / "agent.db", witness=witness, read_only=True) as store:
        assert store.witness_status() == "behind"
    with Store(tmp_path / "agent.db", witness=witness):
        assert witness.read_bytes() == current


def test_an_absent_witness_stays_absent_until_the_next_commit(tmp_path: Path, witness: Path):
    with new_store(tmp_path, witness=witness) as store:
        reserve(store)
    witness.unlink()
    with Store(tmp_path / "agent.db", witness=witness) as store:
        assert store.witness_status() == "absent"
        reserve(store, 2)
        assert store.witness_status() == "current"


def test_a_damaged_witness_is_named(tmp_path: Path, witness: Path):
    with new_store(tmp_path, witness=witness) as store:
        reserve(store)
    witness.write_bytes(b"\xff{")
    assert code_of(InputError, lambda: Store(tmp_path / "agent.db", witness=witness)) == "WITNESS_DAMAGED"
    witness.unlink()
    witness.mkdir()
    assert code_of(FailedError, lambda: Store(tmp_path / "agent.db", witness=witness)) == "WITNESS_UNREADABLE"


def test_nothing_is_charged_while_the_witness_cannot_be_written(tmp_path: Path, witness: Path):
    with new_store(tmp_path, witness=witness) as store:
        taken = reserve(store)
        witness.parent.rename(tmp_path / "unmounted")
        assert code_of(FailedError, lambda: reserve(store, 2)) == "WITNESS_UNWRITABLE"
        assert code_of(FailedError, lambda: complete(store, taken)) == "WITNESS_UNWRITABLE"
        assert states(store) == ["reserved"]
        (tmp_path / "unmounted").rename(witness.parent)
        assert complete(store, taken).kind == "update"


def test_after_a_commit_that_was_not_witnessed_nothing_leaves(tmp_path: Path, witness: Path, monkeypatch):
    with new_store(tmp_path, witness=witness) as store:
        taken = reserve(store)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            for _ in range(2):
                with pytest.raises(FailedError, match="WITNESS_UNWRITABLE"):
                    complete(store, taken)
            assert states(store) == ["reserved", "spent"]
            assert code_of(FailedError, lambda: store.reserve(ONE, 1, BASE, RUN)) == "WITNESS_UNWRITABLE"
        assert again(store).kind == "update"
        assert store.witness_status() == "current"
    assert [p.name for p in witness.parent.iterdir()] == ["witness"]


# The file


def test_a_missing_store_is_never_a_fresh_one(tmp_path: Path):
    path = tmp_path / "home" / "agent.db"
    assert code_of(InputError, lambda: Store(path)) == "STORE_MISSING"
    assert not path.exists()
    Store(path, create=True).close()
    assert path.stat().st_mode & 0o077 == 0
    assert code_of(InputError, lambda: Store(path, create=True)) == "STORE_EXISTS"
    (tmp_path / "file").write_bytes(b"")
    assert code_of(FailedError, lambda: Store(tmp_path / "file" / "agent.db", create=True)) == "STORE_UNWRITABLE"


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 100, b"SQLite format 3\x00" + b"\x00" * 4080])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes):
    path = tmp_path / "agent.db"
    path.write_bytes(content)
    assert reopened_code(path, InputError) == "STORE_DAMAGED"


def test_another_programs_database_is_no_store(tmp_path: Path):
    path = tmp_path / "agent.db"
    with sqlite3.connect(path) as raw:
        raw.execute("CREATE TABLE cars (name TEXT)")
    raw.close()
    assert reopened_code(path, InputError) == "STORE_DAMAGED"


def test_a_page_overwritten_is_found_by_the_integrity_check(used: Path):
    with Store(used) as store:
        store.check_integrity()
    size = used.stat().st_size
    with used.open("r+b") as file:
        file.seek(size - 4096)
        file.write(b"\xff" * 4096)
    with pytest.raises(InputError, match="STORE_DAMAGED"), Store(used) as store:
        store.check_integrity()


@pytest.mark.parametrize(
    ("change", "code"),
    [("version = 1", "STORE_OLDER"), ("version = 99", "STORE_NEWER"), ("accounting = 'GDP'", "STORE_VERSION")],
)
def test_another_schema_version_is_refused(used: Path, change: str, code: str):
    with sqlite3.connect(used) as raw:
        raw.execute(f"UPDATE schema_version SET {change}")
    raw.close()
    assert reopened_code(used, InputError) == code


def test_an_update_larger_than_sqlite_takes_is_named(store: Store):
    taken = reserve(store)
    store._db._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000)
    assert code_of(FailedError, lambda: complete(store, taken, train(100_000))) == "STORE_TOO_BIG"


def test_a_full_disk_is_named_and_charges_nothing(store: Store):
    pages = store._db.one("PRAGMA page_count")
    assert pages is not None
    store._db.execute(f"PRAGMA max_page_count = {pages[0]}")
    taken = reserve(store)
    assert code_of(FailedError, lambda: complete(store, taken, train(100_000))) == "STORE_FULL"
    assert states(store) == ["reserved"]
    store._db.execute("PRAGMA max_page_count = 1000000")
    assert complete(store, taken, train(100_000)).kind == "update"


def test_a_read_only_store_refuses_to_write(used: Path):
    with Store(used, read_only=True) as store:
        assert len(store.rows(DATA_SET)) == 4
        assert code_of(FailedError, lambda: reserve(store, 3)) == "STORE_UNWRITABLE"


@pytest.mark.root
def test_a_read_only_disk_is_named(used: Path, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    program = (
        "import sys; from pathlib import Path\n"
        "from fedpact_client.store import Store\n"
        "from fedpact_contract.errors import FedpactError\n"
        f"store = Store(Path({str(disk / 'agent.db')!r}))\n"
        f"print(len(store.rows({DATA_SET!r})))\n"
        "try:\n    store.add_alarm('X', None, '')\nexcept FedpactError as err:\n    print(err.code)\n"
    )
    script = f'mount --bind {used.parent} {disk} && mount -o remount,ro,bind {disk} && {sys.executable} -c "$PROGRAM"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        env=os.environ | {"PROGRAM": program},
        capture_output=True,
        text=True,
        check=False,
    )
    if (done.returncode and "unshare" in done.stderr + done.stdout) or "mount" in done.stderr:
        lacking(f"this machine forbids mounts: {done.stderr.strip()}")
    assert done.stdout.split() == ["4", "STORE_UNWRITABLE"], done.stderr


def test_a_busy_store_is_named(used: Path, monkeypatch):
    monkeypatch.setattr("fedpact_client.store_db.BUSY_SECONDS", 0.05)
    other = sqlite3.connect(used, isolation_level=None)
    with Store(used) as store:
        other.execute("BEGIN IMMEDIATE")
        assert code_of(FailedError, lambda: reserve(store, 3)) == "STORE_BUSY"
        assert len(store.rows(DATA_SET)) == 4  # reading goes on
        other.execute("ROLLBACK")
        assert reserve(store, 3).attempt == 1
    other.close()


def test_a_file_in_another_journal_mode_is_brought_back(used: Path):
    raw = sqlite3.connect(used)
    raw.execute("PRAGMA journal_mode = WAL")
    raw.close()
    with Store(used) as store:
        assert store._db.one("PRAGMA journal_mode") == ("truncate",)
        assert store._db.one("PRAGMA synchronous") == (2,)


def test_a_file_that_others_hold_in_wal_mode_is_refused(used: Path, monkeypatch):
    monkeypatch.setattr("fedpact_client.store_db.BUSY_SECONDS", 0.05)
    raw = sqlite3.connect(used)
    raw.execute("PRAGMA journal_mode = WAL")
    raw.execute("SELECT count(*) FROM ledger").fetchall()
    assert reopened_code(used, FailedError) == "STORE_BUSY"
    raw.close()


def test_a_backup_is_whole_and_overwrites_nothing(used: Path, tmp_path: Path):
    copy = tmp_path / "backup" / "agent.db"
    with Store(used) as store:
        store.backup(copy)
        assert code_of(InputError, lambda: store.backup(copy)) == "STORE_EXISTS"
        rows = store.rows(DATA_SET)
    assert copy.stat().st_mode & 0o077 == 0
    with Store(copy) as store:
        assert store.rows(DATA_SET) == rows
        assert again(store).kind == "update"
        store.check_integrity()


def test_the_file_alone_is_the_whole_store(used: Path, tmp_path: Path):
    copy = tmp_path / "copied" / "agent.db"
    copy.parent.mkdir()
    shutil.copy(used, copy)
    with Store(copy) as store:
        assert len(store.rows(DATA_SET)) == 4


# The lock


def test_a_second_guard_is_told_who_holds_the_home(tmp_path: Path):
    program = (
        "import sys, pathlib\nfrom fedpact_client.store import HomeLock\n"
        "lock = HomeLock(pathlib.Path(sys.argv[1])); lock.acquire(); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"process {holder.pid}") as caught:
            HomeLock(tmp_path).acquire()
        assert (caught.value.code, caught.value.exit_code) == ("HOME_LOCKED", 2)
        assert "`fedpact-agent start`" in caught.value.message
        assert "guard" not in caught.value.message
        holder.kill()
    with HomeLock(tmp_path) as lock:
        assert lock.path.read_text() == f"{os.getpid()}\n"


def test_the_lock_is_released_and_taken_again(tmp_path: Path):
    first, second = HomeLock(tmp_path), HomeLock(tmp_path)
    with first:
        assert code_of(InputError, second.acquire) == "HOME_LOCKED"
        with pytest.raises(RuntimeError):
            first.acquire()
    first.release()
    with second:
        assert code_of(InputError, first.acquire) == "HOME_LOCKED"


def test_a_holder_that_has_not_yet_named_itself_is_unknown(tmp_path: Path):
    with HomeLock(tmp_path) as lock:
        lock.path.write_text("")
        with pytest.raises(InputError, match="process unknown"):
            HomeLock(tmp_path).acquire()


def test_a_home_that_is_not_there_cannot_be_locked(tmp_path: Path):
    assert code_of(InputError, HomeLock(tmp_path / "nowhere").acquire) == "HOME_MISSING"
    (tmp_path / "guard.lock").mkdir()
    assert code_of(FailedError, HomeLock(tmp_path).acquire) == "HOME_UNWRITABLE"
