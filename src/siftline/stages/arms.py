"""Training arms: the curated rows against random rows at equal cost.

Equal means equal loss tokens, optimizer steps and hyper-parameters; `arm_rows` says which rows.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.ingest.pool import Pool
from siftline.progress import Progress
from siftline.recipe.parse import Recipe
from siftline.rows import shards
from siftline.rows.published import read_config, read_version
from siftline.rows.verified import content_hash, read_hashed, with_hash
from siftline.scoring.fingerprint import directory_digest
from siftline.stages.arm_rows import COLUMNS, ArmRows, Draw, drawn, offer
from siftline.stages.models import identity, model_spec, named_spec
from siftline.stages.publish import newest
from siftline.stages.references import reference_scores
from siftline.training.budget import tokenize_rows
from siftline.training.finetune import INDIFFERENT, FineTune, TrainResult, finetune, finished
from siftline.training.material import with_source
from siftline.workspace import Workspace

BASE, CURATED = "base", "curated"
VERSION = 1
"""Raise it when the same settings train other arms; it names the list of those trained."""


@dataclass(frozen=True)
class Arm:
    """One trained model: which rows, which seed, where it lies, and its loss curve.

    `trimmed` counts the rows whose response lost outer white space to the chat template.
    """

    arm: str
    seed: int
    folder: Path
    curve: pl.DataFrame
    loss_tokens: int
    steps: int
    trimmed: int = 0


def _newest(workspace: Workspace, recipe: Recipe) -> tuple[Path, dict[str, Any]]:
    """Folder of the newest version of these settings, and its manifest.

    Raises:
        ValueError: if nothing was published, or by other settings.
    """
    folder = newest(workspace, recipe)
    manifest = read_version(folder)
    if manifest["identity"]["recipe_hash"] != recipe.hash:
        raise ValueError(
            f"{folder.name} of {recipe.name} was published by other settings: "
            "materialize the curated version again"
        )
    return folder, manifest


def curated_version(workspace: Workspace, recipe: Recipe) -> tuple[str, pa.Table]:
    """Name of the newest version of these settings, and its rows.

    Raises:
        ValueError: if nothing was published, or by other settings.
    """
    folder, manifest = _newest(workspace, recipe)
    table = with_source(pa.concat_tables(read_config(folder, manifest)))
    return folder.name, table.select([name for name in COLUMNS if name in table.column_names])


def dev_rows(workspace: Workspace, recipe: Recipe) -> pa.Table | None:
    """Rows of all dev sets, for the dev loss; None where the recipe has none."""
    pools = [Pool(workspace.pool(spec.name)) for spec in recipe.sets.dev]
    if not pools:
        return None
    rows = pa.concat_tables(pool.all_rows(COLUMNS) for pool in pools)
    ids = pl.Series(rows.column("id").to_pylist(), dtype=pl.String)
    return rows.filter(pa.array(ids.is_first_distinct().to_list()))


def _tokenizer(workspace: Workspace, recipe: Recipe) -> Any:
    from siftline.scoring.templates import load_tokenizer

    return load_tokenizer(model_spec(workspace, recipe, "target"))


def _record(workspace: Workspace, recipe: Recipe) -> Path:
    """Where a recipe's trained arms are listed, named by everything that decides them.

    The name of the curated version stands for the recipe and for what its stages decided.
    """
    training = recipe.training
    assert training is not None
    folder, _ = _newest(workspace, recipe)
    named = (recipe.roles["target"], recipe.roles.get("sampler", recipe.roles["target"]))
    made_of = [
        VERSION,
        folder.name,
        Pool(workspace.pool(recipe.pool.name)).version,
        [Pool(workspace.pool(spec.name)).version for spec in recipe.sets.dev],
        [identity(named_spec(workspace, recipe, name)) for name in (*named, *training.reference)],
    ]
    return workspace.model(f"{recipe.name}-arms-{content_hash(made_of)[:12]}.json")


def found_arms(workspace: Workspace, recipe: Recipe) -> list[Arm] | None:
    """The arms as they were trained before; None where one of them is to be trained.

    Raises:
        ValueError: if nothing was published with these settings.
    """
    record = _record(workspace, recipe)
    if not record.exists():
        return None
    found = []
    for line in read_hashed(record, "a list of trained arms")["arms"]:
        result = finished(workspace.model(line["folder"]))
        if result is None:
            return None
        found.append(_arm(line["arm"], line["seed"], result))
    return found


def arms_pending(workspace: Workspace, recipe: Recipe) -> bool:
    """Whether `train_arms` has anything to train."""
    return found_arms(workspace, recipe) is None


def train_arms(workspace: Workspace, recipe: Recipe, emit: Callable[[str], None]) -> list[Arm]:
    """Trains every arm with every seed; what was trained before is found."""
    found = found_arms(workspace, recipe)
    if found is not None:
        return found
    trained = _train_arms(workspace, recipe, emit)
    listed = [{"arm": a.arm, "seed": a.seed, "folder": a.folder.name} for a in trained]
    shards.write_json(_record(workspace, recipe), with_hash({"arms": listed}))
    return trained


def _train_arms(workspace: Workspace, recipe: Recipe, emit: Callable[[str], None]) -> list[Arm]:
    training = recipe.training
    assert training is not None
    version, curated = curated_version(workspace, recipe)
    published = ArmRows(curated, f"{recipe.name}/{version}")
    spec = model_spec(workspace, recipe, "target")
    tokenizer = _tokenizer(workspace, recipe)
    sized = tokenize_rows(curated, tokenizer, training.options.max_length)
    budget = int(np.sum(sized.loss_tokens))
    draw = Draw(tokenizer, training.options.max_length, budget)
    dev = dev_rows(workspace, recipe)
    passes = max(1, round(training.epochs * len(sized.ids) / training.options.batch_rows))
    options = replace(training.options, loss_tokens=round(budget * training.epochs), steps=passes)
    # Found once for all seeds: one of them asks the sampler.
    offered = {a: offer(workspace, recipe, a, emit) for a in training.arms if a != CURATED}
    runs: Iterable[tuple[int, str, ArmRows]] = (
        (seed, arm, drawn(offered[arm], arm, draw, seed) if arm != CURATED else published)
        for seed in training.seeds
        for arm in training.arms
    )
    references = None
    if training.reference:  # of all arms before the first hour of training
        runs = list(runs)
        learnt = [_trainable(given.rows, draw) for _, _, given in runs]
        references = reference_scores(workspace, recipe, learnt, emit)
    trained = []
    for seed, arm, given in runs:
        folder = arm_folder(
            workspace, recipe, arm, seed, given.rows, options, spec.path, spec.template, dev,
            references,
        )  # fmt: skip
        progress = Progress(f"model {arm} seed {seed}", passes, emit, "steps")
        result = finetune(
            Path(spec.path),
            given.rows,
            folder,
            options,
            seed=seed,
            dataset_version=given.name,
            template=spec.template,
            dev=dev,
            references=references,
            progress=progress.reach,
        )
        progress.close()
        trained.append(_arm(arm, seed, result))
    return trained


def _trainable(rows: pa.Table, draw: Draw) -> pa.Table:
    """The rows that training does not skip."""
    kept = tokenize_rows(rows, draw.tokenizer, draw.max_length).ids
    return rows.filter(pa.compute.is_in(rows["id"], pa.array(kept, pa.string())))


def _arm(arm: str, seed: int, result: TrainResult) -> Arm:
    trimmed = result.facts.get("trimmed", 0)
    return Arm(arm, seed, result.model_dir, result.curve, result.loss_tokens, result.steps, trimmed)


def arm_folder(
    workspace: Workspace,
    recipe: Recipe,
    arm: str,
    seed: int,
    rows: pa.Table,
    options: FineTune,
    base: str,
    template: str | None,
    dev: pa.Table | None,
    references: Mapping[str, float] | None,
) -> Path:
    """Where a run goes: named by everything that decides it, so no arm is trained over another."""
    ids = sorted(rows.column("id").to_pylist())
    watched = [] if dev is None else sorted(dev.column("id").to_pylist())
    decisive = {k: v for k, v in asdict(options).items() if k not in INDIFFERENT}
    made_of = [ids, decisive, seed, directory_digest(Path(base)), template, watched]
    if references is not None:
        made_of.append([references.get(identity) for identity in ids])
    key = content_hash(made_of)
    return workspace.model(f"{recipe.name}-{arm}-s{seed}-{key[:12]}")
