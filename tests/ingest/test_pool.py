"""The pool: same rows, same bytes; nothing lost, nothing rewritten, never half a version."""

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.ingest.pool import PROVENANCE, QUARANTINE, ROWS, Pool, PoolSpec, build_pool, collapse
from siftline.ingest.readers import Source
from siftline.rows import schema
from siftline.rows.schema import bucket_of, make_row, message


def line(prompt, response="r", **more):
    return {"prompt": prompt, "completion": response, **more}


def write_lines(folder, files):
    """Writes JSONL files: name -> records, or raw strings for lines that are no JSON."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, records in files.items():
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        (folder / name).write_text("".join(f"{text}\n" for text in lines))


def spec_of(folder, **changes):
    source = Source(str(folder), source="s")
    return PoolSpec(**({"name": "toy", "inputs": (source,), "buckets": 4} | changes))


def build(root, files, **changes):
    """Writes the files, builds the pool from them, returns it."""
    write_lines(root / "in", files)
    build_pool(root / "pool", spec_of(root / "in", **changes))
    return Pool(root / "pool")


def content(pool):
    """Everything a reader can get, in the order a reader gets it."""
    return {
        ROWS: pool.all_rows().to_pylist(),
        PROVENANCE: [r for b in range(pool.buckets) for r in pool.read(PROVENANCE, b).to_pylist()],
        QUARANTINE: pool.read(QUARANTINE, 0).to_pylist(),
    }


def states(folder):
    """Inode and time of every file, to see what was touched."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


def parts(pool, table=ROWS):
    """File names by bucket, base first."""
    found = {b: [] for b in range(pool.buckets)}
    for part in pool.manifest.parts:
        if part.table == table:
            found[part.bucket].append(part.file)
    return found


def bucket_of_prompt(prompt, buckets=4):
    return bucket_of(make_row([message("user", prompt), message("assistant", "r")])["id"], buckets)


def prompts_in(bucket, count):
    """Prompts whose rows fall into one of four buckets."""
    named = (f"p{i}" for i in range(10_000))
    return [p for p, _ in zip((p for p in named if bucket_of_prompt(p) == bucket), range(count))]  # noqa: B905


RECORDS = st.lists(
    st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("xyz")).map(lambda t: line(*t)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=8, deadline=None)
@given(records=RECORDS, data=st.data())
def test_order_split_and_buckets_do_not_show(records, data):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        versions, rows = set(), []
        for i, buckets in enumerate((1, 4, 16)):
            shuffled = data.draw(st.permutations(records))
            cuts = sorted(data.draw(st.lists(st.integers(0, len(records)), max_size=3)))
            edges = [0, *cuts, len(records)]
            files = {
                f"{data.draw(st.sampled_from('abc'))}{k}.jsonl": shuffled[edges[k] : edges[k + 1]]
                for k in range(len(edges) - 1)
                if edges[k] < edges[k + 1]
            }
            pool = build(root / str(i), files, buckets=buckets)
            versions.add(pool.version)
            rows.append(pool.all_rows().to_pylist())
        assert len(versions) == 1
        assert rows[0] == rows[1] == rows[2]
        want = {(r["prompt"], r["completion"]) for r in records}
        got = {(r["messages"][0]["content"], r["messages"][1]["content"]) for r in rows[0]}
        assert got == want
        assert [r["id"] for r in rows[0]] == sorted(r["id"] for r in rows[0])
        assert sum(r["copies"] for r in rows[0]) == len(records)


def test_same_input_gives_the_same_bytes(tmp_path):
    files = {"a.jsonl": [line(f"p{i}") for i in range(50)], "b.jsonl": ["{"]}
    build(tmp_path / "1", files, max_quarantine=0.5)
    build(tmp_path / "2", files, max_quarantine=0.5)
    one, two = tmp_path / "1" / "pool", tmp_path / "2" / "pool"
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name


def test_identical_rows_collapse_and_every_line_is_kept(tmp_path):
    files = {
        "a.jsonl": [line("p", note="first"), line("q"), line(" p ")],
        "b.jsonl": [line("p\r\n"), line("p", "another")],
    }
    pool = build(tmp_path, files)
    copies = {
        (r["messages"][0]["content"], r["messages"][1]["content"]): r["copies"]
        for r in pool.all_rows().to_pylist()
    }
    assert copies == {("p", "r"): 3, ("q", "r"): 1, ("p", "another"): 1}
    of = make_row([message("user", "p"), message("assistant", "r")], source="s")["id"]
    lines = [r for r in content(pool)[PROVENANCE] if r["id"] == of]
    assert [(r["file"], r["line"], r["leftover"]) for r in lines] == [
        ("a.jsonl", 1, '{"note":"first"}'),
        ("a.jsonl", 3, None),
        ("b.jsonl", 1, None),
    ]
    assert pool.manifest.info["rows"] == 3
    assert pool.manifest.info["provenance"] == 5


def test_collapse_takes_the_smallest_of_what_is_no_identity():
    chat = [message("user", "q"), message("assistant", "r")]
    rows = [
        make_row(chat, answer="1", answer_from="response", conversation_id="b"),
        make_row(chat, answer="1", answer_from="independent", conversation_id=None),
        make_row(chat, answer="1", answer_from="response", conversation_id="a", copies=4),
    ]
    results = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        merged = collapse(pa.Table.from_pylist([rows[i] for i in order], schema=schema.ROW))
        assert merged.schema.equals(schema.ROW)
        results.append(merged.to_pylist())
    assert results[0] == results[1] == results[2]
    (row,) = results[0]
    assert (row["copies"], row["conversation_id"], row["answer_from"]) == (6, "a", "independent")


def test_bad_lines_are_counted_and_named(tmp_path):
    files = {"a.jsonl": [line("p"), "{", line("q")], "b.jsonl": [line("r"), line("t", ""), "[]"]}
    pool = build(tmp_path, files, max_quarantine=0.5)
    bad = pool.read(QUARANTINE, 0).to_pylist()
    assert [(r["file"], r["line"]) for r in bad] == [("a.jsonl", 2), ("b.jsonl", 2), ("b.jsonl", 3)]
    assert all(r["reason"] for r in bad)
    assert pool.manifest.info["quarantine"] == 3
    assert pool.all_rows().num_rows == 3


def test_more_bad_lines_than_allowed_is_one_line_and_leaves_the_old_pool(tmp_path):
    old = content(build(tmp_path, {"a.jsonl": [line("p")]}))
    files = {"b.jsonl": [line("q")] * 3 + ["{"], "a.jsonl": [line("p"), line("x"), "oops"]}
    with pytest.raises(ValueError, match="max_quarantine") as caught:
        build(tmp_path, files, max_quarantine=0.25)
    said = str(caught.value)
    assert "\n" not in said
    assert "'toy': 2 of 7 input rows" in said
    assert "max_quarantine 0.25" in said
    assert "(first: a.jsonl line 3, " in said
    assert content(Pool(tmp_path / "pool")) == old
    pool = build(tmp_path, files, max_quarantine=2 / 7)  # exactly the allowed share
    assert pool.manifest.info["quarantine"] == 2


def test_no_readable_row_is_an_error_that_names_the_first(tmp_path):
    with pytest.raises(ValueError, match=r"no readable row among 2 \(first: a.jsonl line 1, ") as e:
        build(tmp_path, {"a.jsonl": ["{", "["]}, max_quarantine=1.0)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="pool 'pool' has not been built"):
        Pool(tmp_path / "pool")


def test_unchanged_inputs_touch_nothing(tmp_path):
    files = {"a.jsonl": [line(f"p{i}") for i in range(20)]}
    build(tmp_path, files)
    before = states(tmp_path / "pool")
    time.sleep(0.01)
    build(tmp_path, files)
    assert states(tmp_path / "pool") == before
    renamed = {"z.jsonl": files["a.jsonl"]}  # other bytes of provenance, the same rows
    version = Pool(tmp_path / "pool").version
    pool = build(tmp_path, renamed)
    assert pool.version == version
    after = states(tmp_path / "pool")
    for names in parts(pool).values():
        assert all(after[name] == before[name] for name in names)


def test_added_rows_give_delta_parts_and_leave_old_ones_alone(tmp_path):
    first = build(tmp_path, {"a.jsonl": [line(f"p{i}") for i in range(40)]})
    before, had, version = states(tmp_path / "pool"), parts(first), first.version
    assert all(len(names) == 1 for names in had.values())
    new = prompts_in(2, 60)[-3:]
    files = {
        "a.jsonl": [line(f"p{i}") for i in range(40)],
        "b.jsonl": [line(p) for p in new],
    }
    pool = build(tmp_path, files)
    after, now = states(tmp_path / "pool"), parts(pool)
    for bucket, names in had.items():
        assert now[bucket][:1] == names
        assert len(now[bucket]) == (2 if bucket == 2 else 1)
        assert after[names[0]] == before[names[0]]
    assert pool.version != version
    delta = pa.parquet.read_table(tmp_path / "pool" / now[2][1])
    assert sorted(m[0]["content"] for m in delta["messages"].to_pylist()) == sorted(new)
    fresh = build(tmp_path / "fresh", files)
    assert fresh.version == pool.version
    assert content(fresh) == content(pool)


def test_a_row_that_vanished_gives_its_bucket_alone_a_new_base(tmp_path):
    records = [line(p) for b in range(4) for p in prompts_in(b, 5)]
    had = parts(build(tmp_path, {"a.jsonl": records}))
    gone = records[12]
    bucket = bucket_of_prompt(gone["prompt"])
    pool = build(tmp_path, {"a.jsonl": [r for r in records if r is not gone]})
    now = parts(pool)
    for b in range(4):
        assert len(now[b]) == 1
        assert (now[b] == had[b]) == (b != bucket)
    assert pool.rows(bucket).num_rows == 4
    # The old generation stays readable for a reader that holds the old manifest.
    assert (tmp_path / "pool" / had[bucket][0]).exists()


EDIT = st.lists(st.lists(st.tuples(st.sampled_from("pqs"), st.sampled_from("xyz!"))), max_size=3)


@settings(max_examples=10, deadline=None)
@given(st.lists(EDIT, min_size=2, max_size=4), st.booleans())
def test_any_history_reads_like_a_fresh_build(versions, pairs):
    """Deltas, new bases and collapsed copies, over edits of files whose lines move about."""

    def record(prompt, response):
        if response == "!":
            return "no json"
        other = {"x": "y", "y": "y", "z": "x"}[response]
        return (
            {"prompt": prompt, "chosen": response, "rejected": other}
            if pairs
            else line(prompt, response)
        )

    with tempfile.TemporaryDirectory() as name:
        root, last = Path(name), None
        for i, edit in enumerate(versions):
            files = {
                f"{'ab'[k % 2]}{k}.jsonl": [record("p", "x"), *(record(*r) for r in records)]
                for k, records in enumerate([[], *edit])
            }
            options = {"max_quarantine": 1.0, "buckets": 2}
            last = build(root / "kept", files, **options)
            fresh = build(root / f"fresh{i}", files, **options)
            assert last.version == fresh.version
            assert content(last) == content(fresh)
        assert last is not None


@pytest.mark.parametrize("halves", ["aa ab", "ab aa", "-a aa", "a- aa", "aa -a"])
def test_pairs_of_equal_answers_have_two_provenance_lines(tmp_path, halves):
    """Both halves are one row from one line, yet none is lost, stays behind or changes place."""

    def pair(chosen, rejected):
        return {"prompt": "q", "chosen": chosen.strip("-"), "rejected": rejected.strip("-")}

    files = [{"a.jsonl": [pair(*text), pair("c", "d")]} for text in halves.split()]
    build(tmp_path / "kept", files[0], max_quarantine=0.5)
    pool = build(tmp_path / "kept", files[1], max_quarantine=0.5)
    assert content(pool) == content(build(tmp_path / "fresh", files[1], max_quarantine=0.5))
    assert len(content(pool)[PROVENANCE]) == (3 if "-" in halves.split()[1] else 4)


def test_a_changed_number_of_buckets_is_refused(tmp_path):
    old = content(build(tmp_path, {"a.jsonl": [line("p")]}))
    with pytest.raises(ValueError, match=r"'toy' has 4 buckets and can't be recut to 8: give") as e:
        build(tmp_path, {"a.jsonl": [line("p")]}, buckets=8)
    assert "\n" not in str(e.value)
    assert content(Pool(tmp_path / "pool")) == old


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"buckets": 3}, "power of two, not 3"),
        ({"buckets": 0}, "power of two, not 0"),
        ({"max_quarantine": 1.5}, "0 to 1, not 1.5"),
        ({"max_quarantine": float("nan")}, "0 to 1, not nan"),
    ],
)
def test_settings_out_of_range_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        spec_of("x", **changes)


def test_progress_counts_every_input_line(tmp_path):
    write_lines(tmp_path / "in", {"a.jsonl": [line("p"), "{", line("p")]})
    seen = []
    build_pool(tmp_path / "pool", spec_of(tmp_path / "in", max_quarantine=0.5), seen.append)
    assert sum(seen) == 3


def test_a_part_that_is_lost_or_corrupt_is_one_line_and_its_remedy_works(tmp_path):
    files = {"a.jsonl": [line(f"p{i}") for i in range(40)]}
    pool = build(tmp_path, files)
    want = content(pool)
    path = tmp_path / "pool" / parts(pool)[1][0]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"is corrupt .*delete it and run again") as caught:
        pool.rows(1)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    path.unlink()
    with pytest.raises(ValueError, match="is missing though its manifest names it: run again"):
        pool.rows(1)
    build_pool(tmp_path / "pool", spec_of(tmp_path / "in"))  # as the message says
    assert content(Pool(tmp_path / "pool")) == want
    path.unlink()
    files["a.jsonl"].append(line("new"))
    assert len(content(build(tmp_path, files))[ROWS]) == 41


KILLED = """
import os, signal, sys
from pathlib import Path
import pyarrow.parquet as pq
from siftline.ingest import pool
from siftline.ingest.readers import Source
folder, inputs, at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
events = 0
def counted(function):
    def call(*args, **kwargs):
        global events
        events += 1
        if events == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
# Every step that changes the disk: rows into a scratch file or a part, a flush, a rename.
pq.ParquetWriter.write_table = counted(pq.ParquetWriter.write_table)
pq.ParquetWriter.close = counted(pq.ParquetWriter.close)
os.fsync = counted(os.fsync)
Path.replace = counted(Path.replace)
pool.build_pool(folder, pool.PoolSpec("toy", (Source(inputs, source="s"),), 4))
print(events)
"""


def test_a_killed_build_leaves_the_old_version_and_the_next_one_is_right(tmp_path):
    files = {"a.jsonl": [line(f"p{i}") for i in range(60)]}
    old = content(build(tmp_path, files))
    changed = {"a.jsonl": [*files["a.jsonl"][5:], *(line(f"n{i}") for i in range(60))]}
    write_lines(tmp_path / "in", changed)
    want = content(build(tmp_path / "fresh", changed))
    command = [sys.executable, "-c", KILLED]
    shutil.copytree(tmp_path / "pool", tmp_path / "dry")
    dry = [*command, str(tmp_path / "dry"), str(tmp_path / "in"), "-1"]
    steps = int(subprocess.run(dry, check=True, capture_output=True).stdout)
    assert steps > 40
    # Two points at random, and the last moment before the manifest is renamed into place. Behind
    # that stand four steps: its folder is flushed, and its hash is written down alone.
    last = steps - 4
    for at in (*random.Random(0).sample(range(2, last), 2), last):
        folder = tmp_path / f"killed{at}"
        shutil.copytree(tmp_path / "pool", folder)
        arguments = [str(folder), str(tmp_path / "in"), str(at)]
        done = subprocess.run([*command, *arguments], capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert content(Pool(folder)) == old, f"killed at step {at} of {steps}"
        build_pool(folder, spec_of(tmp_path / "in"))
        assert content(Pool(folder)) == want, f"killed at step {at} of {steps}"
        left = [p.name for p in folder.iterdir() if p.name.startswith(".") and p.name != ".lock"]
        assert not left, "the next build clears what the killed one left"


def test_two_builds_at_once_both_succeed(tmp_path):
    """A schedule and a person start the same pool: one waits for the other."""
    files = {"a.jsonl": [line(f"p{i}") for i in range(3000)]}
    write_lines(tmp_path / "in", files)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "pool"), str(tmp_path / "in"), "-1"]
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [process.wait(timeout=60) for process in running] == [0, 0, 0]
    assert Pool(tmp_path / "pool").all_rows().num_rows == 3000


@pytest.mark.parametrize("size", [300, 900])
def test_a_full_disk_is_an_error_and_the_old_version_stays_readable(tmp_path, small_disk, size):
    """Filled while spilling (900 rows of 2 kB) or while writing parts (300)."""
    rng = random.Random(0)
    write_lines(tmp_path / "in", {"a.jsonl": [line("p")]})
    build_pool(small_disk / "pool", spec_of(tmp_path / "in"))
    old = content(Pool(small_disk / "pool"))
    write_lines(
        tmp_path / "in",
        {"a.jsonl": [line(f"p{i}", rng.randbytes(1000).hex()) for i in range(size)]},
    )
    with pytest.raises(OSError, match="No space left") as caught:
        build_pool(small_disk / "pool", spec_of(tmp_path / "in"))
    assert "\n" not in str(caught.value)
    assert content(Pool(small_disk / "pool")) == old
    assert not (small_disk / "pool" / ".scratch").exists()
    write_lines(tmp_path / "in", {"a.jsonl": [line("p"), line("q")]})
    build_pool(small_disk / "pool", spec_of(tmp_path / "in"))  # what failed took no room
    assert Pool(small_disk / "pool").all_rows().num_rows == 2
