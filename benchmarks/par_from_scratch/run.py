"""Builds, checks and times the versions of PAR that docs/par_from_scratch.md explains.

    python benchmarks/par_from_scratch/run.py                # one thread, and all threads for those that use them
    python benchmarks/par_from_scratch/run.py --threads 1    # one thread only
    python benchmarks/par_from_scratch/run.py --size 1x21x320x320 --version v5 --version v6

A size is batch x classes x height x width. Version 1 is too slow for the standard size, so all versions also run at a
small one, on one thread. The result of each version is compared with afa_ext.reference before it is timed. Affinity and
iterations are timed separately; the time of a version is their sum. The limit is that of benchmarks/par_kernel.py: the
rate of the iterations if everything is in the L1 cache. C++ is compiled into a temporary folder with $CXX, or g++.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the other benchmarks, if this one runs as a script
from par_from_scratch import v1, v2, v3
from par_kernel import ITERATIONS, NEIGHBORS, inputs, limit_gfma, parse_size, validate
from timing import RESULTS, print_table, time_candidates, write_results

import afa_ext
from afa_ext import reference

CPU = torch.device("cpu")
FOLDER = Path(__file__).resolve().parent
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared"]
TOLERANCE = 1e-4
SMALL, STANDARD = "1x3x32x32", "1x21x160x160"
MIN_WIDTH = 16  # the longest vector
CHANGES = {
    "v1": "plain Python",
    "v2": "PyTorch as published: 48 gathered copies",
    "v3": "PyTorch: views of one padded copy",
    "v4": "C++ in the order of the equation",
    "v5": "the innermost loop runs along padded rows",
    "v6": "sums stay in registers",
    "v7": "vectorized affinity, fast exponential",
    "v8": "rows of all classes together, no denormals",
    "v9": "threads",
    "afa_ext": "the kernel of this package",
}
"""Version -> what it changes."""
SLOW = ("v1",)
"""Versions that only run at the small size."""
THREADED = ("v9", "afa_ext")
"""Versions that also run with more than one thread."""


@dataclass(frozen=True)
class Version:
    """`affinity` maps images [B, 3, H, W] to weights [B, 48, H, W]; `propagate` runs all iterations."""

    name: str
    affinity: Callable[[Tensor], Tensor]
    propagate: Callable[[Tensor, Tensor], Tensor]


def compile_version(name: str, folder: Path) -> ctypes.CDLL:
    """Compiles <name>.cpp into the folder and loads it."""
    library = folder / f"{name}.so"
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    command = [*compiler, *FLAGS, str(FOLDER / f"{name}.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def compiled(name: str, folder: Path) -> Version:
    """A C++ version; its C functions process one image, with as many threads as torch."""
    library = compile_version(name, folder)

    def call(function: Any, tensors: Sequence[Tensor], sizes: Sequence[int]) -> None:
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        function.restype = None
        function(*pointers, *(ctypes.c_int64(size) for size in (*sizes, torch.get_num_threads())))

    def affinity(images: Tensor) -> Tensor:
        if images.shape[3] < MIN_WIDTH:
            raise ValueError(f"{name} needs images at least {MIN_WIDTH} pixels wide, got shape {tuple(images.shape)}")
        images = images.contiguous()
        weights = torch.empty(len(images), NEIGHBORS, *images.shape[2:])
        for pair in zip(images, weights, strict=True):
            call(library.par_affinity, pair, images.shape[1:])
        return weights

    def propagate(weights: Tensor, masks: Tensor) -> Tensor:
        weights, masks = weights.contiguous(), masks.contiguous()
        refined = torch.empty_like(masks)
        for triple in zip(weights, masks, refined, strict=True):
            call(library.par_propagate, triple, (*masks.shape[1:], ITERATIONS))
        return refined

    return Version(name, affinity, propagate)


def build(names: Sequence[str], folder: Path) -> list[Version]:
    """The versions; C++ is compiled into the folder, which is not needed afterwards."""
    python = {
        "v1": (v1.par_affinity, v1.par_propagate),
        "v2": (v2.par_affinity, v2.par_propagate),
        "v3": (v3.par_affinity, v3.par_propagate),
        "afa_ext": (afa_ext.par_affinity, lambda weights, masks: afa_ext.par_propagate(weights, masks)),
    }
    return [Version(name, *python[name]) if name in python else compiled(name, folder) for name in names]


def check(version: Version, images: Tensor, masks: Tensor, expected: Tensor) -> float:
    """The relative error; exits with a message if it is too large."""
    return validate(version.name, version.propagate(version.affinity(images), masks), expected, TOLERANCE)


def measure(size: tuple[int, int, int, int], versions: Sequence[Version], seconds: float) -> list[dict[str, Any]]:
    """One row per version, with the current number of threads."""
    images, masks = inputs(size, CPU, torch.float32)
    expected = reference.par_refine(images, masks, num_iter=ITERATIONS)
    weights = afa_ext.par_affinity(images)
    errors = {version.name: check(version, images, masks, expected) for version in versions}
    affinity = time_candidates({v.name: partial(v.affinity, images) for v in versions}, CPU, seconds)
    propagate = time_candidates({v.name: partial(v.propagate, weights, masks) for v in versions}, CPU, seconds)
    limit = limit_gfma(size, CPU, torch.float32, seconds / 2)
    rows = []
    for version in versions:
        first, second = affinity[version.name], propagate[version.name]
        rate = masks.numel() * NEIGHBORS * ITERATIONS / second.median / 1e6
        rows.append(
            {
                "candidate": version.name,
                "change": CHANGES[version.name],
                "size": "x".join(map(str, size)),
                "dtype": "float32",
                "threads": torch.get_num_threads(),
                "affinity_ms": first.median,
                "iterations_ms": second.median,
                "median_ms": first.median + second.median,
                "spread_ms": first.spread + second.spread,
                "rounds": min(first.rounds, second.rounds),
                "relative_error": errors[version.name],
                "gfma_per_s": rate,
                "limit_gfma_per_s": limit,
                "share_of_limit": rate / limit,
            }
        )
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = [
        {
            "": f"{row['candidate']}: {row['change']}",
            "affinity ms": f"{row['affinity_ms']:.3f}",
            "iterations ms": f"{row['iterations_ms']:.3f}",
            "sum ms": f"{row['median_ms']:.3f}",
            "± ms": f"{row['spread_ms']:.3f}",
            "GFMA/s": f"{row['gfma_per_s']:.2f}",
            "of limit": f"{row['share_of_limit']:.0%}",
            "error": f"{row['relative_error']:.0e}",
        }
        for row in rows
    ]
    plural = "" if rows[0]["threads"] == 1 else "s"
    limit = f"{rows[0]['limit_gfma_per_s']:.1f} GFMA/s"
    print_table(f"PAR {rows[0]['size']} float32, {rows[0]['threads']} thread{plural}; validated; limit {limit}", table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="for the versions that use threads"
    )
    parser.add_argument("--size", type=parse_size, action="append", help="batch x classes x height x width")
    parser.add_argument("--version", choices=list(CHANGES), action="append", help="only this one")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each candidate and size")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args()
    names = [name for name in CHANGES if name in (options.version or CHANGES)]
    with tempfile.TemporaryDirectory() as folder:
        versions = build(names, Path(folder))
    faster = [version for version in versions if version.name not in SLOW]
    threaded = [version for version in versions if version.name in THREADED]
    runs = [(parse_size(SMALL), 1, versions)]
    for size in options.size or [parse_size(STANDARD)]:
        runs += [(size, 1, faster), (size, options.threads, threaded if options.threads > 1 else [])]
    rows = []
    with torch.no_grad():
        for size, threads, due in runs:
            torch.set_num_threads(threads)
            if due:
                rows += measure(size, due, options.seconds)
                show(rows[-len(due) :])
    torch.set_num_threads(options.threads)
    print(f"\nwritten to {write_results('par_from_scratch', CPU, rows, options.out)}")


if __name__ == "__main__":
    main()
