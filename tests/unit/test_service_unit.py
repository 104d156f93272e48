"""The systemd unit of scripts/: well-formed, hardened, and the agent's own walls stand inside of it.

Control groups (MemoryMax, CPUQuota, TasksMax) need a running systemd and are not tried. Everything else of the unit
that could take something from the agent is: `tests/launchers/as_the_unit.py` asks the kernel for the same.
"""

import ctypes.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.agent_world import Lab, lab
from tests.support.required import lacking

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "scripts" / "fedpact-agent.service"
USER = 12345
COMMAND = str(Path(sys.executable).parent / "fedpact-agent")


@pytest.fixture(autouse=True)
def systemd() -> None:
    if shutil.which("systemd-analyze") is None or ctypes.util.find_library("seccomp") is None:
        lacking("needs the command `systemd-analyze` and libseccomp (Debian's package systemd)")


def test_systemd_finds_no_fault(tmp_path: Path) -> None:
    here = tmp_path / UNIT.name
    here.write_text(UNIT.read_text().replace("/usr/local/lib/fedpact/bin/fedpact-agent", COMMAND))
    done = subprocess.run(["systemd-analyze", "verify", here], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_its_exposure_is_low() -> None:
    line = ["systemd-analyze", "security", "--offline=true", str(UNIT)]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    found = re.search(r"Overall exposure level for fedpact-agent\.service: ([0-9.]+)", done.stdout)
    assert found
    assert float(found[1]) <= 2.5


def test_its_memory_is_enough_for_the_template() -> None:
    limit = re.search(r"(?m)^MemoryMax=([0-9]+)G$", UNIT.read_text())
    wanted = re.search(r"(?m)^memory = ([0-9]+)$", (ROOT / "configs" / "agent.toml").read_text())
    assert limit
    assert wanted
    assert int(limit[1]) * 1024 >= int(wanted[1]) + 1024


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Lab]:
    """A home of another user's, as the unit's: a card is declared, and a contract's file lies beside."""
    with lab(tmp_path) as world:
        world.enrol()
        world.approve()
        world.configure()
        world.declare()
        (world.home.path / "contract.json").write_bytes(world.offer().to_bytes())
        world.store.close()
        for path in (world.home.path, *world.home.path.rglob("*")):
            os.chown(path, USER, USER)
        yield world


def as_the_unit(world: Lab, *command: str) -> subprocess.CompletedProcess[str]:
    state, launcher = world.home.path, ROOT / "tests" / "launchers" / "as_the_unit.py"
    hidden = [p for p in (ROOT, Path(sys.prefix), Path(sys.base_prefix)) if p.is_relative_to("/root")]
    hidden += [p for p in (ROOT, Path(sys.prefix), Path(sys.base_prefix)) if p.is_relative_to("/home")]
    line = [sys.executable, launcher, UNIT, str(USER), state, *dict.fromkeys(hidden), "--", *command]
    env = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "FEDPACT_AGENT_HOME": str(state)}
    return subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=300, env=env, check=False)


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.stdout, done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    return value


@pytest.mark.root
@pytest.mark.landlock
def test_the_agents_own_walls_stand_inside_of_the_units(state: Lab) -> None:
    outside = subprocess.run(
        [COMMAND, "preflight", "--offline", "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"FEDPACT_AGENT_HOME": str(state.home.path)},
        check=False,
    )
    walls = {c["name"]: c for c in result(outside)["checks"] if c["name"].startswith("isolation")}
    done = as_the_unit(state, COMMAND, "preflight", "--offline", "--json")
    found = {c["name"]: c for c in result(done)["checks"]}
    assert [c["name"] for c in found.values() if c["state"] == "fail"] == []
    assert {name: found[name] for name in walls} == walls, "as many as without the unit"
    assert found["user"]["detail"] == f"an ordinary user, number {USER}"
    assert [found[n]["state"] for n in ("files", "disk", "ledgers", "data set set-1")] == ["pass"] * 4


@pytest.mark.root
@pytest.mark.landlock
def test_rows_are_read_and_torch_trains_inside_of_the_units(state: Lab) -> None:
    done = as_the_unit(state, COMMAND, "dry-run", str(state.home.path / "contract.json"), "--json")
    found = result(done)
    assert (done.returncode, found["accepted"], found["data"]["rows_that_fit"]) == (0, True, 60), found
    assert float(found["time"]["step_seconds"]) > 0


@pytest.mark.root
def test_what_the_unit_forbids_is_forbidden(state: Lab) -> None:
    """The launcher does what it says: else the two tests above would say nothing."""
    program = """
import ctypes, json, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def tried(what):
    try:
        what()
    except OSError as err:
        return err.strerror
    return "done"
def unshare(flags):
    if libc.unshare(flags):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def keys():
    if libc.syscall(165, b"none", b"/mnt", b"tmpfs", 0, None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
print(json.dumps({
    "write /usr": tried(lambda: open("/usr/written", "w")),
    "write /var": tried(lambda: open("/var/tmp/written", "w")),
    "write the home": tried(lambda: open(os.environ["FEDPACT_AGENT_HOME"] + "/written", "w")),
    "mount namespace": tried(lambda: unshare(0x00020000)),
    "mount": tried(keys),
    "netlink": tried(lambda: socket.socket(16, socket.SOCK_RAW)),
    "packet": tried(lambda: socket.socket(17, socket.SOCK_RAW)),
    "internet": tried(lambda: socket.socket()),
    "user": os.getuid(),
}))
"""
    done = as_the_unit(state, sys.executable, "-I", "-c", program)
    assert result(done) == {
        "write /usr": "Read-only file system",
        "write /var": "Read-only file system",
        "write the home": "done",
        "mount namespace": "Operation not permitted",
        "mount": "Operation not permitted",
        "netlink": "Address family not supported by protocol",
        "packet": "Address family not supported by protocol",
        "internet": "done",
        "user": USER,
    }
