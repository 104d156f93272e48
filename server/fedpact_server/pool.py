"""The updates that are kept, and what the noise floor pools of them: a function of what is stored, after any crash."""

from pathlib import Path

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.engine import Connection

from fedpact_contract.arrays import update_digest
from fedpact_contract.contract import ClientPrivacy, Contract
from fedpact_contract.errors import FaultError
from fedpact_models.registry import parameter_count
from fedpact_server import db, noise_floor
from fedpact_server.noise_floor import NoiseFloor
from fedpact_server.run_state import read_array

KEPT = ("ADMITTED", noise_floor.CODE)
"""Codes of the updates whose arrays are kept."""


def load_update(arrays: Path, digest: str) -> NDArray[np.float32]:
    """An admitted update by its digest, float32 [P]; at client level its salt follows, as eight values more.

    Raises:
        FaultError: the file is missing or is not what its name says.
    """
    return np.frombuffer(read_array(arrays / f"{digest}.f4", "update", update_digest), "<f4").copy()


def map_update(arrays: Path, digest: str, parameters: int | None = None) -> NDArray[np.float32]:
    """As `load_update`, its first P values or all of them; they stay on the disk until they are read.

    Raises:
        FaultError: the file is missing or is not what its name says.
    """
    load_update(arrays, digest)
    return np.memmap(arrays / f"{digest}.f4", "<f4", "r")[:parameters]


def ratios(connection: Connection, contract: Contract, arrays: Path, participant: str, count: int) -> tuple[float, ...]:
    """The energy ratios of a participant's last `count` kept updates, newest first; none where updates have no noise.

    Raises:
        FaultError: a file is missing or is not what its name says.
    """
    if isinstance(contract.privacy, ClientPrivacy):
        return ()
    table = db.outcomes.c
    query = (
        sa.select(table.update_digest)
        .where(table.contract_id == contract.id, table.participant == participant, table.code.in_(KEPT))
        .where(table.update_digest.is_not(None))  # a refusal's code is its sender's
        .order_by(table.round.desc())
        .limit(count)
    )
    rows = contract.participant(participant).num_examples
    digests = [str(digest) for digest in connection.execute(query).scalars()]
    updates = (load_update(arrays, digest).astype(np.float64) for digest in digests)
    return tuple(noise_floor.energy_ratio(update, contract, rows) for update in updates)


def standing(connection: Connection, contract: Contract, arrays: Path) -> dict[str, NoiseFloor]:
    """By participant, what its last kept updates say of its noise; who has none, or whose files are lost, is left out.

    Lost files end a run, with the reason: not what only looks at it.
    """
    parameters, result = parameter_count(contract.model, contract.data), {}
    for participant in contract.by_id():
        try:
            found = ratios(connection, contract, arrays, participant, noise_floor.pool_size(contract, parameters))
        except FaultError:
            continue
        if found:
            result[participant] = noise_floor.pooled(found, contract, parameters)
    return result
