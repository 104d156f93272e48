"""Run a command as systemd would by a unit's [Service], where there is none running. As root:

    as_the_unit.py UNIT USER STATE-FOLDER READABLE-FOLDERS... -- COMMAND...

The same kernel facilities, asked for one by one, in a mount namespace of this process's own: a read-only file system
but for the state folder and an empty /tmp, the user, no capability, no new privileges, the limits, and the filter of
system calls by libseccomp from systemd's own lists (`systemd-analyze syscall-filter`). Not here: control groups
(MemoryMax, CPUQuota, TasksMax).
"""

import configparser
import ctypes
import errno
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

CLONE_NEWNS = 0x00020000
NAMESPACES = {
    "cgroup": 0x02000000,
    "ipc": 0x08000000,
    "mnt": CLONE_NEWNS,
    "net": 0x40000000,
    "pid": 0x20000000,
    "user": 0x10000000,
    "uts": 0x04000000,
}
FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10}
SCMP_ACT_ALLOW, SCMP_CMP_MASKED_EQ, SCMP_CMP_NE, SCMP_CMP_GT = 0x7FFF0000, 7, 1, 6
libc = ctypes.CDLL(None, use_errno=True)


class Compare(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def unit(path: Path) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str
    parser.read(path)
    return dict(parser["Service"])


def calls(name: str) -> set[str]:
    """The system calls of one of systemd's sets, or the one that this is."""
    if not name.startswith("@"):
        return {name}
    line = ["systemd-analyze", "syscall-filter", name]
    text = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    found = [word.strip() for word in text.splitlines()[1:] if word.strip() and not word.strip().startswith("#")]
    return {call for word in found for call in calls(word)}


def run(*line: str) -> None:
    subprocess.run(line, check=True)


def files(service: dict[str, str], state: Path, readable: list[Path]) -> None:
    """ProtectSystem=strict, StateDirectory, ProtectHome and PrivateTmp; the folders named stay to be read."""
    assert service["ProtectSystem"] == "strict"
    if libc.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    run("mount", "--make-rprivate", "/")
    places = {}
    for number, path in enumerate([state, *readable]):
        places[path] = f"/mnt/.unit{number}"
    run("mount", "-t", "tmpfs", "none", "/mnt")
    for path, place in places.items():
        Path(place).mkdir()
        run("mount", "--bind", str(path), place)
    for hidden in ("/root", "/home", "/tmp"):
        run("mount", "-t", "tmpfs", "-o", "mode=1777" if hidden == "/tmp" else "mode=755", "none", hidden)
    for path, place in places.items():
        path.mkdir(parents=True, exist_ok=True)
        for above in path.parents:
            if above != Path("/") and above.stat().st_mode & 0o001 == 0:
                above.chmod(0o755)
        run("mount", "--bind", place, str(path))
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in dict.fromkeys(mounts):
        if mount not in (str(state), "/tmp") and not mount.startswith(("/proc", "/sys", "/dev", "/mnt/")):
            subprocess.run(["mount", "-o", "remount,bind,ro", mount], check=False, capture_output=True)
    assert os.statvfs("/").f_flag & os.ST_RDONLY


def rights(service: dict[str, str], number: int) -> None:
    """User, no capability, no new privileges, no core files."""
    assert service["NoNewPrivileges"] == "yes"
    assert service["CapabilityBoundingSet"] == service["AmbientCapabilities"] == ""
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; beyond the last one it fails
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(int(service["UMask"], 8))
    os.setgroups([])
    os.setgid(number)
    os.setuid(number)
    libc.prctl(38, 1, 0, 0, 0)
    status = Path("/proc/self/status").read_text()
    assert re.search(r"CapBnd:\t0+\n", status)
    assert "NoNewPrivs:\t1\n" in status


def filter_calls(service: dict[str, str], names: set[str]) -> None:
    """SystemCallFilter, RestrictNamespaces, RestrictAddressFamilies."""
    seccomp = ctypes.CDLL("libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    seccomp.seccomp_rule_add_array.argtypes = [
        *(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(Compare)),
    ]
    refuse = lambda code: 0x00050000 | code  # noqa: E731
    assert service["SystemCallErrorNumber"] == "EPERM"

    def load(default: int, rules: list[tuple[int, str, Compare | None]]) -> None:
        context = seccomp.seccomp_init(ctypes.c_uint32(default))
        for action, call, compare in rules:
            number = seccomp.seccomp_syscall_resolve_name(call.encode())
            if number < 0:  # not of this architecture
                continue
            count, array = (0, None) if compare is None else (1, ctypes.pointer(compare))
            code = seccomp.seccomp_rule_add_array(context, action, number, count, array)
            assert code == 0, (call, code)
        assert seccomp.seccomp_load(ctypes.c_void_p(context)) == 0

    forbidden = set(NAMESPACES) - set(service["RestrictNamespaces"].split())
    flags = [Compare(0, SCMP_CMP_MASKED_EQ, NAMESPACES[n], NAMESPACES[n]) for n in sorted(forbidden)]
    load(SCMP_ACT_ALLOW, [(refuse(errno.EPERM), call, flag) for call in ("unshare", "clone") for flag in flags])
    load(SCMP_ACT_ALLOW, [(refuse(errno.ENOSYS), "clone3", None)])
    allowed = {FAMILIES[name] for name in service["RestrictAddressFamilies"].split()}
    families = [f for f in range(46) if f not in allowed]
    equal = 4
    load(SCMP_ACT_ALLOW, [(refuse(errno.EAFNOSUPPORT), "socket", Compare(0, equal, family, 0)) for family in families])
    load(refuse(errno.EPERM), [(SCMP_ACT_ALLOW, name, None) for name in sorted(names)])


if __name__ == "__main__":
    wanted, user, folder, *rest = sys.argv[1:]
    place = rest.index("--")
    described = unit(Path(wanted))
    names = dict.fromkeys(rest[:place])
    files(described, Path(folder), [Path(name) for name in names])
    words = described["SystemCallFilter"].split()
    allowed = {call for word in words for call in calls(word)}  # while programs can still be started
    rights(described, int(user))
    filter_calls(described, allowed)
    os.execv(rest[place + 1], rest[place + 1 :])
