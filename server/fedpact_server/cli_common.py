"""What the operator's commands share: options, passphrases, files that are never overwritten."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedpact_contract import output
from fedpact_contract.errors import InputError

if TYPE_CHECKING:
    from fedpact_contract.contract import Contract, Participant
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
Kind = Literal["csv", "parquet", "sqlite", "ndjson", "arrow"]
Table = Annotated[str | None, typer.Option("--table", help="The table, for sqlite.")]
ColumnNames = Annotated[
    str | None, typer.Option("--column-names", help="Names for a CSV file without a header: a,b,c.")
]
Delimiter = Annotated[str, typer.Option("--delimiter", help="Between the cells of a CSV file.")]
Missing = Annotated[
    list[str] | None, typer.Option("--missing", help='A marker for a missing value, such as "?"; repeat it.')
]


def split_names(column_names: str | None) -> tuple[str, ...] | None:
    """The names in --column-names."""
    return None if column_names is None else tuple(name.strip() for name in column_names.split(","))


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


def find_participant(contract: "Contract", selector: str, *, field: str) -> "Participant":
    """The one participant of a contract that is called so: by its name, or its id or the beginning of it.

    Raises:
        InputError: PARTICIPANT_UNKNOWN.
    """
    found = [p for p in contract.participants if selector and (selector == p.name or p.id.startswith(selector))]
    if len(found) != 1:
        known = ", ".join(f"{p.name} ({p.id[:12]})" for p in contract.participants)
        raise InputError(
            "PARTICIPANT_UNKNOWN",
            f"{'No participant' if not found else 'More than one participant'} of the contract is called {selector}.",
            field=field,
            party=selector or None,
            remedy=f"Name one of: {known}.",
        )
    return found[0]


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
