"""The scene generator: determinism, exact masks, held-out combinations, captions that are true."""

import numpy as np
import pytest

from ovseg.data.scenes import VOCABULARIES, Scenes

FORMS = sorted(VOCABULARIES)


@pytest.mark.parametrize("form", FORMS)
def test_a_scene_depends_on_seed_split_and_index_only(form):
    a, b = Scenes(form, "val", 10, seed=3), Scenes(form, "val", 5, seed=3)
    assert all(
        np.array_equal(a[i].image, b[i].image) and a[i].captions == b[i].captions for i in (4, 0, 2)
    )
    assert not np.array_equal(a[0].image, Scenes(form, "val", 1, seed=4)[0].image)
    assert not np.array_equal(a[0].image, Scenes(form, "train", 1, seed=3)[0].image)


@pytest.mark.parametrize("form", FORMS)
def test_unseen_combinations_are_never_trained_on_and_their_parts_are(form):
    vocabulary = VOCABULARIES[form]
    held_out = {f"{c} {k}" for c, k in vocabulary.unseen}
    train, val = Scenes(form, "train", 250)[:], Scenes(form, "val", 250)[:]
    trained = {thing for scene in train for thing in scene.things}
    assert not trained & held_out and trained == set(vocabulary.things) - held_out
    words = {word for thing in trained for word in thing.split()}
    assert words >= set(vocabulary.colours) | set(vocabulary.kinds)
    assert {thing for scene in val for thing in scene.things} & held_out
    assert not any(
        entity in held_out
        for scene in train
        for caption in scene.captions
        for entity in caption.entities
    )


@pytest.mark.parametrize("form", FORMS)
def test_masks_agree_with_what_was_drawn(form):
    vocabulary = VOCABULARIES[form]
    for scene in Scenes(form, "val", 40):
        present = {vocabulary.classes[i] for i in np.unique(scene.mask)}
        assert present == {*scene.things, scene.stuff}
        assert scene.mask.dtype == np.int16 and scene.mask.shape == scene.image.shape[:2]


def test_mask_is_exact_to_the_pixel():
    """A drawn red circle on dark night: red pixels are the circle's, and no others."""
    from ovseg.data import scene_drawing as drawing

    rng = np.random.default_rng(0)
    image = np.zeros((48, 48, 3), np.uint8)
    area = drawing.place("shapes", image, np.zeros((48, 48), bool), "red", "circle", "val", rng)
    assert np.array_equal(image[..., 0] > 60, area)


@pytest.mark.parametrize("form", FORMS)
def test_captions_name_only_what_is_there(form):
    for scene in Scenes(form, "train", 60):
        there = {*scene.things, scene.stuff}
        for caption in scene.captions:
            assert caption.entities <= there and caption.entities
            assert all(entity in caption.text for entity in caption.entities)


def test_handwriting_and_photographs_of_the_splits_are_disjoint():
    from ovseg.data import scene_drawing as drawing

    images, _ = drawing._handwriting()
    assert len(images) == 1797
    rng = np.random.default_rng(0)
    train = {drawing._photo("brick", 48, "train", rng).tobytes() for _ in range(20)}
    assert not train & {drawing._photo("brick", 48, "val", rng).tobytes() for _ in range(20)}


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"form": "cats"}, r"form is 'cats'; expected one of \['digits', 'shapes'\]"),
        ({"split": "test"}, "split is 'test'"),
        ({"length": -1}, "length is -1; expected 0 or more"),
        ({"image_size": 8}, "image_size is 8; expected at least 24"),
    ],
)
@pytest.mark.bad_input("data", "arguments of the scenes that cannot be")
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Scenes(**arguments)


def test_index_out_of_range():
    with pytest.raises(IndexError, match="index is 3; expected less than 3"):
        Scenes("shapes", "val", 3)[3]
    assert len(Scenes("shapes", "val", 3)[:]) == 3
