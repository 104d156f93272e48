"""Draws the pictures of docs/privacy.md, as SVG. No tests here.

python -m tests.support.attack_pictures docs/pictures
"""

import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from tests.support import attacks
from tests.support.noise import FixedNoise

from fedpact_models.features import Floats

SHOWN = tuple(range(8))
"""Rows of participant 0."""

PIXEL, GAP, NAMES, FONT = 6, 10, 270, 'font-family="sans-serif" font-size="13"'
SIDE, MARGIN = 300, 40
NO_DP, PRIVATE, GREY = "#c05621", "#2b6cb0", "#718096"


def draw(folder: Path, *, steps: int) -> None:
    """Write inversion.svg and membership.svg; `steps` of the search for a batch."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "inversion.svg").write_text(_gallery(inversion(steps)), "utf-8")
    (folder / "membership.svg").write_text(_curves(), "utf-8")


def inversion(steps: int) -> list[tuple[str, Sequence[Floats]]]:
    """Rows of pictures with their names."""
    own = attacks.federation()[1][0]
    records = own.x[list(SHOWN)]
    rows: list[tuple[str, Sequence[Floats]]] = [("the records", records)]
    cases = (
        ("no DP", attacks.NO_CLIPPING, attacks.Silent),
        ("clipped, no noise", "1", attacks.Silent),
        ("epsilon 2", "1", FixedNoise),
    )
    for name, limit, noise in cases:
        contract = attacks.demo_contract(max_grad_norm=limit)
        base = attacks.base_model(contract)
        totals = [attacks.observed(contract, base, [row], noise(row)) for row in SHOWN]
        rows.append((f"one record an update, {name}", [attacks.read_off(contract, total) for total in totals]))
    for name, limit, noise in (cases[0], cases[2]):
        contract = attacks.demo_contract(max_grad_norm=limit)
        base = attacks.base_model(contract)
        total = attacks.observed(contract, base, SHOWN, noise(0))
        rows.append(
            (f"all eight in one update, {name}", attacks.match(contract, base, total, own.y[list(SHOWN)], steps=steps))
        )
    return rows


def _gallery(rows: Sequence[tuple[str, Sequence[Floats]]]) -> str:
    cell = 8 * PIXEL + GAP
    parts = []
    for i, (name, records) in enumerate(rows):
        parts.append(_text(0, i * cell + 4 * PIXEL + 4, name))
        parts += [_digit(r, NAMES + j * cell, i * cell) for j, r in enumerate(records)]
    return _svg(NAMES + len(rows[0][1]) * cell, len(rows) * cell, parts)


def _digit(record: Floats, left: int, top: int) -> str:
    """64 pixels, dark where the feature is high, in 17 shades; its scale is that of its constant feature."""
    ink = np.clip(np.rint(8 * (record[:-1] / max(record[-1], 1e-9) + 1)), 0, 16).astype(int).reshape(8, 8)
    parts = [f'<rect x="{left}" y="{top}" width="{8 * PIXEL}" height="{8 * PIXEL}" fill="#fff" stroke="{GREY}"/>']
    for shade in range(1, 17):
        places = [
            f"M{left + PIXEL * x} {top + PIXEL * y}h{PIXEL}v{PIXEL}h-{PIXEL}" for y, x in np.argwhere(ink == shade)
        ]
        if places:
            level = 255 - 15 * shade
            parts.append(f'<path fill="rgb({level},{level},{level})" d="{"".join(places)}"/>')
    return "".join(parts)


def _curves() -> str:
    """How many members are found (upwards) for how many wrongly accused (to the right)."""
    e = np.e
    lines = [
        ("a guess", GREY, "4 3", np.array([0, 1]), np.array([0, 1])),
        ("limit of epsilon 1", PRIVATE, "4 3", np.array([0, 1 / (1 + e), 1]), np.array([0, e / (1 + e), 1])),
    ]
    for name, colour, private in (("no DP", NO_DP, False), ("epsilon 1", PRIVATE, True)):
        found = attacks.membership(0, private=private)
        false, true = attacks.roc(found.loss, found.member)
        lines.append((f"{name}: AUC {attacks.auc(found.loss, found.member):.2f}", colour, "none", false, true))
    parts = [f'<rect x="{MARGIN}" y="5" width="{SIDE}" height="{SIDE}" fill="#fff" stroke="{GREY}"/>']
    for i, (name, colour, dashes, false, true) in enumerate(lines):
        points = " ".join(f"{MARGIN + SIDE * a:.1f},{5 + SIDE * (1 - b):.1f}" for a, b in zip(false, true, strict=True))
        style = f'fill="none" stroke="{colour}" stroke-width="1.5" stroke-dasharray="{dashes}"'
        parts.append(f'<polyline {style} points="{points}"/>')
        top = 25 + 22 * i
        parts.append(f'<path {style} d="M{MARGIN + SIDE + 15} {top}h24"/>')
        parts.append(_text(MARGIN + SIDE + 46, top + 4, name))
    parts.append(_text(MARGIN, SIDE + 22, "share of others wrongly called members, 0 to 1"))
    parts.append(
        f'<text transform="translate({MARGIN - 12} {SIDE}) rotate(-90)" {FONT}>share of members found, 0 to 1</text>'
    )
    return _svg(MARGIN + SIDE + 190, SIDE + 32, parts)


def _text(x: int, y: int, text: str) -> str:
    return f'<text x="{x}" y="{y}" {FONT}>{escape(text)}</text>'


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#fff"/>', *parts, "</svg>", ""])


if __name__ == "__main__":
    draw(Path(sys.argv[1]), steps=3000)
