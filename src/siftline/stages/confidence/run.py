"""The confidence gate: samples of every prompt, the model's own verdict, how far to trust it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.ingest.pool import Pool
from siftline.ledger import StageResult
from siftline.scoring.reasons import unanswered
from siftline.scoring.reflection import prompts_of, reflections
from siftline.scoring.samples import draw_samples
from siftline.scoring.verifiers import get_verifier
from siftline.selectors.selection import Selection, decisions
from siftline.stages.canaries import Judged, measured
from siftline.stages.confidence.calibration import calibration, kept_by, shown
from siftline.stages.confidence.decide import auroc
from siftline.stages.confidence.options import Confidence, without_reflection
from siftline.stages.confidence.parts import Scores, mean_probabilities, score_parts
from siftline.stages.context import Context, StageRun, by_store_bucket, split_failed
from siftline.stages.rejection_sampling.difficulty import level_of
from siftline.stages.scores import score_rows

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
