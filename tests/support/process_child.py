"""A small demo of processes, started by tests: `Processes` with stand-ins for our commands. python … FOLDER WHAT."""

import sys
import time
from pathlib import Path

from fedpact_server.demo import processes

STUBBORN = """#!{python}
import os, signal, sys, time
from pathlib import Path
import subprocess
folder, name = Path({folder!r}), sys.argv[1]
if name == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
def interrupted(*_):
    (folder / "interrupted").touch()
    sys.exit(130)
if name == "shown":
    signal.signal(signal.SIGINT, interrupted)
if name in ("stubborn", "parent"):
    line = [sys.executable, "-c", "import time; time.sleep(600)", str(folder)]
    child = subprocess.Popen(line, start_new_session=True)
(folder / f"{{name}}.tmp").write_text(str(os.getpid()))
(folder / f"{{name}}.tmp").rename(folder / f"{{name}}.pid")  # whoever sees the file can read it
if name == "quick":
    sys.stdout.write('{{"said": "done"}}')
    sys.exit(0)
if name == "failing":
    sys.stdout.write('{{"error": {{"code": "SOME_CODE", "message": "It is so.", "file": "a.csv", "field": "f"}}}}')
    sys.exit(5)
time.sleep(600)
"""


def install(folder: Path) -> None:
    """`stand-in` as the one command: it writes its number to NAME.pid and does what its name says."""
    path = folder / "stand-in"
    path.write_text(STUBBORN.format(python=sys.executable, folder=str(folder)))
    path.chmod(0o755)
    processes.command = lambda name: str(folder / name)
    processes.GRACE_SECONDS = 1.0


def main() -> None:
    folder, what = Path(sys.argv[1]), sys.argv[2]
    install(folder)
    processes.adopt_orphans()
    made = processes.Processes(step="some step")
    with processes.interruptible(made.announce):
        try:
            for name in ("parent", "stubborn"):
                made.start(name, ["stand-in", name], folder / "logs" / f"{name}.log")
            made.wait_for(lambda: all((folder / f"{name}.pid").exists() for name in ("parent", "stubborn")), "it", 30)
            (folder / "both").touch()
            if what == "call":
                made.call(["stand-in", "slow"])
            elif what == "shown":
                made.call(["stand-in", "shown"], shown=True)
            elif what == "each":
                made.each([lambda n=n: made.call(["stand-in", f"slow{n}"]) for n in range(3)])
            elif what == "own-work":
                made.each([lambda: time.sleep(5)])
            else:
                made.call(["stand-in", what])
        except BaseException:
            made.stop()
            raise


if __name__ == "__main__":
    from fedpact_contract.output import run

    run(main)
