"""Try a contract's schema on the own data before signing: by the trainer itself, closed in as it will be later.

What the trainer cannot read or encode here it could not in round 1 either, where the failed attempt costs budget. What
it needs besides, to train, is counted from the contract.
"""

import secrets
import shutil
import time
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
from fedpact_contract.shape import feature_count, parameter_count

READY_SECONDS, CHECK_SECONDS = 120.0, 3600.0
KINDS = frozenset({"ready", "checked", "failed"})
TRAINER = "fedpact_client.trainer"

MEBIBYTE = 1 << 20
TORCH, TORCH_A_THREAD = 190, 18
"""MiB that a trainer has more with torch than without, at most: measured at 1, 2 and 8 threads."""
TRAINING, TRAINING_A_THREAD = 460, 18
"""MiB that a trainer takes for a small contract: its libraries, one batch of rows, gradients of so many rows."""
A_PARAMETER, A_ROW = 8 * 7, 100
"""Bytes in memory of each parameter (base, weights, sum, noise and what it is made of, update), and of each contracted
row while it is chosen (digest, rank, order, target), wherever its features lie."""
A_SOURCE_ROW = 250
"""Bytes on disk of each row while rows are chosen (`choosing.RECORD`, and sorted copies)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What the trainer found: rows that may be used, by what they are known again."""

    num_rows: int
    fingerprints: tuple[str, ...]


def check_room(home: AgentHome, config: AgentConfig, contract: Contract) -> None:
    """Training by this contract fits into `limits.memory`, and its encoded rows onto the disk: before a row is read.

    Rows, a float64 a feature, lie on the disk of the home where they are more than a part of that memory.

    Raises:
        RefusedError: SIGN_MEMORY, SIGN_SCRATCH.
    """
    rows, limits = contract.participant(home.participant_id).num_examples, config.limits
    encoded, share = rows * feature_count(contract.data) * 8, limits.memory * MEBIBYTE // sources.MEMORY_PART
    counted = parameter_count(contract.model, contract.data) * A_PARAMETER + rows * A_ROW + min(encoded, share)
    needed = TRAINING + TRAINING_A_THREAD * limits.threads + counted // MEBIBYTE
    if needed > limits.memory:
        raise RefusedError(
            "SIGN_MEMORY",
            f"Training by this contract takes about {needed} MiB of memory; limits.memory is {limits.memory}.",
            file=home.config_path,
            field="limits.memory",
            rule=f"{parameter_count(contract.model, contract.data)} parameters, {rows} rows, {limits.threads} threads",
            remedy="Raise limits.memory in agent.toml where the machine has it, or agree on a contract with a smaller "
            "model or fewer examples. Round 1 would fail, and be charged.",
        )
    free, asked = shutil.disk_usage(home.path).free, encoded + rows * A_SOURCE_ROW
    if asked > max(share, free):
        raise RefusedError(
            "SIGN_SCRATCH",
            f"The contract's rows take {asked // MEBIBYTE} MiB of disk while they are trained on; {free // MEBIBYTE} "
            "MiB are free.",
            file=home.scratch,
            field="participants.num_examples",
            rule=f"{rows} rows of {feature_count(contract.data)} features of 8 bytes, and {A_SOURCE_ROW} bytes each",
            remedy="Make room on the disk of the agent's home, or agree on a contract with fewer examples or features.",
        )


def try_rows(home: AgentHome, config: AgentConfig, contract: Contract, *, traceless: bool = False) -> Trial:
    """Let the trainer read and encode the data set of this enterprise's entry in the contract; trains nothing.

    `traceless`: no key is made to choose rows by, and no log is written: how many rows fit does not hang on the choice.

    Raises:
        InputError: DATA_*, naming file, column and rule, never a value; CONFIG_DATA_SET.
        RefusedError: QUALITY_GATE, the data set breaks a rule of agent.toml; SIGN_LOOK, it takes longer than a round.
        FailedError: TRAINER_LOST, it did not start or ended; its log says why; DATA_SOURCE_AWAY and others of
            `loading.rows_of`.
    """
    data_set = config.data_set(contract.participant(home.participant_id).data_set)
    began = time.monotonic()
    with loading.rows_of(home, data_set, traceless=traceless) as file:
        loaded = time.monotonic() - began
        found, looked = _try_rows(home, config, contract, data_set, file, traceless=traceless)
    check_look(contract, loaded + looked)
    return found


def check_look(contract: Contract, seconds: float) -> None:
    """The first look at the rows, which took so long, ends before a round does.

    Raises:
        RefusedError: SIGN_LOOK.
    """
    deadline = contract.participation.deadline_seconds
    if seconds > deadline:
        raise RefusedError(
            "SIGN_LOOK",
            f"The first look at the rows took {seconds:.0f} seconds; by the contract a round ends after {deadline}.",
            field="participation.deadline_seconds",
            rule="rows are read and encoded in the first round, within its deadline",
            remedy="Try again while the machine does nothing else, or agree on a contract with a longer deadline or "
            "fewer rows. Round 1 would be missed.",
        )


def _try_rows(
    home: AgentHome, config: AgentConfig, contract: Contract, data_set: DataSet, file: Path | None, *, traceless: bool
) -> tuple[Trial, float]:
    """What the trainer finds, and how many seconds it looks."""
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
        "memory": max(256, config.limits.memory - TORCH - TORCH_A_THREAD * config.limits.threads),
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
    ready = None
    try:
        limits = config.limits
        with spawn(TRAINER, log=log, max_array=0, kinds=KINDS, processors=limits.processors, nice=limits.nice) as child:
            child.pipe.send("setup", setup)
            ready = child.pipe.receive(READY_SECONDS)
            began = time.monotonic()
            child.pipe.send("check", order)
            frame = child.pipe.receive(CHECK_SECONDS)
            seconds = time.monotonic() - began
    except FrameError as err:
        if ready is not None and err.code == "FRAME_TIMEOUT":
            check_look(contract, CHECK_SECONDS)
        raise _lost(home, child.process.returncode) from err
    if ready is None or frame is None:
        raise _lost(home, child.process.returncode)
    if frame.kind == "failed":
        places = {k: str(frame.header[k]) for k in ("file", "field", "rule", "remedy") if k in frame.header}
        remedy = places.pop("remedy", "")
        kind = RefusedError if frame.header["code"] == GATE else InputError
        raise kind(str(frame.header["code"]), str(frame.header["message"]), remedy=remedy, **places)
    counts = frame.header
    found = Trial(num_rows=int(counts["num_rows"]), fingerprints=tuple(counts["fingerprints"]))
    return found, seconds


def _lost(home: AgentHome, code: int) -> FedpactError:
    if code in ABORTED:
        return InputError(**ABORTED[code])
    return FailedError(
        "TRAINER_LOST",
        "The trainer did not start, or ended without an answer.",
        file=home.logs / "trainer.log",
        remedy="Its log says why; a machine without enough memory is the usual cause.",
    )
