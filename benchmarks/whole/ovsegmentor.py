"""OVSegmentor: inference, texts of a training step, the mask loss.

Windows of a picture go from pixels to labels, against the published procedures written plainly.

Windows of a picture from pixels to labels, the texts of a training step, the mask loss.
``published`` inference: every window alone, encoded twice (for the maps, for the features), class
maps at full size. Texts: every text padded to 77 through transformers' own BertModel; with the same
mask in the decoder of entities, so with the same loss, and as published, without it and with the
projector over every token. Mask loss: maps at 224 x 224. Random weights, ViT-B/16 and BERT-base.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

import ovseg
from ovseg.inference import View
from ovseg.inference.queries import EncodedQueries
from ovseg.inference.rules.groups import GroupTables, group_tables
from ovseg.inference.view import encode, place
from ovseg.progress import bar, waiting
from ovseg.systems import GroupFeatures
from ovseg.systems.ovsegmentor.mask_consistency import mask_consistency
from ovseg.systems.ovsegmentor.model import OVSegmentor

from ..run import _status, environment, save

CLASSES, SIZE, THRESHOLD = 59, (375, 500), 0.35
CONTEXT, RATIO = 77, 0.6


# ---- the published procedures, written plainly ---------------------------------------------------


def _attend(attn, x, keys, heads):
    q, k, v = (
        layer(t).unflatten(2, (heads, -1)).transpose(1, 2)
        for layer, t in ((attn.q_proj, x), (attn.k_proj, keys), (attn.v_proj, keys))
    )
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(-1)
    return attn.proj((weights @ v).transpose(1, 2).flatten(2))


def _cross(block, x, keys):
    x = x + _attend(block.attn, x, keys, block.heads)
    return block.norm_post(x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x)))))


def _block(block, x, mask=None):
    q, k, v = (
        block.attn.qkv(block.norm1(x)).unflatten(2, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
    )
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)
    weights = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)
    x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def _mlp(mlp, x):
    return mlp.fc2(F.gelu(mlp.fc1(x)))


def published_encode(model: OVSegmentor, images: torch.Tensor):
    """Return (image, groups, soft map, grid): keys and values of all patches, a one-hot map."""
    vit = model.image
    x, grid = vit.embed(images)
    first, second = vit.layers
    L = x.shape[1]
    x = torch.cat([x, first.group_token.expand(len(x), -1, -1)], 1)
    for block in first.blocks:
        x = _block(block, x)
    grouping = first.downsample
    patches, tokens = grouping.norm_x(x[:, :L]), grouping.norm_tokens(x[:, L:])
    g = grouping.norm_post_tokens(_mlp(grouping.mlp_inter, tokens.transpose(1, 2)).transpose(1, 2))
    g = _cross(grouping.pre_assign_attn, g, patches)
    q, k, v = (
        grouping.assign.q_proj(g),
        grouping.assign.k_proj(patches),
        grouping.assign.v_proj(patches),
    )
    soft = (q @ k.transpose(1, 2) * q.shape[2] ** -0.5).softmax(1)
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
    out = grouping.assign.proj(hard / (hard.sum(2, keepdim=True) + 1) @ v) + g
    x = out + _mlp(grouping.mlp_channels, grouping.norm_new_x(out))
    for block in second.blocks:
        x = _block(block, x)
    x = vit.norm(x)
    return model.image_projector(x.mean(1)), model.image_projector(x), soft, grid


@torch.no_grad()
def published_labels(
    model: OVSegmentor, pixels: torch.Tensor, texts: torch.Tensor, placement, threshold: float
) -> torch.Tensor:
    """Return the labels of a picture, window by window with class maps at full size."""
    total, count = torch.zeros(1 + len(texts), *placement.canvas), torch.zeros(placement.canvas)
    h, w = placement.crop
    for y, x in placement.origins.tolist():
        crop = pixels[None, :, y : y + h, x : x + w]
        _, _, soft, grid = published_encode(model, crop)
        image, groups, _, _ = published_encode(model, crop)
        table = group_tables(
            GroupFeatures(image, groups, grid, groups, soft.argmax(1), soft),
            texts,
            model.logit_scale,
            5,
            threshold,
        )
        chosen = F.interpolate(
            soft.unflatten(2, grid), (h, w), mode="bilinear", align_corners=False
        )[0].argmax(0)
        total[:, y : y + h, x : x + w] += table[0][chosen].permute(2, 0, 1)
        count[y : y + h, x : x + w] += 1
    maps = F.interpolate(
        (total / count)[None], placement.size, mode="bilinear", align_corners=False
    )
    return maps.softmax(1).argmax(1)[0] - 1


def _contrast(image, text, scale):
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def published_text_loss(
    model: OVSegmentor,
    bert,
    ids: dict[str, torch.Tensor],
    image: torch.Tensor,
    groups: torch.Tensor,
    as_published: bool = False,
) -> torch.Tensor:
    """Return contrast and entity loss of padded texts, given what the image tower gave."""
    states = {
        name: bert(one, attention_mask=(one != 0).int()).last_hidden_state
        for name, one in ids.items()
    }
    if as_published:
        for tokens in states.values():  # of no use
            model.text_projector(tokens)
    layer, seen = model.entities.blocks[0], (ids["question"] != 0)[:, None, None]
    mixed = _cross(
        layer.pre_assign_attn, layer.norm_tokens(states["question"]), layer.norm_x(groups)
    )
    completed = layer.norm_new_x(
        _block(layer.post_attn, mixed, None if as_published else seen) + mixed
    )[:, 0]
    text, answer = (model.text_projector(states[name][:, 0]) for name in ("text", "answer"))
    contrastive = _contrast(model.image_projector(image), text, model.logit_scale)
    return contrastive + _contrast(model.bridge_projector(completed), answer, model.logit_scale)


def text_loss(
    model: OVSegmentor, ids: dict[str, torch.Tensor], image: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    """Return the same by our parts, packed."""
    states = dict(zip(ids, model.text.encode_together(list(ids.values())), strict=True))
    tokens, seen = states["question"].padded()
    completed = model.bridge_projector(model.entities(tokens, groups, seen))
    text, answer = (model.text_projector(states[name].sentence) for name in ("text", "answer"))
    contrastive = _contrast(model.image_projector(image), text, model.logit_scale)
    return contrastive + _contrast(completed, answer, model.logit_scale)


def published_mask_loss(
    prediction: torch.Tensor, target: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """Return the mask losses [B], with every map at full size."""
    up = [
        F.interpolate(m, size, mode="bilinear", align_corners=True).flatten(2)
        for m in (prediction, target)
    ]
    with torch.no_grad():
        cost = torch.cdist(*(F.normalize(m, dim=-1) for m in up)).numpy()
        match = torch.stack([torch.from_numpy(linear_sum_assignment(one)[1]) for one in cost])
        matched = up[1].gather(1, match[..., None].expand_as(up[1])).sigmoid()
        t = (matched >= RATIO * matched.amax(-1, keepdim=True)).to(matched.dtype)
    low, high = up[0].min(-1, keepdim=True).values, up[0].max(-1, keepdim=True).values
    p = ((up[0] - low) / (high - low)).flatten(1)
    t = t.flatten(1)
    return 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)


# ---- measuring -----------------------------------------------------------------------------------


def alternating(
    repeats: int, ours: Callable[[], Any], theirs: Callable[[], Any]
) -> tuple[np.ndarray, np.ndarray, Any, Any]:
    """Return seconds of both, turn by turn, the first turn left out; and what they gave last."""
    times: list[tuple[float, float]] = []
    for turn in bar(range(repeats + 1), unit="turn", desc="inference", leave=False):
        start = time.perf_counter()
        found = ours()
        middle = time.perf_counter()
        expected = theirs()
        if turn:
            times.append((middle - start, time.perf_counter() - middle))
    mine, other = np.array(times).T
    return mine, other, found, expected


def _row(case: str, mine: np.ndarray, other: np.ndarray, **more: Any) -> dict[str, Any]:
    ratio = mine / other
    return {
        "case": case,
        "ours ms": round(1e3 * float(np.median(mine)), 1),
        "published ms": round(1e3 * float(np.median(other)), 1),
        "ratio": round(float(np.median(ratio)), 3),
        "ratio p20-p80": np.percentile(ratio, (20, 80)).round(3).tolist(),
        **more,
        "repeats": len(mine),
    }


def spread_texts(model: OVSegmentor, count: int, images: torch.Tensor) -> torch.Tensor:
    """Return random unit texts, some like single groups of these pictures: several classes win.

    None is like what all groups have in common.
    """
    with torch.no_grad():
        groups = model(images).groups.flatten(0, 1)
    common, texts = F.normalize(groups.mean(0), dim=0), torch.randn(count, groups.shape[1])
    likeness = F.normalize(groups - groups.mean(0), dim=-1)[:count]
    texts[: len(likeness)] += 3 * likeness * texts.norm(dim=-1)[: len(likeness), None]
    return F.normalize(texts - (texts @ common)[:, None] * common, dim=-1)


def inference(repeats: int) -> dict[str, Any]:
    """Measure both procedures on a photograph in windows of 448, stride 224."""
    from PIL import Image
    from skimage import data

    from ovseg.inference.reading import resized

    torch.manual_seed(0)
    model = ovseg.create_model("ovsegmentor_vit_b16")
    with torch.no_grad():
        model.image.layers[0].group_token.normal_()  # groups that differ, so that labels do
    rule = GroupTables(background_threshold=THRESHOLD)
    placement = place(SIZE, View(short_side=448, crop=448, stride=224), patch=16, trained=224)
    seen = resized(Image.fromarray(data.coffee()).resize(SIZE[::-1]), placement.canvas, "bilinear")
    pixels = model.normalize(seen[None])[0]
    texts = spread_texts(model, CLASSES, pixels[None, :, :448, :448])
    queries = EncodedQueries(tuple(map(str, range(CLASSES))), texts, torch.arange(CLASSES))

    @torch.no_grad()
    def ours():
        return rule.label_map(model, encode(model, [(seen, placement)], 8)[0], queries, placement)[
            0
        ]

    *times, found, expected = alternating(
        repeats, ours, lambda: published_labels(model, pixels, texts, placement, THRESHOLD)
    )
    assert placement.origins is not None
    return _row(
        f"{len(placement.origins)} windows of 448, stride 224",
        *times,
        differing_labels=int((found != expected).sum()),
        pixels=found.numel(),
        labels_that_occur=len(found.unique()),
    )


def text_batch(
    model: OVSegmentor, size: int, shortest: int = 8, longest: int = 30
) -> dict[str, torch.Tensor]:
    """Return random texts of 8 to 30 tokens, padded to 77: captions, questions, answers."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in ("text", "question", "answer"):
        lengths = torch.randint(shortest, longest + 1, (size,), generator=generator)
        words = torch.randint(
            1, model.text.options.vocab_size, (size, CONTEXT), generator=generator
        )
        found[name] = words.masked_fill(torch.arange(CONTEXT) >= lengths[:, None], 0)
    return found


def plain_bert(model: OVSegmentor):
    """Return transformers' own model with the same weights."""
    from transformers import BertConfig, BertModel

    o = model.text.options
    bert = BertModel(
        BertConfig(
            vocab_size=o.vocab_size,
            hidden_size=o.width,
            num_hidden_layers=o.depth,
            num_attention_heads=o.heads,
            intermediate_size=o.hidden,
            max_position_embeddings=o.positions,
            hidden_dropout_prob=o.dropout,
            attention_probs_dropout_prob=o.dropout,
        )
    )
    bert.load_state_dict(model.text.transformer.state_dict())
    return bert


def texts(repeats: int, size: int = 8) -> list[dict[str, Any]]:
    """Measure forward and backward of everything that texts cost in a step, dropout off.

    The step is one of the first stage.
    """
    torch.manual_seed(0)
    model = ovseg.create_model(
        "ovsegmentor_vit_b16", stage=1, text={"kind": "bert", "dropout": 0.0}
    ).train()
    bert, ids = plain_bert(model).train(), text_batch(model, size)
    image, groups = torch.randn(size, 768), torch.randn(size, 8, 768)
    tokens = int(sum((one != 0).sum() for one in ids.values()))

    def step(loss_of: Callable[[], torch.Tensor]) -> float:
        loss = loss_of()
        loss.backward()
        for module in (model, bert):
            module.zero_grad(set_to_none=True)
        return loss.item()

    rows = []
    for name, as_published in (
        ("padded to 77, the same mask", False),
        ("padded to 77, as published", True),
    ):
        *times, found, expected = alternating(
            repeats,
            lambda: step(lambda: text_loss(model, ids, image, groups)),
            lambda p=as_published: step(
                lambda: published_text_loss(model, bert, ids, image, groups, p)
            ),
        )
        rows.append(
            _row(
                f"{3 * size} texts, {tokens} tokens; {name}",
                *times,
                loss=round(found, 6),
                published_loss=round(expected, 6),
            )
        )
    return rows


def mask_memory(which: str, size: int = 128) -> dict[str, float]:
    """Return the growth of the peak resident set by the mask loss and its backward.

    In a process of its own.
    """
    prediction, target = torch.randn(2, size, 8, 14, 14, generator=torch.Generator().manual_seed(0))
    prediction.requires_grad_()
    function = (lambda *x: mask_consistency(*x)[0]) if which == "ours" else published_mask_loss
    function(prediction[:1], target[:1], (224, 224)).sum().backward()  # libraries are loaded
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _status("VmRSS"), time.perf_counter()
    loss = function(prediction, target, (224, 224)).sum()
    loss.backward()
    return {
        "loss": loss.item() / 8,
        "peak KiB": _status("VmHWM") - before,
        "ms": round(1e3 * (time.perf_counter() - start), 1),
    }


def run(*, repeats: int = 5, out: str | None = None) -> dict[str, Any]:
    """Measure, print, and write JSON if ``out`` is given."""
    found: dict[str, Any] = {"environment": environment(), "mask loss, B = 128": {}}
    memory = found["mask loss, B = 128"]
    for which in ("ours", "published"):
        code = (
            f"import json; from {__name__} import mask_memory; "
            f"print(json.dumps(mask_memory({which!r})))"
        )
        with waiting(f"memory of the mask loss, {which}"):
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            )
        memory[which] = json.loads(done.stdout.splitlines()[-1])
    memory["ratio of peaks"] = round(
        memory["ours"]["peak KiB"] / memory["published"]["peak KiB"], 5
    )
    print("mask loss", memory, flush=True)
    save(out, found)
    found["inference"] = inference(repeats)
    save(out, found)
    with waiting("texts of a training step"):
        found["texts"] = texts(repeats)
    for row in (found["inference"], *found["texts"]):
        print(
            ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in row.items()), flush=True
        )
    save(out, found)
    return found
