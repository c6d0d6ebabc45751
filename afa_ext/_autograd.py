"""Registers the operators' derivatives, in reverse and forward mode, under torch's ``Autograd`` dispatch keys.

``torch.library.register_autograd`` has no forward mode (it drops tangents) and fails inside the transforms of
``torch.func`` (pytorch#168393). Here each operator gets one ``torch.autograd.Function``, applied by a kernel that the
dispatcher calls once per level of nested transforms; ``torch.compile`` still sees operators.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from . import _native  # noqa: F401  (registers the operators)

_library = torch.library.Library("afa_ext", "IMPL")


class _Call(NamedTuple):
    """What a Function needs in addition to the operator's arguments."""

    keyset: Any
    tangents: tuple[int, ...]  # positions of the arguments that carry one


def tangents_of(*values: object) -> tuple[int, ...]:
    """Positions of the tensors that carry a forward-mode tangent."""
    if forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active():
        return ()
    # Not forward_ad.unpack_dual: its level isn't set when torch.compile traces torch.func.jvp. All levels are 0.
    return tuple(
        i for i, t in enumerate(values) if isinstance(t, Tensor) and torch._VF._unpack_dual(t, level=0)[1] is not None
    )


def check_no_tangent(name: str, value: Tensor) -> None:
    """Raise ValueError for a forward-mode tangent that would otherwise be dropped silently."""
    if tangents_of(value):
        raise ValueError(
            f"{name} carries a forward-mode tangent, but this operator has no forward-mode derivative with respect to "
            f"{name}; pass {name}.detach(), or use the reference implementation in afa_ext.reference"
        )


def register_derivatives(
    name: str,
    *,
    linear: Sequence[str] = (),
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> None:
    """Register the derivatives of an operator.

    ``linear``: the arguments in which the operator is linear. Their tangents are exact (the product rule); a tangent of
    any other argument raises ``ValueError``.

    ``backward`` and ``setup_context`` are those of ``torch.library.register_autograd``. Without them the gradient is
    None, with a warning: second derivatives are not computed.
    """
    operator = getattr(torch.ops.afa_ext, name).default
    names = [argument.name for argument in operator._schema.arguments]
    below = torch._C._after_autograd_keyset

    def run(keyset: Any, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & below, *args)

    def run_levels_below(keyset: Any, args: tuple[Any, ...]) -> Any:
        if not torch._C._are_functorch_transforms_active():
            return run(keyset, args)
        # A Function's forward pass turns both modes off, also for the next level of transforms.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return run(keyset, args)

    # Not torch.autograd.Function, which handles the transforms of torch.func from outside: this kernel runs inside
    # one level of them.
    class Derivatives(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *given, call = args
            result = run_levels_below(call.keyset, tuple(given))
            if setup_context is not None:
                setup_context(ctx=ctx, inputs=tuple(given), output=result)
            if call.tangents:
                ctx.given, ctx.tangents = given, call.tangents
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if backward is not None:
                return *backward(ctx, *grads), None
            warnings.warn(f"afa_ext::{name} has no derivative: its arguments get no gradient", stacklevel=2)
            return (None,) * (len(names) + 1)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            given, total = ctx.given, None
            del ctx.given
            for i in ctx.tangents:
                part = operator(*given[:i], tangents[i], *given[i + 1 :])
                total = part if total is None else total + part
            return total

    Derivatives.__name__ = Derivatives.__qualname__ = f"{name}_derivatives"

    single_level_apply: Callable[..., Any] = getattr(Derivatives, "apply")  # noqa: B009  (mypy doesn't know it)

    def apply(*args: Any) -> Any:
        if not torch._C._are_functorch_transforms_active():
            return single_level_apply(*args)
        with enable_single_level_autograd_function():
            return single_level_apply(*args)

    def kernel(keyset: Any, *args: Any) -> Any:
        tangents = tangents_of(*args)
        for i in tangents:
            if names[i] not in linear:
                check_no_tangent(names[i], args[i])
        if tangents or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return apply(*args, _Call(keyset, tangents))
        return run(keyset, args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)
