"""Full-size label maps from low-resolution scores, without allocating full-size scores."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

_PIXELS = 1 << 20
"""Number of pixels per strip of rows."""


def upsampled_labels(scores: Tensor, height: int, width: int) -> NDArray[np.uint8]:
    """Upsample scores [C, h, w] bilinearly, as F.interpolate(align_corners=False), and return the class with the
    largest score, uint8 [height, width]. Interpolating scores instead of classes gives smooth borders."""
    scores = scores.float()
    if scores.shape[1:] == (height, width):
        return scores.argmax(0).to(torch.uint8).cpu().numpy()
    labels = np.empty((height, width), np.uint8)
    rows = scores.shape[1]
    strip = max(1, _PIXELS // width)
    for top in range(0, height, strip):
        centers = torch.arange(top, min(height, top + strip), device=scores.device) + 0.5
        source = (centers * (rows / height) - 0.5).clamp(0, rows - 1)
        low = source.floor().long()
        high = (low + 1).clamp(max=rows - 1)
        part = torch.lerp(scores[:, low], scores[:, high], (source - low)[None, :, None])
        wide = F.interpolate(part[None], size=(len(centers), width), mode="bilinear", align_corners=False)[0]
        labels[top : top + len(centers)] = wide.argmax(0).to(torch.uint8).cpu().numpy()
    return labels
