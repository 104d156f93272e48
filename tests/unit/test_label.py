"""The privacy label: each field, under both trust models, with entity, statistics and baseline; as people see it."""

import importlib.metadata
import re
from decimal import Decimal
from typing import Any

import pytest
from tests.support.central import CENTRAL
from tests.support.contract_kit import DROP, change
from tests.support.settlement_kit import a_contract

from fedpact_contract.contract import Contract
from fedpact_contract.errors import InputError
from fedpact_contract.label import dp_label
from fedpact_contract.privacy import (
    ACCOUNTANT,
    CENTRAL_ACCOUNTANT,
    CENTRAL_ORDERS,
    LIBRARY,
    attempt_rdp,
    entity_guarantee,
    epsilon_pld,
    plan_groups,
    plan_rdp,
    rdp,
)
from fedpact_contract.record import decimal_text
from fedpact_server.report.label_rows import label_rows, orders_text
from fedpact_server.report.labels import LABELS, SAID

D = Decimal
DELTA = D("0.00001")
HIGH = "120"
STATISTICS = {
    "noise_multiplier": 30,
    "queries": [
        {"kind": "mean", "column": "age"},
        {"kind": "count", "column": "age", "at_least": 60},
        {"kind": "count", "column": "again", "value": "yes"},
        {"kind": "quantile", "column": "age", "bins": 8, "probabilities": ["0.5"]},
        {"kind": "histogram", "column": "again"},
        {"kind": "histogram", "column": "age", "bins": 6},
    ],
}
ENTITY = {"column": "patient", "max_rows": 2, "method": "mixture-of-gaussians", "epsilon": 9, "delta": DELTA}
ALL: dict[str, Any] = {
    "privacy__entity": ENTITY,
    "statistics": STATISTICS,
    "baseline": {"steps": 4},
    "participants__0__gate_order": "9.1",
    "participants__1__gate_order": "4.3",
    "participants__2__gate_order": "25",
}


def record_level(**changes: Any) -> Contract:
    """Three attempts of three steps."""
    base = {"privacy__delta": DELTA, "training__local_steps": 3, "privacy__spare_attempts": 1}
    return Contract.parse(change(a_contract(rounds=2).plain(), base | changes, "__"))


def with_all(**changes: Any) -> Contract:
    """Beside the attempts statistics, a baseline and entities; the gates have orders of their own."""
    return record_level(**(ALL | changes))


def client_level() -> Contract:
    orders = {f"participants__{place}__gate_order": "4.3" for place in range(3)}
    return Contract.parse(change(a_contract(rounds=3).plain(), CENTRAL | {"privacy__delta": DELTA} | orders, "__"))


def whole(contract: Contract) -> dict[str, Any]:
    return dp_label(contract, {p.id: contract.planned_steps for p in contract.participants})


class TestRecordLevel:
    def test_the_claim(self) -> None:
        label = whole(with_all())
        assert label["standard"] == "NIST SP 800-226"
        assert (label["epsilon"], label["delta"]) == ("2", "0.00001")
        assert (label["privacy_unit"], label["neighbours"]) == ("example", "zero-out")
        assert label["trust_model"] == "record-level-at-each-participant"
        assert label["adversary"] == "sees-all-releases-and-knows-all-else"
        assert "not_protected_from" not in label
        assert label["mechanism"] == "dp-sgd-and-gaussian-sums"
        assert whole(with_all(statistics=DROP))["mechanism"] == "dp-sgd"
        assert label["sampling"] == {"method": "poisson", "rate": "0.1"}
        assert label["clip"] == {"method": "flat", "max_grad_norm": "1"}
        assert label["noise"] == {"distribution": "gaussian", "multiplier": "1.25"}
        assert label["randomness"] == {"source": "aes-256-ctr", "arithmetic": "float64-four-draws-then-float32"}
        assert label["hyperparameters"] == "fixed-at-signature"
        assert label["composition"] == {
            "within_contract": "pld-of-the-whole-plan",
            "across_contracts": "renyi-filter-of-each-data-set",
        }

    def test_the_plan_counts_every_release(self) -> None:
        """Three attempts of three steps, six queries and the baseline."""
        cost = epsilon_pld([(D("1.25"), D("0.1"), 13), (D(30), D(1), 6)], DELTA)
        assert whole(with_all())["plan"] == {"steps": 9, "releases": 3 + 6 + 1, "epsilon_pld": decimal_text(cost)}
        assert whole(record_level())["plan"]["releases"] == 3

    def test_measurements_are_itemised(self) -> None:
        alone = decimal_text(epsilon_pld([(D(30), D(1), 1)], DELTA))
        cost = {"noise_multiplier": "30", "releases": 1, "epsilon_pld": alone}
        assert whole(with_all())["measurements"] == [
            {"kind": "mean", "column": "age", "low": "0", "high": HIGH, **cost},
            {"kind": "count", "column": "age", "value": ">= 60", **cost},
            {"kind": "count", "column": "again", "value": "yes", **cost},
            {
                "kind": "quantile",
                "column": "age",
                "low": "0",
                "high": HIGH,
                "bins": 8,
                "probabilities": ["0.5"],
                **cost,
            },
            {"kind": "histogram", "column": "again", **cost},
            {"kind": "histogram", "column": "age", "low": "0", "high": HIGH, "bins": 6, **cost},
            {
                "kind": "baseline",
                "steps": 4,
                "sample_rate": "0.1",
                "noise_multiplier": "1.25",
                "releases": 1,
                "epsilon_pld": decimal_text(epsilon_pld([(D("1.25"), D("0.1"), 4)], DELTA)),
            },
        ]
        assert "measurements" not in whole(record_level())

    def test_accountants_and_orders(self) -> None:
        label = whole(with_all())
        pld = {"quantity": "epsilon_pld", "library": LIBRARY, "method": "privacy-loss-distributions"}
        gate = {"quantity": "epsilon_gate", "library": LIBRARY, "method": "renyi-filter"}
        assert label["accountant"] == ACCOUNTANT
        assert label["accounting"] == [pld, gate | {"orders": ["4.3", "9.1", "25"]}]
        assert whole(record_level())["accounting"] == [pld, gate], "a contract that states no order"
        name, version = LIBRARY.split()
        assert importlib.metadata.version(name).startswith(f"{version}.")

    def test_entities(self) -> None:
        contract = with_all()
        label, entity = whole(contract), contract.privacy.entity
        assert entity is not None
        assert label["entity"] == entity.plain()
        epsilon, _ = entity_guarantee(contract, 9)
        spent = {(line["entity_epsilon"], line["entity_delta"]) for line in label["participants"]}
        assert spent == {(decimal_text(epsilon), "0.00001")}

    def test_what_is_outside(self) -> None:
        always = ["counts-and-who-takes-part", "validation-rows", "timing", "data-where-they-are-kept"]
        assert whole(with_all())["outside"] == [
            "participants-with-altered-code",
            "entity-in-several-data-sets",
            "entity-under-several-names",
            "rows-that-the-column-gives-to-others",
            *always,
        ]
        assert whole(record_level())["outside"] == [
            "participants-with-altered-code",
            "several-rows-of-one-person",
            *always,
        ]

    def test_what_each_was_charged(self) -> None:
        """In the contract's order, whatever the order of ids; failed attempts count, measurements for everybody."""
        contract = with_all()
        contract = contract.model_copy(update={"participants": contract.participants[::-1]})
        first, second, third = contract.participants
        lines = dp_label(contract, dict(sorted({first.id: 6, second.id: 7, third.id: 0}.items())))["participants"]
        assert [line["name"] for line in lines] == [p.name for p in contract.participants]
        assert [line["participant"] for line in lines] == [first.id, second.id, third.id]
        assert [(line["steps"], line["releases"]) for line in lines] == [(6, 2 + 7), (7, 3 + 7), (0, 7)]
        assert not any({"gate_order", "renyi_plan"} & line.keys() for line in lines), "of the plan, not charged"
        for line, steps in zip(lines, (6, 7, 0), strict=True):
            assert D(line["epsilon_pld"]) == epsilon_pld(plan_groups(contract, steps), DELTA) > 0

    def test_the_most_that_a_ledger_is_charged(self) -> None:
        """Three attempts, six queries of alpha / (2 30^2) each, and the baseline."""
        gates = whole(with_all())["gates"]
        assert [line["gate_order"] for line in gates] == ["9.1", "4.3", "25"]
        assert dp_label(with_all(), {})["gates"] == gates, "whatever was charged"
        for line in gates:
            alpha = D(line["gate_order"])
            steps = rdp(D("1.25"), D("0.1"), 3, alpha) * 3 + rdp(D("1.25"), D("0.1"), 4, alpha)
            assert abs(D(line["renyi_plan"]) - steps - 6 * alpha / (2 * 30**2)) < D("1e-7")
        plain = record_level()
        assert plan_rdp(plain, D("4.3")) == 3 * attempt_rdp(plain, D("4.3"))
        assert "gates" not in whole(plain)

    def test_it_knows_only_participants(self) -> None:
        contract = with_all()
        with pytest.raises(InputError, match="CONTRACT_NOT_A_PARTY"):
            dp_label(contract, {contract.operator.id: 3})

    def test_a_gate_has_an_order_above_one(self) -> None:
        with pytest.raises(InputError) as refused:
            with_all(participants__1__gate_order="1")
        assert (refused.value.code, refused.value.field) == ("CONTRACT_GATE_ORDER", "participants.1.gate_order")


class TestClientLevel:
    def test_who_is_not_kept_out(self) -> None:
        label = whole(client_level())
        assert label["trust_model"] == "client-level-at-the-operator"
        assert (label["privacy_unit"], label["neighbours"]) == ("participant", "zero-out")
        assert label["not_protected_from"] == "the-operator"
        assert label["adversary"] == "sees-all-releases-and-knows-all-else"
        assert label["mechanism"] == "gaussian-sum-of-clipped-updates"
        assert label["clip"] == {"method": "whole-update", "max_update_norm": "0.5"}
        assert label["sampling"] == {"method": "no-amplification", "rate": "1"}
        assert label["noise"] == {"distribution": "gaussian", "multiplier": "3.723"}
        assert label["composition"]["within_contract"] == "rdp-of-the-whole-plan"
        assert label["outside"][:2] == ["noise-by-the-operators-word", "counts-and-who-takes-part"]
        assert not {"measurements", "entity"} & label.keys()

    def test_releases_and_epsilon(self) -> None:
        contract = client_level()
        label = dp_label(contract, dict.fromkeys(contract.by_id(), 2))
        two = epsilon_pld([(D("3.723"), D(1), 2)], DELTA)
        assert label["plan"]["releases"] == 3
        assert {(line["releases"], D(line["epsilon_pld"])) for line in label["participants"]} == {(2, two)}
        attempts = contract.training.rounds + contract.privacy.spare_attempts
        for line in label["gates"]:
            assert D(line["renyi_plan"]) == attempts * attempt_rdp(contract, D("4.3"))

    def test_accountants_and_orders(self) -> None:
        label = whole(client_level())
        assert label["accountant"] == CENTRAL_ACCOUNTANT
        epsilon, pld, gate = label["accounting"]
        assert (epsilon["quantity"], epsilon["method"]) == ("epsilon", "renyi-least-of-orders")
        assert {line["library"] for line in label["accounting"]} == {LIBRARY}
        assert [D(order) for order in epsilon["orders"]] == list(CENTRAL_ORDERS)
        assert (pld["quantity"], gate["quantity"], gate["orders"]) == ("epsilon_pld", "epsilon_gate", ["4.3"])

    def test_the_orders_are_the_accountants_own(self) -> None:
        from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS

        assert [float(order) for order in CENTRAL_ORDERS] == DEFAULT_RDP_ORDERS


KNOWN = ["NIST SP 800-226", LIBRARY, "PLD", "RDP", "REPLACE_SPECIAL", "flwr", "RdpAccountant", "AES-256-CTR"]
KNOWN += ["epsilon_pld", "epsilon_gate", "patient", "again", "age", "yes", "kit company"]
"""Names of things, and what parties chose."""


class TestShown:
    @pytest.mark.parametrize("made", [with_all, record_level, client_level])
    def test_in_both_languages(self, made: Any) -> None:
        """Every field has its words, and no English is left in the Chinese ones."""
        label = whole(made())
        english, chinese = label_rows(label, "en"), label_rows(label, "zh")
        assert len(english) == len(chinese) == len(label)
        assert not re.search(r"[\u4e00-\u9fff]", str(english))
        text = "\n".join(f"{title} {' '.join(lines)}" for title, lines in chinese)
        for known in KNOWN:
            text = text.replace(known, "")
        assert re.findall("[A-Za-z]+", text) == []

    def test_what_people_read(self) -> None:
        shown = dict(label_rows(whole(with_all()), "en"))
        assert shown["Standard"] == ["NIST SP 800-226"]
        assert shown["Released once besides"][0].startswith(
            f"what: mean; column: age; lower bound: 0; upper bound: {HIGH}; noise multiplier: 30; releases: 1; "
        )
        assert "Rényi orders: 4.3, 9.1, 25" in shown["Accounting"][1]
        assert re.match(r"kit company \d: steps: 9; releases: 10; ", shown["Charged"][0])
        assert shown["Whole plan at each data set's gate"][0].startswith("kit company ")
        assert len(shown["Outside the guarantee"]) == 8
        central = dict(label_rows(whole(client_level()), "zh"))
        assert "1.1, 1.2 … 11, 12 … 63, 128, 256, 512, 1024" in central["核算"][0]

    def test_what_parties_chose_is_not_translated(self) -> None:
        column = {"name": "mean", "kind": "number", "low": 0, "high": 120, "missing": "drop"}
        asked = {"noise_multiplier": 30, "queries": [{"kind": "mean", "column": "mean"}]}
        shown = dict(label_rows(whole(with_all(data__columns=[column], statistics=asked)), "zh"))
        line = shown[LABELS["dp_measurements"][1]][0]
        assert f"{LABELS['dp_kind'][1]}：{SAID['mean'][1]}；{LABELS['dp_column'][1]}：mean；" in line

    def test_orders_are_drawn_together(self) -> None:
        assert orders_text([]) == ""
        assert orders_text(["4.3"]) == "4.3"
        assert orders_text(["4.3", "9.1", "25"]) == "4.3, 9.1, 25"
        assert orders_text(["2", "3", "4", "5", "6", "9"]) == "2, 3 … 6, 9"
