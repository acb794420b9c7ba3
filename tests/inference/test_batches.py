"""Many pictures at once: mixed sizes, tensors, shared encoder calls, reading ahead, half precision,
torch.compile, no device reads.
"""

import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import ovseg
from ovseg.data.scenes import Scenes
from ovseg.errors import InputError
from ovseg.inference.reading import read_ahead

LABELS = ["a red seven", "a blue zero", "gravel", "grass"]
SIZES = [(48, 48), (30, 61), (48, 48), (61, 30), (100, 90), (48, 48), (96, 48), (20, 33)]


@pytest.fixture(scope="module")
def model():
    return ovseg.create_model("pacl_tiny", "digits")


@pytest.fixture(scope="module")
def pictures():
    """Parts of a mosaic of scenes, of mixed sizes."""
    scenes = [scene.image for scene in Scenes("digits", "val", 9)]
    mosaic = np.concatenate([np.concatenate(scenes[i : i + 3], 1) for i in (0, 3, 6)])
    return [mosaic[4 * i : 4 * i + h, 3 * i : 3 * i + w] for i, (h, w) in enumerate(SIZES)]


def same(found, expected):
    """Labels equal but for ties, which the size of a batch may break otherwise; scores to rounding."""
    assert found.labels.shape == expected.labels.shape and found.names == expected.names
    assert (found.labels != expected.labels).mean() < 1e-3
    np.testing.assert_allclose(found.scores, expected.scores, atol=2e-5)


@pytest.mark.parametrize(
    "name,options",
    [
        ("pacl_tiny", {}),
        ("pacl_tiny", {"crop": 24, "window_batch": 5, "background": "sand"}),
        ("pacl_tiny", {"resize": "bilinear", "refine": "pamr", "background_threshold": 0.2}),
        ("segclip_tiny", {"crop": 48, "stride": 24, "short_side": 60, "background_threshold": 0.3}),
    ],
)
def test_a_batch_equals_single_calls(pictures, name, options):
    model = ovseg.create_model(name, "digits")
    predictor = ovseg.Predictor(model, LABELS, **options)
    forms = [Image.fromarray, lambda x: x, lambda x: torch.from_numpy(x.copy()).permute(2, 0, 1)]
    given = [forms[i % 3](picture) for i, picture in enumerate(pictures)]
    found = predictor.predict_batch(given)
    assert [one.labels.shape for one in found] == SIZES and len(
        {label for one in found for label in np.unique(one.labels)}
    ) > 2
    for one, picture in zip(found, pictures, strict=True):
        same(one, predictor.set_image(picture).predict())
        assert np.array_equal(np.asarray(one.image), picture)
    some = predictor.predict_batch(pictures[:2], LABELS[1:], allowed=["gravel", "grass"])
    for one, picture in zip(some, pictures, strict=False):
        same(one, predictor.set_image(picture).predict(LABELS[1:], allowed=["gravel", "grass"]))
    assert predictor.predict_batch([]) == []


def test_encoder_calls_are_shared(model, pictures, monkeypatch):
    sizes = []
    real = model.encode_image
    monkeypatch.setattr(
        model, "encode_image", lambda x: sizes.append(tuple(x.shape[::2])) or real(x)
    )
    ovseg.Predictor(model, LABELS).predict_batch(pictures)
    assert sorted(sizes) == [
        (1, 48),
        (1, 48),
        (1, 52),
        (2, 96),
        (3, 48),
    ]  # pictures of one canvas in one call
    sizes.clear()
    predictor = ovseg.Predictor(model, LABELS, crop=24, window_batch=16)
    windows = sum(len(seen.prepared.placement.origins) for seen in predictor.see(pictures))
    assert [n for n, _ in sizes] == [16] * (windows // 16) + [windows % 16] * (
        windows % 16 > 0
    ) and {side for _, side in sizes} == {24}


@pytest.mark.parametrize("side", [48, 40])
@pytest.mark.parametrize("resize", ["bicubic", "bilinear"])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32, torch.float64])
def test_a_tensor_of_pictures(model, pictures, kind, resize, side):
    images = torch.stack(
        [torch.from_numpy(pictures[i][:side, :side].copy()).permute(2, 0, 1) for i in (0, 2, 5)]
    )
    given = images if kind == torch.uint8 else images.to(kind) / 255
    predictor = ovseg.Predictor(model, LABELS, resize=resize)
    found = predictor.predict_batch(given)
    for one, image in zip(found, images, strict=True):
        same(one, predictor.set_image(image).predict())
        assert np.array_equal(np.asarray(one.image), image.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    "images,message",
    [
        (torch.zeros(3, 48, 48), r"images has shape \[3, 48, 48\]; expected \[B, 3, H, W\]"),
        (
            torch.zeros(2, 3, 48, 48, dtype=torch.int64),
            "images has dtype torch.int64; expected uint8 or floats",
        ),
        (torch.full((1, 3, 48, 48), 1.5), "images holds NaN or values outside of 0..1"),
        (torch.full((1, 3, 48, 48), float("nan")), "images holds NaN or values outside of 0..1"),
        (torch.zeros(1, 3, 500, 500), "images is 500x500 = 250000 pixels; the limit is 200000"),
        ([np.zeros((8, 8, 3), np.uint8), b"junk"], "it is none of JPEG"),
    ],
)
@pytest.mark.bad_input("inference", "a tensor that is no batch of pictures")
def test_refused(model, images, message):
    with pytest.raises(InputError, match=message):
        ovseg.Predictor(model, LABELS, max_pixels=200_000).predict_batch(images)


@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.bad_input("inference", "pictures that cannot be read")
def test_stream_keeps_order_and_names_bad_pictures(model, pictures, batch):
    predictor = ovseg.Predictor(model, LABELS)
    sources = [*pictures[:3], b"junk", *pictures[3:], "nowhere.png"]
    found = list(predictor.stream(iter(sources), batch=batch))
    assert [source is given for (source, _), given in zip(found, sources, strict=True)] == [
        True
    ] * 10
    assert [i for i, (_, one) in enumerate(found) if isinstance(one, InputError)] == [3, 9]
    for source, one in found:
        if not isinstance(one, InputError):
            same(one, predictor.set_image(source).predict())
    with pytest.raises(
        InputError, match="bias names 'cat'"
    ):  # what is wrong with the question is no picture's fault
        list(ovseg.Predictor(model, LABELS, bias={"cat": 1.0}).stream(pictures))


def test_reading_ahead_is_bounded_and_in_threads():
    read, threads = [], set()

    def slowly(i):
        threads.add(threading.get_ident())
        read.append(i)
        return i

    taken = 0
    for some in read_ahead(range(40), slowly, 3):
        taken += len(some)
        assert all(item == value for item, value in some)
        time.sleep(0.005)
        assert len(read) <= taken + 3
    assert taken == 40 and sorted(read) == list(range(40)) and threading.get_ident() not in threads


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name,options",
    [
        ("pacl_tiny", {}),
        (
            "pacl_tiny",
            {
                "crop": 24,
                "scale": 40.0,
                "activation": "softmax",
                "bias": {"grass": -0.1},
                "area_threshold": 0.02,
            },
        ),
        ("pacl_tiny", {"scale": 30.0, "background_entropy": 1.2, "refine": "pamr"}),
        ("clip_dense_tiny", {"background_threshold": 0.1}),
        ("segclip_tiny", {"crop": 24, "background_threshold": 0.3, "bias": {"grass": -0.1}}),
    ],
)
def test_half_precision(pictures, name, options, kind):
    """A picture is labelled as in float32, but for pixels between classes."""
    model = ovseg.create_model(name, "digits")
    expected = ovseg.Predictor(model, LABELS, **options).predict_batch(pictures[:5])
    half = ovseg.Predictor(model.to(kind), LABELS, **options)
    found = half.predict_batch(pictures[:5])
    same_labels = np.mean(
        np.concatenate(
            [(a.labels == b.labels).ravel() for a, b in zip(found, expected, strict=True)]
        )
    )
    # Segment maps of groups hang on one argmax a patch; bfloat16 has eight bits.
    assert same_labels > (0.9 if kind == torch.float16 else 0.8)
    assert all(one.scores.dtype == np.float32 and np.isfinite(one.scores).all() for one in found)
    assert half.set_image(pictures[0]).classify().keys() == set(LABELS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pacl_tiny", "segclip_tiny"])
def test_compiled(pictures, name):
    """By inductor, which traces as the other backends of torch.compile do and goes on from there."""
    model = ovseg.create_model(name, "digits")
    expected = ovseg.Predictor(model, LABELS).set_image(pictures[0]).predict()
    torch._dynamo.reset()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(torch.compiler.is_compiling()))
    compiled = torch.compile(model)
    predictor = ovseg.Predictor(compiled, LABELS)
    found = predictor.set_image(pictures[0]).predict()
    assert (found.labels == expected.labels).mean() > 0.999
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    assert calls and predictor.classify().keys() == set(LABELS)


class NoReads(TorchDispatchMode):
    """Refuses what waits for a device: a number read from a tensor, a shape that depends on values."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique2", "_unique2")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.waiting, f"{func} waits for the device"
        assert not (
            func.overloadpacket.__name__ == "index"
            and any(i is not None and i.dtype == torch.bool for i in args[1])
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name,options",
    [
        ("pacl_tiny", {"area_threshold": 0.1, "background_threshold": 0.1, "bias": {"grass": 0.1}}),
        (
            "pacl_tiny",
            {
                "crop": 24,
                "scale": 40.0,
                "activation": "softmax",
                "background": "sand",
                "synonyms": "mean",
            },
        ),
        ("pacl_tiny", {"scale": 40.0, "background_entropy": 1.0}),
        ("segclip_tiny", {"crop": 24, "background_threshold": 0.3}),
    ],
)
def test_nothing_is_read_from_the_device_before_the_result(pictures, monkeypatch, name, options):
    """From pixels to labels. The operators look at values as they do on a GPU: not at all."""
    from ovseg_kernels import _checking

    model = ovseg.create_model(name, "digits")
    predictor = ovseg.Predictor(
        model, {"seven": ["a red seven", "a blue seven"], "grass": "grass"}, **options
    )
    queries = predictor._asked()
    prepared = [predictor.prepare(picture) for picture in pictures[:3]]
    monkeypatch.setattr(_checking, "looks_at_values", lambda x: False)
    with torch.no_grad(), NoReads():
        for seen in predictor.see(prepared):
            predictor.decision.label_map(
                model,
                seen.features,
                queries,
                seen.prepared.placement,
                allowed=queries.allowed(["grass"]),
            )
    with pytest.raises(AssertionError, match="waits for the device"), NoReads():
        bool(torch.ones(1).all())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pacl_tiny", "segclip_tiny"])
def test_a_tensor_stays_on_the_gpu(pictures, name):
    model = ovseg.create_model(name, "digits")
    images = torch.stack([torch.from_numpy(pictures[i].copy()).permute(2, 0, 1) for i in (0, 2, 5)])
    expected = ovseg.Predictor(model, LABELS).predict_batch(images)
    found = ovseg.Predictor(model.cuda(), LABELS).predict_batch(images.cuda())
    assert all((a.labels == b.labels).mean() > 0.99 for a, b in zip(found, expected, strict=True))
