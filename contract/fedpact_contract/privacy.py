"""Privacy arithmetic that everybody recomputes: epsilon of a plan, the noise for a budget, Rényi sums and their filter.

Everything is for Poisson-sampled Gaussian steps under zero-out neighbours (dp-accounting `REPLACE_SPECIAL`) and is
rounded to the side of caution. dp-accounting is imported on use: an import of this module costs nothing.

Inside one contract the plan is fixed at signature, so `epsilon_pld` holds for the whole of it. Across contracts only
a filter is valid: Rényi sums at one fixed order against a fixed limit (Feldman and Zrnic 2021; Lécuyer 2021).
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal
from typing import Any

from fedpact_contract.contract import ClientPrivacy, Contract, EntityUnit, MeasurementKind
from fedpact_contract.errors import InputError
from fedpact_contract.messages import measurement_event, release_event
from fedpact_contract.output import counted
from fedpact_contract.record import decimal_text

LIBRARY = "dp-accounting 0.6"
"""What all privacy arithmetic here is done with, by name and version."""

ACCOUNTANT = f"{LIBRARY} PLD, zero-out (REPLACE_SPECIAL)"
"""What a contract's `privacy.accountant` must say: the accountant and version that this package recomputes with."""

CENTRAL_ACCOUNTANT = f"{LIBRARY} RDP, zero-out, no amplification (flwr 1.41 RdpAccountant)"
"""The same at client level, with the formula and the orders of Flower's own accountant, which must agree."""

CENTRAL_ORDERS = (*(Decimal(n) / 10 for n in range(11, 110)), *map(Decimal, (*range(11, 64), 128, 256, 512, 1024)))
"""Its Rényi orders; epsilon is the least over them. All of them may be looked at, for the plan is fixed beforehand."""

Group = tuple[Decimal, Decimal, int]
"""(noise multiplier, sample rate, steps): so many equal steps."""

INFINITE = Decimal("Infinity")
CEILING = 100
"""Epsilons beyond this are not told apart: they promise nothing."""

MAX_ENTITY_ROWS = 32
"""Rows of one entity for which a guarantee is worked out."""

_EPSILON_STEP, _RDP_STEP, _NOISE_STEP, _ALPHA_STEP = Decimal("1e-6"), Decimal("1e-9"), Decimal("1e-3"), Decimal("0.1")
_RDP_CEILING = 1e20  # of one step: no budget pays for it, and more has no place in the context's digits
_DELTA_STEP = Decimal("1e-30")
_NOISE_LOW, _NOISE_HIGH = 250, 1_000_000  # in thousandths: the noise multipliers that are computed at all
_MAX_STEPS = 1_000_000
_ROUGH, _COARSE, _MIDDLE, _FINE = 1e-1, 1e-2, 1e-3, 1e-4  # value discretisation intervals
_MANY_GROUPS, _FEW_ROWS = 10, 4
_CONTEXT = Context(prec=50, Emax=999_999, Emin=-999_999)
_UP = Context(prec=50, rounding=ROUND_CEILING, Emax=999_999, Emin=-999_999)


def epsilon_pld(groups: Sequence[Group], delta: Decimal) -> Decimal:
    """Epsilon at `delta` of all these steps together, by privacy loss distributions, rounded up to 1e-6.

    `Infinity` beyond an epsilon of 100, a noise multiplier below 0.25 or a million steps: what lies there protects
    nobody, and hostile values would only cost memory.

    Raises:
        InputError: PRIVACY_RANGE, a quantity that makes no sense.
    """
    merged = _merge(groups, delta)
    if not merged:
        return Decimal(0)
    if any(noise < Decimal(_NOISE_LOW) * _NOISE_STEP for noise, _, _ in merged):
        return INFINITE
    if sum(steps for _, _, steps in merged) > _MAX_STEPS:
        return INFINITE
    if _epsilon(merged, delta, _COARSE) > CEILING:
        return INFINITE
    value = _epsilon(merged, delta, _FINE if len(merged) <= _MANY_GROUPS else _MIDDLE)
    return _round_up(value, _EPSILON_STEP) if value <= CEILING else INFINITE


def profile_pld(groups: Sequence[Group], epsilons: Sequence[float]) -> list[float]:
    """Delta of all these steps together at each epsilon (not negative), by privacy loss distributions; at most 1.

    Never below the truth: what these deltas allow, the steps allow.

    Raises:
        InputError: PRIVACY_RANGE, a quantity that makes no sense.
    """
    accountant = _accountant(_merge(groups, Decimal("0.5")), _MIDDLE)
    return [min(1.0, float(delta)) for delta in accountant.get_delta(list(epsilons))]


def epsilon_entity(groups: Sequence[Group], max_rows: int, delta: Decimal) -> Decimal:
    """Epsilon at `delta` for all of an entity's rows, at most `max_rows`, by the mixture of Gaussians; rounded up.

    Each step sums as many of its rows' gradients as were drawn, a binomial number, each of norm at most 1 in units of
    max_grad_norm; that they all point one way is the worst case (Ganesh 2024, "Tight group-level DP guarantees for
    DP-SGD with sampling via mixture of Gaussians mechanisms", arXiv:2401.10294). `Infinity` as in `epsilon_pld`.

    Raises:
        InputError: PRIVACY_RANGE.
    """
    _require(1 <= max_rows <= MAX_ENTITY_ROWS, "max_rows", f"between 1 and {MAX_ENTITY_ROWS}")
    at_least = epsilon_pld(groups, delta)
    merged = _merge(groups, delta)
    if max_rows == 1 or not merged or not at_least.is_finite():
        return at_least
    shift = sum(steps * (max_rows * float(rate) / float(noise)) ** 2 for noise, rate, steps in merged)
    if shift > 4 * CEILING or _epsilon(merged, delta, _ROUGH, max_rows) > CEILING:
        return INFINITE  # the mean alone gives them away: a shift of m deviations costs about m^2 / 2
    interval = _MIDDLE if max_rows <= _FEW_ROWS else _COARSE
    return _round_up(_epsilon(merged, delta, interval, max_rows), _EPSILON_STEP)


def group_guarantee(epsilon: Decimal, delta: Decimal, rows: int) -> tuple[Decimal, Decimal]:
    """(epsilon, delta) of `rows` rows together from one row's, by the formula for groups, rounded up; delta at most 1.

    (k epsilon, delta (e^(k epsilon) - 1) / (e^epsilon - 1)): Vadhan 2017, "The complexity of differential privacy",
    lemma 2.2. The quotient is 1 + e^epsilon + ... + e^((k - 1) epsilon), which subtracts nothing.

    Raises:
        InputError: PRIVACY_RANGE.
    """
    _require(0 < epsilon <= CEILING, "epsilon", f"above 0 and at most {CEILING}")
    _require(1 <= rows <= MAX_ENTITY_ROWS, "rows", f"between 1 and {MAX_ENTITY_ROWS}")
    _require(delta.is_finite() and 0 < delta < 1, "delta", "between 0 and 1")
    factor = Decimal(1)
    for others in range(1, rows):
        factor = _UP.add(factor, _CONTEXT.exp(_UP.multiply(others, epsilon)).next_plus(_CONTEXT))
    product = min(Decimal(1), _UP.multiply(delta, factor))
    return _UP.multiply(rows, epsilon), product.quantize(_DELTA_STEP, ROUND_CEILING, _CONTEXT)


def entity_guarantee(contract: Contract, steps: int) -> tuple[Decimal, Decimal]:
    """(epsilon, delta) for all of an entity's rows after `steps` training steps and what is measured, by the contract.

    Raises:
        InputError: PRIVACY_RANGE, PRIVACY_NO_ENTITY: the contract knows no entities.
    """
    privacy, entity = contract.privacy, contract.privacy.entity
    if entity is None:
        raise InputError("PRIVACY_NO_ENTITY", "The contract knows no entities.", field="privacy.entity")
    groups = plan_groups(contract, steps)
    if not any(count for _, _, count in groups):
        return Decimal(0), Decimal(0)
    if entity.method == "mixture-of-gaussians":
        return epsilon_entity(groups, entity.max_rows, privacy.delta), privacy.delta
    one = epsilon_pld(groups, privacy.delta)
    return group_guarantee(one, privacy.delta, entity.max_rows) if one.is_finite() else (INFINITE, Decimal(1))


def solve_noise_multiplier(
    epsilon: Decimal, delta: Decimal, sample_rate: Decimal, steps: int, beside: Sequence[Group] = ()
) -> Decimal:
    """The smallest noise multiplier, in thousandths, under which `steps` steps cost at most `epsilon`; at least 0.25.

    `beside` is what is released besides, whose noise is fixed.

    Raises:
        InputError: PRIVACY_RANGE; PRIVACY_UNREACHABLE, no noise multiplier up to 1000 is enough.
    """
    _require(0 < epsilon <= CEILING, "epsilon", f"above 0 and at most {CEILING}")
    _require(steps >= 1, "steps", "at least 1")
    _require(steps <= _MAX_STEPS, "steps", f"at most {_MAX_STEPS}")
    _merge([(Decimal(1), sample_rate, steps)], delta)
    if beside and epsilon_pld(beside, delta) > epsilon:
        raise InputError(
            "PRIVACY_UNREACHABLE",
            f"The statistics alone cost epsilon {epsilon_pld(beside, delta)}; the contract allows {epsilon} in all.",
            field="statistics.noise_multiplier",
            rule="epsilon of the statistics alone <= privacy.epsilon",
            remedy="Give the statistics more noise, ask fewer queries, or allow a larger epsilon.",
        )

    def costs(thousandths: int, interval: float) -> Decimal:
        if interval == _FINE:
            return epsilon_pld([(Decimal(thousandths) * _NOISE_STEP, sample_rate, steps), *beside], delta)
        groups = _merge([(Decimal(thousandths) * _NOISE_STEP, sample_rate, steps), *beside], delta)
        value = _epsilon(groups, delta, interval)
        return _round_up(value, _EPSILON_STEP)

    found: int | None = 1000
    for interval in (_COARSE, _MIDDLE, _FINE):
        found = _smallest(lambda k, i=interval: costs(k, i) <= epsilon, found or _NOISE_HIGH)  # type: ignore[misc]  # mypy cannot type a lambda's default
    if found is None:
        raise _unreachable(
            f"{steps} steps" + (" and what is measured" if beside else ""),
            epsilon,
            "Plan fewer training.rounds or training.local_steps, a smaller privacy.sample_rate, or a larger epsilon.",
        )
    return Decimal(found) * _NOISE_STEP


def accountant(trust_model: object) -> str:
    """What a contract of this trust model must name."""
    return CENTRAL_ACCOUNTANT if trust_model == "client-level-at-the-operator" else ACCOUNTANT


def epsilon_central(noise_multiplier: Decimal, delta: Decimal, releases: int) -> Decimal:
    """Epsilon at `delta` of so many Gaussian releases without sampling, by Rényi divergence; rounded up to 1e-6.

    The formula and the orders are those of Flower's `RdpAccountant`. By privacy loss distributions it is a few percent
    less (`epsilon_pld`). `Infinity` as there.

    Raises:
        InputError: PRIVACY_RANGE.
    """
    if not _merge([(noise_multiplier, Decimal(1), releases)], delta):
        return Decimal(0)
    if noise_multiplier < Decimal(_NOISE_LOW) * _NOISE_STEP or releases > _MAX_STEPS:
        return INFINITE
    import dp_accounting
    from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant

    orders = [float(order) for order in CENTRAL_ORDERS]
    flowers = RdpAccountant(orders, dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    flowers.compose(dp_accounting.GaussianDpEvent(float(noise_multiplier)), releases)
    value = float(flowers.get_epsilon(float(delta)))
    return _round_up(value, _EPSILON_STEP) if value <= CEILING else INFINITE


def solve_central_noise(epsilon: Decimal, delta: Decimal, releases: int) -> Decimal:
    """The smallest noise multiplier, in thousandths, under which so many releases cost at most `epsilon`.

    Raises:
        InputError: PRIVACY_RANGE; PRIVACY_UNREACHABLE.
    """
    _require(0 < epsilon <= CEILING, "epsilon", f"above 0 and at most {CEILING}")
    _require(1 <= releases <= _MAX_STEPS, "releases", f"between 1 and {_MAX_STEPS}")
    found = _smallest(lambda k: epsilon_central(Decimal(k) * _NOISE_STEP, delta, releases) <= epsilon, 1000)
    if found is None:
        raise _unreachable(
            f"{releases} released models", epsilon, "Plan fewer training.rounds, or a larger privacy.epsilon."
        )
    return Decimal(found) * _NOISE_STEP


def attempt_rdp(contract: Contract, alpha: Decimal) -> Decimal:
    """What one attempt is charged to a data set: its Rényi divergence at `alpha`, for one row, rounded up to 1e-9.

    At client level a row changes one clipped update into another one, which may lie twice max_update_norm away: the
    divergence is that of half the noise, four times that of the update against zeros. It bounds what released models
    tell of a row, and nothing bounds what the operator sees.

    Raises:
        InputError: PRIVACY_RANGE.
    """
    noise, rate, steps = _group(contract, contract.noised_steps)
    return rdp(noise / 2 if isinstance(contract.privacy, ClientPrivacy) else noise, rate, steps, alpha)


def plan_rdp(contract: Contract, alpha: Decimal) -> Decimal:
    """The most that the contract may charge to a data set whose gate has the order `alpha`: attempts, measurements.

    Raises:
        InputError: PRIVACY_RANGE.
    """
    attempts = contract.training.rounds + contract.privacy.spare_attempts
    measured = [rdp(*measured_group(contract, kind), alpha) for kind in contract.measurements]
    return _UP.add(_UP.multiply(attempts, attempt_rdp(contract, alpha)), sum(measured, Decimal(0)))


def rdp(noise_multiplier: Decimal, sample_rate: Decimal, steps: int, alpha: Decimal) -> Decimal:
    """Rényi divergence of order `alpha` (real, above 1) of all the steps, rounded up to 1e-9.

    dp-accounting's series for real orders loses digits or does not converge for some values; its integer orders do
    neither. The logarithm of the moment is convex in the order, so the chord between the neighbouring integers is an
    upper bound, and the divergence at the integer below a lower one: the series is kept within both.

    Raises:
        InputError: PRIVACY_RANGE.
    """
    _require(alpha.is_finite() and alpha > 1, "alpha", "a finite order above 1")
    if not _merge([(noise_multiplier, sample_rate, steps)], Decimal("0.5")):
        return Decimal(0)
    order = float(alpha)
    below = math.floor(order)
    whole = [*([below] if below >= 2 else []), below + 1]
    at = dict(zip([*whole, order], _rdp_one(noise_multiplier, sample_rate, [*whole, order]), strict=True))
    low = at.get(below, 0.0)
    chord = (1 - (order - below)) * (below - 1) * low + (order - below) * below * at[below + 1]
    high = chord / (order - 1) if alpha != below else low
    value = max(low, min(high, at[order])) if math.isfinite(at[order]) else high
    if not value < _RDP_CEILING:
        return INFINITE
    return _UP.multiply(steps, _decimal(value)).quantize(_RDP_STEP, ROUND_CEILING, _CONTEXT)


def filter_alpha(epsilon: Decimal, delta: Decimal) -> Decimal:
    """The one order for a data set whose whole budget is (epsilon, delta), to one decimal (docs: privacy).

    alpha = 1 + sqrt(ln(1/delta) / rho), rho = (sqrt(ln(1/delta) + epsilon) - sqrt(ln(1/delta)))^2.

    Raises:
        InputError: PRIVACY_RANGE.
    """
    _require(epsilon.is_finite() and epsilon > 0, "epsilon", "a finite number above 0")
    _require(0 < delta < 1, "delta", "between 0 and 1")
    log = -delta.ln(_CONTEXT)
    root = _CONTEXT.subtract(_CONTEXT.sqrt(_CONTEXT.add(log, epsilon)), _CONTEXT.sqrt(log))
    alpha = _CONTEXT.add(Decimal(1), _CONTEXT.divide(_CONTEXT.sqrt(log), root))
    return max(alpha.quantize(_ALPHA_STEP, ROUND_HALF_EVEN, _CONTEXT), 1 + _ALPHA_STEP)


def filter_limit(epsilon: Decimal, delta: Decimal, alpha: Decimal) -> Decimal:
    """The fixed limit R of the Rényi sum at `alpha` that keeps (epsilon, delta), rounded down to 1e-9.

    R = epsilon - ln(1 - 1/alpha) + ln(delta alpha) / (alpha - 1); not above 0 means that nothing fits.

    Raises:
        InputError: PRIVACY_RANGE.
    """
    _require(epsilon.is_finite() and epsilon > 0, "epsilon", "a finite number above 0")
    return _CONTEXT.subtract(epsilon, _conversion(delta, alpha)).quantize(_RDP_STEP, ROUND_FLOOR, _CONTEXT)


def epsilon_gate(rdp_sum: Decimal, delta: Decimal, alpha: Decimal) -> Decimal:
    """The Rényi sum converted to epsilon at its order, rounded up to 1e-6; 0 for an empty ledger.

    At most an `epsilon` of up to six decimals exactly where the sum is at most its `filter_limit`; one of more
    decimals may hold where this, rounded up, is above it. It is a gate, no meter: a small sum converts to a large
    epsilon.

    Raises:
        InputError: PRIVACY_RANGE.
    """
    _require(rdp_sum >= 0, "rdp_sum", "not negative")
    if rdp_sum == 0:
        return Decimal(0)
    if not rdp_sum.is_finite():
        return INFINITE
    value = _CONTEXT.add(rdp_sum, _conversion(delta, alpha)).quantize(_EPSILON_STEP, ROUND_CEILING, _CONTEXT)
    return max(Decimal(0), value)


def plan_groups(contract: Contract, steps: int | None = None) -> list[Group]:
    """Everything that the contract may charge, or with `steps` training steps in place of the planned ones."""
    measured = [measured_group(contract, kind) for kind in contract.measurements]
    return [_group(contract, contract.planned_steps if steps is None else steps), *measured]


def epsilon_plan(contract: Contract) -> Decimal:
    """What the whole plan costs by the contract's own accountant: Rényi at client level, else `epsilon_pld`.

    Raises:
        InputError: PRIVACY_RANGE.
    """
    privacy = contract.privacy
    if isinstance(privacy, ClientPrivacy):
        return epsilon_central(privacy.noise_multiplier, privacy.delta, contract.planned_steps)
    return epsilon_pld(plan_groups(contract), privacy.delta)


def plan_words(contract: Contract) -> str:
    """What epsilon covers, in words: 6 steps, 4 statistics and a baseline of 5 steps."""
    noised = "released model" if isinstance(contract.privacy, ClientPrivacy) else "step"
    parts = [counted(contract.planned_steps, noised)]
    if contract.statistics is not None:
        parts.append(counted(len(contract.statistics.queries), "statistic"))
    if contract.baseline is not None:
        parts.append(f"a baseline of {counted(contract.baseline.steps, 'step')}")
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def plan_words_zh(contract: Contract) -> str:
    """The same in Chinese."""
    parts = [f"{contract.planned_steps}{'个已发布模型' if isinstance(contract.privacy, ClientPrivacy) else '步'}"]
    if contract.statistics is not None:
        parts.append(f"{len(contract.statistics.queries)}项统计量")
    if contract.baseline is not None:
        parts.append(f"{contract.baseline.steps}步的基线模型")
    return "、".join(parts)


def measured_group(contract: Contract, kind: MeasurementKind) -> Group:
    """What one measurement outside the rounds is, as steps.

    Raises:
        InputError: MEASUREMENT_NOT_PLANNED.
    """
    event = measurement_event(contract, kind)
    return event.noise_multiplier, event.sample_rate, event.steps


def check_plan(contract: Contract) -> None:
    """The contract's noise keeps its whole plan (every round, every spare attempt) within its epsilon.

    Raises:
        InputError: CONTRACT_ACCOUNTANT, another accountant is named; CONTRACT_NOISE_TOO_SMALL.
    """
    privacy = contract.privacy
    if privacy.accountant != accountant(privacy.trust_model):
        raise InputError(
            "CONTRACT_ACCOUNTANT",
            f"The contract names the accountant {privacy.accountant!r}; this version recomputes with "
            f"{accountant(privacy.trust_model)!r}.",
            field="privacy.accountant",
            remedy="Make the contract with this version, or verify with the version that made it.",
        )
    costs = epsilon_plan(contract)
    if costs > privacy.epsilon:
        shown = f"{costs}" if costs.is_finite() else f"more than {CEILING}"
        raise InputError(
            "CONTRACT_NOISE_TOO_SMALL",
            f"The plan of {plan_words(contract)} costs epsilon {shown}; the contract promises "
            f"{decimal_text(privacy.epsilon)}.",
            field="privacy.noise_multiplier",
            rule="epsilon of the plan <= privacy.epsilon",
            remedy="Take the noise multiplier that `fedpact contract new` works out.",
        )
    if privacy.entity is not None:
        _check_entity(contract, privacy.entity)


def _check_entity(contract: Contract, entity: EntityUnit) -> None:
    """What the contract promises to whoever has several rows is what its plan keeps."""
    epsilon, delta = entity_guarantee(contract, contract.planned_steps)
    if epsilon > entity.epsilon or delta > entity.delta:
        shown = f"epsilon {epsilon} at delta {delta:.3g}" if epsilon.is_finite() else f"epsilon above {CEILING}"
        raise InputError(
            "CONTRACT_ENTITY_EPSILON",
            f"For {counted(entity.max_rows, 'row')} of one entity the plan costs {shown}; the contract promises "
            f"{decimal_text(entity.epsilon)} at {entity.delta:.3g}.",
            field="privacy.entity.epsilon",
            rule="the guarantee for entities is the one that the plan keeps",
            remedy="Take what `fedpact contract new` works out; fewer rows an entity, or more noise, make it smaller.",
        )


def _group(contract: Contract, steps: int) -> Group:
    event = release_event(contract)
    return event.noise_multiplier, event.sample_rate, steps


def _merge(groups: Sequence[Group], delta: Decimal) -> tuple[Group, ...]:
    """Checked groups, equal ones joined, in one order: the result does not depend on how the plan is cut."""
    _require(delta.is_finite() and 0 < delta < 1, "delta", "between 0 and 1")
    total: dict[tuple[Decimal, Decimal], int] = {}
    for noise, rate, steps in groups:
        _require(noise.is_finite() and noise > 0, "noise_multiplier", "a finite number above 0")
        _require(rate.is_finite() and 0 < rate <= 1, "sample_rate", "above 0 and at most 1")
        _require(steps >= 0, "steps", "not negative")
        total[noise, rate] = total.get((noise, rate), 0) + steps
    return tuple((noise, rate, steps) for (noise, rate), steps in sorted(total.items()) if steps)


@functools.lru_cache(maxsize=256)
def _epsilon(groups: tuple[Group, ...], delta: Decimal, interval: float, rows: int = 1) -> float:
    """Epsilon by PLD at one discretisation interval (pessimistic: never below the truth), of `rows` rows of one entity.

    Pure, so remembered.
    """
    return float(_accountant(groups, interval, rows).get_epsilon(float(delta)))


def _accountant(groups: tuple[Group, ...], interval: float, rows: int = 1) -> Any:  # noqa: ANN401 - it has no types
    """dp-accounting's PLD accountant after these steps, of `rows` rows of one entity."""
    import dp_accounting
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

    relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    accountant = PLDAccountant(relation, value_discretization_interval=interval)
    for noise, rate, steps in groups:
        if rows == 1:
            gaussian = dp_accounting.GaussianDpEvent(float(noise))
            accountant.compose(dp_accounting.PoissonSampledDpEvent(float(rate), gaussian), steps)
        else:
            drawn = {
                j: math.comb(rows, j) * float(rate) ** j * (1 - float(rate)) ** (rows - j) for j in range(rows + 1)
            }
            likely = {j: p for j, p in drawn.items() if p > 0}  # not those below every float
            mixture = dp_accounting.dp_event.MixtureOfGaussiansDpEvent(
                float(noise), list(likely), list(likely.values())
            )
            accountant.compose(mixture, steps)
    return accountant


def _rdp_one(noise: Decimal, rate: Decimal, orders: Sequence[float]) -> list[float]:
    """Rényi divergences of one step."""
    import dp_accounting
    from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant

    accountant = RdpAccountant(list(orders), dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    step = dp_accounting.PoissonSampledDpEvent(float(rate), dp_accounting.GaussianDpEvent(float(noise)))
    logger = logging.getLogger("absl")  # its warning says that the order is excluded: here a bound takes its place
    was, logger.disabled = logger.disabled, True
    try:
        accountant.compose(step)
    finally:
        logger.disabled = was
    return [max(0.0, float(value)) for value in accountant.rdp]


def _smallest(fits: Callable[[int], bool], start: int) -> int | None:
    """The smallest noise (in thousandths) that fits: gallop away from a guess, then halve. None if none does."""
    low, high, step = start, start, 1
    if fits(start):
        while high > _NOISE_LOW:
            low = max(_NOISE_LOW, high - step)
            if not fits(low):
                break
            high, step = low, step * 2
        else:
            return high
    else:
        while not fits(high):
            if high == _NOISE_HIGH:
                return None
            low, high, step = high, min(_NOISE_HIGH, high + step), step * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _unreachable(planned: str, epsilon: Decimal, remedy: str) -> InputError:
    most = _NOISE_HIGH // 1000
    return InputError(
        "PRIVACY_UNREACHABLE",
        f"No noise multiplier up to {most} keeps {planned} within epsilon {epsilon}.",
        field="privacy.epsilon",
        rule=f"noise_multiplier <= {most}",
        remedy=remedy,
    )


def _conversion(delta: Decimal, alpha: Decimal) -> Decimal:
    """What is added to a Rényi sum: ln(1 - 1/alpha) - ln(delta alpha) / (alpha - 1) (Canonne, Kamath, Steinke 2020)."""
    _require(delta.is_finite() and 0 < delta < 1, "delta", "between 0 and 1")
    _require(alpha.is_finite() and alpha > 1, "alpha", "a finite order above 1")
    first = _CONTEXT.subtract(Decimal(1), _CONTEXT.divide(Decimal(1), alpha)).ln(_CONTEXT)
    second = _CONTEXT.divide(_CONTEXT.multiply(delta, alpha).ln(_CONTEXT), alpha - 1)
    return _CONTEXT.subtract(first, second)


def _decimal(value: float) -> Decimal:
    return Decimal(value)


def _round_up(value: float, step: Decimal) -> Decimal:
    return _decimal(value).quantize(step, ROUND_CEILING, _CONTEXT) if math.isfinite(value) else INFINITE


def _require(holds: bool, field: str, rule: str) -> None:
    if not holds:
        raise InputError("PRIVACY_RANGE", f"{field} must be {rule}.", field=field, rule=rule)
