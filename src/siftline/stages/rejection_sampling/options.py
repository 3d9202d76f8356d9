"""What the rejection sampling stage is told."""

from dataclasses import dataclass
from typing import Literal

from siftline.scoring.engines.base import Sampling
from siftline.stages.rejection_sampling.difficulty import HARDEST
from siftline.stages.verify.decide import check_verifier

SOURCE = "sampler"
"""Source of the rows that are added."""
JUDGE = "judge"
"""Verifier that asks the recipe's judge whether draw and reference come to the same answer."""
NONE = "none"
"""No verifier: every whole and sound draw counts, of prompts without an answer too."""


@dataclass(frozen=True)
class RejectionSampling:
    """Draws answers from the sampler and keeps the first k distinct verified ones per prompt.

    Attributes:
        target: "prop2diff" wants more answers where the model fails more, "uniform" k everywhere
            (DART-Math, arXiv 2407.13690), "vanilla" all that k draws of every prompt give, and
            "scores" what the scorer `target_scores` says of the prompt, at most k.
        k: Answers of a prompt, of the hardest one under prop2diff (DART-Math 40 and 192; smaller
            here, where few can pay for so many draws); draws of a prompt under vanilla. The budget
            stage keeps as many.
        target_scores: Scorer of the recipe whose highest score among a prompt's rows, rounded, is
            its target under "scores". A prompt without a score, or with one below 1, gets none.
        difficulty: Whose pass rate sets the targets: the "target" model's, which learns from the
            answers, or the "sampler"'s. Cost is always the sampler's. One pilot does for both where
            they are one model.
        pilot: Draws of every prompt that measure its pass rate; they count.
        cap: Most draws of a prompt; vanilla has k instead. A prompt is given up as soon as its
            draws and those that its target is still expected to cost pass it.
        unsolved_cap: Most draws of a prompt never solved, whatever they are expected to cost; null
            goes by the expected cost there too.
        max_quantile: Quantile of the difficulties that counts as the hardest; of fewer than 100
            prompts the default is the maximum.
        max_similarity: Jaccard similarity of words from which an answer counts as a copy of one
            that the prompt has already; 1 takes only the same text for a copy.
        screen: Also refuse cut, repetitive and wrong-language answers.
        negatives: Refuted answers of a prompt that are kept for preference pairs.
        max_draws: Most draws of this stage, pilots included; null sets no limit. When they run out,
            the trials that are cheapest to finish have been finished first.
        max_tokens: Most tokens of these draws. What a server generated for a request that was lost
            or timed out is not known, and not counted.
        temperature: Temperature of the draws (DART-Math searched 0.3 to 2.0 and took 1.6 for its
            sampler).
        top_p: Draws come from the smallest set of tokens that holds this probability (DART-Math
            0.95).
        max_new_tokens: Most tokens of a draw.
        verifier: Checks a draw against the prompt's independent answer. By default that of the
            verify stage before it, or math. "judge" asks the recipe's judge in both orders; a
            judge errs, so such draws make no set of verifiable prompts. "none" verifies nothing,
            and takes prompts without an answer too: OpenThoughts (arXiv 2506.04178) found sixteen
            answers a prompt to help, and verifying them to bring little. It measures no difficulty,
            so the target is then vanilla or uniform.
        seed: The recipe's seed.
    """

    target: Literal["uniform", "prop2diff", "vanilla", "scores"] = "prop2diff"
    k: int = 4
    target_scores: str | None = None
    difficulty: Literal["target", "sampler"] = "target"
    pilot: int = 4
    cap: int = 64
    unsolved_cap: int | None = None
    max_quantile: float = HARDEST
    max_similarity: float = 1.0
    screen: bool = True
    negatives: int = 4
    max_draws: int | None = None
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 0.95
    max_new_tokens: int = 256
    verifier: str = "math"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("k", "pilot", "cap", "unsolved_cap", "max_draws", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        if self.pilot > self.cap:
            raise ValueError(f"pilot {self.pilot} is above cap {self.cap}: raise the cap")
        if self.unsolved_cap is not None and self.unsolved_cap > self.cap:
            raise ValueError(
                f"unsolved_cap {self.unsolved_cap} is above cap {self.cap}: raise the cap"
            )
        if (self.target == "scores") != (self.target_scores is not None):
            raise ValueError(
                "target scores needs target_scores, a scorer of the recipe; other targets take none"
            )
        if not 0 < self.max_quantile <= 1:
            raise ValueError(
                f"max_quantile is {self.max_quantile}: give a number above 0, at most 1"
            )
        if not 0 < self.max_similarity <= 1:
            raise ValueError(
                f"max_similarity is {self.max_similarity}: give a number above 0, at most 1"
            )
        check_verifier(self.verifier, JUDGE, NONE)
        if self.verifier == NONE and self.target not in ("uniform", "vanilla"):
            raise ValueError(
                f"target is {self.target!r}, and verifier none measures no difficulty and proves "
                "no answer: set target to vanilla or uniform"
            )
        if self.negatives < 0:
            raise ValueError(f"negatives is {self.negatives}: it must be 0 or more")
        self.sampling  # noqa: B018  its own checks

    @property
    def more_roles(self) -> tuple[str, ...]:
        """Models it asks besides the sampler."""
        driven = self.target == "prop2diff" and self.difficulty == "target"
        return (*(["target"] if driven else []), *(["judge"] if self.verifier == JUDGE else []))

    @property
    def sampling(self) -> Sampling:
        """How the draws are made."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)
