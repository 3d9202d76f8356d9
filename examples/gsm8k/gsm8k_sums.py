"""Exact arithmetic on the formulas inside GSM8K's calculator marks, without `eval`."""

import re
from fractions import Fraction

_TOKEN = re.compile(r"\s*(\d[\d,]*\.?\d*|\.\d+|[-+*/()%x])")
_LONGEST = 200


def evaluate(formula: str) -> Fraction | None:
    """Computes a formula of numbers, + - * / x, percent signs and brackets.

    Args:
        formula: E.g. `20/100*25` or `(3+4)*2`.

    Returns:
        The exact value; None if the text is anything else, or divides by zero.
    """
    tokens, position = [], 0
    formula = formula.strip()
    while position < len(formula):
        match = _TOKEN.match(formula, position)
        if match is None or len(formula) > _LONGEST:
            return None
        tokens.append(match[1])
        position = match.end()
    try:
        value = _sum(tokens)
    except (IndexError, ValueError, ZeroDivisionError):
        return None
    return None if tokens else value


def decimal_text(value: Fraction) -> str | None:
    """Writes a number as an integer or with at most two decimals; None if it has more."""
    if value.denominator == 1:
        return str(value.numerator)
    cents = value * 100
    if cents.denominator != 1:
        return None
    return f"{float(value):.2f}".rstrip("0")


def _sum(tokens: list[str]) -> Fraction:
    value = _product(tokens)
    while tokens and tokens[0] in "+-":
        sign = 1 if tokens.pop(0) == "+" else -1
        value += sign * _product(tokens)
    return value


def _product(tokens: list[str]) -> Fraction:
    value = _factor(tokens)
    while tokens and tokens[0] in "*/x":
        if tokens.pop(0) == "/":
            value /= _factor(tokens)
        else:
            value *= _factor(tokens)
    return value


def _factor(tokens: list[str]) -> Fraction:
    token = tokens.pop(0)
    if token == "-":
        return -_factor(tokens)
    if token == "(":
        value = _sum(tokens)
        if tokens.pop(0) != ")":
            raise ValueError("bracket not closed")
    else:
        value = Fraction(token.replace(",", "").rstrip("."))
    if tokens and tokens[0] == "%":
        tokens.pop(0)
        value /= 100
    return value
