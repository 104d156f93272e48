"""Where a demo's time goes: of each round, the milliseconds of the parts that are ours."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PARTS = ("orders", "policy", "admission", "aggregation", "evaluation", "contribution", "log")
"""In the order of a round. `policy`: what the slowest agent's guard did itself: checks, ledgers, signing."""

SINGLE = 6
"""Up to so many rounds stand each in a column of their own."""

Rounds = Mapping[str, Mapping[str, int]]
"""Round -> part -> milliseconds."""


def of_rounds(operator: Rounds, agents: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Each part of each round.

    Args:
        operator: What `fedpact run follow` tells.
        agents: What `fedpact-agent status` tells of each agent: its last rounds only.

    Returns:
        The parts in the order of `PARTS`; one that nobody told of is left out.
    """
    policy: dict[str, int] = {}
    for status in agents:
        for spent in status.get("round_times", ()):
            number = str(spent["round"])
            policy[number] = max(policy.get(number, 0), round(float(spent["guard_ms"])))
    found = {n: dict(parts) | ({"policy": policy[n]} if n in policy else {}) for n, parts in operator.items()}
    return {number: {part: spent[part] for part in PARTS if part in spent} for number, spent in found.items()}


def columns(rounds: Rounds) -> list[str]:
    """The heads of the columns of `rows`."""
    return ["ms", *([f"round {number}" for number in rounds] if len(rounds) <= SINGLE else ["mean", "most"])]


def rows(rounds: Rounds) -> list[list[str]]:
    """A table's rows: each part and the sum, by round or, of many rounds, mean and most; a dash where nobody told."""
    series = {part: [parts.get(part) for parts in rounds.values()] for part in PARTS}
    series["in all"] = [sum(parts.values()) for parts in rounds.values()]
    return [[name, *_cells(values)] for name, values in series.items()]


def _cells(values: Sequence[int | None]) -> list[str]:
    if len(values) <= SINGLE:
        return ["-" if value is None else str(value) for value in values]
    known = [value for value in values if value is not None]
    return [f"{sum(known) / len(known):.1f}", str(max(known))] if known else ["-", "-"]
