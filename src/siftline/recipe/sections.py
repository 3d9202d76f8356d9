"""The parts of a recipe besides its stages: what each may say, with its defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from siftline.ingest.pool import PoolSpec
from siftline.scoring.engines.base import ModelSpec
from siftline.training.finetune import FineTune
from siftline.training.pretrain import Pretrain

SET_ROLES = ("target", "dev", "test")
ARMS = ("full", "random", "random_clean", "random_sampled", "curated")
"""What may be trained; `stages.arms` says which rows each takes."""


@dataclass(frozen=True)
class Inputs:
    """A generator that writes a recipe's raw files.

    Attributes:
        generator: Import path `package.module:function`, called as
            `function(out, truth, seed=..., **args)`.
        args: Its further arguments; strings are expanded.
    """

    generator: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sets:
    """Evaluation sets by role.

    Attributes:
        target: What selectors may see of the task.
        dev: What thresholds are set on.
        test: What evaluation alone sees.
    """

    target: tuple[PoolSpec, ...] = ()
    dev: tuple[PoolSpec, ...] = ()
    test: tuple[PoolSpec, ...] = ()

    def items(self) -> list[tuple[str, PoolSpec]]:
        """All sets with their role."""
        return [(role, spec) for role in SET_ROLES for spec in getattr(self, role)]


@dataclass(frozen=True)
class Model:
    """A model by name: a local directory, or one trained here from text.

    Attributes:
        spec: How it is run; `spec.path` is empty where the model is trained here.
        pretrain: Size and schedule of a model trained from `corpus`.
        corpus: JSONL file of {"text": …} lines.
    """

    spec: ModelSpec
    pretrain: Pretrain | None = None
    corpus: str | None = None


@dataclass(frozen=True)
class Budget:
    """What the curated version may cost; stated once.

    Attributes:
        unit: Loss tokens of the target model, or rows.
        size: How many.
        on_shortfall: Whether a pool that cannot fill the budget is an error or a smaller version.
    """

    size: int
    unit: Literal["loss_tokens", "rows"] = "loss_tokens"
    on_shortfall: Literal["error", "smaller"] = "error"


@dataclass(frozen=True)
class Bounds:
    """What turns a stage red.

    Attributes:
        max_failed: Highest share of failed rows.
        max_removed: Highest share of rows a gate may remove (a filter that eats nearly everything
            is broken far more often than right).
    """

    max_failed: float = 0.01
    max_removed: float = 0.9


@dataclass(frozen=True)
class Canaries:
    """Defects planted beside the user's rows to measure every gate; see `stages.canaries`.

    Attributes:
        per_kind: Planted rows of each kind at each gate. 200 put a 95 % interval of at most 7
            points on either side of a rate.
    """

    per_kind: int = 200

    def __post_init__(self) -> None:
        if self.per_kind < 1:
            raise ValueError(f"per_kind is {self.per_kind}: plant 1 or more, or leave canaries out")


@dataclass(frozen=True)
class Card:
    """What the dataset card says besides the numbers.

    Attributes:
        license: Licence identifier of the Hub.
        description: One paragraph on what the data is for.
        language: Language codes.
        tags: Tags of the Hub.
    """

    license: str = "other"
    description: str = ""
    language: tuple[str, ...] = ("en",)
    tags: tuple[str, ...] = ("sft", "curated")


@dataclass(frozen=True)
class Training:
    """Fine-tuning arms, all at the loss tokens of the curated version times `epochs`.

    Attributes:
        options: Method and hyper-parameters, equal for all arms.
        arms: "curated", and what it is held against: the "full" pool, and "random" rows of the
            readable pool, of the deduplicated and decontaminated one ("random_clean"), or of that
            with as many draws of vanilla rejection sampling as the chain made ("random_sampled").
        epochs: Passes over the curated version; random arms get the same loss tokens.
        seeds: One training per arm and seed.
        reference: Names of the models whose mean log-probabilities objective poft compares with;
            they score the rows of every arm before training.
    """

    options: FineTune = field(default_factory=FineTune)
    arms: tuple[str, ...] = ("random", "curated")
    epochs: float = 1.0
    seeds: tuple[int, ...] = (0,)
    reference: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for arm in self.arms:
            if arm not in ARMS:
                raise ValueError(f"arm {arm!r} is unknown: choose {', '.join(ARMS)}")
        if not self.seeds:
            raise ValueError("seeds is empty: name at least one")
        poft, named = self.options.objective == "poft", ", ".join(self.reference)
        if poft and not named:
            raise ValueError(
                "objective poft needs reference models: name them, reference: [model, …]"
            )
        if named and not poft:
            raise ValueError(f"reference names {named}, which only objective poft reads: drop it")
        if len(set(self.reference)) != len(self.reference):
            raise ValueError(f"reference is {named}: name each model once")

    def check_models(self, models: Mapping[str, Model]) -> None:
        """Whether the reference models are there and can score.

        Raises:
            ValueError: if one is not among the recipe's, or only embeds.
        """
        for name in self.reference:
            if name not in models:
                known = ", ".join(models)
                raise ValueError(f"training.reference: no model {name!r}: choose {known}")
            if models[name].spec.engine == "sentence-transformers":
                raise ValueError(f"training.reference: {name!r} only embeds: name a causal model")
