"""A registered selection method as a stage of a recipe."""

from dataclasses import dataclass, field, fields
from math import inf
from typing import Any

from siftline.config import build
from siftline.selectors.less import Gradients
from siftline.selectors.registry import Entry, find
from siftline.selectors.rounds import PERPLEXITY

LIKELIHOODS = (
    "n_tokens",
    "logprob_sum",
    "logprob_mean",
    "logprob_mean_unconditional",
    "perplexity",
    "ifd_loss_ratio",
    "ifd_perplexity_ratio",
    "entropy_mean",
    "top1_rate",
)
"""Numbers that scoring under the target model gives."""
COUNTED = ("n_words", "n_chars")
"""Numbers that every response has."""


@dataclass(frozen=True)
class Select:
    """Shortlists rows by a method of `siftline select --list`, or one by import path.

    Attributes:
        method: Its name, or `package.module:Class`.
        options: Its options; those left out have the method's own defaults.
        oversampling: What it may keep, as a multiple of the recipe's budget. More than 1 where
            gates follow.
        gradients: How gradient features are made, for methods that read them; null is all
            defaults.
        seed: The recipe's seed, for methods that draw.
    """

    method: str = "random"
    options: dict[str, Any] = field(default_factory=dict)
    oversampling: float = 1.0
    gradients: Gradients | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.oversampling < inf:
            raise ValueError(f"oversampling is {self.oversampling}: give a number above 0")
        if self.gradients is not None and not self.differentiates:
            raise ValueError(f"{self.method} reads no gradients: leave gradients out")
        self.configured()

    @property
    def entry(self) -> Entry:
        """What the registry says of the method."""
        return find(self.method)

    def configured(self) -> Any:
        """The method with its options.

        Raises:
            ValueError: if the method or an option is unknown, or a value is refused.
        """
        entry = self.entry
        seeded = "seed" in {f.name for f in fields(entry.method)}
        data = {**({"seed": self.seed} if seeded else {}), **self.options}
        return build(entry.method, data, f"options of {self.method}")

    def numbers(self) -> tuple[str, ...]:
        """Columns of numbers that the method reads."""
        return self.entry.needed_columns(self.configured())

    def scorers(self) -> tuple[str, ...]:
        """Those of them that only a quality scorer can give."""
        made = (self.configured().after,) if self.warms else ()
        return tuple(n for n in self.numbers() if n not in (*LIKELIHOODS, *COUNTED, *made))

    def asked(self) -> tuple[str, ...]:
        """The quality scorer that rows are asked for while the method runs, if there is one."""
        compare = getattr(self.configured(), "compare", PERPLEXITY) if self.trains else PERPLEXITY
        return () if compare == PERPLEXITY else (compare,)

    @property
    def differentiates(self) -> bool:
        """Whether it reads gradient features."""
        return "gradients" in self.entry.needs

    @property
    def warms(self) -> bool:
        """Whether it reads likelihoods under the model warmed up on the target."""
        return "target warm-up" in self.entry.needs

    @property
    def trains(self) -> bool:
        """Whether it trains models between its rounds."""
        return "training" in self.entry.needs

    @property
    def embeds(self) -> bool:
        """Whether it reads embeddings."""
        return bool({"embeddings", "target embeddings"} & set(self.entry.needs))

    def likelihoods(self, unit: str) -> bool:
        """Whether rows must be scored under the target model, under a budget of this unit."""
        own = self.configured()
        read = set(own.columns()) if hasattr(own, "columns") else set()
        return unit == "loss_tokens" or bool({*read, *self.numbers()} & set(LIKELIHOODS))
