"""Process group helpers for `torchrun`: rank, sums over all processes, and synchronization.

    torchrun --nproc-per-node=2 -m afa train voc

In a single process, all functions are no-ops.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from afa.errors import UserError

WAIT = timedelta(hours=2)
"""Timeout of collective operations: the other ranks wait while rank 0 checks a large data set."""
BUCKET_BYTES = 32 << 20
"""Approximate size of a gradient bucket: few messages, little extra memory."""


def launched() -> bool:
    """Whether this process is one of several that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def setup(device: torch.device | str | None = None) -> torch.device:
    """Join the process group if torchrun started several processes, and return this process's device.

    device: cpu, cuda, or None: one GPU per process if the machine has enough, else the CPU. GPUs use NCCL, CPUs gloo.
    """
    if not launched():
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    local, here = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    chosen = torch.device(device) if device is not None else torch.device("cuda" if gpus >= here else "cpu")
    if chosen.type == "cuda":
        if chosen.index not in (None, local):
            raise UserError(
                f"--device {chosen} is one GPU for {here} processes; use --device cuda for one GPU per process"
            )
        if gpus < here:
            raise UserError(
                f"torchrun started {here} processes on a machine with {gpus} usable GPUs; set --nproc-per-node to that "
                "number, or train with --device cpu"
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        # Both backends, because CPU tensors are summed too. device_id makes NCCL connect immediately.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=WAIT, device_id=chosen if chosen.type == "cuda" else None)
    return chosen


def teardown() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Rank of this process over all machines."""
    return dist.get_rank() if _together() else 0


def world_size() -> int:
    """Number of processes over all machines."""
    return dist.get_world_size() if _together() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and shows progress."""
    return rank() == 0


def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Replace `tensor` (contiguous, on any device) by its sum over all processes, and return it."""
    if _together():
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait until every process has reached this call."""
    if _together():
        # Not dist.barrier: with both backends it would use NCCL and block the GPU streams.
        dist.all_reduce(torch.zeros(1))


def gather(value: Any) -> list[Any]:
    """Gather every process's `value` in rank order on rank 0, in host memory; other ranks get an empty list."""
    if not _together():
        return [value]
    found: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, found)
    return found or []


def broadcast(value: Any) -> Any:
    """Return rank 0's `value` on every rank."""
    if not _together():
        return value
    holder = [value]
    dist.broadcast_object_list(holder)
    return holder[0]


def broadcast_model(model: nn.Module) -> None:
    """Broadcast rank 0's parameters and buffers to every process."""
    if _together():
        with torch.no_grad():
            for tensor in model.state_dict().values():
                # Collectives need contiguous tensors; channels-last parameters are not.
                whole = tensor.contiguous()
                dist.broadcast(whole, 0)
                tensor.copy_(whole)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradients by their mean over all processes.

    This runs once after the last backward pass of a step. DistributedDataParallel is not used, because the set of
    parameters with gradients changes from phase to phase. Here, parameters without a gradient are skipped, and a
    resumed run has the same buckets and therefore the same order of summation. All processes must be in the same phase.
    """
    if not _together():
        return
    buckets: list[list[Tensor]] = []
    size = 0
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        if not buckets or size >= BUCKET_BYTES or grad.dtype != buckets[-1][0].dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(grad)
        size += grad.numel() * grad.element_size()
    sent = []
    for bucket in buckets:
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
    for bucket, flat, work in sent:
        assert work is not None
        work.wait()
        flat /= world_size()
        parts = flat.split([grad.numel() for grad in bucket])
        torch._foreach_copy_(bucket, [part.view(grad.shape) for part, grad in zip(parts, bucket, strict=True)])


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce_sum_(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return all_reduce_sum_(grads[0].contiguous().clone())


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of all processes, on CPUs and GPUs (torch's SyncBatchNorm doesn't support CPUs).

    Every process must have the same number of values per channel. Statistics are computed in two passes, in float32 or
    float64.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        x = input if input.dtype == torch.float64 else input.float()
        count = x.numel() // x.shape[1] * world_size()
        mean = _SumOverProcesses.apply(x.sum((0, 2, 3))) / count
        centered = x - mean[:, None, None]
        variance = _SumOverProcesses.apply(centered.square().sum((0, 2, 3))) / count
        if self.track_running_stats:
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None and self.momentum is not None
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (count / max(1, count - 1)), self.momentum)
        out = centered * (variance + self.eps).rsqrt()[:, None, None]
        if self.affine:
            out = out * self.weight[:, None, None] + self.bias[:, None, None]
        return out.to(input.dtype)


def synchronize_batch_norm(model: nn.Module) -> None:
    """Convert every BatchNorm2d of `model` to SyncBatchNorm2d in place, keeping its tensors and their names."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
