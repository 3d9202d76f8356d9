"""Large products of matrices in blocks, on as many threads as there are cores, exact to the bit.

A library for matrices adds in an order of its own, which depends on its version, the threads and
the place of a row in the matrix: equal vectors get numbers that differ in the last bits, and ties
are settled by chance. Here vectors are put on a grid of whole numbers of 24 bits before they are
multiplied in float64. Every partial sum then fits its 53 bits, so any order gives the same number:
it depends on the two vectors alone. The grid moves a cosine by about 1e-7. What is held at once is
a few blocks, never all pairs.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import numpy as np

VALUES = 1 << 21
"""Numbers of one block of a product: 16 MB at float64."""
BITS = 24
"""Bits of a coordinate on the grid; 2 x 24 for a product of unit vectors leave room in 53."""

T = TypeVar("T")


def block_rows(columns: int) -> int:
    """Rows of a block for a product with so many columns: 64 to 4096."""
    return int(np.clip(VALUES // max(1, columns), 64, 4096))


@cache
def _libraries() -> Any:
    """The libraries whose threads can be held; looked for once, which takes milliseconds."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def over_blocks(n: int, rows: int, work: Callable[[int, int], T]) -> Iterator[tuple[int, int, T]]:
    """Calls `work(start, stop)` for the blocks of n rows on threads; yields them in order.

    Args:
        n: Rows in all.
        rows: Rows of a block; the last one may be shorter.
        work: Must not change anything that another block reads.

    Yields:
        (start, stop, result). BLAS is held at one thread until the last one was taken.
    """
    with pooled() as blocks:
        yield from blocks(n, rows, work)


@contextmanager
def pooled() -> Iterator[Callable[..., Iterator[tuple[int, int, Any]]]]:
    """Yields a function like `over_blocks` that keeps its threads, for many small calls."""
    workers = os.cpu_count() or 1

    def blocks(
        n: int, rows: int, work: Callable[[int, int], Any]
    ) -> Iterator[tuple[int, int, Any]]:
        spans = [(start, min(start + rows, n)) for start in range(0, n, rows)]
        if len(spans) == 1:
            yield *spans[0], work(*spans[0])
            return
        waiting: deque[tuple[int, int, Future[Any]]] = deque()
        for start, stop in spans:
            waiting.append((start, stop, threads.submit(work, start, stop)))
            if len(waiting) > workers:
                first, last, future = waiting.popleft()
                yield first, last, future.result()
        for first, last, future in waiting:
            yield first, last, future.result()

    with _libraries().limit(limits=1), ThreadPoolExecutor(workers) as threads:
        yield blocks


def unit(x: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, float32, shape (n, d); a row of zeros stays one."""
    out = np.empty(x.shape, dtype=np.float32)
    for start in range(0, len(x), 4096):
        out[start : start + 4096] = _unit64(x[start : start + 4096])
    return out


def _unit64(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    lengths = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    scaled: np.ndarray = wide / np.where(lengths > 0, lengths, 1)[:, None]
    return scaled


def on_grid(x: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1 and then to whole numbers below 2^24 in size, float64, shape (n, d).

    The inner product of two such rows is exact, and `COSINE` times it is their cosine.
    """
    found: np.ndarray = np.rint(_unit64(x) * 2.0**BITS)
    return found


COSINE = 2.0 ** (-2 * BITS)


def cosine_blocks(x: np.ndarray, y: np.ndarray) -> tuple[Callable[[int, int], np.ndarray], int]:
    """Cosine similarities in blocks, without a copy of `x`.

    Args:
        x: Vectors, shape (n, d), any float type.
        y: Vectors, shape (m, d).

    Returns:
        A function that gives those of rows start..stop, float32 (stop - start, m), and the rows of
        a block. A vector of zeros has similarity 0 to all.
    """
    turned = np.ascontiguousarray(on_grid(y).T)

    def similarities(start: int, stop: int) -> np.ndarray:
        found: np.ndarray = (on_grid(x[start:stop]) @ turned * COSINE).astype(np.float32)
        return found

    return similarities, block_rows(len(y))
