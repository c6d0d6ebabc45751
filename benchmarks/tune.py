"""Times every compiled variant of the CUDA kernels on this machine's GPU, beside the one that the rules choose.

    python benchmarks/tune.py                                     # every kernel, type and size
    python benchmarks/tune.py --kernel stencil --dtype float16

The rules are in csrc/heuristics.h; where another variant is faster here, they can be improved. Each variant is run
twice first and compared with plain PyTorch in float64; one that differs, or differs from itself, is reported and not
timed. The others are timed in turn, each as a captured CUDA graph. Exit status 1 if a variant was wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from timing import RESULTS, captured, print_table, time_candidates, write_results
from torch import Tensor

from afa_ext import _native, build_info, reference

DTYPES = ["float32", "float16", "bfloat16"]
LIMITS = {"float64": 1e-10, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Maximum difference from float64, relative to the largest value, as in tests/cuda/kernels."""
RINGS = [1, 2, 4, 8, 12, 24]
OTHER_RINGS = [1, 2, 3, 5, 8, 13]
"""For the kernel that supports any neighbors."""
Size = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """How a kernel is run. All inputs have the same first dimension; the reference is computed index by index."""

    sizes: Sequence[Size]
    inputs: Callable[[Size, torch.device], list[Tensor]]
    run: Callable[..., Tensor]  # an operator that launches the kernel
    reference: Callable[..., Tensor]


def rings_and_planes(size: Size, device: torch.device) -> list[Tensor]:
    """Weights of 48 neighbors, [B, 48, H, W], and planes, [B, C, H, W]."""
    batch, _, height, width = size
    weights = torch.rand(batch, 8 * len(RINGS), height, width, device=device)
    return [weights / weights.sum(1, keepdim=True), torch.rand(*size, device=device)]


PLANES = [(1, 3, 64, 64), (1, 21, 64, 64), (8, 3, 160, 160), (1, 21, 320, 320), (8, 21, 320, 320)]
"""From a few blocks to many. The third and the last are PAR in training and at test time."""
STEPS = [(1, 3, 48, 48), (1, 21, 48, 48), (8, 21, 48, 48), (4, 32, 96, 96), (8, 240, 72, 64)]
"""One step of a walk. The affinity is windowed, except in the third case, which is that of training."""


def scores_and_affinity(size: Size, device: torch.device) -> list[Tensor]:
    """Scores, [B, C, H, W], and an affinity of radius 8, [B, N, N] or [B, N, 289]."""
    batch, _, height, width = size
    nodes = height * width
    pairs = nodes if size == STEPS[2] else (2 * 8 + 1) ** 2
    return [torch.rand(*size, device=device), torch.rand(batch, nodes, pairs, device=device)]


def step_scores(scores: Tensor) -> Tensor:
    """Scores in the type that a walk step requires."""
    return scores if scores.dtype == torch.float64 else scores.float()


MAPS = [(1, 3, 8, 8), (1, 16, 16, 16), (1, 16, 32, 32), (8, 16, 32, 32), (4, 12, 48, 48)]
"""The affinity from M maps per image, for all pairs of nodes of a grid."""


def attention_maps(size: Size, device: torch.device) -> list[Tensor]:
    """Attention, [B, M, N, N]."""
    batch, maps, height, width = size
    return [torch.randn(batch, maps, height * width, height * width, device=device)]


def mixture(attention: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the maps, [M], and a bias, [1]."""
    weight = torch.linspace(-0.25, 0.25, attention.shape[1], device=attention.device, dtype=attention.dtype)
    return weight, attention.new_zeros(1)


CASES = {
    "affinity": Case(
        MAPS,
        attention_maps,
        lambda attention: torch.ops.afa_ext.affinity_from_attention(
            attention, *mixture(attention), 1, attention.shape[2], None, False
        ),
        lambda attention: reference.affinity_from_attention(attention, *mixture(attention)),
    ),
    "walk_step": Case(
        STEPS,
        scores_and_affinity,
        lambda scores, affinity: torch.ops.afa_ext.walk_step(
            step_scores(scores), affinity, 8, "square", 2.0, True, 1e-4, None
        ),
        lambda scores, affinity: reference.random_walk(
            scores, affinity, grid=(scores.shape[2], scores.shape[3]), radius=8
        ),
    ),
    "stencil": Case(
        PLANES,
        rings_and_planes,
        lambda weights, planes: torch.ops.afa_ext.par_propagate(weights, planes, OTHER_RINGS, 10, None),
        lambda weights, planes: reference.par_propagate(weights, planes, dilations=OTHER_RINGS, num_iter=10),
    ),
    "par_ring": Case(
        PLANES,
        rings_and_planes,
        lambda weights, planes: torch.ops.afa_ext.par_propagate(weights, planes, RINGS, 10, None),
        lambda weights, planes: reference.par_propagate(weights, planes, dilations=RINGS, num_iter=10),
    ),
}
"""Kernel name, as in afa_ext._C.kernel_variants() -> case."""


class Library(Protocol):
    """The part of afa_ext._C that the sweep uses."""

    def kernel_variants(self) -> list[dict[str, Any]]: ...
    def force_variant(self, kernel: str, variant: str | None) -> None: ...


class Bench(Protocol):
    """A device and its clock."""

    device: torch.device

    def time(self, candidates: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
        """Milliseconds per candidate."""
        ...


class Gpu:
    """The current GPU. Captured graphs are replayed and timed with CUDA events."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def time(self, candidates: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
        timings = time_candidates({name: captured(run) for name, run in candidates.items()}, self.device, seconds)
        return {name: timing.median for name, timing in timings.items()}


@dataclass(frozen=True)
class Row:
    """The variants of one kernel, for one type and size."""

    kernel: str
    dtype: str
    size: Size
    by_rule: str
    milliseconds: Mapping[str, float]  # of the variants with correct results
    wrong: Mapping[str, str]  # errors of the other variants

    @property
    def fastest(self) -> str | None:
        return min(self.milliseconds, key=lambda name: self.milliseconds[name], default=None)


@contextmanager
def forced(library: Library, kernel: str, variant: str) -> Iterator[None]:
    library.force_variant(kernel, variant)
    try:
        yield
    finally:
        library.force_variant(kernel, None)


def expected(case: Case, inputs: Sequence[Tensor]) -> Tensor:
    """The reference in float64, computed item by item to limit its memory."""
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    return torch.cat([case.reference(*(t[i : i + 1] for t in wide)) for i in range(len(inputs[0]))])


def fault(run: Callable[[], Tensor], right: Tensor, limit: float) -> str | None:
    """The error in the results of two runs, or None."""
    try:
        first, second = run(), run()
    except RuntimeError as raised:
        return str(raised).splitlines()[0]
    if first.shape != right.shape:
        return f"shape {list(first.shape)} instead of {list(right.shape)}"
    if not bool(first.isfinite().all()):
        return "non-finite values"
    error = float((first.double() - right).abs().max() / right.abs().max().clamp_min(1e-30))
    if error > limit:
        return f"relative error {error:.2g} exceeds {limit:.2g}"
    if not torch.equal(first, second):
        return "two runs gave different results"
    return None


def measure(kernel: str, dtype: str, size: Size, case: Case, bench: Bench, library: Library, seconds: float) -> Row:
    """Validates, then times, every variant of the kernel at this size."""
    inputs = [t.to(getattr(torch, dtype)) if t.is_floating_point() else t for t in case.inputs(size, bench.device)]

    def about() -> dict[str, Any]:
        return next(entry for entry in library.kernel_variants() if entry["kernel"] == kernel)

    def runs(variant: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with forced(library, kernel, variant):
                return case.run(*inputs)

        return run

    before = about()
    case.run(*inputs)
    after = about()
    if after["times_picked"] == before["times_picked"]:
        sys.exit(f"the case for {kernel} in benchmarks/tune.py does not launch it")
    right = expected(case, inputs)
    faults = {variant: fault(runs(variant), right, LIMITS[dtype]) for variant in before["variants"]}
    valid = {variant: runs(variant) for variant, reason in faults.items() if reason is None}
    times = bench.time(valid, seconds) if valid else {}
    wrong = {variant: reason for variant, reason in faults.items() if reason is not None}
    return Row(kernel, dtype, size, after["last_picked"], times, wrong)


def sweep(
    cases: Mapping[str, Case],
    dtypes: Sequence[str],
    bench: Bench,
    library: Library,
    seconds: float,
    report: Callable[[Row], None],
) -> list[Row]:
    """Measures every kernel, type and size."""
    rows = []
    for kernel, case in cases.items():
        for dtype in dtypes:
            for size in case.sizes:
                rows.append(measure(kernel, dtype, size, case, bench, library, seconds))
                report(rows[-1])
    return rows


def print_row(row: Row) -> None:
    """A table of one size: each variant's time, the fastest first, and the errors of wrong variants."""
    table = []
    for variant in [*sorted(row.milliseconds, key=lambda name: row.milliseconds[name]), *row.wrong]:
        time = row.milliseconds.get(variant)
        note = f"WRONG: {row.wrong[variant]}" if time is None else "by the rule" if variant == row.by_rule else ""
        table.append({"": variant, "median ms": "" if time is None else f"{time:.4f}", "note": note})
    print_table(f"{row.kernel}, {'x'.join(map(str, row.size))} {row.dtype}", table)


def summary(rows: Sequence[Row]) -> str:
    """How often the rule chose the fastest variant, and how much slower its other choices were."""
    timed = [row for row in rows if row.by_rule in row.milliseconds]
    ratios = [row.milliseconds[row.by_rule] / min(row.milliseconds.values()) for row in timed]
    best = sum(row.fastest == row.by_rule for row in timed)
    worst = f"; slowest choice: {max(ratios):.2f} times the fastest" if ratios else ""
    return f"{len(rows)} sizes; the rule's variant is the fastest in {best}{worst}"


def need_gpu() -> None:
    """Exits with a message if nothing can be timed on this machine."""
    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} finds no GPU on this machine, so nothing was timed.")
    if build_info()["cuda"] is None:
        sys.exit("afa_ext was built without CUDA, so nothing was timed; build it again with nvcc on PATH.")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kernel", action="append", choices=sorted(CASES), help="time this kernel (may be repeated)")
    parser.add_argument("--dtype", action="append", choices=sorted(LIMITS), help="and this type (may be repeated)")
    parser.add_argument("--seconds", type=float, default=0.2, help="time for each variant and size")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    need_gpu()
    bench = Gpu()
    cases = {kernel: case for kernel, case in CASES.items() if kernel in (options.kernel or CASES)}
    with torch.no_grad():
        rows = sweep(cases, options.dtype or DTYPES, bench, _native._C, options.seconds, print_row)
    print(f"\n{summary(rows)}")
    print(f"written to {write_results('tune', bench.device, [asdict(row) for row in rows], options.out)}")
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
