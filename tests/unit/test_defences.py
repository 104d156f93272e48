"""The defences in the round loop: clips, findings behind commitments, exclusions, unions; and what verify finds."""

from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from tests.support.federation import Federation, fixed_keys, make_federation, set_clocks
from tests.support.findings import alarm, say

from fedpact_contract.clipping import contract_factors
from fedpact_contract.contribution import round_values
from fedpact_contract.errors import FailedError, FaultError, InputError
from fedpact_contract.keys import fingerprint, public_hex
from fedpact_contract.log import (
    Body,
    Entry,
    Findings,
    FindingsOpened,
    ParticipantExcluded,
    ParticipantReadmitted,
    RoundAggregated,
    RoundDiscarded,
    RoundOpened,
    RunCompleted,
    ScoresCommitted,
    ScoresOpened,
    UnionConfirmed,
    UnionDeclared,
    UnionWithdrawn,
    commitment,
)
from fedpact_contract.looks import refuted
from fedpact_contract.replay import replay
from fedpact_contract.request import instant, utc_now
from fedpact_contract.shape import parameter_count
from fedpact_contract.unions import own_slices
from fedpact_models import aggregation
from fedpact_models.registry import parameter_count as built
from fedpact_server import closing, logbook, scoring

CLAUSE: dict[str, Any] = {
    "clip": "median-signal",
    "wreckers": "reject",
    "negatives": Decimal("0.1"),
    "dispute_hours": 72,
}


def federation(tmp_path, **changes: Any) -> Federation:
    return make_federation(tmp_path, **({"defences": CLAUSE} | changes))


def bodies(fed: Federation, kind: type[Body]) -> list[Any]:
    return [entry.open() for entry in fed.entries() if entry.type == kind.TYPE]


def settle(fed: Federation) -> None:
    with fed.database.write() as connection:
        closing.settle(connection, fed.contract, fed.operator_run_key, 1_000_000, 0)


def faults(fed: Federation, change: Callable[[list[Body]], list[Body]] = lambda found: found) -> set[str]:
    """Codes of what a replay finds in these bodies; beside the noise of tests, and heads of another log."""
    changed = change([entry.open() for entry in fed.entries()])
    found = replay([Entry.of(body) for body in changed]).faults
    return {f.code for f in found} - {"HEAD_ROOT", "HEAD_TIME"} - {f.code for f in found if f.rule == "noise"}


def boosted(factor: float) -> Callable[[Any], tuple[bytes, bytes]]:
    """An agent that sends `factor` times its update, signed anew."""
    from fedpact_contract.arrays import update_digest
    from fedpact_contract.messages import Reply, Update
    from fedpact_contract.record import sign

    def tamper(ready: Any, key: Any) -> tuple[bytes, bytes]:
        reply = Reply.from_bytes(ready.reply)
        array = (np.frombuffer(ready.array, "<f4") * np.float32(factor)).astype("<f4").tobytes()
        update = Update.from_bytes(reply.update.body).model_copy(update={"update_digest": update_digest(array)})
        return Reply(update=sign(update, key), countersignature=reply.countersignature).to_bytes(), array

    return tamper


def boost(fed: Federation, number: int, factor: float) -> str:
    agent, change = fed.agent(number), boosted(factor)
    agent.tamper = lambda ready: change(ready, agent.desk.run_key)
    return agent.desk.participant


@pytest.fixture
def loose(monkeypatch) -> None:
    """The noise floor and the norm bound are other defences: here they let everything through."""
    monkeypatch.setattr("fedpact_server.admission.norm_bound", lambda *_: 1e9)


def test_the_contract_counts_the_parameters_that_the_model_has(tmp_path) -> None:
    contract = make_federation(tmp_path).contract
    for hidden in ((), (7,), (5, 3)):
        model = contract.model.model_copy(update={"kind": "mlp" if hidden else "softmax", "hidden": hidden})
        assert parameter_count(model, contract.data) == built(model, contract.data)


def test_an_honest_run_counts_whole_updates_and_commits_to_its_findings_every_round(tmp_path) -> None:
    fed = federation(tmp_path)
    assert fed.run() == "completed"
    for aggregated in bodies(fed, RoundAggregated):
        assert [clip.factor for clip in aggregated.clips] == [1] * 4
        assert all(clip.energy > 0 for clip in aggregated.clips)
    assert [body.findings is not None for body in bodies(fed, ScoresCommitted)] == [True] * 3
    assert not bodies(fed, FindingsOpened), "nothing of them is told before the close"
    settle(fed)
    opened = bodies(fed, FindingsOpened)
    assert [body.round for body in opened] == [1, 2, 3]
    assert {line.code for line in opened[2].findings.lines} >= {"SIGNAL_ENERGY", "NEAR_COPY", "WRECKER", "NEGATIVES"}
    assert faults(fed) == set()


def test_a_boosted_update_counts_as_much_as_the_median_ones(tmp_path, loose) -> None:
    fed = federation(tmp_path, training__rounds=1)
    attacker = boost(fed, 1, 4.0)
    assert fed.run() == "completed"
    first = bodies(fed, RoundAggregated)[0]
    place = first.admitted.index(attacker)
    factors = [clip.factor for clip in first.clips]
    assert factors[place] < Decimal("0.9")
    energies = {p: clip.energy for p, clip in zip(first.admitted, first.clips, strict=True)}
    assert dict(zip(first.admitted, factors, strict=True)) == contract_factors(fed.contract, energies)
    counted = {p: float(energies[p]) * float(factors[first.admitted.index(p)]) ** 2 for p in energies}
    middle = float(np.median([energy for p, energy in counted.items() if p != attacker]))
    assert energies[attacker] > 10 * middle
    assert counted[attacker] < 2 * middle, "at most as much signal, beside noise that is scaled with it"


def test_clipped_updates_enter_the_model_and_the_scores_alike(tmp_path, loose) -> None:
    contract = federation(tmp_path).contract
    ids = list(contract.by_id())
    rng = np.random.default_rng(0)
    updates = {p: rng.normal(size=650).astype("<f4") for p in ids}
    updates[ids[2]] *= np.float32(100)
    made = aggregation.clips(contract, updates)
    assert made is not None
    factors = dict(zip(ids, (clip.factor for clip in made), strict=True))
    assert factors[ids[2]] < Decimal("0.2")
    steps, _ = aggregation.server_steps(contract, updates, aggregation.START)
    total = sum(p.num_examples for p in contract.participants)
    for p in ids:
        weight = contract.participant(p).num_examples / total
        assert np.allclose(steps[p], updates[p].astype(float) * float(factors[p]) * weight, rtol=1e-12)
    plain = contract.model_copy(update={"defences": None})
    assert aggregation.clips(plain, updates) is None


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda body: body.model_copy(update={"clips": None}), "CLIP_MISSING"),
        (lambda body: body.model_copy(update={"clips": body.clips[:-1]}), "CLIP_MISSING"),
        (
            lambda body: body.model_copy(
                update={"clips": (body.clips[0].model_copy(update={"factor": Decimal("0.5")}), *body.clips[1:])}
            ),
            "CLIP_FACTOR",
        ),
    ],
)
def test_verify_finds_clips_that_do_not_follow_from_the_energies(tmp_path, change, code) -> None:
    fed = federation(tmp_path, training__rounds=1)
    fed.run()
    assert code in faults(fed, lambda found: [change(b) if isinstance(b, RoundAggregated) else b for b in found])


def test_verify_finds_findings_that_were_not_committed_to(tmp_path) -> None:
    fed = federation(tmp_path, training__rounds=1)
    fed.run()
    settle(fed)

    def without_opening(found: list[Body]) -> list[Body]:
        return [body for body in found if not isinstance(body, FindingsOpened)]

    def changed(found: list[Body]) -> list[Body]:
        return [
            body.model_copy(update={"findings": Findings(round=1, lines=())})
            if isinstance(body, FindingsOpened)
            else body
            for body in found
        ]

    def uncommitted(found: list[Body]) -> list[Body]:
        return [
            body.model_copy(update={"findings": None}) if isinstance(body, ScoresCommitted) else body for body in found
        ]

    def twice(found: list[Body]) -> list[Body]:
        return [b for body in found for b in ([body, body] if isinstance(body, FindingsOpened) else [body])]

    assert "FINDINGS_NOT_OPENED" in faults(fed, without_opening)
    assert "FINDINGS_COMMITMENT" in faults(fed, changed)
    assert "FINDINGS_NOT_COMMITTED" in faults(fed, uncommitted)
    assert "FINDINGS_OPENED_TWICE" in faults(fed, twice)


def test_a_wrecker_is_invited_no_more_until_it_is_readmitted(tmp_path, monkeypatch) -> None:
    fed = federation(tmp_path, training__rounds=4)
    bad = fed.agent(2).desk.participant
    say(monkeypatch, lambda number: [alarm("WRECKER", number, bad)] if number == 2 else [])

    assert fed.run() == "completed"
    out = bodies(fed, ParticipantExcluded)
    assert [(body.round, body.participant) for body in out] == [(2, bad)]
    assert [bad in body.invited for body in bodies(fed, RoundOpened)] == [True, True, False, False]
    settle(fed)
    assert faults(fed) == set()

    def invited_all_the_same(found: list[Body]) -> list[Body]:
        return [
            body.model_copy(update={"invited": tuple(sorted({*body.invited, bad}))})
            if isinstance(body, RoundOpened) and body.round == 3
            else body
            for body in found
        ]

    def not_excluded(found: list[Body]) -> list[Body]:
        return [body for body in found if not isinstance(body, ParticipantExcluded)]

    def another(found: list[Body]) -> list[Body]:
        other = fed.agent(1).desk.participant
        return [
            body.model_copy(update={"participant": other}) if isinstance(body, ParticipantExcluded) else body
            for body in found
        ]

    def readmitted(found: list[Body]) -> list[Body]:
        place = next(i for i, body in enumerate(found) if isinstance(body, ParticipantExcluded))
        return [
            *found[: place + 1],
            ParticipantReadmitted(participant=bad, reason="labels mended"),
            *found[place + 1 :],
        ]

    assert "INVITED_EXCLUDED" in faults(fed, invited_all_the_same)
    assert "EXCLUSION_MISSING" in faults(fed, not_excluded)
    assert {"EXCLUSION_MISSING", "EXCLUSION_UNFOUNDED", "INVITED_EXCLUDED"} <= faults(fed, another)
    assert faults(fed, readmitted) == set(), "whoever is readmitted need not be invited at once"
    assert "INVITED_EXCLUDED" not in faults(fed, lambda found: invited_all_the_same(readmitted(found)))
    assert "READMISSION" in faults(fed, lambda found: readmitted(readmitted(found)))


def test_where_the_contract_only_reports_nobody_is_excluded(tmp_path, monkeypatch) -> None:
    fed = federation(tmp_path, training__rounds=3, defences=CLAUSE | {"wreckers": "report"})
    bad = fed.agent(2).desk.participant
    say(monkeypatch, lambda number: [alarm("WRECKER", number, bad)])
    assert fed.run() == "completed"
    assert not bodies(fed, ParticipantExcluded)
    settle(fed)
    assert faults(fed) == set()


def test_a_run_that_excludes_too_many_stops(tmp_path, monkeypatch) -> None:
    fed = federation(tmp_path, training__rounds=4)
    who = sorted(agent.desk.participant for agent in fed.agents.values())
    say(monkeypatch, lambda number: [alarm("WRECKER", number, who[number])])
    assert fed.run() == "superseded"
    with fed.database.read() as connection:
        assert len(bodies(fed, ParticipantExcluded)) == 2
        assert logbook.count_of(connection, fed.contract.id, RoundOpened.TYPE) == 2


def unite(fed: Federation, members: tuple[str, ...], number: int = 1, **changes: Any) -> None:
    """Declare and confirm a union."""
    declared = UnionDeclared(
        round=number,
        members=members,
        declared=instant(utc_now()),
        until=instant(utc_now() + timedelta(hours=72)),
        reason="one warehouse",
    )
    confirmed = UnionConfirmed(members=members, at=instant(utc_now() + timedelta(hours=73)))
    with fed.database.write() as connection:
        logbook.append(connection, fed.contract.id, [declared.model_copy(update=changes), confirmed])


def run_with_union(fed: Federation, monkeypatch, members: tuple[str, ...]) -> None:
    """A run after whose first round these are united."""
    say(monkeypatch, lambda number: [alarm("NEAR_COPY", number, *members)] if number == 1 else [])
    whole = type(fed.loop())._commit

    def commit(self: Any, current: Any) -> None:
        if int(current.round) == 1:
            unite(fed, members)
            self.now = lambda: utc_now() + timedelta(hours=74)
            set_clocks(fed.agents, self.now)
        whole(self, current)

    monkeypatch.setattr("fedpact_server.rounds.Loop._commit", commit)
    assert fed.run() == "completed"


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
@pytest.mark.parametrize("momentum", [False, True])
def test_a_union_counts_once_from_the_next_round_on(tmp_path, monkeypatch, estimator, momentum) -> None:
    counts = [60] * 5
    changes: dict[str, Any] = {"settlement__contribution_weight": Decimal("0.6")}
    changes |= {"settlement__data_weight": Decimal("0.3"), "settlement__equal_weight": Decimal("0.1")}
    if estimator == "sampled":
        changes |= {"contribution__estimator": "sampled", "contribution__max_coalitions": 26}
    if momentum:
        changes |= {
            "training__server_optimizer": {"kind": "adam", "beta_1": "0.9", "beta_2": "0.99", "tau": "0.1"},
            "training__server_rate": Decimal("0.05"),
        }
    fed = federation(tmp_path, counts=counts, **changes)
    members = tuple(sorted(fed.agent(k).desk.participant for k in (1, 2)))
    run_with_union(fed, monkeypatch, members)
    settle(fed)
    assert faults(fed) == set()
    rounds = [body.scores for body in bodies(fed, ScoresOpened)]
    assert [scores.unions for scores in rounds] == [None, (members,), (members,)]
    for scores in rounds:
        values = round_values(scores, fed.contract)
        fall = sum(scores.losses[0]) - sum(scores.losses[-1])
        assert sum(values.values()) == Fraction(fall, 220), "efficiency, to the integer"
    from fedpact_contract.report import settled

    result = settled([entry.open() for entry in fed.entries()], fed.contract)
    assert result is not None
    counted = {line.participant: line.share.counted for line in result.lines}
    alone = next(c for p, c in counted.items() if p not in members)
    assert (alone.rows, alone.rounds) == (180, 3)
    assert all((counted[p].rows, counted[p].rounds) == (60 + 30 + 30, 2) for p in members)

    def not_named(found: list[Body]) -> list[Body]:
        return [
            body.model_copy(update={"scores": body.scores.model_copy(update={"unions": None})})
            if isinstance(body, ScoresOpened)
            else body
            for body in found
        ]

    assert "SCORES_UNIONS" in faults(fed, not_named)


def test_nobody_is_scored_on_rows_that_who_is_one_with_it_gave(tmp_path, monkeypatch) -> None:
    keys = fixed_keys(5)
    one, two = (fingerprint(public_hex(key)) for key in keys[:2])
    slices = [{"source": "operator", "count": 120}, {"source": one, "count": 60}, {"source": two, "count": 40}]
    probe = make_federation(tmp_path / "probe", keys=keys, counts=[60] * 5)
    validation = {"root": probe.contract.contribution.validation.root, "slices": slices}
    fed = federation(tmp_path / "run", keys=keys, counts=[60] * 5, contribution__validation=validation)
    run_with_union(fed, monkeypatch, tuple(sorted((one, two))))
    settle(fed)
    assert faults(fed) == set()
    rounds = [body.scores for body in bodies(fed, ScoresOpened)]
    at = {"operator": range(120), one: range(120, 180), two: range(180, 220)}
    for scores in rounds:
        rows = scoring.read_values(fed.home / "arrays" / fed.contract.id, fed.contract, scores)
        found = round_values(scores, fed.contract)
        for player, own in zip(scores.players, rows, strict=True):
            mine = {one, two} if scores.unions and player in (one, two) else {player}
            for source, place in at.items():
                assert bool(own[place].any()) == (source not in mine), (scores.round, player, source)
            assert float(found[player]) / 1e9 == pytest.approx(own.mean(), abs=1e-8), "what is paid by"


def test_where_all_rows_are_a_unions_its_members_are_scored_on_each_others(tmp_path) -> None:
    contract = make_federation(tmp_path).contract
    first, second, third = list(contract.by_id())[:3]
    parts = [{"source": first, "count": 100}, {"source": second, "count": 120}]
    validation = contract.contribution.validation
    slices = tuple(type(validation.slices[0]).model_validate(part) for part in parts)
    terms = contract.contribution.model_copy(update={"validation": validation.model_copy(update={"slices": slices})})
    changed = contract.model_copy(update={"contribution": terms})
    players = [first, second, third]
    assert own_slices(changed, players) == ((0,), (1,), ())
    assert own_slices(changed, players, [(first, second)]) == ((0,), (1,), ())
    assert own_slices(changed, players, [(first, third)]) == ((0,), (1,), (0,))
    assert own_slices(changed, [second, third], [(first, third)]) == ((1,), ()), "a union of those that take part"


def test_a_run_with_a_union_is_taken_up_again_after_a_crash(tmp_path, monkeypatch) -> None:
    """What the server remembers is worked out again, unions and clips among it: the same model."""
    optimizer = {"kind": "adam", "beta_1": "0.9", "beta_2": "0.99", "tau": "0.1"}
    fed = federation(tmp_path, counts=[60] * 4, training__server_optimizer=optimizer, training__server_rate="0.05")
    members = tuple(sorted(fed.agent(k).desk.participant for k in (1, 2)))
    run_with_union(fed, monkeypatch, members)
    last = bodies(fed, RoundAggregated)[-1]
    fresh = fed.loop()
    with fed.database.read() as connection:
        admitted = fresh._admitted(connection, 3)
    digest, _ = fresh._next_model(3, bodies(fed, RoundAggregated)[-2].model_digest, admitted)
    assert digest == last.model_digest


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"until": instant(utc_now() + timedelta(hours=71))}, "UNION_WINDOW"),
        ({"round": 9}, "UNION_TIME"),
        ({"members": ("f" * 64, "e" * 64)}, "UNION_MEMBERS"),
    ],
)
def test_verify_finds_a_union_that_the_contract_does_not_allow(tmp_path, monkeypatch, change, code) -> None:
    fed = federation(tmp_path, counts=[60] * 4)
    members = tuple(sorted(fed.agent(k).desk.participant for k in (1, 2)))
    run_with_union(fed, monkeypatch, members)
    settle(fed)
    assert code in faults(
        fed, lambda found: [b.model_copy(update=change) if isinstance(b, UnionDeclared) else b for b in found]
    )


def test_verify_finds_a_union_that_is_not_declared_disputed_or_founded(tmp_path, monkeypatch) -> None:
    fed = federation(tmp_path, counts=[60] * 4)
    members = tuple(sorted(fed.agent(k).desk.participant for k in (1, 2)))
    run_with_union(fed, monkeypatch, members)
    settle(fed)

    def early(found: list[Body]) -> list[Body]:
        return [b.model_copy(update={"at": instant(utc_now())}) if isinstance(b, UnionConfirmed) else b for b in found]

    def not_declared(found: list[Body]) -> list[Body]:
        return [b for b in found if not isinstance(b, UnionDeclared)]

    def withdrawn(found: list[Body]) -> list[Body]:
        gone = UnionWithdrawn(members=members, reason="two warehouses")
        return [x for b in found for x in ([b, gone] if isinstance(b, UnionConfirmed) else [b])]

    assert "UNION_WINDOW" in faults(fed, early)
    assert "UNION_NOT_DECLARED" in faults(fed, not_declared)
    assert "SCORES_UNIONS" in faults(fed, withdrawn), "then the rounds after it have no union"

    def backdated(found: list[Body]) -> list[Body]:
        long_ago = {"declared": "2016-01-01T00:00:00Z", "until": "2016-02-01T00:00:00Z"}
        return [b.model_copy(update=long_ago) if isinstance(b, UnionDeclared) else b for b in found]

    def later(found: list[Body]) -> list[Body]:
        at = instant(utc_now() + timedelta(hours=100))
        return [b.model_copy(update={"at": at}) if isinstance(b, UnionConfirmed) else b for b in found]

    assert "UNION_TIME" in faults(fed, backdated), "before the round that it follows was opened"
    assert "UNION_TIME" in faults(fed, later), "and the next round, which counts it, was opened before"


@pytest.mark.parametrize("part", ["0", "1", "-0.1"])
def test_the_part_of_negatives_is_a_part(tmp_path, part) -> None:
    with pytest.raises(InputError) as caught:
        federation(tmp_path, defences=CLAUSE | {"negatives": Decimal(part)})
    assert (caught.value.code, caught.value.field) == ("CONTRACT_NEGATIVES", "defences.negatives")


@pytest.mark.parametrize(("part", "stands"), [("0", True), ("0.999", True), ("1", False), ("-0.01", False)])
def test_the_part_of_copies_is_a_part(tmp_path, part: str, stands: bool) -> None:
    clause = CLAUSE | {"max_duplicates": Decimal(part)}
    if stands:
        assert federation(tmp_path, defences=clause).contract.defences.max_duplicates == Decimal(part)
        return
    with pytest.raises(InputError) as caught:
        federation(tmp_path, defences=clause)
    assert (caught.value.code, caught.value.field) == ("CONTRACT_DUPLICATES", "defences.max_duplicates")


def test_kept_findings_that_changed_are_not_opened(tmp_path) -> None:
    fed = federation(tmp_path, training__rounds=1)
    fed.run()
    from fedpact_server import db

    with fed.database.write() as connection:
        table = db.openings
        connection.execute(table.update().where(table.c.name == "findings:1").values(salt=bytes(32)))
    with pytest.raises(FaultError, match="findings of round 1"):
        settle(fed)


NO_LOSS = FailedError("EVALUATION_NOT_FINITE", "A loss on the validation set is not a finite number.")
NO_WEIGHT = InputError("WEIGHTS_NOT_FINITE", "A weight is not a finite number.")


@pytest.mark.parametrize(("at", "error"), [(1, NO_LOSS), (2, NO_LOSS), (3, NO_LOSS), (2, NO_WEIGHT)])
def test_a_round_whose_losses_are_no_numbers_has_an_entry_and_no_scores(tmp_path, monkeypatch, at, error) -> None:
    """Never a default value: the run ends at the model before, and what was scored is settled."""
    fed = federation(tmp_path)
    honest = scoring.score_round

    def failing(contract: Any, number: int, *rest: Any) -> Any:
        if number == at:
            raise error
        return honest(contract, number, *rest)

    monkeypatch.setattr(scoring, "score_round", failing)
    assert fed.run() == "stopped"
    assert [(body.round, body.code) for body in bodies(fed, RoundDiscarded)] == [(at, "EVALUATION_NOT_FINITE")]
    assert [body.round for body in bodies(fed, ScoresCommitted)] == list(range(1, at))
    if at == 1:
        assert not bodies(fed, RunCompleted), "there is nothing to deliver"
        return
    (ended,) = bodies(fed, RunCompleted)
    assert (ended.rounds, ended.model_digest) == (at - 1, bodies(fed, RoundAggregated)[at - 2].model_digest)
    settle(fed)
    assert faults(fed) == set()

    def kept(found: list[Body]) -> list[Body]:
        return [body for body in found if not isinstance(body, RoundDiscarded)]

    def another(found: list[Body]) -> list[Body]:
        return [body.model_copy(update={"round": 1}) if isinstance(body, RoundDiscarded) else body for body in found]

    def disliked(found: list[Body]) -> list[Body]:
        return [
            body.model_copy(update={"code": "DULL"}) if isinstance(body, RoundDiscarded) else body for body in found
        ]

    assert "DISCARDED_REASON" in faults(fed, disliked)
    assert {"RUN_ROUNDS", "MODEL_DELIVERED", "SCORES_NOT_COMMITTED"} <= faults(fed, kept)
    if at > 2:
        assert "DISCARDED_ROUND" in faults(fed, another)


def test_another_failure_of_scoring_gives_nothing_up(tmp_path, monkeypatch) -> None:
    fed = federation(tmp_path)
    monkeypatch.setattr(
        scoring, "score_round", lambda *_: (_ for _ in ()).throw(FailedError("OTHER", "Something else."))
    )
    with pytest.raises(FailedError):
        fed.run()
    assert not bodies(fed, RoundDiscarded)


def test_negative_values_are_told_by_the_contracts_part(tmp_path) -> None:
    fed = federation(tmp_path, defences=CLAUSE | {"negatives": Decimal("0.25")}, training__rounds=1)
    fed.run()
    with fed.database.read() as connection:
        last = scoring.all_findings(connection, fed.contract.id)[-1][1].lines
    (told,) = [line for line in last if line.code == "NEGATIVES"]
    assert told.threshold == "0.25"
    assert (told.outcome == "alarm") == (float(told.statistic) > 0.25)


@pytest.fixture(scope="module")
def settled(tmp_path_factory) -> Federation:
    fed = federation(tmp_path_factory.mktemp("form"))
    assert fed.run() == "completed"
    settle(fed)
    return fed


class TestForm:
    """What anybody can tell of findings: who speaks, of whom, and that an alarm is above its threshold."""

    def changed(self, fed: Federation, number: int, change: Callable[[Findings], Findings]) -> set[str]:
        """As an operator that commits to it from the start."""

        def forged(found: list[Body]) -> list[Body]:
            opened = next(b for b in found if isinstance(b, FindingsOpened) and b.round == number)
            wrong = change(opened.findings)
            value = commitment(Findings, bytes.fromhex(opened.salt), wrong)
            return [
                body.model_copy(update={"findings": wrong})
                if body is opened
                else body.model_copy(update={"findings": value})
                if isinstance(body, ScoresCommitted) and body.round == number
                else body
                for body in found
            ]

        return faults(fed, forged)

    @pytest.mark.parametrize(
        "change",
        [
            lambda said: said.model_copy(update={"lines": ()}),
            lambda said: said.model_copy(update={"round": 2}),
            lambda said: said.model_copy(update={"lines": said.lines[:-1]}),
            lambda said: said.model_copy(update={"lines": (*said.lines, said.lines[0])}),
            lambda said: said.model_copy(
                update={"lines": (said.lines[0].model_copy(update={"code": "BLA"}), *said.lines[1:])}
            ),
            lambda said: said.model_copy(
                update={"lines": (said.lines[0].model_copy(update={"participants": ("f" * 64,)}), *said.lines[1:])}
            ),
            lambda said: said.model_copy(
                update={"lines": (said.lines[0].model_copy(update={"statistic": "much"}), *said.lines[1:])}
            ),
            lambda said: said.model_copy(
                update={
                    "lines": (
                        said.lines[0].model_copy(update={"outcome": "alarm", "statistic": "0.1", "threshold": "9"}),
                        *said.lines[1:],
                    )
                }
            ),
        ],
    )
    def test_what_no_detector_says_is_found(self, settled, change) -> None:
        assert "FINDINGS_FORM" in self.changed(settled, 3, change)

    def test_a_wrecker_whose_opened_values_are_not_negative_was_excluded_without_ground(self, settled) -> None:
        best = max(settled.contract.by_id(), key=lambda p: self.value(settled, p))

        def excluded(found: list[Body]) -> list[Body]:
            place = next(i for i, b in enumerate(found) if isinstance(b, ScoresCommitted) and b.round == 3)
            return [
                *found[: place + 1],
                ParticipantExcluded(round=3, participant=best, code="WRECKER"),
                *found[place + 1 :],
            ]

        def named(said: Findings) -> Findings:
            line = said.lines[0].model_copy(
                update={"outcome": "alarm", "participants": (best,), "statistic": "50", "threshold": "3"}
            )
            return said.model_copy(update={"lines": (line, *said.lines[1:])})

        assert "EXCLUSION_UNFOUNDED" in faults(settled, excluded)
        assert "EXCLUSION_MISSING" in self.changed(settled, 3, named)

        def both(found: list[Body]) -> list[Body]:
            opened = next(b for b in found if isinstance(b, FindingsOpened) and b.round == 3)
            value = commitment(Findings, bytes.fromhex(opened.salt), named(opened.findings))
            return excluded(
                [
                    body.model_copy(update={"findings": named(opened.findings)})
                    if body is opened
                    else body.model_copy(update={"findings": value})
                    if isinstance(body, ScoresCommitted) and body.round == 3
                    else body
                    for body in found
                ]
            )

        assert "EXCLUSION_UNFOUNDED" in faults(settled, both), "the finding says so, and the scores do not"

    def value(self, fed: Federation, participant: str) -> Fraction:
        return sum(
            (round_values(body.scores, fed.contract)[participant] for body in bodies(fed, ScoresOpened)), Fraction(0)
        )

    def test_first_order_values_that_are_left_out_are_found(self, settled) -> None:
        def without(found: list[Body]) -> list[Body]:
            return [
                body.model_copy(update={"scores": body.scores.model_copy(update={"first_order": None})})
                if isinstance(body, ScoresOpened)
                else body
                for body in found
            ]

        assert "SCORES_FIRST_ORDER" in faults(settled, without)


def test_who_was_not_negative_twice_running_is_no_wrecker() -> None:
    low, high = Fraction(-5), Fraction(1)
    assert not refuted("a", 2, {1: {"a": low}, 2: {"a": low}})
    assert refuted("a", 2, {1: {"a": high}, 2: {"a": low}})
    assert refuted("a", 2, {1: {"a": low}, 2: {"a": high}})
    assert refuted("a", 1, {1: {"a": low}}), "there was no round before"
