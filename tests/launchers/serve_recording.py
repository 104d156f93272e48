"""An operator who keeps every byte that arrives, and may be dishonest: `serve_recording.py HOME RECORD`.

What comes in at the one port is appended to the file RECORD, after TLS, one JSON object a request. With
FEDPACT_TEST_BUNDLE, the path of another bundle, Flower carries that one in place of the contracted shell.
"""

import base64
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from fedpact_server import superlink
from fedpact_server.logs import configure_logging
from fedpact_server.one_port import OnePort
from fedpact_server.serve import serve

HOME, RECORD = Path(sys.argv[1]), Path(sys.argv[2])
BUNDLE = os.environ.get("FEDPACT_TEST_BUNDLE")
_writing = threading.Lock()


class Recording(OnePort):
    """The filter in front of everything, with somebody who writes down what comes in."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or tuple(scope["server"] or ()) == self._internal:
            await super().__call__(scope, receive, send)
            return
        body = bytearray()

        async def noted() -> Any:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        try:
            await super().__call__(scope, noted, send)
        finally:
            query = scope["query_string"].decode("latin-1")
            line = {
                "peer": scope["client"][0],
                "method": scope["method"],
                "path": scope["path"] + (f"?{query}" if query else ""),
                "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]],
                "body": base64.b64encode(bytes(body)).decode(),
            }
            with _writing, RECORD.open("a") as file:
                file.write(json.dumps(line) + "\n")


def main() -> None:
    if BUNDLE is not None:
        superlink.shell_bundle = Path(BUNDLE).read_bytes
    superlink.OnePort = Recording
    configure_logging(None)
    serve(HOME, host="0.0.0.0", port=None, health_port=None, ready=lambda *_told: None)


if __name__ == "__main__":
    main()
