"""From what people decide to a contract: what follows from their terms, the noise first of all, is worked out here.

A sketch is a contract whose terms are final and whose noise, guarantee for entities, model and validation set are
still stand-ins: it obeys every rule of a contract. The operator drafts from one, and an agent plans with one.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from fedpact_contract import privacy
from fedpact_contract.contract import ClientPrivacy, Contract, EntityUnit, Party, Software, entity_delta_limit, merge
from fedpact_contract.errors import InputError
from fedpact_contract.output import counted

_DIGEST = "0" * 64


def sketch(values: Mapping[str, Any], operator: Party, software: Software, *, file: object = None) -> Contract:
    """The sketch of a template whose participants are filled in.

    Raises:
        InputError: an unknown, missing, derived or ill-typed key, or a broken rule, by name.
    """
    given = values["privacy"] if isinstance(values.get("privacy"), dict) else {}
    noised = {"noise_multiplier": 1, "accountant": privacy.accountant(given.get("trust_model"))}
    entity = {"entity": {"epsilon": 1, "delta": given.get("delta")}} if "entity" in given else {}
    derived = {
        "operator": operator.plain(),
        "privacy": noised | entity,
        "model": {"initial_digest": _DIGEST},
        "contribution": {"validation": {"root": _DIGEST, "slices": [{"source": "operator", "count": 1}]}},
        "code": software.plain(),
    }
    return Contract.parse(merge(values, derived, file=file), file=file)


def solve(sketched: Contract, noise: Decimal | None = None, *, file: object = None) -> Contract:
    """The sketch with this noise, or else the smallest that keeps its epsilon, and the entities' guarantee under it.

    Raises:
        InputError: PRIVACY_RANGE, PRIVACY_UNREACHABLE, TEMPLATE_ENTITY_UNPROTECTED; a rule that the guarantee breaks.
    """
    try:
        noised = _with(sketched, noise_multiplier=_noise(sketched) if noise is None else noise)
        if noised.privacy.entity is not None:
            noised = _with(noised, entity=_guarantee(noised, noised.privacy.entity))
        return Contract.parse(noised.plain())
    except InputError as err:
        err.file = err.file or (None if file is None else str(file))
        raise


def _noise(sketched: Contract) -> Decimal:
    """The smallest noise of training that keeps the contract's epsilon, beside what is measured.

    A baseline has training's own noise: its steps are training steps, as far as privacy goes.
    """
    plan = sketched.privacy
    if isinstance(plan, ClientPrivacy):
        return privacy.solve_central_noise(plan.epsilon, plan.delta, sketched.planned_steps)
    baseline = 0 if sketched.baseline is None else sketched.baseline.steps
    statistics = [] if sketched.statistics is None else [privacy.measured_group(sketched, "statistics")]
    steps = sketched.planned_steps + baseline
    return privacy.solve_noise_multiplier(plan.epsilon, plan.delta, plan.sample_rate, steps, statistics)


def _guarantee(noised: Contract, entity: EntityUnit) -> EntityUnit:
    """The clause with what the plan keeps for all rows of one entity."""
    epsilon, delta = privacy.entity_guarantee(noised, noised.planned_steps)
    if not epsilon.is_finite():
        raise InputError(
            "TEMPLATE_ENTITY_UNPROTECTED",
            f"{counted(entity.max_rows, 'row')} of one entity would cost an epsilon above {privacy.CEILING}, where one "
            f"row costs {privacy.epsilon_plan(noised)}.",
            field="privacy.entity.max_rows",
            rule=f"the entities' epsilon is at most {privacy.CEILING}",
            remedy="Allow fewer rows of one entity (max_rows), or take a smaller privacy.epsilon, which brings noise.",
        )
    if delta > (most := entity_delta_limit(noised)):
        raise InputError(
            "TEMPLATE_ENTITY_UNPROTECTED",
            f"By the formula for groups {counted(entity.max_rows, 'row')} of one entity would be protected at a delta "
            f"of {delta:.3g}, which promises nothing; it must be at most {most:.3g}.",
            field="privacy.entity.method",
            rule="the entities' delta is at most 1/(10 entities), and there may be as many entities as rows",
            remedy='Take method = "mixture-of-gaussians", which keeps the contract\'s delta, or allow fewer rows of '
            "one entity (max_rows).",
        )
    return entity.model_copy(update={"epsilon": epsilon, "delta": delta})


def _with(contract: Contract, **terms: Any) -> Contract:  # noqa: ANN401 - values of the privacy clause
    return contract.model_copy(update={"privacy": contract.privacy.model_copy(update=terms)})
