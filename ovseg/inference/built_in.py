"""The pictures of ``--demo``: a photograph, and a scene of held-out handwriting with its truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..data.labels import LabelSet
from ..data.scenes import Scenes
from ..systems import OVSegModel
from .known_words import unknown_words
from .queries import Queries

_DISTRACTORS = 4  # things that are not there
# One that the model does well, with a combination it never saw in training, "a blue six". The
# README shows the first ten as they come.
_SCENE = 9
# The photograph is a cat in a room; nothing else of these is in it.
_PHOTOGRAPH = """cat, dog, horse, sheep, cow, bird, elephant, person, car, bicycle, train, boat,
aeroplane, chair, sofa, bed, dining table, tv monitor, potted plant, book, bottle, cup, pizza,
flower, wall, floor, curtain, window, grass, tree, sky, road, water"""


@dataclass(frozen=True)
class BuiltIn:
    """A picture that comes with the package, or with one that it needs.

    Attributes:
        image: [H, W, 3] uint8.
        labels: what it is asked for.
        truth: [H, W], index into ``labels``; None where nobody knows it.
    """

    image: np.ndarray
    labels: LabelSet
    truth: np.ndarray | None = None


def photograph() -> BuiltIn:
    """Return a photograph of a cat, with the cat and some thirty distractors as labels.

    It comes in scikit-image's wheel: Chelsea, by Stefan van der Walt, CC0.
    """
    import skimage.data

    return BuiltIn(skimage.data.chelsea(), _photograph_labels())


def scene() -> BuiltIn:
    """Return a scene with two things.

    It is asked for what is there, all stuff, and things that share a colour or a kind with what is
    there.
    """
    scenes = Scenes("digits", "val", _SCENE + 1)
    words = scenes.vocabulary
    found = scenes[_SCENE]
    parts = {part for thing in found.things for part in thing.split()}
    near = [name for name in words.things if name not in found.things and parts & set(name.split())]
    step = max(1, len(near) // _DISTRACTORS)  # not all of one colour
    chosen = [*dict.fromkeys(found.things), *near[::step][:_DISTRACTORS], *words.stuff]
    places = [words.classes.index(name) for name in chosen]
    place_of = np.full(len(words.classes), -1)
    place_of[places] = np.arange(len(places))
    labels = LabelSet.of([words.prompts[place] for place in places])
    return BuiltIn(found.image, labels, place_of[found.mask])


def fitting(model: OVSegModel) -> BuiltIn:
    """Return the photograph for a model that knows its words, the scene for others."""
    return scene() if unknown_words(model, Queries(_photograph_labels())) else photograph()


def _photograph_labels() -> LabelSet:
    return LabelSet.parse(" ".join(_PHOTOGRAPH.split()))


# By the word behind --demo.
BUILT_IN: dict[str, Callable[[OVSegModel], BuiltIn]] = {
    "auto": fitting,
    "photo": lambda _: photograph(),
    "scene": lambda _: scene(),
}
