"""What a fine-tuned model finds new in the pool, for the report."""

import math

import polars as pl

from siftline import schema
from siftline.kernels.draws import uniforms
from siftline.recipe.parse import Recipe
from siftline.report import NOVELTY
from siftline.scoring.contrast import Contrast, novel_clusters
from siftline.stages.context import Context
from siftline.stages.scorers import scorer_table

TOP = 0.01
"""Newest share of the pool that is clustered."""
LEAST = 20
"""Rows that are clustered where the share would be fewer."""
ORDINARY = 2000
"""Other rows, drawn by hash, whose words name nothing."""
EXCERPT = 160


def contrast_name(recipe: Recipe) -> str | None:
    """The first contrast scorer of a recipe."""
    names = (name for name, config in recipe.scorers.items() if isinstance(config, Contrast))
    return next(names, None)


def novelty(context: Context) -> pl.DataFrame | None:
    """Clusters of the newest rows of the pool; columns of `report.NOVELTY`, newest first.

    None where the recipe has no contrast scorer.
    """
    name = contrast_name(context.recipe)
    if name is None:
        return None
    read = scorer_table(context.workspace, context.recipe, name).reader()
    assert read is not None, f"{name} was published without its table"
    scored = pl.concat([read(bucket).select("id", "value") for bucket in context.buckets])
    scored = scored.rename({"value": "contrast"}).sort(["contrast", "id"], descending=[True, False])
    if scored.is_empty():
        return pl.DataFrame(schema=NOVELTY)
    newest = min(scored.height, max(LEAST, math.ceil(TOP * scored.height)))
    rest = scored["id"][newest:].to_list()
    drawn = pl.DataFrame({"id": rest, "u": uniforms(context.recipe.seed, "novelty", rest)})
    ordinary = drawn.sort("u", "id")["id"].head(ORDINARY).to_list()
    texts = _texts(context, {*scored["id"].head(newest).to_list(), *ordinary})
    _, clusters = novel_clusters(
        scored, texts, top=newest / scored.height, seed=context.recipe.seed
    )
    examples = [texts[ids[0]][:EXCERPT] for ids in clusters["exemplars"].to_list()]
    return clusters.select(
        "name", "rows", contrast="contrast_mean", example=pl.Series(examples, dtype=pl.String)
    )


def _texts(context: Context, wanted: set[str]) -> dict[str, str]:
    """Prompt and response of rows of the pool, by id."""
    found: dict[str, str] = {}
    for bucket in context.buckets:
        view = schema.text_view(context.pool.rows(bucket)).filter(pl.col("id").is_in(list(wanted)))
        texts = view.select("id", text=pl.concat_str("prompt", "response", separator="\n"))
        found.update(dict(texts.iter_rows()))
    return found
