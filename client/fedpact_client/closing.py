"""Closing a period: the agent fetches the whole log, checks it against all that it saw, and countersigns or objects.

The closing checkpoint makes the settlement final for whoever countersigned it; so here the agent verifies what an
auditor would: every signature and proof, every score and fen, and that the log holds exactly its own replies.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from fedpact_client.answer import Desk
from fedpact_client.api import OperatorClient
from fedpact_client.store import EgressKind, SeenHead
from fedpact_client.views import check_own
from fedpact_contract.errors import FaultError, FedpactError, InputError, ServiceError
from fedpact_contract.evidence import unpack
from fedpact_contract.log import Checkpoint, Countersignature, Entry, PeriodClosing
from fedpact_contract.messages import Objection
from fedpact_contract.record import open_signed, read_envelope, sign
from fedpact_contract.request import API
from fedpact_contract.verify import verify

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """A closing checkpoint that fits everything this agent saw."""

    checkpoint: Checkpoint
    envelope: bytes


def close(desk: Desk, client: OperatorClient) -> str:
    """Look whether the period is closing; check it and countersign, or object. Returns what was done.

    "none": nothing to close yet; "waiting": countersigned already; "countersigned"; "objected"; "closed".

    Raises:
        ServiceError: the operator does not answer.
    """
    path = f"{API}/contracts/{desk.contract_id}/closing"
    state = client.get(path, contract_id=desk.contract_id)
    if state.get("state") not in ("closing", "closed"):
        return "none"
    signed = {head.size for head in desk.store.heads(desk.contract_id) if head.countersigned}
    if state.get("state") == "closed" or state.get("size") in signed:
        return "closed" if state.get("state") == "closed" else "waiting"
    files = fetch_evidence(client, desk.contract_id)
    try:
        closing = check_closing(desk, files)
    except FedpactError as err:
        return _object(desk, client, files, err)
    head = SeenHead(size=closing.checkpoint.size, root=closing.checkpoint.root, checkpoint=closing.envelope)
    desk.store.add_heads(desk.contract_id, [head])
    desk.store.countersign(desk.contract_id, head.size, head.root)
    record = Countersignature(origin=desk.contract_id, size=head.size, root=head.root, participant=desk.participant)
    body = {"countersignature": sign(record, desk.run_key).plain()}
    client.post(path, body, EgressKind.COUNTERSIGNATURE, contract_id=desk.contract_id)
    log.info("closing countersigned", contract=desk.contract_id, size=head.size)
    return "countersigned"


def fetch_evidence(client: OperatorClient, contract_id: str) -> dict[str, bytes]:
    """The evidence files as the operator serves them.

    Raises:
        ServiceError: the answer is not of that form.
    """
    answer = client.evidence(contract_id)
    if not all(isinstance(k, str) and isinstance(v, str) for k, v in answer.items()):
        raise ServiceError("OPERATOR_ANSWER", "The operator's evidence is not of the agreed form.")
    return {name: text.encode() for name, text in answer.items()}


def check_closing(desk: Desk, files: Mapping[str, bytes]) -> Closing:
    """The closing checkpoint, if the evidence is sound and holds all that this agent saw.

    Raises:
        FaultError: the first thing that is wrong.
        InputError: the files are malformed.
    """
    evidence = unpack(files)
    report = verify(evidence, None, privacy=False)  # the plan's epsilon was recomputed before this agent signed
    if report.faults:
        first = report.faults[0]
        raise FaultError(first["code"], first["message"], field=first.get("field"), party=first.get("party"))
    check_own(desk.store, desk.participant, desk.contract_id, evidence)
    envelope = read_envelope(evidence.checkpoints[-1])
    operator_key = desk.run_keys[desk.contract.operator.id]
    checkpoint: Checkpoint = open_signed(envelope, Checkpoint, operator_key)
    if checkpoint.origin != desk.contract_id or checkpoint.size != len(evidence.log):
        raise FaultError("CLOSING_HEAD", "The last checkpoint does not cover the whole log of this contract.")
    if Entry.from_bytes(evidence.log[-1]).type != PeriodClosing.TYPE:
        raise FaultError("CLOSING_HEAD", "The log does not end with the closing of a period.")
    return Closing(checkpoint=checkpoint, envelope=evidence.checkpoints[-1])


def _object(desk: Desk, client: OperatorClient, files: Mapping[str, bytes], err: FedpactError) -> str:
    """Keep what was shown as an alarm, and say no with a fixed code."""
    checkpoint = _last_checkpoint(files)
    desk.store.add_alarm(err.code, desk.contract_id, str(err), checkpoint)
    log.error("closing objected", contract=desk.contract_id, code=err.code, reason=str(err))
    if checkpoint is None:
        return "objected"
    shown: dict[str, Any] = Checkpoint.from_bytes(read_envelope(checkpoint).body).plain()
    record = Objection(
        contract_id=desk.contract_id,
        size=shown["size"],
        root=shown["root"],
        participant=desk.participant,
        code=err.code,
    )
    path = f"{API}/contracts/{desk.contract_id}/closing"
    body = {"objection": sign(record, desk.run_key).plain()}
    client.post(path, body, EgressKind.OBJECTION, contract_id=desk.contract_id)
    return "objected"


def _last_checkpoint(files: Mapping[str, bytes]) -> bytes | None:
    lines = files.get("checkpoints.jsonl", b"").splitlines()
    try:
        return lines[-1] if lines and read_envelope(lines[-1]) else None
    except InputError:
        return None
