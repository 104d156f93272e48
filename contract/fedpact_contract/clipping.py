"""Clipping to the median: by how much each update is scaled down, in training and in scoring. Exact, for a verifier.

An update's signal is its energy beyond that of its contracted noise, e_i - E_i with e_i = ||D_i||^2; without local DP
E_i = 0. Whoever has more signal than the median participant is scaled down to it:

    c_i = min(1, sqrt(limit_i / (e_i - E_i))), limit_i = max(0, median) + 3 s_i

where s_i = sqrt((2 E_i^2 + 4 E_i max(0, median)) / P) is the deviation of the energy of an honest update of P
parameters, so that noise alone is not taken for signal; without local DP s_i = 0. Dividing the *norms* by the noise
instead would measure noise: at epsilon 2 it is a hundred times the signal, and padded rows would pass.

The log holds e_i, in 1e-12, and c_i; E_i follows from the contract. c_i is a decimal, rounded down.
"""

from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from math import isqrt

from fedpact_contract.contract import ClientPrivacy, Contract
from fedpact_contract.errors import InputError
from fedpact_contract.shape import parameter_count

DEVIATIONS = 3
"""Deviations of noise energy that are left to an honest update."""

PLACES = 9
"""Decimal places of a factor."""

UNIT = 10**12
"""Energies stand in the log in this part of one."""

_ROOT_PLACES = 10**30


def contract_factors(contract: Contract, energies: Mapping[str, int]) -> dict[str, Decimal]:
    """By which factor each admitted update of a round counts, from what the log holds: ||D_i||^2 in 1e-12.

    Raises:
        InputError: CLIP_INPUT, as `clip_factors`; somebody is no participant.
    """
    parameters = parameter_count(contract.model, contract.data)
    return clip_factors(
        {p: Fraction(energy, UNIT) for p, energy in energies.items()},
        {p: noise_energy(contract, contract.participant(p).num_examples, parameters) for p in energies},
        parameters,
    )


def noise_energy(contract: Contract, num_examples: int, parameters: int) -> Fraction:
    """P T (lr sigma C / (q n))^2: what the contracted noise alone brings into an update; 0 at client level."""
    privacy, training = contract.privacy, contract.training
    if isinstance(privacy, ClientPrivacy):
        return Fraction(0)
    deviation = Fraction(training.learning_rate) * Fraction(privacy.noise_multiplier) * Fraction(privacy.max_grad_norm)
    return parameters * training.local_steps * (deviation / (Fraction(privacy.sample_rate) * num_examples)) ** 2


def clip_factors(
    energies: Mapping[str, Fraction], noise: Mapping[str, Fraction], parameters: int
) -> dict[str, Decimal]:
    """The factor of each admitted update, from 0 (only where half the updates are nothing at all) to 1.

    Args:
        energies: ||D_i||^2 by participant.
        noise: E_i by participant.
        parameters: P.

    Raises:
        InputError: CLIP_INPUT: no update, other participants, no parameter, or an energy that is negative.
    """
    if not energies or set(energies) != set(noise) or parameters < 1:
        raise _error("There must be an energy and a noise for each update, and at least one parameter.")
    for participant in sorted(energies):
        if energies[participant] < 0 or noise[participant] < 0:
            raise _error("An energy is negative.", participant)
    signal = {i: Fraction(energies[i]) - noise[i] for i in sorted(energies)}
    middle = max(Fraction(0), _median(list(signal.values())))
    result = {}
    for i, own in signal.items():
        limit = middle + DEVIATIONS * _root((2 * noise[i] ** 2 + 4 * noise[i] * middle) / parameters)
        result[i] = Decimal(1) if own <= limit else _rounded_down(limit / own)
    return result


def _median(values: list[Fraction]) -> Fraction:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _rounded_down(square: Fraction) -> Decimal:
    """The root of a fraction below 1, to `PLACES`."""
    scale = 10 ** (2 * PLACES)
    return Decimal(isqrt(square.numerator * scale // square.denominator)).scaleb(-PLACES)


def _root(square: Fraction) -> Fraction:
    return Fraction(isqrt(square.numerator * _ROOT_PLACES**2 // square.denominator), _ROOT_PLACES)


def _error(message: str, party: str | None = None) -> InputError:
    return InputError("CLIP_INPUT", message, field="updates", party=party, remedy="Give what the round's log holds.")
