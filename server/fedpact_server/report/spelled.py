"""Numbers and times as the report spells them."""

from collections.abc import Sequence


def number_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers for people, runs of them drawn together: 1-3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def time_text(moment: str) -> str:
    """An instant for people: 2026-01-31 12:00:00 UTC."""
    return f"{moment[:10]} {moment[11:19]} UTC"
