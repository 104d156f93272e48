"""The delivered model: safetensors with the weights, and a JSON card beside it that says what the weights are."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from fedpact_contract.arrays import model_digest
from fedpact_contract.contract import ClassLabel, Data, Label, Model, SurvivalLabel, check_layers
from fedpact_contract.errors import FaultError, InputError
from fedpact_contract.record import Hex32, Record
from fedpact_models.features import Floats, encode_features
from fedpact_models.registry import parameter_count, parameter_shapes
from fedpact_models.weights import check_flat

if TYPE_CHECKING:
    import polars as pl


class ReleaseCard(Record):
    """What a delivered model is: its task, shape and schema, where it comes from, its privacy label and digest."""

    TYPE = "model-release"

    task: Literal["classification", "regression", "survival"]
    model: Model
    data: Data
    contract_id: Hex32
    round: Annotated[int, Field(ge=0)]
    privacy: dict[str, Any]
    model_digest: Hex32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Release:
    """A delivered model: its card and its weights, float64 [P]."""

    card: ReleaseCard
    weights: Floats


def make_release(
    model: Model,
    data: Data,
    weights: Floats,
    *,
    contract_id: str,
    round: int,  # noqa: A002 - the word for it everywhere
    privacy: dict[str, Any],
) -> Release:
    """A release of these weights; `privacy` is the label, plain JSON values without floats.

    Raises:
        InputError: WEIGHTS_SHAPE, WEIGHTS_NOT_FINITE, RELEASE_FORM.
    """
    check_flat(weights, parameter_count(model, data))
    values = {
        "task": data.label.TASK,
        "model": model.plain(),
        "data": data.plain(),
        "contract_id": contract_id,
        "round": round,
        "privacy": privacy,
        "model_digest": flat_digest(weights),
    }
    return Release(card=ReleaseCard.parse(values, code="RELEASE_FORM"), weights=np.array(weights, dtype=np.float64))


def flat_digest(weights: Floats) -> str:
    """The model's digest: `arrays.model_digest` of the flat little-endian float64 array."""
    return model_digest(np.ascontiguousarray(weights, dtype="<f8").tobytes())


def save_release(path: Path, release: Release) -> tuple[Path, Path]:
    """Write NAME.safetensors and NAME.json; returns both paths. Each file is whole or absent.

    Raises:
        InputError: RELEASE_FORM: the label has no canonical form (a float).
    """
    from safetensors.numpy import save

    tensors: dict[str, Floats] = {}
    start = 0
    for name, shape in parameter_shapes(release.card.model, release.card.data).items():
        size = int(np.prod(shape))
        tensors[name] = release.weights[start : start + size].reshape(shape)
        start += size
    card = release.card.to_bytes()
    weights_path, card_path = release_paths(path)
    _write(weights_path, save(tensors))
    _write(card_path, card)
    return weights_path, card_path


def load_release(path: Path) -> Release:
    """Read a release by either of its two files, and check the weights against the card.

    Raises:
        InputError: RELEASE_FILE_MISSING, RELEASE_UNREADABLE, MODEL_RELEASE_FORM or CANONICAL_* (the card);
            CONTRACT_MODEL, CONTRACT_IMAGE (its model does not fit its data).
        FaultError: MODEL_TENSORS (other tensors than the card's model has), MODEL_DIGEST.
    """
    weights_path, card_path = release_paths(path)
    card = ReleaseCard.from_bytes(_bytes(card_path))
    try:
        check_layers(card.model, card.data)
    except InputError as err:
        err.file = str(card_path)
        raise
    tensors = _tensors(weights_path)
    shapes = parameter_shapes(card.model, card.data)
    if {n: t.shape for n, t in tensors.items()} != shapes or any(t.dtype != np.float64 for t in tensors.values()):
        raise FaultError(
            "MODEL_TENSORS", "The tensors are not those of the model that the card describes.", file=weights_path
        )
    flat = np.concatenate([tensors[name].reshape(-1) for name in shapes])
    if flat_digest(flat) != card.model_digest:
        raise FaultError(
            "MODEL_DIGEST",
            "The weights are not those that the card was made for.",
            file=weights_path,
            field="model_digest",
            remedy="Fetch the model again from where it was delivered.",
        )
    return Release(card=card, weights=flat)


def predict(release: Release, table: "pl.DataFrame", *, file: str, first_line: int | None = None) -> "pl.DataFrame":
    """What the model says of each row: columns `row` (from 1), `predicted`, and of a class its `probability`.

    A number is in the label's unit, within its bounds. Of survival, `predicted` is the mean duration up to the end of
    the last interval, and `survival` the chance to get there without the event. A row that the schema's `drop` rule
    leaves out has nulls.

    Raises:
        InputError: as `features.encode_features`; a missing column is named.
    """
    import polars as pl

    from fedpact_models.evaluate import logits
    from fedpact_models.tasks import task_of

    card = release.card
    x, kept = encode_features(card.data, table, file=file, first_line=first_line)
    rows = np.arange(1, table.height + 1)
    result = pl.DataFrame({"row": rows})
    scores = (
        logits(card.model, card.data, release.weights, x)
        if kept.any()
        else np.empty((0, task_of(card.data.label).outputs))
    )
    found = pl.DataFrame({"row": rows[kept]} | _told(card.data.label, scores))
    return result.join(found, on="row", how="left", maintain_order="left")


def _told(label: Label, scores: Floats) -> "dict[str, pl.Series]":
    """What a model's outputs [n, outputs] say, column by column."""
    import polars as pl

    from fedpact_models.tasks import predicted, probabilities, survival, within_bounds

    if isinstance(label, ClassLabel):
        classes = [label.classes[index] for index in predicted(scores)]
        chances = probabilities(scores).max(axis=1)
        return {"predicted": pl.Series(classes, dtype=pl.String), "probability": pl.Series(chances, dtype=pl.Float64)}
    if isinstance(label, SurvivalLabel):
        with np.errstate(over="ignore"):  # a hazard may be as good as certain
            chances = survival(scores.reshape(-1, len(label.cuts)))
        widths, before = np.diff([0.0, *map(float, label.cuts)]), np.ones((len(chances), 1))
        mean = (np.hstack([before, chances[:, :-1]]) + chances) @ widths / 2
        return {"predicted": pl.Series(mean), "survival": pl.Series(chances[:, -1])}
    low, high = float(label.low), float(label.high)
    return {"predicted": pl.Series(low + (high - low) * (within_bounds(scores) + 1) / 2, dtype=pl.Float64)}


def release_paths(path: Path) -> tuple[Path, Path]:
    """NAME.safetensors and NAME.json, for NAME or either of them."""
    stem = path.with_suffix("") if path.suffix in (".safetensors", ".json") else path
    return stem.with_name(stem.name + ".safetensors"), stem.with_name(stem.name + ".json")


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(content)
    os.replace(partial, path)  # noqa: PTH105 - atomic, and overwrites


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as err:
        raise InputError(
            "RELEASE_FILE_MISSING",
            "The file does not exist.",
            file=path,
            remedy="A model is two files side by side, NAME.safetensors and NAME.json.",
        ) from err
    except OSError as err:
        raise InputError("RELEASE_UNREADABLE", f"The file cannot be read: {err.strerror or err}.", file=path) from err


def _tensors(path: Path) -> dict[str, Floats]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(_bytes(path))
    except (SafetensorError, ValueError, KeyError) as err:
        raise InputError("RELEASE_UNREADABLE", "The file is not a safetensors file.", file=path) from err
