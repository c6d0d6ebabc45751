"""Training step: model, optimizer and labels, with any number of processes and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import afa_ext
from afa import distributed
from afa.config import Config
from afa.labeling.cam import pack_host_tags
from afa.labeling.inference import run_scales
from afa.labeling.label_maker import LabelMaker
from afa.model.network import AFANet
from afa.model.precision import precision, tf32
from afa.training.compiling import compile_network
from afa.training.dropout import place_shared_dropout, share_dropout
from afa.training.losses import (
    affinity_loss,
    classification_loss,
    energy_loss,
    segmentation_loss,
    target_counts,
    upsampled,
)
from afa.training.schedule import ema_decay, learning_rate_factor, parameter_groups, phase_of, step_seed


@dataclass
class StepResult:
    """Result of a training step, on the device.

    With several processes, losses are scaled so that their mean over processes is the value of the whole batch.
    """

    losses: Tensor
    """[3]: classification, segmentation, affinity; with train.energy_weight [4]: also the dense energy; 0 for those not
    computed in this phase."""
    labels: Tensor | None = None
    """Segmentation target [B, S, S] of the last micro-batch."""
    pairs: Tensor | None = None
    """Affinity target [B, N, N] of the last micro-batch."""
    affinity: Tensor | None = None
    """Affinity [B, N, N] of the last micro-batch."""
    affinity_sums: Tensor | None = None
    """[2, 3], over this process's part of the batch: the sums of the affinity over pairs of different classes, of
    background and of one foreground class, and the numbers of these pairs."""
    grad_norm: Tensor | None = None
    """2-norm of all gradients before clipping; equal in all processes."""


@dataclass
class Targets:
    """Targets of segmentation and affinity."""

    labels: Tensor
    """int64 [B, S, S]: 0 background, class index + 1, 255 ignored."""
    pairs: Tensor
    """[B, N, N]: 0 different classes, 1 background, 2 the same foreground class, 255 ignored."""
    counts: Tensor | None = None
    """`target_counts` over the whole batch, if this is a part of it."""


class TrainStep:
    """Model, optimizer and the update from one batch.

    The batch can be split over processes (each gets its images) and into `train.accumulate` micro-batches. Losses are
    normalized over the whole batch, and dropout in the decoder is independent of the split, so the result is the same
    up to rounding, with two exceptions. The decoder's batch norm uses the images of all processes (with
    train.sync_batch_norm), but only of one micro-batch. Dropout and drop path in the backbone draw different random
    numbers.
    """

    def __init__(self, model: AFANet, config: Config, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).train()
        self.config = config
        self.label_maker = LabelMaker.for_training(config)
        train = config.train
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, train),
            lr=train.lr,
            betas=train.betas,
            weight_decay=train.weight_decay,
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=train.precision == "fp16")
        self._ema_decay = 0.0
        self.ema = self._averaged_model() if train.ema else None
        if self._divided:
            share_dropout(self.model)
            if train.sync_batch_norm:
                distributed.synchronize_batch_norm(self.model)
            distributed.broadcast_model(self.model)
        if train.compile:
            compile_network(self.model)

    @property
    def eval_model(self) -> AFANet:
        """The model to evaluate and save: the moving average, if enabled."""
        if self.ema is None:
            return self.model
        model = self.ema.module
        assert isinstance(model, AFANet)
        return model

    @property
    def learning_rate(self) -> float:
        """Learning rate of the backbone in the last update."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def update(self, batch: dict[str, Any], iteration: int) -> StepResult:
        """Update the weights from this process's part of a batch, at an iteration counted from 0.

        batch: image uint8 [B, 3, S, S], tags [B, C], box [B, 4], on the CPU.
        """
        train = self.config.train
        torch.manual_seed(step_seed(train, iteration))
        factor = learning_rate_factor(train, iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        phase = phase_of(train, iteration)
        self.optimizer.zero_grad(set_to_none=True)
        with tf32(train.precision == "tf32" and self.device.type == "cuda"):
            result = self._accumulate(_split(batch, train.accumulate), phase, iteration)
        self._complete_gradients()
        distributed.average_gradients(self.model.parameters())
        self.scaler.unscale_(self.optimizer)
        result.grad_norm = self._clip()
        # With fp16, the scaler skips the update if a gradient is not finite.
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self._ema_decay = ema_decay(train, iteration)
            self.ema.update_parameters(self.model)
        return result

    def losses(self, batch: dict[str, Any], phase: str, targets: Targets | None = None) -> tuple[StepResult, Tensor]:
        """Compute labels and losses of one micro-batch; returns the result for the log and the loss to differentiate.

        targets: if already computed. The loss of the batch is the sum over micro-batches, averaged over processes.
        """
        train = self.config.train
        images, tags = self._to_device(batch)
        inputs = self.model.normalize(images)
        if phase == "classify":
            with precision(self.device, train.precision):
                out = self.model(inputs, want=("class",))
            loss = classification_loss(out.class_logits, tags) / train.accumulate
            zeros = [loss.detach().new_zeros(())] * (3 if train.energy_weight else 2)
            return StepResult(torch.stack([loss.detach(), *zeros])), loss

        with precision(self.device, train.precision):
            out = self.model(inputs, want=("class", "cam", "seg", "affinity"))
        if targets is None:
            targets = self.targets(batch, images, inputs, out.cam.detach(), phase)
            if self._divided:
                targets.counts = distributed.all_reduce_sum_(target_counts(targets.labels, targets.pairs))
        loss_cls = classification_loss(out.class_logits, tags) / train.accumulate
        # Both losses of the segmentation need its logits in the size of the labels.
        logits = upsampled(out.seg_logits, targets.labels) if train.energy_weight else out.seg_logits
        loss_seg = segmentation_loss(logits, targets.labels, targets.counts)
        loss_aff, sums = affinity_loss(out.affinity, targets.pairs, targets.counts, train.affinity_object_share)
        if self._divided:
            # These partial losses must be summed over processes; undo the later averaging.
            loss_seg, loss_aff = loss_seg * distributed.world_size(), loss_aff * distributed.world_size()
        total = loss_cls + train.weight_seg * loss_seg + train.weight_affinity * loss_aff
        losses = [loss_cls, loss_seg, loss_aff]
        if train.energy_weight:
            box = batch["box"].to(self.device, non_blocking=True)
            loss_energy = energy_loss(images, logits, targets.labels, box, train) / train.accumulate
            total = total + train.energy_weight * loss_energy
            losses.append(loss_energy)
        affinity = out.affinity.detach()
        return StepResult(torch.stack(losses).detach(), targets.labels, targets.pairs, affinity, sums), total

    @torch.no_grad()
    def targets(self, batch: dict[str, Any], images: Tensor, inputs: Tensor, cam: Tensor, phase: str) -> Targets:
        """Targets of a batch in the phase par or walk.

        images: uint8 [B, 3, S, S]. inputs: normalized images. cam: raw CAMs [B, C, h, w] of the training forward pass.
        Drop path in the backbone stays active in the forward passes for labels, as published.
        """
        walk = phase == "walk"
        sources = {"walk"} if walk and self.config.labels.affinity_from_walk else {"par", "walk"} if walk else {"par"}
        # Read tags and boxes from the loader's CPU tensors to avoid a synchronization.
        side = images.shape[-1]
        whole = bool((batch["box"] == torch.tensor([0, side, 0, side])).all())
        box = None if whole else batch["box"].to(self.device, non_blocking=True)
        with precision(self.device, self._label_precision()):
            outputs = run_scales(
                self.model,
                inputs,
                cam_scales=self.config.labels.cam_scales,
                affinity_scale=self.label_maker.walk_scale if walk else None,
                base_cam=cam,
            )
        classes = pack_host_tags(batch["tags"], self.device)
        maps, _ = self.label_maker.from_outputs(images, outputs, classes, sources, box=box)
        source = maps["par" if "par" in sources else "walk"]
        stride = self.model.stride
        pairs = afa_ext.affinity_labels(
            source,
            stride=stride,
            offset=stride // 2 if self.config.labels.affinity_sampling == "center" else 0,
            radius=self.config.labels.walk_radius,
            background=0,
        )
        return Targets(maps["walk" if walk else "par"], pairs)

    def _accumulate(self, micro_batches: list[dict[str, Any]], phase: str, iteration: int) -> StepResult:
        """Accumulate the gradients of all micro-batches."""
        targets: list[Targets | None] = [None] * len(micro_batches)
        if len(micro_batches) > 1 and phase != "classify":
            targets = [*self._targets_of_all(micro_batches, phase)]
        result: StepResult | None = None
        for number, (micro_batch, target) in enumerate(zip(micro_batches, targets, strict=True)):
            self._seed_part(iteration, number, len(micro_batch["image"]))
            part, total = self.losses(micro_batch, phase, target)
            self.scaler.scale(total).backward()
            if result is not None:
                part.losses += result.losses
                if part.affinity_sums is not None and result.affinity_sums is not None:
                    part.affinity_sums += result.affinity_sums
            result = part
        assert result is not None
        return result

    @torch.no_grad()
    def _targets_of_all(self, micro_batches: list[dict[str, Any]], phase: str) -> list[Targets]:
        """Targets of all micro-batches, computed in advance because the losses divide by counts over the whole batch.

        This needs an extra forward pass without gradients.
        """
        made = []
        for micro_batch in micro_batches:
            images, _ = self._to_device(micro_batch)
            inputs = self.model.normalize(images)
            with precision(self.device, self.config.train.precision):
                cam = self.model(inputs, want=("cam",)).cam
            made.append(self.targets(micro_batch, images, inputs, cam, phase))
        counts = torch.stack([target_counts(target.labels, target.pairs) for target in made]).sum(0)
        counts = distributed.all_reduce_sum_(counts)
        for target in made:
            target.counts = counts
        return made

    def _to_device(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Images and tags."""
        images = batch["image"].to(self.device, non_blocking=True)
        return images, batch["tags"].to(self.device, non_blocking=True)

    @property
    def _divided(self) -> bool:
        return self.config.train.accumulate * distributed.world_size() > 1

    def _seed_part(self, iteration: int, micro_batch: int, images: int) -> None:
        """Seed random numbers by the position of a micro-batch in the whole batch."""
        if not self._divided:
            return
        train = self.config.train
        part = distributed.rank() * train.accumulate + micro_batch
        torch.manual_seed(step_seed(train, iteration, part))
        whole = train.accumulate * distributed.world_size() * images
        place_shared_dropout(self.model, step_seed(train, iteration), first=part * images, whole=whole)

    def _complete_gradients(self) -> None:
        """Set the gradients of parameters that this phase does not use to 0, as published, so that Adam counts all
        iterations for the decoder and the affinity head."""
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _clip(self) -> Tensor:
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self.config.train.clip_grad:
            nn.utils.clip_grads_with_norm_(parameters, self.config.train.clip_grad, norm)
        return norm

    def _averaged_model(self) -> AveragedModel:
        def update(averaged: Any, current: Any, _: Any) -> None:
            torch._foreach_lerp_(averaged, current, 1 - self._ema_decay)

        average = AveragedModel(self.model, multi_avg_fn=update)
        average.n_averaged += 1  # count the initial weights, so that the first update is not a plain copy
        return average.requires_grad_(False).eval()

    def _label_precision(self) -> str:
        train = self.config.train
        if train.label_precision == "auto" and train.precision in ("fp32", "tf32") and _multiplies_bf16(self.device):
            return "bf16"
        return train.precision


def _multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has bfloat16 matrix units; emulated bfloat16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Not all versions of torch have get_capabilities.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(capabilities.get("amx_bf16", False))


def _split(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    each = len(batch["image"]) // parts
    return [{key: value[i * each : (i + 1) * each] for key, value in batch.items()} for i in range(parts)]
