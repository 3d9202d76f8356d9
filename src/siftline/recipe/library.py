"""Which recipes there are: the shipped ones, and those in the folders SIFTLINE_RECIPES names."""

import os
from collections.abc import Sequence
from pathlib import Path

from siftline.config import nearest
from siftline.recipe.parse import Recipe, load

SHIPPED = Path(__file__).parents[1] / "pipelines" / "recipes"
VARIABLE = "SIFTLINE_RECIPES"


def recipe_files() -> dict[str, Path]:
    """Recipe files by name, the file's stem; a user's file takes the place of a shipped one."""
    folders = [SHIPPED, *(Path(p) for p in os.environ.get(VARIABLE, "").split(os.pathsep) if p)]
    return {
        file.stem: file
        for folder in folders
        for file in sorted(folder.glob("*.yaml"))
        if file.is_file()
    }


def find(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Loads a recipe by name.

    Raises:
        ValueError: if there is none, naming the nearest, or it is not valid.
    """
    files = recipe_files()
    if name not in files:
        raise ValueError(f"no recipe {name!r}: {nearest(name, list(files))}")
    recipe = load(files[name], overrides)
    if recipe.name != name:
        raise ValueError(f"{files[name].name}: its name is {recipe.name!r}: rename one of the two")
    return recipe


def all_recipes() -> list[Recipe]:
    """Every recipe, sorted by name.

    Raises:
        ValueError: if one is not valid; the file's name comes first.
    """
    return [find(name) for name in sorted(recipe_files())]


def read_all() -> tuple[list[Recipe], dict[str, str]]:
    """Every recipe that is valid, sorted by name, and what is wrong with each of the others."""
    valid: list[Recipe] = []
    broken: dict[str, str] = {}
    for name in sorted(recipe_files()):
        try:
            valid.append(find(name))
        except ValueError as error:
            broken[name] = str(error)
        except OSError as error:
            broken[name] = f"{name}.yaml can't be read: {error}"
    return valid, broken
