"""Objectives: a module around a model, ``forward(batch, progress, group) -> losses``.

It is what DDP, FSDP2 and ``torch.compile`` wrap. ``forward`` is ``loss(encode(batch))``: rows of
pictures and texts first, then everything that compares rows with each other. Gradient accumulation
with all negatives encodes a batch in chunks and calls ``loss`` once.

With ``group`` every rank passes its own batch and gets the losses of the whole one; the mean over
the ranks of the gradients, which DDP and FSDP2 take, is then exactly the gradient of one process.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
import torch.distributed as dist
from torch import nn

from ovseg_kernels import philox

from ..data.batches import Batch, PairBatch, TagBatch
from ..errors import ConfigError
from ..nn.features import PatchFeatures
from ..options import options_of
from ..registration import Registry, folders
from .base import OVSegModel

OBJECTIVES: Registry[Any] = Registry("objective", lambda: folders(__package__, "Objective"))
Losses = dict[str, torch.Tensor]
Rows = dict[str, torch.Tensor]
Ranks: TypeAlias = "dist.ProcessGroup | None"  # those that share a batch; None for one process


@dataclass(frozen=True)
class Progress:
    """The point that training has reached: a loss may depend on it beside its batch.

    Attributes:
        step: of the stage, from 0.
        steps: of the whole stage.
        seed: of the run.
        rank: of the process.
        chunk: number of the part of its batch that is being encoded.
        first: row of the whole batch at which that part begins.
    """

    step: int = 0
    steps: int = 1
    seed: int = 0
    rank: int = 0
    chunk: int = 0
    first: int = 0

    @property
    def share(self) -> float:
        """The share of the stage that is done, 0 to 1."""
        return self.step / max(1, self.steps)

    @torch.compiler.disable
    def rng(self, device: torch.device | str, use: str) -> torch.Tensor:
        """Return [seed, offset] for the operators, the same when a step is done again.

        The numbers differ for every step, rank, chunk and ``use``.
        """
        return philox.make_rng(self._number(use, self.rank, self.chunk), device=device)

    @torch.compiler.disable
    def uniform(self, device: torch.device | str, use: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return uniform numbers for the rows of this part of the batch.

        A row's are its own, whichever process or chunk it falls to.
        """
        blocks, before = self._place(shape)
        rng = philox.make_rng(self._number(use), blocks, device)
        return philox.uniform(rng, (before + math.prod(shape),))[before:].view(shape)

    @torch.compiler.disable
    def gumbel(self, device: torch.device | str, use: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return Gumbel noise for the rows of this part of the batch, as ``uniform`` does it."""
        return -torch.log(-torch.log(self.uniform(device, use, shape)))

    @torch.compiler.disable
    def noise(self, device: torch.device | str, use: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return what an operator draws ``gumbel`` of this shape from.

        That is [seed, offset], or the numbers themselves where a row begins amid a block of four.
        """
        blocks, before = self._place(shape)
        if before:
            return self.gumbel(device, use, shape)
        return philox.make_rng(self._number(use), blocks, device)

    def _place(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return where the rows of a tensor of this shape begin in that of the whole batch.

        In blocks of four numbers, and numbers beyond them.
        """
        return divmod(self.first * math.prod(shape[1:]), 4)

    @contextlib.contextmanager
    def seeded(self, device: torch.device, use: str, on: bool = True) -> Iterator[None]:
        """Seed what torch itself draws inside, such as dropout, as ``rng`` does it.

        Its generators are as before afterwards.
        """
        if not on:
            yield
            return
        devices = [device] if device.type == "cuda" and torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self._number(use, self.rank, self.chunk))
            yield

    def _number(self, use: str, rank: int = 0, chunk: int = 0) -> int:
        key = f"{self.seed} {self.step} {rank} {chunk} {use}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1


class Objective(nn.Module):
    """Base of the objectives, each of which defines ``encode`` and ``loss``.

    Args:
        model: the system that is trained.

    Attributes:
        batch_types: the kinds of batches it takes.
        on_host: fields of the batch that the host reads: they stay where the loader made them, for
            a GPU would be waited for.
        takes_features: whether it looks at pictures through ``encoded`` alone, so that a batch may
            hold ``features`` in their place.
    """

    batch_types: ClassVar[tuple[type[Batch], ...]] = (PairBatch,)
    on_host: ClassVar[tuple[str, ...]] = ()
    takes_features: ClassVar[bool] = False

    def __init__(self, model: OVSegModel):
        super().__init__()
        self.model = model

    def forward(
        self, batch: Any, progress: Progress = Progress(), group: dist.ProcessGroup | None = None
    ) -> Losses:
        """Return named scalars with ``total``.

        Args:
            batch: of ``batch_types``, on the model's device but for ``on_host``.
            progress: the step, for schedules and noise.
            group: the ranks that hold the rest of the batch; None for one process.
        """
        return self.loss(self.encode(batch, progress), batch, progress, group)

    def encode(self, batch: Any, progress: Progress) -> Rows:
        """Return what each row of the batch, or of a chunk of it, gives by itself.

        Named tensors, their first dimension the rows.
        """
        raise NotImplementedError

    def loss(
        self, rows: Rows, batch: Any, progress: Progress, group: dist.ProcessGroup | None
    ) -> Losses:
        """Compare the rows of the whole batch."""
        raise NotImplementedError

    def check_source(self, source: Any) -> None:
        """Refuse a source of data whose batches would mean something else than what is trained.

        Raises:
            ConfigError: for such a source.
        """

    def after_step(self, progress: Progress) -> None:
        """Do what follows every step of the optimizer."""

    def images(self, batch: Batch) -> torch.Tensor:
        """Return the batch's pictures as the model takes them.

        uint8 is normalised here, floats are so already.
        """
        images = batch.images
        return images if images.is_floating_point() else self.model.normalize(images)

    def encoded(self, batch: Batch) -> PatchFeatures:
        """Return what the model makes of a batch's pictures, or of the features in their place."""
        if batch.features is None:
            return self.model(self.images(batch))
        return self.model.encode_features(self.seen(batch))

    def seen(self, batch: Batch) -> PatchFeatures:
        """Return what the image tower gives of the batch's pictures, from a cache if it is there.

        Features have the dtype of the model from here on.
        """
        stored = batch.features
        if stored is None:
            return self.model.encode_tower(self.images(batch))
        dtype = next(self.model.parameters()).dtype
        return PatchFeatures(stored.embedding.to(dtype), stored.tokens.to(dtype), stored.grid)

    def own_texts(self, batch: PairBatch | TagBatch) -> Rows:
        """Return the embeddings of the texts that lie in a batch row by row.

        A vocabulary, which all pictures share, is none of them: ``all_texts`` encodes it once.
        """
        if isinstance(batch, TagBatch):
            return {}
        return {"text": self.model.encode_text(batch.token_ids)}

    def all_texts(self, rows: Rows, batch: PairBatch | TagBatch) -> torch.Tensor:
        """Return the embeddings of all texts that this rank compares its pictures with."""
        if isinstance(batch, TagBatch):
            return self.model.encode_text(batch.token_ids)
        return rows["text"]


def loss_weights(given: Mapping[str, float], usual: Mapping[str, float]) -> dict[str, float]:
    """Return the weight of each loss: the one that is given, else the usual one.

    Raises:
        ConfigError: for a name that is no loss.
    """
    if unknown := set(given) - set(usual):
        raise ConfigError(f"weights names {sorted(unknown)}; expected some of {list(usual)}")
    return {**usual, **given}


def list_objectives() -> list[str]:
    """Return the systems, each of which has an objective of its own name."""
    return list(OBJECTIVES)


def create_objective(model: OVSegModel, name: str | None = None, **options: Any) -> Objective:
    """Build what trains ``model``.

    Args:
        model: a system.
        name: of ``list_objectives``; the model's own if None.
        options: of the objective.

    Raises:
        ConfigError: for an unknown objective or option.
    """
    name = name or model.objective
    kind = OBJECTIVES[name]
    schema = getattr(kind, "Options", None)
    if schema is not None:
        return kind(model, options_of(schema, options, f"objective {name}"))
    if options:
        raise ConfigError(
            f"objective {name!r} has no options and {sorted(options)} are given; expected none"
        )
    return kind(model)
