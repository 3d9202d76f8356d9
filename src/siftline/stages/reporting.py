"""Gathers what a recipe's run left into the HTML report and the numbers beside it.

What a fine-tuned model finds new in the pool, for the report.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline import __version__
from siftline.ingest.pool import COUNTED, Pool, notes_of, reading_of
from siftline.kernels.draws import uniforms
from siftline.recipe.kinds import Stage
from siftline.recipe.parse import Recipe
from siftline.report.page import (
    CALIBRATION,
    CANARIES,
    NOVELTY,
    Histogram,
    Report,
    pick_examples,
    render,
)
from siftline.rows import schema, shards
from siftline.rows.ledger import KEPT, StageOutput
from siftline.rows.verified import (
    AlteredError,
    UnhashedError,
    content_hash,
    file_hash,
    read_hashed,
    with_hash,
)
from siftline.scoring.measures.contrast import Contrast, novel_clusters
from siftline.stages.arms import Arm
from siftline.stages.context import Context
from siftline.stages.models import model_spec, role_engine
from siftline.stages.publish import (
    EXCERPT,
    final_context,
    funnel,
    newest,
    removed_rows,
    stage_count,
)
from siftline.stages.rejection_sampling.difficulty import level_of
from siftline.stages.run import outputs
from siftline.stages.scorers import quality, score_versions, scorer_table
from siftline.stages.scores import likelihood_table, trimmed_note
from siftline.workspace import Workspace

TOP = 0.01
"""Newest share of the pool that is clustered."""
LEAST = 20
"""Rows that are clustered where the share would be fewer."""
ORDINARY = 2000
"""Other rows, drawn by hash, whose words name nothing."""
NOVELTY_EXCERPT = 160


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
    examples = [texts[ids[0]][:NOVELTY_EXCERPT] for ids in clusters["exemplars"].to_list()]
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


VERSION = 1
"""Raise it when the page of equal facts changes: then it is drawn anew."""
LEVELS = 5
MAP_POINTS = 4000
"""Prompts drawn on the cluster map; more only cover each other."""


def write_report(
    workspace: Workspace,
    recipe: Recipe,
    accuracy: pl.DataFrame | None,
    arms: list[Arm],
    planted: pl.DataFrame | None = None,
    suffix: str = "",
) -> tuple[Path, dict[str, Any]]:
    """Writes `report.html` and `report.json` for the newest version of a recipe.

    Args:
        workspace: The root.
        recipe: The recipe.
        accuracy: Lines of `evaluation.evaluate_arms`, or None where the recipe has no evaluation.
        arms: Trained arms.
        planted: What a generator planted and what was caught; columns of `report.PLANTED`.
        suffix: Added to the file names, so that an audited page leaves the asset's alone.

    Returns:
        The page's path, and the numbers.
    """
    done = outputs(workspace, recipe)
    version = newest(workspace, recipe).name
    page_file = workspace.report(recipe.name) / f"{version}{suffix}.html"
    inputs, trims = _inputs(workspace, recipe), _trimmed(workspace, recipe, arms)
    made_of = content_hash(
        [
            VERSION,
            inputs,
            trims,
            __version__,
            recipe.hash,
            {stage.name: [output.manifest.version, output.facts] for stage, output in done},
            score_versions(workspace, recipe),
            accuracy.to_dicts() if accuracy is not None else None,
            [arm.folder.name for arm in arms],
            planted.to_dicts() if planted is not None else None,
        ]
    )
    found = _written(page_file, made_of)
    if found is not None:
        return page_file, found
    context = final_context(workspace, recipe, done)
    notes = (*_inputs_said(inputs), *trims, *_notes(done, accuracy))
    page = render(
        Report(
            recipe=recipe.name,
            version=version,
            model=recipe.roles["target"],
            ran=_ran(recipe),
            funnel=tuple(stage_count(stage, output) for stage, output in done),
            scores=(*_histograms(done), *_quality(context)),
            clusters=_cluster_map(context),
            difficulty=_difficulty(context),
            curves=_curves(arms),
            accuracy=accuracy,
            planted=planted,
            canaries=_canaries(done),
            novelty=novelty(context),
            calibration=_calibration(done),
            examples=_examples(context),
            notes=notes,
        )
    )
    shards.write_text(page_file, page)
    numbers: dict[str, Any] = {
        "recipe": recipe.name,
        "version": version,
        "inputs": inputs,
        "rows": funnel(done),
        "facts": {stage.name: output.facts for stage, output in done},
        "accuracy": accuracy.to_dicts() if accuracy is not None else None,
        "notes": list(notes),
        "made_of": made_of,
        "page": file_hash(page_file),
    }
    shards.write_json(page_file.with_suffix(".json"), with_hash(numbers))
    return page_file, numbers


def _written(page: Path, made_of: str) -> dict[str, Any] | None:
    """The numbers of a page that was made of the same things; None where there is none.

    A damaged one is no error: it is written again.
    """
    beside = page.with_suffix(".json")
    if not (page.exists() and beside.exists()):
        return None
    try:
        numbers = read_hashed(beside, "a report's numbers")
    except (AlteredError, UnhashedError):
        return None
    page_hash = file_hash(page)
    return (
        numbers if (numbers.get("made_of"), numbers.get("page")) == (made_of, page_hash) else None
    )


def _inputs(workspace: Workspace, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What became of the input rows of the pool and of each set, by its name."""
    names = [recipe.pool.name, *(spec.name for _, spec in recipe.sets.items())]
    found = {name: Pool(workspace.pool(name)).manifest.info for name in names}
    return {
        name: {
            **{key: info[key] for key in COUNTED if key in info},
            **reading_of(info, recipe.columns_read(name)),
        }
        for name, info in found.items()
    }


def _inputs_said(inputs: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """The same in words, as far as it is not plain."""
    return tuple(f"pool {name}: {line}" for name, info in inputs.items() for line in notes_of(info))


def _trimmed(workspace: Workspace, recipe: Recipe, arms: list[Arm]) -> list[str]:
    """Responses that lost outer white space to the target's template, scored and trained on."""
    notes = []
    folder = workspace.scores(recipe.pool.name, recipe.roles["target"], "likelihood")
    if (folder / "manifest.json").exists():
        pool, spec = Pool(workspace.pool(recipe.pool.name)), model_spec(workspace, recipe, "target")
        table = likelihood_table(folder, pool, spec, recipe.likelihood).found()
        said = None if table is None else trimmed_note(table.info)
        notes += [] if said is None else [f"{said}."]
    most = {name: max(a.trimmed for a in arms if a.arm == name) for name in {a.arm for a in arms}}
    notes += [
        f"Arm {name}: the chat template takes white space off the ends of {n:,} responses."
        for name, n in sorted(most.items())
        if n
    ]
    return notes


def _canaries(done: list[tuple[Stage, StageOutput]]) -> pl.DataFrame | None:
    lines = [
        {"stage": stage.name, **{name: line[name] for name in CANARIES if name != "stage"}}
        for stage, output in done
        for line in output.facts.get("canaries", [])
    ]
    return pl.DataFrame(lines, schema=CANARIES) if lines else None


def _calibration(done: list[tuple[Stage, StageOutput]]) -> pl.DataFrame | None:
    """Bins of the confidence gates: of dev, cross-fitted, and of rows whose truth is known."""
    lines = [
        {"stage": f"{stage.name}{of}", **bin_}
        for stage, output in done
        for name, of in (("dev", " on dev, cross-fitted"), ("calibration", ""))
        if output.facts.get(name, {}).get("rows")
        for bin_ in output.facts[name]["bins"]
    ]
    return pl.DataFrame(lines, schema=CALIBRATION) if lines else None


def _ran(recipe: Recipe) -> tuple[tuple[str, str], ...]:
    lines = [("siftline", __version__), ("seed", str(recipe.seed))]
    for role in ("target", "sampler", "embedder"):
        dtype = recipe.model(role).spec.dtype
        lines.append((f"{role} engine", f"{role_engine(recipe, role)}, {dtype}"))
    return tuple(lines)


def _notes(done: list[tuple[Stage, StageOutput]], accuracy: pl.DataFrame | None) -> tuple[str, ...]:
    notes = []
    for stage, output in done:
        facts = output.facts
        if facts.get("vacuous"):
            notes.append(f"{stage.name} was vacuous: there was nothing to choose.")
        notes += stage.of.notes(stage, facts)
        if facts.get("shortfall"):
            notes.append(f"{stage.name} fell short of the budget: {facts['shortfall']}.")
        notes += _left_notes(stage.name, output)
    if accuracy is not None:
        floor = accuracy.filter((pl.col("level") == "all") & pl.col("at_floor").fill_null(False))
        notes += [
            f"Arm {arm} is at the floor: its accuracy can't be told from guessing."
            for arm in floor["arm"].to_list()
        ]
        notes += _forgotten(accuracy)
    return tuple(notes)


def _left_notes(name: str, output: StageOutput) -> list[str]:
    """What the next run tries again."""
    failed, unanswered = output.accounting.failed, output.facts.get("unanswered")
    notes = [f"{name}: {failed} rows failed, tried next run."] if failed else []
    if unanswered:
        notes.append(f"{name}: {unanswered} questions got no answer, asked again next run.")
    return notes


def _forgotten(accuracy: pl.DataFrame) -> list[str]:
    """What each arm lost or gained on tasks the base model could do before."""
    if "change" not in accuracy.columns:
        return []
    return [
        f"Arm {line['arm']} on {line['level']}: {100 * line['accuracy']:.1f} %, "
        f"{100 * line['change']:+.1f} points against the base model "
        f"({100 * line['change_low']:+.1f} to {100 * line['change_high']:+.1f})."
        for line in accuracy.filter(pl.col("change").is_not_null()).to_dicts()
    ]


def _histograms(done: list[tuple[Stage, StageOutput]]) -> tuple[Histogram, ...]:
    found = []
    for stage, output in done:
        if stage.scope != "all":
            continue
        drawn, table = stage.of.histogram, output.table(stage.kind)
        if drawn is None or table is None:
            continue
        column, label = drawn
        threshold = output.facts.get("threshold")
        lines = () if threshold is None else (float(threshold),)
        found.append(Histogram(label, stage.name, table[column].drop_nulls().to_numpy(), lines))
    return tuple(found)


def _quality(context: Context) -> list[Histogram]:
    """Quality scores of the rows that stayed."""
    return [
        Histogram(name, "curated", quality(context, name)["value"].to_numpy())
        for name in context.recipe.scorers
    ]


def _cluster_map(context: Context) -> pl.DataFrame | None:
    output = context.output("diversity")
    table = output.table("clusters") if output else None
    if table is None:
        return None
    last = context.before[-1][1].all_decisions().filter(pl.col("outcome") == KEPT)
    kept = set(last["id"].str.slice(0, schema.HALF_ID).to_list())
    u = uniforms(context.recipe.seed, "map", table["prompt_id"].to_list())
    drawn = table.with_columns(pl.Series("u", np.asarray(u))).sort("u").head(MAP_POINTS)
    return drawn.with_columns(pl.col("prompt_id").is_in(list(kept)).alias("chosen")).cast(
        {"x": pl.Float64, "y": pl.Float64, "cluster": pl.Int64}
    )


def _difficulty(context: Context) -> pl.DataFrame | None:
    """Rows by difficulty level, before the budget was spent and after."""
    table = context.side_table("difficulty")
    if table is None:
        return None
    measured = dict(table.select("prompt_id", "difficulty").iter_rows())

    def counts(ids: list[str]) -> np.ndarray:
        values = np.array([measured.get(i[: schema.HALF_ID], np.nan) for i in ids], np.float64)
        levels = level_of(np.where(np.isnan(values), np.nan, values), LEVELS)
        return np.bincount(levels, minlength=LEVELS + 1)[1:]

    last = context.before[-1][1].all_decisions()
    before, after = (
        counts(last["id"].to_list()),
        counts(last.filter(pl.col("outcome") == KEPT)["id"].to_list()),
    )
    edges = [f"{i / LEVELS:.1f}-{(i + 1) / LEVELS:.1f}" for i in range(LEVELS)]
    return pl.DataFrame({"level": edges, "before": before, "after": after}).cast(
        {"before": pl.Int64, "after": pl.Int64}
    )


def _curves(arms: list[Arm]) -> pl.DataFrame | None:
    if not arms:
        return None
    first = min(arm.seed for arm in arms)
    return pl.concat(
        arm.curve.select(
            pl.lit(arm.arm).alias("arm"), pl.col("step").cast(pl.Int64), pl.col("loss")
        )
        for arm in arms
        if arm.seed == first
    )


def _examples(context: Context) -> pl.DataFrame:
    removed = removed_rows(context)
    wanted = set(removed["matched_id"].drop_nulls().to_list())
    matched = []
    for bucket in context.buckets:
        tables = [context.pool.rows(bucket)]
        tables += [o.added(bucket).select(schema.ROW.names) for _, o in context.before]
        rows = pa.concat_tables(t.cast(schema.ROW) for t in tables)
        view = schema.text_view(rows).filter(pl.col("id").is_in(list(wanted)))
        matched.append(
            view.select("id", *(pl.col(c).str.slice(0, EXCERPT) for c in ("prompt", "response")))
        )
    return pick_examples(removed, pl.concat(matched), seed=context.recipe.seed)
