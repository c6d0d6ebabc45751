"""Dropout that is independent of how the batch is split over processes and micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SharedDropout2d(nn.Dropout2d):
    """Dropout2d that generates the mask of the whole batch and applies the part of this process and micro-batch.

    The masks equal those of nn.Dropout2d for the whole batch in one process, if it is the first random operation.
    """

    seed = 0
    first = 0
    whole = 0

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        generator = torch.Generator(input.device).manual_seed(self.seed)
        keep = torch.empty(self.whole, input.shape[1], 1, 1, device=input.device, dtype=input.dtype)
        keep.bernoulli_(1 - self.p, generator=generator).div_(1 - self.p)
        return input * keep[self.first : self.first + len(input)]


def share_dropout(model: nn.Module) -> None:
    """Convert every Dropout2d of `model` to SharedDropout2d in place."""
    for module in model.modules():
        if type(module) is nn.Dropout2d:
            module.__class__ = SharedDropout2d


def place_shared_dropout(model: nn.Module, seed: int, *, first: int, whole: int) -> None:
    """Set the seed of the next masks, the batch offset `first` of the next images, and the batch size `whole`."""
    for module in model.modules():
        if isinstance(module, SharedDropout2d):
            module.seed, module.first, module.whole = seed, first, whole
