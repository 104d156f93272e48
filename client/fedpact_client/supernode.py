"""Flower's SuperNode: in the executor's main thread, with its Runtime API at a loopback port of the same process.

Supported parameters stand in `SuperNode`; what patches Flower's waits stands in `patch` and is a switch
(`network.patched` in agent.toml), what it must not tell the operator in `tell_no_seconds`;
tests/unit/test_flower_contract.py fails where a patched place has moved.
Import this module only when the environment is set (`executor`): flwr reads it when it is imported.
"""

import hashlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable

import httpx
import structlog
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.constant import ISOLATION_MODE_PROCESS, ErrorCode, Status, SubStatus
from flwr.common.serde import context_from_proto
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullAppMessagesRequest, PullTaskInputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, pull_and_inflate_object_from_tree
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode import start_client_internal as flower
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.main import create_app
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from flwr.supernode.nodestate import NodeState, NodeStateFactory
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

from fedpact_contract.errors import InputError, ServiceError

log = structlog.get_logger()

ORDER, MODEL, REPLY, UPDATE = "order", "model", "reply", "update"
"""The names in a message and in its reply; the form is described in the coordinator's `app`."""

FLAT = "fedpact.flat"
"""How an array's bytes are meant: its values, little-endian, and nothing else."""

INLINE_BYTES = 1 << 18
"""Up to here the array stands in the config record: each further object is one more request at every hop."""

ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
START_SECONDS = 20.0
POLL_SECONDS = 0.2
BACKOFF_SECONDS = 0.02
"""Between two looks for an object that SuperNode has not pulled yet, doubling: a public parameter."""

PATCHED_SECONDS = 0.02
PATCHED_BACKOFF_SECONDS = 0.05


class SuperNode:
    """One SuperNode with isolation "process": tasks are taken from its Runtime API, which asks for a secret.

    The secret and the node's private key stay in this process.

    Args:
        superlink: "host:port" of the operator.
        ca: The operator's CA certificate (PEM).
        node_key: The node's key (OpenSSH).
        patched_poll: Seconds between two looks for a message at SuperLink, by `patch`; None to run Flower as it is.

    Raises:
        InputError: NODE_KEY_FORM.
    """

    def __init__(self, *, superlink: str, ca: bytes, node_key: bytes, patched_poll: float | None) -> None:
        logging.getLogger("flwr").setLevel(logging.WARNING)
        self._superlink = superlink
        self._key = _load_key(node_key)
        self._ca = ca
        self._patched = patched_poll is not None
        self.poll_seconds = PATCHED_SECONDS if self._patched else POLL_SECONDS
        if patched_poll is not None:
            patch(patched_poll)
        self._secret = os.urandom(32)
        self._states = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
        tell_no_seconds(self._states.state())
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._superexec = self._client(
            "SuperExec", SuperExecAuthHttpInterceptor(master_secret=self._secret, protected_methods=[ACQUIRE])
        )

    def start_runtime(self) -> None:
        """Serve the Runtime API, in a thread.

        Raises:
            ServiceError: RUNTIME_NOT_READY.
        """
        config = uvicorn.Config(
            create_app(state_factory=self._states, superexec_auth_secret=self._secret),
            lifespan="off",
            ws="none",
            proxy_headers=False,
            access_log=False,
            log_config=None,
        )
        server = uvicorn.Server(config)
        threading.Thread(target=server.run, args=([self._socket],), name="runtime", daemon=True).start()
        patience = time.monotonic() + START_SECONDS
        while not server.started:
            if time.monotonic() > patience:
                raise ServiceError("RUNTIME_NOT_READY", "The SuperNode's Runtime API did not start.")
            time.sleep(0.005)

    def run(self) -> None:
        """Connect and serve until a signal; in the main thread, for Flower sets signal handlers.

        Raises:
            SystemExit: always, but where the connection ended by itself.
        """
        flower.start_client_internal(
            state_factory=self._states,
            server_address=self._superlink,
            node_config={},
            root_certificates=self._ca,
            insecure=False,
            authentication_keys=(self._key, self._key.public_key()),
            isolation=ISOLATION_MODE_PROCESS,
            runtime_api_address=self._address,
            superexec_auth_secret=self._secret,
            runtime_dependency_install=False,
        )

    def activation_failed(self, err: SystemExit) -> bool:
        """Whether Flower ended because SuperLink did not activate the node.

        That is so while an earlier connection of the node has not expired, and for an unknown key.
        """
        cause = err.__context__
        if not isinstance(cause, httpx.HTTPStatusError):
            return False
        error = FlowerError.from_json(cause.response.text)
        return error is not None and error.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED

    @property
    def node(self) -> int | None:
        """The node's number, which Flower's worker knows once SuperLink has let it in."""
        try:
            return self._states.state().get_node_id() or None
        except ValueError:  # not set yet
            return None

    def end_connection(self, node: int) -> None:
        """Say the goodbye that a process of this node could not say; where SuperLink knows of none, nothing happens."""
        with FleetHttpClient.from_server_address(
            self._superlink,
            insecure=False,
            root_certificates=self._ca,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(self._key, self._key.public_key()),
            ],
        ) as client:
            try:
                client.DeactivateNode(DeactivateNodeRequest(node_id=node))
            except (httpx.HTTPError, RuntimeError) as err:
                log.info("no earlier connection ended", reason=type(err).__name__)
            else:
                log.info("earlier connection ended")

    def take(self) -> "FlowerTask | None":
        """The next order, if there is one."""
        if self._patched and not self._task_waits():
            return None
        response = self._superexec.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        if not (response.HasField("task") and response.token):
            return None
        task = FlowerTask(self._client("flwr-clientapp", RuntimeTokenHttpInterceptor(response.token)))
        return task if task.pull() else None

    def _task_waits(self) -> bool:
        """Ask the state in this process: to ask the Runtime API costs a request."""
        return bool(self._states.state().get_tasks(statuses=[Status.PENDING]))

    @property
    def _address(self) -> str:
        host, port = self._socket.getsockname()
        return f"{host}:{port}"

    def _client(
        self, name: str, interceptor: RuntimeTokenHttpInterceptor | SuperExecAuthHttpInterceptor
    ) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            server_address=self._address,
            insecure=True,  # within this process, by loopback
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name=name), interceptor],
        )


class FlowerTask:
    """One order (`executor.Task`). Its lease is kept alive until it is answered, however long training takes."""

    def __init__(self, client: RuntimeHttpClient) -> None:
        self.order: bytes | None = None
        self.model = b""
        self.bundle = ""
        self._client = client
        self._context: Context | None = None
        self._message: Message | None = None
        self._heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
        self._heartbeat.start()

    def pull(self) -> bool:
        """Pull order and model from SuperNode; False where there is nothing to answer (any more)."""
        try:
            inputs = self._client.PullTaskInput(PullTaskInputRequest())
            self.bundle = hashlib.sha256(inputs.fab.content).hexdigest()
            context = self._context = context_from_proto(inputs.context)
            node = Node(node_id=context.node_id)
            (tree,) = self._client.PullMessages(PullAppMessagesRequest()).message_object_trees
            message = self._message = pull_and_inflate_object_from_tree(
                tree,
                make_pull_object_fn_protobuf(self._client.PullObject, node, context.run_id),
                make_confirm_message_received_fn_protobuf(self._client.ConfirmMessageReceived, node, context.run_id),
                return_type=Message,
                initial_backoff=BACKOFF_SECONDS,
            )
        except (httpx.HTTPError, ObjectPullError, LookupError, TypeError, ValueError) as err:
            # SuperNode gave the message up, or it is none. When the lease has run out, SuperNode answers by itself.
            log.warning("task lost", reason=type(err).__name__)
            self._close()
            return False
        message.metadata.__dict__["_message_id"] = tree.object_id  # as Flower does: a deflated message has no id
        try:
            self.order, self.model = read_order(message)
        except OrderFormError:
            log.warning("message of another form")
        return True

    def answer(self, reply: bytes, array: bytes) -> None:
        """Send the reply."""
        content = RecordDict({REPLY: ConfigRecord({REPLY: reply})})
        if len(array) > INLINE_BYTES:
            content[UPDATE] = ArrayRecord({UPDATE: Array("float32", (len(array) // 4,), FLAT, array)})
        else:
            content.config_records[REPLY][UPDATE] = array
        self._push(lambda message: Message(content, reply_to=message), SubStatus.COMPLETED, "")

    def fail(self, text: str) -> None:
        """Send an error reply with a fixed text."""
        error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=text)
        self._push(lambda message: Message(error, reply_to=message), SubStatus.FAILED, text)

    def _push(self, reply: Callable[[Message], Message], sub_status: str, details: str) -> None:
        assert self._message is not None  # noqa: S101 - `pull` said that there is one
        assert self._context is not None  # noqa: S101 - the same
        try:
            push_message(self._client, reply(self._message), self._context)
            push_task_output(self._client, self._context, sub_status, details)
        finally:
            self._close()

    def _close(self) -> None:
        if self._heartbeat.is_running:
            self._heartbeat.stop()
        self._client.close()


class OrderFormError(ValueError):
    """A message is not of the agreed form."""


def read_order(message: Message) -> tuple[bytes, bytes]:
    """Order and model (flat float64) of a message.

    Raises:
        OrderFormError: anything else.
    """
    content = message.content if message.has_content() else RecordDict()
    config = content.get(ORDER)
    if not isinstance(config, ConfigRecord) or not set(content) <= {ORDER, MODEL}:
        raise OrderFormError("records")
    order = config.get(ORDER)
    model = _array(content[MODEL]) if MODEL in content else config.get(MODEL)
    if not isinstance(order, bytes) or not isinstance(model, bytes) or not set(config) <= {ORDER, MODEL}:
        raise OrderFormError("values")
    return order, model


def _array(record: object) -> bytes:
    if not isinstance(record, ArrayRecord) or set(record) != {MODEL}:
        raise OrderFormError("array record")
    array = record[MODEL]
    if (array.stype, array.dtype) != (FLAT, "float64") or array.shape != (len(array.data) / 8,):
        raise OrderFormError("array")
    return array.data


def tell_no_seconds(state: NodeState) -> None:
    """Have Flower send 0 with each reply where it sends for how many seconds a task ran: that depends on the rows.

    No switch leaves this out (`network.patched` is about waits): only planned figures leave an enterprise.
    """
    seconds = state.get_message_processing_duration

    def none(message_id: str) -> float:
        seconds(message_id)  # it also forgets old messages
        return 0.0

    vars(state)["get_message_processing_duration"] = none


def patch(poll_seconds: float) -> None:
    """Shorten waits that Flower hard-codes.

    - The worker sleeps 3 s between two looks for a message: see `ShortTime`.
    - It sleeps .5 s between two looks for the reply, and for its objects: 20 ms instead; they come from this process.
    - It waits 1 s, doubling, for objects of a message that is not whole yet: 50 ms, doubling, instead.
    """
    vars(flower)["time"] = ShortTime(poll_seconds)  # what the worker's module calls `time`
    defaults = inflatable_utils.pull_objects.__kwdefaults__
    assert defaults is not None  # noqa: S101 - a contract test looks
    defaults["initial_backoff"] = PATCHED_BACKOFF_SECONDS


class ShortTime:
    """`time` for Flower's worker module, which uses `sleep` alone.

    The idle wait is a tenth of the time without a message so far, between `poll_seconds` and Flower's own: in a round
    a node is quick, and a node without work costs the operator little (a look costs it some 5 ms of CPU).
    """

    def __init__(
        self,
        poll_seconds: float,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._poll_seconds = poll_seconds
        self._sleep = sleep
        self._clock = clock
        self._busy = clock()

    def sleep(self, seconds: float) -> None:
        """A long wait is the idle poll; a short one waits for this very process."""
        if seconds < 1:
            self._busy = self._clock()
            self._sleep(PATCHED_SECONDS)
        else:
            self._sleep(min(seconds, max(self._poll_seconds, (self._clock() - self._busy) / 10)))


def _load_key(data: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_ssh_private_key(data, None)
    except (ValueError, TypeError) as err:
        raise InputError("NODE_KEY_FORM", "The node key is not a readable OpenSSH private key.") from err
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError("NODE_KEY_FORM", "The node key is not an ECDSA key.")
    return key
