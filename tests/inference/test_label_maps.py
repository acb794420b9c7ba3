"""Every rule of Settings against whole maps: synonyms, activations, backgrounds, area threshold, bias, groups, PAMR."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import ovseg
from ovseg.data.labels import LabelSet
from ovseg.data.scenes import Scenes
from ovseg.errors import InputError
from ovseg.inference.label_maps import Queries, group_tables, label_map
from ovseg.inference.pamr import pamr
from ovseg.inference.settings import Settings
from ovseg.inference.windows import View, view_of, window_origins
from ovseg.models import ImageFeatures

LABELS = {"seven": ["a red seven", "a blue seven"], "zero": ["a blue zero"], "gravel": ["gravel", "brick"]}


@pytest.fixture(scope="module")
def model():
    return ovseg.create_model("pacl_tiny", "digits")


@pytest.fixture(scope="module")
def picture():
    scenes = [scene.image for scene in Scenes("digits", "val", 6)]
    return Image.fromarray(np.concatenate([np.concatenate(scenes[:3], 1), np.concatenate(scenes[3:], 1)])[:60, :90])


def whole_maps(model, picture, texts, settings):
    """[T, H, W] by the published procedure: every window at full size, summed, divided, resized; activation at its stage."""
    view = view_of((picture.height, picture.width), settings, patch=4, trained=48)
    small = picture.resize(view.canvas[::-1], Image.Resampling.BICUBIC)
    pixels = model.backbone.normalize(torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)[None] / 255)
    act = {None: lambda x: x, "sigmoid": torch.sigmoid, "softmax": lambda x: x.softmax(-3)}[settings.activation]
    origins, crop, canvas, size = view.placing
    total, count = torch.zeros(len(texts), *canvas), torch.zeros(canvas)
    for y, x in origins.tolist():
        seen = pixels if view.origins is None else pixels[..., y : y + crop[0], x : x + crop[1]]
        maps = F.interpolate(model.segment_logits(model.encode_image(seen), texts) * (settings.scale or 1), crop, mode="bilinear")[0]
        total[:, y : y + crop[0], x : x + crop[1]] += act(maps) if settings.stage == "window" else maps
        count[y : y + crop[0], x : x + crop[1]] += 1
    merged = total / count
    merged = act(merged) if settings.stage == "merged" else merged
    maps = F.interpolate(merged[None], size, mode="bilinear")[0]
    return act(maps) if settings.stage == "output" else maps


CASES = [
    {},
    {"crop": 32, "stride": 20},
    {"crop": 32, "scale": 40.0, "activation": "softmax"},
    {"crop": 32, "scale": 40.0, "activation": "softmax", "stage": "window", "background_threshold": 0.4},
    {"scale": 40.0, "activation": "softmax", "background": ("grass", "a green one"), "background_threshold": 0.3},
    {"activation": "sigmoid", "stage": "window", "crop": 32, "bias": {"zero": -0.01}},
    {"crop": 32, "background_threshold": 0.0, "bias": {"gravel": -0.05}},
    {"scale": 60.0, "activation": "softmax", "area_threshold": 0.2, "background": ("grass",)},
    {"crop": 32, "scale": 30.0, "background_entropy": 0.8},
    {"synonyms": "mean", "background": ("grass",)},
]


@pytest.mark.parametrize("options", CASES, ids=[" ".join(case) or "plain" for case in CASES])
@torch.no_grad()
def test_labels_are_those_of_whole_maps(model, picture, options):
    settings = Settings(**options)
    found = ovseg.Predictor(model, LABELS, settings=settings).set_image(picture).predict()
    groups = [*LABELS.values(), *([list(settings.background)] if settings.background else [])]
    unit = model.encode_labels([text for group in groups for text in group])
    owner = torch.tensor([i for i, group in enumerate(groups) for _ in group])
    if settings.synonyms == "mean":
        texts = torch.cat([F.normalize(unit[owner == i].mean(0), dim=0)[None] for i in range(3)] + [unit[owner == 3]])
        owner = torch.tensor([0, 1, 2] + [3] * len(settings.background))
    else:
        texts = unit
    maps = whole_maps(model, picture, texts, settings)
    for i, name in enumerate(LABELS):
        maps[owner == i] += (settings.bias or {}).get(name, 0.0)
    labels = owner[maps.argmax(0)]
    if settings.area_threshold:
        area = torch.bincount(labels[labels < 3].flatten(), minlength=3)
        kept = area > settings.area_threshold * area.sum()
        assert 0 < int(kept.sum()) < 3, "the case does not test what it should"
        for i in range(3):
            maps[owner == i] += 0.0 if kept[i] else -1e4
        labels = owner[maps.argmax(0)]
    labels = torch.where(labels == 3, -1, labels)
    top, sure = maps.max(0).values, maps.topk(2, 0).values.diff(dim=0)[0] < -1e-5
    if settings.background_threshold is not None:
        sure &= (top - settings.background_threshold).abs() > 1e-5
        labels = labels.masked_fill(top < settings.background_threshold, -1)
    if settings.background_entropy is not None:
        view = view_of((60, 90), settings, patch=4, trained=48)
        assert view.origins is not None

        def entropy(x):
            p = (x * settings.scale).softmax(1)
            return -(p * p.log()).sum(1, keepdim=True)

        class Entropy:
            def encode_image(self, x):
                return entropy(model.segment_logits(model.encode_image(x), texts))

            def segment_logits(self, x, _):
                return x

            backbone = model.backbone

        level = whole_maps(Entropy(), picture, texts[:1], Settings(**{**options, "scale": None, "background_entropy": None}))[0]
        sure &= (level - settings.background_entropy).abs() > 1e-4
        labels = labels.masked_fill(level > settings.background_entropy, -1)
    assert float(sure.float().mean()) > 0.9
    assert np.array_equal(found.labels[sure.numpy()], labels.numpy()[sure.numpy()])
    background = settings.background or settings.background_threshold is not None or settings.background_entropy is not None
    assert bool((found.labels == -1).any()) == bool((labels == -1).any()) and (bool((labels == -1).any()) or not background)
    np.testing.assert_allclose(found.scores[sure.numpy()], top.numpy()[sure.numpy()], atol=1e-4)


@pytest.mark.parametrize("options,message", [
    ({"activation": "softmax"}, "scale is missing: softmax over plain cosines is nearly uniform"),
    ({"background_entropy": 1.0}, "scale is missing"),
    ({"activation": "tanh"}, "activation is 'tanh'; expected one of"),
    ({"background": 0.3}, "A number is background_threshold"),
    ({"background": [" "]}, "expected texts that are not blank"),
    ({"background": "gravel"}, "background holds 'gravel', which is a label too"),
    ({"background_threshold": -0.1, "activation": "sigmoid"}, "expected what sigmoid gives, 0 .. 1"),
    ({"background_threshold": 50.0, "scale": 40.0}, "expected a cosine times 40"),
    ({"area_threshold": 1.0}, "expected a share"),
    ({"bias": {"cat": 1.0}}, "bias names 'cat'; expected some of the labels"),
    ({"short_sid": 3}, "unknown option 'short_sid'; did you mean 'short_side'"),
    ({"crop": 0}, "crop is 0; expected a positive integer"),
    ({"stride": 8}, "stride is 8 and crop is missing"),
    ({"refine": "crf"}, "refine is 'crf'"),
    ({"scale": float("nan")}, "scale is nan"),
])
def test_settings_that_cannot_be(model, picture, options, message):
    with pytest.raises(InputError, match=message):
        ovseg.Predictor(model, LABELS, **options).set_image(picture).predict()


def test_long_side_and_rounding():
    assert view_of((300, 1500), Settings(short_side=448, long_side=2048, crop=224), patch=16, trained=224).canvas == (410, 2048)
    assert view_of((480, 640), Settings(short_side=512, crop=512, stride=426), patch=16, trained=224).canvas == (512, 683)
    assert view_of((480, 640), Settings(), patch=16, trained=224).canvas == (224, 304)  # whole patches
    # Where the cap would make the picture smaller than a window, the short side stays a window.
    assert view_of((10, 1000), Settings(short_side=448, long_side=2048, crop=448), patch=16, trained=224).canvas == (448, 2048)


@torch.no_grad()
def test_group_tables_by_hand():
    torch.manual_seed(0)
    groups, embedding, texts = torch.randn(2, 3, 8), torch.randn(2, 8), F.normalize(torch.randn(6, 8), dim=-1)
    features = ImageFeatures(embedding, torch.zeros(2, 4, 8), (2, 2), groups)
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
    model.decision = "groups"
    labels = LabelSet.of(["cat", "dog"])
    texts = F.normalize(torch.randn(2, 8), dim=-1)
    queries = Queries(labels.names, texts, torch.tensor([0, 1]))
    soft = torch.zeros(2, 2, 4, 4)
    soft[:, 0, :2], soft[:, 1, 2:] = 1, 1
    features = ImageFeatures(texts.sum(0).expand(2, 8), torch.zeros(2, 16, 8), (4, 4), torch.stack([texts, texts]), None, soft.flatten(2))
    view = View((16, 32), (16, 32), (16, 16), window_origins((16, 32), (16, 16), (16, 16)))
    found, _ = label_map(model, features, queries, view, Settings(scale=20.0))
    assert found[:8].unique().tolist() == [0] and found[8:].unique().tolist() == [1]
    with pytest.raises(InputError, match="refine is 'pamr' and pacl_tiny labels groups"):
        label_map(model, features, queries, view, Settings(refine="pamr"))


def test_pamr_by_hand():
    """One iteration, dilation 1, at an inner pixel, as the formula says."""
    torch.manual_seed(0)
    image, maps = torch.rand(3, 5, 6), torch.rand(2, 5, 6)
    y, x = 2, 3
    square = image[:, y - 1 : y + 2, x - 1 : x + 2].reshape(3, 9)
    sigma = square.std(1)
    around = [i for i in range(9) if i != 4]
    k = torch.stack([-((square[:, 4] - square[:, i]).abs() / (1e-8 + 0.1 * sigma)).mean() for i in around])
    expected = maps[:, y - 1 : y + 2, x - 1 : x + 2].reshape(2, 9)[:, around] @ k.softmax(0)
    torch.testing.assert_close(pamr(image, maps, iterations=1, dilations=(1,))[:, y, x], expected)


def test_pamr_follows_edges():
    """A map that is half a region too wide shrinks to the region's edge, and constants stay constant."""
    image = torch.zeros(3, 24, 24)
    image[:, :, 12:] = 1
    maps = torch.zeros(1, 24, 24)
    maps[:, :, :15] = 1
    refined = pamr(image + 0.01 * torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0)), maps)[0]
    assert float(refined[:, 13:15].mean()) < 0.4 < 0.6 < float(refined[:, 8:11].mean())
    torch.testing.assert_close(pamr(image, torch.full((2, 24, 24), 0.3)), torch.full((2, 24, 24), 0.3))
    with pytest.raises(ValueError, match="expected \\[3, H, W\\] and \\[C, H, W\\]"):
        pamr(image, maps[:, :5])


def test_refined_prediction(model, picture):
    plain = ovseg.segment(picture, LABELS, model=model)
    refined = ovseg.segment(picture, LABELS, model=model, refine="pamr", area_threshold=0.01)
    assert refined.labels.shape == plain.labels.shape and (refined.labels != plain.labels).any()
