"""The privacy label: what was promised and what was spent, with the fields that NIST SP 800-226 asks for.

The same fields under both trust models. Quantities are decimal strings; words are codes, which a report translates.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from fedpact_contract.contract import ClientPrivacy, Contract
from fedpact_contract.privacy import (
    CEILING,
    CENTRAL_ORDERS,
    LIBRARY,
    entity_guarantee,
    epsilon_pld,
    plan_groups,
    plan_rdp,
)
from fedpact_contract.record import decimal_text
from fedpact_contract.statistics import CountQuery, MeanQuery, QuantileQuery, Query, bounds_of, values_of

_ENTITY_OUTSIDE = ["entity-in-several-data-sets", "entity-under-several-names", "rows-that-the-column-gives-to-others"]
"""What the unit of all rows of one entity does not cover."""


def dp_label(contract: Contract, charged_steps_by_participant: Mapping[str, int]) -> dict[str, Any]:
    """What privacy was promised, by which mechanism and accountant, towards whom, and what was spent.

    `charged_steps_by_participant` maps a participant's id to the DP-SGD steps charged to it (failed attempts too), at
    client level to the released models that its updates entered; its lines stand in the contract's order.
    `epsilon` is what the contract promises, `epsilon_pld` what the plan costs and what was spent, by privacy loss
    distributions; statistics and a baseline count as released by everybody, in `releases` each query for one.
    `gates` names the most that the contract charges to a data set, at the one order of its gate, whatever was charged.
    What all contracts together spent of a data set, `epsilon_gate` and the Rényi sum, only the agent that keeps its
    ledger knows (`fedpact-agent budget`).

    Raises:
        InputError: CONTRACT_NOT_A_PARTY.
    """
    privacy, entity, central = contract.privacy, contract.privacy.entity, isinstance(contract.privacy, ClientPrivacy)
    measurements = _measurements(contract)
    beside = sum(line["releases"] for line in measurements)
    return {
        "standard": "NIST SP 800-226",
        "epsilon": decimal_text(privacy.epsilon),
        "delta": decimal_text(privacy.delta),
        "privacy_unit": privacy.unit,
        "neighbours": privacy.relation,
        "trust_model": privacy.trust_model,
        **({"not_protected_from": "the-operator"} if central else {}),
        "adversary": "sees-all-releases-and-knows-all-else",
        **_mechanism(contract),
        "noise": {"distribution": "gaussian", "multiplier": decimal_text(privacy.noise_multiplier)},
        "randomness": {"source": "aes-256-ctr", "arithmetic": "float64-four-draws-then-float32"},
        "plan": {
            "steps": contract.planned_steps,
            "releases": contract.planned_steps // contract.noised_steps + beside,
            "epsilon_pld": _shown(epsilon_pld(plan_groups(contract), privacy.delta)),
        },
        **({"gates": gates} if (gates := _gates(contract)) else {}),
        **({"measurements": measurements} if measurements else {}),
        **({} if entity is None else {"entity": entity.plain()}),
        "composition": {
            "within_contract": "rdp-of-the-whole-plan" if central else "pld-of-the-whole-plan",
            "across_contracts": "renyi-filter-of-each-data-set",
        },
        "accountant": privacy.accountant,
        "accounting": _accounting(contract),
        "hyperparameters": "fixed-at-signature",
        "outside": _outside(contract),
        "participants": _participants(contract, charged_steps_by_participant, beside),
    }


def _participants(contract: Contract, charged: Mapping[str, int], beside: int) -> list[dict[str, Any]]:
    """What each was charged; `beside` is the number of releases that are no updates."""
    for party_id in charged:
        contract.participant(party_id)
    lines = []
    for party in contract.participants:
        if party.id not in charged:
            continue
        steps = charged[party.id]
        line = {
            "participant": party.id,
            "name": party.name,
            "steps": steps,
            "releases": -(-steps // contract.noised_steps) + beside,
            "epsilon_pld": _shown(epsilon_pld(plan_groups(contract, steps), contract.privacy.delta)),
        }
        if contract.privacy.entity is not None:
            epsilon, delta = entity_guarantee(contract, steps)
            line |= {"entity_epsilon": _shown(epsilon), "entity_delta": decimal_text(delta)}
        lines.append(line)
    return lines


def _gates(contract: Contract) -> list[dict[str, Any]]:
    """Each data set's order, as far as the contract states it, and the whole plan's Rényi divergence at it."""
    plans = {order: plan_rdp(contract, order) for order in _gate_orders(contract)}
    return [
        {
            "participant": party.id,
            "name": party.name,
            "gate_order": decimal_text(party.gate_order),
            "renyi_plan": decimal_text(plan) if (plan := plans[party.gate_order]).is_finite() else "unbounded",
        }
        for party in contract.participants
        if party.gate_order is not None
    ]


def _measurements(contract: Contract) -> list[dict[str, Any]]:
    """Each release beside the updates, with what it alone would cost; together they cost less than the sum."""
    delta, lines = contract.privacy.delta, []
    if (statistics := contract.statistics) is not None:
        noise = statistics.noise_multiplier
        alone = _shown(epsilon_pld([(noise, Decimal(1), 1)], delta))
        for query in statistics.queries:
            line = {"kind": query.kind, "column": query.column} | _asked(contract, query)
            lines.append(line | {"noise_multiplier": decimal_text(noise), "releases": 1, "epsilon_pld": alone})
    if (baseline := contract.baseline) is not None:
        noise, rate = contract.privacy.noise_multiplier, contract.privacy.sample_rate
        lines.append(
            {
                "kind": "baseline",
                "steps": baseline.steps,
                "sample_rate": decimal_text(rate),
                "noise_multiplier": decimal_text(noise),
                "releases": 1,
                "epsilon_pld": _shown(epsilon_pld([(noise, rate, baseline.steps)], delta)),
            }
        )
    return lines


def _asked(contract: Contract, query: Query) -> dict[str, Any]:
    """What a query asks of its column; a number is clipped to its bounds before it is counted or summed."""
    if isinstance(query, CountQuery):
        return {"value": query.value if query.value is not None else f">= {query.at_least:f}"}
    asked: dict[str, Any] = {}
    if not values_of(contract, query.column):
        low, high = bounds_of(contract, query.column)
        asked = {"low": decimal_text(low), "high": decimal_text(high)}
    if not isinstance(query, MeanQuery) and query.bins is not None:
        asked["bins"] = query.bins
    if isinstance(query, QuantileQuery):
        asked["probabilities"] = [decimal_text(p) for p in query.probabilities]
    return asked


def _mechanism(contract: Contract) -> dict[str, Any]:
    """The label's fields that say what is clipped, sampled and noised."""
    privacy = contract.privacy
    if isinstance(privacy, ClientPrivacy):
        return {
            "mechanism": "gaussian-sum-of-clipped-updates",
            "sampling": {"method": "no-amplification", "rate": "1"},
            "clip": {"method": "whole-update", "max_update_norm": decimal_text(privacy.max_update_norm)},
        }
    return {
        "mechanism": "dp-sgd" if contract.statistics is None else "dp-sgd-and-gaussian-sums",
        "sampling": {"method": privacy.sampling, "rate": decimal_text(privacy.sample_rate)},
        "clip": {"method": "flat", "max_grad_norm": decimal_text(privacy.max_grad_norm)},
    }


def _accounting(contract: Contract) -> list[dict[str, Any]]:
    """By what each epsilon is computed: library and version, method, and the Rényi orders where there are any."""
    found: list[dict[str, Any]] = []
    if isinstance(contract.privacy, ClientPrivacy):
        orders = [decimal_text(order) for order in CENTRAL_ORDERS]
        found.append({"quantity": "epsilon", "library": LIBRARY, "method": "renyi-least-of-orders", "orders": orders})
    gates = [decimal_text(order) for order in _gate_orders(contract)]
    gate: dict[str, Any] = {"quantity": "epsilon_gate", "library": LIBRARY, "method": "renyi-filter"}
    return [
        *found,
        {"quantity": "epsilon_pld", "library": LIBRARY, "method": "privacy-loss-distributions"},
        gate | ({"orders": gates} if gates else {}),
    ]


def _gate_orders(contract: Contract) -> list[Decimal]:
    """The orders of the data sets' gates, as far as the contract states them, each once, ascending."""
    return sorted({p.gate_order for p in contract.participants if p.gate_order is not None})


def _outside(contract: Contract) -> list[str]:
    """What no epsilon here covers."""
    central = isinstance(contract.privacy, ClientPrivacy)
    return [
        "noise-by-the-operators-word" if central else "participants-with-altered-code",
        *(
            []
            if central
            else _ENTITY_OUTSIDE
            if contract.privacy.entity is not None
            else ["several-rows-of-one-person"]
        ),
        "counts-and-who-takes-part",
        "validation-rows",
        "timing",
        "data-where-they-are-kept",
    ]


def _shown(epsilon: Decimal) -> str:
    return decimal_text(epsilon) if epsilon.is_finite() else f"more than {CEILING}"
