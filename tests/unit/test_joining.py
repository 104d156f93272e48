"""docs/joining.md: every command that it shows is run here, with this test's own names in place of the page's."""

import json
from pathlib import Path

import httpx
import pytest
from tests.support.agent_world import lab
from tests.support.command import runner
from tests.support.demo_kit import demo_setup, one_thread
from tests.support.readme import Script, commands, filled

from fedpact_client import quote
from fedpact_client.cli import main
from fedpact_server.demo import scenario as scenarios

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "joining.md").read_text("utf-8")


def test_the_quotes_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quote, "MAX_DRAWS", quote.MIN_DRAWS)
    script, run = Script(commands(TEXT, "A quote")), runner(monkeypatch, capsys, main, "fedpact-agent")
    with one_thread(), lab(tmp_path) as made:
        monkeypatch.setattr(httpx.HTTPTransport, "handle_request", lambda _, request: made.wire.handle_request(request))
        made.configure()
        made.enrol()
        made.approve()
        made.declare()
        values = {"3f2a91c0": made.offer().id[:8], "agent": str(made.home.path)}
        for beginning in ("fedpact-agent quote 3f2a91c0", "fedpact-agent quote offered.json"):
            words = filled(script.take(beginning), values)
            code, out, err = run(*words[1:], "--json")
            assert code == 0, err
            assert json.loads(out)["share"]["simulated"]["draws"] == quote.MIN_DRAWS
            made.wire.cut_before = "/"
    script.done()


def test_the_retraining_audits_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    script, run = Script(commands(TEXT, "The retraining audit")), runner(monkeypatch, capsys)
    setup = demo_setup(tmp_path / "data", 3, rounds=1)
    contract = setup.federation(tmp_path / "demo", 1).contract
    coded = contract.plain()
    for index, party in enumerate(coded["participants"]):
        party["entity_code"] = scenarios.entity_code(index)
    Path("contract.json").write_bytes(type(contract).parse(coded).to_bytes())
    folder = digits_described(tmp_path / "own", tmp_path / "more")
    with one_thread():
        for more in ("--simulate", "--data DIR"):
            words = filled(script.take(f"fedpact contribution retrain contract.json {more}"), {"DIR": str(folder)})
            code, out, err = run(*words[1:], "--json")
            assert code == 0, err
            assert json.loads(out)["method"] == "shapley"
    script.done()


def digits_described(folder: Path, data: Path) -> Path:
    """The demo's files, all CSV, as somebody's own data."""
    from fedpact_models.tables import read_table

    folder.mkdir()
    found = scenarios.of_digits(data, 3)
    lines = []
    for index, enterprise in enumerate(found.enterprises):
        read_table(**enterprise.source).write_csv(folder / f"{index}.csv")
        lines.append(f'{{ name = "{enterprise.name}", sector = "trade", file = "{index}.csv" }}')
    assert found.validation is not None
    read_table(**found.validation).write_csv(folder / "validation.csv")
    pixels = [
        f'{{ name = "{c.name}", kind = "number", low = 0, high = 16, missing = "refuse" }}' for c in found.data.columns
    ]
    classes = ", ".join(f'"{digit}"' for digit in range(10))
    (folder / "federation.toml").write_text(
        f"""title = "Digits"
purpose = "digit-recognition"
columns = [{", ".join(pixels)}]
label = {{ name = "digit", classes = [{classes}], rule = "value" }}
validation = {{ file = "validation.csv" }}
participants = [{", ".join(lines)}]
[training]
rounds = 1
local_steps = 6
learning_rate = 4
[privacy]
epsilon = 2
delta = 0.00001
max_grad_norm = 1
sample_rate = 0.2
spare_attempts = 1
data_set_epsilon = 8
""",
        "utf-8",
    )
    return folder
