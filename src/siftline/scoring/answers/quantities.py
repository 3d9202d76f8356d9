r"""Plain numbers as people write them, and a key under which equal answers are equal.

`answer_key` is exact: numbers become reduced fractions, so 1,000 = 1000 = 1000.0 and 0.5 = 1/2,
while -5 and 5, 1/2 and 12 stay apart. Nothing is evaluated and nothing is rounded.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from siftline.kernels.text.normalization import normalized

LONGEST_NUMBER = 200
"""Digits and signs beyond which a text is compared as text: an answer is never that long."""

LONGEST_TIDIED = 4000
"""Characters beyond which a text is not looked at for marks of LaTeX: only its spaces are."""

_GROUPED = r"(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d\d)+,\d{3})(?!\d)"
NUMBER = rf"(?:{_GROUPED}(?:\.\d+)?|\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{{1,2}}(?!\d))?"
_QUANTITY = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:(?:US|A|C)?[$€£¥₹]|USD|EUR|GBP|Rs\.?)?\s*(?P<inner>[-+]?)\s*"
    rf"(?:(?P<whole>\d+)\s+(?P<part>\d+)\s*/\s*(?P<of>\d+)"
    rf"|(?P<top>{NUMBER})(?:\s*/\s*(?P<bottom>{NUMBER}))?)"
    rf"(?P<rest>[^\d].*)?"
)
_UNIT_WORD = r"(?:[A-Za-z]{2,}|(?<=/)[hs]|(?<= )a(?= ))"
_UNIT_WORDS = re.compile(
    rf"(?:[A-Za-z]{{2,}}|m(?=/))[.]?(?:\^?[23²³])?(?:[\s/-]+{_UNIT_WORD}(?:\^?[23²³])?){{0,7}}"
)
_ATTACHED = frozenset(["mm", "cm", "km", "kg", "mg", "ml", "lb", "lbs", "oz", "ft", "mph", "cents"])
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# Words after a number that change its value or join it to something else.
NOT_UNITS = frozenset(
    re.split(
        r"\s+",
        """pi sqrt or and mod log ln exp sin cos tan times plus minus over to of by from per cent
        dozen dozens pair pairs hundred half halves third thirds quarter quarters squared cubed
        am pm noon infinity choose is are equals remainder not if
        one two three four five six seven eight nine ten eleven twelve twenty""",
    )
)
JOINING = frozenset(["per", "of", "are", "by", "from"])
"""Fine inside a unit (miles per hour, apples are left), not at its start."""
_PART = r"(?:\{\s*(-?[\d.,]+)\s*\}|(\d))"
_LATEX = (
    (re.compile(rf"\\[dtc]?frac\s*{_PART}\s*{_PART}"), r" \1\2/\3\4 "),
    (re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox)\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\\boxed\s*\{(.*)\}"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\left(?![a-z])|\\right(?![a-z])|(?<!\\)\\!\s*"), ""),
    (re.compile(r"(?<=\d)(?:(?<!\\)\\[,;: ]|~)\s*(?=\d{3}(?!\d))"), ""),
    (re.compile(r"(?<!\\)\\[,;: ]|~"), " "),
    (re.compile(r"\^\s*\{?\\circ\}?|\\degree\b"), " degrees"),
    (re.compile(r"\\([$%&#_])"), r"\1"),
)
"""LaTeX around plain numbers and words. A fraction is rewritten only where both parts are numbers,
so nothing that belongs together comes apart."""
_RAISED = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u207e]+")
_VULGAR = re.compile(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e])")
_SPACED = re.compile(r"(?<![\d.,/])\d{1,3}(?: \d{3})+(?![\d/])")
_REMARK = re.compile(
    r"(?<=[\w%]) \((?=[^()]*[A-Za-z]{4})"
    r"(?![^()]*\b(?:or|not|but|if|maybe|either|unless)\b)[^()]*\)$"
)
"""Words in brackets behind an answer: 18 (since 3 * 6 = 18); not 3 (mod 5), 2 (x + 1), 2 (or 3)."""
_MINUSES = str.maketrans(
    {"\u2044": "/", "\u2212": "-", "\u2013": "-", "\u2010": "-", "\u2011": "-"}
)


@dataclass(frozen=True)
class Quantity:
    """An exact number as it was written.

    Attributes:
        value: The number; of `50%` it is 50.
        percent: Whether a percent sign or the word followed it.
    """

    value: Fraction
    percent: bool = False


def tidy(text: str) -> str:
    """Strips LaTeX shells, math and bold marks, and the full stop at the end of an answer.

    For reading plain numbers and words. An exclamation mark goes only behind a word: 5! is 120.
    """
    if len(text) > LONGEST_TIDIED:
        return " ".join(text.split())
    text = _RAISED.sub(r"^\g<0>", text)  # or 5² would become 52
    text = _VULGAR.sub(" ", text)  # or 2½ would become 21/2
    text = normalized("NFKC", text).translate(_MINUSES)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = " ".join(text.split()).strip("* ")
    if len(text) > 1 and text.startswith("$") and text.endswith("$"):
        text = text[1:-1].strip()
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening) and text.endswith(closing):
            text = text[2:-2].strip()
    text = re.sub(r"^[A-Za-z]\s*=\s*(?=\S)", "", text)
    text = text.rstrip(" .,;:")
    return text.rstrip("! ") if re.search(r"[A-Za-z]{2}!+$", text) else text


def parse_quantity(text: str) -> Quantity | None:
    r"""Reads one exact number with its currency sign, unit or percent; None if it is not just that.

    Accepts integers, decimals, thousands in groups of three, simple and mixed fractions, and
    exponents of at most two digits. Words after the number are a unit unless they change its value
    ("5 or 6", "2 pi", "5 pm"); thousand to trillion multiply.

    Args:
        text: An extracted answer, e.g. `-$1,000.50`, `3 1/2 cups`, `\frac{1}{2}`, `50%`.
    """
    if len(text) > LONGEST_TIDIED or re.search(r"\.\.|\u2026|dots\b", text):
        return None  # 0.333... is no 0.333
    text = tidy(text)
    if len(text) > 2 * LONGEST_NUMBER:
        return None
    text = _REMARK.sub("", text)
    text = _SPACED.sub(lambda number: number[0].replace(" ", ""), text)
    if len(text) > LONGEST_NUMBER:
        return None
    match = _QUANTITY.fullmatch(text)
    if match is None or (match["sign"] and match["inner"]):
        return None
    scale = _unit(match["rest"] or "")
    if scale is None:
        return None
    value = _fraction(match)
    if value is None:
        return None
    negative = "-" in (match["sign"], match["inner"])
    is_percent = (match["rest"] or "").strip().lower() in ("%", "percent", "per cent")
    return Quantity((-value if negative else value) * scale, is_percent)


def leading_quantity(text: str) -> tuple[Quantity, str] | None:
    """The number that an answer begins with, and what stands behind it, neither judged nor read.

    Args:
        text: An extracted answer, e.g. `18, since 3 * 6 = 18`.

    Returns:
        None where it does not begin with a number, or is too long.
    """
    text = "" if re.search(r"\.\.|\u2026|dots\b", text) else tidy(text)
    match = _QUANTITY.fullmatch(text) if len(text) <= LONGEST_NUMBER else None
    value = _fraction(match) if match and not (match["sign"] and match["inner"]) else None
    if match is None or value is None:
        return None
    return Quantity(-value if "-" in (match["sign"], match["inner"]) else value), match[
        "rest"
    ] or ""


def _fraction(match: re.Match[str]) -> Fraction | None:
    if match["whole"]:
        top, bottom = Fraction(match["part"]), Fraction(match["of"])
        return Fraction(match["whole"]) + top / bottom if bottom else None
    value = Fraction(match["top"].replace(",", "").rstrip("."))
    if match["bottom"] is None:
        return value
    bottom = Fraction(match["bottom"].replace(",", "").rstrip("."))
    return value / bottom if bottom else None


def _unit(rest: str) -> int | None:
    """The factor of what follows a number: 1 for a unit, 10**6 for million; None if not a unit."""
    words = rest.strip().lower()
    if words in ("", "%", "percent", "per cent", "$", "€", "£", "¥", "₹", "°", "-"):
        return 1 if words != "-" else None
    spaced = rest[0].isspace()
    first, _, others = words.partition(" ")
    if first in SCALES and (spaced and (not others or _unit(" " + others) == 1)):
        return SCALES[first]
    if not _UNIT_WORDS.fullmatch(words):
        return None
    parts = re.split(r"[\s/-]+", words)
    if not spaced and not rest.startswith("-") and parts[0] not in _ATTACHED:
        return None
    # At the start only "of" with words behind it: 18 of them, and not the fraction 3 of four.
    joined = {
        part
        for i, part in enumerate(parts)
        if not (part in JOINING and (i or (part == "of" and len(parts) > 1)))
    }
    return None if joined & (NOT_UNITS | set(SCALES)) else 1


def answer_key(text: str) -> str:
    """Returns the canonical key of an answer: equal keys are equal answers.

    Numbers become reduced fractions ("1,000.0" and "$1000" are "1000", "0.5" is "1/2"); units,
    currency and percent signs are dropped. Everything else is compared as text, without case,
    white space or LaTeX shells.

    Args:
        text: An extracted answer or a reference answer.
    """
    quantity = parse_quantity(text)
    return str(quantity.value) if quantity is not None else tidy(text).casefold()
