"""Likelihood: responses that the target model finds unlike all others of their source."""

from siftline.recipe.kinds import StageKind
from siftline.stages.likelihood.decide import LikelihoodOutliers

KIND = StageKind(
    name="likelihood",
    role="gate",
    options=LikelihoodOutliers,
    run="siftline.stages.likelihood.run:run",
    models=lambda options, budget: ("target",),
    likelihoods=lambda options, budget: True,
    found=True,
    planted=("swapped_answer", "truncated", "one_number"),
    histogram=("logprob_mean", "mean log-probability of the response, nats"),
)
