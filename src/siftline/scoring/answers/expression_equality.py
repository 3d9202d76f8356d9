"""Whether two expressions are equal: yes, no with a proof, or open.

Numbers are compared exactly or to 200 digits, so 2^-60 and 2^-61 differ. Expressions with letters
are compared at points: equal everywhere they can be evaluated is a match, different at one is a
proof that they differ.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import count, islice
from typing import Any

import sympy
from sympy.core.function import AppliedUndef

from siftline.scoring.answers.values import rational

Equal = bool | None
"""True, False (proven), or None: open."""
DIGITS, MORE_DIGITS = 60, 220
_FEW = sympy.Rational(1, 200)
_LITERAL = re.compile(r"\d*\.(\d+)")


class Decimals:
    """The decimals that a reference writes out: half a unit of their last place.

    A reference is taken as rounded only where it shows at least two places or three digits:
    0.5 is a half, 0.33 and 33.3 may be a third and a hundred thirds.
    """

    def __init__(self, latex: str = "") -> None:
        self.units: dict[Fraction, tuple[Fraction, bool]] = {}
        for match in _LITERAL.finditer(latex):
            value, places = Fraction(match[0]), len(match[1])
            shown = len(match[0].replace(".", "").lstrip("0"))
            self.units[value] = Fraction(1, 10**places), places > 1 or shown > 2

    def of(self, value: sympy.Rational) -> tuple[sympy.Rational, bool] | None:
        """The unit of the last place of a value and whether it may be rounded; None if unknown."""
        size = abs(Fraction(int(value.p), int(value.q)))
        for literal, (unit, rounded) in self.units.items():
            scale = size / literal if literal else Fraction(0)
            power = scale if scale >= 1 else (1 / scale if scale else Fraction(0))
            if power.denominator == 1 and re.fullmatch(r"10*", str(power.numerator)):
                exact = unit * scale
                return sympy.Rational(exact.numerator, exact.denominator), rounded
        return None


NO_DECIMALS = Decimals()


def same_expressions(gold: Any, target: Any, decimals: Decimals) -> Equal:
    """Whether two expressions are equal; `decimals` are those that the reference writes."""
    rounded = gold.has(sympy.Float)
    gold, target = rational(gold), rational(target)
    functions = sorted(gold.atoms(AppliedUndef) | target.atoms(AppliedUndef), key=str)
    named = {f: sympy.Symbol(f"\\{f}", real=True) for f in functions}
    gold, target = gold.xreplace(named).doit(), target.xreplace(named).doit()
    if gold == target:
        return None if gold.has(sympy.nan, sympy.zoo) else True
    if not (gold.free_symbols or target.free_symbols):
        found = same_numbers(gold, target)
        return _as_rounded(gold, target, decimals) if found is False and rounded else found
    found = _same_functions(gold, target)
    return None if found is False and rounded else found


def _as_rounded(gold: Any, target: Any, decimals: Decimals) -> Equal:
    """Whether an answer is what a decimal reference rounds, to the digits that it shows."""
    unit = decimals.of(gold) if gold.is_Rational else None
    if unit is None:
        near = abs(target - gold) < abs(gold) * _FEW
        return None if near == True else False  # noqa: E712  (SymPy's own true)
    step, may_be = unit
    distance = abs(target - gold)
    if (distance <= step / 2) == True:  # noqa: E712
        terminates = target.is_Rational and not (10**60 % target.q)
        return True if may_be else False if terminates else None
    cut = may_be and (distance < step) == True and (abs(target) > abs(gold)) == True  # noqa: E712
    return None if cut and not (target.is_Rational and not 10**60 % target.q) else False


def _number(value: Any, digits: int) -> Any:
    found = sympy.N(value, digits)
    return found if found.is_number and found.is_finite and not found.has(sympy.nan) else None


def same_numbers(left: Any, right: Any) -> Equal:
    """Two numbers: exactly if both are rational, else to `MORE_DIGITS` digits of the larger."""
    if left == right:
        return True
    if left.is_Rational and right.is_Rational:
        return False
    if left.is_infinite or right.is_infinite:
        return None if left.has(sympy.nan, sympy.zoo) or right.has(sympy.nan, sympy.zoo) else False
    for digits in (DIGITS, MORE_DIGITS):
        a, b = _number(left, digits), _number(right, digits)
        if a is None or b is None:
            return None
        size = max(abs(a), abs(b))
        if size < sympy.Float(10) ** -10000:
            return None
        if abs(a - b) > size * sympy.Float(10) ** (10 - digits):
            hidden = min(abs(a), abs(b)) < sympy.Float(10) ** (-digits)
            return (None if sympy.simplify(left - right) == 0 else False) if hidden else False
    return True


def _same_functions(gold: Any, target: Any) -> Equal:
    """Two expressions with letters, at points.

    Letters may stand for lengths or for whole numbers. So what agrees on the positive numbers or
    on the whole ones alone is open: sqrt(x^2) and x, cos(n pi) and (-1)^n.
    """
    symbols = sorted(gold.free_symbols | target.free_symbols, key=str)
    compare: Callable[[dict[Any, Any]], Equal] = lambda at: _at(gold, target, at)  # noqa: E731
    positive = [compare(at) for at in islice(points(symbols, positive=True), 6)]
    if False in positive:
        whole = [compare(at) for at in islice(_whole(symbols), 5)]
        if whole and all(whole):
            return None
        return None if _renamed(gold, target) else False
    anywhere = [compare(at) for at in islice(points(symbols, positive=False), 8)]
    if False in anywhere or positive.count(True) + anywhere.count(True) < 5:
        return None
    return True


def _renamed(gold: Any, target: Any) -> bool:
    """Whether two expressions are equal but for the name of their one letter."""
    letters = [sorted(v.free_symbols, key=str) for v in (gold, target)]
    if [len(found) for found in letters] != [1, 1] or letters[0] == letters[1]:
        return False
    if isinstance(gold, sympy.Symbol) or isinstance(target, sympy.Symbol):
        return False
    return _same_functions(gold, target.xreplace({letters[1][0]: letters[0][0]})) is True


def _at(gold: Any, target: Any, point: dict[Any, Any]) -> Equal:
    values = [_number(v.xreplace(point), DIGITS) for v in (gold, target)]
    if None in values:
        return None
    complex_ = gold.has(sympy.I) or target.has(sympy.I)
    if not complex_ and not all(abs(sympy.im(v)) < sympy.Float(10) ** -30 for v in values):
        return None
    size = max(abs(v) for v in values)
    return bool(abs(values[0] - values[1]) <= size * sympy.Float(10) ** -30)


def points(symbols: Sequence[Any], *, positive: bool) -> Iterable[dict[Any, Any]]:
    """Points with rational coordinates that nobody's answer is special at; the same every time."""
    primes = (sympy.Integer(p) for p in (3, 7, 11, 2, 13, 5, 17, 19, 23, 29, 31, 37))
    numbers = list(primes)
    for turn in count():
        point = {}
        for place, symbol in enumerate(symbols):
            top, bottom = numbers[(turn + 3 * place) % 12], numbers[(5 * turn + 7 * place + 4) % 12]
            value = top / bottom + sympy.Rational(turn * (place + 1), 41)
            negative = not positive and (turn + place) % 2 == 0
            point[symbol] = -value if negative else value
        yield point


def _whole(symbols: Sequence[Any]) -> Iterable[dict[Any, Any]]:
    for turn in count(2):
        yield {s: sympy.Integer(turn + 3 * place) for place, s in enumerate(symbols)}
