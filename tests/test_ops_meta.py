"""Every registered operator goes through torch's own opcheck: schema, autograd, fakes, AOTAutograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from afa_ext import _native

DILATIONS = [1, 3]
WALK = (4, 5, 1, "disc")  # height, width, radius, window: 1 offset
SQUARE = (4, 5, 2, "square")  # 25 offsets

Make = Callable[..., Tensor]


def keep(make: Make) -> Tensor:
    return torch.tensor([[True, False, True]] * 2, device=make(1).device)


def wide_weights(make: Make) -> Tensor:
    """PAR weights in the type sums are formed in."""
    weights = make(2, 16, 4, 4).detach()
    return weights if weights.dtype == torch.float64 else weights.float()


def numbers(make: Make, *shape: int) -> Tensor:
    """uint8, 0 to 2."""
    return torch.randint(0, 3, shape, dtype=torch.uint8, device=make(1).device)


def in_sum_type(t: Tensor) -> Tensor:
    """float64 as it is, else float32."""
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
        (numbers(make, 2, 4, 5).long(), 1, 2, False),
        (numbers(make, 2, 4, 5).long(), 1, 255, True),
    ],
    "affinity_loss": lambda make: [
        (make(2, 20, 9), numbers(make, 2, 20, 9)),
        (make(2, 9, 20).mT, numbers(make, 2, 20, 9)),
    ],
    "affinity_loss_backward": lambda make: [(in_sum_type(make(3)), in_sum_type(make(3)), numbers(make, 2, 20, 9))],
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(name, dtype, device):
    def make(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, dtype=dtype).requires_grad_()

    operator = getattr(torch.ops.afa_ext, name).default
    # A lattice's buffer has room for more vertices than there are; here what is left over is filled.
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
