"""Spreads buckets over devices: one recorder a device, each with a copy of the model.

Batches are planned inside a bucket, so it doesn't matter to any number which device takes it, nor
how many there are.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Generic, TypeVar

from siftline.scoring.recorder import Recorder, Tally

Seat = TypeVar("Seat")
Rows = TypeVar("Rows")
Result = TypeVar("Result")


class Stopped(Exception):
    """Ends the work on a bucket because the run ends; what was committed is kept."""


def over_buckets(
    seats: Sequence[Seat],
    buckets: Iterable[tuple[int, Rows]],
    work: Callable[[Seat, int, Rows], Result],
) -> Iterator[tuple[int, Result]]:
    """Runs `work` on every bucket, one at a time on each seat.

    When the run ends early (an error, Ctrl-C), the seats finish the batch they are at and no more.

    Args:
        seats: What one device has: its recorder, or several by name or in a row.
        buckets: Store bucket and its rows, each bucket once; read as seats come free.
        work: Asks the models of a seat about the rows of one bucket.

    Yields:
        Bucket and result, in the order of the buckets.
    """
    if len(seats) == 1:
        for bucket, rows in buckets:
            yield bucket, work(seats[0], bucket, rows)
        return
    room = _Room(seats, work)
    pool = ThreadPoolExecutor(len(seats), thread_name_prefix="bucket")
    waiting: deque[tuple[int, Future[Result]]] = deque()
    try:
        for bucket, rows in buckets:
            waiting.append((bucket, pool.submit(room.one, bucket, rows)))
            if len(waiting) > len(seats):
                first, result = waiting.popleft()
                yield first, room.taken(result)
        for first, result in waiting:
            yield first, room.taken(result)
    finally:
        room.stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


class _Room(Generic[Seat, Rows, Result]):
    """The seats of one run, and whether it ends early."""

    def __init__(self, seats: Sequence[Seat], work: Callable[[Seat, int, Rows], Result]) -> None:
        self.work, self.stop = work, threading.Event()
        self._failures: list[BaseException] = []
        self._free: queue.SimpleQueue[Seat] = queue.SimpleQueue()
        for seat in seats:
            self._free.put(_stoppable(seat, self.stop))

    def one(self, bucket: int, rows: Rows) -> Result:
        """Does the work on a bucket on the next free seat."""
        seat = self._free.get()
        try:
            return self.work(seat, bucket, rows)
        except Stopped:
            raise
        except BaseException as error:
            self._failures.append(error)
            self.stop.set()
            raise
        finally:
            self._free.put(seat)

    def taken(self, result: Future[Result]) -> Result:
        """A bucket's result; the error that ended the run, where that stopped this bucket."""
        try:
            return result.result()
        except Stopped:
            raise self._failures[0] from None


def _stoppable(seat: Any, stop: threading.Event) -> Any:
    """A seat whose recorders give up after a committed batch once the run ends."""
    if isinstance(seat, dict):
        return {name: _stoppable(each, stop) for name, each in seat.items()}
    if isinstance(seat, list | tuple):
        return type(seat)(_stoppable(each, stop) for each in seat)
    if not isinstance(seat, Recorder):
        return seat

    def advance(rows: int, tokens: int) -> None:
        seat.progress(rows, tokens)
        if stop.is_set():
            raise Stopped

    return replace(seat, progress=advance)


@contextmanager
def counted(
    recorders: Collection[Recorder], units: int, advance: Callable[[int], None]
) -> Iterator[None]:
    """Makes a bucket's rows count in full, those that no question was asked for as well.

    Args:
        recorders: Those that are asked in the body; they report what they are asked.
        units: What the bucket's rows are in the step's total.
        advance: Takes the units that no recorder has reported.
    """
    before = _questions(recorders)
    yield
    advance(units - (_questions(recorders) - before))


def _questions(recorders: Collection[Recorder]) -> int:
    return sum(r.tally.computed + r.tally.found + r.tally.failed for r in recorders)


def total(recorders: Sequence[Recorder]) -> Tally:
    """What the recorders' questions cost together."""
    out = Tally()
    for recorder in recorders:
        for name, value in vars(recorder.tally).items():
            setattr(out, name, getattr(out, name) + value)
    return out
