"""What the self-answers stage is told (S3FT, arXiv 2502.08130)."""

from dataclasses import dataclass

from siftline.scoring.engines.base import Sampling
from siftline.stages.rejection_sampling.options import JUDGE
from siftline.stages.verify.decide import check_verifier

PARAPHRASE = (
    "{prompt}\n\nA correct answer is:\n{response}\n\nWrite this answer again in your own words. "
    "Keep its result and give nothing but the answer."
)
"""The question that asks the model for the reference in its own words."""


@dataclass(frozen=True)
class SelfAnswers:
    """Trains a model on what it would say itself, where that is right.

    For each row with an independent answer, or under a judge for each row: the target model's own
    answer if it verifies, else its paraphrase of the row's response if that verifies, else the row
    as it is. Tuning then moves the
    model less, and it forgets less (the paper: 2.5 points lost on general benchmarks against up to
    4.4). GRAPE (arXiv 2502.04194) reports the opposite of training on own outputs alone: read the
    shares, and hold the result against the rows as they were.

    Attributes:
        draws: Own answers tried for each row of a prompt.
        paraphrases: Paraphrases tried for a row that no own answer serves; 0 tries none.
        temperature: Temperature of all draws; 0 gives one answer however many are tried.
        top_p: Draws come from the smallest set of tokens that holds this probability.
        max_new_tokens: Most tokens of a draw.
        verifier: Checks a draw against the row's independent answer. By default that of the
            verify stage before it, or math. "judge" asks the recipe's judge in both orders whether
            a draw comes to the same as the answer, or as the response of a row that has none: the
            paper's way for tasks without a rule.
        screen: Also refuse cut, repetitive and wrong-language answers.
        seed: The recipe's seed.
    """

    draws: int = 2
    paraphrases: int = 2
    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 256
    verifier: str = "math"
    screen: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws is {self.draws}: it must be at least 1")
        if self.paraphrases < 0:
            raise ValueError(f"paraphrases is {self.paraphrases}: it must be 0 or more")
        check_verifier(self.verifier, JUDGE)
        self.sampling  # noqa: B018  its own checks

    @property
    def roles(self) -> tuple[str, ...]:
        """Models it asks."""
        return ("target", JUDGE) if self.verifier == JUDGE else ("target",)

    @property
    def sampling(self) -> Sampling:
        """How the draws are made."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)
