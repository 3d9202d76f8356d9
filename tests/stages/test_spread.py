"""Buckets over several devices: the order of results, one call a seat at a time, equal bytes."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.scoring.recorder import Recorder, Tally
from siftline.stages.models import counted, over_buckets, total
from siftline.workspace import Workspace


@given(st.integers(1, 4), st.lists(st.integers(0, 3), max_size=20))
@settings(max_examples=60, deadline=None)
def test_results_come_in_bucket_order_whatever_takes_how_long(seats, delays):
    def work(seat, bucket, delay):
        time.sleep(delay / 2000)
        return bucket * 10 + delay

    found = list(over_buckets(list(range(seats)), enumerate(delays), work))
    assert found == [(i, i * 10 + d) for i, d in enumerate(delays)]


def test_a_seat_is_asked_by_one_thread_at_a_time_and_all_seats_are_used():
    busy = {"a": threading.Lock(), "b": threading.Lock()}
    used = []

    def work(seat, bucket, rows):
        assert busy[seat].acquire(blocking=False), "two threads on one model"
        time.sleep(0.01)
        used.append(seat)
        busy[seat].release()

    assert len(list(over_buckets(["a", "b"], enumerate("x" * 20), work))) == 20
    assert min(used.count("a"), used.count("b")) >= 3


@pytest.mark.parametrize("seats", [1, 3])
def test_a_failure_in_one_bucket_ends_the_run_with_its_error(seats):
    def work(seat, bucket, rows):
        if bucket == 3:
            raise RuntimeError("the worker died in bucket 3")
        return bucket

    results = over_buckets(list(range(seats)), enumerate("x" * 9), work)
    assert [next(results)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="died in bucket 3"):
        next(results)


@pytest.mark.parametrize(
    "shape", [lambda r: r, lambda r: {"m": r}, lambda r: (r, r), lambda r: [r]]
)
def test_an_error_stops_the_other_seats_at_their_next_batch(tmp_path, shape):
    """The other seat is in a bucket of 1,000 batches when bucket 1 fails."""
    failed, batches = threading.Event(), []

    def progress(rows, tokens):
        batches.append(rows)
        failed.wait(10)

    def work(seat, bucket, rows):
        if bucket == 1:
            while not batches:
                time.sleep(0.001)
            raise RuntimeError("the worker died in bucket 1")
        recorder = next(iter(seat.values())) if isinstance(seat, dict) else seat
        recorder = recorder[0] if isinstance(recorder, list | tuple) else recorder
        for _ in range(1000):
            recorder.progress(1, 1)
            time.sleep(0.001)

    def end():
        while not batches:
            time.sleep(0.001)
        time.sleep(0.05)  # the error is there before the first batch is over
        failed.set()

    threading.Thread(target=end).start()
    tally = Tally()
    seats = [shape(Recorder(None, None, tmp_path, progress, tally)) for _ in "ab"]
    with pytest.raises(RuntimeError, match="died in bucket 1"):
        list(over_buckets(seats, enumerate("xx"), work))
    assert len(batches) < 10


def test_giving_up_stops_the_seats_at_their_next_batch(tmp_path):
    """As Ctrl-C does, which ends the loop over the results."""
    batches = []

    def work(recorder, bucket, rows):
        for _ in range(1000 if bucket else 1):
            recorder.progress(1, 1)
            batches.append(bucket)
            time.sleep(0.002)

    seats = [Recorder(None, None, tmp_path) for _ in "ab"]
    results = over_buckets(seats, enumerate("xxxx"), work)
    assert next(results)[0] == 0
    results.close()
    assert len(batches) < 500


def test_rows_count_in_full_whether_or_not_something_was_asked(tmp_path):
    done = []
    first, second = (Recorder(None, None, tmp_path, lambda n, t: done.append(n)) for _ in "ab")
    first.tally.computed = 7
    with counted([first, second], 12, done.append):
        first.tally.computed += 2
        second.tally.found += 1
        second.tally.failed += 3
        done.append(6)  # as the recorders report it
    assert sum(done) == 12


def test_buckets_are_read_as_seats_come_free():
    read = []

    def buckets():
        for i in range(10):
            read.append(i)
            yield i, None

    results = over_buckets(["a", "b"], buckets(), lambda seat, bucket, rows: bucket)
    next(results)
    assert len(read) <= 4, "a pool is never held in memory as a whole"
    assert [bucket for bucket, _ in results] == list(range(1, 10))


def test_costs_add_up_over_recorders():
    class Seat:
        def __init__(self, *counts):
            self.tally = Tally(*counts)

    assert total([Seat(1, 2, 3, 4), Seat(10, 20, 30, 40)]) == Tally(11, 22, 33, 44)


def test_two_devices_write_the_same_table_as_one(finished, mini, mini_tools, tmp_path):
    from siftline.assets.shared import score

    seen = {}
    for device in ("cpu", "cpu,cpu"):
        root = mini_tools.copy_root(
            finished.root, tmp_path / device.replace(",", "-"), "inputs", "models", "pool"
        )
        recipe = mini(f"models.tiny.device={device}")
        observed = {}
        manifest, fresh = score(Workspace(root), recipe, lambda line: None, observed.__setitem__)
        assert fresh
        assert sum(n["scored"] for n in observed.values()) == manifest.info["scored"]
        assert list(observed) == sorted(observed)
        seen[device] = (manifest.version, manifest.info["computed"], manifest.info["tokens"])
    assert seen["cpu"] == seen["cpu,cpu"]
    assert seen["cpu"][2] > seen["cpu"][1] > 0
