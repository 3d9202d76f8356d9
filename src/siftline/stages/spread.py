"""Spreads buckets over devices: one recorder a device, each with a copy of the model.

Batches are planned inside a bucket, so it doesn't matter to any number which device takes it, nor
how many there are.
"""

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from siftline.scoring.recorder import Recorder, Tally

Seat = TypeVar("Seat")
Rows = TypeVar("Rows")
Result = TypeVar("Result")


def over_buckets(
    seats: Sequence[Seat],
    buckets: Iterable[tuple[int, Rows]],
    work: Callable[[Seat, int, Rows], Result],
) -> Iterator[tuple[int, Result]]:
    """Runs `work` on every bucket, one at a time on each seat.

    Args:
        seats: What one device has: its recorder, or several by name.
        buckets: Store bucket and its rows, each bucket once; read as seats come free.
        work: Asks the models of a seat about the rows of one bucket.

    Yields:
        Bucket and result, in the order of the buckets.
    """
    if len(seats) == 1:
        for bucket, rows in buckets:
            yield bucket, work(seats[0], bucket, rows)
        return
    free: queue.SimpleQueue[Seat] = queue.SimpleQueue()
    for seat in seats:
        free.put(seat)

    def one(bucket: int, rows: Rows) -> Result:
        seat = free.get()
        try:
            return work(seat, bucket, rows)
        finally:
            free.put(seat)

    pool = ThreadPoolExecutor(len(seats), thread_name_prefix="bucket")
    waiting: deque[tuple[int, Future[Result]]] = deque()
    try:
        for bucket, rows in buckets:
            waiting.append((bucket, pool.submit(one, bucket, rows)))
            if len(waiting) > len(seats):
                first, result = waiting.popleft()
                yield first, result.result()
        for first, result in waiting:
            yield first, result.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def total(recorders: Sequence[Recorder]) -> Tally:
    """What the recorders' questions cost together."""
    out = Tally()
    for recorder in recorders:
        for name, value in vars(recorder.tally).items():
            setattr(out, name, getattr(out, name) + value)
    return out
