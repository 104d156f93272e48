"""Write the demo's data sets into a new folder, to try the agent's commands by hand: a file for each enterprise.

python scripts/demo_data.py FOLDER [--participants N]
"""

from pathlib import Path
from typing import Annotated

import typer

from fedpact_contract import output
from fedpact_contract.errors import InputError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def write(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    participants: Annotated[int, typer.Option(help="How many enterprises (3 to 12).")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Write a CSV, Parquet, SQLite and NDJSON file with handwritten digits, and the operator's validation rows."""
    from fedpact_server.demo import data

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("DEMO_FOLDER", "This is no empty folder.", file=folder, remedy="Name a new one.")
    shares, validation = data.write(folder, participants)
    if as_json:
        files = [{"name": s.name, "file": s.file, "kind": s.kind, "rows": s.num_examples} for s in shares]
        output.emit_json({"participants": files, "validation": str(validation)})
        return
    console = output.console()
    for share in shares:
        console.print(f"{share.name}, {share.num_examples} rows: {share.file}", soft_wrap=True)
    console.print(f"validation, {data.VALIDATION_ROWS} rows: {validation}", soft_wrap=True)


if __name__ == "__main__":
    output.run(app, extra="demo")
