"""The contract: one id, every rule by name, nothing unknown, nothing defaulted."""

import ast
import copy
import re
from decimal import Decimal
from pathlib import Path

import pytest
import tomli_w
from tests.support.federation import contract_values, digits

from fedpact_contract import contract as contract_module
from fedpact_contract.contract import Contract, load_toml, merge
from fedpact_contract.errors import InputError
from fedpact_contract.keys import generate_key
from fedpact_contract.trust import Trust

PARTS, VALIDATION = digits([30, 40, 50, 60])


@pytest.fixture
def values():
    salts = [i.to_bytes(32, "big") for i in range(len(VALIDATION))]
    keys = [generate_key() for _ in range(4)]
    return contract_values(generate_key(), keys, [30, 40, 50, 60], VALIDATION, salts, "0" * 64)


def changed(values, path: str, value):
    result = copy.deepcopy(values)
    *parents, last = path.split(".")
    target = result
    for name in parents:
        target = target[int(name)] if name.isdigit() else target[name]
    if value is DROP:
        del target[last]
    else:
        target[int(last) if last.isdigit() else last] = value
    return result


DROP = object()


def test_toml_and_bytes_give_the_same_contract_and_id(values) -> None:
    contract = Contract.parse(values)
    assert Contract.from_bytes(contract.to_bytes()) == contract
    text = tomli_w.dumps(values)
    assert Contract.from_toml(text).id == contract.id
    assert Contract.from_toml(text.replace("0.2", "0.20")).id == contract.id, "one decimal, one spelling"


def test_a_changed_copy_has_an_id_of_its_own(values) -> None:
    contract = Contract.parse(values)
    first = contract.id
    other = contract.model_copy(update={"title": "Another title"})
    assert contract.id == first == contract.digest()
    assert other.id == other.digest() != first
    assert Contract.parse(values) == contract, "whether or not its id was asked for"


def test_every_key_is_needed(values) -> None:
    for section in ("data", "model", "training", "privacy", "participation", "contribution", "settlement", "code"):
        for key in values[section]:
            with pytest.raises(InputError) as err:
                Contract.parse(changed(values, f"{section}.{key}", DROP))
            assert err.value.code == "CONTRACT_MISSING_KEY", f"{section}.{key} has a default"


BROKEN = [
    ("surprise", 1, "CONTRACT_UNKNOWN_KEY"),
    ("privacy.surprise", 1, "CONTRACT_UNKNOWN_KEY"),
    ("training.local_steps", 10**6, "CONTRACT_TOO_MANY_STEPS"),
    ("training.rounds", 20_000, "CONTRACT_TOO_MANY_STEPS"),
    *(("title", f"Heart{c}disease", "CONTRACT") for c in "\n\x1b\x7f\x9b\u200b\u202e\u2028\u2066\ufeff\ue000"),
    *(("participants.0.name", f"甲{c}", "CONTRACT") for c in "\u200f\u2069"),
    ("privacy.epsilon", Decimal(-1), "CONTRACT_NOT_POSITIVE"),
    ("privacy.epsilon", 1.5, "CONTRACT"),
    ("privacy.delta", Decimal("0.0001"), "CONTRACT_DELTA"),
    ("privacy.sample_rate", Decimal(1), "CONTRACT_SAMPLE_RATE"),
    ("privacy.sample_rate", Decimal("0.99999999999999999999"), "CONTRACT_SAMPLE_RATE"),
    ("privacy.unit", "user", "CONTRACT"),
    ("privacy.trust_model", "central", "CONTRACT"),
    ("privacy.spare_attempts", -1, "CONTRACT"),
    ("training.rounds", 0, "CONTRACT"),
    ("training.learning_rate", Decimal(0), "CONTRACT_NOT_POSITIVE"),
    ("training.aggregation", "trimmed-mean", "CONTRACT"),
    ("participation.minimum", 5, "CONTRACT_MINIMUM"),
    ("participation.minimum", 1, "CONTRACT_MINIMUM"),
    ("participation.head_threshold", 4, "CONTRACT_HEAD_THRESHOLD"),
    ("settlement.contribution_weight", Decimal("0.9"), "CONTRACT_WEIGHTS"),
    ("settlement.fallback", "none", "CONTRACT"),
    ("settlement.fallback", DROP, "CONTRACT_MISSING_KEY"),
    ("contribution.game", "core", "CONTRACT"),
    ("contribution.validation.slices", [], "CONTRACT"),
    ("contribution.validation.slices.0.source", "a" * 64, "CONTRACT_SLICES"),
    ("model.hidden", [5], "CONTRACT_MODEL"),
    ("model.kind", "mlp", "CONTRACT_MODEL"),
    ("data.columns.0.low", Decimal(99), "CONTRACT_BOUNDS"),
    ("data.columns.1.name", "pixel_0", "CONTRACT_COLUMN_TWICE"),
    ("data.columns.0.missing", "fill", "CONTRACT_FILL"),
    ("data.label.rule", "above", "CONTRACT_LABEL_RULE"),
    ("data.label.classes", ["1", "1"], "CONTRACT_CLASSES"),
    ("participants.1.entity_code", "0" * 17 + "1", "CONTRACT_PARTY_TWICE"),
    ("participants.0.entity_code", "short", "CONTRACT"),
    ("participants.0.floor_fen", -1, "CONTRACT"),
    ("participants.1.data_set", "digits-1", "CONTRACT_DATA_SET_TWICE"),
    ("operator.name", "two\nlines", "CONTRACT"),
    ("term.not_after", "2020-01-01T00:00:00Z", "CONTRACT_TERM"),
    ("term.not_after", "soon", "CONTRACT"),
    ("term.not_after", "2099-11-31T00:00:00Z", "CONTRACT_TERM"),
    ("term.not_after", "2099-11-30T24:00:00Z", "CONTRACT_TERM"),
    ("term.not_before", "2026-02-29T00:00:00Z", "CONTRACT_TERM"),
]


BROKEN_IDS = [f"{p}={'(nothing)' if v is DROP else v}"[:60] for p, v, _ in BROKEN]


@pytest.mark.parametrize(("path", "value", "code"), BROKEN, ids=BROKEN_IDS)
def test_a_broken_rule_is_named(values, path, value, code) -> None:
    with pytest.raises(InputError) as err:
        Contract.parse(changed(values, path, value), file="heart.toml")
    assert err.value.code == code
    assert err.value.file == "heart.toml"
    assert err.value.field
    assert err.value.remedy


def test_every_error_says_what_to_do() -> None:
    """Each InputError that the module raises has a remedy that is never an empty text."""
    source = Path(contract_module.__file__).read_text("utf-8")
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "InputError"
    ]
    assert len(calls) > 50
    for call in calls:
        remedies = [keyword.value for keyword in call.keywords if keyword.arg == "remedy"]
        assert remedies, f"line {call.lineno}: {ast.unparse(call.args[0])} has no remedy"
        texts = [node.value for node in ast.walk(remedies[0]) if isinstance(node, ast.Constant)]
        assert "" not in texts, f"line {call.lineno}: a remedy may be empty"


@pytest.mark.parametrize("package", ["contract", "server", "client"])
def test_whatever_is_wrong_with_a_contract_or_template_comes_with_a_remedy(package: str) -> None:
    found = []
    for file in sorted((Path(__file__).parents[2] / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS and node.args:
                code = node.args[0].value if isinstance(node.args[0], ast.Constant) else ""
                named = any(keyword.arg == "remedy" for keyword in node.keywords)
                if str(code).startswith(("CONTRACT_", "TEMPLATE_")):
                    found.append((file.name, code, named))
    assert found
    assert [line for line in found if not line[2]] == []


ERRORS = ("InputError", "RefusedError", "FailedError", "ServiceError")


@pytest.mark.parametrize(
    ("model", "given", "due"),
    [
        ("client-level-at-the-operator", "max_grad_norm", "max_update_norm"),
        ("record-level-at-each-participant", "max_update_norm", "max_grad_norm"),
    ],
)
def test_the_clip_of_the_other_trust_model_is_named_with_the_right_one(values, model, given, due) -> None:
    unit = "participant" if model.startswith("client") else "example"
    privacy = {k: v for k, v in values["privacy"].items() if k != "max_grad_norm"}
    with pytest.raises(InputError) as err:
        Contract.parse(values | {"privacy": privacy | {"trust_model": model, "unit": unit, given: 1}})
    assert (err.value.code, err.value.field) == ("CONTRACT_UNKNOWN_KEY", f"privacy.{given}")
    assert "perhaps" not in err.value.message, "the key itself is no better spelling of it"
    assert f"give {due}" in err.value.remedy


def test_strict_heads_need_a_reachable_minimum(values) -> None:
    bad = changed(changed(values, "participation.strict_heads", True), "participation.minimum", 2)
    with pytest.raises(InputError) as err:
        Contract.parse(bad)
    assert err.value.code == "CONTRACT_STRICT_HEADS"


def test_the_operator_is_no_paid_participant(values) -> None:
    for field in ("key", "entity_code"):
        with pytest.raises(InputError) as err:
            Contract.parse(changed(values, f"participants.0.{field}", values["operator"][field]))
        assert err.value.code == "CONTRACT_PARTY_TWICE"


@pytest.mark.parametrize("text", ["x = " + "[" * 20_000, "x = " + "1" * 5_000], ids=["deep", "long"])
def test_toml_that_python_cannot_hold_is_refused(text: str) -> None:
    with pytest.raises(InputError) as err:
        Contract.from_toml(text, file="contract.toml")
    assert (err.value.code, err.value.file) == ("TOML_SYNTAX", "contract.toml")
    assert "line named" in err.value.remedy


def test_broken_toml_names_the_line() -> None:
    with pytest.raises(InputError) as err:
        Contract.from_toml("title = \n", file="a.toml")
    assert (err.value.code, err.value.file) == ("TOML_SYNTAX", "a.toml:1")
    assert "line 1" in err.value.message


@pytest.mark.parametrize(
    "line", ['values = ["female"，"male"]', "label = “disease”", 'title　= "a"', '"数据" = ["a"，"b"] # 注释，', "a＝1"]
)
def test_a_full_width_sign_is_named(line: str) -> None:
    with pytest.raises(InputError) as err:
        load_toml(f'title = "心脏，甲"\n{line}\nlast = 1\n', file="a.toml")
    assert err.value.code == "TOML_SYNTAX"
    assert "as its half-width (ASCII) sign" in err.value.remedy
    assert re.search(r"^Write . \(U\+(FF0C|201C|3000|FF1D)\)", err.value.remedy)


def test_a_wrong_value_of_toml_names_its_line() -> None:
    text = '# A trust file\n[[party]]\nrole = "operator"\nname = "A"\nentity_code = "x"\nfingerprint = "00"\n'
    with pytest.raises(InputError) as err:
        Trust.from_toml(text, file="trust.toml")
    assert (err.value.file, err.value.field) == ("trust.toml:5", "party.0.entity_code")


def test_a_changed_byte_is_another_contract_or_none(values) -> None:
    data = Contract.parse(values).to_bytes()
    ids = set()
    for place in range(0, len(data), 97):
        flipped = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        try:
            ids.add(Contract.from_bytes(flipped).id)
        except InputError:
            continue
    assert Contract.parse(values).id not in ids


def test_a_template_does_not_give_what_is_derived() -> None:
    assert merge({"a": {"b": 1}}, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
    with pytest.raises(InputError) as err:
        merge({"a": {"b": 1}}, {"a": {"b": 2}}, file="heart.toml")
    assert (err.value.code, err.value.file, err.value.field) == ("TEMPLATE_DERIVED_KEY", "heart.toml", "a.b")
    assert err.value.remedy == "Remove b from the template."


BUYER = {"name": "Buyer", "entity_code": "B" * 18}
HOLDING = {"name": "Holding", "entity_code": "H" * 18, "of": "operator"}


@pytest.mark.parametrize(
    ("changes", "code", "party"),
    [
        ({"buyer": BUYER | {"entity_code": f"{2:018d}"}}, "CONTRACT_AFFILIATE", "Enterprise 2"),
        ({"affiliates": [HOLDING, HOLDING | {"entity_code": f"{3:018d}"}]}, "CONTRACT_AFFILIATE", "Enterprise 3"),
        ({"buyer": BUYER | {"entity_code": "9" * 18}}, "CONTRACT_ENTITY_TWICE", "Buyer"),
        ({"buyer": BUYER, "affiliates": [HOLDING | {"entity_code": "B" * 18}]}, "CONTRACT_ENTITY_TWICE", "Buyer"),
        ({"affiliates": [HOLDING | {"of": "buyer"}]}, "CONTRACT_NO_BUYER", "Holding"),
    ],
)
def test_who_could_steer_the_scores_is_not_paid_by_them(values, changes, code, party) -> None:
    with pytest.raises(InputError) as caught:
        Contract.parse(values | changes)
    assert (caught.value.code, caught.value.party) == (code, party)
    assert caught.value.remedy


def test_an_affiliate_may_take_part_where_contribution_is_not_paid(values) -> None:
    settled = values["settlement"] | {"contribution_weight": 0, "data_weight": 1}
    affiliates = [HOLDING | {"entity_code": f"{3:018d}"}]
    assert Contract.parse(values | {"settlement": settled, "affiliates": affiliates}).affiliates


GROUP = {"name": "Hospital Group", "members": [f"{1:018d}", f"{2:018d}"]}


def test_common_control_is_in_the_record_and_in_the_text(values) -> None:
    from fedpact_contract.text import render

    plain = Contract.parse(values)
    contract = Contract.parse(values | {"common_control": [GROUP]})
    assert contract.id != plain.id
    assert Contract.from_bytes(contract.to_bytes()) == contract
    one, two, three, four = (p.id for p in contract.participants)
    assert set(contract.blocks()) == {tuple(sorted((one, two))), (three,), (four,)}
    assert [contract.counted_once(ids) for ids in ((one, two), (one, three), (one, two, three), ())] == [1, 2, 2, 0]
    assert (contract.controlled_by(one), contract.controlled_by(three)) == ("Hospital Group", "")
    text = render(contract)
    assert "Hospital Group: Enterprise 1, Enterprise 2" in text
    assert text.lower().count("under common control") == 3
    assert "common control" not in render(plain).split("What nothing here stops")[0]


@pytest.mark.parametrize(
    ("groups", "code"),
    [
        ([GROUP | {"members": [f"{1:018d}", "Z" * 18]}], "CONTRACT_COMMON_CONTROL"),
        ([GROUP, {"name": "Other", "members": [f"{2:018d}", f"{3:018d}"]}], "CONTRACT_COMMON_CONTROL"),
        ([GROUP | {"members": [f"{1:018d}", f"{1:018d}"]}], "CONTRACT_COMMON_CONTROL"),
        ([GROUP | {"members": [f"{i:018d}" for i in range(1, 5)]}], "CONTRACT_COMMON_CONTROL"),
        ([GROUP | {"members": [f"{i:018d}" for i in range(1, 4)]}], "CONTRACT_MINIMUM"),
        ([GROUP | {"entity_code": f"{3:018d}"}], "CONTRACT_COMMON_CONTROL"),
        ([GROUP | {"members": [f"{1:018d}"]}], "CONTRACT"),
        ([], "CONTRACT"),
    ],
    ids=[
        "stranger",
        "two groups",
        "twice",
        "everybody",
        "too few left for the minimum",
        "a head outside",
        "alone",
        "none",
    ],
)
def test_groups_are_of_participants_and_leave_enough_parties(values, groups, code) -> None:
    values["participation"]["minimum"] = 3
    with pytest.raises(InputError) as caught:
        Contract.parse(values | {"common_control": groups})
    assert caught.value.code == code
    assert caught.value.field.startswith("participation" if code == "CONTRACT_MINIMUM" else "common_control")
    assert caught.value.remedy or code == "CONTRACT"


@pytest.mark.parametrize("name", ["buyer", "HOLDING", "Operator"])
def test_who_is_controlled_by_a_scorer_is_not_paid_by_scores(values, name) -> None:
    named = values | {"operator": values["operator"] | {"name": "Operator"}, "buyer": BUYER, "affiliates": [HOLDING]}
    controlled = named | {"common_control": [GROUP | {"name": name}]}
    with pytest.raises(InputError) as caught:
        Contract.parse(controlled)
    assert (caught.value.code, caught.value.party.casefold()) == ("CONTRACT_AFFILIATE", name.casefold())
    settled = values["settlement"] | {"contribution_weight": 0, "data_weight": 1}
    assert Contract.parse(controlled | {"settlement": settled}).common_control
    code = {"buyer": BUYER, "HOLDING": HOLDING, "Operator": values["operator"]}[name]["entity_code"]
    with pytest.raises(InputError) as caught:
        Contract.parse(named | {"common_control": [GROUP | {"name": "Another name", "entity_code": code}]})
    assert (caught.value.code, caught.value.party.casefold()) == ("CONTRACT_AFFILIATE", name.casefold())


def test_a_participant_that_controls_others_is_of_their_group(values) -> None:
    from fedpact_contract.text import render

    contract = Contract.parse(values | {"common_control": [GROUP | {"entity_code": f"{1:018d}"}]})
    assert f"Hospital Group ({1:018d}): Enterprise 1, Enterprise 2" in render(contract)


def test_nobody_is_scored_on_rows_of_its_own_group(values) -> None:
    giver = Contract.parse(values).participants[0].id
    given = changed(values, "contribution.validation.slices", [{"source": "operator", "count": 200}])
    given["contribution"]["validation"]["slices"].append({"source": giver, "count": 20})
    assert Contract.parse(given)
    with pytest.raises(InputError) as caught:
        Contract.parse(given | {"common_control": [GROUP]})
    assert (caught.value.code, caught.value.party) == ("CONTRACT_SLICES", "Enterprise 1")


@pytest.mark.parametrize("hidden", [[2**31 - 1], [2**14, 2**12]])
def test_a_model_larger_than_an_agents_pipe_is_refused_at_creation(values, hidden) -> None:
    model = values["model"] | {"kind": "mlp", "hidden": hidden}
    with pytest.raises(InputError, match="parameters") as caught:
        Contract.parse(values | {"model": model})
    assert (caught.value.code, caught.value.field) == ("CONTRACT_MODEL", "model")
    assert Contract.parse(values | {"model": model | {"hidden": [2**14]}})


def test_the_buyers_rows_need_a_buyer(values) -> None:
    with_slice = changed(values, "contribution.validation.slices", [{"source": "buyer", "count": 220}])
    with pytest.raises(InputError) as caught:
        Contract.parse(with_slice)
    assert caught.value.code == "CONTRACT_SLICES"
    contract = Contract.parse(with_slice | {"buyer": BUYER, "affiliates": [HOLDING]})
    from fedpact_contract.text import render

    document = render(contract)
    for words in (
        f"Buyer, entity code {'B' * 18}",
        f"Holding, entity code {'H' * 18}, with the operator",
        "the buyer: 220",
    ):
        assert words in document
