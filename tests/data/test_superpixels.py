"""Superpixels: patches by majority and by the published mean, crops as published, the side file and
what is wrong with one.
"""

import io
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovseg.cli.main import main
from ovseg.data.scenes import Scenes
from ovseg.data.superpixels import (
    SuperpixelFile,
    SuperpixelOptions,
    patch_labels,
    superpixels,
    write_superpixels,
)
from ovseg.errors import DataError, InputError

GOLDEN = Path(__file__).parent.parent / "golden" / "segclip_tiny.npz"


def crop_patch_labels(segments, box, size, patch, how="majority"):
    """Labels of a crop, resized by nearest pixels, as published: ``box`` is left, top, right,
    bottom as shares of the picture.
    """
    H, W = segments.shape
    crop = segments[
        int(box[1] * H) : math.ceil(box[3] * H), int(box[0] * W) : math.ceil(box[2] * W)
    ]
    crop = segments if min(crop.shape, default=0) < 2 else crop
    rows, columns = (np.arange(size) * side // size for side in crop.shape)
    return patch_labels(crop[rows][:, columns], patch, how)


def test_the_published_labels_of_crops():
    with np.load(GOLDEN) as file:
        maps, boxes, expected = file["label/seg_map"], file["label/box"], file["in/seg_label"]
    for segments, box, labels in zip(maps, boxes, expected, strict=True):
        assert np.array_equal(crop_patch_labels(segments, tuple(box), 64, 8, "mean"), labels)


def test_majority_is_counted_and_ties_go_to_the_smaller():
    rng = np.random.default_rng(0)
    segments = rng.integers(0, 5, (13, 18)).astype(np.uint16) * 700
    found = patch_labels(segments, 4)
    assert found.shape == (3, 4)
    for y in range(3):
        for x in range(4):
            ids, counts = np.unique(
                segments[4 * y : 4 * y + 4, 4 * x : 4 * x + 4], return_counts=True
            )
            assert found[y, x] == ids[counts.argmax()]
    with pytest.raises(ValueError, match="how is 'mode'"):
        patch_labels(segments, 4, "mode")


@pytest.fixture
def pairs(tmp_path):
    for i, scene in enumerate(Scenes("digits", "val", 6)):
        path = tmp_path / "in" / ("deep" if i % 2 else "") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene.image).save(path)
        path.with_suffix(".txt").write_text("a red seven\n")
    return tmp_path / "in"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_side_file(pairs, tmp_path, workers, capsys):
    out = tmp_path / "s.safetensors"
    (pairs / "bad.png").write_bytes(b"junk")
    command = [
        "data",
        "superpixels",
        str(pairs),
        "--out",
        str(out),
        "--scale",
        "100",
        "--min-size",
        "30",
        "--workers",
        workers,
    ]
    assert main(command) == 3
    printed = capsys.readouterr()
    assert "6 pictures" in printed.out and "bad.png" in printed.err
    file = SuperpixelFile(out)
    assert len(file) == 6 and "deep/1.png" in file
    image = np.asarray(Image.open(pairs / "deep" / "1.png"))
    assert np.array_equal(
        file["deep/1.png"], superpixels(image, scale=100.0, sigma=0.9, min_size=30)
    )
    assert out.stat().st_size < 6 * 48 * 48  # below a byte a pixel
    with pytest.raises(DataError, match=r"holds no superpixels of 'x\.png'"):
        file["x.png"]


@pytest.mark.bad_input("data", "superpixel files that are damaged")
def test_damaged_side_files(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        SuperpixelFile(tmp_path / "no.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"junk" * 9)
    with pytest.raises(DataError, match="is damaged"):
        SuperpixelFile(tmp_path / "a.safetensors")
    from safetensors.numpy import save_file

    save_file(
        {"a.png": np.frombuffer(io.BytesIO(b"\x05\0\0\0\x05\0\0\0junk").read(), np.uint8)},
        tmp_path / "b.safetensors",
    )
    with pytest.raises(DataError, match=r"superpixels of 'a\.png' are damaged"):
        SuperpixelFile(tmp_path / "b.safetensors")["a.png"]
    with pytest.raises(DataError, match="none of 1 pictures could be cut up"):
        write_superpixels([("x", tmp_path / "x.png")], tmp_path / "c.safetensors")


@pytest.mark.bad_input("pictures", "more superpixels than 16 bits can number")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_picture_of_too_many_superpixels_is_named_and_the_others_written(
    tmp_path, workers, capsys
):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)).save(
        tmp_path / "in" / "noise.png"
    )
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(tmp_path / "in" / "plain.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (1, 1, 3), np.uint8)).save(
        tmp_path / "in" / "one.png"
    )
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (224, 400, 3), np.uint8)).save(
        tmp_path / "in" / "wide.png"
    )
    out = tmp_path / "s.safetensors"
    command = [
        "data",
        "superpixels",
        str(tmp_path / "in"),
        "--out",
        str(out),
        "--scale",
        "0.001",
        "--sigma",
        "0",
        "--min-size",
        "1",
    ]
    assert main([*command, "--workers", workers]) == 3
    printed = capsys.readouterr()
    assert (
        "wide.png: " in printed.err
        and "superpixels in one picture; expected at most 65536: raise scale or min_size"
        in printed.err
    )
    assert (
        "3 pictures cut up" in printed.out
        and "wide.png" not in SuperpixelFile(out)
        and len(SuperpixelFile(out)) == 3
    )


@pytest.mark.parametrize(
    "options,message",
    [
        pytest.param(
            ["--workers", "-1"],
            "workers is -1; expected 1 to 1024",
            marks=pytest.mark.bad_input("data", "superpixels --workers -1"),
        ),
        pytest.param(
            ["--workers", "0"],
            "workers is 0",
            marks=pytest.mark.bad_input("data", "superpixels --workers 0"),
        ),
        pytest.param(
            ["--workers", "999999"],
            "workers is 999999",
            marks=pytest.mark.bad_input("data", "superpixels --workers 999999"),
        ),
        pytest.param(
            ["--scale", "nan"],
            "scale is nan; expected a positive number",
            marks=pytest.mark.bad_input("data", "superpixels --scale nan"),
        ),
        pytest.param(
            ["--scale", "-1"],
            "scale is -1",
            marks=pytest.mark.bad_input("data", "superpixels --scale -1"),
        ),
        pytest.param(
            ["--sigma", "inf"],
            "sigma is inf; expected 0 or more",
            marks=pytest.mark.bad_input("data", "superpixels --sigma inf"),
        ),
        pytest.param(
            ["--min-size", "0"],
            "min_size is 0; expected 1 or more",
            marks=pytest.mark.bad_input("data", "superpixels --min-size 0"),
        ),
        pytest.param(
            ["--out", "."],
            "superpixel file '.' is a folder",
            marks=pytest.mark.bad_input("data", "superpixels --out FOLDER"),
        ),
        pytest.param(
            ["--out", "/dev/null/s.safetensors"],
            "is a device",
            marks=pytest.mark.bad_input("data", "--out below a file"),
        ),
    ],
)
def test_options_are_looked_at_before_a_picture_is(
    pairs, tmp_path, options, message, monkeypatch, capsys
):
    monkeypatch.setattr(
        "ovseg.data.superpixels._cut", lambda job: pytest.fail("a picture was cut up")
    )
    assert (
        main(
            ["data", "superpixels", str(pairs), "--out", str(tmp_path / "s.safetensors"), *options]
        )
        == 2
    )
    assert message in capsys.readouterr().err


@pytest.mark.bad_input("data", "a process that is killed while it cuts up pictures")
def test_a_worker_that_is_killed(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr("ovseg.data.superpixels._cut", _die)
    with pytest.raises(DataError, match=r"was killed after 0 of 1, .*expected fewer workers"):
        write_superpixels(
            [("a", pairs / "0.png")], tmp_path / "s.safetensors", SuperpixelOptions(workers=2)
        )


def _die(job):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=pytest.mark.bad_input("data", f"as a superpixel file: {what}"))
        for what in ("a folder", "a FIFO", "a link to nothing")
    ],
)
def test_a_side_file_that_is_no_file(tmp_path, what):
    path = tmp_path / "s.safetensors"
    {
        "a folder": path.mkdir,
        "a FIFO": lambda: os.mkfifo(path),
        "a link to nothing": lambda: path.symlink_to("gone"),
    }[what]()
    with pytest.raises(DataError, match=f"superpixel file .* is {what}"):
        SuperpixelFile(path)
    with pytest.raises(InputError, match=f"superpixel file .* is {what}"):
        write_superpixels([("a", tmp_path / "a.png")], path)
