"""n rows of text as arrays, and what is known of them: what `rows` computes, without its compiler.

The loops are those of `rows`, compiled once and found by later processes (`machine`).
"""

from typing import NamedTuple

import numpy as np

from siftline.kernels.machine import Kernel
from siftline.kernels.text.codepoints import GROWTH, Tables, fold_bytes, fold_points

ALONE = np.uint64(0)
"""The key of a row that shares no band with any other."""


class Texts(NamedTuple):
    """n rows of UTF-8.

    Attributes:
        data: uint8, all bytes.
        offsets: int64, shape (n + 1,): row i is data[offsets[i]:offsets[i + 1]].
        null: bool, shape (n,): rows that hold nothing.
    """

    data: np.ndarray
    offsets: np.ndarray
    null: np.ndarray


class Shingling(NamedTuple):
    """How a text becomes shingles.

    Attributes:
        n: Units in a shingle.
        characters: Units are characters; else words.
        tables: What words are, `codepoints.tables`.
    """

    n: int
    characters: bool
    tables: Tables


class Rows(NamedTuple):
    """What is known of n rows after one reading.

    Attributes:
        keys: uint64, shape (bands, n): one key a band, ALONE where the row has no text.
        hashes: uint64, shape (n,): of the bytes of the text.
        counts: int32, shape (n,): shingles, repeats included; -1 where the row has no text.
    """

    keys: np.ndarray
    hashes: np.ndarray
    counts: np.ndarray


class Held(NamedTuple):
    """Shingles of n rows, kept from the first reading where there is room.

    Attributes:
        values: uint32; empty if nothing is kept.
        starts: int64, shape (n,): where those of each row start; -1 where they were not kept.
    """

    values: np.ndarray
    starts: np.ndarray


class Buffers(NamedTuple):
    """Room for one row, used again for the next.

    Attributes:
        folded: Its folded text.
        points: Code points that are being composed.
        words: Its words as text, where units are characters.
        units: Hashes of its units.
        shingles: Those of its shingles.
        mixed: The same, mixed for the signature.
        ends: Ranges of values that are being sorted.
    """

    folded: np.ndarray
    points: np.ndarray
    words: np.ndarray
    units: np.ndarray
    shingles: np.ndarray
    mixed: np.ndarray
    ends: np.ndarray


def buffers(longest: int, characters: bool) -> Buffers:
    """Room for a row of so many bytes; "\u00bd", two of them, is three words."""
    units = (2 * GROWTH if characters else 2) * longest + 2
    return Buffers(
        np.empty(fold_bytes(longest), np.uint8),
        np.empty(fold_points(longest), np.uint32),
        np.empty(units + 8 if characters else 0, np.uint8),
        np.empty(units, np.uint64),
        np.empty(units, np.uint32),
        np.empty(units, np.uint32),
        np.empty(2 * units + 8, np.int32),
    )


def permutations(num_perm: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The multipliers and offsets of datasketch's affine32, uint32, shape (num_perm,) each.

    A fixed table, not a draw: it depends on nothing but `num_perm` and `seed`.
    """
    table = np.random.RandomState(seed)  # the generator datasketch uses
    a = table.randint(0, 2**31, num_perm, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return a, table.randint(0, 2**32, num_perm, dtype=np.uint32)


summarise = Kernel("siftline.kernels.sets.rows", "summarise")
collect = Kernel("siftline.kernels.sets.rows", "collect")
