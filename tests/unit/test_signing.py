"""Signing: whatever the operator serves is checked against what is known here, and refused by a code of its own."""

import base64
import datetime
import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.agent_world import (
    DATA_SET,
    PASSPHRASE,
    ROWS,
    Lab,
    contract,
    lab,
)
from tests.support.operator_world import enterprise

from fedpact_client import cards, trial
from fedpact_client import review as reviews
from fedpact_client.config import AgentConfig
from fedpact_client.frames import Frame, FrameError
from fedpact_client.review import check_schema, check_trust, standing
from fedpact_client.signing import commit, fetch_offer, fetch_signed, verify_signatures
from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.contract import Contract, Delegation, SignedContract
from fedpact_contract.errors import FaultError, FedpactError, InputError, RefusedError, ServiceError
from fedpact_contract.files import replace_file
from fedpact_contract.keys import generate_key, public_hex
from fedpact_contract.messages import DataSetCard
from fedpact_contract.privacy import epsilon_pld, rdp
from fedpact_contract.record import sign
from fedpact_contract.request import instant, utc_now
from fedpact_contract.trust import Trust

STRANGER = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
"""A public key that nobody here has (RFC 8032, 7.1, test 1)."""
ENTITY = {"column": "who", "max_rows": 2, "method": "mixture-of-gaussians", "epsilon": 99, "delta": "0.00001"}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Lab]:
    with lab(tmp_path) as made:
        made.enrol()
        made.approve()
        made.configure()
        made.declare()
        yield made


def look(world: Lab, offered: Contract, *, read_data: bool = False) -> reviews.Review:
    return reviews.review(world.home, world.home.config(), world.store, offered, utc_now(), read_data=read_data)


def refusal(world: Lab, offered: Contract) -> FedpactError:
    with pytest.raises(FedpactError) as caught:
        look(world, offered).refuse()
    return caught.value


def changed(offered: Contract, path: str, value: Any) -> Contract:
    values = offered.plain()
    *parents, last = path.split(".")
    place: Any = values
    for part in parents:
        place = place[int(part) if part.isdigit() else part]
    place[last] = value
    return Contract.parse(values)


def own_place(world: Lab, offered: Contract) -> int:
    return [p.id for p in offered.participants].index(world.home.participant_id)


def sign_it(world: Lab, offered: Contract) -> None:
    with world.client() as client:
        commit(world.home, world.store, client, look(world, offered), PASSPHRASE)


# What is fetched


def test_an_offer_is_fetched_with_its_signatures(world: Lab) -> None:
    offered = world.offer()
    with world.client() as client:
        empty = fetch_offer(client, offered.id)
        with pytest.raises(RefusedError, match="CONTRACT_NOT_SIGNED"):
            fetch_signed(client, offered.id)
    assert (empty.contract, empty.state, empty.signed, empty.complete) == (offered, "offered", frozenset(), False)
    world.others_sign(offered)
    with world.client() as client:
        partly = fetch_offer(client, offered.id)
    assert partly.signed == set(offered.parties()) - {world.home.participant_id}
    sign_it(world, offered)
    with world.client() as client:
        whole = fetch_offer(client, offered.id)
        travelling = fetch_signed(client, offered.id)
    assert whole.complete
    assert whole.state == "signed"
    assert verify_signatures(offered, travelling) == set(offered.parties())


def test_another_contract_than_asked_for_is_noticed(world: Lab) -> None:
    offered = world.offer()
    other = changed(offered, "purpose", "advertising")

    def swap(content: bytes) -> bytes:
        return json.dumps(json.loads(content) | {"payload": other.to_bytes().decode()}).encode()

    world.wire.replace["GET /contracts/"] = swap
    with world.client() as client, pytest.raises(FaultError, match="CONTRACT_ID_WRONG"):
        fetch_offer(client, offered.id)


@pytest.mark.parametrize("answer", [{}, {"payload": 1, "state": "x"}, {"payload": "{}", "state": None}])
def test_an_answer_of_another_form_is_refused(world: Lab, answer: dict[str, Any]) -> None:
    offered = world.offer()
    world.wire.replace["GET /contracts/"] = lambda _: json.dumps(answer).encode()
    with world.client() as client, pytest.raises(ServiceError, match="OPERATOR_REPLY"):
        fetch_offer(client, offered.id)


def tampered(answer: dict[str, Any], how: str, offered: Contract) -> dict[str, Any]:
    stranger, run = generate_key(), generate_key()
    two = enterprise(2)
    delegations = answer["delegations"]
    if how == "signature of a stranger":
        envelope = sign(offered, stranger)
        answer["contract"]["signatures"].append(envelope.plain()["signatures"][0])
    elif how == "flipped signature":
        value = answer["contract"]["signatures"][0]["value"]
        answer["contract"]["signatures"][0]["value"] = ("0" if value[0] != "0" else "1") + value[1:]
    elif how == "signatures on another contract":
        other = changed(offered, "purpose", "advertising")
        answer["contract"]["payload"] = base64.b64encode(other.to_bytes()).decode()
    elif how == "delegation by another key":
        record = Delegation(contract_id=offered.id, party=two.id, run_key=public_hex(run))
        delegations.append(sign(record, stranger).plain())
    elif how == "delegation for another contract":
        record = Delegation(contract_id="ab" * 32, party=two.id, run_key=public_hex(run))
        delegations[:] = [sign(record, two.contract_key).plain()]
    elif how == "two run keys":
        record = Delegation(contract_id=offered.id, party=two.id, run_key=public_hex(run))
        delegations.append(sign(record, two.contract_key).plain())
    return answer


@pytest.mark.parametrize(
    "how",
    [
        "signature of a stranger",
        "flipped signature",
        "signatures on another contract",
        "delegation by another key",
        "delegation for another contract",
        "two run keys",
    ],
)
def test_a_signature_that_does_not_hold_is_a_fault(world: Lab, how: str) -> None:
    offered = world.offer()
    world.others_sign(offered)
    world.wire.replace["GET /contracts/"] = lambda c: json.dumps(tampered(json.loads(c), how, offered)).encode()
    with world.client() as client, pytest.raises(FaultError):
        fetch_offer(client, offered.id)


# What is checked


def test_a_contract_that_fits_passes_every_check(world: Lab) -> None:
    found = look(world, world.offer())
    assert [check.name for check in found.checks if check.error] == []
    assert found.refuse() is None
    assert not found.signed_here


def test_the_cost_is_that_of_the_whole_plan(world: Lab) -> None:
    offered = world.offer()
    cost, plan = look(world, offered).cost, offered.privacy
    assert cost is not None
    alpha = world.store.data_set("set-1").alpha
    one = rdp(plan.noise_multiplier, plan.sample_rate, 1, alpha)
    assert (cost.attempts, cost.before, cost.after) == (3, 0, 3 * one)
    assert cost.epsilon == epsilon_pld([(plan.noise_multiplier, plan.sample_rate, 3)], plan.delta) <= plan.epsilon
    assert cost.limit == world.store.data_set("set-1").limit


def test_a_contract_without_this_enterprise_is_no_offer(world: Lab) -> None:
    with pytest.raises(InputError, match="CONTRACT_NOT_A_PARTY"):
        look(world, contract())


@pytest.mark.parametrize(
    ("path", "value", "code"),
    [
        ("operator.key", STRANGER, "SIGN_OPERATOR"),
        ("operator.entity_code", "91310000MA1K888888", "SIGN_OPERATOR"),
        ("participants.OWN.entity_code", "91310000MA1K000009", "TRUST_CONTRADICTION"),
        ("participants.OWN.data_set", "set-9", "CONFIG_DATA_SET"),
        ("participants.OWN.num_examples", 41, "SIGN_NUM_EXAMPLES"),
        ("participants.OWN.gate_order", "4.4", "SIGN_GATE_ORDER"),
        ("participants.OWN.gate_order", None, "SIGN_GATE_ORDER"),
        ("data.columns.0.name", "income", "SIGN_COLUMNS"),
        ("data.label.name", "dead", "SIGN_LABEL"),
        ("privacy.entity", ENTITY, "SIGN_ENTITY_COLUMN"),
        ("code.models_digest", "ab" * 32, "CODE_MODELS_MISMATCH"),
        ("privacy.noise_multiplier", "0.3", "CONTRACT_NOISE_TOO_SMALL"),
        ("privacy.noise_multiplier", "0.000001", "CONTRACT_NOISE_TOO_SMALL"),
        ("privacy.epsilon", "0.5", "CONTRACT_NOISE_TOO_SMALL"),
        ("privacy.accountant", "GDP", "CONTRACT_ACCOUNTANT"),
        ("purpose", "advertising", "POLICY_PURPOSE_MISMATCH"),
        ("privacy.epsilon", "3.1", "POLICY_EPSILON"),
        ("participation.minimum", 2, "POLICY_MIN_PARTICIPANTS"),
        ("term.not_after", "2999-01-01T00:00:00Z", "POLICY_EXPIRED"),
        ("participants.OTHER.key", STRANGER, None),
    ],
)
def test_each_thing_that_does_not_fit_is_refused(world: Lab, path: str, value: Any, code: str | None) -> None:
    offered = world.offer()
    own = own_place(world, offered)
    path = path.replace("OWN", str(own)).replace("OTHER", str((own + 1) % 3))
    other = changed(offered, path, value)
    if code is None:
        assert look(world, other).refuse() is None  # nobody told us that key: "vouched for by the operator only"
        return
    error = refusal(world, other)
    assert error.code == code
    assert error.message
    codes = {check.error.code for check in look(world, other).checks if check.error}
    assert code in codes


def test_the_column_of_an_event_is_one_that_the_data_set_declares() -> None:
    survival = {"name": "ill", "rule": "survival", "event": "sex", "outcomes": ["f", "m"], "cuts": ["30", "90"]}
    columns = [{"name": "age", "kind": "number", "low": "0", "high": "100", "missing": "drop"}]
    changes = {"data.columns": columns, "data.label": survival, "model.kind": "linear"}
    offered = contract(changes=changes | {"contribution.loss": "discrete-hazard"})
    declared = DataSetCard.model_construct(columns=("age", "sex"), label="ill")
    assert check_schema(declared, offered) is None
    with pytest.raises(RefusedError) as caught:
        check_schema(declared.model_copy(update={"columns": ("age",)}), offered)
    assert (caught.value.code, "sex" in caught.value.message) == ("SIGN_COLUMNS", True)


def test_the_entity_code_is_ours_even_where_the_trust_file_is_silent(world: Lab) -> None:
    offered = world.offer()
    own = own_place(world, offered)
    other = changed(offered, f"participants.{own}.entity_code", "91310000MA1K000009")
    me = other.participant(world.home.participant_id)
    with pytest.raises(RefusedError) as caught:
        reviews.check_own(world.home, world.home.config(), world.store, other, me)
    assert caught.value.code == "SIGN_ENTITY"


def test_validation_rows_that_were_not_released_are_refused(world: Lab) -> None:
    offered = world.offer()
    slices = [{"source": "operator", "count": 20}, {"source": world.home.participant_id, "count": 1}]
    assert refusal(world, changed(offered, "contribution.validation.slices", slices)).code == "SIGN_SLICE"


def test_without_a_card_nothing_is_signed(world: Lab) -> None:
    world.configure(data_set=DATA_SET.replace("set-1", "set-8"))
    offered = world.offer()
    other = changed(offered, f"participants.{own_place(world, offered)}.data_set", "set-8")
    found = look(world, other)
    assert [(c.name, c.error.code) for c in found.checks if c.error] == [("own data", "DATA_SET_UNKNOWN")]
    assert found.cost is not None, "what it would cost is told all the same"
    assert found.cost.before == 0


def test_a_card_and_agent_toml_that_differ_are_refused(world: Lab) -> None:
    offered = world.offer()
    text = world.home.config_path.read_text()
    replace_file(world.home.config_path, text.replace("num_examples = 40", "num_examples = 39").encode())
    assert refusal(world, offered).code == "SIGN_NUM_EXAMPLES"


@pytest.fixture
def of_patients(tmp_path: Path) -> Iterator[Lab]:
    """A data set whose card says whose a row is: thirty patients, two rows each."""
    with lab(tmp_path) as made:
        made.enrol()
        made.approve()
        head, *rows = ROWS.splitlines()
        lines = [f"{head},who", *(f"{row},p{i // 2}" for i, row in enumerate(rows))]
        made.configure(
            data_set=DATA_SET.replace('label = "ill"', 'label = "ill"\nentity = "who"'), rows="\n".join(lines)
        )
        made.declare()
        yield made


def test_a_card_that_says_whose_a_row_is_forces_the_clause(of_patients: Lab) -> None:
    plain = of_patients.offer()
    assert refusal(of_patients, plain).code == "POLICY_ENTITY"
    assert look(of_patients, changed(plain, "privacy.entity", ENTITY)).refuse() is None
    of_patients.configure(data_set="", max_epsilon="3\nmax_entity_epsilon = 98.9")
    error = refusal(of_patients, changed(plain, "privacy.entity", ENTITY))
    assert error.code == "POLICY_ENTITY_EPSILON"
    assert "99" in error.message
    assert "98.9" in error.message
    of_patients.configure(data_set="", max_epsilon="3\nrequire_entity = false")
    assert look(of_patients, plain).refuse() is None


def test_entities_have_a_line_of_their_own(of_patients: Lab) -> None:
    plain = of_patients.offer()
    verdicts = {c.name: c.error for c in look(of_patients, changed(plain, "privacy.entity", ENTITY)).checks}
    assert list(verdicts)[2:4] == ["own data", "entities"]
    assert verdicts["entities"] is None
    refused = {c.name: c.error.code for c in look(of_patients, plain).checks if c.error}
    assert refused == {"entities": "POLICY_ENTITY"}


@pytest.mark.parametrize("line", ["", 'entity = "sex2"\n'])
def test_an_entity_changed_since_the_card_is_refused(of_patients: Lab, line: str) -> None:
    offered = changed(of_patients.offer(), "privacy.entity", ENTITY)
    text = of_patients.home.config_path.read_text()
    replace_file(of_patients.home.config_path, text.replace('entity = "who"\n', line, 1).encode())
    error = refusal(of_patients, offered)
    assert (error.code, error.file, error.field) == ("CARD_ENTITY_CHANGED", "agent.toml", "data_sets.entity")


def test_a_source_moved_to_another_data_sets_file_is_refused(world: Lab) -> None:
    """set-1's file was declared; set-9 is declared with its own, then pointed at set-1's, which grew meanwhile."""
    offered = world.offer()
    (world.home.path / "own.csv").write_text(ROWS.replace("20,f,yes", "90,f,yes"))
    world.configure(data_set=DATA_SET.replace("set-1", "set-9").replace("rows.csv", "own.csv"))
    with world.client() as client:
        draft = cards.prepare(world.home, world.home.config(), world.store, "set-9")
        cards.declare(world.home, world.store, client, draft, PASSPHRASE)
    own = f"participants.{own_place(world, offered)}"
    other = changed(changed(offered, f"{own}.data_set", "set-9"), f"{own}.card", draft.card.digest())
    assert look(world, other).refuse() is None
    (world.home.path / "rows.csv").write_text(ROWS + "99,m,no\n")
    text = world.home.config_path.read_text()
    replace_file(world.home.config_path, text.replace("own.csv", "rows.csv", 1).encode())
    assert refusal(world, other).code == "DATA_SET_KNOWN_ELSEWHERE"


def test_a_term_still_to_come_can_be_signed_and_a_past_one_not(world: Lab) -> None:
    offered = world.offer()
    month = datetime.timedelta(days=30)
    later = changed(offered, "term.not_after", instant(utc_now() + 2 * month))
    later = changed(later, "term.not_before", instant(utc_now() + month))
    assert look(world, later).refuse() is None
    past = changed(offered, "term.not_before", "2025-01-01T00:00:00Z")
    assert refusal(world, changed(past, "term.not_after", "2025-02-01T00:00:00Z")).code == "POLICY_TERM"


def test_a_plan_beside_other_plans_must_fit(world: Lab) -> None:
    limit = world.store.data_set("set-1").limit
    signed = 0
    while signed < 30:
        offered = world.offer('title = "Heart disease"', f'title = "Heart disease {signed}"')
        found = look(world, offered)
        assert found.cost is not None
        if found.cost.after > limit:
            break
        sign_it(world, offered)
        signed += 1
    assert signed >= 2
    assert refusal(world, offered).code == "BUDGET_PLAN_EXCEEDED"
    assert world.store.budget("set-1").committed <= limit


def test_the_store_has_the_last_word_on_the_budget(world: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two `sign` commands at once: both reviews fit, the second signature does not."""
    offered = world.offer()
    found = look(world, offered)

    def exceeded(*_: object) -> None:
        raise RefusedError("BUDGET_EXCEEDED", "Too much.")

    monkeypatch.setattr(type(world.store), "add_contract", exceeded)
    with world.client() as client, pytest.raises(RefusedError) as caught:
        commit(world.home, world.store, client, found, PASSPHRASE)
    assert caught.value.code == "BUDGET_PLAN_EXCEEDED"
    assert "POST /contracts" not in "".join(world.wire.paths()[-1:])


# Fingerprints


def entry(role: str, code: str, fingerprint: str) -> dict[str, str]:
    return {"role": role, "name": "Somebody", "entity_code": code, "fingerprint": fingerprint}


def trusted(*entries: dict[str, str]) -> Trust:
    return Trust.parse({"party": list(entries)}, code="TRUST")


def test_a_known_key_is_told_from_one_that_the_operator_vouches_for() -> None:
    made = contract()
    own, beta, gamma = made.participants
    trust = trusted(entry("participant", beta.entity_code, beta.id))
    found = {p.name: standing(p, own.id, made, trust) for p in made.parties().values()}
    assert found == {"City Data": "operator only", "own": "self", "beta": "known", "gamma": "operator only"}
    assert check_trust(made, trust, "trust.toml") is None
    assert gamma.id not in {e.fingerprint for e in trust.party}


@pytest.mark.parametrize(
    "entries",
    [
        lambda p, made: [entry("participant", p.entity_code, "ab" * 32)],
        lambda p, made: [entry("operator", p.entity_code, "ab" * 32)],
        lambda p, made: [entry("participant", "91310000MA1K777777", p.id)],
        lambda p, made: [
            entry("operator", p.entity_code, p.id),
            entry("participant", p.entity_code, "ab" * 32),
        ],
    ],
)
def test_a_key_that_contradicts_the_trust_file_is_refused(entries: Any) -> None:
    made = contract()
    beta = made.participants[1]
    with pytest.raises(RefusedError) as caught:
        check_trust(made, trusted(*entries(beta, made)), "trust.toml")
    assert (caught.value.code, caught.value.party, caught.value.file) == ("TRUST_CONTRADICTION", "beta", "trust.toml")


def test_a_key_known_in_another_role_alone_is_no_contradiction() -> None:
    made = contract()
    beta = made.participants[1]
    trust = trusted(entry("auditor", beta.entity_code, beta.id))
    assert check_trust(made, trust, None) is None
    assert standing(beta, made.participants[0].id, made, trust) == "operator only"


def test_a_contradiction_names_a_hostile_party_harmlessly() -> None:
    """Such a contract does not parse; the message relies on nothing."""
    made = contract()
    beta = made.participants[1].model_copy(update={"name": "beta \u202e\u200b"})
    named = made.model_copy(update={"participants": (made.participants[0], beta, *made.participants[2:])})
    with pytest.raises(RefusedError) as caught:
        check_trust(named, trusted(entry("participant", beta.entity_code, "ab" * 32)), None)
    assert "\u202e" not in str(caught.value)


# Signing


def test_a_signature_is_kept_here_before_it_leaves(world: Lab) -> None:
    offered = world.offer()
    world.wire.cut_before = "/signature"
    with pytest.raises(ServiceError, match="OPERATOR_AWAY"):
        sign_it(world, offered)
    agreement = world.store.contract(offered.id)
    assert agreement.state == "signed"
    assert world.store.budget("set-1").committed > 0
    world.wire.cut_before = ""
    assert look(world, offered).signed_here
    sign_it(world, offered)
    assert world.store.contracts() == [agreement]
    with world.client() as client:
        assert fetch_offer(client, offered.id).signed == {world.home.participant_id}


def test_signing_again_sends_the_same_bytes(world: Lab) -> None:
    offered = world.offer()
    sign_it(world, offered)
    sign_it(world, offered)
    first, second = (r.content for r in world.wire.sent if r.url.path.endswith("/signature"))
    assert first == second


def test_what_is_kept_is_what_was_sent(world: Lab) -> None:
    offered = world.offer()
    sign_it(world, offered)
    agreement = world.store.contract(offered.id)
    sent = json.loads(world.wire.sent[-1].content)
    kept = SignedContract.parse(json.loads(agreement.signed), code="TEST")
    assert kept.contract.plain() == sent["contract"]
    assert [d.plain() for d in kept.delegations] == [sent["delegation"]]
    assert agreement.run_public == public_hex(world.home.run_key(offered.id))
    assert agreement.run_public != world.home.contract_public
    assert (agreement.terms.rounds, agreement.terms.spare_attempts, agreement.terms.steps) == (2, 1, 1)
    assert agreement.signed == canonical_bytes(kept.plain())
    assert (world.home.path / agreement.run_key_name).is_file()


def test_a_wrong_passphrase_signs_nothing(world: Lab) -> None:
    offered = world.offer()
    with world.client() as client, pytest.raises(InputError, match="KEY_PASSPHRASE"):
        commit(world.home, world.store, client, look(world, offered), b"wrong horse")
    assert world.store.contracts() == []
    assert not world.home.run_key_path(offered.id).exists()


def test_a_refused_review_signs_nothing(world: Lab) -> None:
    offered = world.offer()
    world.configure(purposes='["other"]', data_set="")
    with world.client() as client, pytest.raises(RefusedError, match="POLICY_PURPOSE"):
        commit(world.home, world.store, client, look(world, offered), PASSPHRASE)
    assert world.store.contracts() == []


def test_a_lost_run_key_is_not_replaced_silently(world: Lab) -> None:
    offered = world.offer()
    sign_it(world, offered)
    world.home.run_key_path(offered.id).unlink()
    with pytest.raises(InputError, match="RUN_KEY_WRONG"):
        sign_it(world, offered)


@pytest.mark.parametrize("state", ["withdrawn", "closed"])
def test_what_has_ended_here_is_not_signed_again(world: Lab, state: Any) -> None:
    offered = world.offer()
    sign_it(world, offered)
    world.store.set_state(offered.id, state)
    assert refusal(world, offered).code == "SIGN_ENDED"


def test_a_contract_terminated_meanwhile_is_refused_by_the_operator(world: Lab) -> None:
    from fedpact_server import contracts

    offered = world.offer()
    contracts.terminate(world.world.database, offered.id, now=utc_now())
    with pytest.raises(RefusedError, match="CONTRACT_STATE"):
        sign_it(world, offered)


# The rows


def test_the_trainer_itself_tries_the_schema(world: Lab) -> None:
    offered = world.offer()
    found = trial.try_rows(world.home, world.home.config(), offered)
    assert found.num_rows == 60
    assert look(world, offered, read_data=True).refuse() is None


def test_the_trainer_leaves_out_what_the_card_released(tmp_path: Path) -> None:
    """Card and trainer agree on the record of released rows; the operator may then count exactly those rows."""
    with lab(tmp_path) as world:
        world.enrol()
        world.approve()
        replace_file(world.home.path / "keys" / "release.key", b"k" * 32)
        world.configure(data_set=DATA_SET.replace('label = "ill"', 'label = "ill"\nrelease_fraction = 0.2'))
        draft = world.declare()
        offered = world.offer(released=True)
        slices = {s.source: s.count for s in offered.contribution.validation.slices}
        assert slices[world.home.participant_id] == draft.card.released_rows == len(draft.rows) > 0
        found = trial.try_rows(world.home, world.home.config(), offered)
        assert found.num_rows == draft.available == 60 - len(draft.rows)
        assert look(world, offered).refuse() is None


def test_a_data_set_that_breaks_its_own_rules_is_not_signed_for(world: Lab) -> None:
    """By the trainer's own process, closed in, which reads the last card's profile too: two cells, then a drift."""
    text = world.home.config_path.read_text()
    for rule in ('rule = "bounds"\ncolumn = "age"\nlow = 0\nhigh = 100', 'rule = "drift"'):
        text = text.replace("[policy]\n", f"[[data_sets.rules]]\n{rule}\nat_most = 0.05\n[policy]\n", 1)
    world.home.config_path.write_text(text)
    world.declare()
    offered, rows = world.offer(), (world.home.path / "rows.csv").read_text()
    assert look(world, offered, read_data=True).refuse() is None
    for old, new, field in ((",f,", ",m,", "sex"), ("2", "9.77123456789", "age")):
        (world.home.path / "rows.csv").write_text(rows.replace(old, new))
        with pytest.raises(RefusedError) as caught:
            look(world, offered, read_data=True).refuse()
        assert (caught.value.code, caught.value.field) == ("QUALITY_GATE", field)
        assert "9.77123456789" not in str(caught.value) + (world.home.logs / "trainer.log").read_text()
    assert world.store.rows("set-1") == ()


def test_a_row_that_does_not_fit_is_found_before_it_costs_budget(world: Lab) -> None:
    offered = world.offer()
    rows = (world.home.path / "rows.csv").read_text()
    (world.home.path / "rows.csv").write_text(rows.replace("21,m,no", "21,canary,no"))
    error = None
    for check in look(world, offered, read_data=True).checks:
        error = error or check.error
    assert error is not None
    assert (error.code, error.field) == ("DATA_UNKNOWN_CATEGORY", "sex")
    assert "canary" not in str(error)
    assert world.store.rows("set-1") == ()


COPIES = """[defences]
clip = "none"
wreckers = "report"
negatives = 0.1
dispute_hours = 72
max_duplicates = 0.05

[settlement]"""


def test_a_file_with_every_row_twice_is_refused_at_sign(world: Lab) -> None:
    """40 rows are contracted; 20 are there, each of them twice. Honest rows pass the same contract before."""
    offered = world.offer("[settlement]", COPIES)
    assert look(world, offered, read_data=True).refuse() is None
    header, *rows = (world.home.path / "rows.csv").read_text().splitlines()
    (world.home.path / "rows.csv").write_text("\n".join([header, *rows[:20], *rows[:20]]))
    with pytest.raises(InputError) as caught:
        look(world, offered, read_data=True).refuse()
    error = caught.value
    assert (error.code, error.field) == ("DATA_DUPLICATES", "data set set-1")
    assert error.file == str(world.home.path / "rows.csv")
    assert "Of the 40 rows to train on 20 are exact copies of another" in error.message
    assert world.store.rows("set-1") == ()


def test_rows_known_as_another_data_set_are_refused(world: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    offered = world.offer()
    other = DataSetCard.parse(
        world.store.data_set("set-1").declaration.plain() | {"data_set": "set-0"},
        code="TEST",
    )
    key = world.home.load_contract_key(PASSPHRASE)
    world.store.declare(sign(other, key).to_bytes(), Decimal(1))
    world.store.add_version("set-0", "ef" * 32)
    found = trial.Trial(num_rows=60, fingerprints=("ab" * 32, "ef" * 32))
    monkeypatch.setattr(trial, "try_rows", lambda *_: found)
    with pytest.raises(RefusedError, match="DATA_SET_KNOWN_ELSEWHERE"):
        look(world, offered, read_data=True).refuse()


def test_a_file_filled_with_another_data_sets_rows_since_the_card_is_refused(world: Lab) -> None:
    offered = world.offer()
    own = world.home.path / "own.csv"
    own.write_text(ROWS.replace("20,f,yes", "90,f,yes"))
    world.configure(data_set=DATA_SET.replace("set-1", "set-9").replace("rows.csv", "own.csv"))
    with world.client() as client:
        draft = cards.prepare(world.home, world.home.config(), world.store, "set-9")
        cards.declare(world.home, world.store, client, draft, PASSPHRASE)
    assert look(world, offered, read_data=True).refuse() is None
    header, *rows = own.read_text().splitlines()
    for text in (own.read_text(), "\n".join([header, *reversed(rows)])):  # its bytes, and its rows in another order
        (world.home.path / "rows.csv").write_text(text)
        with pytest.raises(RefusedError, match="DATA_SET_KNOWN_ELSEWHERE"):
            look(world, offered, read_data=True).refuse()


def limited(world: Lab, mebibytes: int) -> AgentConfig:
    config = world.home.config()
    return config.model_copy(update={"limits": config.limits.model_copy(update={"memory": mebibytes})})


def test_training_that_needs_more_memory_than_it_may_use_is_refused_before_anything_is_read(world: Lab) -> None:
    offered = world.offer()
    text = world.home.config_path.read_text()
    world.home.config_path.write_text(text.replace("memory = 4096", "memory = 300"))
    error = refusal(world, offered)
    assert (error.code, error.field, error.file) == ("SIGN_MEMORY", "limits.memory", str(world.home.config_path))
    needed = int(re.search(r"about (\d+) MiB", error.message)[1])
    assert trial.check_room(world.home, limited(world, needed), offered) is None
    with pytest.raises(RefusedError, match="SIGN_MEMORY"):
        trial.check_room(world.home, limited(world, needed - 1), offered)


def with_rows(world: Lab, offered: Contract, count: int) -> Contract:
    less = changed(offered, "privacy.delta", "0.000000001")
    return changed(less, f"participants.{own_place(world, offered)}.num_examples", count)


@pytest.mark.parametrize(("rows", "hidden"), [(10**6, []), (40, [5000, 1000])])
def test_rows_and_parameters_are_counted(world: Lab, rows: int, hidden: list[int]) -> None:
    """A row has four features: age, f, m and the constant. They lie in at most a sixteenth of the memory."""
    offered, parameters = world.offer(), 4 * 5000 + 5001 * 1000 + 1001 * 2 if hidden else 4 * 2
    larger = with_rows(world, offered, rows)
    if hidden:
        larger = changed(larger, "model", larger.model.plain() | {"kind": "mlp", "hidden": hidden})
    counted = 56 * parameters + 100 * rows + min(rows * 4 * 8, 500 * 2**20 // 16)
    with pytest.raises(RefusedError, match=f"about {460 + 2 * 18 + counted // 2**20} MiB"):
        trial.check_room(world.home, limited(world, 500), larger)
    assert trial.check_room(world.home, limited(world, 4096), larger) is None


def test_encoded_rows_that_the_disk_does_not_take_are_refused(world: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    larger = with_rows(world, world.offer(), 10**7)
    asked = 10**7 * (4 * 8 + 250)
    for free in (asked, asked - 1):
        usage = shutil.disk_usage(world.home.path)._replace(free=free)
        monkeypatch.setattr("shutil.disk_usage", lambda _, usage=usage: usage)
        with nullcontext() if free == asked else pytest.raises(RefusedError, match="SIGN_SCRATCH") as caught:
            trial.check_room(world.home, world.home.config(), larger)
    assert f"take {asked // 2**20} MiB of disk" in caught.value.message
    assert "agree on a contract with fewer" in caught.value.remedy


@pytest.mark.parametrize(("seconds", "code"), [(60.0, None), (60.5, "SIGN_LOOK")])
def test_a_first_look_that_outlasts_a_round_is_refused(
    world: Lab, monkeypatch: pytest.MonkeyPatch, seconds: float, code: str | None
) -> None:
    offered = world.offer()
    assert offered.participation.deadline_seconds == 60
    found = trial.Trial(num_rows=60, fingerprints=("ef" * 32,))
    monkeypatch.setattr(trial, "_try_rows", lambda *_, **__: (found, seconds))
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    checks = {check.name: check.error for check in look(world, offered, read_data=True).checks}
    assert getattr(checks["rows fit the schema"], "code", None) == code


@pytest.mark.parametrize(("answers", "code"), [(1, "SIGN_LOOK"), (0, "TRAINER_LOST")])
def test_a_first_look_without_an_end_is_refused_as_one(
    world: Lab, monkeypatch: pytest.MonkeyPatch, answers: int, code: str
) -> None:
    """The trainer is ready and then says nothing for an hour; or it does not even start."""
    ready = [Frame(kind="ready", header={}, array=b"")] * answers

    class Silent:
        process = SimpleNamespace(returncode=0)

        @contextmanager
        def __call__(self, *_: object, **__: object) -> Iterator["Silent"]:
            self.pipe = self
            yield self

        def send(self, *_: object) -> None:
            pass

        def receive(self, _: float) -> Frame:
            if ready:
                return ready.pop()
            raise FrameError("FRAME_TIMEOUT", "Nothing came.")

    monkeypatch.setattr(trial, "spawn", Silent())
    with pytest.raises(FedpactError, match=code):
        trial.try_rows(world.home, world.home.config(), world.offer())


def test_a_trainer_that_does_not_start_says_where_to_look(world: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    offered = world.offer()
    real = trial.spawn
    monkeypatch.setattr(trial, "spawn", lambda module, **options: real("fedpact_client.nothing", **options))
    with pytest.raises(FedpactError) as caught:
        trial.try_rows(world.home, world.home.config(), offered)
    assert caught.value.code == "TRAINER_LOST"
    assert caught.value.file == str(world.home.logs / "trainer.log")
