"""The processes of one run: sums, gradients, batch norm; no communication in a single process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from afa import distributed
from afa.errors import UserError

TOGETHER = """
import copy, sys, torch
from torch import nn
from afa import distributed as d

assert d.rank() == 0 and d.world_size() == 1, "before setup"
device = d.setup("cpu")
assert device == torch.device("cpu") and d.world_size() == 2
rank = d.rank()
assert d.is_main() == (rank == 0)

counts = torch.tensor([[1, 2], [3, rank]])
assert d.all_reduce_sum_(counts) is counts and counts.tolist() == [[2, 4], [6, 1]]
d.barrier()
assert d.gather({"rank": rank}) == ([{"rank": 0}, {"rank": 1}] if rank == 0 else [])
assert d.broadcast(f"from {rank}") == "from 0"

# One model on the whole batch, and two models on one half each: same statistics, same gradients.
torch.manual_seed(rank)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 2, 1))
model = model.double().to(memory_format=torch.channels_last)
d.broadcast_model(model)
whole = copy.deepcopy(model)
d.synchronize_batch_norm(model)
assert type(model[1]) is d.SyncBatchNorm2d and list(model.state_dict()) == list(whole.state_dict())
torch.manual_seed(7)
images = torch.rand(6, 3, 9, 9, dtype=torch.float64)
d.BUCKET_BYTES = 64  # several pieces
for used in (4, 5):  # the last layer has no gradient in the first round
    for net, part in ((model, images[3 * rank : 3 * rank + 3]), (whole, images)):
        net.zero_grad(set_to_none=True)
        net[:used](part).square().mean().backward()
    d.average_gradients(model.parameters())
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters()):
        assert (ours.grad is None) == (theirs.grad is None) == (used == 4 and name.startswith("4")), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
for (name, ours), theirs in zip(model.state_dict().items(), whole.state_dict().values()):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0, msg=name)
torch.testing.assert_close(model.eval()(images), whole.eval()(images), rtol=1e-9, atol=1e-12)
d.teardown()
assert d.world_size() == 1
print("fine")
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    assert all("fine" in output for output in outputs)


def test_a_single_process_needs_no_communication() -> None:
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.setup("cpu") == torch.device("cpu")
    counts = torch.tensor([3, 4])
    assert distributed.all_reduce_sum_(counts) is counts and counts.tolist() == [3, 4]
    assert distributed.gather("x") == ["x"] and distributed.broadcast("x") == "x"
    distributed.barrier()
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad is not None
    before = layer.weight.grad.clone()
    distributed.average_gradients(layer.parameters())
    distributed.broadcast_model(layer)
    assert torch.equal(layer.weight.grad, before)
    distributed.teardown()


def test_synchronized_batch_norm_in_one_process_is_batch_norm() -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 3, 4, 4)
    plain, synchronized = nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3))
    assert plain.running_var is not None
    distributed.synchronize_batch_norm(synchronized)
    assert torch.equal(plain(x), synchronized(x))
    assert torch.equal(plain.running_var, synchronized.get_buffer("0.running_var"))


def test_invalid_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="cuda:0 is one GPU for 2 processes; use --device cuda"):
        distributed.setup("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes on a machine with 1 usable GPUs"):
        distributed.setup("cuda")
