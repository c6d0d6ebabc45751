from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import afa_ext
from afa_ext import reference
from afa_ext.reference.labels import refined_scores, shrink

D6 = afa_ext.par.DILATIONS


def smooth(batch, channels, height, width, generator=None, coarse=4):
    """Maps in [0, 1] that vary slowly, as CAMs and photographs do."""
    small = torch.rand(batch, channels, coarse, coarse + 1, generator=generator)
    return F.interpolate(small, size=(height, width), mode="bicubic", align_corners=True).clamp(0, 1)


def case(batch=3, classes=6, height=37, width=45, seed=0, device="cpu"):
    """uint8 images with a little noise, CAMs, class labels with 0, 1 and several classes per image."""
    generator = torch.Generator().manual_seed(seed)
    images = smooth(batch, 3, height, width, generator, 6)
    images = (images + 0.03 * torch.rand(images.shape, generator=generator)).clamp(0, 1)
    labels = (torch.rand(batch, classes, generator=generator) < 0.4).float()
    if batch > 2 and classes > 2:
        labels[:3] = 0
        labels[1, 2] = 1
        labels[2, :3] = 1
    cams = smooth(batch, classes, height, width, generator)
    return images.mul(255).byte().to(device), cams.to(device), labels.to(device)


def assert_equal_but_for_ties(actual, expected, images, cams, class_labels, low=0.35, high=0.55, gap=2e-5, **options):
    """Where labels differ, the two best refined scores in float64, with the low or the high background, must be equal
    within `gap`; few labels may differ."""
    different = (actual != expected).cpu()
    assert different.float().mean() < 1e-3 or different.sum() <= 1
    for i in different.flatten(1).any(1).nonzero()[:, 0].tolist():
        colors = images[i : i + 1].double() / (255 if images.dtype == torch.uint8 else 1)
        maps = cams[i : i + 1, class_labels[i] != 0].double()
        tie = torch.zeros_like(different[i])
        for background in (low, high):
            best = refined_scores(colors, maps, background, **options)[0].topk(2, dim=0).values.cpu()
            tie |= best[0] - best[1] < gap
        assert bool(tie[different[i]].all()), f"image {i}: a label differs where scores do not tie"


def test_golden(golden, device):
    g = {name: value.to(device) for name, value in golden("pseudo_label").items()}
    inputs = g["images"], g["cams"], g["cls_labels"]
    for implementation in (afa_ext, reference):
        labels = implementation.pseudo_labels(*inputs, box=g["img_box"])
        assert labels.dtype == torch.int64
        assert torch.equal(labels, g["refined_label"].long())
        # Without PAR and at full size, the result is the plain CAM label.
        plain = implementation.pseudo_labels(*inputs, box=g["img_box"], num_iter=0, downscale=1)
        assert torch.equal(plain, g["cam_label"].long())
        single = implementation.pseudo_labels(*inputs, low=0.45, high=0.45, num_iter=0, downscale=1)
        assert torch.equal(single, g["cam_label_nobox"].long())


# Widths around the vector lengths, odd sizes, one pixel; downscales that divide the size and that don't.
SHAPES = [(1, 1, 1, 1), (1, 2, 1, 7), (2, 3, 9, 2), (3, 6, 37, 45), (3, 6, 32, 64), (2, 4, 18, 33), (1, 20, 24, 130)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("downscale", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_matches_reference(shape: tuple[int, int, int, int], downscale, dtype, device):
    batch, _, height, width = shape
    images, cams, class_labels = case(*shape, device=device)
    cams = cams.to(dtype)
    box = torch.tensor([[0, height, 0, width], [1, height - 1, 2, width - 1], [-3, 99, 5, 5]], device=device)[:batch]
    for options in (
        {"downscale": downscale},
        {"downscale": downscale, "dilations": (1, 3), "num_iter": 2, "w1": 0.5, "w2": 0.2, "low": 0.2, "high": 0.2},
        {"downscale": downscale, "num_iter": 0, "low": 0.3, "high": 0.6},
    ):
        actual = afa_ext.pseudo_labels(images, cams, class_labels, box=box, **options)
        expected = reference.pseudo_labels(images, cams, class_labels, box=box, **options)
        assert actual.dtype == torch.int64
        if dtype == torch.float64:
            assert torch.equal(actual, expected)
        assert_equal_but_for_ties(actual, expected, images, cams, class_labels, **options)


def test_cases_contain_every_kind_of_label():
    images, cams, class_labels = case()
    labels = afa_ext.pseudo_labels(images, cams, class_labels)
    assert labels.unique().tolist() == [0, 1, 2, 3, 255]
    assert not labels[0].any(), "an image without classes is background"
    assert labels[1].unique().tolist() == [0, 3, 255]


def test_all_classes_present(device):
    images, cams, _ = case(classes=20, device=device)
    every = torch.ones(3, 20, device=device)
    actual = afa_ext.pseudo_labels(images, cams, every)
    assert_equal_but_for_ties(actual, reference.pseudo_labels(images, cams, every), images, cams, every)
    assert len(actual.unique()) > 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_cams_are_computed_in_float32(dtype, device):
    images, cams, class_labels = case(device=device)
    actual = afa_ext.pseudo_labels(images, cams.to(dtype), class_labels)
    wide = afa_ext.pseudo_labels(images, cams.to(dtype).float(), class_labels)
    assert torch.equal(actual, wide)
    expected = reference.pseudo_labels(images, cams.to(dtype), class_labels)
    assert_equal_but_for_ties(actual, expected, images, cams.to(dtype), class_labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_images_of_every_type(dtype, device):
    images, cams, class_labels = case(device=device)
    images = (images.float() / 255).to(dtype)
    actual = afa_ext.pseudo_labels(images, cams, class_labels)
    expected = reference.pseudo_labels(images, cams, class_labels)
    assert_equal_but_for_ties(actual, expected, images, cams, class_labels)


def test_layouts(device):
    images, cams, class_labels = case(device=device)
    expected = afa_ext.pseudo_labels(images, cams, class_labels)
    channels_last = [t.to(memory_format=torch.channels_last) for t in (images, cams)]
    transposed = [t.mT.contiguous().mT for t in (images, cams)]
    sliced = [torch.cat([t, t], 3)[..., :45] for t in (images, cams)]
    rows = [torch.cat([t, t], 2)[:, :, :37] for t in (images, cams)]
    for image, cam in (channels_last, transposed, sliced, rows):
        assert not (image.is_contiguous() or cam.is_contiguous())
        assert torch.equal(afa_ext.pseudo_labels(image, cam, class_labels.mT.contiguous().mT), expected)
        low = afa_ext.pseudo_labels(image, cam.half(), class_labels)
        assert torch.equal(low, afa_ext.pseudo_labels(images, cams.half(), class_labels))
    shared = cams[:1].expand(3, -1, -1, -1)
    assert torch.equal(
        afa_ext.pseudo_labels(images, shared, class_labels),
        afa_ext.pseudo_labels(images, shared.clone(), class_labels),
    )


@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (2, 0, 8, 8), (2, 4, 0, 8), (2, 4, 8, 0)], ids=str)
def test_empty(shape, device):
    batch, classes, height, width = shape
    images = torch.zeros(batch, 3, height, width, dtype=torch.uint8, device=device)
    for implementation in (afa_ext, reference):
        labels = implementation.pseudo_labels(
            images, torch.rand(shape, device=device), torch.ones(batch, classes, device=device)
        )
        assert labels.shape == (batch, height, width)
        assert labels.dtype == torch.int64
        assert not labels.any()


def test_a_batch_equals_its_images_one_by_one(device):
    images, cams, class_labels = case(device=device)
    box = torch.tensor([[0, 37, 0, 45], [3, 30, 0, 40], [0, 20, 7, 45]], device=device, dtype=torch.int32)
    whole = afa_ext.pseudo_labels(images, cams, class_labels, box=box)
    for i in range(3):
        one = slice(i, i + 1)
        alone = afa_ext.pseudo_labels(images[one], cams[one], class_labels[one], box=box[one])
        assert torch.equal(alone[0], whole[i])


def test_given_weights_are_used(device):
    images, cams, class_labels = case(device=device)
    several: tuple[dict[str, Any], ...] = ({}, {"dilations": (1, 4), "w2": 0.1, "downscale": 3})
    for options in several:
        par = {key: value for key, value in options.items() if key != "downscale"}
        weights = afa_ext.par_affinity(shrink(images / 255, options.get("downscale", 2)), **par)
        expected = afa_ext.pseudo_labels(images, cams, class_labels, **options)
        for implementation in (afa_ext, reference):
            labels = implementation.pseudo_labels(
                torch.zeros_like(images), cams, class_labels, weights=weights, **options
            )
            assert_equal_but_for_ties(labels, expected, images, cams, class_labels, **options)


def test_class_index_of_packed_maps(device):
    """Maps packed to the left, as in training, give the labels of the full set."""
    images, cams, class_labels = case(device=device)
    expected = afa_ext.pseudo_labels(images, cams, class_labels)
    index = class_labels.argsort(dim=1, descending=True, stable=True)[:, :3]
    packed = cams.take_along_dim(index[:, :, None, None], dim=1)
    for implementation in (afa_ext, reference):
        for dtype in (torch.int64, torch.int32):
            labels = implementation.pseudo_labels(
                images, packed, class_labels.gather(1, index), class_index=index.to(dtype)
            )
            assert torch.equal(labels, expected)


def test_max_classes(device):
    images, cams, class_labels = case(device=device)
    expected = afa_ext.pseudo_labels(images, cams, class_labels)
    for most in (3, 4, 100):
        assert torch.equal(afa_ext.pseudo_labels(images, cams, class_labels, max_classes=most), expected)
    if device == "cpu":
        for implementation in (afa_ext, reference):
            with pytest.raises(RuntimeError, match="max_classes is 2, but image 2 has 3 classes"):
                implementation.pseudo_labels(images, cams, class_labels, max_classes=2)
    else:
        few = afa_ext.pseudo_labels(images, cams, class_labels, max_classes=2)
        assert torch.equal(few[:2], expected[:2])
        assert bool((few[2] == 255).all())


def test_ignore_index(device):
    images, cams, class_labels = case(device=device)
    expected = afa_ext.pseudo_labels(images, cams, class_labels)
    for implementation in (afa_ext, reference):
        for index in (-100, -1, 7, 2**31 - 1):
            labels = implementation.pseudo_labels(images, cams, class_labels, ignore_index=index)
            assert torch.equal(labels, expected.masked_fill(expected == 255, index))


def test_scores_far_from_zero(device):
    """CAMs that are not probabilities, and thresholds far apart, do not make the softmax overflow or underflow."""
    images, cams, class_labels = case(device=device)
    for scale, shift, low, high in ((100.0, 500.0, 520.0, 560.0), (1.0, -1000.0, -999.6, 0.0), (1e4, 0.0, 10.0, 20.0)):
        options: dict[str, Any] = {"low": low, "high": high, "num_iter": 1}
        maps = (cams * scale + shift).double()
        actual = afa_ext.pseudo_labels(images, maps, class_labels, **options)
        assert torch.equal(actual, reference.pseudo_labels(images, maps, class_labels, **options))
        single = afa_ext.pseudo_labels(images, maps.float(), class_labels, **options)
        assert (single != actual).float().mean() < 1e-2


def test_labels_have_no_gradient(device):
    images, cams, class_labels = case(device=device)
    weights = afa_ext.par_affinity(shrink(images / 255, 2)).requires_grad_()
    labels = afa_ext.pseudo_labels(
        (images / 255).requires_grad_(), cams.requires_grad_(), class_labels.requires_grad_(), weights=weights
    )
    assert not labels.requires_grad


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compile_fullgraph(dynamic, device):
    def labels(images, cams, class_labels, box):
        return afa_ext.pseudo_labels(images, cams, class_labels, box=box).clone()

    compiled = torch.compile(labels, fullgraph=True, dynamic=dynamic)
    for height, width in ((20, 24), (23, 31)):
        images, cams, class_labels = case(2, 4, height, width, device=device)
        box = torch.tensor([[0, height, 0, width], [2, 9, 3, 20]], device=device)
        arguments = images, cams, class_labels, box
        assert torch.equal(compiled(*arguments), labels(*arguments))


def test_autocast_changes_nothing(device):
    images, cams, class_labels = case(device=device)
    expected = afa_ext.pseudo_labels(images, cams.bfloat16(), class_labels)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(afa_ext.pseudo_labels(images, cams.bfloat16(), class_labels), expected)


def test_threads_change_nothing(threads):
    images, cams, class_labels = case(height=150, width=131)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(afa_ext.pseudo_labels(images, cams, class_labels))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.cuda
def test_side_stream_and_graph():
    images, cams, class_labels = case(device="cuda", height=64, width=64)
    expected = afa_ext.pseudo_labels(images, cams, class_labels)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        labels = afa_ext.pseudo_labels(images, cams, class_labels)
    stream.synchronize()
    assert torch.equal(labels, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # fails on any synchronization with the device
        labels = afa_ext.pseudo_labels(images, cams, class_labels, max_classes=4)
    graph.replay()
    assert torch.equal(labels, expected)


# ---- properties ----------------------------------------------------------------------------------------------------

Size = tuple[int, int, int, int]
sizes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 20), st.integers(1, 20))
seeds = st.integers(0, 10**6)
scores = st.floats(0, 1, allow_nan=False, width=32)
quick = settings(max_examples=40, deadline=None, derandomize=True)


@quick
@given(sizes, seeds, scores, scores, st.integers(1, 4))
def test_labels_are_present_classes_background_or_ignored(device, size: Size, seed, one, other, downscale):
    images, cams, class_labels = case(*size, seed=seed, device=device)
    low, high = min(one, other), max(one, other)
    labels = afa_ext.pseudo_labels(images, cams, class_labels, low=low, high=high, downscale=downscale, num_iter=2)
    for i in range(size[0]):
        present = set((class_labels[i].nonzero()[:, 0] + 1).tolist())
        assert set(labels[i].unique().tolist()) <= present | {0, 255}
    if low == high:
        assert not (labels == 255).any()


@quick
@given(sizes, seeds, scores)
def test_one_score_ignores_no_pixels(device, size: Size, seed, score):
    images, cams, class_labels = case(*size, seed=seed, device=device)
    labels = afa_ext.pseudo_labels(images, cams, class_labels, low=score, high=score, num_iter=2)
    assert not (labels == 255).any()
    # With two scores, a pixel is labeled if both agree.
    high = min(1.0, score + 0.2)
    both = afa_ext.pseudo_labels(images, cams, class_labels, low=score, high=high, num_iter=2)
    upper = afa_ext.pseudo_labels(images, cams, class_labels, low=high, high=high, num_iter=2)
    assert torch.equal(both, upper.masked_fill((upper == 0) & (labels != 0), 255))


@quick
@given(sizes, seeds, st.lists(st.integers(-5, 25), min_size=12, max_size=12))
def test_outside_the_box_is_ignored(device, size: Size, seed, ends):
    images, cams, class_labels = case(*size, seed=seed, device=device)
    batch, _, height, width = size
    box = torch.tensor(ends, device=device).view(3, 4)[:batch]
    free = afa_ext.pseudo_labels(images, cams, class_labels, num_iter=2)
    labels = afa_ext.pseudo_labels(images, cams, class_labels, box=box, num_iter=2)
    for i, (y0, y1, x0, x1) in enumerate(box.tolist()):
        for y in range(height):
            for x in range(width):
                inside = y0 <= y < y1 and x0 <= x < x1
                assert labels[i, y, x] == (free[i, y, x] if inside else 255)


@quick
@given(sizes, seeds, st.floats(0.5, 10), st.floats(-2, 2))
def test_affine_change_of_the_images_changes_nothing(device, size: Size, seed, scale, shift):
    images, cams, class_labels = case(*size, seed=seed, device=device)
    colors, cams = images.double() / 255, cams.double()
    labels = afa_ext.pseudo_labels(colors, cams, class_labels, num_iter=2)
    changed = afa_ext.pseudo_labels(colors * scale + shift, cams, class_labels, num_iter=2)
    assert_equal_but_for_ties(changed, labels, colors, cams, class_labels, num_iter=2)


@quick
@given(sizes, seeds)
def test_permuting_classes_permutes_labels(device, size: Size, seed):
    images, cams, class_labels = case(*size, seed=seed, device=device)
    cams = cams.double()  # the sum over the classes is computed in another order
    order = torch.randperm(size[1], generator=torch.Generator().manual_seed(seed))
    labels = afa_ext.pseudo_labels(images, cams, class_labels, num_iter=2)
    permuted = afa_ext.pseudo_labels(images, cams[:, order], class_labels[:, order], num_iter=2)
    table = torch.arange(256, device=device)
    table[1 : size[1] + 1] = order.to(device) + 1
    back = table[permuted]
    assert_equal_but_for_ties(back, labels, images, cams, class_labels, gap=1e-9, num_iter=2)


# ---- errors --------------------------------------------------------------------------------------------------------

IMAGES, CAMS = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.rand(2, 4, 8, 8)
LABELS = torch.ones(2, 4)
BOX, INDEX = torch.tensor([[0, 8, 0, 8]] * 2), torch.zeros(2, 4, dtype=torch.long)
W = torch.rand(2, 48, 4, 4)


@pytest.mark.parametrize("module", [afa_ext, reference], ids=["native", "reference"])
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1], CAMS, LABELS), {}, TypeError, r"images must be a floating-point tensor \[B, 3, H, W\], got \[1\]"),
        ((IMAGES[0], CAMS, LABELS), {}, ValueError, "images must have 4 dimensions .*uint8 tensor of shape"),
        ((IMAGES[0].float(), CAMS, LABELS), {}, ValueError, "images must have 4 dimensions"),
        ((IMAGES.int(), CAMS, LABELS), {}, TypeError, "images must be uint8 or floating-point, .*torch.int32"),
        ((IMAGES[:, :0], CAMS, LABELS), {}, ValueError, "images must have at least one color channel"),
        ((IMAGES, CAMS[0], LABELS), {}, ValueError, "cams must have 4 dimensions"),
        ((IMAGES, CAMS.long(), LABELS), {}, TypeError, "cams must be float32"),
        ((IMAGES[:1], CAMS, LABELS), {}, ValueError, r"images must have size 2 in dimension 0 \(the batch of cams"),
        ((IMAGES[:, :, :7], CAMS, LABELS), {}, ValueError, r"images must have size 8 in dimension 2 \(the height of"),
        ((IMAGES[..., :7], CAMS, LABELS), {}, ValueError, r"images must have size 8 in dimension 3 \(the width of"),
        ((IMAGES.to("meta"), CAMS, LABELS), {}, ValueError, r"images must be on the device of cams \(cpu\)"),
        ((IMAGES, CAMS, LABELS[:, :3]), {}, ValueError, r"class_labels must be a tensor of shape \(2, 4\)"),
        ((IMAGES, CAMS, [1, 0]), {}, ValueError, "class_labels must be a tensor of shape"),
        ((IMAGES, CAMS, LABELS.to("meta")), {}, ValueError, "class_labels must be on the device of cams"),
        ((IMAGES, CAMS, LABELS), {"low": "a"}, TypeError, r"low must be a number, got 'a' \(str\)"),
        ((IMAGES, CAMS, LABELS), {"low": float("nan")}, ValueError, "low must be finite, got nan"),
        ((IMAGES, CAMS, LABELS), {"high": float("inf")}, ValueError, "high must be finite, got inf"),
        ((IMAGES, CAMS, LABELS), {"high": True}, TypeError, r"high must be a number, got True \(bool\)"),
        ((IMAGES, CAMS, LABELS), {"low": 0.6}, ValueError, r"high must be at least low \(0.6\), got 0.55"),
        ((IMAGES, CAMS, LABELS), {"box": BOX.float()}, TypeError, "box must be an int64 or int32 tensor"),
        ((IMAGES, CAMS, LABELS), {"box": BOX[:1]}, ValueError, r"box must have shape \(2, 4\) .* got \(1, 4\)"),
        ((IMAGES, CAMS, LABELS), {"box": BOX.to("meta")}, ValueError, "box must be on the device of cams"),
        ((IMAGES, CAMS, LABELS), {"ignore_index": 0}, ValueError, "ignore_index must differ from the labels 0 to 4"),
        ((IMAGES, CAMS, LABELS), {"ignore_index": 4}, ValueError, "ignore_index must differ from .* got 4"),
        ((IMAGES, CAMS, LABELS), {"ignore_index": 2**31}, ValueError, "ignore_index must be between"),
        ((IMAGES, CAMS, LABELS), {"ignore_index": 1.5}, TypeError, "ignore_index must be an integer, got 1.5"),
        ((IMAGES, CAMS, LABELS), {"class_index": LABELS}, TypeError, "class_index must be an int64 or int32 tensor"),
        ((IMAGES, CAMS, LABELS), {"class_index": INDEX[:, :3]}, ValueError, r"class_index must have shape \(2, 4\)"),
        ((IMAGES, CAMS, LABELS), {"class_index": INDEX.to("meta")}, ValueError, "class_index must be on the device"),
        ((IMAGES, CAMS, LABELS), {"max_classes": 0}, ValueError, "max_classes must be at least 1, got 0"),
        ((IMAGES, CAMS, LABELS), {"max_classes": 2.0}, TypeError, "max_classes must be an integer, got 2.0"),
        ((IMAGES, CAMS, LABELS), {"downscale": 0}, ValueError, "downscale must be at least 1, got 0"),
        ((IMAGES, CAMS, LABELS), {"downscale": 0.5}, TypeError, "downscale must be an integer, got 0.5"),
        ((IMAGES, CAMS, LABELS), {"num_iter": -1}, ValueError, "num_iter must be at least 0, got -1"),
        ((IMAGES, CAMS, LABELS), {"w1": 0}, ValueError, "w1 must be greater than 0, got 0"),
        ((IMAGES, CAMS, LABELS), {"w2": -0.1}, ValueError, "w2 must be 0 or more, got -0.1"),
        ((IMAGES, CAMS, LABELS), {"dilations": ()}, ValueError, "dilations must have 1 to 32 integers, got 0"),
        ((IMAGES, CAMS, LABELS), {"weights": W[0]}, ValueError, "weights must have 4 dimensions"),
        ((IMAGES, CAMS, LABELS), {"weights": W[:1]}, ValueError, r"weights must have size 2 .*\(the batch of cams"),
        ((IMAGES, CAMS, LABELS), {"weights": W[:, :8]}, ValueError, "weights must have size 48 in dimension 1"),
        ((IMAGES, CAMS, LABELS), {"weights": W[:, :, :3]}, ValueError, "weights must have size 4 in dimension 2"),
        ((IMAGES, CAMS, LABELS), {"weights": W, "downscale": 1}, ValueError, "weights must have size 8 in dimension 2"),
        (
            (IMAGES, CAMS, LABELS),
            {"weights": W[..., :3]},
            ValueError,
            r"weights must .*\(the width of images over downs",
        ),
        ((IMAGES, CAMS, LABELS), {"weights": W.half()}, TypeError, r"weights must be torch.float32.*torch.float16"),
        ((IMAGES, CAMS, LABELS), {"weights": W.to("meta")}, ValueError, "weights must be on the device of cams"),
    ],
)
def test_errors(module, arguments, options, error, message):
    with pytest.raises(error, match=message):
        module.pseudo_labels(*arguments, **options)


SETTINGS = {
    "images": IMAGES,
    "cams": CAMS,
    "present": LABELS.bool(),
    "class_index": None,
    "box": None,
    "weights": None,
    "low": 0.35,
    "high": 0.55,
    "downscale": 2,
    "dilations": list(D6),
    "num_iter": 1,
    "w1": 0.3,
    "w2": 0.01,
    "max_classes": 0,
    "ignore_index": 255,
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cams": CAMS[0]}, r"cams must have shape .* got \[4, 8, 8\]"),
        ({"cams": CAMS.long()}, "cams must be float32, float64, float16 or bfloat16, got int64"),
        ({"images": IMAGES[:1]}, "images must have shape"),
        ({"images": IMAGES.int()}, "images must be float32, float64, float16 or bfloat16, got int32"),
        ({"present": LABELS}, "present must be bool, got float32"),
        ({"present": LABELS[:1].bool()}, "present must have shape"),
        ({"class_index": INDEX[:1]}, "class_index must have shape"),
        ({"class_index": INDEX.int()}, "class_index must be int64, got int32"),
        ({"box": BOX[:, :3]}, "box must have shape"),
        ({"box": BOX.int()}, "box must be int64, got int32"),
        ({"weights": W[:, :8]}, "weights must have shape"),
        ({"weights": W.double()}, "weights must be float32, got float64"),
        ({"low": 0.6}, r"high must be at least low \(0.6\), got 0.55"),
        ({"downscale": 0}, "downscale must be at least 1, got 0"),
        ({"num_iter": -1}, "num_iter must be at least 0, got -1"),
        ({"max_classes": -1}, "max_classes must be at least 0, got -1"),
        ({"ignore_index": 2**31}, "ignore_index must fit 32 bits, got 2147483648"),
        ({"dilations": []}, "dilations must have 1 to 32"),
        ({"w1": 0.0}, "w1 must be greater than 0"),
    ],
)
def test_errors_of_the_operator_itself(changed, message):
    with pytest.raises(RuntimeError, match="^" + message):
        torch.ops.afa_ext.pseudo_labels(*(SETTINGS | changed).values())
