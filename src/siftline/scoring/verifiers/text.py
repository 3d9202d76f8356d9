"""Responses compared as text."""

import re

from siftline.kernels.text.normalization import normalized
from siftline.scoring.answers.reasoning import without_reasoning
from siftline.scoring.verifiers.verdict import Verdict

LONGEST_TEXT = 1_000_000
"""Characters of a response beyond which it is not compared."""
_WRAPPED = re.compile(r"\s*<(answer|final_?answer|response|output)>(.*)</\1>\s*", re.I | re.DOTALL)


class ExactVerifier:
    """Compares whole responses as text: for classification and short-answer tasks.

    Reasoning blocks are left out. Unicode form, case, white space, surrounding quotes and a final
    full stop do not count.
    """

    def __call__(self, response: str, answer: str) -> Verdict:
        """Judges `response` against `answer`."""
        if len(response) > LONGEST_TEXT:
            return Verdict(None, None, f"unreadable: {len(response)} characters are too many")
        given, wanted = _plain(final_text(response)), _plain(answer)
        if not wanted:
            return Verdict(None, given or None, "no_reference")
        if not given:
            return Verdict(None, None, "no_final_answer")
        correct = given == wanted
        return Verdict(correct, given, "match" if correct else "wrong_answer")


class VerbatimVerifier:
    """Compares whole responses letter by letter: for code, identifiers, quotations, formats.

    Reasoning blocks are left out. Case, quotes and spaces count. Only what the pool itself does not
    keep does not: Unicode's composed or decomposed form, Windows' line ends, white space around the
    text.
    """

    def __call__(self, response: str, answer: str) -> Verdict:
        """Judges `response` against `answer`."""
        from siftline.rows.schema import (
            canonical_text,  # needs pyarrow, which the sandbox's part has not
        )

        if len(response) > LONGEST_TEXT:
            return Verdict(None, None, f"unreadable: {len(response)} characters are too many")
        given, wanted = canonical_text(without_reasoning(response)), canonical_text(answer)
        if not wanted:
            return Verdict(None, given or None, "no_reference")
        if not given:
            return Verdict(None, None, "no_final_answer")
        return Verdict(given == wanted, given, "match" if given == wanted else "wrong_answer")


def final_text(response: str) -> str:
    """A response without its reasoning, and without `<answer>` tags around all of it."""
    left = without_reasoning(response)
    wrapped = _WRAPPED.fullmatch(left)
    return wrapped[2] if wrapped and f"</{wrapped[1]}>" not in wrapped[2] else left


def _plain(text: str) -> str:
    words = " ".join(normalized("NFKC", text).casefold().split())
    return words.strip("\"'`").removesuffix(".").strip("\"'` ")
