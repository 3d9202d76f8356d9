"""Scores many store buckets, each response without its prompt asked once in all of them.

A row is asked in the bucket of its prompt. Its response alone belongs to the bucket of its own key,
because the rows of any bucket may end in it. So there are two rounds: all rows with their prompts,
bucket by bucket, and then the responses, bucket by bucket. Batches are planned inside a bucket in
both, whichever device takes it, and what waits for the second round lies on disk.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import polars as pl
import pyarrow as pa

from siftline.scoring.measures.likelihood import (
    ALONE,
    Likelihood,
    Question,
    Reasons,
    alone_bucket,
    joined,
    score_alone,
    score_given,
)
from siftline.scoring.recorder import Recorder
from siftline.scratch import scratch_folder
from siftline.stages.parallel import counted, over_buckets

_WAITING = pa.schema(
    [
        ("row_bucket", pa.int32()),
        ("key", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("start", pa.int32()),
        ("end", pa.int32()),
    ]
)


def score_buckets(
    recorders: Sequence[Recorder],
    buckets: Iterable[tuple[int, pa.Table]],
    asked: Likelihood,
    advance: Callable[[int], None],
) -> Iterator[tuple[int, tuple[pl.DataFrame, Reasons]]]:
    """Scores rows as `likelihood.score_likelihood` does, over many store buckets.

    Args:
        recorders: One for each device, on copies of one model.
        buckets: Store bucket and its rows, each bucket once.
        asked: Which turns, and what beside the log-probability.
        advance: Takes what no recorder reports: rows count twice, asked or not.

    Yields:
        Bucket, its lines and the reasons of its other rows, in the order of the buckets.
    """
    with scratch_folder(recorders[0].root, "responses") as folder:
        failed: dict[int, Reasons] = {}
        with _Waiting(folder) as waiting:
            for bucket, (given, reasons, left) in over_buckets(
                recorders, buckets, lambda r, b, rows: _with_prompts(r, b, rows, asked, advance)
            ):
                given.write_ipc(folder / f"given-{bucket}.arrow")
                failed[bucket] = reasons
                waiting.add(bucket, left)
        lacking: Reasons = {}
        for home, (answers, reasons) in over_buckets(
            recorders, waiting.read(), lambda r, b, table: _responses(r, b, table, advance)
        ):
            lacking |= reasons
            for (bucket,), part in answers.partition_by("row_bucket", as_dict=True).items():
                part.select(*ALONE).write_ipc(folder / f"alone-{bucket}-{home}.arrow")
        for bucket, reasons in failed.items():
            found = sorted(folder.glob(f"alone-{bucket}-*.arrow"))
            alone = [pl.DataFrame(schema=ALONE), *map(pl.read_ipc, found)]
            given = pl.read_ipc(folder / f"given-{bucket}.arrow")
            lines, lost = joined(given, pl.concat(alone), lacking)
            yield bucket, (lines, reasons | lost)


def _with_prompts(
    recorder: Recorder,
    bucket: int,
    rows: pa.Table,
    asked: Likelihood,
    advance: Callable[[int], None],
) -> tuple[pl.DataFrame, Reasons, dict[str, Question]]:
    reported: list[int] = []
    with counted([recorder], 0, reported.append):
        found = score_given(recorder, bucket, rows, asked)
    advance(2 * rows.num_rows - len(found[2]) + sum(reported))  # the rest is of the second round
    return found


def _responses(
    recorder: Recorder, bucket: int, table: pa.Table, advance: Callable[[int], None]
) -> tuple[pl.DataFrame, Reasons]:
    """Columns of `ALONE` and `row_bucket`, a line for each bucket that has the response."""
    questions: dict[str, Question] = {}
    for line in table.to_pylist():
        questions[line["key"]] = (line["tokens"], (line["start"], line["end"]))
    with counted([recorder], table.num_rows, advance):
        answers, reasons = score_alone(recorder, bucket, questions)
    homes = pl.from_arrow(table.select(["row_bucket", "key"]))
    assert isinstance(homes, pl.DataFrame)
    return homes.join(answers, on="key", maintain_order="left"), reasons


class _Waiting:
    """Responses that wait for the second round, in one file for each of their buckets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
        self._opened = ExitStack()

    def __enter__(self) -> "_Waiting":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def add(self, row_bucket: int, alone: dict[str, Question]) -> None:
        """Writes the responses of one bucket of rows."""
        by_home: dict[int, list[tuple[int, str, list[int], int, int]]] = {}
        for key, (tokens, (start, end)) in sorted(alone.items()):
            line = (row_bucket, key, tokens, start, end)
            by_home.setdefault(alone_bucket(key), []).append(line)
        for home, lines in by_home.items():
            if home not in self._writers:
                sink = self._opened.enter_context(pa.OSFile(str(self._path(home)), "wb"))
                writer = pa.ipc.new_stream(sink, _WAITING)
                self._writers[home] = self._opened.enter_context(writer)
            columns = [list(column) for column in zip(*lines, strict=True)]
            self._writers[home].write_table(pa.table(columns, schema=_WAITING))

    def read(self) -> Iterator[tuple[int, pa.Table]]:
        """Bucket and responses, in order."""
        for home in sorted(self._writers):
            with pa.OSFile(str(self._path(home)), "rb") as source:
                yield home, pa.ipc.open_stream(source).read_all()

    def _path(self, home: int) -> Path:
        return self.folder / f"waiting-{home}.arrow"
