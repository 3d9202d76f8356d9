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
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

import numpy as np
import polars as pl

from siftline.kernels.draws import hash64
from siftline.kernels.keep import Keep
from siftline.kernels.lsh import Banding, band_groups, band_keys, banding_for
from siftline.kernels.text import numbers, plain
from siftline.selectors.selection import Selection, decisions

MAX_PAIRS = 2_000_000_000
"""Comparisons before giving up: about ten minutes."""


@dataclass(frozen=True)
class DuplicateState:
    """What is known of some rows: hashes only.

    Attributes:
        rows: One line a row: id, prompt_id, priority, exact (hash of the response, null where it is
            empty), prompt_key, response_key, guard, answer (hash, or null), bands.
        keys: Ascending uint64 hashes of the distinct texts, shape (t,).
        shingles: Their shingle sets, `kernels.shingles.Sets` of length t.
    """

    rows: pl.DataFrame
    keys: np.ndarray
    shingles: Any


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

    Reads id, prompt_id, prompt, response, answer, and where present priority (int, lower is kept
    first, default 0) and answer_from (an answer taken from the response contradicts nothing). Keep
    order is (priority, id). Rows with an empty response are kept: their text shows too little.
    Rows whose answers contradict never remove each other, and where a prompt's answers contradict,
    no row with an answer is removed for one without.

    Attributes:
        threshold: Jaccard similarity both texts must reach; 0.8 as in Lee et al. 2022.
        ngram: Characters in a shingle (module docstring).
        num_perm: Slots in a signature; 256 lets a band have 10 rows at threshold 0.8.
        numbers: "exact" compares only rows with the same numbers in the same order, in the prompt
            and in the response: half of GSM8K's questions are similar to themselves with a number
            changed. "any" leaves numbers to the similarity.
        keep: Which copy stays: "first" (the smallest id), "longest" (prompt and response),
            "score:FIELD" (the highest; a column of the input that no mapping uses) or
            "source:source=A,B,..." (the source named first). The stage makes `priority` of it;
            rows that a stage added come last, and ties go by id.
        seed: Of the permutation table, as in datasketch.
        max_rows: Most rows decided at once. A row of 60 + 60 words takes about 3 kB, and deciding
            takes about that again.
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

    def banding(self) -> Banding:
        """How signatures are cut; raises ValueError where num_perm is too small.

        A band has at least one slot of the prompt and one of the response.
        """
        return banding_for(self.threshold, self.num_perm, min_rows=2)

    def summarise(self, bucket: pl.DataFrame) -> DuplicateState:
        from siftline.kernels.shingles import char_shingles

        sides: dict[str, np.ndarray] = {}
        plains: dict[int, str] = {}
        for side in ("prompt", "response"):
            folded = [plain(text or "") for text in bucket[side].to_list()]
            hashed = [hash64(text) for text in folded]
            plains.update(zip(hashed, folded, strict=True))
            sides[side] = np.array(hashed, np.uint64)
        keys = np.array(sorted(plains), np.uint64)
        shingles = char_shingles([plains[int(key)] for key in keys], self.ngram)
        texts = np.stack([np.searchsorted(keys, sides[s]) for s in ("prompt", "response")], axis=1)
        guards = np.array([self._guard(plains[int(key)]) for key in keys], np.uint64)
        guard = _mixed(guards[texts[:, 0]], guards[texts[:, 1]])
        raw = bucket["response"].to_list()
        rows = bucket.select(
            "id", "prompt_id", _optional(bucket, "priority", pl.Int64).fill_null(0)
        ).with_columns(
            pl.Series("exact", [hash64(t) if t else None for t in raw], pl.UInt64),
            pl.Series("prompt_key", sides["prompt"]),
            pl.Series("response_key", sides["response"]),
            pl.Series("guard", guard),
            pl.Series("answer", [_answer_hash(*a) for a in _answers(bucket)], pl.UInt64),
            self._bands(shingles, texts, guard, keys),
        )
        return DuplicateState(rows, keys, shingles)

    def decide(self, states: Sequence[DuplicateState]) -> DuplicatePlan:
        from siftline.kernels.greedy import remove_similar

        rows = pl.concat([state.rows for state in states]).sort("priority", "id")
        self._check(rows)
        keys, sets = _merged(states)
        conflicts = _conflicted(rows)
        groups, n_groups = band_groups(rows["bands"].to_numpy())
        groups[rows["exact"].is_null().to_numpy()] = -1
        result = remove_similar(
            _kernel_rows(rows, keys, conflicts), sets, groups, n_groups, self.threshold, MAX_PAIRS
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
            "rows": rows.height,
            "exact_duplicates": int(identical.sum()),
            "near_duplicates": int((~identical).sum()),
            "conflicting_prompts": len(conflicts),
            "empty_responses": rows["exact"].null_count(),
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
                "clusters": plan.clusters.filter(pl.col("id").is_in(bucket["id"].to_list())),
                "conflicts": _conflict_table(bucket, plan.conflicts),
            },
        )

    def _guard(self, folded: str) -> int:
        return hash64(*numbers(folded)) if self.numbers == "exact" else 0

    def _bands(
        self, shingles: Any, texts: np.ndarray, guard: np.ndarray, keys: np.ndarray
    ) -> pl.Series:
        from siftline.kernels.minhash import signatures

        banding = self.banding()
        slots = signatures(shingles, banding.slots, self.seed)
        # The division that verifies: a text that can't lose one shingle can only equal another.
        tiny = shingles.sizes / (shingles.sizes + 1) < self.threshold
        prompts, responses = texts[:, 0], texts[:, 1]
        first_half = np.arange(banding.slots) % banding.rows < banding.rows // 2
        from_prompt = np.where(tiny[prompts][:, None], False, first_half[None, :])
        from_prompt |= tiny[responses][:, None]
        mixed = np.where(from_prompt, slots[prompts], slots[responses])
        for side in (prompts, responses):
            guard = _mixed(guard, np.where(tiny[side], keys[side], np.uint64(0)))
        bands = band_keys(mixed, banding, guard)
        return pl.Series("bands", bands, dtype=pl.Array(pl.UInt64, banding.bands))

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
    bands = np.unique(state.rows["bands"].to_numpy())
    prompts = state.rows["prompt_id"].unique().to_list()
    found = []
    for earlier in states:
        if earlier.rows.is_empty():
            continue
        shares = np.isin(earlier.rows["bands"].to_numpy(), bands).any(axis=1)
        shared = pl.Series(np.atleast_1d(shares), dtype=pl.Boolean)
        near = shared | earlier.rows["prompt_id"].is_in(prompts)
        rows = earlier.rows.filter(near & ~earlier.rows["id"].is_in(list(gone)))
        texts = np.unique(np.concatenate([rows["prompt_key"], rows["response_key"]]))
        places = np.searchsorted(earlier.keys, texts)
        found.append(DuplicateState(rows, texts, earlier.shingles.take(places)))
    return [*(part for part in found if part.rows.height), state]


def _mixed(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    h = (left * np.uint64(0x9E3779B97F4A7C15)) ^ (left >> np.uint64(31))
    return (h ^ right) * np.uint64(0xBF58476D1CE4E5B9)


def _optional(bucket: pl.DataFrame, name: str, dtype: Any) -> pl.Expr:
    present = pl.col(name) if name in bucket.columns else pl.lit(None)
    return present.cast(dtype).alias(name)


def _answers(bucket: pl.DataFrame) -> list[tuple[str | None, str | None]]:
    return bucket.select("answer", _optional(bucket, "answer_from", pl.String)).rows()


def normal_answer(answer: str) -> str:
    """A reference answer without case, spacing, currency sign, final stop or number format."""
    text = plain(answer).strip("$ ").rstrip(". ")
    try:
        return str(Decimal(text.replace(",", "")).normalize())
    except InvalidOperation:
        return text


def _answer_hash(answer: str | None, answer_from: str | None) -> int | None:
    # Only an answer that is independent of the response can contradict another.
    if answer is None or not answer.strip() or answer_from == "response":
        return None
    return hash64(normal_answer(answer))


def _merged(states: Sequence[DuplicateState]) -> tuple[np.ndarray, Any]:
    from siftline.kernels.shingles import concatenate

    keys, first = np.unique(np.concatenate([state.keys for state in states]), return_index=True)
    return keys, concatenate([state.shingles for state in states]).take(first)


def _conflicted(rows: pl.DataFrame) -> pl.Series:
    answered = rows.filter(pl.col("answer").is_not_null())
    counts = answered.group_by("prompt_id").agg(pl.col("answer").n_unique())
    return counts.filter(pl.col("answer") > 1)["prompt_id"].sort()


def _kernel_rows(rows: pl.DataFrame, keys: np.ndarray, conflicts: pl.Series) -> Any:
    from siftline.kernels.greedy import Rows

    columns = rows.select(
        identity=pl.struct("prompt_id", "exact").rank("dense").cast(pl.Int64) - 1,
        label=(pl.col("answer").rank("dense").cast(pl.Int64) - 1).fill_null(-1),
        strict=pl.col("prompt_id").is_in(conflicts.to_list()),
        silent=pl.col("exact").is_null(),
    )
    sides = [np.searchsorted(keys, rows[s].to_numpy()) for s in ("prompt_key", "response_key")]
    identity = columns["identity"].to_numpy().copy()
    identity[columns["silent"].to_numpy()] = -1
    return Rows(
        identity=identity,
        texts=np.stack(sides, axis=1).astype(np.int64),
        guard=rows["guard"].to_numpy(),
        label=columns["label"].to_numpy(),
        strict=columns["strict"].to_numpy(),
    )


def _histogram(sizes: pl.Series) -> dict[str, int]:
    counts = sizes.value_counts().sort("size")
    return {str(size): count for size, count in counts.rows()}


def _conflict_table(bucket: pl.DataFrame, conflicts: pl.Series) -> pl.DataFrame:
    # A bucket holds all rows of a prompt, so its lists are complete.
    independent = _optional(bucket, "answer_from", pl.String).fill_null("") != "response"
    listed = bucket.filter(
        pl.col("prompt_id").is_in(conflicts.to_list()), pl.col("answer").is_not_null(), independent
    )
    return (
        listed.sort("prompt_id", "id")
        .group_by("prompt_id", maintain_order=True)
        .agg(ids=pl.col("id"), answers=pl.col("answer"))
    )
