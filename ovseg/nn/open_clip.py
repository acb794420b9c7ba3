"""Any image-text model of open_clip as a backbone, with patch tokens taken by our own code.

open_clip has moved its final norm before and after pooling between releases; code that asks it for
tokens silently changes with the installed version. Here the blocks are walked one by one, so the
tap means the same everywhere. How a picture is seen is the image tower's (``towers``); which of
open_clip's models that covers is the table of docs/towers.md. ``weights.clip`` builds the models.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from .backbone import ClipBackbone, Tokenizer
from .blocks import AttentionBlock, ClipBlock
from .clip_architectures import Architecture, configuration, import_open_clip, resize_clip_positions
from .features import Grid, PatchFeatures
from .readout import CLIP, ProxyFeatures, Readout
from .timm_towers import image_tower
from .towers import ClipVit

_CLIP = "clip."  # how the names of its tensors begin


class OpenClipBackbone(ClipBackbone):
    """A model of open_clip, whose blocks are taken over in place.

    Args:
        clip: the model, with ``preprocess_cfg`` on its image tower.
        architecture: its name or configuration, as it was built.
        tokenizer: its own.
        stride: step between patches in pixels; None is the patch size. A smaller step gives
            overlapping patches and a finer grid.
        attention_backend: of ``blocks.attention``.
    """

    def __init__(
        self,
        clip: Any,
        architecture: Architecture,
        tokenizer: Tokenizer,
        stride: int | None = None,
        attention_backend: str = "sdpa",
    ):
        super().__init__()
        tower = image_tower(clip.visual, stride, attention_backend)
        if hasattr(clip, "text_decoder"):
            del clip.text_decoder  # CoCa's, which writes captions and has no part in an embedding
        _take_text_blocks(getattr(clip, "text", clip), attention_backend)
        self.clip = clip
        self.tower = tower
        self.architecture = architecture
        self.tokenizer = tokenizer
        self.patch_size = tower.patch_size
        self.stride = tower.stride
        self.image_size = tower.image_size
        self.token_dim = tower.token_dim
        self.embed_dim = tower.embed_dim
        seen = clip.visual.preprocess_cfg  # of the weights, else of those that the architecture has
        self.image_mean = tuple(seen["mean"])
        self.image_std = tuple(seen["std"])

    @property
    def logit_scale(self) -> nn.Parameter:
        """The logarithm of the model's own scale."""
        return self.clip.logit_scale

    @property
    def logit_bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """SigLIP's bias; None for models of a softmax."""
        return getattr(self.clip, "logit_bias", None)

    @property
    def antialias_positions(self) -> bool:
        """True where position embeddings are resized with antialiasing, open_clip's way."""
        return self.tower.antialias

    @antialias_positions.setter
    def antialias_positions(self, value: bool) -> None:
        self.tower.antialias = value

    @override
    def text_facts(self) -> Any:
        # The configuration: activation, heads, pooling and tokenizer are in no tensor.
        return configuration(self.architecture)

    @override
    def lasting_options(self) -> dict[str, Any]:
        known = configuration(self.architecture)
        seen = {"mean": self.image_mean, "std": self.image_std}
        if known.get("preprocess_cfg") == seen:
            return {}
        return {"architecture": {**known, "preprocess_cfg": seen}}

    @override
    def resize_positions(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {name.removeprefix(_CLIP): x for name, x in state.items() if name.startswith(_CLIP)}
        resized = resize_clip_positions(
            self.clip, own, self.tower.interpolation, self.tower.antialias
        )
        return {**state, **{_CLIP + name: x for name, x in resized.items()}}

    @override
    def check_readout(self, readout: Readout) -> None:
        self.tower.check_readout(readout)

    @override
    def check_class_token(self, system: str) -> None:
        if not (isinstance(self.tower, ClipVit) and self.tower.first == 1):
            raise ValueError(
                f"{system} needs blocks over a class token and patches, and architecture "
                f"{self.architecture!r} is {self.tower.kind}; expected open_clip's ViT pooled by "
                "class token, or the system clip_dense"
            )

    @override
    def encode_dense(
        self, images: Tensor, readout: Readout = CLIP, proxy: ProxyFeatures | None = None
    ) -> PatchFeatures:
        found = self.tower.encode(images, readout, proxy)
        return PatchFeatures(found.embedding, self.tower.dense(found.tokens), found.grid)

    @override
    def encode_image(self, images: Tensor) -> Tensor:
        return self.tower.encode_image(images)

    @override
    def encode_text(self, token_ids: Tensor) -> Tensor:
        # As open_clip does it, but for texts of any length up to the context's, and only as far as
        # the longest one goes, where nothing looks behind a text's end.
        text = getattr(self.clip, "text", self.clip)
        pool = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
        padded = getattr(text, "use_pad_mask", False)
        causal = getattr(text, "attn_mask", None) is not None and not padded
        projection = getattr(text, "text_projection", None)
        walked = causal and pool in ("argmax", "eos") and getattr(text, "cls_emb", None) is None
        if not walked or not isinstance(projection, nn.Parameter):
            token_ids = token_ids.to(self.clip.logit_scale.device)
            return self.clip.encode_text(token_ids, normalize=False)
        end = token_ids.argmax(-1)
        if pool == "eos":
            eos_id = text.text_eos_id if text is self.clip else text.eos_id
            end = (token_ids == eos_id).int().argmax(-1)
        device = text.token_embedding.weight.device
        # Nothing looks behind the end: attention is causal. A graph does not have that number, a
        # GPU would have to be waited for.
        if token_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            token_ids = token_ids[:, : int(end.max()) + 1]
        token_ids = token_ids.to(device)
        end = end.to(device)
        x = text.token_embedding(token_ids) + text.positional_embedding[: token_ids.shape[1]]
        mask = text.attn_mask[: x.shape[1], : x.shape[1]].to(x.dtype)
        for block in self.text_blocks:
            x = block(x, attn_mask=mask)
        return text.ln_final(x[torch.arange(len(x), device=x.device), end]) @ projection

    @property
    @override
    def vision_blocks(self) -> Sequence[AttentionBlock]:
        return self.tower.blocks

    @property
    def text_blocks(self) -> Sequence[AttentionBlock]:  # type: ignore[override]
        """Blocks of the text tower that are there one by one; none of transformers' towers."""
        transformer = getattr(getattr(self.clip, "text", self.clip), "transformer", None)
        blocks = getattr(transformer, "resblocks", None)
        return blocks if isinstance(blocks, nn.ModuleList) else ()

    @override
    def text_parameters(self) -> list[nn.Parameter]:
        beside = ("visual.", "logit_")
        return [p for name, p in self.clip.named_parameters() if not name.startswith(beside)]

    # What follows is of towers with a class token alone: systems that train take the parts of a
    # ViT, not only its answers.

    @property
    def _vit(self) -> ClipVit:
        self.check_class_token("what was asked")
        assert isinstance(self.tower, ClipVit)
        return self.tower

    @override
    def encode_patches(
        self,
        images: Tensor,
        *,
        tap: str = "post_norm",
        readout: Readout = CLIP,
        proxy: ProxyFeatures | None = None,
    ) -> PatchFeatures:
        self._check_tap(tap)
        found = self._vit.tokens(images, readout, proxy)
        if tap == "pre_norm":
            return found
        norm = self.final_norm
        return PatchFeatures(norm(found.embedding), norm(found.tokens), found.grid)

    @override
    def project(self, tokens: Tensor) -> Tensor:
        return self._vit.project(tokens)

    @override
    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        return self._vit.embed(images)

    @override
    def sequence(self, images: Tensor, class_weight: float = 1.0) -> tuple[Tensor, Grid]:
        x, _, grid = self._vit.sequence(images, class_weight)
        return x, grid

    @override
    def set_image_size(self, size: int, interpolation: str) -> None:
        self._vit.set_image_size(size, interpolation)
        self.image_size = size

    @override
    def final_norm(self, tokens: Tensor) -> Tensor:
        return self._vit.visual.ln_post(tokens)

    @property
    @override
    def class_token(self) -> nn.Parameter:
        return self._vit.visual.class_embedding

    @override
    def new_blocks(self, count: int) -> nn.ModuleList:
        new = nn.ModuleList(copy.deepcopy(self._vit.blocks[-1]) for _ in range(count))
        for block in new:
            block.reset_parameters()
        return new

    @override
    def embedding_parameters(self) -> list[nn.Parameter]:
        visual = self._vit.visual
        text = getattr(self.clip, "text", self.clip)
        modules = (visual.conv1, visual.ln_pre, text.token_embedding)
        tables = [visual.positional_embedding, text.positional_embedding]
        return [*tables, *(p for m in modules for p in m.parameters())]

    @override
    def vision_parameters(self, tap: str = "post_norm") -> list[nn.Parameter]:
        self._check_tap(tap)
        visual = self._vit.visual
        modules = [visual.conv1, visual.ln_pre, visual.transformer]
        if tap == "post_norm":
            modules.append(visual.ln_post)
        tables = [visual.class_embedding, visual.positional_embedding]
        return [*tables, *(p for m in modules for p in m.parameters())]


def _take_text_blocks(text: Any, attention_backend: str) -> None:
    """Replace open_clip's plain blocks of a text tower by ours, where ours compute the same."""
    blocks = getattr(getattr(text, "transformer", None), "resblocks", None)
    # With a token of its own or padding open_clip's masks are [B heads, L, L], which only its own
    # blocks read.
    masked = getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False)
    if isinstance(blocks, nn.ModuleList) and not masked:
        plain = import_open_clip().transformer.ResidualAttentionBlock
        text.transformer.resblocks = nn.ModuleList(
            ClipBlock(b, attention_backend) if type(b) is plain else b for b in blocks
        )
