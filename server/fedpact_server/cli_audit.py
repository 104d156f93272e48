"""The command `fedpact audit-privacy`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpact_contract import output
from fedpact_contract.errors import InputError
from fedpact_contract.output import counted, line
from fedpact_server.cli_common import Json

if TYPE_CHECKING:
    from fedpact_contract.contract import Contract
    from fedpact_models.audit import Audit

LIMITS = (
    "no fault found is no proof of privacy: a lower bound stays far below a right claim, and noise that is wrong by "
    "little, or in a way that no test looks for, may pass",
    "it sees the code that is installed here, its noise too, and not what a participant runs",
    "that rows are drawn independently does not show, only how many are",
    "it is of single rows in the rounds: several rows of one entity, statistics and a baseline are no part of it",
)
"""What an audit cannot show."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("audit-privacy")(audit_privacy_command)


def audit_privacy_command(
    contract: Annotated[
        Path,
        typer.Argument(help="A contract's file (JSON as written or signed, or TOML), or evidence.", metavar="CONTRACT"),
    ],
    seconds: Annotated[int, typer.Option("--seconds", min=1, help="Time for its rounds, one at least.")] = 40,
    as_json: Json = False,
) -> None:
    """Audit the private training that a contract plans, in one run on made-up rows: lower bounds on its epsilon.

    Exit code 1: a bound reaches the claimed epsilon, or sampling, clipping or the noise itself is wrong.

    Example: fedpact audit-privacy heart.json
    """
    from fedpact_contract.contract_file import read_contract

    found, _ = read_contract(contract)

    from fedpact_models.audit import audit
    from fedpact_models.dp import SystemNoise

    try:
        result = audit(found, noise=SystemNoise(), coins=SystemNoise(), seconds=seconds)
    except InputError as err:
        err.file = err.file or str(contract)
        raise
    if as_json:
        output.emit_json(_plain(found, result))
    else:
        _show(found, result)
    raise typer.Exit(1 if result.faults else 0)


def _plain(contract: "Contract", result: "Audit") -> dict[str, Any]:
    from fedpact_contract.record import decimal_text
    from fedpact_models.audit import BATCH_ERROR, ERROR
    from fedpact_models.audit_noise import NOISE_ERROR

    guesses = result.guesses
    return {
        "contract_id": contract.id,
        "verdict": "fault" if result.faults else "no fault found",
        "faults": [{"code": code, "message": message} for code, message in result.faults.items()],
        "steps": {"run": result.steps, "planned": result.planned_steps},
        "num_examples": result.num_examples,
        "noise": result.noise,
        "mode": result.mode,
        "seconds": round(result.seconds, 1),
        "epsilon": {
            "contract": decimal_text(contract.privacy.epsilon),
            "claimed_for_these_steps": decimal_text(result.claimed),
            "delta": decimal_text(result.delta),
            "lower_bound_f_dp": _down(result.f_dp),
            "lower_bound_epsilon_delta": _down(result.epsilon_delta),
            "confidence": 1 - ERROR,
        },
        "canaries": {
            "total": guesses.canaries,
            "on_appended_coordinates": result.appended,
            "guessed": guesses.made,
            "right": guesses.correct,
        },
        "sampling": {
            "rows_drawn": result.rows_drawn,
            "rows_expected": round(result.rows_expected, 1),
            "chance": result.rows_chance,
            "fault_below": BATCH_ERROR,
        },
        "clip": {"largest_contribution": round(result.largest_contribution, 6)},
        "noise_itself": {
            "tests": result.noise_tests.count,
            "worst": {"tensor": result.noise_tests.tensor, "test": result.noise_tests.test},
            "chance": result.noise_tests.chance,
            "fault_below": NOISE_ERROR,
        },
        "limits": list(LIMITS),
    }


def _show(contract: "Contract", result: "Audit") -> None:
    from fedpact_contract.record import decimal_text
    from fedpact_models.audit import BATCH_ERROR, ERROR
    from fedpact_models.audit_noise import NOISE_ERROR

    guesses = result.guesses
    line(f"contract {contract.id}")
    line(contract.title)
    part = "" if result.steps == result.planned_steps else f" of {result.planned_steps} planned; time was up"
    line(f"{counted(result.steps, 'step')}{part}, {result.num_examples} made-up rows, {result.seconds:.1f} s")
    line(
        f"{guesses.canaries} canaries ({result.appended} on coordinates beside the network's); {guesses.made} guessed, "
        f"a number fixed beforehand, the rest abstained from: {guesses.correct} right"
    )
    rows = [
        ["claimed for these steps", f"{result.claimed:.2f}"],
        ["lower bound, f-DP", f"{_down(result.f_dp):.2f}"],
        ["lower bound, epsilon-delta", f"{_down(result.epsilon_delta):.2f}"],
    ]
    columns = [f"at delta {decimal_text(result.delta)}", "epsilon"]
    output.table(output.console(), columns, rows, right=(1,))
    line(f"Both bounds hold together with {1 - ERROR:.0%} confidence.")
    line(
        f"sampling: {counted(result.rows_drawn, 'row')} drawn, {result.rows_expected:.0f} expected "
        f"(chance {result.rows_chance:.2g}, a fault below {BATCH_ERROR:g})"
    )
    line(f"clip: one row far out of range moved the sum by {result.largest_contribution:.4f} of the clip")
    worst = result.noise_tests
    line(
        f"noise itself: {worst.count} tests, the worst {worst.tensor}, {worst.test} "
        f"(chance of one so bad among all {worst.chance:.2g}, a fault below {NOISE_ERROR:g})"
    )
    for code, message in result.faults.items():
        line(f"{code}: {message}")
    line("A fault." if result.faults else "No fault found. But:")
    if not result.faults:
        for limit in LIMITS:
            line(f"- {limit}")


def _down(bound: float) -> float:
    """A lower bound in hundredths, never above itself."""
    return math.floor(100 * bound) / 100
