"""Gather what `lift` needs from the demo's folders: the only place where all data is at hand."""

from collections import Counter
from pathlib import Path
from typing import Any

from fedpact_contract.log import RunCompleted
from fedpact_models.features import Examples, encode, row_bytes, select_rows
from fedpact_models.tables import read_table
from fedpact_server import contracts, logbook, validation
from fedpact_server.demo.lift import lift
from fedpact_server.home import OperatorHome
from fedpact_server.run_state import load_model


def compare(home: Path, contract_id: str, agents: dict[str, Path]) -> dict[str, Any]:
    """Each participant's own model against the federation's (`lift.lift`).

    Args:
        home: The operator's home.
        contract_id: The contract, its run completed.
        agents: Entity code -> the agent's home.
    """
    operator = OperatorHome.open(home)
    with operator.database().read() as connection:
        contract = contracts.find(connection, contract_id).contract
        bodies = [entry.open() for entry in logbook.read_entries(connection, contract.id)]
    final = next(body.model_digest for body in bodies if isinstance(body, RunCompleted))
    data = {}
    for party_id, party in contract.by_id().items():
        data[party_id] = _rows(agents[party.entity_code], party.data_set, contract.data, party.num_examples)
    return lift(
        contract,
        load_model(home, contract.model.initial_digest),
        load_model(home, final),
        data,
        validation.load(home, contract.contribution.validation.root).examples,
    )


def _rows(agent: Path, data_set: str, data: Any, count: int) -> Examples:  # noqa: ANN401 - contract.Data
    """The rows that the participant's trainer uses: its source, without what it released, chosen by its own key."""
    import tomllib

    config = tomllib.loads((agent / "agent.toml").read_text("utf-8"))
    source = next(d["source"] for d in config["data_sets"] if d["id"] == data_set)
    path = Path(source["path"])
    options = {k: v for k, v in source.items() if k not in ("path", "rename")}
    examples = encode(data, read_table(path, **options), file=str(path))
    released = agent / "released" / f"{data_set}.jsonl"
    if released.exists():
        examples = _without(examples, encode(data, read_table(released, kind="ndjson"), file=str(released)))
    return select_rows(examples, count, (agent / "keys" / "selection.key").read_bytes())


def _without(examples: Examples, released: Examples) -> Examples:
    """The rows that were not released, as the trainer has them: one fewer of equal rows for each released one."""
    gone = Counter(row_bytes(x, y) for x, y in zip(released.x, released.y, strict=True))
    kept = []
    for index, (x, y) in enumerate(zip(examples.x, examples.y, strict=True)):
        row = row_bytes(x, y)
        gone[row] -= 1
        if gone[row] < 0:
            kept.append(index)
    return Examples(x=examples.x[kept], y=examples.y[kept])
