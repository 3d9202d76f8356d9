"""A selection method as the table of methods shows it."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from siftline.selectors.method import MAX_VALUES

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
    "target warm-up",  # the likelihood under the model trained on the target, as recipes make it
    "training",  # models trained between its rounds, which recipes alone do
]
Scope = Literal["bucketed", "global"]
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
        width: Values a row that the limit is stated for, where it is one of values: narrower rows
            may be more. None where the limit is one of rows.
        distribution: The package that registered it, None for siftline's and for import paths.
    """

    name: str
    method: type[Any]
    needs: tuple[Need, ...]
    scope: Scope
    limit: int
    good_for: str
    warning: str
    source: str
    width: int | None = None
    distribution: str | None = None

    @property
    def own(self) -> bool:
        """Whether it is a user's own, registered or by import path."""
        return ":" in self.name or self.distribution is not None

    @property
    def targeted(self) -> bool:
        """Whether it selects towards a target set."""
        return any(need.startswith("target") for need in self.needs)

    @property
    def conversations(self) -> bool:
        """Whether it wants whole conversations embedded, roles and all, and not their text."""
        return getattr(self.method, "EMBEDS", "text") == "conversation"

    def limit_at(self, width: int) -> int:
        """Most rows it takes where the vectors it reads have so many values a row."""
        return self.limit if self.width is None else MAX_VALUES // width

    def options(self) -> dict[str, Any]:
        """Its options with their defaults."""
        default = self.method()
        return {f.name: getattr(default, f.name) for f in dataclasses.fields(default) if f.init}

    def needed_columns(self, method: Any) -> tuple[str, ...]:
        """Score columns that a configured method reads beside what every row has."""
        given = {"id", "n_tokens", "source", "prompt_id", "embedding", "text"}
        asked = method.columns() if hasattr(method, "columns") else {}
        return tuple(name for name in asked if name not in given)
