"""`preflight`: every check passes on a machine that is well, and each fails for real where something is amiss."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.agent_world import ENTITY, PASSPHRASE, ROWS, Lab, lab
from tests.support.served_operator import foreign_certificate, proxy, served

from fedpact_client import preflight, sandbox
from fedpact_client.api import egress_of
from fedpact_client.enrol import enrol
from fedpact_client.home import AgentHome
from fedpact_client.preflight import Finding
from fedpact_client.sandbox import Isolation
from fedpact_client.store import EgressKind
from fedpact_contract.canonical import sha256_hex
from fedpact_contract.errors import InputError
from fedpact_contract.files import replace_file
from fedpact_contract.request import utc_now
from fedpact_server import enrolment
from fedpact_server.api_edge import Limits

ROOT = Path(__file__).resolve().parents[2]
FREE = Limits(probe=(10**6, 1e6))


@pytest.fixture
def whole(tmp_path: Path) -> Iterator[Lab]:
    with lab(tmp_path) as made:
        made.configure()
        yield made


@pytest.fixture
def world(whole: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """The walls of processes have tests of their own: each try starts two."""
    monkeypatch.setattr(sandbox, "PROBED", {})
    return whole


def joined(world: Lab, port: int) -> None:
    """Enrolled over the wire, by an invitation to this port; not approved yet."""
    invitation = world.invitation(url=f"https://127.0.0.1:{port}")
    enrol(world.home, invitation, PASSPHRASE, egress_of(world.store))


def checks(home: AgentHome, **options: object) -> dict[str, Finding]:
    return {f.name: f for f in preflight.run(home.path, **options)}


def failures(found: dict[str, Finding]) -> dict[str, str | None]:
    return {f.name: f.code for f in found.values() if f.state == "fail"}


def rewrite(home: AgentHome, old: str, new: str) -> None:
    text = home.config_path.read_text()
    assert text.count(old) == 1, old
    replace_file(home.config_path, text.replace(old, new).encode())


# A machine that is well


@pytest.mark.landlock
def test_before_enrolment_everything_but_the_operator_is_checked(whole: Lab) -> None:
    found = checks(whole.home)
    assert failures(found) == {}
    assert found["operator"].state == "skip"
    assert "--invitation" in found["operator"].remedy
    assert {name for name, f in found.items() if f.state == "warn"} == {"witness"} | (
        {"user"} if os.geteuid() == 0 else set()
    )
    assert all(f.remedy for f in found.values() if f.state in ("warn", "fail"))
    passed = {name for name, f in found.items() if f.state == "pass"}
    assert {
        *("configuration", "ledgers", "files", "home", "software", "disk", "threads", "memory"),
        *("isolation of the trainer", "isolation of the executor", "data set set-1"),
    } <= passed


def test_with_an_invitation_the_whole_way_is_walked_and_nothing_joins(world: Lab) -> None:
    with served(world.world, limits=FREE) as port:
        found = checks(world.home, invitation=world.invitation(url=f"https://127.0.0.1:{port}"))
    assert failures(found) == {}
    assert [found[n].state for n in ("DNS", "TCP", "TLS", "operator", "clock", "post")] == ["pass"] * 6
    assert world.world.home.fingerprint in found["operator"].detail
    assert "at most 5 s ahead and 300 s behind" in found["clock"].detail
    assert not world.home.operator_path.exists()
    with world.world.database.read() as connection:
        assert enrolment.by_entity(connection, ENTITY) is None


def test_after_enrolment_the_state_is_told_and_all_that_left_is_in_the_egress_ledger(world: Lab) -> None:
    with served(world.world, limits=FREE) as port:
        joined(world, port)
        assert checks(world.home)["enrolment"].state == "warn", "requested: nothing to fix here"
        world.approve()
        before = len(world.store.egress())
        found = checks(world.home)
    assert failures(found) == {}
    assert (found["enrolment"].state, found["enrolment"].detail) == ("pass", "approved")
    left = world.store.egress()[before:]
    assert [(e.kind, e.detail) for e in left] == [
        (EgressKind.REQUEST, "GET /fedpact/v1/operator"),
        (EgressKind.REQUEST, "POST /fedpact/v1/probe"),
        (EgressKind.REQUEST, "GET /fedpact/v1/enrolment"),
    ]
    assert (left[1].size, left[1].sha256) == (8 << 20, sha256_hex(bytes(8 << 20)))


def test_offline_nothing_leaves(world: Lab) -> None:
    world.enrol()
    before = len(world.store.egress())
    assert checks(world.home, offline=True)["operator"].state == "skip"
    assert len(world.store.egress()) == before


# The way to the operator


def way_of(world: Lab, url: str) -> dict[str, Finding]:
    return checks(world.home, invitation=world.invitation(url=url))


def test_a_name_that_nobody_knows(world: Lab) -> None:
    found = way_of(world, "https://no-such-host.invalid:8443")
    assert failures(found) == {"DNS": "DNS"}
    assert found["operator"].state == "skip"


def test_a_port_where_nobody_listens(world: Lab) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert failures(way_of(world, f"https://127.0.0.1:{port}")) == {"TCP": "TCP"}


def test_something_that_opens_tls_on_the_way(world: Lab, tmp_path: Path) -> None:
    with proxy(*foreign_certificate(tmp_path / "other"), onward=1, limit=0) as port:
        found = way_of(world, f"https://127.0.0.1:{port}")
    assert failures(found) == {"TLS": "TLS_CERTIFICATE"}
    assert "not intercepted" in found["TLS"].remedy


def test_something_that_speaks_no_tls(world: Lab) -> None:
    with socket.create_server(("127.0.0.1", 0)) as plain:
        plain.settimeout(10)
        port = plain.getsockname()[1]

        def answer() -> None:
            for _ in range(2):
                connection, _ = plain.accept()
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        found = way_of(world, f"https://127.0.0.1:{port}")
        thread.join()
    assert failures(found) == {"TLS": "TLS"}


def test_another_key_than_the_pinned_one(world: Lab) -> None:
    with served(world.world, limits=FREE) as port:
        invitation = world.invitation(url=f"https://127.0.0.1:{port}", operator="ab" * 32)
        found = checks(world.home, invitation=invitation)
    assert failures(found)["operator"] == "OPERATOR_FINGERPRINT"


@pytest.mark.parametrize(("off", "state"), [(-8, "fail"), (-3, "pass"), (200, "warn"), (310, "fail")])
def test_a_clock_that_is_off(world: Lab, off: int, state: str) -> None:
    """`off`: the operator's clock less this one, in seconds."""
    with served(world.world, seconds_off=off, limits=FREE) as port:
        found = way_of(world, f"https://127.0.0.1:{port}")
    assert found["clock"].state == state, found["clock"].detail
    assert failures(found) == ({"clock": "CLOCK"} if state == "fail" else {})


def test_a_body_limit_before_the_operator(world: Lab) -> None:
    tls = world.world.home.tls
    with (
        served(world.world, limits=FREE) as onward,
        proxy(tls / "server.crt", tls / "server.key", onward=onward, limit=1 << 20) as port,
    ):
        found = way_of(world, f"https://127.0.0.1:{port}")
    assert failures(found) == {"post": "POST_CUT"}
    assert "limits the size of a body" in found["post"].detail
    assert "64 MiB" in found["post"].remedy


def test_an_operator_that_is_asked_too_often_says_so(world: Lab) -> None:
    with served(world.world, limits=Limits(probe=(0, 0.0))) as port:
        assert failures(way_of(world, f"https://127.0.0.1:{port}")) == {"post": "RATE_LIMITED"}


def test_a_proxy_in_the_environment_is_not_used_and_said(world: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    with served(world.world, limits=FREE) as port:
        found = way_of(world, f"https://127.0.0.1:{port}")
    assert (found["proxy"].state, found["post"].state) == ("warn", "pass")


def test_a_suspended_agent_learns_it(world: Lab) -> None:
    with served(world.world, limits=FREE) as port:
        joined(world, port)
        world.approve()
        enrolment.suspend(world.world.database, selector=ENTITY, now=utc_now())
        assert failures(checks(world.home)) == {"enrolment": "PARTICIPANT_SUSPENDED"}


@pytest.mark.parametrize(
    ("change", "code"), [({"entity_code": "9" * 18}, "INVITATION_ENTITY"), ({"url": ""}, "INVITATION_URL")]
)
def test_an_invitation_that_is_none(world: Lab, change: dict[str, str], code: str) -> None:
    assert failures(checks(world.home, invitation=world.invitation(**change))) == {"invitation": code}


# The home


def test_without_a_home_it_is_no_finding(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no agent home"):
        preflight.run(tmp_path)


@pytest.mark.parametrize("place", ["keys/node.key", "agent.db", "."])
def test_what_others_may_use_is_named(world: Lab, place: str) -> None:
    (world.home.path / place).chmod(0o755)
    found = checks(world.home, offline=True)
    assert failures(found)["files"] == "HOME_MODE"
    assert str(world.home.path / place).removesuffix("/.") in found["files"].detail


@pytest.mark.root
def test_what_is_another_users_is_named(world: Lab) -> None:
    os.chown(world.home.path / "keys", 12345, 12345)
    assert failures(checks(world.home, offline=True))["files"] == "HOME_OWNER"


def test_a_home_that_trainer_and_executor_could_read(world: Lab) -> None:
    place = Path(sys.prefix) / f".home-of-a-test-{os.getpid()}"
    shutil.copytree(world.home.path, place)
    try:
        place.chmod(0o700)
        assert failures(checks(AgentHome(place), offline=True))["home"] == "HOME_IN_INSTALLATION"
    finally:
        shutil.rmtree(place)


def test_a_configuration_with_a_fault_names_its_line_and_the_machine_is_checked_all_the_same(world: Lab) -> None:
    rewrite(world.home, "threads = 2", 'threads = "two"')
    line = world.home.config_path.read_text().split('threads = "two"')[0].count("\n") + 1
    found = checks(world.home, offline=True)
    assert failures(found).keys() == {"configuration"}
    assert f"agent.toml:{line}" in found["configuration"].detail
    assert found["disk"].state == "pass"


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda db: db.unlink(), "STORE_MISSING"),
        (lambda db: os.truncate(db, 5000), "STORE_DAMAGED"),
        (lambda db: os.truncate(db, 0), "STORE_DAMAGED"),
    ],
)
def test_ledgers_that_cannot_be_used_are_named_and_nothing_leaves(world: Lab, spoil: object, code: str) -> None:
    world.store.close()
    spoil(world.home.db_path)
    with served(world.world, limits=FREE) as port:
        found = way_of(world, f"https://127.0.0.1:{port}")
    assert failures(found) == {"ledgers": code}
    assert (found["TLS"].state, found["operator"].state) == ("pass", "skip")


def test_a_witness_that_cannot_be_written_or_read(world: Lab, tmp_path: Path) -> None:
    rewrite(world.home, '#witness = "/var/lib/fedpact-witness/head"', f'witness = "{tmp_path / "away" / "head"}"')
    assert failures(checks(world.home, offline=True)) == {"witness": "WITNESS_UNWRITABLE"}
    (tmp_path / "away").mkdir()
    found = checks(world.home, offline=True)
    assert (found["witness"].state, failures(found)) == ("warn", {}), "on the disk of the home"
    (tmp_path / "away" / "head").write_text("{}")
    assert failures(checks(world.home, offline=True))["ledgers"] == "WITNESS_DAMAGED"


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m,mode=700", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.root
def test_a_disk_that_is_small_full_or_read_only(world: Lab, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 24) as folder:
        home = AgentHome(Path(shutil.copytree(world.home.path, folder / "agent")))
        home.path.chmod(0o700)
        assert failures(checks(home, offline=True))["disk"] == "DISK_SPACE"
        (folder / "filler").write_bytes(bytes(shutil.disk_usage(folder).free))
        full = checks(home, offline=True)["disk"]
        assert (full.state, full.code) == ("fail", "SYSTEM")
        assert "No space left" in full.detail
        (folder / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        assert "Read-only" in checks(home, offline=True)["disk"].detail


# The machine


def test_more_memory_than_there_is_and_more_threads(world: Lab) -> None:
    rewrite(world.home, "memory = 4096", "memory = 16777216")
    rewrite(world.home, "threads = 2", "threads = 1024")
    found = checks(world.home, offline=True)
    assert failures(found) == {"memory": "MEMORY"}
    assert found["threads"].state == "warn"


def test_a_library_of_another_version_and_one_that_is_missing(
    world: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, lines in (("polars-0.1", "Name: polars\nVersion: 0.1\n"),):
        (tmp_path / "shadow" / f"{name}.dist-info").mkdir(parents=True)
        (tmp_path / "shadow" / f"{name}.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\n{lines}")
    monkeypatch.syspath_prepend(tmp_path / "shadow")
    found = checks(world.home, offline=True)
    assert failures(found) == {"software": "SOFTWARE"}
    assert "polars 0.1 (it wants <3,>=2.1)" in found["software"].detail
    (tmp_path / "shadow" / "fedpact-9.dist-info").mkdir()
    (tmp_path / "shadow" / "fedpact-9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: fedpact\nVersion: 9\nRequires-Python: >=3.99\nRequires-Dist: no-such-library>=1\n"
    )
    detail = checks(world.home, offline=True)["software"].detail
    assert "no-such-library is missing" in detail
    assert "(it wants >=3.99)" in detail


def run_within(prefix: list[str], home: AgentHome) -> dict[str, Finding]:
    """The command itself, with something before it."""
    line = [*prefix, str(Path(sys.executable).parent / "fedpact-agent"), "preflight", "--offline", "--json"]
    env = os.environ | {"FEDPACT_AGENT_HOME": str(home.path)}
    done = subprocess.run(line, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)
    assert done.returncode == (1 if found["count"]["fail"] else 0)
    return {c["name"]: Finding(**c) for c in found["checks"]}


def without(error: int, *numbers: int) -> list[str]:
    return [sys.executable, str(ROOT / "tests" / "launchers" / "without_calls.py"), *map(str, (error, *numbers)), "--"]


@pytest.mark.root
def test_a_machine_without_user_namespaces(world: Lab) -> None:
    within = ["unshare", "-U", "-r", "sh", "-c", 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"', "sh"]
    found = run_within(within, world.home)["isolation of the trainer"]
    assert found.state == "warn", "the filter of calls closes the network too"
    assert "user namespaces" in found.remedy


@pytest.mark.landlock
@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of calls")
def test_a_machine_without_landlock(world: Lab) -> None:
    found = run_within(without(1, 444, 445, 446), world.home)
    assert failures(found) == dict.fromkeys(("isolation of the trainer", "isolation of the executor"), "NOT_ISOLATED")
    trainer = found["isolation of the trainer"]
    assert "keys among them" in trainer.detail
    assert "lsm=" in trainer.remedy


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of calls")
def test_a_machine_where_memory_cannot_be_limited(world: Lab) -> None:
    found = run_within(without(0, 302), world.home)
    assert "no limit holds for its memory" in found["isolation of the trainer"].detail
    assert failures(found)["isolation of the executor"] == "NOT_ISOLATED"


def test_a_process_that_does_not_tell_is_a_failure(world: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert preflight.isolation("trainer").code == "PROBE"


def test_one_wall_before_the_network_is_a_warning_and_none_a_failure() -> None:
    found = Isolation(
        no_new_privs=True,
        user_and_network_namespace=False,
        ipc_namespace=False,
        network_kept=False,
        landlock_abi=3,
        tcp_denied=False,
        sockets_denied=True,
        missing=("an own user and network namespace is not to be had here: no", "TCP is not denied by Landlock"),
    )
    one = preflight.judged("x", preflight.Probe(isolation=found, memory_limited=True))
    assert one.state == "warn"
    assert "kernel.unprivileged_userns_clone" in one.remedy
    assert "Linux 6.7" in one.remedy
    none = found.model_copy(update={"sockets_denied": False})
    assert preflight.judged("x", preflight.Probe(isolation=none, memory_limited=True)).code == "NOT_ISOLATED"


# The data


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ("age,sex\n20,f\n", "DATA_COLUMN_MISSING"),
        (ROWS[:200], "DATA_TOO_FEW_ROWS"),
        (None, "DATA_UNREADABLE"),
    ],
)
def test_a_data_set_that_cannot_be_used(world: Lab, rows: str | None, code: str) -> None:
    path = world.home.path / "rows.csv"
    path.unlink() if rows is None else path.write_text(rows)
    assert failures(checks(world.home, offline=True)) == {"data set set-1": code}


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("num_examples = 40", "num_examples = 41", "SIGN_NUM_EXAMPLES"),
        ('columns = ["age", "sex"]', 'columns = ["age"]', "CARD_COLUMNS"),
        ('columns = ["age", "sex"]\nlabel = "ill"', 'columns = ["age", "sex", "ill"]\nlabel = "other"', "CARD_LABEL"),
    ],
)
def test_agent_toml_against_the_signed_card(world: Lab, old: str, new: str, code: str) -> None:
    world.enrol()
    world.approve()
    world.declare()
    assert "as on the signed card" in checks(world.home, offline=True)["data set set-1"].detail
    rewrite(world.home, old, new)
    assert failures(checks(world.home, offline=True)) == {"data set set-1": code}


def signed(world: Lab) -> str:
    """A contract that was signed here."""
    from fedpact_client.review import review
    from fedpact_client.signing import commit

    world.enrol()
    world.approve()
    world.declare()
    contract = world.offer()
    with world.client() as client:
        found = review(world.home, world.home.config(), world.store, contract, utc_now(), read_data=False)
        found.refuse()
        commit(world.home, world.store, client, found, PASSPHRASE)
    return contract.id[:8]


def test_rows_against_a_contracts_schema_and_code_against_what_it_names(
    world: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = signed(world)
    found = checks(world.home, offline=True)
    assert failures(found) == {}
    assert found[f"rows of contract {name}"].detail.startswith("60 fit")
    assert found[f"code of contract {name}"].state == "pass"
    (world.home.path / "rows.csv").write_text(ROWS.replace(",f,", ",x,"))
    assert failures(checks(world.home, offline=True)) == {f"rows of contract {name}": "DATA_UNKNOWN_CATEGORY"}
    from fedpact_models import code

    monkeypatch.setattr(code, "models_digest", lambda: "0" * 64)
    assert failures(checks(world.home, offline=True))[f"code of contract {name}"] == "CODE_MODELS_MISMATCH"
