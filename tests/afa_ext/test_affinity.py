from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import afa_ext
from afa_ext import reference
from afa_ext.reference.affinity import windowed_pairs

BOTH = pytest.mark.parametrize("module", [afa_ext, reference], ids=["native", "reference"])
GRIDS = [((1, 1), 2), ((1, 7), 3), ((5, 6), 1), ((9, 20), 4), ((6, 5), 9), ((3, 40), 2), ((5, 5), 2), ((4, 6), 0)]
INTEGERS = [torch.uint8, torch.int16, torch.int32, torch.int64]


def inputs(batch, maps, nodes, dtype=torch.float64, device="cpu"):
    """Attention, weight and bias, all leaves; the resulting logits are of order 1."""
    attention = torch.randn(batch, maps, nodes, nodes, dtype=dtype, device=device)
    weight = torch.randn(maps, dtype=dtype, device=device) / maps**0.5
    return (
        attention.requires_grad_(),
        weight.requires_grad_(),
        torch.randn(1, dtype=dtype, device=device).requires_grad_(),
    )


def values_and_gradients(module, leaves, **settings):
    """Affinity and the gradients of a sum with a different weight for every entry: no symmetry hides a mistake."""
    affinity = module.affinity_from_attention(*leaves, **settings)
    pull = torch.linspace(-1, 3, affinity.numel(), dtype=torch.float64, device=affinity.device).view(affinity.shape)
    return [affinity, *torch.autograd.grad((affinity.double() * pull).sum(), leaves)]


@BOTH
def test_golden(module, golden, assert_relative, device):
    g = golden("affinity")
    leaves = [g[name].to(device).requires_grad_() for name in ("attn", "weight", "bias")]
    radius, label_map = g["radius"], g["label_map"].to(device)
    grid = (label_map.shape[1] // 16, label_map.shape[2] // 16)
    affinity = module.affinity_from_attention(*leaves)
    assert_relative(affinity, g["affinity"], 1e-6)
    labels = module.affinity_labels(label_map, radius=radius)
    assert torch.equal(labels.cpu(), g["aff_label"])
    assert (labels == 1).sum() + 1 == g["pos_count"]
    assert (labels == 0).sum() + 1 == g["neg_count"]

    window = module.affinity_from_attention(*leaves, grid=grid, radius=radius)
    window_labels = module.affinity_labels(label_map, radius=radius, windowed=True)
    for pairs, kinds in ((affinity, labels), (window, window_labels)):
        loss = module.affinity_loss(pairs, kinds)
        assert float(loss.detach()) == pytest.approx(g["loss"], rel=1e-6)
        for leaf, name in zip(
            torch.autograd.grad(loss, leaves), ("grad_attn", "grad_weight", "grad_bias"), strict=True
        ):
            assert_relative(leaf, g[name], 5e-6)


@pytest.mark.parametrize(("grid", "radius"), GRIDS, ids=str)
@pytest.mark.parametrize("maps", [1, 3, 6])
def test_matches_reference(grid, radius, maps, assert_relative, device):
    leaves = inputs(2, maps, grid[0] * grid[1], device=device)
    for settings_ in ({}, {"grid": grid}, {"grid": grid, "radius": radius}):
        results = [values_and_gradients(module, leaves, **settings_) for module in (afa_ext, reference)]
        for actual, expected in zip(*results, strict=True):
            assert_relative(actual, expected, 1e-12)
        single = [leaf.detach().float().requires_grad_() for leaf in leaves]
        results[0] = values_and_gradients(afa_ext, single, **settings_)
        # The last two are sums over all pairs, whose terms cancel: their error is relative to the terms.
        for actual, expected, limit in zip(*results, (1e-6, 1e-6, 5e-5, 5e-5), strict=True):
            assert actual.dtype == torch.float32
            assert_relative(actual, expected, limit)


def test_many_tiles_match_reference(assert_relative, device):
    """More nodes than one tile and one block of rows, and not a multiple of either."""
    leaves = inputs(2, 5, 7 * 19, device=device)
    for settings_ in ({}, {"grid": (7, 19), "radius": 2}, {"grid": (7, 19), "radius": 6}):
        results = [values_and_gradients(module, leaves, **settings_) for module in (afa_ext, reference)]
        for actual, expected in zip(*results, strict=True):
            assert_relative(actual, expected, 1e-12)


@pytest.mark.parametrize("wanted", range(3))
def test_gradients_are_only_computed_if_required(wanted, device):
    leaves = inputs(1, 3, 12, device=device)
    expected = values_and_gradients(afa_ext, leaves)[1 + wanted]
    some = [leaf if n == wanted else leaf.detach() for n, leaf in enumerate(leaves)]
    out = afa_ext.affinity_from_attention(*some)
    pull = torch.linspace(-1, 3, out.numel(), dtype=out.dtype, device=device).view(out.shape)
    assert torch.equal(torch.autograd.grad((out * pull).sum(), leaves[wanted])[0], expected)


def test_weight_and_bias_shapes(device):
    attention, weight, bias = inputs(2, 3, 12, device=device)
    expected = values_and_gradients(afa_ext, (attention, weight, bias))
    convolution = torch.nn.Conv2d(3, 1, 1).to(device, torch.float64)
    convolution.weight.data.copy_(weight.data.view(1, 3, 1, 1))
    assert convolution.bias is not None
    convolution.bias.data.copy_(bias.data)
    out = values_and_gradients(afa_ext, (attention, convolution.weight, convolution.bias))
    assert out[2].shape == (1, 3, 1, 1)
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(out, expected, strict=True))
    published = torch.sigmoid(convolution(attention + attention.mT))[:, 0]
    torch.testing.assert_close(out[0], published)
    scalar = values_and_gradients(afa_ext, (attention, weight, bias.detach()[0].requires_grad_()))
    assert scalar[3].shape == ()
    assert torch.equal(scalar[3], expected[3][0])


@pytest.mark.parametrize(("grid", "radius"), GRIDS, ids=str)
def test_window_is_the_dense_affinity_inside(grid, radius, device):
    leaves = inputs(2, 3, grid[0] * grid[1], device=device)
    dense = afa_ext.affinity_from_attention(*leaves)
    assert torch.equal(dense, dense.mT)
    window = afa_ext.affinity_from_attention(*leaves, grid=grid, radius=radius)
    label_map = torch.randint(0, 3, (2, *grid), device=device)
    labels = afa_ext.affinity_labels(label_map, stride=1, radius=radius, ignore_index=2)
    window_labels = afa_ext.affinity_labels(label_map, stride=1, radius=radius, ignore_index=2, windowed=True)
    assert window.shape == window_labels.shape
    if (2 * radius + 1) ** 2 != dense.shape[1]:
        torch.testing.assert_close(window, windowed_pairs(dense, grid, radius, 0))
        assert torch.equal(window_labels, windowed_pairs(labels, grid, radius, 255))
    else:  # the sizes of both layouts are equal: it is dense, as in the walk
        inside = reference.walk.window_mask(grid, radius, "square", torch.device(device))
        torch.testing.assert_close(window, dense.masked_fill(~inside, 0))
        assert torch.equal(window_labels, labels)
    scores = torch.rand(2, 4, *grid, dtype=torch.float64, device=device)
    walked = [afa_ext.random_walk(scores, a, grid=grid, radius=radius) for a in (dense, window)]
    torch.testing.assert_close(*walked)
    losses = [afa_ext.affinity_loss(*pairs) for pairs in ((dense, labels), (window, window_labels))]
    torch.testing.assert_close(*losses)
    for a, b in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("grid", [(6, 6), (3, 40)], ids=str)
def test_attention_outside_the_window_is_not_used(grid, device):
    leaves = inputs(1, 3, grid[0] * grid[1], device=device)
    inside = reference.walk.window_mask(grid, 2, "square", torch.device(device))
    spoilt = leaves[0].detach().masked_fill(~inside, float("nan")).requires_grad_()
    expected = values_and_gradients(afa_ext, leaves, grid=grid, radius=2)
    results = values_and_gradients(afa_ext, (spoilt, *leaves[1:]), grid=grid, radius=2)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert not results[1][..., ~inside].any()


def test_extreme_logits(device):
    """The sigmoid does not overflow and propagates NaN."""
    logits = torch.tensor([0.0, 40.0, -40.0, 1e4, -1e4, float("inf"), float("-inf"), float("nan")], device=device)
    attention = torch.zeros(1, 1, 8, 8, device=device)
    attention[0, 0].diagonal().copy_(logits / 2)
    one, zero = torch.ones(1, device=device), torch.zeros(1, device=device)
    several: tuple[dict[str, Any], ...] = ({}, {"grid": (2, 4), "radius": 1})
    for settings_ in several:
        affinity = afa_ext.affinity_from_attention(attention, one, zero, **settings_)
        diagonal = affinity[0, :, 4] if settings_ else affinity[0].diagonal()
        torch.testing.assert_close(diagonal, torch.sigmoid(logits), rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("radius", [None, 2])
def test_low_precision(dtype, radius, assert_relative, device):
    grid = (6, 9)
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs(2, 5, 54, device=device)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    results = values_and_gradients(afa_ext, leaves, grid=grid, radius=radius)
    expected = values_and_gradients(reference, exact, grid=grid, radius=radius)
    eps = torch.finfo(dtype).eps
    assert all(t.dtype == dtype for t in results)
    assert_relative(results[0], expected[0], eps)
    # Gradients are computed from the stored affinity and gradient, each rounded once, and are then rounded, too.
    for actual, wanted in zip(results[1:], expected[1:], strict=True):
        assert_relative(actual, wanted, 4 * eps)
    labels = torch.randint(0, 3, results[0].shape, dtype=torch.uint8, device=device)
    loss = afa_ext.affinity_loss(results[0], labels)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(
        float(reference.affinity_loss(results[0].detach().double(), labels)), rel=1e-6
    )
    (grad,) = torch.autograd.grad(loss, results[0])
    assert grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_is_widened_and_rounded(dtype):
    """All 2**16 numbers pass through the CPU conversions: one map with weight 1/2 gives the sigmoid of the number, and
    the gradient is multiplied by 1/2; including infinities, subnormals and NaN."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    attention = numbers.view(-1, 1, 1, 1)
    half, zero = torch.tensor([0.5], dtype=dtype), torch.zeros(1, dtype=dtype)
    affinity = afa_ext.affinity_from_attention(attention, half, zero)
    torch.testing.assert_close(
        affinity.flatten(),
        torch.sigmoid(numbers.float()).to(dtype),
        rtol=torch.finfo(dtype).eps,
        atol=1e-37,
        equal_nan=True,
    )
    level = torch.full((2**16, 1, 1), 0.5, dtype=dtype)
    grad = torch.ops.afa_ext.affinity_from_attention_backward_attention(
        numbers.view(-1, 1, 1), level, half, 1, 1, None, False
    )
    expected = (numbers.float() + numbers.float()) * 0.5 * (1 - 0.5) * 0.5
    tiny = torch.finfo(torch.float32).tiny  # the CPU kernels flush smaller numbers to 0
    torch.testing.assert_close(grad.flatten(), expected.to(dtype), rtol=0, atol=tiny, equal_nan=True)


def test_layouts(device):
    attention, weight, bias = inputs(2, 4, 30, device=device)
    for settings_ in ({}, {"grid": (5, 6), "radius": 1}):
        expected = values_and_gradients(afa_ext, (attention, weight, bias), **settings_)
        views = [
            attention.detach().to(memory_format=torch.channels_last),
            attention.detach().mT.contiguous().mT,
            torch.cat([attention.detach()] * 2, 3)[..., :30],
            attention.detach().transpose(0, 1).contiguous().transpose(0, 1),
        ]
        for view in views:
            assert not view.is_contiguous()
            leaves = (view.requires_grad_(), weight, bias)
            results = values_and_gradients(afa_ext, leaves, **settings_)
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
        affinity = expected[0].detach()
        labels = torch.randint(0, 3, affinity.shape, dtype=torch.uint8, device=device)
        loss = afa_ext.affinity_loss(affinity, labels)
        assert torch.equal(afa_ext.affinity_loss(affinity.mT.contiguous().mT, labels.mT.contiguous().mT), loss)


@BOTH
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 0, 0)], ids=str)
@pytest.mark.parametrize("radius", [None, 1])
def test_empty(module, shape, radius, device):
    batch, maps, height, width = shape
    leaves = inputs(batch, maps, height * width, device=device)
    affinity = module.affinity_from_attention(*leaves, grid=(height, width), radius=radius)
    labels = module.affinity_labels(
        torch.zeros(batch, height, width, dtype=torch.uint8, device=device),
        stride=1,
        radius=radius or 0,
        windowed=radius is not None,
    )
    if radius == 1:
        assert affinity.shape == labels.shape == (batch, height * width, 9)
    loss = module.affinity_loss(affinity, torch.ones_like(affinity, dtype=torch.uint8))
    assert loss == 0
    for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


@BOTH
def test_loss_is_zero_if_all_pairs_are_ignored(module, device):
    affinity = torch.rand(1, 4, 4, device=device, requires_grad=True)
    loss = module.affinity_loss(affinity, torch.full((1, 4, 4), 255, dtype=torch.uint8, device=device))
    loss.backward()
    assert loss == 0
    assert affinity.grad is not None and not affinity.grad.any()


@pytest.mark.parametrize("count", [1, 5, (1 << 14) - 1, 1 << 14, (1 << 15) + 7])
def test_loss_matches_reference(count, device):
    """Sizes around that of the blocks in which sums are accumulated, with any shape."""
    affinity = torch.rand(count, dtype=torch.float64, device=device, requires_grad=True)
    labels = torch.randint(0, 4, (count,), dtype=torch.uint8, device=device)
    labels[labels == 3] = 255
    results = []
    for module in (afa_ext, reference):
        loss = module.affinity_loss(affinity, labels)
        results.append((loss, *torch.autograd.grad(3 * loss, affinity)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    single = afa_ext.affinity_loss(affinity.detach().float(), labels)
    torch.testing.assert_close(single, results[1][0].float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("weights", [(0.5, 0.25, 0.25), (1, 0, 2)], ids=str)
@pytest.mark.parametrize("parts", [None, 3])
def test_weighted_loss_and_sums_match_reference(weights, parts, device):
    """Also for parts of a batch, whose losses add up to that of the batch."""
    affinity = torch.rand(6, 50, 50, dtype=torch.float64, device=device, requires_grad=True)
    labels = torch.randint(0, 4, affinity.shape, dtype=torch.uint8, device=device)
    groups = [labels == group for group in range(3)]
    counts = torch.stack([group.sum() for group in groups]) if parts else None
    expected, expected_sums = reference.affinity_loss_and_sums(affinity, labels, weights=weights)
    loss, sums = torch.zeros((), dtype=torch.float64, device=device), torch.zeros_like(expected_sums)
    for a, own in zip(affinity.chunk(parts or 1), labels.chunk(parts or 1), strict=True):
        part, part_sums = afa_ext.affinity_loss_and_sums(a, own, weights=weights, counts=counts)
        assert torch.equal(part, afa_ext.affinity_loss(a, own, weights=weights, counts=counts))
        loss, sums = loss + part, sums + part_sums
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-12, atol=0)
    assert not sums.requires_grad
    for number, group in enumerate(groups):
        assert float((sums[0, number] / sums[1, number]).detach()) == pytest.approx(
            float(affinity.detach()[group].mean())
        )
    grads = [torch.autograd.grad(value, affinity)[0] for value in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=0)


@BOTH
def test_balanced_loss_by_hand(module, device):
    """One pair of different classes, two of background and one of an object."""
    affinity = torch.tensor([0.5, 0.9, 0.7, 0.2], device=device)
    labels = torch.tensor([0, 1, 1, 2], dtype=torch.uint8, device=device)
    loss, sums = module.affinity_loss_and_sums(affinity, labels, weights=(0.5, 0.25, 0.25))
    assert float(loss) == pytest.approx(0.5 * 0.5 / 2 + 0.25 * 0.4 / 3 + 0.25 * 0.8 / 2)
    torch.testing.assert_close(sums, torch.tensor([[0.5, 1.6, 0.2], [1, 2, 1]], device=device))


@BOTH
def test_labels_of_foreground_pairs_and_of_token_centers(module, device):
    label_map = torch.tensor([[[9, 9, 9, 9, 9, 9], [9, 0, 9, 3, 9, 255], [9, 0, 9, 3, 9, 3]]], device=device)
    labels = module.affinity_labels(label_map, stride=2, offset=1, radius=2, background=0)
    assert labels[0].tolist() == [[1, 0, 255], [0, 2, 255], [255, 255, 255]]
    assert torch.equal(
        labels.clamp(max=1), module.affinity_labels(label_map[:, 1:, 1:], stride=2, radius=2).clamp(max=1)
    )


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (33, 48), (16, 17), (40, 96)], ids=str)
@pytest.mark.parametrize("windowed", [False, True])
def test_labels_match_reference(dtype, size, windowed, device):
    label_map = torch.randint(0, 3, (2, *size), device=device)
    label_map[torch.rand(label_map.shape, device=device) < 0.2] = 255
    label_map = label_map.to(dtype)
    for settings_ in (
        {"radius": 1},
        {"radius": 3, "stride": 7},
        {"radius": 20, "stride": 8, "ignore_index": 0},
        {"radius": 2, "stride": 3, "offset": 2, "background": 1},
    ):
        labels = afa_ext.affinity_labels(label_map, windowed=windowed, **settings_)
        assert labels.dtype == torch.uint8
        assert torch.equal(labels, reference.affinity_labels(label_map, windowed=windowed, **settings_))
        strided = torch.stack([label_map, label_map], -1)[..., 0]
        assert torch.equal(labels, afa_ext.affinity_labels(strided, windowed=windowed, **settings_))


def test_labels_compare_whole_numbers(device):
    """Labels that differ only beyond 32 bits are different; -1 can be the ignored label."""
    label_map = torch.tensor([[[5, 5 + 2**32, -1, 5]]], device=device)
    labels = afa_ext.affinity_labels(label_map, stride=1, radius=3, ignore_index=-1)
    expected = [[1, 0, 255, 1], [0, 1, 255, 0], [255] * 4, [1, 0, 255, 1]]
    assert labels[0].tolist() == expected


@pytest.mark.parametrize("radius", [None, 1, 4])
@pytest.mark.slow
def test_gradcheck(radius, device):
    leaves = inputs(2, 3, 6, device=device)
    assert torch.autograd.gradcheck(lambda *t: afa_ext.affinity_from_attention(*t, grid=(2, 3), radius=radius), leaves)
    label_map = torch.tensor([[[1, 1, 2], [1, 255, 2]]] * 2, device=device)
    labels = afa_ext.affinity_labels(label_map, stride=1, radius=radius or 2, windowed=radius is not None)

    def loss(*leaves):
        return afa_ext.affinity_loss(afa_ext.affinity_from_attention(*leaves, grid=(2, 3), radius=radius), labels)

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("radius", [None, 2])
def test_compile_fullgraph(radius, dynamic, device):
    def loss(attention, weight, bias, label_map):
        grid = (label_map.shape[1], label_map.shape[2])
        affinity = afa_ext.affinity_from_attention(attention, weight, bias, grid=grid, radius=radius)
        labels = afa_ext.affinity_labels(label_map, stride=1, radius=2, windowed=radius is not None)
        return afa_ext.affinity_loss(affinity, labels)

    functions: tuple[Any, ...] = (loss, torch.compile(loss, fullgraph=True, dynamic=dynamic))
    for height in (6, 8):
        leaves = inputs(2, 3, 7 * height, torch.float32, device)
        label_map = torch.randint(0, 3, (2, height, 7), device=device)
        eager, fused = (torch.autograd.grad(f(*leaves, label_map), leaves) for f in functions)
        torch.testing.assert_close(fused, eager)


@pytest.mark.parametrize("radius", [None, 1])
def test_autocast(radius, device):
    leaves = inputs(1, 2, 16, torch.float32, device)
    low = torch.float16 if device == "cuda" else torch.bfloat16
    halves = [t.detach().to(low) for t in leaves]
    labels = torch.randint(0, 3, (1, 16, 16 if radius is None else 9), dtype=torch.uint8, device=device)
    with torch.autocast(device, dtype=low):
        affinity = afa_ext.affinity_from_attention(halves[0], leaves[1], leaves[2], grid=(4, 4), radius=radius)
        loss = afa_ext.affinity_loss(affinity.to(low), labels)
    assert affinity.dtype == loss.dtype == torch.float32
    expected = afa_ext.affinity_from_attention(halves[0].float(), *leaves[1:], grid=(4, 4), radius=radius)
    assert torch.equal(affinity, expected)
    assert torch.equal(loss, afa_ext.affinity_loss(affinity.to(low).float(), labels))


@pytest.mark.parametrize("radius", [None, 4])
def test_threads_change_nothing(radius, threads):
    leaves = inputs(2, 5, 17 * 13, torch.float32)
    label_map = torch.randint(0, 3, (2, 17, 13))
    results = []
    for count in (1, 2, 3):
        threads(count)
        affinity = afa_ext.affinity_from_attention(*leaves, grid=(17, 13), radius=radius)
        labels = afa_ext.affinity_labels(label_map, stride=1, radius=4, windowed=radius is not None)
        loss = afa_ext.affinity_loss(affinity, labels)
        results.append([affinity, labels, loss, *torch.autograd.grad(loss, leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@settings(max_examples=30, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    maps=st.integers(1, 5),
    radius=st.integers(0, 7),
    scale=st.floats(0.01, 3),
    seed=st.integers(0, 2**31),
)
def test_properties(device, grid, maps, radius, scale, seed):
    torch.manual_seed(seed)
    nodes = grid[0] * grid[1]
    attention, weight, bias = inputs(2, maps, nodes, device=device)
    dense = afa_ext.affinity_from_attention(scale * attention, weight, bias)
    assert torch.equal(dense, dense.mT)
    assert bool(((dense > 0) & (dense < 1)).all())
    swapped = afa_ext.affinity_from_attention(scale * attention.mT, weight, bias)
    torch.testing.assert_close(swapped, dense)
    label_map = torch.randint(0, 3, (2, *grid), device=device)
    labels = afa_ext.affinity_labels(label_map, stride=1, radius=radius, ignore_index=2)
    assert torch.equal(labels, labels.mT)
    own = labels.diagonal(dim1=1, dim2=2)
    assert torch.equal(own, torch.where(label_map.flatten(1) == 2, 255, 1).to(torch.uint8))
    assert 0 <= afa_ext.affinity_loss(dense, labels) < 1
    ideal = (labels == 1).double()
    assert afa_ext.affinity_loss(ideal, labels) == 0
    (grad,) = torch.autograd.grad(afa_ext.affinity_loss(dense, labels), attention)
    torch.testing.assert_close(grad, grad.mT)


S, W, B = torch.rand(2, 3, 20, 20), torch.rand(3), torch.rand(1)
G = {"grid": (4, 5)}
M = torch.zeros(2, 64, 80, dtype=torch.uint8)
A, L = torch.rand(2, 20, 20), torch.zeros(2, 20, 20, dtype=torch.uint8)


@BOTH
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m: m.affinity_from_attention(S.numpy(), W, B),
            TypeError,
            r"attention must be a floating-point tensor \[B, K, N, N\]",
        ),
        (lambda m: m.affinity_from_attention(S[0], W, B), ValueError, r"attention must have 4 .* got .*\(3, 20, 20\)"),
        (lambda m: m.affinity_from_attention(S.int(), W, B), TypeError, "attention must be float32"),
        (lambda m: m.affinity_from_attention(S[..., :19], W, B), ValueError, r"attention must be square .*20, 19\)"),
        (lambda m: m.affinity_from_attention(S[:, :0], W[:0], B), ValueError, "attention must have at least one map"),
        (lambda m: m.affinity_from_attention(S, [1, 2, 3], B), TypeError, "weight must be a tensor"),
        (
            lambda m: m.affinity_from_attention(S, W[:2], B),
            ValueError,
            r"weight must have shape \[K\] or \[1, K, 1, 1\] with K = 3, got .*\(2,\)",
        ),
        (lambda m: m.affinity_from_attention(S, W.double(), B), TypeError, "weight must have the type of attention"),
        (lambda m: m.affinity_from_attention(S, W.to("meta"), B), ValueError, "weight must be on the device of att"),
        (lambda m: m.affinity_from_attention(S, W, 0.5), TypeError, r"bias must be a tensor \[1\] or \[\], got 0.5"),
        (
            lambda m: m.affinity_from_attention(S, W, W),
            ValueError,
            r"bias must have shape \[1\] or \[\] .*got .*\(3,\)",
        ),
        (lambda m: m.affinity_from_attention(S, W, B.half()), TypeError, "bias must have the type of attention"),
        (lambda m: m.affinity_from_attention(S, W, B.to("meta")), ValueError, "bias must be on the device of att"),
        (lambda m: m.affinity_from_attention(S, W, B, radius=2), ValueError, "radius needs grid"),
        (lambda m: m.affinity_from_attention(S, W, B, grid=20), TypeError, r"grid must be the two sizes \(h, w\)"),
        (lambda m: m.affinity_from_attention(S, W, B, grid=(4, 5.0)), TypeError, "grid's sizes must be an integer"),
        (lambda m: m.affinity_from_attention(S, W, B, grid=(-4, -5)), ValueError, "grid's sizes must be at least 0"),
        (lambda m: m.affinity_from_attention(S, W, B, grid=(4, 4)), ValueError, r"grid must have h\*w = 20 .*\(4, 4\)"),
        (lambda m: m.affinity_from_attention(S, W, B, **G, radius=64), ValueError, "radius must be between 0 and 63"),
        (lambda m: m.affinity_from_attention(S, W, B, **G, radius=2.0), TypeError, "radius must be an integer"),
        (lambda m: m.affinity_labels([[0]], radius=1), TypeError, r"label_map must be an integer tensor \[B, H, W\]"),
        (lambda m: m.affinity_labels(M[0], radius=1), ValueError, "label_map must have 3 dimensions"),
        (lambda m: m.affinity_labels(M.float(), radius=1), TypeError, "label_map must be uint8, int16, int32 or int64"),
        (lambda m: m.affinity_labels(M, radius=1, stride=0), ValueError, "stride must be at least 1, got 0"),
        (lambda m: m.affinity_labels(M, radius=-1), ValueError, "radius must be between 0 and 63, got -1"),
        (lambda m: m.affinity_labels(M, radius=1, ignore_index=None), TypeError, "ignore_index must be an integer"),
        (lambda m: m.affinity_labels(M, radius=1, windowed=1), TypeError, "windowed must be True or False, got 1"),
        (lambda m: m.affinity_loss(A.int(), L), TypeError, "affinity must be a float32, float16, bfloat16 or float64"),
        (lambda m: m.affinity_loss(A, L.int()), TypeError, "labels must be a uint8 tensor of the shape of affinity"),
        (lambda m: m.affinity_loss(A, L[:1]), ValueError, r"labels must have the shape of affinity \(2, 20, 20\), got"),
        (lambda m: m.affinity_loss(A, L.to("meta")), ValueError, "labels must be on the device of affinity"),
        (lambda m: m.affinity_labels(M, radius=1, offset=16), ValueError, "offset must be between 0 and 15, got 16"),
        (lambda m: m.affinity_labels(M, radius=1, offset=0.5), TypeError, "offset must be an integer"),
        (lambda m: m.affinity_labels(M, radius=1, background=0.0), TypeError, "background must be an integer"),
        (lambda m: m.affinity_loss(A, L, weights=(1, 1)), ValueError, r"weights must be three numbers .*got \(1, 1\)"),
        (lambda m: m.affinity_loss(A, L, weights=(1, -1, 0)), ValueError, "weights must be at least 0"),
        (lambda m: m.affinity_loss(A, L, weights=(1, float("nan"), 0)), ValueError, "weights must be finite"),
        (lambda m: m.affinity_loss(A, L, weights=(1, "1", 0)), TypeError, "weights must be a number"),
        (lambda m: m.affinity_loss(A, L, counts=(1, 1, 1)), TypeError, r"counts must be an int64 tensor \[3\]"),
        (lambda m: m.affinity_loss(A, L, counts=torch.ones(2).long()), ValueError, r"counts must have shape \[3\]"),
        (
            lambda m: m.affinity_loss(A, L, counts=torch.ones(3, device="meta").long()),
            ValueError,
            "counts must be on the device of affinity",
        ),
    ],
)
def test_errors(module, call, error, message):
    with pytest.raises(error, match=message):
        call(module)


SUMS = torch.rand(10)
HALVES = (0.5, 0.5, 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.affinity_from_attention(S[0], W, B, 4, 5, None, False), "attention must have shape"),
        (lambda o: o.affinity_from_attention(S, W, B, 4, 4, None, False), r"attention must have shape .*16, 16\]"),
        (lambda o: o.affinity_from_attention(S, W, B, -4, -5, None, False), "grid must not be negative, got -4 x -5"),
        (
            lambda o: o.affinity_from_attention(S[:, :0], W[:0], B, 4, 5, None, False),
            "attention must have at least one",
        ),
        (lambda o: o.affinity_from_attention(S.int(), W, B, 4, 5, None, False), "attention must be float32"),
        (lambda o: o.affinity_from_attention(S, W[:2], B, 4, 5, None, False), r"weight must have shape \[K\] = \[3\]"),
        (lambda o: o.affinity_from_attention(S, W.double(), B, 4, 5, None, False), "weight must have the type"),
        (lambda o: o.affinity_from_attention(S, W, W, 4, 5, None, False), "bias must have shape"),
        (lambda o: o.affinity_from_attention(S, W, B.double(), 4, 5, None, False), "bias must have the type"),
        (lambda o: o.affinity_from_attention(S, W, B, 4, 5, None, True), "windowed needs radius"),
        (lambda o: o.affinity_from_attention(S, W, B, 4, 5, 64, True), "radius must be between 0 and 63, got 64"),
        (
            lambda o: o.affinity_from_attention_backward_attention(A, A, W, 4, 5, 1, True),
            r"affinity must have shape .*20, 9\]",
        ),
        (
            lambda o: o.affinity_from_attention_backward_attention(A[:1], A, W, 4, 5, None, False),
            "grad must have shape",
        ),
        (
            lambda o: o.affinity_from_attention_backward_attention(A.half(), A, W, 4, 5, None, False),
            "grad must have the type of affinity",
        ),
        (
            lambda o: o.affinity_from_attention_backward_attention(A, A, W.half(), 4, 5, None, False),
            "weight must have the type of affinity",
        ),
        (
            lambda o: o.affinity_from_attention_backward_weight(A, A, S[:1], 4, 5, None, False),
            "attention must have shape",
        ),
        (
            lambda o: o.affinity_from_attention_backward_weight(A, A, S.half(), 4, 5, None, False),
            "attention must have the type of affinity",
        ),
        (lambda o: o.affinity_labels(M[0].long(), 1, 255, False, None), "tokens must have shape"),
        (lambda o: o.affinity_labels(M, 1, 255, False, None), "tokens must be int64"),
        (lambda o: o.affinity_labels(M.long(), 64, 255, False, None), "radius must be between 0 and 63"),
        (lambda o: o.affinity_loss(A.int(), L, *HALVES, None), "affinity must be float32"),
        (
            lambda o: o.affinity_loss(A, L[:1], *HALVES, None),
            r"labels must have the shape of affinity, \[2, 20, 20\], got \[1, 20",
        ),
        (lambda o: o.affinity_loss(A, L.int(), *HALVES, None), "labels must be uint8"),
        (lambda o: o.affinity_loss(A, L, *HALVES, torch.ones(2).long()), "counts must have shape"),
        (lambda o: o.affinity_loss(A, L, *HALVES, torch.ones(3)), "counts must be int64"),
        (lambda o: o.affinity_loss_backward(SUMS[:2], SUMS, L), "grad must have shape"),
        (lambda o: o.affinity_loss_backward(SUMS, SUMS[:2], L), "sums must have shape"),
        (lambda o: o.affinity_loss_backward(SUMS.half(), SUMS.half(), L), "sums must be float32 or float64"),
        (lambda o: o.affinity_loss_backward(SUMS.double(), SUMS, L), "grad must have the type of sums"),
        (lambda o: o.affinity_loss_backward(SUMS, SUMS, L.int()), "labels must be uint8"),
    ],
)
def test_errors_of_the_operators_themselves(call, message):
    with pytest.raises(RuntimeError, match="^" + message):
        call(torch.ops.afa_ext)
