"""Responses held to a regular expression."""

from functools import cache

from siftline.scoring.answers.find import extract_answer
from siftline.scoring.verifiers.constraints import Constraint
from siftline.scoring.verifiers.text import final_text
from siftline.scoring.verifiers.verdict import Verdict


class RegexVerifier:
    """Matches final answers against a regular expression, the reference answer.

    The whole final answer has to match: the marked one (see `extract_answer`), or the response
    without white space around it where nothing is marked. The syntax is Python's `re`; flags stand
    in the expression, `(?i)yes|no`. One that is no regular expression, or that takes too long
    (catastrophic backtracking), gives `verifier_error`.
    """

    def __init__(self, timeout: float = 2.0) -> None:
        """Makes a verifier; its child process starts with the first response.

        Args:
            timeout: Seconds one match may take; a sound expression takes milliseconds.

        Raises:
            ValueError: if timeout is not positive.
        """
        if not timeout > 0:
            raise ValueError(f"timeout must be positive, not {timeout}: give seconds, e.g. 2")
        self._constraint = Constraint("regex", timeout)

    def __call__(self, response: str, answer: str) -> Verdict:
        """Judges `response` against the expression `answer`."""
        response = final_text(response)
        marked = extract_answer(response)
        extracted = (response if marked is None else marked).strip() or None
        if not answer:
            return Verdict(None, extracted, "no_reference")
        if extracted is None:
            return Verdict(None, None, "no_final_answer")
        return self._constraint.verdict(answer, extracted)

    def close(self) -> None:
        """Ends the child process, if one was started."""
        self._constraint.close()


@cache
def plain_regex() -> RegexVerifier:
    """One for the process, since each keeps a child process."""
    return RegexVerifier()
