"""The operator's home: made whole or not at all, never overwritten, closed to others."""

from pathlib import Path
from typing import Any

import pytest
from tests.support.operator_world import NOW, OPERATOR_CODE, PASSPHRASE

from fedpact_contract.errors import FailedError, FedpactError, InputError, ServiceError
from fedpact_contract.files import replace_file
from fedpact_contract.keys import fingerprint, public_hex
from fedpact_server.home import OperatorHome, init

GIVEN: dict[str, Any] = {
    "name": 'City "Data" 数据',
    "entity_code": OPERATOR_CODE,
    "hosts": ("FL.example.cn", "10.0.0.1"),
    "port": 8443,
    "passphrase": PASSPHRASE,
    "now": NOW,
}


def code_of(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(FedpactError) as err:
        call(*args, **kwargs)
    return err.value.code


def test_a_home_is_made_and_opened(tmp_path: Path) -> None:
    made = init(tmp_path / "op", **GIVEN)
    home = OperatorHome.open(tmp_path / "op")
    assert home == made
    assert home.settings.name == GIVEN["name"]
    assert home.settings.hosts == ("fl.example.cn", "10.0.0.1")
    assert home.url == "https://fl.example.cn:8443"
    assert home.ca_pem().startswith("-----BEGIN CERTIFICATE")
    assert public_hex(home.contract_key(PASSPHRASE)) == home.public_key
    assert home.fingerprint == fingerprint(home.public_key) == home.party.id
    database = home.database()
    database.check()
    database.dispose()


def test_nothing_in_it_is_open_to_others(tmp_path: Path) -> None:
    init(tmp_path / "op", **GIVEN)
    for path in [tmp_path / "op", *(tmp_path / "op").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path
    assert b"PRIVATE" not in (tmp_path / "op" / "operator.toml").read_bytes()
    assert b"ENCRYPTED" in (tmp_path / "op" / "keys" / "operator.key").read_bytes()


def test_an_existing_home_is_never_overwritten(tmp_path: Path) -> None:
    home = init(tmp_path / "op", **GIVEN)
    assert code_of(init, tmp_path / "op", **GIVEN) == "HOME_EXISTS"
    assert OperatorHome.open(tmp_path / "op") == home
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert code_of(init, tmp_path / "other", **GIVEN) == "HOME_EXISTS"
    (tmp_path / "file").write_text("")
    assert code_of(init, tmp_path / "file", **GIVEN) == "HOME_EXISTS"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "op").mkdir()
    assert init(tmp_path / "op", **GIVEN).settings.port == 8443


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"passphrase": b"short"}, "PASSPHRASE_SHORT"),
        ({"hosts": ("https://a.cn",)}, "HOST_FORM"),
        ({"hosts": ()}, "SETTINGS"),
        ({"port": 0}, "SETTINGS"),
        ({"port": 65_536}, "SETTINGS"),
        ({"entity_code": "123"}, "SETTINGS"),
        ({"name": "a\nb"}, "SETTINGS"),
        ({"name": ""}, "SETTINGS"),
        ({"database": "nonsense"}, "DATABASE_URL"),
        ({"database": "mystery://host/db"}, "DATABASE_URL"),
    ],
)
def test_bad_input_leaves_nothing_behind(tmp_path: Path, wrong: dict[str, Any], code: str) -> None:
    assert code_of(init, tmp_path / "op", **(GIVEN | wrong)) == code
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_damaged_home_is_named(tmp_path: Path) -> None:
    assert code_of(OperatorHome.open, tmp_path / "none") == "HOME_MISSING"
    assert code_of(OperatorHome.open, tmp_path) == "HOME_MISSING"
    home = init(tmp_path / "op", **GIVEN)
    settings = home.path / "operator.toml"
    text = settings.read_text()
    settings.write_text(text + "colour = 1\n")
    with pytest.raises(InputError) as err:
        OperatorHome.open(home.path)
    assert (err.value.code, err.value.field, err.value.file) == (
        "SETTINGS_UNKNOWN_KEY",
        "colour",
        f"{settings}:{text.count(chr(10)) + 1}",
    )
    settings.write_text("name = ")
    assert code_of(OperatorHome.open, home.path) == "TOML_SYNTAX"
    settings.write_text(text)
    home.path.chmod(0o755)
    assert code_of(OperatorHome.open, home.path) == "HOME_MODE"
    home.path.chmod(0o700)
    (home.path / "keys" / "operator.pub").unlink()
    assert code_of(OperatorHome.open, home.path) == "HOME_INCOMPLETE"


def test_an_agents_home_is_no_operators(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "agent.toml").write_text("")
    with pytest.raises(InputError) as err:
        OperatorHome.open(tmp_path)
    assert (err.value.code, err.value.field, err.value.file) == ("HOME_OF_AGENT", "--home", str(tmp_path))
    assert "fedpact-agent" in err.value.remedy


def test_a_missing_or_foreign_database_is_named(tmp_path: Path) -> None:
    home = init(tmp_path / "op", **GIVEN)
    path = home.path / "operator.db"
    kept = path.read_bytes()
    path.unlink()
    with pytest.raises(FailedError, match="missing"):
        home.database()
    assert not path.exists()
    path.write_bytes(b"no database")
    with pytest.raises((FailedError, ServiceError)):
        home.database()
    path.write_bytes(kept)
    home.database().dispose()


def test_the_contract_key_needs_its_passphrase_and_its_pair(tmp_path: Path) -> None:
    home = init(tmp_path / "op", **GIVEN)
    assert code_of(home.contract_key, b"wrong horse") == "KEY_PASSPHRASE"
    other = init(tmp_path / "other", **GIVEN)
    (home.path / "keys" / "operator.key").write_bytes((other.path / "keys" / "operator.key").read_bytes())
    assert code_of(home.contract_key, PASSPHRASE) == "KEY_MISMATCH"


def test_a_run_key_is_made_once(tmp_path: Path) -> None:
    home = init(tmp_path / "op", **GIVEN)
    contract_id = "0" * 64
    assert code_of(home.run_key, contract_id) == "KEY_MISSING"
    key = home.make_run_key(contract_id)
    assert public_hex(home.make_run_key(contract_id)) == public_hex(key) == public_hex(home.run_key(contract_id))
    assert home.run_key_path(contract_id).stat().st_mode & 0o777 == 0o600
    assert code_of(home.run_key_path, "../../escape") == "CONTRACT_ID_FORM"


def test_a_durable_write_replaces_and_leaves_no_draft(tmp_path: Path) -> None:
    replace_file(tmp_path / "a", b"1")
    replace_file(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"2"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_ipv6_host_is_bracketed_in_the_url(tmp_path: Path) -> None:
    assert init(tmp_path / "op", **(GIVEN | {"hosts": ("2001:db8::7",)})).url == "https://[2001:db8::7]:8443"
