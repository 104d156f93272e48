"""A participant that wants the evidence to look forged: whatever it sends, the log that the operator keeps verifies.

A fault in the evidence stops everybody's money, so nothing may enter the log that `fedpact verify` would not take.
"""

import base64
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.support.federation import Agent, Federation, make_federation
from tests.support.open_round import read

from fedpact_client.store import Ready
from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.evidence import unpack
from fedpact_contract.keys import generate_key, public_hex
from fedpact_contract.log import Countersignature
from fedpact_contract.messages import Head, Refusal, Reply, Update
from fedpact_contract.record import pae, sign
from fedpact_contract.report import charged_steps
from fedpact_contract.verify import verify
from fedpact_models.dp import SystemNoise
from fedpact_server.evidence import evidence_files

Answer = tuple[bytes, bytes]
STRANGER = generate_key()


@pytest.fixture(autouse=True)
def resend_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpact_server.rounds.RESEND_SECONDS", 0.0)


def faults(federation: Federation) -> list[str]:
    with federation.database.read() as connection:
        files = evidence_files(connection, federation.contract.id)
    report = verify(unpack({name: text.encode() for name, text in files.items()}), None, privacy=False)
    return [fault["code"] for fault in report.faults]


def update_of(ready: Ready) -> Update:
    return Update.from_bytes(Reply.from_bytes(ready.reply).update.body)


def changed(agent: Agent, ready: Ready, **changes: Any) -> Answer:
    """The update with other fields, signed by this participant all the same."""
    update = update_of(ready).model_copy(update=changes)
    reply = Reply.from_bytes(ready.reply).model_copy(update={"update": sign(update, agent.desk.run_key)})
    return reply.to_bytes(), ready.array


def signed_by_two(agent: Agent, ready: Ready) -> Answer:
    update = sign(update_of(ready), agent.desk.run_key, STRANGER)
    return Reply.from_bytes(ready.reply).model_copy(update={"update": update}).to_bytes(), ready.array


def signed_twice(_agent: Agent, ready: Ready) -> Answer:
    reply = Reply.from_bytes(ready.reply)
    update = reply.update.model_copy(update={"signatures": reply.update.signatures * 2})
    return reply.model_copy(update={"update": update}).to_bytes(), ready.array


def countersigned_by_two(agent: Agent, ready: Ready) -> Answer:
    reply = Reply.from_bytes(ready.reply)
    record = Countersignature.from_bytes(reply.countersignature.body)
    signature = sign(record, agent.desk.run_key, STRANGER)
    return reply.model_copy(update={"countersignature": signature}).to_bytes(), ready.array


def refused(agent: Agent, ready: Ready, *keys: Any, **changes: Any) -> Answer:
    """A refusal in place of the update."""
    update = update_of(ready)
    values = {
        "contract_id": update.contract_id,
        "round": update.round,
        "participant": update.participant,
        "code": "POLICY_EPSILON",
        "attempts": 0,
        "ledger_head": update.ledger_head,
        "head": update.head,
    }
    refusal = sign(Refusal(**(values | changes)), agent.desk.run_key, *keys)
    return Reply(refusal=refusal, countersignature=Reply.from_bytes(ready.reply).countersignature).to_bytes(), b""


SPOILERS: dict[str, tuple[Callable[[Agent, Ready], Answer], str, str]] = {
    "an update that two have signed": (signed_by_two, "missed", "UPDATE_SIGNATURE"),
    "an update that is signed twice": (signed_twice, "missed", "UPDATE_SIGNATURE"),
    "a countersignature of two": (countersigned_by_two, "missed", "SIGNATURE_EXTRA"),
    "a refusal that two have signed": (lambda a, r: refused(a, r, STRANGER), "missed", "SIGNATURE_EXTRA"),
    "a refusal that names a head of another log": (
        lambda a, r: refused(a, r, head=Head(size=2, root="1" * 64)),
        "missed",
        "REFUSAL_HEAD",
    ),
    "a refusal that names a head to come": (
        lambda a, r: refused(a, r, head=Head(size=10**9, root="1" * 64)),
        "missed",
        "REFUSAL_HEAD",
    ),
    "a refusal with another ledger head": (
        lambda a, r: refused(a, r, ledger_head="3" * 64),
        "refused",
        "POLICY_EPSILON",
    ),
    "a refusal of another round": (lambda a, r: refused(a, r, round=2), "missed", "REFUSAL_PLACE"),
    "an update with another ledger head": (lambda a, r: changed(a, r, ledger_head="3" * 64), "admitted", "ADMITTED"),
    "an update with another head": (
        lambda a, r: changed(a, r, head=Head(size=1, root="1" * 64)),
        "rejected",
        "UPDATE_HEAD",
    ),
    "an update of another contract": (
        lambda a, r: changed(a, r, contract_id="1" * 64),
        "rejected",
        "UPDATE_CONTRACT_ID",
    ),
    "an update in another's name": (
        lambda a, r: changed(a, r, participant="1" * 64),
        "rejected",
        "UPDATE_PARTICIPANT",
    ),
    "an update of another round": (lambda a, r: changed(a, r, round=2), "rejected", "UPDATE_ROUND"),
    "a spare attempt": (lambda a, r: changed(a, r, attempt=2), "admitted", "ADMITTED"),
    "a spare attempt too many": (lambda a, r: changed(a, r, attempt=3), "rejected", "UPDATE_ATTEMPT"),
    "a quantity without end": (lambda a, r: endless(a, r), "missed", "UPDATE_SIGNATURE"),
    "more examples": (lambda a, r: changed(a, r, num_examples=999), "rejected", "UPDATE_METERING"),
}


@pytest.mark.parametrize("where", [{"round": 2}, {"contract_id": "1" * 64}], ids=["another round", "another contract"])
def test_attempts_that_are_said_to_be_of_elsewhere_count_for_nobody(tmp_path, where: dict[str, Any]) -> None:
    """The operator and every verifier count spare attempts alike: or a rejection looks unfounded to one of them."""
    federation = make_federation(tmp_path, noise=lambda _index: SystemNoise(), training__rounds=3)
    agent = federation.agent(2)

    def tamper(ready: Ready) -> Answer:
        first = update_of(ready).round == 1
        return changed(agent, ready, attempt=5, **where) if first else (ready.reply, ready.array)

    agent.tamper = tamper
    assert federation.run(accept_test_noise=False) == "completed"
    kinds = [federation.outcomes(number)["Enterprise 2"][0] for number in (1, 2, 3)]
    assert kinds == ["rejected", "admitted", "admitted"]
    assert faults(federation) == []
    bodies = [entry.open() for entry in federation.entries()]
    steps = charged_steps(bodies, federation.contract)[agent.desk.participant]
    plan = federation.contract.planned_steps
    assert steps == plan, "nobody but the agent knows what round 1 cost: all that the plan has left"


def endless(agent: Agent, ready: Ready) -> Answer:
    """A signed update with a quantity that fills every memory when it is written out."""
    reply = Reply.from_bytes(ready.reply)
    plain = update_of(ready).plain()
    body = canonical_bytes(plain | {"privacy_event": plain["privacy_event"] | {"max_grad_norm": "1e99999999999"}})
    signature = {
        "key": public_hex(agent.desk.run_key),
        "value": agent.desk.run_key.sign(pae(Update.media_type(), body)).hex(),
    }
    update = {
        "type": Update.media_type(),
        "payload": base64.b64encode(body).decode(),
        "signatures": [signature],
    }
    return canonical_bytes(reply.plain() | {"update": update}), ready.array


@pytest.mark.parametrize("name", SPOILERS)
def test_the_log_verifies_whatever_a_participant_sends(tmp_path, name: str) -> None:
    spoil, kind, code = SPOILERS[name]
    federation = make_federation(tmp_path, noise=lambda _index: SystemNoise(), training__rounds=2)
    agent = federation.agent(2)

    def tamper(ready: Ready) -> Answer:
        update = Reply.from_bytes(ready.reply).update
        first = update is not None and Update.from_bytes(update.body).round == 1
        return spoil(agent, ready) if first else (ready.reply, ready.array)

    agent.tamper = tamper
    assert federation.run(accept_test_noise=False) == "completed"
    assert federation.outcomes(1)["Enterprise 2"] == (kind, code)
    assert faults(federation) == []


def test_whoever_is_away_is_waited_for_once(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And invited again when it is back."""
    monkeypatch.setattr("fedpact_server.rounds.GATHER_SECONDS", 0.5)
    federation = make_federation(tmp_path, training__rounds=3)
    node = next(node for node, a in federation.transport.agents.items() if a is federation.agent(3))
    federation.transport.offline.add(node)

    def before(_node: str, order: bytes, model: bytes) -> Answer:
        if read(order).round == 2:
            federation.transport.offline.clear()
        return order, model

    federation.transport.before = before
    loop = federation.loop()
    waits: list[float] = []
    gather = type(loop)._gather

    def timed(self: Any) -> set[str]:
        begun = time.monotonic()
        found = gather(self)
        waits.append(time.monotonic() - begun)
        return found

    monkeypatch.setattr(type(loop), "_gather", timed)
    assert loop.run() == "completed"
    assert waits[0] >= 0.5
    assert max(waits[1:]) < 0.4
    assert "Enterprise 3" not in federation.outcomes(1)
    assert "Enterprise 3" not in federation.outcomes(2)
    assert federation.outcomes(3)["Enterprise 3"] == ("admitted", "ADMITTED")
