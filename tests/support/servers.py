"""Real database servers for one test session: from Debian's packages, in a folder of their own, on a free port."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
from tests.support.required import lacking

PASSWORD = "correct horse 'battery' \\ staple"
READER = "reader"
DATABASE = "clinic"
_START_SECONDS = 60


@dataclass
class Server:
    """A running server with a database, and in it a user who may only read."""

    kind: str
    port: int
    folder: Path
    line: list[str]
    client: list[str]
    process: subprocess.Popen[bytes] = field(init=False)

    def begin(self) -> None:
        """Start it, also again after `kill`, and wait until it answers."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*_user(), *self.line],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
            )
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            try:
                self.run("SELECT 1;", "postgres" if self.kind == "postgresql" else "mysql")
            except AssertionError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                time.sleep(0.1)
            else:
                return
        raise AssertionError((self.folder / "log").read_text())

    def fill(self, table: str, rows: pl.DataFrame) -> None:
        """Make a table of whole numbers."""
        columns = ", ".join(f"{name} INTEGER" for name in rows.columns)
        values = ", ".join(f"({', '.join(map(str, row))})" for row in rows.iter_rows())
        self.run(f"CREATE TABLE {table} ({columns}); INSERT INTO {table} VALUES {values};")

    def source(self, query: str, password_file: Path) -> str:
        """The lines of an agent.toml that read it, as the user who may only read."""
        password_file.write_text(PASSWORD)
        password_file.chmod(0o600)
        return (
            f'kind = "{self.kind}"\nhost = "127.0.0.1"\nport = {self.port}\ndatabase = "{DATABASE}"\n'
            f'user = "{READER}"\npassword_file = "{password_file}"\ntls = false\nquery = "{query}"\n'
        )

    def run(self, sql: str, database: str = DATABASE) -> str:
        """Statements of the administrator."""
        done = subprocess.run([*self.client, database], input=sql, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


def _tool(name: str) -> str:
    folders = [
        *os.environ.get("PATH", "").split(":"),
        "/usr/sbin",
        *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"))),
    ]
    found = shutil.which(name, path=":".join(folders))
    return found or lacking(f"needs {name}: apt-get install postgresql mariadb-server")


def _user() -> list[str]:
    """Servers refuse to run as root."""
    if os.geteuid() != 0:
        return []
    return [_tool("setpriv"), "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--pdeathsig=KILL"]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder of the servers' user; not below pytest's, which are closed to it, again and again."""
    with tempfile.TemporaryDirectory(prefix="fedpact-server-", ignore_cleanup_errors=True) as name:
        hand_over(Path(name))
        yield Path(name)


def hand_over(path: Path) -> None:
    """Make a file the servers' user's."""
    if os.geteuid() == 0:
        shutil.chown(path, "nobody", "nogroup")


def _begin(kind: str, folder: Path, port: int, line: list[str], client: list[str]) -> Server:
    server = Server(kind, port, folder, line, client)
    server.begin()
    return server


@contextmanager
def postgresql(*options: str) -> Iterator[Server]:
    with _folder() as folder:
        yield from _postgresql(folder, *options)


def _postgresql(folder: Path, *options: str) -> Iterator[Server]:
    (folder / "pw").write_text(PASSWORD + "\n")
    (folder / "pw").chmod(0o644)
    data, port = folder / "data", _free_port()
    made = subprocess.run(
        [*_user(), _tool("initdb"), "-D", data, "-U", "boss", f"--pwfile={folder / 'pw'}", "-A", "scram-sha-256", "-N"],
        capture_output=True,
        check=False,
        cwd=folder,
    )
    assert made.returncode == 0, made.stderr
    settings = ["listen_addresses=127.0.0.1", f"unix_socket_directories={folder}", "fsync=off", *options]
    line = [_tool("postgres"), "-D", str(data), "-p", str(port), *(w for s in settings for w in ("-c", s))]
    client = [
        _tool("psql"),
        "-X",
        "-q",
        "-t",
        "-A",
        "-v",
        "ON_ERROR_STOP=1",
        "-h",
        "127.0.0.1",
        "-p",
        str(port),
        "-U",
        "boss",
    ]
    client = [_tool("env"), f"PGPASSWORD={PASSWORD}", *client]
    server = _begin("postgresql", folder, port, line, client)
    try:
        server.run(f"CREATE DATABASE {DATABASE};", "postgres")
        quoted = PASSWORD.replace("'", "''")
        server.run(f"CREATE ROLE {READER} LOGIN PASSWORD '{quoted}'; GRANT pg_read_all_data TO {READER};")
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()


@contextmanager
def mariadb(*options: str) -> Iterator[Server]:
    with _folder() as folder:
        yield from _mariadb(folder, *options)


def _mariadb(folder: Path, *options: str) -> Iterator[Server]:
    data, port = folder / "data", _free_port()
    common = ["--no-defaults", f"--datadir={data}", f"--tmpdir={folder}"]
    made = subprocess.run(
        [*_user(), _tool("mariadb-install-db"), *common, "--auth-root-authentication-method=normal", "--skip-test-db"],
        capture_output=True,
        check=False,
        cwd=folder,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    place = [f"--socket={folder / 's'}", f"--pid-file={folder / 'pid'}", f"--port={port}", "--bind-address=127.0.0.1"]
    line = [_tool("mariadbd"), *common, *place, "--innodb-flush-log-at-trx-commit=0", *options]
    client = [_tool("mariadb"), "--no-defaults", f"--socket={folder / 's'}", "-uroot", "-N", "-B"]
    server = _begin("mariadb", folder, port, line, client)
    try:
        quoted = PASSWORD.replace("\\", "\\\\").replace("'", "\\'")
        server.run(
            f"CREATE DATABASE {DATABASE}; CREATE USER {READER}@'127.0.0.1' IDENTIFIED BY '{quoted}';"
            f"GRANT SELECT, SHOW VIEW ON {DATABASE}.* TO {READER}@'127.0.0.1';",
            "mysql",
        )
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()


START = {"postgresql": postgresql, "mariadb": mariadb}
