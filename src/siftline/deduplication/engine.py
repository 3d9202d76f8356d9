"""The steps of deduplication on arrays, and `deduplicate`, which takes them one after another.

    summarise   text -> one key a band, a hash, a count          (every row, in threads)
    group       keys -> who shares a key with whom               (band by band)
    collect     text -> sorted shingle sets                      (only rows that share a key)
    decide      sets -> who goes, and for whom                   (in keep order)

Files and the index take the same steps on more rows than fit into memory at once.

What makes two texts duplicates, and how they are looked for.

What a run of deduplication found, and how long its steps took.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from siftline.deduplication.arrow import TextColumn, cuts, pieces
from siftline.kernels.sets.groups import Groups, grouped
from siftline.kernels.sets.keepers import KEPT, NEW, Candidates, Decisions, drop_all, keep_first
from siftline.kernels.sets.lsh import Banding, banding_for, recall
from siftline.kernels.text.codepoints import tables
from siftline.kernels.text.texts import (
    Buffers,
    Held,
    Rows,
    Shingling,
    Texts,
    buffers,
    collect,
    permutations,
    summarise,
)

Unit = Literal["word", "char"]
Bands = Literal["recall", "datasketch"]

MAX_PAIRS = 2_000_000_000
"""Comparisons before giving up: some minutes."""


def threads() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Settings:
    """How texts are compared.

    Attributes:
        threshold: Jaccard similarity of two texts' shingles from which they are duplicates; 0.8 as
            in Lee et al. 2022.
        ngram: Units in a shingle; 5 words as in FineWeb.
        unit: What a shingle is made of. Words suit documents; characters suit texts of a sentence,
            where one changed word is a fifth of all 5-grams.
        num_perm: Most slots in a signature.
        bands: "recall" takes the banding with the fewest expected candidates that finds 99 % of the
            pairs 0.05 above the threshold; "datasketch" takes the one datasketch would, which
            weighs missed pairs against false ones around the threshold.
        seed: Of the permutation table, as in datasketch.
        max_pairs: Most pairs to compare before giving up.
    """

    threshold: float = 0.8
    ngram: int = 5
    unit: Unit = "word"
    num_perm: int = 128
    bands: Bands = "recall"
    seed: int = 1
    max_pairs: int = MAX_PAIRS

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"threshold={self.threshold} must be in (0, 1]")
        if self.ngram < 1 or self.num_perm < 1:
            raise ValueError(f"ngram={self.ngram} and num_perm={self.num_perm} must be at least 1")
        if self.unit not in ("word", "char"):
            raise ValueError(f"unit={self.unit!r} must be 'word' or 'char'")
        if self.bands not in ("recall", "datasketch"):
            raise ValueError(f"bands={self.bands!r} must be 'recall' or 'datasketch'")
        self.banding()

    def banding(self) -> Banding:
        """How signatures are cut; raises ValueError where num_perm is too small."""
        ours = banding_for(self.threshold, self.num_perm)
        if self.bands == "recall":
            return ours
        from datasketch import MinHashLSH

        theirs = MinHashLSH(threshold=self.threshold, num_perm=self.num_perm)
        found = recall(ours.similarity, theirs.b, theirs.r)
        return Banding(theirs.b, theirs.r, ours.similarity, found)


@dataclass
class Clock:
    """Seconds by phase; phases of the same name add up."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of a block to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Deduplicated:
    """Which of n rows went, and for which; arrays of shape (n,).

    Attributes:
        matched: int64 row that row i was removed for, -1 where it is kept.
        similarity: float64, verified, to that row; 0 where it is kept.
        exact: bool, the two texts are the same bytes.
        pairs: Pairs whose similarity was computed.
        seconds: By phase.
        reason: Why rows went that are not exact.
    """

    matched: np.ndarray
    similarity: np.ndarray
    exact: np.ndarray
    pairs: int
    seconds: dict[str, float]
    reason: str = "near_duplicate"

    @property
    def kept(self) -> np.ndarray:
        """bool, shape (n,)."""
        return self.matched < 0

    @cached_property
    def cluster_size(self) -> np.ndarray:
        """int64, shape (n,): a kept row and those removed for it; of a removed row, 0."""
        gone = self.matched[~self.kept]
        size = np.bincount(gone, minlength=len(self.matched)) + 1
        return np.where(self.kept, size, 0)

    @cached_property
    def cluster(self) -> np.ndarray:
        """int64, shape (n,): number of the group of two or more rows that removals join, or -1."""
        gone = np.flatnonzero(~self.kept)
        targets = self.matched[gone]
        n = len(self.matched)
        if self.kept[targets].all():
            label = np.full(n, -1, np.int64)
            label[targets] = targets
            label[gone] = targets
            return label
        from scipy.sparse import coo_matrix  # only where all copies are dropped
        from scipy.sparse.csgraph import connected_components

        edges = coo_matrix((np.ones(len(gone), np.int8), (gone, targets)), shape=(n, n))
        label = connected_components(edges, directed=False)[1].astype(np.int64)
        return np.where(np.bincount(label)[label] > 1, label, -1)

    @property
    def clusters(self) -> int:
        """How many such groups there are."""
        return self.clusters_of(np.arange(len(self.matched)))

    def clusters_of(self, rows: np.ndarray) -> int:
        """How many of them some rows are in."""
        label = self.cluster[rows]
        return len(np.unique(label[label >= 0]))


HELD = 512 << 20
"""Bytes of shingles that may stay in memory between the two times they are wanted; those of later
rows are made again. Memory that is touched for the first time costs more than it saves."""
_TASK_BYTES = 1 << 20
_WORD_BYTES = 4
"""With the space; where words are shorter on average, some rows are read again."""
_NOT_HELD = Held(np.empty(0, np.uint32), np.empty(0, np.int64))


@dataclass(frozen=True)
class Sets:
    """Sorted distinct hashes of m rows, with gaps: see `keepers.Candidates`."""

    values: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray


class Engine:
    """Settings with what follows from them, and threads.

    Args:
        settings: How texts are compared.
        workers: Threads; by default one a core.
    """

    def __init__(self, settings: Settings, workers: int | None = None) -> None:
        self.settings, self.workers = settings, workers or threads()
        self.banding = settings.banding()
        self.a, self.b = permutations(self.banding.slots, settings.seed)
        self.shingling = Shingling(settings.ngram, settings.unit == "char", tables())
        self._pool = ThreadPoolExecutor(self.workers)
        self._own = threading.local()

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def empty(self, n: int) -> Rows:
        """Room for what `summarise` writes of n rows."""
        return Rows(
            np.empty((self.banding.bands, n), np.uint64),
            np.empty(n, np.uint64),
            np.empty(n, np.int32),
        )

    def summarise(self, texts: Texts, out: Rows, at: int, held: Held | None = None) -> None:
        """Writes keys, hashes and counts of some rows to `out`, from place `at`.

        Args:
            texts: Rows.
            out: Where to.
            at: Place of the first.
            held: Keeps their shingles, too (see `held`).
        """
        held = held or _NOT_HELD
        spans = cuts(texts, _TASK_BYTES)
        ends = [0, *(min(self._room(texts, stop), len(held.values)) for _, stop in spans)]

        def work(k: int) -> None:
            start, stop = spans[k]
            summarise(
                texts,
                start,
                stop,
                self.shingling,
                self.a,
                self.b,
                self.banding.rows,
                out,
                at + start,
                held,
                ends[k],
                ends[k + 1],
                self._buffers(int(np.diff(texts.offsets[start : stop + 1]).max(initial=0))),
                np.empty(len(self.a), np.uint32),
            )

        self._each(work, list(range(len(spans))))

    def held(self, texts: Texts, limit: int = HELD) -> Held:
        """Room for the shingles of some rows, `limit` bytes at most."""
        rows = len(texts.null)
        size = min(self._room(texts, rows), limit // 4)
        return Held(np.empty(size, np.uint32), np.empty(rows, np.int64))

    def _room(self, texts: Texts, rows: int) -> int:
        size = int(texts.offsets[rows] - texts.offsets[0])
        return size if self.shingling.characters else size // _WORD_BYTES

    def group(self, band: Callable[[int], np.ndarray], n: int, rank: np.ndarray | None) -> Groups:
        """Finds the rows that share a key.

        Args:
            band: Gives the keys of a band, uint64, shape (n,).
            n: Rows.
            rank: Place of each row in keep order, shape (n,); by default its number.
        """
        place = rank
        order = None if place is None else lambda rows: np.argsort(place[rows], kind="stable")
        return grouped(band, self.banding.bands, n, order, self._each)

    def collect(
        self,
        texts: Texts,
        wanted: np.ndarray,
        values: np.ndarray,
        starts: np.ndarray,
        held: Held | None = None,
        counts: np.ndarray | None = None,
    ) -> np.ndarray:
        """Writes the shingle sets of some rows; returns their sizes.

        Args:
            texts: Rows.
            wanted: Which of them, ascending, int64, shape (m,).
            values: uint32, where the hashes go.
            starts: int64, shape (m,): where those of each row go.
            held: Shingles of these rows that were kept.
            counts: How many each of them has.

        Returns:
            int32, shape (m,).
        """
        held = held or _NOT_HELD
        found = np.empty(0, np.int32) if counts is None else counts
        sizes = np.empty(len(wanted), np.int32)
        each = texts.offsets[wanted + 1] - texts.offsets[wanted]
        lengths = np.cumsum(each)
        total = int(lengths[-1]) if len(wanted) else 0
        marks = np.searchsorted(lengths, np.arange(_TASK_BYTES, total, _TASK_BYTES))
        ends = np.unique(np.append(marks, len(wanted)))
        begins = np.concatenate([np.zeros(1, np.int64), ends[:-1]])

        def work(span: tuple[int, int]) -> None:
            part = slice(*span)
            mine, to = wanted[part], starts[part]
            room = self._buffers(int(each[part].max(initial=0)))
            collect(texts, mine, self.shingling, values, to, sizes[part], held, found, room)

        self._each(work, list(zip(begins.tolist(), ends.tolist(), strict=True)))
        return sizes

    def decide(
        self,
        groups: Groups,
        hashes: np.ndarray,
        sets: Sets,
        drop: bool = False,
        before: Decisions | None = None,
        threshold: float | None = None,
    ) -> tuple[Decisions, int]:
        """Decides about the rows of `groups`, in their order.

        Args:
            groups: m rows in keep order.
            hashes: uint64, shape (m,): of their texts.
            sets: Their shingles.
            drop: Drop all copies, not all but one.
            before: Earlier decisions on them.
            threshold: By default that of the settings; `groups` were made for no higher one.

        Returns:
            The decisions, as positions in `groups.rows`, and the pairs compared.
        """
        rows = Candidates(
            groups.lists, groups.numbers, hashes, sets.values, sets.starts, sets.sizes
        )
        threshold = self.settings.threshold if threshold is None else threshold
        most = self.settings.max_pairs
        if drop:
            return drop_all(rows, groups.count, threshold, most)
        m = len(groups.rows)
        before = before or Decisions(np.full(m, NEW, np.int32), np.zeros(m, np.float64))
        return keep_first(rows, groups.count, threshold, most, before)

    def _buffers(self, longest: int) -> Buffers:
        """Room for a row of so many bytes, this thread's own."""
        room = getattr(self._own, "room", None)
        if room is None or self._own.longest < longest:
            room, self._own.longest = buffers(longest, self.shingling.characters), longest
            self._own.room = room
        return room

    def _each(self, work: Callable, items: list) -> list:
        if len(items) < 2 or self.workers < 2:
            return [work(item) for item in items]
        return list(self._pool.map(work, items))


def deduplicate(
    texts: TextColumn,
    settings: Settings | None = None,
    *,
    priority: np.ndarray | None = None,
    drop_all: bool = False,
    workers: int | None = None,
) -> Deduplicated:
    """Finds the near duplicates of a text column in memory.

    A row is removed only for a kept row whose shingles it was verified to share to the threshold,
    the first of them in keep order. Rows that hold nothing are kept; a text without any word is
    removed only for one of the same bytes.

    Args:
        texts: Arrow string or large_string, shape (n,).
        settings: How they are compared.
        priority: Smaller is kept first, shape (n,), not NaN; ties go by row. By default all equal.
        drop_all: Remove every row that has a duplicate, the first as well.
        workers: Threads; by default one a core.

    Raises:
        ValueError: if the column is not text, or too many rows resemble each other.
    """
    clock = Clock()
    n = len(texts)
    with Engine(settings or Settings(), workers) as engine:
        out = engine.empty(n)
        parts: list[tuple[Texts, int]] = []
        held: list[Held] = []
        at = 0
        with clock.phase("summarise"):
            for part in pieces(texts):
                held.append(engine.held(part, HELD - sum(kept.values.nbytes for kept in held)))
                engine.summarise(part, out, at, held[-1])
                parts.append((part, at))
                at += len(part.null)
        with clock.phase("group"):
            groups = engine.group(lambda band: out.keys[band], n, ranks(priority))
        with clock.phase("verify"):
            sets = gathered(engine, groups.rows, out.counts, iter(parts), held=held)
            decided, pairs = engine.decide(groups, out.hashes[groups.rows], sets, drop_all)
    return spread(n, groups.rows, decided, out.hashes, pairs, clock.seconds)


def ranks(priority: np.ndarray | None) -> np.ndarray | None:
    """Place of each row in keep order: by priority, ties by row."""
    if priority is None:
        return None
    assert not np.isnan(priority).any(), "a priority must be comparable"
    rank = np.empty(len(priority), np.int64)
    rank[np.argsort(priority, kind="stable")] = np.arange(len(priority))
    return rank


def gathered(
    engine: Engine,
    rows: np.ndarray,
    counts: np.ndarray,
    parts: Iterator[tuple[Texts, int]],
    make_room: Callable[[int], np.ndarray] = lambda size: np.empty(size, np.uint32),
    held: Sequence[Held] = (),
) -> Sets:
    """The shingle sets of `rows`, in that order, from texts that come piece by piece.

    Args:
        engine: Whose settings.
        rows: int64, shape (m,), distinct.
        counts: Shingles of every row, repeats included, shape (n,).
        parts: Texts and the number of the first row in them, ascending.
        make_room: Gives a uint32 array of a size.
        held: Shingles of each part that were kept; then few texts are read again.
    """
    room = np.maximum(counts[rows], 0).astype(np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(room)])
    values = make_room(int(starts[-1]))
    sizes = np.zeros(len(rows), np.int32)
    ascending = np.argsort(rows, kind="stable")
    in_order = rows[ascending]
    for k, (texts, first) in enumerate(parts):
        low, high = np.searchsorted(in_order, (first, first + len(texts.null)))
        mine, wanted, to = ascending[low:high], in_order[low:high] - first, starts[:-1]
        kept = held[k] if held else None
        sizes[mine] = engine.collect(texts, wanted, values, to[mine], kept, counts[first:])
    return Sets(values, starts[:-1], sizes)


def spread(
    n: int,
    rows: np.ndarray,
    decided: Decisions,
    hashes: np.ndarray,
    pairs: int,
    seconds: dict[str, float],
) -> Deduplicated:
    """Decisions on some rows as decisions on all n."""
    matched = np.full(n, -1, np.int64)
    similarity = np.zeros(n, np.float64)
    gone = decided.matched != KEPT
    matched[rows[gone]] = rows[decided.matched[gone]]
    similarity[rows[gone]] = decided.value[gone]
    exact = np.zeros(n, np.bool_)
    lost = rows[gone]
    exact[lost] = (hashes[lost] == hashes[matched[lost]]) & (similarity[lost] == 1.0)
    return Deduplicated(matched, similarity, exact, pairs, seconds)
