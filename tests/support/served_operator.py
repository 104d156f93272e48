"""The operator's real API behind the filter of its one port, on a real TLS socket; and what may stand before it."""

import contextlib
import datetime
import http.client
import ssl
import threading
from collections.abc import Iterator
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import uvicorn
from tests.support.operator_world import Operator

from fedpact_contract.request import utc_now
from fedpact_server import pki
from fedpact_server.api import create_api
from fedpact_server.one_port import OnePort
from fedpact_server.serving import Uvicorn, listen


async def _flower(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@contextlib.contextmanager
def served(world: Operator, *, seconds_off: int | None = None, **options: Any) -> Iterator[int]:
    """The operator at 127.0.0.1; its port. `seconds_off`: how far its clock is from ours, as its answers say it."""
    sock, ready = listen("127.0.0.1", 0), threading.Event()
    app = OnePort(_flower, create_api(world.home, world.database, now=utc_now, **options), internal=("127.0.0.1", 1))
    headers = []
    if seconds_off is not None:
        then = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds_off)
        headers = [("date", format_datetime(then, usegmt=True))]
    tls = world.home.tls
    config = uvicorn.Config(
        app,
        ssl_certfile=tls / "server.crt",
        ssl_keyfile=str(tls / "server.key"),
        date_header=seconds_off is None,
        headers=headers,
        ws="none",
        log_config=None,
    )
    server = Uvicorn(config, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        assert ready.wait(10)
        yield int(sock.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(10)


class Proxy(BaseHTTPRequestHandler):
    """Ends TLS with the operator's own certificate, as a proxy before it does, and limits bodies as nginx does."""

    def answer(self) -> None:
        size = int(self.headers.get("content-length", 0))
        if size > self.server.limit:
            self.send_response(413)
            self.end_headers()
            self.wfile.write(b"<html><body>413 Request Entity Too Large</body></html>")
            self.close_connection = True
            return
        body = self.rfile.read(size)
        context = ssl._create_unverified_context()
        onward = http.client.HTTPSConnection("127.0.0.1", self.server.onward, context=context, timeout=20)
        onward.request(self.command, self.path, body=body, headers=dict(self.headers))
        answer = onward.getresponse()
        content = answer.read()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        onward.close()

    do_GET = do_POST = answer  # noqa: N815 - the library's names

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def proxy(certificate: Path, key: Path, onward: int, limit: int) -> Iterator[int]:
    """A proxy before the operator that takes bodies of at most `limit` bytes; its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.limit, server.onward = limit, onward
    server.handle_error = lambda *_: None
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def foreign_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate and key of an authority that nobody trusts."""
    folder.mkdir()
    pki.create(folder, name="Somebody else", hosts=("127.0.0.1",), now=utc_now())
    return folder / "server.crt", folder / "server.key"
