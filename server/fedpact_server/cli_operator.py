"""Command `fedpact init`."""

from pathlib import Path
from typing import Annotated

import typer

from fedpact_contract import output
from fedpact_contract.output import first_line, line
from fedpact_server.cli_common import DEFAULT_HOME, Home, Json, PassphraseFile, read_passphrase


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("init")(init_command)


def init_command(
    name: Annotated[str, typer.Option("--name", help="The operator's name, as contracts print it.")],
    entity_code: Annotated[str, typer.Option("--entity-code", help="Legal-entity code: 18 digits and capitals.")],
    host: Annotated[
        list[str],
        typer.Option("--host", help="DNS name or IP address that agents dial; repeat it. Invitations carry the first."),
    ],
    port: Annotated[int, typer.Option("--port", help="The one port.")] = 8443,
    passphrase_file: PassphraseFile = None,
    database_file: Annotated[
        Path | None,
        typer.Option("--database-file", help="File with an SQLAlchemy URL in its first line; else SQLite in the home."),
    ] = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Make the operator's home: keys, certificate authority, certificate, database. Nothing is ever overwritten.

    Example: fedpact init --home operator --name "City Data" --entity-code 91310000MA1K999999 --host fl.example.cn
    """
    from fedpact_contract.keys import show_fingerprint
    from fedpact_contract.request import utc_now
    from fedpact_server.home import init

    made = init(
        home,
        name=name,
        entity_code=entity_code,
        hosts=tuple(host),
        port=port,
        passphrase=read_passphrase(passphrase_file, new=True),
        now=utc_now(),
        database=None if database_file is None else first_line(database_file, "database").decode("utf-8", "replace"),
    )
    if as_json:
        output.emit_json(
            {
                "home": str(made.path),
                "fingerprint": made.fingerprint,
                "key": made.public_key,
                "name": made.settings.name,
                "entity_code": made.settings.entity_code,
                "url": made.url,
            }
        )
        return
    line(f"The operator's home is {made.path}")
    line(f"Fingerprint  {show_fingerprint(made.fingerprint)}")
    line("Tell it to each enterprise by telephone: its agent compares it with the invitation's.")
    line("Back up the whole folder. Without keys/operator.key and its passphrase no contract can be signed.")
