"""Where pictures come from: lists and shards, cut-off and hostile ones included, and the command
over all kinds at once.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from ovseg.cli.main import main
from ovseg.errors import InputError
from ovseg.inference.sources import Source, find_pictures

LABELS = ["--labels", "gravel,grass", "--format", "json"]


def picture(seed=0, size=(30, 40), kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)).save(
        buffer, kind
    )
    return buffer.getvalue()


def shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def names(*given):
    return [source.name for source in find_pictures([str(name) for name in given])[0]]


def test_shards(tmp_path):
    members = [
        ("a/0.png", picture(0)),
        ("a/0.txt", b"a caption"),
        ("a/1.JPG", picture(1, kind="JPEG")),
    ]
    one = shard(tmp_path / "s" / "00.tar", members)
    shard(tmp_path / "s" / "01.tar", [("2.webp", picture(2, kind="WEBP"))])
    assert names(one) == ["00/a/0", "00/a/1"]
    assert names(tmp_path / "s" / "*.tar") == ["00/a/0", "00/a/1", "01/2"]
    source = find_pictures([str(one)])[0][1]
    assert source.read() == members[2][1] and str(source).endswith("00.tar:a/1.JPG")
    with open(one, "r+b") as file:
        file.truncate(source.offset + 10)
    with pytest.raises(InputError, match="is cut off: 10 of"):
        source.read()


@pytest.mark.bad_input("inference", "shards that are cut, damaged or hostile")
def test_bad_shards(tmp_path):
    whole = shard(tmp_path / "cut.tar", [(f"{i}.png", picture(i)) for i in range(5)])
    third = find_pictures([str(whole)])[0][2]
    with open(whole, "r+b") as file:
        file.truncate(third.offset + 100)
    found, problems = find_pictures([str(whole)])
    assert len(found) == 2 and len(problems) == 1 and "cut off after 2 pictures" in problems[0]
    evil = shard(
        tmp_path / "evil.tar",
        [("../../x.png", picture()), ("/etc/x.png", picture()), ("fine.png", picture())],
    )
    found, problems = find_pictures([str(evil)])
    assert [source.name for source in found] == ["evil/fine"] and len(problems) == 2
    (tmp_path / "no.tar").write_bytes(b"no tar at all" * 100)
    assert find_pictures([str(tmp_path / "no.tar")])[1]
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        link = tarfile.TarInfo("x.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    for bad, message in (("links.tar", "holds no picture"), ("nowhere.tar", "does not exist")):
        with pytest.raises(InputError, match=message):
            find_pictures([str(tmp_path / bad)])


def test_lists(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "a.png").write_bytes(picture())
    (tmp_path / "b.png").write_bytes(picture())
    shard(tmp_path / "s.tar", [("0.png", picture())])
    (tmp_path / "list.txt").write_text("in/deep/a.png\n\nb.png\ns.tar\nmissing.png\n")
    assert names(tmp_path / "list.txt") == ["in/deep/a", "b", "s/0", "missing"]
    (tmp_path / "outer.txt").write_text("list.txt\n")
    (tmp_path / "empty.txt").write_text("\n")
    for bad, message in (
        ("outer.txt", "is named by a list"),
        ("empty.txt", "is empty"),
        ("no.txt", "does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            find_pictures([str(tmp_path / bad)])


@pytest.mark.bad_input("inference", "pictures that cannot be read")
def test_the_command_takes_all_kinds_and_counts_what_is_bad(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.png").write_bytes(picture(i))
    (tmp_path / "in" / "bad.png").write_bytes(picture()[:200])
    whole = shard(tmp_path / "s.tar", [(f"{i}.png", picture(i)) for i in range(4)])
    last = find_pictures([str(whole)])[0][3]
    with open(whole, "r+b") as file:
        file.truncate(last.offset + 50)
    (tmp_path / "list.txt").write_text("in/0.png\ngone.png\n")
    command = [
        "segment",
        "-m",
        "pacl_tiny",
        *(str(tmp_path / name) for name in ("in", "s.tar", "list.txt")),
        *LABELS,
        "-o",
        str(tmp_path / "out"),
    ]
    assert main(command) == 3
    printed = capsys.readouterr()
    assert (
        "7 pictures into" in printed.out and "3 skipped" in printed.out
    )  # 3 + 3 + 1; a bad file, a cut shard, a missing file
    named = printed.err
    assert [
        named.count(what)
        for what in ("skipped: ", "bad.png", "gone.png", "cut off after 3 pictures")
    ] == [3, 1, 1, 1]
    assert sorted(
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.json")
    ) == ["0.json", "1.json", "2.json", "in/0.json", "s/0.json", "s/1.json", "s/2.json"]
    assert main(command) == 3 and "7 done before" in capsys.readouterr().out


def test_two_processes_share_the_pictures(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(12):
        (tmp_path / "in" / f"{i}.png").write_bytes(picture(i))
    command = [
        sys.executable,
        "-m",
        "ovseg",
        "segment",
        "-m",
        "pacl_tiny",
        str(tmp_path / "in"),
        *LABELS,
        "-o",
        str(tmp_path / "out"),
    ]
    children = [
        subprocess.Popen(
            command,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [child.communicate()[0] for child in children]
    counts = [int(text.split()[0]) for text in printed]
    assert (
        sum(counts) == 12 and min(counts) > 0 and all(child.returncode == 0 for child in children)
    )
    assert len(list((tmp_path / "out").glob("*.json"))) == 12


@pytest.mark.third_trial(8)
@pytest.mark.parametrize("pictures,world", [(3, 2), (5, 4), (2, 3)])
def test_shares_are_even_and_resumed(tmp_path, monkeypatch, capsys, pictures, world):
    """Each picture is done by one process; another number of processes takes up what one of them
    left.
    """
    (tmp_path / "in").mkdir()
    for i in range(pictures):
        (tmp_path / "in" / f"{i}.png").write_bytes(picture(i))
    command = [
        "segment",
        "-m",
        "pacl_tiny",
        str(tmp_path / "in"),
        *LABELS,
        "-o",
        str(tmp_path / "out"),
    ]
    monkeypatch.setenv("WORLD_SIZE", str(world))
    counts = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        assert main(command) == 0
        counts.append(int(capsys.readouterr().out.split()[0]))
    assert (
        sum(counts) == pictures == len(list((tmp_path / "out").glob("*.json")))
        and max(counts) - min(counts) <= 1
    )
    (tmp_path / "out" / "1.json").unlink()
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert main([*command, "--format", "json"]) == 0
    if pictures > 2:  # of fewer, all are done again
        assert (
            f"1 pictures into {tmp_path / 'out'}, {pictures - 1} done before"
            in capsys.readouterr().out
        )


@pytest.mark.third_trial(8)
def test_a_bad_picture_that_is_a_whole_share_is_one_of_many(tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_bytes(b"no picture")
    (tmp_path / "in" / "1.png").write_bytes(picture(1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    command = [
        "segment",
        "-m",
        "pacl_tiny",
        str(tmp_path / "in"),
        *LABELS,
        "-o",
        str(tmp_path / "out"),
    ]
    assert main(command) == 3
    assert "0 pictures into" in capsys.readouterr().out


def test_outputs(tmp_path):
    """JSON with scores; RLE that pycocotools reads; masks beyond 255 labels."""
    from pycocotools import mask as coco

    import ovseg

    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 4, (13, 17)).astype(np.int16)
    labels[:, -1] = 3  # one label runs to the end
    found = ovseg.Segmentation(
        Image.new("RGB", (17, 13)),
        ["a", "b", "c", "d", "e"],
        labels,
        rng.random((13, 17), np.float32),
    )
    tree = json.loads(json.dumps(found.to_dict()))
    assert tree["labels"][4] == {"label": "e", "index": 4, "area": 0.0, "pixels": 0, "score": None}
    assert sum(row["pixels"] for row in tree["labels"]) + tree["background"]["pixels"] == 13 * 17
    assert tree["labels"][1]["score"] == pytest.approx(found.scores[labels == 1].mean(), abs=1e-5)
    rows = found.to_rle()
    assert [row["label"] for row in rows] == ["a", "b", "c", "d"]
    for row in rows:
        code = coco.frPyObjects(row["segmentation"], *row["segmentation"]["size"])
        assert np.array_equal(coco.decode(code).astype(bool), labels == row["index"])
        theirs = coco.encode(np.asfortranarray(labels == row["index"]).astype(np.uint8))
        assert theirs["counts"] == code["counts"]
    many = ovseg.Segmentation(found.image, [str(i) for i in range(400)], labels * 100, found.scores)
    many.save_mask(tmp_path / "m.png")
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "m.png")),
        np.where(labels < 0, 65535, labels.astype(int) * 100),
    )


def test_a_source_is_a_path_or_bytes(tmp_path):
    assert Source("a", tmp_path / "a.png").read() == tmp_path / "a.png"
    with pytest.raises(InputError, match="cannot read"):
        Source("a", tmp_path / "gone.tar", 5, 10, "a.png").read()


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), np.uint8))
HUGE = bytearray(saved(Image.new("L", (1, 1))))
HUGE[16:24] = (90000).to_bytes(4, "big") * 2
HUGE[29:33] = zlib.crc32(HUGE[12:29]).to_bytes(4, "big")
KINDS = {  # file -> its bytes, and the size of its label map or what the error says
    "rgb.png": (saved(NOISE), (30, 50)),
    "grey.png": (saved(NOISE.convert("L")), (30, 50)),
    "alpha.png": (saved(NOISE.convert("RGBA")), (30, 50)),
    "palette.png": (saved(NOISE.convert("P")), (30, 50)),
    "bits.png": (saved(NOISE.convert("1")), (30, 50)),
    "sixteen.png": (
        saved(Image.fromarray(np.arange(1500, dtype=np.uint16).reshape(30, 50) * 43)),
        (30, 50),
    ),
    "cmyk.jpg": (saved(NOISE.convert("CMYK"), "JPEG"), (30, 50)),
    "upright.jpg": (saved(NOISE, "JPEG", exif=exif(6)), (50, 30)),
    "mirrored.jpg": (saved(NOISE, "JPEG", exif=exif(2)), (30, 50)),
    "tall.webp": (saved(NOISE.resize((20, 400)), "WEBP"), (400, 20)),
    "one.bmp": (saved(NOISE.resize((1, 1)), "BMP"), (1, 1)),
    "huge.png": (bytes(HUGE), "is too large"),
    "cut.jpg": (saved(NOISE, "JPEG")[:900], "cannot decode"),
    "cut.png": (saved(NOISE)[:2000], "cannot decode"),
    "text.jpg": (b"<html>not found</html>", "none of JPEG"),
    "empty.png": (b"", "none of JPEG"),
    "gif.png": (saved(NOISE.convert("P"), "GIF"), (30, 50)),  # read by what it holds
    "tagged.tif": (saved(NOISE, "TIFF"), (30, 50)),
    "psd.png": (b"8BPS" + bytes(60), "none of JPEG"),
}


@pytest.mark.bad_input("inference", "pictures of every kind, hostile ones too")
def test_pictures_of_every_kind_have_a_defined_result(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name, (data, _) in KINDS.items():
        (tmp_path / "in" / name).write_bytes(data)
    command = [
        "segment",
        "-m",
        "pacl_tiny",
        str(tmp_path / "in"),
        "--labels",
        "gravel,grass",
        "--format",
        "mask,json",
    ]
    assert main([*command, "-o", str(tmp_path / "out")]) == 3
    printed = capsys.readouterr()
    bad = [name for name, (_, expected) in KINDS.items() if isinstance(expected, str)]
    assert (
        f"{len(KINDS) - len(bad)} pictures into" in printed.out
        and f"{len(bad)} skipped" in printed.out
    )
    for name, (_, expected) in KINDS.items():
        path = (
            tmp_path
            / "out"
            / (name.replace(".", "_") if name.startswith("cut") else name.split(".")[0])
        )
        if isinstance(expected, str):
            line = next(
                line
                for line in printed.err.splitlines()
                if line.startswith("skipped:") and name in line
            )
            assert expected in line and not path.with_name(path.name + ".json").exists()
        else:
            assert (
                np.asarray(Image.open(path.with_name(path.name + ".mask.png"))).shape == expected
            ), name
