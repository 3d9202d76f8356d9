"""Methods of the user's own: by import path, or registered by an installed package.

A method is a frozen dataclass with the three steps of `siftline.selectors.method`. It may say what
it needs in class attributes of the names that `Entry` has (`needs`, `scope`, `limit`, `good_for`,
`warning`, `source`); without them it is offered everything but a target. A package registers one as
an entry point of the group `siftline.selectors`, its name being the method's and its value
`package.module:Class`. Entry points are looked for when a method is asked for, and a package is
imported when it is its method.
"""

import dataclasses
import importlib
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Container, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint
from typing import Any, get_args

from siftline.selectors.entry import Entry, Need
from siftline.selectors.method import MAX_ROWS

GROUP = "siftline.selectors"
"""The group of entry points by which packages register methods."""
STEPS = ("summarise", "decide", "apply")
TAUGHT = ("compare", "max_new_tokens", "seed")
"""Options of a method that trains which say how its models are trained and asked."""


def registered() -> tuple[str, ...]:
    """Names of the methods that installed packages register, sorted; nothing is imported."""
    return tuple(sorted(_points(tuple(sys.path))))


@lru_cache(maxsize=4)
def _points(path: tuple[str, ...]) -> Mapping[str, tuple[EntryPoint, ...]]:
    """Entry points by name, looked for once for each search path: it reads every package's."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def registered_as(name: str, taken: Container[str]) -> Entry:
    """The method that a package registers by a name.

    Args:
        name: One of `registered`.
        taken: Names of siftline's methods.

    Raises:
        ValueError: naming the package, if the name is taken or not fit, the entry point can't be
            loaded, or what it names is no method with defaults for all its options.
    """
    points = _points(tuple(sys.path))[name]
    owners = sorted(point.dist.name if point.dist else "an unnamed package" for point in points)
    what = f"method {name!r} of package {owners[0]}"
    if len(points) > 1:
        raise ValueError(
            f"packages {' and '.join(owners)} register a method {name!r} each: rename one, or "
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
    entry = _entry(name, point.value, found, what, owners[0])
    missing = dataclasses.MISSING
    for option in dataclasses.fields(found):
        if option.init and option.default is missing and option.default_factory is missing:
            raise ValueError(f"{what}: give its option {option.name} a default")
    return entry


def by_path(path: str) -> Entry:
    """The method of an import path, `package.module:Class`.

    Raises:
        ValueError: if it can't be imported, or is no method.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"method {path!r}: {error}; give package.module:Class on the Python path"
        ) from error
    return _entry(path, path, found, f"method {path!r}")


def _entry(name: str, path: str, found: Any, what: str, distribution: str | None = None) -> Entry:
    """What a class of the user's own says of itself.

    Args:
        name: What it is called.
        path: Where it is from.
        found: The class.
        what: How errors call it.
        distribution: The package that registers it.

    Raises:
        ValueError: if it is no frozen dataclass with the three steps, or its needs are unknown.
    """
    missing = [step for step in STEPS if not callable(getattr(found, step, None))]
    if not inspect.isclass(found) or missing:
        raise ValueError(f"{what} has no {', '.join(missing) or 'class'}: see method.py")
    if not dataclasses.is_dataclass(found) or not found.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise ValueError(f"{what} is no frozen dataclass: its fields are its options")
    everything: tuple[Need, ...] = ("source", "prompts", "scores", "embeddings", "text")
    needs = tuple(getattr(found, "needs", everything))
    unknown = sorted(set(needs) - set(get_args(Need)))
    if unknown:
        raise ValueError(f"{what} needs {unknown[0]!r}: one of {', '.join(get_args(Need))}")
    if "training" in needs and not callable(getattr(found, "refine", None)):
        raise ValueError(f"{what} needs training and has no refine: see rounds.py")
    lacking = [x for x in TAUGHT if x not in {f.name for f in dataclasses.fields(found)}]
    if "training" in needs and lacking:
        raise ValueError(
            f"{what} needs training and has no option {', '.join(lacking)}: see rounds.py"
        )
    document = (inspect.getdoc(found) or "").partition("\n")[0]
    return Entry(
        name,
        found,
        needs,
        getattr(found, "scope", "global"),
        getattr(found, "limit", MAX_ROWS),
        getattr(found, "good_for", document),
        getattr(found, "warning", "Not one of siftline's."),
        getattr(found, "source", path),
        distribution=distribution,
    )
