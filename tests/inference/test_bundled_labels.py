"""The bundled models label scenes as they did when their labels, scores, classification and
evaluation were stored.

``python tests/inference/test_bundled_labels.py NAME`` stores those of a model anew, after new
weights.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

import ovseg
from ovseg.data.scenes import Scenes
from ovseg.evaluation.evaluate import evaluate
from ovseg.evaluation.protocols import protocol
from ovseg.evaluation.scenes import SceneSet
from ovseg.systems import list_bundled

STORED = Path(__file__).parents[1] / "golden" / "bundled_labels.npz"
BUNDLED = [(name, tag) for name, tag in list_bundled() if tag == "digits"]  # trained on scenes
LABELS = {
    "seven": ["a red seven", "a blue seven"],
    "zero": ["a blue zero"],
    "gravel": ["gravel", "brick"],
    "grass": "grass",
    "water": "water",
}
CASES = {
    "patches": {
        "whole": {},
        "windows": {"crop": 24, "stride": 16},
        "bilinear": {"resize": "bilinear", "short_side": 64, "long_side": 100, "crop": 48},
        "softmax": {
            "crop": 32,
            "scale": 40.0,
            "activation": "softmax",
            "background": ("sand", "wood"),
            "background_threshold": 0.4,
            "area_threshold": 0.05,
        },
        "sigmoid": {
            "crop": 32,
            "activation": "sigmoid",
            "stage": "window",
            "bias": {"seven": -0.01},
            "synonyms": "mean",
            "templates": "simple",
            "text_mean": "raw",
        },
        "entropy": {"scale": 30.0, "background_entropy": 1.2},
        "refined": {"refine": "pamr", "background_threshold": 0.1},
    },
    "groups": {
        "whole": {},
        "windows": {"crop": 24, "stride": 16},
        "background": {
            "crop": 48,
            "stride": 24,
            "short_side": 64,
            "background_threshold": 0.3,
            "resize": "bilinear",
        },
        "few": {"scale": 20.0, "top_classes": 2, "bias": {"grass": -0.1}, "background": ("sand",)},
    },
    "masks": {
        "whole": {},
        "windows": {"crop": 24, "stride": 16},
        "background": {
            "crop": 48,
            "stride": 24,
            "short_side": 64,
            "background_threshold": 0.3,
            "resize": "bilinear",
            "bias": {"grass": -0.1},
        },
    },
    "units": {
        "whole": {},
        "windows": {"crop": 24, "stride": 16, "unit_weight": 0.5},
        "fixed": {
            "unit": "fixed",
            "units": 4,
            "scale": 30.0,
            "activation": "softmax",
            "background_threshold": 0.2,
        },
        "pixel": {"unit": "pixel", "background": ("sand",)},
    },
}


def pictures():
    scenes = [scene.image for scene in Scenes("digits", "val", 6)]
    mosaic = np.concatenate([np.concatenate(scenes[:3], 1), np.concatenate(scenes[3:], 1)])[
        :70, :101
    ]
    return {"scene": scenes[0], "mosaic": mosaic}


@pytest.fixture(scope="module")
def stored():
    return dict(np.load(STORED))


@pytest.mark.parametrize("name,tag", BUNDLED)
def test_labels_scores_and_classification(stored, name, tag):
    model = ovseg.create_model(name, tag)
    compared = 0
    for case, options in CASES[model.decision].items():
        predictor = ovseg.Predictor(model, LABELS, **options)
        for which, picture in pictures().items():
            found, key = predictor.set_image(picture).predict(), f"{name}/{case}/{which}"
            differing = int((found.labels != stored[f"{key}/labels"]).sum())
            assert differing <= found.labels.size // 5000, (
                f"{key}: {differing} of {found.labels.size} labels"
            )  # ties, on other processors
            assert found.scores.mean(dtype=np.float64) == pytest.approx(
                float(stored[f"{key}/score"]), rel=1e-4
            )
            of_label = predictor.classify()
            np.testing.assert_allclose(
                [of_label[label] for label in LABELS], stored[f"{key}/classify"], atol=1e-5
            )
            compared += 1
    assert compared == sum(key.endswith("/labels") and key.startswith(name) for key in stored)


@pytest.mark.parametrize(
    "data,present_only", [("digits", False), ("digits_things", False), ("digits", True)]
)
@pytest.mark.parametrize("name,tag", BUNDLED)
def test_evaluation(stored, name, tag, data, present_only):
    model, scenes = ovseg.create_model(name, tag), SceneSet(data, 8)
    report = evaluate(
        model, scenes, protocol("plain", scenes.description, model, present_only=present_only)
    )
    expected = stored[f"{name}/evaluate/{data}{' present' if present_only else ''}"]
    assert np.abs(report.scores.matrix - expected).sum() <= 2 * (expected.sum() // 5000)


def made(name: str, tag: str) -> dict[str, np.ndarray]:
    """What ``STORED`` holds of a model."""
    model, entries = ovseg.create_model(name, tag), {}
    for case, options in CASES[model.decision].items():
        predictor = ovseg.Predictor(model, LABELS, **options)
        for which, picture in pictures().items():
            found, key = predictor.set_image(picture).predict(), f"{name}/{case}/{which}"
            of_label = predictor.classify()
            entries |= {
                f"{key}/labels": found.labels.astype(np.int8),
                f"{key}/score": found.scores.mean(dtype=np.float64),
                f"{key}/classify": np.array([of_label[label] for label in LABELS]),
            }
    for data, present_only in [("digits", False), ("digits_things", False), ("digits", True)]:
        scenes = SceneSet(data, 8)
        report = evaluate(
            model, scenes, protocol("plain", scenes.description, model, present_only=present_only)
        )
        entries[f"{name}/evaluate/{data}{' present' if present_only else ''}"] = (
            report.scores.matrix
        )
    return entries


if __name__ == "__main__":
    chosen = {name: tag for name, tag in BUNDLED if name in sys.argv[1:]}
    kept = {key: value for key, value in np.load(STORED).items() if key.split("/")[0] not in chosen}
    np.savez_compressed(
        STORED,
        **kept,
        **{key: value for name, tag in chosen.items() for key, value in made(name, tag).items()},
    )
