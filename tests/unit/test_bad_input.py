"""Bad input, item by item: what each side says, that nothing is trained and nothing lost, and where else it is tested.

`ITEMS` is the list of what an agent and its operator must survive; every place that it names is a test that exists.
"""

import ast
import datetime
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from tests.support.agent_world import ENTITY, NOW, PASSPHRASE, ROWS, Lab, lab
from tests.support.federation import Agent, Federation, make_federation
from tests.support.operator_world import TEMPLATE

from fedpact_client.api import egress_of
from fedpact_client.enrol import enrol
from fedpact_client.home import init
from fedpact_client.signing import fetch_offer
from fedpact_client.store import Ready, Store
from fedpact_contract.canonical import canonical_bytes, parse_canonical, sha256_hex
from fedpact_contract.errors import FaultError, InputError, RefusedError
from fedpact_contract.messages import Reply, Update
from fedpact_contract.record import sign
from fedpact_server import alarms, contracts, enrolment
from fedpact_server.drafting import ValidationFile
from fedpact_server.drafting import new as draft_contract
from fedpact_server.runs import want

ROOT = Path(__file__).resolve().parents[2]

ITEMS = {
    "an expired contract, and one before its term": (
        "unit/test_bad_input.py::test_an_order_that_the_policy_does_not_allow_now",
        "unit/test_runs.py::test_only_in_the_contracts_term",
        "unit/test_signing.py::test_a_term_still_to_come_can_be_signed_and_a_past_one_not",
    ),
    "a terminated contract": (
        "unit/test_bad_input.py::test_a_contract_terminated_in_the_middle_of_its_run",
        "unit/test_runs.py::test_a_terminated_contract_does_not_run",
        "unit/test_signing.py::test_a_contract_terminated_meanwhile_is_refused_by_the_operator",
    ),
    "an altered contract": (
        "unit/test_bad_input.py::test_an_altered_contract",
        "unit/test_signing.py::test_another_contract_than_asked_for_is_noticed",
        "unit/test_signing.py::test_a_signature_that_does_not_hold_is_a_fault",
        "unit/test_answer.py::test_a_contract_without_every_signature_is_not_opened",
        "unit/test_api.py::test_a_signature_that_does_not_hold",
    ),
    "an unknown operand": ("unit/test_bad_input.py::test_an_operand_that_nobody_knows",),
    "a wrong purpose": (
        "unit/test_bad_input.py::test_an_order_that_the_policy_does_not_allow_now",
        "unit/test_policy.py::test_each_clause_refuses",
    ),
    "a token used twice": (
        "unit/test_bad_input.py::test_a_token_used_by_a_second_enterprise",
        "unit/test_enrolment.py::test_any_other_second_use_freezes_and_alarms",
        "unit/test_enrolment.py::test_of_two_at_once_one_enrols_and_the_other_freezes_it",
        "unit/test_enrol.py::test_a_lost_answer_spends_the_token_once",
    ),
    "a reply forged in another participant's name": (
        "unit/test_bad_input.py::test_a_reply_in_another_participants_name",
        "unit/test_transport.py::test_a_reply_belongs_to_the_node_that_was_asked",
        "unit/test_spoilers.py::test_the_log_verifies_whatever_a_participant_sends",
    ),
    "a NaN or infinite cell": (
        "unit/test_answer.py::test_a_failure_of_the_data_is_charged_refused_and_never_retried",
        "e2e/test_trainer_process.py::test_failures_are_answers_and_the_trainer_goes_on",
        "e2e/test_egress.py::test_a_bad_cell_is_named_at_home_alone_and_only_a_fixed_code_leaves",
    ),
    "a clock set back": ("unit/test_bad_input.py::test_an_order_that_the_policy_does_not_allow_now",),
    "a ledger that is deleted, truncated or restored from backup": (
        "unit/test_ledger_faults.py::test_an_agent_with_such_ledgers_does_not_start",
        "unit/test_ledger_faults.py::test_what_is_written_beside_a_signature_buys_no_budget",
    ),
    "a disk that is full": (
        "unit/test_ledger_faults.py::test_a_disk_that_is_full_while_reserving_charges_nothing_and_goes_on_once_it_is_freed",
        "unit/test_ledger_faults.py::test_a_disk_that_is_full_at_the_end_of_an_attempt_leaves_it_charged_and_lets_nothing_out",
        "unit/test_agent_home.py::test_a_full_disk_leaves_no_empty_secret",
        "unit/test_guard.py::test_what_the_operator_refuses_for_good_is_not_repeated",
    ),
    "a database that is down in the middle of a query": (
        "unit/test_loading.py::test_a_server_that_dies_in_the_middle",
        "unit/test_children.py::test_rows_that_cannot_be_loaded",
    ),
    "an unreadable file": (
        "unit/test_children.py::test_files_that_are_away_cost_nothing",
        "unit/test_children.py::test_what_took_a_sources_place_is_read_by_another_trainer",
        "unit/test_sources.py::test_files_that_cannot_be_reached_are_named",
    ),
    "a key revoked in the middle of a run": (
        "unit/test_leaving.py::test_nothing_that_it_signs_counts_from_the_entry_on",
        "e2e/test_leaving_process.py::test_a_revoked_key_counts_no_more_from_the_entry_on",
    ),
    "an agent restarted at once after kill -9": (
        "unit/test_guard.py::test_that_it_is_not_let_in_yet_is_said_once_and_stands_in_the_status",
        "unit/test_guard.py::test_how_long_it_waits_follows_from_how_the_executor_ended",
        "e2e/test_flower_edges.py::test_a_node_that_was_killed_must_wait",
        "e2e/test_guard_process.py::test_killed_in_the_middle_of_a_round",
    ),
    "an oversized or malformed order on the pipe": (
        "property/test_executor_fuzz.py::test_an_oversized_or_malformed_frame_closes_the_pipe_and_the_next_order_is_answered",
        "property/test_executor_fuzz.py::test_half_a_frame_closes_the_pipe",
        "property/test_executor_fuzz.py::test_a_hostile_executor_gets_one_draw_a_round_and_no_other_signature",
        "unit/test_executor.py::test_an_order_that_cannot_be_handed_over",
        "unit/test_guard.py::test_the_text_in_place_of_a_reply_is_entered_before_it_leaves",
    ),
}
"""Item -> where it is tested."""


@pytest.mark.parametrize("item", ITEMS)
def test_each_item_is_tested_where_the_list_says(item: str) -> None:
    for place in ITEMS[item]:
        file, _, test = place.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
        assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, place


def small(folder: Path, **more: Any) -> Federation:
    return make_federation(folder, [40, 40, 40, 40], training__rounds=2, training__local_steps=1, **more)


def untouched(agent: Agent) -> bool:
    """Nothing was trained, nothing charged."""
    store = agent.desk.store
    return store.rows(agent.desk.data_set) == () and store.sent_updates(agent.desk.contract_id) == {}


@pytest.mark.parametrize(
    ("clock", "policy", "code"),
    [
        (datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC), {}, "POLICY_TERM"),
        (datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC), {}, "CLOCK_SET_BACK"),
        (NOW, {"purposes": ["digit-recognition-2"]}, "POLICY_PURPOSE_MISMATCH"),
        (NOW, {"not_after": "2026-11-24T00:00:00Z"}, "POLICY_EXPIRED"),
    ],
    ids=["expired", "clock set back", "wrong purpose", "policy ended"],
)
def test_an_order_that_the_policy_does_not_allow_now(
    tmp_path: Path, clock: datetime.datetime, policy: dict[str, Any], code: str
) -> None:
    """The same code in the operator's log and as the agent's alarm; the others train on."""
    import dataclasses

    federation = small(tmp_path, policy={0: policy})
    agent = federation.agent(1)
    agent.desk = dataclasses.replace(agent.desk, now=lambda: clock)
    assert federation.run() == "completed"
    for number in (1, 2):
        found = federation.outcomes(number)
        assert found.pop("Enterprise 1") == ("refused", code)
        assert set(found.values()) == {("admitted", "ADMITTED")}
    assert untouched(agent)
    assert {alarm.code for alarm in agent.desk.store.alarms()} == {code}


def test_a_contract_terminated_in_the_middle_of_its_run(tmp_path: Path) -> None:
    """The run stops; what was admitted before stands in log and ledgers, and is not trained again."""
    federation = small(tmp_path)
    contract_id = federation.contract.id

    def before(_node: str, order: bytes, model: bytes) -> tuple[bytes, bytes] | None:
        from tests.support.open_round import read

        if read(order).round == 1:
            return order, model
        contracts.terminate(federation.database, contract_id, now=NOW)
        return None

    federation.transport.before = before
    assert federation.run() == "stopped"
    assert set(federation.outcomes(1).values()) == {("admitted", "ADMITTED")}
    for agent in federation.agents.values():
        assert agent.desk.store.answers(contract_id) == [1]
        assert [row.state for row in agent.desk.store.rows(agent.desk.data_set)] == ["reserved", "spent"]
    with federation.database.read() as connection:
        assert [alarm["code"] for alarm in alarms.latest(connection)] == ["CONTRACT_TERMINATED"]
        assert contracts.find(connection, contract_id).state == "terminated"
    with federation.database.write() as connection, pytest.raises(RefusedError, match="RUN_ENDED"):
        want(connection, federation.contract, "run")


@pytest.fixture
def world(tmp_path: Path) -> Any:
    with lab(tmp_path) as made:
        made.enrol()
        made.approve()
        made.configure()
        made.declare()
        yield made


class Serving:
    """An operator that serves these bytes under every contract id."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload.decode()

    def contract(self, _contract_id: str) -> dict[str, Any]:
        return {"payload": self.payload, "state": "offered", "contract": None, "delegations": []}


def test_an_altered_contract(world: Lab) -> None:
    """One value changed, under the old id or under its own: nothing is signed; the operator's copy is as it was."""
    contract = world.offer()
    plain = parse_canonical(contract.to_bytes())
    plain["privacy"]["epsilon"] = "2.5"
    altered = canonical_bytes(plain)
    client: Any = Serving(altered)
    with pytest.raises(FaultError, match="CONTRACT_ID_WRONG"):
        fetch_offer(client, contract.id)
    offer = fetch_offer(client, sha256_hex(altered))
    assert offer.signed == frozenset()
    assert world.store.contracts() == []
    envelope, delegation = altered_signature(world, offer.contract)
    with pytest.raises(FaultError, match="SIGNED_OTHER_BYTES"):
        contracts.accept_signature(
            world.world.home,
            world.world.database,
            contract.id,
            world.home.participant_id,
            envelope=envelope,
            delegation=delegation,
            now=NOW,
        )


def altered_signature(world: Lab, contract: Any) -> Any:
    from fedpact_contract.contract import Delegation
    from fedpact_contract.keys import generate_key, public_hex

    key = world.home.load_contract_key(PASSPHRASE)
    run_key = public_hex(generate_key())
    delegation = Delegation(contract_id=contract.id, party=world.home.participant_id, run_key=run_key)
    return sign(contract, key), sign(delegation, key)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("spatial",), "CN-31"),
        (("participation", "recipient"), "everybody"),
        (("privacy", "meteredTime"), 5),
        (("training", "server_optimizer"), "sgd-with-something"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else None,
)
def test_an_operand_that_nobody_knows(world: Lab, place: tuple[str, ...], value: Any) -> None:
    """Refused where the contract is made, and by an agent to whom one is offered all the same; the field is named."""
    import tomllib

    contract = world.offer()
    values = tomllib.loads(TEMPLATE)
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    rows = world.home.path.parent / "validation.csv"
    rows.write_text(ROWS)
    with pytest.raises(InputError) as at_operator:
        draft_contract(
            world.world.home,
            world.world.database,
            tomli_w.dumps(values),
            ValidationFile(path=rows),
            now=NOW,
        )
    plain = parse_canonical(contract.to_bytes())
    inner = plain
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    altered = canonical_bytes(plain)
    client: Any = Serving(altered)
    with pytest.raises(InputError) as at_agent:
        fetch_offer(client, sha256_hex(altered))
    for caught in (at_operator, at_agent):
        assert caught.value.field is not None
        assert caught.value.field.startswith(".".join(place))
        assert caught.value.code.startswith("CONTRACT")
    assert world.store.contracts() == []


def test_a_token_used_by_a_second_enterprise(tmp_path: Path) -> None:
    """Whoever comes second is refused, and the first is held until people have compared fingerprints again."""
    with lab(tmp_path) as world:
        invitation = world.invitation()
        enrol(world.home, invitation, PASSPHRASE, egress_of(world.store), transport=world.wire)
        world.approve()
        thief = init(tmp_path / "thief", name="Hospital 1", entity_code=ENTITY, sector="medical", passphrase=PASSPHRASE)
        with Store(thief.db_path) as store, pytest.raises(RefusedError) as caught:
            enrol(thief, invitation, PASSPHRASE, egress_of(store), transport=world.wire)
        assert caught.value.code == "ENROLMENT_TOKEN_REUSED"
        assert not thief.operator_path.exists()
        with world.world.database.read() as connection:
            (alarm,) = alarms.latest(connection)
            (member,) = enrolment.members(connection)
        assert (alarm["code"], member.state, member.id) == (
            "ENROLMENT_TOKEN_REUSED",
            "frozen",
            world.home.participant_id,
        )
        with world.client() as client:
            assert client.enrolment() == "frozen"
            with pytest.raises(RefusedError, match="PARTICIPANT_FROZEN"):
                client.contracts()
        world.approve()
        with world.client() as client:
            assert client.enrolment() == "approved"


def test_a_reply_in_another_participants_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enterprise 2 sends what enterprise 1 signed, then signs in its name: enterprise 1 loses nothing by it.

    What it did not sign is not its word; what it did sign is logged, rejected, and shows who it was.
    """
    federation = small(tmp_path)
    one, two = federation.agent(1), federation.agent(2)
    signed: list[tuple[bytes, bytes]] = []
    tries: list[int] = []

    def keep(ready: Ready) -> tuple[bytes, bytes]:
        signed.append((ready.reply, ready.array))
        return ready.reply, ready.array

    def forge(ready: Ready) -> tuple[bytes, bytes] | None:
        reply = Reply.from_bytes(ready.reply)
        if reply.update is None or Update.from_bytes(reply.update.body).round > 1:
            return ready.reply, ready.array
        if not signed:
            return None
        tries.append(len(tries))
        if len(tries) == 1:
            return signed[0]
        theirs = Reply.from_bytes(signed[0][0]).update
        assert theirs is not None
        mine = sign(Update.from_bytes(theirs.body), two.desk.run_key)
        return reply.model_copy(update={"update": mine}).to_bytes(), signed[0][1]

    one.tamper, two.tamper = keep, forge  # no answer is one too
    monkeypatch.setattr("fedpact_server.rounds.RESEND_SECONDS", 0.0)
    assert federation.run() == "completed"
    assert tries == [0, 1]
    assert federation.outcomes(1) == {
        "Enterprise 1": ("admitted", "ADMITTED"),
        "Enterprise 2": ("rejected", "UPDATE_PARTICIPANT"),
        "Enterprise 3": ("admitted", "ADMITTED"),
        "Enterprise 4": ("admitted", "ADMITTED"),
    }, "what the first one signed was no word of the second one's: it was asked again"
    found = federation.outcomes(2)
    assert found.pop("Enterprise 2") == ("refused", "RECEIPT_WRONG"), "its own guard sees that another reply was sent"
    assert set(found.values()) == {("admitted", "ADMITTED")}
    assert [row.state for row in one.desk.store.rows(one.desk.data_set)] == ["reserved", "spent"] * 2
    assert len(signed) == 2
