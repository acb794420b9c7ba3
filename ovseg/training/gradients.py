"""The gradient of a step: over one process or many, of a whole batch or of one in chunks.

In chunks (Gao et al., GradCache, arXiv:2101.06983): all rows are encoded without a graph, the
losses of the whole batch give the gradient of the rows, then each chunk is encoded again with a
graph and takes its share of it. Every picture meets every text, and memory holds the graph of one
chunk. Random states are kept for each chunk, so that both passes see the same noise.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .. import distributed
from ..data.batches import Batch
from ..systems.objective import Losses, Objective, Progress

Cast = Callable[[], contextlib.AbstractContextManager]
# Buffers are not sent before each pass. Torch 2.14 has a new name for that, and warns of the old
# one in every process.
_NEW = "forward_sync_buffers"
_OLD = "broadcast_buffers"
_BUFFERS_STAY = {_NEW if _NEW in signature(DistributedDataParallel).parameters else _OLD: False}


class Gradients:
    """Makes the gradients of an objective's parameters, the mean over all processes.

    Args:
        objective: on its device; FSDP2 shards its parameters in place, so make the optimizer
            afterwards.
        parallel: ``ddp`` or ``fsdp``; of no account in one process.
        chunk: pictures that are encoded at a time; None: the whole batch.
        cast: makes the autocast context of one pass.
    """

    def __init__(
        self,
        objective: Objective,
        parallel: str = "ddp",
        chunk: int | None = None,
        cast: Cast = contextlib.nullcontext,
    ):
        self.objective = objective
        self.chunk = chunk
        self.cast = cast
        self.group = distributed.group()
        self.wrapped: nn.Module = objective
        self._by_hand: list[nn.Parameter] = []
        if self.group is None:
            return
        if parallel == "fsdp":
            self._by_hand = shard(objective, objective.model.blocks)
            for name in ("encode", "loss"):  # chunks call them in place of forward
                register_fsdp_forward_method(objective, name)
        elif chunk is None:
            # Parameters that a batch does not reach are usual here: ZegCLIP's last layer, SegCLIP
            # without superpixels.
            unused = {"find_unused_parameters": True}
            self.wrapped = DistributedDataParallel(objective, **unused, **_BUFFERS_STAY)
        else:  # chunks pass DDP's hooks by: one average after the last does the same
            synchronize(objective)
            self._by_hand = [p for p in objective.parameters() if p.requires_grad]

    def __call__(self, batch: Batch, progress: Progress, scale: float = 1.0) -> Losses:
        """Add the gradients of ``scale`` times the total to the parameters.

        Returns:
            The losses of the batch of all processes.
        """
        if self.chunk is None:
            with self.cast():
                losses = self.wrapped(batch, progress, self.group)
            (scale * losses["total"]).backward()
        else:
            losses = self._in_chunks(batch, progress, scale)
        distributed.average_gradients(self._by_hand)
        return {name: loss.detach() for name, loss in losses.items()}

    def _in_chunks(self, batch: Batch, progress: Progress, scale: float) -> Losses:
        """Do the same with chunks: rows without a graph, their gradients, then each chunk again."""
        assert self.chunk is not None
        # FSDP2 gathers parameters in every chunk: all processes need the same number of them, none
        # of them empty.
        most, fewest = distributed.smallest(-math.ceil(len(batch) / self.chunk), len(batch))
        chunks = batch.split(min(-most, fewest))
        places = []
        first = progress.first
        for i, chunk in enumerate(chunks):
            places.append(replace(progress, chunk=i, first=first))
            first += len(chunk)
        states = []
        parts = []
        for chunk, place in zip(chunks, places, strict=True):
            states.append(_random_state())
            with torch.no_grad(), self.cast():
                parts.append(self.objective.encode(chunk, place))
        after = _random_state()
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        rows = {name: x.requires_grad_(x.is_floating_point()) for name, x in rows.items()}
        with self.cast():
            losses = self.objective.loss(rows, batch, progress, self.group)
        (scale * losses["total"]).backward()
        sizes = {name: [len(part[name]) for part in parts] for name in rows}
        shares = {name: x.grad.split(sizes[name]) for name, x in rows.items() if x.grad is not None}
        for i, chunk in enumerate(chunks):
            _set_random_state(states[i])
            with self.cast():
                again = self.objective.encode(chunk, places[i])
            names = [name for name in shares if again[name].requires_grad]
            torch.autograd.backward(
                [again[name] for name in names], [shares[name][i] for name in names]
            )
        _set_random_state(after)
        return losses


def shard(module: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Shard a module over all processes by FSDP2: block by block, then the rest.

    Returns:
        The parameters that stay whole: it takes no scalars.
    """
    synchronize(module)
    mesh = init_device_mesh(next(module.parameters()).device.type, (distributed.world_size(),))
    scalars = {p for p in module.parameters() if p.ndim == 0}
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=scalars)
    fully_shard(module, mesh=mesh, ignored_params=scalars)
    return [p for p in module.parameters() if p in scalars and p.requires_grad]


def synchronize(module: nn.Module) -> None:
    """Give all processes the parameters and buffers of rank 0."""
    group = distributed.group()
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor.detach(), 0, group=group)


def is_sharded(module: nn.Module) -> bool:
    """Return whether ``shard`` was called for the module."""
    return isinstance(module, FSDPModule)


def clip(parameters: Iterable[nn.Parameter], most: float | None) -> torch.Tensor:
    """Scale the gradients down to a norm of at most ``most``; returns their norm before."""
    found = [p for p in parameters if p.grad is not None]
    limit = math.inf if most is None else most
    if not any(isinstance(p, DTensor) for p in found):
        return nn.utils.clip_grad_norm_(found, limit)
    # Shards and whole scalars in one norm: torch's own takes one kind.
    local = [p.grad.to_local() for p in found if isinstance(p, DTensor)]
    whole = [p.grad for p in found if not isinstance(p, DTensor)]
    square = _square(local, found[0].device)
    dist.all_reduce(square, group=distributed.group())
    norm = (square + _square(whole, square.device)).sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in (*local, *whole):
        gradient.mul_(factor.to(gradient.dtype))
    return norm


def _square(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    nothing = torch.zeros((), device=device, dtype=torch.float64)
    return torch.stack([nothing, *(x.double().square().sum() for x in tensors)]).sum()


class LossScaler:
    """The factor by which losses of fp16 are multiplied.

    Its decisions follow from what all processes agreed on, so it is the same everywhere.

    Args:
        enabled: otherwise the factor is 1.
        patience: steps without an overflow after which it doubles.
    """

    def __init__(self, enabled: bool, start: float = 2.0**16, patience: int = 2000):
        self.enabled = enabled
        self.scale = start if enabled else 1.0
        self.good = 0
        self.patience = patience

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the factor."""
        if self.enabled:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self.scale)

    def update(self, finite: bool) -> bool:
        """Take note of a step.

        Returns:
            Whether a step that was not finite is explained by the factor, which is then halved.
        """
        if not self.enabled:
            return False
        self.good = self.good + 1 if finite else 0
        if not finite and self.scale > 1:
            self.scale /= 2
            return True
        if self.good == self.patience:
            self.scale *= 2
            self.good = 0
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return the factor and the steps since it changed."""
        return {"scale": self.scale, "good": self.good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self.scale = float(state["scale"])
        self.good = int(state["good"])


def cast_for(precision: str, device: torch.device) -> tuple[Cast, str]:
    """Return what makes the autocast context of a pass, and what ``auto`` stands for here."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if dtype is None:
        return contextlib.nullcontext, precision
    return lambda: torch.autocast(device.type, dtype), precision


def _random_state() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


def _set_random_state(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)


def trained(objective: Objective) -> Iterator[nn.Parameter]:
    """Go through the parameters that get gradients."""
    return (p for p in objective.parameters() if p.requires_grad)
