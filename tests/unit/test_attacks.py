"""An operator that turns against a participant: what it gets from raw updates, with and without DP (docs/privacy.md).

Noise is fixed here, so the figures are the same each time; what a guess would give has its own line.
"""

from pathlib import Path

import numpy as np
import pytest
from tests.support import attack_pictures, attacks
from tests.support.noise import FixedNoise

from fedpact_contract.privacy import check_plan

RECORDS = range(40)


def _read_off(max_grad_norm: str, noise: type[FixedNoise]) -> list[float]:
    contract = attacks.demo_contract(max_grad_norm=max_grad_norm)
    base, x = attacks.base_model(contract), attacks.federation()[1][0].x
    totals = [attacks.observed(contract, base, [row], noise(row)) for row in RECORDS]
    return [attacks.likeness(attacks.read_off(contract, t), x[row]) for row, t in zip(RECORDS, totals, strict=True)]


@pytest.mark.parametrize("max_grad_norm", [attacks.NO_CLIPPING, "1"], ids=["not clipped", "clipped"])
def test_without_noise_an_update_of_one_record_is_the_record(max_grad_norm: str) -> None:
    assert min(_read_off(max_grad_norm, attacks.Silent)) > 0.99


def test_under_the_contracts_noise_it_is_no_nearer_than_a_random_picture() -> None:
    found = _read_off("1", FixedNoise)
    chance = 1 / 64**0.5  # standard deviation of the cosine with a random direction
    assert abs(np.mean(found)) < 4 * chance / len(found) ** 0.5
    assert max(found) < 5 * chance
    mean_picture = attacks.federation()[2].x.mean(axis=0)
    blind = [attacks.likeness(mean_picture, attacks.federation()[1][0].x[row]) for row in RECORDS]
    assert np.mean(blind) > np.max(found), "who looks at no update at all guesses better"


def test_a_batch_is_found_by_search_and_is_not_under_the_contracts_noise() -> None:
    rows = list(range(4))
    own = attacks.federation()[1][0]
    found = {}
    for name, noise in (("none", attacks.Silent(0)), ("contracted", FixedNoise(0))):
        contract = attacks.demo_contract()
        base = attacks.base_model(contract)
        total = attacks.observed(contract, base, rows, noise)
        guesses = attacks.match(contract, base, total, own.y[rows], steps=500)
        found[name] = [attacks.likeness(g, own.x[row]) for g, row in zip(guesses, rows, strict=True)]
    assert np.mean(found["none"]) > 0.9
    assert abs(np.mean(found["contracted"])) < 4 / 64**0.5 / len(rows) ** 0.5


def test_membership_shows_without_dp_and_is_within_chance_at_epsilon_1() -> None:
    without, private = (attacks.membership(0, private=private) for private in (False, True))
    assert attacks.auc(without.loss, without.member) > 0.65
    assert attacks.auc(without.trace, without.member) > 0.6
    for scores in (private.loss, private.trace):
        assert abs(attacks.auc(scores, private.member) - 0.5) < 2.58 * attacks.CHANCE


def test_the_noise_is_what_these_contracts_need() -> None:
    check_plan(attacks.demo_contract())
    check_plan(attacks.membership_contract(attacks.federation()[0], private=True))


def test_the_pictures_can_be_drawn_again(tmp_path: Path) -> None:
    """The search is cut short here."""
    attack_pictures.draw(tmp_path, steps=2)
    committed = Path(__file__).resolve().parents[2] / "docs" / "pictures"
    for name in ("inversion.svg", "membership.svg"):
        drawn = (tmp_path / name).read_text("utf-8")
        assert drawn.startswith("<svg ")
        assert [x for x in drawn.split("\n") if "<text" in x] == [
            x for x in (committed / name).read_text("utf-8").split("\n") if "<text" in x
        ]
