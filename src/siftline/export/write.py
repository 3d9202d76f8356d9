"""Writes an export: a version's rows in a trainer's form, with its configuration beside them."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from siftline.export.forms import Unfit, earlier
from siftline.export.targets import KINDS, SFT, TARGETS, Convert, Facts
from siftline.rows.loading import SFT as DEFAULT
from siftline.rows.loading import config_names, native_rows, version_folder
from siftline.rows.shards import building, write_text

BATCH = 1024  # rows written at once
LEFT_OUT = "left_out.jsonl"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        version: The version's folder.
        out: The new folder.
        files: Names in it.
        rows: Rows written, by kind.
        left_out: Rows the trainer has no place for, by kind and reason.
        unknown: Kinds in the version that the trainer does not train on.
    """

    version: Path
    out: Path
    files: tuple[str, ...]
    rows: dict[str, int]
    left_out: dict[str, dict[str, int]]
    unknown: tuple[str, ...]


def export(folder: str | Path, to: str, out: str | Path) -> Exported:
    """Writes a published version in the form of another trainer.

    Args:
        folder: A published version, or a recipe's folder, whose newest version is taken.
        to: A key of `targets.TARGETS`.
        out: The folder to write; it must not exist. Configurations name it as it is given here.

    Returns:
        What was written. Rows left out stand in left_out.jsonl with id and reason.

    Raises:
        ValueError: for an unknown trainer, a folder that is no version, an `out` that is there, or
            a version of which no row fits.
    """
    if to not in TARGETS:
        raise ValueError(f"no trainer {to!r} to export to: choose {', '.join(TARGETS)}")
    target, version = TARGETS[to], version_folder(folder)
    place = Path(out)
    if place.exists():
        raise ValueError(f"{place} exists: name a new folder, an export never mixes with another")
    kinds = [kind for kind in KINDS if _config(kind) in config_names(version)]
    known = [kind for kind in kinds if kind in target.rows]
    with building(place) as tree:
        written: dict[str, int] = {}
        left: dict[str, dict[str, int]] = {}
        masks = 0
        for kind in known:
            done = _Writer(tree, kind, target.parquet)
            masks += done.write(version, target.rows[kind])
            written[kind] = done.rows
            if done.left:
                left[kind] = dict(sorted(Counter(line["reason"] for line in done.left).items()))
                _append(tree / LEFT_OUT, [{"kind": kind, **line} for line in done.left])
        if not sum(written.values()):
            raise ValueError(
                f"no row of {version} has a place in {to}: {left or 'it has no config'}"
            )
        paths = {k: [f"{out}/{k}{done.suffix}"] for k, n in written.items() if n}
        facts = Facts(_name(version), paths, masks)
        for name, text in target.configuration(facts).items():
            write_text(tree / name, text)
        names = tuple(sorted(path.name for path in tree.iterdir()))
    unknown = tuple(kind for kind in kinds if kind not in target.rows)
    return Exported(version, place, names, written, left, unknown)


def _config(kind: str) -> str:
    return DEFAULT if kind == SFT else kind


def _name(version: Path) -> str:
    """The recipe's name as a key: the version's folder lies in the recipe's."""
    return re.sub(r"[^A-Za-z0-9]+", "_", version.parent.name).strip("_") or "curated"


class _Writer:
    """Writes one kind of rows to one file."""

    def __init__(self, tree: Path, kind: str, parquet: bool) -> None:
        self.suffix = ".parquet" if parquet else ".jsonl"
        self.path = tree / f"{kind}{self.suffix}"
        self.kind = kind
        self.rows = 0
        self.left: list[dict[str, str]] = []

    def write(self, version: Path, convert: Convert) -> int:
        """Writes all rows; returns how many have assistant turns before the response."""
        masks = 0
        writer: pq.ParquetWriter | None = None
        for batch, here in self._batches(version, convert):
            masks += here
            self.rows += len(batch)
            if not batch:
                continue
            if self.suffix == ".jsonl":
                _append(self.path, batch)
                continue
            table = pa.Table.from_pylist(batch, schema=writer.schema if writer else None)
            writer = writer or pq.ParquetWriter(self.path, table.schema, compression="zstd")
            writer.write_table(table)
        if writer is not None:
            writer.close()
        return masks

    def _batches(
        self, version: Path, convert: Convert
    ) -> Iterator[tuple[list[dict[str, Any]], int]]:
        batch: list[dict[str, Any]] = []
        masks = 0
        for row in native_rows(version, _config(self.kind)):
            try:
                batch.append({"id": row["id"], **convert(row)})
            except Unfit as error:
                self.left.append({"id": row["id"], "reason": error.reason})
                continue
            masks += self.kind == SFT and any(earlier(row["messages"]))
            if len(batch) == BATCH:
                yield batch, masks
                batch, masks = [], 0
        yield batch, masks


def _append(path: Path, lines: list[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as stream:
        for line in lines:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
