"""The retraining audit: the run that it simulates is the real one, and its values are Shapley values."""

import json
import math
from decimal import Decimal
from fractions import Fraction
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from tests.support.central import CENTRAL
from tests.support.closed_run import closed_run
from tests.support.command import Run, runner
from tests.support.contract_kit import party, plain_contract
from tests.support.demo_kit import delivered, demo_setup, one_thread, own_data
from tests.support.federation import Federation, digits, fixed_keys, make_federation

from fedpact_contract.contract import Contract, ValidationSlice
from fedpact_contract.errors import InputError
from fedpact_contract.keys import generate_key, public_hex
from fedpact_contract.messages import Order
from fedpact_contract.record import read_envelope
from fedpact_models.features import Examples
from fedpact_server import retraining, scoring
from fedpact_server.demo import rows as demo_rows
from fedpact_server.demo import scenario as scenarios
from fedpact_server.retraining import SeededNoise, audit, coalitions, spearman, train, with_slices

ADAM = {"kind": "adam", "beta_1": "0.9", "beta_2": "0.99", "tau": "0.001"}


@pytest.fixture(autouse=True)
def alone():
    with one_thread():
        yield


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.delenv("FEDPACT_HOME", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    return runner(monkeypatch, capsys)


def rows_of(federation: Federation) -> dict[str, Examples]:
    return {agent.desk.participant: agent.examples for agent in federation.agents.values()}


def audited(federation: Federation, draws: int = 2) -> retraining.Audit:
    base = np.zeros(650)
    return audit(federation.contract, rows_of(federation), federation.validation, base, draws=draws, seed=11)


def loss_of(federation: Federation, model: np.ndarray) -> Fraction:
    return retraining._losses(federation.contract, model, {None: federation.validation})[None]


@pytest.mark.parametrize(
    "changes", [{}, {"training__server_optimizer": ADAM, "training__server_rate": Decimal("0.1")}], ids=["mean", "adam"]
)
def test_the_run_that_is_simulated_is_the_real_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The same noise in the product's own round loop: the same model and the same scores, to the bit."""
    federation = make_federation(tmp_path, [90, 60, 70], training__rounds=2, **changes)
    places = {p: place for place, p in enumerate(federation.contract.by_id())}
    of_node = dict(federation.transport.agents)

    def seeded(node: str, order: bytes, model: bytes) -> tuple[bytes, bytes]:
        number = Order.from_bytes(read_envelope(order).body).round
        of_node[node].noise = SeededNoise(5, 0, places[of_node[node].desk.participant], number)
        return order, model

    federation.transport.before = seeded
    assert federation.run() == "completed"
    with federation.database.read() as connection:
        kept = [scores for _, scores in scoring.all_scores(connection, federation.contract.id)]
    model, scores = train(federation.contract, rows_of(federation), np.zeros(650), (5, 0), federation.validation)
    assert np.array_equal(model, delivered(federation))
    assert scores == kept


def test_values_are_the_mean_over_all_orders_of_joining(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, [90, 60, 70], training__rounds=2)
    ids = list(federation.contract.by_id())
    (first, second) = audited(federation).draws

    def loss(members: frozenset[str]) -> Fraction:
        rows = {i: part for i, part in rows_of(federation).items() if i in members}
        model = train(federation.contract, rows, np.zeros(650), (11, 0), None)[0] if rows else np.zeros(650)
        return loss_of(federation, model)

    for player in ids:
        joined = [
            loss(frozenset(order[: order.index(player)])) - loss(frozenset(order[: order.index(player) + 1]))
            for order in permutations(ids)
        ]
        assert first.retrained[player] == sum(joined, Fraction(0)) / math.factorial(len(ids))
    for draw in (first, second):
        assert sum(draw.retrained.values()) == draw.total
        assert abs(sum(draw.online.values()) - draw.total) < 4, "both split the same fall, to a few 1e-9 nat"
    assert first != second


def test_whoever_gave_validation_rows_is_scored_on_the_others(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, [90, 60, 70], training__rounds=2)
    giver, *others = federation.contract.by_id()
    rows, whole = rows_of(federation), federation.validation
    left = whole.take(np.arange(120))

    def draw(validation: Examples, *slices: tuple[str, int]) -> retraining.Draw:
        named = [ValidationSlice(source=source, count=count) for source, count in slices]
        contract = with_slices(federation.contract, named)
        return audit(contract, rows, validation, np.zeros(650), draws=2, seed=11).draws[0]

    given = draw(whole, ("operator", 120), (giver, 100))
    nobodys, without = draw(whole, ("operator", 220)), draw(left, ("operator", 120))
    assert given.total == nobodys.total
    for column in ("retrained", "online"):
        found, on_all, on_left = (getattr(d, column) for d in (given, nobodys, without))
        assert abs(found[giver] - on_left[giver]) < 4, "1e-9 nat"
        assert abs(found[giver] - on_all[giver]) > 1000
        assert all(abs(found[i] - on_all[i]) < 4 for i in others)


def test_of_six_participants_own_rows_are_left_out_too(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, [60] * 6, training__rounds=1)
    giver, other, *_ = federation.contract.by_id()
    slices = [ValidationSlice(source="operator", count=120), ValidationSlice(source=giver, count=100)]
    contract, rows = with_slices(federation.contract, slices), rows_of(federation)
    found = audit(contract, rows, federation.validation, np.zeros(650), draws=2, seed=11).draws[0].retrained
    plain = audited(federation).draws[0].retrained
    assert found[other] == plain[other]
    assert found[giver] != plain[giver]


def test_wrong_labels_are_last_in_both_columns(tmp_path: Path) -> None:
    data = digits([150, 150, 150], flip={0: 0.9, 1: 0.4})
    federation = make_federation(tmp_path, [150, 150, 150], data=data, keys=fixed_keys(3))
    found = audited(federation)
    names = {p.id: p.name for p in federation.contract.participants}
    for draw in found.draws:
        for column in (draw.retrained, draw.online):
            assert [names[i][-1] for i in sorted(column, key=lambda i: column[i])] == ["1", "2", "3"]
    assert found.agreement == (1.0, 1.0)
    assert found.agreement_of_means == 1.0
    assert (found.method, found.trainings) == ("shapley", 14)


def test_of_many_participants_each_is_left_out_once(tmp_path: Path) -> None:
    federation = make_federation(tmp_path, [60] * 6, training__rounds=1)
    ids = list(federation.contract.by_id())
    assert [len(c) for c in coalitions(ids)] == [6, 5, 5, 5, 5, 5, 5]
    assert len(list(coalitions(ids[:5]))) == 31
    found = audited(federation)
    assert (found.method, found.trainings) == ("leave-one-out", 14)
    rows = rows_of(federation)
    without, _ = train(federation.contract, {i: rows[i] for i in ids[1:]}, np.zeros(650), (11, 0), None)
    with_all, _ = train(federation.contract, rows, np.zeros(650), (11, 0), None)
    loss = [loss_of(federation, model) for model in (without, with_all)]
    assert found.draws[0].retrained[ids[0]] == loss[0] - loss[1]


def test_a_participants_noise_is_the_same_in_every_coalition_and_otherwise_never() -> None:
    def drawn(*seed: int) -> bytes:
        noise = SeededNoise(*seed)
        return noise.uniform(4).tobytes() + noise.normal(4).tobytes()

    assert drawn(1, 0, 2, 3) == drawn(1, 0, 2, 3)
    assert len({drawn(*seed) for seed in ((1, 0, 2, 3), (2, 0, 2, 3), (1, 1, 2, 3), (1, 0, 1, 3), (1, 0, 2, 4))}) == 5
    assert SeededNoise(1).label == "test", "no coordinator admits what is made with it"


@pytest.mark.parametrize(
    ("first", "second"),
    [([1, 2, 3, 4], [2, 1, 3, 9]), ([1, 1, 2, 5], [4, 3, 3, 1]), ([3, 1, 2], [3, 1, 2]), ([1, 2, 2], [5, 5, 1])],
)
def test_rank_agreement_is_spearmans(first: list[int], second: list[int]) -> None:
    ours = spearman([Fraction(v) for v in first], [Fraction(v) for v in second])
    assert ours == pytest.approx(spearmanr(first, second).statistic)


def test_without_an_order_there_is_no_agreement() -> None:
    assert spearman([Fraction(1)] * 3, [Fraction(v) for v in (1, 2, 3)]) is None


def test_what_cannot_be_audited_is_named(tmp_path: Path) -> None:
    central = make_federation(tmp_path / "central", [90, 60, 70], **CENTRAL)
    with pytest.raises(InputError, match="RETRAIN_CENTRAL"):
        audited(central)
    less = make_federation(tmp_path / "less", [90, 60, 70])
    rest = less.validation.take(np.arange(9))
    with pytest.raises(InputError, match="RETRAIN_VALIDATION"):
        audit(less.contract, rows_of(less), rest, np.zeros(650), draws=2, seed=1)
    with pytest.raises(InputError, match="RETRAIN_DRAWS"):
        audited(make_federation(tmp_path / "one", [90, 60, 70]), draws=1)


# The command


@pytest.fixture
def demo_contract(tmp_path: Path) -> Path:
    federation = demo_setup(tmp_path / "data", rounds=2).federation(tmp_path / "demo", 1)
    path = tmp_path / "contract.json"
    path.write_bytes(federation.contract.to_bytes())
    return path


def test_the_digits_of_the_demo(run: Run, demo_contract: Path) -> None:
    code, out, err = run("contribution", "retrain", demo_contract, "--simulate", "--draws", "2", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["method"], found["draws"], found["trainings"]) == ("shapley", 2, 30)
    assert found["initial_model"] == "the contract's"
    assert [line["num_examples"] for line in found["participants"]] == [450, 200, 350, 350]
    total = sum(Decimal(line["retrained"]) for line in found["participants"])
    assert abs(total - Decimal(found["total"])) < Decimal("1e-8")
    assert all(Decimal(line["retrained_se"]) > 0 for line in found["participants"])
    assert -1 <= found["spearman"]["of_means"] <= 1
    assert found["shows"]
    assert any("simulation" in limit for limit in found["limits"])
    assert found["seconds"] > 0


def own_contract() -> Contract:
    """A contract of the schema and participants of `demo_kit.own_data`."""
    entries = [
        party(name, scenarios.entity_code(i), public_hex(generate_key()), f"data-{i + 1}", 70, sector="trade")
        for i, name in enumerate(("North", "South"))
    ]
    return Contract.parse(
        plain_contract(
            entries,
            public_hex(generate_key()),
            data={
                "columns": [
                    {"name": "height", "kind": "number", "low": 0, "high": 1, "missing": "refuse"},
                    {"name": "colour", "kind": "category", "values": ["red", "blue"], "missing": "drop"},
                ],
                "label": {"name": "ripe", "classes": ["no", "yes"], "rule": "value"},
                "feature_scale": 2,
            },
            training__rounds=2,
            training__learning_rate=4,
        )
    )


def test_files_of_ones_own_as_text(run: Run, tmp_path: Path) -> None:
    folder, path = own_data(tmp_path / "own"), tmp_path / "contract.json"
    path.write_bytes(own_contract().to_bytes())
    code, out, err = run("contribution", "retrain", path, "--data", folder, "--draws", "2")
    assert code == 0, err
    for words in ("North", "South", "rank agreement (Spearman)", "60 validation rows", "It does not show more than"):
        assert words in out
    description = folder / "federation.toml"
    text = description.read_text()
    description.write_text(text.replace('{ file = "validation.csv" }', "{ fraction = 0.2 }"))
    code, out, err = run("contribution", "retrain", path, "--data", folder, "--draws", "2", "--json")
    assert code == 0, err
    assert 10 <= json.loads(out)["validation_rows"] <= 80


def test_whose_the_validation_rows_of_files_are(tmp_path: Path) -> None:
    folder, contract = own_data(tmp_path / "own"), own_contract()
    first, second = contract.by_id()

    def slices(*sources: str) -> list[tuple[str, int]]:
        givers = [ValidationSlice(source=s, count=100 + 200 * k) for k, s in enumerate(sources)]
        _, validation, found = demo_rows.of_folder(with_slices(contract, givers), folder)
        assert sum(s.count for s in found) == len(validation)
        return [(s.source, s.count) for s in found]

    assert slices("operator") == [("operator", 60)]
    assert slices("operator", first) == [("operator", 15), (first, 45)], "one file, in the contract's proportions"
    description = folder / "federation.toml"
    text = description.read_text()
    description.write_text(text.replace('{ file = "validation.csv" }', "{ fraction = 0.2 }"))
    assert [source for source, _ in slices(first, second)] == [first, second], "each one's own"
    assert [source for source, _ in slices("operator", second)] == ["operator", second]


def test_what_does_not_fit_is_named(run: Run, demo_contract: Path, tmp_path: Path) -> None:
    def refused(*words: object) -> tuple[str, dict[str, Any]]:
        code, out, _ = run("contribution", "retrain", *words, "--json")
        error = json.loads(out)["error"]
        assert code == 2, error
        return error["code"], error

    folder, own = own_data(tmp_path / "own"), tmp_path / "own.json"
    own.write_bytes(own_contract().to_bytes())
    assert refused(demo_contract)[0] == "RETRAIN_DATA"
    assert refused(demo_contract, "--simulate", "--data", folder)[0] == "RETRAIN_DATA"
    code, error = refused(demo_contract, "--data", folder)
    assert (code, error["field"]) == ("RETRAIN_PARTICIPANT", "participants.entity_code")
    assert error["party"]
    assert error["file"].endswith("federation.toml")
    larger = own_contract().plain()
    larger["participants"][0]["num_examples"] = 101
    own.write_bytes(Contract.parse(larger).to_bytes())
    code, error = refused(own, "--data", folder)
    assert (code, error["party"], Path(error["file"]).name) == ("DATA_TOO_FEW_ROWS", "North", "north.csv")
    assert refused(tmp_path / "none", "--simulate")[0] == "HOME_MISSING"


def test_a_contract_in_the_home_is_meant_by_its_id(run: Run, tmp_path: Path) -> None:
    federation = closed_run(tmp_path).federation
    code, out, _ = run(
        "contribution", "retrain", federation.contract.id[:8], "--simulate", "--home", federation.home, "--json"
    )
    assert (code, json.loads(out)["error"]["code"]) == (2, "RETRAIN_SCHEMA")
