"""Coalitions on many processes or machines, by Ray: the same integers as in one process.

An example's loss is worked out from that example alone, so the rows are dealt out first: no product of a first layer is
computed twice. Where there are more processors than pieces of rows the list of coalitions is dealt out too. The
integers are added up here, from the per-example losses that come back, exactly as without Ray.

Steps, base model and rows lie in Ray's object store, which is shared memory and spills to the disk; a task reads one
step at a time. A task whose process or machine dies is run again elsewhere.

Whoever reaches a Ray cluster's ports can run code on its machines, and they see the updates: an operator's own machines
behind its own firewall, or none. What it sends between machines is in the clear unless its own TLS is set up.
"""

import hashlib
import importlib
import importlib.util
import os
import socket
from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpact_contract.contract import Data, Model
from fedpact_contract.errors import FailedError, FedpactError, InputError, ServiceError
from fedpact_models.coalitions import Rows
from fedpact_models.evaluate import (
    CoalitionLosses,
    Evaluate,
    added_up,
    by_example_losses,
    check_coalitions,
    evaluate_coalitions,
)
from fedpact_models.features import Examples, Floats, Targets

LOCAL = "local"
"""The setting for processes of this machine alone."""

LEAST_ROWS = 128
"""Rows of a task: with fewer the processor's products are slower."""

RETRIES = 5
"""How often a task is run again whose process died."""

REACH_SECONDS = 5.0
"""How long a cluster's port may take to answer; Ray itself tries for minutes."""

Piece = tuple[tuple[Floats, dict[int, Floats]], str]
"""`by_example_losses` of a piece, and what this processor makes of exp and log."""


def evaluator(address: str | None) -> Evaluate:
    """What evaluates lists of coalitions for this setting of operator.toml.

    Raises:
        InputError: RAY_MISSING.
    """
    if address is None:
        return evaluate_coalitions
    if importlib.util.find_spec("ray") is None:
        raise InputError(
            "RAY_MISSING",
            "Coalitions are to be evaluated on Ray, which is not installed.",
            field="ray",
            remedy="Install it, `pip install 'fedpact[ray]'`, or take the line out of operator.toml.",
        )
    return _Cluster(address)


class _Cluster:
    """Evaluates on a cluster, to which it connects when it is first used."""

    def __init__(self, address: str) -> None:
        self._address = address

    def __call__(
        self,
        model: Model,
        data: Data,
        base: NDArray[np.floating],
        steps: Rows,
        examples: Examples,
        slices: Sequence[int],
        masks: Sequence[int],
    ) -> CoalitionLosses:
        """As `evaluate_coalitions`.

        Raises:
            InputError: as there.
            FailedError: as there; RAY_FAILED, RAY_ARITHMETIC.
            ServiceError: RAY_UNREACHABLE.
        """
        check_coalitions(len(steps), examples, slices, masks)
        ray = _connected(self._address)
        from ray.exceptions import RayError, RayTaskError

        try:
            kept = [ray.put(np.asarray(steps[player])) for player in range(len(steps))]
            common = ray.put((model, data, np.asarray(base)))
            task = ray.remote(num_cpus=1, max_retries=RETRIES)(_evaluate)
            rows, places = _dealt(len(examples), len(masks), int(ray.cluster_resources().get("CPU", 1)))
            parts = [ray.put((examples.x[a:b], examples.y[a:b])) for a, b in pairwise(rows)]
            waiting = [
                (slice(first, last), slice(a, b), task.remote(common, kept, part, list(masks[first:last])))
                for (a, b), part in zip(pairwise(rows), parts, strict=True)
                for first, last in pairwise(places)
            ]
            found = [(which, inside, ray.get(future)) for which, inside, future in waiting]
        except RayTaskError as err:
            if isinstance(err.cause, FedpactError):
                raise err.cause from None
            raise _failed(err) from err
        except RayError as err:
            raise _failed(err) from err
        return added_up(data, *_joined(found, len(masks), len(examples)), examples, slices)


def _evaluate(
    common: tuple[Model, Data, NDArray[np.floating]],
    steps: list[object],
    part: tuple[Floats, Targets],
    masks: list[int],
) -> Piece:
    """A task: some coalitions on some rows."""
    model, data, base = common
    return by_example_losses(model, data, base, _Kept(steps), Examples(x=part[0], y=part[1]), masks), arithmetic()


class _Kept:
    """Steps in Ray's store, each mapped when it is asked for."""

    def __init__(self, references: list[object]) -> None:
        self._references = references

    def __len__(self) -> int:
        return len(self._references)

    def __getitem__(self, player: int, /) -> NDArray[np.floating]:
        import ray

        return np.asarray(ray.get(self._references[player]))


def _dealt(rows: int, masks: int, processors: int) -> tuple[list[int], list[int]]:
    """Edges of the pieces of rows, and of the list's."""
    by_rows = max(1, min(processors, rows // LEAST_ROWS))
    by_masks = min(masks, -(-processors // by_rows))
    return [rows * i // by_rows for i in range(by_rows + 1)], [masks * i // by_masks for i in range(by_masks + 1)]


def _joined(pieces: list[tuple[slice, slice, Piece]], masks: int, rows: int) -> tuple[Floats, dict[int, Floats]]:
    """The pieces as one list's `by_example_losses`."""
    by_example, marks, own = np.empty((masks, rows)), dict[int, Floats](), arithmetic()
    for which, inside, ((losses, marked), theirs) in pieces:
        if theirs != own:
            raise FailedError(
                "RAY_ARITHMETIC",
                "A machine of the Ray cluster computes other last bits than this one, so integers could differ.",
                remedy="Take machines of one kind, with the same numpy.",
            )
        by_example[which, inside] = losses
        for mask, of_rows in marked.items():
            marks.setdefault(mask, np.empty(rows))[inside] = of_rows
    return by_example, marks


def arithmetic() -> str:
    """A digest of exp and log of a few thousand numbers here: alike where all losses have the same bits."""
    values = np.exp(np.linspace(-40.0, 5.0, 4097)), np.log(np.linspace(1e-9, 50.0, 4097))
    return hashlib.sha256(b"".join(value.tobytes() for value in values)).hexdigest()


def _connected(address: str) -> ModuleType:
    """Ray, connected.

    Raises:
        ServiceError: RAY_UNREACHABLE.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # else it tells its makers
    os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"  # of several tasks that fail the first is told of
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray = importlib.import_module("ray")
    if not ray.is_initialized():
        try:
            if address != LOCAL:
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), REACH_SECONDS).close()
            ray.init(address=address, log_to_driver=False, configure_logging=False, **_local(address))
        except (OSError, RuntimeError, ValueError, OverflowError) as err:  # ConnectionError is an OSError
            raise ServiceError(
                "RAY_UNREACHABLE",
                f"The Ray cluster at {address} does not answer.",
                field="ray",
                remedy="Start it (`ray start`), on this machine too; or correct `ray` in operator.toml.",
            ) from err
    return ray


def _local(address: str) -> dict[str, Any]:
    return {"include_dashboard": False} if address == LOCAL else {}


def _failed(err: Exception) -> FailedError:
    return FailedError(
        "RAY_FAILED",
        f"Coalitions could not be evaluated on Ray: {str(err).strip().splitlines()[-1][:300]}",
        remedy="Every machine needs the same version of fedpact[server,ray]; without `ray` it goes on in one process.",
    )
