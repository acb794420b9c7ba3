"""contrastive_loss in Triton: the launchers. Kernels: ``_contrastive_kernels``.

Forward: one pass over the matrix, some images at a time, whose tiles leave the statistics of their
rows and columns, merged in a fixed order. Backward: blocks of coefficients, the gradients of the
logits, that stay in the cache, and two products of the library for each. 16-bit features are
multiplied as they are, by powers of two and with factors that make them unit vectors; float32
products are exact, or tf32 where the operator allows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..reference.unit import EPS
from . import _contrastive_kernels as kernels
from ._launch import (
    ACC,
    aligned,
    capability,
    descriptor,
    multiprocessors,
    on_device,
    pitch,
    shared_memory,
    tiles,
)
from ._launch import rows as side_by_side

# Images of one launch: 32 tiles, so that with as many texts there are 1024 tiles in a block of
# coefficients for the 132 of a GPU, and 128 x 128 pieces of either gradient of 512 channels.
ROWS = 4096
PARTS_BYTES = 64 << 20  # of statistics that wait to be merged
BLOCK_BYTES = 32 << 20  # of coefficients
LARGEST = 2.0**14  # coefficient in float16, whose range ends at 2 ** 16
# Images, texts, channels and warps of a tile. Small ones where a product is a loop of additions; on
# tensor cores big ones, half as wide where products keep their operands in registers.
SMALL = {torch.float64: (16, 16, 16, 4), torch.float32: (64, 64, 32, 8)}
BIG = {4: (128, 128, 32, 8), 2: (128, 128, 64, 8)}  # by the bytes of a number
NARROW = {4: (128, 64, 32, 8), 2: (128, 64, 64, 8)}
SCRATCH = 2 << 10  # bytes of shared memory for sums over the threads of a tile


@dataclass
class _Side:
    """Features of one side as the kernels read them; no factors where they are unit vectors."""

    rows: torch.Tensor  # [count, P], side by side: P is D, or more and a multiple of 16
    D: int
    factor: torch.Tensor | None = None  # [count]
    inverse: torch.Tensor | None = None  # [count], of the length of the features that came


def _side(x: torch.Tensor, normalize: bool) -> _Side:
    """Return the rows of ``x``, by a power of two and with their factors where ``normalize`` is."""
    count, D = x.shape
    if not normalize and aligned(x) and x.is_contiguous() and D:
        return _Side(x, D)
    P = pitch(max(1, D))
    if not normalize:
        return _Side(torch.nn.functional.pad(x, (0, P - D)), D)
    x = side_by_side(x)
    out = x.new_empty(count, P)
    factor, inverse = torch.empty(2, count, dtype=torch.float32, device=x.device)
    with on_device(x):
        kernels.contrastive_loss_scale_rows_kernel[(tiles(count, 4),)](
            x,
            out,
            factor,
            inverse,
            count,
            D,
            P,
            x.stride(0),
            EPS=EPS,
            ALIGNED=aligned(x),
            BR=4,
            BD=256,
            num_warps=4,
        )
    return _Side(out, D, factor, inverse)


@dataclass
class _Problem:
    """The features, positives and tiles of one call, for all its kernels."""

    image: _Side
    text: _Side
    scale: torch.Tensor
    bias: torch.Tensor
    pairs: tuple[torch.Tensor, ...]  # see ``_pairs``
    offset: int
    tile: tuple[int, int]  # images and texts
    options: dict

    def inputs(self) -> tuple:
        """Return the arguments with which a kernel begins that reads tiles of logits."""
        depth = self.options["BD"]
        factors = self.image.factor, self.text.factor
        return (
            self.whole(self.image.rows, self.tile[0], depth),
            self.whole(self.text.rows, self.tile[1], depth),
            *(self.scale if x is None else x for x in factors),
            self.scale,
            self.bias,
            *self.pairs,
        )

    def whole(self, x: torch.Tensor, *tile: int):
        """Return ``x`` as the kernels read or write it."""
        return descriptor(x, list(tile)) if self.options["COPIED"] else x

    def stages(self, besides: int = 0) -> int:
        """Return how many steps of tiles fit into shared memory, ``besides`` other bytes."""
        left = shared_memory(self.scale) - besides - SCRATCH
        step = sum(self.tile) * self.options["BD"] * self.image.rows.element_size()
        return max(2, min(4, left // step))

    def programs(self, images: int, texts: int) -> tuple[int]:
        """Return the grid over as many images and texts: programs walk over their tiles."""
        count = tiles(images, self.tile[0]) * tiles(texts, self.tile[1])
        return (min(count, multiprocessors(self.scale)),)


def _problem(
    image,
    text,
    logit_scale,
    logit_bias,
    image_ids,
    text_ids,
    pair_weights,
    offset,
    sigmoid,
    tf32,
    normalize,
):
    dtype = image.dtype
    on_tensor_cores = tf32 or dtype.itemsize == 2
    chip = capability(image)
    if on_tensor_cores:
        *tile, depth, warps = (BIG if 90 <= chip < 120 else NARROW)[dtype.itemsize]
    else:
        *tile, depth, warps = SMALL[dtype]
    options = {
        "COPIED": chip >= 90,
        "FACTORS": normalize,
        "PAIRS": image_ids is not None,
        "SIGMOID": sigmoid,
        "ACC": ACC[logit_scale.dtype],
        "PRECISION": "tf32" if tf32 else "ieee",
        "BI": tile[0],
        "BJ": tile[1],
        "BD": depth,
        "num_warps": warps,
    }
    return _Problem(
        _side(image, normalize),
        _side(text, normalize),
        logit_scale,
        logit_bias,
        _pairs(image_ids, text_ids, pair_weights, logit_scale, image.shape[0]),
        offset,
        (tile[0], tile[1]),
        options,
    )


def _pairs(image_ids, text_ids, pair_weights, none, images):
    """Return the places where the pairs of every image begin and end, their texts, their weights.

    Equal ids are as many places in the sorted texts.
    """
    if image_ids is None:
        return none, none, none, none
    if pair_weights is None:
        ids, texts = text_ids.sort(stable=True)
        begins = torch.searchsorted(ids, image_ids)
        ends = torch.searchsorted(ids, image_ids, right=True)
        return begins, ends, texts, torch.ones_like(texts, dtype=none.dtype)
    image_ids = image_ids.contiguous()
    starts, texts = image_ids[: images + 1], image_ids[images + 1 :]
    weights = torch.empty_like(pair_weights[0])
    with on_device(starts):
        kernels.contrastive_loss_list_kernel[(tiles(images, 128),)](
            starts, texts, pair_weights[0].contiguous(), weights, images, BR=128, num_warps=4
        )
    return starts, starts[1:], texts, weights


def _count(problem, image_ids, text_ids, pair_weights, rows, columns):
    """Write the sums of p of rows and columns into their statistics."""
    B, T = rows.shape[1], columns.shape[1]
    if image_ids is None:
        offset = problem.offset
        rows[2, max(0, -offset) : max(0, min(B, T - offset))] = 1
        columns[2, max(0, offset) : max(0, min(T, B + offset))] = 1
    elif pair_weights is None:
        begins, ends, *_ = problem.pairs
        images = image_ids.sort().values
        rows[2] = ends - begins
        last = torch.searchsorted(images, text_ids, right=True)
        columns[2] = last - torch.searchsorted(images, text_ids)
    else:
        for out, starts, weights in zip(
            (rows, columns), (image_ids, text_ids), pair_weights, strict=True
        ):
            with on_device(out):
                kernels.contrastive_loss_counts_kernel[(tiles(out.shape[1], 128),)](
                    starts, weights, out[2], out.shape[1], BR=128, ACC=ACC[out.dtype], num_warps=4
                )


def stats(
    image,
    text,
    logit_scale,
    logit_bias,
    image_ids,
    text_ids,
    pair_weights,
    offset,
    sigmoid,
    tf32,
    normalize,
):
    """Return (rows [3, B], columns [3, T]) as ``ovseg::contrastive_stats`` does."""
    B, T = image.shape[0], text.shape[0]
    rows, columns = logit_scale.new_zeros(3, B), logit_scale.new_zeros(3, T)
    if B == 0 or T == 0:
        rows[2] = float(sigmoid)
        rows[0] = columns[0] = 0.0 if sigmoid else -torch.inf
        return rows, columns
    problem = _problem(
        image,
        text,
        logit_scale,
        logit_bias,
        image_ids,
        text_ids,
        pair_weights,
        offset,
        sigmoid,
        tf32,
        normalize,
    )
    width = 1 if sigmoid else 3  # statistics of a part
    text_tiles = tiles(T, problem.tile[1])
    a_tile = 2 * width * max(T, problem.tile[0]) * logit_scale.element_size()
    size = min(ROWS, problem.tile[0] * max(1, PARTS_BYTES // a_tile))
    image_tiles = tiles(min(size, B), problem.tile[0])
    row_parts = logit_scale.new_empty(text_tiles * width * min(size, B))
    column_parts = logit_scale.new_empty(0 if sigmoid else (1 + image_tiles) * width * T)
    options = {key: problem.options[key] for key in ("SIGMOID", "ACC")}
    merging = {**options, "BR": 32, "BP": 32, "num_warps": 4}
    with on_device(image):
        for first in range(0, B, size):
            last = min(first + size, B)
            kernels.contrastive_loss_stats_kernel[problem.programs(last - first, T)](
                *problem.inputs(),
                row_parts,
                column_parts,
                first,
                last,
                B,
                T,
                problem.image.rows.shape[1],
                problem.offset,
                num_stages=problem.stages(),
                **problem.options,
            )
            kernels.contrastive_loss_merge_kernel[(tiles(last - first, merging["BR"]),)](
                row_parts,
                rows[:, first:],
                0,
                text_tiles,
                last - first,
                B,
                KEEP=False,
                **merging,
            )
            if not sigmoid:
                kernels.contrastive_loss_merge_kernel[(tiles(T, merging["BR"]),)](
                    column_parts,
                    columns,
                    int(first == 0),
                    1 + tiles(last - first, problem.tile[0]),
                    T,
                    T,
                    KEEP=last < B,
                    **merging,
                )
    if sigmoid:
        rows[2] = 1
    else:
        _count(problem, image_ids, text_ids, pair_weights, rows, columns)
    return rows, columns


def backward(
    grad,
    image,
    text,
    logit_scale,
    logit_bias,
    image_ids,
    text_ids,
    pair_weights,
    rows,
    columns,
    row_weight,
    column_weight,
    offset,
    sigmoid,
    tf32,
    normalize,
    need_image,
    need_text,
):
    """Return the four gradients as ``ovseg::contrastive_loss_backward`` does.

    They are d image, d text, d logit_scale, d logit_bias.
    """
    (B, D), T = image.shape, text.shape[0]
    if B == 0 or T == 0:
        features = image.new_zeros(B * need_image, D), text.new_zeros(T * need_text, D)
        return *features, torch.zeros_like(logit_scale), torch.zeros_like(logit_bias)
    problem = _problem(
        image,
        text,
        logit_scale,
        logit_bias,
        image_ids,
        text_ids,
        pair_weights,
        offset,
        sigmoid,
        tf32,
        normalize,
    )
    weights = [row_weight, column_weight]
    if image.dtype == torch.float16:
        # The largest coefficient is at most both weights; small ones lie 2 ** 38 below.
        unit = torch.maximum(row_weight.amax(), column_weight.amax()) / LARGEST
        unit = torch.where(unit == 0, 1.0, unit)
        weights = [x / unit for x in weights]
        grad = grad * unit
    if sigmoid:
        vectors = [x.contiguous() for x in weights]
    else:
        vectors = [_vectors(*side) for side in zip((rows, columns), weights, strict=True)]
    sums_of_images, sums_of_texts, shares = _products(problem, vectors, need_image, need_text)
    by = grad * logit_scale
    d_image = _gradient(problem.image, sums_of_images, by)
    d_text = _gradient(problem.text, sums_of_texts, by)
    d_scale, d_bias = (shares.sum(0) * grad).to(logit_scale.dtype)
    return d_image, d_text, d_scale.clone(), d_bias.clone()


def _vectors(part: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return [2, count] of one side: what softmax coefficients need of its rows."""
    part, weight = part.contiguous(), weight.contiguous()
    count = weight.shape[0]
    out = part.new_empty(2, count)
    with on_device(part):
        kernels.contrastive_loss_bwd_vectors_kernel[(tiles(count, 256),)](
            part, weight, out, count, BR=256, num_warps=4
        )
    return out


def _products(problem, vectors, need_image, need_text):
    """Return the sums of (7) without upstream gradient and scale, and d scale, d bias of tiles."""
    image, text = problem.image.rows, problem.text.rows
    (B, D), T = image.shape, text.shape[0]
    height = min(ROWS, B)
    limit = BLOCK_BYTES // (ROWS * image.element_size())
    width = min(T, max(1, limit // problem.tile[1]) * problem.tile[1])
    acc = problem.scale.dtype
    d_image, d_text = (
        torch.zeros(len(x) if need else 0, D, dtype=acc, device=image.device)
        for x, need in ((image, need_image), (text, need_text))
    )
    block = image.new_empty(height, pitch(width))
    factor = problem.scale if problem.text.factor is None else problem.text.factor
    counts = tiles(B, problem.tile[0]) * tiles(T, problem.tile[1])
    shares = torch.zeros(counts, 2, dtype=torch.float64, device=image.device)
    stages = problem.stages(problem.tile[0] * problem.tile[1] * image.element_size())
    done = 0
    with on_device(image):
        for first in range(0, B, height):
            last = min(first + height, B)
            for left in range(0, T, width):
                right = min(left + width, T)
                out = block[: last - first, : right - left]
                kernels.contrastive_loss_coefficients_kernel[
                    problem.programs(last - first, right - left)
                ](
                    *problem.inputs(),
                    *vectors,
                    factor,
                    problem.whole(out, *problem.tile),
                    shares[done:],
                    first,
                    last,
                    left,
                    right,
                    B,
                    T,
                    D,
                    block.shape[1],
                    problem.offset,
                    num_stages=stages,
                    **problem.options,
                )
                done += tiles(last - first, problem.tile[0]) * tiles(right - left, problem.tile[1])
                if need_image:
                    _add_product(d_image[first:last], out, text[left:right])
                if need_text:
                    _add_product(d_text[left:right], out.T, image[first:last])
    return d_image, d_text, shares


def _add_product(sums: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a b to ``sums``, by the library; 16-bit factors keep the float32 of its sums."""
    if a.dtype == sums.dtype:
        torch.addmm(sums, a, b, out=sums)
    elif sums.device.type == "cuda":
        torch.addmm(sums, a, b, out_dtype=sums.dtype, out=sums)
    else:  # which has no such product
        sums += a.to(sums.dtype) @ b.to(sums.dtype)


def _gradient(side: _Side, sums: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the features that came, from their sums of (7) and ``by``."""
    count, P = sums.shape
    if side.factor is None or count == 0:
        return (sums[:, : side.D] * by).to(side.rows.dtype)
    out = side.rows.new_empty(count, side.D)
    with on_device(sums):
        kernels.contrastive_loss_bwd_rows_kernel[(tiles(count, 4),)](
            sums,
            side.rows,
            side.factor,
            side.inverse,
            by,
            out,
            count,
            side.D,
            P,
            EPS=EPS,
            ALIGNED=P == side.D,
            BR=4,
            BD=256,
            num_warps=4,
        )
    return out
