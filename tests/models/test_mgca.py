"""MGCA: the frozen trunk and the decoder upon it, on the tiny CLIP and a reduced ViT; files;
options.
"""

import json

import pytest
import torch
from torch.nn import functional as F

import ovseg
import ovseg_kernels as ok
from ovseg.errors import CheckpointError, ConfigError
from ovseg.nn.readout import READOUTS
from ovseg.systems.objective import create_objective
from ovseg.training.recipe import load_recipe

SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 1, "layers": 2},
}


def images(B=2, side=48):
    return torch.rand(B, 3, side, side, generator=torch.Generator().manual_seed(0)) - 0.5


def shaken(model):
    """Its decoder does something."""
    torch.manual_seed(5)
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.leave.weight.normal_(std=0.1)
    return model


@torch.no_grad()
def test_it_begins_as_maskclip():
    model = ovseg.create_model("mgca_tiny", clip="clip_dense_tiny:digits")
    clip = ovseg.create_model("clip_dense_tiny", "digits", readout="maskclip")
    features, expected = model(images()), clip(images())
    torch.testing.assert_close(features.tokens, expected.tokens)
    torch.testing.assert_close(features.embedding, expected.embedding)
    assert not torch.allclose(shaken(model)(images()).tokens, expected.tokens)


@pytest.mark.parametrize("doublings", [0, 1, 2])
@torch.no_grad()
def test_decoder_by_its_formula(doublings):
    torch.manual_seed(0)
    model = shaken(
        ovseg.create_model(
            "mgca_vit_b16", architecture=SMALL, hidden=8, layers=1, doublings=doublings
        )
    )
    x = images(2, 64)
    found, f = model(x), 2**doublings
    assert found.grid == (4 * f, 4 * f) and found.tokens.shape == (2, 16 * f * f, 32)
    dense = model.backbone.encode_dense(x, READOUTS["maskclip"])
    maps = dense.tokens.transpose(1, 2).unflatten(2, dense.grid)
    maps = F.interpolate(maps, found.grid, mode="bilinear", align_corners=False)
    layer = model.decoder.layers[0]
    inside = layer.enter(layer.norm(maps.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    a, b = layer.mix(inside).chunk(2, 1)
    expected = maps + layer.leave((a * b.sigmoid()).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(
        found.tokens, expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_similarity_is_that_of_the_objective():
    texts = torch.randn(3, 64)
    for weight, options in (("softmax", {"temperature": 0.3}), ("sigmoid", {"weight": "sigmoid"})):
        model = ovseg.create_model("mgca_tiny", weight=weight)
        features = model(images())
        torch.testing.assert_close(
            model.similarity(features, texts),
            ok.patch_text_similarity(features.tokens, texts, **options),
        )
        torch.testing.assert_close(
            model.similarity(images(), texts), model.similarity(features, texts)
        )


def test_the_clip_is_never_trained_nor_left_training():
    model = ovseg.create_model("mgca_tiny").train()
    assert not model.backbone.training and model.decoder.training
    with pytest.raises(ConfigError, match="trained names 'vision'; expected some of"):
        ovseg.create_model("mgca_tiny", trained=["vision"])
    assert {name.split(".")[0] for name, _ in model.trainable} == {"decoder", "log_scale"}


@torch.no_grad()
def test_files_hold_the_decoder_alone_where_the_clip_was_named(tmp_path):
    model = shaken(ovseg.create_model("mgca_tiny", clip="clip_dense_tiny:digits"))
    folder = ovseg.save_pretrained(model, tmp_path / "named")
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["options"]["clip"] == "clip_dense_tiny:digits"
        and config["clip_hash"] == model.weights_hash()
    )
    assert all(name.startswith(("decoder.", "log_scale")) for name in model.state_dict())
    again = ovseg.from_pretrained(folder)
    torch.testing.assert_close(again(images()).tokens, model(images()).tokens)
    (folder / "config.json").write_text(json.dumps({**config, "clip_hash": "float32:0"}))
    with pytest.raises(CheckpointError, match="was trained on another CLIP"):
        ovseg.from_pretrained(folder)
    whole = shaken(ovseg.create_model("mgca_tiny"))
    assert any(name.startswith("backbone.") for name in whole.state_dict())
    again = ovseg.from_pretrained(ovseg.save_pretrained(whole, tmp_path / "whole"))
    torch.testing.assert_close(again(images()).tokens, whole(images()).tokens)
    with pytest.raises(ConfigError, match="differ from those of this model"):
        ovseg.create_model("mgca_tiny", clip="clip_dense_tiny:digits", backbone={"width": 32})


def test_recipes_build():
    for name in ("mgca_scenes", "mgca_vit_b16"):
        recipe = load_recipe(name)
        options = (
            {**recipe.model.options, "clip": None, "architecture": SMALL}
            if "vit" in name
            else recipe.model.options
        )
        objective = create_objective(
            ovseg.create_model(recipe.model.name, **options), **recipe.objective.options
        )
        assert objective.weights == dict.fromkeys(("object", "region", "pixel"), 1.0)


@pytest.mark.bad_input("models", "an option of MGCA that means nothing")
@pytest.mark.parametrize(
    "options,message",
    [
        ({"readout": "proxyclip"}, "readout is 'proxyclip'; expected one of"),
        ({"weight": "max"}, "weight is 'max'; expected one of"),
        ({"temperature": 0.0}, r"temperature is 0\.0; expected a positive"),
        ({"logit_scale": -1.0}, r"logit_scale is -1\.0"),
        ({"hidden": 0}, "hidden is 0; expected 1 or more"),
        ({"layers": -1}, "layers is -1; expected 0 or more"),
        ({"doublings": 9}, "doublings is 9; expected 0 to 3"),
        ({"backbone": {"depth": 0}}, "no blocks; expected at least one"),
    ],
)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        ovseg.create_model("mgca_tiny", **options)


def test_towers_without_a_class_token_are_refused():
    with pytest.raises(ValueError, match="mgca needs blocks over a class token"):
        ovseg.create_model("mgca_vit_b16", architecture="RN50")
