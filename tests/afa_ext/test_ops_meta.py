"""Runs torch's opcheck for every registered operator: schema, autograd, fakes, AOTAutograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import afa_ext
from afa_ext import _native, reference

DILATIONS = [1, 3]
WALK = (4, 5, 1, "disc")  # height, width, radius, window: 1 offset
SQUARE = (4, 5, 2, "square")  # 25 offsets

Make = Callable[..., Tensor]


def keep(make: Make) -> Tensor:
    return torch.tensor([[True, False, True]] * 2, device=make(1).device)


def wide_weights(make: Make) -> Tensor:
    """PAR weights in the accumulation type."""
    weights = make(2, 16, 4, 4).detach()
    return weights if weights.dtype == torch.float64 else weights.float()


def numbers(make: Make, *shape: int) -> Tensor:
    """uint8, 0 to 2."""
    return torch.randint(0, 3, shape, dtype=torch.uint8, device=make(1).device)


def in_sum_type(t: Tensor) -> Tensor:
    """float64 unchanged, otherwise float32."""
    return t.detach() if t.dtype == torch.float64 else t.detach().float()


def features(make: Make, dims: int) -> Tensor:
    return 3 * make(2, dims, 6, 7).detach().float()


def lattice(make: Make, dims: int) -> Tensor:
    return torch.ops.afa_ext.lattice_build(features(make, dims))


# For each operator, argument lists made by make(*shape): a random leaf of the device and type under test.
CASES: dict[str, Callable[[Make], list[tuple]]] = {
    "affinity_from_attention": lambda make: [
        (make(2, 3, 20, 20), make(3), make(1), 4, 5, None, False),
        (make(2, 3, 20, 20).mT, make(3), make(1), 4, 5, 1, True),
        (make(2, 3, 20, 20), make(3).detach(), make(1).detach(), 4, 5, 2, False),
    ],
    "affinity_from_attention_backward_attention": lambda make: [
        (make(2, 20, 20).detach(), make(2, 20, 20).detach(), make(3).detach(), 4, 5, None, False),
        (make(2, 20, 9).detach(), make(2, 20, 9).detach(), make(3).detach(), 4, 5, 1, True),
    ],
    "affinity_from_attention_backward_weight": lambda make: [
        (make(2, 20, 20).detach(), make(2, 20, 20).detach(), make(2, 3, 20, 20).detach(), 4, 5, None, False),
        (make(2, 20, 9).detach(), make(2, 20, 9).detach(), make(2, 3, 20, 20).detach(), 4, 5, 1, True),
    ],
    "affinity_labels": lambda make: [
        (numbers(make, 2, 4, 5).long(), 1, 2, False, None),
        (numbers(make, 2, 4, 5).long(), 1, 255, True, 0),
    ],
    "affinity_loss": lambda make: [
        (make(2, 20, 9), numbers(make, 2, 20, 9), 0.5, 0.5, 0.0, None),
        (make(2, 9, 20).mT, numbers(make, 2, 20, 9), 0.5, 0.2, 0.3, numbers(make, 3).long()),
    ],
    "affinity_loss_backward": lambda make: [(in_sum_type(make(10)), in_sum_type(make(10)), numbers(make, 2, 20, 9))],
    "lattice_build": lambda make: [(features(make, 5),), (features(make, 2).mT,)],
    "lattice_filter": lambda make: [
        (make(2, 3, 6, 7), lattice(make, 5), 5, "symmetric", False),
        (make(2, 3, 7, 6).mT, lattice(make, 2)[:1], 2, "after", True),
    ],
    "mean_field": lambda make: [
        (make(2, 3, 6, 7).detach(), lattice(make, 2)[:1], lattice(make, 5), 3.0, 4.0, None, None, True, 2),
        (
            make(2, 3, 7, 6).detach().mT,
            lattice(make, 2),
            lattice(make, 5),
            *(3.0, 4.0),
            make(3, 3).detach().float(),
            keep(make),
            False,
            1,
        ),
    ],
    "par_affinity": lambda make: [(make(2, 3, 6, 7).detach(), DILATIONS, 0.3, 0.01)],
    "pamr_affinity": lambda make: [(make(2, 3, 6, 7).detach(), DILATIONS)],
    "par_propagate": lambda make: [
        (make(2, 16, 6, 7), make(2, 3, 6, 7), DILATIONS, 2, None),
        (make(2, 16, 6, 7), make(2, 3, 7, 6).mT, DILATIONS, 1, keep(make)),
    ],
    "par_propagate_backward_masks": lambda make: [
        (make(2, 3, 6, 7).detach(), make(2, 16, 6, 7).detach(), DILATIONS, 2, keep(make)),
    ],
    "par_propagate_backward_weights": lambda make: [
        (make(2, 3, 6, 7).detach(), make(2, 16, 6, 7).detach(), make(2, 3, 6, 7).detach(), DILATIONS, 2, keep(make)),
    ],
    "walk_transition": lambda make: [
        (make(2, 20, 20), *SQUARE, 2.0, True, 0.1),
        (make(2, 20, 1), *WALK, 1.5, False, 0.1),
    ],
    "walk_transition_backward": lambda make: [
        (make(2, 25, 4, 5).detach(), make(2, 20, 20).detach(), *SQUARE, 2.0, True, 0.1),
    ],
    "walk_transpose": lambda make: [(make(2, 25, 4, 5), 2, "square")],
    "walk_step": lambda make: [
        (make(2, 3, 4, 5), make(2, 20, 20), 2, "square", 2.0, True, 0.1, None),
        (make(2, 3, 4, 5), make(2, 25, 20).mT, 2, "square", 1.5, False, 0.1, keep(make)),
    ],
    "edge_affinity": lambda make: [(make(2, 4, 5).detach(), 3)],
    "feature_affinity": lambda make: [(make(2, 6, 4, 5), 3), (make(2, 6, 5, 4).mT, 1)],
    "feature_affinity_backward": lambda make: [
        (make(2, 25, 4, 5).detach(), make(2, 6, 4, 5).detach(), make(2, 25, 4, 5).detach(), 3),
    ],
    "walk_propagate": lambda make: [
        (make(2, 3, 4, 5), make(2, 25, 4, 5), 2, "square", 2, None),
        (make(2, 3, 4, 5), make(2, 25, 4, 5), 2, "square", 1, keep(make)),
    ],
    "walk_propagate_backward_scores": lambda make: [
        (make(2, 3, 4, 5).detach(), make(2, 25, 4, 5).detach(), 2, "square", 2, None),
    ],
    "walk_propagate_backward_transition": lambda make: [
        (make(2, 3, 4, 5).detach(), make(2, 3, 4, 5).detach(), make(2, 25, 4, 5).detach(), 2, "square", 2, None),
    ],
    "refine_labels": lambda make: [
        (
            (make(2, 3, 8, 9).detach() * 255).byte(),
            make(2, 4, 3, 4).detach(),
            None,
            keep(make),
            None,
            None,
            wide_weights(make),
            *(2, DILATIONS, 2, 0.3, 0.01, 0, 255),
        ),
        (
            make(2, 3, 8, 9).detach(),
            make(2, 4, 4, 3).detach().mT,
            make(2, 4, 4, 3).detach().mT,
            keep(make),
            torch.tensor([[4, 7, 1]] * 2, device=make(1).device),
            torch.tensor([[1, 7, 0, 5]] * 2, device=make(1).device),
            None,
            *(2, DILATIONS, 2, 0.3, 0.01, 2, -1),
        ),
    ],
    "pseudo_labels": lambda make: [
        (
            (make(2, 3, 8, 9).detach() * 255).byte(),
            make(2, 3, 8, 9).detach(),
            keep(make),
            None,
            None,
            None,
            *(0.35, 0.55, 2, DILATIONS, 2, 0.3, 0.01, 0, 255),
        ),
        (
            make(2, 3, 8, 9).detach(),
            make(2, 3, 9, 8).detach().mT,
            keep(make),
            torch.tensor([[4, 7, 1]] * 2, device=make(1).device),
            torch.tensor([[1, 7, 0, 5]] * 2, device=make(1).device),
            wide_weights(make),
            *(0.5, 0.5, 2, DILATIONS, 2, 0.3, 0.01, 2, -1),
        ),
    ],
}


def test_every_registered_operator_has_a_case():
    registered = {
        name.partition("::")[2].partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("afa_ext::")
    }
    assert registered == set(_native._C.operators()), "an operator is registered that csrc/operators.h does not list"
    assert registered == set(CASES), "an operator lacks an opcheck case, or a case its operator"


@pytest.mark.parametrize("name", sorted(CASES))
def test_has_kernels_for_both_devices(name):
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"afa_ext::{name}", key)


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str)
def test_opcheck(name, dtype, device):
    def make(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, dtype=dtype).requires_grad_()

    operator = getattr(torch.ops.afa_ext, name).default
    # A lattice's buffer has room for more vertices than there are; the rest is filled here.
    torch.use_deterministic_algorithms(name == "lattice_build")
    try:
        for arguments in CASES[name](make):
            torch.library.opcheck(operator, arguments)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fakes_agree_in_low_precision(name, dtype, device):
    # The gradient of a transition and the scores that meet one are float32 for these types.
    wide = name in ("walk_transition_backward", "walk_step")

    def make(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device).to(torch.float32 if wide and len(shape) == 4 else dtype)

    operator = getattr(torch.ops.afa_ext, name).default
    for arguments in CASES[name](make):
        torch.library.opcheck(operator, arguments, test_utils="test_faketensor")


# Operators with exact tangents, and the arguments; a tangent of any other argument must raise an error.
LINEAR = {
    "affinity_from_attention_backward_attention": {"grad"},
    "affinity_from_attention_backward_weight": {"grad"},
    "affinity_loss_backward": {"grad"},
    "feature_affinity_backward": {"grad"},
    "lattice_filter": {"values"},
    "par_propagate": {"masks"},
    "par_propagate_backward_masks": {"grad"},
    "par_propagate_backward_weights": {"grad", "masks"},
    "walk_propagate": {"scores"},
    "walk_propagate_backward_scores": {"grad"},
    "walk_propagate_backward_transition": {"grad", "scores"},
    "walk_step": {"scores"},
    "walk_transition_backward": {"grad"},
    "walk_transpose": {"transition"},
}


def make_double(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


def floating_arguments(arguments: tuple) -> list[int]:
    return [i for i, t in enumerate(arguments) if isinstance(t, Tensor) and t.is_floating_point()]


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_tangent_is_exact_or_raises(name):
    operator = getattr(torch.ops.afa_ext, name).default
    for arguments in CASES[name](make_double):
        result = operator(*arguments)
        if not result.is_floating_point():
            continue  # labels have no tangent
        for i in floating_arguments(arguments):
            tangent = torch.rand_like(arguments[i])
            argument = operator._schema.arguments[i].name

            def call(value: Tensor, i: int = i, arguments: tuple = arguments) -> Tensor:
                return operator(*arguments[:i], value, *arguments[i + 1 :])

            with forward_ad.dual_level():
                dual = forward_ad.make_dual(arguments[i], tangent)
                if argument not in LINEAR.get(name, ()):
                    with pytest.raises(ValueError, match=f"^{argument} carries a forward-mode tangent"):
                        call(dual)
                    continue
                actual = forward_ad.unpack_dual(call(dual)).tangent
            differences = call(arguments[i] + tangent / 2) - call(arguments[i] - tangent / 2)
            torch.testing.assert_close(actual, differences, rtol=1e-9, atol=1e-9)
            transformed = torch.func.jvp(call, (arguments[i],), (tangent,))[1]
            assert torch.equal(transformed, actual)


@pytest.mark.parametrize("name", sorted(LINEAR))
def test_tangents_of_two_arguments_add_up(name):
    operator = getattr(torch.ops.afa_ext, name).default
    positions = [i for i, argument in enumerate(operator._schema.arguments) if argument.name in LINEAR[name]]
    for arguments in CASES[name](make_double):
        tangents = {i: torch.rand_like(arguments[i]) for i in positions}
        expected = sum(operator(*arguments[:i], t, *arguments[i + 1 :]) for i, t in tangents.items())
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, tangents[i]) if i in tangents else t for i, t in enumerate(arguments)]
            actual = forward_ad.unpack_dual(operator(*duals)).tangent
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(CASES))
def test_func_grad_is_autograd_grad(name):
    def make(*shape: int) -> Tensor:
        return make_double(*shape).requires_grad_()

    operator = getattr(torch.ops.afa_ext, name).default
    for arguments in CASES[name](make):
        learn = [i for i in floating_arguments(arguments) if arguments[i].requires_grad]
        leaves = [arguments[i].detach().requires_grad_() for i in learn]

        def loss(*values: Tensor, learn: list[int] = learn, arguments: tuple = arguments) -> Tensor:
            given = list(arguments)
            for i, value in zip(learn, values, strict=True):
                given[i] = value
            return operator(*given).square().sum()

        if not learn:
            continue
        expected = torch.autograd.grad(loss(*leaves), leaves)
        detached = [t.detach() for t in leaves]
        actual = torch.func.grad(loss, argnums=tuple(range(len(learn))))(*detached)
        torch.compiler.reset()  # else all cases count as recompilations of one function
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        in_graph = torch.autograd.grad(compiled(*leaves), leaves)
        for a, g, e in zip(actual, in_graph, expected, strict=True):
            assert torch.equal(a, e)
            assert torch.equal(g, e)


def test_transforms_nest():
    """Forward over reverse and reverse over forward give the Hessian of |A m|^2 times m, which is its gradient."""
    weights, masks = make_double(1, 16, 6, 7), make_double(1, 3, 6, 7)

    def loss(m: Tensor) -> Tensor:
        return torch.ops.afa_ext.par_propagate(weights, m, DILATIONS, 2, None).square().sum()

    gradient = torch.func.grad(loss)(masks)
    forward_over_reverse = torch.func.jvp(torch.func.grad(loss), (masks,), (masks,))[1]
    reverse_over_forward = torch.func.grad(lambda m: torch.func.jvp(loss, (m,), (masks,))[1])(masks)
    torch.testing.assert_close(forward_over_reverse, gradient)
    torch.testing.assert_close(reverse_over_forward, gradient)
    batched = torch.func.vmap(torch.func.grad(loss))(torch.stack([masks, 2 * masks]))
    torch.testing.assert_close(batched, torch.stack([gradient, 2 * gradient]))


def test_a_tangent_through_jvp_in_a_graph():
    weights, masks = make_double(1, 16, 6, 7), make_double(1, 3, 6, 7)

    def tangent(m: Tensor) -> Tensor:
        def f(m: Tensor) -> Tensor:
            return m + torch.ops.afa_ext.par_propagate(weights, m, DILATIONS, 2, None)

        return torch.func.jvp(f, (m,), (m,))[1]

    compiled = torch.compile(tangent, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(masks), tangent(masks))


@pytest.mark.parametrize("name", ["par_propagate", "walk_step", "walk_propagate", "feature_affinity"])
def test_second_derivatives_warn(name):
    def make(*shape: int) -> Tensor:
        return make_double(*shape).requires_grad_()

    arguments = CASES[name](make)[0]
    leaf = arguments[0]
    first = torch.autograd.grad(getattr(torch.ops.afa_ext, name)(*arguments).square().sum(), leaf, create_graph=True)
    with pytest.warns(UserWarning, match="has no derivative"):
        first[0].sum().backward()


LABELS = torch.tensor([[1, 0, 1]] * 2)
PAIR_LABELS = torch.randint(0, 3, (2, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
FEATURES = 2 * torch.randn(2, 4, 9, 10, generator=torch.Generator().manual_seed(0))
COLORS = torch.randint(0, 60, (2, 3, 9, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
WALKS = [{}, {"direction": "rows"}, {"normalize": "row"}, {"normalize": "sinkhorn"}, {"normalize": None, "steps": 3}]

# For each public operator, the shapes of its floating-point arguments and calls of them. A walk's window covers the
# grid: the reference multiplies by the zeros outside a window, which spreads a NaN further. So does its convolution
# for PAR, to the pixel itself, which the second iteration reaches anyway.
PUBLIC: dict[str, tuple[list[tuple[int, ...]], list[Callable[..., Tensor]]]] = {
    "par_affinity": ([(2, 3, 9, 10)], [lambda m, i: m.par_affinity(i, dilations=DILATIONS)]),
    "pamr_affinity": ([(2, 3, 9, 10)], [lambda m, i: m.pamr_affinity(i, dilations=DILATIONS)]),
    "par_propagate": (
        [(2, 16, 9, 10), (2, 3, 9, 10)],
        [lambda m, w, k: m.par_propagate(w, k, dilations=DILATIONS, num_iter=2, class_mask=LABELS.to(w.device) != 0)],
    ),
    "par_refine": (
        [(2, 3, 18, 20), (2, 3, 9, 10)],
        [lambda m, i, k: m.par_refine(i, k, dilations=DILATIONS, num_iter=2)],
    ),
    "pamr_refine": (
        [(2, 3, 9, 10), (2, 3, 9, 10)],
        [lambda m, i, k: m.pamr_refine(i, k, dilations=DILATIONS, num_iter=2)],
    ),
    "PAR": ([(2, 3, 9, 10), (2, 3, 9, 10)], [lambda m, i, k: m.PAR(DILATIONS, 2)(i, k)]),
    "PAMR": ([(2, 3, 9, 10), (2, 3, 9, 10)], [lambda m, i, k: m.PAMR(2, DILATIONS)(i, k)]),
    "pseudo_labels": (
        [(2, 3, 18, 20), (2, 3, 18, 20)],
        [
            lambda m, i, c: m.pseudo_labels(
                i, c, LABELS.to(i.device), low=0.3, high=0.5, dilations=DILATIONS, num_iter=2
            )
        ],
    ),
    "refine_labels": (
        [(2, 3, 18, 20), (2, 4, 6, 7), (2, 4, 6, 7)],
        [lambda m, i, s, t: m.refine_labels(i, s, LABELS.to(i.device), low_scores=t, dilations=DILATIONS, num_iter=2)],
    ),
    "random_walk": (
        [(2, 3, 4, 5), (2, 20, 20)],
        [
            lambda m, s, a, walk=walk, radius=radius: m.random_walk(s, a, grid=(4, 5), radius=radius, **walk)
            for walk in WALKS
            for radius in (None, 4)
        ],
    ),
    "propagate_cams": (
        [(2, 3, 4, 5), (2, 20, 20)],
        [lambda m, c, a: m.propagate_cams(c, a, LABELS.to(c.device), radius=4, background=0.4)],
    ),
    "propagate_to_edge": ([(3, 4, 5), (1, 4, 5)], [lambda m, x, e: m.propagate_to_edge(x, e)]),
    "edge_affinity": ([(2, 9, 10)], [lambda m, e: m.edge_affinity(e, 4)]),
    "feature_affinity": (
        [(2, 7, 9, 10)],
        [lambda m, f: m.feature_affinity(f, 3), lambda m, f: m.feature_affinity(f, 1)],
    ),
    "affinity_from_attention": (
        [(2, 3, 20, 20), (3,), (1,)],
        [
            lambda m, a, w, b: m.affinity_from_attention(a, w, b),
            lambda m, a, w, b: m.affinity_from_attention(a, w, b, grid=(4, 5), radius=1),
        ],
    ),
    "affinity_loss": ([(2, 20, 20)], [lambda m, a: m.affinity_loss(a, PAIR_LABELS.to(a.device))]),
    "affinity_loss_and_sums": (
        [(2, 20, 20)],
        [lambda m, a: torch.cat([t.view(-1) for t in m.affinity_loss_and_sums(a, PAIR_LABELS.to(a.device))])],
    ),
    "bilateral_filter": (
        [(2, 3, 9, 10)],
        [
            lambda m, v: m.bilateral_filter(v, FEATURES.to(v.device), normalize="symmetric"),
            lambda m, v: m.bilateral_filter(v, images=COLORS.to(v.device), sigma_xy=3.0, sigma_rgb=30.0),
        ],
    ),
    "dense_crf": (
        [(2, 3, 9, 10)],
        [
            lambda m, p: m.dense_crf(COLORS.to(p.device), p, num_iter=1, class_mask=LABELS.to(p.device) != 0),
            lambda m, p: m.dense_crf(COLORS.to(p.device), unaries=p, num_iter=2),
        ],
    ),
    "dense_energy_loss": (
        [(2, 3, 9, 10), (2, 9, 10), (2, 9, 10)],
        [lambda m, p, r, g: m.dense_energy_loss(COLORS.to(p.device), p, weight=0.01, regions=r, gate=g)],
    ),
    "DenseEnergyLoss": (
        [(2, 3, 9, 10), (2, 9, 10)],
        [lambda m, p, r: m.DenseEnergyLoss(0.01, 15, 100, 1.0)(COLORS.to(p.device), p, r)],
    ),
}
NOT_FLOATING = {"affinity_labels", "build_info", "window_offsets"}


def test_every_public_operator_has_a_nan_case():
    assert set(PUBLIC) | NOT_FLOATING == set(afa_ext.__all__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_nan_propagates_as_in_the_reference(name, dtype, device):
    shapes, calls = PUBLIC[name]
    clean = [torch.rand(shape).to(device, dtype) for shape in shapes]
    for i, size in enumerate(t.numel() for t in clean):
        for place in {0, size * 5 // 9, size - 1}:
            arguments = [t.clone() for t in clean]
            arguments[i].view(-1)[place] = torch.nan
            for call in calls:
                actual, expected = call(afa_ext, *arguments), call(reference, *arguments)
                if actual.is_floating_point():
                    actual, expected = actual.isnan(), expected.isnan()
                assert torch.equal(actual, expected)


def test_nan_in_the_gradient_of_features(device):
    for place in (0, 100, 300):
        features = torch.rand(1, 7, 9, 10, device=device)
        features.view(-1)[place] = torch.nan
        grads = []
        for module in (afa_ext, reference):
            leaf = features.clone().requires_grad_()
            module.feature_affinity(leaf, 3).sum().backward()
            assert leaf.grad is not None
            grads.append(leaf.grad.isnan())
        assert grads[0].any()
        assert torch.equal(*grads)
