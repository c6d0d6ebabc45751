"""Normalization of 8-bit images with the mean and standard deviation of a timm model's pretraining."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Normalization:
    """(x / 255 - mean) / std per RGB channel; the default is ImageNet's."""

    mean: Channels = (0.485, 0.456, 0.406)
    std: Channels = (0.229, 0.224, 0.225)

    @classmethod
    def of_timm(cls, settings: Mapping[str, Any] | None) -> Normalization:
        """The constants of a timm model's `pretrained_cfg` (CLIP's and SigLIP's differ); ImageNet's if it has none."""
        settings = settings or {}
        mean, std = settings.get("mean") or cls.mean, settings.get("std") or cls.std
        return cls(*((float(a), float(b), float(c)) for a, b, c in (mean, std)))

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] -> float32 [B, 3, H, W], channels last in memory."""
        # One multiplication and one addition per value.
        scale = torch.tensor([1 / (255 * std) for std in self.std], device=images.device)
        shift = torch.tensor([-mean / std for mean, std in zip(self.mean, self.std, strict=True)], device=images.device)
        values = images.to(torch.float32, memory_format=torch.channels_last)
        return values.mul_(scale.view(3, 1, 1)).add_(shift.view(3, 1, 1))
