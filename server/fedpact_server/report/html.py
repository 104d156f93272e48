"""The HTML report: one file, no script, nothing fetched."""

import json
from datetime import timedelta
from decimal import Decimal
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat

from fedpact_contract.errors import InputError
from fedpact_contract.language import Lang
from fedpact_contract.metric import loss_unit
from fedpact_contract.output import format_interval, format_share
from fedpact_contract.page import STYLE
from fedpact_contract.record import Hex32, Name, Part
from fedpact_contract.report import not_stopped_zh
from fedpact_contract.request import instant, parse_instant
from fedpact_contract.settlement import format_fen
from fedpact_server.report.charts import COLOURS, INK, Bar, Series, bars, lines
from fedpact_server.report.defence_rows import defence_section, undetected_section
from fedpact_server.report.label_rows import label_rows
from fedpact_server.report.labels import CENTRAL, said, words
from fedpact_server.report.spelled import number_ranges, time_text


class LiftLine(Part):
    """One participant alone: its model's metric in each draw of noise."""

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
    environment.filters["share"] = format_share
    environment.filters["interval"] = lambda party: format_interval(party["share_low"], party["share_high"])
    environment.filters["nat"] = lambda text: f"{Decimal(text):.6f}"
    environment.filters["time"] = time_text
    environment.filters["said"] = lambda text: said(text, lang)
    lift = None if lift is None else _in_order(lift, report)
    central = report["privacy"]["trust_model"] == CENTRAL
    return environment.get_template("report.html.j2").render(
        r=report,
        w=words(lang, report["loss"]),
        style=STYLE,
        lang=lang,
        lift=lift,
        less_is_better=report["loss"] == "squared-error",
        central=central,
        opened=_opened(report),
        outcomes=_outcomes(report),
        utilities=_utilities(report, lang),
        charts=_charts(report, lift, lang),
        label=label_rows(report["privacy"], lang),
        defences=defence_section(report, lang),
        undetected=undetected_section(report, lang),
        not_stopped=not_stopped_zh(central=central) if lang == "zh" else report["not_stopped"],
    )


def _utilities(report: dict[str, Any], lang: Lang) -> str:
    """On whose word the losses stand."""
    known, found = words(lang), report["reevaluation"]
    if found is None:
        return known["utilities"]
    if found["differing"]:
        return known["reevaluated_otherwise"].format(found["auditor"], found["differing"])
    return known[f"reevaluated_{found['coalitions']}"].format(found["auditor"], found["sample"])


def _in_order(lift: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """The comparison with its lines in the contract's order."""
    place = {p["id"]: number for number, p in enumerate(report["participants"])}
    return lift | {"participants": sorted(lift["participants"], key=lambda line: place.get(line["id"], len(place)))}


def _opened(report: dict[str, Any]) -> list[str]:
    """When the first and the last round were opened; nothing where none was.

    The log holds deadlines; a round was opened so many seconds before its own.
    """
    before = timedelta(seconds=report["deadline_seconds"])
    ends = report["rounds"][:1] + report["rounds"][1:][-1:]
    return [time_text(instant(parse_instant(line["deadline"]) - before)) for line in ends]


def _outcomes(report: dict[str, Any]) -> list[dict[str, str]]:
    """What became of the orders: one line for a participant, an outcome and its code, with the rounds."""
    rounds: dict[tuple[str, str, str], list[int]] = {}
    for line in report["rounds"]:
        for o in line["outcomes"]:
            rounds.setdefault((o["participant"], o["outcome"], o["code"]), []).append(line["round"])
    return [
        {"name": p["name"], "outcome": outcome, "code": code, "rounds": number_ranges(numbers)}
        for p in report["participants"]
        for (participant, outcome, code), numbers in rounds.items()
        if participant == p["id"]
    ]


def _charts(report: dict[str, Any], lift: dict[str, Any] | None, lang: Lang) -> dict[str, str]:
    """Every chart; a participant has one colour in all of them."""
    w, colours = (
        words(lang, report["loss"]),
        dict(zip((p["id"] for p in report["participants"]), cycle(COLOURS), strict=False)),
    )
    charts = {"privacy": bars(_epsilon(report, colours)), "metric": "", "cumulative": "", "shares": "", "lift": ""}
    scored = [line for line in report["rounds"] if "metric" in line]
    if scored:
        metric = [float(report["metric"]["initial"]), *(float(line["metric"]) for line in scored)]
        name = said(report["metric"]["name"], lang)
        charts["metric"] = lines([Series(name=name, colour=INK, values=metric)], w["round"], "")
        cumulative = [
            Series(
                name=p["name"],
                colour=colours[p["id"]],
                values=[0.0, *(float(line["cumulative"][p["id"]]) for line in scored)],
            )
            for p in report["participants"]
        ]
        if report["privacy"]["trust_model"] != CENTRAL:  # there everybody has the same
            charts["cumulative"] = lines(cumulative, w["round"], loss_unit(report["loss"]))
    if report["settlement"] is not None:
        charts["shares"] = bars(_shares(report, colours))
    if lift is not None:
        charts["lift"] = bars(_lift(lift, colours, w["together"]))
    return charts


def _epsilon(report: dict[str, Any], colours: dict[str, str]) -> list[Bar]:
    return [
        Bar(
            name=p["name"],
            colour=colours[p["id"]],
            value=float(p["epsilon_spent"]),
            limit=float(p["epsilon_budget"]),
            label=f"{float(p['epsilon_spent']):.3f} / {p['epsilon_budget']}",
        )
        for p in report["participants"]
    ]


def _shares(report: dict[str, Any], colours: dict[str, str]) -> list[Bar]:
    return [
        Bar(
            name=p["name"],
            colour=colours[p["id"]],
            value=float(p["share"]),
            low=float(p["share_low"]),
            high=float(p["share_high"]),
            label=format_share(p["share"]),
        )
        for p in report["participants"]
    ]


def _lift(lift: dict[str, Any], colours: dict[str, str], together: str) -> list[Bar]:
    alone = [
        Bar(
            name=line["name"],
            colour=colours.get(line["id"], INK),
            value=line["mean"],
            low=min(line["draws"]),
            high=max(line["draws"]),
            label=f"{line['mean']:.3f}",
        )
        for line in lift["participants"]
    ]
    return [Bar(name=together, colour=INK, value=lift["together"], label=f"{lift['together']:.3f}"), *alone]
