"""A complete, valid, signed run in pure Python, in a fraction of a second: operator, participants, rounds, the close.

`make_evidence(tamper=...)` calls the hook before each thing is signed or logged, so that a test can lie and still have
everything around the lie properly signed. Keys are derived from names: the same evidence every time, but for salts.

Stages, in order ("N" a round, "P" a participant's place in the order of ids):
    contract, delegation:operator, delegation:P, contract-signed; validation-deposited where there is an auditor
    round-opened:N; update:N:P, receipt:N:P, update-decided:N:P; round-aggregated:N; scores:N; scores-committed:N
    moments; run-completed; scores-opened:N; moments-opened; revenue-recorded; period-settled; period-closing
    checkpoint:SIZE, countersignature:SIZE:P
A hook returns what stands in the place of the thing; for bodies None leaves it out and a list puts several there.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.support.contract_kit import party, plain_contract

from fedpact_contract import merkle
from fedpact_contract.contract import Contract, Delegation, SignedContract
from fedpact_contract.contribution import has_first_order
from fedpact_contract.evidence import Evidence, pack, unpack
from fedpact_contract.keys import fingerprint, public_hex
from fedpact_contract.log import (
    Body,
    Checkpoint,
    ContractSigned,
    Countersignature,
    Entry,
    Moments,
    MomentsOpened,
    PeriodClosing,
    PeriodSettled,
    ReplyMissed,
    RevenueRecorded,
    RoundAggregated,
    RoundOpened,
    RoundScores,
    RunCompleted,
    ScoresCommitted,
    ScoresOpened,
    SettledLine,
    UpdateDecided,
    UpdateRefused,
    ValidationDeposited,
    commitment,
)
from fedpact_contract.messages import Head, Metering, PrivacyEvent, Receipt, Refusal, Update
from fedpact_contract.record import Envelope, Record, sign
from fedpact_contract.settlement import settle_period

Tamper = Callable[[str, Any], Any]

VALIDATION_ROWS = 60
REVENUE_FEN, FEES_FEN = 10_000_019, 1_000_000
ENDS = ("opened", "round", "completed", "settled", "closing", "closed")


def key(name: str) -> Ed25519PrivateKey:
    """The key of this name."""
    return Ed25519PrivateKey.from_private_bytes(sha256(f"factory:{name}".encode()).digest())


def digest(*parts: object) -> str:
    """Some 32 bytes that stand for a digest."""
    return sha256(":".join(map(str, parts)).encode()).hexdigest()


def contract_values(participants: int = 3, rounds: int = 2, **changes: Any) -> dict[str, Any]:
    """A contract as plain values; changes are paths with double underscores."""
    base = {
        "title": "Readmission model 再入院",
        "purpose": "readmission",
        "operator__name": "City Data",
        "model__initial_digest": digest("model", 0),
        "training__rounds": rounds,
        "participation__deadline_seconds": 600,
        "contribution__validation": {
            "root": digest("validation"),
            "slices": [{"source": "operator", "count": VALIDATION_ROWS}],
        },
        "code__models_digest": digest("models"),
        "code__shell_digest": digest("shell"),
    }
    entries = [
        party(
            f"Hospital {i + 1}",
            f"{i + 1:018d}",
            public_hex(key(f"participant {i}")),
            f"visits-{i + 1}",
            400 + 100 * i,
        )
        for i in range(participants)
    ]
    return plain_contract(entries, public_hex(key("operator")), **(base | changes))


@dataclass(slots=True, kw_only=True)
class Made:
    """A run as it was made. Lists may be changed and `repacked`."""

    contract: Contract
    entries: list[Entry] = field(default_factory=list)
    checkpoints: list[Envelope[Checkpoint]] = field(default_factory=list)
    countersignatures: list[Envelope[Countersignature]] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)  # participant id -> name of its keys

    @property
    def ids(self) -> list[str]:
        """Participants' ids in order."""
        return list(self.contract.by_id())

    @property
    def files(self) -> dict[str, bytes]:
        """The evidence files' bytes."""
        return pack(self.entries, self.checkpoints, self.countersignatures)

    @property
    def evidence(self) -> Evidence:
        """The evidence."""
        return unpack(self.files)

    def index(self, type_: str, which: int = 0) -> int:
        """Index of the which-th entry of a type."""
        return [i for i, e in enumerate(self.entries) if e.type == type_][which]

    def write(self, folder: Path) -> Path:
        """Write the files."""
        folder.mkdir(parents=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        return folder


class Factory:
    """Makes one run; every method logs what it names."""

    def __init__(self, contract: Contract, tamper: Tamper | None, operator_run: str = "operator run") -> None:
        names = {fingerprint(public_hex(key(f"participant {i}"))): f"participant {i}" for i in range(12)}
        self.made = Made(contract=contract, names=names)
        self.contract = contract
        self.tamper = tamper or (lambda _stage, thing: thing)
        self.operator_run = key(operator_run)
        self.model = contract.model.initial_digest
        self.opened = 0
        self.losses: list[tuple[int, ...]] = []
        self.scores: dict[int, RoundScores] = {}
        self.moments: Moments | None = None
        # The hidden truth: participant i lowers the loss of row x by so much in a round, in 1e-9 nat.
        rng = random.Random(7)
        self.gains = [
            [rng.randrange(1_000_000, 9_000_000) * (i + 1) for _ in range(VALIDATION_ROWS)]
            for i in range(len(contract.participants))
        ]

    def run_key(self, party_id: str) -> Ed25519PrivateKey:
        return key(f"{self.made.names[party_id]} run")

    def append(self, stage: str, body: Body) -> None:
        result = self.tamper(stage, body)
        bodies = [] if result is None else result if isinstance(result, list) else [result]
        for one in bodies:
            self.made.entries.append(Entry.of(one, sha256(f"salt {len(self.made.entries)}".encode()).digest()))

    def signed(self, stage: str, record: Record, *keys: Ed25519PrivateKey) -> Envelope[Any]:
        """A record signed by these keys; the hook may return an envelope instead of a record."""
        result = self.tamper(stage, record)
        return result if isinstance(result, Envelope) else sign(result, *keys)

    def head(self) -> Head:
        hashes = [e.leaf_hash for e in self.made.entries]
        return Head(size=len(hashes), root=merkle.root(hashes).hex())

    def checkpoint(self) -> None:
        head = self.head()
        record = Checkpoint(origin=self.contract.id, size=head.size, root=head.root)
        envelope = self.tamper(f"checkpoint:{head.size}", record)
        if envelope is not None:
            self.made.checkpoints.append(
                envelope if isinstance(envelope, Envelope) else sign(envelope, self.operator_run)
            )

    def countersign(self, party_id: str) -> None:
        head, place = self.head(), self.made.ids.index(party_id)
        record = Countersignature(origin=self.contract.id, size=head.size, root=head.root, participant=party_id)
        result = self.tamper(f"countersignature:{head.size}:{place}", record)
        if result is not None:
            self.made.countersignatures.append(
                result if isinstance(result, Envelope) else sign(result, self.run_key(party_id))
            )

    def sign_contract(self) -> None:
        contract, parties = self.contract, [("operator", "operator")]
        parties += [(str(i), self.made.names[p]) for i, p in enumerate(self.made.ids)]
        envelope = self.signed("contract", contract, *(key(name) for _, name in parties))
        delegations = []
        for place, name in parties:
            contract_key = key(name)
            record = Delegation(
                contract_id=contract.id,
                party=fingerprint(public_hex(contract_key)),
                run_key=public_hex(self.operator_run if place == "operator" else key(f"{name} run")),
            )
            delegations.append(self.signed(f"delegation:{place}", record, contract_key))
        signed = SignedContract(contract=envelope, delegations=tuple(delegations))
        self.append("contract-signed", ContractSigned(signed=signed))

    def deposit(self) -> None:
        if self.contract.auditor is not None:
            body = ValidationDeposited(digest=digest("deposit"), size=1234)
            self.append("validation-deposited", body)

    def open_round(self, number: int, invited: Sequence[str]) -> None:
        self.opened = len(self.made.entries)
        body = RoundOpened(
            round=number, base_digest=self.model, deadline="2026-06-01T00:00:00Z", invited=tuple(invited)
        )
        self.append(f"round-opened:{number}", body)
        self.checkpoint()
        self.shown = self.head()
        for party_id in invited:
            self.countersign(party_id)

    def update(self, number: int, party_id: str, decision: str = "admitted") -> None:
        contract, place = self.contract, self.made.ids.index(party_id)
        privacy, steps = contract.privacy, contract.training.local_steps
        rows = contract.participant(party_id).num_examples
        record = Update(
            contract_id=contract.id,
            round=number,
            attempt=1,
            participant=party_id,
            base_digest=self.model,
            update_digest=digest("update", number, party_id),
            num_examples=rows,
            privacy_event=PrivacyEvent(
                sampling="poisson",
                sample_rate=privacy.sample_rate,
                noise_multiplier=privacy.noise_multiplier,
                max_grad_norm=privacy.max_grad_norm,
                steps=steps,
            ),
            noise="csprng",
            metering=Metering(rows=rows, steps=steps),
            ledger_head=digest("ledger", number, party_id),
            head=self.shown,
        )
        update = self.signed(f"update:{number}:{place}", record, self.run_key(party_id))
        told = Update.from_bytes(update.body)
        receipt = Receipt(
            contract_id=contract.id,
            round=number,
            attempt=told.attempt,
            participant=party_id,
            update_digest=told.update_digest,
            decision="admitted" if decision == "admitted" else "rejected",
            code="ADMITTED" if decision == "admitted" else "UPDATE_NORM",
        )
        signed = self.signed(f"receipt:{number}:{place}", receipt, self.operator_run)
        body = UpdateDecided(round=number, participant=party_id, update=update.plain(), receipt=signed.plain())
        self.append(f"update-decided:{number}:{place}", body)

    def refuse(self, number: int, party_id: str) -> None:
        place = self.made.ids.index(party_id)
        record = Refusal(
            contract_id=self.contract.id,
            round=number,
            participant=party_id,
            code="POLICY_TERM",
            attempts=0,
            ledger_head=digest("ledger", "none", party_id),
            head=self.shown,
        )
        envelope = self.signed(f"refusal:{number}:{place}", record, self.run_key(party_id))
        body = UpdateRefused(round=number, participant=party_id, refusal=envelope.plain())
        self.append(f"update-refused:{number}:{place}", body)

    def miss(self, number: int, party_id: str) -> None:
        place = self.made.ids.index(party_id)
        self.append(f"reply-missed:{number}:{place}", ReplyMissed(round=number, participant=party_id, code="DEADLINE"))

    def aggregate(self, number: int, admitted: Sequence[str]) -> None:
        body = RoundAggregated(round=number, admitted=tuple(admitted), model_digest=digest("model", number))
        self.append(f"round-aggregated:{number}", body)
        self.model = digest("model", number)
        places = [self.made.ids.index(p) for p in admitted]
        before = self.scores[max(self.scores)] if self.scores else None
        first = VALIDATION_ROWS * 693_147_181 * self.contract.training.rounds * len(self.made.ids)
        start = before.losses[-1][0] if before else first
        falls = [sum(self.gains[i]) for i in places]
        losses = tuple(
            (start - sum(fall for i, fall in enumerate(falls) if mask >> i & 1),) for mask in range(2 ** len(places))
        )
        right = before.correct[1] if before else 30
        scores = RoundScores(
            round=number,
            players=tuple(admitted),
            losses=losses,
            correct=(right, min(right + 3, VALIDATION_ROWS)),
            first_order=tuple(fall // VALIDATION_ROWS for fall in falls) if has_first_order(self.contract) else None,
        )
        self.scores[number] = self.tamper(f"scores:{number}", scores)
        value = commitment(RoundScores, self.salt(number), self.scores[number])
        self.append(f"scores-committed:{number}", ScoresCommitted(round=number, commitment=value))
        self.checkpoint()

    def salt(self, name: object) -> bytes:
        return sha256(f"opening {name}".encode()).digest()

    def complete(self) -> None:
        n = len(self.made.ids)
        total = [
            [self.gains[i][x] * sum(p in s.players for s in self.scores.values()) for x in range(VALIDATION_ROWS)]
            for i, p in enumerate(self.made.ids)
        ]
        products = tuple(
            tuple(sum(a * b for a, b in zip(total[i], total[j], strict=True)) for j in range(n)) for i in range(n)
        )
        self.moments = self.tamper("moments", Moments(products=products))
        value = commitment(Moments, self.salt("moments"), self.moments)
        body = RunCompleted(rounds=len(self.scores), model_digest=self.model, commitment=value)
        self.append("run-completed", body)
        self.checkpoint()

    def open_scores(self) -> None:
        for number, scores in self.scores.items():
            body = ScoresOpened(round=number, salt=self.salt(number).hex(), scores=scores)
            self.append(f"scores-opened:{number}", body)
        assert self.moments is not None
        self.append("moments-opened", MomentsOpened(salt=self.salt("moments").hex(), moments=self.moments))

    def settle(self, period: int = 1, revenue_fen: int = REVENUE_FEN, fees_fen: int = FEES_FEN) -> None:
        assert self.moments is not None
        revenue = RevenueRecorded(period=period, revenue_fen=revenue_fen, fees_fen=fees_fen)
        self.append("revenue-recorded", revenue)
        result = settle_period(self.contract, list(self.scores.values()), self.moments, revenue_fen, fees_fen)
        body = PeriodSettled(
            period=period,
            pool_fen=result.pool_fen,
            basis=result.basis,
            lines=tuple(SettledLine(participant=line.participant, fen=line.fen) for line in result.lines),
        )
        self.append("period-settled", body)

    def close(self, period: int = 1) -> None:
        self.append("period-closing", PeriodClosing(period=period))
        self.checkpoint()


def make_evidence(
    *,
    participants: int = 3,
    rounds: int = 2,
    end: str = "closed",
    outcomes: dict[tuple[int, int], str] | None = None,
    unsigned: Sequence[int] = (),
    tamper: Tamper | None = None,
    operator_run: str = "operator run",
    **changes: Any,
) -> Made:
    """A run up to `end`.

    Args:
        participants: How many.
        rounds: How many.
        end: opened (the last round is open), round (it is aggregated), completed, settled, closing (the closing
            checkpoint stands, nobody has countersigned), closed.
        outcomes: (round, place) -> admitted (the default), rejected, refused, missed or absent (not invited).
        unsigned: Places of those who do not countersign the closing checkpoint.
        tamper: The hook.
        operator_run: Name of the operator's run key.
        **changes: Changes of the contract, as in `contract_values`.
    """
    assert end in ENDS
    contract = Contract.parse(contract_values(participants, rounds, **changes))
    factory = Factory(contract, tamper, operator_run)
    factory.sign_contract()
    factory.checkpoint()
    factory.deposit()
    ids, what = factory.made.ids, outcomes or {}
    for number in range(1, rounds + 1):
        said = {p: what.get((number, place), "admitted") for place, p in enumerate(ids)}
        factory.open_round(number, [p for p in ids if said[p] != "absent"])
        if end == "opened" and number == rounds:
            return factory.made
        for party_id, outcome in said.items():
            if outcome in ("admitted", "rejected"):
                factory.update(number, party_id, outcome)
            elif outcome == "refused":
                factory.refuse(number, party_id)
            elif outcome == "missed":
                factory.miss(number, party_id)
        factory.aggregate(number, [p for p in ids if said[p] == "admitted"])
    if end == "round":
        return factory.made
    factory.complete()
    if end == "completed":
        return factory.made
    factory.open_scores()
    factory.settle()
    if end == "settled":
        factory.checkpoint()
        return factory.made
    factory.close()
    if end == "closed":
        for place, party_id in enumerate(ids):
            if place not in unsigned:
                factory.countersign(party_id)
    return factory.made
