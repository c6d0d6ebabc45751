"""One training step: model, optimizer and labels, over however many processes and micro-batches share the batch."""

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
from afa.training.losses import affinity_loss, classification_loss, segmentation_loss, target_counts
from afa.training.schedule import ema_decay, learning_rate_factor, parameter_groups, phase_of, step_seed


@dataclass
class StepResult:
    """What one training step returns, all still on the device.

    Each of several processes has its own share, scaled so that the mean over processes is the value of the whole batch.
    """

    losses: Tensor
    """[3]: classification, segmentation, affinity; 0 for those not computed in this phase."""
    labels: Tensor | None = None
    """Segmentation target [B, S, S]; with micro-batches that of the last one."""
    pairs: Tensor | None = None
    """Affinity target [B, N, N], likewise."""
    grad_norm: Tensor | None = None
    """2-norm of all gradients together, before clipping: equal in all processes."""


@dataclass
class Targets:
    """What segmentation and affinity learn from."""

    labels: Tensor
    """int64 [B, S, S]: 0 background, class number + 1, 255 ignored."""
    pairs: Tensor
    """[B, N, N]: 1 same class, 0 different, 255 ignored."""
    counts: Tensor | None = None
    """`target_counts` over the whole batch, if this is a part of it."""


class TrainStep:
    """Model and optimizer, and the step that updates them from one batch.

    The batch may be divided among processes (each is given its images) and split into `train.accumulate` micro-batches.
    Every mean of a loss is over the whole batch all the same, and dropout in the decoder does not depend on the
    division, so that the same configuration gives the same training up to rounding. Two differences remain: batch norm
    in the decoder has statistics of all processes' images (with train.sync_batch_norm), but always of one micro-batch;
    and a backbone with dropout or drop path of its own draws other noise.
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
        """The model to evaluate and to save: the average if there is one."""
        if self.ema is None:
            return self.model
        model = self.ema.module
        assert isinstance(model, AFANet)
        return model

    @property
    def learning_rate(self) -> float:
        """The backbone's, in the last update."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def update(self, batch: dict[str, Any], iteration: int) -> StepResult:
        """One update from this process's part of a batch, at an iteration counted from 0.

        batch: image uint8 [B, 3, S, S], tags [B, C], box [B, 4], on the host.
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
        # Does nothing where a gradient is not finite and the precision is fp16: the scale was too large.
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self._ema_decay = ema_decay(train, iteration)
            self.ema.update_parameters(self.model)
        return result

    def losses(self, batch: dict[str, Any], phase: str, targets: Targets | None = None) -> tuple[StepResult, Tensor]:
        """Forward, labels and losses of one micro-batch -> (what to log, the loss to differentiate).

        targets: if they were made before. The mean over processes of the sum over micro-batches is the loss of the
        batch.
        """
        train = self.config.train
        images, tags = self._to_device(batch)
        inputs = self.model.normalize(images)
        if phase == "classify":
            with precision(self.device, train.precision):
                out = self.model(inputs, want=("class",))
            loss = classification_loss(out.class_logits, tags) / train.accumulate
            zero = loss.detach().new_zeros(())
            return StepResult(torch.stack([loss.detach(), zero, zero])), loss

        with precision(self.device, train.precision):
            out = self.model(inputs, want=("class", "cam", "seg", "affinity"))
        if targets is None:
            targets = self.targets(batch, images, inputs, out.cam.detach(), phase)
            if self._divided:
                targets.counts = distributed.all_reduce_sum_(target_counts(targets.labels, targets.pairs))
        loss_cls = classification_loss(out.class_logits, tags) / train.accumulate
        loss_seg = segmentation_loss(out.seg_logits, targets.labels, targets.counts)
        loss_aff = affinity_loss(out.affinity, targets.pairs, targets.counts)
        if self._divided:
            # Sums over this part with the whole batch's counts below: to be added over processes, not averaged.
            loss_seg, loss_aff = loss_seg * distributed.world_size(), loss_aff * distributed.world_size()
        total = loss_cls + train.weight_seg * loss_seg + train.weight_affinity * loss_aff
        return StepResult(torch.stack([loss_cls, loss_seg, loss_aff]).detach(), targets.labels, targets.pairs), total

    @torch.no_grad()
    def targets(self, batch: dict[str, Any], images: Tensor, inputs: Tensor, cam: Tensor, phase: str) -> Targets:
        """Targets of a batch in the phase par or walk.

        images uint8 [B, 3, S, S], inputs normalized; cam: raw CAMs [B, C, h, w] of the training forward. Drop path in
        the backbone stays active in the forwards made here, as published.
        """
        walk = phase == "walk"
        sources = {"walk"} if walk and self.config.labels.affinity_from_walk else {"par", "walk"} if walk else {"par"}
        # Tags and boxes are read from the loader's tensors, which are still on the host: no wait for the device.
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
        pairs = afa_ext.affinity_labels(source, stride=self.model.stride, radius=self.config.labels.walk_radius)
        return Targets(maps["walk" if walk else "par"], pairs)

    def _accumulate(self, micro_batches: list[dict[str, Any]], phase: str, iteration: int) -> StepResult:
        """Add up the gradients of all micro-batches."""
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
            result = part
        assert result is not None
        return result

    @torch.no_grad()
    def _targets_of_all(self, micro_batches: list[dict[str, Any]], phase: str) -> list[Targets]:
        """The targets of every micro-batch before any of them is learned from: the losses divide by counts over the
        whole batch. It costs a forward more than making them on the way, and keeps no graph."""
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
        """Seed random numbers by where in the whole batch the images of a micro-batch are."""
        if not self._divided:
            return
        train = self.config.train
        part = distributed.rank() * train.accumulate + micro_batch
        torch.manual_seed(step_seed(train, iteration, part))
        whole = train.accumulate * distributed.world_size() * images
        place_shared_dropout(self.model, step_seed(train, iteration), first=part * images, whole=whole)

    def _complete_gradients(self) -> None:
        """Give parameters that this phase does not use a gradient of 0, as published: decoder and affinity head are in
        the graph from the start, so that Adam has counted all iterations when they begin to learn."""
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
        average.n_averaged += 1  # the initial weights count as the first, so that no update is a plain copy
        return average.requires_grad_(False).eval()

    def _label_precision(self) -> str:
        train = self.config.train
        if train.label_precision == "auto" and train.precision in ("fp32", "tf32") and _multiplies_bf16(self.device):
            return "bf16"
        return train.precision


def _multiplies_bf16(device: torch.device) -> bool:
    """Whether the processor has matrix units for bfloat16; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Not in every torch from 2.10 on.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(capabilities.get("amx_bf16", False))


def _split(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    each = len(batch["image"]) // parts
    return [{key: value[i * each : (i + 1) * each] for key, value in batch.items()} for i in range(parts)]
