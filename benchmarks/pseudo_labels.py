"""Times pseudo_labels against the published implementation in plain PyTorch, one image at a time.

    python benchmarks/pseudo_labels.py                           # the standard sizes, about two minutes on 2 cores
    python benchmarks/pseudo_labels.py --quick                   # a small size, some seconds
    python benchmarks/pseudo_labels.py --size 8x80x320x320 --present 4 --device cuda --dtype float16

A size is batch x classes x height x width; each image has `--present` of the classes. The limit is the minimum time for
PAR on this machine: reading the affinity once per iteration at the rate of a copy of that many bytes, or its
multiply-adds at the rate of a float32 matrix product, whichever is longer; on CUDA at the rates of a large copy and
product. The limit of everything except PAR: images and the present CAMs are read, labels are written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from par_kernel import parse_size
from timing import RESULTS, limits, print_table, time_candidates, write_results

import afa_ext
from afa_ext import reference
from afa_ext.reference.labels import shrink

STANDARD = ["4x20x512x512", "4x20x320x320"]
QUICK = ["2x20x96x96"]
ITERATIONS = 10
NEIGHBORS = 48
DOWNSCALE = 2
THRESHOLDS = 2
TIES = 1e-4  # maximum share of pixels whose labels may differ because of rounding
MATRIX = 1024


def inputs(
    size: tuple[int, int, int, int], present: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Smooth images with a little noise, smooth CAMs, and `present` different classes per image."""
    batch, classes, height, width = size
    generator = torch.Generator().manual_seed(0)

    def smooth(channels: int, coarse: int) -> torch.Tensor:
        maps = torch.rand(batch, channels, coarse, coarse, generator=generator)
        return F.interpolate(maps, size=(height, width), mode="bicubic").clamp(0, 1)

    images = smooth(3, max(2, width // 16))
    images = (images + 0.02 * torch.rand(images.shape, generator=generator)).clamp(0, 1).mul(255).byte()
    labels = torch.zeros(batch, classes)
    for i in range(batch):
        labels[i, torch.randperm(classes, generator=generator)[:present]] = 1
    return images.to(device), smooth(classes, 16).to(device, dtype), labels.to(device)


def limits_ms(weights: torch.Tensor, maps: int, rest: int, device: torch.device) -> tuple[float, float]:
    """Milliseconds for PAR's iterations on `maps` maps in total, and for moving `rest` bytes, at this machine's copy
    and multiplication rates."""
    multiply_adds = ITERATIONS * NEIGHBORS * maps * weights.shape[2] * weights.shape[3]
    if device.type == "cuda":
        best_of = limits(device)
        return best_of.milliseconds(ITERATIONS * weights.nbytes, multiply_adds), best_of.milliseconds(rest)
    copied, factor = torch.empty_like(weights), torch.rand(MATRIX, MATRIX, device=device)

    def best(run: Callable[[], object]) -> float:
        return min(time_candidates({"": run}, device, seconds=0.05)[""].median for _ in range(8))

    read = best(lambda: copied.copy_(weights)) / 2  # a copy moves each byte twice
    par = max(ITERATIONS * read, multiply_adds / MATRIX**3 * best(lambda: factor @ factor))
    return par, rest / weights.nbytes * read


def measure(
    size: tuple[int, int, int, int], present: int, device: torch.device, dtype: torch.dtype, seconds: float
) -> list[dict[str, Any]]:
    """Validates, times and prints one size; returns its rows for the JSON."""
    images, cams, labels = inputs(size, present, device, dtype)
    colors = shrink(images / 255, DOWNSCALE).to(torch.promote_types(dtype, torch.float32))
    weights = afa_ext.par_affinity(colors)

    def ours(**options: Any) -> torch.Tensor:
        return afa_ext.pseudo_labels(images, cams, labels, max_classes=present, **options)

    def loop() -> torch.Tensor:
        return reference.pseudo_labels(images, cams, labels)

    wrong = float((ours() != loop()).double().mean())
    if wrong > TIES:
        raise SystemExit(f"pseudo_labels is wrong: {wrong:.2%} of its labels differ; nothing was timed")
    compared: dict[str, Callable[[], object]] = {"afa_ext.pseudo_labels": ours, "plain PyTorch, image by image": loop}
    parts: dict[str, Callable[[], object]] = {
        "  with a given affinity": lambda: ours(weights=weights),
        "  all but PAR": lambda: ours(num_iter=0),
    }
    timings = time_candidates(compared, device, seconds) | time_candidates(parts, device, seconds / 2)
    rest = images.nbytes + cams.nbytes // size[1] * present + 8 * cams[:, 0].numel()
    limit, rest_limit = limits_ms(weights, size[0] * present * THRESHOLDS, rest, device)
    rows, table = [], []
    for name, timing in timings.items():
        own_limit = rest_limit if name == "  all but PAR" else limit
        share = own_limit / timing.median
        times = timing.median / timings["afa_ext.pseudo_labels"].median if name in compared else None
        rows.append(
            {
                "candidate": name.strip(),
                "size": "x".join(map(str, size)),
                "present": present,
                "dtype": str(dtype).removeprefix("torch."),
                "median_ms": timing.median,
                "spread_ms": timing.spread,
                "rounds": timing.rounds,
                "limit_ms": own_limit,
                "share_of_limit": share,
                "times_ours": times,
            }
        )
        table.append(
            {
                "": name,
                "median ms": f"{timing.median:.2f}",
                "± ms": f"{timing.spread:.2f}",
                "rounds": str(timing.rounds),
                "share of limit": f"{share:.1%}",
                "time over ours": f"{times:.1f}" if times else "",
            }
        )
    title = f"pseudo_labels {'x'.join(map(str, size))} {dtype}, {present} classes per image, on {device.type}"
    print_table(f"{title}; validated, {wrong:.4%} of labels differ; limit {limit:.1f} ms", table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small size and short rounds")
    parser.add_argument("--size", type=parse_size, action="append", help="batch x classes x height x width")
    parser.add_argument("--present", type=int, default=2, help="classes per image")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "float16", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=None, help="time for each candidate and size")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    sizes = options.size or [parse_size(s) for s in (QUICK if options.quick else STANDARD)]
    seconds = options.seconds or (0.3 if options.quick else 2.0)
    rows = []
    for size in sizes:
        rows += measure(size, min(options.present, size[1]), device, dtype, seconds)
    print(f"\nwritten to {write_results('pseudo_labels', device, rows, options.out)}")


if __name__ == "__main__":
    main()
