"""Autocast: these operators sum many terms, so under autocast they run in float32, like torch's own sums."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_to_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Convert float16 and bfloat16 inputs to float32 if autocast is enabled for their device."""
    return tuple(
        t.float()
        if isinstance(t, Tensor)
        and t.dtype in (torch.float16, torch.bfloat16)
        and torch.is_autocast_enabled(t.device.type)
        else t
        for t in tensors
    )
