r"""Plain numbers as people write them, and a key under which equal answers are equal.

`answer_key` is exact: numbers become reduced fractions, so 1,000 = 1000 = 1000.0 and 0.5 = 1/2,
while -5 and 5, 1/2 and 12 stay apart. Nothing is evaluated and nothing is rounded.

Measures that are turned into each other: 5 km is 5000 m, 18 km/h is 5 m/s, 5 kg is no length.
"""

import re
from collections import Counter
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


_TABLE = {
    "length": "mm=1 cm=10 dm=100 m=1000 km=1000000 millimeter=1 centimeter=10 meter=1000"
    " kilometer=1000000 millimetre=1 centimetre=10 metre=1000 kilometre=1000000",
    "imperial length": "in=1 inch=1 ft=12 foot=12 feet=12 yd=36 yard=36 mile=63360 mi=63360",
    "weight": "mg=1 g=1000 kg=1000000 milligram=1 gram=1000 kilogram=1000000",
    "imperial weight": "oz=1 ounce=1 lb=16 pound=16",
    "volume": "ml=1 l=1000 milliliter=1 liter=1000 millilitre=1 litre=1000",
    "imperial volume": "cup=1 pint=2 quart=4 gallon=16",
    "time": "ms=1/1000 second=1 sec=1 s=1 minute=60 min=60 hour=3600 hr=3600 h=3600 day=86400"
    " week=604800",
    "money": "cent=1 dollar=100",
    "euros": "euro=1",
    "yen": "yen=1",
    "rupees": "rupee=1",
    "celsius": "°c=1 celsius=1",
    "fahrenheit": "°f=1 fahrenheit=1",
    "frequency": "hz=1 khz=1000 mhz=1000000 ghz=1000000000",
    # Of these nobody can tell whether a thousand is 1000 or 1024.
    "bytes": "byte=1",
    "kilobytes": "kb=1 kilobyte=1",
    "megabytes": "mb=1 megabyte=1",
    "gigabytes": "gb=1 gigabyte=1",
    "terabytes": "tb=1 terabyte=1",
}
MEASURES = {
    name: (kind, Fraction(factor))
    for kind, line in _TABLE.items()
    for name, factor in (entry.split("=") for entry in line.split())
}
_OF_OTHERS = {"mph": "mile/hour", "kph": "km/hour", "kmh": "km/hour", "kmph": "km/hour"}
_PLURAL = {"inches": "inch", "feet": "foot"}
_SIGNS = {"$": "dollar", "\u20ac": "euro", "\u00a5": "yen", "\u20b9": "rupee", "\u00a3": "pound"}
_SIGN = re.compile(r"\s*-?\s*(?:US)?(?:\\)?([$\u20ac\u00a5\u20b9\u00a3])")
_NAMES = sorted({*MEASURES, *_OF_OTHERS, *_PLURAL}, key=len, reverse=True)
_WORD = rf"(?:{'|'.join(map(re.escape, _NAMES))})s?(?![A-Za-z])"
_POWER = r"\s*(?:\^\s*\{?\s*-?\d\s*\}?|[\u00b2\u00b3])"
_UNIT_PART = rf"(?:(?:square|sq\.?|cubic)\s+)?{_WORD}(?:{_POWER})?"
_TAIL = re.compile(
    rf"(?P<before>.*?)(?<![A-Za-z\\])(?P<unit>{_UNIT_PART}(?:\s*(?:/|\bper\b|\\cdot|\u00b7|\*)\s*{_UNIT_PART})*)"
    r"\s*\.?\s*",
    re.IGNORECASE | re.DOTALL,
)
_ONE = re.compile(
    rf"(?P<over>/|\bper\b)?\s*(?:\\cdot|\u00b7|\*)?\s*(?P<word>square|sq\.?|cubic)?\s*"
    rf"(?P<name>{_WORD})(?P<power>{_POWER})?",
    re.IGNORECASE,
)
_DRESS = re.compile(r"\\(?:text(?:rm|bf|it)?|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_DEGREES = re.compile(r"(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|°|\bdegrees?\b)\s*(?=[CF]\b)")
_GAPS = re.compile(r"\\[,;:! ]|~")


@dataclass(frozen=True)
class Measured:
    """An answer with a measure.

    Attributes:
        kind: What is measured: base kinds with their powers, (("length", 1), ("time", -1)).
        factor: Of the measure, in the least units of those kinds.
        size: The number in those units; None where a formula stands before the measure.
    """

    kind: tuple[tuple[str, int], ...]
    factor: Fraction
    size: Fraction | None


def measured(text: str) -> Measured | None:
    """Reads an answer with a measure behind it, or money; None of anything else.

    A letter behind a number with no space between is a variable, and no measure: 5m.
    """
    bare = _DEGREES.sub(" °", _GAPS.sub(" ", _DRESS.sub(r" \1 ", text)))
    found = leading_quantity(bare)
    sign = _SIGN.match(text)
    if sign and found and not found[1].strip(" ."):
        return _of(_SIGNS[sign[1]], found[0].value)
    tail = _TAIL.fullmatch(bare)
    if tail is None or not re.search(r"\d", tail["before"]):
        return None
    letter = tail["unit"] if len(tail["unit"]) == 1 else ""
    if letter and (letter not in "Lmgslh" or not tail["before"].endswith((" ", "}"))):
        return None
    if found and found[1].strip(" .") != tail["unit"].strip(" ."):
        found = None
    return _of(tail["unit"], found[0].value if found else None)


def _of(unit: str, number: Fraction | None) -> Measured:
    kinds: Counter[str] = Counter()
    factor = Fraction(1)
    for part in _ONE.finditer(unit):
        if part["name"].lower() in _OF_OTHERS:
            inner = _of(_OF_OTHERS[part["name"].lower()], None)
            kinds.update(dict(inner.kind))
            factor *= inner.factor
            continue
        kind, size = _base(part["name"])
        power = _exponent(part["word"], part["power"]) * (-1 if part["over"] else 1)
        kinds[kind] += power
        factor *= size**power
    kind_of = tuple(sorted((kind, power) for kind, power in kinds.items() if power))
    return Measured(kind_of, factor, None if number is None else number * factor)


def _base(name: str) -> tuple[str, Fraction]:
    low = _PLURAL.get(name.lower(), name.lower())
    if low in MEASURES:
        return MEASURES[low]
    return MEASURES[low.removesuffix("s")]


def _exponent(word: str | None, power: str | None) -> int:
    if power:
        sign = {"\u00b2": 2, "\u00b3": 3}.get(power.strip())
        return sign or int(re.sub(r"[^-\d]", "", power))
    return 1 if word is None else 3 if word.lower() == "cubic" else 2
