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

REACH = 15
"""Spaces, and brackets, that are looked over for the neighbours of a sign."""
SPAN = 32
"""Characters between the brackets of an interval."""
QUOTED = 64
"""Characters that are looked over for the opening quote before a prime."""
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

_NONE, SMALL, _DIGIT, _INNER, _MAYBE, ALWAYS, _OPERATOR, _OPEN, _CLOSE, _FAR = range(10)


def _kinds() -> np.ndarray:
    """What each byte of a folded text is, uint8, shape (256,)."""
    kinds = np.full(256, _NONE, np.uint8)
    for chars, kind in (
        ("abcdefghijklmnopqrstuvwxyz", SMALL),
        ("0123456789", _DIGIT),
        (".,':;_", _INNER),
        ("-!", _MAYBE),
        ("#$@\\", ALWAYS),
        ("+*/<=>^|~&%", _OPERATOR),
        ("([{", _OPEN),
        (")]}", _CLOSE),
    ):
        kinds[[ord(c) for c in chars]] = kind
    kinds[0x80:] = _FAR
    return kinds


_KINDS = _kinds()


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
    """Opening brackets that are signs, and those that can't be told; see `_opens`."""
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
    """Closing brackets that are signs, and those that can't be told; see `_closes`."""
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
    """Hyphens that are signs, and those that can't be told; see `_minus`.

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
        kind = _role(folded, base + trailing_zeros(asked))
        asked ^= bit
        if kind == SMALL:
            words |= bit
        elif kind == ALWAYS:
            signs |= bit
    while bounds != 0:
        bit = bounds & (~bounds + _ONE)
        if _bounds(folded, base + trailing_zeros(bounds)):
            signs |= bit
        bounds ^= bit
    return words, signs


@njit(cache=True, nogil=True)
def role(folded: np.ndarray, k: int) -> int:
    """Whether the byte at k is part of a word (SMALL), a sign (ALWAYS), or neither (_NONE)."""
    if _is_bracket(folded[k]) and _bounds(folded, k):
        return ALWAYS
    return _role(folded, k)


@njit(cache=True, nogil=True)
def _role(folded: np.ndarray, k: int) -> int:
    """The same, intervals aside."""
    kind = _KINDS[folded[k]]
    if kind in (SMALL, _DIGIT, _FAR):
        return SMALL
    if kind in (_OPERATOR, ALWAYS):
        return ALWAYS
    if kind == _INNER:
        return _inner(folded, k)
    if kind == _MAYBE:
        counts = _minus(folded, k) if folded[k] == 45 else _bang(folded, k)
        return ALWAYS if counts else _NONE
    if kind == _OPEN:
        return ALWAYS if _opens(folded, k) else _NONE
    if kind == _CLOSE:
        return ALWAYS if _closes(folded, k) else _NONE
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
        return SMALL if _is_word(folded[a]) and _is_word(folded[b]) else _NONE
    left, right = _KINDS[folded[k - 1]], _KINDS[folded[k + 1]]
    if left == _DIGIT and right == _DIGIT:
        return ALWAYS if char == 58 else SMALL
    if left in (SMALL, _FAR) and right in (SMALL, _FAR):
        return SMALL if char == 46 or char == 39 else _NONE
    if char == 46 and _is_word(folded[k + 1]) and left != _DIGIT and left != SMALL:
        # Not behind a letter, another one, or a character of a script without spaces.
        behind = left == _FAR or folded[k - 1] == 46 or folded[k - 1] == 0
        return _NONE if behind else ALWAYS
    return ALWAYS if char == 39 and _prime(folded, k) else _NONE


@njit(cache=True, nogil=True)
def _prime(folded: np.ndarray, k: int) -> bool:
    """Whether the quote at k is one of derivatives, as in f'(x), y'' + y = 0."""
    a, b = k, k + 1
    while folded[a - 1] == 39 and k - a < REACH:
        a -= 1
    while folded[b] == 39 and b - k < REACH:
        b += 1
    before, lone = folded[a - 1], _lone_left(folded, a - 1)
    if not (lone or before == 41 or before == 93) or _quoted(folded, a - 1):
        return False
    if folded[b] == 40 or _KINDS[folded[b]] == _OPERATOR:
        return True
    far = _KINDS[before] == _FAR
    if far and not 0xC0 <= folded[a - 2] < 0xE0:  # Greek and the like, of two bytes
        return False
    c = _right(folded, b - 1)
    if _KINDS[folded[c]] == _OPERATOR:
        return True
    if folded[c] == 45:
        after = _right(folded, c)
        kind = _KINDS[folded[after]]
        return kind in (_DIGIT, _OPEN) or (kind == SMALL and _lone_right(folded, after))
    if far or not lone or before in (97, 105, 111):  # a i o
        return False
    spaces = folded[c] <= 32 and folded[c] != 0
    return spaces or folded[b] in (36, 41, 44, 46, 59, 63, 93, 125)  # $ ) , . ; ? ] }


@njit(cache=True, nogil=True)
def _quoted(folded: np.ndarray, k: int) -> bool:
    """Whether the last quote before k that is in no word opens what it stands before."""
    while folded[k] & 0xC0 == 0x80:
        k -= 1
    a, seen = k - 1, 0
    while a > 0 and seen < QUOTED:
        if folded[a] == 39 and not (_is_word(folded[a - 1]) and _is_word(folded[a + 1])):
            before, after = folded[a - 1], folded[a + 1]
            attached = _is_word(before) or before == 39 or _KINDS[before] == _CLOSE
            return not attached and (after > 32 or after == 0)
        seen += folded[a] & 0xC0 != 0x80
        a -= 1
    return False


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
        while _KINDS[folded[word]] == SMALL and k - word < 4:
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
    if right in (_OPERATOR, _MAYBE, _CLOSE) and _lone_left(folded, k - 1):
        return True
    if before == 33:  # the second of two
        twice = folded[k - 2] != 33 and behind != 33
        return twice and (folded[k - 2] == 41 or _factorial(folded, k - 2))
    return _factorial(folded, k - 1)


@njit(cache=True, nogil=True)
def _factorial(folded: np.ndarray, k: int) -> bool:
    """Whether what ends at k is an operand, so that "!" behind it is no exclamation mark."""
    char = folded[k]
    if _KINDS[char] == _DIGIT:
        return True
    if char == 93 or char == 125:  # ] }
        return _KINDS[folded[k - 1]] == _DIGIT or _lone_left(folded, k - 1)
    if _KINDS[char] != SMALL:
        return False
    if _KINDS[folded[k - 1]] == _DIGIT and char == 110:  # 2n!
        a = k - 1
        while _KINDS[folded[a]] == _DIGIT and k - a < REACH:
            a -= 1
        return not _is_word(folded[a])
    if _is_word(folded[k - 1]) or char in (97, 105, 111):  # a i o
        return False
    if char in (107, 109, 110, 112, 113, 114):  # k m n p q r
        return folded[k - 1] != 39
    a = _left(folded, k)
    kind = _KINDS[folded[a]]
    if folded[a] <= 32 or folded[a] == 36 or kind in (_OPERATOR, _OPEN):
        return True
    return folded[a] == 45 and _minus(folded, a)


@njit(cache=True, nogil=True)
def _bounds(folded: np.ndarray, k: int) -> bool:
    """Whether the round or square bracket at k is one of an interval with one end open."""
    char = folded[k]
    if char != 41 and _interval(folded, k):
        return True
    if char == 40:
        return False
    a, seen = k - 1, 0
    while not _is_bracket(folded[a]):
        seen += folded[a] & 0xC0 != 0x80
        if seen > SPAN or a == 0:
            return False
        a -= 1
    return folded[a] != 41 and _interval(folded, a)


@njit(cache=True, nogil=True)
def _interval(folded: np.ndarray, k: int) -> bool:
    """Whether an interval starts at k: two operands between brackets that are no pair.

    Reversed brackets are outer ends, "]0, 1[", where nothing that is indexed stands beside them.
    """
    first, b, seen = folded[k], k + 1, 0
    if first == 93 and (folded[k - 1] > 32 and folded[k - 1] not in (36, 58, 61)):  # $ : =
        return False
    if first == 93 and 0 < folded[b] <= 32:
        return False
    some, word, spaced, parted, joined, last = False, False, False, False, False, 0
    while not _is_bracket(folded[b]):
        char = folded[b]
        seen += char & 0xC0 != 0x80
        if seen > SPAN:
            return False
        if 0 < char <= 32:
            spaced = True
        else:
            letters = _is_word(char)
            if letters and word and spaced:  # two words are prose
                return False
            if char == 44 or char == 59:
                inside = _KINDS[folded[b - 1]] == _DIGIT and _KINDS[folded[b + 1]] == _DIGIT
                if not inside and (parted or not some):
                    return False
                joined |= inside
                parted |= not inside
            some, word, spaced, last = True, letters, False, char
        b += 1
    if not (parted or joined) or last == 44 or last == 59 or folded[b] == 40:
        return False
    if folded[b] == 91:
        after = folded[b + 1]
        if 0 < folded[b - 1] <= 32 or (after > 32 and not _ends_sentence(after)):
            return False
    alike = (first == 40 and folded[b] == 41) or (first == 91 and folded[b] == 93)
    return not alike


@njit(cache=True, nogil=True)
def _is_bracket(byte: int) -> bool:
    return byte == 40 or byte == 41 or byte == 91 or byte == 93


@njit(cache=True, nogil=True)
def _ends_sentence(byte: int) -> bool:
    """Whether a byte is one of !$),.:;? as may follow an interval."""
    return byte in (33, 36, 41, 44, 46, 58, 59, 63)


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
    return kind in (SMALL, _DIGIT, _FAR)


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
    return kind == SMALL and not _is_word(folded[a - 1])


@njit(cache=True, nogil=True)
def _lone_right(folded: np.ndarray, b: int) -> bool:
    """Whether a letter by itself starts at b."""
    kind = _KINDS[folded[b]]
    if kind == _FAR:
        size = 2 if folded[b] < 0xE0 else 3 if folded[b] < 0xF0 else 4
        return folded[b + size] != 0 and not _is_word(folded[b + size])
    return kind == SMALL and not _is_word(folded[b + 1])
