"""Rows that canaries may be made of, held back while a gate reads its rows.

Canaries are made of rows that the gate kept, in the order of their draws, so which ones is known
when the gate is done. Reading them again would read the whole pool again. So rows with a draw high
enough to be among them are held back as the gate reads. This changes no draw: a gate that keeps
few rows, or does not read all of them through its context, has its canaries' rows read again.
"""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from siftline.kernels.draws import gumbel_top_k, quick_uniforms

_ROOM = 2
"""Rows held for one wanted: a gate may remove half of its rows before they are read again."""


class HeldRows:
    """Rows of one gate with the highest draws.

    Args:
        seed: The recipe's.
        wanted: Most rows that will be asked for.
        rows: Rows that the gate reads.
    """

    def __init__(self, seed: int, wanted: int, rows: int) -> None:
        self.seed = seed
        self.floor = 1.0 - min(1.0, _ROOM * wanted / rows)
        self._held: dict[int, pa.Table] = {}
        self._seen: dict[int, int] = {}

    def offer(self, bucket: int, rows: pa.Table) -> None:
        """Takes what it wants of the rows in play of a bucket; once is enough."""
        if bucket in self._seen:
            return
        drawn = draws(self.seed, rows.column("id").to_pylist())
        self._held[bucket] = rows.take(pa.array(np.flatnonzero(drawn > self.floor)))
        self._seen[bucket] = rows.num_rows

    def first(self, kept: Sequence[str], count: int, rows: int) -> pa.Table | None:
        """The rows that come first in the order of draws.

        Args:
            kept: Ids of the rows asked for, ascending.
            count: How many of them, at most `len(kept)`.
            rows: Rows in play of the gate.

        Returns:
            `count` rows, best draw first; None where they can't be told, or are not held.
        """
        if sum(self._seen.values()) != rows or not self._held:
            return None
        held = pa.concat_tables(self._held.values())
        ids = held.column("id").to_pylist()
        places = [place for place, i in enumerate(ids) if _among(i, kept)]
        if len(places) < count:
            return None
        best = first(self.seed, [ids[place] for place in places], count)
        return held.take(pa.array([places[i] for i in best], pa.int64()))


def _among(identity: str, ids: Sequence[str]) -> bool:
    place = bisect_left(ids, identity)
    return place < len(ids) and ids[place] == identity


def draws(seed: int, ids: Sequence[str]) -> np.ndarray:
    """The draw of each row, float64 in (0, 1): the same at every gate."""
    return quick_uniforms(seed, "canary", ids)


def first(seed: int, ids: Sequence[str], count: int) -> np.ndarray:
    """Positions of the `count` ids that come first in the order of their draws."""
    return gumbel_top_k(draws(seed, ids), ids, count)
