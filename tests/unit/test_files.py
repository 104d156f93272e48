"""Files that are their owner's alone, and folders that appear whole."""

import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedpact_contract.errors import InputError
from fedpact_contract.files import make_home, private_files, refuse_existing, replace_file, write_new


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_made_meanwhile_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        with private_files():
            (tmp_path / "file").touch()
            (tmp_path / "folder").mkdir()
        (tmp_path / "later").touch()
    finally:
        os.umask(before)
    assert [mode(tmp_path / name) for name in ("file", "folder", "later")] == [0o600, 0o700, 0o664]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o644)
    replace_file(path, b"new")
    assert (path.read_bytes(), mode(path)) == (b"new", 0o600)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [2, 5])
def test_of_several_that_make_one_home_one_wins(tmp_path: Path, number: int) -> None:
    """All of them found the place free before the first moved in."""
    together = threading.Barrier(number)

    def one(who: int) -> str:
        def fill(build: Path) -> None:
            (build / "who").write_text(str(who))
            together.wait(10)

        try:
            make_home(tmp_path / "home", fill)
        except InputError as err:
            return err.code
        return str(who)

    with ThreadPoolExecutor(number) as pool:
        ends = list(pool.map(one, range(number)))
    assert ends.count("HOME_EXISTS") == number - 1
    assert (tmp_path / "home" / "who").read_text() in ends
    assert [path.name for path in tmp_path.iterdir()] == ["home"], "nothing half-made is left"
    assert mode(tmp_path / "home") == 0o700


def test_a_new_file_takes_no_others_place(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    refuse_existing(path)
    write_new(path, b"1", private=True)
    assert mode(path) == 0o600
    for attempt in (lambda: write_new(path, b"2"), lambda: refuse_existing(path)):
        with pytest.raises(InputError, match="FILE_EXISTS"):
            attempt()
    assert path.read_bytes() == b"1"


@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_what_is_there_is_not_overwritten(tmp_path: Path, there: str) -> None:
    path = tmp_path / "home"
    if there == "file":
        path.write_text("mine")
    elif there == "folder":
        path.mkdir()
        (path / "mine").touch()
    else:
        (tmp_path / "elsewhere").mkdir()
        path.symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="HOME_EXISTS"):
        make_home(path, lambda build: (build / "new").touch())
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_taken_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()

    def fail(_build: Path) -> None:
        raise ValueError

    with pytest.raises(ValueError, match=""):
        make_home(tmp_path / "home", fail)
    assert [path.name for path in tmp_path.rglob("*")] == ["home"]
    make_home(tmp_path / "home", lambda build: (build / "new").touch())
    assert (tmp_path / "home" / "new").exists()
