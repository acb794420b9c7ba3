"""SegCLIP: patch aggregation with learnable centers (Luo et al., ICML 2023).

A CLIP trunk is split: its first blocks see the patches, without the class token; a group module gathers them into centers; the last
blocks see the centers, and the image is the elementwise maximum over them. Trained by the contrastive loss of CLIP, the reconstruction of
masked pixels from the groups, and a loss that holds superpixels together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import ovseg_kernels as ok
from ovseg_kernels import philox

from ..backbones.base import ClipBackbone
from ..errors import InputError
from ..layers.mae_decoder import MaeDecoder, patchify, sincos_positions
from ..layers.quick_gelu import quick_gelu
from ..layers.readout import plain_block
from ..layers.semantic_groups import SemanticGroups
from ..losses.superpixel import superpixel_loss
from .base import ImageFeatures, OVSegModel, check_images

_MAX_SCALE = 100.0
LOSSES = ("contrastive", "superpixel", "reconstruction")


class SegCLIP(OVSegModel):
    """Args:
        backbone: the CLIP.
        second_stage: how many of its last blocks see the centers; with 0 the group module's output is the groups.
        centers, cross_layers, heads: of the group module; heads is the width / 64 if None.
        tau: of the Gumbel-softmax in training.
        weights: of the losses; 0 switches one off. ``superpixel`` needs ``segments`` in the batch.
        kept: share of the tokens (class token counted) that the reconstruction sees.
        decoder: width, depth and heads of the decoder.
        frozen: the parts that the recipe keeps as CLIP has them: patch and position embeddings, the norm after them, token
            embeddings. False trains everything.
        mix_batch: the published training's mixing of images in the cross-attention, see ``layers/semantic_groups.py``.
    """

    decision = "groups"

    def __init__(self, backbone: ClipBackbone, second_stage: int = 2, centers: int = 8, cross_layers: int = 2, heads: int | None = None,
                 tau: float = 0.9, weights: dict[str, float] | None = None, kept: float = 0.25, decoder: dict[str, int] | None = None,
                 frozen: bool = True, mix_batch: bool = False, templates: str = "simple"):
        super().__init__()
        unknown = set(weights or {}) - set(LOSSES)
        if unknown:
            raise ValueError(f"weights names {sorted(unknown)}; expected some of {list(LOSSES)}")
        if not 0 <= second_stage <= len(backbone.trunk):
            raise ValueError(f"second_stage is {second_stage}; expected 0 to {len(backbone.trunk)}, the blocks of the backbone")
        self.backbone, self.templates, self.tau, self.kept = backbone, templates, tau, kept
        backbone.antialias_positions = False  # as published
        self.first_stage = len(backbone.trunk) - second_stage
        self.weights = dict.fromkeys(LOSSES, 1.0) | (weights or {})
        self.groups = SemanticGroups(backbone.token_dim, centers, heads, cross_layers, mix_batch)
        self.mae_blocks = backbone.new_blocks(second_stage)
        self.reconstruct = nn.Linear(centers, centers)
        self.decoder = MaeDecoder(backbone.token_dim, backbone.patch_size, **(decoder or {}))
        for module in (self.groups, self.mae_blocks, self.reconstruct, self.decoder):
            module.apply(_initialize)
        for parameter in [backbone.class_token, *(backbone.embedding_parameters() if frozen else [])]:
            parameter.requires_grad_(False)  # nothing looks at the class token
        if not self.weights["reconstruction"]:
            for module in (self.mae_blocks, self.reconstruct, self.decoder):
                module.requires_grad_(False)

    def encode_image(self, images: torch.Tensor) -> ImageFeatures:
        """``groups`` [B, G, E] with the soft map of patches to them; a patch's token is that of its group."""
        check_images(images)
        x, grid = self.backbone.embed(images)
        groups = self.groups(self._first(x))
        image, of_group = self._second(groups.tokens)
        tokens = of_group.gather(1, groups.index[..., None].expand(-1, -1, of_group.shape[2]))
        return ImageFeatures(image, tokens, grid, of_group, groups.index, groups.soft)

    def similarity(self, images: torch.Tensor | ImageFeatures, texts: torch.Tensor) -> torch.Tensor:
        features = images if isinstance(images, ImageFeatures) else self.encode_image(images)
        return F.normalize(features.embedding, dim=-1) @ F.normalize(texts.to(features.embedding.dtype), dim=-1).T

    def training_loss(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """``segments`` [B, L], superpixels of the patches, if that loss is wanted. Noise is drawn unless given: ``group_noise`` and
        ``kept_group_noise`` (Gumbel, [B, G, L] and [B, G, K]), ``masking_noise`` [B, L]."""
        images = batch["images"]
        check_images(images)
        x, grid = self.backbone.embed(images)
        noise = batch.get("group_noise")
        noise = self._gumbel(x) if noise is None else noise
        groups = self.groups(self._first(x), noise, self.tau)
        image, _ = self._second(groups.tokens)
        losses = {"contrastive": self._contrastive(image, self.encode_text(batch["token_ids"]), batch)}
        if self.weights["superpixel"]:
            if "segments" not in batch:
                raise InputError("batch holds no segments and the superpixel loss has a weight; expected superpixels of the patches "
                                 "(data.superpixels in a recipe), or weights={'superpixel': 0}")
            losses["superpixel"] = superpixel_loss(groups.assignment(noise, self.tau), batch["segments"])
        if self.weights["reconstruction"]:
            losses["reconstruction"] = self.reconstruction_loss(images, x, grid, batch)
        total = torch.stack([self.weights[name] * loss.float() for name, loss in losses.items()]).sum()
        return {"total": total, **losses}

    def reconstruction_loss(self, images: torch.Tensor, x: torch.Tensor, grid: tuple[int, int],
                            batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean squared error of the removed patches' pixels, predicted from the groups of the kept ones."""
        B, N, D = x.shape
        shuffle = batch["masking_noise"] if "masking_noise" in batch else philox.uniform(philox.make_rng(device=x.device), (B, N))
        order = shuffle.argsort(dim=1, stable=True)
        count = int((N + 1) * self.kept) - 1  # the class token counts among the kept
        if not 0 < count < N:
            raise ValueError(f"kept is {self.kept}; of {N} patches it keeps {count}, expected at least one and not all")
        hidden = self.reconstructed_tokens(x.gather(1, order[:, :count, None].expand(-1, -1, D)), batch.get("kept_group_noise"))
        removed = order[:, count:]
        found = self.decoder(hidden, order.argsort(1), grid, removed)
        truth = patchify(images, self.backbone.patch_size)
        if truth.shape[1] != N:
            raise InputError(f"images give {N} tokens and {truth.shape[1]} patches; the reconstruction expects one token a patch, "
                             "a stride of the patch size")
        truth = truth.gather(1, removed[..., None].expand(-1, -1, truth.shape[2]))
        return (found.float() - truth.float()).square().mean()

    def reconstructed_tokens(self, kept: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """[B, K, D]: the kept patches gathered into groups, and back through the assignment."""
        noise = self._gumbel(kept) if noise is None else noise
        groups = self.groups(self._first(kept), noise, self.tau)
        shares = self.reconstruct(groups.assignment(noise, self.tau).transpose(1, 2).to(kept.dtype))
        x = quick_gelu(shares @ groups.tokens)
        for block in self.backbone.as_blocks(self.mae_blocks):
            x = plain_block(block, x)
        return x

    def decoder_positions(self) -> torch.Tensor:
        """The decoder's fixed table [1, 1 + N, width] at the training size, which published checkpoints hold."""
        side = self.backbone.image_size // self.backbone.patch_size
        return sincos_positions((side, side), self.decoder.mask_token.shape[-1])[None]

    def optimizer_groups(self, lr: float, weight_decay: float, lower_lr: float | None = None) -> list[dict[str, Any]]:
        """The published recipe: the first blocks, the text tower and the scale at ``lower_lr``; decay on all but biases."""
        low_names = {id(p) for p in self.backbone.pretrained_parameters(self.first_stage)}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.trainable:
            groups.setdefault((id(parameter) in low_names, "bias" not in name), []).append(parameter)
        low = lr if lower_lr is None else lower_lr
        return [{"params": found, "lr_scale": (low / lr if is_low else 1.0), "weight_decay": weight_decay if decayed else 0.0}
                for (is_low, decayed), found in groups.items()]

    @torch.no_grad()
    def after_step(self) -> None:
        """The logit scale stays at most 100."""
        self.backbone.logit_scale.clamp_(max=torch.tensor(_MAX_SCALE).log().item())

    def _first(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.backbone.trunk[: self.first_stage]:
            x = plain_block(block, x)
        return x

    def _second(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(image [B, E], groups [B, G, E]) of group tokens [B, G, D]."""
        for block in self.backbone.trunk[self.first_stage :]:
            tokens = plain_block(block, tokens)
        x = torch.cat([tokens.amax(1, keepdim=True), tokens], 1)
        x = self.backbone.project(self.backbone.final_norm(x))
        return x[:, 0], x[:, 1:]

    def _gumbel(self, x: torch.Tensor) -> torch.Tensor:
        return philox.gumbel(philox.make_rng(device=x.device), (len(x), len(self.groups.semantic_center), x.shape[1]))

    def _contrastive(self, image: torch.Tensor, text: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        scale = self.backbone.logit_scale.exp().clamp(max=_MAX_SCALE)
        images, texts = batch.get("image_ids"), batch.get("text_ids")
        if batch.get("pair_mask") is None:
            return ok.contrastive_loss(image.float(), text.float(), scale, image_ids=images, text_ids=texts)
        similarity = F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T
        return ok.similarity_contrastive_loss(similarity, scale, pair_mask=batch["pair_mask"], image_ids=images, text_ids=texts)


def _initialize(module: nn.Module) -> None:
    """As published: every linear layer N(0, 0.02) without bias; the packed projections of attention and the convolutions as torch does."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
