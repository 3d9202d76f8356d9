"""Where things lie under the root folder of a project.

Everything Siftline writes is below one root: copy it, mount it, or delete it as a whole.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

ROOT_VARIABLE = "SIFTLINE_ROOT"
DEFAULT_ROOT = "siftline-data"


@dataclass(frozen=True)
class Workspace:
    """Paths below a root; building one creates nothing.

    Raises:
        ValueError: if the root is the address of an object store.
    """

    root: Path

    def __post_init__(self) -> None:
        for k, part in enumerate(self.root.parts):
            if re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+:", part):  # s3://bucket, as a path
                address = f"{part}//{'/'.join(self.root.parts[k + 1 :])}"
                raise ValueError(
                    f"root {address} is an address: give a folder of this machine, and copy what "
                    "others read (curated/, reports/) there after a run"
                )

    @classmethod
    def from_environment(cls) -> "Workspace":
        """The root that SIFTLINE_ROOT names, else ./siftline-data."""
        return cls(Path(os.environ.get(ROOT_VARIABLE, DEFAULT_ROOT)).absolute())

    @property
    def store(self) -> Path:
        """Score and sample store."""
        return self.root / "store"

    def inputs(self, recipe: str) -> Path:
        """Raw files that a recipe's generator wrote."""
        return self.root / "inputs" / recipe

    def truth(self, recipe: str) -> Path:
        """What a generator planted; no stage of a pipeline reads it."""
        return self.root / "truth" / recipe

    def pool(self, name: str) -> Path:
        """A pool, or an evaluation set, in buckets."""
        return self.root / "pool" / name

    def scores(self, pool: str, model: str, scorer: str) -> Path:
        """A shared score table: id, key and values."""
        return self.root / "scores" / pool / model / scorer

    def stage(self, recipe: str, stage: str) -> Path:
        """Decisions of one stage of one recipe."""
        return self.root / "stages" / recipe / stage

    def curated(self, recipe: str) -> Path:
        """Published versions of a recipe."""
        return self.root / "curated" / recipe

    def model(self, name: str) -> Path:
        """Models trained here, by what they were trained from."""
        return self.root / "models" / name

    def report(self, recipe: str) -> Path:
        """HTML report and its numbers."""
        return self.root / "reports" / recipe

    def recipe_lock(self, recipe: str) -> Path:
        """Held by the run of a recipe: there is one at a time."""
        return self.dagster_home / f".{recipe}.lock"

    @property
    def dagster_home(self) -> Path:
        """Dagster's instance; dagster.yaml is copied here."""
        return self.root / ".dagster"
