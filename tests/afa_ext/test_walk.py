from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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


@pytest.mark.parametrize("case", ["irn_walk_a"])
def test_golden_irn(case, golden, assert_relative, device):
    g = golden(case)
    cams, edge, out = g["cams"].to(device), g["edge"].to(device), g["out"]
    settings = {"radius": g["radius"], "beta": g["beta"], "exp_times": g["exp_times"]}
    for module in (afa_ext, reference):
        walked = module.propagate_to_edge(cams, edge, **settings)
        assert_relative(walked, out[:, None], 1e-5)
        assert torch.equal(module.propagate_to_edge(cams[:, None], edge, **settings), walked)
        batch = module.propagate_to_edge(torch.stack([cams, cams.flip(0)]), edge.expand(2, 1, -1, -1), **settings)
        assert_relative(batch[0], out, 1e-5)
        assert_relative(batch[1], out.flip(0), 1e-5)


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

    def assert_gradient(actual, expected):
        if min(nodes, len(afa_ext.window_offsets(radius, window))) == 1:
            # A P of one entry a node is constant up to powers of eps: so near 0, only absolute errors tell.
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
        else:
            assert_relative(actual, expected, 1e-9)

    for actual, expected in zip(results[0][:2], results[1][:2], strict=True):
        assert_relative(actual, expected, 1e-9)
    assert_gradient(results[0][2], results[1][2])

    windowed = to_windowed(dense.detach(), grid, radius, window)
    if windowed.shape[2] != nodes:
        # The native operators never read what leaves the grid: NaN there changes nothing.
        leaf = windowed.clone().requires_grad_()
        out = afa_ext.random_walk(scores, leaf, **settings)
        assert_relative(out, results[1][0], 1e-9)
        (grad,) = torch.autograd.grad((out * pull).sum(), leaf)
        expected = to_windowed(results[1][2], grid, radius, window).nan_to_num(0)
        assert_gradient(grad.nan_to_num(0), expected)
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


def test_column_normalized_walk_keeps_a_constant_map(device):
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
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
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
    edge, features = torch.rand(2, 30, 31), torch.randn(2, 70, 30, 31)
    for count in (1, 2, 3):
        threads(count)
        leaves = scores.clone().requires_grad_(), affinity.clone().requires_grad_()
        result = []
        for steps in (1, 3):
            out = afa_ext.random_walk(*leaves, grid=(30, 31), radius=4, steps=steps)
            result += [out, *torch.autograd.grad(out.square().sum(), leaves)]
        leaf = features.clone().requires_grad_()
        similar = afa_ext.feature_affinity(leaf, 4)
        result += [similar, *torch.autograd.grad(similar.square().sum(), leaf), afa_ext.edge_affinity(edge, 4)]
        results.append(result)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (7, 3), (6, 8), (5, 33)], ids=str)
@pytest.mark.parametrize(("window", "radius"), [("square", 0), ("square", 2), ("disc", 1), ("disc", 4), ("disc", 9)])
@pytest.mark.parametrize("normalize", ["column", None])
def test_single_step(grid, window, radius, normalize, assert_relative, device):
    """The fused step: dense and windowed, any number of classes, absent classes, no entry outside the window."""
    nodes = grid[0] * grid[1]
    dense = nonnegative(2, nodes, nodes, device=device)
    settings = {"grid": grid, "radius": radius, "window": window, "normalize": normalize, "power": 3}
    inside = reference.walk.window_mask(grid, radius, window, torch.device(device))
    windowed = to_windowed(dense, grid, radius, window)
    affinities = [dense.masked_fill(~inside, float("nan"))]
    if windowed.shape[2] != nodes:
        affinities += [windowed, windowed.mT.contiguous().mT]
    for classes in (1, 5, 12, 13, 29):
        scores = nonnegative(2, classes, *grid, device=device)
        present = torch.rand(2, classes, device=device) > 0.5
        expected = reference.random_walk(scores, dense, **settings)
        for affinity in affinities:
            assert_relative(afa_ext.random_walk(scores, affinity, **settings), expected, 1e-12)
            single = afa_ext.random_walk(scores.float(), affinity.float(), **settings)
            assert_relative(single, expected, 3e-6)
            options = (radius, window, 3.0, normalize == "column", 1e-4, present)
            masked = torch.ops.afa_ext.walk_step(scores, affinity, *options)
            assert not masked[~present].any()
            assert_relative(masked[present], expected[present], 1e-12)


@pytest.mark.parametrize("radius", [None, 3])
@pytest.mark.parametrize("several", [False, True])
def test_clip_walk_as_published(radius, several, assert_relative, device):
    """The CLIP-based methods literally: three rounds, symmetrized, squared, columns outside the boxes zeroed."""
    height, width, classes = 6, 7, 3
    attention = nonnegative(2, 42, 42, device=device) + 0.01
    scores = nonnegative(2, classes, height, width, device=device)
    low = torch.randint(0, 4, (2, classes, 2, 2), device=device)
    boxes = torch.cat([low, low + torch.randint(0, 5, low.shape, device=device)], dim=3)  # some are empty
    if not several:
        boxes = boxes[:, :, 0]
    inside = torch.ones(42, 42, dtype=torch.bool, device=device)
    if radius is not None:
        inside = reference.walk.window_mask((height, width), radius, "square", torch.device(device))
    expected = torch.zeros_like(scores)
    for b in range(2):
        trans = attention[b] * inside
        for _ in range(3):
            trans = trans / trans.sum(dim=0, keepdim=True)
            trans = trans / trans.sum(dim=1, keepdim=True)
        trans = (trans + trans.T) / 2
        trans = trans @ trans
        for c in range(classes):
            mask = torch.zeros(height, width, dtype=trans.dtype, device=device)
            for x0, y0, x1, y1 in boxes[b, c].view(-1, 4).tolist():
                mask[y0:y1, x0:x1] = 1
            expected[b, c] = ((trans * mask.view(1, -1)) @ scores[b, c].view(-1, 1)).view(height, width)
    settings = {"grid": (height, width), "radius": radius, "power": 1, "steps": 2, "normalize": "sinkhorn", "eps": 0}
    for module in (afa_ext, reference):
        for index_type in (torch.int64, torch.int32):
            out = module.random_walk(scores, attention, direction="rows", boxes=boxes.to(index_type), **settings)
            assert_relative(out, expected, 1e-12)


@pytest.mark.parametrize("radius", [None, 2])
@pytest.mark.parametrize("normalize", ["column", "row", "sinkhorn", None])
def test_directions_and_boxes_match_reference(radius, normalize, assert_relative, device):
    scores = nonnegative(2, 3, 4, 6, device=device).requires_grad_()
    affinity = (nonnegative(2, 24, 24, device=device) + 0.1).requires_grad_()
    boxes = torch.tensor([[1, 0, 4, 3], [0, 0, 6, 4], [2, 2, 2, 4]], device=device).expand(2, -1, -1)
    for direction in ("columns", "rows"):
        for steps in (0, 1, 2):
            options = {"grid": (4, 6), "radius": radius, "normalize": normalize, "direction": direction, "steps": steps}
            results = []
            for module in (afa_ext, reference):
                out = module.random_walk(scores, affinity, boxes=boxes, **options)
                pull = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=device).view_as(out)
                grads = torch.autograd.grad((out * pull).sum(), (scores, affinity), materialize_grads=True)
                results.append([out, *grads])
            for actual, expected in zip(*results, strict=True):
                assert_relative(actual, expected, 1e-10)


def test_rows_without_normalization_multiply_from_the_left(device):
    scores, affinity = nonnegative(2, 3, 4, 5, device=device), nonnegative(2, 20, 20, device=device)
    out = afa_ext.random_walk(scores, affinity, grid=(4, 5), power=1, normalize=None, direction="rows")  # MCTformer
    torch.testing.assert_close(out, torch.einsum("bij,bcj->bci", affinity, scores.flatten(2)).view_as(scores))


@st.composite
def walks(draw):
    """scores [1, C, h, w] and a dense affinity with entries of at least 0.05, float64, with a radius and a window."""
    height, width, classes = (draw(st.integers(1, limit)) for limit in (6, 6, 4))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    scores = torch.rand(1, classes, height, width, dtype=torch.float64)
    affinity = torch.rand(1, height * width, height * width, dtype=torch.float64) + 0.05
    return scores, affinity, draw(st.integers(1, 4)), draw(st.sampled_from(["square", "disc"]))


PROPERTY = settings(derandomize=True, max_examples=25, deadline=None)


@PROPERTY
@given(walks(), st.sampled_from([1, 2, 8]), st.floats(0, 1))
def test_columns_of_the_transition_sum_to_one(device, walk, power, eps):
    scores, affinity, radius, window = walk
    scores, affinity = scores.to(device), affinity.to(device)
    _, _, height, width = scores.shape
    p = torch.ops.afa_ext.walk_transition(affinity, height, width, radius, window, float(power), True, eps)
    raw = torch.ops.afa_ext.walk_transition(affinity, height, width, radius, window, float(power), False, eps)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(dim=1), 1 - eps / (raw.sum(dim=1) + eps))


@PROPERTY
@given(walks(), st.integers(1, 5), st.floats(-2, 2))
def test_constant_scores_stay(device, walk, steps, value):
    """Where a node takes a mean of others: over its column for scores @ P, over its row for P @ scores."""
    scores, affinity, radius, window = walk
    scores, affinity = scores.to(device), affinity.to(device)
    constant = torch.full_like(scores, value)
    options = {"grid": tuple(scores.shape[2:]), "window": window, "steps": steps, "eps": 0.0}
    for normalize, direction in (("column", "columns"), ("row", "rows")):
        for r in (radius, None):
            out = afa_ext.random_walk(constant, affinity, radius=r, normalize=normalize, direction=direction, **options)
            torch.testing.assert_close(out, constant)


@PROPERTY
@given(walks(), st.integers(0, 3), st.sampled_from(["column", "row", "sinkhorn", None]))
def test_windowed_is_dense_and_steps_are_squarings(device, walk, times, normalize):
    scores, affinity, radius, window = walk
    scores, affinity = scores.to(device), affinity.to(device)
    grid = tuple(scores.shape[2:])
    options = {"grid": grid, "window": window, "normalize": normalize, "power": 3, "steps": 2**times}
    inside = reference.walk.window_mask(grid, radius, window, scores.device)
    p = reference.walk.transition_matrix(affinity, 3, normalize, 1e-4, inside)
    for _ in range(times):
        p = p @ p
    expected = (scores.flatten(2) @ p).view_as(scores)
    windowed = to_windowed(affinity, grid, radius, window)
    for given_affinity, r in ((affinity, radius), (windowed, radius), (affinity * inside, None)):
        out = afa_ext.random_walk(scores, given_affinity, radius=r, **options)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-13)


@PROPERTY
@given(walks(), st.integers(1, 3), st.randoms(use_true_random=False))
def test_order_of_the_maps_does_not_matter(device, walk, steps, random):
    scores, affinity, radius, window = walk
    scores, affinity = scores.to(device), affinity.to(device)
    order = list(range(scores.shape[1]))
    random.shuffle(order)
    options = {"grid": tuple(scores.shape[2:]), "radius": radius, "window": window, "steps": steps}
    out = afa_ext.random_walk(scores, affinity, **options)
    assert torch.equal(afa_ext.random_walk(scores[:, order], affinity, **options), out[:, order])


S, A = torch.rand(2, 3, 4, 5), torch.rand(2, 20, 20)
T = torch.rand(2, 9, 4, 5)
E, F = torch.rand(2, 1, 4, 5), torch.rand(2, 6, 4, 5)
BOXES = torch.zeros(2, 3, 4, dtype=torch.int64)
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
        (
            lambda m: m.random_walk(S, A, **G, direction="left"),
            ValueError,
            "direction must be one of 'columns', 'rows'",
        ),
        (lambda m: m.random_walk(S, A, **G, boxes=[0, 0, 1, 1]), TypeError, "boxes must be an int64 or int32 tensor"),
        (
            lambda m: m.random_walk(S, A, **G, boxes=BOXES.float()),
            TypeError,
            r"boxes must be an int64 .* torch.float32",
        ),
        (
            lambda m: m.random_walk(S, A, **G, boxes=BOXES[:, :2]),
            ValueError,
            r"boxes must have shape \(2, 3, 4\) or \(2, 3, M, 4\) .* got \(2, 2, 4\)",
        ),
        (lambda m: m.random_walk(S, A, **G, boxes=BOXES[..., :3]), ValueError, r"boxes must have shape .*\(2, 3, 3\)"),
        (lambda m: m.random_walk(S, A, **G, boxes=BOXES[0]), ValueError, r"boxes must have shape .* got \(3, 4\)"),
        (
            lambda m: m.random_walk(S, A, **G, boxes=BOXES.to("meta")),
            ValueError,
            "boxes must be on the device of scores",
        ),
        (lambda m: m.edge_affinity(E.numpy(), 5), TypeError, r"edge must be a floating-point tensor \[B, h, w\]"),
        (lambda m: m.edge_affinity(E[0, 0], 5), ValueError, r"edge must have 3 dimensions \[B, h, w\], got .*\(4, 5\)"),
        (lambda m: m.edge_affinity(E.expand(2, 2, 4, 5), 5), ValueError, "edge must have size 1 in dimension 1"),
        (lambda m: m.edge_affinity(E.int(), 5), TypeError, "edge must be float32"),
        (lambda m: m.edge_affinity(E, 0), ValueError, "radius must be between 1 and 63, got 0"),
        (lambda m: m.edge_affinity(E, 64), ValueError, "radius must be between 1 and 63, got 64"),
        (lambda m: m.edge_affinity(E, 5.0), TypeError, "radius must be an integer, got 5.0"),
        (lambda m: m.feature_affinity(F[0], 5), ValueError, r"features must have 4 dimensions \[B, C, h, w\]"),
        (lambda m: m.feature_affinity(F.int(), 5), TypeError, "features must be float32"),
        (lambda m: m.feature_affinity(F[:, :0], 5), ValueError, "features must have at least one channel"),
        (lambda m: m.feature_affinity(F, 0), ValueError, "radius must be between 1 and 63, got 0"),
        (lambda m: m.propagate_to_edge(S[0, 0], E[0]), ValueError, r"x must have 3 dimensions \[C, h, w\]"),
        (lambda m: m.propagate_to_edge(S[0], E[0, 0]), ValueError, r"edge must have 3 dimensions \[1, h, w\]"),
        (lambda m: m.propagate_to_edge(S[0], E[:, 0]), ValueError, r"edge must have size 1 in dimension 0 \(one bound"),
        (lambda m: m.propagate_to_edge(S, E.expand(2, 3, 4, 5)), ValueError, "edge must have size 1 in dimension 1"),
        (lambda m: m.propagate_to_edge(S[0], E), ValueError, r"x must have 4 dimensions \[B, C, h, w\]"),
        (
            lambda m: m.propagate_to_edge(S[:1], E),
            ValueError,
            r"x must have size 2 in dimension 0 \(the batch of edge\)",
        ),
        (
            lambda m: m.propagate_to_edge(S[0, :, 1:], E[0]),
            ValueError,
            r"x must have size 4 in dimension -2 \(the height",
        ),
        (
            lambda m: m.propagate_to_edge(S[0, ..., 1:], E[0]),
            ValueError,
            r"x must have size 5 in dimension -1 \(the wid",
        ),
        (lambda m: m.propagate_to_edge(S[0].int(), E[0]), TypeError, "x must be float32"),
        (lambda m: m.propagate_to_edge(S[0], E[0].double()), TypeError, "edge must have the type of x"),
        (lambda m: m.propagate_to_edge(S[0], E[0].to("meta")), ValueError, "edge must be on the device of x"),
        (lambda m: m.propagate_to_edge(S[0], E[0], radius=0), ValueError, "radius must be between 1 and 63, got 0"),
        (lambda m: m.propagate_to_edge(S[0], E[0], beta=0), ValueError, "beta must be greater than 0, got 0"),
        (lambda m: m.propagate_to_edge(S[0], E[0], exp_times=-1), ValueError, "exp_times must be between 0 and 30"),
    ],
)
def test_errors(module, call, error, message):
    with pytest.raises(error, match=message):
        call(module)


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
        (lambda o: o.walk_step(S[0], A, 1, "square", 2.0, True, 0.1, None), "scores must have shape"),
        (lambda o: o.walk_step(S[:1], A, 1, "square", 2.0, True, 0.1, None), "scores must have shape .*, got"),
        (lambda o: o.walk_step(S, A[:, 1:], 1, "square", 2.0, True, 0.1, None), "affinity must have shape"),
        (
            lambda o: o.walk_step(S.double(), A, 1, "square", 2.0, True, 0.1, None),
            r"scores must have the type of the transition \(float32\), got float64",
        ),
        (lambda o: o.walk_step(S, A, 1, "square", 0.0, True, 0.1, None), "power must be greater than 0"),
        (lambda o: o.walk_step(S, A, 1, "square", 2.0, True, 0.1, L[0] > 0), "class_mask must have shape"),
        (lambda o: o.walk_step(S, A, 1, "square", 2.0, True, 0.1, L), "class_mask must be bool, got float32"),
        (lambda o: o.edge_affinity(E, 2), "edge must have shape"),
        (lambda o: o.edge_affinity(E[:, 0].int(), 2), "edge must be float32"),
        (lambda o: o.edge_affinity(E[:, 0], 0), "radius must be between 1 and 63"),
        (lambda o: o.feature_affinity(F[0], 2), "features must have shape"),
        (lambda o: o.feature_affinity(F.int(), 2), "features must be float32"),
        (lambda o: o.feature_affinity(F[:, :0], 2), "features must have at least one channel"),
        (lambda o: o.feature_affinity(F, 64), "radius must be between 1 and 63"),
        (lambda o: o.feature_affinity_backward(T[:, :8], F, T, 2), "grad must have shape"),
        (lambda o: o.feature_affinity_backward(T, F, T[:, :8], 2), "affinity must have shape"),
        (lambda o: o.feature_affinity_backward(T.double(), F, T, 2), "grad must have the type of features"),
        (lambda o: o.walk_propagate_backward_transition(S[:1], S, T, 1, "square", 1, None), "grad must have shape"),
    ],
)
def test_errors_of_the_operators_themselves(call, message):
    with pytest.raises(RuntimeError, match="^" + message):
        call(torch.ops.afa_ext)
