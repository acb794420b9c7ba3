"""Data sets as users have them: lists of every form, keys with spaces, turned pictures, masks of
the wrong kind; what data check says.
"""

import json

import numpy as np
import pytest
from miniatures import make, png
from PIL import Image, ImageOps

from ovseg.cli.main import main
from ovseg.data.benchmark_sets import SegmentationSet, describe, read_list
from ovseg.data.check import check_set
from ovseg.data.images import read_image, upright
from ovseg.errors import DataError, InputError

VOC = "VOCdevkit/VOC2012"
LIST = f"{VOC}/ImageSets/Segmentation/val.txt"


def bad(what):
    return pytest.mark.bad_input("data", what)


def own_set(root, keys, *, size=(8, 8), listed=None, orientation=1, mask_of=None, **changes):
    """A set of one's own: pictures whose left half is class 0 and whose right half is class 1 as
    they are stored.
    """
    (root / "p").mkdir(exist_ok=True)
    (root / "m").mkdir(exist_ok=True)
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[:, size[1] // 2 :] = 200
    pixels[: size[0] // 2] += 30  # the upper half is lighter
    stored = (pixels[..., 0] > 100).astype(np.uint8) + 2 * (pixels[..., 0] % 50 == 30).astype(
        np.uint8
    )
    for key in keys:
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(root / "p" / f"{key}.png", exif=exif)
        (root / "m" / f"{key}.png").write_bytes(png(stored if mask_of is None else mask_of(stored)))
    text = {
        "title": "mine",
        "images": "p/{}.png",
        "splits": {"val": {} if listed is None else {"list": "list.txt"}},
        "background": False,
        "classes": ["a", "b", "c", "d"],
        "masks": [{"path": "m/{}.png", "values": {"start": 0, "ignore": [255]}}],
        **changes,
    }
    (root / "mine.yaml").write_text(json.dumps(text))
    if listed is not None:
        (root / "list.txt").write_text("".join(f"{line}\n" for line in listed))
    return str(root / "mine.yaml"), stored


FORMS = {  # a line of a list -> its key, where a, a b, a.png and c/d are pictures
    "a key": ("a", "a"),
    "a key with a space": ("a b", "a b"),
    "a key with two spaces": ("a  b", "a  b"),
    "a key that ends like a picture": ("a.png", "a.png"),
    "a key in a folder": ("c/d", "c/d"),
    "a key that ends like a flag": ("e 1", "e 1"),
    "a picture's name": ("e.png", "e"),
    "a picture's name in capitals": ("e.PNG", "e"),
    "the name before it was converted": ("e.jpg", "e"),
    "a picture with its folder": ("/p/a b.png", "a b"),
    "a picture with a longer path": ("/data/mine/p/c/d.png", "c/d"),
    "picture and mask": ("/p/e.png /m/e.png", "e"),
    "picture and mask, with spaces": ("p/a b.png m/a b.png", "a b"),
    "a key twice": ("e e", "e"),
    "a key and a flag": ("a -1", "a"),
    "a key that is not there": ("no such", "no such"),
    "space around a key": ("  a b \r", "a b"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_line_is_a_key(tmp_path, form):
    for key in ("a", "a b", "a  b", "a.png", "c/d", "e 1", "e"):
        (tmp_path / "p" / f"{key}.png").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / f"{key}.png").write_bytes(b"x")
    line, key = FORMS[form]
    (tmp_path / "list.txt").write_bytes(f"{line}\n".encode())
    assert read_list(tmp_path / "list.txt", tmp_path, "p/{}.png").keys == [key]


@bad("keys with spaces in a list")
def test_keys_with_spaces_are_pictures_of_their_own(tmp_path, capsys):
    name, _ = own_set(tmp_path, ["a", "a b"], listed=["a", "a b"])
    data = SegmentationSet(name, tmp_path)
    assert [item.key for item in data.items] == ["a", "a b"] and data.listed.repeated == {}
    assert main(["data", "check", name, "--root", str(tmp_path)]) == 0
    assert "2 pictures in" in (said := capsys.readouterr().out) and "nothing wrong found" in said


@bad("keys that stand twice in a list")
def test_repeated_keys_count_once_and_are_named(tmp_path, capsys, caplog):
    name, _ = own_set(tmp_path, ["a", "b"], listed=["a", "b", "a.png"])
    assert len(SegmentationSet(name, tmp_path)) == 2
    assert "1 keys stand several times in the list and count once, the first: 'a'" in caplog.text
    assert main(["data", "check", name, "--root", str(tmp_path)]) == 1
    assert "the key 'a' stands 2 times in the list" in capsys.readouterr().out


@bad("a list that names picture and mask of different keys")
def test_unmatched_keys_are_named(tmp_path, capsys):
    name, _ = own_set(tmp_path, ["a", "b"], listed=["p/a.png m/b.png", "p/b.png m/b.png", "lost"])
    assert main(["data", "check", name, "--root", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "'p/a.png m/b.png' names a picture and a mask of different keys" in said
    assert "p/lost.png' does not exist" in said and "m/lost.png is missing" in said


@bad("masks without a picture, pictures that the set leaves out")
def test_what_lies_beside_the_set_is_named(tmp_path, capsys):
    name, _ = own_set(tmp_path, ["a", "b"])
    Image.open(tmp_path / "p" / "a.png").save(tmp_path / "p" / "c.JPG", "JPEG")
    (tmp_path / "p" / "d.heic").write_bytes(b"x")
    (tmp_path / "p" / "._a.png").write_bytes(b"x")
    (tmp_path / "m" / "e.png").write_bytes(png(np.zeros((8, 8), np.uint8)))
    (tmp_path / "m" / "a_labelTrainIds.png").write_bytes(
        png(np.zeros((8, 8), np.uint8))
    )  # another layout's
    assert main(["data", "check", name, "--root", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    for expected in (
        "c.JPG is left out: pictures of the set are p/{}.png",
        "pictures that end in .heic are not read",
        "m/e.png is a mask without a picture",
        "3 files are missing, damaged",
    ):
        assert expected in said, expected
    assert "labelTrainIds" not in said and "._a" not in said


@pytest.mark.parametrize(
    "data,message",
    [
        pytest.param(b"", "list.txt' is empty", marks=bad("an empty list of a set")),
        pytest.param(
            b"a\n\xff\xfe\n",
            "list.txt' is no UTF-8 text, line 2",
            marks=bad("a list of a set that is not UTF-8"),
        ),
    ],
)
def test_lists_that_cannot_be_read(tmp_path, data, message):
    name, _ = own_set(tmp_path, ["a"], listed=["a"])
    (tmp_path / "list.txt").write_bytes(data)
    with pytest.raises(DataError, match=message):
        SegmentationSet(name, tmp_path)


@pytest.mark.parametrize(
    "orientation",
    [
        pytest.param(i, marks=bad(f"a picture of EXIF orientation {i} with a mask"))
        for i in range(2, 9)
    ],
)
def test_turned_pictures_and_masks_of_both_kinds(tmp_path, orientation, capsys):
    """Masks on stored and on upright pixels, square and oblong: both agree with the picture to the
    last pixel.
    """
    for size in ((8, 8), (6, 10)):
        for made_on in ("stored", "upright"):
            root = tmp_path / f"{made_on}{size[1]}"
            root.mkdir()
            turn = None if made_on == "stored" else lambda mask: upright(mask, orientation)
            name, stored = own_set(
                root, ["a"], size=size, orientation=orientation, mask_of=turn, masks_made_on=made_on
            )
            image, truth = SegmentationSet(name, root)[0]
            red = np.asarray(image)[..., 0]
            assert np.array_equal(truth, (red > 100) + 2 * (red % 50 == 30)) and truth.shape == (
                image.height,
                image.width,
            )
            assert not np.array_equal(truth, stored)
            assert (
                main(["data", "check", name, "--root", str(root)]) == 0
            )  # the description says which
            assert f"a.png ({orientation})" in capsys.readouterr().out
    name, _ = own_set(tmp_path, ["a", "b"], orientation=orientation)
    assert main(["data", "check", name, "--root", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert (
        f"a.png ({orientation}), " in said
        and "2 pictures have an EXIF orientation" in said
        and "expected masks_made_on" in said
    )


def test_upright_is_what_pillow_does():
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3), np.uint8)
    for orientation in range(1, 9):
        image = Image.fromarray(pixels)
        image.getexif()[0x0112] = orientation
        assert np.array_equal(
            np.asarray(ImageOps.exif_transpose(image)), upright(pixels, orientation)
        )
        assert np.array_equal(np.asarray(read_image(image)), upright(pixels, orientation))


def test_a_benchmark_with_masks_on_stored_pixels(tmp_path):
    """Two lines of YAML say it; like may lead on to another like."""
    truths = make(tmp_path, "voc20", 1)
    (tmp_path / "stored.yaml").write_text("like: voc20\nmasks_made_on: stored\n")
    data = SegmentationSet(str(tmp_path / "stored.yaml"), tmp_path)
    assert (
        np.array_equal(data[0][1], truths[0])
        and data.description.classes == describe("voc20").classes
    )
    path = tmp_path / VOC / "JPEGImages" / "2008_000000.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)
    assert np.array_equal(data[0][1], upright(truths[0], 6))


@bad("a mask with an EXIF orientation of its own")
def test_a_mask_that_is_turned_itself(tmp_path):
    name, stored = own_set(tmp_path, ["a"])
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(stored).save(tmp_path / "m" / "a.png", exif=exif)
    with pytest.raises(DataError, match=r"a\.png has an EXIF orientation of its own"):
        SegmentationSet(name, tmp_path)[0]


@bad("masks of 0 and 255 alone")
@pytest.mark.parametrize(
    "values,said",
    [
        ((0, 255), "masks of 0 and 255 are black and white pictures"),
        ((255, 255), "no pixel of any mask counts"),
        ((1, 1), "'b' is the class of every pixel that counts"),
    ],
)
def test_masks_that_say_nothing(tmp_path, values, said, capsys):
    name, _ = own_set(
        tmp_path, ["a", "b"], mask_of=lambda mask: np.where(mask % 2, *values).astype(np.uint8)
    )
    assert (
        main(["data", "check", name, "--root", str(tmp_path), "--out", str(tmp_path / "report")])
        == 1
    )
    printed = capsys.readouterr().out
    assert said in printed and "nothing wrong found" not in printed
    share = {0: 0.5, 255: 1.0, 1: 0.0}[values[0]]
    assert f"ignored: {100 * share:.1f} % of the pixels" in printed
    report = json.loads((tmp_path / "report" / "mine_val.json").read_text())
    assert report["ignored"] == share and len(report["uncounted"]) == (2 if share == 1 else 0)


def test_the_share_of_ignored_pixels_is_shown(tmp_path):
    make(tmp_path, "voc21", 2)
    report = check_set(SegmentationSet("voc21", tmp_path))
    assert report.ignored == pytest.approx(10 / 2400) and "ignored: 0.4 % of the pixels" in str(
        report
    )


@bad("pictures without any mask")
def test_no_mask_shows_what_was_tried(tmp_path):
    make(tmp_path, "coco_stuff", 2)
    for mask in (tmp_path / "coco_stuff164k/annotations/val2017").iterdir():
        mask.rename(mask.with_suffix(".bmp"))
    with pytest.raises(
        DataError,
        match=r"for the first, '2008_000000', .*2008_000000_labelTrainIds\.png and .*2008_000000\.png and ",
    ):
        SegmentationSet("coco_stuff", tmp_path)


@bad("a set without pictures")
def test_no_picture_shows_what_is_there(tmp_path):
    name, _ = own_set(tmp_path, ["a"])
    (tmp_path / "p" / "a.png").rename(tmp_path / "p" / "a.webp")
    with pytest.raises(DataError, match=r"no picture p/\{\}\.png in .*, but 1 pictures"):
        SegmentationSet(name, tmp_path)


@pytest.mark.parametrize(
    "change,message",
    [
        pytest.param(
            {"images": "p/a.png"},
            r"'p/a\.png' holds 0 '\{\}'",
            marks=bad("a description without a place for keys"),
        ),
        pytest.param(
            {"images": "p/{key}.png"},
            r"holds 0 '\{\}'",
            marks=bad("a description with a name in braces"),
        ),
        pytest.param(
            {"masks": [{"path": "m/{}{}.png", "values": {"start": 0}}]},
            r"holds 2 '\{\}'",
            marks=bad("a description with two keys"),
        ),
        pytest.param(
            {"masks_made_on": "raw"},
            "masks_made_on is 'raw'; expected one of",
            marks=bad("an unknown masks_made_on"),
        ),
        pytest.param(
            {"like": "voc2"},
            "like is 'voc2'; expected one of",
            marks=bad("a description that is like none"),
        ),
        pytest.param(
            {"classes": ["a", "b", "a"]},
            "the class 'a' stands twice",
            marks=bad("a description with a class twice"),
        ),
        pytest.param(
            {"masks": [{"path": "m/{}.png", "values": {"map": {"10": 7}}}]},
            "10 is mapped to 7; expected a class, 0 to 3",
            marks=bad("a description that maps to no class"),
        ),
        pytest.param(
            {"masks": [{"path": "m/{}.png", "values": {"start": 0, "ignore": [99999]}}]},
            "99999 is no value of a mask",
            marks=bad("a description with values that no mask holds"),
        ),
        pytest.param(
            {"splits": ["val"]},
            "does not describe a data set",
            marks=bad("a description whose splits are a list"),
        ),
    ],
)
def test_descriptions_that_cannot_be(tmp_path, change, message):
    name, _ = own_set(tmp_path, ["a"], **change)
    with pytest.raises(InputError, match=message):
        describe(name)


@pytest.mark.parametrize(
    "data,message",
    [
        pytest.param(
            b"[" * 100_000,
            "nested too deeply",
            marks=bad("a description of 100 000 nested brackets"),
        ),
        pytest.param(
            b"title: a\ntitle: b\n",
            "key 'title' stands twice",
            marks=bad("a description with a key twice"),
        ),
        pytest.param(
            b"title: caf\xe9\n", "is no UTF-8 text", marks=bad("a description that is not UTF-8")
        ),
        pytest.param(None, "is a folder", marks=bad("a description that is a folder")),
    ],
)
def test_descriptions_that_cannot_be_read(tmp_path, data, message):
    path = tmp_path / "mine.yaml"
    path.mkdir() if data is None else path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        describe(str(path))


@bad("a file name that begins alike: p/img_{}.png")
def test_keys_may_have_something_before_them(tmp_path):
    name, stored = own_set(
        tmp_path,
        ["img_a", "img_b", "other"],
        images="p/img_{}.png",
        masks=[{"path": "m/img_{}.png", "values": {"start": 0}}],
    )
    data = SegmentationSet(name, tmp_path)
    assert [item.key for item in data.items] == ["a", "b"] and np.array_equal(data[0][1], stored)
    assert [problem.split(" ")[0].split("/")[-1] for problem in check_set(data).problems] == [
        "other.png"
    ]


@bad("a damaged mask among those that are converted")
def test_conversion_names_what_it_leaves(tmp_path, capsys):
    make(tmp_path, "coco_stuff", 3)
    (tmp_path / "coco_stuff164k/annotations/val2017/2008_000001.png").write_bytes(b"junk")
    assert main(["data", "convert", "coco_stuff", "--root", str(tmp_path)]) == 3
    printed = capsys.readouterr()
    assert (
        "2 masks written" in printed.out
        and "1 skipped" in printed.out
        and "2008_000001.png" in printed.err
    )


@bad("a conversion of masks that was killed")
def test_a_killed_conversion_goes_on(tmp_path, capsys):
    """Until it is whole, the masks that it reads are the set's."""
    truths = make(tmp_path, "coco_stuff", 3)
    assert main(["data", "convert", "coco_stuff", "--root", str(tmp_path)]) == 0
    done = sorted((tmp_path / "coco_stuff164k/annotations/val2017").glob("*TrainIds.png"))
    whole = [path.read_bytes() for path in done]
    for path in done[1:]:
        path.unlink()
    data = SegmentationSet("coco_stuff", tmp_path)
    assert data.layout.path == "annotations/val2017/{}.png"
    assert (
        all(np.array_equal(data[i][1], truths[i]) for i in range(3))
        and not check_set(data).problems
    )
    capsys.readouterr()
    assert main(["data", "convert", "coco_stuff", "--root", str(tmp_path)]) == 0
    assert "2 masks written" in (printed := capsys.readouterr().out) and "1 were there" in printed
    assert [path.read_bytes() for path in done] == whole and SegmentationSet(
        "coco_stuff", tmp_path
    ).layout.path.endswith("TrainIds.png")


@pytest.mark.parametrize(
    "arguments,message",
    [
        pytest.param(
            ["--out", "{root}/list.txt"],
            "--out .*list.txt' is a file; expected a folder",
            marks=bad("data check --out FILE"),
        ),
        pytest.param(
            ["--sample", "0"],
            "--sample is 0; expected at least 1",
            marks=bad("data check --sample 0"),
        ),
    ],
)
def test_outputs_are_looked_at_first(tmp_path, arguments, message, capsys):
    name, _ = own_set(tmp_path, ["a"], listed=["a"])
    assert (
        main(
            [
                "data",
                "check",
                name,
                "--root",
                str(tmp_path),
                *(text.format(root=tmp_path) for text in arguments),
            ]
        )
        == 2
    )
    printed = capsys.readouterr()
    assert printed.out == ""
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(printed.err)
