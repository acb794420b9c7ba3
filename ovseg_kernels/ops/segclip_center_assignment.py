"""segclip_center_assignment: SegCLIP's mapping step, folded.

It is LayerNorm -> grouped 1x1 -> LayerNorm -> center_assignment.

    x'_l = LN(x_l)                   norm_weight, norm_bias                                     (1)
    k_l  = LN(W_k x'_l)              key_norm_weight gamma, key_norm_bias beta                  (2)
    v_l  = W_v x'_l                  W_k, W_v: grouped 1x1 projections                          (3)

and ``center_assignment`` of queries, k and v. With r_l = (var(W_k x'_l) + eps)^-1/2 and the folded,
centered center

    q'_g = W_k^T (gamma q_g - mean_d(gamma q_g))                                                (4)
    q_g . k_l = r_l q'_g . x'_l + q_g . beta                                                    (5)
    sum_l a_gl v_l / n_g = W_v (sum_l a_gl x'_l / n_g)                                          (6)

no key and no value exists: of W_k x' only its variance is wanted, an image at a time, and W_v meets
G rows.

Shapes   queries [B, G, D]; tokens [B, L, D]; key_weight, value_weight [D, D / groups] (Conv1d's
  without its last 1); norm_weight, norm_bias, key_norm_weight, key_norm_bias [D]; returns pooled
  [B, G, D], index [B, L] int64, soft [B, G, L] or None.
Dtypes   those of ``center_assignment``. Compare with float64, not bit by bit with the unfolded
  chain.
Cost     one grouped product of the tokens forward (2 B L D^2 / groups flops) and three backward
  (four in Triton, which never stores W_k x'), instead of two and four, plus those of
  ``center_assignment``. Kept: tokens, x' and [B, L]; no keys, no values.
Errors   ValueError for ranks, sizes and devices, a group size that does not divide D, an eps that
  is not positive; TypeError for dtypes; and those of ``center_assignment``.
Source   Luo et al., SegCLIP, ICML 2023; the folded form is ours.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .. import _backends, _check, _transforms
from .. import _library as lib
from ..reference import segclip_center_assignment as reference
from ..reference.center_assignment import gumbel
from ..reference.patch_text_similarity import accumulation_dtype
from ..reference.segclip_center_assignment import grouped_linear
from ..results import CenterAssignment
from .center_assignment import assign, check_options

lib.built_on("segclip_center_assignment", "center_assignment")
lib.define(
    "segclip_center_assignment",
    "grouped_inverse_std(Tensor tokens, Tensor weight, float eps) -> Tensor",
)
lib.define(
    "segclip_center_assignment",
    "grouped_inverse_std_backward(Tensor grad, Tensor tokens, Tensor weight, Tensor found) "
    "-> (Tensor, Tensor)",
)
lib.fallback("grouped_inverse_std", reference.inverse_std)
lib.fallback("grouped_inverse_std_backward", reference.inverse_std_backward)


def segclip_center_assignment(
    queries: torch.Tensor,
    tokens: torch.Tensor,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    key_norm_weight: torch.Tensor,
    key_norm_bias: torch.Tensor,
    *,
    eps: float = 1e-5,
    scale: float = 1.0,
    tau: float = 1.0,
    rng: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    hard: bool = True,
    normalizer: str = "mean",
    mask: torch.Tensor | None = None,
    return_soft: bool = False,
) -> CenterAssignment:
    """Project the tokens as SegCLIP does, (1)-(3) of this file, and assign them to centers.

    Args:
        queries: [B, G, D], the normalised centers.
        tokens: [B, L, D], before any norm.
        key_weight: [D, D / groups] of the grouped 1x1 projection to the keys.
        value_weight: [D, D / groups] of that to the values.
        norm_weight: [D] of the first LayerNorm.
        norm_bias: [D] of the first LayerNorm.
        key_norm_weight: [D] of the LayerNorm of the keys.
        key_norm_bias: [D] of the LayerNorm of the keys.
        eps: of both norms.
        scale: as in ``center_assignment``.
        tau: as in ``center_assignment``. SegCLIP trains with 0.9.
        rng: as in ``center_assignment``.
        noise: as in ``center_assignment``.
        hard: as in ``center_assignment``.
        normalizer: as in ``center_assignment``.
        mask: as in ``center_assignment``.
        return_soft: as in ``center_assignment``.

    Returns:
        CenterAssignment: pooled [B, G, D], index [B, L], soft [B, G, L] or None.
    """
    _check.tensor("queries", queries, 3, "[B, G, D]")
    _check.tensor("tokens", tokens, 3, "[B, L, D]")
    D = tokens.shape[2]
    _check.shape(
        "queries", queries, (tokens.shape[0], queries.shape[1], D), "the B and D of tokens"
    )
    _check.same("queries", queries, "tokens", tokens, dtype=False)
    _check.number("eps", eps, "a positive number", least=5e-324, dtype=accumulation_dtype(tokens))
    for name, weight in (("key_weight", key_weight), ("value_weight", value_weight)):
        _check.tensor(name, weight, 2, "[D, D / groups]")
        if weight.shape[0] != D or weight.shape[1] == 0 or D % weight.shape[1]:
            raise ValueError(f"{name} has shape {list(weight.shape)}; expected [{D}, {D} / groups]")
        _check.same(name, weight, "tokens", tokens, dtype=False)
    norms = {
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "key_norm_weight": key_norm_weight,
        "key_norm_bias": key_norm_bias,
    }
    for name, x in norms.items():
        _check.tensor(name, x, 1, "[D]")
        _check.shape(name, x, (D,), "one number for each channel of tokens")
        _check.same(name, x, "tokens", tokens, dtype=False)
    rng = check_options(
        queries, tokens, scale, tau, rng, noise, hard, normalizer, mask, return_soft
    )
    options = {"scale": scale, "tau": tau, "hard": hard, "normalizer": normalizer, "mask": mask}
    with torch.autocast(lib.autocast_type(tokens.device), enabled=False):
        if _backends.use_definition("segclip_center_assignment", tokens.device):
            options["noise"] = gumbel(queries, tokens, noise, rng)
            pooled, index, soft = reference.segclip_center_assignment(
                queries,
                tokens,
                key_weight,
                value_weight,
                norm_weight,
                norm_bias,
                key_norm_weight,
                key_norm_bias,
                eps,
                **options,
            )
            return CenterAssignment(pooled.to(tokens.dtype), index, soft if return_soft else None)
        acc, dtype = accumulation_dtype(tokens), tokens.dtype
        key_weight, value_weight = key_weight.to(dtype), value_weight.to(dtype)
        if mask is not None:
            # What a masked token holds must not reach its norm.
            tokens = tokens.masked_fill(~mask[..., None], 0)
        normed = F.layer_norm(tokens, (D,), norm_weight.to(dtype), norm_bias.to(dtype), eps)
        q = queries.to(acc)
        scaled = q * key_norm_weight.to(acc)
        centered = scaled - scaled.mean(-1, keepdim=True)
        groups = (D // key_weight.shape[1], key_weight.shape[1])
        folded = torch.einsum(
            "bgno,noi->bgni",
            centered.unflatten(-1, groups),
            key_weight.to(acc).unflatten(0, groups),
        ).flatten(-2)
        pooled, index, _, soft = assign(
            folded.to(dtype),
            normed,
            normed,
            rng=rng,
            noise=noise,
            center_bias=scale * (q @ key_norm_bias.to(acc)),
            key_scale=torch.ops.ovseg.grouped_inverse_std(normed, key_weight, eps),
            return_soft=return_soft,
            **options,
        )
        return CenterAssignment(grouped_linear(pooled, value_weight.to(acc)).to(dtype), index, soft)


@lib.fake("grouped_inverse_std")
def _(tokens, weight, eps):
    return tokens.new_empty(tokens.shape[:2], dtype=accumulation_dtype(tokens))


@lib.fake("grouped_inverse_std_backward")
def _(grad, tokens, weight, found):
    return tokens.new_empty(tokens.shape), weight.new_empty(weight.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output)


def _backward(ctx, grad):
    return *torch.ops.ovseg.grouped_inverse_std_backward(grad, *ctx.saved_tensors), None


_transforms.autograd("grouped_inverse_std", _backward, _setup)
_transforms.no_second_derivative("grouped_inverse_std_backward")
_transforms.vmap("grouped_inverse_std", images=(0,))
_transforms.vmap("grouped_inverse_std_backward")
