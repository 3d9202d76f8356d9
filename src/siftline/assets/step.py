"""What every asset needs: its names, its resources, whether its step asks a model."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import dagster as dg
from dagster._config.errors import PostProcessingError

from siftline.ingest.pool import Pool, PoolSpec
from siftline.recipe.kinds import Stage
from siftline.recipe.parse import Recipe, find, read_all
from siftline.stages.arms import arms_pending
from siftline.stages.evaluation import evaluation_pending
from siftline.stages.models import model_spec, trained_folder
from siftline.stages.run import stage_asks
from siftline.stages.scorers import scorer_model, scorer_table
from siftline.stages.scores import likelihood_table
from siftline.workspace import Workspace

SHARED = "shared"
KINDS = {"parquet", "python"}
_SHARED_PARTS = ("inputs", "files", "pool", "models", "scores")


def recipes_of(assets: Iterable[dg.AssetKey]) -> list[str]:
    """Recipes whose own assets these are, shared ones aside; sorted."""
    return sorted({key.path[0] for key in assets if key.path[0] not in _SHARED_PARTS})


def inputs(recipe: Recipe) -> dg.AssetKey:
    """Raw files that a recipe's generator writes."""
    return dg.AssetKey(["inputs", recipe.name])


def files(spec: PoolSpec) -> dg.AssetKey:
    """What a pool or an evaluation set is read from, where it comes from outside."""
    return dg.AssetKey(["files", f"{spec.name}_files"])


def pool(spec: PoolSpec) -> dg.AssetKey:
    """A pool or an evaluation set."""
    return dg.AssetKey(["pool", spec.name])


def model(name: str) -> dg.AssetKey:
    """A model trained here from text."""
    return dg.AssetKey(["models", name])


def likelihood(recipe: Recipe) -> dg.AssetKey:
    """The score table of a recipe's pool under its target model."""
    return dg.AssetKey(["scores", recipe.pool.name, recipe.roles["target"], "likelihood"])


def scorer(recipe: Recipe, name: str) -> dg.AssetKey:
    """The table of a quality scorer on a recipe's pool."""
    return dg.AssetKey(["scores", recipe.pool.name, scorer_model(recipe, name), name])


def stage(recipe: Recipe, instance: Stage) -> dg.AssetKey:
    """A stage's decisions."""
    return dg.AssetKey([recipe.name, instance.name])


def outcome(recipe: Recipe, name: str) -> dg.AssetKey:
    """What comes after the stages: curated, model, evaluation, report."""
    return dg.AssetKey([recipe.name, name])


class Siftline(dg.ConfigurableResource):
    """The root folder and the recipe changes of a run.

    Attributes:
        root: Root folder; empty takes SIFTLINE_ROOT, else ./siftline-data.
        overrides: `key=value` changes to the recipe, as `siftline run --set` takes them.
    """

    root: str = ""
    overrides: list[str] = []  # noqa: RUF012  pydantic copies defaults

    @property
    def workspace(self) -> Workspace:
        """Paths below the root."""
        return Workspace(Path(self.root).absolute()) if self.root else Workspace.from_environment()

    def recipe(self, name: str) -> Recipe:
        """A recipe with this run's changes."""
        return find(name, self.overrides)

    def shared(self, name: str, part: str | None = None) -> Recipe:
        """The recipe of a shared asset: that of its name, or one that takes this run's changes.

        Recipes share pools and models, and a run's changes are meant for one of them.

        Args:
            name: The recipe that the asset was made of.
            part: Pool, set or model that the asset is about; by default the recipe's pool.

        Raises:
            ValueError: if none takes them.
        """
        own = find(name)
        try:
            return self.recipe(name)
        except ValueError:
            for other in read_all()[0]:
                if (part or own.pool.name) in other.shared_names:
                    try:
                        return self.recipe(other.name)
                    except ValueError:
                        continue
            raise

    def is_trial(self, name: str) -> bool:
        """Whether this run's changes make another recipe of it than the file holds."""
        return bool(self.overrides) and self.recipe(name).hash != find(name).hash


class Overrides(dg.Array):
    """Changes to a recipe, read where a run is asked for: a typing error launches nothing."""

    def __init__(self) -> None:
        super().__init__(str)
        self.key = "siftline.Overrides"

    def post_process(self, value: list[str]) -> list[str]:
        """The same, once some recipe takes them all.

        Raises:
            PostProcessingError: with what the recipe that comes nearest says.
        """
        if not value:
            return value
        recipes, _ = read_all()
        said: list[str] = []
        for recipe in recipes:
            try:
                find(recipe.name, value)
            except ValueError as error:
                said.append(str(error))
            else:
                return value
        raise PostProcessingError(_nearest(said))


def _nearest(said: list[str]) -> str:
    """Of what all recipes say, the line that names a near key; else what most of them say."""
    lines = [line.partition(": ")[2] or line for line in said]  # without the file's name
    near = [line for line in lines if "did you mean" in line] or lines
    return max(near, key=near.count) if near else "no recipe is valid: mend one"


@dg.resource(
    config_schema={
        "root": dg.Field(
            str, default_value="", description="Root folder; empty: $SIFTLINE_ROOT, or the default."
        ),
        "overrides": dg.Field(
            Overrides(),
            default_value=[],
            description='Changes to the recipe for this run, e.g. ["budget.size=1000"]; the run '
            "publishes beside `latest`.",
        ),
    },
    description="The root folder and the recipe changes of a run.",
)
def siftline_resource(context: dg.InitResourceContext) -> Siftline:
    """`Siftline` of a run's configuration, which is checked before the run is launched."""
    return Siftline(**context.resource_config)


CANCELLED = (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED)


def stop_if_cancelled(instance: dg.DagsterInstance, run_id: str) -> None:
    """Ends what a run is doing, once somebody has cancelled it.

    Raises:
        DagsterExecutionInterruptedError: if the run is being cancelled, or marked as cancelled.
    """
    run = instance.get_run_by_id(run_id)
    if run is not None and run.status in CANCELLED:
        raise dg.DagsterExecutionInterruptedError(f"run {run_id[:8]} was cancelled")


RECIPE, PART, OF = "siftline/recipe", "siftline/part", "siftline/of"
OWNER = "siftline/owner"
"""Tag of steps that decide for one recipe, and of runs: one run of a recipe at a time."""


def tags(recipe: Recipe, part: str, of: str) -> dict[str, str]:
    """Tags of an asset that may ask a model.

    Args:
        recipe: Its recipe.
        part: A key of `_ASKS`.
        of: Name of the stage, scorer or model.
    """
    assert part in _ASKS, part
    return {RECIPE: recipe.name, PART: part, OF: of}


FILES = "siftline/files_of"
"""Tag of steps that read files from outside: name of the pool or set."""


def reading(recipe: Recipe, pool: str) -> dict[str, str]:
    """Tags of an asset that reads files from outside."""
    return {RECIPE: recipe.name, FILES: pool}


def owned(recipe: Recipe) -> dict[str, str]:
    """Tags of an asset that is one recipe's own."""
    return {OWNER: recipe.name}


def asks_a_model(siftline: Siftline, step: Mapping[str, str]) -> bool:
    """Whether a step with these tags is going to ask a model.

    A step that can't tell, because what it needs is missing or broken, asks none: it says what is
    wrong when it runs.
    """
    if PART not in step:
        return False
    try:
        name, of = step[RECIPE], step[OF]
        if step[PART] in _SHARED:
            recipe = siftline.shared(name, of if step[PART] == "base" else None)
        else:
            recipe = siftline.recipe(name)
        return _ASKS[step[PART]](siftline.workspace, recipe, of)
    except (ValueError, OSError):
        return False


def _likelihood(workspace: Workspace, recipe: Recipe, of: str) -> bool:
    pool = Pool(workspace.pool(recipe.pool.name))
    folder = workspace.scores(recipe.pool.name, recipe.roles["target"], "likelihood")
    spec = model_spec(workspace, recipe, "target")
    return likelihood_table(folder, pool, spec, recipe.likelihood).finished() is None


def _scorer(workspace: Workspace, recipe: Recipe, of: str) -> bool:
    return scorer_table(workspace, recipe, of).finished() is None


def _base(workspace: Workspace, recipe: Recipe, of: str) -> bool:
    return not (trained_folder(workspace, recipe, of) / "config.json").exists()


def _arms(workspace: Workspace, recipe: Recipe, of: str) -> bool:
    return arms_pending(workspace, recipe)


def _evaluation(workspace: Workspace, recipe: Recipe, of: str) -> bool:
    return evaluation_pending(workspace, recipe)


_ASKS: dict[str, Callable[[Workspace, Recipe, str], bool]] = {
    "likelihood": _likelihood,
    "scorer": _scorer,
    "base": _base,
    "stage": stage_asks,
    "arms": _arms,
    "evaluation": _evaluation,
}
_SHARED = ("likelihood", "scorer", "base")
"""Those that recipes have in common."""
