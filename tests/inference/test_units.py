"""The rule of semantic units: merging held to average linkage written plainly, its ends, windows,
ties, counts, options.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import ovseg
from ovseg.data.scenes import Scenes
from ovseg.data.set_descriptions import describe
from ovseg.errors import InputError
from ovseg.evaluation.protocols import protocol
from ovseg.evaluation.scenes import UnitCounts, count_units
from ovseg.inference import Predictor
from ovseg.inference.rules import rule, rule_of
from ovseg.inference.rules.patches import PatchArgmax
from ovseg.inference.rules.units import SemanticUnits
from ovseg.nn.units import merge, unit_tokens

LABELS = ["a red seven", "gravel", "a blue one", "grass"]


def plainly(x, grid, theta):
    """One picture [N, D]: each round every two touching units that are each other's best link, (1)
    as a mean over pairs of pixels.
    """
    cosines = F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).T
    units = {i: [i] for i in range(len(x))}
    row, column = np.divmod(np.arange(len(x)), grid[1])
    touching = np.abs(row[:, None] - row) + np.abs(column[:, None] - column) == 1

    def link(a, b):
        pairs = np.ix_(units[a], units[b])
        return float(cosines[units[a]][:, units[b]].mean()) if touching[pairs].any() else -np.inf

    while True:
        best = {}
        for a in units:
            links = {b: value for b in units if b != a and (value := link(a, b)) >= theta}
            if links:
                best[a] = min(links, key=lambda b: (-round(links[b], 9), b))
        pairs = [(a, b) for a, b in best.items() if a < b and best.get(b) == a]
        if not pairs:
            labels = torch.empty(len(x), dtype=torch.int64)
            for first, members in units.items():
                labels[members] = first
            return labels
        for a, b in pairs:
            units[a] = units[a] + units.pop(b)


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 4), (6, 6)], ids=str)
@pytest.mark.parametrize("theta", [-1.0, 0.3, 0.7, 1.0])
def test_merging_is_average_linkage_of_what_touches(grid, theta):
    g = torch.Generator().manual_seed(grid[1])
    x = torch.randn(2, grid[0] * grid[1], 3, generator=g, dtype=torch.float64) + 0.5
    found = merge(x, grid, theta)
    for one, labels in zip(x, found, strict=True):
        assert torch.equal(labels, plainly(one, grid, theta))
    if theta == -1.0:
        assert not found.any()
    if theta == 1.0:
        assert torch.equal(found[0], torch.arange(grid[0] * grid[1]))


def test_two_halves_are_two_units_and_ties_go_to_the_first():
    x = torch.zeros(1, 4, 6, 2)
    x[:, :, :3, 0], x[:, :, 3:, 1] = 1.0, 2.0
    labels = merge(x.flatten(1, 2), (4, 6), 0.9).view(4, 6)
    assert labels[:, :3].eq(0).all() and labels[:, 3:].eq(3).all()
    tokens = unit_tokens(x.flatten(1, 2), labels.view(1, -1))
    torch.testing.assert_close(tokens, F.normalize(x.flatten(1, 2), dim=-1))


def test_the_limit_is_a_quantile_of_each_picture():
    x = torch.randn(3, 64, 5, generator=torch.Generator().manual_seed(1)) + 1
    counts = [
        [len(labels.unique()) for labels in merge(x, (8, 8), quantile=q)]
        for q in (0.0, 0.3, 0.6, 0.9, 1.0)
    ]
    assert all(a <= b for low, high in pairwise(counts) for a, b in zip(low, high, strict=True))
    assert max(counts[0]) < min(counts[-1]) and torch.equal(
        merge(x, (8, 8))[1], merge(x[1:2], (8, 8))[0]
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ovseg.create_model("mgca_tiny", clip="clip_dense_tiny:digits")


def picture(side=60):
    return np.random.default_rng(0).integers(0, 255, (side, side + 20, 3), dtype=np.uint8)


def test_the_ends_are_patches_and_one_group(model):
    def answer(**options):
        found = Predictor(model, LABELS, **options).set_image(picture()).predict()
        return found.labels, found.scores

    patches = Predictor(model, LABELS, decision=rule("patches")()).set_image(picture()).predict()
    for options in (
        {"unit": "pixel"},
        {"unit_weight": 0.0},
        {"merge_at": 1.0},
        {"unit": "fixed", "unit_weight": 0.0},
    ):
        labels, scores = answer(**options)
        assert np.array_equal(labels, patches.labels), options
        np.testing.assert_allclose(scores, patches.scores, atol=1e-5)
    assert len(np.unique(answer(merge_at=-1.0, unit_weight=1.0)[0])) == 1
    assert len(np.unique(answer(unit="fixed", units=1, unit_weight=1.0)[0])) == 1
    assert not np.array_equal(answer()[0], patches.labels)


def test_windows_are_units_of_their_own(model):
    """The features of each window are merged by themselves: those of a batch are those of one
    window alone.
    """
    predictor = Predictor(model, LABELS, short_side=96, crop=48, stride=24)
    seen = predictor.see([picture()])[0]
    features, decision = seen.features, predictor.decision
    texts = model.encode_labels(LABELS)
    whole = decision.cosines(model, features, texts)
    assert len(whole) > 4
    torch.testing.assert_close(
        whole[2:3], decision.cosines(model, features.select(slice(2, 3)), texts)
    )
    assert predictor.set_image(seen).predict().labels.shape == (60, 80)


def test_scores_are_a_mixture(model):
    features = Predictor(model).see([picture()])[0].features
    texts = model.encode_labels(LABELS)
    pure = [
        SemanticUnits(unit_weight=w, merge_at=0.5).cosines(model, features, texts)
        for w in (0.0, 1.0, 0.25)
    ]
    torch.testing.assert_close(pure[2], 0.75 * pure[0] + 0.25 * pure[1])
    units = SemanticUnits(merge_at=0.5).labels(features)[0]
    for unit in units.unique():  # one answer a unit
        rows = pure[1].flatten(2)[0][:, units == unit]
        torch.testing.assert_close(rows, rows[:, :1].expand_as(rows))


def test_any_model_of_patches_can_be_labelled_by_units():
    pacl = ovseg.from_pretrained("pacl_tiny:digits")
    found = (
        Predictor(pacl, LABELS, decision=SemanticUnits(), background_threshold=0.2)
        .set_image(picture())
        .predict()
    )
    assert found.labels.shape == (60, 80)
    assert "adaptive, merged at quantile 0.05" in SemanticUnits().describe()["units"]
    assert "8 fixed" in SemanticUnits(unit="fixed").describe()["units"]


def test_a_pacl_that_states_units_is_labelled_by_them(tmp_path):
    plain = ovseg.from_pretrained("pacl_tiny:digits")
    model = ovseg.from_pretrained("pacl_tiny:digits", units=3)
    three = SemanticUnits(unit="fixed", units=3)
    assert (rule_of(plain), rule_of(model)) == (PatchArgmax(), three)
    assert Predictor(model).decision == three
    assert Predictor(model, unit_weight=1.0).decision.unit_weight == 1.0
    found = Predictor(model, LABELS).set_image(picture()).predict()
    same = Predictor(plain, LABELS, decision=three).set_image(picture()).predict()
    patches = Predictor(plain, LABELS).set_image(picture()).predict()
    assert np.array_equal(found.labels, same.labels)
    assert not np.array_equal(found.labels, patches.labels)
    again = ovseg.from_pretrained(ovseg.save_pretrained(model, tmp_path / "saved"))
    assert rule_of(again) == three
    assert protocol("plain", describe("voc14"), again).decision == three


def test_counts_of_units():
    truth = np.zeros((4, 4), int)
    truth[:, 2:] = 1
    counts = UnitCounts()
    counts.update(truth, truth)
    assert counts.summary() == {
        "units": 2.0,
        "units_per_region": 1.0,
        "impure_pixels": 0.0,
        "lost_regions": 0.0,
    }
    counts = UnitCounts()
    counts.update(np.arange(16).reshape(4, 4), truth)  # each pixel alone
    assert counts.summary() == {
        "units": 16.0,
        "units_per_region": 8.0,
        "impure_pixels": 0.0,
        "lost_regions": 0.0,
    }
    counts = UnitCounts()
    counts.update(np.zeros((4, 4), int), truth)  # one for all
    assert counts.summary() == {
        "units": 1.0,
        "units_per_region": 0.5,
        "impure_pixels": 50.0,
        "lost_regions": 50.0,
    }
    truth[0] = -1  # not counted
    counts = UnitCounts()
    counts.update(np.zeros((4, 4), int), truth)
    assert counts.pixels == 12
    counts.update(truth, np.full((4, 4), -1))
    assert counts.pictures == 1
    with pytest.raises(InputError, match="units has shape"):
        counts.update(truth[:2], truth)


def test_counts_on_scenes(model):
    scenes = Scenes("digits", "val", 4)
    kinds = {
        "pixel": SemanticUnits(unit="pixel"),
        "one": SemanticUnits(merge_at=-1.0),
        "adaptive": SemanticUnits(),
    }
    found = {name: count_units(model, scenes, kind).summary() for name, kind in kinds.items()}
    assert found["pixel"]["units"] == 144 and found["one"]["units"] == 1
    assert (
        found["one"]["impure_pixels"]
        > found["adaptive"]["impure_pixels"]
        >= found["pixel"]["impure_pixels"]
    )
    assert (
        found["one"]["units_per_region"]
        < found["adaptive"]["units_per_region"]
        < found["pixel"]["units_per_region"]
    )


@pytest.mark.bad_input("inference", "an option of units that means nothing")
@pytest.mark.parametrize(
    "options,message",
    [
        ({"unit": "group"}, "unit is 'group'; expected one of"),
        ({"merge_at": 2.0}, r"merge_at is 2\.0; expected a cosine"),
        ({"merge_quantile": -0.1}, "merge_quantile is"),
        ({"unit_weight": 1.5}, r"unit_weight is 1\.5; expected a share"),
        ({"units": 0}, "units is 0; expected a positive integer"),
        ({"unit": "fixed", "units": None}, "units is missing"),
        ({"merge_at": float("nan")}, "merge_at is nan"),
    ],
)
def test_options_that_mean_nothing(model, options, message):
    with pytest.raises(InputError, match=message):
        Predictor(model, **options)
