"""The contract of a system: encode pictures and texts, compare them, and say what is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from ..data.images import read_image, to_tensor
from ..data.labels import check_labels
from ..data.templates import templates as resolve_templates
from ..errors import ConfigError, InputError, WeightsError
from ..nn.backbone import ClipBackbone, Tokenizer
from ..nn.features import GroupFeatures as GroupFeatures
from ..nn.features import PatchFeatures
from ..progress import bar
from ..weights.published import Published
from .backbones import build_backbone, complete_backbone
from .checks import check_compared, check_ids, check_pixels, check_reading

if TYPE_CHECKING:
    from .named_weights import NamedWeights

_TEXTS_AT_ONCE = 256
_BACKBONE = "backbone."  # of the names of its tensors
MAX_SCALE = 100.0  # CLIP clips its logit scale there


@dataclass(frozen=True)
class ModelSpec:
    """The form of pictures that a model takes.

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
class SystemOptions:
    """Options that all systems have; presets and ``create_model`` set them.

    Attributes:
        moved: names of earlier versions -> what stands for them now, for the message where one is
            given.
        backbone: its kind and options.
        templates: prompt templates that ``encode_labels`` uses by default.
        trained: the parts that are trained, of those that the system's ``parts`` names.
    """

    moved: ClassVar[dict[str, str]] = {}

    backbone: dict[str, Any] = field(default_factory=lambda: {"kind": "tiny"})
    templates: str = "simple"
    trained: list[str] = field(default_factory=list)

    @classmethod
    def upgrade(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Bring options of a saved folder from the names of earlier versions to those of today.

        What is asked for today is never renamed.
        """
        return options

    def complete(self) -> None:
        """Give the options of parts, which are mappings, those that they lack.

        A saved folder is then independent of defaults that change later.
        """
        self.backbone = complete_backbone(self.backbone)


class OVSegModel(nn.Module):
    """Base of the systems.

    A system defines ``encode_image`` and ``parts``, and what differs of ``similarity``,
    ``segment_logits`` and ``parameter_groups``. Where its image tower can stay frozen it defines
    the two halves of ``encode_image`` in its place, and what ``encode_tower`` depends on.

    Attributes:
        Options: dataclass of the system's options.
        decision: name of its rule of labelling, a file of ``inference/rules``.
        decision_options: choices of that rule that are the model's own, in place of its defaults.
        objective: name of what trains it, a system.
        published: the layout of published checkpoints, or None.
        published_marks: beginnings of names that only such checkpoints hold, told without a model.
        model_types: what transformers calls the model, where it has it -> the preset that a folder
            of it is built on.
        starting_options: options that only say what to begin with: a saved folder, which holds all
            weights, does not.
        training_only: beginnings of the names of tensors that a saved folder may hold beside those
            of a model built without them.
        name: registry name, set by ``create_model``.
        system: the folder of its system, set likewise; None where a registered function built it.
        config: all options that it was built with, those of its backbone included; for a function,
            its arguments. A saved folder holds them beside the weights.
        source: where its weights come from, as ``from_pretrained`` or a tag names it; None for
            random weights.
        view: options of ``View`` that the default model was published with; none of other models.
        missing: why there is no default model, if this one answers in its place.
    """

    Options: ClassVar[type[SystemOptions]] = SystemOptions
    decision: str = "patches"
    decision_options: Mapping[str, Any] = MappingProxyType({})
    objective: ClassVar[str] = ""
    published: Published | None = None
    published_marks: ClassVar[tuple[str, ...]] = ()
    model_types: ClassVar[dict[str, str]] = {}
    starting_options: ClassVar[tuple[str, ...]] = ("clip",)
    training_only: ClassVar[tuple[str, ...]] = ()
    backbone: ClipBackbone
    name: str = ""
    system: str | None = None
    source: str | None = None
    view: Mapping[str, Any] = MappingProxyType({})
    missing: WeightsError | None = None
    config: dict[str, Any]
    templates: str

    def __init__(self, options: SystemOptions):
        super().__init__()
        self.options = options
        self.templates = options.templates
        self.config = {}
        self.backbone = build_backbone(**options.backbone)

    @classmethod
    def folder_options(cls, folder: Path) -> dict[str, Any]:
        """Read the options of a folder of transformers that holds one of ``model_types``."""
        raise NotImplementedError

    # Pictures.

    @property
    def spec(self) -> ModelSpec:
        """The form of pictures that the model takes."""
        b = self.backbone
        return ModelSpec(
            b.image_size,
            b.patch_size,
            b.embed_dim,
            b.image_mean,
            b.image_std,
            getattr(b, "stride", None),
        )

    def preprocess(self, picture: Any) -> torch.Tensor:
        """Turn one picture into [3, S, S] for ``encode_image``, as open_clip does it.

        The short side is resized to S = ``spec.image_size``, the middle cut out and normalised.
        ``Predictor`` keeps whole pictures instead.

        Args:
            picture: a path, bytes, a PIL image, an array or a tensor.
        """
        image = read_image(picture)
        side = self.spec.image_size
        factor = side / min(image.size)
        image = image.resize([max(side, round(n * factor)) for n in image.size], 3)  # bicubic
        left = (image.width - side) // 2
        top = (image.height - side) // 2
        pixels = to_tensor(image.crop((left, top, left + side, top + side)))
        return self.normalize(pixels[None].to(next(self.parameters()).device))[0]

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn RGB [B, 3, H, W], uint8 or floats in 0..1, into what ``encode_image`` takes."""
        check_pixels(pixels)
        if pixels.dtype == torch.uint8:
            pixels = pixels / 255
        # Made on the device: a tensor from a list would be copied to it, which waits.
        mean, std = (
            torch.stack([pixels.new_full((), x) for x in row])[:, None, None]
            for row in (self.spec.mean, self.spec.std)
        )
        return ((pixels - mean) / std).to(next(self.parameters()).dtype)

    def forward(self, images: torch.Tensor) -> PatchFeatures:
        """Call ``encode_image``: what hooks, ``torch.compile`` and wrappers of modules see."""
        return self.encode_image(images)

    def encode_image(self, images: torch.Tensor) -> PatchFeatures:
        """Return the features of ``images`` [B, 3, H, W], normalised by ``normalize``."""
        return self.encode_features(self.encode_tower(images))

    @property
    def frozen_tower(self) -> bool:
        """True where ``encode_tower`` gives the same of a picture for as long as training lasts."""
        return False

    def encode_tower(self, images: torch.Tensor) -> PatchFeatures:
        """Return what the image tower alone gives; where it is frozen, without a graph."""
        raise NotImplementedError

    def encode_features(self, features: PatchFeatures) -> PatchFeatures:
        """Make what ``encode_image`` returns of what ``encode_tower`` gave: the trained half."""
        raise NotImplementedError

    def tower_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that ``encode_tower`` depends on, by name, and maybe some more."""
        b = self.backbone
        beside = {id(p) for p in (*b.text_parameters(), b.logit_scale, b.logit_bias)}
        named = (*b.named_parameters(), *b.named_buffers())
        return {name: x for name, x in named if id(x) not in beside}

    def tower_options(self) -> dict[str, Any]:
        """Return what ``encode_tower`` depends on beside them, for JSON."""
        towers = self.options.backbone.items()
        kept = {key: value for key, value in towers if key not in self.starting_options}
        if not self.backbone.aligned:  # the same trunk, whichever system trains upon it
            return {"trunk": {key: value for key, value in kept.items() if key != "text"}}
        return {"system": self.system or type(self).__name__, "backbone": kept}

    def image_state(self) -> tuple[list[torch.Tensor], Any]:
        """Return what ``encode_image`` depends on: tensors, and whatever else.

        Features are stale once one of them has changed.
        """
        return [*self.parameters(), *self.buffers()], None

    # Texts.

    @property
    def tokenizer(self) -> Tokenizer:
        """Texts to token ids [T, L].

        ``unknown(text)``, where it has one, lists the words that it does not know.
        """
        return self.backbone.tokenizer

    def encode_text(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return text embeddings [T, E], not normalised.

        Args:
            token_ids: on the CPU, which is cheaper, or on the model's device.
        """
        check_ids(token_ids, self)
        return self.backbone.encode_text(token_ids)

    def encode_labels(
        self,
        labels: Sequence[str],
        templates: str | Sequence[str] | None = None,
        *,
        unit: bool = True,
    ) -> torch.Tensor:
        """Return one unit vector a label, [C, E].

        It is the mean over templates of the text embeddings, normalised.

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
        """Encode labels and format strings that have been looked at, as ``encode_labels`` does it.

        Synonyms may read the same.
        """
        texts = [template.replace("{}", label) for label in labels for template in templates]
        starts = range(0, len(texts), _TEXTS_AT_ONCE)
        shown = bar(starts, show=len(starts) > 4, unit="batch", desc="encoding labels", leave=False)
        rows = [
            self.encode_text(self.tokenizer(texts[start : start + _TEXTS_AT_ONCE]))
            for start in shown
        ]
        embeddings = torch.cat(rows).unflatten(0, (len(labels), len(templates)))
        if unit:
            embeddings = F.normalize(embeddings, dim=-1)
        return F.normalize(embeddings.mean(1), dim=-1)

    def text_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that ``encode_text`` depends on."""
        return self.backbone.text_parameters()

    def text_facts(self) -> Any:
        """Return what ``encode_text`` depends on beside them, for JSON."""
        return self.backbone.text_facts()

    # Comparison.

    def similarity(self, images: torch.Tensor | PatchFeatures, texts: torch.Tensor) -> torch.Tensor:
        """Compare whole images with text embeddings [T, E]: [B, T], which classifies."""
        check_compared(images, texts, PatchFeatures)
        features = self(images) if isinstance(images, torch.Tensor) else images
        return cosines(features.embedding, texts)

    def segment_logits(self, features: PatchFeatures, texts: torch.Tensor) -> torch.Tensor:
        """Compare every patch with every text: [B, C, h, w] at the resolution of the tokens."""
        check_compared(features, texts, PatchFeatures, encoded=True)
        return cosines(features.tokens, texts).transpose(1, 2).unflatten(2, features.grid)

    @property
    def logit_scale(self) -> torch.Tensor:
        """The factor of cosines before a softmax, at most 100; 0-dim, with gradient."""
        return self.backbone.logit_scale.exp().clamp(max=MAX_SCALE)

    @torch.no_grad()
    def limit_logit_scale(self) -> None:
        """Hold the parameter itself below log 100, as published training does after every step."""
        self.backbone.logit_scale.clamp_(max=math.log(MAX_SCALE))

    # Training.

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Return the parts that can be trained or kept, by name.

        Parameters in none of them are never trained.
        """
        raise NotImplementedError

    def train_parts(self, names: Sequence[str]) -> None:
        """Let only the parameters of these parts have gradients.

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
    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that get gradients, by name."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, which FSDP2 shards and activation checkpointing wraps."""
        return [*self.backbone.vision_blocks, *self.backbone.text_blocks]

    def parameter_groups(
        self, lr: float, weight_decay: float, lower_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Return groups for the optimizer; their ``lr_scale`` multiplies the learning rate.

        Here: one rate; gains, biases and the logit scale without weight decay, as CLIP does it.

        Args:
            lr: the recipe's learning rate.
            weight_decay: the recipe's.
            lower_lr: the rate of parts that a system trains gently.
        """
        matrices = [p for _, p in self.trainable if p.ndim >= 2]
        others = [p for _, p in self.trainable if p.ndim < 2]
        return [parameter_group(matrices, weight_decay), parameter_group(others, 0.0)]

    # Files.

    @property
    def named_weights(self) -> NamedWeights | None:
        """The frozen weights that its files name in place of holding them, or None: they hold all.

        See ``named_weights.py``.
        """
        return None

    def weights_hash(self, dtype: str | None = None) -> str:
        """Return a hash of those weights as numbers of ``dtype``, with which it begins."""
        raise NotImplementedError

    def resize_positions(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Resize tables of positions of another resolution or context to the model's.

        Args:
            state: tensors under the model's names, which are returned with the others.
        """
        own = {
            name.removeprefix(_BACKBONE): x
            for name, x in state.items()
            if name.startswith(_BACKBONE)
        }
        resized = self.backbone.resize_positions(own)
        return {**state, **{_BACKBONE + name: x for name, x in resized.items()}}

    def save_pretrained(self, folder: str | Path, **facts: Any) -> Path:
        """Write a folder for ``from_pretrained``; see ``saving.save_pretrained``."""
        from ..weights.saving import save_pretrained

        return save_pretrained(self, folder, **facts)

    def push_to_hub(self, repo: str, *, licence: str, **options: Any) -> str:
        """Upload the model for ``from_pretrained("hf-hub:...")``; see ``saving.push_to_hub``."""
        from ..weights.saving import push_to_hub

        return push_to_hub(self, repo, licence=licence, **options)


def cosines(features: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Return the cosine of every row [..., N, E] with every text [T, E]: [..., N, T]."""
    texts = texts.to(features.dtype)
    return F.normalize(features, dim=-1) @ F.normalize(texts, dim=-1).T


def parameter_group(parameters: list[nn.Parameter], weight_decay: float) -> dict[str, Any]:
    """Return a group for the optimizer at the recipe's learning rate."""
    return {"params": parameters, "lr_scale": 1.0, "weight_decay": weight_decay}
