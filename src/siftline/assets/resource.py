"""What an asset needs from outside: the root folder and the recipe in force.

`overrides` in the run's configuration are the `--set` of the command line; in the UI they are
entered in the Launchpad.
"""

from pathlib import Path

import dagster as dg

from siftline.recipe.library import find
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


CANCELLED = (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED)


def stop_if_cancelled(instance: dg.DagsterInstance, run_id: str) -> None:
    """Ends what a run is doing, once somebody has cancelled it.

    Raises:
        DagsterExecutionInterruptedError: if the run is being cancelled, or marked as cancelled.
    """
    run = instance.get_run_by_id(run_id)
    if run is not None and run.status in CANCELLED:
        raise dg.DagsterExecutionInterruptedError(f"run {run_id[:8]} was cancelled")
