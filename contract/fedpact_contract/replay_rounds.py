"""The entries of a round: opened, one outcome for each invited participant, aggregated or abandoned.

Before the first stands the deposit for the auditor. Each function yields what is wrong with its entry and then takes it
into the state.
"""

import struct

from fedpact_contract.arrays import update_digest
from fedpact_contract.contract import ClientPrivacy
from fedpact_contract.ledger import GENESIS
from fedpact_contract.log import (
    MeasurementTaken,
    ReplyMissed,
    RoundAbandoned,
    RoundAggregated,
    RoundDiscarded,
    RoundOpened,
    UpdateDecided,
    UpdateRefused,
    ValidationDeposited,
)
from fedpact_contract.measured import sums_of
from fedpact_contract.messages import (
    Head,
    Measurement,
    Metering,
    Receipt,
    Refusal,
    Update,
    measurement_event,
    update_event,
)
from fedpact_contract.output import counted
from fedpact_contract.parties import Place
from fedpact_contract.replay_defences import clips, unions_in_time
from fedpact_contract.replay_leaving import after_revocation, away
from fedpact_contract.replay_state import Faults, Round, Run, differing, open_inside
from fedpact_contract.statistics import can_be_noised, total_cells

STOPPED = "RUN_STOPPED"
"""The code of a round that the operator gave up when it stopped the run: that may be at any time."""
NOT_FINITE = "EVALUATION_NOT_FINITE"
"""The code of a round that is given up: a loss is no number."""

MOVES = "a charge is a row of the ledger, and moves its head"


def validation_deposited(run: Run, place: Place, body: ValidationDeposited) -> Faults:
    """The contract names an auditor, and its deposit is made once, before the first round."""
    operator = run.parties.contract.operator.name
    if run.parties.contract.auditor is None:
        yield place.fault("DEPOSIT_WITHOUT_AUDITOR", "The contract names no auditor to deposit rows for.")
    if run.deposited is not None:
        message = "The validation rows are deposited a second time."
        yield place.fault("DEPOSIT_TWICE", message, party=operator, rule="one validation set a contract")
    elif run.rounds:
        message = "The validation rows are deposited after the first round was opened."
        yield place.fault("DEPOSIT_LATE", message, party=operator, rule="deposited before round 1")
    run.deposited = run.deposited or body


def round_opened(run: Run, place: Place, body: RoundOpened) -> Faults:
    """Rounds increase by one, begin at the model before, and invite participants of the contract."""
    contract = run.parties.contract
    due = len(run.rounds) + 1
    if run.completed or run.abandoned:
        yield place.fault("ROUND_AFTER_END", "A round opens after the run has ended.", field="round")
    if run.open_round:
        yield place.fault("ROUND_NOT_CLOSED", f"Round {run.open_round.number} is still open.", field="round")
        run.open_round.closed = True
    if body.round != due:
        yield place.fault("ROUND_ORDER", f"Round {body.round} opens where round {due} is due.", field="round")
    elif body.round > contract.training.rounds:
        yield place.fault(
            "ROUND_BEYOND_CONTRACT", f"The contract has {counted(contract.training.rounds, 'round')}.", field="round"
        )
    if missing := sorted(run.aggregated.keys() - run.committed.keys()):
        message = f"The scores of round {missing[-1]} are not committed to yet."
        yield place.fault("SCORES_NOT_COMMITTED", message, field="round")
    if contract.auditor is not None and run.deposited is None and not run.rounds:
        message = "The first round opens before the validation rows are deposited for the auditor."
        yield place.fault("DEPOSIT_MISSING", message, party=contract.operator.name, rule="deposited before round 1")
    if body.base_digest != run.model_digest:
        message = "The base model is not the one that the round before led to (or the contract's initial one)."
        yield place.fault("BASE_MODEL", message, field="base_digest")
    yield from _invited(run, place, body)
    run.rounds.append(
        Round(
            number=body.round,
            index=place.index,
            base_digest=body.base_digest,
            invited=tuple(body.invited),
            deadline=body.deadline,
            unions=tuple(sorted(run.unions)),
        )
    )
    yield from unions_in_time(run, place)


def _invited(run: Run, place: Place, body: RoundOpened) -> Faults:
    contract = run.parties.contract
    if list(body.invited) != sorted(set(body.invited)):
        message = "The invited are not each named once, in the order of ids."
        yield place.fault("INVITED_ORDER", message, field="invited")
    for party_id in body.invited:
        name = run.parties.name(party_id)
        if party_id not in contract.by_id():
            message = "Somebody is invited who is no participant of the contract."
            yield place.fault("PARTICIPANT_UNKNOWN", message, field="invited", party=name)
        elif run.silent.get(party_id, 0) >= contract.participation.missed_rounds_limit:
            message = f"A participant is invited after {run.silent[party_id]} missed or refused rounds in a row."
            rule = "participation.missed_rounds_limit"
            yield place.fault("INVITED_SILENT", message, field="invited", party=name, rule=rule)
        elif party_id in run.excluded:
            message = "A participant is invited that is excluded and not readmitted."
            yield place.fault("INVITED_EXCLUDED", message, field="invited", party=name, rule="defences.wreckers")
        elif left := away(run, party_id):
            yield place.fault("INVITED_AWAY", f"A participant is invited {left}.", field="invited", party=name)


def _outcome(run: Run, place: Place, body: UpdateDecided | UpdateRefused | ReplyMissed, outcome: str) -> Faults:
    """One outcome for each invited participant, in the round that is open."""
    current, name = run.open_round, run.parties.name(body.participant)
    if current is None or current.number != body.round:
        yield place.fault("ROUND_NOT_OPEN", f"Round {body.round} is not open.", field="round", party=name)
        return
    if body.participant not in run.parties.contract.by_id():
        message = "An outcome is logged for somebody who is no participant of the contract."
        yield place.fault("PARTICIPANT_UNKNOWN", message, field="participant", party=name)
    elif body.participant not in current.invited:
        message = f"An outcome is logged for a participant that was not invited to round {body.round}."
        yield place.fault("PARTICIPANT_NOT_INVITED", message, field="participant", party=name)
    elif body.participant in current.outcomes:
        message = f"A participant has two outcomes in round {body.round}."
        yield place.fault("OUTCOME_TWICE", message, field="participant", party=name, rule="one outcome a round")
    else:
        current.outcomes[body.participant] = outcome


def update_decided(run: Run, place: Place, body: UpdateDecided) -> Faults:
    """The update is the participant's and the receipt the operator's; an admitted one is the contracted one."""
    parties = run.parties
    name = parties.name(body.participant)
    key = parties.run_keys.get(body.participant, "")
    update, fault = open_inside(place, body.update, Update, key, "update", name)
    receipt, receipt_fault = open_inside(
        place, body.receipt, Receipt, parties.operator_key, "receipt", parties.contract.operator.name
    )
    decision = receipt.decision if receipt else "rejected"
    yield from _outcome(run, place, body, decision)
    yield from after_revocation(run, place, body.participant)
    yield from (f for f in (fault, receipt_fault) if f)
    if receipt is not None:
        yield from _receipt(run, place, body, receipt, update)
    if update is None:
        return
    heads = run.ledger_heads.setdefault(body.participant, [GENESIS])
    here = update.is_of(parties.contract.id, body.round)
    if here:
        run.spares[body.participant] = run.spares.get(body.participant, 0) + update.attempt - 1
    if decision == "admitted":
        yield from _admitted(run, place, body, update)
    elif receipt is not None:
        yield from _rejected(run, place, body, update, receipt.code)
    run.decided.add(update.update_digest)
    if here:
        heads.append(update.ledger_head)


def _receipt(run: Run, place: Place, body: UpdateDecided, receipt: Receipt, update: Update | None) -> Faults:
    due: dict[str, object] = {
        "contract_id": run.parties.contract.id,
        "round": body.round,
        "participant": body.participant,
    }
    if update is not None:
        due |= {"attempt": update.attempt, "update_digest": update.update_digest}
    for name in differing(receipt, due):
        message = f"The receipt's {name} is not that of the update it decides."
        party = run.parties.contract.operator.name
        yield place.fault("RECEIPT_MISMATCH", message, field=f"receipt.{name}", party=party)


def _due(run: Run, body: UpdateDecided) -> dict[str, object]:
    """What the fields of the contracted update are."""
    contract, current = run.parties.contract, run.open_round
    due: dict[str, object] = {
        "contract_id": contract.id,
        "round": body.round,
        "participant": body.participant,
        "noise": "csprng",
        "privacy_event": update_event(contract),
    }
    if body.participant in contract.by_id():
        rows = contract.participant(body.participant).num_examples
        due |= {"num_examples": rows, "metering": Metering(rows=rows, steps=contract.training.local_steps)}
    if current is not None:
        due["base_digest"] = current.base_digest
    return due


REJECTED_FOR = {
    "UPDATE_CONTRACT_ID": ("contract_id",),
    "UPDATE_ROUND": ("round",),
    "UPDATE_PARTICIPANT": ("participant",),
    "UPDATE_BASE_DIGEST": ("base_digest",),
    "UPDATE_METERING": ("num_examples", "metering"),
    "UPDATE_PRIVACY_EVENT": ("privacy_event",),
    "UPDATE_TEST_NOISE": ("noise",),
}
"""Code of a rejection -> the signed fields of which one must be wrong."""

REJECTED_BY_VALUES = {"UPDATE_SHAPE", "UPDATE_DIGEST", "UPDATE_NOT_FINITE", "UPDATE_NORM", "UPDATE_NOISE_FLOOR"}
"""Rejections for the array itself, which the log does not hold: only its author can tell."""


def _rejected(run: Run, place: Place, body: UpdateDecided, update: Update, code: str) -> Faults:
    """A rejection whose reason lies in signed fields must have that reason."""
    wrong = differing(update, _due(run, body))
    spares = run.spares.get(body.participant, 0)
    if code in REJECTED_FOR:
        founded = any(field in wrong for field in REJECTED_FOR[code])
    elif code == "UPDATE_HEAD":
        size = None if run.open_round is None else run.open_round.index + 1
        founded = size is None or update.head != Head(size=size, root=run.roots[size])
    elif code == "UPDATE_ATTEMPT":
        founded = spares > run.parties.contract.privacy.spare_attempts
    elif code == "UPDATE_LEDGER_HEAD":
        founded = update.ledger_head in run.ledger_heads[body.participant]
    elif code == "UPDATE_REPLAYED":
        founded = update.update_digest in run.decided
    else:
        founded = code in REJECTED_BY_VALUES
    if not founded:
        message = f"An update was rejected as {code}, and what its author signed is not so."
        operator = run.parties.contract.operator.name
        yield place.fault("REJECTION_UNFOUNDED", message, field="receipt.code", party=operator, rule=code)


def _admitted(run: Run, place: Place, body: UpdateDecided, update: Update) -> Faults:
    """An update that entered the model is the contracted one."""
    contract, name = run.parties.contract, run.parties.name(body.participant)
    current = run.open_round
    for wrong in differing(update, _due(run, body)):
        message = f"An update was admitted whose {wrong} is not the round's or the contract's."
        yield place.fault("UPDATE_MISMATCH", message, field=f"update.{wrong}", party=name, rule=wrong)
    if update.attempt > 1 and run.spares.get(body.participant, 0) > contract.privacy.spare_attempts:
        message = f"Attempt {update.attempt}: more spare attempts are used than the plan has."
        yield place.fault("UPDATE_ATTEMPT", message, field="update.attempt", party=name, rule="privacy.spare_attempts")
    if update.ledger_head in run.ledger_heads[body.participant]:
        message = "The update names the ledger head of an earlier reply: its charge is not in the ledger."
        yield place.fault("UPDATE_LEDGER_HEAD", message, field="update.ledger_head", party=name, rule=MOVES)
    if update.update_digest in run.updates:
        message = "The same update was admitted before."
        yield place.fault("UPDATE_REPLAYED", message, field="update.update_digest", party=name)
    run.updates.add(update.update_digest)
    if current is not None:
        current.digests[body.participant] = update.update_digest
    run.heads[update.head.size, body.participant] = place
    yield from _head(run, place, update.head, "update.head", name)
    if current is not None and not current.index < update.head.size <= place.index:
        message = "The update's head is not of the time between the round's opening and this entry."
        yield place.fault("HEAD_TIME", message, field="update.head.size", party=name)


def _head(run: Run, place: Place, head: Head, where: str, name: str) -> Faults:
    """A head that a participant named is a signed checkpoint of this log."""
    if head.size >= len(run.roots) or run.roots[head.size] != head.root:
        message = "The head that this participant was shown is not this log's: it saw another log."
        yield place.fault("HEAD_ROOT", message, field=where, party=name, rule="append-only log")
    elif head.size and run.checkpoints is not None and head.size not in run.checkpoints:
        message = f"No signed checkpoint has the size {head.size} of the head that this participant was shown."
        yield place.fault("HEAD_CHECKPOINT", message, field=where, party=name)


def update_refused(run: Run, place: Place, body: UpdateRefused) -> Faults:
    """The refusal is the participant's, of this round, and names a head of this log."""
    parties = run.parties
    name = parties.name(body.participant)
    yield from _outcome(run, place, body, "refused")
    yield from after_revocation(run, place, body.participant)
    refusal, fault = open_inside(
        place, body.refusal, Refusal, parties.run_keys.get(body.participant, ""), "refusal", name
    )
    if fault:
        yield fault
    if refusal is None:
        return
    due = {"contract_id": parties.contract.id, "round": body.round, "participant": body.participant}
    for wrong in differing(refusal, due):
        message = f"The refusal's {wrong} is not the round's or the contract's."
        yield place.fault("REFUSAL_MISMATCH", message, field=f"refusal.{wrong}", party=name)
    heads = run.ledger_heads.setdefault(body.participant, [GENESIS])
    if refusal.attempts and refusal.ledger_head in heads:
        message = "The refusal names attempts, and the ledger head of an earlier reply: their charge is not in it."
        yield place.fault("REFUSAL_LEDGER_HEAD", message, field="refusal.ledger_head", party=name, rule=MOVES)
    heads.append(refusal.ledger_head)
    run.spares[body.participant] = run.spares.get(body.participant, 0) + max(0, refusal.attempts - 1)
    if refusal.attempts > 1 and run.spares[body.participant] > parties.contract.privacy.spare_attempts:
        message = f"{refusal.attempts} attempts before a refusal: more spare attempts are used than the plan has."
        yield place.fault(
            "REFUSAL_ATTEMPTS", message, field="refusal.attempts", party=name, rule="privacy.spare_attempts"
        )
    yield from _head(run, place, refusal.head, "refusal.head", name)
    if refusal.head.size:
        run.heads[refusal.head.size, body.participant] = place


def measurement_taken(run: Run, place: Place, body: MeasurementTaken) -> Faults:
    """What was released outside the rounds is the participant's, contracted, made once, and in time."""
    contract, name = run.parties.contract, run.parties.name(body.participant)
    key = run.parties.run_keys.get(body.participant, "")
    record, fault = open_inside(place, body.measurement, Measurement, key, "measurement", name)
    yield from after_revocation(run, place, body.participant)
    if fault:
        yield fault
    if run.completed or run.abandoned:
        yield place.fault("MEASUREMENT_LATE", "A measurement is logged after the run has ended.", party=name)
    if record is None:
        return
    due: dict[str, object] = {"contract_id": contract.id, "participant": body.participant, "noise": "csprng"}
    if body.participant in contract.by_id():
        due["num_examples"] = contract.participant(body.participant).num_examples
    if record.kind in contract.measurements:
        due["privacy_event"] = measurement_event(contract, record.kind)
    else:
        message = f"The contract asks for no {record.kind}."
        yield place.fault("MEASUREMENT_NOT_PLANNED", message, field="measurement.kind", party=name)
    for wrong in differing(record, due):
        message = f"The measurement's {wrong} is not the contract's."
        yield place.fault("MEASUREMENT_MISMATCH", message, field=f"measurement.{wrong}", party=name)
    if (body.participant, record.kind) in run.measured:
        message = f"The {record.kind} of one participant stand in the log twice."
        yield place.fault("MEASUREMENT_TWICE", message, field="measurement.kind", party=name)
    heads = run.ledger_heads.setdefault(body.participant, [GENESIS])
    if record.ledger_head in heads:
        message = "The measurement names the ledger head of an earlier message: its charge is not in the ledger."
        yield place.fault("MEASUREMENT_LEDGER_HEAD", message, field="measurement.ledger_head", party=name, rule=MOVES)
    heads.append(record.ledger_head)
    array = sums_of(body) or b""
    signed = (len(array), update_digest(array)) == (4 * total_cells(contract), record.array_digest)
    if record.kind == "statistics" and not signed:
        message = "The noised sums in the log are not those that the participant signed."
        yield place.fault("MEASUREMENT_DIGEST", message, field="array", party=run.parties.contract.operator.name)
    elif record.kind == "statistics" and not can_be_noised(contract, struct.unpack(f"<{len(array) // 4}f", array)):
        message = "Every sum that counts rows is a whole number, which noise does not make."
        yield place.fault("MEASUREMENT_NOISE_FLOOR", message, field="array", party=name)
    run.measured.add((body.participant, record.kind))


def reply_missed(run: Run, place: Place, body: ReplyMissed) -> Faults:
    """One more outcome."""
    yield from _outcome(run, place, body, "missed")


def _round_over(run: Run, place: Place, body: RoundAggregated | RoundAbandoned) -> Faults:
    """The round is open, everybody invited has an outcome, and the admitted are those whose receipts say so."""
    current = run.open_round
    if current is None or current.number != body.round:
        yield place.fault("ROUND_NOT_OPEN", f"Round {body.round} is not open.", field="round")
        return
    for party_id in current.invited:
        if party_id not in current.outcomes:
            message = f"A participant that was invited to round {body.round} has no outcome: no receipt, no refusal."
            yield place.fault("OUTCOME_MISSING", message, field="admitted", party=run.parties.name(party_id))
    if tuple(body.admitted) != current.admitted:
        message = "The admitted are not those whose receipts say so, in the order of ids."
        yield place.fault("ADMITTED", message, field="admitted")
    current.closed = True
    for party_id in current.invited:
        absent = current.outcomes.get(party_id) in ("missed", "refused")
        run.silent[party_id] = run.silent.get(party_id, 0) + 1 if absent else 0


def _minimum(run: Run) -> int:
    return run.parties.contract.participation.minimum


def round_aggregated(run: Run, place: Place, body: RoundAggregated) -> Faults:
    """At least the minimum of admitted updates led to the next model."""
    yield from _round_over(run, place, body)
    if (count := run.parties.contract.counted_once(body.admitted)) < (minimum := _minimum(run)):
        message = f"{counted(count, 'update')} aggregated; the contract's minimum is {minimum}."
        if count < len(body.admitted):
            message += " Those under common control count once."
        yield place.fault("ADMITTED_TOO_FEW", message, field="admitted", rule="participation.minimum")
    due = "csprng" if isinstance(run.parties.contract.privacy, ClientPrivacy) else None
    if body.noise != due:
        message = f"The operator's own noise is said to be {body.noise or 'none'}; the contract has {due or 'none'}."
        yield place.fault("MODEL_NOISE", message, field="noise", party=run.parties.contract.operator.name)
    yield from clips(run, place, body)
    run.aggregated[body.round] = tuple(body.admitted)
    run.model_digest = run.models[body.round] = body.model_digest


def round_abandoned(run: Run, place: Place, body: RoundAbandoned) -> Faults:
    """Fewer than the minimum were admitted, and the run ends."""
    yield from _round_over(run, place, body)
    if run.parties.contract.counted_once(body.admitted) >= _minimum(run) and body.code != STOPPED:
        message = "A round was abandoned that had enough admitted updates."
        yield place.fault("ABANDONED_WITHOUT_NEED", message, field="admitted", rule="participation.minimum")
    run.abandoned = True


def round_discarded(run: Run, place: Place, body: RoundDiscarded) -> Faults:
    """The last round that led to a model, before its scores are committed to; the run ends at the model before it."""
    operator = run.parties.contract.operator.name
    if body.round != max(run.aggregated, default=0) or body.round in run.committed or run.completed or run.open_round:
        message = "A round is given up that is not the last one, or has scores."
        yield place.fault("DISCARDED_ROUND", message, field="round", party=operator)
        return
    if body.code != NOT_FINITE:
        message = f"A round is given up for {body.code}, and not because its losses are no numbers ({NOT_FINITE})."
        yield place.fault("DISCARDED_REASON", message, field="code", party=operator)
    run.discarded.append(body.round)
    del run.aggregated[body.round], run.models[body.round]
    run.model_digest = run.rounds[-1].base_digest
    run.abandoned = True
