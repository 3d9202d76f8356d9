"""Rejection sampling: draws from the sampler until every prompt has its verified answers."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.ingest.pool import Pool
from siftline.kernels.draws import gumbel_top_k, uniforms
from siftline.progress import Progress
from siftline.recipe.parse import Recipe
from siftline.rows import schema
from siftline.rows.ledger import StageResult
from siftline.rows.selection import decisions
from siftline.scoring.recorder import Recorder, unanswered
from siftline.scoring.verifiers import isolation_of
from siftline.stages.context import Context, StageRun
from siftline.stages.models import engines
from siftline.stages.rejection_sampling.difficulty import (
    accept,
    difficulty,
    stopped_difficulty,
    tally,
    targets_for,
)
from siftline.stages.rejection_sampling.options import JUDGE, NONE, RejectionSampling
from siftline.stages.rejection_sampling.preview import Preview
from siftline.stages.rejection_sampling.problems import (
    Judgement,
    added_rows,
    by_verifier,
    grader,
    negatives,
    outside,
    problems_of,
)
from siftline.stages.rejection_sampling.sampler import Limits, Sampler
from siftline.stages.rejection_sampling.trials import Campaign, Rule, fit_prior
from siftline.stages.run import outputs
from siftline.stages.scorers import quality
from siftline.workspace import Workspace


@dataclass(frozen=True)
class _Piloted:
    """A stage whose pilots are drawn.

    Attributes:
        sampler: What draws the rest.
        skipped: Counts of prompts that can't be sampled.
        campaign: The trials, which have read the sampler's pilot.
        other: Pass rates of the target's own pilot, where another model draws.
    """

    sampler: Sampler
    skipped: dict[str, int]
    campaign: Campaign
    other: pl.DataFrame | None

    def preview(self) -> Preview:
        """What the rest will cost."""
        return self.sampler.preview(self.campaign)


def run(context: Context) -> StageRun:
    """Adds the first k distinct verified draws of each prompt; every row in play stays.

    Of a pool of prompts only the draws go on: the last such stage removes the prompts themselves.
    """
    progress = Progress(context.stage.name, 0, context.emit, "draws")
    found = _piloted(context, progress)
    sampler, campaign = found.sampler, found.campaign
    before = found.preview()
    context.emit(f"{context.stage.name}: {before}")
    sampler.finish(campaign)
    progress.close()
    judged = sampler.judged(campaign)
    taken = accept(judged.draws, judged.targets)
    table = _table(sampler, campaign, judged, found.other)
    if sampler.options.target == "vanilla":  # nothing was aimed at
        drawn = pl.col("status").is_in(["met", "capped", "unsolved"])
        table = table.with_columns(
            pl.when(drawn).then(pl.lit("drawn")).otherwise(pl.col("status")).alias("status")
        )
    results = _results(context, added_rows(sampler.problems, judged.draws, taken))
    facts = {
        "prompts": len(sampler.problems),
        "skipped_prompts": found.skipped,
        **_facts(judged, campaign, before, sampler.options.verifier),
        "targets": dict(sorted(table["status"].value_counts().iter_rows())),
        "vacuous": not sampler.problems,
        **isolation_of(sampler.options.verifier),
    }
    if found.other is not None:
        facts["pass_rates"] = _agreement(table)
        facts["target_draws"] = int(found.other["n_trials"].sum())
    side = {"difficulty": table, "negatives": negatives(judged, sampler.options.negatives)}
    return StageRun(results, side, facts)


def preview_of(context: Context) -> Preview:
    """Draws the pilot, which counts, and says what the rest of this stage would cost."""
    progress = Progress(context.stage.name, 0, context.emit, "draws")
    found = _piloted(context, progress)
    progress.close()
    return found.preview()


def _piloted(context: Context, progress: Progress) -> _Piloted:
    """Draws the pilots, the target's first: two models need not lie in memory at once."""
    options = context.stage.options
    assert isinstance(options, RejectionSampling)
    other, limits = None, None
    if "target" in options.more_roles and context.spec("target") != context.spec("sampler"):
        judge, _ = _model(context, options, "target", progress, None)
        judge.pilot()
        other, limits = tally(judge.judged().draws), judge.limits
        context.opened.close()
    sampler, skipped = _model(context, options, "sampler", progress, limits)
    sampler.pilot()
    return _Piloted(sampler, skipped, _campaign(context, options, sampler, other), other)


def _model(
    context: Context,
    options: RejectionSampling,
    role: str,
    progress: Progress,
    limits: Limits | None,
) -> tuple[Sampler, dict[str, int]]:
    """The prompts in the tokens of a role's model, ready to be drawn for; and counts left out."""
    recorders = context.recorders(role, progress)
    problems, skipped = problems_of(recorders[0], context.store_buckets(), options.verifier)
    grade = grader(options.verifier, lambda: context.recorder("judge"))
    return Sampler.of(options, problems, recorders, context.emit, grade, limits), skipped


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

    Raises:
        ValueError: if a model is the verifier, which arms don't open.
    """
    if options.verifier == JUDGE:
        raise ValueError(
            "arm random_sampled copies rejection sampling, whose verifier is a judge: leave the "
            "arm out, or verify by a verifier"
        )
    problems, _ = problems_of(sampler, buckets, options.verifier)
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


def _campaign(
    context: Context, options: RejectionSampling, sampler: Sampler, other: pl.DataFrame | None
) -> Campaign:
    """The trials after the pilot.

    Targets come from the pilot's draws alone, so nothing that is drawn later can move them. A
    prompt that either model refused has no trial.
    """
    pilot = tally(sampler.judged().draws)
    if options.target == "vanilla":
        rule = Rule(cap=options.k, pilot=options.k, max_similarity=options.max_similarity)
        return sampler.trials(dict.fromkeys(pilot["prompt_id"].to_list(), options.k), rule)
    rates = pilot if other is None else other.join(pilot, on="prompt_id", how="semi")
    prior = fit_prior(pilot["n_correct"].to_numpy(), pilot["n_trials"].to_numpy())
    rule = Rule(options.cap, options.pilot, prior, options.unsolved_cap, options.max_similarity)
    return sampler.trials(_targets(context, options, rates), rule)


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


UNANSWERED = "no_response"
"""Reason of the prompts of a pool, which have gone into their draws."""


def _results(context: Context, added: list[dict[str, Any]]) -> list[StageResult]:
    results = []
    sampling = [s.name for s in context.recipe.stages if s.kind == context.stage.kind]
    ends = context.recipe.pool.holds == "prompts" and context.stage.name == sampling[-1]
    for bucket in context.buckets:
        ids, known = context.in_play(bucket), context.known(bucket)
        prompts: set[str] = set()
        if ends:
            prompts = set(context.pool.rows(bucket, ["id"]).column("id").to_pylist())
        kept = [i not in prompts for i in ids]
        frame = decisions(ids, kept=kept, reason=[None if k else UNANSWERED for k in kept])
        here = [r for r in added if schema.bucket_of(r["id"], context.pool.buckets) == bucket]
        new = [r for r in here if r["id"] not in known]
        results.append(StageResult(frame, {}, pa.Table.from_pylist(new, schema=schema.ADDED)))
    return results


def _table(
    sampler: Sampler, campaign: Campaign, judged: Judgement, other: pl.DataFrame | None
) -> pl.DataFrame:
    """Every prompt's pass rate, target, and how its trial ended.

    `difficulty` is that of the model that set the targets, `sampler_difficulty` the sampler's; both
    are null where nothing was drawn.
    """
    parents = {prompt: problem.parent["id"] for prompt, problem in sampler.problems.items()}
    table = pl.DataFrame(
        {"prompt_id": list(parents), "parent_id": list(parents.values())},
        schema={"prompt_id": pl.String, "parent_id": pl.String},
    )
    table = table.join(judged.targets, on="prompt_id", how="left")
    table = table.with_columns(pl.col("status").fill_null("failed"))
    table = table.join(tally(judged.draws), on="prompt_id", how="left")
    counts = ("n_trials", "n_correct", "n_distinct")
    table = table.with_columns(pl.col(counts).fill_null(0), pl.col("target").fill_null(0))
    table = stopped_difficulty(table, campaign.trials)
    table = table.with_columns(pl.col("difficulty").alias("sampler_difficulty"))
    if sampler.options.verifier == NONE:  # how often a draw is right was not looked at
        unknown = pl.lit(None, pl.Float64)
        table = table.with_columns(difficulty=unknown, sampler_difficulty=unknown)
    if other is not None:
        driving = difficulty(other).select("prompt_id", "difficulty")
        table = table.drop("difficulty").join(driving, on="prompt_id", how="left")
    return table.sort("prompt_id")


def _facts(judged: Judgement, campaign: Campaign, before: Preview, verifier: str) -> dict[str, Any]:
    draws = judged.draws
    refused = draws.filter(~pl.col("correct"))["reason"].value_counts().sort("reason")
    errors = draws["error"].drop_nulls()
    prior = next((t.rule.prior for t in campaign.trials.values()), None)
    return {
        "draws": draws.height,
        "correct": None if verifier == NONE else int(draws["correct"].sum()),
        "accepted": int(draws["correct"].sum()),
        "tokens": int(draws["n_tokens"].sum()),
        "refused": dict(refused.iter_rows()),
        "verifier_errors": len(errors),
        "unanswered": unanswered(errors) if outside(verifier) else 0,
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


def plan_stage(
    workspace: Workspace, recipe: Recipe, name: str, emit: Callable[[str], None]
) -> Preview:
    """Draws the pilot of a rejection sampling stage and predicts the rest.

    The pilot's draws are kept in the store, so running the stage afterwards begins behind them.

    Args:
        workspace: The root.
        recipe: The recipe.
        name: The stage's name.
        emit: Takes lines of progress.

    Raises:
        ValueError: if a stage before it has not been run with these settings.
    """
    stage = recipe.stage(name)
    assert stage.kind == "rejection_sampling", stage.kind
    before = outputs(workspace, recipe, until=name)
    pool = Pool(workspace.pool(recipe.pool.name))
    with engines() as opened:
        found = preview_of(Context(workspace, recipe, stage, pool, before, opened, emit))
    return replace(found, room=_room(recipe, found))


def _room(recipe: Recipe, found: Preview) -> int | None:
    """Answers that the budget can keep: rows, or loss tokens at the draws' mean length."""
    if recipe.stages[-1].of.role != "budget":
        return None
    if recipe.budget.unit == "rows":
        return recipe.budget.size
    if not found.draws.mean:
        return None  # nothing left to draw, and no length to go by
    return int(recipe.budget.size * found.draws.mean / found.tokens.mean)


def sampling_stages(recipe: Recipe) -> list[str]:
    """Names of the recipe's rejection sampling stages, in order."""
    return [stage.name for stage in recipe.stages if stage.kind == "rejection_sampling"]
