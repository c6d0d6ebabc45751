"""Data loaders: endless, resumable and distributed batches for training, and one pass over a split for evaluation."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from afa.data.dataset import Sample, TaggedDataset
from afa.errors import UserError


class Batches(Iterator[Sample]):
    """Iterator over batches; `wait_seconds` is the total time the caller has waited for them.

    The increase of `wait_seconds` divided by the elapsed time is the share of time that training waits for data.
    """

    def __init__(self, batches: Iterator[Sample]) -> None:
        self._batches = batches
        self.wait_seconds = 0.0

    def __next__(self) -> Sample:
        started = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.wait_seconds += time.perf_counter() - started


def train_loader(
    dataset: TaggedDataset,
    batch_size: int,
    *,
    seed: int,
    start_iteration: int = 0,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Batches:
    """Endless batches, reshuffled every epoch: image [B,3,S,S], tags [B,C], box [B,4], name list[str].

    Batch n depends only on (dataset, batch_size, seed, n, rank, world_size), so a run resumed at `start_iteration` sees
    the same batches as an uninterrupted one, with any number of workers. The n-th batches of all `world_size`
    processes, concatenated in rank order, equal the n-th batch of a single process with batch_size * world_size.
    """
    if not dataset.train:
        raise ValueError("train_loader needs a dataset made with train=True")
    _check_rank(rank, world_size)
    return _iterate(
        dataset, _EndlessBatches(len(dataset), batch_size, seed, start_iteration, rank, world_size), workers
    )


def eval_loader(
    dataset: TaggedDataset,
    batch_size: int,
    workers: int = 0,
    *,
    rank: int = 0,
    world_size: int = 1,
    indices: Sequence[int] | None = None,
) -> Batches:
    """One pass over the split in order. Consecutive images of equal size form batches of up to `batch_size`.

    indices: use only these images. With `world_size` processes, each gets the images given by `share`.
    """
    if dataset.train:
        raise ValueError("eval_loader needs a dataset made with train=False")
    chosen = range(len(dataset)) if indices is None else indices
    own = [chosen[position] for position in share(len(chosen), rank, world_size)]
    # Reading the sizes opens every file, so avoid it for batches of one.
    batches = [[index] for index in own] if batch_size == 1 else _same_size_batches(own, dataset.sizes, batch_size)
    return _iterate(dataset, batches, workers)


def share(length: int, rank: int, world_size: int) -> range:
    """The contiguous range of positions in [0, length) that belongs to process `rank`.

    The ranges partition all positions in rank order; their lengths differ by at most one.
    """
    _check_rank(rank, world_size)
    return range(length * rank // world_size, length * (rank + 1) // world_size)


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size), got rank {rank} of {world_size}")


class _EndlessBatches(Sampler[list[tuple[int, tuple[int, int]]]]):
    """Lists of (index, (seed, position)); position counts samples of all processes since the start of the run."""

    def __init__(
        self, length: int, batch_size: int, seed: int, start_iteration: int, rank: int, world_size: int
    ) -> None:
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.start_iteration = start_iteration
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, int]]]]:
        iteration = self.start_iteration
        epoch = -1
        order = np.empty(0, np.int64)
        while True:
            start = (iteration * self.world_size + self.rank) * self.batch_size
            batch = []
            for position in range(start, start + self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    # The 1 keeps the shuffle's stream apart from the crops', which are seeded by two numbers.
                    order = np.random.default_rng((self.seed, epoch, 1)).permutation(self.length)
                batch.append((int(order[position % self.length]), (self.seed, position)))
            yield batch
            iteration += 1


def _same_size_batches(indices: Iterable[int], sizes: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in indices:
        if batches and len(batches[-1]) < batch_size and sizes[batches[-1][0]] == sizes[index]:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _iterate(dataset: TaggedDataset, batches: Iterable[list[Any]], workers: int) -> Batches:
    return Batches(_load(dataset, batches, workers))


def _load(dataset: TaggedDataset, batches: Iterable[list[Any]], workers: int) -> Iterator[Sample]:
    with warnings.catch_warnings():
        # More workers than cores is slower but not an error; the configuration is shared between machines.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader: DataLoader[Sample] = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if workers else None,
        )
        iterator = iter(loader)
    try:
        yield from iterator
    except UserError as error:
        # The message of a worker's exception is its traceback; the original message is at the end.
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None
