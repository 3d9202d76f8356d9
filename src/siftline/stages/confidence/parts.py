"""The parts of confidence, scored row by row: samples, similarities, verdicts, likelihood.

Rows are those in play, planted ones, and answers to dev prompts whose truth is known.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import pyarrow as pa

from siftline.ingest.pool import Pool
from siftline.progress import Progress
from siftline.rows import schema
from siftline.scoring.measures.consistency import (
    SAMPLED,
    Held,
    Similar,
    agreements,
    cosines,
    final_answer,
    overlaps,
    prompts_of,
    reflections,
    sampled_answers,
)
from siftline.scoring.measures.samples import draw_samples
from siftline.scoring.recorder import Recorder, unanswered
from siftline.scoring.verifiers.verdict import Verifier
from siftline.stages.confidence.calibration import (
    too_few,
)
from siftline.stages.confidence.decide import PARTS, consistency
from siftline.stages.confidence.options import Confidence
from siftline.stages.context import Context, by_store_bucket
from siftline.stages.models import over_buckets

DEV_DRAWS = 2
"""Draws per dev prompt whose truth is known; they come behind the samples they are held against."""
_ROWS = pa.schema([f.with_nullable(True) for f in schema.ADDED])


@dataclass
class Scores:
    """Parts by name and row id, why rows failed, and how often samples were right by prompt.

    Attributes:
        parts: Values in [0, 1]; a row that lacks a part is not in it.
        failed: Reason by id of rows that could not be asked about.
        solved: Samples that came to the independent answer, and samples, by prompt id.
        lost: Reason by id of rows that lack a part which asks another model, by part.
    """

    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    solved: dict[str, tuple[int, int]] = field(default_factory=dict)
    lost: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, other: "Scores") -> None:
        """Takes in what was found for other rows."""
        for part, values in other.parts.items():
            self.parts.setdefault(part, {}).update(values)
        self.failed.update(other.failed)
        self.solved.update(other.solved)
        for part, reasons in other.lost.items():
            self.lost.setdefault(part, {}).update(reasons)

    def unanswered(self) -> int:
        """Values of rows that did not fail, which another try may give."""
        lost = (reasons.items() for reasons in self.lost.values())
        return unanswered(why for items in lost for i, why in items if i not in self.failed)

    def frame(self, ids: Sequence[str], parts: Sequence[str]) -> pl.DataFrame:
        """What the gate reads about those of the rows that did not fail."""
        sound = [i for i in ids if i not in self.failed]
        columns = {part: [self.parts.get(part, {}).get(i) for i in sound] for part in parts}
        types = {"id": pl.String, **dict.fromkeys(parts, pl.Float64)}
        return pl.DataFrame({"id": sound, **columns}, schema=types)


def score_parts(
    context: Context,
    options: Confidence,
    buckets: Sequence[tuple[int, pa.Table]],
    weights: Mapping[str, float],
    likely: Mapping[str, float] | None = None,
) -> Scores:
    """Every part that has a weight, for the rows of store buckets.

    Args:
        context: The stage.
        options: The stage's.
        buckets: Rows by store bucket.
        weights: Weight by part.
        likely: The perplexity part by id; None takes it from the stages before this one.
    """
    wanted = [part for part in PARTS if weights.get(part, 0.0) > 0]
    scores = Scores()
    if any(part in SAMPLED for part in wanted):
        _score_sampled(context, options, buckets, wanted, scores)
    if "reflection" in wanted:
        _score_reflection(context, options, buckets, scores)
    if "perplexity" in wanted:
        known = _likelihoods(context) if likely is None else likely
        ids = [i for _, rows in buckets for i in rows.column("id").to_pylist()]
        scores.parts["perplexity"] = {i: known[i] for i in ids if i in known}
    for i, why in scores.lost.get("reflection", {}).items():
        if not any(i in values for values in scores.parts.values()):
            scores.failed.setdefault(i, why)  # nothing else is known of it
    return scores


def score_with_stand_in(
    context: Context,
    options: Confidence,
    buckets: Sequence[tuple[int, pa.Table]],
    weights: Mapping[str, float],
    likely: Mapping[str, float] | None = None,
) -> Scores:
    """`score_parts`, and the stand-in for rows that nothing could be compared of by final answer.

    Models of the stand-in are opened only where there are such rows.
    """
    part = options.stand_in if weights.get("agreement") else None
    asked = {name: weight for name, weight in weights.items() if name != part}
    scores = score_parts(context, options, buckets, asked, likely)
    if part is None:
        return scores
    compared = {*scores.parts.get("agreement", {}), *scores.failed}
    bare = []
    for bucket, rows in buckets:
        lacks = [i not in compared for i in rows.column("id").to_pylist()]
        if any(lacks):
            bare.append((bucket, rows.filter(pa.array(lacks))))
    if bare:
        scores.add(score_parts(context, options, bare, {part: 1.0}))
    return scores


def _score_sampled(
    context: Context,
    options: Confidence,
    buckets: Sequence[tuple[int, pa.Table]],
    wanted: Sequence[str],
    scores: Scores,
) -> None:
    prompts = sum(len(set(rows.column("prompt_id").to_pylist())) for _, rows in buckets)
    label = f"{context.stage.name} samples"
    progress = Progress(label, prompts * options.samples, context.emit, "draws")
    opened = {"sampler": context.recorders("sampler", progress)}
    beside = Progress(f"{context.stage.name} similarity", 0, context.emit, "texts")
    if "embedding" in wanted:
        opened["embedding"] = context.recorders("embedder", beside)
    if "nli" in wanted:
        opened["nli"] = context.opened.recorders(
            context.spec("nli"), context.workspace.store, beside.advance, head="classifier"
        )
    # As many workers as the role with the fewest devices has.
    workers = [
        dict(zip(opened, worker, strict=True)) for worker in zip(*opened.values(), strict=False)
    ]

    def work(worker: dict[str, Recorder], bucket: int, rows: pa.Table) -> Scores:
        return _held_against_samples(worker, bucket, rows, options, wanted)

    for _, found in over_buckets(workers, buckets, work):
        scores.add(found)
    progress.close()
    if len(opened) > 1:
        beside.close()


def _held_against_samples(
    worker: Mapping[str, Recorder],
    bucket: int,
    rows: pa.Table,
    options: Confidence,
    wanted: Sequence[str],
) -> Scores:
    """Draws samples once per prompt and holds every response of it against them."""
    sampler, scores = worker["sampler"], Scores()
    tokens, unfit = prompts_of(sampler, rows)
    draws = {prompt: range(options.samples) for prompt in tokens}
    drawn, lost = draw_samples(sampler, bucket, tokens, draws, options.sampling, options.seed)
    unfit |= lost
    answers = sampled_answers(drawn, options.answers)
    texts: dict[str, list[str]] = {}
    for prompt, text in drawn.select("prompt_id", "text").iter_rows():
        texts.setdefault(prompt, []).append(text)
    agreement: dict[str, float] = {}
    held: dict[str, Held] = {}
    columns = ["id", "prompt_id", "messages", "answer", "answer_from"]
    lines = rows.select(columns).to_pylist()
    for row in lines:
        if row["prompt_id"] in unfit:
            scores.failed[row["id"]] = unfit[row["prompt_id"]]
            continue
        own = row["messages"][-1]["content"]
        share = consistency(answers[row["prompt_id"]], final_answer(own, options.answers))
        if share is not None:
            agreement[row["id"]] = share
        before = "\n".join(m["content"] or "" for m in row["messages"][:-1])
        held[row["id"]] = Held(before, own, texts[row["prompt_id"]])
    scores.solved = _solved(lines, answers, options)
    similar: dict[str, Callable[[], Similar]] = {
        "agreement": lambda: (agreement, {}),
        "jaccard": lambda: (overlaps(held), {}),
        "embedding": lambda: cosines(worker["embedding"], bucket, held),
        "nli": lambda: agreements(worker["nli"], bucket, held),
    }
    for part in SAMPLED:
        if part in wanted:
            scores.parts[part], scores.lost[part] = similar[part]()
    return scores


def _solved(
    lines: Sequence[Mapping[str, Any]], answers: Mapping[str, list], options: Confidence
) -> dict[str, tuple[int, int]]:
    """How many samples of a prompt came to its independent answer; not where there are several."""
    references: dict[str, set[str | None]] = {}
    for row in lines:
        if row["answer"] is not None and row["answer_from"] == "independent":
            marked = f"#### {row['answer']}" if options.answers == "math" else row["answer"]
            key = final_answer(marked, options.answers)
            references.setdefault(row["prompt_id"], set()).add(key)
    found = {}
    for prompt, keys in references.items():
        if len(keys) == 1 and None not in keys and answers.get(prompt):
            (key,) = keys
            found[prompt] = (answers[prompt].count(key), len(answers[prompt]))
    return found


def _score_reflection(
    context: Context,
    options: Confidence,
    buckets: Sequence[tuple[int, pa.Table]],
    scores: Scores,
) -> None:
    total = options.questions * sum(rows.num_rows for _, rows in buckets)
    progress = Progress(f"{context.stage.name} verdicts", total, context.emit)

    def judge(
        recorder: Recorder, bucket: int, rows: pa.Table
    ) -> tuple[dict[str, float], dict[str, str]]:
        asked = {r["id"]: (r["messages"], r["messages"][-1]["content"]) for r in rows.to_pylist()}
        return reflections(recorder, bucket, asked, options.questions)

    found = scores.parts.setdefault("reflection", {})
    lost: dict[str, str] = {}
    for _, (values, failed) in over_buckets(context.recorders("judge", progress), buckets, judge):
        found.update(values)
        lost.update(failed)
    progress.close()
    if found:
        scores.lost["reflection"] = lost
    else:  # a judge that is out of order: the rows wait for it
        scores.failed.update(lost)


@dataclass(frozen=True)
class DevRows:
    """Answers to dev prompts that are known to be right or wrong.

    Attributes:
        of: What they are.
        rows: Distinct answers as rows, columns of `schema.ADDED`.
        known: `id`, `prompt_id` and `right`; one line for each answer, so equal ones have several.
        undecided: Answers that the verifier could not judge.
        lost: Reasons of prompts without draws.
    """

    of: str
    rows: pa.Table
    known: pl.DataFrame
    undecided: int
    lost: list[str]

    def buckets(self) -> list[tuple[int, pa.Table]]:
        """The rows by store bucket."""
        return list(by_store_bucket(lambda bucket: self.rows, 1))


def dev_rows(context: Context, options: Confidence, check: Verifier) -> DevRows:
    """Dev's own responses where enough are right and enough wrong, as the pool's are; else draws.

    Args:
        context: The stage.
        options: The stage's.
        check: Says whether an answer is right.
    """
    tables = []
    for spec in context.recipe.sets.dev:
        pool = Pool(context.workspace.pool(spec.name))
        tables += list(by_store_bucket(pool.rows, pool.buckets))
    own = [
        (row, row["messages"][-1]["content"])
        for _, table in tables
        for row in table.to_pylist()
        if row["answer"] is not None and row["answer_from"] == "independent"
    ]
    found = _judged_answers("dev responses", own, check, [])
    if too_few(found.known) is None:
        return found
    sampler, drawn = context.recorder("sampler"), []
    reasons: list[str] = []
    for bucket, table in tables:
        by_prompt = {r["prompt_id"]: r for r in table.to_pylist() if r["answer"] is not None}
        tokens, _ = prompts_of(sampler, table)
        places = range(options.samples, options.samples + DEV_DRAWS)
        draws = {prompt: places for prompt in tokens if prompt in by_prompt}
        made, lost = draw_samples(sampler, bucket, tokens, draws, options.sampling, options.seed)
        reasons += list(lost.values())
        drawn += [(by_prompt[p], text) for p, text in made.select("prompt_id", "text").iter_rows()]
    return _judged_answers("draws for dev prompts", drawn, check, reasons)


def _judged_answers(
    of: str, given: Sequence[tuple[Mapping[str, Any], str]], check: Verifier, lost: list[str]
) -> DevRows:
    """Answers as rows, each with the row whose prompt and reference it answers to."""
    rows: dict[str, dict[str, Any]] = {}
    known: list[tuple[str, str, bool]] = []
    for row, text in given:
        right = check(text, row["answer"]).correct
        if right is None:
            continue
        turns = [*row["messages"][:-1], schema.message("assistant", text)]
        new = schema.make_row(turns, source=row["source"], tools=row["tools"])
        rows[new["id"]] = {**new, "parent_id": None, "origin": None}
        known.append((new["id"], new["prompt_id"], right))
    table = pa.Table.from_pylist([rows[i] for i in sorted(rows)], schema=_ROWS)
    types = {"id": pl.String, "prompt_id": pl.String, "right": pl.Boolean}
    frame = pl.DataFrame(known, schema=types, orient="row")
    return DevRows(of, table, frame, len(given) - len(known), lost)


def _likelihoods(context: Context) -> dict[str, float]:
    """Mean probability of a token, exp of the mean log-probability, by id, of all earlier tables.

    A geometric mean; rounding may leave [0, 1] by a last bit.
    """
    found: dict[str, float] = {}
    for _, output in context.before:
        table = output.table("likelihood")
        if table is not None:
            found |= mean_probabilities(table)
    return found


def mean_probabilities(scored: pl.DataFrame) -> dict[str, float]:
    """The perplexity part by id, of rows with columns id and logprob_mean."""
    clipped = pl.col("logprob_mean").exp().clip(0.0, 1.0)
    return dict(scored.select("id", clipped).drop_nulls().iter_rows())
