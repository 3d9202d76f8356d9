"""S3FT: a response the model can say in its own words is replaced by them."""

from siftline.recipe.kinds import GATES, StageKind
from siftline.stages.s3ft.notes import notes
from siftline.stages.s3ft.options import SelfAnswers
from siftline.stages.verify.decide import verifier_of_rows

KIND = StageKind(
    name="s3ft",
    role="adds",
    options=SelfAnswers,
    run="siftline.stages.s3ft.run:run",
    models=lambda options, budget: options.roles,
    repeats=GATES,
    complete=verifier_of_rows,
    notes=notes,
)
