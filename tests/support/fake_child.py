"""Children of the guard that are threads of the test: real pipes, no processes."""

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

from fedpact_client.frames import FrameError, Pipe

Behaviour = Callable[[Pipe], None]
"""What a child does with its end of the pipe, in a thread of its own; when it returns, the child has ended."""


class FakeChild:
    """Stands for `spawn.Child`."""

    def __init__(self, behave: Behaviour, *, kinds: frozenset[str] | None = None, frame_seconds: float = 5.0) -> None:
        down, up = os.pipe(), os.pipe()
        self.pipe = Pipe(up[0], down[1], max_array=1 << 20, kinds=kinds, frame_seconds=frame_seconds)
        self.inside = Pipe(down[0], up[1], max_array=1 << 20, frame_seconds=frame_seconds)
        self.stopped = False
        self._thread = threading.Thread(target=self._run, args=(behave,), daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def stop(self, grace: float = 5.0) -> int:
        self.stopped = True
        self.pipe.close()
        self._thread.join(grace)
        self.inside.close()
        return 0

    def join(self) -> None:
        self._thread.join(10.0)

    def _run(self, behave: Behaviour) -> None:
        with contextlib.suppress(FrameError):  # the guard closed the pipe while it was asked or answered
            behave(self.inside)
        self.inside.close()


class Spawner:
    """Stands for `spawn`: gives one child after another, each with the next behaviour; the last one again and again."""

    def __init__(self, *behaviours: Behaviour, frame_seconds: float = 5.0) -> None:
        self.behaviours = list(behaviours)
        self.frame_seconds = frame_seconds
        self.children: list[FakeChild] = []
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, module: str, **options: Any) -> FakeChild:
        self.asked.append((module, options))
        behave = self.behaviours[min(len(self.children), len(self.behaviours) - 1)]
        self.children.append(FakeChild(behave, kinds=options.get("kinds"), frame_seconds=self.frame_seconds))
        return self.children[-1]

    def stop(self) -> None:
        for child in self.children:
            child.stop(1.0)
