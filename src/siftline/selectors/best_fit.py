"""Best fit per prompt: of several answers to one prompt, the one most likely under the model.

GRAPE (Zhang et al. 2025, arXiv 2502.04194). Likelihood decides among answers to one prompt and is
never compared across prompts, which is another method and a bad one; which prompts are taken is a
draw by hash.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from siftline.kernels.draws import uniforms
from siftline.selectors.method import Ranked, Ranking, amounts_of
from siftline.selectors.spending import Budget, spend


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
