"""What installed packages register with Siftline: selection methods and kinds of stages.

Entry points are looked for once for each search path, since that reads every package's. A package
is imported when what it registers is asked for.
"""

import importlib.metadata
import re
import sys
from collections.abc import Container, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint
from typing import Any, NamedTuple


class Registered(NamedTuple):
    """What an entry point gives.

    Attributes:
        found: The object.
        value: Its import path, `package.module:attribute`.
        package: The distribution's name.
        what: How errors call it.
    """

    found: Any
    value: str
    package: str
    what: str


def registered(group: str) -> tuple[str, ...]:
    """Names that installed packages register in a group, sorted; nothing is imported."""
    return tuple(sorted(_points(group, tuple(sys.path))))


def load_registered(group: str, noun: str, name: str, taken: Container[str]) -> Registered:
    """Loads what a package registers by a name.

    Args:
        group: The group of entry points.
        noun: What its objects are, for errors.
        name: One of `registered`.
        taken: Names of siftline's own.

    Raises:
        ValueError: naming the package, if the name is taken or not fit, or loading fails.
    """
    points = _points(group, tuple(sys.path))[name]
    owners = sorted(point.dist.name if point.dist else "an unnamed package" for point in points)
    what = f"{noun} {name!r} of package {owners[0]}"
    if len(points) > 1:
        raise ValueError(
            f"packages {' and '.join(owners)} register a {noun} {name!r} each: rename one, or "
            "uninstall its package"
        )
    if name in taken:
        raise ValueError(
            f"{what} has the name of one of siftline's: give its entry point another name"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(f"{what}: name it in letters, digits and _ - . alone")
    (point,) = points
    try:
        found = point.load()
    except Exception as error:  # importing it runs its code, which may raise anything
        raise ValueError(
            f"{what} can't be loaded from {point.value!r} ({type(error).__name__}: {error}): mend "
            "its entry point, or uninstall it"
        ) from error
    return Registered(found, point.value, owners[0], what)


@lru_cache(maxsize=8)
def _points(group: str, path: tuple[str, ...]) -> Mapping[str, tuple[EntryPoint, ...]]:
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in importlib.metadata.entry_points(group=group):
        found[point.name] = (*found.get(point.name, ()), point)
    return found
