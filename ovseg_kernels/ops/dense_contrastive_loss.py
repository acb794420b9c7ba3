"""dense_contrastive_loss: texts against positive and hard negative pixels, no [T, B N] matrix.

    s_jx = q_j . p_x            unit texts and unit pixels; x runs over all B N pixels          (1)
    P_j  = the k_pos pixels of text j's own images with the largest s_jx                        (2)
    N_j  = the k_neg pixels of all other images with the largest key,
           after the first ``skip`` of them                                                     (3)
           topk: s_jx    semi: s_jx where it lies in [m_j - margin, m_j), m_j = min over P_j
           gumbel: s_jx / tau_h + Gumbel noise (sampling without replacement)
           random: uniform noise

Keys are ordered by value, then by the smaller index: the selection does not depend on tiling or
threads. It is constant in the gradient. Images whose id is the text's are its own, and never
negatives; without ids text j belongs to image j. With z = s / T and Ln_j = logsumexp over N_j:

    mean_of_log  text to pixel_j = mean_{x in P_j} (logaddexp(z_jx, Ln_j) - z_jx)               (4)
    log_of_sum   text to pixel_j = logaddexp(Lp_j, Ln_j) - Lp_j     Lp_j = logsumexp over P_j   (5)
    pixel to text_j = mean_{x in P_j} (logsumexp_k z_kx
                                       - mean of z_kx over the texts k of x's image)            (6)
    L = mean over the texts with a positive of (text to pixel_j + pixel to text_j)              (7)

    du_x = (v - (v . p_x) p_x) / |u_x|
           v = sum over selections of x of (dL/ds_jx q_j + dL/dp_x)                             (8)
    dq_j = sum_x dL/ds_jx p_x   plus the pixel-to-text part, by ``contrastive_loss``'s kernels  (9)

Shapes   pixels [B, N, D]; texts [T, D]; image_ids [B], text_ids [T] int64; rng int64 [2]; scalar
  out.
Dtypes   pixels float32, float64, float16, bfloat16; texts the same or float32; similarities, keys
  and the loss in float32 (float64 for float64). Autocast lowers nothing.
Noise    pixel x of text j takes Philox number j B N + x (ovseg_kernels/philox.py).
Cost     one product 2 T B N D forward; nothing dense backward but the zeros of d pixels. Stored: 2
  T (k_pos + k_neg) numbers, and T k_pos D for pixel_to_text; while selecting, T lists for each
  thread (CPU), or the similarities of a chunk of pixels (CUDA, Triton); twice the product for
  16-bit pixels on CUDA, whose texts are two 16-bit halves.
Errors   ValueError for ranks, sizes, devices, k_pos or k_neg below 1 (more than B N is B N),
  temperatures below 1e-15, one id vector without the other, B != T without ids, a noisy sampling
  without rng or rng without one; TypeError for dtypes and layouts. A NaN similarity is chosen
  before all others (not by semi and random): the loss is NaN.
Source   MGCA-style: the losses of Liu et al., Multi-Grained Cross-modal Alignment, 2024, are not
  public; this form is ours.
"""

from __future__ import annotations

import torch

from .. import _backends, _check, _checking, _transforms
from .. import _library as lib
from .._unit import unit as unit_of
from ..reference import dense_contrastive_loss as reference
from ..reference.patch_text_similarity import accumulation_dtype
from ..results import SelectedPixels
from .contrastive_loss import one_sided

SAMPLINGS = reference.SAMPLINGS
REDUCTIONS = ("mean_of_log", "log_of_sum")
TERMS = ("both", "text_to_pixel", "pixel_to_text")

lib.define(
    "dense_contrastive_loss",
    "dense_contrastive_select(Tensor pixels, Tensor texts, Tensor? image_ids, Tensor? text_ids, "
    "Tensor? rng, int k_pos, int k_neg, int skip, int sampling, float temperature, float margin) "
    "-> (Tensor positive, Tensor negative)",
)
lib.define(
    "dense_contrastive_loss",
    "dense_contrastive_gather(Tensor pixels, Tensor texts, Tensor index, int rows) "
    "-> (Tensor similarity, Tensor unit)",
)
lib.define(
    "dense_contrastive_loss",
    "dense_contrastive_gather_backward(Tensor? grad_similarity, Tensor? grad_unit, Tensor pixels, "
    "Tensor texts, Tensor index, Tensor order, int rows, bool need_pixels, bool need_texts) "
    "-> (Tensor, Tensor)",
)
lib.fallback("dense_contrastive_select", reference.select)
lib.fallback("dense_contrastive_gather", reference.gather)
lib.fallback("dense_contrastive_gather_backward", reference.gather_backward)


def dense_contrastive_loss(
    pixels: torch.Tensor,
    texts: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 0.07,
    k_pos: int = 32,
    k_neg: int = 64,
    sampling: str = "topk",
    image_ids: torch.Tensor | None = None,
    text_ids: torch.Tensor | None = None,
    rng: torch.Tensor | None = None,
    reduction: str = "mean_of_log",
    terms: str = "both",
    skip: int = 0,
    margin: float = 0.1,
    sampling_temperature: float = 0.07,
    selected: SelectedPixels | tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Contrast texts with selected positive and hard negative pixels, equation (7) of this file.

    Args:
        pixels: [B, N, D]; normalised here.
        texts: [T, D]; normalised here.
        temperature: T of the logits; number or tensor of one element, which gets a gradient.
        k_pos: how many of its own pixels a text selects; fewer where there are fewer, and never
            more than B N.
        k_neg: how many of the other pixels, likewise.
        sampling: of negatives: ``topk``, ``semi``, ``gumbel`` or ``random``. With ``skip`` > 0,
            ``topk`` is the window of ranks skip .. skip + k_neg.
        image_ids: [B] int64, given with ``text_ids``: equal ids belong together. Neither: B = T and
            text j belongs to image j. Ids that match nowhere leave no text with a pixel: 0, with a
            gradient of 0. Telling would wait for a GPU.
        text_ids: [T] int64, given with ``image_ids``.
        rng: int64 [seed, offset], for ``gumbel`` and ``random``.
        reduction: ``mean_of_log`` pushes every positive, ``log_of_sum`` lets one easy positive
            satisfy the text.
        terms: ``both``, ``text_to_pixel`` or ``pixel_to_text``.
        skip: so many of the best negatives are left out, as probable false ones.
        margin: of ``semi``.
        sampling_temperature: tau_h of ``gumbel``.
        selected: (2) and (3) themselves, as ``select_pixels`` gives them, in place of all that says
            how they are found. Whether a text's positives are its own is then the caller's.

    Returns:
        The loss, a scalar; 0 where no text has an image.

    Example:
        >>> pixels, texts = torch.randn(4, 49, 16), torch.randn(4, 16)
        >>> dense_contrastive_loss(pixels, texts, k_pos=4, k_neg=8).shape
        torch.Size([])
    """
    positive, negative = (
        _given(pixels, texts, selected, image_ids, text_ids)
        if selected is not None
        else select_pixels(
            pixels,
            texts,
            k_pos=k_pos,
            k_neg=k_neg,
            sampling=sampling,
            image_ids=image_ids,
            text_ids=text_ids,
            rng=rng,
            skip=skip,
            margin=margin,
            sampling_temperature=sampling_temperature,
        )
    )
    _check.one_of("reduction", reduction, REDUCTIONS)
    _check.one_of("terms", terms, TERMS)
    acc = accumulation_dtype(pixels)
    temperature = _check.scalar("temperature", temperature, pixels, acc, least=1e-15)
    with torch.autocast(lib.autocast_type(pixels.device), enabled=False):
        if _backends.use_definition("dense_contrastive_loss", pixels.device):
            ids = (image_ids, text_ids, positive, negative)
            return reference.dense_contrastive_loss(
                pixels, texts, temperature, *ids, reduction, terms
            )
        q = unit_of(texts.to(acc))
        rows = 0 if terms == "text_to_pixel" else positive.shape[1]
        similarity, unit = torch.ops.ovseg.dense_contrastive_gather(
            pixels, q, torch.cat([positive, negative], 1), rows
        )
        there = positive >= 0
        count = there.sum(1)
        weight = (count > 0).to(acc) / (count > 0).sum().clamp(min=1)  # of a text
        loss = similarity.new_zeros(())
        if terms != "pixel_to_text":
            loss = (
                weight * _text_to_pixel(similarity / temperature, there, negative >= 0, reduction)
            ).sum()
        if terms != "text_to_pixel":
            of_row = (there * (weight / count.clamp(min=1))[:, None]).flatten()
            image = positive.clamp(min=0).flatten() // max(1, pixels.shape[1])
            row_ids = image if image_ids is None or len(image_ids) == 0 else image_ids[image]
            column_ids = torch.arange(len(q), device=q.device) if text_ids is None else text_ids
            tf32 = acc == torch.float32 and (
                pixels.dtype.itemsize == 2 or _backends.allow_tf32(pixels)
            )
            loss = loss + one_sided(
                unit.flatten(0, 1), q, 1 / temperature, row_ids, column_ids, of_row, 0, tf32
            )
    return loss


def _given(pixels, texts, selected, image_ids, text_ids):
    """Check selections that were made before.

    On a GPU their range is not checked: reading it would wait.
    """
    _check.tensor("pixels", pixels, 3, "[B, N, D]")
    _check.tensor("texts", texts, 2, "[T, D]")
    _check.shape("texts", texts, (texts.shape[0], pixels.shape[2]), "the D of pixels")
    _check.same("texts", texts, "pixels", pixels, dtype=False)
    _check.pair_ids(image_ids, pixels.shape[0], text_ids, texts.shape[0], "pixels", pixels)
    if not isinstance(selected, tuple) or len(selected) != 2:
        raise TypeError(
            f"selected is a {type(selected).__name__}; expected (positive, negative) of "
            "select_pixels"
        )
    there = pixels.shape[0] * pixels.shape[1]
    for name, index in zip(("selected.positive", "selected.negative"), selected, strict=True):
        _check.tensor(name, index, 2, "[T, k]", (torch.int64,))
        _check.shape(name, index, (texts.shape[0], index.shape[1]), "a row for each of texts")
        _check.same(name, index, "pixels", pixels, dtype=False)
        for part in _checking.looked_at(index) if index.numel() else []:
            low, high = (int(x) for x in part.aminmax())
            if not -1 <= low <= high < there:
                raise ValueError(
                    f"{name} holds {low} to {high}; expected -1 to {there - 1}, pixels of all "
                    "images"
                )
    return selected


def _text_to_pixel(z, positive, negative, reduction):
    """Return (4) or (5) of every text, [T]; 0 where it has no positive."""
    k = positive.shape[1]
    z_p, z_n = z[:, :k], _lse(z[:, k:], negative)
    if reduction == "log_of_sum":
        z_p = _lse(z_p, positive)
        return torch.where(
            positive.any(1), torch.logaddexp(torch.where(positive.any(1), z_p, 0), z_n) - z_p, 0
        )
    terms = torch.where(positive, torch.logaddexp(z_p, z_n[:, None]) - z_p, 0)
    return terms.sum(1) / positive.sum(1).clamp(min=1)


def _lse(z, there):
    """Return logsumexp over those that are there.

    It is -infinity, without a gradient, where none is.
    """
    some = there.any(1)
    inside = torch.where(some[:, None], z.masked_fill(~there, -torch.inf), 0)
    return torch.where(some, inside.logsumexp(1), -torch.inf)


def select_pixels(
    pixels: torch.Tensor,
    texts: torch.Tensor,
    *,
    k_pos: int,
    k_neg: int,
    sampling: str = "topk",
    image_ids: torch.Tensor | None = None,
    text_ids: torch.Tensor | None = None,
    rng: torch.Tensor | None = None,
    skip: int = 0,
    margin: float = 0.1,
    sampling_temperature: float = 0.07,
) -> SelectedPixels:
    """Select positives [T, k_pos] and negatives [T, k_neg] alone, (2) and (3) of this file.

    They are int64, flat indices image N + pixel, best first. Arguments as in
    ``dense_contrastive_loss``. -1 stands where there are fewer; k_pos and k_neg above B N count as
    B N.
    """
    _check.tensor("pixels", pixels, 3, "[B, N, D]")
    _check.tensor("texts", texts, 2, "[T, D]")
    _check.shape("texts", texts, (texts.shape[0], pixels.shape[2]), "the D of pixels")
    _check.same("texts", texts, "pixels", pixels, dtype=False)
    _check.one_of("sampling", sampling, SAMPLINGS)
    for name, value, least in (("k_pos", k_pos, 1), ("k_neg", k_neg, 1), ("skip", skip, 0)):
        _check.integer(name, value, least)
    _check.number("margin", margin, "a positive finite number", least=5e-324)
    _check.divisor("sampling_temperature", sampling_temperature)
    _check.pair_ids(image_ids, pixels.shape[0], text_ids, texts.shape[0], "pixels", pixels)
    if image_ids is None and pixels.shape[0] != texts.shape[0]:
        raise ValueError(
            f"pixels has {pixels.shape[0]} images and texts {texts.shape[0]} rows; "
            "without ids expected as many texts as images: pass image_ids and text_ids"
        )
    noisy = sampling in ("gumbel", "random")
    if noisy != (rng is not None):
        came = "missing" if noisy else "given"
        raise ValueError(
            f"sampling is {sampling!r} and rng is {came}; expected rng with gumbel and random alone"
        )
    if rng is not None:
        rng = _check.rng(rng, "pixels", pixels)
    there = pixels.shape[0] * pixels.shape[1]
    # More than there are would be memory for nothing, and a sum of two such numbers no number.
    k_pos, k_neg, skip = min(k_pos, max(1, there)), min(k_neg, max(1, there)), min(skip, there)
    options = (
        k_pos,
        k_neg,
        skip,
        SAMPLINGS.index(sampling),
        float(sampling_temperature),
        float(margin),
    )
    with torch.no_grad(), torch.autocast(lib.autocast_type(pixels.device), enabled=False):
        unit = unit_of(texts.to(accumulation_dtype(pixels)))
        if _backends.use_definition("dense_contrastive_loss", pixels.device):
            return SelectedPixels(
                *reference.select(pixels, unit, image_ids, text_ids, rng, *options)
            )
        return SelectedPixels(
            *torch.ops.ovseg.dense_contrastive_select(
                pixels.detach(), unit, image_ids, text_ids, rng, *options
            )
        )


@lib.fake("dense_contrastive_select")
def _(pixels, texts, image_ids, text_ids, rng, k_pos, k_neg, *_):
    T = texts.shape[0]
    return texts.new_empty((T, k_pos), dtype=torch.int64), texts.new_empty(
        (T, k_neg), dtype=torch.int64
    )


@lib.fake("dense_contrastive_gather")
def _(pixels, texts, index, rows):
    return texts.new_empty(index.shape), texts.new_empty(texts.shape[0], rows, texts.shape[1])


@lib.fake("dense_contrastive_gather_backward")
def _(grad_similarity, grad_unit, pixels, texts, index, order, rows, need_pixels, need_texts):
    shapes = (
        (pixels.shape[0] if need_pixels else 0, *pixels.shape[1:]),
        (texts.shape[0] if need_texts else 0, texts.shape[1]),
    )
    return pixels.new_empty(shapes[0]), texts.new_empty(shapes[1])


def _setup(ctx, inputs, output):
    pixels, texts, index, ctx.rows = inputs
    ctx.save_for_backward(pixels, texts, index)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_similarity, grad_unit):
    pixels, texts, index = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    # What falls on one pixel lies together: it has one owner and one order.
    order = index.flatten().argsort(stable=True)
    grads = (grad_similarity, grad_unit if ctx.rows else None)
    found = torch.ops.ovseg.dense_contrastive_gather_backward(
        *grads, pixels, texts, index, order, ctx.rows, *needs
    )
    return *(x if need else None for x, need in zip(found, needs, strict=True)), None, None


_transforms.autograd("dense_contrastive_gather", _backward, _setup)
_transforms.no_second_derivative("dense_contrastive_gather_backward")
_transforms.no_second_derivative("dense_contrastive_select")
for _name in (
    "dense_contrastive_select",
    "dense_contrastive_gather",
    "dense_contrastive_gather_backward",
):
    _transforms.vmap(_name)
