"""Tuneship: one recipe, from rows to a tuned, measured, published and served model.

Importing this package is free: no torch, no transformers, no metaflow. Each stage is a module
with a function of the same name (`tuneship.train.train`) and a verb of the same name
(`tuneship train`).
"""

__version__ = "0.1.0"
