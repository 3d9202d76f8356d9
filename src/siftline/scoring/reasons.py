"""Reasons for having no answer: those that lie in the question, and those worth another try."""

from collections.abc import Iterable

from siftline.scoring.omissions import OMISSIONS

FINAL = frozenset({"too_long", "template_error", *OMISSIONS, "no_text", "cut", "empty"})
"""The same question would have the same reason again. All others (a refusal, a lost connection, a
reply that can't be read) may end with the next run."""


def unanswered(reasons: Iterable[str]) -> int:
    """How many of the reasons are not final: a stage with such ones is not done."""
    return sum(reason not in FINAL for reason in reasons)
