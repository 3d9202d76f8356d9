"""Numbers with words behind them: which of the words leave them as they are.

`18 apples left over` and `18, since 3*6=18` are 18. `18 out of 20` and `5 dozen` may not be.
"""

import re
from typing import Literal

from siftline.scoring.answers.expressions import Reader, tokens
from siftline.scoring.answers.quantities import (
    NOT_UNITS,
    SCALES,
    Quantity,
    leading_quantity,
    parse_quantity,
)

_WHY = re.compile(r"[\s,;:-]*(?:since|because)\b")
_THEREFORE = re.compile(r"[\s,;:-]*(?:and so|so|and thus|thus|which|therefore|hence|and hence)\b")
_UNIT = re.compile(r"\s+(?:[a-z]{2,}|(?-i:[mgLlsh](?:\^?\{?[23]\}?)?(?![\w^])))", re.IGNORECASE)
"""A unit behind a number: a word, or metres, grams, litres, seconds, hours with their powers."""
_FACTORS = set(SCALES) | {"dozen", "dozens", "pair", "pairs", "hundred", "half"}
_AGAIN = {"or", "but", "not", "no", "wait", "actually", "instead", "wrong", "incorrect", "either"}
"""Words that may take back what stands before them."""
_OPEN = _AGAIN | {"out", "than", "less", "fewer", "more", "except", "without"}
_PLAIN = {"over", "to", "of", "by", "from", "is", "are", "am", "pm", "noon"}
"""Words that change no number from behind its unit, as they would from before it."""


def equal_quantities(left: Quantity, right: Quantity) -> bool:
    """Whether two numbers are equal; of a percentage and a plain one, either reading counts."""
    if left.value == right.value:
        return True
    if left.percent == right.percent:
        return False
    percent, plain = (left, right) if left.percent else (right, left)
    return percent.value / 100 == plain.value


def begins(given: str, wanted: str) -> Literal["equal", "unequal", "open"] | None:
    """Whether one side is a number and the other begins with it, words following; None elsewhere.

    "open" where what stands behind the number may change it, join it to another, or can't be read.
    """
    left, right = parse_quantity(given), parse_quantity(wanted)
    if (left is None) == (right is None):
        return None
    number = right if left is None else left
    found = leading_quantity(given if left is None else wanted)
    if number is None or found is None:
        return None
    begun, rest = found
    words = re.findall(r"[a-z]{2,}", rest.lower())
    if re.match(r"[\s-]*[a-z]", rest, re.IGNORECASE) and words[:1] and words[0] in _FACTORS:
        return "open"  # 5 dozen may be 60, and may not
    bracket = re.match(r"\s+[(\[]", rest) is not None
    worded = re.match(r"[\s,;:-]*[A-Za-z]{2}", rest) or _UNIT.match(rest)
    if not (bracket or worded):
        return None
    if not equal_quantities(begun, number):
        return _unequal(rest, words) if worded else None
    if bracket:
        return "equal" if _computes(rest, begun) else "open"
    if _WHY.match(rest):
        return "open" if _AGAIN & set(words) else "equal"
    if re.search(r"\d", re.sub(r"^(\s+[mgLlsh]\^?\{?)[23]", r"\1", rest)) or _OPEN & set(words):
        return "open"
    if _THEREFORE.match(rest):
        return "equal"
    first, others = set(words[:1]), set(words[1:])
    changed = first & NOT_UNITS | others & (NOT_UNITS - _PLAIN)
    return "equal" if _UNIT.match(rest) and not changed else "open"


def _unequal(rest: str, words: list[str]) -> Literal["unequal", "open"]:
    """Whether what stands behind another number leaves it another one: 18 apples and 19."""
    if _WHY.match(rest):
        return "open" if _AGAIN & set(words) else "unequal"
    joined = set(words) & _OPEN or set(words[:1]) & NOT_UNITS or re.search(r"\d", rest)
    return "open" if joined else "unequal"


def _computes(rest: str, number: Quantity) -> bool:
    """Whether a bracket behind a number computes it: 18 (3*6)."""
    reader = Reader(tokens(rest.strip()[1:-1]))
    value = reader.sum()
    if value is None or reader.peek() != "end" or rest.rstrip()[-1] not in ")]":
        return False
    return bool(reader.operators) and number.value in value
