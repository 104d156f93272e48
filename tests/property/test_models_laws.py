"""Laws of features, evaluation and private steps."""

import numpy as np
import polars as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.models_kit import a_model, a_schema, category, duplicate_count, number, plain_schema, random_examples

from fedpact_models.dp import dp_sgd
from fedpact_models.evaluate import evaluate_round
from fedpact_models.exact import product, rounded_halves
from fedpact_models.features import Examples, Floats, encode, row_bytes, select_rows, validation_root
from fedpact_models.registry import build, parameter_count
from fedpact_models.weights import flatten, load_flat

SEEDS = st.integers(0, 2**32 - 1)
HIDDEN = st.sampled_from([(), (3,), (4, 3)])
SCHEMA = a_schema(
    number("a", "-1.5", "3", "drop"),
    category("c", ["u", "1", "v"], "fill", fill="v"),
    number("b", 0, 1),
    label={"name": "y", "classes": ["0", "1"], "rule": "value"},
    feature_scale="2.5",
)
ROWS = st.lists(
    st.tuples(
        st.none() | st.floats(-10, 10),
        st.sampled_from([None, "u", "1.0", "v"]),
        st.floats(-1, 2),
        st.sampled_from("01"),
    ),
    min_size=1,
    max_size=25,
).filter(lambda rows: any(row[0] is not None for row in rows))


def _table(rows: list[tuple]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema={"a": pl.Float64, "c": pl.String, "b": pl.Float64, "y": pl.String}, orient="row")


def _all_rows(examples: Examples) -> list[bytes]:
    return [row_bytes(x, int(y)) for x, y in zip(examples.x, examples.y, strict=True)]


@given(ROWS, st.randoms(use_true_random=False))
def test_encoding_is_row_by_row_and_within_bounds(rows: list[tuple], order: random_examples) -> None:
    whole = encode(SCHEMA, _table(rows), file="t")
    kept = [row for row in rows if row[0] is not None]
    assert len(whole) == len(kept)
    for place, row in enumerate(kept):
        single = encode(SCHEMA, _table([row]), file="t")
        np.testing.assert_array_equal(single.x[0], whole.x[place])
        assert single.y[0] == whole.y[place]
    constant = 2.5 / 6**0.5
    assert np.abs(whole.x).max() <= constant
    assert (whole.x[:, -1] == constant).all()
    assert np.linalg.norm(whole.x, axis=1).max() <= 2.5 * (1 + 1e-15)


@given(ROWS, st.randoms(use_true_random=False), st.binary(min_size=1, max_size=40), st.data())
def test_the_keyed_choice_does_not_see_the_order_of_the_rows(
    rows: list, order, key: bytes, data: st.DataObject
) -> None:
    examples = encode(SCHEMA, _table(rows), file="t")
    shuffled = list(rows)
    order.shuffle(shuffled)
    n = data.draw(st.integers(1, len(examples)))
    chosen = select_rows(examples, n, key)
    other = select_rows(encode(SCHEMA, _table(shuffled), file="t"), n, key)
    assert _all_rows(chosen) == _all_rows(other)
    assert len(chosen) == n
    pool = _all_rows(examples)
    for row in _all_rows(chosen):
        pool.remove(row)  # each chosen row is there, as often as it is chosen
    if n > 1:
        assert _all_rows(select_rows(examples, n - 1, key)) == _all_rows(chosen)[:-1]


@given(ROWS)
def test_a_row_and_its_bytes_are_one_to_one(rows: list[tuple]) -> None:
    examples = encode(SCHEMA, _table(rows), file="t")
    different = {(*(float(v) + 0.0 for v in x), int(y)) for x, y in zip(examples.x, examples.y, strict=True)}
    assert duplicate_count(examples) == len(examples) - len(different)
    salts = [i.to_bytes(32, "big") for i in range(len(examples))]
    assert len(bytes.fromhex(validation_root(examples, salts))) == 32


@given(SEEDS, HIDDEN)
def test_flat_weights_come_back(seed: int, hidden: tuple[int, ...]) -> None:
    schema = plain_schema(4, 3)
    flat = np.random.default_rng(seed).normal(size=parameter_count(a_model(*hidden), schema))
    module = build(a_model(*hidden), schema)
    load_flat(module, flat)
    assert flatten(module).tobytes() == flat.tobytes()


@given(SEEDS, st.integers(1, 70))
def test_an_exact_product_does_not_see_the_order_of_its_terms(seed: int, terms: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(5, terms)) * 10.0 ** rng.integers(-9, 9, (1, terms)), rng.normal(size=(terms, 4))
    order = rng.permutation(terms)

    def exact(a: Floats, b: Floats) -> Floats:
        return product(rounded_halves(a, (0, 1), terms), rounded_halves(b, 0, terms))

    found = exact(a, b)
    assert found.tobytes() == exact(a[:, order], b[order]).tobytes()
    limit = 3 * terms * 2.0**-46 * 4 * np.abs(a).max() * np.abs(b).max()
    assert np.abs(found - a @ b).max() <= limit


@settings(max_examples=40)
@given(SEEDS, HIDDEN, st.integers(1, 5), st.integers(3, 12), st.sampled_from([1, 2, 4, 8, 32]))
def test_laws_of_the_round_game(seed: int, hidden: tuple[int, ...], players: int, rows: int, chunk: int) -> None:
    rng = np.random.default_rng(seed)
    schema, model = plain_schema(4, 3), a_model(*hidden)
    count = parameter_count(model, schema)
    base, steps = rng.normal(size=count), rng.normal(size=(players, count)) * 10.0 ** rng.uniform(-6, 0)
    null = int(rng.integers(players))
    steps[null] = 0
    examples = random_examples(rng, rows, 4, 3)

    def run(order: np.ndarray, part: slice, **more: int):
        own = Examples(x=examples.x[part], y=examples.y[part])
        return evaluate_round(model, schema, base, steps[order], own, [len(own)], own_slice=[()] * players, **more)

    identity = np.arange(players)
    whole = run(identity, slice(None))
    chunked = run(identity, slice(None), chunk=chunk)
    assert (whole.losses, whole.values.tobytes()) == (chunked.losses, chunked.values.tobytes())
    # Efficiency: the values add up to the drop of the loss. Null player: exactly nothing.
    drop = (whole.losses[0][0] - whole.losses[-1][0]) * 1e-9
    assert abs(whole.values.sum() - drop) < 3e-9
    assert not whole.values[null].any()
    # Symmetry: renaming the players renames the values.
    order = rng.permutation(players)
    assert run(order, slice(None)).values.tobytes() == whole.values[order].tobytes()
    # Additivity over examples: a row's value does not depend on the other rows.
    halves = [run(identity, slice(None, rows // 2)).values, run(identity, slice(rows // 2, None)).values]
    np.testing.assert_allclose(np.hstack(halves), whole.values, atol=1e-11)


class _Chosen:
    """The rows that it is told to take, and no noise."""

    label = "test"

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows

    def uniform(self, n: int) -> np.ndarray:
        return np.where(np.isin(np.arange(n), self._rows), 0.0, 1.0)

    def normal(self, n: int) -> np.ndarray:
        return np.zeros(n)


@settings(max_examples=60, deadline=None)
@given(SEEDS, HIDDEN, st.floats(0.01, 10), st.floats(0, 1e6), st.integers(1, 12))
def test_one_row_more_moves_a_steps_sum_by_at_most_the_clipping_norm(
    seed: int, hidden: tuple[int, ...], norm: float, scale: float, physical: int
) -> None:
    rng = np.random.default_rng(seed)
    schema, model = plain_schema(4, 3), a_model(*hidden)
    flat = rng.normal(size=parameter_count(model, schema))
    examples = random_examples(rng, 12, 4, 3)
    x, y = torch.from_numpy(examples.x * scale), torch.from_numpy(examples.y)
    rows = np.flatnonzero(rng.random(12) < 0.5)
    ends = []
    for taken in (rows, np.setdiff1d(rows, rows[:1])):
        module = build(model, schema)
        load_flat(module, flat)
        dp_sgd(
            module,
            x,
            y,
            steps=1,
            sample_rate=0.5,
            noise_multiplier=1.0,
            max_grad_norm=norm,
            denominator=8.0,
            learning_rate=2.0,
            noise=_Chosen(taken),
            physical_batch=physical,
        )
        ends.append(flatten(module))
    assert np.linalg.norm(ends[0] - ends[1]) <= 2.0 / 8.0 * norm * (1 + 1e-9) + 1e-12
