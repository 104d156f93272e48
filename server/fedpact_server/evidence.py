"""A contract's evidence as text, for its signatories: the files of `fedpact_contract.evidence`, from the database.

It ends at the latest signed checkpoint: while a round runs, what came after it is not the operator's word yet.
"""

from sqlalchemy.engine import Connection

from fedpact_contract.evidence import pack
from fedpact_contract.log import Checkpoint, Countersignature, Entry
from fedpact_contract.record import Envelope
from fedpact_server import logbook


def evidence_parts(
    connection: Connection, contract_id: str
) -> tuple[list[Entry], list[Envelope[Checkpoint]], list[Envelope[Countersignature]]]:
    """Entries, checkpoints and countersignatures, as `fedpact_contract.evidence` packs and writes them."""
    return (
        logbook.signed_entries(connection, contract_id),
        list(logbook.signed_checkpoints(connection, contract_id).values()),
        [envelope for _, _, envelope in logbook.countersignatures(connection, contract_id)],
    )


def evidence_files(connection: Connection, contract_id: str) -> dict[str, str]:
    """File name -> text, byte for byte what `fedpact verify` reads."""
    return {name: data.decode() for name, data in pack(*evidence_parts(connection, contract_id)).items()}
