"""The auditor's re-evaluation of a run, from what the operator handed it (`bundle`).

Every next model is made again, and the losses of all coalitions or of some are, by the functions that the operator
scores with.

What the bundle lacks, or holds otherwise than the log, is an error: nothing is signed, and the operator is asked again.
What the log itself states otherwise than the updates and the committed rows give is a difference, and is signed.
"""

import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from fedpact_contract.arrays import model_digest
from fedpact_contract.contract import Auditor, Contract
from fedpact_contract.contribution import DRAWN, admitted_in, masks
from fedpact_contract.errors import FailedError, FaultError, InputError
from fedpact_contract.evidence import Evidence, read_evidence
from fedpact_contract.log import (
    Body,
    Checkpoint,
    Clip,
    ContractSigned,
    Entry,
    Finding,
    Findings,
    FindingsOpened,
    Moments,
    MomentsOpened,
    PeriodSettled,
    RoundAggregated,
    RoundDiscarded,
    RoundScores,
    ScoresOpened,
)
from fedpact_contract.record import Envelope, read_envelope, sign
from fedpact_contract.reevaluation import (
    LISTED,
    TOLERANCE,
    Coalitions,
    Compared,
    Difference,
    Reevaluation,
    comparable,
    drawn,
    tolerance,
)
from fedpact_contract.unions import Unions, by_round
from fedpact_contract.verify import verify
from fedpact_models import aggregation
from fedpact_models.features import Examples
from fedpact_models.registry import parameter_count
from fedpact_models.tasks import task_of
from fedpact_server import bundle, deposit, scoring
from fedpact_server.pool import map_update
from fedpact_server.run_state import FloatArray, load_model
from fedpact_server.watch import Watch

FINDING_ERROR = 1e-3
"""What a detector's numbers may differ by; they are told in six digits."""
ROW_ERROR = 1e-5
"""What another processor may move a row's loss by, in 1e-9 nat: 100,000 rows make the one unit of `tolerance`."""

_Made = tuple[
    dict[str, str],
    dict[str, NDArray[np.float32]],
    FloatArray,
    Mapping[str, NDArray[np.floating]],
    aggregation.Memory,
]
"""Of a round: update digests, updates, the base model, each player's step, what the server's optimizer keeps."""


def reevaluate(
    folder: Path,
    party: Auditor,
    keys: tuple[Ed25519PrivateKey, X25519PrivateKey],
    *,
    sample: int | None = None,
    seed: str | None = None,
) -> tuple[Contract, Reevaluation, Envelope[Reevaluation], list[Entry]]:
    """Evaluate a run again.

    Args:
        folder: What `bundle.write` wrote.
        party: The auditor.
        keys: Its keys: what signs, and what opens the deposit.
        sample: How many coalitions of each round, beside nobody and all; None: all, and the second moments.
        seed: What they are drawn by, 32 bytes in hexadecimal; fresh ones by default.

    Returns:
        The contract, what was found, that signed, and the log's entries.

    Raises:
        InputError: no such folder; AUDITOR_OTHER, the contract names another auditor; REEVALUATE_EARLY, the scores are
            not open yet; REEVALUATE_SEED.
        FaultError: REEVALUATE_EVIDENCE, the evidence itself is at fault; or a file of the bundle is missing or is not
            what the log says.
    """
    if seed is not None and (len(seed) != 64 or not set(seed) <= set("0123456789abcdef") or sample is None):
        raise InputError(
            "REEVALUATE_SEED",
            "A seed is 64 hexadecimal digits, and goes with a sample.",
            field="--seed",
            remedy="Leave it out: a fresh one is drawn and recorded.",
        )
    evidence = read_evidence(folder / bundle.EVIDENCE)
    contract, entries = _read(evidence, folder)
    bodies = [entry.open() for entry in entries]
    if contract.auditor is None or contract.auditor.id != party.id:
        named = "no auditor" if contract.auditor is None else f"the auditor {contract.auditor.id}"
        raise InputError(
            "AUDITOR_OTHER", f"The contract names {named}; these keys are {party.id}.", field="--key", party=party.name
        )
    if not any(isinstance(body, PeriodSettled) for body in bodies) or not any(
        isinstance(body, MomentsOpened) for body in bodies
    ):
        raise InputError(
            "REEVALUATE_EARLY",
            "The scores are not open: nobody but the operator knows what there is to evaluate again.",
            file=folder,
            remedy="Ask for the folder again once the period is closed.",
        )
    task = _Task(
        folder=folder,
        contract=contract,
        bodies=bodies,
        sample=sample,
        seed=None if sample is None else seed or secrets.token_hex(32),
    )
    record = task.look(keys[1], _head(evidence))
    return contract, record, sign(record, keys[0]), entries


def _read(evidence: Evidence, folder: Path) -> tuple[Contract, list[Entry]]:
    """The contract and the entries of sound evidence.

    Raises:
        FaultError: REEVALUATE_EVIDENCE.
    """
    faults = verify(evidence, None).faults
    if faults:
        raise FaultError(
            "REEVALUATE_EVIDENCE",
            f"The evidence itself is at fault, first by {faults[0]['code']}: {faults[0]['message']}",
            file=folder / bundle.EVIDENCE,
            remedy="`fedpact verify` lists every fault; nothing is evaluated on such evidence.",
        )
    entries = [Entry.from_bytes(line) for line in evidence.log]
    first = entries[0].open()
    assert isinstance(first, ContractSigned)  # noqa: S101 - verified evidence begins with it
    return Contract.from_bytes(first.signed.contract.body), entries


def _head(evidence: Evidence) -> Checkpoint:
    """The latest checkpoint."""
    heads = (Checkpoint.from_bytes(read_envelope(line).body) for line in evidence.checkpoints)
    return max(heads, key=lambda head: head.size)


@dataclass(slots=True, kw_only=True)
class _Task:
    """A run to be evaluated again, and what is found in it."""

    folder: Path
    contract: Contract
    bodies: Sequence[Body]
    sample: int | None
    seed: str | None
    differences: list[Difference] = field(default_factory=list)
    largest: int = 0
    whole: bool = True  # whether every round could be evaluated
    left: set[Compared] = field(default_factory=set)  # what was not compared in every round

    def look(self, key: X25519PrivateKey, head: Checkpoint) -> Reevaluation:
        """Evaluate, and say what was found."""
        scores = [body.scores for body in self.bodies if isinstance(body, ScoresOpened)]
        examples = self.rows(key)
        values = self.rounds(scores, examples)
        if not self.whole:
            self.left |= {"findings", "moments"}  # sums over all rounds
        if examples is not None and self.sample is None and self.whole:
            stated = next(body.moments for body in self.bodies if isinstance(body, MomentsOpened))
            self.differences += self.moments(values, stated, len(scores))
        if examples is None:
            self.sample = self.seed = None
        coalitions: Coalitions = "none" if examples is None else "all" if self.sample is None else "sampled"
        most = comparable(self.contract, self.bodies, coalitions)
        assert self.contract.auditor is not None  # noqa: S101 - `reevaluate` looked
        return Reevaluation(
            contract_id=self.contract.id,
            auditor=self.contract.auditor.id,
            size=head.size,
            root=head.root,
            rounds=len(scores),
            coalitions=coalitions,
            sample=self.sample,
            seed=self.seed,
            evaluated=0 if examples is None else sum(len(drawn(said, self.sample, self.seed)) for said in scores),
            tolerance=TOLERANCE,
            largest=self.largest,
            differing=len(self.differences),
            differences=tuple(self.differences[:LISTED]),
            compared=tuple(name for name in most if name not in self.left),
        )

    def rows(self, key: X25519PrivateKey) -> Examples | None:
        """The committed rows; None where the operator deposited none, which is a difference."""
        data = bundle.read_sealed(self.folder / bundle.SEALED, self.bodies)
        try:
            return deposit.unseal(data, key, self.contract)
        except FaultError as err:
            root = self.contract.contribution.validation.root
            self.differences.append(Difference(what="deposit", round=0, stated=root, found=err.code))
            return None

    def rounds(self, scores: Sequence[RoundScores], examples: Examples | None) -> FloatArray:
        """Every round: the next model, and the losses that are evaluated again.

        Returns:
            Per-example values of the whole run, float64 [all participants, V], where all coalitions are evaluated.
        """
        contract, ids = self.contract, list(self.contract.by_id())
        memory, previous = aggregation.START, None
        watch = Watch(contract, examples) if examples is not None else None
        standing = by_round(self.bodies)
        total = np.zeros((len(ids), 0 if examples is None else len(examples)))
        for said in scores:
            unions, made = standing.get(said.round, ()), self.made(said.round, admitted_in(said), memory, standing)
            if made is None:
                return total  # what the server remembers of such an update, and what comes of it, is nobody's to say
            admitted, arrays, base, steps, memory = made
            if examples is None:
                continue
            try:
                if self.sample is None:
                    again, values = scoring.score_round(
                        contract, said.round, admitted, base, steps, examples, previous, unions
                    )
                    self.differences += _draws(said, again)
                    if watch is not None and masks(again) == masks(said) and self.whole:
                        watch.take(again, arrays, base, values, unions)
                        self.findings(watch.said(said.round))
                    if masks(again) == masks(said):
                        total[[ids.index(p) for p in said.players]] += values
                        counted = again.correct, again.pairs
                        self.differences += self.compare(said, dict(enumerate(again.losses)), counted)
                        previous = again
                        continue
                    self.whole = False  # other coalitions were due: those that are stated are evaluated all the same
                    self.left.add("draws")
                rows = drawn(said, self.sample, self.seed)
                named = [masks(said)[row] for row in rows]
                found = scoring.round_game(contract, base, steps, examples, unions)(named)
                previous = None
            except (FailedError, InputError) as err:
                if err.code not in scoring.NO_LOSS:
                    raise  # of this machine, and nobody's fault that is signed
                self.skip("loss", said.round, "losses", err.code)
                self.left |= {"losses", "correct", "draws"}
                previous = None
                continue
            counted = found.ends(named[0], named[-1]), task_of(contract.data.label).pairs(examples.y)
            self.differences += self.compare(said, dict(zip(rows, found.losses, strict=True)), counted)
        for body in self.bodies:
            if isinstance(body, RoundDiscarded):
                self.discarded(body, memory, standing, examples)
        return total

    def made(
        self, number: int, players: Sequence[str], memory: aggregation.Memory, standing: Mapping[int, Unions]
    ) -> _Made | None:
        """A round's next model, made again, with what it is made of; None where an update fits no model."""
        contract, base = self.contract, load_model(self.folder, bundle.bases(self.bodies)[number])
        updates, stated = bundle.updates(self.bodies), bundle.models(self.bodies)[number]
        admitted = {p: updates[number, p] for p in players}
        arrays = {p: map_update(self.folder / bundle.UPDATES, digest) for p, digest in admitted.items()}
        if {len(base), *map(len, arrays.values())} != {parameter_count(contract.model, contract.data)}:
            self.skip("model", number, stated, "an update that does not fit the model")
            self.left |= {"models", "discarded", "clips", "losses", "correct", "draws"}
            return None
        unions = standing.get(number, ())
        self.clips(number, aggregation.clips(contract, arrays))
        steps, memory = aggregation.server_steps(contract, arrays, memory, unions)
        digest = model_digest(aggregation.next_model(contract, base, steps, unions).astype("<f8").tobytes())
        if digest != stated:
            self.differences.append(Difference(what="model", round=number, stated=stated, found=digest))
        return admitted, arrays, base, steps, memory

    def discarded(
        self,
        body: RoundDiscarded,
        memory: aggregation.Memory,
        standing: Mapping[int, Unions],
        examples: Examples | None,
    ) -> None:
        """A round that was given up has a loss that is no number; if it has none, that is a difference.

        All its coalitions are evaluated, also where only a sample of the other rounds' is.
        """
        number = body.round
        players = next(b.admitted for b in self.bodies if isinstance(b, RoundAggregated) and b.round == number)
        made = self.made(number, players, memory, standing)
        if made is None or examples is None:
            return
        admitted, _, base, steps, _ = made
        try:
            scoring.score_round(self.contract, number, admitted, base, steps, examples, None, standing.get(number, ()))
        except (FailedError, InputError) as err:
            if err.code not in scoring.NO_LOSS:
                raise
            return
        found = "losses that are numbers"
        self.differences.append(Difference(what="discarded", round=number, stated=body.code, found=found))

    def clips(self, number: int, made: tuple[Clip, ...] | None) -> None:
        """The energies and factors that a round states otherwise than its updates give; one difference a round."""
        said = next(body.clips for body in self.bodies if isinstance(body, RoundAggregated) and body.round == number)
        for stated, found in zip_longest(said or (), made or ()):
            if stated != found:
                texts = ["none" if clip is None else f"{clip.energy} ({clip.factor})" for clip in (stated, found)]
                self.differences.append(Difference(what="clips", round=number, stated=texts[0], found=texts[1]))
                return

    def findings(self, found: Findings) -> None:
        """What the detectors are said to have found otherwise; one difference a round."""
        said = [body.findings for body in self.bodies if isinstance(body, FindingsOpened) and body.round == found.round]
        for stated, again in zip_longest(said[0].lines if said else (), found.lines if said else ()):
            if not _alike(stated, again):
                texts = ["nothing" if line is None else _told(line) for line in (stated, again)]
                self.differences.append(Difference(what="findings", round=found.round, stated=texts[0], found=texts[1]))
                return

    def skip(self, what: Literal["model", "loss"], number: int, stated: str, found: str) -> None:
        """A round that cannot be evaluated: a difference, after which the run's sums say nothing."""
        self.whole = False
        self.differences.append(Difference(what=what, round=number, stated=stated, found=found))

    def compare(
        self,
        said: RoundScores,
        table: dict[int, tuple[int, ...]],
        counted: tuple[tuple[int, int] | None, int | None],
    ) -> Iterator[Difference]:
        """What a round's scores state otherwise."""
        slices, named = self.contract.contribution.validation.slices, masks(said)
        for row, losses in table.items():
            coalition = tuple(p for place, p in enumerate(said.players) if named[row] >> place & 1)
            for number, (part, stated, again) in enumerate(zip(slices, said.losses[row], losses, strict=True)):
                self.largest = max(self.largest, abs(stated - again))
                if abs(stated - again) > tolerance(part.count):
                    yield Difference(
                        what="loss",
                        round=said.round,
                        coalition=coalition,
                        slice=number,
                        stated=str(stated),
                        found=str(again),
                    )
        if (said.correct, said.pairs) != counted:
            stated_right, found_right = (
                ", ".join(map(str, ends or ("none",))) + ("" if of is None else f" of {2 * of}")
                for ends, of in ((said.correct, said.pairs), counted)
            )
            yield Difference(what="correct", round=said.round, stated=stated_right, found=found_right)

    def moments(self, values: FloatArray, stated: Moments, rounds: int) -> Iterator[Difference]:
        """Second moments that are stated otherwise.

        A value may be off by what two losses of its row may be in each round, rescaled where an own slice is left out;
        the product of the sums by what that makes of them, and by what adding up its float64 terms in another order
        does.
        """
        ids, again = list(self.contract.by_id()), scoring.second_moments(values).products
        slices, count = self.contract.contribution.validation.slices, values.shape[1]
        alone = {(p,) for p in ids}
        one = {union for unions in by_round(self.bodies).values() for union in unions}
        given = [sum(part.count for part in slices if part.source in members) for members in alone | one]
        own = max(rows for rows in given if rows < count)
        error = 2 * ROW_ERROR * rounds * count / (count - own)
        sizes = np.abs(values).sum(axis=1) * 1e9
        for i, first in enumerate(ids):
            for j, second in enumerate(ids[i:], start=i):
                scale = math.sqrt(float(again[i][i])) * math.sqrt(float(again[j][j]))
                room = error * (sizes[i] + sizes[j]) + count * error**2 + count * 2.0**-50 * scale + 1
                for said in sorted({stated.products[i][j], stated.products[j][i]}):
                    if abs(said - again[i][j]) > room:
                        yield Difference(
                            what="moments", round=0, coalition=(first, second), stated=str(said), found=str(again[i][j])
                        )


def _alike(stated: Finding | None, again: Finding | None) -> bool:
    """Whether two findings are the same: numbers to 1e-3, which another order of adding up does not reach.

    A statistic at its threshold may then be an alarm or none.
    """
    if stated is None or again is None or stated.code != again.code:
        return False
    numbers = [
        (float(a), float(b)) for a, b in ((stated.statistic, again.statistic), (stated.threshold, again.threshold))
    ]
    near = all(a == b or abs(a - b) <= FINDING_ERROR * max(abs(a), abs(b), 1.0) for a, b in numbers)
    statistic, threshold = numbers[0][1], numbers[1][1]
    at_threshold = abs(statistic - threshold) <= FINDING_ERROR * max(abs(threshold), 1.0)
    return near and (at_threshold or (stated.outcome, stated.participants) == (again.outcome, again.participants))


def _told(line: Finding) -> str:
    who = ", ".join(p[:16] for p in line.participants) or "nobody"
    return f"{line.code}: {line.outcome}, {line.statistic} of {line.threshold} ({who})"


def _draws(said: RoundScores, again: RoundScores) -> Iterator[Difference]:
    """First-order values, and what a round's draw of coalitions rests on, stated otherwise by more than a unit.

    One difference a round.
    """
    pairs: list[tuple[str, tuple[int, ...], tuple[int, ...], int]] = []
    if said.first_order is not None:
        pairs += [("first-order values", said.first_order, again.first_order or (), 1)]
    if said.sampling is not None and again.sampling is not None:
        pairs += [(DRAWN[said.sampling.estimator], (said.sampling.draws,), (again.sampling.draws,), 0)]
        for stated, found in zip_longest(said.sampling.errors, again.sampling.errors, fillvalue=()):
            pairs += [("standard errors", stated, found, 1)]
    for name, stated, found, room in pairs:
        for one, other in zip_longest(stated, found, fillvalue=-1):
            if abs(one - other) > room:
                yield Difference(what="draws", round=said.round, stated=f"{one} ({name})", found=str(other))
                return
