"""A second reader of the clauses: may this agent train on this order? Written from their words, with no code of ours.

The words are those of the contract's document (`fedpact_contract.text`, in English) and of configs/agent.toml. An
action is plain values: the contract, the policy, the card, what agent.toml declares, what happened before, the moment,
the order. No tests here.
"""

import math
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from functools import cache
from typing import Any
from zoneinfo import ZoneInfo

Action = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """Whether the order may be answered by an update; if not, the clauses that exclude it.

    `charged` attempts are begun in either case; `again`: the answer is the one that this order had before.
    """

    broken: frozenset[str] = frozenset()
    charged: int = 0
    again: str | None = None

    @property
    def allowed(self) -> bool:
        return not self.broken and self.again in (None, "update")


@dataclass
class Past:
    """What happened on one data set before, by what was decided here: by contract."""

    uses: int = 0
    charged: Decimal = Decimal(0)
    tries: dict[str, dict[int, int]] = field(default_factory=dict)  # contract -> round -> attempts
    bases: dict[str, dict[int, str]] = field(default_factory=dict)  # contract -> round -> the model it began from
    answers: dict[str, dict[tuple[int, str], str]] = field(default_factory=dict)  # (round, base) -> update or a clause

    def begun(self, contract: str, number: int) -> int:
        return self.tries.get(contract, {}).get(number, 0)

    def answer(self, contract: str, number: int, base: str) -> str | None:
        return self.answers.get(contract, {}).get((number, base))

    def latest(self, contract: str) -> int:
        return max((number for number, _ in self.answers.get(contract, {})), default=0)

    def spares_used(self, contract: str) -> int:
        return sum(count - 1 for count in self.tries.get(contract, {}).values())


@cache
def moment(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)


def renyi_limit(epsilon: Decimal, delta: Decimal, alpha: Decimal) -> float:
    """The sum of Rényi divergences at alpha that keeps (epsilon, delta) (Canonne, Kamath and Steinke 2020)."""
    order = float(alpha)
    return float(epsilon) - math.log1p(-1 / order) + math.log(float(delta) * order) / (order - 1)


def clock(now: datetime, zone: str) -> datetime:
    """What clocks show in a zone: its name, or an offset such as +08:00."""
    if zone[0] not in "+-":
        return now.astimezone(ZoneInfo(zone))
    size = timedelta(hours=int(zone[1:3]), minutes=int(zone[4:6]))
    return now.astimezone(timezone(size if zone[0] == "+" else -size))


# The contract's document: each function says whether the clause holds.


def purpose(a: Action) -> bool:
    """The data may be used for this purpose only; agent.toml: purposes of contracts, letter by letter."""
    return a["contract"]["purpose"] in a["policy"]["purposes"]


def operator(a: Action) -> bool:
    """agent.toml: fingerprints of operators' keys."""
    return a["operator"] in a["policy"]["operators"]


def sectors(a: Action) -> bool:
    """agent.toml: sectors that the other participants may come from, or "*" for any."""
    allowed = a["policy"]["sectors"]
    others = [p["sector"] for p in a["contract"]["participants"] if p["key"] != a["own_key"]]
    return allowed == "*" or set(others) <= set(allowed)


def model_kinds(a: Action) -> bool:
    """agent.toml: kinds of model."""
    return a["contract"]["model"]["kind"] in a["policy"]["model_kinds"]


def columns(a: Action) -> bool:
    """Training reads these columns, the label and whose a row is, and no other; agent.toml: columns it may read."""
    data, allowed = a["contract"]["data"], a["policy"]["columns"]
    read = [c["name"] for c in data["columns"]] + [data["label"]["name"]]
    if entity := a["contract"]["privacy"].get("entity"):
        read.append(entity["column"])
    return allowed == "*" or all(name in allowed for name in read)


def trust_models(a: Action) -> bool:
    """agent.toml: if absent, only noise that each participant adds before anything leaves."""
    allowed = a["policy"].get("trust_models", ["record-level-at-each-participant"])
    return a["contract"]["privacy"]["trust_model"] in allowed


def max_epsilon(a: Action) -> bool:
    """agent.toml: the most epsilon that one contract may cost."""
    return Decimal(a["contract"]["privacy"]["epsilon"]) <= Decimal(a["policy"]["max_epsilon"])


def max_entity_epsilon(a: Action) -> bool:
    """agent.toml: the most that all rows of one entity may cost in a contract that protects them. If absent, any."""
    entity, most = a["contract"]["privacy"].get("entity"), a["policy"].get("max_entity_epsilon")
    return entity is None or most is None or Decimal(entity["epsilon"]) <= Decimal(most)


def require_entity(a: Action) -> bool:
    """agent.toml: a data set with an entity needs contracts that protect it, or client level, unless false."""
    privacy = a["contract"]["privacy"]
    return (
        a["card"]["entity"] is None
        or privacy.get("entity") is not None
        or privacy["trust_model"] == "client-level-at-the-operator"
        or not a["policy"].get("require_entity", True)
    )


def entity_declared(a: Action) -> bool:
    """What was signed is what is declared: whose a row is, by agent.toml and by the card."""
    return bool(a["declared_entity"] == a["card"]["entity"])


def entity_column(a: Action) -> bool:
    """The column that says whose a row is must be the card's."""
    entity = a["contract"]["privacy"].get("entity")
    return entity is None or entity["column"] == a["card"]["entity"]


def min_participants(a: Action) -> bool:
    """agent.toml: fewest participants that a round may count from."""
    return bool(a["contract"]["participation"]["minimum"] >= a["policy"]["min_participants"])


def max_rounds(a: Action) -> bool:
    """agent.toml: most rounds of one contract."""
    return bool(a["contract"]["training"]["rounds"] <= a["policy"]["max_rounds"])


def policy_ends(a: Action) -> bool:
    """agent.toml: the policy ends here: no contract whose term goes further."""
    end = moment(a["policy"]["not_after"])
    return a["now"] <= end and moment(a["contract"]["term"]["not_after"]) <= end


def term(a: Action) -> bool:
    """Training may take place from ... to ...; the agent refuses every order outside this term."""
    within = a["contract"]["term"]
    return moment(within["not_before"]) <= a["now"] <= moment(within["not_after"])


def hours(a: Action) -> bool:
    """agent.toml: the hours in which training may begin; a round that began within them is finished."""
    window = a["policy"].get("hours")
    if window is None or a["past"].begun(a["id"], a["order"]["round"]):
        return True
    local = clock(a["now"], window["zone"])
    at = local.hour * 60 + local.minute
    begin, end = (int(window[k][:2]) * 60 + int(window[k][3:]) for k in ("begin", "end"))
    return bool(begin <= at < end) if begin < end else not end <= at < begin


def not_paused(a: Action) -> bool:
    """Any participant may pause at any time: its agent then trains nothing more."""
    return bool(a["state"] != "paused")


def not_withdrawn(a: Action) -> bool:
    """Any participant may withdraw at any time: its agent then trains nothing more."""
    return bool(a["state"] != "withdrawn")


def not_closed(a: Action) -> bool:
    """The contract has one run."""
    return bool(a["state"] != "closed")


def code(a: Action) -> bool:
    """Training runs by the installed release whose training code has this digest."""
    return bool(a["installed"] == a["contract"]["code"]["models_digest"])


def bundle(a: Action) -> bool:
    """The bundle that Flower carries is an empty shell; its digest is ..."""
    return bool(a["order"]["bundle"] == a["contract"]["code"]["shell_digest"])


def opened(a: Action) -> bool:
    """Everything that counts is in one append-only log: each round."""
    return bool(a["order"]["proved"] and a["order"]["opened_round"] == a["order"]["round"])


def base(a: Action) -> bool:
    """The first round starts from the model with this digest; each one from the model that the log names."""
    order = a["order"]
    named = order["opened_base"] == order["base"] == order["model"]
    return bool(named and (order["round"] != 1 or order["base"] == a["contract"]["model"]["initial_digest"]))


def invited(a: Action) -> bool:
    """Who takes part in a round is whom the log names as invited."""
    return a["me"] in a["order"]["invited"]


def rounds(a: Action) -> bool:
    """The run has so many rounds."""
    return bool(a["order"]["round"] <= a["contract"]["training"]["rounds"])


def forward(a: Action) -> bool:
    """Rounds only increase."""
    return bool(a["order"]["round"] >= a["past"].latest(a["id"]))


def clock_right(a: Action) -> bool:
    """This machine's clock is at most five minutes behind the moment at which the operator opened the round."""
    return bool(a["order"]["ahead"] <= 300)


def one_model(a: Action) -> bool:
    """A round has one base model."""
    begun = a["past"].bases.get(a["id"], {}).get(a["order"]["round"])
    return begun in (None, a["order"]["base"])


def heads(a: Action) -> bool:
    """An agent that sees fewer countersignatures of the others on the head before refuses, where heads are strict."""
    part = a["contract"]["participation"]
    return not part["strict_heads"] or a["order"]["round"] == 1 or a["order"]["countersigned"] >= part["head_threshold"]


def duplicates(a: Action) -> bool:
    """At most this part of the rows may be exact copies, where the contract says so."""
    most = (a["contract"].get("defences") or {}).get("max_duplicates")
    return most is None or a["copies"] <= Decimal(most)


BEFORE = {
    rule.__name__: rule
    for rule in (
        *(purpose, operator, sectors, model_kinds, columns, trust_models, max_epsilon, max_entity_epsilon),
        *(require_entity, entity_declared, entity_column, min_participants, max_rounds, policy_ends, term, hours),
        *(not_paused, not_withdrawn, not_closed, code, bundle, opened, base, invited, rounds, forward, heads),
        *(duplicates, one_model, clock_right),
    )
}
"""What is asked before an attempt."""


# What each further attempt needs.


def card_budget(a: Action, _try: int, charged: Decimal, _uses: int) -> bool:
    """The agent refuses the step that would exceed the limit on the data set's card."""
    card = a["card"]
    return float(charged + a["cost"]) <= renyi_limit(card["epsilon"], card["delta"], card["alpha"])


def max_data_set_epsilon(a: Action, _try: int, charged: Decimal, _uses: int) -> bool:
    """agent.toml: the most epsilon that all contracts on one data set together may cost. If absent, the card's."""
    most, card = a["policy"].get("max_data_set_epsilon"), a["card"]
    return most is None or float(charged + a["cost"]) <= renyi_limit(Decimal(most), card["delta"], card["alpha"])


def max_data_set_uses(a: Action, _try: int, _charged: Decimal, uses: int) -> bool:
    """agent.toml: how often all contracts together may use one data set; a use is an attempt, whatever comes of it."""
    most = a["policy"].get("max_data_set_uses")
    return most is None or uses + 1 <= most


def spare_attempts(a: Action, number: int, _charged: Decimal, _uses: int) -> bool:
    """A participant may repeat so many attempts after a crash."""
    used = a["past"].spares_used(a["id"]) + number - 1
    return number == 0 or used + 1 <= a["contract"]["privacy"]["spare_attempts"]


EACH = {rule.__name__: rule for rule in (card_budget, max_data_set_epsilon, max_data_set_uses, spare_attempts)}
FAILED = "failed"
"""Data or output did not allow it: charged, refused, never tried again."""
CLAUSES = (*BEFORE, *EACH, FAILED)


def read(a: Action) -> Verdict:
    """Decide one action."""
    past, order = a["past"], a["order"]
    again = past.answer(a["id"], order["round"], order["base"])
    broken = {name for name, rule in BEFORE.items() if not rule(a)}
    if broken or again is not None:
        first = (
            set() if again == "update" else {n for n, rule in EACH.items() if not rule(a, 0, past.charged, past.uses)}
        )
        return Verdict(broken=frozenset(broken | first if broken else ()), again=again)
    charged, uses = past.charged, past.uses
    for number in range(a["crashes"] + 1):
        broken = {name for name, rule in EACH.items() if not rule(a, number, charged, uses)}
        if broken:
            return Verdict(broken=frozenset(broken), charged=number)
        charged, uses = charged + a["cost"], uses + 1
    failed = frozenset({FAILED}) if a["fails"] else frozenset()
    return Verdict(broken=failed, charged=a["crashes"] + 1)


def remember(a: Action, verdict: Verdict) -> None:
    """What the next actions find done."""
    past, order = a["past"], a["order"]
    past.uses += verdict.charged
    past.charged += verdict.charged * a["cost"]
    if verdict.charged:
        past.tries.setdefault(a["id"], {})[order["round"]] = verdict.charged
        past.bases.setdefault(a["id"], {})[order["round"]] = order["base"]
    if verdict.again is None:
        said = "update" if verdict.allowed else min(verdict.broken)
        past.answers.setdefault(a["id"], {})[order["round"], order["base"]] = said
