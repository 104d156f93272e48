"""The operator's log as the round loop asks it: from few entries the same answers as from the whole log."""

import pytest
import sqlalchemy as sa
from tests.support.federation import Agent, Federation, make_federation

from fedpact_contract import merkle
from fedpact_contract.errors import FailedError, FaultError
from fedpact_contract.log import Checkpoint, Entry, RoundAbandoned, RoundAggregated
from fedpact_contract.messages import Order, Reply, Update
from fedpact_contract.record import read_envelope, sign
from fedpact_server import db, logbook, mirror
from fedpact_server.run_state import invited


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Federation:
    federation = make_federation(tmp_path_factory.mktemp("run") / "x")
    assert federation.run() == "completed"
    return federation


@pytest.fixture
def connection(run):
    with run.database.read() as connection:
        yield connection


def test_the_last_entry_of_a_type_is_found_without_the_others(run, connection) -> None:
    entries = run.entries()
    expected = [entry for entry in entries if entry.type == RoundAggregated.TYPE][-1]
    assert logbook.last_of(connection, run.contract.id, RoundAggregated.TYPE) == expected
    assert logbook.last_of(connection, run.contract.id, "period-closing") is None
    assert logbook.read_entry(connection, run.contract.id, 3) == entries[3]


def test_a_head_is_the_one_that_was_signed(run, connection) -> None:
    hashes = logbook.leaves(connection, run.contract.id)
    sizes = list(logbook.signed_checkpoints(connection, run.contract.id))
    assert len(sizes) == 2 * 3 + 2
    for size in sizes:
        head = logbook.head(connection, run.contract.id, size)
        assert (head.size, head.root) == (size, merkle.root(hashes[:size]).hex())
    with pytest.raises(FailedError) as err:
        logbook.head(connection, run.contract.id, sizes[0] + 100)
    assert err.value.code == "LOG_CHECKPOINT_MISSING"


def test_checkpoints_and_countersignatures_of_a_range_are_those_of_the_whole(run, connection) -> None:
    every = logbook.signed_checkpoints(connection, run.contract.id)
    sizes = list(every)
    some = logbook.signed_checkpoints(connection, run.contract.id, after=sizes[1], upto=sizes[4])
    assert some == {size: every[size] for size in sizes[2:5]}
    signed = logbook.countersignatures(connection, run.contract.id)
    shown = sorted({size for size, _, _ in signed})
    assert len(shown) == 3
    for size in shown:
        found = logbook.countersignatures(connection, run.contract.id, size)
        assert found == [item for item in signed if item[0] == size]
        assert len(found) == 4
    assert logbook.countersignatures(connection, run.contract.id, 0) == []


def test_proofs_that_share_their_leaves_are_right_for_everybody(run, connection) -> None:
    sizes = list(logbook.signed_checkpoints(connection, run.contract.id))
    proofs, upto = logbook.Proofs(connection, run.contract.id, sizes[5]), sizes[5]
    covering = Checkpoint(origin=run.contract.id, size=upto, root=logbook.head(connection, run.contract.id, upto).root)
    for index in (0, 1, upto // 2, upto - 1):
        proved = proofs.entry(index)
        proved.check(covering)
        assert proved == logbook.prove(connection, run.contract.id, index, upto)
    roots = {size: bytes.fromhex(logbook.head(connection, run.contract.id, size).root) for size in sizes}
    roots[0] = merkle.EMPTY_ROOT
    for known in (0, sizes[0], sizes[3], sizes[0]):
        before = known
        for step in proofs.chain(known):
            record = Checkpoint.from_bytes(step.checkpoint.body)
            path = [bytes.fromhex(p) for p in step.consistency]
            assert merkle.verify_consistency(before, record.size, roots[before], roots[record.size], path)
            before = record.size
        assert before == upto
        assert proofs.chain(known) == logbook.head_chain(connection, run.contract.id, known, upto)
    assert proofs.chain(upto) == ()
    with pytest.raises(FailedError) as err:
        logbook.Proofs(connection, run.contract.id, upto + 1).chain(0)
    assert err.value.code == "LOG_CHECKPOINT_MISSING"


def test_an_entry_elsewhere_is_not_proved(run, connection) -> None:
    upto = list(logbook.signed_checkpoints(connection, run.contract.id))[5]
    covering = logbook.head(connection, run.contract.id, upto)
    proved = logbook.prove(connection, run.contract.id, 2, upto)
    for wrong in ({"index": 3}, {"proof": proved.proof[1:]}, {"entry": run.entries()[3]}):
        with pytest.raises(FaultError) as err:
            proved.model_copy(update=wrong).check(covering)
        assert err.value.code == "LOG_INCLUSION"


def test_a_log_that_differs_from_a_checkpoint_signed_before_is_signed_no_more(tmp_path) -> None:
    """A backup that was put back, or an entry that somebody changed."""
    federation = make_federation(tmp_path)
    own = federation.contract.id
    with federation.database.write() as connection:
        logbook.checkpoint(connection, own, federation.operator_run_key)
        changed = Entry.of(RoundAbandoned(round=1, admitted=(), code="X"))
        values = {"data": changed.to_bytes(), "leaf_hash": changed.leaf_hash}
        last = sa.select(sa.func.max(db.entries.c.position)).scalar_subquery()
        connection.execute(db.entries.update().where(db.entries.c.position == last).values(**values))
        with pytest.raises(FailedError) as err:
            logbook.checkpoint(connection, own, federation.operator_run_key)
    assert err.value.code == "LOG_DIVERGED"


def test_who_was_invited_is_the_logs_word(run, connection) -> None:
    assert invited(connection, run.contract.id, 2) == tuple(sorted(run.contract.by_id()))
    with pytest.raises(FailedError) as err:
        invited(connection, run.contract.id, 4)
    assert err.value.code == "ROUND_UNKNOWN"


def test_an_order_shows_the_countersignatures_on_the_head_of_the_round_before(run, connection) -> None:
    table = db.orders.c
    rows = connection.execute(sa.select(table.round, table.order).order_by(table.round)).all()
    sizes = dict(connection.execute(sa.select(db.rounds.c.round, db.rounds.c.checkpoint_size)).all())
    assert len(rows) == 12
    for row in rows:
        order = Order.from_bytes(read_envelope(bytes(row.order)).body)
        expected = logbook.countersignatures(connection, run.contract.id, sizes.get(row.round - 1, 0))
        assert list(order.countersignatures) == [envelope for _, _, envelope in expected]
        assert len(order.countersignatures) == (0 if row.round == 1 else 4)


def claiming(agent: Agent, attempt: int, in_round: int):
    """The agent's updates of one round say that they were another attempt."""

    def tamper(ready) -> tuple[bytes, bytes]:
        reply = Reply.from_bytes(ready.reply)
        update = Update.from_bytes(reply.update.body)
        if update.round != in_round:
            return ready.reply, ready.array
        changed = sign(update.model_copy(update={"attempt": attempt}), agent.desk.run_key)
        return Reply(update=changed, countersignature=reply.countersignature).to_bytes(), ready.array

    return tamper


def test_a_spare_attempt_is_there_once_in_the_whole_contract(tmp_path) -> None:
    """Enterprise 1 uses it in round 1 after a crash; Enterprise 2 did not and may in round 2."""
    federation = make_federation(tmp_path)
    one, two = federation.agent(1), federation.agent(2)
    one.crash = lambda attempt: attempt == 1 and one.answered == 0
    one.tamper, two.tamper = claiming(one, 2, in_round=2), claiming(two, 2, in_round=2)
    assert federation.run() == "completed"
    assert federation.outcomes(1)["Enterprise 1"] == ("admitted", "ADMITTED")
    assert federation.outcomes(2)["Enterprise 1"] == ("rejected", "UPDATE_ATTEMPT")
    assert federation.outcomes(2)["Enterprise 2"] == ("admitted", "ADMITTED")
    with federation.database.read() as connection:
        used = [
            mirror.spares_used(connection, federation.contract.id, federation.agent(number).desk.participant)
            for number in (1, 2, 3, 4)
        ]
    assert used == [2, 1, 0, 0]
