"""Cards: a participant's signed declaration of a data set, and the validation rows that it releases with it.

A data set's privacy budget is declared once: a later card of the same data set may tell of more rows or other
columns, but not of another budget. A contract names the card that it was made by: another one is noticed.
"""

import datetime
import json
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fedpact_contract import privacy
from fedpact_contract.errors import FaultError, InputError, RefusedError
from fedpact_contract.messages import DataSetCard, check_card_delta
from fedpact_contract.output import counted
from fedpact_contract.record import Envelope, open_signed, read_envelope
from fedpact_contract.request import utc_now
from fedpact_server import contracts, db
from fedpact_server.alarms import raise_alarm
from fedpact_server.enrolment import Member

MAX_RELEASED_ROWS = 100_000


def accept_card(
    connection: Connection,
    member: Member,
    envelope: Envelope[DataSetCard],
    released: Sequence[Any],
    *,
    now: datetime.datetime | None = None,
) -> DataSetCard:
    """Keep a card, in place of an earlier one of the same data set, and the rows released with it.

    Where a contract names the earlier one, that is an alarm, CARD_CHANGED: the contract stands as it was signed.

    Raises:
        FaultError: CARD_PARTICIPANT, SIGNATURE_COUNT, or a signature that is not the participant's.
        InputError: CARD_BUDGET, a budget under which nothing fits; CARD_DELTA; RELEASE_COUNT, RELEASE_ROW,
            RELEASE_COLUMNS, RELEASE_CELL.
        RefusedError: CARD_BUDGET_CHANGED.
    """
    if len(envelope.signatures) != 1:
        raise FaultError("SIGNATURE_COUNT", "A card carries one signature, its sender's.", party=member.name)
    card = open_signed(envelope, DataSetCard, member.contract_key)
    if card.participant != member.id:
        raise FaultError("CARD_PARTICIPANT", "The card is another participant's.", party=member.name)
    if privacy.filter_limit(card.epsilon, card.delta, card.alpha) <= 0:
        raise InputError(
            "CARD_BUDGET",
            "Under this budget no training fits at all.",
            field="epsilon",
            remedy="Declare a larger epsilon, or the alpha that `fedpact-agent` works out.",
        )
    check_card_delta(card.delta, card.num_examples, party=member.name)
    rows = _rows(card, released)
    known = db.cards.c
    where = (known.participant == member.id, known.data_set == card.data_set)
    stored = connection.execute(sa.select(known.envelope).where(*where)).scalar()
    if stored is not None:
        before = DataSetCard.from_bytes(read_envelope(bytes(stored)).body)
        if (before.epsilon, before.delta, before.alpha) != (card.epsilon, card.delta, card.alpha):
            raise RefusedError(
                "CARD_BUDGET_CHANGED",
                "The budget of a data set is declared once.",
                field="epsilon",
                party=member.name,
                rule="a data set keeps its budget over all contracts",
            )
        connection.execute(db.cards.delete().where(*where))
    connection.execute(
        db.cards.insert().values(participant=member.id, data_set=card.data_set, envelope=envelope.to_bytes())
    )
    _keep_rows(connection, member.id, card, rows)
    changed = [c for c, same in naming(connection, card) if not same]
    if changed and stored is not None and bytes(stored) != envelope.to_bytes():
        named = ", ".join(c[:12] for c in changed)
        detail = f"{member.name} sent another card of {card.data_set} than the one by which was made: {named}"
        raise_alarm(connection, "CARD_CHANGED", detail, now=now or utc_now())
    return card


def naming(connection: Connection, card: DataSetCard) -> list[tuple[str, bool]]:
    """The contracts, not terminated, with this data set that name its card: ids, and whether it is this one."""
    found = []
    for stored in contracts.every(connection):
        party = stored.contract.by_id().get(card.participant)
        if party is not None and party.data_set == card.data_set and party.card and stored.state != "terminated":
            found.append((stored.contract.id, party.card == card.digest()))
    return found


def card_list(connection: Connection, member_id: str) -> list[DataSetCard]:
    """A participant's cards, by data set."""
    known = db.cards.c
    query = sa.select(known.envelope).where(known.participant == member_id).order_by(known.data_set)
    return [DataSetCard.from_bytes(read_envelope(bytes(data)).body) for data in connection.execute(query).scalars()]


def the_card(connection: Connection, member: Member, data_set: str) -> DataSetCard:
    """The newest card of a participant's data set; of its only one, where none is named.

    Raises:
        InputError: CARD_UNKNOWN.
    """
    found = card_list(connection, member.id)
    wanted = [card for card in found if card.data_set == data_set] if data_set else found
    if len(wanted) != 1:
        known = ", ".join(card.data_set for card in found) or "none"
        raise InputError(
            "CARD_UNKNOWN",
            f"{member.name} has sent {'no such card' if data_set or not found else 'cards of several data sets'}; "
            f"there are: {known}.",
            field="--data-set",
            party=member.name,
            remedy="Name one with --data-set." if found else "Ask the enterprise to sign and send its card.",
        )
    return wanted[0]


def _rows(card: DataSetCard, released: Sequence[Any]) -> list[dict[str, Any]]:
    """The released rows, if they are as many as the card says, and hold its columns and no other."""
    if len(released) != card.released_rows or len(released) > MAX_RELEASED_ROWS:
        raise InputError(
            "RELEASE_COUNT",
            f"The card announces {counted(card.released_rows, 'released row')} (the most taken is "
            f"{MAX_RELEASED_ROWS}); {len(released)} came.",
            field="released",
        )
    names = {*card.columns, card.label}
    for number, row in enumerate(released, start=1):
        if not isinstance(row, dict):
            raise InputError("RELEASE_ROW", f"Row {number} is no object.", field="released")
        if set(row) != names:
            raise InputError(
                "RELEASE_COLUMNS", f"Row {number} has other columns than the card names.", field="released"
            )
        if not all(cell is None or type(cell) in (int, str) for cell in row.values()):
            raise InputError(
                "RELEASE_CELL", f"Row {number} has a cell that is neither text nor an integer.", field="released"
            )
    return list(released)


def _keep_rows(connection: Connection, member_id: str, card: DataSetCard, rows: Sequence[dict[str, Any]]) -> None:
    known = db.releases.c
    connection.execute(db.releases.delete().where(known.participant == member_id, known.data_set == card.data_set))
    if rows:
        lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
        connection.execute(
            db.releases.insert().values(participant=member_id, data_set=card.data_set, table=lines.encode())
        )
