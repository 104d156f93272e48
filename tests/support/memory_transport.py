"""An in-memory `Transport`: nodes are plain callables, and faults can be put in their way."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fedpact_server.transport import Incoming, Outgoing

Handler = Callable[[bytes, bytes], tuple[bytes, bytes]]
"""(order, model) -> (reply, array)."""

Kind = Literal["drop", "delay", "duplicate", "garble", "error", "wrong-node"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to the next message to a node.

    drop: it never arrives, and nothing is answered. delay: the answer comes `polls` polls later. duplicate: the node
    gets the order twice and its second answer is thrown away, as Flower does. garble: the reply's bytes are damaged.
    error: `code` comes instead of a reply. wrong-node: another node answers in this one's place; it is called with this
    one's order.
    """

    kind: Kind
    polls: int = 1
    code: str = "NODE_AWAY"
    other: str = ""


@dataclass
class MemoryTransport:
    """Nodes by their key. A node answers when it is polled for, in the order of sending; offline nodes never do."""

    nodes: Mapping[str, Handler]
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    offline: set[str] = field(default_factory=set)
    sent: list[Outgoing] = field(default_factory=list)
    _waiting: dict[str, tuple[Outgoing, Fault | None, int]] = field(default_factory=dict)
    _numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    def fault(self, node: str, kind: Kind, **options: object) -> None:
        """Put a fault in the way of the next message to a node (after those already put there)."""
        self.faults.setdefault(node, []).append(Fault(kind=kind, **options))  # type: ignore[arg-type]  # test helper

    def online(self) -> dict[str, bool]:
        return {node: node not in self.offline for node in self.nodes}

    def send(self, outgoing: Sequence[Outgoing], ttl_seconds: float) -> dict[str, str]:
        assert ttl_seconds > 0
        ids = {}
        for each in outgoing:
            if each.node not in self.nodes:
                continue
            self.sent.append(each)
            faults = self.faults.get(each.node, [])
            fault = faults.pop(0) if faults else None
            message_id = f"message-{next(self._numbers)}"
            self._waiting[message_id] = (each, fault, fault.polls if fault and fault.kind == "delay" else 0)
            ids[message_id] = each.node
        return ids

    def poll(self, message_ids: Sequence[str]) -> list[Incoming]:
        answers = []
        for message_id in message_ids:
            if message_id not in self._waiting:
                continue
            outgoing, fault, polls = self._waiting[message_id]
            if outgoing.node in self.offline or (fault is not None and fault.kind == "drop"):
                continue
            if polls > 0:
                self._waiting[message_id] = (outgoing, fault, polls - 1)
                continue
            del self._waiting[message_id]
            answers.append(self._answer(message_id, outgoing, fault))
        return answers

    def _answer(self, message_id: str, outgoing: Outgoing, fault: Fault | None) -> Incoming:
        kind = None if fault is None else fault.kind
        if fault is not None and kind == "error":
            return Incoming(message_id=message_id, node=outgoing.node, reply=None, array=b"", error=fault.code)
        handler = self.nodes[outgoing.node]
        if fault is not None and kind == "wrong-node":
            handler = self.nodes[fault.other]
        reply, array = handler(outgoing.order, outgoing.model)
        if kind == "duplicate":
            handler(outgoing.order, outgoing.model)
        if kind == "garble":
            reply = reply[::-1]
        return Incoming(message_id=message_id, node=outgoing.node, reply=reply, array=array, error=None)
