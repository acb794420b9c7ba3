"""upsample_argmax in plain torch: the definition, argmax of upsampled classes."""

from __future__ import annotations

import torch

LABEL_TYPES = (torch.int64, torch.int16, torch.uint8)


def between(samples, outputs, dtype, device):
    """Return (lower sample, upper sample, weight of the upper) of every output, (1)."""
    scale = torch.tensor(samples, dtype=dtype) / torch.tensor(outputs, dtype=dtype)
    source = ((torch.arange(outputs, dtype=dtype, device=device) + 0.5) * scale - 0.5).clamp(min=0)
    # The source, times 2 outputs.
    twice = (2 * torch.arange(outputs, device=device) + 1) * samples - outputs
    # Rounding must not give a sample a weight that has none: it may be infinite.
    source = torch.where(
        (twice >= 0) & (twice % (2 * outputs) == 0), twice // (2 * outputs), source
    )
    low = source.to(torch.int64).clamp(max=samples - 1)
    return low, (low + 1).clamp(max=samples - 1), source - low


def upsample(logits, size):
    """Return the logits upsampled to ``size``: bilinear, align_corners False, (2).

    With one difference to F.interpolate: a sample of weight zero does not count, be it infinite.
    """

    def weighted(weight, x):
        return torch.where(weight == 0, 0, weight * x)

    low, high, part = between(logits.shape[2], size[0], logits.dtype, logits.device)
    rows = weighted(1 - part[:, None], logits[:, :, low]) + weighted(
        part[:, None], logits[:, :, high]
    )
    low, high, part = between(logits.shape[3], size[1], logits.dtype, logits.device)
    return weighted(1 - part, rows[..., low]) + weighted(part, rows[..., high])


def upsample_argmax(
    logits, bias, class_labels, height, width, threshold, background, label_type, want_value
):
    """Return (labels [B, H, W], value of the winner [B, H, W] or empty), (3) and (4)."""
    return winners(
        upsample(logits, (height, width)),
        bias,
        class_labels,
        threshold,
        background,
        label_type,
        want_value,
    )


def winners(z, bias, class_labels, threshold, background, label_type, want_value):
    """Return (labels [..., H, W], their values or none) of maps z [..., C, H, W], (3)."""
    z = z if bias is None else z + bias[:, None, None]
    value, labels = z.max(-3)
    labels = labels if class_labels is None else class_labels[labels]
    if threshold is not None:
        labels = torch.where(value < threshold, background, labels)
    return labels.to(LABEL_TYPES[label_type]), value if want_value else value[:0]
