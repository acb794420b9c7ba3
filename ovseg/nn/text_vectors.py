"""A text tower that is a table: one vector a name, the words of a text looked up in it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..bounds import bounded
from .tensors import upload


@dataclass
class VectorsOptions:
    """Options of the text tower ``vectors``.

    Attributes:
        words: name -> what else it is called; or the name of a list of entities or its YAML file. A
            saved folder holds the words themselves.
        width: E.
        teacher: a file of names and their text embeddings by a CLIP, with which the vectors begin;
            None for random ones. It is read at the start of training alone.
        fixed: names whose vectors are not trained; True: all that the teacher has.
        context_length: names of a text that count.
    """

    words: Any = "everyday"
    width: int = bounded(512, low=1)
    teacher: str | None = None
    fixed: Any = False
    context_length: int = bounded(16, low=1)


class TextVectors(nn.Module):
    """A unit vector v_w for each name w; a text that names several is their normalised mean.

        f(text) = normalize(sum_{w in text} v_w)                                                 (1)

    ``center`` is what was taken off a CLIP's unit text vectors to make these: zero, or what the
    teacher's file says. Whoever puts the text tower of that CLIP in place of this one takes it off
    too: normalize(normalize(clip(text)) - center).

    Args:
        options: sizes, and names by which the tower is built anew.
        tokenizer: texts to ids [T, L]: 1 + the index of a name, 0 is padding.
        rows: [W, E], the vectors to begin with, on the CPU.
        center: [E]; zero if None.
        fixed: indices of those that are not trained.
    """

    def __init__(
        self,
        options: VectorsOptions,
        tokenizer: Any,
        rows: Tensor,
        center: Tensor | None = None,
        fixed: Sequence[int] = (),
    ):
        super().__init__()
        self.options = options
        self.width = options.width
        self.tokenizer = tokenizer
        self.fixed = sorted(fixed)
        trained = [index for index in range(len(rows)) if index not in set(fixed)]
        rows = F.normalize(rows.float(), dim=-1)
        here = torch.empty(0).device  # meta, where sizes are looked at
        self.vectors = nn.Parameter(rows[trained].to(here))
        if self.fixed:
            self.register_buffer("fixed_vectors", rows[self.fixed].to(here))
            order = torch.tensor([*trained, *self.fixed], device="cpu").argsort()
            self.register_buffer("_order", order.to(here), persistent=False)
        self.register_buffer("center", torch.zeros(self.width))
        if center is not None:
            self.center.copy_(center)

    def table(self) -> Tensor:
        """Return the unit vectors [W, E] of all names in their order."""
        rows = self.vectors
        if self.fixed:
            rows = torch.cat([rows, self.fixed_vectors]).index_select(0, self._order)
        return F.normalize(rows, dim=-1)

    def sentences(self, ids: Tensor) -> Tensor:
        """Return (1) of texts [T, L], [T, E]; zeros for a text that names nothing."""
        ids = upload(ids, self.vectors.device)
        named = ids > 0
        found = F.embedding((ids - 1).clamp(min=0), self.table())
        unit = F.normalize((found * named[..., None].to(found.dtype)).sum(1), dim=-1)
        # Chosen, not multiplied: nothing comes back to a text that names nothing, not even NaN.
        return torch.where(named.any(1, keepdim=True), unit, torch.zeros_like(unit))

    def forward(self, ids: Tensor) -> Tensor:
        """Call ``sentences``, for hooks."""
        return self.sentences(ids)

    @property
    def blocks(self) -> list[nn.Module]:
        """No transformer blocks."""
        return []

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the vectors that can be trained."""
        return [self.vectors]

    def facts(self) -> Any:
        """Return what no parameter shows, for JSON."""
        held = ""
        if self.fixed:
            held = hashlib.blake2b(self.fixed_vectors.float().cpu().numpy().tobytes()).hexdigest()
        return {"kind": "vectors", **asdict(self.options), "fixed": [self.fixed, held]}

    def lasting_options(self) -> dict[str, Any]:
        """Return what builds the tower anew for its saved tensors."""
        names = self.tokenizer.words
        return {"teacher": None, "fixed": [names[index] for index in self.fixed]}
