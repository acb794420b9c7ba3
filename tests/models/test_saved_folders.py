"""Saved folders hold every option of their model: presets that change later change none of them.

``tests/golden/c002b1a`` holds folders and a run of a version whose folders held the caller's
options alone.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import ovseg
from ovseg.data.scenes import Scenes
from ovseg.errors import CheckpointError
from ovseg.systems import registry
from ovseg.training.recipe import load_recipe
from ovseg.training.trainer import train
from ovseg.weights.files import tensors_hash

EARLIER = Path(__file__).parents[1] / "golden" / "c002b1a"
WORDS = ["a red seven", "a blue zero", "gravel", "grass", "water"]
PICTURE = Scenes("digits", "val", 1)[0].image


@pytest.fixture(scope="module")
def expected():
    return dict(np.load(EARLIER / "expected.npz"))


def labels(model):
    return ovseg.segment(PICTURE, WORDS, model=model).labels


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", ["pacl", "zegclip", "ovsegmentor"])
def test_folders_of_an_earlier_version_label_as_they_did(name, expected, tmp_path):
    model = ovseg.from_pretrained(EARLIER / name)
    with torch.no_grad():
        features = model.encode_image(model.preprocess(PICTURE)[None])
        logits = model.segment_logits(features, model.encode_labels(WORDS))
    np.testing.assert_allclose(logits.numpy(), expected[f"{name}/logits"], rtol=0, atol=1e-5)
    differing = int((labels(model) != expected[f"{name}/labels"]).sum())
    assert differing <= PICTURE.shape[0] * PICTURE.shape[1] // 500  # ties, on other processors
    again = ovseg.from_pretrained(model.save_pretrained(tmp_path / "now"))
    assert config_of(tmp_path / "now")["format"] == 2
    assert np.array_equal(labels(again), labels(model)) and again.config == model.config


def test_a_run_of_an_earlier_version_is_resumed(expected, tmp_path):
    shutil.copytree(EARLIER / "run", tmp_path / "run")
    recipe = load_recipe(EARLIER / "run" / "config.yaml")
    model = train(recipe, tmp_path / "run", resume=True, quiet=True)
    entries = [
        json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    ]
    assert [entry["step"] for entry in entries] == list(range(6))
    found = np.array([[entry["loss"], entry["grad_norm"]] for entry in entries])
    np.testing.assert_allclose(
        found, expected["run/losses"], rtol=1e-5
    )  # bit for bit on the processor that made them
    trained = ovseg.from_pretrained(EARLIER / "trained")
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-5)
    assert tensors_hash(trained.state_dict()) == str(
        expected["run/weights"]
    )  # the hash of weights is the one of then
    assert np.array_equal(labels(trained), expected["trained/labels"])


def test_presets_that_change_later_change_no_saved_folder(tmp_path, monkeypatch):
    folders = {
        name: ovseg.create_model(name).save_pretrained(tmp_path / name)
        for name in ovseg.list_models("*_tiny")
    }
    before = {name: ovseg.from_pretrained(folder) for name, folder in folders.items()}
    known = registry.presets()
    edits = {
        "pacl_tiny": {"temperature": 3.0},
        "zegclip_tiny": {"heads": 8},
        "mgca_tiny": {"logit_scale": 2.0},
        "ovsegmentor_tiny": {"backbone": {**known["ovsegmentor_tiny"]["backbone"], "pool": "mean"}},
    }
    edited = {
        name: {**preset, "templates": "clip80", **edits.get(name, {})}
        for name, preset in known.items()
    }
    del edited["segclip_tiny"]  # a preset that is no more
    monkeypatch.setattr(registry, "presets", lambda: edited)
    assert ovseg.create_model("pacl_tiny").temperature == 3.0
    for name, folder in folders.items():
        after = ovseg.from_pretrained(folder)
        assert (
            after.name == name
            and after.config == before[name].config
            and after.templates == "scenes"
        )
        assert vars(after.options) == vars(before[name].options)
    assert np.array_equal(
        labels(ovseg.from_pretrained(folders["pacl_tiny"])), labels(before["pacl_tiny"])
    )
    bundled = ovseg.from_pretrained("pacl_tiny:digits")
    assert bundled.temperature == 0.3 and bundled.templates == "scenes"


def test_every_option_is_in_the_folder(tmp_path):
    model = ovseg.create_model("groupvit_tiny", width=32, text={"kind": "words", "width": 32})
    config = config_of(model.save_pretrained(tmp_path, miou=3.5))
    assert (
        config["format"] == 2
        and config["model"] == "groupvit_tiny"
        and config["system"] == "groupvit"
        and config["miou"] == 3.5
    )
    options = config["options"]
    assert (
        options["backbone"]["kind"] == "grouping"
        and options["backbone"]["width"] == 32
        and options["templates"] == "scenes"
    )
    assert set(options["backbone"]) == {"kind", *vars(model.backbone.options)}
    assert options["backbone"]["text"] == {
        "kind": "words",
        "width": 32,
        "heads": 4,
        "depth": 2,
        "hidden": 128,
        "context_length": 16,
    }
    assert set(options) == set(vars(model.options))
    decoder = config_of(
        ovseg.create_model("segclip_tiny", decoder={"depth": 1}).save_pretrained(tmp_path / "s")
    )["options"]["decoder"]
    assert decoder == {"width": 384, "depth": 1, "heads": 8}


def test_options_of_a_call_go_over_those_of_the_folder(tmp_path):
    folder = ovseg.create_model("pacl_tiny", width=32, temperature=0.5).save_pretrained(tmp_path)
    model = ovseg.from_pretrained(folder, temperature=0.25, backbone={"image_size": 64})
    assert (
        model.options.temperature == 0.25
        and model.spec.image_size == 64
        and model.backbone.token_dim == 32
    )
    assert (
        config_of(model.save_pretrained(tmp_path / "again"))["options"]["backbone"]["image_size"]
        == 64
    )


@pytest.mark.parametrize(
    "change,message",
    [
        (
            {"format": 3},
            r"config\.json has format 3, of a later version of ovseg; expected 1 or 2: pip install -U ovseg-kernels",
        ),
        ({"format": "2"}, r"config\.json is damaged \(format is '2'\)"),
        ({"system": "throw_away"}, r"system is 'throw_away'; expected one of \['clip_dense'"),
        ({"system": None, "model": "nobody"}, "nobody"),
        (
            {"options": {"temperature": 1.0}},
            r"config\.json is damaged \(options: backbone\.kind is missing\)",
        ),
    ],
)
@pytest.mark.bad_input("weights", "a configuration of a saved folder that cannot be")
def test_configurations_that_cannot_be(change, message, tmp_path):
    folder = ovseg.create_model("pacl_tiny").save_pretrained(tmp_path)
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **change}))
    with pytest.raises((CheckpointError, ovseg.errors.InputError), match=message):
        ovseg.from_pretrained(folder)


def test_models_of_registered_functions_are_saved_and_loaded(tmp_path):
    @ovseg.register_model("registered")
    def build(temperature=0.5):
        return ovseg.create_model("pacl_tiny", temperature=temperature)

    try:
        assert "registered" in ovseg.list_models()
        folder = ovseg.create_model("registered", temperature=0.25).save_pretrained(tmp_path)
        assert config_of(folder)["system"] is None and config_of(folder)["options"] == {
            "temperature": 0.25
        }
        assert ovseg.from_pretrained(folder).options.temperature == 0.25
    finally:
        registry.MODELS.unregister("registered")
