"""An estimate of a run's time on this machine, from a few steps and a few validation images."""

from __future__ import annotations

import copy
import time

import torch

from afa.config import Config
from afa.data import TaggedDataset, train_loader
from afa.evaluation.evaluate import seconds_per_image
from afa.model.network import AFANet
from afa.training.schedule import PHASES, phase_of
from afa.training.step import TrainStep


def estimate(model: AFANet, config: Config, train_set: TaggedDataset, val_set: TaggedDataset) -> dict[str, float]:
    """Seconds of each phase of the schedule and of the evaluation ("evaluate"), on the CPU.

    One step of each phase is timed, after a first one that allocates memory. The model and the training that follows do
    not change: the steps update a copy, and training sets the random seed of every step.
    """
    batch = next(train_loader(train_set, config.train.batch_size, seed=config.train.seed))
    step = TrainStep(copy.deepcopy(model), config)
    seconds = {}
    for phase in PHASES:
        iterations = [i for i in range(config.train.iterations) if phase_of(config.train, i) == phase]
        if iterations:
            step.update(batch, iterations[0])
            begin = time.perf_counter()
            step.update(batch, iterations[0])
            seconds[phase] = len(iterations) * (time.perf_counter() - begin)
    if config.labels.cam_threshold == "auto":  # any number will do
        config = config.model_copy(update={"labels": config.labels.model_copy(update={"cam_threshold": 0.45})})
    with torch.inference_mode():
        seconds["evaluate"] = len(val_set) * seconds_per_image(step.model.eval(), val_set, config)
    return seconds
