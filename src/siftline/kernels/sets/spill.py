"""Keys and shingle sets of more rows than should stay in memory: on disk until they are used.

What is written here is read once or twice and then thrown away, by the process that wrote it: plain
bytes, no format. A file is read into memory of its own rather than mapped, so that what is held can
be told from what is on disk.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from siftline.kernels.text.texts import Rows

KEYS_IN_MEMORY = 512 << 20
"""Bytes of band keys above which they go to disk."""
SETS_IN_MEMORY = 1 << 30
"""Bytes of shingle sets above which they go to disk."""


@dataclass(frozen=True)
class Shelved:
    """An array in a file, parts of which are read like those of an array in memory.

    Attributes:
        path: The file.
        shape: Of the array.
        dtype: Of the array.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: int | slice) -> np.ndarray:
        """A line, or some that follow each other, read now."""
        if isinstance(part, slice):
            start, stop, step = part.indices(len(self))
            assert step == 1, "lines that follow each other"
            return self._lines(start, max(0, stop - start))
        return self._lines(part, 1)[0]

    def _lines(self, start: int, count: int) -> np.ndarray:
        width = int(np.prod(self.shape[1:], dtype=np.int64))
        at = start * width * self.dtype.itemsize
        flat = np.fromfile(self.path, self.dtype, count * width, offset=at)
        return flat.reshape(count, *self.shape[1:])


Stored = np.ndarray | Shelved
"""An array in memory, or in a file."""


def shelved(array: np.ndarray, path: Path) -> Shelved:
    """Writes an array to a file; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for line in array if array.ndim > 1 else [array]:  # of a part, no copy of the whole
            np.ascontiguousarray(line).tofile(file)
    return Shelved(path, array.shape, array.dtype)


@dataclass
class Keys:
    """Band keys, hashes and counts of n rows, filled piece by piece in order.

    Keys are 8 bytes a band and row. Where there are many, pieces of them are written to files and
    one band at a time is read back; hashes and counts are 12 bytes a row and stay.

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
    _pieces: list[Shelved] = field(default_factory=list)
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
        return np.concatenate([np.zeros(0, np.uint64), *(piece[band] for piece in self._pieces)])

    def finish(self) -> None:
        """Frees the memory of what is on disk; threads may read bands from here on."""
        if self._spilled:
            if self._held:
                self._write()
            self._keys = self._keys[:, :0].copy()

    def _write(self) -> None:
        path = self.folder / f"keys-{len(self._pieces):05d}.bin"
        self._pieces.append(shelved(self._keys[:, : self._held], path))
        self._held = 0
        self._spilled = True


def values_room(size: int, folder: Path, limit: int = SETS_IN_MEMORY) -> np.ndarray:
    """Room for `size` uint32 hashes: in memory, or where that is too much in a file."""
    if 4 * size <= limit:
        return np.empty(size, np.uint32)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sets.bin"
    with path.open("wb") as file:
        # Else a disk that fills up while the map is written to kills the process (SIGBUS).
        os.posix_fallocate(file.fileno(), 0, 4 * size)
    return np.memmap(path, np.uint32, "r+", shape=(size,)).view(np.ndarray)
