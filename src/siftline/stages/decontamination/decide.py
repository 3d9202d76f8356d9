"""Gate: removes pool rows that overlap a target, development or test set.

A pool row overlaps an evaluation row if any of these holds:

- `prompt`: they have the same prompt_id;
- `whole`: its prompt, or prompt and response together, is the evaluation text word for word and
  sign for sign. This also covers evaluation texts shorter than one n-gram;
- `near`: their prompts are near duplicates with the same numbers (see stages/duplicates/decide.py);
- `ngram`: at least `min_share` of the n-grams of the evaluation text occur in its prompt or
  response. Numbers are words, so instances of one template with different numbers share only what
  stands between the numbers.

What a word or a sign is says `kernels.text.tokens`: case, punctuation and typography make no
difference, "x > 5" and "x < 5" are two texts.

N-grams that more than `common` evaluation prompts of one set share are boilerplate (task
definitions, few-shot headers) and are not counted: they say which set a row resembles, not which
row. Every test looks at one pool row and the evaluation sets, so neither buckets nor order matter.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from siftline.kernels.draws import hash64_each
from siftline.kernels.sets.lsh import band_keys, banding_for
from siftline.kernels.text.words import WordTexts, words_of
from siftline.rows.schema import HALF_ID
from siftline.rows.selection import Selection, decisions

ROLES = ("test", "dev", "target")
"""The worst leak first; a row that overlaps several is charged with the first."""
KINDS = ("prompt", "whole", "near", "ngram")
OVERLAP = {
    "id": pl.String,
    "set": pl.String,
    "role": pl.String,
    "matched_id": pl.String,
    "kind": pl.String,
    "value": pl.Float64,
    "threshold": pl.Float64,
}


@dataclass(frozen=True)
class ContaminationIndex:
    """What is known of the evaluation rows; hashes only.

    Attributes:
        rows: One line a distinct (set, prompt): row (its position), set, role, id, prompt_id,
            whole (hash of its words) and grams (n-grams counted).
        postings: gram (uint64) and row, the n-grams worth counting.
        bands: key (uint64) and row, the MinHash bands of the prompts.
        shingles: `kernels.sets.shingles.Sets` of the prompts, by row.
    """

    rows: pl.DataFrame
    postings: pl.DataFrame
    bands: pl.DataFrame
    shingles: Any


SHINGLE, SLOTS = 5, 256
"""Characters in a shingle and slots in a signature: the defaults of `Duplicates`."""


@dataclass(frozen=True)
class Decontamination:
    """Removes pool rows that overlap an evaluation row (module docstring).

    Attributes:
        ngram: Words in an n-gram; 13 as in GPT-3 (Brown et al. 2020, appendix C).
        min_share: Share of an evaluation row's n-grams that must occur in the pool row; 0.5 as in
            Tulu 3 (Lambert et al. 2024). GPT-3's rule of any single n-gram is a share near 0.
        common: An n-gram in more evaluation prompts of a set than this is boilerplate; 10 as in
            NeMo Curator's task decontamination, which counts in the pool.
        near: Jaccard similarity of near-duplicate prompts, as in duplicates.
        seed: Seed of the permutation table.
    """

    ngram: int = 13
    min_share: float = 0.5
    common: int = 10
    near: float = 0.8
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("ngram", "common"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("min_share", "near"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must be in (0, 1]")
        banding_for(self.near, SLOTS)  # its own checks

    def index(self, reference: pl.DataFrame) -> ContaminationIndex:
        """Indexes evaluation rows.

        Args:
            reference: Columns set, role (target, dev or test), id, prompt, response, and prompt_id
                where the id does not begin with it. A row without a prompt is its response.

        Raises:
            ValueError: if a role is unknown.
        """
        from siftline.kernels.sets.shingles import word_grams

        unknown = reference.filter(~pl.col("role").is_in(ROLES))
        if unknown.height:
            line = unknown.row(0, named=True)
            raise ValueError(
                f"role {line['role']!r} of set {line['set']!r} must be one of {', '.join(ROLES)}"
            )
        rows, texts = _evaluation_rows(reference)
        worded = words_of(texts)
        folded = worded.strings()
        grams = _long(word_grams(folded, self.ngram), "gram", "row")
        grams = grams.join(rows.select("row", "set"), on="row")
        rare = pl.len().over("set", "gram") <= self.common
        postings = grams.filter(rare).select("gram", "row")
        counts = postings.group_by("row").agg(grams=pl.len())
        rows = rows.with_columns(_whole(folded)).join(
            counts, on="row", how="left", maintain_order="left"
        )
        shingles, bands = self._near(folded, worded)
        return ContaminationIndex(rows, postings, bands, shingles)

    def apply(self, bucket: pl.DataFrame, index: ContaminationIndex) -> Selection:
        """Decides about id, prompt_id, prompt, response of `bucket`.

        Returns:
            A selection whose reasons are overlaps_target, overlaps_dev and overlaps_test, and whose
            table `overlaps` names the evaluation row for each removed row and set.
        """
        texts = [_pool_texts(*line) for line in bucket.select("prompt", "response").rows()]
        prompts = words_of([prompt for prompt, _ in texts])
        folded, everything = prompts.strings(), words_of([both for _, both in texts]).strings()
        found = pl.concat(
            [
                self._same_prompt(bucket, index),
                self._whole_text(bucket, index, [folded, everything]),
                self._near_prompt(bucket, index, folded, prompts),
                self._shared_grams(bucket, index, everything),
            ]
        )
        found = found.join(index.rows.rename({"id": "matched_id"}), on="row")
        overlaps = _best(found, ["id", "set"]).select(list(OVERLAP))
        charged = _best(overlaps, ["id"]).with_columns(reason="overlaps_" + pl.col("role"))
        frame = bucket.select("id").join(charged, on="id", how="left", maintain_order="left")
        table = decisions(
            frame["id"],
            kept=frame["reason"].is_null(),
            reason=frame["reason"],
            value=frame["value"],
            threshold=frame["threshold"],
            matched_id=frame["matched_id"],
        )
        facts = {
            "evaluation_rows": index.rows.height,
            "removed_by_set": dict(overlaps["set"].value_counts().sort("set").rows()),
            "removed_by_kind": dict(charged["kind"].value_counts().sort("kind").rows()),
        }
        return Selection(table, facts, {"overlaps": overlaps}, vacuous=index.rows.is_empty())

    def _same_prompt(self, bucket: pl.DataFrame, index: ContaminationIndex) -> pl.DataFrame:
        both = bucket.select("id", "prompt_id").join(
            index.rows.select("row", "prompt_id"), on="prompt_id"
        )
        return _found(both, "prompt", 1.0)

    def _whole_text(
        self, bucket: pl.DataFrame, index: ContaminationIndex, sides: list[list[str]]
    ) -> pl.DataFrame:
        wholes = [pl.DataFrame({"id": bucket["id"], "whole": _whole(side)}) for side in sides]
        both = pl.concat(wholes).drop_nulls().join(index.rows.select("row", "whole"), on="whole")
        return _found(both.unique(["id", "row"]), "whole", 1.0)

    def _near_prompt(
        self,
        bucket: pl.DataFrame,
        index: ContaminationIndex,
        folded: list[str],
        worded: WordTexts,
    ) -> pl.DataFrame:
        from siftline.kernels.sets.jaccard import jaccard_pairs
        from siftline.kernels.sets.shingles import concatenate

        shingles, bands = self._near(folded, worded)
        pairs = bands.rename({"row": "pool"}).join(index.bands, on="key").select("pool", "row")
        pairs = pairs.unique().sort("pool", "row")
        sets = concatenate([index.shingles, shingles])
        value = jaccard_pairs(
            sets, pairs["row"].to_numpy(), pairs["pool"].to_numpy() + len(index.shingles)
        )
        pairs = pairs.with_columns(value=value).filter(pl.col("value") >= self.near)
        pool = pl.Series("pool", np.arange(len(folded)), pl.Int64)
        return _found(bucket.select("id", pool).join(pairs, on="pool"), "near", self.near)

    def _shared_grams(
        self, bucket: pl.DataFrame, index: ContaminationIndex, folded: list[str]
    ) -> pl.DataFrame:
        from siftline.kernels.sets.shingles import word_grams

        grams = _long(word_grams(folded, self.ngram), "gram", "line")
        ids = bucket.select("id").with_row_index("line").with_columns(pl.col("line").cast(pl.Int64))
        shared = (
            grams.join(index.postings, on="gram")
            .group_by("line", "row")
            .agg(shared=pl.len())
            .join(index.rows.select("row", "grams"), on="row")
            .with_columns(value=pl.col("shared") / pl.col("grams"))
            .filter(pl.col("value") >= self.min_share)
        )
        return _found(shared.join(ids, on="line"), "ngram", self.min_share)

    def _near(self, folded: list[str], worded: WordTexts) -> tuple[Any, pl.DataFrame]:
        """Shingles of some texts, given as strings and as bytes, and their band keys."""
        from siftline.kernels.sets.shingles import char_shingles, signatures
        from siftline.kernels.text.textgrams import guards

        banding = banding_for(self.near, SLOTS)
        shingles = char_shingles(folded, SHINGLE)
        # A key carries the numbers, so only prompts with the same numbers meet.
        slots = signatures(shingles, banding.slots, self.seed)
        keys = band_keys(slots, banding, guards(worded))
        row = np.repeat(np.arange(len(folded)), banding.bands)
        bands = pl.DataFrame({"key": keys.ravel(), "row": row})
        filled = shingles.sizes[row] > 0  # two empty prompts have nothing in common
        return shingles, bands.filter(pl.Series(filled, dtype=pl.Boolean))


def _evaluation_rows(reference: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """Distinct texts of each set, lowest id first, and the texts in the same order."""
    if "prompt_id" not in reference.columns:
        reference = reference.with_columns(prompt_id=pl.col("id").str.slice(0, HALF_ID))
    text = pl.struct("prompt", "response").map_elements(
        lambda line: _pool_texts(line["prompt"], line["response"])[0], return_dtype=pl.String
    )
    rows = (
        reference.with_columns(text=text)
        .sort("set", "role", "id")
        .unique(["set", "role", "prompt_id", "text"], keep="first", maintain_order=True)
        .with_row_index("row")
        .with_columns(pl.col("row").cast(pl.Int64))
    )
    return rows.select("row", "set", "role", "id", "prompt_id"), rows["text"].to_list()


def _pool_texts(prompt: str | None, response: str | None) -> tuple[str, str]:
    """What stands for the prompt (the response of plain text), and everything."""
    prompt, response = prompt or "", response or ""
    return (prompt, f"{prompt}\n{response}") if prompt.strip() else (response, response)


def _whole(folded: list[str]) -> pl.Series:
    """A hash of each text, null where it has no word."""
    empty = pl.Series([not text for text in folded], dtype=pl.Boolean)
    return pl.Series("whole", hash64_each(folded), pl.UInt64).set(empty, None)


def _long(sets: Any, value: str, row: str) -> pl.DataFrame:
    return pl.DataFrame({value: sets.values, row: np.repeat(np.arange(len(sets)), sets.sizes)})


def _found(pairs: pl.DataFrame, kind: str, threshold: float) -> pl.DataFrame:
    value = pl.col("value") if "value" in pairs.columns else pl.lit(1.0)
    return pairs.select(
        "id", "row", kind=pl.lit(kind), value=value.cast(pl.Float64), threshold=pl.lit(threshold)
    )


def _best(overlaps: pl.DataFrame, by: list[str]) -> pl.DataFrame:
    """The worst overlap for each `by`: role, then kind of proof, then value, then name."""
    rank = pl.col("role").replace_strict({r: i for i, r in enumerate(ROLES)}, return_dtype=pl.Int8)
    kind = pl.col("kind").replace_strict({k: i for i, k in enumerate(KINDS)}, return_dtype=pl.Int8)
    order = [rank, kind, -pl.col("value"), pl.col("set"), pl.col("matched_id")]
    return overlaps.sort("id", *order).unique(by, keep="first", maintain_order=True)
