"""`fedpact serve` without a database of ours, for tests: one process, driven by JSON lines.

    python tests/launchers/serve_lab.py HOME PORT BUNDLE_FILE

Each line of standard input is a call of `Control` or of the server, `{"do": NAME, "args": [...]}`; each line of
standard output answers `{"result": ...}` or `{"error": {...}}`. The first line says that it is ready.
"""

import dataclasses
import json
import os
import sys
import threading
import time
from pathlib import Path

STARTED = time.perf_counter()
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # Flower logs to standard output

from fedpact_contract.errors import FedpactError  # noqa: E402
from fedpact_server.superlink import ListNodesRequest, SuperLinkConfig, SuperLinkServer  # noqa: E402


async def api(scope, receive, send):
    """Our application, as small as it gets."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": f"ours {scope['path']} {size}".encode()})


def say(**answer):
    ANSWERS.write(json.dumps(answer) + "\n")
    ANSWERS.flush()


def commands(server):
    server.wait_ready()
    control = server.control
    say(
        result={
            "internal": server.internal[1],
            "seconds": time.perf_counter() - STARTED,
            "cpu": time.process_time(),
            "superexec": server.superexec.pid,
        }
    )
    for line in sys.stdin:
        call = json.loads(line)
        try:
            if call["do"] == "token":
                result = server._token
            elif call["do"] == "superexec":
                result = server.superexec.pid
            elif call["do"] == "nodes":
                result = {n.name: n.status for n in control._client.ListNodes(ListNodesRequest()).nodes_info}
            else:
                result = getattr(control, call["do"])(*call.get("args", []))
            say(result=dataclasses.asdict(result) if dataclasses.is_dataclass(result) else result)
        except FedpactError as err:
            say(error=err.as_dict())
    server.stop()


def main():
    home, port, bundle = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    config = SuperLinkConfig(
        home=home,
        port=port,
        ca=home / "tls" / "ca.crt",
        certificate=home / "tls" / "server.crt",
        key=home / "tls" / "server.key",
        database=os.environ.get("LAB_DATABASE", str(home / "superlink.db")),
        health_port=int(os.environ["LAB_HEALTH"]) if "LAB_HEALTH" in os.environ else None,
    )
    server = SuperLinkServer(config, api, bundle=bundle.read_bytes() if bundle.is_file() else None)
    threading.Thread(target=commands, args=(server,), daemon=True).start()
    server.serve()


if __name__ == "__main__":
    main()
