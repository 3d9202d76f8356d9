"""Final answers of mathematical responses: exact numbers here, expressions in a child process."""

import re
from functools import cache
from typing import Literal

from siftline.scoring.answers import (
    NOT_UNITS,
    SCALES,
    Quantity,
    answer_key,
    extract_answer,
    leading_quantity,
    parse_quantity,
    tidy,
)
from siftline.scoring.equivalence import Equivalence, EquivalenceError
from siftline.scoring.expressions import Reader, tokens
from siftline.scoring.steps import trace
from siftline.scoring.verifiers.verdict import Verdict

LONGEST_EXPRESSION = 500
"""Characters beyond which an unequal pair is not sent to math-verify; real answers are shorter."""
# A word standing alone that no formula has: names, times of day, yes and no are compared as text,
# since to an algebra system "red" is r*e*d and the pm of "5 pm" a unit to drop.
_PROSE = re.compile(r"(?:^|\s)(?!(?:and|or|pi|sqrt|sin|cos|tan|log|ln|exp)\b)[A-Za-z]{2,}(?=\s|$)")
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


class MathVerifier:
    """Compares final answers of mathematical responses.

    Exact numbers are decided by value; `50%` matches 50 and 0.5 when only one side is a percentage.
    Equal text matches. Words behind an equal number (`18 apples left over`, `18, since 3*6=18`) are
    a match if they are a unit or a reason; where they may change the number it is no final answer,
    but not a wrong one. What is left, e.g. `x+1` and `1+x`, is compared by math-verify. A
    refuted response is searched for its first false equation (`scoring.steps`).

    Attributes:
        strict: Take only marked final answers (see `extract_answer`).
        steps: Whether refuted responses are searched.
    """

    def __init__(self, timeout: float = 5.0, strict: bool = True, steps: bool = True) -> None:
        """Makes a verifier; no process starts before an expression needs one.

        Args:
            timeout: Seconds one comparison by math-verify may take; 5 is its own default.
            strict: See the class.
            steps: See the class.

        Raises:
            ValueError: if timeout is not positive.
        """
        if not timeout > 0:
            raise ValueError(f"timeout must be positive, not {timeout}: give seconds, e.g. 5")
        self.strict, self.steps = strict, steps
        self._equivalence = Equivalence(timeout)

    def __call__(self, response: str, answer: str) -> Verdict:
        """Judges `response` against `answer`, which may itself be a marked solution."""
        extracted = extract_answer(response, self.strict)
        reference = extract_answer(answer) or answer
        if not reference.strip():
            return Verdict(None, extracted, "no_reference")
        if extracted is None:
            return Verdict(None, None, "no_final_answer")
        correct = _exactly(extracted, reference)
        if not correct:
            begins = _begins(extracted, reference)
            if begins == "open":
                return Verdict(None, None, "no_final_answer")
            correct = correct if begins is None else True
        if correct is None:
            if max(len(extracted), len(reference)) > LONGEST_EXPRESSION:
                return Verdict(None, extracted, "verifier_error: expression too long")
            try:
                correct = self._equivalence(tidy(reference), tidy(extracted))
            except EquivalenceError as error:
                return Verdict(None, extracted, f"verifier_error: {error}")
        if correct:
            return Verdict(True, extracted, "match")
        if not self.steps:
            return Verdict(False, extracted, "wrong_answer")
        found = trace(response)
        return Verdict(False, extracted, "wrong_answer", found.first_error, found.last_right)

    def close(self) -> None:
        """Ends the comparison process, if one was started."""
        self._equivalence.close()


def _exactly(extracted: str, reference: str) -> bool | None:
    """Equality where it needs no algebra; None where it does."""
    left, right = parse_quantity(extracted), parse_quantity(reference)
    if left is not None and right is not None:
        return _equal_quantities(left, right)
    if answer_key(extracted) == answer_key(reference):
        return True
    prose = _PROSE.search(tidy(extracted)) or _PROSE.search(tidy(reference))
    return False if prose else None


def _begins(extracted: str, reference: str) -> Literal["equal", "open"] | None:
    """Whether one side is a number and the other begins with it; None where it does not.

    "open" where what stands behind the number may change it, join it to another, or can't be read.
    """
    left, right = parse_quantity(extracted), parse_quantity(reference)
    if (left is None) == (right is None):
        return None
    number = right if left is None else left
    found = leading_quantity(extracted if left is None else reference)
    if number is None or found is None:
        return None
    begun, rest = found
    words = re.findall(r"[a-z]{2,}", rest.lower())
    if re.match(r"[\s-]*[a-z]", rest, re.IGNORECASE) and words[:1] and words[0] in _FACTORS:
        return "open"  # 5 dozen may be 60, and may not
    bracket = re.match(r"\s+[(\[]", rest) is not None
    worded = re.match(r"[\s,;:-]*[A-Za-z]{2}", rest) or _UNIT.match(rest)
    if not _equal_quantities(begun, number) or not (bracket or worded):
        return None
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


def _computes(rest: str, number: Quantity) -> bool:
    """Whether a bracket behind a number computes it: 18 (3*6)."""
    reader = Reader(tokens(rest.strip()[1:-1]))
    value = reader.sum()
    if value is None or reader.peek() != "end" or rest.rstrip()[-1] not in ")]":
        return False
    return bool(reader.operators) and number.value in value


def _equal_quantities(left: Quantity, right: Quantity) -> bool:
    if left.value == right.value:
        return True
    if left.percent == right.percent:
        return False
    percent, plain = (left, right) if left.percent else (right, left)
    return percent.value / 100 == plain.value


@cache
def plain_math(steps: bool = True) -> MathVerifier:
    """One of each for the process, since they keep a child process for the comparisons."""
    return MathVerifier(steps=steps)


def verify_math(response: str, answer: str) -> Verdict:
    r"""Whether a response's marked final answer is the reference answer.

    Takes `#### 18`, a line `A: 18`, `\boxed{18}`, "the answer is 18"; units and other words after
    the number, thousands commas, currency, percent, fractions, negatives. Strict: without a mark
    there is no final answer, and `correct` is None.

    Args:
        response: The response's text.
        answer: The reference; a whole worked solution counts by its own marked answer.
    """
    return plain_math()(response, answer)
