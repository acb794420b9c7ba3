"""center_assignment: Gumbel-softmax of every token over G centers, which pool their tokens.

    z_gl = scale r_l q_g . k_l + beta_g     r: key_scale, beta: center_bias, 1 and 0
                                            if not given                                        (1)
    s_gl = softmax_g((z_gl + u_gl) / tau)   u: Gumbel noise, or none; over the centers,
                                            for each token                                      (2)
    a_gl = 1 for g = argmax_g s_gl, else 0  hard: with the gradient of s (straight-through);
                                            else a = s                                          (3)
    n_g  = max(c_g, 1)  |  c_g + 1  |  1    c_g = sum_l a_gl; "mean" | "mean_plus_one" | "sum"  (4)
    pooled_g = sum_l a_gl v_l / n_g         soft_gl = softmax_g(z_gl), without noise            (5)

Shapes   queries [B, G, D]; keys [B, L, D]; values [B, L, E]; mask [B, L] bool, True = keep; noise
  [B, G, L]; rng int64 [2]; center_bias [B, G]; key_scale [B, L]; returns pooled [B, G, E], index
  [B, L] int64 (-1 where masked), soft [B, G, L] or None.
Dtypes   float32, float64, float16, bfloat16, mixed ones are promoted; scores, noise, softmax and
  counts in float32 (float64 for float64) whatever the inputs, and autocast lowers nothing: low
  precision flips assignments. pooled in the dtype of values; soft in float32 or float64.
Noise    with ``rng``, element (b, g, l) takes Philox number (b L + l) G + g
  (ovseg_kernels/philox.py), recomputed in backward.
Grad     with p = d loss / d pooled and rho_g = pooled_g . p_g (0 for "sum", and for "mean" where
  c_g < 1):
    ds_gl = (p_g . v_l - rho_g) / n_g                                                           (6)
      plus d loss / d c_g, where an operator built on this one uses the counts
    dz_gl = s_gl (ds_gl - sum_h s_hl ds_hl) / tau                                               (7)
      plus the same with soft and its own gradient, without tau
    dq_g = scale sum_l r_l dz_gl k_l       dk_l = scale r_l sum_g dz_gl q_g                     (8)
    dv_l = sum_g a_gl p_g / n_g                                                                 (9)
    dbeta_g = sum_l dz_gl                  dr_l = scale sum_g dz_gl q_g . k_l                   (10)
Cost     2 B G L (D + E) flops forward, at most twice that backward; one read of keys and values
  forward, two backward and one write of their gradients. Kept for backward: the inputs, pooled,
  index and counts; no [B, G, L], no one-hot.
Masks    a masked token has weight 0 everywhere and gradient 0, whatever it holds.
Errors   ValueError for ranks, sizes, devices, a scale that is not finite, a tau below 1e-15, noise
  together with rng; TypeError for dtypes and layouts. NaN and infinity: where the softmax (2) of a
  token is NaN, so is its weight (3) for all centers, and pooled and counts of its image. A value
  that is not finite leaves its channel no number in any center: 0 infinity is none.
Source   Xu et al., GroupViT, CVPR 2022 (mean_plus_one); Luo et al., SegCLIP, ICML 2023 (mean);
  straight-through: Jang et al., Categorical Reparameterization with Gumbel-Softmax, ICLR 2017.
  Closed form of the gradient: ours, checked by gradcheck.
"""

from __future__ import annotations

import torch

from .. import _backends, _check, _transforms
from .. import _library as lib
from ..reference import center_assignment as reference
from ..reference.patch_text_similarity import accumulation_dtype
from ..results import CenterAssignment

_NORMALIZER = {"mean": 0, "mean_plus_one": 1, "sum": 2}

lib.define(
    "center_assignment",
    "center_assignment(Tensor queries, Tensor keys, Tensor values, Tensor? center_bias, "
    "Tensor? key_scale, Tensor? mask, Tensor? noise, Tensor? rng, float scale, float tau, "
    "bool hard, int normalizer, bool want_soft) "
    "-> (Tensor pooled, Tensor index, Tensor count, Tensor soft)",
)
lib.define(
    "center_assignment",
    "center_assignment_backward(Tensor grad, Tensor? grad_count, Tensor? grad_soft, "
    "Tensor queries, Tensor keys, Tensor values, Tensor? center_bias, Tensor? key_scale, "
    "Tensor? mask, Tensor? noise, Tensor? rng, Tensor pooled, Tensor index, Tensor count, "
    "float scale, float tau, bool hard, int normalizer, bool need_queries, bool need_keys, "
    "bool need_values, bool shared) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
lib.fallback("center_assignment", reference.forward)
lib.fallback("center_assignment_backward", reference.backward)


def center_assignment(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float = 1.0,
    tau: float = 1.0,
    rng: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    hard: bool = True,
    normalizer: str = "mean_plus_one",
    mask: torch.Tensor | None = None,
    center_bias: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    return_soft: bool = False,
) -> CenterAssignment:
    """Assign tokens to centers and pool them, equations (1)-(5) of this file.

    Args:
        queries: [B, G, D], the centers.
        keys: [B, L, D].
        values: [B, L, E].
        scale: multiplies the scores.
        tau: divides scores and noise in the softmax.
        rng: int64 [seed, offset] (``philox.make_rng``): Gumbel noise, the same on every device.
        noise: [B, G, L] Gumbel noise in place of ``rng``; it gets no gradient. Neither: no noise,
            as in evaluation.
        hard: one center a token, with the gradient of the softmax; otherwise the softmax itself.
        normalizer: ``mean_plus_one`` (GroupViT, OVSegmentor), ``mean`` (SegCLIP) or ``sum``.
        mask: [B, L] bool, True = keep.
        center_bias: [B, G], added to the scores of a center. It gets a gradient.
        key_scale: [B, L], multiplies the scores of a token. It gets a gradient.
        return_soft: also return the softmax without noise, with its gradient.

    Returns:
        CenterAssignment: pooled [B, G, E], index [B, L], soft [B, G, L] or None.

    Example:
        >>> tokens = torch.randn(2, 49, 16)
        >>> found = center_assignment(torch.randn(2, 8, 16), tokens, torch.randn(2, 49, 32))
        >>> found.pooled.shape, found.index.shape
        (torch.Size([2, 8, 32]), torch.Size([2, 49]))
    """
    options = (scale, tau, rng, noise, hard, normalizer, mask, center_bias, key_scale, return_soft)
    pooled, index, _, soft = assign(queries, keys, values, *options)
    return CenterAssignment(pooled.to(values.dtype), index, soft)


def assign(
    queries,
    keys,
    values,
    scale,
    tau,
    rng,
    noise,
    hard,
    normalizer,
    mask,
    center_bias,
    key_scale,
    return_soft,
):
    """Return what ``center_assignment`` does, with the counts c_g of (4) between index and soft.

    Pooled is in the accumulation dtype. The operators built on this one share this part.
    """
    _check.tensor("queries", queries, 3, "[B, G, D]")
    _check.tensor("keys", keys, 3, "[B, L, D]")
    _check.tensor("values", values, 3, "[B, L, E]")
    B, G, D = queries.shape
    L = keys.shape[1]
    _check.shape("keys", keys, (B, L, D), "the B and D of queries")
    _check.shape("values", values, (B, L, values.shape[2]), "the B and L of keys")
    for name, x in (("keys", keys), ("values", values)):
        _check.same(name, x, "queries", queries, dtype=False)
    rng = check_options(queries, keys, scale, tau, rng, noise, hard, normalizer, mask, return_soft)
    common = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), values.dtype)
    queries, keys, values = (x.to(common) for x in (queries, keys, values))
    acc = accumulation_dtype(queries)
    noise = None if noise is None else noise.detach().to(acc)
    for name, x, size in (("center_bias", center_bias, (B, G)), ("key_scale", key_scale, (B, L))):
        if x is not None:
            _check.tensor(name, x, 2, "[B, G]" if name == "center_bias" else "[B, L]")
            _check.shape(
                name,
                x,
                size,
                "one number for each " + ("center" if name == "center_bias" else "token"),
            )
            _check.same(name, x, "keys", keys, dtype=False)
    center_bias, key_scale = (
        None if x is None else x.to(acc).contiguous() for x in (center_bias, key_scale)
    )
    if _backends.use_definition("center_assignment", queries.device):
        with torch.autocast(lib.autocast_type(queries.device), enabled=False):
            noise = reference.gumbel(queries, keys, noise, rng)
            pooled, index, count, soft = reference.center_assignment(
                queries,
                keys,
                values,
                scale,
                tau,
                noise,
                hard,
                normalizer,
                mask,
                center_bias,
                key_scale,
            )
    else:
        numbers = (float(scale), float(tau), hard, _NORMALIZER[normalizer], return_soft)
        pooled, index, count, soft = torch.ops.ovseg.center_assignment(
            queries, keys, values, center_bias, key_scale, mask, noise, rng, *numbers
        )
    return pooled, index, count, soft if return_soft else None


def check_options(queries, keys, scale, tau, rng, noise, hard, normalizer, mask, return_soft):
    """Check what the operators of this family have beyond their features.

    Returns rng as kernels read it.
    """
    (B, G, D), L = queries.shape, keys.shape[1]
    if G == 0 or D == 0:
        raise ValueError(
            f"queries has shape {list(queries.shape)}; expected at least one center and one channel"
        )
    if mask is not None:
        _check.tensor("mask", mask, 2, "[B, L]", (torch.bool,))
        _check.shape("mask", mask, (B, L), "the [B, L] of keys")
        _check.same("mask", mask, "keys", keys, dtype=False)
    if noise is not None and rng is not None:
        raise ValueError(
            "noise and rng were both given; expected one of them, or neither for no noise"
        )
    if noise is not None:
        _check.tensor("noise", noise, 3, "[B, G, L]")
        _check.shape("noise", noise, (B, G, L), "one number for each center and token")
        _check.same("noise", noise, "keys", keys, dtype=False)
    dtype = accumulation_dtype(queries if queries.dtype.itemsize > keys.dtype.itemsize else keys)
    _check.number("scale", scale, dtype=dtype)
    _check.divisor("tau", tau, dtype)
    _check.one_of("normalizer", normalizer, reference.NORMALIZERS)
    _check.flag("hard", hard)
    _check.flag("return_soft", return_soft)
    return None if rng is None else _check.rng(rng, "keys", keys)


@lib.fake("center_assignment")
def _(
    queries,
    keys,
    values,
    center_bias,
    key_scale,
    mask,
    noise,
    rng,
    scale,
    tau,
    hard,
    normalizer,
    want_soft,
):
    acc, (B, G, _), L = accumulation_dtype(queries), queries.shape, keys.shape[1]
    return (
        queries.new_empty((B, G, values.shape[2]), dtype=acc),
        queries.new_empty((B, L), dtype=torch.int64),
        queries.new_empty((B, G), dtype=acc),
        queries.new_empty((B if want_soft else 0, G, L), dtype=acc),
    )


@lib.fake("center_assignment_backward")
def _(grad, grad_count, grad_soft, queries, keys, values, center_bias, key_scale, *rest):
    (B, G, _), L = queries.shape, keys.shape[1]
    return (
        *(
            x.new_empty((B if need else 0, *x.shape[1:]))
            for x, need in zip((queries, keys, values), rest[-4:-1], strict=True)
        ),
        grad.new_empty((0 if center_bias is None else B, G)),
        grad.new_empty((0 if key_scale is None else B, L)),
    )


def _setup(ctx, inputs, output):
    ctx.shared = inputs[1] is inputs[2]  # values that are the keys: one gradient takes both
    *tensors, ctx.scale, ctx.tau, ctx.hard, ctx.normalizer, ctx.want_soft = inputs
    pooled, index, count, _ = output
    ctx.save_for_backward(*tensors, pooled, index, count)
    ctx.mark_non_differentiable(index)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _index, grad_count, grad_soft):
    if grad is None and grad_count is None and grad_soft is None:
        return (None,) * 13
    saved = ctx.saved_tensors
    grad = torch.zeros_like(saved[-3]) if grad is None else grad
    upstream = (grad, grad_count, grad_soft if ctx.want_soft else None)
    options = (ctx.scale, ctx.tau, ctx.hard, ctx.normalizer)
    needs = list(ctx.needs_input_grad)
    needs[2] &= not ctx.shared
    found = torch.ops.ovseg.center_assignment_backward(
        *upstream, *saved, *options, *needs[:3], ctx.shared
    )
    return *(x if need else None for x, need in zip(found, needs, strict=False)), *(None,) * 8


_transforms.autograd("center_assignment", _backward, _setup)
_transforms.no_second_derivative("center_assignment_backward")
# Philox numbers are those of an image's place in the batch: with rng, images that were put together
# would draw others.
_transforms.vmap(
    "center_assignment", images=(0, 1, 2, 3, 4, 5, 6), unless=lambda args: args[7] is not None
)
_transforms.vmap(
    "center_assignment_backward",
    images=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13),
    unless=lambda args: args[10] is not None,
)
# Nothing is lowered, not even inside the closed form.
lib.autocast("center_assignment", features=())
lib.autocast("center_assignment_backward", features=())
