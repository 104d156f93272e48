"""A database's rows: real servers, each in a folder of its own; what is read, what is refused, and who hears of it."""

import datetime
import ipaddress
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.support.models_kit import a_model, a_schema, category, number, training_contract
from tests.support.noise import FixedNoise
from tests.support.servers import DATABASE, PASSWORD, READER, START, Server, hand_over

from fedpact_client import databases, loading, sources, trainer
from fedpact_client.config import DataSet
from fedpact_client.frames import Frame
from fedpact_client.home import AgentHome
from fedpact_client.sandbox import Isolation, landlock_abi
from fedpact_client.sources import Source, place_fingerprint
from fedpact_contract.errors import FedpactError, InputError

KINDS = list(START)
ROWS = "(61, 'm', 'yes', 0.5), (48, 'f', 'no', NULL), (55, NULL, 'yes', -2)"


def _certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that vouches for itself, and its key, which the server's user owns."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    own = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    usage = x509.BasicConstraints(ca=True, path_length=None)
    builder = x509.CertificateBuilder(own, own, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    made = builder.add_extension(names, False).add_extension(usage, True).sign(key, hashes.SHA256())
    folder.mkdir(exist_ok=True)
    certificate, secret = folder / f"{name}.pem", folder / f"{name}.key"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    secret.write_bytes(key.private_bytes(*form))
    secret.chmod(0o600)
    hand_over(secret)
    return certificate, secret


@pytest.fixture(scope="module")
def certificate() -> Iterator[tuple[Path, Path]]:
    with tempfile.TemporaryDirectory(prefix="fedpact-tls-") as folder:
        Path(folder).chmod(0o755)
        yield _certificate(Path(folder), "server")


def _options(kind: str, certificate: tuple[Path, Path]) -> list[str]:
    names = ("ssl_cert_file", "ssl_key_file") if kind == "postgresql" else ("--ssl-cert", "--ssl-key")
    given = [f"{name}={path}" for name, path in zip(names, certificate, strict=True)]
    return ["ssl=on", *given] if kind == "postgresql" else given


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest, certificate) -> Iterator[Server]:
    kind = request.param
    with START[kind](*_options(kind, certificate)) as running:
        types = "age INTEGER, sex VARCHAR(5), ill VARCHAR(5), score NUMERIC(6, 2)"
        running.run(f"CREATE TABLE patients ({types}); INSERT INTO patients VALUES {ROWS};")
        yield running


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AgentHome:
    monkeypatch.setenv("CLINIC_PASSWORD", PASSWORD)
    (tmp_path / "home" / "logs").mkdir(parents=True)
    return AgentHome(tmp_path / "home")


def data_set(kind: str, at: int, **values: Any) -> DataSet:
    source = {
        "kind": kind,
        "host": "127.0.0.1",
        "port": at,
        "database": DATABASE,
        "user": READER,
        "password_env": "CLINIC_PASSWORD",
        "tls": False,
        "query": "SELECT * FROM patients",
    }
    block = {"id": "heart", "num_examples": 2, "epsilon": 8, "delta": "0.00001", "columns": ["age"], "label": "ill"}
    source = {name: value for name, value in (source | values).items() if value is not None}
    return DataSet.parse(block | {"source": source}, code="TEST")


def load(home: AgentHome, wanted: DataSet, told: Callable[[Isolation], None] = bool) -> pl.DataFrame:
    with loading.rows_of(home, wanted, told=told) as file:
        assert file is not None
        assert file.stat().st_mode & 0o777 == 0o600
        return pl.concat(b.frame for b in sources.batches(sources.loaded(wanted.source, file), home.path, 1000))


def code_of(home: AgentHome, wanted: DataSet) -> str:
    with pytest.raises(FedpactError) as caught:
        load(home, wanted)
    assert list(home.loaded.iterdir()) == []
    assert PASSWORD not in str(caught.value)
    assert PASSWORD not in str(caught.value.as_dict())
    return caught.value.code


def test_rows_are_read_by_a_process_that_reaches_nothing_else(server: Server, home: AgentHome) -> None:
    told: list[Isolation] = []
    query = "SELECT age, sex, ill, score AS points FROM patients ORDER BY age -- all;\n;"
    table = load(home, data_set(server.kind, server.port, query=query, missing=["f"], rename={"s": "sex"}), told.append)
    table = table.sort("age")  # a query's order says nothing, and MariaDB forgets it inside another
    assert table.columns == ["age", "s", "ill", "points"]
    assert table["age"].to_list() == [48, 55, 61]
    assert table["s"].to_list() == [None, None, "m"]
    assert table["points"].cast(pl.Float64).to_list() == [None, -2.0, 0.5]
    assert list(home.loaded.iterdir()) == []
    (isolation,) = told
    assert isolation.isolated or "not to be had" in isolation.sentence or "Landlock" in isolation.sentence
    assert isolation.landlock_abi == landlock_abi()
    assert PASSWORD not in (home.logs / "loader.log").read_text()


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("DELETE FROM patients", "DATA_QUERY"),
        ("SELECT age FROM patients; DELETE FROM patients", "DATA_QUERY"),
        ("SELECT 1) AS a; DELETE FROM patients; SELECT * FROM (SELECT 1", "DATA_QUERY"),
        ("SELECT age FROM gone", "DATA_QUERY"),
        ("SELECT age, age FROM patients", "DATA_COLUMN_TWICE"),
        ("SELECT age FROM patients WHERE age > 99", "DATA_EMPTY"),
    ],
)
def test_queries_that_are_refused(server: Server, home: AgentHome, query: str, code: str) -> None:
    assert code_of(home, data_set(server.kind, server.port, query=query)) == code
    assert server.run("SELECT count(*) FROM patients;").strip() == "3"


def test_an_account_that_may_write_does_not(server: Server, home: AgentHome, monkeypatch) -> None:
    """The transaction is read-only by us, whatever the account's rights."""
    monkeypatch.setenv("CLINIC_PASSWORD", "w")
    if server.kind == "postgresql":
        server.run(
            "CREATE ROLE writer LOGIN SUPERUSER PASSWORD 'w';"
            "CREATE FUNCTION bump() RETURNS int LANGUAGE sql AS 'DELETE FROM patients; SELECT 1';"
        )
    else:
        server.run(
            "CREATE USER writer@'127.0.0.1' IDENTIFIED BY 'w'; GRANT ALL ON *.* TO writer@'127.0.0.1';\nDELIMITER //\n"
            "CREATE FUNCTION bump() RETURNS int BEGIN DELETE FROM patients; RETURN 1; END//\n"
        )
    wanted = data_set(server.kind, server.port, user="writer", query="SELECT bump() AS a")
    assert code_of(home, wanted) in {"DATA_QUERY_WRITES", "DATA_QUERY_FAILED"}
    assert server.run("SELECT count(*) FROM patients;").strip() == "3"


def test_who_may_not_log_in(server: Server, home: AgentHome, monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_of(home, data_set(server.kind, server.port, database="gone")) == "DATA_SOURCE_LOGIN"
    monkeypatch.setenv("CLINIC_PASSWORD", "wrong")
    assert code_of(home, data_set(server.kind, server.port)) == "DATA_SOURCE_LOGIN"


def test_encrypted_by_a_certificate_that_holds(server: Server, home: AgentHome, tmp_path, certificate) -> None:
    wanted = data_set(server.kind, server.port, tls=True, ca_file=str(certificate[0]))
    assert load(home, wanted).height == 3
    other, _ = _certificate(tmp_path / "other", "other")
    assert code_of(home, data_set(server.kind, server.port, tls=True, ca_file=str(other))) == "DATA_SOURCE_LOGIN"


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_dies_in_the_middle(kind: str, home: AgentHome) -> None:
    slow = {
        "postgresql": "SELECT a, pg_sleep(0.02)::text AS s FROM generate_series(1, 100000) AS a",
        "mariadb": "SELECT seq AS a, SLEEP(0.02) AS s FROM seq_1_to_100000",
    }
    with START[kind]() as running:

        def cut(_: Isolation) -> None:
            threading.Timer(6.0, running.kill).start()

        began = time.monotonic()
        with (
            pytest.raises(FedpactError) as caught,
            loading.rows_of(home, data_set(kind, running.port, query=slow[kind]), told=cut),
        ):
            pass
        assert time.monotonic() - began < 60
    error = caught.value
    assert (error.code, error.file) == ("DATA_SOURCE_AWAY", f"{kind}://127.0.0.1:{running.port}/{DATABASE}")
    assert "nothing charged" in str(error.remedy)
    assert list(home.loaded.iterdir()) == []
    assert code_of(home, data_set(kind, running.port)) == "DATA_SOURCE_AWAY"


def test_the_trainer_wants_rows_once_and_knows_them_again(server: Server, home: AgentHome, tmp_path: Path) -> None:
    """The same fingerprints as of a file with these rows: one source has one budget, wherever it stands."""
    label = {"name": "ill", "classes": ["no", "yes"], "rule": "value"}
    schema = a_schema(number("age", 0, 100), category("sex", ["f", "m"], "fill", fill="f"), label=label)
    agreed = training_contract(schema, a_model(), (2, 3, 4))
    wanted = data_set(server.kind, server.port)
    header = {
        "contract": agreed.to_bytes().decode(),
        "participant": agreed.participants[0].id,
        "source": wanted.source.plain(),
        "base_dir": str(home.path),
        "columns": ["age", "sex", "ill", "score"],
        "selection_key": "07" * 32,
    }

    def ask(**more: Any) -> tuple[str, dict[str, Any]]:
        kind, found, _ = trainer._answer(Frame(kind="check", header=header | more, array=b""), FixedNoise(1))
        return kind, found

    trainer._load_warm.cache_clear()
    assert ask() == ("wanted", {})
    with loading.rows_of(home, wanted) as file:
        kind, found = ask(loaded=str(file))
    assert (kind, found["num_rows"]) == ("checked", 3)
    assert ask() == (kind, found), "they are kept"
    lines = ["age,sex,ill,score", "55,,yes,-2", "61,m,yes,0.50", "48,f,no,"]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    _, again = ask(source={"kind": "csv", "path": str(tmp_path / "rows.csv")})
    assert again["fingerprints"][1:] == found["fingerprints"]


def test_the_driver_is_an_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import socket

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    account = databases.Account(
        kind="mariadb", host="h", port=1, database="d", user="u", password="p", ca_file=None, query="SELECT 1"
    )
    one, other = socket.socketpair()
    with one, other, pytest.raises(InputError) as caught:
        databases.copy_rows(account, [one], 1)
    assert caught.value.code == "DATA_DRIVER_MISSING"
    assert "fedpact[agent,databases]" in caught.value.remedy
    assert "p" not in repr(account).split("password")[-1][:3]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_answers(kind: str, home: AgentHome) -> None:
    assert code_of(home, data_set(kind, 1)) == "DATA_SOURCE_AWAY"
    assert code_of(home, data_set(kind, 1, host="nobody.invalid")) == "DATA_SOURCE_AWAY"


def test_passwords_that_are_not_there_or_not_alone(home: AgentHome, monkeypatch: pytest.MonkeyPatch) -> None:
    by_file = data_set("mariadb", 1, password_env=None, password_file="clinic.password")
    assert code_of(home, by_file) == "DATA_SOURCE_PASSWORD"
    (home.path / "clinic.password").write_text(PASSWORD + "\n")
    (home.path / "clinic.password").chmod(0o640)
    assert code_of(home, by_file) == "DATA_SOURCE_PASSWORD"
    (home.path / "clinic.password").chmod(0o600)
    assert loading._password(by_file.source, home.path) == PASSWORD
    monkeypatch.delenv("CLINIC_PASSWORD")
    assert code_of(home, data_set("mariadb", 1)) == "DATA_SOURCE_PASSWORD"


@pytest.mark.parametrize(
    "values",
    [
        {"query": None},
        {"host": None},
        {"path": "rows.csv"},
        {"password_file": "a"},
        {"password_env": None},
        {"password": "in clear"},
        {"ca_file": "ca.pem"},
        {"table": "patients"},
        {"host": "a b"},
        {"port": 0},
        {"delimiter": ";"},
    ],
)
def test_a_database_that_makes_no_sense_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        data_set("postgresql", 5432, **values)
    assert caught.value.code.startswith("TEST")
    assert "in clear" not in str(caught.value)


def test_one_query_is_one_place(tmp_path: Path) -> None:
    def place(**values: Any) -> str:
        return place_fingerprint(data_set("postgresql", 5432, **values).source, tmp_path)

    same = [{}, {"query": "SELECT  *\nFROM patients;"}, {"port": None}, {"user": "x"}, {"password_env": "OTHER"}]
    assert len({place(**values) for values in same}) == 1
    others = [{"query": "SELECT age FROM patients"}, {"port": 5433}, {"host": "h"}, {"database": "d"}]
    assert len({place(**values) for values in (*others, {})}) == 5
    assert sources.read_paths(data_set("mariadb", 1).source, tmp_path) == ()


def test_leftovers_are_swept(home: AgentHome) -> None:
    (home.loaded / "a.arrow").write_text("rows")
    loading.sweep(home)
    assert list(home.loaded.iterdir()) == []


def test_rows_that_a_command_reads_are_not_swept_by_an_agent_that_starts(
    home: AgentHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_load", lambda *_arguments: None)
    with loading.rows_of(home, data_set("postgresql", 5432)) as first:
        with loading.rows_of(home, data_set("postgresql", 5432)) as second:
            assert None not in (first, second)
            assert first != second
        loading.sweep(home)
        assert [*home.loaded.iterdir()] == [first]
    (home.loaded / "left.arrow").write_text("rows")
    loading.sweep(home)
    assert list(home.loaded.iterdir()) == []


def test_a_loopback_of_its_own_reaches_nobody_here(tmp_path: Path) -> None:
    """A listener on this machine is not there for the loader, and no file but the installation's is."""
    import socket

    (tmp_path / "secret").write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        code = f"""
            import socket
            from pathlib import Path
            from fedpact_client.sandbox import close_in
            isolation = close_in([], loopback=True)
            def tried(use):
                try:
                    use()
                except OSError as err:
                    return type(err).__name__
                return "done"
            own = socket.create_server(("127.0.0.1", 0))
            print(isolation.user_and_network_namespace, isolation.landlock_abi > 0, sep="\\n")
            print(tried(lambda: socket.create_connection(("127.0.0.1", {listener.getsockname()[1]}), 2)))
            print(tried(lambda: socket.create_connection(("192.0.2.1", 80), 2)))
            print(tried(Path({str(tmp_path / "secret")!r}).read_bytes))
            print(tried(lambda: socket.create_connection(own.getsockname(), 2)))
            print(isolation.sentence)
        """
        line = [sys.executable, "-I", "-c", textwrap.dedent(code)]
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    alone, walls, here, elsewhere, file, own, sentence = done.stdout.splitlines()
    assert own == "done"
    if alone == "True":
        assert (here, elsewhere) == ("ConnectionRefusedError", "OSError")
    else:
        assert "it can reach every host" in sentence
    assert file == ("PermissionError" if walls == "True" else "done")


def test_a_source_is_a_database_or_files() -> None:
    for values in (
        {"kind": "csv"},
        {"kind": "csv", "path": "a", "host": "h"},
        {"kind": "csv", "path": "a", "tls": False},
    ):
        with pytest.raises(InputError):
            Source.parse(values, code="TEST")
    block = data_set("mariadb", 1).plain() | {"release_file": "rows.csv"}
    with pytest.raises(InputError, match="release_file"):
        DataSet.parse(block, code="TEST")
