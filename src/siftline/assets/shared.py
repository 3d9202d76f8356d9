"""Assets that recipes share: inputs, pools, evaluation sets, models trained here.

Score tables of a pool: likelihood under the target model, and the recipe's quality scorers.
"""

import importlib
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.definitions.data_version import DATA_VERSION_TAG

from siftline.assets import step as asking
from siftline.assets import step as keys
from siftline.assets.metadata import bounded, column_schema
from siftline.assets.step import Siftline
from siftline.ingest.files import file_states
from siftline.ingest.pool import Pool, PoolSpec, build_pool, notes_of
from siftline.progress import Progress
from siftline.recipe.parse import Recipe, expand, expand_pool
from siftline.rows import schema, shards
from siftline.rows.shards import Manifest
from siftline.rows.verified import content_hash, file_hash
from siftline.scoring.fingerprint import confirm_files
from siftline.scoring.measures.scorers import models_of
from siftline.stages.models import corpus_file, engines, model_spec, trained_folder
from siftline.stages.scorers import score_quality, scorer_model, scorer_table
from siftline.stages.scores import TABLE, Observe, likelihood_table, reasons_of, score_pool
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
    assert recipe.inputs is not None

    @dg.asset(
        key=keys.inputs(recipe),
        group_name=recipe.name,
        kinds={"json", "python"},
        code_version=_short([recipe.inputs.generator, recipe.inputs.args, recipe.seed]),
    )
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


def _short(plain: Any) -> str:
    """A code version: what the recipe says, in 12 hex digits."""
    return content_hash(plain)[:12]


def _from_outside(recipe: Recipe, spec: PoolSpec) -> bool:
    """Whether a pool reads files that no asset of the recipe writes."""
    return recipe.inputs is None or any("{inputs}" not in s.path for s in spec.inputs)


def files_state(workspace: Workspace, recipe: Recipe, name: str) -> tuple[str, int, int]:
    """What a pool's or set's files are now, by their paths, sizes and times.

    Returns:
        Hash, number of files, bytes.

    Raises:
        ValueError: if a source matches no file.
    """
    states = file_states(expand_pool(recipe.pool_named(name), workspace.inputs(recipe.name)).inputs)
    return content_hash(states), len(states), sum(size or 0 for _, size, _ in states)


def files_asset(recipe: Recipe, spec: PoolSpec) -> dg.SourceAsset | None:
    """The files that a pool is read from, to be observed; None where an asset writes them."""
    if not _from_outside(recipe, spec):
        return None
    paths = "\n".join(f"- `{source.path}`" for source in spec.inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)  # one for each pool at every load
        observable = dg.observable_source_asset(
            key=keys.files(spec),
            group_name=recipe.name,
            description=f"What {spec.name} is read from:\n\n{paths}",
        )

    def files(context: dg.AssetExecutionContext, siftline: Siftline) -> dg.ObserveResult:
        """Paths, sizes and times of the files."""
        state, count, size = files_state(
            siftline.workspace, siftline.shared(recipe.name, spec.name), spec.name
        )
        return dg.ObserveResult(
            data_version=dg.DataVersion(state), metadata={"files": count, "bytes": size}
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        made = observable(files)
    assert isinstance(made, dg.SourceAsset)
    return made


def observe_files(
    instance: dg.DagsterInstance, workspace: Workspace, recipe: Recipe, name: str
) -> None:
    """Records what a pool's files are now, unless that was the last thing seen.

    A source that matches no file is left to the pool's own step, which says so.
    """
    spec = recipe.pool_named(name)
    if not _from_outside(recipe, spec):
        return
    try:
        state, count, size = files_state(workspace, recipe, name)
    except ValueError:
        return
    seen = instance.fetch_observations(keys.files(spec), limit=1).records
    last = seen[0].asset_observation if seen else None
    if last is not None and (last.tags or {}).get(DATA_VERSION_TAG) == state:
        return
    instance.report_runless_asset_event(
        dg.AssetObservation(
            keys.files(spec),
            metadata={"files": count, "bytes": size},
            tags={DATA_VERSION_TAG: state},
        )
    )


def build(workspace: Workspace, recipe: Recipe, name: str, emit: Callable[[str], None]) -> Pool:
    """Builds the pool or evaluation set of a name."""
    spec = expand_pool(recipe.pool_named(name), workspace.inputs(recipe.name))
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
    outside = _from_outside(recipe, spec)
    if outside:
        deps.append(keys.files(spec))
    key = keys.pool(spec)
    plain = {k: v for k, v in asdict(spec).items() if k != "buckets"}
    checks = [dg.AssetCheckSpec("readable", asset=key, blocking=True)]

    @dg.asset(
        key=key,
        deps=deps,
        group_name=recipe.name,
        kinds=keys.KINDS,
        tags={"siftline/role": role},
        check_specs=checks,
        op_tags=asking.reading(recipe, spec.name) if outside else None,
        code_version=_short([plain, sorted(recipe.columns_read(spec.name))]),
    )
    def pool(context: dg.AssetExecutionContext, siftline: Siftline) -> dg.MaterializeResult:
        """Rows by id: read, validated, canonical, identical ones collapsed."""
        loaded = siftline.shared(recipe.name, spec.name)
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
    model = recipe.models[name]

    @dg.asset(
        key=keys.model(name),
        code_version=_short([asdict(model), recipe.seed]),
        deps=deps,
        group_name=recipe.name,
        kinds={"torch", "safetensors"},
        pool="gpu",
        op_tags=asking.tags(recipe, "base", name),
    )
    def base(context: dg.AssetExecutionContext, siftline: Siftline) -> dg.MaterializeResult:
        """A small causal model trained from the recipe's corpus."""
        from siftline.scoring.fingerprint import directory_digest

        loaded = siftline.shared(recipe.name, name)
        folder = train_base(siftline.workspace, loaded, name, context.log.info)
        return dg.MaterializeResult(
            metadata={"path": dg.MetadataValue.path(str(folder))},
            data_version=dg.DataVersion(directory_digest(folder)),
        )

    return base


Emit = Callable[[str], None]


def failed_check(key: dg.AssetKey) -> dg.AssetCheckSpec:
    """The blocking check of every score table."""
    return dg.AssetCheckSpec(
        "failed_rows",
        asset=key,
        blocking=True,
        description="rows without a score stay below the recipe's rate",
    )


def observer(context: dg.AssetExecutionContext, key: dg.AssetKey) -> Observe:
    """Records each finished bucket on the asset's page while the step goes on."""
    began = time.monotonic()
    done = 0

    def observe(bucket: int, numbers: dict[str, Any]) -> None:
        nonlocal done
        done += numbers["scored"] + numbers["failed"]
        rate = done / max(time.monotonic() - began, 1e-9)
        shown = {"bucket": bucket, **numbers, "rows_so_far": done, "rows_per_second": rate}
        context.log_event(dg.AssetObservation(asset_key=key, metadata=shown))

    return observe


def result(
    key: dg.AssetKey,
    recipe: Recipe,
    folder: Path,
    manifest: Manifest,
    fresh: bool,
    shown: dict[str, Any],
) -> dg.MaterializeResult:
    """The materialization of a score table."""
    info = manifest.info
    rows = info["scored"] + info["failed"]
    return dg.MaterializeResult(
        metadata={
            "dagster/row_count": info["scored"],
            "failed": info["failed"],
            "coverage": info["scored"] / max(1, rows),
            "forward_rows_computed": info["computed"] if fresh else 0,
            "forward_rows_found": info["found"],
            "tokens_computed": info["tokens"] if fresh else 0,
            "computed": fresh,
            "failed_reasons": dg.MetadataValue.json(reasons_of(folder, manifest)),
            **shown,
        },
        data_version=dg.DataVersion(manifest.version),
        check_results=[
            bounded(
                key,
                "failed_rows",
                info["failed"],
                rows,
                "bounds.max_failed",
                recipe.bounds.max_failed,
                "they are asked again at the next run; mend what their reasons name, or raise the "
                "bound",
                reasons_of(folder, manifest),
            )
        ],
    )


def score(
    workspace: Workspace,
    recipe: Recipe,
    emit: Emit,
    observe: Observe = lambda bucket, numbers: None,
) -> tuple[Manifest, bool]:
    """Scores a recipe's pool under its target model."""
    pool = Pool(workspace.pool(recipe.pool.name))
    folder = workspace.scores(recipe.pool.name, recipe.roles["target"], "likelihood")
    spec, asked = model_spec(workspace, recipe, "target"), recipe.likelihood
    table = likelihood_table(folder, pool, spec, asked)
    with engines() as opened:
        return score_pool(table, pool, spec, asked, workspace.store, opened, emit, observe)


def likelihood_asset(recipe: Recipe) -> dg.AssetsDefinition:
    """The likelihood table of a pool under a recipe's target model."""
    deps = [keys.pool(recipe.pool)]
    if recipe.model("target").pretrain is not None:
        deps.append(keys.model(recipe.roles["target"]))
    engine = recipe.model("target").spec.engine
    key = keys.likelihood(recipe)

    @dg.asset(
        key=key,
        deps=deps,
        group_name=recipe.name,
        kinds={"parquet", engine},
        pool="gpu",
        op_tags=asking.tags(recipe, "likelihood", recipe.pool.name),
        check_specs=[failed_check(key)],
        code_version=content_hash([asdict(recipe.model("target")), asdict(recipe.likelihood)])[:12],
    )
    def likelihood(context: dg.AssetExecutionContext, siftline: Siftline) -> dg.MaterializeResult:
        """Mean log-probability of every response, with and without its prompt."""
        loaded = siftline.shared(recipe.name)
        observe = observer(context, key)
        manifest, fresh = score(siftline.workspace, loaded, context.log.info, observe)
        folder = siftline.workspace.scores(loaded.pool.name, loaded.roles["target"], "likelihood")
        shown = {
            "dagster/column_schema": column_schema(TABLE),
            "engine": engine,
            "trimmed": manifest.info.get("trimmed", 0),
        }
        return result(key, loaded, folder, manifest, fresh, shown)

    return likelihood


def scorer_asset(recipe: Recipe, name: str) -> dg.AssetsDefinition:
    """The table of one quality scorer on a recipe's pool."""
    config, key = recipe.scorers[name], keys.scorer(recipe, name)
    models = models_of(config)
    trained = [m for m in models if recipe.models[m].pretrain is not None]
    said = content_hash([asdict(config), [asdict(recipe.models[m]) for m in models]])

    @dg.asset(
        key=key,
        deps=[keys.pool(recipe.pool), *(keys.model(m) for m in trained)],
        group_name=recipe.name,
        kinds={"parquet", *(recipe.models[m].spec.engine for m in models)},
        description=(type(config).__doc__ or "").split("\n")[0],
        pool="gpu" if models else None,
        op_tags=asking.tags(recipe, "scorer", name) if models else None,
        check_specs=[failed_check(key)],
        code_version=said[:12],
    )
    def quality(context: dg.AssetExecutionContext, siftline: Siftline) -> dg.MaterializeResult:
        loaded, workspace = siftline.shared(recipe.name), siftline.workspace
        with engines() as opened:
            found = score_quality(
                workspace, loaded, name, opened, context.log.info, observer(context, key)
            )
        table = scorer_table(workspace, loaded, name)
        shown = {
            "dagster/column_schema": column_schema(table.schema),
            "scorer": type(config).__name__,
            "model": scorer_model(loaded, name),
        }
        return result(key, loaded, table.folder, found.manifest, found.fresh, shown)

    return quality
