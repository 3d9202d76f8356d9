"""Values of answers: reading the LaTeX that math-verify's grammar knows.

An answer is read by math-verify's grammar (latex2sympy2_extended), which evaluates nothing as
Python. What it can't read, or would read as something else, is `Unreadable`.

This needs SymPy and has no limit on time: `equivalence` runs it in a process of its own.
"""

import re
from dataclasses import dataclass
from functools import partial, reduce
from operator import add, mul
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from sympy.core.relational import Relational

from siftline.scoring.answers.latex import MISREAD


@dataclass(frozen=True)
class Items:
    """Several values.

    Attributes:
        values: In the order they are written.
        ordered: True of a tuple in brackets; None of a list or a set, whose order may not count.
    """

    values: tuple[Any, ...]
    ordered: bool | None = None


class Unreadable(ValueError):
    """An answer that can't be read as a value."""


def read(latex: str) -> Any:
    """The value of one answer: a SymPy expression, matrix, set or relation, or `Items`.

    Raises:
        Unreadable: if the grammar does not know it, or would read it as something else.
    """
    if MISREAD.search(latex):
        raise Unreadable("not in the grammar")
    if re.search(r"\b(?:or|and)\b", latex):
        return _joined(latex)
    if re.search(r"\\(?:pm|mp)(?![A-Za-z])", latex):
        return _both_signs(latex)
    both = {c.lower() for c in re.findall(r"[A-Z]", latex)} & set(
        re.findall(r"[a-z]", _bare(latex))
    )
    config = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=not both)
    try:
        value = latex2sympy(
            latex, is_real=True, normalization_config=None, conversion_config=config
        )
    except Exception as error:  # the grammar raises bare ones
        raise Unreadable(str(error).split("\n", 1)[0]) from error
    return _value(value, latex)


def _bare(latex: str) -> str:
    return re.sub(r"\\[A-Za-z]+", " ", latex)


def _top_level(latex: str, separator: str) -> list[str]:
    """Pieces between separators that stand in no bracket."""
    pieces, depth, start = [], 0, 0
    for match in re.finditer(rf"\\[A-Za-z]+|\\.|[(\[{{]|[)\]}}]|{separator}", latex):
        mark = match[0]
        if mark in "([{":
            depth += 1
        elif mark in ")]}":
            depth -= 1
        elif depth == 0 and re.fullmatch(separator, mark):
            pieces.append(latex[start : match.start()])
            start = match.end()
    return [piece.strip() for piece in [*pieces, latex[start:]]]


def _joined(latex: str) -> Any:
    """Answers joined by "or" or "and": relations are a union or what they have in common."""
    pieces = [p for p in _top_level(latex, r",?\s*\b(?:or|and)\b|,") if p]
    values = [read(piece) for piece in pieces]
    if all(
        isinstance(value, Relational | sympy.And) and not is_equation(value) for value in values
    ):
        sets = [solved(value) for value in values]
        if re.search(r"\bor\b", latex):
            return sympy.Union(*sets)
        return sympy.Intersection(*sets)
    if re.search(r"\bor\b", latex) and all(isinstance(v, sympy.Set) for v in values):
        return sympy.Union(*values)
    return Items(tuple(values))


def _both_signs(latex: str) -> Any:
    found: list[Any] = []
    for piece in _top_level(latex, ","):
        if not re.search(r"\\(?:pm|mp)(?![A-Za-z])", piece):
            found.append(read(piece))
            continue
        for plus, minus in (("+", "-"), ("-", "+")):
            signed = re.sub(r"\\pm(?![A-Za-z])", plus, piece)
            signed = re.sub(r"\\mp(?![A-Za-z])", minus, signed)
            found.append(read(re.sub(r"(^|[=({,])\s*\+", r"\1", signed)))
    return Items(tuple(found))


def _value(value: Any, latex: str) -> Any:
    """The grammar's objects as ours: tuples and lists as `Items`, i as the imaginary unit."""
    if isinstance(value, list | tuple | dict | bool) or value is None:
        raise Unreadable("no value")
    if isinstance(value, sympy.Tuple):
        return Items(tuple(_value(v, latex) for v in value), ordered=True)
    if isinstance(value, sympy.FiniteSet):
        values = getattr(value, "_unsorted_args", value.args)
        parts = tuple(_value(v, latex) for v in values)
        return parts[0] if len(parts) == 1 else Items(parts)
    if isinstance(value, sympy.MatrixBase):
        return value.applyfunc(partial(_imaginary, latex=latex))
    if isinstance(value, sympy.Basic):
        return _imaginary(_real_roots(_multiplied(value), latex), latex)
    raise Unreadable("no value")


def _multiplied(value: Any) -> Any:
    """Matrices in sums, products and powers, which the grammar writes as those of numbers."""
    inside = any(isinstance(part, sympy.MatrixBase) for part in sympy.preorder_traversal(value))
    if not inside or isinstance(value, sympy.MatrixBase | sympy.MatrixExpr):
        return value
    parts = [_multiplied(part) for part in value.args]
    try:
        if isinstance(value, sympy.Pow):
            return parts[0] ** parts[1]
        if isinstance(value, sympy.Add | sympy.Mul):
            return reduce(add if isinstance(value, sympy.Add) else mul, parts)
    except (TypeError, ValueError, sympy.ShapeError) as error:
        raise Unreadable("matrices that do not fit") from error
    raise Unreadable("a matrix in a formula")


def _real_roots(value: Any, latex: str) -> Any:
    r"""Odd roots of negative numbers as the real ones: \sqrt[3]{-8} is -2, where no i is about."""
    if "\\sqrt[" not in latex or any(symbol.name == "i" for symbol in value.free_symbols):
        return value

    def odd(part: Any) -> bool:
        root = isinstance(part, sympy.Pow) and part.exp.is_Rational and part.exp.p == 1
        return bool(root and part.exp.q % 2 and part.base.is_negative)

    return value.replace(odd, lambda part: -((-part.base) ** part.exp))


def _imaginary(value: Any, latex: str) -> Any:
    letters = set(re.findall(r"(?<![A-Za-z])[jk](?![A-Za-z])", _bare(latex)))
    bound = value.atoms(sympy.Tuple)
    unit = next((s for s in value.free_symbols if s.name == "i"), None)
    if unit is None or letters or bound:
        return value
    return value.xreplace({unit: sympy.I})


def solved(value: Any) -> sympy.Set:
    """The set that a relation in one letter describes.

    Raises:
        Unreadable: of a relation in several letters, or none.
    """
    if isinstance(value, sympy.Set):
        return value
    symbols = sorted(value.free_symbols, key=str)
    if len(symbols) != 1:
        raise Unreadable("a relation in several letters")
    sets = []
    for part in parts_of(value):
        exact = rational(part)
        if exact is sympy.true or exact is sympy.false:
            raise Unreadable("a relation without letters")
        sets.append(exact.as_set())
    return sympy.Intersection(*sets)


def is_equation(value: Any) -> bool:
    """Whether a value is an equation, or a chain of them: a = b = 5."""
    if isinstance(value, sympy.And):
        return all(isinstance(part, sympy.Equality) for part in value.args)
    return isinstance(value, sympy.Equality)


def parts_of(value: Any) -> list[Any]:
    """The relations of a chain in the order they are written; a single one alone."""
    return (
        list(getattr(value, "_unsorted_args", value.args))
        if isinstance(value, sympy.And)
        else [value]
    )


def rational(value: Any) -> Any:
    """A value with its decimals as the exact fractions that are written."""
    if not value.has(sympy.Float):
        return value
    return value.xreplace({f: sympy.Rational(str(f)) for f in value.atoms(sympy.Float)})
