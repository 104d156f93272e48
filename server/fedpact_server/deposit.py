"""The deposit: the validation rows and their salts, sealed to the auditor that the contract names (docs/adr/0007).

What lies inside is `features.pack_rows`; the seal is bound to the contract's id and to the root that the rows must
have, so that a deposit of one contract opens for no other.
"""

from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedpact_contract import sealed
from fedpact_contract.canonical import canonical_bytes, sha256_hex
from fedpact_contract.contract import Contract
from fedpact_contract.errors import FaultError, InputError
from fedpact_contract.log import ValidationDeposited
from fedpact_contract.shape import feature_count
from fedpact_models.features import Examples, pack_rows, target_type, unpack_rows, validation_root
from fedpact_models.tasks import task_of
from fedpact_server import validation
from fedpact_server.run_state import RunContext, write_array

INFO = b"fedpact.deposit.v1"


def path(arrays: Path, digest: str) -> Path:
    """Where what was sealed is kept: by its digest, so that no other driver's attempt takes its place."""
    return arrays / f"deposit-{digest}.sealed"


def make(context: RunContext) -> list[ValidationDeposited]:
    """Seal the rows and keep that, durably; what is to be logged. Nothing where the contract names no auditor.

    An attempt whose entry was never logged leaves a file that nothing names.

    Raises:
        FaultError: the validation set is missing or damaged.
    """
    contract = context.contract
    if contract.auditor is None:
        return []
    rows = validation.load(context.home, contract.contribution.validation.root)
    data = pack_rows(rows.examples, rows.salts)
    made = sealed.seal(contract.auditor.encryption_key, data, info=INFO, aad=_place(contract))
    digest = sha256_hex(made)
    write_array(path(context.arrays, digest), made)
    return [ValidationDeposited(digest=digest, size=len(made))]


def unseal(data: bytes, key: X25519PrivateKey, contract: Contract) -> Examples:
    """The committed rows, out of what was sealed.

    Raises:
        FaultError: SEAL_BROKEN; DEPOSIT_ROWS, it holds no rows of this contract; DEPOSIT_ROOT, it holds others than
            the contract commits to.
    """
    inside = sealed.unseal(key, data, info=INFO, aad=_place(contract))
    try:
        examples, salts = unpack_rows(inside, feature_count(contract.data), target_type(contract.data.label))
        root = validation_root(examples, salts)
    except InputError as err:
        raise FaultError("DEPOSIT_ROWS", f"The deposit holds no validation rows: {err.message}") from err
    if root != contract.contribution.validation.root:
        raise FaultError(
            "DEPOSIT_ROOT",
            "The deposited rows are not those that the contract commits to.",
            rule="Merkle root of the salted rows = contribution.validation.root",
        )
    rows = sum(part.count for part in contract.contribution.validation.slices)
    fit = np.isfinite(examples.x).all() and task_of(contract.data.label).are_targets(examples.y)
    if len(examples) != rows or not fit:
        raise FaultError(
            "DEPOSIT_ROWS",
            f"The deposit does not hold {rows} finite rows with targets of the contract's label.",
            rule="its slices",
        )
    return examples


def _place(contract: Contract) -> bytes:
    return canonical_bytes({"contract": contract.id, "root": contract.contribution.validation.root})
