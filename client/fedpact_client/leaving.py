"""What this enterprise tells the operator of its own taking part: paused, back, withdrawn; its run key revoked.

Everything takes effect here first, with no word from outside. Telling is repeated until the operator's log has it.
"""

import time
from collections.abc import Callable
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedpact_client.answer import open_contract
from fedpact_client.api import (
    AnsweredInputError,
    AnsweredRefusedError,
    OperatorClient,
    contract_path,
    reply_error,
)
from fedpact_client.home import AgentHome
from fedpact_client.signing import fetch_signed, keep_beside
from fedpact_client.store import STATE_CODES, Agreement, EgressKind, Store
from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.errors import RefusedError, ServiceError
from fedpact_contract.files import replace_file
from fedpact_contract.messages import DestructionReceipt, Held, KeyRevocation, Notice, RoundDigest, TakingPart
from fedpact_contract.record import Envelope, open_signed, read_envelope, sign

GUARD_SECONDS = 10.0
RESUMED = "PARTICIPANT_RESUMED"
HOURS = "POLICY_HOURS"
EVIDENCE, BUDGET, CLOSING = "SIGNED_EVIDENCE", "BUDGET_LEDGER", "SIGNS_THE_CLOSING"
"""Why something is kept at a withdrawal."""


def said_of(agreement: Agreement, *, in_hours: bool) -> tuple[TakingPart, str] | None:
    """What is to be said of a contract now, and why, in a fixed word; nothing of one that is closed, or not begun."""
    if agreement.state in ("signed", "closed"):
        return None
    if agreement.state in STATE_CODES:
        state: TakingPart = "paused" if agreement.state == "paused" else "withdrawn"
        return state, STATE_CODES[agreement.state]
    return ("running", RESUMED) if in_hours else ("paused", HOURS)


def tell(
    store: Store,
    client: OperatorClient,
    agreement: Agreement,
    participant: str,
    said: tuple[TakingPart, str],
    key: Ed25519PrivateKey,
) -> None:
    """Sign a notice and send it. Its number is never used twice: the egress ledger counts them.

    Raises:
        ServiceError: the operator does not answer.
        AnsweredInputError, AnsweredRefusedError: it does not take it.
    """
    contract_id = agreement.contract_id
    notice = Notice(
        contract_id=contract_id,
        participant=participant,
        number=store.count_egress(EgressKind.NOTICE, contract_id) + 1,
        state=said[0],
        code=said[1],
    )
    body = {"notice": sign(notice, key).plain()}
    client.post(_path(contract_id), body, EgressKind.NOTICE, contract_id=contract_id)


def revoke(home: AgentHome, store: Store, contract_id: str, passphrase: bytes) -> None:
    """Sign and keep the revocation of a contract's run key; from here on this agent answers no order of it.

    Raises:
        InputError: CONTRACT_UNKNOWN, a wrong passphrase.
        RefusedError: KEY_REVOCATION, the contract is over.
    """
    agreement = store.contract(contract_id)
    path = home.revocation_path(contract_id)
    if path.exists():
        return
    if agreement.state == "closed":
        raise RefusedError("KEY_REVOCATION", "The contract is closed: its run key signs nothing any more.")
    key = home.load_contract_key(passphrase)
    record = KeyRevocation(contract_id=contract_id, participant=home.participant_id, run_key=agreement.run_public)
    if agreement.state != "withdrawn":
        store.set_state(contract_id, "paused")
    replace_file(path, sign(record, key).to_bytes())


def send_revocation(home: AgentHome, client: OperatorClient, contract_id: str) -> int:
    """Send a revocation that is kept here; the index of its entry in the log.

    Raises:
        ServiceError, AnsweredInputError, AnsweredRefusedError: as `tell`.
    """
    envelope = read_envelope(home.revocation_path(contract_id).read_bytes())
    body = {"revocation": envelope.plain()}
    answer = client.post(_path(contract_id), body, EgressKind.REVOCATION, contract_id=contract_id)
    index = answer.get("index")
    if not isinstance(index, int):
        raise reply_error("a revocation was taken without the index of its entry")
    return index


def destroy(
    home: AgentHome, store: Store, contract_id: str, key: Ed25519PrivateKey, end_trainer: Callable[[], bool]
) -> Envelope[DestructionReceipt]:
    """Destroy what was made for a contract that this enterprise has withdrawn from; once. The signed receipt.

    Args:
        home: Gets the receipt as a file.
        store: Loses the arrays of updates and measurements.
        contract_id: The contract.
        key: Signs.
        end_trainer: Ends the process that holds encoded rows; whether this agent has one.

    Raises:
        FailedError, OSError: the disk does not take it; the same may be done again.
    """
    path = home.receipt_path(contract_id, "participant")
    if path.exists():
        return read_envelope(path.read_bytes())
    trainers, arrays = int(end_trainer()), store.destroy_arrays(contract_id)
    rows = [row for row in store.rows(store.contract(contract_id).terms.data_set) if row.contract_id == contract_id]
    receipt = DestructionReceipt(
        contract_id=contract_id,
        participant=home.participant_id,
        by="participant",
        destroyed=(
            Held(kind="arrays-in-the-outbox", count=arrays),
            Held(kind="trainers-with-encoded-rows", count=trainers),
        ),
        kept=(
            Held(kind="replies-and-digests", count=len(store.answers(contract_id)), reason=EVIDENCE),
            Held(kind="ledger-rows", count=len(rows), reason=BUDGET),
            Held(kind="run-keys", count=1, reason=CLOSING),
        ),
        updates=tuple(RoundDigest(round=n, digest=d) for n, d in sorted(store.sent_updates(contract_id).items())),
    )
    envelope = sign(receipt, key)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    replace_file(path, envelope.to_bytes())
    keep_beside(path, contract_id, store.contract(contract_id).signed)
    return envelope


def withdraw(
    home: AgentHome,
    store: Store,
    client: OperatorClient,
    contract_id: str,
    key: Ed25519PrivateKey,
    receipt: Envelope[DestructionReceipt],
) -> None:
    """Tell the operator of a withdrawal, send our receipt and keep the operator's.

    Raises:
        ServiceError, AnsweredInputError, AnsweredRefusedError: as `tell`.
        FaultError: the operator's receipt is not signed by its run key.
    """
    tell(store, client, store.contract(contract_id), home.participant_id, ("withdrawn", STATE_CODES["withdrawn"]), key)
    body = {"receipt": receipt.plain()}
    client.post(_path(contract_id), body, EgressKind.RECEIPT, contract_id=contract_id)
    answer = client.get(_path(contract_id), contract_id=contract_id).get("receipts")
    for plain in answer if isinstance(answer, list) else ():
        envelope = read_envelope(plain)
        record = DestructionReceipt.from_bytes(envelope.body)
        if (record.contract_id, record.participant, record.by) == (contract_id, home.participant_id, "operator"):
            signed = fetch_signed(client, contract_id)
            contract, run_keys = open_contract(signed, home.participant_id)
            open_signed(envelope, DestructionReceipt, run_keys[contract.operator.id])
            path = home.receipt_path(contract_id, "operator")
            replace_file(path, envelope.to_bytes())
            keep_beside(path, contract_id, canonical_bytes(signed.plain()))


def try_to_withdraw(
    home: AgentHome,
    store: Store,
    connect: Callable[[], OperatorClient],
    contract_id: str,
    key: Ed25519PrivateKey,
    receipt: Envelope[DestructionReceipt],
) -> str | None:
    """`withdraw`, where the operator answers; else why not: it is told by the next agent that runs here."""
    try:
        with connect() as client:
            withdraw(home, store, client, contract_id, key, receipt)
    except (ServiceError, AnsweredInputError, AnsweredRefusedError) as err:
        return err.code
    return None


def wait_for_guard(home: AgentHome, contract_id: str) -> None:
    """Wait some seconds for the running agent to do what a withdrawal asks for; what it has not done then, it will."""
    deadline = time.monotonic() + GUARD_SECONDS
    while time.monotonic() < deadline and not home.receipt_path(contract_id, "operator").exists():
        time.sleep(0.1)


def receipts(home: AgentHome, contract_id: str) -> dict[str, Any]:
    """What each side destroyed and keeps, as far as it is here."""
    found: dict[str, Any] = {"participant": None, "operator": None}
    sides: tuple[Literal["participant", "operator"], ...] = ("participant", "operator")
    for by in sides:
        path = home.receipt_path(contract_id, by)
        if path.exists():
            record = DestructionReceipt.from_bytes(read_envelope(path.read_bytes()).body)
            found[by] = record.plain() | {"file": str(path)}
    return found


def signing_key(home: AgentHome, contract_id: str, passphrase: Callable[[], bytes]) -> Ed25519PrivateKey:
    """What signs for this enterprise beside its replies: the run key, once that is revoked the contract key.

    Raises:
        InputError: a wrong passphrase, or the key is missing.
    """
    if home.revocation_path(contract_id).exists():
        return home.load_contract_key(passphrase())
    return home.run_key(contract_id)


def check_resumable(home: AgentHome, contract_id: str) -> None:
    """A contract whose run key is revoked does not go on here.

    Raises:
        RefusedError: KEY_REVOKED.
    """
    if home.revocation_path(contract_id).exists():
        raise RefusedError(
            "KEY_REVOKED",
            "The run key of this contract is revoked: nothing more is trained under it.",
            rule="a contract has one run key of each party",
            remedy="A new contract has a new run key.",
        )


def _path(contract_id: str) -> str:
    return contract_path(contract_id) + "/standing"
