"""The command `fedpact`: what an auditor installs, and the operator's commands where the extra `server` is.

Server commands come from the entry-point group `fedpact.commands`: each entry point is a function that is given the
typer app and adds its commands; `group(app, "contract")` gives it a group that exists already. They are loaded only
when a command line asks for something that the base does not have, and must import what is heavy on use.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import click
import typer

from fedpact_contract import __version__, output
from fedpact_contract.errors import InputError
from fedpact_contract.group import Group

if TYPE_CHECKING:
    from rich.console import Console

    from fedpact_contract.contract import Contract
    from fedpact_contract.language import Lang
    from fedpact_contract.standalone import Word
    from fedpact_contract.verify import Report

ENTRY_POINTS = "fedpact.commands"
SERVER_MARKS = ("fastapi", "flwr", "sqlalchemy", "torch")
"""Packages of the extra `server`: without any one of them its commands are not offered."""

SERVER_COMMANDS: Mapping[str, tuple[str, ...]] = {
    "": (
        "audit-privacy",
        "demo",
        "evidence",
        "init",
        "model",
        "participant",
        "predict",
        "report",
        "run",
        "serve",
        "settle",
        "union",
    ),
    "contribution": ("alarms", "reevaluate", "retrain", "review", "show"),
    "contract": ("list", "new", "offer", "show", "sign", "status", "template", "terminate"),
}
"""Group -> commands that only the extra `server` has; "" is the top."""

_SHOWN = 20  # faults that the text shows


class FedpactGroup(Group):
    """A group that names the missing extra when it is asked for a server command that is not installed."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, but for server commands of a base install.

        Raises:
            InputError: EXTRA_MISSING.
        """
        name = args[0] if args else ""
        place = "" if ctx.parent is None else ctx.info_name or ""
        if self.get_command(ctx, name) is None and name in SERVER_COMMANDS.get(place, ()):
            command = f"{place} {name}".strip()
            extra = "demo" if command == "demo" else "server"
            raise output.extra_missing(f"`fedpact {command}` is not in the base install.", extra)
        return super().resolve_command(ctx, args)


Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]
Language = Annotated[
    Literal["en", "zh"] | None,
    typer.Option("--lang", help="The language of the document.", show_default="FEDPACT_LANG, else the locale's"),
]
Document = Annotated[
    Path | None,
    typer.Option("--out", help="Write the document to this new file, .html or text, to print it.", metavar="FILE"),
]


def make_app() -> typer.Typer:
    """The app with the commands of the base install."""
    app = output.command_line("Federated learning governed by one signed contract.", FedpactGroup)
    app.callback()(_root)
    app.command("verify")(verify_command)
    contribution = output.command_line("What each participant contributed.", FedpactGroup)
    contribution.command("recompute")(recompute_command)
    contract = output.command_line("The contract that governs a federation.", FedpactGroup)
    contract.command("read")(read_command)
    trust = output.command_line(
        "Whom you know: fingerprints that you learnt from the parties themselves.", FedpactGroup
    )
    trust.command("add")(trust_add_command)
    auditor = output.command_line("The auditor that a contract may name.", FedpactGroup)
    auditor.command("init")(auditor_init_command)
    # A callback keeps typer from folding a group of one command into that command.
    groups = {"auditor": auditor, "contribution": contribution, "contract": contract, "trust": trust}
    for name, sub in groups.items():
        sub.callback()(_nothing)
        app.add_typer(sub, name=name)
    return app


def group(app: typer.Typer, name: str, help_text: str = "") -> typer.Typer:
    """The group of this name in the app: the one that exists, or a new one."""
    for info in app.registered_groups:
        if info.name == name and info.typer_instance is not None:
            return info.typer_instance
    new = output.command_line(help_text, FedpactGroup)
    new.callback()(_nothing)
    app.add_typer(new, name=name)
    return new


def load_commands(app: typer.Typer) -> None:
    """Let the installed entry points add their commands; none where the extra `server` is not there."""
    if any(find_spec(mark) is None for mark in SERVER_MARKS):
        return
    from importlib.metadata import entry_points

    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda p: p.name):
        if find_spec(point.module.partition(".")[0]) is None or find_spec(point.module) is None:
            continue
        register: Callable[[typer.Typer], None] = point.load()
        register(app)


def main() -> NoReturn:
    """The entry point of `fedpact`."""

    def program() -> object:
        app = make_app()
        if not _base_alone(sys.argv[1:]):
            load_commands(app)
        return app(standalone_mode=False)

    output.run(program)


def _base_alone(arguments: Sequence[str]) -> bool:
    """Whether the base can answer this command line, so that nothing else need be loaded."""
    words = [word for word in arguments if not word.startswith("-")][:2]
    return (
        words[:1] == ["verify"]
        or words in (["auditor", "init"], ["contribution", "recompute"], ["contract", "read"], ["trust", "add"])
        or (not words and "--version" in arguments)
    )


def _nothing() -> None:
    pass


def _version(value: bool) -> None:
    if value:
        typer.echo(f"fedpact {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


def verify_command(
    evidence: Annotated[Path, typer.Argument(metavar="EVIDENCE")],
    trust: Annotated[Path | None, typer.Option("--trust", help="Whom you know: fingerprints, as TOML.")] = None,
    reevaluation: Annotated[
        Path | None, typer.Option("--reevaluation", help="The auditor's, where it does not lie in EVIDENCE.")
    ] = None,
    contract: Annotated[
        Path | None, typer.Option("--contract", help="The signed contract, where EVIDENCE is one record outside a log.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Recompute everything in the folder EVIDENCE, offline, and say on whose word the rest stands.

    With --contract, EVIDENCE is the file of one signed record, which an agent keeps: that the operator was silent, or
    what was destroyed at a withdrawal.

    Exit codes: 0 verified and authenticated; 1 a fault; 3 not authenticated (no --trust); 4 partly authenticated.
    """
    from fedpact_contract.standalone import Word, verify_record
    from fedpact_contract.trust import Trust
    from fedpact_contract.verify import verify_folder

    known = None if trust is None else Trust.read(trust)
    if contract is None and evidence.is_file():
        raise InputError(
            "RECORD_CONTRACT",
            "One record alone is verified with the contract that everybody signed.",
            file=evidence,
            field="--contract",
            remedy="Give its file, which an agent keeps beside the record, or the folder of evidence in place of both.",
        )
    report: Report | Word
    if contract is None:
        report = verify_folder(evidence, known, record=reevaluation)
    elif reevaluation is None:
        report = verify_record(evidence, contract, known)
    else:
        raise InputError(
            "RECORD_REEVALUATION",
            "A re-evaluation is of a whole run, not of one record.",
            field="--reevaluation",
            remedy="Give it with the folder of evidence, without --contract.",
        )
    if as_json:
        output.emit_json(report.as_dict())
    elif isinstance(report, Word):
        _show_word(report)
    else:
        _show_report(report)
    raise typer.Exit(report.exit_code)


def recompute_command(
    table: Annotated[Path, typer.Argument(metavar="TABLE.json")],
    as_json: Json = False,
) -> None:
    """Recompute Shapley and Banzhaf values from TABLE.json, a game's values by coalition: as fractions and decimals.

    Fractions are exact; decimals have nine places, half to even. With --json: the fractions.
    """
    from fedpact_contract.record import ratio_text
    from fedpact_contract.shapley import recompute

    result = recompute(table.read_bytes(), file=table)
    if as_json:
        output.emit_json(result)
        return
    kinds = (result["shapley"], result["banzhaf"])
    cells = {player: [of[player] for of in kinds] for player in result["shapley"]}
    rows = [[player, *exact, *(ratio_text(Fraction(value), 9) for value in exact)] for player, exact in cells.items()]
    columns = ["player", "Shapley, exact", "Banzhaf, exact", "Shapley, decimal", "Banzhaf, decimal"]
    output.table(output.console(), columns, rows, right=(1, 2, 3, 4))


def read_command(
    file: Annotated[Path, typer.Argument(metavar="FILE")],
    lang: Language = None,
    out: Document = None,
    as_json: Json = False,
) -> None:
    """Print the id of the contract in FILE (TOML, JSON, or signed), its parties' fingerprints, and every field.

    With --lang or --out: the document for people, clause by clause, in place of the fields.

    Example: fedpact contract read heart.json --lang zh --out heart.html
    """
    from fedpact_contract.contract_file import read_contract

    contract, signed_by = read_contract(file)
    if out is not None:
        write_document(out, contract, lang)
    if as_json:
        output.emit_json({"contract_id": contract.id, "contract": contract.plain(), "signed_by": signed_by})
        return
    if out is None:
        _show_contract(output.console(), contract, signed_by, lang)


def write_document(path: Path, contract: "Contract", lang: "Lang | None") -> None:
    """Write the contract's document to a new file: a page where it ends in .html, else text.

    Raises:
        InputError: FILE_EXISTS.
    """
    from fedpact_contract.files import write_new
    from fedpact_contract.language import language
    from fedpact_contract.text import page, render

    make = page if path.suffix == ".html" else render
    write_new(path, make(contract, language(lang)).encode())
    output.error_console().print(output.visible(str(path)), soft_wrap=True)


def trust_add_command(
    file: Annotated[Path, typer.Argument(metavar="TRUST.toml")],
    role: Annotated[Literal["operator", "participant", "auditor"], typer.Option("--role", help="What the party is.")],
    name: Annotated[str, typer.Option("--name", help="Its name.")],
    entity_code: Annotated[str, typer.Option("--entity-code", help="Its legal-entity code.")],
    fingerprint: Annotated[
        str, typer.Option("--fingerprint", help="Of its key, as the party itself told you: by telephone, on paper.")
    ],
    as_json: Json = False,
) -> None:
    """Enter a party in the file TRUST.toml, which is made where there is none. Never copy a fingerprint from evidence.

    Example: fedpact trust add trust.toml --role operator --name "City Data" --entity-code 91310000MA1K999999
    --fingerprint "3f2a 91c0 ..."
    """
    from fedpact_contract.trust import TrustedParty, add_party

    values = {"role": role, "name": name, "entity_code": entity_code, "fingerprint": fingerprint}
    party = TrustedParty.parse(values, code="TRUST_PARTY")
    add_party(file, party)
    if as_json:
        output.emit_json({"file": str(file.absolute())} | party.plain())
    else:
        output.line(f"{party.role} {party.name} ({party.entity_code}) is in {file}")


def auditor_init_command(
    auditor: Annotated[Path, typer.Argument(metavar="AUDITOR", help="A new folder.")],
    name: Annotated[str, typer.Option("--name", help="The auditor's name, as contracts print it.")],
    entity_code: Annotated[str, typer.Option("--entity-code", help="Legal-entity code: 18 digits and capitals.")],
    passphrase_file: Annotated[
        Path | None,
        typer.Option("--passphrase-file", help="File with the passphrase in its first line; without it you are asked."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make the auditor's keys: one signs re-evaluations, one opens the validation rows deposited for it.

    Example: fedpact auditor init auditor --name "Audit House" --entity-code 91310000MA1AUDT001
    """
    from fedpact_contract.auditor import CARD, card_text, init
    from fedpact_contract.keys import show_fingerprint

    home = init(
        auditor,
        name=name,
        entity_code=entity_code,
        passphrase=output.read_passphrase(passphrase_file, "the auditor's keys", new=True),
    )
    if as_json:
        output.emit_json({"home": str(home.path), "fingerprint": home.party.id} | home.party.plain())
        return
    output.line(f"The auditor's home is {home.path}")
    output.line(f"Fingerprint of both keys  {show_fingerprint(home.party.id)}")
    output.line("Tell it to each party by telephone: contracts print it, and trust files hold it.")
    output.line(f"Send {CARD} to the operator, for the contract's template:")
    output.line(card_text(home.party).rstrip())
    output.line("Back up the whole folder. Without it and its passphrase no deposit opens.")


def _show_contract(console: "Console", contract: "Contract", signed_by: Sequence[str], lang: "Lang | None") -> None:
    """Who the parties are and who has signed; then every field or, where a language is asked for, every clause."""
    from fedpact_contract.keys import show_fingerprint
    from fedpact_contract.text import render

    def line(text: str = "") -> None:
        console.print(output.visible(text), soft_wrap=True)

    line(f"contract {contract.id}")
    line(contract.title)
    for party_id, party in contract.named().items():
        line()
        line(f"{contract.role(party_id)} {party.name}")
        line(f"  entity code  {party.entity_code}")
        line(f"  fingerprint  {show_fingerprint(party_id)}")
        if party is not contract.auditor:
            line(f"  signed       {'yes' if party_id in signed_by else 'no'}")
    line()
    if lang is not None:
        line(render(contract, lang))
        return
    for path, value in _fields(contract.plain()):
        line(f"{path} = {value}")


def _fields(value: Any, path: str = "") -> list[tuple[str, str]]:  # noqa: ANN401 - any JSON value
    """Every leaf of plain values with its path."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _fields(item, f"{path}.{key}" if path else key)]
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return [leaf for place, item in enumerate(value) for leaf in _fields(item, f"{path}.{place}")]
    if isinstance(value, list):
        return [(path, ", ".join(map(str, value)))]
    return [(path, str(value).lower() if isinstance(value, bool) else str(value))]


def _show_report(report: "Report") -> None:
    from fedpact_contract.settlement import format_fen

    line = _lines()
    line(f"contract {report.contract_id or 'unreadable'}")
    if report.title:
        line(report.title)
    line(
        f"{report.status}; {report.entries} {'entry' if report.entries == 1 else 'entries'}, "
        f"{output.counted(report.checkpoints, 'checkpoint')}, "
        f"{output.counted(report.countersignatures, 'countersignature')}; {report.rounds_aggregated or 0} of "
        + (output.counted(report.rounds_planned, "round") if report.rounds_planned else "? rounds")
    )
    if report.pool_fen is not None:
        line(f"pool {format_fen(report.pool_fen, 'en')}, split by {report.basis}")
    if report.participants:
        _show_participants(output.console(), report)
    for note in report.notes:
        line(f"- {note}")
    _show_verdict(line, report)


def _show_word(word: "Word") -> None:
    line = _lines()
    line(f"{word.type}, contract {word.contract_id or 'unreadable'}")
    if word.title:
        line(word.title)
    if word.by:
        line(f"signed by {word.by}")
    for title, sentences in (("It proves:", word.proves), ("It does not prove:", word.leaves_open)):
        if sentences:
            line(title)
        for sentence in sentences:
            line(f"- {sentence}")
    for note in word.notes:
        line(f"- {note}")
    _show_verdict(line, word)


def _lines() -> Callable[..., None]:
    """Writes lines whose text comes from elsewhere, in a style."""
    from rich.text import Text

    console = output.console()

    def line(text: str, style: str = "") -> None:
        console.print(Text(output.visible(text), style), soft_wrap=True)

    return line


def _show_verdict(line: Callable[..., None], report: "Report | Word") -> None:
    for fault in report.faults[:_SHOWN]:
        places = ", ".join(f"{name} {fault[name]}" for name in ("file", "field", "party") if name in fault)
        line(f"{fault['code']}: {fault['message']} ({places})", "red")
    if len(report.faults) > _SHOWN:
        line(f"and {len(report.faults) - _SHOWN} more faults; --json lists them all", "red")
    line(report.verdict, {0: "bold green", 1: "bold red"}.get(report.exit_code, "bold yellow"))


def _show_participants(console: "Console", report: "Report") -> None:
    columns = ["participant", "rounds", "share", "95 % interval", "CNY", "closing", "key"]
    rows = []
    for line in report.participants:
        share = interval = paid = closing = "-"
        if line.share is not None and line.low is not None and line.high is not None:
            share, interval = output.format_share(line.share), output.format_interval(line.low, line.high)
        if line.fen is not None:
            paid = f"{line.fen // 100:,}.{line.fen % 100:02d}"
            closing = "signed" if line.countersigned else "held" if line.held_fen else "-"
        known = "known" if line.authenticated else "unknown"
        rows.append([line.name, str(line.rounds_admitted), share, interval, paid, closing, known])
    output.table(console, columns, rows, right=(1, 2, 3, 4))
    if report.interval:
        console.print(f"interval: {report.interval}; {output.OUTWARD}")
