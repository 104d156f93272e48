"""What the detectors say of a run, from what is kept of it: updates, models, and values on validation rows."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fedpact_contract.clipping import noise_energy
from fedpact_contract.contract import Contract
from fedpact_contract.errors import InputError
from fedpact_models.features import Examples
from fedpact_models.gradient import gradient
from fedpact_models.registry import parameter_count
from fedpact_server import aggregation, db, scoring
from fedpact_server.detectors import Apart, Finding, Observed, findings, observe
from fedpact_server.pool import load_update
from fedpact_server.run_state import admitted_updates, load_model


def look(connection: Connection, contract: Contract, home: Path, examples: Examples) -> list[Finding]:
    """Every finding over the rounds that are scored, round after round, as the run was then.

    Args:
        connection: The operator's database.
        contract: The contract.
        home: The operator's home.
        examples: The validation set.

    Raises:
        InputError: ALARMS_NO_GAME: no single update is scored, so none is compared.
        FailedError: CONTRIBUTION_VALUES_LOST.
        FaultError: an update or a model is missing, or is not what its name says.
    """
    if contract.contribution.game == "unanimity":
        raise InputError(
            "ALARMS_NO_GAME",
            "At client level no single update is looked at, neither for its score nor for an alarm.",
            field="contribution.game",
            remedy="Choose a contract of the fixed-weight game.",
        )
    slices = [(s.source, s.count) for s in contract.contribution.validation.slices]
    seen: list[Observed] = []
    result: list[Finding] = []
    for observed in _observed(connection, contract, home, examples):
        seen.append(observed)
        result += findings(seen, contract.training.rounds, slices)
    return result


def _observed(connection: Connection, contract: Contract, home: Path, examples: Examples) -> Iterator[Observed]:
    """Each scored round, reduced; no more than one round's updates are held, and a sum for each participant."""
    arrays, parameters = home / "arrays" / contract.id, parameter_count(contract.model, contract.data)
    counts = {p: party.num_examples for p, party in contract.by_id().items()}
    noise = {p: float(noise_energy(contract, n, parameters)) for p, n in counts.items()}
    memory, last, apart = aggregation.START, None, Apart()
    for _, scores in scoring.all_scores(connection, contract.id):
        values = scoring.read_values(arrays, contract, scores)
        admitted = admitted_updates(connection, contract.id, scores.round)
        updates = {p: load_update(arrays, digest) for p, digest in admitted.items()}
        weighted = aggregation.weighted_steps(updates, counts, contract.training.server_rate)
        mean = aggregation.apply(np.zeros(parameters), weighted.values())
        steps, memory = aggregation.server_steps(contract, updates, memory)
        step = aggregation.apply(np.zeros(parameters), steps.values())
        table = db.rounds.c
        where = (table.contract_id == contract.id, table.round == scores.round)
        base = load_model(home, str(connection.execute(sa.select(table.base_digest).where(*where)).scalar_one()))
        slope = float(np.linalg.norm(gradient(contract.model, contract.data, base, examples)))
        longer = float(np.linalg.norm(step)) / (float(np.linalg.norm(mean)) or 1.0)  # 1 without a server's optimizer
        yield observe(
            scores.round,
            updates,
            examples=counts,
            noise=noise,
            step=last,
            slope=slope * longer * float(contract.training.server_rate),
            values=values[[scores.players.index(p) for p in admitted]],
            apart=apart,
        )
        last = step
