"""The entries of a participant that leaves for a while or for good: notices, revoked run keys, destruction receipts.

A signature counts if its entry stands before the revocation's; clocks play no part. What somebody destroyed cannot be
recomputed: a receipt is held to what the log knows of it.
"""

from fedpact_contract.contract import Contract
from fedpact_contract.errors import RefusedError
from fedpact_contract.log import DestructionStated, KeyRevoked, NoticeTaken
from fedpact_contract.messages import DestructionReceipt, KeyRevocation, Notice
from fedpact_contract.parties import Place
from fedpact_contract.replay_state import Faults, Run, open_inside


def check_notice(notice: Notice, contract_id: str, participant: str, last: Notice | None) -> None:
    """A notice is this participant's, newer than its last one, and takes back no withdrawal.

    Raises:
        RefusedError: NOTICE_MISMATCH, NOTICE_OLD, NOTICE_WITHDRAWN.
    """
    if not notice.is_of(contract_id, participant):
        raise RefusedError("NOTICE_MISMATCH", "The notice is another contract's, or in another participant's name.")
    if last is not None and notice.number <= last.number:
        raise RefusedError(
            "NOTICE_OLD",
            f"A notice with the number {last.number} was taken already.",
            field="number",
            rule="each notice of a participant has a higher number than the one before",
        )
    if last is not None and last.state == "withdrawn":
        raise RefusedError("NOTICE_WITHDRAWN", "The participant has withdrawn.", rule="withdrawing is final")


def check_revocation(record: KeyRevocation, contract: Contract, participant: str, run_key: str) -> None:
    """A revocation is of this participant's run key of this contract.

    Raises:
        RefusedError: REVOCATION_MISMATCH.
    """
    if (record.contract_id, record.participant, record.run_key) != (contract.id, participant, run_key):
        raise RefusedError("REVOCATION_MISMATCH", "The revocation is of another contract, participant or key.")


def notice_taken(run: Run, place: Place, body: NoticeTaken) -> Faults:
    """The participant signed it, by the key that counts here, and it follows the one before."""
    name = run.parties.name(body.participant)
    if body.participant not in run.parties.contract.by_id():
        yield place.fault("PARTICIPANT_UNKNOWN", "A notice is by no participant of the contract.", field="participant")
        return
    notice, fault = open_inside(place, body.notice, Notice, run.key_of(body.participant), "notice", name)
    if fault:
        yield fault
    if notice is None:
        return
    try:
        check_notice(notice, run.parties.contract.id, body.participant, run.notices.get(body.participant))
    except RefusedError as err:
        yield place.within(err, field="notice", party=name)
    run.notices[body.participant] = notice


def key_revoked(run: Run, place: Place, body: KeyRevoked) -> Faults:
    """The contract key signed it, of the run key that was delegated, once."""
    contract, name = run.parties.contract, run.parties.name(body.participant)
    if body.participant not in contract.by_id():
        yield place.fault("PARTICIPANT_UNKNOWN", "The key revoked is no participant's.", field="participant")
        return
    key = contract.participant(body.participant).key
    record, fault = open_inside(place, body.revocation, KeyRevocation, key, "revocation", name)
    if fault:
        yield fault
        return
    assert record is not None  # noqa: S101 - open_inside gives a record or a fault
    try:
        check_revocation(record, contract, body.participant, run.parties.run_keys[body.participant])
    except RefusedError as err:
        yield place.within(err, field="revocation", party=name)
    if body.participant in run.revoked:
        yield place.fault("REVOKED_TWICE", "The run key is revoked already.", field="participant", party=name)
    run.revoked.setdefault(body.participant, place.index)


def after_revocation(run: Run, place: Place, participant: str) -> Faults:
    """Nothing that a revoked run key signed is entered after its revocation."""
    if participant in run.revoked:
        yield place.fault(
            "KEY_REVOKED",
            f"What a run key signed is entered after entry {run.revoked[participant]}, which revoked that key.",
            field="participant",
            party=run.parties.name(participant),
            rule="a signature counts if its entry stands before the revocation's",
        )


def away(run: Run, participant: str) -> str | None:
    """Why a participant is not to be invited, by its own word: the end of a sentence; None where it may be."""
    if participant in run.revoked:
        return "after its run key was revoked"
    said = run.notices.get(participant)
    return None if said is None or said.state == "running" else f"after it said that it has {said.state}"


def destruction_stated(run: Run, place: Place, body: DestructionStated) -> Faults:
    """After a withdrawal, each side states once what it destroyed, and names the updates and models of the log."""
    parties, name = run.parties, run.parties.name(body.participant)
    said = run.notices.get(body.participant)
    if said is None or said.state != "withdrawn":
        message = "Something is said to be destroyed for a participant that has not withdrawn."
        yield place.fault("DESTRUCTION_TIME", message, field="participant", party=name)
        return
    own, fault = open_inside(place, body.receipt, DestructionReceipt, run.key_of(body.participant), "receipt", name)
    receipt = own
    if own is None:
        operator = parties.contract.operator.name
        receipt, theirs = open_inside(
            place, body.receipt, DestructionReceipt, parties.operator_key, "receipt", operator
        )
        if theirs:
            yield fault or theirs
    if receipt is None:
        return
    party = name if own else parties.contract.operator.name
    due = (parties.contract.id, body.participant, "participant" if own else "operator")
    if (receipt.contract_id, receipt.participant, receipt.by) != due:
        message = "The receipt is another contract's or participant's, or signed by the other side."
        yield place.fault("DESTRUCTION_MISMATCH", message, field="receipt", party=party)
    if (body.participant, receipt.by) in run.destroyed:
        yield place.fault("DESTRUCTION_TWICE", "This side has stated already what it destroyed.", party=party)
    run.destroyed.add((body.participant, receipt.by))
    if not own:
        yield from _operators(run, place, receipt)


def _operators(run: Run, place: Place, receipt: DestructionReceipt) -> Faults:
    """The operator names every admitted update, and every model since the first of them."""
    operator, participant = run.parties.contract.operator.name, receipt.participant
    updates = [(r.number, r.digests[participant]) for r in run.rounds if participant in r.digests]
    if [(u.round, u.digest) for u in receipt.updates] != updates:
        message = "The updates named are not those that were admitted."
        yield place.fault("DESTRUCTION_UPDATES", message, field="receipt.updates", party=operator)
    first = min((number for number, admitted in run.aggregated.items() if participant in admitted), default=None)
    models = [(n, digest) for n, digest in sorted(run.models.items()) if first is not None and n >= first]
    if [(m.round, m.digest) for m in receipt.models] != models:
        message = "The models named are not all that were made since the participant's first update."
        yield place.fault("DESTRUCTION_MODELS", message, field="receipt.models", party=operator)
