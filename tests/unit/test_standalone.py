"""One signed record outside a log, verified with the contract alone: what it proves, and every way to alter it."""

import base64
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.command import Run, runner
from tests.support.evidence_factory import Made, digest, key, make_evidence
from tests.support.readme import README, Script, commands

from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.contract import SignedContract
from fedpact_contract.errors import InputError
from fedpact_contract.keys import public_hex
from fedpact_contract.log import Checkpoint, ContractSigned, UpdateDecided
from fedpact_contract.merkle import EMPTY_ROOT
from fedpact_contract.messages import DestructionReceipt, Head, Held, Objection, OperatorSilent, Receipt, RoundDigest
from fedpact_contract.record import Envelope, Record, Signature, pae, read_envelope, sign
from fedpact_contract.request import instant
from fedpact_contract.standalone import MAX_BYTES, Word, close_due, verify_record
from fedpact_contract.trust import Trust, write

STRANGER = key("nobody")


@functools.cache
def made() -> Made:
    return make_evidence(end="completed")


def run_key(number: int = 0) -> Ed25519PrivateKey:
    return key(f"{made().names[made().ids[number]]} run")


def contract_key(number: int = 0) -> Ed25519PrivateKey:
    return key(made().names[made().ids[number]])


OPERATOR = key("operator run")


def signed_contract() -> SignedContract:
    body = made().entries[0].open()
    assert isinstance(body, ContractSigned)
    return body.signed


@functools.cache
def silent() -> OperatorSilent:
    """What the first participant says: the newest checkpoint, and its receipt of round 2."""
    contract, bodies = made().contract, [entry.open() for entry in made().entries]
    checkpoint = Checkpoint.from_bytes(made().checkpoints[-1].body)
    decided = [b for b in bodies if isinstance(b, UpdateDecided) and b.participant == made().ids[0]]
    due = instant(close_due(contract))
    return OperatorSilent(
        contract_id=contract.id,
        participant=made().ids[0],
        due=due,
        at=due,
        found="away",
        head=Head(size=checkpoint.size, root=checkpoint.root),
        checkpoint=made().checkpoints[-1],
        receipt=read_envelope(decided[-1].receipt),
    )


@functools.cache
def destroyed(by: str = "participant") -> DestructionReceipt:
    """What one side says that it destroyed when the first participant withdrew."""
    updates = tuple(RoundDigest(round=n, digest=digest("update", n)) for n in (1, 2))
    return DestructionReceipt(
        contract_id=made().contract.id,
        participant=made().ids[0],
        by="participant" if by == "participant" else "operator",
        destroyed=(Held(kind="arrays-in-the-outbox", count=2),),
        kept=(Held(kind="ledger-rows", count=3, reason="BUDGET_LEDGER"),),
        updates=updates,
        models=() if by == "participant" else updates,
    )


RECORDS = {
    "silence": (silent, run_key),
    "participant": (destroyed, run_key),
    "operator": (lambda: destroyed("operator"), lambda: OPERATOR),
}


def rightly_signed(name: str) -> Envelope[Any]:
    record, signer = RECORDS[name]
    return sign(record(), signer())


@pytest.fixture
def check(tmp_path: Path) -> Any:
    contract = tmp_path / "contract.json"
    contract.write_bytes(canonical_bytes(signed_contract().plain()))

    def judge(data: Envelope[Any] | bytes, trust: Trust | None = None) -> Word:
        file = tmp_path / "record.json"
        file.write_bytes(data if isinstance(data, bytes) else data.to_bytes())
        return verify_record(file, contract, trust)

    return judge


def codes(word: Word) -> list[tuple[str | None, ...]]:
    return [(fault["code"], fault.get("field"), fault.get("party")) for fault in word.faults]


# What holds


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_as_it_should_be(check: Any, name: str) -> None:
    envelope, contract = rightly_signed(name), made().contract
    full = Trust.of(contract)
    word = check(envelope, full)
    assert (word.exit_code, word.faults, word.notes) == (0, (), ())
    assert word.verdict.startswith("VERIFIED")
    assert word.contract_id == contract.id
    assert word.by
    assert word.by.startswith("City Data" if name == "operator" else "Hospital")
    assert any("one party's word" in sentence for sentence in word.leaves_open)
    assert check(envelope).exit_code == 3
    for left_out in (made().ids[0], contract.operator.id):
        few = Trust(party=tuple(p for p in full.party if p.fingerprint != left_out))
        word = check(envelope, few)
        assert word.exit_code == 4
        assert [left_out in note for note in word.notes] == [True]
    others = Trust(party=tuple(p for p in full.party if p.fingerprint not in made().ids[1:]))
    assert check(envelope, others).exit_code == 0, "nothing rests on the other participants"
    assert check(envelope.to_bytes() + b"\n", full).exit_code == 0


def test_what_a_silence_proves(check: Any) -> None:
    word, record = check(rightly_signed("silence")), silent()
    shown = "\n".join(word.proves)
    for part in ("the operator did not answer", record.due, f"the log's {record.head.size} entries", record.head.root):
        assert part in shown
    assert record.receipt is not None
    assert Receipt.from_bytes(record.receipt.body).update_digest in shown
    assert word.record == record.plain()
    bare = record.model_copy(update={"head": Head(size=0, root=EMPTY_ROOT.hex()), "checkpoint": None, "receipt": None})
    word = check(sign(bare, run_key()))
    assert (word.exit_code, len(word.proves)) == (3, 2)


def test_a_receipt_may_have_the_contract_key_and_a_silence_not(check: Any) -> None:
    """Once the run key is revoked a person signs what is destroyed."""
    name = made().contract.participant(made().ids[0]).name
    assert check(sign(destroyed(), contract_key())).exit_code == 3
    assert codes(check(sign(silent(), contract_key()))) == [("SIGNATURE_MISSING", None, name)]
    assert codes(check(sign(destroyed("operator"), key("operator")))) == [("SIGNATURE_MISSING", None, "City Data")]


# What does not


def with_checkpoint(**changes: Any) -> OperatorSilent:
    old = Checkpoint.from_bytes(made().checkpoints[-1].body)
    return silent().model_copy(update={"checkpoint": sign(old.model_copy(update=changes), OPERATOR)})


def with_receipt(signer: Ed25519PrivateKey = OPERATOR, **changes: Any) -> OperatorSilent:
    envelope = silent().receipt
    assert envelope is not None
    old = Receipt.from_bytes(envelope.body)
    return silent().model_copy(update={"receipt": sign(old.model_copy(update=changes), signer)})


def but(record: Record, **changes: Any) -> Any:
    return record.model_copy(update=changes)


def rounds(*numbers: int) -> tuple[RoundDigest, ...]:
    return tuple(RoundDigest(round=n, digest=digest("update", n)) for n in numbers)


FAULTS: dict[str, tuple[Any, Any, str, str]] = {
    "another contract": (lambda: but(silent(), contract_id="7" * 64), run_key, "RECORD_CONTRACT", "contract_id"),
    "no participant": (lambda: but(silent(), participant="7" * 64), run_key, "RECORD_PARTICIPANT", "participant"),
    "the operator itself": (
        lambda: but(silent(), participant=made().contract.operator.id),
        lambda: OPERATOR,
        "RECORD_PARTICIPANT",
        "participant",
    ),
    "a stranger": (silent, lambda: STRANGER, "SIGNATURE_MISSING", ""),
    "another participant": (silent, lambda: run_key(1), "SIGNATURE_MISSING", ""),
    "the operator for the participant": (destroyed, lambda: OPERATOR, "SIGNATURE_MISSING", ""),
    "the participant for the operator": (lambda: destroyed("operator"), run_key, "SIGNATURE_MISSING", ""),
    "another due": (lambda: but(silent(), due="2020-01-01T00:00:00Z"), run_key, "SILENCE_DUE", "due"),
    "early": (lambda: but(silent(), at="2020-01-01T00:00:00Z"), run_key, "SILENCE_EARLY", "at"),
    "no time": (lambda: but(silent(), at="2020-99-01T00:00:00Z"), run_key, "INSTANT_FORM", "at"),
    "another head": (lambda: but(silent(), head=Head(size=1, root="7" * 64)), run_key, "SILENCE_HEAD", "head"),
    "a head of nobody": (lambda: but(silent(), checkpoint=None, receipt=None), run_key, "SILENCE_HEAD", "head"),
    "another log": (lambda: with_checkpoint(origin="7" * 64), run_key, "SILENCE_HEAD", "head"),
    "another size": (lambda: with_checkpoint(size=1), run_key, "SILENCE_HEAD", "head"),
    "another root": (lambda: with_checkpoint(root="7" * 64), run_key, "SILENCE_HEAD", "head"),
    "a checkpoint of its own": (
        lambda: but(silent(), checkpoint=sign(Checkpoint.from_bytes(made().checkpoints[-1].body), run_key())),
        run_key,
        "SIGNATURE_MISSING",
        "checkpoint",
    ),
    "a receipt for a checkpoint": (
        lambda: but(silent(), checkpoint=silent().receipt),
        run_key,
        "ENVELOPE_TYPE",
        "checkpoint.type",
    ),
    "another's receipt": (lambda: with_receipt(participant=made().ids[1]), run_key, "SILENCE_RECEIPT", "receipt"),
    "another contract's receipt": (lambda: with_receipt(contract_id="7" * 64), run_key, "SILENCE_RECEIPT", "receipt"),
    "a receipt of its own": (lambda: with_receipt(run_key()), run_key, "SIGNATURE_MISSING", "receipt"),
    "a receipt without a head": (
        lambda: but(silent(), checkpoint=None, head=Head(size=0, root=EMPTY_ROOT.hex())),
        run_key,
        "SILENCE_RECEIPT",
        "receipt",
    ),
    "rounds out of order": (lambda: but(destroyed(), updates=rounds(2, 1)), run_key, "DESTRUCTION_UPDATES", "updates"),
    "a round twice": (lambda: but(destroyed(), updates=rounds(1, 1)), run_key, "DESTRUCTION_UPDATES", "updates"),
    "a round too many": (lambda: but(destroyed(), updates=rounds(3)), run_key, "DESTRUCTION_UPDATES", "updates"),
    "a participant's models": (lambda: but(destroyed(), models=rounds(1)), run_key, "DESTRUCTION_MODELS", "models"),
    "models before the first update": (
        lambda: but(destroyed("operator"), updates=rounds(2)),
        lambda: OPERATOR,
        "DESTRUCTION_MODELS",
        "models",
    ),
    "models of no update": (
        lambda: but(destroyed("operator"), updates=()),
        lambda: OPERATOR,
        "DESTRUCTION_MODELS",
        "models",
    ),
}


@pytest.mark.parametrize("what", FAULTS)
def test_what_is_signed_and_does_not_hold(check: Any, what: str) -> None:
    record, signer, code, field = FAULTS[what]
    word = check(sign(record(), signer()), Trust.of(made().contract))
    assert word.exit_code == 1
    assert (word.record, word.by, word.proves, word.leaves_open) == (None, None, (), ())
    ((found, where, party),) = codes(word)
    assert (found, where or "") == (code, field)
    blamed = made().contract.operator if record().TYPE != "operator-silent" and signer() is OPERATOR else None
    if code.startswith(("SILENCE", "DESTRUCTION", "INSTANT")):
        assert party == (blamed or made().contract.participant(made().ids[0])).name
    assert word.faults[0]["file"].endswith("record.json")


def test_two_signatures_are_one_too_many(check: Any) -> None:
    assert [c for c, *_ in codes(check(sign(silent(), run_key(), STRANGER)))] == ["SIGNATURE_EXTRA"]
    assert [c for c, *_ in codes(check(sign(destroyed(), run_key(), contract_key())))] == ["SIGNATURE_EXTRA"]
    assert [c for c, *_ in codes(check(sign(silent())))] == ["SIGNATURE_MISSING"]


FREE = {
    "silence": {"at", "found"},
    "participant": {"destroyed", "kept", "updates"},
    "operator": {"destroyed", "kept", "updates", "models"},
}
"""What is its signer's own word, and can be anything of its form."""


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    below = [leaf for name, item in items for leaf in leaves(item, (*path, name))]
    yield from below or [path]


def other(value: Any) -> Any:
    if isinstance(value, list):
        return [item.plain() for item in rounds(1)]
    if isinstance(value, int):
        return value + 1
    return {"participant": "operator", "operator": "participant"}.get(value) or (
        value[:-1] + ("0" if value[-1] != "0" else "1")
    )


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    copy = json.loads(json.dumps(value))
    place = copy
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = new
    return copy


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_is_bound_by_the_contract_or_is_its_signers_word(check: Any, name: str) -> None:
    """Each changed, and signed again by who should sign: whoever lies in it is found, but in its own statement."""
    record, signer = RECORDS[name]
    plain = record().plain()
    bound = 0
    for path in leaves(plain):
        if path[0] in FREE[name]:
            continue
        old = functools.reduce(lambda value, step: value[step], path, plain)
        data = canonical_bytes(replaced(plain, path, other(old)))
        envelope = resigned(type(record()), data, signer())
        assert found(check, envelope.to_bytes()), path
        bound += 1
    assert bound >= 3


def resigned(kind: type[Record], body: bytes, signer: Ed25519PrivateKey) -> Envelope[Any]:
    """An envelope around bytes that may be no record at all."""
    value = signer.sign(pae(kind.media_type(), body)).hex()
    payload = base64.b64encode(body).decode()
    signature = Signature(key=public_hex(signer), value=value)
    return Envelope(type=kind.media_type(), payload=payload, signatures=(signature,))


def found(check: Any, data: bytes) -> bool:
    """Whether it is told from a record that holds."""
    try:
        word = check(data)
    except InputError as err:
        return err.code == "RECORD_FORM"
    return bool(word.exit_code == 1 and word.faults)


@pytest.mark.parametrize("name", RECORDS)
def test_every_byte_counts(check: Any, name: str) -> None:
    good = rightly_signed(name).to_bytes()
    assert not found(check, good)
    for position in range(0, len(good), 3):
        changed = bytearray(good)
        changed[position] ^= 1 << position % 8
        assert found(check, bytes(changed)), position
    for length in (0, 1, len(good) // 2, len(good) - 1):
        assert found(check, good[:length])
    assert found(check, good + b"\n\n")
    assert found(check, good + good)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("standalone")


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_every_byte_of_the_contract_counts(folder: Path, data: st.DataObject) -> None:
    good = canonical_bytes(signed_contract().plain())
    position = data.draw(st.integers(0, len(good) - 1))
    changed = bytearray(good)
    changed[position] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "record.json").write_bytes(rightly_signed("silence").to_bytes())
    (folder / "contract.json").write_bytes(bytes(changed))
    try:
        word = verify_record(folder / "record.json", folder / "contract.json", None)
        assert word.exit_code == 1
        faults = {(fault["file"], "") for fault in word.faults}
    except InputError as err:
        faults = {(str(err.file), err.code)}
    assert faults in ({(str(folder / "contract.json"), code)} for code in ("", "SIGNED_CONTRACT_FORM"))


def test_a_contract_that_not_everybody_signed(check: Any, tmp_path: Path) -> None:
    signed, contract = signed_contract(), made().contract
    envelope = signed.contract.model_copy(update={"signatures": signed.contract.signatures[1:]})
    other = make_evidence(operator_run="other").entries[0].open()
    assert isinstance(other, ContractSigned)
    for name, broken, code in (
        ("unsigned", signed.model_copy(update={"contract": envelope}), "CONTRACT_UNSIGNED"),
        ("undelegated", signed.model_copy(update={"delegations": signed.delegations[1:]}), "DELEGATION_MISSING"),
        (
            "twice",
            signed.model_copy(update={"delegations": (*signed.delegations, signed.delegations[0])}),
            "DELEGATION_TWICE",
        ),
    ):
        (tmp_path / name).write_bytes(canonical_bytes(broken.plain()))
        (tmp_path / "r").write_bytes(rightly_signed("silence").to_bytes())
        word = verify_record(tmp_path / "r", tmp_path / name, Trust.of(contract))
        assert (word.exit_code, [c for c, *_ in codes(word)]) == (1, [code])
        assert word.faults[0]["file"] == str(tmp_path / name)
        assert word.faults[0]["field"].startswith(("contract.signatures", "delegations"))
    (tmp_path / "other").write_bytes(canonical_bytes(other.signed.plain()))
    word = verify_record(tmp_path / "r", tmp_path / "other", None)
    assert codes(word)[0][:2] == ("SIGNATURE_MISSING", "checkpoint"), "the operator's run key there is another"


def test_a_trust_file_that_knows_somebody_else(check: Any) -> None:
    party = Trust.of(made().contract).party
    wrong = Trust(party=(party[0].model_copy(update={"fingerprint": "7" * 64}), *party[1:]))
    word = check(rightly_signed("silence"), wrong)
    assert codes(word) == [("TRUST_CONTRADICTION", "contract", party[0].name)]


# The command


@pytest.fixture
def fedpact(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("COLUMNS", "200")
    return runner(monkeypatch, capsys)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "record.json").write_bytes(rightly_signed("silence").to_bytes())
    (tmp_path / "contract.json").write_bytes(canonical_bytes(signed_contract().plain()))
    write(tmp_path / "trust.toml", Trust.of(made().contract))
    return tmp_path


def test_the_command(fedpact: Run, files: Path) -> None:
    line = ("verify", files / "record.json", "--contract", files / "contract.json")
    code, out, err = fedpact(*line, "--trust", files / "trust.toml")
    assert (code, err) == (0, "")
    for part in (
        "operator-silent",
        "It proves:",
        "did not answer",
        "It does not prove:",
        "one party's word",
        "VERIFIED",
    ):
        assert part in out
    assert fedpact(*line)[0] == 3
    code, out, _ = fedpact(*line, "--json")
    values = json.loads(out)
    assert (code, values["exit_code"], values["record"]["found"]) == (3, 3, "away")
    assert values["type"] == "operator-silent"
    (files / "record.json").write_bytes(sign(silent(), STRANGER).to_bytes())
    code, out, _ = fedpact(*line)
    assert code == 1
    assert "SIGNATURE_MISSING" in out
    assert "proves nothing" in out


def test_the_pages_commands(fedpact: Run, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/verifying.md, in a folder with files of these names."""
    monkeypatch.chdir(files)
    (files / "silent.json").write_bytes(rightly_signed("silence").to_bytes())
    (files / "destroyed.json").write_bytes(rightly_signed("operator").to_bytes())
    text = (README.parent / "docs" / "verifying.md").read_text("utf-8")
    script = Script(commands(text, "One record outside a log"))
    for record in ("silent.json", "destroyed.json"):
        assert fedpact(*script.take(f"fedpact verify {record}")[1:])[0] == 0
    script.done()


def long_nested() -> bytes:
    return b"[" * 200_000 + b"]" * 200_000


HOSTILE: dict[str, tuple[Any, str]] = {
    "not JSON": (lambda: b"MZ\x90\x00", "RECORD_FORM"),
    "empty": (lambda: b"", "RECORD_FORM"),
    "nested": (long_nested, "RECORD_FORM"),
    "a list": (lambda: b"[]", "RECORD_FORM"),
    "reformatted": (lambda: json.dumps(rightly_signed("silence").plain(), indent=1).encode(), "RECORD_FORM"),
    "too big": (lambda: b" " * (MAX_BYTES + 1), "RECORD_SIZE"),
    "another type": (
        lambda: sign(
            Objection(contract_id=made().contract.id, size=1, root="7" * 64, participant=made().ids[0], code="X"),
            run_key(),
        ).to_bytes(),
        "RECORD_FORM",
    ),
    "the contract itself": (lambda: canonical_bytes(signed_contract().plain()), "RECORD_FORM"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_files_that_are_no_record(fedpact: Run, files: Path, what: str) -> None:
    make, code = HOSTILE[what]
    (files / "bad").write_bytes(make())
    exit_code, out, err = fedpact("verify", files / "bad", "--contract", files / "contract.json")
    assert (exit_code, out) == (2, "")
    assert code in err
    assert "Traceback" not in err
    wrong = code if code == "RECORD_SIZE" else "SIGNED_CONTRACT_FORM"
    if what != "the contract itself":
        exit_code, _, err = fedpact("verify", files / "record.json", "--contract", files / "bad")
        assert exit_code == 2
        assert wrong in err


def test_paths_that_are_no_files(fedpact: Run, files: Path) -> None:
    record, contract = files / "record.json", files / "contract.json"
    os.mkfifo(files / "pipe")
    for bad in (files / "nothing", files, files / "pipe", Path("/dev/zero")):
        for line in ((bad, "--contract", contract), (record, "--contract", bad)):
            exit_code, _, err = fedpact("verify", *line)
            assert (exit_code, "RECORD_MISSING" in err) == (2, True), line
    if os.geteuid():
        record.chmod(0)
        assert "RECORD_UNREADABLE" in fedpact("verify", record, "--contract", contract)[2]


def test_options_that_do_not_go_together(fedpact: Run, files: Path) -> None:
    record, contract = files / "record.json", files / "contract.json"
    exit_code, _, err = fedpact("verify", record)
    assert (exit_code, "RECORD_CONTRACT" in err, "--contract" in err) == (2, True, True)
    exit_code, _, err = fedpact("verify", record, "--contract", contract, "--reevaluation", record)
    assert (exit_code, "RECORD_REEVALUATION" in err) == (2, True)
