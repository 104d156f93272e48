"""The filter in front of everything: which request may reach which application, by the socket it came in on.

The public socket is the operator's one port; the internal one is bound to loopback. What a request may do depends on
the socket alone, never on the peer's address: a reverse proxy or a participant on the same machine must not inherit
the rights of loopback. Everything that is not listed is refused.

    public    POST /v1/fleet/*, GET /health, /fedpact/*   (of ours, `PROBE` alone takes bodies as large as Flower's)
    internal  the same, and the Control and Runtime calls that Fedpact uses (Flower asks for the token or the secret)

Paths are compared as the application's router sees them, and a path that could read differently elsewhere (encoded
separators, dot segments, a Host header that is no host) is refused before that.
"""

import json
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Literal

from fedpact_contract.request import PROBE

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Target = Literal["flower", "api"]

CONTROL = frozenset({"start-run", "stop-run", "list-runs", "register-node", "unregister-node", "list-nodes"})
"""Control calls that Fedpact makes. Automations, connectors, log-in and stored apps are not among them."""

RUNTIME = frozenset(
    {
        "acquire-task",
        "confirm-message-received",
        "get-nodes",
        "pull-messages",
        "pull-object",
        "pull-task-input",
        "push-logs",
        "push-messages",
        "push-object",
        "push-task-output",
        "send-task-heartbeat",
    }
)
"""Runtime calls that the SuperExec and the ServerApp make."""

MAX_API_BODY = 1 << 20
MAX_FLEET_BODY = 64 << 20
"""Flower's objects are chunks of 5 MiB by default; 32 MiB chunks also pass."""

_FLEET = re.compile(r"/v1/fleet/[a-z-]{1,64}")
_HOST = re.compile(r"([a-z0-9_.-]+|\[[a-f0-9:.]+\])(:[0-9]{1,5})?", re.IGNORECASE)
_LENGTH = re.compile(rb"[0-9]{1,15}")
_ENCODED = re.compile(rb"%(2f|5c|2e|25|00)", re.IGNORECASE)
_REASONS = {
    400: ("REQUEST_FORM", "The request is malformed."),
    403: ("FORBIDDEN", "This is not served here."),
    405: ("METHOD", "This method is not served here."),
    411: ("LENGTH_REQUIRED", "A body needs a Content-Length."),
    413: ("BODY_TOO_LARGE", "The body is larger than this service takes."),
}


class OnePort:
    """An ASGI application that hands requests to Flower's application or to ours, or refuses them.

    Args:
        flower: Flower's SuperLink application; it also gets the lifespan events.
        api: Our own application, for `/fedpact/*`; its paths arrive unchanged. It gets no lifespan events.
        internal: Address and port of the internal socket, as `scope["server"]` shows them.
        max_api_body: Largest body of a request to our application, in bytes.
    """

    def __init__(
        self, flower: Application, api: Application, *, internal: tuple[str, int], max_api_body: int = MAX_API_BODY
    ) -> None:
        self._applications: dict[Target, Application] = {"flower": flower, "api": api}
        self._internal = internal
        self._max_api_body = max_api_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Decide one connection."""
        if scope["type"] == "lifespan":
            await self._applications["flower"](scope, receive, send)
            return
        if scope["type"] != "http":
            await _close_websocket(receive, send)
            return
        internal = tuple(scope["server"] or ()) == self._internal
        verdict = decide(
            method=scope["method"],
            path=scope["path"],
            raw_path=scope.get("raw_path"),
            headers=scope["headers"],
            internal=internal,
            max_api_body=self._max_api_body,
        )
        if isinstance(verdict, int):
            await _refuse(send, verdict)
        else:
            await self._applications[verdict](scope, receive, send)


def decide(
    *,
    method: str,
    path: str,
    raw_path: bytes | None,
    headers: Iterable[tuple[bytes, bytes]],
    internal: bool,
    max_api_body: int = MAX_API_BODY,
) -> Target | int:
    """Which application a request goes to, or the HTTP status that refuses it."""
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or any(not _HOST.fullmatch(value.decode("latin-1")) for value in hosts):
        return 400
    if _ambiguous(path, raw_path):
        return 403
    verdict = _target(method, path, internal=internal)
    if isinstance(verdict, int) or (internal and verdict == "flower"):
        return verdict
    large = verdict == "flower" or path == PROBE
    return _oversized(headers, MAX_FLEET_BODY if large else max_api_body) or verdict


def _target(method: str, path: str, *, internal: bool) -> Target | int:
    if path == "/fedpact" or path.startswith("/fedpact/"):
        return "api"
    if path == "/health":
        return "flower" if method in ("GET", "HEAD") else 405
    known = bool(_FLEET.fullmatch(path)) or (internal and _is_inner_call(path))
    if not known:
        return 403
    return "flower" if method == "POST" else 405


def _is_inner_call(path: str) -> bool:
    for prefix, calls in (("/v1/control/", CONTROL), ("/v1/runtime/", RUNTIME)):
        if path.startswith(prefix):
            return path.removeprefix(prefix) in calls
    return False


def _ambiguous(path: str, raw_path: bytes | None) -> bool:
    """Whether another reader of this path might see another one."""
    if not path.startswith("/") or "//" in path or "\\" in path or any(ord(c) < 0x20 or ord(c) == 0x7F for c in path):
        return True
    if any(part in (".", "..") for part in path.split("/")):
        return True
    return raw_path is not None and bool(_ENCODED.search(raw_path))


def _oversized(headers: Iterable[tuple[bytes, bytes]], limit: int) -> int:
    """The status that refuses a body without a declared length (411) or over the limit (413), or 0."""
    lengths = [value for name, value in headers if name == b"content-length"]
    if any(name == b"transfer-encoding" for name, _ in headers):
        return 411
    if len(lengths) > 1 or any(not _LENGTH.fullmatch(value) for value in lengths):
        return 400
    return 413 if lengths and int(lengths[0]) > limit else 0


async def _refuse(send: Send, status: int) -> None:
    code, message = _REASONS[status]
    body = json.dumps({"code": code, "message": message}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _close_websocket(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.close", "code": 1008})
