"""Close this process in, by itself and for good: the trainer wholly, the executor but for the network.

Linux, as an ordinary user, by ctypes alone: no_new_privs; an own user, network and IPC namespace; Landlock
(https://docs.kernel.org/userspace-api/landlock.html) for files, TCP, signals; a seccomp filter for what Landlock does
not know; no capabilities. Each works without the others. `close_in` and `fence` say what they got and what they did
not: they try each wall from the inside and never take one for granted.

All of it binds the calling thread and what it starts later, so it must run while there is one thread: before numpy,
polars or torch are imported, for these start threads of their own.
"""

import ctypes
import fcntl
import json
import os
import platform
import resource
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import fedpact_client
import fedpact_contract
import fedpact_models
from fedpact_contract.errors import InputError
from fedpact_contract.record import Part

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2
_CLONE_NEWUSER, _CLONE_NEWNET, _CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same numbers on every architecture
_LANDLOCK_VERSION, _LANDLOCK_PATH_BENEATH = 1, 1
_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
_FILES_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""Everything that each Landlock version can deny: what is handled and not allowed by a rule is refused."""
_TCP_BIND_CONNECT, _SCOPE_ABSTRACT_SIGNAL = 3, 3
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_TCP_ABI, _SCOPE_ABI, _TRUNCATE_ABI = 4, 6, 3

INSTALLATION = (
    "/usr",  # the system's libraries, Python's own on most machines, time zones
    "/lib",  # the same where it is no link to /usr
    "/lib32",
    "/lib64",
    "/etc/ld.so.cache",  # the dynamic linker's index
    "/etc/localtime",  # the clock's zone
    "/proc/self",  # this process's own description; of no other process
    "/proc/cpuinfo",  # which instructions torch may use
    "/proc/meminfo",  # how much memory there is
    "/sys/devices/system/cpu",  # how many processors there are, and their caches
    "/dev/null",
    "/dev/urandom",
)

NAMES = "/etc/resolv.conf"
"""Who answers for names. A file that is replaced later is another file for Landlock, to which no rule applies."""

NETWORK = (
    NAMES,
    "/run/systemd/resolve",  # where it leads to on many machines; as a folder, so that its files may be replaced
    "/run/NetworkManager",
    "/run/resolvconf",
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/ssl/openssl.cnf",  # OpenSSL's configuration, and where some systems keep theirs
    "/etc/pki/tls/openssl.cnf",
    "/etc/crypto-policies",
)
"""What a process with a network reads beside the installation."""

DENIED = {
    "x86_64": (
        0xC000003E,  # AUDIT_ARCH_X86_64
        (41, 53, 425),  # socket, socketpair, io_uring_setup (opens sockets without `socket`)
        (90, 91, 92, 93, 94, 132, 235, 260, 261, 268, 280, 452),  # chmod, chown and utime in all their forms
        (188, 189, 190, 197, 198, 199, 463, 466),  # setxattr and removexattr in all their forms
        (248, 249, 250),  # add_key, request_key, keyctl: the kernel's key rings
    ),
    "aarch64": (
        0xC00000B7,  # AUDIT_ARCH_AARCH64
        (198, 199, 425),
        (52, 53, 54, 55, 88, 452),
        (5, 6, 7, 14, 15, 16, 463, 466),
        (217, 218, 219),
    ),
}
"""What Landlock does not know, by machine: the filter's architecture, and the calls that are refused."""
_X32_BIT = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


class Isolation(Part):
    """What holds in this process, as tried from the inside.

    `landlock_abi` is 0 where Landlock is not in force. `sockets_denied`: no socket of any family can be made.
    `network_kept`: it needs the network, and was not to be kept from it. `missing` names in words what was wanted and
    this machine did not give; empty: the process is isolated.
    """

    no_new_privs: bool
    user_and_network_namespace: bool
    ipc_namespace: bool
    network_kept: bool
    landlock_abi: int
    tcp_denied: bool
    sockets_denied: bool
    missing: tuple[str, ...]

    @property
    def isolated(self) -> bool:
        """Whether nothing is missing."""
        return not self.missing

    @property
    def sentence(self) -> str:
        """One sentence for people."""
        if self.missing:
            return f"not isolated: {'; '.join(self.missing)}"
        return "isolated, but for the network that it needs" if self.network_kept else "isolated"


def close_in(read_paths: Sequence[Path], *, loopback: bool = False) -> Isolation:
    """Close this process in for good. What it may read afterwards: the installation, and below `read_paths`.

    Descriptors that are open already stay usable. A path that does not exist gets no rule.

    Args:
        read_paths: Files and folders.
        loopback: Leave it sockets and the loopback of its own network namespace, which reaches nobody else.
    """
    missing = _threads()
    _limit_resources()
    no_new_privs = _attempt(missing, "no_new_privs", _no_new_privs)
    namespaces = _attempt(
        missing, "an own user and network namespace", lambda: _unshare(_CLONE_NEWUSER | _CLONE_NEWNET, "user", "net")
    )
    if loopback and namespaces:
        _attempt(missing, "a loopback of its own", _raise_loopback)
    ipc = _attempt(missing, "an own IPC namespace", lambda: _unshare(_CLONE_NEWIPC, "ipc"))
    _attempt(missing, "a process without capabilities", _drop_capabilities)
    abi = _enforce(missing, read_paths, (), tcp=loopback)
    tcp_denied = not loopback and abi >= _TCP_ABI and _tcp_is_denied()
    if loopback and not namespaces:
        missing.append("it can reach every host: without an own network namespace nothing here denies that")
    elif not loopback and not tcp_denied:
        missing.append("TCP is not denied by Landlock: ABI 4 (Linux 6.7) does that")
    filtered = _attempt(missing, "a filter of system calls", lambda: _filter_calls(sockets=not loopback))
    return Isolation(
        no_new_privs=no_new_privs,
        user_and_network_namespace=namespaces,
        ipc_namespace=ipc,
        network_kept=False,
        landlock_abi=abi,
        tcp_denied=tcp_denied,
        sockets_denied=filtered and not loopback,
        missing=tuple(missing),
    )


def fence(write_paths: Sequence[Path]) -> Isolation:
    """Close this process off from files for good, and leave it the network.

    What it may read afterwards: the installation, and what names and TLS need. What it may write: below `write_paths`.
    Nothing may be executed. Descriptors that are open already stay usable.
    """
    missing = _threads()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    no_new_privs = _attempt(missing, "no_new_privs", _no_new_privs)
    _attempt(missing, "a process without capabilities", _drop_capabilities)
    abi = _enforce(missing, tuple(map(Path, NETWORK)), write_paths, tcp=True)
    return Isolation(
        no_new_privs=no_new_privs,
        user_and_network_namespace=False,
        ipc_namespace=False,
        network_kept=True,
        landlock_abi=abi,
        tcp_denied=False,
        sockets_denied=False,
        missing=tuple(missing),
    )


def check_home(path: Path) -> None:
    """Raise where trainer or executor could read an agent's home: it lies below what they must be able to read.

    Raises:
        InputError: HOME_IN_INSTALLATION, naming the folder and what it lies below.
    """
    home = path.resolve()
    for allowed in (*_installation(), *map(Path, NETWORK)):
        if home.is_relative_to(allowed.resolve()):
            raise InputError(
                "HOME_IN_INSTALLATION",
                f"The home lies below {allowed}, which trainer and executor may read: its keys would be open to them.",
                file=path,
                rule="no key where the sandbox lets its processes read",
                remedy="Choose another folder for the home (--home), such as one in your own home folder; move a home "
                "that stands already.",
            )


def names_are_lost() -> bool:
    """In a fenced process: whether the file of name servers was replaced, so that it cannot be read any more."""
    try:
        Path(NAMES).read_bytes()
    except PermissionError:
        return True
    except OSError:  # not there: nobody misses it
        return False
    return False


def _threads() -> list[str]:
    """What is missing where this is not the only thread."""
    others = len(os.listdir("/proc/self/task")) - 1  # noqa: PTH208 - names only
    return [f"{others} other threads were running already and are not closed in"] if others else []


def _enforce(missing: list[str], read_paths: Sequence[Path], write_paths: Sequence[Path], *, tcp: bool) -> int:
    """Landlock: the version in force, 0 for none."""
    walls = lambda: _landlock(read_paths, write_paths, tcp=tcp)  # noqa: E731 - a step for `_attempt`
    abi = landlock_abi() if _attempt(missing, "Landlock for files", walls) else 0
    if 0 < abi < _TRUNCATE_ABI:
        missing.append("files can still be cut short: Landlock ABI 3 (Linux 6.2) denies that")
    if abi < _SCOPE_ABI:
        missing.append("other processes can be signalled: Landlock ABI 6 (Linux 6.12) denies that")
    return abi


def landlock_abi() -> int:
    """The version of Landlock that this kernel offers; 0 for none."""
    version = int(_libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), _LANDLOCK_VERSION))
    return max(version, 0)


def _attempt(missing: list[str], what: str, step: Callable[[], None]) -> bool:
    """Try one wall; a wall that this machine does not give is noted in words."""
    try:
        step()
    except OSError as err:
        missing.append(f"{what} is not to be had here: {err.strerror or err}")
        return False
    return True


def _call(function: str, *args: object) -> int:
    """A libc function that gives -1 and errno where it fails."""
    result = int(getattr(_libc, function)(*args))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _limit_resources() -> None:
    """No core files, which would hold data; few descriptors."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    few = 256 if hard == resource.RLIM_INFINITY else min(256, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, few))


def _no_new_privs() -> None:
    """Programs with the setuid bit give nothing; unprivileged Landlock and seccomp need it."""
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if "NoNewPrivs:\t1\n" not in Path("/proc/self/status").read_text():
        raise OSError("the kernel does not confirm it")


def _unshare(flags: int, *kinds: str) -> None:
    """Own namespaces of these kinds.

    A network with no device in it, not even a running loopback; shared memory and message queues of nobody else. The
    user namespace lets an ordinary user ask for the others.
    """
    places = [Path(f"/proc/self/ns/{kind}") for kind in kinds]
    before = [place.readlink() for place in places]
    _call("unshare", flags)
    if any(place.readlink() == old for place, old in zip(places, before, strict=True)):
        raise OSError("the kernel does not confirm it")


def _raise_loopback() -> None:
    """Switch on the loopback of an own network namespace, while the capability for that lasts.

    No other device may be there. struct ifreq: the device's name, its flags.
    """
    devices = [
        line.partition(":")[0].strip() for line in Path("/proc/self/net/dev").read_text("ascii").splitlines()[2:]
    ]
    if devices != ["lo"]:  # read from a file: a service unit may refuse the sockets that `if_nameindex` asks by
        raise OSError("the network namespace has other devices")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        fcntl.ioctl(handle, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))


def _drop_capabilities() -> None:
    """Neither root's capabilities nor those that a fresh user namespace gives."""
    header = struct.pack("<Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    _call("capset", ctypes.c_char_p(header), ctypes.c_char_p(bytes(24)))


def _landlock(read_paths: Sequence[Path], write_paths: Sequence[Path], *, tcp: bool) -> None:
    """Refuse every use of files, TCP (unless `tcp`), foreign signals and abstract sockets; allow some paths."""
    abi = landlock_abi()
    if not abi:
        raise OSError("the kernel has no Landlock (Linux 5.13), or it is switched off")
    files = _FILES_BY_ABI[max(known for known in _FILES_BY_ABI if known <= abi)]
    attributes = struct.pack("<Q", files)
    if abi >= _TCP_ABI:
        attributes += struct.pack("<Q", 0 if tcp else _TCP_BIND_CONNECT)
    if abi >= _SCOPE_ABI:
        attributes += struct.pack("<Q", _SCOPE_ABSTRACT_SIGNAL)
    rules = _call("syscall", _LANDLOCK_CREATE, ctypes.c_char_p(attributes), ctypes.c_size_t(len(attributes)), 0)
    try:
        for path in (*_installation(), *read_paths):
            _allow(rules, path, _READ_FILE | _READ_DIR)
        for path in write_paths:
            _allow(rules, path, files & ~_EXECUTE)
        _call("syscall", _LANDLOCK_RESTRICT, rules, 0)
    finally:
        os.close(rules)
    with suppress(PermissionError):
        os.listdir("/")  # noqa: PTH208 - names only
        raise OSError("the kernel does not confirm it")


def _installation() -> Iterator[Path]:
    yield from map(Path, INSTALLATION)
    yield from (Path(sys.prefix), Path(sys.base_prefix))  # the virtual environment, and the Python that it was made of
    for package in (fedpact_client, fedpact_contract, fedpact_models):  # elsewhere where the install is editable
        yield from map(Path, package.__path__)


def _allow(rules: int, path: Path, rights: int) -> None:
    """One rule: these uses of what lies below this folder; of a file, reading. Nothing may be executed."""
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # not there, or not reachable for this user: nothing to allow
        return
    try:
        allowed = rights if path.is_dir() else _READ_FILE
        rule = ctypes.c_char_p(struct.pack("<Qi", allowed, handle))
        _call("syscall", _LANDLOCK_ADD, rules, _LANDLOCK_PATH_BENEATH, rule, 0)
    finally:
        os.close(handle)


def _tcp_is_denied() -> bool:
    """Landlock answers before the network does; without it the answer would be "refused" or "unreachable"."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.connect(("127.0.0.1", 1))
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def _filter_calls(*, sockets: bool = True) -> None:
    """Refuse, with EACCES: sockets of any family, where asked; changes of files' rights and times; key rings."""
    if platform.machine() not in DENIED:
        raise OSError(f"no list of calls for {platform.machine()}")
    architecture, *groups = DENIED[platform.machine()]
    denied = groups if sockets else [groups[0][-1:], *groups[1:]]  # io_uring in any case
    program = _filter_program(architecture, [n for group in denied for n in group])
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))  # struct sock_fprog
    _call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_char_p(header), 0, 0)
    with suppress(PermissionError):
        if sockets:
            socket.socket(socket.AF_UNIX).close()
        else:
            with suppress(FileNotFoundError):  # what a kernel says that looks at the path
                os.chmod("", 0)  # noqa: PTH101 - refused before that
        raise OSError("the kernel does not confirm it")


def _filter_program(architecture: int, numbers: Sequence[int]) -> bytes:
    """Classic BPF over struct seccomp_data (call number at 0, architecture at 4); eight bytes an instruction."""
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    kill, deny, allow = 0x80000000, 0x00050000 | 13, 0x7FFF0000  # KILL_PROCESS, ERRNO | EACCES, ALLOW
    rest = len(numbers)
    lines = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (answer, 0, 0, kill),  # another architecture numbers its calls otherwise
        (load, 0, 0, 0),
        (at_least, rest + 1, 0, _X32_BIT),  # x86-64's second set of numbers
        *((equal, rest - index, 0, number) for index, number in enumerate(numbers)),
        (answer, 0, 0, allow),
        (answer, 0, 0, deny),
    ]
    return b"".join(struct.pack("<HBBI", *line) for line in lines)


PROBED: dict[str, Callable[[], Isolation]] = {
    "trainer": lambda: close_in([]),
    "executor": lambda: fence([]),
    "loader": lambda: close_in([], loopback=True),  # where a data set is a database
}
"""The walls of each process beside the guard, as `python -m fedpact_client.sandbox NAME` tries them."""


def limit_memory(size: int) -> None:
    """At most so many bytes for data, for good; fewer, where the system gives this process no more."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    most = size if hard == resource.RLIM_INFINITY else min(size, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def memory_is_limited(mebibytes: int = 64) -> bool:
    """Whether this process, told to use no more than it has and so much, is refused four times as much. For good."""
    used = int(Path("/proc/self/statm").read_text("ascii").split()[5]) * resource.getpagesize()
    limit = used + (mebibytes << 20)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        bytearray(4 * mebibytes << 20)
    except MemoryError:
        return True
    except (OSError, ValueError):  # the system does not let it be limited
        return False
    return False


def _main() -> None:
    """Try the walls of the process named, and the limit of its memory; tell in one JSON object."""
    isolation = PROBED[sys.argv[1]]()
    sys.stdout.write(json.dumps({"isolation": isolation.plain(), "memory_limited": memory_is_limited()}) + "\n")


if __name__ == "__main__":
    _main()
