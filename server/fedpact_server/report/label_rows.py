"""The privacy label for people: a title and lines for each of its fields, in English or Chinese."""

from decimal import Decimal
from itertools import groupby, pairwise
from typing import Any

from fedpact_contract.language import Lang
from fedpact_server.report.labels import said, words

AS_IT_IS = frozenset({"column", "value", "library"})
"""What parties chose, or a name: never translated."""


def label_rows(label: dict[str, Any], lang: Lang) -> list[tuple[str, list[str]]]:
    """One entry a field of `fedpact_contract.label.dp_label`."""
    titles = words(lang)
    return [
        (titles[f"dp_{key}"], [_line(item, lang) for item in (value if isinstance(value, list) else [value])])
        for key, value in label.items()
    ]


def _line(item: Any, lang: Lang) -> str:  # noqa: ANN401 - a word, or a mapping of words
    if not isinstance(item, dict):
        return said(str(item), lang)
    titles, colon, stop = words(lang), *(("：", "；") if lang == "zh" else (": ", "; "))
    parts = [
        f"{titles[f'dp_{key}']}{colon}{_value(key, value, lang)}"
        for key, value in item.items()
        if key not in ("participant", "name")
    ]
    name = [item["name"]] if "name" in item else []
    return colon.join([*name, stop.join(parts)])


def _value(key: str, value: Any, lang: Lang) -> str:  # noqa: ANN401 - a word, a number, or a list of orders
    if isinstance(value, list):
        return orders_text(value)
    return str(value) if key in AS_IT_IS else said(str(value), lang)


def orders_text(orders: list[str]) -> str:
    """Ascending numbers, runs of equal steps drawn together: 1.1, 1.2 … 10.9, 11, 12 … 63, 128."""
    numbers = [Decimal(order) for order in orders]
    steps = [b - a for a, b in pairwise(numbers)]
    parts, place = [orders[0]] if orders else [], 0
    for _, run in groupby(steps):
        length = len(list(run))
        told = orders[place + 1 : place + length + 1]
        parts += told if length < 4 else [f"{told[0]} … {told[-1]}"]
        place += length
    return ", ".join(parts)
