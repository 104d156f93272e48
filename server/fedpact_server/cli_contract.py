"""Commands `fedpact contract …` of the operator."""

import datetime
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpact_contract import output
from fedpact_contract.cli import Document, Language, group, write_document
from fedpact_contract.files import refuse_existing, write_new
from fedpact_contract.output import counted, line
from fedpact_server.cli_common import (
    DEFAULT_HOME,
    ColumnNames,
    Delimiter,
    Home,
    Json,
    Kind,
    Missing,
    PassphraseFile,
    Table,
    Yes,
    open_home,
    read_passphrase,
    read_text,
    split_names,
)

if TYPE_CHECKING:
    from fedpact_contract.contract import Contract
    from fedpact_server.contracts import Status
    from fedpact_server.drafting import ValidationFile

Selector = Annotated[str, typer.Argument(help="A contract: its id, or the beginning of it.", metavar="CONTRACT")]


def register(app: typer.Typer) -> None:
    """Add to the group."""
    contract = group(app, "contract")
    contract.command("template")(template_command)
    contract.command("new")(new_command)
    contract.command("offer")(offer_command)
    contract.command("sign")(sign_command)
    contract.command("show")(show_command)
    contract.command("status")(status_command)
    contract.command("list")(status_command)  # as the agent's is called
    contract.command("terminate")(terminate_command)


def template_command(
    out: Annotated[Path | None, typer.Option("--out", help="A new file; without it to stdout.")] = None,
) -> None:
    """Write the template of a contract, documented key by key, to be filled in; its term is a year from today.

    Example: fedpact contract template --out heart.toml
    """
    from importlib.resources import files

    from fedpact_contract.request import utc_now

    text = files("fedpact_server").joinpath("templates/contract.toml").read_text("utf-8")
    now = utc_now()
    for key, date in (("not_before", now), ("not_after", now + datetime.timedelta(days=365))):
        text = re.sub(f'(?m)^{key} = ".{{10}}', f'{key} = "{date:%Y-%m-%d}', text)
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_new(out, text.encode())
        line(f"{out}: fill it in, then: fedpact contract new {out}")


def new_command(
    template: Annotated[Path, typer.Argument(help="What people decide, as TOML.", metavar="TEMPLATE")],
    validation: Annotated[
        Path | None, typer.Option("--validation", help="The operator's validation rows; they never leave it.")
    ] = None,
    buyer_validation: Annotated[
        Path | None,
        typer.Option("--buyer-validation", help="Validation rows that the contract's buyer gave; read the same way."),
    ] = None,
    kind: Annotated[Kind, typer.Option("--kind", help="What these files are.")] = "csv",
    table: Table = None,
    column_names: ColumnNames = None,
    delimiter: Delimiter = ",",
    missing: Missing = None,
    released: Annotated[
        bool, typer.Option("--released", help="Also take the validation rows that participants released.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="A new file for the contract's canonical bytes.")] = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Make a draft contract from a template: works out the noise, commits to the validation rows, makes the model.

    Example: fedpact contract new heart.toml --validation rows.csv
    """
    from fedpact_contract.privacy import plan_words
    from fedpact_contract.record import decimal_text
    from fedpact_contract.request import utc_now
    from fedpact_contract.toml_lines import naming_lines
    from fedpact_server.drafting import new, without_entities

    operator, database = open_home(home)
    if out is not None:
        refuse_existing(out)
    text = read_text(template, "template")
    with naming_lines(text, template):
        contract = new(
            operator,
            database,
            text,
            _validation_file(validation, kind, table, column_names, delimiter, missing),
            now=utc_now(),
            released=released,
            buyer_file=_validation_file(buyer_validation, kind, table, column_names, delimiter, missing),
            file=template,
        )
    if out is not None:
        write_new(out, contract.to_bytes())
    if as_json:
        output.emit_json({"contract_id": contract.id, "state": "draft", "contract": contract.plain()})
        return
    line(f"contract {contract.id} (draft)")
    line(contract.title)
    line(
        f"noise multiplier {decimal_text(contract.privacy.noise_multiplier)} keeps {plan_words(contract)} within "
        f"epsilon {decimal_text(contract.privacy.epsilon)} at delta {decimal_text(contract.privacy.delta)}"
    )
    if (entity := contract.privacy.entity) is not None:
        line(
            f"all rows of one entity, at most {entity.max_rows}: epsilon {decimal_text(entity.epsilon)} at delta "
            f"{decimal_text(entity.delta)}"
        )
    names = {party_id: party.name for party_id, party in contract.parties().items()}
    names |= {"operator": "the operator", "buyer": "the buyer"}
    slices = contract.contribution.validation.slices
    line("validation " + ", ".join(f"{counted(s.count, 'row')} of {names[s.source]}" for s in slices))
    line(f"term {contract.term.not_before} to {contract.term.not_after}")
    _warn_of_term(contract)
    for name, column in without_entities(database, contract):
        typer.echo(
            f"Note: the card of {output.visible(name)} says whose a row is ({output.visible(column)}): its agent signs "
            "nothing without [privacy.entity] unless its policy says require_entity = false.",
            err=True,
        )
    line(f"Read it: fedpact contract show {contract.id[:8]}; then: fedpact contract offer {contract.id[:8]}")


def offer_command(contract: Selector, home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """Show a draft to the participants that it names, for signature. Example: fedpact contract offer 3f2a91c0."""
    from fedpact_contract.request import utc_now
    from fedpact_server import contracts

    _, database = open_home(home)
    status = contracts.offer(database, contract, now=utc_now())
    with database.read() as connection:
        offered = contracts.find(connection, status.id).contract
    _show(status, as_json=as_json)
    if not as_json:
        _warn_of_term(offered)


def sign_command(
    contract: Selector,
    yes: Yes = False,
    passphrase_file: PassphraseFile = None,
    home: Home = DEFAULT_HOME,
    lang: Language = None,
    as_json: Json = False,
) -> None:
    """Read an offered contract in full, then sign it and delegate a run key for it.

    Example: fedpact contract sign 3f2a91c0
    """
    from fedpact_contract.language import language
    from fedpact_contract.request import utc_now
    from fedpact_contract.text import render
    from fedpact_server import contracts

    operator, database = open_home(home)
    with database.read() as connection:
        found = contracts.signable(connection, contract, utc_now())
    if not (yes and as_json):
        typer.echo(render(found, language(lang)), err=as_json)
    output.confirm(f"Sign this contract as {operator.settings.name}?", yes=yes)
    passphrase = read_passphrase(passphrase_file)
    _show(contracts.sign(operator, database, found.id, passphrase, now=utc_now()), as_json=as_json)


def show_command(
    contract: Selector,
    home: Home = DEFAULT_HOME,
    lang: Language = None,
    out: Document = None,
    as_json: Json = False,
) -> None:
    """Print a contract as a document, clause by clause. Example: fedpact contract show 3f2a91c0 --lang zh."""
    from fedpact_contract.language import language
    from fedpact_contract.text import render
    from fedpact_server import contracts

    _, database = open_home(home)
    with database.read() as connection:
        stored = contracts.find(connection, contract)
    if out is not None:
        write_document(out, stored.contract, lang)
    if as_json:
        plain = stored.contract.plain()
        output.emit_json({"contract_id": stored.contract.id, "state": stored.state, "contract": plain})
    elif out is None:
        typer.echo(render(stored.contract, language(lang)), nl=False)


def status_command(
    contract: Annotated[str | None, typer.Argument(help="A contract; without one all are listed.")] = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Show who has signed a contract and whose signature is missing; without a contract, list all.

    Example: fedpact contract status
    """
    from fedpact_server import contracts

    _, database = open_home(home)
    with database.read() as connection:
        stored = contracts.every(connection) if contract is None else [contracts.find(connection, contract)]
        found = [contracts.status(connection, item) for item in stored]
    if contract is not None:
        _show(found[0], as_json=as_json)
    elif as_json:
        output.emit_json({"contracts": [status.plain() for status in found]})
    else:
        rows = [[s.id[:16], s.title, s.state, f"{len(s.signed)} of {len(s.parties)}"] for s in found]
        output.table(output.console(), ["contract", "title", "state", "signed"], rows)


def terminate_command(contract: Selector, yes: Yes = False, home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """End a contract for good: nothing more is signed or trained under it; its log and what was earned stay.

    Example: fedpact contract terminate 3f2a91c0
    """
    from fedpact_contract.request import utc_now
    from fedpact_server import contracts

    _, database = open_home(home)
    with database.read() as connection:
        found = contracts.find(connection, contract).contract
    output.confirm(f"End {found.title} ({found.id[:8]}) for good?", yes=yes)
    _show(contracts.terminate(database, found.id, now=utc_now()), as_json=as_json)


def _validation_file(
    path: Path | None,
    kind: Kind,
    table: str | None,
    column_names: str | None,
    delimiter: str,
    missing: list[str] | None,
) -> "ValidationFile | None":
    from fedpact_server.drafting import ValidationFile

    if path is None:
        return None
    return ValidationFile(
        path=path,
        kind=kind,
        table=table,
        column_names=split_names(column_names),
        delimiter=delimiter,
        missing=tuple(missing or ()),
    )


def _warn_of_term(contract: "Contract") -> None:
    """Say on stderr that no run can begin yet: nobody notices it else before everybody has signed."""
    from fedpact_contract.request import instant, utc_now

    begins = contract.term.not_before
    if begins > instant(utc_now()):
        typer.echo(f"Note: the term begins at {begins}; until then no run starts (key term.not_before).", err=True)


def _show(status: "Status", *, as_json: bool) -> None:
    if as_json:
        output.emit_json(status.plain())
        return
    line(f"contract {status.id} ({status.state})")
    line(status.title)
    rows = [[p.name, p.entity_code, "signed" if i in status.signed else "missing", i[:16]] for i, p in status.parties]
    output.table(output.console(), ["party", "entity code", "signature", "id"], rows)
