r"""Worked solutions, step by step: which is the first step whose arithmetic is false?

A step is a sentence of a line. Equations are read where they stand: GSM8K's calculator marks
`<<48/2=24>>` (Cobbe et al. 2021, arXiv 2110.14168), and what is written out, `12 clips * 3 = 36`,
`20% of 50 = 10`, `\frac{1}{2} \times 8 = 4`, chains `a = b = c` and running totals `2*3 = 6+1 = 7`.
Values are exact fractions; a decimal on the right may be the value rounded or cut to its places.
Nothing is evaluated by Python.

An equation that can't be read with certainty counts as neither right nor false: letters that stand
for numbers, two sides in different units ("2 hours = 120 minutes"), percents added to plain
numbers, a quotient rounded or cut to a whole number. A step that is named is
false as it is written; that none is named proves nothing: a wrong step may have right arithmetic.

Boxes that hold a step's result, and no final answer.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from siftline.scoring.answers.expressions import Pair, Reader, Token, tokens


@dataclass(frozen=True)
class Candidate:
    """One span that a response gives as its final answer.

    Attributes:
        start: Where its mark begins, in the response without its reasoning.
        end: Where it ends.
        text: The answer as written, without its mark.
        parts: The answers that it is a list of, or may be read as; empty for a single one.
    """

    start: int
    end: int
    text: str
    parts: tuple[str, ...] = ()


_LEAD = r"^[ \t>#*_]*"
_STEP = re.compile(
    _LEAD + r"(?:steps?[ \t]+(?:\d+|[ivx]+|one|two|three|four|five|six)\b|\d{1,2}[.)](?=[\s*_])"
    r"|(?:first|second|third|next|then)(?:ly)?\b[,:])",
    re.IGNORECASE | re.MULTILINE,
)
_HEADING = re.compile(r"^[ \t]*(?:#{1,6}[ \t]|\*\*[^*\n]+\*\*[ \t]*:?[ \t]*$)", re.MULTILINE)
_PART = re.compile(_LEAD + r"(?:\([a-h]\)|[a-h]\)|parts?[ \t]+\(?[a-h1-9]\b)", re.I | re.MULTILINE)
_TAKEN_BACK = re.compile(
    r"\b(?:wait|actually|hold on|correct(?:ion|ed|ing)|mistake|reflection|instead|error|wrong|"
    r"incorrect|(?:re|double)[- ]?check\w*|reconsider\w*|alternatively|however|but no)\b",
    re.IGNORECASE,
)
_ANSWER = re.compile(r"(?<![A-Za-z])(?:answers?|final|solutions?)(?![A-Za-z])", re.IGNORECASE)
_CLOSES = re.compile(
    r"(?<![A-Za-z])(?:answers?|final(?:ly)?|therefore|thus|hence|so|conclusion|altogether|in total)"
    r"(?![A-Za-z])",
    re.IGNORECASE,
)
_BREAK = re.compile(r"\n[ \t]*\n")
_DRESS = re.compile(r"\\[\[\]()]|[\s$.*_#>]|\\begin\{\w+\*?\}|\\end\{\w+\*?\}")

_NEAR = 400
"""Characters before a box in which a word may call it the answer."""


def without_steps(
    boxes: Sequence[Candidate], others: Sequence[int], text: str
) -> Iterator[Candidate]:
    """The boxes but for those of steps, where the response ends in a closing statement.

    Args:
        boxes: In order.
        others: Where other marks of a final answer begin.
        text: The response without its reasoning.
    """
    places = sorted([*(box.start for box in boxes), *others])
    if len(places) < 2 or not boxes or not _is_closing(text, places[-1]):
        yield from boxes
        return
    marks = _marks(text)
    starts = [start for start, _ in marks]
    if _PART.search(text) or _TAKEN_BACK.search(text, boxes[0].start):
        yield from boxes
        return
    for box in boxes:
        at = bisect_right(starts, box.start) - 1
        section = text[max(starts[at], box.start - _NEAR) : box.start] if at >= 0 else ""
        is_step = at >= 0 and marks[at][1] and not _ANSWER.search(section)
        if box.start == places[-1] or not is_step:
            yield box


def _marks(text: str) -> list[tuple[int, bool]]:
    """Where sections begin, and whether each is a step."""
    steps = {match.start() for match in _STEP.finditer(text)}
    found = steps | {match.start() for match in _HEADING.finditer(text)}
    return sorted((start, start in steps) for start in found)


def _is_closing(text: str, place: int) -> bool:
    """Whether the mark at a place is what the response ends with, and says that it ends there.

    It stands in the last paragraph; alone, or behind a word like "therefore" or "final answer". A
    last paragraph that is a step of its own has to speak of the answer.
    """
    breaks = [match.end() for match in _BREAK.finditer(text.rstrip())]
    steps = [match.start() for match in _STEP.finditer(text)]
    start = max([0, *(b for b in (*breaks, *steps) if b <= place)])
    if any(b > place for b in (*breaks, *steps)):
        return False
    before = text[start:place]
    if _STEP.match(text, start):
        return bool(_ANSWER.search(before)) or bool(_ANSWER.match(text, place))
    return not _DRESS.sub("", before) or bool(_CLOSES.search(text[start : place + 12]))


LONGEST_STEP = 2000
"""Characters beyond which a step is not read: it is no sentence."""
LONGEST_SIDE = 80
"""Tokens of one side of an equation beyond which it is not read."""
_LABELS = frozenset(["step", "day", "part", "question", "number", "no", "case", "method", "week"])
_MARK = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_REMAINDER = re.compile(r"remain|left ?over|whole|full|complete|round", re.IGNORECASE)
_LIST_NUMBER = re.compile(r"\(?\d{1,3}[.)]")


@dataclass(frozen=True)
class Trace:
    """Where a solution goes wrong.

    Attributes:
        first_error: The first step, counted from 0, with a false equation; None without one.
        last_right: The last right result before the false equation, as written; None without one.
        equations: Equations that were read up to there.
    """

    first_error: int | None
    last_right: str | None
    equations: int


@dataclass(frozen=True)
class Equation:
    """One equation, its result as written, and whether it holds; None where that is not certain."""

    result: str
    holds: bool | None


def steps(solution: str) -> list[str]:
    """Splits a solution into its sentences, line by line; a list's number stays with its item."""
    found: list[str] = []
    for line in solution.splitlines():
        pieces = [piece for piece in _SENTENCE.split(line.strip()) if piece]
        if len(pieces) > 1 and _LIST_NUMBER.fullmatch(pieces[0]):
            pieces[:2] = [f"{pieces[0]} {pieces[1]}"]
        found += pieces
    return found


def trace(solution: str) -> Trace:
    """Finds the first step of a solution with a false equation, and what was right before it."""
    right, read = None, 0
    for index, step in enumerate(steps(solution)):
        for equation in equations(step):
            read += equation.holds is not None
            if equation.holds is False:
                return Trace(index, right, read)
            if equation.holds:
                right = equation.result
    return Trace(None, right, read)


def equations(step: str) -> list[Equation]:
    """Reads the equations of one step, calculator marks first; none of one that is too long."""
    if len(step) > LONGEST_STEP:
        return []
    found = [_compare(tokens(m[1]), tokens(m[2]), whole=True) for m in _MARK.finditer(step)]
    remainder = _REMAINDER.search(step) is not None
    for part in re.split(r"[;≈≠<>≤≥]|->|→", _MARK.sub("", step)):
        sides = list(_sides(tokens(part))) if "=" in part else []
        for i, (left, right) in enumerate(pairwise(sides)):
            found.append(_compare(left, right, running=i + 2 < len(sides), remainder=remainder))
    return [equation for equation in found if equation is not None]


def _sides(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    side: list[Token] = []
    for token in tokens:
        if token.kind == "equals":
            yield side
            side = []
        else:
            side.append(token)
    yield side


@dataclass(frozen=True)
class _Side:
    """An expression of one side: its value, and what decides whether it may be judged."""

    value: Pair
    reader: Reader

    @property
    def sure(self) -> bool:
        """False where it can be read in several ways, or a percent is added to a plain number."""
        reader = self.reader
        adds = {"+", "-"} & set(reader.operators)
        mixed = 0 < reader.percents < len(reader.operands) or len(reader.measures) > 1
        return not (reader.unsure or (mixed and adds))


def _before(tokens: Sequence[Token], whole: bool) -> _Side | None:
    """The expression that ends with the last token; words in front of it are prose."""
    if len(tokens) > LONGEST_SIDE:
        return None
    for start in range(1 if whole else len(tokens)):
        if not whole and not _may_start(tokens, start):
            continue
        reader = Reader(tokens[start:])
        value = reader.sum()
        if value is not None and reader.peek() == "end":
            # "The area of 4 rooms = 4 * 9": a number alone is the left side only if all of it is.
            worded = any(token.kind == "word" for token in tokens)
            reader.unsure |= not reader.operators and worded
            return _Side(value, reader)
    return None


def _may_start(tokens: Sequence[Token], start: int) -> bool:
    first = tokens[start]
    sign = first.text == "-" and not first.free and first.spaced
    if not (sign or first.kind in ("number", "mixed", "currency", "open")):
        return False
    if not start:
        return True
    behind = start - 1
    while behind >= 0 and tokens[behind].kind in ("word", "open"):
        behind -= 1
    if behind >= 0 and tokens[behind].kind == "op":
        return False  # an operand in front of it was not read: 25 classmates + his 1 teacher
    last = tokens[start - 1]
    word = last.text.lower()
    variable = last.kind == "word" and len(word) == 1 and word not in ("a", "i")
    glued = last.kind == "other" and not first.spaced and not last.spaced  # 6:00, 16,0000
    joined = word == "and" and start > 1 and tokens[start - 2].kind == "number"  # 1 and 1/4
    other = last.kind in ("op", "number", "close", "currency", "percent")
    return not (variable or glued or joined or other or word.rstrip("s") in _LABELS)


def _behind(tokens: Sequence[Token], whole: bool) -> _Side | None:
    """The longest expression that begins with the first token; words behind it are prose."""
    reader = Reader(tokens[:LONGEST_SIDE], right=True)
    value = reader.sum()
    if value is None or (whole and reader.peek() != "end"):
        return None
    rest = tokens[reader.at :]
    # An operator without a number behind it goes on in letters, unless it is a dash in prose.
    dash = rest and rest[0].text == "-" and rest[0].free and rest[0].spaced
    if rest and (rest[0].kind in ("op", "number", "mixed", "percent", "open") and not dash):
        return None
    return _Side(value, reader)


def _compare(
    left: Sequence[Token],
    right: Sequence[Token],
    whole: bool = False,
    running: bool = False,
    remainder: bool = False,
) -> Equation | None:
    """Judges `left = right`; None where they are not two expressions with something to compute."""
    a, b = _before(left, whole), _behind(right, whole)
    if a is None or b is None or not (a.reader.operators or b.reader.operators):
        return None
    operands = b.reader.operands
    result = operands[-1][1]
    same = _same(a.value, b.value, None if b.reader.operators else result)
    if not same and running and b.reader.operators:
        same = _same(a.value, operands[0][0], operands[0][1])
    if same:
        return Equation(result, True)
    first, second = a.reader.measures, b.reader.measures
    differ = bool(first and second and not first & second)
    differ |= b.reader.percents > 0 and not (a.reader.percents or a.reader.operators)
    off, to_whole = a.value[0] - b.value[0], b.value[0].denominator == 1
    cut = remainder and 0 < off < 1 and to_whole
    # A quotient that does not come out may be rounded, or cut, to a whole number: 100/3 = 33.
    divided = "/" in a.reader.operators and not b.reader.operators and a.value[0].denominator != 1
    cut |= divided and to_whole and (0 < off < 1 or abs(off) <= Fraction(1, 2))
    return Equation(result, None if differ or cut or not (a.sure and b.sure) else False)


def _same(left: Pair, right: Pair, written: str | None) -> bool:
    """Equality under one reading of the percents; a decimal as written may be rounded or cut."""
    for a, b in ((left[0], right[0]), (left[0], right[1]), (left[1], right[1])):
        if a == b:
            return True
        places = len(written.rstrip("%").partition(".")[2]) if written else 0
        if places:
            # At percents the shown number is compared at its own scale.
            scale = Fraction(1, 100) if written and written.endswith("%") and b == right[0] else 1
            unit = Fraction(1, 10**places) * scale
            if abs(a - b) <= unit / 2 or (abs(a) > abs(b) and abs(a - b) < unit and a * b >= 0):
                return True
    return False
