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

Worker = TypeVar("Worker")
Rows = TypeVar("Rows")
Result = TypeVar("Result")


class Stopped(Exception):
    """Ends the work on a bucket because the run ends; what was committed is kept."""


def over_buckets(
    workers: Sequence[Worker],
    buckets: Iterable[tuple[int, Rows]],
    work: Callable[[Worker, int, Rows], Result],
) -> Iterator[tuple[int, Result]]:
    """Runs `work` on every bucket, one at a time on each worker.

    When the run ends early (an error, Ctrl-C), each worker finishes its batch and no more.

    Args:
        workers: What one device has: its recorder, or several by name or in a row.
        buckets: Store bucket and its rows, each bucket once; read as workers come free.
        work: Asks the models of a worker about the rows of one bucket.

    Yields:
        Bucket and result, in the order of the buckets.
    """
    if len(workers) == 1:
        for bucket, rows in buckets:
            yield bucket, work(workers[0], bucket, rows)
        return
    crew = _Workers(workers, work)
    pool = ThreadPoolExecutor(len(workers), thread_name_prefix="bucket")
    waiting: deque[tuple[int, Future[Result]]] = deque()
    try:
        for bucket, rows in buckets:
            waiting.append((bucket, pool.submit(crew.one, bucket, rows)))
            if len(waiting) > len(workers):
                first, result = waiting.popleft()
                yield first, crew.taken(result)
        for first, result in waiting:
            yield first, crew.taken(result)
    finally:
        crew.stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


class _Workers(Generic[Worker, Rows, Result]):
    """The workers of one run, and whether it ends early."""

    def __init__(
        self, workers: Sequence[Worker], work: Callable[[Worker, int, Rows], Result]
    ) -> None:
        self.work, self.stop = work, threading.Event()
        self._failures: list[BaseException] = []
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in workers:
            self._free.put(_stoppable(worker, self.stop))

    def one(self, bucket: int, rows: Rows) -> Result:
        """Does the work on a bucket on the next free worker."""
        worker = self._free.get()
        try:
            return self.work(worker, bucket, rows)
        except Stopped:
            raise
        except BaseException as error:
            self._failures.append(error)
            self.stop.set()
            raise
        finally:
            self._free.put(worker)

    def taken(self, result: Future[Result]) -> Result:
        """A bucket's result; the error that ended the run, where that stopped this bucket."""
        try:
            return result.result()
        except Stopped:
            raise self._failures[0] from None


def _stoppable(worker: Any, stop: threading.Event) -> Any:
    """A worker whose recorders give up after a committed batch once the run ends."""
    if isinstance(worker, dict):
        return {name: _stoppable(each, stop) for name, each in worker.items()}
    if isinstance(worker, list | tuple):
        return type(worker)(_stoppable(each, stop) for each in worker)
    if not isinstance(worker, Recorder):
        return worker

    def advance(rows: int, tokens: int) -> None:
        worker.progress(rows, tokens)
        if stop.is_set():
            raise Stopped

    return replace(worker, progress=advance)


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
