"""The confidence gate: samples of every prompt, the model's own verdict, how far to trust it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.ingest.pool import Pool
from siftline.ledger import StageResult
from siftline.progress import Progress
from siftline.scoring.confidence import (
    VALUES,
    Confidence,
    final_answer,
    prompts_of,
    reflect,
    sampled_answers,
)
from siftline.scoring.recorder import Recorder
from siftline.scoring.samples import draw_samples
from siftline.scoring.verifiers import get_verifier
from siftline.selectors.confidence import auroc, consistency, reflection_from_choices
from siftline.stages.canaries import Judged, measured
from siftline.stages.context import Context, StageRun, by_store_bucket, pass_earlier, split_failed
from siftline.stages.spread import over_buckets

CALIBRATION_DRAWS = 2
"""Draws per dev prompt that reflection is measured on."""


@dataclass
class _Scores:
    """Consistency and reflection by row id, and why rows failed."""

    consistency: dict[str, float | None] = field(default_factory=dict)
    reflection: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def frame(self, ids: Sequence[str]) -> pl.DataFrame:
        """What the gate reads about those of the rows that did not fail."""
        sound = [i for i in ids if i not in self.failed]
        return pl.DataFrame(
            {
                "id": sound,
                "consistency": [self.consistency.get(i) for i in sound],
                "reflection": [self.reflection.get(i) for i in sound],
            },
            schema={"id": pl.String, "consistency": pl.Float64, "reflection": pl.Float64},
        )


def confidence(context: Context) -> StageRun:
    """Scores rows by consistency and reflection and drops those below the threshold."""
    options = context.stage.options
    assert isinstance(options, Confidence)
    earlier = _settled(context)
    weight, calibration = earlier or _calibrate(context, options)
    buckets, reflecting = list(context.store_buckets()), weight < 1.0
    scores = _score_rows(context, options, buckets, with_reflection=reflecting)
    gate = options.gate(weight)
    frames = [scores.frame(context.in_play(bucket)) for bucket in context.buckets]
    judged = [context.judged(bucket) for bucket in context.buckets]
    counted = [
        frame if new is None else frame.filter(pl.col("id").is_in(list(new)))
        for frame, new in zip(frames, judged, strict=True)
    ]
    plan = gate.decide([gate.summarise(frame) for frame in counted])
    if earlier is not None:  # rows that were added are held to the line the first instance drew
        plan = type(plan)(calibration["threshold"], {**plan.facts, **calibration})
    results: list[StageResult] = []
    table = []
    for frame, new in zip(frames, judged, strict=True):
        selection = gate.apply(frame, plan)
        here = set(context.in_play(len(results)))
        failed = {i: why for i, why in scores.failed.items() if i in here}
        failed |= dict.fromkeys(selection.facts["no_confidence"], "no_confidence")
        if new is not None:
            failed = {i: why for i, why in failed.items() if i in new}
        results.append(split_failed(pass_earlier(selection, new), failed))
        table.append(frame.with_columns(confidence=selection.decisions["value"]))
    side = {"confidence": pl.concat(table).sort("id")}
    facts = {**plan.facts, "weight_consistency": weight, **calibration}
    facts["vacuous"] = plan.facts["below"] == 0

    def judge(planted: pa.Table) -> Judged:
        asked = list(by_store_bucket(lambda bucket: planted, 1))
        found = _score_rows(context, options, asked, with_reflection=reflecting)
        selection = gate.apply(found.frame(planted.column("id").to_pylist()), plan)
        lost = {**found.failed, **dict.fromkeys(selection.facts["no_confidence"], "no_confidence")}
        decided = selection.decisions
        return decided.filter(~pl.col("id").is_in(list(lost))), lost

    return measured(context, judge, StageRun(results, side, facts))


def _settled(context: Context) -> tuple[float, dict[str, Any]] | None:
    """Weight and threshold of the instance that this one repeats for added rows."""
    if context.stage.scope == "all":
        return None
    output = context.output("confidence")
    assert output is not None
    keep = ("threshold", "auroc", "auroc_low", "auroc_high", "auroc_rows")
    facts = {k: v for k, v in output.facts.items() if k in keep}
    return output.facts["weight_consistency"], facts


def _score_rows(
    context: Context,
    options: Confidence,
    buckets: Sequence[tuple[int, pa.Table]],
    *,
    with_reflection: bool,
) -> _Scores:
    prompts = sum(len(set(rows.column("prompt_id").to_pylist())) for _, rows in buckets)
    progress = Progress(
        f"{context.stage.name} samples", prompts * options.samples, context.emit, "draws"
    )
    scores = _Scores()

    def sample(recorder: Recorder, bucket: int, rows: pa.Table) -> _Scores:
        return _score_consistency(recorder, bucket, rows, options)

    for _, found in over_buckets(context.recorders("sampler", progress), buckets, sample):
        scores.consistency.update(found.consistency)
        scores.failed.update(found.failed)
    progress.close()
    if not with_reflection:
        return scores
    total = sum(rows.num_rows for _, rows in buckets)
    progress = Progress(f"{context.stage.name} verdicts", total, context.emit)

    def judge(
        recorder: Recorder, bucket: int, rows: pa.Table
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        asked = {r["id"]: (r["messages"], r["messages"][-1]["content"]) for r in rows.to_pylist()}
        return reflect(recorder, bucket, asked)

    for _, (verdicts, failed) in over_buckets(context.recorders("judge", progress), buckets, judge):
        scores.reflection.update(_expected(verdicts))
        scores.failed.update(failed)
    progress.close()
    return scores


def _expected(logprobs: Mapping[str, Sequence[float]]) -> dict[str, float]:
    if not logprobs:
        return {}
    values = reflection_from_choices(np.array(list(logprobs.values())), VALUES)
    return {i: float(v) for i, v in zip(logprobs, values, strict=True)}


def _score_consistency(
    sampler: Recorder, bucket: int, rows: pa.Table, options: Confidence
) -> _Scores:
    scores = _Scores()
    tokens, unfit = prompts_of(sampler, rows)
    draws = {prompt: range(options.samples) for prompt in tokens}
    drawn, lost = draw_samples(sampler, bucket, tokens, draws, options.sampling, options.seed)
    unfit |= lost
    answers = sampled_answers(drawn, options.answers)
    for row in rows.select(["id", "prompt_id", "messages"]).to_pylist():
        if row["prompt_id"] in unfit:
            scores.failed[row["id"]] = unfit[row["prompt_id"]]
            continue
        own = final_answer(row["messages"][-1]["content"], options.answers)
        scores.consistency[row["id"]] = consistency(answers[row["prompt_id"]], own)
    return scores


def _calibrate(context: Context, options: Confidence) -> tuple[float, dict[str, Any]]:
    """Weight of consistency, and the AUROC of reflection on checked draws for dev prompts."""
    if options.reflection == "off":
        return 1.0, {}
    dev = context.recipe.sets.dev
    if not dev:
        if options.reflection == "auto":
            raise ValueError(
                "confidence weighs reflection by its AUROC on dev, and the recipe has no dev set: "
                "add one, or set reflection: on or off"
            )
        return options.weight_consistency, {}
    scores, labels = _dev_verdicts(context, options)
    try:
        measured = auroc(np.array(scores), np.array(labels))
    except ValueError as error:
        if options.reflection == "on":
            return options.weight_consistency, {}
        context.emit(f"{context.stage.name}: reflection gets weight 0: {error}")
        return 1.0, {"auroc": None, "auroc_rows": len(labels)}
    facts = {
        "auroc": measured.value,
        "auroc_low": measured.low,
        "auroc_high": measured.high,
        "auroc_rows": len(labels),
    }
    use = options.reflection == "on" or measured.informative
    said = f"{measured.value:.2f} ({measured.low:.2f} to {measured.high:.2f})"
    weighed = f"weight {1 - options.weight_consistency:.2f}" if use else "weight 0"
    context.emit(f"{context.stage.name}: reflection AUROC {said} on dev, {weighed}")
    return (options.weight_consistency if use else 1.0), facts


def _dev_verdicts(context: Context, options: Confidence) -> tuple[list[float], list[bool]]:
    """Reflection on the sampler's own draws for dev prompts, and whether each was right."""
    check = get_verifier("math" if options.answers == "math" else "exact")
    sampler, judge = context.recorder("sampler"), context.recorder("judge")
    scores: list[float] = []
    labels: list[bool] = []
    for spec in context.recipe.sets.dev:
        pool = Pool(context.workspace.pool(spec.name))
        for bucket, rows in by_store_bucket(pool.rows, pool.buckets):
            by_prompt = {r["prompt_id"]: r for r in rows.to_pylist() if r["answer"] is not None}
            tokens, _ = prompts_of(sampler, rows)
            draws = {p: range(CALIBRATION_DRAWS) for p in tokens if p in by_prompt}
            drawn, _ = draw_samples(sampler, bucket, tokens, draws, options.sampling, options.seed)
            asked = {}
            right = {}
            for line in drawn.to_dicts():
                row = by_prompt[line["prompt_id"]]
                name = f"{line['prompt_id']}-{line['draw']}"
                asked[name] = (row["messages"], line["text"])
                right[name] = bool(check(line["text"], row["answer"]).correct)
            found, _ = reflect(judge, bucket, asked)
            for name, value in _expected(found).items():
                scores.append(value)
                labels.append(right[name])
    return scores, labels
