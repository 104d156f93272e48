"""What a running guard knows of itself, for `status`: connection, isolation of its children, times of the last rounds.

It stands in HOME/state.json, replaced whole whenever it changes. Nothing is decided by it.
"""

from decimal import Decimal
from typing import Annotated

from pydantic import Field

from fedpact_client.home import AgentHome, read_json
from fedpact_client.sandbox import Isolation
from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.contract import Count
from fedpact_contract.files import replace_file
from fedpact_contract.record import Dec, Hex32, Instant, Part

ROUNDS = 20
"""How many of the last rounds are kept."""


class RoundTime(Part):
    """How long one order took here, in milliseconds: the guard's own part (checks, ledgers, signing), and training."""

    contract: Hex32
    round: Count
    guard_ms: Dec
    training_ms: Dec


class Facts(Part):
    """One running guard. `connected`: since when; a child's isolation is none until it has said what it got."""

    process: int
    connected: Instant | None = None
    trainer: Isolation | None = None
    executor: Isolation | None = None
    rounds: Annotated[tuple[RoundTime, ...], Field(max_length=ROUNDS)] = ()

    def write(self, home: AgentHome) -> None:
        """Replace what stands in the home.

        Raises:
            OSError: the disk does not take it.
        """
        replace_file(home.state_path, canonical_bytes(self.plain()))

    @classmethod
    def read(cls, home: AgentHome) -> "Facts | None":
        """What the last guard on this home wrote.

        Raises:
            InputError: STATE_FILE, JSON_SYNTAX.
        """
        try:
            data = home.state_path.read_bytes()
        except FileNotFoundError:
            return None
        return cls.parse(read_json(data, "agent's state", home.state_path), code="STATE_FILE", file=home.state_path)


def milliseconds(seconds: float) -> Decimal:
    """Seconds as milliseconds, to a tenth."""
    return Decimal(round(seconds * 10_000)) / 10
