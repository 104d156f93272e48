"""Both sides of Flower with real processes, TLS and node authentication: what works, and what must not."""

import contextlib
import hashlib
import io
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import grpc
import httpx
import pytest
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.support.flower_lab import CONTRACT, Lab, echo, lab, marking_bundle

from fedpact_client import executor
from fedpact_contract.errors import FedpactError
from fedpact_server.shell import shell_bundle
from fedpact_server.superlink import CONTRACT_KEY, FEDERATION, Control

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PATIENCE = 90.0
"""Machines that run tests may be slow; nothing below takes a tenth of it on an idle one."""


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """One server and two nodes that are connected."""
    with lab(tmp_path_factory.mktemp("lab"), health=True) as it:
        it.serve()
        for _ in range(2):
            it.add_node().start()
        it.wait(lambda: online(it) == 2, PATIENCE, "both nodes online", every=0.2)
        yield it


def online(it: Lab) -> int:
    return sum(state == "online" for state in it.call("nodes").values())


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def processes(*words: str) -> dict[int, str]:
    """Process id -> command line, of those whose command line has all the words."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if all(word in line for word in words) and alive(int(path.parent.name)):
                found[int(path.parent.name)] = line
    return found


def serverapps(it: Lab) -> dict[int, str]:
    return processes("flwr-serverapp", f"127.0.0.1:{it.internal} ")


def run(it: Lab, **plan) -> list[dict]:
    """Run to the end; what its rounds brought."""
    before = len(it.results("round"))
    it.plan(**plan)
    status = it.finish(it.call("start_run", CONTRACT), PATIENCE)
    assert status == {"status": "finished", "sub_status": "completed", "details": ""}, it.logs()
    return it.results("round")[before:]


class TestRounds:
    def test_three_rounds(self, running):
        rounds = run(running, rounds=3, size=1000)
        assert [each["round"] for each in rounds] == [1, 2, 3]
        nodes = {node.id for node in running.nodes}
        for each in rounds:
            assert each["contract"] == CONTRACT
            assert each["lost"] == 0
            assert {got["node"] for got in each["got"]} == nodes
            assert all(got["sound"] and got["error"] is None for got in each["got"])
            for got in each["got"]:
                assert got["reply"] == "took " + json.dumps({"round": each["round"], "to": got["node"]})

    def test_a_large_model(self, running):
        (only,) = run(running, rounds=1, size=1_500_000)  # 12 MB there, 6 MB back, to each node
        assert [got["sound"] for got in only["got"]] == [True, True]

    def test_no_code_of_the_bundle_runs_at_a_node(self, running):
        run(running, rounds=1)
        assert not running.mark.exists()
        digest = hashlib.sha256(running.bundle).hexdigest()
        for node in running.nodes:
            assert node.bundles == {digest}  # the guard is told which bundle it was
            assert list(node.folder.rglob("*lab*shell*")) == []
        assert list((running.home / "flower").rglob("lab_shell/server.py"))  # the coordinator did unpack it

    def test_the_bundle_would_leave_a_mark(self, tmp_path):
        """The test above means something: the client package of such a bundle leaves a mark when it is imported."""
        mark = tmp_path / "mark"
        zipfile.ZipFile(io.BytesIO(marking_bundle(mark))).extractall(tmp_path)
        environment = os.environ | {"FLWR_TELEMETRY_ENABLED": "0", "PYTHONPATH": str(tmp_path)}
        subprocess.run([sys.executable, "-c", "import lab_shell.client"], check=True, env=environment, timeout=60)
        assert mark.read_text() == "ran"

    def test_an_agent_that_gives_no_reply(self, running):
        node = running.nodes[0]
        node.answer = lambda order, model: None
        try:
            (only,) = run(running, rounds=1)
        finally:
            node.answer = echo
        errors = {got["node"]: got["error"] for got in only["got"]}
        assert errors == {node.id: "AGENT_NO_REPLY", running.nodes[1].id: None}

    def test_a_round_that_fails_at_the_coordinator_tells_flower_a_fixed_text(self, running):
        (running.home / "plan.json").write_text('{"secret-of-the-operator": ')
        status = running.finish(running.call("start_run", CONTRACT), PATIENCE)
        assert status["sub_status"] == "failed"
        assert status["details"] == "ServerApp failed with exception: COORDINATOR_FAILED"
        assert "JSONDecodeError" in (running.home / "logs" / "coordinator.log").read_text()

    def test_the_health_service(self, running):
        with grpc.insecure_channel(f"127.0.0.1:{running.health}") as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


class BearerHeader:
    def __init__(self, value):
        self.value = value

    def intercept(self, context, call_next):
        context.request.headers["authorization"] = self.value
        return call_next(context)


def control_client(it: Lab, port: int, *interceptors) -> ControlHttpClient:
    return ControlHttpClient.from_server_address(
        server_address=f"127.0.0.1:{port}",
        insecure=False,
        root_certificates=it.ca.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI"), *interceptors],
    )


def start_request(bundle: bytes, **more) -> StartRunRequest:
    values = {
        "fab": fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})),
        "override_config": user_config_to_proto({CONTRACT_KEY: CONTRACT}),
        "federation": FEDERATION,
    }
    return StartRunRequest(**(values | more))


def status_of(call, *args) -> int:
    try:
        call(*args)
    except httpx.HTTPStatusError as err:
        return err.response.status_code
    return 200


def runs(it: Lab) -> int:
    token = it.call("token")
    return len(control_client(it, it.internal, BearerHeader(f"Bearer {token}")).ListRuns(ListRunsRequest()).run_dict)


class TestOutside:
    """Whoever has the CA certificate alone, which is public."""

    @pytest.fixture
    def web(self, running):
        context = ssl.create_default_context(cafile=str(running.ca))
        with httpx.Client(verify=context, base_url=f"https://127.0.0.1:{running.port}") as client:
            yield client

    @pytest.mark.parametrize(
        "path",
        [
            "/v1/control/list-runs",
            "/v1/control/list-nodes",
            "/v1/control/start-run",
            "/v1/control/register-node",
            "/v1/control/get-login-details",
            "/v1/runtime/acquire-task",
            "/v1/runtime/pull-task-input",
            "/v1/runtime/responses",
            "/docs",
            "/openapi.json",
        ],
    )
    def test_nothing_of_the_operators(self, web, path):
        for method in ("GET", "POST"):
            answer = web.request(method, path)
            assert answer.status_code == 403
            assert answer.json()["code"] == "FORBIDDEN"

    def test_what_is_for_everybody(self, web):
        assert web.get("/health").status_code == 200
        assert web.post("/fedpact/v1/enrol", content=b"abc").text == "ours /fedpact/v1/enrol 3"
        assert web.post("/fedpact/v1/enrol", content=bytes(1 << 20)).status_code == 200
        assert web.post("/fedpact/v1/enrol", content=bytes((1 << 20) + 1)).status_code == 413

    def test_fleet_asks_for_a_node_key(self, web):
        answer = web.post("/v1/fleet/pull-messages", headers={"content-type": "application/x-protobuf"})
        assert answer.status_code in (401, 415)

    def test_no_run_is_started_from_outside(self, running):
        before = runs(running)
        token = running.call("token")
        for extra in ([], [BearerHeader(f"Bearer {token}")]):  # the token itself is worth nothing there
            client = control_client(running, running.port, *extra)
            assert status_of(client.StartRun, start_request(running.bundle)) == 403
        assert runs(running) == before

    def test_no_task_is_taken_from_outside(self, running):
        client = RuntimeHttpClient.from_server_address(
            server_address=f"127.0.0.1:{running.port}",
            insecure=False,
            root_certificates=running.ca.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec")],
        )
        assert status_of(client.AcquireTask, AcquireTaskRequest(supported_task_types=["flwr-serverapp"])) == 403


class TestInside:
    """Whoever is on the operator's machine and has found the internal port."""

    @pytest.mark.parametrize("value", [None, "Bearer", "Bearer x", "Basic x", "Bearer " + "0" * 64])
    def test_control_asks_for_the_token(self, running, value):
        before = runs(running)
        client = control_client(running, running.internal, *([BearerHeader(value)] if value else []))
        assert status_of(client.ListRuns, ListRunsRequest()) == 401
        assert status_of(client.StartRun, start_request(running.bundle)) == 401
        assert runs(running) == before

    @pytest.mark.parametrize("secret", [None, b"x" * 32])
    def test_runtime_asks_for_the_secret(self, running, secret):
        protected = ["/flwr.proto.Runtime/AcquireTask"]
        extra = [SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=protected)] if secret else []
        client = RuntimeHttpClient.from_server_address(
            server_address=f"127.0.0.1:{running.internal}",
            insecure=False,
            root_certificates=running.ca.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec"), *extra],
        )
        assert status_of(client.AcquireTask, AcquireTaskRequest(supported_task_types=["flwr-serverapp"])) == 401

    def test_the_secrets_are_nowhere_to_be_read(self, running):
        token = running.call("token")
        assert len(token) == 64
        pids = [running.server.pid, running.call("superexec"), *(node.child.process.pid for node in running.nodes)]
        for pid in pids:
            for name in ("cmdline", "environ"):
                assert token.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
        for path in running.folder.rglob("*"):
            if path.is_file():
                assert token.encode() not in path.read_bytes(), path
                assert "secret" not in path.name

    def test_log_files_are_the_operators_alone(self, running):
        for path in (running.home / "logs").iterdir():
            assert path.stat().st_mode & 0o077 == 0, path


class TestBundle:
    """Whoever has the token may start one bundle, for one contract, and nothing else."""

    @pytest.fixture
    def control(self, running):
        return control_client(running, running.internal, BearerHeader(f"Bearer {running.call('token')}"))

    def test_another_bundle_is_refused(self, running, control, tmp_path):
        before = runs(running)
        other = marking_bundle(tmp_path / "mark", name="other-shell")
        for request in (
            start_request(other),
            start_request(shell_bundle()),  # the installed one: this server was told to take the lab's
            start_request(other, fab=fab_to_proto(Fab(hashlib.sha256(running.bundle).hexdigest(), other, {}))),
            start_request(running.bundle, fab=fab_to_proto(Fab("0" * 64, running.bundle, {}))),
            start_request(b"", fab=fab_to_proto(Fab(hashlib.sha256(running.bundle).hexdigest(), b"", {}))),
            start_request(b""),
        ):
            assert status_of(control.StartRun, request) == 403
        assert runs(running) == before

    @pytest.mark.parametrize(
        "more",
        [
            {"app_spec": "@flwrlabs/demo"},
            {"user_prompt": "please"},
            {"series_id": 5},
            {"connector_ids": [1]},
            {"connector_refs": ["x"]},
            {"override_config": user_config_to_proto({})},
            {"override_config": user_config_to_proto({CONTRACT_KEY: CONTRACT, "more": 1})},
            {"override_config": user_config_to_proto({"other": CONTRACT})},
        ],
        ids=lambda more: next(iter(more)),
    )
    def test_anything_beside_it_is_refused(self, running, control, more):
        before = runs(running)
        assert status_of(control.StartRun, start_request(running.bundle, **more)) == 403
        assert runs(running) == before

    def test_our_own_client_says_so(self, running):
        address = f"127.0.0.1:{running.internal}"
        ours = Control(address, running.ca.read_bytes(), running.call("token"), shell_bundle())
        with pytest.raises(FedpactError) as caught:
            ours.start_run(CONTRACT)
        assert caught.value.code == "CONTROL_REFUSED"
        ours.close()


class TestControl:
    def test_a_run_that_does_not_exist(self, running):
        assert running.call("run_status", 5)["code"] == "FLOWER_RUN_UNKNOWN"
        assert running.call("stop_run", 5)["code"] == "FLOWER_RUN_UNKNOWN"

    def test_registering_twice_gives_the_same_node(self, running):
        node = running.nodes[0]
        first = running.call("register_node", node.pem, "bank-1")
        assert first == running.call("register_node", node.pem.replace("\n", "\r\n"), "another name")

    def test_a_key_that_is_none(self, running):
        assert running.call("register_node", "nonsense", "x")["code"] == "NODE_KEY_FORM"

    def test_stopping_a_run(self, running):
        running.plan(rounds=1000, pause=0.2)
        number = running.call("start_run", CONTRACT)
        running.wait(lambda: running.call("run_status", number)["status"] == "running", PATIENCE, "run", every=0.2)
        assert running.call("stop_run", number) is None
        status = running.finish(number, PATIENCE)
        assert (status["status"], status["sub_status"]) == ("finished", "stopped")
        assert running.call("stop_run", number) is None  # again is fine
        running.wait(lambda: not serverapps(running), PATIENCE, "the ServerApp to end")

    def test_nobody_answers(self, running):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            away = Control(f"127.0.0.1:{sock.getsockname()[1]}", running.ca.read_bytes(), "x", b"")
            with pytest.raises(FedpactError) as caught:
                away.run_status(1)
        assert caught.value.code == "CONTROL_AWAY"


class TestNodes:
    def test_an_unknown_key_is_not_let_in(self, running):
        before = online(running)
        stranger = running.add_node(register=False)
        running.nodes.remove(stranger)
        stranger.start()
        assert stranger.wait_exit(PATIENCE) == executor.EXIT_RETRY
        assert online(running) == before
        assert stranger.orders == []

    def test_a_node_that_says_goodbye_may_come_back_at_once(self, running):
        node = running.nodes[0]
        node.hang_up()  # the executor says goodbye and ends
        assert node.wait_exit(PATIENCE) == executor.EXIT_OK
        assert online(running) == 1
        node.start()
        running.wait(lambda: online(running) == 2, PATIENCE, "the node again", every=0.2)

    def test_a_node_that_was_killed_must_wait(self, running):
        """Until its last heartbeat has expired (a minute) SuperLink takes it for connected: exit code 75, try again."""
        extra = running.add_node()
        running.nodes.remove(extra)
        extra.start()
        running.wait(lambda: online(running) == 3, PATIENCE, "a third node", every=0.2)
        extra.child.process.kill()
        assert extra.wait_exit(PATIENCE) == -signal.SIGKILL
        extra.start()
        assert extra.wait_exit(PATIENCE) == executor.EXIT_RETRY

    def test_a_goodbye_that_was_not_said_is_said_by_the_next(self, running):
        """Whoever has the node's key may say it, for this node alone; said once more, it changes nothing."""
        extra = running.add_node()
        running.nodes.remove(extra)
        extra.start()
        running.wait(lambda: extra.number is not None, PATIENCE, "the node's number")
        extra.child.process.kill()
        assert extra.wait_exit(PATIENCE) == -signal.SIGKILL
        others = str(running.call("register_node", running.nodes[0].pem, "x"))
        extra.start(earlier=others)
        assert extra.wait_exit(PATIENCE) == executor.EXIT_RETRY
        before = online(running)
        number, extra.number = extra.number, None
        extra.start(earlier=number)
        running.wait(lambda: extra.number is not None, 30, "let in at once")
        assert (extra.number, online(running)) == (number, before)
        extra.hang_up()
        assert extra.wait_exit(PATIENCE) == executor.EXIT_OK
        extra.number = None
        extra.start(earlier=number)
        running.wait(lambda: extra.number is not None, 30, "let in again")
        extra.hang_up()
        assert extra.wait_exit(PATIENCE) == executor.EXIT_OK

    def test_a_node_that_is_unregistered_leaves_for_good(self, running):
        leaver = running.add_node()
        running.nodes.remove(leaver)
        leaver.start()
        running.wait(lambda: running.call("nodes")[f"bank-{len(running.nodes) + 1}"] == "online", PATIENCE, "online")
        number = running.call("register_node", leaver.pem, "x")
        assert running.call("unregister_node", number) is None
        assert running.call("unregister_node", number) is None
        assert leaver.wait_exit(PATIENCE) == executor.EXIT_REFUSED
        assert running.call("register_node", leaver.pem, "x")["code"] == "NODE_KEY_REVOKED"

    def test_a_guard_that_breaks_the_protocol(self, running):
        node = running.nodes[1]
        node.child.pipe.send("drop", {})  # there is no order
        assert node.wait_exit(PATIENCE) == executor.EXIT_PROTOCOL
        node.start()
        running.wait(lambda: online(running) >= 2, PATIENCE, "the node again", every=0.2)

    def test_a_setup_that_is_wrong(self, running, tmp_path):
        node = running.add_node(register=False)
        running.nodes.remove(node)
        (node.folder / "node.key").write_text("no key")
        node.start()
        assert node.wait_exit(PATIENCE) == executor.EXIT_SETUP
        assert "NODE_KEY_FORM" in node.log()

    def test_a_server_with_another_authority(self, running, tmp_path):
        from fedpact_server import pki

        pki.create(tmp_path, name="other", hosts=("localhost",), now=running.made)
        node = running.add_node()
        running.nodes.remove(node)
        node.ca = tmp_path / "ca.crt"
        node.start()
        assert node.wait_exit(PATIENCE) == executor.EXIT_UNAVAILABLE


class TestSuperExec:
    def test_it_is_started_again(self, running):
        first = running.call("superexec")
        os.kill(first, signal.SIGKILL)
        running.wait(lambda: running.call("superexec") not in (None, first), PATIENCE, "a new one", every=0.2)
        assert len(run(running, rounds=1)) == 1


def test_a_port_that_is_taken_stops_it_before_anything_starts(tmp_path):
    it = Lab(tmp_path)
    for which in ("port", "health"):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            it.port, it.health = (port, None) if which == "port" else (it.port, port)
            with pytest.raises(AssertionError) as caught:
                it.serve()
            assert "PORT_TAKEN" in str(caught.value)
            assert str(port) in str(caught.value)
        assert not (it.home / "superlink.db").exists()
        assert not (it.home / "logs").exists()
        it.server.wait(PATIENCE)


def test_a_server_that_is_killed_leaves_nobody_and_comes_back(tmp_path):
    with lab(tmp_path) as it:
        it.serve()
        for _ in range(2):
            it.add_node().start()
        it.plan(rounds=1000, pause=0.1)
        lost = it.call("start_run", CONTRACT)
        it.wait(lambda: len(it.results("round")) >= 2, PATIENCE, "two rounds")
        superexec, apps = it.call("superexec"), serverapps(it)
        assert len(apps) == 1
        it.server.kill()
        it.server.wait()
        seconds = it.wait(lambda: not alive(superexec) and not any(map(alive, apps)), 30, "no orphans")
        assert seconds < 15  # on an idle machine: under one

        it.serve()
        assert it.call("run_status", lost)["status"] in ("running", "finished")
        assert it.call("stop_run", lost) is None
        assert it.call("register_node", it.nodes[0].pem, "bank-1") > 0
        rounds = run(it, rounds=2)
        assert [len(each["got"]) for each in rounds] == [2, 2]
        assert all(got["sound"] for each in rounds for got in each["got"])
        assert all(node.exit_code is None for node in it.nodes)  # they never ended: they connected again

        begun = time.monotonic()
        superexec = it.call("superexec")
        it.server.terminate()
        assert it.server.wait(PATIENCE) == 0
        assert time.monotonic() - begun < 30
        assert not alive(superexec)


def test_a_superlink_that_keeps_nothing_on_disk(tmp_path):
    """Faster; after a restart nodes are registered again, and executors that SuperLink forgot are started again."""
    with lab(tmp_path) as it:
        it.environment["LAB_DATABASE"] = ":flwr-in-memory:"
        it.serve()
        for _ in range(2):
            it.add_node().start()
        assert all(got["sound"] for each in run(it, rounds=3) for got in each["got"])
        it.server.kill()
        it.server.wait()
        it.serve()
        for node in it.nodes:
            assert node.wait_exit(PATIENCE) == executor.EXIT_REFUSED
            it.call("register_node", node.pem, node.folder.name)
            node.start()
        assert all(got["sound"] for each in run(it, rounds=3) for got in each["got"])
        assert not (it.home / "superlink.db").exists()


def test_flower_as_it_ships(tmp_path):
    """Without patches: slower, and the same otherwise."""
    with lab(tmp_path) as it:
        it.serve()
        for _ in range(2):
            it.add_node(patched=False).start()
        rounds = run(it, rounds=1)
        assert len(rounds) == 1
        assert all(got["sound"] for each in rounds for got in each["got"])
        assert not it.mark.exists()
