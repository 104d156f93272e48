"""The rim of the operator's API: size and rate limits before anything is read, and errors as the API shows them.

An error is {"error": {code, message, …}}; nobody outside sees a traceback, a path of this machine, or which library
failed.
"""

import asyncio
import json
import time
import traceback
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

import structlog

from fedpact_contract.errors import FailedError, FedpactError, InputError, RefusedError, ServiceError
from fedpact_contract.request import PROBE

log = structlog.get_logger()

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_NOT_FOUND = {"CONTRACT_UNKNOWN", "CONTRACT_NOT_A_PARTY", "NOT_FOUND"}
_CONFLICT = {
    "CARD_BUDGET_CHANGED",
    "CONTRACT_NOT_SIGNED",
    "CONTRACT_STATE",
    "ENROLMENT_KEY_KNOWN",
    "ENROLMENT_TOKEN_CLOSED",
    "ENROLMENT_TOKEN_REUSED",
    "SIGNED_OTHERWISE",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bytes of a request's body and seconds to send it; requests: how many at once, how many a second from then on.

    Agents behind one address share its limit; `enrol` is the limit for requests to join, which carry a token. `probe`,
    with bytes and seconds of its own, is for bodies that are thrown away (`request.PROBE`).
    """

    body: int = 1 << 20
    seconds: float = 30.0
    address: tuple[int, float] = (400, 100.0)
    node: tuple[int, float] = (100, 25.0)
    enrol: tuple[int, float] = (20, 0.5)
    probe: tuple[int, float] = (6, 0.1)
    probe_body: int = 64 << 20
    probe_seconds: float = 120.0


class RateLimiter:
    """A token bucket for each key; the buckets least recently used are forgotten beyond `keys`.

    Args:
        burst: Requests at once.
        per_second: Requests a second after that.
        clock: Monotonic seconds.
        keys: How many keys are remembered.
    """

    def __init__(
        self, burst: int, per_second: float, *, clock: Callable[[], float] = time.monotonic, keys: int = 10_000
    ) -> None:
        self._burst, self._rate, self._clock, self._keys = burst, per_second, clock, keys
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = Lock()

    def take(self, key: str) -> None:
        """Count one request.

        Raises:
            RefusedError: RATE_LIMITED.
        """
        with self._lock:
            now = self._clock()
            left, then = self._buckets.pop(key, (float(self._burst), now))
            left = min(float(self._burst), left + (now - then) * self._rate)
            allowed = left >= 1
            self._buckets[key] = (left - 1 if allowed else left, now)
            while len(self._buckets) > self._keys:
                self._buckets.popitem(last=False)
        if not allowed:
            raise RefusedError("RATE_LIMITED", "Too many requests.", remedy="Wait a few seconds, and ask less often.")


def status_of(error: FedpactError) -> int:
    """The HTTP status of an error."""
    if error.code.startswith("REQUEST_"):
        return 401
    if error.code in _NOT_FOUND:
        return 404
    if error.code in _CONFLICT:
        return 409
    named = {"RATE_LIMITED": 429, "BODY_TOO_LARGE": 413, "BODY_SLOW": 408, "METHOD_NOT_ALLOWED": 405}
    if error.code in named:
        return named[error.code]
    if isinstance(error, ServiceError):
        return 503
    if isinstance(error, FailedError):
        return 500
    return 403 if error.exit_code == RefusedError.exit_code else 400


def error_body(error: FedpactError) -> bytes:
    """The error as the API shows it: without paths of this machine."""
    shown = {key: value for key, value in error.as_dict().items() if key != "file"}
    return json.dumps({"error": shown}, ensure_ascii=False).encode()


class Edge:
    """ASGI middleware: limits first, then the application; whatever it did not expect becomes INTERNAL.

    Args:
        app: The application.
        limits: The limits.
        prefix: The API's root.
    """

    def __init__(self, app: App, *, limits: Limits, prefix: str) -> None:
        self.app, self.limits, self.prefix = app, limits, prefix
        self._address, self._enrol = RateLimiter(*limits.address), RateLimiter(*limits.enrol)
        self._probe = RateLimiter(*limits.probe)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            body = await self._read(scope, receive)
            await self.app(scope, _replay(body, receive), noted)
        except FedpactError as err:
            await _answer(send, status_of(err), error_body(err))
        except Exception as err:  # noqa: BLE001 - the last wall: the caller gets a code, the log gets the place
            frame = traceback.extract_tb(err.__traceback__)[-1]
            place = f"{frame.filename}:{frame.lineno}"
            log.error("request failed", path=scope["path"], error=type(err).__name__, place=place)
            if not started:
                failed = FailedError("INTERNAL", "The operator's server failed.", remedy="Tell the operator the time.")
                await _answer(send, 500, error_body(failed))

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, after the limits that need no body; of a probe nothing, once all of it has come.

        Raises:
            RefusedError: RATE_LIMITED.
            InputError: BODY_TOO_LARGE, BODY_SLOW.
        """
        address = scope["client"][0] if scope.get("client") else "local"
        self._address.take(address)
        if scope["path"] == f"{self.prefix}/enrol":
            self._enrol.take(address)
        if probe := scope["path"] == PROBE:
            self._probe.take(address)
        limit = self.limits.probe_body if probe else self.limits.body
        announced = next((v for k, v in scope["headers"] if k.lower() == b"content-length"), b"0")
        too_large = InputError("BODY_TOO_LARGE", f"A request here has at most {limit} bytes.")
        if not announced.isdigit() or len(announced) > 15 or int(announced) > limit:
            raise too_large
        parts: list[bytes] = []
        more, size = True, 0
        try:
            async with asyncio.timeout(self.limits.probe_seconds if probe else self.limits.seconds):
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        break
                    part = message.get("body", b"")
                    size += len(part)
                    if size > limit:
                        raise too_large
                    if not probe:
                        parts.append(part)
                    more = message.get("more_body", False)
        except TimeoutError as err:
            raise InputError("BODY_SLOW", "The request's body came too slowly.") from err
        scope["fedpact.bytes"] = size
        return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body that was read, once; then what the server says (that the caller has gone)."""
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
