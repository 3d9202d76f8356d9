"""Evaluation: what the base model and every arm answer on the test sets.

Test sets that the recipe calls retained are tasks the base model could do before: they are told
apart from the task that is trained for, each with its change against the base model, paired by
question, so that forgetting is seen.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import polars as pl
import pyarrow as pa

from siftline import shards
from siftline.ingest.pool import PROVENANCE, Pool
from siftline.progress import Progress
from siftline.recipe.parse import Recipe
from siftline.scoring.engines import ModelSpec
from siftline.stages.arms import BASE, Arm, found_arms, train_arms
from siftline.stages.models import engines, identity, model_spec
from siftline.training.evaluate import compare, evaluate, summarise_accuracy, summarise_seeds
from siftline.workspace import Workspace

RETAINED = "retained "
"""What the level of a retained set begins with; its name follows."""
GRADING = 2
"""Raise it when the same answer is graded otherwise."""
SOURCE = "source "
"""What the level of a source begins with."""
MOST_SOURCES = 12
"""More of them get no lines: nobody reads such a table."""
CHANGES = ("change", "change_low", "change_high")
_SHOWN = ("level", "n", "accuracy", "low", "high", "at_floor")


def test_rows(workspace: Workspace, recipe: Recipe, level_column: str) -> pl.DataFrame:
    """Questions of all test sets with answers: id, set, messages, tools, answer, source, level.

    Raises:
        ValueError: if there is no test set with answers beside the retained ones, a retained one
            has none, or the level's column is one of those that say something else.
    """
    if level_column in ("id", "set", "messages", "tools", "answer", "source"):
        raise ValueError(
            f"evaluation.level_column is {level_column!r}, which is no level: name another column "
            "(sources have lines of their own)"
        )
    frames = []
    for spec in recipe.sets.test:
        pool = Pool(workspace.pool(spec.name))
        rows = pool.all_rows(["id", "messages", "tools", "answer", "source"])
        kept = pl.from_arrow(rows.filter(pa.compute.is_valid(rows["answer"])))
        assert isinstance(kept, pl.DataFrame)
        levels = _levels(pool, level_column)
        named = [levels.get(i) for i in kept["id"].to_list()]
        level = pl.Series(level_column, named, dtype=pl.String)
        which = pl.lit(spec.name, pl.String).alias("set")
        frames.append(kept.select("id", which, "messages", "tools", "answer", "source", level))
    if not frames:
        raise ValueError(f"recipe {recipe.name!r} has no test set to evaluate on: add one")
    found = pl.concat(frames).unique("id", keep="first", maintain_order=True)
    retained = recipe.evaluation.retained if recipe.evaluation else ()
    # A set without answers may stand here to be kept out of the pool; the task needs one with them.
    if found.filter(~pl.col("set").is_in(list(retained))).is_empty():
        raise ValueError(
            f"recipe {recipe.name!r} has no test rows with an answer: name their column, or add a "
            "test set"
        )
    for name in retained:
        if found.filter(set=name).is_empty():
            raise ValueError(
                f"retained test set {name!r} has no rows with an answer that no set before it "
                "has: leave it out"
            )
    return found


def _levels(pool: Pool, column: str) -> dict[str, str]:
    """Level of each row that has one, from the input columns that no mapping used."""
    found: dict[str, str] = {}
    for bucket in range(pool.buckets):
        table = pool.read(PROVENANCE, bucket, ["id", "leftover"])
        for line in table.to_pylist():
            level = json.loads(line["leftover"] or "{}").get(column)
            if level is not None:
                found[line["id"]] = str(level)
    return found


def evaluate_arms(
    workspace: Workspace, recipe: Recipe, emit: Callable[[str], None]
) -> tuple[pl.DataFrame, list[Arm]]:
    """Accuracy of the base model and of every arm on the test sets.

    Results of a model are kept beside its weights, by what was asked, and found the next time.

    Returns:
        Lines of arm, level, n, seeds, accuracy, low, high, at_floor, and where the recipe has
        retained sets the columns of `CHANGES` on their lines; and the arms. Where the questions
        are of several sources, each has a line, its level `SOURCE` and the name.
    """
    settings, training = recipe.evaluation, recipe.training
    assert settings is not None
    questions = test_rows(workspace, recipe, settings.level_column)  # before hours of training
    arms = train_arms(workspace, recipe, emit) if training is not None else []
    base = Path(model_spec(workspace, recipe, "target").path)
    results: dict[str, list[pl.DataFrame]] = {}
    folders = [(BASE, 0, base), *((arm.arm, arm.seed, arm.folder) for arm in arms)]
    for name, seed, folder in folders:
        progress = Progress(f"evaluation {name} seed {seed}", questions.height, emit, "questions")
        answered = evaluated(workspace, recipe, folder, questions, progress)
        progress.close()
        results.setdefault(name, []).append(answered)
    sets = questions.select("id", "set")
    sources = _sources(questions, settings.retained, emit)
    lines = []
    for name, runs in results.items():
        # `all` is an arm's last line, as the report reads it.
        task = _lines(_of(runs, sets, settings.retained, inside=False))
        overall = pl.col("level") == "all"
        kept = [
            _retained(runs, results[BASE], sets, which, changed=name != BASE)
            for which in settings.retained
        ]
        told = [
            _lines([run.filter(pl.col("id").is_in(ids)) for run in runs])
            .filter(overall)
            .with_columns(level=pl.lit(SOURCE + source))
            for source, ids in sources.items()
        ]
        parts = [task.filter(~overall), *told, *kept, task.filter(overall)]
        known = pl.concat(parts, how="diagonal").with_columns(
            pl.lit(name).alias("arm"), pl.lit(len(runs)).alias("seeds")
        )
        lines.append(known)
    table = pl.concat(lines, how="diagonal")
    return table, arms


def _sources(
    questions: pl.DataFrame, retained: tuple[str, ...], emit: Callable[[str], None]
) -> dict[str, list[str]]:
    """Ids by source of the questions that are not retained; none where there is but one source."""
    task = questions.filter(~pl.col("set").is_in(list(retained)), pl.col("source").is_not_null())
    found = {
        str(source): task.filter(source=source)["id"].to_list()
        for source in task["source"].unique().sort().to_list()
    }
    if len(found) > MOST_SOURCES:
        emit(f"evaluation: {len(found)} sources are too many for a line each")
    return found if 1 < len(found) <= MOST_SOURCES else {}


def _of(
    runs: list[pl.DataFrame], sets: pl.DataFrame, which: tuple[str, ...], *, inside: bool
) -> list[pl.DataFrame]:
    """Each run's answers to the questions of some sets, or of all others."""
    wanted = pl.col("set").is_in(list(which))
    ids = sets.filter(wanted if inside else ~wanted)["id"].to_list()
    return [run.filter(pl.col("id").is_in(ids)) for run in runs]


def _lines(runs: list[pl.DataFrame]) -> pl.DataFrame:
    table = summarise_seeds(runs) if len(runs) > 1 else summarise_accuracy(runs[0])
    return table.select(_SHOWN)


def _retained(
    runs: list[pl.DataFrame],
    base: list[pl.DataFrame],
    sets: pl.DataFrame,
    which: str,
    *,
    changed: bool,
) -> pl.DataFrame:
    """One line: accuracy on a retained set, and how far that is from the base model's.

    A set of a single question has no interval, so its change is null.
    """
    mine = _of(runs, sets, (which,), inside=True)
    line = _lines(mine).filter(level="all").with_columns(level=pl.lit(RETAINED + which))
    if not changed:
        return line
    theirs = _of(base, sets, (which,), inside=True) * len(mine)
    values: tuple[float | None, ...] = (None, None, None)
    if mine[0].height > 1:
        found = compare(mine, theirs)
        values = (found.estimate, found.low, found.high)
    return line.with_columns(
        pl.lit(v, pl.Float64).alias(n) for n, v in zip(CHANGES, values, strict=True)
    )


def evaluation_pending(workspace: Workspace, recipe: Recipe) -> bool:
    """Whether `evaluate_arms` has a model to train or to ask.

    Raises:
        ValueError: if nothing was published with these settings, or there is no test set.
    """
    settings = recipe.evaluation
    assert settings is not None
    folders = [Path(model_spec(workspace, recipe, "target").path)]
    if recipe.training is not None:
        arms = found_arms(workspace, recipe)
        if arms is None:
            return True
        folders += [arm.folder for arm in arms]
    questions = test_rows(workspace, recipe, settings.level_column)
    named = [_answers(workspace, recipe, folder, questions) for folder in folders]
    return any(shards.read_named(folder, name) is None for folder, name in named)


def _spec(workspace: Workspace, recipe: Recipe, model: Path) -> ModelSpec:
    return replace(model_spec(workspace, recipe, "target"), path=str(model))


def _answers(
    workspace: Workspace, recipe: Recipe, model: Path, questions: pl.DataFrame
) -> tuple[Path, str]:
    """Where a model's graded answers are: folder, and a name made of all that decides them."""
    asked = shards.content_hash(
        [
            questions["id"].to_list(),
            {k: v for k, v in vars(recipe.evaluation).items() if k != "retained"},
            identity(_spec(workspace, recipe, model)),
            GRADING,
        ]
    )
    return workspace.root / "evaluations", asked[:16]


def evaluated(
    workspace: Workspace, recipe: Recipe, model: Path, questions: pl.DataFrame, progress: Progress
) -> pl.DataFrame:
    """A model's graded answers to the test questions; asked once, by all that decides them.

    Levels decide no answer: they are those of `questions`, whatever they were when it was asked.
    """
    settings = recipe.evaluation
    assert settings is not None
    folder, name = _answers(workspace, recipe, model, questions)
    found = shards.read_named(folder, name)
    if found is None:
        from siftline.scoring.verifiers import get_verifier

        with engines() as opened:
            answered = evaluate(
                opened.get(_spec(workspace, recipe, model)),
                questions,
                get_verifier(settings.verifier),
                settings,
                progress.reach,
            )
        found = answered.to_arrow()
        shards.write_named(found, folder, name)
    frame = pl.from_arrow(found)
    assert isinstance(frame, pl.DataFrame)
    levels = questions.select("id", pl.col(settings.level_column).cast(pl.String).alias("level"))
    fresh = frame.drop("level").join(levels, on="id", how="left", maintain_order="left")
    return fresh.select(frame.columns)
