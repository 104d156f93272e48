"""A contract from template to entry 0: what is derived, who signs, and everything that is refused on the way."""

import dataclasses
import datetime
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from tests.support.auditor_kit import AUDITOR
from tests.support.operator_world import (
    NOW,
    PASSPHRASE,
    ROWS,
    TEMPLATE,
    Enterprise,
    Operator,
    enterprise,
    operator,
    run_key_of,
)

from fedpact_contract.auditor import card_text
from fedpact_contract.contract import Contract, Delegation
from fedpact_contract.errors import FaultError, FedpactError, InputError, RefusedError
from fedpact_contract.keys import generate_key, public_hex
from fedpact_contract.log import Checkpoint, ContractSigned
from fedpact_contract.parties import open_parties
from fedpact_contract.privacy import ACCOUNTANT, check_plan, epsilon_pld
from fedpact_contract.record import Envelope, open_signed, sign
from fedpact_models.registry import parameter_count
from fedpact_server import cards, contracts, db, drafting, enrolment, installed, logbook, validation
from fedpact_server.drafting import ValidationFile, new
from fedpact_server.run_state import load_model

PARTIES = tuple(enterprise(n) for n in (1, 2, 3))


def code_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(FedpactError) as err:
        call(*args, **kwargs)
    return err.value.code


@pytest.fixture
def world(tmp_path: Path) -> Operator:
    made = operator(tmp_path)
    made.admit(*PARTIES)
    (tmp_path / "rows.csv").write_text(ROWS)
    return made


def rows_of(world: Operator) -> ValidationFile:
    return ValidationFile(path=world.home.path.parent / "rows.csv")


def draft(world: Operator, template: str = TEMPLATE, **options: Any) -> Contract:
    return new(world.home, world.database, template, rows_of(world), now=NOW, **options)


def offered(world: Operator) -> Contract:
    contract = draft(world)
    contracts.offer(world.database, contract.id, now=NOW)
    return contract


def operator_signs(world: Operator, contract: Contract, now: datetime.datetime = NOW) -> contracts.Status:
    return contracts.sign(world.home, world.database, contract.id, PASSPHRASE, now=now)


def take(
    world: Operator,
    contract: Contract,
    who: Enterprise,
    signed: tuple[Envelope[Contract], Envelope[Delegation]] | None = None,
    now: datetime.datetime = NOW,
) -> contracts.Status:
    envelope, delegation = signed or who.signature(contract)
    return contracts.accept_signature(
        world.home, world.database, contract.id, who.id, envelope=envelope, delegation=delegation, now=now
    )


def state_of(world: Operator, contract: Contract) -> str:
    with world.database.read() as connection:
        return contracts.find(connection, contract.id).state


class TestNew:
    def test_what_is_derived(self, world: Operator) -> None:
        contract = draft(world)
        assert contract.operator == world.home.party
        assert [(p.id, p.name, p.sector, p.num_examples, p.floor_fen) for p in contract.participants] == [
            (who.id, who.name, "medical", 100 + who.number, 100 if who.number == 1 else 0) for who in PARTIES
        ]
        assert [p.gate_order for p in contract.participants] == [Decimal("4.3")] * 3, "their cards' alpha"
        assert contract.privacy.accountant == ACCOUNTANT
        group = (contract.privacy.noise_multiplier, contract.privacy.sample_rate, contract.planned_steps)
        assert Decimal("1.95") < epsilon_pld([group], contract.privacy.delta) <= 2
        check_plan(contract)
        zeros = np.zeros(parameter_count(contract.model, contract.data))
        assert np.array_equal(load_model(world.home.path, contract.model.initial_digest), zeros)
        rows = validation.load(world.home.path, contract.contribution.validation.root)
        assert rows.slices == contract.contribution.validation.slices
        assert [(s.source, s.count) for s in rows.slices] == [("operator", 30)]
        assert contract.code == installed.installed_code()

    def test_it_is_kept_as_a_draft_with_its_canonical_bytes(self, world: Operator) -> None:
        contract = draft(world)
        with world.database.read() as connection:
            stored = contracts.find(connection, contract.id[:6])
            assert [s.contract.id for s in contracts.every(connection)] == [contract.id]
        assert (stored.contract, stored.payload, stored.state) == (contract, contract.to_bytes(), "draft")

    def test_released_rows_are_taken_on_demand_in_the_order_of_ids(self, world: Operator) -> None:
        for who in PARTIES[:2]:
            with world.database.write() as connection:
                member = enrolment.find(connection, who.id)
                row = {"age": 40, "sex": "f", "ill": "no" if who is PARTIES[0] else "yes"}
                cards.accept_card(connection, member, who.card(released_rows=who.number), [row] * who.number)
        assert len(draft(world).contribution.validation.slices) == 1
        contract = draft(world, released=True)
        expected = sorted((who.id, who.number) for who in PARTIES[:2])
        assert [(s.source, s.count) for s in contract.contribution.validation.slices] == [("operator", 30), *expected]
        alone = new(world.home, world.database, TEMPLATE, None, now=NOW, released=True)
        assert [(s.source, s.count) for s in alone.contribution.validation.slices] == expected

    def test_no_validation_rows_at_all_are_refused(self, world: Operator) -> None:
        assert code_of(new, world.home, world.database, TEMPLATE, None, now=NOW) == "VALIDATION_EMPTY"

    def test_an_mlp_starts_from_random_weights(self, world: Operator) -> None:
        template = TEMPLATE.replace('kind = "softmax"\nhidden = []', 'kind = "mlp"\nhidden = [4]')
        contract = draft(world, template)
        weights = load_model(world.home.path, contract.model.initial_digest)
        assert weights.size == parameter_count(contract.model, contract.data)
        assert len(set(weights)) > 1

    @pytest.mark.parametrize(
        ("old", "new_text", "code", "field"),
        [
            ("[data]\n", '[data]\ncolour = "red"\n', "CONTRACT_UNKNOWN_KEY", "data.colour"),
            ('title = "Heart disease"', 'title = "Heart"\ncolour = 1', "CONTRACT_UNKNOWN_KEY", "colour"),
            ("floor_fen = 100", "floor_fen = 100\nbonus = 1", "CONTRACT_UNKNOWN_KEY", "participants.0.bonus"),
            ("epsilon = 2", "epsilon = -2", "CONTRACT_NOT_POSITIVE", "privacy.epsilon"),
            ("epsilon = 2", "epsilon = 0", "CONTRACT_NOT_POSITIVE", "privacy.epsilon"),
            ("epsilon = 2", 'epsilon = "two"', "CONTRACT", "privacy.epsilon"),
            ("epsilon = 2\n", "", "CONTRACT_MISSING_KEY", "privacy.epsilon"),
            ("head_threshold = 1\n", "", "CONTRACT_MISSING_KEY", "participation.head_threshold"),
            ("delta = 0.00001", "delta = 0.01", "CONTRACT_DELTA", "privacy.delta"),
            ("sample_rate = 0.2", "sample_rate = 1", "CONTRACT_SAMPLE_RATE", "privacy.sample_rate"),
            ("minimum = 3", "minimum = 4", "CONTRACT_MINIMUM", "participation.minimum"),
            ("equal_weight = 0.1", "equal_weight = 0.2", "CONTRACT_WEIGHTS", "settlement"),
            ('fallback = "metered"', 'fallback = "none"', "CONTRACT", "settlement.fallback"),
            ('fallback = "metered"\n', "", "CONTRACT_MISSING_KEY", "settlement.fallback"),
            ('aggregation = "weighted-mean"', 'aggregation = "trimmed-mean"', "CONTRACT", "training.aggregation"),
            ('unit = "example"', 'unit = "person"', "CONTRACT", "privacy.unit"),
            ('not_after = "2099-11-01T00:00:00Z"', 'not_after = "2026-11-24T12:00:00Z"', "CONTRACT_EXPIRED", None),
            ("spare_attempts = 1", "spare_attempts = 1\nnoise_multiplier = 1", "TEMPLATE_DERIVED_KEY", None),
            (
                "floor_fen = 100",
                "floor_fen = 100\nnum_examples = 5",
                "TEMPLATE_DERIVED_KEY",
                "participants.0.num_examples",
            ),
            ('purpose = "disease-prediction"', 'purpose = "x"\n[code]\nrelease = "1"', "TEMPLATE_DERIVED_KEY", None),
            ("91310000MA1K000003", "91310000MA1K000009", "TEMPLATE_NOT_APPROVED", "participants.2.entity_code"),
            ('data_set = "set-3"', 'data_set = "set-9"', "TEMPLATE_NO_CARD", "participants.2.data_set"),
            ('data_set = "set-3"\n', "", "CONTRACT_MISSING_KEY", "participants.2.data_set"),
            ('name = "age"', 'name = "weight"', "TEMPLATE_CARD_COLUMN", "data.columns"),
            ('name = "ill"', 'name = "dead"', "TEMPLATE_CARD_LABEL", "data.label.name"),
            ("91310000MA1K000003", "91310000MA1K000002", "TEMPLATE_NO_CARD", None),
            ('title = "Heart disease"', "title = ", "TOML_SYNTAX", None),
        ],
    )
    def test_a_template_that_is_wrong_is_refused_by_name(
        self, world: Operator, old: str, new_text: str, code: str, field: str | None
    ) -> None:
        assert old in TEMPLATE
        with pytest.raises(InputError) as err:
            draft(world, TEMPLATE.replace(old, new_text), file="template.toml")
        assert err.value.code == code
        if field is not None:
            assert err.value.field == field
        with world.database.read() as connection:
            assert contracts.every(connection) == []

    def test_affiliates_of_one_party_are_named_as_under_common_control(self, world: Operator) -> None:
        codes = [f"91310000MA1K{i:06d}" for i in (1, 2)]
        clauses = "".join(
            f'[[affiliates]]\nname = "Hospital {i}"\nentity_code = "{code}"\nof = "operator"\n'
            for i, code in enumerate(codes, start=1)
        )
        text = TEMPLATE.replace("minimum = 3", "minimum = 2") + clauses
        text = text.replace("contribution_weight = 0.7", "contribution_weight = 0")
        text = text.replace("equal_weight = 0.1", "equal_weight = 0.8")
        with pytest.raises(InputError) as err:
            draft(world, text)
        assert (err.value.code, err.value.party) == ("TEMPLATE_COMMON_CONTROL", "Hospital 1")
        assert "Hospital 1, Hospital 2 are under common control" in err.value.message
        named = draft(world, text + f'[[common_control]]\nname = "City"\nmembers = ["{codes[0]}", "{codes[1]}"]\n')
        assert named.common_control is not None
        assert named.counted_once(p.id for p in named.participants) == 2

    def test_the_column_of_an_event_stands_on_every_card(self, world: Operator) -> None:
        text = TEMPLATE.replace('kind = "softmax"', 'kind = "linear"').replace("cross-entropy", "discrete-hazard")
        for event, code in (("died", "TEMPLATE_CARD_COLUMN"), ("sex", "DATA_NOT_A_NUMBER")):
            label = f'event = "{event}"\noutcomes = ["f", "m"]\ncuts = [1, 2]\nrule = "survival"'
            survival = text.replace('classes = ["no", "yes"]\nrule = "value"', label)
            if event == "sex":  # every card has it; then it is no feature, and the rows are read
                start = survival.index('[[data.columns]]\nname = "sex"')
                survival = survival[:start] + survival[survival.index("[data.label]") :]
            with pytest.raises(InputError) as err:
                draft(world, survival)
            assert err.value.code == code
            if event == "died":
                assert err.value.field == "data.label.event"

    def test_a_template_without_participants_is_refused(self, world: Operator) -> None:
        for text in ("", "participants = 3\n", "participants = []\n", "participants = [1]\n"):
            assert code_of(draft, world, text) == "TEMPLATE_PARTICIPANTS"

    def test_validation_rows_that_do_not_fit_the_schema_are_refused(self, world: Operator) -> None:
        path = world.home.path.parent / "rows.csv"
        for text, code in (
            ("age,sex\n1,f\n", "DATA_LABEL_MISSING"),
            ("age,sex,ill\nx,f,no\n", "DATA_NOT_A_NUMBER"),
            ("", "DATA_EMPTY"),
        ):
            path.write_text(text)
            assert code_of(draft, world) == code
        path.unlink()
        assert code_of(draft, world) == "DATA_FILE_MISSING"

    def test_an_auditor_stands_as_its_own_table_says_and_nobody_waits_for_its_signature(self, world: Operator) -> None:
        contract = draft(world, f"{TEMPLATE}\n{card_text(AUDITOR)}")
        assert contract.auditor == AUDITOR
        assert AUDITOR.id not in contracts.offer(world.database, contract.id, now=NOW).missing
        own = card_text(AUDITOR.model_copy(update={"entity_code": world.home.party.entity_code}))
        assert code_of(draft, world, f"{TEMPLATE}\n{own}") == "CONTRACT_PARTY_TWICE"

    def test_a_participant_must_be_approved(self, world: Operator) -> None:
        enrolment.suspend(world.database, selector=PARTIES[2].id, now=NOW)
        assert code_of(draft, world) == "TEMPLATE_NOT_APPROVED"

    def test_an_epsilon_that_promises_nothing_is_refused(self, world: Operator) -> None:
        assert code_of(draft, world, TEMPLATE.replace("epsilon = 2", "epsilon = 101")) == "PRIVACY_RANGE"


class TestSigning:
    def test_all_sign_and_entry_0_is_what_everybody_signed(self, world: Operator) -> None:
        contract = offered(world)
        assert operator_signs(world, contract).missing == tuple(who.id for who in PARTIES)
        for who in PARTIES:
            status = take(world, contract, who)
        assert (status.state, status.missing) == ("signed", ())
        with world.database.read() as connection:
            (entry,) = logbook.read_entries(connection, contract.id)
            checkpoints = logbook.signed_checkpoints(connection, contract.id)
        body = entry.open()
        assert isinstance(body, ContractSigned)
        parties, faults = open_parties(entry)
        assert faults == []
        assert parties is not None
        assert parties.contract == contract
        assert parties.run_keys == {
            world.home.fingerprint: public_hex(world.home.run_key(contract.id)),
            **{who.id: public_hex(run_key_of(who.number)) for who in PARTIES},
        }
        keys = [s.key for s in body.signed.contract.signatures]
        assert keys == sorted(keys)
        assert len(keys) == 4
        head = open_signed(checkpoints[1], Checkpoint, public_hex(world.home.run_key(contract.id)))
        assert (head.origin, head.size, head.root) == (contract.id, 1, entry.leaf_hash.hex())

    def test_the_operator_may_sign_last(self, world: Operator) -> None:
        contract = offered(world)
        for who in PARTIES:
            assert take(world, contract, who).state == "offered"
        assert operator_signs(world, contract).state == "signed"
        with world.database.read() as connection:
            assert logbook.size(connection, contract.id) == 1

    def test_status_says_who_is_missing(self, world: Operator) -> None:
        contract = offered(world)
        take(world, contract, PARTIES[1])
        with world.database.read() as connection:
            plain = contracts.status(connection, contracts.find(connection, contract.id)).plain()
        assert plain["signed"] == [PARTIES[1].id]
        assert plain["missing"] == [world.home.fingerprint, PARTIES[0].id, PARTIES[2].id], "the contract's order"
        assert [p["id"] for p in plain["parties"]] == [world.home.fingerprint, *(p.id for p in contract.participants)]
        assert {p["name"]: p["signed"] for p in plain["parties"]} == {
            "City Data": False,
            "Hospital 1": False,
            "Hospital 2": True,
            "Hospital 3": False,
        }

    def test_the_same_signature_again_changes_nothing(self, world: Operator) -> None:
        contract = offered(world)
        operator_signs(world, contract)
        first = take(world, contract, PARTIES[0])
        assert take(world, contract, PARTIES[0]) == first
        assert operator_signs(world, contract) == first
        for who in PARTIES[1:]:
            take(world, contract, who)
        assert take(world, contract, PARTIES[0]).state == "signed"
        assert operator_signs(world, contract).state == "signed"
        with world.database.read() as connection:
            assert logbook.size(connection, contract.id) == 1

    def test_a_draft_is_signed_by_nobody(self, world: Operator) -> None:
        contract = draft(world)
        assert code_of(operator_signs, world, contract) == "CONTRACT_STATE"
        assert code_of(take, world, contract, PARTIES[0]) == "CONTRACT_STATE"

    def test_a_wrong_passphrase_makes_no_run_key(self, world: Operator) -> None:
        contract = offered(world)
        assert code_of(contracts.sign, world.home, world.database, contract.id, b"wrong horse", now=NOW) == (
            "KEY_PASSPHRASE"
        )
        assert not world.home.run_key_path(contract.id).exists()

    def test_signatures_that_do_not_hold_are_faults(self, world: Operator) -> None:
        contract, other = offered(world), draft(world)
        who = PARTIES[0]
        envelope, delegation = who.signature(contract)
        stranger = Enterprise(1, generate_key(), who.node_key)
        spoiled = envelope.plain()
        value = spoiled["signatures"][0]["value"]
        spoiled["signatures"][0]["value"] = value[:-1] + ("0" if value[-1] != "0" else "1")
        changed_byte = Envelope[Any].parse(spoiled, code="TEST")
        unsigned = envelope.model_copy(update={"signatures": ()})
        twice = sign(contract, who.contract_key, PARTIES[1].contract_key)
        cases = [
            ((who.signature(other)[0], delegation), "SIGNED_OTHER_BYTES"),
            ((changed_byte, delegation), "SIGNATURE_INVALID"),
            ((unsigned, delegation), "SIGNATURE_COUNT"),
            ((twice, delegation), "SIGNATURE_COUNT"),
            ((stranger.signature(contract)[0], delegation), "SIGNATURE_MISSING"),
            ((envelope, stranger.signature(contract)[1]), "SIGNATURE_MISSING"),
            ((envelope, who.signature(other)[1]), "DELEGATION_PLACE"),
            ((envelope, delegation.model_copy(update={"signatures": ()})), "SIGNATURE_COUNT"),
            ((delegation, delegation), "SIGNED_OTHER_BYTES"),
            ((envelope, who.signature(contract, who.contract_key)[1]), "RUN_KEY_TAKEN"),
        ]
        for signed, code in cases:
            with pytest.raises(FaultError) as err:
                take(world, contract, who, signed)
            assert err.value.code == code
        of_another = Delegation(contract_id=contract.id, party=PARTIES[1].id, run_key=public_hex(run_key_of(1)))
        assert code_of(take, world, contract, who, (envelope, sign(of_another, who.contract_key))) == (
            "DELEGATION_PLACE"
        )
        with world.database.read() as connection:
            assert connection.execute(sa.select(db.signatures)).all() == []

    def test_a_run_key_is_nobody_elses(self, world: Operator) -> None:
        contract = offered(world)
        take(world, contract, PARTIES[0])
        borrowed = PARTIES[1].signature(contract, run_key_of(1))
        assert code_of(take, world, contract, PARTIES[1], borrowed) == "RUN_KEY_TAKEN"

    def test_a_second_run_key_is_refused(self, world: Operator) -> None:
        contract = offered(world)
        take(world, contract, PARTIES[0])
        with pytest.raises(RefusedError) as err:
            take(world, contract, PARTIES[0], PARTIES[0].signature(contract, generate_key()))
        assert err.value.code == "SIGNED_OTHERWISE"

    def test_only_parties_sign(self, world: Operator) -> None:
        contract = offered(world)
        assert code_of(take, world, contract, enterprise(4)) == "CONTRACT_NOT_A_PARTY"

    def test_nobody_signs_after_the_term(self, world: Operator) -> None:
        contract = offered(world)
        late = datetime.datetime(2099, 11, 1, tzinfo=datetime.UTC)
        assert code_of(operator_signs, world, contract, late) == "CONTRACT_EXPIRED"
        assert code_of(take, world, contract, PARTIES[0], None, late) == "CONTRACT_EXPIRED"

    def test_validation_rows_of_other_givers_are_not_signed_for(self, world: Operator, monkeypatch: Any) -> None:
        contract = offered(world)
        kept = validation.load(world.home.path, contract.contribution.validation.root)
        (own,) = kept.slices
        others = dataclasses.replace(kept, slices=(own.model_copy(update={"source": PARTIES[0].id}),))
        monkeypatch.setattr(validation, "load", lambda *_: others)
        assert code_of(operator_signs, world, contract) == "VALIDATION_SLICES"

    def test_a_baseline_too_large_for_one_request_is_refused(self, world: Operator, monkeypatch: Any) -> None:
        asked = TEMPLATE + "\n[baseline]\nsteps = 1\n"
        monkeypatch.setattr(drafting, "BASELINE_PARAMETERS", 7)
        assert code_of(draft, world, asked) == "TEMPLATE_BASELINE_SIZE"
        monkeypatch.setattr(drafting, "BASELINE_PARAMETERS", 8)
        assert draft(world, asked).baseline is not None

    def test_the_operator_signs_only_what_it_can_keep(self, world: Operator, monkeypatch: Any, tmp_path: Path) -> None:
        contract = offered(world)
        model = world.home.path / "models" / f"{contract.model.initial_digest}.f8"
        kept = model.read_bytes()
        model.write_bytes(kept[:-1] + b"\x01")
        assert code_of(operator_signs, world, contract) == "MODEL_DIGEST"
        model.write_bytes(kept)
        folder = world.home.path / "validation" / contract.contribution.validation.root
        folder.rename(folder.with_name("away"))
        assert code_of(operator_signs, world, contract) == "VALIDATION_MISSING"
        folder.with_name("away").rename(folder)
        code = installed.installed_code()
        monkeypatch.setattr(contracts, "installed_code", lambda: code.model_copy(update={"models_digest": "9" * 64}))
        assert code_of(operator_signs, world, contract) == "CONTRACT_CODE"
        monkeypatch.undo()
        foreign = operator(tmp_path / "other")
        assert code_of(contracts.sign, foreign.home, world.database, contract.id, PASSPHRASE, now=NOW) == (
            "CONTRACT_OPERATOR"
        )
        assert operator_signs(world, contract).state == "offered"

    def test_a_lost_run_key_is_the_operators_failure_and_keeps_no_half_contract(self, world: Operator) -> None:
        contract = offered(world)
        operator_signs(world, contract)
        take(world, contract, PARTIES[0])
        take(world, contract, PARTIES[1])
        path = world.home.run_key_path(contract.id)
        kept = path.read_bytes()
        path.unlink()
        assert code_of(take, world, contract, PARTIES[2]) == "RUN_KEY_MISSING"
        assert state_of(world, contract) == "offered"
        path.write_bytes(kept)
        path.chmod(0o600)
        assert take(world, contract, PARTIES[2]).state == "signed"


class TestLife:
    def test_an_offer_needs_its_participants_approved(self, world: Operator) -> None:
        contract = draft(world)
        enrolment.suspend(world.database, selector=PARTIES[0].id, now=NOW)
        assert code_of(contracts.offer, world.database, contract.id, now=NOW) == "PARTICIPANT_NOT_ACTIVE"
        assert state_of(world, contract) == "draft"

    def test_an_offer_recomputes_what_the_plan_costs(self, world: Operator) -> None:
        """A draft of another release, or one that somebody wrote into the database."""
        plain = draft(world).plain()
        plain["privacy"]["epsilon"] = "0.01"
        cheap = Contract.parse(plain)
        with world.database.write() as connection:
            connection.execute(db.contracts.insert().values(id=cheap.id, payload=cheap.to_bytes(), state="draft"))
        assert code_of(contracts.offer, world.database, cheap.id, now=NOW) == "CONTRACT_NOISE_TOO_SMALL"
        assert state_of(world, cheap) == "draft"

    def test_an_offer_again_changes_nothing(self, world: Operator) -> None:
        contract = offered(world)
        assert contracts.offer(world.database, contract.id, now=NOW).state == "offered"
        late = datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC)
        assert code_of(contracts.offer, world.database, draft(world).id, now=late) == "CONTRACT_EXPIRED"

    def test_a_terminated_contract_takes_nothing_more_and_its_run_is_to_stop(self, world: Operator) -> None:
        contract = offered(world)
        with world.database.write() as connection:
            connection.execute(
                db.runs.insert().values(
                    contract_id=contract.id, phase="running", wanted="run", started="2026-11-24T12:00:00Z"
                )
            )
        assert contracts.terminate(world.database, contract.id, now=NOW).state == "terminated"
        assert contracts.terminate(world.database, contract.id, now=NOW).state == "terminated"
        assert code_of(take, world, contract, PARTIES[0]) == "CONTRACT_STATE"
        assert code_of(operator_signs, world, contract) == "CONTRACT_STATE"
        assert code_of(contracts.offer, world.database, contract.id, now=NOW) == "CONTRACT_STATE"
        with world.database.read() as connection:
            assert connection.execute(sa.select(db.runs.c.wanted)).scalar() == "stop"
            alarms = connection.execute(sa.select(db.alarms.c.code, db.alarms.c.detail)).all()
        assert [tuple(row) for row in alarms] == [("CONTRACT_TERMINATED", contract.id)], "told once"

    def test_a_contract_is_found_by_the_beginning_of_its_id(self, world: Operator) -> None:
        contract = draft(world)
        with world.database.read() as connection:
            assert contracts.find(connection, contract.id[:4].upper()).contract == contract
            for selector in ("", "abc", "%%%%", "____", "zzzz", "0" * 64):
                assert code_of(contracts.find, connection, selector) == "CONTRACT_UNKNOWN"
