"""From a Flower run to the round loop: what the ServerApp's main calls."""

import time
from pathlib import Path

import structlog

from fedpact_contract.contract import Contract
from fedpact_contract.errors import FailedError, FedpactError
from fedpact_contract.keys import load_key
from fedpact_server import db, validation
from fedpact_server.cluster import evaluator
from fedpact_server.home import OperatorHome
from fedpact_server.rounds import DETAIL_LENGTH, POLL_SECONDS, Loop
from fedpact_server.run_state import RunContext, SupersededError, node_ids, run_keys, run_row, signed_contract
from fedpact_server.transport import Transport

log = structlog.get_logger()

DRIVER_SECONDS = 30.0
"""How long a new Flower run waits for the supervisor to name it."""


def drive(
    home: Path, contract_id: str, transport: Transport, flower_run_id: int, *, accept_test_noise: bool = False
) -> None:
    """Drive one contract's run from a Flower run: what the ServerApp's main calls.

    Returns when the run is completed or stopped, or when another Flower run has taken over.
    """
    operator = OperatorHome.open(home)
    database, evaluate = operator.database(), evaluator(operator.settings.ray)
    context = run_context(home, database, contract_id, str(flower_run_id), accept_test_noise=accept_test_noise)
    examples = validation.load(home, context.contract.contribution.validation.root).examples
    try:
        phase = Loop(context=context, transport=transport, examples=examples, evaluate=evaluate).run()
    except FedpactError as err:
        _tell(context, err)
        raise
    except Exception as err:
        what = f"{type(err).__name__}: {err}"
        remedy = "It is tried again; nothing is scored meanwhile. `fedpact run stop` ends the run."
        _tell(context, FailedError("RUN_FAILED", what, remedy=remedy))
        raise
    log.info("driver ends", contract=contract_id, driver=str(flower_run_id), phase=phase)


def _tell(context: RunContext, err: FedpactError) -> None:
    """Say in the run's status why it does not move; the supervisor tries again."""
    table = db.runs.c
    where = (table.contract_id == context.contract_id, table.driver == context.driver, table.phase == "running")
    with context.database.write() as connection:
        connection.execute(db.runs.update().where(*where).values(detail=str(err)[:DETAIL_LENGTH]))


def run_context(
    home: Path, database: db.Database, contract_id: str, driver: str, *, accept_test_noise: bool = False
) -> RunContext:
    """What is fixed about a run; waits until the supervisor has named this driver.

    Raises:
        SupersededError: the supervisor names another.
    """
    patience = time.monotonic() + DRIVER_SECONDS
    while True:
        with database.read() as connection:
            run = run_row(connection, contract_id)
            if run is not None and run.driver == driver:
                signed = signed_contract(connection, contract_id)
                contract = Contract.from_bytes(signed.contract.body)
                nodes = node_ids(connection, contract)
                break
        if time.monotonic() > patience:
            raise SupersededError("RUN_SUPERSEDED", "The supervisor names another Flower run.")
        time.sleep(POLL_SECONDS)
    return RunContext(
        home=home,
        database=database,
        contract_id=contract_id,
        contract=contract,
        run_key=load_key(home / "keys" / "run" / f"{contract_id}.key"),
        run_keys=run_keys(signed, contract),
        nodes=nodes,
        driver=driver,
        accept_test_noise=accept_test_noise,
    )
