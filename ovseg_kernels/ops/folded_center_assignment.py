"""folded_center_assignment: center_assignment of linear projections, without projecting a token.

With keys k_l = W_k x_l + b_k and values v_l = W_v x_l + b_v, the numbered equations of
``center_assignment`` become

    q_g . k_l            = (W_k^T q_g) . x_l + q_g . b_k                                        (1)
    sum_l a_gl v_l / n_g = W_v (sum_l a_gl x_l / n_g) + (c_g / n_g) b_v     c_g = sum_l a_gl    (2)

so the tokens meet G folded centers instead of two D x C matrices, and W_v only G pooled rows. Exact
in exact arithmetic.

Shapes   queries [B, G, D]; tokens [B, L, C]; key_weight [D, C]; value_weight [E, C]; key_bias [D];
  value_bias [E]; the rest as in ``center_assignment``; returns pooled [B, G, E], index [B, L]
  int64, soft [B, G, L] or None.
Dtypes   those of ``center_assignment``; the folds are computed in float32 (float64 for float64) and
  rounded once to the dtype of the tokens. Folding rounds elsewhere than projecting does: compare
  with float64, not bit by bit with the unfolded chain.
Cost     2 B G C (D + E + 2 L) flops forward instead of 2 B L C (D + E) and more; kept: tokens and
  [B, G, .], no keys, no values.
Errors   ValueError for ranks, sizes and devices, TypeError for dtypes, and those of
  ``center_assignment``.
Source   Xu et al., GroupViT, CVPR 2022, and Xu et al., OVSegmentor, CVPR 2023, whose grouping
  blocks project keys and values by a Linear each. The folded form is ours.
"""

from __future__ import annotations

import torch

from .. import _backends, _check
from .. import _library as lib
from ..reference import folded_center_assignment as reference
from ..reference.center_assignment import divisor, gumbel
from ..reference.patch_text_similarity import accumulation_dtype
from ..results import CenterAssignment
from .center_assignment import assign, check_options

lib.built_on("folded_center_assignment", "center_assignment")


def folded_center_assignment(
    queries: torch.Tensor,
    tokens: torch.Tensor,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    key_bias: torch.Tensor | None = None,
    value_bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    tau: float = 1.0,
    rng: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    hard: bool = True,
    normalizer: str = "mean_plus_one",
    mask: torch.Tensor | None = None,
    return_soft: bool = False,
) -> CenterAssignment:
    """Assign linearly projected tokens to centers, equations (1) and (2) of this file.

    The same as ``center_assignment(queries, Linear_k(tokens), Linear_v(tokens), ...)``.

    Args:
        queries: [B, G, D], the projected centers.
        tokens: [B, L, C].
        key_weight: [D, C], as torch.nn.Linear holds it.
        value_weight: [E, C].
        key_bias: [D].
        value_bias: [E].
        scale: as in ``center_assignment``.
        tau: as in ``center_assignment``.
        rng: as in ``center_assignment``.
        noise: as in ``center_assignment``.
        hard: as in ``center_assignment``.
        normalizer: as in ``center_assignment``.
        mask: as in ``center_assignment``.
        return_soft: as in ``center_assignment``.

    Returns:
        CenterAssignment: pooled [B, G, E], index [B, L], soft [B, G, L] or None.
    """
    _check.tensor("queries", queries, 3, "[B, G, D]")
    _check.tensor("tokens", tokens, 3, "[B, L, C]")
    D, C = queries.shape[2], tokens.shape[2]
    _check.shape("queries", queries, (tokens.shape[0], *queries.shape[1:]), "the B of tokens")
    _check.same("queries", queries, "tokens", tokens, dtype=False)
    for name, weight, bias, rows in (
        ("key", key_weight, key_bias, D),
        ("value", value_weight, value_bias, None),
    ):
        _check.tensor(f"{name}_weight", weight, 2, "[D, C]" if name == "key" else "[E, C]")
        _check.shape(
            f"{name}_weight",
            weight,
            (weight.shape[0] if rows is None else rows, C),
            "out and in features",
        )
        _check.same(f"{name}_weight", weight, "tokens", tokens, dtype=False)
        if bias is not None:
            _check.tensor(f"{name}_bias", bias, 1, "[out features]")
            _check.shape(
                f"{name}_bias",
                bias,
                (weight.shape[0],),
                f"one number for each row of {name}_weight",
            )
            _check.same(f"{name}_bias", bias, "tokens", tokens, dtype=False)
    rng = check_options(
        queries, tokens, scale, tau, rng, noise, hard, normalizer, mask, return_soft
    )
    options = {"scale": scale, "tau": tau, "hard": hard, "normalizer": normalizer, "mask": mask}
    with torch.autocast(lib.autocast_type(tokens.device), enabled=False):
        if _backends.use_definition("folded_center_assignment", tokens.device):
            weights, options["noise"] = (
                (key_weight, value_weight, key_bias, value_bias),
                gumbel(queries, tokens, noise, rng),
            )
            pooled, index, soft = reference.folded_center_assignment(
                queries, tokens, *weights, **options
            )
            return CenterAssignment(pooled.to(tokens.dtype), index, soft if return_soft else None)
        acc = accumulation_dtype(tokens)
        q = queries.to(acc)
        center_bias = None if key_bias is None else scale * (q @ key_bias.to(acc))
        folded = (q @ key_weight.to(acc)).to(tokens.dtype)
        pooled, index, count, soft = assign(
            folded,
            tokens,
            tokens,
            rng=rng,
            noise=noise,
            center_bias=center_bias,
            key_scale=None,
            return_soft=return_soft,
            **options,
        )
        pooled = pooled @ value_weight.to(acc).T
        if value_bias is not None:
            pooled = pooled + (count / divisor(count, normalizer))[..., None] * value_bias.to(acc)
    return CenterAssignment(pooled.to(tokens.dtype), index, soft)
