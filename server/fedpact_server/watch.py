"""What the detectors say of a run, from what is kept of it: updates, models, and values on validation rows."""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.engine import Connection

from fedpact_contract import log
from fedpact_contract.clipping import noise_energy
from fedpact_contract.contract import Contract
from fedpact_contract.errors import InputError
from fedpact_contract.log import Body, Findings, ParticipantExcluded, RoundScores
from fedpact_contract.looks import due, wreckers
from fedpact_contract.unions import Unions
from fedpact_models import aggregation
from fedpact_models.features import Examples
from fedpact_models.gradient import gradient
from fedpact_server import scoring
from fedpact_server.detectors import NEGATIVES, Apart, Finding, Observed, findings, observe
from fedpact_server.pool import map_update
from fedpact_server.run_state import FloatArray, admitted_updates, base_of, load_model, unions_of


class Watch:
    """The detectors over a run: what they hold of the rounds so far, each reduced."""

    def __init__(self, contract: Contract, examples: Examples) -> None:
        self.contract, self.examples = contract, examples
        self._seen: list[Observed] = []
        self._memory = aggregation.START
        self._last: FloatArray | None = None
        self._apart: Apart | None = None

    @property
    def rounds(self) -> int:
        """How many rounds were taken."""
        return len(self._seen)

    def take(
        self,
        scores: RoundScores,
        updates: Mapping[str, NDArray[np.float32]],
        base: FloatArray,
        values: FloatArray,
        unions: Unions,
    ) -> None:
        """Take the next round.

        Args:
            scores: Of the round.
            updates: Its admitted updates as they came, [P], in the order of ids.
            base: The model that it began with, float64 [P].
            values: Per-example values, float64 [players, V].
            unions: Who was one with whom.
        """
        contract, parameters = self.contract, len(base)
        self._apart = self._apart or Apart(_seed(updates))
        counts = {p: party.num_examples for p, party in contract.by_id().items()}
        steps, self._memory = aggregation.server_steps(contract, updates, self._memory, unions)
        step = aggregation.next_model(contract, np.zeros(parameters), steps, unions)
        slope = float(np.linalg.norm(gradient(contract.model, contract.data, base, self.examples)))
        self._seen.append(
            observe(
                scores.round,
                updates,
                examples=counts,
                noise={p: float(noise_energy(contract, n, parameters)) for p, n in counts.items()},
                step=self._last,
                slope=slope * self._longer(updates, step) * float(contract.training.server_rate),
                values=values[[scores.players.index(p) for p in updates]],
                apart=self._apart,
            )
        )
        self._last = step

    def _longer(self, updates: Mapping[str, NDArray[np.float32]], step: FloatArray) -> float:
        """How much longer the server's step is than the mean update times its rate: 1 without an optimizer."""
        contract = self.contract
        if contract.training.server_optimizer is None:
            return 1.0
        counts = {p: contract.participant(p).num_examples for p in updates}
        clipped = aggregation.counted_updates(contract, updates)
        mean = aggregation.apply(
            np.zeros(len(step)), aggregation.weighted_steps(clipped, counts, contract.training.server_rate).values()
        )
        return float(np.linalg.norm(step)) / (float(np.linalg.norm(mean)) or 1.0)

    def said(self, number: int) -> Findings:
        """What all detectors say after this one of the rounds; in the re-normalised game those of updates alone."""
        slices = [(s.source, s.count) for s in self.contract.contribution.validation.slices]
        defences = self.contract.defences
        part = NEGATIVES if defences is None else float(defences.negatives)
        found = findings(self._seen[:number], self.contract.training.rounds, slices, part)
        return Findings(round=number, lines=tuple(logged(f) for f in found if f.code in due(self.contract, number)))


class KeptWatch(Watch):
    """The detectors over what the operator keeps of a run; what they hold is read again after a crash."""

    def __init__(self, contract: Contract, home: Path, examples: Examples) -> None:
        super().__init__(contract, examples)
        self._home = home

    def after(self, connection: Connection, number: int) -> Findings:
        """What all detectors say after a round that is scored.

        Raises:
            FailedError: CONTRIBUTION_VALUES_LOST.
            FaultError: an update or a model is missing, or is not what its name says.
        """
        contract, arrays = self.contract, self._home / "arrays" / self.contract.id
        for _, scores in scoring.all_scores(connection, contract.id):
            if self.rounds < scores.round <= number:
                base = load_model(self._home, base_of(connection, contract.id, scores.round))
                admitted = admitted_updates(connection, contract.id, scores.round)
                updates = {p: map_update(arrays, made, len(base)) for p, made in admitted.items()}
                values = scoring.read_values(arrays, contract, scores)
                self.take(scores, updates, base, values, unions_of(connection, contract.id, scores.round))
        return self.said(number)


def look(connection: Connection, contract: Contract, home: Path, examples: Examples) -> list[log.Finding]:
    """Every finding over the rounds that are scored, round after round, as the run was then.

    Where the contract has defences these are the findings that were committed to; else they are made now.

    Args:
        connection: The operator's database.
        contract: The contract.
        home: The operator's home.
        examples: The validation set.

    Raises:
        InputError: ALARMS_NO_GAME: no single update is scored, so none is compared.
        FailedError: CONTRIBUTION_VALUES_LOST.
        FaultError: an update or a model is missing, or is not what its name says.
    """
    if contract.contribution.game == "unanimity":
        raise InputError(
            "ALARMS_NO_GAME",
            "At client level no single update is looked at, neither for its score nor for an alarm.",
            field="contribution.game",
            remedy="Choose a contract of the trust model record-level-at-each-participant.",
        )
    if contract.defences is not None:
        return [line for _, found in scoring.all_findings(connection, contract.id) for line in found.lines]
    watch = KeptWatch(contract, home, examples)
    rounds = [scores.round for _, scores in scoring.all_scores(connection, contract.id)]
    return [line for number in rounds for line in watch.after(connection, number).lines]


def _seed(updates: Mapping[str, NDArray[np.float32]]) -> bytes:
    """SHA-256 of the updates in the order of ids: nobody who sends one knows it before."""
    digest = sha256()
    for participant in sorted(updates):
        digest.update(updates[participant].astype("<f4").tobytes())
    return digest.digest()


def logged(finding: Finding) -> log.Finding:
    """As it stands in the log."""
    return log.Finding.parse(finding.plain(), code="FINDING")


def exclusions(contract: Contract, found: Findings) -> list[Body]:
    """Who is invited no more after these findings, as the contract says."""
    if contract.defences is None or contract.defences.wreckers != "reject":
        return []
    return [
        ParticipantExcluded(round=found.round, participant=participant, code="WRECKER")
        for participant in sorted(wreckers(found))
    ]
