r"""Boxes that hold a step's result, and no final answer.

Models box what a step gives, and box the answer at the end. Public graders take the last box,
whatever stands before it. Here the last one wins only where the text's own structure says so: it
stands in a closing statement, and every box that gives way stands under a mark of a step ("Step 2",
"2.", "First,") and is called no answer. A response that takes something back, or has parts (a) and
(b), keeps all of its boxes: then nobody can tell which one is meant.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


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
