"""CUDA behavior on a GPU, or on the stand-in GPU of tests/cuda.

Graphs, streams, several devices, no host synchronization, sizes beyond 32 bits and beyond the largest grid. The
stand-in's lazy streams delay work without further measures. Tests that it can't run are marked `real_gpu`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import tune
from torch import Tensor

import afa_ext
from afa_ext import _native, reference
from tests.afa_ext.test_ops_meta import CASES, Make
from tests.cuda import device as stand_in

pytestmark = pytest.mark.cuda
OPS = torch.ops.afa_ext
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Maximum error against float64, relative to the largest value: inputs and results are rounded, sums are float32."""
Run = Callable[[], tuple[Tensor, ...]]


class Machine:
    device = torch.device("cuda", 0)
    many = 300 if stand_in.active else 70_000  # more than the largest grid

    @property
    def other(self) -> torch.device:
        """A second device that is not the current one."""
        if torch.cuda.device_count() < 2:
            pytest.skip("one GPU only")
        return torch.device("cuda", 1)

    def capture(self, run: Run) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        """A function that replays run() as a graph, and the tensors that a replay writes to."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # one-time initialization, such as a library's workspace
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # fails on any synchronization with the device
            results = run()
        return graph.replay, results

    @contextmanager
    def on_side_stream(self) -> Iterator[None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield

    def busy(self) -> None:
        """Delays later work on the current stream by about 30 ms."""
        if not stand_in.active:
            torch.cuda._sleep(50_000_000)

    @contextmanager
    def never_waits(self) -> Iterator[None]:
        """Makes every synchronization of the host with the device an error."""
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with stand_in.never_waits() if stand_in.active else nullcontext():
                yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def finish(self) -> None:
        torch.cuda.synchronize()

    def need(self, count: int) -> int:
        """Skips the test unless this many bytes are free."""
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if free < count:
            pytest.skip(f"needs {count >> 30} GiB of the GPU's memory, {free >> 30} are free")
        return free


@pytest.fixture
def machine() -> Machine:
    return Machine()


def maker(device: torch.device, dtype: torch.dtype = torch.float32) -> Make:
    def make(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device).to(dtype).requires_grad_()

    return make


def tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
    return [t for t in arguments if isinstance(t, Tensor)]


def cases(name: str, make: Make) -> list[tuple[Any, ...]]:
    """The operator's argument lists. Every tensor is a leaf with the original strides; otherwise, backward would wait
    for the stream on which a view was created."""
    return [
        tuple(t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in arguments)
        for arguments in CASES[name](make)
    ]


def forward_and_backward(operator: Any, arguments: tuple[Any, ...]) -> Run:
    """The operator's result and the gradients of the inputs that require them, if any."""
    leaves = [t for t in tensors(arguments) if t.requires_grad]

    def run() -> tuple[Tensor, ...]:
        out = operator(*arguments)
        if not out.requires_grad:
            return (out,)
        # Not all ones, because sums over classes or nodes are often constant. Exact in every dtype.
        numbers = torch.arange(out.numel(), device=out.device).remainder(7).add(1).div(4)
        incoming = numbers.to(out.dtype).view(out.shape)
        grads = torch.autograd.grad(out, leaves, incoming, allow_unused=True)
        return (out.detach(), *(g for g in grads if g is not None))

    return run


def overwrite(results: tuple[Tensor, ...]) -> None:
    for t in results:
        t.fill_(float("nan") if t.is_floating_point() else 77)


def same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Bitwise equality, without NaN."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a.cpu(), e.cpu())


def saved(run: Run) -> tuple[Tensor, ...]:
    return tuple(t.clone() for t in run())


# ---- every operator ----------------------------------------------------------------------------------------------

operators = pytest.mark.parametrize("name", sorted(CASES))


@operators
def test_graph(name, machine):
    for arguments in cases(name, maker(machine.device)):
        run = forward_and_backward(getattr(OPS, name), arguments)
        before = saved(run)
        replay, results = machine.capture(run)
        overwrite(results)
        replay()
        same(results, before)
        with torch.no_grad():  # a graph reads its inputs at every replay
            for t in tensors(arguments):
                if t.is_floating_point():
                    t.mul_(t)
        expected = saved(run)
        overwrite(results)
        replay()
        machine.finish()
        same(results, expected)


@operators
def test_side_stream(name, machine):
    for arguments in cases(name, maker(machine.device)):
        run = forward_and_backward(getattr(OPS, name), arguments)
        expected = saved(run)
        given = tensors(arguments)
        right = [t.detach().clone() for t in given]
        with torch.no_grad():
            for t in given:
                t.fill_(float("nan") if t.is_floating_point() else 0)
        with machine.on_side_stream():
            machine.busy()
            with torch.no_grad():  # the inputs are written late; the operator must wait for them
                for t, value in zip(given, right, strict=True):
                    t.copy_(value)
            results = run()
        # The operator's temporary memory must not be reused by another stream before the operator has run.
        scraps = [
            torch.full((1 << power,), float("nan"), device=machine.device) for power in range(7, 20) for _ in "ab"
        ]
        machine.finish()
        same(results, expected)
        assert len(scraps) == 26


@operators
def test_device_that_is_not_current(name, machine):
    other = machine.other
    current = torch.cuda.current_device()
    for arguments in cases(name, maker(machine.device)):
        moved = tuple(
            t.detach().to(other).requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in arguments
        )
        results = forward_and_backward(getattr(OPS, name), moved)()
        assert all(t.device == other for t in results)
        same(results, forward_and_backward(getattr(OPS, name), arguments)())
    assert torch.cuda.current_device() == current


@operators
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_runs_are_equal_without_synchronization(name, dtype, machine):
    # In low precision, the gradient of a transition and the scores of a step are float32.
    wide = name in ("walk_transition_backward", "walk_step") and dtype in (torch.float16, torch.bfloat16)

    def make(*shape: int) -> Tensor:
        t = torch.rand(*shape, device=machine.device)
        return t.to(torch.float32 if wide and len(shape) == 4 else dtype).requires_grad_()

    for arguments in cases(name, make):
        run = forward_and_backward(getattr(OPS, name), arguments)
        first = saved(run)
        with machine.never_waits():
            second = run()
        same(second, first)


# ---- public functions, at sizes of several blocks ----------------------------------------------------------------


def picture(make: Make, batch: int, height: int, width: int) -> Tensor:
    """Smooth images, so that the weights vary as for a photograph."""
    coarse = make(batch, 3, 5, 6).detach()
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)


def present(make: Make, batch: int, classes: int) -> Tensor:
    return (torch.arange(batch * classes, device=make(1).device).view(batch, classes) % 3 != 0).float()


# Name -> a function that calls the library or the reference, and its inputs. Gradients are computed for inputs that
# require them. No case uses a torch operator whose sums have no fixed order (such as the backward pass of upsampling).
PUBLIC: dict[str, tuple[Callable[..., Tensor], Callable[[Make], list[Tensor]]]] = {
    "par_refine": (
        lambda ext, images, masks: ext.par_refine(images, masks, num_iter=4),
        lambda make: [picture(make, 2, 41, 57), make(2, 7, 41, 57)],
    ),
    "par_refine of smaller masks": (
        lambda ext, images, masks: ext.par_refine(images, masks, dilations=[1, 3], num_iter=3),
        lambda make: [picture(make, 2, 41, 57), make(2, 7, 17, 23).detach()],
    ),
    "pamr_refine": (
        lambda ext, images, masks: ext.pamr_refine(images, masks, num_iter=2),
        lambda make: [picture(make, 1, 20, 130), make(1, 21, 20, 130)],
    ),
    "one step": (
        lambda ext, scores, affinity: ext.random_walk(scores, affinity, grid=(19, 23), radius=5),
        lambda make: [make(2, 9, 19, 23), make(2, 437, 437)],
    ),
    "many steps": (
        lambda ext, scores, affinity: ext.random_walk(
            scores, affinity, grid=(19, 23), radius=3, window="disc", steps=8, normalize="row", direction="rows"
        ),
        lambda make: [make(2, 3, 19, 23), make(2, 437, 437)],
    ),
    "sinkhorn": (
        lambda ext, scores, affinity: ext.random_walk(scores, affinity, grid=(9, 12), radius=4, normalize="sinkhorn"),
        lambda make: [make(2, 5, 9, 12), make(2, 108, 81)],
    ),
    "propagate_cams": (
        lambda ext, cams, affinity, labels: ext.propagate_cams(
            cams, affinity, labels.to(cams.dtype), radius=4, background=0.35
        ),
        lambda make: [make(2, 6, 11, 13), make(2, 143, 143), present(make, 2, 6)],
    ),
    "propagate_to_edge": (
        lambda ext, x, edge: ext.propagate_to_edge(x, edge, exp_times=4),
        lambda make: [make(1, 4, 23, 31).detach(), make(1, 23, 31).detach()],
    ),
    "feature_affinity": (
        lambda ext, features: ext.feature_affinity(features, 4),
        lambda make: [make(2, 40, 17, 19)],
    ),
    "affinity_loss": (
        lambda ext, attention, weight, bias, tokens: ext.affinity_loss(
            ext.affinity_from_attention(attention, weight - 0.5, bias, grid=(9, 11), radius=3),
            ext.affinity_labels((tokens * 4).byte(), stride=16, radius=3, windowed=True),
        ),
        lambda make: [make(2, 5, 99, 99), make(5), make(1), make(2, 144, 176).detach()],
    ),
}
IN_LOW_PRECISION = {
    "propagate_to_edge": "the tenth power magnifies rounding errors of the boundary",
    "affinity_loss": "the gradient of the bias is a small difference between two sums of rounded values",
}
functions = pytest.mark.parametrize("name", list(PUBLIC))


@functions
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_public_functions_match_float64(name, dtype, machine, assert_relative):
    call, inputs = PUBLIC[name]
    if name in IN_LOW_PRECISION and dtype in (torch.float16, torch.bfloat16):
        pytest.skip(IN_LOW_PRECISION[name])
    given = inputs(maker(machine.device, dtype))
    wide = [t.detach().cpu().double().requires_grad_(t.requires_grad) for t in given]
    actual = forward_and_backward(lambda *t: call(afa_ext, *t), tuple(given))()
    expected = forward_and_backward(lambda *t: call(reference, *t), tuple(wide))()
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert_relative(a, e, LIMITS[dtype])


@functions
def test_public_functions_in_a_graph_on_a_side_stream_and_without_synchronization(name, machine):
    call, inputs = PUBLIC[name]
    run = forward_and_backward(lambda *t: call(afa_ext, *t), tuple(inputs(maker(machine.device))))
    expected = saved(run)
    with machine.never_waits():
        again = run()
    same(again, expected)
    with machine.on_side_stream():
        machine.busy()
        late = run()
    machine.finish()
    same(late, expected)
    replay, results = machine.capture(run)
    for _ in range(2):
        overwrite(results)
        replay()
        machine.finish()
        same(results, expected)


@pytest.mark.parametrize("seed", range(8))
def test_random_sizes_match_float64(seed, machine, assert_relative):
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    dtype = list(LIMITS)[seed % 4]
    make = maker(machine.device, dtype)
    batch, classes, height, width = number(1, 3), number(1, 30), number(1, 30), number(1, 90)
    dilations = sorted({number(1, 40) for _ in range(number(1, 6))})
    grid, radius = (number(1, 14), number(1, 14)), number(1, 9)
    nodes, maps = grid[0] * grid[1], number(1, 20)
    calls: list[tuple[Callable[..., Tensor], list[Tensor]]] = [
        (
            lambda ext, images, masks: ext.par_refine(images, masks, dilations=dilations, num_iter=3),
            [picture(make, batch, height, width), make(batch, classes, height, width)],
        ),
        (
            lambda ext, scores, affinity: ext.random_walk(scores, affinity, grid=grid, radius=radius, steps=seed % 3),
            [make(batch, classes, *grid), make(batch, nodes, nodes)],
        ),
        (
            lambda ext, attention, weight, bias: ext.affinity_from_attention(
                attention, weight - 0.5, bias, grid=grid, radius=radius if seed % 2 else None
            ),
            [make(batch, maps, nodes, nodes), make(maps), make(1)],
        ),
        (lambda ext, features: ext.feature_affinity(features, radius), [make(batch, maps, *grid)]),
    ]
    for call, given in calls:
        wide = [t.detach().cpu().double().requires_grad_(t.requires_grad) for t in given]
        actual = forward_and_backward(lambda *t: call(afa_ext, *t), tuple(given))()  # noqa: B023
        expected = forward_and_backward(lambda *t: call(reference, *t), tuple(wide))()  # noqa: B023
        for a, e in zip(actual, expected, strict=True):
            assert_relative(a, e, LIMITS[dtype])


class NoTimer:
    """Replaces the GPU timer: the sweep is run without timing."""

    device = Machine.device

    def time(self, candidates: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
        return dict.fromkeys(candidates, 0.0)


@pytest.mark.real_gpu("the tuner's sizes; test_tune.py and tests/cuda/kernels run the variants at small sizes")
@pytest.mark.parametrize("dtype", sorted(tune.LIMITS))
@pytest.mark.parametrize("kernel", sorted(tune.CASES))
def test_every_variant_of_every_kernel_is_correct(kernel, dtype):
    with torch.no_grad():
        for size in tune.CASES[kernel].sizes[:3]:
            row = tune.measure(kernel, dtype, size, tune.CASES[kernel], NoTimer(), _native._C, 0)
            assert not row.wrong
            assert row.milliseconds


def test_compiled_code_runs_on_a_side_stream(machine):
    call, inputs = PUBLIC["par_refine"]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: call(afa_ext, *t), fullgraph=True)
    given = tuple(inputs(maker(Machine.device)))
    expected = saved(forward_and_backward(lambda *t: call(afa_ext, *t), given))
    with machine.on_side_stream():
        results = forward_and_backward(compiled, given)()
    torch.cuda.synchronize()
    for a, e in zip(results, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


# ---- sizes -------------------------------------------------------------------------------------------------------

RING = [1, 2]
# Operator -> its arguments for `n` independent items along the first dimension. `large`: items so large that a few
# thousand exceed 2^31 elements; otherwise so small that 70,000 items are fast.
Build = Callable[[Callable[..., Tensor], int, bool], tuple[Any, ...]]
ITEMS: dict[str, Build] = {
    "par_affinity": lambda make, n, large: (make(n, 3, *((512, 640) if large else (3, 4))), RING, 0.3, 0.01),
    "pamr_affinity": lambda make, n, large: (make(n, 3, *((512, 640) if large else (3, 4))), RING),
    "par_propagate": lambda make, n, large: (
        *(make(n, c, *((256, 640) if large else (3, 4))) for c in (16, 21)),
        *(RING, 2, None),
    ),
    "par_propagate_backward_masks": lambda make, n, large: (
        *(make(n, c, *((256, 640) if large else (3, 4))) for c in (21, 16)),
        *(RING, 1, None),
    ),
    "par_propagate_backward_weights": lambda make, n, large: (
        *(make(n, c, *((256, 640) if large else (3, 4))) for c in (21, 16, 21)),
        *(RING, 1, None),
    ),
    "walk_transition": lambda make, n, large: (
        make(n, *((2304, 2304) if large else (12, 12))),
        *((48, 48, 8) if large else (3, 4, 1)),
        *("square", 2.0, True, 0.1),
    ),
    "walk_transition_backward": lambda make, n, large: (
        make(n, *((289, 48, 48) if large else (9, 3, 4))).float(),
        make(n, *((2304, 2304) if large else (12, 12))),
        *((48, 48, 8) if large else (3, 4, 1)),
        *("square", 2.0, True, 0.1),
    ),
    "walk_transpose": lambda make, n, large: (
        make(n, *((289, 48, 48) if large else (9, 3, 4))),
        8 if large else 1,
        "square",
    ),
    "walk_step": lambda make, n, large: (
        make(n, 5, *((48, 48) if large else (3, 4))).float(),
        make(n, *((2304, 2304) if large else (12, 12))),
        *((8, "square") if large else (1, "square")),
        *(2.0, True, 0.1, None),
    ),
    "walk_propagate": lambda make, n, large: (
        make(n, 5, *((48, 48) if large else (3, 4))),
        make(n, *((289, 48, 48) if large else (9, 3, 4))),
        *((8, "square") if large else (1, "square")),
        *(2, None),
    ),
    "walk_propagate_backward_scores": lambda make, n, large: (
        make(n, 5, *((48, 48) if large else (3, 4))),
        make(n, *((289, 48, 48) if large else (9, 3, 4))).mul_(0.1),  # below the largest float16
        *((8, "square") if large else (1, "square")),
        *(2, None),
    ),
    "walk_propagate_backward_transition": lambda make, n, large: (
        *(make(n, 5, *((48, 48) if large else (3, 4))) for _ in range(2)),
        make(n, *((289, 48, 48) if large else (9, 3, 4))),
        *((8, "square") if large else (1, "square")),
        *(1, None),
    ),
    "edge_affinity": lambda make, n, large: (make(n, *((512, 640) if large else (3, 4))), 3),
    "feature_affinity": lambda make, n, large: (make(n, 25, *((256, 256) if large else (3, 4))), 3),
    "feature_affinity_backward": lambda make, n, large: (
        *(make(n, 25, *((256, 256) if large else (3, 4))) for _ in range(3)),
        3,
    ),
    "affinity_from_attention": lambda make, n, large: (
        make(n, 16 if large else 2, *((1024, 1024) if large else (12, 12))),
        make(16 if large else 2) - 0.5,
        make(1),
        *((32, 32) if large else (3, 4)),
        *(None, False),
    ),
    "affinity_from_attention_backward_attention": lambda make, n, large: (
        *(make(n, *((1024, 1024) if large else (12, 12))) for _ in range(2)),
        make(16 if large else 2),
        *((32, 32) if large else (3, 4)),
        *(None, False),
    ),
    "affinity_labels": lambda make, n, large: (
        (make(n, *((48, 48) if large else (3, 4))) * 4).long(),
        *(8 if large else 1, 255, False, 0),
    ),
}
# Sums over the whole batch, launches for each image, or several of the above operators in sequence.
NOT_BY_ITEM = {
    "affinity_from_attention_backward_weight",
    "affinity_loss",
    "affinity_loss_backward",
    "lattice_build",
    "lattice_filter",
    "mean_field",
    "pseudo_labels",
    "refine_labels",
}


def test_every_operator_is_run_at_every_size():
    assert set(ITEMS) | NOT_BY_ITEM == set(CASES)
    assert not set(ITEMS) & NOT_BY_ITEM


def item(arguments: tuple[Any, ...], count: int, which: slice) -> tuple[Any, ...]:
    """The same call for only some of the `count` items."""
    return tuple(
        t[which] if isinstance(t, Tensor) and t.shape[:1] == (count,) and t.dim() > 1 else t for t in arguments
    )


@pytest.mark.parametrize("name", sorted(ITEMS))
def test_more_items_than_the_largest_grid(name, machine, assert_relative):
    count = machine.many
    arguments = ITEMS[name](lambda *shape: torch.rand(*shape, device=machine.device), count, False)
    out = getattr(OPS, name)(*arguments)
    assert len(out) == count
    for which in (slice(0, 3), slice(min(65_534, count // 2), min(65_538, count // 2 + 4)), slice(count - 3, count)):
        some = getattr(OPS, name)(*item(arguments, count, which))
        assert_relative(out[which], some, LIMITS[torch.float32])
    expected = getattr(OPS, name)(*(t.cpu() if isinstance(t, Tensor) else t for t in arguments))
    assert_relative(out, expected, LIMITS[torch.float32])


@pytest.mark.real_gpu("more than 2^31 elements")
@pytest.mark.parametrize("name", sorted(ITEMS))
def test_more_than_2_31_elements(name, machine, assert_relative):
    one = ITEMS[name](lambda *shape: torch.empty(*shape, dtype=torch.float16, device="meta"), 1, True)
    largest = max(t.numel() for t in [*tensors(one), getattr(OPS, name)(*one)])
    count = (1 << 31) // largest + 2
    total = sum(t.nbytes for t in [*tensors(one), getattr(OPS, name)(*one)])
    machine.need(count * total * 5 // 2 + (2 << 30))

    def make(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float16, device=machine.device)

    arguments = ITEMS[name](make, count, True)
    out = getattr(OPS, name)(*arguments)
    assert max(t.numel() for t in [*tensors(arguments), out]) > 1 << 31
    for which in (slice(0, 1), slice(count - 1, count)):
        some = getattr(OPS, name)(*item(arguments, count, which))
        assert_relative(out[which], some, LIMITS[torch.float16])


@pytest.mark.real_gpu("more than 2^31 elements")
def test_loss_of_more_than_2_31_elements(machine):
    count = (1 << 31) + 1000
    machine.need(12 * count)
    affinity = torch.full((count,), 0.25, dtype=torch.float16, device=machine.device)
    labels = torch.full((count,), 255, dtype=torch.uint8, device=machine.device)
    affinity[-3:], labels[-3:] = torch.tensor([1.0, 0.5, 0.75]), torch.tensor([1, 1, 0], dtype=torch.uint8)
    sums = OPS.affinity_loss(affinity, labels, 0.5, 0.5, 0.0, None)
    # One of the two same pairs is 1/2 below 1, and the only different pair is 3/4 above 0.
    assert float(sums[0]) == pytest.approx(0.5 * 0.5 / 3 + 0.5 * 0.75 / 2, rel=1e-6)
    grad = OPS.affinity_loss_backward(torch.tensor([1.0] + [0.0] * 9, device=machine.device), sums, labels)
    assert int(grad[:-3].count_nonzero()) == 0
    assert grad[-3:].tolist() == pytest.approx([-0.5 / 3, -0.5 / 3, 0.5 / 2], rel=1e-6)
