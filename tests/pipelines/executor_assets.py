"""Assets for tests of the executor: two light ones around one that may ask a model."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import dagster as dg

from siftline.assets import step as asking
from siftline.pipelines.executor import step_executor

# Asks as long as its output is not there.
asking._ASKS["test"] = lambda workspace, recipe, of: not (workspace / of).exists()


class Folder(dg.ConfigurableResource):
    """Takes the place of the project's resource."""

    root: str
    crash: bool = False
    slow: bool = False

    @property
    def workspace(self):
        return Path(self.root)

    def recipe(self, name):
        return SimpleNamespace(name=name)


def note(siftline, name):
    with open(siftline.workspace / "pids", "a") as out:
        out.write(f"{name} {os.getpid()} {os.environ.get('HF_HUB_OFFLINE')}\n")


@dg.asset
def first(siftline: Folder) -> None:
    note(siftline, "first")


@dg.asset(
    deps=[first],
    pool="gpu",
    op_tags={asking.RECIPE: "none", asking.PART: "test", asking.OF: "answer"},
)
def asked(siftline: Folder) -> None:
    note(siftline, "asked")
    if siftline.crash:
        os._exit(3)
    if siftline.slow:
        time.sleep(120)
    (siftline.workspace / "answer").touch()


@dg.asset(deps=[asked])
def last(siftline: Folder) -> None:
    note(siftline, "last")


@dg.asset
def beside(siftline: Folder) -> None:
    note(siftline, "beside")
    raise ValueError("beside is broken: mend it")


def make_job():
    """The job of the first three."""
    made = dg.Definitions(
        [first, asked, last],
        resources={"siftline": Folder.configure_at_launch()},
        executor=step_executor,
        jobs=[dg.define_asset_job("three")],
    )
    return made.resolve_job_def("three")


def make_broken():
    """The job of all four."""
    made = dg.Definitions(
        [first, asked, last, beside],
        resources={"siftline": Folder.configure_at_launch()},
        executor=step_executor,
        jobs=[dg.define_asset_job("four")],
    )
    return made.resolve_job_def("four")
