"""Running CUDA kernels on the CPU catches what it claims to: each kernel of planted_bugs.cu as it should be passes,
in every order of threads and blocks, and with its bug is caught in the way named here."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from . import build
from .conftest import ORDERS

# How the bug of each kernel shows: in the output (NaN in every order; not the same in every order; the same but
# wrong), or as the error named.
NAN, ORDER, VALUE = "nan", "order", "value"
BUGS = {
    "missing_barrier": NAN,
    "race_in_one_order": ORDER,
    "missing_second_barrier": ORDER,
    "unwritten_shared": NAN,
    "shared_of_another_block": NAN,
    "never_written_shared": NAN,
    "shared_overflow": "AddressSanitizer: global-buffer-overflow",
    "shared_row_overflow": "index 32 out of bounds for type 'float [32]'",
    "global_read_overflow": "AddressSanitizer: heap-buffer-overflow",
    "global_write_underflow": "AddressSanitizer: heap-buffer-overflow",
    "early_return": "divergent barrier: 32 of a block's 64 threads have ended, the others wait at ",
    "barrier_in_a_branch": "divergent barrier: threads of a block wait at ",
    "last_writer": ORDER,
    "race_between_blocks": ORDER,
    "beyond_the_grid": VALUE,
    "too_many_threads": "invalid configuration argument",
    "empty_grid": "invalid configuration argument",
}


@pytest.fixture(scope="session")
def program() -> Path:
    if build.cuda_headers() is None:
        pytest.skip("the CUDA toolkit's headers (cuda_fp16.h) are not installed")
    return build.build_program(build.HERE / "planted_bugs.cu")


def run(program: Path, name: str, version: str, orders: Sequence[str] = ORDERS) -> tuple[list[str], str]:
    """The outputs, one for each order, and what went wrong."""
    command = [str(program), name, version, *orders]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return result.stdout.splitlines(), result.stderr if result.returncode else ""


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name: str, program: Path) -> None:
    right, error = run(program, name, "right")
    assert not error
    assert len(right) == len(ORDERS)
    assert len(set(right)) == 1
    assert "nan" not in right[0]
    wrong, error = run(program, name, "wrong")
    assert bool(error) == (BUGS[name] not in (NAN, ORDER, VALUE)), error
    if BUGS[name] == NAN:
        assert all("nan" in output for output in wrong)
    elif BUGS[name] == ORDER:
        assert len(set(wrong)) > 1
    elif BUGS[name] == VALUE:
        assert len(set(wrong)) == 1
        assert wrong[0] != right[0]
    else:
        assert BUGS[name] in error


def test_one_order_alone_hides_a_race(program: Path) -> None:
    name = "race_in_one_order"
    right, _ = run(program, name, "right", ["forward"])
    wrong, _ = run(program, name, "wrong", ["forward", "backward"])
    assert wrong[0] == right[0]
    assert "nan" in wrong[1]
