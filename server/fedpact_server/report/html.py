"""The HTML report: one file, no script, nothing fetched."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat

from fedpact_contract.errors import InputError
from fedpact_contract.record import Hex32, Name, Part
from fedpact_contract.settlement import format_fen
from fedpact_server.report.charts import Bar, Series, bars, lines
from fedpact_server.report.labels import NOT_STOPPED_ZH, Lang, words


class LiftLine(Part):
    """One participant alone: its model's accuracy in each draw of noise."""

    id: Hex32
    name: Name
    draws: Annotated[tuple[FiniteFloat, ...], Field(min_length=1)]
    mean: FiniteFloat


class Lift(Part):
    """What `fedpact_server.demo.lift` found."""

    together: FiniteFloat
    participants: Annotated[tuple[LiftLine, ...], Field(min_length=1)]
    draws: int
    alone_noise_multiplier: str
    steps: int
    note: str


def read_lift(path: Path) -> dict[str, Any]:
    """The comparison that the demo wrote, for `render`.

    Raises:
        InputError: LIFT_FILE, LIFT_FORM.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as err:
        raise InputError("LIFT_FILE", "The comparison cannot be read as JSON.", file=path) from err
    return Lift.parse(value, code="LIFT_FORM", file=path).model_dump()


def render(report: dict[str, Any], lang: Lang, lift: dict[str, Any] | None = None) -> str:
    """The report as one HTML document.

    Args:
        report: `fedpact_contract.report.build` of the log.
        lang: Language of the words; the data is the same.
        lift: Each participant's own model against the federation's (`fedpact_server.demo.lift`), where known.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fedpact_server", "templates"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["money"] = lambda fen: format_fen(fen, lang)
    environment.filters["percent"] = lambda text: f"{100 * float(text):.2f} %"
    return environment.get_template("report.html.j2").render(
        r=report,
        w=words(lang),
        lang=lang,
        lift=lift,
        charts=_charts(report, lift, words(lang)),
        not_stopped=NOT_STOPPED_ZH if lang == "zh" else report["not_stopped"],
    )


def _charts(report: dict[str, Any], lift: dict[str, Any] | None, w: dict[str, str]) -> dict[str, str]:
    charts = {"privacy": bars(_epsilon(report), "ε"), "metric": "", "cumulative": "", "shares": "", "lift": ""}
    names = {p["id"]: p["name"] for p in report["participants"]}
    scored = [line for line in report["rounds"] if "metric" in line]
    if scored:
        metric = [float(report["metric"]["initial"]), *(float(line["metric"]) for line in scored)]
        charts["metric"] = lines([Series(name=report["metric"]["name"], values=metric)], 0, "")
        cumulative = [
            Series(name=names[p], values=[0.0, *(float(line["cumulative"][p]) for line in scored)]) for p in names
        ]
        charts["cumulative"] = lines(cumulative, 0, "nat")
    if report["settlement"] is not None:
        charts["shares"] = bars(_shares(report), "")
    if lift is not None:
        charts["lift"] = bars(_lift(lift, w), "")
    return charts


def _epsilon(report: dict[str, Any]) -> list[Bar]:
    return [
        Bar(
            name=p["name"],
            value=float(p["epsilon_spent"]),
            limit=float(p["epsilon_budget"]),
            label=f"{float(p['epsilon_spent']):.3f} / {p['epsilon_budget']}",
        )
        for p in report["participants"]
    ]


def _shares(report: dict[str, Any]) -> list[Bar]:
    return [
        Bar(
            name=p["name"],
            value=float(p["share"]),
            low=float(p["share_low"]),
            high=float(p["share_high"]),
            label=f"{100 * float(p['share']):.2f} %",
        )
        for p in report["participants"]
    ]


def _lift(lift: dict[str, Any], w: dict[str, str]) -> list[Bar]:
    alone = [
        Bar(name=line["name"], value=line["mean"], low=min(line["draws"]), high=max(line["draws"]))
        for line in lift["participants"]
    ]
    return [Bar(name=w["together"], value=lift["together"]), *alone]
