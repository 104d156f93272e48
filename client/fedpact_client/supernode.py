"""Flower's SuperNode in the executor's main thread, and its Runtime API at a loopback port of this process.

Supported parameters stand in `SuperNode`; what patches Flower's internals stands in `patch`, is a switch
(`network.patched` in agent.toml), and tests/unit/test_flower_contract.py fails where a patched place has moved.
Import this module only when the environment is set (`executor.set_environment`): flwr reads it when it is imported.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.common.constant import ISOLATION_MODE_PROCESS, Status
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode import start_client_internal as flower
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from fedpact_contract.errors import InputError, ServiceError

START_SECONDS = 20.0
PATCHED_BACKOFF = 0.02
PATCHED_WAIT = 0.02


class SuperNode:
    """One SuperNode with isolation "process": tasks are taken from its Runtime API, which asks for a secret.

    The secret and the node's private key stay in this process.

    Args:
        superlink: "host:port" of the operator.
        ca: The operator's CA certificate (PEM).
        node_key: The node's key, an OpenSSH file.

    Raises:
        InputError: NODE_KEY_FORM, CA_UNREADABLE.
    """

    def __init__(self, *, superlink: str, ca: Path, node_key: Path) -> None:
        self._superlink = superlink
        self._key = _load_key(node_key)
        try:
            self._ca = ca.read_bytes()
        except OSError as err:
            raise InputError("CA_UNREADABLE", "The operator's CA certificate cannot be read.", file=ca) from err
        self.secret = os.urandom(32)
        self._states = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
        self._socket = socket.create_server(("127.0.0.1", 0))

    @property
    def runtime_address(self) -> str:
        """Host and port of the Runtime API."""
        host, port = self._socket.getsockname()
        return f"{host}:{port}"

    def task_waits(self) -> bool:
        """Whether there is a task to take, asked of the state in this process: the Runtime API would need a request."""
        return bool(self._states.state().get_tasks(statuses=[Status.PENDING]))

    def start_runtime(self) -> None:
        """Serve the Runtime API, in a thread.

        Raises:
            ServiceError: RUNTIME_NOT_READY.
        """
        config = uvicorn.Config(
            create_app(state_factory=self._states, superexec_auth_secret=self.secret),
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
            SystemExit: always; `activation_failed` says whether SuperLink did not let the node in.
        """
        flower.start_client_internal(
            state_factory=self._states,
            server_address=self._superlink,
            node_config={},
            root_certificates=self._ca,
            insecure=False,
            authentication_keys=(self._key, self._key.public_key()),
            isolation=ISOLATION_MODE_PROCESS,
            runtime_api_address=self.runtime_address,
            superexec_auth_secret=self.secret,
            runtime_dependency_install=False,
        )
        raise SystemExit(1)  # the connection ended by itself


def activation_failed(err: SystemExit) -> bool:
    """Whether Flower ended because SuperLink did not activate the node.

    That is so while an earlier connection of the node has not expired (up to a minute), and for an unknown key.
    """
    cause = err.__context__
    if not isinstance(cause, httpx.HTTPStatusError):
        return False
    error = FlowerError.from_json(cause.response.text)
    return error is not None and error.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED


def patch(poll_seconds: float) -> None:
    """Shorten waits that Flower hard-codes.

    - The worker sleeps 3 s between two looks for a message: `poll_seconds` instead.
    - It sleeps .5 s between two looks for the reply, and for its objects: 20 ms instead; the state is in this process.
    - It waits 1 s, doubling, for objects of a message that is not whole yet: 20 ms, doubling, instead.
    """
    flower.time = _ShortTime(poll_seconds)  # type: ignore[attr-defined]  # the module's own name for `time`
    for function in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        function.__kwdefaults__["initial_backoff"] = PATCHED_BACKOFF


class _ShortTime:
    """`time` for Flower's worker module, which uses `sleep` alone."""

    def __init__(self, poll_seconds: float, sleep: Callable[[float], None] = time.sleep) -> None:
        self._poll_seconds = poll_seconds
        self._sleep = sleep

    def sleep(self, seconds: float) -> None:
        """A long wait is the idle poll; a short one waits for this very process."""
        self._sleep(self._poll_seconds if seconds >= 1 else PATCHED_WAIT)


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as err:
        raise InputError("NODE_KEY_FORM", "The node key is not a readable OpenSSH private key.", file=path) from err
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError("NODE_KEY_FORM", "The node key is not an ECDSA key.", file=path)
    return key
