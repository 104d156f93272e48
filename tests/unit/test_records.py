"""Canonical bytes, keys, records and envelopes: one spelling each, and no signature of one type verifies as another."""

import datetime
import json
import os
from decimal import Decimal

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedpact_contract import keys
from fedpact_contract.canonical import canonical_bytes, parse_canonical
from fedpact_contract.contract import Delegation
from fedpact_contract.errors import FaultError, FedpactError, InputError, RefusedError
from fedpact_contract.log import Checkpoint, Countersignature, Entry, PeriodClosing, RoundScores, commitment
from fedpact_contract.messages import PrivacyEvent, Receipt, Reply
from fedpact_contract.record import (
    Envelope,
    decimal_text,
    open_signed,
    pae,
    read_envelope,
    sign,
    signers,
)
from fedpact_contract.request import (
    check_request,
    instant,
    node_id,
    node_public_pem,
    parse_instant,
    sign_request,
    utc_now,
)

KEY, OTHER = keys.generate_key(), keys.generate_key()


def code_of(err: pytest.ExceptionInfo[FedpactError]) -> str:
    return err.value.code


class TestCanonical:
    def test_rfc_8785_sorts_by_utf16_and_escapes_little(self) -> None:
        value = {"\u20ac": "Euro", "\r": "CR", "1": "One", "\U0001f600": "smile", "\u0080": "control"}
        assert list(json.loads(canonical_bytes(value))) == ["\r", "1", "\u0080", "\u20ac", "\U0001f600"]
        assert canonical_bytes({"b": [1, True, None, "ü"], "a": {}}) == '{"a":{},"b":[1,true,null,"ü"]}'.encode()

    @pytest.mark.parametrize("value", [1.5, {"a": [0.0]}, float("nan")])
    def test_floats_are_refused(self, value) -> None:
        with pytest.raises(InputError) as err:
            canonical_bytes(value)
        assert code_of(err) == "CANONICAL_FLOAT"

    def test_integers_that_a_double_cannot_hold_are_refused(self) -> None:
        assert canonical_bytes(2**53 - 1)
        with pytest.raises(InputError) as err:
            canonical_bytes({"a": 2**53})
        assert code_of(err) == "CANONICAL_INTEGER"

    @pytest.mark.parametrize(
        "data",
        [b'{"a": 1}', b'{"b":1,"a":2}', b'{"a":1}\n', b'{"a":1,"a":1}', b"{", b"\xff", b'{"a":1.0}', b'{"a":1e0}'],
    )
    def test_only_the_one_spelling_is_read(self, data) -> None:
        with pytest.raises(InputError):
            parse_canonical(data)

    def test_deep_nesting_is_refused_not_a_crash(self) -> None:
        with pytest.raises(InputError):
            parse_canonical(b"[" * 100_000 + b"]" * 100_000)

    def test_what_has_no_canonical_form_is_refused(self) -> None:
        for value in ("\ud800", {1: "a"}, object()):
            with pytest.raises(InputError) as err:
                canonical_bytes(value)
            assert code_of(err) == "CANONICAL_VALUE"
        value: object = 1
        for _ in range(65):
            value = [value]
        with pytest.raises(InputError) as err:
            canonical_bytes(value)
        assert code_of(err) == "CANONICAL_DEPTH"


class TestKeys:
    def test_a_key_is_its_owners_alone_and_never_overwritten(self, tmp_path) -> None:
        path = tmp_path / "sub" / "a.key"
        keys.save_key(path, KEY, b"a passphrase")
        assert path.stat().st_mode & 0o777 == 0o600
        assert keys.public_hex(keys.load_key(path, b"a passphrase")) == keys.public_hex(KEY)
        with pytest.raises(InputError) as err:
            keys.save_key(path, OTHER)
        assert code_of(err) == "KEY_EXISTS"

    def test_wrong_passphrase_missing_file_and_open_mode_are_named(self, tmp_path) -> None:
        path = tmp_path / "a.key"
        keys.save_key(path, KEY, b"a passphrase")
        for passphrase in (b"another", None):
            with pytest.raises(InputError) as err:
                keys.load_key(path, passphrase)
            assert code_of(err) == "KEY_PASSPHRASE"
        with pytest.raises(InputError) as err:
            keys.load_key(tmp_path / "none.key")
        assert code_of(err) == "KEY_MISSING"
        path.chmod(0o644)
        with pytest.raises(InputError) as err:
            keys.load_key(path, b"a passphrase")
        assert code_of(err) == "KEY_MODE"

    def test_fingerprints_are_read_as_people_write_them(self) -> None:
        value = keys.fingerprint(keys.public_hex(KEY))
        assert keys.parse_fingerprint(keys.show_fingerprint(value).upper()) == value
        for bad in ("", "12", "g" * 64, value + "0"):
            with pytest.raises(InputError):
                keys.parse_fingerprint(bad)

    def test_a_broken_public_key_or_signature_is_no_match(self) -> None:
        assert not keys.verify_raw("00" * 32, b"x" * 64, b"m")
        assert not keys.verify_raw("zz", b"", b"m")


def checkpoint(**changes) -> Checkpoint:
    return Checkpoint(**{"origin": "a" * 64, "size": 3, "root": "b" * 64} | changes)


class TestEnvelopes:
    def test_a_signature_covers_type_and_version_before_the_bytes(self) -> None:
        envelope = sign(checkpoint(), KEY)
        message = pae(Checkpoint.media_type(), checkpoint().to_bytes())
        assert message.startswith(
            b"DSSEv1 %d application/vnd.fedpact.checkpoint.v1+json " % len(Checkpoint.media_type())
        )
        assert keys.verify_raw(envelope.signatures[0].key, bytes.fromhex(envelope.signatures[0].value), message)

    def test_no_signature_of_one_type_verifies_as_another(self) -> None:
        envelope = sign(checkpoint(), KEY)
        for kind in (Countersignature, Receipt, Delegation):
            with pytest.raises(FaultError) as err:
                signers(envelope, kind)
            assert code_of(err) == "ENVELOPE_TYPE"
            relabelled = envelope.model_copy(update={"type": kind.media_type()})
            with pytest.raises(FaultError) as err:
                open_signed(relabelled, kind, keys.public_hex(KEY))
            assert code_of(err) == "SIGNATURE_INVALID"

    def test_another_key_a_changed_byte_or_one_bad_signature_among_good_ones(self) -> None:
        envelope = sign(checkpoint(), KEY)
        with pytest.raises(FaultError) as err:
            open_signed(envelope, Checkpoint, keys.public_hex(OTHER))
        assert code_of(err) == "SIGNATURE_MISSING"
        changed = envelope.model_copy(update={"payload": sign(checkpoint(size=4), OTHER).payload})
        with pytest.raises(FaultError) as err:
            open_signed(changed, Checkpoint, keys.public_hex(KEY))
        assert code_of(err) == "SIGNATURE_INVALID"
        both = sign(checkpoint(), KEY, OTHER)
        assert signers(both, Checkpoint) == {keys.public_hex(KEY), keys.public_hex(OTHER)}
        tainted = both.model_copy(
            update={"signatures": (both.signatures[0], both.signatures[1].model_copy(update={"value": "0" * 128}))}
        )
        with pytest.raises(FaultError):
            open_signed(tainted, Checkpoint, keys.public_hex(KEY))

    def test_envelopes_have_one_spelling(self) -> None:
        envelope = sign(checkpoint(), KEY)
        assert read_envelope(envelope.to_bytes()) == envelope
        with pytest.raises(InputError):
            read_envelope(envelope.to_bytes() + b" ")
        for payload in ("%%%", envelope.payload + "\n", envelope.payload.rstrip("=") + "!"):
            with pytest.raises(InputError):
                assert envelope.model_copy(update={"payload": payload}).body

    def test_records_refuse_unknown_keys_and_coercion(self) -> None:
        plain = checkpoint().plain()
        for bad in (plain | {"x": 1}, plain | {"size": "3"}, plain | {"size": 3.0}, plain | {"root": "B" * 64}, {}):
            with pytest.raises(InputError):
                Checkpoint.parse(bad, code="X")
        with pytest.raises(InputError) as err:
            Checkpoint.parse(plain | {"x": 1}, code="CHECKPOINT")
        assert code_of(err) == "CHECKPOINT_UNKNOWN_KEY"
        assert err.value.field == "x"

    def test_a_reply_is_one_thing(self) -> None:
        for value in ({}, {"update": {}, "refusal": {}}):
            with pytest.raises(InputError):
                Reply.parse(value, code="REPLY")

    def test_generic_envelopes_keep_their_form(self) -> None:
        assert Envelope[Checkpoint].parse(sign(checkpoint(), KEY).plain(), code="X").type == Checkpoint.media_type()


@pytest.mark.parametrize(
    ("value", "text"),
    [("1.50", "1.5"), ("-0.0", "0"), ("1E+3", "1000"), ("1e-5", "0.00001"), ("100", "100"), ("0.10", "0.1")],
)
def test_a_decimal_has_one_plain_spelling(value, text) -> None:
    assert decimal_text(Decimal(value)) == text


@pytest.mark.parametrize("value", ["1e101", "1e-101", "1e99999999999", "1e-99999999999", "1" * 102, "0." + "1" * 101])
def test_a_decimal_without_end_is_refused_and_not_written_out(value: str) -> None:
    event = {"sampling": "poisson", "sample_rate": "0.1", "noise_multiplier": "1", "steps": 1}
    for given in (value, Decimal(value)):
        with pytest.raises(InputError, match="at most 100 digits"):
            PrivacyEvent.parse(event | {"max_grad_norm": given}, code="X")
    assert decimal_text(Decimal("1e100")) == "1" + "0" * 100
    assert decimal_text(Decimal("1e-100")) == "0." + "0" * 99 + "1"
    assert decimal_text(Decimal("0e99999999999")) == "0"


@pytest.mark.parametrize("payload", ["not base64", "YQ", "YR==", "YQ==\n", "\u00e9"])
def test_a_payload_has_one_base64_spelling(payload: str) -> None:
    with pytest.raises(InputError) as err:
        _ = Envelope[Checkpoint](type="t", payload=payload, signatures=()).body
    assert code_of(err) == "ENVELOPE_PAYLOAD"
    assert Envelope[Checkpoint](type="t", payload="YQ==", signatures=()).body == b"a"


@pytest.mark.parametrize(
    "text", ["", "soon", "2026-13-01T00:00:00Z", "2026-01-01 00:00:00", "2026-01-01T00:00:00+08:00"]
)
def test_an_instant_has_one_form(text: str) -> None:
    with pytest.raises(InputError) as err:
        parse_instant(text)
    assert code_of(err) == "INSTANT_FORM"


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_commitments_salt_has_its_length(length: int) -> None:
    with pytest.raises(InputError) as err:
        commitment(Checkpoint, bytes(length), checkpoint())
    assert code_of(err) == "COMMITMENT_SALT"


class TestLog:
    def test_entries_carry_fresh_random_bytes_and_one_spelling(self) -> None:
        first, second = Entry.of(PeriodClosing(period=1)), Entry.of(PeriodClosing(period=1))
        assert first.salt != second.salt
        assert first.leaf_hash != second.leaf_hash
        assert Entry.from_bytes(first.to_bytes()) == first
        assert first.open() == PeriodClosing(period=1)

    def test_unknown_types_and_bodies_are_faults(self) -> None:
        with pytest.raises(FaultError) as err:
            Entry(type="nonsense", salt="0" * 64, body={}).open()
        assert code_of(err) == "ENTRY_TYPE"
        with pytest.raises(FaultError) as err:
            Entry(type="period-closing", salt="0" * 64, body={"period": 0}).open()
        assert code_of(err) == "ENTRY_BODY"

    def test_a_commitment_binds_type_salt_and_value(self) -> None:
        scores = RoundScores(round=1, players=("a" * 64,), losses=((1,), (2,)), correct=(1, 2))
        salt = os.urandom(32)
        value = commitment(RoundScores, salt, scores)
        assert value == commitment(RoundScores, salt, RoundScores.model_validate_json(scores.model_dump_json()))
        assert value != commitment(RoundScores, os.urandom(32), scores)
        assert value != commitment(RoundScores, salt, scores.model_copy(update={"correct": (1, 3)}))
        with pytest.raises(InputError):
            commitment(RoundScores, b"short", scores)


class TestRequests:
    KEY = ec.generate_private_key(ec.SECP384R1())

    def test_a_request_is_bound_to_method_path_body_and_time(self) -> None:
        now, pem = utc_now(), node_public_pem(self.KEY)
        headers = sign_request(self.KEY, "POST", "/fedpact/v1/x?y=1", b"body", now)
        check_request(pem, headers, "POST", "/fedpact/v1/x?y=1", b"body", now)
        assert headers["fedpact-node"] == node_id(pem)
        for method, path, body in (
            ("GET", "/fedpact/v1/x?y=1", b"body"),
            ("POST", "/fedpact/v1/x?y=2", b"body"),
            ("POST", "/fedpact/v1/x?y=1", b"Body"),
        ):
            with pytest.raises(RefusedError) as err:
                check_request(pem, headers, method, path, body, now)
            assert code_of(err) == "REQUEST_SIGNATURE"
        for seconds in (-301, 301):
            later = now + datetime.timedelta(seconds=seconds)
            with pytest.raises(RefusedError) as err:
                check_request(pem, headers, "POST", "/fedpact/v1/x?y=1", b"body", later)
            assert code_of(err) == "REQUEST_DATE"
        other = node_public_pem(ec.generate_private_key(ec.SECP384R1()))
        with pytest.raises(RefusedError):
            check_request(other, headers, "POST", "/fedpact/v1/x?y=1", b"body", now)

    def test_other_keys_are_no_node_keys(self) -> None:
        for pem in ("nonsense", node_public_pem(ec.generate_private_key(ec.SECP256R1()))):
            with pytest.raises(InputError):
                node_id(pem)

    def test_instants_have_one_form(self) -> None:
        now = utc_now()
        assert parse_instant(instant(now)) == now
        for bad in ("2026-11-24", "2026-11-24T12:00:00+00:00", "2026-13-01T00:00:00Z"):
            with pytest.raises(InputError):
                parse_instant(bad)
