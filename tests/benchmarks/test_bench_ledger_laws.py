"""10,000 random ledgers on the pure transition function, by the suite's own law (there 2,000); how long it takes."""

import sys

from hypothesis import HealthCheck, given, settings
from tests.property import test_ledger_laws as laws

EXAMPLES = 10_000


def test_ten_thousand_random_ledgers(benchmark, capsys) -> None:
    law = laws.test_the_ledger_obeys_its_laws.hypothesis.inner_test
    played = []

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(laws.histories)
    def all_of_them(history) -> None:
        played.append(len(history[1]))
        law(history)

    benchmark.pedantic(all_of_them, rounds=1)
    with capsys.disabled():
        sys.stdout.write(f"\n{len(played)} random ledgers, {sum(played)} requests: no law broken\n")
    benchmark.extra_info["ledgers"] = len(played)
    assert len(played) >= EXAMPLES
