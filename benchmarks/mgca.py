"""The losses of a training step of MGCA-style, all three levels, from pixels and texts to their gradients, against the eager composition.

``eager``: the definitions of ``ovseg/objectives/mgca_reference.py``, whole: all similarities [T, B N], weights [B, T, N], unit pixels for
each loss. Both have the same groups of pixels, by the same function. Random pixels that are correlated within a picture.
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
from ovseg.data.batch_types import PairBatch
from ovseg.layers.units import cluster, mean_weights
from ovseg.objectives import Progress, create_objective, mgca_reference
from ovseg.objectives.mgca import MGCAObjective

from .run import _status, environment

B, GRID, WIDTH = 16, 28, 512  # 224 px, patches of 16, doubled once: the defaults of mgca_vit_b16
_SMALL = {"embed_dim": WIDTH, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
          "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 1, "layers": 1}}  # the towers take no part
_LATE = Progress(step=9, steps=10)


def training_parts(images: int, grid: int) -> dict[str, Any]:
    """Pixels and texts, and what makes the loss of them, ours and the eager one."""
    torch.manual_seed(0)
    objective = create_objective(ovseg.create_model("mgca_vit_b16", architecture=_SMALL))
    assert isinstance(objective, MGCAObjective)
    o, model = objective.options, objective.model
    base = torch.randn(images, 1, WIDTH)
    tokens = (base + torch.randn(images, grid * grid, WIDTH)).requires_grad_()
    texts, ids = torch.randn(images, WIDTH) + base[:, 0], torch.arange(images)
    batch = PairBatch(torch.zeros(images, 3, 1, 1), torch.zeros(images, 1, dtype=torch.int64), ids, ids)

    def ours() -> torch.Tensor:
        return objective.loss({"tokens": tokens, "text": texts}, batch, _LATE, None)["total"]

    def eager() -> torch.Tensor:
        own, scale = ids[:, None] == ids, model.logit_scale
        units = mean_weights(cluster(tokens.detach(), o.regions), o.regions, tokens.dtype).transpose(1, 2) @ tokens
        cosines = torch.einsum("bnd,td->btn", F.normalize(units, dim=-1), F.normalize(texts, dim=-1))
        return (mgca_reference.object_loss(tokens, texts, own, scale, model.options.temperature)
                + mgca_reference.info_nce(scale * cosines.amax(-1), own)
                + mgca_reference.dense_loss(tokens, texts, own, scale, o.positives, o.negatives))

    return {"ours": ours, "eager": eager, "leaves": [tokens, model.log_scale]}


def training_values() -> dict[str, float]:
    """Losses, and how far the gradients are apart."""
    parts = training_parts(B, GRID)
    losses = {which: parts[which]() for which in ("ours", "eager")}
    ours, eager = (torch.autograd.grad(loss, parts["leaves"]) for loss in losses.values())
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(ours, eager, strict=True))
    return {**{which: loss.item() for which, loss in losses.items()}, "largest relative difference of a gradient": worst}


def training_time(repeats: int) -> dict[str, Any]:
    parts, times = training_parts(B, GRID), {"ours": [], "eager": []}  # type: ignore[var-annotated]
    for turn in range(repeats + 1):
        for which, values in times.items():
            start = time.perf_counter()
            torch.autograd.grad(parts[which](), parts["leaves"])
            if turn:
                values.append(time.perf_counter() - start)
    ratio = np.array(times["ours"]) / np.array(times["eager"])
    return {**{f"{which} ms": round(1e3 * float(np.median(values)), 1) for which, values in times.items()},
            "ratio": round(float(np.median(ratio)), 4), "ratio p20-p80": np.percentile(ratio, (20, 80)).round(4).tolist(),
            "repeats": repeats}  # fmt: skip


def training_memory(which: str) -> float:
    """MiB by which the peak of a forward and backward lies above what was there before, less the pixels' gradient, which any procedure
    gives; in a process of its own."""
    small, parts = training_parts(2, 8), training_parts(B, GRID)
    for p in (small, parts):
        for x in p["leaves"]:
            x.grad = torch.zeros_like(x)  # gradients exist, libraries are loaded
    small[which]().backward()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    parts[which]().backward()
    own = parts["leaves"][0].numel() * 4 / 2**20
    return round((_status("VmHWM") - before) / 1024 - own, 1)


def run(*, repeats: int = 5, out: str | None = None) -> dict[str, Any]:
    """Measure, print, and write JSON if ``out`` is given."""
    step: dict[str, Any] = {"case": f"B = T = {B}, N = {GRID * GRID}, D = {WIDTH}", "loss": training_values()}
    print(step["loss"], flush=True)
    step |= training_time(repeats)
    print({key: value for key, value in step.items() if key != "loss"}, flush=True)
    for which in ("ours", "eager"):
        code = f"from {__name__} import training_memory; print(training_memory({which!r}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        step[f"{which} extra MiB"] = float(done.stdout.splitlines()[-1])
    step["ratio of memory"] = round(step["ours extra MiB"] / step["eager extra MiB"], 4)
    print({key: step[key] for key in ("ours extra MiB", "eager extra MiB", "ratio of memory")})
    found = {"environment": environment(), "losses of a step": step}
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(found, indent=2) + "\n")
    return found
