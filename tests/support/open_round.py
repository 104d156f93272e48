"""A federation whose second round is open: every agent answered the first, and its next order is at hand."""

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.support.closed_run import copied
from tests.support.federation import Federation, make_federation

from fedpact_contract.messages import Order
from fedpact_contract.record import read_envelope, sign
from fedpact_server import rounds


def read(order: bytes) -> Order:
    return Order.from_bytes(read_envelope(order).body)


@dataclass
class OpenRound:
    """The federation, and every order with its model, by round and participant."""

    federation: Federation
    orders: dict[tuple[int, str], tuple[bytes, bytes]]

    def order(self, round_number: int, agent: int) -> tuple[bytes, bytes]:
        """The order of a round for `Enterprise agent`, and its model."""
        return self.orders[round_number, self.federation.agent(agent).desk.participant]

    def forge(self, order: bytes, **changes: object) -> bytes:
        """The order with other fields, signed by the operator all the same."""
        return sign(read(order).model_copy(update=changes), self.federation.operator_run_key).to_bytes()


def open_round(folder: Path) -> OpenRound:
    """A copy on its own; the round that it begins with was played once."""
    base = _played()
    return OpenRound(federation=copied(base.federation, folder), orders=dict(base.orders))


_TEMPORARY = tempfile.TemporaryDirectory(prefix="fedpact-open-round-")


@functools.cache
def _played() -> OpenRound:
    federation = make_federation(Path(_TEMPORARY.name) / "base")
    orders: dict[tuple[int, str], tuple[bytes, bytes]] = {}

    def keep(_node: str, order: bytes, model: bytes) -> tuple[bytes, bytes] | None:
        found = read(order)
        orders[found.round, found.participant] = (order, model)
        return None if found.round == 2 else (order, model)

    def stop(_seconds: float) -> None:
        if sum(number == 2 for number, _ in orders) == len(federation.agents):
            raise _AllHeldError

    federation.transport.before = keep
    loop = federation.loop()
    loop.sleep = stop
    before, rounds.RESEND_SECONDS = rounds.RESEND_SECONDS, 0.0
    try:
        loop.run()
    except _AllHeldError:
        pass
    finally:
        rounds.RESEND_SECONDS = before
    federation.database.dispose()
    return OpenRound(federation=federation, orders=orders)


class _AllHeldError(Exception):
    pass
