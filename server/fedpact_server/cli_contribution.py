"""`fedpact contribution`: `show`, the operator's; `reevaluate`, the auditor's; `retrain`, an audit in simulation."""

import os
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpact_contract import output
from fedpact_contract.cli import group
from fedpact_contract.files import refuse_existing, write_new
from fedpact_server.cli_common import DEFAULT_HOME, Home, Json, PassphraseFile
from fedpact_server.cli_run import RUN, Opened, open_contract

if TYPE_CHECKING:
    from fedpact_contract.contract import Contract
    from fedpact_contract.reevaluation import Reevaluation
    from fedpact_models.features import Floats
    from fedpact_server.demo.rows import Rows
    from fedpact_server.retraining import Audit

SHOWS = (
    "how the values that are paid by, which look at each round's updates alone, agree with what every coalition "
    "reaches where it trains anew from the initial model: on these rows, with the contract's trainer, noise and server"
)
RETRAIN_LIMITS = (
    "it is a simulation on the files named: nothing of a participant's real data, and no amount is paid by it",
    "a coalition that trains anew weighs its members anew and follows another path; the two games ask different "
    "questions, and unequal values are no fault of either",
    "standard errors are over batches and noise alone: the same rows, the same validation rows, few draws",
    "everybody is scored on all validation rows, its own slice too, and nobody is ever absent",
)
SMALL = 100_000
"""Parameters of a model whose threads would only wait for each other: 20 times slower where others use the machine."""
LEFT_OUT = (
    "of more than 5 participants it retrains leave-one-out values, which do not add up to the whole and say nothing of "
    "participants that could stand for each other"
)
COLUMNS = {
    "value": "value",
    "value_se": "SE",
    "monte_carlo": "Monte Carlo",
    "leave_one_out": "leave-one-out",
    "banzhaf": "Banzhaf",
}
"""What is shown of each participant, in nat, where it is known."""


def register(app: typer.Typer) -> None:
    """Add the commands to the group that the base has."""
    commands = group(app, "contribution")
    commands.command("show")(show_command)
    commands.command("retrain")(retrain_command)
    commands.command("reevaluate")(reevaluate_command)


def show_command(
    run: RUN,
    game: Annotated[
        int | None, typer.Option("--game", min=1, help="Print this round's game, for `fedpact contribution recompute`.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also write a picture; a new .svg file.")] = None,
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
        refuse_existing(plot)
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
    if plot is not None:
        write_new(plot, _picture(card).encode())
    if as_json:
        output.emit_json(card | {"live": _live(at)})
    else:
        _show(card, at, plot)


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
    contract, record, envelope = reevaluate(folder, home.party, keys, sample=sample, seed=seed)
    write_new(out, envelope.to_bytes() + b"\n")
    if as_json:
        output.emit_json({"file": str(out.absolute())} | record.plain())
    else:
        _show_reevaluation(record, contract, out)
    raise typer.Exit(1 if record.differing else 0)


def _show_reevaluation(record: "Reevaluation", contract: "Contract", out: Path) -> None:
    from fedpact_contract.reevaluation import scope

    if record.coalitions == "none":
        output.line("The deposit holds no rows to evaluate on; every next model was made again.")
    else:
        output.line(
            f"{scope(record).capitalize()} of {record.rounds} rounds ({record.evaluated} evaluations), and every next "
            f"model; the largest difference of a loss is {record.largest} of 1e-9 nat."
        )
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
    from fedpact_contract.errors import FailedError
    from fedpact_server import scoring

    with at.database.read() as connection:
        kept = scoring.opened_moments(connection, at.contract.id)
    if kept is not None:
        return kept[1]
    folder = at.operator.path / "arrays" / at.contract.id
    for scores in rounds:
        if not scoring.values_kept(folder, at.contract, scores):
            raise FailedError(
                "CONTRIBUTION_VALUES_LOST",
                f"The per-example values of round {scores.round} are lost; without them no interval can be given.",
                file=scoring.values_path(folder, scores.round),
                remedy="They are made again when the run ends; `--game` shows the game of each round.",
            )
    return scoring.moments(folder, at.contract, rounds)


def _live(at: Opened) -> bool:
    """Whether the scores are not opened yet."""
    return at.status().phase not in ("closing", "closed")


def _show(card: dict[str, Any], at: Opened, plot: Path | None) -> None:
    console = output.console()
    console.print(
        f"{card['game']} game, {card['loss']} on {card['validation_rows']} validation rows, "
        f"{card['estimator']} values; round {card['rounds'][-1]['round']} of {at.contract.training.rounds}"
    )
    console.print(
        f"loss {_short(card['rounds'][0]['loss_before'])} -> {_short(card['rounds'][-1]['loss_after'])} nat: "
        f"a value of {_short(card['total_value'])} ± {_short(card['total_value_se'])} (SE), "
        f"split by {card['basis']} ({card['reason']})"
    )
    known = [key for key in COLUMNS if any(line[key] is not None for line in card["participants"])]
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
    """Nats for people."""
    return f"{float(value):.5f}"


def _picture(card: dict[str, Any]) -> str:
    """Values over rounds, and the shares with their intervals."""
    from itertools import cycle

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
    return stacked([lines(series, "round", "nat"), bars(shares)])


def retrain_command(
    contract: Annotated[
        str,
        typer.Argument(help="A contract's file, or the id of one in the home, or its beginning.", metavar="CONTRACT"),
    ],
    data: Annotated[
        Path | None, typer.Option("--data", help="Files as for `fedpact demo --data`: a folder with a federation.toml.")
    ] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="The demo's digits in place of files.")] = False,
    draws: Annotated[int, typer.Option("--draws", min=2, help="Draws of batches and noise.")] = 3,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Retrain coalitions in simulation: Shapley values (over 5 participants leave-one-out) beside the online ones.

    It reads the files that it is given, in this process; it never touches a participant's data.

    Example: fedpact contribution retrain contract.json --simulate
    """
    import secrets
    import time

    from fedpact_contract.errors import InputError

    if (data is None) != simulate:
        raise InputError(
            "RETRAIN_DATA",
            "Give either files, --data DIR, or --simulate.",
            field="--data, --simulate",
            remedy="docs/own-data.md documents the layout of DIR.",
        )
    found, initial, whose = _contract_and_model(contract, home)
    rows, validation = _rows(found, data)
    if len(initial) < SMALL:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded, below

    from fedpact_server import retraining

    began = time.monotonic()
    result = retraining.audit(found, rows, validation, initial, draws=draws, seed=secrets.randbits(64))
    values = _plain(found, result, rows=str(data) if data else "the demo's digits", validation=len(validation))
    values |= {"initial_model": whose, "seconds": round(time.monotonic() - began, 1)}
    if as_json:
        output.emit_json(values)
    else:
        _show_retrained(values)


def _contract_and_model(text: str, home: Path) -> "tuple[Contract, Floats, str]":
    """The contract, an initial model, and whether that is the contract's own.

    A file does not hold the model: zeros are every softmax model's, and of others one is drawn.

    Raises:
        InputError: as `read_contract` or `open_contract`.
        FaultError: as `load_model`.
    """
    import numpy as np

    from fedpact_contract.contract_file import read_contract
    from fedpact_models.registry import architecture, initial_weights
    from fedpact_server.run_state import load_model

    if not Path(text).exists():
        at = open_contract(home, text)
        return at.contract, load_model(at.operator.path, at.contract.model.initial_digest), "the contract's"
    found, _ = read_contract(Path(text))
    own = architecture(found.model, found.data).zero_start
    weights = initial_weights(found.model, found.data, np.random.default_rng())
    return found, weights, "the contract's" if own else "drawn anew: the file does not hold the contract's"


def _rows(contract: "Contract", data: Path | None) -> "Rows":
    import tempfile

    from fedpact_server.demo import rows

    if data is not None:
        return rows.of_folder(contract, data)
    with tempfile.TemporaryDirectory(prefix="fedpact-retrain-") as folder:
        return rows.of_digits(contract, Path(folder))


def _plain(contract: "Contract", result: "Audit", *, rows: str, validation: int) -> dict[str, Any]:
    """The audit as plain values: values in nat as decimal strings."""
    from fedpact_server.retraining import mean_and_error

    agreements = [value for value in result.agreement if value is not None]
    mean, error = mean_and_error(agreements) if len(agreements) > 1 else (None, None)
    total, total_error = mean_and_error([draw.total for draw in result.draws])
    lines = []
    for party in contract.participants:
        retrained = mean_and_error([draw.retrained[party.id] for draw in result.draws])
        online = mean_and_error([draw.online[party.id] for draw in result.draws])
        apart = mean_and_error([draw.online[party.id] - draw.retrained[party.id] for draw in result.draws])
        lines.append(
            {"id": party.id, "name": party.name, "num_examples": party.num_examples}
            | {name: _nat(value) for name, (value, _) in (("retrained", retrained), ("online", online))}
            | {name: _nat(value) for name, (_, value) in (("retrained_se", retrained), ("online_se", online))}
            | {"difference": _nat(apart[0]), "difference_se": _nat(apart[1])}
        )
    return {
        "contract_id": contract.id,
        "rows": rows,
        "validation_rows": validation,
        "method": result.method,
        "draws": len(result.draws),
        "trainings": result.trainings,
        "participants": lines,
        "total": _nat(total),
        "total_se": _nat(total_error),
        "spearman": {
            "of_means": _rounded(result.agreement_of_means),
            "per_draw": [_rounded(value) for value in result.agreement],
            "mean": _rounded(mean),
            "se": _rounded(error),
        },
        "shows": SHOWS,
        "limits": [*RETRAIN_LIMITS, *([LEFT_OUT] if result.method == "leave-one-out" else [])],
    }


def _show_retrained(values: dict[str, Any]) -> None:
    line = output.line
    line(f"contract {values['contract_id']}")
    line(
        f"simulated on {values['rows']}: {values['trainings']} trainings in {values['draws']} draws, "
        f"{values['validation_rows']} validation rows, {values['seconds']} s; initial model: {values['initial_model']}"
    )
    heads = ["participant", "rows", f"retrained, {values['method']}", "SE", "online, per round", "SE", "apart", "SE"]
    keys = ("retrained", "retrained_se", "online", "online_se", "difference", "difference_se")
    table = [
        [part["name"], str(part["num_examples"]), *(_short(part[key]) for key in keys)]
        for part in values["participants"]
    ]
    output.table(output.console(), heads, table, right=tuple(range(1, len(heads))))
    line(f"in nat; all together {_short(values['total'])} ± {_short(values['total_se'])} (SE over draws)")
    agreement = values["spearman"]
    told = "no order" if agreement["of_means"] is None else f"{agreement['of_means']:.3f}"
    mean = "" if agreement["mean"] is None else f"; draw by draw {agreement['mean']:.3f} ± {agreement['se']:.3f} (SE)"
    line(f"rank agreement (Spearman) of the means {told}{mean}")
    line(f"It shows {values['shows']}.")
    line("It does not show more than that:")
    for limit in values["limits"]:
        line(f"- {limit}")


def _nat(value: float) -> str:
    """1e-9 nat as nat."""
    from fedpact_contract.record import decimal_text

    return decimal_text(Decimal(round(value)).scaleb(-9))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
