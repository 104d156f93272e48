"""What the operator's commands share: options, passphrases, files that are never overwritten."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpact_contract import output
from fedpact_contract.errors import InputError

if TYPE_CHECKING:
    from fedpact_server.db import Database
    from fedpact_server.home import OperatorHome

DEFAULT_HOME = Path("operator")
Home = Annotated[Path, typer.Option("--home", envvar="FEDPACT_HOME", help="The operator's home folder.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
PassphraseFile = Annotated[
    Path | None,
    typer.Option("--passphrase-file", help="File with the passphrase in its first line; without it you are asked."),
]


def open_home(path: Path) -> "tuple[OperatorHome, Database]":
    """The operator's home and its database, both checked.

    Raises:
        InputError, FailedError, ServiceError: as `OperatorHome.open` and `database`.
    """
    import logging

    from fedpact_server.home import OperatorHome
    from fedpact_server.logs import configure_logging

    configure_logging(level=logging.ERROR)  # a command says itself what it did
    home = OperatorHome.open(path)
    return home, home.database()


def line(text: str = "") -> None:
    """One line on stdout; characters that could steer a terminal are made visible."""
    output.console().print(output.visible(text), soft_wrap=True)


def read_passphrase(file: Path | None, *, new: bool = False) -> bytes:
    """The passphrase, from a file or asked for; a new one is asked for twice. Never from argv or the environment.

    Raises:
        InputError: PASSPHRASE_NEEDED, nobody can be asked; or as `first_line`.
    """
    if file is not None:
        return first_line(file, "passphrase")
    if not sys.stdin.isatty():
        raise InputError(
            "PASSPHRASE_NEEDED",
            "A passphrase is needed, and there is no terminal to ask for it.",
            remedy="Give --passphrase-file FILE (mode 600).",
        )
    text: str = typer.prompt("Passphrase of the operator's key", hide_input=True, confirmation_prompt=new, err=True)
    return text.encode()


def first_line(path: Path, what: str) -> bytes:
    """The first line of a file that holds a secret.

    Raises:
        InputError: SECRET_FILE, missing, unreadable or empty; SECRET_FILE_MODE, readable by others.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise InputError(
                "SECRET_FILE_MODE", f"Others can read the {what} file.", file=path, remedy=f"Run: chmod 600 {path}"
            )
        found = path.read_bytes().split(b"\n", 1)[0].rstrip(b"\r")
    except OSError as err:
        raise InputError("SECRET_FILE", f"The {what} file cannot be read: {err.strerror}.", file=path) from err
    if not found:
        raise InputError("SECRET_FILE", f"The first line of the {what} file is empty.", file=path)
    return found


def read_text(path: Path, what: str) -> str:
    """A file's text.

    Raises:
        InputError: FILE_MISSING, FILE_ENCODING.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except (FileNotFoundError, IsADirectoryError) as err:
        raise InputError("FILE_MISSING", f"There is no {what} here.", file=path, remedy="Correct the path.") from err
    except UnicodeDecodeError as err:
        raise InputError("FILE_ENCODING", f"The {what} is not UTF-8 text.", file=path) from err


def write_new(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write a new file; an existing one is never overwritten.

    Raises:
        InputError: FILE_EXISTS.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
    except FileExistsError as err:
        raise InputError(
            "FILE_EXISTS", "There is a file here already, and it is not overwritten.", file=path, remedy="Name another."
        ) from err
    with os.fdopen(handle, "wb") as out:
        out.write(data)
