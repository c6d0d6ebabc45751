"""Counts the GPU work of each public operator at the benchmarks' sizes: launches, scratch memory, synchronizations.

    python -m tools.launch_counts           # count and write the table to docs/kernels.md
    python -m tools.launch_counts --check   # count; fail if the table in docs/kernels.md is out of date

The shipped library runs on the stand-in GPU (tests/cuda/README.md), which has the number of multiprocessors and the
shared memory of an H100 but runs no kernels. Additional launches, copies or synchronizations change the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
PAGE, BLOCK, TOOL = ROOT / "docs" / "kernels.md", "launches", "launch_counts.py"
H100 = {"AFA_STAND_IN_PROCESSORS": "132", "AFA_STAND_IN_SHARED_BYTES": str(227 << 10), "AFA_STAND_IN_DEVICES": "1"}

if TYPE_CHECKING:
    from torch import Tensor

    Case = tuple[str, str, Callable[[], tuple[Callable[[], Tensor], list[Tensor]]]]


def cases() -> list[Case]:
    """Operator, size, and a function that creates the call and the tensors that need gradients."""
    import torch

    import afa_ext

    def floats(*shape: int, grad: bool = False) -> Tensor:
        return torch.empty(shape, device="cuda").requires_grad_(grad)

    def numbers(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.uint8, device="cuda")

    def refine(name: str, batch: int, classes: int, size: int) -> Case:
        def make() -> tuple[Callable[[], Tensor], list[Tensor]]:
            images, masks = floats(batch, 3, size, size), floats(batch, classes, size, size, grad=True)
            return lambda: getattr(afa_ext, name)(images, masks), [masks]

        return name, f"{batch}×{classes}×{size}×{size}", make

    def walk(label: str, size: tuple[int, int, int, int], radius: int, steps: int) -> Case:
        def make() -> tuple[Callable[[], Tensor], list[Tensor]]:
            batch, _, height, width = size
            nodes = height * width
            scores, affinity = floats(*size, grad=True), floats(batch, nodes, nodes, grad=True)
            options: dict[str, Any] = {"grid": (height, width), "radius": radius, "steps": steps}
            return lambda: afa_ext.random_walk(scores, affinity, **options), [scores, affinity]

        return "random_walk", f"{'×'.join(map(str, size))}, radius {radius}, {label}", make

    def affinity_and_loss() -> tuple[Callable[[], Tensor], list[Tensor]]:
        attention, weight, bias = floats(2, 16, 1024, 1024, grad=True), floats(16, grad=True), floats(1, grad=True)
        tokens = numbers(2, 512, 512)

        def call() -> Tensor:
            affinity = afa_ext.affinity_from_attention(attention, weight, bias, grid=(32, 32), radius=8)
            return afa_ext.affinity_loss(affinity, afa_ext.affinity_labels(tokens, stride=16, radius=8, windowed=True))

        return call, [attention, weight, bias]

    def features() -> tuple[Callable[[], Tensor], list[Tensor]]:
        given = floats(1, 448, 47, 63, grad=True)
        return lambda: afa_ext.feature_affinity(given, 5), [given]

    def edges() -> tuple[Callable[[], Tensor], list[Tensor]]:
        given = floats(1, 94, 125)
        return lambda: afa_ext.edge_affinity(given, 5), []

    def to_edge() -> tuple[Callable[[], Tensor], list[Tensor]]:
        cams, edge = floats(1, 4, 94, 125), floats(1, 94, 125)
        return lambda: afa_ext.propagate_to_edge(cams, edge), []

    def cams() -> tuple[Callable[[], Tensor], list[Tensor]]:
        maps, affinity, present = floats(4, 20, 32, 32), floats(4, 1024, 1024), torch.ones(4, 20, device="cuda")
        return lambda: afa_ext.propagate_cams(maps, affinity, present, radius=8, background=0.35), []

    def pseudo_labels() -> tuple[Callable[[], Tensor], list[Tensor]]:
        images, maps, present = numbers(4, 3, 512, 512), floats(4, 20, 512, 512), torch.ones(4, 20, device="cuda")
        return lambda: afa_ext.pseudo_labels(images, maps, present, max_classes=3), []

    def refine_labels() -> tuple[Callable[[], Tensor], list[Tensor]]:
        images, present = numbers(4, 3, 512, 512), torch.ones(4, 20, device="cuda")
        high, low = floats(4, 21, 32, 32), floats(4, 21, 32, 32)
        return lambda: afa_ext.refine_labels(images, high, present, low_scores=low, max_classes=3), []

    return [
        refine("par_refine", 1, 21, 320),
        refine("par_refine", 1, 3, 160),
        refine("par_refine", 2, 5, 64),
        refine("pamr_refine", 1, 21, 320),
        walk("1 step", (1, 21, 48, 48), 8, 1),
        walk("1 step", (4, 4, 32, 32), 8, 1),
        walk("256 steps", (1, 21, 47, 63), 5, 256),
        ("propagate_cams", "4×20×32×32, radius 8", cams),
        ("propagate_to_edge", "1×4×94×125, radius 5, 256 steps", to_edge),
        ("edge_affinity", "1×94×125, radius 5", edges),
        ("feature_affinity", "1×448×47×63, radius 5", features),
        ("affinity_loss of affinity_from_attention", "2×16×32×32, radius 8", affinity_and_loss),
        ("pseudo_labels", "4×20×512×512", pseudo_labels),
        ("refine_labels", "4×21×32×32, images 512×512", refine_labels),
    ]


def count() -> list[dict[str, Any]]:
    """A row per case; must run in a process with the stand-in GPU."""
    import torch

    from tests.cuda import device

    device.attach(Path(os.environ["AFA_STAND_IN_BRIDGE"]))

    def part(recording: device.Recording, results: list[Tensor]) -> dict[str, int]:
        kept = sum({t.data_ptr(): t.nbytes for t in results}.values())
        return {
            "launches": len(recording.launches),
            "torch": recording.torch_operations,
            "scratch": recording.allocated_bytes - kept,
            "waits": recording.synchronizations,
        }

    rows = []
    with device.kernels_skipped():
        for name, size, make in cases():
            call, leaves = make()
            torch.cuda.synchronize()
            with device.recorded() as forward:
                out = call()
            row: dict[str, Any] = {"name": name, "size": size, "forward": part(forward, [out])}
            if leaves:
                incoming = torch.ones_like(out)
                torch.cuda.synchronize()
                with device.recorded() as backward:
                    grads = torch.autograd.grad(out, leaves, incoming)
                row["backward"] = part(backward, list(grads))
                del grads, incoming
            rows.append(row)
            del out, call, leaves
            torch.cuda.synchronize()
            faults = device.faults()
            assert not faults, faults
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| operator | size | launches | torch's own operations | scratch, MiB | waits |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        parts = [row[way] for way in ("forward", "backward") if way in row]
        cells = [" + ".join(str(part[key]) for part in parts) for key in ("launches", "torch", "waits")]
        scratch = " + ".join(f"{part['scratch'] / (1 << 20):.2f}" for part in parts)
        lines.append(f"| `{row['name']}` | {row['size']} | {cells[0]} | {cells[1]} | {scratch} | {cells[2]} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if docs/kernels.md differs")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process:
        print(json.dumps(count()))
        return 0

    from tests.cuda import build, run
    from tools import blocks

    reason = build.why_not() or build.why_not_shipped()
    if reason is not None:
        print(f"not counted: {reason}")
        return 0
    env = run.settings(build.build_runtime(), build.build_bridge(), build.build_shipped_package(True)) | H100
    command = [sys.executable, "-P", "-m", "tools.launch_counts", "--in-process"]
    result = subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    text = table(json.loads(result.stdout))
    if not options.check:
        blocks.write_blocks(PAGE, TOOL, {BLOCK: text})
        return 0
    if blocks.stale_blocks(PAGE, TOOL, {BLOCK: text}):
        print(f"docs/kernels.md is out of date: run python -m tools.launch_counts\n{text}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
