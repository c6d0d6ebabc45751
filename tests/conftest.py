from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cuda import device as stand_in

GOLDEN = Path(__file__).parent / "golden"


@pytest.hookimpl(tryfirst=True)  # before `-m` reads the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU, skips the tests that need one. On the stand-in GPU (tests/cuda/README.md), keeps only these tests
    and skips those that it does not support."""
    no_gpu = pytest.mark.skip(reason="no GPU on this machine; the stand-in GPU runs it: python -m tests.cuda.run")
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent / "cuda") or "stand_in" in item.name:
            item.add_marker(pytest.mark.slow)  # the first one builds it
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        real = item.get_closest_marker("real_gpu")
        if real is not None and stand_in.active:
            item.add_marker(pytest.mark.skip(reason=f"needs a real GPU: {real.args[0]}"))
    if stand_in.active:
        here = Path(__file__).parent / "cuda"
        kept = [item for item in items if item.get_closest_marker("cuda") or item.path.is_relative_to(here)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Any]]:
    """golden(name): the arrays of tests/golden/<name>.npz; arrays with one element are converted to numbers."""

    def load(name: str) -> dict[str, Any]:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return {k: v.item() if v.ndim == 0 else torch.from_numpy(v.copy()) for k, v in arrays.items()}

    return load


@pytest.fixture(scope="session")
def assert_relative() -> Callable[..., None]:
    """assert_relative(actual, expected, limit): the largest difference, relative to the largest value expected."""

    def check(actual: Tensor, expected: Tensor, limit: float = 1e-4) -> None:
        assert actual.shape == expected.shape
        if expected.numel() == 0:
            return
        actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
        assert bool(actual.isfinite().all())
        error = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        assert error <= limit, f"relative error {error:.3g} is over {limit:.3g}"

    return check


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """threads(n) sets torch's thread count for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
