"""Phases, learning rates and parameter groups, as functions of iteration and configuration."""

from __future__ import annotations

from typing import Any

from torch import nn

from afa.config import TrainConfig
from afa.model.network import AFANet

PHASES = ("classify", "par", "walk")


def phase_of(config: TrainConfig, iteration: int) -> str:
    """Phase of an iteration counted from 0. As published, a phase ends after, not before, its last iteration."""
    if iteration <= config.classify_until:
        return "classify"
    return "par" if iteration <= config.par_until else "walk"


def ends_phase(config: TrainConfig, iteration: int) -> bool:
    """Whether an iteration counted from 0 is the last of its phase or of the run."""
    return iteration + 1 == config.iterations or phase_of(config, iteration) != phase_of(config, iteration + 1)


def learning_rate_factor(config: TrainConfig, iteration: int) -> float:
    """Learning rate factor of all groups at an iteration counted from 0: linear warmup from warmup_ratio to 1, then
    polynomial decay (1 - iteration/iterations)^poly_power."""
    if iteration < config.warmup:
        return config.warmup_ratio + (1 - config.warmup_ratio) * iteration / config.warmup
    return (1 - iteration / config.iterations) ** config.poly_power


def ema_decay(config: TrainConfig, iteration: int) -> float:
    """EMA decay after the update of an iteration counted from 0: train.ema, but smaller at first, so that the initial
    weights are forgotten quickly."""
    return min(config.ema, (iteration + 1) / (iteration + 10))


def step_seed(config: TrainConfig, iteration: int, part: int = 0) -> int:
    """Seed of an iteration. It does not depend on earlier iterations, so a resumed run repeats exactly.

    part: index of the batch part, if processes or `train.accumulate` split the batch; seeds repeat after 256 parts.
    """
    return (config.seed << 32) + (part % 256 << 24) + iteration


def parameter_groups(model: AFANet, config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW groups: backbone, backbone norms (lr x norm_lr_factor, no weight decay), heads (lr x head_lr_factor), each
    without the parameters that model.freeze froze.

    A norm_lr_factor of 0 freezes the norms; their gradients are not computed.
    """
    norm_ids = {
        id(parameter)
        for module in model.backbone.modules()
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm))
        for parameter in module.parameters(recurse=False)
    }
    own = list(model.backbone.parameters())
    inside = {id(parameter) for parameter in own}
    norms = [parameter for parameter in own if id(parameter) in norm_ids]
    if config.norm_lr_factor == 0:
        for parameter in norms:
            parameter.requires_grad_(False)
    groups = {
        "backbone": ([p for p in own if id(p) not in norm_ids], 1.0),
        "norms": (norms if config.norm_lr_factor else [], config.norm_lr_factor),
        "heads": ([p for p in model.parameters() if id(p) not in inside], config.head_lr_factor),
    }
    return [
        {
            "name": name,
            "params": [parameter for parameter in parameters if parameter.requires_grad],
            "base_lr": config.lr * factor,
            "lr": config.lr * factor,
            "weight_decay": 0.0 if name == "norms" else config.weight_decay,
        }
        for name, (parameters, factor) in groups.items()
        if any(parameter.requires_grad for parameter in parameters)
    ]
