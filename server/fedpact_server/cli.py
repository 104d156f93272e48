"""The operator's commands, as the entry point `fedpact.commands` adds them to `fedpact`.

Each group of commands is a module `cli_NAME` with a function `register(app)`. These modules import what is heavy
inside their commands: `--help` must answer at once.
"""

from importlib import import_module

import typer

GROUPS = (
    "operator",
    "participant",
    "contract",
    "serve",
    "run",
    "report",
    "contribution",
    "defences",
    "retrain",
    "audit",
    "demo",
)
"""The modules, in the order in which `fedpact --help` lists their commands."""


def register(app: typer.Typer) -> None:
    """Add the operator's commands."""
    for name in GROUPS:
        import_module(f"fedpact_server.cli_{name}").register(app)
