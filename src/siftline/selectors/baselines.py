"""Baselines that every other method has to beat, from narrow columns alone.

Random comes twice, because a pool of unequal sources drawn evenly is another set than one drawn
source by source. Length, perplexity and IFD rank rows by one number each; published comparisons
find all three below random on large mixed pools (docs/selectors.md).

Memory is the most that a method adds to the columns it was given, measured at 0.4 to 1.2 million
rows (ids of 32 digits, four buckets); 100 bytes a row are 10 GB at the limit of 100 million.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from siftline.kernels.draws import uniforms
from siftline.selectors.method import Ranked, Ranking, amounts_of, by_value
from siftline.selectors.spending import Budget, spend, spend_by_group


@dataclass(frozen=True)
class Random(Ranked):
    """An even draw without replacement: the rows with the smallest hash of seed and id.

    1 % more rows change about 1 % of the selection. Memory: about 270 bytes a row.

    Attributes:
        seed: Seed of the draw.
    """

    seed: int = 0

    def rank(self, pool: pl.DataFrame, budget: Budget, target: pl.DataFrame | None) -> Ranking:
        u = uniforms(self.seed, "random", pool["id"].to_list())
        order = by_value(-u)
        return Ranking(order, spend(order, amounts_of(pool, budget), budget), u, "not_drawn")


@dataclass(frozen=True)
class BalancedRandom(Ranked):
    """An even draw with the same budget for every source; small sources are taken whole.

    Memory: about 300 bytes a row.

    Attributes:
        by: Column that names the group of a row.
        seed: Seed of the draw.
    """

    by: str = "source"
    seed: int = 0

    def columns(self) -> dict[str, Any]:
        return {self.by: pl.String}

    def rank(self, pool: pl.DataFrame, budget: Budget, target: pl.DataFrame | None) -> Ranking:
        names = sorted(pool[self.by].unique().to_list())
        number = {name: i for i, name in enumerate(names)}
        groups = pool[self.by].replace_strict(number, return_dtype=pl.Int64).to_numpy()
        u = uniforms(self.seed, "balanced_random", pool["id"].to_list())
        found = spend_by_group(groups, -u, np.ones(len(names)), amounts_of(pool, budget), budget)
        taken = np.bincount(groups[found.spent.rows], minlength=len(names))
        table = pl.DataFrame(
            {
                self.by: names,
                "rows": np.bincount(groups, minlength=len(names)),
                "quota": found.quotas,
                "kept": taken,
            }
        )
        facts = {"groups": len(names)}
        tables = {"groups": table}
        return Ranking(found.order, found.spent, u, "not_drawn", facts=facts, tables=tables)


@dataclass(frozen=True)
class Length(Ranked):
    """The longest responses first (Zhao et al. 2024, arXiv 2402.04833).

    Memory: about 220 bytes a row.

    Attributes:
        column: Column of lengths.
        longest: False takes the shortest.
    """

    column: str = "n_tokens"
    longest: bool = True

    def columns(self) -> dict[str, Any]:
        return {self.column: pl.Float64}

    def rank(self, pool: pl.DataFrame, budget: Budget, target: pl.DataFrame | None) -> Ranking:
        values = pool[self.column].to_numpy().astype(np.float64)
        order = by_value(values if self.longest else -values)
        return Ranking(order, spend(order, amounts_of(pool, budget), budget), values, "below_cut")


@dataclass(frozen=True)
class Perplexity(Ranked):
    """Rows of the highest perplexity, or those in the middle (as compared in arXiv 2503.01807).

    Memory: about 210 bytes a row.

    Attributes:
        part: "top" takes the highest; "middle" those nearest to the median by rank.
        column: Column of perplexities of responses given their prompts.
    """

    part: Literal["top", "middle"] = "top"
    column: str = "perplexity"

    def __post_init__(self) -> None:
        if self.part not in ("top", "middle"):
            raise ValueError(f"part is {self.part!r}: use 'top' or 'middle'")

    def columns(self) -> dict[str, Any]:
        return {self.column: pl.Float64}

    def rank(self, pool: pl.DataFrame, budget: Budget, target: pl.DataFrame | None) -> Ranking:
        values = pool[self.column].to_numpy()
        order = by_value(values)
        reason = "below_cut"
        if self.part == "middle":
            # Places from the median outwards, the higher side first: in halves, so no ties.
            away = np.abs(2 * np.arange(len(values)) - (len(values) - 1))
            order, reason = order[np.argsort(away, kind="stable")], "far_from_median"
        return Ranking(order, spend(order, amounts_of(pool, budget), budget), values, reason)


@dataclass(frozen=True)
class Ifd(Ranked):
    """Instruction-following difficulty: the largest below 1 (Cherry LLM, arXiv 2308.12032).

    IFD is the loss of the response given the prompt over its loss without. At 1 and above the
    prompt does not help, which is read as a mismatch. Memory: about 240 bytes a row.

    Attributes:
        column: "ifd_loss_ratio" is Cherry LLM's; "ifd_perplexity_ratio" that of Superfiltering
            (arXiv 2402.00530), the exponential of the loss difference, which orders otherwise.
        limit: Values at or above it are dropped.
    """

    column: str = "ifd_loss_ratio"
    limit: float = 1.0

    def columns(self) -> dict[str, Any]:
        return {self.column: pl.Float64}

    def rank(self, pool: pl.DataFrame, budget: Budget, target: pl.DataFrame | None) -> Ranking:
        values = pool[self.column].to_numpy()
        order = by_value(values, values < self.limit)
        barred = pool.select(
            pl.when(pl.col(self.column) >= self.limit).then(pl.lit("ifd_mismatch"))
        )
        spent = spend(order, amounts_of(pool, budget), budget)
        return Ranking(order, spent, values, "below_cut", barred.to_series())


@dataclass(frozen=True)
class BestFit(Ranked):
    """Keeps the most likely answers of each prompt, then draws prompts until the budget is spent.

    Memory: about 300 bytes a row (measured as in `baselines`).

    Attributes:
        answers: Answers a prompt may keep (the paper: 1; more to match a row count).
        singles: Prompts with one answer: "drop" (the paper groups prompts with two or more) or
            "keep".
        column: Mean log-probability of the response under the model to be tuned.
        seed: Seed of the draw of prompts.
    """

    answers: int = 1
    singles: Literal["drop", "keep"] = "drop"
    column: str = "logprob_mean"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.answers < 1:
            raise ValueError(f"answers is {self.answers}: give 1 or more")
        if self.singles not in ("drop", "keep"):
            raise ValueError(f"singles is {self.singles!r}: use 'drop' or 'keep'")

    def columns(self) -> dict[str, Any]:
        return {"prompt_id": pl.String, self.column: pl.Float64}

    def rank(self, pool: pl.DataFrame, budget: Budget, target: pl.DataFrame | None) -> Ranking:
        prompts, of = np.unique(pool["prompt_id"].to_numpy(), return_inverse=True)
        values = pool[self.column].to_numpy()
        by_prompt = np.lexsort((np.arange(len(values)), -values, of))
        counts = np.bincount(of)
        starts = np.concatenate([[0], np.cumsum(counts)])[:-1]
        ranks = np.empty(len(values), dtype=np.int64)
        ranks[by_prompt] = np.arange(len(values)) - np.repeat(starts, counts) + 1
        single = (counts[of] == 1) & (self.singles == "drop")
        offered = (ranks <= self.answers) & ~single
        u = uniforms(self.seed, "best_fit", prompts.tolist())[of]
        # Best answers of all prompts come before any second one, so few prompts crowd out none.
        order = np.lexsort((np.arange(len(values)), u, ranks))
        order = order[offered[order]]
        last = np.minimum(starts + self.answers, starts + counts) - 1
        lost_to = np.where(offered | single, -1, by_prompt[last][of])
        reasons = np.where(single, "single_answer", np.where(offered, None, "not_best_fit"))  # type: ignore[call-overload]
        facts = {"prompts": len(prompts), "prompts_with_a_choice": int((counts > 1).sum())}
        return Ranking(
            order,
            spend(order, amounts_of(pool, budget), budget),
            values,
            "not_drawn",
            pl.Series(reasons.tolist(), dtype=pl.String),
            lost_to,
            facts,
        )
