"""Charts as inline SVG: small, printable, without a script. Every number shown also stands in a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#718096", "#975a16", "#285e61")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 260, 64, 150, 16, 34


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A named line: one value a round."""

    name: str
    values: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A named bar with an interval or a limit, in the unit of the axis."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    label: str = ""


def lines(series: Sequence[Series], first: int, unit: str) -> str:
    """Lines over rounds, x from `first`."""
    values = [v for s in series for v in s.values]
    if not values:
        return ""
    low, high = _span(min(0.0, *values) if min(values) < 0 else min(values), max(values))
    count = max(len(s.values) for s in series)
    parts = [_axis(low, high, unit)]

    def x(index: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (index / max(1, count - 1))

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low))

    for index in range(count):
        parts.append(_text(x(index), HEIGHT - 12, str(first + index), "middle"))
    for number, line in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(line.values))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(i):.1f}" cy="{y(v):.1f}" r="3" fill="{colour}"/>' for i, v in enumerate(line.values)]
        parts.append(_legend(number, line.name, colour))
    return _svg(HEIGHT, parts)


NOTHING = 1e-9
"""Bars that are all below this have no length: no scale makes them comparable, and the numbers stand beside them."""


def bars(items: Sequence[Bar], unit: str) -> str:
    """Horizontal bars; an interval as a whisker, a limit as a tick."""
    if not items:
        return ""
    top = max(max(b.value, b.high or 0, b.limit or 0) for b in items)
    top = top if top > NOTHING else 1.0
    left, right, row = 190, 130, 30
    height = row * len(items) + 16
    scale = (WIDTH - left - right) / top
    parts = []
    for number, bar in enumerate(items):
        y = 8 + number * row
        colour = COLOURS[number % len(COLOURS)]
        parts.append(_text(left - 8, y + 17, _short(bar.name, 26), "end"))
        parts.append(
            f'<rect x="{left}" y="{y + 4}" width="{max(0.0, bar.value) * scale:.1f}" height="{row - 10}" '
            f'fill="{colour}" fill-opacity="0.75"/>'
        )
        if bar.low is not None and bar.high is not None:
            a, b, middle = left + bar.low * scale, left + bar.high * scale, y + row / 2 - 1
            ends = "".join(f"M{x:.1f} {middle - 5}V{middle + 5}" for x in (a, b))
            parts.append(f'<path d="{ends}M{a:.1f} {middle}H{b:.1f}" stroke="#1a202c" stroke-width="1.5" fill="none"/>')
        if bar.limit is not None:
            x = left + bar.limit * scale
            parts.append(f'<path d="M{x:.1f} {y}V{y + row - 3}" stroke="#c53030" stroke-width="2"/>')
        end = left + max(bar.value, bar.high or 0, bar.limit or 0) * scale
        parts.append(_text(end + 8, y + 17, bar.label or f"{bar.value:.4g} {unit}", "start"))
    return _svg(height, parts)


def _svg(height: float, parts: Sequence[str]) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg">{body}</svg>'


def _axis(low: float, high: float, unit: str) -> str:
    parts = []
    for step in range(5):
        value = low + (high - low) * step / 4
        y = TOP + (HEIGHT - TOP - BOTTOM) * (1 - step / 4)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#e2e8f0"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{value:.3g}", "end"))
    parts.append(_text(4, TOP + 2, unit, "start"))
    return "".join(parts)


def _legend(number: int, name: str, colour: str) -> str:
    y = TOP + 8 + 20 * number
    x = WIDTH - RIGHT + 14
    return f'<rect x="{x}" y="{y - 8}" width="10" height="10" fill="{colour}"/>' + _text(
        x + 16, y + 1, _short(name, 17), "start"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _short(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 1] + "…"


def _span(low: float, high: float) -> tuple[float, float]:
    if high - low < 1e-12:
        return low - 0.5, high + 0.5
    margin = 0.06 * (high - low)
    return low - (margin if low else 0), high + margin
