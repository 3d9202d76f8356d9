"""How many prompts a shortlist needs, as a recipe states it."""

from dataclasses import dataclass
from typing import Literal

from siftline.stages.diversity.decide import Diversity, shortlist_size


@dataclass(frozen=True)
class Shortlist:
    """The diversity stage: which prompts are worth model calls.

    Attributes:
        size: Prompts to keep; null means budget x oversampling / keep_rate.
        oversampling: Rows wanted after all gates per row of the budget.
        keep_rate: Rows a shortlisted prompt is expected to yield after all gates. The allocate
            stage of a run reports the measured one (`yield_per_prompt`).
        clusters: Number of clusters; null means round(sqrt(n / 2)) for n prompts.
        quota: Prompts of a cluster: "proportional" to its size (kMQ), or "equal".
        weight: Weight of a prompt in the draw: "uniform", or one of the recipe's scorers.
        seed: The recipe's seed.
    """

    size: int | None = None
    oversampling: float = 3.0
    keep_rate: float = 1.0
    clusters: int | None = None
    quota: Literal["proportional", "equal"] = "proportional"
    weight: str = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        self.diversity(1, 1)

    def diversity(self, budget_rows: int, prompts: int) -> Diversity:
        """The selector for a budget and a number of prompts in play."""
        size = self.size
        if size is None:
            size = shortlist_size(budget_rows, self.oversampling, self.keep_rate)
        clusters = None if self.clusters is None else min(self.clusters, prompts)
        return Diversity(min(size, prompts), clusters, self.quota, self.weight, self.seed)
