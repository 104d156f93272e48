"""The auditor of the tests' contracts, whose keys are derived from names. No tests here."""

from hashlib import sha256
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedpact_contract.auditor import CARD, OPENING, SIGNING, AuditorHome, card_text
from fedpact_contract.contract import Auditor
from fedpact_contract.keys import public_hex, save_key

PASSPHRASE = b"correct horse"
SIGNING_KEY = Ed25519PrivateKey.from_private_bytes(sha256(b"auditor signs").digest())
OPENING_KEY = X25519PrivateKey.from_private_bytes(sha256(b"auditor opens").digest())
AUDITOR = Auditor(
    name="Audit House",
    entity_code="91310000MA1AUDT001",
    key=public_hex(SIGNING_KEY),
    encryption_key=public_hex(OPENING_KEY),
)
CLAUSE = AUDITOR.plain()


def auditor_home(folder: Path) -> AuditorHome:
    """This auditor's home in a new folder."""
    (folder / "keys").mkdir(parents=True)
    save_key(folder / SIGNING, SIGNING_KEY, PASSPHRASE)
    save_key(folder / OPENING, OPENING_KEY, PASSPHRASE)
    (folder / CARD).write_text(card_text(AUDITOR), "utf-8")
    return AuditorHome.open(folder)
