"""Charts as inline SVG: small, printable, without a script. Every number shown also stands in a table."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

COLOURS = (
    *("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#0e7490"),
    *("#975a16", "#4d7c0f", "#9f1239", "#4338ca", "#0f766e", "#78716c"),
)
"""One for each participant, in the contract's order; from the thirteenth on they come again (client level alone)."""

INK = "#1a202c"
"""The colour of what belongs to no participant."""

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 260, 70, 150, 30, 34
NAMES, FIGURES, ROW = 190, 130, 30
"""Of bars: the room for names on the left and for figures on the right, and the height of one bar's row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A named line: one value a round."""

    name: str
    colour: str
    values: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A named bar with its label, and with an interval or a limit in the unit of the axis."""

    name: str
    colour: str
    value: float
    label: str
    low: float | None = None
    high: float | None = None
    limit: float | None = None


def lines(series: Sequence[Series], across: str, unit: str) -> str:
    """Lines over rounds, x from 0; `across` names the horizontal axis, `unit` the vertical one."""
    values = [v for s in series for v in s.values]
    if not values:
        return ""
    count = max(len(s.values) for s in series)
    low, high, axis = _axis(min(values), max(values), unit)

    def x(index: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (index / max(1, count - 1))

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low))

    parts = [axis, _text(WIDTH - RIGHT + 14, HEIGHT - 12, across, "start")]
    parts += [_text(x(i), HEIGHT - 12, str(i), "middle") for i in range(0, count, max(1, round(_step(count - 1, 10))))]
    for number, line in enumerate(series):
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(line.values))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{line.colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{x(i):.1f}" cy="{y(v):.1f}" r="3" fill="{line.colour}"/>' for i, v in enumerate(line.values)
        ]
        parts.append(_legend(number, line))
    return _svg(HEIGHT, parts)


NOTHING = 1e-9
"""Bars that are all below this have no length: no scale makes them comparable, and the numbers stand beside them."""


def bars(items: Sequence[Bar]) -> str:
    """Horizontal bars from 0; an interval as a whisker, a limit as a tick."""
    if not items:
        return ""
    top = max(max(b.value, b.high or 0, b.limit or 0) for b in items)
    scale = (WIDTH - NAMES - FIGURES) / (top if top > NOTHING else 1.0)
    parts = []
    for number, bar in enumerate(items):
        y = 8 + number * ROW
        parts.append(_text(NAMES - 8, y + 17, _short(bar.name, NAMES - 16), "end"))
        parts.append(
            f'<rect x="{NAMES}" y="{y + 4}" width="{max(0.0, bar.value) * scale:.1f}" height="{ROW - 10}" '
            f'fill="{bar.colour}" fill-opacity="0.75"/>'
        )
        if bar.low is not None and bar.high is not None:
            a, b, middle = NAMES + bar.low * scale, NAMES + bar.high * scale, y + ROW / 2 - 1
            ends = "".join(f"M{x:.1f} {middle - 5}V{middle + 5}" for x in (a, b))
            parts.append(f'<path d="{ends}M{a:.1f} {middle}H{b:.1f}" stroke="{INK}" stroke-width="1.5" fill="none"/>')
        if bar.limit is not None:
            x = NAMES + bar.limit * scale
            parts.append(f'<path d="M{x:.1f} {y}V{y + ROW - 3}" stroke="#c53030" stroke-width="2"/>')
        end = NAMES + max(bar.value, bar.high or 0, bar.limit or 0) * scale
        parts.append(_text(end + 8, y + 17, bar.label, "start"))
    return _svg(ROW * len(items) + 16, parts)


def stacked(drawings: Sequence[str]) -> str:
    """One SVG file of several of these drawings, one below the other; a font of its own, as nothing is around it."""
    parts, top = [], 0.0
    for drawing in drawings:
        parts.append(f'<svg y="{top:g}" width="{WIDTH}" height="{_height(drawing):g}"{drawing.removeprefix("<svg")}')
        top += _height(drawing) + TOP
    style = 'font-family="sans-serif" font-size="12"'
    return f'<svg viewBox="0 0 {WIDTH} {top:g}" {style} xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>\n'


def _height(drawing: str) -> float:
    """Of what `_svg` made."""
    return float(drawing.split('"', 2)[1].split()[3])


def width(text: str) -> float:
    """About how wide a text is drawn, in units of the picture: rather too wide than too narrow."""
    return sum(11.0 if unicodedata.east_asian_width(c) in "WF" else 6.8 for c in text)


def _svg(height: float, parts: Sequence[str]) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg">{body}</svg>'


def _axis(low: float, high: float, unit: str) -> tuple[float, float, str]:
    """The vertical axis: where it begins and ends, both round numbers, and its drawing with a line at each tick."""
    least = 0.1 * max(abs(low), abs(high)) or 1.0
    if high - low < least:  # labels have three digits
        low, high = low - least / 2, high + least / 2
    step = _step(high - low, 5)
    first, last = floor(low / step), ceil(high / step)
    decimals = max(0, -floor(log10(step)))
    parts = [_text(LEFT - 6, 12, unit, "end")]
    for number in range(first, last + 1):
        y = TOP + (HEIGHT - TOP - BOTTOM) * (last - number) / (last - first)
        label = f"{number * step:.{decimals}f}" if decimals <= 4 else f"{number * step:.3g}"
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#e2e8f0"/>')
        parts.append(_text(LEFT - 6, y + 4, label, "end"))
    return first * step, last * step, "".join(parts)


def _step(span: float, most: int) -> float:
    """The smallest 1, 2 or 5 times a power of ten that cuts a span into no more than `most` parts."""
    least = max(span, NOTHING) / most
    power = 10.0 ** floor(log10(least))
    return next((m * power for m in (1, 2, 5) if m * power >= least), 10 * power)


def _legend(number: int, line: Series) -> str:
    x, y = WIDTH - RIGHT + 14, TOP + 8 + 17 * number
    return f'<rect x="{x}" y="{y - 8}" width="10" height="10" fill="{line.colour}"/>' + _text(
        x + 16, y + 1, _short(line.name, RIGHT - 34), "start"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _short(text: str, room: float) -> str:
    """The text, cut where it is wider than the room."""
    if width(text) <= room:
        return text
    while text and width(text + "…") > room:
        text = text[:-1]
    return text + "…"
