"""What the operator's commands share: options, passphrases, files that are never overwritten."""

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


def read_passphrase(file: Path | None, *, new: bool = False) -> bytes:
    """The passphrase of the operator's key (`output.read_passphrase`)."""
    return output.read_passphrase(file, "the operator's key", new=new)


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
