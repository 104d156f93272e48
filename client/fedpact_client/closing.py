"""Closing a period: the agent fetches the whole log, checks it against all that it saw, and countersigns or objects.

The closing checkpoint makes the settlement final for whoever countersigned it; so here the agent verifies what an
auditor would: every signature and proof, every score and fen, and that the log holds exactly its own replies.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NoReturn

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedpact_client.answer import Desk, open_contract
from fedpact_client.api import OperatorClient, contract_path, printable
from fedpact_client.home import AgentHome
from fedpact_client.order import EMPTY
from fedpact_client.signing import fetch_signed
from fedpact_client.store import EgressKind, SeenHead, Store
from fedpact_client.views import Seen, check_own, seen
from fedpact_contract.canonical import canonical_bytes, sha256_hex
from fedpact_contract.defended import said
from fedpact_contract.errors import FaultError, FedpactError, InputError
from fedpact_contract.evidence import CHECKPOINTS, FILES, unpack
from fedpact_contract.log import (
    Body,
    Checkpoint,
    Countersignature,
    Entry,
    PeriodClosing,
    StatementTaken,
    UnionConfirmed,
    UnionDeclared,
    UpdateDecided,
)
from fedpact_contract.messages import Head, Objection, Receipt
from fedpact_contract.output import counted
from fedpact_contract.record import open_signed, read_envelope, sign
from fedpact_contract.request import utc_now
from fedpact_contract.verify import verify

log = structlog.get_logger()

WAITING = "CLOSING_WAITS"
"""The code under which a person is told that a closing is to be countersigned by hand."""
QUESTION = "QUESTION_WAITS"
"""The code under which a person is told that the log asks this enterprise."""
SUBJECT = 12
"""Characters of a question's leaf hash by which people are told of it."""
MOST_QUESTIONS = 50
"""Of one contract that a person is told of in this way."""

Done = Literal["none", "waiting", "countersigned", "objected", "closed"]
"""Nothing to close yet; countersigned before; countersigned now; objected; final for everybody who is paid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """A closing checkpoint that fits everything this agent saw."""

    checkpoint: Checkpoint
    envelope: bytes
    concerns: tuple[tuple[str, str], ...] = ()  # (alarm, text): what no evidence disproves and a person should know


def close(desk: Desk, client: OperatorClient, verified: Closing | None = None) -> tuple[Done, Closing | None]:
    """Look whether the period is closing; check it and countersign, or object.

    Also where the operator calls it closed: whoever is paid nothing looks, too.

    Args:
        desk: The agent's side.
        client: The operator.
        verified: What this returned before: a closing that was verified is not verified again.

    Returns:
        What was done, and the closing that holds, if there is one.

    Raises:
        ServiceError: the operator does not answer; whatever was to be sent is sent at the next look.
        InputError: STORE_DAMAGED, this agent's own store cannot be read.
    """
    path = contract_path(desk.contract_id) + "/closing"
    state = client.get(path, contract_id=desk.contract_id)
    if state.get("state") not in ("closing", "closed"):
        _note_questions(desk, _names(state, "questions"))
        return "none", None
    if verified is None or verified.checkpoint.size != state.get("size"):
        answer = client.evidence(desk.contract_id)
        own = seen(desk.store, desk.contract_id)  # a fault of this store is no objection to the operator's log
        try:
            verified = check_closing(desk, own, as_files(answer))
        except (FaultError, InputError) as err:
            _object(desk, client, path, answer, err, told=_names(state, "objected"))
            return "objected", None
    if _countersigned(desk, verified) and desk.participant in _names(state, "signed"):
        return ("closed" if state["state"] == "closed" else "waiting"), verified
    _countersign(desk, client, path, verified)
    return "countersigned", verified


def by_hand(
    home: AgentHome, store: Store, client: OperatorClient, contract_id: str, key: Ed25519PrivateKey
) -> tuple[Done, Closing | None]:
    """`close`, by a person with the contract key, where the run key is revoked.

    Raises:
        RefusedError: CONTRACT_NOT_SIGNED.
        ServiceError, InputError, FaultError: as `close` and `signing.fetch_signed`.
    """
    contract, run_keys = open_contract(fetch_signed(client, contract_id), home.participant_id)

    def nothing(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("nothing is trained at a close")

    desk = Desk(
        store=store,
        contract=contract,
        contract_id=contract_id,
        participant=home.participant_id,
        run_keys=run_keys,
        run_key=key,
        policy=home.config().policy,
        entity=None,
        own_file=nothing,
        own_rows=nothing,
        train=nothing,
        now=utc_now,
    )
    return close(desk, client)


def note_waiting(store: Store, client: OperatorClient, contract_id: str, participant: str) -> Literal["open"] | None:
    """Tell a person, once, that a closing waits for the contract key, the run key being revoked.

    Raises:
        ServiceError, AnsweredInputError, AnsweredRefusedError: as `OperatorClient.get`.
    """
    state = client.get(contract_path(contract_id) + "/closing", contract_id=contract_id)
    if state.get("state") not in ("closing", "closed"):
        return "open"
    if participant in _names(state, "signed"):
        if state["state"] == "closed":
            store.set_state(contract_id, "closed")
        return None
    detail = f"the closing waits for the contract key: `fedpact-agent countersign {contract_id[:12]}`"
    if all((a.contract_id, a.detail) != (contract_id, detail) for a in store.alarms()):
        store.add_alarm(WAITING, contract_id, detail)
    return None


def as_files(answer: Mapping[str, object]) -> dict[str, bytes]:
    """The evidence files in the operator's answer; text that is no Unicode is found where it is read.

    Raises:
        FaultError: EVIDENCE_FILES, something else than texts under the names of the four files.
    """
    files = {name: text.encode(errors="surrogatepass") for name, text in answer.items() if isinstance(text, str)}
    if len(files) < len(answer) or not files.keys() <= set(FILES):
        raise FaultError("EVIDENCE_FILES", "The operator's evidence is not the four text files.", party="operator")
    return files


def check_closing(desk: Desk, own: Seen, files: Mapping[str, bytes]) -> Closing:
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
    if report.contract_id != desk.contract_id:
        raise FaultError("EVIDENCE_OTHER_CONTRACT", "The evidence is another contract's.", field="contract_id")
    missed = check_own(own, desk.participant, evidence)
    envelope = read_envelope(evidence.checkpoints[-1])
    operator_key = desk.run_keys[desk.contract.operator.id]
    checkpoint: Checkpoint = open_signed(envelope, Checkpoint, operator_key)
    if checkpoint.origin != desk.contract_id or checkpoint.size != len(evidence.log):
        raise FaultError("CLOSING_HEAD", "The last checkpoint does not cover the whole log of this contract.")
    entries = [Entry.from_bytes(line) for line in evidence.log]
    if entries[-1].type != PeriodClosing.TYPE:
        raise FaultError("CLOSING_HEAD", "The log does not end with the closing of a period.")
    bodies = [entry.open() for entry in entries]
    concerns = (
        *_missed(missed),
        *_rejected(bodies, desk.participant),
        *_unheard(desk, bodies),
        *_unasked(desk, entries),
    )
    return Closing(checkpoint=checkpoint, envelope=evidence.checkpoints[-1], concerns=concerns)


def _missed(rounds: Iterable[int]) -> Iterator[tuple[str, str]]:
    for number in rounds:
        yield "CLOSING_UPDATE_MISSED", f"the log says that this agent's update of round {number} never came"


def _rejected(bodies: Iterable[Body], participant: str) -> Iterator[tuple[str, str]]:
    """Rejections whose reason the log cannot show: the array itself."""
    for body in bodies:
        if isinstance(body, UpdateDecided) and body.participant == participant:
            receipt = Receipt.from_bytes(read_envelope(body.receipt).body)
            if receipt.decision == "rejected":
                yield (
                    "CLOSING_UPDATE_REJECTED",
                    f"this agent's update of round {body.round} was rejected: {receipt.code}",
                )


def _unheard(desk: Desk, bodies: Iterable[Body]) -> Iterator[tuple[str, str]]:
    """Answers of a person here that were sent and do not stand in the log: lost, refused, or left out."""
    sent = {e.sha256 for e in desk.store.egress(desk.contract_id, [EgressKind.STATEMENT])}
    for body in bodies:
        if isinstance(body, StatementTaken):
            sent.discard(sha256_hex(canonical_bytes({"statement": body.statement})))
    if sent:
        yield (
            "CLOSING_ANSWER_MISSED",
            f"{counted(len(sent), 'answer')} of this enterprise (`fedpact-agent egress --kind statement`) "
            f"{'is' if len(sent) == 1 else 'are'} not in the log: it never came, was refused, or was left out",
        )


def _unasked(desk: Desk, entries: Iterable[Entry]) -> Iterator[tuple[str, str]]:
    """Unions with this enterprise that were confirmed, and that no agent here was told of while it could dispute."""
    told = {a.detail.split(" ")[0]: a.at for a in desk.store.alarms() if a.code == QUESTION}
    declared: dict[tuple[str, ...], tuple[str, str]] = {}
    for entry in entries:
        body = entry.open()
        if isinstance(body, UnionDeclared):
            declared[body.members] = (entry.leaf_hash.hex()[:SUBJECT], body.until)
        elif isinstance(body, StatementTaken) and body.participant == desk.participant:
            told.setdefault(said(body.statement).subject[:SUBJECT], "")  # somebody here has answered
        elif isinstance(body, UnionConfirmed) and desk.participant in body.members and body.members in declared:
            subject, until = declared[body.members]
            if subject not in told or told[subject] >= until:
                others = sum(member != desk.participant for member in body.members)
                yield (
                    "CLOSING_UNION_UNASKED",
                    f"the log counts this enterprise and {counted(others, 'other')} as one (union {subject}); no agent "
                    f"here was told of it before {until}, until when it could be disputed",
                )


def _note_questions(desk: Desk, waiting: set[str]) -> None:
    """Tell a person, once each, that an entry of the log asks this enterprise; so many that nobody can flood it."""
    alarms = [a for a in desk.store.alarms() if a.code == QUESTION] if waiting else []
    told = {a.detail for a in alarms if a.contract_id == desk.contract_id}
    for subject in sorted(waiting)[: max(0, MOST_QUESTIONS - len(told))]:
        detail = f"{printable(subject, SUBJECT)} waits for an answer: `fedpact-agent questions {desk.contract_id[:12]}`"
        if detail not in told:
            desk.store.add_alarm(QUESTION, desk.contract_id, detail)
            log.warning("question waits", contract=desk.contract_id)


def _countersigned(desk: Desk, closing: Closing) -> bool:
    sizes = {head.size for head in desk.store.heads(desk.contract_id) if head.countersigned}
    return closing.checkpoint.size in sizes


def _countersign(desk: Desk, client: OperatorClient, path: str, closing: Closing) -> None:
    """Keep the head, mark it as countersigned, and only then send the countersignature; again the same one."""
    size, root = closing.checkpoint.size, closing.checkpoint.root
    told = {(a.code, a.contract_id, a.detail) for a in desk.store.alarms()}
    for code, text in closing.concerns:
        if (code, desk.contract_id, text) not in told:
            desk.store.add_alarm(code, desk.contract_id, text, closing.envelope)
    desk.store.add_heads(desk.contract_id, [SeenHead(size=size, root=root, checkpoint=closing.envelope)])
    desk.store.countersign(desk.contract_id, size, root)
    record = Countersignature(origin=desk.contract_id, size=size, root=root, participant=desk.participant)
    body = {"countersignature": sign(record, desk.run_key).plain()}
    client.post(path, body, EgressKind.COUNTERSIGNATURE, contract_id=desk.contract_id)
    log.info("closing countersigned", contract=desk.contract_id, size=size)


def _object(
    desk: Desk, client: OperatorClient, path: str, answer: Mapping[str, object], err: FedpactError, *, told: set[str]
) -> None:
    """Keep what was shown as an alarm, and say no with a fixed code: once for each thing that is wrong."""
    evidence, head = _shown(answer)
    new = (err.code, desk.contract_id, evidence)
    if all((a.code, a.contract_id, a.evidence) != new for a in desk.store.alarms()):
        desk.store.add_alarm(err.code, desk.contract_id, str(err), evidence)
        log.error("closing objected", contract=desk.contract_id, code=err.code, reason=str(err))
    elif desk.participant in told:
        return
    record = Objection(
        contract_id=desk.contract_id, size=head.size, root=head.root, participant=desk.participant, code=err.code
    )
    body = {"objection": sign(record, desk.run_key).plain()}
    client.post(path, body, EgressKind.OBJECTION, contract_id=desk.contract_id)


def _shown(answer: Mapping[str, object]) -> tuple[bytes | None, Head]:
    """The last checkpoint in the answer, as bytes and as a head; none, and the empty log, where it is not readable."""
    try:
        line = as_files(answer).get(CHECKPOINTS, b"").splitlines()[-1]
        checkpoint = Checkpoint.from_bytes(read_envelope(line).body)
    except (IndexError, FaultError, InputError):
        return None, EMPTY
    return line, Head(size=checkpoint.size, root=checkpoint.root)


def _names(state: Mapping[str, object], key: str) -> set[str]:
    """A list of participants in the operator's answer."""
    value = state.get(key)
    return {name for name in value if isinstance(name, str)} if isinstance(value, list) else set()
