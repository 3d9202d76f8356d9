"""What Dagster loads: every recipe, composed; the code location that workspace.yaml names."""

from siftline.library import all_recipes
from siftline.pipelines.compose import compose

defs = compose(all_recipes())
