"""A contract's one run, as the operator's commands see it: start, pause, resume, stop, and where it stands."""

import json
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fedpact_contract.contract import Contract
from fedpact_contract.errors import FailedError, InputError, RefusedError
from fedpact_contract.leaving import Standing
from fedpact_contract.privacy import check_plan
from fedpact_contract.request import instant, utc_now
from fedpact_server import db, leaving
from fedpact_server.installed import installed_code
from fedpact_server.run_state import STOPS, last_round, outcomes, run_row, signed_contract

RUN_PREFIX = "run-"
ID_LENGTH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """Where a run stands. `round` is the latest opened round, 0 for none; `outcomes` its results by participant id.

    `standing`, by participant id, of those that do not simply take part: why, and what more is known of it.
    """

    run_id: str
    contract_id: str
    phase: str
    wanted: str
    detail: str
    round: int
    round_phase: str
    rounds: int
    outcomes: dict[str, tuple[str, str]]
    timings: dict[int, dict[str, int]]
    standing: dict[str, dict[str, Any]]

    def plain(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "run_id": self.run_id,
            "contract_id": self.contract_id,
            "phase": self.phase,
            "wanted": self.wanted,
            "detail": self.detail,
            "round": self.round,
            "round_phase": self.round_phase,
            "rounds": self.rounds,
            "outcomes": {p: {"outcome": kind, "code": code} for p, (kind, code) in self.outcomes.items()},
            "milliseconds": {str(number): parts for number, parts in self.timings.items()},
            "standing": self.standing,
        }


def run_id(contract_id: str) -> str:
    """The run's id: a contract has one run."""
    return RUN_PREFIX + contract_id[:ID_LENGTH]


def contract_selector(text: str) -> str:
    """A contract's id or prefix from what an operator types: also a run's id."""
    return text.removeprefix(RUN_PREFIX)


def start(connection: Connection, contract: Contract, state: str) -> RunStatus:
    """Ask for the run of a signed contract; `serve` drives it. Again changes nothing.

    What the plan costs is recomputed before the first order.

    Raises:
        InputError: CONTRACT_NOT_SIGNED; CONTRACT_ACCOUNTANT, CONTRACT_NOISE_TOO_SMALL.
        RefusedError: CONTRACT_TERM, CONTRACT_CODE (this installation is not the contracted one), RUN_ENDED.
    """
    signed_contract(connection, contract.id)
    known = run_row(connection, contract.id)
    if known is not None and (known.phase != "running" or known.wanted in STOPS):
        how = "being stopped" if known.phase == "running" else known.phase
        raise RefusedError("RUN_ENDED", f"The run of this contract is {how}; a contract has one run.")
    if state != "signed":
        raise RefusedError("CONTRACT_STATE", f"The contract is {state}.", remedy="Only a signed contract runs.")
    now = instant(utc_now())
    if not contract.term.not_before <= now <= contract.term.not_after:
        raise RefusedError(
            "CONTRACT_TERM",
            f"It is {now}; the contract's term is {contract.term.not_before} to {contract.term.not_after}.",
            rule="term",
            remedy="Start within the term, or make a new contract with another one.",
        )
    if installed_code() != contract.code:
        raise RefusedError(
            "CONTRACT_CODE",
            "The code installed here is not the code that the contract names.",
            rule="code",
            remedy=f"Install release {contract.code.release}, or make a new contract.",
        )
    if known is None:
        check_plan(contract)
        connection.execute(
            db.runs.insert().values(contract_id=contract.id, phase="running", wanted="run", detail="", started=now)
        )
    return status(connection, contract)


def want(connection: Connection, contract: Contract, wanted: str) -> RunStatus:
    """Pause, resume or stop the run: `serve` sees to it. A stop that cannot score may still become an unscored one.

    Raises:
        InputError: RUN_UNKNOWN.
        RefusedError: RUN_ENDED.
    """
    run = run_row(connection, contract.id)
    if run is None:
        raise _unknown()
    if run.phase != "running" or (run.wanted in STOPS and wanted != "unscored"):
        raise RefusedError("RUN_ENDED", f"The run is {run.phase if run.phase != 'running' else 'stopped'}.")
    connection.execute(db.runs.update().where(db.runs.c.contract_id == contract.id).values(wanted=wanted))
    return status(connection, contract)


def status(connection: Connection, contract: Contract) -> RunStatus:
    """Where the run stands.

    Raises:
        InputError: RUN_UNKNOWN, the run was never started.
    """
    run = run_row(connection, contract.id)
    if run is None:
        raise _unknown()
    current = last_round(connection, contract.id)
    number = 0 if current is None else int(current.round)
    results = outcomes(connection, contract.id, number) if number else {}
    table = db.rounds.c
    timed = connection.execute(
        sa.select(table.round, table.timings).where(table.contract_id == contract.id).order_by(table.round)
    ).all()
    return RunStatus(
        run_id=run_id(contract.id),
        contract_id=contract.id,
        phase=str(run.phase),
        wanted=str(run.wanted),
        detail=str(run.detail),
        round=number,
        round_phase="" if current is None else str(current.phase),
        rounds=contract.training.rounds,
        outcomes={p: (str(row.kind), str(row.code)) for p, row in results.items()},
        timings={int(row.round): _milliseconds(bytes(row.timings)) for row in timed if row.timings},
        standing=_standing(connection, contract),
    )


def _standing(connection: Connection, contract: Contract) -> dict[str, dict[str, Any]]:
    """Who paused, withdrew or revoked its run key, by its own word, and whom the operator has suspended."""
    said, result = leaving.standing(connection, contract.id), {}
    table = db.participants.c
    query = sa.select(table.id).where(table.state == "suspended", table.id.in_([p.id for p in contract.participants]))
    suspended = set(connection.execute(query).scalars())
    for participant in contract.by_id():
        known = said.get(participant, Standing())
        words = [known.shown] if known.away else []
        words += ["suspended by operator"] if participant in suspended else []
        if words:
            models = leaving.models_with(connection, contract.id, participant) if known.withdrawn else []
            result[participant] = known.plain() | {
                "standing": ", ".join(words),
                "models": [model.plain() for model in models],
            }
    return result


def _milliseconds(data: bytes) -> dict[str, int]:
    try:
        value: dict[str, int] = json.loads(data)
    except ValueError as err:
        raise FailedError(
            "DATABASE_DAMAGED",
            "The operator's database holds times of a round that cannot be read.",
            field="rounds",
            remedy="Restore a backup.",
        ) from err
    return value


def _unknown() -> InputError:
    return InputError("RUN_UNKNOWN", "This contract has no run yet.", remedy="Start it: `fedpact run start CONTRACT`.")
