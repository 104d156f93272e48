"""Where a demo's time goes: the operator's milliseconds, and the guards' own part from each agent."""

from typing import Any

from fedpact_server.demo import times

OPERATOR = {
    "1": {"log": 7, "orders": 4, "admission": 9, "aggregation": 1, "evaluation": 3, "contribution": 2},
    "2": {"orders": 5, "log": 6},
}


def status(*rounds: tuple[int, str]) -> dict[str, Any]:
    """As `fedpact-agent status --json` tells."""
    spent = [{"contract": "0" * 64, "round": n, "guard_ms": ms, "training_ms": "900"} for n, ms in rounds]
    return {"round_times": spent}


def test_the_policy_is_that_of_the_slowest_agent_and_parts_stand_in_a_rounds_order() -> None:
    found = times.of_rounds(OPERATOR, [status((1, "11.4"), (2, "3")), status((1, "5"), (2, "12.6"), (9, "99"))])
    assert list(found) == ["1", "2"]
    assert list(found["1"]) == list(times.PARTS)
    assert found["1"]["policy"] == 11
    assert found["2"] == {"orders": 5, "policy": 13, "log": 6}


def test_what_nobody_told_is_left_out_and_shown_as_a_dash() -> None:
    found = times.of_rounds(OPERATOR, [status(), {}])
    assert "policy" not in found["1"]
    table = {row[0]: row[1:] for row in times.rows(found)}
    assert table["policy"] == ["-", "-"]
    assert table["admission"] == ["9", "-"]
    assert table["in all"] == ["26", "11"]
    assert [row[0] for row in times.rows(found)] == [*times.PARTS, "in all"]


def test_many_rounds_are_told_by_mean_and_most() -> None:
    rounds = {str(n): {"orders": n, "log": 1} for n in range(1, 11)}
    assert times.columns(rounds) == ["ms", "mean", "most"]
    table = {row[0]: row[1:] for row in times.rows(rounds)}
    assert table["orders"] == ["5.5", "10"]
    assert table["in all"] == ["6.5", "11"]
    assert times.columns(OPERATOR) == ["ms", "round 1", "round 2"]
