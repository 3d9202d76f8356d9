"""How many words, sentences, bullets a text has: the fewest and the most that readers count.

Nobody agrees what a word is (`don't`, `well-known`, `3.14`) or where a sentence ends (`Dr. No`, a
heading). So a count is a range, and a demand is met, or missed, only if it is so all over it.
"""

import re
import unicodedata
from dataclasses import dataclass

from siftline.kernels.text.normalization import normalized

_IDEOGRAPHS = (
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
)
"""Scripts that write no space between words."""
_RUN = re.compile(r"\w+")
_SPACELESS = re.compile(rf"[{_IDEOGRAPHS}]")
_JOINED = re.compile(r"\w+(?:['\u2019\-\u2010\u2011.,/@:&]\w+)*")
_NUMBERING = re.compile(r"^[ \t]*\d{1,4}[.)](?=\s)", re.M)
_END = re.compile(
    r"(?P<mark>(?<![.!?\u2026])[.!?\u2026]+|[\u3002\uff01\uff1f\u0964\u061f])"
    r"[\"'\u201d\u2019\u300d\u300f)\]*_]*(?=\s|$|(?<=[\u3002\uff01\uff1f\u300d\u300f]))"
)
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'])(?:mr|mrs|ms|dr|prof|st|vs|etc|no|fig|vol|pp?|inc|ltd|co|corp|jr|sr|dept|approx|est"
    r"|gen|col|lt|sgt|rev|hon|mt|ave|blvd|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|cf|al|ca|op"
    r"|e\.g|i\.e|a\.m|p\.m|ph\.d|u\.s|u\.k|(?-i:[A-Z])|(?:[a-z]\.)+[a-z])$",
    re.IGNORECASE,
)
_BULLET = re.compile(r"^[ \t]*[*-][ \t]+\S", re.M)
_BULLET_LIKE = re.compile(r"^[ \t]*(?:[*+\u2022\u2023\u25e6-](?![*-])[ \t]*[^\s*-])", re.M)


@dataclass(frozen=True)
class Range:
    """A count that readers may differ on.

    Attributes:
        least: The fewest.
        most: The most.
    """

    least: int
    most: int

    def __str__(self) -> str:
        """The number, or both."""
        return f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"


def without_marks(text: str) -> str:
    """The text without combining marks, which end a word to Python's regular expressions."""
    if text.isascii():
        return text
    return "".join(c for c in normalized("NFC", text) if unicodedata.category(c)[0] != "M")


def words(text: str) -> Range:
    """Words: at least what hyphens and apostrophes leave whole, at most every run of letters.

    Of a script without spaces each character may be one. The numbers of a list may not count.
    """
    text = without_marks(text)
    fewest = len(_JOINED.findall(_NUMBERING.sub("", text)))
    runs = len(_RUN.findall(text))
    return Range(min(fewest, runs), max(runs, runs + len(_SPACELESS.findall(text)) - 1))


def capital_words(text: str) -> Range:
    """Words in capital letters; those of one letter (`I`, `A`) may not count."""
    text = without_marks(text)
    joined = [word for word in _JOINED.findall(text) if word.isupper()]
    runs = [word for word in _RUN.findall(text) if word.isupper()]
    longer = [sum(sum(map(str.isalpha, w)) > 1 for w in words) for words in (joined, runs)]
    return Range(min(longer), max(len(joined), len(runs)))


def sentences(text: str) -> Range:
    """Sentences: a full stop behind an abbreviation or before a small letter may be no end.

    Lines without an end of their own (headings, items) may be sentences.
    """
    small = not any(map(str.isupper, text))
    sure, place = 0, 0
    for end in _END.finditer(text):
        begun = _begun(text, place, end.start())
        if begun and _sure(text, place, end, small):
            sure += 1
        if not begun or _sure(text, place, end, small):
            place = end.end()
    least = sure + bool(_RUN.search(text, place))
    most = sum(map(_pieces, text.split("\n")))
    return Range(min(least, most), max(least, most))


def _begun(text: str, place: int, end: int) -> bool:
    """Whether a piece of text has a word that is no number of a list."""
    first = _RUN.search(text, place, end)
    return first is not None and not (
        first.end() == end and first[0].isdecimal() and end - place < 9
    )


def _sure(text: str, place: int, end: re.Match[str], small: bool) -> bool:
    """Whether a sentence that begins at `place` ends here for sure."""
    mark = end["mark"]
    behind = text[end.end() : end.end() + 40].lstrip(" \t\n*_#>-\"'\u201c\u2018(")
    if (behind[:1].islower() and not small) or (mark[0] in ".\u2026" and len(mark) > 1 and behind):
        return False
    before = text[max(place, end.start() - 20) : end.start()]
    return not (mark == "." and behind and _ABBREVIATION.search(before))


def _pieces(line: str) -> int:
    found, place = 0, 0
    for end in _END.finditer(line):
        found += _begun(line, place, end.start())
        place = end.end()
    return found + _begun(line, place, len(line))


def bullets(text: str) -> Range:
    """Items of bullet lists: at least `* x` and `- x`, at most every line that looks like one."""
    least = len(_BULLET.findall(text))
    return Range(least, max(least, len(_BULLET_LIKE.findall(text))))
