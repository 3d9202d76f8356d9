"""Stages that sample the model: the confidence gate and rejection sampling."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline import schema
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
from siftline.scoring.rejection import RejectionSampling
from siftline.scoring.samples import COLUMNS, draw_samples
from siftline.scoring.verifiers import get_verifier
from siftline.selectors.confidence import (
    auroc,
    consistency,
    reflection_from_choices,
)
from siftline.selectors.difficulty import DRAWS, accept, difficulty, plan_trials, tally, targets_for
from siftline.selectors.selection import decisions
from siftline.stages.context import Context, StageRun, by_store_bucket, pass_earlier, split_failed
from siftline.stages.spread import over_buckets

CALIBRATION_DRAWS = 2
"""Draws per dev prompt that reflection is measured on."""


# ---- confidence -----------------------------------------------------------------------------


@dataclass
class _Scores:
    """Consistency and reflection by row id, and why rows failed."""

    consistency: dict[str, float | None] = field(default_factory=dict)
    reflection: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def confidence(context: Context) -> StageRun:
    """Scores rows by consistency and reflection and drops those below the threshold."""
    options = context.stage.options
    assert isinstance(options, Confidence)
    earlier = _settled(context)
    weight, calibration = earlier or _calibrate(context, options)
    scores = _score_rows(context, options, with_reflection=weight < 1.0)
    gate = options.gate(weight)
    frames = []
    for bucket in context.buckets:
        ids = [i for i in context.in_play(bucket) if i not in scores.failed]
        columns = {
            "consistency": [scores.consistency.get(i) for i in ids],
            "reflection": [scores.reflection.get(i) for i in ids],
        }
        frames.append(
            pl.DataFrame(
                {"id": ids, **columns},
                schema={"id": pl.String, "consistency": pl.Float64, "reflection": pl.Float64},
            )
        )
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
    return StageRun(results, side, facts)


def _settled(context: Context) -> tuple[float, dict[str, Any]] | None:
    """Weight and threshold of the instance that this one repeats for added rows."""
    if context.stage.scope == "all":
        return None
    output = context.output("confidence")
    assert output is not None
    keep = ("threshold", "auroc", "auroc_low", "auroc_high", "auroc_rows")
    facts = {k: v for k, v in output.facts.items() if k in keep}
    return output.facts["weight_consistency"], facts


def _score_rows(context: Context, options: Confidence, *, with_reflection: bool) -> _Scores:
    buckets = list(context.store_buckets())
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


# ---- rejection sampling ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    """A prompt that can be sampled: its tokens, reference answer, and the row it descends from."""

    bucket: int
    tokens: list[int]
    parent: dict[str, Any]


def rejection_sampling(context: Context) -> StageRun:
    """Adds the first k distinct verified draws of each prompt; every row in play stays."""
    options = context.stage.options
    assert isinstance(options, RejectionSampling)
    problems, skipped = _problems(context)
    progress = Progress(context.stage.name, 0, context.emit, "draws")
    sampler = context.recorder("sampler", progress)
    draws = _sample(sampler, problems, options, context.emit)
    progress.close()
    rates = tally(draws)
    targets = _targets(draws, options)
    taken = accept(draws, targets)
    status = _plan(targets, rates, options)
    added = _added_rows(problems, draws, taken)
    results = []
    for bucket in context.buckets:
        ids = context.in_play(bucket)
        frame = decisions(ids, kept=[True] * len(ids))
        here = [r for r in added if schema.bucket_of(r["id"], context.pool.buckets) == bucket]
        known = set(ids)
        new = [r for r in here if r["id"] not in known]
        results.append(StageResult(frame, {}, pa.Table.from_pylist(new, schema=schema.ADDED)))
    table = (
        difficulty(rates)
        .join(targets.select("prompt_id", "target"), on="prompt_id")
        .join(status.select("prompt_id", "status"), on="prompt_id")
    )
    counts = dict(sorted(status["status"].value_counts().iter_rows()))
    facts = {
        "prompts": len(problems),
        "skipped_prompts": skipped,
        "draws": draws.height,
        "correct": int(draws["correct"].sum()),
        "targets": counts,
        "vacuous": not problems,
    }
    return StageRun(results, {"difficulty": table.sort("prompt_id")}, facts)


def _problems(context: Context) -> tuple[dict[str, _Problem], dict[str, int]]:
    """Prompts in play with one independent answer, by prompt id; counts of those left out."""
    sampler = context.recorder("sampler")
    problems: dict[str, _Problem] = {}
    skipped = {"no_independent_answer": 0, "conflicting_answers": 0, "too_long": 0}
    for bucket, rows in context.store_buckets():
        tokens, unfit = prompts_of(sampler, rows)
        by_prompt: dict[str, list[dict[str, Any]]] = {}
        for row in rows.to_pylist():  # sorted by id, so the parent is the smallest
            by_prompt.setdefault(row["prompt_id"], []).append(row)
        for prompt, answers in by_prompt.items():
            proven = [r for r in answers if r["answer_from"] == "independent"]
            if not proven:
                skipped["no_independent_answer"] += 1
            elif len({final_answer(f"#### {r['answer']}", "math") for r in proven}) > 1:
                skipped["conflicting_answers"] += 1
            elif prompt in unfit:
                skipped["too_long"] += 1
            else:
                problems[prompt] = _Problem(bucket, tokens[prompt], proven[0])
    return problems, skipped


def _targets(draws: pl.DataFrame, options: RejectionSampling) -> pl.DataFrame:
    """Targets from the pilot's draws alone, so later rounds can't move them."""
    pilot = tally(draws.filter(pl.col("draw") < options.pilot))
    return targets_for(pilot, options.target, options.k, options.max_quantile)


def _plan(targets: pl.DataFrame, rates: pl.DataFrame, options: RejectionSampling) -> pl.DataFrame:
    return plan_trials(
        targets.select("prompt_id", "target"),
        rates,
        cap=options.cap,
        max_per_round=options.max_per_round,
        unsolved_cap=options.unsolved_cap,
    )


def _sample(
    sampler: Recorder, problems: Mapping[str, _Problem], options: RejectionSampling, emit: Any
) -> pl.DataFrame:
    """Draws in rounds until every target is met or capped.

    Later rounds refine how many draws are still needed, never the targets. Draws beyond a target
    change nothing, see `accept`.
    """
    check = get_verifier(options.verifier)
    wanted: dict[str, Sequence[int]] = {prompt: range(options.pilot) for prompt in problems}
    draws = pl.DataFrame(schema=DRAWS)
    rounds = 0
    while wanted:
        draws = pl.concat([draws, _judged(sampler, problems, wanted, options, check)])
        rounds += 1
        plan = _plan(_targets(draws, options), tally(draws), options)
        plan = plan.filter(pl.col("draws") > 0)
        wanted = {
            p: range(first, first + n)
            for p, first, n in plan.select("prompt_id", "first_draw", "draws").iter_rows()
        }
        right = int(draws["correct"].sum())
        emit(
            f"rejection_sampling round {rounds}: {draws.height:,} draws, {right:,} correct, "
            f"{len(wanted):,} prompts open"
        )
    return draws


def _judged(
    sampler: Recorder,
    problems: Mapping[str, _Problem],
    wanted: Mapping[str, Sequence[int]],
    options: RejectionSampling,
    check: Any,
) -> pl.DataFrame:
    """Draws and verifies; lines of `DRAWS`."""
    lines = []
    by_bucket: dict[int, list[str]] = {}
    for prompt in wanted:
        by_bucket.setdefault(problems[prompt].bucket, []).append(prompt)
    for bucket in sorted(by_bucket):
        tokens = {p: problems[p].tokens for p in by_bucket[bucket]}
        asked = {p: wanted[p] for p in tokens}
        drawn, lost = draw_samples(sampler, bucket, tokens, asked, options.sampling, options.seed)
        assert not lost, lost
        for line in drawn.select(list(COLUMNS)).to_dicts():
            text = schema.canonical_text(line["text"])
            verdict = check(text, problems[line["prompt_id"]].parent["answer"])
            whole = line["finish_reason"] == "stop" and bool(text)
            lines.append(
                {
                    "prompt_id": line["prompt_id"],
                    "draw": line["draw"],
                    "text": text,
                    "answer_key": verdict.extracted,
                    "correct": whole and bool(verdict.correct),
                    "dedup_key": " ".join(text.lower().split()),
                }
            )
    return pl.DataFrame(lines, schema=DRAWS)


def _added_rows(
    problems: Mapping[str, _Problem], draws: pl.DataFrame, taken: pl.DataFrame
) -> list[dict[str, Any]]:
    accepted = taken.filter("accepted").join(draws, on=["prompt_id", "draw"])
    rows = []
    for line in accepted.sort("prompt_id", "draw").to_dicts():
        parent = problems[line["prompt_id"]].parent
        row = schema.make_row(
            [*parent["messages"][:-1], schema.message("assistant", line["text"])],
            answer=parent["answer"],
            answer_from="independent",
            source="sampler",
            tools=parent["tools"],
        )
        origin = f"rejection_sampling draw {line['draw']}"
        rows.append({**row, "parent_id": parent["id"], "origin": origin})
    return rows
