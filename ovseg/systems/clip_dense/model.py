"""clip_dense: CLIP with its patch tokens read out through its own head.

The training-free baselines, on every image tower of open_clip.

``readout`` changes the last attention for the patches: CLIP as it is, MaskCLIP, SCLIP, ClearCLIP,
NACLIP, GEM, ProxyCLIP (``layers/readout.py``); what a patch's vector is for each head:
docs/towers.md. Training it is training CLIP: the image-level contrastive loss, which says nothing
about where things are.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ...errors import ConfigError
from ...nn.readout import ProxyFeatures, Readout, resolve_readout
from ...options import options_of
from ..base import OVSegModel, PatchFeatures, SystemOptions
from ..checks import check_compared, check_images
from .proxy import ProxyEncoder, ProxyOptions


@dataclass
class ClipDenseOptions(SystemOptions):
    """Attributes:
    readout: a name of ``nn.readout.READOUTS``, or the fields of a ``Readout``.
    proxy: the second encoder that ``proxyclip`` asks: the fields of
        ``backbones.proxy.ProxyOptions``, or None. It is no part of what ``save_pretrained`` writes:
        the folder names it.
    """

    templates: str = "clip80"
    trained: list[str] = field(default_factory=lambda: ["vision", "text", "scale"])
    readout: Any = "clip"
    proxy: Any = None

    def complete(self) -> None:
        """Give the second encoder the options that it lacks."""
        super().complete()
        if self.proxy is not None:
            self.proxy = asdict(options_of(ProxyOptions, self.proxy, "proxy"))


class ClipDense(OVSegModel):
    Options = ClipDenseOptions
    objective = "clip_dense"
    options: ClipDenseOptions
    proxy: ProxyEncoder | None

    def __init__(self, options: ClipDenseOptions):
        super().__init__(options)
        # Beside the model, not in it: no parameter, no part of its file, which any readout reads.
        self.__dict__["proxy"] = (
            None
            if options.proxy is None
            else ProxyEncoder(options_of(ProxyOptions, options.proxy, "proxy"))
        )
        self.readout = self._checked(options.readout)
        self.train_parts(options.trained)

    def set_readout(self, readout: str | dict[str, Any] | Readout) -> None:
        """Another readout from now on; nothing is trained in it."""
        self.readout = self._checked(readout)
        self.config["readout"] = readout

    def image_state(self) -> tuple[list[torch.Tensor], Any]:
        tensors, _ = super().image_state()
        return tensors if self.proxy is None else [
            *tensors,
            *self.proxy.parameters(),
            *self.proxy.buffers(),
        ], self.readout

    def _apply(self, fn: Any, recurse: bool = True) -> ClipDense:
        """What ``to``, ``half`` and the like do: the second encoder goes along."""
        if self.proxy is not None:
            self.proxy._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _checked(self, readout: str | dict[str, Any] | Readout) -> Readout:
        found = resolve_readout(readout)
        self.backbone.check_readout(found)
        if found.proxy and self.proxy is None:
            raise ConfigError(
                f"readout is {readout!r} and proxy is None; expected a second encoder, such as "
                "proxy={'name': 'vit_base_patch8_224.dino', 'weights': 'dino.safetensors'}"
            )
        return found

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """SigLIP's bias is in none: the objective has no use for it."""
        text, scale = self.backbone.text_parameters(), self.backbone.logit_scale
        others = {id(p) for p in (*text, scale, self.backbone.logit_bias)}
        return {
            "vision": [p for p in self.backbone.parameters() if id(p) not in others],
            "text": text,
            "scale": [scale],
        }

    @property
    def logit_scale(self) -> torch.Tensor:
        """CLIP's was held below 100 in its training; a model with a bias (SigLIP) was not, and is
        published beyond.
        """
        return super().logit_scale if self.logit_bias is None else self.backbone.logit_scale.exp()

    @property
    def logit_bias(self) -> torch.Tensor | None:
        """What SigLIP adds to its scaled cosines before a sigmoid; None for models of a softmax."""
        return self.backbone.logit_bias

    def encode_image(self, images: torch.Tensor) -> PatchFeatures:
        check_images(images, self)
        return self.backbone.encode_dense(images, self.readout, self._seen_by_proxy(images))

    def _seen_by_proxy(self, images: torch.Tensor) -> ProxyFeatures | None:
        if not self.readout.proxy or self.proxy is None:
            return None
        mean, std = (
            torch.stack([torch.full((), x, device=images.device, dtype=images.dtype) for x in row])[
                :, None, None
            ]
            for row in (self.spec.mean, self.spec.std)
        )
        return self.proxy(images, mean, std)

    def similarity(self, images: torch.Tensor | PatchFeatures, texts: torch.Tensor) -> torch.Tensor:
        check_compared(images, texts, PatchFeatures)
        if isinstance(images, torch.Tensor):
            check_images(images, self)
        # A picture's own vector does not need the last block's patches.
        embedding = (
            self.backbone.encode_image(images)
            if isinstance(images, torch.Tensor)
            else images.embedding
        )
        return F.normalize(embedding, dim=-1) @ F.normalize(texts.to(embedding.dtype), dim=-1).T
