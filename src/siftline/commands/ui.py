"""`siftline ui`: Dagster's web server on a root."""

import os
import sys
from pathlib import Path

import click

from siftline.commands.options import root_option
from siftline.workspace import ROOT_VARIABLE, Workspace


@click.command()
@root_option
@click.option("--port", default=3000, show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True)
def ui(root: Path, port: int, host: str) -> None:
    """Serve the Dagster UI on ROOT."""
    from siftline.pipelines.execute import prepare_home

    workspace = Workspace(root.absolute())
    environment = os.environ | {
        "DAGSTER_HOME": str(prepare_home(workspace)),
        ROOT_VARIABLE: str(workspace.root),
    }
    here = Path("workspace.yaml")
    target = ["-w", str(here)] if here.exists() else ["-m", "siftline.definitions"]
    command = [sys.executable, "-m", "dagster", "dev", *target, "-h", host, "-p", str(port)]
    os.execve(sys.executable, command, environment)
