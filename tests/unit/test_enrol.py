"""Enrolment against the operator's real API, and against invitations and operators that are not what they say."""

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509 import load_pem_x509_certificate
from tests.support.agent_world import ENTITY, PASSPHRASE, Lab, lab

from fedpact_client.api import egress_of
from fedpact_client.enrol import NODE_CONTEXT, Enrolled, enrol, pinned, read_invitation
from fedpact_client.home import OperatorData
from fedpact_client.store import EgressKind
from fedpact_contract.errors import FaultError, InputError, RefusedError, ServiceError
from fedpact_contract.files import replace_file
from fedpact_contract.keys import generate_key, public_hex
from fedpact_contract.request import utc_now
from fedpact_contract.trust import Trust
from fedpact_server import alarms, enrolment


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Lab]:
    with lab(tmp_path) as made:
        yield made


def again(world: Lab, invitation: Path) -> Enrolled:
    return enrol(world.home, invitation, PASSPHRASE, egress_of(world.store), transport=world.wire)


def member_state(world: Lab) -> str | None:
    with world.world.database.read() as connection:
        member = enrolment.by_entity(connection, ENTITY)
    return None if member is None else member.state


def pending(world: Lab) -> Path:
    return world.home.path / "operator" / "enrolment-pending.json"


def test_an_enterprise_joins(world: Lab) -> None:
    done = world.enrol()
    operator = world.world.home
    assert (done.state, done.url, done.own_fingerprint) == ("requested", operator.url, world.home.participant_id)
    assert done.operator.id == operator.fingerprint
    authority = load_pem_x509_certificate(operator.ca_pem().encode())
    assert done.ca == (authority.fingerprint(SHA256()).hex(),), "what the operator reads out of its own certificate"
    assert member_state(world) == "requested"
    assert world.home.operator() == done.operator
    assert world.home.operator_ca() == operator.ca_pem()
    assert world.home.config().operator.url == operator.url
    assert not pending(world).exists()
    world.approve()
    with world.client() as client:
        assert client.enrolment() == "approved"


def test_the_operator_is_pinned_beside_what_people_wrote(world: Lab) -> None:
    before = world.home.trust_path.read_text()
    world.enrol()
    assert world.home.trust_path.read_text().startswith(before.rstrip("\n"))
    entry = world.home.trust().party[-1]
    assert (entry.role, entry.fingerprint) == ("operator", world.world.home.fingerprint)
    assert world.home.trust().party[0].fingerprint == world.home.participant_id


def test_only_the_enrolment_and_questions_leave(world: Lab) -> None:
    world.enrol()
    kinds = [(e.kind, e.detail) for e in world.store.egress()]
    assert kinds == [
        (EgressKind.REQUEST, "GET /fedpact/v1/operator"),
        (EgressKind.ENROLMENT, "POST /fedpact/v1/enrol"),
        (EgressKind.REQUEST, "GET /fedpact/v1/enrolment"),
    ]
    sent = [r.content for r in world.wire.sent]
    assert [e.size for e in world.store.egress()] == [len(s) for s in sent]


def test_no_private_key_leaves(world: Lab) -> None:
    world.enrol()
    node_private = world.home.load_node_key().private_numbers().private_value.to_bytes(48, "big").hex()
    for request in world.wire.sent:
        assert b"PRIVATE" not in request.content
        assert node_private.encode() not in request.content


def test_both_keys_sign_the_same_bytes(world: Lab) -> None:
    assert NODE_CONTEXT == enrolment.NODE_PREFIX
    world.enrol()
    with world.world.database.read() as connection:
        assert enrolment.by_node(connection, enrolment.by_entity(connection, ENTITY).node) is not None


@pytest.mark.parametrize("cut", ["GET /operator", "POST /enrol"])
def test_a_connection_that_was_never_made_is_tried_again(world: Lab, cut: str) -> None:
    invitation = world.invitation()
    world.wire.cut_before = cut
    with pytest.raises(ServiceError, match="OPERATOR_AWAY"):
        again(world, invitation)
    assert not world.home.operator_path.exists()
    world.wire.cut_before = ""
    assert again(world, invitation).state == "requested"


@pytest.mark.parametrize("cut", ["POST /enrol", "GET /enrolment"])
def test_a_lost_answer_spends_the_token_once(world: Lab, cut: str) -> None:
    invitation = world.invitation()
    world.wire.cut_after = cut
    with pytest.raises(ServiceError, match="OPERATOR_AWAY"):
        again(world, invitation)
    assert pending(world).stat().st_mode & 0o077 == 0
    world.wire.cut_after = ""
    assert again(world, invitation).state == "requested"
    assert world.wire.paths().count("POST /enrol") == 1
    assert member_state(world) == "requested"


def test_a_refused_request_leaves_no_trace_of_an_enrolment(world: Lab) -> None:
    invitation = world.invitation(token="ab" * 32)
    with pytest.raises(RefusedError, match="ENROLMENT_TOKEN_UNKNOWN"):
        again(world, invitation)
    assert not world.home.operator_path.exists()
    assert not pending(world).exists()
    assert world.home.config().operator.url == ""
    assert len(world.home.trust().party) == 1


def test_a_wrong_passphrase_sends_nothing(world: Lab) -> None:
    with pytest.raises(InputError, match="KEY_PASSPHRASE"):
        enrol(world.home, world.invitation(), b"wrong horse", egress_of(world.store), transport=world.wire)
    assert world.wire.sent == []


def test_another_key_that_answers_is_noticed(world: Lab) -> None:
    invitation = world.invitation(operator="ab" * 32)
    with pytest.raises(FaultError) as caught:
        again(world, invitation)
    assert caught.value.code == "OPERATOR_FINGERPRINT"
    assert world.wire.paths() == ["GET /operator"]
    assert not world.home.operator_path.exists()


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"name": "City", "entity_code": "91310000MA1K999999"},
        {"name": "City", "entity_code": "91310000MA1K999999", "key": "zz"},
        {"name": "two\nlines", "entity_code": "91310000MA1K999999", "key": "ab" * 32},
    ],
)
def test_an_operator_that_says_nonsense_is_refused(world: Lab, answer: dict[str, str]) -> None:
    invitation = world.invitation()
    world.wire.replace["GET /operator"] = lambda _: json.dumps(answer).encode()
    with pytest.raises(InputError, match="OPERATOR_DATA"):
        again(world, invitation)
    assert world.wire.paths() == ["GET /operator"]


def test_a_trust_file_that_knows_better_stops_the_enrolment(world: Lab) -> None:
    text = world.home.trust_path.read_text()
    other = '\n[[party]]\nrole = "operator"\nname = "City Data"\nentity_code = "91310000MA1K999999"\n'
    replace_file(world.home.trust_path, (text + other + f'fingerprint = "{"ab" * 32}"\n').encode())
    with pytest.raises(RefusedError) as caught:
        world.enrol()
    assert caught.value.code == "TRUST_CONTRADICTION"
    assert world.wire.paths() == ["GET /operator"]
    assert member_state(world) is None


def test_pinning_twice_changes_nothing(world: Lab) -> None:
    operator = OperatorData(name="City", entity_code="91310000MA1K999999", key=public_hex(generate_key()))
    text = pinned(world.home.trust_path, world.home.trust_path.read_text(), operator)
    assert pinned(world.home.trust_path, text, operator) == text
    assert len(Trust.from_toml(text).party) == 2


def test_a_second_operator_needs_a_second_home(world: Lab) -> None:
    world.enrol()
    with pytest.raises(RefusedError, match="ENROLLED_ELSEWHERE"):
        again(world, other_invitation(world))


def other_invitation(world: Lab) -> Path:
    path = world.home.path.parent / "other.json"
    value = json.loads((world.home.path.parent / "invitation.json").read_text())
    path.write_text(json.dumps(value | {"operator": "cd" * 32}))
    return path


def test_the_command_repeated_does_no_harm(world: Lab) -> None:
    world.enrol()
    invitation = world.home.path.parent / "invitation.json"
    assert again(world, invitation).state == "requested"
    world.approve()
    assert again(world, invitation).state == "approved"
    with world.world.database.read() as connection:
        assert alarms.latest(connection) == []


def test_the_same_operator_may_invite_again(world: Lab) -> None:
    world.enrol()
    assert world.enrol().state == "requested"
    assert len(world.home.trust().party) == 2


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({"entity_code": "91310000MA1K000009"}, "INVITATION_ENTITY", "entity_code"),
        ({"expires": "2026-01-01T00:00:00Z"}, "INVITATION_EXPIRED", "expires"),
        ({"expires": "soon"}, "INVITATION", "expires"),
        ({"url": ""}, "INVITATION_URL", "url"),
        ({"url": "http://operator:8443"}, "INVITATION_URL", "url"),
        ({"url": "https://operator:8443/x"}, "INVITATION_URL", "url"),
        ({"url": "https://u:p@operator"}, "INVITATION_URL", "url"),
        ({"token": "short"}, "INVITATION", "token"),
        ({"operator": "short"}, "INVITATION", "operator"),
        ({"more": 1}, "INVITATION_UNKNOWN_KEY", "more"),
        ({"ca_pem": "no certificate"}, "OPERATOR_CA", None),
    ],
)
def test_bad_invitations_send_nothing(world: Lab, changes: dict[str, Any], code: str, field: str | None) -> None:
    with pytest.raises(InputError) as caught:
        again(world, world.invitation(**changes))
    assert (caught.value.code, caught.value.field) == (code, field)
    assert world.wire.sent == []


def test_a_damaged_token_is_told_in_words(world: Lab) -> None:
    with pytest.raises(InputError) as caught:
        again(world, world.invitation(token="0g" * 32))
    assert caught.value.message == "token: must be 64 hexadecimal digits (0 to 9, a to f)."


@pytest.mark.parametrize("content", [b"", b"[]", b"no", b"\xff", b"[" * 100_000])
def test_unreadable_invitations(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "invitation.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_invitation(path, ENTITY, utc_now())
    assert caught.value.file == str(path)


def test_a_missing_invitation_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="INVITATION_FILE"):
        read_invitation(tmp_path / "none.json", ENTITY, utc_now())


def test_an_invitation_is_good_until_it_expires(world: Lab) -> None:
    path = world.invitation(expires="2026-11-24T12:00:00Z")
    end = datetime.datetime(2026, 11, 24, 12, tzinfo=datetime.UTC)
    assert read_invitation(path, ENTITY, end).entity_code == ENTITY
    with pytest.raises(InputError, match="INVITATION_EXPIRED"):
        read_invitation(path, ENTITY, end + datetime.timedelta(seconds=1))
