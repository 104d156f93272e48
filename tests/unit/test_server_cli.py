"""The operator's commands: what they print, their exit codes, and that secrets come from files or prompts alone."""

import datetime
import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.support.command import runner
from tests.support.operator_world import NOW, ROWS, TEMPLATE, enterprise

from fedpact_client.api import ca_fingerprints
from fedpact_contract.contract import Contract, load_toml
from fedpact_contract.keys import show_fingerprint
from fedpact_contract.messages import Invitation
from fedpact_contract.quality import Facts
from fedpact_contract.request import instant, utc_now
from fedpact_server import cards, contracts, enrolment
from fedpact_server.cli import GROUPS
from fedpact_server.home import OperatorHome, Settings, _settings_text

ROOT = Path(__file__).resolve().parents[2]
ONE = enterprise(1)
INIT = ("init", "--name", "City Data", "--entity-code", "91310000MA1K999999", "--host", "127.0.0.1")


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run `fedpact` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDPACT_HOME", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    run = runner(monkeypatch, capsys)

    def call(*args: str) -> Result:
        return Result(*run(*args))

    return call


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "passphrase"
    path.write_text("correct horse\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def home(run: Run, secret: Path, tmp_path: Path) -> Path:
    assert run(*INIT, "--passphrase-file", str(secret)).code == 0
    return tmp_path / "operator"


@pytest.fixture
def admitted(run: Run, home: Path) -> Path:
    """Three approved enterprises with cards, and the files of a contract."""
    for number in (1, 2, 3):
        who = enterprise(number)
        out = f"invitation-{number}"
        code = run(
            "participant", "invite", "--name", who.name, "--entity-code", who.entity_code, "--sector", "medical",
            "--out", out,
        ).code  # fmt: skip
        assert code == 0
        invitation = Invitation.parse(json.loads(Path(out).read_bytes()), code="TEST")
        operator = OperatorHome.open(home)
        database = operator.database()
        enrolment.enrol(operator, database, token=invitation.token, signed=who.request(invitation), now=utc_now())
        assert run("participant", "approve", who.name, "--fingerprint", show_fingerprint(who.id)).code == 0
        with database.write() as connection:
            cards.accept_card(connection, enrolment.find(connection, who.id), who.card(), [])
        database.dispose()
    Path("template.toml").write_text(TEMPLATE.replace("2026-11-01", "2020-01-01"))
    Path("rows.csv").write_text(ROWS)
    return home


def drafted(run: Run) -> str:
    result = run("contract", "new", "template.toml", "--validation", "rows.csv", "--json")
    assert result.code == 0, result
    return str(result.json["contract_id"])


class TestInit:
    def test_it_tells_the_fingerprint(self, run: Run, secret: Path, tmp_path: Path) -> None:
        result = run(*INIT, "--passphrase-file", str(secret))
        operator = OperatorHome.open(tmp_path / "operator")
        assert result.code == 0
        assert show_fingerprint(operator.fingerprint) in result.out
        assert operator.url == "https://127.0.0.1:8443"

    def test_json_is_one_object(self, run: Run, secret: Path, tmp_path: Path) -> None:
        result = run(*INIT, "--passphrase-file", str(secret), "--home", "there", "--port", "9443", "--json")
        assert result.code == 0
        assert result.out.count("\n") == 1
        operator = OperatorHome.open(tmp_path / "there")
        assert result.json == {
            "home": str(tmp_path / "there"),
            "fingerprint": operator.fingerprint,
            "key": operator.public_key,
            "name": "City Data",
            "entity_code": "91310000MA1K999999",
            "url": "https://127.0.0.1:9443",
        }

    def test_a_second_time_is_refused(self, run: Run, home: Path, secret: Path) -> None:
        result = run(*INIT, "--passphrase-file", str(secret), "--json")
        assert (result.code, result.json["error"]["code"]) == (2, "HOME_EXISTS")

    def test_secrets_come_from_closed_files_or_prompts(self, run: Run, secret: Path, tmp_path: Path) -> None:
        assert "PASSPHRASE_NEEDED" in run(*INIT).err
        secret.chmod(0o644)
        assert "SECRET_FILE_MODE" in run(*INIT, "--passphrase-file", str(secret)).err
        secret.chmod(0o600)
        secret.write_text("\n")
        assert "SECRET_FILE" in run(*INIT, "--passphrase-file", str(secret)).err
        assert "SECRET_FILE" in run(*INIT, "--passphrase-file", "nowhere").err
        secret.write_text("short")
        assert run(*INIT, "--passphrase-file", str(secret)).code == 2
        assert not (tmp_path / "operator").exists()

    def test_a_prompted_passphrase_is_asked_for_twice(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        asked: list[bool] = []

        def prompt(_text: str, *, hide_input: bool, confirmation_prompt: bool, err: bool) -> str:
            assert hide_input
            assert err
            asked.append(confirmation_prompt)
            return "correct horse"

        monkeypatch.setattr("typer.prompt", prompt)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        assert run(*INIT).code == 0
        assert asked == [True]
        OperatorHome.open(tmp_path / "operator").contract_key(b"correct horse")

    def test_a_database_url_comes_from_a_file(self, run: Run, secret: Path, tmp_path: Path) -> None:
        url = tmp_path / "url"
        url.write_text(f"sqlite:///{tmp_path / 'elsewhere.db'}")
        url.chmod(0o600)
        assert run(*INIT, "--passphrase-file", str(secret), "--database-file", str(url)).code == 0
        assert (tmp_path / "elsewhere.db").is_file()
        assert run("participant", "list").code == 0

    @pytest.mark.parametrize(
        ("option", "value", "field", "said"),
        [
            ("--port", "0", "port", "must be at least 1."),
            ("--entity-code", "xyz", "entity_code", "must be 18 digits and capital letters"),
            ("--host", "a b", "", ""),
            ("--name", "", "name", "must not be empty."),
        ],
    )
    def test_bad_values_are_bad_input_told_in_words(
        self, run: Run, secret: Path, option: str, value: str, field: str, said: str
    ) -> None:
        result = run(*INIT, "--passphrase-file", str(secret), option, value, "--json")
        assert result.code == 2
        error = result.json["error"]
        assert error.get("field", "").startswith(field)
        assert said in error["message"]


class TestParticipants:
    def test_invite_enrol_approve_list_revoke(self, run: Run, admitted: Path) -> None:
        listed = run("participant", "list", "--json").json
        assert [(p["name"], p["state"], p["data_sets"]) for p in listed["participants"]] == [
            (f"Hospital {n}", "approved", [{"id": f"set-{n}", "num_examples": 100 + n}]) for n in (1, 2, 3)
        ]
        text = run("participant", "list").out
        assert show_fingerprint(ONE.id)[:19] in text
        assert run("participant", "revoke", ONE.id[:8], "--json").json["state"] == "suspended"
        assert "PARTICIPANT_SUSPENDED" in run("participant", "list").out

    def test_the_list_at_80_columns(self, run: Run, admitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        text = run("participant", "list").out
        assert max(map(len, text.splitlines())) <= 80
        for number in (1, 2, 3):
            block = text.split(f"participant Hospital {number}\n")[1].split("participant ")[0]
            assert f"data sets (rows)  set-{number} ({100 + number})" in block
            assert show_fingerprint(enterprise(number).id) in " ".join(block.split()), "whole groups"

    def test_an_invitation_is_a_closed_file_that_is_never_overwritten(self, run: Run, home: Path) -> None:
        given = ("participant", "invite", "--name", "A", "--entity-code", ONE.entity_code, "--sector", "medical")
        result = run(*given, "--out", "a.json")
        assert result.code == 0
        assert Path("a.json").stat().st_mode & 0o777 == 0o600
        token = json.loads(Path("a.json").read_bytes())["token"]
        assert token not in result.out + result.err
        (authority,) = ca_fingerprints(json.loads(Path("a.json").read_bytes())["ca_pem"])
        assert show_fingerprint(authority) in result.out, "which `enrol` shows for comparison"
        assert len(run("participant", "list", "--json").json["invitations"]) == 1
        before = Path("a.json").read_bytes()
        again = run(*given, "--out", "a.json", "--json")
        assert (again.code, again.json["error"]["code"]) == (2, "FILE_EXISTS")
        assert Path("a.json").read_bytes() == before

    def test_a_refused_invitation_leaves_no_file(self, run: Run, home: Path) -> None:
        result = run(
            "participant", "invite", "--name", "A", "--entity-code", "1", "--sector", "medical", "--out", "a.json"
        )
        assert result.code == 2
        assert "entity_code: must be 18 digits and capital letters" in result.err
        assert not Path("a.json").exists()

    def test_a_wrong_fingerprint_is_refused(self, run: Run, admitted: Path) -> None:
        result = run("participant", "approve", ONE.name, "--fingerprint", "0" * 64, "--json")
        assert (result.code, result.json["error"]["code"]) == (5, "FINGERPRINT_MISMATCH")
        assert run("participant", "approve", ONE.name, "--fingerprint", "123").code == 2
        assert run("participant", "approve", "nobody", "--fingerprint", ONE.id).code == 2
        assert run("participant", "approve", ONE.name).code == 2


class TestContracts:
    def test_from_template_to_signature(self, run: Run, admitted: Path, secret: Path) -> None:
        contract_id = drafted(run)
        shown = run("contract", "show", contract_id[:8])
        assert shown.code == 0
        assert shown.out.endswith(f"{contract_id}\n")
        assert ONE.id in shown.out
        assert run("contract", "offer", contract_id[:8], "--json").json["state"] == "offered"
        signed = run("contract", "sign", contract_id[:8], "--yes", "--passphrase-file", str(secret))
        assert signed.code == 0
        assert f"{contract_id}\n" in signed.out
        assert "What nothing here stops" in signed.out
        operator = OperatorHome.open(admitted)
        database = operator.database()
        with database.read() as connection:
            contract = contracts.find(connection, contract_id).contract
        for number in (1, 2, 3):
            who = enterprise(number)
            envelope, delegation = who.signature(contract)
            contracts.accept_signature(
                operator, database, contract_id, who.id, envelope=envelope, delegation=delegation, now=utc_now()
            )
        database.dispose()
        status = run("contract", "status", contract_id, "--json").json
        assert (status["state"], status["missing"]) == ("signed", [])
        table = run("contract", "status").out
        assert "4 of 4" in table
        assert run("contract", "status", "--json").json["contracts"][0]["id"] == contract_id
        assert run("contract", "list").out == table, "as the agent calls it"

    def test_json_of_sign_is_one_object_and_the_text_goes_to_stderr(
        self, run: Run, admitted: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        contract_id = drafted(run)
        run("contract", "offer", contract_id)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
        monkeypatch.setattr("typer.confirm", lambda *_args, **_kwargs: True)
        result = run("contract", "sign", contract_id, "--passphrase-file", str(secret), "--json")
        assert result.json["signed"] == [OperatorHome.open(admitted).fingerprint]
        assert "FEDERATED LEARNING CONTRACT" in result.err

    @pytest.mark.parametrize("command", ["sign", "terminate"])
    def test_nothing_is_done_without_a_yes(
        self, run: Run, admitted: Path, command: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        contract_id = drafted(run)
        run("contract", "offer", contract_id)
        nobody = run("contract", command, contract_id, "--json")
        assert (nobody.code, nobody.json["error"]["code"]) == (2, "CONFIRMATION_NEEDED")
        assert "--yes" in nobody.json["error"]["remedy"]
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
        monkeypatch.setattr("typer.confirm", lambda *_args, **_kwargs: False)
        no = run("contract", command, contract_id, "--json")
        assert (no.code, no.json["error"]["code"]) == (5, "DECLINED")
        status = run("contract", "status", contract_id, "--json").json
        assert (status["state"], status["signed"]) == ("offered", [])

    def test_what_is_wrong_is_named_with_file_and_field(self, run: Run, admitted: Path) -> None:
        template = Path("template.toml").read_text()
        Path("template.toml").write_text(template.replace("epsilon = 2", "epsilon = -2"))
        result = run("contract", "new", "template.toml", "--validation", "rows.csv", "--json")
        assert result.code == 2
        error = result.json["error"]
        line = template.split("epsilon = 2")[0].count("\n") + 1
        assert (error["code"], error["file"], error["field"]) == (
            "CONTRACT_NOT_POSITIVE",
            f"template.toml:{line}",
            "privacy.epsilon",
        )
        shown = run("contract", "new", "template.toml", "--validation", "rows.csv")
        assert "CONTRACT_NOT_POSITIVE" in shown.err
        assert "privacy.epsilon" in shown.err
        assert run("contract", "new", "nowhere.toml", "--validation", "rows.csv").code == 2
        assert run("contract", "new", "template.toml", "--validation", "rows.csv", "--kind", "excel").code == 2
        Path("template.toml").write_text(template)
        Path("rows.csv").write_text(ROWS.replace("20,f", "old,f"))
        assert "the first is line 2." in run("contract", "new", "template.toml", "--validation", "rows.csv").err
        Path("template.toml").write_bytes(b"\xff\xfe")
        assert "FILE_ENCODING" in run("contract", "new", "template.toml", "--validation", "rows.csv").err

    def test_a_file_without_a_header_and_with_markers(self, run: Run, admitted: Path) -> None:
        rows = ROWS.split("\n", 1)[1].replace("20,f", "?,f").replace(",", ";")
        Path("rows.csv").write_text(rows)
        result = run(
            "contract", "new", "template.toml", "--validation", "rows.csv", "--column-names", "age, sex, ill",
            "--delimiter", ";", "--missing", "?", "--out", "contract.json",
        )  # fmt: skip
        assert result.code == 0, result
        contract = Contract.from_bytes(Path("contract.json").read_bytes())
        assert [s.count for s in contract.contribution.validation.slices] == [29]
        assert contract.id in result.out
        again = run("contract", "new", "template.toml", "--validation", "rows.csv", "--out", "contract.json", "--json")
        assert again.json["error"]["code"] == "FILE_EXISTS"

    def test_a_draft_is_terminated(self, run: Run, admitted: Path) -> None:
        contract_id = drafted(run)
        assert run("contract", "terminate", contract_id, "--yes", "--json").json["state"] == "terminated"

    def test_an_unknown_contract(self, run: Run, home: Path) -> None:
        for command in ("show", "offer", "status", "terminate", "sign"):
            result = run("contract", command, "0123456789", "--json")
            assert (result.code, result.json["error"]["code"]) == (2, "CONTRACT_UNKNOWN"), command


class TestTemplate:
    def test_the_copy_in_configs_is_the_same(self) -> None:
        packaged = ROOT / "server" / "fedpact_server" / "templates" / "contract.toml"
        assert (ROOT / "configs" / "contract.toml").read_bytes() == packaged.read_bytes()

    def test_the_settings_in_configs_are_what_init_writes(self) -> None:
        settings = Settings(
            name="City Data Group", entity_code="91310000MA1K999999", hosts=("fl.example.cn",), port=8443
        )
        assert (ROOT / "configs" / "operator.toml").read_text("utf-8") == _settings_text(settings)

    def test_it_is_written_and_makes_a_contract(self, run: Run, admitted: Path) -> None:
        assert run("contract", "template", "--out", "mine.toml").code == 0
        text = Path("mine.toml").read_text()
        assert run("contract", "template").out == text
        packaged = (ROOT / "configs" / "contract.toml").read_text()
        today = utc_now()
        packaged = packaged.replace("2026-12-01T", f"{today:%Y-%m-%dT}")
        assert text == packaged.replace("2027-11-30T", f"{today + datetime.timedelta(days=365):%Y-%m-%dT}")
        assert run("contract", "template", "--out", "mine.toml").code == 2
        operator = OperatorHome.open(admitted)
        database = operator.database()
        columns = ("age", "cholesterol", "sex")
        for number in (1, 2, 3):
            who = enterprise(number)
            card = who.card(data_set=f"heart-{number}", columns=columns, label="disease")
            with database.write() as connection:
                cards.accept_card(connection, enrolment.find(connection, who.id), card, [])
        database.dispose()
        rows = "age,cholesterol,sex,disease\n" + "".join(
            f"{30 + i},2{i:02d},female,{'no' if i % 2 else 'yes'}\n" for i in range(20)
        )
        Path("rows.csv").write_text(rows)
        result = run("contract", "new", "mine.toml", "--validation", "rows.csv", "--json")
        assert result.code == 0, result
        assert result.json["contract"]["term"]["not_before"] <= instant(today)

    def test_a_card_is_shown_with_the_contracts_that_were_made_by_it(self, run: Run, admitted: Path) -> None:
        contract_id = drafted(run)
        who = enterprise(2)
        shown = run("participant", "card", who.name)
        assert shown.code == 0
        assert f"Contract {contract_id[:12]} was made by this card" in shown.out
        assert run("participant", "card", who.name, "--json").json["contracts"] == [
            {"id": contract_id, "this_card": True}
        ]
        lacking = run("participant", "card", who.name, "--format", "croissant", "--json")
        assert (lacking.code, lacking.json["error"]["code"]) == (2, "CARD_CROISSANT")
        facts = dict.fromkeys(("title", "description", "license", "creator"), "x")
        facts |= {"url": "https://x.example", "published": "2026-11-01"}
        database = OperatorHome.open(admitted).database()
        with database.write() as connection:
            member = enrolment.find(connection, who.id)
            cards.accept_card(connection, member, who.card(facts=Facts(**facts)), [])
        database.dispose()
        assert "was made by an EARLIER card" in run("participant", "card", who.name).out
        assert run("participant", "list", "--json").json["alarms"][0]["code"] == "CARD_CHANGED"
        assert run("participant", "card", who.name, "--format", "croissant", "--out", "c.jsonld").code == 0
        assert json.loads(Path("c.jsonld").read_text())["conformsTo"] == "http://mlcommons.org/croissant/1.1"
        none = run("participant", "card", who.name, "--data-set", "another", "--json")
        assert (none.code, none.json["error"]["code"]) == (2, "CARD_UNKNOWN")

    def test_a_card_that_tells_entities_apart_is_said_where_the_template_protects_none(
        self, run: Run, admitted: Path
    ) -> None:
        drafted(run)
        again = ("contract", "new", "template.toml", "--validation", "rows.csv")
        assert "says whose a row is" not in run(*again).err
        database = OperatorHome.open(admitted).database()
        who = enterprise(2)
        with database.write() as connection:
            cards.accept_card(connection, enrolment.find(connection, who.id), who.card(entity="patient"), [])
        database.dispose()
        made = run(*again)
        assert made.code == 0
        assert f"Note: the card of {who.name} says whose a row is (patient)" in made.err
        assert "[privacy.entity]" in made.err
        assert made.err.count("Note:") == 1

    def test_a_term_that_has_not_begun_is_said_before_anybody_signs(self, run: Run, admitted: Path) -> None:
        note = "Note: the term begins at 2099-01-01T00:00:00Z; until then no run starts"
        contract_id = drafted(run)
        assert "Note: the term" not in run("contract", "offer", contract_id).err
        template = Path("template.toml").read_text()
        term = '[term]\nnot_before = "2099-01-01T00:00:00Z"\nnot_after = "2099-12-01T00:00:00Z"\n'
        Path("later.toml").write_text(re.sub(r"(?s)\[term\]\n.*?Z\"\n.*?Z\"\n", term, template))
        made = run("contract", "new", "later.toml", "--validation", "rows.csv")
        assert made.code == 0
        assert note in made.err
        later = made.out.split()[1]
        assert note in run("contract", "offer", later).err

    def test_every_key_is_documented(self) -> None:
        """Each key's first appearance follows a comment, or stands in a block that begins with one."""
        lines = (ROOT / "configs" / "contract.toml").read_text().splitlines()
        seen: set[tuple[str, str]] = set()
        table, commented = "", False
        for line in lines:
            if line.startswith("["):
                table = line.strip("[]")
            elif line.startswith("#"):
                commented = True
                continue
            elif " = " in line and (place := (table, line.split(" = ")[0])) not in seen:
                seen.add(place)
                self_evident = {"name", "kind", "low", "high", "missing", "values", "currency", "trust_model"}
                assert commented or place[1] in self_evident | {"not_before", "not_after"}, place
            commented = commented and not line.strip()
        assert len(seen) > 30
        assert load_toml("\n".join(lines))["title"]


class TestServe:
    def test_without_a_home(self, run: Run) -> None:
        result = run("serve", "--json")
        assert (result.code, result.json["error"]["code"]) == (2, "HOME_MISSING")

    def test_bad_ports(self, run: Run, home: Path) -> None:
        assert run("serve", "--port", "0").code == 2
        assert run("serve", "--port", "70000").code == 2


class TestEveryCommand:
    @pytest.mark.parametrize(
        "command",
        [
            ("init",),
            ("serve",),
            ("audit-privacy",),
            *(("participant", name) for name in ("invite", "approve", "list", "revoke")),
            *(("contract", name) for name in ("template", "new", "offer", "sign", "show", "status", "terminate")),
        ],
        ids=" ".join,
    )
    def test_help_has_an_example(self, run: Run, command: tuple[str, ...]) -> None:
        result = run(*command, "--help")
        assert result.code == 0
        assert f"Example: fedpact {' '.join(command)}" in " ".join(result.out.split())

    def test_home_comes_from_the_environment_too(
        self, run: Run, secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run(*INIT, "--passphrase-file", str(secret), "--home", "there")
        assert run("participant", "list").code == 2
        monkeypatch.setenv("FEDPACT_HOME", str(tmp_path / "there"))
        assert run("participant", "list").code == 0

    def test_help_answers_at_once(self) -> None:
        """Processor seconds, for other work shares the machine: half a second is the limit on an idle one."""
        script = shutil.which("fedpact", path=str(Path(sys.executable).parent))
        assert script is not None
        times = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([script, "--help"], check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert min(times) < 0.5

    def test_the_command_modules_import_nothing_heavy(self) -> None:
        names = ", ".join(f"fedpact_server.cli_{name}" for name in GROUPS)
        code = (
            f"import sys, {names}; "
            "print([m for m in ('torch', 'polars', 'sqlalchemy', 'fastapi', 'flwr', 'numpy', 'dp_accounting', 'opacus')"
            " if m in sys.modules])"
        )
        shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert shown.stdout.strip() == "[]"


def test_the_clock_of_the_tests_lies_within_the_template(run: Run) -> None:
    assert "2026-11-01T00:00:00Z" < NOW.isoformat() < "2099-11-01T00:00:00Z"
    assert "2026-11-01" in TEMPLATE
    assert "2099-11-01" in TEMPLATE
