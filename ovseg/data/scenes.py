"""Compositional scenes with captions and exact masks, made from a seed: the embedded data set.

A scene is a textured background ("stuff") with one or two objects ("things"). A thing is a colour
and a kind, ``a red seven``; some combinations of colour and kind are *unseen*: they are never
rendered for training, while their colour and their kind are, each in other combinations. Two forms
share everything but the drawing (``scene_drawing``):

* ``shapes``: drawn shapes on drawn textures; numpy only.
* ``digits``: real handwritten digits (scikit-learn's ``load_digits``) on tinted cards, lying on
  real photo textures (scikit-image's ``brick``, ``grass``, ``gravel``). Training and validation use
  different handwriting and different parts of the photographs.

Each scene has several captions, as the pictures of COCO have; most name one entity. Captions name
what they name and nothing else is known in training: no mask, no list of objects. Scene ``i`` of a
split depends on ``(seed, split, i)`` only, so any part of a data set can be made anywhere, in any
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..libraries import require
from .scene_drawing import background, place

SPLITS = ("train", "val")
IMAGE_SIZE = 48
CAPTIONS_PER_SCENE = 5
_MOST_OBJECTS = 2
# How often a caption of one entity names the background, and one of several names it too.
_STUFF_ALONE = 0.25
_STUFF_BESIDE = 0.45
ONE_ENTITY = ("{a}", "a photo of {a}", "there is {a}", "a picture of {a}")
SEVERAL = ("{list}", "a photo of {list}", "{list} in a picture")


@dataclass(frozen=True)
class Vocabulary:
    """The classes of one form: every colour with every kind, then the stuff.

    Attributes:
        unseen: colours and kinds whose combination is held out of training.
    """

    form: str
    colours: tuple[str, ...]
    kinds: tuple[str, ...]
    stuff: tuple[str, ...]
    unseen: tuple[tuple[str, str], ...]

    @property
    def things(self) -> tuple[str, ...]:
        """Names of the classes that are no stuff."""
        return tuple(f"{colour} {kind}" for colour in self.colours for kind in self.kinds)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the mask's integers."""
        return self.things + self.stuff

    @property
    def unseen_classes(self) -> tuple[str, ...]:
        """Names of the classes that are held out of training, in the order of ``classes``."""
        held_out = {f"{colour} {kind}" for colour, kind in self.unseen}
        return tuple(name for name in self.things if name in held_out)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The classes as a person would ask for them: 'a red seven', 'gravel'."""
        return tuple(_article(name, self.stuff) for name in self.classes)

    @property
    def split_of_class(self) -> tuple[str, ...]:
        """``seen``, ``unseen`` or ``stuff`` for every class."""
        unseen = self.unseen_classes
        things = ["unseen" if name in unseen else "seen" for name in self.things]
        return (*things, *["stuff"] * len(self.stuff))


_DIGIT_COLOURS = ("red", "green", "blue", "yellow")
_DIGIT_KINDS = ("zero", "one", "four", "six", "seven")

# Every kind and every colour of an unseen combination stays in the training set, in other
# combinations.
VOCABULARIES = {
    "shapes": Vocabulary(
        "shapes",
        ("red", "green", "blue", "orange", "purple", "white"),
        ("circle", "square", "triangle", "cross"),
        ("grass", "water", "sand", "night"),
        (("red", "circle"), ("blue", "triangle"), ("purple", "cross")),
    ),
    "digits": Vocabulary(
        "digits",
        _DIGIT_COLOURS,
        _DIGIT_KINDS,
        ("brick", "grass", "gravel"),
        tuple((colour, _DIGIT_KINDS[(i + 1) % 5]) for i, colour in enumerate(_DIGIT_COLOURS)),
    ),
}


@dataclass(frozen=True)
class Caption:
    """A sentence and the entities it names, as noun phrases ('red seven', 'gravel')."""

    text: str
    entities: frozenset[str]


@dataclass
class Scene:
    """One scene.

    Attributes:
        image: uint8 [H, W, 3].
        mask: int16 [H, W] of class indices.
        captions: ``CAPTIONS_PER_SCENE`` of them.
        things: that were drawn, by name.
        stuff: the background, by name.
        index, split: which scene it is.
    """

    image: np.ndarray
    mask: np.ndarray
    captions: list[Caption]
    things: list[str]
    stuff: str
    index: int = 0
    split: str = field(default="train")


class Scenes(Sequence[Scene]):
    """A data set of ``length`` scenes.

    Args:
        form: ``shapes`` or ``digits``.
        split: ``train`` (no unseen combination) or ``val`` (all combinations).
        length: number of scenes.
        seed: everything follows from it.
        image_size: side of the square picture in pixels; objects scale with it.
        with_unseen: draw the unseen combinations in ``train`` too, for training that is told which
            labels to hide.

    Raises:
        ValueError: for an unknown form or split, a negative length or an image_size below 24.
        MissingLibrary: if there are no digits or photographs to draw from: they come from
            scikit-learn and scikit-image.
    """

    def __init__(
        self,
        form: str = "digits",
        split: str = "train",
        length: int = 6000,
        seed: int = 0,
        image_size: int = IMAGE_SIZE,
        *,
        with_unseen: bool = False,
    ):
        if form not in VOCABULARIES:
            raise ValueError(f"form is {form!r}; expected one of {sorted(VOCABULARIES)}")
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; expected one of {list(SPLITS)}")
        if length < 0:
            raise ValueError(f"length is {length}; expected 0 or more")
        if image_size < 24:
            raise ValueError(
                f"image_size is {image_size}; expected at least 24 pixels, objects vanish below"
            )
        if form == "digits" and length:  # of no scene only the words are asked for
            for library in ("sklearn", "skimage"):
                require(library, "the digits form")
        self.vocabulary = VOCABULARIES[form]
        self.form = form
        self.split = split
        self.length = length
        self.seed = seed
        self.image_size = image_size
        held_out = set(self.vocabulary.unseen) if split == "train" and not with_unseen else set()
        self._pairs = [
            (c, k)
            for c in self.vocabulary.colours
            for k in self.vocabulary.kinds
            if (c, k) not in held_out
        ]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.length))]
        if not -self.length <= index < self.length:
            raise IndexError(f"index is {index}; expected less than {self.length}")
        index %= self.length
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        vocabulary = self.vocabulary
        stuff = vocabulary.stuff[rng.integers(len(vocabulary.stuff))]
        image = background(self.form, stuff, self.image_size, self.split, rng)
        mask = np.full(
            (self.image_size, self.image_size), vocabulary.classes.index(stuff), np.int16
        )
        occupied = np.zeros(mask.shape, bool)
        things: list[str] = []
        for _ in range(rng.integers(1, _MOST_OBJECTS + 1)):
            colour, kind = self._pairs[rng.integers(len(self._pairs))]
            area = place(self.form, image, occupied, colour, kind, self.split, rng)
            if area is None:  # no free place was found for this object
                continue
            name = f"{colour} {kind}"
            mask[area] = vocabulary.classes.index(name)
            things.append(name)
        captions = [_caption(things, stuff, rng) for _ in range(CAPTIONS_PER_SCENE)]
        return Scene(image, mask, captions, things, stuff, index, self.split)


def _caption(things: list[str], stuff: str, rng: np.random.Generator) -> Caption:
    """Write a caption: 70 % name one entity, the rest list several.

    Objects are named more often than backgrounds, as people do. Captions that always list
    everything teach no localisation, and a background that every caption names comes to look like
    every patch of its pictures.
    """
    names = list(dict.fromkeys(things))
    if rng.random() < 0.7 or not names:
        entity = (
            stuff if not names or rng.random() < _STUFF_ALONE else names[rng.integers(len(names))]
        )
        template = ONE_ENTITY[rng.integers(len(ONE_ENTITY))]
        return Caption(template.format(a=_article(entity, (stuff,))), frozenset([entity]))
    chosen = [names[i] for i in rng.permutation(len(names))[: rng.integers(1, len(names) + 1)]]
    text = " and ".join(_article(name, (stuff,)) for name in chosen)
    if rng.random() < _STUFF_BESIDE:
        text = f"{text} on {stuff}"
        chosen.append(stuff)
    return Caption(SEVERAL[rng.integers(len(SEVERAL))].format(list=text), frozenset(chosen))


def _article(entity: str, stuff: tuple[str, ...]) -> str:
    return entity if entity in stuff else f"{'an' if entity[0] in 'aeiou' else 'a'} {entity}"
