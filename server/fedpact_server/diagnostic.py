"""Values of the re-normalised game beside those of the fixed-weight game: a diagnostic, which nobody is paid by.

The two answer different questions: what an update added to the step that was made, and what it is worth beside others
that could stand in its place. Where they order participants differently, the data are unlike.
"""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

from sqlalchemy.engine import Connection

from fedpact_contract.contract import Contract
from fedpact_contract.contribution import admitted_in, period_values
from fedpact_contract.errors import InputError
from fedpact_contract.log import RoundScores
from fedpact_contract.shape import parameter_count
from fedpact_models import aggregation
from fedpact_models.features import Examples
from fedpact_server import scoring
from fedpact_server.pool import map_update
from fedpact_server.run_state import admitted_updates, base_of, load_model, unions_of

MAX_PLAYERS = 8
"""256 models a round, each built and evaluated on its own."""


def renormalised(connection: Connection, contract: Contract, home: Path, examples: Examples) -> Mapping[str, Fraction]:
    """Each participant's value over the rounds that are scored, by id, in 1e-9 nat, from the kept updates.

    On the same rows as its value: own slices are left out. Updates and unions count as they do in the run.

    Args:
        connection: The operator's database.
        contract: Of the fixed-weight game.
        home: The operator's home.
        examples: The validation set.

    Raises:
        InputError: DIAGNOSTIC_GAME: the contract has no mean of a round's updates, or its values are these already;
            DIAGNOSTIC_PLAYERS: a round has too many.
        FaultError: an update or a model is missing, or is not what its name says.
    """
    _check_game(contract)
    terms = {"game": "re-normalised", "estimator": "exact", "max_coalitions": None}
    other = contract.model_copy(update={"contribution": contract.contribution.model_copy(update=terms)})
    arrays, parameters = home / "arrays" / contract.id, parameter_count(contract.model, contract.data)
    rounds: list[RoundScores] = []
    for _, paid in scoring.all_scores(connection, contract.id):
        if len(admitted_in(paid)) > MAX_PLAYERS:
            raise InputError(
                "DIAGNOSTIC_PLAYERS",
                f"Round {paid.round} has {len(admitted_in(paid))} players.",
                field="--diagnostic",
                rule=f"at most {MAX_PLAYERS} players a round, for all whose coalitions a model is built",
                remedy="Leave it out.",
            )
        admitted = admitted_updates(connection, contract.id, paid.round)
        base = load_model(home, base_of(connection, contract.id, paid.round))
        unions = unions_of(connection, contract.id, paid.round)
        updates = {p: map_update(arrays, digest, parameters) for p, digest in admitted.items()}
        steps, _ = aggregation.server_steps(other, updates, aggregation.START, unions)
        before = rounds[-1] if rounds else None
        scores, _ = scoring.score_round(other, paid.round, admitted, base, steps, examples, before, unions)
        rounds.append(scores)
    return period_values(rounds, other)


def _check_game(contract: Contract) -> None:
    reason = {
        "re-normalised": "the values that are paid by are of the re-normalised game already",
        "unanimity": "at client level no single update is looked at",
    }.get(contract.contribution.game)
    if contract.training.server_optimizer is not None:
        reason = "a server's optimizer steps by what earlier rounds left, and not by a mean of the round's updates"
    if reason is not None:
        raise InputError(
            "DIAGNOSTIC_GAME", f"There is no such diagnostic: {reason}.", field="--diagnostic", remedy="Leave it out."
        )
