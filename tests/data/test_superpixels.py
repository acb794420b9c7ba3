"""Superpixels: patches by majority and by the published mean, crops as published, the side file and what is wrong with one."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovseg.cli.main import main
from ovseg.data.scenes import Scenes
from ovseg.data.superpixels import SuperpixelFile, crop_patch_labels, patch_labels, superpixels, write_superpixels
from ovseg.errors import DataError

GOLDEN = Path(__file__).parent.parent / "golden" / "segclip_tiny.npz"


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
            ids, counts = np.unique(segments[4 * y : 4 * y + 4, 4 * x : 4 * x + 4], return_counts=True)
            assert found[y, x] == ids[counts.argmax()]
    with pytest.raises(ValueError, match="how is 'mode'"):
        patch_labels(segments, 4, "mode")


def test_crops_of_almost_nothing_take_the_whole_map():
    segments = np.arange(64, dtype=np.uint16).reshape(8, 8)
    assert np.array_equal(crop_patch_labels(segments, (0.5, 0.5, 0.5, 0.5), 8, 1), segments)
    assert np.array_equal(crop_patch_labels(segments, (0.0, 0.0, 1.0, 1.0), 8, 1), segments)
    assert np.array_equal(crop_patch_labels(segments, (0.25, 0.5, 0.75, 1.0), 4, 1), segments[4:, 2:6])


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
    command = ["data", "superpixels", str(pairs), "--out", str(out), "--scale", "100", "--min-size", "30", "--workers", workers]
    assert main(command) == 3
    printed = capsys.readouterr()
    assert "6 pictures" in printed.out and "bad.png" in printed.err
    file = SuperpixelFile(out)
    assert len(file) == 6 and "deep/1.png" in file
    image = np.asarray(Image.open(pairs / "deep" / "1.png"))
    assert np.array_equal(file["deep/1.png"], superpixels(image, scale=100.0, sigma=0.9, min_size=30))
    assert out.stat().st_size < 6 * 48 * 48  # below a byte a pixel
    with pytest.raises(DataError, match=r"holds no superpixels of 'x\.png'"):
        file["x.png"]


def test_damaged_side_files(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        SuperpixelFile(tmp_path / "no.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"junk" * 9)
    with pytest.raises(DataError, match="is damaged"):
        SuperpixelFile(tmp_path / "a.safetensors")
    from safetensors.numpy import save_file

    save_file({"a.png": np.frombuffer(io.BytesIO(b"\x05\0\0\0\x05\0\0\0junk").read(), np.uint8)}, tmp_path / "b.safetensors")
    with pytest.raises(DataError, match=r"superpixels of 'a\.png' are damaged"):
        SuperpixelFile(tmp_path / "b.safetensors")["a.png"]
    with pytest.raises(DataError, match="none of 1 pictures could be cut up"):
        write_superpixels([("x", tmp_path / "x.png")], tmp_path / "c.safetensors")
