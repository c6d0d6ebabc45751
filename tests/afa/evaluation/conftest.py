"""A random model and the tiny validation split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from afa.config import Config
from afa.data.dataset import TaggedDataset
from afa.model import AFANet, build_model


@pytest.fixture
def setting(tiny_config: Any, voc_root: Path) -> tuple[AFANet, TaggedDataset, Config]:
    torch.manual_seed(0)
    config = tiny_config()
    model = build_model(config.model, 3).eval()
    model.classifier.weight.data.normal_()
    model.get_parameter("decoder.predict.weight").data.normal_()
    return model, TaggedDataset(voc_root, "val", train=False, with_mask=True), config
