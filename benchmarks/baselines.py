"""What our operators are compared with: name to function of the inputs, the first is ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

import ovseg_kernels as ok
from ovseg_kernels.reference.center_assignment import center_assignment
from ovseg_kernels.reference.folded_center_assignment import folded_center_assignment
from ovseg_kernels.reference.segclip_center_assignment import segclip_center_assignment

if TYPE_CHECKING:
    from .registry import Case

FUSED = "ovseg"
Functions = dict[str, Callable[..., torch.Tensor]]


def _training(case: Case, operator: Callable, *definitions: tuple[str, Callable]) -> Functions:
    """A training step of the assignment: the same Gumbel noise for all, drawn inside by ours and given to the others."""
    noises: dict[tuple, torch.Tensor] = {}

    def rng(x):
        return ok.philox.make_rng(7, device=x.device)

    def noise(x, tokens):
        shape = (x.shape[0], tokens.shape[1], x.shape[1])
        if (x.device, shape) not in noises:
            noises[x.device, shape] = ok.philox.gumbel(rng(x), shape).transpose(1, 2).contiguous()
        return noises[x.device, shape]

    def given(function):
        def call(queries, **others):
            tokens = others["tokens"] if "tokens" in others else others["keys"]
            return function(queries, **others, noise=noise(queries, tokens), **case.options)[0]

        return call

    return {
        FUSED: lambda queries, **others: operator(queries, **others, rng=rng(queries), **case.options)[0],
        **{name: given(function) for name, function in definitions},
        "torch.compile": given(torch.compile(definitions[0][1])),
    }


def assignment(case: Case) -> Functions:
    return _training(case, ok.center_assignment, ("eager", center_assignment))


def folded_assignment(case: Case) -> Functions:
    def batched(queries, tokens, key_weight, value_weight, key_bias, value_bias, noise, scale):
        """The same algebra in plain torch: the fastest that it does here."""
        z = (queries @ key_weight) @ tokens.transpose(1, 2) + (queries @ key_bias)[..., None]
        s = (scale * z + noise).softmax(1)
        a = torch.zeros_like(s).scatter_(1, s.argmax(1, keepdim=True), 1.0) + (s - s.detach())
        n = a.sum(-1, keepdim=True)
        return ((a @ tokens) @ value_weight.T + n * value_bias) / (n + 1), None

    return _training(case, ok.folded_center_assignment, ("eager", folded_center_assignment), ("eager, folded", batched))


def segclip_assignment(case: Case) -> Functions:
    def convolutions(queries, tokens, key_weight, value_weight, norm_weight, norm_bias, key_norm_weight, key_norm_bias, **options):
        """As the modules of the system are written: Conv1d over channels, with the transposes it asks for."""
        D, groups = tokens.shape[-1:], tokens.shape[-1] // key_weight.shape[1]
        x = F.layer_norm(tokens, D, norm_weight, norm_bias).transpose(1, 2)
        keys, values = (F.conv1d(x, w[..., None], groups=groups).transpose(1, 2) for w in (key_weight, value_weight))
        return center_assignment(queries, F.layer_norm(keys, D, key_norm_weight, key_norm_bias), values, **options)

    return _training(case, ok.segclip_center_assignment, ("eager", segclip_center_assignment), ("eager, Conv1d", convolutions))
