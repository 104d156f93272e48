"""Real agents that pause, withdraw and revoke a run key in the middle of training: how fast, and what becomes of a run.

One federation for all of it, over the real Flower: four enterprises, of which two suffice, and four rounds.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from tests.support.proc import alive, mentioning
from tests.support.process_world import TRAINER, World

from fedpact_contract.log import Entry, KeyRevoked, NoticeTaken, RoundAggregated, RoundOpened, UpdateRefused
from fedpact_contract.messages import Notice, Refusal
from fedpact_contract.record import read_envelope

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
Record = Callable[[str, object], None]
WITHDRAWS, REVOKES, STAYS, PAUSES = range(4)
SECONDS = 10.0
"""What a person may wait, once the command is done, until a training has ended."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("leaving")
    made = World(folder, enterprises=4, rounds=4, steps=1500, minimum=2, deadline=900)
    try:
        made.begin()
        yield made
    finally:
        made.stop()
    assert mentioning(str(folder)) == {}, "no orphan"


def hold(world: World, index: int, number: int) -> int:
    """The trainer's process, held in the middle of the round's attempt: neither we nor this machine can be too slow."""
    world.wait(lambda: world.rows(index, number) == [("reserved", 1)], 240, every=0.02)
    pid = world.child(index, TRAINER)
    assert pid
    os.kill(pid, signal.SIGSTOP)
    assert world.rows(index, number) == [("reserved", 1)]
    return pid


def go_on(world: World) -> None:
    """Let the one that stays finish its round."""
    pid = world.child(STAYS, TRAINER)
    assert pid
    os.kill(pid, signal.SIGCONT)


def ended(pid: int, begun: float) -> float:
    """Seconds from a moment until a process is gone."""
    while alive(pid):
        assert time.monotonic() - begun < SECONDS, "it still trains"
        time.sleep(0.02)
    return time.monotonic() - begun


def who(world: World, index: int) -> str:
    return str(world.agent(index, "status", "--offline")["participant"])


def standing(world: World, index: int) -> str:
    found = world.fedpact("run", "status", world.contract_id)["standing"]
    return str(found.get(who(world, index), {}).get("standing", ""))


def test_a_pause_ends_training_while_the_operator_is_away(world: World, record_property: Record) -> None:
    pid = hold(world, PAUSES, 1)
    hold(world, STAYS, 1)
    operator = world.running["operator"].pid
    os.kill(operator, signal.SIGSTOP)
    try:
        assert world.agent(PAUSES, "pause", world.contract_id)["state"] == "paused"
        seconds = ended(pid, time.monotonic())
        world.wait(lambda: world.rows(PAUSES, 1) == [("reserved", 1), ("failed", 1)], 10)
    finally:
        os.kill(operator, signal.SIGCONT)
    back = time.monotonic()
    world.wait(lambda: standing(world, PAUSES) == "paused by participant", 60)
    record_property("seconds until training had ended", round(seconds, 2))
    record_property("seconds until the run said so", round(time.monotonic() - back, 2))
    go_on(world)


def test_the_run_goes_on_and_so_does_who_resumes(world: World) -> None:
    hold(world, STAYS, 2)
    hold(world, WITHDRAWS, 2)
    assert world.rows(PAUSES, 2) == [], "it is not invited while it pauses"
    assert world.fedpact("run", "status", world.contract_id)["round"] == 2
    assert world.agent(PAUSES, "resume", world.contract_id)["state"] == "running"
    world.wait(lambda: standing(world, PAUSES) == "", 60)


def test_a_withdrawal_ends_training_and_gives_receipts(world: World, record_property: Record) -> None:
    pid = world.child(WITHDRAWS, TRAINER)
    assert pid
    begun = time.monotonic()
    told = world.agent(WITHDRAWS, "withdraw", world.contract_id, "--yes")
    assert not alive(pid), "the receipt says that it was ended"
    record_property("seconds until training had ended and the receipts were there", round(time.monotonic() - begun, 2))
    own, operators = told["receipts"]["participant"], told["receipts"]["operator"]
    assert {held["kind"]: held["count"] for held in own["destroyed"]}["arrays-in-the-outbox"] == 1
    assert [u["digest"] for u in own["updates"]] == [u["digest"] for u in operators["updates"]]
    assert [model["round"] for model in operators["models"]] == [1]
    contract = world.home(WITHDRAWS) / "withdrawn" / f"{world.contract_id}.contract.json"
    for receipt in (own, operators):
        word = world.run("fedpact", "verify", receipt["file"], "--contract", str(contract), ok=(3,))
        assert (word["faults"], word["record"]["by"]) == ([], receipt["by"])
    assert standing(world, WITHDRAWS) == "withdrawn by participant"
    go_on(world)


def test_a_revoked_key_counts_no_more_from_the_entry_on(world: World, record_property: Record) -> None:
    hold(world, STAYS, 3)
    pid = hold(world, REVOKES, 3)
    begun = time.monotonic()
    world.agent(REVOKES, "revoke-key", world.contract_id, "--yes", "--passphrase-file", str(world.passphrase))
    record_property("seconds until the log had it", round(time.monotonic() - begun, 2))
    record_property("seconds until training had ended", round(ended(pid, time.monotonic()), 2))
    assert standing(world, REVOKES) == "run key revoked"
    assert world.agent(REVOKES, "resume", world.contract_id, ok=(5,))["error"]["code"] == "KEY_REVOKED"
    go_on(world)


def test_the_run_is_completed_and_everybody_is_paid(world: World) -> None:
    done = world.fedpact("run", "follow", world.contract_id, "--seconds", "300")
    assert done["phase"] == "completed"
    assert set(done["outcomes"]) == {who(world, STAYS), who(world, PAUSES)}
    held = world.fedpact("settle", "close", world.contract_id, "--revenue", "1000.00", "--wait", "30", ok=(4,))
    assert [line["id"] for line in held["lines"] if line["held"]] == [who(world, REVOKES)], "its run key signs nothing"
    by_hand = world.agent(REVOKES, "countersign", world.contract_id, "--passphrase-file", str(world.passphrase))
    assert by_hand["done"] == "countersigned"
    assert world.fedpact("settle", "close", world.contract_id, "--revenue", "1000.00", "--wait", "30")["final"]


def test_the_evidence_says_all_of_it(world: World) -> None:
    evidence = world.folder / "evidence"
    world.fedpact("evidence", world.contract_id, "--out", str(evidence))
    verified = world.run("fedpact", "verify", str(evidence), ok=(3,))
    assert verified["faults"] == []
    bodies = [Entry.from_bytes(line).open() for line in (evidence / "log.jsonl").read_bytes().splitlines()]
    notices = [Notice.from_bytes(read_envelope(b.notice).body) for b in bodies if isinstance(b, NoticeTaken)]
    assert [(n.participant, n.state) for n in notices] == [
        (who(world, PAUSES), "paused"),
        (who(world, PAUSES), "running"),
        (who(world, WITHDRAWS), "withdrawn"),
    ]
    refusals = [Refusal.from_bytes(read_envelope(b.refusal).body) for b in bodies if isinstance(b, UpdateRefused)]
    said = {(r.participant, r.round): (r.code, r.attempts) for r in refusals}
    assert said == {
        (who(world, PAUSES), 1): ("PARTICIPANT_PAUSED", 1),
        (who(world, WITHDRAWS), 2): ("PARTICIPANT_WITHDRAWN", 1),
    }
    at = next(i for i, b in enumerate(bodies) if isinstance(b, KeyRevoked))
    later = [b for b in bodies[at:] if isinstance(b, RoundOpened)]
    assert later
    assert all(who(world, REVOKES) not in b.invited for b in later)
    made = [b for b in bodies if isinstance(b, RoundAggregated)]
    assert [len(b.admitted) for b in made] == [3, 2, 2, 2]
