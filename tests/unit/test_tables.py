"""Tables from files: what is read, and what is refused with which code."""

import sqlite3
import time
from contextlib import closing
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from fedpact_contract.errors import InputError
from fedpact_models.tables import Form, TableFile, read_batches, read_files, read_table

FRAME = pl.DataFrame({"age": [31, None, 55], "city": ["Wuhan", "", " Xi'an "], "score": [0.5, -9.0, None]})


def _sqlite(path: Path, *statements: str) -> Path:
    with closing(sqlite3.connect(path)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()
    return path


def _write(path: Path, kind: str) -> dict[str, Any]:
    if kind == "csv":
        FRAME.write_csv(path)
    elif kind == "parquet":
        FRAME.write_parquet(path)
    elif kind == "ndjson":
        FRAME.write_ndjson(path)
    elif kind == "arrow":
        FRAME.write_ipc(path)
    else:
        rows = "INSERT INTO \"a \"\" table\" VALUES (31, 'Wuhan', 0.5), (NULL, '', -9), (55, ' Xi''an ', NULL)"
        _sqlite(path, 'CREATE TABLE "a "" table" (age, city, score)', rows)
        return {"table": 'a " table'}
    return {}


def _code(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read_table(path, **options)
    assert caught.value.file == str(path)
    assert caught.value.message.endswith(".")
    return caught.value.code


@pytest.mark.parametrize("kind", ["csv", "parquet", "sqlite", "ndjson", "arrow"])
def test_every_kind_gives_the_same_cells_with_blanks_and_markers_as_null(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / f"a [1] * {kind}?"  # a name that would be a pattern or an address elsewhere
    options = _write(path, kind)
    frame = read_table(path, kind=kind, missing=["-9.0"], **options)
    assert frame.columns == ["age", "city", "score"]
    assert frame["age"].cast(pl.Int64).to_list() == [31, None, 55]
    assert frame["city"].to_list() == ["Wuhan", None, "Xi'an"]
    assert frame["score"].cast(pl.Float64).to_list() == [0.5, None, None]


def test_csv_cells_stay_text(tmp_path: Path) -> None:
    (path := tmp_path / "t.csv").write_text('a,b\n007,"x, y"\n1e3,true\n')
    frame = read_table(path, kind="csv")
    assert frame.rows() == [("007", "x, y"), ("1e3", "true")]


def test_csv_without_a_header_with_another_delimiter_and_a_bom(tmp_path: Path) -> None:
    (path := tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf1;?\n2;b\n")
    frame = read_table(path, kind="csv", column_names=["n", "t"], delimiter=";", missing=["?"])
    assert frame.rows() == [("1", None), ("2", "b")]
    assert _code(path, kind="csv", column_names=["n"], delimiter=";") == "DATA_COLUMN_COUNT"


def test_an_arrow_stream_is_arrow_too(tmp_path: Path) -> None:
    FRAME.write_ipc_stream(path := tmp_path / "t.arrows")
    assert read_table(path, kind="arrow").height == 3


def test_nan_can_be_a_marker(tmp_path: Path) -> None:
    pl.DataFrame({"v": [1.0, float("nan")]}).write_parquet(path := tmp_path / "t.parquet")
    assert read_table(path, kind="parquet", missing=["nan"])["v"].to_list() == [1.0, None]


def test_sqlite_cells_of_mixed_types_become_text_and_a_view_is_a_table(tmp_path: Path) -> None:
    path = _sqlite(
        tmp_path / "t.db",
        "CREATE TABLE t (m, f, b)",
        "INSERT INTO t VALUES (1, 1, x'00'), ('two', 2.5, NULL), (3.5, NULL, NULL)",
        "CREATE VIEW v AS SELECT * FROM t",
    )
    frame = read_table(path, kind="sqlite", table="v")
    assert frame["m"].to_list() == ["1", "two", "3.5"]
    assert frame["f"].to_list() == [1.0, 2.5, None]
    assert frame["b"].dtype == pl.Binary


def test_sqlite_is_opened_read_only(tmp_path: Path) -> None:
    path = _sqlite(tmp_path / "t.db", "CREATE TABLE t (a)", "INSERT INTO t VALUES (1)")
    before = path.read_bytes()
    assert _code(path, kind="sqlite", table='t"; DROP TABLE t; --') == "DATA_TABLE_MISSING"
    path.chmod(0o444)
    assert read_table(path, kind="sqlite", table="t").rows() == [(1,)]
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.db"]


@pytest.mark.parametrize("kind", ["csv", "parquet", "sqlite", "ndjson", "arrow"])
def test_missing_empty_and_unreadable_files(tmp_path: Path, kind: Any) -> None:
    options = {"kind": kind, "table": "t"} if kind == "sqlite" else {"kind": kind}
    assert _code(tmp_path / "none", **options) == "DATA_FILE_MISSING"
    (empty := tmp_path / "empty").touch()
    assert _code(empty, **options) == "DATA_EMPTY"
    assert _code(tmp_path, **options) == "DATA_UNREADABLE"


@pytest.mark.parametrize("kind", ["parquet", "sqlite", "arrow"])
def test_a_damaged_file_is_unreadable(tmp_path: Path, kind: Any) -> None:
    options = _write(tmp_path / "whole", kind)
    content = (tmp_path / "whole").read_bytes()
    (path := tmp_path / "cut").write_bytes(content[:16] + bytes(reversed(content[16 : len(content) // 2])))
    assert _code(path, kind=kind, **options) == "DATA_UNREADABLE"


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("ndjson", b'{"a": 1}\n{"a": \n'),
        ("ndjson", b"\x00\x01\x02\x03\x04"),
        ("csv", b"a,b\n1,2,3\n"),
        ("csv", "姓名\n张三\n".encode("gb18030")),
    ],
)
def test_text_that_is_not_of_its_kind_is_unreadable(tmp_path: Path, kind: Any, content: bytes) -> None:
    (path := tmp_path / "t").write_bytes(content)
    assert _code(path, kind=kind) == "DATA_UNREADABLE"


@pytest.mark.parametrize("before", [1, 200_000])
def test_the_first_line_that_is_not_utf8_is_named(tmp_path: Path, before: int) -> None:
    good = "姓名,age\n" + "李,1\n" * before
    (path := tmp_path / "t").write_bytes(good.encode() + "张,2\n".encode("gbk") + "王,3\n".encode("gbk"))
    with pytest.raises(InputError, match=f"DATA_UNREADABLE: The file is not UTF-8: line {before + 2} is") as err:
        read_table(path, kind="csv")
    assert "GBK" in err.value.remedy


@pytest.mark.parametrize(
    ("declared", "actual"),
    [
        (declared, actual)
        for declared in ("csv", "parquet", "sqlite", "ndjson", "arrow")
        for actual in ("csv", "parquet", "sqlite", "arrow")
        if declared != actual and (declared, actual) != ("ndjson", "csv")  # text looks like text
    ],
)
def test_a_file_of_another_kind_is_named_as_such(tmp_path: Path, declared: Any, actual: str) -> None:
    _write(path := tmp_path / "t", actual)
    options = {"table": "t"} if declared == "sqlite" else {}
    assert _code(path, kind=declared, **options) == "DATA_WRONG_KIND"


def test_no_rows(tmp_path: Path) -> None:
    (path := tmp_path / "t.csv").write_text("a,b\n")
    assert _code(path, kind="csv") == "DATA_EMPTY"
    FRAME.clear().write_parquet(path := tmp_path / "t.parquet")
    assert _code(path, kind="parquet") == "DATA_EMPTY"
    path = _sqlite(tmp_path / "t.db", "CREATE TABLE t (a)")
    assert _code(path, kind="sqlite", table="t") == "DATA_EMPTY"


def test_blank_lines_are_no_table(tmp_path: Path) -> None:
    (path := tmp_path / "t.csv").write_text("\n\n")
    assert _code(path, kind="csv") == "DATA_EMPTY"


def test_a_column_name_may_not_stand_twice(tmp_path: Path) -> None:
    (path := tmp_path / "t.csv").write_text("a,b,a\n1,2,3\n")
    assert _code(path, kind="csv") == "DATA_COLUMN_TWICE"
    path.write_text("a, a\n1,2\n")
    assert _code(path, kind="csv") == "DATA_COLUMN_TWICE"


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "xlsx"},
        {"kind": "sqlite"},
        {"kind": "csv", "table": "t"},
        {"kind": "parquet", "column_names": ["a"]},
        {"kind": "csv", "column_names": ["a", "a"]},
        {"kind": "csv", "delimiter": ""},
        {"kind": "csv", "delimiter": "，"},
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, Any]) -> None:
    (path := tmp_path / "t.csv").write_text("a\n1\n")
    assert _code(path, **options) == "DATA_OPTIONS"


@pytest.mark.data
def test_a_public_headerless_file_with_question_marks(data_dir: Path) -> None:
    path = data_dir / "heart_disease" / "processed.hungarian.data"
    frame = read_table(path, kind="csv", column_names=[f"c{i}" for i in range(14)], missing=["?"])
    assert frame.shape == (294, 14)
    assert frame["c11"].null_count() == 291


def test_a_query_reads_and_keeps_one_type_for_a_column_over_all_batches(tmp_path: Path) -> None:
    path = _sqlite(tmp_path / "t.db", "CREATE TABLE t (a, b)", "INSERT INTO t VALUES (1, 1), (2, 2.5), (3, 'x')")
    form = Form(kind="sqlite", query="SELECT a, b AS c FROM t WHERE a > 0 -- all;\n;")
    batches = list(read_batches([TableFile(path=path)], form, 1))
    assert [(b.before, b.frame.rows()) for b in batches] == [(0, [(1, "1")]), (1, [(2, "2.5")]), (2, [(3, "x")])]


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("DELETE FROM t", "DATA_QUERY_WRITES"),
        ("CREATE TABLE u (a)", "DATA_QUERY_WRITES"),
        ("ATTACH DATABASE 'other.db' AS o", "DATA_QUERY_WRITES"),
        ("PRAGMA journal_mode = WAL", "DATA_QUERY_WRITES"),
        ("COMMIT", "DATA_QUERY_WRITES"),
        ("SELECT a FROM t; DELETE FROM t", "DATA_QUERY"),
        ("SELECT gone FROM t", "DATA_QUERY"),
        ("SELECT a FROM gone", "DATA_QUERY"),
        ("SELEC a FROM t", "DATA_QUERY"),
        ("SELECT a, a FROM t", "DATA_COLUMN_TWICE"),
        ("SELECT a FROM t WHERE a > 9", "DATA_EMPTY"),
    ],
)
def test_a_query_that_is_none_or_does_more_than_read(tmp_path: Path, query: str, code: str) -> None:
    path = _sqlite(tmp_path / "t.db", "CREATE TABLE t (a)", "INSERT INTO t VALUES (1)")
    before = path.read_bytes()
    assert _code(path, kind="sqlite", query=query) == code
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.db"]


@pytest.mark.parametrize("kind", ["csv", "parquet", "sqlite", "ndjson", "arrow"])
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_batches_are_the_table(tmp_path: Path, kind: Any, rows: int) -> None:
    options = _write(path := tmp_path / "t", kind)
    batches = list(read_batches([TableFile(path=path)], Form(kind=kind, **options), rows))
    assert [b.before for b in batches] == list(accumulate([0, *(b.frame.height for b in batches[:-1])]))
    assert max(b.frame.height for b in batches) <= rows
    assert pl.concat(b.frame for b in batches).equals(read_table(path, kind=kind, **options))


def test_files_of_one_table(tmp_path: Path) -> None:
    pl.DataFrame({"a": [1, 2], "b": ["x", None]}).write_parquet(tmp_path / "1")
    pl.DataFrame({"b": [None], "a": [2.5]}, schema_overrides={"b": pl.Null}).write_parquet(tmp_path / "2")
    pl.DataFrame({"a": [], "b": []}, schema={"a": pl.Int8, "b": pl.String}).write_parquet(tmp_path / "3")
    form = Form(kind="parquet")
    files = [TableFile(path=tmp_path / n, partitions={"year": n, "none": None}) for n in "123"]
    frame = read_files(files, form)
    assert frame.rows() == [(1.0, "x", "1", None), (2.0, None, "1", None), (2.5, None, "2", None)]
    with pytest.raises(InputError) as caught:
        read_files(files[2:], form)
    assert caught.value.code == "DATA_EMPTY"


@pytest.mark.parametrize(
    ("other", "column"),
    [({"a": ["1"], "b": ["y"]}, "a"), ({"a": [1]}, "b"), ({"a": [1], "b": ["y"], "c": [0]}, "c")],
)
def test_files_that_are_no_one_table(tmp_path: Path, other: dict[str, Any], column: str) -> None:
    pl.DataFrame({"a": [1, 2], "b": ["x", None]}).write_parquet(tmp_path / "1")
    pl.DataFrame(other).write_parquet(tmp_path / "2")
    with pytest.raises(InputError) as caught:
        read_files([TableFile(path=tmp_path / n) for n in "12"], Form(kind="parquet"))
    error = caught.value
    assert (error.code, error.field, error.file) == ("DATA_FILES_DIFFER", column, str(tmp_path / "2"))


def test_a_folder_cannot_give_a_column_that_the_file_has(tmp_path: Path) -> None:
    (path := tmp_path / "t").write_text("a\n1\n")
    with pytest.raises(InputError) as caught:
        read_files([TableFile(path=path, partitions={"a": "2"})], Form(kind="csv"))
    assert (caught.value.code, caught.value.field) == ("DATA_COLUMN_TWICE", "a")


def test_a_file_of_twenty_thousand_columns_is_opened_in_a_moment(tmp_path: Path) -> None:
    path = tmp_path / "wide.csv"
    path.write_text("\n".join(",".join(f"{word}{n}" for n in range(20_000)) for word in ("c", "")) + "\n")
    form = Form(kind="csv", columns=frozenset({"c1"}))
    began = time.process_time()
    (batch,) = read_batches([TableFile(path=path)], form)
    assert time.process_time() - began < 6
    assert batch.frame.columns == ["c1"]


def test_a_database_that_a_writer_locks_is_away_and_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _sqlite(tmp_path / "rows.db", "CREATE TABLE t (a INTEGER)", "INSERT INTO t VALUES (1)")
    monkeypatch.setattr("fedpact_models.tables.sqlite3.connect", partial(sqlite3.connect, timeout=0))
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        assert _code(path, kind="sqlite", table="t") == "DATA_SOURCE_AWAY"
        assert _code(path, kind="sqlite", query="SELECT a FROM t") == "DATA_SOURCE_AWAY"
        writer.execute("COMMIT")
    assert read_table(path, kind="sqlite", table="t").rows() == [(1,)]


@pytest.mark.parametrize("bare", ["1.csv", "2.csv"])
def test_of_a_file_without_a_header_no_cell_is_told_as_a_columns_name(tmp_path: Path, bare: str) -> None:
    for name in ("1.csv", "2.csv"):
        (tmp_path / name).write_text(("" if name == bare else "age,name\n") + "31,Zhang San\n55,Li Si\n")
    files = [TableFile(path=tmp_path / name) for name in ("1.csv", "2.csv")]
    with pytest.raises(InputError, match="DATA_FILES_DIFFER") as caught:
        list(read_batches(files, Form(kind="csv", columns=frozenset({"age", "name"}))))
    assert caught.value.field == "age"
