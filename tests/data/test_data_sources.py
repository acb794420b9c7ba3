"""Sources: found by name, options checked, pairs of folders and scenes, what is wrong with files,
the limit on bad ones.
"""

import itertools
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import INPUTS, pairs, same
from PIL import Image

from ovseg.cli.main import main
from ovseg.data.batches import CrossImageBatch, PairBatch
from ovseg.data.loader import Loader
from ovseg.data.pair_samples import PairSample, caption_id, collate_pairs, countable_pairs
from ovseg.data.sampling import generator, integer
from ovseg.data.scenes import Scenes
from ovseg.data.sources import ModelInputs, create_source, list_kinds, load_options
from ovseg.data.sources.base import SkipLimit
from ovseg.data.sources.folder import FolderPairs, Names
from ovseg.data.sources.folder import Options as FolderOptions
from ovseg.data.sources.scenes import Options as SceneOptions
from ovseg.data.sources.scenes import ScenePairs
from ovseg.data.superpixels import SuperpixelOptions, patch_labels, write_superpixels
from ovseg.data.transforms import PairAugment
from ovseg.data.words import END, UNKNOWN, WordTokenizer
from ovseg.errors import ConfigError, DataError


def batch_of(source, indices, seed=0):
    return source.collate([source.sample(i, seed + i) for i in indices])


def bad(what, *values):
    return pytest.param(*values, marks=pytest.mark.bad_input("data", what), id=what)


@pytest.mark.parametrize(
    "tree,message",
    [
        (
            {"kind": "foldr"},
            r"data.kind is 'foldr'; expected one of \['entity_folder', 'entity_scenes', 'folder', 'masks', 'scenes', 'tags'\]",
        ),
        ({}, "data.kind is None"),
        ({"kind": "folder", "rot": "x"}, "data.rot: unknown key, did you mean data.root?"),
        ({"kind": "folder", "augment": {"scal": [0.1, 1]}}, "data.augment.scal"),
        ({"kind": "scenes", "captions": "many"}, "data.captions"),
        ({"kind": "folder"}, "data.root is null; with data.kind=folder"),
        ({"kind": "folder", "root": ".", "captions": 0}, "data.captions is 0; expected 1 to 1000"),
        (
            {"kind": "folder", "root": ".", "superpixel_labels": "mode"},
            "data.superpixel_labels is 'mode'",
        ),
        (
            {"kind": "folder", "root": ".", "augment": {"scale": [1, 0.5]}},
            r"data.augment.scale is \[1.0, 0.5\]",
        ),
        ({"kind": "scenes", "captions": 9}, "data.captions is 9; expected 1 to 5"),
        ({"kind": "scenes", "style": "cubes"}, "data: form is 'cubes'"),
        bad(
            "data.workers=-1",
            {"kind": "scenes", "workers": -1},
            "data.workers is -1; expected 0 to 1024",
        ),
        bad(
            "data.workers=999999",
            {"kind": "folder", "root": ".", "workers": 999999},
            "data.workers is 999999; expected 0 to 1024",
        ),
        bad(
            "data.prefetch=0",
            {"kind": "scenes", "prefetch": 0},
            "data.prefetch is 0; expected 1 to 1024",
        ),
        bad(
            "data.prefetch=999999",
            {"kind": "scenes", "prefetch": 999999},
            "data.prefetch is 999999",
        ),
        bad(
            "data.image_size=0",
            {"kind": "scenes", "image_size": 0},
            "data.image_size is 0; expected 1 to 16384",
        ),
        bad(
            "data.image_size=999999",
            {"kind": "masks", "image_size": 999999},
            "data.image_size is 999999",
        ),
        bad(
            "data.captions=999999",
            {"kind": "folder", "root": ".", "captions": 999999},
            "data.captions is 999999; expected 1 to 1000",
        ),
        bad(
            "data.train_size=10**12",
            {"kind": "scenes", "train_size": 10**12},
            "data.train_size is 1000000000000; expected 0 to 1000000",
        ),
        bad("data.val_size=-1", {"kind": "masks", "val_size": -1}, "data.val_size is -1"),
        bad(
            "data.ignore_index=-1", {"kind": "masks", "ignore_index": -1}, "data.ignore_index is -1"
        ),
        bad(
            "data.augment.flip=2",
            {"kind": "folder", "root": ".", "augment": {"flip": 2}},
            "data.augment.flip is 2.0; expected a share",
        ),
        bad(
            "data.augment.flip=nan",
            {"kind": "folder", "root": ".", "augment": {"flip": float("nan")}},
            "data.augment.flip is nan",
        ),
        bad(
            "data.augment.ratio up to infinity",
            {"kind": "folder", "root": ".", "augment": {"ratio": [1, float("inf")]}},
            r"data.augment.ratio is \[1.0, inf\]",
        ),
        bad(
            "data.augment.scale of NaN",
            {"kind": "folder", "root": ".", "augment": {"scale": [float("nan"), 1]}},
            r"scale is \[nan, 1.0\]",
        ),
        bad(
            "data.augment.erase=2",
            {"kind": "folder", "root": ".", "augment": {"erase": 2}},
            "data.augment.erase is 2.0; expected a share",
        ),
        bad(
            "data.augment.interpolation=nearest",
            {"kind": "folder", "root": ".", "augment": {"interpolation": "nearest"}},
            r"data.augment.interpolation is 'nearest'; expected one of \['bicubic', 'bilinear'\]",
        ),
        bad(
            "data.augment.rand_augment that timm would pass over",
            {"kind": "folder", "root": ".", "augment": {"rand_augment": "rand-m9-foo"}},
            "data.augment.rand_augment is 'rand-m9-foo'; expected a policy such as",
        ),
        bad(
            "data.augment.rand_augment of a million changes",
            {"kind": "folder", "root": ".", "augment": {"rand_augment": "rand-n1000000"}},
            "data.augment.rand_augment is 'rand-n1000000'",
        ),
        bad(
            "data.augment.rand_augment with superpixels",
            {
                "kind": "folder",
                "root": ".",
                "superpixels": "s",
                "augment": {"rand_augment": "rand-m9"},
            },
            "data.augment.rand_augment is 'rand-m9' and data.superpixels 's'; expected one of them",
        ),
        bad(
            "data.augment.scale of 999999 pixels",
            {"kind": "masks", "augment": {"scale": [999999, 512]}},
            "sides of 1 to 16384 pixels",
        ),
        (
            {"kind": "masks", "set": "voc20"},
            "data.root is null; expected the folder that holds 'voc20'",
        ),
        ({"kind": "masks", "set": "voc2"}, "data.root is null|data set is 'voc2'"),
        (
            {"kind": "masks", "augment": {"class_cap": 0}},
            "data.augment.class_cap is 0.0; expected a share above 0",
        ),
        (
            {"kind": "masks", "ignore_index": 3},
            "data.ignore_index is 3, the label of a class; expected at least 23",
        ),
    ],
)
def test_bad_options(tree, message):
    with pytest.raises(ConfigError, match=message):
        create_source(load_options(tree), INPUTS)


@pytest.mark.parametrize("value", ["-1", "999999"])
def test_recipes_are_checked_before_anything_is_read(value, capsys):
    assert main(["train", "clip_scenes", f"data.workers={value}", "--print"]) == 2
    assert f"data.workers is {value}; expected 0 to 1024" in capsys.readouterr().err
    with pytest.raises(
        ConfigError, match=f"data.workers is {value}"
    ):  # options that were made in Python
        create_source(FolderOptions(root=".", workers=int(value)), INPUTS)


@pytest.mark.bad_input("data", "captions with a byte order mark")
def test_captions_with_a_byte_order_mark(tmp_path):
    pairs(tmp_path, 2)
    (tmp_path / "000.txt").write_text("a red seven\r\n", "utf-8-sig", newline="")
    (tmp_path / "001.txt").write_text("a red seven\n")
    ids = batch_of(
        FolderPairs(tmp_path, INPUTS, FolderOptions(image_size=16)), range(2)
    ).image_ids.tolist()
    assert ids[0] == ids[1] == caption_id("a red seven")


def test_options_hold_their_kind_and_survive_yaml():
    from omegaconf import OmegaConf

    for kind in list_kinds():
        options = load_options({"kind": kind, "workers": 3})
        tree = OmegaConf.to_container(
            OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(options)))
        )
        assert tree["kind"] == kind and load_options(tree) == options


def test_a_new_kind_is_one_file(tmp_path):
    """The example of docs/data.md: numbers as pictures, in a process of its own whose package has
    the one file more.
    """
    code = f"""
import ovseg.data.sources as sources
sources.__path__.append({str(tmp_path)!r})
import torch
from ovseg.data.loader import Loader
options = sources.load_options({{"kind": "numbers", "upto": 12}})
source = sources.create_source(options, sources.ModelInputs(8, 4, lambda texts: torch.ones(len(texts), 2, dtype=torch.int64)))
batch = next(iter(Loader(source, 5, workers=1)))
assert "numbers" in sources.list_kinds() and len(source) == 12 and batch.images.shape == (5, 3, 8, 8)
"""
    (tmp_path / "numbers.py").write_text(NUMBERS)
    subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=120, cwd=Path(__file__).parents[2]
    )


NUMBERS = """
from dataclasses import dataclass

import torch

from ovseg.cli.main import main
from ovseg.data.batches import PairBatch
from ovseg.data.pair_samples import PairSample, collate_pairs
from ovseg.data.sources.base import Source, SourceOptions


@dataclass
class Options(SourceOptions):
    kind: str = "numbers"
    upto: int = 10


def create(options, inputs, *, split="train", seed=0, progress=False):
    return Numbers(options.upto, inputs)


class Numbers(Source[PairSample]):
    batch_type = PairBatch

    def __init__(self, upto, inputs):
        self.upto, self.inputs = upto, inputs

    def __len__(self):
        return self.upto

    def read(self, index, rng):
        size = self.inputs.image_size
        return PairSample(torch.full((3, size, size), index, dtype=torch.uint8), self.inputs.tokenize([str(index)]), index)

    def collate(self, samples):
        return collate_pairs(samples)

    def describe(self):
        return {"kind": "numbers", "pictures": self.upto}
"""


@dataclass
class TwoPictures(PairSample):
    partner: torch.Tensor | None = None
    entity: int = -1


class ScenesTwoByTwo(ScenePairs):
    """Each scene with another that shares an entity of it: what a source of picture pairs has to
    do.
    """

    batch_type = CrossImageBatch

    def read(self, index, rng):
        first = super().read(index, rng)
        entity = first.image_entities.nonzero()[0].item()
        others = self.entities[:, :, entity].amax(1).nonzero().flatten().tolist()
        return TwoPictures(
            **vars(first), partner=self.images[others[integer(rng, 0, len(others))]], entity=entity
        )

    def collate(self, samples):
        partner, entities = (
            torch.stack([sample.partner for sample in samples]),
            torch.tensor([sample.entity for sample in samples]),
        )
        return CrossImageBatch(
            **vars(super().collate(samples)), partner=partner, entity_ids=entities
        )


def test_pictures_may_come_two_by_two():
    source = ScenesTwoByTwo(Scenes("shapes", "train", 20), INPUTS)
    found = []
    for workers in (0, 1):
        with Loader(source, 6, workers=workers) as loader:
            found.append(list(itertools.islice(loader, 4)))
    assert all(map(same, *found)) and not torch.equal(found[0][0].partner, found[0][0].images)
    batch = found[0][2].to("cpu")
    assert (
        isinstance(batch, CrossImageBatch)
        and batch.partner.shape == batch.images.shape
        and batch.entity_ids.shape == (6,)
    )
    assert bool(batch.image_entities[torch.arange(6), batch.entity_ids].all())


def test_true_by_accident_is_left_out():
    """Image 0 is captioned 'red seven' and 'gravel', image 1 'red seven' alone.

    Entities: red seven, gravel.
    """
    image_entities = torch.tensor([[1, 1], [1, 0]])
    text_entities = torch.tensor(
        [[0, 1], [1, 0]]
    )  # text 0 'gravel' of image 0, text 1 'red seven' of image 1
    keep = countable_pairs(text_entities, image_entities, torch.eye(2, dtype=torch.bool))
    assert keep.tolist() == [
        [True, False],  # 'red seven' is true of image 0
        [True, True],
    ]  # 'gravel' is not known to be true of image 1


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


def test_scenes_are_pairs():
    scenes = Scenes("shapes", "train", 12)
    source = ScenePairs(scenes, INPUTS, SceneOptions(captions=3, superpixels=True))
    batch = batch_of(source, [5, 2, 7])
    assert batch.images.dtype == torch.uint8 and torch.equal(
        batch.images[1], torch.from_numpy(scenes[2].image).permute(2, 0, 1)
    )
    assert (
        batch.image_ids.tolist() == [5, 2, 7]
        and batch.text_ids.tolist() == [5] * 3 + [2] * 3 + [7] * 3
    )
    names = scenes.vocabulary.classes
    for row, scene in enumerate([scenes[5], scenes[2], scenes[7]]):
        named = {names[k] for k in batch.image_entities[row].nonzero().flatten().tolist()}
        assert named == set().union(*(caption.entities for caption in scene.captions))
        for k in range(3):
            text = 3 * row + k
            told = {names[i] for i in batch.text_entities[text].nonzero().flatten().tolist()}
            ids = batch.token_ids[text].tolist()
            assert any(
                caption.entities == told
                and INPUTS.tokenize([caption.text])[0, : len(ids)].tolist() == ids
                for caption in scene.captions
            )
    own = batch.image_ids[:, None] == batch.text_ids
    assert bool(countable_pairs(batch.text_entities, batch.image_entities, own)[own].all())
    assert batch.segments.shape == (3, 144) and 2 <= len(batch.segments[0].unique()) <= 60
    assert batch_of(ScenePairs(scenes, INPUTS), [1]).segments is None
    assert source.describe()["pictures"] == 12


def test_padding_of_all_texts_is_cut_off():
    source = ScenePairs(Scenes("shapes", "train", 30), INPUTS, SceneOptions(captions=2))
    batch = batch_of(source, range(6))
    assert bool((batch.token_ids[:, -1] != 0).any()) and batch.token_ids.shape[1] < 16
    assert bool((batch.token_ids == END).any(1).all())
    empty = source.sample(0, 0)
    empty.token_ids = torch.zeros(1, 7, dtype=torch.int64)
    assert collate_pairs([empty]).token_ids.shape == (1, 1)


def test_folder_of_pairs(tmp_path):
    pairs(tmp_path / "a" / "b", 12)
    Image.new("RGB", (8, 8)).save(tmp_path / "alone.png")
    source = FolderPairs(tmp_path, INPUTS, FolderOptions(image_size=32))
    assert (
        len(source) == 12
        and source.names[3] == "a/b/003.png"
        and source.names[1:3] == ["a/b/001.png", "a/b/002.png"]
    )
    batch = batch_of(source, range(12))
    assert (
        isinstance(batch, PairBatch)
        and batch.images.shape == (12, 3, 32, 32)
        and batch.images.dtype == torch.uint8
    )
    assert batch.image_entities is None and batch.segments is None and batch.skipped == ()
    source = FolderPairs(tmp_path, INPUTS, FolderOptions(image_size=32, captions=2))
    batch = batch_of(source, range(12))
    assert batch.token_ids.shape[0] == 24 and batch.text_ids.tolist() == [
        i for i in range(12) for _ in range(2)
    ]
    assert source.describe() == {
        "kind": "folder",
        "root": str(tmp_path),
        "pictures": 12,
        "image_size": 32,
        "captions": 2,
    }


def test_equal_captions_are_positives_of_each_other(tmp_path):
    pairs(tmp_path, 4)
    for i, text in enumerate(["a dog", "a cat", "a dog", "a  dog"]):
        (tmp_path / f"{i:03}.txt").write_text(text)
    ids = batch_of(FolderPairs(tmp_path, INPUTS), range(4)).image_ids.tolist()
    assert (
        ids[0] == ids[2] and len(set(ids)) == 3 and ids[0] == caption_id("a dog") and min(ids) >= 0
    )
    assert (
        caption_id("a dog") == 7182415866560184703
    )  # the same in every process: no hash of Python's own


@pytest.mark.parametrize(
    "break_it,message",
    [
        (
            lambda root: (root / "003.png").write_bytes((root / "003.png").read_bytes()[:300]),
            "003.png",
        ),
        (
            lambda root: (root / "003.txt").write_text(" \n\n"),
            "003.txt' is empty; expected one caption a line",
        ),
        (
            lambda root: (root / "003.txt").write_bytes(b"\xff\xfe\xff"),
            "captions .*003.txt' is no UTF-8 text, line 1",
        ),
        (lambda root: (root / "003.txt").unlink(), "captions .*003.txt' does not exist"),
        (lambda root: (root / "003.png").unlink(), "003.png' does not exist"),
    ],
)
@pytest.mark.bad_input("data", "pictures and captions that cannot be used")
def test_what_cannot_be_used_is_replaced_and_told(tmp_path, break_it, message):
    pairs(tmp_path, 8)
    source = FolderPairs(tmp_path, INPUTS, FolderOptions(image_size=16))
    break_it(tmp_path)
    batch, again = batch_of(source, range(8)), batch_of(source, range(8))
    assert len(batch) == 8 and len(batch.skipped) >= 1 and torch.equal(batch.images, again.images)
    with pytest.raises(DataError, match=message):
        raise DataError(batch.skipped[0])


@pytest.mark.bad_input("data", "too many pictures that cannot be used")
def test_too_many_bad_ones_end_training():
    limit = SkipLimit(300)
    assert (
        limit.add(["a: bad", "a: bad", "b: bad"]) == ["a: bad", "b: bad"]
        and limit.add(["a: bad"]) == []
    )
    kept = SkipLimit(300)
    kept.load_state_dict(limit.state_dict())
    for one in (limit, kept):
        assert one.add(["c: bad"]) == ["c: bad"]  # 1 % of 300
        with pytest.raises(
            DataError, match="4 of 300 pictures cannot be used, 1 % may; the last: d: bad"
        ):
            one.add(["a: bad", "d: bad"])
    assert SkipLimit(5).add(["one in five"]) == ["one in five"]


@pytest.mark.bad_input("data", "a folder without pairs")
def test_folder_without_pairs(tmp_path):
    with pytest.raises(
        DataError, match=r"data\.root .*none' does not exist; expected a folder of pictures"
    ):
        FolderPairs(tmp_path / "none", INPUTS)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(
        DataError,
        match=r"holds 1 pictures, 0 of them with a \.txt; found there: 1 pictures; expected name",
    ):
        FolderPairs(tmp_path, INPUTS)


def test_segments_are_those_of_the_crop(tmp_path):
    """Pictures of two colours that are their own superpixels: what a patch shows is what its label
    must be.
    """
    rng = np.random.default_rng(0)
    for i in range(8):
        pixels = np.zeros((60 + 5 * i, 90 - 4 * i, 3), np.uint8)
        pixels[:, rng.integers(20, 40) :] = 200
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("gravel\n")
    names = [f"{i}.png" for i in range(8)]
    pictures = [(name, tmp_path / name) for name in names]
    assert write_superpixels(
        pictures, tmp_path / "s.safetensors", SuperpixelOptions(scale=1.0, sigma=0.1, min_size=1)
    ) == (8, [])
    source = FolderPairs(
        tmp_path,
        INPUTS,
        FolderOptions(
            superpixels=tmp_path / "s.safetensors", augment=PairAugment((0.2, 1.0), flip=0.5)
        ),
    )
    both = 0
    for index, seed in itertools.product(range(8), range(5)):
        sample = source.read(index, generator(seed))
        shown = (
            sample.image.float()
            .mean(0)
            .unflatten(1, (12, 4))
            .unflatten(0, (12, 4))
            .mean((1, 3))
            .flatten()
        )
        whole = (shown < 1) | (shown > 199)  # not those on the edge
        left = set(sample.segments[whole & (shown < 1)].tolist())
        right = set(sample.segments[whole & (shown > 199)].tolist())
        assert not left & right and len(left) <= 1 and len(right) <= 1
        both += bool(left and right)
    assert both > 20
    (tmp_path / "new.png").write_bytes((tmp_path / "0.png").read_bytes())
    (tmp_path / "new.txt").write_text("gravel\n")
    with pytest.raises(DataError, match=r"lacks 1 of 9 pictures, the first new\.png"):
        FolderPairs(tmp_path, INPUTS, FolderOptions(superpixels=tmp_path / "s.safetensors"))


def test_segments_with_workers_are_those_without(tmp_path):
    for i, scene in enumerate(Scenes("digits", "val", 6)):
        Image.fromarray(scene.image).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a red seven\n")
    write_superpixels(
        [(f"{i}.png", tmp_path / f"{i}.png") for i in range(6)],
        tmp_path / "s.safetensors",
        SuperpixelOptions(scale=100.0, min_size=30),
    )
    for how in ("majority", "mean"):
        source = FolderPairs(
            tmp_path,
            INPUTS,
            FolderOptions(superpixels=tmp_path / "s.safetensors", superpixel_labels=how),
        )
        found = []
        for workers in (0, 2):
            with Loader(source, 3, workers=workers) as loader:
                found.append(torch.cat([batch.segments for batch in itertools.islice(loader, 4)]))
        assert torch.equal(*found) and found[0].shape == (12, 144)
    plain = FolderPairs(
        tmp_path,
        INPUTS,
        FolderOptions(
            superpixels=tmp_path / "s.safetensors", augment=PairAugment((1.0, 1.0), (1.0, 1.0))
        ),
    )
    assert torch.equal(
        plain.read(2, generator(0)).segments,
        torch.from_numpy(patch_labels(plain.superpixels["2.png"], 4)).flatten(),
    )


def test_sources_can_be_pickled(tmp_path):
    """As worker processes that are not forked need them."""
    pairs(tmp_path, 5)
    write_superpixels(
        [(f"{i:03}.png", tmp_path / f"{i:03}.png") for i in range(5)], tmp_path / "s.safetensors"
    )
    made = [
        FolderPairs(tmp_path, INPUTS, FolderOptions(superpixels=tmp_path / "s.safetensors")),
        ScenePairs(Scenes("shapes", "train", 5), INPUTS),
        create_source(load_options({"kind": "masks", "set": "shapes", "train_size": 5}), INPUTS),
    ]
    for source in made:
        one, other = source.sample(3, 4), pickle.loads(pickle.dumps(source)).sample(3, 4)
        assert all(
            torch.equal(x, getattr(other, name))
            for name, x in vars(one).items()
            if isinstance(x, torch.Tensor)
        )


def test_millions_of_names_are_one_block():
    names = [f"{i // 1000:04}/größe {i}.jpg" for i in range(5000)]
    kept = Names(names)
    assert list(kept) == names and kept[4999] == names[-1] and len(kept) == 5000
    assert list(Names([])) == []


def test_inputs_of_a_model():
    from ovseg import create_model

    model = create_model("clip_dense_tiny")
    inputs = ModelInputs.of(model)
    assert (inputs.image_size, inputs.patch_size, inputs.mean) == (
        model.spec.image_size,
        model.spec.patch_size,
        tuple(model.spec.mean),
    )
    assert inputs.tokenize(["a dog"]).shape[0] == 1
    with pytest.raises(ValueError, match="no tokenizer"):
        ModelInputs(8).tokenize(["a"])


def test_torchvision_is_not_needed_for_scenes():
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "import ovseg.data.loader, ovseg.data.sources as s\n"
        "from ovseg.data.words import WordTokenizer\n"
        "inputs = s.ModelInputs(48, 4, WordTokenizer())\n"
        "tree = {'kind': 'scenes', 'style': 'shapes', 'train_size': 4, 'superpixels': True}\n"
        "source = s.create_source(s.load_options(tree), inputs)\n"
        "next(iter(ovseg.data.loader.Loader(source, 2)))\n"
        "try: s.create_source(s.load_options({'kind': 'masks', 'set': 'shapes'}), inputs)\n"
        "except ImportError as error: assert 'torchvision, which does not import' in str(error)\n"
        "else: raise SystemExit(1)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=120, cwd=Path(__file__).parents[2]
    )


def test_scenes_with_the_unseen_ones():
    """Captions name them then, and only then."""
    inputs = ModelInputs(48, tokenizer=lambda texts: torch.zeros(len(texts), 4, dtype=torch.int64))
    named = []
    for with_unseen in (False, True):
        source = create_source(
            load_options({"kind": "scenes", "train_size": 40, "with_unseen": with_unseen}), inputs
        )
        unseen = [
            i
            for i, split in enumerate(source.scenes.vocabulary.split_of_class)
            if split == "unseen"
        ]
        named.append(int(source.entities[:, :, unseen].sum()))
    assert named[0] == 0 and named[1] > 5
