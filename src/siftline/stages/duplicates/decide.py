"""Gate: removes rows that repeat another, and lists prompts whose reference answers contradict.

A row repeats another when its prompt and its response both do. Either alone is no fault: another
response to the same prompt is an alternative, another prompt with the response "yes" is another
question. So both are also asked of the candidates: a band of the MinHash signature takes half of
its slots from the prompt and half from the response, and both must agree. For two similarities of
at least s a band of r slots agrees with probability at least s^r, which is the usual recall
formula, while a thousand alternatives to one prompt still have to agree on the response's slots.

A text so short that no different text can reach the threshold (1 of size + 1 hashes missing is too
much; "yes", "42", the empty prompt of plain text) can only equal another. Its hash then stands in
for its slots and the band takes all of them from the other text.

Near means Jaccard similarity of character 5-grams: 5 is the length Leskovec, Rajaraman & Ullman
(Mining of Massive Datasets, 3.2.2) give for short documents. On word 5-grams (FineWeb, on whole web
pages) one changed word in a question of 45 words already costs a fifth of the similarity.

The steps are those of `siftline dedup` on texts: keys of all rows, groups of the rows that share
one (`kernels.sets.groups`), the sets of these rows alone, and decisions in keep order.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import polars as pl

from siftline.kernels.sets.keepers import Keep
from siftline.kernels.sets.lsh import Banding, banding_for
from siftline.rows.selection import Selection, decisions
from siftline.stages.duplicates.state import (
    DuplicateState,
    MakeRoom,
    gathered,
    optional,
    summarised,
    twin_keys,
)

MAX_PAIRS = 2_000_000_000
"""Comparisons before giving up: about ten minutes."""


@dataclass(frozen=True)
class DuplicatePlan:
    """The decision about the whole pool.

    Attributes:
        removed: id, reason, value, threshold, matched_id of the removed rows.
        clusters: id and size of each kept row that others were removed for.
        conflicts: prompt_ids with contradicting answers.
        facts: See `Duplicates`.
    """

    removed: pl.DataFrame
    clusters: pl.DataFrame
    conflicts: pl.Series
    facts: dict[str, Any]


@dataclass(frozen=True)
class Duplicates:
    """Removes exact and near duplicates, each for a kept row it was verified similar to.

    Reads id, prompt_id, prompt, response, answer, and where present priority and tie (integers,
    lower is kept first, default 0) and answer_from (an answer taken from the response contradicts
    nothing). Keep order is (priority, tie, id). Rows with an empty response are kept: their text
    shows too little. Rows whose answers contradict never remove each other, and where a prompt's
    answers contradict, no row with an answer is removed for one without.

    Attributes:
        threshold: Jaccard similarity both texts must reach; 0.8 as in Lee et al. 2022.
        ngram: Characters in a shingle.
        num_perm: Slots in a signature; 256 lets a band have 10 rows at threshold 0.8.
        numbers: "exact" compares only rows with the same numbers in the same order, in the prompt
            and in the response: half of GSM8K's questions are similar to themselves with a number
            changed. "any" leaves numbers to the similarity.
        keep: Which copy stays: "first" (the smallest id), "longest" (prompt and response),
            "score:FIELD" (the highest; a column of the input that no mapping uses) or
            "source:source=A,B,..." (the source named first). Rows that a stage added come last;
            ties go by id, and where all rows are of one source by a hash of prompt, response and
            answer: the name of a file decides nothing.
        seed: Seed of the permutation table, as in datasketch.
        max_rows: Most rows decided at once. 2 million of 20 + 40 words, a quarter of them copies,
            took 2.0 GiB of memory on the command line, 0.7 kB for each row more, and 1.1 kB a row
            in files (`benchmarks/dedup_growth.py`).
    """

    threshold: float = 0.8
    ngram: int = 5
    num_perm: int = 256
    numbers: Literal["exact", "any"] = "exact"
    seed: int = 1
    max_rows: int = 2_000_000
    keep: str = "first"

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"threshold={self.threshold} must be in (0, 1]")
        if self.ngram < 1 or self.max_rows < 1:
            raise ValueError(f"ngram={self.ngram} and max_rows={self.max_rows} must be at least 1")
        if self.numbers not in ("exact", "any"):
            raise ValueError(f"numbers={self.numbers!r} must be 'exact' or 'any'")
        self.policy()
        self.banding()

    def policy(self) -> Keep:
        """Which copy stays.

        Raises:
            ValueError: if `keep` is no policy, or none that rows of a pool can be held to.
        """
        keep = Keep.parse(self.keep)
        if keep.policy == "none":
            raise ValueError(
                "keep='none': a gate keeps one copy of each; drop all with siftline dedup"
            )
        if keep.policy == "source" and keep.column != "source":
            raise ValueError(
                f"keep={self.keep!r}: rows of a pool have source: give source:source=A,B"
            )
        return keep

    def input_columns(self) -> tuple[str, ...]:
        """The column of the input that decides which copy stays, where one does."""
        keep = self.policy()
        return (keep.column,) if keep.policy == "score" and keep.column is not None else ()

    def banding(self) -> Banding:
        """How signatures are cut; raises ValueError where num_perm is too small.

        A band has at least one slot of the prompt and one of the response.
        """
        return banding_for(self.threshold, self.num_perm, min_rows=2)

    def summarise(self, bucket: pl.DataFrame) -> DuplicateState:
        guarded = self.numbers == "exact"
        return summarised(bucket, self.banding(), self.threshold, self.ngram, self.seed, guarded)

    def decide(
        self,
        states: Sequence[DuplicateState],
        make_room: MakeRoom = lambda size: np.empty(size, np.uint32),
    ) -> DuplicatePlan:
        from siftline.kernels.sets.greedy import remove_similar
        from siftline.kernels.sets.groups import grouped

        everyone = pl.concat([state.rows for state in states])
        self._check(everyone)
        conflicts = _conflicted(everyone)
        bands = self.banding().bands

        def key(k: int) -> np.ndarray:
            # Equal rows find each other whatever their bands are.
            if k == bands:
                return twin_keys(everyone)
            return np.concatenate([state.bands[k] for state in states])

        def in_keep_order(found: np.ndarray) -> np.ndarray:
            ranked = everyone.select("priority", "tie", "id")[found]
            return ranked.select(pl.arg_sort_by("priority", "tie", "id")).to_series().to_numpy()

        groups = grouped(key, bands + 1, everyone.height, in_keep_order)
        rows = everyone[groups.rows]
        result = remove_similar(
            *_compared(rows, groups, conflicts, states, make_room),
            groups.count,
            self.threshold,
            MAX_PAIRS,
        )
        gone = np.flatnonzero(result.matched >= 0)
        identical = result.identical[gone]
        removed = pl.DataFrame(
            {
                "id": rows["id"][gone],
                "reason": np.where(identical, "exact_duplicate", "near_duplicate"),
                "value": result.value[gone],
                "threshold": np.where(identical, 1.0, self.threshold),
                "matched_id": rows["id"][result.matched[gone]],
            }
        )
        clusters = removed.group_by("matched_id").agg(size=pl.len().cast(pl.Int64) + 1)
        clusters = clusters.rename({"matched_id": "id"}).sort("id")
        facts = {
            "rows": everyone.height,
            "exact_duplicates": int(identical.sum()),
            "near_duplicates": int((~identical).sum()),
            "conflicting_prompts": len(conflicts),
            "empty_responses": everyone["exact"].null_count(),
            "candidate_pairs": result.pairs,
            "verified_pairs": result.verified,
            **self._banding_facts(),
            "cluster_sizes": _histogram(clusters["size"]),
        }
        return DuplicatePlan(removed, clusters, conflicts, facts)

    def apply(self, bucket: pl.DataFrame, plan: DuplicatePlan) -> Selection:
        frame = bucket.select("id").join(plan.removed, on="id", how="left", maintain_order="left")
        table = decisions(
            frame["id"],
            kept=frame["reason"].is_null(),
            reason=frame["reason"],
            value=frame["value"],
            threshold=frame["threshold"],
            matched_id=frame["matched_id"],
        )
        return Selection(
            table,
            facts=plan.facts,
            tables={
                "clusters": plan.clusters.join(bucket.select("id"), on="id", how="semi").sort("id"),
                "conflicts": _conflict_table(bucket, plan.conflicts),
            },
        )

    def _check(self, rows: pl.DataFrame) -> None:
        if rows.height > self.max_rows:
            raise ValueError(
                f"{rows.height:,} rows are more than max_rows={self.max_rows:,}: run duplicates on "
                "parts of the pool (by source or topic), or raise max_rows where memory allows"
            )
        if rows["id"].n_unique() < rows.height:
            twice = rows.filter(pl.col("id").is_duplicated())["id"][0]
            raise ValueError(f"id {twice} occurs twice: ingest collapses identical rows first")

    def _banding_facts(self) -> dict[str, Any]:
        banding = self.banding()
        return {
            "bands": banding.bands,
            "band_rows": banding.rows,
            "recall_at": banding.similarity,
            "expected_recall": banding.recall,
        }


def against(
    state: DuplicateState, states: Sequence[DuplicateState], gone: Collection[str]
) -> list[DuplicateState]:
    """What a decision about new rows needs of rows that were decided before.

    Holding `state` to the result decides its rows as deciding about all rows at once would, if they
    come last in keep order: an earlier row matters to them if it was kept and shares a band, or
    answers one of their prompts.

    Args:
        state: The new rows; `priority` higher than that of any earlier row.
        states: All earlier rows.
        gone: Ids of those that were removed.

    Returns:
        The earlier rows that matter, and `state`.
    """
    from siftline.kernels.sets.groups import among

    prompts = state.rows["prompt_id"].unique().to_list()
    wanted = state.bands[:]
    near = []
    for earlier in states:
        shares = earlier.rows["prompt_id"].is_in(prompts).to_numpy().copy()
        bands = earlier.bands[:]
        for mine, theirs in zip(wanted, bands, strict=True):
            shares |= among(theirs, mine)
        places = np.flatnonzero(shares)
        near.append(replace(earlier, rows=earlier.rows[places], bands=bands[:, places]))
    lost = gone if isinstance(gone, pl.Series) else pl.Series(list(gone), dtype=pl.String)
    ids = pl.concat([part.rows["id"] for part in [*near, state]])
    stays, at, found = ~ids.is_in(lost.implode()).to_numpy(), 0, []
    for part in near:
        mine = np.flatnonzero(stays[at : at + part.rows.height])
        at += part.rows.height
        if len(mine):
            found.append(replace(part, rows=part.rows[mine], bands=part.bands[:, mine]))
    return [*found, state]


def _conflicted(rows: pl.DataFrame) -> pl.Series:
    answered = rows.filter(pl.col("answer").is_not_null())
    spans = answered.group_by("prompt_id").agg(
        low=pl.col("answer").min(), high=pl.col("answer").max()
    )
    return spans.filter(pl.col("low") < pl.col("high"))["prompt_id"].sort()


def _compared(
    rows: pl.DataFrame,
    groups: Any,
    conflicts: pl.Series,
    states: Sequence[DuplicateState],
    make_room: MakeRoom,
) -> tuple[Any, Any]:
    """What the kernel takes: the rows that share a key, in keep order, and the sets they need."""
    from siftline.kernels.sets.greedy import Rows, told_apart

    sides = [rows[side].to_numpy() for side in ("prompt_key", "response_key")]
    keys = np.unique(np.concatenate(sides))
    texts = np.stack([np.searchsorted(keys, side) for side in sides], axis=1).astype(np.int32)
    last = groups.numbers[groups.lists[1:] - 1]  # of twins, who have it, or of a band
    twin = last >= groups.last
    starts, stops = groups.lists[:-1], groups.lists[1:] - twin
    read = told_apart(starts, stops, groups.numbers, texts, groups.count, len(keys))
    kernel_rows = Rows(
        starts=starts,
        stops=stops,
        groups=groups.numbers,
        identity=np.where(twin, last - groups.last, -1).astype(np.int32),
        texts=texts,
        guard=rows["guard"].to_numpy(),
        label=rows["answer"].cast(pl.Int64).fill_null(-1).to_numpy(),
        strict=rows["prompt_id"].is_in(conflicts.to_list()).to_numpy(),
    )
    return kernel_rows, gathered(states, keys, read, make_room)


def _histogram(sizes: pl.Series) -> dict[str, int]:
    counts = sizes.value_counts().sort("size")
    return {str(size): count for size, count in counts.rows()}


def _conflict_table(bucket: pl.DataFrame, conflicts: pl.Series) -> pl.DataFrame:
    # A bucket holds all rows of a prompt, so its lists are complete.
    independent = optional(bucket, "answer_from", pl.String).fill_null("") != "response"
    listed = bucket.filter(
        pl.col("prompt_id").is_in(conflicts.to_list()), pl.col("answer").is_not_null(), independent
    )
    return (
        listed.sort("prompt_id", "id")
        .group_by("prompt_id", maintain_order=True)
        .agg(ids=pl.col("id"), answers=pl.col("answer"))
    )
