"""Reference scores of the rows that arms train on, for objective poft.

A row's reference is the mean over the reference models of each one's mean log-probability of the
row's last response, end of turn included, in that model's own tokens and template (PoFT, arXiv
2412.12865). They come from the score store by row; what it lacks is asked now. The released code of
the paper joins scores to rows by their position in two sorted files; here the row's id says which
score is its own.
"""

from collections.abc import Callable, Sequence

import polars as pl
import pyarrow as pa

from siftline import schema, shards
from siftline.progress import Progress
from siftline.recipe.parse import Recipe
from siftline.scoring import likelihood
from siftline.scoring.engines import ModelSpec
from siftline.scoring.likelihood import Likelihood
from siftline.shards import no_rows
from siftline.stages.context import by_store_bucket
from siftline.stages.models import engines, identity, named_spec
from siftline.stages.responses import score_buckets
from siftline.workspace import Workspace

ASKED = Likelihood(turns="last")
"""What training here learns, whatever turns the recipe's own scores are of."""
SHOWN = 3
_READ = pa.schema(
    [schema.ROW.field(name).with_nullable(True) for name in ("id", "messages", "tools")]
)


def reference_scores(
    workspace: Workspace,
    recipe: Recipe,
    parts: Sequence[pa.Table],
    emit: Callable[[str], None],
) -> dict[str, float]:
    """Mean log-probability by row id, averaged over the models of `training.reference`.

    Scores of a model on these rows are kept in a file, so that who finds the arms trained does not
    load the reference models again.

    Args:
        workspace: The root.
        recipe: The recipe; its training names reference models.
        parts: Tables of rows that will be trained on: id, messages and, if there, tools. An id may
            come in several.
        emit: Takes lines of progress.

    Raises:
        ValueError: if a reference model can't score one of the rows.
    """
    assert recipe.training is not None
    names = recipe.training.reference
    rows = _distinct(parts)
    sums: dict[str, float] = {}
    for name in names:
        found = _of_model(workspace, recipe, name, rows, emit)
        for row, value in found.rows():
            sums[row] = sums.get(row, 0.0) + value
    return {row: total / len(names) for row, total in sums.items()}


def _distinct(parts: Sequence[pa.Table]) -> pa.Table:
    """The rows of all parts, each id once, with the columns that scoring reads, sorted by id."""
    seen: set[str] = set()
    found = [no_rows(_READ)]
    for part in parts:
        ids = part["id"].to_pylist()
        fresh = part.filter(pa.array([i not in seen for i in ids], pa.bool_()))
        seen.update(ids)
        # A published version may lack tools, or fields of messages that no row of it has.
        found.append(pa.Table.from_pylist(fresh.to_pylist(), schema=_READ))
    return pa.concat_tables(found).sort_by("id")


def _of_model(
    workspace: Workspace,
    recipe: Recipe,
    name: str,
    rows: pa.Table,
    emit: Callable[[str], None],
) -> pl.DataFrame:
    """Columns id and logprob_mean under one reference model, a line per row, sorted by id."""
    spec = named_spec(workspace, recipe, name)
    ids = rows["id"].to_pylist()
    folder, stem = workspace.root / "references", _stem(spec, ids)
    kept = shards.read_named(folder, stem)
    if kept is None:
        progress = Progress(f"reference {name}", 2 * len(ids), emit, "forward rows")
        scored, failed = _asked(workspace, spec, rows, progress)
        progress.close()
        _check(name, failed, len(ids))
        kept = scored.to_arrow()
        shards.write_named(kept, folder, stem)
    frame = pl.from_arrow(kept)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _stem(spec: ModelSpec, ids: Sequence[str]) -> str:
    """Named by the model and the rows, whose ids are made of what they say."""
    return shards.content_hash([likelihood.VERSION, identity(spec), list(ids)])[:16]


def _asked(
    workspace: Workspace, spec: ModelSpec, rows: pa.Table, progress: Progress
) -> tuple[pl.DataFrame, dict[str, str]]:
    """Scores from the store, and from the model where it has none; reasons of the failed."""
    frames, failed = [pl.DataFrame(schema=likelihood.COLUMNS)], {}
    with engines() as opened:
        recorders = opened.recorders(spec, workspace.store, progress.advance)
        buckets = by_store_bucket(lambda _: rows, 1)
        for _, (lines, reasons) in score_buckets(recorders, buckets, ASKED, progress.advance):
            frames.append(lines)
            failed.update(reasons)
    return pl.concat(frames).select("id", "logprob_mean").sort("id"), failed


def _check(name: str, failed: dict[str, str], total: int) -> None:
    if not failed:
        return
    shown = ", ".join(f"{row} ({reason})" for row, reason in sorted(failed.items())[:SHOWN])
    raise ValueError(
        f"reference model {name!r} has no score for {len(failed):,} of {total:,} training rows, "
        f"first {shown}: raise models.{name}.max_length or lower training.options.max_length for "
        "rows that are too_long, else name another reference"
    )
