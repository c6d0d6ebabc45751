"""Times a full training step and its parts, and measures its memory, against the same step in plain PyTorch.

    python benchmarks/train_step.py             # CPU: the demo, some minutes; GPU: voc at crop 512, batch 4
    python benchmarks/train_step.py --quick                          # a small step, some seconds
    python benchmarks/train_step.py --config vit_b --classes 20 train.batch_size=2 --phase par --device cuda

The step is that of `afa.training.step.TrainStep`, by default in the last phase, on generated images, half of which have
a padded border. Plain PyTorch is the published implementation with the same network and losses: labels for one image
and one background score at a time, class activation maps of all classes with a separate forward pass at every scale,
dense matrices for the walk, explicit attention products, the affinity as a 1x1 convolution over all attention maps, and
`afa_ext.reference` for every operator. The demo's network ends with PAR, which the published network does not have; so
it is also timed without PAR. Peak memory is the memory of a step in addition to model and batch: on the CPU the growth
of a new process's peak resident set in its first step, including gradients and optimizer state; on CUDA the allocator's
peak in a later step.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from affinity import resident
from timing import RESULTS, print_table, time_candidates, write_results
from torch import Tensor

from afa.config import Config, LabelConfig, load_config, validate
from afa.labeling import label_maker
from afa.labeling.cam import ClassSet, combine_cams, pack_classes
from afa.labeling.inference import ScaleOutputs, run_scales
from afa.labeling.labels import Thresholds
from afa.model import build_model, heads
from afa.model.heads import AffinityHead
from afa.training import losses as loss_module
from afa.training import step as step_module
from afa.training.step import StepResult, TrainStep
from afa_ext import reference

OURS, PLAIN = "afa", "plain PyTorch, image by image"
PARTS = ("forward", "CAMs", "labels", "losses", "backward", "optimiser", "other")
CLASSES = {"demo": 8, "coco": 80}
QUICK = ["data.crop_size=64", "train.batch_size=2", "labels.par_iterations=2"]
STANDARD = {
    "cpu": [("demo", []), ("demo", ["model.refine_iterations=0"])],
    "cuda": [("voc", ["data.crop_size=512", "train.batch_size=4"])],
}
TIES = 0.002  # maximum share of pixels whose labels may differ because of rounding
TOLERANCE = 0.01  # relative, of the losses, which depend on those labels


class Clock:
    """Milliseconds that a step spends in each part; nested parts count toward the outer part."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.inside = False
        self.taken: dict[str, float] = defaultdict(float)
        self.pending: list[tuple[str, Any, Any]] = []

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def times(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            if self.inside:
                return call(*args, **options)
            self.inside, begin = True, self.now()
            try:
                return call(*args, **options)
            finally:
                self.pending.append((part, begin, self.now()))
                self.inside = False

        return timed

    def read(self) -> dict[str, float]:
        """Times of the parts since the last call."""
        taken = dict.fromkeys(PARTS, 0.0)
        for part, begin, end in self.pending:
            taken[part] += begin.elapsed_time(end) if self.device.type == "cuda" else (end - begin) * 1e3
        self.pending.clear()
        return taken


# ---- the published implementation


def plain_scales(model: Any, inputs: Tensor, *, base_cam: Tensor, **options: Any) -> ScaleOutputs:
    """Runs the network on every scale and its mirror image, including the first scale again."""
    return run_scales(model, inputs, **options)


def plain_cams(outputs: ScaleOutputs, classes: ClassSet) -> Tensor:
    """Computes the maps of all classes, then selects those of the tags."""
    straight = outputs.cams[0][0]
    count = straight.shape[1]
    everything = pack_classes(straight.new_ones(len(straight), count), count)
    return classes.gather(combine_cams(outputs.cams, everything, outputs.size))


def plain_par_labels(
    images: Tensor,
    cams: Tensor,
    classes: ClassSet,
    config: LabelConfig,
    *,
    thresholds: Thresholds,
    box: Tensor | None = None,
    **_: Any,
) -> Tensor:
    return reference.pseudo_labels(
        images,
        cams,
        classes.valid,
        low=thresholds[0],
        high=thresholds[1],
        box=box,
        class_index=classes.index,
        downscale=config.par_downscale,
        dilations=config.par_dilations,
        num_iter=config.par_iterations,
    )


def plain_walk_labels(
    images: Tensor,
    cams: Tensor,
    affinity: Tensor,
    grid: tuple[int, int],
    classes: ClassSet,
    config: LabelConfig,
    *,
    thresholds: Thresholds,
    box: Tensor | None = None,
    **_: Any,
) -> Tensor:
    tokens = F.interpolate(cams, size=grid, mode="bilinear", align_corners=False)
    low, high = (
        torch.cat(
            [
                reference.propagate_cams(
                    tokens[i : i + 1],
                    affinity[i : i + 1].to(tokens.dtype),
                    classes.valid[i : i + 1],
                    radius=config.walk_radius,
                    background=score,
                    power=config.walk_power,
                    steps=config.walk_steps,
                    eps=config.walk_eps,
                )
                for i in range(len(tokens))
            ]
        )
        for score in thresholds
    )
    return reference.refine_labels(
        images,
        high,
        classes.valid,
        low_scores=low,
        box=box,
        class_index=classes.index,
        downscale=config.par_downscale,
        dilations=config.par_dilations,
        num_iter=config.par_iterations if config.walk_par_iterations is None else config.walk_par_iterations,
    )


def plain_affinity(head: AffinityHead, queries: Tensor, keys: Tensor) -> Tensor:
    with torch.autocast(queries.device.type, enabled=False):
        attention = queries.float() @ keys.float().mT
        if head.standardized:
            both = attention + attention.mT
            deviation, mean = torch.std_mean(both, dim=(2, 3), correction=0, keepdim=True)
            attention = (both - mean) / deviation / 2  # symmetric, so the operator doubles it
        return reference.affinity_from_attention(attention, head.weight, head.bias)


def plain_affinity_loss(*arguments: Any) -> tuple[Tensor, Tensor]:
    with patch.object(loss_module, "afa_ext", reference):
        return loss_module.affinity_loss(*arguments)


PLAIN_LABELS: dict[str, Callable[..., Any]] = {
    "run_scales": plain_scales,
    "class_activation_maps": plain_cams,
    "par_weights": lambda *_: None,
    "par_labels": plain_par_labels,
    "walk_labels": plain_walk_labels,
    "affinity_loss": plain_affinity_loss,
}


# ---- a step


class Candidate:
    """A train_step and one batch; `run` performs a step and returns its result."""

    def __init__(self, name: str, config: Config, classes: int, phase: str, device: torch.device) -> None:
        torch.manual_seed(0)
        self.train_step = TrainStep(build_model(config.model, classes), config, device)
        self.clock = Clock(device)
        self.plain = name == PLAIN
        self.iteration = {"classify": 0, "par": 2, "walk": 3}[phase]
        self.batch = batch(config, classes)
        if self.plain:
            module: Any
            for module in self.train_step.model.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = False

    @contextmanager
    def ways(self) -> Iterator[None]:
        """Replaces the step's functions by those of this candidate, each timed as a part of the clock."""
        timed = self.clock.times
        model, optimizer = self.train_step.model, self.train_step.optimizer
        parts: list[tuple[Any, str, str]] = [
            (step_module, "run_scales", "CAMs"),
            (ScaleOutputs, "class_activation_maps", "CAMs"),
            *((label_maker, name, "labels") for name in ("par_weights", "par_labels", "walk_labels")),
            *(
                (step_module, f"{name}_loss", "losses")
                for name in ("classification", "segmentation", "affinity", "energy")
            ),
        ]
        with ExitStack() as stack:

            def put(target: Any, name: str, value: Any) -> None:
                stack.enter_context(patch.object(target, name, value))

            if self.plain:
                put(heads, "afa_ext", reference)
                put(step_module, "afa_ext", reference)
                put(AffinityHead, "forward", plain_affinity)
            for owner, name, part in parts:
                way = PLAIN_LABELS.get(name) if self.plain else None
                put(owner, name, timed(part, way or getattr(owner, name)))
            put(model, "forward", timed("forward", model.forward))
            put(torch.Tensor, "backward", timed("backward", torch.Tensor.backward))
            put(self.train_step, "_clip", timed("optimiser", self.train_step._clip))
            put(optimizer, "step", timed("optimiser", optimizer.step))
            yield

    def run(self) -> StepResult:
        with self.ways():
            return self.train_step.update(self.batch, self.iteration)


def batch(config: Config, classes: int) -> dict[str, Any]:
    """Smooth images with a little noise, one to three classes each, every second one with a padded border."""
    generator = torch.Generator().manual_seed(0)
    count, side = config.train.batch_size, config.data.crop_size
    images = F.interpolate(torch.rand(count, 3, 8, 8, generator=generator), size=(side, side), mode="bicubic")
    images = (images + 0.02 * torch.rand(images.shape, generator=generator)).clamp(0, 1).mul(255).byte()
    tags = torch.zeros(count, classes)
    box = torch.tensor([[0, side, 0, side]] * count)
    for i in range(count):
        tags[i, torch.randperm(classes, generator=generator)[: 1 + i % 3]] = 1
        if i % 2:
            box[i] = torch.tensor([side // 8, side, 0, side - side // 5])
    return {"image": images, "tags": tags, "box": box, "name": [str(i) for i in range(count)]}


def settings(name: str, overrides: list[str]) -> Config:
    """A ready configuration without weights, with one iteration per phase."""
    config = load_config(name, ["model.weights=null", "train.warmup=0", *overrides])
    train = config.train
    train.iterations, train.classify_until, train.par_until, train.warmup = 100, 1, 2, 0
    validate(config)
    return config


def check(candidates: dict[str, Candidate], config: Config) -> str:
    """Compares labels and losses of both implementations in float32; raises SystemExit if they differ."""
    with patch.multiple(config.train, precision="fp32", label_precision="same"):
        left, right = (candidates[name].run() for name in (OURS, PLAIN))
    losses = (left.losses - right.losses).abs() / right.losses.abs().clamp(min=1e-6)
    wrong = 0.0
    if left.labels is not None and right.labels is not None:
        wrong = float((left.labels != right.labels).double().mean())
    if wrong > TIES or float(losses.max()) > TOLERANCE:
        raise SystemExit(
            f"the steps differ: {wrong:.2%} of the labels, losses {left.losses.tolist()} and {right.losses.tolist()}; "
            "nothing was timed"
        )
    return f"validated: {wrong:.4%} of labels and at most {float(losses.max()):.2%} of a loss differ"


def peak_here(candidate: Candidate) -> int:
    """Bytes that a step adds to the peak; on the CPU in a process without earlier steps, on CUDA after one step."""
    if candidate.clock.device.type == "cuda":
        candidate.run()
        candidate.train_step.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        candidate.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    candidate.run()
    return resident("VmHWM:") - before


def peak(name: str, options: argparse.Namespace, candidate: Candidate) -> int:
    if candidate.clock.device.type == "cuda":
        return peak_here(candidate)
    command = [sys.executable, __file__, "--peak", name, "--config", options.config, "--phase", options.phase]
    command += ["--classes", str(options.classes), "--device", "cpu", *options.overrides]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure(config: Config, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Validates, times and prints; returns the rows for the JSON."""
    candidates = {name: Candidate(name, config, options.classes, options.phase, device) for name in (OURS, PLAIN)}
    agreed = check(candidates, config)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in candidates}

    def step(name: str) -> Callable[[], None]:
        def once() -> None:
            candidates[name].clock.pending.clear()
            begin = candidates[name].clock.now()
            candidates[name].run()
            end = candidates[name].clock.now()
            if device.type == "cuda":
                torch.cuda.synchronize()
            parts = candidates[name].clock.read()
            whole = begin.elapsed_time(end) if device.type == "cuda" else (end - begin) * 1e3
            rounds[name].append({**parts, "other": whole - sum(parts.values())})

        return once

    timings = time_candidates({name: step(name) for name in candidates}, device, options.seconds)
    peaks = {name: peak(name, options, candidate) for name, candidate in candidates.items()}
    about = {
        "config": " ".join([options.config, *options.overrides]),
        "phase": options.phase,
        "size": f"{config.train.batch_size}x3x{config.data.crop_size}x{config.data.crop_size}",
        "dtype": {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[config.train.precision],
    }
    rows: list[dict[str, Any]] = []
    for name, timing in timings.items():
        rows.append(
            {
                "candidate": name,
                **about,
                "median_ms": timing.median,
                "spread_ms": timing.spread,
                "rounds": timing.rounds,
                "times_ours": timing.median / timings[OURS].median,
                "peak_bytes": peaks[name],
            }
        )
    table = []
    for part in PARTS:
        taken = {name: statistics.median(r[part] for r in found[1:]) for name, found in rounds.items()}
        for name, value in taken.items():
            rows.append({"candidate": name, **about, "part": part, "median_ms": value, "times_ours": None})
        table.append(line(part, taken[OURS], taken[PLAIN]))
    table.append(line("whole step", timings[OURS].median, timings[PLAIN].median))
    table.append(line("peak memory, MB", peaks[OURS] / 1e6, peaks[PLAIN] / 1e6))
    title = f"a step of {about['config']}, {about['size']} {about['dtype']}, phase {options.phase}, on {device.type}"
    print_table(f"{title}; {agreed}; medians in ms of {timings[OURS].rounds} rounds", table)
    return rows


def line(what: str, ours: float, plain: float) -> dict[str, str]:
    times = f"{plain / ours:.1f}" if ours > 0.05 else ""
    return {"": what, OURS: f"{ours:.1f}", PLAIN: f"{plain:.1f}", "over ours": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small step and short rounds")
    parser.add_argument("--config", default=None, help="a ready configuration or a YAML file")
    parser.add_argument("--classes", type=int, default=None, help="foreground classes (demo 8, coco 80, else 20)")
    parser.add_argument("--phase", default="walk", choices=["classify", "par", "walk"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=None, help="time for each implementation of the step")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--peak", choices=[OURS, PLAIN], help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overridden settings")
    options = parser.parse_intermixed_args()
    device = torch.device(options.device)
    options.seconds = options.seconds or (1.0 if options.quick else 30.0)
    steps = [(options.config, [])] if options.config else STANDARD[device.type]
    if options.quick:
        steps = [("demo", QUICK)]
    given, rows = options.overrides, []
    classes = options.classes
    for options.config, overrides in steps:
        options.overrides = [*overrides, *given]
        options.classes = classes or CLASSES.get(options.config, 20)
        config = settings(options.config, options.overrides)
        if options.peak:
            print(peak_here(Candidate(options.peak, config, options.classes, options.phase, device)))
            return
        rows += measure(config, options, device)
    print(f"\nwritten to {write_results('train_step', device, rows, options.out)}")


if __name__ == "__main__":
    main()
