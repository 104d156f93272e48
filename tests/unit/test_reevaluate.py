"""The auditor's re-evaluation, end to end: what the operator hands over, what is found in it, who believes the record.

A lying operator lies where it makes its figures, so that everything after the lie is properly logged, signed, settled.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.auditor_kit import AUDITOR, CLAUSE, OPENING_KEY, PASSPHRASE, SIGNING_KEY, auditor_home
from tests.support.closed_run import EVERYBODY_IS_PAID, REVENUE, ClosedRun, closed_run
from tests.support.command import runner
from tests.support.federation import Federation, make_federation
from tests.support.readme import README, Script, commands, filled

from fedpact_contract.contract import Contract
from fedpact_contract.errors import FailedError, FaultError, InputError
from fedpact_contract.keys import generate_key
from fedpact_contract.log import Entry, Finding, Findings, Moments, RoundScores, Sampling
from fedpact_contract.record import Envelope, sign
from fedpact_contract.reevaluation import Difference, Reevaluation, drawn, read, tolerance
from fedpact_contract.report import build
from fedpact_contract.trust import Trust, write
from fedpact_contract.verify import OF_THE_RECORD, UTILITIES, Report, verify_folder
from fedpact_models import aggregation
from fedpact_models.dp import SystemNoise
from fedpact_models.registry import initial_weights
from fedpact_server import bundle, closing, deposit, rounds, scoring, watch
from fedpact_server import reevaluate as reevaluation
from fedpact_server.evidence import evidence_parts
from fedpact_server.reevaluate import reevaluate
from fedpact_server.report.html import render

KEYS = (SIGNING_KEY, OPENING_KEY)
SEED = "5e" * 32


@dataclass
class Audit:
    """A run handed over to its auditor."""

    contract: Contract
    folder: Path

    @property
    def evidence(self) -> Path:
        return self.folder / bundle.EVIDENCE

    def look(self, **options: Any) -> Reevaluation:
        return reevaluate(self.folder, AUDITOR, KEYS, **options)[1]

    def signed(self, **options: Any) -> Envelope[Reevaluation]:
        return reevaluate(self.folder, AUDITOR, KEYS, **options)[2]

    def verified(self, envelope: Envelope[Any] | bytes, trust: Trust | None = None) -> Report:
        file = self.folder.parent / "reevaluation.json"
        file.write_bytes(envelope if isinstance(envelope, bytes) else envelope.to_bytes() + b"\n")
        return verify_folder(self.evidence, trust or Trust.of(self.contract), privacy=False, record=file)


def handed_over(federation: Federation, folder: Path) -> Audit:
    """Settle and hand over."""
    with federation.database.write() as connection:
        closing.settle(connection, federation.contract, federation.operator_run_key, REVENUE, 0)
        parts = evidence_parts(connection, federation.contract.id)
    bundle.write(folder, federation.home, federation.contract, *parts)
    return Audit(federation.contract, folder)


def audited(
    folder: Path, lie: Callable[[pytest.MonkeyPatch], None] | None = None, ends: str = "completed", **changes: Any
) -> Audit:
    """A run of two rounds, handed over; while it ran the operator lied."""
    options = {"auditor": CLAUSE, "training__rounds": 2, "noise": lambda _: SystemNoise(), **EVERYBODY_IS_PAID}
    with pytest.MonkeyPatch.context() as patch:
        federation = make_federation(folder / "run", **(options | changes))
        if lie is not None:
            lie(patch)
        assert federation.run(accept_test_noise=False) == ends
    return handed_over(federation, folder / "handed")


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    return audited(tmp_path_factory.mktemp("honest"))


@pytest.fixture
def copied(honest: Audit, tmp_path: Path) -> Audit:
    shutil.copytree(honest.folder, tmp_path / "handed")
    return Audit(honest.contract, tmp_path / "handed")


def scores_lie(change: Callable[[RoundScores], RoundScores]) -> Callable[[pytest.MonkeyPatch], None]:
    """The operator states other scores than it computed."""
    true = scoring.score_round

    def lie(patch: pytest.MonkeyPatch) -> None:
        def lying(*arguments: Any) -> Any:
            scores, values = true(*arguments)
            return change(scores), values

        patch.setattr(scoring, "score_round", lying)

    return lie


def with_loss(scores: RoundScores, number: int, row: int, more: int) -> RoundScores:
    if scores.round != number:
        return scores
    losses = [list(line) for line in scores.losses]
    losses[row][0] += more
    return scores.model_copy(update={"losses": tuple(map(tuple, losses))})


# An honest run


def test_an_honest_run_is_found_as_it_was_stated(honest: Audit) -> None:
    record = honest.look()
    assert (record.differing, record.differences, record.largest) == (0, (), 0), "on one machine to the last integer"
    assert (record.coalitions, record.rounds, record.evaluated, record.tolerance) == ("all", 2, 2 * 2**4, 1)
    assert (record.contract_id, record.auditor) == (honest.contract.id, AUDITOR.id)
    assert (record.sample, record.seed) == (None, None)


def test_with_slices_of_participants_it_is_the_same(tmp_path: Path) -> None:
    keys = [generate_key() for _ in range(4)]
    from fedpact_contract.keys import fingerprint, public_hex

    giver = fingerprint(public_hex(keys[2]))
    slices = [{"source": "operator", "count": 120}, {"source": giver, "count": 100}]
    record = audited(tmp_path, keys=keys, contribution__validation__slices=slices).look()
    assert (record.differing, record.largest, record.evaluated) == (0, 0, 32)


def test_a_network_is_evaluated_again_too(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model__kind": "mlp", "model__hidden": [5]}
    shape = make_federation(tmp_path / "shape").contract.plain()
    shape["model"] |= {"kind": "mlp", "hidden": [5]}
    contract = Contract.parse(shape)
    base = initial_weights(contract.model, contract.data, np.random.default_rng(1))
    audit = audited(tmp_path, base=base, **changes)
    assert (audit.look().differing, audit.look(sample=5).differing) == (0, 0)


def test_drawn_coalitions_are_evaluated_again_as_they_were_drawn(tmp_path: Path) -> None:
    terms = {"contribution__estimator": "sampled", "contribution__max_coalitions": 300, "training__rounds": 1}
    audit = audited(tmp_path, counts=[60] * 13, **terms)
    record = audit.look()
    assert (record.differing, record.largest, record.coalitions) == (0, 0, "all")
    assert 100 < record.evaluated <= 300
    few = audit.look(sample=9, seed=SEED)
    assert (few.differing, few.largest, few.evaluated) == (0, 0, 11)
    assert audit.verified(audit.signed()).faults == ()


def test_what_a_draw_rests_on_is_compared_to_the_unit() -> None:
    def scores(**changes: Any) -> RoundScores:
        first = changes.pop("first_order", (5, 6))
        values = {"estimator": "pairs", "seed": SEED, "draws": 8, "errors": ((7, 8), (9, 9))} | changes
        sampling = Sampling(**values)
        return RoundScores(round=3, players=(), losses=(), correct=(0, 0), sampling=sampling, first_order=first)

    draws = reevaluation._draws
    assert list(draws(scores(), scores())) == []
    assert list(draws(scores(), scores(first_order=(5, 7), errors=((6, 8), (9, 9))))) == []
    for changes in ({"draws": 9}, {"first_order": (5, 8)}, {"errors": ((7, 8), (9, 11))}, {"errors": ((7, 8),)}):
        (difference,) = draws(scores(), scores(**changes))
        assert (difference.what, difference.round) == ("draws", 3)


@pytest.mark.parametrize("kind", ["adam", "adagrad"])
def test_a_servers_optimizer_is_followed_through_its_rounds(tmp_path: Path, kind: str) -> None:
    betas = {"beta_1": "0.9", "beta_2": "0.99"} if kind == "adam" else {"beta_1": "0", "beta_2": "0"}
    optimizer = {"kind": kind, "tau": "0.001"} | betas
    audit = audited(tmp_path, training__server_optimizer=optimizer, training__server_rate="0.1")
    for options in ({}, {"sample": 4}):
        record = audit.look(**options)
        assert (record.differing, record.rounds) == (0, 2)


def test_an_update_that_fits_no_model_ends_the_audit_with_a_difference(honest: Audit, monkeypatch) -> None:
    monkeypatch.setattr(reevaluation, "parameter_count", lambda *_: 1)
    record = honest.look()
    assert [(d.what, d.round, d.found) for d in record.differences] == [
        ("model", 1, "an update that does not fit the model")
    ]
    assert record.compared == ()
    report = honest.verified(honest.signed())
    assert report.faults[0]["code"] == "REEVALUATION_DIFFERS"
    assert "Evaluated again: nothing in every round." in report.notes


def test_a_failure_of_the_auditors_own_machine_accuses_nobody(honest: Audit, monkeypatch) -> None:
    def fails(*_: Any) -> None:
        raise FailedError("SOMETHING_ELSE", "no memory")

    monkeypatch.setattr(scoring, "score_round", fails)
    with pytest.raises(FailedError, match="SOMETHING_ELSE"):
        honest.look()


def test_what_has_no_loss_is_a_difference_in_its_round(honest: Audit, monkeypatch) -> None:
    def fails(*_: Any) -> None:
        raise FailedError("EVALUATION_NOT_FINITE", "no number")

    monkeypatch.setattr(scoring, "score_round", fails)
    record = honest.look()
    assert [(d.what, d.round, d.found) for d in record.differences] == [
        ("loss", number, "EVALUATION_NOT_FINITE") for number in (1, 2)
    ]
    assert record.compared == ("models",)
    (first, _) = honest.verified(honest.signed()).faults
    assert first["message"].startswith("Round 1, losses: ")


def test_a_sample_is_drawn_by_its_seed_and_finds_the_same(honest: Audit) -> None:
    record = honest.look(sample=3, seed=SEED)
    assert (record.coalitions, record.sample, record.seed) == ("sampled", 3, SEED)
    assert (record.differing, record.evaluated) == (0, 2 * 5)
    assert record.largest <= 1
    assert honest.look(sample=3, seed=SEED) == record
    fresh = [honest.look(sample=3).seed for _ in range(2)]
    assert len({SEED, *fresh}) == 3
    assert honest.look(sample=99, seed=SEED).evaluated == 2 * 16


def test_what_is_drawn_is_nobody_everybody_and_some_between() -> None:
    def scores(number: int) -> RoundScores:
        return RoundScores(round=number, players=(), losses=((0,),) * 32, correct=(0, 0))

    rows = drawn(scores(1), 7, SEED)
    assert rows == sorted(set(rows))
    assert (len(rows), rows[0], rows[-1]) == (9, 0, 31)
    assert drawn(scores(1), 7, SEED) == rows != drawn(scores(2), 7, SEED)
    assert drawn(scores(1), 7, "5f" * 32) != rows
    assert drawn(scores(1), None, None) == list(range(32))
    counts = np.zeros(32)
    for number in range(400):
        counts[drawn(scores(1), 7, f"{number:064x}")] += 1
    assert counts[0] == counts[31] == 400
    assert 55 < counts[1:31].min() <= counts[1:31].max() < 135, "7 of 30 each time: 93 of 400"


CHILD = """
import sys
from pathlib import Path
from tests.support.auditor_kit import AUDITOR, OPENING_KEY, SIGNING_KEY
from fedpact_server.reevaluate import reevaluate
print(reevaluate(Path(sys.argv[1]), AUDITOR, (SIGNING_KEY, OPENING_KEY))[1].to_bytes().decode())
"""


def test_on_other_instructions_it_is_within_the_tolerance(honest: Audit) -> None:
    """numpy's exp and log without the newest instructions of this processor, OpenBLAS's oldest kernel."""
    from numpy._core import _multiarray_umath as umath

    environment = os.environ | {"PYTHONPATH": str(README.parent), "OPENBLAS_CORETYPE": "Nehalem"}
    environment["NPY_DISABLE_CPU_FEATURES"] = " ".join(n for n in umath.__cpu_dispatch__ if umath.__cpu_features__[n])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, honest.folder], env=environment, capture_output=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    record = Reevaluation.from_bytes(done.stdout.strip())
    assert (record.differing, record.evaluated) == (0, 32)
    assert record.largest <= 1


@pytest.mark.parametrize(("rows", "units"), [(1, 1), (100_000, 1), (100_001, 2), (1_000_000, 10)])
def test_the_tolerance_is_a_unit_for_each_begun_hundred_thousand_rows(rows: int, units: int) -> None:
    assert tolerance(rows) == units


# A lying operator


@pytest.mark.parametrize("more", [2, -2, 10**6])
def test_a_loss_that_was_changed_by_two_units_is_found_and_named(tmp_path: Path, more: int) -> None:
    audit = audited(tmp_path, scores_lie(lambda s: with_loss(s, 2, 5, more)))
    record = audit.look()
    (difference,) = record.differences
    assert (difference.what, difference.round, difference.slice) == ("loss", 2, 0)
    ids = list(audit.contract.by_id())
    assert difference.coalition == (ids[0], ids[2]), "row 5 is 0b101"
    assert int(difference.stated) - int(difference.found) == more
    assert (record.differing, record.largest) == (1, abs(more))

    names = [audit.contract.by_id()[p].name for p in difference.coalition]
    report = audit.verified(audit.signed())
    assert report.exit_code == 1
    (fault,) = report.faults
    assert (fault["code"], fault["party"], fault["field"]) == ("REEVALUATION_DIFFERS", "Operator", "differences.0")
    assert f"Round 2, loss of the coalition of {', '.join(names)} on slice 0" in fault["message"]
    assert report.utilities == "the operator's statement, which Audit House re-evaluated and found otherwise"


def test_a_sample_finds_what_it_draws_and_says_what_it_did_not(tmp_path: Path) -> None:
    audit = audited(tmp_path, scores_lie(lambda s: with_loss(s, 1, 5, 1000)))
    found = {audit.look(sample=3, seed=f"{n:064x}").differing for n in range(12)}
    assert found == {0, 1}
    assert audit.look(sample=14).differing == 1


def test_one_unit_is_within_the_tolerance(tmp_path: Path) -> None:
    record = audited(tmp_path, scores_lie(lambda s: with_loss(s, 1, 5, 1))).look()
    assert (record.differing, record.largest) == (0, 1)


def test_right_answers_that_were_invented_are_found(tmp_path: Path) -> None:
    def more(scores: RoundScores) -> RoundScores:
        if scores.round != 2:
            return scores
        return scores.model_copy(update={"correct": (scores.correct[0], scores.correct[1] + 1)})

    audit = audited(tmp_path, scores_lie(more))
    for options in ({}, {"sample": 1}):
        (difference,) = audit.look(**options).differences
        assert (difference.what, difference.round, difference.coalition) == ("correct", 2, None)


def test_another_next_model_is_found_and_the_rounds_after_it_are_still_judged(tmp_path: Path) -> None:
    true = rounds.aggregation.apply

    def lie(patch: pytest.MonkeyPatch) -> None:
        def apply(base: np.ndarray, steps: np.ndarray) -> np.ndarray:
            model = true(base, steps)
            return model + 1e-12 if not base.any() else model

        patch.setattr(rounds.aggregation, "apply", apply)

    audit = audited(tmp_path, lie)
    record = audit.look()
    assert [(d.what, d.round) for d in record.differences] == [("model", 1)]
    assert audit.look(sample=2).differing == 1
    fault = audit.verified(audit.signed()).faults[0]
    assert "The model that round 1 led to" in fault["message"]


def test_second_moments_that_were_invented_are_found_by_all_coalitions_alone(tmp_path: Path) -> None:
    def lie(patch: pytest.MonkeyPatch) -> None:
        true = scoring.moments

        def larger(*arguments: Any) -> Moments:
            products = [list(row) for row in true(*arguments).products]
            products[1][1] += products[1][1] // 1000
            return Moments(products=tuple(map(tuple, products)))

        patch.setattr(scoring, "moments", larger)

    audit = audited(tmp_path, lie)
    (difference,) = audit.look().differences
    ids = list(audit.contract.by_id())
    assert (difference.what, difference.round, difference.coalition) == ("moments", 0, (ids[1], ids[1]))
    assert audit.look(sample=14).differing == 0
    report = audit.verified(audit.signed(sample=14))
    assert any(note.startswith("Not evaluated again") and "the second moments" in note for note in report.notes)


def test_a_deposit_of_other_rows_is_the_operators_fault(tmp_path: Path) -> None:
    def lie(patch: pytest.MonkeyPatch) -> None:
        true = deposit.pack_rows
        patch.setattr(deposit, "pack_rows", lambda examples, salts: true(examples, salts[::-1]))

    audit = audited(tmp_path, lie)
    record = audit.look()
    assert (record.coalitions, record.evaluated, record.differing) == ("none", 0, 1)
    assert (record.differences[0].what, record.differences[0].found) == ("deposit", "DEPOSIT_ROOT")
    report = audit.verified(audit.signed())
    assert (report.exit_code, [f["party"] for f in report.faults]) == (1, ["Operator"])
    assert audit.look(sample=2).coalitions == "none"


def test_a_deposit_that_opens_for_nobody_is_the_operators_fault(tmp_path: Path) -> None:
    def lie(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(deposit.sealed, "seal", lambda *_a, **_k: b"x" * 500)

    record = audited(tmp_path, lie).look()
    assert [(d.what, d.found) for d in record.differences] == [("deposit", "SEAL_BROKEN")]


# A bundle that is at fault signs nothing


def altered(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:9] + bytes([data[9] ^ 1]) + data[10:])


@pytest.mark.parametrize(
    ("part", "code"),
    [
        ("updates/*.f4", "UPDATE"),
        ("models/*.f8", "MODEL"),
        ("deposit.sealed", "DEPOSIT"),
    ],
)
def test_a_file_that_is_not_what_the_log_says_is_named(copied: Audit, part: str, code: str) -> None:
    path = sorted(copied.folder.glob(part))[-1]
    altered(path)
    with pytest.raises(FaultError) as caught:
        copied.look()
    assert (caught.value.code, caught.value.file) == (f"{code}_DIGEST", str(path))
    path.unlink()
    with pytest.raises(FaultError) as caught:
        copied.look()
    assert caught.value.code in (f"{code}_MISSING", f"{code}_FILE_MISSING")
    assert caught.value.file == str(path)


def test_evidence_that_is_at_fault_is_not_evaluated(copied: Audit) -> None:
    altered(copied.evidence / "leaves.txt")
    with pytest.raises(FaultError) as caught:
        copied.look()
    assert caught.value.code == "REEVALUATE_EVIDENCE"


def test_before_the_scores_are_open_there_is_nothing_to_compare(tmp_path: Path) -> None:
    run = closed_run(tmp_path, audited=True)
    with run.federation.database.read() as connection:
        parts = evidence_parts(connection, run.contract_id)
    bundle.write(tmp_path / "early", run.home, run.federation.contract, *parts)
    with pytest.raises(InputError) as caught:
        reevaluate(tmp_path / "early", AUDITOR, KEYS)
    assert caught.value.code == "REEVALUATE_EARLY"


def test_another_auditor_is_told_so(honest: Audit) -> None:
    other = AUDITOR.model_copy(update={"key": "ab" * 32})
    with pytest.raises(InputError) as caught:
        reevaluate(honest.folder, other, KEYS)
    assert caught.value.code == "AUDITOR_OTHER"


@pytest.mark.parametrize("options", [{"seed": SEED}, {"sample": 2, "seed": "5E" * 32}, {"sample": 2, "seed": "5e"}])
def test_a_seed_of_another_form_is_refused(honest: Audit, options: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        honest.look(**options)
    assert (caught.value.code, caught.value.field) == ("REEVALUATE_SEED", "--seed")


def test_the_bundle_is_for_contracts_with_an_auditor_and_whole_or_not_at_all(tmp_path: Path) -> None:
    run = closed_run(tmp_path)
    with run.federation.database.read() as connection:
        parts = evidence_parts(connection, run.contract_id)
    with pytest.raises(InputError) as caught:
        bundle.write(tmp_path / "x", run.home, run.federation.contract, *parts)
    assert caught.value.code == "AUDITOR_NONE"
    (tmp_path / "two").mkdir()
    run = closed_run(tmp_path / "two", audited=True)
    with run.federation.database.read() as connection:
        parts = evidence_parts(connection, run.contract_id)
    altered(next((run.home / "arrays" / run.contract_id).glob("deposit-*")))
    with pytest.raises(FaultError) as caught:
        bundle.write(tmp_path / "x", run.home, run.federation.contract, *parts)
    assert caught.value.code == "DEPOSIT_DIGEST"
    assert not (tmp_path / "x").exists()


def test_no_row_is_readable_in_the_bundle(honest: Audit) -> None:
    rows = deposit.unseal((honest.folder / bundle.SEALED).read_bytes(), OPENING_KEY, honest.contract)
    everything = b"".join(p.read_bytes() for p in honest.folder.rglob("*") if p.is_file())
    for row in rows.x[:20]:
        assert row.astype("<f8").tobytes() not in everything
    assert {p.name for p in honest.folder.iterdir()} == {"evidence", "deposit.sealed", "models", "updates"}


# Who believes the record


@pytest.fixture(scope="module")
def record(honest: Audit) -> Envelope[Reevaluation]:
    return honest.signed()


def test_verify_says_so_where_the_auditor_is_known(honest: Audit, record: Envelope[Reevaluation]) -> None:
    report = honest.verified(record)
    assert report.faults == ()
    assert report.utilities == "re-evaluated by Audit House (all coalitions)"
    assert UTILITIES not in report.notes
    (note,) = (n for n in report.notes if n.startswith("Utilities"))
    assert (
        "re-evaluated by Audit House (91310000MA1AUDT001), which found the same: all coalitions in rounds 1-2" in note
    )
    again = next(n for n in report.notes if n.startswith("Evaluated again: "))
    assert again == (
        "Evaluated again: every next model; the losses of all coalitions; right answers; first-order values, draws and "
        "the errors that end them; the second moments, which decide intervals and whether values are reliable."
    )
    assert not any(n.startswith("Not evaluated") for n in report.notes)
    sampled = honest.verified(honest.signed(sample=3))
    assert sampled.notes[-2:] == (
        "Evaluated again: every next model; the losses of 3 drawn coalitions of each round, and all together; right "
        "answers.",
        "Not evaluated again, and the operator's statement: the losses that were not drawn; first-order values, draws "
        "and the errors that end them; the second moments, which decide intervals and whether values are reliable.",
    )
    assert sampled.utilities == "re-evaluated by Audit House (3 drawn coalitions of each round, and all together)"


def test_without_the_auditor_in_the_trust_file_it_is_the_operators_statement(
    honest: Audit, record: Envelope[Reevaluation]
) -> None:
    parties = Trust.of(honest.contract).party
    stranger = Trust(party=tuple(p for p in parties if p.role != "auditor"))
    report = honest.verified(record, stranger)
    assert (report.faults, report.utilities) == ((), "the operator's statement")
    assert any(AUDITOR.id in note and "does not name" in note for note in report.notes)
    file = honest.folder.parent / "reevaluation.json"
    nobody = verify_folder(honest.evidence, None, privacy=False, record=file)
    assert (nobody.exit_code, nobody.utilities) == (3, "the operator's statement")
    assert any("no trust file names" in note for note in nobody.notes)


def test_without_a_record_nothing_changes(honest: Audit) -> None:
    report = verify_folder(honest.evidence, Trust.of(honest.contract), privacy=False)
    assert report.utilities == "the operator's statement"
    assert report.notes[-1] == UTILITIES


def test_a_trust_file_with_another_key_for_the_auditor_contradicts_the_contract(honest: Audit) -> None:
    parties = [p.model_copy(update={"fingerprint": "ab" * 32}) if p.role == "auditor" else p
               for p in Trust.of(honest.contract).party]  # fmt: skip
    report = verify_folder(honest.evidence, Trust(party=tuple(parties)), privacy=False)
    assert [(f["code"], f["party"]) for f in report.faults] == [("TRUST_CONTRADICTION", "Audit House")]
    elsewhere = [p.model_copy(update={"role": "operator", "fingerprint": "ab" * 32}) if p.role == "auditor" else p
                 for p in Trust.of(honest.contract).party]  # fmt: skip
    report = verify_folder(honest.evidence, Trust(party=tuple(elsewhere)), privacy=False)
    assert report.faults == (), "as an operator it has another key"


def test_evidence_may_carry_it(copied: Audit, record: Envelope[Reevaluation]) -> None:
    (copied.evidence / "reevaluation.json").write_bytes(record.to_bytes() + b"\n")
    trust = Trust.of(copied.contract)
    report = verify_folder(copied.evidence, trust, privacy=False)
    assert report.utilities == "re-evaluated by Audit House (all coalitions)"
    (copied.evidence / "reevaluation.json").write_bytes(b"{}")
    report = verify_folder(copied.evidence, trust, privacy=False)
    assert [(f["code"], f["file"]) for f in report.faults] == [
        ("REEVALUATION_FORM", str(copied.evidence / "reevaluation.json"))
    ]
    (copied.evidence / "reevaluation.txt").write_bytes(b"")
    assert verify_folder(copied.evidence, trust).faults[0]["code"] == "EVIDENCE_FILE_EXTRA"


def resigned(envelope: Envelope[Reevaluation], **changes: Any) -> Envelope[Reevaluation]:
    return sign(Reevaluation.from_bytes(envelope.body).model_copy(update=changes), SIGNING_KEY)


LIE = Difference(what="correct", round=1, stated="1, 2", found="1, 3")


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({"compared": ("models",)}, "REEVALUATION_MISMATCH", "compared"),
        (
            {"compared": ("models", "discarded", "losses", "correct", "draws", "moments")},
            "REEVALUATION_MISMATCH",
            "compared",
        ),
        ({"compared": ("moments", "draws", "correct", "losses", "models")}, "REEVALUATION_MISMATCH", "compared"),
        ({"root": "ab" * 32}, "REEVALUATION_MISMATCH", "root"),
        ({"size": 10**6}, "REEVALUATION_MISMATCH", "root"),
        ({"size": 3}, "REEVALUATION_EARLY", "size"),
        ({"rounds": 1}, "REEVALUATION_MISMATCH", "rounds"),
        ({"tolerance": 10**9}, "REEVALUATION_MISMATCH", "tolerance"),
        ({"evaluated": 31}, "REEVALUATION_MISMATCH", "evaluated"),
        ({"coalitions": "sampled"}, "REEVALUATION_MISMATCH", "sample"),
        ({"sample": 3, "seed": SEED, "evaluated": 10}, "REEVALUATION_MISMATCH", "sample"),
        ({"coalitions": "none", "evaluated": 0}, "REEVALUATION_MISMATCH", "differences"),
        ({"differing": 1}, "REEVALUATION_MISMATCH", "differences"),
        ({"differences": (LIE,)}, "REEVALUATION_MISMATCH", "differences"),
    ],
)
def test_a_record_that_does_not_fit_is_a_fault(
    honest: Audit, record: Envelope[Reevaluation], changes: dict[str, Any], code: str, field: str
) -> None:
    report = honest.verified(resigned(record, **changes))
    assert [(f["code"], f["field"], f["party"]) for f in report.faults] == [(code, field, "Audit House")]
    assert (report.exit_code, report.verdict) == (1, OF_THE_RECORD), "the evidence itself is not called faulty"
    assert report.utilities == "the operator's statement"


def test_only_the_auditors_own_signature_counts(honest: Audit, record: Envelope[Reevaluation]) -> None:
    said = Reevaluation.from_bytes(record.body)
    broken = record.model_copy(update={"signatures": (record.signatures[0].model_copy(update={"value": "00" * 64}),)})
    for envelope, code in (
        (sign(said, generate_key()), "SIGNATURE_MISSING"),
        (sign(said, SIGNING_KEY, generate_key()), "SIGNATURE_EXTRA"),
        (broken, "SIGNATURE_INVALID"),
    ):
        report = honest.verified(envelope)
        assert [(f["code"], f["party"]) for f in report.faults] == [(code, "Audit House")]
        assert report.verdict == OF_THE_RECORD


def test_no_byte_of_a_record_can_change(honest: Audit, record: Envelope[Reevaluation]) -> None:
    data = record.to_bytes()
    for place in range(0, len(data), 37):
        changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        assert verdict(honest, changed) in (OF_THE_RECORD, *WRONG), place


WRONG = ("REEVALUATION_FORM", "REEVALUATION_OTHER_RUN", "REEVALUATION_OTHER_AUDITOR")


def verdict(audit: Audit, data: bytes) -> str:
    """What is said of a record: of one so damaged that it is another file, the code of that."""
    try:
        return audit.verified(data).verdict
    except InputError as err:
        return err.code


def test_a_record_that_does_not_say_what_was_compared_is_taken_as_before(
    honest: Audit, record: Envelope[Reevaluation]
) -> None:
    for options in ({}, {"sample": 3}):
        old = resigned(honest.signed(**options), compared=None)
        assert b"compared" not in old.body
        assert (
            honest.verified(old).notes[-len(options) - 1 :]
            == honest.verified(
                honest.signed(**options | ({"seed": Reevaluation.from_bytes(old.body).seed} if options else {}))
            ).notes[-len(options) - 1 :]
        )


def test_the_wrong_file_is_named_and_makes_no_evidence_faulty(
    honest: Audit, record: Envelope[Reevaluation], copied: Audit, tmp_path: Path, monkeypatch, capsys
) -> None:
    other_run, other_auditor = (resigned(record, **{name: "ab" * 32}) for name in ("contract_id", "auditor"))
    of_a_contract = record.model_copy(update={"type": Contract.media_type()})
    wrong: dict[str, list[bytes]] = {
        "REEVALUATION_OTHER_RUN": [other_run.to_bytes()],
        "REEVALUATION_OTHER_AUDITOR": [other_auditor.to_bytes()],
        "REEVALUATION_FORM": [b"{}", b"rubbish", of_a_contract.to_bytes()],
    }
    fedpact, file = runner(monkeypatch, capsys), tmp_path / "WRONG.json"
    for code, data in ((code, data) for code, files in wrong.items() for data in files):
        file.write_bytes(data)
        with pytest.raises(InputError) as caught:
            verify_folder(honest.evidence, Trust.of(honest.contract), privacy=False, record=file)
        assert (caught.value.code, caught.value.file, caught.value.exit_code) == (code, str(file), 2)
        assert caught.value.message.startswith("The wrong file")
        assert "the evidence has no part in this" in caught.value.remedy
        (copied.evidence / "reevaluation.json").write_bytes(data)
        carried = verify_folder(copied.evidence, Trust.of(copied.contract), privacy=False)
        assert [fault["code"] for fault in carried.faults] == [code]
        assert carried.verdict == OF_THE_RECORD
    file.write_bytes(other_run.to_bytes())
    code, _, err = fedpact("verify", honest.evidence, "--reevaluation", file)
    assert code == 2
    assert err.startswith(f"REEVALUATION_OTHER_RUN: The wrong file: it is of the contract {'ab' * 32}")


def test_where_no_auditor_is_named_no_record_is_due(tmp_path: Path, record: Envelope[Reevaluation]) -> None:
    run = closed_run(tmp_path)
    run.settle()
    folder = tmp_path / "evidence"
    folder.mkdir()
    for name, text in run.files().items():
        (folder / name).write_text(text)
    (folder / "reevaluation.json").write_bytes(record.to_bytes())
    report = verify_folder(folder, None, privacy=False)
    assert [f["code"] for f in report.faults] == ["REEVALUATION_NO_AUDITOR"]
    (folder / "reevaluation.json").rename(tmp_path / "given.json")
    with pytest.raises(InputError, match="REEVALUATION_NO_AUDITOR"):
        verify_folder(folder, None, privacy=False, record=tmp_path / "given.json")


# The commands


def test_from_the_operator_to_the_reader_by_commands(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    fedpact = runner(monkeypatch, capsys)
    run: ClosedRun = closed_run(tmp_path, audited=True)
    run.settle()
    secret = tmp_path / "secret"
    secret.write_bytes(PASSPHRASE + b"\n")
    secret.chmod(0o600)
    write(tmp_path / "trust.toml", Trust.of(run.federation.contract))
    prefix = run.contract_id[:8]
    shown = Script(commands((README.parent / "docs" / "verifying.md").read_text("utf-8"), "An auditor evaluates again"))
    values = {"3f2a91c0": prefix, "operator": str(run.home)}

    def take(beginning: str, *more: object) -> tuple[int, str, str]:
        return fedpact(*filled(shown.take(beginning), values)[1:], *more)

    assert take("fedpact auditor init auditor", "--passphrase-file", secret)[0] == 0
    shutil.rmtree("auditor")  # the run's auditor had its keys before
    auditor_home(tmp_path / "auditor")
    code, _, err = take("fedpact evidence")
    assert (code, err) == (0, "")
    audit = ("contribution", "reevaluate", "handed-over", "--key", "auditor", "--passphrase-file", secret)
    code, out, err = take("fedpact contribution reevaluate", "--passphrase-file", secret)
    assert (code, err) == (0, "")
    assert "All coalitions of 2 rounds (32 evaluations)" in out
    assert "NO DIFFERENCE" in out
    code, out, _ = fedpact(*audit, "--sample", 3, "--seed", SEED, "--out", "sampled.json", "--json")
    assert (code, json.loads(out)["evaluated"]) == (0, 10)
    code, _, err = fedpact(*audit)
    assert (code, err.split(":")[0]) == (2, "FILE_EXISTS")

    code, out, _ = take("fedpact verify")
    shown.done()
    assert code == 4, "nobody has countersigned the close"
    assert "re-evaluated by Audit House (91310000MA1AUDT001), which found the same" in out
    code, _, err = fedpact("verify", "handed-over/evidence", "--reevaluation", "none.json")
    assert (code, err.split(":")[0]) == (2, "REEVALUATION_MISSING")

    report = ("report", prefix, "--home", run.home)
    code, out, _ = fedpact(*report, "--format", "json", "--reevaluation", "reevaluation.json")
    told = json.loads(out)
    assert (code, told["utilities"]) == (0, "re-evaluated by Audit House (all coalitions)")
    assert told["reevaluation"] == {
        "auditor": "Audit House",
        "coalitions": "all",
        "sample": None,
        "differing": 0,
        "evaluated_again": ["models", "losses", "correct", "draws", "moments"],
        "not_evaluated_again": [],
    }
    for lang, file, words in (
        ("en", "reevaluation.json", "Utilities were re-evaluated by Audit House (all coalitions)."),
        ("zh", "sampled.json", "效用值已由Audit House复评（每轮抽取3个联盟，并含全体联盟）；其余为运营方陈述。"),
    ):
        assert fedpact(*report, "--lang", lang, "--out", f"{lang}.html", "--reevaluation", file)[0] == 0
        assert words in (tmp_path / f"{lang}.html").read_text("utf-8")


def test_a_difference_ends_with_1_and_is_signed(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    fedpact = runner(monkeypatch, capsys)
    audit = audited(tmp_path, scores_lie(lambda s: with_loss(s, 2, 5, 2)))
    home = auditor_home(tmp_path / "auditor")
    secret = tmp_path / "secret"
    secret.write_bytes(PASSPHRASE + b"\n")
    secret.chmod(0o600)
    out = tmp_path / "record.json"
    options = ("--key", home.path, "--passphrase-file", secret, "--out", out)
    code, text, _ = fedpact("contribution", "reevaluate", audit.folder, *options)
    assert code == 1
    assert "Round 2, loss of the coalition of" in text
    assert "1 DIFFERENCE:" in text
    assert audit.verified(out.read_bytes()).faults[0]["code"] == "REEVALUATION_DIFFERS"
    entries = [Entry.from_bytes(line) for line in (audit.evidence / "log.jsonl").read_bytes().splitlines()]
    report = build(entries, read(out.read_bytes(), audit.contract, entries))
    assert "found otherwise" in report["utilities"]
    assert "Audit House re-evaluated them and found otherwise; differences: 1." in render(report, "en")
    assert "Audit House复评后发现1处不符" in render(report, "zh")


# A round that was given up


def no_number(patch: pytest.MonkeyPatch, at: int = 3) -> None:
    """The losses of a round are no numbers."""
    true = scoring.score_round

    def score(contract: Contract, number: int, *rest: Any) -> Any:
        if number == at:
            raise FailedError("EVALUATION_NOT_FINITE", "A loss on the validation set is not a finite number.")
        return true(contract, number, *rest)

    patch.setattr(scoring, "score_round", score)


@pytest.mark.parametrize("options", [{}, {"sample": 2, "seed": SEED}])
def test_a_round_that_was_given_up_is_evaluated_again(tmp_path: Path, monkeypatch, options: dict[str, Any]) -> None:
    """Else an operator could drop the last round where it dislikes what that is worth."""
    audit = audited(tmp_path, no_number, ends="stopped", training__rounds=4)
    report = verify_folder(audit.evidence, Trust.of(audit.contract), privacy=False)
    assert report.faults == ()
    assert any(note.startswith("Round 3 was given up") and "the operator's statement" in note for note in report.notes)
    record = audit.look(**options)
    assert [(d.what, d.round, d.stated, d.found) for d in record.differences] == [
        ("discarded", 3, "EVALUATION_NOT_FINITE", "losses that are numbers")
    ]
    (fault,) = audit.verified(audit.signed(**options)).faults
    assert (fault["code"], fault["party"]) == ("REEVALUATION_DIFFERS", "Operator")
    assert fault["message"].startswith("Round 3, which was given up: the operator states EVALUATION_NOT_FINITE")
    no_number(monkeypatch)  # now for the auditor too
    good = audit.look(**options)
    assert (good.differing, good.rounds) == (0, 2)
    assert "discarded" in (good.compared or ())
    notes = audit.verified(audit.signed(**options)).notes
    assert any("that the round which was given up has no losses" in note for note in notes)
    assert not any(note.startswith("Round 3") and "statement" in note for note in notes), "an auditor has looked"


DEFENCES: dict[str, Any] = {"clip": "median-signal", "wreckers": "reject", "negatives": "0.1", "dispute_hours": 72}
EQUALLY: dict[str, Any] = {
    "settlement__contribution_weight": 0,
    "settlement__data_weight": 0,
    "settlement__equal_weight": 1,
}
"""No value is paid by, so that negative ones are no reason for a review."""


class TestDefences:
    """Clips and what the detectors say are made again from the updates."""

    def test_an_honest_operator_has_no_difference(self, tmp_path: Path) -> None:
        audit = audited(tmp_path, **EQUALLY, defences=DEFENCES, training__rounds=3)
        whole, sampled = audit.look(), audit.look(sample=2)
        assert (whole.differing, sampled.differing) == (0, 0)
        assert whole.compared == ("models", "clips", "losses", "correct", "draws", "findings", "moments")
        assert sampled.compared == ("models", "clips", "losses", "correct"), "a sample gives no values"

    def test_an_energy_that_is_not_the_updates_is_found(self, tmp_path: Path) -> None:
        def lie(patch: pytest.MonkeyPatch) -> None:
            true = aggregation.energy
            patch.setattr(aggregation, "energy", lambda update: true(update) + 1)

        audit = audited(tmp_path, lie, **EQUALLY, defences=DEFENCES)
        assert {difference.what for difference in audit.look().differences} == {"clips"}

    @pytest.mark.parametrize("change", ["outcome", "participants", "statistic"])
    def test_a_finding_that_the_updates_do_not_give_is_found(self, tmp_path: Path, change: str) -> None:
        def changed(line: Finding, known: set[str]) -> Finding:
            other: dict[str, dict[str, Any]] = {
                "outcome": {"outcome": "quiet" if line.outcome != "quiet" else "no power"},
                "participants": {"participants": (max(known - {*line.participants}),)},
                "statistic": {"statistic": "123"},
            }
            return line.model_copy(update=other[change])

        def lie(patch: pytest.MonkeyPatch) -> None:
            true = watch.KeptWatch.after

            def lying(self: Any, connection: Any, number: int) -> Findings:
                found = true(self, connection, number)
                lines = (changed(found.lines[0], {*self.contract.by_id()}), *found.lines[1:])
                return found.model_copy(update={"lines": lines}) if number == 2 else found

            patch.setattr(watch.KeptWatch, "after", lying)

        audit = audited(tmp_path, lie, **EQUALLY, defences=DEFENCES | {"wreckers": "report"})
        (difference,) = audit.look().differences
        assert (difference.what, difference.round) == ("findings", 2)
