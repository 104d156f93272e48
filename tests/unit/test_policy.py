"""The policy: every clause refuses what it should, by a code of its own, and an empty policy allows nothing."""

import datetime
import time
from decimal import Decimal

import pytest
from tests.support.agent_world import NOW, key
from tests.support.agent_world import contract as agents_contract
from tests.support.contract_kit import change

from fedpact_client import policy
from fedpact_client.policy import Policy, check, check_entities
from fedpact_contract.contract import Contract
from fedpact_contract.errors import InputError, RefusedError
from fedpact_contract.keys import fingerprint, public_hex
from fedpact_contract.privacy import filter_limit

ME = fingerprint(public_hex(key("own")))
ALLOW = {
    "purposes": ["disease-prediction"],
    "operators": [fingerprint(public_hex(key("operator")))],
    "sectors": ["finance", "medical"],
    "model_kinds": ["softmax"],
    "columns": ["age", "sex", "ill"],
    "max_epsilon": "2",
    "min_participants": 3,
    "max_rounds": 4,
    "not_after": "2026-12-31T00:00:00Z",
}


def contract(changes: dict[str, object] | None = None, **own: object) -> Contract:
    """A contract whose term ends with the policy."""
    return agents_contract(changes={"term.not_after": ALLOW["not_after"]} | (changes or {}), **own)


def parsed(**changes: object) -> Policy:
    return Policy.parse(ALLOW | changes, code="POLICY")


def test_a_policy_that_just_fits_allows() -> None:
    assert check(contract(), ME, parsed(), NOW) is None


@pytest.mark.parametrize(
    ("changes", "code", "rule", "field"),
    [
        ({"purposes": []}, "POLICY_PURPOSE_MISMATCH", "purposes", "purpose"),
        ({"purposes": ["Disease-prediction", "disease"]}, "POLICY_PURPOSE_MISMATCH", "purposes", "purpose"),
        ({"operators": []}, "POLICY_OPERATOR", "operators", "operator.key"),
        ({"operators": "enrolled"}, "POLICY_OPERATOR", "operators", "operator.key"),
        ({"operators": ["a" * 64]}, "POLICY_OPERATOR", "operators", "operator.key"),
        ({"sectors": []}, "POLICY_SECTOR", "sectors", "participants.1.sector"),
        ({"sectors": ["medical"]}, "POLICY_SECTOR", "sectors", "participants.2.sector"),
        ({"model_kinds": []}, "POLICY_MODEL", "model_kinds", "model.kind"),
        ({"model_kinds": ["mlp"]}, "POLICY_MODEL", "model_kinds", "model.kind"),
        ({"columns": []}, "POLICY_COLUMN", "columns", "data.columns.age"),
        ({"columns": ["age", "sex"]}, "POLICY_COLUMN", "columns", "data.label.name"),
        ({"columns": ["age", "ill"]}, "POLICY_COLUMN", "columns", "data.columns.sex"),
        ({"trust_models": []}, "POLICY_TRUST_MODEL", "trust_models", "privacy.trust_model"),
        (
            {"trust_models": ["client-level-at-the-operator"]},
            "POLICY_TRUST_MODEL",
            "trust_models",
            "privacy.trust_model",
        ),
        ({"max_epsilon": "1.999999"}, "POLICY_EPSILON", "max_epsilon", "privacy.epsilon"),
        ({"max_epsilon": "0"}, "POLICY_EPSILON", "max_epsilon", "privacy.epsilon"),
        ({"min_participants": 4}, "POLICY_MIN_PARTICIPANTS", "min_participants", "participation.minimum"),
        ({"max_rounds": 3}, "POLICY_ROUNDS", "max_rounds", "training.rounds"),
        ({"not_after": "2026-12-30T23:59:59Z"}, "POLICY_EXPIRED", "not_after", "term.not_after"),
    ],
)
def test_each_clause_refuses(changes: dict[str, object], code: str, rule: str, field: str) -> None:
    with pytest.raises(RefusedError) as caught:
        check(contract(), ME, parsed(**changes), NOW)
    assert (caught.value.code, caught.value.rule, caught.value.field) == (code, f"policy.{rule} in agent.toml", field)
    assert "[policy] in agent.toml" in caught.value.remedy
    assert caught.value.exit_code == 5


def test_all_clauses_that_refuse_are_told_at_once_under_the_first_ones_code() -> None:
    with pytest.raises(RefusedError) as caught:
        check(contract(), ME, parsed(max_epsilon="1", min_participants=9, max_rounds=3), NOW)
    found = caught.value
    assert found.code == "POLICY_EPSILON"
    for words in ("epsilon 2; the policy allows 1", "POLICY_MIN_PARTICIPANTS: A round counts from 3", "has 4 rounds"):
        assert words in found.message
    assert found.field == "privacy.epsilon, participation.minimum, training.rounds"
    assert found.rule is not None
    assert all(f"policy.{key} in" in found.rule for key in ("max_epsilon", "min_participants", "max_rounds"))


def test_only_the_clauses_that_are_named_are_asked() -> None:
    policy_of_nothing = parsed(purposes=[], max_epsilon="1")
    with pytest.raises(RefusedError, match="POLICY_EPSILON"):
        check(contract(), ME, policy_of_nothing, NOW, [policy.check_epsilon])
    assert check(contract(), ME, policy_of_nothing, NOW, [policy.check_rounds]) is None


def test_every_setting_is_read_by_some_clause() -> None:
    """A setting that no clause reads would be a promise that nothing keeps."""
    refusing = {"purposes", "operators", "sectors", "model_kinds", "columns", "max_epsilon"}
    refusing |= {"min_participants", "max_rounds", "not_after", "trust_models"}
    refusing |= {"require_entity", "max_entity_epsilon", "hours", "max_data_set_epsilon", "max_data_set_uses"}  # below
    assert set(Policy.model_fields) == refusing


def told_apart_by(column: str) -> Contract:
    clause = {"column": column, "max_rows": 2, "method": "mixture-of-gaussians", "epsilon": 9, "delta": "0.00001"}
    values = contract().plain()
    values["privacy"]["entity"] = clause
    return Contract.parse(values)


def test_all_rows_of_an_entity_may_cost_so_much_and_no_more() -> None:
    told_apart = told_apart_by("who")
    for limit in (None, "9"):
        allowed = parsed(columns="*", **({} if limit is None else {"max_entity_epsilon": limit}))
        assert check(told_apart, ME, allowed, NOW) is None
    with pytest.raises(RefusedError, match=r"epsilon 9 in the contract; the policy allows 8\.9") as caught:
        check(told_apart, ME, parsed(columns="*", max_entity_epsilon="8.9"), NOW)
    assert (caught.value.code, caught.value.rule) == (
        "POLICY_ENTITY_EPSILON",
        "policy.max_entity_epsilon in agent.toml",
    )
    assert check(contract(), ME, parsed(max_entity_epsilon="0.1"), NOW) is None


def test_a_card_that_says_whose_a_row_is_wants_the_clause_unless_agent_toml_says_otherwise() -> None:
    with pytest.raises(RefusedError, match="set-own says whose a row is") as caught:
        check_entities(contract(), parsed(), "set-own", "who", "who")
    assert (caught.value.code, caught.value.field, caught.value.rule) == (
        "POLICY_ENTITY",
        "privacy.entity",
        "policy.require_entity in agent.toml",
    )
    assert "require_entity = false" in caught.value.remedy
    assert check_entities(contract(), parsed(require_entity=False), "set-own", "who", "who") is None
    assert check_entities(told_apart_by("who"), parsed(), "set-own", "who", "who") is None
    assert check_entities(contract(), parsed(), "set-own", None, None) is None


@pytest.mark.parametrize("card", [None, "whose"])
def test_a_clause_on_another_column_than_the_cards_is_refused_whatever_the_policy_says(card: str | None) -> None:
    with pytest.raises(RefusedError, match="SIGN_ENTITY_COLUMN"):
        check_entities(told_apart_by("who"), parsed(require_entity=False), "set-own", card, card)


@pytest.mark.parametrize(("declared", "card"), [(None, "who"), ("who", None), ("whose", "who")])
def test_agent_toml_must_still_say_what_the_card_says(declared: str | None, card: str | None) -> None:
    for offered in (contract(), told_apart_by("who")):
        with pytest.raises(RefusedError) as caught:
            check_entities(offered, parsed(require_entity=False), "set-own", declared, card)
        assert (caught.value.code, caught.value.file) == ("CARD_ENTITY_CHANGED", "agent.toml")
        assert caught.value.field == "data_sets.entity"
        assert "fedpact-agent card set-own" in caught.value.remedy


def test_at_client_level_a_participants_whole_update_is_the_unit_and_no_clause_is_wanted() -> None:
    privacy = {name: value for name, value in contract().plain()["privacy"].items() if name != "max_grad_norm"}
    central = Contract.parse(
        change(
            contract().plain(),
            {
                "privacy": privacy
                | {"trust_model": "client-level-at-the-operator", "unit": "participant", "max_update_norm": "1"},
                "training.aggregation": "uniform-mean",
                "contribution.game": "unanimity",
                "settlement.contribution_weight": "0",
                "settlement.equal_weight": "1",
                "settlement.data_weight": "0",
            },
            ".",
        )
    )
    assert check_entities(central, parsed(), "set-own", "who", "who") is None


def test_the_column_that_tells_entities_apart_must_be_allowed_too() -> None:
    told_apart = told_apart_by("who")
    with pytest.raises(RefusedError, match="POLICY_COLUMN"):
        check(told_apart, ME, parsed(), NOW)
    assert check(told_apart, ME, parsed(columns=["age", "sex", "ill", "who"]), NOW) is None


def test_the_column_of_an_event_must_be_allowed_too() -> None:
    label = {"name": "days", "rule": "survival", "event": "ill", "outcomes": ["no", "yes"], "cuts": ["30", "90"]}
    survival = contract(changes={"data.label": label, "model.kind": "linear", "contribution.loss": "discrete-hazard"})
    allowed = {"model_kinds": ["linear"], "columns": ["age", "sex", "days"]}
    with pytest.raises(RefusedError) as caught:
        check(survival, ME, parsed(**allowed), NOW)
    assert (caught.value.code, caught.value.field) == ("POLICY_COLUMN", "data.label.event")
    assert check(survival, ME, parsed(**allowed | {"columns": ["age", "sex", "days", "ill"]}), NOW) is None
    with pytest.raises(RefusedError, match="POLICY_MODEL"):
        check(survival, ME, parsed(**allowed | {"model_kinds": ["softmax"]}), NOW)


def test_stars_allow_any_sector_and_column() -> None:
    assert check(contract(), ME, parsed(sectors="*", columns="*"), NOW) is None


def test_own_sector_needs_no_permission() -> None:
    assert check(contract(sector="mining"), ME, parsed(), NOW) is None


def test_enrolled_means_the_enrolled_operator_alone() -> None:
    open_policy = parsed(operators="enrolled")
    assert check(contract(), ME, open_policy.resolve(ALLOW["operators"][0]), NOW) is None
    with pytest.raises(RefusedError, match="POLICY_OPERATOR"):
        check(contract(), ME, open_policy.resolve("b" * 64), NOW)


def test_resolve_leaves_a_list_alone() -> None:
    assert parsed().resolve("b" * 64) == parsed()


def test_a_stranger_is_no_party() -> None:
    with pytest.raises(RefusedError, match="POLICY_NOT_A_PARTY"):
        check(contract(), "c" * 64, parsed(), NOW)


@pytest.mark.parametrize(
    ("moment", "allowed"),
    [
        ("2026-10-31T23:59:59", False),
        ("2026-11-01T00:00:00", True),
        ("2026-12-31T00:00:00", True),
        ("2026-12-31T00:00:01", False),
    ],
)
def test_the_term_has_sharp_ends(moment: str, allowed: bool) -> None:
    now = datetime.datetime.fromisoformat(moment).replace(tzinfo=datetime.UTC)
    endless = parsed(not_after="2030-01-01T00:00:00Z")
    if allowed:
        assert check(contract(), ME, endless, now) is None
        return
    with pytest.raises(RefusedError) as caught:
        check(contract(), ME, endless, now)
    assert (caught.value.code, caught.value.rule, caught.value.field) == ("POLICY_TERM", None, "term")


@pytest.mark.parametrize(
    "changes",
    [
        {"not_after": "2026-13-01T00:00:00Z"},
        {"not_after": NOW.replace(tzinfo=None)},
        {"not_after": "tomorrow"},
        {"max_epsilon": 2.5},
        {"max_epsilon": Decimal("NaN")},
        {"min_participants": 0},
        {"purposes": "disease-prediction"},
        {"purposes": ["two words"]},
        {"operators": ["not a fingerprint"]},
        {"operators": "anybody"},
        {"columns": "all"},
        {"max_rounds": True},
        {"extra": 1},
    ],
)
def test_bad_policies_are_not_parsed(changes: dict[str, object]) -> None:
    with pytest.raises(InputError):
        parsed(**changes)


@pytest.mark.parametrize("missing", sorted(ALLOW))
def test_no_setting_has_a_default(missing: str) -> None:
    with pytest.raises(InputError, match="POLICY_MISSING_KEY"):
        Policy.parse({k: v for k, v in ALLOW.items() if k != missing}, code="POLICY")


def test_a_toml_date_is_a_moment() -> None:
    moment = datetime.datetime(2026, 12, 31, tzinfo=datetime.UTC)
    assert parsed(not_after=moment).not_after == "2026-12-31T00:00:00Z"


class TestHours:
    """NOW is 12:00 in UTC, 20:00 in Shanghai, 08:30 at -03:30."""

    @pytest.mark.parametrize(
        ("begin", "end", "zone", "inside"),
        [
            ("12:00", "12:01", "UTC", True),
            ("11:00", "12:00", "UTC", False),
            ("12:01", "11:59", "UTC", False),
            ("12:01", "12:00", "UTC", False),
            ("23:00", "12:01", "UTC", True),
            ("20:00", "06:00", "Asia/Shanghai", True),
            ("20:01", "06:00", "+08:00", False),
            ("08:30", "08:31", "-03:30", True),
            ("07:00", "08:00", "America/New_York", True),
        ],
    )
    def test_a_window_of_the_day(self, begin: str, end: str, zone: str, inside: bool) -> None:
        own = parsed(hours={"begin": begin, "end": end, "zone": zone})
        if inside:
            assert check(contract(), ME, own, NOW, policy.ORDER_CLAUSES) is None
            return
        with pytest.raises(RefusedError) as caught:
            check(contract(), ME, own, NOW, policy.ORDER_CLAUSES)
        assert (caught.value.code, caught.value.rule) == ("POLICY_HOURS", "policy.hours in agent.toml")

    def test_it_is_no_question_when_a_contract_is_signed(self) -> None:
        own = parsed(hours={"begin": "01:00", "end": "02:00", "zone": "UTC"})
        assert check(contract(), ME, own, NOW) is None

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"end": "08:00"}, "leave `hours` out"),
            ({"zone": "Mars/Olympus"}, "knows no time zone Mars/Olympus"),
            ({"zone": "../etc/passwd"}, "knows no time zone"),
            ({"begin": "8:00"}, "a time of day such as 20:00"),
            ({"begin": "24:00"}, "a time of day such as 20:00"),
        ],
    )
    def test_what_is_no_window(self, changes: dict[str, str], words: str) -> None:
        with pytest.raises(InputError) as caught:
            parsed(hours={"begin": "08:00", "end": "18:00", "zone": "UTC"} | changes)
        assert words in caught.value.message
        assert caught.value.field is not None
        assert caught.value.field.startswith("hours")


class TestDataSet:
    """R at alpha 4 and delta 1e-5 is epsilon less 3.088."""

    def use(self, **values: object) -> policy.DataSetUse:
        base = {"data_set": "a", "uses": 10, "rdp": Decimal(1), "delta": Decimal("0.00001"), "alpha": Decimal(4)}
        return policy.DataSetUse(**(base | values))

    def test_no_limit_of_its_own(self) -> None:
        assert policy.check_data_set(parsed(), self.use(uses=10**9, rdp=Decimal(10**9))) is None

    def test_limits_that_just_fit(self) -> None:
        limit = filter_limit(Decimal(5), Decimal("0.00001"), Decimal(4))
        own = parsed(max_data_set_epsilon="5", max_data_set_uses=10)
        assert policy.check_data_set(own, self.use(rdp=limit)) is None
        for changes, code in (
            ({"rdp": limit + Decimal("1e-9")}, "POLICY_DATA_SET_EPSILON"),
            ({"uses": 11}, "POLICY_DATA_SET_USES"),
        ):
            with pytest.raises(RefusedError) as caught:
                policy.check_data_set(own, self.use(**changes))
            assert caught.value.code == code

    def test_an_epsilon_that_allows_nothing(self) -> None:
        with pytest.raises(RefusedError, match="allows 0"):
            policy.check_data_set(parsed(max_data_set_epsilon="1"), self.use(rdp=Decimal("0.001")))


def test_a_decision_takes_less_than_five_milliseconds() -> None:
    own, terms = parsed(hours={"begin": "00:00", "end": "23:59", "zone": "Asia/Shanghai"}), contract()
    taken = []
    for _ in range(50):
        begun = time.perf_counter()
        check(terms, ME, own, NOW, policy.ORDER_CLAUSES)
        taken.append(time.perf_counter() - begun)
    assert sorted(taken)[25] < 0.005
