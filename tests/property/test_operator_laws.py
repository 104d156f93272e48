"""Laws of the operator's edge: whatever comes in gets a code, limits hold at all times, documents stay inert."""

import unicodedata
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.operator_world import NOW, Operator, body_of, enterprise, operator
from tests.support.settlement_kit import a_contract

from fedpact_contract.canonical import HIDDEN
from fedpact_contract.contract import Contract
from fedpact_contract.errors import InputError, RefusedError
from fedpact_contract.messages import Invitation
from fedpact_contract.request import API
from fedpact_contract.text import render
from fedpact_server.api import create_api
from fedpact_server.api_edge import Limits, RateLimiter

ONE = enterprise(1)
FREE = Limits(address=(10**9, 1e9), node=(10**9, 1e9), enrol=(10**9, 1e9))
INVITATION = Invitation(
    url="https://fl.example.cn:8443",
    ca_pem="",
    operator="0" * 64,
    entity_code=ONE.entity_code,
    token="0" * 64,
    expires="2026-11-25T12:00:00Z",
)
LEAVES = st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=20)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Operator:
    made = operator(tmp_path_factory.mktemp("laws"))
    made.admit(ONE)
    return made


@pytest.fixture(scope="module")
def client(world: Operator) -> TestClient:
    return TestClient(create_api(world.home, world.database, limits=FREE, now=lambda: NOW))


def mutated(draw: st.DrawFn, value: Any) -> Any:
    """The value with something in it replaced by any JSON."""
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value)))
        return value | {key: mutated(draw, value[key])}
    if isinstance(value, list) and value and draw(st.booleans()):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], mutated(draw, value[place]), *value[place + 1 :]]
    return draw(JSON)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_malformed_enrolment_gets_a_code_and_never_an_internal_error(
    world: Operator, client: TestClient, data: st.DataObject
) -> None:
    whole = {"token": "0" * 64, "request": ONE.request(INVITATION).plain()}
    body = body_of(data.draw(st.composite(mutated)(whole)))
    answer = client.post(f"{API}/enrol", content=body)
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["code"].isupper()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_malformed_card_gets_a_code_or_is_the_card_itself(client: TestClient, data: st.DataObject) -> None:
    row = {"age": 1, "sex": "f", "ill": "no"}
    whole = {"card": ONE.card(released_rows=1).plain(), "released": [row]}
    body = body_of(data.draw(st.composite(mutated)(whole)))
    answer = client.post(f"{API}/cards", content=body, headers=ONE.headers("POST", f"{API}/cards", body))
    assert answer.status_code < 500
    if answer.status_code != 200:
        assert answer.json()["error"]["code"].isupper()


@given(
    burst=st.integers(1, 5),
    rate=st.floats(0, 5),
    waits=st.lists(st.floats(0, 2), min_size=1, max_size=60),
)
def test_never_more_than_the_burst_and_what_filled_up_since(burst: int, rate: float, waits: list[float]) -> None:
    time, passed = [0.0], []
    limiter = RateLimiter(burst, rate, clock=lambda: time[0])
    for wait in waits:
        time[0] += wait
        try:
            limiter.take("k")
        except RefusedError:
            continue
        passed.append(time[0])
    for i, begin in enumerate(passed):
        for j, end in enumerate(passed[i:], start=i):
            assert j - i + 1 <= burst + rate * (end - begin) + 1e-6


@settings(deadline=None)
@given(title=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_no_title_can_steer_a_terminal(title: str) -> None:
    """A title with an invisible character is none; and the text shows none, whoever made the contract."""
    made = a_contract()
    hidden = {unicodedata.category(c) for c in title} & HIDDEN
    if hidden:
        with pytest.raises(InputError, match="visible"):
            Contract.parse(made.plain() | {"title": title})
    else:
        assert Contract.parse(made.plain() | {"title": title}).title == title
    text = render(made.model_copy(update={"title": title}))
    assert not {unicodedata.category(c) for c in text.replace("\n", "")} & HIDDEN
