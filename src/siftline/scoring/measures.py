"""Measures that are turned into each other: 5 km is 5000 m, and 5 kg is no length.

Only where both sides of a comparison name one. A unit on one side alone is dropped elsewhere.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from siftline.scoring.quantities import leading_quantity

_TABLE = {
    "length": "mm=1 cm=10 m=1000 km=1000000 millimeter=1 centimeter=10 meter=1000 kilometer=1000000"
    " millimetre=1 centimetre=10 metre=1000 kilometre=1000000",
    "imperial length": "in=1 inch=1 ft=12 foot=12 feet=12 yd=36 yard=36 mile=63360 mi=63360",
    "weight": "mg=1 g=1000 kg=1000000 milligram=1 gram=1000 kilogram=1000000",
    "imperial weight": "oz=1 ounce=1 lb=16 pound=16",
    "volume": "ml=1 l=1000 milliliter=1 liter=1000 litre=1000",
    "time": "second=1 sec=1 minute=60 min=60 hour=3600 hr=3600 day=86400 week=604800",
    "money": "cent=1 dollar=100",
}
MEASURES = {
    name: (kind, int(factor))
    for kind, line in _TABLE.items()
    for name, factor in (entry.split("=") for entry in line.split())
}


@dataclass(frozen=True)
class Measured:
    """A number with a measure: what is measured, and its size in the least unit of that kind."""

    kind: str
    factor: int
    size: Fraction


def measured(text: str) -> Measured | None:
    """Reads a number with a measure behind it, or dollars; None of anything else."""
    found = leading_quantity(text)
    if found is None:
        return None
    number, rest = found
    word = rest.strip().rstrip(".")
    if not word and re.match(r"\s*-?\s*(?:\\?\$|US\$)", text):
        word = "dollar"
    name = word.lower() if len(word) > 1 else {"L": "l"}.get(word, word)
    single = {"inches": "inch"}.get(name, name.removesuffix("s") if len(name) > 2 else name)
    known = MEASURES.get(name) or MEASURES.get(single)
    return None if known is None else Measured(*known, number.value * known[1])
