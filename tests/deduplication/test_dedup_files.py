"""`siftline dedup` on files: what is kept, what is not, for which row, and what is refused."""

import gzip
import json
import os
import subprocess
import sys

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siftline.cli import main
from siftline.deduplication import run
from siftline.deduplication.engine import deduplicate
from siftline.kernels.sets.keepers import Keep
from siftline.kernels.sets.spill import Keys

BASE = "the quick brown fox jumps over the lazy dog while seven zebras watch from a far hill"


def rows():
    """Twelve rows: four documents, each with a copy of another case and one with a word more."""
    found = []
    for k in range(4):
        text = " ".join(f"{word}{k}" for word in BASE.split())
        found += [text, text.upper(), f"{text} more"]
    return found


def table(texts, **columns):
    extra = {name: pa.array(values) for name, values in columns.items()}
    return pa.table({"n": pa.array(range(len(texts))), "text": pa.array(texts), **extra})


@pytest.fixture
def call(tmp_path, capsys):
    """`call(*arguments)` runs the verb here, into `out`: exit status, stdout, stderr."""

    def act(*arguments, out="out"):
        with pytest.raises(SystemExit) as ended:
            main(["dedup", *map(str, arguments), "--out", str(tmp_path / out), "--json"])
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return act


def done(result):
    code, out, err = result
    assert code == 0, err
    (line,) = out.splitlines()
    return json.loads(line)


def refused(result):
    code, out, err = result
    assert (code, out) == (1, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


def read(folder, name):
    return pl.read_parquet(folder / "out" / name / "*.parquet")


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "jsonl.gz"])
def test_kept_and_removed_rows_are_all_the_rows(call, tmp_path, suffix):
    data = table(rows(), tags=[["a", "b"]] * 12)
    names = []
    for k in range(2):
        path = tmp_path / f"in{k}.{suffix}"
        part = data.slice(6 * k, 6)
        if suffix == "parquet":
            pq.write_table(part, path, row_group_size=2)
        else:
            raw = "".join(json.dumps(row) + "\n" for row in part.to_pylist()).encode()
            path.write_bytes(gzip.compress(raw) if suffix == "jsonl.gz" else raw)
        names.append(path)
    said = done(call(*names))
    assert {k: said[k] for k in ("rows", "kept", "removed", "clusters", "exact")} == {
        "rows": 12,
        "kept": 4,
        "removed": 8,
        "clusters": 4,
        "exact": 0,
    }
    assert said["pairs_verified"] == 8
    assert {"read", "group", "decide", "write"} <= set(said["seconds"])
    kept, gone = read(tmp_path, "data"), read(tmp_path, "removed")
    assert kept.columns == ["n", "text", "tags", "sift_cluster_size"]
    assert gone.columns == [
        *["n", "text", "tags"],
        *["sift_reason", "sift_value", "sift_threshold", "sift_matched_row", "sift_similarity"],
    ]
    assert kept["n"].to_list() == [0, 3, 6, 9]
    assert kept["sift_cluster_size"].to_list() == [3] * 4
    assert gone["n"].to_list() == [1, 2, 4, 5, 7, 8, 10, 11]
    assert gone["sift_reason"].to_list() == ["near_duplicate"] * 8
    expected = [f"{names[k // 2]}:{3 * (k % 2) + 1}" for k in range(4) for _ in range(2)]
    assert gone["sift_matched_row"].to_list() == expected
    shingles = len(BASE.split()) - 4
    assert gone["sift_similarity"].to_list() == pytest.approx([1.0, shingles / (shingles + 1)] * 4)
    assert sorted(os.listdir(tmp_path / "out")) == ["data", "removed"]
    assert not list(tmp_path.glob(".out*"))
    assert gone["tags"].to_list() == [["a", "b"]] * 8


def test_files_give_what_the_column_in_memory_gives(tmp_path, monkeypatch, call):
    """Also where keys go to disk and the texts are read twice."""
    rng = np.random.default_rng(1)
    texts = [" ".join(map(str, rng.integers(0, 3, 9))) for _ in range(600)]
    texts[5] = texts[77] = None
    pq.write_table(table(texts), tmp_path / "a.parquet", row_group_size=64)
    whole = deduplicate(pa.array(texts))
    assert 50 < whole.kept.sum() < 590
    for k in range(2):
        done(call(tmp_path / "a.parquet", out=f"out{k}"))
        kept = pl.read_parquet(tmp_path / f"out{k}" / "data" / "*.parquet")
        gone = pl.read_parquet(tmp_path / f"out{k}" / "removed" / "*.parquet")
        assert kept["n"].to_list() == np.flatnonzero(whole.kept).tolist()
        assert kept["sift_cluster_size"].to_list() == whole.cluster_size[whole.kept].tolist()
        matched = [int(name.rpartition(":")[2]) - 1 for name in gone["sift_matched_row"]]
        assert matched == whole.matched[~whole.kept].tolist()
        reasons = np.where(whole.exact[~whole.kept], "exact_duplicate", "near_duplicate")
        assert gone["sift_reason"].to_list() == reasons.tolist()
        monkeypatch.setattr(run, "TEXTS_IN_MEMORY", 0)
        monkeypatch.setattr(run, "Keys", lambda n, b, folder: Keys(n, b, folder, 15 * 8 * 100))
        monkeypatch.setattr(
            run, "values_room", lambda size, folder: np.memmap(folder / "s", "u4", "w+", 0, (size,))
        )


@pytest.mark.parametrize(
    ("keep", "stays"),
    [
        ("first", [0, 3, 6, 9]),
        ("longest", [2, 5, 8, 11]),
        ("score:score", [1, 4, 6, 9]),
        ("source:from=b,c", [2, 3, 7, 9]),
        ("none", []),
    ],
)
def test_the_policy_says_which_copy_stays(call, tmp_path, keep, stays):
    score = [0, 2, 1, 1, 2, None, 5, 5, 5, None, None, None]
    source = ["a", "c", "b", "b", "b", "a", "x", "c", None, "y", "y", "y"]
    pq.write_table(table(rows(), score=score, **{"from": source}), tmp_path / "a.parquet")
    said = done(call(tmp_path / "a.parquet", "--keep", keep))
    assert read(tmp_path, "data")["n"].to_list() == stays
    assert (said["kept"], said["clusters"]) == (len(stays), 4)
    gone = read(tmp_path, "removed")
    for row, name in zip(gone["n"], gone["sift_matched_row"], strict=True):
        other = int(name.rpartition(":")[2]) - 1
        assert other // 3 == row // 3
        assert keep == "none" or other in stays


def test_policies_are_read_and_written(tmp_path):
    for text in ("first", "longest", "none", "score:q", "source:s=a,b"):
        assert str(Keep.parse(text)) == text
    for text in ("best", "score:", "source:s", "source:=a", "source:s="):
        with pytest.raises(ValueError, match=r"give first, longest"):
            Keep.parse(text)


def test_no_rows_and_no_duplicates_give_whole_folders(call, tmp_path):
    pq.write_table(table([]).cast(table(["a"]).schema), tmp_path / "none.parquet")
    pq.write_table(table(["a", "b"]), tmp_path / "two.parquet")
    said = done(call(tmp_path / "none.parquet", tmp_path / "two.parquet"))
    assert (said["rows"], said["kept"], said["pairs_verified"]) == (2, 2, 0)
    assert read(tmp_path, "data")["n"].to_list() == [0, 1]
    assert read(tmp_path, "removed").height == 0


def test_schema_is_kept_apart_from_notes_that_would_be_false(call, tmp_path):
    data = table(rows(), kind=pa.array(["x"] * 12).dictionary_encode())
    data = data.replace_schema_metadata({"huggingface": "{}", "mine": "1"})
    pq.write_table(data, tmp_path / "a.parquet")
    done(call(tmp_path / "a.parquet"))
    (file,) = (tmp_path / "out" / "data").iterdir()
    schema = pq.read_schema(file)
    assert schema.field("kind").type == data.schema.field("kind").type
    assert schema.metadata[b"mine"] == b"1"
    assert b"huggingface" not in schema.metadata


def test_what_is_refused_says_the_remedy_and_leaves_nothing(call, tmp_path):
    good = tmp_path / "a.parquet"
    pq.write_table(table(rows()), good)
    assert "name another" in refused(call(good, "--text-column", "body"))
    assert "is not a file" in refused(call(tmp_path / "b.parquet"))
    assert "given twice" in refused(call(good, good))
    assert "threshold=2.0" in refused(call(good, "--threshold", "2"))
    assert "int64 is not text" in refused(call(good, "--text-column", "n"))
    assert "a score must be a number" in refused(call(good, "--keep", "score:text"))
    for name, content, says in [
        ("b.txt", "x", "unknown ending"),
        ("c.parquet", "x", "no readable Parquet"),
        ("d.jsonl", '{"text": "a"}\n{"text', "correct the line"),
        ("e.jsonl", "", "empty"),
    ]:
        (tmp_path / name).write_text(content)
        assert says in refused(call(tmp_path / name))
    pq.write_table(table(["a"], sift_cluster_size=[1]), tmp_path / "f.parquet")
    assert "drop or rename" in refused(call(tmp_path / "f.parquet"))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "is not empty" in refused(call(good))
    (tmp_path / "out" / "mine").unlink()
    assert done(call(good))["kept"] == 4  # an empty folder is taken


def test_a_damaged_file_leaves_no_output(call, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(table([f"{k} {BASE}" for k in range(500)]), path, compression="zstd")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3 : len(raw) // 3 + 40] = b"\xff" * 40
    path.write_bytes(raw)
    assert "damaged" in refused(call(path))
    assert not (tmp_path / "out").exists()


def test_the_command_itself_prints_one_line(tmp_path):
    pq.write_table(table(rows()), tmp_path / "a.parquet")
    command = [sys.executable, "-m", "siftline.cli", "dedup", "a.parquet", "--out", "o", "--json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["kept"] == 4
    gone = pl.read_parquet(tmp_path / "o" / "removed" / "*.parquet")
    assert gone["sift_matched_row"][0] == "a.parquet:1"


def test_views_doubled_columns_and_empty_objects(call, tmp_path):
    rows = ["a b c d e f g", "a b c d e f g", "h i j k l m n"]
    view = pa.table({"text": pa.array(rows).cast(pa.string_view()), "n": [1, 2, 3]})
    pq.write_table(view, tmp_path / "view.parquet")
    for keep in ("first", "longest"):
        assert done(call(tmp_path / "view.parquet", "--keep", keep, out=keep))["kept"] == 2
    double = pa.Table.from_arrays([pa.array(rows), pa.array(rows)], names=["text", "text"])
    pq.write_table(double, tmp_path / "double.parquet")
    assert "two columns of one name" in refused(call(tmp_path / "double.parquet", out="no"))
    lines = "".join(json.dumps({"text": row, "meta": {}}) + "\n" for row in rows)
    (tmp_path / "empty.jsonl").write_text(lines)
    assert "empty objects alone" in refused(call(tmp_path / "empty.jsonl", out="no"))
    null = pa.table({"text": rows, "score": pa.nulls(3)})
    pq.write_table(null, tmp_path / "null.parquet")
    assert done(call(tmp_path / "null.parquet", "--keep", "score:score", out="n"))["kept"] == 2
