"""Rejection sampling: draws from the sampler until every prompt has its verified answers."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline import schema
from siftline.kernels.draws import gumbel_top_k, uniforms
from siftline.ledger import StageResult
from siftline.progress import Progress
from siftline.scoring.recorder import Recorder
from siftline.scoring.rejection import RejectionSampling
from siftline.selectors.difficulty import accept, difficulty, tally, targets_for
from siftline.selectors.preview import Preview
from siftline.selectors.selection import decisions
from siftline.selectors.trials import Campaign, Rule, fit_prior
from siftline.stages.context import Context, StageRun
from siftline.stages.grading import by_verifier, grader
from siftline.stages.problems import Judgement, Problem, added_rows, negatives, problems_of
from siftline.stages.sampler import Sampler
from siftline.stages.scorers import quality


def rejection_sampling(context: Context) -> StageRun:
    """Adds the first k distinct verified draws of each prompt; every row in play stays."""
    options = context.stage.options
    assert isinstance(options, RejectionSampling)
    problems, skipped = problems_of(context.recorder("sampler"), context.store_buckets())
    progress = Progress(context.stage.name, 0, context.emit, "draws")
    sampler = _sampler(context, options, problems, progress)
    other = _other_model(context, options)
    facts: dict[str, Any] = {"prompts": len(problems), "skipped_prompts": skipped}
    sampler.pilot()
    judge = sampler.sharing(context.recorders("target", progress)) if other else sampler
    if other:
        judge.pilot()
    campaign, rates = _campaign(context, options, sampler, judge)
    before = sampler.preview(campaign)
    context.emit(f"{context.stage.name}: {before}")
    sampler.finish(campaign)
    progress.close()
    judged = sampler.judged(campaign)
    taken = accept(judged.draws, judged.targets)
    table = _table(problems, judged, None if judge is sampler else rates)
    results = _results(context, added_rows(problems, judged.draws, taken))
    facts |= _facts(judged, campaign, before)
    answered = set(judged.targets.filter(pl.col("status") != "failed")["prompt_id"])
    skipped["refused"] = len(problems) - len(answered)
    if other:
        facts["pass_rates"] = _agreement(table)
    facts["vacuous"] = not problems
    side = {"difficulty": table, "negatives": negatives(judged, options.negatives)}
    return StageRun(results, side, facts)


def preview_of(context: Context) -> Preview:
    """Draws the pilot, which counts, and says what the rest of this stage would cost."""
    options = context.stage.options
    assert isinstance(options, RejectionSampling)
    problems, _ = problems_of(context.recorder("sampler"), context.store_buckets())
    progress = Progress(context.stage.name, 0, context.emit, "draws")
    sampler = _sampler(context, options, problems, progress)
    sampler.pilot()
    judge = sampler
    if _other_model(context, options):
        judge = sampler.sharing(context.recorders("target", progress))
        judge.pilot()
    progress.close()
    campaign, _ = _campaign(context, options, sampler, judge)
    return sampler.preview(campaign)


def vanilla_rows(
    sampler: Recorder,
    buckets: Iterable[tuple[int, pa.Table]],
    options: RejectionSampling,
    draws: int,
) -> list[dict[str, Any]]:
    """Vanilla rejection sampling at a given cost: equal draws for every prompt, all that is right.

    Args:
        sampler: The model to draw from.
        buckets: Rows by store bucket.
        options: How to draw and to verify; targets and caps are not used.
        draws: Draws in all. What they don't share out evenly goes to prompts by hash.

    Returns:
        Distinct verified rows, columns of `schema.ADDED`.
    """
    problems, _ = problems_of(sampler, buckets)
    if not problems or draws < 1:
        return []
    prompts = sorted(problems)
    each, over = divmod(draws, len(prompts))
    u = uniforms(options.seed, "vanilla draws", prompts)
    first = {prompts[i] for i in gumbel_top_k(u, prompts, over)}
    unlimited = replace(options, max_draws=None, max_tokens=None)
    maker = Sampler.of(
        unlimited, problems, [sampler], lambda line: None, by_verifier(options.verifier)
    )
    for count, mine in ((each, set(prompts) - first), (each + 1, first)):
        if count and mine:
            rule = Rule(cap=count, pilot=count)
            maker.run(Campaign.of(dict.fromkeys(mine, count), rule))
    judged = maker.judged()
    everything = pl.DataFrame({"prompt_id": prompts, "target": [draws] * len(prompts)})
    return added_rows(problems, judged.draws, accept(judged.draws, everything))


def _sampler(
    context: Context,
    options: RejectionSampling,
    problems: Mapping[str, Problem],
    progress: Progress,
) -> Sampler:
    grade = grader(options.verifier, lambda: context.recorder("judge"))
    recorders = context.recorders("sampler", progress)
    return Sampler.of(options, problems, recorders, context.emit, grade)


def _other_model(context: Context, options: RejectionSampling) -> bool:
    """Whether the targets follow another model's pass rates than the cost."""
    return "target" in options.more_roles and context.spec("target") != context.spec("sampler")


def _campaign(
    context: Context, options: RejectionSampling, sampler: Sampler, judge: Sampler
) -> tuple[Campaign, pl.DataFrame]:
    """The trials after the pilot, and the pass rates that set their targets.

    Targets come from the pilot's draws alone, so nothing that is drawn later can move them.
    """
    rates = tally(judge.judged().draws)
    pilot = rates if judge is sampler else tally(sampler.judged().draws)
    if options.target == "vanilla":
        rule = Rule(cap=options.k, pilot=options.k)
        return sampler.trials(dict.fromkeys(pilot["prompt_id"].to_list(), options.k), rule), rates
    targets = _targets(context, options, rates)
    prior = fit_prior(pilot["n_correct"].to_numpy(), pilot["n_trials"].to_numpy())
    rule = Rule(options.cap, options.pilot, prior, options.unsolved_cap, options.max_similarity)
    return sampler.trials(targets, rule), rates


def _targets(context: Context, options: RejectionSampling, rates: pl.DataFrame) -> dict[str, int]:
    if options.target == "scores":
        assert options.target_scores is not None
        best = (
            quality(context, options.target_scores)
            .with_columns(pl.col("id").str.slice(0, schema.HALF_ID).alias("prompt_id"))
            .group_by("prompt_id")
            .agg(pl.col("value").max().round().clip(0, options.k).cast(pl.Int64))
        )
        known = dict(best.iter_rows())
        return {p: known.get(p) or 0 for p in rates["prompt_id"].to_list()}
    assert options.target != "vanilla"
    table = targets_for(rates, options.target, options.k, options.max_quantile)
    return dict(table.select("prompt_id", "target").iter_rows())


def _results(context: Context, added: list[dict[str, Any]]) -> list[StageResult]:
    results = []
    for bucket in context.buckets:
        ids = context.in_play(bucket)
        frame = decisions(ids, kept=[True] * len(ids))
        known = set(ids)
        here = [r for r in added if schema.bucket_of(r["id"], context.pool.buckets) == bucket]
        new = [r for r in here if r["id"] not in known]
        results.append(StageResult(frame, {}, pa.Table.from_pylist(new, schema=schema.ADDED)))
    return results


def _table(
    problems: Mapping[str, Problem], judged: Judgement, other: pl.DataFrame | None
) -> pl.DataFrame:
    """Pass rates by prompt, targets and how the trials ended.

    `difficulty` is that of the model that set the targets, `sampler_difficulty` the sampler's.
    """
    parents = {prompt: problem.parent["id"] for prompt, problem in problems.items()}
    table = difficulty(tally(judged.draws)).with_columns(
        pl.col("difficulty").alias("sampler_difficulty")
    )
    if other is not None:
        driving = difficulty(other).select("prompt_id", "difficulty")
        table = table.drop("difficulty").join(driving, on="prompt_id", how="left")
    table = table.join(judged.targets, on="prompt_id").sort("prompt_id")
    return table.with_columns(
        pl.col("prompt_id").replace_strict(parents, return_dtype=pl.String).alias("parent_id")
    )


def _facts(judged: Judgement, campaign: Campaign, before: Preview) -> dict[str, Any]:
    draws = judged.draws
    refused = draws.filter(~pl.col("correct"))["reason"].value_counts().sort("reason")
    prior = next((t.rule.prior for t in campaign.trials.values()), None)
    return {
        "draws": draws.height,
        "correct": int(draws["correct"].sum()),
        "tokens": int(draws["n_tokens"].sum()),
        "targets": dict(sorted(judged.targets["status"].value_counts().iter_rows())),
        "refused": dict(refused.iter_rows()),
        "prior": [prior.a, prior.b] if prior else None,
        "preview": {**before.as_json(), "seconds": None},  # the clock decides no bytes
    }


def _agreement(table: pl.DataFrame) -> dict[str, Any]:
    """Mean pass rates of both models over the prompts, and their correlation (Pearson)."""
    pairs = table.select("difficulty", "sampler_difficulty").drop_nulls().to_numpy()
    varied = len(pairs) > 1 and bool((pairs.std(axis=0) > 0).all())
    return {
        "prompts": len(pairs),
        "target": float(1 - pairs[:, 0].mean()) if len(pairs) else None,
        "sampler": float(1 - pairs[:, 1].mean()) if len(pairs) else None,
        "correlation": float(np.corrcoef(pairs.T)[0, 1]) if varied else None,
    }
