"""Rejection sampling: draws from the sampler until every prompt has its verified answers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa

from siftline import schema
from siftline.kernels.draws import gumbel_top_k, uniforms
from siftline.ledger import StageResult
from siftline.progress import Progress
from siftline.scoring.confidence import final_answer, prompts_of
from siftline.scoring.recorder import Recorder
from siftline.scoring.rejection import RejectionSampling
from siftline.scoring.samples import COLUMNS, draw_samples
from siftline.scoring.verifiers import get_verifier
from siftline.selectors.difficulty import DRAWS, accept, difficulty, plan_trials, tally, targets_for
from siftline.selectors.selection import decisions
from siftline.stages.context import Context, StageRun


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
    problems, skipped = _problems(context.recorder("sampler"), context.store_buckets())
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
    problems, _ = _problems(sampler, buckets)
    if not problems or draws < 1:
        return []
    prompts = sorted(problems)
    each, over = divmod(draws, len(prompts))
    u = uniforms(options.seed, "vanilla draws", prompts)
    first = {prompts[i] for i in gumbel_top_k(u, prompts, over)}
    wanted = {p: range(each + (p in first)) for p in prompts}
    asked = {p: n for p, n in wanted.items() if len(n)}
    drawn = _judged(sampler, problems, asked, options, get_verifier(options.verifier))
    everything = pl.DataFrame({"prompt_id": prompts, "target": [draws] * len(prompts)})
    return _added_rows(problems, drawn, accept(drawn, everything))


def _problems(
    sampler: Recorder, buckets: Iterable[tuple[int, pa.Table]]
) -> tuple[dict[str, _Problem], dict[str, int]]:
    """Prompts with one independent answer, by prompt id; counts of those left out."""
    problems: dict[str, _Problem] = {}
    skipped = {"no_independent_answer": 0, "conflicting_answers": 0, "too_long": 0}
    for bucket, rows in buckets:
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
        if lost:
            first = min(lost)
            raise RuntimeError(
                f"{len(lost)} prompts got no draw, first {first} ({lost[first]}): run again, what "
                "was drawn is kept"
            )
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
