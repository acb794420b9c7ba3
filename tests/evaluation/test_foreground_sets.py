"""Names asked for alone, masks drawn from instances, and a part of a benchmark."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from miniatures import make
from PIL import Image

import ovseg
from ovseg.cli.main import main
from ovseg.data.benchmark_sets import SegmentationSet, describe
from ovseg.data.check import check_set
from ovseg.data.instance_masks import InstanceFile
from ovseg.errors import DataError, InputError
from ovseg.evaluation.metrics import ConfusionMatrix, FirstNameRight
from ovseg.evaluation.protocols import protocol
from ovseg.libraries import MissingLibrary

PHOTOS = Path(
    os.environ.get("OVSEG_PHOTOS", Path(__file__).parents[2].parent / "shared" / "photos")
)
FOURTEEN = (
    "bottle,car,cat,chair,cow,dining table,dog,horse,motorbike,person,potted plant,sheep,sofa,"
    "tv monitor"
)
THINGS = describe("coco_things").classes
SIZE = (12, 16)


def square(left, top, right, bottom):
    return [left, top, right, top, right, bottom, left, bottom]


def counted(mask):
    """Run lengths of a mask by column, the first of them of zeros."""
    flat = np.concatenate([[0], mask.T.ravel(), [0]])
    edges = np.flatnonzero(np.diff(flat))
    runs = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return [int(run) for run in runs]


def coco_tree():
    """Two pictures: a table with a cup on it, a cat of two parts, a crowd; and nothing at all."""
    crowd = np.zeros(SIZE, bool)
    crowd[8:, 8:] = True
    ids = {name: 100 + i for i, name in enumerate(THINGS)}
    shapes = [
        ("cup", 4, [square(2, 2, 4, 4)], 0),
        ("dining table", 48, [square(0, 0, 8, 6)], 0),
        ("cat", 8, [square(10, 0, 12, 2), square(13, 0, 15, 2)], 0),
        ("person", 200, {"size": list(SIZE), "counts": counted(crowd)}, 1),
        ("dog", 9, [square(9, 9, 12, 12)], 0),
    ]
    return {
        "images": [
            {"id": i, "file_name": f"{i:03}.jpg", "height": SIZE[0], "width": SIZE[1]}
            for i in range(2)
        ],
        "categories": [{"id": ids[name], "name": name} for name in THINGS],
        "annotations": [
            {
                "id": i,
                "image_id": 0,
                "category_id": ids[name],
                "area": area,
                "iscrowd": is_crowd,
                "segmentation": shape,
            }
            for i, (name, area, shape, is_crowd) in enumerate(shapes)
        ],
    }


def labels():
    """What the first picture's truth must be."""
    truth = np.full(SIZE, -1)
    truth[:6, :8] = THINGS.index("dining table")
    truth[2:4, 2:4] = THINGS.index("cup")
    truth[:2, 10:12] = truth[:2, 13:15] = THINGS.index("cat")
    truth[9:12, 9:12] = THINGS.index("dog")
    return truth


@pytest.fixture
def coco(tmp_path):
    return write(tmp_path, coco_tree())


def write(root, tree):
    (root / "coco" / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "coco" / "val2017").mkdir(exist_ok=True)
    text = tree if isinstance(tree, str) else json.dumps(tree)
    (root / "coco" / "annotations" / "instances_val2017.json").write_text(text)
    for i in range(2):
        picture = np.full((*SIZE, 3), 90 * i, np.uint8)
        Image.fromarray(picture).save(root / "coco" / "val2017" / f"{i:03}.jpg")
    return root


def test_masks_are_drawn(coco):
    """Small things lie on large ones, crowds below everything; neither they nor what is left
    counts.
    """
    data = SegmentationSet("coco_things", coco)
    assert [item.key for item in data.items] == ["000", "001"]
    image, truth = data[0]
    assert image.size == SIZE[::-1] and np.array_equal(truth, labels())
    assert (data[1][1] == -1).all()
    some = SegmentationSet("coco32", coco / "coco")[0][1]
    names = describe("coco32").classes
    expected = np.full(SIZE, -1)
    for name in ("dining table", "cup", "cat", "dog"):
        expected[labels() == THINGS.index(name)] = names.index(name)
    assert np.array_equal(some, expected)


def test_run_lengths_of_both_forms(coco):
    """Lists, and texts as pycocotools packs them."""
    from pycocotools import mask as tools

    rng = np.random.default_rng(0)
    for form in (list, str):
        tree = coco_tree()
        masks = []
        for i, entry in enumerate(tree["annotations"]):
            mask = rng.random(SIZE) < (0.02, 0.5, 0.5, 0.9, 0.98)[i]
            masks.append(mask)
            packed = tools.encode(np.asfortranarray(mask.astype(np.uint8)))
            shape = {"size": list(SIZE), "counts": packed["counts"].decode()}
            if form is list:
                shape["counts"] = counted(mask)
            entry |= {"segmentation": shape, "iscrowd": 0, "area": 10 - i}
        write(coco, tree)
        found = SegmentationSet("coco_things", coco)[0][1]
        expected = np.full(SIZE, -1)
        for entry, mask in zip(tree["annotations"], masks, strict=True):
            expected[mask] = entry["category_id"] - 100
        assert np.array_equal(found, expected)


def changed(change):
    tree = coco_tree()
    change(tree)
    return tree


def shaped(shape, what="annotation 0 cannot be drawn: "):
    return changed(lambda t: t["annotations"][0].update(segmentation=shape)), what


@pytest.mark.bad_input("evaluation", "instances in JSON")
@pytest.mark.parametrize(
    "tree,message",
    [
        ("{", "is no JSON: .*; expected COCO's instances"),
        ("[]", "holds no list of images; expected COCO's instances"),
        (changed(lambda t: t.pop("categories")), "holds no list of categories"),
        (
            changed(lambda t: t["images"].append(t["images"][0])),
            r"the image 0 \(000.jpg\) stands twi",
        ),
        (
            changed(lambda t: t["images"][1].update(file_name="000.png")),
            r"image 1 \(000.png\) stands",
        ),
        (changed(lambda t: t["images"][0].update(height="12")), "height of the entry 0 is '12'"),
        (changed(lambda t: t["images"][0].update(width=0)), "000.jpg is 0x12; expected a positive"),
        (changed(lambda t: t["images"].append(3)), "holds '3' where an object is expected"),
        (
            changed(lambda t: t["categories"].pop()),
            "has no category 'toothbrush'; expected all of 80",
        ),
        (
            changed(lambda t: t["categories"].append(t["categories"][0])),
            "category id 100 stands twice",
        ),
        (
            changed(lambda t: t["annotations"].append(t["annotations"][0])),
            "annotation id 0 stands twi",
        ),
        (
            changed(lambda t: t["annotations"][0].update(image_id=7)),
            "0 is of image 7, which it does",
        ),
        (
            changed(lambda t: t["annotations"][0].update(category_id=7)),
            "0 is of category 7, which it",
        ),
        (
            changed(lambda t: t["annotations"][0].update(area="big")),
            "area of annotation 0 is 'big'",
        ),
        shaped(None),
        shaped([]),
        shaped([[1, 2, 3, 4]], "a polygon has 4 numbers; expected polygons"),
        shaped([[1, 2, 3, 4, 5, 6, 7]], "a polygon has 7 numbers"),
        shaped([[1, 2, 3, 4, 5, "x"]]),
        shaped([[1, 2, 3, 4, 5, float("nan")]], "a polygon holds NaN"),
        shaped([[[1, 2], [3, 4], [5, 6]]], "a polygon has 6 numbers"),
        shaped(
            {"size": [3, 3], "counts": [9]}, r"it has the size \[3, 3\] and the picture \[12, 16\]"
        ),
        shaped({"size": list(SIZE), "counts": [9]}, "its counts add up to 9"),
        shaped(
            {"size": list(SIZE), "counts": [-8, 200]}, "its counts are no list of whole numbers"
        ),
        shaped({"size": list(SIZE), "counts": "0"}, "its counts add up to 0"),
        shaped({"size": list(SIZE), "counts": "P"}, "its counts end too early"),
        shaped({"size": list(SIZE), "counts": "!"}, "its counts hold the letter '!'"),
        shaped({"size": list(SIZE)}),
    ],
)
def test_bad_instances(tmp_path, tree, message):
    write(tmp_path, tree)
    with pytest.raises(DataError, match=message) as raised:
        SegmentationSet("coco_things", tmp_path)[0]
    assert "\n" not in str(raised.value) and "instances_val2017.json" in str(raised.value)


def test_what_lies_outside_of_a_picture_is_cut_off(coco):
    far = [-1e9, -1e9, 1e9, -1e9, 1e9, 1e9, -1e9, 1e9]
    tree = changed(lambda t: t["annotations"][0].update(segmentation=[far], area=1e18))
    truth = SegmentationSet("coco_things", write(coco, tree))[0][1]
    assert (truth[labels() == -1] == THINGS.index("cup")).all()


def test_sizes_and_libraries(coco, monkeypatch):
    data = SegmentationSet("coco_things", coco, max_pixels=100)
    with pytest.raises(DataError, match=r"val2017.json: 000 is 16x12; the limit is 100 pixels"):
        data.read_mask(data.items[0])
    Image.new("RGB", (5, 5)).save(coco / "coco" / "val2017" / "000.jpg")
    with pytest.raises(DataError, match=r"is 16x12 and .*000.jpg is 5x5; expected one size"):
        SegmentationSet("coco_things", coco)[0]
    path = coco / "coco" / "annotations" / "instances_val2017.json"
    with pytest.raises(DataError, match="255 classes are to be drawn; expected at most 254"):
        InstanceFile(path, tuple(map(str, range(255))))
    with pytest.raises(DataError, match="does not list the picture 'x'"):
        InstanceFile(path, THINGS).draw("x", 1000)
    monkeypatch.setattr("ovseg.libraries.find_spec", lambda name: None)
    with pytest.raises(MissingLibrary, match=r"needs pycocotools, .* 'ovseg-kernels\[coco\]'"):
        InstanceFile(path, THINGS)


def test_check_and_convert(coco, capsys):
    """A whole folder, one with a picture less, and conversion, which is for masks in files."""
    command = ["data", "check", "coco_things", "--root", str(coco)]
    assert main(command) == 1 and "WRONG: 2 pictures, 5000 are published" in capsys.readouterr().out
    assert main([*command, "--partial"]) == 0
    out = capsys.readouterr().out
    assert "partial: 2 of 5000" in out and "nothing wrong found" in out
    (coco / "coco" / "val2017" / "001.jpg").unlink()
    assert main(command) == 1 and "001.jpg' does not exist" in capsys.readouterr().out
    assert main([*command, "--partial"]) == 0
    assert "partial: 1 of 5000" in capsys.readouterr().out
    assert main(["data", "convert", "coco_things", "--root", str(coco)]) == 2
    assert "masks are drawn from annotations/instances_val2017.json" in capsys.readouterr().err


def test_a_part_of_a_benchmark(tmp_path, capsys):
    """Without the option an error as ever; with it what is there, and one line that says so."""
    make(tmp_path, "voc21", 5)
    folder = tmp_path / "VOCdevkit/VOC2012"
    for name in ("JPEGImages/2008_000001.jpg", "SegmentationClass/2008_000001.png"):
        (folder / name).unlink()
    command = ["eval", "clip_dense_tiny", "--data", "voc21", "--root", str(tmp_path)]
    command += ["--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(command) == 1 and "2008_000001.jpg' does not exist" in capsys.readouterr().err
    assert main([*command, "--partial"]) == 0
    assert "voc21: partial: 4 of 1449 pictures are there" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]
    assert results["partial"] == "4 of 1449" and results["pictures"] == 4
    # A picture whose mask alone is missing is no part that was left away: it is named.
    (folder / "SegmentationClass/2008_000002.png").unlink()
    (folder / "JPEGImages/2008_000003.jpg").unlink()
    data = SegmentationSet("voc21", tmp_path, partial=True)
    assert data.partial == "2 of 1449" and [item.key[-1] for item in data.items] == ["0", "4"]
    report = check_set(data)
    assert len(report.problems) == 2 and "000002.png is not" in report.problems[0]
    assert "000003.png is there and its picture" in report.problems[1]
    for i in (0, 4):
        (folder / f"JPEGImages/2008_00000{i}.jpg").unlink()
    with pytest.raises(DataError, match=r"of 5 pictures none is in .* with its mask"):
        SegmentationSet("voc21", tmp_path, partial=True)


def test_a_whole_benchmark_is_no_part(tmp_path):
    """Of a set of which no number is published, all that is listed is the whole."""
    make(tmp_path, "ade150", 2)
    (tmp_path / "mine.yaml").write_text("title: mine\nlike: ade150\nsplits: {val: {}}\n")
    data = SegmentationSet(str(tmp_path / "mine.yaml"), tmp_path, partial=True)
    assert data.partial is None and len(data) == 2 and data.halves == []


def test_names_alone(tmp_path):
    """Labels in the order asked for; pixels of any other class, and of the background, are not
    counted.
    """
    truths = make(tmp_path, "voc21")
    every = describe("voc21").classes
    data = SegmentationSet("voc14", tmp_path)
    about = data.description
    assert ",".join(data.classes) == FOURTEEN and about.foreground and not about.background
    assert about.unseen == () and set(about.shares) <= set(about.classes)
    assert list(about.label_set.queries) == FOURTEEN.split(",")
    expected = np.full_like(truths, -1)
    for label, name in enumerate(about.classes):
        expected[truths == every.index(name.replace(" ", ""))] = label
    assert all(np.array_equal(data[i][1], expected[i]) for i in range(4))
    for name in ("voc21", "voc20"):
        alone = describe(name).alone(["Dining Table", "cat"])
        assert alone.classes == ("diningtable", "cat") and alone.name == f"{name}_only_2"
        assert alone.number == 2 and not alone.background and alone.foreground
        found = SegmentationSet(name, tmp_path, description=alone)[0][1]
        expected = np.full_like(truths[0], -1)
        for label, one in enumerate(alone.classes):
            expected[truths[0] == every.index(one)] = label
        assert np.array_equal(found, expected)
    again = describe("voc14").alone(["dog", "dining table"])
    assert again.classes == ("dog", "dining table") and again.like == "voc20"


@pytest.mark.parametrize(
    "names,message",
    [
        (
            ["cat", "unicorn"],
            "only names 'unicorn'; expected some of 20 classes, without the backgr",
        ),
        (["background"], "only names 'background'"),
        (["cat", "Cat"], "only names 'cat' twice"),
        ([], r"only is \[\]; expected some of"),
        ([""], "only names ''"),
    ],
)
def test_names_that_cannot_be(names, message):
    with pytest.raises(InputError, match=message):
        describe("voc21").alone(names)


def test_a_description_of_names_alone(tmp_path):
    for only, message in (("cat", "only is 'cat'"), ("[cat, cat]", "only names 'cat' twice")):
        (tmp_path / "mine.yaml").write_text(f"title: mine\nlike: voc20\nonly: {only}\n")
        with pytest.raises(InputError, match=message):
            describe(str(tmp_path / "mine.yaml"))
    two = "- {path: a.json, values: {start: 1, ignore: [0]}}\n- {path: 'b/{}.png', values: {start: 1}}"
    (tmp_path / "mine.yaml").write_text(f"title: mine\nlike: voc20\nmasks:\n{two}\n")
    with pytest.raises(InputError, match=r"masks are drawn from a .json and lie in other files"):
        describe(str(tmp_path / "mine.yaml"))


def test_protocols_for_names_alone():
    """What a protocol says about a set holds where some of its classes are asked for alone."""
    model = ovseg.create_model("clip_dense_tiny")
    chosen = protocol("sclip", describe("voc20").alone(["tvmonitor", "cat"]), model)
    assert chosen.labels.names == ("tvmonitor", "cat") and len(chosen.labels.texts[0]) == 5
    assert chosen.view.short_side == 336
    assert protocol("sclip", describe("voc14"), model).view.short_side == 336
    assert "all others are ignored" in chosen.choices(model, describe("voc14"))["counted"]
    stuff = protocol("stuff", describe("voc21"), model)
    assert len(stuff.queries.background) == 53 and "sky" in stuff.queries.background
    assert not protocol("stuff", describe("voc14"), model).queries.background


def test_the_first_name():
    """The largest labelled area of the pixels that count; ties go to the first class."""
    first = FirstNameRight(-1)
    wide = np.array([[2, 2, 2, 1]])
    first.update(wide, np.array([[-1, -1, 2, 1]]))  # right: both are there
    first.update(wide, np.array([[-1, -1, -1, 1]]))  # right: 2 lies where nobody asked
    first.update(wide, np.array([[1, 1, 0, 1]]))  # wrong: most of it is not there
    first.update(wide, np.full((1, 4), -1))  # says nothing
    first.update(np.full((1, 4), -1), np.array([[0, 1, 2, 2]]))  # wrong: no label
    first.update(np.array([[1, 1, -1, -1]]), np.array([[-1, -1, 1, 1]]))  # wrong: none that counts
    first.update(np.array([[0, 1, 1, 0]]), np.array([[0, 2, 2, 2]]))  # right: 0 comes first
    first.update(np.array([[0, 1, 1, 0]]), np.array([[1, 2, 2, 2]]))  # wrong: 0 comes first
    assert first.counts.tolist() == [3, 7] and first.share() == pytest.approx(300 / 7)
    first = FirstNameRight(-1, background=True)
    assert np.isnan(first.share())
    first.update(np.array([[2, 2, 0, 1]]), np.array([[0, 0, 0, 1]]))  # the background is no name
    first.update(np.array([[0, 0, 0, 1]]), np.zeros((1, 4), int))
    assert first.counts.tolist() == [1, 1]


def test_the_mean_over_names_that_occur():
    matrix = ConfusionMatrix(["a", "b", "c"])
    matrix.update(np.array([0, 0, 1, 2]), np.array([0, 0, 1, 1]))
    assert matrix.scores().miou == pytest.approx(50)
    assert matrix.scores().occurring_miou == pytest.approx(75)


def test_the_command(tmp_path, capsys):
    """Foreground figures, for sets of their own and for names that a user gives."""
    make(tmp_path, "voc21", 3)
    command = ["eval", "clip_dense_tiny", "--root", str(tmp_path), "--device", "cpu"]
    command += ["--out", str(tmp_path / "out"), "--data"]
    summaries = []
    for data, names in (("voc14", None), ("voc20", FOURTEEN), ("voc21", FOURTEEN)):
        assert main([*command, data, *(["--classes-only", names] if names else [])]) == 0
        report = json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]
        assert len(report["classes"]) == 14 and "partial" not in report
        summaries.append(report["summary"])
        assert summaries[-1].pop("data") == (data if names is None else f"{data}_only_14")
    assert {"occurring_miou", "first_name_right", "pixel_accuracy"} <= set(summaries[0])
    # voc20 also tells seen classes from unseen ones.
    assert summaries[2].items() <= summaries[1].items()
    assert "first name right %" in capsys.readouterr().out
    for arguments, message in (
        (["voc21", "--classes-only", "unicorn"], "only names 'unicorn'"),
        (
            ["digits", "--classes-only", "cat"],
            "--classes-only is given and data is 'digits', which",
        ),
        (["digits", "--partial"], "--partial is given and data is 'digits', which is drawn"),
        (["imagefolder", "--partial"], "--partial is given and data is 'imagefolder'"),
    ):
        assert main([*command, *arguments]) == 2 and message in capsys.readouterr().err


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photographs in {PHOTOS}")
def test_photographs():
    """Masks that are drawn are those that were drawn elsewhere, but for the rims; parts of VOC."""
    data = SegmentationSet("coco_things", PHOTOS / "coco_masks", partial=True)
    assert data.partial == "206 of 5000" and data.halves == []
    differ = 0
    pixels = 0
    for i in range(0, 206, 10):
        truth = data[i][1]
        other = PHOTOS / "coco_masks" / "semantic" / "val2017" / f"{data.items[i].key}.png"
        values = np.asarray(Image.open(other)).astype(int)
        differ += int((np.where(values == 255, 0, values) - 1 != truth).sum())
        pixels += truth.size
    assert differ < 0.01 * pixels
    voc = SegmentationSet("voc14", PHOTOS / "voc", partial=True)
    assert voc.partial == "223 of 1449" and len(voc) == 223 and voc[0][1].max() < 14
