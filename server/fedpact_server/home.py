"""The operator's home: one folder, for its owner alone, with keys, certificates, database, models and validation sets.

    keys/operator.key      Ed25519, PKCS#8 with passphrase: a person signs contracts with it
    keys/operator.pub      its public half in hexadecimal (the operator's id is its fingerprint)
    keys/run/ID.key        Ed25519, PKCS#8: signs checkpoints, orders and receipts of the contract ID
    tls/                   ca.crt, ca.key, server.crt, server.key (see `pki`)
    operator.toml          name, entity code, host names, port, database, Ray
    operator.db            the database, unless operator.toml names another
    models/DIGEST.f8       models: flat little-endian float64
    arrays/ID/             updates of the contract ID, and the validation rows sealed to its auditor
    validation/ROOT/       committed validation sets (see `validation`)

Folders are 0700, files 0600.
"""

import datetime
import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field

from fedpact_contract.contract import EntityCode, Party, contract_id_form, load_toml
from fedpact_contract.errors import FailedError, InputError, ServiceError
from fedpact_contract.files import make_home, sync_folder
from fedpact_contract.keys import (
    check_passphrase,
    fingerprint,
    generate_key,
    load_key,
    public_hex,
    save_key,
    write_private,
)
from fedpact_contract.record import Hex32, Name, Part
from fedpact_contract.toml_lines import naming_lines
from fedpact_server import pki
from fedpact_server.db import Database

SERVE_LOCK = "serve.lock"
SERVE_LOCK_SECONDS = 0.5
"""Whoever looks whether the home is served holds its lock for an instant."""
FOLDERS = ("keys", "keys/run", "tls", "models", "arrays", "validation")


class Settings(Part):
    """What operator.toml says."""

    name: Name
    entity_code: EntityCode
    hosts: Annotated[tuple[Name, ...], Field(min_length=1, max_length=50)]
    port: Annotated[int, Field(ge=1, le=65_535)]
    database: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    ray: Annotated[str, Field(pattern=r"^(local|[A-Za-z0-9.-]{1,253}:[0-9]{1,5})$")] | None = None


def _locked(file: IO[bytes] | IO[str], how: int) -> bool:
    """Take a lock if it is free."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _PublicKey(Part):
    key: Hex32


@dataclass(frozen=True, slots=True)
class OperatorHome:
    """The paths of a home, and what is read from and written to them."""

    path: Path
    settings: Settings
    public_key: str

    @classmethod
    def open(cls, path: Path) -> "OperatorHome":
        """The home in this folder.

        Raises:
            InputError: HOME_MISSING, HOME_OF_AGENT, HOME_INCOMPLETE, HOME_MODE, or a fault in operator.toml.
        """
        path = path.expanduser().absolute()
        remedy = "Run `fedpact init` first, or name the home with --home (or FEDPACT_HOME)."
        if not path.is_dir():
            raise InputError("HOME_MISSING", "There is no operator home here.", file=path, remedy=remedy)
        if (path / "agent.toml").is_file():
            raise InputError(
                "HOME_OF_AGENT",
                "This is an agent's home, and the command is the operator's.",
                file=path,
                field="--home",
                rule="a home is the operator's or an agent's",
                remedy="Name the operator's home with --home (or FEDPACT_HOME), or run `fedpact-agent`.",
            )
        for part in ("operator.toml", "keys/operator.key", "keys/operator.pub"):
            if not (path / part).is_file():
                known = (path / "keys").is_dir()
                raise InputError(
                    "HOME_INCOMPLETE" if known else "HOME_MISSING",
                    f"The operator home lacks {part}." if known else "There is no operator home here.",
                    file=path,
                    remedy="Restore a backup." if known else remedy,
                )
        if path.stat().st_mode & 0o077:
            raise InputError("HOME_MODE", "Others can enter this folder.", file=path, remedy=f"Run: chmod 700 {path}")
        public = _PublicKey.parse(
            {"key": (path / "keys" / "operator.pub").read_text("utf-8").strip()},
            code="KEY_FORM",
            file=path / "keys" / "operator.pub",
        )
        return cls(path, _settings(path / "operator.toml"), public.key)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Hold the home's lock while it is served: two supervisors would replace each other's runs.

        Raises:
            InputError: SERVE_RUNNING.
        """
        with (self.path / SERVE_LOCK).open("a") as lock:
            patience = time.monotonic() + SERVE_LOCK_SECONDS
            while not _locked(lock, fcntl.LOCK_EX):
                if time.monotonic() > patience:
                    raise InputError(
                        "SERVE_RUNNING",
                        "Another `fedpact serve` serves this home.",
                        file=self.path,
                        remedy="End that one first.",
                    )
                time.sleep(0.05)
            yield

    @property
    def served(self) -> bool:
        """Whether a `fedpact serve` of this machine serves the home now."""
        try:
            with (self.path / SERVE_LOCK).open("rb") as lock:
                return not _locked(lock, fcntl.LOCK_SH)
        except FileNotFoundError:
            return False

    @property
    def fingerprint(self) -> str:
        """The operator's id: the fingerprint of its contract key."""
        return fingerprint(self.public_key)

    @property
    def party(self) -> Party:
        """The operator as contracts name it."""
        return Party(name=self.settings.name, entity_code=self.settings.entity_code, key=self.public_key)

    @property
    def url(self) -> str:
        """Where agents reach the port."""
        host = self.settings.hosts[0]
        return f"https://{f'[{host}]' if ':' in host else host}:{self.settings.port}"

    @property
    def tls(self) -> Path:
        """Folder of the certificates."""
        return self.path / "tls"

    def ca_pem(self) -> str:
        """The authority's certificate, for agents."""
        try:
            return (self.tls / "ca.crt").read_text("ascii")
        except OSError as err:
            raise InputError("TLS_FILE", "The CA certificate cannot be read.", file=self.tls / "ca.crt") from err

    def contract_key(self, passphrase: bytes) -> Ed25519PrivateKey:
        """Open the contract key.

        Raises:
            InputError: missing, wrong passphrase, or not the key of `operator.pub`.
        """
        path = self.path / "keys" / "operator.key"
        key = load_key(path, passphrase)
        if public_hex(key) != self.public_key:
            raise InputError(
                "KEY_MISMATCH",
                "operator.key and operator.pub are not one key.",
                file=path,
                remedy="Restore both files from one backup.",
            )
        return key

    def run_key_path(self, contract_id: str) -> Path:
        """Where the run key of a contract stands.

        Raises:
            InputError: CONTRACT_ID_FORM (the id becomes a file name).
        """
        return self.path / "keys" / "run" / f"{contract_id_form(contract_id)}.key"

    def run_key(self, contract_id: str) -> Ed25519PrivateKey:
        """The operator's run key of a contract.

        Raises:
            InputError: the operator has not signed the contract, or the file is damaged.
        """
        return load_key(self.run_key_path(contract_id))

    def make_run_key(self, contract_id: str) -> Ed25519PrivateKey:
        """The run key of a contract, made where there is none yet: signing again delegates the same key."""
        path = self.run_key_path(contract_id)
        if not path.exists():
            save_key(path, generate_key())
            sync_folder(path.parent)
        return load_key(path)

    def database(self) -> Database:
        """The database, checked for its schema version.

        Raises:
            FailedError: DATABASE_UNREADABLE, DATABASE_VERSION.
            ServiceError: DATABASE_AWAY.
        """
        database = _database(self.path, self.settings)
        if self.settings.database is None and not (self.path / "operator.db").is_file():
            raise FailedError(
                "DATABASE_UNREADABLE",
                "The operator's database is missing.",
                file=self.path / "operator.db",
                remedy="Restore a backup.",
            )
        database.check()
        return database


def init(
    path: Path,
    *,
    name: str,
    entity_code: str,
    hosts: tuple[str, ...],
    port: int,
    passphrase: bytes,
    now: datetime.datetime,
    database: str | None = None,
) -> OperatorHome:
    """Make a new home: keys, certificate authority and certificate, settings, database.

    It is built beside its place and moved there whole: an interrupted `init` leaves no half-made home.

    Raises:
        InputError: HOME_EXISTS, PASSPHRASE_SHORT, HOST_FORM, or a setting of the wrong form.
    """
    path = path.expanduser().absolute()
    settings = Settings.parse(
        {"name": name, "entity_code": entity_code, "hosts": [pki.host_form(h) for h in hosts], "port": port}
        | ({} if database is None else {"database": database}),
        code="SETTINGS",
    )
    check_passphrase(passphrase, "the operator's key")
    make_home(path, lambda build: _fill(build, settings, passphrase, now))
    return OperatorHome.open(path)


def _fill(path: Path, settings: Settings, passphrase: bytes, now: datetime.datetime) -> None:
    for folder in FOLDERS:
        (path / folder).mkdir(mode=0o700)
    key = generate_key()
    save_key(path / "keys" / "operator.key", key, passphrase)
    write_private(path / "keys" / "operator.pub", public_hex(key).encode() + b"\n")
    pki.create(path / "tls", name=settings.name, hosts=settings.hosts, now=now)
    write_private(path / "operator.toml", _settings_text(settings).encode())
    store = _database(path, settings)
    try:
        store.create()
    except sa.exc.OperationalError as err:
        raise ServiceError(
            "DATABASE_AWAY", "The operator's database does not answer.", remedy="Check its URL and that it runs."
        ) from err
    finally:
        store.dispose()
    if settings.database is None:
        (path / "operator.db").chmod(0o600)


def _database(path: Path, settings: Settings) -> Database:
    if settings.database is None:
        return Database.in_home(path)
    try:
        return Database(settings.database)
    except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ImportError) as err:
        raise ServiceError(
            "DATABASE_URL",
            "The database URL names no database that this installation can use.",
            file=path / "operator.toml",
            field="database",
            remedy="Use sqlite:////path or postgresql+psycopg://user@host/name, with the driver installed.",
        ) from err


def _settings(path: Path) -> Settings:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise InputError("SETTINGS", "The settings cannot be read as UTF-8 text.", file=path) from err
    value = load_toml(text, file=path)
    with naming_lines(text, path):
        settings = Settings.parse(value, code="SETTINGS", file=path)
    hosts = tuple(pki.host_form(host) for host in settings.hosts)
    return settings.model_copy(update={"hosts": hosts})


def _settings_text(settings: Settings) -> str:
    """operator.toml; JSON strings are TOML basic strings for every name that `Name` admits."""

    def text(value: str) -> str:
        return json.dumps(value, ensure_ascii=False)

    database = f"database = {text(settings.database)}" if settings.database else '# database = "postgresql+psycopg://…"'
    return f"""# Settings of this operator. Unknown keys are refused. `fedpact serve` reads them when it starts.

# The operator's name and legal-entity code, as contracts print them.
name = {text(settings.name)}
entity_code = {text(settings.entity_code)}
# DNS names and IP addresses under which agents reach this operator; invitations carry the first. The certificate is
# made anew by `fedpact serve` when a name is missing in it.
hosts = [{", ".join(text(host) for host in settings.hosts)}]
# The one port.
port = {settings.port}
# Optional: a database elsewhere, as an SQLAlchemy URL. Without it, operator.db in this folder.
{database}
# Optional: evaluate coalitions on more processes, by Ray: "local" for those of this machine, or HOST:PORT of your own
# cluster, which this machine is part of. It sees the updates; whoever reaches its ports can run code there.
# ray = "local"
"""
