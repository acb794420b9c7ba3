"""Systems that train parts upon a frozen CLIP.

Where it was named, files hold those parts alone, its name and a hash of its weights.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .base import OVSegModel, SystemOptions

_CLIP = "backbone."  # of the names of its tensors


@dataclass
class FrozenClipOptions(SystemOptions):
    """Attributes:
    clip: where the frozen CLIP comes from: for open_clip's towers a tag, file or folder as
        everywhere, for the tiny one a model (``clip_dense_tiny:digits``, the folder of a run).
        Files of the model then leave it out and name it. None: random weights, or those that are
        loaded later; files hold them.
    """

    clip: str | None = None


class FrozenClipModel(OVSegModel):
    """Base of the systems that train nothing of their CLIP: ``parts`` names none of it."""

    options: FrozenClipOptions

    def __init__(self, options: FrozenClipOptions):
        open_clip = options.backbone["kind"] == "open_clip"
        options.clip = options.clip or options.backbone.get("clip")
        if open_clip:
            options.backbone = {**options.backbone, "clip": options.clip}
        super().__init__(options)
        if options.clip is not None and not open_clip:
            self._take_clip(options.clip)
        self.register_load_state_dict_post_hook(_without_clip)

    def _take_clip(self, source: str) -> None:
        """The weights of another of our models, whose backbone is like ours."""
        from .loading import from_pretrained

        with torch.random.fork_rng([]):  # what is trained is drawn alike, whatever the CLIP
            given, own = from_pretrained(source).backbone.state_dict(), self.backbone.state_dict()
        if {name: x.shape for name, x in given.items()} != {
            name: x.shape for name, x in own.items()
        }:
            raise ConfigError(
                f"clip is {source!r}, whose towers differ from those of this model; expected a "
                "CLIP of the same sizes"
            )
        self.backbone.load_state_dict(given)

    @property
    def named_clip(self) -> str | None:
        return self.options.clip

    def clip_hash(self, dtype: str | None = None) -> str:
        """Of the CLIP's weights, as numbers of ``dtype``; the positions, which may be resized, are
        left out. It begins with the dtype.
        """
        dtype = dtype or str(next(self.backbone.parameters()).dtype).removeprefix("torch.")
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.backbone.state_dict().items()):
            if not name.endswith("visual.positional_embedding"):
                digest.update(name.encode())
                digest.update(
                    tensor.detach()
                    .to("cpu", getattr(torch, dtype))
                    .contiguous()
                    .reshape(-1)
                    .view(torch.uint8)
                    .numpy()
                )
        return f"{dtype}:{digest.hexdigest()}"

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Without the CLIP where it was named."""
        found = super().state_dict(*args, **kwargs)
        if self.named_clip is not None:
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "") + _CLIP
            for name in [name for name in found if name.startswith(prefix)]:
                del found[name]
        return found


def _without_clip(model: nn.Module, keys: Any) -> None:
    """A state dict without the CLIP is whole where the CLIP was named."""
    assert isinstance(model, FrozenClipModel)
    if model.named_clip is not None:
        at = [name for name in keys.missing_keys if name.startswith(_CLIP) or f".{_CLIP}" in name]
        for name in at:
            keys.missing_keys.remove(name)
