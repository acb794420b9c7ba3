"""The pixels of a scene: textures, shapes, digit cards.

Masks are exact; a drawn pixel belongs to one class.

Compositional scenes with captions and exact masks, made from a seed: the embedded data set.

A scene is a textured background ("stuff") with one or two objects ("things"). A thing is a colour
and a kind, ``a red seven``; some combinations of colour and kind are *unseen*: they are never
rendered for training, while their colour and their kind are, each in other combinations. Two forms
share everything but the drawing:

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
from functools import lru_cache

import numpy as np

from ..libraries import require

MOST_OBJECTS = {"shapes": 2, "digits": 2}

COLOURS = {
    "red": (205, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 75, 215),
    "orange": (240, 145, 20),
    "purple": (135, 50, 165),
    "white": (235, 235, 235),
    "yellow": (235, 210, 40),
}
_DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Mean colour of the photo textures, which scikit-image ships in grey.
_PHOTO_TINT = {"brick": (150, 92, 72), "grass": (88, 128, 62), "gravel": (128, 124, 120)}


def background(
    form: str, stuff: str, size: int, split: str, rng: np.random.Generator
) -> np.ndarray:
    """A texture as uint8 [size, size, 3]."""
    if form == "digits":
        return _photo(stuff, size, split, rng)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    noise = rng.normal(0, 1, (size, size, 1)).astype(np.float32)
    phase = rng.uniform(0, 6.28)
    if stuff == "grass":
        base = np.array([84, 132, 62]) + 26 * noise
    elif stuff == "water":
        wave = np.sin(y / size * 50 + 2.0 * np.sin(x / size * 19 + phase))
        base = np.array([92, 142, 178]) + 16 * wave[..., None] + 5 * noise
    elif stuff == "sand":
        ripple = np.sin((0.5 * x + y) / size * 60 + phase)
        base = np.array([214, 184, 132]) + 9 * ripple[..., None] + 7 * noise
    elif stuff == "night":
        stars = (rng.random((size, size, 1)) < 0.012) * 190.0
        base = np.array([12, 20, 36]) + 4 * noise + stars
    else:
        raise ValueError(f"stuff is {stuff!r}; expected grass, water, sand or night")
    return np.clip(base * rng.uniform(0.88, 1.12), 0, 255).astype(np.uint8)


def place(
    form: str,
    image: np.ndarray,
    occupied: np.ndarray,
    colour: str,
    kind: str,
    split: str,
    rng: np.random.Generator,
) -> np.ndarray | None:
    """Draw one object into ``image`` where nothing is yet; returns its mask, or None when no place
    was free.
    """
    size = image.shape[0]
    for _ in range(30):
        low, high = (0.20, 0.32) if form == "shapes" else (0.22, 0.30)
        radius = size * rng.uniform(low, high)
        cy, cx = rng.uniform(0.8 * radius, size - 0.8 * radius, 2)
        angle = rng.uniform(-0.3, 0.3) if form == "digits" else rng.uniform(-0.45, 0.45)
        y, x = np.mgrid[0:size, 0:size] + 0.5
        v = (
            (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        ) / radius  # object's own axes, -1 .. 1
        u = ((y - cy) * np.sin(angle) + (x - cx) * np.cos(angle)) / radius
        area = _inside("card" if form == "digits" else kind, u, v)
        if not area.any() or (area & occupied).any():
            continue
        ink = np.array(COLOURS[colour], np.float32) * rng.uniform(0.82, 1.12) + rng.normal(0, 8, 3)
        pixels = np.broadcast_to(ink, (int(area.sum()), 3)).astype(np.float32)
        pixels = pixels * (1.0 + 0.12 * (u + v)[area][:, None])  # light from one side
        if form == "digits":
            stroke = _digit(kind, u[area], v[area], split, rng)[:, None]
            pixels = pixels * (1 - stroke) + np.float32(rng.uniform(5, 40)) * stroke
        image[area] = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
        occupied |= area
        return area
    return None


def _inside(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    if kind == "circle":
        return u * u + v * v < 0.85
    if kind == "square":
        return np.maximum(abs(u), abs(v)) < 0.8
    if kind == "triangle":
        return (v < 0.75) & (v > -0.95) & (abs(u) < 0.55 * (v + 0.95))
    if kind == "cross":
        return (np.minimum(abs(u), abs(v)) < 0.32) & (np.maximum(abs(u), abs(v)) < 0.95)
    if kind == "card":
        return (abs(u) < 0.85) & (abs(v) < 1.0)
    raise ValueError(f"kind is {kind!r}; expected circle, square, triangle, cross or card")


@lru_cache(maxsize=1)
def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16.0).astype(np.float32), data.target


@lru_cache(maxsize=8)
def _photo_pixels(stuff: str) -> np.ndarray:
    import skimage.data

    grey = getattr(skimage.data, stuff)().astype(np.float32)
    return grey / grey.mean()


def _photo(stuff: str, size: int, split: str, rng: np.random.Generator) -> np.ndarray:
    """A crop of the photograph; rows 0-351 are for training and the rest for validation."""
    rows = (0, 352) if split == "train" else (352, 512)
    grey = _photo_pixels(stuff)
    crop = min(
        2 * size, rows[1] - rows[0]
    )  # twice the picture's size, halved: the photographs are coarse
    top = rng.integers(rows[0], rows[1] - crop + 1)
    left = rng.integers(0, grey.shape[1] - crop + 1)
    index = (np.arange(size) + 0.5) * crop / size
    at = np.clip(index.astype(int), 0, crop - 1)
    patch = grey[top : top + crop, left : left + crop]
    patch = 0.25 * (
        patch[np.ix_(at, at)]
        + patch[np.ix_(at - 1, at)]
        + patch[np.ix_(at, at - 1)]
        + patch[np.ix_(at - 1, at - 1)]
    )
    if rng.random() < 0.5:
        patch = patch[:, ::-1]
    tint = np.array(_PHOTO_TINT[stuff], np.float32) * rng.uniform(0.85, 1.15) + rng.normal(0, 4, 3)
    return np.clip(patch[..., None] * tint, 0, 255).astype(np.uint8)


def _digit(
    kind: str, u: np.ndarray, v: np.ndarray, split: str, rng: np.random.Generator
) -> np.ndarray:
    """Ink of a handwritten digit at card coordinates u, v in -1 .. 1, bilinear; 0 off the digit."""
    images, target = _handwriting()
    # of 1797 writers' digits in file order: the first for training, the rest for validation
    border = 1200
    every = np.flatnonzero(target == _DIGIT_WORDS.index(kind))
    pool = every[every < border] if split == "train" else every[every >= border]
    glyph = np.pad(images[pool[rng.integers(len(pool))]], 1)
    gy = np.clip((v / 0.92 + 1) * 4 + 0.5, 0, 8.999)
    gx = np.clip((u / 0.80 + 1) * 4 + 0.5, 0, 8.999)
    y0, x0 = gy.astype(int), gx.astype(int)
    fy, fx = gy - y0, gx - x0
    ink = (
        glyph[y0, x0] * (1 - fy) * (1 - fx)
        + glyph[y0, x0 + 1] * (1 - fy) * fx
        + glyph[y0 + 1, x0] * fy * (1 - fx)
        + glyph[y0 + 1, x0 + 1] * fy * fx
    )
    return np.clip(1.6 * ink, 0, 1).astype(np.float32)


SPLITS = ("train", "val")
IMAGE_SIZE = 48
CAPTIONS_PER_SCENE = 5
# How often a caption of one entity names the background, and one of several names it too.
STUFF_ALONE, STUFF_BESIDE = 0.25, 0.45

ONE_ENTITY = ("{a}", "a photo of {a}", "there is {a}", "a picture of {a}")
SEVERAL = ("{list}", "a photo of {list}", "{list} in a picture")


@dataclass(frozen=True)
class Vocabulary:
    """The classes of one form: every colour with every kind, then the stuff; ``unseen`` are held
    out of training.
    """

    form: str
    colours: tuple[str, ...]
    kinds: tuple[str, ...]
    stuff: tuple[str, ...]
    unseen: tuple[tuple[str, str], ...]

    @property
    def things(self) -> tuple[str, ...]:
        return tuple(f"{c} {k}" for c in self.colours for k in self.kinds)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the mask's integers."""
        return self.things + self.stuff

    @property
    def prompts(self) -> tuple[str, ...]:
        """The classes as a person would ask for them: 'a red seven', 'gravel'."""
        return tuple(_article(name, self.stuff) for name in self.classes)

    @property
    def split_of_class(self) -> tuple[str, ...]:
        """``seen``, ``unseen`` or ``stuff`` for every class."""
        held_out = {f"{c} {k}" for c, k in self.unseen}
        return tuple("unseen" if name in held_out else "seen" for name in self.things) + (
            "stuff",
        ) * len(self.stuff)


_SHAPE_COLOURS = ("red", "green", "blue", "orange", "purple", "white")
_SHAPE_KINDS = ("circle", "square", "triangle", "cross")
_DIGIT_COLOURS = ("red", "green", "blue", "yellow")
_DIGIT_KINDS = ("zero", "one", "four", "six", "seven")

# Every kind and every colour of an unseen combination stays in the training set, in other
# combinations.
VOCABULARIES = {
    "shapes": Vocabulary(
        "shapes",
        _SHAPE_COLOURS,
        _SHAPE_KINDS,
        ("grass", "water", "sand", "night"),
        (("red", "circle"), ("blue", "triangle"), ("purple", "cross")),
    ),
    "digits": Vocabulary(
        "digits",
        _DIGIT_COLOURS,
        _DIGIT_KINDS,
        ("brick", "grass", "gravel"),
        tuple((c, _DIGIT_KINDS[(i + 1) % 5]) for i, c in enumerate(_DIGIT_COLOURS)),
    ),
}


@dataclass(frozen=True)
class Caption:
    """A sentence and the entities it names, as noun phrases ('red seven', 'gravel')."""

    text: str
    entities: frozenset[str]


@dataclass
class Scene:
    """One scene: ``image`` uint8 [H, W, 3], ``mask`` int16 [H, W] of class indices, captions,
    things drawn.
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
        self.form, self.split, self.length, self.seed, self.image_size = (
            form,
            split,
            length,
            seed,
            image_size,
        )
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
        for _ in range(rng.integers(1, MOST_OBJECTS[self.form] + 1)):
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
    """70 % name one entity, the rest list several; objects are named more often than backgrounds,
    as people do.

    Captions that always list everything teach no localisation, and a background that every caption
    names comes to look like every patch of its pictures.
    """
    names = list(dict.fromkeys(things))
    if rng.random() < 0.7 or not names:
        entity = (
            stuff if not names or rng.random() < STUFF_ALONE else names[rng.integers(len(names))]
        )
        template = ONE_ENTITY[rng.integers(len(ONE_ENTITY))]
        return Caption(template.format(a=_article(entity, (stuff,))), frozenset([entity]))
    chosen = [names[i] for i in rng.permutation(len(names))[: rng.integers(1, len(names) + 1)]]
    text = " and ".join(_article(name, (stuff,)) for name in chosen)
    if rng.random() < STUFF_BESIDE:
        text, chosen = f"{text} on {stuff}", [*chosen, stuff]
    return Caption(SEVERAL[rng.integers(len(SEVERAL))].format(list=text), frozenset(chosen))


def _article(entity: str, stuff: tuple[str, ...]) -> str:
    return entity if entity in stuff else f"{'an' if entity[0] in 'aeiou' else 'a'} {entity}"
