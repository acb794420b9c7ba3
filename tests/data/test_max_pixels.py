"""``max_pixels`` can be set wherever a picture that is too large says that it should be."""

import numpy as np
import pytest
import torch
from PIL import Image

from ovseg.cli.main import main
from ovseg.data.sources import ModelInputs, create_source, load_options
from ovseg.errors import ConfigError, DataError, InputError
from ovseg.evaluation.validation import validation
from ovseg.training.recipe import load_recipe

pytestmark = pytest.mark.third_trial(10)
SMALL = {"max_pixels": 2399}  # the pictures below have one more
INPUTS = ModelInputs(16, tokenizer=lambda texts: torch.ones(len(texts), 2, dtype=torch.int64))


@pytest.fixture
def folder(tmp_path):
    """A picture with a caption, which is a data set of one picture too."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    for place in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / "VOCdevkit/VOC2012" / place).mkdir(parents=True)
    image.save(tmp_path / "VOCdevkit/VOC2012/JPEGImages/a.jpg")
    (tmp_path / "VOCdevkit/VOC2012/JPEGImages/a.txt").write_text("noise\n")
    Image.fromarray(np.ones((40, 60), np.uint8)).save(
        tmp_path / "VOCdevkit/VOC2012/SegmentationClass/a.png"
    )
    for split in ("train", "val"):
        (tmp_path / f"VOCdevkit/VOC2012/ImageSets/Segmentation/{split}.txt").write_text("a\n")
    return tmp_path


@pytest.mark.parametrize(
    "kind",
    [
        {"kind": "folder"},
        {"kind": "masks", "set": "voc20"},
        {"kind": "entity_folder", "gives": "nouns"},
    ],
)
def test_training_takes_it_from_the_recipe(folder, kind):
    options = {"root": str(folder), **kind}
    rng = torch.Generator()
    assert create_source(load_options(options), INPUTS).read(0, rng).image.shape == (3, 16, 16)
    with pytest.raises(
        (InputError, DataError),
        match=r"60x40 = 2400 pixels; the limit is 2399: .* data\.max_pixels in a recipe",
    ):
        create_source(load_options({**options, **SMALL}), INPUTS).read(0, rng)
    with pytest.raises(ConfigError, match=r"data\.max_pixels is 0; expected 1 to 10000000000"):
        load_options({**options, "max_pixels": 0})


def test_validation_takes_it_from_the_recipe_too(folder):
    recipe = load_recipe(
        "clip_scenes",
        ["validation.every_steps=1", "validation.data=voc20", f"validation.root={folder}"],
    )
    recipe.data.max_pixels = 2399
    measure = validation(recipe)
    import ovseg

    with pytest.raises(DataError, match="the limit is 2399"):
        measure(ovseg.from_pretrained("pacl_tiny"), 1, folder / "out")


def test_the_verbs_of_data_have_the_option(folder, capsys):
    verbs = [
        ["check", "voc20", "--root", str(folder)],
        ["superpixels", str(folder / "VOCdevkit"), "--out", str(folder / "s.safetensors")],
    ]
    for verb in verbs:
        assert main(["data", *verb, "--max-pixels", "2399"]) == 1
        printed = capsys.readouterr()
        assert (
            "60x40 = 2400 pixels; the limit is 2399: it is too large" in printed.out + printed.err
        )
        main(["data", *verb, "--max-pixels", "2400"])
        printed = capsys.readouterr()
        assert "is too large" not in printed.out + printed.err
        assert (
            main(["data", *verb, "--max-pixels", "0"]) == 2
            and "--max-pixels is 0; expected at least 1" in capsys.readouterr().err
        )
