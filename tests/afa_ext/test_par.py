from __future__ import annotations

import copy
import functools
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import afa_ext
from afa_ext import reference

CASES = ["par_flat", "par_same_size", "par_small", "par_two_dilations", "par_upsampled", "pamr_a"]
D6 = afa_ext.par.DILATIONS
KINDS = pytest.mark.parametrize("kind", ["par", "pamr"])


def affinity(kind, images, module=afa_ext, **settings):
    return getattr(module, f"{kind}_affinity")(images, **settings)


def refine(kind, images, masks, module=afa_ext, **settings):
    return getattr(module, f"{kind}_refine")(images, masks, **settings)


def smooth_images(batch, height, width, dtype=torch.float32, device="cpu"):
    """Random colors that vary slowly, as in a photograph: on noise all weights are alike."""
    coarse = torch.rand(batch, 3, max(2, height // 4), max(2, width // 4), dtype=torch.float64)
    images = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    return (images + 0.02 * torch.rand_like(images)).to(device, dtype)


@pytest.mark.parametrize("case", CASES)
def test_golden(case, golden, assert_relative, device):
    g = golden(case)
    for implementation in (afa_ext, reference):
        masks = g["masks"].to(device).requires_grad_()
        settings = {"dilations": g["dilations"].tolist(), "num_iter": g["num_iter"]}
        out = refine(case.partition("_")[0], g["images"].to(device), masks, implementation, **settings)
        assert_relative(out, g["out"])
        if "grad_out" not in g:
            continue
        (grad,) = torch.autograd.grad((out * g["grad_out"].to(device)).sum(), masks)
        assert_relative(grad, g["grad_masks"])


@pytest.mark.parametrize("case", CASES)
def test_module_matches_golden(case, golden, assert_relative, device):
    g = golden(case)
    module = {"par": afa_ext.PAR, "pamr": afa_ext.PAMR}[case.partition("_")[0]]
    out = module(dilations=g["dilations"].tolist(), num_iter=g["num_iter"])(
        g["images"].to(device), g["masks"].to(device)
    )
    assert_relative(out, g["out"])


# Widths around the vector lengths, one pixel, dilations beyond the image, every class-block remainder.
SHAPES = [(1, 1, 1, 1), (2, 2, 1, 5), (1, 3, 7, 3), (1, 4, 5, 16), (2, 5, 9, 17), (1, 6, 33, 31), (1, 9, 20, 70)]


@KINDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dilations", [D6, (1,), (3, 40)], ids=str)
def test_affinity_matches_reference(kind, shape, dilations, assert_relative, device):
    batch, channels, height, width = shape
    images = smooth_images(batch, height, width, torch.float64, device)[:, torch.arange(channels) % 3]
    weights = affinity(kind, images, dilations=dilations)
    assert_relative(weights, affinity(kind, images, reference, dilations=dilations), 1e-9)
    assert_relative(
        affinity(kind, images.float(), dilations=dilations),
        affinity(kind, images.float(), reference, dilations=dilations),
        2e-5,  # float32 both: sigma of a nearly flat neighborhood loses digits in either
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dilations", [D6, (1,), (3, 40)], ids=str)
def test_propagate_matches_reference(shape, dilations, assert_relative, device):
    batch, classes, height, width = shape
    images = smooth_images(batch, height, width, torch.float64, device)
    masks = torch.rand(batch, classes, height, width, dtype=torch.float64, device=device, requires_grad=True)
    weights = afa_ext.par_affinity(images, dilations=dilations)
    weights.requires_grad_()
    results = []
    for implementation in (afa_ext, reference):
        out = implementation.par_propagate(weights, masks, dilations=dilations, num_iter=3)
        results.append(
            [
                out,
                *torch.autograd.grad(
                    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=device).view_as(out)).sum(),
                    (masks, weights),
                ),
            ]
        )
    for actual, expected in zip(*results, strict=True):
        assert_relative(actual, expected, 1e-10)
    single = afa_ext.par_propagate(weights.detach().float(), masks.detach().float(), dilations=dilations, num_iter=3)
    assert_relative(single, results[1][0], 2e-6)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(kind, dtype, device):
    images, masks = smooth_images(2, 30, 37, device=device), torch.rand(2, 3, 30, 37, device=device)
    exact = refine(kind, images.to(dtype).double(), masks.to(dtype).double(), reference)
    out = refine(kind, images.to(dtype), masks.to(dtype))
    assert out.dtype == dtype
    # PyTorch itself, storing weights at this precision, loses this much; CUDA also stores each iteration.
    allowed = (refine(kind, images.to(dtype), masks.to(dtype), reference).double() - exact).abs().max()
    assert (out.double() - exact).abs().max() <= (2 if device == "cpu" else 6) * allowed


@KINDS
def test_low_precision_of_a_near_flat_image_stays_finite(kind, device):
    images = torch.full((1, 3, 16, 16), 0.5, dtype=torch.float16, device=device)
    images[0, :, 8, 8] += 0.001
    assert bool(affinity(kind, images).isfinite().all())


@KINDS
def test_mixed_types_are_promoted(kind, device):
    images = smooth_images(1, 9, 9, device=device)
    masks = torch.rand(1, 2, 9, 9, dtype=torch.float16, device=device)
    out = refine(kind, images, masks)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, refine(kind, images, masks.float()))


@KINDS
def test_layouts(kind, device):
    images, masks = smooth_images(2, 18, 22, device=device), torch.rand(2, 4, 18, 22, device=device)
    expected = refine(kind, images, masks)
    views = [
        (images.to(memory_format=torch.channels_last), masks.to(memory_format=torch.channels_last)),
        (images.mT.contiguous().mT, masks.mT.contiguous().mT),
        (torch.cat([images, images], 1)[:, :3], torch.cat([masks, masks], 3)[..., :22]),
    ]
    for image, mask in views:
        assert not (image.is_contiguous() and mask.is_contiguous())
        torch.testing.assert_close(refine(kind, image, mask), expected, rtol=0, atol=0)
    shared = masks[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(refine(kind, images, shared), refine(kind, images, shared.clone()))


@KINDS
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0, 8), (2, 3, 8, 0)], ids=str)
def test_empty(kind, shape, device):
    batch, _, height, width = shape
    images = torch.rand(batch, 3, height, width, device=device)
    masks = torch.rand(shape, device=device, requires_grad=True)
    for implementation in (afa_ext, reference):
        out = refine(kind, images, masks, implementation)
        assert out.shape == shape
        out.sum().backward()


def test_zero_iterations_return_the_masks(device):
    images, masks = smooth_images(1, 8, 8, device=device), torch.rand(1, 2, 8, 8, device=device)
    keep = torch.tensor([[True, False]], device=device)
    for implementation in (afa_ext, reference):
        assert torch.equal(implementation.par_refine(images, masks, num_iter=0), masks)
        kept = implementation.par_refine(images, masks, num_iter=0, class_mask=keep)
        assert torch.equal(kept[:, 0], masks[:, 0])
        assert not kept[:, 1].any()


@KINDS
def test_class_mask(kind, device):
    images = smooth_images(3, 19, 21, device=device)
    masks = torch.rand(3, 7, 19, 21, device=device, requires_grad=True)
    keep = torch.rand(3, 7, device=device) > 0.5
    keep[1] = False
    full = refine(kind, images, masks)
    out = refine(kind, images, masks, class_mask=keep)
    torch.testing.assert_close(out, full * keep[:, :, None, None], rtol=0, atol=0)
    torch.testing.assert_close(out, refine(kind, images, masks, reference, class_mask=keep), rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(out.square().sum(), masks, retain_graph=True)
    assert not grad[~keep].any()
    (expected,) = torch.autograd.grad((full * keep[:, :, None, None]).square().sum(), masks)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-7)


@KINDS
def test_resize(kind, device):
    images, masks = smooth_images(2, 24, 32, device=device), torch.rand(2, 3, 12, 10, device=device)
    for resize, size in (("mask_to_image", (24, 32)), ("image_to_mask", (12, 10))):
        out = refine(kind, images, masks, resize=resize)
        assert out.shape == (2, 3, *size)
        expected = refine(kind, images, masks, reference, resize=resize)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 2, 6, 7), (2, 5, 4, 9)], ids=str)
@pytest.mark.parametrize("class_mask", [False, True])
def test_gradcheck(shape, class_mask, device):
    batch, classes, height, width = shape
    keep = torch.rand(batch, classes, device=device) > 0.3 if class_mask else None
    weights = afa_ext.par_affinity(smooth_images(batch, height, width, torch.float64, device), dilations=(1, 3))
    masks = torch.rand(shape, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w, m: afa_ext.par_propagate(w, m, dilations=(1, 3), num_iter=3, class_mask=keep),
        (weights.requires_grad_(), masks),
    )


@KINDS
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compile_fullgraph(kind, dynamic, device):
    def loss(images, masks, keep):
        return refine(kind, images, masks, class_mask=keep).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for height in (10, 12):
        images, keep = smooth_images(2, 20, 24, device=device), torch.tensor([[True, False]] * 2, device=device)
        masks = torch.rand(2, 2, height, 12, device=device, requires_grad=True)
        grads = [torch.autograd.grad(f(images, masks, keep), masks)[0] for f in (loss, compiled)]
        torch.testing.assert_close(grads[1], grads[0])


@KINDS
def test_autocast(kind, device):
    images, masks = smooth_images(1, 16, 16, device=device), torch.rand(1, 2, 16, 16, device=device)
    low = torch.float16 if device == "cuda" else torch.bfloat16
    with torch.autocast(device, dtype=low):
        out = refine(kind, images, masks.to(low))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, refine(kind, images, masks.to(low).float()))


@KINDS
@pytest.mark.parametrize("classes", [1, 5, 21])
def test_threads_change_nothing(kind, classes, threads):
    images, masks = smooth_images(2, 50, 61), torch.rand(2, classes, 50, 61)
    results = []
    for count in (1, 2, 3):
        threads(count)
        weights = affinity(kind, images).requires_grad_()
        leaf = masks.clone().requires_grad_()
        out = afa_ext.par_propagate(weights, leaf)
        results.append([weights.detach(), out, *torch.autograd.grad(out.square().sum(), (leaf, weights))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


SIMD_SCRIPT = """
import sys, torch, afa_ext
results = [afa_ext.build_info()["simd"]]
for case in torch.load(sys.argv[1]):
    for affinity in (afa_ext.par_affinity, afa_ext.pamr_affinity):
        weights = affinity(case["images"]).requires_grad_()
        masks = case["masks"].requires_grad_()
        out = afa_ext.par_propagate(weights, masks)
        grads = torch.autograd.grad((out * case["grad"]).sum(), (masks, weights))
        results += [weights.detach(), out.detach(), *grads]
torch.save(results, sys.argv[2])
"""


@pytest.mark.slow
def test_instruction_sets_agree(tmp_path, assert_relative):
    """Each level of this machine, in a separate process, compared with the baseline."""
    cases = []
    for classes, width in ((2, 75), (21, 33)):
        masks, grad = torch.rand(2, 2, classes, 20, width)
        cases.append({"images": smooth_images(2, 20, width), "masks": masks, "grad": grad})
    torch.save(cases, tmp_path / "cases.pt")
    results = {}
    for level in afa_ext.build_info()["simd_levels"]:
        target = tmp_path / f"{level}.pt"
        run = subprocess.run(
            [sys.executable, "-c", SIMD_SCRIPT, str(tmp_path / "cases.pt"), str(target)],
            env={**os.environ, "AFA_EXT_SIMD": level},
            capture_output=True,
            text=True,
            check=False,
        )
        if "this processor lacks" in run.stderr:
            continue
        assert run.returncode == 0, run.stderr
        used, *results[level] = torch.load(target)
        assert used == level
    assert len(results["baseline"]) == 16
    for result in results.values():
        for actual, expected in zip(result, results["baseline"], strict=True):
            assert_relative(actual, expected, 2e-5)  # the order of sums, fused or not, ten times over


def peak_bytes(run):
    """Peak memory of torch's CPU allocator during run(), from the profiler's record of each allocation."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        out = run()  # noqa: F841  (alive to the end)
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_memory_is_the_weights_and_two_buffers_of_the_masks():
    batch, classes, height, width = 2, 7, 96, 120
    images, masks = smooth_images(batch, height, width), torch.rand(batch, classes, height, width)
    keep = torch.zeros(batch, classes, dtype=torch.bool)
    keep[:, :2] = True
    row = 16 * 11  # left border 24 -> 32, then 120 + 24 = 9 * 16: an odd multiple of 16 in all
    weights, result = 4 * batch * 48 * height * width, masks.nbytes
    with torch.no_grad():
        for kind in ("par", "pamr"):
            for class_mask, maps in ((None, batch * classes), (keep, 2 * batch)):
                buffers = 2 * 4 * maps * height * row
                measured = peak_bytes(lambda: refine(kind, images, masks, class_mask=class_mask))  # noqa: B023
                assert 0 <= measured - (weights + buffers + result) <= 4096


@pytest.mark.cuda
def test_side_stream_and_repeats():
    images, masks = smooth_images(2, 64, 64, device="cuda"), torch.rand(2, 3, 64, 64, device="cuda")
    expected = afa_ext.par_refine(images, masks)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = afa_ext.par_refine(images, masks)
    stream.synchronize()
    assert torch.equal(out, expected)


# The entries of the published modules in checkpoints.
PUBLISHED = {
    "PAR": {"kernel": torch.ones(8, 1, 3, 3)},
    "PAMR": {
        f"{part}.kernel": torch.ones(9 if part == "aff_std" else 8, 1, 3, 3) for part in ("aff_x", "aff_m", "aff_std")
    },
}


@pytest.mark.parametrize("name", ["PAR", "PAMR"])
class TestModule:
    def test_published_buffers_load(self, name):
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.head = torch.nn.Linear(2, 2)
                self.par = getattr(afa_ext, name)(dilations=[1, 2, 4, 8, 12, 24], num_iter=10)

        model = Model()
        assert set(model.state_dict()) == {"head.weight", "head.bias"}
        old = {**Model().state_dict(), **{f"par.{key}": value for key, value in PUBLISHED[name].items()}}
        model.load_state_dict(old, strict=True)
        assert torch.equal(model.head.weight, old["head.weight"])
        for typo in ("typo", "par.typo", "par.kernel.typo"):
            with pytest.raises(RuntimeError, match=typo):
                model.load_state_dict({**old, typo: torch.ones(1)})
            model.load_state_dict({**old, typo: torch.ones(1)}, strict=False)
        model.par.load_state_dict(PUBLISHED[name])

    def test_is_an_ordinary_module(self, name):
        arguments = {"dilations": [1, 2], "num_iter": 3}
        module = getattr(afa_ext, name)(**arguments).to(torch.float64).half().eval()
        images, masks = smooth_images(1, 8, 8), torch.rand(1, 2, 8, 8)
        expected = refine(name.lower(), images, masks, **arguments)
        for twin in (
            module,
            copy.deepcopy(module),
            pickle.loads(pickle.dumps(module)),
            torch.nn.Sequential(module)[0],
            getattr(reference, name)(**arguments),
        ):
            torch.testing.assert_close(twin(images, masks), expected)
        assert module(images.half(), masks.half()).dtype == torch.float16
        assert not list(module.parameters()) and not list(module.buffers())
        assert "num_iter=3" in repr(module)

    def test_resizes_as_its_family_does(self, name):
        images, masks = smooth_images(1, 12, 16), torch.rand(1, 2, 6, 7)
        for family in (afa_ext, reference):
            module = getattr(family, name)
            assert module(dilations=[1, 2], num_iter=1)(images, masks).shape == (1, 2, 12, 16)
            of_weclip = functools.partial(module, resize="image_to_mask")
            out = of_weclip(num_iter=2, dilations=[1, 2])(images, masks)
            torch.testing.assert_close(
                out, refine(name.lower(), images, masks, dilations=(1, 2), num_iter=2, resize="image_to_mask")
            )

    def test_constructor_errors(self, name):
        module = getattr(afa_ext, name)
        with pytest.raises(ValueError, match="resize must be one of 'mask_to_image', 'image_to_mask', got 'crop'"):
            module(dilations=[1], num_iter=1, resize="crop")
        with pytest.raises(TypeError, match="num_iter must be an integer"):
            module(dilations=[1], num_iter=[1])
        with pytest.raises(TypeError, match="dilations must be a sequence of integers, got 3"):
            module(dilations=3, num_iter=1)


def test_published_signatures():
    for module in (afa_ext, reference):
        par, pamr = module.PAR([1, 2], 3), module.PAMR(3, [1, 2])
        assert par.num_iter == pamr.num_iter == 3
        assert list(par.dilations) == list(pamr.dilations) == [1, 2]
        plain = module.PAMR()
        assert plain.num_iter == 1 and list(plain.dilations) == [1]
        images, masks = smooth_images(1, 6, 6), torch.rand(1, 2, 6, 6)
        torch.testing.assert_close(par(imgs=images, masks=masks), par(images, masks))
        torch.testing.assert_close(pamr(x=images, mask=masks), pamr(images, masks))


X, M = torch.rand(2, 3, 8, 8), torch.rand(2, 4, 8, 8)
W = torch.rand(2, 48, 8, 8)
KEEP = torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize("module", [afa_ext, reference], ids=["native", "reference"])
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.par_affinity(X.numpy()), TypeError, r"images must be a floating-point tensor \[B, 3, H, W\]"),
        (lambda m: m.par_affinity(X[0]), ValueError, r"images must have 4 dimensions .* shape \(3, 8, 8\)"),
        (lambda m: m.par_affinity(X.byte()), TypeError, r"images must be .*torch.uint8.*pass images.float\(\) / 255"),
        (lambda m: m.par_affinity(X.long()), TypeError, r"images must be float32, .*torch.int64.*images.float\(\)"),
        (lambda m: m.pamr_affinity(X.byte()), TypeError, r"images must be .*torch.uint8.*pass images.float\(\) / 255"),
        (lambda m: m.pamr_affinity(X[:, :0]), ValueError, "images must have at least one color channel"),
        (lambda m: m.pamr_affinity(X, dilations=(0,)), ValueError, "dilations' entries must be between 1 and"),
        (lambda m: m.par_refine(X.byte(), M), TypeError, r"images must be .*torch.uint8.*pass images.float\(\) / 255"),
        (lambda m: m.pamr_refine(X.byte(), M), TypeError, r"images must be .*torch.uint8.*pass images.float\(\) / 255"),
        (
            lambda m: m.pamr_refine(X, M, resize="crop"),
            ValueError,
            "resize must be one of 'mask_to_image'.* got 'crop'",
        ),
        (lambda m: m.pamr_refine(X, M, num_iter=-1), ValueError, "num_iter must be at least 0, got -1"),
        (lambda m: m.par_affinity(X[:, :0]), ValueError, "images must have at least one color channel"),
        (lambda m: m.par_affinity(X, w1=0), ValueError, "w1 must be greater than 0, got 0"),
        (lambda m: m.par_affinity(X, w1=float("nan")), ValueError, "w1 must be greater than 0, got nan"),
        (lambda m: m.par_affinity(X, w1="a"), TypeError, r"w1 must be a number, got 'a' \(str\)"),
        (lambda m: m.par_affinity(X, w2=-1.0), ValueError, "w2 must be 0 or more, got -1.0"),
        (lambda m: m.par_affinity(X, dilations=()), ValueError, "dilations must have 1 to 32 integers, got 0"),
        (lambda m: m.par_affinity(X, dilations=[1] * 33), ValueError, "dilations must have 1 to 32 integers, got 33"),
        (lambda m: m.par_affinity(X, dilations=3), TypeError, "dilations must be a sequence of integers, got 3"),
        (lambda m: m.par_affinity(X, dilations=(0,)), ValueError, "dilations' entries must be between 1 and"),
        (lambda m: m.par_affinity(X, dilations=(1.5,)), TypeError, "dilations' entries must be an integer, got 1.5"),
        (lambda m: m.par_propagate(W[0], M), ValueError, "weights must have 4 dimensions"),
        (lambda m: m.par_propagate(W[:, :40], M), ValueError, "weights must have size 48 in dimension 1"),
        (lambda m: m.par_propagate(W, M[:1]), ValueError, r"masks must have size 2 in dimension 0 \(the batch of"),
        (lambda m: m.par_propagate(W, M[:, :, :7]), ValueError, r"masks must have size 8 in dimension 2 \(the height"),
        (lambda m: m.par_propagate(W, M[..., :7]), ValueError, r"masks must have size 8 in dimension 3 \(the width"),
        (lambda m: m.par_propagate(W, M.double()), TypeError, r"masks must have the type of weights \(torch.float32\)"),
        (lambda m: m.par_propagate(W, M.to("meta")), ValueError, r"masks must be on the device of weights \(cpu\)"),
        (lambda m: m.par_propagate(W, M, num_iter=-1), ValueError, "num_iter must be at least 0, got -1"),
        (lambda m: m.par_propagate(W, M, num_iter=2.0), TypeError, "num_iter must be an integer, got 2.0"),
        (lambda m: m.par_propagate(W, M, class_mask=KEEP.float()), TypeError, r"class_mask must be a bool tensor"),
        (lambda m: m.par_propagate(W, M, class_mask=KEEP[:, :3]), ValueError, r"class_mask must have shape \(2, 4\)"),
        (lambda m: m.par_refine(X, M[0]), ValueError, "masks must have 4 dimensions"),
        (lambda m: m.par_refine(X, M.long()), TypeError, "masks must be float32"),
        (lambda m: m.par_refine(X, M[:1]), ValueError, r"masks must have size 2 in dimension 0 \(the batch of images"),
        (lambda m: m.par_refine(X, M.to("meta")), ValueError, "masks must be on the device of images"),
        (lambda m: m.par_refine(X, M, resize="crop"), ValueError, "resize must be one of 'mask_to_image'.* got 'crop'"),
        (lambda m: m.par_refine(X, M[..., :0]), ValueError, "masks and images must both have at least one pixel"),
    ],
)
def test_errors(module, call, error, message):
    with pytest.raises(error, match=message):
        call(module)


def test_images_have_no_gradient():
    images = X.clone().requires_grad_()
    for call in (
        lambda: afa_ext.par_affinity(images),
        lambda: afa_ext.par_refine(images, M),
        lambda: afa_ext.pamr_affinity(images),
        lambda: afa_ext.pamr_refine(images, M),
    ):
        with pytest.raises(ValueError, match=r"images requires grad, .* pass images.detach\(\)"):
            call()
        with torch.no_grad():
            call()
    assert afa_ext.par_refine(images.detach(), M).shape == M.shape


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.par_affinity(X[0], [1], 0.3, 0.01), r"images must have shape .* got \[3, 8, 8\]"),
        (lambda o: o.par_affinity(X.long(), [1], 0.3, 0.01), "images must be float32"),
        (lambda o: o.par_affinity(X, [], 0.3, 0.01), "dilations must have 1 to 32"),
        (lambda o: o.par_affinity(X, [0], 0.3, 0.01), "dilations' entries must be at least 1"),
        (lambda o: o.par_affinity(X, [1], 0.0, 0.01), "w1 must be greater than 0"),
        (lambda o: o.pamr_affinity(X[0], [1]), r"images must have shape .* got \[3, 8, 8\]"),
        (lambda o: o.pamr_affinity(X[:, :0], [1]), "images must have at least one color channel"),
        (lambda o: o.pamr_affinity(X, [0]), "dilations' entries must be at least 1"),
        (lambda o: o.par_propagate(W, M, [1], 1, None), "weights must have shape"),
        (lambda o: o.par_propagate(W, M[:1], list(D6), 1, None), "masks must have shape"),
        (lambda o: o.par_propagate(W, M.double(), list(D6), 1, None), "masks must have the type of weights"),
        (lambda o: o.par_propagate(W, M, list(D6), 0, None), "par_propagate: the number of steps must be at least 1"),
        (lambda o: o.par_propagate(W, M, list(D6), 1, KEEP[:1]), "class_mask must have shape"),
        (lambda o: o.par_propagate(W, M, list(D6), 1, KEEP.float()), "class_mask must be bool"),
        (lambda o: o.par_propagate_backward_masks(M[:1], W, list(D6), 1, None), "grad must have shape"),
        (lambda o: o.par_propagate_backward_weights(M[:1], W, M, list(D6), 1, None), "grad must have shape"),
    ],
)
def test_errors_of_the_operators_themselves(call, message):
    with pytest.raises(RuntimeError, match="^" + message):
        call(torch.ops.afa_ext)
