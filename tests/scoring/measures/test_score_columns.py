"""Scores from outside: files joined by id, fields of the input, functions by import path."""

import json
import math
import sys

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.rows.schema import PROVENANCE, ROW, digest, make_row, message
from siftline.scoring.measures.columns import (
    Column,
    Function,
    attach_leftovers,
    score_column,
    split_values,
)
from siftline.scoring.measures.scorers import columns_of, needs_leftovers, run_scorer


def values(frame):
    return dict(frame.select("id", "value").iter_rows())


# Columns


def scored_rows(n):
    pairs = [(f"question {i}", f"answer {i}") for i in range(n)]
    rows = [make_row([message("user", p), message("assistant", r)]) for p, r in pairs]
    return pa.Table.from_pylist(rows, schema=ROW)


def write(path, records):
    frame = pl.DataFrame(records, strict=False)
    if path.suffix == ".parquet":
        frame.write_parquet(path)
    elif path.suffix == ".csv":
        frame.write_csv(path)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_column_of_a_file_is_joined_by_id(tmp_path, suffix):
    rows = scored_rows(5)
    ids = rows.column("id").to_pylist()
    records = [
        {"key": ids[0], "quality": 0.5, "note": "x"},
        {"key": ids[3], "quality": -2.0, "note": "y"},
        {"key": ids[2], "quality": None, "note": ""},
        {"key": ids[1], "quality": float("nan"), "note": ""},
        {"key": ids[3], "quality": -2.0, "note": "the same again"},
        {"key": digest("elsewhere"), "quality": 7.0, "note": ""},
    ]
    config = Column("quality", write(tmp_path / f"s{suffix}", records), id="key")
    frame, failed = run_scorer(config, {}, 0, rows)
    assert dict(frame.schema) == columns_of(config)
    assert values(frame) == {ids[0]: 0.5, ids[3]: -2.0}
    assert failed == {ids[1]: "not_finite", ids[2]: "no_score", ids[4]: "no_score"}


def test_hex_ids_that_look_like_numbers_stay_ids(tmp_path):
    ids = ["12e5" + "0" * 36, "1" * 40]
    path = tmp_path / "s.csv"
    path.write_text(f"id,q\n{ids[0]},1\n{ids[1]},2\n", encoding="utf-8")
    found, failed = score_column(Column("q", str(path)), pa.table({"id": ids}))
    assert (found, failed) == ({ids[0]: 1.0, ids[1]: 2.0}, {})


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_faults_of_a_score_file_are_named(tmp_path, suffix):
    rows = scored_rows(2)
    (one, two) = rows.column("id").to_pylist()

    def tried(name, records, config=None):
        path = write(tmp_path / f"{name}{suffix}", records)
        run_scorer(Column("q", path, **(config or {})), {}, 0, rows)

    with pytest.raises(ValueError, match=f"id {two} has different values, 1.0 and 2.0"):
        tried("twice", [{"id": two, "q": 1}, {"id": one, "q": 1}, {"id": two, "q": 2}])
    with pytest.raises(ValueError, match=f"id {one} has 'good', which is no number"):
        tried("word", [{"id": one, "q": "good"}])
    with pytest.raises(ValueError, match="no column 'q': it has id, score"):
        tried("column", [{"id": one, "score": 1}])
    with pytest.raises(ValueError, match="'17' in column 'id' is not a row id"):
        tried("ids", [{"id": "17", "q": 1}])
    with pytest.raises(ValueError, match="no score file"):
        run_scorer(Column("q", str(tmp_path / f"none{suffix}")), {}, 0, rows)


def test_a_changed_score_file_is_read_again(tmp_path):
    rows = scored_rows(1)
    (one,) = rows.column("id").to_pylist()
    for value in (1.0, 22.0):
        path = write(tmp_path / "s.jsonl", [{"id": one, "q": value}])
        frame, _ = run_scorer(Column("q", path), {}, 0, rows)
        assert values(frame) == {one: value}


def test_a_field_of_the_rows_own_input_is_a_score():
    rows = scored_rows(5)
    ids = rows.column("id").to_pylist()
    fields = [
        (ids[0], {"stars": 4}),
        (ids[0], {"stars": 4.0, "other": [1]}),  # a copy of the row
        (ids[1], {"stars": " 2.5 "}),
        (ids[2], {"other": 3}),
        (ids[3], {"stars": "inf"}),
    ]
    lines = [{"id": i, "file": "f", "line": 1, "leftover": json.dumps(f)} for i, f in fields]
    lines.append({"id": ids[4], "file": "f", "line": 9, "leftover": None})
    held = pa.Table.from_pylist(lines, schema=PROVENANCE)
    config = Column("stars")
    assert needs_leftovers(config)
    frame, failed = run_scorer(config, {}, 0, attach_leftovers(rows, held))
    assert values(frame) == {ids[0]: 4.0, ids[1]: 2.5}
    assert failed == {ids[2]: "no_score", ids[3]: "not_finite", ids[4]: "no_score"}
    with pytest.raises(ValueError, match="give path"):
        run_scorer(config, {}, 0, rows)
    lines[1]["leftover"] = json.dumps({"stars": 5})
    held = pa.Table.from_pylist(lines, schema=PROVENANCE)
    with pytest.raises(ValueError, match=f"id {ids[0]} has different values"):
        run_scorer(config, {}, 0, attach_leftovers(rows, held))
    lines[1]["leftover"] = json.dumps({"stars": [5]})
    held = pa.Table.from_pylist(lines, schema=PROVENANCE)
    with pytest.raises(ValueError, match=r"has \[5\], which is no number"):
        run_scorer(config, {}, 0, attach_leftovers(rows, held))


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.integers(0, 30), st.none() | st.floats(width=64), max_size=20),
    st.sets(st.integers(0, 30)),
    st.randoms(),
)
def test_every_row_is_scored_or_failed_whatever_the_file_holds(tmp_path_factory, held, asked, rng):
    path = tmp_path_factory.mktemp("join") / "s.parquet"
    records = [(digest(i), value) for i, value in held.items()]
    rng.shuffle(records)
    schema = {"id": pl.String, "q": pl.Float64}
    pl.DataFrame(records, schema=schema, orient="row").write_parquet(path)
    ids = [digest(i) for i in asked]
    found, failed = score_column(Column("q", str(path)), pa.table({"id": pa.array(ids, "string")}))
    assert found.keys() | failed.keys() == set(ids)
    assert not found.keys() & failed.keys()
    for i in asked:
        value = held.get(i)
        if value is None:
            assert failed[digest(i)] == "no_score"
        elif math.isfinite(value):
            assert found[digest(i)] == value
        else:
            assert failed[digest(i)] == "not_finite"


# Functions


FUNCTIONS = """
def length(rows, factor=1):
    return [factor * len(row["messages"][-1]["content"]) for row in rows]

def holes(rows):
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    return [None if i == 0 else float("inf") if i == 1 else i for i, _ in enumerate(rows)]

def short(rows):
    return [1.0]

def words(rows):
    return ["good" for _ in rows]

def broken(rows):
    raise KeyError("quality")

constant = 3
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "my_scorers.py").write_text(FUNCTIONS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_scorers"
    sys.modules.pop("my_scorers", None)


def test_a_function_by_import_path_scores_rows(plugin):
    rows = scored_rows(12)
    frame, failed = run_scorer(Function(f"{plugin}:length", {"factor": 3}), {}, 0, rows)
    texts = {r["id"]: r["messages"][-1]["content"] for r in rows.to_pylist()}
    assert failed == {}
    assert values(frame) == {i: 3.0 * len(text) for i, text in texts.items()}
    ids = sorted(texts)
    frame, failed = run_scorer(Function(f"{plugin}:holes"), {}, 0, rows)
    assert failed == {ids[0]: "no_score", ids[1]: "not_finite"}
    assert frame["id"].to_list() == ids[2:]


def test_faults_of_a_function_name_its_path(plugin):
    rows = scored_rows(3)

    def run(name):
        return run_scorer(Function(name), {}, 0, rows)

    with pytest.raises(ValueError, match="1 values for 3 rows"):
        run(f"{plugin}:short")
    with pytest.raises(ValueError, match=r"my_scorers:words.*'good', which is no number"):
        run(f"{plugin}:words")
    with pytest.raises(RuntimeError, match=r"my_scorers:broken.*KeyError\('quality'\)"):
        run(f"{plugin}:broken")
    with pytest.raises(ValueError, match=r"no_such_module:f.*can't be imported"):
        run("no_such_module:f")
    with pytest.raises(ValueError, match=r"my_scorers:none.*can't be imported"):
        run(f"{plugin}:none")
    with pytest.raises(ValueError, match="not callable"):
        run(f"{plugin}:constant")


def test_values_are_split_into_scores_and_reasons():
    pairs = [("a", 1.0), ("b", None), ("c", -math.inf), ("d", math.nan), ("e", 0.0)]
    found, failed = split_values(pairs)
    assert found == {"a": 1.0, "e": 0.0}
    assert failed == {"b": "no_score", "c": "not_finite", "d": "not_finite"}
