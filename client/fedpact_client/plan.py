"""`fedpact-agent plan`: what a contract would cost a data set, before there is one, and how many rounds more fit."""

from decimal import Decimal
from fractions import Fraction
from math import floor
from typing import Annotated, Any

from pydantic import Field

from fedpact_client.config import AgentConfig
from fedpact_client.store import Budget, Store
from fedpact_client.views import epsilon_text, share_text
from fedpact_contract import ledger
from fedpact_contract.contract import MAX_STEPS
from fedpact_contract.errors import InputError
from fedpact_contract.record import Dec, Part, decimal_text


class Question(Part):
    """The privacy terms of a contract that somebody thinks of. Exactly one of the first two is given.

    The plan has `rounds` attempts and `spare_attempts` more, each of `local_steps` steps that draw each row with
    probability `sample_rate`; `delta` is the contract's.
    """

    epsilon: Dec | None = None
    noise_multiplier: Dec | None = None
    delta: Dec
    sample_rate: Dec
    local_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    rounds: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    spare_attempts: Annotated[int, Field(ge=0, le=1000)]

    @property
    def attempts(self) -> int:
        """Attempts that the plan covers."""
        return self.rounds + self.spare_attempts


def plan(config: AgentConfig, store: Store, data_set: str, asked: Question) -> dict[str, Any]:
    """What the plan costs: its own epsilon, and Rényi divergence at the data set's order against what is left.

    `epsilon_gate` and `sum_of_limit` (sum / R) are those of the data set with this plan wholly charged.
    `rounds_that_fit` is the largest number of rounds, with the same noise and spare attempts, that the data set's
    budget pays beside what is charged and promised. Quantities are decimal strings.

    Raises:
        InputError: CONFIG_DATA_SET, PLAN_NOISE, PLAN_STEPS; PRIVACY_RANGE, PRIVACY_UNREACHABLE.
    """
    from fedpact_contract.privacy import epsilon_gate, epsilon_pld, rdp, solve_noise_multiplier

    budget, delta = _budget(config, store, data_set)
    if (asked.epsilon is None) == (asked.noise_multiplier is None):
        raise InputError(
            "PLAN_NOISE",
            "Give the contract's epsilon or its noise multiplier: each follows from the other.",
            field="--epsilon, --noise-multiplier",
        )
    steps = asked.attempts * asked.local_steps
    if steps > MAX_STEPS:
        raise InputError(
            "PLAN_STEPS",
            f"The plan has {steps} steps; no contract has more than {MAX_STEPS}.",
            field="--rounds, --local-steps",
            rule="(rounds + spare attempts) * local steps",
        )
    noise = asked.noise_multiplier
    if asked.epsilon is not None:
        noise = solve_noise_multiplier(asked.epsilon, asked.delta, asked.sample_rate, steps)
    assert noise is not None  # noqa: S101 - one of the two is given
    attempt = rdp(noise, asked.sample_rate, asked.local_steps, budget.alpha)
    after = ledger.UPWARD.add(budget.committed, ledger.UPWARD.multiply(Decimal(asked.attempts), attempt))
    left = budget.limit - budget.committed
    fitting = floor(Fraction(left) / Fraction(attempt)) if left > 0 and attempt.is_finite() else 0
    return {
        "data_set": data_set,
        "noise_multiplier": decimal_text(noise),
        "sample_rate": decimal_text(asked.sample_rate),
        "steps": steps,
        "attempts": asked.attempts,
        "delta": decimal_text(asked.delta),
        "epsilon_pld": epsilon_text(epsilon_pld([(noise, asked.sample_rate, steps)], asked.delta)),
        "alpha": decimal_text(budget.alpha),
        "limit": decimal_text(budget.limit),
        "committed": decimal_text(budget.committed),
        "with_plan": decimal_text(after) if after.is_finite() else None,
        "sum_of_limit": share_text(after, budget.limit),
        "epsilon_gate": epsilon_text(epsilon_gate(after, delta, budget.alpha)),
        "fits": after <= budget.limit,
        "rounds": asked.rounds,
        "rounds_that_fit": max(0, min(fitting, MAX_STEPS // asked.local_steps) - asked.spare_attempts),
    }


def _budget(config: AgentConfig, store: Store, data_set: str) -> tuple[Budget, Decimal]:
    """Where the data set stands, and its delta; one without a signed card has spent nothing."""
    from fedpact_contract.privacy import filter_alpha, filter_limit

    if known := next((d for d in store.data_sets() if d.data_set == data_set), None):
        return store.budget(data_set), known.delta
    declared = config.data_set(data_set)
    alpha = filter_alpha(declared.epsilon, declared.delta)
    limit = filter_limit(declared.epsilon, declared.delta, alpha)
    return Budget(alpha=alpha, limit=limit, charged=Decimal(0), committed=Decimal(0)), declared.delta
