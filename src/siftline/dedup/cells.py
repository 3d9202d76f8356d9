"""Search for similar rows in cells: a row is held against those near it, not against all.

faiss makes the cells (spherical k-means) and holds their rows (IndexIVFFlat, inner product). Rows
come in keep order, a span at a time: a span is held against the kept rows of the cells nearest to
each row, then exactly against itself, and what is kept joins the cells. So m copies cost m
comparisons and no list of equal pairs is made. A pair is missed where none of the `probes` cells
nearest to the later row holds the earlier one; a pair that is found was verified as in `cosine`.

Cells are drawn from rows in keep order, one from each of 64 sqrt(n) stretches; of those that
resemble each other one trains, or a thousand versions of one template would split it into as many
cells and hide it from itself. Sixteen that train make a cell: 4 sqrt(n) cells where nothing
repeats. With n rows kept a row costs 4 sqrt(n) products with centroids, as many again in 16 cells
and in its span, and the rows that train cost 2,048 for each of all.

The nearest cells are found by one thread a span, so that threads change nothing; spans are made
ready on all threads.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from siftline.dedup.cosine import BLOCK, CHUNK, SLACK, Exact, cosines, first_similar, unit_rows
from siftline.kernels.draws import hash64, uniforms
from siftline.kernels.vectors.blocks import pooled

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
