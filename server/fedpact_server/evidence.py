"""A contract's evidence as text, for its signatories: the files of `fedpact_contract.evidence`, from the database."""

from sqlalchemy.engine import Connection

from fedpact_contract.evidence import pack
from fedpact_server import logbook


def evidence_files(connection: Connection, contract_id: str) -> dict[str, str]:
    """File name -> text, byte for byte what `fedpact verify` reads."""
    files = pack(
        logbook.read_entries(connection, contract_id),
        list(logbook.signed_checkpoints(connection, contract_id).values()),
        [envelope for _, _, envelope in logbook.countersignatures(connection, contract_id)],
    )
    return {name: data.decode() for name, data in files.items()}
