"""Systems that train parts upon a frozen CLIP.

Where it was named, files hold those parts alone, its name and a hash of its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from typing_extensions import override

from ..errors import ConfigError
from .base import SystemOptions
from .named_weights import NamedWeights, NamedWeightsModel


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


class FrozenClipModel(NamedWeightsModel):
    """Base of the systems that train nothing of their CLIP: ``parts`` names none of it."""

    options: FrozenClipOptions

    def __init__(self, options: FrozenClipOptions):
        open_clip = options.backbone["kind"] == "open_clip"
        options.clip = options.clip or options.backbone.get("clip")
        if open_clip:
            options.backbone = {**options.backbone, "clip": options.clip}
        super().__init__(options)
        if options.clip is not None and not self.backbone.aligned:
            raise ConfigError(
                f"clip is {options.clip!r} and backbone.kind {options.backbone['kind']!r}, which "
                "is no CLIP; expected backbone.weights, which names its trunk"
            )
        if options.clip is not None and not open_clip:
            self._take_clip(options.clip)

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

    @property
    @override
    def named_weights(self) -> NamedWeights | None:
        clip = self.named_clip
        if clip is None:
            return super().named_weights
        return NamedWeights(
            "CLIP",
            clip,
            "backbone",
            "clip",
            of_backbone=False,
            local=Path(clip).exists(),
            portable="a tag or hf-hub:OWNER/NAME",
            unhashed=("visual.positional_embedding",),  # which may be resized
        )
