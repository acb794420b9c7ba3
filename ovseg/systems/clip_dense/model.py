"""clip_dense: CLIP with its patch tokens read out through its own head, on any tower of open_clip.

These are the training-free baselines. ``readout`` changes the last attention for the patches: CLIP
as it is, MaskCLIP, SCLIP, ClearCLIP, NACLIP, GEM, ProxyCLIP (``nn/readout.py``); what a patch's
vector is for each head: docs/towers.md. Training it is training CLIP.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from ...errors import ConfigError
from ...nn.features import PatchFeatures
from ...nn.readout import ProxyFeatures, Readout, resolve_readout
from ...options import options_of
from ..base import OVSegModel, SystemOptions
from ..checks import check_compared, check_images
from .proxy import ProxyEncoder, ProxyOptions, constants


@dataclass
class ClipDenseOptions(SystemOptions):
    """Options of clip_dense.

    Attributes:
        readout: a name of ``nn.readout.READOUTS``, or the fields of a ``Readout``.
        proxy: the second encoder that ``proxyclip`` asks: the fields of ``ProxyOptions``, or None.
            It is no part of what ``save_pretrained`` writes: the folder names it.
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
    """A CLIP, whose head reads patches as it reads pictures."""

    Options = ClipDenseOptions
    objective = "clip_dense"
    options: ClipDenseOptions
    proxy: ProxyEncoder | None

    def __init__(self, options: ClipDenseOptions):
        super().__init__(options)
        # Beside the model, not in it: no parameter, no part of its file, which any readout reads.
        self.__dict__["proxy"] = None
        if options.proxy is not None:
            proxy = ProxyEncoder(options_of(ProxyOptions, options.proxy, "proxy"))
            self.__dict__["proxy"] = proxy
        self.readout = self._checked(options.readout)
        self.train_parts(options.trained)

    def set_readout(self, readout: str | dict[str, Any] | Readout) -> None:
        """Read patches by another readout from now on; nothing is trained in it."""
        self.readout = self._checked(readout)
        self.config["readout"] = readout

    @override
    def image_state(self) -> tuple[list[Tensor], Any]:
        tensors, _ = super().image_state()
        if self.proxy is not None:
            tensors += [*self.proxy.parameters(), *self.proxy.buffers()]
        return tensors, self.readout

    def _apply(self, fn: Any, recurse: bool = True) -> ClipDense:
        """Do what ``to``, ``half`` and the like do; the second encoder goes along."""
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

    @override
    def parts(self) -> dict[str, list[nn.Parameter]]:
        # SigLIP's bias is in none: the objective has no use for it.
        text = self.backbone.text_parameters()
        scale = self.backbone.logit_scale
        others = {id(p) for p in (*text, scale, self.backbone.logit_bias)}
        return {
            "vision": [p for p in self.backbone.parameters() if id(p) not in others],
            "text": text,
            "scale": [scale],
        }

    @property
    def logit_scale(self) -> Tensor:
        """Scale of the cosines before a softmax, or before a sigmoid.

        CLIP's was held below 100 in its training; a model with a bias (SigLIP) was not, and is
        published beyond.
        """
        return super().logit_scale if self.logit_bias is None else self.backbone.logit_scale.exp()

    @property
    def logit_bias(self) -> Tensor | None:
        """Bias of SigLIP's scaled cosines before a sigmoid; None for models of a softmax."""
        return self.backbone.logit_bias

    @override
    def encode_image(self, images: Tensor) -> PatchFeatures:
        check_images(images, self)
        seen: ProxyFeatures | None = None
        if self.readout.proxy and self.proxy is not None:
            mean, std = (constants(row, images) for row in (self.spec.mean, self.spec.std))
            seen = self.proxy(images, mean, std)
        return self.backbone.encode_dense(images, self.readout, seen)

    @override
    def similarity(self, images: Tensor | PatchFeatures, texts: Tensor) -> Tensor:
        check_compared(images, texts, PatchFeatures)
        # A picture's own vector does not need the last block's patches.
        if isinstance(images, Tensor):
            check_images(images, self)
            embedding = self.backbone.encode_image(images)
        else:
            embedding = images.embedding
        return F.normalize(embedding, dim=-1) @ F.normalize(texts.to(embedding.dtype), dim=-1).T
