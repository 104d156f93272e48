"""The auditor's home: two keys behind one passphrase, and the words by which contracts name it.

    keys/auditor.key   Ed25519, PKCS#8: signs re-evaluations
    keys/deposit.key   X25519, PKCS#8: opens the validation rows that operators deposit for it
    auditor.toml       name, entity code and both public keys, as a contract's template takes them

The folder is 0700, its files 0600.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedpact_contract.contract import Auditor, load_toml
from fedpact_contract.errors import InputError
from fedpact_contract.files import make_home
from fedpact_contract.keys import (
    check_passphrase,
    generate_key,
    load_key,
    load_opening_key,
    public_hex,
    save_key,
    write_private,
)

CARD, SIGNING, OPENING = "auditor.toml", "keys/auditor.key", "keys/deposit.key"


@dataclass(frozen=True, slots=True)
class AuditorHome:
    """The folder, and the auditor as contracts name it."""

    path: Path
    party: Auditor

    @classmethod
    def open(cls, path: Path) -> "AuditorHome":
        """The home in this folder.

        Raises:
            InputError: AUDITOR_HOME; AUDITOR_CARD…, a fault in auditor.toml.
        """
        card = path / CARD
        try:
            text = card.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as err:
            raise InputError(
                "AUDITOR_HOME",
                "There is no auditor's home here.",
                file=card,
                remedy="Name the folder that `fedpact auditor init` made.",
            ) from err
        return cls(path, Auditor.parse(load_toml(text, file=card).get("auditor"), code="AUDITOR_CARD", file=card))

    def keys(self, passphrase: bytes) -> tuple[Ed25519PrivateKey, X25519PrivateKey]:
        """The signing key and the key that opens deposits.

        Raises:
            InputError: KEY_MISSING, KEY_PASSPHRASE; KEY_MISMATCH, not the keys of auditor.toml.
        """
        signing = load_key(self.path / SIGNING, passphrase)
        opening = load_opening_key(self.path / OPENING, passphrase)
        if (public_hex(signing), public_hex(opening)) != (self.party.key, self.party.encryption_key):
            raise InputError(
                "KEY_MISMATCH",
                "The keys are not those that auditor.toml names.",
                file=self.path,
                remedy="Restore the whole folder from one backup.",
            )
        return signing, opening


def init(path: Path, *, name: str, entity_code: str, passphrase: bytes) -> AuditorHome:
    """Make a new home, whole or not at all.

    Raises:
        InputError: HOME_EXISTS, PASSPHRASE_SHORT; AUDITOR_CARD, a name or entity code of the wrong form.
    """
    path = path.expanduser().absolute()
    check_passphrase(passphrase, "the auditor's keys")
    signing, opening = generate_key(), X25519PrivateKey.generate()
    party = Auditor.parse(
        {
            "name": name,
            "entity_code": entity_code,
            "key": public_hex(signing),
            "encryption_key": public_hex(opening),
        },
        code="AUDITOR_CARD",
    )

    def fill(build: Path) -> None:
        (build / "keys").mkdir(mode=0o700)
        save_key(build / SIGNING, signing, passphrase)
        save_key(build / OPENING, opening, passphrase)
        write_private(build / CARD, card_text(party).encode())

    make_home(path, fill)
    return AuditorHome(path, party)


def card_text(party: Auditor) -> str:
    """The table that a contract's template takes."""
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in party.plain().items()]
    return "\n".join(["[auditor]", *lines]) + "\n"
