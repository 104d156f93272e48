"""What may reach which application, by the socket it came in on; tried on the filter and over real sockets."""

import asyncio
import logging
import socket
import threading

import pytest
import uvicorn

from fedpact_contract.errors import InputError
from fedpact_server.one_port import CONTROL, MAX_FLEET_BODY, RUNTIME, OnePort, decide
from fedpact_server.serving import Uvicorn, listen

HOST = (b"host", b"operator.example:8443")


def ask(method, path, *, internal=False, raw=None, headers=(), **options):
    raw = path.encode() if raw is None else raw
    return decide(method=method, path=path, raw_path=raw, headers=[HOST, *headers], internal=internal, **options)


def test_uvicorns_error_of_cancelling_nothing_is_not_told(caplog):
    Uvicorn(uvicorn.Config(lambda: None, log_config=None), lambda: None)
    for count in (0, 2):
        logging.getLogger("uvicorn.error").error("Cancel %s running task(s), timeout graceful shutdown exceeded", count)
    assert [record.args for record in caplog.records] == [(2,)]


class TestPublicSocket:
    @pytest.mark.parametrize("call", ["pull-messages", "push-object", "activate-node", "send-node-heartbeat"])
    def test_fleet_passes(self, call):
        assert ask("POST", f"/v1/fleet/{call}") == "flower"

    def test_health_and_ours_pass(self):
        assert ask("GET", "/health") == "flower"
        assert ask("HEAD", "/health") == "flower"
        assert ask("GET", "/fedpact/v1/head") == "api"
        assert ask("DELETE", "/fedpact") == "api"

    @pytest.mark.parametrize("call", [*sorted(CONTROL), "stream-logs", "start-automation", "get-auth-tokens"])
    def test_control_does_not_exist(self, call):
        assert ask("POST", f"/v1/control/{call}") == 403

    @pytest.mark.parametrize("call", [*sorted(RUNTIME), "responses", "create-task"])
    def test_runtime_does_not_exist(self, call):
        assert ask("POST", f"/v1/runtime/{call}") == 403

    @pytest.mark.parametrize(
        "path",
        [
            "/",
            "/docs",
            "/openapi.json",
            "/docs/oauth2-redirect",
            "/healthz",
            "/health/",
            "/fedpactx",
            "/v1/fleet",
            "/v1/fleet/",
            "/V1/FLEET/pull-messages",
            "/v1/fleet/a/b",
        ],
    )
    def test_everything_else_is_refused(self, path):
        assert ask("GET", path) == 403
        assert ask("POST", path) == 403

    @pytest.mark.parametrize(
        "path",
        [
            "//v1/control/start-run",
            "/v1//control/start-run",
            "/v1/fleet/../control/start-run",
            "/v1/fleet/./../control/start-run",
            "/fedpact/../v1/control/start-run",
            "/fedpact/..",
            "/fedpact/./v1",
            "/fedpact\\..\\v1\\control\\start-run",
            "/v1/fleet/pull-messages\x00",
            "/v1/fleet/pull-messages\r\n",
            "/v1/fleet/pull-messages?x",
            "/v1/fleet/pull-messages;x",
            "v1/fleet/pull-messages",
            "http://operator.example/v1/fleet/pull-messages",
            "*",
            "",
        ],
    )
    def test_a_path_with_two_readings_is_refused(self, path):
        assert ask("POST", path) == 403

    @pytest.mark.parametrize(
        ("path", "raw"),
        [
            ("/fedpact/a/b", b"/fedpact/a%2fb"),
            ("/fedpact/a/b", b"/fedpact/a%2Fb"),
            ("/fedpact/x.y", b"/fedpact/x%2ey"),
            ("/fedpact/a%2fb", b"/fedpact/a%252fb"),
            ("/fedpact/a\\b", b"/fedpact/a%5cb"),
            ("/v1/fleet/../control", b"/v1/fleet/%2e%2e/control"),
        ],
    )
    def test_encoded_separators_are_refused(self, path, raw):
        assert ask("POST", path, raw=raw) == 403

    def test_other_encoded_characters_reach_our_application(self):
        assert ask("GET", "/fedpact/甲", raw=b"/fedpact/%E7%94%B2") == "api"

    @pytest.mark.parametrize(
        "host", [b"x/v1/runtime/push-object?", b"x#", b"x@y", b"x y", b"", b"[::1", b"x:port", "ü".encode("latin-1")]
    )
    def test_a_host_header_that_is_no_host_is_refused(self, host):
        verdict = decide(
            method="POST", path="/v1/fleet/push-object", raw_path=None, headers=[(b"host", host)], internal=False
        )
        assert verdict == 400

    @pytest.mark.parametrize("host", [b"127.0.0.1:8443", b"[::1]:8443", b"operator_1.example", b"OPERATOR"])
    def test_hosts_pass(self, host):
        verdict = decide(method="GET", path="/health", raw_path=None, headers=[(b"host", host)], internal=False)
        assert verdict == "flower"

    def test_two_hosts_are_refused(self):
        assert ask("GET", "/health", headers=[HOST]) == 400

    def test_only_the_methods_that_are_served(self):
        assert ask("GET", "/v1/fleet/pull-messages") == 405
        assert ask("POST", "/health") == 405

    @pytest.mark.parametrize(("size", "verdict"), [(b"0", "api"), (b"100", "api"), (b"101", 413), (b"9" * 15, 413)])
    def test_our_bodies_are_capped(self, size, verdict):
        assert ask("POST", "/fedpact/x", headers=[(b"content-length", size)], max_api_body=100) == verdict

    @pytest.mark.parametrize("size", [b"-1", b"+5", b"1e3", b"", b" 7", b"9" * 16])
    def test_a_length_that_is_no_number_is_refused(self, size):
        assert ask("POST", "/fedpact/x", headers=[(b"content-length", size)]) == 400

    def test_two_lengths_are_refused(self):
        twice = [(b"content-length", b"5"), (b"content-length", b"5")]
        assert ask("POST", "/fedpact/x", headers=twice) == 400

    def test_a_body_of_unknown_length_is_refused(self):
        for path in ("/fedpact/x", "/v1/fleet/push-object"):
            assert ask("POST", path, headers=[(b"transfer-encoding", b"chunked")]) == 411

    def test_a_probe_may_be_as_large_as_an_update(self):
        for size, verdict in {101: "api", MAX_FLEET_BODY: "api", MAX_FLEET_BODY + 1: 413}.items():
            header = (b"content-length", str(size).encode())
            assert ask("POST", "/fedpact/v1/probe", headers=[header], max_api_body=100) == verdict

    def test_fleet_bodies_are_capped(self):
        sizes = {MAX_FLEET_BODY: "flower", MAX_FLEET_BODY + 1: 413}
        for size, verdict in sizes.items():
            header = (b"content-length", str(size).encode())
            assert ask("POST", "/v1/fleet/push-object", headers=[header]) == verdict


class TestInternalSocket:
    @pytest.mark.parametrize("call", sorted(CONTROL))
    def test_control_reaches_flower(self, call):
        assert ask("POST", f"/v1/control/{call}", internal=True) == "flower"

    @pytest.mark.parametrize("call", sorted(RUNTIME))
    def test_runtime_reaches_flower(self, call):
        assert ask("POST", f"/v1/runtime/{call}", internal=True) == "flower"

    @pytest.mark.parametrize(
        "path",
        [
            "/docs",
            "/openapi.json",
            "/v1/control/get-login-details",
            "/v1/control/get-auth-tokens",
            "/v1/control/refresh-auth-tokens",
            "/v1/control/start-automation",
            "/v1/control/add-app",
            "/v1/control/begin-connector-oauth",
            "/v1/control/stream-logs",
            "/v1/runtime/start-automation",
            "/v1/runtime/create-task",
            "/v1/runtime/responses",
            "/v1/runtime/get-connector",
            "/v1/control/../control/start-run",
        ],
    )
    def test_what_we_do_not_use_is_not_served(self, path):
        assert ask("POST", path, internal=True) == 403
        assert ask("GET", path, internal=True) == 403

    def test_control_takes_posts_alone(self):
        assert ask("GET", "/v1/control/list-runs", internal=True) == 405


class Recorder:
    """An ASGI application that notes what reaches it."""

    def __init__(self, name):
        self.name, self.paths, self.scopes = name, [], []

    async def __call__(self, scope, receive, send):
        self.scopes.append(scope["type"])
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": message["type"] + ".complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        self.paths.append(scope["path"])
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        body = f"{self.name} {size}".encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module", params=["httptools", "h11"])
def served(request):
    """Two applications behind the filter on two real sockets, with each of uvicorn's two parsers."""
    public, internal = listen("127.0.0.1", 0), listen("127.0.0.1", 0)
    flower, api = Recorder("flower"), Recorder("api")
    application = OnePort(flower, api, internal=internal.getsockname(), max_api_body=1000)
    ready = threading.Event()
    config = uvicorn.Config(application, http=request.param, ws="none", lifespan="on", log_config=None)
    server = Uvicorn(config, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [public, internal]})
    thread.start()
    assert ready.wait(10)
    yield {"public": public.getsockname(), "internal": internal.getsockname(), "flower": flower, "api": api}
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()
    assert flower.scopes[0] == "lifespan"
    assert "lifespan" not in api.scopes


def raw(address, text, body=b"", *, half_close=True):
    """Send bytes, return (status, all of the answer)."""
    with socket.create_connection(address, timeout=5) as sock:
        sock.sendall(text.encode("latin-1") + body)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
    return int(answer.split(b" ", 2)[1]) if answer else 0, answer


def request(address, target, method="POST", host="operator.example", more=""):
    return raw(
        address, f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{more}Content-Length: 0\r\n\r\n"
    )


class TestOverSockets:
    def test_the_socket_decides_not_the_peer(self, served):
        """Both sockets are asked from the same address, by whatever name."""
        assert request(served["public"], "/v1/control/start-run")[0] == 403
        assert request(served["internal"], "/v1/control/start-run")[0] == 200
        for host in ("127.0.0.1:{}".format(served["internal"][1]), "localhost"):
            assert request(served["public"], "/v1/control/start-run", host=host)[0] == 403

    @pytest.mark.parametrize(
        "header",
        ["X-Forwarded-For: 127.0.0.1", "X-Forwarded-Port: 1", "Forwarded: for=127.0.0.1", "X-Original-URL: /health"],
    )
    def test_forwarding_headers_change_nothing(self, served, header):
        assert request(served["public"], "/v1/runtime/acquire-task", more=header + "\r\n")[0] == 403

    @pytest.mark.parametrize(
        "target",
        [
            "//v1/control/start-run",
            "/v1/fleet/../control/start-run",
            "/v1/fleet/%2e%2e/control/start-run",
            "/v1/%63ontrol/start-run",
            "/v1/fleet%2f..%2fcontrol/start-run",
            "http://operator.example/v1/control/start-run",
            "http://127.0.0.1//v1/control/start-run",
            "/fedpact/..%2fv1/control/start-run",
            "/fedpact/%2e%2e/v1/control/start-run",
            "/v1/control/start-run#/v1/fleet/x",
            "/v1/control/start-run?/v1/fleet/x",
            "/docs",
            "/openapi.json",
        ],
    )
    def test_tricks_with_the_target(self, served, target):
        before = list(served["flower"].paths)
        status, answer = request(served["public"], target)
        assert status in (0, 400, 403, 404, 405), answer
        assert served["flower"].paths == before

    def test_what_is_meant_to_pass_does(self, served):
        assert request(served["public"], "/v1/fleet/pull-messages")[1].endswith(b"flower 0")
        assert request(served["public"], "/fedpact/v1/enrol?x=%2f")[1].endswith(b"api 0")
        assert request(served["public"], "/health", method="GET")[1].endswith(b"flower 0")

    def test_host_tricks(self, served):
        before = list(served["flower"].paths)
        status, _ = request(served["public"], "/v1/fleet/push-object", host="x/v1/runtime/push-object?")
        assert status == 400
        assert served["flower"].paths == before

    def test_a_refusal_says_which_one_it_is(self, served):
        head = "POST /fedpact/x HTTP/1.1\r\nConnection: close\r\n"
        for more, body, status, code in (
            ("Host: x\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n", 411, "LENGTH_REQUIRED"),
            ("Host: x\r\nContent-Length: 1001\r\n", b"", 413, "BODY_TOO_LARGE"),
            ("Host: x/y?\r\nContent-Length: 0\r\n", b"", 400, "REQUEST_FORM"),
        ):
            found, answer = raw(served["public"], f"{head}{more}\r\n", body)
            assert (found, code in answer.decode("latin-1")) == (status, True), answer

    def test_bodies(self, served):
        head = "POST /fedpact/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        assert raw(served["public"], f"{head}Content-Length: 1000\r\n\r\n", b"a" * 1000)[1].endswith(b"api 1000")
        assert raw(served["public"], f"{head}Content-Length: 1001\r\n\r\n", b"a" * 10)[0] == 413
        chunked = f"{head}Transfer-Encoding: chunked\r\n\r\n"
        assert raw(served["public"], chunked, b"3\r\nabc\r\n0\r\n\r\n")[0] == 411

    def test_smuggling_by_two_lengths(self, served):
        head = "POST /fedpact/x HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"
        inner = b"0\r\n\r\nPOST /v1/control/start-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
        before = list(served["flower"].paths)
        assert raw(served["public"], head, inner)[0] in (400, 411)
        assert served["flower"].paths == before

    def test_a_second_request_on_the_connection_is_filtered_too(self, served):
        first = "POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
        second = first.replace("fleet/pull-messages", "control/start-run").replace(
            "Host: x", "Host: x\r\nConnection: close"
        )
        _, answer = raw(served["public"], first + second, half_close=False)
        assert answer.count(b"HTTP/1.1 200") == 1
        assert answer.count(b"HTTP/1.1 403") == 1

    @pytest.mark.parametrize("target", ["/v1/control/start-run", "/fedpact/ws", "/v1/fleet/pull-messages"])
    def test_websockets_do_not_exist(self, served, target):
        upgrade = "Upgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
        _, answer = raw(
            served["public"], f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\n{upgrade}\r\n"
        )
        assert b" 101 " not in answer.split(b"\r\n")[0]


def run_scope(application, scope):
    sent = []

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message)

    asyncio.run(application(scope, receive, send))
    return sent


def test_a_websocket_scope_is_closed():
    flower, api = Recorder("flower"), Recorder("api")
    application = OnePort(flower, api, internal=("127.0.0.1", 1))
    sent = run_scope(
        application, {"type": "websocket", "path": "/fedpact/ws", "server": ("127.0.0.1", 1), "headers": []}
    )
    assert sent == [{"type": "websocket.close", "code": 1008}]
    assert not flower.paths
    assert not api.paths


@pytest.mark.parametrize("server", [None, (), ("127.0.0.1", None), ("/run/fedpact.sock", None), ["127.0.0.1", 2]])
def test_a_socket_that_is_not_known_has_no_rights(server):
    flower = Recorder("flower")
    application = OnePort(flower, Recorder("api"), internal=("127.0.0.1", 1))
    scope = {"type": "http", "method": "POST", "path": "/v1/control/start-run", "server": server, "headers": [HOST]}
    assert run_scope(application, scope)[0]["status"] == 403
    assert not flower.paths


def test_a_port_that_is_taken_is_named():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError) as caught:
            listen("127.0.0.1", port)
    assert caught.value.code == "PORT_TAKEN"
    assert str(port) in caught.value.message
    listen("127.0.0.1", port).close()  # free again at once


def test_a_host_that_is_not_here():
    with pytest.raises(InputError) as caught:
        listen("203.0.113.7", 0)
    assert caught.value.code == "HOST_UNKNOWN"
