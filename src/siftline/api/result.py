"""What a call of the API found: the rows that stayed, those that went and why."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl

from siftline.api.frames import Given
from siftline.api.judge import UNREAD
from siftline.api.output import FACT_NAMES, Decided, write_decided, write_records
from siftline.deduplication.arrow import NoTableError
from siftline.deduplication.output import claim
from siftline.rows.ledger import FAILED, KEPT, REMOVED
from siftline.rows.shards import building

_SHOWN, _CHARS = 5, 300
"""Removed rows that a notebook shows, and characters of each."""
_OUTCOMES = {
    KEPT: "kept",
    REMOVED: "removed",
    FAILED: "failed: not decided, try again",
    UNREAD: "quarantined: could not be read",
}


@dataclass(frozen=True, repr=False)
class Result:
    """Rows that stayed, rows that went, and why.

    `kept` and `removed` have the form of the data that was given (of files: a polars frame, or a
    list of dicts where a column holds values of several kinds), its order, index and columns. Every
    row is in one of four places: kept, removed, failed (the stage could not decide) or quarantined
    (it could not be read), and `summary` counts them.

    Attributes:
        decided: Every decision.
        given: The data.
        against: The sets that it was compared with, in order.
    """

    decided: Decided = field(repr=False)
    given: Given = field(repr=False)
    against: tuple[Given, ...] = field(default=(), repr=False)

    @cached_property
    def kept(self) -> Any:
        """The rows that stayed, as they were."""
        return self._taken(self.decided.places(KEPT))

    @cached_property
    def removed(self) -> Any:
        """The rows that went, with what decided.

        More columns: sift_reason, sift_value, sift_threshold, sift_matched_id (not of plain texts),
        sift_matched_row (the row that it lost to as NAME:ROW, from 1) and sift_similarity.
        """
        places = self.decided.places(REMOVED)
        return self._taken(places, self.decided.facts(places))

    @cached_property
    def failed(self) -> Any:
        """The rows that could not be decided, with sift_reason."""
        places = self.decided.places(FAILED)
        reasons = self.decided.judged.lines["reason"].gather(places).to_list()
        return self._taken(places, {"sift_reason": reasons})

    @cached_property
    def quarantined(self) -> pl.DataFrame:
        """What could not be read: row (as NAME:ROW), reason and excerpt."""
        lost, files = self.decided.judged.quarantine, self.decided.judged.files
        shown = dict(zip((file.name for file in files), self.decided.names, strict=True))
        names = [f"{shown[file]}:{line}" for file, line in lost.select("file", "line").rows()]
        row = pl.Series("row", names, pl.String)
        return lost.select(row, "reason", "excerpt")

    @cached_property
    def decisions(self) -> pl.DataFrame:
        """One line a row, in order.

        Columns: row (its place from 0), outcome, reason, value, threshold, matched (place from 0 of
        the row it lost to, in the data or in what it was compared with), id and matched_id (null of
        plain texts).
        """
        lines = self.decided.judged.lines.with_row_index("row")
        names = ("outcome", "reason", "value", "threshold", "matched", "id", "matched_id")
        return lines.select(pl.col("row").cast(pl.Int64), *names)

    @cached_property
    def tables(self) -> dict[str, pl.DataFrame]:
        """Side tables of the stage by name, such as conflicts, clusters or overlaps; rows by id."""
        return dict(self.decided.judged.tables)

    def summary(self) -> dict[str, Any]:
        """Counts: rows, kept, removed, failed, quarantined, and reasons with how often each."""
        facts = self.decided.judged.facts
        return {**self.decided.counts(), "vacuous": bool(facts.get("vacuous", False))}

    def explain(self, row: int) -> str:
        """What became of a row, and its text beside that of the row it lost to.

        Args:
            row: Its place in the data, from 0, as in `decisions`; negative from the end.

        Raises:
            IndexError: if there is no such row.
        """
        lines = self.decided.judged.lines
        place = row + lines.height if row < 0 else row
        if not 0 <= place < lines.height:
            raise IndexError(f"row {row}: there are {lines.height}")
        line = lines.row(place, named=True)
        (name,) = self.decided.named(np.array([place]))
        said = f"{name} was {_OUTCOMES[line['outcome']]}" + (
            f" by {self.decided.kind}" if line["outcome"] in (REMOVED, FAILED) else ""
        )
        if line["reason"]:
            said += f": {line['reason']}"
        if line["value"] is not None and line["outcome"] == REMOVED:
            said += f", {line['value']:.4g} against a threshold of {line['threshold']:.4g}"
        texts = [(name, self._text(place))]
        if line["matched"] is not None:
            (other,) = self.decided.lost_to(np.array([place]))
            said += f"; it lost to {other}"
            texts.append((str(other), self._lost_text(line["matched"])))
        return "\n".join([said, *(f"--- {of}\n{text}" for of, text in texts)])

    def save(self, folder: str | Path) -> Path:
        """Writes `data/`, `removed/` and what else there is, as the verbs of the command line do.

        Rows are Parquet, or JSONL where a column holds values of several kinds.

        Args:
            folder: A new or empty folder.

        Raises:
            ValueError: if it is not.
        """
        out = Path(folder).absolute()
        claim(out)
        assert self.given.tables is not None
        with building(out) as made, TemporaryDirectory(prefix="siftline-") as scratch:
            try:
                tables = self.given.tables(Path(scratch), self.decided.judged)
            except NoTableError:
                write_records(made, self._records(), self.decided)
            else:
                write_decided(made, tables, self.decided, lambda label, total, unit: _Silent())
        return out

    def to_datasets(self) -> Any:
        """The rows that stayed as a `datasets.Dataset` (of a DatasetDict: the same splits).

        Raises:
            ValueError: if the datasets package is not installed.
        """
        try:
            import datasets
        except ImportError as error:
            raise ValueError("needs datasets: pip install 'siftline[datasets]'") from error
        kept = self.kept
        if type(kept).__module__.partition(".")[0] == "datasets":
            return kept
        if isinstance(kept, list):
            return datasets.Dataset.from_list(kept)
        import narwhals as nw

        return datasets.Dataset(nw.from_native(kept, eager_only=True).to_arrow())

    def __repr__(self) -> str:
        counts = self.summary()
        shown = [f"{counts[name]:,} {name}" for name in (KEPT, REMOVED, FAILED, UNREAD)]
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts["reasons"].items())
        more = [name for name in shown if not name.startswith("0 ")]
        said = f"<{self.decided.kind}: {counts['rows']:,} rows, {', '.join(more)}>"
        return f"{said[:-1]} ({reasons})>" if reasons else said

    def _repr_html_(self) -> str:
        """Counts, reasons, and some removed rows beside what they lost to."""
        counts = self.summary()
        heads = ["rows", KEPT, REMOVED, FAILED, UNREAD]
        lines = [_row([f"{counts[name]:,}" for name in heads])]
        out = [f"<b>{html.escape(self.decided.kind)}</b>", _table(heads, lines)]
        unread = {f"{reason} (not read)": n for reason, n in counts["unreadable"].items()}
        why = {**counts["reasons"], **unread}
        if why:
            lines = [_row([reason, f"{count:,}"]) for reason, count in why.items()]
            out.append(_table(["reason", "rows"], lines))
        places = self.decided.places(REMOVED)[:_SHOWN]
        if len(places):
            facts = self.decided.facts(places)
            matched = self.decided.judged.lines["matched"].gather(places).to_list()
            lines = []
            for k, place in enumerate(places.tolist()):
                value = facts["sift_value"][k]
                lost = "" if matched[k] is None else self._lost_text(matched[k])
                cells = [
                    facts["sift_reason"][k],
                    "" if value is None else f"{value:.3g}",
                    self._text(place),
                    facts["sift_matched_row"][k] or "",
                    lost,
                ]
                lines.append(_row(cells))
            out.append(_table(["reason", "value", "removed row", "lost to", "its text"], lines))
        return "\n".join(out)

    def _taken(self, places: np.ndarray, more: Any = None) -> Any:
        assert self.given.take is not None
        return self.given.take(places, more or {})

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for place in np.flatnonzero(self.decided.judged.lines["outcome"] != UNREAD).tolist():
            yield place, self.given.records([place])[0]

    def _text(self, place: int) -> str:
        if self.decided.judged.lines["outcome"][place] == UNREAD:
            (name,) = self.decided.named(np.array([place]))
            return str(self.quarantined.filter(row=name)["excerpt"][0])
        return _shown(self.given.records([place])[0])

    def _lost_text(self, place: int) -> str:
        if not self.against:
            return self._text(place)
        for given in self.against:
            assert given.rows is not None
            if place < given.rows:
                return _shown(given.records([place])[0])
            place -= given.rows
        raise AssertionError(f"{place} rows too many")


class _Silent:
    """A tracker that says nothing."""

    def advance(self, count: int, tokens: int = 0) -> None: ...
    def reach(self, done: int, total: int) -> None: ...
    def close(self) -> None: ...


def _shown(record: dict[str, Any]) -> str:
    """A record as people read it: its turns or its columns, one a line."""
    lines = []
    for name, value in record.items():
        if value is None or name in FACT_NAMES:
            continue
        if isinstance(value, list | np.ndarray) and len(value) and isinstance(value[0], dict):
            for turn in value:
                who = turn.get("role") or turn.get("from") or name
                said = turn.get("content") or turn.get("value") or ""
                lines.append(f"{who}: {said}")
        else:
            lines.append(f"{name}: {value}")
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    cut = [cell if len(cell) <= _CHARS else cell[: _CHARS - 1] + "…" for cell in cells]
    style = ' style="text-align: left; vertical-align: top; white-space: pre-wrap"'
    return "<tr>" + "".join(f"<td{style}>{html.escape(cell)}</td>" for cell in cut) + "</tr>"


def _table(heads: Sequence[str], lines: Sequence[str]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


assert set(_OUTCOMES) == {KEPT, REMOVED, FAILED, UNREAD}
