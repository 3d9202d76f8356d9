"""Auto-Correct (CLEAR, arXiv 2403.12776): its options."""

from dataclasses import dataclass, field

from siftline.scoring.engines.base import Sampling
from siftline.stages.correct.decide import CorrectionRule
from siftline.training.finetune import FineTune


@dataclass(frozen=True)
class Correct:
    """Replaces doubtful responses by a fine-tuned model's, where a judge prefers them.

    A model fine-tuned on the rows in play proposes an answer to every prompt that the confidence
    gate judged, those it removed included. Where the judge prefers it in both orders, more surely
    than `confidence`, it takes the response's place.

    Attributes:
        folds: Parts the prompts are dealt to; each is served by a model trained on the others.
            1 trains one model on all, as CLEAR does: it repeats the errors it has memorised.
        confidence: Bound on the judge's mean probability for its choice (CLEAR's eta, 0.8). 1 or
            more changes nothing, and the side table still says what would have been proposed.
        training: How the models are fine-tuned, epochs included.
        max_new_tokens: Most tokens of a candidate (CLEAR 512), which is decoded greedily.
        verifier: Checks a candidate against the row's independent answer, where it has one; a
            candidate that does not come to it is never taken. null checks none.
        seed: The recipe's seed.
    """

    folds: int = 2
    confidence: float = 0.8
    training: FineTune = field(default_factory=FineTune)
    max_new_tokens: int = 512
    verifier: str | None = "math"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.folds < 1:
            raise ValueError(f"folds is {self.folds}: 1 trains on all rows, 2 or more cross-fit")
        if self.training.objective == "poft":
            raise ValueError("training.objective poft needs reference scores, which rows have not")
        if self.training.keep == "best":
            raise ValueError("training.keep is 'best': these models see no dev rows, keep last")
        if self.training.phases:
            raise ValueError(
                "training.phases name sources, which the rows of a fold may lack: leave them out"
            )
        self.rule  # noqa: B018  its own checks
        self.sampling  # noqa: B018

    @property
    def rule(self) -> CorrectionRule:
        """When a candidate is taken."""
        return CorrectionRule(self.confidence)

    @property
    def sampling(self) -> Sampling:
        """How candidates are decoded."""
        return Sampling(self.max_new_tokens, temperature=0.0)
