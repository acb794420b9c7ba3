"""The batches that training/loop.py uses until it takes data/loader.py; goes with data/batches.py and data/folders.py."""

import numpy as np
import pytest
import torch
from PIL import Image

from ovseg.data.batches import SceneBatches
from ovseg.data.folders import FolderBatches
from ovseg.data.scenes import Scenes
from ovseg.data.superpixels import write_superpixels
from ovseg.data.tokenizers import WordTokenizer
from ovseg.errors import DataError


def test_a_batch_depends_on_seed_and_step_only():
    scenes, tokenizer = Scenes("shapes", "train", 40), WordTokenizer()
    a, b = SceneBatches(scenes, tokenizer, 8, 1, captions=3), SceneBatches(scenes, tokenizer, 8, 1, captions=3)
    b(0)
    first, second = a(5), b(5)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["images"], a(6)["images"])
    assert first["token_ids"].shape[0] == 24 and first["pair_mask"].shape == (8, 24)
    own = first["image_ids"][:, None] == first["text_ids"]
    assert bool(first["pair_mask"][own].all())


@pytest.mark.parametrize("arguments,message", [
    ({"batch_size": 0}, "batch_size is 0; expected 1 to 10"),
    ({"batch_size": 11}, "batch_size is 11; expected 1 to 10"),
    ({"batch_size": 2, "captions": 9}, "captions is 9; expected 1 to 5"),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SceneBatches(Scenes("shapes", "train", 10), WordTokenizer(), **arguments)


def pairs(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (60 + i, 50), (i * 5 % 255, 80, 90)).save(folder / f"{i:03}.jpg")
        (folder / f"{i:03}.txt").write_text(f"a red {i}\nsecond caption\n")


def test_folder_of_pairs(tmp_path):
    pairs(tmp_path / "a" / "b", 12)
    batches = FolderBatches(tmp_path, WordTokenizer(), 4, seed=2, image_size=32)
    batch, again = batches(3), batches(3)
    assert batch["images"].shape == (4, 3, 32, 32) and torch.equal(batch["images"], again["images"])
    assert float(batch["images"].max()) <= 1 and batch["image_ids"].shape == (4,)


def test_folder_skips_bad_pictures_and_stops_past_the_limit(tmp_path, capsys):
    pairs(tmp_path, 10)
    (tmp_path / "003.jpg").write_bytes((tmp_path / "003.jpg").read_bytes()[:200])
    batches = FolderBatches(tmp_path, WordTokenizer(), 9, image_size=32)
    assert len(batches(0)["images"]) == 9 and "003.jpg" in capsys.readouterr().out
    for i in (4, 5, 6):
        (tmp_path / f"00{i}.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="pictures cannot be used"):
        batches(1)


def test_folder_without_pairs(tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        FolderBatches(tmp_path / "none", WordTokenizer(), 2)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"holds 1 pictures, 0 of them with a \.txt; expected at least a batch of 2"):
        FolderBatches(tmp_path, WordTokenizer(), 2)


def test_batches_carry_the_patches_of_the_crop(tmp_path):
    pairs = tmp_path / "in"
    for i, scene in enumerate(Scenes("digits", "val", 6)):
        path = pairs / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(scene.image).save(path)
        path.with_suffix(".txt").write_text("a red seven\n")
    pictures = [(path.relative_to(pairs).as_posix(), path) for path in sorted(pairs.rglob("*.png"))]
    # Pictures that are their own segment maps: what the picture shows in a patch is what its label must be.
    for _, path in pictures:
        ids = np.zeros((48, 48, 3), np.uint8)
        ids[:, 24:] = 200
        Image.fromarray(ids).save(path)
    assert write_superpixels(pictures, tmp_path / "s.safetensors", scale=1.0, sigma=0.1, min_size=1) == (6, [])
    batches = FolderBatches(pairs, WordTokenizer(), 4, image_size=48, superpixels=tmp_path / "s.safetensors", patch=4)
    batch = batches(0)
    assert batch["segments"].shape == (4, 144)
    seen = batch["images"].mean(1).unflatten(2, (12, 4)).unflatten(1, (12, 4)).mean((2, 4)).flatten(1)
    for image, segments in zip(seen, batch["segments"], strict=True):
        for value in segments.unique():
            shown = image[segments == value]
            assert float(shown.max() - shown.min()) < 0.8  # not both sides of the edge, but for the patch on it
    (pairs / "new.png").write_bytes((pairs / "0.png").read_bytes())
    (pairs / "new.txt").write_text("gravel\n")
    with pytest.raises(DataError, match=r"lacks 1 of 7 pictures, the first new\.png"):
        FolderBatches(pairs, WordTokenizer(), 4, superpixels=tmp_path / "s.safetensors")


def test_scenes_carry_segments():
    scenes = Scenes("digits", "train", 10)
    batch = SceneBatches(scenes, WordTokenizer(), 4, superpixel_patch=4)(3)
    assert batch["segments"].shape == (4, 144) and 2 <= len(batch["segments"][0].unique()) <= 60
    assert "segments" not in SceneBatches(scenes, WordTokenizer(), 4)(3)
