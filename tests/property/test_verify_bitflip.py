"""One flipped bit anywhere in evidence is found, and its place named. The places are the files' lines; for log.jsonl
the entry, unless the flip makes a line that no text file of ours has (a carriage return, a missing last newline)."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.evidence_factory import make_evidence

from fedpact_contract.errors import FaultError
from fedpact_contract.evidence import FILES, LOG, unpack
from fedpact_contract.verify import verify


@functools.cache
def files(participants: int, rounds: int, end: str = "closed") -> dict[str, bytes]:
    return make_evidence(participants=participants, rounds=rounds, end=end).files


def faults_of(changed: dict[str, bytes]) -> list[dict[str, str]]:
    try:
        result = verify(unpack(changed), None, privacy=False)
    except FaultError as err:
        return [err.as_dict()]
    assert result.exit_code == 1
    assert result.verdict.startswith("FAULT")
    return list(result.faults)


def check_flip(good: dict[str, bytes], name: str, position: int, bit: int) -> None:
    data = bytearray(good[name])
    data[position] ^= 1 << bit
    faults = faults_of({**good, name: bytes(data)})
    line = good[name][:position].count(b"\n")
    places = {f"line {line + 1}", *([f"entries.{line}"] if name == LOG else [])}
    if good[name][position : position + 1] == b"\n":  # two lines became one: the second may be the one that is named
        places |= {f"line {line + 2}", f"entries.{line + 1}"}
    named = {(f.get("file"), f.get("field", "").removesuffix(".")) for f in faults}
    assert any((name, place) in named for place in places), (name, position, bit, faults)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_flipped_bit_is_found_and_located(data: st.DataObject) -> None:
    good = files(3, 2)
    name = data.draw(st.sampled_from(FILES))
    position = data.draw(st.integers(0, len(good[name]) - 1))
    check_flip(good, name, position, data.draw(st.integers(0, 7)))


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_bytes_cut_out_or_put_in_are_found(data: st.DataObject) -> None:
    good = files(2, 1)
    name = data.draw(st.sampled_from(FILES))
    start = data.draw(st.integers(0, len(good[name])))
    end = data.draw(st.integers(start, min(len(good[name]), start + 200)))
    new = data.draw(st.binary(max_size=20))
    changed = good[name][:start] + new + good[name][end:]
    if name == "countersignatures.jsonl" and set(changed.splitlines()) <= set(good[name].splitlines()):
        return  # whole countersignatures that are left out are no fault: their lines are held
    if changed != good[name]:
        assert faults_of({**good, name: changed})


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_byte_of_a_small_sample(name: str) -> None:
    good = files(2, 1, "opened")
    for position in range(len(good[name])):
        check_flip(good, name, position, position % 8)
