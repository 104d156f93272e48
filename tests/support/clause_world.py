"""Agents that get orders made to touch every clause: what the guard answers, beside what `clause_reader` reads.

A station is one data set with two contracts on it and a real store; its orders come one after the other, so that limits
run down. What is not asked here is the operator's log (heads and receipts): orders come as if it had been checked. No
tests here.
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from math import log, log1p
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from tests.support import clause_reader
from tests.support.agent_world import key
from tests.support.clause_reader import Action, Past, moment
from tests.support.contract_kit import change, party, plain_contract

from fedpact_client import answer as answering
from fedpact_client.answer import Desk, Trained, TrainerLostError, TrainingFailedError, answer
from fedpact_client.policy import Policy
from fedpact_client.store import SeenHead, Store
from fedpact_contract import ledger, merkle
from fedpact_contract.arrays import model_digest
from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.contract import Contract, SignedContract
from fedpact_contract.errors import InputError
from fedpact_contract.keys import fingerprint, public_hex
from fedpact_contract.ledger import Terms
from fedpact_contract.log import Countersignature, Entry, Proved, RoundOpened
from fedpact_contract.messages import DataSetCard, Head, Order, Refusal, Reply
from fedpact_contract.privacy import filter_alpha, filter_limit
from fedpact_contract.record import sign

OWN, RUN, OPERATOR = key("own"), key("own run"), key("operator")
ME = fingerprint(public_hex(OWN))
OTHERS = ("beta", "gamma", "delta")
SHELL, CODE = "3" * 64, "2" * 64
DELTA = Decimal("0.00001")
CARD_EPSILON = Decimal(8)
ZONES = ("UTC", "Asia/Shanghai", "America/New_York", "+08:00", "-03:30")
ENDING = 20
"""The last actions of a station: orders beyond the contract, withdrawn, closed."""

CODES = {
    "purpose": "POLICY_PURPOSE_MISMATCH",
    "operator": "POLICY_OPERATOR",
    "sectors": "POLICY_SECTOR",
    "model_kinds": "POLICY_MODEL",
    "columns": "POLICY_COLUMN",
    "trust_models": "POLICY_TRUST_MODEL",
    "max_epsilon": "POLICY_EPSILON",
    "max_entity_epsilon": "POLICY_ENTITY_EPSILON",
    "require_entity": "POLICY_ENTITY",
    "entity_declared": "CARD_ENTITY_CHANGED",
    "entity_column": "SIGN_ENTITY_COLUMN",
    "min_participants": "POLICY_MIN_PARTICIPANTS",
    "max_rounds": "POLICY_ROUNDS",
    "policy_ends": "POLICY_EXPIRED",
    "term": "POLICY_TERM",
    "hours": "POLICY_HOURS",
    "not_paused": "PARTICIPANT_PAUSED",
    "not_withdrawn": "PARTICIPANT_WITHDRAWN",
    "not_closed": "CONTRACT_NOT_RUNNING",
    "code": "CODE_MODELS_MISMATCH",
    "bundle": "CODE_BUNDLE_MISMATCH",
    "opened": "ROUND_NOT_OPENED",
    "base": "BASE_MODEL_MISMATCH",
    "invited": "NOT_INVITED",
    "rounds": "ROUND_BEYOND_CONTRACT",
    "forward": "ROUND_BACKWARDS",
    "heads": "HEAD_FEW_WITNESSES",
    "duplicates": "TRAINING_FAILED",
    "one_model": "BASE_MODEL_CHANGED",
    "clock_right": "CLOCK_SET_BACK",
    "card_budget": "BUDGET_EXCEEDED",
    "max_data_set_epsilon": "POLICY_DATA_SET_EPSILON",
    "max_data_set_uses": "POLICY_DATA_SET_USES",
    "spare_attempts": "ATTEMPTS_EXHAUSTED",
    "failed": "TRAINING_FAILED",
}
"""The code with which the guard refuses, by what the clause is called in `clause_reader`."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What left as the answer to an order: an update, a refusal with its code, or nothing."""

    allowed: bool
    code: str | None


@dataclasses.dataclass
class Log:
    """A contract's log as far as orders show it: its size, and the head that the last order showed."""

    size: int = 0
    last: Head | None = None


class Station:
    """One agent; `next` makes an action, `enforce` has the guard answer it."""

    def __init__(
        self, folder: Path, number: int, actions: int, patch: pytest.MonkeyPatch, tried: Counter[str] | None = None
    ) -> None:
        self.tried = Counter[str]() if tried is None else tried
        self.chance, self.number, self.actions = random.Random(number), number, actions
        self.store = Store(folder / f"station{number}.db", create=True)
        self.past, self.codes = Past(), dict[tuple[str, int, str], str]()
        self.done = 0
        self.entities = self._entities()
        self.alpha = filter_alpha(CARD_EPSILON, DELTA)
        card = DataSetCard(
            data_set="set",
            participant=ME,
            num_examples=40,
            columns=("age", "sex"),
            label="ill",
            entity=self.entities[0],
            epsilon=CARD_EPSILON,
            delta=DELTA,
            alpha=self.alpha,
            released_rows=0,
        )
        self.card = {"entity": self.entities[0], "epsilon": CARD_EPSILON, "delta": DELTA, "alpha": self.alpha}
        limit = filter_limit(CARD_EPSILON, DELTA, self.alpha)
        self.store.declare(sign(card, OWN).to_bytes(), limit)
        self.cost = Decimal(self.chance.randint(10, 40)) / 10_000
        self.contracts = {c.id: c for c in (self._contract("A"), self._contract("B"))}
        self.first, self.second = self.contracts
        self.plain = {contract_id: contract.plain() for contract_id, contract in self.contracts.items()}
        self.logs = {contract_id: Log() for contract_id in self.contracts}
        for contract in self.contracts.values():
            terms = Terms.of(contract, ME, self.cost)
            signed = SignedContract(contract=sign(contract, OWN), delegations=())
            self.store.add_contract(canonical_bytes(signed.plain()), terms, "run", public_hex(RUN))
            self.store.set_state(contract.id, "running")
        if number % 10 == 4:  # an old copy of the ledger was restored, whose lost charges leave little
            self._lose(limit - self.cost * self.chance.randint(20, 60))
        self.installed, self.order, self.head = CODE, None, None
        patch.setattr("fedpact_models.code.models_digest", lambda: self.installed)
        patch.setattr("fedpact_client.order.open_order", lambda _data, _known: self.order)
        patch.setattr(answering, "_check_log", lambda _desk, _order: (self.head, False))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, at: TracebackType | None) -> None:
        self.store.close()

    # What a station is

    def _entities(self) -> tuple[str | None, str | None]:
        """Whose a row is, by the card and by the contract."""
        kinds = [(None, None), ("pid", "pid"), ("pid", None), (None, None), ("pid", "pid"), ("pid", None)]
        return ("firm", "pid") if self.number % 20 == 7 else kinds[self.number % 6]

    def _contract(self, title: str) -> Contract:
        pick, central = self.chance, self.number % 10 == 3
        count = pick.choice((3, 4))
        names = ("own", *OTHERS[: count - 1])
        parties = [
            party(
                name,
                f"{i:018d}",
                public_hex(key(name)),
                "set" if name == "own" else f"set-{name}",
                40,
                sector=pick.choice(("medical", "finance", "traffic")),
            )
            for i, name in enumerate(names)
        ]
        strict, minimum = self.number % 2 == 0, pick.randint(2, count)
        changes: dict[str, Any] = {
            "title": title,
            "purpose": pick.choice(("disease-prediction", "triage", "fraud")),
            "data__columns": [
                {"name": "age", "kind": "number", "low": 0, "high": 100, "missing": "drop"},
                {"name": "sex", "kind": "category", "values": ["f", "m"], "missing": "refuse"},
            ],
            "data__label": {"name": "ill", "classes": ["no", "yes"], "rule": "value"},
            "model": pick.choice(({"kind": "softmax", "hidden": []}, {"kind": "mlp", "hidden": [4]}))
            | {"initial_digest": base_of(title, 1)[0]},
            "training__rounds": self.actions + 50,
            "privacy__epsilon": pick.choice(("0.5", "1", "2.25", "3")),
            "privacy__spare_attempts": pick.randint(0, 12),
            "participation__minimum": minimum,
            "participation__head_threshold": minimum - 1 if strict else 0,
            "participation__strict_heads": strict,
            "code__models_digest": CODE,
            "code__shell_digest": SHELL,
            "term__not_before": f"2026-0{pick.randint(1, 6)}-01T00:00:00Z",
            "term__not_after": f"2027-0{pick.randint(1, 9)}-15T12:00:00Z",
        }
        values = plain_contract(parties, public_hex(OPERATOR), **changes)
        if central:
            values["privacy"].pop("max_grad_norm")
            delta = {"trust_model": "client-level-at-the-operator", "unit": "participant", "max_update_norm": "1"}
            values["privacy"] |= delta
            weights = {"contribution_weight": "0", "data_weight": "0.5", "equal_weight": "0.5"}
            values["settlement"] |= weights
            return Contract.parse(
                change(values, {"training__aggregation": "uniform-mean", "contribution__game": "unanimity"}, "__")
            )
        if self.entities[1] is not None:
            values["privacy"]["entity"] = {
                "column": self.entities[1],
                "max_rows": 2,
                "method": "mixture-of-gaussians",
                "epsilon": pick.choice(("2", "5.5")),
                "delta": str(values["privacy"]["delta"]),
            }
        if self.number % 3 != 0:
            values["defences"] = {
                "clip": "none",
                "wreckers": "report",
                "negatives": "0.1",
                "dispute_hours": 1,
                "max_duplicates": "0.05",
            }
        return Contract.parse(values)

    def _lose(self, charge: Decimal) -> None:
        with self.store._committing():
            row = ledger.next_lost((), "set", charge)
            assert row is not None
            self.store._chains.append(row, [])
        self.past.charged = charge

    # Actions

    def next(self) -> Action:
        """The next action: one that is allowed, most of them then changed in one thing or two."""
        self.done += 1
        pick, ending = self.chance, self.done > self.actions - ENDING
        contract_id = pick.choice((self.first, self.second))
        if ending:
            contract_id = self.first if self.done % 2 else self.second
        a = self._allowed(contract_id)
        if ending and contract_id == self.first:
            a["order"] |= {"round": max(a["contract"]["training"]["rounds"], self.past.latest(contract_id)) + 1}
            self._bases(a)
        if ending and contract_id == self.second:
            a["state"] = "withdrawn" if self.done <= self.actions - ENDING // 3 else "closed"
        if not ending:
            if pick.random() < 0.05 and self.past.answers.get(contract_id):
                number, base = pick.choice(list(self.past.answers[contract_id]))
                a["order"] |= {"round": number, "opened_round": number} | dict.fromkeys(
                    ("base", "opened_base", "model"), base
                )
            for _ in range(pick.choices((0, 1, 2), (41, 56, 3))[0]):
                self._change(a)
        return a

    def _allowed(self, contract_id: str) -> Action:
        """An order to which no clause says no, by a policy that is as wide as it happens to be."""
        pick, contract, plain = self.chance, self.contracts[contract_id], self.plain[contract_id]
        start, end = moment(plain["term"]["not_before"]), moment(plain["term"]["not_after"])
        now = start + timedelta(seconds=pick.randint(0, int((end - start).total_seconds())))
        a: Action = {
            "id": contract_id,
            "contract": plain,
            "me": ME,
            "own_key": public_hex(OWN),
            "operator": contract.operator.id,
            "card": self.card,
            "declared_entity": self.entities[0],
            "installed": CODE,
            "state": "running",
            "now": now,
            "past": self.past,
            "cost": self.cost,
            "copies": pick.choice((Decimal(0), Decimal("0.05"))),
            "crashes": 0,
            "fails": False,
            "order": {
                "round": self.past.latest(contract_id) + 1,
                "bundle": SHELL,
                "proved": True,
                "ahead": pick.choice((-3600, 0, 300)),
                "invited": sorted(contract.by_id()),
                "countersigned": plain["participation"]["head_threshold"],
            },
        }
        self._bases(a)
        a["policy"] = self._policy(a, end)
        left = plain["privacy"]["spare_attempts"] - self.past.spares_used(contract_id)
        if left and pick.random() < 0.05:
            a["crashes"] = 1
        return a

    def _bases(self, a: Action) -> None:
        number = a["order"]["round"]
        a["order"] |= from_model(number, base_of(a["contract"]["title"], number)[0])

    def _policy(self, a: Action, end: datetime) -> dict[str, Any]:
        pick, plain = self.chance, a["contract"]
        privacy = plain["privacy"]
        entity = privacy.get("entity")
        policy: dict[str, Any] = {
            "purposes": pick.choice(([plain["purpose"]], ["other", plain["purpose"]])),
            "operators": pick.choice(([a["operator"]], ["a" * 64, a["operator"]])),
            "sectors": pick.choice(("*", ["medical", "finance", "traffic"], sorted(others(a)))),
            "model_kinds": pick.choice(([plain["model"]["kind"]], ["softmax", "linear", "mlp"])),
            "columns": pick.choice(("*", ["age", "sex", "ill", "pid", "zip"])),
            "max_epsilon": pick.choice((privacy["epsilon"], "9")),
            "min_participants": pick.choice((2, plain["participation"]["minimum"])),
            "max_rounds": plain["training"]["rounds"] + pick.choice((0, 1, 100)),
            "not_after": stamp(end + timedelta(seconds=pick.choice((0, 1, 10**7)))),
        }
        if privacy["trust_model"] != "record-level-at-each-participant" or pick.random() < 0.3:
            policy["trust_models"] = [privacy["trust_model"]]
        unprotected = self.entities[0] is not None and entity is None
        if unprotected and privacy["trust_model"] == "record-level-at-each-participant":
            policy["require_entity"] = False
        elif pick.random() < 0.3:
            policy["require_entity"] = pick.choice((True, False))
        if pick.random() < 0.3:
            policy["max_entity_epsilon"] = entity["epsilon"] if entity else "0.1"
        if pick.random() < 0.3:
            policy["hours"] = self._window(a, inside=True)
        if pick.random() < 0.3:
            policy["max_data_set_uses"] = self.past.uses + pick.choice((2, 1000))
        if pick.random() < 0.3:
            policy["max_data_set_epsilon"] = self._epsilon(
                self.past.charged + self.cost * pick.choice((Decimal("2.5"), 9))
            )
        return policy

    def _window(self, a: Action, *, inside: bool) -> dict[str, str]:
        """A window of the day that the action's moment lies in, or not."""
        while True:
            begin, end = (f"{self.chance.randrange(24):02d}:{self.chance.randrange(60):02d}" for _ in "be")
            window = {"begin": begin, "end": end, "zone": self.chance.choice(ZONES)}
            if self.chance.random() < 0.4:  # it begins, or ends, with this very minute
                window[self.chance.choice(("begin", "end"))] = f"{clause_reader.clock(a['now'], window['zone']):%H:%M}"
            trial = a | {"policy": {"hours": window}, "past": Past()}
            if window["begin"] != window["end"] and clause_reader.hours(trial) == inside:
                return window

    def _epsilon(self, rdp: Decimal) -> str:
        """The epsilon whose limit is this Rényi sum."""
        order = float(self.alpha)
        value = float(rdp) + log1p(-1 / order) - log(float(DELTA) * order) / (order - 1)
        return f"{value:.9f}".rstrip("0").rstrip(".")

    def _change(self, a: Action) -> None:
        """Change one thing so that some clause is broken: of three the one that was tried least, if it is to be had."""
        while True:
            for name in sorted(self.chance.sample(tuple(CHANGES), 3), key=self.tried.__getitem__):
                if CHANGES[name](self, a):
                    self.tried[name] += 1
                    return

    # The guard

    def enforce(self, a: Action) -> Outcome:
        """What the guard answers."""
        contract = self.contracts[a["id"]]
        self.order, self.head, self.installed = self._order(a), self._shown(a), a["installed"]
        if a["state"] != self.store.contract(a["id"]).state:
            self.store.set_state(a["id"], a["state"])
        left = [a["crashes"]]

        def train(*_: object) -> Trained:
            if left[0]:
                left[0] -= 1
                raise TrainerLostError("TRAINER_LOST", "it ended")
            if a["fails"]:
                raise TrainingFailedError("DATA_SCHEMA", "a cell of the wrong kind")
            return Trained(update=self.chance.randbytes(16), noise="csprng", fingerprints=("f" * 64,))

        def rows() -> None:
            most = contract.defences and contract.defences.max_duplicates
            if most is not None and a["copies"] > most:
                raise InputError("DATA_DUPLICATES", "too many copies")

        desk = Desk(
            store=self.store,
            contract=contract,
            contract_id=a["id"],
            participant=ME,
            run_keys={fingerprint(public_hex(key(name))): public_hex(key(f"{name} run")) for name in OTHERS},
            run_key=RUN,
            policy=Policy.parse(a["policy"], code="POLICY"),
            entity=a["declared_entity"],
            own_file=lambda: ("e" * 64,),
            own_rows=rows,
            train=train,
            now=lambda: a["now"],
        )
        model = MODELS[a["order"]["model"]]
        ready = answer(desk, f"{self.number}.{self.done}".encode(), model, a["order"]["bundle"])
        if a["state"] == "paused":
            self.store.set_state(a["id"], "running")
        if ready is None:
            return Outcome(allowed=False, code=None)
        if ready.kind == "update":
            return Outcome(allowed=True, code=None)
        refusal = Reply.from_bytes(ready.reply).refusal
        assert refusal is not None
        return Outcome(allowed=False, code=Refusal.from_bytes(refusal.body).code)

    def _order(self, a: Action) -> Order:
        """The order, its round's entry last in a log of one more entry."""
        order, log_ = a["order"], self.logs[a["id"]]
        patience = a["contract"]["participation"]["deadline_seconds"]
        log_.size += 1
        body = RoundOpened(
            round=order["opened_round"],
            base_digest=order["opened_base"],
            deadline=stamp(a["now"] + timedelta(seconds=order["ahead"] + patience)),
            invited=tuple(order["invited"]),
        )
        entry = Entry.of(body, b"s" * 32)
        leaves = [b"l" * 32] * (log_.size - 1) + [entry.leaf_hash]
        self._root = merkle.root(leaves).hex()
        shown = entry if order["proved"] else Entry.of(body, b"t" * 32)
        path = tuple(p.hex() for p in merkle.inclusion_proof(leaves, log_.size - 1))
        return Order.model_construct(
            contract_id=a["id"],
            round=order["round"],
            participant=ME,
            base_digest=order["base"],
            opened=Proved(entry=shown, index=log_.size - 1, proof=path),
            countersignatures=tuple(self._witnesses(a)),
        )

    def _witnesses(self, a: Action) -> Any:
        """Countersignatures of so many others on the head that the order before showed."""
        last = self.logs[a["id"]].last
        for name in OTHERS[: a["order"]["countersigned"]] if last is not None else ():
            record = Countersignature(
                origin=a["id"], size=last.size, root=last.root, participant=fingerprint(public_hex(key(name)))
            )
            yield sign(record, key(f"{name} run"))

    def _shown(self, a: Action) -> Head:
        """The order's head, kept as `_check_log` does."""
        log_ = self.logs[a["id"]]
        head = Head(size=log_.size, root=self._root)
        self.store.add_heads(a["id"], [SeenHead(size=head.size, root=head.root, checkpoint=b"c")])
        log_.last = head
        return head


MODELS: dict[str, bytes] = {}


def base_of(title: str, number: int, variant: str = "") -> tuple[str, bytes]:
    """The digest of a round's base model, and its bytes."""
    data = f"{title} {number} {variant}".encode()
    MODELS[model_digest(data)] = data
    return model_digest(data), data


def from_model(number: int, digest: str) -> dict[str, Any]:
    """What an order says that is for this round and from this model, as the log has it."""
    return {"round": number, "opened_round": number} | dict.fromkeys(("base", "opened_base", "model"), digest)


def others(a: Action) -> set[str]:
    """The sectors of the other participants."""
    return {p["sector"] for p in a["contract"]["participants"] if p["key"] != a["own_key"]}


def stamp(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# Changes: each breaks one clause; False where the station, or the moment, has nothing to break.

Changer = Callable[[Station, Action], bool]


def _set(key_: str, value: Callable[[Action], Any]) -> Changer:
    def changed(_station: Station, a: Action) -> bool:
        found = value(a)
        if found is not None:
            a["policy"][key_] = found
        return found is not None

    return changed


def _order_has(**values: Any) -> Changer:
    def changed(_station: Station, a: Action) -> bool:
        a["order"] |= values
        return True

    return changed


def _entity(station: Station, a: Action) -> bool:
    unprotected = station.entities[0] is not None and a["contract"]["privacy"].get("entity") is None
    if not unprotected or a["contract"]["privacy"]["trust_model"] == "client-level-at-the-operator":
        return False
    if station.chance.random() < 0.5:
        a["policy"].pop("require_entity", None)
    else:
        a["policy"]["require_entity"] = True
    return True


def _trust(station: Station, a: Action) -> bool:
    """None allowed; or, where the operator adds the noise, nothing said of it."""
    if a["contract"]["privacy"]["trust_model"] == "client-level-at-the-operator" and station.chance.random() < 0.7:
        a["policy"].pop("trust_models", None)
    else:
        a["policy"]["trust_models"] = []
    return True


def _declared(station: Station, a: Action) -> bool:
    a["declared_entity"] = station.chance.choice([c for c in (None, "pid", "firm") if c != station.entities[0]])
    return True


def _ends(station: Station, a: Action) -> bool:
    end = moment(a["contract"]["term"]["not_after"])
    a["policy"]["not_after"] = stamp(end - timedelta(seconds=station.chance.choice((1, 3600, 10**6))))
    return True


def _term(station: Station, a: Action) -> bool:
    within = a["contract"]["term"]
    if station.chance.random() < 0.5:
        a["now"] = moment(within["not_before"]) - timedelta(seconds=station.chance.choice((1, 10**6)))
    else:
        a["now"] = moment(within["not_after"]) + timedelta(seconds=station.chance.choice((1, 10**6)))
        a["policy"]["not_after"] = "2029-01-01T00:00:00Z"
    a["policy"].pop("hours", None)
    return True


def _hours(station: Station, a: Action) -> bool:
    a["policy"]["hours"] = station._window(a, inside=False)
    return True


def _base(station: Station, a: Action) -> bool:
    order = a["order"]
    other, _ = base_of(a["contract"]["title"], order["round"], "other")
    which = station.chance.randrange(4)
    if which == 3 and order["round"] == 1:
        order |= from_model(1, other)
    else:
        order[("base", "opened_base", "model")[which % 3]] = other
    return True


def _forward(station: Station, a: Action) -> bool:
    """An earlier round, of which nothing was charged, from a model that was not asked for before."""
    tried = station.past.tries.get(a["id"], {})
    free = [n for n in range(2, station.past.latest(a["id"])) if n not in tried]
    if not free:
        return False
    number = station.chance.choice(free)
    digest, _ = base_of(a["contract"]["title"], number, f"again {station.done}")
    a["order"] |= from_model(number, digest)
    return True


def _one_model(station: Station, a: Action) -> bool:
    """The latest round once more, from another model: its attempt was charged."""
    number = station.past.latest(a["id"])
    if number < 2 or number not in station.past.tries.get(a["id"], {}):
        return False
    digest, _ = base_of(a["contract"]["title"], number, f"again {station.done}")
    a["order"] |= from_model(number, digest)
    return True


def _heads(_station: Station, a: Action) -> bool:
    part = a["contract"]["participation"]
    a["order"]["countersigned"] = part["head_threshold"] - 1
    return bool(part["strict_heads"])


def _copies(_station: Station, a: Action) -> bool:
    a["copies"] = Decimal("0.050001")
    return a["contract"].get("defences") is not None


def _uses(station: Station, a: Action) -> bool:
    spares = a["contract"]["privacy"]["spare_attempts"] - station.past.spares_used(a["id"])
    if not station.past.uses:
        return False
    if station.chance.random() < 0.3 and spares > 0:  # the attempt after a crash is the one too many
        a["crashes"], a["policy"]["max_data_set_uses"] = 1, station.past.uses + 1
    else:
        a["policy"]["max_data_set_uses"] = station.past.uses
    return True


def _set_epsilon(station: Station, a: Action) -> bool:
    spares = a["contract"]["privacy"]["spare_attempts"] - station.past.spares_used(a["id"])
    more = Decimal("0.5")
    if station.chance.random() < 0.3 and spares > 0:
        a["crashes"], more = 1, Decimal("1.5")
    a["policy"]["max_data_set_epsilon"] = station._epsilon(station.past.charged + station.cost * more)
    return True


def _spares(station: Station, a: Action) -> bool:
    left = a["contract"]["privacy"]["spare_attempts"] - station.past.spares_used(a["id"])
    a["crashes"] = left + 1
    a["policy"].pop("max_data_set_uses", None)
    a["policy"].pop("max_data_set_epsilon", None)
    return left < 4


def _put(**values: Any) -> Changer:
    def changed(_station: Station, a: Action) -> bool:
        a |= values
        return True

    return changed


def _sectors(_station: Station, a: Action) -> bool:
    a["policy"]["sectors"] = sorted(others(a) - {max(others(a))})
    return True


CHANGES: dict[str, Changer] = {
    "purpose": _set("purposes", lambda a: [a["contract"]["purpose"].upper(), "other"]),
    "operator": _set("operators", lambda _a: ["a" * 64]),
    "sectors": _sectors,
    "model_kinds": _set(
        "model_kinds", lambda a: [k for k in ("softmax", "mlp") if k != a["contract"]["model"]["kind"]]
    ),
    "columns": _set("columns", lambda a: ["age", "ill", "zip"] if a["now"].second % 2 else ["age", "sex", "pid"]),
    "trust_models": _trust,
    "max_epsilon": _set(
        "max_epsilon", lambda a: str(Decimal(a["contract"]["privacy"]["epsilon"]) - Decimal("0.000001"))
    ),
    "max_entity_epsilon": _set(
        "max_entity_epsilon", lambda a: "1.9" if a["contract"]["privacy"].get("entity") else None
    ),
    "require_entity": _entity,
    "entity_declared": _declared,
    "min_participants": _set("min_participants", lambda a: a["contract"]["participation"]["minimum"] + 1),
    "max_rounds": _set("max_rounds", lambda a: a["contract"]["training"]["rounds"] - 1),
    "policy_ends": _ends,
    "term": _term,
    "hours": _hours,
    "not_paused": _put(state="paused"),
    "code": _put(installed="4" * 64),
    "bundle": _order_has(bundle="5" * 64),
    "opened": _order_has(proved=False),
    "base": _base,
    "invited": _order_has(invited=[]),
    "clock_right": _order_has(ahead=301),
    "forward": _forward,
    "one_model": _one_model,
    "heads": _heads,
    "duplicates": _copies,
    "max_data_set_uses": _uses,
    "max_data_set_epsilon": _set_epsilon,
    "spare_attempts": _spares,
    "failed": _put(fails=True),
}
