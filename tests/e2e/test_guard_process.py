"""Real agents whose processes and databases die in the middle of a run: nothing is lost, nothing charged in silence.

One federation for all of it, over the real Flower: three enterprises train for seconds on rows in PostgreSQL, MariaDB
and SQLite. In the first round one loses its trainer, one its guard (which a person starts again), one its executor; in
the second the first one's database is away.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import pytest
from tests.support.proc import alive, descendants, mentioning
from tests.support.process_world import EXECUTOR, PASSPHRASE, TRAINER, World
from tests.support.servers import PASSWORD, Server, mariadb, postgresql

from fedpact_client.store import EgressKind, Store
from fedpact_contract.log import Entry, UpdateDecided, UpdateRefused
from fedpact_contract.messages import Refusal, Update
from fedpact_contract.record import read_envelope

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
ENTERPRISES = 3
ROUNDS, STEPS = 3, 1500


@pytest.fixture(scope="module")
def clinic() -> Iterator[Server]:
    """The first enterprise's database."""
    with postgresql() as server:
        yield server


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, clinic: Server) -> Iterator[World]:
    """Everybody trains the first round, or is about to."""
    folder = tmp_path_factory.mktemp("guard")
    made = World(folder, enterprises=ENTERPRISES, rounds=ROUNDS, steps=STEPS, minimum=2)
    with mariadb() as other:
        for index, (server, read) in enumerate(((clinic, pl.read_csv), (other, pl.read_parquet))):
            server.fill("digits", read(made.shares[index].file))
            made.sources[index] = server.source("SELECT * FROM digits", folder / f"password{index}")
        assert made.shares[2].kind == "sqlite"
        try:
            made.begin()
            yield made
        finally:
            made.stop()
    assert mentioning(str(folder)) == {}, "no orphan"


def test_killed_in_the_middle_of_a_round(world: World, clinic: Server) -> None:
    """Each as soon as it trains: its attempt is reserved then, and not spent. Then a database, and what it was read by.

    A trainer that has read its rows asks for them no more: a new one must.
    """

    def strike(index: int, victim: Callable[[], int | None]) -> tuple[int, set[int]]:
        world.wait(lambda: world.rows(index, 1) == [("reserved", 1)], 120)
        world.wait(lambda: victim() is not None)
        pid = victim()
        assert pid
        below = descendants(pid)
        os.kill(pid, signal.SIGKILL)
        return pid, below

    victims = (lambda: world.child(0, TRAINER), lambda: world.guard(1), lambda: world.child(2, EXECUTOR))
    with ThreadPoolExecutor(ENTERPRISES) as pool:
        struck = list(pool.map(strike, range(ENTERPRISES), victims))
    orphans = struck[1][1]
    assert len(orphans) >= 2
    world.running["agent1"].wait()
    world.wait(lambda: not any(alive(pid) for pid in orphans), 10)
    world.wait(lambda: ("spent", 2) in world.rows(0, 1), 120)
    clinic.kill()
    trainer = world.child(0, TRAINER)
    assert trainer
    os.kill(trainer, signal.SIGKILL)
    world.start_agent(1)
    world.wait(lambda: world.rows(2, 2), 240, every=0.02)  # round 1 is over; a command would see round 2 too late
    assert world.rows(0, 1) == [("reserved", 1), ("reserved", 2), ("spent", 2)], "a spare attempt, charged in full"
    assert world.rows(1, 1) == [("reserved", 1), ("reserved", 2), ("spent", 2)], "the attempt that the kill cut off"
    assert world.rows(2, 1) == [("reserved", 1), ("spent", 1)], "its guard was not hurt: nothing was drawn again"


def test_a_database_that_is_away_costs_nothing_and_is_told(world: World, clinic: Server) -> None:
    """The round is held until the database is back, so that the next one finds it."""
    world.wait(lambda: world.rows(2, 2) == [("reserved", 1)], 120, every=0.02)
    held = world.child(2, TRAINER)
    assert held
    os.kill(held, signal.SIGSTOP)
    try:
        world.wait(lambda: refused(world, 0) == [2], 120)
        assert world.rows(0, 2) == []
        assert "DATA_SOURCE_AWAY" in {a["code"] for a in world.agent(0, "status", "--offline")["alarms"]}
        clinic.begin()
    finally:
        os.kill(held, signal.SIGCONT)
    world.wait(lambda: world.rows(0, 3) == [("reserved", 1), ("spent", 1)], 240)
    status = world.agent(0, "status", "--offline")
    assert status["isolation"]["loader"], "its rows came through a process of their own"
    assert [list((world.home(index) / "loaded").iterdir()) for index in (0, 1)] == [[], []]


def refused(world: World, index: int) -> list[int]:
    """The rounds that an enterprise refused."""
    with Store(world.home(index) / "agent.db", read_only=True) as store:
        return [e.round or 0 for e in store.egress() if e.kind is EgressKind.REFUSAL]


def test_no_secret_stands_in_arguments_or_environment(world: World) -> None:
    """Of guard, executor and trainer: other users of the machine can read the first, the same user both."""
    for index in range(ENTERPRISES):
        world.wait(lambda index=index: world.child(index, TRAINER) and world.child(index, EXECUTOR))
        secrets = [
            PASSPHRASE.encode(),
            PASSWORD.encode(),
            (world.home(index) / "keys" / "selection.key").read_bytes().hex().encode(),
        ]
        secrets.append(json.loads((world.folder / f"invitation{index}.json").read_bytes())["token"].encode())
        for path in (world.home(index) / "keys").rglob("*.key"):
            if path.name != "selection.key":
                secrets += [line for line in path.read_bytes().splitlines() if len(line) > 20 and b"KEY" not in line]
        assert len(secrets) > 6
        for pid in (world.guard(index), world.child(index, TRAINER), world.child(index, EXECUTOR)):
            shown = b"".join(Path(f"/proc/{pid}/{part}").read_bytes() for part in ("cmdline", "environ"))
            assert not [secret for secret in secrets if secret in shown]
        for module in (TRAINER, EXECUTOR):
            environment = Path(f"/proc/{world.child(index, module)}/environ").read_bytes().split(b"\0")
            names = {entry.partition(b"=")[0] for entry in environment if entry}
            assert names <= {b"PATH", b"LANG", b"HOME", b"FEDPACT_PARENT"}, "nothing of the guard's own environment"


def test_the_run_is_completed_and_every_attempt_is_in_the_log(world: World) -> None:
    done = world.fedpact("run", "follow", world.contract_id, "--seconds", "180")
    assert done["phase"] == "completed"
    assert {outcome["outcome"] for outcome in done["outcomes"].values()} == {"admitted"}
    closed = world.fedpact("settle", "close", world.contract_id, "--revenue", "1000.00", "--wait", "60")
    assert closed["final"]
    evidence = world.folder / "evidence"
    world.fedpact("evidence", world.contract_id, "--out", str(evidence))
    assert world.run("fedpact", "verify", str(evidence), ok=(3,))["faults"] == []
    bodies = [Entry.from_bytes(line).open() for line in (evidence / "log.jsonl").read_bytes().splitlines()]
    refusals = [Refusal.from_bytes(read_envelope(b.refusal).body) for b in bodies if isinstance(b, UpdateRefused)]
    attempts = {
        (body.participant, body.round): Update.from_bytes(read_envelope(body.update).body).attempt
        for body in bodies
        if isinstance(body, UpdateDecided)
    }
    who = [world.agent(i, "status", "--offline")["participant"] for i in range(ENTERPRISES)]
    assert attempts == {
        **{(who[0], 1): 2, (who[1], 1): 2, (who[2], 1): 1},
        **dict.fromkeys([(who[1], 2), (who[2], 2), *((p, 3) for p in who)], 1),
    }
    assert [(r.participant, r.round, r.code, r.attempts) for r in refusals] == [(who[0], 2, "DATA_SOURCE_AWAY", 0)]


def test_the_ledgers_agree_with_the_log(world: World) -> None:
    for index, tried in ((0, 3), (1, 4), (2, 3)):
        (line,) = world.agent(index, "budget")["data_sets"]
        (contract,) = line["contracts"]
        assert contract["steps"] == tried * STEPS
        assert float(contract["epsilon_pld"]) <= float(contract["epsilon"])
        with Store(world.home(index) / "agent.db", read_only=True) as store:
            sent = [(e.round, e.sha256) for e in store.egress() if e.kind is EgressKind.UPDATE]
        taken = [1, 3] if index == 0 else [1, 2, 3]
        assert [number for number, _ in sent] == taken, "one update a round, however often it was sent"
        statement = world.agent(index, "statement", world.contract_id, ok=(0, 4))
        outcomes = [line["outcome"] for line in statement["rounds"]]
        assert outcomes == ["admitted", "refused" if index == 0 else "admitted", "admitted"]
        assert statement["sent_but_missed"] == []
