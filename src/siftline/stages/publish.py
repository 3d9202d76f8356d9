"""The curated version: rows that every stage kept, with their scores and the whole ledger."""

from typing import Any

import polars as pl
import pyarrow as pa

from siftline import __version__
from siftline.ingest.pool import Pool
from siftline.recipe.kinds import Stage
from siftline.recipe.parse import Recipe
from siftline.rows import schema
from siftline.rows.card import CardInfo, StageCount
from siftline.rows.curated import Published, publish, published_before
from siftline.rows.ledger import REMOVED, StageOutput, reasons
from siftline.stages.context import Context
from siftline.stages.models import Engines
from siftline.stages.run import outputs
from siftline.stages.sample_bank import MEANINGS, sample_bank
from siftline.stages.scorers import quality, score_versions
from siftline.workspace import Workspace

EXCERPT = 240
"""Characters of prompt and response that a removed row is shown with."""

COLUMNS = {
    "sift_prompt_id": "hash of everything before the response; equal for alternatives",
    "sift_source": "where the row came from",
    "sift_origin": "null for pool rows, else the stage and the draw or fold that made the row",
    "sift_parent_id": "row that an added row descends from",
    "sift_answer": "reference answer the response was held against",
    "sift_copies": "identical input rows that collapsed into this one",
    "sift_n_tokens": "loss tokens of the response under the target model's tokenizer",
    "sift_logprob_mean": "mean log-probability of the response under the target model, nats",
    "sift_perplexity": "exp(-sift_logprob_mean)",
    "sift_confidence": "probability of a right answer, or the weighted mean of the parts of "
    "confidence where dev could not tell it; null for corrected rows",
    "sift_cluster": "cluster of the prompt",
    "sift_difficulty": "1 - pass rate on the prompt, of the model that set its target",
}


def final_context(
    workspace: Workspace, recipe: Recipe, done: list[tuple[Stage, StageOutput]]
) -> Context:
    """A context after the last stage, to read the rows that stayed."""
    pool = Pool(workspace.pool(recipe.pool.name))
    return Context(workspace, recipe, done[-1][0], pool, done, Engines(), lambda line: None)


def publish_curated(workspace: Workspace, recipe: Recipe) -> Published:
    """Publishes the rows that every stage kept; the same rows again touch nothing."""
    done = outputs(workspace, recipe)
    context = final_context(workspace, recipe, done)
    identity = {
        "recipe": recipe.name,
        "recipe_hash": recipe.hash,
        "pool": context.pool.version,
        "stages": {stage.name: output.manifest.version for stage, output in done},
        "scores": score_versions(workspace, recipe),
        "siftline": __version__,
    }
    found = published_before(workspace.curated(recipe.name), identity)
    if found is not None:
        return found
    card = CardInfo(
        name=recipe.name,
        license=recipe.card.license,
        description=recipe.card.description,
        language=recipe.card.language,
        tags=recipe.card.tags,
        how=tuple(f"{stage.name}: {stage.kind}, seed {recipe.seed}" for stage, _ in done),
        columns=tuple({**COLUMNS, **_scorer_columns(recipe)}.items()),
        funnel=tuple(stage_count(stage, output) for stage, output in done),
        configs=tuple(MEANINGS.items()),
    )
    return publish(
        (kept_rows(context, bucket) for bucket in context.buckets),
        scores(context),
        removed_rows(context),
        root=workspace.curated(recipe.name),
        seed=recipe.seed,
        identity=identity,
        card=card,
        configs=sample_bank(context),
    )


def _scorer_columns(recipe: Recipe) -> dict[str, str]:
    """What the columns of the recipe's quality scorers mean."""
    return {
        f"sift_score_{name}": f"{type(config).__name__.lower()} score; null for added rows"
        for name, config in recipe.scorers.items()
    }


def stage_count(stage: Stage, output: StageOutput) -> StageCount:
    """One line of the funnel."""
    counts = output.accounting
    return StageCount(
        stage=stage.name,
        kind=stage.of.role,
        rows_in=counts.rows_in,
        added=counts.added,
        kept=counts.kept,
        removed=counts.removed,
        failed=counts.failed,
        reasons=tuple(reasons(output.all_decisions()).items()),
        vacuous=bool(output.facts.get("vacuous")),
    )


def kept_rows(context: Context, bucket: int) -> pa.Table:
    """Rows of one bucket that every stage kept, columns of `schema.ROW`."""
    return context.rows(bucket).select(schema.ROW.names).cast(schema.ROW)


def scores(context: Context) -> pl.DataFrame:
    """The `sift_` columns of the rows that stayed."""
    narrow = []
    for bucket in context.buckets:
        names = ["id", "prompt_id", "source", "origin", "parent_id", "answer", "copies"]
        frame = pl.from_arrow(context.rows(bucket).select(names))
        assert isinstance(frame, pl.DataFrame)
        narrow.append(frame)
    frame = pl.concat(narrow)
    likelihood = context.side_table("likelihood")
    if likelihood is not None:
        likelihood = _all_likelihoods(context)
        frame = frame.join(likelihood, on="id", how="left")
    confidence = _stacked(context, "confidence", ["id", "confidence"])
    if confidence is not None:
        frame = frame.join(confidence, on="id", how="left")
    diversity = context.output("diversity")
    clusters = diversity.table("clusters") if diversity else None
    for table, name in ((clusters, "cluster"), (context.side_table("difficulty"), "difficulty")):
        if table is not None:
            frame = frame.join(table.select("prompt_id", name), on="prompt_id", how="left")
    for name in context.recipe.scorers:
        values = quality(context, name).select("id", pl.col("value").alias(f"score_{name}"))
        frame = frame.join(values, on="id", how="left")
    return frame.rename({name: f"sift_{name}" for name in frame.columns if name != "id"})


def _stacked(context: Context, name: str, columns: list[str]) -> pl.DataFrame | None:
    """The newest line per id over all side tables of a name."""
    tables = [output.table(name) for _, output in context.before]
    found = [table.select(columns) for table in tables if table is not None]
    if not found:
        return None
    return pl.concat(found).unique("id", keep="last", maintain_order=True)


def _all_likelihoods(context: Context) -> pl.DataFrame:
    stacked = _stacked(context, "likelihood", ["id", "n_tokens", "logprob_mean", "perplexity"])
    assert stacked is not None
    return stacked


def removed_rows(context: Context) -> pl.DataFrame:
    """Every row that a stage removed, with the reason and excerpts."""
    frames = []
    for bucket in context.buckets:
        texts = _texts(context, bucket)
        for stage, output in context.before:
            gone = output.decisions(bucket).filter(pl.col("outcome") == REMOVED)
            marked = gone.with_columns(
                pl.lit(stage.name).alias("stage"), pl.lit(stage.kind).alias("kind")
            )
            frames.append(marked.join(texts, on="id", how="left"))
    columns = ["id", "stage", "kind", "reason", "value", "threshold", "matched_id"]
    return pl.concat(frames).select([*columns, "prompt", "response"])


def _texts(context: Context, bucket: int) -> pl.DataFrame:
    """Excerpts of all rows of one bucket, kept or not."""
    tables = [context.pool.rows(bucket)]
    tables += [
        output.added(bucket).select(schema.ROW.names).cast(schema.ROW)
        for _, output in context.before
    ]
    view = schema.text_view(pa.concat_tables(tables))
    return view.select("id", *(pl.col(c).str.slice(0, EXCERPT) for c in ("prompt", "response")))


def funnel(done: list[tuple[Stage, StageOutput]]) -> dict[str, dict[str, Any]]:
    """Row counts of every stage under its name, as the last line of a run shows them."""
    return {stage.name: output.accounting.as_json() for stage, output in done}
