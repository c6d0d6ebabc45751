"""afa_ext.refine_labels: scores with a background map, refined inside each image's box."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import afa_ext
from afa_ext import reference
from afa_ext.reference.labels import refined_in_box, shrink

D6 = afa_ext.par.DILATIONS


def smooth(batch, channels, height, width, generator, coarse):
    small = torch.rand(batch, channels, coarse, coarse + 1, generator=generator)
    return F.interpolate(small, size=(height, width), mode="bicubic", align_corners=True).clamp(0, 1)


def case(batch=3, classes=5, size: tuple[int, int] = (37, 45), grid: tuple[int, int] = (5, 7), seed=0, device="cpu"):
    """uint8 images, scores against a high and a low background, class labels with 0, 1 and several classes."""
    generator = torch.Generator().manual_seed(seed)
    images = smooth(batch, 3, *size, generator, 6)
    images = (images + 0.03 * torch.rand(images.shape, generator=generator)).clamp(0, 1).mul(255).byte()
    labels = (torch.rand(batch, classes, generator=generator) < 0.5).float()
    if batch > 2 and classes > 2:
        labels[:3] = 0
        labels[1, 2] = 1
        labels[2, :3] = 1
    cams = smooth(batch, classes, *grid, generator, 4).masked_fill(labels[:, :, None, None] == 0, float("-inf"))
    high, low = (F.pad(cams, (0, 0, 0, 0, 1, 0), value=background).softmax(1) for background in (0.6, 0.35))
    return [t.to(device) for t in (images, high, low, labels)]


def assert_equal_but_for_ties(actual, expected, images, given, class_labels, box=None, gap=2e-5, **options):
    """Where they differ, the two best refined scores in float64, of one of the `given`, are equal within `gap`."""
    different = (actual != expected).cpu()
    assert different.float().mean() < 1e-3 or different.sum() <= 1
    for i in different.flatten(1).any(1).nonzero()[:, 0].tolist():
        present = F.pad(class_labels[i].nonzero()[:, 0] + 1, (1, 0))
        y0, y1, x0, x1 = (0, *images.shape[2:3], 0, images.shape[3]) if box is None else box[i].clamp(min=0).tolist()
        tie = torch.zeros_like(different[i])
        for scores in given:
            maps = scores[i : i + 1, present].double()
            refined = refined_in_box(images[i : i + 1].double() / 255, maps, (y0, y1, x0, x1), **options)
            best = refined[0].topk(2, dim=0).values.cpu()
            tie[y0:y1, x0:x1] |= best[0] - best[1] < gap
        assert bool(tie[different[i]].all()), f"image {i}: a label differs where scores do not tie"


def test_golden(golden, device):
    g = {name: value.to(device) for name, value in golden("pseudo_label").items()}
    refined, box = g["refined_walk_cams"], g["img_box"]
    expected = torch.full(refined[:, 0].shape, 255, device=device)
    for i, (y0, y1, x0, x1) in enumerate(box.tolist()):
        expected[i, y0:y1, x0:x1] = refined[i, :, y0:y1, x0:x1].argmax(0)
    assert not bool((box == box[:1]).all()), "the recorded boxes differ"
    for implementation in (afa_ext, reference):
        labels = implementation.refine_labels(g["images"], g["walk_cams"], g["cls_labels"], box=box)
        wrong = (labels != expected).sum()
        assert wrong <= 2, f"{wrong} of {labels.numel()} pixels differ, and only ties may"


# Sizes around the vector lengths, odd ones, one pixel; grids as large as the image, of one token, and in between.
SHAPES = [
    ((1, 1, (1, 1), (1, 1))),
    ((2, 2, (1, 7), (1, 3))),
    ((3, 5, (37, 45), (5, 7))),
    ((3, 5, (37, 45), (37, 45))),
    ((3, 4, (32, 64), (1, 4))),
    ((2, 3, (18, 33), (40, 33))),
]


def boxes(height, width, device):
    """The whole image, an inner box, one that leaves the image on two sides, an empty one, a single column."""
    rows = [
        (0, height, 0, width),
        (1, height - 1, 2, width - 1),
        (-3, height + 5, width // 2, width + 9),
        (5, 5, 0, width),
        (0, height, width - 1, width),
    ]
    return torch.tensor(rows, device=device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("downscale", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_matches_reference(shape, downscale, dtype, device):
    batch, classes, size, grid = shape
    images, high, low, class_labels = case(batch, classes, size, grid, device=device)
    high, low = high.to(dtype), low.to(dtype)
    every = boxes(size[0], size[1], device)
    for first in range(0, len(every), batch):
        box = torch.cat([every, every])[first : first + batch]
        for options, more in (
            ({"downscale": downscale}, {"low_scores": low}),
            ({"downscale": downscale, "dilations": (1, 3), "num_iter": 2, "w1": 0.5, "w2": 0.2}, {}),
            ({"downscale": downscale, "num_iter": 0}, {"low_scores": low}),
        ):
            actual = afa_ext.refine_labels(images, high, class_labels, box=box, **more, **options)
            expected = reference.refine_labels(images, high, class_labels, box=box, **more, **options)
            assert actual.dtype == torch.int64
            scores = (high, *more.values())
            assert_equal_but_for_ties(actual, expected, images, scores, class_labels, box, **options)
            if dtype == torch.float64:
                assert torch.equal(actual, expected)


def test_without_a_box_it_is_the_whole_image(device):
    images, high, low, class_labels = case(device=device)
    whole = torch.tensor([[0, 37, 0, 45]] * 3, device=device)
    expected = afa_ext.refine_labels(images, high, class_labels, low_scores=low, box=whole)
    assert expected.unique().tolist() == [0, 1, 2, 3, 255]
    weights = afa_ext.par_affinity(shrink(images / 255, 2))
    for implementation in (afa_ext, reference):
        for more in ({}, {"weights": weights}, {"box": whole.int()}):
            labels = implementation.refine_labels(images, high, class_labels, low_scores=low, **more)
            assert_equal_but_for_ties(labels, expected, images, (high, low), class_labels)


def test_values_outside_a_box_have_no_effect(device):
    images, high, low, class_labels = case(device=device, grid=(37, 45))
    box = torch.tensor([[3, 30, 0, 40], [0, 20, 7, 45], [5, 36, 11, 30]], device=device)
    expected = afa_ext.refine_labels(images, high, class_labels, low_scores=low, box=box)
    for i, (y0, y1, x0, x1) in enumerate(box.tolist()):
        outside = torch.ones(37, 45, dtype=torch.bool, device=device)
        outside[y0:y1, x0:x1] = False
        images[i, :, outside] = 255
        high[i, :, outside] = 7
        low[i, :, outside] = -7
        assert bool((expected[i][outside] == 255).all())
    assert torch.equal(afa_ext.refine_labels(images, high, class_labels, low_scores=low, box=box), expected)


def test_absent_maps_are_not_read(device):
    images, high, low, class_labels = case(device=device)
    expected = afa_ext.refine_labels(images, high, class_labels, low_scores=low)
    absent = F.pad(class_labels == 0, (1, 0))
    for scores in (high, low):
        scores[absent] = float("nan")
    for implementation in (afa_ext, reference):
        labels = implementation.refine_labels(images, high, class_labels, low_scores=low)
        assert_equal_but_for_ties(labels, expected, images, (high, low), class_labels)
    assert not labels[0].any(), "an image without classes is background"


def test_low_scores_ignore_pixels_with_different_labels(device):
    images, high, low, class_labels = case(device=device)
    both = afa_ext.refine_labels(images, high, class_labels, low_scores=low)
    upper, lower = (afa_ext.refine_labels(images, scores, class_labels) for scores in (high, low))
    assert torch.equal(both, upper.masked_fill((upper == 0) & (lower != 0), 255))
    assert not (upper == 255).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_scores_are_computed_in_float32(dtype, device):
    images, high, low, class_labels = case(device=device)
    box = torch.tensor([[3, 30, 0, 40], [0, 20, 7, 45], [5, 36, 11, 30]], device=device)
    high, low = high.to(dtype), low.to(dtype)
    actual = afa_ext.refine_labels(images, high, class_labels, low_scores=low, box=box)
    wide = afa_ext.refine_labels(images, high.float(), class_labels, low_scores=low.float(), box=box)
    assert torch.equal(actual, wide)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(afa_ext.refine_labels(images, high, class_labels, low_scores=low, box=box), wide)


def test_layouts(device):
    images, high, low, class_labels = case(device=device)
    box = torch.tensor([[3, 30, 0, 40], [0, 20, 7, 45], [5, 36, 11, 30]], device=device)
    expected = afa_ext.refine_labels(images, high, class_labels, low_scores=low, box=box)
    for change in (
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.cat([t, t], 3)[..., : t.shape[3]],
    ):
        views = [change(t) for t in (images, high, low)]
        assert not any(t.is_contiguous() for t in views)
        labels = afa_ext.refine_labels(
            views[0], views[1], class_labels.mT.contiguous().mT, low_scores=views[2], box=box.mT.contiguous().mT
        )
        assert torch.equal(labels, expected)
    colors = images.float() / 255
    for dtype in (torch.float32, torch.float64):
        labels = afa_ext.refine_labels(colors.to(dtype), high, class_labels, low_scores=low, box=box)
        assert_equal_but_for_ties(labels, expected, images, (high, low), class_labels, box)


@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (2, 0, 8, 8), (2, 4, 0, 8), (2, 4, 8, 0)], ids=str)
def test_empty(shape, device):
    batch, classes, height, width = shape
    images = torch.zeros(batch, 3, height, width, dtype=torch.uint8, device=device)
    scores = torch.rand(batch, classes + 1, 2, 3, device=device)
    for implementation in (afa_ext, reference):
        labels = implementation.refine_labels(images, scores, torch.ones(batch, classes, device=device))
        assert labels.shape == (batch, height, width)
        assert labels.dtype == torch.int64
        assert not labels.any()


def test_a_batch_equals_its_images_one_by_one(device):
    images, high, low, class_labels = case(device=device)
    box = torch.tensor([[3, 30, 0, 40], [0, 20, 7, 45], [5, 36, 11, 30]], device=device)
    whole = afa_ext.refine_labels(images, high, class_labels, low_scores=low, box=box)
    for i in range(3):
        one = slice(i, i + 1)
        alone = afa_ext.refine_labels(images[one], high[one], class_labels[one], low_scores=low[one], box=box[one])
        assert torch.equal(alone[0], whole[i])


def test_class_index_and_max_classes(device):
    images, high, low, class_labels = case(device=device)
    expected = afa_ext.refine_labels(images, high, class_labels, low_scores=low)
    index = class_labels.argsort(dim=1, descending=True, stable=True)[:, :3]
    maps = F.pad(index + 1, (1, 0))[:, :, None, None]
    packed = [scores.take_along_dim(maps, dim=1) for scores in (high, low)]
    for implementation in (afa_ext, reference):
        labels = implementation.refine_labels(
            images, packed[0], class_labels.gather(1, index), low_scores=packed[1], class_index=index, max_classes=3
        )
        assert_equal_but_for_ties(labels, expected, images, (high, low), class_labels)
    if device == "cpu":
        for implementation in (afa_ext, reference):
            with pytest.raises(RuntimeError, match="max_classes is 2, but image 2 has 3 classes"):
                implementation.refine_labels(images, high, class_labels, max_classes=2)
    else:
        few = afa_ext.refine_labels(images, high, class_labels, low_scores=low, max_classes=2)
        assert torch.equal(few[:2], expected[:2])
        assert bool((few[2] == 255).all())


def test_labels_have_no_gradient(device):
    images, high, low, class_labels = case(device=device)
    labels = afa_ext.refine_labels(
        (images / 255).requires_grad_(), high.requires_grad_(), class_labels, low_scores=low.requires_grad_()
    )
    assert not labels.requires_grad


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compile_fullgraph(dynamic, device):
    def labels(images, high, low, class_labels, box):
        return afa_ext.refine_labels(images, high, class_labels, low_scores=low, box=box).clone()

    compiled = torch.compile(labels, fullgraph=True, dynamic=dynamic)
    for size in ((20, 24), (23, 31)):
        images, high, low, class_labels = case(2, 4, size, (3, 4), device=device)
        arguments = images, high, low, class_labels, boxes(*size, device)[1:3]
        assert torch.equal(compiled(*arguments), labels(*arguments))


def test_threads_change_nothing(threads):
    images, high, low, class_labels = case(size=(150, 131))
    box = torch.tensor([[0, 150, 0, 131], [5, 150, 3, 120], [20, 130, 0, 131]])
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(afa_ext.refine_labels(images, high, class_labels, low_scores=low, box=box))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.cuda
def test_graph():
    images, high, low, class_labels = case(device="cuda")
    box = torch.tensor([[3, 30, 0, 40], [0, 20, 7, 45], [5, 36, 11, 30]], device="cuda")
    expected = afa_ext.refine_labels(images, high, class_labels, low_scores=low, box=box)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # fails if anything waits for the device
        labels = afa_ext.refine_labels(images, high, class_labels, low_scores=low, box=box, max_classes=3)
    graph.replay()
    assert torch.equal(labels, expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 4)),
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.lists(st.integers(-5, 30), min_size=12, max_size=12),
    st.integers(1, 5),
    st.integers(0, 10**6),
)
def test_any_box_size_and_grid_match_the_reference(device, counts, size, grid, ends, downscale, seed):
    batch, classes = counts
    images, high, low, class_labels = case(batch, classes, size, grid, seed, device)
    high, low = high.double(), low.double()
    box = torch.tensor(ends, device=device).view(3, 4)[:batch]
    options = {"box": box, "downscale": downscale, "num_iter": 2}
    actual = afa_ext.refine_labels(images, high, class_labels, low_scores=low, **options)
    expected = reference.refine_labels(images, high, class_labels, low_scores=low, **options)
    del options["box"]
    assert_equal_but_for_ties(actual, expected, images, (high, low), class_labels, box, gap=1e-9, **options)


IMAGES, SCORES = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.rand(2, 5, 3, 3)
LABELS, BOX = torch.ones(2, 4), torch.tensor([[0, 8, 0, 8]] * 2)
W = torch.rand(2, 48, 4, 4)


@pytest.mark.parametrize("module", [afa_ext, reference], ids=["native", "reference"])
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((IMAGES[0], SCORES, LABELS), {}, ValueError, "images must have 4 dimensions"),
        ((IMAGES.int(), SCORES, LABELS), {}, TypeError, "images must be uint8 or floating-point"),
        ((IMAGES[:, :0], SCORES, LABELS), {}, ValueError, "images must have at least one color channel"),
        ((IMAGES, SCORES[0], LABELS), {}, ValueError, "scores must have 4 dimensions"),
        ((IMAGES, SCORES.long(), LABELS), {}, TypeError, "scores must be float32"),
        ((IMAGES[:1], SCORES, LABELS), {}, ValueError, r"images must have size 2 in dimension 0 \(the batch of scores"),
        ((IMAGES, SCORES[:, :0], LABELS), {}, ValueError, "scores must include the background map"),
        ((IMAGES, SCORES[..., :0], LABELS), {}, ValueError, "scores must have at least one position"),
        ((IMAGES.to("meta"), SCORES, LABELS), {}, ValueError, "images must be on the device of scores"),
        ((IMAGES, SCORES, LABELS[:, :3]), {}, ValueError, r"class_labels must be a tensor of shape \(2, 4\)"),
        ((IMAGES, SCORES, LABELS.to("meta")), {}, ValueError, "class_labels must be on the device of scores"),
        ((IMAGES, SCORES, LABELS), {"low_scores": SCORES[0]}, ValueError, "low_scores must have 4 dimensions"),
        ((IMAGES, SCORES, LABELS), {"low_scores": SCORES[:1]}, ValueError, r"low_scores must have shape \(2, 5, 3, 3"),
        ((IMAGES, SCORES, LABELS), {"low_scores": SCORES.half()}, TypeError, "low_scores must have the type of scores"),
        ((IMAGES, SCORES, LABELS), {"low_scores": SCORES.to("meta")}, ValueError, "low_scores must be on the device"),
        ((IMAGES, SCORES, LABELS), {"box": BOX, "weights": W}, ValueError, "weights must be None if box is given"),
        ((IMAGES, SCORES, LABELS), {"weights": W[:, :8]}, ValueError, "weights must have size 48 in dimension 1"),
        ((IMAGES, SCORES, LABELS), {"weights": W.double()}, TypeError, "weights must be torch.float32 for scores of"),
        ((IMAGES, SCORES, LABELS), {"box": BOX.float()}, TypeError, "box must be an int64 or int32 tensor"),
        ((IMAGES, SCORES, LABELS), {"ignore_index": 3}, ValueError, "ignore_index must differ from the labels 0 to 4"),
        ((IMAGES, SCORES, LABELS), {"max_classes": 0}, ValueError, "max_classes must be at least 1"),
        ((IMAGES, SCORES, LABELS), {"downscale": 0}, ValueError, "downscale must be at least 1"),
    ],
)
def test_errors(module, arguments, options, error, message):
    with pytest.raises(error, match=message):
        module.refine_labels(*arguments, **options)


SETTINGS = {
    "images": IMAGES,
    "scores": SCORES,
    "low_scores": None,
    "present": LABELS.bool(),
    "class_index": None,
    "box": None,
    "weights": None,
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
        ({"images": IMAGES[0]}, "images must have shape"),
        ({"images": IMAGES.int()}, "images must be float32, float64, float16 or bfloat16, got int32"),
        ({"scores": SCORES[:1]}, "scores must have shape"),
        ({"scores": SCORES.long()}, "scores must be float32, float64, float16 or bfloat16, got int64"),
        ({"scores": SCORES[:, :0]}, "scores must include the background map"),
        ({"scores": SCORES[..., :0]}, "scores must have at least one position"),
        ({"low_scores": SCORES[:1]}, "low_scores must have shape"),
        ({"low_scores": SCORES.half()}, "low_scores must have the type of scores"),
        ({"present": LABELS[:, :3].bool()}, "present must have shape"),
        ({"weights": W, "box": BOX}, "weights and box must not be given together"),
        ({"downscale": 0}, "downscale must be at least 1"),
        ({"num_iter": -1}, "num_iter must be at least 0"),
    ],
)
def test_errors_of_the_operator_itself(changed, message):
    with pytest.raises(RuntimeError, match="^" + message):
        torch.ops.afa_ext.refine_labels(*(SETTINGS | changed).values())
