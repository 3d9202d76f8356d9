"""The index: rows that come later get the decisions of doing everything at once, kills included."""

import json
import signal
import subprocess
import sys

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siftline.cli import main
from siftline.deduplication import index as index_module
from siftline.kernels.sets import keepers


def texts(seed=0, families=40):
    """Chains of near copies: similar to the next, less so to the one after."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(families):
        words = [f"w{k}" for k in rng.integers(0, 3000, 60)]
        for _ in range(rng.integers(1, 6)):
            rows.append(" ".join(words))
            words[rng.integers(len(words))] = f"x{rng.integers(10**6)}"
    return [rows[k] for k in rng.permutation(len(rows))]


@pytest.fixture
def call(tmp_path, capsys):
    def act(*arguments, out):
        with pytest.raises(SystemExit) as ended:
            main(["dedup", *map(str, arguments), "--out", str(tmp_path / out), "--json"])
        said = capsys.readouterr()
        if ended.value.code:
            (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
            return line
        return json.loads(said.out)

    return act


@pytest.fixture
def parts(tmp_path):
    """Three files, the rows with scores that make later ones win."""
    rows = texts()
    score = np.random.default_rng(1).permutation(len(rows))
    score = score + np.arange(len(rows)) // 2
    names, start = [], 0
    for k, size in enumerate((len(rows) // 2, len(rows) // 3, None)):
        stop = None if size is None else start + size
        table = pa.table({"text": rows[start:stop], "score": score[start:stop]})
        names.append(tmp_path / f"p{k}.parquet")
        pq.write_table(table, names[-1])
        start = stop
    return names


def fates(tmp_path, out):
    """What became of every row: its text, kept or the row it lost to."""
    kept = pl.read_parquet(tmp_path / out / "data" / "*.parquet")
    gone = pl.read_parquet(tmp_path / out / "removed" / "*.parquet")
    found = {text: ("kept", size) for text, size in kept["text", "sift_cluster_size"].rows()}
    columns = ["text", "sift_matched_row", "sift_similarity", "sift_reason"]
    found.update({row[0]: row[1:] for row in gone[columns].rows()})
    return found


@pytest.mark.parametrize("keep", ["first", "longest", "score:score", "none"])
def test_adding_file_by_file_gives_the_decisions_of_all_at_once(call, parts, tmp_path, keep):
    options = ["--keep", keep, "--index", tmp_path / "index"]
    for k in range(2):
        call(parts[k], *options, out=f"o{k}")
    call(parts[2], *options, out="o2")
    # All files are known now: they are written out again from the decisions.
    again = call(*parts, *options, out="again")
    whole = call(*parts, "--keep", keep, out="whole")
    assert again["pairs_verified"] == 0
    for name in ("rows", "kept", "removed", "clusters"):
        assert again[name] == whole[name]
    assert fates(tmp_path, "again") == fates(tmp_path, "whole")
    assert whole["kept"] > 20 or keep == "none"


def test_only_new_rows_are_compared_and_turned_decisions_are_reported(call, parts, tmp_path):
    options = ["--keep", "score:score", "--index", tmp_path / "index"]
    first = call(*parts[:2], *options, out="o0")
    second = call(parts[2], *options, out="o1")
    whole = call(*parts, "--keep", "score:score", out="whole")
    assert (first["rows_before"], second["rows_before"]) == (0, first["rows"])
    assert second["pairs_verified"] < whole["pairs_verified"]
    assert first["retracted"] == first["restored"] == 0
    assert second["retracted"] > 0
    before, after = fates(tmp_path, "o0"), fates(tmp_path, "whole")
    changes = pl.read_parquet(tmp_path / "o1" / "changes.parquet")
    rows = [t for p in parts for t in pq.read_table(p)["text"].to_pylist()]
    firsts = np.cumsum([0, *(pq.read_metadata(p).num_rows for p in parts)])
    numbers = {str(p): int(f) for p, f in zip(parts, firsts, strict=False)}
    said = {}
    for row, change, match, _ in changes.rows():
        file, _, number = row.rpartition(":")
        said[rows[numbers[file] + int(number) - 1]] = (change, match)
    expected = {}
    for text, fate in before.items():
        was = None if fate[0] == "kept" else fate[0]
        now = None if after[text][0] == "kept" else after[text][0]
        if was != now:
            kind = "retracted" if was is None else "restored" if now is None else "matched anew"
            expected[text] = (kind, now)
    assert said == expected
    assert second["retracted"] == sum(kind == "retracted" for kind, _ in expected.values())


@pytest.mark.parametrize("where", ["write_parquet", "write_json", "file_hash"])
def test_a_kill_leaves_the_index_as_it_was(call, parts, tmp_path, monkeypatch, where):
    options = ["--index", tmp_path / "index"]
    call(parts[0], *options, out="o0")

    def killed(*_):
        raise ValueError("killed here")

    with monkeypatch.context() as patch:
        patch.setattr(index_module, where, killed)
        assert "killed here" in call(parts[1], *options, out="o1")
    (tmp_path / "index" / "keys-00009.parquet").touch()
    call(parts[1], *options, out="o1")
    call(parts[2], *options, out="o2")
    call(*parts, *options, out="again")
    call(*parts, out="whole")
    assert fates(tmp_path, "again") == fates(tmp_path, "whole")
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [
        ".lock",
        "changes-00002.parquet",
        "decisions-00002.parquet",
        *(f"keys-0000{k}.parquet" for k in range(3)),
        "manifest.json",
        "sets.bin",
    ]


KILLED = """
import os, signal, sys
from siftline.cli import main
from siftline.deduplication import index
index.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main()
"""


def test_a_killed_process_leaves_the_index_as_it_was(call, parts, tmp_path):
    options = ["--index", str(tmp_path / "index")]
    call(parts[0], *options, out="o0")
    before = (tmp_path / "index" / "manifest.json").read_bytes()
    arguments = ["dedup", str(parts[1]), *options, "--out", str(tmp_path / "o1")]
    dead = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert dead.returncode == -signal.SIGKILL
    assert (tmp_path / "index" / "manifest.json").read_bytes() == before
    assert (tmp_path / "index" / "keys-00001.parquet").exists()
    assert not (tmp_path / "o1").exists()
    call(*parts[1:], *options, out="o1")
    call(*parts, *options, out="again")
    call(*parts, out="whole")
    assert fates(tmp_path, "again") == fates(tmp_path, "whole")


def test_a_run_that_died_while_writing_reports_its_changes_again(call, parts, tmp_path):
    options = ["--keep", "score:score", "--index", tmp_path / "index"]
    call(*parts[:2], *options, out="o0")
    once = call(parts[2], *options, out="o1")
    twice = call(parts[2], *options, out="o2")
    assert once["retracted"] == twice["retracted"] > 0
    assert fates(tmp_path, "o1") == fates(tmp_path, "o2")
    read = [pl.read_parquet(tmp_path / name / "changes.parquet") for name in ("o1", "o2")]
    assert read[0].equals(read[1])


def test_what_does_not_fit_the_index_is_refused(call, parts, tmp_path):
    options = ["--index", tmp_path / "index"]
    call(parts[0], *options, out="o0")
    assert "use the same" in call(parts[1], *options, "--threshold", "0.7", out="o1")
    assert "use the same" in call(parts[1], *options, "--keep", "longest", out="o1")
    pq.write_table(pq.read_table(parts[1]), parts[0])
    assert "other contents" in call(parts[0], *options, out="o1")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    assert "not an index" in call(parts[1], "--index", tmp_path / "mine", out="o1")
    (tmp_path / "index" / "manifest.json").write_text("{}")
    assert "no manifest" in call(parts[1], *options, out="o1")
    assert not (tmp_path / "o1").exists()


def test_rows_without_text_and_files_without_rows_can_be_added(call, tmp_path):
    rows = [[], [None, "", "a b c d e f"], ["", None, "A b c d e f"]]
    for k, column in enumerate(rows):
        pq.write_table(pa.table({"text": pa.array(column, pa.string())}), tmp_path / f"{k}.parquet")
        said = call(tmp_path / f"{k}.parquet", "--index", tmp_path / "index", out=f"o{k}")
        assert said["rows"] == len(column)
    assert (said["kept"], said["removed"], said["exact"]) == (1, 2, 1)


@pytest.mark.parametrize("keep", ["first", "none"])
def test_what_is_said_of_a_call_is_about_its_rows(call, tmp_path, keep):
    said = []
    for k, column in enumerate((["a b", "a b", "c d", "c d", "e f", "g h"], ["e f", "x y"])):
        pq.write_table(pa.table({"text": column}), tmp_path / f"{k}.parquet")
        options = ["--index", tmp_path / "index", "--keep", keep]
        said.append(call(tmp_path / f"{k}.parquet", *options, out=f"o{k}"))
    assert [one["clusters"] for one in said] == [2, 1]
    assert [one["pairs_verified"] > 0 for one in said] == [True, True]
    again = call(tmp_path / "1.parquet", *options, out="again")
    assert (again["rows"], again["clusters"], again["pairs_verified"]) == (2, 1, 0)
    both = call(tmp_path / "0.parquet", tmp_path / "1.parquet", *options, out="both")
    assert (both["rows"], both["clusters"]) == (8, 3)


def test_an_unchanged_pair_is_never_compared_again():
    """The promise itself, at the kernel: with nothing new there is nothing to compare."""
    m = 50
    one = np.arange(m + 1, dtype=np.int64)
    flat = np.arange(m * 3, dtype=np.uint32)
    sizes, zero = np.full(m, 3, np.int32), np.zeros(m, np.int32)
    rows = keepers.Candidates(one, zero, np.zeros(m, np.uint64), flat, one[:-1] * 3, sizes)
    fresh = keepers.Decisions(np.full(m, keepers.NEW, np.int32), np.zeros(m))
    decided, pairs = keepers.keep_first(rows, 1, 0.5, 10**6, fresh)
    assert pairs == m * (m - 1) // 2
    assert keepers.keep_first(rows, 1, 0.5, 0, decided)[1] == 0


def test_no_file_of_anyone_else_is_touched(call, parts, tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / "precious.txt").write_text("mine")
    said = call(parts[0], "--index", folder, out="no")
    assert said.endswith(f"{folder} holds precious.txt, not an index: name an empty folder")
    assert (folder / "precious.txt").read_text() == "mine"
    index = tmp_path / "index"
    call(parts[0], "--index", index, out="a")
    (index / "README.md").write_text("about this index")
    (index / "notes").mkdir()
    call(parts[1], "--index", index, out="b")
    assert (index / "README.md").read_text() == "about this index"
    assert (index / "notes").is_dir()


def test_one_file_under_two_names_is_refused_and_two_of_one_name_are_told_apart(
    call, parts, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert "is given twice" in call("p0.parquet", "./p0.parquet", "--index", "ix", out="no")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        pq.write_table(pq.read_table(parts[0]), "train.parquet")
        call("train.parquet", "--index", tmp_path / "ix2", out=f"out_{name}")
    removed = pl.read_parquet(tmp_path / "out_two" / "removed" / "*.parquet")
    lost_to = removed["sift_matched_row"].str.split(":").list.first().unique().to_list()
    assert lost_to == [str(tmp_path / "one" / "train.parquet")]


def test_index_and_output_stand_apart(call, parts, tmp_path):
    for out in ("ix", "ix/out"):
        said = call(parts[0], "--index", tmp_path / "ix", out=out)
        assert "must be apart: name two folders" in said
    assert "must be apart" in call(parts[0], "--index", tmp_path / "o" / "ix", out="o")
