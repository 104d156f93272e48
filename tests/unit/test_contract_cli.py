"""The command `fedpact` of the base install, and the shared rim of every command line."""

import html
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import typer
from tests.support.command import runner
from tests.support.evidence_factory import contract_values, make_evidence

from fedpact_contract import __version__, cli, output
from fedpact_contract.contract import Contract, SignedContract
from fedpact_contract.errors import FailedError, InputError, RefusedError
from fedpact_contract.language import VARIABLE, language
from fedpact_contract.log import ContractSigned
from fedpact_contract.record import decimal_text
from fedpact_contract.text import render, stated
from fedpact_contract.trust import Trust, TrustedParty, add_party, write


@pytest.fixture
def fedpact(monkeypatch, capsys):
    """Run a command line in this process; gives (exit code, stdout, stderr)."""

    monkeypatch.setenv("COLUMNS", "200")
    return runner(monkeypatch, capsys)


@pytest.fixture
def base_install(monkeypatch):
    monkeypatch.setattr(cli, "SERVER_MARKS", ("a_package_that_nobody_has",))


@pytest.fixture
def evidence(tmp_path):
    made = make_evidence()
    write(tmp_path / "trust.toml", Trust.of(made.contract))
    return SimpleNamespace(folder=made.write(tmp_path / "evidence"), trust=tmp_path / "trust.toml", made=made)


# trust add


def add(file: Path, **values: str) -> list[object]:
    party = {"role": "participant", "name": "Hospital A", "entity_code": "91310000MA1K000001", "fingerprint": "ab" * 32}
    options = [[f"--{key.replace('_', '-')}", value] for key, value in (party | values).items()]
    return ["trust", "add", file, *(word for option in options for word in option)]


def test_an_auditor_makes_its_trust_file_and_verifies_with_it(fedpact, evidence, tmp_path) -> None:
    file = tmp_path / "mine.toml"
    contract = evidence.made.contract
    parties = contract.parties().items()
    for number, (party_id, party) in enumerate(parties):
        assert fedpact("verify", evidence.folder, *(["--trust", file] if number else []))[0] == (4 if number else 3)
        role = "operator" if party_id == contract.operator.id else "participant"
        spaced = " ".join(party_id[i : i + 4] for i in range(0, 64, 4)).upper()
        more = {"role": role, "name": party.name, "entity_code": party.entity_code, "fingerprint": spaced}
        code, out, err = fedpact(*add(file, **more))
        assert (code, err) == (0, "")
        assert party.name in out
    assert fedpact("verify", evidence.folder, "--trust", file)[0] == 0
    assert Trust.read(file) == Trust.read(evidence.trust)


def test_what_people_wrote_in_a_trust_file_stays(fedpact, tmp_path) -> None:
    file = tmp_path / "trust.toml"
    written = Trust.from_toml('[[party]]\nrole="auditor"\nname="X"\nentity_code="91310000MA1K000009"\n'
                              f'fingerprint="{"cd" * 32}"').to_toml()  # fmt: skip
    file.write_text("# by telephone, 3 May\n" + written)
    assert fedpact(*add(file))[0] == 0
    text = file.read_text()
    assert text.startswith("# by telephone, 3 May\n" + written)
    code, out, _ = fedpact(*add(file), "--json")
    assert code == 0
    assert json.loads(out)["fingerprint"] == "ab" * 32
    assert file.read_text() == text, "the same again changes nothing"


def test_parties_entered_at_once_are_all_there(tmp_path) -> None:
    file = tmp_path / "trust.toml"
    parties = [
        TrustedParty(
            role="participant", name=f"P{n}", entity_code=f"91310000MA1K0000{n:02}", fingerprint=f"{n:02}" * 32
        )
        for n in range(20)
    ]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda party: add_party(file, party), parties))
    assert {p.name for p in Trust.read(file).party} == {p.name for p in parties}


@pytest.mark.parametrize(
    ("values", "code", "field"),
    [
        ({"fingerprint": "cd" * 32}, "TRUST_PARTY_TWICE", "party.1"),
        ({"entity_code": "91310000MA1K000002"}, "TRUST_PARTY_TWICE", "party.1"),
        ({"fingerprint": "ab"}, "TRUST_PARTY", "fingerprint"),
        ({"name": ""}, "TRUST_PARTY", "name"),
        ({"entity_code": "x"}, "TRUST_PARTY", "entity_code"),
    ],
)
def test_what_contradicts_a_trust_file_is_refused_and_loses_nothing(fedpact, tmp_path, values, code, field) -> None:
    file = tmp_path / "trust.toml"
    fedpact(*add(file))
    before = file.read_bytes()
    exit_code, out, _ = fedpact(*add(file, **values), "--json")
    error = json.loads(out)["error"]
    assert (exit_code, error["field"]) == (2, field)
    assert error["code"].startswith(code)
    assert file.read_bytes() == before


def test_a_trust_file_that_cannot_be_one(fedpact, tmp_path) -> None:
    assert "TRUST_FOLDER" in fedpact(*add(tmp_path / "nowhere" / "trust.toml"))[2]
    (tmp_path / "latin").write_bytes(b"\xff")
    assert "TRUST_ENCODING" in fedpact(*add(tmp_path / "latin"))[2]
    assert "TRUST_MISSING" in fedpact(*add(tmp_path))[2]
    assert fedpact(*add(tmp_path / "new", role="friend"))[0] == 2


# verify


def test_verify_ends_with_the_verdict(fedpact, evidence) -> None:
    code, out, err = fedpact("verify", evidence.folder, "--trust", evidence.trust)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("VERIFIED")
    assert evidence.made.contract.id in out
    assert "the operator's statement" in out
    assert "validation sampling only" in out
    rows = [line for line in out.splitlines() if "Hospital" in line]
    assert len(rows) == 3
    assert all("signed" in row and "known" in row and "unknown" not in row for row in rows)


def test_verify_without_trust_is_3_and_partly_is_4(fedpact, evidence) -> None:
    code, out, _ = fedpact("verify", evidence.folder)
    assert code == 3
    assert out.splitlines()[-1].startswith("INTERNALLY CONSISTENT, NOT AUTHENTICATED")
    held = make_evidence(unsigned=[0]).write(evidence.folder.parent / "held")
    code, out, _ = fedpact("verify", held, "--trust", evidence.trust)
    assert code == 4
    assert "held" in out


def test_verify_names_entry_field_and_party(fedpact, evidence) -> None:
    path = evidence.folder / "log.jsonl"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    code, out, _ = fedpact("verify", evidence.folder, "--trust", evidence.trust)
    assert code == 1
    assert "LOG_CHANGED: Entry " in out
    assert "field entries." in out
    assert out.splitlines()[-1].startswith("FAULT")


def test_verify_as_json(fedpact, evidence) -> None:
    code, out, _ = fedpact("verify", evidence.folder, "--trust", evidence.trust, "--json")
    report = json.loads(out)
    assert out.count("\n") == 1
    assert code == report["exit_code"] == 0
    assert [p["name"] for p in report["participants"]] == ["Hospital 1", "Hospital 2", "Hospital 3"]
    assert sum(p["fen"] for p in report["participants"]) == report["pool_fen"]
    (evidence.folder / "more.txt").write_text("x")
    code, out, _ = fedpact("verify", evidence.folder, "--json")
    assert code == 1
    assert json.loads(out)["faults"][0]["code"] == "EVIDENCE_FILE_EXTRA"


def test_verify_shows_only_so_many_faults(fedpact, evidence, monkeypatch) -> None:
    monkeypatch.setattr(cli, "_SHOWN", 2)
    path = evidence.folder / "leaves.txt"
    path.write_bytes(path.read_bytes().upper().replace(b"A", b"B"))
    _, out, _ = fedpact("verify", evidence.folder)
    assert "more faults" in out
    assert sum("(file leaves.txt" in line for line in out.splitlines()) == 2


@pytest.mark.parametrize(("what", "code"), [("folder", "EVIDENCE_MISSING"), ("trust", "TRUST_MISSING")])
def test_verify_of_what_is_not_there(fedpact, evidence, what, code) -> None:
    missing = evidence.folder.parent / "nothing"
    folder, trust = (missing, evidence.trust) if what == "folder" else (evidence.folder, missing)
    exit_code, out, err = fedpact("verify", folder, "--trust", trust)
    assert (exit_code, out) == (2, "")
    assert code in err
    assert str(missing) in err.replace("\n", "")
    exit_code, out, err = fedpact("verify", folder, "--trust", trust, "--json")
    assert (exit_code, err) == (2, "")
    assert json.loads(out)["error"]["code"] == code


def test_names_from_evidence_are_shown_as_they_are(fedpact, tmp_path) -> None:
    """What could steer a terminal is no name (test_record.py); square brackets are."""
    named = "Hospital [bold]x[/bold] [link=http://x]甲[/link]"
    made = make_evidence(title=named)
    code, out, _ = fedpact("verify", made.write(tmp_path / "e"))
    assert code == 3
    assert named in out.replace("\n", " ")
    _, out, _ = fedpact("verify", tmp_path / "e", "--json")
    assert json.loads(out)["title"] == named


# contribution recompute


def test_recompute_a_table(fedpact, tmp_path) -> None:
    table = tmp_path / "glove.json"
    values = {"": 0, "l": 0, "r": 0, "s": 0, "l,r": 1, "l,s": 1, "r,s": 0, "l,r,s": 1}
    table.write_text(json.dumps({"players": ["l", "r", "s"], "values": values}))
    code, out, _ = fedpact("contribution", "recompute", table)
    assert code == 0
    assert "2/3" in out
    assert "3/4" in out
    code, out, _ = fedpact("contribution", "recompute", table, "--json")
    assert json.loads(out)["shapley"] == {"l": "2/3", "r": "1/6", "s": "1/6"}


def test_recompute_prints_fractions_and_decimals_on_80_columns_and_json_has_the_fractions(
    fedpact, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    table = tmp_path / "t.json"
    values = {"": 0, "a": "0.5", "b": 0, "c": 0, "a,b": 1, "a,c": 1, "b,c": 0, "a,b,c": 8}
    table.write_text(json.dumps({"players": ["a", "b", "c"], "values": values}))
    code, out, _ = fedpact("contribution", "recompute", table)
    assert code == 0
    heading, _, *rows = [line.split() for line in out.splitlines()]
    assert heading == ["player", "Shapley,", "exact", "Banzhaf,", "exact", "Shapley,", "decimal", "Banzhaf,", "decimal"]
    assert rows == [
        ["a", "19/6", "21/8", "3.166666667", "2.625"],
        ["b", "29/12", "15/8", "2.416666667", "1.875"],
        ["c", "29/12", "15/8", "2.416666667", "1.875"],
    ]
    _, out, _ = fedpact("contribution", "recompute", table, "--json")
    assert json.loads(out) == {
        "shapley": {"a": "19/6", "b": "29/12", "c": "29/12"},
        "banzhaf": {"a": "21/8", "b": "15/8", "c": "15/8"},
    }


def test_recompute_of_long_values_is_read_value_by_value_on_80_columns(fedpact, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    table, nines = tmp_path / "t.json", 10**99 - 1
    table.write_text(json.dumps({"players": ["a", "b"], "values": {"": 0, "a": 0, "b": "0.000000001", "a,b": nines}}))
    code, out, _ = fedpact("contribution", "recompute", table)
    assert code == 0
    joined = out.replace("\n", "").replace(" ", "")
    assert f"Shapley,exact{nines * 10**9 - 1}/2000000000" in joined
    assert f"Shapley,decimal{nines // 2}.5" in joined  # 0.4999999995, half to even


@pytest.mark.parametrize("text", [None, "", "{}", '{"players": ["a"], "values": {"": 0.5, "a": 1}}'])
def test_a_bad_table_is_refused(fedpact, tmp_path, text) -> None:
    table = tmp_path / "t.json"
    if text is not None:
        table.write_text(text)
    code, out, _ = fedpact("contribution", "recompute", table, "--json")
    error = json.loads(out)["error"]
    assert code == 2
    assert error["file"] == str(table)
    assert error["code"].startswith("FILE_ACCESS" if text is None else "GAME_TABLE")


# contract read


def _toml(values: dict[str, Any], prefix: str = "") -> str:
    """Plain values as TOML, enough for a contract."""
    plain = {k: v for k, v in values.items() if not isinstance(v, dict)}
    lines = [f"{k} = {_value(v)}" for k, v in plain.items()]
    for name, value in values.items():
        if isinstance(value, dict):
            lines += [f"[{prefix}{name}]", _toml(value, f"{prefix}{name}.")]
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return decimal_text(value) if isinstance(value, Decimal) else json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize("form", ["toml", "json", "json-newline", "envelope", "signed"])
def test_a_contract_is_read_in_every_form(fedpact, tmp_path, form) -> None:
    values = contract_values()
    contract = Contract.parse(values)
    body = make_evidence(end="opened", rounds=1, training__rounds=2).entries[0].open()
    assert isinstance(body, ContractSigned)
    signed: SignedContract = body.signed
    from fedpact_contract.canonical import canonical_bytes

    data = {
        "toml": _toml(values).encode(),
        "json": contract.to_bytes(),
        "json-newline": contract.to_bytes() + b"\n",
        "envelope": signed.contract.to_bytes(),
        "signed": canonical_bytes(signed.plain()),
    }[form]
    path = tmp_path / "contract"
    path.write_bytes(data)
    code, out, _ = fedpact("contract", "read", path)
    assert code == 0
    assert f"contract {contract.id}" in out
    for party in contract.parties().values():
        assert party.entity_code in out
        assert party.id[:4] in out
    assert "privacy.noise_multiplier = 1.25" in out
    assert out.count("signed       yes") == (4 if form in ("envelope", "signed") else 0)
    code, out, _ = fedpact("contract", "read", path, "--json")
    plain = json.loads(out)
    assert plain["contract_id"] == contract.id
    assert plain["contract"] == contract.plain()


@pytest.mark.parametrize(("lang", "first"), [("en", "FEDERATED LEARNING CONTRACT: "), ("zh", "联邦学习技术契约")])
def test_a_contracts_document_is_read_and_written_in_either_language(
    fedpact, tmp_path, monkeypatch, lang, first
) -> None:
    contract = Contract.parse(contract_values(title="<b>Title</b>"))
    path, text, page = (tmp_path / name for name in ("contract", "contract.txt", "contract.html"))
    path.write_bytes(contract.to_bytes())
    code, out, _ = fedpact("contract", "read", path, "--lang", lang)
    assert code == 0
    assert render(contract, lang) in out
    assert f"\n{first}" in out
    assert "privacy.noise_multiplier" not in out
    code, out, err = fedpact("contract", "read", path, "--lang", lang, "--out", text)
    assert (code, out, err.strip()) == (0, "", str(text))
    assert text.read_text("utf-8") == render(contract, lang)
    monkeypatch.setenv(VARIABLE, lang)
    assert fedpact("contract", "read", path, "--out", page)[0] == 0
    shown = page.read_text("utf-8")
    assert shown.startswith("<!doctype html>\n<html lang=")
    assert "<b>" not in shown
    paragraphs = [html.unescape(found) for found in re.findall(r"(?s)<p [^>]*>(.*?)</p>", shown)]
    for _, title, clauses in stated(contract):
        assert title.of(lang) in shown
        for one in clauses:
            assert f"{one.number} {one.text.of(lang)}" in paragraphs
    code, out, _ = fedpact("contract", "read", path, "--out", page, "--json")
    assert (code, json.loads(out)["error"]["code"]) == (2, "FILE_EXISTS")


@pytest.mark.parametrize(
    ("asked", "arguments", "environment", "found"),
    [
        (None, (), {}, "en"),
        (None, (), {"LANG": "zh_CN.UTF-8"}, "zh"),
        (None, (), {"LC_ALL": "C.UTF-8", "LANG": "zh_CN.UTF-8"}, "en"),
        (None, (), {"LANG": "zh_CN.UTF-8", "FEDPACT_LANG": "en"}, "en"),
        (None, (), {"FEDPACT_LANG": "fr", "LANG": "zh_CN.UTF-8"}, "zh"),
        (None, ("sign", "--lang", "zh"), {"FEDPACT_LANG": "en"}, "zh"),
        (None, ("sign", "--lang=en"), {"FEDPACT_LANG": "zh"}, "en"),
        (None, ("sign", "--lang"), {}, "en"),
        ("en", ("--lang=zh",), {"FEDPACT_LANG": "zh"}, "en"),
    ],
)
def test_people_are_addressed_in_the_language_that_they_asked_for(asked, arguments, environment, found) -> None:
    assert language(asked, arguments, environment) == found


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (None, "CONTRACT_FILE_MISSING"),
        (b"\xff\xfe", "CONTRACT_ENCODING"),
        (b"title =", "TOML_SYNTAX"),
        (b"title = 'x'", "CONTRACT_MISSING_KEY"),
        (b"{}", "CONTRACT_FILE_FORM"),
        (b'{"a": 1}', "CONTRACT_FILE_FORM"),
        (b"[1]", "CONTRACT_FILE_FORM"),
        (b"12", "CONTRACT_FILE_FORM"),
        (b'{"a":', "CANONICAL_PARSE"),
        (b'{"participants":[]}', "CONTRACT_FORM_MISSING_KEY"),
        (b'{"participants": []}', "CANONICAL_FORM"),
        (b'{"contract":{},"delegations":[]}', "CONTRACT_SIGNED_FORM_MISSING_KEY"),
        (b'{"payload":"","signatures":[],"type":"x"}', "ENVELOPE_TYPE"),
    ],
)
def test_what_is_no_contract_is_refused(fedpact, tmp_path, data, code) -> None:
    path = tmp_path / "contract"
    if data is not None:
        path.write_bytes(data)
    exit_code, out, _ = fedpact("contract", "read", path, "--json")
    error = json.loads(out)["error"]
    assert exit_code in (1, 2)
    assert (error["code"], error["file"]) == (code, str(path))
    if code == "CONTRACT_FILE_FORM":
        assert error["field"]
        assert error["rule"]
        assert "contract new --out FILE" in error["remedy"]


def test_the_contract_is_read_out_of_its_evidence(fedpact, evidence) -> None:
    code, out, _ = fedpact("contract", "read", evidence.folder, "--json")
    found = json.loads(out)
    assert (code, found["contract_id"]) == (0, evidence.made.contract.id)


def test_a_log_that_does_not_begin_with_a_contract_is_named(fedpact, tmp_path, evidence) -> None:
    second = evidence.made.entries[1].to_bytes()
    (tmp_path / "log.jsonl").write_bytes(second + b"\n")
    code, out, _ = fedpact("contract", "read", tmp_path, "--json")
    error = json.loads(out)["error"]
    assert (code, error["code"], error["field"]) == (2, "CONTRACT_FILE_FORM", "entry 0")


@pytest.mark.parametrize("log", [None, b"", b"{}\n"])
def test_a_folder_without_a_contract_is_refused(fedpact, tmp_path, log) -> None:
    if log is not None:
        (tmp_path / "log.jsonl").write_bytes(log)
    code, out, _ = fedpact("contract", "read", tmp_path, "--json")
    error = json.loads(out)["error"]
    assert code in (1, 2)
    assert error["file"] == str(tmp_path)


def test_a_template_is_named_as_what_it_is(fedpact, tmp_path) -> None:
    path = tmp_path / "template.toml"
    path.write_text("title = 'x'")
    assert "`fedpact contract new` makes a contract of it" in fedpact("contract", "read", path)[2]


# Help, versions, server commands


def test_the_version(fedpact) -> None:
    assert fedpact("--version") == (0, f"fedpact {__version__}\n", "")


def _every_server_command() -> list[tuple[str, ...]]:
    return [(group, name) if group else (name,) for group, names in cli.SERVER_COMMANDS.items() for name in names]


@pytest.mark.parametrize("command", _every_server_command(), ids=" ".join)
def test_a_base_install_names_the_missing_extra(fedpact, base_install, command) -> None:
    code, out, err = fedpact(*command)
    assert (code, out) == (2, "")
    assert "EXTRA_MISSING" in err
    assert f"fedpact {' '.join(command)}" in err
    extra = "demo" if command == ("demo",) else "server"
    assert f"pip install 'fedpact[{extra}]'" in err
    code, out, _ = fedpact(*command, "--some", "thing", "--json")
    assert json.loads(out)["error"]["code"] == "EXTRA_MISSING"


def test_a_base_install_knows_every_command_of_the_server() -> None:
    app = cli.make_app()
    cli.load_commands(app)
    base, whole = (typer.main.get_command(a) for a in (cli.make_app(), app))
    assert isinstance(base, click.Group)
    assert isinstance(whole, click.Group)
    for name in whole.commands.keys() - base.commands.keys():
        assert name in cli.SERVER_COMMANDS[""]
    for name, group in base.commands.items():
        if isinstance(group, click.Group):
            assert whole.commands[name].commands.keys() - group.commands.keys() <= set(
                cli.SERVER_COMMANDS.get(name, ())
            )


def test_the_base_commands_need_no_extra(fedpact, base_install, evidence) -> None:
    code, out, _ = fedpact("--help")
    assert code == 0
    assert "verify" in out
    assert fedpact("verify", evidence.folder)[0] == 3


@pytest.mark.parametrize("command", [("nonsense",), ("contract", "nonsense"), ("verify",), ("verify", "a", "--nope")])
def test_wrong_usage_is_told_how_to_ask(fedpact, base_install, command) -> None:
    code, out, err = fedpact(*command)
    assert (code, out) == (2, "")
    assert "USAGE" in err
    assert "--help" in err
    code, out, _ = fedpact(*command, "--json")
    assert (code, json.loads(out)["error"]["code"]) == (2, "USAGE")


def test_a_group_alone_shows_its_help(fedpact, base_install) -> None:
    code, out, err = fedpact("contract")
    assert (code, out) == (2, "")
    assert "read" in err


def _register(app: typer.Typer) -> None:
    @app.command("init")
    def init() -> None:
        """Make an operator's home."""
        typer.echo("made")

    @cli.group(app, "contract").command("new")
    def new() -> None:
        """Draft a contract."""
        typer.echo("drafted")

    @cli.group(app, "run", "The run of a contract.").command("start")
    def start() -> None:
        """Start it."""
        raise RefusedError("RUN_REFUSED", "Not now.", party="A", remedy="Wait.")

    @app.command("predict")
    def predict() -> None:
        """Needs a package."""
        import a_package_that_nobody_has  # noqa: F401

    @app.command("report")
    def report() -> None:
        """Fails in a way that nobody foresaw."""
        raise ZeroDivisionError("secret detail")


@pytest.fixture
def server_install(monkeypatch):
    point = SimpleNamespace(name="server", module="json.decoder", load=lambda: _register)
    gone = SimpleNamespace(name="gone", module="a_package_that_nobody_has.cli", load=lambda: pytest.fail("loaded"))
    monkeypatch.setattr(cli, "SERVER_MARKS", ("json",))
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [gone, point])


def test_server_commands_stand_beside_those_of_the_base(fedpact, server_install) -> None:
    assert fedpact("init")[:2] == (0, "made\n")
    assert fedpact("contract", "new")[:2] == (0, "drafted\n")
    _, out, _ = fedpact("--help")
    for name in ("init", "run", "verify", "contract", "contribution"):
        assert name in out
    _, out, _ = fedpact("contract", "--help")
    assert "new" in out
    assert "read" in out


def test_verify_loads_no_server_command(fedpact, server_install, monkeypatch, evidence) -> None:
    monkeypatch.setattr(cli, "load_commands", lambda _app: pytest.fail("loaded"))
    assert fedpact("verify", evidence.folder)[0] == 3
    assert fedpact("--version")[0] == 0


def test_errors_of_commands_reach_the_rim(fedpact, server_install) -> None:
    code, out, err = fedpact("run", "start")
    assert (code, out) == (5, "")
    assert "RUN_REFUSED: Not now." in err
    assert "party: A" in err
    assert "Wait." in err
    code, out, _ = fedpact("predict", "--json")
    assert code == 2


def test_a_package_that_is_missing_on_use_names_the_extra(fedpact, server_install) -> None:
    code, _, err = fedpact("predict")
    assert code == 2
    assert "a_package_that_nobody_has" in err
    assert "pip install 'fedpact[server]'" in err


# The rim


def run_with(main: Any, monkeypatch: Any, capsys: Any, *arguments: str, extra: str = "server") -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    with pytest.raises(SystemExit) as left:
        output.run(main, extra=extra)
    captured = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, captured.out, captured.err


def raising(err: BaseException) -> Any:
    def main() -> None:
        raise err

    return main


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (4, 4), ("text", 0), (True, 0)])
def test_what_a_program_returns_is_its_exit_code(monkeypatch, capsys, result, code) -> None:
    assert run_with(lambda: result, monkeypatch, capsys)[0] == code


def test_interrupted(monkeypatch, capsys) -> None:
    assert run_with(raising(KeyboardInterrupt()), monkeypatch, capsys) == (130, "", "Interrupted.\n")


def test_a_typer_app_may_be_given(monkeypatch, capsys) -> None:
    app = typer.Typer()

    @app.command()
    def only(number: int) -> None:
        raise typer.Exit(number)

    assert run_with(app, monkeypatch, capsys, "3")[0] == 3
    code, out, _ = run_with(app, monkeypatch, capsys, "x", "--json")
    assert (code, json.loads(out)["error"]["code"]) == (2, "USAGE")


def test_an_abort_is_an_interruption(monkeypatch, capsys) -> None:
    assert run_with(raising(typer.Abort()), monkeypatch, capsys)[0] == 130
    wrapped = ImportError("half of a module")
    wrapped.__cause__ = KeyboardInterrupt()
    assert run_with(raising(wrapped), monkeypatch, capsys)[0] == 130, "Ctrl-C within an import"


@pytest.mark.parametrize(
    ("err", "advice"),
    [
        (FileNotFoundError(2, "No such file", "/a/b"), "a folder that exists"),
        (IsADirectoryError(21, "Is a directory", "/a"), "this is a folder"),
        (NotADirectoryError(20, "Not a directory", "/a/b"), "a part of it is a file"),
        (PermissionError(13, "Permission denied", "/a/b"), "who may read it"),
        (OSError(30, "Read-only file system", "/a/b"), "Check the path"),
    ],
)
def test_a_file_that_cannot_be_used_comes_with_advice(monkeypatch, capsys, err, advice) -> None:
    error = json.loads(run_with(raising(err), monkeypatch, capsys, "--json")[1])["error"]
    assert (error["code"], error["file"]) == ("FILE_ACCESS", err.filename)
    assert advice in error["remedy"]


@pytest.mark.parametrize(
    ("err", "code", "exit_code"),
    [
        (FileNotFoundError(2, "No such file", "/a/b"), "FILE_ACCESS", 2),
        (PermissionError(13, "Permission denied", b"/a/b"), "FILE_ACCESS", 2),
        (OSError(28, "No space left on device"), "SYSTEM", 1),
        (InputError("X", "Bad."), "X", 2),
        (FailedError("Y", "Failed."), "Y", 1),
    ],
)
def test_errors_and_their_exit_codes(monkeypatch, capsys, err, code, exit_code) -> None:
    got, out, _ = run_with(raising(err), monkeypatch, capsys, "--json")
    assert (got, json.loads(out)["error"]["code"]) == (exit_code, code)
    got, out, err_text = run_with(raising(err), monkeypatch, capsys)
    assert (got, out) == (exit_code, "")
    assert err_text.startswith(f"{code}: ")
    assert "Traceback" not in err_text


def test_an_unexpected_error_is_one_line_and_a_file(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, out, err = run_with(raising(ZeroDivisionError("secret detail")), monkeypatch, capsys)
    (path,) = tmp_path.iterdir()
    assert (code, out) == (1, "")
    assert err.startswith("INTERNAL: ")
    assert str(path) in err.replace("\n", "")
    assert "Traceback" not in err
    assert "secret detail" not in err
    assert "secret detail" in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    code, out, _ = run_with(raising(ZeroDivisionError()), monkeypatch, capsys, "--json")
    assert (code, json.loads(out)["error"]["code"]) == (1, "INTERNAL")


def test_our_own_missing_module_is_unexpected(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    err = ModuleNotFoundError("No module", name="fedpact_server.gone")
    assert "INTERNAL" in run_with(raising(err), monkeypatch, capsys)[2]
    other = ModuleNotFoundError("No module", name="torch.nn")
    assert "fedpact[agent]" in run_with(raising(other), monkeypatch, capsys, extra="agent")[2]


def test_debugging_shows_the_error(monkeypatch) -> None:
    monkeypatch.setenv("FEDPACT_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(ZeroDivisionError):
        output.run(raising(ZeroDivisionError()))


# As people start it


def _fedpact() -> str:
    return str(Path(sys.executable).parent / "fedpact")


@pytest.mark.parametrize("arguments", [["--help"], ["verify", "--help"], ["contract", "--help"]])
def test_help_answers_within_half_a_second(arguments) -> None:
    # Processor time: other work on the machine must not fail this test.
    took = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run([_fedpact(), *arguments], capture_output=True, text=True, check=True)
        after = os.times()
        took.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert "Usage" in done.stdout
    assert min(took) < 0.5


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = ("torch", "flwr", "opacus", "dp_accounting", "numpy", "pydantic", "cryptography", "polars", "fastapi")
    program = f"import sys, fedpact_contract.cli; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_verifying_imports_neither_numbers_nor_network(evidence) -> None:
    program = (
        "import socket, sys; from pathlib import Path; socket.socket = socket.create_connection = None;"
        "from fedpact_contract.verify import verify_folder;"
        f"r = verify_folder(Path({str(evidence.folder)!r}), None, privacy=False);"
        "print(r.exit_code, [m for m in ('torch', 'flwr', 'numpy', 'dp_accounting', 'fedpact_server',"
        " 'fedpact_client', 'fedpact_models') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3 []"


def test_a_reader_that_leaves_is_no_error(evidence) -> None:
    program = f"{_fedpact()} verify {evidence.folder} --json | true"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False, env={**os.environ})
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
