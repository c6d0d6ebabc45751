from __future__ import annotations

import pytest
import torch

import afa_ext
from afa_ext import reference

CASES = ["walk_square", "walk_train"]


def nonnegative(*shape, dtype=torch.float64, device="cpu"):
    return torch.rand(*shape, dtype=dtype, device=device)


@pytest.mark.parametrize("case", CASES)
def test_golden(case, golden, assert_relative, device):
    g = golden(case)
    cams, affinity = g["cams"].to(device), g["affinity"].to(device)
    grid, radius = tuple(cams.shape[2:]), g["radius"]
    for module in (afa_ext, reference):
        assert_relative(module.random_walk(cams, affinity, grid=grid, radius=radius), g["plain_windowed"])
        assert_relative(module.random_walk(cams, affinity, grid=grid), g["plain_dense"])
        out = module.propagate_cams(
            cams, affinity, g["cls_labels"].to(device), radius=radius, background=g["bkg_score"]
        )
        assert_relative(out, g["with_bkg"])
        absent = torch.nn.functional.pad(g["cls_labels"], (1, 0), value=1) == 0
        assert not out[absent.to(device)].any()


@pytest.mark.parametrize("case", CASES)
def test_golden_window(case, golden):
    g = golden(case)
    grid = tuple(g["cams"].shape[2:])
    mask = reference.walk.window_mask(grid, g["radius"], "square", torch.device("cpu"))
    assert torch.equal(mask, g["window_mask"].bool())


def to_windowed(dense, grid, radius, window):
    """[B, N, N] -> [B, N, window], entry by entry as the layout is documented; NaN where the target is outside."""
    batch, nodes, _ = dense.shape
    offsets = afa_ext.window_offsets(radius, window)
    out = torch.full((batch, nodes, len(offsets)), float("nan"), dtype=dense.dtype, device=dense.device)
    for y in range(grid[0]):
        for x in range(grid[1]):
            for k, (dy, dx) in enumerate(offsets):
                if 0 <= y + dy < grid[0] and 0 <= x + dx < grid[1]:
                    out[:, y * grid[1] + x, k] = dense[:, y * grid[1] + x, (y + dy) * grid[1] + x + dx]
    return out


GRIDS = [((1, 1), 2), ((1, 7), 3), ((5, 6), 1), ((9, 20), 4), ((6, 5), 9)]


@pytest.mark.parametrize(("grid", "radius"), GRIDS, ids=str)
@pytest.mark.parametrize("window", ["square", "disc"])
@pytest.mark.parametrize("normalize", ["column", "row", "sinkhorn", None])
def test_matches_reference(grid, radius, window, normalize, assert_relative, device):
    nodes = grid[0] * grid[1]
    scores = nonnegative(2, 5, *grid, device=device).requires_grad_()
    dense = nonnegative(2, nodes, nodes, device=device).requires_grad_()
    settings = {"grid": grid, "radius": radius, "window": window, "steps": 3, "normalize": normalize}
    results = []
    for module in (afa_ext, reference):
        out = module.random_walk(scores, dense, **settings)
        pull = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=device).view_as(out)
        results.append([out, *torch.autograd.grad((out * pull).sum(), (scores, dense))])
    for actual, expected in zip(*results, strict=True):
        assert_relative(actual, expected, 1e-9)

    windowed = to_windowed(dense.detach(), grid, radius, window)
    if windowed.shape[2] != nodes:
        # The native operators never read what leaves the grid: NaN there changes nothing.
        leaf = windowed.clone().requires_grad_()
        out = afa_ext.random_walk(scores, leaf, **settings)
        assert_relative(out, results[1][0], 1e-9)
        (grad,) = torch.autograd.grad((out * pull).sum(), leaf)
        expected = to_windowed(results[1][2], grid, radius, window).nan_to_num(0)
        assert_relative(grad.nan_to_num(0), expected, 1e-9)
        twin = reference.random_walk(scores, windowed.nan_to_num(0), **settings)
        assert_relative(twin, results[1][0], 1e-9)
    single = afa_ext.random_walk(scores.detach().float(), dense.detach().float(), **settings)
    assert_relative(single, results[1][0], 5e-6)


@pytest.mark.parametrize("power", [1, 2, 10, 0.5, 2.5])
def test_powers(power, assert_relative, device):
    scores = nonnegative(1, 2, 4, 5, device=device).requires_grad_()
    affinity = (nonnegative(1, 20, 20, device=device) + 0.1).requires_grad_()
    results = []
    for module in (afa_ext, reference):
        out = module.random_walk(scores, affinity, grid=(4, 5), radius=2, power=power)
        results.append([out, *torch.autograd.grad(out.square().sum(), (scores, affinity))])
    for actual, expected in zip(*results, strict=True):
        assert_relative(actual, expected, 1e-10)


@pytest.mark.parametrize("radius", [None, 2])
def test_steps_compose(radius, device):
    scores, affinity = nonnegative(1, 2, 5, 5, device=device), nonnegative(1, 25, 25, device=device)
    settings = {"grid": (5, 5), "radius": radius}
    once = afa_ext.random_walk(scores, affinity, **settings)
    twice = afa_ext.random_walk(once, affinity, **settings)
    torch.testing.assert_close(afa_ext.random_walk(scores, affinity, steps=2, **settings), twice)
    assert torch.equal(afa_ext.random_walk(scores, affinity, steps=0, **settings), scores)


def test_column_normalised_walk_keeps_a_constant_map(device):
    affinity = nonnegative(1, 30, 30, device=device)
    ones = torch.ones(1, 1, 5, 6, dtype=torch.float64, device=device)
    out = afa_ext.random_walk(ones, affinity, grid=(5, 6), radius=2, steps=4, eps=0.0)
    torch.testing.assert_close(out, ones)


def test_affinity_outside_the_window_is_not_read(device):
    scores, affinity = nonnegative(1, 3, 6, 6, device=device), nonnegative(1, 36, 36, device=device)
    inside = reference.walk.window_mask((6, 6), 2, "square", torch.device(device))
    expected = afa_ext.random_walk(scores, affinity, grid=(6, 6), radius=2)
    out = afa_ext.random_walk(scores, affinity.masked_fill(~inside, float("nan")), grid=(6, 6), radius=2)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("radius", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype, radius, assert_relative, device):
    scores = nonnegative(2, 3, 6, 8, dtype=dtype, device=device)
    affinity = nonnegative(2, 48, 48, dtype=dtype, device=device)
    settings = {"grid": (6, 8), "radius": radius, "steps": 2}
    out = afa_ext.random_walk(scores, affinity, **settings)
    assert out.dtype == dtype
    exact = reference.random_walk(scores.double(), affinity.double(), **settings)
    assert_relative(out, exact, torch.finfo(dtype).eps)  # float32 throughout: one rounding at the end
    labels = torch.ones(2, 3, device=device)
    out = afa_ext.propagate_cams(scores, affinity, labels, radius=radius, background=0.35)
    assert out.dtype == dtype
    exact = reference.propagate_cams(scores.double(), affinity.double(), labels, radius=radius, background=0.35)
    assert_relative(out, exact, torch.finfo(dtype).eps)


def test_layouts(device):
    scores, affinity = nonnegative(2, 4, 6, 7, device=device), nonnegative(2, 42, 42, device=device)
    expected = afa_ext.random_walk(scores, affinity, grid=(6, 7), radius=3)
    views = [
        (scores.to(memory_format=torch.channels_last), affinity),
        (scores.mT.contiguous().mT, affinity.mT.contiguous().mT),
        (torch.cat([scores, scores], 1)[:, :4], torch.cat([affinity, affinity], 2)[..., :42]),
    ]
    for s, a in views:
        assert not (s.is_contiguous() and a.is_contiguous())
        assert torch.equal(afa_ext.random_walk(s, a, grid=(6, 7), radius=3), expected)


@pytest.mark.parametrize("radius", [None, 2])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(shape, radius, device):
    nodes = shape[2] * shape[3]
    scores = torch.rand(shape, device=device, requires_grad=True)
    affinity = torch.rand(shape[0], nodes, nodes, device=device, requires_grad=True)
    for module in (afa_ext, reference):
        out = module.random_walk(scores, affinity, grid=shape[2:], radius=radius, steps=2)
        assert out.shape == shape
        out.sum().backward()
        labels = torch.ones(shape[:2], device=device)
        cams = module.propagate_cams(scores, affinity, labels, radius=radius, background=0.5)
        assert cams.shape == (shape[0], shape[1] + 1, *shape[2:])


@pytest.mark.parametrize("radius", [None, 2])
def test_propagate_cams_matches_reference(radius, assert_relative, device):
    cams = nonnegative(3, 6, 7, 5, device=device).requires_grad_()
    affinity = nonnegative(3, 35, 35, device=device).requires_grad_()
    labels = (torch.rand(3, 6, device=device) > 0.5).float()
    labels[1] = 0
    results = []
    for module in (afa_ext, reference):
        out = module.propagate_cams(cams, affinity, labels, radius=radius, background=0.35, steps=2)
        pull = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=device).view_as(out)
        results.append([out, *torch.autograd.grad((out * pull).sum(), (cams, affinity))])
    for actual, expected in zip(*results, strict=True):
        assert_relative(actual, expected, 1e-10)
    bools = afa_ext.propagate_cams(cams, affinity, labels.bool(), radius=radius, background=0.35, steps=2)
    assert torch.equal(bools, results[0][0])


@pytest.mark.parametrize("normalize", ["column", "row", "sinkhorn", None])
@pytest.mark.parametrize("window", ["square", "disc"])
def test_gradcheck(normalize, window, device):
    scores = nonnegative(1, 2, 3, 4, device=device).requires_grad_()
    affinity = (nonnegative(1, 12, 12, device=device) + 0.2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s, a: afa_ext.random_walk(s, a, grid=(3, 4), radius=2, window=window, steps=2, normalize=normalize),
        (scores, affinity),
    )


@pytest.mark.parametrize("normalize", ["column", "sinkhorn"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(normalize, dynamic, device):
    def loss(scores, affinity, labels):
        grid = (scores.shape[2], scores.shape[3])
        out = afa_ext.random_walk(scores, affinity, grid=grid, radius=2, normalize=normalize)
        cams = afa_ext.propagate_cams(scores, affinity, labels, radius=2, background=0.35)
        return out.square().sum() + cams.square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for height in (6, 8):
        scores = torch.rand(2, 3, height, 5, device=device, requires_grad=True)
        affinity = torch.rand(2, 5 * height, 5 * height, device=device, requires_grad=True)
        labels = torch.tensor([[1.0, 0.0, 1.0]] * 2, device=device)
        eager, fused = (torch.autograd.grad(f(scores, affinity, labels), (scores, affinity)) for f in (loss, compiled))
        torch.testing.assert_close(fused, eager)


@pytest.mark.parametrize("radius", [None, 2])
def test_autocast(radius, device):
    scores, affinity = torch.rand(1, 2, 4, 4, device=device), torch.rand(1, 16, 16, device=device)
    low = torch.float16 if device == "cuda" else torch.bfloat16
    settings = {"grid": (4, 4), "radius": radius}
    with torch.autocast(device, dtype=low):
        out = afa_ext.random_walk(scores, affinity.to(low), **settings)
        cams = afa_ext.propagate_cams(scores, affinity, torch.ones(1, 2, device=device), radius=radius, background=0.3)
    assert out.dtype == cams.dtype == torch.float32
    torch.testing.assert_close(out, afa_ext.random_walk(scores, affinity.to(low).float(), **settings))
    expected = afa_ext.propagate_cams(scores, affinity, torch.ones(1, 2, device=device), radius=radius, background=0.3)
    torch.testing.assert_close(cams, expected)


def test_threads_change_nothing(threads):
    results = []
    scores, affinity = torch.rand(2, 5, 30, 31), torch.rand(2, 930, 930)
    for count in (1, 2, 3):
        threads(count)
        leaves = scores.clone().requires_grad_(), affinity.clone().requires_grad_()
        out = afa_ext.random_walk(*leaves, grid=(30, 31), radius=4, steps=3)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_window_offsets():
    assert afa_ext.window_offsets(1) == [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    assert afa_ext.window_offsets(0) == [(0, 0)]
    assert afa_ext.window_offsets(2, "disc") == [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    disc = afa_ext.window_offsets(5, "disc")
    assert len(disc) == 69
    assert disc[0] == (-4, -2)
    assert disc == sorted(disc)


S, A = torch.rand(2, 3, 4, 5), torch.rand(2, 20, 20)
G = {"grid": (4, 5)}
L = torch.ones(2, 3)


@pytest.mark.parametrize("module", [afa_ext, reference], ids=["native", "reference"])
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m: m.random_walk(S.numpy(), A, **G),
            TypeError,
            r"scores must be a floating-point tensor \[B, C, h, w\]",
        ),
        (lambda m: m.random_walk(S[0], A, **G), ValueError, r"scores must have 4 dimensions .* got .*\(3, 4, 5\)"),
        (lambda m: m.random_walk(S.int(), A, **G), TypeError, "scores must be float32"),
        (lambda m: m.random_walk(S, A[0], **G), ValueError, "affinity must have 3 dimensions"),
        (lambda m: m.random_walk(S, A[:1], **G), ValueError, r"affinity must have size 2 in dimension 0 \(the batch"),
        (lambda m: m.random_walk(S, A[:, :19], **G), ValueError, "affinity must have size 20 in dimension 1"),
        (
            lambda m: m.random_walk(S, A[..., :9], **G),
            ValueError,
            "affinity must have size 20 in dimension 2 .* needs radius",
        ),
        (
            lambda m: m.random_walk(S, A[..., :9], **G, radius=2),
            ValueError,
            r"size 20 \(dense, h\*w\) or 25 \(the square",
        ),
        (lambda m: m.random_walk(S, A.double(), **G), TypeError, r"affinity must have the type of scores"),
        (lambda m: m.random_walk(S, A.to("meta"), **G), ValueError, "affinity must be on the device of scores"),
        (lambda m: m.random_walk(S, A, grid=20), TypeError, r"grid must be the two sizes \(h, w\), got 20"),
        (lambda m: m.random_walk(S, A, grid=(5, 4)), ValueError, r"scores must have spatial size \(5, 4\)"),
        (lambda m: m.random_walk(S, A, **G, radius=-1), ValueError, "radius must be between 0 and 63, got -1"),
        (lambda m: m.random_walk(S, A, **G, radius=64), ValueError, "radius must be between 0 and 63, got 64"),
        (lambda m: m.random_walk(S, A, **G, radius=1.0), TypeError, "radius must be an integer, got 1.0"),
        (lambda m: m.random_walk(S, A, **G, radius=0, window="disc"), ValueError, "radius must be between 1 and 63"),
        (lambda m: m.random_walk(S, A, **G, window="ring"), ValueError, "window must be one of 'square', 'disc', got"),
        (lambda m: m.random_walk(S, A, **G, power=0), ValueError, "power must be greater than 0, got 0"),
        (lambda m: m.random_walk(S, A, **G, power="2"), TypeError, "power must be a number"),
        (lambda m: m.random_walk(S, A, **G, steps=-1), ValueError, "steps must be at least 0, got -1"),
        (lambda m: m.random_walk(S, A, **G, steps=True), TypeError, "steps must be an integer, got True"),
        (lambda m: m.random_walk(S, A, **G, normalize="l2"), ValueError, "normalize must be one of 'column', 'row'"),
        (lambda m: m.random_walk(S, A, **G, eps=-1.0), ValueError, "eps must be 0 or more, got -1.0"),
        (lambda m: m.propagate_cams(S[0], A, L, radius=1, background=0.3), ValueError, "cams must have 4 dimensions"),
        (
            lambda m: m.propagate_cams(S, A, L[0], radius=1, background=0.3),
            ValueError,
            r"class_labels must be a tensor of shape \(2, 3\)",
        ),
        (
            lambda m: m.propagate_cams(S, A, L.to("meta"), radius=1, background=0.3),
            ValueError,
            "class_labels must be on the device of cams",
        ),
        (lambda m: m.propagate_cams(S, A, L, radius=1, background="low"), TypeError, "background must be a number"),
        (
            lambda m: m.propagate_cams(S, A.double(), L, radius=1, background=0.3),
            TypeError,
            "affinity must have the type of cams",
        ),
        (lambda m: m.propagate_cams(S, A, L, radius=99, background=0.3), ValueError, "radius must be between 0 and 63"),
    ],
)
def test_errors(module, call, error, message):
    with pytest.raises(error, match=message):
        call(module)


T = torch.rand(2, 9, 4, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.walk_transition(A[0], 4, 5, 1, "square", 2.0, True, 0.1), "affinity must have shape"),
        (lambda o: o.walk_transition(A, 4, 4, 1, "square", 2.0, True, 0.1), r"affinity must have shape .*16"),
        (
            lambda o: o.walk_transition(A[..., :8], 4, 5, 1, "square", 2.0, True, 0.1),
            r"affinity must have size 20 \(dense\) or 9",
        ),
        (lambda o: o.walk_transition(A, 4, 5, 64, "square", 2.0, True, 0.1), "radius must be between 0 and 63"),
        (lambda o: o.walk_transition(A, 4, 5, 1, "ring", 2.0, True, 0.1), "window must be 'square' or 'disc'"),
        (lambda o: o.walk_transition(A, 4, 5, 1, "square", -1.0, True, 0.1), "power must be greater than 0"),
        (lambda o: o.walk_transition(A.int(), 4, 5, 1, "square", 2.0, True, 0.1), "affinity must be float32"),
        (lambda o: o.walk_transition_backward(T[:1], A, 4, 5, 1, "square", 2.0, True, 0.1), "grad must have shape"),
        (
            lambda o: o.walk_transition_backward(T.half(), A, 4, 5, 1, "square", 2.0, True, 0.1),
            "grad must have the type",
        ),
        (lambda o: o.walk_transpose(T[:, :8], 1, "square"), "transition must have shape"),
        (lambda o: o.walk_propagate(S[:1], T, 1, "square", 1, None), "scores must have shape"),
        (lambda o: o.walk_propagate(S.double(), T, 1, "square", 1, None), "scores must have the type of transition"),
        (
            lambda o: o.walk_propagate(S, T, 1, "square", 0, None),
            "walk_propagate: the number of steps must be at least 1",
        ),
        (lambda o: o.walk_propagate_backward_scores(S, T, 2, "square", 1, None), "transition must have shape"),
        (lambda o: o.walk_propagate_backward_transition(S[:1], S, T, 1, "square", 1, None), "grad must have shape"),
    ],
)
def test_errors_of_the_operators_themselves(call, message):
    with pytest.raises(RuntimeError, match="^" + message):
        call(torch.ops.afa_ext)
