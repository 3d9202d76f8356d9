"""What an asset needs from outside: the root folder, the recipe in force, a life tied to the run's.

`overrides` in the run's configuration are the `--set` of the command line; in the UI they are
entered in the Launchpad.
"""

import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import dagster as dg

from siftline.library import find
from siftline.recipe import Recipe
from siftline.workspace import Workspace


def die_with_parent() -> None:
    """Ends this step process when the run's process is gone; nothing keeps a card busy alone.

    The pipe to the run's process is watched, because the system's own signal (PR_SET_PDEATHSIG)
    follows the fork server, which lives as long as its steps. Does nothing outside a step process.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, name="die-with-parent", daemon=True).start()


class Siftline(dg.ConfigurableResource):
    """The root folder and the recipe changes of a run.

    Attributes:
        root: Root folder; empty takes SIFTLINE_ROOT, else ./siftline-data.
        overrides: `key=value` changes to the recipe, as `siftline run --set` takes them.
    """

    root: str = ""
    overrides: list[str] = []  # noqa: RUF012  pydantic copies defaults

    def setup_for_execution(self, context: Any) -> None:
        """Runs once per step process."""
        die_with_parent()

    @property
    def workspace(self) -> Workspace:
        """Paths below the root."""
        return Workspace(Path(self.root).absolute()) if self.root else Workspace.from_environment()

    def recipe(self, name: str) -> Recipe:
        """A recipe with this run's changes."""
        return find(name, self.overrides)
