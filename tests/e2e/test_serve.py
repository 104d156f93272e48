"""`fedpact serve` as a real process: TLS, the path filter, enrolment over the wire, supervision, and a clean end."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.operator_world import ROWS, TEMPLATE, Enterprise, enterprise

from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.contract import Contract
from fedpact_contract.messages import Invitation
from fedpact_contract.request import API, utc_now

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

FEDPACT = str(Path(sys.executable).with_name("fedpact"))
READY_SECONDS = 90.0
PARTIES = tuple(enterprise(n) for n in (1, 2, 3))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for(what: Callable[[], bool], seconds: float = 60.0) -> None:
    patience = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < patience, "too slow"
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    """The living processes below one, at any depth."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        for child in (task / "children").read_text().split():
            found += [int(child), *children(int(child))]
    return [child for child in found if alive(child)]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@dataclass
class Operator:
    """An operator's folder, its port, and the process that serves it."""

    folder: Path
    port: int
    process: "subprocess.Popen[str] | None" = None

    def call(self, *args: str, code: int = 0) -> Any:
        """Run a command with --json."""
        line = [FEDPACT, *args, "--home", str(self.folder / "operator"), "--json"]
        done = subprocess.run(line, capture_output=True, text=True, cwd=self.folder, timeout=120)
        assert done.returncode == code, (args, done.returncode, done.stdout, done.stderr)
        return json.loads(done.stdout)

    def start(self, *options: str) -> dict[str, Any]:
        """Serve, and wait for the line that says so."""
        line = [FEDPACT, "serve", "--home", str(self.folder / "operator"), "--host", "127.0.0.1", "--json"]
        with (self.folder / "serve.err").open("a") as err:
            self.process = subprocess.Popen(
                [*line, "--log", str(self.folder / "serve.log"), *options],
                stdout=subprocess.PIPE, stderr=err, text=True, cwd=self.folder,
            )  # fmt: skip
        assert self.process.stdout is not None
        begun = time.monotonic()
        os.set_blocking(self.process.stdout.fileno(), False)
        while time.monotonic() - begun < READY_SECONDS:
            if shown := self.process.stdout.readline():
                return json.loads(shown)
            assert self.process.poll() is None, (self.folder / "serve.err").read_text()
            time.sleep(0.1)
        raise AssertionError("serve did not become ready")

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        try:
            return self.process.wait(40)
        finally:
            self.process.kill()
            self.process = None

    def client(self) -> httpx.Client:
        context = ssl.create_default_context(cafile=str(self.folder / "operator" / "tls" / "ca.crt"))
        return httpx.Client(base_url=f"https://127.0.0.1:{self.port}", verify=context, trust_env=False, timeout=30)

    def ask(self, who: Enterprise, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = b"" if body is None else canonical_bytes(body)
        headers = who.headers(method, API + path, data, now=utc_now())
        with self.client() as client:
            answer = client.request(method, API + path, content=data, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    folder = tmp_path_factory.mktemp("serve")
    secret = folder / "passphrase"
    secret.write_text("correct horse")
    secret.chmod(0o600)
    made = Operator(folder, free_port())
    made.call(
        "init", "--name", "City Data", "--entity-code", "91310000MA1K999999", "--host", "127.0.0.1",
        "--port", str(made.port), "--passphrase-file", str(secret),
    )  # fmt: skip
    ready = made.start()
    assert ready["url"] == f"https://127.0.0.1:{made.port}"
    yield made
    if made.process is not None:
        made.process.kill()
        made.process.wait()


def test_tls_is_by_the_operators_own_authority(operator: Operator) -> None:
    with operator.client() as client:
        answer = client.get(f"{API}/operator")
        assert answer.json()["name"] == "City Data"
        assert client.get("/health").status_code == 200
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"https://127.0.0.1:{operator.port}{API}/operator", trust_env=False)
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://127.0.0.1:{operator.port}{API}/operator", trust_env=False)


def test_the_public_port_shows_agents_what_they_need_and_nothing_else(operator: Operator) -> None:
    with operator.client() as client:
        for path in ("/v1/control/start-run", "/v1/control/list-nodes", "/v1/runtime/acquire-task"):
            assert client.post(path).status_code == 403
        for path in ("/docs", "/openapi.json", "/", f"{API}/../../v1/control/list-nodes"):
            assert client.get(path).status_code in (403, 404)
        assert client.get(f"{API}/contracts").status_code == 401
        answer = client.post(f"{API}/enrol", content=b"x" * (1 << 20) + b"x")
        assert answer.status_code == 413


def test_a_second_serve_and_a_taken_port_are_refused(operator: Operator, tmp_path: Path) -> None:
    error = operator.call("serve", code=2)["error"]
    assert error["code"] == "SERVE_RUNNING"
    secret = operator.folder / "passphrase"
    other = Operator(tmp_path, operator.port)
    other.call(
        "init", "--name", "Other", "--entity-code", "91310000MA1K888888", "--host", "127.0.0.1",
        "--passphrase-file", str(secret),
    )  # fmt: skip
    error = other.call("serve", "--host", "127.0.0.1", "--port", str(operator.port), code=2)["error"]
    assert error["code"] == "PORT_TAKEN"
    assert str(operator.port) in error["message"]


def test_from_invitation_to_a_signed_contract_over_the_wire(operator: Operator) -> None:
    for who in PARTIES:
        out = operator.folder / f"invitation-{who.number}"
        operator.call(
            "participant", "invite", "--name", who.name, "--entity-code", who.entity_code, "--sector", "medical",
            "--out", str(out),
        )  # fmt: skip
        invitation = Invitation.parse(json.loads(out.read_bytes()), code="TEST")
        assert invitation.url == f"https://127.0.0.1:{operator.port}"
        body = canonical_bytes({"token": invitation.token, "request": who.request(invitation).plain()})
        with operator.client() as client:
            answer = client.post(f"{API}/enrol", content=body)
        assert answer.json()["state"] == "requested"
        operator.call("participant", "approve", who.id, "--fingerprint", who.id)
        operator.ask(who, "POST", "/cards", {"card": who.card().plain(), "released": None})
    for who in PARTIES:
        wait_for(lambda who=who: operator.ask(who, "GET", "/enrolment")["state"] == "registered")
    (operator.folder / "rows.csv").write_text(ROWS)
    template = TEMPLATE.replace("2026-11-01", "2020-01-01")
    (operator.folder / "template.toml").write_text(template)
    made = operator.call("contract", "new", "template.toml", "--validation", "rows.csv")
    contract_id = made["contract_id"]
    operator.call("contract", "offer", contract_id)
    operator.call("contract", "sign", contract_id, "--yes", "--passphrase-file", "passphrase")
    for who in PARTIES:
        shown = operator.ask(who, "GET", f"/contracts/{contract_id}")
        contract = Contract.from_bytes(shown["payload"].encode())
        envelope, delegation = who.signature(contract)
        body = {"contract": envelope.plain(), "delegation": delegation.plain()}
        status = operator.ask(who, "POST", f"/contracts/{contract_id}/signature", body)
    assert (status["state"], status["missing"]) == ("signed", [])
    evidence = operator.ask(PARTIES[0], "GET", f"/contracts/{contract_id}/evidence")
    folder = operator.folder / "evidence"
    folder.mkdir()
    for name, text in evidence.items():
        (folder / name).write_text(text)
    done = subprocess.run([FEDPACT, "verify", str(folder), "--json"], capture_output=True, text=True)
    assert done.returncode == 3, done.stdout  # consistent; no trust file was given
    assert json.loads(done.stdout)["contract_id"] == contract_id


def test_a_wanted_run_is_driven_and_a_pause_ends_its_driver(operator: Operator) -> None:
    """Nobody is connected: the Flower run waits for participants, which is all that is asked here."""
    contract_id = operator.call("contract", "status")["contracts"][0]["id"]
    operator.call("run", "start", contract_id)
    assert operator.process is not None
    wait_for(lambda: len(children(operator.process.pid)) >= 2, 90)  # the SuperExec and the ServerApp
    wait_for(lambda: driver_of(operator, contract_id) is not None)
    operator.call("run", "pause", contract_id)
    wait_for(lambda: driver_of(operator, contract_id) is None)
    wait_for(lambda: len(children(operator.process.pid)) == 1)


def driver_of(operator: Operator, contract_id: str) -> str | None:
    import sqlalchemy as sa

    from fedpact_server import db
    from fedpact_server.home import OperatorHome

    database = OperatorHome.open(operator.folder / "operator").database()
    with database.read() as connection:
        found = connection.execute(sa.select(db.runs.c.driver).where(db.runs.c.contract_id == contract_id)).scalar()
    database.dispose()
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_cleanly_and_takes_its_children_along(operator: Operator, number: int) -> None:
    if operator.process is None:
        operator.start()
    assert operator.process is not None
    pid = operator.process.pid
    wait_for(lambda: len(children(pid)) >= 1)
    below = children(pid)
    assert operator.stop(number) == 0
    assert not any(alive(child) for child in below)
    with pytest.raises(httpx.ConnectError), operator.client() as client:
        client.get(f"{API}/operator")
    assert "Traceback" not in (operator.folder / "serve.err").read_text()


def test_after_a_restart_everything_is_known_and_a_wanted_run_goes_on(operator: Operator) -> None:
    contract_id = operator.call("contract", "status")["contracts"][0]["id"]
    operator.start()
    assert operator.ask(PARTIES[0], "GET", "/enrolment")["state"] == "registered"
    operator.call("run", "resume", contract_id)
    wait_for(lambda: driver_of(operator, contract_id) is not None)
    first = driver_of(operator, contract_id)
    assert operator.process is not None
    operator.process.kill()  # no goodbye
    operator.process.wait()
    operator.start()
    wait_for(lambda: driver_of(operator, contract_id) not in (None, first))
    alarms = [alarm["code"] for alarm in operator.call("participant", "list")["alarms"]]
    assert "RUN_REPLACED" in alarms
    operator.call("run", "stop", contract_id)
    wait_for(lambda: operator.call("run", "status", contract_id)["phase"] == "stopped")
    assert operator.stop() == 0


def test_the_log_is_json_lines_without_secrets(operator: Operator) -> None:
    lines = [json.loads(line) for line in (operator.folder / "serve.log").read_text().splitlines() if line[:1] == "{"]
    assert {"node registered", "run driven", "run halted"} <= {line["event"] for line in lines}
    text = (operator.folder / "serve.log").read_text()
    for who in PARTIES:
        token = json.loads((operator.folder / f"invitation-{who.number}").read_bytes())["token"]
        assert token not in text
