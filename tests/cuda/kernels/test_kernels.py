"""Every CUDA kernel, run on the CPU, compared with the recorded cases and with the CPU kernels.

tests/afa_ext compares the CPU kernels with the plain-PyTorch references.
"""

from __future__ import annotations

import pytest
import torch

from afa_ext import _native

D6 = [1, 2, 4, 8, 12, 24]
NATIVE = torch.ops.afa_ext
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = pytest.mark.parametrize("dtype", list(LIMITS), ids=str)


def test_pamr_golden(kernels, golden, assert_relative):
    g = golden("pamr_a")
    dilations, size = g["dilations"].tolist(), g["images"].shape[2:]
    masks = torch.nn.functional.interpolate(g["masks"], size=size, mode="bilinear", align_corners=True)
    weights = kernels.pamr_affinity(g["images"], dilations)
    assert_relative(kernels.par_propagate(weights, masks, dilations, g["num_iter"], None), g["out"])


@pytest.mark.parametrize("case", ["par_flat", "par_same_size", "par_small", "par_two_dilations"])
def test_par_golden(case, kernels, golden, assert_relative):
    g = golden(case)
    dilations, num_iter = g["dilations"].tolist(), g["num_iter"]
    weights = kernels.par_affinity(g["images"], dilations, 0.3, 0.01)
    assert_relative(kernels.par_propagate(weights, g["masks"], dilations, num_iter, None), g["out"])
    grad = kernels.par_propagate_backward_masks(g["grad_out"], weights, dilations, num_iter, None)
    assert_relative(grad, g["grad_masks"])


@pytest.mark.parametrize("case", ["walk_square", "walk_train"])
def test_walk_golden(case, kernels, golden, assert_relative):
    g = golden(case)
    height, width = g["cams"].shape[2:]
    transition = kernels.walk_transition(g["affinity"], height, width, g["radius"], "square", 2.0, True, 1e-4)
    out = kernels.walk_propagate(g["cams"], transition, g["radius"], "square", 1, None)
    assert_relative(out, g["plain_windowed"])


@pytest.mark.parametrize("case", ["irn_walk_a"])
def test_irn_golden(case, kernels, golden, assert_relative):
    g = golden(case)
    _, height, width = g["edge"].shape
    planes = kernels.edge_affinity(g["edge"], g["radius"])
    affinity = planes.flatten(2).mT
    transition = kernels.walk_transition(affinity, height, width, g["radius"], "disc", float(g["beta"]), True, 0.0)
    scores = (g["cams"] * (1 - g["edge"]))[None]
    out = kernels.walk_propagate(scores, transition, g["radius"], "disc", 2 ** g["exp_times"], None)
    assert_relative(out[0], g["out"])


def test_affinity_golden(kernels, golden, assert_relative):
    g = golden("affinity")
    nodes = g["affinity"].shape[1]
    affinity = kernels.affinity_from_attention(g["attn"], g["weight"], g["bias"], 1, nodes, None, False)
    assert_relative(affinity, g["affinity"], 1e-6)
    tokens = g["label_map"][:, ::16, ::16].long()
    labels = kernels.affinity_labels(tokens, g["radius"], 255, False, None)
    assert torch.equal(labels, g["aff_label"])
    sums = kernels.affinity_loss(affinity, labels, 0.5, 0.5, 0.0, None)
    assert_relative(sums[0], torch.tensor(g["loss"]), 1e-6)
    grad = kernels.affinity_loss_backward(torch.tensor([1.0] + [0.0] * 9), sums, labels)
    settings = (1, nodes, None, False)
    grad_attention = kernels.affinity_from_attention_backward_attention(grad, affinity, g["weight"], *settings)
    assert_relative(grad_attention, g["grad_attn"], 5e-6)
    grads = kernels.affinity_from_attention_backward_weight(grad, affinity, g["attn"], *settings)
    assert_relative(grads[:-1], g["grad_weight"], 5e-6)
    assert_relative(grads[-1:], g["grad_bias"], 5e-6)


def compare(kernels, name, arguments, limit, assert_relative):
    actual = getattr(kernels, name)(*arguments)
    expected = getattr(NATIVE, name)(*arguments)
    assert actual.dtype == expected.dtype
    assert_relative(actual, expected, limit)
    return expected


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 9, 17), (1, 4, 20, 3), (3, 9, 11, 13)], ids=str)
@pytest.mark.parametrize("dilations", [D6, [1], [3, 40]], ids=str)
def test_par(shape, dilations, dtype, kernels, assert_relative):
    batch, classes, height, width = shape
    images = torch.rand(batch, 3, height, width).to(dtype)
    masks, grad = torch.rand(2, *shape).to(dtype)
    keep = torch.rand(batch, classes) > 0.4
    limit = LIMITS[dtype]
    compare(kernels, "pamr_affinity", (images, dilations), limit, assert_relative)
    weights = compare(kernels, "par_affinity", (images, dilations, 0.3, 0.01), limit, assert_relative)
    for mask in (None, keep):
        settings = (dilations, 3, mask)
        for name, arguments in (
            ("par_propagate", (weights, masks)),
            ("par_propagate_backward_masks", (grad, weights)),
            ("par_propagate_backward_weights", (grad, weights, masks)),
        ):
            compare(kernels, name, (*arguments, *settings), limit, assert_relative)


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("dilations", [D6, [1, 2]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_par_affinity_of_channels(dtype, dilations, channels, kernels, assert_relative):
    images = torch.rand(2, channels, 8, 9, dtype=dtype)
    compare(kernels, "par_affinity", (images, dilations, 0.3, 0.01), LIMITS[dtype], assert_relative)
    compare(kernels, "pamr_affinity", (images, dilations), LIMITS[dtype], assert_relative)


def test_par_affinity_loses_no_small_deviations(kernels, assert_relative):
    """Sums in float32 compared with float64, for an image that is nearly constant except for one step."""
    images = 100 + 1e-2 * torch.rand(1, 3, 9, 60)
    images[..., 30:] += 50
    for name, settings in (("par_affinity", (D6, 0.3, 0.01)), ("pamr_affinity", (D6,))):
        expected = getattr(NATIVE, name)(images.double(), *settings)
        assert_relative(getattr(kernels, name)(images, *settings), expected, 5e-6)
        flat = torch.full_like(images, 0.7)
        expected = getattr(NATIVE, name)(flat.double(), *settings)
        assert_relative(getattr(kernels, name)(flat, *settings), expected, 1e-6)


@DTYPES
@pytest.mark.parametrize(("grid", "radius"), [((1, 1), 2), ((5, 6), 1), ((9, 11), 3), ((4, 5), 9)], ids=str)
@pytest.mark.parametrize("window", ["square", "disc"])
def test_walk(grid, radius, window, dtype, kernels, assert_relative):
    nodes, classes = grid[0] * grid[1], 5
    limit = LIMITS[dtype]
    offsets = NATIVE.walk_transition(torch.rand(1, nodes, nodes), *grid, radius, window, 1.0, False, 0.0).shape[1]
    dense, windowed = torch.rand(2, nodes, nodes).to(dtype), torch.rand(2, nodes, offsets).to(dtype)
    step_scores = torch.rand(2, 11, *grid, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    step_keep = torch.rand(2, 11) > 0.4
    for affinity in (dense, windowed, windowed.mT.contiguous().mT):
        for normalize, mask in ((True, None), (False, step_keep)):
            arguments = (step_scores, affinity, radius, window, 3.0, normalize, 0.01, mask)
            compare(kernels, "walk_step", arguments, limit, assert_relative)
        for power, normalize in ((2.0, True), (1.5, False), (1.5, True), (10.0, True)):
            settings = (*grid, radius, window, power, normalize, 0.01)
            transition = compare(kernels, "walk_transition", (affinity, *settings), limit, assert_relative)
            grad = torch.rand_like(transition)
            compare(kernels, "walk_transition_backward", (grad, affinity, *settings), limit, assert_relative)
        compare(kernels, "walk_transpose", (transition, radius, window), limit, assert_relative)
    scores, grad = torch.rand(2, 2, classes, *grid, dtype=transition.dtype)
    keep = torch.rand(2, classes) > 0.4
    for mask in (None, keep):
        walk = (radius, window, 2, mask)
        for name, tensors in (
            ("walk_propagate", (scores, transition)),
            ("walk_propagate_backward_scores", (grad, transition)),
            ("walk_propagate_backward_transition", (grad, scores, transition)),
        ):
            compare(kernels, name, (*tensors, *walk), max(limit, 1e-10), assert_relative)


def test_walk_transition_is_exact_in_float32(kernels):
    """Columns with large and with the smallest entries sum to 1 within float32 rounding."""
    for scale, power in ((1.0, 2.0), (1e30, 1.0), (1e-30, 1.0), (1e-39, 1.0)):
        affinity = (torch.rand(1, 20 * 21, 20 * 21, dtype=torch.float64) + 0.1) * scale
        settings = (20, 21, 8, "square", power, True, 0.0)
        out = kernels.walk_transition(affinity.float(), *settings)
        assert float((out.double().sum(1) - 1).abs().max()) < 2e-7
        expected = NATIVE.walk_transition(affinity.float().double(), *settings)
        assert float((out - expected).abs().max()) < 1e-7 * float(expected.max())


@DTYPES
@pytest.mark.parametrize(("grid", "radius"), [((1, 1), 2), ((5, 6), 1), ((9, 17), 5), ((4, 5), 9)], ids=str)
def test_window_affinities(grid, radius, dtype, kernels, assert_relative):
    limit = LIMITS[dtype]
    compare(kernels, "edge_affinity", (torch.rand(2, *grid).to(dtype), radius), limit, assert_relative)
    features = torch.randn(2, 11, *grid).to(dtype)
    features[..., ::2] = features[..., :1].clone()
    affinity = compare(kernels, "feature_affinity", (features, radius), limit, assert_relative)
    grad = torch.rand_like(affinity)
    compare(kernels, "feature_affinity_backward", (grad, features, affinity, radius), limit, assert_relative)


def label_arguments(cams, box=None, weights=None, index=None, **changed):
    """Arguments of pseudo_labels: images, CAMs, 0 to 3 classes per image, and settings by name."""
    batch, classes, height, width = cams.shape
    coarse = torch.rand(batch, 3, 4, 5, dtype=torch.float64)
    images = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear") * 255
    present = torch.zeros(batch, classes, dtype=torch.bool)
    for i in range(batch):
        present[i, torch.randperm(classes)[: i % 4]] = True
    given = {
        "low": 0.35,
        "high": 0.55,
        "downscale": 2,
        "dilations": D6,
        "num_iter": 3,
        "w1": 0.3,
        "w2": 0.01,
        "max_classes": 0,
        "ignore_index": 255,
    }
    return (images.byte(), cams, present, index, box, weights, *(given | changed).values())


def test_pseudo_labels_golden(kernels, golden):
    g = golden("pseudo_label")
    settings = (0.35, 0.55, 2, D6, 10, 0.3, 0.01, 0, 255)
    present = g["cls_labels"] != 0
    labels = kernels.pseudo_labels(g["images"], g["cams"], present, None, g["img_box"], None, *settings)
    assert torch.equal(labels, g["refined_label"].long())


@DTYPES
@pytest.mark.parametrize("size", [(1, 1), (9, 17), (20, 24), (16, 33)], ids=str)
def test_pseudo_labels(size, dtype, kernels):
    coarse = torch.rand(4, 5, 4, 4)
    cams = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear").to(dtype)
    name = "pseudo_labels"
    box = torch.tensor([[0, size[0], 0, size[1]], [1, 9, 2, 12], [-2, 99, 3, 16], [4, 9, 9, 4]])
    for arguments in (
        label_arguments(cams),
        label_arguments(cams, box),
        label_arguments(cams, low=0.4, high=0.4, downscale=3),
        label_arguments(cams.mT.contiguous().mT, max_classes=3, downscale=1, num_iter=0),
        label_arguments(cams, box, index=torch.arange(20).view(4, 5) * 3, ignore_index=-7),
    ):
        actual, expected = (getattr(ops, name)(*arguments) for ops in (kernels, NATIVE))
        # Float32 sums differ in their last digits, which can decide a tie differently.
        allowed = 0 if dtype == torch.float64 else 1
        assert int((actual != expected).sum()) <= allowed


def test_pseudo_labels_of_float_images_with_weights(kernels):
    cams = torch.rand(4, 5, 12, 14, dtype=torch.float64)
    weights = NATIVE.par_affinity(torch.rand(4, 3, 6, 7, dtype=torch.float64), D6, 0.3, 0.01)
    images, *rest = label_arguments(cams, weights=weights)
    for given in ((images, *rest), (images / 255, *rest[:4], None, *rest[5:])):
        assert torch.equal(kernels.pseudo_labels(*given), NATIVE.pseudo_labels(*given))


def refine_arguments(scores, low=None, box=None, weights=None, index=None, size=(20, 26), **changed):
    images, _, present, *_ = label_arguments(scores[:, 1:, :1, :1].expand(-1, -1, *size))
    names = {"downscale": 2, "dilations": D6, "num_iter": 3, "w1": 0.3, "w2": 0.01, "max_classes": 0}
    return (images, scores, low, present, index, box, weights, *(names | changed).values(), 255)


@DTYPES
@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (20, 26)], ids=str)
def test_refine_labels(grid, dtype, kernels):
    coarse = torch.rand(2, 4, 6, 4, 4)
    scores, low = torch.nn.functional.interpolate(coarse.flatten(0, 1), size=grid, mode="bilinear").split(4)
    scores, low = scores.to(dtype), low.to(dtype)
    name = "refine_labels"
    box = torch.tensor([[0, 20, 0, 26], [1, 9, 2, 12], [-2, 99, 3, 16], [4, 9, 9, 4]])
    for arguments in (
        refine_arguments(scores, low),
        refine_arguments(scores, low, box),
        refine_arguments(scores, None, box.flip(0), downscale=3),
        refine_arguments(scores.mT.contiguous().mT, low, box, max_classes=3, downscale=1, num_iter=0),
        refine_arguments(scores, low, box[[1, 2, 2, 1]], index=torch.arange(20).view(4, 5) * 3),
    ):
        actual, expected = (getattr(ops, name)(*arguments) for ops in (kernels, NATIVE))
        allowed = 0 if dtype == torch.float64 else 1
        assert int((actual != expected).sum()) <= allowed


def test_refine_labels_golden(kernels, golden):
    g = golden("pseudo_label")
    settings = (2, D6, 10, 0.3, 0.01, 0, 255)
    arguments = (g["images"], g["walk_cams"], None, g["cls_labels"] != 0, None, g["img_box"], None, *settings)
    labels = kernels.refine_labels(*arguments)
    for i, (y0, y1, x0, x1) in enumerate(g["img_box"].tolist()):
        expected = g["refined_walk_cams"][i, :, y0:y1, x0:x1].argmax(0)
        assert int((labels[i, y0:y1, x0:x1] != expected).sum()) <= 1
    weights = NATIVE.par_affinity(torch.rand(2, 3, 32, 40, dtype=torch.float32), D6, 0.3, 0.01)
    arguments = (*arguments[:5], None, weights, *settings)
    assert int((kernels.refine_labels(*arguments) != NATIVE.refine_labels(*arguments)).sum()) <= 1


def test_pseudo_labels_of_many_classes_and_of_a_misaligned_image(kernels):
    cams = torch.rand(3, 290, 8, 16, dtype=torch.float64)
    images, _, present, *rest = label_arguments(cams)
    present[1] = False
    present[1, [0, 127, 128, 289]] = True
    expected = NATIVE.pseudo_labels(images, cams, present, *rest)
    assert torch.equal(kernels.pseudo_labels(images, cams, present, *rest), expected)
    assert torch.equal(kernels.pseudo_labels(misaligned(images), cams, present, *rest), expected)


def test_pseudo_labels_ignores_an_image_with_too_many_classes(kernels):
    arguments = label_arguments(torch.rand(4, 5, 12, 14))  # the last image has three classes
    every = kernels.pseudo_labels(*arguments)
    few = kernels.pseudo_labels(*arguments[:-2], 2, 255)
    assert torch.equal(few[:3], every[:3])
    assert bool((few[3] == 255).all())


@DTYPES
@pytest.mark.parametrize(
    ("grid", "radius"), [((1, 1), 2), ((5, 6), 1), ((9, 11), 3), ((4, 5), 9), ((5, 5), 2), ((3, 40), 2)], ids=str
)
def test_affinity(grid, radius, dtype, kernels, assert_relative):
    nodes, maps = grid[0] * grid[1], 5
    limit = LIMITS[dtype]
    attention = torch.randn(2, maps, nodes, nodes).to(dtype)
    weight, bias = (torch.randn(maps) / 2).to(dtype), torch.randn(1).to(dtype)
    tokens = torch.randint(0, 3, (2, *grid))
    for layout in ((None, False), (radius, True), (radius, False)):
        settings = (*grid, *layout)
        affinity = compare(
            kernels, "affinity_from_attention", (attention, weight, bias, *settings), limit, assert_relative
        )
        grad = torch.rand_like(affinity)
        arguments = (grad, affinity, weight, *settings)
        compare(kernels, "affinity_from_attention_backward_attention", arguments, limit, assert_relative)
        arguments = (grad, affinity, attention, *settings)
        compare(kernels, "affinity_from_attention_backward_weight", arguments, max(limit, 1e-10), assert_relative)
        labels = torch.randint(0, 4, affinity.shape, dtype=torch.uint8)
        counts = torch.tensor([700, 900, 800])
        for settings in ((0.5, 0.5, 0.0, None), (0.5, 0.2, 0.3, counts)):
            sums = compare(kernels, "affinity_loss", (affinity, labels, *settings), 1e-6, assert_relative)
        grad = torch.rand_like(sums)
        compare(kernels, "affinity_loss_backward", (grad, sums, labels), 1e-6, assert_relative)
        for background in (None, 0):
            arguments = (tokens, radius, 2, layout[1], background)
            compare(kernels, "affinity_labels", arguments, 0, assert_relative)


def misaligned(t):
    """The same values, starting one element after an address that vector accesses could use."""
    view = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
    return view.copy_(t)


@DTYPES
@pytest.mark.parametrize("layout", [(None, False), (2, True)], ids=str)
def test_affinity_of_misaligned_tensors(layout, dtype, kernels, assert_relative):
    grid, maps, limit = (6, 8), 3, LIMITS[dtype]
    attention = misaligned(torch.randn(2, maps, 48, 48).to(dtype))
    weight, bias = (torch.randn(maps) / 2).to(dtype), torch.randn(1).to(dtype)
    settings = (*grid, *layout)
    arguments = (attention, weight, bias, *settings)
    affinity = compare(kernels, "affinity_from_attention", arguments, limit, assert_relative)
    grad = torch.rand_like(affinity)
    for pair in ((misaligned(grad), affinity), (grad, misaligned(affinity))):
        name = "affinity_from_attention_backward_attention"
        compare(kernels, name, (*pair, weight, *settings), limit, assert_relative)
        for read in (attention, attention.clone()):
            name = "affinity_from_attention_backward_weight"
            compare(kernels, name, (*pair, read, *settings), limit, assert_relative)
    labels = torch.randint(0, 3, affinity.shape, dtype=torch.uint8)
    weights = (0.5, 0.2, 0.3, None)
    sums = compare(kernels, "affinity_loss", (misaligned(affinity), labels, *weights), 1e-6, assert_relative)
    compare(kernels, "affinity_loss", (affinity, misaligned(labels), *weights), 1e-6, assert_relative)
    compare(kernels, "affinity_loss_backward", (torch.rand_like(sums), sums, misaligned(labels)), 1e-6, assert_relative)


def test_affinity_ignores_entries_outside_the_window(kernels, assert_relative):
    grid, radius = (5, 8), 1  # vectors of four cross the window's border
    attention = torch.randn(1, 3, 40, 40)
    settings, weight, bias = (*grid, radius, True), torch.randn(3), torch.randn(1)
    affinity = kernels.affinity_from_attention(attention, weight, bias, *settings)
    grad = torch.rand_like(affinity)
    expected = kernels.affinity_from_attention_backward_weight(grad, affinity, attention, *settings)
    y, x = torch.arange(40) // grid[1], torch.arange(40) % grid[1]
    outside = ((y[:, None] - y).abs() > radius) | ((x[:, None] - x).abs() > radius)
    attention[:, :, outside] = torch.nan
    assert torch.equal(kernels.affinity_from_attention(attention, weight, bias, *settings), affinity)
    actual = kernels.affinity_from_attention_backward_weight(grad, affinity, attention, *settings)
    assert_relative(actual, expected, 1e-6)


def test_affinity_loss_of_many_blocks_and_of_no_pairs(kernels, assert_relative):
    affinity, labels = torch.rand(40_000, dtype=torch.float64), torch.randint(0, 3, (40_000,), dtype=torch.uint8)
    for count in (40_000, 0):
        arguments = (affinity[:count], labels[:count], 0.5, 0.2, 0.3, None)
        compare(kernels, "affinity_loss", arguments, 1e-12, assert_relative)


def lattices(kernels, features):
    """By the CUDA kernels and by the CPU kernels: vertices are numbered differently. What the vertices leave over of a
    buffer is filled, so that the orders of threads can be compared."""
    torch.use_deterministic_algorithms(True)
    try:
        name = "lattice_build"
        return getattr(kernels, name)(features), getattr(NATIVE, name)(features)
    finally:
        torch.use_deterministic_algorithms(False)


@DTYPES
@pytest.mark.parametrize("dims", [1, 2, 3, 4, 5, 6])
def test_lattice_filter(dims, dtype, kernels, assert_relative):
    features = 2 * torch.randn(2, dims, 7, 19)
    features[1] = 0.7  # flat: every pixel in one simplex
    own, native = lattices(kernels, features)
    assert torch.equal(own[:, 0], native[:, 0])  # as many vertices
    values = torch.rand(2, 35, 7, 19).to(dtype)
    for settings in ((dims, "none", False), (dims, "symmetric", True), (dims, "before", False), (dims, "after", True)):
        name = "lattice_filter"
        actual, expected = (
            getattr(kernels, name)(values, own, *settings),
            getattr(NATIVE, name)(values, native, *settings),
        )
        # A lattice's norms are float32, and summed in another order.
        limit = LIMITS[dtype] if settings[1] == "none" else max(LIMITS[dtype], 1e-6)
        assert_relative(actual, expected, limit)


def test_lattice_of_more_pixels_than_a_tile_sorts(kernels, assert_relative):
    features = torch.randn(2, 5, 30, 57)  # 10,260 corners, in six tiles
    features[1] = 0.7  # flat: 1,710 pixels in one simplex
    own, native = lattices(kernels, features)
    values = torch.rand(2, 2, 30, 57)
    actual = kernels.lattice_filter(values, own, 5, "symmetric", False)
    assert_relative(actual, NATIVE.lattice_filter(values, native, 5, "symmetric", False), 1e-5)


def test_lattice_clamps_features_out_of_range(kernels):
    features = torch.randn(1, 5, 4, 5)
    features[0, 0, 0, 0], features[0, 1, 1, 1], features[0, 2, 2, 2] = torch.nan, torch.inf, 1e30
    torch.use_deterministic_algorithms(True)
    try:
        own = kernels.lattice_build(features)
    finally:
        torch.use_deterministic_algorithms(False)
    assert 0 < int(own[0, 0]) <= 20 * 6


@DTYPES
@pytest.mark.parametrize(("size", "spread"), [((1, 1), 3), ((5, 13), 3), ((5, 13), 100)], ids=str)
def test_mean_field(size, spread, dtype, kernels):
    colors = spread * torch.rand(2, 5, *size)
    positions = torch.stack(torch.meshgrid(*(torch.arange(n) / 3 for n in size), indexing="ij"))[None]
    smooth, edges = lattices(kernels, positions), lattices(kernels, colors)
    vertices, room = smooth[0][:, 0] + edges[0][:, 0], 6 * size[0] * size[1]
    assert bool((vertices <= room).all()) == (size[0] > 1 and spread == 3)  # whether both lattices fit into the tables
    scores, keep = torch.rand(2, 33, *size).to(dtype), torch.rand(2, 33) > 0.3
    for rest in (
        (3.0, 4.0, None, None, True, 3),
        (3.0, 0.0, None, keep, True, 1),
        (0.5, 1.0, torch.randn(33, 33), keep, False, 2),
        (0.0, 0.0, None, None, False, 2),
    ):
        name = "mean_field"
        actual = getattr(kernels, name)(scores, smooth[0], edges[0], *rest)
        expected = getattr(NATIVE, name)(scores, smooth[1], edges[1], *rest)
        assert float((actual - expected).abs().max()) < 2e-5


def test_every_operator_is_compared(kernels):
    with open(__file__, encoding="utf-8") as source:
        text = source.read()
    for name in _native._C.operators():
        assert hasattr(kernels, name)
        assert f'"{name}"' in text, f"{name} has no comparison"
