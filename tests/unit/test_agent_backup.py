"""A whole home in one file, and a new home of it: every key, every charge, also from an earlier release's."""

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.ledger_kit import DATA_SET, complete, contract_id, key, new_store, reserve
from tests.support.store_v1 import as_version_1

from fedpact_client.backup import save, unpack
from fedpact_client.cli import main
from fedpact_client.home import AgentHome, init
from fedpact_client.store import Store
from fedpact_contract.errors import InputError
from fedpact_contract.keys import save_key

Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AgentHome:
    """A home with a contract that runs, one round spent, and things that are made anew."""
    from fedpact_contract.keys import fingerprint, public_hex

    made = init(tmp_path / "agent", name="A", entity_code="9" * 18, sector="medical", passphrase=b"long enough")
    monkeypatch.setattr(AgentHome, "participant_id", fingerprint(public_hex(key("contract"))))  # the kit's card
    monkeypatch.setattr(Store, "_check_signed", lambda *_: None)  # nor has this key signed the kit's contract
    made.db_path.unlink()
    with new_store(made.path) as store:
        complete(store, reserve(store, 1))
    save_key(made.run_key_path(contract_id()), key("run"))
    (made.path / "logs" / "trainer.log").write_text("noise")
    (made.path / "state.json").write_text("{}")
    (made.path / ".state.json.0a1b2c3d").write_text("{}")
    (made.path / "operator" / "ca.crt").write_text("pem")
    return made


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: object) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["fedpact-agent", *map(str, words), "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), json.loads(capsys.readouterr().out)

    return call


def files(home: AgentHome) -> dict[str, bytes]:
    return {str(p.relative_to(home.path)): p.read_bytes() for p in home.path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("earlier", [False, True], ids=["this release", "an earlier one"])
def test_a_home_comes_back_whole_and_its_contracts_count_as_spent(
    home: AgentHome, tmp_path: Path, run: Run, earlier: bool
) -> None:
    out, again = tmp_path / "home.tar", AgentHome(tmp_path / "again")
    if earlier:
        with Store(home.db_path) as store:
            save(home, store, out)
        spoilt = tmp_path / "old.db"
        with tarfile.open(out) as archive:
            spoilt.write_bytes(archive.extractfile("agent.db").read())
        as_version_1(spoilt)
        rewrite(out, "agent.db", spoilt.read_bytes())
    else:
        with Store(home.db_path):  # as a running agent has it open
            assert run("backup", "--whole", "--out", out, "--home", home.path) == (0, {"file": str(out)})
    assert out.stat().st_mode & 0o777 == 0o600
    code, found = run("restore", "--from", out, "--home", again.path, "--yes")
    assert (code, [w["contract"] for w in found["written_off"]]) == (0, [contract_id()])
    before, after = files(home), files(again)
    assert {n for n in before if n not in after} == {"logs/trainer.log", "state.json", ".state.json.0a1b2c3d"}
    own = {n for n in after if not n.startswith("agent.db") and n != "guard.lock"}
    assert {n: after[n] for n in own} == {n: before[n] for n in own}
    assert {"keys/contract.key", "keys/node.key", f"keys/run/{contract_id()}.key", "operator/ca.crt"} <= own
    assert all(p.stat().st_mode & 0o077 == 0 for p in again.path.rglob("*"))
    with Store(again.db_path) as store:
        assert [r.state for r in store.rows(DATA_SET)] == ["reserved", "spent", "restored"]
    assert again.check().load_node_key()


def rewrite(out: Path, name: str, data: bytes, kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    """The archive with another member in the place of this one, or one more."""
    with tarfile.open(out) as archive:
        kept = [(m, archive.extractfile(m).read()) for m in archive if m.name != name]
    with tarfile.open(out, "w") as archive:
        other = tarfile.TarInfo(name)
        other.size, other.type, other.linkname = len(data), kind, link
        for member, content in [*kept, (other, data)]:
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    ("name", "kind", "link"),
    [
        ("../outside", tarfile.REGTYPE, ""),
        ("/tmp/outside", tarfile.REGTYPE, ""),
        ("keys/link", tarfile.SYMTYPE, "/etc/passwd"),
        ("keys/hard", tarfile.LNKTYPE, "agent.toml"),
        ("pipe", tarfile.FIFOTYPE, ""),
    ],
)
def test_what_leads_out_of_the_home_is_refused(
    home: AgentHome, tmp_path: Path, name: str, kind: bytes, link: str
) -> None:
    out = tmp_path / "home.tar"
    with Store(home.db_path) as store:
        save(home, store, out)
    rewrite(out, name, b"", kind, link)
    with pytest.raises(InputError, match="BACKUP_FORM"):
        unpack(out, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert not (tmp_path / "outside").exists()


def test_half_a_backup_and_none_are_refused(home: AgentHome, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "home.tar"
    with Store(home.db_path) as store:
        save(home, store, out)
    whole = out.read_bytes()
    for data in (b"", b"no archive", whole[: len(whole) // 2], whole[:1024]):
        out.write_bytes(data)
        code, found = run("restore", "--from", out, "--home", tmp_path / "again", "--yes")
        assert (code, found["error"]["code"]) == (2, "BACKUP_FORM")
        assert not (tmp_path / "again").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_nothing_is_overwritten(home: AgentHome, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "home.tar"
    assert run("backup", "--whole", "--out", out, "--home", home.path)[0] == 0
    assert run("backup", "--whole", "--out", out, "--home", home.path)[1]["error"]["code"] == "FILE_EXISTS"
    before = files(home)
    assert run("restore", "--from", out, "--home", home.path, "--yes")[1]["error"]["code"] == "HOME_EXISTS"
    assert files(home) == before
