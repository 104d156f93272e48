"""Try a contract's schema on the own data before signing: by the trainer itself, closed in as it will be later.

What the trainer cannot read or encode here it could not in round 1 either, where the failed attempt costs budget.
"""

import secrets
from dataclasses import dataclass
from pathlib import Path

from fedpact_client import loading, sources
from fedpact_client.children import ABORTED, gate_header
from fedpact_client.config import AgentConfig, DataSet
from fedpact_client.frames import FrameError
from fedpact_client.home import AgentHome
from fedpact_client.quality import GATE
from fedpact_client.spawn import spawn
from fedpact_contract.contract import Contract
from fedpact_contract.errors import FailedError, FedpactError, InputError, RefusedError

READY_SECONDS, CHECK_SECONDS = 120.0, 3600.0
KINDS = frozenset({"ready", "checked", "failed"})
TRAINER = "fedpact_client.trainer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What the trainer found: rows that may be used, by what they are known again."""

    num_rows: int
    fingerprints: tuple[str, ...]


def try_rows(home: AgentHome, config: AgentConfig, contract: Contract, *, traceless: bool = False) -> Trial:
    """Let the trainer read and encode the data set of this enterprise's entry in the contract; trains nothing.

    `traceless`: no key is made to choose rows by, and no log is written: how many rows fit does not hang on the choice.

    Raises:
        InputError: DATA_*, naming file, column and rule, never a value; CONFIG_DATA_SET.
        RefusedError: QUALITY_GATE, the data set breaks a rule of agent.toml.
        FailedError: TRAINER_LOST, it did not start or ended; its log says why; DATA_SOURCE_AWAY and others of
            `loading.rows_of`.
    """
    data_set = config.data_set(contract.participant(home.participant_id).data_set)
    with loading.rows_of(home, data_set, traceless=traceless) as file:
        return _try_rows(home, config, contract, data_set, file, traceless=traceless)


def _try_rows(
    home: AgentHome, config: AgentConfig, contract: Contract, data_set: DataSet, file: Path | None, *, traceless: bool
) -> Trial:
    released = str(home.released_path(data_set.id))
    setup = {
        "read_paths": [
            *(str(p) for p in sources.read_paths(data_set.source, home.path)),
            released,
            str(home.profile_path(data_set.id)),
            str(home.loaded),
        ],
        "threads": config.limits.threads,
        "idle_seconds": int(CHECK_SECONDS),
        "memory": config.limits.memory,
        "scratch": str(home.scratch),
        "train": False,
    }
    order = {
        "contract": contract.to_bytes().decode(),
        "participant": home.participant_id,
        "source": data_set.source.plain(),
        "base_dir": str(home.path),
        "released": released,
        "columns": list(data_set.names),
        "selection_key": (secrets.token_bytes(32) if traceless else home.selection_key()).hex(),
        **gate_header(home, config, contract),
    }
    if file is not None:
        order["loaded"] = str(file)
    log = None if traceless else home.logs / "trainer.log"
    try:
        limits = config.limits
        with spawn(TRAINER, log=log, max_array=0, kinds=KINDS, processors=limits.processors, nice=limits.nice) as child:
            child.pipe.send("setup", setup)
            ready = child.pipe.receive(READY_SECONDS)
            child.pipe.send("check", order)
            frame = child.pipe.receive(CHECK_SECONDS)
    except FrameError as err:
        raise _lost(home, child.process.returncode) from err
    if ready is None or frame is None:
        raise _lost(home, child.process.returncode)
    if frame.kind == "failed":
        places = {k: str(frame.header[k]) for k in ("file", "field", "rule", "remedy") if k in frame.header}
        remedy = places.pop("remedy", "")
        kind = RefusedError if frame.header["code"] == GATE else InputError
        raise kind(str(frame.header["code"]), str(frame.header["message"]), remedy=remedy, **places)
    counts = frame.header
    return Trial(
        num_rows=int(counts["num_rows"]),
        fingerprints=tuple(counts["fingerprints"]),
    )


def _lost(home: AgentHome, code: int) -> FedpactError:
    if code in ABORTED:
        return InputError(**ABORTED[code])
    return FailedError(
        "TRAINER_LOST",
        "The trainer did not start, or ended without an answer.",
        file=home.logs / "trainer.log",
        remedy="Its log says why; a machine without enough memory is the usual cause.",
    )
