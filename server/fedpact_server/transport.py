"""What the round loop needs of a transport: who is there, send orders, take what came back.

No Flower here: `app.GridTransport` is the production one, tests/support/memory_transport.py an in-memory one. Nodes are
named by their public key (hex SHA-256 of the DER SubjectPublicKeyInfo: `fedpact_contract.request.node_id`), never by
what a message says of itself. Payloads are opaque bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """One order for one node: `model` is a flat little-endian float64 array, as bytes."""

    node: str
    order: bytes
    model: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """What became of one order: a reply, or an error code of ours.

    `node` is the node that the message went to, whoever claims to have sent the reply. `array` is a flat little-endian
    float32 array as bytes, empty where the reply has none. Exactly one of `reply` and `error` is set.

    Codes: NODE_AWAY (the node's connection ended), MESSAGE_LOST (expired or deleted before it was answered),
    REPLY_LOST (announced, but it never came whole), REPLY_FORM (not the agreed form), REPLY_SIZE (larger than any
    answer to this order can be), AGENT_NO_REPLY (the agent took the order and says that there is no reply),
    AGENT_ERROR (any other error at the agent's side).
    """

    message_id: str
    node: str
    reply: bytes | None
    array: bytes
    error: str | None


class Transport(Protocol):
    """Orders out, replies in. No call waits for a node."""

    def online(self) -> dict[str, bool]:
        """Node -> whether it is connected; a node that is absent is not."""

    def send(self, outgoing: Sequence[Outgoing], ttl_seconds: float) -> dict[str, str]:
        """Send orders; returns message id -> node. An order to an unknown node is left out."""

    def poll(self, message_ids: Sequence[str]) -> list[Incoming]:
        """What has arrived for these messages since the last call; each message is answered at most once."""
