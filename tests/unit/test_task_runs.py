"""A whole contract of each task that is no classification: rounds, scores, close, report, re-evaluation, verify."""

import json
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.auditor_kit import CLAUSE, OPENING_KEY, SIGNING_KEY
from tests.support.closed_run import EVERYBODY_IS_PAID
from tests.support.federation import Federation
from tests.support.task_kit import TASKS, TaskCase
from tests.unit.test_reevaluate import AUDITOR, handed_over

from fedpact_contract.contribution import check_scores, period_values, total_value
from fedpact_contract.errors import FaultError
from fedpact_contract.language import Lang
from fedpact_contract.log import RoundScores, ScoresOpened
from fedpact_contract.report import build
from fedpact_contract.trust import Trust
from fedpact_contract.verify import verify_folder
from fedpact_models.dp import SystemNoise
from fedpact_models.tasks import survival
from fedpact_server import rounds
from fedpact_server.reevaluate import reevaluate
from fedpact_server.report.html import render
from fedpact_server.run_state import load_model

OTHERS = {name: case for name, case in TASKS.items() if name != "classification"}


@pytest.fixture(scope="module", params=OTHERS)
def case(request: pytest.FixtureRequest) -> TaskCase:
    return OTHERS[request.param]


@pytest.fixture(scope="module")
def run(case: TaskCase, tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, Path]:
    """A run of two rounds, settled and handed over."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "RESEND_SECONDS", 0.0)
        options: dict[str, Any] = {
            "auditor": CLAUSE,
            "training__rounds": 2,
            "noise": lambda _: SystemNoise(),
            **EVERYBODY_IS_PAID,
        }
        federation = case.federation(folder / "run", **options)
        assert federation.run(accept_test_noise=False) == "completed"
    handed_over(federation, folder / "handed")
    return federation, folder / "handed"


def scores_of(federation: Federation) -> list[RoundScores]:
    return [body.scores for e in federation.entries() if isinstance(body := e.open(), ScoresOpened)]


def test_the_evidence_verifies(run: tuple[Federation, Path]) -> None:
    federation, folder = run
    found = verify_folder(folder / "evidence", Trust.of(federation.contract), privacy=False)
    assert (found.faults, found.exit_code) == ((), 4), "nobody countersigned the close"


def test_the_values_add_up_to_the_fall_of_the_loss(run: tuple[Federation, Path]) -> None:
    federation, _ = run
    scores = scores_of(federation)
    assert len(scores) == 2
    values = period_values(scores, federation.contract)
    rows = len(federation.validation)
    assert sum(values.values()) == total_value(scores, federation.contract)
    assert total_value(scores, federation.contract) == Fraction(scores[0].losses[0][0] - scores[-1].losses[-1][0], rows)


def test_an_auditor_finds_the_same_integers(run: tuple[Federation, Path]) -> None:
    _, folder = run
    record = reevaluate(folder, AUDITOR, (SIGNING_KEY, OPENING_KEY))[1]
    assert (record.differing, record.differences, record.largest, record.evaluated) == (0, (), 0, 32)


def test_the_report_has_the_tasks_metric(run: tuple[Federation, Path], case: TaskCase) -> None:
    federation, _ = run
    contract = federation.contract
    report = build(federation.entries())
    models = [contract.model.initial_digest, report["model"]["digest"]]
    due = [_metric(case, federation, load_model(federation.home, digest)) for digest in models]
    found = report["metric"]
    assert [float(found["initial"]), float(found["final"])] == pytest.approx(due, abs=1e-5)
    assert report["loss"] == case.loss
    json.dumps(report)
    chinese = {"squared-error": "均方根误差", "discrete-hazard": "一致性指数"}[case.loss]
    words: dict[Lang, str] = {"en": found["name"], "zh": chinese}
    for lang, word in words.items():
        page = render(report, lang)
        assert word in page.lower()
        assert "accuracy" not in page.lower()
        assert "准确率" not in page


def _metric(case: TaskCase, federation: Federation, model: Any) -> float:
    """In the label's unit, from the model's own outputs."""
    from fedpact_models.evaluate import logits

    contract, rows = federation.contract, federation.validation
    scores = logits(contract.model, contract.data, model, rows.x)
    if case.loss == "squared-error":
        told = 4.5 + 4.5 * np.clip(scores[:, 0], -1, 1)
        return float(np.sqrt(np.mean((told - (4.5 + 4.5 * rows.y)) ** 2)))
    expected, lived, came = survival(scores).sum(axis=1), rows.y // 2, rows.y % 2 == 1
    pairs = came[:, None] & (lived[None, :] > lived[:, None])
    order = np.sign(expected[None, :] - expected[:, None])
    return float(((1 + order[pairs]) / 2).mean())


def test_counts_that_do_not_fit_the_task_are_faults(run: tuple[Federation, Path], case: TaskCase) -> None:
    federation, _ = run
    scores = scores_of(federation)[0]
    check_scores(scores, federation.contract)
    lies: list[tuple[dict[str, Any], str]]
    if case.loss == "squared-error":
        lies = [({"correct": (1, 2)}, "SCORES_CORRECT"), ({"pairs": 3}, "SCORES_PAIRS")]
    else:
        assert scores.pairs is not None
        lies = [
            ({"correct": None}, "SCORES_CORRECT"),
            ({"correct": (0, 2 * scores.pairs + 1)}, "SCORES_CORRECT"),
            ({"pairs": None}, "SCORES_PAIRS"),
            ({"pairs": 0}, "SCORES_PAIRS"),
            ({"pairs": 220 * 219 // 2 + 1}, "SCORES_PAIRS"),
        ]
    for lie, code in lies:
        with pytest.raises(FaultError) as caught:
            check_scores(scores.model_copy(update=lie), federation.contract)
        assert caught.value.code == code


OPTIMIZER = {"kind": "adam", "beta_1": Decimal("0.5"), "beta_2": Decimal("0.9"), "tau": Decimal("0.01")}
KINDS: dict[str, dict[str, Any]] = {
    "drawn, with momentum": {
        "training__server_rate": Decimal("0.02"),
        "training__server_optimizer": OPTIMIZER,
        "contribution__estimator": "sampled",
        "contribution__max_coalitions": 200,
    },
    "re-normalised": {"contribution__game": "re-normalised"},
    "median": {"contribution__game": "re-normalised", "training__aggregation": "median"},
}
"""Other games, and what else may come between an update and its score."""


@pytest.mark.parametrize("kind", KINDS)
def test_every_game_is_over_every_task(
    case: TaskCase, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "RESEND_SECONDS", 0.0)
    options: dict[str, Any] = {"training__rounds": 2, "auditor": CLAUSE} | EVERYBODY_IS_PAID | KINDS[kind]
    sizes = [40] * 9 if "contribution__max_coalitions" in options else [60] * 5
    federation = case.federation(tmp_path / "run", sizes, noise=lambda _: SystemNoise(), **options)
    assert federation.run(accept_test_noise=False) == "completed"
    handed_over(federation, tmp_path / "handed")
    found = verify_folder(tmp_path / "handed" / "evidence", Trust.of(federation.contract), privacy=False)
    assert (found.faults, found.exit_code) == ((), 4), "nobody countersigned the close"
    scores = scores_of(federation)
    assert all((s.sampling is not None) == ("drawn" in kind) for s in scores)
    values, total = period_values(scores, federation.contract), total_value(scores, federation.contract)
    assert sum(values.values()) == total
    record = reevaluate(tmp_path / "handed", AUDITOR, (SIGNING_KEY, OPENING_KEY))[1]
    assert (record.differing, record.largest) == (0, 0)
