"""Any image-text model of open_clip as a backbone, with patch tokens taken by our own code.

open_clip has moved its final norm before and after pooling between releases; code that asks it for
tokens silently changes with the installed version. Here the blocks are walked one by one, so the
tap means the same everywhere. How a picture is seen is the image tower's (``towers/``); which of
open_clip's models that covers is the table of docs/towers.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import InputError, first_line
from ..weights.clip import create_clip
from ..weights.state_dicts import State
from ..weights.tokenizers import clip_tokenizer
from .backbone import ClipBackbone, DenseTokens, PatchTokens
from .blocks import AttentionBlock, ClipBlock
from .clip_architectures import configuration, import_open_clip, resize_clip_positions, sized
from .readout import READOUTS, ProxyFeatures, Readout
from .timm_towers import image_tower
from .towers import ClipVit

_CLIP = "clip."  # of the names of its tensors


class ClipTokenizer:
    """The tokenizer of an architecture as open_clip ships it; loaded on first use.

    ``[T, L]`` int64, L the architecture's context length.

    Those of transformers (SigLIP, CLIPA, multilingual models) are downloaded once.
    """

    def __init__(self, architecture: str | dict[str, Any]):
        self.architecture = architecture
        self._tokenizer: Callable | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_tokenizer": None,
        }  # open_clip's holds caches that cannot be pickled

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        return self._loaded()([texts] if isinstance(texts, str) else list(texts))

    def cut(self, texts: Sequence[str]) -> list[bool]:
        """Which of ``texts`` are longer than the context: a longer one holds more of them."""
        short = self(texts)
        context = short.shape[1]
        long = self._loaded()([*texts, ""], context_length=8 * context)
        pad = long[-1, -1]
        return [
            not torch.equal(a, b[:context]) or bool((b[context:] != pad).any())
            for a, b in zip(short, long[:-1], strict=True)
        ]

    def _loaded(self) -> Callable:
        if self._tokenizer is None:
            try:
                self._tokenizer = clip_tokenizer(self.architecture)
            except (
                ImportError,
                OSError,
                ValueError,
                TypeError,
            ) as error:  # transformers fails in many ways where a file is missing
                raise _download("tokenizer", self.architecture, error) from error
        return self._tokenizer


def _download(what: str, architecture: str | dict[str, Any], error: Exception) -> InputError:
    return InputError(
        f"the {what} of {architecture!r} cannot be loaded ({type(error).__name__}: "
        f"{first_line(error)}); it is "
        "transformers', which must be installed (pip install transformers), and comes from the "
        "Hugging Face Hub once: "
        "expected a connection, without HF_HUB_OFFLINE, or its files in the cache that HF_HOME "
        "names"
    )


@dataclass
class OpenClipOptions:
    """Of a preset and of ``create_model``.

    Attributes:
        architecture: open_clip's name, such as ``ViT-B-16-quickgelu`` (OpenAI's weights want
            QuickGELU), or the arguments of ``open_clip.CLIP``.
        clip: open_clip tag (downloads), a local file, or None for random weights. Files are read
            without running code.
        stride: step between patches in pixels; None is the patch size. A smaller step gives
            overlapping patches and a finer grid (PACL's stride trick: 4 for patches of 16).
        attention_backend: ``sdpa`` or ``xformers``.
        image_size, context_length: side of pictures in pixels and tokens of a text, if not those of
            the architecture; positions of weights of another size are resized, as open_clip does
            it. Pictures of any size are read without: this is the size that the model is built for.
    """

    ends: ClassVar[dict[str, tuple[float, float]]] = {
        "image_size": (1, 16384),
        "context_length": (3, 65536),
        "stride": (1, 16384),
    }

    architecture: Any = "ViT-B-16-quickgelu"
    clip: str | None = None
    stride: int | None = None
    attention_backend: str = "sdpa"
    image_size: int | None = None
    context_length: int | None = None


class OpenClipBackbone(ClipBackbone):
    """Arguments as in ``OpenClipOptions``; ``weights`` is its ``clip``."""

    Options: ClassVar = OpenClipOptions

    def __init__(
        self,
        architecture: str | dict[str, Any],
        weights: str | None = None,
        stride: int | None = None,
        attention_backend: str = "sdpa",
        image_size: int | None = None,
        context_length: int | None = None,
    ):
        super().__init__()
        try:
            clip: Any = create_clip(architecture, weights, image_size, context_length)
        except OSError as error:
            if (
                not isinstance(architecture, str)
                or "hf_model_name"
                not in import_open_clip().get_model_config(architecture)["text_cfg"]
            ):
                raise
            raise _download("text tower's configuration", architecture, error) from error
        try:
            self.tower = image_tower(clip.visual, stride, attention_backend)
        except ValueError as error:
            raise ValueError(f"architecture {architecture!r}: {error}") from error
        if hasattr(clip, "text_decoder"):
            del clip.text_decoder  # CoCa's, which writes captions and has no part in an embedding
        text = getattr(clip, "text", clip)
        blocks = getattr(getattr(text, "transformer", None), "resblocks", None)
        # With a token of its own or padding open_clip's masks are [B heads, L, L], which only its
        # own blocks read.
        if (
            isinstance(blocks, nn.ModuleList)
            and getattr(text, "cls_emb", None) is None
            and not getattr(text, "use_pad_mask", False)
        ):
            plain = import_open_clip().transformer.ResidualAttentionBlock
            text.transformer.resblocks = nn.ModuleList(
                ClipBlock(b, attention_backend) if type(b) is plain else b for b in blocks
            )
        self.clip = clip
        self.architecture = architecture = sized(architecture, image_size, context_length)
        tower = self.tower
        self.patch_size, self.stride, self.image_size = (
            tower.patch_size,
            tower.stride,
            tower.image_size,
        )
        self.token_dim, self.embed_dim = tower.token_dim, tower.embed_dim
        seen = clip.visual.preprocess_cfg  # of the weights, else of those that the architecture has
        self.image_mean, self.image_std = tuple(seen["mean"]), tuple(seen["std"])
        self.tokenizer = ClipTokenizer(architecture)

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.clip.logit_scale

    @property
    def logit_bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return getattr(self.clip, "logit_bias", None)

    @property
    def antialias_positions(self) -> bool:
        return self.tower.antialias

    @antialias_positions.setter
    def antialias_positions(self, value: bool) -> None:
        self.tower.antialias = value

    def text_facts(self) -> Any:
        """The configuration: activation, heads, pooling and tokenizer are in no tensor."""
        return configuration(self.architecture)

    def lasting_options(self) -> dict[str, Any]:
        known, seen = (
            configuration(self.architecture),
            {"mean": self.image_mean, "std": self.image_std},
        )
        return (
            {}
            if known.get("preprocess_cfg") == seen
            else {"architecture": {**known, "preprocess_cfg": seen}}
        )

    def resize_positions(self, state: State) -> State:
        own = {name.removeprefix(_CLIP): x for name, x in state.items() if name.startswith(_CLIP)}
        resized = resize_clip_positions(
            self.clip, own, self.tower.interpolation, self.tower.antialias
        )
        return {**state, **{_CLIP + name: x for name, x in resized.items()}}

    def check_readout(self, readout: Readout) -> None:
        self.tower.check_readout(readout)

    def check_class_token(self, system: str) -> None:
        if not (isinstance(self.tower, ClipVit) and self.tower.first == 1):
            raise ValueError(
                f"{system} needs blocks over a class token and patches, and architecture "
                f"{self.architecture!r} is "
                f"{self.tower.kind}; expected open_clip's ViT pooled by class token, or the "
                "system clip_dense"
            )

    def encode_dense(
        self,
        images: torch.Tensor,
        readout: Readout = READOUTS["clip"],
        proxy: ProxyFeatures | None = None,
    ) -> DenseTokens:
        found = self.tower.encode(images, readout, proxy)
        return DenseTokens(found.embedding, self.tower.dense(found.tokens), found.grid)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.tower.encode_image(images)

    def encode_text(self, token_ids: torch.Tensor) -> torch.Tensor:
        """As open_clip does it, but for texts of any length up to the context's, and only as far as
        the longest one goes, where nothing looks behind a text's end.
        """
        text = getattr(self.clip, "text", self.clip)
        pool = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
        causal = getattr(text, "attn_mask", None) is not None and not getattr(
            text, "use_pad_mask", False
        )
        projection = getattr(text, "text_projection", None)
        walked = causal and pool in ("argmax", "eos") and getattr(text, "cls_emb", None) is None
        if not walked or not isinstance(projection, nn.Parameter):
            return self.clip.encode_text(
                token_ids.to(self.clip.logit_scale.device), normalize=False
            )
        end = token_ids.argmax(-1)
        if pool == "eos":
            end = (
                (token_ids == (text.text_eos_id if text is self.clip else text.eos_id))
                .int()
                .argmax(-1)
            )
        device = text.token_embedding.weight.device
        # Nothing looks behind the end: attention is causal. A graph does not have that number, a
        # GPU would have to be waited for.
        if token_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            token_ids = token_ids[:, : int(end.max()) + 1]
        token_ids, end = token_ids.to(device), end.to(device)
        x = text.token_embedding(token_ids) + text.positional_embedding[: token_ids.shape[1]]
        mask = text.attn_mask[: x.shape[1], : x.shape[1]].to(x.dtype)
        for block in self.text_blocks:
            x = block(x, attn_mask=mask)
        return text.ln_final(x[torch.arange(len(x), device=x.device), end]) @ projection

    @property
    def vision_blocks(self) -> Sequence[AttentionBlock]:
        return self.tower.blocks

    @property
    def text_blocks(self) -> Sequence[AttentionBlock]:  # type: ignore[override]
        blocks = getattr(
            getattr(getattr(self.clip, "text", self.clip), "transformer", None), "resblocks", None
        )
        return blocks if isinstance(blocks, nn.ModuleList) else ()

    def text_parameters(self) -> list[nn.Parameter]:
        return [
            p
            for name, p in self.clip.named_parameters()
            if not name.startswith(("visual.", "logit_"))
        ]

    # What follows is of towers with a class token alone: PACL and SegCLIP take the parts of a ViT,
    # not only its answers.

    @property
    def _vit(self) -> ClipVit:
        self.check_class_token("what was asked")
        assert isinstance(self.tower, ClipVit)
        return self.tower

    def encode_patches(
        self,
        images: torch.Tensor,
        *,
        tap: str = "post_norm",
        readout: Readout = READOUTS["clip"],
        proxy: ProxyFeatures | None = None,
    ) -> PatchTokens:
        self._check_tap(tap)
        vit = self._vit
        tokens, cls, grid = vit.tokens(images, readout, proxy)
        if tap == "post_norm":
            tokens, cls = self.final_norm(tokens), self.final_norm(cls)
        return PatchTokens(tokens, grid, cls)

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._vit.project(tokens)

    def embed(self, images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        return self._vit.embed(images)

    def sequence(
        self, images: torch.Tensor, class_weight: float = 1.0
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        x, _, grid = self._vit.sequence(images, class_weight)
        return x, grid

    def set_image_size(self, size: int, interpolation: str) -> None:
        self._vit.set_image_size(size, interpolation)
        self.image_size = size

    def final_norm(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._vit.visual.ln_post(tokens)

    @property
    def class_token(self) -> nn.Parameter:
        return self._vit.visual.class_embedding

    def new_blocks(self, count: int) -> nn.ModuleList:
        new = nn.ModuleList(copy.deepcopy(self._vit.blocks[-1]) for _ in range(count))
        for block in new:
            block.reset_parameters()
        return new

    def embedding_parameters(self) -> list[nn.Parameter]:
        visual, text = self._vit.visual, getattr(self.clip, "text", self.clip)
        modules = [
            *visual.conv1.parameters(),
            *visual.ln_pre.parameters(),
            *text.token_embedding.parameters(),
        ]
        return [visual.positional_embedding, text.positional_embedding, *modules]

    def vision_parameters(self, tap: str = "post_norm") -> list[nn.Parameter]:
        self._check_tap(tap)
        visual = self._vit.visual
        modules = [visual.conv1, visual.ln_pre, visual.transformer] + (
            [visual.ln_post] if tap == "post_norm" else []
        )
        return [
            visual.class_embedding,
            visual.positional_embedding,
            *(p for m in modules for p in m.parameters()),
        ]
