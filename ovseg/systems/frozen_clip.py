"""Systems that train parts upon a frozen CLIP.

Where it was named, files hold those parts alone, its name and a hash of its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..weights.files import hash_tensors
from .base import OVSegModel, SystemOptions

_CLIP = "backbone."  # of the names of its tensors


@dataclass
class FrozenClipOptions(SystemOptions):
    """Options of systems upon a frozen CLIP.

    Attributes:
        clip: where the frozen CLIP comes from: for open_clip's towers a tag, file or folder as
            everywhere, for the tiny one a model (``clip_dense_tiny:digits``, the folder of a run).
            Files of the model then leave it out and name it. None: random weights, or those that
            are loaded later; files hold them.
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
        """Load the weights of another model of the package, whose backbone is like this one."""
        from .loading import from_pretrained

        with torch.random.fork_rng([]):  # what is trained is drawn alike, whatever the CLIP
            given = from_pretrained(source).backbone.state_dict()
        own = {name: x.shape for name, x in self.backbone.state_dict().items()}
        if own != {name: x.shape for name, x in given.items()}:
            raise ConfigError(
                f"clip is {source!r}, whose towers differ from those of this model; expected a "
                "CLIP of the same sizes"
            )
        self.backbone.load_state_dict(given)

    @property
    def named_clip(self) -> str | None:
        """The CLIP that its files name in place of holding it, or None."""
        return self.options.clip

    def clip_hash(self, dtype: str | None = None) -> str:
        """Hash the CLIP's weights as numbers of ``dtype``, with which the hash begins.

        The positions, which may be resized, are left out.
        """
        dtype = dtype or str(next(self.backbone.parameters()).dtype).removeprefix("torch.")
        kind = getattr(torch, dtype)
        tensors = (
            (name, x.to(kind))
            for name, x in sorted(self.backbone.state_dict().items())
            if not name.endswith("visual.positional_embedding")
        )
        return f"{dtype}:{hash_tensors(tensors)}"

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the tensors by name, without the CLIP where it was named."""
        found = super().state_dict(*args, **kwargs)
        if self.named_clip is not None:
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "") + _CLIP
            for name in [name for name in found if name.startswith(prefix)]:
                del found[name]
        return found


def _without_clip(model: nn.Module, keys: Any) -> None:
    """Take a state dict without the CLIP for whole where the CLIP was named."""
    assert isinstance(model, FrozenClipModel)
    if model.named_clip is not None:
        keys.missing_keys[:] = [
            name
            for name in keys.missing_keys
            if not name.startswith(_CLIP) and f".{_CLIP}" not in name
        ]
