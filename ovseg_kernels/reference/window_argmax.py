"""window_argmax in plain torch: whole maps, step by step. The definition."""

from __future__ import annotations

import torch

from .upsample_argmax import upsample, winners

ACTIVATIONS, STAGES = (None, "sigmoid", "softmax"), ("window", "merged", "output")


def window_argmax(
    values, index, origins, bias, class_labels, crop_height, crop_width, canvas_height, canvas_width, height, width, activation, stage,
    threshold, background, label_type, want_value,
):  # fmt: skip
    """(labels [H, W], value of the winner [H, W] or empty), (1) to (5)."""

    def activated(x, here):
        if STAGES[stage] != here or activation == 0:
            return x
        return x.sigmoid() if ACTIVATIONS[activation] == "sigmoid" else x.softmax(-3)

    if index is None:
        maps = upsample(values, (crop_height, crop_width))
    else:
        maps = torch.stack([table[chosen.long()].permute(2, 0, 1) for table, chosen in zip(values, index, strict=True)])
    maps = activated(maps, "window")
    total, count = maps.new_zeros(maps.shape[1], canvas_height, canvas_width), maps.new_zeros(canvas_height, canvas_width)
    for window, (y, x) in zip(maps, origins.tolist(), strict=True):
        total[:, y : y + crop_height, x : x + crop_width] += window
        count[y : y + crop_height, x : x + crop_width] += 1
    merged = activated(total / count, "merged")
    z = activated(upsample(merged[None], (height, width))[0], "output")
    return winners(z, bias, class_labels, threshold, background, label_type, want_value)
