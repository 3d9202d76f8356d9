"""What the confidence stage is told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from siftline.scoring.engines.base import Sampling
from siftline.stages.confidence.decide import BSDETECTOR, ConfidenceGate

if TYPE_CHECKING:
    from siftline.stages.confidence.calibration import Joint


@dataclass(frozen=True)
class Confidence:
    """The confidence stage.

    Attributes:
        samples: Draws per prompt (BSDetector k = 5).
        temperature: Temperature of the draws (BSDetector 1.0).
        top_p: Draws come from the smallest set of tokens that holds this probability.
        max_new_tokens: Most tokens of a draw.
        answers: "math" compares final answers, "exact" whole responses without case and space. By
            default "exact" behind a verify stage with the verifier exact or verbatim.
        similarity: What stands in for agreement where a response, or each of its samples, has no
            final answer to compare: "nli" (BSDetector's own), "embedding", or "off". "auto" is nli
            where the recipe's roles name one, else embedding. Not used where `weights` are given.
        reflection: "auto" uses it where its AUROC on dev is above chance, and where there is no
            dev; "on" and "off" insist.
        questions: Questions of reflection: 1 asks whether the answer is right; 2 asks again after
            the judge's own reply, and takes the mean (BSDetector asks twice).
        weight_consistency: Share of consistency in the score (BSDetector beta = 0.7), the rest
            being reflection's; not used where `weights` are given.
        weights: Weight by part, in any unit. Parts are agreement, jaccard, embedding, nli,
            reflection and perplexity. TLM's default is about 0.33 consistency, 0.47 reflection,
            0.20 perplexity.
        join: How parts become one number: "auto" is the probability that the answer is right, by a
            logistic model of the parts with a weight, learnt on dev; where dev is too small for
            that, and with "weights", it is the weighted mean.
        threshold: "absolute" cuts at `cut`, which is then a probability, and the quantile `cut`
            where there is none to be had; "quantile" at that quantile; "median" drops about half
            whatever the data is like (CLEAR).
        cut: The threshold, or the quantile.
        seed: The recipe's seed.
    """

    samples: int = 5
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    answers: Literal["math", "exact"] = "math"
    similarity: Literal["auto", "nli", "embedding", "off"] = "auto"
    reflection: Literal["auto", "on", "off"] = "auto"
    questions: Literal[1, 2] = 1
    weight_consistency: float = BSDETECTOR["agreement"]
    weights: dict[str, float] = field(default_factory=dict)
    join: Literal["auto", "weights"] = "auto"
    threshold: Literal["absolute", "quantile", "median"] = "absolute"
    cut: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}: draw at least 1 per prompt")
        if self.questions not in (1, 2):
            raise ValueError(f"questions is {self.questions}: ask 1 or 2")
        if not 0 <= self.weight_consistency <= 1:
            raise ValueError(
                f"weight_consistency is {self.weight_consistency}: give a number from 0 to 1"
            )
        self.sampling  # noqa: B018  its own checks
        self.gate(self.weighing)

    @property
    def sampling(self) -> Sampling:
        """How the draws are made."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)

    @property
    def weighing(self) -> dict[str, float]:
        """Weight by part, as far as the options alone settle it."""
        share = self.weight_consistency
        found = dict(self.weights) or {"agreement": share, "reflection": 1.0 - share}
        return without_reflection(found) if self.reflection == "off" else found

    @property
    def stand_in(self) -> str | None:
        """The part that rows without a final answer have instead of agreement, if any."""
        asked = self.weighing.get("agreement", 0.0) > 0 and self.answers != "exact"
        if self.weights or not asked or self.similarity == "off":
            return None
        return "nli" if self.similarity == "nli" else "embedding"

    def with_stand_in(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Weights in which the stand-in weighs what agreement does; no row has both."""
        if self.stand_in is None:
            return dict(weights)
        return {**weights, self.stand_in: weights["agreement"]}

    @property
    def more_roles(self) -> tuple[str, ...]:
        """Roles of the models it asks besides sampler and judge."""
        roles = {"embedding": "embedder", "nli": "nli"}
        asked = {part for part, weight in self.weighing.items() if weight > 0} | {self.stand_in}
        return tuple(role for part, role in roles.items() if part in asked)

    def check_after(self, kinds: Sequence[str], where: str) -> None:
        """Refuses a weight for what no stage before this one gives.

        Args:
            kinds: Of the stages before it.
            where: Its place in the recipe.

        Raises:
            ValueError: if perplexity has a weight and no likelihood stage comes before.
        """
        if self.weighing.get("perplexity", 0.0) > 0 and "likelihood" not in kinds:
            raise ValueError(
                f"{where}: weights name perplexity, which the likelihood stage gives: put "
                "likelihood before it"
            )

    def gate(self, weights: Mapping[str, float], joint: "Joint | None" = None) -> ConfidenceGate:
        """The gate with the weights, or the probability, that calibration settled on.

        A weighted mean is no probability: without one an absolute cut is read as a quantile, unless
        the recipe insists on the weighted mean.
        """
        unknown = joint is None and self.join == "auto" and self.threshold == "absolute"
        threshold = "quantile" if unknown else self.threshold
        return ConfidenceGate(threshold, self.cut, dict(weights), joint)


def without_reflection(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights of the other parts, scaled to sum to 1; agreement's where all were reflection's.

    Raises:
        ValueError: if reflection is the only part there is.
    """
    left = {part: weight for part, weight in weights.items() if part != "reflection"}
    total = sum(left.values())
    if not total and "agreement" not in left:
        raise ValueError(
            "weights: reflection is the only part, and gets no weight here: add another, say "
            "agreement"
        )
    if not total:
        return {**left, "agreement": 1.0}
    return {part: weight / total for part, weight in left.items()}
