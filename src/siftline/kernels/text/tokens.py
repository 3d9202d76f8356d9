r"""What a word is, for every comparison of texts: the one definition, in compiled code.

A text is folded (`codepoints`, `folding`) and cut into words and signs; all else only parts them.

Words are those of Unicode (UAX #29, default rules): letters, numbers and their marks; "." and "'"
between letters, these and "," and ";" between digits, and "_" between either. So "don't", "3.10",
"1,200" and "node.js" are one word each, and Hindi or Hebrew words keep their vowels. Apart from it,
":" parts words, "_" at either end is not there, and each character of a script without spaces is a
word by itself, katakana as well.

Signs count, a run of one sign as a word, because "3 + 4" and "3 * 4", "C#" and "C++" differ in
nothing else:

* symbols outside ASCII (currency, arrows, emoji), and + * / < = > ^ | ~ & % $ # @ \ in it;
* "-" before a digit, between operands (digits, single letters, brackets), before a word that
  nothing stands before, and behind a digit or a word of one or two letters ("-5", "a - b",
  "-x", "Cl-"). A hyphen or a dash between words is none;
* "!" before a word, "=" or "(", behind a digit or ")", and between a single letter and an operator
  ("!=", "5!", "n! / 2"); whatever follows, behind k m n p q r by itself ("find n!"), and behind
  another letter but a, i, o at the start of a text and behind an operator, "$" or an opening
  bracket. "Plan B!" is prose. A second one counts as the first does, three do not;
* a run of "'" behind a single letter or a closing bracket, before "(" or an operator ("f'(x)",
  "y'' + y"), and behind a letter but a, i, o at the end and before closing punctuation, unless a
  quotation opened before it;
* "." before a word with none before it (".5", ".NET"); ":" between digits ("3:4");
* an opening bracket behind an operator, a closing one before an operator: "(2 + 3) * 4";
* both brackets of an interval, which are no pair and hold two operands: "[2, 3)", "]0, 1[".
  "[2, 3]" may be a citation.

So case, white space, commas, full stops, quotes and typography make no difference, and neither does
indentation. `words_reference` says the same in plain Python.
"""

import numpy as np
from numba import njit

from siftline.kernels.text.bits import load64, store64, trailing_zeros
from siftline.kernels.text.folding import FRONT
from siftline.kernels.text.signs import marked

_ONE = np.uint64(1)
_ALL = np.uint64((1 << 64) - 1)
_G = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)
_F = np.uint64(0xBF58476D1CE4E5B9)
# By the bytes that are left of a word, 0 to 16: those of the first eight, of the second.
_FIRST = np.array([(1 << 8 * min(size, 8)) - 1 for size in range(32)], np.uint64)
_SECOND = np.array([(1 << 8 * min(max(size - 8, 0), 8)) - 1 for size in range(32)], np.uint64)


@njit(cache=True, nogil=True, forceinline=True)
def word_units(folded: np.ndarray, end: int, out: np.ndarray) -> int:
    """Hashes the words of a folded text; returns how many there are.

    Args:
        folded: uint8, as `folding.fold` writes it.
        end: Where the text ends in it.
        out: uint64, one for each word; end - FRONT + 1 always suffice.
    """
    found, start = 0, 0
    carried = np.uint64(0)
    base = FRONT
    while base <= end:
        words, signs, same, step = marked(folded, base)
        starts, ends, carried_on = _edges(words, signs, same, carried, step)
        if carried == 0:
            start = base + trailing_zeros(starts)
            starts &= starts - _ONE
        while ends != 0:
            stop = base + trailing_zeros(ends)
            ends &= ends - _ONE
            out[found] = hashed(folded, start, stop)
            found += 1
            start = base + trailing_zeros(starts)
            starts &= starts - _ONE
        carried = carried_on
        base += step
    return found


@njit(cache=True, nogil=True)
def write_words(folded: np.ndarray, end: int, out: np.ndarray, at: int) -> int:
    """Writes the words of a folded text, a space between them, to out[at:]; returns where it ends.

    Args:
        folded: uint8, as `folding.fold` writes it.
        end: Where the text ends in it.
        out: uint8; after `at` twice as many bytes as the folded text has, and eight.
        at: First free place.
    """
    first, start = at, 0
    carried = np.uint64(0)
    base = FRONT
    while base <= end:
        words, signs, same, step = marked(folded, base)
        starts, ends, carried_on = _edges(words, signs, same, carried, step)
        if carried == 0:
            start = base + trailing_zeros(starts)
            starts &= starts - _ONE
        while ends != 0:
            stop = base + trailing_zeros(ends)
            ends &= ends - _ONE
            if at > first:
                out[at] = 32
                at += 1
            for k in range(start, stop, 8):
                store64(out, at + k - start, load64(folded, k))
            at += stop - start
            start = base + trailing_zeros(starts)
            starts &= starts - _ONE
        carried = carried_on
        base += step
    return at


@njit(cache=True, nogil=True, forceinline=True)
def hashed(data: np.ndarray, start: int, stop: int) -> np.uint64:
    """The hash of one word, its last 16 bytes at once; what is behind it may be anything."""
    h = np.uint64(0)
    while stop - start > 16:
        h = (h ^ load64(data, start)) * _G
        h ^= h >> _HALF
        start += 8
    size = (stop - start) & 31  # never more than 16; said so that no index is tested
    first = load64(data, start) & _FIRST[size]
    second = load64(data, start + 8) & _SECOND[size]
    h = (h ^ first) * _G + second * _F
    return h ^ (h >> _HALF)


@njit(cache=True, nogil=True, forceinline=True)
def _edges(
    words: np.uint64, signs: np.uint64, same: np.uint64, carried: np.uint64, step: int
) -> tuple[np.uint64, np.uint64, np.uint64]:
    """Where words and signs start and end, and what runs on; see `signs.marked`.

    `carried` is 1 while a word runs over the end of a step, 2 where a sign is its last byte.
    """
    before = (words << _ONE) | (carried & _ONE)
    behind = (signs << _ONE) | (carried >> _ONE)
    run = behind & signs & same
    starts = (words & ~before) | (signs & ~run)
    ends = ((before & ~words) | (behind & ~run)) & (_ALL >> np.uint64(64 - step))
    last = np.uint64(step - 1)
    return starts, ends, (words >> last) | ((signs >> last) << _ONE)
