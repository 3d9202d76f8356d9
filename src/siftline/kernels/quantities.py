"""`text.numbers` of many texts: first all that can be no quantity is cut out, then it is asked.

The plain function looks at every word of a text in turn, and few of them are number words. Compiled
code drops the words that can't be one, by first letter, last letter and length, and the punctuation
that no quantity has; a line end stands in for what was dropped, and none of the patterns crosses
that. What is not ASCII stays, and so do the words it touches. So the quantities of what is left are
those of the text, however few of the dropped words compiled code knew.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numba import njit

from siftline.kernels.shingles import code_points
from siftline.kernels.text import _NUMBER_WORDS as NUMBER_WORDS
from siftline.kernels.text import numbers

_CUT, _LETTER, _KEPT, _DIGIT = range(4)
_LONGEST = max(map(len, NUMBER_WORDS))


def _kinds() -> np.ndarray:
    """What each ASCII character of a folded text is to a quantity, uint8, shape (128,)."""
    kinds = np.full(128, _CUT, np.uint8)
    for chars, kind in (("abcdefghijklmnopqrstuvwxyz", _LETTER), (" ,.%-+*/^<>=", _KEPT)):
        kinds[[ord(c) for c in chars]] = kind
    kinds[[ord(c) for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]] = _LETTER
    kinds[[ord(c) for c in "0123456789"]] = _DIGIT
    return kinds


def _shapes() -> np.ndarray:
    """Whether a number word has this first letter, last letter and length."""
    shapes = np.zeros((128, 128, _LONGEST + 1), np.bool_)
    for word in NUMBER_WORDS:
        shapes[ord(word[0]), ord(word[-1]), len(word)] = True
    return shapes


_KINDS, _SHAPES = _kinds(), _shapes()


def quantities(plain_texts: Sequence[str]) -> list[tuple[str, ...]]:
    """What `text.numbers` finds in each text.

    Args:
        plain_texts: Outputs of `text.plain`.
    """
    left = condensed(plain_texts)
    return [numbers(text) if text else () for text in left]


def condensed(plain_texts: Sequence[str]) -> list[str]:
    """The texts without what can be no part of a quantity; see above."""
    units, offsets = code_points(plain_texts)
    out, ends = _condensed(units, offsets, _KINDS, _SHAPES)
    whole = out.tobytes().decode("utf-32-le", "surrogatepass")
    starts = [0, *ends.tolist()]
    return [whole[a:b] for a, b in pairwise(starts)]


@njit(cache=True, nogil=True)
def _condensed(
    units: np.ndarray, offsets: np.ndarray, kinds: np.ndarray, shapes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    n = len(offsets) - 1
    out = np.empty(len(units) + n, np.uint32)
    ends = np.empty(n, np.int64)
    size = 0
    for i in range(n):
        begin, stop = offsets[i], offsets[i + 1]
        first, wanted = size, False  # is there a digit, a number word, or what nobody knows?
        k = begin
        while k < stop:
            kind = kinds[units[k]] if units[k] < 128 else _KEPT
            end = k + 1
            keep = kind != _CUT
            if units[k] >= 128 or kind == _DIGIT:
                wanted = True
            if kind == _LETTER:
                while end < stop and units[end] < 128 and kinds[units[end]] == _LETTER:
                    end += 1
                keep = _perhaps(units, begin, k, end, stop, shapes)
                wanted = wanted or keep
            if keep:
                for p in range(k, end):
                    out[size] = units[p]
                    size += 1
            elif size == first or out[size - 1] != 10:
                out[size] = 10
                size += 1
            k = end
        if not wanted:
            size = first
        ends[i] = size
    return out[:size].copy(), ends


@njit(cache=True, nogil=True)
def _perhaps(
    units: np.ndarray, begin: int, k: int, end: int, stop: int, shapes: np.ndarray
) -> bool:
    """Whether units[k:end], of a text from begin to stop, may be part of a quantity."""
    if (k > begin and units[k - 1] >= 128) or (end < stop and units[end] >= 128):
        return True
    length = end - k
    return length < shapes.shape[2] and shapes[units[k], units[end - 1], length]
