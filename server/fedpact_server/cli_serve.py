"""Command `fedpact serve`."""

from pathlib import Path
from typing import Annotated

import typer

from fedpact_contract import output
from fedpact_contract.output import line
from fedpact_server.cli_common import DEFAULT_HOME, Home, Json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve")(serve_command)


def serve_command(
    host: Annotated[
        str, typer.Option("--host", help="The address to listen at. (Agents dial the name that `init --host` gave.)")
    ] = "0.0.0.0",  # noqa: S104 - agents come from other machines
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="Another port than operator.toml says.")
    ] = None,
    health_port: Annotated[
        int | None,
        typer.Option("--health-port", min=1, max=65535, help="Loopback port of the standard gRPC health service."),
    ] = None,
    log: Annotated[Path | None, typer.Option("--log", help="File for the log, JSON lines; else stderr.")] = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Serve: one port for agents, and supervision of runs. Ends with SIGTERM or Ctrl-C.

    Prints one line when it answers. Example: fedpact serve --home operator
    """
    from fedpact_server.logs import configure_logging
    from fedpact_server.serve import serve

    configure_logging(log)

    def ready(url: str, at: str, fingerprint: str) -> None:
        if as_json:
            output.emit_json({"ready": True, "url": url, "listening": at, "operator": fingerprint})
        else:
            line(f"Serving {url} at {at}; operator {fingerprint}. Ctrl-C ends it.")

    serve(home, host=host, port=port, health_port=health_port, ready=ready)
