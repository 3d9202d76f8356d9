"""`siftline select` on plain files: what comes out, what goes in, what is refused."""

import csv
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from siftline.cli import main
from siftline.selectors.registry import METHODS


def record(i, **more):
    return {"prompt": f"What is {i} and {i}?", "completion": f"It is {2 * i}." + "!" * i} | more


def write(path, records):
    lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


PYTHON = r"```python\n(.*?)```"


@pytest.fixture(autouse=True)
def few_buckets(monkeypatch):
    """Small pools need no sixteen buckets, and every file is flushed to disk."""
    monkeypatch.setattr("siftline.cli.select_run.BUCKETS", 2)


@pytest.fixture
def call(capsys):
    """`call(*arguments)` runs the verb: exit status, stdout, stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["select", *map(str, arguments)])
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run


@pytest.fixture
def done(call):
    def run(*arguments):
        code, out, err = call(*arguments, "--json")
        assert code == 0, err
        (line,) = out.splitlines()
        return json.loads(line)

    return run


@pytest.fixture
def refused(call):
    def run(*arguments):
        code, out, err = call(*arguments)
        assert (code, out) == (1, "")
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        return line

    return run


@pytest.fixture
def rows(tmp_path):
    return write(
        tmp_path / "rows.jsonl", [record(i, level=i % 3, tag={"k": [i]}) for i in range(20)]
    )


def lines_of(out):
    return pl.read_parquet(out / "selection.parquet")


def ids_of(rows, tmp_path, done):
    """Row ids in the order of the file."""
    out = tmp_path / "ids"
    done("random", rows, "--budget", 1, "--out", out)
    return lines_of(out).sort("row")["id"].to_list()


def test_every_row_has_a_line_and_kept_records_are_whole(rows, tmp_path, done):
    out = tmp_path / "out"
    result = done("length", rows, "--budget", 5, "--set", "column=n_chars", "--out", out)
    lines = lines_of(out)
    assert lines.columns == ["id", "file", "row", "kept", "reason", "value", "rank", "lost_to"]
    assert lines["row"].to_list() == list(range(1, 21))
    assert lines.filter("kept")["row"].to_list() == [16, 17, 18, 19, 20]
    assert lines.filter("kept").sort("rank")["row"].to_list() == [20, 19, 18, 17, 16]
    assert lines.filter(~pl.col("kept"))["reason"].unique().to_list() == ["below_cut"]
    assert lines["value"][19] == len(record(19)["completion"])
    kept = [json.loads(line) for line in (out / "data" / "rows.jsonl").read_text().splitlines()]
    assert kept == [record(i, level=i % 3, tag={"k": [i]}) for i in range(15, 20)]
    assert (result["rows"], result["kept"], result["removed"]) == (20, 5, {"below_cut": 15})
    assert result["facts"]["spent"] == 5
    assert result["options"] == {"column": "n_chars", "longest": True}
    written = ["data", "selection.json", "selection.parquet", "siftline-files.json"]
    assert sorted(p.name for p in out.iterdir()) == written
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    said = json.loads((out / "selection.json").read_text())
    assert said == {k: v for k, v in result.items() if k not in ("selection", "data")}


def test_formats_stay_what_they_are(tmp_path, done):
    table = pa.table(
        {
            "prompt": [f"p {i}" for i in range(6)],
            "completion": [f"c {i}" for i in range(6)],
            "when": pa.array(range(6), pa.timestamp("us")),
            "small": pa.array([1, None, 3, 4, 5, 6], pa.int8()),
        }
    )
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(table, folder / "a.parquet", row_group_size=2)
    pyarrow.feather.write_feather(
        table.slice(0, 3).set_column(0, "prompt", pa.array(list("xyz"))), folder / "b.arrow"
    )
    with (folder / "c.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([["prompt", "completion", "note"], ["q, 1", 'say "x"\nagain', "n"]])
    (folder / "d.json").write_text(json.dumps([record(50, z=1), record(51)]))
    write(folder / "d.jsonl", [record(60)])
    out = tmp_path / "out"
    result = done("random", folder, "--budget", 13, "--out", out)
    assert result["kept"] == result["rows"] == 13
    data = {p.name: p for p in (out / "data").iterdir()}
    assert sorted(data) == ["a.parquet", "b.parquet", "c.csv", "d.jsonl", "d_jsonl.jsonl"]
    assert pq.read_table(data["a.parquet"]).equals(table)
    assert pq.read_table(data["b.parquet"]).schema.field("small").type == pa.int8()
    assert (folder / "c.csv").read_bytes().replace(b"\r\n", b"\n") == data["c.csv"].read_bytes()
    assert [json.loads(x) for x in data["d.jsonl"].read_text().splitlines()] == [
        record(50, z=1),
        record(51),
    ]


def test_columns_of_views_come_through(tmp_path, done):
    table = pa.table(
        {
            "prompt": pa.array([f"p {i}" for i in range(4)], pa.string_view()),
            "completion": [f"c {i}" for i in range(4)],
            "raw": pa.array([b"a", None, b"c", b"d"], pa.binary_view()),
        }
    ).replace_schema_metadata({"made": "here"})
    pq.write_table(table, tmp_path / "v.parquet")
    written = pq.read_table(tmp_path / "v.parquet")
    assert written.schema.field("prompt").type == pa.string_view()
    done("random", tmp_path / "v.parquet", "--budget", 2, "--out", tmp_path / "out")
    rows = [row - 1 for row in lines_of(tmp_path / "out").filter("kept")["row"]]
    kept = pq.read_table(tmp_path / "out" / "data" / "v.parquet")
    assert kept.schema.equals(written.schema, check_metadata=True)
    assert kept.to_pylist() == [table.to_pylist()[i] for i in rows]


def test_identical_rows_and_unreadable_ones_are_told(tmp_path, done):
    path = write(
        tmp_path / "rows.jsonl", [record(1), record(2), record(1), "{broken", {"prompt": "only"}]
    )
    result = done("random", path, "--budget", 2, "--out", tmp_path / "out")
    lines = lines_of(tmp_path / "out")
    assert lines["kept"].to_list() == [True, True, False, False, False]
    assert lines["reason"].to_list()[2:4] == ["identical_row", "invalid_json"]
    assert lines["id"][0] == lines["id"][2]
    assert lines["id"].null_count() == 2
    assert sum(result["removed"].values()) == 3
    assert len((tmp_path / "out" / "data" / "rows.jsonl").read_text().splitlines()) == 2


def test_order_of_rows_and_cut_into_files_change_nothing(tmp_path, done):
    own = ("--field", "source=source")
    folder = tmp_path / "parts"
    folder.mkdir()
    # The source is part of a row's identity, so both name it.
    named = [write(tmp_path / "n.jsonl", [record(i, source="s") for i in range(20)])]
    write(folder / "one.jsonl", [record(i, source="s") for i in range(19, 12, -1)])
    write(folder / "two.jsonl", [record(i, source="s") for i in range(13)])
    done("random", *named, *own, "--budget", 7, "--seed", 3, "--out", tmp_path / "a")
    done("random", folder, *own, "--budget", 7, "--seed", 3, "--out", tmp_path / "b")
    a, b = lines_of(tmp_path / "a"), lines_of(tmp_path / "b")
    columns = ["id", "kept", "value", "rank"]
    assert a.select(columns).sort("id").equals(b.select(columns).sort("id"))
    again = done("random", *named, *own, "--budget", 7, "--seed", 4, "--out", tmp_path / "c")
    assert again["seed"] == 4
    assert set(lines_of(tmp_path / "c").filter("kept")["id"]) != set(a.filter("kept")["id"])


def score_table(folder, ids, **columns):
    folder.mkdir(exist_ok=True)
    n = len(ids)
    frame = pl.DataFrame(
        {
            "id": ids,
            "file": ["rows.jsonl"] * n,
            "row": list(range(1, n + 1)),
            "n_response_tokens": pl.Series(range(1, n + 1), dtype=pl.Int32),
            **columns,
        }
    )
    frame.write_parquet(folder / "scores.parquet")
    return folder


def test_scores_come_by_id_and_budgets_in_tokens(rows, tmp_path, done):
    ids = ids_of(rows, tmp_path, done)
    ratios = [0.5 + 0.6 * (i % 2) - i / 100 for i in range(20)]
    scores = score_table(tmp_path / "s", ids[::-1], ifd_loss_ratio=ratios[::-1])
    done("ifd", rows, "--budget", 4, "--scores", scores, "--out", tmp_path / "a")
    lines = lines_of(tmp_path / "a")
    below = [(-r, i) for i, r in enumerate(ratios) if r < 1]
    assert lines.filter("kept")["row"].to_list() == sorted(i + 1 for _, i in sorted(below)[:4])
    assert set(lines["reason"].drop_nulls()) == {"below_cut", "ifd_mismatch"}
    done(
        "random", rows, "--budget", 60, "--unit", "loss_tokens",
        "--scores", scores, "--out", tmp_path / "b",
    )  # fmt: skip
    spent = 21 - lines_of(tmp_path / "b").filter("kept")["row"].to_numpy()
    assert 60 - spent.max() < spent.sum() <= 60


def test_a_number_in_the_records_serves_as_a_score(tmp_path, done, refused):
    path = write(tmp_path / "r.jsonl", [record(i, perplexity=float(i)) for i in range(6)])
    done("perplexity", path, "--budget", 2, "--out", tmp_path / "out")
    assert lines_of(tmp_path / "out").filter("kept")["row"].to_list() == [5, 6]
    holed = write(tmp_path / "h.jsonl", [record(i, mine=None if i == 2 else i) for i in range(6)])
    asked = ["perplexity", holed, "--budget", 2, "--set", "column=mine", "--out", tmp_path / "p"]
    assert "put a number 'mine' in every record" in refused(*asked)
    result = done(*asked, "--on-missing", "drop")
    assert result["removed"] == {"below_cut": 3, "no_score": 1}
    assert not (tmp_path / "p").joinpath(".rows").exists()


def test_missing_scores_name_the_remedy(rows, tmp_path, done, refused):
    ids = ids_of(rows, tmp_path, done)
    asked = ["perplexity", rows, "--budget", 2, "--out", tmp_path / "out"]
    assert "no perplexity, first" in (said := refused(*asked))
    assert "give --scores DIR, as siftline score writes it" in said
    scores = score_table(tmp_path / "s", ids[:15], perplexity=[1.5] * 14 + [float("nan")])
    assert "run siftline score on these files" in refused(*asked, "--scores", scores)
    result = done(*asked, "--scores", scores, "--on-missing", "drop")
    assert result["removed"] == {"below_cut": 12, "no_score": 6}
    assert "is not there" in refused(*asked[:-1], tmp_path / "x", "--scores", tmp_path / "none")
    assert "n_tokens" in refused(
        "random", rows, "--budget", 9, "--unit", "loss_tokens", "--out", tmp_path / "y"
    )


def vectors(n, d=6, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def embedding_table(folder, x, **keys):
    folder.mkdir(exist_ok=True)
    column = pl.Series("embedding", x, dtype=pl.Array(pl.Float32, x.shape[1]))
    pl.DataFrame(keys).with_columns(column).write_parquet(folder / f"{len(keys)}.parquet")
    return folder


def test_embeddings_by_id_or_by_place_select_towards_a_target(rows, tmp_path, done):
    ids = ids_of(rows, tmp_path, done)
    target = write(tmp_path / "t.jsonl", [record(100), record(101)])
    out = tmp_path / "tid"
    done("random", target, "--budget", 1, "--out", out)
    wanted = lines_of(out)["id"].to_list()
    x = vectors(20)
    near = np.stack([x[7], x[11]])
    a = embedding_table(tmp_path / "a", np.vstack([x, near]), id=[*ids, *wanted])
    b = embedding_table(
        tmp_path / "b", x[::-1], file=["rows.jsonl"] * 20, row=list(range(20, 0, -1))
    )
    embedding_table(b, near, id=wanted)
    for folder in (a, b):
        result = done(
            "rds_plus", rows, "--budget", 2, "--target", target,
            "--embeddings", folder, "--out", tmp_path / f"out_{folder.name}",
        )  # fmt: skip
        lines = lines_of(tmp_path / f"out_{folder.name}")
        assert lines.filter("kept")["row"].to_list() == [8, 12]
        assert result["facts"]["target_rows"] == 2


def test_places_that_are_in_the_pool_and_in_the_target_are_refused(tmp_path, done, refused):
    for name in ("pool", "tgt"):
        (tmp_path / name).mkdir()
    pool = write(tmp_path / "pool" / "a.jsonl", [record(i) for i in range(4)])
    target = write(tmp_path / "tgt" / "a.jsonl", [record(100)])
    by_place = embedding_table(tmp_path / "e", vectors(4), file=["a.jsonl"] * 4, row=[1, 2, 3, 4])
    asked = ["rds_plus", pool, "--budget", 1, "--embeddings", by_place, "--out", tmp_path / "out"]
    said = refused(*asked, "--target", target)
    assert "a.jsonl is a file of FILE and another one of --target: key them by id" in said
    other = target.rename(target.with_name("b.jsonl"))
    assert "1 target rows have no embedding" in refused(*asked, "--target", other)
    done(*asked, "--target", pool)  # one file for both: its places mean one thing


def test_bad_embeddings_name_the_remedy(rows, tmp_path, done, refused):
    ids = ids_of(rows, tmp_path, done)
    asked = ["kmeans_quality", rows, "--budget", 2, "--out", tmp_path / "out"]
    assert "give --embeddings DIR, or --embedder MODEL_DIR" in refused(*asked)
    few = embedding_table(tmp_path / "few", vectors(19), id=ids[:19])
    assert "no embedding, first" in (said := refused(*asked, "--embeddings", few))
    assert "--on-missing drop" in said
    x = vectors(20)
    x[3, 1] = np.inf
    odd = embedding_table(tmp_path / "odd", x, id=ids)
    assert "hold NaN or infinity" in refused(*asked, "--embeddings", odd)
    mixed = embedding_table(tmp_path / "mixed", vectors(10), id=ids[:10])
    pl.DataFrame({"id": ids[10:], "embedding": vectors(10, 4).tolist()}).write_parquet(
        mixed / "more.parquet"
    )
    assert "of several kinds" in refused(*asked, "--embeddings", mixed)
    assert "--embedding-column" in refused(*asked, "--embeddings", few, "--embedding-column", "v")
    (few / "again.parquet").write_bytes((few / "1.parquet").read_bytes())
    assert "no embedding, first" in refused(*asked, "--embeddings", few)  # equal ones are one
    stale = embedding_table(tmp_path / "stale", vectors(20), id=ids)
    embedding_table(stale, vectors(2, seed=1), id=ids[:2], of=[1, 2])
    said = refused(*asked, "--embeddings", stale)
    assert f"two embeddings of id {min(ids[:2])} that differ: leave the files of one model" in said
    place = {"file": ["rows.jsonl"] * 2, "row": [3, 3]}
    by_place = embedding_table(tmp_path / "place", vectors(2), **place)
    said = refused(*asked, "--embeddings", by_place)
    assert "two embeddings of file rows.jsonl, row 3 that differ" in said
    result = done(*asked, "--embeddings", few, "--on-missing", "drop")
    assert result["removed"] == {"no_embedding": 1, "not_drawn": 17}


def test_words_of_a_target_and_rows_that_leaked(tmp_path, call, refused):
    pool = [{"prompt": f"number {i}", "completion": f"sum of {i}"} for i in range(15)]
    french = {"prompt": "ou est le chat", "completion": "le chat dort"}
    path = write(tmp_path / "p.jsonl", [*pool, french])
    target = write(
        tmp_path / "p2.jsonl", [{**french, "source": "p"}, {**french, "prompt": "le chat"}]
    )
    for method in ("dsir", "nearest_words"):
        out = tmp_path / method
        code, said, err = call(method, path, "--budget", 1, "--target", target, "--out", out)
        assert code == 0, err
        assert "the pool has the prompts of 1 of 2 target rows" in err
        assert lines_of(out).filter("kept")["row"].to_list() == [16]
        assert "kept            1" in said
    empty = write(tmp_path / "none.jsonl", [])
    said = refused("dsir", path, "--budget", 1, "--target", empty, "--out", tmp_path / "x")
    assert "none.jsonl: empty, and a target needs rows: give rows like those" in said
    assert "give --target FILE" in refused("dsir", path, "--budget", 1, "--out", tmp_path / "x")
    assert "knows no target" in refused(
        "random", path, "--budget", 1, "--target", target, "--out", tmp_path / "x"
    )


def test_rows_are_embedded_here_and_the_vectors_kept(rows, tiny_model, tmp_path, done):
    target = write(tmp_path / "t.jsonl", [record(4), record(100)])
    asked = ["rds_plus", rows, "--budget", 3, "--target", target]
    done(*asked, "--embedder", tiny_model, "--out", tmp_path / "a")
    vectors = pl.read_parquet(tmp_path / "a" / "embeddings.parquet")
    assert vectors.height == 22
    assert isinstance(vectors.schema["embedding"], pl.Array)
    assert 5 in lines_of(tmp_path / "a").filter("kept")["row"].to_list()
    done(*asked, "--embeddings", tmp_path / "a", "--out", tmp_path / "b")
    assert lines_of(tmp_path / "b").equals(lines_of(tmp_path / "a"))


def test_the_table_of_methods(call):
    code, out, _ = call("--list", "--json")
    assert code == 0
    assert [line["method"] for line in json.loads(out)] == [entry.name for entry in METHODS]
    _, text, _ = call("--list")
    for entry in METHODS:
        assert entry.warning in text


def test_what_cannot_be_is_refused_in_one_line(rows, tmp_path, refused, done):
    out = tmp_path / "out"
    for arguments, said in (
        (["random"], "needs METHOD and FILE"),
        (["random", rows, "--out", out], "--budget is missing"),
        (["random", rows, "--budget", 3], "--out is missing"),
        (["rnadom", rows, "--budget", 3, "--out", out], "did you mean 'random'?"),
        (["random", rows, "--budget", 30, "--out", out], "on_shortfall to smaller"),
        (["random", rows, "--budget", 0, "--out", out], "budget is 0"),
        (["random", rows, "--budget", 3, "--set", "sed=4", "--out", out], "did you mean 'seed'?"),
        (["random", tmp_path / "no.jsonl", "--budget", 3, "--out", out], "no such file or folder"),
        (["random", rows, "--field", "x", "--budget", 3, "--out", out], "FIELD=COLUMN"),
    ):
        assert said in refused(*arguments)
    assert not out.exists()
    done("random", rows, "--budget", 30, "--on-shortfall", "smaller", "--out", out)
    assert "exists" in refused("random", rows, "--budget", 3, "--out", out)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


class _Steps:
    needs = ("text",)

    def summarise(self, bucket):
        return bucket.select("id", pl.col("text").str.len_chars().alias("size"))

    def decide(self, states, budget, target=None):
        return set(pl.concat(states).sort("size", "id")["id"][: budget.size])

    def apply(self, bucket, plan):
        from siftline.rows.selection import Selection, decisions

        assert "text" in bucket.columns
        kept = [i in plan for i in bucket["id"]]
        return Selection(decisions(bucket["id"], kept=kept, reason=["long"] * bucket.height))


def test_the_method_in_the_documentation_works(rows, tmp_path, done, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "selectors.md").read_text(encoding="utf-8")
    (code,) = [c for c in re.findall(PYTHON, text, flags=re.S) if "class MostWords" in c]
    (tmp_path / "documented_method.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    talkative = write(
        tmp_path / "w.jsonl", [record(i, completion="a " * (i % 5)) for i in range(9)]
    )
    out = tmp_path / "out"
    result = done("documented_method:MostWords", talkative, "--budget", 2, "--out", out)
    assert lines_of(out).filter("kept")["row"].to_list() == [4, 5]
    assert result["removed"]["fewer_words"] == 5


def test_a_method_of_ones_own(rows, tmp_path, done, monkeypatch):
    from dataclasses import dataclass

    module = ModuleType("own_methods")
    module.Short = dataclass(frozen=True)(type("Short", (_Steps,), {}))
    monkeypatch.setitem(sys.modules, "own_methods", module)
    result = done("own_methods:Short", rows, "--budget", 4, "--out", tmp_path / "out")
    assert result["removed"] == {"long": 16}
    assert lines_of(tmp_path / "out").filter("kept")["row"].to_list() == [1, 2, 3, 4]
