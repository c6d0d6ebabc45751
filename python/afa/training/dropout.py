"""Dropout that does not depend on how the batch is divided among processes and micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SharedDropout2d(nn.Dropout2d):
    """Dropout2d whose mask is drawn for the whole batch, of which this process and micro-batch has a part.

    Masks are those that nn.Dropout2d would draw for the whole batch in one process, if it is the first to draw.
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
    """Turn every Dropout2d of `model` into a SharedDropout2d, in place."""
    for module in model.modules():
        if type(module) is nn.Dropout2d:
            module.__class__ = SharedDropout2d


def place_shared_dropout(model: nn.Module, seed: int, *, first: int, whole: int) -> None:
    """Set the seed of the next masks, and which of the batch's `whole` images come next: those from `first` on."""
    for module in model.modules():
        if isinstance(module, SharedDropout2d):
            module.seed, module.first, module.whole = seed, first, whole
