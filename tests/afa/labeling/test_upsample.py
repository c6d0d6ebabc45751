"""Full-size label maps from small scores, and images drawn in strips."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from afa.data import visualize
from afa.data.visualize import heat, overlay
from afa.labeling import upsample
from afa.labeling.upsample import upsampled_labels


@pytest.mark.parametrize("size", [(33, 47), (90, 31), (200, 300), (7, 9), (5, 4)])
def test_labels_are_those_of_the_whole_picture(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(5, 7, 9, generator=torch.Generator().manual_seed(1))
    whole = F.interpolate(scores[None].double(), size=size, mode="bilinear", align_corners=False)[0]
    best = whole.topk(2, 0).values
    clear = (best[0] - best[1] > 1e-5).numpy()
    for pixels in (1, 500, 1 << 20):
        monkeypatch.setattr(upsample, "_PIXELS", pixels)
        labels = upsampled_labels(scores, *size)
        assert labels.dtype == np.uint8 and labels.shape == size
        assert (labels == whole.argmax(0).numpy())[clear].all()
        assert clear.mean() > 0.99


def test_a_slanted_border_has_no_steps() -> None:
    y, x = np.mgrid[:16, :16]
    scores = torch.from_numpy(np.stack([x - y + 0.21, y - x]).astype(np.float32))
    labels = upsampled_labels(scores, 160, 160)
    first = (labels == 1).argmax(0)[8:-8]
    assert abs(np.diff(first)).max() <= 1  # enlarged labels would step by 10


@pytest.mark.parametrize("draw", [overlay, heat])
def test_strips_do_not_change_the_result(draw: object, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (37, 23, 3)).astype(np.uint8)
    second = rng.choice(np.array([0, 1, 2, 255], np.uint8), (37, 23)) if draw is overlay else rng.random((37, 23))
    found = []
    for rows in (1, 5, 37, 100):
        monkeypatch.setattr(
            visualize,
            "_strips",
            lambda height, _, rows=rows: (slice(i, min(height, i + rows)) for i in range(0, height, rows)),
        )
        found.append(draw(picture, second))  # type: ignore[operator]
    assert all(np.array_equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("draw", ["overlay", "heat"])
@pytest.mark.slow
def test_memory_of_a_large_picture(draw: str) -> None:
    code = f"""
import resource, numpy as np
from afa.data.visualize import {draw}
picture, second = np.zeros((4000, 3000, 3), np.uint8), np.zeros((4000, 3000), np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{draw}(picture, second)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 / 12)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 10, "megabytes per megapixel"
