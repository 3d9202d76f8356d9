"""JSONL inputs of `siftline dedup`: one schema over all files, or a refusal that names two."""

import gzip
import json

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.deduplication.arrow import one_schema
from siftline.deduplication.files import open_tables, read_pieces


def files(folder, *contents):
    """One JSONL file of rows for each; every row has a text."""
    names = []
    for k, rows in enumerate(contents):
        path = folder / f"{'abcdef'[k]}.jsonl"
        path.write_text("".join(json.dumps({"text": "t", **row}) + "\n" for row in rows))
        names.append(str(path))
    return names


def values(tmp_path, *contents, column="x"):
    """The column's values file by file, after checking that all files have one schema."""
    tables = open_tables(files(tmp_path, *contents), ["text"], tmp_path / "scratch")
    assert len({str(table.schema) for table in tables}) == 1
    return [
        [row.get(column) for batch in read_pieces(table) for row in batch.to_pylist()]
        for table in tables
    ]


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([1, 2], [2.5], [[1.0, 2.0], [2.5]]),
        ([None], ["a"], [[None], ["a"]]),
        (["a", None], [None], [["a", None], [None]]),
        ([[]], [["a"]], [[[]], [["a"]]]),
        ([[1]], [[0.5, None]], [[[1.0]], [[0.5, None]]]),
        ([{"p": 1}], [{"q": "s"}], [[{"p": 1, "q": None}], [{"p": None, "q": "s"}]]),
        ([{"p": 1}], [{"p": 0.5}, None], [[{"p": 1.0}], [{"p": 0.5}, None]]),
        ([[{"p": 1}]], [[{"p": 0.5, "q": [True]}]], None),
        ([{}], [{"p": "s"}], None),
        ([2**53, -(2**53)], [0.5], [[2.0**53, -(2.0**53)], [0.5]]),
        ([True], [None], [[True], [None]]),
        ([None], [None], [[None], [None]]),
        ([2**63 - 1, -(2**63)], [7], [[2**63 - 1, -(2**63)], [7]]),
    ],
)
def test_what_can_be_joined_is(tmp_path, left, right, expected):
    rows = [[{"x": value} for value in side] for side in (left, right)]
    found = values(tmp_path, *rows)
    if expected is None:  # objects: keys of the other file are there, and null
        assert filled(found) == filled([left, right])
    else:
        assert found == expected
    turned = values(tmp_path, *reversed(rows))
    assert filled(turned) == filled(found[::-1])


def filled(value):
    """Without null keys, and numbers as floats."""
    if isinstance(value, dict):
        return {k: filled(v) for k, v in value.items() if v is not None} or None
    if isinstance(value, list):
        return [filled(v) for v in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


@pytest.mark.parametrize(
    ("left", "right", "column"),
    [
        (1, "1", "x"),
        (True, 1, "x"),
        ([1], 1, "x"),
        ({"p": 1}, "p", "x"),
        ({"p": {"q": 1}}, {"p": {"q": "s"}}, "x.p.q"),
        ([{"p": 1}], [{"p": False}], "x[].p"),
        ("a", ["a"], "x"),
    ],
)
def test_what_cannot_is_refused_with_both_files_and_the_column(tmp_path, left, right, column):
    names = files(tmp_path, [{"x": left}], [{"x": None}], [{"x": right}])
    with pytest.raises(ValueError, match="differ in column") as said:
        open_tables(names, ["text"], tmp_path / "scratch")
    assert names[0] in str(said.value)
    assert names[2] in str(said.value)
    assert names[1] not in str(said.value)
    assert repr(column) in str(said.value)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("wide", [2**53 + 1, -(2**60), -(2**63), {"p": 2**60}, [[1], [2**60]]])
def test_whole_numbers_are_not_rounded_unseen(tmp_path, wide):
    other = {"p": 0.5} if isinstance(wide, dict) else [[0.5]] if isinstance(wide, list) else 0.5
    names = files(tmp_path, [{"x": other}], [{"x": wide}])
    with pytest.raises(ValueError, match="above 2\\^53 in column 'x'") as said:
        open_tables(names, ["text"], tmp_path / "scratch")
    assert names[1] in str(said.value)


def test_a_column_that_is_asked_for_must_be_in_every_file(tmp_path):
    names = files(tmp_path, [{"x": 1}], [{"y": 1}])
    open_tables(names, ["text"], tmp_path / "scratch")
    with pytest.raises(ValueError, match=r"b\.jsonl has no column 'x'"):
        open_tables(names, ["text", "x"], tmp_path / "scratch")
    names = files(tmp_path, [{"x": 2**70}], [{"x": 1}])
    with pytest.raises(ValueError, match="more than 64 bits"):
        open_tables(names, ["text"], tmp_path / "scratch")


def test_packed_files_and_parquet_stand_beside_them(tmp_path):
    names = files(tmp_path, [{"x": 1}], [{"x": 0.5, "z": "s"}])
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pl.DataFrame({"text": ["t"], "w": ["own"]}).write_parquet(tmp_path / "p.parquet")
    order = [str(packed), str(tmp_path / "p.parquet"), names[1]]
    tables = open_tables(order, ["text"], tmp_path / "scratch")
    assert [table.name for table in tables] == order
    assert tables[0].schema == tables[1].schema == tables[2].schema
    rows = [next(read_pieces(table)).to_pylist() for table in tables]
    assert rows[0] == [{"text": "t", "x": 1.0, "w": None, "z": None}]
    assert rows[1] == [{"text": "t", "x": None, "w": "own", "z": None}]
    pl.DataFrame({"text": ["t"], "x": ["own"]}).write_parquet(tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"p\.parquet differ in column 'x': numbers"):
        open_tables(order, ["text"], tmp_path / "scratch2")


ODD = st.one_of(
    st.none(),
    st.integers(-(2**53), 2**53),
    st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: x != int(x)),
    st.text(max_size=3, alphabet="abc"),
    st.booleans(),
)
VALUE = st.one_of(ODD, st.lists(ODD, max_size=2), st.dictionaries(st.sampled_from("pq"), ODD))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.lists(
            st.fixed_dictionaries({}, optional={"x": VALUE, "y": ODD}), min_size=1, max_size=2
        ),
        min_size=2,
        max_size=3,
    )
)
def test_odd_mixes_are_joined_without_loss_or_refused_in_one_line(tmp_path_factory, contents):
    folder = tmp_path_factory.mktemp("mix")
    names = files(folder, *contents)
    try:
        alone = [open_tables([name], ["text"], folder / f"s{name[-7:]}") for name in names]
        # What a file by itself holds, which the others must not change.
        expected = [[r for b in read_pieces(t) for r in b.to_pylist()] for (t,) in alone]
    except ValueError:
        return  # a file that is no table by itself
    try:
        tables = open_tables(names, ["text"], folder / "s")
    except ValueError as error:
        said = str(error)
        tables = []
    if not tables:
        assert "differ in column" in said
        assert "\n" not in said
        return
    assert len({str(table.schema) for table in tables}) == 1
    found = [[r for b in read_pieces(t) for r in b.to_pylist()] for t in tables]
    assert filled(found) == filled(expected)


def test_the_schema_does_not_depend_on_the_order_of_the_files(tmp_path):
    names = files(tmp_path, [{"x": None, "y": {"p": 1}}], [{"x": 1}], [{"x": 0.5, "y": {"q": []}}])
    tables = open_tables(names, ["text"], tmp_path / "s")
    pairs = [(table.name, table.own) for table in tables]
    kinds = [one_schema(order) for order in (pairs, pairs[::-1])]
    assert kinds[0].field("x").type == kinds[1].field("x").type == pa.float64()
    fields = [{part.name: part.type for part in kind.field("y").type} for kind in kinds]
    assert fields[0] == fields[1] == {"p": pa.int64(), "q": pa.list_(pa.null())}
