"""Clip factors: exact, of the signal and not of the noise, the same for whoever recomputes them."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from tests.support.models_kit import a_model, plain_schema, training_contract

from fedpact_contract.clipping import clip_factors, noise_energy
from fedpact_contract.errors import InputError
from fedpact_server.noise_floor import energy_ratio

NONE = dict.fromkeys("abc", Fraction(0))


def of(*energies, noise=0):
    names = "abcdefgh"[: len(energies)]
    factors = clip_factors(
        {n: Fraction(e) for n, e in zip(names, energies, strict=True)}, dict.fromkeys(names, Fraction(noise)), 650
    )
    return [factors[n] for n in names]


def test_without_noise_it_is_the_median_norm():
    assert of(1, 4, 16) == [1, 1, Decimal("0.5")]
    assert of(1, 3, 5, 16)[2:] == [Decimal("0.894427190"), Decimal("0.5")], "of four: the mean of the middle two"
    assert of(7) == of(7, 7)[:1] == [1]
    assert of(0, 0, 5) == [1, 1, 0]


def test_a_factor_is_rounded_down_so_that_the_clipped_norm_is_never_above():
    third = of(1, 1, 3)[2]
    assert third == Decimal("0.577350269")
    assert Fraction(third) ** 2 * 3 <= 1 < (Fraction(third) + Fraction(1, 10**9)) ** 2 * 3


def test_with_noise_only_the_signal_is_looked_at():
    """Noise of 400 and a signal of 5: an energy of 425 is one deviation out, 530 is five rows for one."""
    assert of(405, 400, 410, 425, noise=400) == [1, 1, 1, 1]
    deviation = ((2 * 400**2 + 4 * 400 * 5) / 650) ** 0.5
    assert float(of(405, 405, 405, 530, noise=400)[3]) == pytest.approx(((5 + 3 * deviation) / 130) ** 0.5)
    assert of(390, 395, 380, 530, noise=400)[3] > 0, "a median signal below zero leaves what noise may do"


def test_whoever_trains_on_fewer_rows_has_more_noise_and_is_not_clipped_for_it():
    factors = clip_factors(
        {"a": Fraction(105), "b": Fraction(105), "c": Fraction(1605)},
        {"a": Fraction(100), "b": Fraction(100), "c": Fraction(1600)},
        650,
    )
    assert set(factors.values()) == {1}


def test_honest_noise_is_hardly_ever_clipped_and_a_boosted_update_nearly_always():
    rng = np.random.default_rng(0)
    signal = np.full(650, (5 / 650) ** 0.5)
    clipped = boosted = 0
    for _ in range(100):
        updates = signal + rng.normal(size=(8, 650)) * (368 / 650) ** 0.5
        energies = [float(x @ x) for x in updates]
        clipped += sum(c < 1 for c in of(*energies, noise=368))
        factor = of(16 * energies[0], *energies[1:], noise=368)[0]
        boosted += 4 * factor < Decimal("0.7")
    assert clipped <= 4
    assert boosted == 100


def test_the_declared_noise_is_what_the_noise_floor_measures_by():
    contract = training_contract(plain_schema(64, 10), a_model(), [100, 300, 400])
    for rows in (100, 400):
        energy = noise_energy(contract, rows, 650)
        update = np.full(650, float(energy / 650) ** 0.5)
        assert energy_ratio(update, contract, rows) == pytest.approx(1)
    assert noise_energy(contract, 100, 650) == 16 * noise_energy(contract, 400, 650)


@pytest.mark.parametrize(
    ("energies", "noise"), [({}, {}), (NONE, {"a": Fraction(0)}), (NONE | {"b": Fraction(-1)}, NONE)]
)
def test_what_is_no_round_is_refused(energies, noise):
    with pytest.raises(InputError) as caught:
        clip_factors(energies, noise, 650)
    assert caught.value.code == "CLIP_INPUT"
