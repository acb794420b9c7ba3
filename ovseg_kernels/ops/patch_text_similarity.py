"""patch_text_similarity: how well texts fit images, through a text's own weights over the patches.

With u_n the patches of an image, r_n = |u_n|, q a unit text, sigma the scale and beta the bias of
the weights:

    s_n = u_n . q / r_n                   cosine                                                (1)
    a_n = f(s_n) / sum_m f(s_m)           f(s) = exp(sigma s), sigma = 1 / temperature  softmax
                                          f(s) = 1 / (1 + exp(-(sigma s + beta)))       sigmoid (2)
    phi = sum_n a_n s_n                   pool="score"; a_n = 1/N in "mean"; max_n in "max"     (3)
    phi = (v / |v|) . q                   v = sum_n a_n u_n
                                          pool="vector", PACL's compatibility                   (4)

Shapes   patches [B, N, D]; texts [T, D]; patch_mask [B, N] bool, True = keep; returns [B, T].
Dtypes   float32, float64, float16, bfloat16, the same for both; sums and the result in float32
  (float64 for float64).
Grad     with g = d loss / d phi and d_n = f'(s_n) / f(s_n) (sigma for softmax, sigma (1 - sigmoid)
  for sigmoid), per pair:
    c_n = g a_n (1 + d_n (s_n - phi))   dU_n += (c_n / r_n) q   dq += (c_n / r_n) u_n   score   (5)
    e_n = <u_n, y>,  y = (q - phi v / |v|) / |v|,  so that sum_n a_n e_n = 0            vector  (6)
    c_n = g a_n d_n e_n   dU_n += (c_n / r_n) q + g a_n y   dq += (c_n / r_n) u_n + g v / |v|   (7)
  Gram form of (6), (7), with G = U U^T: |v|^2 = a^T G a, e = r s / |v| - phi G a / |v|^2, and over
  all texts t
    dU = sum_t (c_t / r + g_t a_t / |v_t|)^T q_t - H U
    H = sum_t (g_t phi_t / |v_t|^2) a_t a_t^T                                                   (8)
  PV form: dU += sum_t (g_t a_t)^T y_t                                                          (9)
  then dU_n -= (u_n / r_n^2) sum c_n s_n and dq likewise: projections onto the sphere.
Cost     2 B T N D flops forward and 6 B T N D backward, plus B N^2 (D + 2 T) to B N^2 (2 D + 6 T)
  for "vector" in Gram form. Kept for backward: phi, log sum f and |v|, [B, T] each; nothing of size
  [B, T, N] or [B, T, D] exists.
Precision  raw operands enter the products, sums are float32 and scaled by the norms. float32
  products are exact unless torch.backends.cuda.matmul.allow_tf32; that is read when the forward
  runs, and CUDA only.
Masks    a masked patch has weight 0 and gradient 0, whatever it holds. A fully masked image has
  phi = 0, gradient 0.
Errors   ValueError for ranks, sizes, devices, no patch at all, a temperature below 1e-6 or not
  finite (looked at on the CPU only: reading it from a GPU would stall); TypeError for dtypes and
  layouts. NaN in the features gives NaN. Lengths whose squares overflow are found in another way; a
  patch and a text whose product overflows give NaN on a GPU.
Source   Mukhoti et al., Open Vocabulary Semantic Segmentation with Patch Aligned Contrastive
  Learning, CVPR 2023.
"""

from __future__ import annotations

import torch

from .. import _backends, _check, _transforms
from .. import _library as lib
from .._unit import unit
from ..reference import patch_text_similarity as reference

_POOL = {"vector": 0, "score": 1, "max": 2}
_WEIGHT = {"softmax": 0, "sigmoid": 1}

lib.define(
    "patch_text_similarity",
    "patch_text_similarity(Tensor patches, Tensor texts, Tensor? patch_mask, Tensor scale, "
    "Tensor bias, int pool, int weight, bool tf32) "
    "-> (Tensor similarity, Tensor lse, Tensor norm)",
)
lib.define(
    "patch_text_similarity",
    "patch_text_similarity_backward(Tensor grad, Tensor patches, Tensor texts, "
    "Tensor? patch_mask, Tensor scale, Tensor bias, Tensor similarity, Tensor lse, Tensor norm, "
    "int pool, int weight, bool tf32, bool need_patches, bool need_texts) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
lib.fallback("patch_text_similarity", reference.forward)
lib.fallback("patch_text_similarity_backward", reference.backward)


def patch_text_similarity(
    patches: torch.Tensor,
    texts: torch.Tensor,
    *,
    patch_mask: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    pool: str = "vector",
    weight: str = "softmax",
    weight_scale: float | torch.Tensor = 10.0,
    weight_bias: float | torch.Tensor = -2.5,
) -> torch.Tensor:
    """Return the similarity [B, T] of every text with every image, equations (1)-(4) of this file.

    Args:
        patches: [B, N, D], not normalised; in ``vector`` their lengths count.
        texts: [T, D].
        patch_mask: [B, N] bool, True = keep.
        temperature: divides the cosines in the softmax, 1e-6 at least; number or tensor of one
            element, which gets a gradient.
        pool: ``vector`` (PACL), ``score``, ``max`` or ``mean``. The last two use no weights.
        weight: ``softmax`` or ``sigmoid``.
        weight_scale: of the sigmoid; number or tensor of one element, which gets a gradient.
        weight_bias: of the sigmoid; number or tensor of one element, which gets a gradient.

    Returns:
        [B, T] in float32, or float64 for float64 inputs, in -1 .. 1.

    Example:
        >>> patches, texts = torch.randn(2, 196, 512), torch.randn(3, 512)
        >>> patch_text_similarity(patches, texts, temperature=0.1).shape
        torch.Size([2, 3])
    """
    _check.tensor("patches", patches, 3, "[B, N, D]")
    _check.tensor("texts", texts, 2, "[T, D]")
    if patches.shape[1] == 0 or patches.shape[2] == 0:
        raise ValueError(
            f"patches has shape {list(patches.shape)}; expected at least one patch and one channel"
        )
    if texts.shape[1] != patches.shape[2]:
        raise ValueError(
            f"texts has last dimension {texts.shape[1]} and patches has {patches.shape[2]}; "
            "expected one D"
        )
    _check.same(
        "texts",
        texts,
        "patches",
        patches,
        dtype=not torch.is_autocast_enabled(lib.autocast_type(patches.device)),
    )
    if patch_mask is not None:
        _check.tensor("patch_mask", patch_mask, 2, "[B, N]", (torch.bool,))
        _check.shape("patch_mask", patch_mask, tuple(patches.shape[:2]), "the [B, N] of patches")
        _check.same("patch_mask", patch_mask, "patches", patches, dtype=False)
    _check.one_of("pool", pool, reference.POOLS)
    _check.one_of("weight", weight, reference.WEIGHTS)
    dtype = reference.accumulation_dtype(patches)
    if weight == "softmax":
        # Below this temperature the rounding of a cosine in float32 is a tenth of the exponent, and
        # more.
        scale = 1.0 / _check.scalar("temperature", temperature, patches, dtype, least=1e-6)
        bias = torch.zeros((), dtype=dtype, device=patches.device)
    else:
        if not isinstance(temperature, (int, float)) or temperature != 1.0:
            raise ValueError(
                f"temperature is {temperature}; with weight='sigmoid' expected 1.0: use "
                "weight_scale instead"
            )
        scale = _check.scalar("weight_scale", weight_scale, patches, dtype)
        bias = _check.scalar("weight_bias", weight_bias, patches, dtype)
    if _backends.use_definition("patch_text_similarity", patches.device):
        return reference.patch_text_similarity(
            patches, texts, patch_mask, scale, bias, pool, weight
        )
    if pool == "mean":
        return _mean(patches.to(dtype), texts.to(dtype), patch_mask)
    codes = (_POOL[pool], _WEIGHT[weight], _backends.allow_tf32(patches))
    return torch.ops.ovseg.patch_text_similarity(patches, texts, patch_mask, scale, bias, *codes)[0]


def _mean(patches, texts, mask):
    """Return (3) with equal weights, which is linear: the mean of the unit patches does.

    It takes one matrix product.
    """
    if mask is None:
        pooled = unit(patches).mean(1)
    else:
        pooled = unit(patches.masked_fill(~mask[..., None], 0)).sum(1) / mask.sum(
            1, keepdim=True
        ).clamp(min=1)
    with torch.autocast(lib.autocast_type(patches.device), enabled=False):
        found = pooled @ unit(texts).T
    # 0 where no patch is kept, be a text NaN.
    return found if mask is None else found.masked_fill(~mask.any(1, keepdim=True), 0)


@lib.fake("patch_text_similarity")
def _(patches, texts, patch_mask, scale, bias, pool, weight, tf32):
    dtype = reference.accumulation_dtype(patches)
    B, T = patches.shape[0], texts.shape[0]
    shapes = ((B, T), (0 if pool == 2 else B, T), (B if pool == 0 else 0, T))
    return tuple(patches.new_empty(shape, dtype=dtype) for shape in shapes)


@lib.fake("patch_text_similarity_backward")
def _(
    grad,
    patches,
    texts,
    patch_mask,
    scale,
    bias,
    similarity,
    lse,
    norm,
    pool,
    weight,
    tf32,
    need_patches,
    need_texts,
):
    d_patches = patches.new_empty(
        (patches.shape[0] if need_patches else 0, patches.shape[1], patches.shape[2])
    )
    d_texts = texts.new_empty((texts.shape[0] if need_texts else 0, texts.shape[1]))
    return d_patches, d_texts, grad.new_empty(()), grad.new_empty(())


def _setup(ctx, inputs, output):
    patches, texts, patch_mask, scale, bias, *ctx.options = inputs
    ctx.save_for_backward(patches, texts, patch_mask, scale, bias, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    need_patches, need_texts, _, need_scale, need_bias, *_ = ctx.needs_input_grad
    d_patches, d_texts, d_scale, d_bias = torch.ops.ovseg.patch_text_similarity_backward(
        grad, *ctx.saved_tensors, *ctx.options, need_patches, need_texts
    )
    return (
        d_patches if need_patches else None,
        d_texts if need_texts else None,
        None,
        d_scale if need_scale else None,
        d_bias if need_bias else None,
        *(None,) * 3,
    )


_transforms.autograd("patch_text_similarity", _backward, _setup)
_transforms.no_second_derivative("patch_text_similarity_backward")
_transforms.vmap("patch_text_similarity", images=(0, 2))
# Gradients of texts and scale are sums over the images.
_transforms.vmap("patch_text_similarity_backward")
lib.autocast("patch_text_similarity", features=(0, 1))
