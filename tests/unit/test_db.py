"""The operator's database: reads of one moment, writes that are whole or nothing."""

import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fedpact_contract.errors import FailedError, ServiceError
from fedpact_server import db
from fedpact_server.db import Database


@pytest.fixture
def database(tmp_path: Path) -> Database:
    made = Database.in_home(tmp_path)
    made.create()
    return made


def add(connection: Connection) -> None:
    connection.execute(db.alarms.insert().values(at="2026-11-24T12:00:00Z", code="TEST", detail=""))


def count(connection: Connection) -> int:
    return int(connection.execute(sa.select(sa.func.count()).select_from(db.alarms)).scalar_one())


def test_what_is_read_in_one_transaction_is_of_one_moment(database: Database) -> None:
    """Evidence is read in several queries: a checkpoint must not be newer than the entries beside it."""
    with database.read() as reader:
        assert count(reader) == 0
        with database.write() as writer:
            add(writer)
        assert count(reader) == 0
    with database.read() as reader:
        assert count(reader) == 1


def test_a_write_that_fails_leaves_nothing(database: Database) -> None:
    def fail() -> None:
        with database.write() as writer:
            add(writer)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with database.read() as reader:
        assert count(reader) == 0


def test_writers_wait_for_each_other_so_that_what_they_read_still_holds(database: Database) -> None:
    def work() -> None:
        for _ in range(10):
            with database.write() as writer:
                seen = count(writer)
                add(writer)
                assert count(writer) == seen + 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as reader:
        assert count(reader) == 40


def test_a_database_of_another_release_is_refused(database: Database) -> None:
    with database.write() as writer:
        writer.execute(db.meta.update().where(db.meta.c.key == "schema").values(value="999"))
    with pytest.raises(FailedError) as err:
        database.check()
    assert (err.value.code, err.value.file) == ("DATABASE_VERSION", database.engine.url.database)
    assert "999" in err.value.message


def test_a_database_that_does_not_answer(tmp_path: Path) -> None:
    away = Database(f"sqlite:///{tmp_path}/no/such/folder/operator.db")
    with pytest.raises(ServiceError) as err:
        away.check()
    assert err.value.code == "DATABASE_AWAY"
