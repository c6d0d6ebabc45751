"""Times affinity_from_attention with affinity_loss, forward and backward, against plain PyTorch, and their memory.

    python benchmarks/affinity.py                           # the standard sizes, about a minute on 2 cores
    python benchmarks/affinity.py --quick                   # a small size, some seconds
    python benchmarks/affinity.py --size 8x16x32x32 --radius 8 --device cuda --dtype float16

A size is batch x maps x height x width of the token grid. "As published" is AFA's implementation: a 1x1 convolution
over S + S^T, a sigmoid and a masked loss over all pairs; "einsum" sums the maps before transposing, the fastest version
in plain PyTorch. Peak memory is the memory of a step in addition to its inputs, including the gradient of the
attention: on the CPU the growth of a new process's peak resident set, on CUDA the allocator's peak. The limit is the
time to read the window's pairs of every map once and to write the gradient of every map once, at this machine's copy
rate. On CUDA the forward pass of the affinity is also timed separately; its limit is the time to read every map and to
write the result once.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from par_kernel import parse_size, validate
from timing import RESULTS, captured, limits, print_table, time_candidates, write_results
from torch import Tensor, nn

import afa_ext

STANDARD = ["1x16x32x32", "2x16x32x32", "1x16x20x20"]
QUICK = ["1x16x16x16"]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.float16: 2e-2, torch.bfloat16: 1e-1}
OURS, ALL_PAIRS = "afa_ext, window", "afa_ext, all pairs"
PUBLISHED, EINSUM = "plain PyTorch, as published", "plain PyTorch, einsum"

Size = tuple[int, int, int, int]


class Problem:
    """Inputs of one size, and the losses to compare; each can be differentiated."""

    def __init__(self, size: Size, radius: int, device: torch.device, dtype: torch.dtype) -> None:
        batch, maps, height, width = size
        self.grid, self.radius = (height, width), radius
        generator = torch.Generator().manual_seed(0)
        attention = torch.randn(batch, maps, height * width, height * width, generator=generator)
        self.attention = attention.to(device, dtype).requires_grad_()
        project = nn.Conv2d(maps, 1, 1).to(device, dtype)
        assert project.bias is not None
        self.weight, self.bias = project.weight, project.bias
        coarse = torch.randint(0, 3, (batch, 1, 4, 4), generator=generator).float()
        coarse[:, :, 0, 0] = 255  # some tokens are ignored
        tokens = nn.functional.interpolate(coarse, size=self.grid, mode="nearest")[:, 0].byte().to(device)
        self.labels = afa_ext.affinity_labels(tokens, stride=1, radius=radius)
        self.window_labels = afa_ext.affinity_labels(tokens, stride=1, radius=radius, windowed=True)
        self.losses: dict[str, Callable[[], Tensor]] = {
            OURS: self.window,
            ALL_PAIRS: self.all_pairs,
            PUBLISHED: self.published,
            EINSUM: self.einsum,
        }

    def window(self) -> Tensor:
        affinity = afa_ext.affinity_from_attention(
            self.attention, self.weight, self.bias, grid=self.grid, radius=self.radius
        )
        return afa_ext.affinity_loss(affinity, self.window_labels)

    def all_pairs(self) -> Tensor:
        affinity = afa_ext.affinity_from_attention(self.attention, self.weight, self.bias)
        return afa_ext.affinity_loss(affinity, self.labels)

    def published(self) -> Tensor:
        return self.masked_loss(nn.functional.conv2d(self.attention + self.attention.mT, self.weight, self.bias)[:, 0])

    def einsum(self) -> Tensor:
        mixed = torch.einsum("bkij,k->bij", self.attention, self.weight.flatten())
        return self.masked_loss(mixed + mixed.mT + self.bias)

    def masked_loss(self, logits: Tensor) -> Tensor:
        affinity = torch.sigmoid(logits).float()
        same, different = (self.labels == 1).float(), (self.labels == 0).float()
        loss_same = (same * (1 - affinity)).sum() / (same.sum() + 1)
        return 0.5 * loss_same + 0.5 * (different * affinity).sum() / (different.sum() + 1)

    def step(self, name: str) -> Tensor:
        """The loss, with its gradients left in the inputs."""
        self.attention.grad = self.weight.grad = self.bias.grad = None
        loss = self.losses[name]()
        loss.backward()
        return loss.detach()

    def gradients(self) -> list[Tensor]:
        """Gradients of the attention, and of weight and bias together, as the bias's sums nearly cancel."""
        attention, weight, bias = self.attention.grad, self.weight.grad, self.bias.grad
        assert attention is not None and weight is not None and bias is not None
        return [attention, torch.cat([weight.flatten(), bias])]


def resident(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) << 10
    raise SystemExit(f"/proc/self/status has no {key}; peak memory on the CPU can only be measured on Linux")


def peak_of_this_process(name: str, problem: Problem) -> int:
    """Bytes that the first step of a candidate adds to this process's peak resident set."""
    Problem((1, 2, 4, 4), 1, torch.device("cpu"), torch.float32).step(name)  # libraries and threads
    before = resident("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    problem.step(name)
    return resident("VmHWM:") - before


def peak_memory(name: str, problem: Problem, arguments: list[str]) -> int:
    """Bytes that a step of a candidate needs in addition to its inputs."""
    if problem.attention.is_cuda:
        problem.step(name)
        problem.attention.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        problem.step(name)
        return torch.cuda.max_memory_allocated() - before
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--peak-of", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def copy_rate(source: Tensor) -> tuple[int, float]:
    """Bytes moved by a copy of the tensor, and its minimum time in milliseconds."""
    target = torch.empty_like(source)
    copies = [time_candidates({"": lambda: target.copy_(source)}, source.device, seconds=0.05)[""] for _ in range(8)]
    return 2 * source.nbytes, min(timing.median for timing in copies)


def forward_rows(problem: Problem, size_text: str, dtype_text: str, seconds: float) -> list[dict[str, Any]]:
    """affinity_from_attention without the loss on all pairs, called directly and in a CUDA graph."""
    device, attention = problem.attention.device, problem.attention.detach()
    weight, bias = problem.weight.detach(), problem.bias.detach()

    def run() -> Tensor:
        return afa_ext.affinity_from_attention(attention, weight, bias)

    moved = attention.nbytes + run().nbytes
    timings = time_candidates({"forward only": run, "forward only, in a CUDA graph": captured(run)}, device, seconds)
    return [
        {
            "candidate": name,
            "size": size_text,
            "radius": None,
            "dtype": dtype_text,
            "median_ms": timing.median,
            "spread_ms": timing.spread,
            "rounds": timing.rounds,
            "times_ours": None,
            "peak_bytes": None,
            "gb_per_s": moved / timing.median / 1e6,
            "copy_gb_per_s": limits(device).bytes_per_s / 1e9,
            "share_of_limit": limits(device).milliseconds(moved) / timing.median,
        }
        for name, timing in timings.items()
    ]


def measure(size: Size, radius: int, device: torch.device, dtype: torch.dtype, seconds: float) -> list[dict[str, Any]]:
    """Validates, times and prints one size; returns its rows for the JSON."""
    batch, maps, height, width = size
    size_text, dtype_text = "x".join(map(str, size)), str(dtype).removeprefix("torch.")
    problem = Problem(size, radius, device, dtype)
    error = 0.0
    # cuDNN's convolutions use TF32 by default. They are timed so, but the expected values are made without them.
    with torch.backends.cudnn.flags(enabled=False):
        expected = [problem.step(PUBLISHED), *problem.gradients()]
        for name in problem.losses:
            for actual, wanted in zip([problem.step(name), *problem.gradients()], expected, strict=True):
                error = max(error, validate(name, actual, wanted, TOLERANCE[dtype]))
    moved, copy_ms = copy_rate(problem.attention.detach())
    inside = int((afa_ext.reference.walk.window_mask((height, width), radius, "square", device)).sum())
    needed = batch * maps * (inside + (height * width) ** 2) * problem.attention.element_size()
    limit = needed / moved * copy_ms
    timings = time_candidates({name: partial(problem.step, name) for name in problem.losses}, device, seconds)
    arguments = ["--size", size_text, "--radius", str(radius), "--dtype", dtype_text]
    rows: list[dict[str, Any]] = []
    table = []
    for name, timing in timings.items():
        peak = peak_memory(name, problem, arguments)
        rows.append(
            {
                "candidate": name,
                "size": size_text,
                "radius": radius,
                "dtype": dtype_text,
                "median_ms": timing.median,
                "spread_ms": timing.spread,
                "rounds": timing.rounds,
                "times_ours": None if name == ALL_PAIRS else timing.median / timings[OURS].median,
                "peak_bytes": peak,
                "gb_per_s": needed / timing.median / 1e6,
                "copy_gb_per_s": moved / copy_ms / 1e6,
                "share_of_limit": limit / timing.median,
            }
        )
        table.append(
            {
                "": name,
                "median ms": f"{timing.median:.2f}",
                "± ms": f"{timing.spread:.2f}",
                "rounds": str(timing.rounds),
                "time over ours": f"{timing.median / timings[OURS].median:.1f}",
                "GB/s": f"{rows[-1]['gb_per_s']:.1f}",
                "of limit": f"{rows[-1]['share_of_limit']:.0%}",
                "peak MB": f"{peak / 1e6:.0f}",
                "peak over ours": f"{peak / rows[0]['peak_bytes']:.1f}",
            }
        )
    title = f"affinity {size_text}, radius {radius}, {dtype_text} on {device.type}, forward and backward"
    print_table(
        f"{title}; validated, relative error {error:.1e}; a copy moves {rows[0]['copy_gb_per_s']:.1f} GB/s", table
    )
    if device.type == "cuda":
        for row in forward_rows(problem, size_text, dtype_text, seconds):
            share = f"{row['share_of_limit']:.0%} of the limit"
            print(f"  {row['candidate']}: {row['median_ms']:.3f} ms, {row['gb_per_s']:.0f} GB/s, {share}")
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small size and short rounds")
    parser.add_argument("--size", type=parse_size, action="append", help="batch x maps x height x width")
    parser.add_argument("--radius", type=int, default=8, help="radius of the window, tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "float16", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=None, help="time for each candidate and size")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)  # in a separate process: print one candidate's peak
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    sizes = options.size or [parse_size(s) for s in (QUICK if options.quick else STANDARD)]
    seconds = options.seconds or (0.3 if options.quick else 3.0)
    if options.peak_of:
        device = torch.device("cpu")
        print(peak_of_this_process(options.peak_of, Problem(sizes[0], options.radius, device, dtype)))
        return
    rows = [row for size in sizes for row in measure(size, options.radius, device, dtype, seconds)]
    print(f"\nwritten to {write_results('affinity', device, rows, options.out)}")


if __name__ == "__main__":
    main()
