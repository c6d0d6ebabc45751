"""Times dense_crf against pydensecrf, and bilateral_filter against one pass per channel.

    python benchmarks/dense_crf.py                     # 375 x 500 pixels, 9, 21 and 81 labels, about two minutes
    python benchmarks/dense_crf.py --quick             # a small size, some seconds
    python benchmarks/dense_crf.py --size 1x21x375x500 --photos VOC2012/JPEGImages

Needs pydensecrf2 (pip install pydensecrf2, or the extra `benchmark`), whose import name is pydensecrf. On a GPU without
it, this package's own CPU operator takes its place. Setting up is included on both sides. Before a size is timed,
labels must be equal on 99.9 % of the pixels and probabilities within 1e-3. pydensecrf uses one thread, and takes images
one by one. Without --photos, images are drawn: smooth regions with noise.

rloss's bilateralfilter, which filters one channel per pass on a lattice it builds once per image, is a SWIG module that
does not build against current Python versions. Two others stand in for it: pydensecrf's lattice, which is by the same
author, run through inference steps with one label, and this package's own filter, one channel at a time.

The last rows time the whole evaluation of an image by the published multi-scale test: the network of `afa train voc`
with random weights at three scales with flips, and then the CRF.
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
from afa.config import load_config
from afa.labeling.inference import infer
from afa.model import build_model

STANDARD = ["1x9x375x500", "1x21x375x500", "1x81x375x500"]
QUICK = ["1x21x94x124"]
EVALUATED = ["1x21x375x500"]
FILTER, QUICK_FILTER = "4x21x256x256", "2x21x64x64"
LABELS, PROBABILITIES = 0.999, 1e-3
SETTINGS = afa_ext.CRF_PRESETS["afa"]
FILTER_SETTINGS: dict[str, Any] = {"sigma_xy": 50.0, "sigma_rgb": 15.0}
EVALUATION = ["model.weights=null", "eval.longer_side=512", "eval.scales=1,0.5,0.75", "eval.flip=true"]


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


def pydensecrf_lattice(image: torch.Tensor, energy: np.ndarray[Any, Any], weight: float) -> Any:
    """A CRF of pydensecrf with one bilateral kernel, not normalized; `energy` [labels, H*W]."""
    from pydensecrf import densecrf

    crf = densecrf.DenseCRF2D(image.shape[2], image.shape[1], len(energy))
    crf.setUnaryEnergy(energy)
    crf.addPairwiseBilateral(
        sxy=FILTER_SETTINGS["sigma_xy"],
        srgb=FILTER_SETTINGS["sigma_rgb"],
        rgbim=np.ascontiguousarray(image.permute(1, 2, 0).numpy()),
        compat=weight,
        normalization=densecrf.NO_NORMALIZATION,
    )
    return crf


def pydensecrf_filter(image: torch.Tensor, values: torch.Tensor, weight: float = 1e-2) -> torch.Tensor:
    """One channel [H, W] in (0, 1), filtered by pydensecrf: a step of inference with two labels turns the probabilities
    v and 1 - v into those with log-odds logit(v) + weight * (filter(v) - filter(1 - v))."""
    flat = values.double().flatten().numpy()
    step = _one_step(pydensecrf_lattice(image, np.stack([-np.log(flat), -np.log(1 - flat)]).astype(np.float32), weight))
    difference = np.log(step[0]) - np.log(step[1]) - np.log(flat / (1 - flat))
    ones = afa_ext.bilateral_filter(torch.ones(1, 1, *values.shape), images=image[None], **FILTER_SETTINGS)
    return (torch.from_numpy(difference / weight).view(values.shape) + ones[0, 0]) / 2


def _one_step(crf: Any) -> np.ndarray[Any, Any]:
    current, first, second = crf.startInference()
    crf.stepInference(current, first, second)
    return np.array(current, np.float64)


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
        times = timing.median / ours
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
                "time over ours": f"{times:.2g}" if n else "",
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
    sigmas = FILTER_SETTINGS["sigma_xy"], FILTER_SETTINGS["sigma_rgb"]

    def whole() -> torch.Tensor:
        return afa_ext.bilateral_filter(values, images=images, **FILTER_SETTINGS)

    def by_channel() -> torch.Tensor:
        out = []
        for b in range(size[0]):
            lattice = torch.ops.afa_ext.lattice_build(afa_ext.crf._image_features(images[b : b + 1], *sigmas))
            planes = values[b : b + 1].split(1, dim=1)
            out.append(torch.cat([torch.ops.afa_ext.lattice_filter(v, lattice, 5, "none", False) for v in planes], 1))
        return torch.cat(out)

    def steps_of_pydensecrf() -> None:
        energy = np.zeros((1, size[2] * size[3]), np.float32)
        for image in images:
            crf = pydensecrf_lattice(image, energy, weight=1.0)
            buffers = crf.startInference()
            for _ in range(size[1]):
                crf.stepInference(*buffers)

    expected = by_channel()
    error = float((whole() - expected).abs().max() / expected.abs().max())
    if error > 1e-5:
        raise SystemExit(f"bilateral_filter is wrong: relative error {error:.2g}")
    candidates: dict[str, Callable[[], object]] = {
        "afa_ext.bilateral_filter": whole,
        "one pass per channel": by_channel,
    }
    if device.type == "cpu":
        other = pydensecrf_filter(images[0], values[0, 0])
        error = max(error, float((whole()[0, 0] - other).abs().max() / other.abs().max()))
        if error > PROBABILITIES:
            raise SystemExit(f"bilateral_filter differs from pydensecrf: relative error {error:.2g}")
        candidates["pydensecrf's lattice, one pass per channel"] = steps_of_pydensecrf
    note = f"validated, relative error {error:.1g}"
    return report("bilateral_filter", candidates, "x".join(map(str, size)), device, seconds, note)


def measure_evaluation(
    size: tuple[int, int, int, int], photos: Path | None, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    images, _ = inputs(size, photos, device)
    config = load_config("voc", EVALUATION)
    model = build_model(config.model, size[1] - 1).to(device).eval()
    name, other = known_crf()

    @torch.inference_mode()
    def probabilities() -> torch.Tensor:
        logits = infer(model, images, config, {"seg"}).seg_logits
        assert logits is not None
        return logits.softmax(1)

    candidates: dict[str, Callable[[], object]] = {
        "afa_ext.dense_crf": lambda: afa_ext.dense_crf(images, probabilities(), **SETTINGS),
        name: lambda: other(images.cpu(), probabilities().cpu()),
        "without CRF": probabilities,
    }
    rows = report("evaluation", candidates, "x".join(map(str, size)), device, seconds, "images of one batch")
    without = rows[-1]["median_ms"]
    for row in rows[:-1]:
        speed = 1e3 * size[0] / row["median_ms"]
        print(f"  {row['candidate']}: {speed:.2f} images/s, share of the CRF {1 - without / row['median_ms']:.0%}")
    return [{"operator": "evaluation", **row} for row in rows]


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
    rows += measure_evaluation(parse_size((QUICK if options.quick else EVALUATED)[0]), options.photos, device, seconds)
    print(f"\nwritten to {write_results('dense_crf', device, rows, options.out)}")


if __name__ == "__main__":
    main()
