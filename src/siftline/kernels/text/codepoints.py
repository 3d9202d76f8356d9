"""What each Unicode code point is to a text that is compared: tables of classes and folds.

Compiled code knows nothing of Unicode, so its properties are read once into arrays: the word breaks
of UAX #29, line breaks and categories as the `regex` package has them, normal forms as Python's
`unicodedata` has them. Classes:

* WORD: letters and numbers, as UAX #29 joins them (ALetter, Hebrew_Letter, Numeric);
* SOLO: a character of a script written without spaces (Han, kana, Thai, Lao, Khmer, Burmese,
  Javanese, ...), which is a word by itself together with the marks that follow it. Vowels of Khmer
  and its like are characters too, as the spacing ones of Thai are, or a syllable would be one word;
* SIGN: currency, arrows, emoji, mathematical and other symbols, each a word by itself;
* MARK: combining marks, which belong to what is before them. Of ORDERED ones several may have to
  be sorted, JOINING ones may compose with what is before them;
* NOTHING: format characters (joiners, variation selectors, soft hyphen), which are not there;
* SPACE and PARTS: spaces and punctuation.

The fold of a character is its NFKC form without case (Unicode's NFKC_Casefold), and furthermore:
typographic dashes, quotes and operators are those of ASCII (a root sign is "/^"), digits of any
script are 0 to 9, a superscript "2" is "^2", and a fraction does not run into the digits before
it. So full-width and composed forms, ligatures and typography make no difference. What would grow
over four times in UTF-8 stays as it is; U+0345 keeps its place below the letter.
"""

from functools import cache
from hashlib import sha256
from typing import NamedTuple
from unicodedata import category, combining, decimal, decomposition, normalize

import numpy as np

from siftline.kernels.machine import kept

PARTS, WORD, SOLO, MARK, ORDERED, JOINING, NOTHING, SPACE, SIGN, EXPANDS = range(10)
LIMIT = 0x110000
GROWTH = 4
"""Bytes that one byte of a text may fold to."""
ROOM = 160
"""Bytes that a fold buffer needs beyond `GROWTH` times the length of the text."""
FRONT = 16
"""Spaces before a folded text, so that what looks back finds nothing; more follow it."""

_HANGUL = (0xAC00, 0xD7A3)
_UNCHANGED = ((0x3400, 0x9FFF), _HANGUL, (0x17000, 0x18DFF), (0x20000, 0x2F7FF))
_DENSE = 0x30000  # nothing above has a fold
_IOTA_BELOW = "\u0345"
_ALIKE = {
    "-": "\u2010\u2011\u2012\u2013\u2014\u2015\u2043\u2212\u2e3a\u2e3b\ufe58\ufe63\uff0d",
    "'": "\u00b4\u02b9\u02bb\u02bc\u02bd\u02c8\u2018\u2019\u201a\u201b\u2032\u2035\uff07\uff40",
    '"': "\u00a8\u00ab\u00bb\u05f3\u05f4\u201c\u201d\u201e\u201f\u2036\u2039\u203a\u301d\u301e",
    "*": "\u00b7\u00d7\u0387\u2217\u22c5\u2715\u2716\u2a2f",
    "/": "\u00f7\u2044\u2215\u2797",
    "+": "\u2795",
    "_": "\u203f\u2040\u2054",
    "%": "\u066a",
    ".": "\u066b",
    ",": "\u060c\u066c",
    "<=": "\u2264\u2a7d",
    ">=": "\u2265\u2a7e",
    "/^": "\u221a",
    "''": "\u2033",
    " ": "\u180e\u200b",
}
"""What is written in many ways and means one thing."""
_SPELLED = {ord(char): plain for plain, chars in _ALIKE.items() for char in chars}
_RAISED = (
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077"
    "\u2078\u2079\u207a\u207b\u207c\u207d\u207e\u207f\u2071"
)
# Line breaks of scripts written without spaces; letters of these words break are alone in UAX #29.
_UNSPACED = r"[\p{LB=SA}\p{LB=AK}\p{LB=AS}\p{LB=AP}\p{WB=Katakana}]"
_ALWAYS_SIGNS = "\u2030\u2031"


def fold_bytes(size: int) -> int:
    """Bytes of a buffer that any text of `size` bytes folds into."""
    return GROWTH * size + FRONT + ROOM


def fold_points(size: int) -> int:
    """Code points of a buffer that any folded text of `size` bytes is composed in.

    None of two bytes is taken apart into more than three, none of three into more than four.
    """
    return GROWTH * size * 3 // 2 + 8


class Tables(NamedTuple):
    """What a kernel looks code points up in.

    Attributes:
        classes: uint8, shape (LIMIT,).
        folds: uint32, shape (LIMIT,): the fold, or where in `expansions` it starts.
        expansions: uint32: the length of a fold, then its code points.
        orders: uint8, shape (LIMIT,): canonical combining class.
        pairs: uint64, ascending: first << 32 | second of what composes.
        composed: uint32: what each pair composes to.
        decomposed: uint64, ascending: code point << 32 | where in `expansions` its parts start.
    """

    classes: np.ndarray
    folds: np.ndarray
    expansions: np.ndarray
    orders: np.ndarray
    pairs: np.ndarray
    composed: np.ndarray
    decomposed: np.ndarray


@cache
def tables() -> Tables:
    """The tables; made once a machine."""
    return Tables(*_arrays())


@kept("regex")
def _arrays() -> tuple[np.ndarray, ...]:
    classes = _classes()
    folds = np.arange(LIMIT, dtype=np.uint32)
    orders = np.zeros(LIMIT, np.uint8)
    expansions: list[int] = []
    pairs: list[tuple[int, int]] = []
    decomposed: list[int] = []
    spaces = classes == SPACE
    parts = classes == PARTS
    folds[spaces], folds[parts] = ord(" "), ord('"')
    folds[:0x80] = np.arange(0x80)
    for point in _changing():
        char = chr(point)
        orders[point] = combining(char)
        canonical = normalize("NFD", char)
        if canonical != char:
            decomposed.append(point << 32 | len(expansions))
            expansions += [len(canonical), *map(ord, canonical)]
            two = _composes(char)
            if two:
                pairs.append((two, point))
    seconds = {two & 0xFFFFFFFF for two, _ in pairs}
    for point in seconds | set(range(0x1161, 0x1176)) | set(range(0x11A8, 0x11C3)):
        if classes[point] in (MARK, WORD) or category(chr(point)).startswith("M"):
            classes[point] = JOINING
    marks = (classes == MARK) & (orders > 0)
    classes[marks] = ORDERED
    for point in _changing():
        folded = _fold(chr(point)) if point >= 0x80 else chr(point).lower()
        if len(folded) == 1:
            one = ord(folded)
            # Punctuation that is not ASCII only parts words.
            if one != point and (classes[point] != PARTS or one < 0x80):
                folds[point], classes[point] = one, classes[one]
        elif classes[point] != NOTHING:
            classes[point], folds[point] = EXPANDS, len(expansions)
            expansions += [len(folded), *map(ord, folded)]
    pairs.sort()
    return (
        classes,
        folds,
        np.array(expansions, np.uint32),
        orders,
        np.array([two for two, _ in pairs], np.uint64),
        np.array([one for _, one in pairs], np.uint32),
        np.array(decomposed, np.uint64),
    )


@cache
def digest() -> str:
    """A hash of the tables: other libraries may bring another Unicode, and then other words."""
    whole = sha256()
    for table in tables():
        whole.update(np.ascontiguousarray(table).tobytes())
    return whole.hexdigest()[:16]


def fold_reference(text: str) -> str:
    """A text folded, with NUL before and after what is a word by itself."""
    classes, solo, raised = tables().classes, False, -1
    out: list[str] = []
    for char in text:
        kind = classes[ord(char)]
        folded = fold_character(char)
        if kind == NOTHING:
            continue
        if char in _RAISED and raised == len(out):
            folded = folded[1:]
        for part in folded:
            mine = classes[ord(part)]
            alone = ord(part) >= 0x80 and mine in (SOLO, SIGN)
            if mine in (MARK, ORDERED, JOINING):
                out.append(part)
                continue
            if solo or alone:
                out.append("\0")
            solo = alone
            out.append(part)
        if char in _RAISED:
            raised = len(out)
    return "".join(_apart(part) for part in normalize("NFC", "".join(out)))


def fold_character(char: str) -> str:
    """The fold of one character; empty where it is not there."""
    tabled = tables()
    point = ord(char)
    kind, fold = tabled.classes[point], int(tabled.folds[point])
    if kind == NOTHING:
        return ""
    if kind != EXPANDS:
        return chr(fold)
    size = int(tabled.expansions[fold])
    return "".join(map(chr, tabled.expansions[fold + 1 : fold + 1 + size].tolist()))


def _classes() -> np.ndarray:
    import regex

    points = np.concatenate([np.arange(0xD800), np.arange(0xE000, LIMIT)]).astype("<u4")
    every = points.tobytes().decode("utf-32-le")
    classes = np.full(LIMIT, PARTS, np.uint8)

    def be(kind: int, pattern: str) -> None:
        for found in regex.finditer(f"(?V1){pattern}+", every):
            a, b = ord(every[found.start()]), ord(every[found.end() - 1])
            classes[a : b + 1] = kind

    be(SIGN, rf"[\p{{S}}{_ALWAYS_SIGNS}]")
    be(SOLO, r"[\p{L}\p{N}]")
    be(WORD, r"[\p{WB=ALetter}\p{WB=Hebrew_Letter}\p{WB=Numeric}\p{Co}]")
    be(SOLO, rf"[{_UNSPACED}&&[\p{{L}}\p{{N}}]]")
    be(MARK, r"\p{WB=Extend}")
    be(SOLO, r"[[\p{LB=SA}&&\p{M}]--[\u0e00-\u0eff]]")
    be(NOTHING, r"[\p{WB=Format}\p{Cf}\p{Variation_Selector}\p{Default_Ignorable_Code_Point}]")
    be(NOTHING, r"\u0640")  # stretches Arabic words
    be(SPACE, r"[\p{White_Space}\u001c-\u001f\u180e\u200b]")
    classes[0xD800:0xE000] = PARTS
    classes[:0x80] = [WORD if chr(k).isalnum() else PARTS for k in range(0x80)]
    return classes


def _changing() -> list[int]:
    """Code points that may have a fold or parts; Hangul and Han have none, or by arithmetic."""
    skipped = np.zeros(_DENSE, np.bool_)
    for first, last in ((0xD800, 0xDFFF), *_UNCHANGED):
        skipped[first : last + 1] = True
    return [point for point in np.flatnonzero(~skipped).tolist() if category(chr(point)) != "Cn"]


def _fold(char: str) -> str:
    point = ord(char)
    if point in _SPELLED:
        return _SPELLED[point]
    if char in _RAISED:
        return "^" + _fold(normalize("NFKC", char))
    digit = decimal(char, None)
    if digit is not None:
        return str(digit)
    if not (char.lower() != char or char.casefold() != char or decomposition(char)):
        return char
    compat = normalize("NFKC", char)
    folded = char
    for _ in range(2):  # what is folded once may have a fold
        parts = normalize("NFKD", folded)
        folded = normalize("NFKC", "".join(c if c == _IOTA_BELOW else c.casefold() for c in parts))
    folded = "".join(_SPELLED.get(ord(c), c) for c in folded)
    apart = normalize("NFD", char)
    if compat[0].isspace() and len(compat) > 1:  # an accent by itself; a second one is a mark on it
        return '"' + apart[1:]
    if len(folded) == 1 and ord(apart[0]) in _SPELLED:  # a relation that is struck through
        folded = _SPELLED[ord(apart[0])] + apart[1:]
    if "/" in folded and category(char) == "No":
        folded = " " + folded
    # The parts of a word by itself are parted by a byte each.
    if len(folded) > 1 and len(folded.encode()) + len(folded) > GROWTH * len(char.encode()):
        return char
    return "".join(map(_apart, folded))


@cache
def _apart(char: str) -> str:
    """A character that is ASCII punctuation with a mark on it, as those two."""
    parts = normalize("NFD", char)
    return parts if parts[0].isascii() and not parts[0].isalnum() else char


def _composes(char: str) -> int:
    """The two that compose to a character, as one number; 0 where none do."""
    parts = decomposition(char).split()
    if len(parts) != 2 or normalize("NFC", char) != char or _apart(char) != char:
        return 0
    return int(parts[0], 16) << 32 | int(parts[1], 16)
