"""Training: three phases from image tags alone (AFA, CVPR 2022).

    afa train demo                                   # the embedded data set
    afa train voc --run runs/voc train.batch_size=8
    afa train voc --run runs/voc --resume

Until train.classify_until only the classifier learns. Then the segmentation learns from PAR labels and the affinity
from the same; after train.par_until the segmentation learns from walk labels.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import afa_ext
from afa.cam import multi_scale_cam, pack_classes
from afa.config import Config, TrainConfig, load_config, to_dict, to_yaml
from afa.data import open_dataset, train_loader
from afa.errors import UserError
from afa.evaluate import evaluate
from afa.files import atomic_path, write_text
from afa.labels import par_labels, par_weights, walk_labels
from afa.losses import classification_loss, segmentation_loss
from afa.metrics import IGNORE
from afa.model.backbone import one_line
from afa.model.network import AFANet, build_model, normalize, save_checkpoint_weights

PHASES = ("classify", "par", "walk")
LOSSES = ("loss_cls", "loss_seg", "loss_aff")
Record = dict[str, Any]
__all__ = ["PHASES", "Trainer", "learning_rate_factor", "parameter_groups", "phase_of", "train"]


def phase_of(config: TrainConfig, iteration: int) -> str:
    """Phase of an iteration counted from 0."""
    if iteration < config.classify_until:
        return "classify"
    return "par" if iteration < config.par_until else "walk"


def learning_rate_factor(config: TrainConfig, iteration: int) -> float:
    """What multiplies every group's rate at an iteration counted from 0: a linear rise from warmup_lr to lr, then the
    polynomial (1 - iteration/iterations)^poly_power."""
    if iteration < config.warmup:
        start = config.warmup_lr / config.lr
        return start + (1 - start) * iteration / config.warmup
    return (1 - iteration / config.iterations) ** config.poly_power


def parameter_groups(model: AFANet, config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW groups: backbone, backbone norms (lr x norm_lr_factor), heads (lr x head_lr_factor).

    A factor of 0 freezes the norms: their gradients are not even computed.
    """
    norm_ids = {
        id(parameter)
        for module in model.backbone.modules()
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm))
        for parameter in module.parameters(recurse=False)
    }
    own = list(model.backbone.parameters())
    inside = {id(parameter) for parameter in own}
    norms = [parameter for parameter in own if id(parameter) in norm_ids]
    if config.norm_lr_factor == 0:
        for parameter in norms:
            parameter.requires_grad_(False)
    groups = {
        "backbone": ([p for p in own if id(p) not in norm_ids], 1.0),
        "norms": (norms if config.norm_lr_factor else [], config.norm_lr_factor),
        "heads": ([p for p in model.parameters() if id(p) not in inside], config.head_lr_factor),
    }
    return [
        {"name": name, "params": parameters, "base_lr": config.lr * factor, "lr": config.lr * factor}
        for name, (parameters, factor) in groups.items()
        if parameters
    ]


@dataclass
class Step:
    """What one training step leaves behind, all still on the device."""

    losses: Tensor
    """[3], in the order of LOSSES; 0 for those not computed in this phase."""
    labels: Tensor | None = None
    """Segmentation target [B, S, S]."""
    pairs: Tensor | None = None
    """Affinity target [B, N, N]."""


class Trainer:
    """Model, optimiser and the step that moves them on by one batch."""

    def __init__(self, model: AFANet, config: Config, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).train()
        self.config = config
        train = config.train
        self.groups = parameter_groups(self.model, train)
        self.optimizer = torch.optim.AdamW(
            self.groups, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused=True
        )

    def step(self, batch: dict[str, Any], iteration: int) -> Step:
        """One update from a batch of `train_loader`, at an iteration counted from 0."""
        # Dropout depends on (seed, iteration) and not on what ran before, so a resumed run repeats exactly.
        torch.manual_seed((self.config.train.seed << 32) + iteration)
        factor = learning_rate_factor(self.config.train, iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        result, total = self.losses(batch, phase_of(self.config.train, iteration))
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimizer.step()
        return result

    def losses(self, batch: dict[str, Any], phase: str) -> tuple[Step, Tensor]:
        """Forward, labels and losses of one batch -> (what to log, the loss to differentiate)."""
        train = self.config.train
        images = batch["image"].to(self.device, non_blocking=True)
        tags = batch["tags"].to(self.device, non_blocking=True)
        inputs = normalize(images)
        if phase == "classify":
            with self._precision():
                out = self.model(inputs, want=("class",))
            loss = classification_loss(out.class_logits, tags)
            zero = loss.detach().new_zeros(())
            return Step(torch.stack([loss.detach(), zero, zero])), loss

        with self._precision():
            out = self.model(inputs, want=("class", "cam", "seg", "affinity"))
        labels, pairs = self.targets(batch, images, inputs, tags, out.cam.detach(), phase)
        loss_cls = classification_loss(out.class_logits, tags)
        loss_seg = segmentation_loss(out.seg_logits, labels)
        loss_aff = afa_ext.affinity_loss(out.affinity, pairs)
        total = loss_cls + train.weight_seg * loss_seg + train.weight_affinity * loss_aff
        return Step(torch.stack([loss_cls, loss_seg, loss_aff]).detach(), labels, pairs), total

    @torch.no_grad()
    def targets(
        self, batch: dict[str, Any], images: Tensor, inputs: Tensor, tags: Tensor, cam: Tensor, phase: str
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

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16")

    def _label_precision(self) -> torch.autocast:
        train = self.config.train
        half = train.precision == "bf16" or (train.label_precision == "auto" and _multiplies_bf16(self.device))
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)


def _multiplies_bf16(device: torch.device) -> bool:
    """Whether the processor has matrix units for bfloat16; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Not in every torch from 2.10 on.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(capabilities.get("amx_bf16", False))


def train(
    config: Config,
    run: str | Path,
    *,
    resume: bool = False,
    on_log: Callable[[Record], None] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> None:
    """Train into the folder `run`: config.yaml, log.jsonl, checkpoints/, and model.safetensors once done.

    resume: go on from the last checkpoint in `run`; on one machine the weights come out as if never stopped. Without
    it, what an earlier run left in `run` is moved to run/previous. on_log: called with every record of log.jsonl.

    UserError for anything the configuration or the data has wrong, before the first iteration, and for a loss that
    is not finite.
    """
    run = Path(run)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = config.train
    data = config.data
    dataset = open_dataset(data, data.train_split, train=True, with_mask=False, progress=progress)
    validation = None
    if settings.eval_every < settings.iterations:
        validation = open_dataset(data, data.val_split, train=False, with_mask=True, progress=progress)
    torch.manual_seed(settings.seed)
    checkpoint = _last_checkpoint(run) if resume else None
    if resume:
        _check_resumable(run, checkpoint, config)
    # A resumed run's weights come from its checkpoint.
    model = build_model(config.model, len(dataset.classes))
    trainer = Trainer(model, config, device)
    start = 0
    if checkpoint is not None:
        start = _load_checkpoint(checkpoint, trainer)
        _trim_log(run / "log.jsonl", start)
    elif not resume:
        _put_aside(run)
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / "config.yaml", to_yaml(config))

    batches = train_loader(
        dataset, settings.batch_size, seed=settings.seed, start_iteration=start, workers=data.workers
    )
    log = _Log(run / "log.jsonl", config, device, on_log)
    bar = tqdm(
        total=settings.iterations, initial=start, unit="it", disable=not progress, dynamic_ncols=True, smoothing=0.05
    )
    with bar:
        for iteration in range(start, settings.iterations):
            bar.set_description(phase_of(settings, iteration), refresh=False)
            step = trainer.step(next(batches), iteration)
            log.add(iteration, step, trainer)
            done = iteration + 1
            bar.update()
            if done % settings.log_every == 0 or done == settings.iterations:
                bar.set_postfix_str(_summary(log.write()))
            saving = done % settings.checkpoint_every == 0 and done < settings.iterations
            measuring = validation is not None and done % settings.eval_every == 0 and done < settings.iterations
            if not (saving or measuring):
                continue
            log.check()
            with log.paused():
                if saving:
                    _save_checkpoint(run, trainer, dataset.classes, done)
                if measuring and validation is not None:
                    result = evaluate(trainer.model, validation, config, progress=progress)
                    scores = {f"val_{row}_miou": getattr(result, row)["miou"] for row in ("cam", "walk", "par", "seg")}
                    log.append({"iteration": done, **scores})
    save_checkpoint_weights(run / "model.safetensors", trainer.model, config, dataset.classes)
    # The finished model replaces the checkpoints: there is nothing left to resume.
    shutil.rmtree(run / "checkpoints", ignore_errors=True)


def _summary(record: Record) -> str:
    parts = [f"{name[5:]} {record[name]:.3f}" for name in LOSSES if record[name] is not None]
    return f"{' '.join(parts)} | {record['images_per_s']:.1f} img/s"


@dataclass
class _Log:
    """Gathers losses on the device and writes their means every log_every iterations: a wait for the device a line."""

    path: Path
    config: Config
    device: torch.device
    on_log: Callable[[Record], None] | None
    losses: list[Tensor] = field(default_factory=list)
    first: int = 0
    last: int = 0
    step: Step | None = None
    rate: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def add(self, iteration: int, step: Step, trainer: Trainer) -> None:
        if not self.losses:
            self.first = iteration
        self.losses.append(step.losses)
        self.last, self.step = iteration, step
        self.rate = trainer.optimizer.param_groups[0]["lr"]

    def check(self) -> list[list[float]]:
        """The losses gathered, one row an iteration; UserError names the first that is not finite."""
        rows = torch.stack(self.losses).tolist() if self.losses else []
        for offset, row in enumerate(rows):
            for name, value in zip(("classification", "segmentation", "affinity"), row, strict=True):
                if not math.isfinite(value):
                    raise UserError(
                        f"the {name} loss became {value} at iteration {self.first + offset + 1}; lower train.lr "
                        f"({self.config.train.lr:g}), train with train.precision=fp32 if it is not, and go on from the "
                        "last checkpoint with --resume"
                    )
        return rows

    def write(self) -> Record:
        rows = self.check()
        assert self.step is not None
        seconds = time.perf_counter() - self.since
        train = self.config.train
        # The first phase has no segmentation and no affinity loss: a line that spans its end averages the rest.
        both = rows[max(0, train.classify_until - self.first) :]
        means = [_mean([row[i] for row in (rows if i == 0 else both)]) for i in range(3)]
        record: Record = {
            "iteration": self.last + 1,
            "phase": phase_of(train, self.last),
            **dict(zip(LOSSES, means, strict=True)),
            "lr": self.rate,
            "images_per_s": len(rows) * train.batch_size / seconds,
            **_label_statistics(self.step),
        }
        self.append(record)
        self.losses.clear()
        self.since = time.perf_counter()
        return record

    def append(self, record: Record) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.on_log is not None:
            self.on_log(record)

    def paused(self) -> _Pause:
        """Time spent inside does not count in images per second."""
        return _Pause(self)


@dataclass
class _Pause:
    log: _Log
    started: float = 0.0

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.log.since += time.perf_counter() - self.started


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _label_statistics(step: Step) -> Record:
    """Of the last batch: shares of ignored and foreground pixels, and of like and unlike pairs among all pairs."""
    if step.labels is None or step.pairs is None:
        return {}
    ignored = step.labels == IGNORE
    shares = torch.stack(
        [
            ignored.float().mean(),
            ((step.labels != 0) & ~ignored).float().mean(),
            (step.pairs == 1).float().mean(),
            (step.pairs == 0).float().mean(),
        ]
    )
    names = ("label_ignored", "label_foreground", "pairs_same", "pairs_different")
    return {name: round(value, 5) for name, value in zip(names, shares.tolist(), strict=True)}


def _save_checkpoint(run: Path, trainer: Trainer, classes: list[str], iteration: int) -> None:
    """checkpoints/<iteration>/{model.safetensors, state.pt}, which takes its name once whole; then older ones go."""
    folder = run / "checkpoints"
    temporary = folder / f".{iteration:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_checkpoint_weights(temporary / "model.safetensors", trainer.model, trainer.config, classes)
    with atomic_path(temporary / "state.pt") as path:
        torch.save({"iteration": iteration, "optimizer": trainer.optimizer.state_dict()}, path)
    final = folder / f"{iteration:08d}"
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    for other in folder.iterdir():
        if other != final:
            shutil.rmtree(other, ignore_errors=True)


def _last_checkpoint(run: Path) -> Path | None:
    whole = [path for path in (run / "checkpoints").glob("[0-9]*") if path.is_dir()]
    return max(whole, default=None)


def _load_checkpoint(folder: Path, trainer: Trainer) -> int:
    """Fill the trainer from a checkpoint; returns the iterations done."""
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / "model.safetensors")
        state = torch.load(folder / "state.pt", map_location=trainer.device, weights_only=True)
        trainer.model.load_state_dict(tensors)
        trainer.optimizer.load_state_dict(state["optimizer"])
    except Exception as error:
        raise UserError(
            f"the checkpoint {folder} can't be read ({one_line(error)}); delete it, or train without --resume"
        ) from error
    return int(state["iteration"])


def _check_resumable(run: Path, checkpoint: Path | None, config: Config) -> None:
    if checkpoint is None:
        done = " (that run is finished)" if (run / "model.safetensors").is_file() else ""
        raise UserError(f"there is no checkpoint in {run / 'checkpoints'} to resume from{done}; train without --resume")
    before, now = to_dict(load_config(run / "config.yaml")), to_dict(config)
    free = {"data.root", "data.workers", "train.log_every", "train.eval_every", "train.checkpoint_every"}
    for section, values in now.items():
        for name, value in values.items():
            key = f"{section}.{name}"
            old = before.get(section, {}).get(name)
            if value != old and key not in free and section != "eval":
                raise UserError(
                    f"{key} is {value!r}, but the run in {run} was begun with {old!r}; set it back, or train without "
                    "--resume"
                )


def _trim_log(path: Path, iteration: int) -> None:
    """Drop what was logged after the checkpoint, which will be done again, and a line cut short by a crash."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["iteration"] <= iteration:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


def _put_aside(run: Path) -> None:
    """Move what an earlier run left here to run/previous, so that no old file passes for a new one."""
    results = ("model.safetensors", "metrics.json", "samples.npz", "report.html")
    old = [run / name for name in ("config.yaml", "log.jsonl", "checkpoints", *results)]
    old = [path for path in old if path.exists()]
    if not old:
        return
    previous = run / "previous"
    shutil.rmtree(previous, ignore_errors=True)
    previous.mkdir(parents=True)
    for path in old:
        path.rename(previous / path.name)
