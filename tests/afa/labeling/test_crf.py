"""Dense CRF: compared with mean-field inference by definition; its settings."""

from __future__ import annotations

from typing import get_args

import numpy as np
import torch

import afa_ext
from afa.config import EvalConfig, load_config
from afa.labeling.crf import crf_probabilities, crf_settings


def _mean_field(image: np.ndarray, probabilities: np.ndarray, config: EvalConfig) -> np.ndarray:
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

    settings = crf_settings(config)
    deviation, weight = settings["gaussian"]
    total = weight * kernel(near / deviation**2)
    deviation, color, weight = settings["bilateral"]
    total += weight * kernel(near / deviation**2 + like / color**2)
    q = np.exp(-unary)
    for _ in range(settings["num_iter"]):
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


def _crf(image: np.ndarray, probabilities: np.ndarray, config: EvalConfig) -> np.ndarray:
    pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
    return crf_probabilities(pixels, torch.from_numpy(np.log(probabilities))[None], config)[0].numpy()


def test_is_mean_field_inference() -> None:
    image, probabilities, truth = _case()
    published = EvalConfig()
    other = EvalConfig(crf_iterations=3, crf_gaussian=(2.0, 1.0), crf_bilateral=(20.0, 10.0, 2.0))
    for config in (published, other):
        ours = _crf(image, probabilities, config)
        np.testing.assert_allclose(ours.sum(0), 1, atol=1e-5)
        expected = _mean_field(image, probabilities, config)
        # The permutohedral lattice only approximates the sum over all pairs.
        assert (ours.argmax(0) != expected.argmax(0)).mean() < 0.01
        assert np.abs(ours - expected).mean() < 0.02
    assert (probabilities.argmax(0) != truth).mean() > 0.15
    assert (_crf(image, probabilities, published).argmax(0) != truth).mean() < 0.01
    unchanged = _crf(image, probabilities, EvalConfig(crf_iterations=0))
    assert np.array_equal(unchanged.argmax(0), probabilities.argmax(0))


def test_settings_are_those_of_the_preset_unless_set() -> None:
    assert crf_settings(load_config("voc").eval) == {"num_iter": 10, "gaussian": (3, 3), "bilateral": (64, 5, 4)}
    changed = load_config("voc", ["eval.crf_preset=psa", "eval.crf_iterations=2", "eval.crf_gaussian=1,0"]).eval
    assert crf_settings(changed) == {"num_iter": 2, "gaussian": (1, 0), "bilateral": (80, 13, 10)}
    reset = load_config("voc", ["eval.crf_preset=irn", "eval.crf_bilateral=null"]).eval
    assert crf_settings(reset) == dict(afa_ext.CRF_PRESETS["irn"])


def test_every_preset_is_a_choice() -> None:
    choices = get_args(EvalConfig.model_fields["crf_preset"].annotation)
    assert set(choices) == set(afa_ext.CRF_PRESETS), "stated twice, as the configuration is read without torch"
