"""mIoU: a 4x4 example by hand, torchmetrics as an oracle, absent classes, ignored pixels, labels
out of range.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_jaccard_index

import ovseg
from ovseg.data.scenes import Scenes
from ovseg.errors import InputError
from ovseg.evaluation.metrics import (
    BoundaryCounts,
    ConfusionMatrix,
    ThresholdSweep,
    contour_band,
    harmonic_mean,
)
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
    expected = multiclass_jaccard_index(
        torch.from_numpy(guess), torch.from_numpy(truth), classes, average="none", ignore_index=255
    )
    np.testing.assert_allclose(
        np.nan_to_num(matrix.scores().iou), 100 * expected.numpy(), atol=1e-4
    )


@pytest.mark.parametrize(
    "guess,truth,message",
    [
        ([[0, 3]], [[0, 1]], "prediction holds label 3 on 1 pixels; expected 0 to 2"),
        ([[0, -1]], [[0, 1]], "prediction holds label -1"),
        ([[0, 1]], [[0, 9]], "truth holds label 9 on 1 pixels; expected 0 to 2 or 255"),
        ([[0, 1]], [[0]], r"prediction has shape \[1, 2\] and truth \[1, 1\]"),
    ],
)
@pytest.mark.bad_input("evaluation", "labels out of range")
def test_bad_labels(guess, truth, message):
    with pytest.raises(InputError, match=message):
        ConfusionMatrix("abc").update(np.array(guess), np.array(truth))


def test_everything_ignored_and_harmonic_mean():
    matrix = ConfusionMatrix("ab")
    matrix.update(np.zeros((2, 2), int), np.full((2, 2), 255))
    assert np.isnan(matrix.scores().miou)
    assert (
        harmonic_mean(30, 60) == pytest.approx(40)
        and harmonic_mean(0, 0) == 0
        and math.isnan(harmonic_mean(30, math.nan))
    )


def test_a_perfect_model_scores_a_hundred():
    """Evaluation with a model that reads the mask: the protocol itself loses nothing but the
    resolution.
    """
    scenes = Scenes("shapes", "val", 12)
    model = ovseg.create_model("pacl_tiny")
    masks = {scene.image.tobytes(): torch.from_numpy(scene.mask).long() for scene in scenes}
    classes = len(scenes.vocabulary.classes)

    def encode(images):
        pixels = ((images * 0.25 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        masks_ = torch.stack([masks[np.ascontiguousarray(p).tobytes()] for p in pixels])
        return ovseg.systems.PatchFeatures(torch.zeros(len(images), 64), masks_, (48, 48))

    model.encode_image = encode
    model.similarity = lambda features, texts: torch.stack(
        [
            torch.bincount(m.flatten(), minlength=classes)[: len(texts)].float()
            for m in features.tokens
        ]
    )
    model.segment_logits = lambda features, texts: (
        torch.nn.functional.one_hot(features.tokens, classes).permute(0, 3, 1, 2).float()
    )
    report = evaluate_scenes(model, scenes, keep=2)
    assert report.summary["miou"] == 100 and report.summary["classification"] == 100
    assert "| 100 |" in scene_table([report.summary])
    sheet = gallery({"perfect": report}, 2)
    assert sheet.width > 200 and sheet.height > 300


def test_no_label_is_wrong_everywhere():
    matrix = ConfusionMatrix("ab", none=True)
    matrix.update(np.array([[0, -1], [1, 1]]), np.array([[0, 0], [1, 0]]))
    scores = matrix.scores()
    assert scores.matrix.tolist() == [[1, 1, 1], [0, 1, 0]]
    assert scores.iou == pytest.approx([100 / 3, 50]) and scores.pixel_accuracy == pytest.approx(50)
    assert scores.accuracy == pytest.approx(
        [100 / 3, 100]
    ) and scores.mean_accuracy == pytest.approx((100 / 3 + 100) / 2)


def eroded(mask, times):
    """3 x 3 erosions with nothing outside, written out."""
    for _ in range(times):
        padded = np.pad(mask, 1)
        mask = np.logical_and.reduce(
            [
                padded[y : y + mask.shape[0], x : x + mask.shape[1]]
                for y in range(3)
                for x in range(3)
            ]
        )
    return mask


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(1, 4), share=st.sampled_from([0.02, 0.06]))
def test_boundary_iou_is_that_of_eroded_masks(seed, classes, share):
    """Class by class: a mask less its erosion is its band; pixels that are not counted belong to no
    class.
    """
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, classes, (2, 6, 5))
    truth, guess = coarse.repeat(8, 1).repeat(8, 2)
    truth = truth.copy()
    truth[rng.random(truth.shape) < 0.02] = 255
    counts = BoundaryCounts("abcd"[:classes], share=share)
    counts.update(guess, truth)
    distance = max(1, round(share * np.hypot(*truth.shape)))
    for c in range(classes):
        t, g = truth == c, guess == c
        t, g = t & ~eroded(t, distance), g & ~eroded(g, distance) & (truth != 255)
        union = (t | g).sum()
        assert (
            counts.iou()[c] == pytest.approx(100 * (t & g).sum() / union)
            if union
            else np.isnan(counts.iou()[c])
        )


def test_boundary_by_hand():
    labels = np.zeros((9, 9), int)
    labels[3:6, 3:6] = 1
    band = contour_band(labels, 1)
    expected = np.zeros((9, 9), bool)
    expected[[0, -1]] = expected[:, [0, -1]] = True  # the end of the picture
    expected[2:7, 2:7] = True
    expected[4, 4] = False  # the middle of the square
    assert np.array_equal(band, expected)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 5))
def test_sweep_against_one_threshold_at_a_time(seed, classes):
    rng = np.random.default_rng(seed)
    thresholds = np.array([0.0, 0.25, 0.5, 1.0])
    truth, guess = rng.integers(0, classes, (2, 10, 10))
    truth[0] = 255
    scores = rng.choice([0.0, 0.25, 0.3, 0.5, 0.9, 1.0], (10, 10)).astype(
        np.float32
    )  # some of them at a threshold
    sweep = ThresholdSweep("abcde"[:classes], thresholds)
    sweep.update(guess[:5], scores[:5], truth[:5])
    sweep.update(guess[5:], scores[5:], truth[5:])
    for threshold, miou in zip(thresholds, sweep.curve(), strict=True):
        matrix = ConfusionMatrix("abcde"[:classes])
        matrix.update(np.where(scores < threshold, 0, guess), truth)
        assert miou == pytest.approx(matrix.scores().miou, nan_ok=True)
    with pytest.raises(InputError, match="expected increasing numbers"):
        ThresholdSweep("ab", np.array([0.5, 0.1]))
