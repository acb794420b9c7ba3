"""Sizes of pictures: their shape is kept, patches and pixels are bounded by one limit each, large
ones are written in blocks.
"""

import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import ovseg
import ovseg_kernels as ok
from ovseg.cli.main import main
from ovseg.data.images import MAX_PIXELS, picture_size, read_image
from ovseg.errors import InputError
from ovseg.inference import Segmentation, View, reading
from ovseg.inference import segmentation as pictures
from ovseg.inference.reading import pixels_of, read_ahead
from ovseg.inference.segmentation import colour, legend_strip, palette
from ovseg.inference.sources import Source
from ovseg.inference.view import place

LABELS = ["a red seven", "gravel", "grass", "a blue one"]


@pytest.fixture(scope="module")
def model():
    return ovseg.create_model("pacl_tiny", "digits")


def noise(height, width, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    )


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(
            size, marks=pytest.mark.bad_input("inference", "a picture much longer than wide")
        )
        for size in (
            (300, 1500),
            (1500, 300),
            (16, 1000),
            (37, 1111),
            (449, 560),
            (1, 12),
            (500, 500),
        )
    ],
)
@pytest.mark.parametrize("options", [{"crop": 448}, {"crop": 224, "stride": 100}, {"crop": 16}, {}])
def test_the_shape_is_kept(size, options):
    """Half a patch of rounding at each side; whole windows of whole patches cover the canvas."""
    view = View(short_side=448, long_side=560, **options)
    placement = place(size, view, patch=16, trained=224)
    factor = min(448 / min(size), 560 / max(size))
    for side, canvas, crop in zip(size, placement.canvas, placement.crop, strict=True):
        assert (
            abs(canvas - side * factor) <= max(8, 16 - side * factor)
            and crop % 16 == 0
            and crop <= canvas
        )
        if canvas < (view.crop or 10**6):
            assert crop == canvas
    if view.crop:
        covered = torch.zeros(placement.canvas, dtype=torch.bool)
        for y, x in placement.origins.tolist():
            covered[y : y + placement.crop[0], x : x + placement.crop[1]] = True
        assert bool(covered.all())


def test_a_long_picture_is_not_stretched(model):
    """What the encoder sees is the picture at a quarter of its size, and its labels are those of
    the procedure by hand.
    """
    image = noise(24, 160)
    predictor = ovseg.Predictor(model, LABELS, short_side=48, long_side=80, crop=48, stride=24)
    prepared = predictor.prepare(image)
    assert prepared.placement.canvas == (12, 80) and prepared.placement.crop == (12, 48)
    assert torch.equal(
        prepared.pixels,
        torch.from_numpy(np.asarray(image.resize((80, 12), 3)).copy()).permute(2, 0, 1),
    )
    found = predictor.set_image(image).predict()
    pixels, texts = model.normalize(prepared.pixels[None]), model.encode_labels(LABELS)
    total, count = torch.zeros(4, 12, 80), torch.zeros(12, 80)
    with torch.no_grad():
        for x in (0, 24, 32):
            logits = model.segment_logits(model.encode_image(pixels[..., x : x + 48]), texts)
            total[:, :, x : x + 48] += torch.nn.functional.interpolate(
                logits, (12, 48), mode="bilinear"
            )[0]
            count[:, x : x + 48] += 1
    maps = torch.nn.functional.interpolate((total / count)[None], (24, 160), mode="bilinear")[0]
    best = maps.topk(2, 0).values
    sure = (best[0] - best[1] > 1e-5).numpy()
    assert np.array_equal(found.labels[sure], maps.argmax(0).numpy()[sure]) and sure.mean() > 0.99


@pytest.mark.bad_input("inference", "long_side that leaves no short side")
def test_less_than_half_a_patch_is_refused(model):
    with pytest.raises(
        InputError,
        match=r"image is 3000x20; resized to short side 448 and long side 560 its short side would be 3\.7 "
        "pixels, less than half a patch of 16; expected a larger long_side, or crop and no",
    ):
        place((20, 3000), View(short_side=448, long_side=560), patch=16, trained=224)
    with pytest.raises(InputError, match="less than half a patch of 4"):
        ovseg.segment(noise(1, 400), LABELS, model=model, long_side=100)


TOO_MANY = [
    (
        (1, 400),
        {},
        "image is 400x1; resized to short side 48 it would be 19200x48, 57600 patches in one "
        "view, and the limit is "
        r"32768; set long_side to make it smaller, crop to see it through windows, or max_tokens \(--long-side, --crop, ",
    ),
    ((600, 1), {}, "86400 patches in one view"),
    ((48, 48), {"short_side": 1000}, "62500 patches in one view"),
    ((48, 48), {"max_tokens": 143}, "144 patches in one view, and the limit is 143"),
    (
        (48, 96),
        {"crop": 48, "stride": 1, "max_tokens": 144},
        "image is 96x48; resized to short side 48 it would be 96x48, 49 windows of "
        "144 patches, and the limit is 32 times 144",
    ),
    (
        (60000, 48),
        {"short_side": 1200, "crop": 48, "max_pixels": 10**10},
        "set long_side to make it smaller, crop and stride for fewer",
    ),
    (
        (1, 100000),
        {"crop": 48},
        "image is 100000x1; resized to short side 48 it would have 230400000 pixels and the limit "
        "is 64000000; set "
        "long_side to make it smaller, or max_pixels",
    ),
]


@pytest.mark.parametrize(
    "size,options,message",
    [
        pytest.param(
            *row,
            marks=pytest.mark.bad_input("inference", "too many patches or pixels for one picture"),
        )
        for row in TOO_MANY
    ],
)
def test_patches_are_bounded(model, size, options, message):
    image = Image.new("RGB", size[::-1])
    began = time.time()
    predictor = ovseg.Predictor(model, LABELS, **options)
    for ask in (
        lambda: predictor.set_image(image),
        lambda: predictor.predict_batch([image]),
        lambda: predictor.prepare(image),
        lambda: (
            predictor.predict_batch(torch.zeros(1, 3, *size))
            if size[0] * size[1] < 10**5
            else predictor.see([image])
        ),
    ):
        with pytest.raises(InputError, match=message):
            ask()
    found = [result for _, result in predictor.stream([image])]
    assert isinstance(found[0], InputError)
    assert time.time() - began < 5  # nothing was encoded


@pytest.mark.bad_input("inference", "windows of too many patches")
def test_a_window_too_large_is_refused_before_a_picture(model):
    with pytest.raises(
        InputError, match=r"crop is 800, 40000 patches of 4; expected at most 32768 \(max_tokens\)"
    ):
        ovseg.Predictor(model, LABELS, short_side=800, crop=800)
    ovseg.Predictor(model, LABELS, short_side=800, crop=800, max_tokens=40000)


def test_overlapping_patches_count():
    """PACL's stride: steps of 4 between patches of 16 are sixteen times as many."""
    image = noise(512, 512)
    assert place(image.size, View(short_side=1024), patch=16, trained=224, stride=16).canvas == (
        1024,
        1024,
    )
    with pytest.raises(
        InputError, match="it would be 1024x1024, 64009 patches in one view, and the limit is 32768"
    ):
        place(image.size, View(short_side=1024), patch=16, trained=224, stride=4)
    with pytest.raises(InputError, match="crop is 1024, 64009 patches of 16"):
        View(short_side=1024, crop=1024).check(patch=16, trained=224, stride=4)


@pytest.mark.bad_input("command line", "a picture of too many patches")
def test_the_command_names_and_skips_it(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    noise(1, 400).save(tmp_path / "in" / "long.png")
    noise(48, 48).save(tmp_path / "in" / "good.png")
    line = [
        "segment",
        str(tmp_path / "in"),
        "--labels",
        "grass,gravel",
        "-m",
        "pacl_tiny",
        "-o",
        str(tmp_path / "out"),
    ]
    assert main(line) == 3
    told = capsys.readouterr().err
    assert (
        "image is 400x1" in told
        and "--long-side, --crop, --max-tokens" in told
        and "long.png" in told
    )
    assert main(["segment", str(tmp_path / "in" / "long.png"), *line[2:]]) == 2
    assert main([*line, "--long-side", "800"]) == 0  # two pixels, half a patch


@pytest.mark.bad_input("data", "a picture beyond Pillow's own limit of pixels")
def test_one_limit_of_pixels(tmp_path, monkeypatch):
    """Ours acts, for paths, bytes and shards; Pillow's does not, and is as it was."""
    path = tmp_path / "a.png"
    noise(100, 100).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    (tmp_path / "shard").write_bytes(b"x" * 7 + path.read_bytes())
    source = Source("a", tmp_path / "shard", 7, path.stat().st_size, "a.png")
    for picture in (path, path.read_bytes(), source.read()):
        assert read_image(picture, max_pixels=10_000).size == (100, 100)
        with pytest.raises(
            InputError,
            match=r"is 100x100 = 10000 pixels; the limit is 9999: it is too large\. .*--max-pixels",
        ):
            read_image(picture, max_pixels=9_999)
    assert Image.MAX_IMAGE_PIXELS == 1000
    found, threads = (
        [],
        [threading.Thread(target=lambda: found.append(read_image(path).size)) for _ in range(8)],
    )
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(100, 100)] * 8 and Image.MAX_IMAGE_PIXELS == 1000
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)  # by others: theirs


@pytest.mark.bad_input("command line", "a picture of too many pixels")
def test_the_limit_is_an_option_of_the_command(tmp_path, capsys, monkeypatch):
    path = tmp_path / "a.png"
    noise(48, 48).save(path)
    line = [
        "segment",
        str(path),
        "--labels",
        "grass,gravel",
        "-m",
        "pacl_tiny",
        "-o",
        str(tmp_path / "out"),
    ]
    assert (
        main([*line, "--max-pixels", "2303"]) == 2
        and "the limit is 2303" in capsys.readouterr().err
    )
    assert main([*line, "--max-pixels", "2304"]) == 0
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1100)
    assert main([*line, "--max-pixels", "400000000"]) == 0
    assert View().max_pixels == MAX_PIXELS


def test_sizes_are_known_from_headers(tmp_path):
    for name in ("a.png", "a.jpg", "a.webp", "a.bmp"):
        noise(30, 40).save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        assert (
            picture_size(data)
            == pixels_of(tmp_path / name)
            == pixels_of(str(tmp_path / name))
            == pixels_of(data)
            == 1200
        )
        (tmp_path / "shard").write_bytes(b"x" * 9 + data)
        assert (
            pixels_of(Source("a", tmp_path / "shard", 9, len(data), "a"))
            == pixels_of(Source("a", tmp_path / name))
            == 1200
        )
    assert (
        pixels_of(noise(30, 40))
        == pixels_of(np.zeros((30, 40, 3), np.uint8))
        == pixels_of(torch.zeros(3, 30, 40))
        == 1200
    )
    for nothing in (
        tmp_path / "none",
        "none",
        b"junk",
        object(),
        3,
        Source("a", tmp_path / "none"),
    ):
        assert pixels_of(nothing) == 0


@pytest.mark.parametrize(
    "weights,groups",
    [
        ([1] * 20, [4, 4, 4, 4, 4]),
        ([12] * 6, [4, 2]),
        ([40] * 5, [1] * 5),
        ([96] * 3, [1] * 3),
        ([500, 1, 1, 500], [1, 2, 1]),
        ([], []),
    ],
)
def test_large_pictures_are_read_few_at_a_time(monkeypatch, weights, groups):
    """At most 96 in all are read or waiting, one alone where it has more; their order is kept."""
    monkeypatch.setattr(reading, "PIXELS_AHEAD", 96)
    held, most = [0], [0]

    def read(item):
        held[0] += weights[item]
        most[0] = max(most[0], held[0])
        return item

    found = []
    for some in read_ahead(range(len(weights)), read, 4, weigh=lambda item: weights[item]):
        found.append([item for item, _ in some])
        held[0] -= sum(weights[item] for item, _ in some)
    assert [item for some in found for item in some] == list(range(len(weights))) and list(
        map(len, found)
    ) == groups
    assert most[0] <= max(96, max(weights, default=0))


def random_map(height=37, width=53, count=5, seed=0):
    rng = np.random.default_rng(seed)
    labels = (
        rng.integers(-1, count - 1, (height // 3 + 1, width // 3 + 1))
        .repeat(3, 0)
        .repeat(3, 1)[:height, :width]
        .astype(np.int16)
    )
    return Segmentation(
        noise(height, width),
        [f"label {i}" for i in range(count)],
        labels,
        rng.random((height, width)).astype(np.float32),
    )


@pytest.mark.parametrize("block", [1, 60, 10**9])
def test_blocks_make_no_difference(tmp_path, monkeypatch, block):
    """Overlay, mask, JSON and run lengths, a row or all at a time, against the definition on whole
    maps.
    """
    monkeypatch.setattr(pictures, "_BLOCK", block)
    found = random_map()
    labels, count = found.labels, len(found.names)
    base, large = (np.asarray(x).repeat(8, 0).repeat(8, 1) for x in (found.image, labels))
    shown = np.where(large[..., None] < 0, base, (1 - 0.55) * base + 0.55 * colour(large, count))
    edge = np.zeros(large.shape, bool)
    edge[:, 1:] |= large[:, 1:] != large[:, :-1]
    edge[1:] |= large[1:] != large[:-1]
    shown[edge] = 255
    plain = np.asarray(found.overlay(legend=False))
    assert np.array_equal(plain, shown.round().astype(np.uint8))
    with_legend = np.asarray(found.overlay())
    shares = sorted(((float((labels == i).mean()), i) for i in range(count)), reverse=True)
    entries = [
        (tuple(palette(count)[i]), f"label {i} {100 * share:.0f} %")
        for share, i in shares
        if share > 0
    ]
    entries.append(((0, 0, 0), f"background {100 * (labels < 0).mean():.0f} %"))
    assert np.array_equal(
        with_legend, np.concatenate([plain, np.asarray(legend_strip(entries, plain.shape[1]))])
    )
    mask = np.asarray(Image.open(found.save_mask(tmp_path / "m.png")))
    assert np.array_equal(mask, np.where(labels < 0, 255, labels))
    tree = found.to_dict()
    for i, row in enumerate(tree["labels"]):
        inside = labels == i
        assert row["pixels"] == inside.sum() and row["area"] == round(float(inside.mean()), 6)
        assert row["score"] == (
            pytest.approx(float(found.scores[inside].mean()), abs=2e-6) if inside.any() else None
        )
    assert (
        tree["background"]["pixels"] == (labels < 0).sum()
        and found.areas["label 1"] == (labels == 1).mean()
    )
    rows = {row["index"]: row for row in found.to_rle()}
    assert set(rows) == set(np.unique(labels[labels >= 0]).tolist())
    for i, row in rows.items():
        counts, size = row["segmentation"]["counts"], row["segmentation"]["size"]
        decoded = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        assert (
            np.array_equal(decoded.reshape(size[::-1]).T, labels == i)
            and all(counts[1:])
            and row["score"] == tree["labels"][i]["score"]
        )


@pytest.mark.parametrize(
    "labels",
    [np.zeros((1, 1)), np.full((4, 3), -1), np.arange(12).reshape(3, 4) % 5, np.zeros((5, 1))],
)
def test_small_and_uniform_maps(labels, monkeypatch):
    monkeypatch.setattr(pictures, "_BLOCK", 1)
    found = Segmentation(
        noise(*labels.shape),
        list("abcde"),
        labels.astype(np.int16),
        np.ones(labels.shape, np.float32),
    )
    for row in found.to_rle():
        counts = row["segmentation"]["counts"]
        decoded = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(labels.shape[::-1]).T
        assert np.array_equal(decoded, labels == row["index"])
    assert (
        sum(row["pixels"] for row in found.to_dict()["labels"])
        + found.to_dict()["background"]["pixels"]
        == labels.size
    )


@pytest.mark.parametrize(
    "alpha",
    [
        pytest.param(
            alpha, marks=pytest.mark.bad_input("inference", "alpha of an overlay out of 0 .. 1")
        )
        for alpha in (float("nan"), float("inf"), -0.1, 2)
    ],
)
def test_alpha(alpha):
    with pytest.raises(InputError, match=r"alpha is .*; expected 0, the picture alone, to 1"):
        random_map().overlay(alpha)


def test_more_labels_than_two_bytes_hold(model, tmp_path, monkeypatch):
    """Beyond 32768 names labels are int32; a mask holds 65535 of them."""
    names = [f"w{i}" for i in range(32770)]
    found = ovseg.inference.queries.EncodedQueries(tuple(names), torch.zeros(1, 1), torch.zeros(1))
    assert (
        found.label_type == torch.int64
        and replace_names(found, names[:32768]).label_type == torch.int16
    )
    predictor = ovseg.Predictor(model, LABELS)
    queries = predictor._asked()
    texts = torch.cat(
        [queries.texts, queries.texts.new_zeros(len(names) - 4, queries.texts.shape[1])]
    )
    many = ovseg.inference.queries.EncodedQueries(
        tuple(names), texts.roll(-1, 0), torch.arange(len(names))
    )
    monkeypatch.setattr(predictor._encoded, "encoded", lambda model, queries: many)
    result = predictor.set_image(noise(48, 48)).predict()
    assert result.labels.dtype == np.int32 and result.labels.max() == len(names) - 1
    assert np.asarray(Image.open(result.save_mask(tmp_path / "m.png"))).max() == len(names) - 1
    result.names = names * 2
    with pytest.raises(InputError, match="a mask holds at most 65535 labels and there are 65540"):
        result.save_mask(tmp_path / "m.png")


@pytest.mark.bad_input("operators", "more groups than 16 bits hold")
def test_groups_beyond_sixteen_bits_are_named_as_such():
    with pytest.raises(
        ValueError,
        match="logits has 40000 groups; expected at most 32768 with tables: a pixel's group is "
        "kept in 16 bits",
    ):
        ok.window_argmax(
            torch.zeros(1, 40000, 1, 1),
            [(0, 0)],
            (4, 4),
            (4, 4),
            (4, 4),
            tables=torch.zeros(1, 40000, 2),
        )
    labels = torch.tensor([69999, 3])
    found = ok.window_argmax(
        torch.zeros(1, 2, 1, 1), [(0, 0)], (4, 4), (4, 4), (4, 4), class_labels=labels
    )
    assert found.dtype == torch.int64 and found.unique().tolist() == [69999]


def replace_names(queries, names):
    return ovseg.inference.queries.EncodedQueries(tuple(names), queries.texts, queries.owners)


MEASURE = """
import json, resource, sys
from ovseg.cli.main import main
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
options = ["-m", "clip_dense_tiny", "--labels", "grass,gravel,a red seven,a blue one", "--format", "overlay,mask,json,rle", "--short-side",
           "96", "--scale", "40", "--activation", "softmax", "--background-threshold", "0.1", "--background-entropy", "1.3",
           "--area-threshold", "0.001", "-o", sys.argv[1]]
found = []
for name in sys.argv[2:]:
    assert main(["segment", name, *options]) == 0
    found.append(peak())
print(json.dumps(found))
"""


def test_a_large_picture_is_written_in_blocks(tmp_path):
    """8000 x 7800 in all four formats must stay under 2 GiB: the libraries take 0.6 of them, 25
    bytes a pixel are left. A sixteenth of it here, with every rule of background; what the maps of
    the whole picture take, once each, is 6 + 4 + 4.
    """
    sizes = {"small.png": (480, 440), "large.jpg": (1800, 2200)}
    for name, size in sizes.items():
        noise(size[0] // 40, size[1] // 40).resize(size[::-1]).save(tmp_path / name)
    command = [
        sys.executable,
        "-c",
        MEASURE,
        str(tmp_path / "out"),
        *(str(tmp_path / name) for name in sizes),
    ]
    printed = subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.splitlines()[-1]
    before, after = json.loads(printed)
    more = (after - before) * 2**20
    assert more < 25 * 1800 * 2200 + 64 * 2**20, (
        f"{more / 2**20:.0f} MiB more"
    )  # blocks of a quarter of a million pixels
    labels = np.asarray(Image.open(tmp_path / "out" / "large.mask.png"))
    assert labels.shape == sizes["large.jpg"] and len(np.unique(labels)) > 2
