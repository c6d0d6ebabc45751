from __future__ import annotations

from typing import Any

import pytest
import torch

import afa_ext
from afa_ext import reference
from afa_ext.reference.pair_affinity import path_points
from afa_ext.reference.walk import dense_affinity
from tests.afa_ext.test_walk import nonnegative, to_windowed


def test_edge_affinity_depends_on_the_points_of_the_path():
    points = {
        (0, 3): [(0, 0), (0, 1), (0, 2), (0, 3)],
        (2, 1): [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)],
        (2, -2): [(0, -1), (0, 0), (1, -2), (1, -1), (1, 0), (2, -2), (2, -1)],
        (1, 4): [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4)],
    }
    for (dy, dx), expected in points.items():
        assert path_points(dy, dx) == expected
        # One boundary point at a time: the pair's affinity falls to 0 where it lies on the path, and only there.
        touched = []
        k = afa_ext.window_offsets(5, "disc").index((dy, dx))
        for y in range(9):
            for x in range(13):
                edge = torch.zeros(1, 9, 13)
                edge[0, y, x] = 1
                if afa_ext.edge_affinity(edge, 5)[0, 4 * 13 + 6, k] == 0:
                    touched.append((y - 4, x - 6))
        assert touched == expected


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 6), (9, 20)], ids=str)
@pytest.mark.parametrize("radius", [1, 2, 5, 9])
def test_matches_reference(grid, radius, assert_relative, device):
    edge = nonnegative(2, 1, *grid, device=device)
    features = torch.randn(2, 37, *grid, dtype=torch.float64, device=device)
    features[:, :, :, ::3] = features[:, :, :, :1].clone()  # equal features, where the derivative is taken as 0
    for name, source in (("edge_affinity", edge), ("feature_affinity", features)):
        expected = getattr(reference, name)(source, radius)
        actual = getattr(afa_ext, name)(source, radius)
        assert_relative(actual, expected, 1e-14)
        assert_relative(getattr(afa_ext, name)(source.float(), radius), expected, 1e-6)
        dense = dense_affinity(actual, grid, radius, "disc")
        assert torch.equal(dense, dense.mT)
        assert (dense.diagonal(dim1=1, dim2=2) == 1).all()
        outside = to_windowed(torch.ones_like(dense), grid, radius, "disc").isnan()
        assert not actual[outside].any()
    assert torch.equal(afa_ext.edge_affinity(edge[:, 0], radius), afa_ext.edge_affinity(edge, radius))
    leaf = features.requires_grad_()
    grads: list[torch.Tensor] = []
    for module in (afa_ext, reference):
        out = module.feature_affinity(leaf, radius)
        pull = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=device).view_as(out)
        grads += torch.autograd.grad((out * pull).sum(), leaf)
    assert_relative(*grads, 1e-10)


def test_gradcheck_of_features(device):
    features = torch.randn(2, 3, 4, 5, dtype=torch.float64, device=device, requires_grad=True)
    scores = nonnegative(2, 2, 4, 5, device=device).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: afa_ext.feature_affinity(f, 3), (features,))
    settings: dict[str, Any] = {"grid": (4, 5), "radius": 3, "window": "disc", "power": 8, "steps": 2}
    assert torch.autograd.gradcheck(
        lambda s, f: afa_ext.random_walk(s, afa_ext.feature_affinity(f, 3), **settings), (scores, features)
    )


@pytest.mark.parametrize(("grid", "radius"), [((1, 1), 5), ((7, 12), 5), ((12, 5), 3), ((3, 40), 9)], ids=str)
def test_propagate_to_edge_matches_reference(grid, radius, assert_relative, device):
    edge = nonnegative(2, 1, *grid, device=device)
    x = nonnegative(2, 3, *grid, device=device).requires_grad_()
    results = []
    for module in (afa_ext, reference):
        out = module.propagate_to_edge(x, edge, radius, 4, 5)
        pull = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=device).view_as(out)
        results.append([out, *torch.autograd.grad((out * pull).sum(), x)])
        single = module.propagate_to_edge(x[0], edge[0], radius, 4, 5)
        assert_relative(single[:, 0], out[0], 1e-12)
    for actual, expected in zip(*results, strict=True):
        assert_relative(actual, expected, 1e-11)


@pytest.mark.slow
def test_published_settings_of_irn(assert_relative, device):
    """2**8 steps in float32 against eight squarings in float64, on a smooth map with closed contours."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 30), torch.linspace(-1, 1, 37), indexing="ij")
    edge = torch.exp(-80 * ((x * x + y * y).sqrt() - 0.6) ** 2)[None].to(device)
    cams = torch.stack([torch.exp(-9 * (x * x + y * y)), (x > 0.5).float(), torch.rand(30, 37)]).to(device)
    expected = reference.propagate_to_edge(cams.double(), edge.double())
    # An error that a step repeats grows with the steps: twice what the squarings lose in float32 on the CPU.
    squared = reference.propagate_to_edge(cams.cpu(), edge.cpu())
    limit = 2 * float((squared - expected.cpu()).abs().max() / expected.abs().max())
    assert limit < 1e-4
    assert_relative(afa_ext.propagate_to_edge(cams, edge), expected, limit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype, assert_relative, device):
    edge, features = nonnegative(2, 1, 6, 9, device=device).to(dtype), torch.randn(2, 5, 6, 9, device=device).to(dtype)
    x, attention = nonnegative(2, 3, 6, 9, device=device).to(dtype), nonnegative(2, 54, 54, device=device).to(dtype)
    clip = {"grid": (6, 9), "power": 1, "steps": 2, "normalize": "sinkhorn", "direction": "rows"}
    for call in (
        lambda m, cast: m.edge_affinity(cast(edge), 4),
        lambda m, cast: m.feature_affinity(cast(features), 4),
        lambda m, cast: m.propagate_to_edge(cast(x), cast(edge), exp_times=3),
        lambda m, cast: m.random_walk(cast(x), cast(attention), **clip),
    ):
        expected = call(reference, torch.Tensor.double)
        for module in (afa_ext, reference):
            out = call(module, lambda t: t)
            assert out.dtype == dtype
            assert_relative(out, expected, torch.finfo(dtype).eps)  # float32 throughout: one rounding at the end


def test_layouts(device):
    edge, features = nonnegative(2, 1, 6, 9, device=device), torch.randn(2, 5, 6, 9, device=device)
    x = nonnegative(2, 3, 6, 9, device=device)
    affinity = afa_ext.feature_affinity(features, 3)
    strided = features.to(memory_format=torch.channels_last)
    assert not strided.is_contiguous()
    assert torch.equal(afa_ext.feature_affinity(strided, 3), affinity)
    walked = afa_ext.propagate_to_edge(x, edge)
    flipped = edge.mT.contiguous().mT
    assert not flipped.is_contiguous()
    assert torch.equal(afa_ext.propagate_to_edge(x.to(memory_format=torch.channels_last), flipped), walked)
    for steps in (1, 4):
        for normalize in ("column", "row", "sinkhorn", None):
            settings: dict[str, Any] = {"grid": (6, 9), "radius": 3, "window": "disc", "steps": steps}
            settings["normalize"] = normalize
            results = []
            for layout in (affinity, affinity.contiguous()):
                leaf = layout.double().detach().requires_grad_()
                out = afa_ext.random_walk(x, leaf, **settings)
                results.append([out, *torch.autograd.grad(out.square().sum(), leaf)])
            assert results[0][0].is_contiguous()
            for by_offset, by_node in zip(*results, strict=True):
                torch.testing.assert_close(by_offset, by_node, rtol=1e-12, atol=1e-14)


def test_empty(device):
    for module in (afa_ext, reference):
        assert module.edge_affinity(torch.rand(0, 4, 5, device=device), 2).shape == (0, 20, 9)
        assert module.edge_affinity(torch.rand(2, 0, 5, device=device), 2).shape == (2, 0, 9)
        features = torch.rand(0, 3, 4, 5, device=device, requires_grad=True)
        out = module.feature_affinity(features, 2)
        assert out.shape == (0, 20, 9)
        out.sum().backward()
        edge = torch.rand(1, 4, 5, device=device)
        assert module.propagate_to_edge(torch.rand(0, 4, 5, device=device), edge).shape == (0, 1, 4, 5)
        batch = torch.rand(0, 3, 4, 5, device=device), torch.rand(0, 1, 4, 5, device=device)
        assert module.propagate_to_edge(*batch).shape == (0, 3, 4, 5)


def test_autocast(device):
    low = torch.float16 if device == "cuda" else torch.bfloat16
    edge, x = torch.rand(1, 6, 7, device=device).to(low), torch.rand(3, 6, 7, device=device)
    features = torch.randn(1, 4, 6, 7, device=device).to(low)
    with torch.autocast(device, dtype=low):
        results = [afa_ext.edge_affinity(edge, 3), afa_ext.feature_affinity(features, 3)]
        results.append(afa_ext.propagate_to_edge(x, edge))
    expected = [afa_ext.edge_affinity(edge.float(), 3), afa_ext.feature_affinity(features.float(), 3)]
    expected.append(afa_ext.propagate_to_edge(x, edge.float()))
    for actual, wanted in zip(results, expected, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_compile_fullgraph(dynamic, device):
    def loss(x, edge, features, attention, boxes):
        grid = (x.shape[2], x.shape[3])
        walked = afa_ext.propagate_to_edge(x, edge, exp_times=2)
        similar = afa_ext.feature_affinity(features, 3)
        psa = afa_ext.random_walk(x, similar, grid=grid, radius=3, window="disc", power=8, steps=4)
        clip = afa_ext.random_walk(
            x, attention, grid=grid, power=1, steps=2, normalize="sinkhorn", direction="rows", boxes=boxes
        )
        return walked.square().sum() + psa.square().sum() + clip.square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    boxes = torch.tensor([[0, 0, 3, 3], [1, 1, 5, 9]], device=device).expand(2, -1, -1)
    for height in (6, 8):
        x = torch.rand(2, 2, height, 5, device=device, requires_grad=True)
        features = torch.randn(2, 4, height, 5, device=device, requires_grad=True)
        attention = torch.rand(2, 5 * height, 5 * height, device=device, requires_grad=True)
        edge = torch.rand(2, 1, height, 5, device=device)
        leaves = (x, features, attention)
        eager, fused = (torch.autograd.grad(f(x, edge, features, attention, boxes), leaves) for f in (loss, compiled))
        torch.testing.assert_close(fused, eager)


def test_edges_have_no_native_gradient():
    edge, x = torch.rand(1, 4, 5, requires_grad=True), torch.rand(3, 4, 5)
    with pytest.raises(ValueError, match=r"edge requires grad, .* afa_ext\.reference"):
        afa_ext.edge_affinity(edge, 3)
    with pytest.raises(ValueError, match=r"edge requires grad"):
        afa_ext.propagate_to_edge(x, edge)
    with torch.no_grad():
        afa_ext.propagate_to_edge(x, edge)
    (grad,) = torch.autograd.grad(reference.edge_affinity(edge, 3).sum(), edge)
    assert grad.any()
