"""The rules that choose a CUDA kernel's variant, for GPUs and sizes that matter, and AFA_EXT_VARIANTS."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from afa_ext import _native

ROOT = Path(__file__).resolve().parents[2]
H100, A100, RTX4060 = (132, 233472, 232448), (108, 167936, 166912), (24, 102400, 101376)
"""SMs, shared memory of an SM and of a block, in bytes."""

PICK = 'from afa_ext import _native; print(_native._C.pick_variant("walk_step", "tiled224"))'
"""Prints the variant that a launch would pick for a step of the walk."""

Rules = Callable[..., tuple[str, int, int, str, int]]


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Rules:
    """(gpu, batch, classes, height, width, steps) to ring variant, its tiles, class groups, stencil variant, bytes of
    a walk's tile."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    program = tmp_path_factory.mktemp("heuristics") / "heuristics"
    source = Path(__file__).with_name("heuristics.cpp")
    subprocess.run([compiler, "-std=c++17", "-Wall", "-Werror", "-I", ROOT / "csrc", source, "-o", program], check=True)

    def choose(gpu: tuple[int, int, int], *sizes: int) -> tuple[str, int, int, str, int]:
        arguments = [str(n) for n in (*gpu, *sizes)]
        ring, tiles, groups, stencil, tile_bytes = subprocess.check_output([program, *arguments], text=True).split()
        return ring, int(tiles), int(groups), stencil, int(tile_bytes)

    return choose


@pytest.mark.parametrize(
    ("gpu", "sizes", "expected"),
    [
        (H100, (1, 21, 160, 160, 10), ("stack4_resident", 25, 5)),  # one image: its classes fill the SMs
        (A100, (1, 21, 128, 128, 10), ("stack4_resident", 16, 6)),
        (H100, (8, 3, 160, 160, 10), ("stack4_resident", 200, 1)),  # training: two tiles for some blocks
        (H100, (8, 21, 320, 320, 10), ("stack4", 800, 1)),  # test time
        (H100, (1, 81, 160, 160, 1), ("stack4", 25, 5)),  # nothing stays resident for one step
        (H100, (1, 1, 64, 64, 10), ("stack1_resident", 16, 1)),  # too small for any GPU
        (RTX4060, (1, 21, 160, 160, 10), ("stack4_resident", 25, 1)),
        (RTX4060, (1, 2, 96, 96, 10), ("stack4_resident", 9, 2)),
    ],
)
def test_ring(rules, gpu, sizes, expected):
    assert rules(gpu, *sizes)[:3] == expected


@pytest.mark.parametrize("gpu", [H100, A100, RTX4060])
@pytest.mark.parametrize("classes", [1, 2, 3, 21, 81])
@pytest.mark.parametrize("side", [1, 40, 128, 160, 320])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_classes_are_divided_only_where_all_blocks_run_at_once_and_no_group_is_empty(rules, gpu, classes, side, batch):
    variant, tiles, groups, *_ = rules(gpu, batch, classes, side, side, 10)
    stack = int(variant[len("stack")])
    per_sm = 2 if stack == 1 else 1
    assert 1 <= groups <= classes
    per_group = -(-classes // groups)
    assert (groups - 1) * per_group < classes
    assert groups == 1 or tiles * groups <= gpu[0] * per_sm
    assert variant.endswith("_resident") == (tiles <= 4 * gpu[0] * per_sm)


@pytest.mark.parametrize(
    ("gpu", "sizes", "expected"),
    [
        (H100, (1, 20, 125, 94, 256), "classes4_kept"),  # IRN's walk of one photograph
        (H100, (8, 21, 48, 48, 4), "classes4"),  # too few blocks of eight classes for all SMs
        (H100, (8, 240, 72, 64, 4), "classes8"),
        (H100, (1, 8, 40, 40, 1), "classes4"),  # one step: nothing to keep
        (RTX4060, (1, 20, 125, 94, 256), "classes8"),
    ],
)
def test_stencil(rules, gpu, sizes, expected):
    assert rules(gpu, *sizes)[3] == expected


def test_a_tile_of_the_walk_leaves_room_for_other_blocks(rules):
    for gpu, blocks in ((H100, 3), (A100, 3), (RTX4060, 2)):
        tile_bytes = rules(gpu, 1, 1, 1, 1, 1)[4]
        assert gpu[1] // (blocks + 1) < tile_bytes + 1024 <= gpu[1] // blocks


@pytest.mark.slow
def test_an_invalid_override_raises_an_error_that_lists_the_valid_ones():
    for setting in ("par_ring=stack3", "no_kernel=stack2", "par_ring"):
        env = {**os.environ, "AFA_EXT_VARIANTS": f"walk_step=tiled128,{setting}"}
        done = subprocess.run([sys.executable, "-c", PICK], capture_output=True, text=True, env=env, check=False)
        assert done.returncode != 0
        assert f"got '{setting}'" in done.stderr
        assert "par_ring=stack4|stack2" in done.stderr


@pytest.mark.slow
def test_an_override_is_picked():
    env = {**os.environ, "AFA_EXT_VARIANTS": "walk_step=tiled128"}
    assert subprocess.check_output([sys.executable, "-c", PICK], text=True, env=env).strip() == "tiled128"


def test_forcing_an_unknown_kernel_or_variant_is_an_error():
    with pytest.raises(ValueError, match="unknown kernel 'none'"):
        _native._C.force_variant("none", None)
    with pytest.raises(
        ValueError, match="variant must be one of by_target, tiled128, tiled160, tiled224 for walk_step"
    ):
        _native._C.force_variant("walk_step", "none")
