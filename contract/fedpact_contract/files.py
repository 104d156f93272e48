"""Files and folders that are their owner's alone, written whole and durably: what every home is made of."""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from fedpact_contract.errors import InputError


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """While this lasts, whatever this process and its children make is their owner's alone: umask 077.

    For the whole process, all of its threads: for what a library makes, whose modes are not ours to name.
    """
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a new or renamed file in it keeps its name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """While this lasts, no other process that asks likewise changes a file of this folder: read, change, replace."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _draft(path: Path, data: bytes) -> Iterator[Path]:
    """The data in a file beside its place, on the disk, its owner's alone; gone afterwards."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file in one step, durably, readable by its owner alone; what was there is replaced."""
    with _draft(path, data) as draft:
        draft.replace(path)
    sync_folder(path.parent)


def make_file(path: Path, data: bytes) -> None:
    """The same for a new file: whole or not at all, however it ends (a full disk, kill -9).

    Raises:
        FileExistsError: something is there already; it is not overwritten.
    """
    with _draft(path, data) as draft:
        os.link(draft, path)
    sync_folder(path.parent)


def write_new(path: Path, data: bytes, *, private: bool = False, option: str = "--out") -> None:
    """Write a new file; an existing one is never overwritten. A private one is its owner's alone from the first byte.

    `option` is what names the place on the command line.

    Raises:
        InputError: FILE_EXISTS.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
    except FileExistsError as err:
        raise _exists(path, option) from err
    with os.fdopen(handle, "wb") as out:
        out.write(data)


def refuse_existing(*paths: Path, option: str = "--out") -> None:
    """Before the work is done whose result they would hold; `option` is what names their place.

    Raises:
        InputError: FILE_EXISTS.
    """
    for path in paths:
        if path.exists():
            raise _exists(path, option)


def make_home(path: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder whole or not at all: it is filled beside its place and moved there in one step.

    Of two at once, one finds the other's folder in its place.

    Args:
        path: Where it is to stand; nothing, or an empty folder.
        fill: Fills an empty folder, 0700.

    Raises:
        InputError: HOME_EXISTS.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise _home_exists(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    build = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    build.mkdir(mode=0o700)
    try:
        fill(build)
        _move_in(build, path)
    except BaseException:
        shutil.rmtree(build)
        raise
    sync_folder(path.parent)


def _move_in(build: Path, path: Path) -> None:
    try:
        build.rename(path)  # over an empty folder, never over a full one
    except OSError as err:
        if err.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _home_exists(path) from err
        raise


_THERE = "There is something here already, and it is not overwritten."


def _exists(path: Path, option: str) -> InputError:
    remedy = f"Name another place with {option}, or move this away."
    return InputError("FILE_EXISTS", _THERE, file=path, field=option, remedy=remedy)


def _home_exists(path: Path) -> InputError:
    return InputError("HOME_EXISTS", _THERE, file=path, remedy="Choose another folder with --home.")
