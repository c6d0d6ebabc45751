"""Times par_refine against plain PyTorch and torch.compile.

    python benchmarks/par_kernel.py                           # the standard sizes, about two minutes on 2 cores
    python benchmarks/par_kernel.py --quick                   # small sizes, some seconds
    python benchmarks/par_kernel.py --size 1x21x320x320 --size 8x3x160x160 --device cuda --dtype float16

A size is batch x classes x height x width. The plain-PyTorch reference is the published implementation: a convolution
of a padded copy with one-hot kernels gathers the neighbors, for every dilation and iteration.

The limit is measured in the same run. On the CPU it is the rate of loads from the L1 cache, one per multiply-add: the
rate of the iterations on one row of 64 pixels and 14 classes, which stays in that cache, on one thread, times the
number of threads. On CUDA it is the longer of two times: reading weights and masks and writing masks once per iteration
at the rate of a large copy, or the float32 multiply-adds at the rate of a large matrix product. On CUDA the affinity
has a limit, too: images are read and weights written once. AFA_EXT_SIMD=avx2 measures another instruction set.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import RESULTS, captured, limits, print_table, time_candidates, write_results

import afa_ext
from afa_ext import reference

STANDARD = ["1x21x320x320", "1x3x160x160", "2x5x64x64"]
QUICK = ["1x3x80x80", "1x5x40x40"]
ITERATIONS = 10
NEIGHBORS = 48
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def parse_size(text: str) -> tuple[int, int, int, int]:
    try:
        batch, classes, height, width = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a size is batch x classes x height x width, such as 1x21x320x320, got '{text}'"
        ) from None
    return batch, classes, height, width


def inputs(size: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Smooth images with a little noise, so that the weights vary as for a photograph."""
    batch, classes, height, width = size
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, max(2, height // 16), max(2, width // 16), generator=generator)
    images = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    images = images + 0.02 * torch.rand(batch, 3, height, width, generator=generator)
    masks = torch.rand(batch, classes, height, width, generator=generator)
    return [images.to(device, dtype), masks.to(device, dtype)]


def run_in_cache(iterations: int) -> Callable[[], torch.Tensor]:
    """Iterations whose weights and masks stay in a core's L1 cache, on one thread."""
    weights, masks = torch.rand(1, NEIGHBORS, 1, 64) / NEIGHBORS, torch.rand(1, 14, 1, 64)

    def run() -> torch.Tensor:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return afa_ext.par_propagate(weights, masks, num_iter=iterations)
        finally:
            torch.set_num_threads(threads)

    return run


def limit_gfma(size: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """The limit described in the module's docstring, in 1e9 multiply-adds per second."""
    batch, classes, height, width = size
    if device.type == "cpu":
        iterations = 2000
        taken = time_candidates({"in cache": run_in_cache(iterations)}, device, seconds)["in cache"].median
        return 14 * 64 * NEIGHBORS * iterations * torch.get_num_threads() / taken / 1e6
    pixels = batch * height * width
    multiply_adds = pixels * classes * NEIGHBORS
    moved = pixels * (NEIGHBORS + 2 * classes) * dtype.itemsize
    return multiply_adds / limits(device).milliseconds(moved, multiply_adds) / 1e6


def affinity_limit_ms(size: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> float | None:
    """On CUDA: the time of three differences, two sums and a square per channel and neighbor, or of the bytes."""
    if device.type == "cpu":
        return None
    pixels = size[0] * size[2] * size[3]
    return limits(device).milliseconds(pixels * (3 + NEIGHBORS) * dtype.itemsize, pixels * NEIGHBORS * 3 * 4)


def validate(name: str, actual: torch.Tensor, expected: torch.Tensor, limit: float) -> float:
    error = float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())
    if not error <= limit:
        raise SystemExit(f"{name} is wrong: relative error {error:.3g} exceeds {limit:.3g}; nothing was timed")
    return error


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes and short rounds")
    parser.add_argument("--size", type=parse_size, action="append", help="batch x classes x height x width")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "float16", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=None, help="time for each candidate and size")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile (its first run is slow)")
    parser.add_argument("--compile-at", type=parse_size, action="append", help="use torch.compile only at this size")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    sizes = options.size or [parse_size(s) for s in (QUICK if options.quick else STANDARD)]
    seconds = options.seconds or (0.3 if options.quick else 2.0)

    rows = []
    for size in sizes:
        images, masks = inputs(size, device, dtype)
        weights = afa_ext.par_affinity(images)
        candidates: dict[str, Callable[[], Any]] = {
            "afa_ext.par_refine": lambda: afa_ext.par_refine(images, masks),  # noqa: B023
            "plain PyTorch": lambda: reference.par_refine(images, masks),  # noqa: B023
        }
        if not options.no_compile and size in (options.compile_at or [size]):
            torch._dynamo.reset()
            compiled = torch.compile(reference.par_refine)
            candidates["torch.compile"] = lambda: compiled(images, masks)  # noqa: B023
        with torch.no_grad():
            expected = candidates["plain PyTorch"]()
            error = validate("afa_ext.par_refine", candidates["afa_ext.par_refine"](), expected, TOLERANCE[dtype])
            timings = time_candidates(candidates, device, seconds)
            if device.type == "cuda":
                candidates["  in a CUDA graph"] = captured(candidates["afa_ext.par_refine"])
                timings |= time_candidates({"  in a CUDA graph": candidates["  in a CUDA graph"]}, device, seconds / 2)
            timings |= time_candidates(
                {
                    "  its affinity": lambda: afa_ext.par_affinity(images),  # noqa: B023
                    "  its iterations": lambda: afa_ext.par_propagate(weights, masks),  # noqa: B023
                },
                device,
                seconds / 2,
            )
            limit = limit_gfma(size, device, dtype, seconds / 4)
            affinity_limit = affinity_limit_ms(size, device, dtype)
        multiply_adds = masks.numel() * NEIGHBORS * ITERATIONS
        ours = timings["afa_ext.par_refine"].median
        table = []
        for name, timing in timings.items():
            iterates = "affinity" not in name
            rate = multiply_adds / timing.median / 1e6 if iterates else None
            compared = not name.startswith(" ")
            share = rate / limit if rate else affinity_limit and affinity_limit / timing.median
            rows.append(
                {
                    "candidate": name.strip(),
                    "size": "x".join(map(str, size)),
                    "dtype": options.dtype,
                    "median_ms": timing.median,
                    "spread_ms": timing.spread,
                    "rounds": timing.rounds,
                    "gfma_per_s": rate,
                    "limit_gfma_per_s": limit if rate else None,
                    "share_of_limit": share,
                    "times_ours": timing.median / ours if compared else None,
                }
            )
            table.append(
                {
                    "": name,
                    "median ms": f"{timing.median:.3f}",
                    "± ms": f"{timing.spread:.3f}",
                    "rounds": str(timing.rounds),
                    "GFMA/s": f"{rate:.2f}" if rate else "",
                    "of limit": f"{share:.0%}" if share else "",
                    "time over ours": f"{timing.median / ours:.1f}" if compared else "",
                }
            )
        title = f"par_refine {'x'.join(map(str, size))} {options.dtype} on {device.type}, {ITERATIONS} iterations"
        print_table(f"{title}; validated, relative error {error:.1e}; limit {limit:.1f} GFMA/s", table)
    print(f"\nwritten to {write_results('par_kernel', device, rows, options.out)}")


if __name__ == "__main__":
    main()
