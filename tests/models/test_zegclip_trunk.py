"""ZegCLIP's head on a trunk of timm: it learns masks, from pictures or from kept features alike; its
files; what asks for prompts is refused; the file of text vectors that it begins with.
"""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import ovseg
from ovseg.data.batches import StoredFeatures
from ovseg.data.sources import ModelInputs, create_source, load_options
from ovseg.errors import ConfigError
from ovseg.evaluation.validation import validation
from ovseg.systems.objective import Progress, create_objective
from ovseg.training.recipe import load_recipe
from ovseg.training.trainer import train
from ovseg.weights.files import load_tensors
from ovseg.weights.teachers import read_teacher

CLASSES = ("cat", "dog", "sofa")
COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]], np.uint8)
SET = """
title: drawn squares
folders: [squares]
images: "images/{}.png"
masks: [{path: "masks/{}.png", values: {start: 1, ignore: [0]}}]
splits: {train: {list: train.txt, count: 12}, val: {list: train.txt, count: 12}}
background: false
classes: [cat, dog, sofa]
unseen: [sofa]
"""
MAKE_TEACHER = Path(__file__).parents[2] / "scripts" / "make_teacher.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Ten pictures of twelve that the list names, a coloured square in each; a trunk; vectors."""
    root = tmp_path_factory.mktemp("squares")
    for name in ("images", "masks"):
        (root / name).mkdir()
    rng = np.random.default_rng(0)
    for number in range(10):
        picture = rng.integers(0, 40, (48, 64, 3), np.uint8)
        mask = np.zeros((48, 64), np.uint8)
        top = int(rng.integers(0, 16))
        left = int(rng.integers(0, 32))
        label = number % 3
        picture[top : top + 32, left : left + 32] += COLOURS[label]
        mask[top : top + 32, left : left + 32] = label + 1
        Image.fromarray(picture).save(root / "images" / f"{number}.png")
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    (root / "train.txt").write_text("\n".join(map(str, range(12))))
    (root / "set.yaml").write_text(SET)
    torch.manual_seed(0)
    weights = timm.create_model("test_efficientnet").state_dict()
    save_file({name: x.contiguous() for name, x in weights.items()}, root / "trunk.safetensors")
    vectors = np.random.default_rng(1).normal(1, 1, (3, 16)).astype(np.float16)
    np.save(root / "vectors.npy", vectors)
    (root / "names.txt").write_text("\n".join(CLASSES))
    assert make_teacher(root / "vectors.npy", root / "names.txt", root / "teacher.npz") == 0
    return root


def make_teacher(*arguments):
    main = runpy.run_path(str(MAKE_TEACHER))["main"]
    return main([*map(str, arguments), "--center", "--width", "16"])


def recipe(place, *overrides):
    text = f"{{teacher: {place}/teacher.npz, width: 16, fixed: true}}"
    found = load_recipe(
        "zegclip_lite0_voc",
        [
            f"model.options.text={text}",
            f"model.options.weights={place}/trunk.safetensors",
            "model.options.architecture=test_efficientnet",
            "model.options.stages=[2, 4]",
            "model.options.last=false",
            "model.options.image_size=64",
            "model.options.heads=2",
            "model.options.dropout=0.0",
            f"objective.options={{classes: [{', '.join(CLASSES)}], unseen: [sofa]}}",
            f"data.set={place}/set.yaml",
            f"data.root={place}",
            "data.workers=0",
            "optim.lr=5.0e-3",
            "schedule.warmup_steps=0",
            "train.steps=40",
            "train.device=cpu",
            "log.every_steps=1",
            *overrides,
        ],
    )
    found.model.options["text"]["words"] = {name: [] for name in CLASSES}
    return found


def tensors(model):
    return {name: x.clone() for name, x in torch.nn.Module.state_dict(model).items()}


def fresh(place, *overrides):
    return ovseg.create_model("zegclip_lite0", **recipe(place, *overrides).model.options)


def a_source(place, model, **options):
    tree = {"kind": "masks", "set": f"{place}/set.yaml", "root": str(place), "augment": None}
    return create_source(load_options({**tree, "partial": True, **options}), ModelInputs.of(model))


def a_batch(place, model, *numbers):
    source = a_source(place, model)
    return source.collate([source.read(number, torch.Generator()) for number in numbers])


def test_it_learns_and_its_files_leave_the_trunk_out(place, tmp_path):
    """With the features of each picture kept on disk; every class is found where it is."""
    chosen = recipe(place, "objective.options.setting=supervised", f"train.cache={tmp_path / 'c'}")
    before = tensors(ovseg.create_model("zegclip_lite0", **chosen.model.options))
    model = train(chosen, tmp_path / "run", quiet=True).eval()
    log = [json.loads(one) for one in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] > 10 and np.mean([one["loss"] for one in log[-5:]]) < 3
    moved = {name for name, x in tensors(model).items() if not torch.equal(x, before[name])}
    assert moved <= {name for name, _ in model.trainable} and "embedder.0.weight" in moved
    held = load_tensors(tmp_path / "run" / "model" / "model.safetensors")
    assert not any(name.startswith(("backbone.trunk", "prompts")) for name in held)
    again = ovseg.from_pretrained(tmp_path / "run").eval()
    batch = a_batch(place, model, *range(6))
    texts = model.encode_labels(CLASSES)
    with torch.no_grad():
        masks = model.segment_logits(model(model.normalize(batch.images)), texts)
        other = again.segment_logits(
            again(again.normalize(batch.images)), again.encode_labels(CLASSES)
        )
    assert torch.equal(masks, other)
    found = torch.nn.functional.interpolate(masks, (64, 64), mode="bilinear").argmax(1)
    there = batch.masks != 255
    assert float((found == batch.masks)[there].float().mean()) > 0.9


@torch.no_grad()
def test_the_features_and_what_is_kept_of_them(place):
    """Equation (1) of the model; features in 16 bits give the losses of the pictures."""
    model = fresh(place)
    batch = a_batch(place, model, 0, 1)
    tower = model.encode_tower(model.normalize(batch.images))
    features = model(model.normalize(batch.images))
    linear, norm = model.embedder
    torch.testing.assert_close(features.tokens, norm(tower.tokens @ linear.weight.T + linear.bias))
    torch.testing.assert_close(tower.embedding, tower.tokens.mean(1))
    torch.testing.assert_close(features.embedding, norm(linear(tower.tokens.mean(1))))
    objective = create_objective(
        model, setting="inductive", classes=list(CLASSES), unseen=["sofa"]
    ).eval()
    assert objective.class_texts.shape == (2, 16)
    seen = objective(batch, Progress())
    batch.features = StoredFeatures(tower.tokens.half(), tower.embedding.half(), tower.grid)
    batch.images = batch.images.new_empty(2, 3, 0, 0)
    kept = objective(batch, Progress())
    torch.testing.assert_close(kept["total"], seen["total"], rtol=1e-3, atol=1e-4)
    # How long texts are says nothing.
    texts = model.encode_labels(CLASSES)
    masks = model.segment_logits(features, texts)
    torch.testing.assert_close(model.segment_logits(features, 3 * texts), masks)
    assert masks.shape == (2, 3, *features.grid)


def test_a_part_of_a_set_whole_and_not_augmented(place):
    model = fresh(place)
    source = a_source(place, model)
    assert len(source) == 10 and source.describe()["partial"] == "10 of 12"
    sample = source.read(0, torch.Generator())
    mask = sample.mask
    assert sample.image.shape == (3, 64, 64) and bool((mask[48:] == 255).all())
    assert torch.equal(mask, source.read(0, torch.Generator().manual_seed(9)).mask)
    assert set(mask.unique().tolist()) == {0, 255}
    found = validation(
        recipe(
            place,
            f"validation={{every_steps: 1, data: {place}/set.yaml, root: {place}, partial: true}}",
        )
    )
    assert len(found.data) == 10


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.options.prompts=10", "prompts is 10 and backbone.kind is 'timm', .*prompts null"),
        ("model.options.trained=[prompts, head]", "trained names 'prompts' and .*no blocks for"),
        ("model.options.text.teacher=null", "text.fixed is True and text.teacher is missing"),
    ],
)
def test_what_a_trunk_does_not_have(place, override, message):
    with pytest.raises(ConfigError, match=message):
        fresh(place, override)


def test_parts_and_prompts_elsewhere(place):
    with pytest.raises(ConfigError, match=r"prompts is None, which is for a trunk of timm"):
        ovseg.create_model("zegclip_tiny", prompts=None)
    model = fresh(place)
    with pytest.raises(ConfigError, match=r"data.partial is True and data.set is 'digits', which"):
        a_source(place, model, set="digits")
    scenes = "validation={every_steps: 1, data: digits, partial: true}"
    with pytest.raises(ConfigError, match=r"validation.partial is True and validation.data is"):
        validation(recipe(place, scenes))


def test_the_file_of_text_vectors(place, tmp_path, capsys):
    rows = torch.from_numpy(np.load(place / "vectors.npy").astype(np.float32))
    unit = torch.nn.functional.normalize(rows, dim=1)
    teacher = read_teacher(place / "teacher.npz", 16)
    torch.testing.assert_close(teacher.center, unit.mean(0))
    torch.testing.assert_close(teacher.vectors["dog"], unit[1])
    expected = torch.nn.functional.normalize(unit - unit.mean(0), dim=1)
    torch.testing.assert_close(fresh(place).encode_labels(CLASSES), expected)
    vectors = place / "vectors.npy"
    for arguments, message in (
        ((vectors, place / "names.txt", tmp_path / "t.npy"), "expected a name that ends in .npz"),
        (
            (vectors, "voc20", tmp_path / "t.npz"),
            "expected floats of [20, 16], a row for each text",
        ),
        ((vectors, tmp_path / "none.txt", tmp_path / "t.npz"), "does not exist"),
    ):
        assert make_teacher(*arguments) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
