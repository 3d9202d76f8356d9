"""Verifies draws: by a verifier, or by a model that is asked whether two answers are the same."""

from collections.abc import Callable, Sequence

from siftline.rows.schema import canonical_text
from siftline.scoring.answers.find import extract_answer
from siftline.scoring.engines.base import Generation
from siftline.scoring.measures.pairwise import verdict_against_reference
from siftline.scoring.recorder import Recorder
from siftline.scoring.verifiers import Verdict, get_verifier
from siftline.stages.rejection_sampling.options import JUDGE, NONE
from siftline.stages.rejection_sampling.problems import Problem

Grader = Callable[[Sequence[tuple[Problem, Generation]]], list[Verdict]]
"""Verdicts on draws, against the answer of the problem each was drawn for."""


def grader(verifier: str, judge: Callable[[], Recorder]) -> Grader:
    """A grader by the verifier's name.

    Args:
        verifier: "judge", "none", or a name that `get_verifier` knows.
        judge: Opens the judge; called only where it is asked.
    """
    return _by_model(judge()) if verifier == JUDGE else by_verifier(verifier)


def outside(verifier: str) -> bool:
    """Whether a verifier may answer in the next run what it did not answer in this one.

    A judge is a model, and what a verifier by import path asks is not known; the others fail by
    what they are given.
    """
    return verifier == JUDGE or ":" in verifier


def by_verifier(name: str) -> Grader:
    """A grader that asks no model; for "none" one that takes every draw."""
    if name == NONE:
        return lambda draws: [
            Verdict(True, extract_answer(given.text), "unverified") for _, given in draws
        ]
    check = get_verifier(name)

    def grade(draws: Sequence[tuple[Problem, Generation]]) -> list[Verdict]:
        return [check(canonical_text(text.text), p.parent["answer"]) for p, text in draws]

    return grade


def _by_model(recorder: Recorder) -> Grader:
    """Both orders of draw and reference must get the same reply; an open verdict keeps no draw."""

    def grade(draws: Sequence[tuple[Problem, Generation]]) -> list[Verdict]:
        by_bucket: dict[int, list[int]] = {}
        for i, (problem, _) in enumerate(draws):
            by_bucket.setdefault(problem.home.bucket, []).append(i)
        found: dict[int, Verdict] = {}
        for bucket, places in sorted(by_bucket.items()):
            asked = {}
            for i in places:
                problem, text = draws[i]
                row = problem.parent
                name = f"{row['prompt_id']} {i:08d}"
                asked[name] = (row["messages"], canonical_text(text.text), row["answer"])
            verdicts = verdict_against_reference(recorder, bucket, asked)
            found |= {i: verdicts[f"{draws[i][0].parent['prompt_id']} {i:08d}"] for i in places}
        return [found[i] for i in range(len(draws))]

    return grade
