"""Dense CRF on class probabilities (Krähenbühl and Koltun, NeurIPS 2011), one image per task in worker processes.

Uses pydensecrf (the extra `crf`). This module does not import torch, even indirectly, so that worker processes start
fast.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Hashable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from afa.errors import UserError

if TYPE_CHECKING:
    from afa.config import EvalConfig

_SMALLEST = 1e-5
"""Probabilities are clamped to this minimum before taking the logarithm, as in the published evaluations."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class CrfSettings:
    """Mean-field iterations and the two kernels."""

    iterations: int
    gaussian: tuple[float, float]
    """Standard deviation in pixels, weight."""
    bilateral: tuple[float, float, float]
    """Standard deviation in pixels, in 8-bit color values, weight."""

    @classmethod
    def of(cls, config: EvalConfig) -> CrfSettings:
        """The CRF settings of a configuration."""
        return cls(config.crf_iterations, config.crf_gaussian, config.crf_bilateral)


def check_installed() -> None:
    """Raise UserError with installation instructions if pydensecrf can't be imported."""
    _library()


def dense_crf(
    image: NDArray[np.uint8], probabilities: NDArray[np.float32], settings: CrfSettings
) -> NDArray[np.float32]:
    """Class probabilities [C, H, W] after mean-field inference on the RGB image [H, W, 3]; float32 [C, H, W].

    Raises ValueError if the sizes differ, and UserError if pydensecrf is not installed.
    """
    count, height, width = probabilities.shape
    if image.shape != (height, width, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"image must be uint8 {(height, width, 3)} for probabilities {probabilities.shape}, "
            f"got {image.dtype} {image.shape}"
        )
    model = _library().DenseCRF2D(width, height, count)
    energy = -np.log(np.clip(probabilities, _SMALLEST, 1.0)).reshape(count, -1)
    model.setUnaryEnergy(np.ascontiguousarray(energy, np.float32))
    deviation, weight = settings.gaussian
    model.addPairwiseGaussian(sxy=deviation, compat=weight)
    deviation, color, weight = settings.bilateral
    pixels = np.ascontiguousarray(image)
    model.addPairwiseBilateral(sxy=deviation, srgb=color, rgbim=pixels, compat=weight)
    return np.array(model.inference(settings.iterations), np.float32).reshape(count, height, width)


class CrfPool(Generic[Key]):
    """Computes label maps by dense CRF in `workers` processes, asynchronously; with 0 workers, in this process.

    `take` limits the queue to two images per worker, so that a slow CRF throttles the network instead of filling memory
    with logits.
    """

    def __init__(self, settings: CrfSettings, workers: int | None = None) -> None:
        check_installed()
        self.settings = settings
        self.workers = (os.cpu_count() or 1) if workers is None else workers
        self._done: list[tuple[Key, NDArray[np.uint8]]] = []
        self._pending: dict[Future[NDArray[np.uint8]], Key] = {}
        # Not fork: the parent has threads and possibly a CUDA context, which do not survive a fork.
        self._pool = (
            ProcessPoolExecutor(self.workers, mp_context=multiprocessing.get_context("spawn")) if self.workers else None
        )

    def add(self, key: Key, image: NDArray[np.uint8], probabilities: NDArray[np.float32]) -> None:
        """Submit an image [H, W, 3] with its class probabilities [C, H, W]."""
        if self._pool is None:
            self._done.append((key, _labels(image, probabilities, self.settings)))
        else:
            self._pending[self._pool.submit(_labels, image, probabilities, self.settings)] = key

    def take(self, *, everything: bool = False) -> Iterator[tuple[Key, NDArray[np.uint8]]]:
        """Yield (key, label map [H, W]) of the images finished since the last call; everything: wait for all images."""
        yield from self._done
        self._done.clear()
        max_pending = 0 if everything else 2 * self.workers
        while self._pending:
            late = len(self._pending) > max_pending
            finished = wait(self._pending, None if late else 0, FIRST_COMPLETED).done
            for future in finished:
                try:
                    yield self._pending.pop(future), future.result()
                except BrokenProcessPool as error:
                    raise UserError(
                        "a CRF process died, most likely out of memory; lower eval.crf_workers and run the command "
                        "again, which resumes"
                    ) from error
            if not late:
                return

    def close(self) -> None:
        """Cancel pending images and stop the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _labels(image: NDArray[np.uint8], probabilities: NDArray[np.float32], settings: CrfSettings) -> NDArray[np.uint8]:
    return dense_crf(image, probabilities, settings).argmax(0).astype(np.uint8)


def _library() -> Any:
    try:
        import pydensecrf.densecrf
    except ImportError as error:
        raise UserError(
            f"eval.crf needs pydensecrf ({error}); run pip install pydensecrf2 (or install the extra "
            '"afa-ext[crf]"), or set eval.crf=false'
        ) from error
    return pydensecrf.densecrf
