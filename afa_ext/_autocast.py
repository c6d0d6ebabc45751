"""Autocast: these operators sum many terms, so under autocast they run in float32, as torch's own sums do."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_to_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """float16 and bfloat16 inputs become float32 where autocast is on for their device; else all stay."""
    return tuple(
        t.float()
        if isinstance(t, Tensor)
        and t.dtype in (torch.float16, torch.bfloat16)
        and torch.is_autocast_enabled(t.device.type)
        else t
        for t in tensors
    )
