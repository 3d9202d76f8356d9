r"""Measures that are turned into each other: 5 km is 5000 m, 18 km/h is 5 m/s, 5 kg is no length.

Only where both sides of a comparison name one. A unit on one side alone is dropped elsewhere.
"""

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from siftline.scoring.quantities import leading_quantity

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
_PART = rf"(?:(?:square|sq\.?|cubic)\s+)?{_WORD}(?:{_POWER})?"
_TAIL = re.compile(
    rf"(?P<before>.*?)(?<![A-Za-z\\])(?P<unit>{_PART}(?:\s*(?:/|\bper\b|\\cdot|\u00b7|\*)\s*{_PART})*)"
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
