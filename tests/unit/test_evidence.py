import os

import pytest
from tests.support.evidence_factory import make_evidence

from fedpact_contract.errors import FaultError, InputError
from fedpact_contract.evidence import FILES, pack, read_evidence, unpack, write_evidence


@pytest.fixture
def made():
    return make_evidence(participants=2, rounds=1)


def write(made, folder):
    write_evidence(folder, made.entries, made.checkpoints, made.countersignatures)
    return folder


def test_what_is_written_is_read_back(made, tmp_path) -> None:
    folder = write(made, tmp_path / "deep" / "evidence")
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    evidence = read_evidence(folder)
    assert list(evidence.log) == [entry.to_bytes() for entry in made.entries]
    assert [bytes.fromhex(line.decode()) for line in evidence.leaves] == [e.leaf_hash for e in made.entries]
    assert list(evidence.checkpoints) == [e.to_bytes() for e in made.checkpoints]
    assert {*evidence.countersignatures} == {e.to_bytes() for e in made.countersignatures}
    assert [p.name for p in folder.parent.iterdir()] == ["evidence"]


def test_order_and_repetition_do_not_change_the_files(made) -> None:
    again = pack(made.entries, made.checkpoints[::-1] * 2, made.countersignatures[::-1] * 2)
    assert again == made.files


def test_no_countersignatures_are_an_empty_file(made, tmp_path) -> None:
    write_evidence(tmp_path / "e", made.entries, made.checkpoints, [])
    assert read_evidence(tmp_path / "e").countersignatures == ()


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_evidence_is_never_overwritten(made, tmp_path, what) -> None:
    place = tmp_path / "e"
    if what == "folder":
        place.mkdir()
    elif what == "file":
        place.write_text("mine")
    else:
        place.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError) as refused:
        write(made, place)
    assert refused.value.code == "EVIDENCE_EXISTS"
    assert not (tmp_path / "nowhere").exists()


def test_there_is_no_evidence_here(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for place in (tmp_path / "nothing", tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(InputError) as refused:
            read_evidence(place)
        assert refused.value.code == "EVIDENCE_MISSING"
        assert refused.value.file == str(place)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_a_fault(made, tmp_path, name) -> None:
    folder = write(made, tmp_path / "e")
    (folder / name).unlink()
    with pytest.raises(FaultError) as fault:
        read_evidence(folder)
    assert fault.value.code == "EVIDENCE_FILE_MISSING"
    assert fault.value.file == str(folder / name)


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "log.jsonl.bak", "LOG.JSONL"])
def test_another_file_is_a_fault(made, tmp_path, name) -> None:
    folder = write(made, tmp_path / "e")
    (folder / name).write_bytes(b"")
    with pytest.raises(FaultError) as fault:
        read_evidence(folder)
    assert fault.value.code == "EVIDENCE_FILE_EXTRA"
    assert fault.value.file == str(folder / name)


def test_a_file_in_the_mapping_that_does_not_belong_is_a_fault(made) -> None:
    with pytest.raises(FaultError) as fault:
        unpack({**made.files, "x": b""})
    assert (fault.value.code, fault.value.file) == ("EVIDENCE_FILE_EXTRA", "x")


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_only_plain_files_are_evidence(made, tmp_path, kind) -> None:
    folder = write(made, tmp_path / "e")
    path = folder / "leaves.txt"
    if kind == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.unlink()
        path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(FaultError) as fault:
        read_evidence(folder)
    assert (fault.value.code, fault.value.file) == ("EVIDENCE_FILE_KIND", str(path))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda data: data[:-1], -1),  # no newline at the end
        (lambda data: data.replace(b"\n", b"\r\n"), 1),
        (lambda data: b"\xef\xbb\xbf" + data, 1),
        (lambda data: data + b"\n", 0),  # an empty line more
        (lambda data: b"\n" + data, 1),
        (lambda data: data + b" ", 0),
    ],
    ids=["no-newline", "crlf", "bom", "empty-last", "empty-first", "blank-after"],
)
def test_the_form_of_lines_is_strict(made, tmp_path, name, change, line) -> None:
    folder = write(made, tmp_path / "e")
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(change(data))
    with pytest.raises(FaultError) as fault:
        read_evidence(folder)
    count = data.count(b"\n")
    assert fault.value.code == "EVIDENCE_LINE"
    assert fault.value.file == str(folder / name)
    assert fault.value.field == f"line {line if line > 0 else count + 1 + line}"


def test_a_file_too_large_is_a_fault(made, tmp_path, monkeypatch) -> None:
    folder = write(made, tmp_path / "e")
    monkeypatch.setattr("fedpact_contract.evidence.MAX_FILE_BYTES", 100)
    with pytest.raises(FaultError) as fault:
        read_evidence(folder)
    assert fault.value.code == "EVIDENCE_FILE_SIZE"
