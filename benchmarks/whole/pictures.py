"""A picture from pixels to labels, ViT-B/16.

``Predictor`` against the procedure as published code runs it.

One 4:3 picture, random weights, 171 random unit vectors for texts, two windows of 512 with stride
426 on a canvas of 683 x 512. ``windows one by one`` encodes each window alone, upsamples all
classes to the window, adds them up on the canvas, divides by the count, resizes to the picture and
takes the argmax. Pixels are ready in memory; texts are encoded before.

The picture is a photograph of scikit-image. Neighbouring patches of a photograph resemble each
other, on which the time of the label map depends; ``noise`` is the other extreme, a label map from
features without any structure.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import ovseg
from ovseg.data.images import to_tensor
from ovseg.inference import View
from ovseg.inference.queries import EncodedQueries
from ovseg.inference.rules.patches import PatchArgmax
from ovseg.inference.view import encode, place
from ovseg.progress import bar
from ovseg.systems import PatchFeatures

from ..run import environment, save

CLASSES, CANVAS, CROP, STRIDE = 171, (512, 683), 512, 426
TOWERS = {  # architecture and readout
    "ViT-B/16": ("ViT-B-16-quickgelu", "sclip"),
    "SigLIP-B/16": ("ViT-B-16-SigLIP", "sclip"),
    "ConvNeXt-B": ("convnext_base_w", "clip"),
}


def photograph() -> torch.Tensor:
    """Return a photograph [3, 512, 683] in 0..1."""
    from PIL import Image
    from skimage import data

    return to_tensor(Image.fromarray(data.coffee()).resize(CANVAS[::-1], Image.Resampling.BICUBIC))


@torch.no_grad()
def one_by_one(
    model, pixels: torch.Tensor, texts: torch.Tensor, origins: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """Return labels by windows one by one, class maps at full size."""
    total, count = torch.zeros(len(texts), *CANVAS), torch.zeros(CANVAS)
    for y, x in origins.tolist():
        logits = model.segment_logits(
            model.encode_image(pixels[None, :, y : y + CROP, x : x + CROP]), texts
        )
        total[:, y : y + CROP, x : x + CROP] += F.interpolate(
            logits, (CROP, CROP), mode="bilinear", align_corners=False
        )[0]
        count[y : y + CROP, x : x + CROP] += 1
    merged = (total / count)[None]
    if size != CANVAS:
        merged = F.interpolate(merged, size, mode="bilinear", align_corners=False)
    return merged.argmax(1)[0]


def run(
    *, repeats: int = 7, out: str | None = None, layers: int | None = None
) -> list[dict[str, Any]]:
    """Measure, print, and write JSON if ``out`` is given.

    ``layers`` cuts the first model down, the only one then, for tests.
    """
    rows = []
    for title, (architecture, readout) in TOWERS.items():
        torch.manual_seed(0)
        model = ovseg.create_model("clip_dense", architecture=architecture, readout=readout)
        if layers is not None:
            del model.backbone.clip.visual.transformer.resblocks[layers:]
        rows += [{"tower": title, **row} for row in measure(model, repeats, title)]
        save(out, {"environment": environment(), "rows": rows})
        if layers is not None:
            break
    return rows


def measure(model: Any, repeats: int, title: str) -> list[dict[str, Any]]:
    """Return the rows of one model."""
    texts = F.normalize(torch.randn(CLASSES, model.spec.embed_dim), dim=-1)
    queries = EncodedQueries(tuple(map(str, range(CLASSES))), texts, torch.arange(CLASSES))
    picture, rule = photograph(), PatchArgmax()
    rows: list[dict[str, Any]] = []
    pixels = model.normalize(picture[None])[0]
    for name, size in (("683x512", CANVAS), ("640x480", (480, 640))):
        view = View(short_side=512, crop=CROP, stride=STRIDE)
        placement = place(size, view, patch=model.spec.patch_size, trained=model.spec.image_size)
        assert placement.canvas == CANVAS and placement.origins is not None
        times: dict[str, list[float]] = {
            "ours": [],
            "label map": [],
            "windows one by one": [],
            "label map, noise": [],
        }
        noise = None
        # The first one warms up.
        for turn in bar(range(repeats + 1), unit="turn", desc=f"bench {title} {name}", leave=False):
            start = time.perf_counter()
            with torch.no_grad():
                features = encode(model, [(picture, placement)], view.window_batch)[0]
                encoded = time.perf_counter()
                ours = rule.label_map(model, features, queries, placement)[0]
            done = time.perf_counter()
            theirs = one_by_one(model, pixels, texts, placement.origins, size)
            naive = time.perf_counter()
            noise = noise or PatchFeatures(
                features.embedding, torch.randn_like(features.tokens), features.grid
            )
            rule.label_map(model, noise, queries, placement)
            end = time.perf_counter()
            if turn:
                for key, value in (
                    ("ours", done - start),
                    ("label map", done - encoded),
                    ("windows one by one", naive - done),
                    ("label map, noise", end - naive),
                ):
                    times[key].append(value)
        ms = {key: 1e3 * float(np.median(values)) for key, values in times.items()}
        rows.append(
            {
                "case": name,
                "repeats": repeats,
                **{f"{key} ms": round(value, 1) for key, value in ms.items()},
                **{
                    f"{key} ms p20-p80": [
                        round(1e3 * float(q), 1) for q in np.percentile(times[key], (20, 80))
                    ]
                    for key in times
                },
                "label map share": round(
                    float(np.median(np.array(times["label map"]) / np.array(times["ours"]))), 4
                ),
                "ours over one by one": round(
                    float(
                        np.median(np.array(times["ours"]) / np.array(times["windows one by one"]))
                    ),
                    3,
                ),
                "differing labels": int((ours != theirs).sum()),
                "pixels": ours.numel(),
                "labels that occur": len(ours.unique()),
            }
        )
        share = 100 * rows[-1]["label map share"]
        print(
            f"{title} {name}: ours {ms['ours']:.0f} ms, "
            f"of which the label map {ms['label map']:.1f} = {share:.1f} %; "
            f"windows one by one {ms['windows one by one']:.0f}; "
            f"ratio {rows[-1]['ours over one by one']}; "
            f"{rows[-1]['differing labels']} of {ours.numel()} labels differ, "
            f"{rows[-1]['labels that occur']} occur; "
            f"label map of noise {ms['label map, noise']:.0f}",
            flush=True,
        )
    return rows
