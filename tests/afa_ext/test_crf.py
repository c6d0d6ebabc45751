from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import afa_ext
from afa_ext import reference
from afa_ext.reference.crf import exact_filter, image_features

NORMALIZE = (None, "symmetric", "before", "after")


def picture(batch, height, width, device="cpu", smooth=8):
    """uint8: smooth colors with a little noise."""
    coarse = torch.rand(batch, 3, max(2, height // smooth), max(2, width // smooth))
    colors = F.interpolate(coarse, size=(height, width), mode="bilinear") * 235
    return (colors + 20 * torch.rand(batch, 3, height, width)).byte().to(device)


def soft_labels(batch, classes, height, width, device="cpu"):
    coarse = 2 * torch.randn(batch, classes, max(2, height // 6), max(2, width // 6))
    return F.interpolate(coarse, size=(height, width), mode="bilinear").softmax(1).to(device)


# ---- recorded outputs ----


def test_golden_bilateral(golden, assert_relative, device):
    g = golden("bilateral")
    settings: dict[str, Any] = {"sigma_xy": g["sigma_xy"], "sigma_rgb": g["sigma_rgb"]}
    images, probs = g["images"].to(device), g["probs"].to(device)
    for module in (afa_ext, reference):
        out = module.bilateral_filter(probs, images=images, **settings)
        assert_relative(out, g["filtered_permutohedral"], 1e-5)


def test_golden_crf(golden, device):
    g = golden("dense_crf")
    image, probs = g["image"].permute(2, 0, 1)[None].to(device), g["probs"][None].to(device)
    for module in (afa_ext, reference):
        for preset, iterations, key in (("afa", 10, "afa_it10"), ("psa", 1, "alt_it1")):
            out = module.dense_crf(image, probs, **{**afa_ext.CRF_PRESETS[preset], "num_iter": iterations})
            assert float((out[0].cpu() - g[key]).abs().max()) < 1e-5


# ---- the filter ----


@pytest.mark.parametrize("dims", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_filter_is_the_reference(dims, normalize, device, assert_relative):
    values, features = torch.rand(2, 3, 7, 11, device=device), 2 * torch.randn(2, dims, 7, 11, device=device)
    expected = reference.bilateral_filter(values.cpu(), features.cpu(), normalize=normalize)
    assert_relative(afa_ext.bilateral_filter(values, features, normalize=normalize), expected, 1e-5)


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 32, 33, 65, 171])
def test_any_number_of_channels(channels, device, assert_relative):
    values, images = torch.rand(1, channels, 9, 13, device=device), picture(1, 9, 13, device)
    settings: dict[str, Any] = {"images": images, "sigma_xy": 5.0, "sigma_rgb": 20.0, "normalize": "after"}
    out = afa_ext.bilateral_filter(values, **settings)
    for c in (0, channels // 2, channels - 1):
        alone = afa_ext.bilateral_filter(values[:, c : c + 1], **settings)
        assert_relative(out[:, c : c + 1], alone, 1e-6)


@pytest.mark.parametrize("dims", [2, 5])
def test_lattice_approximates_the_exact_filter(dims):
    """Means over the kernel: the lattice's is a little wider, so that results agree where the kernel is smooth. Random
    values in 0 to 1 are averaged over dozens of pixels; the worst is a pixel in a corner."""
    height, width = 24, 32
    features = image_features(picture(1, height, width)[0], 6.0, 60.0)[:dims]
    values = soft_labels(1, 3, height, width)
    lattice = afa_ext.bilateral_filter(values, features.view(1, dims, height, width), normalize="after")
    ones = torch.ones(1, height * width)
    exact = exact_filter(values[0].flatten(1), features) / exact_filter(ones, features)
    error = (lattice[0].flatten(1) - exact).abs()
    assert float(error.mean()) < 0.01
    assert float(error.max()) < 0.1
    unfiltered = (values[0].flatten(1) - exact).abs()
    assert float(error.mean()) < 0.2 * float(unfiltered.mean())  # else a filter that does nothing would pass


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_gradient_of_the_filter(normalize, device):
    values = torch.rand(2, 3, 5, 6, dtype=torch.float64, device=device, requires_grad=True)
    features = 2 * torch.randn(2, 3, 5, 6, device=device)
    assert torch.autograd.gradcheck(
        lambda v: afa_ext.bilateral_filter(v, features, normalize=normalize), (values,), nondet_tol=0
    )


def test_second_gradient_of_the_filter():
    values = torch.rand(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    features = torch.randn(1, 5, 4, 5)
    assert torch.autograd.gradgradcheck(lambda v: afa_ext.bilateral_filter(v, features, normalize="after"), (values,))


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)], ids=["float16", "bfloat16"]
)
def test_half_precision_is_rounded_once(dtype, limit, device, assert_relative):
    """Sums in float32: what is lost is the rounding of the result, half a unit of 2^-10 or 2^-7."""
    values, images = torch.rand(2, 5, 17, 19, device=device).to(dtype), picture(2, 17, 19, device)
    settings: dict[str, Any] = {"images": images, "sigma_xy": 9.0, "sigma_rgb": 20.0, "normalize": "after"}
    out = afa_ext.bilateral_filter(values, **settings)
    assert out.dtype == dtype
    assert_relative(out, afa_ext.bilateral_filter(values.float(), **settings), limit)


def test_layouts(device):
    values, images = torch.rand(2, 3, 9, 14, device=device), picture(2, 9, 14, device)
    settings: dict[str, Any] = {"sigma_xy": 9.0, "sigma_rgb": 20.0}
    expected = afa_ext.bilateral_filter(values, images=images, **settings)
    last = torch.channels_last
    strided = torch.stack((values, values), dim=-1)[..., 0]
    for v in (values.to(memory_format=last), strided, values.mT.contiguous().mT):
        out = afa_ext.bilateral_filter(v, images=images.to(memory_format=last), **settings)
        assert torch.equal(out, expected)
    probabilities = values.softmax(1)
    expected = afa_ext.dense_crf(images, probabilities, num_iter=2)
    for p in (probabilities.to(memory_format=last), probabilities.mT.contiguous().mT):
        assert torch.equal(afa_ext.dense_crf(images.mT.contiguous().mT, p, num_iter=2), expected)


def test_results_do_not_depend_on_threads_or_batch(threads):
    images, probabilities = picture(2, 90, 130), soft_labels(2, 21, 90, 130)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(afa_ext.dense_crf(images, probabilities, num_iter=3))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    for b in range(2):
        assert torch.equal(afa_ext.dense_crf(images[b : b + 1], probabilities[b : b + 1], num_iter=3)[0], results[0][b])


@pytest.mark.parametrize("count", [1, 2, 8])  # of threads: with up to 4, each takes whole images
def test_error_names_the_first_image_with_invalid_features(threads, count):
    threads(count)
    features = torch.rand(4, 2, 5, 6)
    features[2, 1, 3, 3], features[3, 0, 0, 0] = float("nan"), 1e30
    with pytest.raises(RuntimeError, match="which those of image 2 are not"):
        torch.ops.afa_ext.lattice_build(features)


# ---- the CRF ----


@pytest.mark.parametrize("size", [(1, 1), (1, 23), (17, 1), (13, 21)], ids=str)
@pytest.mark.parametrize("flat", [False, True])
def test_crf_is_the_reference(size, flat, device):
    height, width = size
    images = picture(2, height, width, device)
    if flat:
        images = torch.full_like(images, 77)
    probabilities = soft_labels(2, 5, height, width, device)
    out = afa_ext.dense_crf(images, probabilities, num_iter=3)
    expected = reference.dense_crf(images.cpu(), probabilities.cpu(), num_iter=3)
    assert out.dtype == torch.float32
    assert float((out.cpu() - expected).abs().max()) < 2e-5


@pytest.mark.parametrize("classes", [1, 171])
def test_crf_of_one_and_many_classes(classes, device):
    images, probabilities = picture(1, 12, 17, device), soft_labels(1, classes, 12, 17, device)
    out = afa_ext.dense_crf(images, probabilities, num_iter=2)
    expected = reference.dense_crf(images.cpu(), probabilities.cpu(), num_iter=2)
    assert float((out.cpu() - expected).abs().max()) < 2e-5


def test_compatibility_and_masked_classes(device):
    images, unaries = picture(3, 11, 14, device), 3 * torch.rand(3, 4, 11, 14, device=device)
    compat = torch.randn(4, 4, device=device)
    keep = torch.tensor([[True, True, True, True], [False, True, True, False], [False] * 4], device=device)
    settings: dict[str, Any] = {"num_iter": 3, "gaussian": (2.0, 1.5), "bilateral": (20.0, 9.0, 2.0)}
    out = afa_ext.dense_crf(images, unaries=unaries, compat=compat, class_mask=keep, **settings)
    expected = reference.dense_crf(
        images.cpu(), unaries=unaries.cpu(), compat=compat.cpu(), class_mask=keep.cpu(), **settings
    )
    assert float((out.cpu() - expected).abs().max()) < 2e-5
    assert not out[~keep].any()
    potts = afa_ext.dense_crf(images, unaries=unaries, compat=-torch.eye(4, device=device), **settings)
    assert float((potts - afa_ext.dense_crf(images, unaries=unaries, **settings)).abs().max()) < 1e-5


def test_weights_and_iterations_of_nothing(device):
    images, probabilities = picture(1, 11, 14, device), soft_labels(1, 4, 11, 14, device)
    none = afa_ext.dense_crf(images, probabilities, num_iter=0)
    assert float((none - probabilities).abs().max()) < 1e-5
    unweighted = afa_ext.dense_crf(images, probabilities, gaussian=(3, 0), bilateral=(64, 5, 0), num_iter=4)
    assert torch.equal(unweighted, none)
    one = afa_ext.dense_crf(images, probabilities, gaussian=(3, 0), num_iter=2)
    expected = reference.dense_crf(images.cpu(), probabilities.cpu(), gaussian=(3, 0), num_iter=2)
    assert float((one.cpu() - expected).abs().max()) < 2e-5


def pydensecrf(image, probabilities, num_iter, gaussian, bilateral):
    densecrf = pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not installed")
    classes, height, width = probabilities.shape
    crf = densecrf.DenseCRF2D(width, height, classes)
    energy = -np.log(np.clip(probabilities.reshape(classes, -1).numpy(), 1e-5, 1.0))
    crf.setUnaryEnergy(np.ascontiguousarray(energy))
    crf.addPairwiseGaussian(sxy=gaussian[0], compat=gaussian[1])
    colors = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    crf.addPairwiseBilateral(sxy=bilateral[0], srgb=bilateral[1], rgbim=colors, compat=bilateral[2])
    return torch.from_numpy(np.array(crf.inference(num_iter))).view(classes, height, width)


@pytest.mark.parametrize("preset", ["afa", "toco", "excel", "psa", "irn"])
@pytest.mark.parametrize("size", [(1, 1), (1, 30), (29, 1), (61, 83)], ids=str)
@pytest.mark.parametrize("flat", [False, True])
def test_agrees_with_pydensecrf(preset, size, flat):
    image = picture(1, *size) if not flat else torch.full((1, 3, *size), 200, dtype=torch.uint8)
    probabilities = soft_labels(1, 6, *size)
    settings = afa_ext.CRF_PRESETS[preset]
    expected = pydensecrf(image[0], probabilities[0], **settings)
    out = afa_ext.dense_crf(image, probabilities, **settings)[0]
    assert float((out.argmax(0) == expected.argmax(0)).float().mean()) >= 0.999
    assert float((out - expected).abs().max()) < 1e-3


def test_pydensecrf_pads_pixels_to_a_multiple_of_four():
    """It adds the vertices of up to three pixels with features of 0 to its lattice, so that dark pixels blur
    differently. With these pixels, the reference agrees."""
    generator = torch.Generator().manual_seed(5)
    image = torch.randint(4, 14, (3, 31, 33), dtype=torch.uint8, generator=generator)
    probabilities = torch.randn(4, 31 * 33, generator=generator).softmax(0)
    settings: dict[str, Any] = {"num_iter": 1, "gaussian": (3, 0), "bilateral": (16, 5, 4)}
    maps = probabilities.view(4, 31, 33)
    expected = pydensecrf(image, maps, **settings).flatten(1)
    own = reference.dense_crf(image[None], maps[None], **settings)[0].flatten(1)
    lattice = reference.crf.Lattice(F.pad(image_features(image, 16, 5), (0, 1)))
    norm = lattice.apply(F.pad(torch.ones(1, 31 * 33), (0, 1)))
    filtered = lattice.apply(F.pad(probabilities, (0, 1)) * norm.rsqrt()) * norm.rsqrt()
    padded = torch.softmax(probabilities.log() + 4 * filtered[:, :-1], dim=0)
    assert float((padded - expected).abs().max()) < 2e-6
    assert float((own - expected).abs().max()) > 2e-4


# ---- the loss ----


def test_energy_loss_and_gradient(device, assert_relative):
    images, regions = picture(2, 12, 15, device), (torch.rand(2, 12, 15, device=device) > 0.3).double()
    probabilities = soft_labels(2, 4, 12, 15, device).double().requires_grad_()
    settings: dict[str, Any] = {"sigma_rgb": 15.0, "sigma_xy": 20.0, "weight": 1e-3, "regions": regions}
    loss = afa_ext.dense_energy_loss(images, probabilities, **settings)
    (grad,) = torch.autograd.grad(loss, probabilities)
    again = probabilities.detach().cpu().requires_grad_()
    settings["regions"] = regions.cpu()
    expected = reference.dense_energy_loss(images.cpu(), again, **settings)
    (true,) = torch.autograd.grad(expected, again)
    assert_relative(loss, expected, 1e-5)
    masked = probabilities.detach().cpu() * settings["regions"][:, None]
    filtered = reference.bilateral_filter(masked, images=images.cpu(), sigma_xy=20.0, sigma_rgb=15.0)
    assert_relative(grad, -2e-3 / 2 * filtered * settings["regions"][:, None], 1e-5)  # as published
    # Of the loss itself: the order of blurs makes K a little asymmetric; 3 to 4 % in this norm.
    assert float((grad.cpu() - true).norm() / true.norm()) < 0.05


def published_energy(module, images, segmentations, rois, labels):
    """rloss's forward and backward pass, as AFA has them, with this package's filter."""
    factor = module.scale_factor

    def resize(t, **mode):
        return F.interpolate(t, scale_factor=factor, recompute_scale_factor=True, **mode)

    images = resize(images)
    segmentations = resize(segmentations, mode="bilinear", align_corners=False)
    rois = resize(rois.unsqueeze(1)).squeeze(1)
    gate = rois.clone()
    if labels is not None:
        unlabeled = (resize(labels, mode="nearest").long() == 255).squeeze(1)
        gate = rois - segmentations.max(dim=1)[0]
        gate[unlabeled] = 1
        gate[gate < 0] = 0
    else:
        gate = torch.ones_like(rois)
    masked = segmentations * rois.unsqueeze(1)
    sigma_xy = module.sigma_xy * factor
    filtered = reference.bilateral_filter(masked, images=images, sigma_xy=sigma_xy, sigma_rgb=module.sigma_rgb)
    filtered = filtered * gate.unsqueeze(1)
    batch = images.shape[0]
    value = -module.weight * (masked * filtered).sum() / batch
    return value, -2 * module.weight * filtered * rois.unsqueeze(1) / batch


@pytest.mark.parametrize("labeled", [True, False])
def test_energy_module_is_the_published_one(labeled, device, assert_relative):
    module = afa_ext.DenseEnergyLoss(weight=1e-7, sigma_rgb=15, sigma_xy=100, scale_factor=0.5)
    images, rois = picture(2, 16, 20).float(), (torch.rand(2, 16, 20) > 0.2).float()
    segmentations = soft_labels(2, 3, 16, 20)
    labels = torch.where(torch.rand(2, 1, 16, 20) > 0.5, 255.0, 1.0) if labeled else None
    value, small_grad = published_energy(module, images, segmentations, rois, labels)
    leaf = segmentations.to(device).requires_grad_()
    loss = module(images.to(device), leaf, rois.to(device), None if labels is None else labels.to(device))
    assert loss.shape == (1,)
    assert_relative(loss, value.reshape(1), 1e-5)
    (grad,) = torch.autograd.grad(loss, leaf)
    through = segmentations.clone().requires_grad_()
    small = F.interpolate(through, scale_factor=0.5, mode="bilinear", recompute_scale_factor=True)
    (expected,) = torch.autograd.grad(small, through, small_grad)
    assert_relative(grad, expected, 1e-5)
    assert "sigma_xy=100" in repr(module)


# ---- torch ----


def test_compiles_whole(device):
    images, values = picture(1, 8, 9, device), torch.rand(1, 3, 8, 9, device=device)

    def f(images, values):
        values = values.softmax(1)
        out = afa_ext.bilateral_filter(values, images=images, sigma_xy=9.0, sigma_rgb=20.0, normalize="after")
        loss = afa_ext.dense_energy_loss(images, values, sigma_xy=9.0, weight=1.0)
        return out.sum() + loss, afa_ext.dense_crf(images, values.detach(), num_iter=2)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    a, b = values.clone().requires_grad_(), values.clone().requires_grad_()
    (loss, crf), (expected_loss, expected_crf) = compiled(images, a), f(images, b)
    assert torch.allclose(loss, expected_loss)
    assert torch.equal(crf, expected_crf)
    loss.backward()
    expected_loss.backward()
    assert a.grad is not None
    assert b.grad is not None
    assert torch.allclose(a.grad, b.grad)


@pytest.mark.parametrize("shape", [(0, 3, 5, 6), (2, 3, 0, 6), (2, 3, 5, 0), (2, 0, 5, 6)], ids=str)
def test_empty(shape, device):
    values = torch.rand(*shape, device=device)
    images = torch.zeros(shape[0], 3, *shape[2:], dtype=torch.uint8, device=device)
    assert afa_ext.bilateral_filter(values, images=images, sigma_xy=3.0, sigma_rgb=5.0).shape == shape
    assert afa_ext.dense_crf(images, values).shape == shape
    assert float(afa_ext.dense_energy_loss(images, values, weight=1.0)) == 0


@pytest.mark.cuda
def test_crf_in_a_graph(assert_relative):
    images, probabilities = picture(1, 9, 11, "cuda"), soft_labels(1, 4, 9, 11, "cuda")
    expected = afa_ext.dense_crf(images, probabilities, num_iter=2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        afa_ext.dense_crf(images, probabilities, num_iter=2)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = afa_ext.dense_crf(images, probabilities, num_iter=2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def test_extra_memory_is_that_of_the_lattice_and_two_buffers():
    """Counts what the mean field allocates, from the profiler: rows of logits and of probabilities, padded to 8
    channels, 1 float per lattice entry and pixel, and vertex tables, which are part of the lattice."""
    images, probabilities = picture(1, 96, 128), soft_labels(1, 24, 96, 128)
    ops, buffer = torch.ops.afa_ext, probabilities.nbytes
    gaussian = ops.lattice_build(afa_ext.crf._position_features(96, 128, 3.0, images))
    bilateral = ops.lattice_build(afa_ext.crf._image_features(images, 64.0, 5.0))
    settings = (3.0, 4.0, None, None, True, 2)
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.mean_field(probabilities, gaussian, bilateral, *settings)
    taken = sum(e.self_cpu_memory_usage for e in profile.key_averages() if e.self_cpu_memory_usage > 0)
    vertices = [int(lattice[0, 0]) for lattice in (gaussian, bilateral)]
    tables = (sum(vertices) + max(vertices) + 3) * 24 * 4
    assert buffer < taken <= buffer + 2 * buffer + tables  # the result; two buffers


# ---- errors ----


def arguments(**changed):
    given = {"images": picture(2, 4, 5), "probabilities": soft_labels(2, 3, 4, 5)}
    return given | changed


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"probabilities": None}, TypeError, "either probabilities or unaries"),
        ({"unaries": torch.rand(2, 3, 4, 5)}, TypeError, "either probabilities or unaries"),
        ({"probabilities": torch.rand(3, 4, 5)}, ValueError, "probabilities must have 4 dimensions"),
        ({"probabilities": torch.ones(2, 3, 4, 5).long()}, TypeError, "probabilities must be float32"),
        ({"probabilities": torch.rand(2, 3, 4, 5).requires_grad_()}, ValueError, "probabilities requires grad"),
        ({"images": torch.rand(3, 4, 5)}, TypeError, "images must be a tensor"),
        ({"images": torch.ones(2, 3, 4, 5).long()}, TypeError, "images must be uint8 or floating-point"),
        ({"images": torch.rand(2, 1, 4, 5)}, ValueError, "red, green and blue"),
        ({"images": torch.rand(2, 3, 4, 6)}, ValueError, "the width of probabilities"),
        ({"num_iter": -1}, ValueError, "num_iter must be at least 0"),
        ({"gaussian": (3,)}, TypeError, r"gaussian must be \(sigma_xy, weight\)"),
        ({"bilateral": (64, 0, 4)}, ValueError, "bilateral's sigma_rgb must be greater than 0"),
        ({"bilateral": (64, 5, -4)}, ValueError, "bilateral's weight must be 0 or more"),
        ({"compat": "other"}, ValueError, "compat must be one of 'potts'"),
        ({"compat": 3}, TypeError, 'compat must be "potts" or'),
        ({"compat": torch.rand(2, 2)}, ValueError, r"compat must have shape \(3, 3\)"),
        ({"class_mask": torch.ones(2, 3)}, TypeError, "class_mask must be a bool tensor"),
        ({"class_mask": torch.ones(2, 4).bool()}, ValueError, r"class_mask must have shape \(2, 3\)"),
        ({"gaussian": (1e-6, 3)}, RuntimeError, "features must be finite"),
    ],
)
def test_crf_errors(changed, error, message):
    with pytest.raises(error, match=message):
        afa_ext.dense_crf(**arguments(**changed))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, TypeError, "either features or images"),
        ({"features": torch.rand(1, 2, 4, 5), "sigma_xy": 3.0}, TypeError, "belong to images"),
        ({"features": torch.rand(1, 7, 4, 5)}, ValueError, "1 to 6 dimensions"),
        ({"features": torch.rand(1, 2, 4, 6)}, ValueError, "the width of values"),
        ({"features": torch.rand(1, 2, 4, 5).requires_grad_()}, ValueError, "features requires grad"),
        ({"features": torch.full((1, 2, 4, 5), float("nan"))}, RuntimeError, "features must be finite"),
        ({"features": torch.full((1, 2, 4, 5), float("inf"))}, RuntimeError, "features must be finite"),
        ({"images": torch.rand(1, 3, 4, 5)}, TypeError, "images need sigma_xy and sigma_rgb"),
        ({"images": torch.rand(1, 3, 4, 5), "sigma_xy": 0.0, "sigma_rgb": 1.0}, ValueError, "sigma_xy must be greater"),
        ({"features": torch.rand(1, 2, 4, 5), "normalize": "mean"}, ValueError, "normalize must be one of"),
    ],
)
def test_filter_errors(given, error, message):
    with pytest.raises(error, match=message):
        afa_ext.bilateral_filter(torch.rand(1, 2, 4, 5), **given)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"weight": "1"}, TypeError, "weight must be a number"),
        ({"sigma_xy": -1.0}, ValueError, "sigma_xy must be greater than 0"),
        ({"regions": torch.rand(2, 4, 4)}, ValueError, "regions must have shape"),
        ({"gate": torch.rand(2, 1, 4, 5)}, ValueError, "gate must have shape"),
    ],
)
def test_loss_errors(changed, error, message):
    with pytest.raises(error, match=message):
        afa_ext.dense_energy_loss(**({"weight": 1.0} | arguments(**changed)))
