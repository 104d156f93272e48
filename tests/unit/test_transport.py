"""The round loop's transport: Flower's Grid with hostile nodes behind it, and the in-memory double."""

import hashlib
import json
import os
import sys
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from tests.support.memory_transport import MemoryTransport

from fedpact_contract.errors import FailedError
from fedpact_contract.request import node_id, node_public_pem
from fedpact_server import app
from fedpact_server.app import FLAT, INLINE_BYTES, MAX_OBJECTS, GridTransport
from fedpact_server.transport import Incoming, Outgoing, Transport

RUN = 7
PEMS = [node_public_pem(ec.generate_private_key(ec.SECP384R1())) for _ in range(3)]
NODES = [node_id(pem) for pem in PEMS]
ORDER = b'{"round": 1}'
MODEL = bytes(8 * 10)


class FakeRuntime:
    """SuperLink's Runtime API, as far as replies go."""

    def __init__(self):
        self.replies = []  # (proto, tree)
        self.objects = {}  # id -> content, or b"" while it is announced alone
        self.asked, self.confirmed, self.pulled = [], [], []

    def PullMessages(self, request):  # noqa: N802 - Flower's name
        self.asked.append(list(request.message_ids))
        found = [(m, t) for m, t in self.replies if m.metadata.reply_to_message_id in request.message_ids]
        self.replies = [each for each in self.replies if each not in found]
        return PullAppMessagesResponse(messages_list=[m for m, _ in found], message_object_trees=[t for _, t in found])

    def PullObject(self, request):  # noqa: N802 - Flower's name
        self.pulled.append(request.object_id)
        content = self.objects.get(request.object_id)
        if content is None:
            return PullObjectResponse(object_found=False)
        return PullObjectResponse(object_found=True, object_available=content != b"", object_content=content)

    def ConfirmMessageReceived(self, request):  # noqa: N802 - Flower's name
        self.confirmed.append(request.message_object_id)


class FakeGrid(HttpGrid):
    """Flower's Grid without a connection."""

    def __init__(self, runtime):
        super().__init__(token="test")
        self._client = runtime
        self.messages = []
        self.refused = set()
        self.nodes = [
            SimpleNamespace(node_id=100 + i, public_key=pem.encode(), status="online") for i, pem in enumerate(PEMS)
        ]

    def get_nodes(self):
        return self.nodes

    def push_messages(self, messages):
        self.messages += list(messages)
        return ["" if m.metadata.dst_node_id in self.refused else f"m{m.metadata.dst_node_id}" for m in messages]


class Bench:
    def __init__(self):
        self.runtime = FakeRuntime()
        self.grid = FakeGrid(self.runtime)
        self.now = 0.0
        self.transport = GridTransport(self.grid, RUN, clock=lambda: self.now)

    def send(self, *nodes, model=MODEL):
        orders = [Outgoing(node=node, order=ORDER, model=model) for node in nodes or NODES[:1]]
        return self.transport.send(orders, 60.0)

    def poll(self, *ids, after=1.0):
        self.now += after
        return self.transport.poll(list(ids) or [f"m{100 + i}" for i in range(3)])

    def reply(self, content=None, *, to="m100", src=100, error=None, withhold=(), spoil=None):
        """A node pushes a reply; content: a RecordDict. Returns its object id."""
        metadata = Metadata(RUN, "", src, 1, to, "", 1.0, 60.0, "train")
        message = make_message(metadata=metadata, content=content, error=error)
        message.metadata.__dict__["_message_id"] = message.object_id
        objects = get_all_nested_objects(message)
        for identity, each in objects.items():
            kind = type(each).__name__
            self.runtime.objects[identity] = b"" if kind in withhold else each.deflate()
            if spoil is not None and kind == spoil[0]:
                self.runtime.objects[identity] = spoil[1](each.deflate())
        self.runtime.replies.append((message_to_proto(remove_content_from_message(message)), get_object_tree(message)))
        return message.object_id


@pytest.fixture(autouse=True)
def serverapp(monkeypatch):
    """What Flower sets in a ServerApp's process before our main is called."""
    for name, value in (("_run_id", RUN), ("_task_id", 3), ("_node_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)


@pytest.fixture
def bench():
    return Bench()


def reply_of(reply=b"yes", update=None, **more):
    values = {"reply": reply} | ({} if update is None else {"update": update}) | more
    return RecordDict({"reply": ConfigRecord(values)})


def flat(data, dtype="float32", shape=None, stype=FLAT):
    return Array(dtype, (len(data) // 4,) if shape is None else shape, stype, data)


def with_array(array, name="update"):
    content = reply_of()
    content["update"] = ArrayRecord({name: array})
    return content


class TestOnline:
    def test_nodes_are_named_by_their_key(self, bench):
        bench.grid.nodes[2].status = "offline"
        assert bench.transport.online() == {NODES[0]: True, NODES[1]: True, NODES[2]: False}

    def test_a_node_with_another_kind_of_key_is_none_of_ours(self, bench):
        bench.grid.nodes[0].public_key = b"\xff\xfe"
        bench.grid.nodes[1].public_key = node_public_pem(ec.generate_private_key(ec.SECP256R1())).encode()
        assert bench.transport.online() == {NODES[2]: True}


class TestSend:
    def test_one_message_a_node(self, bench):
        assert bench.send(NODES[0], NODES[2]) == {"m100": NODES[0], "m102": NODES[2]}
        first = bench.grid.messages[0]
        assert first.metadata.dst_node_id == 100
        assert first.metadata.ttl == 60.0
        assert dict(first.content["order"]) == {"order": ORDER, "model": MODEL}

    def test_a_large_model_is_an_array_that_messages_share(self, bench):
        model = bytes(range(256)) * (INLINE_BYTES // 256) + bytes(8)
        bench.send(*NODES, model=model)
        contents = [m.content for m in bench.grid.messages]
        assert {dict(c["order"]).get("model") for c in contents} == {None}
        assert {id(c["model"]) for c in contents} == {id(contents[0]["model"])}
        array = contents[0]["model"]["model"]
        assert (array.dtype, array.shape, array.stype, array.data) == ("float64", (len(model) // 8,), FLAT, model)

    def test_an_unknown_node_is_left_out(self, bench):
        assert bench.send("ff" * 32, NODES[1]) == {"m101": NODES[1]}

    def test_nothing_is_sent_to_nobody(self, bench):
        assert bench.send("ff" * 32) == {}
        assert bench.grid.messages == []

    def test_a_message_that_superlink_does_not_take_is_left_out(self, bench):
        bench.grid.refused = {100}
        assert bench.send(NODES[0], NODES[1]) == {"m101": NODES[1]}

    def test_another_grid_is_refused(self):
        with pytest.raises(FailedError) as caught:
            GridTransport(SimpleNamespace(), RUN)
        assert caught.value.code == "GRID_UNKNOWN"


class TestPoll:
    def test_a_small_reply(self, bench):
        bench.send()
        identity = bench.reply(reply_of(b"yes", b"abcd"))
        expected = Incoming(message_id="m100", node=NODES[0], reply=b"yes", array=b"abcd", error=None)
        assert bench.poll() == [expected]
        assert bench.runtime.confirmed == [identity]
        assert bench.poll() == []

    def test_a_reply_without_an_array(self, bench):
        bench.send()
        bench.reply(reply_of(b"no"))
        assert bench.poll()[0].array == b""

    def test_a_large_array(self, bench):
        model = bytes(4 * INLINE_BYTES)
        bench.send(model=model)
        data = bytes(range(256)) * (2 * INLINE_BYTES // 256)
        bench.reply(with_array(flat(data)))
        (answer,) = bench.poll()
        assert (answer.error, answer.array == data) == (None, True)

    def test_an_empty_array_is_an_array(self, bench):
        bench.send()
        bench.reply(with_array(flat(b"")))
        (answer,) = bench.poll()
        assert (answer.error, answer.array) == (None, b"")

    def test_superlink_is_not_asked_all_the_time(self, bench):
        bench.send()
        for _ in range(10):
            bench.poll(after=0.03)
        assert len(bench.runtime.asked) == 3

    def test_superlink_is_not_asked_about_nothing(self, bench):
        assert bench.poll() == []
        assert bench.runtime.asked == []

    def test_unknown_ids_are_no_error(self, bench):
        bench.send()
        assert bench.poll("nonsense", "m100") == []
        assert bench.runtime.asked == [["m100"]]

    def test_a_reply_belongs_to_the_node_that_was_asked(self, bench):
        """Flower lets node 101 push a reply to the message of node 100; whatever it says, it counts for node 100."""
        bench.send(NODES[0], NODES[1])
        bench.reply(reply_of(b"forged"), to="m100", src=101)
        (answer,) = bench.poll()
        assert (answer.message_id, answer.node, answer.reply) == ("m100", NODES[0], b"forged")

    def test_a_second_reply_is_thrown_away(self, bench):
        bench.send()
        bench.reply(reply_of(b"first"))
        second = bench.reply(reply_of(b"second"))
        assert [a.reply for a in bench.poll()] == [b"first"]
        assert second in bench.runtime.confirmed
        third = bench.reply(reply_of(b"third"))
        assert bench.poll() == []
        assert third not in bench.runtime.confirmed  # nobody asked for it

    def test_a_reply_to_nothing_is_thrown_away(self, bench):
        bench.send()
        proto, tree = None, None
        bench.reply(reply_of(b"x"), to="m999")
        proto, tree = bench.runtime.replies.pop()
        bench.runtime.PullMessages = lambda request: PullAppMessagesResponse(
            messages_list=[proto], message_object_trees=[tree]
        )
        assert bench.poll() == []
        assert bench.runtime.confirmed == [tree.object_id]


class TestErrors:
    @pytest.mark.parametrize(
        ("code", "reason", "ours"),
        [
            (5, "", "NODE_AWAY"),
            (3, "", "MESSAGE_LOST"),
            (4, "", "REPLY_LOST"),
            (2, "E_NO_REPLY", "AGENT_NO_REPLY"),
            (2, "<class 'KeyError'>: 'patient 17'", "AGENT_ERROR"),
            (8, "E_NO_REPLY", "AGENT_ERROR"),
            (0, "", "AGENT_ERROR"),
            (-99, "x" * 100_000, "AGENT_ERROR"),
        ],
    )
    def test_error_replies_become_our_codes(self, bench, code, reason, ours):
        bench.send()
        bench.reply(error=Error(code, reason))
        (answer,) = bench.poll()
        assert (answer.node, answer.reply, answer.array, answer.error) == (NODES[0], None, b"", ours)
        assert bench.runtime.pulled == []

    def test_a_generated_error_names_another_node(self, bench):
        """Flower's own "node unavailable" has source node 1."""
        bench.send(*NODES[:2])
        bench.reply(error=Error(5), to="m101", src=1)
        assert [(a.message_id, a.node, a.error) for a in bench.poll()] == [("m101", NODES[1], "NODE_AWAY")]


class TestForm:
    @pytest.mark.parametrize(
        "content",
        [
            RecordDict(),
            RecordDict({"reply": ConfigRecord()}),
            RecordDict({"reply": ConfigRecord({"reply": "text"})}),
            RecordDict({"reply": ConfigRecord({"reply": 7})}),
            RecordDict({"answer": ConfigRecord({"reply": b""})}),
            RecordDict({"reply": MetricRecord({"reply": 1})}),
            RecordDict({"reply": ArrayRecord({"reply": flat(b"abcd")})}),
            reply_of(more=b"x"),
            reply_of(update="text"),
            RecordDict({"reply": ConfigRecord({"reply": b""}), "more": ConfigRecord()}),
            RecordDict({"reply": ConfigRecord({"reply": b""}), "update": ConfigRecord({"update": b""})}),
            with_array(flat(b"abcd"), name="weights"),
            with_array(flat(b"abcd", dtype="float64")),
            with_array(flat(b"abcd", shape=(1, 1))),
            with_array(flat(b"abcd", shape=(2,))),
            with_array(flat(b"abcde", shape=(1,))),
            with_array(flat(b"abcd", shape=(10**18,))),
            with_array(flat(b"abcd", stype="numpy.ndarray")),
        ],
        ids=lambda content: str(sorted(content)),
    )
    def test_anything_else_is_a_form_error(self, bench, content):
        bench.send()
        identity = bench.reply(content)
        (answer,) = bench.poll()
        assert (answer.reply, answer.array, answer.error) == (None, b"", "REPLY_FORM")
        assert bench.runtime.confirmed == [identity]

    def test_an_array_in_both_places(self, bench):
        bench.send()
        content = reply_of(update=b"abcd")
        content["update"] = ArrayRecord({"update": flat(b"abcd")})
        bench.reply(content)
        assert bench.poll()[0].error == "REPLY_FORM"

    @pytest.mark.parametrize("kind", ["Message", "RecordDict", "ConfigRecord", "ArrayRecord", "Array"])
    @pytest.mark.parametrize(
        "spoil",
        [
            lambda data: b"\x00",
            lambda data: data[:-1],
            lambda data: data.replace(b"\x00", b"\x01"),
            lambda data: b"Array  3\x00{}}",
            lambda data: b"Unknown  0\x00",
            lambda data: data + b"[" * 100_000,
        ],
        ids=["short", "cut", "no-divider", "other-kind", "unknown-kind", "deep"],
    )
    def test_damaged_objects_hurt_nobody_else(self, bench, kind, spoil):
        bench.send(*NODES[:2])
        bench.reply(with_array(flat(b"abcd")), spoil=(kind, spoil))
        bench.reply(reply_of(b"fine"), to="m101")
        answers = {a.node: a for a in bench.poll()}
        assert answers[NODES[0]].error == "REPLY_FORM"
        assert answers[NODES[1]].reply == b"fine"

    def test_an_array_that_repeats_a_chunk_without_end(self, bench):
        """One chunk of 5 MiB named a million times would be 5 TB."""
        bench.send()

        def repeat(data):
            head, _, body = data.partition(b"\x00")
            value = json.loads(body)
            value["arraychunk_ids"] = [0] * 1_000_000
            new = json.dumps(value).encode()
            kind, children, _ = head.decode().split(" ")
            return f"{kind} {children} {len(new)}".encode() + b"\x00" + new

        bench.reply(with_array(flat(b"abcd" * 1000)), spoil=("Array", repeat))
        assert bench.poll()[0].error in ("REPLY_FORM", "REPLY_SIZE")


class TestSize:
    def test_a_reply_larger_than_any_answer_to_this_order(self, bench):
        bench.send(model=bytes(8))
        bench.reply(with_array(flat(bytes(4 * 1024 * 1024))))
        (answer,) = bench.poll()
        assert (answer.error, answer.array) == ("REPLY_SIZE", b"")

    def test_a_long_reply_text(self, bench):
        bench.send(model=bytes(8 << 20))
        bench.reply(reply_of(bytes((1 << 20) + 1)))
        assert bench.poll()[0].error == "REPLY_FORM"

    def test_a_tree_of_many_objects_is_not_pulled(self, bench):
        bench.send()
        bench.reply(reply_of())
        proto, tree = bench.runtime.replies.pop()
        leaves = [ObjectTree(object_id=hashlib.sha256(b"%d" % i).hexdigest()) for i in range(MAX_OBJECTS + 1)]
        bench.runtime.replies.append((proto, ObjectTree(object_id=tree.object_id, children=leaves)))
        assert bench.poll()[0].error == "REPLY_SIZE"
        assert bench.runtime.pulled == []


class TestWithheld:
    def test_a_reply_whose_objects_do_not_come_holds_nobody_up(self, bench):
        bench.send(*NODES[:2])
        bench.reply(reply_of(b"late"), withhold=["ConfigRecord"])
        bench.reply(reply_of(b"fine"), to="m101")
        assert [a.node for a in bench.poll()] == [NODES[1]]
        assert bench.poll() == []

    def test_it_is_taken_when_they_come(self, bench):
        bench.send()
        content = reply_of(b"late")
        bench.reply(content, withhold=["ConfigRecord"])
        assert bench.poll() == []
        config = content["reply"]
        bench.runtime.objects[config.object_id] = config.deflate()
        pulled = len(bench.runtime.pulled)
        assert [a.reply for a in bench.poll()] == [b"late"]
        assert len(bench.runtime.pulled) == pulled + 1  # what was there is not pulled again
        assert len(bench.runtime.asked) == 1

    def test_after_a_while_it_is_lost(self, bench):
        bench.send()
        identity = bench.reply(reply_of(b"never"), withhold=["ConfigRecord"])
        assert bench.poll() == []
        assert bench.poll(after=app.STALLED_SECONDS - 1) == []
        (answer,) = bench.poll(after=2)
        assert answer.error == "REPLY_LOST"
        assert bench.runtime.confirmed == [identity]

    def test_an_object_that_is_gone(self, bench):
        bench.send()
        content = reply_of(b"x")
        bench.reply(content)
        del bench.runtime.objects[content["reply"].object_id]
        assert bench.poll()[0].error == "REPLY_LOST"


def test_the_message_that_an_agent_reads_is_what_is_sent(bench):
    """The coordinator's writer and the agent's reader of a message, and the other way round."""
    from fedpact_client import supernode

    for model in (MODEL, bytes(8 * INLINE_BYTES)):
        bench.grid.messages.clear()
        bench.send(model=model)
        assert supernode.read_order(bench.grid.messages[0]) == (ORDER, model)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"order": ConfigRecord({"order": ORDER})}),
        RecordDict({"order": ConfigRecord({"order": "text", "model": b""})}),
        RecordDict({"order": ConfigRecord({"order": ORDER, "model": b"", "more": 1})}),
        RecordDict({"order": ConfigRecord({"order": ORDER, "model": b""}), "x": ConfigRecord()}),
        RecordDict({"order": ConfigRecord({"order": ORDER}), "model": ArrayRecord({"model": flat(b"abcdabcd")})}),
        RecordDict({"order": ConfigRecord({"order": ORDER}), "model": ConfigRecord({"model": b""})}),
    ],
)
def test_an_agent_reads_nothing_else(content):
    from fedpact_client import supernode

    with pytest.raises(supernode.OrderFormError):
        supernode.read_order(Message(content, 1, "train"))


class TestMemoryTransport:
    @pytest.fixture
    def transport(self) -> MemoryTransport:
        self.calls = []

        def node(name):
            def answer(order, model):
                self.calls.append(name)
                return name.encode() + order, model[:4]

            return answer

        return MemoryTransport({name: node(name) for name in ("a", "b")})

    @staticmethod
    def send(transport, *nodes):
        return list(transport.send([Outgoing(node=n, order=b"!", model=b"12345678") for n in nodes], 1.0))

    def test_it_is_a_transport(self, transport):
        it: Transport = transport
        assert it.online() == {"a": True, "b": True}

    def test_replies(self, transport):
        ids = self.send(transport, "a", "b", "unknown")
        answers = transport.poll(ids)
        assert [(a.node, a.reply, a.array) for a in answers] == [("a", b"a!", b"1234"), ("b", b"b!", b"1234")]
        assert transport.poll(ids) == []

    def test_offline(self, transport):
        transport.offline = {"a"}
        ids = self.send(transport, "a", "b")
        assert [a.node for a in transport.poll(ids)] == ["b"]
        assert transport.online() == {"a": False, "b": True}

    def test_drop(self, transport):
        transport.fault("a", "drop")
        (first,) = self.send(transport, "a")
        assert transport.poll([first]) == []
        assert self.calls == []
        (second,) = self.send(transport, "a")
        assert len(transport.poll([first, second])) == 1

    def test_delay(self, transport):
        transport.fault("a", "delay", polls=2)
        ids = self.send(transport, "a", "b")
        assert [[a.node for a in transport.poll(ids)] for _ in range(3)] == [["b"], [], ["a"]]

    def test_duplicate(self, transport):
        transport.fault("a", "duplicate")
        assert len(transport.poll(self.send(transport, "a"))) == 1
        assert self.calls == ["a", "a"]

    def test_garble(self, transport):
        transport.fault("a", "garble")
        assert transport.poll(self.send(transport, "a"))[0].reply == b"!a"

    def test_error(self, transport):
        transport.fault("a", "error", code="AGENT_ERROR")
        (answer,) = transport.poll(self.send(transport, "a"))
        assert (answer.reply, answer.error) == (None, "AGENT_ERROR")

    def test_wrong_node(self, transport):
        transport.fault("a", "wrong-node", other="b")
        (answer,) = transport.poll(self.send(transport, "a"))
        assert (answer.node, answer.reply) == ("a", b"b!")


def test_what_a_run_writes_is_the_operators_alone(tmp_path, monkeypatch):
    """Also what SQLite makes in the ServerApp's process, whatever umask Flower was started with."""
    drive = SimpleNamespace(drive=lambda home, *_: (home / "made").touch())
    monkeypatch.setitem(sys.modules, "fedpact_server.driver", drive)
    monkeypatch.setattr(app, "_end_with_superexec", lambda: None)
    monkeypatch.setattr(app, "_log_to", lambda _home: None)
    monkeypatch.setattr(app, "GridTransport", lambda *_: None)
    monkeypatch.setenv("FEDPACT_HOME", str(tmp_path))
    before = os.umask(0)
    try:
        app.main(None, SimpleNamespace(run_config={"contract-id": "c" * 64}, run_id=1))
    finally:
        os.umask(before)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o600
