"""Framed messages between the guard and its child processes: one canonical JSON header and one flat array each.

Wire: magic byte, header length (u32), array length (u64), both little-endian; the header, canonical JSON
`{"header": {...}, "kind": "..."}`; the array's bytes. No pickle. The other side is not trusted: lengths are checked
before memory is taken, and the first malformed frame closes the pipe for good.
"""

import contextlib
import os
import select
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from fedpact_contract.canonical import canonical_bytes, parse_canonical
from fedpact_contract.errors import FaultError, InputError

MAGIC = 0xF1
"""Also the version: another wire format gets another byte."""
PREFIX = struct.Struct("<BIQ")
MAX_HEADER = 1 << 20
FRAME_SECONDS = 60.0

NODE_NUMBER = r"^[0-9]{1,20}$"
"""A node's number at SuperLink, as text: an unsigned integer of 64 bits, which JSON numbers do not hold."""


class FrameError(FaultError):
    """The pipe cannot be used, or the other side broke its rules. Codes: FRAME_*."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One message: its kind, its header (JSON values without floats) and its array's bytes."""

    kind: str
    header: dict[str, Any]
    array: bytes


class Pipe:
    """Both directions of one connection; owns its two descriptors and makes them non-blocking. For one thread.

    Args:
        read_fd: Where frames come from.
        write_fd: Where frames go.
        max_header: Longest header, in bytes, in both directions.
        max_array: Longest array, in bytes, in both directions.
        kinds: The kinds that may be received; None for any.
        frame_seconds: A frame, once begun, must be through within this time, in either direction.
    """

    def __init__(
        self,
        read_fd: int,
        write_fd: int,
        *,
        max_array: int,
        max_header: int = MAX_HEADER,
        kinds: frozenset[str] | None = None,
        frame_seconds: float = FRAME_SECONDS,
    ) -> None:
        self._fds: tuple[int, int] | None = (read_fd, write_fd)
        self._max_header = max_header
        self._max_array = max_array
        self._kinds = kinds
        self._frame_seconds = frame_seconds
        for fd in (read_fd, write_fd):
            os.set_blocking(fd, False)

    @property
    def closed(self) -> bool:
        """Whether `close` was called, by the caller or after a fault."""
        return self._fds is None

    @property
    def read_fd(self) -> int:
        """The descriptor that frames come from, to wait on.

        Raises:
            FrameError: FRAME_CLOSED.
        """
        return self._open()[0]

    def close(self) -> None:
        """Close both directions; again is harmless."""
        fds, self._fds = self._fds, None
        for fd in set(fds or ()):
            with contextlib.suppress(OSError):  # already gone: that is what is wanted
                os.close(fd)

    def send(self, kind: str, header: Mapping[str, Any], array: bytes | bytearray | memoryview = b"") -> None:
        """Send one frame; returns when the operating system has all of it.

        Raises:
            InputError: the header has no canonical form. Nothing was sent, the pipe stays open.
            FrameError: FRAME_TOO_LARGE (nothing was sent, the pipe stays open); FRAME_PEER_GONE, FRAME_TIMEOUT,
                FRAME_CLOSED (the pipe is closed).
        """
        _, fd = self._open()
        head = canonical_bytes({"header": dict(header), "kind": kind})
        body = memoryview(array).cast("B")
        if len(head) > self._max_header or len(body) > self._max_array:
            raise FrameError(
                "FRAME_TOO_LARGE",
                f"A frame of {len(head)} + {len(body)} bytes is above the limits of this pipe.",
                rule=f"header at most {self._max_header} bytes, array at most {self._max_array}",
            )
        deadline = time.monotonic() + self._frame_seconds
        self._write(fd, memoryview(PREFIX.pack(MAGIC, len(head), len(body)) + head), deadline)
        self._write(fd, body, deadline)

    def receive(self, timeout: float | None = None) -> Frame | None:
        """The next frame, or None if the other side closed the pipe between two frames.

        Args:
            timeout: Seconds to wait for a frame to begin; None waits for ever.

        Raises:
            FrameError: FRAME_TIMEOUT, where no frame began in time: the pipe stays open, ask again. Any other code,
                and FRAME_TIMEOUT within a frame, closes the pipe: FRAME_MAGIC, FRAME_TOO_LARGE, FRAME_TRUNCATED,
                FRAME_HEADER, FRAME_KIND, FRAME_CLOSED.
        """
        fd, _ = self._open()
        if timeout is not None and not _ready(fd, select.POLLIN, time.monotonic() + timeout):
            raise FrameError("FRAME_TIMEOUT", f"No frame began within {timeout:g} seconds.")
        first = self._read(fd, 1, None, may_end=True)
        if not first:
            return None
        if first[0] != MAGIC:
            self._fail("FRAME_MAGIC", "What came is no frame of this version.")
        deadline = time.monotonic() + self._frame_seconds
        _, header_size, array_size = PREFIX.unpack(first + self._read(fd, PREFIX.size - 1, deadline))
        if header_size > self._max_header or array_size > self._max_array:
            self._fail("FRAME_TOO_LARGE", f"A frame of {header_size} + {array_size} bytes was announced.")
        kind, header = self._parse(self._read(fd, header_size, deadline))
        return Frame(kind=kind, header=header, array=bytes(self._read(fd, array_size, deadline)))

    def _open(self) -> tuple[int, int]:
        if self._fds is None:
            raise FrameError("FRAME_CLOSED", "The pipe is closed.")
        return self._fds

    def _fail(self, code: str, message: str, cause: BaseException | None = None) -> NoReturn:
        self.close()
        raise FrameError(code, message) from cause

    def _parse(self, data: bytes | bytearray) -> tuple[str, dict[str, Any]]:
        try:
            value = parse_canonical(bytes(data), what="frame's header")
        except InputError as err:
            self._fail("FRAME_HEADER", "A frame's header is not canonical JSON.", err)
        if (
            not isinstance(value, dict)
            or value.keys() != {"header", "kind"}
            or not isinstance(value["kind"], str)
            or not isinstance(value["header"], dict)
        ):
            self._fail("FRAME_HEADER", "A frame's header lacks its kind or its values.")
        if self._kinds is not None and value["kind"] not in self._kinds:
            self._fail("FRAME_KIND", "A frame of a kind that is not expected here came.")
        return value["kind"], value["header"]

    def _read(self, fd: int, size: int, deadline: float | None, *, may_end: bool = False) -> bytearray:
        """Exactly `size` bytes; with `may_end` nothing at all if the stream ends here."""
        data = bytearray(size)
        view, have = memoryview(data), 0
        while have < size:
            if not _ready(fd, select.POLLIN, deadline):
                self._fail("FRAME_TIMEOUT", f"A frame was not complete within {self._frame_seconds:g} seconds.")
            try:
                count = os.readv(fd, [view[have:]])
            except BlockingIOError:
                continue
            except OSError as err:
                self._fail("FRAME_TRUNCATED", "The pipe broke within a frame.", err)
            if count == 0:
                if may_end and have == 0:
                    return bytearray()
                self._fail("FRAME_TRUNCATED", "The other side ended within a frame.")
            have += count
        return data

    def _write(self, fd: int, view: memoryview, deadline: float) -> None:
        while view:
            if not _ready(fd, select.POLLOUT, deadline):
                self._fail("FRAME_TIMEOUT", f"A frame was not taken within {self._frame_seconds:g} seconds.")
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:
                continue
            except OSError as err:  # EPIPE, and ECONNRESET on a socket
                self._fail("FRAME_PEER_GONE", "The other side of the pipe is gone.", err)


def _ready(fd: int, event: int, deadline: float | None) -> bool:
    """Wait until the descriptor can be used (or is broken, which its use then shows); False at the deadline."""
    waiter = select.poll()
    waiter.register(fd, event)
    wait = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
    return bool(waiter.poll(wait))  # goes on after a signal by itself (PEP 475)
