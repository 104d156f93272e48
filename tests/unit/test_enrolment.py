"""Enrolment: one token, one entity, one use; a fingerprint that people compare; freezes and alarms."""

import datetime
import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from tests.support.operator_world import NOW, OPERATOR_CODE, Enterprise, Operator, changed, enterprise, operator

from fedpact_contract.canonical import sha256_hex
from fedpact_contract.errors import FedpactError
from fedpact_contract.keys import generate_key, public_hex, show_fingerprint
from fedpact_contract.messages import Invitation, SignedEnrolment
from fedpact_contract.request import parse_instant
from fedpact_server import alarms, db, enrolment

ONE, TWO = enterprise(1), enterprise(2)


@pytest.fixture
def world(tmp_path: Path) -> Operator:
    return operator(tmp_path)


def code_of(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(FedpactError) as err:
        call(*args, **kwargs)
    return err.value.code


def send(
    world: Operator, invitation: Invitation, signed: SignedEnrolment, now: datetime.datetime = NOW
) -> enrolment.Member:
    return enrolment.enrol(world.home, world.database, token=invitation.token, signed=signed, now=now)


def alarm_codes(world: Operator) -> list[str]:
    with world.database.read() as connection:
        return [alarm["code"] for alarm in alarms.latest(connection)]


def state_of(world: Operator, who: Enterprise) -> str:
    with world.database.read() as connection:
        return enrolment.find(connection, who.id).state


def approve(world: Operator, who: Enterprise) -> enrolment.Member:
    return enrolment.approve(world.database, selector=who.id, fingerprint=who.id, now=NOW)


def test_an_invitation_carries_what_the_enterprise_needs_and_the_database_no_token(world: Operator) -> None:
    invitation = world.invite(ONE)
    assert (invitation.url, invitation.ca_pem) == ("https://fl.example.cn:8443", world.home.ca_pem())
    assert (invitation.operator, invitation.entity_code) == (world.home.fingerprint, ONE.entity_code)
    assert parse_instant(invitation.expires) == NOW + datetime.timedelta(hours=24)
    with world.database.read() as connection:
        row = connection.execute(sa.select(db.invitations)).one()
    assert row.token_digest == sha256_hex(bytes.fromhex(invitation.token))
    for path in world.home.path.rglob("*"):
        if path.is_file():
            assert invitation.token.encode() not in path.read_bytes()
            assert bytes.fromhex(invitation.token) not in path.read_bytes()


def test_every_one_of_a_tokens_256_bits_is_chance(world: Operator) -> None:
    """Sixteen tokens agree in a given bit once in 32,768 times; in four bits of 256 or more they do not."""
    tokens = [int(world.invite(ONE).token, 16) for _ in range(16)]
    fixed = [bit for bit in range(256) if len({token >> bit & 1 for token in tokens}) == 1]
    assert len(fixed) <= 3


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"entity_code": "123"}, "INVITATION"),
        ({"entity_code": OPERATOR_CODE}, "ENTITY_IS_OPERATOR"),
        ({"sector": "a b"}, "INVITATION"),
        ({"name": ""}, "INVITATION"),
    ],
)
def test_a_bad_invitation_is_refused(world: Operator, wrong: dict[str, str], code: str) -> None:
    assert code_of(world.invite, ONE, **wrong) == code


def test_enrol_approve_register(world: Operator) -> None:
    member = world.enrol(ONE)
    assert (member.id, member.node, member.state, member.approved) == (ONE.id, ONE.node, "requested", None)
    member = enrolment.approve(
        world.database, selector=ONE.id[:8], fingerprint=show_fingerprint(ONE.id).upper(), now=NOW
    )
    assert (member.state, member.approved) == ("approved", "2026-11-24T12:00:00Z")
    with world.database.write() as connection:
        enrolment.set_registered(connection, ONE.id, "12345")
    assert state_of(world, ONE) == "registered"
    assert approve(world, ONE).state == "registered"
    with world.database.read() as connection:
        assert enrolment.open_invitations(connection) == []
        found = enrolment.by_node(connection, ONE.node)
    assert found is not None
    assert found[0].flower_node == "12345"


def test_an_unknown_token_and_a_malformed_one(world: Operator) -> None:
    invitation = world.invite(ONE)
    signed = ONE.request(invitation)
    unknown = invitation.model_copy(update={"token": "0" * 64})
    assert code_of(send, world, unknown, signed) == "ENROLMENT_TOKEN_UNKNOWN"
    assert code_of(send, world, invitation.model_copy(update={"token": "zz"}), signed) == "ENROLMENT_TOKEN_FORM"
    assert code_of(send, world, invitation.model_copy(update={"token": "00"}), signed) == "ENROLMENT_TOKEN_FORM"
    assert send(world, invitation, signed).state == "requested"


def test_a_token_ends_after_24_hours(world: Operator) -> None:
    invitation = world.invite(ONE)
    late = NOW + datetime.timedelta(hours=24, seconds=1)
    assert code_of(send, world, invitation, ONE.request(invitation), late) == "ENROLMENT_TOKEN_EXPIRED"
    on_time = NOW + datetime.timedelta(hours=24)
    assert send(world, invitation, ONE.request(invitation), on_time).state == "requested"


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"operator": "0" * 64}, "ENROLMENT_OPERATOR"),
        ({"entity_code": TWO.entity_code}, "ENROLMENT_ENTITY"),
        ({"sector": "finance"}, "ENROLMENT_SECTOR"),
        ({"token_digest": "0" * 64}, "ENROLMENT_TOKEN_MISMATCH"),
        ({"contract_key": public_hex(TWO.contract_key)}, "SIGNATURE_MISSING"),
        ({"node_key_pem": "nonsense"}, "NODE_KEY_FORM"),
        ({"node_key_pem": "x" * 1001}, "NODE_KEY_FORM"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_and_spends_no_token(
    world: Operator, wrong: dict[str, str], code: str
) -> None:
    invitation = world.invite(ONE)
    assert code_of(send, world, invitation, ONE.request(invitation, **wrong)) == code
    assert alarm_codes(world) == []
    assert send(world, invitation, ONE.request(invitation)).state == "requested"


def test_both_keys_must_have_signed(world: Operator) -> None:
    invitation = world.invite(ONE)
    signed = ONE.request(invitation)
    other_node = changed(signed, node_signature=TWO.request(invitation).node_signature)
    assert code_of(send, world, invitation, other_node) == "ENROLMENT_NODE_SIGNATURE"
    no_hex = changed(signed, node_signature="zz")
    assert code_of(send, world, invitation, no_hex) == "ENROLMENT_NODE_SIGNATURE"
    plain = signed.enrolment.plain()
    value = plain["signatures"][0]["value"]
    plain["signatures"][0]["value"] = ("0" if value[0] != "0" else "1") + value[1:]
    assert code_of(send, world, invitation, changed(signed, enrolment=plain)) == "SIGNATURE_INVALID"
    unsigned = signed.enrolment.plain() | {"signatures": []}
    assert code_of(send, world, invitation, changed(signed, enrolment=unsigned)) == "SIGNATURE_COUNT"
    card = changed(signed, enrolment=ONE.card().plain())
    assert code_of(send, world, invitation, card) == "ENROLMENT_FORM_UNKNOWN_KEY"
    assert send(world, invitation, signed).state == "requested"


def test_the_same_request_again_is_answered_the_same(world: Operator) -> None:
    invitation = world.invite(ONE)
    signed = ONE.request(invitation)
    first = send(world, invitation, signed)
    late = NOW + datetime.timedelta(days=3)
    assert send(world, invitation, SignedEnrolment.parse(signed.plain(), code="X"), late) == first
    assert alarm_codes(world) == []
    approve(world, ONE)
    assert send(world, invitation, signed).state == "approved"


def test_the_same_enterprise_again_is_answered_the_same(world: Operator) -> None:
    """The command repeated: the node key signs with fresh randomness, so that the bytes differ."""
    invitation = world.invite(ONE)
    first = send(world, invitation, ONE.request(invitation))
    again = ONE.request(invitation)
    assert again.node_signature != ONE.request(invitation).node_signature
    assert send(world, invitation, again, NOW + datetime.timedelta(days=3)) == first
    assert alarm_codes(world) == []


def test_the_same_enterprise_with_other_words_is_refused_and_not_frozen(world: Operator) -> None:
    invitation = world.invite(ONE)
    send(world, invitation, ONE.request(invitation))
    assert code_of(send, world, invitation, ONE.request(invitation, name="Somebody")) == "ENROLMENT_CHANGED"
    assert state_of(world, ONE) == "requested"
    assert alarm_codes(world) == []


@pytest.mark.parametrize(
    "wrong",
    [{}, {"operator": "0" * 64}, {"contract_key": public_hex(ONE.contract_key)}],
    ids=["other keys", "other operator", "a key that did not sign"],
)
def test_any_other_second_use_freezes_and_alarms(world: Operator, wrong: dict[str, str]) -> None:
    invitation = world.invite(ONE)
    signed = ONE.request(invitation)
    send(world, invitation, signed)
    again = TWO.request(invitation, **({"name": "Somebody", "entity_code": ONE.entity_code} | wrong))
    assert code_of(send, world, invitation, again) == "ENROLMENT_TOKEN_REUSED"
    assert state_of(world, ONE) == "frozen"
    with world.database.read() as connection:
        (alarm,) = alarms.latest(connection)
        assert len(enrolment.members(connection)) == 1
    assert alarm["code"] == "ENROLMENT_TOKEN_REUSED"
    assert f"is signed as {ONE.id if 'contract_key' in wrong else TWO.id}. Call the enterprise" in alarm["detail"]
    assert "`participant approve` lifts the freeze" in alarm["detail"]
    assert send(world, invitation, signed).state == "frozen"
    with pytest.raises(FedpactError, match="frozen") as caught:
        world.invite(ONE)
    assert "`participant approve` lifts the freeze" in caught.value.remedy


def test_a_malformed_second_use_freezes_too(world: Operator) -> None:
    invitation = world.invite(ONE)
    signed = ONE.request(invitation)
    send(world, invitation, signed)
    card = changed(signed, enrolment=ONE.card().plain())
    assert code_of(send, world, invitation, card) == "ENROLMENT_TOKEN_REUSED"
    with world.database.read() as connection:
        assert "the second request is malformed" in alarms.latest(connection)[0]["detail"]


def test_a_second_use_freezes_an_approved_participant_too_until_its_fingerprint_is_compared_again(
    world: Operator,
) -> None:
    invitation = world.invite(ONE)
    send(world, invitation, ONE.request(invitation))
    approve(world, ONE)
    with world.database.write() as connection:
        enrolment.set_registered(connection, ONE.id, "7")
    assert code_of(send, world, invitation, TWO.request(invitation)) == "ENROLMENT_TOKEN_REUSED"
    assert state_of(world, ONE) == "frozen"
    assert approve(world, ONE).state == "registered"
    # The review is over: whoever still has the token can raise alarms, but stop nobody.
    assert code_of(send, world, invitation, TWO.request(invitation)) == "ENROLMENT_TOKEN_CLOSED"
    assert state_of(world, ONE) == "registered"
    assert alarm_codes(world) == ["ENROLMENT_TOKEN_REUSED", "ENROLMENT_UNFROZEN", "ENROLMENT_TOKEN_REUSED"]


def test_keys_are_nobody_elses(world: Operator) -> None:
    world.enrol(ONE)
    invitation = world.invite(TWO)
    borrowed_key = Enterprise(2, ONE.contract_key, TWO.node_key)
    assert code_of(send, world, invitation, borrowed_key.request(invitation)) == "ENROLMENT_KEY_KNOWN"
    borrowed_node = Enterprise(2, generate_key(), ONE.node_key)
    assert code_of(send, world, invitation, borrowed_node.request(invitation)) == "ENROLMENT_KEY_KNOWN"
    operators = Enterprise(2, world.home.contract_key(b"correct horse"), TWO.node_key)
    assert code_of(send, world, invitation, operators.request(invitation)) == "ENROLMENT_KEY_KNOWN"


def test_approval_needs_the_right_fingerprint(world: Operator) -> None:
    world.enrol(ONE)
    world.enrol(TWO)
    call = enrolment.approve
    assert code_of(call, world.database, selector=ONE.name, fingerprint=TWO.id, now=NOW) == "FINGERPRINT_MISMATCH"
    assert code_of(call, world.database, selector=ONE.name, fingerprint="12", now=NOW) == "KEY_FINGERPRINT_FORM"
    assert code_of(call, world.database, selector="nobody", fingerprint=ONE.id, now=NOW) == "PARTICIPANT_UNKNOWN"
    assert code_of(call, world.database, selector=ONE.id[:3], fingerprint=ONE.id, now=NOW) == "PARTICIPANT_UNKNOWN"
    assert state_of(world, ONE) == "requested"


def test_two_participants_of_one_name_are_told_apart_by_id(world: Operator) -> None:
    for who in (ONE, TWO):
        invitation = world.invite(who)
        send(world, invitation, who.request(invitation, name="Hospital"))
    assert code_of(enrolment.suspend, world.database, selector="Hospital", now=NOW) == "PARTICIPANT_AMBIGUOUS"
    assert enrolment.suspend(world.database, selector=ONE.entity_code, now=NOW).id == ONE.id


def test_suspension_changes_no_keys_and_is_lifted_by_a_new_comparison(world: Operator) -> None:
    world.admit(ONE, cards_too=False)
    with world.database.read() as connection:
        before = connection.execute(sa.select(db.participants)).one()
    assert enrolment.suspend(world.database, selector=ONE.name, now=NOW).state == "suspended"
    enrolment.suspend(world.database, selector=ONE.name, now=NOW)
    assert alarm_codes(world) == ["PARTICIPANT_SUSPENDED"]
    with world.database.read() as connection:
        after = connection.execute(sa.select(db.participants)).one()
    assert {k: v for k, v in before._mapping.items() if k != "state"} == {
        k: v for k, v in after._mapping.items() if k != "state"
    }
    assert approve(world, ONE).state == "approved"


def test_a_suspended_participant_is_not_unsuspended_by_a_reused_token(world: Operator) -> None:
    invitation = world.invite(ONE)
    send(world, invitation, ONE.request(invitation))
    enrolment.suspend(world.database, selector=ONE.name, now=NOW)
    assert code_of(send, world, invitation, TWO.request(invitation)) == "ENROLMENT_TOKEN_REUSED"
    assert state_of(world, ONE) == "suspended"


def test_registration_never_lifts_a_suspension(world: Operator) -> None:
    world.admit(ONE, cards_too=False)
    enrolment.suspend(world.database, selector=ONE.name, now=NOW)
    with world.database.write() as connection:
        enrolment.set_registered(connection, ONE.id, "7")
    assert state_of(world, ONE) == "suspended"


def test_a_new_invitation_ends_the_old_one(world: Operator) -> None:
    old, new = world.invite(ONE), world.invite(ONE)
    assert code_of(send, world, old, ONE.request(old)) == "ENROLMENT_TOKEN_CLOSED"
    assert send(world, new, ONE.request(new)).state == "requested"


def test_a_strangers_request_is_discarded_only_on_demand_and_never_after_approval(world: Operator) -> None:
    invitation = world.invite(ONE)
    stranger = Enterprise(1, generate_key(), TWO.node_key)
    send(world, invitation, stranger.request(invitation))
    assert code_of(send, world, invitation, ONE.request(invitation)) == "ENROLMENT_TOKEN_REUSED"
    assert code_of(world.invite, ONE) == "ENTITY_KNOWN"
    fresh = world.invite(ONE, replace=True)
    assert alarm_codes(world)[0] == "ENROLMENT_DISCARDED"
    assert send(world, fresh, ONE.request(fresh)).id == ONE.id
    assert code_of(send, world, invitation, stranger.request(invitation)) == "ENROLMENT_TOKEN_CLOSED"
    approve(world, ONE)
    assert code_of(world.invite, ONE, replace=True) == "ENTITY_KNOWN"


def test_of_two_at_once_one_enrols_and_the_other_freezes_it(world: Operator) -> None:
    invitation = world.invite(ONE)
    codes: list[str] = []
    together = threading.Barrier(2)

    def use(who: Enterprise) -> None:
        signed = who.request(invitation, entity_code=ONE.entity_code)
        together.wait()
        try:
            codes.append(send(world, invitation, signed).state)
        except FedpactError as err:
            codes.append(err.code)

    threads = [threading.Thread(target=use, args=(who,)) for who in (ONE, TWO)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == ["ENROLMENT_TOKEN_REUSED", "requested"]
    with world.database.read() as connection:
        (member,) = enrolment.members(connection)
    assert member.state == "frozen"
