"""Model, optimiser and one training step, over however many processes and pieces the batch is divided into."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import afa_ext
from afa import distributed
from afa.config import Config
from afa.labeling.cam import multi_scale_cam, pack_classes
from afa.labeling.labels import par_labels, par_weights, walk_labels
from afa.model.network import AFANet, normalize
from afa.training.compiling import compile_network
from afa.training.losses import affinity_loss, classification_loss, segmentation_loss, target_counts
from afa.training.schedule import ema_decay, learning_rate_factor, parameter_groups, phase_of, step_seed

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Step:
    """What one training step leaves behind, all still on the device.

    Of several processes each has its own share, scaled so that the mean over processes is the value of the whole batch.
    """

    losses: Tensor
    """[3]: classification, segmentation, affinity; 0 for those not computed in this phase."""
    labels: Tensor | None = None
    """Segmentation target [B, S, S]; of the last piece where the batch is worked in pieces."""
    pairs: Tensor | None = None
    """Affinity target [B, N, N], likewise."""
    grad_norm: Tensor | None = None
    """2-norm of all gradients together, before clipping: equal in all processes."""


@dataclass
class Targets:
    """What segmentation and affinity learn from."""

    labels: Tensor
    pairs: Tensor
    counts: Tensor | None = None
    """`target_counts` over the whole batch, where this is a part of it."""


class Trainer:
    """Model, optimiser and the step that moves them on by one batch.

    The batch may be divided among processes (each is given its images) and worked in `train.accumulate` pieces. Every
    mean of a loss is over the whole batch all the same, and dropout in the decoder does not depend on the division, so
    that the same configuration gives the same training up to rounding. Two things remain: batch norm in the decoder
    has statistics of all processes' images (with train.sync_batch_norm), but always of one piece; and a backbone with
    dropout of its own draws other noise.
    """

    def __init__(self, model: AFANet, config: Config, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).train()
        self.config = config
        train = config.train
        self.pieces = train.accumulate
        self.groups = parameter_groups(self.model, train)
        self.optimizer = torch.optim.AdamW(
            self.groups, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused=True
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=train.precision == "fp16")
        self.ema: AFANet | None = copy.deepcopy(self.model).requires_grad_(False).eval() if train.ema else None
        if self._divided:
            _share_dropout(self.model)
            if train.sync_batch_norm:
                distributed.synchronise_batch_norm(self.model)
            distributed.broadcast_model(self.model)
        if train.compile:
            compile_network(self.model)

    @property
    def measured(self) -> AFANet:
        """The model to evaluate and to save: the average where there is one."""
        return self.model if self.ema is None else self.ema

    @property
    def _divided(self) -> bool:
        return self.pieces * distributed.world_size() > 1

    def step(self, batch: dict[str, Any], iteration: int) -> Step:
        """One update from this process's part of a batch, at an iteration counted from 0."""
        train = self.config.train
        torch.manual_seed(step_seed(train, iteration))
        factor = learning_rate_factor(train, iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        phase = phase_of(train, iteration)
        pieces = [batch] if self.pieces == 1 else _split(batch, self.pieces)
        targets: list[Targets | None] = [None] * len(pieces)
        if len(pieces) > 1 and phase != "classify":
            targets = [*self._targets_of_all(pieces, phase)]
        self.optimizer.zero_grad(set_to_none=True)
        result: Step | None = None
        for number, (piece, target) in enumerate(zip(pieces, targets, strict=True)):
            self._place(iteration, number, len(piece["image"]))
            part, total = self.losses(piece, phase, target)
            self.scaler.scale(total).backward()
            if result is not None:
                part.losses += result.losses
            result = part
        assert result is not None
        distributed.average_gradients(self.model.parameters())
        self.scaler.unscale_(self.optimizer)
        result.grad_norm = self._clip()
        # Does nothing where a gradient is not finite and the precision is fp16: the scale was too large.
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._average(iteration)
        return result

    def losses(self, batch: dict[str, Any], phase: str, targets: Targets | None = None) -> tuple[Step, Tensor]:
        """Forward, labels and losses of one piece -> (what to log, the loss to differentiate).

        targets: where they were made before. The mean over processes of the sum over pieces is the loss of the batch.
        """
        train = self.config.train
        images = batch["image"].to(self.device, non_blocking=True)
        tags = batch["tags"].to(self.device, non_blocking=True)
        inputs = normalize(images)
        if phase == "classify":
            with self._precision():
                out = self.model(inputs, want=("class",))
            loss = classification_loss(out.class_logits, tags) / self.pieces
            zero = loss.detach().new_zeros(())
            return Step(torch.stack([loss.detach(), zero, zero])), loss

        with self._precision():
            out = self.model(inputs, want=("class", "cam", "seg", "affinity"))
        if targets is None:
            targets = Targets(*self.targets(batch, images, inputs, tags, out.cam.detach(), phase))
            if self._divided:
                targets.counts = distributed.all_reduce_sum_(target_counts(targets.labels, targets.pairs))
        loss_cls = classification_loss(out.class_logits, tags) / self.pieces
        loss_seg = segmentation_loss(out.seg_logits, targets.labels, targets.counts)
        loss_aff = affinity_loss(out.affinity, targets.pairs, targets.counts)
        if self._divided:
            # Sums over this part with the whole batch's counts below: to be added over processes, not averaged.
            loss_seg, loss_aff = loss_seg * distributed.world_size(), loss_aff * distributed.world_size()
        total = loss_cls + train.weight_seg * loss_seg + train.weight_affinity * loss_aff
        return Step(torch.stack([loss_cls, loss_seg, loss_aff]).detach(), targets.labels, targets.pairs), total

    @torch.no_grad()
    def targets(
        self, batch: dict[str, Any], images: Tensor, inputs: Tensor, tags: Tensor, cam: Tensor | None, phase: str
    ) -> tuple[Tensor, Tensor]:
        """Segmentation target [B, S, S] and affinity target [B, N, N] of a batch.

        images uint8, inputs normalised; cam: raw CAMs [B, C, h, w] of the training forward, which are those of
        evaluation as long as the backbone has no active dropout, and then spare one pass.
        """
        settings = self.config.labels
        # Counts and boxes are read from the loader's tensors, which are still on the host: no wait for the device.
        most = int((batch["tags"] > 0).sum(1).max())
        side = images.shape[-1]
        whole = bool((batch["box"] == torch.tensor([0, side, 0, side])).all())
        box = None if whole else batch["box"].to(self.device, non_blocking=True)
        classes = pack_classes(tags, most)
        walk = phase == "walk"
        par = not walk or not settings.affinity_from_walk

        backbone = self.model.backbone
        was_training = backbone.training
        if not backbone.deterministic:
            backbone.eval()
        with self._label_precision():
            result = multi_scale_cam(
                self.model,
                inputs,
                classes,
                settings.cam_scales,
                affinity_scale=max(settings.cam_scales) if walk else None,
                base=cam if backbone.deterministic else None,
            )
        backbone.train(was_training)

        weights = par_weights(images, settings) if par or whole else None
        target = None
        if par:
            target = par_labels(images, result.cams, classes, settings, box=box, weights=weights)
        segmentation = target
        if walk:
            assert result.affinity is not None and result.grid is not None
            segmentation = walk_labels(
                images,
                result.cams,
                result.affinity,
                result.grid,
                classes,
                settings,
                box=box,
                weights=weights if whole else None,
            )
        assert segmentation is not None
        source = segmentation if target is None else target
        pairs = afa_ext.affinity_labels(source, stride=self.model.stride, radius=settings.walk_radius)
        return segmentation, pairs

    @torch.no_grad()
    def _targets_of_all(self, pieces: list[dict[str, Any]], phase: str) -> list[Targets]:
        """The targets of every piece before any of them is learnt from: the losses divide by counts over the whole
        batch. It costs a forward more than making them on the way, and keeps no graph."""
        found = []
        for piece in pieces:
            images = piece["image"].to(self.device, non_blocking=True)
            tags = piece["tags"].to(self.device, non_blocking=True)
            inputs = normalize(images)
            cam = None
            if self.model.backbone.deterministic:
                with self._precision():
                    cam = self.model(inputs, want=("cam",)).cam
            found.append(Targets(*self.targets(piece, images, inputs, tags, cam, phase)))
        counts = distributed.all_reduce_sum_(
            torch.stack([target_counts(target.labels, target.pairs) for target in found]).sum(0)
        )
        for target in found:
            target.counts = counts
        return found

    def _place(self, iteration: int, piece: int, images: int) -> None:
        """Random numbers by where in the whole batch the images of a piece stand."""
        if not self._divided:
            return
        place = distributed.rank() * self.pieces + piece
        torch.manual_seed(step_seed(self.config.train, iteration, place))
        for module in self.model.modules():
            if isinstance(module, SharedDropout2d):
                module.seed = step_seed(self.config.train, iteration)
                module.first, module.whole = place * images, self.pieces * distributed.world_size() * images

    def _clip(self) -> Tensor:
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self.config.train.clip_grad:
            nn.utils.clip_grads_with_norm_(parameters, self.config.train.clip_grad, norm)
        return norm

    @torch.no_grad()
    def _average(self, iteration: int) -> None:
        if self.ema is None:
            return
        decay = ema_decay(self.config.train, iteration)
        torch._foreach_lerp_([*self.ema.parameters()], [*self.model.parameters()], 1 - decay)
        for old, new in zip(self.ema.buffers(), self.model.buffers(), strict=True):
            old.copy_(new)

    def _precision(self) -> torch.autocast:
        half = HALF.get(self.config.train.precision)
        return torch.autocast(self.device.type, half or torch.bfloat16, enabled=half is not None)

    def _label_precision(self) -> torch.autocast:
        train = self.config.train
        if train.label_precision == "auto" and train.precision == "fp32" and _multiplies_bf16(self.device):
            return torch.autocast(self.device.type, torch.bfloat16)
        return self._precision()


def _multiplies_bf16(device: torch.device) -> bool:
    """Whether the processor has matrix units for bfloat16; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Not in every torch from 2.10 on.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(capabilities.get("amx_bf16", False))


class SharedDropout2d(nn.Dropout2d):
    """Dropout2d whose mask is drawn for the whole batch, of which this process and piece has a part.

    Masks are those that nn.Dropout2d would draw for the whole batch in one process, if it is the first to draw.
    """

    seed = 0
    first = 0
    whole = 0

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        generator = torch.Generator(input.device).manual_seed(self.seed)
        keep = torch.empty(self.whole, input.shape[1], 1, 1, device=input.device, dtype=input.dtype)
        keep.bernoulli_(1 - self.p, generator=generator).div_(1 - self.p)
        return input * keep[self.first : self.first + len(input)]


def _share_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.Dropout2d:
            module.__class__ = SharedDropout2d


def _split(batch: dict[str, Any], pieces: int) -> list[dict[str, Any]]:
    each = len(batch["image"]) // pieces
    return [{key: value[i * each : (i + 1) * each] for key, value in batch.items()} for i in range(pieces)]
