"""The confidence gate: samples of every prompt, the model's own verdict, how far to trust it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.ingest.pool import Pool
from siftline.progress import Progress
from siftline.rows.ledger import StageResult
from siftline.rows.selection import Selection, decisions
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
from siftline.scoring.verifiers import get_verifier
from siftline.stages.canaries import Judged, measured
from siftline.stages.confidence.calibration import calibration, kept_by, shown
from siftline.stages.confidence.decide import PARTS, auroc, consistency
from siftline.stages.confidence.options import Confidence, without_reflection
from siftline.stages.context import Context, StageRun, by_store_bucket, split_failed
from siftline.stages.models import over_buckets
from siftline.stages.rejection_sampling.difficulty import level_of
from siftline.stages.scores import score_rows


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


CALIBRATION_DRAWS = 2
"""Draws per dev prompt that reflection is measured on."""
LEVELS = 5
"""Difficulty levels that the shares kept are shown by."""
SETTLED = ("threshold", "auroc", "auroc_low", "auroc_high", "auroc_rows")
"""Facts that an instance for added rows takes from the one it repeats."""


def run(context: Context) -> StageRun:
    """Scores rows by the parts of confidence and drops those below the threshold."""
    options = context.stage.options
    assert isinstance(options, Confidence)
    earlier = _settled(context)
    weights, calibrated = earlier or _calibrate(context, options)
    gate = options.gate(weights)
    asked = [_asked(context, bucket) for bucket in context.buckets]

    def rows(bucket: int) -> pa.Table:
        return context.everything(bucket, asked[bucket])

    buckets = list(by_store_bucket(rows, context.pool.buckets))
    scores = score_parts(context, options, buckets, weights)
    frames = [scores.frame(ids, gate.parts) for ids in asked]
    plan = gate.decide([gate.summarise(frame) for frame in frames])
    if earlier is not None:  # rows that were added are held to the line the first instance drew
        plan = type(plan)(calibrated["threshold"], {**plan.facts, **calibrated})
    results: list[StageResult] = []
    table = []
    for bucket, frame in zip(context.buckets, frames, strict=True):
        selection = gate.apply(frame, plan)
        failed = {i: scores.failed[i] for i in asked[bucket] if i in scores.failed}
        failed |= dict.fromkeys(selection.facts["no_confidence"], "no_confidence")
        results.append(
            split_failed(_with_earlier(context, bucket, asked[bucket], selection), failed)
        )
        confidences = selection.decisions.select("id", pl.col("value").alias("confidence"))
        table.append(frame.join(confidences, on="id", how="left", maintain_order="left"))
    decided = [result.decisions["kept"] for result in results]
    facts = {**plan.facts, "weights": weights, **calibrated}
    facts["below"] = sum(int((~kept).sum()) for kept in decided)
    facts["vacuous"] = facts["below"] == 0
    facts["unanswered"] = scores.unanswered() + calibrated.get("unanswered", 0)
    lines = pl.concat(table).sort("id")
    side = {"confidence": lines}
    if earlier is None:
        told, more = _believed(context, options, scores, results, lines, gate.parts)
        facts |= told
        side |= more

    def judge(planted: pa.Table) -> Judged:
        likely: dict[str, float] = {}
        unlikely: dict[str, str] = {}
        if "perplexity" in gate.parts:  # real rows were scored by the likelihood stage
            fresh, unlikely = score_rows(context, lambda bucket: planted, 1, planted.num_rows)
            likely = mean_probabilities(fresh)
        spoiled = list(by_store_bucket(lambda bucket: planted, 1))
        found = score_parts(context, options, spoiled, weights, likely)
        found.failed |= unlikely
        selection = gate.apply(found.frame(planted.column("id").to_pylist(), gate.parts), plan)
        lost = {**found.failed, **dict.fromkeys(selection.facts["no_confidence"], "no_confidence")}
        decided = selection.decisions
        return decided.filter(~pl.col("id").is_in(list(lost))), lost

    return measured(context, judge, StageRun(results, side, facts))


def _asked(context: Context, bucket: int) -> list[str]:
    """Ids in play of one bucket that this instance has to judge, sorted."""
    ids, new = context.in_play(bucket), _judged(context, bucket)
    return ids if new is None else [i for i in ids if i in new]


def _with_earlier(
    context: Context, bucket: int, asked: Sequence[str], selection: Selection
) -> pl.DataFrame:
    """Decisions of one bucket in which rows that were judged before stay."""
    judged = set(asked)
    earlier = [i for i in context.in_play(bucket) if i not in judged]
    stay = decisions(earlier, kept=[True] * len(earlier))
    return pl.concat([selection.decisions, stay]).sort("id")


def _judged(context: Context, bucket: int) -> set[str] | None:
    """Ids this instance has to judge; None means all. Never the rows that `correct` brought.

    Those were accepted by a verdict of their own, against the very answer they replace. Samples of
    the model they descend from would agree with them for no better reason than kinship, and would
    turn away those for hard prompts, which is where answers were missing.
    """
    new = context.judged(bucket)
    if new is None:
        return None
    for stage, output in context.before:
        if stage.kind == "correct":
            new -= set(output.added(bucket).column("id").to_pylist())
    return new


def _settled(context: Context) -> tuple[dict[str, float], dict[str, Any]] | None:
    """Weights and threshold of the instance that this one repeats for added rows."""
    if context.stage.scope == "all":
        return None
    own = context.stage
    output = next(
        output
        for stage, output in context.before
        if (stage.kind, stage.options) == (own.kind, own.options)
    )
    facts = {k: v for k, v in output.facts.items() if k in SETTLED}
    return output.facts["weights"], facts


def _believed(
    context: Context,
    options: Confidence,
    scores: Scores,
    results: Sequence[StageResult],
    confidences: pl.DataFrame,
    parts: Sequence[str],
) -> tuple[dict[str, Any], dict[str, pl.DataFrame]]:
    """How far the confidences can be believed, and on whom the threshold fell.

    Returns:
        Facts: calibration (see `confidence.calibration`), calibration_error and auroc_confidence,
        kept_by_source, kept_by_level; and the side table `kept_by` with every group.
    """
    levels = _levels(context, scores)
    check = get_verifier("math" if options.answers == "math" else "exact")
    lines = []
    for bucket, result in zip(context.buckets, results, strict=True):
        kept = dict(result.decisions.select("id", "kept").iter_rows())
        columns = ["id", "prompt_id", "messages", "source", "answer", "answer_from"]
        for row in context.rows(bucket).select(columns).to_pylist():
            if row["id"] not in kept:
                continue
            right = None
            if row["answer"] is not None and row["answer_from"] == "independent":
                right = check(row["messages"][-1]["content"], row["answer"]).correct
            level = levels.get(row["prompt_id"])
            lines.append((row["id"], kept[row["id"]], row["source"] or "", level, right))
    types = {"id": pl.String, "kept": pl.Boolean, "source": pl.String, "level": pl.Int64}
    frame = pl.DataFrame(lines, schema={**types, "right": pl.Boolean}, orient="row")
    groups = {name: kept_by(frame, name) for name in ("source", "level")}
    told = calibration(frame.select("id", "right").join(confidences, on="id"), parts)
    facts = {
        "calibration": told,
        "calibration_error": told["error"],
        "auroc_confidence": told["auroc"]["confidence"]["value"],
        "kept_by_source": shown(groups["source"]),
        "kept_by_level": shown(groups["level"].sort("group")),
    }
    return facts, {"kept_by": pl.concat(groups.values())}


def _levels(context: Context, scores: Scores) -> dict[str, int]:
    """Difficulty level by prompt id: of the difficulty table, else of the samples drawn here."""
    table = context.side_table("difficulty")
    if table is not None:
        known = dict(table.select("prompt_id", "difficulty").drop_nulls().iter_rows())
    else:
        known = {prompt: 1.0 - hits / of for prompt, (hits, of) in scores.solved.items()}
    found = level_of(np.array(list(known.values()), np.float64), LEVELS)
    return {prompt: int(level) for prompt, level in zip(known, found, strict=True)}


def _calibrate(context: Context, options: Confidence) -> tuple[dict[str, float], dict[str, Any]]:
    """Weights of the parts, and the AUROC of reflection on checked draws for dev prompts."""
    weights = options.weighing
    if not weights.get("reflection"):
        return weights, {}
    dev = context.recipe.sets.dev
    if not dev:
        if options.reflection == "auto":
            raise ValueError(
                "confidence weighs reflection by its AUROC on dev, and the recipe has no dev set: "
                "add one, or set reflection: on or off"
            )
        return weights, {}
    scores, labels, silent = _dev_verdicts(context, options)
    left = {"unanswered": unanswered(silent)}
    try:
        found = auroc(np.array(scores), np.array(labels))
    except ValueError as error:
        if options.reflection == "on":
            return weights, left
        context.emit(f"{context.stage.name}: reflection gets weight 0: {error}")
        return without_reflection(weights), {**left, "auroc": None, "auroc_rows": len(labels)}
    facts = {
        **left,
        "auroc": found.value,
        "auroc_low": found.low,
        "auroc_high": found.high,
        "auroc_rows": len(labels),
    }
    use = options.reflection == "on" or found.informative
    said = f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
    share = weights["reflection"] / sum(weights.values())
    weighed = f"weight {share:.2f}" if use else "weight 0"
    context.emit(f"{context.stage.name}: reflection AUROC {said} on dev, {weighed}")
    return (weights if use else without_reflection(weights)), facts


def _dev_verdicts(
    context: Context, options: Confidence
) -> tuple[list[float], list[bool], list[str]]:
    """Reflection on the sampler's own draws for dev prompts, whether each was right; and reasons.

    The reasons are of prompts without draws, and of draws without a verdict.
    """
    check = get_verifier("math" if options.answers == "math" else "exact")
    sampler, judge = context.recorder("sampler"), context.recorder("judge")
    scores: list[float] = []
    labels: list[bool] = []
    silent: list[str] = []
    for spec in context.recipe.sets.dev:
        pool = Pool(context.workspace.pool(spec.name))
        for bucket, rows in by_store_bucket(pool.rows, pool.buckets):
            by_prompt = {r["prompt_id"]: r for r in rows.to_pylist() if r["answer"] is not None}
            tokens, _ = prompts_of(sampler, rows)
            draws = {p: range(CALIBRATION_DRAWS) for p in tokens if p in by_prompt}
            drawn, lost = draw_samples(
                sampler, bucket, tokens, draws, options.sampling, options.seed
            )
            asked = {}
            right = {}
            for line in drawn.to_dicts():
                row = by_prompt[line["prompt_id"]]
                name = f"{line['prompt_id']}-{line['draw']}"
                asked[name] = (row["messages"], line["text"])
                right[name] = bool(check(line["text"], row["answer"]).correct)
            found, failed = reflections(judge, bucket, asked, options.questions)
            silent += [*lost.values(), *failed.values()]
            for name, value in found.items():
                scores.append(value)
                labels.append(right[name])
    return scores, labels, silent
