"""The auditor's re-evaluation of a run, from what the operator handed it (`bundle`).

Every next model is made again, and the losses of all coalitions or of some are, by the functions that the operator
scores with.

What the bundle lacks, or holds otherwise than the log, is an error: nothing is signed, and the operator is asked again.
What the log itself states otherwise than the updates and the committed rows give is a difference, and is signed.
"""

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedpact_contract.arrays import model_digest
from fedpact_contract.contract import Auditor, Contract
from fedpact_contract.errors import FailedError, FaultError, InputError
from fedpact_contract.evidence import Evidence, read_evidence
from fedpact_contract.log import (
    Body,
    Checkpoint,
    ContractSigned,
    Entry,
    Moments,
    MomentsOpened,
    PeriodSettled,
    RoundScores,
    ScoresOpened,
)
from fedpact_contract.record import Envelope, read_envelope, sign
from fedpact_contract.reevaluation import LISTED, TOLERANCE, Difference, Reevaluation, drawn, tolerance
from fedpact_contract.verify import verify
from fedpact_models.evaluate import evaluate_round
from fedpact_models.features import Examples
from fedpact_models.registry import parameter_count
from fedpact_server import aggregation, bundle, deposit, scoring
from fedpact_server.pool import load_update
from fedpact_server.run_state import FloatArray, load_model

ROW_ERROR = 1e-5
"""What another processor may move a row's loss by, in 1e-9 nat: 100,000 rows make the one unit of `tolerance`."""


@dataclass(slots=True, kw_only=True)
class _Found:
    """What is found round by round."""

    differences: list[Difference] = field(default_factory=list)
    evaluated: int = 0
    largest: int = 0
    values: FloatArray | None = None  # per-example values of the whole run, [all participants, V]
    whole: bool = True  # whether every round could be evaluated


def reevaluate(
    folder: Path,
    party: Auditor,
    keys: tuple[Ed25519PrivateKey, X25519PrivateKey],
    *,
    sample: int | None = None,
    seed: str | None = None,
) -> tuple[Contract, Reevaluation, Envelope[Reevaluation]]:
    """Evaluate a run again.

    Args:
        folder: What `bundle.write` wrote.
        party: The auditor.
        keys: Its keys: what signs, and what opens the deposit.
        sample: How many coalitions of each round, beside nobody and all; None: all, and the second moments.
        seed: What they are drawn by, 32 bytes in hexadecimal; fresh ones by default.

    Returns:
        The contract, what was found, and that signed.

    Raises:
        InputError: no such folder; AUDITOR_OTHER, the contract names another auditor; REEVALUATE_EARLY, the scores are
            not open yet; REEVALUATE_SEED.
        FaultError: REEVALUATE_EVIDENCE, the evidence itself is at fault; or a file of the bundle is missing or is not
            what the log says.
    """
    evidence = read_evidence(folder / bundle.EVIDENCE)
    contract, bodies = _read(evidence, folder)
    if contract.auditor is None or contract.auditor.id != party.id:
        named = "no auditor" if contract.auditor is None else f"the auditor {contract.auditor.id}"
        raise InputError(
            "AUDITOR_OTHER", f"The contract names {named}; these keys are {party.id}.", field="--key", party=party.name
        )
    scores = [body.scores for body in bodies if isinstance(body, ScoresOpened)]
    moments = [body.moments for body in bodies if isinstance(body, MomentsOpened)]
    if not scores or not moments or not any(isinstance(body, PeriodSettled) for body in bodies):
        raise InputError(
            "REEVALUATE_EARLY",
            "The scores are not open yet: nobody but the operator knows what there is to evaluate again.",
            file=folder,
            remedy="Ask for the folder again once the period is closed.",
        )
    if seed is not None and (len(seed) != 64 or not set(seed) <= set("0123456789abcdef") or sample is None):
        raise InputError(
            "REEVALUATE_SEED",
            "A seed is 64 hexadecimal digits, and goes with a sample.",
            field="--seed",
            remedy="Leave it out: a fresh one is drawn and recorded.",
        )
    if sample is not None:
        seed = seed or secrets.token_hex(32)
    found = _Found()
    examples = _rows(folder, bodies, keys[1], contract, found)
    _rounds(folder, contract, bodies, scores, examples, found, sample, seed)
    if found.values is not None and found.whole:
        found.differences += _moments(contract, found.values, moments[0], len(scores))
    head = max((Checkpoint.from_bytes(read_envelope(line).body) for line in evidence.checkpoints), key=lambda c: c.size)
    drawing = examples is not None and sample is not None
    record = Reevaluation(
        contract_id=contract.id,
        auditor=party.id,
        size=head.size,
        root=head.root,
        rounds=len(scores),
        coalitions="none" if examples is None else "all" if sample is None else "sampled",
        sample=sample if drawing else None,
        seed=seed if drawing else None,
        evaluated=found.evaluated,
        tolerance=TOLERANCE,
        largest=found.largest,
        differing=len(found.differences),
        differences=tuple(found.differences[:LISTED]),
    )
    return contract, record, sign(record, keys[0])


def _read(evidence: Evidence, folder: Path) -> tuple[Contract, list[Body]]:
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
    bodies = [Entry.from_bytes(line).open() for line in evidence.log]
    assert isinstance(bodies[0], ContractSigned)  # noqa: S101 - verified evidence begins with it
    return Contract.from_bytes(bodies[0].signed.contract.body), bodies


def _rows(
    folder: Path, bodies: Sequence[Body], key: X25519PrivateKey, contract: Contract, found: _Found
) -> Examples | None:
    """The committed rows; None where the operator deposited none, which is a difference."""
    data = bundle.read_sealed(folder / bundle.SEALED, bodies)
    try:
        return deposit.unseal(data, key, contract)
    except FaultError as err:
        root = contract.contribution.validation.root
        found.differences.append(Difference(what="deposit", round=0, stated=root, found=err.code))
        return None


def _rounds(
    folder: Path,
    contract: Contract,
    bodies: Sequence[Body],
    scores: Sequence[RoundScores],
    examples: Examples | None,
    found: _Found,
    sample: int | None,
    seed: str | None,
) -> None:
    """Every round: the next model, and the losses that are evaluated again."""
    led_to = {0: contract.model.initial_digest} | bundle.models(bodies)
    updates, previous = bundle.updates(bodies), None
    for said in scores:
        base, stated = load_model(folder, led_to[said.round - 1]), led_to[said.round]
        arrays = {p: load_update(folder / bundle.UPDATES, updates[said.round, p]) for p in said.players}
        rows = drawn(said, sample, seed)
        found.evaluated += 0 if examples is None else len(rows)
        if {len(base), *map(len, arrays.values())} != {parameter_count(contract.model, contract.data)}:
            found.differences.append(
                Difference(what="model", round=said.round, stated=stated, found="an update that does not fit the model")
            )
            found.whole = False
            continue
        counts = {p: contract.participant(p).num_examples for p in said.players}
        steps = aggregation.weighted_steps(arrays, counts, contract.training.server_rate)
        digest = model_digest(aggregation.apply(base, steps).astype("<f8").tobytes())
        if digest != stated:
            found.differences.append(Difference(what="model", round=said.round, stated=stated, found=digest))
        if examples is None:
            continue
        try:
            if sample is None:
                again, values = scoring.score_round(contract, said.round, said.players, base, steps, examples, previous)
                _add(contract, said, values, found)
                table, right, previous = dict(enumerate(again.losses)), again.correct, again
            else:
                table, right = _drawn_losses(contract, base, steps, examples, rows)
        except (FailedError, InputError) as err:  # what is not finite has no loss, whatever the operator states
            found.differences.append(Difference(what="loss", round=said.round, stated="losses", found=err.code))
            found.whole = False
            continue
        found.differences += _compare(contract, said, table, right, found)


def _drawn_losses(
    contract: Contract, base: FloatArray, steps: FloatArray, examples: Examples, rows: Sequence[int]
) -> tuple[dict[int, tuple[int, ...]], tuple[int, int]]:
    """Losses by coalition, of these alone: each is a game of one player, whose step is that of all its members.

    The steps are added before the first layer and not behind it: a loss moves by less than another processor moves it.
    """
    counts = [part.count for part in contract.contribution.validation.slices]
    table: dict[int, tuple[int, ...]] = {}
    right = (0, 0)
    for row in (row for row in rows if row):
        members = [step for place, step in enumerate(steps) if row >> place & 1]
        step = aggregation.apply(np.zeros_like(base), np.stack(members))
        found = evaluate_round(contract.model, contract.data, base, step[None], examples, counts, own_slice=[None])
        table[0], table[row] = found.losses
        right = found.correct  # the last row is everybody's
    return table, right


def _compare(
    contract: Contract, said: RoundScores, table: dict[int, tuple[int, ...]], right: tuple[int, int], found: _Found
) -> Iterator[Difference]:
    """What a round's scores state otherwise."""
    slices = contract.contribution.validation.slices
    for row, losses in table.items():
        coalition = tuple(p for place, p in enumerate(said.players) if row >> place & 1)
        for number, (part, stated, again) in enumerate(zip(slices, said.losses[row], losses, strict=True)):
            found.largest = max(found.largest, abs(stated - again))
            if abs(stated - again) > tolerance(part.count):
                yield Difference(
                    what="loss",
                    round=said.round,
                    coalition=coalition,
                    slice=number,
                    stated=str(stated),
                    found=str(again),
                )
    if said.correct != right:
        stated_right, found_right = (f"{before}, {after}" for before, after in (said.correct, right))
        yield Difference(what="correct", round=said.round, stated=stated_right, found=found_right)


def _add(contract: Contract, said: RoundScores, values: FloatArray, found: _Found) -> None:
    """Take a round's per-example values into those of the run."""
    ids = list(contract.by_id())
    if found.values is None:
        found.values = np.zeros((len(ids), values.shape[1]))
    found.values[[ids.index(p) for p in said.players]] += values


def _moments(contract: Contract, values: FloatArray, stated: Moments, rounds: int) -> Iterator[Difference]:
    """Second moments that are stated otherwise.

    A value may be off by what two losses of its row may be in each round, rescaled where an own slice is left out; the
    product of the sums by what that makes of them, and by what adding up its float64 terms in another order does.
    """
    ids, again = list(contract.by_id()), scoring.second_moments(values)
    slices, count = contract.contribution.validation.slices, values.shape[1]
    own = max((part.count for part in slices if part.source in ids), default=0)
    error = 2 * ROW_ERROR * rounds * count / (count - own)
    sizes = np.abs(values).sum(axis=1) * 1e9
    for i, first in enumerate(ids):
        for j, second in enumerate(ids[i:], start=i):
            scale = math.sqrt(float(again.products[i][i])) * math.sqrt(float(again.products[j][j]))
            room = error * (sizes[i] + sizes[j]) + count * error**2 + count * 2.0**-50 * scale + 1
            for row, column in sorted({(i, j), (j, i)}):
                said, found = stated.products[row][column], again.products[row][column]
                if abs(said - found) > room:
                    yield Difference(
                        what="moments", round=0, coalition=(first, second), stated=str(said), found=str(found)
                    )
