"""The way to the operator, as `preflight` walks it: name, TCP, TLS, key, clock, and a post as large as an update."""

import contextlib
import datetime
import os
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from fedpact_client.api import (
    CONNECT_SECONDS,
    AnsweredInputError,
    AnsweredRefusedError,
    Egress,
    OperatorClient,
    printable,
    tls_context,
)
from fedpact_client.home import AgentHome, OperatorData
from fedpact_client.preflight import MEBIBYTE, Finding, failed, tried
from fedpact_client.store import Agreement
from fedpact_contract.errors import FaultError, FedpactError, RefusedError, ServiceError
from fedpact_contract.messages import Invitation
from fedpact_contract.request import MAX_SKEW_SECONDS

AHEAD_SECONDS = 5
"""How far this clock may be ahead of the operator's: Flower refuses a node beyond (its SYSTEM_TIME_TOLERANCE)."""
BEHIND_SECONDS = MAX_SKEW_SECONDS
"""And how far behind: what the operator's API takes, and Flower too."""
ROUGH_SECONDS = 1
"""The Date header is to the second."""
CHUNK_BYTES = 5 * MEBIBYTE
"""Flower cuts an array into pieces of so many bytes: no larger body ever carries an update."""
POST_BYTES = 8 * MEBIBYTE
MAX_POST_BYTES = 64 * MEBIBYTE
ANSWERED = (AnsweredInputError, AnsweredRefusedError)
DIRECT = "Ask for a direct way to this one port: outbound TCP, not intercepted."
STATES = {
    "requested": "The operator has still to approve it: read your fingerprint to it by telephone.",
    "suspended": "Ask the operator why it suspended this agent; it sends no more orders.",
    "frozen": "Call the operator: the invitation's token was used a second time, with other keys.",
}


@dataclass(frozen=True, slots=True)
class Way:
    """Where the operator is said to be, by whose certificates, and the fingerprint of its key."""

    url: str
    ca_pem: str
    operator: str
    enrolled: bool

    @classmethod
    def of_home(cls, home: AgentHome) -> "Way":
        """The operator that this home is enrolled with.

        Raises:
            InputError: NOT_ENROLLED, or a damaged file.
        """
        known = home.operator()
        return cls(home.config().operator.url, home.operator_ca(), known.id, enrolled=True)

    @classmethod
    def of_invitation(cls, invitation: Invitation) -> "Way":
        """The operator of an invitation."""
        return cls(str(invitation.url), invitation.ca_pem, invitation.operator, enrolled=False)

    @property
    def host(self) -> str:
        """The host's name or address."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        """The one port."""
        return urlsplit(self.url).port or 443


def network(home: AgentHome, way: Way, record: Egress | None, size: int) -> Iterator[Finding]:
    """Step by step to the operator; what lies behind a step that failed is not tried.

    Args:
        home: The agent's home: its node key signs.
        way: Where the operator is.
        record: Enters what leaves in the egress ledger; None where that cannot be used: then nothing leaves.
        size: Bytes to post.
    """
    steps = ["DNS", "TCP", "TLS"]
    checks = [lambda: _names(way), lambda: _connect(way), lambda: _tls(way)]
    for step, check in zip(steps, checks, strict=True):
        found = tried(step, check)
        yield found
        if found.state == "fail":
            yield Finding(name="operator", state="skip", detail=f"{step} failed")
            return
    yield from _proxies()
    if record is None:
        yield Finding(name="operator", state="skip", detail="nothing leaves while the ledgers cannot be used")
        return
    with OperatorClient(way.url, way.ca_pem, home.load_node_key(), record) as client:
        yield from _talk(client, way, size)


def post_bytes(running: list[Agreement]) -> int:
    """How much to post: as much as the largest update of a contract here, and more than one of Flower's pieces."""
    from fedpact_models.registry import parameter_count

    sizes = [4 * parameter_count(a.contract.model, a.contract.data) for a in running]
    return min(MAX_POST_BYTES, max([POST_BYTES, *sizes]))


def _names(way: Way) -> str:
    try:
        found = socket.getaddrinfo(way.host, way.port, type=socket.SOCK_STREAM)
    except OSError as err:
        raise ServiceError(
            "DNS",
            f"The name {way.host} has no address here: {err.strerror or err}.",
            remedy="Ask for it to be resolved on this machine, or enter it in /etc/hosts.",
        ) from err
    return f"{way.host} is {', '.join(sorted({str(item[4][0]) for item in found}))}"


def _connect(way: Way) -> str:
    began = time.monotonic()
    try:
        with socket.create_connection((way.host, way.port), CONNECT_SECONDS) as connection:
            peer = connection.getpeername()[0]
    except OSError as err:
        raise ServiceError(
            "TCP",
            f"{way.host}, port {way.port}, does not take a connection: {err.strerror or err}.",
            remedy="Allow outbound TCP from this machine to this one host and port, without a proxy; or the operator "
            "does not serve now.",
        ) from err
    return f"{peer}, port {way.port}, in {(time.monotonic() - began) * 1000:.0f} ms"


def _tls(way: Way) -> str:
    context = tls_context(way.ca_pem)
    try:
        with (
            socket.create_connection((way.host, way.port), CONNECT_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=way.host) as secure,
        ):
            ends = str((secure.getpeercert() or {}).get("notAfter", "unknown"))
            return f"{secure.version()}, a certificate by the operator's own authority, good until {ends}"
    except ssl.SSLCertVerificationError as err:
        raise ServiceError(
            "TLS_CERTIFICATE",
            f"What answers does not show a certificate of this operator for {way.host}: {err.verify_message}.",
            remedy=f"If something on the way opens TLS: {DIRECT} Else compare address and clock.",
        ) from err
    except OSError as err:
        raise ServiceError(
            "TLS", f"What answers speaks no TLS with this machine: {err.strerror or err}.", remedy=DIRECT
        ) from err


def _proxies() -> Iterator[Finding]:
    """A proxy in the environment is not used: what is sent must reach the operator as it was signed."""
    names = sorted(n for n in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy") if os.environ.get(n))
    if names:
        detail = f"{names[0]} is set, and the agent uses no proxy"
        yield Finding(name="proxy", state="warn", detail=detail, remedy=f"{DIRECT} It was reached directly just now.")


def _talk(client: OperatorClient, way: Way, size: int) -> Iterator[Finding]:
    try:
        began = utc_time()
        answer, date = client.operator_and_date()
        waited = (utc_time() - began).total_seconds()
        yield tried("operator", lambda: _operator(OperatorData.parse(answer, code="OPERATOR_DATA"), way))
    except FedpactError as err:
        yield failed("operator", err)
        return
    yield tried("clock", lambda: _clock(date, began, waited))
    yield tried("post", lambda: _post(client, size))
    if way.enrolled:
        yield tried("enrolment", lambda: _enrolment(client.enrolment()))


def utc_time() -> datetime.datetime:
    """The clock, with fractions of a second."""
    return datetime.datetime.now(datetime.UTC)


def _operator(answer: OperatorData, way: Way) -> str:
    if answer.id != way.operator:
        raise FaultError(
            "OPERATOR_FINGERPRINT",
            f"The key that answers has the fingerprint {answer.id}; pinned is {way.operator}.",
            party=printable(answer.name),
            remedy="Do not go on. Call the operator on a number that you know and compare.",
        )
    return f"{printable(answer.name)}, by the pinned fingerprint {way.operator}"


def _clock(date: str, began: datetime.datetime, waited: float) -> Finding | str:
    """This clock against the operator's, which was read at some moment between question and answer."""
    try:
        theirs = parsedate_to_datetime(date)
    except ValueError as err:
        raise ServiceError(
            "CLOCK_UNKNOWN", "The operator's answer has no date.", remedy="Compare this machine's clock by NTP."
        ) from err
    # The header is cut to the second: the true difference lies between these two.
    least = (began - theirs).total_seconds() - ROUGH_SECONDS
    most = (began - theirs).total_seconds() + waited
    limits = f"at most {AHEAD_SECONDS} s ahead and {BEHIND_SECONDS} s behind are taken"
    if least > AHEAD_SECONDS or most < -BEHIND_SECONDS:
        off = f"{least:.0f} s ahead of" if least > 0 else f"{-most:.0f} s behind"
        detail, remedy = f"this clock is {off} the operator's; {limits}", "Set this machine's clock (NTP)."
        return Finding(name="clock", state="fail", detail=detail, remedy=remedy, code="CLOCK")
    if most < -BEHIND_SECONDS / 10:
        detail, remedy = f"this clock is {-most:.0f} s behind the operator's; {limits}", "Set this clock (NTP)."
        return Finding(name="clock", state="warn", detail=detail, remedy=remedy)
    return f"within {max(abs(least), abs(most)):.1f} s of the operator's; {limits}"


def _post(client: OperatorClient, size: int) -> str:
    """As many bytes as an update has come through, in one body."""
    began = time.monotonic()
    try:
        seen = client.probe(size)
    except ANSWERED as err:
        if err.code == "RATE_LIMITED":
            raise
        if not err.code.startswith("REQUEST_"):
            raise _cut(size, err) from err
        seen = size  # the operator reads all of a body before it asks who sends it
    except ServiceError as err:
        raise _cut(size, err, _passes(client)) from err
    seconds = time.monotonic() - began
    if seen != size:
        raise _cut(size, None, f" {seen} arrived.")
    return f"{size / MEBIBYTE:.0f} MiB in one body, in {seconds:.1f} s ({size * 8e-6 / seconds:.0f} Mbit/s)"


def _passes(client: OperatorClient) -> str:
    """Whether a small post passes where a large one did not: then it is the size."""
    try:
        with contextlib.suppress(*ANSWERED):  # an answer is one too
            client.probe(MEBIBYTE // 2)
    except FedpactError:
        return " Neither does one of half a MiB."
    return " A post of half a MiB passes: something on the way limits the size of a body."


def _cut(size: int, err: FedpactError | None, more: str = "") -> RefusedError:
    why = "" if err is None else f" {err.message}"
    return RefusedError(
        "POST_CUT",
        f"A post of {size / MEBIBYTE:.0f} MiB does not reach the operator.{why}{more}",
        remedy=f"Raise the body limit of what stands before the operator to {MAX_POST_BYTES // MEBIBYTE} MiB "
        f"({CHUNK_BYTES // MEBIBYTE} MiB and its frame at the least). {DIRECT}",
    )


def _enrolment(state: str) -> Finding | str:
    if state == "requested":
        return Finding(name="enrolment", state="warn", detail=state, remedy=STATES[state])
    if state in STATES:
        code = f"PARTICIPANT_{state.upper()}"
        return Finding(name="enrolment", state="fail", detail=state, remedy=STATES[state], code=code)
    return state
