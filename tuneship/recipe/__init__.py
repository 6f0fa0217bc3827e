"""The recipe: one YAML file that says everything about a run.

Precedence: defaults < file < the tutorial's environment names < `--set section.key=value`. A key
that does not exist, a value of the wrong type and a setting that would have no effect are errors.

    recipe = load("tiny", overrides=["train.seed=1"])
    print(dump(recipe))
"""

from tuneship.recipe.reading import ENVIRONMENT, MAX_RECIPE_BYTES, dump, find, load, share, shipped, validate
from tuneship.recipe.schema import (
    Cluster,
    Columns,
    Data,
    Evaluate,
    Gate,
    Lora,
    Model,
    Publish,
    Recipe,
    Serve,
    Train,
)

__all__ = [
    "ENVIRONMENT",
    "MAX_RECIPE_BYTES",
    "Cluster",
    "Columns",
    "Data",
    "Evaluate",
    "Gate",
    "Lora",
    "Model",
    "Publish",
    "Recipe",
    "Serve",
    "Train",
    "dump",
    "find",
    "load",
    "share",
    "shipped",
    "validate",
]
