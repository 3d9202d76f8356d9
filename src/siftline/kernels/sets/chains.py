"""Chains of rows in keep order, one a group, as arrays that compiled code appends to."""

from typing import NamedTuple

import numpy as np
from numba import njit


class Chains(NamedTuple):
    """Chain g starts at link head[g] and ends at tail[g]; -1 is none.

    Attributes:
        head: int32, shape (groups,).
        tail: int32, shape (groups,).
        after: int32, shape (links,): after[c] follows link c.
        owner: int32, shape (links,): the row that link c stands for.
    """

    head: np.ndarray
    tail: np.ndarray
    after: np.ndarray
    owner: np.ndarray


@njit(cache=True, nogil=True)
def no_chains(groups: int, links: int) -> Chains:
    """Empty chains of some groups, with room for some links."""
    return Chains(
        np.full(groups, -1, np.int32),
        np.full(groups, -1, np.int32),
        np.full(links, -1, np.int32),
        np.empty(links, np.int32),
    )


@njit(cache=True, nogil=True)
def append(chains: Chains, group: int, link: int, row: int) -> None:
    """Ends the chain of a group with a link that stands for a row."""
    chains.owner[link] = row
    if chains.head[group] < 0:
        chains.head[group] = link
    else:
        chains.after[chains.tail[group]] = link
    chains.tail[group] = link
