"""A second encoder for ProxyCLIP: any ViT of timm (DINO, DINOv2, DINOv3, ...), frozen.

Its patches say which patches belong together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...bounds import bounded
from ...errors import CheckpointError, ConfigError, WeightsError, first_line
from ...nn.readout import ProxyFeatures
from ...nn.tensors import at_least_float32
from ...weights.files import check_numbers
from ...weights.hub import fetch
from ...weights.pickles import read_published

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
        timm = _import_timm()
        self.finer = options.grid == "finer"
        self.vit = _create_vit(timm, options, _sizes(timm, options.name))
        self.patch_size: int = self.vit.patch_embed.patch_size[0]
        cfg = self.vit.pretrained_cfg
        self.register_buffer("mean", torch.tensor(cfg["mean"])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(cfg["std"])[:, None, None], persistent=False)
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
    # timm's files of ViTs are made for any size by this argument.
    module = getattr(timm.models.model_entrypoint(architecture), "__module__", "")
    sized = module.rsplit(".", 1)[-1] in ("vision_transformer", "eva", "deit")
    sizes = {"dynamic_img_size": True} if sized else {}
    with torch.device("meta"):
        kind = timm.create_model(architecture, num_classes=0, **sizes)
    if not getattr(kind, "dynamic_img_size", False) or not hasattr(kind, "num_prefix_tokens"):
        raise ConfigError(
            f"proxy.name is {name!r}, a {type(kind).__name__}; expected a ViT that takes pictures "
            "of any size"
        )
    return sizes


def _create_vit(timm: Any, options: ProxyOptions, sizes: dict[str, Any]) -> Any:
    """Build timm's model, with the weights that are named."""
    path = _weights(timm, options)
    if path is None:
        return timm.create_model(options.name, False, None, num_classes=0, **sizes)
    state = _without_classifier(timm, options.name, read_published(path))
    try:
        vit = timm.create_model(options.name, True, {"state_dict": state}, num_classes=0, **sizes)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} does not fit timm's {options.name}: {reason[:300]}"
        ) from error
    _check_numbers(path, state, vit)
    return vit


def _import_timm() -> Any:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: of a torchvision for another torch
        raise ImportError(
            f"the option proxy needs timm, which does not import ({first_line(error)}): "
            "pip install 'ovseg-kernels[models]'"
        ) from error
    return timm


def _weights(timm: Any, options: ProxyOptions) -> Path | None:
    """Return the file of weights; timm's own is fetched as every other, with one attempt."""
    if options.weights != "timm":
        return None if options.weights is None else Path(options.weights)
    ways = f", and proxy={{name: {options.name}, weights: FILE}} or --proxy {options.name}:FILE"
    facts = timm.models.get_pretrained_cfg(options.name)
    repo, file = (facts.hf_hub_id, facts.hf_hub_filename) if facts is not None else (None, None)
    if not repo:
        where = f"has them at {facts.url} only" if facts is not None and facts.url else "names none"
        raise WeightsError(
            f"proxy.weights is 'timm', which {where} for {options.name!r}; expected a file{ways}"
        )
    return fetch(repo, (file,) if file else ("model.safetensors", "pytorch_model.bin"), ways=ways)


def _without_classifier(timm: Any, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the layer that was trained to name classes: a patch's features do without it."""
    facts = timm.models.get_pretrained_cfg(name)
    found = facts.classifier if facts is not None and facts.classifier else ()
    layers = tuple(f"{layer}." for layer in ([found] if isinstance(found, str) else found))
    return {key: x for key, x in state.items() if not key.startswith(layers)} if layers else state


def _check_numbers(path: Path, state: dict[str, Tensor], vit: nn.Module) -> None:
    """Check weights that timm has loaded, and renamed where they are not its own.

    Kinds of numbers are compared as the file has them.
    """
    own = vit.state_dict()
    counters = {name.rsplit(".", 1)[-1] for name, x in own.items() if not x.is_floating_point()}
    whole = {name: name.rsplit(".", 1)[-1] in counters for name in state}
    kinds = {
        name: torch.zeros((), dtype=torch.int64 if counter else torch.float32)
        for name, counter in whole.items()
    }
    check_numbers(str(path), state, kinds)
