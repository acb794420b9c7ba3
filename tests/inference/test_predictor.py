"""Segmenting: any input, any size, label order, background, saving; pictures carry their legend."""

import numpy as np
import pytest
import torch
from PIL import Image

import ovseg
from ovseg.data.scenes import Scenes
from ovseg.errors import InputError
from ovseg.inference.segmentation import colour, contact_sheet, palette

LABELS = ["a red seven", "a blue zero", "gravel", "grass"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ovseg.create_model("pacl_tiny")


@pytest.mark.parametrize("size", [(48, 48), (31, 47), (200, 90), (1, 1), (3, 500)])
def test_output_has_the_size_of_the_input(model, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8))
    result = ovseg.segment(image, LABELS, model=model)
    assert result.labels.shape == size == result.scores.shape and result.labels.dtype == np.int16
    assert set(np.unique(result.labels)) <= set(range(4)) and sum(
        result.areas.values()
    ) == pytest.approx(1)


def test_labels_are_the_upsampled_argmax(model):
    scene = Scenes("digits", "val", 1)[0]
    predictor = ovseg.Predictor(model, LABELS).set_image(scene.image)
    texts = model.encode_labels(LABELS)
    pixels = torch.from_numpy(scene.image).permute(2, 0, 1)[None] / 255
    logits = model.segment_logits(model.encode_image(model.normalize(pixels)), texts)
    expected = torch.nn.functional.interpolate(logits, (48, 48), mode="bilinear").argmax(1)[0]
    assert np.array_equal(predictor.predict().labels, expected.numpy())


def test_one_encoding_many_queries(model, monkeypatch):
    calls = []
    real = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda x: calls.append(1) or real(x))
    predictor = ovseg.Predictor(model, LABELS).set_image(Scenes("digits", "val", 1)[0].image)
    a, b = predictor.predict(), predictor.predict(LABELS[::-1])
    assert len(calls) == 1 and b.names == LABELS[::-1]
    assert np.array_equal(a.labels, 3 - b.labels)
    assert list(predictor.classify()) == sorted(
        predictor.classify(), key=lambda k: -predictor.classify()[k]
    )


def test_background_threshold(model):
    image = Scenes("digits", "val", 1)[0].image
    everything = ovseg.segment(image, LABELS, model=model)
    threshold = float(np.median(everything.scores))
    some = ovseg.segment(image, LABELS, model=model, background_threshold=threshold)
    assert np.array_equal(some.labels == -1, everything.scores < threshold)
    assert np.array_equal(some.labels[some.labels >= 0], everything.labels[some.labels >= 0])


def test_saving(model, tmp_path):
    result = ovseg.segment(
        Scenes("digits", "val", 1)[0].image, LABELS, model=model, background_threshold=0.0
    )
    overlay = Image.open(result.save(tmp_path / "new" / "o.png"))
    assert overlay.width == 384 and overlay.height > 384  # enlarged, with a legend below
    mask = Image.open(result.save_mask(tmp_path / "m.png"))
    assert np.array_equal(np.asarray(mask), np.where(result.labels < 0, 255, result.labels))
    with pytest.raises(InputError, match=r"expected a suffix such as \.png"):
        result.save(tmp_path / "o.nothing")


def test_legend_and_palette():
    assert np.array_equal(palette(3), palette(40)[:3]) and len(np.unique(palette(60), axis=0)) == 60
    assert colour(np.array([[-1, 0]]), 2).tolist()[0] == [[0, 0, 0], palette(2)[0].tolist()]
    many = [((255, 0, 0), f"a long label {i}") for i in range(30)]
    sheet = contact_sheet([[np.zeros((20, 20, 3), np.uint8)] * 5], ["row"], many)
    assert sheet.height > 150


@pytest.mark.parametrize(
    "options,message",
    [
        ({"labels": []}, "labels is empty"),
        ({"labels": ["cat", "cat"]}, "are both 'cat'"),
        ({"image": b"junk"}, "it is none of JPEG"),
        ({"background_threshold": 3.0}, r"background_threshold is 3\.0; expected a cosine"),
        ({"short_side": 2}, "short_side is 2; expected at least a patch, 4 pixels"),
        ({"templates": "none"}, "templates is 'none'"),
        ({"model": "pacl_vit_l14"}, "of which no weights are published"),
        ({"image": np.zeros((2, 40000, 3), np.uint8)}, "the limit is 64000000|would have"),
    ],
)
def test_bad_input(model, options, message):
    arguments = {
        "image": np.zeros((8, 8, 3), np.uint8),
        "labels": ["grass"],
        "model": model,
        "short_side": None,
        **options,
    }
    if "image" in options and isinstance(options["image"], np.ndarray):
        arguments["short_side"] = 1000
    with pytest.raises((InputError, ValueError), match=message):
        ovseg.segment(**arguments)


def test_order_of_calls(model):
    with pytest.raises(InputError, match="no image is set"):
        ovseg.Predictor(model, LABELS).predict()
    with pytest.raises(InputError, match="no labels are set"):
        ovseg.Predictor(model).set_image(np.zeros((8, 8, 3), np.uint8)).predict()
