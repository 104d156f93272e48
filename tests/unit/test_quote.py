"""What joining would cost and bring: epsilon as at signing, bytes as they left, shares by the contract's rule."""

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tests.support.agent_world import PASSPHRASE, Lab, lab
from tests.support.central import CENTRAL, central_toml
from tests.support.closed_run import ClosedRun, open_run
from tests.support.command import Run, runner
from tests.support.demo_kit import one_thread
from tests.support.federation import fixed_keys, make_federation
from tests.support.noise import FixedNoise

from fedpact_client import closing, quote, simulation, sources
from fedpact_client import review as reviewing
from fedpact_client.cli import main
from fedpact_client.guard import record_reply
from fedpact_client.measuring import measure
from fedpact_client.quote import Share, Simulated, duration, plausible_share, privacy_cost, simulate, traffic
from fedpact_client.review import review
from fedpact_client.signing import commit, fetch_offer
from fedpact_client.store import EgressKind
from fedpact_client.text import cost_values
from fedpact_contract.arrays import model_digest
from fedpact_contract.contract import Contract
from fedpact_contract.contract_file import read_contract
from fedpact_contract.errors import InputError, RefusedError
from fedpact_contract.request import utc_now
from fedpact_contract.shape import feature_count
from fedpact_models.aggregation import START, apply, next_model, server_steps, weighted_steps
from fedpact_models.evaluate import logits
from fedpact_models.noise import SystemNoise
from fedpact_models.training import local_update

D = Decimal
CLAUSES: dict[str, Any] = {
    "statistics": {
        "noise_multiplier": D(30),
        "queries": [{"kind": "histogram", "column": "digit"}, {"kind": "mean", "column": "pixel_3"}],
    },
    "baseline": {"steps": 2},
}


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with one_thread():
        yield


# Bytes, against what really left


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> ClosedRun:
    """A run from measurements to the close; what Enterprise 1 sends is entered by the guard's own code."""
    folder = tmp_path_factory.mktemp("ended")
    with one_thread():
        run = open_run(folder, counts=[90, 60, 70], training__rounds=4, privacy__epsilon=D(3), **CLAUSES)
        agent, orders = run.federation.agent(1), []

        def keep(_node: str, order: bytes, model: bytes) -> tuple[bytes, bytes]:
            orders.append(order)
            return order, model

        def leave(ready: Any) -> tuple[bytes, bytes]:
            record_reply(agent.desk.store, ready, run.contract_id, orders[-1])
            return ready.reply, ready.array

        run.federation.transport.before, agent.tamper = keep, leave
        with run.client(1) as client:
            assert measure(agent.desk, client, _measured(agent))
        assert run.federation.run(accept_test_noise=False) == "completed"
        run.settle()
        with run.client(1) as client:
            closing.close(agent.desk, client)
    return run


def _measured(agent: Any) -> Any:
    from fedpact_client.answer import Trained
    from fedpact_models.statistics import noised_sums
    from fedpact_models.training import local_baseline

    def give(contract: Contract, kind: str, base: bytes) -> Trained:
        if kind == "statistics":
            array = noised_sums(contract, agent.examples, agent.noise)
        else:
            array = local_baseline(contract, np.frombuffer(base, "<f8").copy(), agent.examples, agent.noise)
        return Trained(update=array.astype("<f4").tobytes(), noise=agent.noise.label, fingerprints=("1" * 64,))

    return give


def test_what_would_leave_is_what_left(ended: ClosedRun) -> None:
    agent = ended.federation.agent(1)
    contract = ended.federation.contract
    quoted = traffic(contract, contract.participant(agent.desk.participant))["out"]
    left: dict[str, list[int]] = {}
    for entry in agent.desk.store.egress():
        left.setdefault(entry.kind.value, []).append(entry.size)
    assert set(left) == {"update", "measurement", "countersignature", "request"}
    assert quoted["updates"] == pytest.approx(sum(left["update"]), rel=0.005)
    assert sum(quoted["measurements"].values()) == pytest.approx(sum(left["measurement"]), rel=0.005)
    assert quoted["countersignature"] == pytest.approx(sum(left["countersignature"]), rel=0.01)
    assert sum(left["request"]) == 0, "questions have no body"
    sent = sum(map(sum, left.values())) + quoted["signature"]
    assert quoted["total"] == pytest.approx(sent, rel=0.005)


def test_what_would_come_is_about_what_came(ended: ClosedRun) -> None:
    federation = ended.federation
    contract, me = federation.contract, federation.agent(1).desk.participant
    quoted = traffic(contract, contract.participant(me))["in"]
    node = next(n for n, a in federation.transport.agents.items() if a.desk.participant == me)
    came = [item for item in federation.transport.sent if item.node == node]
    assert quoted["models"] == sum(len(item.model) for item in came)
    assert quoted["orders_about"] == pytest.approx(sum(len(item.order) for item in came), rel=0.1)
    assert quoted["evidence_about"] == pytest.approx(sum(map(len, ended.files().values())), rel=0.2)
    assert model_digest(came[0].model) == contract.model.initial_digest


@pytest.mark.parametrize("parties", [2, 7])
def test_orders_and_evidence_grow_with_the_participants(tmp_path: Path, parties: int) -> None:
    federation = make_federation(tmp_path, [60] * parties, participation__minimum=2, participation__head_threshold=1)
    federation.run()
    contract = federation.contract
    quoted = traffic(contract, contract.participants[0])["in"]
    first = federation.transport.sent[0].node
    orders = [len(item.order) for item in federation.transport.sent if item.node == first]
    assert quoted["orders_about"] == pytest.approx(sum(orders), rel=0.12)


# The command, in a real agent's home


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    with lab(tmp_path) as at:
        monkeypatch.setattr(httpx.HTTPTransport, "handle_request", lambda _, request: at.wire.handle_request(request))
        monkeypatch.setenv("FEDPACT_AGENT_HOME", str(at.home.path))
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(quote, "MIN_DRAWS", 2)
        monkeypatch.setattr(quote, "MAX_DRAWS", 2)
        at.configure()
        at.enrol()
        at.approve()
        at.declare()
        yield at


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys, main, "fedpact-agent")


def test_a_contract_that_is_offered_is_quoted_from_the_card_alone(call: Run, made: Lab, tmp_path: Path) -> None:
    offered = made.offer()
    (made.home.path / "rows.csv").unlink()
    made.wire.sent.clear()
    kept = tmp_path / "kept.json"
    code, out, _ = call("quote", offered.id[:8], "--keep", kept, "--revenue", "1000000.00", "--json")
    assert code == 0
    found = json.loads(out)
    assert [path.split()[0] for path in made.wire.paths()] == ["GET", "GET"], "the list and the contract"
    assert found["contract"] == offered.id
    assert "no promise" in found["no_promise"]
    assert Contract.from_bytes(kept.read_bytes()) == offered
    share = found["share"]
    simulated = share["simulated"]["by_own_label_noise"]
    assert [part["label_noise"] for part in simulated] == ["0", "0.5"]
    for part in simulated:
        assert 0 <= D(part["low"]["share"]) <= D(part["mean"]) <= D(part["high"]["share"]) <= 1
        assert abs(part["low"]["fen"] - D(part["low"]["share"]) * 100_000_000) < 1_000_000
    made.wire.sent.clear()
    again = call("quote", kept, "--seconds", "0", "--json")
    assert again[0] == 0
    assert made.wire.sent == []
    assert json.loads(again[1])["share"]["not_simulated"] == "no simulation was asked for"
    assert json.loads(again[1])["privacy"] == found["privacy"]


def offered_file(made: Lab, folder: Path) -> Path:
    """A contract that is offered to us, as a file."""
    path = folder / "offered.json"
    path.write_bytes(made.offer().to_bytes())
    return path


def test_asking_changes_nothing_and_reads_no_row(
    call: Run, made: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = offered_file(made, tmp_path)

    def forbidden(*_: object) -> None:
        raise AssertionError("a quote reads no rows")

    monkeypatch.setattr(sources, "batches", forbidden)
    before = (made.store.rows("set-1"), made.store.egress(), made.store.contracts())
    code, out, err = call("quote", path)
    assert code == 0, err
    assert (made.store.rows("set-1"), made.store.egress(), made.store.contracts()) == before
    for words in ("no promise", "epsilon_pld", "PRIVACY", "BYTES", "TIME", "SHARE OF THE POOL", "our labels wrong"):
        assert words in out
    assert "The budget pays for it." in out
    asked = ("quote", path, "--seconds", "0", "--lang")
    english, chinese = (call(*asked, lang)[1].replace(offered_title(path), "") for lang in ("en", "zh"))
    figure = r"\b[0-9]+(?:\.[0-9]+)? (?:kB|B|MB)\b|[0-9]+\.[0-9]+ %"
    assert [*re.findall(figure, chinese, re.ASCII)] == [*re.findall(figure, english, re.ASCII)]
    assert not {"the", "of", "our", "and", "in", "for", "a"} & {*re.findall(r"\b[a-z]+\b", chinese, re.ASCII)}
    monkeypatch.setenv("FEDPACT_LANG", "zh")
    assert json.loads(call("quote", path, "--seconds", "0", "--json")[1])["no_promise"].startswith("This is")


def offered_title(path: object) -> str:
    return read_contract(Path(str(path)))[0].title


def test_epsilon_is_that_of_signing_and_a_signed_contract_needs_no_operator(call: Run, made: Lab) -> None:
    offered = made.offer()
    with made.client() as client:
        offer = fetch_offer(client, offered.id)
        found = review(made.home, made.home.config(), made.store, offer.contract, utc_now(), read_data=False)
        quoted = privacy_cost(made.home, made.home.config(), made.store, offered, made.home.participant_id)
        commit(made.home, made.store, client, found, PASSPHRASE)
    assert found.cost is not None
    told = cost_values(found.cost)
    assert {key: quoted[key] for key in told} == told
    assert quoted["left"] == str(D(told["limit"]) - D(told["after"]))
    made.wire.sent.clear()
    code, out, _ = call("quote", offered.id[:8], "--seconds", "0", "--json")
    assert (code, made.wire.sent) == (0, [])
    assert json.loads(out)["privacy"] == quoted, "its own plan counts once"


def test_a_budget_that_does_not_pay_exits_with_5(
    call: Run, made: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = offered_file(made, tmp_path)

    def full(*_: object) -> None:
        raise RefusedError("BUDGET_PLAN_EXCEEDED", "full")

    monkeypatch.setattr(reviewing, "check_budget", full)
    code, out, _ = call("quote", path, "--seconds", "0")
    assert code == 5
    assert "The budget does not pay for it" in out


def test_an_entity_clause_is_quoted(made: Lab) -> None:
    offered = made.offer()
    entity = {"column": "person", "max_rows": 2, "method": "mixture-of-gaussians", "epsilon": D(9), "delta": D("1e-5")}
    plain = offered.plain()
    plain["privacy"]["entity"] = entity
    found = privacy_cost(made.home, made.home.config(), made.store, Contract.parse(plain), made.home.participant_id)
    assert found["entity"]["max_rows"] == 2
    assert D(found["epsilon"]) < D(found["entity"]["epsilon"]) < 9, "worked out, not believed"


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "fast", "1e9"])
def test_a_rate_that_is_none_is_named(call: Run, made: Lab, rate: str) -> None:
    code, out, _ = call("quote", "3f2a", f"--mbit={rate}", "--json")
    assert (code, json.loads(out)["error"]["code"], json.loads(out)["error"]["field"]) == (2, "QUOTE_RATE", "--mbit")


def test_what_cannot_be_quoted_is_named(call: Run, made: Lab, tmp_path: Path) -> None:
    unknown = json.loads(call("quote", "ffff", "--json")[1])
    assert unknown["error"]["code"] == "CONTRACT_UNKNOWN"
    others = make_federation(tmp_path / "others", [60, 60, 60]).contract
    path = tmp_path / "others.json"
    path.write_bytes(others.to_bytes())
    code, out, _ = call("quote", path, "--json")
    assert (code, json.loads(out)["error"]["code"]) == (2, "CONTRACT_NOT_A_PARTY")
    code, out, _ = call("quote", path, "--keep", path, "--json")
    assert (code, json.loads(out)["error"]["code"]) == (2, "FILE_EXISTS")
    assert json.loads(out)["error"]["field"] == "--keep"
    code, out, _ = call("quote", path, "--revenue", "-5", "--json")
    assert (code, json.loads(out)["error"]["code"]) == (2, "MONEY_NEGATIVE")


def test_at_client_level_the_shares_are_exact_and_the_operators_sight_is_told(
    call: Run, made: Lab, tmp_path: Path
) -> None:
    from tests.support import agent_world

    path = tmp_path / "central.json"
    before = agent_world.TEMPLATE
    agent_world.TEMPLATE = central_toml(before)
    try:
        path.write_bytes(made.offer().to_bytes())
    finally:
        agent_world.TEMPLATE = before
    code, out, err = call("quote", path, "--json")
    assert code == 0, err
    share = json.loads(out)["share"]
    assert share["simulated"] is None
    assert share["not_simulated"] == "nothing is paid by contribution"
    assert share["bounds"]["low"] == share["bounds"]["high"] == share["share_by_rows"]["share"]
    assert "sees our updates without noise" in call("quote", path)[1]


# The share


def a_contract(tmp_path: Path, counts: list[int], **changes: Any) -> Contract:
    terms = {"settlement__contribution_weight": D("0.6"), "settlement__data_weight": D("0.3")}
    return make_federation(tmp_path, counts, **terms, settlement__equal_weight=D("0.1"), **changes).contract


def of(contract: Contract, number: int) -> Any:
    return next(p for p in contract.participants if p.name == f"Enterprise {number}")


def test_data_and_equality_are_exact_and_contribution_is_bounded(tmp_path: Path) -> None:
    contract = a_contract(tmp_path, [100, 300, 200])
    found = plausible_share(contract, of(contract, 1), Simulated(by_label_noise={}, why_not="no"), None)
    assert D(found["exact_parts"]["data"]) == D("0.05")
    assert D(found["exact_parts"]["equal"]) == D("0.033333333")
    assert D(found["contribution_by_rows"]) == D("0.1")
    assert D(found["share_by_rows"]["share"]) == D("0.183333333")
    assert (D(found["bounds"]["low"]), D(found["bounds"]["high"])) == (D("0.083333333"), D("0.683333333"))
    assert found["fallback"] == {"rule": "metered", "share": "0.166666667"}
    equal = contract.model_copy(update={"settlement": contract.settlement.model_copy(update={"fallback": "equal"})})
    assert plausible_share(equal, of(equal, 1), Simulated(by_label_noise={}, why_not="no"), None)["fallback"] == {
        "rule": "equal",
        "share": "0.333333333",
    }


def test_floors_and_fen_are_those_of_the_settlement(tmp_path: Path) -> None:
    contract = a_contract(tmp_path, [100, 300, 200])
    mine = of(contract, 1)
    floored = contract.model_copy(
        update={
            "participants": tuple(
                p.model_copy(update={"floor_fen": 50_000 if p.id == mine.id else 0}) for p in contract.participants
            )
        }
    )
    none = Simulated(by_label_noise={}, why_not="no")
    got = plausible_share(contract, mine, none, 100_000)["share_by_rows"]["fen"]
    assert got in (18_333, 18_334), "all three end in a third of a fen: the one left goes by fingerprint"
    assert plausible_share(floored, of(floored, 1), none, 100_000)["share_by_rows"]["fen"] == 50_000
    paid = [plausible_share(floored, p, none, 100_000)["share_by_rows"]["fen"] for p in floored.participants]
    assert sum(paid) == 100_000
    assert any("floors" in text for text in plausible_share(floored, of(floored, 2), none, None)["reasons"])


def test_the_range_is_that_of_the_draws(tmp_path: Path) -> None:
    contract = a_contract(tmp_path, [100, 300, 200])
    draws = [Share(share=Fraction(k, 10), fen=k, reason="reliable") for k in (3, 1, 2)]
    low = [Share(share=Fraction(1, 20), fen=1, reason="not-reliable")] * 3
    found = plausible_share(contract, of(contract, 1), Simulated(by_label_noise={0.0: draws, 0.5: low}), 10)
    right, wrong = found["simulated"]["by_own_label_noise"]
    assert (right["low"], right["mean"], right["high"]) == (
        {"share": "0.1", "fen": 1},
        "0.2",
        {"share": "0.3", "fen": 3},
    )
    assert (right["fallback_draws"], wrong["fallback_draws"]) == (0, 3)


def test_like_data_pay_by_rows_and_wrong_labels_cost(tmp_path: Path) -> None:
    """Mean of six draws with fixed noise: within 6 points of the part of the rows; half wrong labels cost a third."""
    contract = make_federation(tmp_path, [300, 100, 200], keys=fixed_keys(3), training__rounds=4).contract
    mine = of(contract, 1).id

    def shares(label_noise: float) -> list[float]:
        found = []
        for seed in range(6):
            draw = simulation.simulated_run(
                contract,
                mine,
                label_noise,
                noise=FixedNoise(seed),
                rng=np.random.default_rng(seed),
                in_time=lambda: True,
            )
            assert draw is not None
            assert abs(sum(draw.values.values()) - draw.total) < 10 * len(draw.values), "efficient, but for rounding"
            assert draw.total**2 > 4 * draw.variance
            found.append(float(draw.values[mine] / sum(draw.values.values())))
        return found

    assert np.mean(shares(0.0)) == pytest.approx(0.5, abs=0.06)
    assert np.mean(shares(0.5)) < 0.34


@pytest.mark.parametrize(
    "changes",
    [
        {"defences": {"clip": "median-signal", "wreckers": "reject", "negatives": "0.1", "dispute_hours": 72}},
        {
            "training__server_optimizer": {"kind": "adam", "beta_1": "0.9", "beta_2": "0.99", "tau": "0.1"},
            "training__server_rate": D("0.1"),
        },
        {
            "contribution__game": "re-normalised",
            "defences": {"clip": "median-signal", "wreckers": "report", "negatives": "0.1", "dispute_hours": 72},
        },
    ],
    ids=["clip", "adam", "re-normalised"],
)
def test_the_simulated_server_is_the_contracts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Its models are those that the operator's steps lead to, an update four times too large among them."""
    contract = make_federation(tmp_path, [90, 60, 70], training__rounds=2, **changes).contract
    mine, seen = contract.participants[0].id, []
    trained: list[tuple[np.ndarray, np.ndarray]] = []

    def training(contract: Contract, base: np.ndarray, rows: Any, noise: Any) -> np.ndarray:
        update = np.asarray(local_update(contract, base, rows, noise)) * np.float32(4 if len(rows) == 90 else 1)
        trained.append((base, update))
        return update

    def scored(*given: Any) -> np.ndarray:
        seen.append(given[2])
        return logits(*given)

    monkeypatch.setattr(simulation, "local_update", training)
    monkeypatch.setattr(simulation, "logits", scored)
    rng = np.random.default_rng(1)
    draw = simulation.simulated_run(contract, mine, 0.0, noise=FixedNoise(1), rng=rng, in_time=lambda: True)
    assert draw is not None
    ids, memory, model = list(contract.by_id()), START, trained[0][0]
    for k in (0, 3):
        assert np.array_equal(trained[k][0], model)
        updates = {p: update for p, (_, update) in zip(ids, trained[k : k + 3], strict=True)}
        made, memory = server_steps(contract, updates, memory)
        plain = apply(model, weighted_steps(updates, counts_of(contract), contract.training.server_rate).values())
        model = next_model(contract, model, made)
        assert not np.allclose(model, plain), "clip and optimizer move it"
    assert np.array_equal(seen[-1], model)


def counts_of(contract: Contract) -> dict[str, int]:
    return {p: party.num_examples for p, party in contract.by_id().items()}


def test_made_up_rows_are_as_encoded_ones(tmp_path: Path) -> None:
    contract = make_federation(tmp_path, [90, 60, 70]).contract
    rows = simulation._World(contract, np.random.default_rng(1)).rows(500, 0.5)
    scale = float(contract.data.feature_scale) / np.sqrt(feature_count(contract.data))
    assert np.abs(rows.x).max() <= scale * (1 + 1e-12)
    assert np.all(rows.x[:, -1] == scale)
    assert set(rows.y) == set(range(10))


def test_time_that_is_up_gives_no_range_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contract = make_federation(tmp_path, [90, 60, 70]).contract
    clock = iter(range(1000))
    monkeypatch.setattr(quote.time, "monotonic", lambda: next(clock))
    found = simulate(contract, contract.participants[0].id, 5, None)
    assert found.by_label_noise == {}
    assert "did not fit into 5 s" in found.why_not
    monkeypatch.setattr(simulation, "MAX_ELEMENTS", 100)
    assert "too many" in simulate(contract, contract.participants[0].id, 5, None).why_not


# Time


def test_time_is_the_plan_times_a_step(tmp_path: Path) -> None:
    contract = make_federation(tmp_path, [100, 300, 200], training__rounds=4, baseline={"steps": 5}).contract
    found = duration(contract, of(contract, 1), 0.5, 10_000_000, D(8), 2)
    assert found["steps"] == 4 * 6 + 5
    assert found["training_seconds"] == "14.5"
    assert found["spare_attempts_seconds"] == "3.0"
    assert found["transfer_seconds"] == "10.0"
    assert found["run_seconds"] == f"{4 * (6 * 0.5 * 3 + quote.ROUND_SECONDS) + 10:.1f}", "the largest sets the pace"
    assert found["longest_rounds_seconds"] == 4 * 30
    assert any("300 rows" in text for text in found["assumptions"])


@pytest.mark.parametrize("changes", [{}, CENTRAL], ids=["record level", "client level"])
def test_a_step_is_timed_on_rows_that_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    contract = make_federation(tmp_path, [90, 60, 70], **changes).contract
    seen: list[int] = []
    real = simulation.local_update

    def watched(given: Contract, base: Any, rows: Any, noise: Any) -> Any:
        assert given.training.local_steps == 1
        seen.append(len(rows))
        return real(given, base, rows, noise)

    monkeypatch.setattr(simulation, "local_update", watched)
    assert 0 < simulation.seconds_a_step(contract, of(contract, 1).id, SystemNoise()) < 60
    assert set(seen) == {90}
    monkeypatch.setattr(simulation, "MAX_ELEMENTS", 65 * 30)
    simulation.seconds_a_step(contract, of(contract, 1).id, SystemNoise())
    assert seen[-1] == 30


def test_the_agent_names_what_left(ended: ClosedRun) -> None:
    """The kinds that a quote counts are those that the ledger has, but for what is no part of one contract's run."""
    other = {EgressKind.ENROLMENT, EgressKind.CARD, EgressKind.REQUEST, EgressKind.REFUSAL, EgressKind.OBJECTION}
    other |= {EgressKind.STATEMENT}  # a person's answer, where an entry asks for one
    other |= {
        EgressKind.NOTICE,
        EgressKind.REVOCATION,
        EgressKind.RECEIPT,
        EgressKind.NO_REPLY,
    }  # pauses, leaving, faults
    counted = {EgressKind.UPDATE, EgressKind.MEASUREMENT, EgressKind.SIGNATURE, EgressKind.COUNTERSIGNATURE}
    assert set(EgressKind) == other | counted


def test_a_file_without_a_contract_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nothing.json"
    path.write_text("{}")
    with pytest.raises(InputError):
        quote.from_file(path)


def test_many_participants_open_no_more_than_the_coalitions_that_may_be_evaluated(tmp_path: Path) -> None:
    contract = make_federation(tmp_path, [90, 60, 70]).contract
    few = contract.contribution.model_copy(update={"max_coalitions": 2})
    sampled = contract.model_copy(update={"contribution": few})
    found = [traffic(c, c.participants[0])["in"]["evidence_about"] for c in (contract, sampled)]
    assert found[1] < found[0]
