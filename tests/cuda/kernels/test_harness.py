"""Running CUDA kernels on the CPU detects the bugs that README.md lists.

For each kernel of planted_bugs.cu, the correct version passes in every order of threads and blocks, and the version
with the bug is detected in the way given here.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from .. import build
from .conftest import ORDERS

# How each kernel's bug shows, first in the build that checks every access (memory_check.cpp), then with
# AddressSanitizer: in the output (NaN in every order; different outputs; the same wrong output in every order), or as
# an error that contains this text. None: not detected by this build, only by the other one.
NAN, ORDER, VALUE = "nan", "order", "value"
SHARED_RACE = "race: static shared memory at byte"
GLOBAL_RACE = "race: global memory at"
POISONED = "AddressSanitizer: use-after-poison"
BLOCK = "of a 1024-byte block of global memory was"
DIVERGENT = "divergent barrier: "
BUGS = {
    "missing_barrier": (SHARED_RACE, NAN),
    "race_in_one_order": (SHARED_RACE, ORDER),
    "missing_second_barrier": (SHARED_RACE, ORDER),
    "missing_barrier_dynamic": ("race: dynamic shared memory at byte", NAN),
    "missing_syncwarp": (SHARED_RACE, NAN),
    "last_writer": (GLOBAL_RACE, ORDER),
    "race_between_blocks": (GLOBAL_RACE, ORDER),
    "missing_grid_sync": (GLOBAL_RACE, ORDER),
    "unwritten_shared": (NAN, NAN),
    "shared_of_another_block": (NAN, NAN),
    "never_written_shared": (NAN, NAN),
    "unwritten_dynamic": (NAN, NAN),
    "shared_overflow": (None, "AddressSanitizer: global-buffer-overflow"),
    "shared_row_overflow": ("index 32 out of bounds for type 'float [32]'",) * 2,
    "dynamic_overflow": ("out of bounds: byte 256 of 256 bytes of dynamic shared memory", POISONED),
    "global_read_overflow": (f"out of bounds: byte 1024 {BLOCK} read", POISONED),
    "global_write_underflow": (f"out of bounds: byte -4 {BLOCK} written", POISONED),
    "misaligned_vector": ("misaligned address",) * 2,
    "misaligned_ldg": ("misaligned address",) * 2,
    "early_return": (DIVERGENT + "32 of the block's 64 threads have exited; the others wait at ",) * 2,
    "barrier_in_a_branch": (DIVERGENT + "threads of a block wait at ",) * 2,
    "half_a_warp": (DIVERGENT + "threads of a block wait at ",) * 2,
    "lane_not_in_mask": ("__shfl_xor_sync called by lane 16, which is not in mask 0xffff",) * 2,
    "absent_lane": ("__shfl_sync reads from lane 0, which does not participate (mask 0xfffffffe)",) * 2,
    "grid_sync_without_a_block": (DIVERGENT + "1 of 4 blocks have exited; the others wait at ",) * 2,
    "grid_sync_of_a_plain_launch": ("grid_sync in a kernel not launched by AFA_LAUNCH_COOPERATIVE",) * 2,
    "beyond_the_grid": (VALUE, VALUE),
    "too_many_threads": ("invalid configuration argument",) * 2,
    "empty_grid": ("invalid configuration argument",) * 2,
    "more_blocks_than_resident": ("too many blocks in cooperative launch",) * 2,
    "too_much_shared_memory": ("invalid argument",) * 2,
}


def planted_bugs(sanitize: bool) -> Path:
    reason = build.why_not()
    if reason is not None:
        pytest.skip(reason)
    return build.build_program(build.KERNELS / "planted_bugs.cu", sanitize)


@pytest.fixture(scope="session")
def programs() -> tuple[Path, Path]:
    """The program with the planted bugs, as the checked and as the sanitized build."""
    return planted_bugs(sanitize=False), planted_bugs(sanitize=True)


def run(program: Path, name: str, version: str, orders: Sequence[str] = ORDERS) -> tuple[list[str], str]:
    """The outputs, one per order, and the error message."""
    command = [str(program), name, version, *orders]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return result.stdout.splitlines(), result.stderr if result.returncode else ""


@pytest.mark.parametrize("sanitized", [False, True], ids=["checked", "sanitized"])
@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name: str, sanitized: bool, programs: tuple[Path, Path]) -> None:
    program, expected = programs[sanitized], BUGS[name][sanitized]
    right, error = run(program, name, "right")
    assert not error
    assert len(right) == len(ORDERS)
    assert len(set(right)) == 1
    assert "nan" not in right[0]
    if expected is None:
        return
    wrong, error = run(program, name, "wrong")
    assert bool(error) == (expected not in (NAN, ORDER, VALUE)), error
    if expected == NAN:
        assert all("nan" in output for output in wrong)
    elif expected == ORDER:
        assert len(set(wrong)) > 1
    elif expected == VALUE:
        assert len(set(wrong)) == 1
        assert wrong[0] != right[0]
    else:
        assert expected in error


def test_every_planted_bug_is_caught_by_one_build() -> None:
    assert all(plain or sanitized for plain, sanitized in BUGS.values())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", [name for name, (plain, _) in BUGS.items() if plain and plain.startswith("race")])
def test_a_race_is_caught_in_any_order_and_named(name: str, order: str, programs: tuple[Path, Path]) -> None:
    _, error = run(programs[0], name, "wrong", [order])
    assert f"kernel ({name}<RIGHT>): race: " in error
    assert error.count("planted_bugs.cu:") == 2  # the source lines of both accesses
    assert error.count("thread (") == 2


def test_a_single_order_can_hide_a_race_from_the_output(programs: tuple[Path, Path]) -> None:
    name = "race_in_one_order"
    right, _ = run(programs[1], name, "right", ["forward"])
    wrong, _ = run(programs[1], name, "wrong", ["forward", "backward"])
    assert wrong[0] == right[0]
    assert "nan" in wrong[1]
