"""Answers of the schemas to derivatives and to torch.func.

They are backward, no forward mode, no second derivative, and vmap.

torch's own ``register_autograd`` answers to plain autograd alone: under ``torch.func.grad`` it is
an error about ``setup_context``, and a forward-mode tangent is dropped, which makes a derivative of
zeros. The kernel below is its equal in plain autograd, and does what torch's C++ operators do in
the rest: at a level of torch.func it records the backward of this level and hands the call on to
the next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import library as torch_library
from torch._C import _functorch as functorch
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from . import _library as lib
from ._context import BACKEND


def autograd(name: str, backward: Callable, setup: Callable | None) -> None:
    """Register a backward in the terms of torch's ``register_autograd``.

    ``setup(ctx, inputs, output)`` saves for ``backward(ctx, *grads)``.
    """
    op = getattr(torch.ops.ovseg, name).default

    def below(keyset, args):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx, *args):
        # The keyset comes last, so that ctx.needs_input_grad counts from the first argument.
        *inputs, keyset = args
        ctx.backend = BACKEND.get()
        output = below(keyset, inputs)
        if setup is not None:
            setup(ctx, tuple(inputs), output)
        return output

    def gradients(ctx, *grads):
        # A thread of autograd's own is in no block of the caller's.
        forced = (
            BACKEND.to(ctx.backend)
            if BACKEND.get() is None and ctx.backend is not None
            else contextlib.nullcontext()
        )
        with forced:
            found = backward(ctx, *grads)
        return (*found, None) if isinstance(found, tuple) else (found, None)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    plain: Any = type(f"BackwardOf_{name}", (torch.autograd.Function,), methods)
    of_a_level: Any = type(f"BackwardOf_{name}", (_SingleLevelFunction,), methods)

    def kernel(keyset, *args):
        no_forward_derivative(lib.OPERATOR_OF[name], *args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return below(keyset, args)
        if not torch._C._are_functorch_transforms_active():
            return plain.apply(*args, keyset)
        with _single_level():
            return of_a_level.apply(*args, keyset)

    lib.LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


@contextlib.contextmanager
def _single_level() -> Iterator[None]:
    before = functorch.get_single_level_autograd_function_allowed()
    functorch.set_single_level_autograd_function_allowed(True)
    try:
        yield
    finally:
        functorch.set_single_level_autograd_function_allowed(before)


def no_second_derivative(name: str) -> None:
    """Make a second derivative an error."""

    def backward(ctx, *grads):
        raise RuntimeError(
            f"ovseg::{name} has no second derivative. For double backward use the definition: "
            "with ovseg_kernels.backend('reference'): ..."
        )

    autograd(name, backward, None)


_INSTEAD = (
    "use reverse mode (grad, vjp, jacrev), or the definition: "
    "with ovseg_kernels.backend('reference'): ..."
)


def no_forward_derivative(op: str, *args: object, instead: str = _INSTEAD) -> None:
    """Raise where an argument carries a tangent.

    A result without one would pass for a derivative of zero.
    """
    if forward_ad._current_level >= 0 and any(_has_tangent(x) for x in args):
        raise NotImplementedError(
            f"{op} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian; "
            f"torch.autograd.forward_ad): {instead}"
        )


def no_derivative(op: str, *args: object) -> None:
    """Raise for labels where an argument carries a tangent.

    In reverse mode they have no grad_fn, and torch says so by itself.
    """
    no_forward_derivative(
        op, *args, instead="labels and their values are constants; pass the detach() of what varies"
    )


def _has_tangent(x: object) -> bool:
    return (
        isinstance(x, torch.Tensor)
        and x.is_floating_point()
        and forward_ad.unpack_dual(x).tangent is not None
    )


def vmap(
    name: str,
    images: dict[int, int] | tuple[int, ...] = (),
    *,
    outputs: dict[int, int] | None = None,
    unless: Callable[[tuple], bool] = lambda args: False,
) -> None:
    """Register the rule of ``name`` under ``torch.vmap``.

    Args:
        name: of the schema.
        images: the arguments that are made of independent images, as all outputs then are, with the
            dimension that counts them, 0 if not said. Where these and no others are batched, the
            batch becomes more images of one call. Anything else is one call for each element of the
            batch, and the results side by side.
        outputs: that dimension of outputs where it is not 0.
        unless: a condition on the arguments under which images are not independent.
    """
    op, at, behind = getattr(torch.ops.ovseg, name).default, dict.fromkeys(images, 0), outputs or {}
    at.update(images if isinstance(images, dict) else {})

    def rule(info, in_dims, *args):
        batched = {i for i, dim in enumerate(in_dims) if dim is not None}
        if (
            not batched
            or batched != {i for i in at if args[i] is not None}
            or unless(args)
            or not info.batch_size
        ):
            found = _one_by_one(op, info.batch_size, in_dims, args)
        else:
            parts = op(
                *(
                    _joined(x, dim, at.get(i, 0))
                    for i, (x, dim) in enumerate(zip(args, in_dims, strict=True))
                )
            )
            found = _parted(parts, info.batch_size, behind)
        return found, (0,) * len(found) if isinstance(found, tuple) else 0

    torch_library.register_vmap(f"ovseg::{name}", rule, lib=lib.LIBRARY)


def _joined(x, dim, at):
    """Return the batch at ``dim`` and the images behind it, at ``at``, as one dimension."""
    return x if dim is None else x.movedim(dim, at).flatten(at, at + 1)


def _parted(found, size, at):
    """Return the batch of :func:`_joined` in front again."""
    if isinstance(found, tuple):
        return tuple(_parted(x, size, {0: at.get(i, 0)}) for i, x in enumerate(found))
    place = at.get(0, 0)
    return found.unflatten(place, (size, found.shape[place] // size)).movedim(place, 0)


def _one_by_one(op, size, in_dims, args):
    def element(x, dim, i):
        if dim is None:
            return x
        return (
            x.select(dim, i)
            if size
            else x.new_zeros([n for j, n in enumerate(x.shape) if j != dim])
        )

    found = [
        op(*(element(x, dim, i) for x, dim in zip(args, in_dims, strict=True)))
        for i in range(max(1, size))
    ]
    if isinstance(found[0], tuple):
        return tuple(torch.stack(parts)[:size] for parts in zip(*found, strict=True))
    return torch.stack(found)[:size]
