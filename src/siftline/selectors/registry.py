"""Every selection method by name: what it needs, how far it goes, what it is good for.

A method of one's own joins by import path, `package.module:Class`, or by a name, where the package
that has it registers it; see `siftline.selectors.registry`.

Methods of the user's own: by import path, or registered by an installed package.
"""

import dataclasses
import difflib
import importlib
import importlib.metadata
import inspect
from collections.abc import Container
from typing import Any, get_args

from siftline import entry_points
from siftline.selectors.baselines import (
    BalancedRandom,
    BestFit,
    Ifd,
    Length,
    LossDrop,
    Perplexity,
    Random,
)
from siftline.selectors.deita import Deita
from siftline.selectors.facility_location import FacilityLocation
from siftline.selectors.kmeans_quality import KmeansQuality
from siftline.selectors.less import Gradients, Less
from siftline.selectors.lexical import MAX_ROWS as MAX_COUNTED
from siftline.selectors.lexical import Dsir, NearestWords
from siftline.selectors.linear_rule import LinearRule
from siftline.selectors.method import MAX_ROWS, MAX_VALUES, WIDTH, Entry, Need
from siftline.selectors.nearest import RdsPlus, SimCore
from siftline.selectors.rounds import KmeansRounds
from siftline.selectors.transport import GotD

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


__all__ = ["METHODS", "Entry", "find", "methods"]

_WIDE = MAX_VALUES // WIDTH
_FEATURES = Gradients.dimensions * Gradients.epochs

METHODS: tuple[Entry, ...] = (
    Entry(
        "random",
        Random,
        (),
        "bucketed",
        MAX_ROWS,
        "The baseline; hard to beat on clean pools.",
        "Large sources dominate.",
        "arXiv 2503.01807",
    ),
    Entry(
        "balanced_random",
        BalancedRandom,
        ("source",),
        "bucketed",
        MAX_ROWS,
        "The stronger random on pools of unequal sources.",
        "Takes small bad sources whole.",
        "arXiv 2503.01807",
    ),
    Entry(
        "length",
        Length,
        ("scores",),
        "bucketed",
        MAX_ROWS,
        "A cheap baseline; published to help weak base models most.",
        "Far below random on one pool of millions (17.8 to 40.7), said to help on two others.",
        "arXiv 2402.04833, 2410.09335",
    ),
    Entry(
        "perplexity",
        Perplexity,
        ("scores",),
        "bucketed",
        MAX_ROWS,
        "A baseline; the middle is its better half.",
        "Published below random everywhere; the top holds what is broken.",
        "arXiv 2503.01807",
    ),
    Entry(
        "ifd",
        Ifd,
        ("scores",),
        "bucketed",
        MAX_ROWS,
        "One clean pool, where answers are all right and many easy.",
        "Below random on mixed pools (published: 38.7 to 40.9).",
        "arXiv 2308.12032",
    ),
    Entry(
        "linear_rule",
        LinearRule,
        ("scores",),
        "bucketed",
        MAX_ROWS,
        "A rule of quality fitted to runs of your own.",
        "Published coefficients fit one model and its judges; random beat them at 10,000.",
        "InstructMining, arXiv 2307.06290",
    ),
    Entry(
        "best_fit",
        BestFit,
        ("prompts", "scores"),
        "bucketed",
        MAX_ROWS,
        "Several verified answers a prompt: takes those the model finds likely.",
        "Prefers short and generic answers; needs a checked pool. Own samples as answers hurt.",
        "GRAPE, arXiv 2502.04194",
    ),
    Entry(
        "kmeans_quality",
        KmeansQuality,
        ("embeddings",),
        "global",
        _WIDE,
        "Coverage of topics, with a quality score or without.",
        "Depends on k; too many clusters enshrine noise.",
        "kMQ, arXiv 2409.11378",
        WIDTH,
    ),
    Entry(
        "kmeans_quality_rounds",
        KmeansRounds,
        ("embeddings", "training"),
        "global",
        _WIDE,
        "kmeans_quality whose cluster weights follow what a model still gets wrong (recipes only).",
        "A training a round; published to hurt Llama-3-8B in the last. Noise can't be learnt.",
        "iterative kMQ, arXiv 2409.11378",
        WIDTH,
    ),
    Entry(
        "deita",
        Deita,
        ("embeddings", "scores"),
        "global",
        _WIDE,
        "A few thousand rows by two quality scores, without near-duplicates.",
        "As good as its scores; time grows with rows kept.",
        "arXiv 2312.15685",
        WIDTH,
    ),
    Entry(
        "facility_location",
        FacilityLocation,
        ("embeddings",),
        "global",
        20_000_000_000 // 10_000,
        "A small subset that represents the pool.",
        "Covers outliers and faults as well; slow.",
        "arXiv 1409.7938, 2402.00530",
    ),
    Entry(
        "rds_plus",
        RdsPlus,
        ("embeddings", "target embeddings"),
        "global",
        _WIDE,
        "A known target: the best published mean of seven tasks at equal rows.",
        "Re-tested near random on several recent models; few queries go deep.",
        "arXiv 2503.01807",
        WIDTH,
    ),
    Entry(
        "less",
        Less,
        ("gradients", "target gradients"),
        "global",
        MAX_VALUES // _FEATURES,
        "A known target and a small budget: ahead of random in most re-tests.",
        "A forward and a backward pass of the pool for each checkpoint; no diversity.",
        "arXiv 2402.04333",
        _FEATURES,
    ),
    Entry(
        "loss_drop",
        LossDrop,
        ("scores", "target warm-up"),
        "bucketed",
        MAX_ROWS,
        "A known target, without gradients: a short warm-up on it and a forward pass of the pool.",
        "Published on few models; a small target is soon learnt by heart.",
        "arXiv 2605.09404",
    ),
    Entry(
        "got_d",
        GotD,
        ("embeddings", "target embeddings"),
        "global",
        _WIDE,
        "Continuing pre-training towards a domain inside the pool's reach.",
        "No diversity: copies go together. Not for targets outside the pool.",
        "arXiv 2405.02774",
        WIDTH,
    ),
    Entry(
        "simcore",
        SimCore,
        ("embeddings", "target embeddings"),
        "global",
        _WIDE,
        "A target and no fixed size: it stops by itself.",
        "Published for images only; tau is not transferable between embedders.",
        "arXiv 2303.11101",
        WIDTH,
    ),
    Entry(
        "dsir",
        Dsir,
        ("text", "target text"),
        "global",
        MAX_COUNTED,
        "A target's style and vocabulary, without any model.",
        "Long rows decide by length; blind to meaning.",
        "arXiv 2302.03169",
    ),
    Entry(
        "nearest_words",
        NearestWords,
        ("text", "target text"),
        "global",
        MAX_COUNTED,
        "What a search engine would pick: the baseline for methods that embed.",
        "Shared words are not shared tasks.",
        "BM25, Robertson & Zaragoza 2009",
    ),
)


def methods() -> tuple[Entry, ...]:
    """Methods of siftline, then those that installed packages register, by name.

    Raises:
        ValueError: as `find`, for any that is registered.
    """
    taken = [entry.name for entry in METHODS]
    return (*METHODS, *(registered_as(name, taken) for name in registered()))


def find(name: str) -> Entry:
    """A method by its name, or the user's own by `package.module:Class`.

    Raises:
        ValueError: if there is none of that name, the class lacks a step, or the package that
            registers it can't be used; then it names the package.
    """
    if ":" in name:
        return by_path(name)
    known = {entry.name: entry for entry in METHODS}
    more = registered()
    if name in more:
        return registered_as(name, known)
    if name not in known:
        names = sorted([*known, *more])
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}."
        raise ValueError(f"no method {name!r}: {hint} One of your own is package.module:Class")
    return known[name]
