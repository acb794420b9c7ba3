"""The picture of ``--demo``: a scene of held-out handwriting with its truth and its labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..data.labels import LabelSet
from ..data.scenes import Scenes

_DISTRACTORS = 4  # things that are not there
# One that the model does well, with a combination it never saw in training, "a blue six". The
# README shows the first ten as they come.
_SCENE = 9


@dataclass(frozen=True)
class BuiltIn:
    """A scene whose truth is known.

    Attributes:
        image: [H, W, 3] uint8.
        truth: [H, W], index into ``labels``.
        labels: what it is asked for.
    """

    image: np.ndarray
    truth: np.ndarray
    labels: LabelSet


def built_in() -> BuiltIn:
    """Return a scene with two things.

    It is asked for what is there, all stuff, and things that share a colour or a kind with what is
    there.
    """
    scenes = Scenes("digits", "val", _SCENE + 1)
    words = scenes.vocabulary
    scene = scenes[_SCENE]
    parts = {part for thing in scene.things for part in thing.split()}
    near = [name for name in words.things if name not in scene.things and parts & set(name.split())]
    step = max(1, len(near) // _DISTRACTORS)  # not all of one colour
    chosen = [*dict.fromkeys(scene.things), *near[::step][:_DISTRACTORS], *words.stuff]
    places = [words.classes.index(name) for name in chosen]
    place_of = np.full(len(words.classes), -1)
    place_of[places] = np.arange(len(places))
    return BuiltIn(
        scene.image, place_of[scene.mask], LabelSet.of([words.prompts[place] for place in places])
    )
