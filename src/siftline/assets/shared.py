"""Assets that recipes share: inputs, pools, evaluation sets, models trained here."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg

from siftline.assets import asking, keys
from siftline.assets.metadata import bounded, column_schema
from siftline.assets.resource import Siftline
from siftline.ingest.pool import Pool, PoolSpec, build_pool, notes_of
from siftline.progress import Progress
from siftline.recipe.parse import Recipe, expand, expand_pool
from siftline.rows import schema, shards
from siftline.rows.verified import content_hash, file_hash
from siftline.scoring.fingerprint import confirm_files
from siftline.stages.models import corpus_file, trained_folder
from siftline.workspace import Workspace


def _function(path: str) -> Callable[..., None]:
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"inputs.generator {path!r} can't be imported ({error}): use package.module:function"
        ) from error
    return found


def generate_inputs(workspace: Workspace, recipe: Recipe) -> tuple[Path, bool]:
    """Runs a recipe's generator, unless it ran with these arguments before.

    Returns:
        The folder of the input files, and whether they were written now.
    """
    assert recipe.inputs is not None
    out, truth = workspace.inputs(recipe.name), workspace.truth(recipe.name)
    args = {k: expand(v) if isinstance(v, str) else v for k, v in recipe.inputs.args.items()}
    asked = content_hash([recipe.inputs.generator, recipe.inputs.args, recipe.seed])
    mark = out / "generated.json"
    if mark.exists() and mark.read_text(encoding="utf-8").find(asked) >= 0:
        return out, False
    out.mkdir(parents=True, exist_ok=True)
    truth.mkdir(parents=True, exist_ok=True)
    _function(recipe.inputs.generator)(out, truth, seed=recipe.seed, **args)
    shards.write_json(mark, {"asked": asked})
    return out, True


def inputs_asset(recipe: Recipe) -> dg.AssetsDefinition:
    """The files of a recipe's generator."""

    @dg.asset(key=keys.inputs(recipe), group_name=recipe.name, kinds={"json", "python"})
    def generated(context: dg.AssetExecutionContext, siftline: Siftline) -> dg.MaterializeResult:
        """Raw input files, written by the recipe's generator."""
        out, fresh = generate_inputs(siftline.workspace, siftline.recipe(recipe.name))
        files = sorted(p for p in out.iterdir() if p.suffix in (".jsonl", ".json", ".csv"))
        sizes = {path.name: path.stat().st_size for path in files}
        return dg.MaterializeResult(
            metadata={"files": dg.MetadataValue.json(sizes), "computed": fresh},
            data_version=dg.DataVersion(content_hash({p.name: file_hash(p) for p in files})),
        )

    return generated


def build(workspace: Workspace, recipe: Recipe, name: str, emit: Callable[[str], None]) -> Pool:
    """Builds the pool or evaluation set of a name."""
    specs = {spec.name: spec for spec in (recipe.pool, *(s for _, s in recipe.sets.items()))}
    spec = expand_pool(specs[name], workspace.inputs(recipe.name))
    progress = Progress(f"pool {name}", 0, emit)
    read = recipe.columns_read(name)
    build_pool(workspace.pool(name), spec, progress.advance, read=read)
    progress.close()
    built = Pool(workspace.pool(name))
    for line in notes_of(built.manifest.info, read):
        emit(f"pool {name}: {line}")
    return built


def pool_asset(recipe: Recipe, spec: PoolSpec, role: str) -> dg.AssetsDefinition:
    """A pool (role train) or an evaluation set."""
    deps = [keys.inputs(recipe)] if recipe.inputs else []
    key = keys.pool(spec)
    checks = [dg.AssetCheckSpec("readable", asset=key, blocking=True)]

    @dg.asset(
        key=key,
        deps=deps,
        group_name=recipe.name,
        kinds=keys.KINDS,
        tags={"siftline/role": role},
        check_specs=checks,
    )
    def pool(context: dg.AssetExecutionContext, siftline: Siftline) -> dg.MaterializeResult:
        """Rows by id: read, validated, canonical, identical ones collapsed."""
        loaded = siftline.recipe(recipe.name)
        built = build(siftline.workspace, loaded, spec.name, context.log.info)
        info, reading = built.manifest.info, built.reading(loaded.columns_read(spec.name))
        read = info["provenance"] + info["quarantine"]
        return dg.MaterializeResult(
            metadata={
                "dagster/row_count": info["rows"],
                "dagster/column_schema": column_schema(schema.ROW),
                "input_rows": read,
                "quarantined": info["quarantine"],
                "rejected": info["rejected"],
                "collapsed": info["provenance"] - info["rows"] - info["rejected"],
                "set_aside": dg.MetadataValue.json(reading["set_aside"]),
                "quarantine_reasons": dg.MetadataValue.json(info["reasons"]),
                "repeated_keys": info["repeated_keys"],
                "contradicting_labels": info["contradicting_labels"],
                "buckets": built.buckets,
                "path": dg.MetadataValue.path(str(built.folder)),
            },
            data_version=dg.DataVersion(built.version),
            check_results=[
                bounded(
                    key,
                    "readable",
                    info["quarantine"],
                    read,
                    f"max_quarantine of {spec.name}",
                    spec.max_quarantine,
                    f"the table quarantine under {built.folder} has files, lines and reasons: mend "
                    "them, or raise the bound",
                    info["reasons"],
                    what="quarantined",
                )
            ],
        )

    return pool


def train_base(workspace: Workspace, recipe: Recipe, name: str, emit: Callable[[str], None]) -> Any:
    """Trains a model from text, unless the same was trained before; returns its folder."""
    from siftline.training.pretrain import pretrain, read_texts

    model = recipe.models[name]
    assert model.pretrain is not None
    folder = trained_folder(workspace, recipe, name)
    confirm_files(folder)
    if not (folder / "config.json").exists():
        progress = Progress(f"models/{name}", model.pretrain.steps, emit, "steps")
        corpus = corpus_file(workspace, recipe, model)
        with shards.building(folder) as unfinished:
            pretrain(read_texts([corpus]), model.pretrain, unfinished, progress.reach)
        progress.close()
    return folder


def model_asset(recipe: Recipe, name: str) -> dg.AssetsDefinition:
    """A model that is trained here from text."""
    deps = [keys.inputs(recipe)] if recipe.inputs else []

    @dg.asset(
        key=keys.model(name),
        deps=deps,
        group_name=recipe.name,
        kinds={"torch", "safetensors"},
        pool="gpu",
        op_tags=asking.tags(recipe, "base", name),
    )
    def base(context: dg.AssetExecutionContext, siftline: Siftline) -> dg.MaterializeResult:
        """A small causal model trained from the recipe's corpus."""
        from siftline.scoring.fingerprint import directory_digest

        loaded = siftline.recipe(recipe.name)
        folder = train_base(siftline.workspace, loaded, name, context.log.info)
        return dg.MaterializeResult(
            metadata={"path": dg.MetadataValue.path(str(folder))},
            data_version=dg.DataVersion(directory_digest(folder)),
        )

    return base
