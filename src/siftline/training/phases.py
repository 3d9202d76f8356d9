"""Phases of a run: which sources it sees in which order.

The dual-stage schedule of Dong et al. 2023 (arXiv 2310.05492) is two of them: special data first,
then general data with a small share of the special (1/256 in the paper, which keeps what the first
phase taught). A curated version has no order, so this belongs to training.

Each source hands out its rows in epochs of its own, from where the phase before left off: no row
comes again before all of its source were seen. Inside a phase rows are shuffled.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from siftline.kernels.draws import uniforms
from siftline.kernels.quotas import largest_remainder
from siftline.selectors.mixture import REST, check_mixture, split
from siftline.training.budget import epoch_order

STAGE = "phase order"


@dataclass(frozen=True)
class Phase:
    """One phase.

    Attributes:
        sources: Its loss tokens by source, as weights; `*` is every source that no phase names.
        share: Its part of the run's loss tokens, as a weight beside those of the other phases.
    """

    sources: dict[str, float] = field(default_factory=lambda: {REST: 1.0})
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share < float("inf"):
            raise ValueError(f"share is {self.share}: give a number above 0")
        check_mixture(self.sources, "sources")


@dataclass(frozen=True)
class Phased:
    """The rows of a run in the order of its phases.

    Attributes:
        ids: Ids, each as often as it is seen.
        composition: What each phase holds of each source: phase (from 1), source, loss_tokens,
            wanted (loss tokens of its weight) and rows.
    """

    ids: list[str]
    composition: tuple[dict[str, Any], ...]


def rows_for_phases(
    ids: Sequence[str],
    loss_tokens: np.ndarray,
    sources: Sequence[str],
    phases: Sequence[Phase],
    budget: int,
    seed: int,
) -> Phased:
    """The rows a run sees, phase by phase, until the budget of loss tokens is met.

    What a source can't spend to the end (its next row is longer) goes to the next one, so the run
    as a whole falls short by less than one row.

    Args:
        ids: n distinct ids.
        loss_tokens: Loss tokens of each, at least 1, shape (n,).
        sources: Source of each.
        phases: At least one.
        budget: Most loss tokens in all.
        seed: Seed of the orders.

    Raises:
        ValueError: if a phase asks a source that has no row, or the budget holds none.
    """
    names = {name for phase in phases for name in phase.sources} - {REST}
    groups = np.array([source if source in names else REST for source in sources])
    streams: dict[str, Iterator[tuple[int, int]]] = {}
    taken: list[tuple[int, int]] = []
    told: list[dict[str, Any]] = []
    waiting: dict[str, tuple[int, int]] = {}
    left = 0
    shares = np.array([phase.share for phase in phases])
    for number, size in enumerate(largest_remainder(shares, budget).tolist(), 1):
        mine: list[tuple[int, int]] = []
        for name, wanted in _wanted(phases[number - 1], size):
            if name not in streams:
                streams[name] = _endless(ids, _members(groups, name, number), seed)
                waiting[name] = next(streams[name])
            left, spent = left + wanted, []
            while loss_tokens[waiting[name][0]] <= left:
                left -= int(loss_tokens[waiting[name][0]])
                spent.append(waiting[name])
                waiting[name] = next(streams[name])
            mine += spent
            told.append(_composed(number, name, wanted, [i for i, _ in spent], loss_tokens))
        taken += _shuffled(mine, ids, seed)
    if not taken:
        raise ValueError(f"the budget of {budget} loss tokens holds no row: raise it")
    return Phased([ids[i] for i, _ in taken], tuple(told))


def _wanted(phase: Phase, size: int) -> list[tuple[str, int]]:
    return split(phase.sources, size).select("source", "quota").rows()


def _members(groups: np.ndarray, name: str, number: int) -> np.ndarray:
    """Places of a source's rows."""
    found = np.flatnonzero(groups == name)
    if not len(found):
        known = ", ".join(sorted(set(groups.tolist())))
        raise ValueError(
            f"phase {number} asks source {name!r}, of which there is no row: the rows have {known}"
        )
    return found


def _endless(ids: Sequence[str], members: np.ndarray, seed: int) -> Iterator[tuple[int, int]]:
    """Place and epoch of a source's rows, epoch after epoch."""
    own, epoch = [ids[i] for i in members], 0
    while True:
        for place in members[epoch_order(own, seed, epoch)].tolist():
            yield place, epoch
        epoch += 1


def _shuffled(
    rows: Sequence[tuple[int, int]], ids: Sequence[str], seed: int
) -> list[tuple[int, int]]:
    """Rows of one phase by a draw on id and epoch; the draws of two epochs are independent."""
    by_epoch: dict[int, list[int]] = {}
    for place, epoch in rows:
        by_epoch.setdefault(epoch, []).append(place)
    drawn: dict[tuple[int, int], float] = {}
    for epoch, places in by_epoch.items():
        u = uniforms(seed, STAGE, [ids[place] for place in places], epoch).tolist()
        drawn |= {(place, epoch): x for place, x in zip(places, u, strict=True)}
    return sorted(rows, key=lambda row: (drawn[row], ids[row[0]], row[1]))


def _composed(
    number: int, name: str, wanted: int, places: list[int], loss_tokens: np.ndarray
) -> dict[str, Any]:
    return {
        "phase": number,
        "source": name,
        "wanted": wanted,
        "loss_tokens": int(loss_tokens[places].sum()),
        "rows": len(places),
    }
