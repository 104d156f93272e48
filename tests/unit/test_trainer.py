"""The trainer's answers, without its process: rows, codes, and what may leave."""

import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import structlog
from tests.support.models_kit import a_model, a_schema, category, duplicate_count, number, training_contract
from tests.support.noise import FixedNoise

from fedpact_client import sources, trainer
from fedpact_client.frames import Frame
from fedpact_client.sources import Source
from fedpact_contract.canonical import canonical_bytes
from fedpact_contract.contract import Contract
from fedpact_contract.errors import FailedError, InputError
from fedpact_contract.record import decimal_text
from fedpact_models.registry import parameter_count
from fedpact_models.scratch import Scratch

LABEL = {"name": "ill", "classes": ["no", "yes"], "rule": "value"}
DATA = a_schema(number("age", 0, 100), category("sex", ["f", "m"]), label=LABEL)
COUNT = 20


@pytest.fixture(autouse=True)
def _cold() -> None:
    trainer._load_warm.cache_clear()


@pytest.fixture
def contract() -> Contract:
    return training_contract(DATA, a_model(), (COUNT, 30, 40))


def table(count: int = 30) -> pl.DataFrame:
    rng = random.Random(1)
    return pl.DataFrame(
        {
            "age": [rng.randint(1, 99) for _ in range(count)],
            "sex": [rng.choice("fm") for _ in range(count)],
            "ill": [rng.choice(["no", "yes"]) for _ in range(count)],
        }
    )


def order(agreed: Contract, folder: Path, kind: str = "check", **values: Any) -> Frame:
    header = {
        "contract": agreed.to_bytes().decode(),
        "participant": agreed.participants[0].id,
        "source": {"path": "rows.csv", "kind": "csv"},
        "base_dir": str(folder),
        "columns": ["age", "sex", "ill"],
        "selection_key": "07" * 32,
    }
    if kind == "train":
        header |= {"round": 1, "attempt": 1}
    base = np.zeros(parameter_count(agreed.model, agreed.data)).tobytes() if kind == "train" else b""
    return Frame(kind=kind, header=header | values, array=base)


def answer(frame: Frame) -> tuple[str, dict[str, Any], bytes]:
    if frame.kind == "check":
        trainer._load_warm.cache_clear()  # as in the new process that `sign` starts
    kind, header, array = trainer._answer(frame, FixedNoise(1))
    canonical_bytes(header)  # it can travel
    assert kind in trainer.ANSWERS
    if kind == "failed":
        assert header["code"].startswith(("DATA_", "TRAINING_", "QUALITY_"))
    return kind, header, array


def test_rows_that_are_there_are_checked(contract, tmp_path):
    table().write_csv(tmp_path / "rows.csv")
    kind, header, array = answer(order(contract, tmp_path))
    assert (kind, array) == ("checked", b"")
    assert header["num_rows"] == 30


def gate(folder: Path, **rule: Any) -> dict[str, Any]:
    """What the guard says of a data set's rules."""
    described = {
        "id": "set-1",
        "num_examples": COUNT,
        "epsilon": "8",
        "delta": "0.00001",
        "columns": ["age", "sex"],
        "label": "ill",
        "source": {"path": "rows.csv", "kind": "csv"},
        "rules": [rule],
    }
    return {"data_set": described, "profile": str(folder / "set-1.json")}


def test_a_broken_rule_is_told_by_column_and_count(contract, tmp_path, capsys):
    rows = table().with_columns(sex=pl.when(pl.int_range(30) < 3).then(None).otherwise(pl.col("sex")))
    rows.write_csv(tmp_path / "rows.csv")
    allowed = gate(tmp_path, rule="missing", columns=["age"], at_most="0")
    assert answer(order(contract, tmp_path, gate=allowed))[0] == "failed", "the contract's own schema refuses it later"
    kind, header, _ = answer(order(contract, tmp_path, gate=gate(tmp_path, rule="missing", at_most="0.05")))
    assert (kind, header["code"], header["field"]) == ("failed", "QUALITY_GATE", "sex")
    assert "column sex, 3 of 30" in header["message"]
    assert header["rule"] == "missing, at_most 0.05 (agent.toml)"


@pytest.mark.parametrize("fault", ["column", "source", "profile", "program"])
def test_rules_that_cannot_be_checked_are_a_refusal(contract, tmp_path, monkeypatch, fault: str):
    table().write_csv(tmp_path / "rows.csv")
    wanted = gate(tmp_path, rule="drift", at_most="1")
    assert answer(order(contract, tmp_path, gate=wanted))[0] == "checked"
    if fault == "column":
        wanted = gate(tmp_path, rule="missing", columns=["weight"], at_most="0")
    elif fault == "source":
        (tmp_path / "rows.csv").unlink()
    elif fault == "profile":
        (tmp_path / "set-1.json").write_text("{}")
    else:
        monkeypatch.setattr("fedpact_client.quality.profile", lambda *_: 1 / 0)
    kind, header, _ = answer(order(contract, tmp_path, gate=wanted))
    assert (kind, header["code"]) == ("failed", "QUALITY_GATE")
    assert "could not be checked" in header["message"]


def different(count: int) -> pl.DataFrame:
    """Rows of which no two are alike."""
    return table(count).with_columns(age=pl.Series(range(1, count + 1)))


def of_copies(most: str | None) -> Contract:
    """A contract for COUNT rows that allows this part of them to be copies."""
    clause = {"clip": "none", "wreckers": "report", "negatives": "0.1", "dispute_hours": 1, "max_duplicates": most}
    plain = training_contract(DATA, a_model(), (COUNT, 30, 40)).plain()
    return Contract.parse(plain | {"defences": clause})


@pytest.mark.parametrize("kind", ["check", "train"])
@pytest.mark.parametrize(("copies", "stands"), [(0, True), (2, True), (3, False), (COUNT // 2, False)])
def test_more_copies_than_the_contract_allows_are_refused(tmp_path, kind: str, copies: int, stands: bool) -> None:
    """A tenth of 20 rows are two; the last is every row twice."""
    rows = different(COUNT - copies)
    pl.concat([rows, rows.head(copies)]).write_csv(tmp_path / "rows.csv")
    agreed = of_copies("0.1")
    got, header, _ = answer(order(agreed, tmp_path, kind))
    if stands:
        assert got != "failed"
        return
    assert (got, header["code"], header["file"]) == ("failed", "DATA_DUPLICATES", str(tmp_path / "rows.csv"))
    assert header["field"] == f"data set {agreed.participants[0].data_set}"
    assert header["rule"] == "at most 0.1 of the rows (defences.max_duplicates)"
    assert header["message"].startswith(f"Of the 20 rows to train on {copies} are exact copies of another")
    assert f"({copies / COUNT:.1%}); {COUNT - copies} are different." in header["message"]
    assert "Drop the copies" in header["remedy"]
    assert "declare fewer examples" in header["remedy"]
    assert answer(order(of_copies(None), tmp_path, kind))[0] != "failed", "no clause, nobody looks"


def test_no_copy_at_all_may_be_allowed(tmp_path) -> None:
    rows = different(COUNT)
    rows.write_csv(tmp_path / "rows.csv")
    assert answer(order(of_copies("0"), tmp_path))[0] == "checked"
    pl.concat([rows.head(COUNT - 1), rows.head(1)]).write_csv(tmp_path / "rows.csv")
    kind, header, _ = answer(order(of_copies("0"), tmp_path))
    assert (kind, header["code"]) == ("failed", "DATA_DUPLICATES")
    assert "1 is an exact copy" in header["message"]


def test_copies_are_of_features_and_label(tmp_path) -> None:
    rows = different(COUNT // 2)
    other = rows.with_columns(ill=pl.when(pl.col("ill") == "no").then(pl.lit("yes")).otherwise(pl.lit("no")))
    pl.concat([rows, other]).write_csv(tmp_path / "rows.csv")
    assert answer(order(of_copies("0"), tmp_path))[0] == "checked"


@pytest.mark.parametrize("key", ["07", "08", "09"])
def test_copies_count_among_the_rows_that_are_chosen(tmp_path, key: str) -> None:
    """20 rows stand twice; which 20 of the 40 are trained on is the key's choice, and they alone are looked at."""
    rows = different(COUNT)
    twice = pl.concat([rows, rows])
    twice.write_csv(tmp_path / "rows.csv")
    header = order(of_copies(None), tmp_path, selection_key=key * 32).header
    chosen = trainer._rows(trainer.RowsOrder.parse(header, code="TEST"))
    copies = duplicate_count(chosen.examples)
    assert 0 < copies < COUNT // 2
    for most, got in ((copies, "checked"), (copies - 1, "failed")):
        agreed = of_copies(decimal_text(Decimal(most) / COUNT))
        assert answer(order(agreed, tmp_path, selection_key=key * 32))[0] == got


def test_released_copies_are_not_trained_on(tmp_path) -> None:
    rows = different(COUNT)
    pl.concat([rows, rows.head(5)]).write_csv(tmp_path / "rows.csv")
    rows.head(5).write_ndjson(tmp_path / "released.jsonl")
    found = answer(order(of_copies("0"), tmp_path, released=str(tmp_path / "released.jsonl")))
    assert (found[0], found[1]["num_rows"]) == ("checked", COUNT)


def test_rows_need_a_key_to_be_chosen_by(contract, tmp_path) -> None:
    frame = order(contract, tmp_path)
    del frame.header["selection_key"]
    with pytest.raises(InputError, match="selection_key"):
        answer(frame)


def test_an_update_says_how_it_was_made(contract, tmp_path):
    table().write_csv(tmp_path / "rows.csv")
    kind, header, array = answer(order(contract, tmp_path, "train"))
    assert kind == "update"
    assert header == {
        "noise": "test",
        "num_examples": COUNT,
        "fingerprints": answer(order(contract, tmp_path))[1]["fingerprints"],
    }
    update = np.frombuffer(array, "<f4")
    assert len(update) == parameter_count(contract.model, contract.data)
    assert np.isfinite(update).all()


def test_the_version_is_that_of_the_rows_alone(contract, tmp_path):
    table().write_csv(tmp_path / "rows.csv")
    table().sample(fraction=1.0, shuffle=True, seed=2).write_parquet(tmp_path / "other.pq")
    renamed = table().rename({"age": "AGE"}).with_columns(note=pl.lit("x"))
    renamed.write_ndjson(tmp_path / "third.json")
    files = [
        {"path": "rows.csv", "kind": "csv"},
        {"path": "other.pq", "kind": "parquet"},
        {"path": "third.json", "kind": "ndjson", "rename": {"age": "AGE"}},
    ]
    found = {answer(order(contract, tmp_path, source=source))[1]["fingerprints"][2] for source in files}
    assert len(found) == 1
    pl.concat([table(), table(1)]).write_csv(tmp_path / "rows.csv")
    assert answer(order(contract, tmp_path))[1]["fingerprints"][2] not in found


def test_bytes_and_table_are_known_again_as_the_card_knew_them(contract, tmp_path):
    """The contract may read fewer columns than the card names, and encode them in its own way."""
    rows, names = table().with_columns(note=pl.lit("x")), ("age", "sex", "note", "ill")
    rows.write_csv(tmp_path / "rows.csv")
    where = Source.parse({"path": "rows.csv", "kind": "csv"}, code="SOURCE")
    content, whole, _ = answer(order(contract, tmp_path, "train", columns=names))[1]["fingerprints"]
    assert content == sources.content_fingerprint(where, tmp_path)
    known = sources.TableFingerprint(names, Scratch())
    for batch in sources.batches(where, tmp_path, 7):
        known.add(batch.frame)
    assert whole == known.hexdigest()
    rows.write_parquet(tmp_path / "rows.pq")
    source = {"path": "rows.pq", "kind": "parquet"}
    other, again, _ = answer(order(contract, tmp_path, columns=names, source=source))[1]["fingerprints"]
    assert (other != content, again) == (True, whole)
    lost = answer(order(contract, tmp_path, columns=(*names, "gone")))[1]["fingerprints"]
    assert lost[1] == whole  # a column that no contract reads may have gone since


def test_released_rows_are_not_trained_on(contract, tmp_path):
    table().write_csv(tmp_path / "rows.csv")
    whole = answer(order(contract, tmp_path))[1]
    released = tmp_path / "released.jsonl"
    assert answer(order(contract, tmp_path, released=str(released)))[1] == whole  # none released yet
    table().head(4).cast({"age": pl.String}).write_ndjson(released)
    left = answer(order(contract, tmp_path, released=str(released)))[1]
    assert left["num_rows"] == 26
    assert left["fingerprints"] == whole["fingerprints"]
    table().head(11).write_ndjson(released)
    trainer._load_warm.cache_clear()
    kind, header, _ = answer(order(contract, tmp_path, "train", released=str(released)))
    assert (kind, header["code"]) == ("failed", "DATA_TOO_FEW_ROWS")


def test_of_each_entity_only_its_capped_rows_are_trained_on(tmp_path, monkeypatch):
    clause = {"column": "who", "max_rows": 2, "method": "mixture-of-gaussians", "epsilon": 99, "delta": "0.000001"}
    agreed = training_contract(DATA, a_model(), (COUNT, 30, 40), privacy={"entity": clause})
    whose = ["a"] * 12 + [f"p{i}" for i in range(18)]
    taken = []
    monkeypatch.setattr("fedpact_models.training.local_update", lambda *a: taken.append(a[2]) or np.zeros(1))
    table().with_columns(who=pl.Series(whose)).write_csv(tmp_path / "rows.csv")
    kind, header, _ = answer(order(agreed, tmp_path, "train"))
    assert (kind, header["num_examples"], len(taken[0])) == ("update", COUNT, COUNT)
    assert max(np.unique(taken[0].entity, return_counts=True)[1]) <= 2
    table().with_columns(who=pl.Series(["a"] * 13 + whose[13:])).write_csv(tmp_path / "rows.csv")
    trainer._load_warm.cache_clear()
    assert answer(order(agreed, tmp_path, "train"))[1]["code"] == "DATA_TOO_FEW_ROWS"
    table().write_csv(tmp_path / "rows.csv")
    trainer._load_warm.cache_clear()
    assert answer(order(agreed, tmp_path, "train"))[1]["code"] == "DATA_COLUMN_MISSING"


def test_data_is_read_once_and_kept(contract, tmp_path):
    table().write_csv(tmp_path / "rows.csv")
    first = answer(order(contract, tmp_path, "train"))
    (tmp_path / "rows.csv").unlink()
    assert answer(order(contract, tmp_path, "train", round=2)) == first
    assert answer(order(contract, tmp_path, "train", selection_key="08" * 32))[1]["code"] == "DATA_FILE_MISSING"
    assert answer(order(contract, tmp_path))[1]["code"] == "DATA_FILE_MISSING"


def test_a_failed_reading_is_tried_again(contract, tmp_path):
    assert answer(order(contract, tmp_path, "train"))[1]["code"] == "DATA_FILE_MISSING"
    table().write_csv(tmp_path / "rows.csv")
    assert answer(order(contract, tmp_path, "train"))[0] == "update"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("age,sex,ill\n", "DATA_EMPTY"),
        ("age,sex\n1,f\n", "DATA_LABEL_MISSING"),
        ("age,ill\n1,no\n", "DATA_COLUMN_MISSING"),
        ("age,sex,ill\nold,f,no\n", "DATA_NOT_A_NUMBER"),
        ("age,sex,ill\n1,x,no\n", "DATA_UNKNOWN_CATEGORY"),
        ("age,sex,ill\n1,f,no\n", "DATA_TOO_FEW_ROWS"),
    ],
)
@pytest.mark.parametrize("kind", ["check", "train"])
def test_what_is_wrong_with_the_data_is_named(contract, tmp_path, kind: str, text: str, code: str):
    (tmp_path / "rows.csv").write_text(text)
    answered, header, array = answer(order(contract, tmp_path, kind))
    assert (answered, header["code"], array) == ("failed", code, b"")
    assert header["message"]
    assert "line 2" in header["message"] or "old" not in text, "a row of a CSV file is named by its line"


def test_other_codes_become_one_that_may_leave(contract, tmp_path):
    table().write_csv(tmp_path / "rows.csv")
    frame = order(contract, tmp_path, "train")
    cases = {
        "WEIGHTS_SHAPE": Frame(kind="train", header=frame.header, array=frame.array + bytes(8)),
        "WEIGHTS_NOT_FINITE": Frame(kind="train", header=frame.header, array=b"\xff" * len(frame.array)),
        "CONTRACT_NOT_A_PARTY": order(contract, tmp_path, "train", participant="0" * 64),
        "CANONICAL_PARSE": order(contract, tmp_path, "train", contract="{"),
    }
    for original, case in cases.items():
        _, header, _ = answer(case)
        assert header["code"] == "TRAINING_INPUT"
        assert header["message"].startswith(f"{original}: ")
    _, header, _ = answer(Frame(kind="train", header=frame.header, array=frame.array[:-1]))
    assert header["code"] == "TRAINING_BASE"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), "TRAINING_MEMORY"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "TRAINING_MEMORY"),
        (RuntimeError("the patient is 61"), "TRAINING_INTERNAL"),
        (KeyError("61"), "TRAINING_INTERNAL"),
        (FailedError("TRAINING_NOT_FINITE", "not finite"), "TRAINING_NOT_FINITE"),
    ],
)
def test_every_failure_has_a_fixed_code(contract, tmp_path, monkeypatch, error: Exception, code: str):
    table().write_csv(tmp_path / "rows.csv")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("fedpact_models.training.local_update", fail)
    with structlog.testing.capture_logs() as logged:
        kind, header, _ = answer(order(contract, tmp_path, "train"))
    assert (kind, header["code"]) == ("failed", code)
    assert "61" not in str(header)
    assert "patient" not in str(logged)
    traces = [(each["kind"], each["trace"]) for each in logged if "trace" in each]
    if code == "TRAINING_INTERNAL":
        ((name, trace),) = traces
        assert name == type(error).__name__
        assert "in fail" in trace, "where it was"


@pytest.mark.parametrize(
    "values",
    [
        {"base_dir": "relative"},
        {"participant": "somebody"},
        {"selection_key": "07"},
        {"selection_key": "zz" * 32},
        {"round": 0},
        {"attempt": "1"},
        {"source": {"path": "rows.csv"}},
        {"noise": "test"},
    ],
)
def test_a_header_with_wrong_values_is_no_order(contract, tmp_path, values: dict[str, Any]):
    with pytest.raises(InputError) as caught:
        answer(order(contract, tmp_path, "train", **values))
    assert caught.value.code.startswith("TRAINER_HEADER")


def test_nothing_in_the_package_chooses_the_noise():
    text = Path(trainer.__file__).read_text()
    assert "FixedNoise" not in text
    assert "environ.get" not in text
    assert "argv" not in text
