"""Several devices, host threads, autocast, refused cooperative launches and stream orders, on the stand-in GPU."""

from __future__ import annotations

import threading

import pytest
import torch

import afa_ext
from afa_ext import _native

from . import device

pytestmark = pytest.mark.skipif(not device.active, reason="runs on the stand-in GPU: python -m tests.cuda.run")


def inputs(name: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(2, 3, 20, 33).to(name), torch.rand(2, 5, 20, 33).to(name)


@pytest.mark.parametrize("order", ["latest", "1", "2"])
def test_host_threads_with_a_device_and_a_stream_each(order):
    """Runs one thread per device, each with its own current device and stream, as DataParallel does."""
    images, masks = inputs()
    expected = afa_ext.par_refine(images, masks, num_iter=3)
    results: dict[int, torch.Tensor] = {}
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            index = number % torch.cuda.device_count()
            stream = torch.cuda.Stream(index)
            with torch.cuda.device(index), torch.cuda.stream(stream):
                given = [t.to(f"cuda:{index}") for t in (images, masks)]
                for _ in range(3):
                    out = afa_ext.par_refine(*given, num_iter=3)
                results[number] = out.cpu()
        except BaseException as error:
            errors.append(error)

    with device.stream_order(order):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert len(results) == 4
    for result in results.values():
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_data_parallel():
    module = torch.nn.DataParallel(afa_ext.PAR(num_iter=2, dilations=[1, 2]), device_ids=[0, 1])
    images, masks = inputs()
    expected = module.module(images, masks)
    actual = module.to("cuda")(images.cuda(), masks.cuda())
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_autocast():
    attention, weight, bias = torch.rand(2, 3, 20, 20), torch.rand(3), torch.rand(1)
    given = [t.cuda().requires_grad_() for t in (attention, weight, bias)]
    with torch.autocast("cuda", torch.float16):
        out = afa_ext.affinity_from_attention(*given)
    (grad,) = torch.autograd.grad(out.sum(), given[0])
    wide = [t.requires_grad_() for t in (attention, weight, bias)]
    expected = afa_ext.affinity_from_attention(*wide)
    (expected_grad,) = torch.autograd.grad(expected.sum(), wide[0])
    torch.testing.assert_close(out.float().cpu(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(grad.cpu(), expected_grad, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("refusal", [device.NOT_AN_ATTRIBUTE, device.TOO_LARGE])
def test_refused_cooperative_launches(refusal):
    """Falls back to one launch per step, with the same result and without a remaining error."""
    weights, masks = torch.rand(1, 48, 9, 11).softmax(1).cuda(), torch.rand(1, 3, 9, 11).cuda()
    arguments = (weights, masks, [1, 2, 4, 8, 12, 24], 4, None)
    with device.recorded() as granted:
        expected = torch.ops.afa_ext.par_propagate(*arguments)
    assert [launch["cooperative"] for launch in granted.launches] == [True]
    with device.refused_cooperative_launches(refusal), device.recorded() as refused:
        actual = torch.ops.afa_ext.par_propagate(*arguments)
    assert [launch["cooperative"] for launch in refused.launches] == [False] * 4
    assert torch.equal(actual, expected)


def test_scratch_is_freed():
    images, masks = inputs("cuda")
    torch.cuda.synchronize()
    before = device.live_bytes(0)
    out = afa_ext.par_refine(images, masks)
    torch.cuda.synchronize()
    assert device.live_bytes(0) - before == out.nbytes


def test_the_library_is_the_one_under_test():
    info = _native._C.build_info()
    assert info["build_type"] == "test"
    assert info["cuda_architectures"] == "host"
