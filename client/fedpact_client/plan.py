"""`fedpact-agent plan`: what a contract would cost a data set, what refuses it, and how many rounds the budget pays.

A contract is held against all that `sign` checks. Before there is one, a sketch of it is made here, from a template or
from the privacy terms alone, by the functions that the operator drafts with; what only the contract will say is not
looked at, and named.
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

from fedpact_client import policy, review
from fedpact_client.cards import check_own_file
from fedpact_client.config import AgentConfig, DataSet
from fedpact_client.home import AgentHome
from fedpact_client.review import Check, Cost, Review, held
from fedpact_client.store import Store
from fedpact_client.trial import check_room
from fedpact_contract import __version__
from fedpact_contract.canonical import sha256_hex
from fedpact_contract.contract import MAX_STEPS, Contract, Party, Software, load_toml, merge
from fedpact_contract.contract_file import read_contract
from fedpact_contract.errors import InputError
from fedpact_contract.ledger import Terms
from fedpact_contract.messages import DataSetCard
from fedpact_contract.record import Dec, Part
from fedpact_contract.request import instant
from fedpact_contract.sketch import sketch, solve

OPERATOR = Party(name="operator", entity_code="0" * 18, key="0" * 64)
SOFTWARE = Software(release=__version__, models_digest="0" * 64, shell_digest="0" * 64)
"""Stand-ins: no template names operator and code."""

NOT_READ = ("rows",)
"""What is not looked at even where there is a contract: `sign` reads the data set, a plan does not."""
NOT_IN_TEMPLATES = (*NOT_READ, "operator", "other participants", "code")
NOT_IN_TERMS = (*NOT_READ, "purpose", *NOT_IN_TEMPLATES[1:], "columns", "model", "term")
"""And what the rest of a contract says."""

OPTIONS = {
    "privacy.epsilon": "--epsilon",
    "privacy.noise_multiplier": "--noise-multiplier",
    "privacy.delta": "--delta",
    "privacy.sample_rate": "--sample-rate",
    "privacy.spare_attempts": "--spare-attempts",
    "privacy.entity.max_rows": "--entity-rows",
    "training.rounds": "--rounds",
    "training.local_steps": "--local-steps",
}
"""Where a fault of a sketch stands that was made of options."""

NO_CARD = "the signed card"
"""Where the data set has none yet: `sign` holds agent.toml and contract against it."""

ASKED_OF_TEMPLATES = [c for c in policy.CLAUSES if c not in (policy.check_operator, policy.check_sectors)]
ASKED_OF_TERMS = [policy.check_trust_model, policy.check_epsilon, policy.check_entity_epsilon, policy.check_rounds]


class Question(Part):
    """The privacy terms of a contract that somebody thinks of. Exactly one of the first two is given.

    `entity_rows`: at most so many rows of one entity are trained on, told apart by the column that agent.toml names.
    """

    epsilon: Dec | None = None
    noise_multiplier: Dec | None = None
    delta: Dec = Decimal("0.00001")
    sample_rate: Dec
    local_steps: int
    rounds: int
    spare_attempts: int = 1
    entity_rows: int | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Question | None":
        """From the command's options, where None was not given; None if no option was.

        Raises:
            InputError: PLAN, PLAN_OPTIONS: one is missing.
        """
        given = {name: value for name, value in options.items() if value is not None}
        for name in ("rounds", "local_steps", "sample_rate"):
            if given and name not in given:
                raise InputError(
                    "PLAN_OPTIONS",
                    "Privacy terms are rounds, local steps and sample rate, with epsilon or the noise multiplier.",
                    field=f"--{name.replace('_', '-')}",
                    remedy="Give all of them after a data set's id, or a contract's or template's file and none.",
                )
        return cls.parse(given, code="PLAN") if given else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a contract would cost a data set, and what refuses it.

    `gate` is the data set's epsilon_gate with the plan wholly charged, None where that has no bound; `rounds_that_fit`
    the largest number of rounds, with the same noise, spare attempts and measurements, that the data set's budget pays
    beside what is charged and promised.
    """

    contract: Contract
    data_set: str
    cost: Cost | None
    gate: Decimal | None
    rounds_that_fit: int
    checks: tuple[Check, ...]
    not_checked: tuple[str, ...]

    @property
    def refused(self) -> bool:
        """Whether this agent would not sign it."""
        return any(check.error is not None for check in self.checks)


def of_file(home: AgentHome, config: AgentConfig, store: Store, path: Path, now: datetime.datetime) -> Plan:
    """The plan of a contract, or of a template that names this enterprise.

    Raises:
        InputError: neither; a rule of contracts that it breaks; PLAN_OPTIONS, a data set's id without options;
            PLAN_NOT_NAMED, CONFIG_DATA_SET, PRIVACY_UNREACHABLE.
    """
    values = _template(path)
    if values is None:
        contract = _contract(config, path)
        found = review.review(home, config, store, contract, now, read_data=False)
        return _plan(home, config, store, found, NOT_READ)
    contract = solve(sketch(_filled(home, config, values, path), OPERATOR, SOFTWARE, file=path), file=path)
    declared = config.data_set(contract.participant(home.participant_id).data_set)
    own = _own(home, config, store, declared, contract)
    schema = held("columns", lambda: review.check_schema(_card(store, declared.id) or declared, contract))
    room = held("memory and disk", lambda: check_room(home, config, contract))
    found = _reviewed(home, config, store, contract, now, ASKED_OF_TEMPLATES, schema, room, *own)
    return _plan(home, config, store, found, NOT_IN_TEMPLATES)


def of_terms(
    home: AgentHome, config: AgentConfig, store: Store, data_set: str, asked: Question, now: datetime.datetime
) -> Plan:
    """The plan of a contract at record level with these privacy terms, whatever else it says.

    Raises:
        InputError: CONFIG_DATA_SET, PLAN_NOISE, PLAN_ENTITY; a rule of contracts that the terms break;
            PRIVACY_UNREACHABLE, TEMPLATE_ENTITY_UNPROTECTED.
    """
    if (asked.epsilon is None) == (asked.noise_multiplier is None):
        raise InputError(
            "PLAN_NOISE",
            "Give the contract's epsilon or its noise multiplier: each follows from the other.",
            field="--epsilon, --noise-multiplier",
        )
    try:
        values = _filled(home, config, _values(config, data_set, asked, now), None)
        contract = solve(sketch(values, OPERATOR, SOFTWARE), asked.noise_multiplier)
    except InputError as err:
        err.field = OPTIONS.get(err.field or "", err.field)
        raise
    if asked.epsilon is None:
        contract = _promising_its_cost(contract)
    own = _own(home, config, store, config.data_set(data_set), contract)
    found = _reviewed(home, config, store, contract, now, ASKED_OF_TERMS, *own)
    return _plan(home, config, store, found, NOT_IN_TERMS)


def _reviewed(
    home: AgentHome,
    config: AgentConfig,
    store: Store,
    contract: Contract,
    now: datetime.datetime,
    clauses: Sequence[policy.Clause],
    *first: Check,
) -> Review:
    """The part of a review that a sketch can stand: nothing about whom and what it does not name."""
    me = home.participant_id
    terms, cost, budget = review.price(home, config, store, contract, me)
    checks = (
        *first,
        held("noise covers the plan", lambda: review.check_noise(contract)),
        budget,
        held("policy", lambda: review.check_policy(contract, me, config.policy, now, clauses)),
    )
    return Review(contract=contract, parties=(), checks=checks, cost=cost, terms=terms, signed_here=False)


def _own(
    home: AgentHome, config: AgentConfig, store: Store, declared: DataSet, contract: Contract
) -> tuple[Check, Check]:
    """The data set's file is its own, and agent.toml says what the signed card says, where there is one."""
    card = _card(store, declared.id)

    def check_data() -> None:
        if card is not None:
            review.check_num_examples(declared, card)
        check_own_file(home, config, store, declared.id)

    def check_entities() -> None:
        entity = declared.entity if card is None else card.entity
        policy.check_entities(contract, config.policy, declared.id, declared.entity, entity)

    return held("own data", check_data), held("entities", check_entities)


def _card(store: Store, data_set: str) -> DataSetCard | None:
    """The signed card; None where none was signed yet."""
    known = store.declared(data_set)
    return None if known is None else known.declaration


def _plan(home: AgentHome, config: AgentConfig, store: Store, found: Review, not_checked: tuple[str, ...]) -> Plan:
    from fedpact_contract.privacy import epsilon_gate

    data_set, gate, fitting = found.contract.participant(home.participant_id).data_set, None, 0
    if found.terms is not None and found.cost is not None:
        limits = review.limits(home, config, store, data_set)
        gate = epsilon_gate(found.cost.after, limits.delta, limits.alpha)
        fitting = _fitting(found.contract, found.terms, found.cost)
    if _card(store, data_set) is None:
        not_checked = (*not_checked, NO_CARD)
    return Plan(
        contract=found.contract,
        data_set=data_set,
        cost=found.cost,
        gate=gate,
        rounds_that_fit=fitting,
        checks=found.checks,
        not_checked=not_checked,
    )


def _fitting(contract: Contract, terms: Terms, cost: Cost) -> int:
    """Rounds that are paid for by what the rest leaves, at most as many as contracts may have steps."""
    left = Fraction(cost.limit) - Fraction(cost.before) - sum(Fraction(m.rdp) for m in terms.measurements)
    baseline = 0 if contract.baseline is None else contract.baseline.steps
    most = (MAX_STEPS - baseline) // contract.noised_steps
    return max(0, min(floor(left / Fraction(terms.rdp)), most) - terms.spare_attempts)


def _contract(config: AgentConfig, path: Path) -> Contract:
    """The contract in a file or in evidence, where there is one."""
    terms = "--rounds, --local-steps, --sample-rate, and --epsilon or --noise-multiplier"
    ids = [d.id for d in config.data_sets]
    try:
        return read_contract(path)[0]
    except InputError as err:
        if err.code != "CONTRACT_FILE_MISSING":
            raise
        if str(path) in ids:
            raise InputError(
                "PLAN_OPTIONS",
                f"{path} is a data set of agent.toml, and no terms are given.",
                field=str(path),
                rule="a data set's plan needs privacy terms",
                remedy=f"Give {terms}.",
            ) from err
        err.remedy = (
            "Give the file of a contract or template, a folder of evidence, or a data set's id "
            f"({', '.join(ids) or 'agent.toml has none'}) with {terms}."
        )
        raise


def _template(path: Path) -> dict[str, Any] | None:
    """The values of a template; None of what `read_contract` reads, or finds fault with."""
    if not path.is_file() or (data := path.read_bytes()).lstrip()[:1] == b"{":
        return None
    try:
        values = load_toml(data.decode("utf-8"), file=path)
    except UnicodeDecodeError:
        return None
    return None if "operator" in values else values


def _filled(home: AgentHome, config: AgentConfig, values: Mapping[str, Any], file: Path | None) -> dict[str, Any]:
    """A template with its participants filled in: this one as it is, the others as nobody, with as many rows.

    Raises:
        InputError: PLAN_NOT_NAMED, CONFIG_DATA_SET, TEMPLATE_DERIVED_KEY.
    """
    given = values.get("participants")
    named = [item for item in given if isinstance(item, dict)] if isinstance(given, list) else []
    own = [item for item in named if item.get("entity_code") == config.agent.entity_code]
    if len(own) != 1:
        raise InputError(
            "PLAN_NOT_NAMED",
            f"The template names our entity code {config.agent.entity_code} {len(own)} times.",
            file=file,
            field="participants",
            rule="a template has one [[participants]] block for each enterprise",
            remedy="Give a contract, or a template that names this enterprise; or `fedpact-agent plan DATA_SET` with "
            "--rounds, --local-steps and --sample-rate.",
        )
    rows = config.data_set(str(own[0].get("data_set"))).num_examples
    filled = []
    for place, item in enumerate(named):
        mine = item is own[0]
        who = {
            "name": config.agent.name if mine else f"participant {place + 1}",
            "key": home.contract_public if mine else sha256_hex(b"%d" % place),
            "sector": config.agent.sector if mine else "unknown",
            "num_examples": rows,
        }
        filled.append(merge(item, who, file=file, under=f"participants.{place}"))
    return {**values, "participants": filled}


def _values(config: AgentConfig, data_set: str, asked: Question, now: datetime.datetime) -> dict[str, Any]:
    """A template with these privacy terms; the rest of it is there because every contract has it."""
    from fedpact_contract.privacy import CEILING

    declared = config.data_set(data_set)
    privacy: dict[str, Any] = {
        "trust_model": "record-level-at-each-participant",
        "unit": "example",
        "relation": "zero-out",
        "sampling": "poisson",
        "epsilon": CEILING if asked.epsilon is None else asked.epsilon,
        "delta": asked.delta,
        "max_grad_norm": 1,
        "sample_rate": asked.sample_rate,
        "spare_attempts": asked.spare_attempts,
    }
    if asked.entity_rows is not None:
        if declared.entity is None:
            raise InputError(
                "PLAN_ENTITY",
                f"agent.toml does not say which column of {data_set} tells entities apart.",
                field="--entity-rows",
                remedy="Name it as `entity` in the data set's block, or leave --entity-rows out.",
            )
        privacy["entity"] = {
            "column": declared.entity,
            "max_rows": asked.entity_rows,
            "method": "mixture-of-gaussians",
        }
    parties = {config.agent.entity_code: data_set, "0" * 17 + "1": "another" if data_set == "other" else "other"}
    return {
        "title": data_set,
        "purpose": "plan",
        "participants": [{"entity_code": code, "data_set": of, "floor_fen": 0} for code, of in parties.items()],
        "data": {
            "feature_scale": 1,
            "columns": [
                {"name": name, "kind": "number", "low": 0, "high": 1, "missing": "refuse"} for name in declared.columns
            ],
            "label": {"name": declared.label, "classes": ["no", "yes"], "rule": "value"},
        },
        "model": {"kind": "softmax", "hidden": []},
        "training": {
            "rounds": asked.rounds,
            "local_steps": asked.local_steps,
            "learning_rate": 1,
            "server_rate": 1,
            "aggregation": "weighted-mean",
        },
        "privacy": privacy,
        "participation": {
            "minimum": 2,
            "deadline_seconds": 60,
            "head_threshold": 0,
            "strict_heads": False,
            "missed_rounds_limit": 1,
        },
        "contribution": {"game": "fixed-weight", "loss": "cross-entropy", "estimator": "exact"},
        "settlement": {
            "currency": "CNY",
            "contribution_weight": 1,
            "data_weight": 0,
            "equal_weight": 0,
            "fallback": "equal",
            "close_days": 1,
        },
        "term": {"not_before": instant(now), "not_after": instant(now + datetime.timedelta(days=1))},
    }


def _promising_its_cost(contract: Contract) -> Contract:
    """The contract with the epsilon that its noise keeps; unchanged where that has no bound, and so refused."""
    from fedpact_contract.privacy import epsilon_plan

    if not (epsilon := epsilon_plan(contract)).is_finite():
        return contract
    return contract.model_copy(update={"privacy": contract.privacy.model_copy(update={"epsilon": epsilon})})
