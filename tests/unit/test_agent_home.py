"""The agent's home: modes, keys in the forms that their readers need, no overwriting."""

import errno
import os
import stat
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedpact_client import home as homes
from fedpact_client.home import AgentHome, init
from fedpact_contract.errors import InputError
from fedpact_contract.files import replace_file
from fedpact_contract.keys import fingerprint, generate_key, public_hex, save_key
from fedpact_contract.output import first_line

PASSPHRASE = b"correct horse"


def make(path: Path, **values: str) -> AgentHome:
    base = {"name": "Example Hospital", "entity_code": "91310000MA1K000000", "sector": "medical"}
    return init(path, **(base | values), passphrase=PASSPHRASE)


@pytest.fixture
def home(tmp_path: Path) -> AgentHome:
    return make(tmp_path / "agent")


def test_only_the_owner_can_read_a_home(home: AgentHome) -> None:
    old = os.umask(0)
    try:
        loose = make(home.path.parent / "loose")
    finally:
        os.umask(old)
    for place in (home, loose):
        for path in (place.path, *place.path.rglob("*")):
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == (0o700 if path.is_dir() else 0o600), path


def test_a_home_has_what_its_description_names(home: AgentHome) -> None:
    names = {str(p.relative_to(home.path)) for p in home.path.rglob("*")}
    wanted = {"keys/contract.key", "keys/contract.pub", "keys/node.key", "keys/run", "agent.toml", "agent.db"}
    assert wanted | {"trust.toml", "operator", "released", "logs"} <= names
    assert home.check() == home


def test_flowers_loader_reads_the_node_key(home: AgentHome) -> None:
    """`flower-supernode` calls exactly this, without a passphrase (flwr 1.41, supernode/cli)."""
    key = serialization.load_ssh_private_key(home.node_key_path.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp384r1"
    assert home.load_node_key().public_key() == key.public_key()


def test_the_contract_key_needs_its_passphrase(home: AgentHome) -> None:
    assert b"ENCRYPTED" in home.contract_key_path.read_bytes()
    assert public_hex(home.load_contract_key(PASSPHRASE)) == home.contract_public
    assert home.participant_id == fingerprint(home.contract_public)
    with pytest.raises(InputError, match="KEY_PASSPHRASE"):
        home.load_contract_key(b"wrong horse")


def test_keys_of_two_homes_differ(tmp_path: Path) -> None:
    one, two = make(tmp_path / "one"), make(tmp_path / "two")
    assert one.participant_id != two.participant_id
    assert one.node_key_path.read_bytes() != two.node_key_path.read_bytes()


def test_the_configuration_carries_what_init_was_told(tmp_path: Path) -> None:
    home = make(tmp_path / "agent", name='市第一医院 "Nord" \\ #1')
    agent = home.config().agent
    assert (agent.name, agent.entity_code, agent.sector) == (
        '市第一医院 "Nord" \\ #1',
        "91310000MA1K000000",
        "medical",
    )


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "two\nlines"}, "name"),
        ({"entity_code": "short"}, "entity_code"),
        ({"entity_code": "91310000ma1k000000"}, "entity_code"),
        ({"sector": "two words"}, "sector"),
    ],
)
def test_bad_values_make_no_home(tmp_path: Path, values: dict[str, str], field: str) -> None:
    with pytest.raises(InputError) as caught:
        make(tmp_path / "agent", **values)
    assert caught.value.field == field
    assert list(tmp_path.iterdir()) == []


def test_a_short_passphrase_makes_no_home(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="PASSPHRASE_SHORT"):
        init(tmp_path / "a", name="N", entity_code="91310000MA1K000000", sector="medical", passphrase=b"1234567")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_home_is_left_alone(home: AgentHome) -> None:
    before = {p: p.read_bytes() for p in home.path.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="HOME_EXISTS"):
        make(home.path)
    assert {p: p.read_bytes() for p in home.path.rglob("*") if p.is_file()} == before


def test_a_file_in_the_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "agent").write_text("mine")
    with pytest.raises(InputError, match="HOME_EXISTS"):
        make(tmp_path / "agent")
    assert (tmp_path / "agent").read_text() == "mine"


def test_an_empty_folder_becomes_a_home(tmp_path: Path) -> None:
    (tmp_path / "agent").mkdir(mode=0o755)
    home = make(tmp_path / "agent")
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700


def test_an_interrupted_init_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(homes, "generate_key", stop)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "agent")
    assert list(tmp_path.iterdir()) == []


def test_a_home_where_the_sandbox_reads_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer would say that it is isolated, and could read every key."""
    link = tmp_path / "link"
    link.symlink_to(sys.prefix)
    for place in (Path(sys.prefix), Path(sys.base_prefix), Path("/usr/local"), Path("/run/resolvconf"), link):
        with pytest.raises(InputError, match="HOME_IN_INSTALLATION") as caught:
            make(place / "fedpact-agent-of-a-test")
        assert caught.value.file == str(place / "fedpact-agent-of-a-test")
        assert (caught.value.rule, caught.value.remedy[:21]) == (
            "no key where the sandbox lets its processes read",
            "Choose another folder",
        )
        assert not (place / "fedpact-agent-of-a-test").exists()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "home" / "venv"))
    make(tmp_path / "home" / "agent")
    make(tmp_path / "home" / "venv-agent")


def test_no_home_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="HOME_MISSING") as caught:
        AgentHome(tmp_path / "nowhere").check()
    assert "init" in caught.value.remedy


def test_an_open_home_is_refused(home: AgentHome) -> None:
    home.path.chmod(0o750)
    with pytest.raises(InputError, match="HOME_MODE"):
        home.check()


@pytest.mark.parametrize("name", ["contract.key", "node.key"])
def test_a_key_that_others_can_read_is_refused(home: AgentHome, name: str) -> None:
    (home.path / "keys" / name).chmod(0o640)
    with pytest.raises(InputError, match="KEY_MODE"):
        home.load_node_key() if name == "node.key" else home.load_contract_key(PASSPHRASE)


def test_a_missing_key_says_so(home: AgentHome) -> None:
    home.node_key_path.unlink()
    home.contract_key_path.unlink()
    with pytest.raises(InputError, match="KEY_MISSING"):
        home.load_node_key()
    with pytest.raises(InputError, match="KEY_MISSING"):
        home.load_contract_key(PASSPHRASE)


@pytest.mark.parametrize("content", [b"", b"no key", b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n"])
def test_a_damaged_node_key_says_so(home: AgentHome, content: bytes) -> None:
    replace_file(home.node_key_path, content)
    with pytest.raises(InputError, match="KEY_FORM"):
        home.load_node_key()


def test_another_kind_of_node_key_is_refused(home: AgentHome) -> None:
    other = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    replace_file(home.node_key_path, other)
    with pytest.raises(InputError, match="KEY_KIND"):
        home.load_node_key()


def test_two_halves_of_different_keys_are_noticed(home: AgentHome) -> None:
    replace_file(home.path / "keys" / "contract.pub", public_hex(generate_key()).encode())
    with pytest.raises(InputError, match="KEY_MISMATCH"):
        home.load_contract_key(PASSPHRASE)


@pytest.mark.parametrize("content", [b"", b"xyz", b"AB" * 32, b"\xff" * 64])
def test_a_damaged_public_key_is_noticed(home: AgentHome, content: bytes) -> None:
    replace_file(home.path / "keys" / "contract.pub", content)
    with pytest.raises(InputError, match="KEY_"):
        _ = home.participant_id


def test_a_run_key_is_made_once(home: AgentHome) -> None:
    contract_id = "ab" * 32
    with pytest.raises(InputError, match="KEY_MISSING"):
        home.run_key(contract_id)
    made = home.make_run_key(contract_id)
    assert public_hex(home.make_run_key(contract_id)) == public_hex(made) == public_hex(home.run_key(contract_id))
    assert stat.S_IMODE(home.run_key_path(contract_id).stat().st_mode) == 0o600
    assert public_hex(home.make_run_key("cd" * 32)) != public_hex(made)


SECRETS = [AgentHome.selection_key, AgentHome.release_key]


def file_of(home: AgentHome, secret: Callable[[AgentHome], bytes]) -> Path:
    return home.path / "keys" / (secret.__name__.removesuffix("_key") + ".key")


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_made_once_and_closed(home: AgentHome, secret: Callable[[AgentHome], bytes]) -> None:
    first = secret(home)
    assert secret(home) == first
    assert len(first) == 32
    assert stat.S_IMODE(file_of(home, secret).stat().st_mode) == 0o600


@pytest.mark.parametrize("secret", SECRETS)
def test_a_full_disk_leaves_no_empty_secret(
    home: AgentHome, secret: Callable[[AgentHome], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty one would be no key that the trainer takes, and would choose the rows that anybody can choose."""
    before = sorted((home.path / "keys").iterdir())
    with monkeypatch.context() as full:
        full.setattr("os.fsync", fails)
        with pytest.raises(OSError, match="No space"):
            secret(home)
    assert sorted((home.path / "keys").iterdir()) == before
    assert len(secret(home)) == 32


def fails(_handle: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_that_is_cut_short_is_refused(home: AgentHome, secret: Callable[[AgentHome], bytes]) -> None:
    secret(home)
    file_of(home, secret).write_bytes(b"")
    with pytest.raises(InputError, match="KEY_FORM"):
        secret(home)


def test_of_two_commands_that_make_a_key_at_once_one_stands(home: AgentHome, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both found none: `start` and the first `sign` do."""
    contract_id = "ab" * 32
    first, run_key = home.selection_key(), home.make_run_key(contract_id)
    monkeypatch.setattr(Path, "exists", lambda _path: False)
    assert home.selection_key() == first
    assert public_hex(home.make_run_key(contract_id)) == public_hex(run_key)


@pytest.mark.parametrize("bad", ["", "../../keys/contract", "AB" * 32, "ab" * 31 + "/x"])
def test_a_run_key_stays_in_its_folder(home: AgentHome, bad: str) -> None:
    with pytest.raises(InputError, match="CONTRACT_ID_FORM"):
        home.make_run_key(bad)


def test_before_enrolment_there_is_no_operator(home: AgentHome) -> None:
    with pytest.raises(InputError, match="NOT_ENROLLED"):
        home.operator()
    with pytest.raises(InputError, match="NOT_ENROLLED"):
        home.operator_ca()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"name": "x"}', b"\xff", b'{"name":"n","entity_code":"x","key":"k"}']
)
def test_a_damaged_operator_file_says_so(home: AgentHome, content: bytes) -> None:
    replace_file(home.operator_path, content)
    with pytest.raises(InputError) as caught:
        home.operator()
    assert caught.value.file == str(home.operator_path)


def test_a_replaced_file_is_whole_and_private(home: AgentHome) -> None:
    path = home.path / "agent.toml"
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not list(home.path.glob(".agent.toml*"))


def test_the_first_line_of_a_passphrase_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "pass"
    replace_file(path, b"correct horse\r\nnot this\n")
    assert first_line(path, "passphrase") == b"correct horse"


@pytest.mark.parametrize(
    ("content", "mode", "code"),
    [(b"", 0o600, "SECRET_FILE"), (b"\nx", 0o600, "SECRET_FILE"), (b"good one", 0o644, "SECRET_FILE_MODE")],
)
def test_bad_passphrase_files(tmp_path: Path, content: bytes, mode: int, code: str) -> None:
    path = tmp_path / "pass"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(InputError) as caught:
        first_line(path, "passphrase")
    assert caught.value.code == code


def test_a_missing_passphrase_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="SECRET_FILE"):
        first_line(tmp_path / "none", "passphrase")


def test_a_key_of_another_kind_is_no_run_key(home: AgentHome) -> None:
    save_key(home.run_key_path("ab" * 32), generate_key(), b"under a passphrase")
    with pytest.raises(InputError, match="KEY_PASSPHRASE"):
        home.run_key("ab" * 32)


def test_of_two_inits_at_once_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find the place free; the second must not touch what the first has put there."""
    both, fill = threading.Barrier(2), homes._fill

    def meet(*arguments: Any) -> None:
        fill(*arguments)
        both.wait(10)

    monkeypatch.setattr(homes, "_fill", meet)

    def one(_number: int) -> AgentHome | str:
        try:
            return make(tmp_path / "agent")
        except InputError as err:
            return err.code

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(one, range(2)))
    (won,) = [each for each in made if isinstance(each, AgentHome)]
    assert [each for each in made if each != won] == ["HOME_EXISTS"]
    won.check().load_contract_key(PASSPHRASE)
    assert [p.name for p in tmp_path.iterdir()] == ["agent"], "nothing half-made is left"


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = homes._fill

    def late(*arguments: Any) -> None:
        fill(*arguments)
        (tmp_path / "agent").write_text("mine")

    monkeypatch.setattr(homes, "_fill", late)
    with pytest.raises(InputError, match="HOME_EXISTS"):
        make(tmp_path / "agent")
    assert (tmp_path / "agent").read_text() == "mine"
