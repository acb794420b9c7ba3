"""A second encoder for ProxyCLIP: any ViT of timm (DINO, DINOv2, DINOv3, ...), frozen.

Its patches say which patches belong together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...bounds import bounded
from ...errors import ConfigError
from ...nn.readout import ProxyFeatures
from ...nn.tensors import at_least_float32
from ...nn.timm_architectures import import_timm, normalisation, size_arguments
from ...weights.timm_models import create_timm

GRIDS = ("clip", "finer")


@dataclass
class ProxyOptions:
    """Options of the second encoder, ``proxy`` of clip_dense.

    Attributes:
        name: timm's name, such as ``vit_base_patch8_224.dino``, ``vit_base_patch14_dinov2`` or
            ``vit_small_patch16_dinov3``.
        weights: a local file, in timm's layout or in the publisher's where timm converts it;
            ``timm`` for the weights that timm names (downloads); None for random ones, to be loaded
            later. Files are read without running code.
        grid: ``clip``: its patches are resized to CLIP's grid; ``finer``: to the finer of the two,
            which CLIP's values then follow.
    """

    name: str = "vit_small_patch16_dinov3"
    weights: str | None = None
    grid: str = bounded("clip", one_of=GRIDS)


class ProxyEncoder(nn.Module):
    """The frozen second encoder.

    timm makes DINOv3's rotary positions on the host, anew for each batch.
    """

    def __init__(self, options: ProxyOptions):
        super().__init__()
        timm = import_timm("the option proxy")
        name = options.name
        self.finer = options.grid == "finer"
        sizes = _sizes(timm, name)
        ways = f", and proxy={{name: {name}, weights: FILE}} or --proxy {name}:FILE"
        self.vit = create_timm(name, options.weights, option="proxy.weights", ways=ways, **sizes)
        self.patch_size: int = self.vit.patch_embed.patch_size[0]
        mean, std = normalisation(timm, name)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> ProxyEncoder:
        """Stay in evaluation: nothing in it is trained."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, mean: Tensor, std: Tensor) -> ProxyFeatures:
        """Encode pictures; sides are resized to the nearest whole number of patches.

        Args:
            images: [B, 3, H, W] as CLIP takes them, normalised by its ``mean`` and ``std``.
            mean: [3, 1, 1].
            std: [3, 1, 1].
        """
        # In at least float32, in which resizing is possible.
        pixels = (at_least_float32(images) * std + mean - self.mean) / self.std
        height, width = (max(1, round(side / self.patch_size)) for side in images.shape[-2:])
        size = [height * self.patch_size, width * self.patch_size]
        if size != list(images.shape[-2:]):
            pixels = F.interpolate(
                pixels, size, mode="bicubic", antialias=True, align_corners=False
            )
        tokens = self.vit.forward_features(pixels.to(images.dtype))[:, self.vit.num_prefix_tokens :]
        return ProxyFeatures(tokens, (height, width), self.finer)


def constants(row: Sequence[float], like: Tensor) -> Tensor:
    """Return [3, 1, 1] of three numbers, made where ``like`` is: a GPU is not waited for."""
    numbers = [torch.full((), x, device=like.device, dtype=like.dtype) for x in row]
    return torch.stack(numbers)[:, None, None]


def _sizes(timm: Any, name: str) -> dict[str, Any]:
    """Return the arguments by which timm's model takes pictures of any size.

    Raises:
        ConfigError: for a name of no such ViT.
    """
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise ConfigError(
            f"proxy.name is {name!r}; expected the name of a ViT of timm's, such as "
            "'vit_small_patch16_dinov3'"
        )
    sizes = size_arguments(timm, architecture)
    with torch.device("meta"):
        kind = timm.create_model(architecture, num_classes=0, **sizes)
    if not getattr(kind, "dynamic_img_size", False) or not hasattr(kind, "num_prefix_tokens"):
        raise ConfigError(
            f"proxy.name is {name!r}, a {type(kind).__name__}; expected a ViT that takes pictures "
            "of any size"
        )
    return sizes
