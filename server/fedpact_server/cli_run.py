"""Commands `fedpact run …` and `fedpact settle …`."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpact_contract import output
from fedpact_contract.cli import group
from fedpact_server.cli_common import DEFAULT_HOME, Home, Json, Yes, open_home

if TYPE_CHECKING:
    from fedpact_contract.contract import Contract
    from fedpact_server.db import Database
    from fedpact_server.home import OperatorHome
    from fedpact_server.noise_floor import NoiseFloor
    from fedpact_server.runs import RunStatus

RUN = Annotated[str, typer.Argument(help="A run, or its contract: id or its beginning.", metavar="RUN")]
Unopened = Annotated[
    bool, typer.Option("--unopened", help="The scores are lost: the contract's fallback; no agent signs it by itself.")
]
FOLLOW_SECONDS = 0.3
SHORT = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What a command works on: the operator's home and database, a contract, and the contract's state."""

    operator: "OperatorHome"
    database: "Database"
    contract: "Contract"
    state: str

    def status(self) -> "RunStatus":
        """Where the contract's run stands now."""
        from fedpact_server import runs

        with self.database.read() as connection:
            return runs.status(connection, self.contract)


def register(app: typer.Typer) -> None:
    """Add the groups `run` and `settle`."""
    run = group(app, "run", "A contract's one run.")
    run.command("start")(start_command)
    run.command("status")(status_command)
    run.command("follow")(follow_command)
    for name, wanted, what in (
        ("pause", "pause", "Pause a run; nothing is lost."),
        ("resume", "run", "Go on with a paused run."),
    ):
        run.command(name, help=what)(_wanting(wanted))
    run.command("stop")(stop_command)
    settle = group(app, "settle", "From scores to money.")
    settle.command("preview")(preview_command)
    settle.command("close")(close_command)
    settle.command("statement")(statement_command)


def start_command(run: RUN, home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """Start the run of a contract that everybody has signed. Example: fedpact run start 3f2a91."""
    from fedpact_server import runs

    at = open_contract(home, run)
    with at.database.write() as connection:
        found = runs.start(connection, at.contract, at.state)
    _show(found, at, as_json=as_json)


def status_command(run: RUN, home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """Show where a run stands: round, phase, what became of each order, where the time went.

    The noise floor: the energy of each participant's last updates over that of the contracted noise alone.

    Where the contract has defences also alarms, exclusions, unions and the review, and what is to be done.
    """
    from fedpact_server import pool
    from fedpact_server.cli_defences import shown

    at = open_contract(home, run)
    found = at.status()
    with at.database.read() as connection:
        noise = pool.standing(connection, at.contract, at.operator.path / "arrays" / at.contract.id)
        values, lines = shown(connection, at.contract, found)
    told = {"noise_floor": {party: floor.plain() for party, floor in noise.items()}} | values
    _show(found, at, as_json=as_json, noise=noise, told=told)
    if not as_json:
        for text in lines:
            output.line(text)


def stop_command(
    run: RUN,
    unscored: Annotated[
        bool,
        typer.Option("--unscored", help="What makes the scores is lost, with no backup. Every verification says so."),
    ] = False,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Stop a run for good; what was done stays in the log and can be settled."""
    _want("unscored" if unscored else "stop", run, home, as_json=as_json)


def _wanting(wanted: str) -> Any:  # noqa: ANN401 - a typer command
    def command(run: RUN, home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
        _want(wanted, run, home, as_json=as_json)

    return command


def _want(wanted: str, run: str, home: Path, *, as_json: bool) -> None:
    from fedpact_server import runs

    at = open_contract(home, run)
    with at.database.write() as connection:
        found = runs.want(connection, at.contract, wanted)
    _show(found, at, as_json=as_json)


def follow_command(
    run: RUN,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
    seconds: Annotated[float, typer.Option(help="Give up after so long; 0 waits for ever.")] = 0.0,
) -> None:
    """Watch a run until it is completed (exit 0) or stopped (exit 1)."""
    from fedpact_contract.errors import FailedError

    begun = time.monotonic()
    at = open_contract(home, run)
    found, contract = at.status(), at.contract
    view = None if as_json else _live(contract)
    try:
        while found.phase == "running":
            if seconds and time.monotonic() - begun > seconds:
                raise FailedError("RUN_SLOW", f"The run is not completed after {seconds:g} seconds: {found.detail}.")
            if view is not None:
                view.update(_table(found, contract, time.monotonic() - begun))
            time.sleep(FOLLOW_SECONDS)
            found = at.status()
        if view is not None:
            view.update(_table(found, contract, time.monotonic() - begun))
    finally:
        if view is not None:
            view.stop()
    if found.phase == "stopped":
        raise FailedError(
            "RUN_STOPPED",
            f"The run stopped: {found.detail or 'by the operator'}.",
            remedy="`fedpact run status` shows what became of each order.",
        )
    if as_json:
        output.emit_json(found.plain())


def preview_command(
    run: RUN,
    revenue: Annotated[str, typer.Option("--revenue", help="Revenue in yuan, like 1000000.00.")],
    fees: Annotated[str, typer.Option("--fees", help="Fees and taxes in yuan.")] = "0",
    unopened: Unopened = False,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Show what a settlement would pay, and whether it waits for a review or was made before; nothing is recorded.

    A stopped run pays for its committed rounds.
    """
    from fedpact_contract.questions import review_due
    from fedpact_contract.settlement import format_fen, parse_yuan
    from fedpact_server import closing, defences

    revenue_fen, fees_fen = parse_yuan(revenue, field="--revenue"), parse_yuan(fees, field="--fees")
    at = open_contract(home, run)
    with at.database.read() as connection:
        result = closing.preview(connection, at.contract, revenue_fen, fees_fen, unopened=unopened)
        waits = defences.waits_for_review(connection, at.contract, review_due(at.contract, result.shares))
        done = closing.recorded(connection, at.contract.id)
    waits = None if done is not None else waits
    more = {"review_due": waits is not None, "settled": done is not None}
    _show_result(result, at.contract, as_json=as_json, more=more)
    if done is not None:
        amounts = f"revenue {format_fen(done.revenue_fen, 'en')}, fees {format_fen(done.fees_fen, 'en')}"
        other = (done.revenue_fen, done.fees_fen) != (revenue_fen, fees_fen)
        also = " These are other amounts: nothing of it will be paid." if other else ""
        typer.echo(f"This period is settled already: {amounts}.{also} `fedpact settle statement` shows it.", err=True)
    if waits is not None:
        for text in ("`fedpact settle close` waits for a review.", waits.message, waits.remedy):
            typer.echo(output.visible(text), err=True)


def close_command(
    run: RUN,
    revenue: Annotated[str, typer.Option("--revenue", help="Revenue in yuan, like 1000000.00.")],
    fees: Annotated[str, typer.Option("--fees", help="Fees and taxes in yuan.")] = "0",
    unopened: Unopened = False,
    wait: Annotated[float, typer.Option("--wait", help="Wait so many seconds for countersignatures.")] = 60.0,
    yes: Yes = False,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Open the scores, record revenue and settlement, and wait for the paid participants' countersignatures.

    It cannot be taken back, so a person at a terminal is asked first, with the amounts.

    Exit 0: final for everybody. Exit 4: recorded, but lines are held until their participants countersign; the same
    command again waits for them. Exit 5: negative values ask for a review (`fedpact contribution review`).
    """
    from fedpact_contract.settlement import format_fen, parse_yuan
    from fedpact_server import closing

    revenue_fen, fees_fen = parse_yuan(revenue, field="--revenue"), parse_yuan(fees, field="--fees")
    at = open_contract(home, run)
    database, contract = at.database, at.contract
    if sys.stdin.isatty():
        with database.read() as connection:
            yes = yes or closing.recorded(connection, contract.id) is not None
        amounts = f"revenue {format_fen(revenue_fen, 'en')}, fees {format_fen(fees_fen, 'en')}"
        output.confirm(f"Settle {contract.title} ({contract.id[:8]}) for good: {amounts}?", yes=yes)
    with database.write() as connection:
        key = at.operator.run_key(contract.id)
        result = closing.settle(connection, contract, key, revenue_fen, fees_fen, unopened=unopened)
    begun, said = time.monotonic(), None
    while True:
        with database.read() as connection:
            state = closing.closing_state(connection, contract)
            objected = closing.objections(connection, contract.id)
        if not state.held or set(state.held) <= set(objected) or time.monotonic() - begun > wait:
            break
        if state.held != said:
            names = ", ".join(output.visible(p.name) for p in contract.participants if p.id in state.held)
            first = "Recorded. " if said is None else ""
            if said is None and not at.operator.served:
                first += "No agent can be reached now: start `fedpact serve`. "
            typer.echo(f"{first}Waiting up to {wait:g} s for the countersignatures of {names}.", err=True)
            said = state.held
        time.sleep(FOLLOW_SECONDS)
    _show_result(result, contract, as_json=as_json, held=state.held, objected=objected, closed=True)
    if state.held:
        raise typer.Exit(4)


def statement_command(
    run: RUN,
    participant: Annotated[str, typer.Argument(help="The participant: id or its beginning, or name.")],
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Print one participant's statement, JSON either way: with all that it takes to recompute each fen by hand."""
    import json

    from fedpact_contract.errors import InputError
    from fedpact_contract.report import settled
    from fedpact_contract.settlement import statement
    from fedpact_server import logbook
    from fedpact_server.cli_common import find_participant

    at = open_contract(home, run)
    with at.database.read() as connection:
        entries = logbook.read_entries(connection, at.contract.id)
    result = settled([entry.open() for entry in entries], at.contract)
    if result is None:
        raise InputError("SETTLE_NOT_CLOSED", "This run is not settled.", remedy="Run `fedpact settle close`.")
    lines = statement(result, at.contract, find_participant(at.contract, participant, field="PARTICIPANT").id)
    if as_json:
        output.emit_json(lines)
    else:
        output.console().print(output.visible(json.dumps(lines, ensure_ascii=False, indent=1)), soft_wrap=True)


def open_contract(home: Path, selector: str) -> Opened:
    """The home, its database, and the one contract that is meant.

    Raises:
        InputError, FailedError, ServiceError: as `open_home` and `contracts.find`.
    """
    from fedpact_server import contracts, runs

    operator, database = open_home(home)
    with database.read() as connection:
        stored = contracts.find(connection, runs.contract_selector(selector))
    return Opened(operator=operator, database=database, contract=stored.contract, state=stored.state)


WANTED = {
    "pause": "Pause: within seconds, in the middle of a round if need be. `fedpact run resume` goes on where it stood.",
    "stop": "Stop: within seconds, and for good. What was committed can be settled.",
    "unscored": "Stop without scores: within seconds, and for good. It can be settled by the contract's fallback.",
}
"""What becomes of a run that is under way, by what is wanted."""


def _show(
    found: "RunStatus",
    at: Opened,
    *,
    as_json: bool,
    noise: Mapping[str, "NoiseFloor"] | None = None,
    told: Mapping[str, Any] | None = None,
) -> None:
    """The status; `told`: what else the JSON has."""
    served = at.operator.served
    if as_json:
        output.emit_json(found.plain() | {"served": served} | dict(told or {}))
        return
    if found.phase == "running":
        for text in (WANTED.get(found.wanted, ""), "" if served else "Nothing moves now: start `fedpact serve`."):
            if text:
                typer.echo(text, err=True)
    console = output.console()
    console.print(f"{found.run_id}: {found.phase}, wanted {found.wanted}; round {found.round} of {found.rounds}")
    if found.detail:
        console.print(output.visible(found.detail))
    for party in at.contract.participants:
        if party.id in found.standing:
            output.line(_stands(party.name, found.standing[party.id]))
    rows = [
        [party.name, party.id[:SHORT], *found.outcomes[party.id], _noise((noise or {}).get(party.id))]
        for party in at.contract.participants
        if party.id in found.outcomes
    ]
    if rows:
        output.table(console, ["participant", "id", "outcome", "code", "noise floor"], rows)
    timed = [[str(n), *(str(parts.get(k, 0)) for k in PARTS)] for n, parts in found.timings.items()]
    if timed:
        console.print("Milliseconds of each round:")
        output.table(console, ["round", *PARTS], timed, right=tuple(range(len(PARTS) + 1)))


def _stands(name: str, found: Mapping[str, Any]) -> str:
    """A participant that does not simply take part, in one sentence."""
    code = f" ({found['code']})" if found["code"] and found["said"] != "running" else ""
    rounds = [str(model["round"]) for model in found["models"]]
    models = f"; its updates are in the models of the rounds {rounds[0]} to {rounds[-1]}" if rounds else ""
    return f"{name}: {found['standing']}{code}{models}."


def _noise(found: "NoiseFloor | None") -> str:
    return "-" if found is None else f"{found.outcome} ({found.ratio:.2f})"


PARTS = ("orders", "admission", "aggregation", "evaluation", "contribution", "log")


def _live(contract: "Contract") -> Any:  # noqa: ANN401 - rich.live.Live, imported on use
    from rich.live import Live

    console = output.console()
    return _Live(Live(console=console, refresh_per_second=4), contract)


class _Live:
    """A live table, started at its first content."""

    def __init__(self, live: Any, contract: "Contract") -> None:  # noqa: ANN401 - rich.live.Live
        self._live, self._contract, self._started = live, contract, False

    def update(self, content: Any) -> None:  # noqa: ANN401 - a rich renderable
        if not self._started:
            self._live.start()
            self._started = True
        self._live.update(content)

    def stop(self) -> None:
        if self._started:
            self._live.stop()


def _table(found: "RunStatus", contract: "Contract", seconds: float) -> Any:  # noqa: ANN401 - a rich table
    from rich.table import Table
    from rich.text import Text

    title = (
        f"{contract.title}: round {found.round} of {found.rounds} ({found.round_phase or found.phase}), {seconds:.0f} s"
    )
    table = Table(title=title, title_justify="left")
    for column in ("participant", "this round"):
        table.add_column(column)
    for party in contract.participants:
        kind, code = found.outcomes.get(party.id, ("", ""))
        doing = f"{kind} ({code})" if kind and kind != "admitted" else kind
        waiting = "training" if found.round_phase == "sent" else ""
        doing = doing or found.standing.get(party.id, {}).get("standing", "")
        table.add_row(Text(output.visible(party.name)), Text(doing or waiting))
    return table


def _show_result(
    result: Any,  # noqa: ANN401 - settlement.PeriodResult
    contract: "Contract",
    *,
    as_json: bool,
    held: tuple[str, ...] = (),
    objected: tuple[str, ...] = (),
    closed: bool = False,
    more: Mapping[str, Any] | None = None,
) -> None:
    """The result; `more`: what else the JSON has."""
    from fedpact_contract.record import decimal_text, ratio_text
    from fedpact_contract.settlement import format_fen, groups

    lines = [
        {
            "id": line.participant,
            "name": contract.participant(line.participant).name,
            "share": ratio_text(line.share.share, 9),
            "share_low": decimal_text(line.share.low),
            "share_high": decimal_text(line.share.high),
            "fen": line.fen,
            "held": line.participant in held,
            "objected": line.participant in objected,
        }
        for party in contract.participants
        for line in result.lines
        if line.participant == party.id
    ]
    if as_json:
        output.emit_json(
            {
                "contract_id": contract.id,
                "pool_fen": result.pool_fen,
                "basis": result.basis,
                "reason": result.shares.reason,
                "lines": lines,
                "common_control": groups(result, contract),
                "final": not held,
            }
            | dict(more or {})
        )
        return
    rows = [
        [
            line["name"],
            output.format_share(line["share"]),
            output.format_interval(line["share_low"], line["share_high"]),
            format_fen(line["fen"], "en"),
            "objected" if line["objected"] else "held" if line["held"] else "signed" if closed and line["fen"] else "-",
        ]
        for line in lines
    ]
    console = output.console()
    console.print(f"pool {format_fen(result.pool_fen, 'en')}, split by {result.basis} ({result.shares.reason})")
    output.table(console, ["participant", "share", "95 % interval", "paid", "closing"], rows, right=(1, 2, 3))
    console.print(f"interval: {result.shares.covers}; {output.OUTWARD}")
    for of in groups(result, contract):
        floor = f" of {format_fen(of['floor_fen'], 'en')}" if of["floor_fen"] else ""
        text = f"{of['name']} controls {', '.join(of['names'])}: they have one equal part and one floor{floor}"
        console.print(output.visible(text), soft_wrap=True)
