"""Baselines that every other method has to beat, from narrow columns alone.

Random comes twice, because a pool of unequal sources drawn evenly is another set than one drawn
source by source. Length, perplexity and IFD rank rows by one number each; published comparisons
find all three below random on large mixed pools (docs/selectors.md). The loss drop ranks by two.

Memory is the most that a method adds to the columns it was given, measured at 0.4 to 1.2 million
rows (ids of 32 digits, four buckets); 100 bytes a row are 10 GB at the limit of 100 million.

Best fit per prompt: of several answers to one prompt, the one most likely under the model.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from siftline.kernels.draws import uniforms
from siftline.selectors.method import Ranked, Ranking, amounts_of, by_value
from siftline.selectors.spending import Budget, Spent, check_evened, spend, spend_by_group, tempered

WARMED = "logprob_mean_warm"
"""Mean log-probability of a response under the model warmed up on the target."""

NO_LOSS = 1e-6
"""Nats a token that are rounding: scores are computed in float32 at best."""


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

    A temperature stands between this and a draw in proportion, a cap keeps any source from being
    more than so much (see `spending`). Memory: about 300 bytes a row.

    Attributes:
        by: Column that names the group of a row.
        temperature: Shares of groups are what they hold to the power of 1 over it: 1 is in
            proportion, larger evens out; null is even.
        cap: Most that a group may have, in the budget's unit; null is no limit.
        seed: Seed of the draw.
    """

    by: str = "source"
    temperature: float | None = None
    cap: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        caps = {} if self.cap is None else {"*": self.cap}
        check_evened(1.0 if self.temperature is None else self.temperature, caps, {})

    def columns(self) -> dict[str, Any]:
        return {self.by: pl.String}

    def rank(self, pool: pl.DataFrame, budget: Budget, target: pl.DataFrame | None) -> Ranking:
        names = sorted(pool[self.by].unique().to_list())
        number = {name: i for i, name in enumerate(names)}
        groups = pool[self.by].replace_strict(number, return_dtype=pl.Int64).to_numpy()
        u = uniforms(self.seed, "balanced_random", pool["id"].to_list())
        amounts = amounts_of(pool, budget)
        shares = np.ones(len(names))
        if self.temperature is not None:
            held = np.bincount(groups, weights=amounts, minlength=len(names))
            shares = tempered(held, self.temperature)
        inside = np.flatnonzero(_so_far(groups, u, amounts) <= (self.cap or np.inf))
        found = spend_by_group(groups[inside], -u[inside], shares, amounts[inside], budget)
        spent = Spent(inside[found.spent.rows], found.spent.amount, found.spent.done)
        taken = np.bincount(groups[spent.rows], minlength=len(names))
        barred = np.full(pool.height, "over_source_cap", dtype=object)
        barred[inside] = None
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
        over = pl.Series(barred.tolist(), dtype=pl.String)
        order = inside[found.order]
        return Ranking(order, spent, u, "not_drawn", over, facts=facts, tables=tables)


def _so_far(groups: np.ndarray, u: np.ndarray, amounts: np.ndarray) -> np.ndarray:
    """What each row's group has spent with it when rows come by their draw, int64 (n,)."""
    order = np.lexsort((np.arange(len(u)), u, groups))
    sums = np.cumsum(amounts[order])
    first = np.flatnonzero(np.diff(groups[order], prepend=-1))
    before = np.concatenate([[0], sums])[first]
    out = np.empty(len(u), dtype=np.int64)
    out[order] = sums - np.repeat(before, np.diff([*first, len(u)]))
    return out


@dataclass(frozen=True)
class Length(Ranked):
    """The longest responses first, in tokens.

    Zhao et al. 2024 (arXiv 2402.04833) take the longest thousand of small pools. Xia et al. 2024
    ("Random Selection is Almost All You Need", arXiv 2410.09335) find token length the one cheap
    number that helps on pools of millions, above all for weak models. Memory: about 220 bytes a
    row.

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
    """Rows of the highest perplexity, the middle, or the lowest.

    Top and middle are compared in arXiv 2503.01807; POINTS (arXiv 2409.04828) keeps the lowest, of
    pre-training data. Memory: about 210 bytes a row.

    Attributes:
        part: "top" takes the highest; "middle" those nearest to the median by rank; "bottom" the
            lowest.
        column: Column of perplexities of responses given their prompts.
    """

    part: Literal["top", "middle", "bottom"] = "top"
    column: str = "perplexity"

    def __post_init__(self) -> None:
        if self.part not in ("top", "middle", "bottom"):
            raise ValueError(f"part is {self.part!r}: use 'top', 'middle' or 'bottom'")

    def columns(self) -> dict[str, Any]:
        return {self.column: pl.Float64}

    def rank(self, pool: pl.DataFrame, budget: Budget, target: pl.DataFrame | None) -> Ranking:
        values = pool[self.column].to_numpy()
        order = by_value(-values if self.part == "bottom" else values)
        reason = "above_cut" if self.part == "bottom" else "below_cut"
        if self.part == "middle":
            # Places from the median outwards, the higher side first: in halves, so no ties.
            away = np.abs(2 * np.arange(len(values)) - (len(values) - 1))
            order, reason = order[np.argsort(away, kind="stable")], "far_from_median"
        return Ranking(order, spend(order, amounts_of(pool, budget), budget), values, reason)


MISMATCH = 1.0
"""IFD from which a prompt does not help (Cherry LLM)."""


@dataclass(frozen=True)
class Ifd(Ranked):
    """Instruction-following difficulty: the largest below 1 (Cherry LLM, arXiv 2308.12032).

    IFD is the loss of the response given the prompt over its loss without. At 1 and above the
    prompt does not help, which is read as a mismatch. Memory: about 240 bytes a row.

    Attributes:
        column: "ifd_loss_ratio" is Cherry LLM's; "ifd_perplexity_ratio" that of Superfiltering
            (arXiv 2402.00530), the exponential of the loss difference, which orders otherwise.
    """

    column: str = "ifd_loss_ratio"

    def columns(self) -> dict[str, Any]:
        return {self.column: pl.Float64}

    def rank(self, pool: pl.DataFrame, budget: Budget, target: pl.DataFrame | None) -> Ranking:
        values = pool[self.column].to_numpy()
        order = by_value(values, values < MISMATCH)
        barred = pool.select(pl.when(pl.col(self.column) >= MISMATCH).then(pl.lit("ifd_mismatch")))
        spent = spend(order, amounts_of(pool, budget), budget)
        return Ranking(order, spent, values, "below_cut", barred.to_series())


@dataclass(frozen=True)
class LossDrop(Ranked):
    """Rows whose loss falls most when the model is warmed up on the target.

    Target-Aligned Paths (Yang, He & Cheng 2026, arXiv 2605.09404): a small adapter is trained for a
    short while on the target's rows alone; a row of the pool is worth the share of its loss that
    this takes away. No gradient of the pool is needed, and one warm-up serves any pool. The warm-up
    is the caller's: in a recipe the stage trains it; elsewhere the two columns are given. Memory:
    about 240 bytes a row.

    Attributes:
        before: Column of mean log-probabilities of the responses under the model as it is.
        after: The same under the model warmed up on the target.
        relative: Divides the drop by the loss before; false ranks by nats a token, which favours
            rows of high loss.
        lora_rank: Rank of the warm-up's adapter, on all linear layers; small, for a larger one
            learns few rows by heart.
        epochs: Passes of the warm-up over the target's rows.
        learning_rate: Its peak rate.
        batch_rows: Rows of one of its optimizer steps.
        seed: Of its order and first weights.
    """

    before: str = "logprob_mean"
    after: str = WARMED
    relative: bool = True
    lora_rank: int = 8
    epochs: float = 3.0
    learning_rate: float = 1e-4
    batch_rows: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lora_rank", "batch_rows", "epochs", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")
        if self.before == self.after:
            raise ValueError(f"before and after are both {self.before!r}: name two columns")

    def columns(self) -> dict[str, Any]:
        return {self.before: pl.Float64, self.after: pl.Float64}

    def rank(self, pool: pl.DataFrame, budget: Budget, target: pl.DataFrame | None) -> Ranking:
        before, after = (-pool[name].to_numpy() for name in (self.before, self.after))
        drop = before - after
        if self.relative:  # of a row without a loss nothing could be taken away
            drop = np.divide(drop, before, out=np.zeros(len(drop)), where=before > NO_LOSS)
        order = by_value(drop)
        facts = {"mean_drop": float(drop.mean()), "rows_of_rising_loss": int((drop < 0).sum())}
        spent = spend(order, amounts_of(pool, budget), budget)
        return Ranking(order, spent, drop, "below_cut", facts=facts)


@dataclass(frozen=True)
class BestFit(Ranked):
    """Keeps the most likely answers of each prompt, then draws prompts until the budget is spent.

    With `fit: random` it is the baseline of so many answers a prompt, without likelihoods and
    whatever they say (OpenThoughts, arXiv 2506.04178: 1, 4 or 16). `fill: prompts` then takes all
    answers of a prompt before the next, so that a budget buys a sixteenth of the prompts. Memory:
    about 300 bytes a row (measured as in `baselines`).

    Attributes:
        answers: Answers a prompt may keep (the paper: 1; more to match a row count).
        singles: Prompts with one answer: "drop" (the paper groups prompts with two or more) or
            "keep".
        fit: Which answers of a prompt are kept: the most likely ("likelihood") or "random" ones.
        fill: What a budget is spent on first: one answer of every prompt, then a second
            ("answers"), or all answers of a prompt ("prompts").
        column: Mean log-probability of the response under the model to be tuned.
        seed: Seed of the draw of prompts.
    """

    answers: int = 1
    singles: Literal["drop", "keep"] = "drop"
    fit: Literal["likelihood", "random"] = "likelihood"
    fill: Literal["answers", "prompts"] = "answers"
    column: str = "logprob_mean"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.answers < 1:
            raise ValueError(f"answers is {self.answers}: give 1 or more")
        if self.singles not in ("drop", "keep"):
            raise ValueError(f"singles is {self.singles!r}: use 'drop' or 'keep'")
        if self.fit not in ("likelihood", "random"):
            raise ValueError(f"fit is {self.fit!r}: use 'likelihood' or 'random'")
        if self.fill not in ("answers", "prompts"):
            raise ValueError(f"fill is {self.fill!r}: use 'answers' or 'prompts'")

    def columns(self) -> dict[str, Any]:
        likelihood = {self.column: pl.Float64} if self.fit == "likelihood" else {}
        return {"prompt_id": pl.String, **likelihood}

    def rank(self, pool: pl.DataFrame, budget: Budget, target: pl.DataFrame | None) -> Ranking:
        prompts, of = np.unique(pool["prompt_id"].to_numpy(), return_inverse=True)
        if self.fit == "random":
            values = uniforms(self.seed, "best_fit answers", pool["id"].to_list())
        else:
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
        keys = (u, ranks) if self.fill == "answers" else (ranks, u)
        order = np.lexsort((np.arange(len(values)), *keys))
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
