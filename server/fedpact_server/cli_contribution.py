"""Commands `fedpact contribution show` and `alarms`, the operator's, and `reevaluate`, the auditor's."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedpact_contract import output
from fedpact_contract.cli import group
from fedpact_contract.files import refuse_existing, write_new
from fedpact_server.cli_common import DEFAULT_HOME, Home, Json, PassphraseFile
from fedpact_server.cli_run import RUN, Opened, open_contract

if TYPE_CHECKING:
    from fedpact_contract.contract import Contract
    from fedpact_contract.log import Entry, Finding
    from fedpact_contract.reevaluation import Reevaluation

COLUMNS = {
    "value": "value",
    "value_se": "SE",
    "monte_carlo": "Monte Carlo",
    "leave_one_out": "leave-one-out",
    "banzhaf": "Banzhaf",
    "first_order": "first order",
    "renormalised": "re-normalised",
}
"""What is shown of each participant, in the unit of the loss, where it is known."""


def register(app: typer.Typer) -> None:
    """Add the commands to the group that the base has."""
    contribution = group(app, "contribution")
    contribution.command("show")(show_command)
    contribution.command("alarms")(alarms_command)
    contribution.command("reevaluate")(reevaluate_command)


def show_command(
    run: RUN,
    game: Annotated[
        int | None, typer.Option("--game", min=1, help="Print this round's game, for `fedpact contribution recompute`.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also write a picture; a new .svg file.")] = None,
    diagnostic: Annotated[
        Literal["renormalised"] | None,
        typer.Option("--diagnostic", help="Also show values of the re-normalised game; nobody is paid by them."),
    ] = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Show each participant's contribution and share over the rounds so far, with intervals and diagnostics.

    Until the close only the operator sees it: whoever reads scores early can train for them.

    Example: fedpact contribution show 3f2a91 --plot contribution.svg
    """
    from fedpact_contract.errors import InputError
    from fedpact_contract.scorecard import game_table, scorecard
    from fedpact_server import scoring

    if plot is not None:
        if plot.suffix != ".svg":
            raise InputError(
                "PLOT_FORM",
                "A picture is written as SVG.",
                file=plot,
                field="--plot",
                remedy="Name a file that ends in .svg.",
            )
        refuse_existing(plot, option="--plot")
    at = open_contract(home, run)
    with at.database.read() as connection:
        rounds = [scores for _, scores in scoring.all_scores(connection, at.contract.id)]
    if game is not None:
        output.emit_json(game_table(_round(rounds, game)))
        return
    if not rounds:
        raise InputError(
            "CONTRIBUTION_NO_ROUND",
            "No round of this run has been scored yet.",
            remedy="`fedpact run status` says where it stands.",
        )
    card = scorecard(at.contract, rounds, _moments(at, rounds))
    if diagnostic is not None:
        _add_renormalised(card, at)
    if plot is not None:
        write_new(plot, _picture(card).encode(), option="--plot")
    if as_json:
        output.emit_json(card | {"live": _live(at)})
    else:
        _show(card, at, plot)


def alarms_command(run: RUN, home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """Show what looks like gaming in the rounds so far, and where the detectors cannot tell.

    An alarm is a question, and moves no money: with honest participants one run in a hundred has one. Only the operator
    sees it, for it says something of scores.

    Example: fedpact contribution alarms 3f2a91
    """
    from fedpact_server import validation, watch

    at = open_contract(home, run)
    rows = validation.load(at.operator.path, at.contract.contribution.validation.root)
    with at.database.read() as connection:
        found = watch.look(connection, at.contract, at.operator.path, rows.examples)
    if as_json:
        output.emit_json({"contract": at.contract.id, "findings": [finding.plain() for finding in found]})
        return
    console = output.console()
    if not found:
        console.print("No round of this run has been scored yet.")
        return
    names = {p: party.name for p, party in at.contract.by_id().items()}
    raised = [f for f in found if f.outcome == "alarm"]
    lines = [
        [str(f.round), f.code, ", ".join(names[p] for p in f.participants), f.statistic, f.threshold] for f in raised
    ]
    if lines:
        output.table(console, ["round", "alarm", "participants", "statistic", "threshold"], lines, right=(0, 3, 4))
    else:
        console.print("No alarm.")
    for line in _without_power(found):
        console.print(line)


def _without_power(found: "Sequence[Finding]") -> Iterator[str]:
    """Of each detector the rounds in which it could not have found its thing, and why not in the last of them."""
    from fedpact_server.report.spelled import number_ranges

    for code in dict.fromkeys(f.code for f in found):
        silent = {f.round: f.power for f in found if f.code == code and f.outcome == "no power"}
        if silent:
            rounds = number_ranges(sorted(silent))
            why = silent[max(silent)].removeprefix("none: ")
            yield f"{code} could find nothing in {'round' if len(silent) == 1 else 'rounds'} {rounds}: {why}"


def reevaluate_command(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="What `fedpact evidence --auditor` of the operator wrote.")
    ],
    key: Annotated[Path, typer.Option("--key", help="The auditor's home: what `fedpact auditor init` made.")],
    sample: Annotated[
        int | None,
        typer.Option("--sample", min=1, help="So many coalitions of each round, drawn; without it all, and moments."),
    ] = None,
    seed: Annotated[
        str | None, typer.Option("--seed", help="What they are drawn by, 64 hexadecimal digits; fresh by default.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="A new file for the signed record.")] = Path("reevaluation.json"),
    passphrase_file: PassphraseFile = None,
    as_json: Json = False,
) -> None:
    """Evaluate coalitions and next models again, as the contract's auditor, and sign what is found.

    Exit codes: 0 the operator's figures are those that updates and rows give; 1 they are not, or FOLDER is at fault.

    Example: fedpact contribution reevaluate handed-over --key auditor --out reevaluation.json
    """
    from fedpact_contract.auditor import AuditorHome
    from fedpact_server.reevaluate import reevaluate

    refuse_existing(out)
    home = AuditorHome.open(key)
    keys = home.keys(output.read_passphrase(passphrase_file, "the auditor's keys"))
    contract, record, envelope, entries = reevaluate(folder, home.party, keys, sample=sample, seed=seed)
    write_new(out, envelope.to_bytes() + b"\n")
    if as_json:
        output.emit_json({"file": str(out.absolute())} | record.plain())
    else:
        _show_reevaluation(record, contract, entries, out)
    raise typer.Exit(1 if record.differing else 0)


def _show_reevaluation(record: "Reevaluation", contract: "Contract", entries: "Sequence[Entry]", out: Path) -> None:
    from fedpact_contract.reevaluation import scope, told

    if record.coalitions == "none":
        output.line("The deposit holds no rows to evaluate on.")
    else:
        output.line(
            f"{scope(record).capitalize()} of {record.rounds} rounds ({record.evaluated} evaluations); the largest "
            f"difference of a loss is {record.largest} of 1e-9 of its unit."
        )
    for sentence in told(record, contract, [entry.open() for entry in entries]):
        output.line(sentence)
    if record.seed is not None:
        output.line(f"drawn by {record.seed}")
    for difference in record.differences:
        output.line(difference.words(contract))
    if record.differing > len(record.differences):
        output.line(f"and {record.differing - len(record.differences)} more differences")
    count = record.differing or "NO"
    verdict = f"{count} DIFFERENCE" + ("S" if record.differing > 1 else "")
    output.line(f"{verdict}: signed in {out}. Hand it to whoever verifies: fedpact verify EVIDENCE --reevaluation FILE")


def _round(rounds: list[Any], number: int) -> Any:  # noqa: ANN401 - RoundScores
    from fedpact_contract.errors import InputError

    for scores in rounds:
        if scores.round == number:
            return scores
    known = ", ".join(str(scores.round) for scores in rounds) or "none"
    raise InputError(
        "CONTRIBUTION_NO_ROUND",
        f"Round {number} has not been scored.",
        field="--game",
        remedy=f"Scored so far: {known}.",
    )


def _moments(at: Opened, rounds: list[Any]) -> Any:  # noqa: ANN401 - log.Moments
    """Second moments over these rounds: those that were committed to, or from what is kept of each round.

    Raises:
        FailedError: CONTRIBUTION_VALUES_LOST.
    """
    from fedpact_server import scoring

    with at.database.read() as connection:
        kept = scoring.opened_moments(connection, at.contract.id)
    if kept is not None:
        return kept[1]
    return scoring.moments(at.operator.path / "arrays" / at.contract.id, at.contract, rounds)


def _add_renormalised(card: dict[str, Any], at: Opened) -> None:
    """Another column: values of the re-normalised game."""
    from fedpact_contract.scorecard import nats
    from fedpact_server import validation
    from fedpact_server.diagnostic import renormalised

    rows = validation.load(at.operator.path, at.contract.contribution.validation.root)
    with at.database.read() as connection:
        values = renormalised(connection, at.contract, at.operator.path, rows.examples)
    for line in card["participants"]:
        line["renormalised"] = nats(values[line["id"]])


def _live(at: Opened) -> bool:
    """Whether the scores are not opened yet."""
    return at.status().phase not in ("closing", "closed")


def _show(card: dict[str, Any], at: Opened, plot: Path | None) -> None:
    from fedpact_contract.metric import loss_unit

    console = output.console()
    console.print(
        f"{card['game']} game, {card['loss']} on {card['validation_rows']} validation rows, "
        f"{card['estimator']} values; round {card['rounds'][-1]['round']} of {at.contract.training.rounds}"
    )
    unit = f" {loss_unit(card['loss'])}".rstrip()
    console.print(
        f"loss {_short(card['rounds'][0]['loss_before'])} -> {_short(card['rounds'][-1]['loss_after'])}{unit}: "
        f"a value of {_short(card['total_value'])} ± {_short(card['total_value_se'])} (SE), "
        f"split by {card['basis']} ({card['reason']})"
    )
    known = [key for key in COLUMNS if any(line.get(key) is not None for line in card["participants"])]
    heads = ["participant", "rounds", *(COLUMNS[key] for key in known), "share", "95 % interval"]
    rows = [
        [
            line["name"],
            str(line["rounds_admitted"]),
            *(_short(line[key]) for key in known),
            output.format_share(line["share"]),
            output.format_interval(line["share_low"], line["share_high"]),
        ]
        for line in card["participants"]
    ]
    output.table(console, heads, rows, right=tuple(range(1, len(heads))))
    console.print(f"interval: {card['interval']['covers']}; {output.OUTWARD}")
    if "monte_carlo" in known:
        console.print("Monte Carlo: half-width of the value's 95 % interval for the draw of coalitions alone")
    if "renormalised" in known:
        console.print(
            "re-normalised: values if a coalition's updates were averaged as if nobody else had been there, so that an "
            "update of zeros is worth something else than 0; a diagnostic, never paid by"
        )
    apart = [str(scored["round"]) for scored in card["rounds"] if scored["agrees_with_first_order"] is False]
    if apart:
        console.print(
            f"Cross-check: in round {', '.join(apart)} the values do not go along with first-order values "
            "(correlation below 0.9): the loss is curved there, and no error by itself."
        )
    if card["without_slices"]:
        _show_slices(card, at)
    if _live(at):
        console.print("These scores are the operator's alone until the period closes.")
    if plot is not None:
        console.print(output.visible(str(plot)), soft_wrap=True)


def _show_slices(card: dict[str, Any], at: Opened) -> None:
    """The shares without each slice, a column a slice."""
    console, slices = output.console(), card["without_slices"]
    names = {party.id: party.name for party in at.contract.participants}
    console.print("Shares if a slice of the validation set had never been there:")
    heads = ["participant", *(f"without {names.get(part['source'], part['source'])}" for part in slices)]
    rows = [
        [
            line["name"],
            *("-" if part["shares"] is None else output.format_share(part["shares"][line["id"]]) for part in slices),
        ]
        for line in card["participants"]
    ]
    output.table(console, heads, rows, right=tuple(range(1, len(heads))))


def _short(value: str) -> str:
    """A value for people."""
    return f"{float(value):.5f}"


def _picture(card: dict[str, Any]) -> str:
    """Values over rounds, and the shares with their intervals."""
    from itertools import cycle

    from fedpact_contract.metric import loss_unit
    from fedpact_server.report.charts import COLOURS, Bar, Series, bars, lines, stacked

    series, shares = [], []
    for line, colour in zip(card["participants"], cycle(COLOURS), strict=False):
        values = [0.0]
        for scored in card["rounds"]:
            values.append(values[-1] + float(scored["values"][line["id"]]))
        series.append(Series(name=line["name"], colour=colour, values=values))
        shares.append(
            Bar(
                name=line["name"],
                colour=colour,
                value=float(line["share"]),
                low=float(line["share_low"]),
                high=float(line["share_high"]),
                label=output.format_share(line["share"]),
            )
        )
    return stacked([lines(series, "round", loss_unit(card["loss"])), bars(shares)])
