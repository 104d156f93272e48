"""Commands `fedpact report`, `fedpact evidence`, `fedpact model` and `fedpact predict`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedpact_contract import output
from fedpact_contract.cli import Language
from fedpact_contract.files import refuse_existing, write_new
from fedpact_server.cli_common import (
    DEFAULT_HOME,
    ColumnNames,
    Delimiter,
    Home,
    Json,
    Missing,
    Table,
    split_names,
)
from fedpact_server.cli_run import RUN, open_contract

if TYPE_CHECKING:
    import polars as pl


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("report")(report_command)
    app.command("evidence")(evidence_command)
    app.command("model")(model_command)
    app.command("predict")(predict_command)


def report_command(
    run: RUN,
    form: Annotated[
        Literal["html", "json", "label"],
        typer.Option("--format", help="What is written; label: the privacy label, in the terminal."),
    ] = "html",
    lang: Language = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="A new file (default: report-ID.html, or stdout for json).")
    ] = None,
    lift: Annotated[Path | None, typer.Option("--lift", help="The demo's comparison of together and alone.")] = None,
    reevaluation: Annotated[
        Path | None,
        typer.Option("--reevaluation", help="The auditor's; the report then says whose word utilities are."),
    ] = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Write the report of a run: a pure function of its log. Example: fedpact report 3f2a91 --out report.html."""
    import json

    from fedpact_contract.errors import InputError
    from fedpact_contract.language import language
    from fedpact_contract.reevaluation import read, read_file
    from fedpact_contract.report import build
    from fedpact_server import logbook
    from fedpact_server.report.html import read_lift, render
    from fedpact_server.run_state import signed_contract

    if form == "label" and out is not None:
        raise InputError("REPORT_LABEL_FILE", "The label alone is shown, not written.", field="--out", remedy=LABEL_IN)
    if form == "html" and out is not None and out.suffix == ".json":
        raise InputError(
            "REPORT_FORMAT",
            "The file is called JSON, and a page would be written into it.",
            file=out,
            field="--format",
            remedy="Add --format json, or name a .html file.",
        )
    comparison = None if lift is None else read_lift(lift)
    audited = None if reevaluation is None else read_file(reevaluation)
    at = open_contract(home, run)
    with at.database.read() as connection:
        signed_contract(connection, at.contract.id)
        entries = logbook.signed_entries(connection, at.contract.id)
    report = build(entries, None if audited is None else read(audited, at.contract, entries, file=reevaluation))
    if form == "label":
        _show_label(report["privacy"], language(lang), as_json=as_json)
        return
    if form == "json" and out is None:
        output.emit_json(report)
        return
    if form == "json":
        text = json.dumps(report, ensure_ascii=False, indent=1) + "\n"
    else:
        text = render(report, language(lang), comparison)
    path = out or Path(f"report-{at.contract.id[:16]}.html")
    write_new(path, text.encode())
    _wrote(path, as_json=as_json)


def evidence_command(
    run: RUN,
    out: Annotated[Path, typer.Option("--out", help="A new folder.")],
    auditor: Annotated[
        bool,
        typer.Option("--auditor", help="For the contract's auditor: also the sealed rows, models and updates."),
    ] = False,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Write the evidence of a run, to be verified offline: fedpact verify FOLDER --trust FILE."""
    from fedpact_contract.evidence import write_evidence
    from fedpact_server import bundle
    from fedpact_server.evidence import evidence_parts
    from fedpact_server.run_state import signed_contract

    at = open_contract(home, run)
    with at.database.read() as connection:
        signed_contract(connection, at.contract.id)
        parts = evidence_parts(connection, at.contract.id)
    if auditor:
        bundle.write(out, at.operator.path, at.contract, *parts)
    else:
        write_evidence(out, *parts)
    _wrote(out, as_json=as_json)


def model_command(
    run: RUN,
    out: Annotated[Path, typer.Option("--out", help="NAME: NAME.safetensors and NAME.json are written; new files.")],
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Deliver the model of a completed run: safetensors, and JSON with task, schema, bounds and privacy label."""
    from fedpact_contract.errors import InputError
    from fedpact_contract.label import dp_label
    from fedpact_contract.log import RunCompleted
    from fedpact_contract.report import charged_steps
    from fedpact_models.release import make_release, release_paths, save_release
    from fedpact_server import logbook
    from fedpact_server.run_state import load_model

    refuse_existing(*release_paths(out))
    at = open_contract(home, run)
    contract = at.contract
    with at.database.read() as connection:
        bodies = [entry.open() for entry in logbook.read_entries(connection, contract.id)]
    done = [body for body in bodies if isinstance(body, RunCompleted)]
    if not done:
        raise InputError("RUN_NOT_COMPLETED", "A model is delivered when the run is completed.")
    release = make_release(
        contract.model,
        contract.data,
        load_model(at.operator.path, done[0].model_digest),
        contract_id=contract.id,
        round=done[0].rounds,
        privacy=dp_label(contract, charged_steps(bodies, contract)),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    weights, _card = save_release(out, release)
    _wrote(weights, as_json=as_json)


def predict_command(
    model: Annotated[Path, typer.Argument(help="MODEL.safetensors or its MODEL.json.", metavar="MODEL")],
    file: Annotated[Path, typer.Argument(help="A table with the contract's columns.", metavar="FILE")],
    kind: Annotated[str, typer.Option("--kind", help="csv, parquet, sqlite, ndjson or arrow.")] = "",
    table: Table = None,
    column_names: ColumnNames = None,
    delimiter: Delimiter = ",",
    missing: Missing = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write a new CSV file instead of printing.")] = None,
    as_json: Json = False,
) -> None:
    """Predict each row's label with a delivered model. Example: fedpact predict model.safetensors new.csv."""
    from fedpact_models.release import load_release, predict
    from fedpact_models.tables import first_line, read_table

    release = load_release(model)
    what = _kind(kind or file.suffix.lstrip("."))
    names = split_names(column_names)
    frame = read_table(
        file, kind=what, table=table, column_names=names, delimiter=delimiter, missing=tuple(missing or ())
    )
    result = predict(release, frame, file=str(file), first_line=first_line(what, names))
    if out is not None:
        write_new(out, result.write_csv().encode())
        _wrote(out, as_json=as_json)
    elif as_json:
        output.emit_json({"predictions": result.to_dicts()})
    else:
        told = [result["row"].cast(str), *(_shown(column) for column in result.iter_columns() if column.name != "row")]
        right = tuple(place for place, column in enumerate(result.iter_columns()) if column.dtype.is_numeric())
        output.table(output.console(), result.columns, list(map(list, zip(*told, strict=True))), right=right)


LABEL_IN = "Leave --out away, or take --format html or json, which have the label in them."


def _show_label(label: dict[str, Any], lang: Literal["en", "zh"], *, as_json: bool) -> None:
    """The privacy label in the terminal."""
    from fedpact_server.report.label_rows import label_rows

    if as_json:
        output.emit_json(label)
        return
    for title, lines in label_rows(label, lang):
        output.line(f"{title}{'：' if lang == 'zh' else ': '}{lines[0] if len(lines) == 1 else ''}".rstrip())
        for text in lines if len(lines) > 1 else ():
            output.line(f"  {text}")


def _shown(column: "pl.Series") -> list[str]:
    return ["-" if value is None else value if isinstance(value, str) else f"{value:.3f}" for value in column]


def _kind(name: str) -> Any:  # noqa: ANN401 - one of the literal kinds, checked by read_table
    return {"db": "sqlite", "jsonl": "ndjson", "feather": "arrow", "ipc": "arrow"}.get(name, name)


def _wrote(path: Path, *, as_json: bool) -> None:
    if as_json:
        output.emit_json({"file": str(path.absolute())})
    else:
        output.console().print(output.visible(str(path)), soft_wrap=True)
