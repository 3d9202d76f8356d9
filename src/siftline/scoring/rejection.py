"""What the rejection sampling stage is told; the bookkeeping is in `selectors.difficulty`."""

from dataclasses import dataclass
from typing import Literal

from siftline.scoring.engines import Sampling


@dataclass(frozen=True)
class RejectionSampling:
    """Draws answers from the sampler and keeps the first k distinct verified ones per prompt.

    Attributes:
        target: "prop2diff" wants more answers where the sampler fails more, "uniform" k everywhere
            (DART-Math, arXiv 2407.13690).
        k: Answers of a prompt, of the hardest one under prop2diff (DART-Math 40 and 192; smaller
            here because the budget decides what is used).
        pilot: Draws of every prompt that measure its pass rate; they count.
        cap: Most draws of a prompt.
        unsolved_cap: Most draws of a prompt never solved; None means a quarter of the cap.
        max_per_round: Most draws of a prompt between two looks at the results.
        max_quantile: Quantile of the difficulties that counts as the hardest.
        temperature: Of the draws (DART-Math searched 0.3 to 2.0 and took 1.6 for its sampler).
        top_p: Of the draws (DART-Math 0.95).
        max_new_tokens: Of the draws.
        verifier: Checks a draw against the prompt's independent answer.
        seed: The recipe's seed.
    """

    target: Literal["uniform", "prop2diff"] = "prop2diff"
    k: int = 4
    pilot: int = 4
    cap: int = 64
    unsolved_cap: int | None = None
    max_per_round: int = 16
    max_quantile: float = 1.0
    temperature: float = 1.0
    top_p: float = 0.95
    max_new_tokens: int = 256
    verifier: str = "math"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("k", "pilot", "cap", "max_per_round"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.pilot > self.cap:
            raise ValueError(f"pilot {self.pilot} is above cap {self.cap}: raise the cap")
        self.sampling  # noqa: B018  its own checks

    @property
    def sampling(self) -> Sampling:
        """How the draws are made."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)
