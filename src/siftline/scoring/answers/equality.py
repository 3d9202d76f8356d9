r"""Judging: whether a final answer is the reference. Match, mismatch, or open.

A mismatch is a proof. Plain numbers and words are decided here, exactly; whatever is left goes as
LaTeX to math-verify's grammar (`values`, in a process of its own). An answer that may be
read in two ways (`1/2x`) is a match or a mismatch only if it is one in both.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import permutations

from siftline.scoring.answers.expressions import begins, equal_quantities
from siftline.scoring.answers.latex import DEGREES, normalise, shell, without_unit
from siftline.scoring.answers.quantities import (
    Measured,
    Quantity,
    answer_key,
    measured,
    parse_quantity,
    tidy,
)

LONGEST_EXPRESSION = 500
"""Characters beyond which an unequal pair is not compared: real answers are shorter."""
Ask = Callable[[str, str], bool | None]
"""Compares two expressions, reference first; see `scoring.answers.value_equality.compare`."""


@dataclass(frozen=True)
class Judged:
    """What came of one comparison.

    Attributes:
        equal: True, False, or None where nobody can tell.
        why: Of an open one: what can't be told.
    """

    equal: bool | None
    why: str = ""


_SOME_WORD = re.compile(r"(?<![A-Za-z])[A-Za-z]{2,}(?![A-Za-z])")
_MATH_WORDS = frozenset(
    ["and", "or", "pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "max", "min", "gcd", "lcm"]
)
_LETTER = re.compile(r"\(?([A-J])\)?")
_LABEL = re.compile(
    r"(?:\\(?:text(?:bf|rm)?|mathrm|mathbf)\s*\{\s*\(?(?P<styled>[A-J])[).]?\s*\)?\s*\}"
    r"|\((?P<plain>[A-J])\))(?:\\[,;: ]|~|\s)*(?P<rest>.*)",
    re.DOTALL,
)
_ABOUT_WORD = re.compile(r"(?:approximately|about|around|roughly|nearly|almost|approx\.?)\s+")
_LENGTH = re.compile(r"(?<![A-Za-z])(?:[cmk]?m|ft|in)\}?\s*(?:\^\s*\{?([23])\}?)?[\s}]*$")
_ABOUT = re.compile(r"(?:\\approx|\u2248|~|\\sim)\s*")
_CURRENCY = re.compile(
    r"^(?:\\text\{\s*(?:Rs\.?|USD)\s*\}|\\\$|\$|\u20ac|\u00a3|\u00a5|\u20b9|\\pounds|Rs\.?(?=\s*\d))\s*"
)
_PERCENT = re.compile(r"\s*(?:\\?%|\bpercent|\\text\{\s*(?:\\?%|percent)\s*\})$")
_SLASH = re.compile(
    r"(?<![\w}])([A-Za-z]|\d+)\s*/\s*(\d+|[A-Za-z])(?=\s*(?!(?:and|or)\b)(?:[A-Za-z(]"
    r"|\\(?:pi|sqrt|frac|theta|alpha|beta|sin|cos|tan|ln|log|left)(?![A-Za-z])))"
)
_BARE_LOG = re.compile(r"\\log(?!\s*_)(?![A-Za-z])")
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_NAME = re.compile(
    r"(?:\\(?:text(?:bf|it|rm)?|mathrm|mbox)\s*\{(?P<styled>[^{}=]*)\}"
    r"|(?P<plain>[A-Za-z]{2,}(?: [A-Za-z]+)*))"
    r"\s*=\s*(?P<value>[^=]+)",
    re.DOTALL,
)
"""A quantity by its name: cost = 5. One letter is the grammar's."""
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|mathrm|mbox)\s*\{([^{}]*)\}")
_COMMAND = re.compile(r"\\[A-Za-z]+\*?(?:\{(?:equation|align|[pbvBV]?matrix|array|cases)\*?\})?")
_GAP = re.compile(r"\s+(?![A-Za-z0-9.])|(?<![A-Za-z0-9.,])\s+")
"""White space that parts no two words or numbers."""
_ODD_NOTATION = re.compile(r"[\d)}]!!|(?<![\w.])0[xXbBoO][0-9A-Fa-f]+(?!\w)")
"""Double factorials, and numbers as programs write them in other bases."""
_SCALED = re.compile(r"-?[$\u20ac\u00a3]?\s*\d[\d.,]*\s*(?:[kKMB]|bn|mn)")
_DOTTED = re.compile(r"-?\d{1,3}(?:\.\d{3}){2,}")
_COMMA = re.compile(r"-?\d+,(?:\d{1,2}|\d{4,})")
_RATIO = re.compile(r"\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+")
_PLAIN_TEXT = re.compile(r"[A-Za-z0-9 .:'-]+")
_MOST_WORDS = 4


def judge(given: str, wanted: str, ask: Ask) -> Judged:
    """Whether an answer is the reference.

    Args:
        given: The answer as written.
        wanted: The reference as written.
        ask: Compares what needs algebra. What it raises is passed on.
    """
    long = max(len(given), len(wanted)) > 4 * LONGEST_EXPRESSION
    given, wanted = (given, wanted) if long else (shell(given), shell(wanted))
    as_written = _as_written(given, wanted, ask)
    if as_written is not None:
        return as_written
    about = [_ABOUT_WORD.match(text) for text in (given, wanted)]
    if any(about):
        given, wanted = (
            text[m.end() :] if m else text for text, m in zip((given, wanted), about, strict=True)
        )
        equal = judge(given, wanted, ask).equal
        return Judged(True if equal else None, "an answer that says it is not exact")
    alike = _same_unit(given, wanted)
    if not alike and _power(given) and _power(wanted) and _power(given) != _power(wanted):
        equal = judge(without_unit(given), without_unit(wanted), ask).equal
        return Judged(equal and None, "other units")
    (name, given), (other, wanted) = _named(given), _named(wanted)
    if name and other and name != other:
        equal = judge(given, wanted, ask).equal
        return Judged(equal and None, "the values of two names")
    decided = _plainly(given, wanted)
    if decided is not None:
        return decided
    choices = [_LETTER.fullmatch(tidy(text)) for text in (given, wanted)]
    if choices[0] and choices[1] and "(" in given + wanted:
        return Judged(choices[0][1] == choices[1][1])
    letters = [_labelled(text) for text in (given, wanted)]
    for (letter, _), other in ((letters[0], wanted), (letters[1], given)):
        alone = _LETTER.fullmatch(tidy(other))
        if letter and alone:
            return Judged(letter == alone[1])
    if letters[0][0] or letters[1][0]:
        return judge(letters[0][1], letters[1][1], ask)
    return _algebraically(given, wanted, ask)


def _as_written(given: str, wanted: str, ask: Ask) -> Judged | None:
    """Equal texts, and numbers with another language's separators; None of all others."""
    if given and _GAP.sub("", given) == _GAP.sub("", wanted):
        return Judged(True)
    if max(len(given), len(wanted)) > 4 * LONGEST_EXPRESSION:
        return Judged(None, "an answer is too long")
    if _ODD_NOTATION.search(given) or _ODD_NOTATION.search(wanted):
        return Judged(None, "a notation that is not read")
    for one, other in permutations((given, wanted)):
        if _SCALED.fullmatch(tidy(one)) and not re.search(r"[A-Za-z]", other):
            return Judged(None, "a letter may be a scale")
    grouped = [_DOTTED.fullmatch(text) for text in (given, wanted)]
    if any(grouped):
        given, wanted = (
            text.replace(".", "") if dots else text
            for text, dots in zip((given, wanted), grouped, strict=True)
        )
        return Judged(judge(given, wanted, ask).equal or None, "points may part thousands")
    if any(_comma_decimal(one, other) for one, other in permutations((given, wanted))):
        return Judged(None, "a comma may part decimals")
    return None


def _comma_decimal(text: str, other: str) -> bool:
    """Whether a text is the other's number if its comma parts decimals: 3,5 beside 3.5."""
    if not _COMMA.fullmatch(text):
        return False
    left, right = parse_quantity(text.replace(",", ".")), parse_quantity(other)
    return left is not None and right is not None and left.value == right.value


def _plainly(given: str, wanted: str) -> Judged | None:
    """Equality where it needs no algebra; None where it does."""
    measures = measured(given), measured(wanted)
    if measures[0] and measures[1] and _unit(measures[0]) != _unit(measures[1]):
        sizes = measures[0].size, measures[1].size
        if measures[0].kind != measures[1].kind or None in sizes:
            return Judged(None, "other units")
        return Judged(sizes[0] == sizes[1])
    left = parse_quantity(given) or parse_quantity(without_unit(given))
    right = parse_quantity(wanted) or parse_quantity(without_unit(wanted))
    if left is not None and right is not None:
        return _quantities(left, right, wanted)
    if _text(given) == _text(wanted):
        return Judged(True)
    if _RATIO.fullmatch(given) or _RATIO.fullmatch(wanted):
        return _ratios(given, wanted)
    said = begins(given, wanted)
    if said is not None:
        equal = {"equal": True, "unequal": False, "open": None}[said]
        return Judged(equal, "words may change the number")
    return _words(given, wanted)


def _same_unit(given: str, wanted: str) -> bool:
    measures = measured(given), measured(wanted)
    return bool(measures[0] and measures[1] and _unit(measures[0]) == _unit(measures[1]))


def _unit(measure: Measured) -> tuple[tuple[tuple[str, int], ...], Fraction]:
    return measure.kind, measure.factor


def _text(text: str) -> str:
    """A text for comparing it as such: LaTeX commands keep their case."""
    return " ".join(text.split()) if "\\" in text else answer_key(text)


def _quantities(left: Quantity, right: Quantity, wanted: str) -> Judged:
    """Plain numbers, exactly; a reference that shows its digits may be rounded."""
    if equal_quantities(left, right):
        return Judged(True)
    pairs = [(left.value, right.value)]
    if left.percent != right.percent:
        pairs.append((left.value / 100 if left.percent else left.value * 100, right.value))
    digits = re.search(r"(\d*)\.(\d+)(?!\d*[/eE\d])", tidy(wanted))
    if digits is None:
        return Judged(False)
    places, shown = len(digits[2]), len((digits[1] + digits[2]).lstrip("0"))
    unit = Fraction(1, 10**places)
    found: set[bool | None] = {_rounds(a, b, unit, places > 1 or shown > 2) for a, b in pairs}
    equal = True if True in found else None if None in found else False
    return Judged(equal, "the reference may be rounded")


def _rounds(value: Fraction, rounded: Fraction, unit: Fraction, may_be: bool) -> bool | None:
    """Whether a decimal may be a value, rounded; None if only cut, or with too few digits."""
    distance = abs(value - rounded)
    ends = 10**60 % value.denominator == 0
    if distance <= unit / 2:
        return True if may_be else False if ends else None
    return None if may_be and not ends and distance < unit and abs(value) > abs(rounded) else False


def _ratios(given: str, wanted: str) -> Judged:
    """Ratios and times of day: 2:4 is 1:2 as a ratio, and not as a time."""
    both = _RATIO.fullmatch(given) and _RATIO.fullmatch(wanted)
    if not both:
        return Judged(None, "a ratio or a time of day on one side")
    left, right = ([Fraction(p.strip()) for p in text.split(":")] for text in (given, wanted))
    if left == right:
        return Judged(True)
    same = len(left) == len(right) and all(
        a * right[0] == b * left[0] and a * b for a, b in zip(left, right, strict=True)
    )
    return Judged(None, "a ratio or a time of day") if same else Judged(False)


def _words(given: str, wanted: str) -> Judged | None:
    """Answers in words: equal texts were found before, and short other ones differ.

    Open where one has words that the other lacks ("New York", "New York City"), where only one is
    in words, and among the ways of saying that there is nothing.
    """
    texts = [_unworded(text) for text in (given, wanted)]
    prose = [_is_prose(text) for text in texts]
    if not any(prose):
        return None
    plain = [" ".join(tidy(text).casefold().split()).strip("'\" ") for text in texts]
    if plain[0] == plain[1]:
        return Judged(True)
    if any(plain[0] in one and plain[1] in other for one, other in permutations(_YES_NO)):
        return Judged(False)
    letters = [sorted(text) for text in plain]
    if letters[0] == letters[1] and len(letters[0]) < 4 and "\\text" not in given + wanted:
        return Judged(None, "words, or products of letters")  # abc and cba
    if _joint(plain[0]) == _joint(plain[1]):
        return Judged(None, "words that are joined or not")
    names = [set(text.replace("-", " ").split()) for text in plain]
    short = all(map(_PLAIN_TEXT.fullmatch, plain)) and max(map(len, names)) <= _MOST_WORDS
    nested = names[0] <= names[1] or names[1] <= names[0]
    if not all(prose) or not short or nested or any(text in _SAYING for text in plain):
        return Judged(None, "words that can't be compared")
    return Judged(False)


def _joint(text: str) -> str:
    """A text without what parts its words."""
    return re.sub(r"[\s-]", "", text)


_YES_NO = (frozenset(["yes", "true", "correct"]), frozenset(["no", "false", "incorrect"]))
_SAYING = _YES_NO[0] | _YES_NO[1] | frozenset(
    ["none", "no solution", "no solutions", "does not exist", "dne",
     "undefined", "empty set", "nothing", "impossible", "infinite", "infinity"]
)  # fmt: skip
"""Answers in words that other words may say as well."""


def _unworded(text: str) -> str:
    r"""A text with words out of their text commands, if it is words alone: \text{red} is red."""
    return _TEXT.sub(r" \1 ", without_unit(text))


def _is_prose(text: str) -> bool:
    """Whether a text has a word of two letters or more standing alone that no formula has.

    To an algebra system "red" is r*e*d. Two letters alone are a product: xy.
    """
    bare = _COMMAND.sub(" ", text)
    words = [w for w in _SOME_WORD.findall(bare) if w.lower() not in _MATH_WORDS]
    if len(bare.split()) == 1 and "\\" not in text and re.fullmatch(r"\d*[a-z]{2}", bare.strip()):
        return False
    glued = re.search(r"[=+*/^<>(){}\\]", text)
    return any(len(word) > (3 if glued else 1) for word in words)


def _power(text: str) -> str:
    """The power of the length that an answer is measured in: cm^2; empty where it names none."""
    found = _LENGTH.search(text)
    return "" if found is None else found[1] or "1"


def _named(text: str) -> tuple[str, str]:
    """The name in front of a value, if there is one, and the value: Area = 25."""
    match = _NAME.fullmatch(text)
    if match is None:
        return "", text
    return (match["styled"] or match["plain"]).strip().casefold(), match["value"].strip()


def _labelled(text: str) -> tuple[str | None, str]:
    """The letter of a choice in front of an answer, and the answer: (C) 12."""
    match = _LABEL.fullmatch(text)
    if match is None or not match["rest"].strip():
        return None, text
    return match["styled"] or match["plain"], match["rest"].strip()


@dataclass(frozen=True)
class _Side:
    """One answer as expressions.

    Attributes:
        readings: Any of which may be meant, and one that is equal is enough: 50% is 50 and 1/2.
        doubts: Groups of readings of which nobody can tell which one is meant: 1/2x.
        about: Whether it says that it is not exact.
    """

    readings: tuple[str, ...]
    doubts: tuple[str, ...]
    about: bool


def _algebraically(given: str, wanted: str, ask: Ask) -> Judged:
    sides = [_side(given, wanted), _side(wanted, given)]
    found: list[bool | None] = []
    for doubtful in (False, True):
        texts = [(side.doubts if doubtful and side.doubts else side.readings) for side in sides]
        if doubtful and not (sides[0].doubts or sides[1].doubts):
            break
        longest = max(map(len, (*texts[0], *texts[1])))
        if longest > LONGEST_EXPRESSION:
            return Judged(None, "too long")
        answers = []
        for reference in texts[1]:
            for answer in texts[0]:
                answers.append(True if answer == reference else ask(reference, answer))
                if answers[-1]:
                    break
        found.append(True if True in answers else None if None in answers else False)
    if len(set(found)) > 1:
        return Judged(None, "it may be read in several ways")
    equal = found[0]
    if equal is False and (sides[0].about or sides[1].about):
        return Judged(None, "an answer that says it is not exact")
    return Judged(equal, "an answer can't be read")


def _side(text: str, other: str) -> _Side:
    about = _ABOUT.match(text)
    text = (text[about.end() :] if about else text).replace("\u00b0", "^\\circ ")
    approximated = re.split(r"\\approx|\u2248", text)
    if len(approximated) == 2:
        named = re.fullmatch(r"\s*[A-Za-z](?:_\{?\w+\}?)?\s*", approximated[0])
        text = approximated[1 if named else 0]
        about = about or named
    text = _CURRENCY.sub("", text.strip())
    percent = _PERCENT.search(text)
    text = without_unit(text[: percent.start()] if percent else text)
    degrees = re.search(rf"(?:{DEGREES})\s*(?:[CF]\b)?$", text)
    degrees = None if _FUNCTION.search(text) else degrees
    text = text[: degrees.start()] if degrees else text
    plain = normalise(text)
    readings = [plain]
    if percent and not _PERCENT.search(other):
        readings.append(f"\\frac{{{plain}}}{{100}}")
    if degrees and "\\pi" in other + normalise(other):
        readings.append(f"\\frac{{({plain}) \\cdot \\pi}}{{180}}")
    doubted = _SLASH.sub(r"\\frac{\1}{\2}", text)
    if "\\ln" in other:
        doubted = _BARE_LOG.sub(r"\\ln ", doubted)
    doubts = (normalise(doubted),) if doubted != text else ()
    return _Side(tuple(readings), doubts, about is not None)
