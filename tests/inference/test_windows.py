"""Sliding windows: where they lie, one encoding of many, the label map of the published procedure."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import ovseg
from ovseg.cli.main import main
from ovseg.errors import InputError
from ovseg.inference.view import window_origins

LABELS = ["a red seven", "a blue zero", "gravel", "grass"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ovseg.create_model("pacl_tiny")


def picture(height, width):
    return Image.fromarray(np.random.default_rng(1).integers(0, 255, (height, width, 3), np.uint8))


def test_origins_as_mmsegmentation_cuts_them():
    assert window_origins((512, 683), (512, 512), (426, 426)).tolist() == [
        [0, 0],
        [0, 171],
    ]  # ZegCLIP's 4:3 picture
    assert window_origins((448, 597), (448, 448), (224, 224)).tolist() == [[0, 0], [0, 149]]
    assert window_origins((5, 9), (5, 4), (5, 2)).tolist() == [[0, 0], [0, 2], [0, 4], [0, 5]]
    assert window_origins((4, 4), (4, 4), (1, 1)).tolist() == [[0, 0]]
    for bad in (((3, 9), (5, 4), (2, 2)), ((9, 9), (4, 4), (5, 4)), ((9, 9), (4, 4), (0, 4))):
        with pytest.raises(ValueError, match="expected stride <= crop <= canvas"):
            window_origins(*bad)


@pytest.mark.parametrize("size", [(48, 48), (60, 101), (131, 50)])
@pytest.mark.parametrize("crop,stride", [(24, None), (32, 20), (48, 48)])
def test_labels_are_those_of_the_published_procedure(model, size, crop, stride):
    """Windows one by one, maps at full size, sum over count, resize, argmax."""
    image = picture(*size)
    predictor = ovseg.Predictor(model, LABELS, crop=crop, stride=stride, window_batch=3).set_image(
        image
    )
    found = predictor.predict()
    factor = 48 / min(size)
    canvas = [round(side * factor) for side in size]
    small = image if canvas == list(size) else image.resize(canvas[::-1], Image.Resampling.BICUBIC)
    pixels = model.normalize(
        torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)[None] / 255
    )
    texts, total, count = model.encode_labels(LABELS), torch.zeros(4, *canvas), torch.zeros(canvas)
    step = stride or crop // 2
    with torch.no_grad():
        for y, x in window_origins(canvas, (crop, crop), (step, step)).tolist():
            features = model.encode_image(pixels[..., y : y + crop, x : x + crop])
            total[:, y : y + crop, x : x + crop] += F.interpolate(
                model.segment_logits(features, texts), (crop, crop), mode="bilinear"
            )[0]
            count[y : y + crop, x : x + crop] += 1
    maps = F.interpolate((total / count)[None], size, mode="bilinear")[0]
    best = maps.topk(2, 0).values
    sure = (best[0] - best[1] > 1e-5).numpy()
    assert np.array_equal(found.labels[sure], maps.argmax(0).numpy()[sure]) and sure.mean() > 0.99
    np.testing.assert_allclose(found.scores, best[0].numpy(), atol=1e-5)


def test_windows_are_encoded_in_batches_once(model, monkeypatch):
    sizes = []
    real = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda x: sizes.append(len(x)) or real(x))
    predictor = ovseg.Predictor(model, LABELS, crop=24, window_batch=4).set_image(picture(48, 96))
    predictor.predict()
    predictor.predict(LABELS[:2])
    assert sum(sizes) == 3 * 7 and max(sizes) == 4 and len(sizes) == 6


def test_window_of_the_whole_picture_and_classify(model):
    image = picture(48, 48)
    whole, one = (
        ovseg.Predictor(model, LABELS).set_image(image),
        ovseg.Predictor(model, LABELS, crop=48).set_image(image),
    )
    assert np.array_equal(whole.predict().labels, one.predict().labels)
    assert whole.classify() == pytest.approx(one.classify())
    assert set(ovseg.Predictor(model, LABELS, crop=24).set_image(image).classify()) == set(LABELS)


def test_background(model):
    everything = ovseg.segment(picture(50, 70), LABELS, model=model, crop=24)
    threshold = float(np.median(everything.scores))
    some = ovseg.segment(
        picture(50, 70), LABELS, model=model, crop=24, background_threshold=threshold
    )
    assert np.array_equal(some.labels == -1, everything.scores < threshold)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"crop": 25}, "crop is 25; expected a multiple of the patch"),
        (
            {"crop": 96},
            "crop is 96; expected a multiple of the patch, . pixels, up to the short side, 48",
        ),
        ({"stride": 8}, "stride is 8 and crop is missing"),
        ({"crop": 24, "stride": 25}, "stride is 25; expected 1 to the crop, 24"),
        ({"crop": 24, "stride": 0}, "stride is 0; expected a positive integer"),
        ({"crop": 24, "window_batch": 0}, "window_batch is 0; expected a positive integer"),
    ],
)
@pytest.mark.bad_input("inference", "windows that cannot be")
def test_refused(model, options, message):
    with pytest.raises(InputError, match=message):
        ovseg.Predictor(model, LABELS, **options)


def test_command(tmp_path):
    picture(60, 90).save(tmp_path / "a.png")
    out = str(tmp_path / "out")
    command = [
        "segment",
        "-m",
        "pacl_tiny",
        str(tmp_path / "a.png"),
        "--labels",
        "gravel,grass",
        "--format",
        "json,overlay",
        "-o",
        out,
    ]
    assert main([*command, "--crop", "24", "--stride", "12"]) == 0
    found = json.loads((tmp_path / "out" / "a.json").read_text())
    assert sum(row["area"] for row in found["labels"]) == pytest.approx(1, abs=1e-5)
    assert (tmp_path / "out" / "a.overlay.png").exists()
