"""Processes of this machine, as tests look at them."""

import os
import signal
from pathlib import Path


def with_default_signals() -> None:
    """A child's `preexec_fn`: signals that tests send act on it, whatever ran the tests (`nohup`, a shell's `&`)."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def command_lines() -> dict[int, str]:
    """Process id -> command line of every process that can be read."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
    return found


def descendants(pid: int) -> set[int]:
    """Every process below this one, by parents."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    found, todo = set(), [pid]
    while todo:
        parent = todo.pop()
        for child, of in parents.items():
            if of == parent and child not in found:
                found.add(child)
                todo.append(child)
    return found


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def mentioning(text: str) -> dict[int, str]:
    """Processes, this one excepted, whose command line, environment or open files mention a text (a path)."""
    found = {}
    for pid, line in command_lines().items():
        if pid != os.getpid() and (text in line or _touches(pid, text)):
            found[pid] = line
    return found


def _touches(pid: int, text: str) -> bool:
    try:
        return any(text in str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False
