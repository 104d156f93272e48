"""Flower's SuperLink inside `fedpact serve`: two TLS sockets, one process, and the few Control calls that we make.

Flower's classes used here are internal: tests/unit/test_flower_contract.py fails loudly where another version changed
one of them. Nothing else of the server imports flwr, but the ServerApp (`app`).
"""

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # both are read when flwr is imported
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import contextlib
import hashlib
import hmac
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import httpx
import structlog
import uvicorn
from cryptography.hazmat.primitives import serialization
from fastapi import HTTPException
from flwr.common.constant import ISOLATION_MODE_PROCESS, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, TRANSPORT_TYPE_GRPC_RERE
from flwr.common.event_log_plugin import EventLogWriterPlugin
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.auth.typing import AccountAuthCredentials, AccountAuthLoginDetails, AccountInfo
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.event_log.typing import Actor, Event, LogEntry
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.superlink.auth_plugin import ControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app

from fedpact_contract.errors import FailedError, InputError, RefusedError, ServiceError
from fedpact_contract.request import load_node_public
from fedpact_server.one_port import Application, OnePort
from fedpact_server.serving import Uvicorn, listen, stop_on_signal
from fedpact_server.shell import shell_bundle, shell_digest
from fedpact_server.superexec import SuperExec, SuperExecConfig, child_environment

__all__ = ["Control", "RunStatus", "SuperLinkConfig", "SuperLinkServer", "shell_bundle", "shell_digest"]

log = structlog.get_logger()

FEDERATION = "@none/default"
CONTRACT_KEY = "contract-id"
"""The one key of a run's configuration."""

TASK_POLL_SECONDS = "0.2"
READY_SECONDS = 60.0
KEEP_ALIVE_SECONDS = 75
"""Longer than Flower's clients keep an idle connection: the server never closes one that a client is about to use."""

RunState = Literal["pending", "starting", "running", "finished"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperLinkConfig:
    """How to serve.

    Args:
        home: The operator's home; the ServerApp finds it as FEDPACT_HOME.
        host: Address of the public socket.
        port: The operator's one port.
        ca: The certificate authority's certificate (PEM).
        certificate: The port's certificate (PEM); it must be good for 127.0.0.1 too, or runs stay pending.
        key: Its private key (PEM).
        database: SuperLink's database: a path, or ":flwr-in-memory:" (rounds take a third of the time; after a restart
            nodes must be registered again, and their executors end with code 77 and must be started again).
        health_port: Loopback port of the standard gRPC health service; None for no such service.
        environment: Further environment variables of the ServerApp.
    """

    home: Path
    port: int
    ca: Path
    certificate: Path
    key: Path
    database: str
    host: str = "0.0.0.0"  # noqa: S104 - agents come from other machines; `one_port` says what they reach
    health_port: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """Where a Flower run stands. `sub_status` and `details` are set once it is finished."""

    status: RunState
    sub_status: str
    details: str


class SuperLinkServer:
    """SuperLink, our API and the SuperExec.

    Args:
        config: How to serve.
        api: Our ASGI application for `/fedpact/*`.
        bundle: The one bundle that runs start from; the installed shell unless a test says otherwise.
    """

    def __init__(self, config: SuperLinkConfig, api: Application, *, bundle: bytes | None = None) -> None:
        self._config = config
        self._api = api
        self._bundle = shell_bundle() if bundle is None else bundle
        self._token = secrets.token_hex(32)
        self._sockets: list[socket.socket] = []
        self._uvicorn: Uvicorn | None = None
        self._ready = threading.Event()
        self._stopping = threading.Event()
        self._done = threading.Event()
        self.superexec: SuperExec | None = None

    def open(self) -> None:
        """Take the ports: before anything else is started.

        Raises:
            InputError: PORT_TAKEN, PORT_FORBIDDEN, HOST_UNKNOWN.
        """
        if self._sockets:
            return
        config = self._config
        if config.health_port is not None:
            listen("127.0.0.1", config.health_port).close()
        public = listen(config.host, config.port)
        self._sockets = [public, listen("127.0.0.1", 0)]

    @property
    def internal(self) -> tuple[str, int]:
        """Address and port of the internal socket."""
        if not self._sockets:
            raise FailedError("SERVER_CLOSED", "The server is not open.")
        host, port = self._sockets[1].getsockname()
        return str(host), int(port)

    @property
    def control(self) -> "Control":
        """A new client of the Control API; only this process can make one, for only it has the token."""
        host, port = self.internal
        return Control(f"{host}:{port}", self._config.ca.read_bytes(), self._token, self._bundle)

    @property
    def stopping(self) -> bool:
        """Whether it has been told to end."""
        return self._stopping.is_set()

    def serve(self) -> None:
        """Serve until `stop` or, in the main thread, SIGINT or SIGTERM.

        Raises:
            InputError: a port is taken, or Flower's commands are not installed.
        """
        self.open()
        try:
            self._serve()
        finally:
            self._stopping.set()
            for each in self._sockets:
                each.close()
            self._done.set()

    def wait_ready(self, timeout: float = READY_SECONDS) -> None:
        """Wait until requests are answered.

        Raises:
            ServiceError: SERVER_NOT_READY.
        """
        patience = time.monotonic() + timeout
        while not self._ready.wait(0.05):
            if self._done.is_set() or time.monotonic() > patience:
                raise ServiceError("SERVER_NOT_READY", "The server did not start.", remedy="Its log says why.")

    def stop(self, timeout: float = 20.0) -> None:
        """End the ServerApps and the SuperExec, then the server; returns when `serve` has, or after the timeout."""
        self._stopping.set()
        self._done.wait(timeout)

    def _serve(self) -> None:
        config = self._config
        os.environ["FLWR_HOME"] = str(config.home / "flower")
        (config.home / "flower").mkdir(mode=0o700, exist_ok=True)
        secret = secrets.token_bytes(32)
        self.superexec = SuperExec(self._superexec_config(secret))
        with stop_on_signal(self._stopping.set):
            self.superexec.start()  # at once: while Flower is set up here, it waits in the TLS handshake
            closer = threading.Thread(target=self._close, args=(self.superexec,), name="stop", daemon=True)
            try:
                logging.getLogger("flwr").setLevel(logging.WARNING)
                flower = create_app(self._lifespan_config(secret), SuperLinkLifespan)
                application = OnePort(cast(Application, flower), self._api, internal=self.internal)
                self._uvicorn = Uvicorn(self._uvicorn_config(application), self._ready.set)
                closer.start()
                self._uvicorn.run(sockets=self._sockets)
            finally:
                self._stopping.set()
                self.superexec.stop()

    def _close(self, superexec: SuperExec) -> None:
        """On `stop`: the ServerApps say goodbye while there is still somebody to say it to."""
        self._stopping.wait()
        superexec.stop()
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True

    def _superexec_config(self, secret: bytes) -> SuperExecConfig:
        config = self._config
        host, port = self.internal
        logs = config.home / "logs"
        logs.mkdir(mode=0o700, exist_ok=True)
        own = {
            "FEDPACT_HOME": str(config.home),
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_HOME": str(config.home / "flower"),
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": TASK_POLL_SECONDS,
            "FLWR_TELEMETRY_ENABLED": "0",
        }
        return SuperExecConfig(
            address=f"{host}:{port}",
            ca=config.ca,
            secret=secret,
            log=logs / "superexec.log",
            environment=child_environment(own | dict(config.environment)),
        )

    def _lifespan_config(self, secret: bytes) -> SuperLinkLifespanConfig:
        config = self._config
        digest = hashlib.sha256(self._bundle).hexdigest()
        return SuperLinkLifespanConfig(
            control_address="",
            health_server_address=None if config.health_port is None else f"127.0.0.1:{config.health_port}",
            host=config.host,
            port=config.port,
            insecure=False,
            certificates=(config.ca.read_bytes(), config.certificate.read_bytes(), config.key.read_bytes()),
            superexec_auth_secret=secret,
            authn_plugin=_OperatorToken(self._token),
            event_log_plugin=_Gate(digest),
            fleet_event_log_plugin=None,
            enable_event_log=True,
            artifact_provider=None,
            enable_supernode_auth=True,
            fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
            fleet_api_address=None,
            simulation=False,
            ssl_ca_certfile=str(config.ca),
            ssl_certfile=str(config.certificate),
            ssl_keyfile=str(config.key),
            database=config.database,
            isolation=ISOLATION_MODE_PROCESS,
            runtime_dependency_install=False,
        )

    def _uvicorn_config(self, application: OnePort) -> uvicorn.Config:
        return uvicorn.Config(
            cast(Any, application),
            ssl_certfile=self._config.certificate,
            ssl_keyfile=str(self._config.key),
            lifespan="on",
            ws="none",
            proxy_headers=False,
            server_header=False,
            access_log=False,
            log_config=None,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=3,
        )


class Control:
    """The Control calls that Fedpact makes, over the internal socket with the operator's token.

    Every call raises ServiceError CONTROL_AWAY where SuperLink does not answer, and FailedError CONTROL_ERROR where it
    answers with an error that has no code of its own here.
    """

    def __init__(self, address: str, ca_pem: bytes, token: str, bundle: bytes) -> None:
        self._bundle = bundle
        self._client = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=False,
            root_certificates=ca_pem,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI"), _Bearer(token)],
        )

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def register_node(self, public_key_pem: str, name: str) -> int:
        """Let a node connect; returns its number in Flower. A node that is registered already keeps its number.

        Raises:
            InputError: NODE_KEY_FORM.
            RefusedError: NODE_KEY_REVOKED, the key was registered once and unregistered: it never comes back.
        """
        encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        key = load_node_public(public_key_pem).public_bytes(encoding, form)  # the very bytes that the node will send
        with _control_errors():
            known = self._client.ListNodes(ListNodesRequest()).nodes_info
            for node in known:
                if node.public_key == key and node.status != "unregistered":
                    return int(node.node_id)
            try:
                return int(self._client.RegisterNode(RegisterNodeRequest(public_key=key, name=name)).node_id)
            except httpx.HTTPStatusError as err:
                if _flower_code(err) != ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
                    raise
                raise RefusedError(
                    "NODE_KEY_REVOKED",
                    "This node key was unregistered before, and cannot be registered again.",
                    party=name,
                    remedy="The participant makes a new node key and enrols again.",
                ) from err

    def unregister_node(self, flower_node: int) -> None:
        """Let a node connect no more, for good. A node that is unknown or unregistered already is fine."""
        with _control_errors():
            try:
                self._client.UnregisterNode(UnregisterNodeRequest(node_id=flower_node))
            except httpx.HTTPStatusError as err:
                if _flower_code(err) != ApiErrorCode.NODE_NOT_FOUND:
                    raise

    def start_run(self, contract_id: str) -> int:
        """Start a Flower run of the bundle for a contract; returns Flower's run id."""
        fab = Fab(hashlib.sha256(self._bundle).hexdigest(), self._bundle, {})
        request = StartRunRequest(
            fab=fab_to_proto(fab),
            override_config=user_config_to_proto({CONTRACT_KEY: contract_id}),
            federation=FEDERATION,
        )
        with _control_errors():
            return int(self._client.StartRun(request).run_id)

    def run_status(self, flower_run_id: int) -> RunStatus:
        """Where a Flower run stands.

        Raises:
            InputError: FLOWER_RUN_UNKNOWN.
        """
        with _control_errors():
            run = self._client.ListRuns(ListRunsRequest(run_id=flower_run_id)).run_dict[flower_run_id]
        status = run.status.status
        if status not in get_args(RunState):
            raise FailedError("CONTROL_ERROR", f"Flower says that the run is {status!r}, which is unknown here.")
        return RunStatus(status=cast(RunState, status), sub_status=run.status.sub_status, details=run.status.details)

    def stop_run(self, flower_run_id: int) -> None:
        """Stop a Flower run; one that is finished already is fine.

        Raises:
            InputError: FLOWER_RUN_UNKNOWN.
        """
        with _control_errors():
            try:
                self._client.StopRun(StopRunRequest(run_id=flower_run_id))
            except httpx.HTTPStatusError as err:
                if _flower_code(err) != ApiErrorCode.RUN_ALREADY_FINISHED:
                    raise


class _Bearer:
    """Puts the operator's token on each request."""

    def __init__(self, token: str) -> None:
        self._value = f"Bearer {token}"

    def intercept(self, context: Any, call_next: Callable[[Any], httpx.Response]) -> httpx.Response:  # noqa: ANN401 - Flower's context type is private to it
        context.request.headers["authorization"] = self._value
        return call_next(context)


class _OperatorToken(ControlAuthnPlugin):
    """Control is for whoever has the token, which lives in the memory of this process alone."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def get_login_details(self) -> AccountAuthLoginDetails | None:
        return None

    def validate_tokens_in_metadata(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[bool, AccountInfo | None]:
        for _, value in metadata:
            given = value.encode() if isinstance(value, str) else value
            if hmac.compare_digest(given, self._token):
                # Flower's open federation knows one account, so the operator is that one.
                return True, AccountInfo(flwr_aid=NOOP_FLWR_AID, account_name=NOOP_ACCOUNT_NAME)
        return False, None

    def get_auth_tokens(self, device_code: str) -> AccountAuthCredentials | None:  # noqa: ARG002 - Flower's signature
        return None

    def refresh_tokens(
        self,
        metadata: Sequence[tuple[str, str | bytes]],  # noqa: ARG002 - Flower's signature
    ) -> tuple[Sequence[tuple[str, str | bytes]] | None, AccountInfo | None]:
        return None, None


class _Gate(EventLogWriterPlugin):
    """Sees every Control request before it is handled: notes it, and lets runs start from one bundle alone."""

    def __init__(self, digest: str) -> None:
        self._digest = digest

    def compose_log_before_event(
        self,
        request: Any,  # noqa: ANN401 - a protobuf message
        context: Any,  # noqa: ANN401, ARG002 - Flower's signature
        account_info: AccountInfo | None,  # noqa: ARG002 - Flower's signature
        method_name: str,
    ) -> LogEntry:
        if isinstance(request, StartRunRequest):
            check_start(request, self._digest)
        return _entry(method_name, "start")

    def compose_log_after_event(
        self,
        request: Any,  # noqa: ANN401, ARG002 - Flower's signature
        context: Any,  # noqa: ANN401, ARG002 - Flower's signature
        account_info: AccountInfo | None,  # noqa: ARG002 - Flower's signature
        method_name: str,
        response: Any,  # noqa: ANN401 - a protobuf message or an exception
    ) -> LogEntry:
        return _entry(method_name, "error" if isinstance(response, BaseException) else "ok")

    def write_log(self, log_entry: LogEntry) -> None:
        log.debug("control call", call=log_entry.event.action, status=log_entry.status)


def check_start(request: StartRunRequest, digest: str) -> None:
    """Refuse a run of anything but the one bundle, or with anything but a contract id as its configuration.

    Raises:
        HTTPException: 403.
    """
    content = bytes(request.fab.content)
    if hashlib.sha256(content).hexdigest() != digest or request.fab.hash_str != digest or request.app_spec:
        log.warning("run refused", code="BUNDLE_NOT_INSTALLED")
        raise HTTPException(403, "BUNDLE_NOT_INSTALLED")
    extras = (request.user_prompt, request.series_id, request.connector_ids, request.connector_refs)
    if any(extras) or set(request.override_config) != {CONTRACT_KEY}:
        log.warning("run refused", code="RUN_CONFIG")
        raise HTTPException(403, "RUN_CONFIG")


@contextlib.contextmanager
def _control_errors() -> Iterator[None]:
    """Flower's errors as ours."""
    try:
        yield
    except httpx.TransportError as err:
        raise ServiceError("CONTROL_AWAY", "SuperLink does not answer.", remedy="Is `fedpact serve` running?") from err
    except httpx.HTTPStatusError as err:
        if _flower_code(err) == ApiErrorCode.RUN_ID_NOT_FOUND:
            raise InputError("FLOWER_RUN_UNKNOWN", "SuperLink knows no such run.") from err
        if err.response.status_code in (401, 403):
            raise RefusedError("CONTROL_REFUSED", f"SuperLink refused: {err.response.text[:200]}") from err
        raise FailedError("CONTROL_ERROR", f"SuperLink answered {err.response.status_code}.") from err


def _flower_code(err: httpx.HTTPStatusError) -> int | None:
    error = FlowerError.from_json(err.response.text)
    return None if error is None else error.code


def _entry(method: str, status: str) -> LogEntry:
    return LogEntry("", Actor(None, None, ""), Event(method, None, None), status)
