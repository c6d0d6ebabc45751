"""Measures the data loader for training crops: images per second and worker, and the time spent waiting for batches.

    python benchmarks/loading.py                                     # generated images, about two minutes on 2 cores
    python benchmarks/loading.py --quick                             # a few seconds
    python benchmarks/loading.py --config voc data.root=/data/VOC2012    # your data, with that configuration's settings

Generated images are JPEGs of VOC's size, cropped as in the VOC recipe, and photographs of 12 megapixels, downscaled as
in own.yaml. "waiting" is the share of time that a consumer waits for batches if it needs `--step` milliseconds per
batch without using the CPU, like a GPU; training logs it as wait_share. The decoding rate is that of the check of all
files before training. Rates of a single process are based on its CPU time, which other processes affect little; rates
of the loader are based on wall-clock time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timing import RESULTS, print_table, write_results

from afa.config import Config, load_config
from afa.data import TaggedDataset, open_dataset, train_loader
from afa.data.synthetic.backgrounds import TRAIN_PHOTOGRAPHS, photograph
from afa.data.transforms import check_image, read_image

WORKERS = (0, 1, 2)


def draw(root: Path, count: int, size: tuple[int, int]) -> None:
    """Write `count` JPEGs of (height, width) with camera noise to one folder."""
    height, width = size
    rng = np.random.default_rng(0)
    (root / "thing").mkdir(parents=True)
    for number in range(count):
        pixels = photograph(rng, max(size), TRAIN_PHOTOGRAPHS)[:height, :width]
        noisy = pixels + rng.normal(0, 6, pixels.shape)
        path = root / "thing" / f"{number}.jpg"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def load_rate(dataset: TaggedDataset, batch_size: int, workers: int, seconds: float) -> float:
    """Maximum crops per second; the start of the workers is excluded."""
    batches = train_loader(dataset, batch_size, seed=0, workers=workers)
    # Batches prefetched before the measurement must not be counted.
    for _ in range(max(1, 4 * workers)):
        next(batches)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        next(batches)
        count += batch_size
    return count / (time.perf_counter() - started)


def wait_share(dataset: TaggedDataset, batch_size: int, workers: int, step: float, seconds: float) -> float:
    """Share of the time that a consumer spends waiting if it needs `step` seconds per batch for other work."""
    batches = train_loader(dataset, batch_size, seed=0, workers=workers)
    next(batches)
    before, started = batches.wait_seconds, time.perf_counter()
    while time.perf_counter() - started < seconds:
        time.sleep(step)
        next(batches)
    return (batches.wait_seconds - before) / (time.perf_counter() - started)


def rate_of(work: Callable[[int], object], seconds: float) -> float:
    """Calls of work(0), work(1), ... per second of CPU time, the best of three rounds."""
    rates = []
    for _ in range(3):
        count, started = 0, time.process_time()
        while time.process_time() - started < seconds / 3:
            work(count)
            count += 1
        rates.append(count / (time.process_time() - started))
    return max(rates)


def measure(title: str, config: Config, seconds: float, step: float) -> list[dict[str, Any]]:
    """One row per number of workers, and one for decoding only."""
    data, batch_size = config.data, config.train.batch_size
    dataset = open_dataset(data, data.train_split, train=True, with_mask=False)
    kilobytes = statistics.mean(path.stat().st_size for path in dataset.paths[:200]) / 1e3
    rows: list[dict[str, Any]] = []
    for workers in WORKERS:
        rate = max(load_rate(dataset, batch_size, workers, seconds / 3) for _ in range(3))
        waiting = wait_share(dataset, batch_size, workers, step, seconds)
        rows.append(
            {
                "size": title,
                "workers": workers,
                "images_per_s": rate,
                "images_per_s_per_worker": rate / max(1, workers),
                "wait_share": waiting,
            }
        )
    paths = dataset.paths
    crops = rate_of(lambda i: dataset[i % len(paths)], seconds)
    whole = rate_of(lambda i: read_image(paths[i % len(paths)]), seconds)
    small = rate_of(lambda i: read_image(paths[i % len(paths)], data.largest_side), seconds)
    check = rate_of(lambda i: check_image(paths[i % len(paths)]), seconds)
    alone = {"crops_per_s": crops, "decode_per_s": whole, "shrunk_per_s": small, "check_per_s": check}
    rows.append({"size": title, **alone})
    print_table(
        f"{title}: files of {kilobytes:,.0f} kB, crop {data.crop_size}, batch {batch_size}, step {1e3 * step:.0f} ms",
        [
            {
                "workers": str(row["workers"]),
                "images/s": f"{row['images_per_s']:.0f}",
                "per worker": f"{row['images_per_s_per_worker']:.0f}",
                "waiting": f"{row['wait_share']:.0%}",
            }
            for row in rows[:-1]
        ],
    )
    shrunk = f", {small:.0f} when downscaled to {data.largest_side}" if data.largest_side else ""
    print(f"  per second of CPU time: {crops:.0f} crops; {whole:.0f} files decoded{shrunk}; {check:.0f} checked")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="with --config")
    parser.add_argument("--config", help="measure the data of this configuration instead of generated images")
    parser.add_argument("--quick", action="store_true", help="few images and short rounds")
    parser.add_argument("--step", type=float, default=100.0, help="milliseconds per batch of the consumer (100)")
    parser.add_argument("--seconds", type=float, default=None, help="time for each measurement")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args()
    seconds, step = options.seconds or (0.6 if options.quick else 6.0), options.step / 1e3
    if options.config:
        config = load_config(options.config, options.overrides)
        rows = measure(str(config.data.root), config, seconds, step)
    else:
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            for ready, size, count in (("voc", (375, 500), 100), ("own", (3000, 4000), 4)):
                root = Path(folder) / ready
                draw(root, min(count, 4) if options.quick else count, size)
                config = load_config(ready, [f"data.root={root}", "data.train_split=all"])
                rows += measure(f"{size[1]}×{size[0]}, as {ready}.yaml", config, seconds, step)
    print(f"\nwritten to {write_results('loading', torch.device('cpu'), rows, options.out)}")


if __name__ == "__main__":
    main()
