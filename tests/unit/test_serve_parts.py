"""`serve` where SuperLink is a double: one at a time, told when ready, ended by a supervisor that cannot go on."""

import contextlib
import errno
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.support.operator_world import Operator, enterprise, operator

from fedpact_contract.errors import FailedError, InputError, ServiceError
from fedpact_server import serve as module
from fedpact_server.serve import serve
from fedpact_server.serving import listen


class Server:
    """A SuperLinkServer that serves nothing until it is stopped."""

    control: Any = object()  # every call on it is an error that nobody foresaw
    becomes_ready = True

    def __init__(self, config: Any, _api: Any) -> None:
        self.config = config
        self.ended = threading.Event()

    @property
    def stopping(self) -> bool:
        return self.ended.is_set()

    def open(self) -> None:
        pass

    def wait_ready(self) -> None:
        if not self.becomes_ready:
            raise ServiceError("SERVER_NOT_READY", "The server did not start.")

    def serve(self) -> None:
        assert self.ended.wait(20)

    def stop(self, _timeout: float = 0) -> None:
        self.ended.set()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Operator:
    monkeypatch.setattr(module, "SuperLinkServer", Server)
    return operator(tmp_path)


def run(world: Operator, ready: Any = lambda *_: None, port: int | None = None) -> None:
    serve(world.home.path, host="127.0.0.1", port=port, health_port=None, ready=ready)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_supervisor_that_cannot_go_on_ends_the_server_and_says_so(world: Operator) -> None:
    world.admit(enterprise(1), cards_too=False)  # something to do for the supervisor, with a broken control
    with pytest.raises(FailedError) as err:
        run(world)
    assert (err.value.code, err.value.exit_code) == ("SERVE_FAILED", 1)


def test_it_tells_where_it_listens(world: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, ...]] = []

    class Short(Server):
        def serve(self) -> None:
            patience = 400
            while not told and (patience := patience - 1):
                threading.Event().wait(0.05)

    monkeypatch.setattr(module, "SuperLinkServer", Short)
    run(world, lambda *what: told.append(what), port=9999)
    assert told == [("https://fl.example.cn:8443", "127.0.0.1:9999", world.home.fingerprint)]


def test_a_server_that_does_not_start_has_failed(world: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "becomes_ready", False)
    told: list[Any] = []
    with pytest.raises(FailedError) as err:
        run(world, lambda *what: told.append(what))
    assert (err.value.code, told) == ("SERVE_FAILED", [])


def test_one_home_is_served_once(world: Operator) -> None:
    with world.home.serving(), pytest.raises(InputError) as err:
        run(world)
    assert err.value.code == "SERVE_RUNNING"
    with world.home.serving():
        pass


def test_while_it_serves_everything_it_makes_is_its_owners_alone(
    world: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what SuperLink and SQLite make, whose modes are not ours to name."""
    made = world.home.path / "made-meanwhile"

    def work(self: Server) -> None:
        made.touch()
        self.stop()

    monkeypatch.setattr(Server, "serve", work)
    before = os.umask(0o022)
    try:
        with contextlib.suppress(FailedError):  # it may end before it was told that it answers
            run(world)
        after = os.umask(0o022)
    finally:
        os.umask(before)
    assert (made.stat().st_mode & 0o777, after) == (0o600, 0o022)


def test_a_port_that_this_user_may_not_take_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", forbidden)
    with pytest.raises(InputError, match=r"PORT_FORBIDDEN.*port 443.*above 1023"):
        listen("127.0.0.1", 443)
