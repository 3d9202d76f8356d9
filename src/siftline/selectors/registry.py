"""Every selection method by name: what it needs, how far it goes, what it is good for.

A method of one's own joins by import path: `package.module:Class`, a frozen dataclass with the
three steps of `siftline.selectors.method`. It may say what it needs in class attributes of the
names that `Entry` has (`needs`, `scope`, `limit`, `good_for`, `warning`, `source`); without them it
is offered everything but a target.
"""

import dataclasses
import difflib
import importlib
import inspect
from dataclasses import dataclass
from typing import Any, Literal, get_args

from siftline.selectors.baselines import BalancedRandom, Ifd, Length, Perplexity, Random
from siftline.selectors.best_fit import BestFit
from siftline.selectors.deita import Deita
from siftline.selectors.facility_location import FacilityLocation
from siftline.selectors.kmeans_quality import KmeansQuality
from siftline.selectors.less import Gradients, Less
from siftline.selectors.lexical import MAX_ROWS as MAX_COUNTED
from siftline.selectors.lexical import Dsir, NearestWords
from siftline.selectors.linear_rule import LinearRule
from siftline.selectors.method import MAX_ROWS, MAX_VALUES
from siftline.selectors.rds import RdsPlus
from siftline.selectors.rounds import KmeansRounds
from siftline.selectors.simcore import SimCore
from siftline.selectors.transport import GotD

Need = Literal[
    "source",  # the name of the source of each row
    "prompts",  # prompt_id of each row
    "scores",  # one score column or more
    "embeddings",
    "text",
    "target embeddings",
    "target text",
    "gradients",  # gradient features, as recipes and `siftline score --gradients` make them
    "target gradients",
    "training",  # models trained between its rounds, which recipes alone do
]
Scope = Literal["bucketed", "global"]
STEPS = ("summarise", "decide", "apply")
TAUGHT = ("compare", "max_new_tokens", "seed")
"""Options of a method that trains which say how its models are trained and asked."""
WIDTH = 384
"""Dimensions that the limits of methods with embeddings are stated for."""


@dataclass(frozen=True)
class Entry:
    """A method as the table shows it.

    Attributes:
        name: What it is called on the command line and in recipes.
        method: The frozen dataclass; its fields are its options.
        needs: What its buckets, and the target, must hold.
        scope: "bucketed" keeps a few numbers a row; "global" holds embeddings or word counts of all
            rows at once.
        limit: Most rows it takes (of 384 dimensions where it reads embeddings, of the default
            features where it reads gradients).
        good_for: One line.
        warning: One line.
        source: Paper or repository.
    """

    name: str
    method: type[Any]
    needs: tuple[Need, ...]
    scope: Scope
    limit: int
    good_for: str
    warning: str
    source: str

    @property
    def targeted(self) -> bool:
        """Whether it selects towards a target set."""
        return any(need.startswith("target") for need in self.needs)

    def options(self) -> dict[str, Any]:
        """Its options with their defaults."""
        default = self.method()
        return {f.name: getattr(default, f.name) for f in dataclasses.fields(default) if f.init}

    def needed_columns(self, method: Any) -> tuple[str, ...]:
        """Score columns that a configured method reads beside what every row has."""
        given = {"id", "n_tokens", "source", "prompt_id", "embedding", "text"}
        asked = method.columns() if hasattr(method, "columns") else {}
        return tuple(name for name in asked if name not in given)


_WIDE = MAX_VALUES // WIDTH

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
        "A cheap baseline on small clean pools.",
        "On a pool of millions it is far below random (published: 17.8 to 40.7).",
        "arXiv 2402.04833",
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
    ),
    Entry(
        "less",
        Less,
        ("gradients", "target gradients"),
        "global",
        MAX_VALUES // (Gradients.dimensions * Gradients.epochs),
        "A known target and a small budget: ahead of random in most re-tests.",
        "A forward and a backward pass of the pool for each checkpoint; no diversity.",
        "arXiv 2402.04333",
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


def find(name: str) -> Entry:
    """A method by its name, or the user's own by `package.module:Class`.

    Raises:
        ValueError: if there is none of that name, or the class lacks a step.
    """
    if ":" in name:
        return _own(name)
    known = {entry.name: entry for entry in METHODS}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}."
        raise ValueError(f"no method {name!r}: {hint} One of your own is package.module:Class")
    return known[name]


def _own(path: str) -> Entry:
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"method {path!r}: {error}; give package.module:Class on the Python path"
        ) from error
    missing = [step for step in STEPS if not callable(getattr(found, step, None))]
    if not inspect.isclass(found) or missing:
        raise ValueError(f"method {path!r} has no {', '.join(missing) or 'class'}: see method.py")
    if not dataclasses.is_dataclass(found) or not found.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise ValueError(f"method {path!r} is no frozen dataclass: its fields are its options")
    everything: tuple[Need, ...] = ("source", "prompts", "scores", "embeddings", "text")
    needs = tuple(getattr(found, "needs", everything))
    unknown = sorted(set(needs) - set(get_args(Need)))
    if unknown:
        raise ValueError(
            f"method {path!r} needs {unknown[0]!r}: one of {', '.join(get_args(Need))}"
        )
    if "training" in needs and not callable(getattr(found, "refine", None)):
        raise ValueError(f"method {path!r} needs training and has no refine: see rounds.py")
    lacking = [name for name in TAUGHT if name not in {f.name for f in dataclasses.fields(found)}]
    if "training" in needs and lacking:
        raise ValueError(
            f"method {path!r} needs training and has no option {', '.join(lacking)}: see rounds.py"
        )
    document = (inspect.getdoc(found) or "").partition("\n")[0]
    return Entry(
        path,
        found,
        needs,
        getattr(found, "scope", "global"),
        getattr(found, "limit", MAX_ROWS),
        getattr(found, "good_for", document),
        getattr(found, "warning", "Not one of siftline's."),
        getattr(found, "source", path),
    )
