"""`fedpact serve`: SuperLink with our API on the one port, and the supervisor beside it."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import structlog

from fedpact_contract.errors import FailedError, FedpactError
from fedpact_contract.files import private_files
from fedpact_contract.request import utc_now
from fedpact_server import api_closing, api_leaving, api_measurements, api_questions, pki
from fedpact_server.api import create_api
from fedpact_server.cluster import evaluator
from fedpact_server.home import OperatorHome
from fedpact_server.superlink import SuperLinkConfig, SuperLinkServer
from fedpact_server.supervise import Supervisor

log = structlog.get_logger()

IN_MEMORY = ":flwr-in-memory:"
"""SuperLink keeps nothing on the disk: a round takes a third of the time, our run outlives Flower's (docs/adr/0002);
after a restart the supervisor registers the nodes again, agents come back, and orders are sent again."""

Ready = Callable[[str, str, str], None]
"""Called once when requests are answered: public URL, address and port listened at, the operator's fingerprint."""


def serve(path: Path, *, host: str, port: int | None, health_port: int | None, ready: Ready) -> None:
    """Serve until SIGTERM or SIGINT; children have ended when this returns.

    Args:
        path: The operator's home.
        host: Address of this machine to listen at.
        port: The port, instead of the settings'.
        health_port: Loopback port of the gRPC health service, if there is to be one.
        ready: Told once when requests are answered.

    Raises:
        InputError: no home here; PORT_TAKEN, PORT_FORBIDDEN, HOST_UNKNOWN; RAY_MISSING;
            SERVE_RUNNING, another one serves this home.
        FailedError: SERVE_FAILED, it never answered, or the supervisor ended by an error that nobody foresaw.
    """
    home = OperatorHome.open(path)
    evaluator(home.settings.ray)
    database = home.database()
    with private_files(), home.serving():
        if pki.ensure(home.tls, hosts=home.settings.hosts, now=utc_now()):
            log.info("certificate renewed", hosts=home.settings.hosts)
        routers = [part.router for part in (api_closing, api_leaving, api_measurements, api_questions)]
        api = create_api(home, database, routers=routers)
        config = _config(home, host, port, health_port)
        server = SuperLinkServer(config, api)
        server.open()
        logging.getLogger("flwr").setLevel(logging.WARNING)  # its import sets it to DEBUG
        answered, broken = threading.Event(), threading.Event()

        def failed() -> None:
            broken.set()
            server.stop(0)

        def when_ready() -> None:
            try:
                server.wait_ready()
            except FedpactError as err:
                log.error("not ready", code=err.code)
                server.stop(0)
                return
            supervisor.start()
            answered.set()
            ready(home.url, f"{config.host}:{config.port}", home.fingerprint)

        supervisor = Supervisor(database, server.control, failed=failed, ending=lambda: server.stopping)
        watcher = threading.Thread(target=when_ready, daemon=True)
        watcher.start()
        try:
            server.serve()
        finally:
            watcher.join()
            supervisor.stop()
            database.dispose()
    if broken.is_set() or not answered.is_set():
        what = "The supervisor ended unexpectedly." if broken.is_set() else "The server ended before it answered."
        raise FailedError("SERVE_FAILED", what, remedy="The log says why; start again.")


def _config(home: OperatorHome, host: str, port: int | None, health_port: int | None) -> SuperLinkConfig:
    return SuperLinkConfig(
        home=home.path,
        host=host,
        port=home.settings.port if port is None else port,
        ca=home.tls / "ca.crt",
        certificate=home.tls / "server.crt",
        key=home.tls / "server.key",
        database=IN_MEMORY,
        health_port=health_port,
    )
