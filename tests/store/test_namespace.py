"""A namespace's files: merged, killed, read and written by several processes; nothing is lost."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from siftline.store import namespace
from siftline.store.namespace import MAX_PARTS, Journal
from siftline.store.store import Namespace, Store

SCHEMA = pa.schema([("key", pa.string()), ("value", pa.float64())])


def records(keys):
    return pa.table({"key": keys, "value": [float(len(k)) for k in keys]}, schema=SCHEMA)


def open_store(folder):
    return Store(folder, Namespace("toy", 1, "weights-a"), SCHEMA)


# Compaction


def fill(store, bucket, *runs):
    """One writer per run, each with its own keys: one part a run."""
    for keys in runs:
        with store.writer(bucket) as append:
            append(records(keys))


def parts_of(store, bucket=0):
    return store.files.parts(bucket)


def test_many_runs_leave_few_parts_and_every_record(tmp_path):
    store = open_store(tmp_path)
    runs = [[f"{run:03d}-{i}" for i in range(3)] for run in range(40)]
    most = 0
    for run, keys in enumerate(runs):
        fill(store, 0, keys)
        most = max(most, len(parts_of(store)))
        assert store.keys(0) == {key for done in runs[: run + 1] for key in done}
    assert most == MAX_PARTS
    got = store.read(0)
    assert got["key"].is_unique().all()
    assert dict(got.iter_rows()) == {key: float(len(key)) for run in runs for key in run}


def test_a_merged_part_does_not_depend_on_how_the_records_came(tmp_path):
    keys = [f"{i:02d}" for i in range(2 * (MAX_PARTS + 1))]
    bytes_of = []
    for name, order in (("up", keys), ("down", keys[::-1])):
        store = open_store(tmp_path / name)
        fill(store, 0, *(order[i : i + 2] for i in range(0, len(order), 2)))
        (part,) = parts_of(store)
        bytes_of.append((part.name, part.read_bytes()))
    assert bytes_of[0] == bytes_of[1]


def test_merging_keeps_the_time_of_the_last_commit(tmp_path):
    store = open_store(tmp_path)
    fill(store, 0, *([f"k{i}"] for i in range(MAX_PARTS)))
    for part in parts_of(store):
        os.utime(part, (1e9, 1e9))
    journal = Journal(store.folder / "journals" / "b00-1-1.journal", SCHEMA)
    journal.append(records(["last"]))
    journal.close()
    os.utime(journal.path, (1.1e9, 1.1e9))
    with store.lease(0):
        store.seal(0)
    (part,) = parts_of(store)
    assert part.stat().st_mtime == 1.1e9


class Stop(BaseException):
    """Stands for SIGKILL: nothing catches it."""


STEPS = ("unlink", "replace", "open")


def stop_at(monkeypatch, number):
    """Dies before the `number`-th change to the file system; counts them all for number None."""
    done = [0]

    def dying(name, original):
        def step(*args, **options):
            mode = args[1] if name == "open" and len(args) > 1 else "w"
            if name != "open" or "a" in mode or "w" in mode:
                done[0] += 1
                if done[0] == number:
                    raise Stop
            return original(*args, **options)

        return step

    for name in STEPS:
        monkeypatch.setattr(Path, name, dying(name, getattr(Path, name)))
    utime = dying("utime", os.utime)
    monkeypatch.setattr("siftline.store.namespace.os.utime", utime)
    return done


def crowded(folder):
    """A bucket that will be merged as soon as its two journals are sealed."""
    store = open_store(folder)
    fill(store, 0, *([f"{run}-{i}" for i in range(3)] for run in range(MAX_PARTS)))
    for name, keys in (("1-1", ["x", "y"]), ("2-2", ["y", "z"])):
        journal = Journal(store.folder / "journals" / f"b00-{name}.journal", SCHEMA)
        journal.append(records(keys))
        journal.close()
    return store


def test_dying_at_any_step_of_sealing_and_merging_loses_nothing(tmp_path, monkeypatch):
    store = crowded(tmp_path / "whole")
    expected = sorted(store.read(0).iter_rows())
    with monkeypatch.context() as patch:
        steps = stop_at(patch, None)
        store.seal(0)
    assert len(parts_of(store)) == 1
    assert steps[0] > 2 + MAX_PARTS, "two journals and the old parts are deleted at least"
    whole = parts_of(store)[0].name
    for number in range(1, steps[0] + 1):
        store = crowded(tmp_path / str(number))
        with monkeypatch.context() as patch:
            stop_at(patch, number)
            with pytest.raises(Stop):
                store.seal(0)
        assert sorted(store.read(0).iter_rows()) == expected, number
        fresh = open_store(tmp_path / str(number))
        with fresh.lease(0):
            fresh.seal(0)
        assert sorted(fresh.read(0).iter_rows()) == expected, number
        assert not fresh.files.journals(0)
        # Where the merge was cut short there are at most as many parts as are left alone.
        names = [part.name for part in parts_of(fresh)]
        assert names == [whole] or len(names) <= MAX_PARTS, number


def test_half_written_files_of_dead_writers_go_with_the_next_lease(tmp_path):
    store = open_store(tmp_path)
    fill(store, 1, ["a"])
    parts = store.folder / "parts"
    dead = [parts / ".records-1-999.parquet", parts / "..records-1-999.parquet.999"]
    other = parts / ".records-11-999.parquet"  # of a bucket that somebody may be writing
    for path in (*dead, other):
        path.write_bytes(b"half")
    assert store.keys(1) == {"a"}
    fill(store, 1, ["b"])
    assert not any(path.exists() for path in dead)
    assert other.exists()
    assert store.keys(1) == {"a", "b"}


READER = """
import sys
from pathlib import Path
import pyarrow as pa
from siftline.store.store import Namespace, Store
schema = pa.schema([("key", pa.string()), ("value", pa.float64())])
store = Store(Path(sys.argv[1]), Namespace("toy", 1, "weights-a", {}), schema)
print("ready", flush=True)
for line in sys.stdin:
    if line == "end\\n":
        break
last, reads = -1, 0
while last < int(sys.argv[2]) - 1:
    frame = store.read(0)
    keys = frame["key"].to_list()
    assert len(keys) == len(set(keys)), "a record twice"
    numbers = sorted(map(int, keys))
    assert numbers == list(range(len(numbers))), f"a record is missing: {numbers}"
    assert len(numbers) - 1 >= last, "a record went"
    last, reads = len(numbers) - 1, reads + 1
print(reads)
"""


def test_a_reader_without_a_lease_never_misses_a_record_while_parts_are_merged(tmp_path):
    total = 60
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(tmp_path), str(total)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert reader.stdout.readline() == "ready\n"
    store = open_store(tmp_path)
    for number in range(total):  # record n is committed after record n - 1
        fill(store, 0, [str(number)])
    out, _ = reader.communicate(timeout=60)
    assert reader.returncode == 0
    assert int(out) > 1


@pytest.mark.parametrize("listing", [1, 2, 3])
def test_records_that_move_between_two_listings_are_found(tmp_path, monkeypatch, listing):
    """A journal is sealed right after the reader's n-th look into a folder."""
    store = open_store(tmp_path)
    fill(store, 0, ["a"])
    journal = Journal(store.folder / "journals" / "b00-1-1.journal", SCHEMA)
    journal.append(records(["b"]))
    journal.close()
    real, calls = namespace._listed, [0]

    def sealing(*where):
        found = real(*where)
        calls[0] += 1
        if calls[0] == listing:
            with store.lease(0):
                store.seal(0)
        return found

    monkeypatch.setattr(namespace, "_listed", sealing)
    assert store.keys(0) == {"a", "b"}
    assert not list((store.folder / "journals").iterdir()), "nothing was sealed"


def test_a_part_that_vanishes_after_it_was_listed_is_looked_for_again(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    fill(store, 0, *([f"k{i}"] for i in range(3)))
    real, merged = namespace.read_parquet, []

    def merging(path, *rest, **named):
        if not merged:
            merged.append(path)
            monkeypatch.setattr(namespace, "MAX_PARTS", 1)
            with store.lease(0):
                store.seal(0)
        return real(path, *rest, **named)

    monkeypatch.setattr(namespace, "read_parquet", merging)
    assert store.keys(0) == {"k0", "k1", "k2"}
    assert merged
    assert len(parts_of(store)) == 1


def test_a_corrupt_part_is_one_line_and_no_endless_search(tmp_path):
    store = open_store(tmp_path)
    fill(store, 0, ["a"])
    (part,) = parts_of(store)
    part.write_bytes(part.read_bytes()[:40])
    with pytest.raises(ValueError, match="corrupt"):
        store.read(0)


# Several processes

RIVAL = """
import os, sys, time
from pathlib import Path
import pyarrow as pa
from siftline.store.store import Namespace, Store, collect
root, log, rounds, rows, batch = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6])
schema = pa.schema([("key", pa.string()), ("value", pa.float64())])
store = Store(root, Namespace("toy", 1, "w"), schema)
out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
print("ready", flush=True)
for upto in range(rows // rounds, rows + 1, rows // rounds):  # each round asks for more
    keys = [f"{i:05d}" for i in range(upto)]
    def compute(positions):
        values = [float(os.getpid()) + i / 1e6 for i in positions]  # tells who computed it
        for i, value in zip(positions, values):
            os.write(out, f"{keys[i]} {value!r}\\n".encode())
        time.sleep(0.004)
        return pa.table({"key": [keys[i] for i in positions], "value": values}, schema=schema), {}
    plan = [range(i, min(i + batch, upto)) for i in range(0, upto, batch)]
    collect(store, 1, keys, plan, compute)
"""


def rival(folder, rows=240, batch=10, rounds=12):
    arguments = [str(folder / "s"), str(folder / "log"), str(rounds), str(rows), str(batch)]
    return subprocess.Popen(
        [sys.executable, "-c", RIVAL, *arguments], stdout=subprocess.PIPE, text=True
    )


def computed_values(folder):
    """Every value that any process computed for a key, in order."""
    found = {}
    for line in (folder / "log").read_text().splitlines():
        key, value = line.split()
        found.setdefault(key, []).append(float(value))
    return found


def test_two_processes_on_one_bucket_compute_each_record_once(tmp_path):
    running = [rival(tmp_path) for _ in range(2)]
    for process in running:
        process.communicate(timeout=60)
    assert [process.returncode for process in running] == [0, 0]
    found = computed_values(tmp_path)
    assert len(found) == 240
    assert all(len(values) == 1 for values in found.values()), "a record was computed twice"
    store = Store(tmp_path / "s", Namespace("toy", 1, "w"), SCHEMA)
    assert dict(store.read(1).iter_rows()) == {key: values[0] for key, values in found.items()}
    assert len(parts_of(store, 1)) <= MAX_PARTS


def test_killed_at_random_moments_among_rivals_no_committed_record_is_lost_or_replaced(tmp_path):
    """Twelve rounds make enough parts to be merged; whatever was once read stays as it was."""
    dice, batch = random.Random(9), 10
    store = Store(tmp_path / "s", Namespace("toy", 1, "w"), SCHEMA)
    seen, killed = {}, 0
    for _ in range(5):
        pair = [rival(tmp_path, batch=batch) for _ in range(2)]
        for process in pair:
            process.stdout.readline()
        time.sleep(dice.uniform(0.02, 0.15))
        pair[0].kill()
        time.sleep(dice.uniform(0.01, 0.05))
        pair[1].kill()
        for process in pair:
            process.communicate()
            killed += process.returncode == -signal.SIGKILL
        now = dict(store.read(1).iter_rows())
        assert seen.items() <= now.items(), "a committed record is gone or has another value"
        seen = now
    assert killed >= 5, "the kills came too late to test anything"
    rival(tmp_path, batch=batch).communicate(timeout=60)
    end = dict(store.read(1).iter_rows())
    assert seen.items() <= end.items()
    found = computed_values(tmp_path)
    assert set(end) == set(found) == {f"{i:05d}" for i in range(240)}
    assert all(end[key] in values for key, values in found.items())
    # A kill costs the batch in flight and nothing else.
    assert sum(len(values) - 1 for values in found.values()) <= killed * batch
    assert not list((store.folder / "journals").iterdir())


def test_a_removed_namespace_is_made_again_by_whoever_waited_for_its_lease(tmp_path):
    store, other = open_store(tmp_path), open_store(tmp_path)
    waiting, taken = threading.Event(), threading.Event()

    def wait():
        waiting.set()
        fill(other, 0, ["b"])
        taken.set()

    with store.lease(0):
        thread = threading.Thread(target=wait)
        thread.start()
        waiting.wait(10)
        time.sleep(0.2)
        store.folder.rename(tmp_path / ".gone")
    assert taken.wait(10)
    thread.join()
    assert store.keys(0) == {"b"}
    assert open_store(tmp_path).files.load() == Namespace("toy", 1, "weights-a", {})
