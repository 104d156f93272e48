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

from fedpact_client.home import AgentHome, contract_id_form
from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.errors import FedpactError, InputError, RefusedError, ServiceError
from fedpact_contract.request import API, sign_request, utc_now

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0
MAX_REPLY_BYTES = 16 * 2**20
MAX_EVIDENCE_BYTES = 512 * 2**20
_INPUT_STATUS = {400, 404, 405, 410, 413, 415, 422}
_REFUSED_STATUS = {401, 403, 409, 423, 429}

Record = Callable[[str, bytes], None]
"""Enters one outgoing message in the egress ledger: kind and bytes; returns when that is durable."""


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
    record: Record
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
    def of_home(cls, home: AgentHome, record: Record) -> Self:
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
        return self._object("GET", "/operator", signed=False)

    def enrol(self, body: dict[str, Any]) -> dict[str, Any]:
        """Ask to join: {"token", "request"}."""
        return self._object("POST", "/enrol", body, signed=False)

    def enrolment(self) -> str:
        """What became of this agent's enrolment: requested, approved, registered, suspended."""
        return self._text(self._object("GET", "/enrolment"), "state")

    def send_card(self, envelope: dict[str, Any], released: list[dict[str, Any]] | None) -> dict[str, Any]:
        """Send a signed card, and the rows released for validation, if any."""
        return self._object("POST", "/cards", {"card": envelope, "released": released})

    def contracts(self) -> list[dict[str, Any]]:
        """The contracts that name this participant: id, title, state, signed (ids of parties)."""
        found = self._object("GET", "/contracts").get("contracts")
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise _reply("contracts is not a list of objects")
        return found

    def contract(self, contract_id: str) -> dict[str, Any]:
        """One contract: payload (canonical text), state, contract (envelope), delegations (envelopes)."""
        return self._object("GET", f"/contracts/{contract_id_form(contract_id)}")

    def sign(self, contract_id: str, envelope: dict[str, Any], delegation: dict[str, Any]) -> dict[str, Any]:
        """Send this party's signature and delegation."""
        body = {"contract": envelope, "delegation": delegation}
        return self._object("POST", f"/contracts/{contract_id_form(contract_id)}/signature", body)

    def head(self, contract_id: str) -> dict[str, Any]:
        """The log's latest signed checkpoint, as the operator answers it."""
        return self._object("GET", f"/contracts/{contract_id_form(contract_id)}/head")

    def evidence(self, contract_id: str) -> dict[str, Any]:
        """The evidence files by name."""
        path = f"/contracts/{contract_id_form(contract_id)}/evidence"
        return self._object("GET", path, limit=MAX_EVIDENCE_BYTES)

    def report(self, contract_id: str, form: str) -> bytes:
        """The report's bytes; `form` is html or json."""
        path = f"/contracts/{contract_id_form(contract_id)}/report?format={form}"
        return self.request("GET", path, limit=MAX_EVIDENCE_BYTES)

    def get(self, path: str) -> dict[str, Any]:
        """A signed GET of a path below the API's root, answered by a JSON object."""
        return self._object("GET", path)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A signed POST of canonical JSON to a path below the API's root, answered by a JSON object."""
        return self._object("POST", path, body)

    def request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        signed: bool = True,
        limit: int = MAX_REPLY_BYTES,
    ) -> bytes:
        """One request; the reply's bytes.

        Raises:
            ServiceError: OPERATOR_AWAY, no connection or no trusted one, or the operator failed.
            InputError, RefusedError: the operator's error, with its code.
            ServiceError: OPERATOR_REPLY, a reply that is none of the above.
        """
        import httpx

        data = b"" if body is None else canonical_bytes(body)
        target = API + path
        headers = {"content-type": "application/json"} if data else {}
        if signed:
            headers |= sign_request(self.node_key, method, target, data, self.now())
        # The kind names method and path: the ids in the path leave too, and requests without a body are messages.
        self.record(f"api {method} {path}", data)
        try:
            with self._client.stream(method, target, content=data or None, headers=headers) as reply:
                content = _read(reply, limit)
                status = reply.status_code
        except httpx.HTTPError as err:
            raise _away(self.url, err) from err
        if status == 200:
            return content
        raise error_of(status, content)

    def _object(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        signed: bool = True,
        limit: int = MAX_REPLY_BYTES,
    ) -> dict[str, Any]:
        content = self.request(method, path, body, signed=signed, limit=limit)
        try:
            value = json.loads(content.decode("utf-8"))
        except (UnicodeDecodeError, ValueError, RecursionError) as err:
            raise _reply("it is not JSON") from err
        if not isinstance(value, dict):
            raise _reply("it is not an object")
        return value

    @staticmethod
    def _text(value: dict[str, Any], key: str) -> str:
        text = value.get(key)
        if not isinstance(text, str):
            raise _reply(f"{key} is not text")
        return printable(text)


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
        return _reply(f"it has status {status} and no readable error")
    if not isinstance(code, str) or not code.replace("_", "").isalnum() or not code.isupper() or len(code) > 80:
        return _reply(f"it has status {status} and no error code")
    kind: type[FedpactError] = ServiceError
    if status in _INPUT_STATUS:
        kind = InputError
    elif status in _REFUSED_STATUS:
        kind = RefusedError
    shown = {k: printable(v) for k, v in places.items()}
    return kind(code, f"The operator answers: {printable(str(message))}", **shown)


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


def _reply(what: str) -> ServiceError:
    return ServiceError(
        "OPERATOR_REPLY",
        f"The operator's reply cannot be used: {what}.",
        remedy="Check that the address in agent.toml is the operator's; else tell the operator.",
    )
