"""A second encoder for ProxyCLIP: any ViT of timm (DINO, DINOv2, DINOv3, ...), frozen, whose
patches say which patches belong together.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ...errors import CheckpointError, ConfigError, WeightsError, first_line
from ...nn.readout import ProxyFeatures
from ...nn.tensors import at_least_float32
from ...weights.files import check_numbers
from ...weights.hub import fetch
from ...weights.pickles import read_published

GRIDS = ("clip", "finer")


@dataclass
class ProxyOptions:
    """Of ``proxy``, an option of clip_dense.

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
    grid: str = "clip"


class ProxyEncoder(nn.Module):
    """``forward``: pictures to ``ProxyFeatures``. timm makes DINOv3's rotary positions on the host,
    anew for each batch.
    """

    def __init__(self, options: ProxyOptions):
        super().__init__()
        timm = _import_timm()
        if options.grid not in GRIDS:
            raise ConfigError(f"proxy.grid is {options.grid!r}; expected one of {list(GRIDS)}")
        self.finer = options.grid == "finer"
        architecture = options.name.split(".")[0]
        if not timm.is_model(architecture):
            raise ConfigError(
                f"proxy.name is {options.name!r}; expected the name of a ViT of timm's, such as "
                "'vit_small_patch16_dinov3'"
            )
        sizes: dict[str, Any] = (
            {"dynamic_img_size": True} if _takes_sizes(timm, architecture) else {}
        )
        with torch.device("meta"):
            kind = timm.create_model(architecture, num_classes=0, **sizes)
        if not getattr(kind, "dynamic_img_size", False) or not hasattr(kind, "num_prefix_tokens"):
            raise ConfigError(
                f"proxy.name is {options.name!r}, a {type(kind).__name__}; expected a ViT that "
                "takes pictures of any size"
            )
        path = _weights(timm, options)
        overlay = (
            None
            if path is None
            else {"state_dict": _without_classifier(timm, options.name, read_published(path))}
        )
        try:
            self.vit = timm.create_model(
                options.name, path is not None, overlay, num_classes=0, **sizes
            )
        except (RuntimeError, KeyError) as error:
            if path is None:
                raise
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{path} does not fit timm's {options.name}: {reason[:300]}"
            ) from error
        if overlay is not None:
            _check_numbers(path, overlay["state_dict"], self.vit)
        self.patch_size: int = self.vit.patch_embed.patch_size[0]
        cfg = self.vit.pretrained_cfg
        self.register_buffer("mean", torch.tensor(cfg["mean"])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(cfg["std"])[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> ProxyEncoder:
        return super().train(False)  # nothing in it is trained

    @torch.no_grad()
    def forward(self, images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> ProxyFeatures:
        """``images`` [B, 3, H, W] as CLIP takes them, normalised by its ``mean`` and ``std`` [3, 1,
        1]; sides that are no whole number of this encoder's patches are resized to the nearest one.
        """
        pixels = (
            at_least_float32(images) * std + mean - self.mean
        ) / self.std  # in which resizing is possible
        grid = tuple(max(1, round(side / self.patch_size)) for side in images.shape[-2:])
        size = [side * self.patch_size for side in grid]
        if size != list(images.shape[-2:]):
            pixels = F.interpolate(
                pixels, size, mode="bicubic", antialias=True, align_corners=False
            )
        tokens = self.vit.forward_features(pixels.to(images.dtype))[:, self.vit.num_prefix_tokens :]
        return ProxyFeatures(tokens, (grid[0], grid[1]), self.finer)


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
    """The file of ``options.weights``; timm's own is fetched as every other, with one attempt."""
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


def _without_classifier(
    timm: Any, name: str, state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What a patch's features do not need: the layer that was trained with them to name classes."""
    facts = timm.models.get_pretrained_cfg(name)
    found = facts.classifier if facts is not None and facts.classifier else ()
    layers = tuple(f"{layer}." for layer in ([found] if isinstance(found, str) else found))
    return {key: x for key, x in state.items() if not key.startswith(layers)} if layers else state


def _check_numbers(path: Path | None, state: dict[str, torch.Tensor], vit: nn.Module) -> None:
    """``check_numbers`` of weights that timm has loaded, and renamed where they are not its own:
    kinds as the file has them."""
    own = vit.state_dict()
    counters = {name.rsplit(".", 1)[-1] for name, x in own.items() if not x.is_floating_point()}
    kinds = {
        name: torch.zeros(
            (), dtype=torch.int64 if name.rsplit(".", 1)[-1] in counters else torch.float32
        )
        for name in state
    }
    check_numbers(str(path), state, kinds)


def _takes_sizes(timm: Any, architecture: str) -> bool:
    """Whether the model is of timm's files of ViTs that are made for any size by this argument."""
    module = getattr(timm.models.model_entrypoint(architecture), "__module__", "")
    return module.rsplit(".", 1)[-1] in ("vision_transformer", "eva", "deit")
