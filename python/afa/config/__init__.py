"""Configuration: every key with its type and range, and reading it from YAML files and the command line."""

from afa.config.load import (
    from_dict,
    json_schema,
    load_config,
    ready_names,
    resolve,
    to_dict,
    to_yaml,
    validate,
    with_overrides,
)
from afa.config.paths import with_absolute_paths
from afa.config.schema import Config, DataConfig, EvalConfig, LabelConfig, ModelConfig, TrainConfig

__all__ = [
    "Config",
    "DataConfig",
    "EvalConfig",
    "LabelConfig",
    "ModelConfig",
    "TrainConfig",
    "from_dict",
    "json_schema",
    "load_config",
    "ready_names",
    "resolve",
    "to_dict",
    "to_yaml",
    "validate",
    "with_absolute_paths",
    "with_overrides",
]
