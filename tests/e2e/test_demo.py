"""The main job: one command, a real federation, a statement whose every fen is recomputed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import pytest
from tests.support.proc import mentioning

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]


def fedpact(*arguments: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("FEDPACT_")}
    return subprocess.run(
        [str(BIN / arguments[0]), *arguments[1:]], capture_output=True, text=True, timeout=400, env=env, check=False
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One demo of two rounds; what it printed and where it lies."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    done = subprocess.run(
        [str(BIN / "fedpact"), "demo", "--rounds", "2", "--dir", str(folder), "--json"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 1, "one JSON object on stdout, nothing else"
    return json.loads(lines[0]), folder


def test_the_result_has_everything_that_is_promised(demo) -> None:
    result, folder = demo
    assert {
        *("contract_id", "run_id", "rounds", "seconds", "metric", "pool_fen", "participants"),
        *("evidence", "trust", "report", "model"),
    } <= result.keys()
    assert result["rounds"] == 2
    assert set(result["metric"]) == {"name", "initial", "final"}
    assert float(result["metric"]["final"]) > float(result["metric"]["initial"]) + 0.3
    assert result["pool_fen"] == 100_000_000
    participants = result["participants"]
    assert len(participants) == 4
    for line in participants:
        assert {
            *("id", "share", "share_low", "share_high", "fen", "epsilon_spent", "epsilon_budget", "num_examples"),
        } <= line.keys()
        assert 0 <= Decimal(line["share_low"]) <= Decimal(line["share"]) <= Decimal(line["share_high"]) <= 1
        assert 0 < Decimal(line["epsilon_spent"]) <= Decimal(line["epsilon_budget"]) == 2
    assert sum(line["fen"] for line in participants) == result["pool_fen"]
    assert abs(sum(Decimal(line["share"]) for line in participants) - 1) < Decimal("1e-8")
    for name in ("evidence", "trust", "report", "model"):
        assert Path(result[name]).exists()
    assert not Path(result["trust"]).is_relative_to(result["evidence"])
    assert folder in Path(result["report"]).parents


def test_no_process_is_left(demo) -> None:
    _, folder = demo
    assert mentioning(str(folder)) == {}


def test_verify_says_zero_one_three_and_four(demo, tmp_path) -> None:
    result, _ = demo
    evidence, trust = result["evidence"], Path(result["trust"])
    assert fedpact("fedpact", "verify", evidence, "--trust", str(trust)).returncode == 0
    without = fedpact("fedpact", "verify", evidence)
    assert without.returncode == 3
    assert "NOT AUTHENTICATED" in without.stdout
    partly = tmp_path / "partly.toml"
    partly.write_text("[[party]]" + trust.read_text().split("[[party]]")[1])
    assert fedpact("fedpact", "verify", evidence, "--trust", str(partly)).returncode == 4
    copy = tmp_path / "evidence"
    shutil.copytree(evidence, copy)
    for name in ("log.jsonl", "leaves.txt", "checkpoints.jsonl", "countersignatures.jsonl"):
        original = (copy / name).read_bytes()
        place = len(original) // 2
        (copy / name).write_bytes(original[:place] + bytes([original[place] ^ 1]) + original[place + 1 :])
        found = fedpact("fedpact", "verify", str(copy), "--trust", str(trust), "--json")
        (copy / name).write_bytes(original)
        assert found.returncode == 1, name
        faults = json.loads(found.stdout)["faults"]
        assert faults, name
        assert any(name in f.get("file", "") or f.get("field") for f in faults), name


def test_the_report_is_one_file_that_fetches_nothing(demo) -> None:
    result, _ = demo
    text = Path(result["report"]).read_text("utf-8")
    assert "<script" not in text
    assert text.count("http") == text.count("http://www.w3.org/2000/svg")
    for line in result["participants"]:
        assert line["name"] in text
    assert text.count("<svg") >= 4
    assert "Not covered by the contract" in text, "the lift is marked"


def test_the_model_predicts_and_its_digest_is_in_the_log(demo, tmp_path) -> None:
    result, folder = demo
    card = json.loads(Path(result["model"]).with_suffix(".json").read_text("utf-8"))
    log = (Path(result["evidence"]) / "log.jsonl").read_text("utf-8")
    assert card["model_digest"] in log
    assert card["contract_id"] == result["contract_id"]
    validation = folder / "validation" / "digits.csv"
    done = fedpact("fedpact", "predict", result["model"], str(validation), "--json")
    assert done.returncode == 0, done.stderr
    predictions = json.loads(done.stdout)["predictions"]
    truth = [line.rsplit(",", 1)[1] for line in validation.read_text().splitlines()[1:]]
    right = sum(p["predicted"] == t for p, t in zip(predictions, truth, strict=True))
    assert right / len(truth) == pytest.approx(float(result["metric"]["final"]), abs=1e-6)
    short = tmp_path / "short.csv"
    short.write_text("pixel_0_0\n3\n")
    bad = fedpact("fedpact", "predict", result["model"], str(short))
    assert bad.returncode == 2
    assert "DATA_COLUMN_MISSING" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_each_agent_shows_what_left_and_what_was_spent(demo) -> None:
    result, folder = demo
    for index in range(4):
        home = str(folder / f"enterprise-{index + 1}" / "agent")
        left = json.loads(fedpact("fedpact-agent", "egress", "--home", home, "--json").stdout)["egress"]
        kinds = [entry["kind"] for entry in left]
        assert kinds.count("update") == result["rounds"]
        assert {"enrolment", "card", "signature", "countersignature"} <= set(kinds)
        spent = json.loads(fedpact("fedpact-agent", "budget", "--home", home, "--json").stdout)["data_sets"]
        assert len(spent) == 1


def test_keys_are_their_owners_alone(demo) -> None:
    _, folder = demo
    secrets = [*folder.rglob("*.key"), *folder.rglob("passphrase"), *folder.rglob("*.passphrase")]
    assert len(secrets) >= 4 * 3 + 3
    for path in secrets:
        assert path.stat().st_mode & 0o077 == 0, path


def test_no_secret_stands_in_a_log(demo) -> None:
    _, folder = demo
    passphrases = [p.read_text().strip() for p in folder.rglob("*passphrase")]
    text = b"".join(p.read_bytes() for p in folder.rglob("*.log")).decode(errors="replace")
    assert text
    for secret in passphrases:
        assert secret not in text
    assert "PRIVATE KEY" not in text


def start_demo(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(BIN / "fedpact"), "demo", "--rounds", "50", "--no-lift", "--dir", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(what, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.2)
    return False


def test_ctrl_c_ends_every_process(tmp_path) -> None:
    folder = tmp_path / "run"
    process = start_demo(folder)
    try:
        assert wait_for(lambda: (folder / "logs" / "enterprise-4.log").exists(), 240)
        time.sleep(2)
        assert mentioning(str(folder))
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, out
    assert "Traceback" not in out
    assert wait_for(lambda: not mentioning(str(folder)), 10), mentioning(str(folder))


def test_a_failed_step_says_what_and_leaves_nothing(tmp_path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "federation.toml").write_text(
        """
title = "Broken"
purpose = "test"
participants = [
  { name = "A", sector = "medical", file = "a.csv" },
  { name = "B", sector = "medical", file = "b.csv" },
]
columns = [{ name = "x", kind = "number", low = 0, high = 1, missing = "refuse" }]
label = { name = "y", classes = ["0", "1"], rule = "value" }
validation = { file = "a.csv" }
"""
    )
    (data / "a.csv").write_text("x,y\n0.5,1\n")
    (data / "b.csv").write_text("x\n0.5\n")
    done = fedpact("fedpact", "demo", "--data", str(data), "--dir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "DATA_LABEL_MISSING" in done.stderr
    assert "b.csv" in done.stderr
    assert "Traceback" not in done.stderr
    assert mentioning(str(tmp_path / "run")) == {}


@pytest.mark.data
def test_somebodys_own_data(tmp_path, data_dir) -> None:
    """The four hospitals of the heart data, which release a fifth of their rows and are not scored on their own."""
    folder = tmp_path / "heart"
    folder.mkdir()
    shutil.copy(ROOT / "configs" / "heart" / "federation.toml", folder)
    for name in ("cleveland", "hungarian", "switzerland", "va"):
        shutil.copy(data_dir / "heart_disease" / f"processed.{name}.data", folder)
    run = tmp_path / "run"
    done = fedpact("fedpact", "demo", "--data", str(folder), "--rounds", "2", "--dir", str(run), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert sum(line["fen"] for line in result["participants"]) == result["pool_fen"]
    assert result["lift"] is None, "the comparison reads everybody's rows: only when it is asked for"
    report = json.loads((run / "report.json").read_text("utf-8"))
    assert float(report["settlement"]["own_slice_difference"]) != 0
    released = sorted(run.glob("enterprise-*/agent/released/*.jsonl"))
    assert len(released) == 4
    card = fedpact("fedpact", "verify", result["evidence"], "--trust", result["trust"])
    assert card.returncode == 0, card.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--participants", "2"], "DEMO_PARTICIPANTS"),
        (["--revenue", "-5"], "MONEY"),
        (["--revenue", "1.234"], "MONEY_DECIMALS"),
        (["--data", "/nowhere"], "DATA_DESCRIPTION"),
    ],
)
def test_bad_options_are_named(tmp_path, arguments, code) -> None:
    done = fedpact("fedpact", "demo", "--dir", str(tmp_path / "run"), *arguments)
    assert done.returncode == 2
    assert code in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_named(demo, tmp_path) -> None:
    home = tmp_path / "operator"
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("a long enough one\n")
    passphrase.chmod(0o600)
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        made = fedpact(
            *("fedpact", "init", "--home", str(home), "--name", "O", "--entity-code", "9" * 18),
            *("--host", "127.0.0.1", "--port", str(port), "--passphrase-file", str(passphrase)),
        )
        assert made.returncode == 0, made.stderr
        done = fedpact("fedpact", "serve", "--home", str(home))
    assert done.returncode == 2
    assert "PORT_TAKEN" in done.stderr
    assert str(port) in done.stderr
    assert mentioning(str(home)) == {}
