"""Chooses the CUDA kernels' launch plans for this machine's GPU; writes afa_ext/tuning/sm_<architecture>.json.

    python benchmarks/tune.py                                     # every kernel, type and size class
    python benchmarks/tune.py --kernel stencil_step --dtype float16
    python benchmarks/tune.py --dry-run                           # the table alone, nothing is written

For each kernel, type and size class every compiled variant (csrc/README.md, "Variants and launch plans") is run twice
and compared with plain PyTorch in float64. One that differs, or differs from itself, is reported and never chosen. The
others are timed in turn, each as a captured CUDA graph, and the fastest is chosen. Plans of kernels that are left out
stay as they are if the same GPU was tuned before. Exit status 1 if a variant was wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from timing import captured, machine, print_table, time_candidates
from torch import Tensor

from afa_ext import _native, build_info, reference, tuning

DTYPES = ["float32", "float16", "bfloat16"]
LIMITS = {"float64": 1e-10, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""The largest difference from float64, relative to the largest value: what tests/cuda/kernels allows."""
RINGS = [1, 2, 4, 8, 12, 24]
OTHER_RINGS = [1, 2, 3, 5, 8, 13]
"""For the kernel that takes any neighbours."""
Size = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """How a kernel is run. Inputs have one first dimension, over which the reference is taken item by item."""

    sizes: Sequence[Size]  # one for each size class, in order
    inputs: Callable[[Size, torch.device], list[Tensor]]
    run: Callable[..., Tensor]  # an operator that launches the kernel
    reference: Callable[..., Tensor]


def rings_and_planes(size: Size, device: torch.device) -> list[Tensor]:
    """Weights of 48 neighbours, [B, 48, H, W], and planes, [B, C, H, W]."""
    batch, _, height, width = size
    weights = torch.rand(batch, 8 * len(RINGS), height, width, device=device)
    return [weights / weights.sum(1, keepdim=True), torch.rand(*size, device=device)]


PLANES = [(1, 3, 64, 64), (1, 21, 64, 64), (8, 3, 160, 160), (1, 21, 320, 320), (8, 21, 320, 320)]
"""Up to 2^14, 2^17, 2^20, 2^23 values, and more; PAR while training and at test time are the third and the last."""
STEPS = [(1, 3, 48, 48), (1, 21, 48, 48), (8, 21, 48, 48), (4, 32, 96, 96), (8, 240, 72, 64)]
"""The same for one step of a walk; the affinity is windowed, but for the third's, training's."""


def scores_and_affinity(size: Size, device: torch.device) -> list[Tensor]:
    """Scores, [B, C, H, W], and an affinity of radius 8, [B, N, N] or [B, N, 289]."""
    batch, _, height, width = size
    nodes = height * width
    pairs = nodes if size == STEPS[2] else (2 * 8 + 1) ** 2
    return [torch.rand(*size, device=device), torch.rand(batch, nodes, pairs, device=device)]


def step_scores(scores: Tensor) -> Tensor:
    """In the type that a step of a walk takes them in."""
    return scores if scores.dtype == torch.float64 else scores.float()


MAPS = [(1, 3, 8, 8), (1, 16, 16, 16), (1, 16, 32, 32), (8, 16, 32, 32), (4, 12, 48, 48)]
"""The same for the affinity of maps: of all pairs of nodes of a grid, M maps an image."""


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
    "stencil_step": Case(
        PLANES,
        rings_and_planes,
        lambda weights, planes: torch.ops.afa_ext.par_propagate(weights, planes, OTHER_RINGS, 10, None),
        lambda weights, planes: reference.par_propagate(weights, planes, dilations=OTHER_RINGS, num_iter=10),
    ),
    "stencil_ring": Case(
        PLANES,
        rings_and_planes,
        lambda weights, planes: torch.ops.afa_ext.par_propagate(weights, planes, RINGS, 10, None),
        lambda weights, planes: reference.par_propagate(weights, planes, dilations=RINGS, num_iter=10),
    ),
}
"""By kernel, as afa_ext.tuning.launch_plans() names them."""


class Plans(Protocol):
    """The part of afa_ext._C that the sweep uses."""

    def launch_plans(self, arch: int) -> list[dict[str, Any]]: ...
    def launch_plan(self, kernel: str, dtype: str, items: int, arch: int) -> str: ...
    def set_launch_plan(self, kernel: str, variant: str | None) -> None: ...
    def size_classes(self) -> list[int | None]: ...


class Bench(Protocol):
    """A device and its clock."""

    device: torch.device
    architecture: int

    def time(self, candidates: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
        """Milliseconds of each."""
        ...


class Gpu:
    """The current GPU, timed by events around the replay of captured graphs."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        major, minor = torch.cuda.get_device_capability(self.device)
        self.architecture = 10 * major + minor

    def time(self, candidates: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
        timings = time_candidates({name: captured(run) for name, run in candidates.items()}, self.device, seconds)
        return {name: timing.median for name, timing in timings.items()}


@dataclass(frozen=True)
class Row:
    """What was found for one kernel, type and size class."""

    kernel: str
    dtype: str
    size: Size
    max_items: int | None
    present: str  # the plan in force before
    milliseconds: Mapping[str, float]  # of the right variants
    wrong: Mapping[str, str]  # and why

    @property
    def variant(self) -> str | None:
        """The fastest right one."""
        return min(self.milliseconds, key=lambda name: self.milliseconds[name], default=None)


@contextmanager
def forced(plans: Plans, kernel: str, variant: str) -> Iterator[None]:
    plans.set_launch_plan(kernel, variant)
    try:
        yield
    finally:
        plans.set_launch_plan(kernel, None)


def expected(case: Case, inputs: Sequence[Tensor]) -> Tensor:
    """The reference in float64, item by item, as it needs many times the memory."""
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    return torch.cat([case.reference(*(t[i : i + 1] for t in wide)) for i in range(len(inputs[0]))])


def fault(run: Callable[[], Tensor], right: Tensor, limit: float) -> str | None:
    """What is wrong with the results of two runs, or None."""
    try:
        first, second = run(), run()
    except RuntimeError as raised:
        return str(raised).splitlines()[0]
    if first.shape != right.shape:
        return f"shape {list(first.shape)} in place of {list(right.shape)}"
    if not bool(first.isfinite().all()):
        return "values that are not finite"
    error = float((first.double() - right).abs().max() / right.abs().max().clamp_min(1e-30))
    if error > limit:
        return f"relative error {error:.2g}, over {limit:.2g}"
    if not torch.equal(first, second):
        return "two runs differ"
    return None


def measure(kernel: str, dtype: str, number: int, case: Case, bench: Bench, plans: Plans, seconds: float) -> Row:
    """Validates, then times, every variant of the kernel at the case's size for this size class."""
    size = case.sizes[number]
    inputs = [t.to(getattr(torch, dtype)) if t.is_floating_point() else t for t in case.inputs(size, bench.device)]

    def about() -> dict[str, Any]:
        return next(entry for entry in plans.launch_plans(bench.architecture) if entry["kernel"] == kernel)

    def runs(variant: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with forced(plans, kernel, variant):
                return case.run(*inputs)

        return run

    before = about()
    right = expected(case, inputs)
    wrong = {}
    for variant in before["variants"]:
        reason = fault(runs(variant), right, LIMITS[dtype])
        if reason:
            wrong[variant] = reason
    after, limits = about(), plans.size_classes()
    if after["times_chosen"] == before["times_chosen"]:
        sys.exit(f"the case of {kernel} in benchmarks/tune.py never launches it")
    items = after["last_items"]
    smallest = 0 if number == 0 else (limits[number - 1] or 0) + 1
    if items < smallest or items > (limits[number] or items):
        sys.exit(f"{kernel} at {size}: {items} work items are not in the size class up to {limits[number]}")
    valid = {variant: runs(variant) for variant in before["variants"] if variant not in wrong}
    times = bench.time(valid, seconds) if valid else {}
    present = plans.launch_plan(kernel, dtype, items, bench.architecture)
    return Row(kernel, dtype, size, limits[number], present, times, wrong)


def sweep(
    cases: Mapping[str, Case],
    dtypes: Sequence[str],
    bench: Bench,
    plans: Plans,
    seconds: float,
    report: Callable[[Row], None],
) -> list[Row]:
    """Measures every kernel, type and size class."""
    rows = []
    for kernel, case in cases.items():
        for dtype in dtypes:
            for number in range(len(case.sizes)):
                rows.append(measure(kernel, dtype, number, case, bench, plans, seconds))
                report(rows[-1])
    return rows


def print_row(row: Row) -> None:
    """A table of one size: variants, times, what was chosen and what was wrong."""
    table = []
    for variant in [*sorted(row.milliseconds, key=lambda name: row.milliseconds[name]), *row.wrong]:
        time = row.milliseconds.get(variant)
        note = ", ".join(
            text
            for text, holds in (("chosen", variant == row.variant), ("present plan", variant == row.present))
            if holds
        )
        if time is None:
            note = f"WRONG: {row.wrong[variant]}"
        table.append({"": variant, "median ms": "" if time is None else f"{time:.4f}", "note": note})
    print_table(f"{row.kernel}, {'x'.join(map(str, row.size))} {row.dtype}", table)


def table_of(
    rows: Sequence[Row], about: Mapping[str, Any], architecture: int, before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The file's content: the plans found, and those of `before` (the present file) for what was not measured, if they
    are of the same GPU."""
    plans = [
        {
            "kernel": row.kernel,
            "dtype": row.dtype,
            "max_items": row.max_items,
            "variant": row.variant,
            "ms": {name: round(time, 6) for name, time in row.milliseconds.items()},
        }
        for row in rows
        if row.variant is not None
    ]
    measured = {(row.kernel, row.dtype, row.max_items) for row in rows}
    if before and before["measured"] and before["gpu"] == about["device"]:
        kept = (plan for plan in before["plans"] if (plan["kernel"], plan["dtype"], plan["max_items"]) not in measured)
        plans = [*kept, *plans]
    return {
        "format": tuning.FORMAT,
        "architecture": architecture,
        "measured": True,
        "gpu": about["device"],
        "torch": about["torch"],
        "cuda": about["cuda"],
        "commit": about["commit"],
        "date": datetime.date.today().isoformat(),
        "plans": sorted(plans, key=lambda plan: (plan["kernel"], plan["dtype"], plan["max_items"] or sys.maxsize)),
    }


def write_table(table: Mapping[str, Any], folder: Path) -> Path:
    """<folder>/sm_<architecture>.json, whole or not at all."""
    path = folder / f"sm_{table['architecture']}.json"
    tuning.check_table(table, path.name)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def need_gpu() -> None:
    """Exits in one sentence where nothing can be tuned."""
    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} finds no GPU on this machine, so nothing was tuned.")
    if build_info()["cuda"] is None:
        sys.exit("afa_ext was built without CUDA, so nothing was tuned; build it again with nvcc on PATH.")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kernel", action="append", choices=sorted(CASES), help="tune this kernel (may be repeated)")
    parser.add_argument("--dtype", action="append", choices=sorted(LIMITS), help="and this type (may be repeated)")
    parser.add_argument("--seconds", type=float, default=0.2, help="time for each variant and size")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--out", type=Path, default=tuning.FOLDER, help="folder of the tables")
    options = parser.parse_args(arguments)
    need_gpu()
    bench = Gpu()
    cases = {kernel: case for kernel, case in CASES.items() if kernel in (options.kernel or CASES)}
    with torch.no_grad():
        rows = sweep(cases, options.dtype or DTYPES, bench, _native._C, options.seconds, print_row)
    present = options.out / f"sm_{bench.architecture}.json"
    before = None
    if present.exists():
        try:
            before = tuning.read_table(present)
        except ValueError as error:
            print(f"{error}; none of its plans is kept")
    table = table_of(rows, machine(bench.device), bench.architecture, before)
    changed = sum(row.variant not in (None, row.present) for row in rows)
    print(f"\n{len(rows)} sizes, {changed} with another variant than the plan in force")
    if not options.dry_run:
        print(f"written to {write_table(table, options.out)}")
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
