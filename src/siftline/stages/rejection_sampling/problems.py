"""Prompts that can be sampled, what their draws were worth, and the rows that come of them.

Verifies draws: by a verifier, or by a model that is asked whether two answers are the same.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa

from siftline.rows import schema
from siftline.rows.schema import canonical_text
from siftline.scoring.answers.find import extract_answer
from siftline.scoring.engines.base import Generation
from siftline.scoring.measures.consistency import final_answer, prompts_of
from siftline.scoring.measures.degenerate import degenerate
from siftline.scoring.measures.pairwise import DISAGREE, verdict_against_reference
from siftline.scoring.recorder import Recorder
from siftline.scoring.verifiers import Verdict, get_verifier
from siftline.stages.rejection_sampling.difficulty import DRAWS
from siftline.stages.rejection_sampling.drawing import Prompt
from siftline.stages.rejection_sampling.options import JUDGE, NONE, SOURCE

JUDGED = {
    **DRAWS,
    "n_tokens": pl.Int64,
    "reason": pl.String,  # match, wrong_answer …; truncated, repetitive, wrong_language
    "error": pl.String,  # what the verifier failed by; null where it said something
    "refuted": pl.Boolean,  # whole, and its answer is another one
    "first_error": pl.Int64,
    "last_right": pl.String,
}
FAULTS = ("truncated", "repetitive", "wrong_language")
"""Reasons of draws that no verifier is asked about."""
NEGATIVES = ("prompt_id", "draw", "text", "answer_key", "first_error", "last_right")


@dataclass(frozen=True)
class Problem:
    """A prompt that can be sampled: where its draws lie, and the row it descends from."""

    home: Prompt
    parent: dict[str, Any]

    @property
    def text(self) -> str:
        """What stands before the response."""
        return "\n".join(m["content"] or "" for m in self.parent["messages"][:-1])


@dataclass(frozen=True)
class Judgement:
    """Draws that count (`JUDGED`), and `prompt_id, target, status` of the trials."""

    draws: pl.DataFrame
    targets: pl.DataFrame


def problems_of(
    model: Recorder, buckets: Iterable[tuple[int, pa.Table]], verifier: str
) -> tuple[dict[str, Problem], dict[str, int]]:
    """Prompts with one independent answer, by prompt id; counts of those left out.

    Args:
        model: Whose tokens, template and length the prompts get.
        buckets: Rows by store bucket.
        verifier: Name of the verifier, which says when two reference answers are the same; "none"
            takes prompts with any answer, or without one.
    """
    problems: dict[str, Problem] = {}
    skipped = {"no_independent_answer": 0, "conflicting_answers": 0, "too_long": 0}
    for bucket, rows in buckets:
        tokens, unfit = prompts_of(model, rows)
        by_prompt: dict[str, list[dict[str, Any]]] = {}
        for row in rows.to_pylist():  # sorted by id, so the parent is the smallest
            by_prompt.setdefault(row["prompt_id"], []).append(row)
        for prompt, answers in by_prompt.items():
            proven = [r for r in answers if r["answer_from"] == "independent"]
            if verifier == NONE:
                if prompt in unfit:
                    skipped[unfit[prompt]] = skipped.get(unfit[prompt], 0) + 1
                else:
                    problems[prompt] = Problem(Prompt(bucket, tokens[prompt]), answers[0])
            elif not proven:
                skipped["no_independent_answer"] += 1
            elif len({_reference(r["answer"], verifier) for r in proven}) > 1:
                skipped["conflicting_answers"] += 1
            elif prompt in unfit:
                skipped[unfit[prompt]] = skipped.get(unfit[prompt], 0) + 1
            else:
                problems[prompt] = Problem(Prompt(bucket, tokens[prompt]), proven[0])
    return problems, skipped


def _reference(answer: str, verifier: str) -> str | None:
    """What makes two reference answers the same."""
    if verifier == "math":
        return final_answer(f"#### {answer}", "math")
    if verifier in ("json_schema", "instructions"):
        try:
            return schema.digest(json.loads(answer))
        except ValueError:
            return answer
    return schema.canonical_text(answer)


def fault_of(problem: Problem, given: Generation, *, screen: bool) -> str | None:
    """Why a draw is no answer, whatever it says: cut, or degenerate where that is looked for."""
    text = schema.canonical_text(given.text)
    if given.finish_reason != "stop" or not text:
        return "truncated"
    return degenerate(text, problem.text) if screen else None


UNJUDGED = Verdict(None, None, "unjudged")
"""The verdict on a draw with a fault: nobody asks."""


def judge_draw(
    problem: Problem, draw: int, given: Generation, fault: str | None, verdict: Verdict
) -> dict[str, Any]:
    """One line of `JUDGED`: whether a draw is whole, sound and verified."""
    text = schema.canonical_text(given.text)
    kind, _, error = verdict.reason.partition(":")
    failed = fault is None and kind == "verifier_error" and error.strip() != DISAGREE
    return {
        "prompt_id": problem.parent["prompt_id"],
        "draw": draw,
        "text": text,
        "answer_key": verdict.extracted,
        "correct": fault is None and verdict.correct is True,
        "dedup_key": " ".join(text.lower().split()),
        "n_tokens": given.n_tokens,
        "reason": fault or kind,
        "error": error.strip() if failed else None,
        "refuted": fault is None and verdict.correct is False,
        "first_error": verdict.first_error,
        "last_right": verdict.last_right,
    }


def added_rows(
    problems: Mapping[str, Problem], draws: pl.DataFrame, taken: pl.DataFrame
) -> list[dict[str, Any]]:
    """Rows of the accepted draws, columns of `schema.ADDED`, by prompt and draw."""
    accepted = taken.filter("accepted").join(draws, on=["prompt_id", "draw"])
    rows = []
    for line in accepted.sort("prompt_id", "draw").to_dicts():
        parent = problems[line["prompt_id"]].parent
        row = schema.make_row(
            [*parent["messages"][:-1], schema.message("assistant", line["text"])],
            # What was read off the parent's response says nothing about another one.
            answer=parent["answer"] if parent["answer_from"] == "independent" else None,
            answer_from="independent",
            source=SOURCE,
            tools=parent["tools"],
        )
        origin = f"rejection_sampling draw {line['draw']}"
        rows.append({**row, "parent_id": parent["id"], "origin": origin})
    return rows


def negatives(judged: Judgement, most: int) -> pl.DataFrame:
    """The first distinct refuted draws of each prompt, columns `NEGATIVES`."""
    refuted = judged.draws.filter("refuted").sort("prompt_id", "draw")
    distinct = refuted.unique(["prompt_id", "dedup_key"], keep="first", maintain_order=True)
    place = pl.int_range(pl.len()).over("prompt_id")
    return distinct.filter(place < most).select(NEGATIVES)


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
