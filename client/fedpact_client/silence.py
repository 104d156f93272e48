"""An operator that does not close: the agent's signed word that no closing came in time, and an alarm; once a contract.

A close is due `close_days` after the contract's term has ended: until then training may take place. What came by then
and did not hold (an objection) is none. The record is one party's word with the operator's own last signatures in it:
it proves what the operator had shown, and when this party complained; nobody is sent it.
"""

import datetime
import functools

from fedpact_client.home import AgentHome
from fedpact_client.order import EMPTY
from fedpact_client.signing import keep_beside
from fedpact_client.store import Agreement, Store
from fedpact_contract.files import replace_file
from fedpact_contract.log import Checkpoint, Entry, UpdateDecided
from fedpact_contract.messages import Found, Head, OperatorSilent, Receipt
from fedpact_contract.record import Envelope, read_envelope, sign
from fedpact_contract.request import instant
from fedpact_contract.standalone import close_due

ALARM = "OPERATOR_SILENT"


@functools.lru_cache(maxsize=256)
def due(agreement: Agreement) -> datetime.datetime:
    """When the contract must be closed (`standalone.close_due`).

    Raises:
        InputError: the term names no moment.
    """
    return close_due(agreement.contract)


def note(home: AgentHome, store: Store, agreement: Agreement, found: Found, now: datetime.datetime) -> bool:
    """Record that the operator is silent, if a close is overdue and this agent took part; whether it is new.

    The alarm is kept first, with the signed record; the file is written from it, so that a crash loses neither. Beside
    it stands the contract, with which somebody else verifies it (`fedpact verify RECORD --contract FILE`).

    Args:
        home: Has the run key; gets the record as a file.
        store: Gets the alarm.
        agreement: The contract, not closed here.
        found: What this agent met when it last asked for the closing.
        now: The time.

    Raises:
        InputError: the run key is missing.
        FailedError: the disk does not take it.
    """
    contract_id = agreement.contract_id
    if now <= due(agreement) or not store.answers(contract_id):
        return False
    data = recorded(store, contract_id)
    new = data is None
    if data is None:
        record = _record(home, store, agreement, found, now)
        data = sign(record, home.run_key(contract_id)).to_bytes()
        text = f"no closing came by {record.due}: {home.silence_path(contract_id)} is the signed record"
        store.add_alarm(ALARM, contract_id, text, data)
    path = home.silence_path(contract_id)
    if not path.exists():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        replace_file(path, data)
    keep_beside(path, contract_id, store.contract(contract_id).signed)
    return new


def recorded(store: Store, contract_id: str) -> bytes | None:
    """The signed record (an envelope) that was made for a contract, if one was."""
    found = (a.evidence for a in store.alarms() if (a.code, a.contract_id) == (ALARM, contract_id))
    return next(found, None)


def _record(
    home: AgentHome, store: Store, agreement: Agreement, found: Found, now: datetime.datetime
) -> OperatorSilent:
    heads = store.heads(agreement.contract_id)
    checkpoint: Envelope[Checkpoint] | None = read_envelope(heads[-1].checkpoint) if heads else None
    return OperatorSilent(
        contract_id=agreement.contract_id,
        participant=home.participant_id,
        due=instant(due(agreement)),
        at=instant(now),
        found=found,
        head=Head(size=heads[-1].size, root=heads[-1].root) if heads else EMPTY,
        checkpoint=checkpoint,
        receipt=_last_receipt(store, agreement.contract_id),
    )


def _last_receipt(store: Store, contract_id: str) -> Envelope[Receipt] | None:
    """The operator's receipt for the last update of which an order brought one."""
    for _, body in reversed(store.results(contract_id)):
        entry = Entry.from_bytes(body).open()
        if isinstance(entry, UpdateDecided):
            return read_envelope(entry.receipt)
    return None
