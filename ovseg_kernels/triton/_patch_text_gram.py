"""patch_text_similarity of 16-bit inputs in Triton: the Gram form.

Forward, on sm_90 and up to 208 patches: one kernel has all cosines of 128 texts with an image in
registers, and |v|^2 from them and the Gram matrix; rows whose |v|^2 has cancelled are computed
again by a kernel that leaves at once where there are none. Backward, on all devices: two kernels
with one product each, and library products between them (``_patch_text_gram_bwd_kernels.py`` has
the equations). Both work off the images in chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .._library import autocast_type
from ..reference.patch_text_similarity import EPS
from ._launch import aligned, capability, chunk_size, multiprocessors, on_device, rows, tiles
from ._patch_text_gram_bwd_kernels import (
    patch_text_similarity_gram_bwd_coefficients_kernel,
    patch_text_similarity_gram_bwd_hessian_kernel,
    patch_text_similarity_gram_bwd_patches_kernel,
    patch_text_similarity_gram_bwd_similarity_kernel,
    patch_text_similarity_gram_bwd_weights_kernel,
)
from ._patch_text_gram_kernels import (
    patch_text_similarity_gram_cancelled_kernel,
    patch_text_similarity_gram_fwd_kernel,
    patch_text_similarity_gram_kernel,
    patch_text_similarity_rows_kernel,
)

FORWARD_BYTES = 64 << 20
# 64 images with 4096 texts and 196 patches fit: fewer would leave processors without a tile of H.
BACKWARD_BYTES = 448 << 20
WINDOW = 208  # patches whose cosines with 128 texts the registers of a block of sm_90 hold
BK = 64  # channels at a time
REPAIR_TEXTS = 64


def hopper(x: torch.Tensor) -> bool:
    """Return whether products read their operands from shared memory: sm_90."""
    return capability(x) == 90


def has_forward(patches: torch.Tensor) -> bool:
    """Return whether :func:`forward` is for these patches."""
    return patches.element_size() == 2 and patches.shape[1] <= WINDOW and hopper(patches)


def has_backward(patches: torch.Tensor, pool: int) -> bool:
    """Return whether :func:`backward` is for these patches.

    G p takes N^2 and v takes 2 N D: far more patches than channels are not for it.
    """
    few = pool == 1 or patches.shape[1] <= max(WINDOW, 2 * patches.shape[2])
    return patches.element_size() == 2 and pool != 2 and few


@dataclass(frozen=True)
class Tiling:
    """How products are cut: texts of a tile, and the parts of its patches."""

    texts: int
    parts: tuple[int, int, int]
    tma: bool

    @property
    def width(self) -> int:
        """Return the patches of a tile."""
        return sum(self.parts)

    def pitch(self, patches: int) -> int:
        """Return the rows of an image in buffers, which tiles end without a rest."""
        return tiles(patches, self.width) * self.width

    def options(self) -> dict:
        """Return the arguments that all kernels with products by text have."""
        W1, W2, W3 = self.parts
        return {"W1": W1, "W2": W2, "W3": W3, "TMA": self.tma, "BT": self.texts, "BK": BK}


def tiling(patches: torch.Tensor) -> Tiling:
    """Return the tiling for patches [B, N, D], by what the compiler says of registers."""
    if not hopper(patches):
        return Tiling(64, (128, 0, 0), False)
    N = patches.shape[1]
    for parts in ((64, 0, 0), (128, 0, 0), (128, 64, 0), (128, 64, 16)):
        if sum(parts) >= N:
            return Tiling(128, parts, True)
    return Tiling(128, (128, 0, 0), True)


class Copies:
    """Rows of patches or texts brought to lengths of 1 to 2, with their lengths and what is left.

    ``rows`` is [images, P, K] with K a multiple of 64, ``lengths`` and ``inverse`` [images, P].
    """

    def __init__(self, x: torch.Tensor, mask: torch.Tensor | None, first: int, images: int, P: int):
        N, D = x.shape[1:]
        K = tiles(D, BK) * BK
        self.rows = x.new_empty(images, P, K)
        self.lengths = x.new_empty(images, P, dtype=torch.float32)
        self.inverse = torch.empty_like(self.lengths)
        patch_text_similarity_rows_kernel[(tiles(images * P, 4),)](
            x,
            x if mask is None else mask,
            self.rows,
            self.lengths,
            self.inverse,
            first,
            images * P,
            N,
            P,
            D,
            K,
            *x.stride()[:2],
            ALIGNED=aligned(x),
            MASKED=mask is not None,
            BR=4,
            BD=128,
            num_warps=4,
        )


def blocks(x: torch.Tensor, height: int, width: int, tma: bool):
    """Return what kernels read blocks of [.., P, K] by: a descriptor, or the tensor itself."""
    return TensorDescriptor.from_tensor(x, [1, height, width]) if tma else x


def gram(copies: Copies, tma: bool, half: bool) -> torch.Tensor:
    """Return the cosines [images, P, P] of patches with each other.

    Half: on and above the diagonal blocks.
    """
    images, P, K = copies.rows.shape
    out = copies.rows.new_empty(images, P, P, dtype=torch.float16)
    size = 128 if tma else 64
    patch_text_similarity_gram_kernel[(tiles(P, size) ** 2 * images,)](
        blocks(copies.rows, size, BK, tma),
        out,
        copies.inverse,
        P,
        K,
        HALF=half,
        TMA=tma,
        BN=size,
        BK=BK,
        num_warps=8 if tma else 4,
    )
    return out


class _Call:
    """The inputs of a call, their tiling and chunks, for its forward and its backward."""

    def __init__(self, patches, texts, mask, scale, bias, sigmoid, limit, bytes_per_image):
        self.patches = rows(patches)
        self.scale = scale
        self.bias = bias
        self.sigmoid = sigmoid
        self.mask = None if mask is None else mask.contiguous().view(torch.uint8)
        self.B, self.N, self.D = patches.shape
        self.T = texts.shape[0]
        self.tiling = tiling(patches)
        self.P = self.tiling.pitch(self.N)
        self.K = tiles(self.D, BK) * BK
        self.chunk = chunk_size(self.B, bytes_per_image(self.P, self.K), limit)
        self.texts = Copies(rows(texts)[None], None, 0, 1, self.T)

    def chunks(self):
        """Yield the first image and the number of images of every chunk."""
        for first in range(0, self.B, self.chunk):
            yield first, min(self.chunk, self.B - first)

    def copies(self, first: int, images: int) -> Copies:
        return Copies(self.patches, self.mask, first, images, self.P)

    def operands(self, u: Copies, texts: int):
        """Return the texts, the three parts of the patches, and the tables of both."""
        tma = self.tiling.tma
        parts = [blocks(u.rows, width or 16, BK, tma) for width in self.tiling.parts]
        tables = u.lengths, u.inverse, self.texts.inverse, self.scale, self.bias
        return blocks(self.texts.rows, texts, BK, tma), *parts, *tables

    def grid(self, images: int, texts: int, columns: int = 1) -> tuple[int]:
        """Return as many programs as run at a time, or as there are tiles."""
        return (min(images * tiles(self.T, texts) * columns, multiprocessors(self.patches)),)


def forward(patches, texts, mask, scale, bias, pool, sigmoid, similarity, lse, norm):
    """Write similarity, lse and norm as ``ovseg::patch_text_similarity`` returns them."""
    with on_device(patches):
        x = _Call(
            patches, texts, mask, scale, bias, sigmoid, FORWARD_BYTES, lambda P, K: 2 * P * (K + P)
        )
        cancelled = torch.zeros(tiles(x.B, x.chunk), dtype=torch.int32, device=patches.device)
        options = x.tiling.options()
        W1, W2, W3 = x.tiling.parts
        pairs = (W1, W1), (W1, W2), (W1, W3), (W2, W2), (W2, W3), (W3, W3)
        for first, images in x.chunks():
            u = x.copies(first, images)
            table = gram(u, x.tiling.tma, half=True) if pool == 0 else u.rows
            grams = [blocks(table, a or 16, b or 16, x.tiling.tma) for a, b in pairs]
            some = cancelled[first // x.chunk :]
            q, u1, u2, u3, *tables = x.operands(u, x.tiling.texts)
            shared = similarity, lse, norm, some, first, images, x.T, x.K
            patch_text_similarity_gram_fwd_kernel[x.grid(images, x.tiling.texts)](
                q,
                u1,
                u2,
                u3,
                *grams,
                *tables,
                *shared,
                SIGMOID=sigmoid,
                POOL=pool,
                **options,
                num_warps=8,
                num_stages=3,
            )
            if pool == 0:
                patch_text_similarity_gram_cancelled_kernel[x.grid(images, REPAIR_TEXTS)](
                    *x.operands(u, REPAIR_TEXTS),
                    *shared,
                    SIGMOID=sigmoid,
                    **options | {"BT": REPAIR_TEXTS},
                    num_warps=8,
                    num_stages=2,
                )


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the product of 16-bit matrices, or batches of them, in float32."""
    with torch.autocast(autocast_type(a.device), enabled=False):
        if a.device.type != "cuda":
            return a.float() @ b.float()
        return (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out_dtype=torch.float32)


def gram_products(weights: torch.Tensor, table: torch.Tensor, dtype: torch.dtype):
    """Return G p [images, T, P], and where g phi p is to go.

    s - phi G p is a small difference: for float16 inputs both are float32. bfloat16 ones have fewer
    digits, and half the traffic: float16, and one place for both.
    """
    if dtype == torch.float16:
        return product(weights, table), torch.empty_like(weights)
    with torch.autocast(autocast_type(weights.device), enabled=False):
        products = torch.bmm(weights, table)
    return products, products


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
    sigmoid,
    d_patches,
    d_texts,
):
    """Write d patches and d texts where they have rows; return d scale, d bias in float64."""
    T, vector = texts.shape[0], pool == 0
    need_patches, need_texts = d_patches.shape[0] > 0, d_texts.shape[0] > 0

    def bytes_per_image(P, K):
        tables = 2 * T * P * ((5 if patches.dtype == torch.float16 else 3) if vector else 1)
        return tables + P * K * (2 + 8 * need_patches) + 8 * P * P * vector

    with on_device(patches):
        x = _Call(patches, texts, mask, scale, bias, sigmoid, BACKWARD_BYTES, bytes_per_image)
        sums = x.texts.lengths.new_zeros(T if need_texts else 0, x.K)
        scalars = torch.zeros(2, dtype=torch.float64, device=grad.device)
        for first, images in x.chunks():
            u = x.copies(first, images)
            weights = products = outer = u.rows
            phi = similarity[first : first + images]
            if vector:
                table = gram(u, x.tiling.tma, half=False)
                weights, peak, dots = _weights(x, u, first, images, lse, norm, grad)
                products, outer = gram_products(weights, table, patches.dtype)
                phi = _similarity(x, weights, products, dots, phi, norm[first : first + images])
            else:
                peak = grad[first : first + images].abs().amax()
            saved = phi, lse, grad, peak
            m, along, factors = _coefficients(
                x, u, first, images, saved, pool, (weights, products, outer), scalars
            )
            m = m.view(T, images * x.P)
            if need_texts:
                sums.addcmul_(product(m, u.rows.view(-1, x.K)), factors[0])
            if need_patches:
                _patches(x, u, first, images, m, weights, outer, along, factors, d_patches)
        if need_texts:
            _texts(x, texts, sums, d_texts)
    return scalars


def _weights(x: _Call, u: Copies, first, images, lse, norm, grad):
    """Return p [images, T, P], the largest |g p|, and sums of p s by the columns of tiles."""
    columns = x.P // x.tiling.width
    weights = u.rows.new_empty(images, x.T, x.P, dtype=torch.float16)
    texts = x.tiling.texts
    peaks = u.lengths.new_empty(images * columns * tiles(x.T, texts))
    dots = u.lengths.new_empty(columns, images, x.T)
    patch_text_similarity_gram_bwd_weights_kernel[x.grid(images, texts, columns)](
        *x.operands(u, texts),
        lse,
        norm,
        grad,
        blocks(weights, texts, 64, x.tiling.tma),
        blocks(weights, texts, 16, x.tiling.tma),
        peaks,
        dots,
        first,
        images,
        x.T,
        x.P,
        x.K,
        SIGMOID=x.sigmoid,
        **x.tiling.options(),
        num_warps=8,
        num_stages=3,
    )
    return weights, peaks.amax(), dots


def _similarity(x: _Call, weights, products, dots, similarity, norm):
    """Return phi [images, T] of the rounded weights."""
    out = torch.empty_like(similarity)
    count = out.numel()
    patch_text_similarity_gram_bwd_similarity_kernel[(tiles(count, 16),)](
        weights,
        products,
        dots,
        similarity,
        norm,
        out,
        count,
        len(dots),
        x.P,
        BR=16,
        BN=256,
        num_warps=4,
    )
    return out


def _coefficients(x: _Call, u: Copies, first, images, saved, pool, tables, scalars):
    """Return m [1, T, images P], sums along the patches, and what undoes the powers of two.

    ``tables``: p, G p, and what gets g phi p; ``scalars`` gets what the chunk adds.
    """
    columns = x.P // x.tiling.width
    texts, tma = x.tiling.texts, x.tiling.tma
    m = u.rows.new_empty(1, x.T, images * x.P)
    along = u.lengths.new_empty(images, tiles(x.T, texts), x.P)
    factors = u.lengths.new_empty(2)
    sums = scalars.new_empty(images * columns * tiles(x.T, texts), 2)
    q, u1, u2, u3, _, *known = x.operands(u, texts)
    written = [blocks(y, texts, w, tma) for y in (*tables, m) for w in (64, 16)]
    patch_text_similarity_gram_bwd_coefficients_kernel[x.grid(images, texts, columns)](
        q,
        u1,
        u2,
        u3,
        *known,
        *saved,
        *written,
        along,
        sums,
        factors,
        first,
        images,
        x.T,
        x.P,
        x.K,
        SIGMOID=x.sigmoid,
        POOL=pool,
        **x.tiling.options(),
        num_warps=8,
        num_stages=3,
    )
    scalars += sums.sum(0)
    return m, along, factors


def _patches(x: _Call, u: Copies, first, images, m, weights, weighted, along, factors, out):
    """Write dU of a chunk: the last equation of the backward's kernels, by |u_n|."""
    outer = product(m.T, x.texts.rows[0])
    vector = weights is not u.rows
    hessians, hessian_factors = outer, factors
    if vector:
        hessian = product(weighted.transpose(1, 2), weights)
        hessian16 = torch.empty_like(hessian, dtype=u.rows.dtype)
        hessian_factors = factors.new_empty(images)
        patch_text_similarity_gram_bwd_hessian_kernel[(images,)](
            hessian, u.inverse, hessian16, hessian_factors, x.P, BLOCK=4096, num_warps=8
        )
        hessians = product(hessian16, u.rows)
    patch_text_similarity_gram_bwd_patches_kernel[(tiles(images * x.P, 8),)](
        outer,
        hessians,
        u.rows,
        u.lengths,
        u.inverse,
        along,
        factors,
        hessian_factors,
        out,
        first,
        images * x.P,
        x.N,
        x.T,
        x.P,
        x.K,
        x.D,
        ALIGNED=x.D % 16 == 0,
        VECTOR=vector,
        BT=x.tiling.texts,
        BR=8,
        BD=BK,
        num_warps=4,
    )


def _texts(x: _Call, texts, sums, out):
    """Write d texts from dq by 1 / the length of the copies; a clamped norm is a constant."""
    length, inverse = x.texts.lengths[0, :, None], x.texts.inverse[0, :, None]
    dq = sums[:, : x.D] / inverse
    q = x.texts.rows[0, :, : x.D].float() * inverse
    along = (dq * q).sum(-1, keepdim=True).masked_fill(length < EPS, 0)
    out.copy_((dq - q * along) / length.clamp_min(EPS))
