"""How our commands show their help: plain text, at once.

Typer's boxes would cost every `--help` the import of rich's renderers, more than everything else that it does.
"""

import click
import typer.core
from typer.core import TyperGroup

typer.core.HAS_RICH = False  # else options' defaults are escaped for the boxes that are not drawn


class Group(TyperGroup):
    """A group of commands, each with the whole first sentence of its help, wrapped and not cut off."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the section of commands."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, one.get_short_help_str(limit=1000)) for name, one in found if one is not None and not one.hidden]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)
