"""Benchmarks on disk: every layout, what their values mean, what data check finds, conversion,
damaged and hostile files.
"""

import io
import zlib

import numpy as np
import pytest
import torchvision
from miniatures import LAYOUTS, REMOVED, make, png, values_of
from PIL import Image

from ovseg.cli.main import main
from ovseg.data.benchmark_sets import SegmentationSet, describe, list_sets
from ovseg.data.check import check_set
from ovseg.errors import DataError, InputError


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read(tmp_path, name):
    truths = make(tmp_path, name)
    for root in (
        tmp_path,
        SegmentationSet(name, tmp_path).root,
    ):  # the data root, or the set's own folder
        data = SegmentationSet(name, root)
        assert len(data) == 4
        for i in range(4):
            image, truth = data[i]
            assert image.size == (60, 40) and np.array_equal(truth, truths[i])


def test_names_that_torchvision_knows():
    voc = [
        c
        for c in torchvision.models.segmentation.FCN_ResNet50_Weights.DEFAULT.meta["categories"]
        if c != "__background__"
    ]
    assert list(describe("voc20").classes) == voc
    coco = torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
    things = [name for name in coco if name not in ("N/A", "__background__")]
    assert (
        list(describe("coco_object").classes[1:])
        == things
        == list(describe("coco_stuff").classes[:80])
    )
    removed = [
        i for i, name in enumerate(coco[1:]) if name == "N/A"
    ]  # ids begin at 1, values of the maps at 0
    assert removed == [value for value in REMOVED if value < 90]


def test_ids_that_papers_name():
    stuff = dict(
        zip(
            describe("coco_stuff").unseen,
            (19, 23, 28, 29, 36, 51, 76, 88, 94, 112, 133, 136, 137, 157, 160),
            strict=True,
        )
    )
    assert all(describe("coco_stuff").classes[i] == name for name, i in stuff.items())
    context = dict(
        zip(describe("context59").unseen, (19, 33, 48, 14, 7, 24, 6, 54, 31, 0), strict=True)
    )
    assert all(describe("context59").classes[i] == name for name, i in context.items())
    flat = describe(
        "context60_zeroshot"
    )  # ZegCLIP's 50 seen and 10 unseen classes, the background one of them
    assert (
        flat.classes == describe("context60").classes
        and flat.unseen == describe("context59").unseen
        and not flat.background
    )
    assert [describe("voc20").classes.index(name) for name in describe("voc20").unseen] == [
        15,
        16,
        17,
        18,
        19,
    ]
    counts = {name: describe(name).number for name in list_sets()}
    assert counts == {
        "ade150": 150,
        "ade847": 847,
        "cityscapes": 19,
        "coco32": 32,
        "coco_object": 81,
        "coco_stuff": 171,
        "coco_things": 80,
        "context59": 59,
        "context60": 60,
        "context60_zeroshot": 60,
        "voc14": 14,
        "voc20": 20,
        "voc21": 21,
    }
    assert all(
        len(set(describe(name).classes)) == len(describe(name).classes) for name in list_sets()
    )


def test_other_forms_of_the_same_masks(tmp_path):
    """COCO's maps as published, converted ones, and Cityscapes' label ids; conversion writes what
    is then preferred.
    """
    truths = make(tmp_path, "coco_stuff")
    objects = SegmentationSet("coco_object", tmp_path)
    assert objects.layout.path == "annotations/val2017/{}.png"
    expected = np.where(
        (truths >= 0) & (truths < 80), truths + 1, 0
    )  # stuff and unlabelled pixels are background
    assert all(np.array_equal(objects[i][1], expected[i]) for i in range(4))
    for name in ("coco_object", "coco_stuff"):
        before = [SegmentationSet(name, tmp_path)[i][1] for i in range(4)]
        assert main(["data", "convert", name, "--root", str(tmp_path)]) == 0
        after = SegmentationSet(name, tmp_path)
        assert after.layout.path.endswith("TrainIds.png") and all(
            np.array_equal(after[i][1], before[i]) for i in range(4)
        )
    assert (
        main(["data", "convert", "coco_stuff", "--root", str(tmp_path)]) == 2
    )  # nothing left to do
    make(tmp_path, "cityscapes", 1)
    ids = np.array(
        [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33, 0, 6, 30, 255],
        np.uint8,
    )
    folder = tmp_path / "cityscapes/gtFine/val/city0"
    (folder / "city0_000_gtFine_labelTrainIds.png").unlink()
    Image.fromarray(np.resize(ids, (40, 60))).save(folder / "city0_000_gtFine_labelIds.png")
    assert np.array_equal(
        SegmentationSet("cityscapes", tmp_path)[0][1],
        np.resize([*range(19), -1, -1, -1, -1], (40, 60)),
    )


def test_a_set_of_ones_own(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "pictures" / "a.png")
    Image.fromarray(np.array([[10, 20, 9]] * 4, np.uint8).repeat(2, 1)).save(
        tmp_path / "masks" / "a_m.png"
    )
    text = (
        "title: mine\nimages: pictures/{}.png\nsplits: {all: {}}\nbackground: false\nclasses: "
        "[cat, dog]\n"
        "texts: {dog: a good dog}\nmasks: [{path: 'masks/{}_m.png', values: {map: {10: 0, 20: 1}, "
        "ignore: [9]}}]\n"
    )
    (tmp_path / "mine.yaml").write_text(text)
    data = SegmentationSet(str(tmp_path / "mine.yaml"), tmp_path, "all")
    assert data[0][1].tolist() == [
        [0, 0, 1, 1, -1, -1]
    ] * 4 and data.description.label_set.texts == (("cat",), ("a good dog",))
    for broken, message in (
        (text.replace("title", "titel"), "KeyError"),
        ("[1]", "holds a list"),
        (text.replace("ma: ", "x"), "splits"),
        (text.replace("{dog:", "{frog:"), "'frog' is none of the classes"),
    ):
        (tmp_path / "mine.yaml").write_text(broken)
        if broken != text:
            with pytest.raises(InputError, match=message):
                describe(str(tmp_path / "mine.yaml"))


def test_ade847_needs_names_and_reads_16_bits(tmp_path):
    folder = tmp_path / "ADE20K_2021_17_01"
    for sub in ("images_detectron2", "annotations_detectron2"):
        (folder / sub / "validation").mkdir(parents=True)
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(
        folder / "images_detectron2/validation/a.jpg"
    )
    Image.fromarray(np.array([[0, 846, 65535], [300, 1, 2]], np.uint16)).save(
        folder / "annotations_detectron2/validation/a.tif"
    )
    data = SegmentationSet("ade847", tmp_path)
    assert data[0][1].tolist() == [[0, 846, -1], [300, 1, 2]]
    with pytest.raises(
        InputError,
        match="ade847 comes without class names; expected them in a file, --labels-file, 847",
    ):
        _ = data.description.label_set


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n not in ("voc20", "context60")])
def test_check_finds_shifted_labels(tmp_path, name):
    good, low, high = (tmp_path / part for part in ("good", "low", "high"))
    for root, shift in ((good, 0), (low, -1), (high, 1)):
        make(root, name, shift=shift)
        report = check_set(SegmentationSet(name, root))
        if shift == 0:
            assert report.shift == 0 and not report.problems and not report.invalid
            assert [line for line in report.wrong if "are published" not in line] == []
        else:
            assert report.shift == shift and any(
                f"shifted by {shift:+d}" in line for line in report.wrong
            ), str(report)


@pytest.mark.bad_input(
    "evaluation", "files of a benchmark that are missing, damaged or of unequal size"
)
def test_check_finds_what_is_missing_damaged_and_unequal(tmp_path, capsys):
    make(tmp_path, "ade150", 8)
    folder = tmp_path / "ade/ADEChallengeData2016"
    images, masks = folder / "images/validation", folder / "annotations/validation"
    (masks / "2008_000000.png").unlink()
    (images / "2008_000001.jpg").write_bytes((images / "2008_000001.jpg").read_bytes()[:300])
    (masks / "2008_000002.png").write_bytes(b"no picture")
    (masks / "2008_000003.png").write_bytes(png(np.ones((40, 61), np.uint8)))
    (masks / "2008_000004.png").write_bytes(png(np.full((40, 60), 151, np.uint8)))
    (masks / "2008_000005.png").write_bytes(png(np.zeros((40, 60, 3), np.uint8)))
    assert (
        main(
            ["data", "check", "ade150", "--root", str(tmp_path), "--out", str(tmp_path / "report")]
        )
        == 1
    )
    printed = capsys.readouterr().out
    for expected in (
        "000000.png is missing",
        "cannot decode",
        "2008_000002.png",
        "61x40 and its picture 60x40",
        "value 151 on 2400 pixels is no class",
        "is a RGB picture; expected class indices",
        "5 files are missing, damaged or of unequal size",
        "8 pictures, 2000 are published",
    ):
        assert expected in printed, expected
    assert (tmp_path / "report" / "ade150_val.json").is_file() and Image.open(
        tmp_path / "report" / "ade150_val.png"
    ).width > 500
    assert main(["data", "check", "ade150", "--root", str(tmp_path), "--sample", "1"]) == 1
    with pytest.raises(
        DataError, match="holds the value 151 on 2400 pixels, which is no class of ade150"
    ):
        SegmentationSet("ade150", tmp_path)[4]
    with pytest.raises(DataError, match="expected one size"):
        SegmentationSet("ade150", tmp_path)[3]


def test_where_nothing_is(tmp_path):
    with pytest.raises(DataError, match=r"val\.txt is in none of .*VOCdevkit/VOC2012"):
        SegmentationSet("voc21", tmp_path)
    make(tmp_path, "voc21", 2)
    with pytest.raises(InputError, match="split is 'test'; voc21 has val, train, trainaug"):
        SegmentationSet("voc21", tmp_path, "test")
    with pytest.raises(DataError, match=r"train\.txt is in none of"):
        SegmentationSet("voc21", tmp_path, "train")
    for mask in (tmp_path / "VOCdevkit/VOC2012/SegmentationClass").iterdir():
        mask.unlink()
    with pytest.raises(DataError, match="no mask of 2 pictures"):
        SegmentationSet("voc21", tmp_path)
    with pytest.raises(InputError, match="data set is 'voc12'; expected one of"):
        describe("voc12")


@pytest.mark.parametrize(
    "kind", ["palette", "grey", "one bit", "cut", "bomb", "coloured", "signed"]
)
def test_masks_of_every_kind(tmp_path, kind):
    make(tmp_path, "voc21", 1)
    path = tmp_path / "VOCdevkit/VOC2012/SegmentationClass/2008_000000.png"
    labels = np.resize(np.arange(21, dtype=np.uint8), (40, 60))
    buffer = io.BytesIO()
    if kind == "palette":
        picture = Image.fromarray(labels, "P")
        picture.putpalette(list(range(255, -1, -1)) * 3)
        picture.save(path)
    elif kind == "one bit":
        labels = labels % 2
        Image.fromarray(labels.astype(bool)).save(path)
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:90])
    elif kind == "bomb":
        Image.new("L", (1, 1)).save(buffer, "PNG")
        data = bytearray(buffer.getvalue())
        data[16:24] = (60000).to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        path.write_bytes(data)
    elif kind == "coloured":
        Image.fromarray(np.stack([labels] * 3, -1)).save(path)
    elif kind == "signed":
        Image.fromarray(np.full((40, 60), -5, np.int32)).save(path.with_suffix(".tif"))
        path.write_bytes(path.with_suffix(".tif").read_bytes())
    else:
        Image.fromarray(labels).save(path)
    data = SegmentationSet("voc21", tmp_path)
    if kind in ("palette", "grey", "one bit"):
        assert np.array_equal(data[0][1], labels)
    else:
        with pytest.raises(DataError, match=r"2008_000000\.png"):
            data[0]


def test_values_of_the_miniatures_are_the_sets_own():
    """The miniatures do not copy the reader: their values are worked out on their own."""
    assert (
        values_of("coco_stuff")[11:14] == [12, 13, 14]
        and values_of("coco_stuff")[-1] == 181
        and values_of("ade150")[0] == 1
    )
