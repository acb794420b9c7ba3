"""The contract of a system: encode pictures, encode texts, compare them, and say how it is seen,
labelled and trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from ..data.images import read_image, to_tensor
from ..data.labels import check_labels
from ..data.templates import templates as resolve_templates
from ..errors import ConfigError, InputError
from ..nn.backbone import ClipBackbone, Tokenizer, build_backbone
from ..progress import bar
from ..weights.published import Published
from .checks import check_compared, check_ids, check_pixels, check_reading

_TEXTS_AT_ONCE = 256
_BACKBONE = "backbone."  # of the names of its tensors
MAX_SCALE = 100.0  # CLIP clips its logit scale there
_F = TypeVar("_F", bound="PatchFeatures")


@dataclass(frozen=True)
class ModelSpec:
    """What a picture must look like for a model.

    Attributes:
        image_size: side in pixels that it was trained at.
        patch_size: side in pixels of a patch.
        embed_dim: width E shared by images and texts.
        mean, std: of RGB in 0..1, what ``normalize`` takes off and divides by.
        stride: step between patches in pixels, where they overlap; None: the patch.
    """

    image_size: int
    patch_size: int
    embed_dim: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    stride: int | None = None


@dataclass
class PatchFeatures:
    """What ``encode_image`` returns.

    Attributes:
        embedding: [B, E], one vector an image.
        tokens: [B, L, E], one vector a patch, row-major over ``grid``, in the space of the texts,
            not normalised.
        grid: (h, w).
    """

    embedding: torch.Tensor
    tokens: torch.Tensor
    grid: tuple[int, int]

    @classmethod
    def concatenate(cls: type[_F], parts: Sequence[_F]) -> _F:
        """The images of all parts, which have one grid."""
        names = [f.name for f in fields(parts[0]) if f.name != "grid"]
        return type(parts[0])(
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in names},
            grid=parts[0].grid,
        )

    def select(self: _F, rows: slice) -> _F:
        """Some of the images."""
        names = [f.name for f in fields(self) if f.name != "grid"]
        return type(self)(**{name: getattr(self, name)[rows] for name in names}, grid=self.grid)


@dataclass
class GroupFeatures(PatchFeatures):
    """Of systems that gather patches in groups; a patch's token is that of its group.

    Attributes:
        groups: [B, G, E].
        index: [B, L], the group of each patch.
        soft: [B, G, L], its shares.
    """

    groups: torch.Tensor
    index: torch.Tensor
    soft: torch.Tensor


@dataclass
class SystemOptions:
    """Base of the systems' options; presets and ``create_model`` set them.

    Attributes:
        backbone: its kind and options.
        templates: prompt templates that ``encode_labels`` uses by default.
        trained: the parts that are trained, of those that the system's ``parts`` names.
        moved: names of earlier versions -> what stands for them now, for the message where one is
            given.
    """

    moved: ClassVar[dict[str, str]] = {}

    backbone: dict[str, Any] = field(default_factory=lambda: {"kind": "tiny"})
    templates: str = "simple"
    trained: list[str] = field(default_factory=list)

    @classmethod
    def upgrade(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Options of a saved folder, under names of earlier versions, to the present ones.

        What is asked for today is never renamed.
        """
        return options


class OVSegModel(nn.Module):
    """Base of the systems.

    A system defines ``encode_image``, ``similarity``, ``parts`` and, if it differs,
    ``segment_logits``.

    Attributes:
        name: registry name, set by ``create_model``.
        config: the options that built it, saved beside the weights.
        Options: dataclass of the system's options.
        decision: name of its rule of labelling, a file of ``inference/decisions``.
        objective: name of what trains it, a file of ``objectives``.
        published: the layout of published checkpoints, or None.
        published_marks: beginnings of names that only such checkpoints hold, told without a model.
        model_types: what transformers calls the model, where it has it -> the preset that a folder
            of it is built on.
        starting_options: options that only say what to begin with: a saved folder, which holds all
            weights, leaves them out.
        training_only: beginnings of the names of tensors that a saved folder may hold beside those
            of a model built without them.
        source: where its weights come from, as ``from_pretrained`` or a tag names it; None for
            random weights.
    """

    Options: ClassVar[type[SystemOptions]] = SystemOptions
    decision: ClassVar[str] = "patches"
    objective: ClassVar[str] = ""
    published: Published | None = None
    published_marks: ClassVar[tuple[str, ...]] = ()
    model_types: ClassVar[dict[str, str]] = {}
    starting_options: ClassVar[tuple[str, ...]] = ("clip",)
    training_only: ClassVar[tuple[str, ...]] = ()
    backbone: ClipBackbone
    name: str = ""
    source: str | None = None
    config: dict[str, Any]
    templates: str

    def __init__(self, options: SystemOptions):
        super().__init__()
        self.options, self.templates, self.config = options, options.templates, {}
        self.backbone = build_backbone(**options.backbone)

    @classmethod
    def folder_options(cls, folder: Path) -> dict[str, Any]:
        """The options of a folder of transformers that holds one of ``model_types``."""
        raise NotImplementedError

    def forward(self, images: torch.Tensor) -> PatchFeatures:
        """``encode_image``: what hooks, ``torch.compile`` and wrappers of modules see."""
        return self.encode_image(images)

    def encode_image(self, images: torch.Tensor) -> PatchFeatures:
        """Features of ``images`` [B, 3, H, W], normalised by ``normalize``."""
        raise NotImplementedError

    def similarity(self, images: torch.Tensor | PatchFeatures, texts: torch.Tensor) -> torch.Tensor:
        """Image-level similarity [B, T] with text embeddings [T, E]; classifies without training."""
        check_compared(images, texts, PatchFeatures)
        features = self(images) if isinstance(images, torch.Tensor) else images
        return (
            F.normalize(features.embedding, dim=-1)
            @ F.normalize(texts.to(features.embedding.dtype), dim=-1).T
        )

    def encode_text(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Text embeddings [T, E], not normalised; ``token_ids`` on the CPU, which is cheaper, or on
        the model's device.
        """
        check_ids(token_ids, self)
        return self.backbone.encode_text(token_ids)

    def segment_logits(self, features: PatchFeatures, texts: torch.Tensor) -> torch.Tensor:
        """Cosine of every patch with every text: [B, C, h, w] at the resolution of the tokens."""
        check_compared(features, texts, PatchFeatures, encoded=True)
        s = (
            F.normalize(features.tokens, dim=-1)
            @ F.normalize(texts.to(features.tokens.dtype), dim=-1).T
        )
        return s.transpose(1, 2).unflatten(2, features.grid)

    @property
    def spec(self) -> ModelSpec:
        b = self.backbone
        return ModelSpec(
            b.image_size,
            b.patch_size,
            b.embed_dim,
            b.image_mean,
            b.image_std,
            getattr(b, "stride", None),
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """Texts to token ids [T, L]; ``unknown(text)``, where there is one, lists the words it does
        not know.
        """
        return self.backbone.tokenizer

    @property
    def logit_scale(self) -> torch.Tensor:
        """What cosines are multiplied by before a softmax, at most 100; a 0-dim tensor with its
        gradient.
        """
        return self.backbone.logit_scale.exp().clamp(max=MAX_SCALE)

    @torch.no_grad()
    def limit_logit_scale(self) -> None:
        """Hold the parameter itself below log 100, as published training does after every step."""
        self.backbone.logit_scale.clamp_(max=math.log(MAX_SCALE))

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """RGB [B, 3, H, W], uint8 or floats in 0..1, to what ``encode_image`` takes, in the model's
        dtype.
        """
        check_pixels(pixels)
        pixels, spec = pixels / 255 if pixels.dtype == torch.uint8 else pixels, self.spec
        mean, std = (
            [torch.full((), x, device=pixels.device, dtype=pixels.dtype) for x in row]
            for row in (spec.mean, spec.std)
        )
        normal = (pixels - torch.stack(mean)[:, None, None]) / torch.stack(std)[:, None, None]
        return normal.to(next(self.parameters()).dtype)

    def preprocess(self, picture: Any) -> torch.Tensor:
        """One picture (path, bytes, PIL image, array, tensor) to [3, S, S] for ``encode_image``, as
        open_clip does it: the short side resized to S = ``spec.image_size``, the middle cut out,
        normalised. ``Predictor`` keeps whole pictures instead.
        """
        image, side = read_image(picture), self.spec.image_size
        factor = side / min(image.size)
        image = image.resize([max(side, round(n * factor)) for n in image.size], 3)  # bicubic
        left, top = (image.width - side) // 2, (image.height - side) // 2
        pixels = to_tensor(image.crop((left, top, left + side, top + side)))
        return self.normalize(pixels[None].to(next(self.parameters()).device))[0]

    @torch.no_grad()
    def encode_labels(
        self,
        labels: Sequence[str],
        templates: str | Sequence[str] | None = None,
        *,
        unit: bool = True,
    ) -> torch.Tensor:
        """One unit vector a label [C, E]: the mean over templates of the text embeddings,
        normalised.

        Args:
            labels: texts.
            templates: a named set or format strings; the model's own if None.
            unit: whether the embeddings are normalised before the mean as well.

        Raises:
            InputError: for an empty list, a label that is not a string, blank or reads as nothing,
                or two that are or read the same.
        """
        if isinstance(labels, torch.Tensor):
            raise InputError("labels is a tensor; expected texts")
        labels = check_labels(labels)
        chosen = resolve_templates(self.templates if templates is None else templates)
        check_reading(self.tokenizer, labels, range(len(labels)), chosen)
        return self.encode_checked(labels, chosen, unit=unit)

    @torch.no_grad()
    def encode_checked(
        self,
        labels: Sequence[str],
        templates: Sequence[str],
        *,
        unit: bool = True,
    ) -> torch.Tensor:
        """``encode_labels`` of labels and format strings that have been looked at: synonyms may
        read the same.
        """
        texts = [template.replace("{}", label) for label in labels for template in templates]
        starts = range(0, len(texts), _TEXTS_AT_ONCE)
        rows = []
        for start in bar(
            starts, show=len(starts) > 4, unit="batch", desc="encoding labels", leave=False
        ):
            rows.append(self.encode_text(self.tokenizer(texts[start : start + _TEXTS_AT_ONCE])))
        embeddings = torch.cat(rows).unflatten(0, (len(labels), len(templates)))
        return F.normalize(
            (F.normalize(embeddings, dim=-1) if unit else embeddings).mean(1), dim=-1
        )

    def image_state(self) -> tuple[list[torch.Tensor], Any]:
        """The tensors that ``encode_image`` depends on, and whatever else it does: features are
        stale once one of them has changed.
        """
        return [*self.parameters(), *self.buffers()], None

    def text_parameters(self) -> list[nn.Parameter]:
        """The parameters that ``encode_text`` depends on."""
        return self.backbone.text_parameters()

    def text_facts(self) -> Any:
        """What ``encode_text`` depends on beside them, for JSON."""
        return self.backbone.text_facts()

    def save_pretrained(self, folder: str | Path, **facts: Any) -> Path:
        """A folder for ``from_pretrained``; see ``saving.save_pretrained``."""
        from ..weights.saving import save_pretrained

        return save_pretrained(self, folder, **facts)

    def resize_positions(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """``state``, under the model's names, with tables of positions of another resolution or
        context resized to the model's."""
        own = {
            name.removeprefix(_BACKBONE): x
            for name, x in state.items()
            if name.startswith(_BACKBONE)
        }
        return {
            **state,
            **{_BACKBONE + name: x for name, x in self.backbone.resize_positions(own).items()},
        }

    @property
    def named_clip(self) -> str | None:
        """The frozen CLIP that its files name in place of holding it, or None: they hold all."""
        return None

    def clip_hash(self, dtype: str | None = None) -> str:
        """Of the weights of that CLIP."""
        raise NotImplementedError

    def push_to_hub(self, repo: str, *, licence: str, **options: Any) -> str:
        """A repository of the Hub for ``from_pretrained("hf-hub:...")``; see
        ``saving.push_to_hub``.
        """
        from ..weights.saving import push_to_hub

        return push_to_hub(self, repo, licence=licence, **options)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The parts that can be trained or kept, by name; parameters in none of them are never
        trained.
        """
        raise NotImplementedError

    def train_parts(self, names: Sequence[str]) -> None:
        """Only the parameters of these parts get gradients.

        Raises:
            ConfigError: for a part that the system does not have.
        """
        parts = self.parts()
        unknown = [name for name in names if name not in parts]
        if unknown:
            raise ConfigError(f"trained names {unknown[0]!r}; expected some of {list(parts)}")
        self.requires_grad_(False)
        for name in names:
            for parameter in parts[name]:
                parameter.requires_grad_(True)
        self.options.trained = list(names)

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, one by one: what FSDP2 shards and activation checkpointing wraps."""
        return [*self.backbone.vision_blocks, *self.backbone.text_blocks]

    def parameter_groups(
        self, lr: float, weight_decay: float, lower_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Groups for the optimizer, their ``lr_scale`` times the recipe's learning rate.

        Here: one rate; gains, biases and the logit scale without weight decay, as CLIP does it.
        """
        named = self.trainable
        return [
            {
                "params": [p for _, p in named if p.ndim >= 2],
                "lr_scale": 1.0,
                "weight_decay": weight_decay,
            },
            {"params": [p for _, p in named if p.ndim < 2], "lr_scale": 1.0, "weight_decay": 0.0},
        ]

    @property
    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]
