"""Dense CRF: compared with mean-field inference by definition, and run in worker processes."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, cast

import numpy as np
import pytest

from afa.config import EvalConfig
from afa.errors import UserError
from afa.labeling.crf import CrfPool, CrfSettings, dense_crf

PUBLISHED = CrfSettings.of(EvalConfig())


def _mean_field(image: np.ndarray, probabilities: np.ndarray, settings: CrfSettings) -> np.ndarray:
    """Every pair of pixels, as the paper's algorithm 1 has it, each kernel normalized on both sides by the square root
    of its row sums, as the authors' code does."""
    count, height, width = probabilities.shape
    y, x = np.mgrid[:height, :width].reshape(2, -1).astype(float)
    colors = image.reshape(-1, 3).astype(float)
    near = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
    like = ((colors[:, None] - colors) ** 2).sum(2)
    unary = -np.log(np.clip(probabilities, 1e-5, 1)).reshape(count, -1)

    def kernel(exponent: np.ndarray) -> np.ndarray:
        values = np.exp(-exponent / 2)
        root = np.sqrt(values.sum(1))
        return values / root[:, None] / root

    deviation, weight = settings.gaussian
    total = weight * kernel(near / deviation**2)
    deviation, color, weight = settings.bilateral
    total += weight * kernel(near / deviation**2 + like / color**2)
    q = np.exp(-unary)
    for _ in range(settings.iterations):
        q /= q.sum(0)
        q = np.exp(-unary + q @ total)
    return (q / q.sum(0)).reshape(count, height, width)


def _case(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A bright square on a dark ground, and probabilities of it that are blurred, displaced and noisy."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((30, 36), int)
    truth[8:22, 10:28] = 1
    image = (40 + 120 * truth[..., None] + rng.integers(0, 6, (30, 36, 3))).astype(np.uint8)
    score = np.roll(truth, 2, 1) * 2.0 - 1 + rng.normal(0, 1, truth.shape)
    foreground = 1 / (1 + np.exp(-score))
    return image, np.stack([1 - foreground, 0.7 * foreground, 0.3 * foreground]).astype(np.float32), truth


def test_is_mean_field_inference() -> None:
    pytest.importorskip("pydensecrf")
    image, probabilities, truth = _case()
    for settings in (PUBLISHED, CrfSettings(3, (2.0, 1.0), (20.0, 10.0, 2.0))):
        ours = dense_crf(image, probabilities, settings)
        np.testing.assert_allclose(ours.sum(0), 1, atol=1e-5)
        expected = _mean_field(image, probabilities, settings)
        # The library filters by a permutohedral lattice, which is the sum over all pairs only roughly.
        assert (ours.argmax(0) != expected.argmax(0)).mean() < 0.01
        assert np.abs(ours - expected).mean() < 0.02
    assert (probabilities.argmax(0) != truth).mean() > 0.15
    assert (dense_crf(image, probabilities, PUBLISHED).argmax(0) != truth).mean() < 0.01
    assert np.array_equal(
        dense_crf(image, probabilities, dataclasses.replace(PUBLISHED, iterations=0)).argmax(0), probabilities.argmax(0)
    )


def test_processes_give_the_result_of_one() -> None:
    pytest.importorskip("pydensecrf")
    cases = [_case(seed)[:2] for seed in range(5)]
    expected = {i: dense_crf(*case, PUBLISHED).argmax(0) for i, case in enumerate(cases)}
    for workers in (0, 1):
        pool: CrfPool[int] = CrfPool(PUBLISHED, workers)
        try:
            found: dict[int, np.ndarray] = {}
            for i, case in enumerate(cases):
                pool.add(i, *case)
                found |= dict(pool.take())
                assert len(found) >= i + 1 - 2 * workers, "at most two per worker are in progress"
            found |= dict(pool.take(everything=True))
        finally:
            pool.close()
        assert found.keys() == expected.keys()
        for i, labels in found.items():
            assert labels.dtype == np.uint8 and np.array_equal(labels, expected[i])


def test_wrong_sizes_are_reported() -> None:
    image, probabilities, _ = _case()
    with pytest.raises(ValueError, match=r"image must be uint8 \(30, 36, 3\).*got uint8 \(29, 36, 3\)"):
        dense_crf(image[1:], probabilities, PUBLISHED)
    with pytest.raises(ValueError, match="got float64"):
        dense_crf(cast(Any, image / 255), probabilities, PUBLISHED)


def test_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    with pytest.raises(UserError, match=r"pip install pydensecrf2.*eval.crf=false"):
        CrfPool(PUBLISHED, 1)
