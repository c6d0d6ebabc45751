"""Conversion of user-supplied paths for a run's configuration."""

from __future__ import annotations

import os

from afa.config.schema import Config


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration with absolute paths for data and weights, so that the run works from any directory."""
    weights = config.model.weights
    if weights is not None and os.path.isfile(os.path.expanduser(weights)):
        weights = absolute(weights)
    data = config.data.model_copy(update={"root": absolute(config.data.root)})
    return config.model_copy(update={"data": data, "model": config.model.model_copy(update={"weights": weights})})


def absolute(path: str) -> str:
    """The absolute path with a leading ~ expanded; symbolic links are kept."""
    return os.path.abspath(os.path.expanduser(path))
