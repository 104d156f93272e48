"""The one-run audit on few canaries, and its command. Broken training comes from the tests, never from an option."""

import dataclasses
import json
import math
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.central import CENTRAL
from tests.support.command import Run, runner
from tests.support.contract_kit import change
from tests.support.models_kit import a_model, plain_schema, training_contract
from tests.support.noise import FixedNoise

from fedpact_contract.contract import Contract
from fedpact_contract.errors import InputError
from fedpact_models import audit as module
from fedpact_models import audit_noise, dp
from fedpact_models.audit import Audit, audit
from fedpact_models.features import Floats

NOISE = Decimal("1.25")


class Broken:
    """Fixed noise of which a part is missing, or with which rows are drawn too often."""

    label = "test"

    def __init__(self, part: float, often: float = 1.0, seed: int = 3) -> None:
        self._noise, self._part, self._often = FixedNoise(seed), part, often

    def uniform(self, n: int) -> Floats:
        return self._noise.uniform(n) / self._often

    def normal(self, n: int) -> Floats:
        return self._noise.normal(n) * self._part


class Uneven:
    """Fixed noise of the right size on the whole, or nearly, that is broken within a step or over steps."""

    label = "test"

    def __init__(self, breaks: Callable[[Floats], Floats]) -> None:
        self._noise, self._breaks = FixedNoise(3), breaks

    def uniform(self, n: int) -> Floats:
        return self._noise.uniform(n)

    def normal(self, n: int) -> Floats:
        return self._breaks(self._noise.normal(n))


def a_plan(*hidden: int, **privacy: Any) -> Contract:
    """Twelve steps, in four rounds, of epsilon about 2."""
    settings = {"epsilon": 3, "delta": "0.00001", "noise_multiplier": NOISE} | privacy
    return training_contract(plain_schema(6, 3), a_model(*hidden), (200, 300), training={"rounds": 3}, privacy=settings)


def audited(noise: dp.Noise, *hidden: int, canaries: int = 800, **privacy: Any) -> Audit:
    return audit(a_plan(*hidden, **privacy), noise=noise, coins=FixedNoise(8), seconds=60, canaries=canaries)


@pytest.fixture
def ghost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "mode_of", lambda network, x: "ghost")


@pytest.mark.parametrize("hidden", [(), (30, 60)], ids=["appended", "its own"])
def test_right_training_is_not_flagged(hidden: tuple[int, ...]) -> None:
    found = audited(FixedNoise(3), *hidden)
    assert found.faults == {}
    assert (found.mode, found.appended > 0) == ("hooks", not hidden)
    assert 0 < found.f_dp < float(found.claimed) < 3
    assert found.epsilon_delta < found.f_dp
    assert (found.steps, found.planned_steps, found.num_examples) == (12, 12, 200)
    assert found.guesses.made == 100
    assert found.largest_contribution == pytest.approx(1, abs=1e-6)
    assert abs(found.rows_drawn - 240) < 80
    assert found.rows_expected == 240


@pytest.mark.parametrize("hidden", [(), (30, 60)], ids=["appended", "its own"])
def test_missing_noise_is_flagged(hidden: tuple[int, ...]) -> None:
    found = audited(Broken(0.0), *hidden)
    assert list(found.faults) == ["AUDIT_EPSILON", "AUDIT_NOISE"]
    assert found.f_dp > 1.5 * float(found.claimed)


FIRST = 7 * 30
"""Coordinates of the first layer of `audited(..., 30)`; the second has 90 and a bias of 3, the canaries the rest."""


def shared(z: Floats) -> Floats:
    """Each number twice, half a tensor apart."""
    return np.resize(z[: max(1, len(z) // 2)], len(z))


def by_step(breaks: Callable[[list[Floats]], Floats]) -> Callable[[Floats], Floats]:
    """What becomes of a tensor's newest draw, given all of its draws: each tensor has its own size here."""
    drawn: dict[int, list[Floats]] = {}

    def broken(z: Floats) -> Floats:
        drawn.setdefault(len(z), []).append(z)
        return breaks(drawn[len(z)])

    return broken


def mixed() -> Callable[[Floats], Floats]:
    """Noise of which a half comes from the tensor before, no number being another's."""
    last = [np.zeros(1)]

    def mix(z: Floats) -> Floats:
        before, last[0] = np.resize(last[0], len(z)), z
        return (z + before) / math.sqrt(2)

    return mix


UNEVEN: dict[str, tuple[Callable[[Floats], Floats], str, str]] = {
    "a layer without": (lambda z: z * (len(z) != FIRST), "0.weight", "energy"),
    "one vector for all steps": (
        lambda z: FixedNoise(77).normal(len(z)),
        "0.weight",
        "correlation with 2.weight",
    ),
    "the step before with its sign turned": (
        by_step(lambda z: (z[-1] - z[-2]) / math.sqrt(2) if len(z) % 2 == 0 else z[-1]),
        "appended.weight",
        "correlation of consecutive steps",
    ),
    "the same four steps in every round": (
        by_step(lambda z: z[(len(z) - 1) % 4]),
        "all tensors together",
        "correlation of any two steps",
    ),
    "layers that share a part": (mixed(), "0.weight", "correlation with 2.weight"),
    "one number for all": (lambda z: np.repeat(z[:1], len(z)), "0.weight", "correlation of neighbours"),
    "pairs": (shared, "0.weight", "correlation of the halves"),
    "half without": (lambda z: z * (np.arange(len(z)) < len(z) // 2), "0.weight", "energy of the second half"),
    "every other without": (lambda z: z * (np.arange(len(z)) % 2), "0.weight", "energy of even coordinates"),
    "half the size": (lambda z: z / 2, "0.weight", "energy"),
    "twice the size": (lambda z: z * 2, "0.weight", "energy"),
    "a bias without": (lambda z: z * (len(z) > 3), "all tensors together", "values that repeat within a step"),
    "pairs anywhere": (
        lambda z: np.random.default_rng(0).permutation(shared(z)),
        "all tensors together",
        "values that repeat within a step",
    ),
    "the canaries' own without": (lambda z: z * (len(z) != 800 - FIRST - 93), "appended.weight", "energy"),
}


@pytest.mark.parametrize(("breaks", "tensor", "test"), UNEVEN.values(), ids=list(UNEVEN))
def test_noise_that_is_broken_unevenly_is_flagged(breaks: Callable[[Floats], Floats], tensor: str, test: str) -> None:
    found = audited(Uneven(breaks), 30)
    assert found.faults["AUDIT_NOISE"].endswith(f"{tensor}, {test}.")
    assert (found.noise_tests.tensor, found.noise_tests.test) == (tensor, test)


@pytest.mark.parametrize("bound", ["f_dp", "epsilon_delta"])
def test_either_lower_bound_alone_is_a_verdict_from_what_is_claimed_on(bound: str) -> None:
    plain = audited(FixedNoise(3))
    found = dataclasses.replace(plain, claimed=Decimal("1.5"), f_dp=0.0, epsilon_delta=0.0)
    assert dataclasses.replace(found, **{bound: 1.4999}).faults == {}
    assert list(dataclasses.replace(found, **{bound: 1.5}).faults) == ["AUDIT_EPSILON"]
    assert list(dataclasses.replace(found, **{bound: math.inf}).faults) == ["AUDIT_EPSILON"]


def test_a_noise_that_is_no_number_is_a_fault() -> None:
    assert audit_noise._chance(np.array([np.nan, 100.0])) == 0


@pytest.mark.parametrize(("network", "rate"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.float64, 0.5)])
def test_right_noise_passes_where_a_step_hardly_moves_the_weights(network: torch.dtype, rate: float) -> None:
    """Of a small step the weights keep few digits: noises that differ come back as one number."""
    layer = torch.nn.Linear(40, 20).to(network)
    x, y = torch.zeros(50, 40, dtype=network), torch.zeros(50, dtype=torch.int64)
    for noise, failed in ((FixedNoise(3), False), (Uneven(lambda z: z * (np.arange(len(z)) % 3 > 0)), True)):
        seen = audit_noise.NoiseSeen(["weight", "bias"], deviation=1.2, scale=10 / rate)
        terms = {"sample_rate": 0.2, "noise_multiplier": 1.2, "max_grad_norm": 1.0, "denominator": 10.0}
        more = {"steps": 6, "learning_rate": rate, "physical_batch": 64, "before_noise": seen}
        dp.dp_sgd(layer, x, y, noise=noise, **terms, **more)
        assert seen.result().failed == failed


@pytest.mark.parametrize("seed", range(6))
def test_right_noise_passes_the_tests_of_the_noise(seed: int) -> None:
    tests = audited(FixedNoise(seed), 30).noise_tests
    assert not tests.failed
    assert tests.chance > 1e-4
    assert tests.count == 37


def test_where_participants_add_no_noise_there_is_none_to_audit() -> None:
    plain = change(a_plan().plain(), CENTRAL, "__")
    with pytest.raises(InputError) as caught:
        audit(Contract.parse(plain), noise=FixedNoise(1), coins=FixedNoise(8), seconds=60)
    assert caught.value.code == "AUDIT_TRUST_MODEL"


def test_a_wrong_sample_rate_is_flagged() -> None:
    found = audited(Broken(1.0, often=1.5))
    assert "AUDIT_SAMPLING" in found.faults
    assert found.rows_drawn > 300
    assert "AUDIT_SAMPLING" in audited(Broken(1.0, often=0.4)).faults


def test_a_missing_clip_is_flagged_in_hooks_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    real = dp._norms
    monkeypatch.setattr(dp, "_norms", lambda samples: 0 * real(samples))
    found = audited(FixedNoise(3))
    assert set(found.faults) == {"AUDIT_EPSILON", "AUDIT_CLIP"}


@pytest.mark.usefixtures("ghost")
def test_a_missing_clip_of_the_rows_alone_is_flagged_in_ghost_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The canaries do not go that way; a few rows far out of range do."""
    way = dp.GradSampleModuleFastGradientClipping
    real = way.get_clipping_coef
    monkeypatch.setattr(way, "get_clipping_coef", lambda self: torch.ones_like(real(self)))
    found = audited(FixedNoise(3), 30, 60)
    assert list(found.faults) == ["AUDIT_CLIP"]
    assert (found.mode, found.largest_contribution > 10) == ("ghost", True)


@pytest.mark.usefixtures("ghost")
def test_the_canaries_go_through_the_clip_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is accumulated for one is its coordinate and no more than the clip."""
    seen: list[torch.Tensor] = []
    real = dp.SecureDPOptimizer.accumulate

    def accumulate(self: dp.SecureDPOptimizer) -> None:
        before = torch.cat([p.summed_grad.flatten() for p in self.params]).clone()
        real(self)
        seen.append(torch.cat([p.summed_grad.flatten() for p in self.params]) - before)

    monkeypatch.setattr(dp.SecureDPOptimizer, "accumulate", accumulate)
    audited(FixedNoise(3), 30, 60, canaries=64)
    moved = torch.stack(seen)  # ghost mode: all of these are canaries'
    assert set(moved.count_nonzero(dim=1).tolist()) <= set(range(1, 65))
    torch.testing.assert_close(moved[moved != 0], torch.ones(int((moved != 0).sum()), dtype=torch.float64))


def test_time_that_is_up_ends_the_rounds_and_the_claim_is_of_the_steps_run() -> None:
    plan = a_plan()
    found = audit(plan, noise=FixedNoise(3), coins=FixedNoise(8), seconds=0, canaries=400)
    assert (found.steps, found.planned_steps) == (3, 12)
    assert found.claimed < audited(FixedNoise(3), canaries=400).claimed


def test_rows_are_encoded_as_real_ones_are_and_span_the_public_range() -> None:
    plan = a_plan()
    rows = module._rows(plan, 2000, FixedNoise(1))
    assert set(np.unique(rows.y)) == {0, 1, 2}
    scaled = rows.x / (2 / 7**0.5)
    assert (scaled[:, -1] == 1).all()
    assert scaled.min() < -0.99
    assert scaled[:, :-1].max() > 0.99
    assert np.abs(scaled).max() <= 1


def test_a_plan_that_breaks_its_own_epsilon_is_refused() -> None:
    with pytest.raises(InputError, match="CONTRACT_NOISE_TOO_SMALL"):
        audited(FixedNoise(3), epsilon="0.5")


# the command


@pytest.fixture
def fedpact(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(module, "CANARIES", 800)
    monkeypatch.setattr(module.audit, "__kwdefaults__", {"canaries": 800})
    return runner(monkeypatch, capsys)


@pytest.fixture
def contract_file(tmp_path: Path) -> Path:
    path = tmp_path / "contract.json"
    path.write_bytes(a_plan().to_bytes())
    return path


def test_the_command_says_what_was_run_and_what_it_does_not_show(fedpact: Any, contract_file: Path) -> None:
    code, out, err = fedpact("audit-privacy", contract_file)
    assert (code, err) == (0, "")
    for text in (
        "12 steps",
        "lower bound, f-DP",
        "95% confidence",
        "no proof of privacy",
        "fixed beforehand",
        "noise itself:",
    ):
        assert text in out, text


def test_the_command_as_json(fedpact: Any, contract_file: Path) -> None:
    code, out, _ = fedpact("audit-privacy", contract_file, "--json")
    value = json.loads(out)
    assert (code, value["verdict"], value["faults"], value["noise"]) == (0, "no fault found", [], "csprng")
    assert value["steps"] == {"run": 12, "planned": 12}
    assert value["canaries"]["guessed"] == 100
    epsilon = value["epsilon"]
    assert 0 <= epsilon["lower_bound_f_dp"] < float(epsilon["claimed_for_these_steps"]) <= float(epsilon["contract"])
    assert value["noise_itself"]["chance"] > value["noise_itself"]["fault_below"]
    assert value["limits"]


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_fault_ends_with_1(
    fedpact: Any, contract_file: Path, monkeypatch: pytest.MonkeyPatch, form: list[str]
) -> None:
    monkeypatch.setattr(dp.SystemNoise, "normal", lambda self, n: np.zeros(n))
    code, out, _ = fedpact("audit-privacy", contract_file, *form)
    assert code == 1
    assert "AUDIT_EPSILON" in out
    assert "AUDIT_NOISE" in out
    assert "weight, energy" in out


def test_what_is_no_contract_is_a_mistake_in_what_was_given(fedpact: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text('title = "x"')
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "other.json").write_text('{"rounds": []}')
    (tmp_path / "weak.json").write_bytes(a_plan(epsilon="0.5").to_bytes())
    (tmp_path / "central.json").write_bytes(Contract.parse(change(a_plan().plain(), CENTRAL, "__")).to_bytes())
    for name, expected in (
        ("missing.json", "CONTRACT_FILE_MISSING"),
        ("bad.toml", "CONTRACT"),
        ("bad.json", "CANONICAL"),
        ("other.json", "CONTRACT_FILE_FORM"),
        ("weak.json", "CONTRACT_NOISE_TOO_SMALL"),
        ("central.json", "AUDIT_TRUST_MODEL"),
    ):
        code, out, err = fedpact("audit-privacy", tmp_path / name, "--json")
        assert code == 2, name
        error = json.loads(out)["error"]
        assert expected in error["code"], name
        assert error["file"] == str(tmp_path / name)
        assert "Traceback" not in out + err
    assert fedpact("audit-privacy", tmp_path / "weak.json", "--seconds", "0")[0] == 2
