"""The demo's line on the defences: how many alarms and clipped updates, and how much could have been found."""

from typing import Any

import pytest
from tests.support.demo_kit import own_data
from tests.support.federation import make_federation

from fedpact_contract.report import build
from fedpact_contract.request import utc_now
from fedpact_server import closing
from fedpact_server.cli_demo import defence_line
from fedpact_server.demo.run import defence_counts
from fedpact_server.demo.scenario import of_digits, of_folder, template

CALM = {"alarms": 0, "without_power": 0, "clipped": 0, "updates": 20}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "Defences: no alarm; no update was scaled down"),
        ({"alarms": 1, "clipped": 1}, "Defences: 1 alarm; 1 of 20 updates was scaled down"),
        (
            {"alarms": 2, "without_power": 8, "clipped": 3},
            "Defences: 2 alarms (8 detectors without power); 3 of 20 updates were scaled down",
        ),
    ],
)
def test_one_line_says_it(changes: dict[str, int], line: str) -> None:
    assert defence_line(CALM | changes) == line


def test_of_four_enterprises_most_detectors_have_no_power(tmp_path) -> None:
    clause: dict[str, Any] = {"clip": "median-signal", "wreckers": "reject", "negatives": "0.1", "dispute_hours": 72}
    fed = make_federation(tmp_path, defences=clause)
    assert fed.run() == "completed"
    with fed.database.write() as connection:
        closing.settle(connection, fed.contract, fed.operator_run_key, 1_000_000, 0)
    found = defence_counts(build(fed.entries()))
    assert found["updates"] == 4 * 3
    assert found["without_power"] == 8, "nobody has four peers; what needs none has power"


def test_the_demos_contract_has_defences(tmp_path) -> None:
    """`defence_counts` counts on them."""
    assert "[defences]" in template(of_digits(tmp_path, 4, 3), utc_now())


def test_copies_are_limited_where_it_is_known_that_there_are_few(tmp_path) -> None:
    """No two of the digits are alike; of somebody's own rows, of few columns, many may be."""
    from sklearn.datasets import load_digits

    known = load_digits()
    assert len({(*row, label) for row, label in zip(known.data.tolist(), known.target, strict=True)}) == 1797
    assert "max_duplicates = 0.05" in template(of_digits(tmp_path / "digits", 4, 3), utc_now())
    assert "max_duplicates" not in template(of_folder(own_data(tmp_path / "own")), utc_now())
