"""A generated pool row together with its truth, and how the two are written apart.

The pool file holds what a user's file would hold. The truth goes to another folder, which the
pipeline never opens; the two meet again only in `audit`. Rows are written in the order of a hash of
their id and carry a few columns that mean nothing, so that neither position nor column tells a
defect. Truth is keyed by the id that ingestion will give the row.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from siftline.demo.problems import Dice
from siftline.kernels.draws import hash64
from siftline.rows.schema import make_row, message

LANGUAGE = "en"


@dataclass(frozen=True)
class PoolRow:
    """One row of a generated pool and the truth about it.

    Attributes:
        question: The prompt.
        response: What the source answered.
        answer: The independent reference as the pool states it; None where it has none.
        source: Who answered.
        defect: What is wrong with the row; None if it is clean.
        twin: Id of the clean pool row it copies, rewords or contradicts.
        clean_response: What a clean response would have been.
        true_answer: The right final answer; None off topic.
        level: Difficulty, 1 to 4; None off topic or unknown.
    """

    question: str
    response: str
    answer: str | None
    source: str
    defect: str | None = None
    twin: str | None = None
    clean_response: str | None = None
    true_answer: str | None = None
    level: int | None = None

    @cached_property
    def id(self) -> str:
        """The id that ingestion gives this row."""
        messages = [message("user", self.question), message("assistant", self.response)]
        return str(make_row(messages, answer=self.answer, source=self.source)["id"])


def write_pool(out: Path, truth: Path, rows: Sequence[PoolRow], seed: int) -> None:
    """Writes `out/pool.jsonl` and `truth/rows.jsonl`, both in the order of hash(seed, id)."""
    ordered = sorted(rows, key=lambda row: (hash64(seed, "order", row.id), row.id))
    assert len({row.id for row in rows}) == len(rows), "two generated rows have the same id"
    write_jsonl(out / "pool.jsonl", (_pool_line(row, seed) for row in ordered))
    write_jsonl(truth / "rows.jsonl", (_truth_line(row) for row in ordered))


def _pool_line(row: PoolRow, seed: int) -> dict[str, Any]:
    dice = Dice(seed, "columns", row.id)
    return {
        "question": row.question,
        "response": row.response,
        "answer": row.answer,
        "source": row.source,
        "batch": dice.integer(1, 20, "batch"),
        "created": f"2026-{dice.integer(1, 9, 'month'):02d}-{dice.integer(1, 28, 'day'):02d}",
        "lang": LANGUAGE,
    }


def _truth_line(row: PoolRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "question": row.question,
        "response": row.response,
        "source": row.source,
        "answer": row.answer,
        "defect": row.defect,
        "twin": row.twin,
        "clean_response": row.clean_response,
        "true_answer": row.true_answer,
        "level": row.level,
    }


def write_jsonl(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
