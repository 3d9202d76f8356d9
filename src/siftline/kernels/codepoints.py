"""What each Unicode code point is to a word: a table of classes and a table of simple folds.

Python knows all of Unicode but works on objects; compiled code knows none. So `unicodedata` is read
once into two arrays that a kernel looks code points up in. Classes:

* letters, numbers and private use make words;
* a character of a script written without spaces (Han, kana, Thai, Lao, Khmer, Burmese, ...) and a
  symbol such as an emoji is a word by itself, together with the marks that follow it;
* combining marks belong to the character before them;
* format characters (joiners, variation selectors, soft hyphen) are not there at all, except the
  zero-width space, which parts words;
* all else parts words: punctuation, mathematical signs, currency, spaces.

The fold of a code point is its NFKC form without case, as long as that is a single code point: it
takes full-width letters to ASCII and half-width kana to full, but leaves ligatures alone. Texts are
not composed first, so the two spellings of "é" differ.
"""

from bisect import bisect_right
from unicodedata import category, decomposition, normalize

import numpy as np

from siftline.kernels.machine import kept

PARTS, WORD, SOLO, MARK, NOTHING, SPACE = range(6)
LIMIT = 0x110000

_DENSE = 0x34000  # above are unassigned planes, tags, variation selectors and private use
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x3005, 0x3007),  # ideographic iteration mark, closing mark and zero
    (0x3040, 0x30FF),  # kana
    (0x3105, 0x312F),  # Bopomofo
    (0x31A0, 0x31BF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xA9E0, 0xA9FF),  # Burmese
    (0xAA60, 0xAADF),  # Burmese, Tai Viet
    (0xF900, 0xFAFF),  # Han
    (0x17000, 0x18DFF),  # Tangut, Khitan
    (0x1AFF0, 0x1B16F),  # kana
    (0x20000, 0x33FFF),  # Han
)
_ZERO_WIDTH_SPACE = 0x200B
_SKIN_TONES = (0x1F3FB, 0x1F3FF)


@kept
def tables() -> tuple[np.ndarray, np.ndarray]:
    """Classes, uint8, and folds, uint32, of every code point; shape (LIMIT,) each."""
    classes = np.full(LIMIT, PARTS, np.uint8)
    folds = np.arange(LIMIT, dtype=np.uint32)
    chars = [chr(point) for point in range(_DENSE)]
    for point, (char, kind) in enumerate(zip(chars, map(category, chars), strict=True)):
        if kind == "Cn" or kind == "Cs":
            continue
        classes[point] = _class(point, char, kind)
        # Few have a fold; the tests are cheaper than looking for it.
        if char.lower() != char or char.casefold() != char or decomposition(char):
            folds[point] = _fold(char)
    classes[0xE0000:0xE1000] = NOTHING
    classes[0xF0000:] = WORD  # private use
    return classes, folds


def class_reference(char: str) -> int:
    """The class of one character."""
    point = ord(char)
    if point < _DENSE:
        return _class(point, char, category(char))
    return NOTHING if 0xE0000 <= point < 0xE1000 else WORD if point >= 0xF0000 else PARTS


def fold_reference(char: str) -> str:
    """The fold of one character."""
    return chr(_fold(char)) if ord(char) < _DENSE else char


def _fold(char: str) -> int:
    for folded in (
        normalize("NFKC", char).casefold(),
        char.casefold(),
        char.lower(),
    ):
        # A space, or what a kernel takes for the end of a word, is no fold of anything else.
        if len(folded) == 1 and folded not in "\0 ":
            return ord(folded)
    return ord(char)


def _class(point: int, char: str, kind: str) -> int:
    if kind in ("Lo", "Nd", "No", "Nl", "Lm", "Co") and point >= _UNSPACED[0][0]:
        # An unspaced script's entry is the last that does not start above the character.
        at = bisect_right(_UNSPACED, (point, LIMIT)) - 1
        return SOLO if point <= _UNSPACED[at][1] else WORD
    if kind[0] in "LN" or kind == "Co":
        return WORD
    if kind[0] == "M":
        return NOTHING if 0xFE00 <= point <= 0xFE0F else MARK
    if kind == "So" or _SKIN_TONES[0] <= point <= _SKIN_TONES[1]:
        return SOLO
    if kind == "Cf":
        return PARTS if point == _ZERO_WIDTH_SPACE else NOTHING
    return SPACE if char.isspace() else PARTS
