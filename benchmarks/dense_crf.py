"""Times dense_crf against pydensecrf, and bilateral_filter against one pass per channel.

    python benchmarks/dense_crf.py                     # 375 x 500 pixels, 9, 21 and 81 labels, about two minutes
    python benchmarks/dense_crf.py --quick             # a small size, some seconds
    python benchmarks/dense_crf.py --size 1x21x375x500 --photos VOC2012/JPEGImages

Needs pydensecrf2 (pip install pydensecrf2, or the extra `benchmark`), whose import name is pydensecrf. On a GPU without
it, this package's own CPU operator takes its place. Setting up is included on both sides. Before a size is timed,
labels must be equal on 99.9 % of the pixels and probabilities within 1e-3. pydensecrf uses one thread, and takes images
one by one. Without --photos, images are drawn: smooth regions with noise.

rloss's bilateralfilter, which filters one channel per pass on a lattice it builds once per image, is a SWIG module that
does not build against current Python versions; this package's filter, called the same way, stands in for it.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from par_kernel import parse_size
from PIL import Image
from timing import RESULTS, print_table, time_candidates, write_results

import afa_ext

STANDARD = ["1x9x375x500", "1x21x375x500", "1x81x375x500"]
QUICK = ["1x21x94x125"]
FILTER, QUICK_FILTER = "4x21x256x256", "2x21x64x64"
LABELS, PROBABILITIES = 0.999, 1e-3
SETTINGS = afa_ext.CRF_PRESETS["afa"]


def inputs(size: tuple[int, int, int, int], photos: Path | None, device: torch.device) -> tuple[torch.Tensor, ...]:
    """uint8 images and smooth probabilities."""
    batch, classes, height, width = size
    generator = torch.Generator().manual_seed(0)

    def smooth(channels: int, coarse: int) -> torch.Tensor:
        maps = torch.randn(batch, channels, coarse, coarse, generator=generator)
        return F.interpolate(maps, size=(height, width), mode="bicubic")

    if photos is None:
        colors = smooth(3, 12).mul(60).add(128) + 6 * torch.randn(batch, 3, height, width, generator=generator)
        images = colors.clamp(0, 255).byte()
    else:
        names = sorted(p for p in photos.iterdir() if p.suffix.lower() in (".jpg", ".png"))[:batch]
        if len(names) < batch:
            raise SystemExit(f"{photos} has {len(names)} photographs, {batch} are needed")
        pixels = [
            np.array(Image.open(p).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)) for p in names
        ]
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return images.to(device), (2 * smooth(classes, 24)).softmax(1).to(device)


def pydensecrf(images: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    from pydensecrf import densecrf

    (sigma, weight), (sigma_xy, sigma_rgb, bilateral) = SETTINGS["gaussian"], SETTINGS["bilateral"]
    out = []
    for image, scores in zip(images, probabilities, strict=True):
        classes, height, width = scores.shape
        crf = densecrf.DenseCRF2D(width, height, classes)
        energy = -np.log(np.clip(scores.numpy().reshape(classes, -1), 1e-5, 1.0))
        crf.setUnaryEnergy(np.ascontiguousarray(energy))
        crf.addPairwiseGaussian(sxy=sigma, compat=weight)
        colors = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        crf.addPairwiseBilateral(sxy=sigma_xy, srgb=sigma_rgb, rgbim=colors, compat=bilateral)
        out.append(torch.from_numpy(np.array(crf.inference(SETTINGS["num_iter"]))).view(scores.shape))
    return torch.stack(out)


def known_crf() -> tuple[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """Name and function to compare with: pydensecrf, or if it is not installed this package's CPU operator."""
    if importlib.util.find_spec("pydensecrf") is not None:
        return "pydensecrf", pydensecrf
    return "afa_ext.dense_crf on the CPU", functools.partial(afa_ext.dense_crf, **SETTINGS)


def report(
    title: str, candidates: dict[str, Callable[[], object]], size: str, device: torch.device, seconds: float, note: str
) -> list[dict[str, Any]]:
    """Times and prints; the first candidate is ours."""
    timings = time_candidates(candidates, device, seconds)
    ours = next(iter(timings.values())).median
    rows, lines = [], []
    for n, (name, timing) in enumerate(timings.items()):
        times = timing.median / ours if n else None
        rows.append(
            {
                "candidate": name,
                "size": size,
                "dtype": "float32",
                "median_ms": timing.median,
                "spread_ms": timing.spread,
                "rounds": timing.rounds,
                "times_ours": times,
            }
        )
        lines.append(
            {
                "": name,
                "median ms": f"{timing.median:.2f}",
                "± ms": f"{timing.spread:.2f}",
                "rounds": str(timing.rounds),
                "time over ours": f"{times:.1f}" if times else "",
            }
        )
    print_table(f"{title} {size} on {device.type}; {note}", lines)
    return rows


def measure_crf(
    size: tuple[int, int, int, int], photos: Path | None, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    images, probabilities = inputs(size, photos, device)
    cpu = images.cpu(), probabilities.cpu()
    name, other = known_crf()
    candidates: dict[str, Callable[[], object]] = {
        "afa_ext.dense_crf": lambda: afa_ext.dense_crf(images, probabilities, **SETTINGS),
        name: lambda: other(*cpu),
    }
    ours, theirs = afa_ext.dense_crf(images, probabilities, **SETTINGS).cpu(), other(*cpu)
    same = float((ours.argmax(1) == theirs.argmax(1)).float().mean())
    largest = float((ours - theirs).abs().max())
    if same < LABELS or largest > PROBABILITIES:
        raise SystemExit(f"dense_crf is wrong: {same:.3%} of labels are equal, probabilities differ by {largest:.2g}")
    note = f"validated, {same:.3%} of labels equal, probabilities within {largest:.1g}"
    return report("dense_crf", candidates, "x".join(map(str, size)), device, seconds, note)


def measure_filter(
    size: tuple[int, int, int, int], photos: Path | None, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    images, values = inputs(size, photos, device)
    settings: dict[str, Any] = {"sigma_xy": 50.0, "sigma_rgb": 15.0}

    def whole() -> torch.Tensor:
        return afa_ext.bilateral_filter(values, images=images, **settings)

    def by_channel() -> torch.Tensor:
        out = []
        for b in range(size[0]):
            lattice = torch.ops.afa_ext.lattice_build(afa_ext.crf._image_features(images[b : b + 1], 50.0, 15.0))
            planes = values[b : b + 1].split(1, dim=1)
            out.append(torch.cat([torch.ops.afa_ext.lattice_filter(v, lattice, 5, "none", False) for v in planes], 1))
        return torch.cat(out)

    expected = by_channel()
    error = float((whole() - expected).abs().max() / expected.abs().max())
    if error > 1e-5:
        raise SystemExit(f"bilateral_filter is wrong: relative error {error:.2g}")
    candidates: dict[str, Callable[[], object]] = {
        "afa_ext.bilateral_filter": whole,
        "one pass per channel": by_channel,
    }
    note = f"validated, relative error {error:.1g}"
    return report("bilateral_filter", candidates, "x".join(map(str, size)), device, seconds, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small size and short rounds")
    parser.add_argument("--size", type=parse_size, action="append", help="batch x labels x height x width")
    parser.add_argument("--photos", type=Path, help="folder of photographs to use, in the order of their names")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=None, help="time for each candidate and size")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu" and importlib.util.find_spec("pydensecrf") is None:
        raise SystemExit("pydensecrf is not installed; install it with `pip install pydensecrf2`")
    sizes = options.size or [parse_size(s) for s in (QUICK if options.quick else STANDARD)]
    seconds = options.seconds or (0.3 if options.quick else 4.0)
    rows = []
    for size in sizes:
        rows += measure_crf(size, options.photos, device, seconds)
    rows += measure_filter(parse_size(QUICK_FILTER if options.quick else FILTER), options.photos, device, seconds)
    print(f"\nwritten to {write_results('dense_crf', device, rows, options.out)}")


if __name__ == "__main__":
    main()
