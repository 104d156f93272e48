"""The operator's API, as this agent calls it: HTTPS to one host, trusting one certificate authority, signed requests.

No system certificates, no proxy from the environment, no redirects. What leaves is entered in the egress ledger
before it leaves. What comes back is bounded in size and is text of another party: never shown unfiltered.
"""

import datetime
import json
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from cryptography.hazmat.primitives.asymmetric import ec

from fedpact_client.home import AgentHome
from fedpact_client.store import EgressKind, Store
from fedpact_contract.canonical import canonical_bytes, sha256_hex
from fedpact_contract.contract import contract_id_form
from fedpact_contract.errors import FedpactError, InputError, RefusedError, ServiceError
from fedpact_contract.request import API, PROBE, sign_request, utc_now

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0
MAX_REPLY_BYTES = 16 * 2**20
MAX_EVIDENCE_BYTES = 512 * 2**20
_INPUT_STATUS = {400, 404, 405, 410, 413, 415, 422}
_REFUSED_STATUS = {401, 403, 409, 423, 429}


class AnsweredInputError(InputError):
    """The operator's own answer: it does not take what was asked."""


class AnsweredRefusedError(RefusedError):
    """The operator's own answer: it refuses what was asked."""


Egress = Callable[[EgressKind, str | None, str, bytes], None]
"""Enters one outgoing message in the egress ledger: kind, contract, "METHOD path", bytes; returns when durable."""


def egress_of(store: Store) -> Egress:
    """Enters messages in this store's egress ledger."""

    def record(kind: EgressKind, contract_id: str | None, detail: str, body: bytes) -> None:
        store.record_egress(kind, contract_id, None, len(body), sha256_hex(body), detail=detail)

    return record


@dataclass(frozen=True, slots=True)
class Call:
    """One request: what it is in the egress ledger, whose contract it is about, how large a reply may be."""

    method: str
    path: str
    body: dict[str, Any] | None = None
    kind: EgressKind = EgressKind.REQUEST
    contract_id: str | None = None
    signed: bool = True
    limit: int = MAX_REPLY_BYTES


@dataclass(frozen=True, slots=True)
class OperatorClient:
    """A connection to one operator.

    Args:
        url: https://host:port, no path.
        ca_pem: The only certificates that the connection trusts.
        node_key: Signs the requests.
        record: Enters each outgoing message in the egress ledger.
        transport: Stands for the network in tests.
        now: The clock.
    """

    url: str
    ca_pem: str
    node_key: ec.EllipticCurvePrivateKey
    record: Egress
    transport: "httpx.BaseTransport | None" = None
    now: Callable[[], datetime.datetime] = utc_now
    _client: "httpx.Client" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        import httpx

        client = httpx.Client(
            base_url=self.url,
            verify=tls_context(self.ca_pem),
            trust_env=False,
            follow_redirects=False,
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            transport=self.transport,
            headers={"user-agent": "fedpact-agent", "accept-encoding": "identity"},
        )
        object.__setattr__(self, "_client", client)

    @classmethod
    def of_home(cls, home: AgentHome, record: Egress) -> Self:
        """A connection to the operator that the home is enrolled with.

        Raises:
            InputError: NOT_ENROLLED.
        """
        home.operator()
        url = home.config().operator.url
        if not url:
            raise InputError(
                "NOT_ENROLLED",
                "agent.toml names no address of the operator.",
                file=home.config_path,
                field="operator.url",
                remedy="Run `fedpact-agent enrol INVITATION`.",
            )
        return cls(url, home.operator_ca(), home.load_node_key(), record)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def operator(self) -> dict[str, Any]:
        """Who answers here: name, entity_code, key (asserted, unsigned)."""
        return self._object(Call("GET", f"{API}/operator", signed=False))

    def operator_and_date(self) -> tuple[dict[str, Any], str]:
        """The same, and the answer's Date header (empty where there is none): the operator's clock, to the second."""
        content, date = self._exchange(Call("GET", f"{API}/operator", signed=False), b"")
        return _parsed(content), date

    def probe(self, size: int) -> int:
        """Post so many zero bytes, which the operator throws away; how many of them it saw."""
        content, _ = self._exchange(Call("POST", PROBE), bytes(size), b"")
        count = _parsed(content).get("bytes")
        if not isinstance(count, int):
            raise reply_error("bytes is not a number")
        return count

    def enrol(self, body: dict[str, Any]) -> dict[str, Any]:
        """Ask to join: {"token", "request"}."""
        return self._object(Call("POST", f"{API}/enrol", body, kind=EgressKind.ENROLMENT, signed=False))

    def enrolment(self) -> str:
        """What became of this agent's enrolment: requested, approved, registered, suspended, frozen."""
        return _text(self.get(f"{API}/enrolment"), "state")

    def send_card(self, envelope: dict[str, Any], released: list[dict[str, Any]] | None) -> dict[str, Any]:
        """Send a signed card, and the rows released for validation, if any."""
        return self.post(f"{API}/cards", {"card": envelope, "released": released}, EgressKind.CARD)

    def contracts(self) -> list[dict[str, Any]]:
        """The contracts that name this participant: id, title, state, signed (ids of parties)."""
        found = self.get(f"{API}/contracts").get("contracts")
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise reply_error("contracts is not a list of objects")
        return found

    def contract(self, contract_id: str) -> dict[str, Any]:
        """One contract: payload (canonical text), state, contract (envelope), delegations (envelopes)."""
        return self.get(contract_path(contract_id), contract_id=contract_id)

    def sign(self, contract_id: str, envelope: dict[str, Any], delegation: dict[str, Any]) -> dict[str, Any]:
        """Send this party's signature and delegation."""
        body = {"contract": envelope, "delegation": delegation}
        path = contract_path(contract_id) + "/signature"
        return self.post(path, body, EgressKind.SIGNATURE, contract_id=contract_id)

    def head(self, contract_id: str) -> dict[str, Any]:
        """The log's latest signed checkpoint, as the operator answers it."""
        return self.get(contract_path(contract_id) + "/head", contract_id=contract_id)

    def evidence(self, contract_id: str) -> dict[str, Any]:
        """The evidence files by name."""
        path = contract_path(contract_id) + "/evidence"
        return self.get(path, contract_id=contract_id, limit=MAX_EVIDENCE_BYTES)

    def report(self, contract_id: str, form: str, lang: str = "en") -> bytes:
        """The report's bytes; `form` is html or json, `lang` (of html) en or zh."""
        path = contract_path(contract_id) + f"/report?format={form}&lang={lang}"
        return self.send(Call("GET", path, contract_id=contract_id, limit=MAX_EVIDENCE_BYTES))

    def get(self, path: str, *, contract_id: str | None = None, limit: int = MAX_REPLY_BYTES) -> dict[str, Any]:
        """A signed GET, answered by a JSON object."""
        return self._object(Call("GET", path, contract_id=contract_id, limit=limit))

    def post(
        self, path: str, body: dict[str, Any], kind: EgressKind = EgressKind.REQUEST, *, contract_id: str | None = None
    ) -> dict[str, Any]:
        """A signed POST of canonical JSON, answered by a JSON object."""
        return self._object(Call("POST", path, body, kind=kind, contract_id=contract_id))

    def send(self, call: Call) -> bytes:
        """One request; the reply's bytes.

        Raises:
            ServiceError: OPERATOR_AWAY, no connection or no trusted one; OPERATOR_REPLY, OPERATOR_REPLY_SIZE; or the
                operator's own failure.
            AnsweredInputError, AnsweredRefusedError: the operator's error, with its code.
        """
        data = b"" if call.body is None else canonical_bytes(call.body)
        return self._exchange(call, data)[0]

    def _exchange(self, call: Call, data: bytes, covered: bytes | None = None) -> tuple[bytes, str]:
        """One request with this body, of which the signature covers `covered` if not all; the reply and its Date."""
        import httpx

        headers = {"content-type": "application/json"} if data else {}
        if call.signed:
            signed = data if covered is None else covered
            headers |= sign_request(self.node_key, call.method, call.path, signed, self.now())
        # Requests without a body are messages too: their address leaves.
        self.record(call.kind, call.contract_id, f"{call.method} {call.path}", data)
        try:
            with self._client.stream(call.method, call.path, content=data or None, headers=headers) as reply:
                content = _read(reply, call.limit)
                status, date = reply.status_code, reply.headers.get("date", "")
        except httpx.HTTPError as err:
            raise _away(self.url, err) from err
        if status == 200:
            return content, date
        raise error_of(status, content)

    def _object(self, call: Call) -> dict[str, Any]:
        return _parsed(self.send(call))


def contract_path(contract_id: str) -> str:
    """Where a contract stands in the API.

    Raises:
        InputError: CONTRACT_ID_FORM.
    """
    return f"{API}/contracts/{contract_id_form(contract_id)}"


def tls_context(ca_pem: str) -> ssl.SSLContext:
    """TLS that trusts these certificates alone, checks the host name, and ignores the environment.

    Raises:
        InputError: OPERATOR_CA, not certificates in PEM.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=ca_pem)
    except (ssl.SSLError, ValueError) as err:
        raise InputError(
            "OPERATOR_CA",
            "The operator's certificate authority is not a certificate in PEM.",
            remedy="Ask the operator for a new invitation.",
        ) from err
    return context


def ca_fingerprints(ca_pem: str) -> tuple[str, ...]:
    """SHA-256 (hexadecimal) of each certificate authority that TLS trusts by these certificates, as OpenSSL shows it.

    Raises:
        InputError: OPERATOR_CA.
    """
    return tuple(sha256_hex(certificate) for certificate in tls_context(ca_pem).get_ca_certs(binary_form=True))


def printable(text: str, limit: int = 500) -> str:
    """Another party's text, fit for a terminal: one line, no control characters, bounded."""
    shown = "".join(c if c.isprintable() else " " for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[:limit] + "..."


def error_of(status: int, content: bytes) -> FedpactError:
    """The operator's error as ours, with its code; an answer of another form is a ServiceError."""
    try:
        error = json.loads(content.decode("utf-8"))["error"]
        code, message = error["code"], error["message"]
        places = {k: error[k] for k in ("field", "party", "rule", "remedy") if isinstance(error.get(k), str)}
    except (UnicodeDecodeError, ValueError, RecursionError, KeyError, TypeError):
        return reply_error(f"it has status {status} and no readable error")
    if not isinstance(code, str) or not code.replace("_", "").isalnum() or not code.isupper() or len(code) > 80:
        return reply_error(f"it has status {status} and no error code")
    kind: type[FedpactError] = ServiceError
    if status in _INPUT_STATUS:
        kind = AnsweredInputError
    elif status in _REFUSED_STATUS:
        kind = AnsweredRefusedError
    shown = {k: printable(v) for k, v in places.items()}
    return kind(code, f"The operator answers: {printable(str(message))}", **shown)


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as err:
        raise reply_error("it is not JSON") from err
    if not isinstance(value, dict):
        raise reply_error("it is not an object")
    return value


def _read(reply: "httpx.Response", limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    for part in reply.iter_raw():
        size += len(part)
        if size > limit:
            raise ServiceError(
                "OPERATOR_REPLY_SIZE",
                f"The operator's reply is larger than {limit} bytes.",
                remedy="Tell the operator; nothing was taken over.",
            )
        parts.append(part)
    return b"".join(parts)


def _away(url: str, err: Exception) -> ServiceError:
    cause: BaseException | None = err
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return ServiceError(
            "OPERATOR_AWAY",
            f"The server at {url} does not show a certificate of this operator: {cause.verify_message}.",
            rule="TLS by the invitation's certificate authority",
            remedy="Check the address. Behind an intercepting proxy, ask for a direct way to this one port.",
        )
    return ServiceError(
        "OPERATOR_AWAY",
        f"The operator at {url} does not answer: {printable(str(err)) or type(err).__name__}.",
        remedy="Check the network (outbound TCP to this host and port), then try again.",
    )


def _text(value: dict[str, Any], key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        raise reply_error(f"{key} is not text")
    return printable(text)


def reply_error(what: str) -> ServiceError:
    """The operator answers what cannot be used."""
    return ServiceError(
        "OPERATOR_REPLY",
        f"The operator's reply cannot be used: {what}.",
        remedy="Check that the address in agent.toml is the operator's; else tell the operator.",
    )
