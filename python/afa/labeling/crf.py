"""Dense CRF of a segmentation (Krähenbühl and Koltun, NeurIPS 2011), on the device of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import afa_ext
from afa.config import EvalConfig


def crf_settings(config: EvalConfig) -> dict[str, Any]:
    """Keyword arguments of `afa_ext.dense_crf`: those of eval.crf_preset, with the other crf settings that are set."""
    chosen = {
        "num_iter": config.crf_iterations,
        "gaussian": config.crf_gaussian,
        "bilateral": config.crf_bilateral,
    }
    return {
        **afa_ext.CRF_PRESETS[config.crf_preset],
        **{name: value for name, value in chosen.items() if value is not None},
    }


@torch.inference_mode()
def crf_probabilities(
    images: Tensor, logits: Tensor, config: EvalConfig, *, class_mask: Tensor | None = None
) -> Tensor:
    """Class probabilities after mean-field inference, for a whole batch.

    images: uint8 [B, 3, H, W]. logits: [B, C, H, W] on the same device. class_mask: bool [B, C]; classes that are False
    take no part.

    Returns float32 [B, C, H, W]. Raises RuntimeError if a standard deviation is too small for the lattice.
    """
    probabilities = logits.float().softmax(1)
    return afa_ext.dense_crf(images, probabilities, class_mask=class_mask, **crf_settings(config))
