"""ZegCLIP: head and loss of a training step, and inference.

A picture goes from pixels to labels, against the eager composition.

Head and loss of a training step, and a picture from pixels to labels. ``eager`` is the published
procedure written plainly. Prompts are tokens of every block; the descriptor is concatenated; all
three decoder layers are computed whole, with their scores for the masks that nobody reads; logits
are upsampled, and the loss takes one-hot targets, focal and dice maps of the pictures' size and the
accuracy of its log. At inference windows one by one, sigmoid maps of all classes at full size, seen
classes lowered by indexing, padded onto the canvas and added, divided, resized, softmax, argmax. It
is given torch's fused attention in the image tower, and texts as ready embeddings. Random weights;
queries and keys of the head are scaled up, so that labels differ.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import ovseg
from ovseg.data.batches import MaskBatch
from ovseg.inference import View
from ovseg.inference.queries import EncodedQueries
from ovseg.inference.rules.masks import ClassMasks
from ovseg.inference.view import encode, place
from ovseg.progress import bar, waiting
from ovseg.systems import PatchFeatures
from ovseg.systems.objective import Progress, create_objective
from ovseg.systems.zegclip.model import ZegCLIP
from ovseg.systems.zegclip.published import dead

from ..run import environment, save
from ..steps import memory_of_both, step_memory, step_times, step_values
from .pictures import photograph

CLASSES, SEEN, PROMPTS = 171, 156, 100  # COCO-Stuff
CROP, STRIDE, CANVAS, PENALTY = 512, 426, (512, 683), 0.1
B, SIDE, RATE = 2, 512, 0.1


# ---- the published procedure, written plainly ----------------------------------------------------


class Head(nn.Module):
    """The head of a model, with the parts that have no effect, of random weights."""

    def __init__(self, model: ZegCLIP, rate: float):
        super().__init__()
        width, layers = model.backbone.embed_dim, len(model.decoder.layers)
        self.model, self.rate, self.heads, self.layers = model, rate, model.options.heads, layers
        prefix = f"decode_head.decoder_1.layers.{layers - 1}."
        unused = {
            name.removeprefix(prefix): x
            for name, x in dead(layers, width, 4 * width).items()
            if name.startswith(prefix)
        }
        self.last = nn.ParameterDict(
            {
                name.replace(".", "_"): nn.Parameter(torch.randn_like(x) * 0.02)
                for name, x in unused.items()
            }
        )

    def _part(self, i: int, name: str, x: torch.Tensor) -> torch.Tensor:
        """Apply linear layer or norm ``name`` of layer i."""
        layer: Any = self.model.decoder.layers[i]
        for step in name.split("."):
            layer = getattr(layer, step, None)
        if layer is not None:
            return layer(x)
        weight, bias = (
            self.last[f"{name}_{kind}".replace(".", "_")] for kind in ("weight", "bias")
        )
        return (
            F.layer_norm(x, x.shape[-1:], weight, bias)
            if "norm" in name
            else F.linear(x, weight, bias)
        )

    def forward(self, g: torch.Tensor, patches: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Return mask logits [B, C, h, w] of pictures [B, E] with patches [B, E, h, w]."""
        size, (count, width) = patches.shape[2:], texts.shape
        memory = patches.flatten(2).transpose(1, 2)
        texts = texts.expand(len(g), -1, -1)
        q = self.model.descriptor.proj(
            torch.cat([torch.einsum("bd,bcd->bcd", g, texts), texts], dim=-1)
        )
        masks, queries = [], []
        for i in range(self.layers):
            parts = [
                self._part(i, f"multihead_attn.{name}", x)
                for name, x in (("q", q), ("k", memory), ("v", memory))
            ]
            query, key, value = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in parts)
            scores = query @ key.transpose(2, 3) * (width // self.heads) ** -0.5
            kept = scores.clone()
            weights = F.dropout(scores.softmax(-1), self.rate)
            o = self._part(i, "multihead_attn.proj", (weights @ value).transpose(1, 2).flatten(2))
            masks.append(kept.sum(1) / self.heads)
            q = self._part(i, "norm2", q + F.dropout(o, self.rate))
            hidden = F.dropout(self._part(i, "linear1", q).relu(), self.rate)
            q = self._part(i, "norm3", q + F.dropout(self._part(i, "linear2", hidden), self.rate))
            queries.append(q)
        maps = [
            mask.transpose(1, 2).reshape(len(g), *size, count).permute(0, 3, 1, 2) for mask in masks
        ]
        return maps[-1]


def eager_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the published loss of mask logits at the patches; a label of 255 is none."""
    up = F.interpolate(logits, (SIDE, SIDE), mode="bilinear", align_corners=False)
    x = F.interpolate(up, labels.shape[1:], mode="bilinear", align_corners=False)
    targets, present = torch.zeros_like(x), []
    for i, label in enumerate(labels):
        found = [int(c) for c in label.unique() if c != 255]
        for c in found:
            targets[i, c] = (label == c).float()
        present += [(i, c) for c in found]
    N = max(1, len(present))
    flat, aim = x.flatten(0, 1).flatten(1), targets.flatten(0, 1).flatten(1)
    p = flat.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(flat, aim, reduction="none")
    hit = p * aim + (1 - p) * (1 - aim)
    focal = (0.25 * aim + 0.75 * (1 - aim)) * (entropy * (1 - hit) ** 2)
    rows = torch.tensor([i * x.shape[1] + c for i, c in present])
    probable, wanted = flat[rows].sigmoid(), aim[rows]
    dice = 1 - (2 * (probable * wanted).sum(1) + 1) / (probable.sum(1) + wanted.sum(1) + 1)
    with torch.no_grad():  # of the log
        _ = ((x.topk(1, dim=1).indices[:, 0] == labels) & (labels != 255)).sum()
    return 100 * focal.mean(1).sum() / N + dice.sum() / N


def eager_encode(model: ZegCLIP, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (g [B, E], F [B, E, h, w]), prompts as tokens."""
    x, grid = model.backbone.sequence(images, model.options.class_weight)
    prompts = model.prompts.proj(model.prompts.embeddings)
    for i, block in enumerate(model.backbone.vision_blocks):
        kept = x if i == 0 else torch.cat([x[:, :1], x[:, 1 + PROMPTS :]], 1)
        x = torch.cat([kept[:, :1], prompts[i].expand(len(x), -1, -1), kept[:, 1:]], 1)
        q, k, v = block.project(block.ln_1(x))
        x = x + block.attn.out_proj(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
        hidden = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))
    x = model.backbone.final_norm(model.prompts.norm(x))
    g, patches = model.backbone.project(x[:, 0]), model.backbone.project(x[:, 1 + PROMPTS :])
    patches = patches.transpose(1, 2).unflatten(2, grid)
    return g / g.norm(dim=1, keepdim=True), patches / patches.norm(dim=1, keepdim=True)


@torch.no_grad()
def eager_labels(
    head: Head, pixels: torch.Tensor, texts: torch.Tensor, seen: list[int], placement: Any
) -> np.ndarray:
    """Return the labels of a picture [3, H, W] that is normalised."""
    total, count = (
        pixels.new_zeros(1, len(texts), *placement.canvas),
        pixels.new_zeros(1, 1, *placement.canvas),
    )
    for y, x in placement.origins.tolist():
        g, patches = eager_encode(head.model, pixels[None, :, y : y + CROP, x : x + CROP])
        logits = F.interpolate(
            head(g, patches, texts), (CROP, CROP), mode="bilinear", align_corners=False
        )
        maps = logits.sigmoid()
        maps[:, seen] = maps[:, seen] - PENALTY
        maps = F.interpolate(maps, (CROP, CROP), mode="bilinear", align_corners=False)
        total += F.pad(maps, (x, placement.canvas[1] - x - CROP, y, placement.canvas[0] - y - CROP))
        count[:, :, y : y + CROP, x : x + CROP] += 1
    maps = F.interpolate(total / count, placement.size, mode="bilinear", align_corners=False)
    return maps.softmax(1).argmax(1)[0].numpy()


# ---- measuring -----------------------------------------------------------------------------------


def a_model(prompts: int = PROMPTS) -> ZegCLIP:
    """Return a model of random weights, queries and keys of its head scaled up."""
    torch.manual_seed(0)
    model = ovseg.create_model("zegclip_vit_b16", prompts=prompts, dropout=RATE)
    assert isinstance(model, ZegCLIP)
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.multihead_attn.q.weight *= 10
            layer.multihead_attn.k.weight *= 10
    return model


def training_parts(classes: int, side: int, rate: float) -> dict[str, Any]:
    """Return features of two pictures and their masks, and what makes the loss of them.

    Ours and the eager one.
    """
    model = a_model()
    generator = torch.Generator().manual_seed(1)
    texts = F.normalize(torch.randn(classes, 512, generator=generator), dim=-1)
    g = F.normalize(torch.randn(B, 512, generator=generator), dim=-1).requires_grad_()
    grid = side // 16
    patches = F.normalize(
        torch.randn(B, grid * grid, 512, generator=generator), dim=-1
    ).requires_grad_()
    # A dozen classes a picture, in squares, some of them without a label.
    few = torch.randint(0, classes, (B, 12), generator=generator)
    index = (
        torch.randint(0, 14, (B, side // 32, side // 32), generator=generator)
        .repeat_interleave(32, 1)
        .repeat_interleave(32, 2)
    )
    labels = F.pad(few, (0, 2), value=255).gather(1, index.flatten(1)).view_as(index)
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = rate
    names = [f"class {i}" for i in range(classes)]
    model.__dict__["encode_labels"] = lambda *_: texts  # random rows are as good as any
    objective = create_objective(model, setting="supervised", classes=names, unseen=[]).train()
    head, batch = Head(model, rate), MaskBatch(torch.zeros(B, 3, side, side), labels)

    def ours() -> torch.Tensor:
        with Progress().seeded(labels.device, "dropout"):
            logits = model.segment_logits(
                PatchFeatures(g, patches, (grid, grid)), objective.class_texts
            )
        return objective.loss({"logits": logits}, batch, Progress(), None)["total"]

    def eager() -> torch.Tensor:
        return eager_loss(
            head(g, patches.transpose(1, 2).unflatten(2, (grid, grid)), texts), labels
        )

    leaves = [g, patches, *model.parts()["head"]]
    return {"ours": ours, "eager": eager, "leaves": leaves, "unused": list(head.last.values())}


def training_memory(way: str) -> float:
    """Return MiB of a forward and backward of the head and loss."""
    return round(step_memory(training_parts(4, 64, RATE), training_parts(SEEN, SIDE, RATE), way), 1)


def inference(repeats: int) -> list[dict[str, Any]]:
    """Measure both procedures, alternating, on a photograph of 683 x 512: two windows."""
    model = a_model().eval()
    texts = F.normalize(torch.randn(CLASSES, 512), dim=-1)
    names, seen = tuple(map(str, range(CLASSES))), list(range(SEEN))
    queries = EncodedQueries(names, texts, torch.arange(CLASSES))
    rule, head, rows = ClassMasks(bias={names[i]: -PENALTY for i in seen}), Head(model, 0.0), []
    placement = place(
        CANVAS,
        View(short_side=512, crop=CROP, stride=STRIDE, resize="bilinear"),
        patch=16,
        trained=512,
    )
    assert placement.canvas == CANVAS and placement.origins is not None
    picture = photograph()
    times: dict[str, list[float]] = {"ours": [], "label map": [], "eager": []}
    for turn in bar(range(repeats + 1), unit="turn", desc="inference", leave=False):
        start = time.perf_counter()
        with torch.no_grad():
            features = encode(model, [(picture, placement)], 8)[0]
            encoded = time.perf_counter()
            found = rule.label_map(model, features, queries, placement)[0].numpy()
        middle = time.perf_counter()
        expected = eager_labels(head, model.normalize(picture[None])[0], texts, seen, placement)
        if turn:
            for which, seconds in (
                ("ours", middle - start),
                ("label map", middle - encoded),
                ("eager", time.perf_counter() - middle),
            ):
                times[which].append(seconds)
    ratio = np.array(times["ours"]) / np.array(times["eager"])
    rows.append(
        {
            "case": f"683x512, {CLASSES} classes, {PROMPTS} prompts",
            **{
                f"{which} ms": round(1e3 * float(np.median(values)), 1)
                for which, values in times.items()
            },
            "ratio": round(float(np.median(ratio)), 3),
            "ratio p20-p80": np.percentile(ratio, (20, 80)).round(3).tolist(),
            "differing labels": int((found != expected).sum()),
            "pixels": found.size,
            "labels that occur": len(np.unique(found)),
            "repeats": repeats,
        }
    )
    return rows


def run(*, repeats: int = 5, out: str | None = None) -> dict[str, Any]:
    """Measure, print, and write JSON if ``out`` is given."""
    step: dict[str, Any] = {"case": f"B = {B}, {SIDE} px, C = {SEEN}"}
    found: dict[str, Any] = {"environment": environment(), "head and loss of a step": step}
    with waiting("loss of a step"):
        step["loss without dropout"] = step_values(training_parts(SEEN, SIDE, 0.0))
    print(step["loss without dropout"], flush=True)
    for part in (
        lambda: step_times(training_parts(SEEN, SIDE, RATE), repeats),
        lambda: memory_of_both(__name__, repeats),
    ):
        step |= (some := part())
        print(some, flush=True)
        save(out, found)
    found["inference"] = inference(repeats)
    for row in found["inference"]:
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    save(out, found)
    return found
