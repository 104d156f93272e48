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
from fedpact_contract import merkle
from fedpact_contract.errors import FaultError, FedpactError, InputError, ServiceError
from fedpact_contract.evidence import Evidence, unpack
from fedpact_contract.log import Checkpoint, Countersignature, Entry, PeriodClosing, UpdateDecided, UpdateRefused
from fedpact_contract.messages import Objection, Update
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
    check_own(desk, evidence)
    envelope = read_envelope(evidence.checkpoints[-1])
    operator_key = desk.run_keys[desk.contract.operator.id]
    checkpoint: Checkpoint = open_signed(envelope, Checkpoint, operator_key)
    if checkpoint.origin != desk.contract_id or checkpoint.size != len(evidence.log):
        raise FaultError("CLOSING_HEAD", "The last checkpoint does not cover the whole log of this contract.")
    if Entry.from_bytes(evidence.log[-1]).type != PeriodClosing.TYPE:
        raise FaultError("CLOSING_HEAD", "The log does not end with the closing of a period.")
    return Closing(checkpoint=checkpoint, envelope=evidence.checkpoints[-1])


def check_own(desk: Desk, evidence: Evidence) -> None:
    """Every head that this agent saw is a prefix of the log, and the log holds exactly its own replies.

    Raises:
        FaultError: CLOSING_FORK, STATEMENT_RECEIPT_MISSING, STATEMENT_RECEIPT_WRONG.
    """
    hashes = [merkle.leaf_hash(line) for line in evidence.log]
    for head in desk.store.heads(desk.contract_id):
        if head.size > len(hashes) or merkle.root(hashes[: head.size]).hex() != head.root:
            raise FaultError(
                "CLOSING_FORK", "A head that this agent saw is not in the closing log.", field=f"size {head.size}"
            )
    logged, refused, missed = _own_entries(desk, evidence)
    for number, digest in desk.store.sent_updates(desk.contract_id).items():
        if logged.get(number, digest) != digest:
            raise FaultError(
                "STATEMENT_RECEIPT_WRONG", "The log holds another update than this agent sent.", field=f"round {number}"
            )
        if number not in logged and number not in missed:
            raise FaultError(
                "STATEMENT_RECEIPT_MISSING", "The log says nothing of this agent's update.", field=f"round {number}"
            )
    for number in logged.keys() - desk.store.sent_updates(desk.contract_id).keys():
        raise FaultError(
            "STATEMENT_RECEIPT_WRONG", "The log holds an update that this agent never sent.", field=f"round {number}"
        )
    answered = set(desk.store.answers(desk.contract_id))
    for number in refused - answered:
        raise FaultError(
            "STATEMENT_RECEIPT_WRONG", "The log holds a refusal that this agent never sent.", field=f"round {number}"
        )


def _own_entries(desk: Desk, evidence: Evidence) -> tuple[dict[int, str], set[int], set[int]]:
    logged: dict[int, str] = {}
    refused: set[int] = set()
    missed: set[int] = set()
    for line in evidence.log:
        entry = Entry.from_bytes(line)
        if entry.body.get("participant") != desk.participant:
            continue
        number = int(entry.body["round"])
        if entry.type == UpdateDecided.TYPE:
            logged[number] = Update.from_bytes(read_envelope(entry.body["update"]).body).update_digest
        elif entry.type == UpdateRefused.TYPE:
            refused.add(number)
        else:
            missed.add(number)
    return logged, refused, missed


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
