"""The budget stage: the last one, and the only one that knows how much may be kept.

Prompts are taken by cluster quota, answers per prompt by difficulty target (DART-Math), and inside
a prompt the verified answers most likely under the target model win (GRAPE, arXiv 2502.04194).
Likelihood is never compared across prompts: that is another method, and a bad one. Which prompts
are taken is drawn by hash, so a pool grown by 1 % keeps about 99 % of its selection.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import polars as pl

from siftline.kernels.draws import largest_remainder, uniforms
from siftline.rows.selection import Selection, decisions
from siftline.selectors.spending import cap_of, check_evened, check_mixture, group_of, split
from siftline.stages.rejection_sampling.difficulty import HARDEST, level_of, targets_of

MAX_ROWS = 100_000_000
"""Rows one machine allocates over, at about 150 bytes each."""
ORIGINS = ("pool", "sampler", "target")
TARGETS = ("uniform", "prop2diff", "scores")
AIMED = "aimed"
"""Optional column: the target that a sampling stage drew for, of the prompt; null without one."""
COLUMNS = {
    "id": pl.String,
    "prompt_id": pl.String,
    "cluster": pl.Int32,  # of the prompt; null forms a cluster of its own, shown as -1
    "difficulty": pl.Float64,  # of the prompt, in [0, 1]; null where not measured
    "n_tokens": pl.Int64,  # loss tokens
    "logprob_mean": pl.Float64,  # under the target model; may be null with fit "random"
    "verified": pl.Boolean,  # null where nothing can be verified
    "origin": pl.String,  # "pool", "sampler", or "target": drawn by the model to be trained
}


@dataclass(frozen=True)
class Allocate:
    """Spends the budget. Global: the narrow columns (`COLUMNS`) of all rows are held in memory.

    All answers to a prompt must be in one bucket; ids made by `schema` see to that.

    Attributes:
        size: What may be kept, in `unit`.
        unit: "loss_tokens" keeps the total at or below the size so that no further answer on offer
            fits; "rows" meets it exactly.
        on_shortfall: When there is too little on offer: "error", or a "smaller" selection.
        quota: Budget per cluster: "proportional" to the answers its prompts should get, or "equal".
        targets: Answers per prompt: "uniform", "prop2diff", in proportion to difficulty, or
            "scores", those that a sampling stage took from a scorer. By default what the recipe's
            rejection_sampling stage drew for, prompt by prompt; "uniform" without one.
        answers: Most answers per prompt. By default the k of the recipe's rejection_sampling stage;
            without one 1, GRAPE's one per instruction.
        max_quantile: Quantile of the difficulties that counts as the hardest under "prop2diff". By
            default that of the recipe's rejection_sampling stage.
        fit: Which answers of a prompt win: the most likely ("likelihood", GRAPE), or "random" ones,
            its control.
        own_samples: Whether samples of the target model compete. By default they do behind a
            rejection_sampling stage, which verified them; GRAPE lost 4 to 7 points by others.
        mixture: Budget by source, as weights; `*` is every source not named, and a source without a
            weight is not asked. Empty asks all alike. What a source lacks goes to the others.
        temperature: Evens the weights of sources out: each counts to the power of 1 over it. 1
            leaves them, a large one makes them equal. Without a mixture the weights are what the
            sources have on offer.
        caps: Most of the budget that a source may have, in its unit; `*` is for those not named.
        levels: Number of difficulty levels in the reports (MATH has 5).
        seed: The recipe's seed.
    """

    size: int
    unit: Literal["loss_tokens", "rows"] = "loss_tokens"
    on_shortfall: Literal["error", "smaller"] = "error"
    quota: Literal["proportional", "equal"] = "proportional"
    targets: Literal["uniform", "prop2diff", "scores"] = "uniform"
    answers: int = 1
    max_quantile: float = HARDEST
    fit: Literal["likelihood", "random"] = "likelihood"
    own_samples: bool = False
    mixture: dict[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    caps: dict[str, int] = field(default_factory=dict)
    levels: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("size", "answers", "levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more")
        for name, choices in (
            ("unit", ("loss_tokens", "rows")),
            ("on_shortfall", ("error", "smaller")),
            ("quota", ("proportional", "equal")),
            ("targets", TARGETS),
            ("fit", ("likelihood", "random")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: use one of {choices}")
        if not 0 < self.max_quantile <= 1:
            raise ValueError(
                f"max_quantile is {self.max_quantile}: give a number above 0, at most 1"
            )
        if self.mixture:
            check_mixture(self.mixture, "mixture")
        check_evened(self.temperature, self.caps, self.mixture)

    @property
    def by_source(self) -> bool:
        """Whether each source has its own part of the budget."""
        return bool(self.mixture or self.caps or self.temperature != 1)

    def summarise(self, bucket: pl.DataFrame) -> pl.DataFrame:
        """The narrow columns of one bucket, checked, with what bars a row from competing.

        With a mixture, a temperature or caps it reads the column `source` too; what was drawn for
        stands in `AIMED`.
        """
        part = pl.lit(None, pl.String)
        if self.by_source:
            named = pl.col("source").cast(pl.String).fill_null("")
            part = group_of(self.mixture) if self.mixture else named
        narrow = [pl.col(name).cast(dtype) for name, dtype in COLUMNS.items()]
        aimed = pl.col(AIMED) if AIMED in bucket.columns else pl.lit(None)
        rows = bucket.select(*narrow, part.alias("part"), aimed.cast(pl.Int64).alias(AIMED))
        rows = rows.with_columns(pl.col("cluster").fill_null(-1), bar=self._bar())
        score = pl.col("logprob_mean")
        if self.fit == "random":
            drawn = uniforms(self.seed, "allocate_fit", rows["id"].to_list())
            score = pl.lit(pl.Series(drawn, dtype=pl.Float64))
        rows = rows.with_columns(score.alias("score"))
        unfit = pl.col("bar").is_null() & ~pl.col("score").is_finite().fill_null(False)
        for fault, what in (
            (~pl.col("origin").is_in(ORIGINS).fill_null(False), f"an origin not in {ORIGINS}"),
            (~(pl.col("n_tokens") > 0).fill_null(False), "no count of loss tokens above 0"),
            (unfit, "no finite logprob_mean (score them, or set fit: random)"),
        ):
            bad = rows.filter(fault)["id"]
            if len(bad):
                raise ValueError(f"{len(bad)} rows have {what}, first {bad[0]}")
        return rows

    def decide(self, states: Sequence[pl.DataFrame]) -> "Plan":
        """Ranks answers inside prompts, orders prompts by a draw and spends the budget."""
        rows = pl.concat(states).sort("id")
        if rows.height > MAX_ROWS:
            raise ValueError(f"{rows.height} rows, over {MAX_ROWS}: put a gate or shortlist before")
        if rows["id"].is_duplicated().any():
            twice = str(rows["id"].filter(rows["id"].is_duplicated())[0])
            raise ValueError(f"id {twice} comes twice: give each row once")
        prompts = self._prompts(rows)
        ranked = _rank(rows, prompts)
        offers = ranked.filter(pl.col("rank") <= pl.col("target"))
        if self.by_source and (self.mixture or offers.height):
            parts, clusters, spent = self._mixed(prompts, offers)
        else:
            parts, clusters = None, self._quotas(prompts, offers, self.size)
            spent = _spend(offers, clusters, self.unit, self.size).with_columns(capped=False)
        plan = self._plan(prompts, ranked, spent, clusters, parts)
        if plan.facts["shortfall"] and self.on_shortfall == "error":
            raise ValueError(_complaint(self, plan))
        if plan.facts["rows"] == 0 and not spent.is_empty():
            shortest = int(spent["n_tokens"].to_numpy().min())
            raise ValueError(
                f"a budget of {self.size} loss tokens is below the shortest answer on offer "
                f"({shortest}): raise it"
            )
        return plan

    def apply(self, bucket: pl.DataFrame, plan: "Plan") -> Selection:
        """Says why each row went; facts and tables are those of the whole pool.

        An offered row's value is what its cluster had spent with it, its threshold the cluster's
        quota. A row that was not the best fit shows its score, held against the last one offered.
        """
        rows = self.summarise(bucket).select("id", "bar")
        rows = rows.join(plan.rows, on="id", how="left", validate="1:1").sort("id")
        offered = pl.col("chosen").is_not_null()
        lost = pl.when(offered).then(pl.lit("over_budget")).otherwise(pl.lit("not_best_fit"))
        lost = pl.when(pl.col("capped")).then(pl.lit("over_source_cap")).otherwise(lost)
        shown = rows.select(
            "id",
            kept=pl.col("chosen").fill_null(False),
            reason=pl.coalesce("bar", lost),
            value=pl.when(offered).then(pl.col("spent").cast(pl.Float64)).otherwise("score"),
            threshold=pl.when(offered).then(pl.col("quota").cast(pl.Float64)).otherwise("least"),
            matched_id=pl.when(~offered).then(pl.col("lost_to")),
        )
        columns = shown.to_dict()
        decided = decisions(columns.pop("id"), **columns)
        return Selection(decided, plan.facts, plan.tables, plan.vacuous)

    def _bar(self) -> pl.Expr:
        """Why a row may not compete, or null; a verified answer bars the unproven beside it."""
        wanted = pl.col("part").is_not_null() | pl.lit(not self.by_source)
        asked = ((pl.col("origin") != "target") | pl.lit(self.own_samples)) & wanted
        proven = (asked & pl.col("verified").fill_null(False)).any().over("prompt_id")
        unproven = ~pl.col("verified").fill_null(~proven)
        return (
            pl.when(~wanted)
            .then(pl.lit("source_not_in_mixture"))
            .when(~asked)
            .then(pl.lit("own_sample_not_asked"))
            .when(unproven)
            .then(pl.lit("not_verified"))
        )

    def _prompts(self, rows: pl.DataFrame) -> pl.DataFrame:
        """One line per prompt: cluster, difficulty, level and how many answers it should get."""
        facts = ("cluster", "difficulty", AIMED)
        prompts = (
            rows.group_by("prompt_id")
            .agg(
                *(pl.col(name).drop_nulls().min() for name in facts),
                *(pl.col(name).drop_nulls().n_unique().alias(f"n_{name}") for name in facts),
            )
            .sort("prompt_id")
        )
        for name in facts:
            torn = prompts.filter(pl.col(f"n_{name}") > 1)["prompt_id"]
            if len(torn):
                raise ValueError(
                    f"{len(torn)} prompts have more than one {name}, first {torn[0]}: "
                    "join it by prompt_id"
                )
        d = prompts["difficulty"].to_numpy().astype(np.float64)
        target = targets_of(self.targets, d, self.answers, self.max_quantile, prompts[AIMED])
        return prompts.select("prompt_id", "cluster", "difficulty").with_columns(
            pl.Series("level", level_of(d, self.levels), dtype=pl.Int32),
            pl.Series("target", target, dtype=pl.Int64),
            pl.Series("u", uniforms(self.seed, "allocate", prompts["prompt_id"].to_list())),
        )

    def _amount(self) -> pl.Expr:
        return pl.col("n_tokens").sum() if self.unit == "loss_tokens" else pl.len().cast(pl.Int64)

    def _mixed(
        self, prompts: pl.DataFrame, offers: pl.DataFrame
    ) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
        """Spends each source's part as if it were the whole; then what rows' edges left over.

        A prompt with answers of two sources counts in the quotas of both.
        """
        offers, over = self._capped(offers)
        if offers.is_empty() and over.height:
            raise ValueError(
                f"caps {self.caps} are below the first answer of every source: raise them"
            )
        have = dict(offers.group_by("part").agg(self._amount().alias("capacity")).iter_rows())
        mixture = self.mixture or {str(name): float(amount) for name, amount in have.items()}
        parts = split(mixture, self.size, have, self.temperature)
        clusters, spent = [], []
        for name, quota in parts.select("source", "quota").iter_rows():
            mine = offers.filter(pl.col("part") == name)
            asked = prompts.filter(pl.col("prompt_id").is_in(mine["prompt_id"].to_list()))
            clusters.append(self._quotas(asked, mine, quota))
            spent.append(_spend(mine, clusters[-1], self.unit, quota))
        bought = _filled(pl.concat(spent).sort("u", "prompt_id", "rank"), self.size)
        bought = pl.concat(
            [bought.with_columns(capped=False), over.with_columns(chosen=False, capped=True)],
            how="diagonal_relaxed",
        )
        summed = pl.concat(clusters).group_by("cluster").agg(pl.all().sum()).sort("cluster")
        chosen = (
            bought.filter("chosen")
            .group_by("part")
            .agg(chosen=pl.len().cast(pl.Int64), chosen_tokens=pl.col("n_tokens").sum())
        )
        parts = parts.join(chosen, left_on="source", right_on="part", how="left")
        return parts.sort("source").fill_null(0), summed, bought

    def _capped(self, offers: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Offers that the caps of their sources leave, in drawn order, and those beyond."""
        names = offers["part"].unique().to_list()
        limits = {name: cap_of(self.caps, name) for name in names if name is not None}
        limits = {name: cap for name, cap in limits.items() if cap is not None}
        amount = pl.col("n_tokens") if self.unit == "loss_tokens" else pl.lit(1, pl.Int64)
        cap = pl.col("part").replace_strict(limits, default=None, return_dtype=pl.Int64)
        ordered = offers.sort("u", "prompt_id", "rank").with_columns(amount=amount)
        beyond = (pl.col("amount").cum_sum().over("part") > cap).fill_null(False)
        marked = ordered.with_columns(beyond=beyond).drop("amount")
        inside, over = marked.filter(~pl.col("beyond")), marked.filter("beyond")
        return inside.drop("beyond"), over.drop("beyond")

    def _quotas(self, prompts: pl.DataFrame, offers: pl.DataFrame, size: int) -> pl.DataFrame:
        """Splits a size over clusters by the answers their prompts should get."""
        amount = self._amount()
        have = offers.group_by("cluster").agg(amount.alias("capacity"), pl.len().alias("n"))
        table = prompts.group_by("cluster").agg(wanted=pl.col("target").sum())
        table = table.join(have, on="cluster", how="left").sort("cluster").fill_null(0)
        n, capacity = table["n"].to_numpy(), table["capacity"].to_numpy()
        # What a wanted answer costs: the cluster's mean, or everyone's where it has none on offer.
        mean = capacity.sum() / max(int(n.sum()), 1)
        cost = np.divide(capacity, n, out=np.full(len(n), mean), where=n > 0)
        weights = table["wanted"].to_numpy() * cost
        if self.quota == "equal":
            weights = np.ones(len(weights))
        return table.select("cluster", "capacity").with_columns(
            pl.Series("share", largest_remainder(weights, size), dtype=pl.Int64),
            pl.Series("quota", largest_remainder(weights, size, capacity), dtype=pl.Int64),
        )

    def _plan(
        self,
        prompts: pl.DataFrame,
        ranked: pl.DataFrame,
        spent: pl.DataFrame,
        clusters: pl.DataFrame,
        parts: pl.DataFrame | None,
    ) -> "Plan":
        """Gathers decisions by row, and the reports."""
        chosen = spent.filter("chosen")
        outcome = spent.select("id", "chosen", "capped", "spent", "quota")
        edges = (
            spent.sort("prompt_id", "rank")
            .group_by("prompt_id")
            .agg(
                pl.col("score").last().alias("least"),
                pl.col("id").filter("chosen").last().alias("lost_to"),
            )
        )
        rows = ranked.select("id", "prompt_id", "score").join(outcome, on="id", how="left")
        rows = rows.join(edges, on="prompt_id", how="left").drop("prompt_id")
        total = int(chosen["n_tokens"].sum()) if self.unit == "loss_tokens" else chosen.height
        short = max(0, self.size - int(clusters["capacity"].sum()))
        facts = {
            "unit": self.unit,
            "size": self.size,
            "spent": total,
            "shortfall": short,
            "rows": chosen.height,
            "loss_tokens": int(chosen["n_tokens"].sum()),
            "prompts": chosen["prompt_id"].n_unique(),
            "prompts_in": prompts.height,
            "offered": spent.height,
            "filled_past_quota": chosen.filter(pl.col("spent") > pl.col("quota")).height,
        }
        levels = _levels(prompts, spent)
        tables = {"clusters": _by_cluster(clusters, levels), "levels": levels}
        if parts is not None:
            tables["mixture"] = parts
            facts["mixture_shortfall"] = int(parts["shortfall"].sum())
            facts["over_source_cap"] = spent.filter("capped").height
        vacuous = chosen.height == ranked.height == spent.height
        return Plan(rows, facts, tables, vacuous)


@dataclass(frozen=True)
class Plan:
    """The outcome of every row that competed, with the facts and tables of the whole pool.

    `tables["clusters"]` and `tables["levels"]` give rows wanted (the targets), offered and chosen;
    `missing` is wanted less offered. A cluster's `share` is its part of the size before capacities,
    `quota` after, `shortfall` what it had too little of, in the budget's unit. With a mixture,
    `tables["mixture"]` says the same of its sources (`spending.split`), and what was chosen.
    """

    rows: pl.DataFrame
    facts: dict[str, Any]
    tables: dict[str, pl.DataFrame]
    vacuous: bool


def _rank(rows: pl.DataFrame, prompts: pl.DataFrame) -> pl.DataFrame:
    """Ranks the competing answers of each prompt from 1, best score first, ties by id."""
    competing = rows.filter(pl.col("bar").is_null()).drop("cluster", "difficulty", AIMED)
    competing = competing.sort("prompt_id", "score", "id", descending=[False, True, False])
    competing = competing.with_columns(rank=pl.int_range(1, pl.len() + 1).over("prompt_id"))
    return competing.join(prompts, on="prompt_id", how="left", maintain_order="left")


def _spend(offers: pl.DataFrame, clusters: pl.DataFrame, unit: str, size: int) -> pl.DataFrame:
    """Marks the offers the budget buys: `spent` in the cluster so far, its `quota`, `chosen`.

    Each cluster takes prompts in drawn order, all their offers, while its quota lasts. In tokens a
    quota rarely ends on a row's edge; what is left over goes to the first offers, in drawn order
    over all clusters, that still fit. There a short answer may pass a better one that is too long.
    """
    ordered = offers.join(clusters.select("cluster", "quota"), on="cluster", how="left")
    amount = pl.col("n_tokens") if unit == "loss_tokens" else pl.lit(1, dtype=pl.Int64)
    ordered = ordered.sort("u", "prompt_id", "rank").with_columns(amount.alias("amount"))
    ordered = ordered.with_columns(spent=pl.col("amount").cum_sum().over("cluster"))
    ordered = ordered.with_columns(chosen=pl.col("spent") <= pl.col("quota"))
    return _filled(ordered, size)


def _filled(ordered: pl.DataFrame, size: int) -> pl.DataFrame:
    """Chooses further offers, in the order given, as long as they fit into the size."""
    amounts, chosen = ordered["amount"].to_numpy(), ordered["chosen"].to_numpy().copy()
    room = size - int(amounts[chosen].sum())
    assert room >= 0, f"{-room} over the budget"
    waiting = np.flatnonzero(~chosen)
    least = int(amounts[waiting].min()) if len(waiting) else 0
    for i, cost in zip(waiting.tolist(), amounts[waiting].tolist(), strict=True):
        if room < least:
            break
        if cost <= room:
            chosen[i] = True
            room -= cost
    return ordered.with_columns(chosen=pl.Series(chosen, dtype=pl.Boolean))


def _levels(prompts: pl.DataFrame, spent: pl.DataFrame) -> pl.DataFrame:
    """Rows wanted, offered and chosen by cluster and difficulty level (0: not measured)."""
    by = ["cluster", "level"]
    have = spent.group_by(by).agg(
        offered=pl.len().cast(pl.Int64),
        chosen=pl.col("chosen").sum().cast(pl.Int64),
        chosen_tokens=pl.col("n_tokens").filter("chosen").sum(),
    )
    wanted = prompts.group_by(by).agg(
        prompts=pl.len().cast(pl.Int64), wanted=pl.col("target").sum()
    )
    table = wanted.join(have, on=by, how="left").sort(by).fill_null(0)
    return table.with_columns(missing=pl.col("wanted") - pl.col("offered"))


def _by_cluster(clusters: pl.DataFrame, levels: pl.DataFrame) -> pl.DataFrame:
    """The levels summed up by cluster, beside its part of the budget."""
    counts = ["prompts", "wanted", "offered", "chosen", "chosen_tokens", "missing"]
    summed = levels.group_by("cluster").agg(pl.col(counts).sum())
    shortfall = (pl.col("share") - pl.col("capacity")).clip(lower_bound=0)
    table = clusters.with_columns(shortfall=shortfall).join(summed, on="cluster", how="left")
    return table.sort("cluster")


def _complaint(config: Allocate, plan: Plan) -> str:
    """The shortfall in one line: how much, where most of it is, what to do."""
    worst = plan.tables["levels"].sort(
        "missing", "cluster", "level", descending=[True, False, False]
    )
    where = "no prompt came in"
    if not worst.is_empty():
        cluster, level, missing = worst.select("cluster", "level", "missing").row(0)
        where = f"most answers missing in cluster {cluster}, level {level}: {missing}"
    return (
        f"the budget of {config.size} {config.unit} is short by {plan.facts['shortfall']}: "
        f"{plan.facts['offered']} rows on offer ({where}); add data or samples, raise answers "
        f"(now {config.answers}), lower size, or set on_shortfall: smaller"
    )
