"""Whether two values are equal: yes, no with a proof, or open.

Lists, tuples, matrices, sets, intervals, relations and equations, down to the expressions in
them. An interval and the relation that describes it are one value, whichever side each stands on.

Whether two expressions are equal: yes, no with a proof, or open.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import count, islice
from typing import Any

import sympy
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from siftline.scoring.answers.values import (
    Items,
    Unreadable,
    is_equation,
    parts_of,
    rational,
    read,
    solved,
)

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


def same(gold: Any, target: Any, decimals: Decimals) -> Equal:
    """Whether two values that were read are equal.

    Args:
        gold: The reference; where it has rounded decimals, their digits are what counts.
        target: The answer.
        decimals: The decimals as the reference writes them.
    """
    gold, target = _simple(gold), _simple(target)
    if is_equation(gold) or is_equation(target):
        return _same_equations(gold, target, decimals)
    if isinstance(gold, Items) or isinstance(target, Items):
        return _same_items(gold, target, decimals)
    if _is_matrix(gold) or _is_matrix(target):
        return _same_matrices(gold, target, decimals)
    if _is_region(gold) or _is_region(target):
        return _same_regions(gold, target, decimals)
    return same_expressions(gold, target, decimals)


def _simple(value: Any) -> Any:
    """A value without what only its form adds: x in a set, chains of equations, lists of x = …."""
    if isinstance(value, sympy.Contains):
        return value.args[1]
    if isinstance(value, Items):
        values = tuple(_simple(v) for v in value.values)
        assigned = [_assigned(v) for v in values]
        names = {pair[0] for pair in assigned if pair}
        if len(names) == 1 and assigned[0] and (None not in assigned or not any(assigned[1:])):
            # x = 2, x = 3, and x = 2, 3
            values = tuple(
                _simple(pair[1]) if pair else v for v, pair in zip(values, assigned, strict=True)
            )
        return Items(values, value.ordered)
    if isinstance(value, sympy.Equality) and isinstance(value.rhs, sympy.Set):
        return value.rhs
    return value


def _assigned(value: Any) -> "tuple[str, Any] | None":
    """Name and value of `x = 5`, `f(x) = 2x`, `A = b = 5`; None of another equation."""
    if not is_equation(value):
        return None
    parts = parts_of(value)
    left, right = parts[0].lhs, parts[-1].rhs
    if len(parts) == 1 and isinstance(right, sympy.Symbol) and not isinstance(left, sympy.Symbol):
        left, right = right, left
    named = isinstance(left, sympy.Symbol | AppliedUndef)
    if named and left not in getattr(right, "free_symbols", ()):
        return str(left), right
    return None


def _same_equations(gold: Any, target: Any, decimals: Decimals) -> Equal:
    named, given = _assigned(gold), _assigned(target)
    if named and given:
        found = same(named[1], given[1], decimals)
        if named[0] == given[0]:
            return found
        symbols = getattr(named[1], "free_symbols", set()) | getattr(
            given[1], "free_symbols", set()
        )
        if symbols:
            return True if _one_curve(gold, target) else None
        return False if found is False else None
    if is_equation(gold) and is_equation(target):
        return True if _one_curve(gold, target) else _apart(gold, target)
    equation, other = (gold, target) if is_equation(gold) else (target, gold)
    assigned = _assigned(equation)
    if assigned is None:
        sides = parts_of(equation)
        held = not equation.free_symbols and all(
            same_expressions(part.lhs, part.rhs, NO_DECIMALS) for part in sides
        )
        if not held:
            return None
        assigned = "", sides[-1].rhs
    pair = (assigned[1], other) if equation is gold else (other, assigned[1])
    return same(*pair, decimals)


def _one_curve(gold: Any, target: Any) -> bool:
    """Whether the sides' differences are multiples of one another: the same equation."""
    first, second = (parts_of(v)[0].lhs - parts_of(v)[0].rhs for v in (gold, target))
    if len(parts_of(gold)) > 1 or len(parts_of(target)) > 1:
        return False
    ratio = sympy.cancel(rational(first).doit() / rational(second).doit())
    return bool(ratio.is_number and ratio.is_finite and ratio != 0)


def _apart(gold: Any, target: Any) -> Equal:
    """A point of one equation that is none of the other proves that they differ."""
    if len(parts_of(gold)) > 1 or len(parts_of(target)) > 1:
        return None
    for one, other in ((gold, target), (target, gold)):
        first, second = one.lhs - one.rhs, other.lhs - other.rhs
        for symbol in sorted(first.free_symbols, key=str):
            slope = sympy.diff(first, symbol)
            if slope.has(symbol) or slope == 0:
                continue
            solution = (-first.subs(symbol, 0)) / slope
            rest = sorted(first.free_symbols | second.free_symbols - {symbol}, key=str)
            for point in islice(points(rest, positive=True), 3):
                at = {s: v for s, v in point.items() if s != symbol}
                x = solution.subs(at)
                if (
                    x.is_finite
                    and same_numbers(second.subs({**at, symbol: x}), sympy.S.Zero) is False
                ):
                    return False
    return None


def _all(found: Iterable[Equal]) -> Equal:
    answers = list(found)
    return False if False in answers else None if None in answers else True


def _same_items(gold: Any, target: Any, decimals: Decimals) -> Equal:
    left, right = _listed(gold), _listed(target)
    if left is None or right is None:
        return None if _is_region(gold) or _is_region(target) else False
    by_name = _named(left), _named(right)
    if by_name[0] is not None and by_name[1] is not None:
        if by_name[0].keys() != by_name[1].keys():
            return None
        return _all(same(v, by_name[1][k], decimals) for k, v in by_name[0].items())
    left, right = (
        Items(tuple(names[k] for k in sorted(names)), None) if names is not None else items
        for names, items in zip(by_name, (left, right), strict=True)
    )
    in_order: Equal = False
    if len(left.values) == len(right.values):
        in_order = _all(
            same(a, b, decimals) for a, b in zip(left.values, right.values, strict=True)
        )
    if in_order and (_is_matrix(gold) or _is_matrix(target)):
        return None  # a vector, and a list of its elements
    if in_order or (left.ordered and right.ordered):
        return in_order
    as_sets = _same_collections(left.values, right.values, decimals)
    if left.ordered or right.ordered:
        return None if as_sets is not False else False
    return as_sets


def _same_collections(left: Sequence[Any], right: Sequence[Any], decimals: Decimals) -> Equal:
    """Whether each of either has an equal in the other: order and repeats do not count."""
    table = [[same(a, b, decimals) for b in right] for a in left]
    rows = [*table, *(list(column) for column in zip(*table, strict=True))]
    if any(all(found is False for found in row) for row in rows):
        return False
    return True if all(True in row for row in rows) else None


def _named(items: Items) -> dict[str, Any] | None:
    """The values of a list x = 1, y = 2 by name."""
    found = [_assigned(value) for value in items.values]
    names = {pair[0] for pair in found if pair}
    if None in found or len(names) < len(items.values):
        return None
    return {pair[0]: pair[1] for pair in found if pair}


def _listed(value: Any) -> Items | None:
    """A value as a list: an open interval may be a pair, a vector is its elements."""
    if isinstance(value, Items):
        return value
    if isinstance(value, sympy.Interval):
        return Items((value.start, value.end), ordered=True) if _pair(value) else None
    if _is_matrix(value):
        value = value.doit()
        return Items(tuple(value), ordered=True) if 1 in value.shape else None
    if isinstance(value, sympy.FiniteSet):
        return Items(tuple(value.args))
    if _is_region(value):
        return None
    return Items((value,))


def _pair(value: sympy.Interval) -> bool:
    brackets = bool(value.left_open) == bool(value.right_open)
    return brackets and not (value.start.is_infinite or value.end.is_infinite)


def _is_matrix(value: Any) -> bool:
    return isinstance(value, sympy.MatrixBase | sympy.MatrixExpr)


def _same_matrices(gold: Any, target: Any, decimals: Decimals) -> Equal:
    if not (_is_matrix(gold) and _is_matrix(target)):
        left, right = _listed(gold), _listed(target)
        if left is None or right is None or len(left.values) != len(right.values):
            return False
        found = _all(same(a, b, decimals) for a, b in zip(left.values, right.values, strict=True))
        return None if found else found
    gold, target = gold.doit(), target.doit()
    if not all(isinstance(value, sympy.MatrixBase) for value in (gold, target)):
        return None
    turned = gold.shape == target.shape[::-1] and 1 in gold.shape and gold.shape != target.shape
    if gold.shape != target.shape and not turned:
        return False
    found = _all(same(a, b, decimals) for a, b in zip(gold, target, strict=True))
    return None if found and turned else found


def _is_region(value: Any) -> bool:
    boolean = isinstance(value, sympy.logic.boolalg.Boolean) and not isinstance(value, sympy.Symbol)
    return isinstance(value, sympy.Set) or boolean


def _same_regions(gold: Any, target: Any, decimals: Decimals) -> Equal:
    if isinstance(gold, Relational | sympy.And) and isinstance(target, Relational | sympy.And):
        symbols = gold.free_symbols | target.free_symbols
        if len(symbols) != 1 and len(gold.free_symbols) > 1:
            return _same_relations(gold, target)
    try:
        left, right = solved(gold), solved(target)
    except (Unreadable, AttributeError, RuntimeError):  # SymPy raises a kind of the last
        number = any(isinstance(v, sympy.Expr) and v.is_number for v in (gold, target))
        return False if number else None
    letters = [v.free_symbols for v in (gold, target) if not isinstance(v, sympy.Set)]
    found = _same_sets(left, right, decimals)
    renamed = len(letters) == 2 and letters[0] != letters[1]
    return None if found and renamed else found


def _same_sets(left: sympy.Set, right: sympy.Set, decimals: Decimals) -> Equal:
    if left == right:
        return True
    if isinstance(left, sympy.Interval) and isinstance(right, sympy.Interval):
        ends = _all(
            same(a, b, decimals) for a, b in ((left.start, right.start), (left.end, right.end))
        )
        borders = (left.left_open, left.right_open) == (right.left_open, right.right_open)
        return ends if borders else (False if ends is not None else None)
    try:
        left, right = rational(left).doit(), rational(right).doit()
        empty = [(a - b).is_empty for a, b in ((left, right), (right, left))]
    except (TypeError, RuntimeError, ValueError):
        return None
    return False if False in empty else True if all(empty) else None


def _same_relations(gold: Any, target: Any) -> Equal:
    """Relations in several letters: at points. One where only one of them holds is a proof."""
    symbols = sorted(gold.free_symbols | target.free_symbols, key=str)
    if len(parts_of(gold)) == len(parts_of(target)) == 1:
        first, second = (v.gts - v.lts for v in (gold, target) if hasattr(v, "gts"))
        ratio = sympy.cancel((first / second).doit())
        if ratio.is_positive and (gold.func in STRICT) == (target.func in STRICT):
            return True
    for point in islice(points(symbols, positive=False), 40):
        held = [bool(v.subs(point)) if v.subs(point).is_Boolean else None for v in (gold, target)]
        if None not in held and held[0] != held[1]:
            return False
    return None


STRICT = (sympy.StrictLessThan, sympy.StrictGreaterThan)


def compare(gold: str, target: str) -> Equal:
    """Whether two normalised LaTeX answers are equal, here and without a limit on time.

    Raises:
        Unreadable: if one of them can't be read.
        Exception: whatever SymPy raises.
    """
    return same(read(gold), read(target), Decimals(gold))
