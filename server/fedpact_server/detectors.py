"""What looks like gaming: pure tests over one run's updates and values (docs/adr/0004). An alarm never moves money.

`observe` reduces a round to inner products, so that nothing here is as long as a model. A test pools the rounds so far
and compares each participant's x with its peers' in one of two ways:

- by Student's t: x against the others' mean in their own standard deviation, which is at least that of their declared
  noise, with N - 2 degrees of freedom for N participants. So what honest ones differ by, their data or their noise, is
  measured and not assumed. Whoever has more noise than the others by contract is judged by its own;
- where noise is declared and known: in deviations of that noise alone, as long as the peers are no further apart than
  noise explains (by chi-square, at 10 %). With few peers this needs far less than t does.

Besides the test an alarm asks for a size (a fifth too much value, say): what is certain and small is nobody's concern.
Where the thing itself would hardly be found a detector says that it has no power.

Family-wise, an honest run raises an alarm with probability 1 %: `FAMILY`, divided equally over `TESTS`, for each over
its looks (after rounds 3, 6, 12, ... and the last; a wrecker is looked for in every round), and at each look over the
participants (or pairs, or participants and slices) and the two ways. Bonferroni's division holds however the statistics
depend on each other. Beside the tests stands one rule without a level: negative values beyond the contract's part of
v(N).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedpact_contract.looks import looks

Floats = NDArray[np.float64]
Outcome = Literal["alarm", "quiet", "no power"]

FAMILY = 0.01
TESTS = (
    "SIGNAL_ENERGY",
    "DIRECTION",
    "REPLAY",
    "DISPERSION",
    "VALUE_PER_ROW",
    "WITHOUT_VALUE",
    "NEAR_COPY",
    "NEGATIVE_VALUE",
    "WRECKER",
    "SLICE_VALUE",
)
"""The tests that share `FAMILY`. Beside them: NEGATIVES. The log's order is that of `looks.CODES`."""

REPLAY_ROUNDS = 3
NEGATIVES = 0.1
"""The part of v(N) beyond which negative values are told, where the contract names none."""

_LEAST_PEERS = 4
_BLOCK = 2**16
"""Parameters of all updates that are held together."""
_FOLDED = 2**12
"""Numbers that are kept of a participant; divides `_BLOCK`."""
_CLOSE = 1 - 1e-9
"""No cosine is nearer to 1 than this."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observed:
    """One round, reduced; players in the order of ids.

    Attributes:
        round: Its number.
        players: Who was admitted.
        examples: Contracted n, [N].
        noise: The energy that the contracted noise alone brings into each update, [N]; zeros without local DP.
        parameters: The model's.
        products: <D_i, D_j> of the updates as they came, [N, N].
        everyone: Who was admitted in this round or before.
        apart: <A_i, A_j> of everyone, [M, M], A_i the sum over the rounds so far of D_i less its round's mean.
        previous: <D_i, G>, G the step that led to this round's base, [N]; zeros in a first round.
        energy: ||G||^2.
        slope: How steep the mean validation loss is at the round's base, for what is added to it: the norm of its
            gradient, times the server's rate.
        values: Each player's value on each validation row, [N, V], in nat; 0 on the rows it gave.
    """

    round: int
    players: tuple[str, ...]
    examples: Floats
    noise: Floats
    parameters: int
    products: Floats
    everyone: tuple[str, ...]
    apart: Floats
    previous: Floats
    energy: float
    slope: float
    values: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one detector says after a round, of whoever stands out most.

    Attributes:
        code: The detector.
        round: The last round that it looked at.
        outcome: `alarm`; `quiet`; `no power`, where even the thing itself would hardly have been found.
        participants: Who stands out most; two for NEAR_COPY; nobody where nothing could be looked at.
        statistic: The test's statistic.
        threshold: What it has to pass.
        power: What it would have found, in words.
        evidence: The numbers behind it.
    """

    code: str
    round: int
    outcome: Outcome
    participants: tuple[str, ...]
    statistic: float
    threshold: float
    power: str
    evidence: Mapping[str, str | int]

    def plain(self) -> dict[str, object]:
        """As plain JSON values, without floats."""
        return {
            "code": self.code,
            "round": self.round,
            "outcome": self.outcome,
            "participants": list(self.participants),
            "statistic": _text(self.statistic),
            "threshold": _text(self.threshold),
            "power": self.power,
            "evidence": dict(self.evidence),
        }


class Apart:
    """What each participant's updates differ by from the means of their rounds, summed over the rounds so far.

    Folded with random signs to 4,096 numbers (as the count sketch of Charikar, Chen and Farach-Colton 2004): a cosine
    is then off by a sixty-fourth, and that of a model no larger by nothing. Whoever knew the signs could hide in them.

    Args:
        seed: Of the signs; what no participant knows before its first update is there.
    """

    def __init__(self, seed: bytes) -> None:
        self._seed = list(seed)
        self._sums: dict[str, Floats] = {}

    def add(self, ids: Sequence[str], begin: int, part: Floats) -> None:
        """A block of a round's updates, [N, B], that begins with this parameter."""
        signs = np.random.default_rng([*self._seed, begin]).choice((-1.0, 1.0), part.shape[1])
        signed = np.pad((part - part.mean(axis=0)) * signs, ((0, 0), (0, -part.shape[1] % _FOLDED)))
        for i, folded in zip(ids, signed.reshape(len(ids), -1, _FOLDED).sum(axis=1), strict=True):
            self._sums[i] = self._sums.get(i, 0.0) + folded

    def products(self) -> tuple[tuple[str, ...], Floats]:
        """Everyone so far, and the inner products."""
        everyone = tuple(sorted(self._sums))
        stacked = np.stack([self._sums[i] for i in everyone])
        return everyone, np.asarray(stacked @ stacked.T)


def observe(
    round_number: int,
    updates: Mapping[str, NDArray[np.floating]],
    *,
    examples: Mapping[str, int],
    noise: Mapping[str, float],
    step: NDArray[np.floating] | None,
    slope: float,
    values: Floats,
    apart: Apart,
) -> Observed:
    """Reduce a round.

    Args:
        round_number: The round.
        updates: Admitted updates by participant, [P], before any clipping.
        examples: Contracted n by participant.
        noise: The energy of its contracted noise by participant (`clipping.noise_energy`); 0 without local DP.
        step: The step that led to the round's base, [P]; None in a first round.
        slope: The norm of the validation loss's gradient there (`gradient.gradient`), times the server's rate.
        values: Values on validation rows, [N, V], in the order of ids.
        apart: The same one for every round of a run, in their order.
    """
    ids = tuple(sorted(updates))
    parameters = len(updates[ids[0]])
    before = np.zeros(parameters) if step is None else np.asarray(step, dtype=np.float64)
    products, previous = np.zeros((len(ids), len(ids))), np.zeros(len(ids))
    for begin in range(0, parameters, _BLOCK):  # never all updates in memory
        part = np.stack([np.asarray(updates[i][begin : begin + _BLOCK], dtype=np.float64) for i in ids])
        products += part @ part.T
        previous += part @ before[begin : begin + _BLOCK]
        apart.add(ids, begin, part)
    everyone, sums = apart.products()
    return Observed(
        round=round_number,
        players=ids,
        examples=np.array([examples[i] for i in ids], dtype=np.float64),
        noise=np.array([noise[i] for i in ids], dtype=np.float64),
        parameters=parameters,
        products=products,
        everyone=everyone,
        apart=sums,
        previous=previous,
        energy=float(before @ before),
        slope=slope,
        values=values,
    )


def findings(
    observed: Sequence[Observed], rounds: int, slices: Sequence[tuple[str, int]], part: float = NEGATIVES
) -> list[Finding]:
    """What every detector says after the last of these rounds; between two looks only that of wreckers speaks.

    Args:
        observed: The rounds so far, at least one.
        rounds: Those of the contract.
        slices: Of the validation set, in order: who gave it, and its rows.
        part: Of v(N), beyond which negative values are told.
    """
    result = [wrecker(observed, rounds)]
    if observed[-1].round in looks(rounds):
        single = (signal_energy, direction, replay, dispersion, value_per_row, without_value, near_copy, negative_value)
        result += [test(observed, rounds) for test in single]
        result += [slice_value(observed, rounds, slices), negatives(observed, part)]
    return result


def signal_energy(observed: Sequence[Observed], rounds: int) -> Finding:
    """Boosted or padded: its energy beyond the declared noise is above its peers', and at least 1.44 times theirs.

    With DP-SGD the signal does not grow with the contracted n: that is the denominator of its own sum.
    """
    left, shared = _left(observed), _shared(observed)
    x = _pooled(observed, lambda o: np.diag(o.products) - left * o.noise)
    padded, known = 25 * shared, _over_rounds(observed, lambda o: _energy_variance(o, shared))
    beyond = lambda m: 1.44 * max(m, 0.0)  # noqa: E731
    return _alone("SIGNAL_ENERGY", observed, rounds, x, beyond, thing=lambda _: padded, power=2, known=known)


def direction(observed: Sequence[Observed], rounds: int) -> Finding:
    """Random, flipped or hostile: it has less of the others' mean update in it than they have, and less than half."""
    x = _pooled(observed, lambda o: np.array([o.products[i] @ _others(o, i) for i in range(len(o.players))]))
    shared = _shared(observed)

    def variance(o: Observed) -> Floats:
        mean = [shared + _others(o, i) ** 2 @ o.noise for i in range(len(o.players))]
        return np.asarray(o.noise * np.array(mean) / o.parameters)

    known = _over_rounds(observed, variance)
    return _alone("DIRECTION", observed, rounds, x, lambda m: m / 2, thing=lambda _: 0.0, side=-1, known=known)


def replay(observed: Sequence[Observed], rounds: int) -> Finding:
    """The last global step, sent back: its part in the update, next to that of what the others send in the same round.

    The partial regression coefficient: 1 of a replay, about 0 of everybody who trains, for of the noise in the last
    step nothing comes again. At least a half, over three rounds.
    """
    seen = [o for o in observed if o.energy > 0]
    if len(seen) < REPLAY_ROUNDS:
        return _silent("REPLAY", observed, f"none before {REPLAY_ROUNDS} rounds that follow a step")
    top: dict[str, float] = {}
    bottom: dict[str, float] = {}
    for o in seen:
        for i, player in enumerate(o.players):
            others = _others(o, i)
            last, mean = others @ o.previous, others @ o.products @ others
            part = last / mean if mean > 0 else 0.0
            top[player] = top.get(player, 0.0) + float(o.previous[i] - part * (o.products[i] @ others))
            bottom[player] = bottom.get(player, 0.0) + float(o.energy - part * last)
    x = {player: top[player] / bottom[player] for player in sorted(top) if bottom[player] > 0}
    return _alone("REPLAY", observed, rounds, x, lambda _: 0.5, thing=lambda _: 1.0)


def dispersion(observed: Sequence[Observed], rounds: int) -> Finding:
    """Fewer rows than contracted, or others': it differs from the others' mean by more than n rows explain.

    Of honest participants n ||D_i - mean of the others||^2, less the declared noise, is alike; of one that has a
    fifth of the rows it is five times that. At least twice.
    """
    left, shared = _left(observed), _shared(observed)

    def of(o: Observed) -> Floats:
        count = len(o.players)
        if count < 3:
            return np.zeros(count)
        apart = [o.products[i, i] - 2 * (o.products[i] @ _others(o, i)) + _among(o.products, {i}) for i in range(count)]
        return np.asarray(o.examples * (np.array(apart) - left * o.noise))

    x = _pooled(observed, of)
    known = _over_rounds(observed, lambda o: o.examples**2 * _energy_variance(o, shared))
    beyond, fifth = (lambda m: 2 * max(m, 0.0)), (lambda m: 5 * m)
    return _alone("DISPERSION", observed, rounds, x, beyond, thing=fifth, power=2, known=known)


def value_per_row(observed: Sequence[Observed], rounds: int) -> Finding:
    """Worth more a contracted row than its peers' rows, by a fifth at least: padding, known validation rows, or luck.

    It looks at what is paid for, by whatever means it came; much better data raise it too, and the review says which.
    """
    x, known = _row_values(observed)
    beyond, twice = (lambda m: 1.2 * max(m, 0.0)), (lambda m: 2 * m)
    return _alone("VALUE_PER_ROW", observed, rounds, x, beyond, thing=twice, known=known)


def without_value(observed: Sequence[Observed], rounds: int) -> Finding:
    """Noise, or labels of nothing: a contracted row is worth less than its peers' rows, less than a third of them."""
    x, known = _row_values(observed)
    return _alone("WITHOUT_VALUE", observed, rounds, x, lambda m: m / 3, thing=lambda _: 0.0, side=-1, known=known)


def near_copy(observed: Sequence[Observed], rounds: int) -> Finding:
    """Two that differ from the others in the same way: the cosine of what is left of each beside the others' mean.

    Of updates summed over rounds: what comes of the rows adds up, and what comes of their draws averages out. By
    Fisher's transform, next to pairs of others, and at least 0.2. It finds copies that share their noise; copies of
    the signal under fresh noise only where the signal is above the noise, and it says where it is not.
    """
    ids, products = observed[-1].everyone, observed[-1].apart
    noise = {p: sum(o.noise[o.players.index(p)] for o in observed if p in o.players) for p in ids}
    x: dict[Key, float] = {}
    signals = []
    for i, j in combinations(range(len(ids)), 2) if len(ids) > 3 else ():
        mean = np.full(len(ids), 1 / (len(ids) - 2))
        mean[[i, j]] = 0
        one, two, rest = products[i] @ mean, products[j] @ mean, _among(products, {i, j})
        first, second = products[i, i] - 2 * one + rest, products[j, j] - 2 * two + rest
        scale = math.sqrt(max(first, 0.0) * max(second, 0.0))
        if scale > 0:
            both = (products[i, j] - one - two + rest) / scale
            x[ids[i], ids[j]] = math.atanh(max(-_CLOSE, min(_CLOSE, both)))
            clean = math.sqrt(max(first - noise[ids[i]], 0.0) * max(second - noise[ids[j]], 0.0))
            signals.append(min(_CLOSE, clean / scale))
    again = math.atanh(float(np.median(signals))) if signals else 0.0
    apart = lambda a, b: not set(a) & set(b)  # noqa: E731
    return _test("NEAR_COPY", observed, rounds, x, lambda _: 0.2, thing=lambda _: again, peers=apart)


def negative_value(observed: Sequence[Observed], rounds: int) -> Finding:
    """False labels, hostile updates: the value of the period is negative beyond chance."""
    tests = len(looks(rounds)) * len(_players(observed))
    values = _summed(observed)
    scores = {p: _standard_score(v, _noise_variance(observed, p)) for p, v in values.items()}
    return _lowest("NEGATIVE_VALUE", observed, scores, _normal(FAMILY / len(TESTS) / tests))


def wrecker(observed: Sequence[Observed], rounds: int) -> Finding:
    """The own value is below -3 standard errors in two rounds running: rejected from the next one until reviewed.

    The error is that of the validation rows, and of the declared noise. In a contract of very many rounds and
    participants -3 would be too little for the level: then it is more.
    """
    if len(observed) < 2:
        return _silent("WRECKER", observed, "none before two rounds")
    tests = max(1, rounds - 1) * len(_players(observed))
    found: list[dict[str, float]] = [
        {p: _standard_score(v, _noise_variance([o], p)) for p, v in _summed([o]).items()} for o in observed[-2:]
    ]
    both = {p: max(found[0][p], score) for p, score in found[1].items() if p in found[0]}
    return _lowest("WRECKER", observed, both, max(3.0, _normal(math.sqrt(FAMILY / len(TESTS) / tests))))


def negatives(observed: Sequence[Observed], part: float) -> Finding:
    """Negative values of the period together, against this part of v(N): a close waits until they are reviewed."""
    values = {p: float(v.mean()) for p, v in _summed(observed).items()}
    total, below = sum(values.values()), -sum(v for v in values.values() if v < 0)
    ratio = 0.0 if below == 0 else below / total if total > 0 else math.inf
    return Finding(
        code="NEGATIVES",
        round=observed[-1].round,
        outcome="alarm" if ratio > part else "quiet",
        participants=tuple(p for p, v in values.items() if v < 0),
        statistic=ratio,
        threshold=part,
        power="any: it is a rule, not a test",
        evidence={"negative": _text(below), "total": _text(total)},
    )


def slice_value(observed: Sequence[Observed], rounds: int, slices: Sequence[tuple[str, int]]) -> Finding:
    """A slice that somebody knows: on it the participant is worth more than on the other slices, next to its peers.

    By a half of its peers' mean at least. A validation set of one slice, or leaked as a whole, leaves nothing to
    compare with: then VALUE_PER_ROW alone may show it.
    """
    if len(slices) < 2:
        return _silent("SLICE_VALUE", observed, "none: the validation set is one slice, and a leak shows nowhere else")
    values, edges = _summed(observed), np.cumsum([0, *(count for _, count in slices)])
    means = {
        p: {k: float(v[edges[k] : edges[k + 1]].mean()) for k, (giver, _) in enumerate(slices) if giver != p}
        for p, v in values.items()
    }
    counts = [count for _, count in slices]
    x: dict[Key, float] = {}
    for k in range(len(slices)):
        rest = {
            p: sum(m[j] * counts[j] for j in m if j != k) / sum(counts[j] for j in m if j != k)
            for p, m in means.items()
            if k in m and len(m) > 1
        }
        if len(rest) < _LEAST_PEERS + 1:
            continue
        here, there = (float(np.mean(list(side))) for side in ([means[p][k] for p in rest], rest.values()))
        if here > 0 and there > 0:
            x |= {(p, str(k)): means[p][k] / here - rest[p] / there for p in rest}
    same = lambda a, b: a[0] != b[0] and a[1] == b[1]  # noqa: E731
    return _test("SLICE_VALUE", observed, rounds, x, lambda _: 0.5, thing=lambda _: 1.0, peers=same)


Key = tuple[str, ...]
"""A participant, a pair, or a participant and a slice."""


def _test(
    code: str,
    observed: Sequence[Observed],
    rounds: int,
    x: Mapping[Key, float],
    beyond: Callable[[float], float],
    *,
    thing: Callable[[float], float],
    peers: Callable[[Key, Key], bool],
    side: int = 1,
    power: int = 1,
    known: Mapping[str, float] | None = None,
) -> Finding:
    """Each x against its peers, in the two ways of this module's text; the most outstanding one is told.

    Args:
        code: The detector.
        observed: The rounds.
        rounds: Those of the contract.
        x: The statistic.
        beyond: From the peers' mean, the size.
        thing: From the peers' mean, x of the thing looked for.
        peers: Whether the second is a peer of the first.
        side: 1: too much; -1: too little.
        power: How the variance of x grows with the declared noise energy.
        known: The variance that declared noise brings into x, by participant; None: not known.
    """
    level = FAMILY / len(TESTS) / len(looks(rounds)) / max(1, len(x)) / (1 if known is None else 2)
    noise, told = _noise(observed), []
    skew = math.sqrt(8 / (observed[-1].parameters * len(observed)))
    for key, value in x.items():
        sample = {other: x[other] for other in x if peers(key, other)}
        if len(sample) < _LEAST_PEERS:
            continue
        mean, deviation = float(np.mean(list(sample.values()))), float(np.std(list(sample.values()), ddof=1))
        own, theirs = _variance(key, noise, power), float(np.mean([_variance(o, noise, power) for o in sample]))
        size, variance = beyond(mean), 0.0 if known is None else float(np.mean([known[other[0]] for other in sample]))
        error = math.sqrt(max(deviation**2, variance) * (max(1.0, own / theirs) + 1 / len(sample)))
        ways = [("peers", error, _threshold(len(sample) - 1, level))]
        if known is not None and deviation**2 <= _explained(len(sample) - 1) * variance:
            declared = math.sqrt(known[key[0]] + variance / len(sample))
            ways.append(("declared noise", declared, _normal(level, 0.0 if power == 1 else skew)))
        apart = side * (value - mean)
        least = side * max(side * size, side * mean + min(err * need for _, err, need in ways))
        way, err, threshold = max(ways, key=lambda w: _standard(apart, w[1]) - w[2])
        statistic = _standard(apart, err)
        alarm = statistic > threshold and side * value > side * size
        outcome: Outcome = "alarm" if alarm else "quiet" if side * thing(mean) > side * least else "no power"
        evidence: dict[str, str | int] = {
            "value": _text(value),
            "against": way,
            "peers": len(sample),
            "peers_mean": _text(mean),
            "peers_deviation": _text(deviation),
            "error": _text(err),
            "rounds": len(observed),
        }
        finding = Finding(
            code=code,
            round=observed[-1].round,
            outcome=outcome,
            participants=key if code == "NEAR_COPY" else key[:1],
            statistic=statistic,
            threshold=threshold,
            power=f"values {'above' if side > 0 else 'below'} {_text(least)}; the thing itself is {_text(thing(mean))}",
            evidence=evidence | ({"slice": int(key[1])} if code == "SLICE_VALUE" else {}),
        )
        told.append((alarm, statistic - threshold, finding))
    if not told:
        return _silent(code, observed, f"none: nobody has {_LEAST_PEERS} peers")
    return max(told, key=lambda entry: entry[:2])[2]


def _alone(
    code: str,
    observed: Sequence[Observed],
    rounds: int,
    x: Mapping[str, float],
    beyond: Callable[[float], float],
    *,
    thing: Callable[[float], float],
    side: int = 1,
    power: int = 1,
    known: Mapping[str, float] | None = None,
) -> Finding:
    """`_test` of single participants: everybody else is a peer."""
    alone: dict[Key, float] = {(p,): value for p, value in x.items()}
    others = lambda a, b: a != b  # noqa: E731
    return _test(code, observed, rounds, alone, beyond, thing=thing, peers=others, side=side, power=power, known=known)


def _silent(code: str, observed: Sequence[Observed], power: str) -> Finding:
    return Finding(
        code=code,
        round=observed[-1].round,
        outcome="no power",
        participants=(),
        statistic=0.0,
        threshold=0.0,
        power=power,
        evidence={},
    )


def _lowest(code: str, observed: Sequence[Observed], scores: Mapping[str, float], threshold: float) -> Finding:
    """Whether the lowest of these standard scores is below minus the threshold."""
    who = min(scores, key=lambda p: scores[p], default=None)
    if who is None:
        return _silent(code, observed, "none: nobody was there in all these rounds")
    return Finding(
        code=code,
        round=observed[-1].round,
        outcome="alarm" if scores[who] < -threshold else "quiet",
        participants=(who,),
        statistic=-scores[who],
        threshold=threshold,
        power=f"values below -{_text(threshold)} standard errors",
        evidence={"rounds": len(observed)},
    )


def _standard(difference: float, error: float) -> float:
    if error > 0:
        return difference / error
    return math.copysign(math.inf, difference) if difference else 0.0


def _standard_score(values: Floats, noise: float) -> float:
    """A value in standard errors: of its validation rows, and of the declared noise in it."""
    rows = float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0
    return _standard(float(values.mean()), math.sqrt(rows + noise))


def _noise_variance(observed: Sequence[Observed], player: str) -> float:
    """What the declared noise brings into a participant's summed value, to first order."""
    result = 0.0
    for o in observed:
        if player in o.players:
            i = o.players.index(player)
            result += (o.slope * o.examples[i] / o.examples.sum()) ** 2 * o.noise[i] / o.parameters
    return float(result)


def _row_values(observed: Sequence[Observed]) -> tuple[dict[str, float], dict[str, float] | None]:
    """The mean value of a contracted row, and the variance that declared noise brings into it."""
    known = _over_rounds(observed, lambda o: (o.slope / o.examples.sum()) ** 2 * o.noise / o.parameters)
    return _pooled(observed, lambda o: o.values.mean(axis=1) / o.examples), known


def _left(observed: Sequence[Observed]) -> float:
    """The part of the noise's energy that later gradients leave (`noise_floor.kept`), as the median participant has it.

    It is alike for all, who take the same steps; so those with little noise are not above those with much.
    """
    shared = _shared(observed)
    if not all(o.noise.all() for o in observed):
        return 1.0
    parts = _pooled(observed, lambda o: (np.diag(o.products) - shared) / o.noise)
    return min(1.0, float(np.median(list(parts.values()))))


def _energy_variance(o: Observed, shared: float) -> Floats:
    """Of ||D||^2, by the declared noise: 2 E^2 + 4 E s over P, s the signal's energy."""
    return np.asarray((2 * o.noise**2 + 4 * o.noise * shared) / o.parameters)


def _over_rounds(observed: Sequence[Observed], variance: Callable[[Observed], Floats]) -> dict[str, float] | None:
    """The variance of a mean over rounds whose noise is independent; None where no noise is declared."""
    if not any(o.noise.any() for o in observed):
        return None
    counts = {p: sum(p in o.players for o in observed) for p in _players(observed)}
    return {p: mean / counts[p] for p, mean in _pooled(observed, variance).items()}


def _among(products: Floats, without: set[int]) -> float:
    """The mean product of two others: what they share, free of their own energy."""
    rest = [k for k in range(len(products)) if k not in without]
    part = products[np.ix_(rest, rest)]
    return float(part.sum() - np.trace(part)) / (len(rest) * (len(rest) - 1))


def _others(o: Observed, i: int) -> Floats:
    """The weights of the mean of all but one, [N]."""
    result = np.full(len(o.players), 1 / max(1, len(o.players) - 1))
    result[i] = 0.0
    return result


def _players(observed: Sequence[Observed]) -> list[str]:
    return sorted({p for o in observed for p in o.players})


def _pooled(observed: Sequence[Observed], of: Callable[[Observed], Floats]) -> dict[str, float]:
    """Each participant's mean over the rounds in which it was admitted."""
    found: dict[str, list[float]] = {p: [] for p in _players(observed)}
    for o in observed:
        for p, value in zip(o.players, of(o), strict=True):
            found[p].append(float(value))
    return {p: math.fsum(values) / len(values) for p, values in found.items()}


def _summed(observed: Sequence[Observed]) -> dict[str, Floats]:
    """Each participant's values on validation rows, summed over rounds, [V]."""
    result = {p: np.zeros(observed[0].values.shape[1]) for p in _players(observed)}
    for o in observed:
        for p, values in zip(o.players, o.values, strict=True):
            result[p] = result[p] + values
    return result


def _shared(observed: Sequence[Observed]) -> float:
    """The energy of the signal that participants share, 0 at least."""
    found = [_among(o.products, set()) for o in observed if len(o.players) > 1]
    return max(0.0, math.fsum(found) / len(found)) if found else 0.0


def _noise(observed: Sequence[Observed]) -> dict[str, float]:
    """What honest participants' variances go by: the declared noise, and without it one over n."""
    if any(o.noise.any() for o in observed):
        return _pooled(observed, lambda o: o.noise)
    return _pooled(observed, lambda o: 1 / o.examples)


def _variance(key: Key, noise: Mapping[str, float], power: int) -> float:
    return math.prod(noise[part] ** power for part in key if part in noise)


def _text(number: float) -> str:
    return f"{number:.6g}"


def _normal(level: float, skew: float = 0.0) -> float:
    """The normal quantile; for an energy, which is a chi-square with this skewness, by Cornish and Fisher (1938)."""
    z = NormalDist().inv_cdf(1 - level)
    return z + skew / 6 * (z * z - 1)


def _explained(degrees: int) -> float:
    """The 90 % quantile of chi-square over its degrees of freedom (Wilson and Hilferty 1931)."""
    part = 2 / (9 * degrees)
    return (1 - part + NormalDist().inv_cdf(0.9) * math.sqrt(part)) ** 3


@lru_cache(maxsize=1024)
def _threshold(degrees: int, level: float) -> float:
    """What Student's t with these degrees of freedom is above with this probability; rounded up to 1e-6."""
    if degrees < 1:
        return math.inf
    low, high = 0.0, 1.0
    while _tail(high, degrees) > level:
        low, high = high, 2 * high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if _tail(middle, degrees) > level else (low, middle)
    return high


def _tail(t: float, degrees: int) -> float:
    """P(T > t), t >= 0, by the finite sums for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    square = math.cos(angle) ** 2
    if degrees % 2:
        term, total = math.cos(angle), 0.0
        for k in range(1, (degrees - 1) // 2 + 1):
            total += term
            term *= square * 2 * k / (2 * k + 1)
        return 0.5 - (angle + math.sin(angle) * total) / math.pi
    term, total = 1.0, 0.0
    for k in range(1, degrees // 2 + 1):
        total += term
        term *= square * (2 * k - 1) / (2 * k)
    return 0.5 - math.sin(angle) * total / 2
