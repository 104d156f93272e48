"""What a person sees before signing a contract: every check against what is known here, and what it costs.

Failed checks are collected, so that all of them are shown; `Review.refuse` then raises the first.
"""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from fedpact_client import policy
from fedpact_client.api import printable
from fedpact_client.cards import check_known_elsewhere, check_own_file
from fedpact_client.config import AgentConfig, DataSet
from fedpact_client.home import AgentHome
from fedpact_client.store import Agreement, Store
from fedpact_client.store_records import OVER
from fedpact_contract import ledger
from fedpact_contract.contract import Contract, Participant, Party
from fedpact_contract.errors import FedpactError, InputError, RefusedError
from fedpact_contract.ledger import Terms
from fedpact_contract.messages import DataSetCard, check_card_delta, measurement_event
from fedpact_contract.record import decimal_text
from fedpact_contract.request import parse_instant
from fedpact_contract.trust import Trust, TrustedParty

Standing = Literal["self", "known", "operator only"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standings:
    """One party of a contract, and how this enterprise knows its key."""

    party: Party
    standing: Standing


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was checked before signing: what it is, and the error where it failed."""

    name: str
    error: FedpactError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the whole plan costs the data set. `epsilon` is the plan's own, by the contract's accountant.

    The rest are Rényi sums at `alpha`: `before` is charged or promised to other contracts, `after` with this plan
    added; `limit` is R.
    """

    epsilon: Decimal
    alpha: Decimal
    attempts: int
    before: Decimal
    after: Decimal
    limit: Decimal


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """A data set's whole budget: delta, the order of its Rényi sum and the limit R of that sum."""

    delta: Decimal
    alpha: Decimal
    limit: Decimal


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """Everything that a person sees before signing."""

    contract: Contract
    parties: tuple[Standings, ...]
    checks: tuple[Check, ...]
    cost: Cost | None
    terms: Terms | None
    signed_here: bool

    def refuse(self) -> None:
        """Raise the first failed check, if there is one.

        Raises:
            RefusedError, InputError, FaultError: the check's.
        """
        for check in self.checks:
            if check.error is not None:
                raise check.error


def review(
    home: AgentHome,
    config: AgentConfig,
    store: Store,
    contract: Contract,
    now: datetime.datetime,
    *,
    read_data: bool,
) -> Review:
    """Hold a contract that is offered against everything that is known here; failed checks are collected.

    `read_data`: also read the data set and try the contract's schema on it.

    Raises:
        InputError: this enterprise is no participant of the contract; a damaged trust file or store.
        FaultError: RELEASED_DAMAGED.
    """
    from fedpact_client.trial import check_room

    me = contract.participant(home.participant_id)
    known = agreement(store, contract.id)
    trust = home.trust()
    terms, spends, budget = price(home, config, store, contract, me.id)
    checks = [
        held("enrolled operator", lambda: check_operator(home, contract)),
        held("fingerprints", lambda: check_trust(contract, trust, home.trust_path)),
        held("own data", lambda: check_own(home, config, store, contract, me)),
        *_entities(config, store, contract, me),
        held("installed code", lambda: check_code(contract)),
        held("noise covers the plan", lambda: check_noise(contract)),
        budget,
        held("policy", lambda: check_policy(contract, me.id, config.policy.resolve(home.operator().id), now)),
        *([] if terms is None else [held("policy for the data set", lambda: check_use(home, config, store, terms))]),
        held("not ended here", lambda: check_not_ended(known)),
        held("memory and disk", lambda: check_room(home, config, contract)),
    ]
    if read_data and not any(check.error for check in checks):
        checks.append(held("rows fit the schema", lambda: check_rows(home, config, store, contract)))
    return Review(
        contract=contract,
        parties=tuple(
            Standings(party=p, standing=standing(p, me.id, contract, trust)) for p in contract.named().values()
        ),
        checks=tuple(checks),
        cost=spends,
        terms=terms,
        signed_here=known is not None,
    )


def limits(home: AgentHome, config: AgentConfig, store: Store, data_set: str) -> Limits:
    """The budget on the data set's card or, where none was signed yet, that its card would have.

    Raises:
        InputError: CONFIG_DATA_SET, CARD_BUDGET, CARD_DELTA.
    """
    from fedpact_client import cards

    known = store.declared(data_set)
    if known is not None:
        check_card_delta(known.delta, known.declaration.num_examples)
        return Limits(delta=known.delta, alpha=known.alpha, limit=known.limit)
    declared = config.data_set(data_set)
    alpha, limit = cards.limits(home, declared)
    return Limits(delta=declared.delta, alpha=alpha, limit=limit)


def price(
    home: AgentHome, config: AgentConfig, store: Store, contract: Contract, participant_id: str
) -> tuple[Terms | None, Cost | None, Check]:
    """What the contract charges the data set, what comes of that, and whether it fits; None where it has no bound."""
    from fedpact_contract.privacy import epsilon_plan

    data_set = contract.participant(participant_id).data_set
    try:
        budget = limits(home, config, store, data_set)
        terms = make_terms(contract, participant_id, budget.alpha)
    except (RefusedError, InputError) as err:
        return None, None, Check(name="budget", error=err)
    rows, others = store.rows(data_set), _other_plans(store, terms)
    spends = Cost(
        epsilon=epsilon_plan(contract),
        alpha=budget.alpha,
        attempts=terms.planned_attempts,
        before=ledger.committed([r for r in rows if r.contract_id != terms.contract_id], others),
        after=ledger.committed(rows, [*others, terms]),
        limit=budget.limit,
    )
    return terms, spends, held("budget", lambda: check_budget(store, terms, budget.limit))


def make_terms(contract: Contract, participant_id: str, alpha: Decimal) -> Terms:
    """What the contract fixes for the ledger: one attempt's Rényi divergence at the data set's alpha.

    Raises:
        RefusedError: BUDGET_PLAN_EXCEEDED, one attempt alone has no bound.
    """
    from fedpact_contract.privacy import attempt_rdp, rdp

    attempt = attempt_rdp(contract, alpha)
    if not attempt.is_finite():
        raise _unbounded("One attempt has no bounded cost.", "privacy.noise_multiplier")
    events = {kind: measurement_event(contract, kind) for kind in contract.measurements}
    measured = {kind: rdp(e.noise_multiplier, e.sample_rate, e.steps, alpha) for kind, e in events.items()}
    for kind, value in measured.items():
        if not value.is_finite():
            raise _unbounded(f"What is measured as {kind} has no bounded cost.", kind)
    return Terms.of(contract, participant_id, attempt, measured)


def check_operator(home: AgentHome, contract: Contract) -> None:
    """The contract's operator is the one that this home is enrolled with.

    Raises:
        RefusedError: SIGN_OPERATOR.
    """
    known = home.operator()
    if (contract.operator.key, contract.operator.entity_code) != (known.key, known.entity_code):
        raise RefusedError(
            "SIGN_OPERATOR",
            f"The contract's operator is not {known.name}, with which this agent is enrolled.",
            party=contract.operator.id,
            remedy="Do not sign. Ask the operator.",
        )


def check_own(home: AgentHome, config: AgentConfig, store: Store, contract: Contract, me: Participant) -> None:
    """What the contract says of this enterprise is what it declared itself, and the data set's file is its own.

    Raises:
        RefusedError: SIGN_ENTITY, SIGN_NUM_EXAMPLES, SIGN_CARD, SIGN_GATE_ORDER, SIGN_COLUMNS, SIGN_LABEL, SIGN_SLICE,
            DATA_SET_KNOWN_ELSEWHERE.
        InputError: CONFIG_DATA_SET, DATA_SET_UNKNOWN.
    """
    data_set = config.data_set(me.data_set)
    card = store.data_set(me.data_set).declaration
    slices = {s.source: s.count for s in contract.contribution.validation.slices}
    if me.entity_code != config.agent.entity_code:
        raise _own("SIGN_ENTITY", f"The contract gives our key the entity code {me.entity_code}.", "entity_code")
    if me.num_examples != card.num_examples:
        raise _own(
            "SIGN_NUM_EXAMPLES",
            f"The contract says {me.num_examples} examples, the signed card {card.num_examples}.",
            "num_examples",
        )
    check_num_examples(data_set, card)
    if me.card is not None and me.card != card.digest():
        raise _own(
            "SIGN_CARD",
            f"The contract was made by the card {me.card} of {me.data_set}; the one signed last here is "
            f"{card.digest()}.",
            "card",
        )
    if me.gate_order != card.alpha:
        raise _own(
            "SIGN_GATE_ORDER",
            f"Our ledger's Rényi order is {decimal_text(card.alpha)} by the signed card, and "
            f"{'none' if me.gate_order is None else decimal_text(me.gate_order)} by the contract.",
            "gate_order",
        )
    check_schema(card, contract)
    check_own_file(home, config, store, me.data_set)
    if slices.get(me.id, 0) > card.released_rows:
        raise _own(
            "SIGN_SLICE",
            f"The contract counts {slices[me.id]} validation rows from us; {card.released_rows} were released.",
            "contribution.validation.slices",
        )


def _entities(config: AgentConfig, store: Store, contract: Contract, me: Participant) -> list[Check]:
    """What tells entities apart, by agent.toml, card, contract and policy; "own data" says where one is missing."""
    declared = next((d for d in config.data_sets if d.id == me.data_set), None)
    known = store.declared(me.data_set)
    if declared is None or known is None:
        return []
    columns = declared.entity, known.declaration.entity
    return [held("entities", lambda: policy.check_entities(contract, config.policy, me.data_set, *columns))]


def check_num_examples(declared: DataSet, card: DataSetCard) -> None:
    """agent.toml promises as many examples as the signed card.

    Raises:
        RefusedError: SIGN_NUM_EXAMPLES.
    """
    if declared.num_examples != card.num_examples:
        raise RefusedError(
            "SIGN_NUM_EXAMPLES",
            f"The signed card says {card.num_examples} examples, agent.toml {declared.num_examples}.",
            file="agent.toml",
            field="data_sets.num_examples",
            rule="what was signed is what is declared",
            remedy=f"Put `num_examples` back in agent.toml, or sign a new card: fedpact-agent card {declared.id}.",
        )


def check_schema(declared: DataSet | DataSetCard, contract: Contract) -> None:
    """Features and label are those that our data set declares.

    Raises:
        RefusedError: SIGN_COLUMNS, SIGN_LABEL.
    """
    names = {c.name for c in contract.data.columns} | {*contract.data.label_columns[1:]}
    if not names <= set(declared.columns):
        missing = sorted(names - set(declared.columns))
        raise _own("SIGN_COLUMNS", f"The contract reads {missing[0]}; our data set declares no such column.", "columns")
    if contract.data.label.name != declared.label:
        raise _own(
            "SIGN_LABEL",
            f"The contract predicts {contract.data.label.name}, our data set declares {declared.label}.",
            "label",
        )


def check_code(contract: Contract) -> None:
    """The training code that the contract names is the code that is installed here.

    Raises:
        RefusedError: CODE_MODELS_MISMATCH.
    """
    from fedpact_models.code import models_digest

    if contract.code.models_digest != models_digest():
        raise RefusedError(
            "CODE_MODELS_MISMATCH",
            f"The contract names the training code of release {contract.code.release}; other code is installed here.",
            field="code.models_digest",
            remedy="Install the release that the contract names, from a source that you trust.",
        )


def check_noise(contract: Contract) -> None:
    """The noise keeps the whole plan within the contract's epsilon.

    Raises:
        RefusedError: CONTRACT_NOISE_TOO_SMALL, CONTRACT_ACCOUNTANT, PRIVACY_RANGE.
    """
    from fedpact_contract.privacy import check_plan

    try:
        check_plan(contract)
    except InputError as err:
        # The input at fault is the operator's contract, not this command's: it is refused.
        raise RefusedError(err.code, err.message, field=err.field, rule=err.rule, remedy=err.remedy) from err


def check_budget(store: Store, terms: Terms, limit: Decimal) -> None:
    """The whole plan fits beside what is charged and the other signed plans.

    Raises:
        RefusedError: BUDGET_PLAN_EXCEEDED.
    """
    try:
        ledger.check_plans(store.rows(terms.data_set), _other_plans(store, terms), terms, limit)
    except RefusedError as err:
        raise plan_exceeded(err) from err


def check_use(home: AgentHome, config: AgentConfig, store: Store, terms: Terms) -> None:
    """With the whole plan, beside all others, the data set stays within the policy's limits for it.

    Raises:
        RefusedError: POLICY_DATA_SET_EPSILON, POLICY_DATA_SET_USES.
    """
    budget, rows = limits(home, config, store, terms.data_set), store.rows(terms.data_set)
    plans = [*_other_plans(store, terms), terms]
    use = policy.DataSetUse(
        data_set=terms.data_set,
        uses=store.uses(terms.data_set) + sum(ledger.uses_left(rows, plan) for plan in plans),
        rdp=ledger.committed(rows, plans),
        delta=budget.delta,
        alpha=budget.alpha,
    )
    policy.check_data_set(config.policy, use)


def check_not_ended(known: Agreement | None) -> None:
    """The contract was not withdrawn from, or closed, on this machine.

    Raises:
        RefusedError: SIGN_ENDED.
    """
    if known is not None and known.state in OVER:
        raise RefusedError(
            "SIGN_ENDED",
            f"The contract was signed here before and is {known.state}.",
            field=f"contract {known.contract_id}",
            rule="withdrawing is final",
        )


def check_rows(home: AgentHome, config: AgentConfig, store: Store, contract: Contract) -> None:
    """The trainer can read and encode enough rows, and they are no other data set's.

    Raises:
        InputError: DATA_*.
        RefusedError: DATA_SET_KNOWN_ELSEWHERE, QUALITY_GATE, SIGN_LOOK.
        FailedError: TRAINER_LOST.
    """
    from fedpact_client.trial import try_rows

    trial = try_rows(home, config, contract)
    for fingerprint in trial.fingerprints:
        data_set = contract.participant(home.participant_id).data_set
        check_known_elsewhere(home, store, data_set, fingerprint)


def check_policy(
    contract: Contract,
    participant_id: str,
    own: policy.Policy,
    now: datetime.datetime,
    clauses: Sequence[policy.Clause] | None = None,
) -> None:
    """The policy allows it: now, or at the beginning of its term where that is still to come.

    Raises:
        RefusedError: POLICY_*.
    """
    policy.check(contract, participant_id, own, max(now, parse_instant(contract.term.not_before)), clauses)


def check_trust(contract: Contract, trust: Trust, file: object) -> None:
    """No party's key contradicts the trust file.

    Raises:
        RefusedError: TRUST_CONTRADICTION.
    """
    for party in contract.named().values():
        entry = _contradicting(party, contract.role(party.id), trust)
        if entry is not None:
            raise RefusedError(
                "TRUST_CONTRADICTION",
                f"The contract gives {printable(party.name)} ({party.entity_code}) the key {party.id}; "
                f"trust.toml knows {entry.name} ({entry.entity_code}) by the key {entry.fingerprint}.",
                file=file,
                party=printable(party.name),
                rule="the parties' keys are those that they told us themselves",
                remedy="Do not sign. Call that party on a number that you know and compare fingerprints.",
            )


def standing(party: Party, own_id: str, contract: Contract, trust: Trust) -> Standing:
    """How this enterprise knows a party's key (where nothing contradicts it)."""
    if party.id == own_id:
        return "self"
    wanted = (contract.role(party.id), party.entity_code, party.id)
    known = any((e.role, e.entity_code, e.fingerprint) == wanted for e in trust.party)
    return "known" if known else "operator only"


def _contradicting(party: Party, role: str, trust: Trust) -> TrustedParty | None:
    """An entry that gives this key to another legal entity, or this legal entity another key.

    An entity may have a key in each role: entries in this role count, all of them only where there is none. An auditor
    has keys of its own for that: other roles say nothing of them.
    """
    owner = next((e for e in trust.party if e.fingerprint == party.id), None)
    if owner is not None and owner.entity_code != party.entity_code:
        return owner
    entries = trust.entries(party.entity_code)
    in_role = [e for e in entries if e.role == role] or ([] if role == "auditor" else list(entries))
    return None if not in_role or any(e.fingerprint == party.id for e in in_role) else in_role[0]


def agreement(store: Store, contract_id: str) -> Agreement | None:
    """The contract as it was signed here, or None."""
    return next((a for a in store.contracts() if a.contract_id == contract_id), None)


def _other_plans(store: Store, terms: Terms) -> list[Terms]:
    return [
        a.terms
        for a in store.contracts()
        if a.terms.data_set == terms.data_set and a.state not in OVER and a.contract_id != terms.contract_id
    ]


def plan_exceeded(err: RefusedError) -> RefusedError:
    """The ledger's refusal of a plan, under the code that people and programs know."""
    if err.code != "BUDGET_EXCEEDED":
        return err
    return RefusedError("BUDGET_PLAN_EXCEEDED", err.message, field=err.field, rule=err.rule, remedy=err.remedy)


def held(name: str, check: Callable[[], None]) -> Check:
    """Run a check; what it refuses is shown to the person, and raised before anything is signed."""
    try:
        check()
    except (RefusedError, InputError) as err:
        return Check(name=name, error=err)
    return Check(name=name)


def _unbounded(message: str, field: str) -> RefusedError:
    return RefusedError(
        "BUDGET_PLAN_EXCEEDED",
        message,
        field=field,
        rule="the plans of all signed contracts fit into the data set's budget",
        remedy="Do not sign. Ask the operator for a contract with more noise.",
    )


def _own(code: str, message: str, field: str) -> RefusedError:
    return RefusedError(code, message, field=field, remedy="Do not sign. Ask the operator to correct the contract.")
