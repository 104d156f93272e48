"""The auditor that a contract may name: its keys and home, its clause, and the bytes that are sealed to it."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from tests.support.auditor_kit import AUDITOR, CLAUSE, OPENING_KEY, PASSPHRASE, SIGNING_KEY, auditor_home
from tests.support.command import runner
from tests.support.evidence_factory import contract_values, key

from fedpact_client.review import check_trust, standing
from fedpact_contract import cli, sealed
from fedpact_contract.auditor import CARD, OPENING, SIGNING, AuditorHome, init
from fedpact_contract.contract import Contract
from fedpact_contract.errors import FaultError, InputError, RefusedError
from fedpact_contract.keys import fingerprint, public_hex, save_key, show_fingerprint
from fedpact_contract.text import render
from fedpact_contract.trust import Trust

CONTRACT = Contract.parse(contract_values(auditor=CLAUSE))


class TestSealed:
    def test_the_vectors_of_rfc_9180_a_2_1_open(self) -> None:
        key = X25519PrivateKey.from_private_bytes(
            bytes.fromhex("8057991eef8f1f1af18f4a9491d16a1ce333f695d4db8e38da75975c4478e0fb")
        )
        assert public_hex(key) == "4310ee97d88cc1f088a5576c77ab0cf5c3ac797f3d95139c6c84b5429c59662a"
        data = bytes.fromhex(
            "1afa08d3dec047a643885163f1180476fa7ddb54c6a8029ea33f95796bf2ac4a"
            "1c5250d8034ec2b784ba2cfd69dbdb8af406cfe3ff938e131f0def8c8b60b4db21993c62ce81883d2dd1b51a28"
        )
        opened = sealed.unseal(key, data, info=b"Ode on a Grecian Urn", aad=b"Count-0")
        assert opened == b"Beauty is truth, truth beauty"

    def test_what_is_sealed_opens_for_its_key_alone(self) -> None:
        data = sealed.seal(AUDITOR.encryption_key, b"rows", info=b"i", aad=b"a")
        assert sealed.unseal(OPENING_KEY, data, info=b"i", aad=b"a") == b"rows"
        assert len(data) == 32 + len(b"rows") + 16
        assert sealed.seal(AUDITOR.encryption_key, b"rows", info=b"i", aad=b"a") != data, "a fresh key each time"
        for opening, info, aad in (
            (X25519PrivateKey.generate(), b"i", b"a"),
            (OPENING_KEY, b"j", b"a"),
            (OPENING_KEY, b"i", b"b"),
        ):
            with pytest.raises(FaultError, match="do not open"):
                sealed.unseal(opening, data, info=info, aad=aad)

    def test_no_byte_of_it_can_change(self) -> None:
        data = sealed.seal(AUDITOR.encryption_key, b"rows", info=b"", aad=b"")
        for place in range(len(data)):
            changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
            with pytest.raises(FaultError) as caught:
                sealed.unseal(OPENING_KEY, changed, info=b"", aad=b"")
            assert caught.value.code == "SEAL_BROKEN"
        for length in (0, 31, 32, 47, len(data) - 1):
            with pytest.raises(FaultError):
                sealed.unseal(OPENING_KEY, data[:length], info=b"", aad=b"")

    def test_a_point_of_low_order_shares_no_secret(self) -> None:
        for point in ("00" * 32, "01" + "00" * 31):
            with pytest.raises(InputError) as caught:
                sealed.seal(point, b"rows", info=b"", aad=b"")
            assert caught.value.code == "SEAL_KEY"


class TestClause:
    def test_it_is_named_and_signs_nothing(self) -> None:
        assert CONTRACT.auditor == AUDITOR
        assert AUDITOR.id not in CONTRACT.parties()
        assert list(CONTRACT.named()) == [*CONTRACT.parties(), AUDITOR.id]
        assert [CONTRACT.role(i) for i in CONTRACT.named()] == ["operator", *["participant"] * 3, "auditor"]
        assert Contract.from_bytes(CONTRACT.to_bytes()) == CONTRACT

    def test_its_fingerprint_is_of_both_keys(self) -> None:
        assert AUDITOR.id == fingerprint(AUDITOR.key + AUDITOR.encryption_key) != fingerprint(AUDITOR.key)
        other = AUDITOR.model_copy(update={"encryption_key": public_hex(X25519PrivateKey.generate())})
        assert other.id != AUDITOR.id

    @pytest.mark.parametrize(
        ("changes", "code", "field"),
        [
            ({"entity_code": "9" * 18}, "CONTRACT_PARTY_TWICE", "auditor.entity_code"),
            ({"entity_code": f"{2:018d}"}, "CONTRACT_PARTY_TWICE", "auditor.entity_code"),
            ({"key": public_hex(key("operator"))}, "CONTRACT_PARTY_TWICE", "auditor.key"),
            ({"key": public_hex(key("participant 1"))}, "CONTRACT_PARTY_TWICE", "auditor.key"),
            ({"encryption_key": public_hex(key("operator"))}, "CONTRACT_PARTY_TWICE", "auditor.encryption_key"),
            ({"encryption_key": AUDITOR.key}, "CONTRACT_PARTY_TWICE", "auditor.encryption_key"),
            ({"encryption_key": "00" * 32}, "SEAL_KEY", "auditor.encryption_key"),
            ({"email": "x"}, "CONTRACT_UNKNOWN_KEY", "auditor.email"),
        ],
    )
    def test_who_is_a_party_already_cannot_audit(self, changes: dict[str, Any], code: str, field: str) -> None:
        with pytest.raises(InputError) as caught:
            Contract.parse(contract_values(auditor=CLAUSE | changes))
        assert (caught.value.code, caught.value.field) == (code, field)

    def test_at_client_level_there_is_nothing_to_audit(self) -> None:
        from tests.support.central import CENTRAL

        with pytest.raises(InputError) as caught:
            Contract.parse(contract_values(auditor=CLAUSE, **CENTRAL))
        assert (caught.value.code, caught.value.field) == ("CONTRACT_CENTRAL_AUDITOR", "auditor")

    def test_the_document_says_who_and_what_for(self) -> None:
        text = render(CONTRACT)
        for value in (*CLAUSE.values(), AUDITOR.id):
            assert value in text
        assert "until the auditor Audit House has re-evaluated them" in text
        without = render(Contract.parse(contract_values()))
        assert "The auditor" not in without
        assert AUDITOR.name not in without
        assert "Scores are the operator's statement, computed from the logged updates; whoever" in without

    def test_the_contracts_own_word_of_it_makes_a_trust_file(self) -> None:
        trust = Trust.of(CONTRACT)
        assert [p.role for p in trust.party] == ["operator", *["participant"] * 3, "auditor"]
        assert trust.party[-1].fingerprint == AUDITOR.id
        assert Trust.from_toml(trust.to_toml()) == trust

    def test_an_enterprise_that_signs_sees_how_it_knows_the_auditor(self) -> None:
        own, entry = CONTRACT.participants[0].id, Trust.of(CONTRACT).party[-1]
        for party, expected in (
            (entry, "known"),
            (entry.model_copy(update={"role": "operator"}), "operator only"),
            (entry.model_copy(update={"role": "participant", "fingerprint": "ab" * 32}), "operator only"),
        ):
            trust = Trust(party=(party,))
            assert standing(AUDITOR, own, CONTRACT, trust) == expected
            check_trust(CONTRACT, trust, "trust.toml")  # as anything else it has other keys
        for changes in ({"fingerprint": "ab" * 32}, {"entity_code": "91310000MA1K777777"}):
            with pytest.raises(RefusedError) as caught:
                check_trust(CONTRACT, Trust(party=(entry.model_copy(update=changes),)), "trust.toml")
            assert (caught.value.code, caught.value.party) == ("TRUST_CONTRADICTION", "Audit House")


class TestHome:
    def test_it_is_made_once_and_is_its_owners_alone(self, tmp_path: Path) -> None:
        made = init(tmp_path / "auditor", name="Audit House", entity_code="91310000MA1AUDT001", passphrase=PASSPHRASE)
        again = AuditorHome.open(tmp_path / "auditor")
        assert again.party == made.party
        signing, opening = again.keys(PASSPHRASE)
        assert (public_hex(signing), public_hex(opening)) == (made.party.key, made.party.encryption_key)
        assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
        assert {stat.S_IMODE(p.stat().st_mode) for p in made.path.rglob("*") if p.is_file()} == {0o600}
        assert b"ENCRYPTED" in (made.path / SIGNING).read_bytes()
        assert b"ENCRYPTED" in (made.path / OPENING).read_bytes()
        with pytest.raises(InputError, match="already"):
            init(tmp_path / "auditor", name="X", entity_code="91310000MA1AUDT001", passphrase=PASSPHRASE)

    @pytest.mark.parametrize(
        ("options", "code"),
        [
            ({"passphrase": b"short"}, "PASSPHRASE_SHORT"),
            ({"entity_code": "1"}, "AUDITOR_CARD"),
            ({"name": ""}, "AUDITOR_CARD"),
        ],
    )
    def test_what_is_wrong_leaves_nothing(self, tmp_path: Path, options: dict[str, Any], code: str) -> None:
        good = {"name": "Audit House", "entity_code": "91310000MA1AUDT001", "passphrase": PASSPHRASE}
        with pytest.raises(InputError) as caught:
            init(tmp_path / "auditor", **(good | options))
        assert caught.value.code == code
        assert list(tmp_path.iterdir()) == []

    def test_a_damaged_home_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InputError) as caught:
            AuditorHome.open(tmp_path)
        assert (caught.value.code, caught.value.file) == ("AUDITOR_HOME", str(tmp_path / CARD))
        home = auditor_home(tmp_path / "a")
        assert home.party == AUDITOR
        with pytest.raises(InputError, match="passphrase"):
            home.keys(b"another one")
        (home.path / OPENING).unlink()
        save_key(home.path / OPENING, X25519PrivateKey.generate(), PASSPHRASE)
        with pytest.raises(InputError) as caught:
            home.keys(PASSPHRASE)
        assert caught.value.code == "KEY_MISMATCH"
        (home.path / OPENING).unlink()
        save_key(home.path / OPENING, SIGNING_KEY, PASSPHRASE)
        with pytest.raises(InputError, match="X25519"):
            home.keys(PASSPHRASE)
        (home.path / CARD).write_text("[auditor]\n")
        with pytest.raises(InputError) as caught:
            AuditorHome.open(home.path)
        assert (caught.value.code, caught.value.file) == ("AUDITOR_CARD_MISSING_KEY", str(home.path / CARD))


def test_the_command_makes_keys_in_the_base_install(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "SERVER_MARKS", ("a_package_that_nobody_has",))
    monkeypatch.setenv("COLUMNS", "200")
    fedpact = runner(monkeypatch, capsys)
    secret = tmp_path / "secret"
    secret.write_text("correct horse\n")
    secret.chmod(0o600)
    options = ["--name", "审计所", "--entity-code", "91310000MA1AUDT001", "--passphrase-file", secret]
    code, out, err = fedpact("auditor", "init", tmp_path / "one", *options)
    home = AuditorHome.open(tmp_path / "one")
    assert (code, err) == (0, "")
    assert (tmp_path / "one" / CARD).read_text("utf-8").rstrip() in out, "what the operator pastes"
    assert home.party.id[:4] in out
    code, out, _ = fedpact("auditor", "init", tmp_path / "two", *options, "--json")
    made = AuditorHome.open(tmp_path / "two").party
    assert json.loads(out) == {"home": str(tmp_path / "two"), "fingerprint": made.id} | made.plain()
    code, _, err = fedpact("auditor", "init", tmp_path / "two", *options)
    assert code == 2
    assert "HOME_EXISTS" in err


def test_contract_read_shows_it_without_a_signature(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "contract.json").write_bytes(CONTRACT.to_bytes())
    code, out, _ = runner(monkeypatch, capsys)("contract", "read", tmp_path / "contract.json")
    assert code == 0
    shown = out[out.index("auditor Audit House") :]
    assert show_fingerprint(AUDITOR.id) in shown
    assert "signed " not in shown[: shown.index("title = ")]
    assert f"auditor.encryption_key = {AUDITOR.encryption_key}" in shown
