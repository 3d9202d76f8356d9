"""Which bytes of a folded text are parts of words, and which are signs: the rules of `tokens`.

64 bytes at a time become bits, one number for each kind of byte, and the rules become operations on
these numbers, since a jump on what a text holds is guessed wrong more often than not. What they
can't see, as a sign with two spaces before it, is looked at byte by byte, by the same rules.
"""

import numpy as np
from numba import njit

from siftline.kernels.text.bits import (
    backslashes64,
    bangs64,
    beside64,
    closing64,
    colons64,
    digits64,
    dots64,
    hyphens64,
    joints64,
    known64,
    leading_zeros,
    letters64,
    opening64,
    operators64,
    quotes64,
    rare64,
    round_closing64,
    round_opening64,
    same64,
    separators64,
    signs64,
    spaces64,
    square_closing64,
    square_opening64,
    trailing_zeros,
    underscores64,
    zeros64,
)
from siftline.kernels.text.roles import ALWAYS, SMALL, bounds_interval, role_apart

MARGIN = 3
"""Bytes before and behind that a byte's role is seen by."""
STEP = 64 - 2 * MARGIN
"""Bytes whose roles are found at once."""

_ONE = np.uint64(1)
_TWO = np.uint64(2)
_TOP = np.uint64(1 << 63)
_MARGIN = np.uint64(MARGIN)
_MIDDLE = np.uint64((1 << STEP) - 1)
_EDGES = ~(_MIDDLE << _MARGIN)


@njit(cache=True, nogil=True, forceinline=True)
def marked(folded: np.ndarray, base: int) -> tuple[np.uint64, np.uint64, np.uint64, int]:
    """One bit for each of some bytes from base on.

    Returns:
        Parts of words; signs; bytes that are equal to the one before, where there are signs; and
        how many bytes these are about.
    """
    known, joints = known64(folded, base), joints64(folded, base)
    # A quote behind a letter by itself, of one or two bytes, may be a prime.
    longer = (known << _TWO) & (known << _MARGIN)
    primes = quotes64(folded, base) & (((known << _ONE) & ~longer) | _ONE)
    if (rare64(folded, base) | primes | (joints & ((known >> _ONE) | _TOP))) == 0:
        return known, np.uint64(0), np.uint64(0), 64
    words, signs = _with_signs(folded, base - MARGIN)
    same = same64(folded, base)
    return (words >> _MARGIN) & _MIDDLE, (signs >> _MARGIN) & _MIDDLE, same, STEP


@njit(cache=True, nogil=True, forceinline=True)
def _with_signs(folded: np.ndarray, start: int) -> tuple[np.uint64, np.uint64]:
    """The words and signs of 64 bytes that hold more than words apart."""
    letters, digits, known = (
        letters64(folded, start),
        digits64(folded, start),
        known64(folded, start),
    )
    far = known & ~(letters | digits)
    dots, quotes = dots64(folded, start), quotes64(folded, start)
    between_digits = _back(digits, 1) & _next(digits, 1)
    between_letters = _back(letters | far, 1) & _next(letters | far, 1)
    joints = dots | quotes
    words = known | (joints & between_letters)
    words |= (joints | separators64(folded, start)) & between_digits
    zeros = zeros64(folded, start)
    nothing_before = ~_back(known | dots | zeros, 1)
    signs = (colons64(folded, start) & between_digits) | (dots & nothing_before & _next(known, 1))
    lines = underscores64(folded, start)
    words |= lines & _back(known, 1) & _next(known, 1)
    asked = lines & _back(known | lines, 1) & _next(known | lines, 1) & ~words
    signs |= signs64(folded, start)
    bounds = np.uint64(0)
    primes = _back(far | quotes, 1) | (_back(letters, 1) & ~_back(known, 2))
    hyphens, bangs = hyphens64(folded, start), bangs64(folded, start)
    opening, closing = opening64(folded, start), closing64(folded, start)
    if (hyphens | bangs | opening | closing) != 0:
        spaces = spaces64(folded, start)
        yes, unsure = np.uint64(0), np.uint64(0)
        if hyphens != 0:
            behind = opening | backslashes64(folded, start)
            yes, unsure = _minuses(
                letters, digits, far, dots, hyphens, closing, behind, spaces, zeros
            )
        if bangs != 0:
            sure = _next(known, 1) | _back(digits, 1)
            never = _back(letters, 1) & _back(letters, 2) & ~_next(known | signs | opening, 1)
            yes |= bangs & sure
            unsure |= bangs & ~(sure | never)
        # What else would be seen of those at the ends is not among the 64.
        unsure |= (hyphens | bangs) & _EDGES
        yes &= ~unsure
        operators = operators64(folded, start) | yes
        first, first_asked = _opened(opening, spaces, operators, unsure)
        last, last_asked = _closed(closing, spaces, operators, unsure)
        signs |= yes | first | last
        asked |= unsure | first_asked | last_asked
        if (opening | closing) != 0:
            primes |= _back(closing, 1)
            around = spaces | zeros | beside64(folded, start)
            bounds = _of_intervals(folded, start, spaces, around)
    asked |= quotes & primes & ~_next(known, 1)
    asked &= _MIDDLE << _MARGIN
    bounds &= (_MIDDLE << _MARGIN) & ~signs
    if (asked | bounds) != 0:
        return _settled(folded, start, words, signs, asked, bounds)
    return words, signs


@njit(cache=True, nogil=True, forceinline=True)
def _opened(
    opening: np.uint64, spaces: np.uint64, operators: np.uint64, unsure: np.uint64
) -> tuple[np.uint64, np.uint64]:
    """Opening brackets that are signs, and those that can't be told; see `roles`."""
    gap = _back(spaces, 1)
    yes = opening & (_back(operators, 1) | (gap & _back(operators, 2)))
    asked = opening & (_back(unsure, 1) | (gap & _back(unsure | opening | spaces, 2)))
    if (asked & gap) != 0:  # indented lines
        asked &= ~gap | _back(_from(operators | unsure | opening, spaces), 1)
    two = opening & _back(opening, 1)
    asked |= two & (_back(asked, 1) | _back(two, 1))
    return yes | (two & _back(yes, 1)), asked


@njit(cache=True, nogil=True, forceinline=True)
def _closed(
    closing: np.uint64, spaces: np.uint64, operators: np.uint64, unsure: np.uint64
) -> tuple[np.uint64, np.uint64]:
    """Closing brackets that are signs, and those that can't be told; see `roles`."""
    gap = _next(spaces, 1)
    yes = closing & (_next(operators, 1) | (gap & _next(operators, 2)))
    asked = closing & (_next(unsure, 1) | (gap & _next(unsure | closing | spaces, 2)))
    if (asked & gap) != 0:  # indented lines
        asked &= ~gap | _next(_up_to(operators | unsure | closing, spaces), 1)
    two = closing & _next(closing, 1)
    asked |= two & (_next(asked, 1) | _next(two, 1))
    return yes | (two & _next(yes, 1)), asked


@njit(cache=True, nogil=True, forceinline=True)
def _of_intervals(
    folded: np.ndarray, start: int, spaces: np.uint64, around: np.uint64
) -> np.uint64:
    """Brackets that may be those of an interval: two neighbours that are no pair.

    Args:
        folded: The text.
        start: The first of the 64 bytes.
        spaces: Spaces.
        around: What may stand beside a reversed bracket, outside.
    """
    first, last, left, right = _brackets(folded, start)
    every = first | last | left | right
    if every == 0:
        return every
    nothing = spaces | every | separators64(folded, start)
    opens = right & (_back(around, 1) | _ONE) & ~_next(nothing, 1)
    closes = left & (_next(around, 1) | _TOP) & ~_back(nothing, 1)
    mixed = _bracket_after(first, every) & (right | closes)
    mixed |= _bracket_after(left, every) & (last | closes)
    mixed |= _bracket_after(opens, every) & (last | right | closes)
    if mixed != 0:
        return every
    asked, at = np.uint64(0), max(start - 64, 0)
    highest, lowest = _TOP >> leading_zeros(every), every & (~every + _ONE)
    if (highest & (first | left | opens)) != 0:
        unfit, round_ones, outer, square_ones = _brackets(folded, start + 64)
        beyond = unfit | round_ones | outer | square_ones
        beyond &= ~beyond + _ONE
        pair = round_ones if highest & first else square_ones if highest & left else unfit
        asked |= highest * np.uint64((beyond & ~pair & ~unfit) != 0)
    if (lowest & (last | right | closes)) != 0:
        round_ones, unfit, square_ones, outer = _brackets(folded, at)
        before = round_ones | unfit | square_ones | outer
        if start < 64:
            before &= (_ONE << np.uint64(start)) - _ONE
        if before != 0:
            before = _TOP >> leading_zeros(before)
            pair = round_ones if lowest & last else square_ones if lowest & right else unfit
            asked |= lowest * np.uint64((before & ~pair & ~unfit) != 0)
    return asked


@njit(cache=True, nogil=True, forceinline=True)
def _brackets(folded: np.ndarray, start: int) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """The brackets ( ) [ ] of 64 bytes."""
    return (
        round_opening64(folded, start),
        round_closing64(folded, start),
        square_opening64(folded, start),
        square_closing64(folded, start),
    )


@njit(cache=True, nogil=True, forceinline=True)
def _bracket_after(what: np.uint64, every: np.uint64) -> np.uint64:
    """The brackets that are the next behind some: a carry runs through all that is none."""
    return ((what << _ONE) + ~every) & every


@njit(cache=True, nogil=True, forceinline=True)
def _up_to(what: np.uint64, spaces: np.uint64) -> np.uint64:
    """Bytes that are some, and spaces before the next of them, or before the end of the 64."""
    what |= spaces & ~(~what >> np.uint64(1))
    spaces &= spaces >> np.uint64(1)
    what |= spaces & ~(~what >> np.uint64(2))
    spaces &= spaces >> np.uint64(2)
    what |= spaces & ~(~what >> np.uint64(4))
    spaces &= spaces >> np.uint64(4)
    return what | (spaces & ~(~what >> np.uint64(8)))


@njit(cache=True, nogil=True, forceinline=True)
def _from(what: np.uint64, spaces: np.uint64) -> np.uint64:
    """Bytes that are some, and spaces behind the last of them, or behind the start of the 64."""
    what |= spaces & ~(~what << np.uint64(1))
    spaces &= spaces << np.uint64(1)
    what |= spaces & ~(~what << np.uint64(2))
    spaces &= spaces << np.uint64(2)
    what |= spaces & ~(~what << np.uint64(4))
    spaces &= spaces << np.uint64(4)
    return what | (spaces & ~(~what << np.uint64(8)))


@njit(cache=True, nogil=True, forceinline=True)
def _minuses(
    letters: np.uint64,
    digits: np.uint64,
    far: np.uint64,
    dots: np.uint64,
    hyphens: np.uint64,
    closing: np.uint64,
    behind: np.uint64,
    spaces: np.uint64,
    zeros: np.uint64,
) -> tuple[np.uint64, np.uint64]:
    """Hyphens that are signs, and those that can't be told; see `roles`.

    Args:
        letters: Small letters.
        digits: Digits.
        far: What is not ASCII.
        dots: Full stops.
        hyphens: Hyphens.
        closing: Closing brackets.
        behind: Opening brackets and backslashes.
        spaces: Spaces.
        zeros: Zero bytes, beside a word by itself.
    """
    known = letters | digits | far
    before, after = _back(spaces, 1), _next(spaces, 1)
    beyond_left, beyond_right = before & _back(spaces, 2), after & _next(spaces, 2)
    number = digits | (dots & _next(digits, 1))
    operand = digits | closing | (letters & ~_back(known, 1))
    target = behind | (letters & ~_next(known, 1))
    on_left = _back(operand, 1) | (before & _back(operand, 2))
    on_right = _next(target, 1) | (after & _next(target, 2))
    sure = _next(number, 1) | (after & _next(number, 2)) | (on_left & on_right)
    maybe_left = on_left | beyond_left | _back(far, 1) | (before & _back(far, 2))
    maybe_right = on_right | _next(far, 1) | (after & _next(far, 2))
    unsure = beyond_right | (maybe_left & maybe_right)
    in_word, to_word = _back(known, 1), _next(known, 1)
    short = _back(letters, 1) & (~_back(known, 2) | (_back(letters, 2) & ~_back(known, 3)))
    short |= _back(digits, 1)
    closed = _back(closing, 1) | (before & _back(closing, 2))
    closed |= _back(hyphens, 1) & ~_back(spaces | zeros, 2)
    starts = ~in_word & (to_word | _next(behind, 1))
    unsure |= starts & beyond_left
    rest = (in_word & ~to_word & short) | (starts & ~closed)
    return hyphens & (sure | (rest & ~unsure)), hyphens & unsure & ~sure


@njit(cache=True, nogil=True, forceinline=True)
def _back(bits: np.uint64, n: int) -> np.uint64:
    """Bit k is what bit k - n was."""
    return bits << np.uint64(n)


@njit(cache=True, nogil=True, forceinline=True)
def _next(bits: np.uint64, n: int) -> np.uint64:
    """Bit k is what bit k + n was."""
    return bits >> np.uint64(n)


@njit(cache=True, nogil=True)
def _settled(
    folded: np.ndarray,
    base: int,
    words: np.uint64,
    signs: np.uint64,
    asked: np.uint64,
    bounds: np.uint64,
) -> tuple[np.uint64, np.uint64]:
    """What `_with_signs` gives, bytes looked at one by one; `bounds` may be those of intervals."""
    while asked != 0:
        bit = asked & (~asked + _ONE)
        kind = role_apart(folded, base + trailing_zeros(asked))
        asked ^= bit
        if kind == SMALL:
            words |= bit
        elif kind == ALWAYS:
            signs |= bit
    while bounds != 0:
        bit = bounds & (~bounds + _ONE)
        if bounds_interval(folded, base + trailing_zeros(bounds)):
            signs |= bit
        bounds ^= bit
    return words, signs
