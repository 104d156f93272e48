"""Frames: one spelling, capped before memory is taken, closed at the first fault."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import FrozenInstanceError

import pytest

from fedpact_client.frames import MAGIC, PREFIX, Frame, FrameError, Pipe
from fedpact_contract.errors import FaultError, InputError

MakePipe = Callable[..., tuple[Pipe, int, int]]


@pytest.fixture
def one_end() -> Iterator[MakePipe]:
    """A pipe, the raw descriptor that feeds it, and the one that drains it."""
    with ExitStack() as stack:

        def make(**values) -> tuple[Pipe, int, int]:
            own_in, feed = os.pipe()
            drain, own_out = os.pipe()
            pipe = Pipe(own_in, own_out, **({"max_array": 1 << 20} | values))
            stack.callback(pipe.close)
            for fd in (feed, drain):
                stack.callback(_close, fd)
            return pipe, feed, drain

        yield make


def _close(fd: int) -> None:
    with suppress(OSError):
        os.close(fd)


def both(**values) -> tuple[Pipe, Pipe]:
    a_in, b_out = os.pipe()
    b_in, a_out = os.pipe()
    values = {"max_array": 1 << 26} | values
    return Pipe(a_in, a_out, **values), Pipe(b_in, b_out, **values)


def raw(header: bytes, array: bytes = b"", *, magic: int = MAGIC, header_size=None, array_size=None) -> bytes:
    sizes = len(header) if header_size is None else header_size, len(array) if array_size is None else array_size
    return PREFIX.pack(magic, *sizes) + header + array


GOOD = b'{"header":{"a":1},"kind":"k"}'


def test_a_frame_arrives_as_it_was_sent():
    left, right = both()
    header = {"b": ["x", 1, None, True], "a": {"ü": "zwölf 数据"}}
    left.send("train", header, b"\x00\xff" * 10)
    assert right.receive() == Frame(kind="train", header=header, array=b"\x00\xff" * 10)
    right.send("failed", {})
    assert left.receive(1.0) == Frame(kind="failed", header={}, array=b"")
    left.close()
    right.close()


def test_the_bytes_on_the_wire(one_end):
    pipe, _, drain = one_end()
    pipe.send("k", {"a": 1}, b"xyz")
    assert os.read(drain, 1000) == b"\xf1" + (29).to_bytes(4, "little") + (3).to_bytes(8, "little") + GOOD + b"xyz"


def test_a_large_array_goes_through_in_pieces():
    left, right = both()
    array = os.urandom(1 << 16) * 300  # the pipe holds 64 KiB: hundreds of short writes and reads
    sender = threading.Thread(target=left.send, args=("k", {}, memoryview(array)))
    sender.start()
    frame = right.receive(5.0)
    sender.join()
    assert frame is not None
    assert frame.array == array
    left.close()
    right.close()


def test_an_array_of_numbers_is_sent_as_its_bytes(one_end):
    import numpy as np

    pipe, _, drain = one_end()
    pipe.send("k", {"a": 1}, memoryview(np.arange(3, dtype="<f8")))
    assert os.read(drain, 1000) == raw(GOOD, np.arange(3, dtype="<f8").tobytes())


def test_a_frame_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Frame(kind="k", header={}, array=b"").kind = "other"  # type: ignore[misc]


def test_a_clean_end_is_no_fault(one_end):
    pipe, feed, _ = one_end()
    os.write(feed, raw(GOOD))
    os.close(feed)
    assert pipe.receive() == Frame(kind="k", header={"a": 1}, array=b"")
    assert pipe.receive() is None
    assert pipe.receive(0.1) is None
    assert not pipe.closed


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (raw(GOOD, magic=0xF2), "FRAME_MAGIC"),
        (b"Traceback (most recent call last):\n", "FRAME_MAGIC"),
        (raw(GOOD, header_size=1 << 20 | 1), "FRAME_TOO_LARGE"),
        (raw(GOOD, header_size=2**32 - 1), "FRAME_TOO_LARGE"),
        (raw(GOOD, array_size=1 << 20 | 1), "FRAME_TOO_LARGE"),
        (raw(GOOD, array_size=2**64 - 1), "FRAME_TOO_LARGE"),
        (raw(b'{"kind":"k","header":{}}'), "FRAME_HEADER"),  # keys in another order
        (raw(b'{"header": {},"kind":"k"}'), "FRAME_HEADER"),  # a blank
        (raw(b'{"header":{"a":1.5},"kind":"k"}'), "FRAME_HEADER"),  # a float
        (raw(b'{"header":{"a":1e3},"kind":"k"}'), "FRAME_HEADER"),
        (raw(b'{"header":{"a":NaN},"kind":"k"}'), "FRAME_HEADER"),
        (raw(b'{"header":{"a":9007199254740993},"kind":"k"}'), "FRAME_HEADER"),
        (raw(b'{"header":{"a":1,"a":1},"kind":"k"}'), "FRAME_HEADER"),  # a key twice
        (raw(b'{"header":{"\\ud800":1},"kind":"k"}'), "FRAME_HEADER"),  # half a character, as a key
        (raw(b'{"header":{"a":"\\ud800"},"kind":"k"}'), "FRAME_HEADER"),
        (raw(b'{"header":{"a":"\xff"},"kind":"k"}'), "FRAME_HEADER"),  # not UTF-8
        (raw(b'{"header":{"a":' + b"[" * 990 + b"]" * 990 + b'},"kind":"k"}'), "FRAME_HEADER"),
        (raw(b"[" * 100_000), "FRAME_HEADER"),
        (raw(b"\x80\x04K\x01."), "FRAME_HEADER"),  # a pickle
        (raw(b""), "FRAME_HEADER"),
        (raw(b"[]"), "FRAME_HEADER"),
        (raw(b'{"header":{}}'), "FRAME_HEADER"),
        (raw(b'{"header":[],"kind":"k"}'), "FRAME_HEADER"),
        (raw(b'{"header":{},"kind":1}'), "FRAME_HEADER"),
        (raw(b'{"header":{},"kind":"k","more":1}'), "FRAME_HEADER"),
        (raw(b'{"header":{},"kind":"other"}'), "FRAME_KIND"),
        (b"\xf1", "FRAME_TRUNCATED"),
        (raw(GOOD)[:10], "FRAME_TRUNCATED"),
        (raw(GOOD)[:-1], "FRAME_TRUNCATED"),
        (raw(GOOD, b"abc", array_size=4), "FRAME_TRUNCATED"),
    ],
)
def test_the_first_malformed_frame_closes_the_pipe(one_end, data: bytes, code: str):
    pipe, feed, _ = one_end(kinds=frozenset({"k"}))
    writer = threading.Thread(target=lambda: (os.write(feed, data + b""), os.close(feed)))
    writer.start()
    with pytest.raises(FrameError) as caught:
        pipe.receive()
    _finish(pipe, writer)
    assert caught.value.code == code
    assert isinstance(caught.value, FaultError)
    assert pipe.closed
    for use in (pipe.receive, lambda: pipe.send("k", {}), lambda: pipe.read_fd):
        with pytest.raises(FrameError) as again:
            use()
        assert again.value.code == "FRAME_CLOSED"


def _finish(pipe: Pipe, writer: threading.Thread) -> None:
    pipe.close()
    writer.join(5)
    assert not writer.is_alive()


def test_a_good_frame_after_a_bad_one_is_not_read(one_end):
    pipe, feed, _ = one_end()
    os.write(feed, raw(b"{}") + raw(GOOD))
    with pytest.raises(FrameError, match="FRAME_HEADER"):
        pipe.receive()
    with pytest.raises(FrameError, match="FRAME_CLOSED"):
        pipe.receive()


def test_no_memory_is_taken_for_a_frame_that_is_too_large(one_end):
    import tracemalloc

    pipe, feed, _ = one_end(max_header=100)
    os.write(feed, raw(GOOD, header_size=2**31))
    tracemalloc.start()
    try:
        with pytest.raises(FrameError, match="FRAME_TOO_LARGE"):
            pipe.receive()
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_what_may_not_be_sent_leaves_the_pipe_open(one_end):
    pipe, _, drain = one_end(max_array=10, max_header=100)
    with pytest.raises(FrameError, match="FRAME_TOO_LARGE"):
        pipe.send("k", {}, b"x" * 11)
    with pytest.raises(FrameError, match="FRAME_TOO_LARGE"):
        pipe.send("k", {"a": "x" * 100})
    with pytest.raises(InputError) as caught:
        pipe.send("k", {"a": 0.5})
    assert caught.value.code == "CANONICAL_FLOAT"
    pipe.send("k", {"a": 1})
    assert os.read(drain, 1000) == raw(GOOD)


def test_waiting_for_a_frame_ends_and_may_be_repeated(one_end):
    pipe, feed, _ = one_end()
    began = time.monotonic()
    with pytest.raises(FrameError) as caught:
        pipe.receive(0.05)
    assert caught.value.code == "FRAME_TIMEOUT"
    assert 0.04 < time.monotonic() - began < 5
    assert not pipe.closed
    os.write(feed, raw(GOOD))
    assert pipe.receive(0.05) == Frame(kind="k", header={"a": 1}, array=b"")
    with pytest.raises(FrameError, match="FRAME_TIMEOUT"):
        pipe.receive(0)


def test_a_frame_that_stops_half_way_closes_the_pipe(one_end):
    pipe, feed, _ = one_end(frame_seconds=0.05)
    os.write(feed, raw(GOOD, b"abc", array_size=100))
    with pytest.raises(FrameError) as caught:
        pipe.receive()
    assert caught.value.code == "FRAME_TIMEOUT"
    assert pipe.closed


def test_a_trickle_does_not_hold_the_reader(one_end):
    pipe, feed, _ = one_end(frame_seconds=0.2)
    stop = threading.Event()

    def trickle() -> None:
        for byte in raw(GOOD, b"x" * 1000):
            if stop.wait(0.02):
                return
            os.write(feed, bytes([byte]))

    writer = threading.Thread(target=trickle)
    writer.start()
    began = time.monotonic()
    with pytest.raises(FrameError, match="FRAME_TIMEOUT"):
        pipe.receive(1.0)
    assert time.monotonic() - began < 2
    stop.set()
    writer.join()


def test_a_reader_that_does_not_read_does_not_hold_the_sender(one_end):
    pipe, _, _ = one_end(frame_seconds=0.1)
    with pytest.raises(FrameError) as caught:
        pipe.send("k", {}, b"x" * (1 << 18))
    assert caught.value.code == "FRAME_TIMEOUT"
    assert pipe.closed


def test_the_other_side_is_gone(one_end):
    pipe, _, drain = one_end()
    os.close(drain)
    with pytest.raises(FrameError) as caught:
        pipe.send("k", {}, b"abc")
    assert caught.value.code == "FRAME_PEER_GONE"
    assert pipe.closed


def test_the_other_side_goes_while_we_send(one_end):
    pipe, _, drain = one_end()
    goes = threading.Timer(0.05, os.close, (drain,))
    goes.start()
    with pytest.raises(FrameError, match="FRAME_PEER_GONE"):
        pipe.send("k", {}, b"x" * (1 << 20))
    goes.join()


def test_signals_interrupt_neither_reading_nor_writing():
    left, right = both()
    hits: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: hits.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
    array = os.urandom(1 << 20) * 8

    def answer() -> None:
        time.sleep(0.1)
        frame = right.receive()
        assert frame is not None
        time.sleep(0.1)
        right.send("back", {}, frame.array)

    try:
        other = threading.Thread(target=answer)
        other.start()
        left.send("k", {}, array)
        frame = left.receive()
        other.join()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert frame == Frame(kind="back", header={}, array=array)
    assert len(hits) > 10
    left.close()
    right.close()


def test_closing_twice_does_not_close_somebody_elses_descriptor(one_end):
    pipe, _, _ = one_end()
    fd = pipe.read_fd
    pipe.close()
    other = os.dup2(os.open(os.devnull, os.O_RDONLY), fd)
    pipe.close()
    assert os.fstat(other)
    os.close(other)
