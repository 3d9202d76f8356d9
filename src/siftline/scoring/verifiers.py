"""Verifiers: does a response reach the reference answer?

A verifier is a callable of (response, answer). It never raises on what it reads: an answer that can
not be compared gives `correct=None` and says why, and only `correct=False` is a disproof. Numbers,
nearly all of the work, are compared exactly in-process; the rest goes to math-verify in a child
process (see `equivalence`). Nothing evaluates a response.
"""

import importlib
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, cast

from siftline.scoring.answers import (
    Quantity,
    answer_key,
    extract_answer,
    parse_quantity,
    tidy,
)
from siftline.scoring.equivalence import Equivalence, EquivalenceError

LONGEST_EXPRESSION = 500
"""Characters beyond which an unequal pair is not sent to math-verify; real answers are shorter."""
# A word standing alone that no formula has: names, times of day, yes and no are compared as text,
# since to an algebra system "red" is r*e*d and the pm of "5 pm" a unit to drop.
_PROSE = re.compile(r"(?:^|\s)(?!(?:and|or|pi|sqrt|sin|cos|tan|log|ln|exp)\b)[A-Za-z]{2,}(?=\s|$)")


@dataclass(frozen=True)
class Verdict:
    """What a verifier found.

    Attributes:
        correct: True or False where it could decide, else None.
        extracted: The response's final answer as written; None if it has none.
        reason: `match`, `wrong_answer`, `no_final_answer`, `no_reference`, or
            `verifier_error: <what happened>`.
    """

    correct: bool | None
    extracted: str | None
    reason: str


_OPTION = re.compile(
    r"(?:option |choice )?[(\[]?(?P<letter>[A-Za-z])(?:[)\].:](?P<rest>.*)|)",
    re.IGNORECASE | re.DOTALL,
)
_OTHER_OPTION = re.compile(r"^\s*(?:or|and|/|,)\s*[(\[]?[A-Za-z][)\].:]?\s*$|[(\[][A-Z][)\]]")


class Verifier(Protocol):
    """Checks one response against one reference answer."""

    def __call__(self, response: str, answer: str) -> Verdict:
        """Judges `response` against `answer`; never raises on what they contain."""
        ...


class MathVerifier:
    """Compares final answers of mathematical responses.

    Exact numbers are decided by value; `50%` matches 50 and 0.5 when only one side is a percentage.
    Equal text matches. What is left, e.g. `x+1` and `1+x`, is compared by math-verify.

    Attributes:
        strict: Take only marked final answers (see `extract_answer`).
    """

    def __init__(self, timeout: float = 5.0, strict: bool = True) -> None:
        """Makes a verifier; no process starts before an expression needs one.

        Args:
            timeout: Seconds one comparison by math-verify may take; 5 is its own default.
            strict: See the class.

        Raises:
            ValueError: if timeout is not positive.
        """
        if not timeout > 0:
            raise ValueError(f"timeout must be positive, not {timeout}: give seconds, e.g. 5")
        self.strict = strict
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
        if correct is None:
            if max(len(extracted), len(reference)) > LONGEST_EXPRESSION:
                return Verdict(None, extracted, "verifier_error: expression too long")
            try:
                correct = self._equivalence(tidy(reference), tidy(extracted))
            except EquivalenceError as error:
                return Verdict(None, extracted, f"verifier_error: {error}")
        return Verdict(correct, extracted, "match" if correct else "wrong_answer")

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


def _equal_quantities(left: Quantity, right: Quantity) -> bool:
    if left.value == right.value:
        return True
    if left.percent == right.percent:
        return False
    percent, plain = (left, right) if left.percent else (right, left)
    return percent.value / 100 == plain.value


class ExactVerifier:
    """Compares whole responses as text: for classification and short-answer tasks.

    Unicode form, case, white space, surrounding quotes and a final full stop do not count.
    """

    def __call__(self, response: str, answer: str) -> Verdict:
        """Judges `response` against `answer`."""
        given, wanted = _plain(response), _plain(answer)
        if not wanted:
            return Verdict(None, given or None, "no_reference")
        if not given:
            return Verdict(None, None, "no_final_answer")
        correct = given == wanted
        return Verdict(correct, given, "match" if correct else "wrong_answer")


class ChoiceVerifier:
    """Compares the letters of multiple-choice answers.

    The response's letter is that of its marked final answer (see `extract_answer`), or of the whole
    response if it begins with one: `B`, `(b)`, `B. Paris`, `#### B`, "the answer is (B)". A letter
    that only begins a word or a sentence ("A dog") is none, and neither are two ("B or C").
    """

    def __call__(self, response: str, answer: str) -> Verdict:
        """Judges `response` against `answer`."""
        wanted, given = _chosen(answer), _chosen(response)
        if wanted is None:
            return Verdict(None, given, "no_reference")
        if given is None:
            return Verdict(None, None, "no_final_answer")
        return Verdict(given == wanted, given, "match" if given == wanted else "wrong_answer")


def _chosen(text: str) -> str | None:
    """The letter of a text's final answer; "A: Paris" is option A, and no answer behind an A."""
    marked = extract_answer(text)
    named = _letter(text) if text.lstrip()[:2].upper() == "A:" else None
    return named or _letter(text if marked is None else marked)


def _letter(text: str) -> str | None:
    """The letter of an option as it is written in front of it; None where there is not just one."""
    text = unicodedata.normalize("NFKC", text).strip().strip("*_`\"' ")
    found = _OPTION.fullmatch(text)
    if found is None or _OTHER_OPTION.search(found["rest"] or ""):
        return None
    return found["letter"].upper()


def _plain(text: str) -> str:
    words = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return words.strip("\"'`").removesuffix(".").strip("\"'` ")


@cache
def _plain_math() -> MathVerifier:
    """One for the process, since each keeps a child process for the comparisons."""
    return MathVerifier()


def verify_math(response: str, answer: str) -> Verdict:
    r"""Whether a response's marked final answer is the reference answer.

    Takes `#### 18`, a line `A: 18`, `\boxed{18}`, "the answer is 18"; units and other words after
    the number, thousands commas, currency, percent, fractions, negatives. Strict: without a mark
    there is no final answer, and `correct` is None.

    Args:
        response: The response's text.
        answer: The reference; a whole worked solution counts by its own marked answer.
    """
    return _plain_math()(response, answer)


def get_verifier(name: str) -> Verifier:
    """Returns the verifier of that name.

    Args:
        name: `math`, `exact`, `choice`, or an import path `package.module:attribute` of a verifier,
            or of a class whose instances are verifiers.

    Raises:
        ValueError: if the name is unknown, can't be imported, or is not callable.
    """
    if name == "math":
        return _plain_math()
    if name == "exact":
        return ExactVerifier()
    if name == "choice":
        return ChoiceVerifier()
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(
            f"unknown verifier {name!r}: use math, exact, choice or an import path "
            "package.module:attribute"
        )
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"verifier {name!r} can't be imported: {error}") from error
    made = found() if isinstance(found, type) else found
    if not callable(made):
        raise ValueError(f"verifier {name!r} is not callable: give a function (response, answer)")
    return cast(Verifier, made)
