"""mIoU: a 4x4 example by hand, torchmetrics as an oracle, absent classes, ignored pixels, labels out of range."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_jaccard_index

import ovseg
from ovseg.data.scenes import Scenes
from ovseg.errors import InputError
from ovseg.evaluation.metrics import ConfusionMatrix, harmonic_mean
from ovseg.evaluation.scenes import evaluate_scenes, gallery, scene_table


def test_by_hand():
    truth = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 255, 255], [0, 0, 0, 0]])
    guess = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    matrix = ConfusionMatrix(["a", "b", "absent"])
    matrix.update(guess, truth)
    scores = matrix.scores()
    assert scores.matrix.tolist() == [[9, 1, 0], [1, 3, 0], [0, 0, 0]]
    assert scores.iou[:2] == pytest.approx([100 * 9 / 11, 100 * 3 / 5]) and np.isnan(scores.iou[2])
    assert scores.miou == pytest.approx(100 * (9 / 11 + 3 / 5) / 2)
    assert scores.miou_of(["b"]) == pytest.approx(60) and np.isnan(scores.miou_of(["absent"]))
    assert scores.pixel_accuracy == pytest.approx(100 * 12 / 14)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 9), parts=st.integers(1, 4))
def test_against_torchmetrics(seed, classes, parts):
    rng = np.random.default_rng(seed)
    truth, guess = rng.integers(0, classes, (2, 40, 12))
    truth[rng.random(truth.shape) < 0.1] = 255
    matrix = ConfusionMatrix([str(i) for i in range(classes)])
    for t, g in zip(np.array_split(truth, parts), np.array_split(guess, parts), strict=True):
        matrix.update(g, t)
    expected = multiclass_jaccard_index(torch.from_numpy(guess), torch.from_numpy(truth), classes, average="none", ignore_index=255)
    np.testing.assert_allclose(np.nan_to_num(matrix.scores().iou), 100 * expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("guess,truth,message", [
    ([[0, 3]], [[0, 1]], "prediction holds label 3 on 1 pixels; expected 0 to 2"),
    ([[0, -1]], [[0, 1]], "prediction holds label -1"),
    ([[0, 1]], [[0, 9]], "truth holds label 9 on 1 pixels; expected 0 to 2 or 255"),
    ([[0, 1]], [[0]], r"prediction has shape \[1, 2\] and truth \[1, 1\]"),
])
def test_bad_labels(guess, truth, message):
    with pytest.raises(InputError, match=message):
        ConfusionMatrix("abc").update(np.array(guess), np.array(truth))


def test_everything_ignored_and_harmonic_mean():
    matrix = ConfusionMatrix("ab")
    matrix.update(np.zeros((2, 2), int), np.full((2, 2), 255))
    assert np.isnan(matrix.scores().miou)
    assert harmonic_mean(30, 60) == pytest.approx(40) and harmonic_mean(0, 0) == 0


def test_a_perfect_model_scores_a_hundred():
    """Evaluation with a model that reads the mask: the protocol itself loses nothing but the resolution."""
    scenes = Scenes("shapes", "val", 12)
    model = ovseg.create_model("pacl_tiny")
    masks = {scene.image.tobytes(): torch.from_numpy(scene.mask).long() for scene in scenes}
    classes = len(scenes.vocabulary.classes)

    def encode(images):
        pixels = ((images * 0.25 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        masks_ = torch.stack([masks[np.ascontiguousarray(p).tobytes()] for p in pixels])
        return ovseg.models.ImageFeatures(torch.zeros(len(images), 64), masks_, (48, 48))

    model.encode_image = encode
    model.similarity = lambda features, texts: torch.stack([torch.bincount(m.flatten(), minlength=classes)[: len(texts)].float()
                                                            for m in features.tokens])
    model.segment_logits = lambda features, texts: torch.nn.functional.one_hot(features.tokens, classes).permute(0, 3, 1, 2).float()
    report = evaluate_scenes(model, scenes, keep=2)
    assert report.summary["miou"] == 100 and report.summary["classification"] == 100
    assert "| 100 |" in scene_table([report.summary])
    sheet = gallery({"perfect": report}, 2)
    assert sheet.width > 200 and sheet.height > 300
