"""What is known of rows that were deduplicated earlier, so that new ones are compared with them.

A folder:

    manifest.json             settings, files in the order they came, what is valid of the rest with
                              its hashes, and its own
    keys-00000.parquet        of every addition: band keys, text hash, set size and priority a row
    sets.bin                  shingle sets of all rows, one after another; only ever appended to
    decisions-00000.parquet   of the last addition: the row that each was removed for
    changes-00000.parquet     of the last addition: earlier decisions that it turned over

An addition writes its files, then the manifest, in one rename. A kill before that leaves files that
no manifest names, and a tail of `sets.bin` beyond the length it names: the next opening removes
both. The decisions are those of doing everything at once in the order the files came. Nothing is
removed, added or read before everything that the manifest names is what it was (`_confirm`).
"""

import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from siftline.deduplication.arrow import arrow_of
from siftline.deduplication.engine import Deduplicated, Engine, Sets, Settings, ranks, spread
from siftline.deduplication.files import Table
from siftline.disk import writing
from siftline.kernels.sets.groups import Groups
from siftline.kernels.sets.keepers import KEPT, NEW, Decisions, Keep
from siftline.kernels.text.codepoints import digest
from siftline.kernels.text.texts import Texts
from siftline.locks import held, warn_if_shared
from siftline.rows.shards import write_json, write_parquet
from siftline.rows.verified import (
    AlteredError,
    UnhashedError,
    confirm,
    file_hash,
    read_hashed,
    read_parquet,
    with_hash,
)

MANIFEST, SETS, LOCK = "manifest.json", "sets.bin", ".lock"
_PART = r"(?:keys|decisions|changes)-\d{5}\.parquet"
_OURS = re.compile(rf"{_PART}|\.(?:manifest\.json|{_PART})\.\d+")
"""Files of an index besides those three, half written ones included; no other is ever removed."""
FORMAT = 3
"""3: primes, factorials and the brackets of intervals count; 2: words by UAX #29, signs count."""
CHANGES = pa.schema(
    [
        ("sift_row", pa.string()),
        ("sift_change", pa.string()),
        ("sift_matched_row", pa.string()),
        ("sift_similarity", pa.float64()),
    ]
)
ANEW = "remove the folder and add the files again"
_DECISIONS = ("matched", "similarity", "exact")
Piece = tuple[Texts, int, np.ndarray]


@dataclass(frozen=True)
class File:
    """A file that was added.

    Attributes:
        name: As it was given; names its rows.
        path: Absolute: says whether it was added before.
        sha256: Of its bytes.
        rows: Number of rows.
        first: Number of its first row in the index.
    """

    name: str
    path: str
    sha256: str
    rows: int
    first: int


class Index:
    """An index folder, held by this process (see `opened`).

    Args:
        folder: Where it is.
        settings: How texts are compared.
        keep: Which copy stays.
        text_column: What is compared.
    """

    def __init__(self, folder: Path, settings: Settings, keep: Keep, text_column: str) -> None:
        self.folder = folder
        self.identity = {
            "format": FORMAT,
            "settings": {k: v for k, v in asdict(settings).items() if k != "max_pairs"},
            "keep": str(keep),
            "text_column": text_column,
            "characters": digest(),
        }
        self.files: list[File] = []
        self.keys: list[str] = []
        self.values = 0
        self.decisions = self.changes = ""
        self.last: list[str] = []
        self.hashes: dict[str, str] = {}
        self.lengths: list[tuple[int, str]] = []
        if (folder / MANIFEST).exists():
            self._load()
            self._confirm()
        self._sweep()

    @property
    def rows(self) -> int:
        """Rows there are."""
        return sum(file.rows for file in self.files)

    def unknown(self, tables: Sequence[Table]) -> list[Table]:
        """Those of some tables that were not added yet.

        Raises:
            ValueError: if one was added with other contents.
        """
        known = {file.path: file for file in self.files}
        new = []
        for table in tables:
            file = known.get(os.path.abspath(table.name))
            if file is None:
                new.append(table)
            elif file.sha256 != file_hash(Path(table.name)):
                raise ValueError(
                    f"{table.name} was added to {self.folder} with other contents: give the new "
                    "rows a file of their own, or start a new index"
                )
        return new

    def firsts(self, tables: Sequence[Table]) -> np.ndarray:
        """Number of the first row of each table."""
        known = {file.path: file.first for file in self.files}
        return np.array([known[os.path.abspath(table.name)] for table in tables], np.int64)

    def named(self, rows: np.ndarray) -> list[str]:
        """Names rows by file and number; the first of a file is 1."""
        starts = np.array([file.first for file in self.files], np.int64)
        where = np.searchsorted(starts, rows, side="right") - 1
        numbers = rows - starts[where] + 1
        pairs = zip(where.tolist(), numbers.tolist(), strict=True)
        # Two files may go by one name, added from different folders: then the path tells them.
        count = Counter(file.name for file in self.files)
        shown = [file.name if count[file.name] == 1 else file.path for file in self.files]
        return [f"{shown[f]}:{number}" for f, number in pairs]

    def add(self, tables: Sequence[Table], pieces: Iterable[Piece], engine: Engine) -> Deduplicated:
        """Adds the rows of some tables and decides about all rows there are.

        Args:
            tables: Files that were not added yet; where there are none, decisions are read.
            pieces: Their texts, numbers of first rows, and priorities.
            engine: With the settings of the index.

        Returns:
            Decisions on all rows of the index, in its order.
        """
        before = self._decided()
        if not tables:
            return before
        old, serial = self.rows, len(self.keys)
        keys = f"keys-{serial:05d}.parquet"
        values, length = self._append(self.folder / keys, pieces, engine)
        self.hashes[keys] = file_hash(self.folder / keys)
        files = list(self.files)
        first = old
        for table in tables:
            path = os.path.abspath(table.name)
            files.append(File(table.name, path, file_hash(Path(table.name)), table.rows, first))
            first += table.rows
        result = self._decide([*self.keys, keys], first, values, before, engine)
        self.files = files  # named() needs them
        decisions, changes = f"decisions-{serial:05d}.parquet", f"changes-{serial:05d}.parquet"
        columns = {name: arrow_of(getattr(result, name)) for name in _DECISIONS}
        write_parquet(pa.table(columns), self.folder / decisions)
        write_parquet(self._changed(before, result), self.folder / changes)
        self.hashes |= {name: file_hash(self.folder / name) for name in (decisions, changes)}
        self.keys, self.values = [*self.keys, keys], values
        self.lengths = [*self.lengths, length]
        self.decisions, self.changes = decisions, changes
        self.last = [os.path.abspath(table.name) for table in tables]
        self._save()
        self._sweep()
        return result

    def changed(self, tables: Sequence[Table]) -> pa.Table:
        """The earlier decisions that the addition of exactly these tables turned over."""
        paths = [os.path.abspath(table.name) for table in tables]
        if self.changes and set(self.last) <= set(paths):
            return self._read(self.changes)
        return CHANGES.empty_table()

    def _read(self, name: str, columns: list[str] | None = None) -> pa.Table:
        path = self.folder / name
        return read_parquet(path, self.hashes[name], columns=columns, remedy=ANEW)

    def _append(
        self, path: Path, pieces: Iterable[Piece], engine: Engine
    ) -> tuple[int, tuple[int, str]]:
        """Writes keys and sets of new rows; number of all values; number and hash of the new."""
        total = self.values
        running = hashlib.sha256()
        with (self.folder / SETS).open("r+b") as sets:
            sets.seek(4 * total)
            writer = None
            for texts, _, priority in pieces:
                n = len(texts.null)
                out = engine.empty(n)
                held = engine.held(texts)
                engine.summarise(texts, out, 0, held)
                room = np.maximum(out.counts, 0).astype(np.int64)
                starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(room)])
                values = np.empty(starts[-1], np.uint32)
                rows = np.flatnonzero(out.counts >= 0)
                sizes = np.zeros(n, np.int32)
                sizes[rows] = engine.collect(texts, rows, values, starts[rows], held, out.counts)
                held = np.arange(len(values)) - np.repeat(starts[:-1], room) < np.repeat(
                    sizes, room
                )
                raw = values[held].tobytes()
                sets.write(raw)
                running.update(raw)
                total += int(sizes.sum())
                columns = {f"band_{k}": arrow_of(keys) for k, keys in enumerate(out.keys)}
                columns |= {"hash": arrow_of(out.hashes), "size": arrow_of(sizes)}
                columns["priority"] = arrow_of(priority)
                table = pa.table(columns)
                if writer is None:
                    writer = pq.ParquetWriter(
                        path, table.schema, compression="none", use_dictionary=False
                    )
                writer.write_table(table)
            if writer is None:  # files without rows
                names = [*(f"band_{k}" for k in range(engine.banding.bands)), "hash"]
                empty = [(name, pa.uint64()) for name in names]
                schema = pa.schema([*empty, ("size", pa.int32()), ("priority", pa.float64())])
                writer = pq.ParquetWriter(path, schema)
            writer.close()
            sets.flush()
            os.fsync(sets.fileno())
        return total, (total - self.values, running.hexdigest())

    def _decide(
        self, keys: list[str], n: int, values: int, before: Deduplicated, engine: Engine
    ) -> Deduplicated:
        def column(name: str) -> np.ndarray:
            parts = [self._read(k, [name]).column(0) for k in keys]
            return np.concatenate([part.to_numpy() for part in parts])

        drop = self.identity["keep"] == "none"
        groups = engine.group(lambda band: column(f"band_{band}"), n, ranks(column("priority")))
        sizes, hashes = column("size"), column("hash")
        starts = np.cumsum(sizes, dtype=np.int64) - sizes
        flat = np.zeros(0, np.uint32)
        if values:
            flat = np.memmap(self.folder / SETS, np.uint32, "r", shape=(values,)).view(np.ndarray)
        sets = Sets(flat, starts[groups.rows], sizes[groups.rows])
        earlier = None if drop else _earlier(groups, n, before)
        decided, pairs = engine.decide(groups, hashes[groups.rows], sets, drop, earlier)
        return spread(n, groups.rows, decided, hashes, pairs, {})

    def _decided(self) -> Deduplicated:
        """What is decided so far."""
        if not self.decisions:
            nothing = np.zeros(0, np.int64)
            return Deduplicated(nothing, nothing / 1.0, nothing > 0, 0, {})
        table = self._read(self.decisions)
        matched, similarity, exact = (table.column(name).to_numpy() for name in _DECISIONS)
        return Deduplicated(matched, similarity, exact, 0, {})

    def _changed(self, before: Deduplicated, now: Deduplicated) -> pa.Table:
        matched = now.matched[: len(before.matched)]
        rows = np.flatnonzero(matched != before.matched)
        was, is_ = before.matched[rows], matched[rows]
        change = np.where(was < 0, "retracted", np.where(is_ < 0, "restored", "matched anew"))
        names: list[str | None] = [None] * len(rows)
        for k, name in zip(np.flatnonzero(is_ >= 0), self.named(is_[is_ >= 0]), strict=True):
            names[k] = name
        columns = [self.named(rows), change.tolist(), names, now.similarity[rows].tolist()]
        return pa.table(columns, schema=CHANGES)

    def _save(self) -> None:
        facts = {
            **self.identity,
            "files": [asdict(file) for file in self.files],
            "keys": self.keys,
            "values": self.values,
            "decisions": self.decisions,
            "changes": self.changes,
            "last": self.last,
            "hashes": {name: self.hashes[name] for name in self._named()},
            "sets": self.lengths,
        }
        write_json(self.folder / MANIFEST, with_hash(facts))

    def _named(self) -> list[str]:
        """The Parquet files that the index consists of."""
        return [name for name in (*self.keys, self.decisions, self.changes) if name]

    def _confirm(self) -> None:
        """Compares every file of the index with what its manifest says."""
        for name in self._named():
            confirm(self.folder / name, self.hashes.get(name, ""), ANEW)
        path = self.folder / SETS
        with path.open("rb") if path.exists() else io.BytesIO() as sets:
            for values, sha256 in self.lengths:
                if _hash_of(sets, 4 * values) != sha256:
                    raise AlteredError(f"{path} was cut or has other bytes than written: {ANEW}")

    def _load(self) -> None:
        path = self.folder / MANIFEST
        try:
            facts = read_hashed(path, "the manifest of an index", ANEW)
        except UnhashedError as error:
            raise ValueError(f"{path} is no manifest of an index ({error}): start anew") from error
        try:
            self.files = [File(**file) for file in facts["files"]]
            self.keys, self.values = facts["keys"], facts["values"]
            self.decisions, self.changes = facts["decisions"], facts["changes"]
            self.last = facts["last"]
            self.hashes = facts["hashes"]
            self.lengths = [(values, sha256) for values, sha256 in facts["sets"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no manifest of an index ({error}): start anew") from error
        if facts.get("format") != FORMAT:
            raise ValueError(
                f"{self.folder} is an index of format {facts.get('format')}, and words are cut "
                f"otherwise since format {FORMAT}: start a new index from the same files"
            )
        for name, mine in self.identity.items():
            if facts.get(name) != mine:
                raise ValueError(
                    f"{self.folder} was made with {name} {facts.get(name)}, not {mine}: use the "
                    "same, or start a new index"
                )

    def _sweep(self) -> None:
        """Removes what a killed run left."""
        valid = {MANIFEST, SETS, LOCK, *self.keys, self.decisions, self.changes}
        for path in self.folder.iterdir():
            if path.name not in valid and _OURS.fullmatch(path.name):
                path.unlink()
        with (self.folder / SETS).open("ab") as sets:
            sets.truncate(4 * self.values)


@contextmanager
def opened(folder: Path, settings: Settings, keep: Keep, text_column: str) -> Iterator[Index]:
    """Opens an index, or begins one, and holds it against other processes.

    Raises:
        ValueError: if the folder holds something else, was made otherwise, or is in use.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    there = {path.name for path in folder.iterdir()}
    others = {name for name in there - {LOCK, SETS} if not _OURS.fullmatch(name)}
    if others and MANIFEST not in there:
        raise ValueError(f"{folder} holds {min(others)}, not an index: name an empty folder")
    warn_if_shared(folder)
    with held(folder / LOCK, str(folder), wait=False), writing(folder):
        yield Index(folder, settings, keep, text_column)


def _hash_of(stream: IO[bytes], size: int) -> str:
    """Hash of the next bytes; of fewer where the stream ends."""
    running = hashlib.sha256()
    while size and (block := stream.read(min(size, 1 << 22))):
        running.update(block)
        size -= len(block)
    return running.hexdigest()


def _earlier(groups: Groups, n: int, before: Deduplicated) -> Decisions:
    """Earlier decisions in the terms of `groups`."""
    place = np.full(n, -1, np.int32)
    place[groups.rows] = np.arange(len(groups.rows), dtype=np.int32)
    old = groups.rows < len(before.matched)
    matched = np.full(len(groups.rows), NEW, np.int32)
    value = np.zeros(len(groups.rows), np.float64)
    was = before.matched[groups.rows[old]]
    matched[old] = np.where(was < 0, KEPT, place[was])
    value[old] = before.similarity[groups.rows[old]]
    return Decisions(matched, value)
