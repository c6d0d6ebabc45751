"""Paths that a user typed, as a run's configuration keeps them."""

from __future__ import annotations

import os
from dataclasses import replace

from afa.config import Config


def with_absolute_paths(config: Config) -> Config:
    """The configuration with the paths of data and weights absolute and ~ expanded, so that the run is measured and
    resumed from any working folder."""
    weights = config.model.weights
    if weights is not None and os.path.isfile(os.path.expanduser(weights)):
        weights = absolute(weights)
    data = replace(config.data, root=absolute(config.data.root))
    return replace(config, data=data, model=replace(config.model, weights=weights))


def absolute(path: str) -> str:
    """The path from the root of the file system, with a leading ~ expanded; links stay as they are."""
    return os.path.abspath(os.path.expanduser(path))
