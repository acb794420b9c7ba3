"""SegCLIP: inference, and memory of a training step.

Windows of pictures go from pixels to labels, against the published procedure.

Windows of pictures from pixels to labels, and the memory of a training step. ``published``: every
crop alone, encoded twice (once for the group map, once for the features), class maps at full size
for each crop, added up, divided, resized, argmax; and for training the same model written plainly:
attention with its weights, QuickGELU in three tensors, keys and values of every token in the group
module, the superpixel product with an [L, L] matrix, the reconstruction of every patch. Random
weights, ViT-B/16.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import ovseg
from ovseg.data.batches import PairBatch
from ovseg.inference import View
from ovseg.inference.queries import EncodedQueries
from ovseg.inference.rules.groups import GroupTables, group_tables
from ovseg.inference.view import encode, place
from ovseg.progress import bar, waiting
from ovseg.systems import GroupFeatures
from ovseg.systems.objective import create_objective
from ovseg.systems.segclip.layers import patchify
from ovseg.systems.segclip.model import SegCLIP

from ..run import _status, environment, save

CLASSES, SIZE = 80, (375, 500)
TAU, KEPT = 0.9, 0.25  # of the published training


# ---- the published procedure, written plainly ----------------------------------------------------


def _attend(attn, x, keys):
    """Return packed multi-head attention of [B, S, D], with its weights kept."""
    heads, D = attn.num_heads, x.shape[-1]
    w, b = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(t, w[i], b[i]).unflatten(2, (heads, -1)).transpose(1, 2)
        for i, t in enumerate((x, keys, keys))
    )
    weights = (q * (D // heads) ** -0.5 @ k.transpose(2, 3)).softmax(-1)
    return attn.out_proj((weights @ v).transpose(1, 2).flatten(2))


def _gelu(x):
    return x * torch.sigmoid(1.702 * x)


def _block(block, x):
    normed = block.ln_1(x)
    x = x + _attend(block.attn, normed, normed)
    return x + block.mlp.c_proj(_gelu(block.mlp.c_fc(block.ln_2(x))))


def _groups(module, x, noise, tau):
    c = module.semantic_center.expand(len(x), -1, -1)
    for block in module.cross_att:
        keys = block.ln_k(torch.cat([c, x], 1))
        c = c + _attend(block.attn, block.ln_x(c), keys)
        c = c + block.mlp.c_proj(_gelu(block.mlp.c_fc(block.ln_2(c))))
    q, normed = module.cross_ln(c), module.norm(x).transpose(1, 2)
    k, v = module.k_ln(module.k_conv(normed).transpose(1, 2)), module.v_conv(normed).transpose(1, 2)
    z = q @ k.transpose(1, 2)
    soft = z.softmax(1)
    y = ((z if noise is None else z + noise) / tau).softmax(1)
    hard = torch.zeros_like(y).scatter_(1, y.argmax(1, keepdim=True), 1.0) - y.detach() + y
    pooled = hard @ v / hard.sum(-1, keepdim=True).clamp(min=1)
    out = module.proj_o
    return _gelu(out.mlp.fc2(F.gelu(out.mlp.fc1(out.ln(q + pooled))))), hard, soft


def _trunk(model):
    return model.backbone.clip.visual.transformer.resblocks


def published_encode(model: SegCLIP, images: torch.Tensor):
    """Return (image, groups, soft map, grid) of pictures."""
    x, grid = model.embed(images)
    for block in _trunk(model)[: model.first_stage]:
        x = _block(block, x)
    tokens, _, soft = _groups(model.groups, x, None, 1.0)
    for block in _trunk(model)[model.first_stage :]:
        tokens = _block(block, tokens)
    x = model.backbone.project(
        model.backbone.final_norm(torch.cat([tokens.amax(1, keepdim=True), tokens], 1))
    )
    return x[:, 0], x[:, 1:], soft, grid


@torch.no_grad()
def published_labels(
    model: SegCLIP, pixels: torch.Tensor, texts: torch.Tensor, placement, threshold: float
) -> torch.Tensor:
    """Return the labels of a picture, window by window with class maps at full size."""
    total, count = torch.zeros(1 + len(texts), *placement.canvas), torch.zeros(placement.canvas)
    h, w = placement.crop
    for y, x in placement.origins.tolist():
        crop = pixels[None, :, y : y + h, x : x + w]
        _, _, soft, grid = published_encode(model, crop)
        image, groups, _, _ = published_encode(model, crop)
        features = GroupFeatures(image, groups, grid, groups, soft.argmax(1), soft)
        table = group_tables(features, texts, float(model.logit_scale), 5, threshold)
        chosen = F.interpolate(
            soft.unflatten(2, grid), (h, w), mode="bilinear", align_corners=False
        )[0].argmax(0)
        total[:, y : y + h, x : x + w] += table[0][chosen].permute(2, 0, 1)
        count[y : y + h, x : x + w] += 1
    maps = F.interpolate(
        (total / count)[None], placement.size, mode="bilinear", align_corners=False
    )
    return maps.softmax(1).argmax(1)[0] - 1


def published_loss(model: SegCLIP, batch: PairBatch) -> torch.Tensor:
    """Return the loss of a training step, every tensor of it kept."""
    images = batch.images
    x, grid = model.embed(images)
    h = x
    for block in _trunk(model)[: model.first_stage]:
        h = _block(block, h)
    tokens, hard, _ = _groups(model.groups, h, batch.noise["groups"], TAU)
    for block in _trunk(model)[model.first_stage :]:
        tokens = _block(block, tokens)
    image = model.backbone.project(
        model.backbone.final_norm(torch.cat([tokens.amax(1, keepdim=True), tokens], 1))
    )[:, 0]
    clip, ids = model.backbone.clip, batch.token_ids
    t = clip.token_embedding(ids) + clip.positional_embedding[: ids.shape[1]]
    mask = clip.attn_mask[: ids.shape[1], : ids.shape[1]]
    for block in clip.transformer.resblocks:
        normed = block.ln_1(t)
        w, b = block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(normed, w[i], b[i]).unflatten(2, (block.attn.num_heads, -1)).transpose(1, 2)
            for i in range(3)
        )
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3) + mask).softmax(-1)
        t = t + block.attn.out_proj((weights @ v).transpose(1, 2).flatten(2))
        t = t + block.mlp.c_proj(_gelu(block.mlp.c_fc(block.ln_2(t))))
    text = (clip.ln_final(t) @ clip.text_projection)[torch.arange(len(t)), ids.argmax(-1)]
    logits = model.logit_scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    target = torch.arange(len(logits))
    contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    P = hard.transpose(1, 2)
    same = (batch.segments[:, :, None] == batch.segments[:, None]).float()
    p, s = P.softmax(-1), (same @ P / same.sum(2, keepdim=True)).softmax(-1)
    superpixel = ((s * (s.log() - p.log())).mean() + (p * (p.log() - s.log())).mean()) / 2

    B, N, D = x.shape
    order = batch.noise["masking"].argsort(dim=1, stable=True)
    count = int((N + 1) * KEPT) - 1
    kept = x.gather(1, order[:, :count, None].expand(-1, -1, D))
    for block in _trunk(model)[: model.first_stage]:
        kept = _block(block, kept)
    tokens, hard, _ = _groups(model.groups, kept, batch.noise["kept_groups"], TAU)
    kept = _gelu(model.reconstruct(hard.transpose(1, 2)) @ tokens)
    for block in model.mae_blocks:
        kept = _block(block, kept)
    found = model.decoder(kept, order.argsort(1), grid)
    removed = torch.ones(B, N).scatter(1, order[:, :count], 0)
    each = (found - patchify(images, model.spec.patch_size)).square().mean(-1)
    return contrastive + superpixel + (each * removed).sum() / removed.sum()


# ---- measuring -----------------------------------------------------------------------------------


def training_batch(model: SegCLIP, size: int, pixels: int) -> PairBatch:
    """Return random pictures and texts with the noise of a training step."""
    generator = torch.Generator().manual_seed(0)
    N, G = (pixels // model.spec.patch_size) ** 2, len(model.groups.semantic_center)
    K = int((N + 1) * KEPT) - 1

    def gumbel(*shape):
        return -(-torch.rand(shape, generator=generator).clamp(1e-6, 1 - 1e-6).log()).log()

    ids = torch.randint(1, 40000, (size, 32), generator=generator)
    ids[:, -1] = 49407
    noise = {
        "groups": gumbel(size, G, N),
        "kept_groups": gumbel(size, G, K),
        "masking": torch.rand(size, N, generator=generator),
    }
    images, segments = (
        torch.randn(size, 3, pixels, pixels, generator=generator),
        torch.randint(0, 20, (size, N), generator=generator),
    )
    pairs = torch.arange(size)
    return PairBatch(images, ids, pairs, pairs, segments=segments, noise=noise)


def inference(repeats: int) -> list[dict[str, Any]]:
    """Measure both procedures, alternating, on a photograph in windows of 224 and of 448.

    Stride 224: the published one for 224.
    """
    from PIL import Image
    from skimage import data

    from ovseg.inference.reading import resized

    torch.manual_seed(0)
    model = ovseg.create_model("segclip_vit_b16")
    texts = F.normalize(torch.randn(CLASSES, 512), dim=-1)
    queries = EncodedQueries(tuple(map(str, range(CLASSES))), texts, torch.arange(CLASSES))
    picture, rows = Image.fromarray(data.coffee()).resize(SIZE[::-1]), []
    for name, options in (
        ("224, stride 224", {"short_side": 224, "crop": 224, "stride": 224}),
        ("448, stride 224", {"short_side": 448, "crop": 448, "stride": 224}),
    ):
        placement, rule = (
            place(SIZE, View(**options), patch=16, trained=224),
            GroupTables(background_threshold=0.65),
        )
        assert placement.origins is not None
        seen = resized(picture, placement.canvas, "bilinear")
        pixels = model.normalize(seen[None])[0]
        ours, theirs = [], []
        for turn in bar(range(repeats + 1), unit="turn", desc="inference", leave=False):
            start = time.perf_counter()
            with torch.no_grad():
                found = rule.label_map(
                    model, encode(model, [(seen, placement)], 8)[0], queries, placement
                )[0]
            middle = time.perf_counter()
            expected = published_labels(model, pixels, texts, placement, 0.65)
            if turn:
                ours.append(middle - start)
                theirs.append(time.perf_counter() - middle)
        ratio = np.array(ours) / np.array(theirs)
        rows.append(
            {
                "case": f"{len(placement.origins)} windows of {name}",
                "ours ms": round(1e3 * float(np.median(ours)), 1),
                "published ms": round(1e3 * float(np.median(theirs)), 1),
                "ratio": round(float(np.median(ratio)), 3),
                "ratio p20-p80": np.percentile(ratio, (20, 80)).round(3).tolist(),
                "differing labels": int((found != expected).sum()),
                "pixels": found.numel(),
                "labels that occur": len(found.unique()),
                "repeats": repeats,
            }
        )
    return rows


def training_memory(which: str, size: int = 8, pixels: int = 224) -> dict[str, float]:
    """Return the growth of the peak resident set by a forward and backward, and the loss.

    In a process of its own.
    """
    torch.manual_seed(0)
    model = ovseg.create_model("segclip_vit_b16").train()
    objective = create_objective(model)
    loss_of = (
        (lambda batch: objective(batch)["total"])
        if which == "ours"
        else (lambda batch: published_loss(model, batch))
    )
    loss_of(training_batch(model, 2, 64)).backward()  # gradients exist, libraries are loaded
    batch = training_batch(model, size, pixels)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _status("VmRSS"), time.perf_counter()
    loss = loss_of(batch)
    loss.backward()
    return {
        "loss": loss.item(),
        "peak MiB": round((_status("VmHWM") - before) / 1024, 1),
        "seconds": round(time.perf_counter() - start, 2),
    }


def run(*, repeats: int = 5, out: str | None = None) -> dict[str, Any]:
    """Measure, print, and write JSON if ``out`` is given."""
    found: dict[str, Any] = {
        "environment": environment(),
        "inference": inference(repeats),
        "training, B = 8, 224 px": {},
    }
    save(out, found)
    for row in found["inference"]:
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    memory = found["training, B = 8, 224 px"]
    for which in ("ours", "published"):
        code = (
            f"import json; from {__name__} import training_memory; "
            f"print(json.dumps(training_memory({which!r})))"
        )
        with waiting(f"memory of a training step, {which}"):
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            )
        memory[which] = json.loads(done.stdout.splitlines()[-1])
        print(which, memory[which], flush=True)
        save(out, found)
    memory["ratio of peaks"] = round(
        memory["ours"]["peak MiB"] / memory["published"]["peak MiB"], 3
    )
    print("ratio of peaks", memory["ratio of peaks"])
    save(out, found)
    return found
