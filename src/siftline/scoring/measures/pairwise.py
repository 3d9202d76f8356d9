"""A model as judge of two answers: which is better, and whether they are the same.

Judges favour a place, so every pair is asked in both orders and a verdict stands only where both
agree. Replies are the log-probabilities of A and B, recorded facts like all others; a judge without
usable ones costs the pair its verdict and is counted, it stops nothing. Pairs that the engine
refuses are found by asking in halves, so none loses its verdict to a neighbour.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from siftline.scoring.answers.find import extract_answer
from siftline.scoring.measures.consistency import about_answers
from siftline.scoring.measures.judge import ask_choices
from siftline.scoring.recorder import REFUSED, Recorder
from siftline.scoring.verifiers import Verdict

logger = logging.getLogger(__name__)

VERSION = 1
BETTER = (
    "{prompt}\nAnswer A: {first}\nAnswer B: {second}\nWhich answer is better?\n"
    "(A) answer A\n(B) answer B"
)
SAME = (
    "{prompt}\nAnswer 1: {first}\nAnswer 2: {second}\nDo both come to the same final answer?\n"
    "(A) yes\n(B) no"
)
REPLIES = ("A", "B")
MALFORMED = "malformed"
"""Reason of a reply that is not one finite log-probability for A and one for B."""
DISAGREE = "the orders disagree"
"""What an open verdict of a judge says that answered, and by place."""

Pair = tuple[Sequence[Mapping[str, Any]], str, str]
"""A conversation, whose last message is ignored, and two answers to it."""
Question = tuple[Sequence[Mapping[str, Any]], Sequence[str]]
"""As `ask_choices` takes it."""
Winner = Literal["candidate", "original"]


def preference(as_second: float, as_first: float) -> tuple[Winner | None, float | None]:
    """The verdict of both orders together.

    Args:
        as_second: Probability that the judge prefers the candidate where it is shown second.
        as_first: The same where it is shown first.

    Returns:
        Who wins in both orders, and the mean probability of that choice; (None, None) where the
        orders disagree or one is undecided.
    """
    both = np.array([as_second, as_first], np.float64)
    if (both > 0.5).all():
        return "candidate", float(both.mean())
    if (both < 0.5).all():
        return "original", float((1.0 - both).mean())
    return None, None


@dataclass(frozen=True)
class Preference:
    """What a judge said of an original and a candidate.

    Attributes:
        verdict: Who won in both orders; None where they disagree or a reply is missing.
        confidence: Mean probability of that choice over the orders; None without a verdict.
        as_second: Probability that the candidate is better where it is shown second.
        as_first: The same where it is shown first.
        reason: Why a reply is missing; None where both are there.
    """

    verdict: Winner | None
    confidence: float | None
    as_second: float | None
    as_first: float | None
    reason: str | None = None


def prefer(recorder: Recorder, bucket: int, asked: Mapping[str, Pair]) -> dict[str, Preference]:
    """Asks which of an original and a candidate is better, for pairs of one store bucket.

    Args:
        recorder: The judge.
        bucket: Store bucket of all ids.
        asked: By id: conversation, original, candidate.

    Returns:
        A preference for every id. Where every pair has the reason `refused`, it may be the call
        that is wrong, not the pairs: a caller that has asked about all can tell.
    """
    found = {}
    for i, told in _both_orders(recorder, "pairwise", BETTER, bucket, asked).items():
        if isinstance(told, str):
            found[i] = Preference(None, None, None, None, told)
            continue
        as_second, as_first = 1.0 - told[0], told[1]
        found[i] = Preference(*preference(as_second, as_first), as_second, as_first)
    return found


def verdict_against_reference(
    recorder: Recorder, bucket: int, asked: Mapping[str, Pair]
) -> dict[str, Verdict]:
    """Asks whether a response comes to the reference answer, for pairs of one store bucket.

    Args:
        recorder: The judge.
        bucket: Store bucket of all ids.
        asked: By id: conversation, response, reference answer.

    Returns:
        A verdict for every id. It is open (`correct` None) where there is nothing to compare, the
        orders disagree, or the judge gave no usable reply; the last two are `verifier_error`s.
    """
    found = {}
    pairs = {}
    for i, (messages, response, reference) in asked.items():
        if not reference.strip():
            found[i] = Verdict(None, extract_answer(response), "no_reference")
        elif not response.strip():
            found[i] = Verdict(None, None, "no_final_answer")
        else:
            pairs[i] = (messages, response, reference)
    for i, told in _both_orders(recorder, "same_answer", SAME, bucket, pairs).items():
        extracted = extract_answer(asked[i][1])
        if isinstance(told, str):
            found[i] = Verdict(None, extracted, f"verifier_error: {told}")
        elif min(told) > 0.5:
            found[i] = Verdict(True, extracted, "match")
        elif max(told) < 0.5:
            found[i] = Verdict(False, extracted, "wrong_answer")
        else:
            found[i] = Verdict(None, extracted, f"verifier_error: {DISAGREE}")
    return found


def _both_orders(
    recorder: Recorder, scorer: str, question: str, bucket: int, asked: Mapping[str, Pair]
) -> dict[str, tuple[float, float] | str]:
    """By id the probability of A in the given order and in the other, or why there is none."""
    questions = {}
    for i, (messages, one, other) in asked.items():
        for order, (first, second) in enumerate(((one, other), (other, one))):
            about = about_answers(messages, question, first=first, second=second)
            questions[f"{i} {order}"] = (about, REPLIES)
    replies, failed = _told(recorder, scorer, bucket, questions)
    found: dict[str, tuple[float, float] | str] = {}
    for i in asked:
        shares = [_share(replies.get(f"{i} {order}")) for order in (0, 1)]
        if shares[0] is not None and shares[1] is not None:
            found[i] = (shares[0], shares[1])
        else:
            found[i] = failed.get(f"{i} 0") or failed.get(f"{i} 1") or MALFORMED
    return found


def _told(
    recorder: Recorder, scorer: str, bucket: int, questions: Mapping[str, Question]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Replies and reasons; of questions that are refused together, each half is asked alone."""
    try:
        return ask_choices(recorder, scorer, VERSION, bucket, questions, lead_in=True)
    except ValueError as error:  # a whole batch was refused, or answered in no form to be read
        refusal = error
    if len(questions) == 1:
        logger.warning("%s: question refused: %s", scorer, refusal)
        return {}, dict.fromkeys(questions, REFUSED)
    names = list(questions)
    replies: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for half in (names[: len(names) // 2], names[len(names) // 2 :]):
        found, reasons = _told(recorder, scorer, bucket, {i: questions[i] for i in half})
        replies |= found
        failed |= reasons
    return replies, failed


def _share(logprobs: Sequence[float] | None) -> float | None:
    """Probability of A among A and B; None where the reply holds no such thing."""
    if logprobs is None or len(logprobs) != len(REPLIES):
        return None
    scores = np.asarray(logprobs, np.float64)
    if not np.isfinite(scores).all():
        return None
    odds = np.exp(scores - scores.max())
    return float(odds[0] / odds.sum())
