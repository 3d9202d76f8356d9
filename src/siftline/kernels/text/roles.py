"""What one byte of a folded text is, a part of a word or a sign: the rules of `tokens`, by bytes.

`signs` finds the same for 64 bytes at a time, and asks here where it can't tell.
"""

import numpy as np
from numba import njit

REACH = 15
"""Spaces, and brackets, that are looked over for the neighbours of a sign."""
SPAN = 32
"""Characters between the brackets of an interval."""
QUOTED = 64
"""Characters that are looked over for the opening quote before a prime."""

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


@njit(cache=True, nogil=True)
def role(folded: np.ndarray, k: int) -> int:
    """Whether the byte at k is part of a word (SMALL), a sign (ALWAYS), or neither (_NONE)."""
    if _is_bracket(folded[k]) and bounds_interval(folded, k):
        return ALWAYS
    return role_apart(folded, k)


@njit(cache=True, nogil=True)
def role_apart(folded: np.ndarray, k: int) -> int:
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
def bounds_interval(folded: np.ndarray, k: int) -> bool:
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
def _interval(folded: np.ndarray, k: int) -> bool:  # noqa: C901, one pass over its bytes
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
