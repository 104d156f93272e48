"""Death at any line of the store's code: a forked child that ends there as `kill -9` would, with nothing tidied up."""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from fedpact_client import store
from fedpact_contract import ledger

CODE = {*map(str, Path(store.__file__).parent.glob("store*.py")), ledger.__file__}
"""What both transactions are made of: the store's modules, and the ledger's rules."""

DEAD = 9


@dataclass
class Lines:
    """Counts the lines of `CODE` that are run, and dies before the `deadly` one; 0: never."""

    deadly: int
    count: int = 0

    @contextmanager
    def counted(self) -> Any:
        sys.settrace(self._called)
        try:
            yield
        finally:
            sys.settrace(None)

    def _called(self, frame: FrameType, _event: str, _argument: object) -> Any:
        return self._lined if frame.f_code.co_filename in CODE else None

    def _lined(self, _frame: FrameType, event: str, _argument: object) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self.deadly:
                os._exit(DEAD)
        return self._lined


@contextmanager
def in_memory() -> Iterator[Path]:
    """A folder of its own, in memory where the machine has such: as real as others, and four times as fast.

    A process that dies loses nothing that it wrote, synced or not. What syncing is for, the tests on the disk try.
    """
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def in_a_child(work: Callable[[Callable[[str], None]], None]) -> tuple[bool, list[list[str]]]:
    """Run `work` in a child; whether it died, and what it said (words of each line) before that.

    `work` gets a function that says one line: what was said has left the process, whatever becomes of it.
    """
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(reader)
            work(lambda line: os.write(writer, f"{line}\n".encode()) and None)
            os._exit(0)
        except BaseException:  # noqa: BLE001 - whatever it was, the parent is told and raises
            os.write(writer, f"error {traceback.format_exc()!r}\n".encode())
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as heard:
        said = [line.split() for line in heard]
    ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert ended in (0, DEAD), said
    return ended == DEAD, said
