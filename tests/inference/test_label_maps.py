"""Every choice of the two rules against whole maps: synonyms, activations, backgrounds, area
threshold, bias, groups, PAMR.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import ovseg
from ovseg.data.labels import LabelSet
from ovseg.data.scenes import Scenes
from ovseg.errors import InputError
from ovseg.inference import View
from ovseg.inference.flat_options import route
from ovseg.inference.queries import EncodedQueries, Queries
from ovseg.inference.rules.groups import GroupTables, group_tables
from ovseg.inference.rules.patches import PatchArgmax, pamr
from ovseg.inference.view import Placement, place, window_origins
from ovseg.systems import GroupFeatures

LABELS = {
    "seven": ["a red seven", "a blue seven"],
    "zero": ["a blue zero"],
    "gravel": ["gravel", "brick"],
}


@pytest.fixture(scope="module")
def model():
    return ovseg.create_model("pacl_tiny", "digits")


@pytest.fixture(scope="module")
def picture():
    scenes = [scene.image for scene in Scenes("digits", "val", 6)]
    return Image.fromarray(
        np.concatenate([np.concatenate(scenes[:3], 1), np.concatenate(scenes[3:], 1)])[:60, :90]
    )


def whole_maps(logits_of, picture, view, decision):
    """[T, H, W] by the published procedure: every window at full size, summed, divided, resized;
    activation at its stage.

    ``logits_of`` gives [1, T, h, w] of pixels in 0..1.
    """
    placement = place((picture.height, picture.width), view, patch=4, trained=48)
    small = picture.resize(placement.canvas[::-1], Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)[None] / 255
    act = {None: lambda x: x, "sigmoid": torch.sigmoid, "softmax": lambda x: x.softmax(-3)}[
        decision.activation
    ]
    origins, crop, canvas, size = placement.windows
    total, count = 0, torch.zeros(canvas)
    for y, x in origins.tolist():
        seen = (
            pixels if placement.origins is None else pixels[..., y : y + crop[0], x : x + crop[1]]
        )
        maps = F.interpolate(logits_of(seen) * (decision.scale or 1), crop, mode="bilinear")[0]
        maps = act(maps) if decision.stage == "window" else maps
        total = total + F.pad(maps, (x, canvas[1] - x - crop[1], y, canvas[0] - y - crop[0]))
        count[y : y + crop[0], x : x + crop[1]] += 1
    merged = total / count
    merged = act(merged) if decision.stage == "merged" else merged
    maps = F.interpolate(merged[None], size, mode="bilinear")[0]
    return act(maps) if decision.stage == "output" else maps


CASES = [
    {},
    {"crop": 32, "stride": 20},
    {"crop": 32, "scale": 40.0, "activation": "softmax"},
    {
        "crop": 32,
        "scale": 40.0,
        "activation": "softmax",
        "stage": "window",
        "background_threshold": 0.4,
    },
    {
        "scale": 40.0,
        "activation": "softmax",
        "background": ("grass", "a green one"),
        "background_threshold": 0.3,
    },
    {"activation": "sigmoid", "stage": "window", "crop": 32, "bias": {"zero": -0.01}},
    {"crop": 32, "background_threshold": 0.0, "bias": {"gravel": -0.05}},
    {"scale": 60.0, "activation": "softmax", "area_threshold": 0.2, "background": ("grass",)},
    {"crop": 32, "scale": 30.0, "background_entropy": 0.8},
    {"synonyms": "mean", "background": ("grass",)},
]


@pytest.mark.parametrize("options", CASES, ids=[" ".join(case) or "plain" for case in CASES])
@torch.no_grad()
def test_labels_are_those_of_whole_maps(model, picture, options):
    view, queries, decision = route(options, View(), Queries(LabelSet.of(LABELS)), PatchArgmax())
    found = (
        ovseg.Predictor(model, queries, view=view, decision=decision).set_image(picture).predict()
    )
    groups = [*LABELS.values(), *([list(queries.background)] if queries.background else [])]
    unit = model.encode_labels([text for group in groups for text in group])
    owner = torch.tensor([i for i, group in enumerate(groups) for _ in group])
    if queries.synonyms == "mean":
        texts = torch.cat(
            [F.normalize(unit[owner == i].mean(0), dim=0)[None] for i in range(3)]
            + [unit[owner == 3]]
        )
        owner = torch.tensor([0, 1, 2] + [3] * len(queries.background))
    else:
        texts = unit

    def cosines(pixels):
        return model.segment_logits(model(model.normalize(pixels)), texts)

    maps = whole_maps(cosines, picture, view, decision)
    for i, name in enumerate(LABELS):
        maps[owner == i] += (decision.bias or {}).get(name, 0.0)
    labels = owner[maps.argmax(0)]
    if decision.area_threshold:
        area = torch.bincount(labels[labels < 3].flatten(), minlength=3)
        kept = area > decision.area_threshold * area.sum()
        assert 0 < int(kept.sum()) < 3, "the case does not test what it should"
        for i in range(3):
            maps[owner == i] += 0.0 if kept[i] else -1e4
        labels = owner[maps.argmax(0)]
    labels = torch.where(labels == 3, -1, labels)
    top, sure = maps.max(0).values, maps.topk(2, 0).values.diff(dim=0)[0] < -1e-5
    if decision.background_threshold is not None:
        sure &= (top - decision.background_threshold).abs() > 1e-5
        labels = labels.masked_fill(top < decision.background_threshold, -1)
    if decision.background_entropy is not None:

        def entropy(pixels):
            p = (cosines(pixels) * decision.scale).softmax(1)
            return -(p * p.log()).sum(1, keepdim=True)

        level = whole_maps(entropy, picture, view, PatchArgmax())[0]
        sure &= (level - decision.background_entropy).abs() > 1e-4
        labels = labels.masked_fill(level > decision.background_entropy, -1)
    assert float(sure.float().mean()) > 0.9
    assert np.array_equal(found.labels[sure.numpy()], labels.numpy()[sure.numpy()])
    background = (
        queries.background
        or decision.background_threshold is not None
        or decision.background_entropy is not None
    )
    assert bool((found.labels == -1).any()) == bool((labels == -1).any()) and (
        bool((labels == -1).any()) or not background
    )
    np.testing.assert_allclose(found.scores[sure.numpy()], top.numpy()[sure.numpy()], atol=1e-4)


@pytest.mark.parametrize(
    "options,message",
    [
        (
            {"activation": "softmax"},
            "scale is missing: softmax over plain cosines is nearly uniform",
        ),
        ({"background_entropy": 1.0}, "scale is missing"),
        ({"activation": "tanh"}, "activation is 'tanh'; expected one of"),
        ({"background": 0.3}, "A number is background_threshold"),
        ({"background": [" "]}, "expected texts that are not blank"),
        (
            {"background_threshold": -0.1, "activation": "sigmoid"},
            "expected what sigmoid gives, 0 .. 1",
        ),
        ({"background_threshold": 50.0, "scale": 40.0}, "expected a cosine times 40"),
        ({"area_threshold": 1.0}, "expected a share"),
        ({"bias": {"cat": 1.0}}, "bias names 'cat'; expected some of the labels"),
        ({"short_sid": 3}, "unknown option 'short_sid'; did you mean 'short_side'"),
        ({"crop": 0}, "crop is 0; expected a positive integer"),
        ({"stride": 8}, "stride is 8 and crop is missing"),
        ({"refine": "crf"}, "refine is 'crf'"),
        ({"scale": float("nan")}, "scale is nan"),
    ],
)
@pytest.mark.bad_input("inference", "settings that cannot go together")
def test_settings_that_cannot_be(model, picture, options, message):
    with pytest.raises(InputError, match=message):
        ovseg.Predictor(model, LABELS, **options).set_image(picture).predict()


def test_long_side_and_rounding():
    def canvas(size, **options):
        return place(size, View(**options), patch=16, trained=224).canvas

    assert canvas((300, 1500), short_side=448, long_side=2048, crop=224) == (410, 2048)
    assert canvas((480, 640), short_side=512, crop=512, stride=426) == (512, 683)
    assert canvas((480, 640)) == (224, 304)  # whole patches
    # Where the cap makes the picture smaller than a window, the windows are as small and the
    # picture keeps its shape.
    assert canvas((300, 1500), short_side=448, long_side=560, crop=448) == (112, 560)
    assert canvas((10, 1000), short_side=448, long_side=2048, crop=448) == (16, 2048)


@torch.no_grad()
def test_group_tables_by_hand():
    torch.manual_seed(0)
    groups, embedding, texts = (
        torch.randn(2, 3, 8),
        torch.randn(2, 8),
        F.normalize(torch.randn(6, 8), dim=-1),
    )
    nothing = torch.zeros(2, 4, 8)
    features = GroupFeatures(embedding, nothing, (2, 2), groups, nothing, nothing)
    table = group_tables(features, texts, 10.0, 2, 0.2)
    assert table.shape == (2, 3, 7)
    for n in range(2):
        full = (10 * F.normalize(groups[n], dim=-1) @ texts.T).softmax(-1)
        top = (texts @ embedding[n]).topk(2).indices
        some = torch.zeros(3, 6)
        some[:, top] = (10 * F.normalize(groups[n], dim=-1) @ texts[top].T).softmax(-1)
        torch.testing.assert_close(table[n, :, 1:], full * some)
        limit = min(0.2, float((full * some).max()))
        assert table[n, :, 0].tolist() == [float(float(row.max()) < limit) for row in full * some]
    assert group_tables(features, texts, 10.0, 99, None).shape == (2, 3, 6)


@torch.no_grad()
def test_grouping_systems_label_groups():
    """Two windows whose groups own half of each; the label of a group is the class of its table."""
    torch.manual_seed(1)
    model = ovseg.create_model("pacl_tiny")
    texts = F.normalize(torch.randn(2, 8), dim=-1)
    queries = EncodedQueries(("cat", "dog"), texts, torch.tensor([0, 1]))
    soft = torch.zeros(2, 2, 4, 4)
    soft[:, 0, :2], soft[:, 1, 2:] = 1, 1
    groups, index = torch.stack([texts, texts]), soft.flatten(2).argmax(1)
    features = GroupFeatures(
        texts.sum(0).expand(2, 8), torch.zeros(2, 16, 8), (4, 4), groups, index, soft.flatten(2)
    )
    placement = Placement(
        (16, 32), (16, 32), (16, 16), window_origins((16, 32), (16, 16), (16, 16))
    )
    found, _ = GroupTables(scale=20.0).label_map(model, features, queries, placement)
    assert found[:8].unique().tolist() == [0] and found[8:].unique().tolist() == [1]
    found, _ = GroupTables(scale=20.0).label_map(
        model, features, queries, placement, allowed=torch.tensor([False, True])
    )
    assert found.unique().tolist() == [1]
    with pytest.raises(InputError, match="features of pacl_tiny hold no groups"):
        GroupTables().label_map(
            model,
            model(torch.zeros(1, 3, 48, 48)),
            queries,
            Placement((48, 48), (48, 48), (48, 48), None),
        )


def test_pamr_by_hand():
    """One iteration, dilation 1, at an inner pixel, as the formula says."""
    torch.manual_seed(0)
    image, maps = torch.rand(3, 5, 6), torch.rand(2, 5, 6)
    y, x = 2, 3
    square = image[:, y - 1 : y + 2, x - 1 : x + 2].reshape(3, 9)
    sigma = square.std(1)
    around = [i for i in range(9) if i != 4]
    k = torch.stack(
        [-((square[:, 4] - square[:, i]).abs() / (1e-8 + 0.1 * sigma)).mean() for i in around]
    )
    expected = maps[:, y - 1 : y + 2, x - 1 : x + 2].reshape(2, 9)[:, around] @ k.softmax(0)
    torch.testing.assert_close(pamr(image, maps, iterations=1, dilations=(1,))[:, y, x], expected)


def test_pamr_follows_edges():
    """A map that is half a region too wide shrinks to the region's edge, and constants stay
    constant.
    """
    image = torch.zeros(3, 24, 24)
    image[:, :, 12:] = 1
    maps = torch.zeros(1, 24, 24)
    maps[:, :, :15] = 1
    refined = pamr(
        image + 0.01 * torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0)), maps
    )[0]
    assert float(refined[:, 13:15].mean()) < 0.4 < 0.6 < float(refined[:, 8:11].mean())
    torch.testing.assert_close(
        pamr(image, torch.full((2, 24, 24), 0.3)), torch.full((2, 24, 24), 0.3)
    )
    with pytest.raises(ValueError, match="expected \\[3, H, W\\] and \\[C, H, W\\]"):
        pamr(image, maps[:, :5])


def test_refined_prediction(model, picture):
    plain = ovseg.segment(picture, LABELS, model=model)
    refined = ovseg.segment(picture, LABELS, model=model, refine="pamr", area_threshold=0.01)
    assert refined.labels.shape == plain.labels.shape and (refined.labels != plain.labels).any()
