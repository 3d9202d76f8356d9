"""What an asset needs from outside: the root folder, the recipe in force, a life tied to the run's.

`overrides` in the run's configuration are the `--set` of the command line; in the UI they are
entered in the Launchpad.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import dagster as dg

from siftline.library import find
from siftline.recipe import Recipe
from siftline.workspace import Workspace

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ends this step process when the run's process is killed; nothing keeps a card busy alone.

    Does nothing outside a step process, and nothing where the system has no prctl.
    """
    if multiprocessing.parent_process() is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:  # the parent died before the call
        os.kill(os.getpid(), signal.SIGKILL)


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
