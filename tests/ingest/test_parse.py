"""One record from bytes: as the standard library reads it, with what it hides counted."""

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.deduplication.files import open_tables, read_pieces
from siftline.ingest.parse import Unparsable, parse_record
from siftline.ingest.readers import Source, read_sources

CASES = (Path(__file__).parents[1] / "cases") / "dedup"


class Pairs(list):
    """An object as its text has it: keys may come again."""


NUMBERS = st.one_of(
    st.integers(-(2**80), 2**80),
    st.sampled_from([2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 0, -1]),
    st.floats(),
)
KEYS = st.text(max_size=3, alphabet='ab\\":é ')
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8, alphabet='ab\\":{}\n\ud83d😀é'),
    lambda inner: st.lists(inner, max_size=3)
    | st.lists(st.tuples(KEYS, inner), max_size=3).map(Pairs),
    max_leaves=12,
)


def written(value, spaced):
    if isinstance(value, Pairs):
        mark = f"{spaced}:"
        return "{" + ",".join(json.dumps(k) + mark + written(v, spaced) for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(written(v, spaced) for v in value) + "]"
    return json.dumps(value)


def repeats(value):
    if isinstance(value, Pairs):
        again = len(value) - len({key for key, _ in value})
        return again + sum(repeats(v) for _, v in value)
    return sum(map(repeats, value)) if isinstance(value, list) else 0


def has_half(value):
    if isinstance(value, str):
        return any(0xD800 <= ord(c) < 0xE000 for c in value)
    if isinstance(value, dict):
        return any(has_half(k) or has_half(v) for k, v in value.items())
    return isinstance(value, list) and any(map(has_half, value))


@settings(max_examples=600, deadline=None)
@given(JSON, st.sampled_from(["", " ", "  ", "\t ", "\r"]))
def test_values_are_pythons_repeated_keys_are_counted_and_half_characters_refused(value, spaced):
    text = written(value, spaced)
    expected = json.loads(text)
    if has_half(expected):
        with pytest.raises(Unparsable, match="invalid_utf8"):
            parse_record(text.encode())
        return
    found, again = parse_record(text.encode())
    assert repr(found) == repr(expected)  # NaN equals itself, and 1 is not 1.0
    assert again == repeats(value)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{", "invalid_json"),
        (b'{"a":1}{"b":2}', "invalid_json"),
        (b'"caf\xe9"', "invalid_utf8"),
        (b'"\\ud83d"', "invalid_utf8"),
        (b"[" * 100_000, "invalid_json"),
        (b"", "invalid_json"),
    ],
)
def test_what_is_no_record_has_a_reason(raw, reason):
    with pytest.raises(Unparsable, match=reason):
        parse_record(raw)


def pool_and_dedup(name, folder):
    """What a recipe's pool reads of a file's texts, and what `siftline dedup` reads."""
    pool, faults = [], []
    for batch in read_sources([Source(str(CASES / name))]):
        pool += [row[0]["content"] for row in batch.rows["messages"].to_pylist()]
        faults += batch.quarantine["line"].to_pylist()
    try:
        (table,) = open_tables([str(CASES / name)], ["text"], folder / "scratch")
    except ValueError as error:
        return pool, faults, str(error)
    return pool, faults, [r for b in read_pieces(table) for r in b.to_pylist()]


@pytest.mark.parametrize("name", ["surrogate_a", "surrogate_b", "surrogate_c", "cut"])
def test_a_line_that_cannot_be_read_is_named_by_every_reader(tmp_path, name):
    pool, faults, said = pool_and_dedup(f"{name}.jsonl", tmp_path)
    assert len(pool) == 1
    assert isinstance(said, str)
    assert f"{name}.jsonl line {faults[0]} can't be read" in said
    assert faults == [2 if name == "cut" else 1]


def test_marks_and_odd_numbers_are_read_alike(tmp_path):
    pool, _, rows = pool_and_dedup("bom.jsonl", tmp_path)
    assert pool == [row["text"] for row in rows] == ["some words to fill a line"]
    _, _, rows = pool_and_dedup("nan.jsonl", tmp_path)
    assert rows[0]["s"] == 0.5
    assert math.isnan(rows[1]["s"])
    assert pool_and_dedup("inf.jsonl", tmp_path)[2][0]["s"] == -math.inf
    pool, _, rows = pool_and_dedup("dup_key.jsonl", tmp_path)
    assert pool == [row["text"] for row in rows] == ["seven eight nine ten eleven twelve"]


def test_whole_numbers_beside_fractions_stay_exact(tmp_path):
    _, _, rows = pool_and_dedup("big.jsonl", tmp_path)
    assert [row["id"] for row in rows] == [9007199254740993, pytest.approx(0.5)]
    assert str(rows[0]["id"]).startswith("9007199254740993")
    lines = [*({"text": "t", "n": 2**53 + 1 + i} for i in range(9000)), {"text": "t", "n": 0.25}]
    path = tmp_path / "many.jsonl"  # more than one chunk
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (table,) = open_tables([str(path)], ["text"], tmp_path / "s2")
    found = [n for b in read_pieces(table) for n in b.column("n").to_pylist()]
    assert found == [line["n"] for line in lines]


def test_kinds_that_fit_no_column_are_refused_with_their_lines(tmp_path):
    with pytest.raises(ValueError, match=r"lists and text in column 'messages\[\]\.content'"):
        open_tables([str(CASES / "content_list.jsonl")], ["messages"], tmp_path / "s")
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "n": 1}\n\n{"text": "b", "n": "2"}\n')
    with pytest.raises(ValueError, match=r"line 1 and line 3: numbers and text in column 'n'"):
        open_tables([str(path)], ["text"], tmp_path / "s")


@pytest.mark.parametrize("pair", [("s1", "s2"), ("s2", "s5"), ("s5", "s1"), ("s2", "s1")])
def test_parts_of_one_folder_have_one_schema(tmp_path, pair):
    import polars as pl
    from datasets import load_dataset

    from siftline.deduplication.run import Job, dedup_files
    from siftline.progress import Progress

    names = [str(CASES / f"{name}.parquet") for name in pair]
    dedup_files(Job(tuple(names), tmp_path / "out"), lambda *a: Progress("t", 0, lambda line: None))
    parts = sorted((tmp_path / "out" / "data").iterdir())
    schemas = [pq.read_schema(part) for part in parts]
    assert schemas[0].equals(schemas[1], check_metadata=True)
    expected = [row for name in names for row in pq.read_table(name).to_pylist()]
    read = pl.read_parquet(parts).to_dicts()
    again = load_dataset(
        "parquet", data_files=list(map(str, parts)), split="train", cache_dir=str(tmp_path / "c")
    ).to_list()
    for found in (read, again):
        kept = [{k: row.get(k) for k in ("text", "k", "extra")} for row in found]
        assert kept == [{"extra": None, **row} for row in expected]


def test_every_format_of_a_pool_is_read(tmp_path):
    cases = CASES.parent
    folder = cases / "files" / "save_to_disk"
    (table,) = open_tables([str(folder)], ["output"], tmp_path / "a")
    assert [r["output"] for b in read_pieces(table) for r in b.to_pylist()] == [
        "o0", "o1", "o2", "o3",
    ]  # fmt: skip
    (table,) = open_tables([str(cases / "files" / "semi.csv")], ["output"], tmp_path / "b")
    assert next(read_pieces(table)).to_pylist() == [{"instruction": "what, now", "output": "o"}]


TYPES = st.sampled_from(
    [
        (pa.int8(), [1, -2]), (pa.int64(), [2**40]), (pa.uint16(), [7]), (pa.float32(), [0.5]),
        (pa.float64(), [0.25]), (pa.string(), ["a"]), (pa.large_string(), ["b", ""]),
        (pa.string_view(), ["c"]), (pa.dictionary(pa.int8(), pa.string()), ["d"]),
        (pa.list_(pa.int8()), [[1], []]), (pa.large_list(pa.float64()), [[0.5], None]),
        (pa.struct([("p", pa.int8())]), [{"p": 1}]),
        (pa.struct([("p", pa.int64()), ("q", pa.string())]), [{"p": 2, "q": "x"}, None]),
        (pa.null(), [None]), (pa.bool_(), [True]), (pa.timestamp("ms"), [5]),
        (pa.timestamp("us"), [7000]), (pa.binary(), [b"x"]),
    ]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(TYPES, min_size=1, max_size=4))
def test_types_of_parquet_are_joined_without_loss_or_refused(tmp_path_factory, columns):
    folder = tmp_path_factory.mktemp("types")
    names = []
    for k, (kind, values) in enumerate(columns):
        made = (
            pa.array([*values, None], pa.string()).dictionary_encode()
            if (pa.types.is_dictionary(kind))
            else pa.array([*values, None], kind)
        )
        pq.write_table(pa.table({"text": ["t"] * len(made), "x": made}), folder / f"{k}.parquet")
        names.append(str(folder / f"{k}.parquet"))
    try:
        tables = open_tables(names, ["text"], folder / "s")
    except ValueError as error:
        said, tables = str(error), []
    if not tables:
        assert "differ in column 'x" in said
        return
    assert len({str(table.schema) for table in tables}) == 1
    for table, name in zip(tables, names, strict=True):
        found = [r["x"] for b in read_pieces(table) for r in b.to_pylist()]
        kept = [row["x"] for row in pq.read_table(name).to_pylist()]
        assert filled(found) == filled(kept)


def filled(value):
    if isinstance(value, dict):
        return {k: filled(v) for k, v in value.items() if v is not None}
    return [filled(v) for v in value] if isinstance(value, list) else value
