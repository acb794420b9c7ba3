"""MGCA-style: the losses of a training step.

All three levels, from pixels and texts to their gradients, against the eager composition.

From pixels and texts to their gradients. ``eager`` has the definitions of
``ovseg/systems/mgca/reference.py``, whole: all similarities [T, B N], weights [B, T, N], unit
pixels for each loss. Both have the same groups of pixels, by the same function. Random pixels that
are correlated within a picture.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

import ovseg
from ovseg.data.batches import PairBatch
from ovseg.nn.units import cluster, mean_weights
from ovseg.progress import waiting
from ovseg.systems.mgca import reference as mgca_reference
from ovseg.systems.mgca.objective import MGCAObjective
from ovseg.systems.objective import Progress, create_objective

from ..run import environment, save
from ..steps import memory_of_both, step_memory, step_times, step_values

B, GRID, WIDTH = 16, 28, 512  # 224 px, patches of 16, doubled once: the defaults of mgca_vit_b16
# The towers take no part.
_SMALL = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 1, "layers": 1},
}
_LATE = Progress(step=9, steps=10)


def training_parts(images: int, grid: int) -> dict[str, Any]:
    """Return pixels and texts, and what makes the loss of them, ours and the eager one."""
    torch.manual_seed(0)
    objective = create_objective(ovseg.create_model("mgca_vit_b16", architecture=_SMALL))
    assert isinstance(objective, MGCAObjective)
    o, model = objective.options, objective.model
    base = torch.randn(images, 1, WIDTH)
    tokens = (base + torch.randn(images, grid * grid, WIDTH)).requires_grad_()
    texts, ids = torch.randn(images, WIDTH) + base[:, 0], torch.arange(images)
    batch = PairBatch(
        torch.zeros(images, 3, 1, 1), torch.zeros(images, 1, dtype=torch.int64), ids, ids
    )

    def ours() -> torch.Tensor:
        return objective.loss({"tokens": tokens, "text": texts}, batch, _LATE, None)["total"]

    def eager() -> torch.Tensor:
        own, scale = ids[:, None] == ids, model.logit_scale
        units = (
            mean_weights(cluster(tokens.detach(), o.regions), o.regions, tokens.dtype).transpose(
                1, 2
            )
            @ tokens
        )
        cosines = torch.einsum(
            "bnd,td->btn", F.normalize(units, dim=-1), F.normalize(texts, dim=-1)
        )
        return (
            mgca_reference.object_loss(tokens, texts, own, scale, model.options.temperature)
            + mgca_reference.info_nce(scale * cosines.amax(-1), own)
            + mgca_reference.dense_loss(tokens, texts, own, scale, o)
        )

    return {"ours": ours, "eager": eager, "leaves": [tokens, model.log_scale]}


def training_memory(way: str) -> float:
    """Return MiB of a forward and backward, less the pixels' gradient.

    Any procedure gives that one.
    """
    small, parts = training_parts(2, 8), training_parts(B, GRID)
    return round(step_memory(small, parts, way) - parts["leaves"][0].numel() * 4 / 2**20, 1)


def run(*, repeats: int = 5, out: str | None = None) -> dict[str, Any]:
    """Measure, print, and write JSON if ``out`` is given."""
    step: dict[str, Any] = {"case": f"B = T = {B}, N = {GRID * GRID}, D = {WIDTH}"}
    found = {"environment": environment(), "losses of a step": step}
    with waiting("losses of a step"):
        step["loss"] = step_values(training_parts(B, GRID))
    print(step["loss"], flush=True)
    for part in (
        lambda: step_times(training_parts(B, GRID), repeats),
        lambda: memory_of_both(__name__, repeats),
    ):
        step |= (some := part())
        print(some, flush=True)
        save(out, found)
    save(out, found)
    return found
