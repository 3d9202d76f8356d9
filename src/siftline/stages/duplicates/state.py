"""What the duplicates gate knows of some rows, and where it keeps that: hashes, never texts.

Keys of bands and shingles are most of it. `StateFiles` moves both to files where rows are many; a
decision reads one band, or the shingles of the texts it compares, so that memory holds some numbers
a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from siftline.kernels.draws import hash64, hash64_each
from siftline.kernels.sets.lsh import Banding
from siftline.kernels.text.words import plain

HELD = 64 << 20
"""Bytes of bands and shingles that stay in memory; those of later rows go to files."""
_BLOCK = 8192
"""Texts that are cut into shingles at once."""
MakeRoom = Callable[[int], np.ndarray]


@dataclass(frozen=True)
class DuplicateState:
    """What is known of n rows with t distinct texts.

    Attributes:
        rows: One line a row: id, prompt_id, priority, tie, exact (hash of the response, null where
            it is empty), prompt_key, response_key, guard, answer (hash, or null).
        bands: One key a band, uint64, shape (bands, n), in memory or in a file; 0 where the
            response is empty.
        keys: Ascending uint64 hashes of the distinct texts, shape (t,).
        offsets: int64, shape (t + 1,): where the shingles of each text start in `values`.
        values: uint32 hashes, in memory or in a file.
    """

    rows: pl.DataFrame
    bands: Any
    keys: np.ndarray
    offsets: np.ndarray
    values: Any


@dataclass
class StateFiles:
    """StateFiles in the order they come, the bands and shingles of most of them in files.

    Attributes:
        folder: Where files go; made when the first is written.
        limit: Bytes that may stay in memory.
        states: Those there are.
    """

    folder: Path
    limit: int = HELD
    states: list[DuplicateState] = field(default_factory=list)
    _held: int = 0

    def add(self, state: DuplicateState) -> None:
        """Appends a state, in memory or shelved."""
        from siftline.kernels.sets.spill import shelved

        self._held += state.bands.nbytes + state.values.nbytes
        if self._held > self.limit:
            place = self.folder / f"rows-{len(self.states):05d}"
            bands = shelved(state.bands, place / "bands.bin")
            state = replace(state, bands=bands, values=shelved(state.values, place / "sets.bin"))
        self.states.append(state)

    def make_room(self, size: int) -> np.ndarray:
        """Room for the sets that are compared, see `spill.values_room`."""
        from siftline.kernels.sets.spill import values_room

        return values_room(size, self.folder)


def summarised(
    bucket: pl.DataFrame, banding: Banding, threshold: float, ngram: int, seed: int, guarded: bool
) -> DuplicateState:
    """What is to be known of some rows; arguments as of `duplicates.Duplicates`.

    Args:
        bucket: Columns id, prompt_id, prompt, response, answer, and where present priority, tie and
            answer_from.
        banding: How signatures are cut.
        threshold: Similarity that texts are held to.
        ngram: Characters in a shingle.
        seed: Of the signatures.
        guarded: Rows with different numbers share no band.
    """
    from siftline.kernels.sets.greedy import pair_keys
    from siftline.kernels.sets.shingles import char_shingles, concatenate, signatures
    from siftline.kernels.text.textgrams import guards
    from siftline.kernels.text.texts import ALONE
    from siftline.kernels.text.words import words_of

    n = bucket.height
    sides = [t or "" for side in ("prompt", "response") for t in bucket[side].to_list()]
    worded = words_of(sides)
    folded = worded.strings()
    hashed = hash64_each(folded)
    keys, first, inverse = np.unique(hashed, return_index=True, return_inverse=True)
    texts = np.ascontiguousarray(inverse.reshape(2, n).T)
    distinct = [folded[k] for k in first.tolist()]
    blocks = [distinct[k : k + _BLOCK] for k in range(0, max(len(distinct), 1), _BLOCK)]
    shingles = concatenate([char_shingles(block, ngram) for block in blocks])
    told = guards(worded) if guarded else np.zeros(2 * n, np.uint64)
    guard = _mixed(told[:n], told[n:])
    # The division that verifies: a text that can't lose one shingle can only equal another.
    tiny = shingles.sizes / (shingles.sizes + 1) < threshold
    strict = guard
    for side in texts.T:
        strict = _mixed(strict, np.where(tiny[side], keys[side], np.uint64(0)))
    slots = signatures(shingles, banding.slots, seed)
    bands = pair_keys(slots, texts, tiny, strict, banding)
    raw = bucket["response"].to_list()
    silent = np.array([not text for text in raw], np.bool_)
    bands[:, silent] = ALONE
    exact = pl.Series("exact", hash64_each([text or "" for text in raw]), pl.UInt64)
    rows = bucket.select(
        "id",
        "prompt_id",
        optional(bucket, "priority", pl.Int64).fill_null(0),
        optional(bucket, "tie", pl.UInt64).fill_null(0),
    ).with_columns(
        exact.set(pl.Series(silent), None),
        pl.Series("prompt_key", hashed[:n]),
        pl.Series("response_key", hashed[n:]),
        pl.Series("guard", guard),
        pl.Series("answer", [_answer_hash(*a) for a in _answers(bucket)], pl.UInt64),
    )
    return DuplicateState(rows, bands, keys, shingles.offsets, shingles.values)


def gathered(
    states: Sequence[DuplicateState], keys: np.ndarray, wanted: np.ndarray, make_room: MakeRoom
) -> Any:
    """The shingle sets of some texts, read state by state.

    Args:
        states: Where they are.
        keys: Ascending hashes of the texts, uint64, shape (t,).
        wanted: bool, shape (t,); the sets of the others are left empty.
        make_room: Gives a uint32 array of a size.

    Returns:
        `kernels.sets.shingles.Sets` of length t.
    """
    from siftline.kernels.sets.greedy import copy_sets
    from siftline.kernels.sets.shingles import Sets

    wanted, sizes = wanted.copy(), np.zeros(len(keys), np.int64)
    found = []
    for state in states:
        place = np.searchsorted(keys, state.keys)
        place[place == len(keys)] = 0
        theirs = np.zeros(0, np.int64)
        if len(keys):
            theirs = np.flatnonzero((keys[place] == state.keys) & wanted[place])
        mine = place[theirs]
        wanted[mine] = False
        sizes[mine] = np.diff(state.offsets)[theirs]
        found.append((mine, theirs))
    assert not wanted.any(), "a text without shingles"
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    values = make_room(int(offsets[-1]))
    for state, (mine, theirs) in zip(states, found, strict=True):
        copy_sets(state.values, state.offsets, theirs, values, offsets[mine])
    return Sets(values, offsets)


def twin_keys(rows: pl.DataFrame) -> np.ndarray:
    """One key a row, of prompt_id and response; 0 where the response is empty; uint64."""
    exact = rows["exact"]
    mixed = _mixed(rows["prompt_id"].hash().to_numpy(), exact.fill_null(0).to_numpy())
    return np.where(exact.is_null().to_numpy(), np.uint64(0), np.maximum(mixed, np.uint64(1)))


def optional(bucket: pl.DataFrame, name: str, dtype: Any) -> pl.Expr:
    """A column, nulls where the frame lacks it."""
    present = pl.col(name) if name in bucket.columns else pl.lit(None)
    return present.cast(dtype).alias(name)


def normal_answer(answer: str) -> str:
    """A reference answer without case, spacing, currency sign, final stop or number format."""
    text = plain(answer).strip("$ ").rstrip(". ")
    try:
        return str(Decimal(text.replace(",", "")).normalize())
    except InvalidOperation:
        return text


def _mixed(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    h = (left * np.uint64(0x9E3779B97F4A7C15)) ^ (left >> np.uint64(31))
    return (h ^ right) * np.uint64(0xBF58476D1CE4E5B9)


def _answers(bucket: pl.DataFrame) -> list[tuple[str | None, str | None]]:
    return bucket.select("answer", optional(bucket, "answer_from", pl.String)).rows()


def _answer_hash(answer: str | None, answer_from: str | None) -> int | None:
    # Only an answer that is independent of the response can contradict another.
    if answer is None or not answer.strip() or answer_from == "response":
        return None
    return hash64(normal_answer(answer))
