"""Training arms: the curated rows against random rows at equal cost.

Equal means equal loss tokens, optimizer steps and hyper-parameters.

Reference scores of the rows that arms train on, for objective poft.

Which rows each training arm takes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from siftline.ingest.pool import Pool
from siftline.kernels.draws import hash64
from siftline.progress import Progress
from siftline.recipe.parse import Recipe
from siftline.rows import schema, shards
from siftline.rows.ledger import REMOVED
from siftline.rows.published import read_config, read_version
from siftline.rows.shards import no_rows
from siftline.rows.verified import content_hash, read_hashed, with_hash
from siftline.scoring.engines.base import ModelSpec
from siftline.scoring.fingerprint import directory_digest
from siftline.scoring.measures import likelihood
from siftline.scoring.measures.likelihood import Likelihood
from siftline.stages.context import by_store_bucket
from siftline.stages.models import engines, identity, model_spec, named_spec
from siftline.stages.publish import newest
from siftline.stages.run import outputs
from siftline.stages.scores import score_buckets
from siftline.training.finetune import INDIFFERENT, FineTune, TrainResult, finetune, finished
from siftline.training.material import with_source
from siftline.training.schedule import rows_for_budget, tokenize_rows
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
    return content_hash([likelihood.VERSION, identity(spec), list(ids)])[:16]


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


COLUMNS = ["id", "messages", "tools", "source"]
HYGIENE = ("duplicates", "decontamination")


@dataclass(frozen=True)
class ArmRows:
    """Rows of an arm, with the columns of `COLUMNS`, and what they are, for model cards."""

    rows: pa.Table
    name: str


@dataclass(frozen=True)
class Draw:
    """What random arms are drawn with.

    Attributes:
        tokenizer: Of the target model.
        max_length: Longest row in tokens.
        budget: Loss tokens of the curated version.
    """

    tokenizer: Any
    max_length: int
    budget: int


def rows_of_arm(
    workspace: Workspace,
    recipe: Recipe,
    arm: str,
    draw: Draw,
    seed: int,
    emit: Callable[[str], None] = lambda line: None,
) -> ArmRows:
    """Rows of an arm that is held against the curated one.

    Args:
        workspace: The root.
        recipe: The recipe, its stages run.
        arm: One of `sections.ARMS` but "curated".
        draw: Budget and lengths.
        seed: Of the training run; another seed draws other rows.
        emit: Takes lines of progress.
    """
    return drawn(offer(workspace, recipe, arm, emit), arm, draw, seed)


def offer(workspace: Workspace, recipe: Recipe, arm: str, emit: Callable[[str], None]) -> ArmRows:
    """The rows that an arm may take, whatever the seed; see `rows_of_arm`."""
    pool = Pool(workspace.pool(recipe.pool.name))
    rows = pool.all_rows(COLUMNS)
    said = f"pool {recipe.pool.name} {pool.version[:12]}"
    if arm in ("random_clean", "random_sampled"):
        rows = _without(rows, _unclean(workspace, recipe))
        said = f"{said}, deduplicated and decontaminated"
    if arm == "random_sampled":
        rows = pa.concat_tables([rows, _sampled(workspace, recipe, pool, emit)])
        said = f"{said}, with vanilla rejection sampling"
    return ArmRows(rows, said)


def drawn(offered: ArmRows, arm: str, draw: Draw, seed: int) -> ArmRows:
    """What the arm takes of its offer with this seed: all of the full pool, else a random part."""
    if arm == "full":
        return offered
    return ArmRows(_cut(offered.rows, draw, seed), f"random rows of {offered.name}")


def _cut(rows: pa.Table, draw: Draw, seed: int) -> pa.Table:
    """Rows drawn by hash until they hold the budget."""
    sized = tokenize_rows(rows, draw.tokenizer, draw.max_length)
    drawn = hash64(seed, "random arm")
    chosen = rows_for_budget(sized.ids, sized.loss_tokens, draw.budget, drawn)
    wanted = pa.array(sorted(set(chosen)), pa.string())
    return rows.filter(pa.compute.is_in(rows["id"], wanted))


def _without(rows: pa.Table, gone: set[str]) -> pa.Table:
    lost = pa.compute.is_in(rows["id"], pa.array(sorted(gone), pa.string()))
    return rows.filter(pa.compute.invert(lost))


def _unclean(workspace: Workspace, recipe: Recipe) -> set[str]:
    """Ids that the recipe's duplicates and decontamination gates removed."""
    done = [out for stage, out in outputs(workspace, recipe) if stage.kind in HYGIENE]
    if not done:
        raise ValueError(
            f"recipe {recipe.name!r} has no duplicates or decontamination stage, which arms "
            "random_clean and random_sampled stand on: add one, or leave these arms out"
        )
    gone: set[str] = set()
    for output in done:
        gone |= set(output.all_decisions().filter(outcome=REMOVED)["id"].to_list())
    return gone


def _sampled(
    workspace: Workspace, recipe: Recipe, pool: Pool, emit: Callable[[str], None]
) -> pa.Table:
    """Verified draws for the clean rows' prompts, as many draws as the recipe's own stage made."""
    stages = [s for s in outputs(workspace, recipe) if s[0].kind == "rejection_sampling"]
    if not stages:
        raise ValueError(
            f"recipe {recipe.name!r} has no rejection_sampling stage, whose cost arm "
            "random_sampled copies: add one, or leave the arm out"
        )
    draws = sum(int(output.facts["draws"]) for _, output in stages)
    gone = _unclean(workspace, recipe)
    buckets = by_store_bucket(lambda b: _without(pool.rows(b), gone), pool.buckets)
    with engines() as opened:
        sampler = opened.recorder(
            model_spec(workspace, recipe, "sampler"), workspace.store, lambda rows, tokens: None
        )
        from siftline.stages.rejection_sampling.run import vanilla_rows

        added = vanilla_rows(sampler, buckets, stages[0][0].options, draws)
    emit(f"random_sampled: {draws:,} vanilla draws, {len(added):,} distinct verified rows")
    return pa.Table.from_pylist(added, schema=schema.ADDED).select(COLUMNS)


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
