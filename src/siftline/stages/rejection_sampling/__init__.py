"""Rejection sampling: verified answers of a sampler, more of them to harder prompts (DART-Math)."""

from siftline.recipe.kinds import GATES, StageKind
from siftline.stages.rejection_sampling.notes import notes
from siftline.stages.rejection_sampling.options import RejectionSampling
from siftline.stages.verify.decide import verifier_of_rows

KIND = StageKind(
    name="rejection_sampling",
    role="adds",
    options=RejectionSampling,
    run="siftline.stages.rejection_sampling.run:run",
    models=lambda options, budget: ("sampler", *options.more_roles),
    scorers=lambda options: () if options.target_scores is None else (options.target_scores,),
    repeats=GATES,
    prompts="answers",
    complete=verifier_of_rows,
    notes=notes,
)
