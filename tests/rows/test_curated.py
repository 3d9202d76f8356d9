"""A published version, read back by the libraries that will read it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.kernels.draws import uniforms
from siftline.rows import curated, shuffle
from siftline.rows.card import CardInfo, StageCount, escape, render, size_category
from siftline.rows.curated import REMOVED, publish, resolve_latest
from siftline.rows.schema import ROW, make_row, message
from siftline.rows.verified import file_hash

IDENTITY = {"recipe": "demo", "recipe_hash": "abc", "pool": "def", "software": "0.1"}
STAGES = (
    StageCount("pool", "pool", 60, 0, 60, 0, 0),
    StageCount("near", "gate", 60, 0, 40, 19, 1, (("near_duplicate", 19), ("too_long", 1))),
)
CARD = CardInfo("demo", "mit", description="A demo.", how=("chosen by hand",), funnel=STAGES)


def make_rows(n, *, tools=None, reasoning=None, size=1, start=0):
    rows = []
    for i in range(start, start + n):
        chat = [message("user", f"question {i}"), message("assistant", f"answer {i} " * size)]
        if reasoning and i == start + n - 1:  # only the last row, so that one shard lacks it
            chat[-1]["reasoning"] = reasoning
        rows.append(make_row(chat, source="s", tools=tools if i % 7 == 0 else None))
    return pa.Table.from_pylist(rows, schema=ROW)


def make_scores(table):
    ids = table["id"].to_pylist()
    # The first ten rows have no scores: those columns must be null, not absent.
    return pl.DataFrame(
        {
            "id": ids[10:],
            "sift_quality": [i / 7 for i in range(10, len(ids))],
            "sift_level": pl.Series(range(10, len(ids)), dtype=pl.Int32),
            "sift_source": ["s"] * (len(ids) - 10),
        }
    )


def make_removed(n=5):
    rows = [(f"{i:040x}", "near", "gate", "near_duplicate", 0.9, 0.8, f"{i + 1:040x}", "p", "r")
            for i in range(n)]  # fmt: skip
    return pl.DataFrame(rows, schema=REMOVED, orient="row")


def run(root, table, **options):
    scores = options.pop("scores", None)
    removed = options.pop("removed", make_removed())
    options = {"seed": 7, "identity": IDENTITY, "card": CARD} | options
    scores = make_scores(table) if scores is None else scores
    return publish(table, scores, removed, root=root, **options)


def contents(path):
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def expected_order(table, seed=7):
    ids = table["id"].to_pylist()
    return [i for _, i in sorted(zip(uniforms(seed, "curated", ids), ids, strict=True))]


def test_layout_and_order(tmp_path):
    table = make_rows(60)
    done = run(tmp_path, table)
    assert sorted(p.name for p in done.path.iterdir()) == [
        "README.md", "data", "manifest.json", "removed"]  # fmt: skip
    assert os.listdir(done.path / "data") == ["train-00000-of-00001.parquet"]
    assert os.readlink(tmp_path / "latest") == done.version
    assert sorted(os.listdir(tmp_path)) == sorted([done.version, "latest"])
    read = pq.read_table(done.path / "data/train-00000-of-00001.parquet")
    assert read["id"].to_pylist() == expected_order(table)
    assert read.schema.names == ["id", "messages", "sift_quality", "sift_level", "sift_source"]
    assert read.schema.metadata is None
    assert read.schema.field("messages").type == pa.list_(
        pa.struct([("role", pa.string()), ("content", pa.string())])
    )


def test_every_value_arrives(tmp_path):
    table = make_rows(60, tools='[{"name": "f"}]', reasoning="hmm")
    read = pl.read_parquet(run(tmp_path, table, ranges=5).path / "data/*.parquet").sort("id")
    source = pl.from_arrow(table).join(make_scores(table), on="id", how="left").sort("id")
    names = ["id", "tools", "sift_quality", "sift_level", "sift_source"]
    assert read.select(names).equals(source.select(names))
    assert read["sift_level"].null_count() == 10
    for ours, theirs in zip(read["messages"], source["messages"], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            kept = {"role": b["role"], "content": b["content"], "reasoning_content": b["reasoning"]}
            assert a == kept


def test_small_shards_load_everywhere(tmp_path):
    import datasets
    import duckdb

    table = make_rows(120, tools='[{"name": "f"}]', reasoning="hmm", size=20)
    done = run(tmp_path / "root", table, shard_bytes=6000, row_group_bytes=2000)
    files = sorted((done.path / "data").iterdir())
    assert len(files) > 3
    assert [f.name for f in files] == [
        f"train-{i:05d}-of-{len(files):05d}.parquet" for i in range(len(files))
    ]
    metadata = [pq.read_metadata(f) for f in files]
    assert all(m.num_rows for m in metadata)
    assert max(m.num_row_groups for m in metadata) > 1
    assert len({pq.read_schema(f) for f in files}) == 1
    order = expected_order(table)
    folder, cache = str(done.path), str(tmp_path / "cache")
    loaded = datasets.load_dataset(folder, split="train", cache_dir=cache)
    assert loaded["id"] == order
    assert loaded[0]["messages"][0]["role"] == "user"
    streamed = datasets.load_dataset(folder, split="train", streaming=True)
    assert [row["id"] for row in streamed] == order
    removed = datasets.load_dataset(folder, "removed", split="train", cache_dir=cache)
    assert removed.num_rows == 5
    assert set(removed.column_names) == set(REMOVED)
    assert len(list(datasets.load_dataset(folder, "removed", split="train", streaming=True))) == 5
    assert pl.scan_parquet(f"{folder}/data/*.parquet").collect()["id"].to_list() == order
    query = f"select id, messages[1].role from '{folder}/data/*.parquet'"
    assert sorted(duckdb.sql(query).fetchall()) == sorted((i, "user") for i in order)
    assert pq.read_table(done.path / "data")["id"].to_pylist() == order


def test_input_order_and_cutting_do_not_matter(tmp_path):
    table = make_rows(150, tools="[]", reasoning="hmm")
    scores, removed = make_scores(table), make_removed(30)
    options = {"shard_bytes": 5000, "row_group_bytes": 1500}
    first = run(tmp_path / "a", table, scores=scores, removed=removed, **options)
    shuffled = table.take(np.random.default_rng(3).permutation(150))
    pieces = (shuffled.slice(i, 13) for i in range(0, 150, 13))
    again = publish(
        pieces,
        scores.sample(fraction=1, shuffle=True, seed=1),
        removed.sample(fraction=1, shuffle=True, seed=2),
        root=tmp_path / "b",
        seed=7,
        identity=dict(reversed(IDENTITY.items())),
        card=CARD,
        ranges=3,
        **options,
    )
    assert again.version == first.version
    assert contents(again.path) == contents(first.path)
    other = run(tmp_path / "a", table, scores=scores, removed=removed, **options | {"seed": 8})
    assert other.version != first.version


def stats(path):
    return {p: (s.st_ino, s.st_mtime_ns) for p in path.rglob("*") for s in [p.lstat()]}


def test_publishing_again_touches_nothing(tmp_path):
    table = make_rows(30)
    done = run(tmp_path, table)
    before = stats(tmp_path)
    again = run(tmp_path, table)
    assert (done.new, again.new) == (True, False)
    assert again.manifest == done.manifest
    assert stats(tmp_path) == before
    other = run(tmp_path, make_rows(31))
    assert {k: v for k, v in stats(tmp_path).items() if k in before}.items() >= {
        k: v for k, v in before.items() if k.name != "latest"
    }.items()
    assert os.readlink(tmp_path / "latest") == other.version


def test_an_altered_version_is_refused(tmp_path):
    table = make_rows(30)
    done = run(tmp_path, table)
    (done.path / "data/extra.txt").write_text("x")
    with pytest.raises(ValueError, match="was altered"):
        run(tmp_path, table)


def test_manifest_tells_the_truth(tmp_path):
    done = run(tmp_path, make_rows(50), shard_bytes=3000)
    manifest = json.loads((done.path / "manifest.json").read_text())
    assert manifest == done.manifest
    assert manifest["identity"] == IDENTITY
    assert {f["path"] for f in manifest["files"]} == set(contents(done.path)) - {"manifest.json"}
    for file in manifest["files"]:
        path = done.path / file["path"]
        assert file["sha256"] == file_hash(path)
        assert file["bytes"] == path.stat().st_size
    rows = [f["rows"] for f in manifest["files"] if f["path"].startswith("data/")]
    assert sum(rows) == manifest["counts"]["rows"] == 50
    reasons = [{"stage": "near", "reason": "near_duplicate", "rows": 5}]
    assert manifest["counts"]["reasons"] == reasons


def test_nothing_removed_leaves_no_folder_and_no_config(tmp_path):
    import datasets

    done = run(tmp_path / "root", make_rows(20), removed=pl.DataFrame(schema=REMOVED))
    assert not (done.path / "removed").exists()
    assert datasets.get_dataset_config_names(str(done.path)) == ["default"]


def test_errors_name_the_remedy(tmp_path):
    table = make_rows(20)
    with pytest.raises(ValueError, match="stage near removed 19 of 60, loosen it"):
        run(tmp_path, table.slice(0, 0), scores=pl.DataFrame({"id": ["a"]}))
    with pytest.raises(ValueError, match="more than once"):
        run(tmp_path, pa.concat_tables([table, table.slice(3, 1)]))
    with pytest.raises(ValueError, match="call it sift_text"):
        run(tmp_path, table, scores=pl.DataFrame({"id": ["a"], "text": ["b"]}))
    with pytest.raises(ValueError, match="sift_x is Null"):
        run(tmp_path, table, scores=pl.DataFrame({"id": ["a"], "sift_x": [None]}))
    with pytest.raises(ValueError, match="sift_x is List"):
        run(tmp_path, table, scores=pl.DataFrame({"id": ["a"], "sift_x": [[1]]}))
    with pytest.raises(ValueError, match=r"lack the columns \['kind'\]"):
        run(tmp_path, table, removed=make_removed().drop("kind"))
    rows = [*table.to_pylist(), {**table.to_pylist()[0], "id": "e" * 40, "messages": []}]
    with pytest.raises(ValueError, match="e has no messages"):
        run(tmp_path, pa.Table.from_pylist(rows, schema=ROW))
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="no published version"):
        resolve_latest(tmp_path)


@pytest.mark.parametrize("broken", ["write_parquet", "write_text", "write_json", "building"])
def test_an_exception_leaves_nothing(tmp_path, monkeypatch, broken):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    first = run(tmp_path, make_rows(20))
    monkeypatch.setattr(curated, broken, fail)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, make_rows(21))
    assert sorted(os.listdir(tmp_path)) == sorted([first.version, "latest"])


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from siftline.rows import curated
import test_curated

write = curated.write_json
def die(*args, **kwargs):
    write(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
curated.write_json = die
test_curated.run(Path({root!r}), test_curated.make_rows(30))
"""


def test_a_killed_publisher_leaves_nothing_visible(tmp_path):
    # write_json is the last step before the rename: the whole tree is there, and must not show.
    code = KILLED.format(tests=str(Path(__file__).parent), root=str(tmp_path))
    ended = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    left = os.listdir(tmp_path)
    assert len(left) == 1
    assert left[0].startswith(".")
    done = run(tmp_path, make_rows(30))
    assert sorted(os.listdir(tmp_path)) == sorted([done.version, "latest"])


READER = """
import json, sys
from pathlib import Path
import polars as pl
from siftline.rows.curated import resolve_latest

root, seen = Path(sys.argv[1]), []
print("ready", flush=True)
while not (root / "stop").exists():
    json.loads((root / "latest/manifest.json").read_text())  # one open: the link itself will do
    folder = resolve_latest(root)
    manifest = json.loads((folder / "manifest.json").read_text())
    frame = pl.scan_parquet(folder / "data/*.parquet").collect()
    assert frame.height == manifest["counts"]["rows"]
    seen.append(frame.height)
print(len(seen), len(set(seen)))
"""


def test_a_reader_of_latest_never_fails(tmp_path):
    tables = [make_rows(n) for n in (40, 41, 42, 43)]
    scores = [make_scores(t) for t in tables]
    run(tmp_path, tables[0], scores=scores[0])
    command = [sys.executable, "-c", READER, str(tmp_path)]
    reader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert reader.stdout.readline() == "ready\n"
    for i in range(20):
        run(tmp_path, tables[i % 4], scores=scores[i % 4], ranges=2)
    (tmp_path / "stop").touch()
    out, _ = reader.communicate(timeout=60)
    assert reader.returncode == 0
    reads, versions = map(int, out.split())
    assert reads > 5
    assert versions > 1


def test_two_publishers_of_one_version(tmp_path, monkeypatch):
    table = make_rows(30)
    done = run(tmp_path / "a", table)
    target = tmp_path / "b" / done.version
    manifest = curated._manifest

    def overtaken(*args):  # the other one finishes just before the rename
        shutil.copytree(done.path, target)
        return manifest(*args)

    monkeypatch.setattr(curated, "_manifest", overtaken)
    assert not run(tmp_path / "b", table).new
    assert contents(target) == contents(done.path)
    assert list(tmp_path.rglob(".*")) == []


def row_sizes(table):
    def size(value):
        if isinstance(value, str):
            return len(value.encode()) + 4
        if isinstance(value, list):
            return 4 + sum(size(v) for v in value)
        if isinstance(value, dict):
            return sum(size(v) for v in value.values())
        return 4 if value is None else 8

    return [sum(size(v) for v in row.values()) for row in table.to_pylist()]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text(max_size=60), min_size=1, max_size=40), st.integers(1, 400), st.integers(1, 9)
)
def test_cuts_are_greedy_whatever_the_chunks(texts, limit, step):
    chats = [[{"role": "user", "content": t}] * (len(t) % 3 + 1) for t in texts]
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema([("id", pa.string()), ("m", pa.list_(turn))])
    table = pa.Table.from_pydict({"id": texts, "m": chats}, schema=schema)
    pieces = list(shuffle.cut((table.slice(i, step) for i in range(0, len(texts), step)), limit))
    expected, size = [], limit + 1
    for i, weight in enumerate(row_sizes(table)):
        if size + weight > limit and (size or not expected):
            expected.append([])
            size = 0
        expected[-1].append(texts[i])
        size += weight
    assert [p["id"].to_pylist() for p in pieces] == expected
    assert pa.concat_tables(pieces).combine_chunks().equals(table)


def test_card_header_and_escapes(tmp_path):
    hostile = "a|b\n# <script>alert(1)</script> `x`: [y](z)"
    stage = StageCount(hostile, "gate", 3, 0, 1, 2, 0, ((hostile, 2),))
    info = CardInfo(hostile, 'mit"\n- x: 1', hostile, ("en", "no"), (hostile,), (hostile,),
                    (("sift_quality", hostile),), (stage,))  # fmt: skip
    done = run(tmp_path, make_rows(20), card=info)
    text = (done.path / "README.md").read_text()
    header, body = text.removeprefix("---\n").split("\n---\n", 1)
    fields = yaml.safe_load(header)
    assert fields["license"] == 'mit"\n- x: 1'
    assert fields["language"] == ["en", "no"]
    assert fields["tags"] == [hostile]
    assert fields["size_categories"] == ["n<1K"]
    assert [c["config_name"] for c in fields["configs"]] == ["default", "removed"]
    assert "<script" not in body
    assert "[y](z)" not in body
    funnel = [line for line in body.splitlines() if line.startswith("| a")]
    assert len(funnel) == 1
    assert funnel[0].replace("\\|", "").count("|") == 9


def test_card_without_removed_rows():
    text = render(CardInfo("x", "mit"), rows=5, schema=pa.schema([("id", pa.string())]), removed=0)
    assert "removed" not in text
    assert escape("a  b\n\tc") == "a b c"


@pytest.mark.parametrize(
    ("rows", "name"), [(999, "n<1K"), (1000, "1K<n<10K"), (10**12, "n>1T"), (10**5, "100K<n<1M")]
)
def test_size_categories(rows, name):
    assert size_category(rows) == name


def test_a_funnel_that_does_not_close_is_refused():
    with pytest.raises(ValueError, match="rows were lost"):
        StageCount("near", "gate", 10, 0, 8, 1, 0)
