"""Accounting closes, every decision can be found again, and a row's story is whole."""

import json
import shutil
import tempfile
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.ingest.pool import Pool, PoolSpec, build_pool
from siftline.ingest.readers import Source
from siftline.recipe.parse import parse
from siftline.report.story import explain
from siftline.rows import schema
from siftline.rows.ledger import (
    DECISIONS,
    Accounting,
    Chapter,
    StageOutput,
    StageResult,
    reasons,
    stage_chapters,
    write_stage,
)
from siftline.rows.schema import bucket_of, make_row, message
from siftline.rows.selection import decisions
from siftline.workspace import Workspace


def row(text, **more):
    return make_row([message("user", text), message("assistant", f"answer to {text}")], **more)


def added_table(*children):
    rows = [
        {**row(text), "parent_id": row(parent)["id"], "origin": "sampled"}
        for text, parent in children
    ]
    return pa.Table.from_pylist(rows, schema=schema.ADDED)


def write(path, results, **more):
    options = {"tables": {}, "facts": {}, "identity": {}, "rows_in": 0} | more
    return write_stage(path, results, **options)


OUTCOMES = st.dictionaries(
    st.text("0123456789abcdef", min_size=40, max_size=40),
    st.sampled_from(["kept", "removed", "failed"]),
    max_size=20,
)


@settings(max_examples=30, deadline=None)
@given(outcomes=OUTCOMES, extra=st.sets(st.integers(0, 50), max_size=5), bits=st.integers(0, 3))
def test_accounting_closes_and_every_line_reads_back(outcomes, extra, bits):
    buckets = 1 << bits
    more = [schema.bucket_of(row(f"new {i}")["id"], buckets) for i in extra]
    results = []
    for b in range(buckets):
        here = {i: o for i, o in outcomes.items() if bucket_of(i, buckets) == b}
        decided = {i: o for i, o in here.items() if o != "failed"}
        kept = [o == "kept" for o in decided.values()]
        frame = decisions(
            list(decided), kept=kept, reason=["gone"] * len(kept), value=[0.5] * len(kept)
        )
        failed = {i: "too_long" for i, o in here.items() if o == "failed"}
        mine = [(f"new {i}", "parent") for i, at in zip(extra, more, strict=True) if at == b]
        results.append(StageResult(frame, failed, added_table(*mine) if mine else None))
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "s" / "a.json"
        written = write(path, results, rows_in=len(outcomes), facts={"cut": 0.5})
        output = StageOutput(path)
        assert output.accounting == written.accounting
        assert output.accounting.closes
        counts = output.accounting.as_json()
        assert counts["in"] + counts["added"] == sum(
            counts[k] for k in ("kept", "removed", "failed")
        )
        tally = list(outcomes.values())
        assert counts["kept"] == tally.count("kept") + len(extra)
        assert (counts["removed"], counts["failed"]) == (
            tally.count("removed"),
            tally.count("failed"),
        )
        assert output.facts == {"cut": 0.5}
        lines = {r["id"]: r for r in output.all_decisions().to_dicts()}
        assert {i: lines[i]["outcome"] for i in outcomes} == outcomes
        assert {i for i, r in lines.items() if r["added"]} == {row(f"new {i}")["id"] for i in extra}
        assert all((r["reason"] is None) == (r["outcome"] == "kept") for r in lines.values())
        ids = output.all_decisions()["id"].to_list()
        assert ids == sorted(ids)
        added = [r for b in range(buckets) for r in output.added(b).to_pylist()]
        assert sorted(r["id"] for r in added) == sorted(row(f"new {i}")["id"] for i in extra)


def test_accounting_that_does_not_close_says_so():
    assert Accounting(rows_in=3, added=1, kept=2, removed=1, failed=1).closes
    assert not Accounting(rows_in=3, added=1, kept=2, removed=1, failed=0).closes
    assert not Accounting(rows_in=3, added=0, kept=2, removed=1, failed=1).closes


def test_a_lost_row_leaves_the_accounting_open(tmp_path):
    """The count of incoming rows is the caller's, so a stage that drops one is caught."""
    results = [StageResult(decisions(["a", "b"], kept=[True, True]))]
    assert not write(tmp_path / "s.json", results, rows_in=3).accounting.closes


@pytest.mark.parametrize(
    "result",
    [
        StageResult(decisions(["a", "a"], kept=[True, True])),
        StageResult(decisions(["a"], kept=[True]), {"a": "too_long"}),
        StageResult(decisions([row("x")["id"]], kept=[True]), added=added_table(("x", "y"))),
        StageResult(decisions([], kept=[]), {row("x")["id"]: "f"}, added_table(("x", "y"))),
    ],
)
def test_a_row_decided_twice_is_our_own_mistake(result):
    with pytest.raises(AssertionError):
        result.to_table()


def test_lines_have_one_schema_whatever_the_result_holds():
    variants = [
        StageResult(decisions([], kept=[])),
        StageResult(decisions([], kept=[]), {"b": "x", "a": "y"}),
        StageResult(decisions(["b"], kept=[False], reason=["r"], value=[1.0], threshold=2.0)),
        StageResult(decisions([], kept=[]), added=added_table(("x", "y"))),
    ]
    for result in variants:
        assert result.to_table().schema.equals(DECISIONS)
    assert variants[1].to_table().column("reason").to_pylist() == ["y", "x"]


def test_version_depends_on_decisions_alone(tmp_path):
    """Not on the buckets, the order of the lines, facts, side tables or what a path is called."""
    ids = sorted(row(f"q{i}")["id"] for i in range(20))

    def version(name, buckets, flip=None, **more):
        results = []
        for b in range(buckets):
            mine = [i for i in reversed(ids) if bucket_of(i, buckets) == b]
            frame = decisions(mine, kept=[i != flip for i in mine], reason=["gone"] * len(mine))
            results.append(StageResult(frame))
        return write(tmp_path / name, results, rows_in=20, **more).manifest.version

    table = {"t": pl.DataFrame({"x": [1]})}
    same = {version("a", 1), version("b", 4), version("c", 4, facts={"x": 1}, tables=table)}
    assert len(same) == 1
    assert version("d", 4, flip=ids[3]) not in same


def test_writing_again_touches_nothing(tmp_path):
    results = [StageResult(decisions(["a", "b"], kept=[True, False], reason=[None, "r"]))]
    write(tmp_path / "s.json", results, rows_in=2)
    before = {p.name: p.stat().st_ino for p in tmp_path.rglob("*")}
    write(tmp_path / "s.json", results, rows_in=2)
    assert {p.name: p.stat().st_ino for p in tmp_path.rglob("*")} == before


def test_side_tables_read_back_and_absent_ones_are_none(tmp_path):
    clusters = pl.DataFrame({"prompt_id": ["a", "b"], "cluster": [0, 1], "d": [0.5, None]})
    tables = {"clusters": clusters, "empty": clusters.clear()}
    output = write(tmp_path / "s.json", [StageResult(decisions([], kept=[]))], tables=tables)
    assert output.table("clusters").equals(clusters)
    assert output.table("none") is None
    assert output.table("empty") is None


def test_reasons_come_most_first_and_ties_by_name(tmp_path):
    why = ["near", "exact", "near", None, "exact", "off", "a_tie"]
    ids = [f"{i:040x}" for i in range(len(why))]
    frame = decisions(ids, kept=[w is None for w in why], reason=why)
    output = write(tmp_path / "s.json", [StageResult(frame, {"f" * 40: "near"})], rows_in=8)
    counted = reasons(output.all_decisions())
    assert list(counted.items()) == [("near", 3), ("exact", 2), ("a_tie", 1), ("off", 1)]


# Stories


class House:
    """A pool of rows q0 .. q9 with two stages: `dups` removes, fails and adds; `next` removes."""

    def __init__(self, root):
        self.workspace = Workspace(root / "root")
        folder = root / "in"
        folder.mkdir()
        lines = [{"prompt": f"q{i}", "completion": f"answer to q{i}"} for i in range(10)]
        texts = [json.dumps(line) for line in lines]
        (folder / "a.jsonl").write_text("\n".join([*texts, "no json"]) + "\n")
        (folder / "b.jsonl").write_text(texts[0] + "\n")
        spec = PoolSpec("toy", (Source(str(folder), source="s"),), 2, 0.5)
        build_pool(self.workspace.pool("toy"), spec)
        pool = Pool(self.workspace.pool("toy"))
        self.id = {
            r["messages"][0]["content"]: r["id"] for r in pool.all_rows(["messages"]).to_pylist()
        }
        self.new = make_row([message("user", "q2"), message("assistant", "new")])["id"]
        outputs = []
        playing = sorted(self.id.values())
        for name in ("dups", "next"):
            outputs.append((name, self._stage(name, playing)))
            frame = outputs[-1][1].all_decisions()
            playing = frame.filter(pl.col("outcome") == "kept")["id"].to_list()
        stages = [{"duplicates": {"name": "dups"}}, {"duplicates": {"name": "next"}}]
        recipe = parse(
            {
                "name": "r",
                "pool": {"name": "toy", "inputs": [{"path": str(folder)}]},
                "models": {"m": {"path": "x"}},
                "stages": stages,
                "budget": {"size": 1},
            }
        )
        done = [(s, o) for s, (_, o) in zip(recipe.stages, outputs, strict=True)]
        self.outputs, self.recipes = outputs, [(recipe, done)]

    def _stage(self, name, playing):
        gone = {"dups": {self.id["q1"]: self.id["q3"]}, "next": {self.id["q5"]: self.id["q3"]}}[
            name
        ]
        failed = {self.id["q4"]: "too_long"} if name == "dups" else {}
        results = []
        for b in range(2):
            mine = [i for i in playing if bucket_of(i, 2) == b and i not in failed]
            frame = decisions(
                mine,
                kept=[i not in gone for i in mine],
                reason=["near"] * len(mine),
                value=[0.9] * len(mine),
                threshold=0.8,
                matched_id=[gone.get(i) for i in mine],
            )
            added = None
            if name == "dups" and bucket_of(self.new, 2) == b:
                fresh = make_row([message("user", "q2"), message("assistant", "new")])
                fresh |= {"parent_id": self.id["q2"], "origin": "sampled"}
                added = pa.Table.from_pylist([fresh], schema=schema.ADDED)
            bad = {i: why for i, why in failed.items() if bucket_of(i, 2) == b}
            results.append(StageResult(frame, bad, added))
        path = self.workspace.stage("r", name) / "k.json"
        return write(path, results, rows_in=len(playing))

    def tell(self, name):
        return explain(self.workspace, name, self.recipes)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return House(tmp_path_factory.mktemp("house"))


def said(stories):
    return [[(c.stage, c.outcome) for c in chapters] for _, chapters in stories]


def test_chapters_of_a_kept_a_removed_a_failed_and_an_added_row(house):
    def chapters(identity):
        return list(stage_chapters(identity, house.outputs, 2))

    assert [(c.stage, c.outcome) for c in chapters(house.id["q3"])] == [
        ("dups", "kept"),
        ("next", "kept"),
    ]
    (removed,) = chapters(house.id["q1"])
    assert removed.outcome == "removed"
    assert removed.detail == {
        "reason": "near",
        "value": 0.9,
        "threshold": 0.8,
        "matched_id": house.id["q3"],
    }
    (failed,) = chapters(house.id["q4"])
    assert (failed.outcome, failed.detail["reason"]) == ("failed", "too_long")
    came, kept = chapters(house.new)
    assert (came.outcome, kept.outcome) == ("added", "kept")
    assert (came.detail["origin"], came.detail["parent_id"]) == ("sampled", house.id["q2"])
    assert chapters("0" * 40) == []


def test_a_chapter_is_one_readable_line():
    text = str(Chapter("dups", "removed", {"reason": "near", "value": 0.9, "matched_id": None}))
    assert text.split() == ["dups", "removed", "reason=near,", "value=0.9"]
    assert str(Chapter("dups", "kept", {"reason": None})).split() == ["dups", "kept"]


def test_a_story_begins_with_every_line_the_row_was_read_from(house):
    ((title, chapters),) = house.tell(house.id["q0"])
    assert title == f"recipe r, row {house.id['q0']}"
    assert [(c.stage, c.outcome) for c in chapters] == [
        ("pool", "read"),
        ("pool", "collapsed"),
        ("dups", "kept"),
        ("next", "kept"),
    ]
    assert chapters[0].detail == {"file": "a.jsonl", "line": 1, "source": "s"}
    assert chapters[1].detail["reason"] == "identical to a.jsonl:1"


def test_a_row_is_found_by_prefix_by_line_and_when_it_was_added(house):
    whole = house.tell(house.id["q5"])
    assert said(whole) == [[("pool", "read"), ("dups", "kept"), ("next", "removed")]]
    assert house.tell(house.id["q5"][:12]) == whole
    assert house.tell("a.jsonl:6") == whole
    assert said(house.tell("b.jsonl:1"))[0][1] == ("pool", "collapsed")
    assert said(house.tell(house.new)) == [[("dups", "added"), ("next", "kept")]]
    assert said(house.tell("a.jsonl:11")) == [[("pool", "quarantined")]]
    ((title, chapters),) = explain(house.workspace, house.id["q5"], [])
    assert title.startswith("pool toy, row ")
    assert len(chapters) == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("abc", "'abc' is no row id: give 8 to 40 hex digits, or FILE:LINE"),
        ("no such row", "is no row id"),
        ("0" * 41, "is no row id"),
        ("00000000", "knows '00000000'"),
        ("a.jsonl:99", "knows 'a.jsonl:99'"),
    ],
)
def test_a_row_nobody_knows_is_one_line(house, name, says):
    with pytest.raises(ValueError, match=says) as caught:
        house.tell(name)
    assert "\n" not in str(caught.value)


def test_digits_that_fit_several_rows_ask_for_more(tmp_path):
    workspace = Workspace(tmp_path)
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"prompt": "q", "completion": c}) + "\n" for c in "ab")
    )
    build_pool(workspace.pool("toy"), PoolSpec("toy", (Source(str(tmp_path / "in.jsonl")),)))
    prompt = row("q")["prompt_id"]
    with pytest.raises(ValueError, match="fits 2 rows of pool toy: give more digits"):
        explain(workspace, prompt, [])


def test_a_story_ends_with_the_versions_that_hold_the_row(house, make_version):
    folder, kept, lost = house.workspace.curated("r"), house.id["q0"], house.id["q3"]
    try:
        tables = [pa.table({"id": ids}) for ids in ([kept], [kept, "f" * 40], ["e" * 40])]
        versions = [make_version(folder, [table]).name for table in tables]
        ((_, chapters),) = house.tell(kept)
        published = [c.detail["version"] for c in chapters if c.outcome == "published"]
        assert published == sorted(versions[:2])
        assert "published" not in {c.outcome for c in house.tell(lost)[0][1]}
    finally:
        shutil.rmtree(folder)
