"""Runs upon a trunk of timm: what their files hold, resuming, and a stage that trains the trunk."""

import shutil

import pytest
import timm
import torch
from safetensors.torch import save_file

import ovseg
from ovseg.data.scenes import VOCABULARIES
from ovseg.errors import ConfigError
from ovseg.training import state
from ovseg.training.recipe import load_recipe
from ovseg.training.trainer import train
from ovseg.weights.files import load_tensors

DIGITS = VOCABULARIES["digits"]
WORDS = (*DIGITS.colours, *DIGITS.kinds, *DIGITS.stuff)
SMALL = [
    "model.name=pacl_lite0",
    "data.train_size=24",
    "data.workers=0",
    "data.image_size=48",
    "train.batch_size=4",
    "train.steps=4",
    "checkpoint.every_steps=2",
    "checkpoint.keep=9",
    "schedule.warmup_steps=0",
    "train.device=cpu",
    "model.options={tap: features, trained: [embedder, scale, text], dropout: 0.2, "
    "architecture: test_efficientnet, image_size: 48, stages: [2, 4], last: false}",
    f"model.options.text={{kind: vectors, width: 16, words: {{{', '.join(WORDS)}}}}}",
]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    path = tmp_path_factory.mktemp("trunk") / "trunk.safetensors"
    torch.manual_seed(0)
    state = timm.create_model("test_efficientnet").state_dict()
    save_file({name: x.contiguous() for name, x in state.items()}, path)
    return path


def recipe(trunk, *overrides):
    return load_recipe("pacl_scenes", [*SMALL, f"model.options.weights={trunk}", *overrides])


def tensors(model):
    return {name: x.clone() for name, x in torch.nn.Module.state_dict(model).items()}


def trunk_of(found):
    return {name: x for name, x in found.items() if name.startswith("backbone.trunk.")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def test_a_run_keeps_the_trunk_out_of_its_files_and_resumes(trunk, tmp_path):
    whole = train(recipe(trunk), tmp_path / "whole", quiet=True)
    before = tensors(ovseg.create_model("pacl_lite0", **recipe(trunk).model.options))
    after = tensors(whole)
    moved = {name for name, x in after.items() if not torch.equal(x, before[name])}
    assert moved == {name for name, _ in whole.trainable}
    saved = state.complete(tmp_path / "whole" / "checkpoints")
    for folder in (saved[-1], tmp_path / "whole" / "model"):
        assert not trunk_of(load_tensors(folder / "model.safetensors"))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "model")
    shutil.rmtree(state.complete(tmp_path / "killed" / "checkpoints")[-1])
    again = train(recipe(trunk), tmp_path / "killed", resume=True, quiet=True)
    assert same(tensors(again), after)
    labels = ["red seven", "grass", "a blue one"]
    assert ovseg.from_pretrained(tmp_path / "whole").encode_labels(labels).shape == (3, 16)


def test_a_second_stage_trains_the_trunk(trunk, tmp_path):
    stages = (
        "stages=[{name: a, train: {steps: 2}}, {name: b, train: {steps: 2}, "
        "model: {options: {trained: [embedder, vision, text]}}}]"
    )
    model = train(recipe(trunk, stages), tmp_path, quiet=True)
    first, last = (
        load_tensors(path / "model.safetensors")
        for path in state.complete(tmp_path / "checkpoints")
    )
    assert not trunk_of(first) and model.named_weights is None
    begun, found = load_tensors(trunk), trunk_of(last)
    assert found and not all(
        torch.equal(x, begun[name.removeprefix("backbone.trunk.")]) for name, x in found.items()
    )
    again = ovseg.from_pretrained(tmp_path)
    assert same(trunk_of(tensors(again)), trunk_of(tensors(model)))
    # What was trained is not what the name stands for: a later run has to let go of the name.
    with pytest.raises(ConfigError, match=r"init\.model is .* unexpected: backbone\.trunk"):
        train(recipe(trunk, f"init.model={tmp_path}"), tmp_path / "next", quiet=True)
    fresh = recipe("null", f"init.model={tmp_path}", "train.steps=1")
    assert trunk_of(train(fresh, tmp_path / "fresh", quiet=True).state_dict())
