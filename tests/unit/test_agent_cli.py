"""The command `fedpact-agent`: exit codes, JSON, questions, no tracebacks, and a help that answers at once."""

import ast
import inspect
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import structlog
import typer
from tests.support.agent_world import DATA_SET, ENTITY, PASSPHRASE, ROWS, Lab, lab
from tests.support.agent_world import contract as agents_contract
from tests.support.central import central_toml
from tests.support.operator_world import TEMPLATE as UNTIL_2099
from tests.support.readme import Script, commands, filled

from fedpact_client import cards, cli, guard, review, review_text, trial, views
from fedpact_client import plan as plans
from fedpact_client.cli import app, main
from fedpact_client.store import EgressKind
from fedpact_client.store_lock import HomeLock
from fedpact_contract.errors import FaultError
from fedpact_contract.files import replace_file
from fedpact_contract.keys import public_hex
from fedpact_contract.language import VARIABLE
from fedpact_contract.messages import DestructionReceipt
from fedpact_contract.privacy import attempt_rdp, epsilon_plan, rdp
from fedpact_contract.record import open_signed, read_envelope
from fedpact_contract.refusals import chinese
from fedpact_contract.request import utc_now
from fedpact_contract.standalone import verify_record
from fedpact_server import logbook

TEMPLATE = UNTIL_2099.replace('not_after = "2099', f'not_after = "{utc_now().year + 1}')
"""With a term that a fresh agent's policy allows."""
HEAVY = {
    "torch",
    "polars",
    "flwr",
    "httpx",
    "numpy",
    "dp_accounting",
    "cryptography",
    "pydantic",
    "opacus",
    "structlog",
}


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.out)
        return value

    @property
    def error(self) -> str:
        return str(self.json["error"]["code"])


Call = Callable[..., Result]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command line in this process; the terminal is not one that can be asked."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["fedpact-agent", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """A lab whose operator answers real httpx connections; the trainer is doubled."""
    with lab(tmp_path) as made:
        monkeypatch.setattr(httpx.HTTPTransport, "handle_request", lambda _, request: made.wire.handle_request(request))
        monkeypatch.setenv("FEDPACT_AGENT_HOME", str(made.home.path))
        found = trial.Trial(num_rows=60, fingerprints=("ef" * 32,))
        monkeypatch.setattr(trial, "try_rows", lambda *_: found)
        yield made


@pytest.fixture
def passphrase(tmp_path: Path) -> Path:
    path = tmp_path / "passphrase"
    replace_file(path, PASSPHRASE + b"\n")
    return path


def answer(monkeypatch: pytest.MonkeyPatch, *answers: bool) -> list[str]:
    """A person at the terminal; the questions that were asked."""
    left, asked = list(answers), []

    def confirm(question: str, **_: object) -> bool:
        asked.append(question)
        return left.pop(0)

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(typer, "confirm", confirm)
    return asked


# Help


def every_command() -> list[tuple[str, ...]]:
    found = [(c.name or c.callback.__name__,) for c in app.registered_commands if c.callback]
    return found + [("contract", c.name or "") for c in cli.contract_app.registered_commands]


def test_the_commands_are_those_of_the_plan() -> None:
    assert {" ".join(c) for c in every_command()} == {
        *("init", "enrol", "card", "contract list", "contract show", "sign", "start", "status", "head", "budget"),
        *("egress", "statement", "report", "pause", "resume", "withdraw", "backup", "restore"),
        *("preflight", "dry-run", "upgrade", "profile"),
        *("plan", "quote", "questions", "answer", "revoke-key", "countersign"),
    }


@pytest.mark.parametrize("command", every_command(), ids=" ".join)
def test_every_command_explains_itself(call: Call, command: tuple[str, ...]) -> None:
    result = call(*command, "--help")
    assert result.code == 0
    assert "--home" in result.out
    assert "--json" in result.out


def test_help_loads_nothing_heavy_and_answers_at_once() -> None:
    code = (
        "import sys\nsys.argv = ['fedpact-agent', '--help']\nfrom fedpact_client.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"print('HEAVY', sorted({HEAVY!r} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert "HEAVY []" in done.stdout
    assert min(seconds) < 0.5


def test_without_a_command_help_is_shown(call: Call) -> None:
    result = call()
    assert result.code == 2
    assert "Usage" in result.out + result.err


def test_the_version_is_told(call: Call) -> None:
    result = call("--version")
    assert (result.code, result.out.split()[0]) == (0, "fedpact-agent")


@pytest.mark.parametrize("arguments", [("nothing",), ("head", "--nothing"), ("init",), ("egress", "--last", "0")])
def test_wrong_usage_exits_with_2(call: Call, arguments: tuple[str, ...]) -> None:
    result = call(*arguments)
    assert result.code == 2
    assert "Traceback" not in result.err


# init


def test_a_home_is_made(call: Call, tmp_path: Path, passphrase: Path) -> None:
    given = ("--home", tmp_path / "a", "--name", "N", "--entity-code", ENTITY, "--sector", "medical")
    result = call("init", *given, "--passphrase-file", passphrase, "--json")
    assert result.code == 0
    assert result.json["home"] == str(tmp_path / "a")
    assert len(result.json["participant"]) == 64
    again = call("init", *given, "--passphrase-file", passphrase, "--json")
    assert (again.code, again.error) == (2, "HOME_EXISTS")


def test_an_entity_code_of_another_form_is_told_in_words(call: Call, tmp_path: Path, passphrase: Path) -> None:
    given = ("--home", tmp_path / "a", "--name", "N", "--entity-code", "xyz", "--sector", "medical")
    result = call("init", *given, "--passphrase-file", passphrase)
    assert result.code == 2
    assert "entity_code: must be 18 digits and capital letters" in result.err
    assert not (tmp_path / "a").exists()


def test_the_passphrase_is_asked_for_at_a_terminal_alone(call: Call, tmp_path: Path) -> None:
    given = ("--home", tmp_path / "a", "--name", "N", "--entity-code", ENTITY, "--sector", "medical")
    result = call("init", *given, "--json")
    assert (result.code, result.error) == (2, "PASSPHRASE_NEEDED")
    assert not (tmp_path / "a").exists()


def test_a_typed_passphrase_is_asked_for_twice(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def prompt(_: str, **options: object) -> str:
        seen.update(options)
        return "correct horse"

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(typer, "prompt", prompt)
    result = call("init", "--home", tmp_path / "a", "--name", "N", "--entity-code", ENTITY, "--sector", "medical")
    assert result.code == 0
    assert seen == {"hide_input": True, "confirmation_prompt": True, "err": True}
    assert "correct horse" not in result.out + result.err


def test_without_a_home_every_command_says_so(call: Call, tmp_path: Path) -> None:
    for command in (("status",), ("head",), ("budget",), ("egress",), ("start",), ("sign", "abcd")):
        result = call(*command, "--home", tmp_path / "none", "--json")
        assert result.code == 2
        assert "HOME_MISSING" in result.out + result.err


# enrol


def test_the_whole_way_to_a_signed_contract(call: Call, world: Lab, passphrase: Path) -> None:
    secret = ("--passphrase-file", passphrase)
    joined = call("enrol", world.invitation(), *secret, "--json")
    assert (joined.code, joined.json["state"]) == (0, "requested")
    assert joined.json["participant"] == world.home.participant_id
    world.approve()
    world.configure()
    card = call("card", "set-1", "--yes", *secret, "--json")
    assert (card.code, card.json["num_examples"], card.json["sent"]) == (0, 40, True)
    offered = world.offer()
    listed = call("contract", "list", "--json")
    assert [(c["id"], c["state"], c["here"]) for c in listed.json["contracts"]] == [(offered.id, "offered", None)]
    shown = call("contract", "show", offered.id[:8], "--json")
    assert all(check["ok"] for check in shown.json["checks"])
    assert shown.json["terms"] == offered.plain()
    signed = call("sign", offered.id, "--yes", *secret, "--json")
    assert (signed.code, signed.json["signed_now"]) == (0, True)
    world.others_sign(offered)
    whole = call("contract", "show", offered.id)
    assert whole.code == 0
    assert "Every party has signed" in whole.out
    assert offered.id in whole.out
    status = call("status", "--json")
    assert (status.json["enrolment"], status.json["contracts"][0]["state"]) == ("approved", "signed")
    world.store.set_state(offered.id, "running")
    assert " ready " in call("status").out, "it is served here, and no round has begun"
    lock = world.home.path / "guard.lock"
    with HomeLock(world.home.path):
        for seconds, restart in ((60, False), (-60, True)):
            started = world.home.config_path.stat().st_mtime + seconds
            os.utime(lock, (started, started))
            assert call("status", "--json").json["restart"] == restart
            assert ("restart the agent" in call("status").out) == restart
            again = call("sign", offered.id, "--yes", *secret, "--lang", "zh")
            assert ("已在本机签署" in again.out, "请重新启动代理" in again.out) == (True, restart)
    world.store.set_state(offered.id, "closed")
    assert "The contract was signed here before and is closed." in (over := call("contract", "show", offered.id).out)
    assert "REFUSED" not in over


def test_enrolment_shows_both_fingerprints(call: Call, world: Lab, passphrase: Path) -> None:
    result = call("enrol", world.invitation(), "--passphrase-file", passphrase)
    shown = result.out.replace(" ", "").replace("\n", "")
    assert world.home.participant_id in shown
    assert world.world.home.fingerprint in shown
    assert "telephone" in result.out


def test_a_false_operator_exits_with_1(call: Call, world: Lab, passphrase: Path) -> None:
    result = call("enrol", world.invitation(operator="ab" * 32), "--passphrase-file", passphrase)
    assert (result.code, result.out) == (1, "")
    assert "OPERATOR_FINGERPRINT" in result.err


def test_an_operator_that_is_away_exits_with_6(call: Call, world: Lab, passphrase: Path) -> None:
    world.enrol()
    world.wire.cut_before = "GET"
    result = call("contract", "list", "--json")
    assert (result.code, result.error) == (6, "OPERATOR_AWAY")
    status = call("status", "--json")
    assert (status.code, status.json["enrolment"]) == (0, "unknown (OPERATOR_AWAY)")


def test_status_offline_asks_nobody(call: Call, world: Lab) -> None:
    assert call("status", "--json").json["enrolment"] == "not enrolled"
    world.enrol()
    world.wire.sent.clear()
    assert call("status", "--offline", "--json").json["enrolment"] == "not asked"
    assert world.wire.sent == []


# Questions


@pytest.fixture
def ready(world: Lab) -> Lab:
    world.enrol()
    world.approve()
    world.configure()
    return world


def test_nothing_is_sent_unasked(call: Call, ready: Lab, passphrase: Path) -> None:
    ready.wire.sent.clear()
    result = call("card", "set-1", "--passphrase-file", passphrase, "--json")
    assert (result.code, result.error) == (2, "CONFIRMATION_NEEDED")
    assert ready.wire.sent == []
    assert ready.store.data_sets() == []


def test_a_no_sends_nothing(call: Call, ready: Lab, passphrase: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, False)
    ready.wire.sent.clear()
    result = call("card", "set-1", "--passphrase-file", passphrase)
    assert result.code == 5
    assert "DECLINED" in result.err
    assert asked == ["Sign this card and send it?"]
    assert ready.wire.sent == []


def test_released_rows_are_shown_and_asked_for_by_themselves(
    call: Call, ready: Lab, passphrase: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_file(ready.home.path / "keys" / "release.key", b"k" * 32)
    text = ready.home.config_path.read_text()
    changed = text.replace('label = "ill"\n', 'label = "ill"\nrelease_fraction = 0.2\n', 1)
    replace_file(ready.home.config_path, changed.encode())
    asked = answer(monkeypatch, True, False)
    ready.wire.sent.clear()
    result = call("card", "set-1", "--passphrase-file", passphrase)
    assert result.code == 5
    assert len(asked) == 2
    assert "leave your premises" in asked[1]
    assert "leave your premises, as they are" in result.out
    assert ready.wire.sent == []
    assert not ready.home.released_path("set-1").exists()


def test_a_refused_contract_is_shown_and_not_signed(call: Call, ready: Lab, passphrase: Path) -> None:
    ready.declare()
    offered = ready.offer()
    ready.configure(purposes='["other"]', data_set="")
    result = call("sign", offered.id, "--yes", "--passphrase-file", passphrase)
    assert result.code == 5
    assert "POLICY_PURPOSE_MISMATCH" in result.err
    assert "policy: REFUSED" in result.out
    assert ready.store.contracts() == []
    as_json = call("contract", "show", offered.id, "--json")
    assert as_json.code == 0
    assert [c["error"]["code"] for c in as_json.json["checks"] if not c["ok"]] == ["POLICY_PURPOSE_MISMATCH"]


def test_whoever_signs_in_chinese_reads_contract_review_and_refusal_in_chinese(
    call: Call, ready: Lab, passphrase: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready.declare()
    offered = ready.offer()
    asked = answer(monkeypatch, False)
    declined = call("sign", offered.id, "--lang", "zh", "--passphrase-file", passphrase)
    assert (declined.code, asked) == (5, ["签署本合约？"])
    assert declined.err.startswith("DECLINED: 已回答“否”：未做任何事。\n  The answer was no: nothing was done.")
    for words in (
        "联邦学习技术契约（数字合约）：",
        "签署方",
        "仅由运营方担保",
        "本企业数据集的隐私消耗",
        "自有策略：相符",
    ):
        assert words in declined.out
    assert "WHO SIGNS" not in declined.out
    ready.configure(purposes='["other"]', data_set="")
    refused = call("sign", offered.id, "--yes", "--lang=zh", "--passphrase-file", passphrase)
    sentence = chinese("POLICY_PURPOSE_MISMATCH")
    assert f"自有策略：拒绝，POLICY_PURPOSE_MISMATCH：{sentence}" in refused.out
    assert refused.err.startswith(f"POLICY_PURPOSE_MISMATCH: {sentence}\n  The contract's purpose is ")
    monkeypatch.setenv(VARIABLE, "zh")
    assert f"拒绝，POLICY_PURPOSE_MISMATCH：{sentence}" in call("contract", "show", offered.id).out
    ready.store.add_alarm("HEAD_FORK", offered.id, "two heads of one size")
    assert f"HEAD_FORK: two heads of one size\n  {chinese('HEAD_FORK')}" in call("status", "--offline").out
    as_json = call("sign", offered.id, "--yes", "--passphrase-file", passphrase, "--json")
    assert (as_json.code, as_json.json["error"]["code"]) == (5, "POLICY_PURPOSE_MISMATCH")
    assert sentence not in as_json.out


def test_a_plan_is_told_in_chinese_too(call: Call, ready: Lab, tmp_path: Path) -> None:
    ready.declare()
    template = tmp_path / "heart.toml"
    template.write_text(TEMPLATE)
    for asked, whole in (((*PLAN, "3", "--epsilon", "1"), "整个计划（20步）"), (("plan", template), "整个计划（")):
        found = call(*asked, "--lang", "zh")
        assert (found.code, found.out.splitlines()[-1]) == (0, "相符。")
        for words in (whole, "隐私预算足够", "未核对：数据行、", "噪声足以覆盖整个计划：相符"):
            assert words in found.out
        assert not re.findall(r"[a-z]{4,} [a-z]{3,}", found.out)


def test_everything_that_is_checked_has_a_chinese_name() -> None:
    """By the calls that make a check, and by what a plan says that it left out."""
    names, left_out = set(), {plans.NO_CARD, *plans.NOT_IN_TEMPLATES, *plans.NOT_IN_TERMS}
    for module in (review, plans):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "held":
                names.add(ast.literal_eval(node.args[0]))
    assert names == review_text.CHECKS.keys()
    assert left_out == review_text.NOT_CHECKED.keys()


def test_who_lets_the_operator_see_updates_says_so_in_its_policy(call: Call, ready: Lab, passphrase: Path) -> None:
    ready.declare()
    terms = TEMPLATE[TEMPLATE.index("[training]") : TEMPLATE.index("[term]")]
    offered = ready.offer(terms, central_toml(terms))
    refused = call("sign", offered.id, "--yes", "--passphrase-file", passphrase)
    assert (refused.code, "POLICY_TRUST_MODEL" in refused.err) == (5, True)
    text = ready.home.config_path.read_text()
    assert text.count("\n#trust_models = ") == 1
    replace_file(ready.home.config_path, text.replace("\n#trust_models", "\ntrust_models").encode())
    signed = call("sign", offered.id, "--yes", "--passphrase-file", passphrase)
    assert signed.code == 0
    plan = f"epsilon of the whole plan (2 released models): {epsilon_plan(offered)} at delta 0.00001"
    for words in ("WITHOUT NOISE", "nothing bounds what they tell it", "the Rényi sum for any row", plan):
        assert words in signed.out
    (agreed,) = ready.store.contracts()
    alpha = ready.store.data_set("set-1").alpha
    assert agreed.terms.rdp == attempt_rdp(offered, alpha)
    assert (agreed.terms.steps, agreed.terms.sample_rate, agreed.terms.planned_attempts) == (1, 1, 3)


def test_signing_is_asked_after_everything_was_shown(
    call: Call, ready: Lab, passphrase: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready.declare()
    offered = ready.offer()
    asked = answer(monkeypatch, False)
    result = call("sign", offered.id, "--passphrase-file", passphrase)
    assert (result.code, asked) == (5, ["Sign this contract?"])
    for words in ("vouched for by the operator only", "ourselves", "matches trust.toml", "epsilon of the whole plan"):
        assert words in result.out
    assert ready.store.contracts() == []


@pytest.mark.parametrize("text", ["ab", "ffff", "../../x"])
def test_an_unknown_contract_exits_with_2(call: Call, ready: Lab, text: str) -> None:
    for command in ("sign", "head", "statement", "pause"):
        result = call(command, text, "--json")
        assert (result.code, result.error) == (2, "CONTRACT_UNKNOWN")


# After signing


@pytest.fixture
def signed(call: Call, ready: Lab, passphrase: Path) -> str:
    ready.declare()
    offered = ready.offer()
    assert call("sign", offered.id, "--yes", "--passphrase-file", passphrase, "--json").code == 0
    return offered.id


def test_head_budget_and_egress_as_text_and_json(call: Call, world: Lab, signed: str) -> None:
    (head,) = call("head", "--json").json["heads"]
    assert (head["contract"], head["size"]) == (signed, 0)
    assert signed in call("head", signed[:6]).out
    (data_set,) = call("budget", "--json").json["data_sets"]
    assert data_set["contracts"][0]["contract"] == signed
    assert data_set["sum_of_limit"] == "0"
    shown = call("budget").out
    assert all(name in shown for name in ("epsilon_pld", "epsilon_gate", "sum / R 0.0 %"))
    entries = call("egress", "--json").json["egress"]
    assert [e["kind"] for e in entries if e["contract"] == signed] == ["request", "signature"]
    assert len(entries) == len(world.store.egress()) == len(world.wire.sent)
    (last,) = call("egress", "--contract", signed[:6], "--last", "1", "--json").json["egress"]
    assert last["kind"] == "signature"
    assert "POST" in call("egress").out


def test_what_is_logged_meanwhile_is_no_part_of_the_result(
    call: Call, world: Lab, signed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `card` and `sign` log that a database's rows were loaded: stdout has one JSON object all the same."""
    before = views.budget

    def logged(*arguments: Any) -> Any:
        structlog.get_logger().info("rows loaded", rows=3)
        return before(*arguments)

    monkeypatch.setattr(views, "budget", logged)
    result = call("budget", "--json")
    assert result.json["data_sets"]
    assert json.loads(result.err)["event"] == "rows loaded"


def test_requests_in_a_row_are_one_line_and_nothing_is_lost(call: Call, world: Lab, signed: str) -> None:
    before = len(world.store.egress())
    for number in range(40):
        world.store.record_egress("request", signed if number % 2 else None, None, 3, "ab" * 32, detail="GET /heads")
    world.store.record_egress("update", signed, 1, 1000, "cd" * 32)
    world.store.record_egress("request", signed, None, 3, "ab" * 32, detail="GET /last")
    entries = call("egress", "--json").json["egress"]
    assert len(entries) == before + 42
    total = f"{len(entries)} messages, {sum(e['bytes'] for e in entries)} bytes"
    folded, whole = call("egress").out, call("egress", "--all").out
    (row,) = [words for words in folded.splitlines() if "40 requests since" in words]
    assert row.split()[0] == f"{before + 1}-{before + 40}"
    assert " 120 " in row
    assert "several" in row
    assert folded.count("GET /heads") == 0
    assert "GET /last" in folded, "one alone is shown as it is"
    assert whole.count("GET /heads") == 40
    assert total in folded
    assert total in whole
    world.store.record_egress("update", signed, 1, 1000, "cd" * 32)
    updates = call("egress", "--kind", "update", "--kind", "card")
    assert "3 messages" in updates.out, "the update left twice"
    assert "2 times since" in updates.out
    assert " 2000 " in updates.out
    assert "request" not in updates.out
    assert [e["kind"] for e in call("egress", "--kind", "update", "--json").json["egress"]] == ["update"]
    unknown = call("egress", "--kind", "poll", "--json")
    assert (unknown.code, unknown.error) == (2, "EGRESS_KIND")


def test_what_is_no_request_is_in_no_run(call: Call, world: Lab) -> None:
    for kind in ("card", "request", "request"):
        world.store.record_egress(kind, None, None, 1, "ab" * 32)
    shown = call("egress").out
    assert [words.split()[0] for words in shown.splitlines()[2:4]] == ["1", "2-3"]


PLAN = ("plan", "set-1", "--local-steps", "5", "--sample-rate", "0.10", "--rounds")


def refusals(found: Result) -> dict[str, str]:
    return {c["name"]: c["error"]["code"] for c in found.json["checks"] if not c["ok"]}


def test_plan_says_what_a_contract_would_cost_and_changes_nothing(call: Call, world: Lab, signed: str) -> None:
    before = call("budget", "--json").json["data_sets"]
    found = call(*PLAN, "3", "--epsilon", "1", "--json")
    assert (found.code, found.json["refused"]) == (0, False)
    cost = found.json["cost"]
    assert 0.99 < float(cost["epsilon"]) <= 1
    assert cost["before"] == before[0]["committed"]
    assert 0 <= Decimal(found.json["sum_of_limit"]) - Decimal(cost["after"]) / Decimal(cost["limit"]) < Decimal("0.001")
    assert float(found.json["epsilon_gate"]) > float(cost["epsilon"]), "all contracts of the data set"
    shown = call(*PLAN, "3", "--epsilon", "1").out
    for words in (
        "epsilon of the whole plan (20 steps)",
        "sum / R",
        "epsilon_gate",
        "not looked at: rows, purpose",
        "It fits.",
    ):
        assert words in shown
    noise = found.json["noise_multiplier"]
    most = found.json["rounds_that_fit"]
    allowed = ("--noise-multiplier", noise)
    assert "budget" not in refusals(call(*PLAN, str(most), *allowed, "--json"))
    over = call(*PLAN, str(most + 1), *allowed, "--json")
    assert (over.code, refusals(over)["budget"]) == (5, "BUDGET_PLAN_EXCEEDED")
    shown = call(*PLAN, str(most + 1), *allowed).out
    assert f"With this noise the budget pays for {most} rounds; asked are {most + 1}." in shown
    assert "It would be refused." in shown
    hopeless = call(*PLAN, "3", "--noise-multiplier", "0.01")
    assert (hopeless.code, "pays for 0 rounds" in hopeless.out) == (5, True)
    assert call("budget", "--json").json["data_sets"] == before


def test_plan_names_every_clause_of_the_policy_that_refuses(call: Call, ready: Lab) -> None:
    ready.configure(data_set="", max_epsilon="1", max_rounds="2")
    found = call(*PLAN, "3", "--epsilon", "1.5", "--json")
    assert (found.code, refusals(found)) == (5, {"policy": "POLICY_EPSILON"})
    (error,) = [c["error"] for c in found.json["checks"] if not c["ok"]]
    assert "POLICY_ROUNDS" in error["message"]
    assert error["field"] == "privacy.epsilon, training.rounds"
    assert "purpose" in found.json["not_checked"]
    by_noise = call(*PLAN, "2", "--noise-multiplier", "1", "--json")
    assert refusals(by_noise) == {"policy": "POLICY_EPSILON"}, "the epsilon that the noise keeps"


def test_plan_counts_all_rows_of_one_person(call: Call, ready: Lab) -> None:
    nobodys = call(*PLAN, "3", "--epsilon", "1", "--entity-rows", "3", "--json")
    assert (nobodys.code, nobodys.error) == (2, "PLAN_ENTITY")
    text = ready.home.config_path.read_text().replace('label = "ill"\n', 'label = "ill"\nentity = "who"\n', 1)
    replace_file(ready.home.config_path, text.encode())
    found = call(*PLAN, "3", "--epsilon", "1", "--entity-rows", "3", "--json")
    assert (found.code, found.json["entity"]["column"]) == (0, "who")
    assert "the signed card" in found.json["not_checked"], "there is none yet"
    assert 1 < Decimal(found.json["entity"]["epsilon"]) < 10
    assert "for all rows of one entity, at most 3" in call(*PLAN, "3", "--epsilon", "1", "--entity-rows", "3").out
    none = call(*PLAN, "3", "--epsilon", "3", "--entity-rows", "32", "--json")
    assert (none.code, none.error) == (2, "TEMPLATE_ENTITY_UNPROTECTED")


@pytest.mark.parametrize(
    ("old", "new", "name", "code"),
    [
        ('label = "ill"\n', 'label = "ill"\nentity = "who"\n', "entities", "CARD_ENTITY_CHANGED"),
        ("num_examples = 40", "num_examples = 39", "own data", "SIGN_NUM_EXAMPLES"),
        ('path = "rows.csv"', 'path = "own.csv"', "own data", "DATA_SET_KNOWN_ELSEWHERE"),
    ],
)
def test_plan_refuses_what_the_signed_card_does_not_say(
    call: Call, ready: Lab, tmp_path: Path, old: str, new: str, name: str, code: str
) -> None:
    ready.declare()
    (ready.home.path / "own.csv").write_text(ROWS.replace("20,f,yes", "90,f,yes"))
    ready.configure(data_set=DATA_SET.replace("set-1", "set-9").replace("rows.csv", "own.csv"))
    with ready.client() as client:
        other = cards.prepare(ready.home, ready.home.config(), ready.store, "set-9")
        cards.declare(ready.home, ready.store, client, other, PASSPHRASE)
    template = tmp_path / "heart.toml"
    template.write_text(TEMPLATE)
    for asked in ((*PLAN, "3", "--epsilon", "1"), ("plan", template)):
        found = call(*asked, "--json")
        assert (found.code, "the signed card" in found.json["not_checked"]) == (0, False)
    text = ready.home.config_path.read_text()
    start = text.index('id = "set-1"')
    replace_file(ready.home.config_path, (text[:start] + text[start:].replace(old, new, 1)).encode())
    for asked in ((*PLAN, "3", "--epsilon", "1"), ("plan", template)):
        found = call(*asked, "--json")
        assert (found.code, refusals(found)) == (5, {name: code})


def test_rounds_that_fit_are_counted_without_rounding() -> None:
    """What is left is a hair less than one attempt costs."""
    cost, spent = SimpleNamespace(limit=Decimal(1), before=Decimal("1e-40")), SimpleNamespace(rdp=Decimal("1e-40"))
    terms = SimpleNamespace(rdp=Decimal(1), measurements=(), spare_attempts=0)
    assert plans._fitting(agents_contract(), terms, cost) == 0
    cost.before, terms.measurements = Decimal(0), (spent,)
    assert plans._fitting(agents_contract(), terms, cost) == 0
    terms.measurements = ()
    assert plans._fitting(agents_contract(), terms, cost) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "field"),
    [
        (("3",), "PLAN_NOISE", "--epsilon, --noise-multiplier"),
        (("3", "--epsilon", "1", "--noise-multiplier", "1"), "PLAN_NOISE", "--epsilon, --noise-multiplier"),
        (("3", "--epsilon", "much"), "PLAN", "--epsilon"),
        (("3", "--epsilon", "nan"), "PLAN", "--epsilon"),
        (("3", "--epsilon", "0"), "CONTRACT_NOT_POSITIVE", "--epsilon"),
        (("3", "--noise-multiplier", "0"), "CONTRACT_NOT_POSITIVE", "--noise-multiplier"),
        (("0", "--epsilon", "1"), "CONTRACT", "--rounds"),
        (("99999", "--epsilon", "1"), "CONTRACT_TOO_MANY_STEPS", "--local-steps"),
        (("3", "--epsilon", "1", "--delta", "0.0001"), "CONTRACT_DELTA", "--delta"),
        (("3", "--epsilon", "0.0001"), "PRIVACY_UNREACHABLE", "--epsilon"),
    ],
)
def test_a_plan_that_makes_no_sense_is_named(
    call: Call, world: Lab, signed: str, arguments: tuple[str, ...], code: str, field: str
) -> None:
    result = call(*PLAN, *arguments, "--json")
    assert (result.code, result.error, result.json["error"]["field"]) == (2, code, field)


def test_a_plan_on_a_data_set_that_promises_too_little_is_refused(call: Call, ready: Lab) -> None:
    text = ready.home.config_path.read_text().replace("delta = 0.00001\ncolumns", "delta = 0.1\ncolumns")
    replace_file(ready.home.config_path, text.encode())
    found = call(*PLAN, "3", "--epsilon", "1", "--json")
    assert (found.code, refusals(found)) == (5, {"budget": "CARD_DELTA"})
    assert call("card", "set-1", "--yes", "--json").error == "CARD_DELTA"
    assert ready.store.data_sets() == []


def test_plan_needs_all_terms_or_a_file(call: Call, ready: Lab) -> None:
    result = call("plan", "set-1", "--rounds", "3", "--json")
    assert (result.code, result.error, result.json["error"]["field"]) == (2, "PLAN_OPTIONS", "--local-steps")
    result = call("plan", "set-1", "--json")
    assert (result.code, result.error) == (2, "PLAN_OPTIONS")
    assert "set-1 is a data set" in result.json["error"]["message"]
    assert "--epsilon or --noise-multiplier" in result.json["error"]["remedy"]
    for nothing in ("set-2", ready.home.path):
        result = call("plan", nothing, "--json")
        assert (result.code, result.error) == (2, "CONTRACT_FILE_MISSING")
        assert "a data set's id (set-1) with --rounds" in result.json["error"]["remedy"]


GATE = '[[data_sets.rules]]\nrule = "missing"\nat_most = 0\n'
FACTS = """[data_sets.card]
title = "Heart"
description = "Patients"
license = "CC-BY-4.0"
creator = "Hospital 1"
url = "https://hospital.example.org"
published = 2026-11-01
"""


def declare_facts(at: Lab) -> None:
    text = at.home.config_path.read_text().replace("[policy]\n", FACTS + "[policy]\n", 1)
    replace_file(at.home.config_path, text.encode())


def test_a_profile_says_which_rule_is_broken_and_writes_a_page(call: Call, world: Lab, tmp_path: Path) -> None:
    world.configure(data_set=DATA_SET + GATE, rows=ROWS.replace("25,m,no", ",m,no"))
    done = call("profile", "set-1", "--html", tmp_path / "q.html", "--lang", "zh")
    assert done.code == 5
    assert "1 / 60" in done.out
    assert "未通过" in (tmp_path / "q.html").read_text()
    assert (tmp_path / "q.html").stat().st_mode & 0o077 == 0
    assert call("profile", "set-1", "--html", tmp_path / "q.html", "--json").error == "FILE_EXISTS"
    found = call("profile", "set-1", "--json")
    assert (found.code, found.json["passed"]) == (5, False)
    (world.home.path / "rows.csv").write_text(ROWS)
    assert call("profile", "set-1", "--json").json["passed"] is True
    assert world.wire.sent == [], "a profile asks nobody anything"


def test_a_profile_takes_a_contracts_demands_too(call: Call, ready: Lab, tmp_path: Path) -> None:
    ready.declare()
    (tmp_path / "contract.json").write_bytes(ready.offer().to_bytes())
    (ready.home.path / "rows.csv").write_text(ROWS.replace("25,m,no", "25,m,perhaps"))
    found = call("profile", "set-1", "--contract", tmp_path / "contract.json", "--json").json
    assert {rule["whose"] for rule in found["rules"]} == {"contract"}
    assert [(r["rule"], r["column"], r["count"]) for r in found["rules"] if not r["passed"]] == [
        ("vocabulary", "ill", 1)
    ]


def test_a_count_is_on_the_card_only_where_it_was_named(call: Call, ready: Lab, passphrase: Path) -> None:
    declare_facts(ready)
    secret = ("--passphrase-file", passphrase, "--json")
    assert call("card", "set-1", "--measured", "rows", *secret).error == "CONFIRMATION_NEEDED"
    assert call("card", "set-1", "--measured", "weight", "--yes", *secret).error == "CARD_MEASURED"
    assert "measured" not in call("card", "set-1", "--yes", *secret).json
    said = call("card", "set-1", "--measured", "rows", "--yes", *secret).json
    assert said["measured"] == [{"item": "rows", "at_least": 60, "basis": "outside-the-guarantee"}]


def test_no_is_the_answer_that_keeps_a_count_at_home(
    call: Call, ready: Lab, passphrase: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []

    def answers(question: str, *, default: bool, err: bool) -> bool:
        asked.append((question, default))
        return "missing" not in question and "without a value" not in question

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(typer, "confirm", answers)
    measured = ("--measured", "rows", "--measured", "missing-cells")
    said = call("card", "set-1", *measured, "--passphrase-file", passphrase, "--json").json
    assert [m["item"] for m in said["measured"]] == ["rows"]
    assert [default for _, default in asked] == [False] * 3
    assert "outside the privacy guarantee: rows of the source, at least 60" in asked[0][0]


def test_a_card_is_described_by_croissant_once_it_is_signed(
    call: Call, ready: Lab, passphrase: Path, tmp_path: Path
) -> None:
    declare_facts(ready)
    file = tmp_path / "card.jsonld"
    assert call("card", "set-1", "--croissant", file, "--json").error == "DATA_SET_UNKNOWN"
    call("card", "set-1", "--yes", "--passphrase-file", passphrase)
    before = len(ready.wire.sent)
    done = call("card", "set-1", "--croissant", file, "--json")
    assert (done.code, len(ready.wire.sent)) == (0, before), "nothing is sent"
    assert json.loads(file.read_text())["datePublished"] == "2026-11-01"
    assert call("card", "set-1", "--croissant", file, "--json").error == "FILE_EXISTS"


def test_a_plan_for_a_data_set_without_a_card_counts_from_nothing(call: Call, ready: Lab) -> None:
    found = call(*PLAN, "3", "--epsilon", "1", "--json")
    assert (found.code, found.json["cost"]["before"]) == (0, "0")
    unknown = call("plan", "other", *PLAN[2:], "3", "--epsilon", "1", "--json")
    assert (unknown.code, unknown.error) == (2, "CONFIG_DATA_SET")
    assert "set-1" in unknown.json["error"]["message"]


MEASURED = """[statistics]
noise_multiplier = 30
[[statistics.queries]]
kind = "mean"
column = "age"

[baseline]
steps = 2

"""


def test_the_plan_of_a_contract_in_a_file_is_what_sign_shows(call: Call, ready: Lab, tmp_path: Path) -> None:
    ready.declare()
    offered = ready.offer("[participation]", MEASURED + "[participation]")
    path = tmp_path / "heart.json"
    path.write_bytes(offered.to_bytes())
    found = call("plan", path, "--json")
    assert (found.code, found.json["refused"], found.json["not_checked"]) == (0, False, ["rows"])
    shown = call("contract", "show", offered.id, "--json").json
    assert (found.json["cost"], found.json["checks"]) == (shown["cost"], shown["checks"])
    assert found.json["measurements"] == ["statistics", "baseline"]
    assert "(3 steps, 1 statistic and a baseline of 2 steps)" in call("plan", path).out
    plan, limit = offered.privacy, ready.store.data_set("set-1").limit
    most = found.json["rounds_that_fit"]
    beside = rdp(Decimal(30), Decimal(1), 1, Decimal(found.json["cost"]["alpha"])) + 2 * attempt_rdp(
        offered, Decimal(found.json["cost"]["alpha"])
    )
    one = attempt_rdp(offered, Decimal(found.json["cost"]["alpha"]))
    assert (most + plan.spare_attempts) * one + beside <= limit < (most + 1 + plan.spare_attempts) * one + beside
    ready.configure(data_set="", max_epsilon="1")
    refused = call("plan", path, "--json")
    assert (refused.code, refusals(refused)) == (5, {"policy": "POLICY_EPSILON"})


def test_a_template_is_planned_before_the_operator_has_made_a_contract_of_it(
    call: Call, ready: Lab, tmp_path: Path
) -> None:
    """The noise is the one that the operator's `contract new` finds, and the cost the one that `sign` will show."""
    ready.declare()
    template = TEMPLATE.replace("[participation]", MEASURED + "[participation]")
    path = tmp_path / "heart.toml"
    path.write_text(template)
    found = call("plan", path, "--json")
    assert (found.code, refusals(found)) == (0, {})
    offered = ready.offer("[participation]", MEASURED + "[participation]")
    assert found.json["noise_multiplier"] == str(offered.privacy.noise_multiplier)
    assert found.json["cost"] == call("contract", "show", offered.id, "--json").json["cost"]
    assert found.json["not_checked"] == ["rows", "operator", "other participants", "code"]
    path.write_text(template.replace("disease-prediction", "advertising").replace('name = "sex"', 'name = "size"'))
    refused = call("plan", path, "--json")
    assert refused.code == 5
    assert refusals(refused) == {"columns": "SIGN_COLUMNS", "policy": "POLICY_PURPOSE_MISMATCH"}
    path.write_text(template.replace(ENTITY, "91310000MA1K000009"))
    stranger = call("plan", path, "--json")
    assert (stranger.code, stranger.error, stranger.json["error"]["file"]) == (2, "PLAN_NOT_NAMED", str(path))


def test_a_template_that_this_machine_cannot_train_by_is_refused(call: Call, ready: Lab, tmp_path: Path) -> None:
    ready.declare()
    path = tmp_path / "heart.toml"
    path.write_text(TEMPLATE)
    assert "memory and disk" not in refusals(call("plan", path, "--json"))
    text = ready.home.config_path.read_text()
    ready.home.config_path.write_text(text.replace("memory = 4096", "memory = 300"))
    refused = call("plan", path, "--json")
    assert (refused.code, refusals(refused)["memory and disk"]) == (5, "SIGN_MEMORY")


def test_a_template_at_client_level_is_refused_by_the_policy_and_priced(call: Call, ready: Lab, tmp_path: Path) -> None:
    path = tmp_path / "heart.toml"
    path.write_text(central_template())
    found = call("plan", path, "--json")
    assert (found.code, refusals(found)) == (5, {"policy": "POLICY_TRUST_MODEL"})
    assert found.json["cost"]["attempts"] == 3
    assert "nothing bounds what they tell it" in call("plan", path).out


def central_template() -> str:
    terms = TEMPLATE[TEMPLATE.index("[training]") : TEMPLATE.index("[term]")]
    return TEMPLATE.replace(terms, central_toml(terms))


def test_at_80_columns_each_item_is_a_block_of_its_own(
    call: Call, world: Lab, signed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    contracts, egress = call("contract", "list"), call("egress", "--all")
    for result in (egress, contracts):
        assert max(map(len, result.out.splitlines())) <= 80
    for entry in call("egress", "--json").json["egress"]:
        block = egress.out.split(f"no. {entry['seq']}\n")[1].split("no. ")[0]
        assert f"time (UTC)  {entry['at']} " in block
        assert f"sha256      {entry['sha256'][:12]} " in block
    assert f"contract {signed}\n" in contracts.out
    assert "at the operator  " in contracts.out


def test_pause_resume_withdraw_need_no_operator(call: Call, world: Lab, signed: str) -> None:
    world.wire.cut_before = "/"
    world.store.set_state(signed, "running")
    assert call("pause", signed[:8], "--json").json == {"contract": signed, "state": "paused"}
    assert f"orders of the contract {signed[:8]} are answered no more" in call("pause", signed).out
    assert call("resume", signed, "--json").json["state"] == "running"
    asked = call("withdraw", signed, "--json")
    assert asked.error == "CONFIRMATION_NEEDED"
    assert f"{world.store.contract(signed).contract.title} ({signed[:8]}) for good?" in asked.out, "which one is asked"
    assert f"永久退出{world.store.contract(signed).contract.title}" in call("withdraw", signed, "--lang", "zh").err
    said = call("withdraw", signed, "--yes", "--json").json
    told = call("withdraw", signed, "--yes", "--lang", "zh").out
    assert f"已退出合约{signed}。" in told
    assert "本机已销毁：" in told
    assert "运营方尚未说明销毁了什么" in told
    assert world.store.contract(signed).state == "withdrawn"
    assert said["receipts"]["operator"] is None
    assert {held["kind"]: held["count"] for held in said["receipts"]["participant"]["destroyed"]} == {
        "arrays-in-the-outbox": 0,
        "trainers-with-encoded-rows": 0,
    }
    receipt = read_envelope(Path(said["receipts"]["participant"]["file"]).read_bytes())
    open_signed(receipt, DestructionReceipt, public_hex(world.home.run_key(signed)))
    assert not beside(said).exists(), "not everybody has signed the contract"
    assert "Nothing is said yet of what was destroyed at the operator" in call("withdraw", signed, "--yes").out
    assert call("status", "--offline", "--json").json["contracts"][0]["withdrawal"] == said["receipts"]
    result = call("resume", signed, "--json")
    assert (result.code, result.error) == (2, "CONTRACT_STATE")


def beside(said: Any) -> Path:
    """The contract that receipts are verified with."""
    path = Path(said["receipts"]["participant"]["file"])
    return path.with_name(f"{path.name.partition('.')[0]}.contract.json")


def test_a_withdrawal_that_the_operator_hears_has_its_receipt(call: Call, world: Lab, signed: str) -> None:
    world.others_sign(world.store.contract(signed).contract)
    said = call("withdraw", signed, "--yes", "--json").json["receipts"]
    assert (said["operator"]["by"], said["operator"]["models"]) == ("operator", [])
    for by in ("participant", "operator"):
        word = verify_record(Path(said[by]["file"]), beside({"receipts": said}), None)
        assert (word.exit_code, word.faults) == (3, ())
    with world.world.database.read() as connection:
        kinds = [entry.type for entry in logbook.read_entries(connection, signed)]
    assert kinds == ["contract-signed", "notice-taken", "destruction-stated", "destruction-stated"]
    assert "Destroyed at the operator: 0 updates-rejected" in call("withdraw", signed, "--yes").out
    assert world.store.count_egress(EgressKind.NOTICE, signed) == 1, "it is said once"


def test_the_pages_commands_of_leaving(call: Call, world: Lab, signed: str, passphrase: Path) -> None:
    """docs/joining.md, each in the page's order."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "joining.md").read_text("utf-8")
    script = Script(commands(text, "Pausing, withdrawing, revoking a key"))
    world.others_sign(world.store.contract(signed).contract)
    world.store.set_state(signed, "running")
    asked = {"withdraw": ["--yes"], "revoke-key": ["--yes", *secret(passphrase)], "countersign": secret(passphrase)}
    for command in ("pause", "resume", "withdraw", "revoke-key", "countersign"):
        words = filled(script.take(f"fedpact-agent {command}"), {"3f2a91c0": signed[:8], "agent": str(world.home.path)})
        result = call(*words[1:], "--json", *asked.get(command, []))
        assert result.code == 0, result.err
    script.done()


def secret(passphrase: Path) -> list[str]:
    return ["--passphrase-file", str(passphrase)]


def test_a_run_key_is_revoked_here_first(call: Call, world: Lab, signed: str, passphrase: Path) -> None:
    own = secret(passphrase)
    world.others_sign(world.store.contract(signed).contract)
    world.store.set_state(signed, "running")
    world.wire.cut_before = "POST"
    cut = call("revoke-key", signed, "--yes", "--json", *own)
    assert cut.error == "OPERATOR_AWAY"
    assert "is revoked here; the operator does not know it yet" in cut.out
    assert world.store.contract(signed).state == "paused"
    assert call("resume", signed, "--json").error == "KEY_REVOKED"
    world.wire.cut_before = ""
    said = call("revoke-key", signed, "--yes", "--json", *own).json
    assert said == {"contract": signed, "revoked": True, "entry": 1}
    assert call("status", "--offline", "--json").json["contracts"][0]["key_revoked"]
    assert call("countersign", signed, "--json", *own).json["done"] == "none"
    said = call("withdraw", signed, "--yes", "--json", *own).json
    assert said["receipts"]["operator"]["by"] == "operator", "signed by the contract key"
    assert verify_record(Path(said["receipts"]["participant"]["file"]), beside(said), None).exit_code == 3


def test_a_restored_copy_counts_running_contracts_as_fully_spent(
    call: Call, world: Lab, signed: str, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.db"
    assert call("backup", "--out", copy).code == 0
    assert copy.stat().st_size > 0
    assert call("backup", "--out", copy, "--json").error == "STORE_EXISTS"
    world.store.set_state(signed, "running")
    assert call("restore", "--json").error == "CONFIRMATION_NEEDED"
    result = call("restore", "--yes", "--json")
    assert (result.code, [r["contract"] for r in result.json["written_off"]]) == (0, [signed])
    assert call("restore", "--yes", "--json").json == {"written_off": []}, "once is enough"


def test_another_homes_store_is_refused_by_every_command(
    call: Call, world: Lab, signed: str, tmp_path: Path, passphrase: Path
) -> None:
    """Somebody's fresh ledger would give this home its budget back."""
    other = tmp_path / "another"
    made = ("--home", other, "--name", "Other", "--entity-code", "91310000MA1OTHER09", "--sector", "medical")
    assert call("init", *made, "--passphrase-file", passphrase).code == 0
    (other / "agent.db").write_bytes((world.home.path / "agent.db").read_bytes())
    for command in (("budget",), ("status", "--offline"), ("restore", "--yes"), ("start",)):
        result = call(*command, "--home", other, "--json")
        assert (result.code, result.error) == (5, "STORE_OF_ANOTHER"), command


def test_a_statement_before_the_log_exists(call: Call, signed: str) -> None:
    result = call("statement", signed, "--json")
    assert (result.code, result.error) == (5, "CONTRACT_NOT_SIGNED")


def test_a_statement_and_a_report_of_a_fresh_log(call: Call, world: Lab, signed: str, tmp_path: Path) -> None:
    with world.client() as client:
        from fedpact_client.signing import fetch_offer

        world.others_sign(fetch_offer(client, signed).contract)
    result = call("statement", signed, "--keep", tmp_path / "evidence", "--json")
    assert (result.code, result.json["status"]) == (4, "running")
    assert sorted(p.name for p in (tmp_path / "evidence").iterdir()) == [
        *("checkpoints.jsonl", "countersignatures.jsonl", "leaves.txt", "log.jsonl")
    ]
    assert "PARTLY AUTHENTICATED" in call("statement", signed).out
    for form in ("json", "html"):
        written = call("report", signed, "--out", tmp_path / f"report.{form}", "--format", form, "--json")
        assert written.code == 4
        assert (tmp_path / f"report.{form}").stat().st_size == written.json["bytes"]
    assert json.loads((tmp_path / "report.json").read_text())["contract_id"] == signed
    again = call("report", signed, "--out", tmp_path / "report.json", "--json")
    assert (again.code, again.error) == (2, "FILE_EXISTS")


@pytest.mark.parametrize(("option", "value"), [("--format", "pdf"), ("--lang", "fr")])
def test_a_report_has_two_forms_and_two_languages(
    call: Call, signed: str, tmp_path: Path, option: str, value: str
) -> None:
    result = call("report", signed, "--out", tmp_path / "x", option, value, "--json")
    assert (result.code, result.error, result.json["error"]["field"]) == (2, "USAGE", option)


def test_a_fault_in_the_evidence_exits_with_1(
    call: Call, signed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def faulty(*_: object) -> None:
        raise FaultError("STATEMENT_RECEIPT_MISSING", "The log has no word on the update sent.", field="round 1")

    monkeypatch.setattr(views, "fetch_checked", faulty)
    result = call("statement", signed, "--json")
    assert (result.code, result.error) == (1, "STATEMENT_RECEIPT_MISSING")
    assert call("report", signed, "--out", tmp_path / "x", "--json").code == 1
    assert not (tmp_path / "x").exists()


# start, and the rim


@pytest.mark.parametrize("code", [0, 1])
def test_start_ends_with_the_guards_exit_code(
    call: Call, world: Lab, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    homes: list[Path] = []
    monkeypatch.setattr(guard, "run", lambda home, *_tell: homes.append(home) or code)
    assert call("start").code == code
    assert homes == [world.home.path]


def test_start_says_once_that_it_is_connected(call: Call, world: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(home: Path, ready: Callable[[str, str], None], waits: Callable[[str], None]) -> int:
        guard.log.warning("something of the log")
        waits("a reason")
        ready("https://fl.example.cn:8443", "ab" * 32)
        return 0

    monkeypatch.setattr(guard, "run", run)
    shown = call("start")
    assert shown.out.splitlines() == [
        f"Connected to https://fl.example.cn:8443 and serving; participant {'ab' * 32}. Ctrl-C ends it."
    ]
    log, waiting = shown.err.splitlines()
    assert json.loads(log)["event"] == "something of the log", "the log is no result"
    assert waiting == "Waiting: a reason."
    value = call("start", "--json").json
    assert value == {
        "ready": True,
        "url": "https://fl.example.cn:8443",
        "participant": "ab" * 32,
        "process": os.getpid(),
    }


def test_a_fault_in_the_configuration_names_its_line(call: Call, world: Lab) -> None:
    text = world.home.config_path.read_text().replace("threads = 2", "threads = 0")
    replace_file(world.home.config_path, text.encode())
    result = call("budget")
    assert result.code == 2
    number = text.splitlines().index("threads = 0") + 1
    assert f"agent.toml:{number}" in result.err.replace("\n", "")


def test_an_unexpected_error_shows_no_traceback(call: Call, world: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "budget", lambda *_: 1 / 0)
    result = call("budget", "--json")
    assert (result.code, result.error) == (1, "INTERNAL")
    assert "Traceback" not in result.out + result.err
    Path(result.json["error"]["file"]).unlink()
