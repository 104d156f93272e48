"""The source block of agent.toml: what it may say, which files it opens, under which names its columns come."""

import gc
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tomllib
from pathlib import Path

import polars as pl
import pytest

from fedpact_client.config import Limits
from fedpact_client.sources import (
    Source,
    batches,
    check_there,
    content_fingerprint,
    file_path,
    overlap,
    place_fingerprint,
    read_paths,
    row_digests,
    scratch,
)
from fedpact_contract.errors import FailedError, InputError

TABLE = pl.DataFrame({"AGE": [61, 48, 55], "sex": ["m", "f", None], "ill": [1, 0, 1]})


def source(**values) -> Source:
    return Source.parse({"path": "rows.csv", "kind": "csv"} | values, code="SOURCE")


def read(where: Source, folder: Path) -> pl.DataFrame:
    """All rows at once."""
    return pl.concat(batch.frame for batch in batches(where, folder, 1000))


def write(folder: Path, kind: str) -> Source:
    """The table as a file of this kind."""
    path = folder / f"rows.{kind}"
    if kind == "csv":
        TABLE.write_csv(path)
    elif kind == "parquet":
        TABLE.write_parquet(path)
    elif kind == "ndjson":
        TABLE.write_ndjson(path)
    elif kind == "arrow":
        TABLE.write_ipc(path)
    else:
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE patients (AGE INTEGER, sex TEXT, ill INTEGER)")
            database.executemany("INSERT INTO patients VALUES (?, ?, ?)", TABLE.rows())
        database.close()
        return source(path=path.name, kind="sqlite", table="patients", rename={"age": "AGE"})
    return source(path=path.name, kind=kind, rename={"age": "AGE"})


KINDS = ["csv", "parquet", "sqlite", "ndjson", "arrow"]


def test_a_source_as_it_stands_in_agent_toml():
    text = """
        path = "rows.txt"
        kind = "csv"
        delimiter = "\\t"
        column_names = ["AGE", "sex", "ill"]
        missing = ["?", "NA"]
        rename = { age = "AGE" }
    """
    found = Source.parse(tomllib.loads(text), code="SOURCE")
    assert found.delimiter == "\t"
    assert found.column_names == ("AGE", "sex", "ill")
    assert found.rename == {"age": "AGE"}
    assert Source.parse(found.plain(), code="SOURCE") == found


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"path": ""}, "path"),
        ({"path": "a\0b"}, "path"),
        ({"kind": "excel"}, "kind"),
        ({"kind": "sqlite"}, "(whole)"),
        ({"kind": "sqlite", "table": "t", "query": "SELECT 1"}, "(whole)"),
        ({"table": "t"}, "(whole)"),
        ({"query": "SELECT 1"}, "(whole)"),
        ({"kind": "parquet", "column_names": ["a"]}, "(whole)"),
        ({"kind": "parquet", "delimiter": ";"}, "(whole)"),
        ({"delimiter": ";;"}, "delimiter"),
        ({"delimiter": "；"}, "delimiter"),
        ({"delimiter": ""}, "delimiter"),
        ({"column_names": []}, "column_names"),
        ({"column_names": ["a", "a"]}, "(whole)"),
        ({"missing": [1]}, "missing.0"),
        ({"rename": {"a": "x", "b": "x"}}, "(whole)"),
        ({"rename": {"a": 1}}, "rename.a"),
        ({"url": "https://example.org"}, "url"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(values: dict, field: str):
    with pytest.raises(InputError) as caught:
        source(**values)
    assert caught.value.field == field
    assert caught.value.code.startswith("SOURCE")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_columns(tmp_path, kind: str):
    table = read(write(tmp_path, kind), tmp_path)
    assert table.columns == ["age", "sex", "ill"]
    assert table["age"].cast(pl.Int64).to_list() == [61, 48, 55]
    assert table["sex"].to_list() == ["m", "f", None]


def test_options_reach_the_reader(tmp_path):
    (tmp_path / "rows.csv").write_text("61;?\n48;f\n")
    table = read(source(delimiter=";", column_names=["AGE", "sex"], missing=["?"], rename={"s": "sex"}), tmp_path)
    assert table.to_dict(as_series=False) == {"AGE": ["61", "48"], "s": [None, "f"]}


def test_renaming_may_swap_and_displace(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b,c\n1,2,3\n")
    swapped = read(source(rename={"a": "b", "b": "a"}), tmp_path)
    assert swapped.to_dict(as_series=False) == {"b": ["1"], "a": ["2"], "c": ["3"]}
    displaced = read(source(rename={"a": "c"}), tmp_path)
    assert displaced.to_dict(as_series=False) == {"b": ["2"], "a": ["3"]}
    same = read(source(rename={"a": "a"}), tmp_path)
    assert same.columns == ["a", "b", "c"]


def test_a_column_that_is_not_there(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError) as caught:
        read(source(rename={"age": "AGE"}), tmp_path)
    error = caught.value
    assert (error.code, error.field, error.file) == (
        "DATA_COLUMN_MISSING",
        "source.rename.age",
        str(tmp_path / "rows.csv"),
    )
    assert "agent.toml" in error.remedy


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError) as caught:
        read(source(), tmp_path)
    assert caught.value.code == "DATA_FILE_MISSING"
    with pytest.raises(InputError) as caught:
        content_fingerprint(source(), tmp_path)
    assert (caught.value.code, caught.value.file) == ("DATA_UNREADABLE", str(tmp_path / "rows.csv"))


def test_paths_are_taken_from_the_folder_and_links_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "rows.csv").write_text("a\n1\n")
    (tmp_path / "rows.csv").symlink_to(tmp_path / "real" / "rows.csv")
    assert file_path(source(), tmp_path) == tmp_path / "real" / "rows.csv"
    assert file_path(source(path="real/../real/rows.csv"), tmp_path) == tmp_path / "real" / "rows.csv"
    assert file_path(source(path="/elsewhere/rows.csv"), tmp_path) == Path("/elsewhere/rows.csv")
    assert read_paths(source(), tmp_path) == (tmp_path / "real" / "rows.csv",)
    database = source(path="a.db", kind="sqlite", table="t")
    assert [p.name for p in read_paths(database, tmp_path)] == ["a.db", "a.db-wal", "a.db-shm"]


def test_the_fingerprint_is_the_contents_not_the_name(tmp_path):
    first = write(tmp_path, "csv")
    before = content_fingerprint(first, tmp_path)
    shutil.copy(tmp_path / "rows.csv", tmp_path / "other.csv")
    assert content_fingerprint(source(path="other.csv"), tmp_path) == before
    assert len(before) == 64
    with (tmp_path / "rows.csv").open("a") as file:
        file.write("70,f,0\n")
    assert content_fingerprint(first, tmp_path) != before


def test_the_fingerprint_of_a_database_covers_what_is_not_merged_yet(tmp_path):
    database = sqlite3.connect(tmp_path / "a.db")
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("CREATE TABLE t (a)")
    database.commit()
    where = source(path="a.db", kind="sqlite", table="t")
    before, main = content_fingerprint(where, tmp_path), (tmp_path / "a.db").read_bytes()
    database.execute("INSERT INTO t VALUES (1)")
    database.commit()
    assert (tmp_path / "a.db").read_bytes() == main
    assert content_fingerprint(where, tmp_path) != before
    database.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_paths_are_enough_inside_the_sandbox(tmp_path, kind: str):
    assert _rows_inside(write(tmp_path, kind), tmp_path) == 3


def test_a_database_in_use_is_read_inside_the_sandbox(tmp_path):
    database = sqlite3.connect(tmp_path / "a.db")
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("CREATE TABLE t (a)")
    database.executemany("INSERT INTO t VALUES (?)", [(1,), (2,)])
    database.commit()
    assert _rows_inside(source(path="a.db", kind="sqlite", table="t"), tmp_path) == 2
    database.close()


def _rows_inside(where: Source, folder: Path) -> int:
    code = """
import sys
from pathlib import Path
from fedpact_client.sandbox import close_in
from fedpact_client.sources import Source, batches, read_paths
where, folder = Source.model_validate_json(sys.argv[1], strict=False), Path(sys.argv[2])
close_in(read_paths(where, folder))
print(sum(batch.frame.height for batch in batches(where, folder, 1000)))
"""
    line = [sys.executable, "-I", "-c", code, where.model_dump_json(), str(folder)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def _partitioned(folder: Path, kind: str) -> None:
    """The table's rows in folders by sex, as hive lays them out, and files that are none of it."""
    for sex, name in (("m", "sex=m"), ("f", "sex=f"), (None, "sex=__HIVE_DEFAULT_PARTITION__")):
        (folder / name).mkdir(parents=True)
        rows = TABLE.filter(pl.col("sex").eq_missing(sex)).drop("sex")
        getattr(rows, {"csv": "write_csv", "parquet": "write_parquet"}[kind])(folder / name / f"part-0.{kind}")
    (folder / "_SUCCESS").touch()
    (folder / ".crc").touch()


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("path", ["rows", "rows/*/part-*", "rows/sex=?/*.*", "rows/**/*.{kind}"])
def test_files_by_folder_and_pattern(tmp_path, kind: str, path: str):
    _partitioned(tmp_path / "rows", kind)
    where = source(path=path.format(kind=kind), kind=kind, rename={"age": "AGE"})
    table = read(where, tmp_path)
    whole = 2 if "?" in path else 3
    assert table.select(pl.col("age").cast(pl.Int64), "sex").rows() == [(55, None), (48, "f"), (61, "m")][-whole:]
    assert read_paths(where, tmp_path) == (tmp_path / "rows",)
    assert _rows_inside(where, tmp_path) == whole
    before = content_fingerprint(where, tmp_path), place_fingerprint(where, tmp_path)
    shutil.copytree(tmp_path / "rows" / "sex=m", tmp_path / "rows" / "sex=o")
    after = content_fingerprint(where, tmp_path), place_fingerprint(where, tmp_path)
    assert (after[0] != before[0], after[1]) == (True, before[1])


def test_a_pattern_that_nothing_matches(tmp_path):
    (tmp_path / "rows").mkdir()
    for path in ("rows/*.csv", "rows", "none/*.csv"):
        with pytest.raises(InputError) as caught:
            read(source(path=path), tmp_path)
        assert (caught.value.code, caught.value.file) == ("DATA_FILE_MISSING", str(tmp_path / path))


def test_what_is_no_table_in_a_folder_is_named(tmp_path):
    (tmp_path / "rows").mkdir()
    TABLE.write_parquet(tmp_path / "rows" / "1.parquet")
    (tmp_path / "rows" / "README").write_text("patients of 2025")
    with pytest.raises(InputError) as caught:
        read(source(path="rows", kind="parquet"), tmp_path)
    assert (caught.value.code, caught.value.file) == ("DATA_WRONG_KIND", str(tmp_path / "rows" / "README"))


@pytest.mark.parametrize("path", ["*.csv", ".", "../*.csv", "/**/*.csv", "keys", "keys/*.key", "keys/node.key", "link"])
def test_what_would_open_the_agents_keys_is_refused(tmp_path, path: str):
    (tmp_path / "keys").mkdir()
    (tmp_path / "link").symlink_to("keys/node.key")
    with pytest.raises(InputError) as caught:
        read_paths(source(path=path), tmp_path)
    assert (caught.value.code, caught.value.field) == ("SOURCE_FOLDER", "source.path")


@pytest.mark.parametrize("path", ["circle.csv", "x" * 300 + "*.csv", "x" * 300 + ".csv", "none/*.csv", "none.csv"])
def test_files_that_cannot_be_reached_are_named(tmp_path, path: str):
    """Whatever the system says of a path: it must not end the agent."""
    (tmp_path / "circle.csv").symlink_to("circle.csv")
    with pytest.raises(InputError) as caught:
        check_there(source(path=path), tmp_path)
    assert (caught.value.code, caught.value.field) == ("DATA_SOURCE_AWAY", "source.path")
    (tmp_path / "rows.csv").write_text("a\n1\n")
    check_there(source(), tmp_path)


@pytest.mark.parametrize("path", ["data/**.csv", "a**b/rows.csv", "***/rows.csv"])
def test_a_pattern_that_python_does_not_know_is_refused_in_the_configuration(path: str):
    with pytest.raises(InputError, match="stands alone"):
        source(path=path)


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    (tmp_path / "rows[1].csv").write_text("a\n1\n")
    (tmp_path / "rows1.csv").write_text("a\n2\n")
    assert read(source(path="rows[1].csv"), tmp_path).rows() == [("1",)]


def test_a_query_of_a_file(tmp_path):
    write(tmp_path, "sqlite")
    where = source(
        path="rows.sqlite", kind="sqlite", query="SELECT AGE AS age, ill FROM patients WHERE sex IS NOT NULL"
    )
    assert read(where, tmp_path).rows() == [(61, 1), (48, 0)]
    assert _rows_inside(where, tmp_path) == 2


@pytest.mark.parametrize("kind", ["csv", "parquet", "ndjson", "arrow"])
def test_columns_that_nobody_asks_for_are_not_read(tmp_path, kind: str):
    where = write(tmp_path, kind)
    (batch,) = batches(where, tmp_path, 10, columns={"ill", "gone"})
    assert batch.frame.columns == ["age", "ill"], "what `rename` names is looked for in any case"
    (batch,) = batches(where, tmp_path, 10)
    assert batch.frame.columns == ["age", "sex", "ill"]


def test_rows_are_digested_as_json_whatever_their_cells_hold():
    """Text that JSON escapes, and text that it does not, by one definition: files that were known stay known."""
    strange = pl.DataFrame(
        {
            "a": [0.0, -0.0, 1.5, float("nan"), float("inf"), None, 1e300, 1e-7],
            "i": [0, 1, None, 2**53 + 1, -5, 7, 8, 9],
            "s": ["x", " y ", "", None, "3", "03", 'é"', "a\\b"],
            "f": pl.Series([0.1, -0.0, float("nan"), None, 1, 2, 3, 4], dtype=pl.Float32),
            "b": [True, False, None, True] * 2,
        }
    )
    spelled = {
        "a": ["0.0", "0.0", "1.5", "NaN", "inf", None, "1e+300", "1e-7"],
        "i": ["0.0", "1.0", None, "9007199254740992.0", "-5.0", "7.0", "8.0", "9.0"],
        "s": ["x", "y", None, None, "3.0", "3.0", 'é"', "a\\b"],
        "f": ["0.1", "0.0", "NaN", None, "1.0", "2.0", "3.0", "4.0"],
        "b": ["true", "false", None, "true"] * 2,
    }
    for names in (list(spelled), ["a", "i"], ["s"], ["b"]):
        rows = zip(*(spelled[name] for name in names), strict=True)
        expected = [hashlib.sha256(json.dumps(list(row)).encode()).digest() for row in rows]
        assert row_digests(strange, names) == expected


def test_sources_that_have_a_file_in_common(tmp_path):
    (tmp_path / "rows").mkdir()
    for name in ("1.csv", "2.csv"):
        (tmp_path / "rows" / name).write_text("a\n1\n")
    whole, part, other = source(path="rows/*.csv"), source(path="rows/2.csv"), source(path="rows/gone.csv")
    assert overlap(whole, part, tmp_path)
    assert overlap(whole, source(path="rows"), tmp_path)
    assert not overlap(other, whole, tmp_path)
    assert overlap(other, other, tmp_path)


def test_nothing_of_the_working_files_is_left(tmp_path):
    """They have no name, and are closed; one in which an array lies, when nobody holds that any more."""

    def is_open(file: int) -> bool:
        try:
            return os.fstat(file).st_nlink == 0
        except OSError:
            return False

    limits = Limits(threads=1, memory=256)
    with scratch(tmp_path, limits) as room:
        assert list(tmp_path.iterdir()) == []
        files = list(room._free)
        held = room.array((1 << 23,), "u1")  # a sixty-fourth of the memory is half of it
        assert all(map(is_open, files))
    assert sum(map(is_open, files)) == 1
    held[-1] = 1
    del held
    gc.collect()
    assert not any(map(is_open, files))
    with pytest.raises(FailedError, match="DATA_SCRATCH"), scratch(tmp_path / "none", limits):
        pass
