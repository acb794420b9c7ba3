"""patch_text_similarity in Triton: forward and recomputing backward.

The Gram form of 16-bit inputs is ``_patch_text_gram.py``'s. All else is here, in the pooled-vector
form, by the plan of csrc/patch_text_similarity: cosines of raw operands scaled by the norms, a
chunk of images at a time, one owner for every output element and a fixed order for every sum.
Equation numbers: ``ovseg_kernels/ops``.
"""

from __future__ import annotations

import torch

from ..reference.patch_text_similarity import EPS, accumulation_dtype
from . import _patch_text_gram as gram
from ._launch import (
    ACC,
    aligned,
    chunk_size,
    on_device,
    pitch,
    row_norms,
    rows,
    tiles,
)
from ._patch_text_kernels import (
    patch_text_similarity_bwd_coefficients_kernel,
    patch_text_similarity_bwd_patches_kernel,
    patch_text_similarity_bwd_texts_kernel,
    patch_text_similarity_fwd_kernel,
    patch_text_similarity_pooled_norms_kernel,
    patch_text_similarity_vectors_kernel,
    patch_text_similarity_weights_kernel,
)

CHUNK_BYTES = 64 << 20
SLOTS = 16
# (texts, patches, channels) of a tile and warps, by bytes of an element: fixed, so that two
# machines choose equally. Chosen by what the compiler says of registers, spills and shared memory
# (tests/packaging/triton_gate.py); not tuned on a GPU.
CONFIGS = {2: (64, 64, 64, 4), 4: (64, 64, 32, 8), 8: (32, 32, 16, 4)}


class _Call:
    """The arguments that all kernels of one call share."""

    def __init__(self, patches, texts, mask, scale, bias, pool, weight, tf32):
        acc = accumulation_dtype(patches)
        self.patches, self.texts, self.scale, self.bias, self.pool = (
            rows(patches),
            rows(texts),
            scale,
            bias,
            pool,
        )
        self.mask = patches if mask is None else mask.contiguous().view(torch.uint8)
        self.B, self.N, self.D = patches.shape
        self.T, self.P = texts.shape[0], pitch(patches.shape[1])
        self.dtype = acc
        # Coefficients can be of any size: bfloat16 keeps its range; float16 is exact in tf32 and
        # its products go through it.
        self.between = patches.dtype if patches.dtype == torch.bfloat16 else acc
        self.precision = "tf32" if tf32 else "ieee"
        self.back = "tf32" if tf32 or patches.dtype == torch.float16 else "ieee"
        with on_device(patches):
            self.text_norms = row_norms(self.texts, acc)
        self.BT, self.BN, self.BD, self.warps = CONFIGS[patches.element_size()]
        self.back_blocks = CONFIGS[torch.empty((), dtype=self.between).element_size()]
        self.strides = *self.patches.stride()[:2], self.texts.stride(0)
        self.aligned = aligned(self.patches, self.texts)
        self.keep = mask
        self.masked, self.sigmoid, self.acc = mask is not None, weight == 1 and pool != 2, ACC[acc]

    def norms(self, image: slice) -> torch.Tensor:
        """Return the norms [chunk, N]; a masked patch has none, whatever it holds."""
        norms = row_norms(self.patches[image], self.dtype)
        return norms if self.keep is None else norms.masked_fill_(~self.keep[image], 0)

    def new(self, *shape, dtype=None):
        return self.patches.new_empty(shape, dtype=dtype or self.dtype)

    def chunks(self, bytes_per_image: int):
        size = chunk_size(self.B, bytes_per_image, CHUNK_BYTES)
        for first in range(0, self.B, size):
            yield first, min(size, self.B - first)

    def fwd(self, first, images, norms, similarity, lse, best):
        patch_text_similarity_fwd_kernel[(tiles(self.T, self.BT) * images,)](
            self.patches,
            self.texts,
            self.mask,
            self.scale,
            self.bias,
            norms,
            self.text_norms,
            similarity,
            lse,
            best,
            first,
            self.T,
            self.N,
            self.D,
            *self.strides,
            ALIGNED=self.aligned,
            MASKED=self.masked,
            SIGMOID=self.sigmoid,
            POOL=self.pool,
            ACC=self.acc,
            PRECISION=self.precision,
            BT=self.BT,
            BN=self.BN,
            BD=self.BD,
            num_warps=self.warps,
        )

    def weights(self, first, images, norms, lse):
        out = self.new(images, self.T, self.P, dtype=self.between)
        patch_text_similarity_weights_kernel[
            (tiles(self.T, self.BT) * tiles(self.N, self.BN) * images,)
        ](
            self.patches,
            self.texts,
            self.mask,
            self.scale,
            self.bias,
            norms,
            self.text_norms,
            lse,
            out,
            first,
            self.T,
            self.N,
            self.P,
            self.D,
            *self.strides,
            ALIGNED=self.aligned,
            MASKED=self.masked,
            SIGMOID=self.sigmoid,
            ACC=self.acc,
            PRECISION=self.precision,
            BT=self.BT,
            BN=self.BN,
            BD=self.BD,
            num_warps=self.warps,
        )
        return out


def forward(patches, texts, mask, scale, bias, pool, weight, tf32):
    """Return (similarity, lse, norm) as ``ovseg::patch_text_similarity`` does."""
    B, T = patches.shape[0], texts.shape[0]
    acc = accumulation_dtype(patches)
    similarity = patches.new_empty(B, T, dtype=acc)
    lse = patches.new_empty(0 if pool == 2 else B, T, dtype=acc)
    norm = patches.new_empty(B if pool == 0 else 0, T, dtype=acc)
    if similarity.numel() == 0:
        return similarity, lse, norm
    if gram.has_forward(patches):
        sigmoid = weight == 1 and pool != 2
        gram.forward(patches, texts, mask, scale, bias, pool, sigmoid, similarity, lse, norm)
        return similarity, lse, norm
    x = _Call(patches, texts, mask, scale, bias, pool, weight, tf32)
    BT, BN, BD, warps = x.back_blocks
    with on_device(patches):
        for first, images in x.chunks(x.T * x.P * 4):
            norms = x.norms(slice(first, first + images))
            best = x.new(images if pool == 2 else 0, x.T, dtype=torch.int32)
            x.fwd(first, images, norms, similarity, lse, best)
            if pool != 0:
                continue
            weights = x.weights(first, images, norms, lse)
            patch_text_similarity_pooled_norms_kernel[(tiles(x.T, BT) * images,)](
                weights,
                x.patches,
                x.texts,
                x.mask,
                x.text_norms,
                lse,
                similarity,
                norm,
                first,
                x.T,
                x.N,
                x.P,
                x.D,
                *x.strides,
                ALIGNED=x.aligned,
                MASKED=x.masked,
                ACC=x.acc,
                PRECISION=x.back,
                BT=BT,
                BN=BN,
                BD=BD,
                num_warps=warps,
            )
    return similarity, lse, norm


def backward(
    grad,
    patches,
    texts,
    mask,
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
    """Return the four gradients as ``ovseg::patch_text_similarity_backward`` does.

    They are d patches, d texts, d scale, d bias.
    """
    B, N, D = patches.shape
    T = texts.shape[0]
    d_patches = patches.new_empty(B if need_patches else 0, N, D)
    d_texts = texts.new_empty(T if need_texts else 0, D)
    d_scale, d_bias = grad.new_zeros(()), grad.new_zeros(())
    if grad.numel() == 0:
        return d_patches.zero_(), d_texts.zero_(), d_scale, d_bias
    grad = grad.contiguous()
    if gram.has_backward(patches, pool):
        saved = similarity, lse, norm, pool, weight == 1, d_patches, d_texts
        d_scalars = gram.backward(grad, patches, texts, mask, scale, bias, *saved)
        d_scale.copy_(d_scalars[0])
        if weight == 1:
            d_bias.copy_(d_scalars[1])
        return d_patches, d_texts, d_scale, d_bias
    x = _Call(patches, texts, mask, scale, bias, pool, weight, tf32)
    BT, BN, BD, warps = x.back_blocks
    per_image = (
        x.T * (2 * x.P + x.D) * x.new(0, dtype=x.between).element_size()
        + tiles(x.T, x.BT) * x.N * grad.element_size()
    )
    size = chunk_size(x.B, per_image, CHUNK_BYTES)
    slots = min(SLOTS, size, tiles(256, tiles(x.T, BT) * tiles(x.D, BD)))
    sums = x.new(slots if need_texts else 0, x.T, x.D)
    d_scalars = torch.zeros(2, dtype=torch.float64, device=grad.device)
    with on_device(patches):
        for first, images in x.chunks(per_image):
            norms = x.norms(slice(first, first + images))
            best = x.new(images if pool == 2 else 0, x.T, dtype=torch.int32)
            weights = vectors = x.new(0, dtype=x.between)
            if pool == 2:  # which patch it was
                x.fwd(first, images, norms, x.new(x.B, x.T), lse, best)
            if pool == 0:
                weights, vectors = (
                    x.weights(first, images, norms, lse),
                    x.new(images, x.T, x.D, dtype=x.between),
                )
                patch_text_similarity_vectors_kernel[(tiles(x.T, BT) * tiles(x.D, BD) * images,)](
                    weights,
                    x.patches,
                    x.mask,
                    norm,
                    vectors,
                    first,
                    x.T,
                    x.N,
                    x.P,
                    x.D,
                    *x.strides[:2],
                    ALIGNED=x.aligned,
                    MASKED=x.masked,
                    ACC=x.acc,
                    PRECISION=x.back,
                    BT=BT,
                    BN=BN,
                    BD=BD,
                    num_warps=warps,
                )
            text_tiles, patch_tiles = tiles(x.T, x.BT), tiles(x.N, x.BN)
            coefficients = x.new(images, x.T, x.P, dtype=x.between)
            factors, along = x.new(images, x.T), x.new(images, text_tiles, x.N)
            scalars = x.new(images * text_tiles * patch_tiles, 2, dtype=torch.float64)
            patch_text_similarity_bwd_coefficients_kernel[(text_tiles * patch_tiles * images,)](
                x.patches,
                x.texts,
                x.mask,
                scale,
                bias,
                norms,
                x.text_norms,
                similarity,
                lse,
                norm,
                best,
                grad,
                vectors,
                coefficients,
                factors,
                along,
                scalars,
                first,
                x.T,
                x.N,
                x.P,
                x.D,
                *x.strides,
                ALIGNED=x.aligned,
                MASKED=x.masked,
                SIGMOID=x.sigmoid,
                POOL=pool,
                ACC=x.acc,
                PRECISION=x.precision,
                BACK=x.back,
                BT=x.BT,
                BN=x.BN,
                BD=x.BD,
                num_warps=8,  # two accumulators: with 4 they spill
            )
            d_scalars += scalars.sum(0)
            if need_patches:
                # What the projection onto the sphere takes away; a norm clamped at EPS is a
                # constant and has none.
                back = (along.sum(1) / norms / norms).masked_fill_(norms < EPS, 0)
                patch_text_similarity_bwd_patches_kernel[
                    (tiles(x.N, BN) * tiles(x.D, BD) * images,)
                ](
                    coefficients,
                    x.texts,
                    weights,
                    vectors,
                    factors,
                    back,
                    x.patches,
                    x.mask,
                    d_patches,
                    first,
                    x.T,
                    x.N,
                    x.P,
                    x.D,
                    *x.strides,
                    ALIGNED=x.aligned,
                    MASKED=x.masked,
                    VECTOR=pool == 0,
                    ACC=x.acc,
                    PRECISION=x.back,
                    # three would not fit the shared memory of sm_86 to sm_120
                    BT=BT,
                    BN=BN,
                    BD=BD,
                    num_warps=warps,
                    num_stages=2,
                )
            if need_texts:
                patch_text_similarity_bwd_texts_kernel[(tiles(x.T, BT) * tiles(x.D, BD) * slots,)](
                    coefficients,
                    x.patches,
                    x.mask,
                    sums,
                    first,
                    images,
                    slots,
                    x.T,
                    x.N,
                    x.P,
                    x.D,
                    *x.strides[:2],
                    ALIGNED=x.aligned,
                    MASKED=x.masked,
                    ACC=x.acc,
                    PRECISION=x.back,
                    BT=BT,
                    BN=BN,
                    BD=BD,
                    num_warps=warps,
                )
    if need_texts:
        dq, rq = sums.sum(0), x.text_norms[:, None]
        q = texts.to(x.dtype) / rq.clamp_min(EPS)
        # The coefficients hold 1 / |q| already.
        d_texts.copy_(dq - q * (dq * q).sum(-1, keepdim=True).masked_fill(rq < EPS, 0))
    d_scale.copy_(d_scalars[0])
    if weight == 1:
        d_bias.copy_(d_scalars[1])
    return d_patches, d_texts, d_scale, d_bias
