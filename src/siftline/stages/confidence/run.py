"""The confidence gate: parts of every row, what they are worth on dev, and where to cut."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.rows.ledger import StageResult
from siftline.rows.selection import Selection, decisions
from siftline.scoring.recorder import unanswered
from siftline.scoring.verifiers import get_verifier
from siftline.scoring.verifiers.verdict import Verifier
from siftline.stages.canaries import Judged, canaries_of, measured
from siftline.stages.confidence.calibration import (
    Joint,
    calibration,
    cross_fitted,
    kept_by,
    shown,
    too_few,
)
from siftline.stages.confidence.decide import PARTS, Plan, auroc
from siftline.stages.confidence.options import Confidence, without_reflection
from siftline.stages.confidence.parts import (
    DevRows,
    Scores,
    dev_rows,
    mean_probabilities,
    score_parts,
    score_with_stand_in,
)
from siftline.stages.context import Context, StageRun, by_store_bucket, split_failed
from siftline.stages.rejection_sampling.difficulty import level_of
from siftline.stages.scores import score_rows

LEVELS = 5
"""Difficulty levels that the shares kept are shown by."""
SETTLED = (
    "threshold",
    "auroc",
    "auroc_low",
    "auroc_high",
    "auroc_rows",
    "confidence_is",
    "why_no_probability",
)
"""Facts that an instance for added rows takes from the one it repeats."""
KNOWN = "confidence_dev"
"""Side table of the answers that a probability is learnt from."""


@dataclass
class Settled:
    """What is known before any row of the pool is judged.

    Attributes:
        weights: Weight by part, the stand-in aside.
        facts: What dev said.
        threshold: That of the instance which this one repeats for added rows.
        dev: Answers to dev prompts, where there are any.
        scores: Their parts so far.
        known: The table that a probability is learnt from, where an earlier instance made it.
        parts: Parts of that probability.
    """

    weights: dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)
    threshold: float | None = None
    dev: DevRows | None = None
    scores: Scores = field(default_factory=Scores)
    known: pl.DataFrame | None = None
    parts: tuple[str, ...] = ()

    def unanswered(self) -> int:
        """Questions about answers to dev prompts that another try may answer."""
        if self.dev is None:
            return 0
        lost = [self.scores.failed, *self.scores.lost.values()]
        ids = self.dev.known["id"].to_list()
        return unanswered([*self.dev.lost, *(of[i] for of in lost for i in ids if i in of)])


def run(context: Context) -> StageRun:
    """Scores rows by the parts of confidence and drops those below the threshold."""
    options = context.stage.options
    assert isinstance(options, Confidence)
    settled = _settled(context) or _from_dev(context, options)
    asked = [_asked(context, bucket) for bucket in context.buckets]

    def rows(bucket: int) -> pa.Table:
        return context.everything(bucket, asked[bucket])

    buckets = list(by_store_bucket(rows, context.pool.buckets))
    scores = score_with_stand_in(context, options, buckets, settled.weights)
    part = options.stand_in
    stands_in = part is not None and bool(scores.parts.get(part) or scores.lost.get(part))
    weights = options.with_stand_in(settled.weights)
    joint = _joint(context, options, settled, weights, stands_in)
    gate = options.gate(weights, joint)
    frames = [scores.frame(ids, gate.parts) for ids in asked]
    plan = gate.decide([gate.summarise(frame) for frame in frames])
    if settled.threshold is not None:  # added rows are held to the line the first instance drew
        plan = Plan(settled.threshold, {**plan.facts, "threshold": settled.threshold})
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
    lines = pl.concat(table).sort("id")
    unused = [part] if part is not None and not stands_in else []
    shown_parts = [name for name in gate.parts if name not in unused]
    facts = {
        **plan.facts,
        "weights": {name: w for name, w in weights.items() if name not in unused},
        "missing": _missing(plan.facts["missing"], lines, part, unused),
        "below": sum(int((~result.decisions["kept"]).sum()) for result in results),
        "vacuous": not plan.facts["scored"],
        "unanswered": scores.unanswered() + settled.unanswered(),
        **settled.facts,
    }
    facts |= _rule(options, joint, lines, facts)
    if joint is not None:
        low, high = joint.interval(lines)
        ends = pl.Series("confidence_low", low), pl.Series("confidence_high", high)
        lines = lines.with_columns(end.fill_nan(None) for end in ends)
    side = {"confidence": lines.drop(unused)}
    if settled.threshold is None:
        told, more = _believed(context, options, scores, results, lines, shown_parts)
        facts |= told
        side |= more
        if joint is not None:
            side[KNOWN] = joint.known

    def judge(planted: pa.Table) -> Judged:
        likely: dict[str, float] = {}
        unlikely: dict[str, str] = {}
        if "perplexity" in gate.parts:  # real rows were scored by the likelihood stage
            fresh, unlikely = score_rows(context, lambda bucket: planted, 1, planted.num_rows)
            likely = mean_probabilities(fresh)
        spoiled = list(by_store_bucket(lambda bucket: planted, 1))
        found = score_with_stand_in(context, options, spoiled, settled.weights, likely)
        found.failed |= unlikely
        selection = gate.apply(found.frame(planted.column("id").to_pylist(), gate.parts), plan)
        lost = {**found.failed, **dict.fromkeys(selection.facts["no_confidence"], "no_confidence")}
        decided = selection.decisions
        return decided.filter(~pl.col("id").is_in(list(lost))), lost

    return measured(context, judge, StageRun(results, side, facts))


def _missing(
    missing: Mapping[str, int], lines: pl.DataFrame, part: str | None, unused: Sequence[str]
) -> dict[str, int]:
    """Rows that lack each part; of the stand-in only those that wanted it."""
    found = {name: n for name, n in missing.items() if name not in unused}
    if part in found:
        both = pl.col(part).is_null() & pl.col("agreement").is_null()
        found[part] = lines.filter(both).height
    return found


def _rule(
    options: Confidence,
    joint: Joint | None,
    lines: pl.DataFrame,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Which rule decided, of how many rows, and what a probability expects of it."""
    if joint is None:
        untold = options.threshold == "absolute" and "why_no_probability" in facts
        return {"cut_as_quantile": facts["scored"] if untold else 0}
    return {
        "cut_as_quantile": 0,
        "fewer_parts": joint.reduced,
        "expected": joint.expected(lines, facts["threshold"]),
    }


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


def _settled(context: Context) -> Settled | None:
    """What the instance that this one repeats for added rows settled on."""
    if context.stage.scope == "all":
        return None
    own = context.stage
    output = next(
        output
        for stage, output in context.before
        if (stage.kind, stage.options) == (own.kind, own.options)
    )
    facts = {k: v for k, v in output.facts.items() if k in SETTLED}
    known = output.table(KNOWN)
    parts = tuple(p for p in PARTS if known is not None and p in known.columns)
    weights = dict(output.facts["weights"])
    if own.options.stand_in is not None:
        weights.pop(own.options.stand_in, None)
    return Settled(weights, facts, facts.pop("threshold"), known=known, parts=parts)


def _verifier(context: Context, options: Confidence) -> Verifier:
    """What says whether an answer is right: the recipe's own verifier, where it has one."""
    checks = [s.options.verifier for s in context.recipe.stages if s.kind == "verify"]
    return get_verifier(checks[-1] if checks else "math" if options.answers == "math" else "exact")


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
    check = _verifier(context, options)
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


def _from_dev(context: Context, options: Confidence) -> Settled:
    """Weights of the parts, by what dev says of reflection; and the known answers with their parts.

    Only what is asked about is scored: nothing where the weighted mean is wanted and reflection's
    weight is settled.
    """
    weights = options.weighing
    judged = bool(weights.get("reflection"))
    if not context.recipe.sets.dev:
        why = "the recipe has no dev set"
        facts = {
            "confidence_is": "weighted mean",
            **({"why_no_probability": why} if options.join == "auto" else {}),
        }
        if judged and options.reflection == "auto":
            context.emit(f"{context.stage.name}: {why}, reflection keeps its weight")
        return Settled(weights, facts)
    if options.join != "auto" and not judged:
        return Settled(weights, {"confidence_is": "weighted mean"})
    dev = dev_rows(context, options, _verifier(context, options))
    wanted = weights if options.join == "auto" else {"reflection": 1.0}
    scores = _dev_scores(context, options, dev, wanted)
    settled = Settled(weights, {"confidence_is": "weighted mean"}, dev=dev, scores=scores)
    if judged:
        facts, informative = _reflection(context, settled)
        settled.facts |= facts
        if options.reflection == "auto" and not informative:
            settled.weights = without_reflection(weights)
    return settled


def _dev_scores(
    context: Context, options: Confidence, dev: DevRows, weights: Mapping[str, float]
) -> Scores:
    """Parts of the known answers."""
    likely: dict[str, float] = {}
    if weights.get("perplexity"):
        fresh, _ = score_rows(context, lambda bucket: dev.rows, 1, dev.rows.num_rows)
        likely = mean_probabilities(fresh)
    return score_parts(context, options, dev.buckets(), weights, likely)


def _reflection(context: Context, settled: Settled) -> tuple[dict[str, Any], bool]:
    """AUROC of reflection on the known answers to dev prompts, and whether it informs."""
    assert settled.dev is not None
    values = settled.scores.parts.get("reflection", {})
    known = settled.dev.known.filter(pl.col("id").is_in(list(values)))
    right = known["right"].to_numpy()
    name = context.stage.name
    try:
        found = auroc(np.array([values[i] for i in known["id"].to_list()]), right)
    except ValueError as error:
        context.emit(f"{name}: how far reflection can be trusted is not known: {error}")
        return {"auroc": None, "auroc_rows": len(right)}, False
    said = f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
    context.emit(f"{name}: reflection AUROC {said} on dev")
    facts = {"auroc": found.value, "auroc_low": found.low, "auroc_high": found.high}
    return {**facts, "auroc_rows": len(right)}, found.informative


def _joint(
    context: Context,
    options: Confidence,
    settled: Settled,
    weights: Mapping[str, float],
    stands_in: bool,
) -> Joint | None:
    """What makes a probability of the parts, with what dev says of it among the facts."""
    if settled.known is not None:
        return Joint(settled.known, settled.parts, options.seed)
    dev = settled.dev
    if options.join != "auto" or dev is None:
        return None
    parts = [p for p in PARTS if settled.weights.get(p, 0.0) > 0]
    part = options.stand_in
    if part is not None and (stands_in or canaries_of(context.recipe, context.stage)):
        settled.scores.add(score_parts(context, options, dev.buckets(), {part: 1.0}))
        parts = [p for p in PARTS if weights.get(p, 0.0) > 0]
    values = settled.scores.frame(dev.known["id"].unique().to_list(), parts)
    known = dev.known.join(values, on="id", how="inner")
    if parts:
        known = known.filter(~pl.all_horizontal(pl.col(p).is_null() for p in parts))
    why = too_few(known)
    counted = {"of": dev.of, "known": known.height, "undecided": dev.undecided}
    if why is not None:
        settled.facts |= {"why_no_probability": f"dev has {why}", "dev": counted}
        return None
    known = known.sort("prompt_id", "id", "right")
    judged = known.with_columns(confidence=cross_fitted(known, parts, options.seed))
    told = calibration(judged.with_columns(pl.col("confidence").fill_nan(None)), parts)
    settled.facts |= {"confidence_is": "probability", "dev": {**counted, **told}}
    return Joint(known, parts, options.seed)
