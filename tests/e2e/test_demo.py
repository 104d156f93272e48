"""The main job: one command, a real federation, a statement whose every fen is recomputed."""

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tests.support.demo_kit import own_data
from tests.support.proc import mentioning, with_default_signals

from fedpact_server.demo import times

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]


def fedpact(*arguments: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("FEDPACT_")}
    return subprocess.run(
        [str(BIN / arguments[0]), *arguments[1:]], capture_output=True, text=True, timeout=400, env=env, check=False
    )


def start(*arguments: str) -> subprocess.Popen[str]:
    """A demo in the background; it has no terminal, and is no child of a shell that ignores Ctrl-C."""
    return subprocess.Popen(
        [str(BIN / "fedpact"), "demo", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=with_default_signals,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    (line,) = out.splitlines()  # one JSON object on stdout, nothing else
    return json.loads(line)


def hearts_or_own(folder: Path, data_dir: Path) -> Path:
    """Somebody's own data: four hospitals where their data is at hand, and two made-up participants elsewhere."""
    source = data_dir / "heart_disease"
    if not source.is_dir():
        return own_data(folder)
    folder.mkdir()
    shutil.copy(ROOT / "configs" / "heart" / "federation.toml", folder)
    for name in ("cleveland", "hungarian", "switzerland", "va"):
        shutil.copy(source / f"processed.{name}.data", folder)
    return folder


def names_in(description: Path) -> list[str]:
    return [p["name"] for p in tomllib.loads(description.read_text("utf-8"))["participants"]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory, data_dir) -> Iterator[dict[str, tuple[dict[str, Any], Path]]]:
    """Two demos side by side: the usual one, and one on own data whose processes stay."""
    place = tmp_path_factory.mktemp("demo")
    lines = {
        "usual": ["--rounds", "2"],
        "kept": ["--data", str(hearts_or_own(place / "own", data_dir)), "--rounds", "2", "--keep"],
    }
    started = {name: start("--dir", str(place / name), "--json", *line) for name, line in lines.items()}
    try:
        yield {name: (finish(process), place / name) for name, process in started.items()}
    finally:
        for process in started.values():
            process.terminate()
            process.communicate()
        for pid in mentioning(str(place / "kept")):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def demo(pair) -> tuple[dict[str, Any], Path]:
    """What the usual demo printed and where it lies."""
    return pair["usual"]


def port_of(folder: Path) -> int:
    return int(tomllib.loads((folder / "operator" / "operator.toml").read_text("utf-8"))["port"])


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

    def shown(index: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        home = str(folder / f"enterprise-{index + 1}" / "agent")
        left = json.loads(fedpact("fedpact-agent", "egress", "--home", home, "--json").stdout)["egress"]
        return left, json.loads(fedpact("fedpact-agent", "budget", "--home", home, "--json").stdout)["data_sets"]

    with ThreadPoolExecutor(4) as pool:
        for left, spent in pool.map(shown, range(4)):
            kinds = [entry["kind"] for entry in left]
            assert kinds.count("update") == result["rounds"]
            assert {"enrolment", "card", "signature", "countersignature"} <= set(kinds)
            assert len(spent) == 1


def test_a_quote_says_what_left_and_what_was_charged(demo) -> None:
    """Bytes within 1 % of the egress ledger of a run over the wire, all that is of the contract but questions."""
    result, folder = demo
    home = ("--home", str(folder / "enterprise-1" / "agent"))
    quoted = fedpact("fedpact-agent", "quote", result["evidence"], "--seconds", "0", *home, "--json")
    assert quoted.returncode == 0, quoted.stderr
    egress = json.loads(fedpact("fedpact-agent", "egress", *home, "--json").stdout)["egress"]
    left = {kind: sum(e["bytes"] for e in egress if e["kind"] == kind) for kind in ("update", "signature")}
    left["countersignature"] = sum(e["bytes"] for e in egress if e["kind"] == "countersignature")
    out = json.loads(quoted.stdout)["bytes"]["out"]
    assert left["update"] > 2 * 4 * 650
    for told, kind in (("updates", "update"), ("signature", "signature"), ("countersignature", "countersignature")):
        assert out[told] == pytest.approx(left[kind], rel=0.01)
    assert out["total"] == pytest.approx(sum(left.values()), rel=0.01)


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


def wait_for(what: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.1)
    return False


def test_two_demos_side_by_side_both_succeed(pair) -> None:
    assert port_of(pair["usual"][1]) != port_of(pair["kept"][1])
    for result, _ in pair.values():
        assert result["verdict"].startswith("VERIFIED")
        assert sum(line["fen"] for line in result["participants"]) == result["pool_fen"]
    result, folder = pair["kept"]
    names = names_in(folder.parent / "own" / "federation.toml")
    assert [line["name"] for line in result["participants"]] == names


def test_participants_stand_in_the_contracts_order(demo) -> None:
    result, _ = demo
    names = ["Harbour Postal Service", "Lakeside Clinic", "Northgate Archive", "Meridian Bank"]
    assert [line["name"] for line in result["participants"]] == names
    assert [line["name"] for line in result["lift"]["participants"]] == names


def test_where_the_time_goes_is_told(demo) -> None:
    result, _ = demo
    assert sum(result["step_seconds"].values()) == pytest.approx(result["seconds"], abs=2)
    assert {"enrolment", "contract", "training", "model, lift and report"} <= result["step_seconds"].keys()
    assert list(result["round_milliseconds"]) == ["1", "2"]
    for parts in result["round_milliseconds"].values():
        assert list(parts) == list(times.PARTS)
        assert 0 < sum(parts.values()) < 10_000


def test_kept_processes_run_until_they_are_killed_by_the_numbers_shown(pair) -> None:
    result, folder = pair["kept"]
    assert set(result["processes"]) == {"City Data Group", *names_in(folder.parent / "own" / "federation.toml")}
    assert json.loads((folder / "processes.json").read_text("utf-8")) == result["processes"]
    for pid in result["processes"].values():
        assert Path(f"/proc/{pid}").exists()
    health = f"https://127.0.0.1:{port_of(folder)}/health"
    context = ssl.create_default_context(cafile=str(folder / "operator" / "tls" / "ca.crt"))
    with urllib.request.urlopen(health, context=context, timeout=10) as answer:
        assert answer.status == 200
    assert result["stop"] == "kill " + " ".join(map(str, result["processes"].values()))
    subprocess.run(result["stop"].split(), check=True)
    assert wait_for(lambda: not mentioning(str(folder)), 30), mentioning(str(folder))


def pid_of(folder: Path, what: str) -> int:
    return min(pid for pid, line in mentioning(str(folder)).items() if what in line)


@dataclass(frozen=True)
class Strike:
    """What happens to a demo when a file of it is there, and the exit code that it then has."""

    sign: str
    act: Callable[[int, Path], None]
    code: int = 1


AGENTS, TRAINED = "run/logs/enterprise-2.log", "run/operator/arrays/*/values-1.f8"
STRIKES = {
    "ctrl-c": Strike(AGENTS, lambda pid, _: os.kill(pid, signal.SIGINT), 130),  # the others: test_demo_processes.py
    "operator": Strike(AGENTS, lambda _, at: os.kill(pid_of(at / "run", "fedpact serve"), signal.SIGKILL)),
    "agent": Strike(TRAINED, lambda _, at: os.kill(pid_of(at / "run", "fedpact-agent start"), signal.SIGKILL)),
    # Gone after the demo has counted its rows: the card cannot be signed.
    "data": Strike("run/logs/operator.log", lambda _, at: (at / "own" / "south.csv").unlink()),
}


@pytest.fixture(scope="module")
def struck(tmp_path_factory) -> dict[str, tuple[int, str, float, Path]]:
    """Demos to which something happens: exit code, what each said, seconds from then on, folder.

    All at one time, on the smallest data: what takes long is that processes start.
    """
    places = {name: tmp_path_factory.mktemp(name) for name in STRIKES}
    started = {
        name: start("--data", str(own_data(at / "own")), "--rounds", "100", "--no-lift", "--dir", str(at / "run"))
        for name, at in places.items()
    }

    def one(name: str) -> tuple[int, str, float, Path]:
        process, strike, at = started[name], STRIKES[name], places[name]
        wait_for(lambda: [*at.glob(strike.sign)] or process.poll() is not None, 240)
        assert process.poll() is None, process.communicate()
        begun = time.monotonic()
        strike.act(process.pid, at)
        out, err = process.communicate(timeout=240)
        return process.returncode, out + err, time.monotonic() - begun, at / "run"

    try:
        with ThreadPoolExecutor(len(STRIKES)) as pool:
            return dict(zip(STRIKES, pool.map(one, STRIKES), strict=True))
    finally:
        for process in started.values():
            process.kill()


@pytest.mark.parametrize("name", STRIKES)
def test_nothing_is_left_of_a_demo_that_is_struck_or_fails(struck, name) -> None:
    code, text, seconds, folder = struck[name]
    assert mentioning(str(folder)) == {}
    assert "Traceback" not in text
    assert code == STRIKES[name].code, text
    assert seconds < 40 or name == "data", "the end takes as long as the slowest process, no longer"
    assert re.search(r"^Stopping \d process(es)?…$", text, re.MULTILINE)
    assert f"Remove it with: rm -r {folder}\n" in text


@pytest.mark.parametrize(("name", "logs"), [("agent", ("enterprise-1", "enterprise-2")), ("operator", ("operator",))])
def test_a_killed_process_is_named_with_step_and_log(struck, name, logs) -> None:
    _, text, _, folder = struck[name]
    assert "DEMO_PROCESS_ENDED" in text
    assert "during the step “" in text
    assert "“training”" in text or name == "operator"
    assert "signal SIGKILL" in text
    assert any(who in text for who in (("North", "South") if name == "agent" else ("City Data Group",)))
    assert any(str(folder / "logs" / f"{log}.log") in text for log in logs)


def test_a_step_that_fails_while_processes_run_tells_the_commands_own_error(struck) -> None:
    _, text, _, folder = struck["data"]
    assert re.search(r"^[A-Z_]{5,}: `fedpact-agent card .*` failed: ", text, re.MULTILINE), text
    assert str(folder.parent / "own" / "south.csv") in text


def test_a_failed_step_says_what_and_leaves_nothing(tmp_path) -> None:
    data = own_data(tmp_path / "data")
    rows = (data / "south.csv").read_text().splitlines()
    (data / "south.csv").write_text("\n".join(",".join(row.split(",")[:2]) for row in rows) + "\n")
    done = fedpact("fedpact", "demo", "--data", str(data), "--dir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "DATA_LABEL_MISSING" in done.stderr
    assert "south.csv" in done.stderr
    assert "Traceback" not in done.stderr
    assert mentioning(str(tmp_path / "run")) == {}


def test_without_the_hearts_data_its_test_is_skipped_and_never_a_failure(tmp_path) -> None:
    """The data is no part of the project, so not even .ci/run may ask for it."""
    line = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        f"{__file__}::test_somebodys_own_data",
    ]
    env = os.environ | {"FEDPACT_REQUIRE": "1", "FEDPACT_DATA": str(tmp_path)}
    done = subprocess.run(line, capture_output=True, text=True, env=env, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout
    assert str(tmp_path) in done.stdout, "with the reason"


@pytest.mark.data("heart_disease")
def test_somebodys_own_data(pair) -> None:
    """The four hospitals of the heart data, which release a fifth of their rows and are not scored on their own."""
    result, run = pair["kept"]
    assert len(result["participants"]) == 4
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
        (["--rounds", "100000"], "DEMO_ROUNDS"),
    ],
)
def test_bad_options_are_named(tmp_path, arguments, code) -> None:
    done = fedpact("fedpact", "demo", "--dir", str(tmp_path / "run"), *arguments)
    assert done.returncode == 2
    assert code in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists(), "what is refused leaves nothing behind"


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
