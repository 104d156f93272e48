"""One party's signed word outside the log: that the operator was silent, or what was destroyed at a withdrawal.

Whoever has no log verifies it with the contract that everybody signed; the agent keeps that beside the record. Proved
is whose word it is, and what the operator itself had signed by then. That it is true is not, and the report says so.
"""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedpact_contract.canonical import parse_canonical
from fedpact_contract.contract import Contract, Party, SignedContract
from fedpact_contract.errors import FaultError, FedpactError, InputError
from fedpact_contract.log import Checkpoint
from fedpact_contract.merkle import EMPTY_ROOT
from fedpact_contract.messages import DestructionReceipt, Found, Held, OperatorSilent, Receipt, RoundDigest
from fedpact_contract.parties import Parties, inside, opened, parties_of
from fedpact_contract.record import Envelope, read_envelope
from fedpact_contract.request import instant, parse_instant
from fedpact_contract.trust import Role, Trust

MAX_BYTES = 1 << 24
"""Beyond this a file is no signed record, and no contract."""

Said = OperatorSilent | DestructionReceipt

KINDS: Mapping[str, type[OperatorSilent] | type[DestructionReceipt]] = {
    OperatorSilent.media_type(): OperatorSilent,
    DestructionReceipt.media_type(): DestructionReceipt,
}
"""The records that are verified outside a log, by the type that an envelope names."""

VERIFIED = (0, "VERIFIED, and authenticated by the trust file: one party's word, and whose.")
NOT_AUTHENTICATED = (3, "RIGHTLY SIGNED, NOT AUTHENTICATED: no trust file was given, so all of it may be invented.")
PARTLY = (4, "PARTLY AUTHENTICATED: no fault was found; the notes name what rests on which key.")
"""Exit codes, and what they mean."""

_MET: Mapping[Found, str] = {
    "away": "the operator did not answer",
    "open": "the operator showed no closing",
    "objected": "the operator showed a closing that did not hold",
}
_REMEDY = "An agent keeps such records, each with its contract, in `silence` and `withdrawn` of its home."


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """What verifying one record found; where there is a fault, it proves nothing, and `record` is None.

    `exit_code`: as for evidence. `by`: who signed it. `proves` and `leaves_open` are sentences. A fault has code,
    message, file, and where there are any, field, party, rule and remedy.
    """

    exit_code: int
    verdict: str
    type: str
    contract_id: str | None
    title: str | None
    by: str | None = None
    record: dict[str, Any] | None = None
    proves: tuple[str, ...] = ()
    leaves_open: tuple[str, ...] = ()
    faults: tuple[dict[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        lists = {name: list(getattr(self, name)) for name in ("proves", "leaves_open", "faults", "notes")}
        return {name: getattr(self, name) for name in self.__slots__} | lists


def close_due(contract: Contract) -> datetime.datetime:
    """When a contract must be closed: the end of its term, and `close_days` more; until then it may be trained.

    Raises:
        InputError: INSTANT_FORM, the term names no moment.
    """
    try:
        return parse_instant(contract.term.not_after) + datetime.timedelta(days=contract.settlement.close_days)
    except OverflowError:  # a contract of millions of years is never overdue
        return datetime.datetime.max.replace(tzinfo=datetime.UTC)


def verify_record(record: Path, contract: Path, trust: Trust | None) -> Word:
    """Verify a record in one file with the signed contract in another.

    Raises:
        InputError: a wrong file: RECORD_MISSING, RECORD_UNREADABLE, RECORD_SIZE, RECORD_FORM, SIGNED_CONTRACT_FORM.
    """
    envelope = _record(_bytes(record), record)
    parties, faults = parties_of(_contract(_bytes(contract), contract))
    if parties is not None and trust is not None:
        faults += trust.contradictions(parties.contract, file=contract, field="contract")
    file, body = contract, None
    if parties is not None and not faults:
        file = record
        body, faults = _judged(envelope, parties)
    for fault in faults:
        fault.file = str(file)
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    word = Word(
        exit_code=1,
        verdict=f"FAULT: {count} found; this record proves nothing.",
        type=KINDS[envelope.type].TYPE,
        contract_id=parties.contract.id if parties else None,
        title=parties.contract.title if parties else None,
        faults=tuple(fault.as_dict() for fault in faults),
    )
    if faults or body is None or parties is None:
        return word
    notes = () if trust is None else tuple(_missing(body, parties.contract, trust))
    exit_code, verdict = NOT_AUTHENTICATED if trust is None else PARTLY if notes else VERIFIED
    return replace(
        word,
        exit_code=exit_code,
        verdict=verdict,
        by=_who(_signer(body, parties)),
        record=body.plain(),
        proves=tuple(_proves(body, parties)),
        leaves_open=tuple(_leaves_open(body, parties)),
        notes=notes,
    )


def _bytes(path: Path) -> bytes:
    """A file's bytes. A pipe or a device, which might never end, is no file."""
    if not path.is_file():
        raise InputError("RECORD_MISSING", "There is no file here.", file=path, remedy=_REMEDY)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as err:
        raise InputError("RECORD_UNREADABLE", f"The file cannot be read: {err.strerror}.", file=path) from err
    if len(data) > MAX_BYTES:
        message = f"The file is larger than {MAX_BYTES >> 20} MiB: it is no signed record, and no contract."
        raise InputError("RECORD_SIZE", message, file=path, remedy=_REMEDY)
    return data.removesuffix(b"\n")


def _record(data: bytes, file: Path) -> Envelope[Any]:
    rule = f"a signed record of one of the types {', '.join(kind.TYPE for kind in KINDS.values())}"
    try:
        envelope = read_envelope(data)
    except InputError as err:
        message = f"The wrong file, or a damaged one: {err.message}"
        raise InputError("RECORD_FORM", message, file=file, field=err.field, rule=rule, remedy=_REMEDY) from err
    if envelope.type not in KINDS:
        message = f"The wrong file: it is a signed {envelope.type}, which is verified in its log, if at all."
        raise InputError("RECORD_FORM", message, file=file, field="type", rule=rule, remedy=_REMEDY)
    return envelope


def _contract(data: bytes, file: Path) -> SignedContract:
    try:
        return SignedContract.parse(parse_canonical(data, what="contract"), code="SIGNED_CONTRACT")
    except InputError as err:
        message = f"The wrong file, or a damaged one: {err.message}"
        rule = "the contract as it travels: with everybody's signatures and delegations"
        raise InputError(
            "SIGNED_CONTRACT_FORM", message, file=file, field=err.field, rule=rule, remedy=_REMEDY
        ) from err


def _judged(envelope: Envelope[Any], parties: Parties) -> tuple[Said | None, list[FaultError]]:
    """The record, and every fault of it; None where it is not what its signer signed about this contract."""
    try:
        body = KINDS[envelope.type].from_bytes(envelope.body)
        _check_place(body, parties.contract)
    except FedpactError as err:
        return None, [inside(err, "")]
    name = parties.name(_signer(body, parties).id)
    try:
        opened(envelope, KINDS[envelope.type], _key(envelope, body, parties))
        found = _silence(body, parties, name) if isinstance(body, OperatorSilent) else _destruction(body, parties, name)
        return body, list(found)
    except FedpactError as err:
        return None, [inside(err, "", name)]


def _check_place(body: Said, contract: Contract) -> None:
    rule = "a record is of the contract that it is verified with, and about a participant of it"
    if body.contract_id != contract.id:
        message = f"It is of the contract {body.contract_id}; the one given is {contract.id}."
        raise FaultError("RECORD_CONTRACT", message, field="contract_id", rule=rule)
    if body.participant not in contract.by_id():
        message = "It is about somebody who is no participant of the contract."
        raise FaultError("RECORD_PARTICIPANT", message, field="participant", party=body.participant, rule=rule)


def _signer(body: Said, parties: Parties) -> Party:
    contract = parties.contract
    if isinstance(body, DestructionReceipt) and body.by == "operator":
        return contract.operator
    return contract.participant(body.participant)


def _key(envelope: Envelope[Any], body: Said, parties: Parties) -> str:
    """The run key; of a participant's receipt also its contract key, which signs once the run key is revoked."""
    party = _signer(body, parties)
    may = isinstance(body, DestructionReceipt) and body.by == "participant"
    if may and any(signature.key == party.key for signature in envelope.signatures):
        return party.key
    return parties.run_keys[party.id]


def _silence(body: OperatorSilent, parties: Parties, name: str) -> Iterator[FaultError]:
    """Its dates are those of the contract, and what stands in it the operator signed."""
    due = instant(close_due(parties.contract))
    if body.due != due:
        message, rule = f"A closing was due by {due}, not by {body.due}.", "the end of the term, and `close_days` more"
        yield FaultError("SILENCE_DUE", message, field="due", party=name, rule=rule)
    try:
        if parse_instant(body.at) < close_due(parties.contract):
            message, rule = "The complaint is of a time before a closing was due.", "`at` is not before `due`"
            yield FaultError("SILENCE_EARLY", message, field="at", party=name, rule=rule)
    except InputError as err:
        yield inside(err, "at", name)
    yield from _head_shown(body, parties, name)
    if body.receipt is not None:
        yield from _receipt_shown(body.receipt, body, parties, name)


def _head_shown(body: OperatorSilent, parties: Parties, name: str) -> Iterator[FaultError]:
    shown = (parties.contract.id, 0, EMPTY_ROOT.hex())
    try:
        if body.checkpoint is not None:
            checkpoint = opened(body.checkpoint, Checkpoint, parties.operator_key)
            shown = (checkpoint.origin, checkpoint.size, checkpoint.root)
    except FedpactError as err:
        yield inside(err, "checkpoint", name)
        return
    if shown != (parties.contract.id, body.head.size, body.head.root):
        message = "The head is not the one that the operator's checkpoint signs."
        rule = "the head is the checkpoint's; without one it is the empty log's"
        yield FaultError("SILENCE_HEAD", message, field="head", party=name, rule=rule)


def _receipt_shown(
    envelope: Envelope[Receipt], body: OperatorSilent, parties: Parties, name: str
) -> Iterator[FaultError]:
    try:
        receipt = opened(envelope, Receipt, parties.operator_key)
    except FedpactError as err:
        yield inside(err, "receipt", name)
        return
    if (receipt.contract_id, receipt.participant) != (parties.contract.id, body.participant) or not body.checkpoint:
        message = "The receipt is another's, or came without a checkpoint."
        rule = "an order shows the receipt for the participant's own update, and the checkpoint that covers it"
        yield FaultError("SILENCE_RECEIPT", message, field="receipt", party=name, rule=rule)


def _destruction(body: DestructionReceipt, parties: Parties, name: str) -> Iterator[FaultError]:
    """Its rounds are the contract's; models are the operator's to name, from the first update on."""
    planned = parties.contract.training.rounds
    for field, listed in (("updates", body.updates), ("models", body.models)):
        numbers = [item.round for item in listed]
        if numbers != sorted(set(numbers)) or max(numbers, default=0) > planned:
            rule = f"each round once, in order, of the contract's {planned}"
            message = f"The {field} are not of so many rounds, each once."
            yield FaultError(f"DESTRUCTION_{field.upper()}", message, field=field, party=name, rule=rule)
    if body.models and (body.by == "participant" or not body.updates or body.models[0].round < body.updates[0].round):
        rule = "the operator names the models since the participant's first update"
        message = "Models are named that no update of the participant's is in."
        yield FaultError("DESTRUCTION_MODELS", message, field="models", party=name, rule=rule)


def _proves(body: Said, parties: Parties) -> Iterator[str]:
    contract, name = parties.contract, _who(_signer(body, parties))
    if isinstance(body, DestructionReceipt):
        yield f"{name} signed that it destroyed {_held(body.destroyed)}, and that it keeps {_held(body.kept)}."
        models = f", and the models of {_listed(body.models)}" if body.by == "operator" else ""
        yield f"It names the updates of {parties.name(body.participant)} in {_listed(body.updates)}{models}."
        return
    yield f"{name} signed that {_MET[body.found]} when it asked for one at {body.at}, by its own clock."
    term = f"the contract's term ended at {contract.term.not_after}, and had {contract.settlement.close_days} days more"
    yield f"A closing was due by {body.due}: {term}."
    if body.checkpoint is not None:
        head = f"the log's {body.head.size} entries, root {body.head.root}"
        yield f"The operator had signed {head}: every log of this contract must begin with them."
    if body.receipt is not None:
        receipt = Receipt.from_bytes(body.receipt.body)
        yield (
            f"The operator had signed that the update {receipt.update_digest} of round {receipt.round} was "
            f"{receipt.decision} ({receipt.code})."
        )


def _leaves_open(body: Said, parties: Parties) -> Iterator[str]:
    operator, participant = parties.contract.operator.name, parties.name(body.participant)
    if isinstance(body, DestructionReceipt):
        yield f"It is one party's word, {_signer(body, parties).name}'s: nothing shows that anything was destroyed."
        yield (
            f"Whether {participant} withdrew, and whether these are all of its updates and their models, the log alone "
            "shows: `fedpact verify EVIDENCE`."
        )
        return
    yield f"It is one party's word, {participant}'s: {operator} may say that it answered, and that it closed in time."
    yield (
        "Whether a closing came later, or the key that signed was revoked before, the log alone shows: "
        "`fedpact verify EVIDENCE`."
    )


def _listed(items: Sequence[RoundDigest]) -> str:
    if not items:
        return "no round"
    return f"{'round' if len(items) == 1 else 'rounds'} {', '.join(str(item.round) for item in items)}"


def _held(things: Sequence[Held]) -> str:
    said = (f"{thing.count} {thing.kind}" + (f" ({thing.reason})" if thing.reason else "") for thing in things)
    return ", ".join(said) or "nothing"


def _who(party: Party) -> str:
    return f"{party.name} ({party.entity_code})"


def _missing(body: Said, contract: Contract, trust: Trust) -> Iterator[str]:
    """The keys that the trust file lacks, of the two parties that it is about."""
    role: Role
    for role, party in (("participant", contract.participant(body.participant)), ("operator", contract.operator)):
        if not trust.knows(role, party):
            yield f"It rests on the key {party.id} of {_who(party)}, whom the trust file does not name as {role}."
