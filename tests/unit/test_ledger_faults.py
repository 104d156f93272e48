"""Faults of the disk under the ledgers: full while reserving; deleted, cut short, an old copy. Nothing is trained."""

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.support.agent_world import PASSPHRASE, Lab, lab
from tests.support.ledger_kit import BASE, DATA_SET, complete, contract_id, key, new_store, reserve, train

from fedpact_client import guard
from fedpact_client.home import AgentHome
from fedpact_client.review import review
from fedpact_client.signing import commit
from fedpact_client.store import Store
from fedpact_contract.errors import FailedError, FedpactError
from fedpact_contract.files import replace_file
from fedpact_contract.request import utc_now

ONE = contract_id()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder: Path) -> Path:
    """Take every byte that is left."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as out:
        for size in (4096, 512, 1):
            try:
                while out.write(bytes(size)):
                    pass
            except OSError:
                continue
    return filler


@pytest.mark.root
def test_a_disk_that_is_full_while_reserving_charges_nothing_and_goes_on_once_it_is_freed(small_disk: Path) -> None:
    with new_store(small_disk) as store:
        complete(store, reserve(store, 1))
        before = store.rows(DATA_SET)
        filler = fill(small_disk)
        with pytest.raises(FailedError) as full:
            store.reserve(ONE, 2, BASE, key("run"))
        assert full.value.code == "STORE_FULL"
        assert "Free the disk" in full.value.remedy
        assert store.rows(DATA_SET) == before
        filler.unlink()
        assert reserve(store, 2).attempt == 1
    with Store(small_disk / "agent.db") as again:
        assert [r.state for r in again.rows(DATA_SET)] == ["reserved", "spent", "reserved"]


@pytest.mark.root
def test_a_disk_that_is_full_at_the_end_of_an_attempt_leaves_it_charged_and_lets_nothing_out(small_disk: Path) -> None:
    with new_store(small_disk) as store:
        taken = reserve(store, 1)
        filler = fill(small_disk)
        with pytest.raises(FailedError, match="STORE_FULL"):
            complete(store, taken, train(20_000))
        assert [r.state for r in store.rows(DATA_SET)] == ["reserved"]
        assert store.answers(ONE) == []
        filler.unlink()
        assert complete(store, taken, train(20_000)).kind == "update"


@pytest.fixture
def enrolled(tmp_path: Path) -> Iterator[Lab]:
    """A home with a witness, and ledgers that went on since a copy was taken."""
    with lab(tmp_path) as world:
        world.enrol()
        world.store.close()
        text = world.home.config_path.read_text()
        line = f'witness = "{tmp_path / "witness"}"'
        replace_file(world.home.config_path, text.replace('#witness = "/var/lib/fedpact-witness/head"', line).encode())
        shutil.rmtree(world.home.path / "kept", ignore_errors=True)
        world.home.db_path.unlink()
        with new_store(world.home.path, witness=tmp_path / "witness") as store:
            complete(store, reserve(store, 1))
            store.backup(tmp_path / "old.db")
            complete(store, reserve(store, 2))
        yield world


SPOILT: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "deleted": (lambda db, _: db.unlink(), "STORE_MISSING"),
    "emptied": (lambda db, _: os.truncate(db, 0), "STORE_DAMAGED"),
    "cut short": (lambda db, _: os.truncate(db, db.stat().st_size // 2), "STORE_DAMAGED"),
    "an old copy": (lambda db, old: shutil.copy(old, db), "LEDGER_RESTORED"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_an_agent_with_such_ledgers_does_not_start(
    enrolled: Lab, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No trainer and no executor is started, and the file is left as it is."""
    spoil, code = SPOILT[how]
    db = enrolled.home.db_path
    spoil(db, tmp_path / "old.db")
    before = db.read_bytes() if db.exists() else None
    started: list[object] = []
    monkeypatch.setattr(guard.Guard, "run", lambda self: started.append(self) or 0)
    monkeypatch.setattr("fedpact_client.home.AgentHome.participant_id", new_participant())
    with pytest.raises(FedpactError) as refused:
        guard.run(enrolled.home.path)
    assert refused.value.code == code
    assert refused.value.remedy
    assert started == []
    assert (db.read_bytes() if db.exists() else None) == before


def new_participant() -> str:
    """Whose data set the kit's store holds."""
    from fedpact_contract.keys import fingerprint, public_hex

    return fingerprint(public_hex(key("contract")))


CHANGES = {
    "a larger budget": "UPDATE data_sets SET rdp_limit = '1000000'",
    "a budget that is no number": "UPDATE data_sets SET rdp_limit = 'much'",
    "a budget that is not finite": "UPDATE data_sets SET rdp_limit = 'NaN'",
    "another epsilon": "UPDATE data_sets SET epsilon = '80'",
    "another order": "UPDATE data_sets SET alpha = '2'",
    "no card": "DELETE FROM cards",
    "a card that nobody signed": 'UPDATE cards SET card = CAST(replace(card, \'"value":"\', \'"value":"0\') AS BLOB)',
    "cheaper attempts": 'UPDATE contracts SET terms = CAST(replace(terms, \'"rdp":"0.\', \'"rdp":"0.00\') AS BLOB)',
    "more rounds": "UPDATE contracts SET terms = CAST(replace(terms, '\"rounds\":', '\"rounds\":9') AS BLOB)",
    "another run key": f"UPDATE contracts SET run_public = '{'0' * 64}'",
    "no contract": "UPDATE contracts SET signed = x'00'",
    "another contract": f"UPDATE contracts SET contract_id = '{'0' * 64}'",
}


@pytest.fixture(scope="module")
def agreed(tmp_path_factory: pytest.TempPathFactory) -> AgentHome:
    """A home whose one contract was charged an attempt."""
    with lab(tmp_path_factory.mktemp("agreed")) as world:
        world.enrol()
        world.approve()
        world.configure()
        world.declare()
        offered = world.offer()
        with world.client() as client:
            found = review(world.home, world.home.config(), world.store, offered, utc_now(), read_data=False)
            commit(world.home, world.store, client, found, PASSPHRASE)
        world.others_sign(offered)
        world.store.set_state(offered.id, "running")
        world.store.reserve(offered.id, 1, BASE, world.home.run_key(offered.id))
        return world.home


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_what_is_written_beside_a_signature_buys_no_budget(
    agreed: AgentHome, tmp_path: Path, change: str | None
) -> None:
    """The columns that the gate reads are those of the signed card and contract, or the store is not opened."""
    copy = Path(shutil.copy(agreed.db_path, tmp_path / "agent.db"))
    if change is None:
        with Store(copy, participant=agreed.participant_id) as store:
            assert len(store.contracts()) == 1
        return
    with closing(sqlite3.connect(copy)) as database:
        assert database.execute(CHANGES[change]).rowcount == 1
        database.commit()
    with pytest.raises(FedpactError) as refused:
        Store(copy, participant=agreed.participant_id)
    assert refused.value.code in ("STORE_DAMAGED", "LEDGER_CHAIN"), refused.value
