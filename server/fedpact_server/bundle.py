"""What the operator hands the auditor: the evidence of a run, and all that its losses and models are made of.

    evidence/            the evidence, as for everybody
    deposit.sealed       the validation rows, sealed to the auditor's key
    models/DIGEST.f8     the models that the rounds began with
    updates/DIGEST.f4    every admitted update

No row of any participant is in it; of the operator's and the released rows only what the auditor's key opens.
"""

from collections.abc import Sequence
from pathlib import Path

from fedpact_contract.arrays import model_digest, update_digest
from fedpact_contract.canonical import sha256_hex
from fedpact_contract.contract import Contract
from fedpact_contract.errors import FaultError, InputError
from fedpact_contract.evidence import write_evidence
from fedpact_contract.files import make_home
from fedpact_contract.log import Body, Checkpoint, Countersignature, Entry, RoundAggregated, RoundOpened, UpdateDecided
from fedpact_contract.log import ValidationDeposited as Deposited
from fedpact_contract.messages import Update
from fedpact_contract.record import Envelope, read_envelope
from fedpact_server import deposit
from fedpact_server.run_state import read_array, write_array

EVIDENCE, SEALED, UPDATES = "evidence", "deposit.sealed", "updates"


def write(
    folder: Path,
    home: Path,
    contract: Contract,
    entries: Sequence[Entry],
    checkpoints: Sequence[Envelope[Checkpoint]],
    countersignatures: Sequence[Envelope[Countersignature]],
) -> None:
    """Write a new folder for the auditor, whole or not at all; every file is checked against the log.

    Raises:
        InputError: AUDITOR_NONE; HOME_EXISTS, there is something in the folder already.
        FaultError: a file is missing, or is not what the log says.
    """
    if contract.auditor is None:
        raise InputError(
            "AUDITOR_NONE",
            "The contract names no auditor, and nobody else may see the updates.",
            field="--auditor",
            remedy="Write the evidence without it.",
        )
    bodies, arrays = [entry.open() for entry in entries], home / "arrays" / contract.id

    def fill(build: Path) -> None:
        write_evidence(build / EVIDENCE, entries, checkpoints, countersignatures)
        logged = next((body.digest for body in bodies if isinstance(body, Deposited)), "")
        write_array(build / SEALED, read_sealed(deposit.path(arrays, logged), bodies))
        for digest in bases(bodies).values():
            name = f"{digest}.f8"
            write_array(build / "models" / name, read_array(home / "models" / name, "model", model_digest))
        for digest in updates(bodies).values():
            name = f"{digest}.f4"
            write_array(build / UPDATES / name, read_array(arrays / name, "update", update_digest))

    make_home(folder, fill)


def bases(bodies: Sequence[Body]) -> dict[int, str]:
    """Round -> digest of the model that it began with."""
    return {body.round: body.base_digest for body in bodies if isinstance(body, RoundOpened)}


def models(bodies: Sequence[Body]) -> dict[int, str]:
    """Round -> digest of the model that it led to."""
    return {body.round: body.model_digest for body in bodies if isinstance(body, RoundAggregated)}


def updates(bodies: Sequence[Body]) -> dict[tuple[int, str], str]:
    """(round, participant) -> digest of an update that entered a model."""
    admitted = {body.round: body.admitted for body in bodies if isinstance(body, RoundAggregated)}
    return {
        (body.round, body.participant): Update.from_bytes(read_envelope(body.update).body).update_digest
        for body in bodies
        if isinstance(body, UpdateDecided) and body.participant in admitted.get(body.round, ())
    }


def read_sealed(path: Path, bodies: Sequence[Body]) -> bytes:
    """What was sealed for the auditor, as the log says.

    Raises:
        FaultError: DEPOSIT_FILE_MISSING, DEPOSIT_DIGEST.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as err:
        raise FaultError(
            "DEPOSIT_FILE_MISSING", "The file of the sealed validation rows is missing.", file=path
        ) from err
    logged = [body for body in bodies if isinstance(body, Deposited)]
    if not logged or (logged[0].digest, logged[0].size) != (sha256_hex(data), len(data)):
        raise FaultError(
            "DEPOSIT_DIGEST",
            "The file of the sealed validation rows is not what the log says.",
            file=path,
            rule="its SHA-256 and size stand in the entry validation-deposited",
        )
    return data
