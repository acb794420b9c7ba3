"""Every choice that turns a picture and a label set into a label map, in one place."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from ..data.images import MAX_PIXELS
from ..errors import InputError

ACTIVATIONS, STAGES = (None, "sigmoid", "softmax"), ("window", "merged", "output")


@dataclass(frozen=True)
class Settings:
    """How ``Predictor`` sees pictures, asks for labels and decides. A published protocol is one of these with a label set.

    Attributes:
        short_side: pictures are resized to this short side, keeping their shape; the backbone's training size if None.
        long_side: and made smaller where their long side would exceed this.
        resize: ``bicubic`` (antialiased, Pillow's) or ``bilinear`` (without antialiasing, as OpenCV does it).
        crop: side of square sliding windows in the resized picture; None sees the picture whole.
        stride: pixels from one window to the next; half of ``crop`` if None.
        window_batch: windows in one encoder call.
        templates: prompt templates, a name or format strings; None: those of the label set, else the model's.
        text_mean: of the templates: ``unit`` normalises every text embedding before the mean, ``raw`` does not.
        synonyms: ``max``: a class scores what its best text scores; ``mean``: the mean of its texts' unit embeddings is asked for.
        scale: multiplies the cosines; needed by softmax and entropy, where it decides what a probability means.
        activation: None, ``sigmoid`` or ``softmax`` over all texts.
        stage: where it acts: in each ``window``, on the ``merged`` windows, or on the ``output`` after the last resize.
        background: texts that stand for everything else; where one wins, the label is -1.
        background_threshold: pixels whose winner scores less get -1: a cosine, or what the activation makes of it.
        background_entropy: pixels get -1 where the entropy (nats) of softmax(scale * cosines) over all texts exceeds this;
            taken at the patches, upsampled like a class.
        area_threshold: classes with less than this share of the foreground are taken back and their pixels decided again.
        bias: added to the scores of classes by name, last: ZegCLIP's -0.1 for classes seen in training.
        top_classes: of grouping systems: only so many classes, the most similar to the whole window, may label a group.
        refine: ``pamr`` adapts the class maps to the picture's edges; see ``inference/pamr.py``.
        max_pixels: larger pictures are refused.
    """

    short_side: int | None = None
    long_side: int | None = None
    resize: str = "bicubic"
    crop: int | None = None
    stride: int | None = None
    window_batch: int = 8
    templates: str | tuple[str, ...] | None = None
    text_mean: str = "unit"
    synonyms: str = "max"
    scale: float | None = None
    activation: str | None = None
    stage: str = "output"
    background: tuple[str, ...] = ()
    background_threshold: float | None = None
    background_entropy: float | None = None
    area_threshold: float = 0.0
    bias: dict[str, float] | None = None
    top_classes: int = 5
    refine: str | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self):
        one_of = {"resize": ("bicubic", "bilinear"), "text_mean": ("unit", "raw"), "synonyms": ("max", "mean"),
                  "activation": ACTIVATIONS, "stage": STAGES, "refine": (None, "pamr")}
        for name, expected in one_of.items():
            if getattr(self, name) not in expected:
                raise InputError(f"{name} is {getattr(self, name)!r}; expected one of {list(expected)}")
        for name in ("short_side", "long_side", "crop", "stride", "window_batch", "top_classes", "max_pixels"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value > 0):
                raise InputError(f"{name} is {value!r}; expected a positive integer")
        if isinstance(self.background, (int, float)):
            raise InputError(f"background is {self.background!r}; expected texts such as 'wall'. A number is background_threshold")
        texts = [self.background] if isinstance(self.background, str) else list(self.background or ())
        object.__setattr__(self, "background", tuple(texts))
        if isinstance(self.templates, list):
            object.__setattr__(self, "templates", tuple(self.templates))
        if any(not isinstance(text, str) or not text.strip() for text in texts):
            raise InputError(f"background is {texts!r}; expected texts that are not blank")
        if self.stride is not None and self.crop is None:
            raise InputError(f"stride is {self.stride} and crop is missing; expected both, or neither")
        if self.crop and self.stride and self.stride > self.crop:
            raise InputError(f"stride is {self.stride}; expected 1 to the crop, {self.crop} pixels")
        if self.scale is not None and not self.scale > 0:
            raise InputError(f"scale is {self.scale}; expected a positive number")
        for name, needs in (("activation", self.activation == "softmax"), ("background_entropy", self.background_entropy is not None)):
            if needs and self.scale is None:
                raise InputError(f"{name} is {getattr(self, name)!r} and scale is missing: softmax over plain cosines is nearly "
                                 "uniform; expected a scale such as 40")
        top = 1.0 if self.activation else self.scale or 1.0
        low = 0.0 if self.activation else -top
        if self.background_threshold is not None and not low <= self.background_threshold <= top:
            kind = f"what {self.activation} gives" if self.activation else "a cosine" + ("" if top == 1 else f" times {top:g}")
            raise InputError(f"background_threshold is {self.background_threshold}; expected {kind}, {low:g} .. {top:g}")
        if not 0 <= self.area_threshold < 1:
            raise InputError(f"area_threshold is {self.area_threshold}; expected a share in 0 .. 1")

    @classmethod
    def of(cls, options: dict[str, Any], base: Settings | None = None) -> Settings:
        """``base`` (or the defaults) with some fields changed.

        Raises:
            InputError: for an unknown field, naming the closest, and for values that cannot be.
        """
        from difflib import get_close_matches

        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                close = get_close_matches(name, known, 1)
                raise InputError(f"unknown option {name!r}; " + (f"did you mean {close[0]!r}?" if close else f"expected some of {known}"))
        return replace(base or cls(), **options)
