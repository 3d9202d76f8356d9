"""The store: nothing committed is lost, nothing is computed twice."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siftline.rows.verified import AlteredError
from siftline.store.namespace import Journal, read_journal
from siftline.store.store import DiskFullError, Namespace, Store, collect, score_key

SCHEMA = pa.schema([("key", pa.string()), ("value", pa.float64())])
NAMESPACE = Namespace("toy", 1, "weights-a", {"temperature": 1.0})


def records(keys):
    return pa.table({"key": keys, "value": [float(len(k)) for k in keys]}, schema=SCHEMA)


def open_store(folder, **changes):
    fields = {"scorer": "toy", "version": 1, "fingerprint": "weights-a", "parameters": {}} | changes
    return Store(folder, Namespace(**fields), SCHEMA)


def test_second_run_computes_nothing(tmp_path):
    store, keys = open_store(tmp_path), [f"k{i}" for i in range(25)]
    batches = [range(i, min(i + 4, 25)) for i in range(0, 25, 4)]
    calls = []

    def compute(positions):
        calls.append(positions)
        return records([keys[i] for i in positions]), {}

    first = collect(store, 3, keys, batches, compute)
    assert (first.computed, first.found, len(calls)) == (25, 0, 7)
    second = collect(store, 3, keys, batches, compute)
    assert (second.computed, second.found, len(calls)) == (0, 25, 7)
    assert second.records.sort("key").equals(first.records.sort("key"))


def test_added_keys_compute_only_themselves(tmp_path):
    store, asked = open_store(tmp_path), []

    def run(keys):
        def compute(positions):
            asked.extend(keys[i] for i in positions)
            return records([keys[i] for i in positions]), {}

        return collect(store, 0, keys, [range(len(keys))], compute)

    run(["a", "b", "a"])
    run(["b", "c", "a"])
    assert sorted(asked) == ["a", "b", "c"]


def test_failed_requests_are_counted_and_asked_again(tmp_path):
    store = open_store(tmp_path)

    def compute(positions):
        return records(["a"]), {"b": "no_scores"}

    got = collect(store, 0, ["a", "b"], [[0, 1]], compute)
    assert got.failed == {"b": "no_scores"}
    assert got.computed == 1
    again = collect(store, 0, ["a", "b"], [[0, 1]], lambda positions: (records(["b"]), {}))
    assert (again.found, again.computed, again.failed) == (1, 1, {})


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "weights-b"},
        {"version": 2},
        {"parameters": {"temperature": 0.5}},
        {"scorer": "other"},
    ],
)
def test_another_namespace_never_meets_old_scores(tmp_path, change):
    store = open_store(tmp_path)
    collect(store, 0, ["a"], [[0]], lambda p: (records(["a"]), {}))
    assert open_store(tmp_path, **change).keys(0) == set()
    assert open_store(tmp_path).keys(0) == {"a"}


def test_key_is_of_tokens_and_span_only():
    assert score_key([1, 2, 3], 1, 3) == score_key((1, 2, 3), 1, 3)
    different = {score_key([1, 2, 3], 1, 3), score_key([1, 2, 3], 2, 3), score_key([12, 3], 1, 3)}
    assert len(different) == 3


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_torn_journal_keeps_every_whole_frame(tmp_path, data):
    """A cut loses the frames it hits, as a kill does; a flipped byte anywhere is an error."""
    path = tmp_path / "x.journal"
    path.unlink(missing_ok=True)
    journal, ends = Journal(path, SCHEMA), []
    for i in range(4):
        journal.append(records([f"{i}-{j}" for j in range(i + 1)]))
        ends.append(path.stat().st_size)
    journal.close()
    raw = path.read_bytes()
    cut = data.draw(st.integers(0, len(raw)))
    path.write_bytes(raw[:cut])
    whole = sum(end <= cut for end in ends)
    assert [t.num_rows for t in read_journal(path)] == [1, 2, 3, 4][:whole]
    flip = data.draw(st.integers(0, len(raw) - 1))
    broken = bytearray(raw)
    broken[flip] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(broken)
    whole = max((end for end in ends if end <= flip), default=0)
    with pytest.raises(AlteredError, match=f"truncate -s {whole} FILE") as caught:
        read_journal(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(broken[:whole])  # as the message says
    assert [t.num_rows for t in read_journal(path)] == [1, 2, 3, 4][: sum(e <= flip for e in ends)]


WORKER = """
import sys, time
from pathlib import Path
import pyarrow as pa
from siftline.store.store import Namespace, Store, collect
root, log, rows, batch = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
schema = pa.schema([("key", pa.string()), ("value", pa.float64())])
store = Store(root, Namespace("toy", 1, "w"), schema)
keys = [f"{i:05d}" for i in range(rows)]
def compute(positions):
    with open(log, "a") as f:  # one line a forward pass, flushed before the result exists
        f.write(f"{len(positions)}\\n")
    time.sleep(0.01)
    return pa.table({"key": [keys[i] for i in positions],
                     "value": [i / 7 for i in positions]}, schema=schema), {}
plan = [range(i, min(i + batch, rows)) for i in range(0, rows, batch)]
print("ready", flush=True)
collect(store, 1, keys, plan, compute)
"""


@pytest.mark.parametrize("attempt", range(4))
def test_sigkill_loses_at_most_one_batch(tmp_path, attempt):
    """Killed at a random moment of 40 commits, then run again: rows + one batch passes at most."""
    rows, batch, log = 400, 10, tmp_path / "passes"
    command = [sys.executable, "-c", WORKER, str(tmp_path / "s"), str(log), str(rows), str(batch)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    time.sleep(random.Random(attempt).uniform(0.02, 0.35))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    before = sum(map(int, log.read_text().split())) if log.exists() else 0
    assert before < rows, "the run ended before it was killed: the test would prove nothing"
    store = Store(tmp_path / "s", Namespace("toy", 1, "w"), SCHEMA)
    assert len(store.keys(1)) >= before - batch
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    passes = sum(map(int, log.read_text().split()))
    assert rows <= passes <= rows + batch
    got = store.read(1).sort("key")
    assert got["key"].to_list() == [f"{i:05d}" for i in range(rows)]
    assert got["value"].to_list() == [i / 7 for i in range(rows)]
    assert not list((store.folder / "journals").iterdir()), "journals were not sealed"


def test_full_disk_is_one_line_and_loses_nothing(small_disk):
    store = open_store(small_disk)
    keys = [f"{i:060d}" for i in range(40_000)]
    batches = [range(i, i + 500) for i in range(0, 40_000, 500)]
    with pytest.raises(DiskFullError) as caught:
        collect(store, 0, keys, batches, lambda p: (records([keys[i] for i in p]), {}))
    assert str(caught.value).count("\n") == 0
    assert "free some" in str(caught.value)
    have = open_store(small_disk).keys(0)
    assert len(have) >= 500
    assert len(have) % 500 == 0
    assert have == set(keys[: len(have)])


def test_parts_do_not_depend_on_the_number_of_batches(tmp_path):
    keys = [f"k{i}" for i in range(30)]
    parts = []
    for size in (1, 7, 30):
        store = open_store(tmp_path / str(size))
        batches = [range(i, min(i + size, 30)) for i in range(0, 30, size)]
        collect(store, 0, keys, batches, lambda p: (records([keys[i] for i in p]), {}))
        (part,) = (store.folder / "parts").iterdir()
        parts.append((part.name, part.read_bytes()))
    assert parts[0] == parts[1] == parts[2]


def test_read_returns_one_record_per_key_after_a_crash_between_seal_and_delete(tmp_path):
    store = open_store(tmp_path)
    journal = Journal(store.folder / "journals" / "b00-1-1.journal", SCHEMA)
    journal.append(records(["a", "b"]))
    journal.close()
    copy = journal.path.read_bytes()
    with store.lease(0):
        store.seal(0)
    Path(journal.path).write_bytes(copy)  # as if the process had died before the delete
    assert store.read(0).sort("key")["key"].to_list() == ["a", "b"]
    with store.lease(0):
        store.seal(0)
    assert store.read(0).height == 2
    assert isinstance(store.read(0), pl.DataFrame)
