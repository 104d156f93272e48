"""What a running guard knows of itself, for `status`: connection, isolation of its children, times of the last rounds.

It stands in HOME/state.json, replaced whole whenever it changes. Nothing is decided by it, but which connection that
was cut off is said goodbye for.
"""

from decimal import Decimal
from pathlib import Path
from typing import Annotated

from pydantic import Field

from fedpact_client.frames import NODE_NUMBER
from fedpact_client.home import AgentHome, read_json
from fedpact_client.sandbox import Isolation
from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.contract import Count
from fedpact_contract.errors import InputError
from fedpact_contract.files import replace_file
from fedpact_contract.record import Dec, Hex32, Instant, Part, form

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
ROUNDS = 20
"""How many of the last rounds are kept."""


class RoundTime(Part):
    """How long one order took here, in milliseconds: the guard's own part (checks, ledgers, signing), and training."""

    contract: Hex32
    round: Count
    guard_ms: Dec
    training_ms: Dec


class Connection(Part):
    """The last connection to SuperLink: the node's number there, and where its guard ran (`place_of`)."""

    node: Annotated[str, form(NODE_NUMBER, "a whole number")]
    place: str


class Facts(Part):
    """One running guard. `connected`: since when; `waiting`: why it is not, as far as is known.

    A child's isolation is none until it has said what it got.
    """

    process: int
    connected: Instant | None = None
    waiting: str | None = None
    connection: Connection | None = None
    trainer: Isolation | None = None
    executor: Isolation | None = None
    loader: Isolation | None = None
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


def place_of(home: AgentHome) -> str | None:
    """This very folder on this machine, since it started: a copy of a home elsewhere is another place.

    None where the system does not say when it started; no connection is remembered then.
    """
    try:
        boot = BOOT_ID.read_text("ascii").strip()
    except OSError:
        return None
    found = home.path.stat()
    return f"{boot} {found.st_dev} {found.st_ino}"


def cut_off(home: AgentHome) -> str | None:
    """The node's number in the last connection that a guard in this place had: all processes of that one are gone.

    From another place the connection may be another agent's that still runs, with a copy of this home.
    """
    try:
        facts = Facts.read(home)
        if facts is None or facts.connection is None or facts.connection.place != place_of(home):
            return None
    except (InputError, OSError):
        return None  # SuperLink lets the node in when its own patience ends
    return facts.connection.node


def milliseconds(seconds: float) -> Decimal:
    """Seconds as milliseconds, to a tenth."""
    return Decimal(round(seconds * 10_000)) / 10
