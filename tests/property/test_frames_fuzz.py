"""Whatever comes through the pipe: a frame, an end, or a fault that closes it; never another error."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import given, settings
from hypothesis import strategies as st

from fedpact_client.frames import MAGIC, PREFIX, Frame, FrameError, Pipe
from fedpact_contract.canonical import MAX_SAFE_INTEGER

LIMIT = 4000
CODES = {"FRAME_MAGIC", "FRAME_TOO_LARGE", "FRAME_HEADER", "FRAME_KIND", "FRAME_TRUNCATED"}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-MAX_SAFE_INTEGER, MAX_SAFE_INTEGER) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)
FRAMES = st.lists(
    st.tuples(st.sampled_from(["setup", "train"]), st.dictionaries(TEXT, VALUES, max_size=4), st.binary(max_size=300)),
    max_size=4,
)


@contextmanager
def fed(data: bytes) -> Iterator[Pipe]:
    """A pipe in which exactly these bytes stand, and then its end."""
    read, write = os.pipe()
    other_read, other_write = os.pipe()
    pipe = Pipe(read, other_write, max_header=LIMIT, max_array=LIMIT, kinds=frozenset({"setup", "train"}))
    try:
        assert os.write(write, data) == len(data)
        os.close(write)
        yield pipe
    finally:
        pipe.close()
        os.close(other_read)


def wire(frames: list[tuple[str, dict, bytes]]) -> bytes:
    """What a pipe writes for these frames."""
    read, write = os.pipe()
    other_read, other_write = os.pipe()
    pipe = Pipe(other_read, write, max_header=LIMIT * 10, max_array=LIMIT)
    try:
        for kind, header, array in frames:
            pipe.send(kind, header, array)
        os.set_blocking(read, False)
        return os.read(read, 1 << 16) if frames else b""
    finally:
        pipe.close()
        os.close(read)
        os.close(other_write)


def drain(pipe: Pipe) -> tuple[list[Frame], str | None]:
    """All frames until the end, and the code of the fault if there was one."""
    frames: list[Frame] = []
    try:
        while (frame := pipe.receive()) is not None:
            frames.append(frame)
    except FrameError as err:
        return frames, err.code
    return frames, None


@given(FRAMES)
@settings(max_examples=150, deadline=None)
def test_what_is_sent_arrives(frames):
    with fed(wire(frames)) as pipe:
        assert drain(pipe) == ([Frame(kind=k, header=h, array=a) for k, h, a in frames], None)


@given(st.binary(max_size=400) | st.binary(max_size=300).map(lambda data: bytes([MAGIC]) + data))
@settings(max_examples=300, deadline=None)
def test_noise_is_a_fault_and_closes_the_pipe(data):
    with fed(data) as pipe:
        frames, code = drain(pipe)
        assert frames == []
        assert (code is None) == (data == b"")
        assert pipe.closed == (code is not None)
        assert code is None or code in CODES


@given(st.binary(max_size=200), st.binary(max_size=50))
@settings(max_examples=300, deadline=None)
def test_any_header_in_a_right_envelope(header, array):
    with fed(PREFIX.pack(MAGIC, len(header), len(array)) + header + array) as pipe:
        assert drain(pipe) == ([], "FRAME_HEADER")


@given(FRAMES.filter(bool), st.data())
@settings(max_examples=300, deadline=None)
def test_a_changed_stream_gives_whole_frames_or_a_fault(frames, data):
    whole = wire(frames)
    place = data.draw(st.integers(0, len(whole) - 1))
    change = data.draw(st.sampled_from(["cut", "flip", "insert", "remove"]))
    changed = {
        "cut": whole[:place],
        "flip": whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :],
        "insert": whole[:place] + data.draw(st.binary(min_size=1, max_size=5)) + whole[place:],
        "remove": whole[:place] + whole[place + 1 :],
    }[change]
    with fed(changed) as pipe:
        got, code = drain(pipe)
        assert code is None or (code in CODES and pipe.closed)
        if change == "cut":
            assert got == [Frame(kind=k, header=h, array=a) for k, h, a in frames[: len(got)]]
            assert code in (None, "FRAME_TRUNCATED")
