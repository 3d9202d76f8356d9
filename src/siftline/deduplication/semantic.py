"""Duplicates by meaning: cosine similarity of embeddings, the same decisions, the same result.

Two searches. `exact` holds rows in keep order, a block at a time, against the kept rows before
them, so m copies cost m comparisons; without copies it is n^2 d multiplications, about a minute for
100,000 rows of 384 and a hundred for a million. `faiss` holds a row against kept rows in the cells
nearest to it, so time grows with n^1.5, and may miss a copy. Either removes a row only for one that
it was verified similar to.

Memory: `exact` holds the rows in 32 bits once more (1.5 GiB for a million of 384), and a few
blocks; `faiss` those that are kept, with room to grow (1 to 2 times that), and a few spans. A .npy
file is read from disk block by block; a column of vectors is in memory twice while it is read.

Cosine similarity, proposed in 32 bits and decided in 64, and the exact search among rows.

Search for similar rows in cells: a row is held against those near it, not against all.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from siftline.deduplication.engine import Clock, Deduplicated, ranks
from siftline.kernels.draws import hash64, uniforms
from siftline.kernels.vectors.blocks import pooled

BLOCK, CHUNK = 1024, 4096
"""Rows searched for at once, and rows they are searched among at once."""
DECIMALS = 6
"""Of a similarity: units in 32 bits are no more exact."""
SLACK = 1e-4
"""More than sums in 32 bits differ by."""
_TINY = np.finfo(np.float64).tiny


class Exact:
    """Rows in keep order, and which of them later ones are held against.

    Args:
        unit: float32, shape (n, d); where copies are kept once, kept rows move to the front.
        threshold: Cosine similarity.
        drop_all: Hold every row against all others, not only against kept ones before it.
    """

    def __init__(self, unit: np.ndarray, threshold: float, drop_all: bool = False) -> None:
        self.unit, self.threshold, self.drop_all = unit, threshold, drop_all
        n = len(unit)
        self.held = np.arange(n)  # places in keep order of the rows at the front
        self.count = n if drop_all else 0
        self.room = np.empty(min(BLOCK, n) * min(CHUNK, n), np.float32)
        self.pairs = 0

    def all(self, block: int = BLOCK) -> Iterator[tuple[int, int, float]]:
        """Of each row that goes its place, the one it goes for, and how similar."""
        for start in range(0, len(self.unit), block):
            yield from self.block(start, min(start + block, len(self.unit)))

    def block(self, start: int, stop: int) -> Iterator[tuple[int, int, float]]:
        """The same of places start to stop; blocks come in order."""
        part = self.unit[start:stop].copy()
        open_ = np.arange(len(part))
        for low in range(0, self.count, CHUNK):
            if not len(open_):
                return
            rows = self.unit[low : min(low + CHUNK, self.count)]
            near = self._near(part[open_], rows)
            if self.drop_all:
                own = start + open_ - low
                here = (own >= 0) & (own < len(rows))
                near[np.flatnonzero(here), own[here]] = False
            first, value = self._first(part[open_], rows, near)
            for k in np.flatnonzero(first >= 0):
                yield start + int(open_[k]), int(self.held[low + first[k]]), float(value[k])
            open_ = open_[first < 0]
        if not self.drop_all:
            yield from self._among(part, open_, start)

    def _among(
        self, part: np.ndarray, open_: np.ndarray, start: int
    ) -> Iterator[tuple[int, int, float]]:
        """Holds the rows of a block that are left against each other, and keeps what is kept."""
        rows = part[open_]
        near = np.tril(rows @ rows.T >= self.threshold - SLACK, -1)
        kept = np.zeros(len(rows), np.bool_)
        for k in range(len(rows)):
            if near[k].any():
                first, value = self._first(rows[k : k + 1], rows, (near[k] & kept)[None])
                if first[0] >= 0:
                    other = start + int(open_[first[0]])
                    yield start + int(open_[k]), other, float(value[0])
                    continue
            kept[k] = True
        end = self.count + int(kept.sum())
        self.unit[self.count : end], self.held[self.count : end] = rows[kept], start + open_[kept]
        self.count = end

    def _near(self, part: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """bool, shape (part, rows): pairs that may be similar."""
        if len(part) * len(rows) > len(self.room):
            return part @ rows.T >= self.threshold - SLACK
        room = self.room[: len(part) * len(rows)].reshape(len(part), len(rows))
        return np.matmul(part, rows.T, out=room) >= self.threshold - SLACK

    def _first(
        self, part: np.ndarray, rows: np.ndarray, near: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        found, value, pairs = first_similar(part, rows, near, self.threshold)
        self.pairs += pairs
        return found, value


def first_similar(
    part: np.ndarray, rows: np.ndarray, near: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """Of each row of `part` the first of `rows` that is similar, or -1, and how similar.

    Args:
        part: float32 rows of length 1 or 0, shape (b, d).
        rows: The same, shape (c, d).
        near: bool, shape (b, c): who may be similar; is spent.
        threshold: Cosine similarity.

    Returns:
        int64 and float64, shape (b,), and how many pairs were computed.
    """
    found, value = np.full(len(part), -1, np.int64), np.zeros(len(part), np.float64)
    asked = np.flatnonzero(near.any(axis=1))
    pairs = 0
    while len(asked):
        first = near[asked].argmax(axis=1)
        cosine = cosines(part[asked], rows[first])
        pairs += len(asked)
        hit = cosine >= threshold
        found[asked[hit]], value[asked[hit]] = first[hit], cosine[hit]
        near[asked[~hit], first[~hit]] = False
        asked = asked[~hit]
        asked = asked[near[asked].any(axis=1)]
    return found, value, pairs


def unit_rows(embeddings: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Some rows in an order, each of length 1 or 0; float32, made block by block.

    Raises:
        ValueError: if one is not finite.
    """
    out = np.empty((len(rows), embeddings.shape[1]), np.float32)
    for start in range(0, len(rows), CHUNK):
        asked = rows[start : start + CHUNK]
        part = np.asarray(embeddings[asked], np.float64)
        wrong = np.flatnonzero(~np.isfinite(part).all(axis=1))
        if len(wrong):
            raise ValueError(
                f"the embedding of row {asked[wrong[0]]:,} (counted from 0) is not finite: embed "
                "it again, or leave the row out"
            )
        # By the largest number first: squares of very large and very small ones are no numbers.
        part /= np.maximum(np.abs(part).max(axis=1, keepdims=True, initial=0), _TINY)
        part /= np.maximum(np.linalg.norm(part, axis=1, keepdims=True), _TINY)
        out[start : start + CHUNK] = part
    return out


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Similarity of rows pair by pair, float64; the same for a pair whatever others there are."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    lengths = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    products = np.divide((a * b).sum(axis=1), lengths, out=lengths, where=lengths > 0)
    return np.clip(np.round(products, DECIMALS), -1.0, 1.0)


SAMPLE = 64
"""Rows drawn to train, times the root of all rows."""
ROWS_A_CELL = 16
ITERATIONS = 6
SPANS = (4096, 16384)
"""Fewest and most rows of a span; between, two a cell: a cell then meets 32 of its rows at once."""
LISTS = 64  # cells searched in one go of a thread

Match = tuple[int, int, float]
Found = list[tuple[np.ndarray, np.ndarray, np.ndarray]]
Blocks = Callable[..., Iterator[tuple[int, int, Any]]]


def probes(threshold: float) -> int:
    """How many cells a row is searched in: 16, and more the less similar rows may be."""
    return int(np.ceil(16 * max(1.0, (1 - threshold**2) / (1 - 0.9**2)) ** 1.5))


class Cells:
    """Cells for some rows, empty at first.

    Memory: kept rows in 32 bits, with room to grow up to twice that; 64 sqrt(n) rows to train; a
    few spans. The embeddings are read span by span, once more where every copy is dropped.

    Args:
        embeddings: Shape (n, d).
        order: int64 row of each place in keep order.
        threshold: Cosine similarity in (0, 1].

    Raises:
        ValueError: if a row that was drawn is not finite.
    """

    def __init__(self, embeddings: np.ndarray, order: np.ndarray, threshold: float) -> None:
        import faiss

        self.embeddings, self.order, self.threshold = embeddings, order, threshold
        d = embeddings.shape[1]
        centres = _centres(_drawn(embeddings, order, threshold))
        self.quantizer = faiss.IndexFlatIP(d)
        self.quantizer.add(centres)
        self.index = faiss.IndexIVFFlat(self.quantizer, d, len(centres), faiss.METRIC_INNER_PRODUCT)
        self.index.train(centres)  # takes the quantizer as it is
        self.near = min(probes(threshold), len(centres))
        self.span = int(np.clip(2 * len(centres), *SPANS))
        self.pairs = 0

    def all(self) -> Iterator[Match]:
        """Of each row that goes its place, the kept one before it that it goes for, how similar."""
        places = np.arange(len(self.order))
        with pooled() as blocks:
            for asked, part, near in self._spans(places, blocks):
                value, other = self._among_cells(part, near, blocks)
                open_ = np.flatnonzero(other < 0)
                for k in np.flatnonzero(other >= 0):
                    yield int(asked[k]), int(other[k]), float(value[k])
                own = Exact(part[open_], self.threshold)
                for k, first, cosine in own.all():
                    yield int(asked[open_[k]]), int(asked[open_[first]]), cosine
                self.pairs += own.pairs
                kept = open_[own.held[: own.count]]
                self._add(part[kept], asked[kept], near[kept, 0])

    def chains(self, removed: np.ndarray, kept: np.ndarray) -> Iterator[Match]:
        """Kept rows that resemble a removed one, after `all`: places in keep order, both."""
        self.index.reset()
        with pooled() as blocks:
            for asked, part, near in self._spans(removed, blocks):
                self._add(part, asked, near[:, 0])
            for asked, part, near in self._spans(kept, blocks):
                value, other = self._among_cells(part, near, blocks)
                for k in np.flatnonzero(other >= 0):
                    yield int(asked[k]), int(other[k]), float(value[k])

    def _spans(
        self, places: np.ndarray, blocks: Blocks
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Places, their rows of length 1, and the cells nearest to each, int64 (span, near)."""
        import faiss

        def ready(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
            faiss.omp_set_num_threads(1)  # of this thread; BLAS may add in another order with more
            part = unit_rows(self.embeddings, self.order[places[start:stop]])
            return part, self.quantizer.search(part, self.near)[1]

        for start, stop, (part, near) in blocks(len(places), self.span, ready):
            yield places[start:stop], part, near

    def _among_cells(
        self, part: np.ndarray, near: np.ndarray, blocks: Blocks
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of each row the similarity to the first similar one in its cells, and its place or -1."""
        by_cell = np.argsort(near, axis=None, kind="stable")
        cells, starts = np.unique(near.ravel()[by_cell], return_index=True)
        rows = np.split(by_cell // near.shape[1], starts[1:])

        def search(start: int, stop: int) -> tuple[Found, int]:
            spans = range(start, stop)
            return self._verified(part, [(int(cells[k]), rows[k]) for k in spans])

        value, other = np.zeros(len(part)), np.full(len(part), -1, np.int64)
        for _, _, (found, pairs) in blocks(len(cells), LISTS, search):
            self.pairs += pairs
            for asked, places, cosine in found:
                sooner = (other[asked] < 0) | (places < other[asked])
                better = asked[sooner]
                other[better], value[better] = places[sooner], cosine[sooner]
        return value, other

    def _verified(self, part: np.ndarray, cells: list[tuple[int, np.ndarray]]) -> tuple[Found, int]:
        """Searches cells, each for its rows of `part`: rows, their places, similarities; pairs.

        The candidates of all are verified at once. Where the first of a cell is not similar after
        all, because its product lies within `SLACK`, the row asks that cell again, one by one.
        """
        first = [self._candidates(cell, part, rows) for cell, rows in cells]
        asked, among, places = map(np.concatenate, zip(*first, strict=True))
        cosine = cosines(part[asked], among)
        hit = cosine >= self.threshold
        whose = np.repeat(np.arange(len(cells)), [len(rows) for rows, _, _ in first])
        found, pairs = [], len(asked)
        # One cell after another, for a row is in several.
        for k in np.unique(whose[hit]):
            own = hit & (whose == k)
            found.append((asked[own], places[own], cosine[own]))
        for k in np.flatnonzero(~hit):
            again, more = self._one_by_one(cells[whose[k]][0], part, asked[k : k + 1])
            found, pairs = [*found, *again], pairs + more
        return found, pairs

    def _candidates(
        self, cell: int, part: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of `part` that may resemble one in a cell, the first such one, and its place."""
        held, places = self._held(cell)
        found = [(rows[:0], held[:0], places[:0])]
        for start in range(0, len(rows) if len(held) else 0, BLOCK):
            open_ = rows[start : start + BLOCK]
            for low in range(0, len(held), CHUNK):
                near = part[open_] @ held[low : low + CHUNK].T >= self.threshold - SLACK
                first = near.argmax(axis=1)
                hit = near[np.arange(len(open_)), first]
                if hit.any():
                    at = low + first[hit]
                    found.append((open_[hit], held[at], places[at]))
                    open_ = open_[~hit]
        asked, among, named = zip(*found, strict=True)
        return np.concatenate(asked), np.concatenate(among), np.concatenate(named)

    def _one_by_one(self, cell: int, part: np.ndarray, row: np.ndarray) -> tuple[Found, int]:
        """As `_verified` for a row and a cell, candidate by candidate."""
        held, places = self._held(cell)
        pairs = 0
        for low in range(0, len(held), CHUNK):
            among = held[low : low + CHUNK]
            near = part[row] @ among.T >= self.threshold - SLACK
            first, cosine, more = first_similar(part[row], among, near, self.threshold)
            pairs += more
            if first[0] >= 0:
                return [(row, places[low + first], cosine)], pairs
        return [], pairs

    def _held(self, cell: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of a cell, float32 (size, d), and their places, without a copy."""
        import faiss

        lists, d = self.index.invlists, self.embeddings.shape[1]
        assert lists is not None
        size = lists.list_size(cell)
        if not size:
            return np.zeros((0, d), np.float32), np.zeros(0, np.int64)
        codes = faiss.rev_swig_ptr(lists.get_codes(cell), size * d * 4)
        held = codes.view(np.float32).reshape(size, d)
        return held, faiss.rev_swig_ptr(lists.get_ids(cell), size)

    def _add(self, part: np.ndarray, places: np.ndarray, cells: np.ndarray) -> None:
        import faiss

        rows, cells = np.ascontiguousarray(part), np.ascontiguousarray(cells, np.int64)
        names = np.ascontiguousarray(places, np.int64)
        given = (faiss.swig_ptr(array) for array in (rows, names, cells))
        self.index.add_core(len(rows), *given)


def _drawn(embeddings: np.ndarray, order: np.ndarray, threshold: float) -> np.ndarray:
    """Rows that train the cells, of which no two are similar, float32."""
    n = len(order)
    size = min(n, int(SAMPLE * np.sqrt(n)))
    u = uniforms(0, "semantic_cells", [str(k) for k in range(size)])
    places = np.minimum(((np.arange(size) + u) * (n / max(1, size))).astype(np.int64), n - 1)
    unit = unit_rows(embeddings, order[places])
    unit = unit[unit.any(axis=1)]
    search = Exact(unit, threshold)
    for _ in search.all():
        pass
    return unit[: search.count]


def _centres(rows: np.ndarray) -> np.ndarray:
    """float32 directions of the cells, at least one."""
    import faiss
    from threadpoolctl import threadpool_limits

    k = len(rows) // ROWS_A_CELL
    if k < 2:
        return np.ones((1, rows.shape[1]), np.float32)
    with threadpool_limits(limits=1):
        trainer = faiss.Kmeans(
            rows.shape[1],
            k,
            niter=ITERATIONS,
            seed=hash64("semantic_cells") & 0x7FFFFFFF,
            spherical=True,
            min_points_per_centroid=1,
            max_points_per_centroid=len(rows),
        )
        trainer.train(rows)
    assert trainer.centroids is not None
    return np.asarray(trainer.centroids, np.float32)


Nearest = Literal["exact", "faiss"]
MAX_ROWS = 1_000_000
"""Most rows of the exact search: an hour or two, which grows with their square."""
MAX_ROWS_FAISS = 10_000_000
"""Most rows of the other: an hour or two as well, and 15 to 31 GB where all of 384 are kept."""
REASON = "semantic_duplicate"


def check_rows(n: int, nearest: Nearest = "exact") -> None:
    """Refuses more rows than a search takes.

    Raises:
        ValueError: naming the remedy.
    """
    most = MAX_ROWS if nearest == "exact" else MAX_ROWS_FAISS
    if n > most:
        other = "search with faiss, " if n <= MAX_ROWS_FAISS else ""
        raise ValueError(
            f"{n:,} rows are more than the {most:,} whose embeddings are compared at once: {other}"
            "give the files by source or topic, or remove duplicates by their texts first"
        )


def semantic_duplicates(
    embeddings: np.ndarray,
    threshold: float = 0.95,
    *,
    priority: np.ndarray | None = None,
    drop_all: bool = False,
    nearest: Nearest = "exact",
    block: int = BLOCK,
) -> Deduplicated:
    """Finds rows whose embeddings point the same way.

    Args:
        embeddings: Shape (n, d), finite; length does not matter. A row of zeros resembles nothing.
        threshold: Cosine similarity in (0, 1], to six decimals, from which rows are duplicates.
        priority: Smaller is kept first, shape (n,); ties go by row.
        drop_all: Remove every row that has a duplicate, the first as well.
        nearest: `exact` finds all; `faiss` takes less time and may miss some, and where every copy
            goes it may name another of those that a row resembles.
        block: Rows searched for at once by `exact`.

    Raises:
        ValueError: if the array has another shape, is not finite, has more rows than the search
            takes, or the threshold is out of range.
    """
    if embeddings.ndim != 2 or embeddings.dtype.kind not in "fiu":
        said = f"{embeddings.dtype} of shape {embeddings.shape}"
        raise ValueError(f"embeddings are {said}: give numbers of shape (rows, width)")
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold={threshold} must be in (0, 1]")
    if nearest not in ("exact", "faiss"):
        raise ValueError(f"nearest={nearest!r} is no search: take exact or faiss")
    check_rows(len(embeddings), nearest)
    clock = Clock()
    n = len(embeddings)
    matched, similarity = np.full(n, -1, np.int64), np.zeros(n, np.float64)
    with clock.phase("search"):
        rank = ranks(priority)
        order = np.arange(n) if rank is None else np.argsort(rank, kind="stable")
        if nearest == "exact":
            exact = Exact(unit_rows(embeddings, order), threshold, drop_all)
            _take(exact.all(block), order, matched, similarity)
            pairs = exact.pairs
        else:
            pairs = _in_cells(embeddings, order, threshold, drop_all, matched, similarity)
    none = np.zeros(n, np.bool_)
    return Deduplicated(matched, similarity, none, pairs, clock.seconds, REASON)


def _take(
    found: Iterator[tuple[int, int, float]],
    order: np.ndarray,
    matched: np.ndarray,
    similarity: np.ndarray,
) -> None:
    """Writes down what a search finds, by row."""
    for place, other, value in found:
        matched[order[place]], similarity[order[place]] = order[other], value


def _in_cells(
    embeddings: np.ndarray,
    order: np.ndarray,
    threshold: float,
    drop_all: bool,
    matched: np.ndarray,
    similarity: np.ndarray,
) -> int:
    """Searches with faiss; returns the pairs computed."""
    cells = Cells(embeddings, order, threshold)
    _take(cells.all(), order, matched, similarity)
    if drop_all:
        # A kept row goes as well where a row went for it, or where it resembles one that went.
        gone = np.flatnonzero(matched >= 0)
        firsts, which = np.unique(matched[gone], return_index=True)
        at = matched[order] < 0
        at[np.isin(order, firsts)] = False
        removed, alone = np.flatnonzero(matched[order] >= 0), np.flatnonzero(at)
        matched[firsts], similarity[firsts] = gone[which], similarity[gone[which]]
        _take(cells.chains(removed, alone), order, matched, similarity)
    return cells.pairs


def semantic_reference(embeddings: np.ndarray, threshold: float) -> list[int]:
    """`Deduplicated.matched` in row order by comparing each row with every kept one."""
    kept: list[int] = []
    matched = []
    length = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    for i, row in enumerate(embeddings.astype(np.float64)):
        products = [float(row @ embeddings[j]) / (length[i] * length[j] or np.inf) for j in kept]
        near = [j for j, p in zip(kept, products, strict=True) if round(p, DECIMALS) >= threshold]
        matched.append(near[0] if near else -1)
        if not near:
            kept.append(i)
    return matched


def vectors_of(column: pa.ChunkedArray) -> np.ndarray:
    """A column of lists of numbers as an array, float32, shape (n, d).

    Raises:
        ValueError: if rows are missing or of different lengths, or hold no numbers.
    """
    if not len(column):
        return np.zeros((0, 1), np.float32)
    kind = column.type
    if not hasattr(kind, "value_type"):
        raise ValueError(f"a column of {kind} holds no embeddings: name one of lists of numbers")
    widths = pc.unique(pc.list_value_length(column)).to_pylist()
    if column.null_count or len(widths) != 1 or not widths[0]:
        raise ValueError("embeddings must be there for every row and of one width")
    flat = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(flat).astype(np.float32).reshape(len(column), widths[0])
