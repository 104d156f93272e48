"""Tables and figures for people: nothing that belongs together is broken, and no interval is shown too narrow."""

import io
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from fedpact_contract import output

COLUMNS = ["participant", "rounds", "share", "95 % interval", "paid", "closing"]
ROWS = [
    ["City Heart Hospital North", "5", "32.53 %", "20.86 - 44.19 %", "CNY 12,325,301.96", "signed"],
    ["第二医院", "5", "67.47 %", "55.81 - 79.14 %", "CNY 24,674,698.04", "held"],
]


def shown(columns: list[str], rows: list[list[str]], width: int = 80, *, terminal: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=terminal, markup=False, highlight=False, emoji=False
    )
    output.table(console, columns, rows, right=(1, 2, 3, 4))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]  # the StringIO from above
    return text


@given(
    st.decimals(0, 1, places=9, allow_nan=False),
    st.decimals(0, 1, places=9, allow_nan=False),
    st.decimals(0, 1, places=9, allow_nan=False),
)
def test_an_interval_is_never_shown_narrower_than_it_is(a: Decimal, b: Decimal, c: Decimal) -> None:
    low, share, high = sorted((a, b, c))
    below, dash, above, percent = output.format_interval(low, high).split(" ")
    assert (dash, percent) == ("-", "%")
    assert low * 100 - Decimal("0.01") < Decimal(below) <= low * 100
    assert high * 100 <= Decimal(above) < high * 100 + Decimal("0.01")
    assert Decimal(below) <= Decimal(output.format_share(share).removesuffix(" %")) <= Decimal(above)


def test_figures_as_text() -> None:
    assert output.format_interval("0.208651", "0.441812") == "20.86 - 44.19 %"
    assert output.format_interval("0", "1") == "0.00 - 100.00 %"
    assert output.format_share("0.120050001") == "12.01 %"
    assert output.format_share(Decimal("0.12005")) == "12.00 %", "half to even"


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("width", [200, 80, 79, 60])
def test_no_amount_and_no_word_of_a_header_is_broken(width: int, terminal: bool) -> None:
    text = shown(COLUMNS, ROWS, width, terminal=terminal)
    assert max(cell_len(line) for line in text.splitlines() if "\x1b" not in line) <= width
    for row in ROWS:
        for cell in row[1:]:
            assert cell in text
        for word in row[0].split():
            assert word in text
    for word in ["participant", "rounds", "share", "interval", "paid", "closing"]:
        assert word in text


def test_a_table_gives_way_step_by_step() -> None:
    wide, narrow, blocks = (shown(COLUMNS, ROWS, width) for width in (200, 80, 60))
    assert wide.splitlines()[0].split("  ")[0] == "participant"
    assert "City Heart Hospital North" in wide
    assert narrow.count("participant") == 1
    assert "City Heart Hospital North" not in narrow, "the name stands on two lines"
    assert blocks.count("participant") == 2, "one block a row"
    assert "participant City Heart Hospital North\n" in blocks


def test_a_header_stands_on_two_lines_where_its_cells_are_narrow() -> None:
    columns, rows = ["no.", *["what is left"] * 6], [[str(n), *["1"] * 6] for n in range(3)]
    assert shown(columns, rows, 100).splitlines()[0].count("what is left") == 6
    heads = [line.split() for line in shown(columns, rows).splitlines()[:3]]
    assert heads == [["what"] * 6, ["is"] * 6, ["no.", *["left"] * 6]]


def test_a_fingerprint_breaks_between_its_groups_only() -> None:
    fingerprint = " ".join(f"{n:04x}" for n in range(40_000, 40_016))
    text = shown(["participant", "entity code", "fingerprint", "note"], [["A", "9" * 18, fingerprint, ""]])
    assert text.splitlines()[0] == "participant A"
    assert [word for word in text.split() if len(word) == 4 and word[0] in "9"] == fingerprint.split()
    assert "note" not in text, "an empty cell has no line"


def test_text_of_others_cannot_steer_the_terminal() -> None:
    for width in (200, 80, 40):
        text = shown(COLUMNS, [["\x1b[31mA", *["\x9b2J"] * 5]], width)
        assert "\x1b" not in text
        assert "\x9b" not in text


def test_one_is_one_and_more_are_many() -> None:
    assert [output.counted(n, "round") for n in (0, 1, 2)] == ["0 rounds", "1 round", "2 rounds"]


def test_no_rows() -> None:
    assert shown(COLUMNS, [], 200).splitlines()[0].startswith("participant")
