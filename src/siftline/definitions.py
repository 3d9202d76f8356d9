"""What Dagster loads: every recipe, composed; the code location that workspace.yaml names."""

from siftline.pipelines.compose import compose_all
from siftline.recipe.parse import read_all

defs = compose_all(*read_all())
