"""The command `fedpact contribution retrain`: an audit in simulation of the values that are paid by."""

import os
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpact_contract import output
from fedpact_contract.cli import group
from fedpact_server.cli_common import DEFAULT_HOME, Home, Json
from fedpact_server.cli_run import open_contract

if TYPE_CHECKING:
    from fedpact_contract.contract import Contract
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
    "nobody is ever absent, or one with another; whoever gave a slice of the contract's is scored on the others' rows",
)
SMALL = 100_000
"""Parameters of a model whose threads would only wait for each other: 20 times slower where others use the machine."""
LEFT_OUT = (
    "of more than 5 participants it retrains leave-one-out values, which do not add up to the whole and say nothing of "
    "participants that could stand for each other"
)


def register(app: typer.Typer) -> None:
    """Add the command to the group that the base has."""
    group(app, "contribution").command("retrain")(retrain_command)


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
    rows, validation, slices = _rows(found, data)
    if len(initial) < SMALL:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded, below

    from fedpact_server import retraining

    began = time.monotonic()
    simulated = retraining.with_slices(found, slices)
    result = retraining.audit(simulated, rows, validation, initial, draws=draws, seed=secrets.randbits(64))
    values = _plain(found, result, rows=str(data) if data else "the demo's digits", validation=len(validation))
    values |= {"initial_model": whose, "seconds": round(time.monotonic() - began, 1)}
    if as_json:
        output.emit_json(values)
    else:
        _show_retrained(values)


def _contract_and_model(text: str, home: Path) -> "tuple[Contract, Floats, str]":
    """The contract, an initial model, and whether that is the contract's own.

    A file does not hold the model: zeros are every linear model's, and of others one is drawn.

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
    """The audit as plain values: values in the unit of the loss as decimal strings."""
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
            | {name: _scaled(value) for name, (value, _) in (("retrained", retrained), ("online", online))}
            | {name: _scaled(value) for name, (_, value) in (("retrained_se", retrained), ("online_se", online))}
            | {"difference": _scaled(apart[0]), "difference_se": _scaled(apart[1])}
        )
    return {
        "contract_id": contract.id,
        "loss": contract.contribution.loss,
        "rows": rows,
        "validation_rows": validation,
        "method": result.method,
        "draws": len(result.draws),
        "trainings": result.trainings,
        "participants": lines,
        "total": _scaled(total),
        "total_se": _scaled(total_error),
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
    from fedpact_contract.metric import loss_unit

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
    unit = loss_unit(values["loss"]) or "units of the loss, whose label is scaled"
    line(f"in {unit}; all together {_short(values['total'])} ± {_short(values['total_se'])} (SE over draws)")
    agreement = values["spearman"]
    told = "no order" if agreement["of_means"] is None else f"{agreement['of_means']:.3f}"
    mean = "" if agreement["mean"] is None else f"; draw by draw {agreement['mean']:.3f} ± {agreement['se']:.3f} (SE)"
    line(f"rank agreement (Spearman) of the means {told}{mean}")
    line(f"It shows {values['shows']}.")
    line("It does not show more than that:")
    for limit in values["limits"]:
        line(f"- {limit}")


def _scaled(value: float) -> str:
    """An integer of 1e-9 as what it stands for."""
    from fedpact_contract.record import decimal_text

    return decimal_text(Decimal(round(value)).scaleb(-9))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _short(value: str) -> str:
    """Nats for people."""
    return f"{float(value):.5f}"
