"""What people install: the wheel alone verifies, without torch and Flower; with its extras it runs the demo."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from email import message_from_bytes
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tests.support import wheels
from tests.support.evidence_factory import make_evidence
from tests.support.proc import mentioning
from tests.support.required import REQUIRED

from fedpact_contract.trust import Trust, write

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
ROOT = wheels.ROOT
HEAVY = {"torch", "flwr", "opacus", "polars", "fastapi", "sqlalchemy", "httpx", "uvicorn", "scikit-learn", "structlog"}
OFFLINE = ("NewConnectionError", "ReadTimeoutError", "ConnectTimeoutError", "ProxyError")
"""What pip says when it reaches no index."""


def run(command: list[str | Path], cwd: Path, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a command from a folder, with nothing of this environment but where programs are."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FEDPACT_", "PYTHON", "VIRTUAL_ENV"))}
    line = list(map(str, command))
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=env, timeout=seconds, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return wheels.build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def base(wheel, tmp_path_factory) -> Path:
    """The folder with the commands of an auditor's environment."""
    python = wheels.make_venv(tmp_path_factory.mktemp("base") / "venv")
    done = wheels.pip(python, "install", "-c", str(ROOT / "constraints.txt"), str(wheel))
    if done.returncode and not REQUIRED and any(sign in done.stderr for sign in OFFLINE):
        pytest.skip("needs a package index")
    assert done.returncode == 0, done.stderr
    return python.parent


@pytest.fixture(scope="module")
def evidence(tmp_path_factory) -> Path:
    """A folder with evidence and a trust file."""
    folder = tmp_path_factory.mktemp("auditor")
    made = make_evidence()
    made.write(folder / "evidence")
    write(folder / "trust.toml", Trust.of(made.contract))
    return folder


@pytest.fixture(scope="module")
def place(wheel, tmp_path_factory) -> Path:
    """The folder with the commands of an environment that holds the wheel with its extra `demo`."""
    python = wheels.make_venv(tmp_path_factory.mktemp("elsewhere") / "venv")
    wheels.link(list(wheels.closure(requirements(wheel, "agent", "server", "demo")).values()), python)
    # Without an index: pip agrees that everything which the wheel asks for is there, or it fails.
    done = wheels.pip(python, "install", "--no-index", f"fedpact[demo] @ {wheel.as_uri()}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert wheels.pip(python, "check").returncode == 0
    return python.parent


@pytest.fixture(scope="module")
def demo(place, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """What one round printed, and the folder that it was started from."""
    folder = tmp_path_factory.mktemp("somewhere")
    # The comparison of together and alone is the checkout's demo's; three is the fewest with this data.
    line = [place / "fedpact", "demo", "--rounds", "1", "--participants", "3", "--no-lift", "--json"]
    done = run([*without_checkout(), *line], folder, seconds=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (text,) = done.stdout.splitlines()
    return json.loads(text), folder


class TestTheAuditorsInstall:
    """The wheel and its base dependencies, as `pip install fedpact` brings them."""

    def test_it_has_neither_torch_nor_flower(self, wheel, base) -> None:
        found = wheels.installed(base / "python")
        wanted = {"fedpact", *wheels.closure(requirements(wheel))}
        assert set(found) == wanted, "the wheel, and what its base dependencies bring"
        assert not HEAVY & set(found)
        absent = run([base / "python", "-c", "import torch"], base)
        assert "No module named 'torch'" in absent.stderr

    def test_verify_says_zero_one_three_and_four(self, base, evidence, tmp_path) -> None:
        def verify(folder: Path, *more: str | Path) -> tuple[int, dict[str, Any]]:
            done = run([base / "fedpact", "verify", folder, *more, "--json"], tmp_path)
            assert done.stderr == ""
            return done.returncode, json.loads(done.stdout)

        trust = evidence / "trust.toml"
        code, report = verify(evidence / "evidence", "--trust", trust)
        assert (code, report["faults"]) == (0, [])
        assert report["participants"]
        assert verify(evidence / "evidence")[0] == 3
        partly = tmp_path / "partly.toml"
        partly.write_text("[[party]]" + trust.read_text().split("[[party]]")[1])
        assert verify(evidence / "evidence", "--trust", partly)[0] == 4
        changed = shutil.copytree(evidence / "evidence", tmp_path / "evidence")
        data = bytearray((changed / "log.jsonl").read_bytes())
        data[len(data) // 2] ^= 1
        (changed / "log.jsonl").write_bytes(data)
        code, report = verify(changed, "--trust", trust)
        assert code == 1
        assert any(fault["file"].endswith("log.jsonl") for fault in report["faults"])

    def test_a_game_is_recomputed(self, base, tmp_path) -> None:
        values = {"": 0, "l": 0, "r": 0, "s": 0, "l,r": 1, "l,s": 1, "r,s": 0, "l,r,s": 1}
        (tmp_path / "glove.json").write_text(json.dumps({"players": ["l", "r", "s"], "values": values}))
        done = run([base / "fedpact", "contribution", "recompute", "glove.json", "--json"], tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["shapley"] == {"l": "2/3", "r": "1/6", "s": "1/6"}

    @pytest.mark.parametrize(
        ("command", "extra"),
        [
            ("fedpact demo", "demo"),
            ("fedpact serve --home operator", "server"),
            ("fedpact contract new template.toml", "server"),
            ("fedpact-agent start --home agent", "agent"),
        ],
    )
    def test_what_is_not_installed_is_named(self, base, tmp_path, command, extra) -> None:
        program, *arguments = command.split()
        if program == "fedpact-agent":
            self.make_agent(base, tmp_path)
        done = run([base / program, *arguments], tmp_path)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("EXTRA_MISSING: ")
        assert f"fedpact[{extra}]" in done.stderr
        assert "Traceback" not in done.stderr
        done = run([base / program, *arguments, *(["--json"] if program == "fedpact" else [])], tmp_path)
        assert done.returncode == 2
        if program == "fedpact":
            assert json.loads(done.stdout)["error"]["code"] == "EXTRA_MISSING"

    def test_help_is_there(self, base, tmp_path) -> None:
        for program, words in (("fedpact", ("verify", "contribution")), ("fedpact-agent", ("enrol", "sign", "budget"))):
            done = run([base / program, "--help"], tmp_path)
            assert (done.returncode, done.stderr) == (0, ""), program
            assert all(word in done.stdout for word in words), program

    @staticmethod
    def make_agent(base: Path, folder: Path) -> None:
        """An agent's home: keys and ledgers need the base alone."""
        (folder / "passphrase").write_text("a long enough one\n")
        (folder / "passphrase").chmod(0o600)
        line = ["init", "--home", "agent", "--name", "A", "--entity-code", "9" * 18, "--sector", "medical"]
        done = run([base / "fedpact-agent", *line, "--passphrase-file", "passphrase"], folder)
        assert done.returncode == 0, done.stderr


class TestTheWheelhouse:
    """scripts/wheelhouse.sh: made where there is an index, installed where there is no network, from pinned files."""

    @pytest.fixture(scope="class")
    def house(self, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("house") / "wheels"
        done = self.script("build", folder, "none")
        if done.returncode and not REQUIRED and any(sign in done.stderr for sign in OFFLINE):
            pytest.skip("needs a package index")
        assert done.returncode == 0, done.stderr
        digest = hashlib.sha256((folder / "requirements.txt").read_bytes()).hexdigest()
        assert done.stdout.split()[-1] == digest
        return folder

    @staticmethod
    def script(*arguments: str | Path, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        env = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "YES": "1"}
        env |= {k: v for k, v in os.environ.items() if k == "HOME" or k.startswith("PIP_")}
        line = [*prefix, str(ROOT / "scripts" / "wheelhouse.sh"), *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, env=env, timeout=900, check=False)

    @pytest.mark.root
    def test_it_installs_without_a_network_what_was_built(self, house, evidence, tmp_path) -> None:
        done = self.script("install", house, tmp_path / "venv", prefix=("unshare", "-n"))
        assert done.returncode == 0, done.stderr
        assert "No broken requirements found." in done.stdout
        pinned = {line.split("==")[0] for line in (house / "requirements.txt").read_text().splitlines()}
        assert set(wheels.installed(tmp_path / "venv" / "bin" / "python")) - {"pip", "setuptools"} == {
            canonicalize_name(name) for name in pinned
        }
        verified = run(
            [
                tmp_path / "venv" / "bin" / "fedpact",
                "verify",
                evidence / "evidence",
                "--trust",
                evidence / "trust.toml",
            ],
            tmp_path,
        )
        assert verified.returncode == 0, verified.stderr

    def test_a_changed_file_is_not_installed(self, house, tmp_path) -> None:
        other = Path(shutil.copytree(house, tmp_path / "house"))
        (wheel,) = other.glob("click-*.whl")
        with ZipFile(wheel, "a") as archive:
            archive.writestr("click/more.py", "")
        done = self.script("install", other, tmp_path / "venv")
        assert done.returncode == 1
        assert "HASH" in done.stderr.upper()
        assert not (tmp_path / "venv").exists()

    def test_wrong_usage_shows_how(self, tmp_path) -> None:
        done = self.script("install", tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert "wheelhouse.sh build FOLDER" in done.stderr
        assert self.script("install", tmp_path, tmp_path / "v").returncode == 2


class TestTheWheelElsewhere:
    """The wheel with its extra `demo`, in an environment of its own; the third-party packages are those of this one.

    They are hard links and no search path into the other environment: so the new one holds exactly what the wheel's
    metadata asks for, and the trainer, which may read its own environment only, finds them there.
    """

    def test_every_package_lies_there(self, place, tmp_path) -> None:
        names = ("fedpact_contract", "fedpact_models", "fedpact_client", "fedpact_server", "torch", "flwr")
        code = f"import importlib, json, sys; m = map(importlib.import_module, {names}); "
        code += "print(json.dumps([[x.__file__ for x in m], sys.path]))"
        done = run([place / "python", "-c", code], tmp_path)
        assert done.returncode == 0, done.stderr
        files, paths = json.loads(done.stdout)
        assert all(Path(file).is_relative_to(place.parent) for file in files), files
        assert not any(Path(path).is_relative_to(ROOT) for path in paths), paths

    def test_the_demo_keeps_its_promises(self, demo) -> None:
        result, folder = demo
        assert {
            *("contract_id", "run_id", "rounds", "seconds", "metric", "pool_fen", "participants"),
            *("evidence", "trust", "report", "model"),
        } <= result.keys()
        assert result["rounds"] == 1
        assert len(result["participants"]) == 3
        assert sum(line["fen"] for line in result["participants"]) == result["pool_fen"] == 100_000_000
        for name in ("evidence", "trust", "report", "model"):
            path = Path(result[name])
            assert path.exists()
            assert path.is_relative_to(folder), "without --dir, below the folder that it was started from"

    def test_its_evidence_is_verified_there(self, place, demo) -> None:
        result, folder = demo
        done = run([place / "fedpact", "verify", result["evidence"], "--trust", result["trust"]], folder)
        assert done.returncode == 0, done.stdout + done.stderr

    def test_its_trainers_are_closed_in_as_ever(self, demo) -> None:
        _, folder = demo
        code = "from fedpact_client.sandbox import close_in; print(close_in([]).sentence)"
        here = run([sys.executable, "-I", "-c", code], folder).stdout.strip()
        logs = list(folder.rglob("trainer.log"))
        assert len(logs) == 3
        for log in logs:
            ready = [line for line in log.read_text().splitlines() if "trainer ready" in line]
            assert ready
            assert all(f"isolation={here}" in line or f"isolation='{here}'" in line for line in ready), ready

    def test_nothing_of_it_is_left_running(self, place, demo) -> None:
        assert mentioning(str(place)) == {}


def requirements(wheel: Path, *extras: str) -> list[str]:
    """What the wheel's metadata asks for, with these extras; itself excepted."""
    with ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        needs = [Requirement(text) for text in message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])]
    wanted = []
    for need in needs:
        if need.name != "fedpact" and any(
            need.marker is None or need.marker.evaluate({"extra": e}) for e in ("", *extras)
        ):
            need.marker = None
            wanted.append(str(need))
    return wanted


def without_checkout() -> list[str]:
    """Before a command: it sees an empty folder where the checkout is. As root only; elsewhere nothing."""
    line = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(ROOT)]
    works = os.geteuid() == 0 and subprocess.run([*line, "true"], capture_output=True, check=False).returncode == 0
    assert works or not REQUIRED, "FEDPACT_REQUIRE=1, and the checkout cannot be hidden here"
    return line if works else []
