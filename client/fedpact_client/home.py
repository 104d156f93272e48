"""The agent's home: one folder, readable by its owner alone, with keys, configuration, ledgers and pinned trust.

    keys/contract.key   Ed25519, PKCS#8 with passphrase: a person signs contracts with it
    keys/contract.pub   its public half in hexadecimal (the participant's id is its fingerprint)
    keys/node.key       ECDSA P-384, OpenSSH private key without passphrase, as Flower's SuperNode loads it
    keys/release.key    32 bytes that choose which rows are released, once `card` needed them
    keys/selection.key  32 bytes that choose which rows are trained on, once `sign` or `start` needed them
    keys/run/ID.key     Ed25519, PKCS#8: signs updates of the contract ID, delegated by the contract key
    keys/run/ID.revoked.json  the signed revocation of that key, where there is one
    agent.toml          configuration (configs/agent.toml documents each key)
    agent.db            budget and egress ledgers, outbox, heads, contracts
    trust.toml          the fingerprints that this enterprise checked itself
    operator/           ca.crt and operator.json, written by `enrol`
    released/           the rows that left for validation, per data set: training leaves them out
    scratch/            where the trainer's working files begin, which have no name afterwards
    loaded/             a database's rows on their way from the loader to the trainer, gone when it has read them
    profiles/ID.json    the profile of the data set ID that its last signed card was made by: counts by bin
    silence/ID.json     our signed record that the operator did not close the contract ID in time
    withdrawn/ID.*.json the signed receipts of what was destroyed when we withdrew from the contract ID, ours and theirs
    silence/, withdrawn/ID.contract.json  the contract, with which anybody verifies these
    flower/             what Flower's side writes; it can write nowhere else
    logs/               the logs of trainer and executor
    state.json          what the running agent knows of itself, for `status`
    guard.lock          held by the running agent, with its process id

Folders are 0700, files 0600.
"""

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedpact_client import sandbox
from fedpact_contract.contract import EntityCode, contract_id_form
from fedpact_contract.errors import InputError
from fedpact_contract.files import make_home
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
from fedpact_contract.request import utc_now
from fedpact_contract.trust import Trust, TrustedParty

if TYPE_CHECKING:
    from fedpact_client.config import AgentConfig

TRUST_HEAD = """\
# Whom this enterprise knows: one [[party]] for each legal entity whose fingerprint you learnt by another way than
# through the operator (by telephone, on paper). `enrol` pins the operator; add the other participants yourself:
# `sign` compares every party of a contract with this file, and `statement` and `fedpact verify` rest on it.

"""
SECRET_BYTES = 32
FOLDERS = ("keys", "keys/run", "operator", "released", "profiles", "logs")


class OperatorData(Part):
    """The operator that this home is enrolled with, as `enrol` checked it."""

    name: Name
    entity_code: EntityCode
    key: Hex32

    @property
    def id(self) -> str:
        """The fingerprint of the operator's key."""
        return fingerprint(self.key)


@dataclass(frozen=True, slots=True)
class AgentHome:
    """The paths of a home, and what is read from and written to them."""

    path: Path

    @property
    def config_path(self) -> Path:
        """Where the configuration stands."""
        return self.path / "agent.toml"

    @property
    def db_path(self) -> Path:
        """Where the ledgers stand."""
        return self.path / "agent.db"

    @property
    def trust_path(self) -> Path:
        """Where the checked fingerprints stand."""
        return self.path / "trust.toml"

    @property
    def contract_key_path(self) -> Path:
        """The contract key, under a passphrase."""
        return self.path / "keys" / "contract.key"

    @property
    def node_key_path(self) -> Path:
        """The node key: authenticates transport and API requests."""
        return self.path / "keys" / "node.key"

    @property
    def ca_path(self) -> Path:
        """The operator's certificate authority: the only one that TLS connections trust."""
        return self.path / "operator" / "ca.crt"

    @property
    def operator_path(self) -> Path:
        """The operator's name, entity code and key."""
        return self.path / "operator" / "operator.json"

    @property
    def logs(self) -> Path:
        """The folder of logs."""
        return self.path / "logs"

    @property
    def state_path(self) -> Path:
        """What the running guard knows of itself (`facts`)."""
        return self.path / "state.json"

    def silence_path(self, contract_id: str) -> Path:
        """Where the record stands that the operator did not close a contract in time.

        Raises:
            InputError: CONTRACT_ID_FORM.
        """
        return self.path / "silence" / f"{contract_id_form(contract_id)}.json"

    def run_key_path(self, contract_id: str) -> Path:
        """Where the run key of a contract stands.

        Raises:
            InputError: CONTRACT_ID_FORM, the id is not 64 hexadecimal characters (it becomes a file name).
        """
        return self.path / "keys" / "run" / f"{contract_id_form(contract_id)}.key"

    @property
    def loaded(self) -> Path:
        """The folder of a database's rows between loader and trainer; made where it is missing."""
        path = self.path / "loaded"
        path.mkdir(mode=0o700, exist_ok=True)
        return path

    @property
    def scratch(self) -> Path:
        """The folder of the trainer's working files, which have no name in it; made where it is missing."""
        path = self.path / "scratch"
        path.mkdir(mode=0o700, exist_ok=True)
        return path

    def revocation_path(self, contract_id: str) -> Path:
        """Where the revocation of a contract's run key is kept, once it is revoked.

        Raises:
            InputError: CONTRACT_ID_FORM.
        """
        return self.path / "keys" / "run" / f"{contract_id_form(contract_id)}.revoked.json"

    def receipt_path(self, contract_id: str, by: Literal["participant", "operator"]) -> Path:
        """Where the signed receipt of what one side destroyed is kept, once this enterprise has withdrawn.

        Raises:
            InputError: CONTRACT_ID_FORM.
        """
        return self.path / "withdrawn" / f"{contract_id_form(contract_id)}.{by}.json"

    def released_path(self, data_set: str) -> Path:
        """The rows of a data set that were released: canonical JSON lines."""
        return self.path / "released" / f"{data_set}.jsonl"

    def profile_path(self, data_set: str) -> Path:
        """The profile that a data set's last signed card was made by (`quality.Reference`)."""
        return self.path / "profiles" / f"{data_set}.json"

    def check(self) -> "AgentHome":
        """This home, if there is one here.

        Raises:
            InputError: HOME_MISSING, or HOME_MODE where others can enter the folder.
        """
        if not self.config_path.is_file() or not self.contract_key_path.is_file():
            raise InputError(
                "HOME_MISSING",
                "There is no agent home here.",
                file=self.path,
                remedy="Run `fedpact-agent init` first, or name the home with --home.",
            )
        if self.path.stat().st_mode & 0o077:
            raise InputError(
                "HOME_MODE", "Others can enter the home folder.", file=self.path, remedy=f"Run: chmod 700 {self.path}"
            )
        return self

    @property
    def contract_public(self) -> str:
        """The contract key's public half, 64 hexadecimal characters; needs no passphrase."""
        path = self.path / "keys" / "contract.pub"
        try:
            text = path.read_text("ascii").strip()
        except (OSError, UnicodeDecodeError) as err:
            raise InputError("KEY_MISSING", "The public contract key cannot be read.", file=path) from err
        if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
            raise InputError("KEY_FORM", "The public contract key is not 64 hexadecimal characters.", file=path)
        return text

    @property
    def participant_id(self) -> str:
        """This participant's id: the fingerprint of its contract key."""
        return fingerprint(self.contract_public)

    def load_contract_key(self, passphrase: bytes) -> Ed25519PrivateKey:
        """Open the contract key.

        Raises:
            InputError: missing, wrong passphrase, or not the key of `contract.pub`.
        """
        key = load_key(self.contract_key_path, passphrase)
        if public_hex(key) != self.contract_public:
            raise InputError(
                "KEY_MISMATCH",
                "contract.key and contract.pub are not one key.",
                file=self.contract_key_path,
                remedy="Restore both files from one backup.",
            )
        return key

    def load_node_key(self) -> ec.EllipticCurvePrivateKey:
        """Open the node key, by the reader that Flower's SuperNode uses.

        Raises:
            InputError: missing, readable by others, or not a P-384 key in OpenSSH form.
        """
        path = self.node_key_path
        try:
            data = path.read_bytes()
        except FileNotFoundError as err:
            raise InputError(
                "KEY_MISSING", "The key file is missing.", file=path, remedy="Run `init` first, or restore a backup."
            ) from err
        if path.stat().st_mode & 0o077:
            raise InputError("KEY_MODE", "Others can read this key file.", file=path, remedy=f"Run: chmod 600 {path}")
        try:
            key = serialization.load_ssh_private_key(data, None)
        except ValueError as err:
            raise InputError("KEY_FORM", "The node key is not a readable OpenSSH private key.", file=path) from err
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
            raise InputError("KEY_KIND", "The node key must be an ECDSA key on P-384.", file=path)
        return key

    def run_key(self, contract_id: str) -> Ed25519PrivateKey:
        """The run key of a signed contract.

        Raises:
            InputError: missing or damaged.
        """
        return load_key(self.run_key_path(contract_id))

    def make_run_key(self, contract_id: str) -> Ed25519PrivateKey:
        """The run key of a contract, made where there is none yet: signing again delegates the same key."""
        path = self.run_key_path(contract_id)
        _once(path, lambda: save_key(path, generate_key()))
        return load_key(path)

    def release_key(self) -> bytes:
        """The key by which rows are chosen for release; made once, never leaves."""
        return self._secret("release.key")

    def selection_key(self) -> bytes:
        """The key by which this enterprise picks exactly the contracted rows; made once, never leaves."""
        return self._secret("selection.key")

    def _secret(self, name: str) -> bytes:
        """32 random bytes, made once.

        Raises:
            InputError: KEY_FORM, the file holds something else.
        """
        path = self.path / "keys" / name
        _once(path, lambda: write_private(path, secrets.token_bytes(SECRET_BYTES)))
        key = path.read_bytes()
        if len(key) != SECRET_BYTES:
            raise InputError(
                "KEY_FORM",
                f"The key has {len(key)} bytes and not {SECRET_BYTES}.",
                file=path,
                remedy="Restore it from a backup; where there is none, remove it: other rows are chosen then.",
            )
        return key

    def operator(self) -> OperatorData:
        """The operator that this home is enrolled with.

        Raises:
            InputError: NOT_ENROLLED, or a damaged file.
        """
        try:
            data = self.operator_path.read_bytes()
        except FileNotFoundError as err:
            raise InputError(
                "NOT_ENROLLED",
                "This agent is not enrolled with an operator.",
                file=self.operator_path,
                remedy="Run `fedpact-agent enrol INVITATION`.",
            ) from err
        return OperatorData.parse(
            read_json(data, "operator data", self.operator_path), code="OPERATOR_DATA", file=self.operator_path
        )

    def operator_ca(self) -> str:
        """The operator's CA certificates as PEM.

        Raises:
            InputError: NOT_ENROLLED.
        """
        try:
            return self.ca_path.read_text("ascii")
        except FileNotFoundError as err:
            raise InputError(
                "NOT_ENROLLED",
                "This agent has no certificate of its operator.",
                file=self.ca_path,
                remedy="Run `fedpact-agent enrol INVITATION`.",
            ) from err

    def trust(self) -> Trust:
        """Whom this enterprise knows.

        Raises:
            InputError: missing or malformed.
        """
        return Trust.read(self.trust_path)

    def config(self) -> "AgentConfig":
        """The configuration.

        Raises:
            InputError: a fault in agent.toml, with file and line.
        """
        from fedpact_client.config import load

        return load(self.config_path)


def _once(path: Path, make: Callable[[], None]) -> None:
    """Make a key file where there is none; of two commands that do so at once, one's stands."""
    if path.exists():
        return
    try:
        make()
    except InputError as err:
        if err.code != "KEY_EXISTS":
            raise


def init(path: Path, *, name: str, entity_code: str, sector: str, passphrase: bytes) -> AgentHome:
    """Make a new home with fresh keys, a documented configuration and an empty trust file.

    It is built beside its place and moved there whole, so that an interrupted `init` leaves no half-made home.

    Raises:
        InputError: HOME_EXISTS, HOME_IN_INSTALLATION, PASSPHRASE_SHORT, or a name, entity code or sector of the wrong
            form.
    """
    path = path.expanduser().absolute()
    sandbox.check_home(path)
    check_passphrase(passphrase, "the contract key")
    agent = {"name": name, "entity_code": entity_code, "sector": sector}
    make_home(path, lambda build: _fill(AgentHome(build), agent, passphrase))
    return AgentHome(path)


def _fill(home: AgentHome, agent: dict[str, str], passphrase: bytes) -> None:
    from fedpact_client.config import fill_template
    from fedpact_client.store import Store

    config = fill_template(agent, utc_now().date())
    for folder in FOLDERS:
        (home.path / folder).mkdir(mode=0o700)
    contract_key, node_key = generate_key(), ec.generate_private_key(ec.SECP384R1())
    save_key(home.contract_key_path, contract_key, passphrase)
    write_private(home.path / "keys" / "contract.pub", public_hex(contract_key).encode() + b"\n")
    write_private(
        home.node_key_path,
        node_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        ),
    )
    write_private(home.config_path, config.encode())
    own = TrustedParty(
        role="participant", name=agent["name"], entity_code=agent["entity_code"], fingerprint=home.participant_id
    )
    write_private(home.trust_path, (TRUST_HEAD + Trust(party=(own,)).to_toml()).encode())
    Store(home.db_path, create=True).close()


def read_json(data: bytes, what: str, file: Path | None = None) -> Any:  # noqa: ANN401 - any JSON value
    """Plain JSON that a person may have reformatted.

    Raises:
        InputError: JSON_SYNTAX.
    """
    try:
        return json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as err:
        raise InputError("JSON_SYNTAX", f"The {what} is not readable JSON.", file=file) from err
