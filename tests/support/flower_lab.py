"""A real Flower federation on this machine: `fedpact serve` in a process, executors under stand-in guards.

The guard answers each order with the model plus one, as float32. The coordinator's rounds are a stand-in too (`DRIVE`),
carried by a bundle of the test's own, whose client package leaves a mark if it is ever imported.
"""

import contextlib
import datetime
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedpact_client import executor
from fedpact_client.frames import Frame, FrameError
from fedpact_client.spawn import Child, spawn
from fedpact_contract.request import node_id, node_public_pem
from fedpact_server import pki, shell

ROOT = Path(__file__).resolve().parents[2]
CONTRACT = "c" * 64

DRIVE = '''
import json, sys, time, types
from pathlib import Path

def drive(home, contract_id, transport, flower_run_id):
    """Rounds of one order to each node; what came back goes to results.jsonl."""
    import numpy as np
    from fedpact_server.transport import Outgoing
    plan = json.loads((Path(home) / "plan.json").read_text())
    out = (Path(home) / "results.jsonl").open("a", buffering=1)
    def note(**what):
        out.write(json.dumps(what | {"run": str(flower_run_id), "contract": contract_id}) + "\\n")
    note(event="drive", at=time.time())
    wanted = set(plan["nodes"])
    while not wanted <= {n for n, up in transport.online().items() if up}:
        time.sleep(0.05)
    note(event="online", at=time.time())
    model = np.arange(plan["size"], dtype="<f8")
    for number in range(1, plan["rounds"] + 1):
        begun = time.perf_counter()
        orders = [Outgoing(node=n, order=json.dumps({"round": number, "to": n}).encode(), model=model.tobytes())
                  for n in sorted(wanted)]
        waiting = dict(transport.send(orders, plan["ttl"]))
        got = []
        while waiting and time.perf_counter() - begun < plan["ttl"]:
            for each in transport.poll(list(waiting)):
                waiting.pop(each.message_id)
                values = np.frombuffer(each.array, "<f4")
                sound = values.shape == model.shape and bool((values == (model + 1).astype("<f4")).all())
                got.append({"node": each.node, "reply": each.reply and each.reply.decode(), "sound": sound,
                            "error": each.error})
            time.sleep(plan.get("poll", 0.05))
        note(event="round", round=number, seconds=round(time.perf_counter() - begun, 3), got=got, lost=len(waiting))
        time.sleep(plan.get("pause", 0))
    note(event="done", at=time.time())

module = types.ModuleType("fedpact_server.driver")
module.drive = drive
sys.modules["fedpact_server.driver"] = module
from fedpact_server.app import app
'''


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def marking_bundle(mark: Path, *, name: str = "lab-shell") -> bytes:
    """A bundle whose server side runs `DRIVE`, and whose client side leaves a mark wherever it is imported."""
    project = shell.resources.files(shell).joinpath("pyproject.toml").read_text()
    project = project.replace('name = "fedpact-shell"', f'name = "{name}"').replace("fedpact_shell.", "lab_shell.")
    client = f"open({str(mark)!r}, 'w').write('ran')\nfrom flwr.clientapp import ClientApp\napp = ClientApp()\n"
    files = {
        "pyproject.toml": project.encode(),
        "lab_shell/__init__.py": b"",
        "lab_shell/client.py": client.encode(),
        "lab_shell/server.py": DRIVE.encode(),
    }
    return shell.bundle(files)


class Node:
    """One enterprise: a node key, and an executor under a guard that echoes."""

    def __init__(self, folder: Path, lab: "Lab", *, patched: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.lab, self.patched = folder, lab, patched
        self.ca = lab.ca
        self.key = ec.generate_private_key(ec.SECP384R1())
        path = folder / "node.key"
        data = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        path.write_bytes(data)
        path.chmod(0o600)
        self.pem = node_public_pem(self.key)
        self.id = node_id(self.pem)
        self.answer: Callable[[str, bytes], tuple[str, bytes] | None] = echo
        self.orders: list[str] = []
        self.bundles: set[str] = set()
        self.child: Child | None = None
        self.exit_code: int | None = None
        self.number: str | None = None
        self._thread: threading.Thread | None = None
        self._leaving = threading.Event()

    def start(self, earlier: str | None = None) -> None:
        self.child = spawn("fedpact_client.executor", log=self.folder / "executor.log", max_array=executor.MAX_ARRAY)
        self.child.pipe.send(
            "setup",
            {
                "superlink": f"127.0.0.1:{self.lab.port}",
                "ca": str(self.ca),
                "node_key": str(self.folder / "node.key"),
                "home": str(self.folder / "flower"),
                "poll_seconds": "0.1",
                "patched": self.patched,
                "earlier": earlier,
            },
        )
        self.exit_code = None
        self._leaving.clear()
        self._thread = threading.Thread(target=self._guard, args=(self.child,), daemon=True)
        self._thread.start()

    def _guard(self, child: Child) -> None:
        try:
            while (frame := self._next(child)) is not None:
                if frame.kind == "connected":
                    self.number = frame.header["node"]
                if frame.kind == "malformed":
                    child.pipe.send("drop", {})
                if frame.kind != "order":
                    continue
                self.orders.append(frame.header["order"])
                self.bundles.add(frame.header["bundle"])
                made = self.answer(frame.header["order"], frame.array)
                if made is None:
                    child.pipe.send("drop", {})
                else:
                    child.pipe.send("reply", {"reply": made[0]}, made[1])
        except FrameError:
            pass  # stopped
        child.pipe.close()
        self.exit_code = child.process.wait()

    def _next(self, child: Child) -> Frame | None:
        while not self._leaving.is_set():
            try:
                return child.pipe.receive(0.1)
            except FrameError as err:
                if err.code != "FRAME_TIMEOUT" or child.pipe.closed:
                    raise
        return None

    def hang_up(self) -> None:
        """The guard goes: it closes its pipe (in its own thread: a pipe is for one)."""
        self._leaving.set()

    def wait_exit(self, timeout: float) -> int:
        assert self._thread is not None
        self._thread.join(timeout)
        assert self.exit_code is not None, f"the executor still runs\n{self._state()}"
        return self.exit_code

    def _state(self) -> str:
        """Where each thread of the executor is in the kernel, and its log: for a failure that comes once in a while."""
        assert self.child is not None
        tasks = Path(f"/proc/{self.child.process.pid}/task")
        lines = [f"running: {self.child.process.poll() is None}, pipe closed: {self.child.pipe.closed}"]
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            lines += [
                f"{(task / 'comm').read_text().strip()}: {(task / 'wchan').read_text()}" for task in tasks.iterdir()
            ]
        return "\n".join([*lines, self.log()])

    def stop(self) -> None:
        if self.child is not None and self.child.process.poll() is None:
            self.child.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.process.wait(8)
            self.child.process.kill()

    def log(self) -> str:
        return (self.folder / "executor.log").read_text()


def echo(order: str, model: bytes) -> tuple[str, bytes]:
    return f"took {order}", (np.frombuffer(model, "<f8") + 1).astype("<f4").tobytes()


class Lab:
    """Operator's home, certificates, one serve process, and nodes."""

    def __init__(self, folder: Path, *, bundle: bytes | None = None, health: bool = False) -> None:
        self.folder = folder
        self.home = folder / "operator"
        (self.home / "tls").mkdir(parents=True, exist_ok=True)
        self.made = datetime.datetime.now(datetime.UTC)
        pki.create(self.home / "tls", name="lab", hosts=("localhost",), now=self.made)
        self.ca = self.home / "tls" / "ca.crt"
        self.mark = folder / "mark"
        self.bundle = marking_bundle(self.mark) if bundle is None else bundle
        (folder / "bundle").write_bytes(self.bundle)
        self.port = free_port()
        self.health = free_port() if health else None
        self.environment: dict[str, str] = {}
        self.server: subprocess.Popen[str] | None = None
        self.ready: dict[str, float] = {}
        self.nodes: list[Node] = []

    def serve(self) -> None:
        environment = os.environ | self.environment | ({} if self.health is None else {"LAB_HEALTH": str(self.health)})
        launcher = ROOT / "tests" / "launchers" / "serve_lab.py"
        self.server = subprocess.Popen(
            [sys.executable, str(launcher), str(self.home), str(self.port), str(self.folder / "bundle")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "serve.log").open("a"),
            env=environment,
            text=True,
        )
        self.ready = self._answer()

    @property
    def internal(self) -> int:
        return int(self.ready["internal"])

    def call(self, name: str, *args):
        """A call of `Control` in the serve process; an error comes back as {"code": ...}."""
        assert self.server is not None
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps({"do": name, "args": args}) + "\n")
        self.server.stdin.flush()
        return self._answer()

    def _answer(self):
        assert self.server is not None
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line, f"the server ended: {(self.folder / 'serve.log').read_text()[-3000:]}"
        answer = json.loads(line)
        return answer["result"] if "result" in answer else answer["error"]

    def add_node(self, *, patched: bool = True, register: bool = True) -> Node:
        node = Node(self.folder / f"node{len(self.nodes) + 1}", self, patched=patched)
        self.nodes.append(node)
        if register:
            self.call("register_node", node.pem, f"bank-{len(self.nodes)}")
        return node

    def plan(self, *, rounds: int = 3, size: int = 100, ttl: float = 60.0, **more) -> None:
        plan = {"nodes": [node.id for node in self.nodes], "rounds": rounds, "size": size, "ttl": ttl} | more
        self.home.joinpath("plan.json").write_text(json.dumps(plan))

    def results(self, event: str) -> list[dict]:
        path = self.home / "results.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [each for line in lines if (each := json.loads(line))["event"] == event]

    def wait(self, what: Callable[[], bool], timeout: float, why: str, *, every: float = 0.02) -> float:
        """Wait until something is so; returns the seconds."""
        begun = time.monotonic()
        while not what():
            assert time.monotonic() - begun < timeout, f"{why}: not within {timeout} s\n{self.logs()}"
            time.sleep(every)
        return time.monotonic() - begun

    def finish(self, run: int, timeout: float = 60.0) -> dict:
        """Wait until a Flower run is finished; its status."""
        self.wait(lambda: self.call("run_status", run)["status"] == "finished", timeout, "run", every=0.2)
        return self.call("run_status", run)

    def logs(self) -> str:
        paths = [self.folder / "serve.log", *(self.home / "logs").glob("*"), *self.folder.glob("node*/executor.log")]
        return "\n".join(f"== {path}\n{path.read_text()[-2000:]}" for path in paths if path.exists())

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()
        if self.server is not None and self.server.poll() is None:
            self.server.terminate()
            try:
                self.server.wait(60)
            except subprocess.TimeoutExpired:
                self.server.kill()
                raise


@contextlib.contextmanager
def lab(folder: Path, **options) -> Iterator[Lab]:
    it = Lab(folder, **options)
    try:
        yield it
    finally:
        it.stop()
