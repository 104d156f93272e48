"""The operator's API as the agent calls it: TLS, signatures, egress, errors, hostile answers."""

import datetime
import ipaddress
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tests.support.agent_world import NOW

from fedpact_client.api import MAX_REPLY_BYTES, Egress, OperatorClient, egress_of, error_of, printable, tls_context
from fedpact_client.store import EgressKind, Store
from fedpact_contract.canonical import canonical_bytes, sha256_hex
from fedpact_contract.errors import InputError, RefusedError, ServiceError
from fedpact_contract.request import API, check_request, node_public_pem

NODE = ec.generate_private_key(ec.SECP384R1())
ID = "ab" * 32


def certificate(
    name: str, issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None, host: str = "127.0.0.1"
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=10))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    signer = issuer[1] if issuer else key
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
    )
    if issuer:
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(signer, hashes.SHA256()), key


def pem(item: x509.Certificate | ec.EllipticCurvePrivateKey) -> bytes:
    if isinstance(item, x509.Certificate):
        return item.public_bytes(serialization.Encoding.PEM)
    return item.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


CA = certificate("Operator CA", None)
CA_PEM = pem(CA[0]).decode()


class Handler(BaseHTTPRequestHandler):
    seen: list[tuple[str, str, dict[str, str], bytes]]

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.seen.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        content = b'{"state":"approved"}'
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = answer  # noqa: N815 - the library's names

    def log_message(self, *args: object) -> None:
        pass


def serve(folder: Path, host: str = "127.0.0.1") -> ThreadingHTTPServer:
    cert, key = certificate("Operator", CA, host)
    (folder / "server.pem").write_bytes(pem(cert) + pem(key))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.seen = []
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    server = serve(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def nothing(kind: EgressKind, contract_id: str | None, detail: str, body: bytes) -> None:
    """An egress ledger that nobody reads."""


def url_of(server: ThreadingHTTPServer) -> str:
    return f"https://127.0.0.1:{server.server_port}"


def mock(answer: Callable[[httpx.Request], httpx.Response], record: Egress = nothing) -> Any:
    transport = httpx.MockTransport(answer)
    return OperatorClient("https://operator:9443", CA_PEM, NODE, record, transport=transport, now=lambda: NOW)


def reply(value: object, status: int = 200) -> httpx.Response:
    return httpx.Response(status, stream=httpx.ByteStream(json.dumps(value).encode()))


def test_over_real_tls_a_signed_request_arrives(operator: ThreadingHTTPServer) -> None:
    with OperatorClient(url_of(operator), CA_PEM, NODE, nothing) as client:
        assert client.enrolment() == "approved"
        client.sign(ID, {"a": 1}, {"b": 2})
    (_, path, headers, body), (method, target, signed, sent) = operator.seen
    now = datetime.datetime.now(datetime.UTC)
    assert (path, body) == ("/fedpact/v1/enrolment", b"")
    assert check_request(node_public_pem(NODE), headers, "GET", path, b"", now) is None
    assert sent == canonical_bytes({"contract": {"a": 1}, "delegation": {"b": 2}})
    assert check_request(node_public_pem(NODE), signed, method, target, sent, now) is None
    with pytest.raises(RefusedError, match="REQUEST_SIGNATURE"):
        check_request(node_public_pem(NODE), signed, method, target + "x", sent, now)


def test_another_authority_is_not_trusted(operator: ThreadingHTTPServer) -> None:
    other = pem(certificate("Another CA", None)[0]).decode()
    with (
        OperatorClient(url_of(operator), other, NODE, nothing) as client,
        pytest.raises(ServiceError, match="OPERATOR_AWAY") as caught,
    ):
        client.enrolment()
    assert "certificate" in caught.value.message
    assert caught.value.exit_code == 6
    assert operator.seen == []


def test_another_host_name_is_not_trusted(tmp_path: Path) -> None:
    server = serve(tmp_path, "127.0.0.2")
    with OperatorClient(url_of(server), CA_PEM, NODE, nothing) as client, pytest.raises(ServiceError):
        client.enrolment()
    server.shutdown()
    server.server_close()
    assert server.seen == []


def test_the_environment_chooses_no_proxy_and_no_certificates(
    operator: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys.log"))
    monkeypatch.setenv("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt")
    with OperatorClient(url_of(operator), CA_PEM, NODE, nothing) as client:
        assert client.enrolment() == "approved"
    assert not (tmp_path / "keys.log").exists()


def test_no_system_authority_is_loaded() -> None:
    assert [c["subject"] for c in tls_context(CA_PEM).get_ca_certs()] == [((("commonName", "Operator CA"),),)]


@pytest.mark.parametrize(
    "text", ["", "no certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_what_is_no_certificate_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="OPERATOR_CA"):
        tls_context(text)


def test_nobody_there_is_operator_away() -> None:
    with (
        OperatorClient("https://127.0.0.1:1", CA_PEM, NODE, nothing) as client,
        pytest.raises(ServiceError, match="OPERATOR_AWAY"),
    ):
        client.operator()


def test_everything_is_recorded_before_it_leaves() -> None:
    order: list[tuple[str, bytes]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        order.append(("sent", request.content))
        return reply({"contracts": [], "state": "x"})

    client = mock(answer, lambda kind, of, detail, body: order.append((f"{kind} {of} {detail}", body)))
    client.contracts()
    client.send_card({"payload": "p"}, None)
    client.sign(ID, {}, {})
    card = canonical_bytes({"card": {"payload": "p"}, "released": None})
    signature = canonical_bytes({"contract": {}, "delegation": {}})
    assert order == [
        (f"request None GET {API}/contracts", b""),
        ("sent", b""),
        (f"card None POST {API}/cards", card),
        ("sent", card),
        (f"signature {ID} POST {API}/contracts/{ID}/signature", signature),
        ("sent", signature),
    ]


def test_what_cannot_be_recorded_does_not_leave() -> None:
    sent: list[object] = []

    def full(*_: object) -> None:
        raise InputError("STORE_FULL", "The disk is full.")

    client = mock(lambda request: sent.append(request) or reply({}), full)
    with pytest.raises(InputError, match="STORE_FULL"):
        client.enrol({"token": "t"})
    assert sent == []


def test_only_enrol_and_operator_are_unsigned() -> None:
    signed: dict[str, bool] = {}

    def answer(request: httpx.Request) -> httpx.Response:
        signed[request.url.path.removeprefix("/fedpact/v1")] = "fedpact-signature" in request.headers
        return reply({"contracts": [], "state": "x"})

    client = mock(answer)
    for call in (client.operator, client.enrolment, client.contracts):
        call()
    client.enrol({})
    client.send_card({}, None)
    client.get(f"{API}/other")
    client.post(f"{API}/another", {})
    for call in (client.contract, client.head, client.evidence):
        call(ID)
    client.report(ID, "json")
    unsigned = {path for path, has in signed.items() if not has}
    assert unsigned == {"/operator", "/enrol"}
    assert len(signed) == 11


def test_the_query_is_signed_too() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        target = request.url.raw_path.decode()
        assert target == f"/fedpact/v1/contracts/{ID}/report?format=html&lang=zh"
        check_request(node_public_pem(NODE), request.headers, "GET", target, b"", NOW)
        return httpx.Response(200, stream=httpx.ByteStream(b"<html>"))

    assert mock(answer).report(ID, "html", "zh") == b"<html>"


@pytest.mark.parametrize("bad", ["", "../" * 20, "AB" * 32, "ab" * 31, "ab" * 32 + "/x", "é" * 64])
def test_a_contract_id_is_checked_before_it_becomes_an_address(bad: str) -> None:
    client = mock(lambda request: pytest.fail("sent"))
    for call in (client.contract, client.head, client.evidence, lambda i: client.report(i, "json")):
        with pytest.raises(InputError, match="CONTRACT_ID_FORM"):
            call(bad)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *[(status, InputError) for status in (400, 404, 413, 422)],
        *[(status, RefusedError) for status in (401, 403, 409, 429)],
        *[(status, ServiceError) for status in (500, 502, 503, 302)],
    ],
)
def test_the_operators_errors_keep_their_code(status: int, kind: type[Exception]) -> None:
    error = {"code": "TOKEN_USED", "message": "The token was used.", "party": "p", "remedy": "Ask.", "field": 3}
    with pytest.raises(kind) as caught:
        mock(lambda _: reply({"error": error}, status)).enrolment()
    assert caught.value.code == "TOKEN_USED"
    assert caught.value.message == "The operator answers: The token was used."
    assert (caught.value.party, caught.value.remedy, caught.value.field) == ("p", "Ask.", None)


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b"{}", b'{"error": "text"}', b'{"error": {"code": "X"}}', b"\xff", b"[" * 100_000]
    + [json.dumps({"error": {"code": code, "message": "m"}}).encode() for code in ("", "lower", "A B", "A" * 99, 7)],
)
def test_an_unreadable_error_is_the_operators(body: bytes) -> None:
    error = error_of(403, body)
    assert isinstance(error, ServiceError)
    assert error.code == "OPERATOR_REPLY"


def test_another_partys_text_cannot_move_the_terminal() -> None:
    error = error_of(403, json.dumps({"error": {"code": "X", "message": "\x1b[2J" + "a" * 9999 + "\n"}}).encode())
    assert "\x1b" not in str(error)
    assert len(str(error)) < 700
    assert printable("a\tb\u202e\n") == "a b  "


@pytest.mark.parametrize("content", [b"", b"no", b"[1]", b"\xff\xfe", b"[" * 100_000, b'"text"'])
def test_an_answer_that_is_no_object_is_refused(content: bytes) -> None:
    client = mock(lambda _: httpx.Response(200, stream=httpx.ByteStream(content)))
    with pytest.raises(ServiceError, match="OPERATOR_REPLY"):
        client.operator()


@pytest.mark.parametrize("contracts", [None, {}, "x", [1], [{}, None]])
def test_a_list_of_contracts_is_a_list_of_objects(contracts: object) -> None:
    with pytest.raises(ServiceError, match="OPERATOR_REPLY"):
        mock(lambda _: reply({"contracts": contracts})).contracts()


def test_a_state_is_text() -> None:
    with pytest.raises(ServiceError, match="OPERATOR_REPLY"):
        mock(lambda _: reply({"state": 7})).enrolment()


def test_an_endless_answer_is_cut_off() -> None:
    class Endless(httpx.SyncByteStream):
        given = 0

        def __iter__(self) -> Iterator[bytes]:
            while True:
                self.given += 2**20
                yield bytes(2**20)

    stream = Endless()
    with pytest.raises(ServiceError, match="OPERATOR_REPLY_SIZE"):
        mock(lambda _: httpx.Response(200, stream=stream)).operator()
    assert stream.given <= MAX_REPLY_BYTES + 2**21


def test_redirects_are_not_followed() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        return httpx.Response(307, headers={"location": "https://elsewhere/"}, stream=httpx.ByteStream(b""))

    with pytest.raises(ServiceError, match="OPERATOR_REPLY"):
        mock(answer).send_card({}, None)
    assert asked == ["operator"]


def test_the_store_is_the_egress_ledger(tmp_path: Path) -> None:
    with Store(tmp_path / "agent.db", create=True) as store:
        client = mock(lambda _: reply({}), egress_of(store))
        client.sign(ID, {"a": 1}, {})
        client.operator()
        signature, request = store.egress()
    body = canonical_bytes({"contract": {"a": 1}, "delegation": {}})
    assert (signature.kind, signature.contract_id, signature.size) == (EgressKind.SIGNATURE, ID, len(body))
    assert signature.sha256 == sha256_hex(body)
    assert (request.kind, request.size, request.detail) == (EgressKind.REQUEST, 0, f"GET {API}/operator")
