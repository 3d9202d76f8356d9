"""What makes two texts duplicates, and how they are looked for."""

import os
from dataclasses import dataclass
from typing import Literal

from siftline.kernels.sets.lsh import Banding, banding_for, recall

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
