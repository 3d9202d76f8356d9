"""What Dagster loads: every recipe, composed; the code location that workspace.yaml names."""

from siftline.pipelines.compose import compose
from siftline.recipe.parse import all_recipes

defs = compose(all_recipes())
