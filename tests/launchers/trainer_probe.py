"""The trainer, looking around from the inside: `trainer_probe.py HOME PORT USERS_HOME`.

What it finds is a JSON line in its log. The probes run where the noise is made: in the process that will train, after
it has closed itself in.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fedpact_client.trainer import main

if TYPE_CHECKING:
    from fedpact_models.dp import Noise


def tried(use: Callable[[], object]) -> str:
    try:
        use()
    except PermissionError:
        return "refused"
    except OSError as err:
        return type(err).__name__
    return "done"


def look(home: Path, port: int, users_home: Path) -> dict[str, object]:
    parent = os.getppid()
    return {
        "argv": Path("/proc/self/cmdline").read_bytes().decode(),
        "environ": dict(os.environ),
        "started with": Path("/proc/self/environ").read_bytes().decode(),
        "descriptors": {path.name: _target(path) for path in list(Path("/proc/self/fd").iterdir())},
        "reading": {
            "node key": tried((home / "keys" / "node.key").read_bytes),
            "token": tried((home / "token").read_bytes),
            "ledger": tried((home / "agent.db").read_bytes),
            "home": tried(lambda: list(home.iterdir())),
            "user's home": tried(lambda: list(users_home.iterdir())),
            "guard's environment": tried(Path(f"/proc/{parent}/environ").read_bytes),
            "guard's memory": tried(lambda: Path(f"/proc/{parent}/mem").open("rb").close()),
            "passwords": tried(Path("/etc/passwd").read_bytes),
        },
        "rows": tried((home / "data" / "rows.csv").read_bytes),
        "connecting": {
            "tcp": tried(lambda: socket.create_connection(("127.0.0.1", port), 2).close()),
            "unix": tried(lambda: _connect_local(home / "socket")),
            "udp": tried(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", port))),
        },
        "writing": {
            "home": tried((home / "planted").touch),
            "data": tried(lambda: (home / "data" / "rows.csv").open("a").close()),
            "tmp": tried(Path("/tmp/fedpact-planted").touch),
            "installation": tried((Path(sys.prefix) / "planted").touch),
            "package": tried((Path(main.__globals__["__file__"]).parent / "planted").touch),
            "rights": tried(lambda: (home / "keys" / "node.key").chmod(0o644)),
            "shared memory": tried(Path("/dev/shm/fedpact-planted").touch),
        },
        "acting": {
            "a program": tried(lambda: subprocess.run(["/bin/true"], check=False)),
            "a signal": tried(lambda: os.kill(parent, signal.SIGCONT)),
        },
    }


def _target(descriptor: Path) -> str:
    try:
        return str(descriptor.readlink())
    except FileNotFoundError:
        return "(the listing's own)"


def _connect_local(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as local:
        local.connect(str(path))


def probing_noise() -> "Noise":
    from fedpact_models.dp import SystemNoise

    found = look(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    sys.stderr.write("PROBE " + json.dumps(found) + "\n")
    return SystemNoise()


if __name__ == "__main__":
    main(probing_noise)
