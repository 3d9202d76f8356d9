"""What a stage of each kind is: the only table about stages. Everything else asks it.

A kind is a package that holds a `StageKind` called `KIND`: its options, its decision and its run
stand there together. Kinds are known by import path and loaded when a recipe names one, so reading
a recipe loads no code of others. An installed package adds a kind by an entry point of the group
`siftline.stages`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Literal

from siftline.config import nearest
from siftline.entry_points import load_registered, registered

GROUP = "siftline.stages"
"""Entry points of packages that add a kind: its name, and `package.module:attribute`."""
BUILT_IN = (
    "duplicates",
    "decontamination",
    "quality_rules",
    "verify",
    "likelihood",
    "diversity",
    "select",
    "confidence",
    "correct",
    "rejection_sampling",
    "s3ft",
    "allocate",
)
GATES = ("duplicates", "decontamination", "quality_rules", "likelihood", "confidence")
"""Gates that added rows are held to; verification is how they were accepted."""

Role = Literal["gate", "shortlist", "adds", "budget"]


@dataclass(frozen=True)
class Stage:
    """One stage instance.

    Attributes:
        name: Its name in the recipe, also its asset's.
        kind: Name of a `StageKind`.
        options: The dataclass that says how the work is done.
        scope: "added" judges only rows that a stage brought; earlier rows were judged before.
    """

    name: str
    kind: str
    options: Any
    scope: Literal["all", "added"] = "all"

    @property
    def of(self) -> "StageKind":
        """What its kind is."""
        return kind_of(self.kind)


def _nothing(options: Any, budget: Any = None) -> tuple[str, ...]:
    return ()


def _as_given(options: dict[str, Any], before: Sequence[Stage], budget: Any) -> dict[str, Any]:
    return options


def _anywhere(stage: Stage, before: Sequence[Stage]) -> None: ...


def _settled(stage: Stage, recipe: Any) -> Stage:
    return stage


def _no_inputs(stage: Stage, recipe: Any) -> dict[str, Any]:
    return {}


def _no_notes(stage: Stage, facts: Mapping[str, Any]) -> list[str]:
    return []


@dataclass(frozen=True)
class StageKind:
    """What a stage of one kind may do, reads and asks.

    Attributes:
        name: As a recipe writes it.
        role: Gates drop rows for a fault and know no budget, shortlists choose rows, "adds" brings
            new ones, and "budget" alone spends it, last and once.
        options: Dataclass of its options.
        run: `package.module:function`, from `stages.context.Context` to `StageRun`; imported when a
            stage of this kind runs.
        models: Roles of the models it asks, by options and the recipe's budget.
        likelihoods: Whether it reads the rows' likelihoods under the target model, by options and
            budget; they are scored before it.
        found: Whether everything it asks of a model about the pool's rows is in the score table.
        sets: Roles of the evaluation sets it sees, by options.
        scorers: Names of the recipe's scorers it reads, by options.
        budgeted: Whether its decisions depend on the recipe's budget besides its options.
        inputs: What else its decisions depend on, by stage and recipe: JSON, hashed.
        seeded: Whether a field `seed` of its options is the recipe's seed.
        repeats: Kinds of gates that the rows it adds are held to.
        planted: Kinds of canaries that are planted before it; see `stages.canaries`.
        prompts: What it does with prompts that have no response: it "passes" or "answers" them, or
            None: it judges responses.
        from_budget: Options that are the recipe's budget, and are not stated again.
        complete: Fills options that the recipe decides, by what was given, the stages before and
            the recipe's budget.
        methods: Dataclasses of the options' `options` by their `method`, of a kind that has both.
        check: Refuses a stage at its place, by the stage and those before it.
        settle: Fills what only the whole recipe decides, as the models of roles, or refuses it.
        notes: Sentences for the report, by the stage and its facts.
        histogram: Column of its side table of the same name that the report draws, and its label.
    """

    name: str
    role: Role
    options: type
    run: str
    models: Callable[[Any, Any], tuple[str, ...]] = _nothing
    likelihoods: Callable[[Any, Any], bool] = lambda options, budget: False
    found: bool = False
    sets: Callable[[Any], tuple[str, ...]] = _nothing
    scorers: Callable[[Any], tuple[str, ...]] = _nothing
    budgeted: bool = False
    inputs: Callable[[Stage, Any], dict[str, Any]] = _no_inputs
    seeded: bool = True
    repeats: tuple[str, ...] = ()
    planted: tuple[str, ...] = ()
    prompts: Literal["passes", "answers"] | None = None
    from_budget: tuple[str, ...] = ()
    complete: Callable[[dict[str, Any], Sequence[Stage], Any], dict[str, Any]] = _as_given
    methods: Callable[[], Mapping[str, type]] = dict
    check: Callable[[Stage, Sequence[Stage]], None] = _anywhere
    settle: Callable[[Stage, Any], Stage] = _settled
    notes: Callable[[Stage, Mapping[str, Any]], list[str]] = _no_notes
    histogram: tuple[str, str] | None = None

    def runner(self) -> Callable[[Any], Any]:
        """The function that runs its stages."""
        module, _, name = self.run.partition(":")
        found: Callable[[Any], Any] = getattr(import_module(module), name)
        return found


def known() -> tuple[str, ...]:
    """Names of all kinds, those of installed packages last; none is imported."""
    return (*BUILT_IN, *registered(GROUP))


@cache
def kind_of(name: str) -> StageKind:
    """A kind by name.

    Raises:
        ValueError: if there is none, naming the nearest; or naming the package, if the name is
            taken twice, the entry point can't be loaded, or it gives something else.
    """
    if name in registered(GROUP):
        given = load_registered(GROUP, "stage", name, BUILT_IN)
        if not isinstance(given.found, StageKind) or given.found.name != name:
            raise ValueError(
                f"{given.what}: {given.value!r} is {given.found!r}: give its StageKind"
            )
        return given.found
    if name not in BUILT_IN:
        raise ValueError(f"unknown stage {name!r}: {nearest(name, known())}")
    found: StageKind = import_module(f"siftline.stages.{name}").KIND
    assert found.name == name
    return found
