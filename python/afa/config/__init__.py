"""Configuration: every key with its type and range, and reading it from YAML files and the command line."""

from afa.config.load import (
    READY,
    SECTIONS,
    Config,
    DataConfig,
    EvalConfig,
    LabelConfig,
    ModelConfig,
    TrainConfig,
    apply_override,
    from_dict,
    load_config,
    ready_names,
    resolve,
    to_dict,
    to_yaml,
    validate,
)

__all__ = [
    "READY",
    "SECTIONS",
    "Config",
    "DataConfig",
    "EvalConfig",
    "LabelConfig",
    "ModelConfig",
    "TrainConfig",
    "apply_override",
    "from_dict",
    "load_config",
    "ready_names",
    "resolve",
    "to_dict",
    "to_yaml",
    "validate",
]
