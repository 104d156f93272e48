"""The guard: what leaves and in which order, and that nothing which a child or the operator sends ends it."""

import base64
import dataclasses
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import structlog
from tests.support.agent_world import DATA_SET, ENTITY, NOW, PASSPHRASE, ROWS, Lab, lab
from tests.support.closed_run import ClosedRun, closed_run
from tests.support.fake_child import Spawner
from tests.support.federation import BUNDLE, Agent
from tests.support.open_round import OpenRound, open_round, read

from fedpact_client import cards, children, guard, views
from fedpact_client.answer import TrainingFailedError
from fedpact_client.api import AnsweredRefusedError
from fedpact_client.children import CancelledError, TrainerChild
from fedpact_client.config import AgentConfig
from fedpact_client.facts import ROUNDS, Facts, cut_off
from fedpact_client.frames import Frame, FrameError
from fedpact_client.guard import Guard
from fedpact_client.home import AgentHome, init
from fedpact_client.policy import Hours
from fedpact_client.review import review
from fedpact_client.sandbox import Isolation, landlock_abi
from fedpact_client.signing import commit, fetch_offer
from fedpact_client.store import EgressKind, HomeLock, Store
from fedpact_contract.canonical import canonical_bytes, sha256_hex
from fedpact_contract.errors import FailedError, InputError, RefusedError, ServiceError
from fedpact_contract.files import replace_file
from fedpact_contract.keys import save_key
from fedpact_contract.messages import Notice, Refusal, Reply
from fedpact_contract.record import read_envelope, sign
from fedpact_contract.request import utc_now


class Client:
    """An operator that has nothing to close."""

    def __init__(self, answer: Callable[[], dict[str, Any]] = dict) -> None:
        self.asked: list[str] = []
        self.answer = answer

    def get(self, path: str, **_options: Any) -> dict[str, Any]:
        self.asked.append(path)
        return self.answer()

    def post(self, path: str, *_body: Any, **_options: Any) -> dict[str, Any]:
        self.asked.append(path)
        return self.answer()

    def contract(self, contract_id: str) -> dict[str, Any]:
        raise ServiceError("OPERATOR_AWAY", f"nobody answers for {contract_id}")

    def close(self) -> None:
        self.asked.append("close")


class FakeExecutor:
    """Hands over frames, one after the other, and keeps what it is sent; then the guard is to stop."""

    def __init__(self, guard: Guard, *frames: Any) -> None:
        self.guard, self.frames = guard, list(frames)
        self.sent: list[tuple[str, dict[str, Any], bytes]] = []
        self.alive = True
        self.connected, self.isolation, self.node = False, None, None
        self.exit_code: int | None = None
        self.starts = self.stops = 0
        self.before_send: Callable[[], None] = lambda: None

    def receive(self, _timeout: float) -> Frame | None:
        if not self.frames:
            self.guard.stopping = True
            return None
        frame = self.frames.pop(0)
        if isinstance(frame, Exception):
            raise frame
        return frame

    def send(self, kind: str, header: dict[str, Any], array: bytes = b"") -> None:
        self.before_send()
        self.sent.append((kind, header, array))

    def start(self) -> None:
        self.starts += 1
        self.alive = True

    def stop(self) -> None:
        self.stops += 1
        self.alive, self.exit_code = False, 75

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _, _ in self.sent]


def order_frame(order: bytes, model: bytes, bundle: str = BUNDLE, **more: Any) -> Frame:
    return Frame(kind="order", header={"order": order.decode(), "bundle": bundle} | more, array=model)


@dataclasses.dataclass
class World:
    """A guard at the desk of `Enterprise 1`, whose second order is at hand."""

    round: OpenRound
    guard: Guard
    agent: Agent
    client: Client

    def play(self, *frames: Any) -> FakeExecutor:
        """Hand over these frames; the guard's loop runs until they are all answered."""
        executor = FakeExecutor(self.guard, *frames)
        self.guard.executor = executor  # type: ignore[assignment]  # stands for the real one
        self.guard.stopping = False
        self.guard.loop(self.client)  # type: ignore[arg-type]  # stands for the real one
        return executor

    @property
    def order(self) -> tuple[bytes, bytes]:
        return self.round.order(2, 1)

    @property
    def store(self) -> Store:
        return self.agent.desk.store

    def states(self) -> list[str]:
        """States of round 2 in the budget ledger."""
        return [row.state for row in self.store.rows(self.agent.desk.data_set) if row.round == 2]

    def left(self) -> list[Any]:
        return [entry for entry in self.store.egress() if entry.kind is not EgressKind.REQUEST]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> AgentHome:
    folder = tmp_path_factory.mktemp("home") / "agent"
    made = init(folder, name="Hospital 1", entity_code=ENTITY, sector="medical", passphrase=PASSPHRASE)
    text = made.config_path.read_text().replace('url = ""', 'url = "https://fl.example.cn:8443"', 1)
    text = text.replace("poll_seconds = 5", "poll_seconds = 1").replace("[policy]\n", DATA_SET + "[policy]\n", 1)
    replace_file(made.config_path, text.encode())
    return made


@pytest.fixture
def world(home: AgentHome, tmp_path: Path) -> World:
    played = open_round(tmp_path)
    agent = played.federation.agent(1)
    made = Guard(home=home, config=home.config(), store=agent.desk.store)
    made.desks[agent.desk.contract_id] = agent.desk
    return World(played, made, agent, Client())


def enveloped(order: bytes, body: bytes) -> bytes:
    """An order's envelope around another body."""
    return read_envelope(order).model_copy(update={"payload": base64.b64encode(body).decode()}).to_bytes()


class Hearing(Client):
    """An operator that keeps what it is told, or fails with the next of these errors first."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__()
        self.errors, self.heard = list(errors), list[Notice]()
        self.record: Callable[[], object] = lambda: None

    def post(self, _path: str, body: dict[str, Any], kind: EgressKind, **_options: Any) -> dict[str, Any]:
        assert kind is EgressKind.NOTICE
        self.record()
        if self.errors:
            raise self.errors.pop(0)
        self.heard.append(Notice.from_bytes(read_envelope(body["notice"]).body))
        return {"index": len(self.heard)}


class TestTelling:
    """What a person decided, and the policy's hours, are said until they are heard, and once."""

    def tell(self, world: World, client: Hearing) -> list[tuple[str, str, int]]:
        """Look once; what the operator has heard so far."""
        desk = world.agent.desk
        path = world.guard.home.run_key_path(desk.contract_id)
        if not path.exists():
            save_key(path, desk.run_key)
        client.record = lambda: desk.store.record_egress(EgressKind.NOTICE, desk.contract_id, None, 1, "a" * 64)
        world.guard.next_tell = 0.0
        world.guard._tell(client)  # type: ignore[arg-type]  # stands for the real one
        return [(n.state, n.code, n.number) for n in client.heard]

    def test_nothing_is_said_of_a_contract_that_simply_goes_on(self, world: World) -> None:
        assert self.tell(world, Hearing()) == []

    def test_a_pause_and_its_end(self, world: World) -> None:
        client, desk = Hearing(), world.agent.desk
        desk.store.set_state(desk.contract_id, "paused")
        paused = [("paused", "PARTICIPANT_PAUSED", 1)]
        assert self.tell(world, client) == self.tell(world, client) == paused
        desk.store.set_state(desk.contract_id, "running")
        assert self.tell(world, client) == [*paused, ("running", "PARTICIPANT_RESUMED", 2)]

    def test_it_is_said_again_where_the_operator_was_away_with_a_number_of_its_own(self, world: World) -> None:
        client, desk = Hearing(ServiceError("OPERATOR_AWAY", "nobody answers")), world.agent.desk
        desk.store.set_state(desk.contract_id, "paused")
        assert self.tell(world, client) == []
        assert world.guard.next_tell > time.monotonic(), "not at once again"
        assert self.tell(world, client) == [("paused", "PARTICIPANT_PAUSED", 2)]

    @pytest.mark.parametrize(
        ("error", "again"),
        [
            (AnsweredRefusedError("RUN_CLOSED", "no"), False),
            (AnsweredRefusedError("NOTICE_OLD", "no"), True),
            (AnsweredRefusedError("RATE_LIMITED", "too many"), True),
            (FailedError("STORE_FULL", "the disk is full"), True),
            (OSError(28, "No space left on device"), True),
        ],
        ids=lambda value: str(value).partition(":")[0],
    )
    def test_what_the_operator_refuses_for_good_is_not_repeated(
        self, world: World, error: Exception, again: bool
    ) -> None:
        """A disk that is full for a moment, or a limit on requests, must not leave a pause unsaid until a restart."""
        client, desk = Hearing(error), world.agent.desk
        desk.store.set_state(desk.contract_id, "paused")
        self.tell(world, client)
        assert bool(self.tell(world, client)) is again

    def test_the_end_of_the_policys_hours_and_their_beginning(self, world: World) -> None:
        client, config = Hearing(), world.guard.config
        hours = Hours(begin="20:00", end="06:00", zone="UTC")
        policy = config.policy.model_copy(update={"hours": hours})
        world.guard.config = config.model_copy(update={"policy": policy})
        world.guard.now = lambda: NOW
        assert self.tell(world, client) == [("paused", "POLICY_HOURS", 1)]
        world.guard.now = lambda: NOW.replace(hour=20)
        assert self.tell(world, client)[1:] == [("running", "PARTICIPANT_RESUMED", 2)]

    def test_a_pause_ends_the_attempt_that_runs(self, world: World) -> None:
        desk = world.agent.desk
        assert world.guard.trainer.interrupt(desk.contract_id) is None
        desk.store.set_state(desk.contract_id, "paused")
        with pytest.raises(RefusedError) as err:
            world.guard.trainer.interrupt(desk.contract_id)
        assert err.value.code == "PARTICIPANT_PAUSED"
        world.guard.stopping = True
        with pytest.raises(CancelledError):
            world.guard.trainer.interrupt(desk.contract_id)


class TestOrders:
    def test_an_order_is_answered(self, world: World) -> None:
        executor = world.play(order_frame(*world.order))
        ((kind, header, array),) = executor.sent
        assert kind == "reply"
        assert set(header) == {"reply"}
        reply = Reply.from_bytes(header["reply"].encode())
        assert reply.update is not None
        assert len(array) == 4 * 650
        assert world.states() == ["reserved", "spent"]

    def test_the_egress_ledger_knows_of_it_before_it_leaves(self, world: World) -> None:
        executor = FakeExecutor(world.guard, order_frame(*world.order), order_frame(*world.order))
        seen: list[list[Any]] = []
        executor.before_send = lambda: seen.append(world.left())
        world.guard.executor = executor  # type: ignore[assignment]  # stands for the real one
        world.guard.loop(world.client)  # type: ignore[arg-type]  # stands for the real one
        _, header, array = executor.sent[0]
        body = header["reply"].encode() + array
        assert [(e.kind, e.round, e.size, e.sha256) for e in seen[0]] == [
            (EgressKind.UPDATE, 2, len(body), sha256_hex(body))
        ]
        assert executor.sent[0] == executor.sent[1], "the same bytes again"
        assert [entry.times for entry in seen[1]] == [2], "it left twice, and is entered so before it does"
        assert world.states() == ["reserved", "spent"]

    def test_orders_without_end_do_not_fill_the_disk(self, world: World) -> None:
        """The same ones, genuine and not, again and again: what leaves is counted, and no table grows."""
        order, model = world.order
        frames = [
            order_frame(order, model, bundle="cd" * 32),
            order_frame(order, model),
            order_frame(b"rubbish", b""),
            order_frame(sign(read(order), world.agent.desk.run_key).to_bytes(), model),
            order_frame(*world.round.order(2, 2)),
            Frame(kind="malformed", header={}, array=b""),
        ]
        first = world.play(*frames)
        before, left = self.rows(world.store), sum(entry.times for entry in world.left())
        again = world.play(*frames * 20)
        assert self.rows(world.store) == before
        assert again.sent == first.sent * 20, "each answered by the same bytes"
        assert sum(entry.times for entry in world.left()) - left == len(again.sent) == 120

    def test_an_alarm_of_a_repeated_order_is_kept_once(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fedpact_client.order.count_witnesses", lambda *_: 0)
        world.play(order_frame(*world.order))
        alarms = world.store.alarms()
        assert "HEAD_FEW_WITNESSES" in {alarm.code for alarm in alarms}
        world.play(*[order_frame(*world.order)] * 3)
        assert world.store.alarms() == alarms

    def rows(self, store: Store) -> dict[str, int]:
        names = [name for (name,) in store._db.all("SELECT name FROM sqlite_master WHERE type = 'table'")]
        counts = {name: store._db.all(f"SELECT COUNT(*) FROM {name}") for name in names}
        assert {"egress", "alarms", "heads", "results", "outbox", "ledger"} <= counts.keys()
        return {name: int(count) for name, ((count,),) in counts.items()}

    def test_a_refusal_is_entered_as_one(self, world: World) -> None:
        executor = world.play(order_frame(*world.order, bundle="cd" * 32))
        assert executor.kinds == ["reply"]
        assert [(e.kind, e.round) for e in world.left()] == [(EgressKind.REFUSAL, 2)]
        assert world.states() == []

    @pytest.mark.parametrize(
        "what",
        ["unknown contract", "rubbish", "not canonical", "no object", "no contract", "a list", "unsigned", "other's"],
    )
    def test_what_is_no_order_for_this_agent_is_dropped(self, world: World, what: str) -> None:
        order, model = world.order
        from fedpact_contract.keys import generate_key

        data = {
            "unknown contract": world.round.forge(order, contract_id="7" * 64),
            "rubbish": b"rubbish",
            "not canonical": order + b" ",
            "no object": b"[]",
            "no contract": enveloped(order, b"{}"),
            "a list": enveloped(order, b"[]"),
            "unsigned": sign(read(order), generate_key()).to_bytes(),
            "other's": world.round.order(2, 2)[0],
        }[what]
        executor = world.play(order_frame(data, model), order_frame(order, model))
        assert executor.kinds == ["drop", "reply"]
        assert [entry.kind for entry in world.left()] == [EgressKind.NO_REPLY, EgressKind.UPDATE]

    @pytest.mark.parametrize(
        ("frame", "text"),
        [
            (Frame(kind="malformed", header={}, array=b""), b"E_ORDER_FORM"),
            (order_frame(b"rubbish", b""), b"E_NO_REPLY"),
        ],
        ids=["malformed", "rubbish"],
    )
    def test_the_text_in_place_of_a_reply_is_entered_before_it_leaves(
        self, world: World, frame: Frame, text: bytes
    ) -> None:
        executor = FakeExecutor(world.guard, frame)
        seen: list[list[Any]] = []
        executor.before_send = lambda: seen.append(world.left())
        world.guard.executor = executor  # type: ignore[assignment]  # stands for the real one
        world.guard.loop(world.client)  # type: ignore[arg-type]  # stands for the real one
        assert executor.sent == [("drop", {}, b"")]
        ((entry,),) = seen
        assert (entry.kind, entry.size, entry.sha256) == (EgressKind.NO_REPLY, len(text), sha256_hex(text))
        assert (entry.contract_id, entry.round, entry.detail) == (None, None, text.decode())

    @pytest.mark.parametrize(
        "header",
        [
            {},
            {"order": "{}"},
            {"bundle": BUNDLE},
            {"order": 1, "bundle": BUNDLE},
            {"order": "{}", "bundle": None},
            {"order": ["{}"], "bundle": BUNDLE},
            {"order": "{}", "bundle": BUNDLE, "round": 2},
        ],
    )
    def test_a_malformed_header_closes_the_pipe_and_the_executor_starts_again(
        self, world: World, monkeypatch: pytest.MonkeyPatch, header: dict[str, Any]
    ) -> None:
        monkeypatch.setattr(guard, "restart_seconds", lambda *_: 0.0)
        executor = world.play(Frame(kind="order", header=header, array=b""), order_frame(*world.order))
        assert executor.starts == 1
        assert executor.kinds == ["reply"], "the bad one was not answered"

    def test_a_broken_pipe_while_answering_is_survived_and_the_answer_is_kept(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(guard, "restart_seconds", lambda *_: 0.0)
        executor = FakeExecutor(world.guard, order_frame(*world.order), order_frame(*world.order))
        broken = [True]

        def gone() -> None:
            if broken:
                broken.pop()
                raise FrameError("FRAME_PEER_GONE", "The other side of the pipe is gone.")

        executor.before_send = gone
        world.guard.executor = executor  # type: ignore[assignment]  # stands for the real one
        world.guard.loop(world.client)  # type: ignore[arg-type]  # stands for the real one
        assert (executor.starts, executor.kinds) == (1, ["reply"])
        assert world.states() == ["reserved", "spent"], "nothing was drawn again"

    @pytest.mark.parametrize("method", ["reserve", "complete", "record_egress", "add_heads", "answers"])
    def test_where_the_ledger_fails_nothing_leaves(self, world: World, method: str, monkeypatch) -> None:
        def fail(*_arguments: Any, **_options: Any) -> None:
            raise FailedError("STORE_FULL", "The disk under the store is full.")

        monkeypatch.setattr(Store, method, fail)
        executor = world.play(order_frame(*world.order))
        entered = method != "record_egress"
        assert (executor.kinds, executor.stops > 0) == ((["drop"], False) if entered else ([], True))
        monkeypatch.undo()
        assert [entry.kind for entry in world.left()] == ([EgressKind.NO_REPLY] if entered else [])
        executor = world.play(order_frame(*world.order))
        assert executor.kinds == ["reply"], "asked again, it answers"
        assert world.states().count("spent") == 1

    def test_a_stop_while_training_leaves_the_attempt_charged(self, world: World, monkeypatch) -> None:
        def stopped(*_arguments: Any) -> None:
            raise CancelledError("AGENT_STOPPING", "The agent stops; this attempt stays charged.")

        mine = dataclasses.replace(world.agent.desk, train=stopped)
        world.guard.desks[mine.contract_id] = mine
        assert world.play(order_frame(*world.order)).kinds == ["drop"]
        assert world.states() == ["reserved"]
        assert [entry.kind for entry in world.left()] == [EgressKind.NO_REPLY]
        world.guard.desks[mine.contract_id] = world.agent.desk
        (sent,) = world.play(order_frame(*world.order)).sent
        assert world.states() == ["reserved", "reserved", "spent"], "a spare attempt, charged in full"
        from fedpact_contract.messages import Update

        assert Update.from_bytes(Reply.from_bytes(sent[1]["reply"].encode()).update.body).attempt == 2

    def test_a_trainer_that_hangs_is_refused_and_stays_charged(self, world: World) -> None:
        def hang(*_arguments: Any) -> None:
            raise TrainingFailedError("TRAINING_TIME", "Training had not ended after 300 seconds.")

        mine = dataclasses.replace(world.agent.desk, train=hang)
        world.guard.desks[mine.contract_id] = mine
        charged = world.store.budget(mine.data_set).charged
        (first, again) = world.play(order_frame(*world.order), order_frame(*world.order)).sent
        refusal = Refusal.from_bytes(Reply.from_bytes(first[1]["reply"].encode()).refusal.body)
        assert (refusal.code, refusal.attempts) == ("TRAINING_FAILED", 1)
        assert first == again, "the same bytes; no second attempt"
        assert world.states() == ["reserved", "failed"]
        assert world.store.budget(mine.data_set).charged > charged

    def test_copies_among_the_rows_are_refused_and_nothing_is_charged(self, world: World) -> None:
        def copies() -> None:
            raise InputError("DATA_DUPLICATES", "20 are exact copies.")

        mine = dataclasses.replace(world.agent.desk, own_rows=copies)
        world.guard.desks[mine.contract_id] = mine
        charged = world.store.budget(mine.data_set).charged
        (sent,) = world.play(order_frame(*world.order)).sent
        refusal = Refusal.from_bytes(Reply.from_bytes(sent[1]["reply"].encode()).refusal.body)
        assert (refusal.code, refusal.attempts) == ("TRAINING_FAILED", 0)
        assert (world.states(), world.store.budget(mine.data_set).charged) == ([], charged)

    def test_a_contract_that_was_withdrawn_answers_no_order(self, world: World) -> None:
        world.store.set_state(world.agent.desk.contract_id, "withdrawn")
        executor = world.play(order_frame(*world.order))
        reply = Reply.from_bytes(executor.sent[0][1]["reply"].encode())
        assert reply.refusal is not None
        assert world.states() == []

    def test_the_same_bad_order_for_ever_does_not_fill_the_disk(self, world: World) -> None:
        order, model = world.order
        bad = world.round.forge(order, results=())
        world.play(*[order_frame(bad, model)] * 5, *[order_frame(b'{"a":1}', model)] * 5)
        forged = sign(read(order), world.agent.desk.run_key).to_bytes()
        world.play(*[order_frame(forged, model)] * 5)
        codes = [alarm.code for alarm in world.store.alarms()]
        assert sorted(codes) == ["ORDER_SIGNATURE", "RECEIPT_MISSING"]
        assert [alarm.evidence for alarm in world.store.alarms()] == [bad, None]

    def test_an_order_without_a_new_head_is_refused(self, world: World) -> None:
        """Signed by the operator: a chain that ends where it began must not end the guard."""
        order, model = world.order
        first = read(world.round.order(1, 1)[0])
        size = world.store.heads(world.agent.desk.contract_id)[-1].size
        step = first.heads[-1].model_copy(update={"consistency": ()})
        executor = world.play(order_frame(world.round.forge(order, since=size, heads=(step,)), model))
        reply = Reply.from_bytes(executor.sent[0][1]["reply"].encode())
        assert reply.refusal is not None
        assert reply.countersignature is None
        assert "HEAD_NOT_NEWER" in {alarm.code for alarm in world.store.alarms()}


class TestExecutor:
    def test_one_that_dies_starts_again_after_a_pause(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(guard, "restart_seconds", lambda *_: 0.6)
        executor = FakeExecutor(world.guard, order_frame(*world.order))
        executor.alive = False
        started: list[float] = []
        begin = executor.start

        def start() -> None:
            started.append(time.monotonic())
            begin()

        executor.start = start  # type: ignore[method-assign]  # notes when
        world.guard.executor = executor  # type: ignore[assignment]  # stands for the real one
        begun = time.monotonic()
        world.guard.loop(world.client)  # type: ignore[arg-type]  # stands for the real one
        assert started[0] - begun >= 0.6
        assert (executor.starts, executor.stops, executor.kinds) == (1, 1, ["reply"])

    def test_one_that_cannot_be_started_is_tried_again(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(guard, "restart_seconds", lambda *_: 0.0)
        executor = FakeExecutor(world.guard, order_frame(*world.order))
        executor.alive = False
        failures = [FrameError("FRAME_PEER_GONE", "gone"), FailedError("SPAWN_FAILED", "no process")]
        begin = executor.start

        def start() -> None:
            if failures:
                raise failures.pop()
            begin()

        executor.start = start  # type: ignore[method-assign]  # fails twice
        world.guard.executor = executor  # type: ignore[assignment]  # stands for the real one
        world.guard.loop(world.client)  # type: ignore[arg-type]  # stands for the real one
        assert executor.kinds == ["reply"]

    def test_contracts_are_looked_after_while_it_is_away(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(guard, "restart_seconds", lambda *_: 1.5)
        executor = FakeExecutor(world.guard)
        executor.alive = False
        world.guard.executor = executor  # type: ignore[assignment]  # stands for the real one
        world.guard.loop(world.client)  # type: ignore[arg-type]  # stands for the real one
        assert len(world.client.asked) >= 2

    @pytest.mark.parametrize("raw", [b"\x00", b"\xf1" + b"\xff" * 12, b"GET / HTTP/1.1\r\n\r\n"])
    def test_a_malformed_frame_from_a_real_pipe(
        self, world: World, monkeypatch: pytest.MonkeyPatch, raw: bytes
    ) -> None:
        monkeypatch.setattr(guard, "restart_seconds", lambda *_: 0.0)
        got: list[Any] = []

        def malformed(pipe) -> None:
            pipe.receive(5.0)
            os.write(pipe._fds[1], raw)
            pipe.receive(5.0)

        def good(pipe) -> None:
            pipe.receive(5.0)
            frame = order_frame(*world.order)
            pipe.send(frame.kind, frame.header, frame.array)
            got.append(pipe.receive(10.0))
            world.guard.stopping = True

        spawner = Spawner(malformed, good)
        monkeypatch.setattr(children, "spawn", spawner)
        world.guard.executor.start()
        world.guard.loop(world.client)  # type: ignore[arg-type]  # stands for the real one
        world.guard.executor.stop()
        assert spawner.children[0].stopped
        assert [frame.kind for frame in got] == ["reply"]

    @pytest.mark.parametrize(
        ("code", "waits"),
        [
            (69, [2, 2, 2]),
            (77, [2, 2, 2]),
            (75, [2, 4, 8, 10, 10]),
            (0, [5, 5]),
            (70, [5]),
            (76, [5]),
            (78, [5]),
            (-9, [5]),
            (None, [5]),
        ],
    )
    def test_how_long_it_waits_follows_from_how_the_executor_ended(
        self, world: World, monkeypatch: pytest.MonkeyPatch, code: int | None, waits: list[int]
    ) -> None:
        now = [100.0]
        monkeypatch.setattr(guard.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(guard.time, "sleep", lambda _seconds: None)
        executor = FakeExecutor(world.guard)
        executor.stop = lambda: setattr(executor, "exit_code", code)  # type: ignore[method-assign]  # ends so
        world.guard.executor = executor  # type: ignore[assignment]  # stands for the real one
        for number, seconds in enumerate(waits):
            world.guard._restart_executor()
            now[0] += seconds - 0.1
            world.guard._restart_executor()
            assert executor.starts == number
            now[0] += 0.1
            world.guard._restart_executor()
            assert executor.starts == number + 1

    def test_once_let_in_it_counts_from_the_start_again(self, world: World) -> None:
        executor = FakeExecutor(world.guard)
        world.guard.executor = executor  # type: ignore[assignment]  # stands for the real one
        world.guard.refused = 4
        world.guard._publish()
        assert world.guard.refused == 4
        executor.connected = True
        world.guard._publish()
        assert world.guard.refused == 0

    def test_that_it_is_not_let_in_yet_is_said_once_and_stands_in_the_status(self, world: World) -> None:
        """As after kill -9: the operator's SuperLink has the last connection for up to a minute."""
        told: list[str] = []
        executor = FakeExecutor(world.guard)
        executor.alive = False
        world.guard.executor, world.guard.waits = executor, told.append  # type: ignore[assignment]  # stands for the real one
        for _ in range(3):
            world.guard._restart_executor()
            world.guard._publish()
            world.guard.restart_at = 0.0
            world.guard._restart_executor()
            executor.alive = False
        assert (len(told), world.guard.stopping) == (1, False)
        assert "an earlier connection of it, for up to a minute" in told[0]
        with HomeLock(world.guard.home.path):
            values = views.status(world.guard.home, world.store, "approved")
        assert (values["connected"], values["waiting"]) == (None, told[0])
        executor.alive = executor.connected = True
        world.guard._publish()
        assert Facts.read(world.guard.home).waiting is None
        executor.alive, executor.connected = False, False
        world.guard._restart_executor()
        assert len(told) == 2, "another time"


ISOLATION = Isolation(
    no_new_privs=True,
    user_and_network_namespace=True,
    ipc_namespace=True,
    network_kept=False,
    landlock_abi=6,
    tcp_denied=True,
    sockets_denied=True,
    missing=(),
)


class TestFacts:
    """What the guard tells of itself: to who started it, and in state.json."""

    @pytest.mark.parametrize(
        ("text", "code"), [(b"{", "JSON_SYNTAX"), (b"[]", "STATE_FILE"), (b'{"x":1}', "STATE_FILE")]
    )
    def test_a_state_that_somebody_damaged_is_named(self, world: World, text: bytes, code: str) -> None:
        world.guard.home.state_path.write_bytes(text)
        with pytest.raises(InputError) as err:
            Facts.read(world.guard.home)
        assert err.value.code.startswith(code)
        assert err.value.file == str(world.guard.home.state_path)

    def test_ready_is_told_once_when_the_operator_let_it_in(self, world: World) -> None:
        told: list[tuple[str, str, bool]] = []

        def ready(url: str, participant: str) -> None:
            told.append((url, participant, bool(Facts.read(world.guard.home).connected)))

        world.guard.ready, world.guard.now = ready, lambda: NOW
        executor = world.play(order_frame(*world.order))
        assert told == []
        executor.connected = True
        world.guard._publish()
        assert told == [("https://fl.example.cn:8443", world.guard.home.participant_id, True)], "status agrees by then"
        executor.alive = False
        world.guard._publish()
        assert Facts.read(world.guard.home).connected is None
        executor.alive = True
        world.guard._publish()
        assert (len(told), Facts.read(world.guard.home).connected) == (1, "2026-11-24T12:00:00Z")

    def test_the_next_guard_here_says_the_goodbye_that_a_killed_one_could_not(self, world: World) -> None:
        home = world.guard.home
        assert cut_off(home) is None
        executor = world.play()
        executor.connected, executor.node = True, "17"
        world.guard._publish()
        assert cut_off(home) == "17"
        again = Guard(home=home, config=world.guard.config, store=world.guard.store)
        assert again.executor.node == "17"
        again._publish()
        assert cut_off(home) == "17", "known until the next connection is"
        home.state_path.write_bytes(b"{")
        assert cut_off(home) is None

    def test_for_a_copy_of_a_home_and_after_a_restart_of_the_machine_it_says_none(
        self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Elsewhere the agent that this one was copied from may still run, and is not to be cut off by its copy."""
        home = world.guard.home
        executor = world.play()
        executor.connected, executor.node = True, "17"
        world.guard._publish()
        shutil.copytree(home.path, tmp_path / "another", symlinks=True)
        assert cut_off(AgentHome(tmp_path / "another")) is None
        assert cut_off(home) == "17"
        (tmp_path / "boot").write_text("another\n")
        monkeypatch.setattr("fedpact_client.facts.BOOT_ID", tmp_path / "boot")
        assert cut_off(home) is None
        (tmp_path / "boot").unlink()  # a system that does not say
        assert cut_off(home) is None
        again = Guard(home=home, config=world.guard.config, store=world.guard.store)
        again.executor.node = "17"
        again._publish()
        assert Facts.read(home).connection is None

    def test_isolation_is_kept(self, world: World) -> None:
        executor = world.play()
        facts = Facts.read(world.guard.home)
        assert (facts.process, facts.trainer, facts.executor) == (os.getpid(), None, None)
        executor.isolation = ISOLATION.model_copy(update={"network_kept": True})
        world.guard.trainer.isolation = ISOLATION.model_copy(update={"missing": ("a wall",)})
        world.guard._publish()
        facts = Facts.read(world.guard.home)
        assert facts.executor.sentence == "isolated, but for the network that it needs"
        assert facts.trainer.sentence == "not isolated: a wall"

    def test_the_guards_own_time_is_told_apart_from_training(self, world: World, monkeypatch) -> None:
        train = world.agent.desk.train

        def slow(*arguments: Any) -> Any:
            time.sleep(0.5)
            return train(*arguments)

        monkeypatch.setattr(TrainerChild, "train", lambda _self, *arguments: slow(*arguments))
        mine = dataclasses.replace(world.agent.desk, train=world.guard._train)
        world.guard.desks[mine.contract_id] = mine
        world.play(order_frame(*world.order), order_frame(*world.order))
        first, again = Facts.read(world.guard.home).rounds
        assert (first.contract, first.round) == (mine.contract_id, 2)
        assert first.training_ms >= 500
        assert 0 < first.guard_ms < 500
        assert (again.round, again.training_ms) == (2, 0), "from the outbox"

    def test_the_last_rounds_alone_are_kept(self, world: World) -> None:
        for number in range(1, ROUNDS + 6):
            world.guard._time("c" * 64, number, 0.0123)
        world.guard._publish()
        rounds = Facts.read(world.guard.home).rounds
        assert [each.round for each in rounds] == list(range(6, ROUNDS + 6))
        assert rounds[0].guard_ms == Decimal("12.3")

    def test_a_disk_that_does_not_take_it_ends_nothing(self, world: World, monkeypatch) -> None:
        def full(*_arguments: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Facts, "write", full)
        assert world.play(order_frame(*world.order)).kinds == ["reply"]

    def test_status_shows_it_while_it_runs(self, world: World, capsys: pytest.CaptureFixture[str]) -> None:
        from fedpact_client.text import show_status

        executor = FakeExecutor(world.guard)
        executor.connected, executor.isolation = True, ISOLATION.model_copy(update={"network_kept": True})
        world.guard.executor = executor  # type: ignore[assignment]  # stands for the real one
        world.guard.trainer.isolation = ISOLATION.model_copy(update={"missing": ("a\x1b wall",)})
        world.guard._time(world.agent.desk.contract_id, 2, 0.001)
        world.guard._publish()
        with HomeLock(world.guard.home.path):
            values = views.status(world.guard.home, world.store, "approved")
        assert values["connected"] is not None
        assert values["isolation"]["trainer"]["landlock_abi"] == 6
        assert values["isolation"]["trainer"]["sentence"] == "not isolated: a  wall"
        assert values["round_times"] == [
            {"contract": world.agent.desk.contract_id, "round": 2, "guard_ms": "1", "training_ms": "0"}
        ]
        show_status(values)
        shown = capsys.readouterr().out
        assert "executor     isolated, but for the network that it needs" in shown
        assert "trainer      not isolated: a  wall" in shown
        values = views.status(world.guard.home, world.store, "approved")
        assert (values["connected"], values["isolation"]["trainer"], values["round_times"]) == (None, None, [])


class TestLook:
    def test_each_contract_is_asked_for_its_close(self, world: World) -> None:
        world.play()
        assert world.client.asked == [f"/fedpact/v1/contracts/{world.agent.desk.contract_id}/closing"]

    @pytest.mark.parametrize("answers", [True, False], ids=["open", "away"])
    def test_it_is_asked_seldom_where_no_order_comes(self, world: World, answers: bool) -> None:
        """A contract that waits for a year would fill the egress ledger with questions."""

        def away() -> dict[str, Any]:
            raise ServiceError("OPERATOR_AWAY", "nobody answers")

        world.client.answer = world.client.answer if answers else away
        for _ in range(3):
            world.guard._look(world.client)
        assert len(world.client.asked) == 3
        world.guard.last_order -= guard.LONG_SECONDS
        for _ in range(3):
            world.guard._look(world.client)
        assert len(world.client.asked) == 4
        world.guard.quiet = {contract: at - guard.SELDOM_SECONDS for contract, at in world.guard.quiet.items()}
        world.guard._look(world.client)
        assert len(world.client.asked) == 5

    def test_an_operator_that_is_away_is_survived(self, world: World) -> None:
        def away() -> dict[str, Any]:
            raise ServiceError("OPERATOR_AWAY", "nobody answers")

        world.client.answer = away
        assert world.play(order_frame(*world.order)).kinds == ["reply"]

    @pytest.mark.parametrize(
        "failure", [InputError("X_Y", "x"), FailedError("STORE_FULL", "x")], ids=["its error", "our disk"]
    )
    def test_what_goes_wrong_there_ends_nothing(self, world: World, failure: Exception) -> None:
        def fail() -> dict[str, Any]:
            raise failure

        world.client.answer = fail
        assert world.play(order_frame(*world.order)).kinds == ["reply"]

    def test_a_contract_that_others_have_still_to_sign_is_no_error(self, world: World) -> None:
        def fail() -> dict[str, Any]:
            raise RefusedError("CONTRACT_NOT_SIGNED", "A party has not signed the contract yet.")

        world.client.answer = fail
        with structlog.testing.capture_logs() as told:
            assert world.guard._close(world.agent.desk.contract_id, world.client) is None
        assert [(line["log_level"], line["code"]) for line in told] == [("info", "CONTRACT_NOT_SIGNED")]

    def test_a_close_from_end_to_end(self, tmp_path: Path, home: AgentHome) -> None:
        run = closed_run(tmp_path)
        run.settle()
        for number in (1, 2, 3, 4):
            at = guard_of(run, number, home)
            with run.client(number) as client:
                at._look(client)
            assert at.store.contract(run.contract_id).state == "running"
        assert run.phase() == "closed"
        with run.client(4) as client:
            at._look(client)
            assert at.store.contract(run.contract_id).state == "closed"
            run.wire.sent.clear()
            at._look(client)
        assert run.wire.sent == [], "a closed contract is not asked for any more"

    def test_a_withdrawn_contract_is_still_closed(self, tmp_path: Path, home: AgentHome) -> None:
        """Whoever stops training keeps what it has earned."""
        run = closed_run(tmp_path)
        run.settle()
        at = guard_of(run, 2, home)
        at.store.set_state(run.contract_id, "withdrawn")
        with run.client(2) as client:
            at._look(client)
        assert run.federation.agent(2).desk.participant in run.state().signed

    def test_what_was_objected_to_is_left_alone_for_a_while(
        self, tmp_path: Path, home: AgentHome, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = closed_run(tmp_path)
        run.settle()
        at = guard_of(run, 3, home)
        run.serve("/evidence", {})
        with run.client(3) as client:
            at._look(client)
            run.wire.sent.clear()
            at._look(client)
            assert run.wire.sent == []
            monkeypatch.setattr(guard, "OBJECTED_SECONDS", 0.0)
            at.quiet.clear()
            run.wire.replace.clear()
            at._look(client)
        assert run.federation.agent(3).desk.participant in run.state().signed


def guard_of(run: ClosedRun, number: int, home: AgentHome) -> Guard:
    desk = run.federation.agent(number).desk
    made = Guard(home=home, config=home.config(), store=desk.store)
    made.desks[run.contract_id] = desk
    return made


def lost_set_9(config: AgentConfig) -> AgentConfig:
    return config.model_copy(update={"data_sets": tuple(d for d in config.data_sets if d.id != "set-9")})


class TestContracts:
    """A contract from this agent's signature to everybody's, against the operator's real API."""

    @pytest.fixture
    def made(self, tmp_path: Path):
        with lab(tmp_path) as at:
            at.configure()
            at.enrol()
            at.approve()
            at.declare()
            yield at

    def signed(self, made: Lab):
        contract = made.offer()
        with made.client() as client:
            offer = fetch_offer(client, contract.id)
            found = review(made.home, made.home.config(), made.store, offer.contract, utc_now(), read_data=False)
            commit(made.home, made.store, client, found, PASSPHRASE)
        return contract

    @pytest.mark.parametrize(("line", "declared"), [('entity = "who"\n', "who"), ("", None)])
    def test_its_orders_are_held_against_what_agent_toml_declares(
        self, made: Lab, line: str, declared: str | None
    ) -> None:
        contract = self.signed(made)
        made.others_sign(contract)
        text = made.home.config_path.read_text().replace('label = "ill"\n', f'label = "ill"\n{line}', 1)
        replace_file(made.home.config_path, text.encode())
        at = Guard(home=made.home, config=made.home.config(), store=made.store)
        with made.client() as client:
            at._look(client)
        assert at.desks[contract.id].entity == declared

    def test_a_source_pointed_at_another_data_sets_file_since_the_signature_is_refused(self, made: Lab) -> None:
        contract = self.signed(made)
        made.others_sign(contract)
        (made.home.path / "own.csv").write_text(ROWS.replace("20,f,yes", "90,f,yes"))
        made.configure(data_set=DATA_SET.replace("set-1", "set-9").replace("rows.csv", "own.csv"))
        with made.client() as client:
            draft = cards.prepare(made.home, made.home.config(), made.store, "set-9")
            cards.declare(made.home, made.store, client, draft, PASSPHRASE)
        at = Guard(home=made.home, config=made.home.config(), store=made.store)
        with made.client() as client:
            at._look(client)
        at.desks.pop(contract.id).check_allowed(1)
        text = made.home.config_path.read_text().replace('"rows.csv"', '"own.csv"')
        replace_file(made.home.config_path, text.encode())
        for config in (made.home.config(), lost_set_9(made.home.config())):
            at.config = config
            with made.client() as client, pytest.raises(RefusedError) as caught:
                at._desk(contract.id, client).check_allowed(1)
            assert caught.value.code == "DATA_SET_KNOWN_ELSEWHERE"
            at.desks.clear()

    def test_before_an_attempt_the_trainer_looks_for_copies(self, made: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        contract = self.signed(made)
        made.others_sign(contract)
        at, looked = Guard(home=made.home, config=made.home.config(), store=made.store), []
        monkeypatch.setattr(TrainerChild, "check", lambda _self, agreed, *, first: looked.append((agreed.id, first)))
        with made.client() as client:
            at._desk(contract.id, client).own_rows()
        assert looked == [(contract.id, True)], "nothing was charged yet: its own rules are asked too"
        assert at.training > 0, "the trainer's time, not the guard's"
        run_key = made.home.run_key(contract.id)
        made.store.reserve(contract.id, 1, "ab" * 32, run_key)
        with made.client() as client:
            at._desk(contract.id, client).own_rows()
        assert looked[1:] == [(contract.id, False)], "an attempt was charged: the rules are asked no more"

    def test_a_data_set_that_agent_toml_has_lost_keeps_no_contract_from_closing(self, made: Lab) -> None:
        contract = self.signed(made)
        made.others_sign(contract)
        config = made.home.config().model_copy(update={"data_sets": ()})
        at = Guard(home=made.home, config=config, store=made.store)
        with made.client() as client:
            at._look(client)
        assert at.desks[contract.id].entity is None
        with pytest.raises(InputError, match="CONFIG_DATA_SET"):
            at.desks[contract.id].check_allowed(1)

    def test_it_runs_when_everybody_has_signed(self, made: Lab) -> None:
        contract = self.signed(made)
        at = Guard(home=made.home, config=made.home.config(), store=made.store)
        with made.client() as client:
            at._look(client)
            assert made.store.contract(contract.id).state == "signed"
            assert at.desks == {}
            made.others_sign(contract)
            at._look(client)
            assert made.store.contract(contract.id).state == "running"
            desk = at.desks[contract.id]
            assert set(desk.run_keys) == {contract.operator.id, *contract.by_id()}
            made.wire.sent.clear()
            again = Guard(home=made.home, config=made.home.config(), store=made.store)
            again._look(client)
        assert contract.id in again.desks
        assert [path.rsplit("/", 1)[1] for path in made.wire.paths()] == ["closing"], "the signatures are kept here"

    def test_signatures_that_do_not_hold_are_not_kept(self, made: Lab) -> None:
        import json

        contract = self.signed(made)
        made.others_sign(contract)
        at = Guard(home=made.home, config=made.home.config(), store=made.store)

        def forged(content: bytes) -> bytes:
            value = json.loads(content)
            value["contract"]["signatures"][0]["value"] = "0" * 128
            return canonical_bytes(value)

        made.wire.replace[f"GET /contracts/{contract.id}"] = forged
        with made.client() as client:
            at._look(client)
        assert at.desks == {}
        assert made.store.contract(contract.id).state == "signed"

    def test_a_run_key_that_is_gone(self, made: Lab) -> None:
        contract = self.signed(made)
        made.others_sign(contract)
        made.home.run_key_path(contract.id).unlink()
        at = Guard(home=made.home, config=made.home.config(), store=made.store)
        with made.client() as client:
            at._look(client)
        assert at.desks == {}


class TestProcess:
    """`Guard.run` in this process, its children threads."""

    @pytest.fixture(autouse=True)
    def handlers(self):
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        yield
        for number, handler in before.items():
            signal.signal(number, handler)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_ends_both_children(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        with lab(tmp_path) as at:
            at.enrol()
            spawner = Spawner(lambda pipe: pipe.receive(30.0) and pipe.receive(30.0))
            monkeypatch.setattr(children, "spawn", spawner)
            made = Guard(home=at.home, config=at.home.config(), store=at.store)
            monkeypatch.setattr(Guard, "_look", lambda _self, _client: None)

            def interrupt() -> None:
                while len(spawner.children) < 2:
                    time.sleep(0.01)
                os.kill(os.getpid(), number)

            threading.Thread(target=interrupt).start()
            assert made.run() == 0
            assert [child.stopped for child in spawner.children] == [True, True]

    def test_children_that_end_at_once_are_survived(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(guard, "restart_seconds", lambda *_: 0.05)
        with lab(tmp_path) as at:
            at.enrol()
            spawner = Spawner(lambda _pipe: None)
            monkeypatch.setattr(children, "spawn", spawner)
            made = Guard(home=at.home, config=at.home.config(), store=at.store)

            def look(_self: Guard, _client: Any) -> None:
                made.stopping = len(spawner.children) > 4

            monkeypatch.setattr(Guard, "_look", look)
            made.config = made.config.model_copy(update={"network": _Eager()})
            assert made.run() == 0
            assert len(spawner.children) > 4

    def test_everything_in_a_home_is_its_owners_alone(self, tmp_path: Path) -> None:
        """The real agent with its children, started from a shell whose umask hides nothing."""
        with lab(tmp_path) as at:
            at.enrol()
            home = at.home
        before = os.umask(0)
        try:
            program = "from fedpact_client.cli import main; main()"
            line = [sys.executable, "-c", program, "start", "--home", str(home.path)]
            process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        finally:
            os.umask(before)
        try:
            until = time.monotonic() + 60
            facts = None
            while time.monotonic() < until and process.poll() is None:
                facts = Facts.read(home)
                if facts and facts.trainer and facts.executor:
                    break
                time.sleep(0.2)
            assert facts is not None
            assert facts.process == process.pid
            assert facts.trainer.landlock_abi == facts.executor.landlock_abi == landlock_abi()
            umasks = [_umask(pid) for pid in (process.pid, *_children_of(process.pid))]
            assert umasks == ["0077"] * 3
        finally:
            process.terminate()
            out = process.communicate(timeout=30)[0]
        assert (process.returncode, out) == (0, b""), "it was never let in"
        found = {path: stat.S_IMODE(path.stat().st_mode) for path in (home.path, *home.path.rglob("*"))}
        assert {"agent.db", "state.json", "guard.lock"} <= {path.name for path in found}
        assert {"trainer.log", "executor.log"} <= {path.name for path in found}
        assert {p for p, mode in found.items() if mode != (0o700 if p.is_dir() else 0o600)} == set()

    def test_one_guard_a_home(self, tmp_path: Path) -> None:
        with lab(tmp_path) as at, HomeLock(at.home.path), pytest.raises(InputError) as err:
            guard.run(at.home.path)
        assert err.value.code == "HOME_LOCKED"

    def test_a_home_where_the_sandbox_reads_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It was made before the virtual environment, or was moved there."""
        with lab(tmp_path) as at:
            at.enrol()
        monkeypatch.setattr(sys, "prefix", str(at.home.path.parent))
        monkeypatch.setattr(Guard, "run", lambda _self: 0)
        with pytest.raises(InputError) as err:
            guard.run(at.home.path)
        assert (err.value.code, err.value.file) == ("HOME_IN_INSTALLATION", str(at.home.path))

    def test_an_agent_that_is_not_enrolled(self, tmp_path: Path) -> None:
        with lab(tmp_path) as at:
            at.store.close()
            with pytest.raises(InputError) as err:
                guard.run(at.home.path)
        assert err.value.code == "NOT_ENROLLED"


def _children_of(pid: int) -> list[int]:
    return [int(n) for path in Path(f"/proc/{pid}/task").glob("*/children") for n in path.read_text().split()]


def _umask(pid: int) -> str:
    return re.findall(r"Umask:\t(\d+)", Path(f"/proc/{pid}/status").read_text())[0]


class _Eager:
    poll_seconds = 0.0
    patched = False
