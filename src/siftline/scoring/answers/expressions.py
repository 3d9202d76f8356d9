"""Arithmetic as people write it, as exact fractions: `12 clips * $3`, `20% of 50`, `2(3 + 4)`.

A recursive descent over tokens. Nothing is evaluated by Python, and what may be read in several
ways says so.

Numbers with words behind them: which of the words leave them as they are.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from siftline.kernels.text.normalization import normalized
from siftline.scoring.answers.quantities import (
    NOT_UNITS,
    SCALES,
    Quantity,
    leading_quantity,
    parse_quantity,
)

_quantity = lru_cache(maxsize=4096)(parse_quantity)  # the same numbers come again and again
_MOST_WORDS = 3
"""Words between a number and the operator behind it; more are a sentence, no unit."""
_LARGEST_POWER = 20

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_TOKEN = re.compile(
    rf"(?P<mixed>\d+[ ]\d+/\d+(?!\d|/|[.,]\d))|(?P<number>{_NUMBER})"
    r"|(?P<currency>[$€£¥₹])|(?P<percent>%|percent\b|per cent\b)|(?P<equals>=)"
    r"|(?P<op>[-+*/^])|(?P<open>[(\[])|(?P<close>[)\]])"
    r"|(?P<word>[A-Za-z]+(?:'[a-z]+)?)|(?P<other>\S)"
)
_REWRITTEN = (
    (re.compile(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e])"), " "),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}"), r"((\1)/(\2))"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|boxed)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\times|\\cdot|\\ast|[\u00d7\u00b7\u2219\u22c5\u2217]"), "*"),
    (re.compile(r"\\div|÷"), "/"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[()\[\]!,;: ]"), " "),
    (re.compile(r"(?<=[\d)])\s*\*\*\s*(?=[\d(])"), "^"),
    (re.compile(r"\*\*|__|`"), " "),
    (re.compile(r"\bmultiplied by\b"), "*"),
    (re.compile(r"\bdivided by\b"), "/"),
    (re.compile(r"\bplus\b"), "+"),
    (re.compile(r"\bminus\b"), "-"),
    (re.compile(r"(?<=[\d)%])(\s*)[xX](\s*)(?=[$€£¥₹(]?\.?\d)"), r"\1*\2"),
    (re.compile(r"(?<=[a-z]) [xX] (?=[$€£¥₹(]?\.?\d)"), " * "),
    (re.compile(r"(?<=[\w$€£¥₹])\s*/\s*(?=[A-Za-z]{2})"), " "),  # $18/hour
)
_DASHES = str.maketrans(dict.fromkeys("\u2212\u2013\u2010\u2011", "-") | {"\u2044": "/"})
_CHANGING = frozenset(
    re.split(
        r"\s+",
        """dozen dozens pair pairs score hundred hundreds half halves third thirds quarter quarters
        squared cubed pi sqrt am pm choose mod remainder factorial or""",
    )
)
"""Words that make a number behind an equals sign another one, or leave it open."""
_JOINING = frozenset(
    re.split(
        r"\s+",
        """and or so is are was were then because since which that if when means equals
        thus hence than gives get gets""",
    )
)
_MEASURES = frozenset(
    re.split(
        r"\s+",
        """second minute hour day week month year inch foot feet yard mile meter metre kilometer
        km cm mm ounce pound gram kilogram kg cup pint quart gallon liter litre ml cent dollar
        euro yen rupee degree""",
    )
)
"""Units that are turned into each other: two sides in different ones need no equal numbers."""
_SAME_UNIT = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee"}


@dataclass(frozen=True)
class Token:
    """A piece of text, and what it can be in an expression."""

    kind: str
    text: str
    spaced: bool
    """Whether white space, or nothing, stands before it."""
    free: bool
    """Whether white space, or nothing, stands behind it."""


def tokens(text: str) -> list[Token]:
    """Splits a text into tokens, with LaTeX and typographic signs rewritten to plain ones."""
    for pattern, replacement in _REWRITTEN[:1]:
        text = pattern.sub(replacement, text)
    text = normalized("NFKC", text).translate(_DASHES)
    for pattern, replacement in _REWRITTEN[1:]:
        text = pattern.sub(replacement, text)
    found = []
    for match in _TOKEN.finditer(text):
        start, end, kind = match.start(), match.end(), match.lastgroup
        assert kind is not None
        spaced = not text[max(0, start - 1) : start].strip()
        free = not text[end : end + 1].strip()
        found.append(Token(kind, match[0], spaced, free))
    return found


Pair = tuple[Fraction, Fraction]
"""A value with percents as hundredths, and with percents as plain numbers."""


@dataclass
class Reader:
    """A recursive descent over tokens; `None` from any rule means that they are no expression."""

    tokens: Sequence[Token]
    right: bool = False
    """Whether prose may stand behind the expression, as it does right of an equals sign."""
    at: int = 0
    operators: list[str] = field(default_factory=list)
    measures: set[str] = field(default_factory=set)
    percents: int = 0
    unsure: bool = False
    """Read, but in one of several ways: such a side disproves nothing."""
    operands: list[tuple[Pair, str]] = field(default_factory=list)

    def peek(self, ahead: int = 0) -> str:
        """Kind of the token `ahead` of the next one, an operator's own text, or `end`."""
        position = self.at + ahead
        if position >= len(self.tokens):
            return "end"
        token = self.tokens[position]
        return token.text if token.kind == "op" else token.kind

    def sum(self) -> Pair | None:
        """Reads the longest sum from here on."""
        value = self._product()
        while value is not None and self.peek() in "+-" and self._operand_at(1):
            sign = self._operator()
            right = self._product()
            if right is None:
                return None
            value = _each(sign, value, right)
        return value

    def _product(self) -> Pair | None:
        value = self._power()
        while value is not None:
            if self.peek() in "*/" and self._operand_at(1):
                sign = self._operator()
            elif self.peek() == "open" and self._glued_to("number", "close"):
                sign = "*"  # 2(3 + 4)
                self.operators.append(sign)
            elif self._of():
                sign = "*"
            else:
                return value
            right = self._power()
            if right is None:
                return None
            value = _each(sign, value, right)
        return None

    def _power(self) -> Pair | None:
        base = self._atom()
        if base is None or self.peek() != "^":
            return base
        self._operator()
        exponent = self._atom()
        return None if exponent is None else _each("^", base, exponent)

    def _atom(self) -> Pair | None:
        if self.peek() == "-":
            self.at += 1
            value = self._atom()
            return None if value is None else (-value[0], -value[1])
        if self.peek() == "open":
            self.at += 1
            value = self.sum()
            if value is None or self.peek() != "close":
                return None
            self.at += 1
            return None if self._words() is None else value
        return self._number()

    def _number(self) -> Pair | None:
        currency = self.peek() == "currency"
        if currency:
            self.measures.add(_SAME_UNIT[self.tokens[self.at].text])
            self.at += 1
        if self.peek() not in ("number", "mixed"):
            return None
        written = self.tokens[self.at].text
        if re.match(r"0\d", written) or (self.peek(1) == "other" and self._glued()):
            return None  # 0900, 12:30
        self.at += 1
        percent = self.peek() == "percent"
        if percent:
            self.percents += 1
            self.at += 1
        elif self.peek() == "currency" and not currency:
            self.measures.add(_SAME_UNIT[self.tokens[self.at].text])
            self.at += 1
        words = self._words()
        if words is None:
            return None
        quantity = _quantity(f"{written}{words}")
        if quantity is None:
            return None
        value = quantity.value
        self.unsure |= value != _plain(written)  # 16 million
        pair = (value / 100, value) if percent else (value, value)
        self.operands.append((pair, written + "%" * percent))
        return pair

    def _glued_to(self, *kinds: str) -> bool:
        return not self.tokens[self.at].spaced and self.tokens[self.at - 1].kind in kinds

    def _glued(self) -> bool:
        """Whether the next token is a colon or comma with another token right behind it."""
        token = self.tokens[self.at + 1]
        return token.text in ":,." and not token.spaced and not token.free

    def _words(self) -> str | None:
        """The unit behind a number; None where the words are no unit or change the number."""
        start = self.at
        while self.peek() == "word" and not self._of(only_look=True):
            self.at += 1
        goes_on = self.peek() in "+-*/^" and self._operand_at(1)
        inside = goes_on or self.peek() == "close" or not self.right
        lettered = self.peek() in "*/^+" and not goes_on  # 8 bags / Y
        words = [token.text.lower() for token in self.tokens[start : self.at]]
        if not words:
            return ""
        if not inside:
            # The sentence goes on behind the result, whose unit can only be the first word.
            self.unsure |= words == ["and"] and self._operand_at(0)  # $3 and $1/3
            self.at, words = start + 1, words[:1]
        text = " ".join(word for word in words if word not in ("a", "an", "the"))
        spaced = self.tokens[start].spaced
        letter = any(len(word) == 1 and (word not in ("a", "i") or not spaced) for word in words)
        letter |= lettered
        known = _quantity(f"1{' ' * spaced}{text}") is not None and not set(words) & _JOINING
        if letter or words[0] in _CHANGING or not (known or (spaced and not inside)):
            return None
        if inside and (len(words) > _MOST_WORDS or words[0] == "of"):
            return None
        if not known:
            return ""
        self.measures.update(_MEASURES & {word.rstrip("s") for word in words})
        return " " * spaced + text

    def _of(self, only_look: bool = False) -> bool:
        """Whether `of` stands here behind a percent or a fraction; then it multiplies."""
        behind = self.at and (
            self.tokens[self.at - 1].kind in ("percent", "mixed")
            or (self.at > 2 and self.tokens[self.at - 2].text == "/")
        )
        if not behind or self.peek() != "word" or self.tokens[self.at].text.lower() != "of":
            return False
        skip = 2 if self.peek(1) == "word" and self.tokens[self.at + 1].text == "the" else 1
        if not self._operand_at(skip):
            return False
        if not only_look:
            self.at += skip
            self.operators.append("*")
            self.unsure |= self.right  # "= 1/3 of $150": of what it found
        return True

    def _operator(self) -> str:
        sign = self.tokens[self.at].text
        behind = self.at - 1
        while self.tokens[behind].kind == "word":
            behind -= 1
        # "25 / 1/3" is written for 25 / (1/3) as well.
        self.unsure |= sign == "/" and behind > 1 and self.tokens[behind - 1].text == "/"
        self.operators.append(sign)
        self.at += 1
        return sign

    def _operand_at(self, ahead: int) -> bool:
        return self.peek(ahead) in ("number", "mixed", "currency", "open") or (
            self.peek(ahead) == "-" and self.peek(ahead + 1) in ("number", "currency", "open")
        )


def _plain(written: str) -> Fraction | None:
    quantity = _quantity(written)
    return None if quantity is None else quantity.value


def _each(sign: str, left: Pair, right: Pair) -> Pair | None:
    first, second = _apply(sign, left[0], right[0]), _apply(sign, left[1], right[1])
    return None if first is None or second is None else (first, second)


def _apply(sign: str, left: Fraction, right: Fraction) -> Fraction | None:
    if sign == "+":
        return left + right
    if sign == "-":
        return left - right
    if sign == "*":
        return left * right
    if sign == "/":
        return left / right if right else None
    whole = right.denominator == 1 and 0 <= right <= _LARGEST_POWER
    small = max(abs(left.numerator), left.denominator) < 10**12
    return left**right.numerator if whole and small else None


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
