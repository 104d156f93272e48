"""The trainer: `python -m fedpact_client.trainer`, started by the guard. It has the data; no key, token or network.

First it closes itself in, then it imports torch. Frames from the guard and its answers:

    setup  {read_paths, threads, idle_seconds, memory?, scratch?, train?}      -> ready   {isolation}
    train  {contract, participant, source, base_dir, columns, selection_key,   -> update  {noise, num_examples,
            released?, round, attempt}, array: base model, little-endian float64   fingerprints}, array: float32
    measure {contract, participant, source, base_dir, columns, selection_key,  -> update, as above
            released?, kind}, array: the initial model for a baseline
    check  {contract, participant, source, base_dir, columns, selection_key,   -> checked {num_rows, fingerprints}
            released?, gate?}
    each of these three also has loaded?, the file with a database's rows      -> wanted  {}, where it is not there yet
    train, check                                                               -> failed  {code, message, file, ...}

`code` is DATA_*, TRAINING_* or QUALITY_* and may leave the enterprise; everything else in `failed` stays there. Exit
codes: 0 the guard closed the pipe, or nothing came for `idle_seconds`; 1 a malformed frame; 2 a header with wrong
values.
"""

import ctypes
import functools
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import structlog
from pydantic import Field, StringConstraints

from fedpact_client import sources
from fedpact_client.config import DataSet
from fedpact_client.frames import Frame, FrameError, Pipe
from fedpact_client.sandbox import close_in, limit_memory
from fedpact_client.sources import Source
from fedpact_client.spawn import child_main
from fedpact_contract.canonical import canonical_bytes, parse_canonical
from fedpact_contract.contract import Contract, Count, MeasurementKind
from fedpact_contract.errors import FaultError, FedpactError, InputError, RefusedError
from fedpact_contract.output import counted
from fedpact_contract.record import Hex32, Name, Part, decimal_text
from fedpact_contract.request import utc_now
from fedpact_contract.shape import feature_count

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fedpact_models.dp import Noise
    from fedpact_models.features import Examples, Floats
    from fedpact_models.scratch import Scratch

ORDERS = frozenset({"setup", "train", "measure", "check"})
ANSWERS = frozenset({"ready", "update", "checked", "wanted", "failed"})
SETUP_SECONDS = 60.0
WARM = 4
"""Data sets kept in memory, one for each contract."""


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h

AbsolutePath = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^/[^\x00]*$")]

log = structlog.get_logger()
_scratch: "Scratch | None" = None


class Setup(Part):
    """What the trainer may read and use.

    `memory`: MiB for data, all that it allocates; None sets no limit. `scratch`: a folder for files without a name,
    opened before it closes itself in, for rows that would take too much memory. `train`: false where it will only check
    data, which needs no torch.
    """

    read_paths: Annotated[tuple[AbsolutePath, ...], Field(max_length=10_000)]
    threads: Annotated[int, Field(ge=1, le=1024)]
    idle_seconds: Annotated[int, Field(ge=1, le=86_400)]
    memory: Annotated[int, Field(ge=256, le=2**24)] | None = None
    scratch: AbsolutePath | None = None
    train: bool = True


@dataclass(frozen=True, slots=True)
class _Loaded:
    """Where a database's rows lie for the moment: no part of what is kept warm."""

    path: str | None = field(compare=False)


class RowsWantedError(Exception):
    """A database's rows are not there: the guard lets them be loaded, and asks again."""


class RowsOrder(Part):
    """Which rows, for which contract (its canonical text).

    `columns` are those of the data set's card; `released` is a file of rows that training leaves out; by
    `selection_key` (hexadecimal) exactly the contracted rows are chosen. `loaded` is where the rows of a database lie
    while it is asked for.
    """

    contract: str
    participant: Hex32
    source: Source
    base_dir: AbsolutePath
    columns: Annotated[tuple[Name, ...], Field(min_length=1)]
    released: AbsolutePath | None = None
    loaded: AbsolutePath | None = None
    selection_key: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{2}){16,64}$")]


class Gate(Part):
    """A data set whose rules are to be kept before it is trained on, and where the last signed card's profile is."""

    data_set: DataSet
    profile: AbsolutePath


class CheckOrder(RowsOrder):
    """A look at the rows that trains nothing."""

    gate: Gate | None = None


class TrainOrder(RowsOrder):
    """One attempt at one round."""

    round: Count
    attempt: Count


class MeasureOrder(RowsOrder):
    """One measurement outside the rounds."""

    kind: MeasurementKind


FORMS: dict[str, type[RowsOrder]] = {"train": TrainOrder, "measure": MeasureOrder, "check": CheckOrder}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Rows to train on, and what the whole source was: rows that may be used, by what it is known again.

    The fingerprints are of the files' bytes, of the table under the card's columns, of the rows under the contract's.
    """

    examples: "Examples"
    num_rows: int
    fingerprints: tuple[str, ...]


def main(noise_factory: "Callable[[], Noise] | None" = None) -> NoReturn:
    """Serve the guard until it closes the pipe; then end the process.

    Args:
        noise_factory: Makes the source of noise, once, inside the closed process; None is the one that production
            has, `SystemNoise`. Nothing outside a program's own code can choose another.
    """
    try:
        code = _serve(child_main(kinds=ORDERS), noise_factory)
    except (FaultError, InputError) as err:  # also a guard that is gone while we answer
        log.error("trainer ends", code=err.code, reason=str(err))
        code = err.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # nothing is to be put away, and taking torch apart takes a second


def _serve(pipe: Pipe, noise_factory: "Callable[[], Noise] | None") -> int:
    frame = pipe.receive(SETUP_SECONDS)
    if frame is None:
        return 0
    _due(frame, "setup")
    setup = Setup.parse(frame.header, code="SETUP")
    header, noise = _set_up(setup, noise_factory)
    pipe.send("ready", header)
    while True:
        try:
            frame = pipe.receive(float(setup.idle_seconds))
        except FrameError as err:
            if err.code != "FRAME_TIMEOUT" or pipe.closed:
                raise
            log.info("trainer idle", seconds=setup.idle_seconds)
            return 0
        if frame is None:
            return 0
        _due(frame, *(("train", "measure", "check") if setup.train else ("check",)))
        pipe.send(*_answer(frame, noise))


def _due(frame: Frame, *kinds: str) -> None:
    if frame.kind not in kinds:
        raise FaultError("TRAINER_ORDER", f"A frame of kind {frame.kind} came; due is {' or '.join(kinds)}.")


def _set_up(setup: Setup, noise_factory: "Callable[[], Noise] | None") -> "tuple[dict[str, Any], Noise | None]":
    """Close in, then import: numpy, polars and torch start threads, which a later closing would leave outside.

    The source of noise is None where nothing will be trained.
    """
    began = time.monotonic()
    if setup.memory is not None:
        limit_memory(setup.memory << 20)
    files = [] if setup.scratch is None else sources.nameless(setup.scratch)
    isolation = close_in([Path(path) for path in setup.read_paths])
    _keep_memory()
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"):
        os.environ[variable] = str(setup.threads)  # read when the libraries are loaded, below
    import fedpact_models.choosing  # noqa: F401 - loaded now, so that the first order does not wait
    from fedpact_models.scratch import IN_MEMORY, Scratch

    global _scratch  # set once, before the first order
    _scratch = Scratch(files, IN_MEMORY if setup.memory is None else (setup.memory << 20) // sources.MEMORY_PART)
    noise = _load_training(setup.threads, noise_factory) if setup.train else None
    label = "none" if noise is None else noise.label
    log.info("trainer ready", isolation=isolation.sentence, noise=label, seconds=time.monotonic() - began)
    return {"isolation": isolation.plain()}, noise


def _load_training(threads: int, noise_factory: "Callable[[], Noise] | None") -> "Noise":
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = sys.prefix  # torch insists on a folder that exists, and never uses it here
    import torch

    import fedpact_models.training  # noqa: F401 - loaded now, so that the first round does not wait
    from fedpact_models.dp import SystemNoise

    torch.set_num_threads(threads)
    _warm_up()
    return (noise_factory or SystemNoise)()


def _keep_memory() -> None:
    """Let malloc keep freed memory: most of the time of per-example gradients is page faults otherwise."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def _warm_up() -> None:
    """One private step on nothing: what torch and opacus load on first use is loaded now, or fails now."""
    import torch

    from fedpact_models.dp import SystemNoise, dp_sgd

    dp_sgd(
        torch.nn.Linear(1, 2, dtype=torch.float64),
        torch.zeros(8, 1, dtype=torch.float64),
        torch.zeros(8, dtype=torch.int64),
        steps=1,
        sample_rate=0.999,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        denominator=8.0,
        learning_rate=1.0,
        noise=SystemNoise(),
        physical_batch=8,
    )


def _answer(frame: Frame, noise: "Noise | None") -> tuple[str, dict[str, Any], bytes]:
    """The answer to one order; every failure of data or training is a `failed` frame.

    Raises:
        InputError: the header has wrong values, which no guard sends.
    """
    order = FORMS[frame.kind].parse(frame.header, code="TRAINER_HEADER")
    try:
        if isinstance(order, TrainOrder) and noise is not None:
            return _train(order, frame.array, noise)
        if isinstance(order, MeasureOrder) and noise is not None:
            return _measure(order, frame.array, noise)
        if isinstance(order, CheckOrder) and order.gate is not None:
            _check_gate(order.gate, Path(order.base_dir), order.loaded)
        return _check(order)
    except RowsWantedError:
        return "wanted", {}, b""
    except FedpactError as err:
        return _failed(err.as_dict())
    except MemoryError:
        return _failed(_MEMORY)
    except Exception as err:  # noqa: BLE001 - the process's edge: a fixed code for the guard, the place for the log
        # Where it failed and as what: an exception's text may quote a cell, and logs travel to whoever mends a fault.
        log.error("training failed", kind=type(err).__name__, trace="".join(traceback.format_tb(err.__traceback__)))
        return _failed(_MEMORY if "allocate memory" in str(err) else _INTERNAL)  # torch has no type of its own for it


_MEMORY = {
    "code": "TRAINING_MEMORY",
    "message": "Training needs more memory than it may use.",
    "remedy": "Raise limits.memory in agent.toml, or use a larger machine.",
}
_INTERNAL = {
    "code": "TRAINING_INTERNAL",
    "message": "Training stopped at a fault of the program.",
    "remedy": "The trainer's log has the details.",
}


def _failed(reason: Mapping[str, str]) -> tuple[str, dict[str, Any], bytes]:
    """A `failed` frame; a code of another kind becomes TRAINING_INPUT and stands in the message."""
    header = dict(reason)
    if not header["code"].startswith(("DATA_", "TRAINING_", "QUALITY_")):
        header |= {"code": "TRAINING_INPUT", "message": f"{reason['code']}: {reason['message']}"}
    log.warning("training refused", code=header["code"], reason=header["message"])
    return "failed", header, b""


def _check(order: RowsOrder) -> tuple[str, dict[str, Any], bytes]:
    rows = _rows(order)
    return "checked", {"num_rows": rows.num_rows, "fingerprints": list(rows.fingerprints)}, b""


def _check_gate(gate: Gate, base_dir: Path, loaded: str | None) -> None:
    """Hold the data set against its own rules; whatever keeps them from being checked is a refusal too.

    Raises:
        RefusedError: QUALITY_GATE.
    """
    from fedpact_client import quality

    source = gate.data_set.source
    if source.is_database and loaded is None:
        raise RowsWantedError
    rows, today = None if loaded is None else Path(loaded), utc_now().date()
    try:
        quality.check(gate.data_set, base_dir, Path(gate.profile), today, loaded=rows, scratch=_scratch)
    except RefusedError:
        raise
    except Exception as err:
        places = "".join(traceback.format_tb(err.__traceback__))  # without its text, which may quote a cell
        log.error("rules not checked", error=type(err).__name__, trace=places)
        raise RefusedError(
            quality.GATE,
            "The data set's rules could not be checked, for want of memory or by a fault of the program.",
            remedy="The trainer's log has the details; limits.memory in agent.toml is what it may use.",
        ) from err


def _train(order: TrainOrder, base: bytes, noise: "Noise") -> tuple[str, dict[str, Any], bytes]:
    from fedpact_models.training import local_update

    contract, rows = _contract(order.contract), _rows(order)
    began = time.monotonic()
    update = local_update(contract, _weights(base), rows.examples, noise)
    log.info("trained", round=order.round, attempt=order.attempt, seconds=time.monotonic() - began)
    return _update(rows, update, noise)


def _measure(order: MeasureOrder, base: bytes, noise: "Noise") -> tuple[str, dict[str, Any], bytes]:
    from fedpact_models.statistics import noised_sums
    from fedpact_models.training import local_baseline

    contract, rows = _contract(order.contract), _rows(order)
    if order.kind == "statistics":
        return _update(rows, noised_sums(contract, rows.examples, noise), noise)
    return _update(rows, local_baseline(contract, _weights(base), rows.examples, noise), noise)


def _weights(base: bytes) -> "Floats":
    import numpy as np

    if len(base) % 8:
        raise InputError("TRAINING_BASE", "The base model is no array of float64.")
    return np.frombuffer(base, dtype="<f8").astype(np.float64)


def _rows(order: RowsOrder) -> Rows:
    where = (order.contract, _key(order.source), order.base_dir, order.columns, order.released)
    return _load_warm(*where, _Loaded(order.loaded), order.participant, order.selection_key)


def _update(rows: Rows, update: "NDArray[np.floating]", noise: "Noise") -> tuple[str, dict[str, Any], bytes]:
    header = {"noise": noise.label, "num_examples": len(rows.examples), "fingerprints": list(rows.fingerprints)}
    return "update", header, update.astype("<f4").tobytes()


@functools.lru_cache(maxsize=WARM)
def _contract(text: str) -> Contract:
    return Contract.from_bytes(text.encode())


def _key(source: Source) -> bytes:
    return canonical_bytes(source.plain())


def _load(
    contract: str,
    source: bytes,
    base_dir: str,
    columns: tuple[str, ...],
    released: str | None,
    loaded: _Loaded,
    participant: str,
    key: str,
) -> Rows:
    """Choose the contracted number of rows among those that were not released, look for copies among them.

    Raises:
        InputError: DATA_*.
    """
    from fedpact_models.choosing import Cap, Table, choose
    from fedpact_models.features import encode
    from fedpact_models.tables import first_line, read_table

    agreed = _contract(contract)
    me, entity = agreed.participant(participant), agreed.privacy.entity
    origin, folder = Source.parse(parse_canonical(source), code="SOURCE"), Path(base_dir)
    if origin.is_database and loaded.path is None:
        raise RowsWantedError
    place, where = sources.place(origin, folder), sources.loaded(origin, loaded.path)
    rows = sources.rows_at_once(feature_count(agreed.data))
    label, whose = agreed.data.label_columns, [] if entity is None else [entity.column]
    wanted = {*columns, *(column.name for column in agreed.data.columns), *label, *whose}
    name = place if origin.is_database else None
    names = sources.comparable(next(sources.batches(where, folder, rows, columns=wanted)).frame, columns)
    gone = None
    if released is not None and Path(released).exists():
        gone = encode(agreed.data, read_table(released, kind="ndjson"), file=released)
    chosen = choose(
        Table(
            batches=lambda: sources.batches(where, folder, rows, name=name, columns=wanted),
            first_line=first_line(where.kind, where.column_names),
            digests=lambda frame: sources.row_digests(frame, names),
            title=sources.table_title(names),
            file=place,
        ),
        agreed.data,
        n=me.num_examples,
        key=bytes.fromhex(key),
        cap=None if entity is None else Cap(column=entity.column, max_rows=entity.max_rows),
        released=gone,
        scratch=_scratch,
    )
    content = [] if origin.is_database else [sources.content_fingerprint(where, folder)]
    _check_duplicates(agreed, me.data_set, chosen.copies, place)
    return Rows(
        examples=chosen.examples,
        num_rows=chosen.num_rows,
        fingerprints=(*content, chosen.table_fingerprint, chosen.rows_fingerprint),
    )


_load_warm = functools.lru_cache(maxsize=WARM)(_load)


def _check_duplicates(contract: Contract, data_set: str, copies: int, file: str) -> None:
    """No more of the rows that would be trained on are exact copies of each other than the contract allows.

    Raises:
        InputError: DATA_DUPLICATES: how many, never which.
    """
    most = None if contract.defences is None else contract.defences.max_duplicates
    count = next(p.num_examples for p in contract.participants if p.data_set == data_set)
    if most is None or copies <= most * count:
        return
    different, what = count - copies, "is an exact copy" if copies == 1 else "are exact copies"
    raise InputError(
        "DATA_DUPLICATES",
        f"Of the {counted(count, 'row')} to train on {copies} {what} of another, features and label "
        f"({copies / count:.1%}); {different} are different.",
        file=file,
        field=f"data set {data_set}",
        rule=f"at most {decimal_text(most)} of the rows (defences.max_duplicates)",
        remedy="Drop the copies from the file. If too few rows are left, declare fewer examples on a new card "
        "(fedpact-agent card) and agree on a contract with that number.",
    )


if __name__ == "__main__":
    main()
