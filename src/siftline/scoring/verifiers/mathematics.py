"""Final answers of mathematical responses.

They are found (`scoring.answers`), then judged (`scoring.equality`): two steps that know nothing of
each other.
"""

import re
from functools import cache

from siftline.scoring.answers import Candidate, extract_answer, find_answers
from siftline.scoring.equality import LONGEST_EXPRESSION, Judged, judge
from siftline.scoring.equivalence import Equivalence, EquivalenceError
from siftline.scoring.steps import trace
from siftline.scoring.verifiers.verdict import Verdict

__all__ = ["LONGEST_EXPRESSION", "MathVerifier", "plain_math", "verify_math"]


class MathVerifier:
    """Compares final answers of mathematical responses.

    A match and a mismatch are proven; what can't be read, and what may be meant in several ways, is
    open. Exact numbers are decided by value; `50%` matches 50 and 0.5 when only one side is a
    percentage; a reference that is a decimal may be rounded, to the digits that it shows. Words
    behind an equal number (`18 apples left over`, `18, since 3*6=18`) are a match if they are a
    unit or a reason. Expressions are read by math-verify. Of several final answers all have to
    match for a match, and none for a mismatch. A refuted response is searched for its first false
    equation (`scoring.steps`).

    Attributes:
        strict: Take only marked final answers (see `scoring.answers.find_answers`).
        steps: Whether refuted responses are searched.
    """

    def __init__(self, timeout: float = 5.0, strict: bool = True, steps: bool = True) -> None:
        """Makes a verifier; no process starts before an expression needs one.

        Args:
            timeout: Seconds of processor time that one comparison of expressions may take; 5 is
                math-verify's own default.
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
        found = self._found(response)
        extracted = found[-1].text if found else None
        reference = extract_answer(answer) or answer
        if not reference.strip():
            return Verdict(None, extracted, "no_reference")
        if extracted is None:
            return Verdict(None, None, "no_final_answer")
        try:
            judged = [self._judged(candidate, reference) for candidate in found]
            if len(found) > 1 and not any(verdict.equal for verdict in judged):
                judged.append(self._together(found, reference))
        except EquivalenceError as error:
            return Verdict(None, extracted, f"verifier_error: {error}")
        equal = {verdict.equal for verdict in judged}
        if equal == {True}:
            return Verdict(True, extracted, "match")
        if equal != {False}:
            several = len(equal) > 1
            why = "several final answers" if several else judged[-1].why
            if why == "too long":
                return Verdict(None, extracted, "verifier_error: expression too long")
            return Verdict(None, extracted, f"unreadable: {why}")
        if not self.steps:
            return Verdict(False, extracted, "wrong_answer")
        traced = trace(response)
        return Verdict(False, extracted, "wrong_answer", traced.first_error, traced.last_right)

    def _found(self, response: str) -> tuple[Candidate, ...]:
        found = find_answers(response)
        if found or self.strict:
            return found
        last = extract_answer(response, strict=False)
        return () if last is None else (Candidate(0, len(response), last),)

    def _judged(self, candidate: Candidate, reference: str) -> Judged:
        """A list matches as a list. If only one of its parts does, nobody can tell."""
        judged = judge(candidate.text, reference, self._equivalence)
        if judged.equal or not candidate.parts:
            return judged
        parts = [judge(part, reference, self._equivalence).equal for part in candidate.parts]
        if True in parts or None in parts:
            return Judged(None, "one of several answers")
        return judged

    def _together(self, found: tuple[Candidate, ...], reference: str) -> Judged:
        """Several answers refute a list only if they are not what it lists."""
        text = ", ".join(candidate.text for candidate in found)
        listed = "," in reference or re.search(r"\band\b|;", reference)
        equal = judge(text, reference, self._equivalence).equal if listed else False
        return Judged(None if equal else False, "answers that stand apart from each other")

    def close(self) -> None:
        """Ends the comparison process, if one was started."""
        self._equivalence.close()


@cache
def plain_math(steps: bool = True) -> MathVerifier:
    """One of each for the process, since they keep a child process for the comparisons."""
    return MathVerifier(steps=steps)


def verify_math(response: str, answer: str) -> Verdict:
    r"""Whether a response's marked final answer is the reference answer.

    Takes `#### 18`, a line `A: 18`, `\boxed{18}`, "the answer is 18", a heading; units and other
    words after the number, thousands commas, currency, percent, fractions, negatives. Strict:
    without a mark there is no final answer, and `correct` is None.

    Args:
        response: The response's text.
        answer: The reference; a whole worked solution counts by its own marked answer.
    """
    return plain_math()(response, answer)
