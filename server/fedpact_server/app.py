"""The coordinator's ServerApp: Flower's Grid as the round loop's transport.

Flower's types stop here. What a node sends is checked for its form alone; whose it is and what it means is decided
behind the transport. The Runtime calls used are those of Flower's own Grid, which waits without a limit for a reply
whose objects never come, and lets one malformed reply end the run: here each reply stands for itself, and no call
waits for a node.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.error_pb2 import Error
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import RunNotRunningException
from flwr.superlink.grid import HttpGrid

from fedpact_contract.errors import FailedError, FedpactError, InputError
from fedpact_contract.request import node_id
from fedpact_server.transport import Incoming, Outgoing

log = structlog.get_logger()
app = ServerApp()

MESSAGE_TYPE = "train"
ORDER, MODEL, REPLY, UPDATE = "order", "model", "reply", "update"
"""The names in a message and in its reply.

A message is a record `order` with the bytes `order`, a reply a record `reply` with the bytes `reply`. The array (model,
update) stands beside them in the same record where it is small, else in an array record of its own with one flat array;
each under its name. A reply may have no array.
"""

FLAT = "fedpact.flat"
"""How an array's bytes are meant: its values, little-endian, and nothing else."""

INLINE_BYTES = 1 << 18
"""Up to here an array stands in the config record: each further object is one more request at every hop."""

NO_REPLY = "E_NO_REPLY"
"""The one error text of an agent that is told apart."""

ASK_SECONDS = 0.1
"""How often SuperLink is asked for replies at most; each asking costs it a few milliseconds."""

STALLED_SECONDS = 60.0
"""How long a reply that was announced may make no progress."""

PR_SET_PDEATHSIG = 1
MAX_REPLY_BYTES = 1 << 20
OBJECT_SLACK = 4096
MAX_OBJECTS = 4096
"""Objects of one reply: five and the array's chunks, 5 MiB each unless the node chose otherwise."""


class GridTransport:
    """`transport.Transport` over Flower's Grid.

    Replies are bound to the node that the order went to, by the message id: Flower lets any authenticated node push a
    reply in another's name, so what a reply says of its sender is not looked at.

    Args:
        grid: Flower's Grid, with its run set.
        run_id: Flower's run id.
        clock: Seconds, monotonic.
    """

    def __init__(self, grid: Grid, run_id: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        if not isinstance(grid, HttpGrid):
            raise FailedError("GRID_UNKNOWN", f"Flower's Grid is a {type(grid).__name__}, which is unknown here.")
        self._grid = grid
        self._runtime = grid._runtime_client
        self._run_id = run_id
        self._clock = clock
        self._superlink = Node(node_id=SUPERLINK_NODE_ID)
        self._numbers: dict[str, int] = {}  # node -> its number in Flower
        self._sent: dict[str, _Sent] = {}  # message id -> what it was, until it is answered
        self._asked = -ASK_SECONDS

    def online(self) -> dict[str, bool]:
        """Nodes that Flower knows as connected."""
        found: dict[str, bool] = {}
        for node in self._grid.get_nodes():
            try:
                key = node_id(bytes(node.public_key).decode("ascii"))
            except (UnicodeDecodeError, InputError):
                continue  # registered by other means than ours
            self._numbers[key] = int(node.node_id)
            found[key] = node.status == "online"
        return found

    def send(self, outgoing: Sequence[Outgoing], ttl_seconds: float) -> dict[str, str]:
        """Send orders; see `Transport.send`."""
        if any(each.node not in self._numbers for each in outgoing):
            self.online()
        known = [each for each in outgoing if each.node in self._numbers]
        models: dict[bytes, ArrayRecord] = {}  # SuperLink keeps what is alike once
        messages = []
        for each in known:
            content = RecordDict({ORDER: ConfigRecord({ORDER: each.order})})
            if len(each.model) > INLINE_BYTES:
                content[MODEL] = models.setdefault(each.model, ArrayRecord({MODEL: _flat(each.model)}))
            else:
                content.config_records[ORDER][MODEL] = each.model
            messages.append(Message(content, self._numbers[each.node], MESSAGE_TYPE, ttl=ttl_seconds))
        pushed = list(self._grid.push_messages(messages)) if messages else []
        sent = {}
        for each, message_id in zip(known, pushed, strict=False):  # a message that was not taken has no id
            if message_id:
                sent[message_id] = each.node
                limit = len(each.model) // 2 + OBJECT_SLACK + MAX_REPLY_BYTES
                self._sent[message_id] = _Sent(node=each.node, limit=limit)
        return sent

    def poll(self, message_ids: Sequence[str]) -> list[Incoming]:
        """What has arrived; see `Transport.poll`."""
        wanted = {m: self._sent[m] for m in message_ids if m in self._sent}
        answers = self._ask([m for m, sent in wanted.items() if sent.tree is None])
        for message_id, sent in wanted.items():
            if sent.tree is not None and message_id in self._sent:
                answer = self._fetch(message_id, sent)
                if answer is not None:
                    answers.append(answer)
        return answers

    def _ask(self, message_ids: list[str]) -> list[Incoming]:
        """Learn which replies there are; errors are answers at once, the others are fetched."""
        now = self._clock()
        if not message_ids or now - self._asked < ASK_SECONDS:
            return []
        self._asked = now
        response = self._runtime.PullMessages(PullAppMessagesRequest(message_ids=message_ids))
        answers = []
        for message, tree in zip(response.messages_list, response.message_object_trees, strict=True):
            message_id = message.metadata.reply_to_message_id
            sent = self._sent.get(message_id)
            if sent is None or sent.tree is not None:  # nobody waits for it, or it is a second reply
                self._forget(tree.object_id)
            elif message.HasField("error"):
                self._forget(tree.object_id)
                answers.append(self._answer(message_id, error=_error_code(message.error)))
            else:
                sent.tree, sent.moved = tree, now
        return answers

    def _fetch(self, message_id: str, sent: "_Sent") -> Incoming | None:
        """Pull what there is of a reply; None while it is incomplete."""
        assert sent.tree is not None  # noqa: S101 - asked by poll
        identities = {each.object_id for each in iterate_object_tree(sent.tree)}
        error: str | None = "REPLY_SIZE" if len(identities) > MAX_OBJECTS else None
        for identity in sorted(identities - sent.objects.keys()):
            if error is not None:
                break
            request = PullObjectRequest(node=self._superlink, run_id=self._run_id, object_id=identity)
            pulled = self._runtime.PullObject(request)
            if not pulled.object_found:
                error = "REPLY_LOST"
            elif pulled.object_available:
                sent.objects[identity] = pulled.object_content
                sent.size += len(pulled.object_content)
                sent.moved = self._clock()
                if sent.size > sent.limit:
                    error = "REPLY_SIZE"
        if error is None and identities - sent.objects.keys():
            if self._clock() - sent.moved < STALLED_SECONDS:
                return None
            error = "REPLY_LOST"
        self._forget(sent.tree.object_id)
        if error is not None:
            return self._answer(message_id, error=error)
        try:
            reply, array = read_reply(sent.tree.object_id, sent.objects, sent.limit)
        except ReplyFormError:
            return self._answer(message_id, error="REPLY_FORM")
        return self._answer(message_id, reply=reply, array=array)

    def _answer(
        self, message_id: str, *, reply: bytes | None = None, array: bytes = b"", error: str | None = None
    ) -> Incoming:
        sent = self._sent.pop(message_id)
        return Incoming(message_id=message_id, node=sent.node, reply=reply, array=array, error=error)

    def _forget(self, identity: str) -> None:
        """Let SuperLink delete a message's objects."""
        request = ConfirmMessageReceivedRequest(node=self._superlink, run_id=self._run_id, message_object_id=identity)
        self._runtime.ConfirmMessageReceived(request)


@dataclass(slots=True)
class _Sent:
    """A message that waits for its answer, and what has come of it so far."""

    node: str
    limit: int  # bytes of a whole reply
    tree: ObjectTree | None = None
    objects: dict[str, bytes] = field(default_factory=dict)
    size: int = 0
    moved: float = 0.0


class ReplyFormError(ValueError):
    """A reply is not of the agreed form."""


def read_reply(identity: str, objects: dict[str, bytes], limit: int) -> tuple[bytes, bytes]:
    """Reply and array (flat float32, or empty) of a message's objects.

    Args:
        identity: Id of the message's own object.
        objects: Object id -> content; SuperLink has checked that each content fits its id.
        limit: Bytes that the array may have at most.

    Raises:
        ReplyFormError: anything else.
    """
    try:
        _check_chunks(objects, limit)
        message = inflate_object_from_contents(identity, dict(objects))
    except Exception as err:  # Flower's parser on a stranger's bytes: whatever it raises, they are not of the form
        raise ReplyFormError("objects") from err
    if not isinstance(message, Message) or not message.has_content():
        raise ReplyFormError("message")
    content = message.content
    config = content.get(REPLY)
    if not isinstance(config, ConfigRecord) or not set(content) <= {REPLY, UPDATE}:
        raise ReplyFormError("records")
    reply, array = config.get(REPLY), config.get(UPDATE, b"")
    if not isinstance(reply, bytes) or not isinstance(array, bytes) or not set(config) <= {REPLY, UPDATE}:
        raise ReplyFormError("values")
    if len(reply) > MAX_REPLY_BYTES or (UPDATE in content and array):
        raise ReplyFormError("reply")
    return reply, read_array(content[UPDATE]) if UPDATE in content else array


def read_array(record: object) -> bytes:
    """The values of a record with one flat little-endian float32 array, as bytes.

    Raises:
        ReplyFormError: another kind, shape or length.
    """
    if not isinstance(record, ArrayRecord) or set(record) != {UPDATE}:
        raise ReplyFormError("array record")
    array = record[UPDATE]
    if (array.stype, array.dtype) != (FLAT, "float32") or array.shape != (len(array.data) / 4,):
        raise ReplyFormError("array")
    return array.data


def _check_chunks(objects: dict[str, bytes], limit: int) -> None:
    """Refuse an array that names its chunks so often that putting it together would fill the memory."""
    for content in objects.values():
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == Array.__qualname__:
            chunks = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            if sum(len(objects[children[index]]) for index in chunks) > limit:
                raise ReplyFormError("chunks")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Drive one contract's run. What goes wrong is told to Flower by a fixed text alone; our own log has the rest."""
    _end_with_superexec()
    os.umask(0o077)  # what it writes in the operator's home is the owner's alone
    home = Path(os.environ["FEDPACT_HOME"])
    _log_to(home)
    contract_id = str(context.run_config["contract-id"])
    try:
        from fedpact_server.driver import drive

        drive(home, contract_id, GridTransport(grid, context.run_id), context.run_id)
    except RunNotRunningException:
        log.info("run stopped", contract=contract_id, flower_run=context.run_id)
    except FedpactError as err:
        log.exception("run failed", contract=contract_id, **err.as_dict())
        raise RuntimeError(err.code) from None
    except Exception:
        log.exception("run failed", contract=contract_id)
        raise RuntimeError("COORDINATOR_FAILED") from None


def _flat(model: bytes) -> Array:
    return Array("float64", (len(model) // 8,), FLAT, model)


def _error_code(error: Error) -> str:
    """Our code for an error reply; its text is the node's and goes no further."""
    if error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION and error.reason == NO_REPLY:
        return "AGENT_NO_REPLY"
    codes = {
        ErrorCode.MESSAGE_UNAVAILABLE: "MESSAGE_LOST",
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "REPLY_LOST",
        ErrorCode.NODE_UNAVAILABLE: "NODE_AWAY",
    }
    return codes.get(error.code, "AGENT_ERROR")


def _end_with_superexec() -> None:
    """Have Linux send SIGTERM when the SuperExec ends.

    Flower watches it too, but by a signal to a thread: a main thread that waits for SuperLink to come back sleeps on.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _log_to(home: Path) -> None:
    """Our log of runs, one JSON object a line: Flower keeps what a ServerApp prints, and shows it to its operators."""
    folder = home / "logs"
    folder.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(folder / "coordinator.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ],
        logger_factory=structlog.WriteLoggerFactory(file=os.fdopen(descriptor, "a", encoding="utf-8", buffering=1)),
    )
