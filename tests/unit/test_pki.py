"""The operator's authority and certificate: accepted by ssl with host name checks, and by nothing less."""

import datetime
import socket
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509

from fedpact_contract.errors import InputError
from fedpact_server import pki

NOW = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
HOSTS = ("fl.example.cn", "10.1.2.3", "2001:db8::7")


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    pki.create(folder, name="City Data", hosts=HOSTS, now=NOW)
    return folder


def handshake(server: Path, authority: Path, host: str) -> None:
    """A TLS handshake over a socket pair; raises what the client raises."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server / "server.crt", server / "server.key")
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    client.load_verify_locations(authority / "ca.crt")
    assert client.check_hostname
    left, right = socket.socketpair()

    def serve() -> None:
        try:
            context.wrap_socket(left, server_side=True).close()
        except OSError:
            left.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        client.wrap_socket(right, server_hostname=host).close()
    finally:
        right.close()
        thread.join()


@pytest.mark.parametrize("host", [*HOSTS, "localhost", "127.0.0.1", "::1"])
def test_ssl_accepts_every_name(tls: Path, host: str) -> None:
    handshake(tls, tls, host)


@pytest.mark.parametrize("host", ["other.example.cn", "sub.fl.example.cn", "10.1.2.4"])
def test_ssl_refuses_another_name(tls: Path, host: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(tls, tls, host)


def test_ssl_refuses_another_authority(tls: Path, tmp_path: Path) -> None:
    pki.create(tmp_path, name="City Data", hosts=HOSTS, now=NOW)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tls, tmp_path, "localhost")


def test_usages_terms_and_modes(tls: Path) -> None:
    authority = x509.load_pem_x509_certificate((tls / "ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((tls / "server.crt").read_bytes())
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    usage = authority.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign
    assert not usage.digital_signature
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not server.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    assert (authority.not_valid_after_utc - NOW).days == 3650
    assert (server.not_valid_after_utc - NOW).days == 730
    assert server.not_valid_before_utc < NOW
    for path in tls.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_certificate_is_renewed_when_it_ends_soon_or_lacks_a_name(tmp_path: Path) -> None:
    pki.create(tmp_path, name="City Data", hosts=("a.cn",), now=NOW)
    before = (tmp_path / "server.crt").read_bytes()
    assert not pki.ensure(tmp_path, hosts=("a.cn",), now=NOW + datetime.timedelta(days=600))
    assert (tmp_path / "server.crt").read_bytes() == before
    assert pki.ensure(tmp_path, hosts=("a.cn", "b.cn"), now=NOW)
    handshake(tmp_path, tmp_path, "b.cn")
    assert pki.ensure(tmp_path, hosts=("a.cn",), now=NOW + datetime.timedelta(days=701))


def test_a_key_of_another_certificate_is_replaced(tmp_path: Path) -> None:
    """An interrupted renewal left a new key beside the old certificate."""
    pki.create(tmp_path, name="City Data", hosts=("a.cn",), now=NOW)
    old = (tmp_path / "server.crt").read_bytes()
    pki.issue(tmp_path, hosts=("a.cn",), now=NOW)
    (tmp_path / "server.crt").write_bytes(old)
    assert pki.ensure(tmp_path, hosts=("a.cn",), now=NOW)
    handshake(tmp_path, tmp_path, "a.cn")


def test_an_authority_at_its_end_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    pki.create(tmp_path, name="City Data", hosts=("a.cn",), now=NOW)
    with pytest.raises(InputError) as err:
        pki.ensure(tmp_path, hosts=("a.cn",), now=NOW + datetime.timedelta(days=3640))
    assert err.value.code == "CA_EXPIRED"
    (tmp_path / "server.key").write_text("nonsense")
    with pytest.raises(InputError) as err:
        pki.ensure(tmp_path, hosts=("a.cn",), now=NOW)
    assert err.value.code == "TLS_FILE"
    assert err.value.file == str(tmp_path / "server.key")


@pytest.mark.parametrize(
    ("text", "form"), [("FL.Example.CN", "fl.example.cn"), ("10.1.2.3", "10.1.2.3"), ("[::1]", "::1"), ("a", "a")]
)
def test_host_form(text: str, form: str) -> None:
    assert pki.host_form(text) == form


@pytest.mark.parametrize(
    "text", ["", "https://a.cn", "a.cn:8443", "a b", "-a.cn", "a..cn", "1.2.3", "ä.cn", "*.a.cn", "x" * 64]
)
def test_a_host_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(InputError) as err:
        pki.host_form(text)
    assert err.value.code == "HOST_FORM"
