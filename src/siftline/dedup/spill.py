"""Keys and shingle sets of more rows than should stay in memory: on disk until they are used."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from siftline.kernels.rows import Rows

KEYS_IN_MEMORY = 512 << 20
"""Bytes of band keys above which they go to disk."""
SETS_IN_MEMORY = 1 << 30
"""Bytes of shingle sets above which they go to disk."""


@dataclass
class Keys:
    """Band keys, hashes and counts of n rows, filled piece by piece in order.

    Keys are 8 bytes a band and row. Where there are many, pieces of them are written to Parquet, a
    column a band, and one band at a time is read back; hashes and counts are 12 bytes a row and
    stay.

    Attributes:
        n: Rows.
        bands: Number of bands.
        folder: Where pieces go.
        limit: Bytes that may stay in memory.
    """

    n: int
    bands: int
    folder: Path
    limit: int = KEYS_IN_MEMORY
    _files: list[Path] = field(default_factory=list)
    _at: int = 0

    def __post_init__(self) -> None:
        self._spilled = 8 * self.bands * self.n > self.limit
        held = max(1, self.limit // (8 * self.bands)) if self._spilled else self.n
        self._keys = np.empty((self.bands, held), np.uint64)
        self._held = 0
        self.hashes = np.empty(self.n, np.uint64)
        self.counts = np.empty(self.n, np.int32)

    @property
    def filled(self) -> int:
        """Rows there are so far."""
        return self._at

    def room(self, rows: int) -> tuple[Rows, int]:
        """Where the next `rows` rows are to be written, and the place of the first.

        The arrays are one piece long; hashes and counts are moved to their place by `take`.
        """
        if self._held and self._held + rows > self._keys.shape[1]:
            self._write()
        if rows > self._keys.shape[1]:
            self._keys = np.empty((self.bands, rows), np.uint64)
        window = slice(self._at - self._held, None)
        return Rows(self._keys, self.hashes[window], self.counts[window]), self._held

    def take(self, rows: int) -> None:
        """Says that the rows given room are written."""
        self._at += rows
        self._held += rows

    def band(self, band: int) -> np.ndarray:
        """The keys of one band, uint64, shape (n,)."""
        assert self._at == self.n, f"{self._at} of {self.n} rows are there"
        if not self._spilled:
            return self._keys[band, : self.n]
        if self._held:
            self._write()
        out = np.empty(self.n, np.uint64)
        at = 0
        for path in self._files:
            with pq.ParquetFile(path) as file:
                keys = file.read([f"band_{band}"]).column(0).to_numpy()
            out[at : at + len(keys)] = keys
            at += len(keys)
        return out

    def finish(self) -> None:
        """Frees the memory of what is on disk; threads may read bands from here on."""
        if self._spilled:
            if self._held:
                self._write()
            self._keys = self._keys[:, :0].copy()

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"keys-{len(self._files):05d}.parquet"
        columns = {f"band_{band}": self._keys[band, : self._held] for band in range(self.bands)}
        pq.write_table(pa.table(columns), path, compression="none", use_dictionary=False)
        self._files.append(path)
        self._held = 0
        self._spilled = True


def values_room(size: int, folder: Path, limit: int = SETS_IN_MEMORY) -> np.ndarray:
    """Room for `size` uint32 hashes: in memory, or where that is too much in a file."""
    if 4 * size <= limit:
        return np.empty(size, np.uint32)
    folder.mkdir(parents=True, exist_ok=True)
    return np.memmap(folder / "sets.bin", np.uint32, "w+", shape=(size,)).view(np.ndarray)
