"""The deposit for the auditor: what the operator seals before round 1, what the log says of it, and what opens."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from tests.support.auditor_kit import AUDITOR, CLAUSE, OPENING_KEY
from tests.support.closed_run import ClosedRun, closed_run
from tests.support.evidence_factory import contract_values, make_evidence
from tests.support.evidence_factory import digest as some_digest
from tests.support.federation import make_federation

from fedpact_contract import sealed
from fedpact_contract.canonical import sha256_hex
from fedpact_contract.contract import Contract
from fedpact_contract.errors import FaultError, InputError
from fedpact_contract.log import RoundOpened, ValidationDeposited
from fedpact_contract.verify import verify
from fedpact_models.features import Examples, pack_rows, unpack_rows, validation_root
from fedpact_server import deposit, rounds, validation
from fedpact_server.driver import run_context

DEPOSITED = ValidationDeposited(digest=some_digest("deposit"), size=1234)


def faults(made: Any) -> list[tuple[str, str, str | None]]:
    found = verify(made.evidence, None, privacy=False).faults
    return [(f["code"], f["field"], f.get("party")) for f in found]


class TestTheLogsRule:
    def test_where_an_auditor_is_named_it_stands_before_round_1(self) -> None:
        made = make_evidence(auditor=CLAUSE)
        assert [e.type for e in made.entries[:3]] == ["contract-signed", "validation-deposited", "round-opened"]
        assert faults(made) == []

    def test_a_missing_deposit_is_the_operators_fault(self) -> None:
        made = make_evidence(auditor=CLAUSE, tamper=lambda s, t: None if s == "validation-deposited" else t)
        assert faults(made) == [("DEPOSIT_MISSING", "entries.1", "City Data")], "once, not in every round"

    def test_a_second_one_is_a_fault(self) -> None:
        made = make_evidence(auditor=CLAUSE, tamper=lambda s, t: [t, t] if s == "validation-deposited" else t)
        assert faults(made) == [("DEPOSIT_TWICE", "entries.2", "City Data")]

    def test_one_that_comes_late_is_a_fault(self) -> None:
        def late(stage: str, thing: Any) -> Any:
            if stage == "validation-deposited":
                return None
            return [thing, DEPOSITED] if stage == "round-opened:1" else thing

        assert [code for code, *_ in faults(make_evidence(auditor=CLAUSE, tamper=late))][:2] == [
            "DEPOSIT_MISSING",
            "DEPOSIT_LATE",
        ]

    def test_where_no_auditor_is_named_there_is_none(self) -> None:
        made = make_evidence(tamper=lambda s, t: [DEPOSITED, t] if s == "round-opened:1" else t)
        assert faults(made)[0] == ("DEPOSIT_WITHOUT_AUDITOR", "entries.1", None)


class TestTheOperator:
    def test_it_seals_the_rows_before_the_first_round_and_keeps_them(self, tmp_path: Path) -> None:
        run = closed_run(tmp_path, audited=True)
        bodies = [entry.open() for entry in run.federation.entries()]
        assert isinstance(bodies[1], ValidationDeposited)
        assert isinstance(bodies[2], RoundOpened)
        assert sum(isinstance(body, ValidationDeposited) for body in bodies) == 1
        data = _kept(run, bodies[1].digest)
        assert (sha256_hex(data), len(data)) == (bodies[1].digest, bodies[1].size)
        assert run.verified().faults == ()
        rows = deposit.unseal(data, OPENING_KEY, run.federation.contract)
        assert np.array_equal(rows.x, run.federation.validation.x)
        assert np.array_equal(rows.y, run.federation.validation.y)

    def test_without_an_auditor_nothing_is_sealed(self, tmp_path: Path) -> None:
        run = closed_run(tmp_path)
        assert "validation-deposited" not in run.federation.kinds()
        assert not list((run.home / "arrays" / run.contract_id).glob("deposit*"))

    def test_a_second_attempt_leaves_the_first_ones_file_alone(self, tmp_path: Path) -> None:
        federation = make_federation(tmp_path, auditor=CLAUSE)
        context = run_context(federation.home, federation.database, federation.contract.id, "1")
        (first,) = deposit.make(context)
        (second,) = deposit.make(context)
        assert first.digest != second.digest
        for made in (second, first):
            assert sha256_hex(deposit.path(context.arrays, made.digest).read_bytes()) == made.digest

    def test_a_lost_validation_set_opens_no_round(self, tmp_path: Path) -> None:
        federation = make_federation(tmp_path, auditor=CLAUSE)
        folder = federation.home / "validation" / federation.contract.contribution.validation.root
        (folder / "rows.npz").unlink()
        with pytest.raises(FaultError) as caught:
            federation.run()
        assert caught.value.code == "VALIDATION_MISSING"
        assert federation.kinds() == ["contract-signed"]

    def test_a_crash_before_the_entry_is_logged_is_made_good(self, tmp_path: Path, monkeypatch) -> None:
        federation = make_federation(tmp_path, auditor=CLAUSE, training__rounds=1)
        whole = rounds.logbook.append

        def crash(*_: Any) -> None:
            raise OSError("full disk")

        monkeypatch.setattr(rounds.logbook, "append", crash)
        with pytest.raises(OSError, match="full disk"):
            federation.run()
        monkeypatch.setattr(rounds.logbook, "append", whole)
        assert federation.run() == "completed"
        body = federation.entries()[1].open()
        assert isinstance(body, ValidationDeposited)
        arrays = federation.home / "arrays" / federation.contract.id
        assert sha256_hex(deposit.path(arrays, body.digest).read_bytes()) == body.digest


class TestWhatOpens:
    CONTRACT = Contract.parse(contract_values(auditor=CLAUSE))

    @staticmethod
    def contract_of(examples: Examples, salts: list[bytes], **changes: Any) -> Contract:
        rows = {"root": validation_root(examples, salts), "slices": [{"source": "operator", "count": len(examples)}]}
        return Contract.parse(contract_values(auditor=CLAUSE, contribution__validation=rows, **changes))

    @staticmethod
    def rows(count: int = 5, classes: int = 2) -> tuple[Examples, list[bytes]]:
        rng = np.random.default_rng(3)
        x = np.column_stack([rng.uniform(-1, 1, count), np.ones(count)])
        return Examples(x=x, y=np.arange(count) % classes), [bytes([i]) * 32 for i in range(count)]

    @staticmethod
    def seal(contract: Contract, data: bytes, info: bytes = deposit.INFO) -> bytes:
        assert contract.auditor is not None
        return sealed.seal(contract.auditor.encryption_key, data, info=info, aad=deposit._place(contract))

    def test_packed_rows_come_back_as_they_were(self) -> None:
        examples, salts = self.rows()
        salts[0] = bytes(31) + b"\x01"  # zeros at an end are salt too
        salts[1] = b"\x01" + bytes(31)
        found, found_salts = unpack_rows(pack_rows(examples, salts), 2)
        assert np.array_equal(found.x, examples.x)
        assert np.array_equal(found.y, examples.y)
        assert list(found_salts) == salts
        for wrong in (b"", pack_rows(examples, salts)[:-1], pack_rows(examples, salts) + b"x"):
            with pytest.raises(InputError) as caught:
                unpack_rows(wrong, 2)
            assert caught.value.code == "VALIDATION_ROWS"
        with pytest.raises(InputError):
            unpack_rows(pack_rows(examples, salts).replace(b"fedpact.row.v1:", b"fedpact.row.v2:", 1), 2)

    def test_it_opens_for_the_auditor_and_this_contract_alone(self) -> None:
        examples, salts = self.rows()
        contract = self.contract_of(examples, salts)
        data = self.seal(contract, pack_rows(examples, salts))
        assert np.array_equal(deposit.unseal(data, OPENING_KEY, contract).x, examples.x)
        other = self.contract_of(examples, salts, title="Another")
        for key, place in ((X25519PrivateKey.generate(), contract), (OPENING_KEY, other)):
            with pytest.raises(FaultError) as caught:
                deposit.unseal(data, key, place)
            assert caught.value.code == "SEAL_BROKEN"

    def test_other_rows_than_the_committed_ones_are_found(self) -> None:
        examples, salts = self.rows()
        contract = self.contract_of(examples, salts)
        other = Examples(x=examples.x, y=1 - examples.y)
        for data, code in (
            (pack_rows(other, salts), "DEPOSIT_ROOT"),
            (pack_rows(examples, salts[::-1]), "DEPOSIT_ROOT"),
            (pack_rows(examples, [salts[0]] * 5), "DEPOSIT_ROWS"),
            (b"nonsense", "DEPOSIT_ROWS"),
            (b"", "DEPOSIT_ROWS"),
        ):
            with pytest.raises(FaultError) as caught:
                deposit.unseal(self.seal(contract, data), OPENING_KEY, contract)
            assert caught.value.code == code

    @pytest.mark.parametrize("spoil", ["class", "nan", "count"])
    def test_committed_rows_that_nothing_can_be_measured_on_are_found(self, spoil: str) -> None:
        examples, salts = self.rows()
        if spoil == "class":
            examples.y[0] = 7
        if spoil == "nan":
            examples.x[0, 0] = np.nan
        contract = self.contract_of(examples, salts)
        if spoil == "count":
            values = contract.plain()
            values["contribution"]["validation"]["slices"][0]["count"] = 6
            contract = Contract.parse(values)
        with pytest.raises(FaultError) as caught:
            deposit.unseal(self.seal(contract, pack_rows(examples, salts)), OPENING_KEY, contract)
        assert caught.value.code == "DEPOSIT_ROWS"


def _kept(run: ClosedRun, digest: str) -> bytes:
    assert run.federation.contract.auditor == AUDITOR
    rows = validation.load(run.home, run.federation.contract.contribution.validation.root)
    data = deposit.path(run.home / "arrays" / run.contract_id, digest).read_bytes()
    assert rows.examples.x.tobytes() not in data
    return data
