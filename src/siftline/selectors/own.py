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
from collections.abc import Container
from typing import Any, get_args

from siftline import entry_points
from siftline.selectors.entry import Entry, Need
from siftline.selectors.method import MAX_ROWS

GROUP = "siftline.selectors"
"""The group of entry points by which packages register methods."""
STEPS = ("summarise", "decide", "apply")
TAUGHT = ("compare", "max_new_tokens", "seed")
"""Options of a method that trains which say how its models are trained and asked."""


def registered() -> tuple[str, ...]:
    """Names of the methods that installed packages register, sorted; nothing is imported."""
    return entry_points.registered(GROUP)


def registered_as(name: str, taken: Container[str]) -> Entry:
    """The method that a package registers by a name.

    Args:
        name: One of `registered`.
        taken: Names of siftline's methods.

    Raises:
        ValueError: naming the package, if the name is taken or not fit, the entry point can't be
            loaded, or what it names is no method with defaults for all its options.
    """
    found, value, package, what = entry_points.load_registered(GROUP, "method", name, taken)
    entry = _entry(name, value, found, what, package)
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
    if "target warm-up" in needs and not isinstance(getattr(found, "after", None), str):
        raise ValueError(f"{what} needs a warm-up and has no option after: see baselines.py")
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
