"""The noise floor: pure, on real updates, and in a run, where a pool goes on after a crash."""

import math
from decimal import Decimal

import numpy as np
import pytest
import sqlalchemy as sa
from tests.support.federation import Federation, make_federation
from tests.support.weak_noise import Weak, WeakFixed, a_case, a_ratio

from fedpact_contract.contract import Contract
from fedpact_contract.evidence import unpack
from fedpact_contract.verify import verify
from fedpact_models.features import Examples
from fedpact_server import db, noise_floor, pool
from fedpact_server.evidence import evidence_files
from fedpact_server.noise_floor import CODE, NoiseFloor, energy_ratio, pool_size, pooled


def floor(degrees: int, kept: float = 1.0) -> float:
    return NoiseFloor(updates=1, degrees=degrees, ratio=1.0, kept=kept).floor


def test_the_floor_leaves_four_deviations() -> None:
    """1 - 4 sqrt(2/d), less what the gradients may pull back."""
    assert floor(8450) == pytest.approx(0.93846, abs=1e-5)
    assert floor(650) == pytest.approx(0.77812, abs=1e-5)
    assert floor(650, kept=0.9) == pytest.approx(0.67812, abs=1e-5)


@pytest.mark.parametrize("kept", [1.0, 0.9, 0.5, 0.3])
def test_there_is_power_from_where_half_the_noise_is_found(kept) -> None:
    def upper(degrees: float) -> float:
        """What a quarter of the energy is above with probability exp(-8) at most."""
        spread = math.sqrt(8 / degrees)
        return (1 + 2 * spread + 2 * spread**2) / 4

    degrees = math.ceil(noise_floor.power_at(kept))
    assert upper(degrees) <= floor(degrees, kept)
    assert upper(degrees - 1) > floor(degrees - 1, kept), "no more is asked for than it takes"
    assert noise_floor.power_at(0.25) == noise_floor.power_at(0.1) == math.inf


def contract_of(parameters: int, **training: object) -> Contract:
    """Two classes, so many weights."""
    terms = {"learning_rate": Decimal("0.001"), "local_steps": 6, "rounds": 200} | training
    return a_case(parameters // 2 - 1, (), 2, rows=50, training=terms)[0]


@pytest.mark.parametrize(("parameters", "size"), [(4, 25), (22, 5), (98, 2), (100, 1), (650, 1)])
def test_as_many_updates_are_pooled_as_have_power(parameters, size) -> None:
    contract = contract_of(parameters)
    assert pool_size(contract, parameters) == size
    assert pooled([0.0] * size, contract, parameters).outcome == "failed"
    assert pooled([1.0] * size, contract, parameters).outcome == "passed"
    if size > 1:
        assert pooled([0.0] * (size - 1), contract, parameters).outcome == "no power"


def test_where_the_gradients_may_pull_everything_back_there_is_no_power() -> None:
    contract = contract_of(22, learning_rate=Decimal(64), local_steps=20)
    assert noise_floor.kept(contract, 22) == 1 / 20, "the last step's noise stays"
    assert pool_size(contract, 22) == 200
    assert pooled([0.0] * 200, contract, 22).outcome == "no power"
    assert noise_floor.kept(contract_of(22, learning_rate=Decimal("1e-30")), 22) == 1


def test_what_is_kept_is_less_the_more_steps_answer() -> None:
    """A step alone answers nothing; the sum is the closed form's."""
    found = [noise_floor.kept(contract_of(22, local_steps=t, learning_rate=Decimal(1)), 22) for t in (1, 2, 6)]
    c = 0.5 * 4 / 22
    assert found == pytest.approx([sum((1 - c) ** (2 * k) for k in range(t)) / t for t in (1, 2, 6)])
    assert found[0] == 1


def test_a_pool_is_judged_by_its_mean() -> None:
    contract = contract_of(100)
    found = pooled([0.1, 0.9], contract, 100)
    assert (found.updates, found.degrees, found.ratio, found.outcome) == (2, 200, 0.5, "failed")
    assert found.plain() == {"outcome": "failed", "updates": 2, "ratio": "0.5000", "floor": "0.5999"}
    told = {"outcome": "no power", "updates": 1, "ratio": "0.1000", "floor": None}
    assert pooled([0.1], contract_of(10), 10).plain() == told


def test_noise_alone_falls_below_it_hardly_ever_and_half_of_it_always() -> None:
    rng = np.random.default_rng(0)
    for parameters in (22, 650, 2114):
        contract = contract_of(parameters)
        size = pool_size(contract, parameters)
        for energies in rng.chisquare(parameters, (1000, size)) / parameters:
            assert pooled(list(energies), contract, parameters).outcome == "passed"
            assert pooled(list(energies / 4), contract, parameters).outcome == "failed"


def test_of_noise_alone_the_ratio_is_one() -> None:
    """Features of zero: no gradient."""
    contract, base, examples = a_case(64, (), 10)
    nothing = Examples(x=examples.x * 0, y=examples.y)
    assert a_ratio((contract, base, nothing), Weak(1.0)) == pytest.approx(1.0, abs=0.25)
    assert a_ratio((contract, base, nothing), Weak(0.5)) == pytest.approx(0.25, abs=0.07)
    assert energy_ratio(np.zeros(650), contract, len(examples)) == 0


CASES = {650: (64, (), 10), 2114: (30, (64,), 2), 8450: (30, (256,), 2)}


@pytest.mark.parametrize(
    ("parameters", "factor", "outcome"),
    [
        (8450, 0.9, "failed"),
        (8450, 1.0, "passed"),
        (2114, 0.5, "failed"),
        (2114, 1.0, "passed"),
        (650, 0.25, "failed"),
        (650, 0.0, "failed"),
        (650, 1.0, "passed"),
    ],
)
def test_real_updates(parameters, factor, outcome) -> None:
    """Four draws of each; hundreds are drawn in the benchmark."""
    case = a_case(*CASES[parameters])
    assert len(case[1]) == parameters
    ratios = [a_ratio(case, WeakFixed(seed, factor)) for seed in range(4)]
    assert {pooled([ratio], case[0], parameters).outcome for ratio in ratios} == {outcome}, ratios


# In a run


def weak(factors: dict[int, float]):
    return lambda index: WeakFixed(index, factors.get(index, 1.0))


def test_an_update_without_its_noise_is_rejected_kept_and_the_run_goes_on(tmp_path) -> None:
    federation = make_federation(tmp_path, noise=weak({1: 0.0, 2: 0.25}))
    assert federation.run() == "stopped", "two of four are left, and the minimum is three"
    assert federation.outcomes(1)["Enterprise 2"] == federation.outcomes(1)["Enterprise 3"] == ("rejected", CODE)
    assert federation.outcomes(1)["Enterprise 1"] == ("admitted", "ADMITTED")
    with federation.database.read() as connection:
        digests = connection.execute(sa.select(db.outcomes.c.update_digest).where(db.outcomes.c.code == CODE)).scalars()
        kept = [pool.load_update(federation.loop().context.arrays, digest) for digest in digests]
        files = {n: text.encode() for n, text in evidence_files(connection, federation.contract.id).items()}
        result = verify(unpack(files), None, privacy=False)
    assert len(kept) == 2
    assert {fault["code"] for fault in result.faults} <= {"UPDATE_MISMATCH"}, "the noise is a test's, and nothing else"


def small(folder, factors: dict[int, float]) -> Federation:
    """22 parameters, labels that nothing predicts: five updates have power together."""
    rng = np.random.default_rng(3)

    def rows(count: int) -> Examples:
        x = np.column_stack([rng.uniform(-1, 1, (count, 10)), np.ones(count)]) * (2 / 11**0.5)
        return Examples(x=x, y=rng.integers(0, 2, count))

    counts = [90, 60, 70, 80]
    column = {"kind": "number", "low": 0, "high": 1, "missing": "refuse"}
    return make_federation(
        folder,
        counts,
        data=([rows(n) for n in counts], rows(60)),
        noise=weak(factors),
        base=np.zeros(22),
        data__columns=[{"name": f"f{i}", **column} for i in range(10)],
        data__label={"name": "y", "classes": ["0", "1"], "rule": "value"},
        training__rounds=7,
        training__learning_rate="0.05",
    )


def test_a_small_model_s_updates_are_pooled_over_rounds_and_crashes(tmp_path, monkeypatch) -> None:
    federation = small(tmp_path, {1: 0.25})
    monkeypatch.setattr("fedpact_server.rounds.RESEND_SECONDS", 0.0)

    class CrashError(Exception):
        pass

    import fedpact_server.rounds as rounds

    whole, ended = rounds.set_phase, []

    def crash(connection, contract_id, number, name):
        whole(connection, contract_id, number, name)
        if (number, name) == (4, "admitted") and not ended:
            ended.append(name)
            raise CrashError

    monkeypatch.setattr(rounds, "set_phase", crash)
    with pytest.raises(CrashError):
        federation.run()
    federation.take_over("2")
    with federation.database.read() as connection:
        arrays = federation.loop(driver="2").context.arrays
        before = pool.standing(connection, federation.contract, arrays)
    assert {(floor.outcome, floor.updates) for floor in before.values()} == {("no power", 4)}
    assert federation.run(driver="2") == "completed"
    codes = [federation.outcomes(number)["Enterprise 2"][1] for number in range(1, 8)]
    assert codes == ["ADMITTED"] * 4 + [CODE] * 3
    others = {federation.outcomes(n)[f"Enterprise {i}"] for n in range(1, 8) for i in (1, 3, 4)}
    assert others == {("admitted", "ADMITTED")}
    with federation.database.read() as connection:
        after = pool.standing(connection, federation.contract, arrays)
    weak_one = federation.agent(2).desk.participant
    assert {p: floor.outcome for p, floor in after.items()} == dict.fromkeys(before, "passed") | {weak_one: "failed"}
    assert after[weak_one].updates == 5, "rejected updates are in the pool: who mends its noise comes back"


def test_a_participant_that_mends_its_noise_comes_back(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("fedpact_server.rounds.RESEND_SECONDS", 0.0)
    federation = make_federation(tmp_path, noise=weak({1: 0.25}))
    agent = federation.agent(2)

    def mend(ready):
        agent.noise.factor = 1.0
        return ready.reply, ready.array

    agent.tamper = mend
    assert federation.run() == "completed"
    assert [federation.outcomes(n)["Enterprise 2"][1] for n in (1, 2, 3)] == [CODE, "ADMITTED", "ADMITTED"]


def test_a_refusal_with_the_code_of_an_update_is_in_no_pool(tmp_path) -> None:
    """Its code is whatever its sender writes."""
    federation = small(tmp_path, {})
    federation.run()
    weak_one, arrays = federation.agent(2).desk.participant, federation.loop().context.arrays
    with federation.database.write() as connection:
        of_round = (db.outcomes.c.participant == weak_one, db.outcomes.c.round == 7)
        connection.execute(db.outcomes.update().where(*of_round).values(kind="refused", update_digest=None))
    with federation.database.read() as connection:
        found = pool.ratios(connection, federation.contract, arrays, weak_one, 7)
    assert len(found) == 6


def test_lost_files_are_left_out_of_what_is_shown(tmp_path) -> None:
    federation = make_federation(tmp_path)
    federation.run()
    arrays = federation.loop().context.arrays
    with federation.database.read() as connection:
        assert len(pool.standing(connection, federation.contract, arrays)) == 4
        for path in arrays.glob("*.f4"):
            path.unlink()
        assert pool.standing(connection, federation.contract, arrays) == {}
