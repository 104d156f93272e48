"""The contract's document: one source of what a lawyer reads, in both languages, and of what enforces it."""

import ast
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel
from tests.support.contract_kit import party, plain_contract

from fedpact_contract.clauses import CHAPTERS, registry
from fedpact_contract.clauses.clause import Clause
from fedpact_contract.contract import Contract
from fedpact_contract.errors import InputError
from fedpact_contract.record import Part
from fedpact_contract.refusals import CONTRACTED, LOCAL
from fedpact_contract.text import render, stated

ROOT = Path(__file__).parents[2]

HOSPITAL = party("Hospital A", "1" * 18, "a" * 64, "heart-a", 1100, floor_fen=1_234_567, gate_order="8", card="7" * 64)
BANK = party("甲银行", "2" * 18, "b" * 64, "heart-b", 900, sector="finance", gate_order="16")
PARTIES = [HOSPITAL, BANK, party("Firm C", "3" * 18, "d" * 64, "heart-c", 1300)]

COLUMNS = [
    {"name": "age", "kind": "number", "low": "0", "high": "120", "missing": "fill", "fill": "47"},
    {"name": "smokes", "kind": "category", "values": ["never", "often"], "missing": "fill", "fill": "never"},
]
OPTIMIZER = {"kind": "adam", "beta_1": "0.9", "beta_2": "0.99", "tau": "0.001"}
FULL = {
    "data__columns": COLUMNS,
    "data__label": {"name": "again", "classes": ["no", "yes"], "rule": "above", "threshold": "2.5", "missing": "drop"},
    "model__kind": "mlp",
    "model__hidden": [16, 9],
    "training__server_optimizer": OPTIMIZER,
    "privacy__entity": {"column": "who", "max_rows": 4, "method": "group-formula", "epsilon": "9", "delta": "0.00002"},
    "contribution__estimator": "sampled",
    "contribution__max_coalitions": 64,
    "contribution__validation__slices": [
        {"source": "operator", "count": 220},
        {"source": "buyer", "count": 210},
    ],
    "statistics": {
        "noise_multiplier": "12.5",
        "queries": [
            {"kind": "mean", "column": "age"},
            {"kind": "histogram", "column": "age", "bins": 13},
            {"kind": "count", "column": "smokes", "value": "often"},
            {"kind": "count", "column": "age", "at_least": "65"},
            {"kind": "quantile", "column": "age", "bins": 24, "probabilities": ["0.25", "0.75"]},
        ],
    },
    "baseline": {"steps": 17},
    "auditor": {"name": "Audit House", "entity_code": "A" * 18, "key": "e" * 64, "encryption_key": "f" * 64},
    "defences": {
        "clip": "median-signal",
        "wreckers": "reject",
        "negatives": "0.1",
        "dispute_hours": 73,
        "max_duplicates": "0.05",
    },
    "buyer": {"name": "Buyer", "entity_code": "B" * 18},
    "affiliates": [{"name": "Holding", "entity_code": "H" * 18, "of": "operator"}],
}
CENTRAL = {
    "privacy": {
        "trust_model": "client-level-at-the-operator",
        "unit": "participant",
        "relation": "zero-out",
        "sampling": "poisson",
        "epsilon": "6",
        "delta": "0.00003",
        "max_update_norm": "1.5",
        "sample_rate": "0.1",
        "noise_multiplier": "1.25",
        "spare_attempts": 2,
        "accountant": "accountant 7",
    },
    "training__aggregation": "uniform-mean",
    "contribution__game": "unanimity",
    "participation__strict_heads": True,
}
RENORMALISED = {
    "training__aggregation": "krum",
    "training__krum": {"tolerated": 1, "kept": 2},
    "contribution__game": "re-normalised",
    "defences": FULL["defences"] | {"clip": "none", "wreckers": "report"},
    "data__label": {"name": "days", "rule": "number", "low": "-3", "high": "9", "missing": "drop"},
    "contribution__loss": "squared-error",
}
SURVIVAL = {
    "data__label": {
        "name": "days",
        "rule": "survival",
        "event": "died",
        "outcomes": ["no", "yes"],
        "cuts": ["30", "60", "180"],
        "missing": "drop",
    },
    "contribution__loss": "discrete-hazard",
    "privacy__epsilon": "25",
    "training__aggregation": "median",
    "common_control": [{"name": "Group", "entity_code": "9" * 18, "members": ["1" * 18, "2" * 18]}],
}
PICTURES = {
    "data__columns": [COLUMNS[0] | {"name": f"p{i}"} for i in range(6)],
    "model__kind": "cnn",
    "model__hidden": [16],
    "model__image": {"height": 71, "width": 83, "channels": 13},
    "model__convolutions": [{"filters": 41, "kernel": 7, "stride": 5}, {"filters": 43, "kernel": 11, "stride": 3}],
}
FORMS = {
    "pictures": PICTURES,
    "plain": {},
    "full": FULL,
    "central": CENTRAL,
    "re-normalised": RENORMALISED,
    "survival": SURVIVAL,
}
"""Contracts in which together every clause stands, and every field has a value."""


def unchecked(values: dict[str, Any]) -> Contract:
    """A contract of plain values whatever rules between fields it breaks: the document is printed of any."""
    return super(Contract, Contract).parse(values, code="CONTRACT")


def contract_of(form: str) -> Contract:
    return unchecked(plain_contract([dict(p) for p in PARTIES], "c" * 64, **FORMS[form]))


Path_ = tuple[str | int, ...]


def leaves(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every value of a record that is neither a part nor a tuple, with its path."""
    if isinstance(value, Part):
        for name in type(value).model_fields:
            yield from leaves(getattr(value, name), (*path, name))
    elif isinstance(value, tuple):
        for place, item in enumerate(value):
            yield from leaves(item, (*path, place))
    elif value is not None:
        yield path, value


def with_value(value: Any, path: Path_, new: Any) -> Any:
    """A copy of a record with another value at this path, unchecked."""
    if not path:
        return new
    head, *rest = path
    if isinstance(value, tuple):
        return tuple(with_value(v, tuple(rest), new) if place == head else v for place, v in enumerate(value))
    return value.model_copy(update={head: with_value(getattr(value, head), tuple(rest), new)})


def holder(contract: Contract, path: Path_) -> tuple[type[BaseModel], str]:
    """The part that has the field of this path, and the field."""
    value: Any = contract
    found: tuple[type[BaseModel], str] | None = None
    for step in path:
        if isinstance(step, str):
            found = type(value), step
            value = getattr(value, step)
        else:
            value = value[step]
    assert found is not None
    return found


def others(contract: Contract, path: Path_, value: Any) -> list[Any]:
    """Other values of the kind that the field has: each of a fixed choice, else one."""
    kind, name = holder(contract, path)
    choices = [c for c in literals(kind.model_fields[name].annotation) if c != value]
    if choices:
        return choices
    if name == "source":
        return ["buyer" if value == "operator" else "operator"]
    if name == "members":
        return ["3" * 18]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | Decimal):
        return [value + 7]
    if re.fullmatch("[0-9a-f]{64}", value):
        return [value[:-1] + ("0" if value[-1] != "0" else "1")]
    return [f"{value}x"]


def literals(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return [c for part in get_args(annotation) for c in literals(part)]
    return []


def clauses_of(contract: Contract) -> dict[str, tuple[str, str]]:
    return {one.clause.id: (one.text.en, one.text.zh) for _, _, many in stated(contract) for one in many}


@pytest.fixture(params=FORMS)
def contract(request) -> Contract:
    return contract_of(request.param)


class TestFields:
    def test_whatever_is_changed_is_seen_in_both_languages_where_the_registry_says(self, contract) -> None:
        before, known = clauses_of(contract), registry()
        for path, value in leaves(contract):
            name = ".".join(step for step in path if isinstance(step, str))
            if name == "statistics.queries.kind":  # another kind is another part, with fields of its own
                continue
            for other in others(contract, path, value):
                changed = with_value(contract, path, other)
                if not renders(changed):
                    continue
                if name == "title":
                    for lang in ("en", "zh"):
                        assert render(changed, lang).splitlines()[0] != render(contract, lang).splitlines()[0]
                    continue
                after = clauses_of(changed)
                for place in (0, 1):
                    seen = {i for i in before.keys() | after.keys() if at(before, i, place) != at(after, i, place)}
                    assert seen, f"{name} = {other} is printed nowhere in {('English', 'Chinese')[place]}"
                    undeclared = [i for i in seen if not declares(known[i], name)]
                    assert not undeclared, f"{name} is printed by {undeclared}, which do not declare it"

    def test_the_contracts_here_have_a_value_in_every_field_that_a_contract_can_have(self) -> None:
        have = {holder(c, path) for c in map(contract_of, FORMS) for path, _ in leaves(c)}
        lacking = {(kind, name) for kind in parts(Contract) for name in kind.model_fields} - have
        lacking = {(k, n) for k, n in lacking if not holds_parts(k, n)}
        assert not lacking, lacking

    def test_every_clause_stands_in_one_of_them(self) -> None:
        assert {i for form in FORMS for i in clauses_of(contract_of(form))} == set(registry())

    def test_what_a_clause_declares_is_a_field(self) -> None:
        paths = {
            ".".join(step for step in path if isinstance(step, str))
            for form in FORMS
            for path, _ in leaves(contract_of(form))
        }
        for clause in registry().values():
            for field in clause.states:
                assert any(p == field or p.startswith(f"{field}.") for p in paths), (clause.id, field)


def at(clauses: dict[str, tuple[str, str]], clause: str, place: int) -> str | None:
    return clauses[clause][place] if clause in clauses else None


def declares(clause: Clause, field: str) -> bool:
    return any(field == stated_ or field.startswith(f"{stated_}.") for stated_ in clause.states)


def renders(contract: Contract) -> bool:
    """Whether the document can be printed: a fixed choice may ask for another part beside it (krum for [krum])."""
    try:
        clauses_of(contract)
    except KeyError:
        return False
    return True


def parts(kind: Any) -> set[type[BaseModel]]:
    """Every part that a record can be made of."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {kind}.union(*(parts(f.annotation) for f in kind.model_fields.values()))
    return set().union(*(parts(argument) for argument in get_args(kind)))


def holds_parts(kind: type[BaseModel], name: str) -> bool:
    return bool(parts(kind.model_fields[name].annotation))


MARK = re.compile(r"mark\d+x|[0-9a-f]{64}|[0-9A-Z]{18}")
"""What stands for a name, a digest, a key or an entity's code."""
COMPUTED = ("source", "not_before", "not_after", "entity_code", "members")
"""Texts from which a clause works out others."""


def is_name(contract: Contract, path: Path_, value: Any) -> bool:
    """Whether somebody chose this text freely, and nothing is computed from it."""
    kind, field = holder(contract, path)
    fixed = bool(literals(kind.model_fields[field].annotation)) or field in COMPUTED
    return isinstance(value, str) and not fixed and not re.fullmatch("[0-9a-f]{64}", value)


NUMBER = re.compile(r"(?<![A-Za-z0-9_.])\d+(?:\.\d+)?(?![A-Za-z0-9_])", re.ASCII)


def numbers(text: str) -> set[Decimal]:
    return {Decimal(found) for found in NUMBER.findall(re.sub(r"(?<=\d),(?=\d{3})", "", text))}


class TestLanguages:
    def test_every_number_of_one_stands_in_the_other(self, contract) -> None:
        for name, (english, chinese) in clauses_of(contract).items():
            assert numbers(english) == numbers(chinese), name

    def test_every_name_of_one_stands_in_the_other(self, contract) -> None:
        marked = contract
        for number, (path, value) in enumerate(leaves(contract)):
            if is_name(contract, path, value):
                marked = with_value(marked, path, f"mark{number}x")
        shown = set()
        for name, (english, chinese) in clauses_of(marked).items():
            assert MARK.findall(english) == MARK.findall(chinese), name
            shown.update(MARK.findall(english))
            for quoted in re.findall(r'"([a-z0-9-]+)"', english):
                assert f"“{quoted}”" in chinese or f"（{quoted}）" in chinese, (name, quoted)
        assert len(shown) > 15

    def test_both_are_numbered_alike_and_name_the_same_codes(self, contract) -> None:
        english, chinese = render(contract, "en"), render(contract, "zh")
        for pattern in (r"(?m)^\d+\.\d* ", r"\b[A-Z]+(?:_[A-Z]+)+\b"):
            assert re.findall(pattern, english, re.ASCII) == re.findall(pattern, chinese, re.ASCII)
        assert english.splitlines()[-1] == chinese.splitlines()[-1] == contract.id

    def test_chinese_is_chinese(self, contract) -> None:
        for name, (_, chinese) in clauses_of(contract).items():
            assert re.search(r"[\u4e00-\u9fff]{4}", chinese), name
            assert not re.search(r"(?<![\w-])(the|of|and|is|are)(?![\w-])", chinese, re.ASCII), name

    def test_both_say_that_the_record_is_signed(self) -> None:
        contract = contract_of("plain")
        assert "The record is what is signed, not its rendering in either language" in render(contract, "en")
        assert "各方所签署的是该记录本身，而非其任何一种语言的文字表述" in render(contract, "zh")

    def test_money_and_days_are_as_each_language_writes_them(self) -> None:
        contract = contract_of("full")
        assert "Payment floor: 1234567 fen (CNY 12,345.67)" in render(contract, "en")
        assert "保底金额：¥12,345.67（1234567分）" in render(contract, "zh")
        assert "from 2026-01-01T00:00:00Z to 2099-12-31T00:00:00Z (UTC)" in render(contract, "en")
        assert "自2026年1月1日08:00:00起至2099年12月31日08:00:00止（北京时间，UTC+8）" in render(contract, "zh")

    @pytest.mark.parametrize("last", ["9999-12-31T23:00:00Z", "2026-13-45T99:00:00Z"])
    def test_a_term_that_names_no_day_of_the_calendar_is_shown_as_it_stands(self, last) -> None:
        contract = unchecked(plain_contract([dict(p) for p in PARTIES], "c" * 64, term__not_after=last))
        assert render(contract, "zh").count(last) == 2

    def test_names_that_steer_a_terminal_are_spelt_out(self) -> None:
        contract = with_value(contract_of("full"), ("participants", 0, "name"), "A\x1b[2J")
        for lang in ("en", "zh"):
            assert "\x1b" not in render(contract, lang)


CODE = re.compile(r"[A-Z][A-Z0-9_]{4,}")
ROOMS = {
    "agent": ("client", "contract", "models"),
    "operator": ("server", "models", "contract"),
    "record": ("contract",),
    "verify": ("contract",),
}
CHECKS = ("order", "policy", "answer", "review", "measuring")
"""The agent's modules that hold an order, or a contract to be signed, against the contract and the policy."""


def codes(*files: Path, errors: bool = False) -> set[str]:
    """Codes that are the first argument of a call in these files; `errors`: of one that makes a refusal."""
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            first = node.args[0] if isinstance(node, ast.Call) and node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str) and CODE.fullmatch(first.value):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if not errors or name in ("RefusedError", "_refused", "_own"):
                    found.add(first.value)
    return found


def constants(room: str) -> set[str]:
    """Every code that stands in a room outside the clauses and the words for codes."""
    found = set()
    for file in (ROOT / room).rglob("*.py"):
        if "clauses" not in file.relative_to(ROOT).parts and file.stem != "refusals":
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value):
                    found.add(node.value)
    return found


class TestEnforcement:
    def test_every_code_that_a_clause_names_is_raised_by_whom_it_says(self) -> None:
        rooms = {room: constants(room) for room in ("client", "contract", "models", "server")}
        for clause in registry().values():
            for who, named in clause.codes.items():
                lacking = set(named).difference(*(rooms[room] for room in ROOMS[who]))
                assert not lacking, (clause.id, who, lacking)

    def test_every_refusal_on_the_contracts_grounds_is_named_by_a_clause(self) -> None:
        files = [ROOT / f"client/fedpact_client/{name}.py" for name in CHECKS]
        raised = codes(*files, ROOT / "contract/fedpact_contract/ledger.py", errors=True)
        assert raised > {"POLICY_TERM", "SIGN_LABEL", "BASE_MODEL_MISMATCH", "BUDGET_EXCEEDED"}
        unnamed = raised - by_agents() - LOCAL.keys()
        assert not unnamed, f"no clause names {unnamed}, nor is it in refusals.LOCAL"

    def test_every_rule_that_a_record_is_checked_by_is_named_by_a_clause(self) -> None:
        files = [ROOT / f"contract/fedpact_contract/{name}.py" for name in ("contract", "statistics")]
        named = {code for clause in registry().values() for code in clause.codes.get("record", ())}
        of_reading = {"CONTRACT_ID_FORM", "CONTRACT_NOT_A_PARTY", "TEMPLATE_DERIVED_KEY", "TOML_SYNTAX"}
        assert codes(*files) - of_reading == named

    @pytest.mark.parametrize(
        ("changes", "code"),
        [
            ({"defences": FULL["defences"]}, "CONTRACT_CENTRAL_DEFENCES"),
            ({"training__server_optimizer": OPTIMIZER}, "CONTRACT_SERVER_OPTIMIZER"),
        ],
    )
    def test_what_client_level_leaves_no_place_for_is_no_contract(self, changes, code) -> None:
        parties = [{k: v for k, v in p.items() if k != "gate_order"} for p in PARTIES]
        paid = {"settlement__contribution_weight": "0", "settlement__data_weight": "0.9", "privacy__delta": "0.00001"}
        assert Contract.parse(plain_contract(parties, "c" * 64, **CENTRAL, **paid))
        with pytest.raises(InputError) as caught:
            Contract.parse(plain_contract(parties, "c" * 64, **CENTRAL, **paid, **changes))
        assert caught.value.code == code

    def test_a_clause_is_enforced_or_says_that_it_is_not_or_only_explains(self) -> None:
        explaining = {i for i, c in registry().items() if not c.codes and not c.promise}
        assert explaining == {
            "defences.few",
            "evidence.recompute",
            "limits",
            "parties.buyer",
            "privacy.central.meaning",
            "privacy.central.unit",
            "privacy.record.meaning",
            "purpose.policy",
        }
        document = render(contract_of("plain"))
        assert document.count("[not enforced by software]") == 1 + sum(
            one.clause.promise for _, _, many in stated(contract_of("plain")) for one in many
        )

    def test_ids_are_used_once(self) -> None:
        ids = [clause.id for chapter in CHAPTERS for clause in chapter.clauses]
        assert len(set(ids)) == len(ids)


def by_agents() -> set[str]:
    return {code for clause in registry().values() for code in clause.codes.get("agent", ())}


class TestWordsForCodes:
    def test_every_refusal_that_an_enterprise_can_meet_has_a_chinese_sentence(self) -> None:
        files = list((ROOT / "client/fedpact_client").glob("*.py"))
        met = codes(*files, ROOT / "contract/fedpact_contract/ledger.py", errors=True) | by_agents()
        assert not met - CONTRACTED.keys() - LOCAL.keys()

    def test_the_table_has_no_code_that_nobody_raises(self) -> None:
        known = set.union(*(constants(room) for room in ("client", "contract", "models")))
        unknown = (CONTRACTED.keys() | LOCAL.keys()) - known
        assert not unknown, unknown

    def test_contracted_are_those_that_clauses_name(self) -> None:
        assert CONTRACTED.keys() == by_agents()
        assert not LOCAL.keys() & by_agents()

    def test_sentences_are_chinese_and_end(self) -> None:
        for code, sentence in (CONTRACTED | LOCAL).items():
            assert sentence.endswith("。"), code
            assert re.search(r"[\u4e00-\u9fff]{3}", sentence), code
