"""A store of an earlier schema becomes one of today, with a backup first; kill -9 anywhere loses nothing."""

import datetime
import json
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.ledger_kit import BASE, DATA_SET, complete, contract_id, key, new_store, reserve, terms
from tests.support.store_child import Points
from tests.support.store_v1 import as_version_1, as_version_2

from fedpact_client import store_db, store_upgrade
from fedpact_client.store import EgressKind, HomeLock, Ready, SeenHead, Store
from fedpact_client.store_upgrade import Upgraded, upgrade
from fedpact_contract.errors import FaultError, InputError

NOW = datetime.datetime(2026, 11, 30, 9, 30, tzinfo=datetime.UTC)
ONE = contract_id()
STAMPED = "agent.db.version-1.20261130T093000Z"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A home's ledgers as an earlier release left them: spent, failed and hanging attempts, outbox, heads, egress."""
    witness = tmp_path / "witness"
    with new_store(tmp_path, witness=witness, contracts=(terms(rounds=5, spare_attempts=2),)) as store:
        complete(store, reserve(store, 1))
        store.fail(reserve(store, 2), "DATA_NAN", lambda head: b"no " + head.encode(), key("run"))
        reserve(store, 3)
        store.add_heads(ONE, [SeenHead(size=3, root="3" * 64, checkpoint=b"signed 3")])
        store.record_egress(EgressKind.UPDATE, ONE, 1, 42, "4" * 64)
    as_version_1(tmp_path / "agent.db")
    return tmp_path / "agent.db"


def seen(path: Path) -> tuple[Any, ...]:
    """Everything that the store holds, as today's program reads it; whole ledgers were verified by opening it."""
    with Store(path, witness=path.with_name("witness"), read_only=True) as store:
        ready = {n: store._outbox.get(ONE, n, BASE) for n in (1, 2)}
        return (
            store.rows(DATA_SET),
            store.budget(DATA_SET),
            store.heads(ONE),
            store.egress(),
            ready,
            store.contracts(),
        )


def raw(path: Path) -> list[Any]:
    """Version, and the signed rows, byte for byte."""
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT seq, row_hash, envelope FROM ledger ORDER BY seq").fetchall()
        version = connection.execute("SELECT version FROM schema_version").fetchall()
    connection.close()
    return [version, rows]


def schema(path: Path) -> dict[str, str]:
    with sqlite3.connect(path) as connection:
        found = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    connection.close()
    return {name: "".join(sql.split()).replace('"', "") for name, sql in found}


def test_an_old_store_is_not_opened_but_upgraded(old: Path, tmp_path: Path) -> None:
    before = raw(old)
    with pytest.raises(InputError) as refused:
        Store(old)
    assert (refused.value.code, "fedpact-agent upgrade" in refused.value.remedy) == ("STORE_OLDER", True)
    assert raw(old) == before
    assert upgrade(old, NOW) == Upgraded(old=1, new=store_db.VERSION, backup=tmp_path / STAMPED)
    assert raw(old)[1] == before[1], "what was signed stays"
    assert raw(tmp_path / STAMPED) == before
    assert (tmp_path / STAMPED).stat().st_mode & 0o777 == 0o600
    rows, budget, heads, egress, ready, contracts = seen(old)
    assert [r.state for r in rows] == ["reserved", "spent", "reserved", "failed", "reserved"]
    assert budget.charged == 3 * terms().rdp
    assert (len(heads), len(egress), [c.state for c in contracts]) == (1, 1, ["running"])
    assert (ready[1].kind, ready[2].kind) == ("update", "refusal")


def test_it_is_as_one_that_was_made_today(old: Path, tmp_path: Path) -> None:
    upgrade(old, NOW)
    Store(tmp_path / "fresh.db", create=True).close()
    assert schema(old) == schema(tmp_path / "fresh.db")
    with Store(old, witness=tmp_path / "witness") as store:
        assert isinstance(store.reserve(ONE, 1, BASE, key("run")), Ready), "sent again, byte for byte"
        complete(store, reserve(store, 3))
        with pytest.raises(Exception, match="only grows"):
            store._db.execute("DELETE FROM ledger")


def test_a_store_of_version_2_too(tmp_path: Path) -> None:
    """Its egress ledger had a row for each time that an answer left; they stay, and what leaves again is counted."""
    path = tmp_path / "agent.db"
    with new_store(tmp_path, contracts=(terms(),)) as store:
        store.record_egress(EgressKind.UPDATE, ONE, 1, 42, "4" * 64)
    as_version_2(path)
    with sqlite3.connect(path) as connection:
        connection.execute(
            "INSERT INTO egress SELECT 2, at, kind, contract_id, round, size, sha256, detail FROM egress"
        )
    connection.close()
    assert upgrade(path, NOW).old == 2
    Store(tmp_path / "fresh.db", create=True).close()
    assert schema(path) == schema(tmp_path / "fresh.db")
    with Store(path) as store:
        assert [(e.seq, e.times, e.last) for e in store.egress()] == [(1, 1, None), (2, 1, None)]
        assert store.record_egress(EgressKind.UPDATE, ONE, 1, 42, "4" * 64) == 1
        assert [e.times for e in store.egress()] == [2, 1]


def test_again_there_is_nothing_to_do(old: Path, tmp_path: Path) -> None:
    upgrade(old, NOW)
    after = old.read_bytes()
    assert upgrade(old, NOW) == Upgraded(old=store_db.VERSION, new=store_db.VERSION, backup=None)
    assert old.read_bytes() == after


def test_an_earlier_program_refuses_it(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upgrade(old, NOW)
    for module in (store_db, store_upgrade):
        monkeypatch.setattr(module, "VERSION", 1)
    for use in (lambda: Store(old), lambda: upgrade(old, NOW)):
        with pytest.raises(InputError) as refused:
            use()
        assert refused.value.code == "STORE_NEWER"
        assert "nothing leads back" in refused.value.remedy


def test_no_step_leads_from_elsewhere(old: Path, tmp_path: Path) -> None:
    with sqlite3.connect(old) as connection:
        connection.execute("UPDATE schema_version SET accounting = 'GDP'")
    connection.close()
    with pytest.raises(InputError, match="STORE_VERSION"):
        upgrade(old, NOW)
    assert list(tmp_path.glob("agent.db.*")) == []


def test_a_ledger_that_does_not_hold_stays_as_it_was(old: Path) -> None:
    with sqlite3.connect(old) as connection:
        connection.execute("DROP TRIGGER ledger_no_update")
        connection.execute("UPDATE ledger SET envelope = replace(envelope, 'signatures', 'signature5') WHERE seq = 2")
        connection.execute(
            "CREATE TRIGGER ledger_no_update BEFORE UPDATE ON ledger BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    connection.close()
    before = raw(old)
    with pytest.raises(FaultError, match="LEDGER_CHAIN"):
        upgrade(old, NOW)
    assert raw(old) == before


def test_an_old_copy_is_noticed_after_the_upgrade_too(old: Path, tmp_path: Path) -> None:
    """The witness of before is ahead of a copy of before: an upgrade makes no old copy a new one."""
    stale = shutil.copy(old, tmp_path / "stale.db")
    upgrade(old, NOW)
    with Store(old, witness=tmp_path / "witness") as store:
        complete(store, reserve(store, 3))
    shutil.copy(stale, old)
    upgrade(old, NOW)
    with pytest.raises(Exception, match="LEDGER_RESTORED"):
        Store(old, witness=tmp_path / "witness")


def killed_at(point: int, path: Path) -> bool:
    """Upgrade in a process of its own, killed before its n-th statement, fsync or rename; whether it was."""
    child = os.fork()
    if child == 0:
        points, connect = Points(point), sqlite3.connect

        def watched(*values: Any, **named: Any) -> sqlite3.Connection:
            connection = connect(*values, **named)
            connection.set_trace_callback(points)
            return connection

        sqlite3.connect = watched
        os.fsync = points.before(os.fsync)
        os.rename = points.before(os.rename)
        os.replace = points.before(os.replace)
        try:
            with HomeLock(path.parent):
                upgrade(path, NOW)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return bool(status)


def everywhere(try_one: Callable[[int], bool]) -> Iterator[int]:
    point = 1
    while try_one(point):
        yield point
        point += 1


def test_kill_9_anywhere_loses_nothing(old: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    for name in ("agent.db", "witness"):
        shutil.copy(tmp_path / name, whole / name)
    before = raw(old)
    upgrade(whole / "agent.db", NOW)
    wanted = seen(whole / "agent.db")
    versions = set()

    def try_one(point: int) -> bool:
        place = tmp_path / f"at{point}"
        place.mkdir()
        for name in ("agent.db", "witness"):
            shutil.copy((whole / STAMPED) if name == "agent.db" else tmp_path / name, place / name)
        died = killed_at(point, place / "agent.db")
        version, rows = raw(place / "agent.db")  # rolls back what was open
        versions.add(version[0][0])
        assert rows == before[1]
        if version == [(store_db.VERSION,)]:
            assert raw(place / STAMPED) == before, "a backup was there before anything changed"
        for copy in place.glob("*Z"):
            assert raw(copy) == before, "what has a backup's name is whole"
        upgrade(place / "agent.db", NOW)
        assert seen(place / "agent.db") == wanted
        return died

    points = list(everywhere(try_one))
    assert len(points) > len(store_upgrade.STEPS[1]) + 5
    assert versions == {1, store_db.VERSION}


def test_the_command(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import sys

    from fedpact_client.cli import main
    from fedpact_client.home import init

    home = init(tmp_path / "agent", name="A", entity_code="9" * 18, sector="medical", passphrase=b"long enough")
    as_version_1(home.db_path)

    def run(*words: str) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["fedpact-agent", *words, "--home", str(home.path), "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), json.loads(capsys.readouterr().out)

    assert run("status", "--offline")[1]["error"]["code"] == "STORE_OLDER"
    with HomeLock(home.path):
        assert run("upgrade")[1]["error"]["code"] == "HOME_LOCKED"
    code, done = run("upgrade")
    assert (code, done["old"], done["new"]) == (0, 1, store_db.VERSION)
    assert Path(done["backup"]).is_file()
    assert run("upgrade")[1]["backup"] is None
    assert run("status", "--offline")[0] == 0
