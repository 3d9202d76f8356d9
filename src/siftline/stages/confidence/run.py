"""The confidence gate: parts of every row, what they are worth on dev, and where to cut."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.ingest.pool import Pool
from siftline.progress import Progress
from siftline.rows import schema
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
from siftline.stages.confidence.decide import PARTS, Plan, auroc, consistency
from siftline.stages.confidence.options import Confidence, without_reflection
from siftline.stages.context import Context, StageRun, by_store_bucket, split_failed
from siftline.stages.models import over_buckets
from siftline.stages.rejection_sampling.difficulty import level_of
from siftline.stages.scores import score_rows

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
