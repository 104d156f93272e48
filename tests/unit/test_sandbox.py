"""The sandbox, from the inside: each case is a process of its own, for closing in cannot be undone."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from fedpact_client import sandbox
from fedpact_client.sandbox import DENIED, INSTALLATION, Isolation, landlock_abi

HEAD = """
    import json, os, platform, signal, socket, subprocess, sys, threading, time
    from pathlib import Path
    from fedpact_client import sandbox
    def tried(f):
        try:
            f()
        except PermissionError:
            return "refused"
        except OSError as err:
            return type(err).__name__
        return "done"
"""


def inside(code: str, *args: object) -> Any:
    """Run a program and return what it prints, as JSON."""
    program = textwrap.dedent(HEAD) + textwrap.dedent(code)
    line = [sys.executable, "-I", "-c", program, *map(str, args)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_says_what_it_got():
    got, status = inside(
        """
        got = sandbox.close_in([])
        print(json.dumps([got.plain(), Path("/proc/self/status").read_text()]))
        """
    )
    isolation = Isolation.parse(got, code="ISOLATION")
    assert isolation.landlock_abi in (0, landlock_abi())
    assert isolation.isolated == (not isolation.missing)
    assert isolation.sentence == ("isolated" if isolation.isolated else "not isolated: " + "; ".join(isolation.missing))
    assert f"NoNewPrivs:\t{int(isolation.no_new_privs)}" in status
    assert ("Seccomp:\t2" in status) == isolation.sockets_denied
    assert "CapEff:\t0000000000000000" in status
    if isolation.landlock_abi >= 6 and isolation.user_and_network_namespace:
        assert isolation.isolated


@pytest.mark.landlock
def test_reading_is_for_the_named_paths_alone(tmp_path):
    for name in ("data/rows.csv", "secret/key", "single.csv", "neighbour.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "secret" / "key")
    found = inside(
        """
        base = Path(sys.argv[1])
        sandbox.close_in([base / "data", base / "single.csv", base / "absent.csv"])
        (base / "data" / "rows.csv").read_bytes()
        print(json.dumps({name: tried((base / name).read_bytes) for name in sys.argv[2:]}
            | {"list data": tried(lambda: os.listdir(base / "data")), "list base": tried(lambda: os.listdir(base)),
               "list /": tried(lambda: os.listdir("/"))}))
        """,
        tmp_path,
        *("data/rows.csv", "single.csv", "secret/key", "data/link", "neighbour.csv"),
    )
    assert found == {
        "data/rows.csv": "done",
        "single.csv": "done",
        "list data": "done",
        "secret/key": "refused",
        "data/link": "refused",  # what a link points to counts
        "neighbour.csv": "refused",
        "list base": "refused",
        "list /": "refused",
    }


@pytest.mark.landlock
def test_nothing_is_written_changed_or_started(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    found = inside(
        """
        base = Path(sys.argv[1])
        got = sandbox.close_in([base])
        uses = {
            "write": lambda: (base / "file").write_text("y"), "append": lambda: (base / "file").open("a"),
            "create": lambda: (base / "new").touch(), "mkdir": lambda: (base / "new").mkdir(),
            "unlink": (base / "file").unlink, "rmdir": (base / "folder").rmdir,
            "rename": lambda: (base / "file").rename(base / "other"),
            "symlink": lambda: os.symlink("a", base / "link"), "link": lambda: os.link(base / "file", base / "hard"),
            "fifo": lambda: os.mkfifo(base / "fifo"), "tmp": lambda: Path("/tmp/planted").touch(),
            "shm": lambda: Path("/dev/shm/planted").touch(), "exec": lambda: subprocess.run(["/bin/true"]),
        }
        if got.landlock_abi >= 3:
            uses["truncate"] = lambda: os.truncate(base / "file", 0)
        if got.sockets_denied:  # the filter that denies sockets denies these too
            uses |= {"chmod": lambda: (base / "file").chmod(0o777), "utime": lambda: os.utime(base / "file"),
                     "chown": lambda: os.chown(base / "file", os.getuid(), -1),
                     "xattr": lambda: os.setxattr(base / "file", "user.x", b"1")}
        print(json.dumps({name: tried(use) for name, use in uses.items()}))
        """,
        tmp_path,
    )
    assert set(found.values()) == {"refused"}, found
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "x"


def test_no_socket_reaches_anything(tmp_path):
    found, got = inside(
        """
        listener = socket.create_server(("127.0.0.1", 0))
        local = socket.socket(socket.AF_UNIX)
        local.bind(sys.argv[1])
        local.listen()
        port = listener.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), 2).close()
        got = sandbox.close_in([])
        kinds = {"tcp": socket.AF_INET, "tcp6": socket.AF_INET6, "unix": socket.AF_UNIX, "netlink": socket.AF_NETLINK}
        found = {name: tried(lambda: socket.socket(kind).close()) for name, kind in kinds.items()}
        found["connect"] = tried(lambda: socket.create_connection(("127.0.0.1", port), 2))
        found["pair"] = tried(socket.socketpair)
        print(json.dumps([found, got.plain()]))
        """,
        tmp_path / "socket",
    )
    if got["sockets_denied"]:
        assert set(found.values()) == {"refused"}, found
    elif got["tcp_denied"]:
        assert found["connect"] == "refused"
    else:
        assert got["user_and_network_namespace"] == (found["connect"] != "done")


def test_no_ring_opens_a_socket_either():
    """io_uring opens and connects sockets without the calls of that name."""
    before, after, got = inside(
        """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        def ring():
            if libc.syscall(425, 4, ctypes.create_string_buffer(120)) < 0:  # io_uring_setup, on every architecture
                raise OSError(ctypes.get_errno(), "io_uring_setup")
        before = tried(ring)
        got = sandbox.close_in([])
        print(json.dumps([before, tried(ring), got.plain()]))
        """
    )
    assert after == ("refused" if got["sockets_denied"] else before)


def test_shared_memory_of_others_is_out_of_reach():
    """System V shared memory knows no files: Landlock and the network namespace do not see it."""
    before, after, places, got = inside(
        """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        key = 0x46500000 + os.getpid()
        made = libc.shmget(key, 4096, 0o1600)
        reach = lambda: libc.shmget(key, 0, 0) >= 0
        name = lambda: os.readlink("/proc/self/ns/ipc")
        first, (end, ours) = name(), os.pipe()
        if os.fork() == 0:  # removes it from outside, when this process has ended
            os.close(ours)
            os.read(end, 1)
            libc.shmctl(made, 0, None)
            os._exit(0)
        before = reach()
        got = sandbox.close_in([])
        print(json.dumps([before, reach(), first != name(), got.plain()]))
        """
    )
    assert before
    assert after == (not got["ipc_namespace"])
    assert places == got["ipc_namespace"]
    assert ("an own IPC namespace" in " ".join(got["missing"])) == (not got["ipc_namespace"])
    if got["user_and_network_namespace"]:
        assert got["ipc_namespace"]


@pytest.mark.landlock
def test_a_fenced_process_has_the_network_and_its_own_folder_alone(tmp_path):
    for name in ("keys/run.key", "agent.db", "rows.csv", "flower/state"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found, got = inside(
        """
        base = Path(sys.argv[1])
        listener = socket.create_server(("127.0.0.1", 0))
        got = sandbox.fence([base / "flower"])
        own = base / "flower"
        found = {
            "connect": tried(lambda: socket.create_connection(listener.getsockname(), 2).close()),
            "listen": tried(lambda: socket.create_server(("127.0.0.1", 0)).close()),
            "own": tried(lambda: (own / "state").read_bytes()),
            "write own": tried(lambda: (own / "new").write_text("y")),
            "rename own": tried(lambda: (own / "new").rename(own / "newer")),
            "names": tried(lambda: sandbox.names_are_lost() and Path("/etc/resolv.conf").read_bytes()),
            "resolve": tried(lambda: socket.getaddrinfo("localhost", 80)),
            "library": tried(lambda: Path(os.__file__).read_bytes()),
            "key": tried((base / "keys" / "run.key").read_bytes),
            "list keys": tried(lambda: os.listdir(base / "keys")),
            "ledger": tried((base / "agent.db").read_bytes),
            "rows": tried((base / "rows.csv").read_bytes),
            "write ledger": tried(lambda: (base / "agent.db").write_text("y")),
            "plant": tried(lambda: (base / "new").write_text("y")),
            "tmp": tried(lambda: Path("/tmp/planted").touch()),
            "shadow": tried(Path("/etc/shadow").read_bytes),
            "exec": tried(lambda: subprocess.run(["/bin/true"])),
            "exec own": tried(lambda: os.execv(own / "state", ["x"])),
        }
        print(json.dumps([found, got.plain()]))
        """,
        tmp_path,
    )
    allowed = {"connect", "listen", "own", "write own", "rename own", "names", "resolve", "library"}
    assert {name for name, how in found.items() if how == "done"} == allowed, found
    assert {how for name, how in found.items() if name not in allowed} == {"refused"}
    isolation = Isolation.parse(got, code="ISOLATION")
    assert (isolation.landlock_abi, isolation.network_kept, isolation.sockets_denied) == (landlock_abi(), True, False)
    if landlock_abi() >= 6:
        assert isolation.sentence == "isolated, but for the network that it needs"
    assert not Isolation.parse(got | {"missing": ["a wall"]}, code="ISOLATION").isolated


def test_a_fence_that_the_kernel_does_not_give_is_not_pretended(tmp_path):
    (tmp_path / "key").write_text("x")
    got, read = inside(
        """
        sandbox.landlock_abi = lambda: 0
        got = sandbox.fence([])
        print(json.dumps([got.plain(), tried(Path(sys.argv[1]).read_bytes)]))
        """,
        tmp_path / "key",
    )
    isolation = Isolation.parse(got, code="ISOLATION")
    assert (isolation.isolated, isolation.landlock_abi, read) == (False, 0, "done")
    assert isolation.sentence.startswith("not isolated: Landlock for files is not to be had here")


@pytest.mark.landlock
def test_a_replaced_file_of_name_servers_is_noticed(tmp_path):
    (tmp_path / "resolv.conf").write_text("nameserver 192.0.2.1")
    (tmp_path / "new").write_text("nameserver 192.0.2.2")
    found = inside(
        """
        base = Path(sys.argv[1])
        sandbox.NAMES = str(base / "resolv.conf")
        sandbox.NETWORK = (sandbox.NAMES,)
        absent = sandbox.names_are_lost()
        go, done = os.pipe(), os.pipe()
        if os.fork() == 0:  # outside the fence
            os.read(go[0], 1)
            (base / "new").rename(base / "resolv.conf")
            os.write(done[1], b"x")
            os._exit(0)
        sandbox.fence([])
        before = sandbox.names_are_lost()
        os.write(go[1], b"x")
        os.read(done[0], 1)
        print(json.dumps([before, sandbox.names_are_lost()]))
        """,
        tmp_path,
    )
    assert found == [False, True]


@pytest.mark.landlock
def test_other_processes_are_out_of_reach():
    found, abi = inside(
        """
        other = subprocess.Popen(["/bin/sleep", "5"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        got = sandbox.close_in([])
        found = {
            "environ": tried(Path(f"/proc/{other.pid}/environ").read_bytes),
            "memory": tried(Path(f"/proc/{other.pid}/mem").open),
            "fds": tried(lambda: os.listdir(f"/proc/{other.pid}/fd")),
            "list": tried(lambda: os.listdir("/proc")),
            "signal": tried(lambda: os.kill(other.pid, signal.SIGCONT)),
        }
        own = tried(Path("/proc/self/environ").read_bytes)
        print(json.dumps([found | {"own": own}, got.landlock_abi]))
        """
    )
    if abi < 6:
        assert found.pop("signal") == "done"
    assert found.pop("own") == "done"
    assert set(found.values()) == {"refused"}, found


@pytest.mark.landlock
def test_threads_that_started_earlier_are_named():
    got = inside(
        """
        threading.Thread(target=time.sleep, args=(2,), daemon=True).start()
        print(json.dumps(sandbox.close_in([]).plain()))
        """
    )
    assert got["missing"][0] == "1 other threads were running already and are not closed in"
    assert not Isolation.parse(got, code="ISOLATION").isolated


@pytest.mark.landlock
def test_the_libraries_start_inside():
    found = inside(
        """
        sandbox.close_in([])
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = sys.prefix
        import fedpact_models.training, fedpact_models.tables, torch, polars
        print(json.dumps(float((torch.ones(300, 300) @ torch.ones(300, 300)).sum())))
        """
    )
    assert found == 300.0**3


@pytest.mark.landlock
@pytest.mark.parametrize("abi", [0, 1, 2, 3, 5])
def test_an_older_kernel_gives_less_and_it_is_said(abi: int, tmp_path):
    if abi > landlock_abi():
        pytest.skip("this kernel is older itself")
    (tmp_path / "file").write_text("x")
    got, read, write = inside(
        """
        sandbox.landlock_abi = lambda: int(sys.argv[2])
        got = sandbox.close_in([])
        path = Path(sys.argv[1])
        print(json.dumps([got.plain(), tried(path.read_bytes), tried(lambda: path.write_text("x"))]))
        """,
        tmp_path / "file",
        abi,
    )
    words = " ".join(got["missing"])
    assert got["landlock_abi"] == abi
    assert read == write == ("refused" if abi else "done")
    assert ("Landlock for files is not to be had here" in words) == (abi == 0)
    assert ("cut short" in words) == (abi in (1, 2))
    assert ("TCP is not denied" in words) == (abi < 4) == (not got["tcp_denied"])
    assert "signalled" in words
    assert not Isolation.parse(got, code="ISOLATION").isolated


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of the calls are x86-64's")
def test_a_machine_that_gives_nothing_is_not_isolated(tmp_path):
    """A container that forbids Landlock (444), unshare (272), capset (126) and filters: nothing is pretended."""
    (tmp_path / "file").write_text("x")
    got, read = inside(
        """
        sandbox._no_new_privs()
        sandbox.DENIED["x86_64"] = (0xC000003E, (444, 272, 126))
        try:
            sandbox._filter_calls()
        except OSError:
            pass  # sockets are not denied by this one: "the kernel does not confirm it"
        sandbox.DENIED.clear()
        got = sandbox.close_in([])
        print(json.dumps([got.plain(), tried(Path(sys.argv[1]).read_bytes)]))
        """,
        tmp_path / "file",
    )
    isolation = Isolation.parse(got, code="ISOLATION")
    assert (isolation.no_new_privs, isolation.landlock_abi, isolation.sockets_denied) == (True, 0, False)
    assert not isolation.user_and_network_namespace
    assert not isolation.tcp_denied
    assert read == "done"
    assert isolation.sentence.startswith("not isolated: an own user and network namespace is not to be had here")
    for what in ("IPC namespace", "capabilities", "Landlock for files", "TCP", "signalled", "system calls"):
        assert what in isolation.sentence


def test_limits():
    core, files = inside(
        """
        import resource
        sandbox.close_in([])
        limits = (resource.RLIMIT_CORE, resource.RLIMIT_NOFILE)
        print(json.dumps([resource.getrlimit(limit) for limit in limits]))
        """
    )
    assert core == [0, 0]
    assert max(files) <= 256


def test_the_lists_are_whole():
    assert all(Path(path).is_absolute() for path in INSTALLATION)
    assert not {"/", "/etc", "/proc", "/home", "/root", "/tmp", "/dev", "/run", "/var"} & set(INSTALLATION)
    assert {machine: [len(group) > 0 for group in groups[1:]] for machine, groups in DENIED.items()} == {
        "x86_64": [True] * 4,
        "aarch64": [True] * 4,
    }


def test_the_filter_answers_as_the_kernel_would_run_it():
    numbers = [3, 41, 200]
    program = sandbox._filter_program(7, numbers)
    for number in (0, 3, 4, 41, 199, 200, 201, 0x3FFFFFFF):
        expected = 0x5000D if number in numbers else 0x7FFF0000
        assert _run(program, number, 7) == expected
    assert _run(program, 0x40000000, 7) == _run(program, 0x40000029, 7) == 0x5000D
    assert _run(program, 0, 8) == 0x80000000


def _run(program: bytes, number: int, architecture: int) -> int:
    """Interpret the four instructions of classic BPF that the filter uses."""
    import struct

    lines, place, value = list(struct.iter_unpack("<HBBI", program)), 0, 0
    while True:
        code, yes, no, operand = lines[place]
        place += 1
        if code == 0x06:
            return operand
        if code == 0x20:
            value = {0: number, 4: architecture}[operand]
        else:
            place += yes if {0x15: value == operand, 0x35: value >= operand}[code] else no


@pytest.mark.parametrize(("hard", "wanted", "due"), [(None, 1 << 31, 1 << 31), (1 << 31, 1 << 32, 1 << 31)])
def test_memory_is_limited_to_what_the_system_allows(hard: int | None, wanted: int, due: int) -> None:
    """A trainer that cannot have all of limits.memory (ulimit -d) trains with less: it would die, and be charged."""
    got = inside(
        """
        import resource
        hard, wanted = json.loads(sys.argv[1]), int(sys.argv[2])
        if hard:
            resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
        sandbox.limit_memory(wanted)
        print(json.dumps(resource.getrlimit(resource.RLIMIT_DATA)))
        """,
        json.dumps(hard),
        wanted,
    )
    assert got == [due, due]
