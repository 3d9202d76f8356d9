"""Responses compared as text, and the letters of multiple-choice answers."""

import re
import unicodedata

from siftline.scoring.answers import extract_answer
from siftline.scoring.verifiers.verdict import Verdict

_OPTION = re.compile(
    r"(?:option |choice )?[(\[]?(?P<letter>[A-Za-z])(?:[)\].:](?P<rest>.*)|)",
    re.IGNORECASE | re.DOTALL,
)
_OTHER_OPTION = re.compile(
    r"^\s*(?:or|and|/|,)\s*[(\[]?[A-Za-z][)\].:]?\s*$|[(\[][A-Z][)\]]|\n\s*[(\[]?[A-Za-z][)\].:]"
)
_SENTENCES = re.compile(r"[.!?]\s+\S")
"""More than one sentence: reasoning, which may end at another letter than it begins with."""


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


class VerbatimVerifier:
    """Compares whole responses letter by letter: for code, identifiers, quotations, formats.

    Case, quotes and spaces count. Only what the pool itself does not keep does not: Unicode's
    composed or decomposed form, Windows' line ends, white space around the text.
    """

    def __call__(self, response: str, answer: str) -> Verdict:
        """Judges `response` against `answer`."""
        from siftline.schema import (
            canonical_text,
        )  # needs pyarrow, which the sandbox's part has not

        given, wanted = canonical_text(response), canonical_text(answer)
        if not wanted:
            return Verdict(None, given or None, "no_reference")
        if not given:
            return Verdict(None, None, "no_final_answer")
        return Verdict(given == wanted, given, "match" if given == wanted else "wrong_answer")


class ChoiceVerifier:
    """Compares the letters of multiple-choice answers.

    The response's letter is that of its marked final answer (see `extract_answer`), or of the whole
    response if it begins with one: `B`, `(b)`, `B. Paris`, `#### B`, "the answer is (B)". A letter
    that only begins a word or a sentence ("A dog") or several sentences ("B. is wrong. It is
    C.") is none, and neither are two ("B or C").
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
    """The letter of a text's final answer; "A: Paris" is option A, and "A: B" an answer B."""
    if text.lstrip()[:2].upper() == "A:":
        behind = text.lstrip()[2:]
        marked = extract_answer(behind)
        return _letter(marked) if marked is not None else _letter(behind) or _letter(text)
    marked = extract_answer(text)
    return _letter(text if marked is None else marked)


def _letter(text: str) -> str | None:
    """The letter of an option as it is written in front of it; None where there is not just one."""
    text = unicodedata.normalize("NFKC", text).strip().strip("*_`\"' ")
    found = _OPTION.fullmatch(text)
    rest = found["rest"] or "" if found else ""
    if found is None or _OTHER_OPTION.search(rest) or _SENTENCES.search(rest):
        return None
    return found["letter"].upper()


def _plain(text: str) -> str:
    words = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return words.strip("\"'`").removesuffix(".").strip("\"'` ")
