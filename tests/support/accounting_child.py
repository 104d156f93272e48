"""The accounting of one log in a process of its own: `python accounting_child.py HOME CONTRACT VALIDATION.npz`.

Prints one JSON object: digests of the report, of every statement and of the evidence, what the evaluation of every
round gives when it is done again from the stored models and updates, and a large evaluation of random numbers.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # tests.support
from tests.support.models_kit import a_model, plain_schema, random_examples

from fedpact_contract.canonical import canonical_bytes, sha256_hex
from fedpact_contract.contract import Contract, SignedContract
from fedpact_contract.log import Body, ContractSigned, RevenueRecorded, RoundAggregated, RoundOpened, RoundScores
from fedpact_contract.messages import Update
from fedpact_contract.record import read_envelope
from fedpact_contract.report import build
from fedpact_contract.settlement import settle_period, statement
from fedpact_models import aggregation
from fedpact_models.evaluate import evaluate_round
from fedpact_models.features import Examples
from fedpact_models.registry import parameter_count
from fedpact_server import db, logbook, scoring
from fedpact_server.evidence import evidence_files
from fedpact_server.pool import load_update
from fedpact_server.run_state import load_model


def account(home: Path, contract_id: str, validation: Examples) -> dict[str, object]:
    database = db.Database.in_home(home)
    with database.read() as connection:
        entries = logbook.read_entries(connection, contract_id)
        evidence = evidence_files(connection, contract_id)
    bodies = [entry.open() for entry in entries]
    contract = _contract(bodies)
    return {
        "report": sha256_hex(canonical_bytes(build(entries))),
        "statements": sha256_hex(canonical_bytes(_statements(bodies, contract))),
        "evidence": sha256_hex(canonical_bytes(evidence)),
        "evaluation": [_again(home, contract, bodies, number, validation) for number in range(1, 1 + _rounds(bodies))],
    }


def large() -> str:
    """Digest of an evaluation of 784-330-10 on 1,000 rows: of this size, plain products differ by OpenBLAS threads."""
    rng = np.random.default_rng(0)
    schema, model = plain_schema(784, 10), a_model(330)
    count = parameter_count(model, schema)
    base, steps = rng.normal(size=count) * 0.05, rng.normal(size=(2, count)) * 0.01
    rows = random_examples(rng, 1000, 784, 10)
    found = evaluate_round(model, schema, base, steps, rows, [1000], own_slice=[(), ()])
    return sha256_hex(repr(found.losses).encode() + found.values.astype("<f8").tobytes())


def _statements(bodies: list[Body], contract: Contract) -> list[dict[str, object]]:
    opened = [body for body in bodies if body.TYPE == "scores-opened"]
    moments = next(body.moments for body in bodies if body.TYPE == "moments-opened")
    revenue = next(body for body in bodies if isinstance(body, RevenueRecorded))
    result = settle_period(contract, [b.scores for b in opened], moments, revenue.revenue_fen, revenue.fees_fen)
    return [statement(result, contract, participant) for participant in contract.by_id()]


def _again(home: Path, contract: Contract, bodies: list[Body], number: int, validation: Examples) -> dict[str, object]:
    """One round's losses and values, worked out again; the base's losses are this round's own, not the last one's."""
    base = next(b.base_digest for b in bodies if isinstance(b, RoundOpened) and b.round == number)
    players = next(b.admitted for b in bodies if isinstance(b, RoundAggregated) and b.round == number)
    decided = [b for b in bodies if b.TYPE == "update-decided" and b.round == number]
    digests = {b.participant: Update.from_bytes(read_envelope(b.update).body).update_digest for b in decided}
    arrays = home / "arrays" / contract.id
    steps = aggregation.weighted_steps(
        {p: load_update(arrays, digests[p]) for p in players},
        {p: contract.participant(p).num_examples for p in players},
        contract.training.server_rate,
    )
    admitted = {p: digests[p] for p in players}
    scores, values = scoring.score_round(contract, number, admitted, load_model(home, base), steps, validation, None)
    assert isinstance(scores, RoundScores)
    return {"scores": scores.plain(), "values": sha256_hex(values.astype("<f8").tobytes())}


def _contract(bodies: list[Body]) -> Contract:
    first = bodies[0]
    assert isinstance(first, ContractSigned)
    signed: SignedContract = first.signed
    return Contract.from_bytes(signed.contract.body)


def _rounds(bodies: list[Body]) -> int:
    return sum(isinstance(body, RoundAggregated) for body in bodies)


if __name__ == "__main__":
    folder, contract_name, rows = sys.argv[1:]
    with np.load(rows) as stored:
        examples = Examples(x=stored["x"], y=stored["y"])
    found = account(Path(folder), contract_name, examples) | {"large": large()}
    sys.stdout.write(json.dumps(found) + "\n")
