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
  ("!=", "5!", "n! / 2");
* "." before a word with none before it (".5", ".NET"); ":" between digits ("3:4");
* an opening bracket behind an operator, a closing one before an operator: "(2 + 3) * 4".

So case, white space, commas, full stops, quotes and typography make no difference, and neither does
indentation. `words_reference` says the same in plain Python.
"""

import numpy as np
from numba import njit

from siftline.kernels.bits import (
    closing64,
    hyphens64,
    inner64,
    letters64,
    load64,
    opening64,
    others64,
    printed64,
    same64,
    signs64,
    store64,
    trailing_zeros,
    unclear64,
)
from siftline.kernels.folding import FRONT

REACH = 15
"""Spaces, and brackets, that are looked over for the neighbours of a sign."""
BLOCK = 64

_ONE = np.uint64(1)
_TWO = np.uint64(2)
_LAST = np.uint64(63)
_TOP = np.uint64(1 << 63)
_G = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)
_F = np.uint64(0xBF58476D1CE4E5B9)
# By the bytes that are left of a word, 0 to 16: those of the first eight, of the second.
_FIRST = np.array([(1 << 8 * min(size, 8)) - 1 for size in range(32)], np.uint64)
_SECOND = np.array([(1 << 8 * min(max(size - 8, 0), 8)) - 1 for size in range(32)], np.uint64)

_NONE, _SMALL, _DIGIT, _INNER, _MAYBE, _ALWAYS, _OPERATOR, _OPEN, _CLOSE, _FAR = range(10)


def _kinds() -> np.ndarray:
    """What each byte of a folded text is, uint8, shape (256,)."""
    kinds = np.full(256, _NONE, np.uint8)
    for chars, kind in (
        ("abcdefghijklmnopqrstuvwxyz", _SMALL),
        ("0123456789", _DIGIT),
        (".,':;_", _INNER),
        ("-!", _MAYBE),
        ("#$@\\", _ALWAYS),
        ("+*/<=>^|~&%", _OPERATOR),
        ("([{", _OPEN),
        (")]}", _CLOSE),
    ):
        kinds[[ord(c) for c in chars]] = kind
    kinds[0x80:] = _FAR
    return kinds


_KINDS = _kinds()


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
    for base in range(FRONT, end + 1, BLOCK):
        words, signs = _marked(folded, base)
        starts, ends, carried_on = _edges(folded, base, words, signs, carried)
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
    for base in range(FRONT, end + 1, BLOCK):
        words, signs = _marked(folded, base)
        starts, ends, carried_on = _edges(folded, base, words, signs, carried)
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
    folded: np.ndarray, base: int, words: np.uint64, signs: np.uint64, carried: np.uint64
) -> tuple[np.uint64, np.uint64, np.uint64]:
    """Where words and signs start and end, and what runs on; see `_marked`.

    `carried` is 1 while a word runs over the end of a block, 2 where a sign is its last byte.
    """
    before = (words << _ONE) | (carried & _ONE)
    behind = (signs << _ONE) | (carried >> _ONE)
    run = behind & signs
    if run != 0:  # the same sign once more
        run &= same64(folded, base)
    starts = (words & ~before) | (signs & ~run)
    ends = (before & ~words) | (behind & ~run)
    return starts, ends, (words >> _LAST) | ((signs >> _LAST) << _ONE)


@njit(cache=True, nogil=True, forceinline=True)
def _marked(folded: np.ndarray, base: int) -> tuple[np.uint64, np.uint64]:
    """One bit for each of 64 bytes: part of a word; a sign."""
    letters, inner = letters64(folded, base), inner64(folded, base)
    words, signs = letters | others64(folded, base), np.uint64(0)
    # What is seen at once need not be asked: a full stop before a space, a hyphen between words, a
    # bracket beside a word, with or without a space between. At the ends of a block all is asked.
    asked = inner & ((words >> _ONE) | _TOP)
    if printed64(folded, base) & ~(words | inner) != 0:
        signs, hyphens = signs64(folded, base), hyphens64(folded, base)
        opening, closing = opening64(folded, base), closing64(folded, base)
        unclear = unclear64(folded, base)
        marks = signs | hyphens | opening | closing | unclear
        apart, still = ~(marks << _ONE), ~((marks | inner) >> _ONE)
        between = (letters << _ONE) & (letters >> _ONE) & ((letters << _TWO) | (letters >> _TWO))
        asked |= unclear | (hyphens & ~between)
        asked |= opening & ~((words << _ONE) | ((words << _TWO) & apart))
        asked |= closing & ~(((words | inner) >> _ONE) | ((words >> _TWO) & still))
    if asked != 0:
        return _settled(folded, base, words, signs, asked)
    return words, signs


@njit(cache=True, nogil=True)
def _settled(
    folded: np.ndarray, base: int, words: np.uint64, signs: np.uint64, asked: np.uint64
) -> tuple[np.uint64, np.uint64]:
    """What `_marked` gives, the bytes `asked` looked at one by one."""
    while asked != 0:
        bit = asked & (~asked + _ONE)
        kind = _role(folded, base + trailing_zeros(asked))
        asked ^= bit
        if kind == _SMALL:
            words |= bit
        elif kind == _ALWAYS:
            signs |= bit
    return words, signs


@njit(cache=True, nogil=True)
def _role(folded: np.ndarray, k: int) -> int:
    """Whether the byte at k is part of a word (_SMALL), a sign (_ALWAYS), or neither (_NONE)."""
    kind = _KINDS[folded[k]]
    if kind in (_OPERATOR, _ALWAYS):
        return _ALWAYS
    if kind == _INNER:
        return _inner(folded, k)
    if kind == _MAYBE:
        counts = _minus(folded, k) if folded[k] == 45 else _bang(folded, k)
        return _ALWAYS if counts else _NONE
    if kind == _OPEN:
        return _ALWAYS if _opens(folded, k) else _NONE
    if kind == _CLOSE:
        return _ALWAYS if _closes(folded, k) else _NONE
    return _NONE


@njit(cache=True, nogil=True)
def _inner(folded: np.ndarray, k: int) -> int:
    """The role of a byte that is one of .,':;_ at k."""
    char = folded[k]
    if char == 95:  # _
        a, b = k - 1, k + 1
        while folded[a] == 95 and k - a < REACH:
            a -= 1
        while folded[b] == 95 and b - k < REACH:
            b += 1
        return _SMALL if _is_word(folded[a]) and _is_word(folded[b]) else _NONE
    left, right = _KINDS[folded[k - 1]], _KINDS[folded[k + 1]]
    if left == _DIGIT and right == _DIGIT:
        return _ALWAYS if char == 58 else _SMALL
    if left in (_SMALL, _FAR) and right in (_SMALL, _FAR):
        return _SMALL if char == 46 or char == 39 else _NONE
    if char == 46 and _is_word(folded[k + 1]) and left != _DIGIT and left != _SMALL:
        # Not behind a letter, another one, or a character of a script without spaces.
        behind = left == _FAR or folded[k - 1] == 46 or folded[k - 1] == 0
        return _NONE if behind else _ALWAYS
    return _NONE


@njit(cache=True, nogil=True)
def _minus(folded: np.ndarray, k: int) -> bool:
    a, b = _left(folded, k), _right(folded, k)
    left, right = _KINDS[folded[a]], _KINDS[folded[b]]
    if right == _DIGIT or (folded[b] == 46 and _KINDS[folded[b + 1]] == _DIGIT):
        return True
    one = _lone_right(folded, b)
    operand = left in (_DIGIT, _CLOSE) or _lone_left(folded, a)
    if operand and (one or right == _OPEN or folded[b] == 92):
        return True
    behind = _is_word(folded[k + 1])
    if _is_word(folded[k - 1]):
        if behind or left == _DIGIT:
            return not behind
        word = k - 1
        while _KINDS[folded[word]] == _SMALL and k - word < 4:
            word -= 1
        return k - word < 4 and not _is_word(folded[word])
    if left == _CLOSE or (folded[k - 1] == 45 and folded[k - 2] > 32):
        return False
    return behind or (b == k + 1 and (right == _OPEN or folded[b] == 92))


@njit(cache=True, nogil=True)
def _bang(folded: np.ndarray, k: int) -> bool:
    behind = folded[k + 1]
    if behind == 61 or behind == 40 or _is_word(behind):
        return True
    before = folded[k - 1]
    if before == 41 or _KINDS[before] == _DIGIT:
        return True
    right = _KINDS[folded[_right(folded, k)]]
    return right in (_OPERATOR, _MAYBE, _CLOSE) and _lone_left(folded, k - 1)


@njit(cache=True, nogil=True)
def _opens(folded: np.ndarray, k: int) -> bool:
    """Whether a sign stands before the opening bracket at k, other such brackets aside."""
    a = k - 1
    while k - a < REACH and ((folded[a] <= 32 and folded[a] != 0) or _KINDS[folded[a]] == _OPEN):
        a -= 1
    kind = _KINDS[folded[a]]
    if kind == _OPERATOR:
        return True
    if kind == _MAYBE:
        return _minus(folded, a) if folded[a] == 45 else _bang(folded, a)
    return False


@njit(cache=True, nogil=True)
def _closes(folded: np.ndarray, k: int) -> bool:
    """Whether an operator stands behind the closing bracket at k, other such brackets aside."""
    b = k + 1
    while b - k < REACH and ((folded[b] <= 32 and folded[b] != 0) or _KINDS[folded[b]] == _CLOSE):
        b += 1
    kind = _KINDS[folded[b]]
    if kind == _MAYBE:
        return _minus(folded, b) if folded[b] == 45 else _bang(folded, b)
    return kind == _OPERATOR


@njit(cache=True, nogil=True)
def _is_word(byte: int) -> bool:
    kind = _KINDS[byte]
    return kind in (_SMALL, _DIGIT, _FAR)


@njit(cache=True, nogil=True)
def _left(folded: np.ndarray, k: int) -> int:
    """The nearest place before k that is no space."""
    a = k - 1
    while k - a < REACH and folded[a] <= 32 and folded[a] != 0:
        a -= 1
    return a


@njit(cache=True, nogil=True)
def _right(folded: np.ndarray, k: int) -> int:
    b = k + 1
    while b - k < REACH and folded[b] <= 32 and folded[b] != 0:
        b += 1
    return b


@njit(cache=True, nogil=True)
def _lone_left(folded: np.ndarray, a: int) -> bool:
    """Whether a letter by itself ends at a; one that is a word in any case does not count."""
    kind = _KINDS[folded[a]]
    if kind == _FAR:
        while folded[a] & 0xC0 == 0x80:
            a -= 1
        return folded[a - 1] != 0 and not _is_word(folded[a - 1])
    return kind == _SMALL and not _is_word(folded[a - 1])


@njit(cache=True, nogil=True)
def _lone_right(folded: np.ndarray, b: int) -> bool:
    """Whether a letter by itself starts at b."""
    kind = _KINDS[folded[b]]
    if kind == _FAR:
        size = 2 if folded[b] < 0xE0 else 3 if folded[b] < 0xF0 else 4
        return folded[b + size] != 0 and not _is_word(folded[b + size])
    return kind == _SMALL and not _is_word(folded[b + 1])
