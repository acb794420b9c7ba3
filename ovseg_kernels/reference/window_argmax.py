"""window_argmax in plain torch: the definition, by whole maps, step by step."""

from __future__ import annotations

import torch

from .upsample_argmax import upsample, winners

ACTIVATIONS, STAGES = (None, "sigmoid", "softmax"), ("window", "merged", "output")


def window_argmax(
    values,
    index,
    origins,
    bias,
    class_labels,
    crop_height,
    crop_width,
    canvas_height,
    canvas_width,
    height,
    width,
    activation,
    stage,
    threshold,
    background,
    label_type,
    want_value,
):
    """Return (labels [H, W], value of the winner [H, W] or empty), (1) to (5)."""
    sizes = (crop_height, crop_width), (canvas_height, canvas_width), (height, width)
    z = window_maps(values, index, origins, *sizes, ACTIVATIONS[activation], STAGES[stage])
    return winners(z, bias, class_labels, threshold, background, label_type, want_value)


def window_maps(values, index, origins, crop, canvas, size, activation=None, stage="window"):
    """Return the maps [C, H, W] that compete, (1) to (4) without the bias."""

    def activated(x, here):
        if stage != here or activation is None:
            return x
        return x.sigmoid() if activation == "sigmoid" else x.softmax(-3)

    if index is None:
        maps = upsample(values, crop)
    else:
        maps = torch.stack(
            [
                table[chosen.long()].permute(2, 0, 1)
                for table, chosen in zip(values, index, strict=True)
            ]
        )
    maps = activated(maps, "window")
    total, count = maps.new_zeros(maps.shape[1], *canvas), maps.new_zeros(canvas)
    corner = origins.to(maps.device)  # not read by the host
    rows = (corner[:, :1] + torch.arange(crop[0], device=maps.device)).clamp(0, canvas[0] - 1)[
        :, :, None
    ]
    columns = (corner[:, 1:] + torch.arange(crop[1], device=maps.device)).clamp(0, canvas[1] - 1)
    for window, y, x in zip(maps, rows, columns, strict=True):
        total[:, y, x] += window
        count[y, x] += 1
    merged = activated(total / count, "merged")
    return activated(upsample(merged[None], size)[0], "output")
