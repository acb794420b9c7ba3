"""Augmentation: masks stay on their pixels, sizes and shares are what was asked, colours as
mmsegmentation distorts them.
"""

import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from ovseg.data.mask_transforms import (
    CappedCrop,
    MaskAugment,
    MiddleCrop,
    PadTo,
    PhotoMetricDistortion,
    RatioResize,
    from_hsv,
    mask_transform,
    to_hsv,
)
from ovseg.data.sampling import generator, integer, some, uniform
from ovseg.data.transforms import (
    Compose,
    PairAugment,
    RandAugment,
    RandomErasing,
    RandomFlip,
    RandomResizedCrop,
    as_items,
    pair_transform,
)

COLOURS = torch.tensor(
    [[250, 10, 10], [10, 250, 10], [10, 10, 250], [250, 250, 10], [10, 250, 250]], dtype=torch.uint8
)


def picture(seed: int, height: int = 90, width: int = 120) -> tuple[torch.Tensor, torch.Tensor]:
    """Large areas of one colour each, and the map that says which."""
    cells = torch.randint(0, len(COLOURS), (3, 4), generator=generator(seed))
    labels = F.interpolate(cells[None, None].float(), (height, width), mode="nearest")[0, 0].long()
    return COLOURS[labels].permute(2, 0, 1).contiguous(), labels


def disagreement(image: torch.Tensor, mask: torch.Tensor, ignore: int = 255) -> float:
    """Share of pixels whose colour is not that of their label, away from the edges of areas by two
    pixels.
    """
    mask = mask[0].long()
    near = (
        F.pad(mask[None].float(), (2, 2, 2, 2), value=-1.0)
        .unfold(1, 5, 1)
        .unfold(2, 5, 1)
        .flatten(3)
    )
    inner = (near == mask[None, ..., None]).all(-1)[0] & (mask != ignore)
    assert inner.any()
    nearest = (
        (image.permute(1, 2, 0)[:, :, None].float() - COLOURS.float()).square().sum(-1).argmin(-1)
    )
    return float((nearest != mask)[inner].float().mean())


HALF = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)  # a model's mean and deviation
PUBLISHED = PairAugment(
    (0.08, 1.0), flip=0.5, interpolation="bilinear", rand_augment="rand-m9-mstd0.5-inc1", erase=0.25
)
STEPS = {
    "resized crop": RandomResizedCrop(64, (0.3, 1.0), (0.75, 4 / 3)),
    "flip": RandomFlip(1.0),
    "ratio resize": RatioResize((160, 80), (0.5, 2.0)),
    "capped crop": CappedCrop(48, 0.75, 255),
    "middle": MiddleCrop(50),
    "pad": PadTo(130, (1, 2, 3), 255),
    "pairs": pair_transform(PairAugment((0.2, 1.0), flip=0.5), 64, *HALF),
    "masks": mask_transform(MaskAugment((160, 80), photometric=False), 64, (0.5, 0.5, 0.5), 255),
    "masks of validation": mask_transform(
        MaskAugment((160, 80)), 64, (0.5, 0.5, 0.5), 255, train=False
    ),
}


@pytest.mark.parametrize("name", list(STEPS))
def test_masks_stay_on_their_pixels(name):
    for seed in range(12):
        image, labels = picture(seed)
        found, mask = STEPS[name](generator(seed), *as_items(image, labels))
        assert found.shape[-2:] == mask.shape[-2:] and found.dtype == torch.uint8
        assert disagreement(found, mask) < 0.01
        if seed == 0 and name != "pad":  # the measure sees a map that lies wrong
            assert disagreement(found, mask.roll(8, -1)) > 0.01


def test_several_maps_and_one_of_another_size():
    image, labels = picture(3)
    items = as_items(image, labels, labels[::3, ::3].numpy().astype(np.uint16))
    found, one, other = STEPS["pairs"](generator(1), *items)
    assert float((one != other).float().mean()) < 0.1 and disagreement(found, other) < 0.01
    assert set(other.unique().tolist()) <= set(range(5))


@pytest.mark.parametrize("name", list(STEPS))
def test_the_same_numbers_give_the_same_picture(name):
    image, labels = picture(5)
    torch.manual_seed(1)
    first = STEPS[name](generator(7), *as_items(image, labels))
    torch.manual_seed(2)
    np.random.seed(3)
    again = STEPS[name](generator(7), *as_items(image, labels))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_rand_augment_is_timms():
    """The same picture as timm's own call from the same global seeds, whatever those were; they go
    on as if nothing had been drawn.
    """
    auto_augment = pytest.importorskip("timm.data.auto_augment", reason="timm is not installed")
    image, _ = picture(4)
    ours = RandAugment("rand-m9-mstd0.5-inc1", 90, (0.485, 0.456, 0.406), "bilinear")
    theirs = auto_augment.rand_augment_transform(
        "rand-m9-mstd0.5-inc1",
        {
            "translate_const": 40,
            "img_mean": (124, 116, 104),
            "interpolation": Image.Resampling.BILINEAR,
        },
    )
    changed = 0
    for seed in range(20):
        rng = generator(seed)
        random.seed(integer(rng, 0, 2**31))
        np.random.seed(integer(rng, 0, 2**31))
        expected = torch.from_numpy(
            np.array(theirs(Image.fromarray(image.permute(1, 2, 0).numpy())))
        ).permute(2, 0, 1)
        random.seed(seed + 1)
        np.random.seed(5)
        (found,) = pickle.loads(pickle.dumps(ours))(
            generator(seed), *as_items(image)
        )  # workers get copies
        assert torch.equal(found, expected) and (random.random(), np.random.rand()) == _first(
            seed + 1, 5
        )
        changed += not torch.equal(found, image)
    assert changed > 10
    with pytest.raises(ValueError, match="rand_augment moves the picture and 1 maps lie over it"):
        ours(generator(0), *as_items(image, np.zeros((90, 120), np.int64)))


def _first(one: int, other: int) -> tuple[float, float]:
    return random.Random(one).random(), np.random.RandomState(other).rand()


def test_erased_rectangles():
    """A share of the pictures, 1/50 to 1/3 of each, of noise with the model's mean and deviation;
    the rest as it was, and maps whole.
    """
    grey, step = (
        torch.full((3, 100, 140), 7, dtype=torch.uint8),
        RandomErasing(0.25, (0.5, 0.4, 0.6), (0.1, 0.05, 0.15)),
    )
    label, shares, values = torch.zeros(100, 140, dtype=torch.int64), [], []
    for seed in range(400):
        found, mask = step(generator(seed), *as_items(grey, label))
        assert not mask.any() and found.dtype == torch.uint8
        other = (found != 7).any(0)
        if other.any():
            rows, columns = other.any(1).nonzero()[:, 0], other.any(0).nonzero()[:, 0]
            h, w = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
            assert len(rows) == h and len(columns) == w and 0.25 < w / h < 4
            shares.append(h * w / (100 * 140))
            values.append(
                found[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].flatten(1).float()
                / 255
            )
    assert 70 < len(shares) < 130 and min(shares) > 0.018 and 0.28 < max(shares) < 0.34
    noise = torch.cat(values, 1)
    torch.testing.assert_close(noise.mean(1), torch.tensor([0.5, 0.4, 0.6]), atol=0.003, rtol=0)
    torch.testing.assert_close(noise.std(1), torch.tensor([0.1, 0.05, 0.15]), atol=0.003, rtol=0)


def test_the_published_augmentation_of_pairs():
    """OVSegmentor's first stage: the same picture for the same numbers, its size, and no two alike."""
    image, _ = picture(6)
    transform = pair_transform(PUBLISHED, 64, *HALF)
    found = [transform(generator(seed), *as_items(image))[0] for seed in range(8)]
    again = [transform(generator(seed), *as_items(image))[0] for seed in range(8)]
    assert all(
        torch.equal(a, b) and a.shape == (3, 64, 64) and a.dtype == torch.uint8
        for a, b in zip(found, again, strict=True)
    )
    assert len({x.numpy().tobytes() for x in found}) == 8
    smooth = torch.rand(3, 64, 64, generator=generator(0)).mul(255).to(torch.uint8)
    one, other = (
        RandomResizedCrop(32, (1.0, 1.0), (1.0, 1.0), how)(generator(0), *as_items(smooth))[0]
        for how in ("bilinear", "bicubic")
    )
    assert not torch.equal(one, other)
    with pytest.raises(ValueError, match=r"augment\.erase is 2; expected a share"):
        pair_transform(PairAugment(erase=2), 64, *HALF)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 10**6))
def test_crops_lie_in_the_picture(height, width, seed):
    crop = RandomResizedCrop(8, (0.5, 1.0), (0.75, 4 / 3))
    top, left, h, w = crop.box(generator(seed), height, width)
    assert min(top, left) >= 0 and min(h, w) >= 1 and top + h <= height and left + w <= width
    if min(height, width) > 40 and h < height and w < width:
        assert 0.45 < h * w / (height * width) <= 1.01 and 0.7 < w / h < 1.4


def test_without_augmentation_the_middle_square_is_taken():
    image = Image.fromarray(
        np.arange(40 * 60, dtype=np.uint32).reshape(40, 60).astype(np.uint8)
    ).convert("RGB")
    (found,) = pair_transform(PairAugment((1.0, 1.0), (1.0, 1.0)), 40, *HALF)(
        generator(0), *as_items(image)
    )
    assert torch.equal(found, as_items(image)[0][:, :, 10:50])


def test_crops_are_antialiased():
    noise = torch.randint(0, 256, (3, 256, 256), dtype=torch.uint8, generator=generator(0))
    (small,) = RandomResizedCrop(32, (1.0, 1.0), (1.0, 1.0))(generator(0), *as_items(noise))
    assert (
        float(small.float().std()) < 20
    )  # 8 x 8 pixels of deviation 74 are averaged; without: 50 and more


@settings(max_examples=40, deadline=None)
@given(st.integers(20, 200), st.integers(20, 200), st.integers(0, 1000))
def test_ratio_resize_keeps_the_aspect(height, width, seed):
    (found,) = RatioResize((128, 64), (0.5, 2.0))(
        generator(seed), *as_items(torch.zeros(3, height, width, dtype=torch.uint8))
    )
    h, w = found.shape[-2:]
    assert max(h, w) <= 256 and min(h, w) <= 128 and (max(h, w) >= 63 or min(h, w) >= 31)
    assert abs(h - height * w / width) <= 1 + height / width


def test_ratio_resize_is_the_published_rule():
    """512 x 683 at factor 1.5 of (2048, 512): the short side becomes 768, the long one int(683 *
    1.5 + 0.5).
    """
    fixed = RatioResize((2048, 512), (1.5, 1.5))
    assert fixed(generator(0), *as_items(torch.zeros(3, 512, 683, dtype=torch.uint8)))[0].shape == (
        3,
        768,
        1025,
    )
    assert fixed(generator(0), *as_items(torch.zeros(3, 100, 1000, dtype=torch.uint8)))[
        0
    ].shape == (3, 307, 3072)  # the long side limits


def test_no_class_has_more_than_its_cap():
    """Two thirds are class 0; a crop of one class, or mostly one, is drawn again."""
    mask = torch.zeros(60, 90, dtype=torch.int64)
    mask[:, 60:75], mask[:, 75:] = 1, 255
    image = torch.zeros(3, 60, 90, dtype=torch.uint8)
    shares = {}
    for cap in (0.75, 1.0):
        seen = []
        for seed in range(200):
            _, crop = CappedCrop(20, cap, 255)(generator(seed), *as_items(image, mask))
            counts = crop.flatten().bincount(minlength=256)[:255]
            seen.append(int((counts > 0).sum()) > 1 and float(counts.max() / counts.sum()) < 0.75)
        shares[cap] = np.mean(seen)
    once = shares[1.0]
    assert 0.1 < once < 0.5
    assert abs(shares[0.75] - (1 - (1 - once) ** 11)) < 0.08  # one draw and ten more


def test_ignored_pixels_are_no_class():
    crop = CappedCrop(8, 0.75, 255)
    mask = torch.full((8, 8), 255)
    assert not crop.mixed(mask)
    mask[0] = 3
    assert not crop.mixed(mask)  # one class and ignored pixels
    mask[1, :4] = 4
    assert crop.mixed(mask)  # 8 and 4 of 12


def test_padding_is_what_the_model_makes_nothing_of():
    """mmsegmentation pads with 0 after it has normalised; here the mean's colour does that."""
    mean = (0.48145466, 0.4578275, 0.40821073)
    image, labels = picture(0, 30, 40)
    transform = mask_transform(
        MaskAugment((40, 30), (1.0, 1.0), flip=0.0, photometric=False), 64, mean, 255
    )
    found, mask = transform(generator(0), *as_items(image, labels))
    assert found.shape == (3, 64, 64) and mask.shape == (1, 64, 64)
    assert (
        bool((mask[0, 30:] == 255).all())
        and bool((mask[0, :, 40:] == 255).all())
        and torch.equal(mask[0, :30, :40].long(), labels)
    )
    assert torch.equal(found[:, :30, :40], image)
    padding = found[:, 30:].float() / 255 - torch.tensor(mean)[:, None, None]
    assert float(padding.abs().max()) < 0.5 / 255 + 1e-6


def test_hsv_there_and_back():
    x = torch.randint(0, 256, (3, 200, 200), dtype=torch.uint8, generator=generator(0))
    hue, saturation, value = to_hsv(x)
    assert int(hue.max()) < 180 and torch.equal(value, x.amax(0))
    error = (from_hsv(hue, saturation, value).int() - x.int()).abs()
    assert int(error.max()) <= 6 and float(error.float().mean()) < 2  # hue has 180 steps
    exact = torch.tensor(
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [7, 7, 7], [0, 0, 0]],
        dtype=torch.uint8,
    )
    assert torch.equal(from_hsv(*to_hsv(exact.T[:, None].contiguous()))[:, 0].T, exact)


def test_hsv_is_that_of_opencv():
    """Colours, their 8-bit HSV and the way back as OpenCV 5.0.0 computes them (in long rows its
    vector code cuts off where this rounds).
    """
    rgb = [
        [200, 100, 100],
        [243, 8, 36],
        [210, 242, 63],
        [79, 222, 108],
        [69, 211, 65],
        [104, 164, 140],
        [21, 7, 221],
        [192, 214, 137],
    ]
    known = [
        [0, 127, 200],
        [176, 247, 243],
        [35, 189, 242],
        [66, 164, 222],
        [59, 176, 211],
        [78, 93, 164],
        [122, 247, 221],
        [39, 92, 214],
    ]
    back = [
        [200, 100, 100],
        [243, 8, 39],
        [212, 242, 63],
        [79, 222, 108],
        [70, 211, 65],
        [104, 164, 140],
        [21, 7, 221],
        [191, 214, 137],
    ]
    hsv = to_hsv(torch.tensor(rgb, dtype=torch.uint8).T[:, None].contiguous())
    assert torch.stack(hsv, -1)[0].tolist() == known
    assert from_hsv(*hsv)[:, 0].T.tolist() == back


def test_photometric_distortion_follows_its_definition():
    """Step by step over the same draws: brightness, contrast first or last, saturation, hue; each
    half the time.
    """

    def linear(x, factor, plus):
        return np.clip(x.astype(np.float32) * np.float32(factor) + np.float32(plus), 0, 255).astype(
            np.uint8
        )

    def by_hand(x, rng):
        steps = []
        if integer(rng, 0, 2):
            x = linear(x, 1, uniform(rng, -32, 32))
            steps.append("brightness")
        first = integer(rng, 0, 2)
        if first and integer(rng, 0, 2):
            x = linear(x, uniform(rng, 0.5, 1.5), 0)
            steps.append("contrast")
        if integer(rng, 0, 2):
            h, s, v = to_hsv(torch.from_numpy(x))
            x = from_hsv(
                h, torch.from_numpy(linear(s.numpy(), uniform(rng, 0.5, 1.5), 0)), v
            ).numpy()
            steps.append("saturation")
        if integer(rng, 0, 2):
            h, s, v = to_hsv(torch.from_numpy(x))
            turned = (h.numpy().astype(int) + integer(rng, -18, 18)) % 180
            x = from_hsv(torch.from_numpy(turned.astype(np.uint8)), s, v).numpy()
            steps.append("hue")
        if not first and integer(rng, 0, 2):
            x = linear(x, uniform(rng, 0.5, 1.5), 0)
            steps.append("contrast last")
        return x, steps

    x = torch.randint(0, 256, (3, 12, 10), dtype=torch.uint8, generator=generator(4))
    mask = torch.randint(0, 5, (12, 10))
    counts: dict[str, int] = {}
    for seed in range(300):
        found, same = PhotoMetricDistortion()(generator(seed), *as_items(x, mask))
        expected, steps = by_hand(x.numpy().copy(), generator(seed))
        assert np.array_equal(found.numpy(), expected) and torch.equal(same[0], mask)
        for step in steps:
            counts[step] = counts.get(step, 0) + 1
    assert all(110 < counts[step] < 190 for step in ("brightness", "saturation", "hue"))
    assert all(45 < counts[step] < 105 for step in ("contrast", "contrast last"))


def test_draws():
    rng = generator(0)
    assert sorted(some(rng, 3, 3)) == [0, 1, 2] and len(set(some(rng, 2, 5))) == 2
    assert sorted(some(rng, 5, 2))[1:4] in ([0, 0, 1], [0, 1, 1]) and some(rng, 3, 1) == [0, 0, 0]
    assert {integer(rng, -1, 2) for _ in range(60)} == {-1, 0, 1} and all(
        2 <= uniform(rng, 2, 3) < 3 for _ in range(60)
    )


def test_steps_compose_in_order():
    image, labels = picture(1)
    flip_then_crop = Compose(RandomFlip(1.0), MiddleCrop(20))
    found, _ = flip_then_crop(generator(0), *as_items(image, labels))
    assert torch.equal(found, image.flip(-1)[:, 35:55, 50:70])
