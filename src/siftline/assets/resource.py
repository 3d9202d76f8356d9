"""What an asset needs from outside: the root folder and the recipe in force.

`overrides` in the run's configuration are the `--set` of the command line; in the UI they are
entered in the Launchpad.
"""

from pathlib import Path

import dagster as dg
from dagster._config.errors import PostProcessingError

from siftline.recipe.library import find, read_all
from siftline.recipe.parse import Recipe
from siftline.workspace import Workspace


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
