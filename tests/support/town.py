"""A federation whose participants have homes: a person of each answers at the command line. No tests here."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.closed_run import ClosedRun, open_run
from tests.support.federation import DirectTransport

from fedpact_client.enrol import remember
from fedpact_client.home import AgentHome, OperatorData, init
from fedpact_client.store import Store
from fedpact_contract.log import Body
from fedpact_contract.messages import Invitation
from fedpact_contract.request import node_id, node_public_pem
from fedpact_server import db, logbook

PASSPHRASE = b"correct horse"


@dataclass
class Town:
    """The run, and each participant's home in the contract's order."""

    run: ClosedRun
    homes: list[AgentHome]
    passphrase: Path

    @property
    def contract_id(self) -> str:
        return self.run.contract_id

    def id(self, number: int) -> str:
        """The id of `Enterprise number`."""
        return self.homes[number - 1].participant_id

    def at(self, number: int) -> tuple[str, ...]:
        """What the command line of a person there ends with."""
        return ("--home", str(self.homes[number - 1].path), "--json")

    def signed(self, number: int) -> tuple[str, ...]:
        """The same for a command that signs."""
        return (*self.at(number), "--yes", "--passphrase-file", str(self.passphrase))

    def operator(self) -> tuple[str, ...]:
        """What the operator's command line ends with."""
        return ("--home", str(self.run.home), "--json")

    def enter(self, *bodies: Body) -> None:
        """Entries of the operator, by hand."""
        with self.run.federation.database.write() as connection:
            logbook.append(connection, self.contract_id, bodies)

    def bodies(self, kind: type[Body]) -> list[Any]:
        return [entry.open() for entry in self.run.federation.entries() if entry.type == kind.TYPE]


def town(folder: Path, counts: list[int], **changes: Any) -> Town:
    """Homes that have signed the contract, enrolled with an operator whose API answers; no round has run."""
    homes = [
        init(
            folder / f"home{i}",
            name=f"Enterprise {i + 1}",
            entity_code=f"{i + 1:018d}",
            sector="finance",
            passphrase=PASSPHRASE,
        )
        for i in range(len(counts))
    ]
    keys = [home.load_contract_key(PASSPHRASE) for home in homes]
    run = open_run(folder / "federation", counts=counts, keys=keys, **changes)
    federation, ca = run.federation, (run.home / "tls" / "ca.crt").read_text("ascii")
    party = federation.contract.operator
    by_node = {}
    for home in homes:
        agent = federation.agents[home.participant_id]
        agent.desk.store.backup(folder / "store.db")
        agent.desk.store.close()
        shutil.move(folder / "store.db", home.db_path)
        agent.desk = dataclasses.replace(agent.desk, store=Store(home.db_path, participant=home.participant_id))
        invitation = Invitation(
            url="https://fl.example.cn:8443",
            ca_pem=ca,
            operator=party.id,
            entity_code=home.config().agent.entity_code,
            token="0" * 64,
            expires="2099-01-01T00:00:00Z",
        )
        remember(home, invitation, OperatorData(name=party.name, entity_code=party.entity_code, key=party.key))
        pem = node_public_pem(home.load_node_key())
        by_node[node_id(pem)] = agent
        run.node_keys[home.participant_id] = home.load_node_key()
        with federation.database.write() as connection:
            table = db.participants
            values = {"node_key_pem": pem, "node": node_id(pem)}
            connection.execute(table.update().where(table.c.id == home.participant_id).values(**values))
    federation.transport = DirectTransport(by_node)
    passphrase = folder / "passphrase"
    passphrase.write_bytes(PASSPHRASE + b"\n")
    passphrase.chmod(0o600)
    return Town(run, homes, passphrase)
