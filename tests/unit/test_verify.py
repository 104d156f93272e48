"""What `verify` finds: first in evidence that somebody changed, then in evidence whose makers lied and signed it."""

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from tests.support.evidence_factory import Factory, Made, contract_values, digest, key, make_evidence

from fedpact_contract import merkle
from fedpact_contract.contract import Contract, SignedContract
from fedpact_contract.errors import FaultError, InputError
from fedpact_contract.evidence import CHECKPOINTS, COUNTERSIGNATURES, FILES, LEAVES, LOG, unpack
from fedpact_contract.keys import fingerprint, public_hex
from fedpact_contract.ledger import GENESIS
from fedpact_contract.log import (
    Body,
    Checkpoint,
    Countersignature,
    Entry,
    Moments,
    PeriodSettled,
    ReplyMissed,
    RevenueRecorded,
    RoundAbandoned,
    SettledLine,
)
from fedpact_contract.logcheck import verify_log
from fedpact_contract.record import Envelope, read_envelope, sign
from fedpact_contract.replay import replay
from fedpact_contract.trust import Trust, write
from fedpact_contract.verify import REVENUE, UTILITIES, ParticipantResult, Report, verify, verify_folder

MADE = make_evidence()


def report(made: Made, trust: Trust | None = None, *, privacy: bool = False) -> Report:
    return verify(made.evidence, trust, privacy=privacy)


def of_files(files: dict[str, bytes]) -> Report:
    return verify(unpack(files), None, privacy=False)


def lines(name: str) -> list[bytes]:
    return MADE.files[name].splitlines(keepends=True)


def changed(name: str, change: Callable[[list[bytes]], Any]) -> Report:
    """The report on the valid evidence with one file's lines changed in place."""
    rows = lines(name)
    change(rows)
    return of_files({**MADE.files, name: b"".join(rows)})


def only_fault(result: Report) -> dict[str, str]:
    assert result.exit_code == 1
    assert result.verdict.startswith("FAULT")
    assert len(result.faults) == 1, result.faults
    return result.faults[0]


def told(tamper: Callable[[str, Any], Any], **options: Any) -> Report:
    return report(make_evidence(tamper=tamper, **options))


def at(stage: str, change: Callable[[Any], Any]) -> Callable[[str, Any], Any]:
    """A hook that changes one stage."""
    return lambda name, thing: change(thing) if name == stage else thing


def put(stage: str, **values: Any) -> Callable[[str, Any], Any]:
    """A hook that puts other values into a record of one stage."""
    return at(stage, lambda thing: thing.model_copy(update=values))


# Honest evidence


def test_without_a_trust_file_it_is_consistent_and_not_authenticated() -> None:
    result = report(MADE)
    assert (result.exit_code, result.status, result.faults) == (3, "closed", ())
    assert result.verdict.startswith("INTERNALLY CONSISTENT, NOT AUTHENTICATED")
    assert not any(p.authenticated for p in result.participants)
    assert UTILITIES in result.notes


def line_of(result: Report, party_id: str) -> ParticipantResult:
    (line,) = (line for line in result.participants if line.id == party_id)
    return line


def test_with_every_party_known_it_is_verified() -> None:
    result = report(MADE, Trust.of(MADE.contract), privacy=True)
    assert (result.exit_code, result.faults, result.notes) == (0, (), (REVENUE, UTILITIES))
    assert result.verdict.startswith("VERIFIED")
    assert (result.entries, result.checkpoints, result.countersignatures) == (20, 7, 9)
    assert (result.rounds_planned, result.rounds_aggregated) == (2, 2)
    assert (result.pool_fen, result.basis) == (9_000_019, "contribution")
    assert result.interval == "validation sampling only"
    assert [p.id for p in result.participants] == [p.id for p in MADE.contract.participants], "the contract's order"
    for line in result.participants:
        assert Decimal(line.low or 0) < Decimal(line.share or 0) < Decimal(line.high or 0)
        assert (line.countersigned, line.authenticated, line.held_fen, line.rounds_admitted) == (True, True, 0, 2)
    assert sum(line.fen or 0 for line in result.participants) == result.pool_fen


def test_the_report_is_plain_json() -> None:
    plain = changed(LOG, lambda rows: rows.pop()).as_dict()
    assert plain["exit_code"] == 1
    assert set(plain["faults"][0]) >= {"code", "message", "file", "field"}
    assert "id" in report(MADE).as_dict()["participants"][0]


def test_every_outcome_of_a_round_may_stand_in_an_honest_log() -> None:
    outcomes = {(1, 0): "rejected", (2, 1): "refused", (3, 2): "missed", (4, 3): "absent"}
    made = make_evidence(participants=4, rounds=4, outcomes=outcomes, privacy__noise_multiplier="1.6")
    result = report(made, Trust.of(made.contract), privacy=True)
    assert (result.exit_code, result.faults) == (0, ())
    assert [line.rounds_admitted for line in result.participants] == [3, 3, 3, 3]
    assert any("was not invited in round 4" in note for note in result.notes)


def test_a_second_period_on_the_same_run() -> None:
    factory = _closed_factory()
    factory.settle(period=2, revenue_fen=500_000, fees_fen=0)
    factory.close(period=2)
    for party_id in factory.made.ids[:2]:
        factory.countersign(party_id)
    result = report(factory.made, Trust.of(factory.contract))
    assert (result.exit_code, result.faults, result.pool_fen) == (4, (), 9_500_019)
    third = line_of(result, factory.made.ids[2])
    assert 0 < third.held_fen < (third.fen or 0)
    assert not third.countersigned


def _opened_factory(tamper: Callable[[str, Any], Any] | None) -> Factory:
    """A factory after two rounds, with everything opened and nothing settled."""
    factory = Factory(Contract.parse(contract_values()), tamper)
    factory.sign_contract()
    factory.checkpoint()
    for number in (1, 2):
        factory.open_round(number, factory.made.ids)
        for party_id in factory.made.ids:
            factory.update(number, party_id)
        factory.aggregate(number, factory.made.ids)
    factory.complete()
    factory.open_scores()
    return factory


def _closed_factory() -> Factory:
    factory = _opened_factory(None)
    factory.settle()
    factory.close()
    for party_id in factory.made.ids:
        factory.countersign(party_id)
    return factory


@pytest.mark.parametrize(
    ("end", "status"),
    [("opened", "running"), ("round", "running"), ("completed", "completed"), ("settled", "settled")],
)
def test_an_unfinished_run_verifies_as_far_as_it_goes(end, status) -> None:
    made = make_evidence(end=end)
    result = report(made, Trust.of(made.contract))
    assert (result.exit_code, result.status, result.faults) == (4, status, ())
    assert any("not closed yet" in note for note in result.notes)
    assert report(made).exit_code == 3
    assert any("as far as it goes" in note for note in report(made).notes)


def test_lines_without_a_countersignature_are_held() -> None:
    made = make_evidence(unsigned=[1])
    result = report(made, Trust.of(made.contract))
    held = line_of(result, made.ids[1])
    assert (result.exit_code, result.status, result.faults) == (4, "closing", ())
    assert held.held_fen == held.fen
    assert not held.countersigned
    assert any(held.name in note and "held" in note for note in result.notes)
    assert line_of(result, made.ids[0]).held_fen == 0


def test_who_is_paid_nothing_need_not_countersign() -> None:
    settlement = {
        "settlement__contribution_weight": "0",
        "settlement__data_weight": "1",
        "settlement__equal_weight": "0",
    }
    outcomes = {(1, 0): "refused", (2, 0): "refused"}
    made = make_evidence(outcomes=outcomes, unsigned=[0], **settlement)
    result = report(made, Trust.of(made.contract))
    assert (result.exit_code, line_of(result, made.ids[0]).fen) == (0, 0)


def test_a_run_that_ended_early_or_was_stopped_says_so() -> None:
    early = make_evidence(end="completed", training__rounds=5, privacy__noise_multiplier="2")
    assert any("after 2 of 5 rounds" in note for note in report(early).notes)

    def stop(body: Any) -> Any:
        return RoundAbandoned(round=2, admitted=body.admitted, code="ROUND_TOO_FEW_UPDATES")

    def few(name: str, thing: Any) -> Any:
        if name == "round-aggregated:2":
            return stop(thing)
        return None if name == "scores-committed:2" else thing

    outcomes = {(2, 0): "missed", (2, 1): "refused"}
    made = make_evidence(end="round", outcomes=outcomes, tamper=few)
    result = report(made)
    assert (result.exit_code, result.status, result.faults) == (3, "stopped", ())
    assert any("stopped" in note for note in result.notes)


# Whose word it is


def _trust_of(made: Made, *, leave_out: str = "", **changes: str) -> Trust:
    parties = [p.model_copy(update=changes if p.name == "Hospital 1" else {}) for p in Trust.of(made.contract).party]
    return Trust(party=tuple(p for p in parties if p.name != leave_out))


@pytest.mark.parametrize(("name", "words"), [("City Data", "operator's key"), ("Hospital 1", "line of")])
def test_what_rests_on_a_key_that_the_trust_file_lacks_is_named(name, words) -> None:
    result = report(MADE, _trust_of(MADE, leave_out=name))
    assert (result.exit_code, result.faults) == (4, ())
    note = next(n for n in result.notes if name in n)
    party = next(p for p in MADE.contract.parties().values() if p.name == name)
    assert words in note
    assert party.id in note
    if name == "Hospital 1":
        assert "rounds 1-2" in note


def test_a_party_known_in_another_role_is_not_authenticated() -> None:
    result = report(MADE, _trust_of(MADE, role="auditor"))
    assert (result.exit_code, result.faults) == (4, ())
    assert [p.authenticated for p in result.participants if p.name == "Hospital 1"] == [False]


def test_a_participant_without_a_reply_or_a_line_need_not_be_known() -> None:
    outcomes = {(r, 2): "missed" for r in (1, 2)}
    made = make_evidence(end="closed", outcomes=outcomes, unsigned=[2])
    name = made.contract.participant(made.ids[2]).name
    result = report(made, _trust_of(made, leave_out=name))
    assert (result.exit_code, line_of(result, made.ids[2]).fen) == (0, 0)


@pytest.mark.parametrize("changes", [{"fingerprint": "ab" * 32}, {"entity_code": "X" * 18}])
def test_a_trust_file_that_contradicts_the_contract_is_a_fault(changes) -> None:
    fault = only_fault(report(MADE, _trust_of(MADE, **changes)))
    assert (fault["code"], fault["party"]) == ("TRUST_CONTRADICTION", "Hospital 1")


def test_the_trust_file_reads_back_what_it_wrote(tmp_path) -> None:
    trust = _trust_of(MADE, name='A "quoted" \\ 医院')
    write(tmp_path / "trust.toml", trust)
    assert Trust.read(tmp_path / "trust.toml") == trust
    assert [p.name for p in tmp_path.iterdir()] == ["trust.toml"]


def _entry(**changes: str) -> str:
    values = {"role": "participant", "name": "A", "entity_code": "1" * 18, "fingerprint": "AB:cd " + "0" * 60} | changes
    return "[[party]]\n" + "".join(f'{k} = "{v}"\n' for k, v in values.items() if v is not None)


def test_fingerprints_may_be_written_as_people_do() -> None:
    assert Trust.from_toml(_entry()).party[0].fingerprint == "abcd" + "0" * 60


@pytest.mark.parametrize(
    ("text", "code", "field"),
    [
        ("party = [", "TOML_SYNTAX", None),
        ("", "TRUST_MISSING_KEY", "party"),
        ("party = []", "TRUST", "party"),
        (_entry() + "colour = 'red'\n", "TRUST_UNKNOWN_KEY", "party.0.colour"),
        (_entry(role="owner"), "TRUST", "party.0.role"),
        (_entry(fingerprint="abc"), "TRUST", "party.0.fingerprint"),
        (_entry(entity_code="12"), "TRUST", "party.0.entity_code"),
        (_entry(name=""), "TRUST", "party.0.name"),
        ("[[party]]\nrole = 'auditor'\n", "TRUST_MISSING_KEY", "party.0.name"),
        (_entry() + _entry(fingerprint="1" * 64), "TRUST_PARTY_TWICE", "party.1"),
        (_entry() + _entry(entity_code="2" * 18), "TRUST_PARTY_TWICE", "party.1"),
    ],
)
def test_a_bad_trust_file_is_refused_with_its_place(text, code, field) -> None:
    with pytest.raises(InputError) as refused:
        Trust.from_toml(text, file="trust.toml")
    assert (refused.value.code, refused.value.field) == (code, field)
    assert refused.value.file is not None
    assert re.fullmatch(r"trust\.toml(:\d+)?", refused.value.file)


def test_a_trust_file_that_is_not_there_or_not_text(tmp_path) -> None:
    (tmp_path / "t").write_bytes(b"\xff\xfe")
    for path, code in (
        (tmp_path / "none", "TRUST_MISSING"),
        (tmp_path, "TRUST_MISSING"),
        (tmp_path / "t", "TRUST_ENCODING"),
    ):
        with pytest.raises(InputError) as refused:
            Trust.read(path)
        assert refused.value.code == code


# Evidence that somebody changed


@pytest.mark.parametrize("index", [0, 1, 4, 19])
def test_a_changed_entry_is_located(index) -> None:
    def change(rows: list[bytes]) -> None:
        rows[index] = rows[index].replace(b'"salt":"', b'"salt":"0')[:-1] + b"\n"

    fault = only_fault(changed(LOG, change))
    assert (fault["code"], fault["file"], fault["field"]) == ("LOG_CHANGED", LOG, f"entries.{index}")
    assert f"Entry {index} was changed" in fault["message"]


@pytest.mark.parametrize("index", [0, 5, 18])
def test_a_deleted_entry_is_located(index) -> None:
    fault = only_fault(changed(LOG, lambda rows: rows.pop(index)))
    assert (fault["code"], fault["field"]) == ("LOG_DELETED", f"entries.{index}")


@pytest.mark.parametrize(("index", "words"), [(20, "appended"), (3, "inserted")])
def test_an_entry_put_in_is_located(index, words) -> None:
    row = Entry.of(ReplyMissed(round=2, participant=MADE.ids[0], code="DEADLINE")).to_bytes() + b"\n"
    fault = only_fault(changed(LOG, lambda rows: rows.insert(index, row)))
    assert (fault["code"], fault["field"]) == ("LOG_INSERTED", f"entries.{index}")
    assert words in fault["message"]


@pytest.mark.parametrize(("first", "second"), [(3, 4), (2, 15), (0, 19)])
def test_swapped_entries_are_located(first, second) -> None:
    def swap(rows: list[bytes]) -> None:
        rows[first], rows[second] = rows[second], rows[first]

    fault = only_fault(changed(LOG, swap))
    assert (fault["code"], fault["field"]) == ("LOG_SWAPPED", f"entries.{first}")
    assert f"Entry {first} and entry {second} were swapped" in fault["message"]


def test_a_moved_entry_is_a_new_order() -> None:
    fault = only_fault(changed(LOG, lambda rows: rows.insert(10, rows.pop(5))))
    assert (fault["code"], fault["field"]) == ("LOG_REORDERED", "entries.5")


def test_an_entry_of_another_log_in_the_place_of_one() -> None:
    other = make_evidence(rounds=1)

    def change(rows: list[bytes]) -> None:
        rows[1] = other.files[LOG].splitlines(keepends=True)[2]

    assert only_fault(changed(LOG, change))["field"] == "entries.1"


@pytest.mark.parametrize(
    ("change", "code", "field"),
    [
        (lambda rows: rows.__setitem__(6, b"0" * 64 + b"\n"), "LEAVES_CHANGED", "line 7"),
        (lambda rows: rows.pop(6), "LEAVES_DELETED", "line 7"),
        (lambda rows: rows.insert(6, b"0" * 64 + b"\n"), "LEAVES_INSERTED", "line 7"),
        (lambda rows: rows.insert(3, rows.pop(2)), "LEAVES_SWAPPED", "line 3"),
    ],
)
def test_a_changed_leaf_hash_is_told_from_a_changed_entry(change, code, field) -> None:
    fault = only_fault(changed(LEAVES, change))
    assert (fault["code"], fault["file"], fault["field"]) == (code, LEAVES, field)


@pytest.mark.parametrize("text", [b"A" * 64, b"0" * 63, b"0" * 66, b"x" * 64, b"0" * 64 + b" "])
def test_a_leaf_line_that_is_no_hash(text) -> None:
    result = changed(LEAVES, lambda rows: rows.__setitem__(2, text + b"\n"))
    assert result.exit_code == 1
    assert result.faults[0]["code"] == "EVIDENCE_LINE"
    assert {f["field"] for f in result.faults} == {"line 3"}


def _both(change: Callable[[list[Entry]], Any]) -> Report:
    """Entries and leaf hashes changed together; the checkpoints stay."""
    made = make_evidence()
    change(made.entries)
    return report(made)


def test_a_change_of_entry_and_leaf_is_located_between_checkpoints() -> None:
    other = Entry.of(ReplyMissed(round=1, participant=MADE.ids[0], code="DEADLINE"))
    fault = only_fault(_both(lambda entries: entries.__setitem__(3, other)))
    # Checkpoints cover 1, 2, 7, ... entries.
    assert (fault["code"], fault["field"]) == ("LOG_ROOT", "entries.2")
    assert "2 to 6" in fault["message"]


def test_entries_and_leaves_deleted_or_appended_together() -> None:
    other = Entry.of(ReplyMissed(round=1, participant=MADE.ids[0], code="DEADLINE"))
    fault = only_fault(_both(lambda entries: entries.pop()))
    assert (fault["code"], fault["field"]) == ("LOG_DELETED", "entries.19")
    fault = only_fault(_both(lambda entries: entries.append(other)))
    assert (fault["code"], fault["field"]) == ("LOG_INSERTED", "entries.20")


def test_entry_0_of_another_contract_with_its_leaf() -> None:
    other = make_evidence(title="Another")
    result = _both(lambda entries: entries.__setitem__(0, other.entries[0]))
    assert result.exit_code == 1
    assert "CHECKPOINT_ORIGIN" in {f["code"] for f in result.faults}


def test_entry_and_leaf_disagree_and_no_root_tells() -> None:
    files = {**MADE.files, CHECKPOINTS: b""}
    rows = lines(LOG)
    rows[4] = rows[4].replace(b"update", b"upfate")
    result = of_files({**files, LOG: b"".join(rows)})
    assert [f["field"] for f in result.faults if f["code"] == "LOG_CHANGED"] == ["entries.4"]
    assert "no signed root tells" in result.faults[0]["message"]


def test_an_empty_log_and_a_log_that_nobody_signed() -> None:
    empty = of_files(dict.fromkeys(FILES, b""))
    assert empty.exit_code == 1
    assert "LOG_EMPTY" in {f["code"] for f in empty.faults}
    files = {**MADE.files, CHECKPOINTS: b"", COUNTERSIGNATURES: b""}
    assert "LOG_UNSIGNED" in {f["code"] for f in of_files(files).faults}


def test_a_checkpoint_of_another_log() -> None:
    other = make_evidence(title="Another").checkpoints[3]
    made = make_evidence()
    made.checkpoints[3] = other
    fault = only_fault(report(made))
    assert (fault["code"], fault["file"], fault["field"]) == ("CHECKPOINT_ORIGIN", CHECKPOINTS, "line 4")


def test_a_checkpoint_signed_by_another_key() -> None:
    result = told(at("checkpoint:7", lambda record: sign(record, key("stranger"))))
    fault = only_fault(result)
    assert (fault["code"], fault["file"], fault["field"]) == ("SIGNATURE_MISSING", CHECKPOINTS, "line 3")
    assert fault["party"] == "City Data"


def test_a_checkpoint_with_a_further_signature() -> None:
    result = told(at("checkpoint:7", lambda r: sign(r, key("operator run"), key("stranger"))))
    assert only_fault(result)["code"] == "SIGNATURE_EXTRA"


def test_a_record_of_another_type_in_the_place_of_a_checkpoint() -> None:
    def other(record: Checkpoint) -> Envelope[Any]:
        values = {"origin": record.origin, "size": record.size, "root": record.root}
        return sign(Countersignature(**values, participant="0" * 64), key("operator run"))

    made = make_evidence(tamper=at("checkpoint:7", other), end="opened", rounds=1)
    made.checkpoints += [other(Checkpoint(origin=made.contract.id, size=9, root="0" * 64))]
    with pytest.raises(InputError):
        made.files  # noqa: B018 - `pack` refuses it; so write the line by hand
    line = made.checkpoints.pop().to_bytes() + b"\n"
    files = made.files
    result = of_files({**files, CHECKPOINTS: files[CHECKPOINTS] + line})
    assert only_fault(result)["field"] == "line 3"


def test_two_logs_of_one_size_signed_by_the_operator() -> None:
    made = make_evidence()
    fork = Checkpoint(origin=made.contract.id, size=8, root="5" * 64)
    made.checkpoints[3] = sign(fork, key("operator run"))
    result = report(made)
    assert "CHECKPOINT_ROOT" in {f["code"] for f in result.faults}
    assert next(f for f in result.faults if f["code"] == "CHECKPOINT_ROOT")["field"] == "line 4"


@pytest.mark.parametrize("name", [CHECKPOINTS, COUNTERSIGNATURES])
def test_lines_stand_in_their_one_order(name) -> None:
    result = changed(name, lambda rows: rows.reverse())
    assert {f["code"] for f in result.faults} == {"EVIDENCE_ORDER"}
    assert "EVIDENCE_ORDER" in {f["code"] for f in changed(name, lambda rows: rows.insert(1, rows[0])).faults}


def test_a_removed_last_checkpoint_leaves_entries_uncovered() -> None:
    result = changed(CHECKPOINTS, lambda rows: rows.pop())
    assert "LOG_INSERTED" in {f["code"] for f in result.faults}


def test_a_removed_checkpoint_that_updates_name() -> None:
    result = changed(CHECKPOINTS, lambda rows: rows.pop(1))
    assert {f["code"] for f in result.faults} == {"HEAD_CHECKPOINT", "COUNTERSIGNATURE_HEAD"}


def _countersigned(**changes: Any) -> Callable[[str, Any], Any]:
    return put("countersignature:20:0", **changes)


@pytest.mark.parametrize(
    ("tamper", "code"),
    [
        (at("countersignature:20:0", lambda r: sign(r, key("stranger"))), "SIGNATURE_MISSING"),
        (at("countersignature:20:0", lambda r: sign(r, key("participant 1"))), "SIGNATURE_MISSING"),  # contract key
        (_countersigned(root="7" * 64), "COUNTERSIGNATURE_ROOT"),
        (_countersigned(size=19), "COUNTERSIGNATURE_HEAD"),
        (_countersigned(origin="7" * 64), "COUNTERSIGNATURE_ORIGIN"),
        (_countersigned(participant="7" * 64), "COUNTERSIGNATURE_STRANGER"),
    ],
)
def test_a_countersignature_that_does_not_hold(tamper, code) -> None:
    result = told(tamper)
    assert code in {f["code"] for f in result.faults}
    fault = next(f for f in result.faults if f["code"] == code)
    assert fault["file"] == COUNTERSIGNATURES
    assert fault["field"].startswith("line ")
    assert fault["party"]


@pytest.mark.parametrize("name", FILES)
def test_a_fault_of_the_folder_is_a_report_too(tmp_path, name) -> None:
    folder = MADE.write(tmp_path / "e")
    (folder / name).unlink()
    result = verify_folder(folder, None)
    assert only_fault(result)["code"] == "EVIDENCE_FILE_MISSING"
    assert (result.status, result.contract_id, result.participants) == ("unreadable", None, ())
    assert UTILITIES in result.notes


# Evidence whose makers lied, and signed everything around the lie


@pytest.mark.parametrize("outcome", ["admitted", "refused"])
def test_a_reply_whose_countersignature_is_missing(outcome) -> None:
    """The head shown is countersigned in the reply: an operator that drops it hides whom it showed what."""
    made = make_evidence(outcomes={(1, 0): outcome})
    first = made.files[COUNTERSIGNATURES].splitlines(keepends=True)
    assert report(made).faults == ()
    for number in range(len(first)):
        files = {**made.files, COUNTERSIGNATURES: b"".join(first[:number] + first[number + 1 :])}
        result = of_files(files)
        record = Countersignature.from_bytes(read_envelope(first[number].rstrip(b"\n")).body)
        if record.size == len(made.entries):
            assert result.faults == (), "one on the closing checkpoint is held, not a fault"
            continue
        fault = only_fault(result)
        assert (fault["code"], fault["party"]) == (
            "COUNTERSIGNATURE_MISSING",
            made.contract.operator.name,
        )


def test_each_checkpoint_after_a_binding_entry_must_be_there() -> None:
    made = make_evidence()
    kept = made.files[CHECKPOINTS].splitlines(keepends=True)
    binding = {"contract-signed", "round-opened", "scores-committed", "run-completed", "period-closing"}
    due = {i + 1 for i, entry in enumerate(made.entries) if entry.type in binding}
    for number in range(len(kept) - 1):
        size = Checkpoint.from_bytes(read_envelope(kept[number].rstrip(b"\n")).body).size
        result = of_files({**made.files, CHECKPOINTS: b"".join(kept[:number] + kept[number + 1 :])})
        assert bool(result.faults) == (size in due), size
        assert {f["code"] for f in result.faults} <= {"CHECKPOINT_MISSING", "HEAD_CHECKPOINT", "COUNTERSIGNATURE_HEAD"}


@pytest.mark.parametrize(
    "code",
    ["UPDATE_METERING", "UPDATE_PRIVACY_EVENT", "UPDATE_HEAD", "UPDATE_ATTEMPT", "UPDATE_LEDGER_HEAD", "BECAUSE"],
)
def test_a_rejection_whose_reason_is_not_so_is_the_operators_fault(code) -> None:
    """UPDATE_NORM and the like speak of the array, which only its author has."""
    assert report(make_evidence(outcomes={(2, 0): "rejected"})).faults == ()
    result = told(put("receipt:2:0", code=code), outcomes={(2, 0): "rejected"})
    fault = only_fault(result)
    assert (fault["code"], fault["party"], fault["rule"]) == ("REJECTION_UNFOUNDED", MADE.contract.operator.name, code)


def test_a_rejection_whose_reason_is_so() -> None:
    def wrong(name: str, thing: Any) -> Any:
        if name == "update:2:0":
            return thing.model_copy(update={"num_examples": 1})
        return thing.model_copy(update={"code": "UPDATE_METERING"}) if name == "receipt:2:0" else thing

    assert told(wrong, outcomes={(2, 0): "rejected"}).faults == ()


def test_a_line_that_is_signed_and_not_canonical() -> None:
    made = make_evidence(end="opened", rounds=1)
    data = made.entries[1].to_bytes().replace(b'","', b'", "', 1)
    hashes = [made.entries[0].leaf_hash, merkle.leaf_hash(data)]
    forged = Checkpoint(origin=made.contract.id, size=2, root=merkle.root(hashes).hex())
    made.checkpoints[1], made.countersignatures[:] = sign(forged, key("operator run")), []
    files = made.files
    files[LOG] = made.entries[0].to_bytes() + b"\n" + data + b"\n"
    files[LEAVES] = b"".join(h.hex().encode() + b"\n" for h in hashes)
    fault = only_fault(of_files(files))
    assert (fault["code"], fault["field"]) == ("ENTRY_FORM", "entries.1")


def _lines_of(body: Any, *fen: int) -> Any:
    new = [SettledLine(participant=line.participant, fen=f) for line, f in zip(body.lines, fen, strict=True)]
    return body.model_copy(update={"lines": tuple(new)})


@pytest.mark.parametrize("shift", [1, -1])
def test_one_fen_more_or_less_is_found(shift) -> None:
    def change(body: Any) -> Any:
        a, b, c = (line.fen for line in body.lines)
        return _lines_of(body, a + shift, b, c)

    fault = only_fault(told(at("period-settled", change)))
    assert (fault["code"], fault["field"]) == ("SETTLEMENT_FEN", "entries.18.lines.0.fen")
    assert fault["party"] == MADE.contract.participant(MADE.ids[0]).name


def test_shares_exchanged_between_two_participants() -> None:
    def change(body: Any) -> Any:
        a, b, c = (line.fen for line in body.lines)
        return _lines_of(body, b, a, c)

    result = told(at("period-settled", change))
    assert [f["field"] for f in result.faults] == ["entries.18.lines.0.fen", "entries.18.lines.1.fen"]


@pytest.mark.parametrize(
    ("tamper", "code", "field"),
    [
        (put("period-settled", pool_fen=9_000_018), "SETTLEMENT_POOL", "pool_fen"),
        (put("period-settled", basis="fallback"), "SETTLEMENT_BASIS", "basis"),
        (at("period-settled", lambda b: b.model_copy(update={"lines": b.lines[::-1]})), "SETTLEMENT_LINES", "lines"),
        (at("period-settled", lambda b: b.model_copy(update={"lines": b.lines[:2]})), "SETTLEMENT_LINES", "lines"),
        (put("period-settled", period=2), "REVENUE_MISSING", "period"),
        (put("revenue-recorded", period=2), "PERIOD_ORDER", "period"),
        (put("revenue-recorded", fees_fen=2**40), "SETTLEMENT_FEES", "fees_fen"),
        (put("revenue-recorded", revenue_fen=10_000_020), "SETTLEMENT_POOL", "pool_fen"),
        (at("revenue-recorded", lambda _b: None), "REVENUE_MISSING", "period"),
        (at("revenue-recorded", lambda b: [b, b]), "PERIOD_NOT_CLOSED", "period"),
        (at("period-settled", lambda b: [b, b]), "PERIOD_SETTLED_TWICE", "period"),
        (at("period-settled", lambda _b: None), "CLOSING_EARLY", "period"),
        (at("period-closing", lambda b: [b, b]), "ENTRY_AFTER_CLOSING", ""),
        (put("period-closing", period=2), "CLOSING_EARLY", "period"),
        (at("moments-opened", lambda _b: None), "MOMENTS_NOT_OPENED", ""),
        (at("moments-opened", lambda b: [b, b]), "MOMENTS_OPENED_TWICE", ""),
        (at("scores-opened:1", lambda _b: None), "SCORES_NOT_OPENED", ""),
        (at("scores-opened:1", lambda b: [b, b]), "SCORES_OPENED_TWICE", "round"),
        (put("scores-opened:1", salt="0" * 64), "SCORES_COMMITMENT", "scores"),
        (put("scores-opened:1", round=2), "SCORES_ROUND", "scores.round"),
        (put("scores-opened:2", round=7), "SCORES_ROUND", "round"),
        (put("moments-opened", salt="0" * 64), "MOMENTS_COMMITMENT", "moments"),
        (put("run-completed", rounds=3), "RUN_ROUNDS", "rounds"),
        (put("run-completed", model_digest="0" * 64), "MODEL_DELIVERED", "model_digest"),
        (at("run-completed", lambda b: [b, b]), "RUN_COMPLETED_TWICE", ""),
        (at("run-completed", lambda _b: None), "OPENED_EARLY", ""),
        (at("run-completed", lambda _b: None), "REVENUE_EARLY", ""),
        (put("run-completed", commitment=None), "SCORES_NOT_COMMITTED", "commitment"),
        (at("scores-committed:1", lambda _b: None), "SCORES_NOT_COMMITTED", "round"),
        (at("scores-committed:2", lambda _b: None), "SCORES_NOT_COMMITTED", "rounds"),
        (at("scores-committed:1", lambda b: [b, b]), "SCORES_COMMITTED_TWICE", "round"),
        (put("scores-committed:1", round=2), "SCORES_ROUND", "round"),
        (put("round-opened:1", base_digest="0" * 64), "BASE_MODEL", "base_digest"),
        (put("round-opened:2", base_digest="0" * 64), "BASE_MODEL", "base_digest"),
        (put("round-opened:2", round=3), "ROUND_ORDER", "round"),
        (put("round-opened:2", round=1), "ROUND_ORDER", "round"),
        (at("round-opened:2", lambda b: [b, b]), "ROUND_NOT_CLOSED", "round"),
        (at("round-opened:1", lambda b: b.model_copy(update={"invited": b.invited[::-1]})), "INVITED_ORDER", "invited"),
        (
            at("round-opened:1", lambda b: b.model_copy(update={"invited": (*b.invited, "f" * 64)})),
            "PARTICIPANT_UNKNOWN",
            "invited",
        ),
        (
            at("round-opened:1", lambda b: b.model_copy(update={"invited": b.invited[:2]})),
            "PARTICIPANT_NOT_INVITED",
            "participant",
        ),
        (put("round-aggregated:1", round=2), "ROUND_NOT_OPEN", "round"),
        (at("round-aggregated:1", lambda b: b.model_copy(update={"admitted": b.admitted[:2]})), "ADMITTED", "admitted"),
        (
            at("round-aggregated:1", lambda b: b.model_copy(update={"admitted": b.admitted[::-1]})),
            "ADMITTED",
            "admitted",
        ),
        (put("update-decided:1:0", round=2), "ROUND_NOT_OPEN", "round"),
        (put("update-decided:1:0", participant="f" * 64), "PARTICIPANT_UNKNOWN", "participant"),
        (at("update-decided:1:0", lambda b: [b, b]), "OUTCOME_TWICE", "participant"),
        (at("update-decided:1:0", lambda _b: None), "OUTCOME_MISSING", "admitted"),
        (put("update-decided:1:0", receipt={}), "ENVELOPE_FORM_MISSING_KEY", "receipt.type"),
        (put("update-decided:1:0", update={"type": 1}), "ENVELOPE_FORM", "update.type"),
        (at("round-opened:1", lambda b: [b, MADE.entries[0].open()]), "CONTRACT_TWICE", ""),
    ],
)
def test_an_entry_that_breaks_a_rule(tamper, code, field) -> None:
    result = told(tamper)
    assert result.exit_code == 1
    found = [f for f in result.faults if f["code"] == code]
    assert found, result.faults
    assert found[0]["file"] == LOG
    assert found[0]["field"].startswith("entries.")
    assert found[0]["field"].endswith(f".{field}" if field else found[0]["field"].split(".")[1])
    assert f"Entry {found[0]['field'].split('.')[1]} (" in found[0]["message"]


class UnknownEntry(Body):
    TYPE = "bonus-paid"


class HalfAnEntry(Body):
    TYPE = "reply-missed"
    round: int = 1


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [(UnknownEntry(), "ENTRY_TYPE", "entries.2.type"), (HalfAnEntry(), "ENTRY_BODY", "entries.2.participant")],
)
def test_an_entry_of_no_known_form(body, code, field) -> None:
    fault = only_fault(told(at("round-opened:1", lambda b: [b, body]), end="opened", rounds=1))
    assert (fault["code"], fault["field"]) == (code, field)


@pytest.mark.parametrize("text", [b" ", b"{}", b"[]", b"nonsense", b'{"payload":"","signatures":[],"type":"x"}'])
@pytest.mark.parametrize("name", [CHECKPOINTS, COUNTERSIGNATURES])
def test_a_line_that_is_no_record(name, text) -> None:
    result = changed(name, lambda rows: rows.__setitem__(1, text + b"\n"))
    assert {(f["file"], f["field"]) for f in result.faults} == {(name, "line 2")}


UPDATE_LIES = [
    ("base_digest", "0" * 64),
    ("contract_id", "0" * 64),
    ("round", 2),
    ("participant", "0" * 64),
    ("num_examples", 401),
    ("noise", "test"),
]


@pytest.mark.parametrize(("field", "value"), UPDATE_LIES)
def test_an_admitted_update_that_is_not_the_contracted_one(field, value) -> None:
    result = told(put("update:1:0", **{field: value}))
    found = [f for f in result.faults if f["code"] == "UPDATE_MISMATCH"]
    assert [f["field"] for f in found] == [f"entries.2.update.{field}"]
    assert found[0]["party"] == MADE.contract.participant(MADE.ids[0]).name


@pytest.mark.parametrize(("field", "value"), [f for f in UPDATE_LIES if f[0] != "participant"])
def test_the_same_update_may_be_rejected(field, value) -> None:
    result = told(put("update:1:0", **{field: value}), outcomes={(1, 0): "rejected"})
    assert result.faults == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("noise_multiplier", Decimal("0.5")),
        ("steps", 4),
        ("sample_rate", Decimal("0.2")),
        ("max_grad_norm", Decimal(2)),
    ],
)
def test_an_admitted_update_with_another_privacy_event(field, value) -> None:
    def change(update: Any) -> Any:
        return update.model_copy(update={"privacy_event": update.privacy_event.model_copy(update={field: value})})

    fault = only_fault(told(at("update:1:0", change)))
    assert (fault["code"], fault["field"]) == ("UPDATE_MISMATCH", "entries.2.update.privacy_event")


def test_an_update_that_meters_other_rows() -> None:
    def change(update: Any) -> Any:
        return update.model_copy(update={"metering": update.metering.model_copy(update={"rows": 1})})

    assert only_fault(told(at("update:1:0", change)))["field"] == "entries.2.update.metering"


def test_attempts_beyond_the_plan_count_over_the_whole_run() -> None:
    assert told(put("update:1:0", attempt=2)).faults == ()

    def twice(name: str, thing: Any) -> Any:
        return thing.model_copy(update={"attempt": 2}) if name in ("update:1:0", "update:2:0") else thing

    fault = only_fault(told(twice))
    assert (fault["code"], fault["field"]) == ("UPDATE_ATTEMPT", "entries.8.update.attempt")
    assert only_fault(told(put("update:1:0", attempt=3)))["code"] == "UPDATE_ATTEMPT"


def test_the_same_update_admitted_twice() -> None:
    fault = only_fault(told(put("update:2:0", update_digest=digest("update", 1, MADE.ids[0]))))
    assert (fault["code"], fault["field"]) == ("UPDATE_REPLAYED", "entries.8.update.update_digest")


OLD_HEADS = [GENESIS, digest("ledger", 1, MADE.ids[0])]


@pytest.mark.parametrize("head", OLD_HEADS)
def test_an_update_whose_charge_moved_no_ledger_head(head) -> None:
    fault = only_fault(told(put("update:2:0", ledger_head=head)))
    assert (fault["code"], fault["field"]) == ("UPDATE_LEDGER_HEAD", "entries.8.update.ledger_head")
    assert fault["party"] == MADE.contract.participant(MADE.ids[0]).name


@pytest.mark.parametrize("head", OLD_HEADS)
def test_a_refusal_with_attempts_that_moved_no_ledger_head(head) -> None:
    fault = only_fault(told(put("refusal:2:0", ledger_head=head, attempts=1), outcomes={(2, 0): "refused"}))
    assert (fault["code"], fault["field"]) == ("REFUSAL_LEDGER_HEAD", "entries.8.refusal.ledger_head")
    assert told(put("refusal:2:0", ledger_head=head), outcomes={(2, 0): "refused"}).faults == ()


def test_a_rejection_for_an_old_ledger_head_that_is_so() -> None:
    def wrong(name: str, thing: Any) -> Any:
        if name == "update:2:0":
            return thing.model_copy(update={"ledger_head": OLD_HEADS[1]})
        return thing.model_copy(update={"code": "UPDATE_LEDGER_HEAD"}) if name == "receipt:2:0" else thing

    assert told(wrong, outcomes={(2, 0): "rejected"}).faults == ()


def test_a_rejection_for_the_noise_floor_is_taken_on_the_operators_word() -> None:
    """The log does not hold the array; its author can compute it from its own, the operator keeps it as evidence."""
    tamper = put("receipt:2:0", code="UPDATE_NOISE_FLOOR")
    assert told(tamper, outcomes={(2, 0): "rejected"}).faults == ()


@pytest.mark.parametrize("signer", ["stranger", "participant 1", "participant 0 run", "operator run"])
def test_an_update_signed_by_another_key(signer) -> None:
    name = MADE.names[MADE.ids[0]]
    assert name == "participant 1"
    fault = only_fault(told(at("update:1:0", lambda record: sign(record, key(signer)))))
    assert (fault["code"], fault["field"]) == ("SIGNATURE_MISSING", "entries.2.update")
    assert fault["party"] == MADE.contract.participant(MADE.ids[0]).name


def test_an_update_whose_signature_is_of_another_record() -> None:
    def change(record: Any) -> Envelope[Any]:
        good = sign(record, key("participant 1 run"))
        other = sign(record.model_copy(update={"attempt": 2}), key("participant 1 run"))
        return good.model_copy(update={"signatures": other.signatures})

    fault = only_fault(told(at("update:1:0", change)))
    assert (fault["code"], fault["field"]) == ("SIGNATURE_INVALID", "entries.2.update.signatures")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"update_digest": "0" * 64}, "update_digest"),
        ({"attempt": 2}, "attempt"),
        ({"round": 2}, "round"),
        ({"participant": "0" * 64}, "participant"),
        ({"contract_id": "0" * 64}, "contract_id"),
    ],
)
def test_a_receipt_for_another_update(change, field) -> None:
    fault = only_fault(told(put("receipt:1:0", **change)))
    assert (fault["code"], fault["field"]) == ("RECEIPT_MISMATCH", f"entries.2.receipt.{field}")
    assert fault["party"] == "City Data"


def test_a_receipt_that_the_operator_did_not_sign() -> None:
    result = told(at("receipt:1:0", lambda record: sign(record, key("participant 1 run"))))
    fault = next(f for f in result.faults if f["code"] == "SIGNATURE_MISSING")
    assert (fault["field"], fault["party"]) == ("entries.2.receipt", "City Data")


def test_an_update_admitted_against_its_receipt() -> None:
    result = told(put("receipt:1:0", decision="rejected", code="UPDATE_NORM"))
    assert {f["code"] for f in result.faults} >= {"ADMITTED"}


@pytest.mark.parametrize(
    ("size", "root", "code"),
    [(2, "6" * 64, "HEAD_ROOT"), (500, "6" * 64, "HEAD_ROOT"), (1, "", "HEAD_TIME"), (3, "", "HEAD_CHECKPOINT")],
)
def test_an_update_that_names_another_head(size, root, code) -> None:
    def change(update: Any) -> Any:
        right = merkle.root([e.leaf_hash for e in MADE.entries[:size]]).hex()
        return update.model_copy(update={"head": update.head.model_copy(update={"size": size, "root": root or right})})

    # The second update of the round: three entries stand before it, so that a head of 3 exists.
    result = told(at("update:1:1", change))
    assert code in {f["code"] for f in result.faults}


@pytest.mark.parametrize(
    ("tamper", "code", "field"),
    [
        (at("refusal:1:0", lambda r: sign(r, key("stranger"))), "SIGNATURE_MISSING", "refusal"),
        (put("refusal:1:0", round=2), "REFUSAL_MISMATCH", "refusal.round"),
        (put("refusal:1:0", contract_id="0" * 64), "REFUSAL_MISMATCH", "refusal.contract_id"),
        (put("refusal:1:0", participant="0" * 64), "REFUSAL_MISMATCH", "refusal.participant"),
        (
            at("refusal:1:0", lambda r: r.model_copy(update={"head": r.head.model_copy(update={"root": "0" * 64})})),
            "HEAD_ROOT",
            "refusal.head",
        ),
        (
            put("refusal:1:0", attempts=MADE.contract.privacy.spare_attempts + 2),
            "REFUSAL_ATTEMPTS",
            "refusal.attempts",
        ),
        (put("update-refused:1:0", refusal={}), "ENVELOPE_FORM_MISSING_KEY", "refusal.type"),
    ],
)
def test_a_refusal_that_does_not_hold(tamper, code, field) -> None:
    fault = only_fault(told(tamper, outcomes={(1, 0): "refused"}))
    assert (fault["code"], fault["field"]) == (code, f"entries.2.{field}")


def test_a_refusal_after_every_attempt_of_the_plan_holds() -> None:
    spares = MADE.contract.privacy.spare_attempts
    made = put("refusal:1:0", attempts=spares + 1)
    assert told(made, outcomes={(1, 0): "refused"}).faults == ()


def test_two_outcomes_of_different_kinds() -> None:
    missed = ReplyMissed(round=1, participant=MADE.ids[0], code="DEADLINE")
    fault = only_fault(told(at("update-decided:1:0", lambda b: [b, missed])))
    assert (fault["code"], fault["field"]) == ("OUTCOME_TWICE", "entries.3.participant")


def test_fewer_updates_than_the_minimum() -> None:
    outcomes = {(1, 0): "missed", (1, 1): "missed"}
    result = report(make_evidence(outcomes=outcomes, end="round"))
    assert only_fault(result)["code"] == "ADMITTED_TOO_FEW"


GROUP = [{"name": "Holding", "members": [f"{i:018d}" for i in (1, 2)]}]


def test_a_group_counts_once_and_is_paid_once() -> None:
    """Everything is recomputed, and whoever leaves the clause out of account is found."""
    changes = {
        "settlement__contribution_weight": "0",
        "settlement__data_weight": "0",
        "settlement__equal_weight": "1",
    }
    made = make_evidence(common_control=GROUP, **changes)
    good = report(made, Trust.of(made.contract))
    assert good.exit_code == 0, good.faults
    assert sorted(p.share for p in good.participants) == ["0.25", "0.25", "0.5"]

    def apart(stage: str, thing: Any) -> Any:
        if stage != "period-settled":
            return thing
        alone = [SettledLine(participant=p, fen=thing.pool_fen // 3) for p in made.ids]
        return thing.model_copy(update={"lines": tuple(alone)})

    found = report(make_evidence(common_control=GROUP, tamper=apart, **changes))
    assert {fault["code"] for fault in found.faults} == {"SETTLEMENT_FEN"}

    places = [made.ids.index(p.id) for p in made.contract.participants]
    two = {(1, places[2]): "refused"}
    few = report(make_evidence(common_control=GROUP, outcomes=two, end="round"))
    assert [fault["code"] for fault in few.faults] == ["ADMITTED_TOO_FEW"], "two updates, of one party"


def test_a_round_abandoned_without_need_and_a_round_after_the_end() -> None:
    def stop(name: str, thing: Any) -> Any:
        if name == "round-aggregated:1":
            return RoundAbandoned(round=1, admitted=thing.admitted, code="ROUND_TOO_FEW_UPDATES")
        return thing

    codes = {f["code"] for f in told(stop, end="opened").faults}
    assert {"ABANDONED_WITHOUT_NEED", "ROUND_AFTER_END"} <= codes


def test_who_was_silent_too_often_is_not_invited() -> None:
    outcomes = {(1, 0): "missed", (2, 0): "refused", (3, 0): "missed"}
    made = make_evidence(rounds=3, outcomes=outcomes, end="round", privacy__noise_multiplier="1.5")
    fault = only_fault(report(made))
    assert (fault["code"], fault["party"]) == ("INVITED_SILENT", made.contract.participant(made.ids[0]).name)
    outcomes[3, 0] = "absent"
    assert report(make_evidence(rounds=3, outcomes=outcomes, end="round", privacy__noise_multiplier="1.5")).faults == ()


def test_more_rounds_than_contracted() -> None:
    result = report(make_evidence(end="round", training__rounds=1))
    assert {"ROUND_BEYOND_CONTRACT"} == {f["code"] for f in result.faults}


def test_scores_that_differ_from_their_commitment() -> None:
    def better(body: Any) -> Any:
        losses = list(body.scores.losses)
        losses[1] = (losses[1][0] - 10**9,)
        return body.model_copy(update={"scores": body.scores.model_copy(update={"losses": tuple(losses)})})

    result = told(at("scores-opened:1", better))
    fault = next(f for f in result.faults if f["code"] == "SCORES_COMMITMENT")
    assert (fault["field"], fault["party"]) == ("entries.14.scores", "City Data")


def test_moments_that_differ_from_their_commitment() -> None:
    zero = Moments(products=((0,) * 3,) * 3)
    result = told(put("moments-opened", moments=zero))
    assert "MOMENTS_COMMITMENT" in {f["code"] for f in result.faults}


def _scores(**changes: Any) -> Callable[[str, Any], Any]:
    return put("scores:2", **changes)


@pytest.mark.parametrize(
    ("tamper", "code"),
    [
        (_scores(players=tuple(MADE.ids[:2])), "SCORES_PLAYERS"),
        (_scores(players=("0" * 64, *MADE.ids[1:])), "SCORES_PLAYERS"),
        (_scores(losses=((10**10,),) * 8), "SCORES_CHAIN"),
        (_scores(correct=(1, 2)), "SCORES_CHAIN"),
        (_scores(round=1), "SCORES_ROUND"),
        (_scores(losses=()), "SCORES_SHAPE"),
        (_scores(losses=((1, 2),) * 8), "SCORES_CHAIN"),
    ],
)
def test_scores_that_are_committed_to_and_wrong(tamper, code) -> None:
    # The settlement of such scores may be impossible in the factory as well: then the run ends before it.
    try:
        made = make_evidence(tamper=tamper)
    except FaultError:
        made = _until_opened(tamper)
    assert code in {f["code"] for f in report(made).faults}


def _until_opened(tamper: Callable[[str, Any], Any]) -> Made:
    factory = _opened_factory(tamper)
    factory.append("revenue-recorded", RevenueRecorded(period=1, revenue_fen=1, fees_fen=0))
    factory.append("period-settled", PeriodSettled(period=1, pool_fen=1, basis="contribution", lines=()))
    factory.checkpoint()
    return factory.made


def test_no_checkpoint_right_after_the_closing() -> None:
    made = make_evidence(end="closing")
    made.checkpoints.pop()
    body = Entry.of(ReplyMissed(round=2, participant=made.ids[0], code="LATE"))
    made.entries.append(body)
    hashes = [e.leaf_hash for e in made.entries]
    record = Checkpoint(origin=made.contract.id, size=len(hashes), root=merkle.root(hashes).hex())
    made.checkpoints.append(sign(record, key("operator run")))
    assert {"CLOSING_CHECKPOINT", "ENTRY_AFTER_CLOSING"} <= {f["code"] for f in report(made).faults}


# Entry 0


def _signed(change: Callable[[SignedContract], SignedContract]) -> Callable[[str, Any], Any]:
    return at("contract-signed", lambda body: body.model_copy(update={"signed": change(body.signed)}))


def _without_signature(signed: SignedContract, place: int) -> SignedContract:
    signatures = signed.contract.signatures
    kept = signed.contract.model_copy(update={"signatures": signatures[:place] + signatures[place + 1 :]})
    return signed.model_copy(update={"contract": kept})


def _delegated(signed: SignedContract, delegations: Any) -> SignedContract:
    return signed.model_copy(update={"delegations": delegations})


@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_contract_that_somebody_did_not_sign(place) -> None:
    result = told(_signed(lambda s: _without_signature(s, place)))
    fault = only_fault(result)
    assert (fault["code"], fault["field"]) == ("CONTRACT_UNSIGNED", "entries.0.signed.contract.signatures")
    parties = [MADE.contract.operator, *MADE.contract.by_id().values()]
    assert fault["party"] == parties[place].name


@pytest.mark.parametrize(
    ("tamper", "code"),
    [
        (
            at("contract", lambda c: sign(c, *(key(n) for n in ("operator", *MADE.names.values())))),
            "CONTRACT_SIGNED_BY_STRANGER",
        ),
        (
            _signed(lambda s: s.model_copy(update={"contract": s.contract.model_copy(update={"type": "x"})})),
            "ENVELOPE_TYPE",
        ),
        (_signed(lambda s: s.model_copy(update={"delegations": s.delegations[:2]})), "DELEGATION_MISSING"),
        (
            _signed(lambda s: s.model_copy(update={"delegations": s.delegations + s.delegations[:1]})),
            "DELEGATION_TWICE",
        ),
        (put("delegation:0", contract_id="0" * 64), "DELEGATION_CONTRACT"),
        (put("delegation:0", party="0" * 64), "DELEGATION_STRANGER"),
        (put("delegation:0", run_key=public_hex(key("operator run"))), "DELEGATION_KEY"),
        (put("delegation:0", run_key=public_hex(key("participant 1"))), "DELEGATION_KEY"),
        (at("delegation:0", lambda r: sign(r, key("operator"))), "SIGNATURE_MISSING"),
        (at("contract-signed", lambda _b: ReplyMissed(round=1, participant="0" * 64, code="X")), "LOG_NO_CONTRACT"),
    ],
)
def test_entry_0_that_does_not_hold(tamper, code) -> None:
    result = told(tamper)
    assert result.exit_code == 1
    fault = next((f for f in result.faults if f["code"] == code), None)
    assert fault is not None, result.faults
    assert fault["field"].startswith("entries.0.")


def test_a_contract_that_breaks_its_own_rules() -> None:
    bad = MADE.contract.model_copy(
        update={"settlement": MADE.contract.settlement.model_copy(update={"equal_weight": Decimal("0.5")})}
    )
    parties = ("operator", *(MADE.names[p] for p in MADE.ids))
    result = told(at("contract", lambda _c: sign(bad, *(key(name) for name in parties))))
    fault = only_fault(result)
    assert (fault["code"], fault["field"]) == ("CONTRACT_WEIGHTS", "entries.0.signed.contract.settlement")
    assert result.contract_id is None


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"privacy__noise_multiplier": "0.9", "privacy__epsilon": "1"}, "CONTRACT_NOISE_TOO_SMALL"),
        ({"privacy__accountant": "moments by hand"}, "CONTRACT_ACCOUNTANT"),
    ],
)
def test_a_plan_that_does_not_keep_its_epsilon(changes, code) -> None:
    made = make_evidence(**changes)
    assert report(made, privacy=False).faults == ()
    fault = only_fault(report(made, privacy=True))
    assert fault["code"] == code
    assert fault["field"].startswith("entries.0.signed.contract.privacy.")


# Pieces that an agent uses at closing time


def test_replay_reads_entries_alone() -> None:
    run = replay(MADE.entries, privacy=False)
    assert (run.faults, run.closed, sorted(run.scores)) == ([], True, [1, 2])
    assert run.ledger_heads[MADE.ids[0]] == [GENESIS, *(digest("ledger", r, MADE.ids[0]) for r in (1, 2))]
    assert run.model_digest == digest("model", 2)
    assert run.periods[0].result is not None


@pytest.mark.parametrize("entries", [[], MADE.entries[1:]])
def test_replay_needs_a_contract_first(entries) -> None:
    with pytest.raises(FaultError):
        replay(entries, privacy=False)


def test_verify_log_gives_what_holds() -> None:
    log = verify_log(MADE.evidence)
    assert (log.sound, log.complete, log.faults) == (True, True, ())
    assert sorted(log.checkpoints) == [1, 2, 7, 8, 13, 14, 20]
    assert len(log.countersignatures) == 9
    assert log.parties is not None
    assert fingerprint(log.parties.contract.operator.key) == MADE.contract.operator.id
