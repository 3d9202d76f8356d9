"""The loop over texts of `text.words_of`; importing that compiles nothing."""

import numpy as np
from numba import njit

from siftline.kernels.text.codepoints import FRONT, GROWTH, ROOM, Tables
from siftline.kernels.text.folding import fold
from siftline.kernels.text.tokens import write_words


@njit(cache=True, nogil=True)
def words_of(
    data: np.ndarray, offsets: np.ndarray, tables: Tables
) -> tuple[np.ndarray, np.ndarray]:
    """Writes the words of every text, joined by spaces; returns all bytes, and where each starts.

    Args:
        data: UTF-8 of all texts, uint8.
        offsets: int64, shape (n + 1,).
        tables: `codepoints.tables`.
    """
    n, longest = len(offsets) - 1, np.int64(0)
    for i in range(n):
        longest = max(longest, offsets[i + 1] - offsets[i])
    folded = np.empty(GROWTH * longest + FRONT + ROOM, np.uint8)
    points = np.empty(GROWTH * longest * 3 // 2 + 8, np.uint32)
    out, at = np.empty(len(data) + 16 * n + 64, np.uint8), 0
    starts = np.zeros(n + 1, np.int64)
    for i in range(n):
        end = fold(data, offsets[i], offsets[i + 1], folded, tables, points)
        needed = at + 2 * (end - FRONT) + 16
        if needed > len(out):
            more = np.empty(max(needed, 2 * len(out)), np.uint8)
            more[:at] = out[:at]
            out = more
        at = write_words(folded, end, out, at)
        starts[i + 1] = at
    return out[:at].copy(), starts
