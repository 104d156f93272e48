"""Whoever has several rows: the contract's clause, its arithmetic, and what the agent takes of each entity."""

import math
from collections import Counter
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from tests.support.agent_world import contract as agents_contract
from tests.support.evidence_factory import contract_values
from tests.support.models_kit import a_schema, number
from tests.support.operator_world import NOW, TEMPLATE, operator
from tests.support.operator_world import enterprise as an_enterprise

from fedpact_contract import text
from fedpact_contract.contract import Contract
from fedpact_contract.errors import FedpactError, InputError
from fedpact_contract.label import dp_label
from fedpact_contract.privacy import (
    INFINITE,
    check_plan,
    entity_guarantee,
    epsilon_entity,
    epsilon_pld,
    group_guarantee,
)
from fedpact_contract.sketch import solve
from fedpact_models.features import encode, select_rows
from fedpact_server.drafting import ValidationFile, new
from fedpact_server.enrolment import find

D = Decimal
CLAUSE = {"column": "patient", "max_rows": 4, "method": "mixture-of-gaussians", "epsilon": 99, "delta": "0.00001"}


def contract(**clause: Any) -> Contract:
    return Contract.parse(contract_values(privacy__entity=CLAUSE | clause))


def code_of(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(FedpactError) as err:
        call(*args, **kwargs)
    return err.value.code


class TestArithmetic:
    @pytest.mark.parametrize(("sigma", "rate", "rows"), [("1.5", "0.2", 2), ("3", "0.1", 6), ("0.8", "0.5", 3)])
    def test_one_step_is_the_divergence_of_the_mixture_by_plain_integration(
        self, sigma: str, rate: str, rows: int
    ) -> None:
        """The hockey-stick divergence both ways, with no code of the accountant, is delta at the epsilon found."""
        delta, s, q = D("1e-5"), float(sigma), float(rate)
        epsilon = float(epsilon_entity([(D(sigma), D(rate), 1)], rows, delta))
        weights = [math.comb(rows, j) * q**j * (1 - q) ** (rows - j) for j in range(rows + 1)]

        def normal(x: float, mean: float) -> float:
            return math.exp(-((x - mean) ** 2) / (2 * s * s)) / (s * math.sqrt(2 * math.pi))

        def with_them(x: float) -> float:
            return sum(w * normal(x, j) for j, w in enumerate(weights))

        def stick(p: Any, q: Any, at: float) -> float:
            found = quad(lambda x: max(0.0, p(x) - math.exp(at) * q(x)), -12 * s, 12 * s + rows, limit=500)
            return float(found[0])

        def without(x: float) -> float:
            return normal(x, 0)

        def truth(at: float) -> float:
            return max(stick(with_them, without, at), stick(without, with_them, at))

        assert truth(epsilon) <= float(delta) * 1.001
        assert truth(epsilon - 0.02) > float(delta)

    def test_one_row_is_the_record_level_and_more_rows_cost_more(self) -> None:
        group, delta = (D("2.5"), D("0.2"), 30), D("1e-5")
        found = [epsilon_entity([group], rows, delta) for rows in (1, 2, 4)]
        assert found[0] == epsilon_pld([group], delta)
        assert found[1] == pytest.approx(D("4.4085"), abs=D("0.001"))
        assert found[2] == pytest.approx(D("10.085"), abs=D("0.001"))

    def test_what_protects_nobody_is_infinite_and_nonsense_is_refused(self) -> None:
        assert epsilon_entity([(D("0.6"), D("0.5"), 100)], 32, D("1e-5")) == INFINITE
        assert epsilon_entity([(D("2.5"), D("0.2"), 30)], 32, D("1e-5")) == INFINITE
        assert epsilon_entity([(D("0.1"), D("0.5"), 1)], 2, D("1e-5")) == INFINITE
        for rows in (0, 33):
            assert code_of(epsilon_entity, [(D(2), D("0.1"), 1)], rows, D("1e-5")) == "PRIVACY_RANGE"

    def test_the_formula_for_groups(self) -> None:
        """docs/privacy: delta 1e-5, k 4, epsilon 2 gives 4.7e-3."""
        epsilon, delta = group_guarantee(D(2), D("1e-5"), 4)
        assert epsilon == 8
        assert float(delta) == pytest.approx(1e-5 * math.expm1(8) / math.expm1(2), rel=1e-12)
        assert round(delta, 4) == D("0.0047")
        assert group_guarantee(D(2), D("1e-5"), 1) == (2, D("0.00001"))
        for bad in ((D(0), D("1e-5"), 2), (D(2), D(0), 2), (D(2), D("1e-5"), 0), (D("NaN"), D("1e-5"), 2)):
            with pytest.raises((InputError, ArithmeticError)):
                group_guarantee(*bad)

    @pytest.mark.parametrize(("epsilon", "rows"), [("4", 32), ("6", 12)])
    def test_a_delta_is_never_above_one(self, epsilon: str, rows: int) -> None:
        """delta times e^((rows - 1) epsilon) has more digits than any context holds."""
        assert group_guarantee(D(epsilon), D("1e-5"), rows) == (rows * D(epsilon), 1)

    @given(
        st.decimals("1e-6", 8, places=6),
        st.decimals("1e-12", "1e-5", places=12),
        st.integers(1, 32),
    )
    def test_the_formula_is_rounded_up_and_by_no_more_than_it_must(self, epsilon: D, delta: D, rows: int) -> None:
        together, found = group_guarantee(epsilon, delta, rows)  # in the context that everybody has, of 28 digits
        with localcontext(prec=200):
            truth = min(D(1), delta * ((rows * epsilon).exp() - 1) / (epsilon.exp() - 1))
            assert together == rows * epsilon
            assert truth - D("1e-150") <= found <= truth * (1 + D("1e-45")) + D("1e-30")


class TestContract:
    def test_the_promise_is_recomputed(self) -> None:
        made = contract()
        epsilon, delta = entity_guarantee(made, made.planned_steps)
        assert delta == made.privacy.delta
        check_plan(contract(epsilon=str(epsilon)))
        assert code_of(check_plan, contract(epsilon=str(epsilon - D("0.000001")))) == "CONTRACT_ENTITY_EPSILON"

    def test_the_formula_needs_a_delta_that_is_small_enough(self) -> None:
        small = contract_values(privacy__entity=CLAUSE | {"method": "group-formula", "delta": "0.0001"})
        made = Contract.parse(small)
        assert code_of(check_plan, made) == "CONTRACT_ENTITY_EPSILON"  # at delta 1e-5 the formula's is 4.7e-3
        small["privacy"] |= {"delta": "0.0000000001"}
        small["privacy"]["entity"]["delta"] = "0.0000005"
        made = Contract.parse(small)
        epsilon, delta = entity_guarantee(made, made.planned_steps)
        assert epsilon == 4 * epsilon_pld([(D("1.25"), D("0.1"), made.planned_steps)], D("1e-10"))
        assert delta <= D("0.1")

    @pytest.mark.parametrize(("epsilon", "noise", "rows"), [("4", "1.2", 32), ("6", "1", 12)])
    def test_a_formula_that_protects_nobody_is_refused_and_no_crash(self, epsilon: str, noise: str, rows: int) -> None:
        clause = CLAUSE | {"method": "group-formula", "max_rows": rows, "delta": "0.0001"}
        made = agents_contract(
            None, {"privacy.epsilon": epsilon, "privacy.noise_multiplier": noise, "privacy.entity": clause}
        )
        assert code_of(check_plan, made) == "CONTRACT_ENTITY_EPSILON"
        assert code_of(solve, made) == "TEMPLATE_ENTITY_UNPROTECTED"

    @pytest.mark.parametrize(
        ("clause", "code"),
        [
            ({"column": "age"}, "CONTRACT_ENTITY_COLUMN"),
            ({"column": "again"}, "CONTRACT_ENTITY_COLUMN"),
            ({"delta": "0.01", "method": "group-formula"}, "CONTRACT_ENTITY_DELTA"),
            ({"delta": "0.000001"}, "CONTRACT_ENTITY_DELTA"),
            ({"epsilon": 0}, "CONTRACT_NOT_POSITIVE"),
            ({"max_rows": 0}, "CONTRACT"),
            ({"max_rows": 33}, "CONTRACT"),
        ],
    )
    def test_a_clause_that_makes_no_sense_is_refused(self, clause: dict[str, Any], code: str) -> None:
        assert code_of(contract, **clause).startswith(code)

    def test_text_and_label_say_both_guarantees(self) -> None:
        made = contract()
        shown = text.render(made)
        assert "The column patient says whose a row is." in shown
        assert "at most 4 by the column patient, are protected by epsilon 99 at delta 0.00001" in shown
        assert "training takes at most 4 rows of one entity" in shown
        assert "A person with k rows has less" not in shown, "one clause says what holds for several rows"
        assert "are of one row by itself; the next is of all rows of one entity." in shown
        assert "no protection that words could describe" in shown, "epsilon 99, in words"
        assert "without any rows of one entity" in text.render(contract(epsilon="11"))
        first, second, *_ = made.by_id()
        label = dp_label(made, {first: 6, second: 0})
        assert label["entity"]["max_rows"] == 4
        spent, none = label["participants"]
        assert D(spent["entity_epsilon"]) == entity_guarantee(made, 6)[0] > D(spent["epsilon_pld"])
        assert (none["entity_epsilon"], none["entity_delta"]) == ("0", "0")

    def test_a_contract_without_the_clause_is_as_before(self) -> None:
        plain = Contract.parse(contract_values())
        assert "entity" not in plain.privacy.plain()
        assert code_of(entity_guarantee, plain, 3) == "PRIVACY_NO_ENTITY"
        assert "entity" not in dp_label(plain, {})
        assert "A person with k rows has less: k times epsilon" in text.render(plain)
        assert "one entity" not in text.render(plain)


class TestRows:
    SCHEMA = a_schema(number("age"))

    def table(self, whose: list[Any], rows: int | None = None) -> pl.DataFrame:
        n = rows or len(whose)
        return pl.DataFrame({"age": [i % 16 for i in range(n)], "y": ["no"] * n, "patient": whose})

    def encoded(self, whose: list[Any]) -> Any:
        schema = a_schema(number("age"), label={"name": "y", "classes": ["no", "yes"], "rule": "value"})
        return encode(schema, self.table(whose), file="rows.csv", entity="patient")

    def test_at_most_so_many_rows_of_each_are_taken(self) -> None:
        examples = self.encoded(["a"] * 10 + ["b"] * 3 + ["c"])
        chosen = select_rows(examples, 7, b"k" * 32, 3)
        assert sorted(Counter(chosen.entity.tolist()).values()) == [1, 3, 3]
        with pytest.raises(InputError, match="at most 3 of each entity, and the data has 7"):
            select_rows(examples, 8, b"k" * 32, 3)

    def test_the_choice_does_not_depend_on_the_tables_order(self) -> None:
        whose = ["a"] * 9 + ["b"] * 9 + ["c", "d"]
        schema = a_schema(number("age"), label={"name": "y", "classes": ["no", "yes"], "rule": "value"})
        table = self.table(whose).with_columns(age=pl.Series([1] * 4 + list(range(5)) + [1] * 4 + list(range(7))))

        def rows(frame: pl.DataFrame) -> list[tuple[float, int]]:
            chosen = select_rows(encode(schema, frame, file="t", entity="patient"), 5, b"k" * 32, 2)
            return list(zip(chosen.x[:, 0].tolist(), chosen.entity.tolist(), strict=True))

        for seed in range(5):
            assert rows(table.sample(fraction=1.0, shuffle=True, seed=seed)) == rows(table)

    def test_a_row_without_a_cap_is_taken_however_many_there_are(self) -> None:
        assert len(select_rows(self.encoded(["a"] * 10), 10, b"k" * 32)) == 10

    def test_numbers_name_entities_too(self) -> None:
        assert len(set(self.encoded([3, 3, 4]).entity.tolist())) == 2

    @pytest.mark.parametrize("whose", [["a", None], ["a", "  "]])
    def test_a_row_that_is_nobodys_is_refused(self, whose: list[Any]) -> None:
        with pytest.raises(InputError, match="patient holds no value in 1 of 2 rows") as err:
            self.encoded(whose)
        assert err.value.code == "DATA_MISSING_VALUE"

    def test_cells_that_name_nobody_are_refused(self) -> None:
        assert code_of(self.encoded, [b"\x00", b"\x01"]) == "DATA_ENTITY_MISSING"
        assert code_of(self.encoded, [1.0, math.nan]) == "DATA_ENTITY_MISSING"
        assert code_of(self.encoded, [1.0, None]) == "DATA_MISSING_VALUE"

    def test_a_table_without_the_column_is_refused(self) -> None:
        schema = a_schema(number("age"), label={"name": "y", "classes": ["no", "yes"], "rule": "value"})
        with pytest.raises(InputError, match="by which the contract tells entities apart") as err:
            encode(schema, self.table(["a"]), file="rows.csv", entity="nobody")
        assert err.value.field == "nobody"

    def test_a_cap_needs_to_know_whose_rows_they_are(self) -> None:
        examples = encode(
            a_schema(number("age"), label={"name": "y", "classes": ["no", "yes"], "rule": "value"}),
            self.table(["a"]),
            file="t",
        )
        assert code_of(select_rows, examples, 1, b"k" * 32, 2) == "DATA_ENTITY_MISSING"


class TestDrafting:
    ADDED = '[privacy.entity]\ncolumn = "patient"\nmax_rows = 3\nmethod = "mixture-of-gaussians"\n\n'

    def draft(self, folder: Path, added: str, entity: str | None = "patient") -> Contract:
        world, parties = operator(folder), [an_enterprise(number) for number in (1, 2, 3)]
        world.admit(*parties)
        if entity is not None:
            from fedpact_server import cards

            for who in parties:
                with world.database.write() as connection:
                    cards.accept_card(connection, find(connection, who.id), who.card(entity=entity), [])
        (folder / "rows.csv").write_text(
            "age,sex,ill\n" + "".join(f"{20 + i},f,yes\n{30 + i},m,no\n" for i in range(15))
        )
        template = TEMPLATE.replace("[participation]", added + "[participation]")
        rows = ValidationFile(path=folder / "rows.csv")
        return new(world.home, world.database, template, rows, now=NOW)

    def test_the_guarantee_is_worked_out(self, tmp_path: Path) -> None:
        made = self.draft(tmp_path, self.ADDED)
        assert made.privacy.entity is not None
        assert (made.privacy.entity.epsilon, made.privacy.entity.delta) == entity_guarantee(made, made.planned_steps)
        assert made.privacy.entity.epsilon > made.privacy.epsilon
        check_plan(made)

    def test_what_is_worked_out_cannot_be_given(self, tmp_path: Path) -> None:
        given = self.ADDED.replace("max_rows", "epsilon = 3\nmax_rows")
        assert code_of(self.draft, tmp_path, given) == "TEMPLATE_DERIVED_KEY"

    def test_the_cards_must_declare_the_column(self, tmp_path: Path) -> None:
        assert code_of(self.draft, tmp_path, self.ADDED, entity=None) == "TEMPLATE_CARD_ENTITY"

    def test_so_many_rows_that_nothing_is_protected_are_refused(self, tmp_path: Path) -> None:
        many = self.ADDED.replace("max_rows = 3", "max_rows = 32")
        with pytest.raises(InputError) as caught:
            self.draft(tmp_path, many)
        found = caught.value
        assert (found.code, found.field) == ("TEMPLATE_ENTITY_UNPROTECTED", "privacy.entity.max_rows")
        assert found.rule == "the entities' epsilon is at most 100"
        assert "max_rows" in found.remedy

    def test_the_formula_is_refused_where_its_delta_is_too_large(self, tmp_path: Path) -> None:
        formula = self.ADDED.replace("mixture-of-gaussians", "group-formula").replace("max_rows = 3", "max_rows = 4")
        with pytest.raises(InputError) as caught:
            self.draft(tmp_path, formula)
        assert (caught.value.code, caught.value.field) == ("TEMPLATE_ENTITY_UNPROTECTED", "privacy.entity.method")
        assert "mixture-of-gaussians" in caught.value.remedy


def test_examples_without_entities_lose_nothing() -> None:
    from tests.support.models_kit import random_examples

    examples = random_examples(np.random.default_rng(0), 5, 2, 2)
    assert examples.take([3, 1]).entity is None
    assert examples.take([3, 1]).y.tolist() == [examples.y[3], examples.y[1]]
