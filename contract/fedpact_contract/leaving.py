"""Where each participant stands by its own word: taking part, paused, withdrawn, its run key revoked.

Read from entries that were verified when they were taken; `replay_leaving` holds a log to the same rules.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fedpact_contract.contract import Contract
from fedpact_contract.log import Body, DestructionStated, Entry, KeyRevoked, NoticeTaken, affected_models
from fedpact_contract.messages import DestructionReceipt, Notice
from fedpact_contract.record import read_envelope

KINDS: tuple[type[Body], ...] = (NoticeTaken, KeyRevoked, DestructionStated)
"""The entries that say so."""

SHOWN = {"paused": "paused by participant", "withdrawn": "withdrawn by participant"}


@dataclass(slots=True, kw_only=True)
class Standing:
    """One participant: its last notice and that one's place, where its run key was revoked, the receipts so far."""

    notice: Notice | None = None
    index: int | None = None
    revoked: int | None = None
    receipts: tuple[DestructionReceipt, ...] = ()

    @property
    def withdrawn(self) -> bool:
        """Whether it has withdrawn."""
        return self.notice is not None and self.notice.state == "withdrawn"

    @property
    def away(self) -> bool:
        """Whether it gets no orders now."""
        return self.gone or (self.notice is not None and self.notice.state == "paused")

    @property
    def gone(self) -> bool:
        """Whether it gets none any more."""
        return self.withdrawn or self.revoked is not None

    @property
    def shown(self) -> str:
        """In words; empty for a participant that takes part."""
        said = "" if self.notice is None else SHOWN.get(self.notice.state, "")
        return ", ".join(part for part in (said, "run key revoked" if self.revoked is not None else "") if part)

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "said": "running" if self.notice is None else self.notice.state,
            "standing": self.shown,
            "code": None if self.notice is None else self.notice.code,
            "entry": self.index,
            "key_revoked": self.revoked,
            "receipts": [receipt.plain() for receipt in self.receipts],
        }


def standings(entries: Iterable[tuple[int, Entry]]) -> dict[str, Standing]:
    """By participant, of those that said anything: index and entry of each entry of `KINDS`, in order."""
    found: dict[str, Standing] = {}
    for index, entry in entries:
        body = entry.open()
        if isinstance(body, NoticeTaken):
            standing = found.setdefault(body.participant, Standing())
            standing.notice, standing.index = Notice.from_bytes(read_envelope(body.notice).body), index
        elif isinstance(body, KeyRevoked):
            found.setdefault(body.participant, Standing()).revoked = index
        elif isinstance(body, DestructionStated):
            receipt = DestructionReceipt.from_bytes(read_envelope(body.receipt).body)
            found.setdefault(body.participant, Standing()).receipts += (receipt,)
    return found


def left(entries: Sequence[Entry], bodies: Sequence[Body], contract: Contract) -> list[dict[str, Any]]:
    """For the report: who is away by its own word, and of who withdrew every model that its updates are in."""
    found = standings((i, e) for i, e in enumerate(entries) if e.type in {kind.TYPE for kind in KINDS})
    return [
        {"id": party.id, "name": party.name}
        | found[party.id].plain()
        | {
            "models": [{"round": r.round, "digest": r.model_digest} for r in affected_models(bodies, party.id)]
            if found[party.id].withdrawn
            else []
        }
        for party in contract.participants
        if party.id in found and found[party.id].away
    ]
