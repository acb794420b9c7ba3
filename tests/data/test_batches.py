"""Batches: which pairs count, determinism by step, folders of real pictures with bad files among them."""

import pytest
import torch
from PIL import Image

from ovseg.data.batches import SceneBatches, countable_pairs
from ovseg.data.folders import FolderBatches
from ovseg.data.scenes import Scenes
from ovseg.data.tokenizers import UNKNOWN, WordTokenizer
from ovseg.errors import DataError


def test_true_by_accident_is_left_out():
    """Image 0 is captioned 'red seven' and 'gravel', image 1 'red seven' alone. Entities: red seven, gravel."""
    image_entities = torch.tensor([[1, 1], [1, 0]])
    text_entities = torch.tensor([[0, 1], [1, 0]])  # text 0 'gravel' of image 0, text 1 'red seven' of image 1
    keep = countable_pairs(text_entities, image_entities, torch.eye(2, dtype=torch.bool))
    assert keep.tolist() == [[True, False],  # 'red seven' is true of image 0
                             [True, True]]   # 'gravel' is not known to be true of image 1


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


def test_no_word_of_the_scenes_is_unknown():
    tokenizer = WordTokenizer()
    for form in ("shapes", "digits"):
        texts = [caption.text for scene in Scenes(form, "val", 60) for caption in scene.captions]
        assert not bool((tokenizer(texts) == UNKNOWN).any())
    assert tokenizer.unknown("a red zebra") == ["zebra"]


def test_long_and_empty_texts():
    tokenizer = WordTokenizer(context_length=6)
    assert tokenizer("a " * 50).shape == (1, 6) and tokenizer("").tolist()[0][:2] == [1, 2]
    assert tokenizer([]).shape == (0, 6)


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
