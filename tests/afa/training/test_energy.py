"""The dense energy loss of the segmentation: its definition, its part in a step, its record; nothing without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import afa.training.step
import afa_ext
from afa.config import Config, load_config, with_overrides
from afa.errors import UserError
from afa.model import build_model
from afa.training.log import summary
from afa.training.loop import train
from afa.training.losses import energy_loss
from afa.training.step import TrainStep


@pytest.fixture
def config(tiny_config: Any, voc_root: Path) -> Config:
    config = tiny_config()
    config.data.root = str(voc_root)
    config.train.energy_weight = 0.01
    return config


def batch_of(images: int = 4, side: int = 64) -> dict[str, Any]:
    """Crops; the second one has borders."""
    generator = torch.Generator().manual_seed(3)
    box = torch.tensor([[0, side, 0, side]] * images)
    box[1] = torch.tensor([4, side, 0, side - 10])
    return {
        "image": torch.randint(0, 256, (images, 3, side, side), generator=generator, dtype=torch.uint8),
        "tags": torch.eye(3)[torch.arange(images) % 3],
        "box": box,
        "name": [str(i) for i in range(images)],
    }


def train_step_of(config: Config) -> TrainStep:
    torch.manual_seed(0)
    train_step = TrainStep(build_model(config.model, 3), config)
    train_step.model.get_submodule("decoder.norm").eval()  # does not depend on the other images of a batch
    return train_step


def decoder_gradient(train_step: TrainStep) -> Tensor:
    gradients = [p.grad.flatten() for p in train_step.model.decoder.parameters() if p.grad is not None]
    return torch.cat(gradients)


def test_the_loss_is_the_published_one(config: Config) -> None:
    """Images in 0 to 255, probabilities of the upsampled logits, the crop's box, labels as a gate, at half scale."""
    batch = batch_of(2)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 4, 16, 16, generator=generator, requires_grad=True)
    labels = torch.tensor([0, 1, 3, 255])[torch.randint(0, 4, (2, 64, 64), generator=generator)]
    ours = energy_loss(batch["image"], logits, labels, batch["box"], config.train)
    (gradient,) = torch.autograd.grad(ours, logits)

    regions = torch.zeros(2, 64, 64)
    for i, (top, bottom, left, right) in enumerate(batch["box"].tolist()):
        regions[i, top:bottom, left:right] = 1
    probabilities = torch.nn.functional.interpolate(logits, scale_factor=4, mode="bilinear").softmax(1)
    published = afa_ext.DenseEnergyLoss(weight=1e-7, sigma_rgb=15, sigma_xy=100, scale_factor=0.5)
    expected = published(batch["image"].float(), probabilities, regions, labels[:, None])
    torch.testing.assert_close(ours[None], expected, rtol=1e-5, atol=0)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6 * float(expected_gradient.abs().max()))


@pytest.mark.parametrize("iteration", [4, 7])
def test_the_gradient_reaches_the_decoder(config: Config, iteration: int) -> None:
    """In both phases that train the segmentation, also without its other losses."""
    config.train.weight_seg = config.train.weight_affinity = 0.0
    step = train_step_of(config)
    losses = step.update(batch_of(), iteration).losses
    assert losses.shape == (4,) and losses[3] < 0
    assert float(decoder_gradient(step).norm()) > 0
    config.train.energy_weight = 0.0
    step = train_step_of(config)
    assert step.update(batch_of(), iteration).losses.shape == (3,)
    assert float(decoder_gradient(step).norm()) == 0


def test_the_first_phase_does_not_compute_it(config: Config) -> None:
    step = train_step_of(config)
    losses = step.update(batch_of(), 1).losses
    assert losses.shape == (4,) and losses[0] > 0 and (losses[1:] == 0).all()
    assert float(decoder_gradient(step).norm()) == 0


def test_training_lowers_the_energy(config: Config) -> None:
    config.train.iterations, config.train.classify_until, config.train.par_until = 40, 0, 39
    config.train.weight_seg, config.train.energy_weight = 0.0, 10.0
    step = train_step_of(config)
    losses = [float(step.update(batch_of(), iteration).losses[3]) for iteration in range(1, 31)]
    assert losses[-1] < 1.1 * losses[0] < 0


def test_micro_batches_give_the_loss_of_the_whole_batch(config: Config) -> None:
    config.train.batch_size, config.train.energy_weight = 4, 1.0
    found = {}
    for micro_batches in (1, 2):
        config.train.accumulate = micro_batches
        step = train_step_of(config)
        found[micro_batches] = step.update(batch_of(), 4).losses, decoder_gradient(step)
    torch.testing.assert_close(found[2][0], found[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[2][1], found[1][1], rtol=1e-3, atol=1e-5)


def test_a_run_logs_it(config: Config, tmp_path: Path) -> None:
    train(config, tmp_path / "run", device="cpu", progress=False)
    records = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [2, 4, 6, 8, 9]
    assert records[0]["loss_energy"] is None and all(record["loss_energy"] < 0 for record in records[2:])
    assert " energy -" in summary(records[-1])


def test_without_weight_nothing_is_computed(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = afa.training.step.energy_loss

    def counted(*arguments: Any) -> Tensor:
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(afa.training.step, "energy_loss", counted)
    train(config, tmp_path / "with", device="cpu", progress=False)
    assert len(calls) == 5, "the iterations of the last two phases"
    config.train.energy_weight = 0.0
    records: list[Any] = []
    train(config, tmp_path / "without", device="cpu", progress=False, on_log=records.append)
    assert len(calls) == 5
    assert records and not any("loss_energy" in record for record in records)


def test_an_energy_that_is_not_finite_is_reported(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(afa.training.step, "energy_loss", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(UserError, match=r"the dense energy loss became nan at iteration 5; lower train\.lr"):
        train(config, tmp_path / "run", device="cpu", progress=False)


def test_its_recipe_is_that_of_voc() -> None:
    assert load_config("voc_energy") == with_overrides(load_config("voc"), ["train.energy_weight=0.01"])
    loss = load_config("voc_energy").train
    assert (loss.energy_sigma_rgb, loss.energy_sigma_xy, loss.energy_scale) == (15, 100, 0.5)
    assert load_config("voc").train.energy_weight == 0
