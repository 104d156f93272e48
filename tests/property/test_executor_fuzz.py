"""A hostile executor: whatever it sends, the guard signs only answers to its own valid orders, once a round.

The executor counts as outside. It may replay, reorder and change orders and models, send what is no frame at all, and
be started again as often as it likes. Afterwards the store and everything that left must still be in order.
"""

import dataclasses
import functools
import json
import os
import select
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.federation import BUNDLE
from tests.support.open_round import open_round, read

from fedpact_client import guard as guards
from fedpact_client.answer import Desk, Trained
from fedpact_client.children import EXECUTOR_KINDS, ExecutorChild
from fedpact_client.frames import MAGIC, PREFIX, FrameError, Pipe
from fedpact_client.guard import Guard
from fedpact_client.home import AgentHome, init
from fedpact_client.store import EgressKind, Store
from fedpact_contract.arrays import update_digest
from fedpact_contract.canonical import canonical_bytes, sha256_hex
from fedpact_contract.files import replace_file
from fedpact_contract.keys import generate_key
from fedpact_contract.log import Checkpoint, Countersignature
from fedpact_contract.messages import Order, Refusal, Reply, Update
from fedpact_contract.record import open_signed, sign

PARAMETERS = 650
FRAME_SECONDS = 0.05


class Draws:
    """A trainer whose every attempt is another draw; `during` is what happens meanwhile."""

    def __init__(self) -> None:
        self.count: Counter[int] = Counter()
        self.during: Callable[[], None] = lambda: None

    def __call__(self, _contract: Any, round_number: int, _attempt: int, _base: bytes) -> Trained:
        self.count[round_number] += 1
        self.during()
        return Trained(update=os.urandom(4 * PARAMETERS), noise="csprng", fingerprints=("a" * 64,))


class Ends:
    """Stands for the executor's process: the guard's end of the pipes, and ours."""

    def __init__(self) -> None:
        down, up = os.pipe(), os.pipe()
        self.pipe = Pipe(up[0], down[1], max_array=1 << 20, kinds=EXECUTOR_KINDS, frame_seconds=FRAME_SECONDS)
        self.write_fd = up[1]
        self.inside = Pipe(down[0], os.dup(up[1]), max_array=1 << 20)
        os.set_blocking(self.write_fd, False)
        self.running = True

    def stop(self, _grace: float = 0.0) -> int:
        self.pipe.close()
        self.running = False
        return 70

    @property
    def waits(self) -> bool:
        """Whether the guard has not read all that was sent."""
        return not self.pipe.closed and bool(select.select([self.pipe.read_fd], [], [], 0.0)[0])

    def hang_up(self) -> None:
        """Close both directions, whatever the guard is doing."""
        self.inside.close()
        os.close(self.write_fd)
        self.write_fd = -1

    def drain(self) -> Iterator[Any]:
        """What the guard sent."""
        while True:
            try:
                frame = self.inside.receive(0.0)
            except FrameError:  # nothing more, or the pipe is closed
                break
            if frame is None:
                break
            yield frame
        if self.write_fd >= 0:
            self.hang_up()


class Hostile(ExecutorChild):
    """An executor that sends the next bytes of the script whenever the guard listens."""

    def play(self, guard: Guard, script: list[bytes]) -> None:
        self.guard, self.script = guard, script
        self.ends: list[Ends] = []
        self.start()

    def start(self) -> None:
        self.ends.append(Ends())
        self._child = self.ends[-1]  # type: ignore[assignment]  # stands for the real one

    def receive(self, _timeout: float) -> Any:
        if self.script:
            data = self.script.pop(0)
            assert os.write(self.ends[-1].write_fd, data) == len(data)
        elif not self.ends[-1].waits:
            self.guard.stopping = True
            return None
        return super().receive(0.0)


class Silent:
    """An operator whom nobody asks."""

    def get(self, *_arguments: Any, **_options: Any) -> dict[str, Any]:
        return {"state": "none"}


def framed(head: bytes, array: bytes = b"") -> bytes:
    return PREFIX.pack(MAGIC, len(head), len(array)) + head + array


def frame_bytes(kind: str, header: Any, array: bytes = b"") -> bytes:
    return framed(canonical_bytes({"header": header, "kind": kind}), array)


@dataclasses.dataclass(frozen=True)
class World:
    """What all examples share: orders with their models, and a home; each example has its own copy of the store."""

    store: bytes
    desk: Desk
    orders: list[tuple[bytes, bytes]]  # this agent's, of rounds 1 (answered) and 2
    others: list[tuple[bytes, bytes]]  # by the same operator, for other participants and for another contract
    home: AgentHome
    stranger: Ed25519PrivateKey


@functools.cache
def world() -> World:
    played = open_round(Path(_FOLDER.name))
    desk = played.federation.agent(1).desk
    home = init(Path(_FOLDER.name) / "home", name="A", entity_code="9" * 18, sector="x", passphrase=b"correct horse")
    text = home.config_path.read_text().replace('url = ""', 'url = "https://fl.example.cn:8443"', 1)
    replace_file(home.config_path, text.encode())
    return World(
        store=(played.federation.home.parent / "agent0" / "agent.db").read_bytes(),
        desk=desk,
        orders=[played.order(number, 1) for number in (1, 2)],
        others=[
            *(pair for (_, who), pair in sorted(played.orders.items()) if who != desk.participant),
            (played.forge(played.order(2, 1)[0], contract_id="7" * 64), played.order(2, 1)[1]),
        ],
        home=home,
        stranger=generate_key(),
    )


_FOLDER = tempfile.TemporaryDirectory(prefix="fedpact-executor-fuzz-")


@contextmanager
def fresh() -> Iterator[tuple[Guard, Hostile, Draws]]:
    """A guard at a copy of the agent's store, with a hostile executor."""
    with tempfile.TemporaryDirectory(prefix="fedpact-executor-fuzz-") as folder:
        copy = Path(folder) / "agent.db"
        copy.write_bytes(world().store)
        copy.chmod(0o600)
        with Store(copy) as store:
            draws = Draws()
            home, desk = world().home, world().desk
            guard = Guard(home=home, config=home.config(), store=store)
            guard.desks[desk.contract_id] = dataclasses.replace(desk, store=store, train=draws)
            hostile = Hostile(home=home, config=home.config())
            guard.executor = hostile
            yield guard, hostile, draws


def forged(order: bytes, **changes: Any) -> bytes:
    """Another order, signed by somebody who is not the operator."""
    return sign(read(order).model_copy(update=changes), world().stranger).to_bytes()


def changed(order: bytes, path: tuple[str, ...], value: Any) -> bytes:
    """The order's envelope with one value replaced, its signature as it was."""
    envelope = json.loads(order)
    place = envelope
    for key in path[:-1]:
        place = place[key] if isinstance(place, dict) else place[int(key)]
    if isinstance(place, dict):
        place[path[-1]] = value
    return canonical_bytes(envelope)


def scripts() -> st.SearchStrategy[list[bytes]]:
    """What a hostile executor may send: its own orders, other people's, changed ones, frames of any kind, no frames."""
    at = world()
    pairs = st.sampled_from([*at.orders, *at.others])
    models = (
        st.sampled_from([pair[1] for pair in at.orders]) | st.binary(max_size=64) | st.just(os.urandom(8 * PARAMETERS))
    )
    texts = st.text(max_size=40)
    json_values = st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
        max_leaves=6,
    )
    mutated = st.one_of(
        st.builds(
            forged,
            pairs.map(lambda pair: pair[0]),
            round=st.integers(1, 5),
            participant=st.sampled_from([at.desk.participant, "0" * 64]),
            base_digest=st.sampled_from(["0" * 64, read(at.orders[1][0]).base_digest]),
        ),
        st.builds(
            changed,
            pairs.map(lambda pair: pair[0]),
            st.sampled_from([("payload",), ("type",), ("signatures",), ("signatures", "0", "value"), ("more",)]),
            json_values,
        ),
        st.builds(lambda pair, cut: pair[0][:cut], pairs, st.integers(0, 400)),
        st.builds(
            lambda pair, place: pair[0][: place % len(pair[0])] + b"~" + pair[0][place % len(pair[0]) + 1 :],
            pairs,
            st.integers(0),
        ),
        st.just(b"[" * 3000),
        st.just(b'{"payload":"","signatures":[],"type":"x"}'),
    )
    order_texts = pairs.map(lambda pair: pair[0].decode()) | mutated.map(lambda data: data.decode()) | texts
    bundles = st.just(BUNDLE) | st.just("cd" * 32) | texts
    good_frames = st.builds(
        lambda pair, bundle: frame_bytes("order", {"order": pair[0].decode(), "bundle": bundle}, pair[1]),
        pairs,
        st.just(BUNDLE),
    )
    order_frames = st.builds(
        lambda text, bundle, model: frame_bytes("order", {"order": text, "bundle": bundle}, model),
        order_texts,
        bundles,
        models,
    )
    odd_headers = st.builds(
        lambda kind, header, array: frame_bytes(kind, header, array),
        st.sampled_from(["order", "order", "malformed", "reply", "drop", "setup", "sign", "countersign", "", "\u202e"]),
        json_values | st.dictionaries(st.sampled_from(["order", "bundle", "reply"]), json_values, max_size=3),
        st.binary(max_size=32),
    )
    raw = st.one_of(
        st.binary(max_size=200),
        st.builds(
            lambda head, array: PREFIX.pack(MAGIC, head, array), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
        ),
        st.builds(lambda data, cut: data[:cut], good_frames, st.integers(0, 2000)),
        st.binary(max_size=80).map(framed),
        st.binary(max_size=40).map(
            lambda junk: framed(b'{"header":{"bundle":"x","order":"' + junk + b'"},"kind":"order"}')
        ),
        st.just(framed(b'{"header":{"bundle":"x","order":"\\ud800"},"kind":"order"}')),
    )
    at_once = st.builds(lambda *frames: b"".join(frames), good_frames, good_frames | order_frames | raw)
    return st.lists(
        st.one_of(good_frames, good_frames, at_once, order_frames, order_frames, odd_headers, raw),
        min_size=1,
        max_size=8,
    )


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.deferred(scripts))
def test_a_hostile_executor_gets_one_draw_a_round_and_no_other_signature(script: list[bytes]) -> None:
    before, guards.restart_seconds = guards.restart_seconds, lambda *_: 0.0
    try:
        with fresh() as (guard, hostile, draws):
            hostile.play(guard, list(script))
            guard.loop(Silent())  # type: ignore[arg-type]  # stands for the operator; it never raises
            sent = [frame for ends in hostile.ends for frame in ends.drain()]
            check_store(guard.store, draws)
            check_sent(guard.store, sent)
    finally:
        guards.restart_seconds = before


def check_store(store: Store, draws: Draws) -> None:
    """One draw and one digest a round, each attempt charged."""
    rows = [row for row in store.rows(world().desk.data_set) if row.contract_id == world().desk.contract_id]
    spent = Counter(row.round for row in rows if row.state == "spent")
    assert set(spent.values()) <= {1}
    assert draws.count.keys() <= {2}, "round 1 was answered before"
    assert all(count == 1 for count in draws.count.values())
    assert [row.state for row in rows if row.round == 2] == ["reserved", "spent"][: 2 * draws.count[2]]
    assert set(spent) == {1} | set(draws.count)


def check_sent(store: Store, sent: list[Any]) -> None:
    """Every reply is the outbox's, answers a genuine order of this agent, and stands in the egress ledger."""
    kept = {(reply, array or b"") for reply, array in store._db.all("SELECT reply, array FROM outbox")}
    left = Counter[str]()
    for entry in store.egress():
        left[entry.sha256 if entry.kind in (EgressKind.UPDATE, EgressKind.REFUSAL) else entry.kind] += entry.times
    replies = [(frame.header["reply"].encode(), frame.array) for frame in sent if frame.kind == "reply"]
    assert {frame.kind for frame in sent} <= {"reply", "drop"}
    assert left[EgressKind.NO_REPLY] >= sum(frame.kind == "drop" for frame in sent)
    assert len({(e.kind, e.sha256) for e in store.egress()}) == len(store.egress()), "what repeats is counted"
    genuine = [read(order) for order, _ in world().orders]
    heads = {
        (record.size, record.root)
        for order in genuine
        for record in (Checkpoint.from_bytes(step.checkpoint.body) for step in order.heads)
    }
    key = world().desk.run_keys[world().desk.participant]
    for data, array in replies:
        assert (data, array) in kept
        assert left[sha256_hex(data + array)] >= replies.count((data, array))
        reply = Reply.from_bytes(data)
        check_answer(reply, array, genuine, key)
        if reply.countersignature is not None:
            record: Countersignature = open_signed(reply.countersignature, Countersignature, key)
            assert (record.size, record.root) in heads, "a head that the operator signed"
    assert len({data for data, _ in replies if Reply.from_bytes(data).update is not None}) <= 2


def check_answer(reply: Reply, array: bytes, genuine: list[Order], key: str) -> None:
    """An answer to one of the operator's orders to this agent."""
    if reply.refusal is not None:
        refusal: Refusal = open_signed(reply.refusal, Refusal, key)
        assert refusal.contract_id == world().desk.contract_id
        assert refusal.round in {order.round for order in genuine}
        assert array == b""
        return
    assert reply.update is not None
    update: Update = open_signed(reply.update, Update, key)
    assert (update.contract_id, update.participant) == (world().desk.contract_id, world().desk.participant)
    assert (update.round, update.base_digest) in {(order.round, order.base_digest) for order in genuine}
    assert update.update_digest == update_digest(array)


def test_an_honest_executor_is_answered() -> None:
    """That the checks above look at something: the good order alone gives exactly one update."""
    script = [
        frame_bytes("order", {"order": world().orders[1][0].decode(), "bundle": BUNDLE}, world().orders[1][1])
    ] * 2
    with fresh() as (guard, hostile, draws):
        hostile.play(guard, script)
        guard.loop(Silent())  # type: ignore[arg-type]  # stands for the operator
        sent = [frame for ends in hostile.ends for frame in ends.drain()]
        assert [frame.kind for frame in sent] == ["reply", "reply"]
        assert sent[0] == sent[1]
        assert draws.count == {2: 1}
        check_store(guard.store, draws)
        check_sent(guard.store, sent)


def good(number: int) -> bytes:
    order, model = world().orders[number - 1]
    return frame_bytes("order", {"order": order.decode(), "bundle": BUNDLE}, model)


def played(script: list[bytes], during: Callable[[Hostile], None] = lambda _hostile: None) -> tuple[list[Any], Draws]:
    """What the guard sent for a script, checked as above; `during` happens while it trains."""
    before, guards.restart_seconds = guards.restart_seconds, lambda *_: 0.0
    try:
        with fresh() as (guard, hostile, draws):
            draws.during = lambda: during(hostile)
            hostile.play(guard, script)
            guard.loop(Silent())  # type: ignore[arg-type]  # stands for the operator
            sent = [frame for ends in hostile.ends for frame in ends.drain()]
            check_store(guard.store, draws)
            check_sent(guard.store, sent)
            return sent, draws
    finally:
        guards.restart_seconds = before


def test_a_pipe_closed_between_charge_and_answer_costs_one_draw_and_loses_nothing() -> None:
    """The executor goes while the trainer works; the next one gets the very update that was made, and no other."""
    sent, draws = played([good(2)], lambda hostile: hostile.ends[-1].hang_up())
    assert (sent, draws.count) == ([], {2: 1})
    gone: list[bool] = []

    def once(hostile: Hostile) -> None:
        if not gone:
            gone.append(True)
            hostile.ends[-1].hang_up()
            hostile.script.extend([good(2), good(2)])

    sent, draws = played([good(2)], once)
    assert draws.count == {2: 1}
    assert [frame.kind for frame in sent] == ["reply", "reply"]
    assert sent[0] == sent[1]
    assert Reply.from_bytes(sent[0].header["reply"].encode()).update is not None


def test_two_orders_for_one_round_at_once_are_one_draw() -> None:
    sent, draws = played([good(2) + good(2) + good(2)])
    assert draws.count == {2: 1}
    assert len({frame.header["reply"] for frame in sent}) == 1
    assert len(sent) == 3


def test_an_old_order_gets_its_old_answer_and_no_draw() -> None:
    sent, draws = played([good(1), good(2), good(1)])
    assert draws.count == {2: 1}
    rounds = [Update.from_bytes(Reply.from_bytes(f.header["reply"].encode()).update.body).round for f in sent[:2]]
    assert rounds == [1, 2]
    assert {f.header["reply"] for f in sent if f.kind == "reply"} == {sent[0].header["reply"], sent[1].header["reply"]}


@pytest.mark.parametrize("kind", ["sign", "countersign", "delegate", "reply", "setup"])
def test_chosen_bytes_are_never_signed(kind: str) -> None:
    """There is no frame that asks for a signature: the pipe is closed, and nothing was sent."""
    wanted = {"bytes": "00" * 32, "order": world().orders[1][0].decode(), "bundle": BUNDLE}
    sent, draws = played([frame_bytes(kind, wanted, b"12345678")])
    assert (sent, draws.count) == ([], {})


@pytest.mark.parametrize("number", range(4))
def test_an_order_for_somebody_else_or_another_contract_is_dropped(number: int) -> None:
    order, model = [world().others[0], world().others[-2], world().others[-1], world().others[-1]][number]
    if number == 3:  # the contract is this agent's, the operator's signature another order's
        envelope = json.loads(order)
        envelope["payload"] = json.loads(world().orders[1][0])["payload"]
        order = canonical_bytes(envelope)
    sent, draws = played([frame_bytes("order", {"order": order.decode(), "bundle": BUNDLE}, model)])
    assert [frame.kind for frame in sent] == ["drop"]
    assert draws.count == {}


@pytest.mark.parametrize(
    "data",
    [
        PREFIX.pack(MAGIC, 1 << 31, 8),
        PREFIX.pack(MAGIC, 10, (1 << 20) + 1),
        b"\x00" * 13,
        framed(b"[" * 5000),
    ],
    ids=["long header", "long array", "no magic", "deep"],
)
def test_an_oversized_or_malformed_frame_closes_the_pipe_and_the_next_order_is_answered(data: bytes) -> None:
    sent, draws = played([data, good(2)])
    assert [frame.kind for frame in sent] == ["reply"]
    assert draws.count == {2: 1}


def test_half_a_frame_closes_the_pipe() -> None:
    sent, draws = played([good(2)[:-1], good(2)])
    assert [frame.kind for frame in sent] == ["reply"]
    assert draws.count == {2: 1}
