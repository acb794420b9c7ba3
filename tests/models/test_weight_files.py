"""Files of weights as other software leaves them: what is read, under which names, and what is
refused in which words."""

import copy
import gzip
import io
import zipfile

import numpy as np
import pytest
import torch
from hub_stand_in import CONFIG
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import ovseg
from ovseg.errors import CheckpointError
from ovseg.weights.files import load_tensors, save_weights
from ovseg.weights.pickles import read_published, write_published
from ovseg.weights.state_dicts import CONTAINERS, plain_names, plain_state, unwrapped

PICTURE = np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(1)
    return ovseg.create_model("pacl_tiny")


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(x, theirs[name]) for name, x in ours.items()
    )


def write(state, path):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)


def prefixed(state, prefix):
    return {prefix + name: x for name, x in state.items()}


@pytest.mark.third_trial(11)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors"])
def test_prefixes_of_wrappers_are_taken_off(tiny, tmp_path, suffix):
    for number, prefix in enumerate(
        (
            "",
            "module.",
            "_orig_mod.",
            "module._orig_mod.",
            "_orig_mod.module.",
            "model.",
            "model.module.",
            "_fsdp_wrapped_module.",
            "module._checkpoint_wrapped_module.",
        )
    ):
        path = tmp_path / f"{number}{suffix}"
        write(prefixed(tiny.state_dict(), prefix), path)
        assert same(ovseg.create_model("pacl_tiny", str(path)), tiny)
    # Off in the middle where no module is called so; a prefix that only some names have is part of
    # them.
    assert set(plain_names({"a._orig_mod.b": torch.ones(1), "module.c": torch.ones(1)})) == {
        "a.b",
        "module.c",
    }
    assert set(plain_names({"_orig_mod.a": torch.ones(1), "a": torch.ones(1)})) == {
        "_orig_mod.a",
        "a",
    }


@pytest.mark.third_trial(11)
@pytest.mark.parametrize("key", CONTAINERS)
def test_containers_beside_what_a_training_keeps(tiny, tmp_path, key):
    optimizer = torch.optim.AdamW(tiny.parameters())
    saved = {
        "epoch": 3,
        "optimizer": optimizer.state_dict(),
        key: prefixed(tiny.state_dict(), "module."),
        "lr_schedulers": [],
        "loss": 0.5,
    }
    torch.save(saved, tmp_path / "last.ckpt")
    assert same(ovseg.create_model("pacl_tiny", str(tmp_path / "last.ckpt")), tiny)


@pytest.mark.third_trial(11)
def test_the_weights_come_before_their_average(tiny, tmp_path):
    average = AveragedModel(tiny)
    other = {name: x + 1 for name, x in tiny.state_dict().items()}
    for ema in ("state_dict_ema", "model_ema", "ema"):
        torch.save({ema: other, "state_dict": tiny.state_dict()}, tmp_path / "both.pt")
        assert same(ovseg.create_model("pacl_tiny", str(tmp_path / "both.pt")), tiny)
    for saved in (
        average.state_dict(),
        {"model_ema": average.state_dict()},
        {"ema": {"module": tiny.state_dict()}},
        prefixed(average.state_dict(), "_orig_mod."),
    ):
        torch.save(saved, tmp_path / "alone.pt")
        assert same(ovseg.create_model("pacl_tiny", str(tmp_path / "alone.pt")), tiny)


@pytest.fixture(scope="module")
def clip():
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    torch.manual_seed(2)
    return open_clip.CLIP(**CONFIG)


@pytest.mark.third_trial(11)
@pytest.mark.parametrize(
    "prefix", ["clip.", "model.clip.", "module.clip.", "clip.module.", "_orig_mod."]
)
def test_every_way_to_name_a_clip_reads_its_wrapped_file(clip, tmp_path, prefix):
    path = tmp_path / "clip.pt"
    torch.save({"model_state_dict": prefixed(clip.state_dict(), prefix)}, path)
    expected = clip.visual.proj
    dense = ovseg.create_model("clip_dense", str(path), architecture=CONFIG)
    assert torch.equal(dense.backbone.clip.visual.proj, expected)
    started = ovseg.create_model("pacl_vit_b16", clip=str(path), architecture=CONFIG)
    assert torch.equal(started.backbone.clip.visual.proj, expected)


@pytest.mark.third_trial(11)
def test_segclip_without_its_decoder_is_no_clip(tmp_path):
    """All names of such a file begin with ``clip.``, and that is part of them."""
    options = {
        "architecture": CONFIG,
        "second_stage": 1,
        "heads": 4,
        "decoder": {"width": 32, "depth": 1, "heads": 4},
    }
    model = ovseg.create_model("segclip_vit_b16", **options)
    state = {
        name: x for name, x in ovseg.official_state_dict(model).items() if name.startswith("clip.")
    }
    torch.save({"state_dict": prefixed(state, "module.")}, tmp_path / "segclip.bin")
    found = ovseg.create_model("segclip_vit_b16", str(tmp_path / "segclip.bin"), **options)
    assert torch.equal(found.groups.semantic_center, model.groups.semantic_center)
    wrapped = AveragedModel(found)
    assert ovseg.official_state_dict(wrapped).keys() == ovseg.official_state_dict(found).keys()
    assert ovseg.load_official_state_dict(nn.DataParallel(found), prefixed(state, "module.")) != []


@pytest.mark.third_trial(11)
def test_what_is_no_known_wrapper_is_named_by_its_keys(tiny, clip, tmp_path):
    words = {name: x for name, x in clip.state_dict().items() if not name.startswith("visual.")}
    for saved, message in (
        (
            {"state": {}, "param_groups": []},
            r"holds no state dict but a mapping of 2 keys \(state, param_groups\); expected names "
            r"and",
        ),
        (
            {"net": {"a": torch.ones(1)}, "epoch": 3},
            r"a mapping of 2 keys \(net, epoch\); expected .* under state_dict, model_state_dict",
        ),
        ({"a": torch.ones(1), "epoch": 3}, r"beside tensors, 'epoch' is a int \(of 2 keys\)"),
        ({"a": torch.ones(1), "b": None}, r"beside tensors, 'b' is a NoneType"),
        (
            {"a": torch.ones(2).to_sparse()},
            r"a is of layout torch\.sparse_coo; expected a plain tensor",
        ),
        ({"a": torch.ones(2, device="meta")}, "a is on the meta device, without numbers"),
        (
            {"a": torch.ones(1).expand(10**6)},
            r"a is of shape \[1000000\], for which the file holds 4 bytes",
        ),
        ([torch.ones(1)], "holds no state dict but a list"),
        ({}, "an empty mapping"),
        (
            {"encoder." + name: x for name, x in tiny.state_dict().items()},
            r"does not fit the model \(\d+ missing: .*; \d+ unexpected: enc",
        ),
        (words, r"does not fit the model \(\d+ missing: .*; \d+ unexpected: "),
    ):
        torch.save(saved, tmp_path / "odd.pt")
        with pytest.raises(CheckpointError, match=message) as found:
            ovseg.create_model("pacl_tiny", str(tmp_path / "odd.pt"))
        assert str(tmp_path / "odd.pt") in str(found.value) and "safetensors file" not in str(
            found.value
        )
    with pytest.raises(
        CheckpointError, match=r"odd\.pt does not fit the model \(\d+ missing: visual\."
    ):
        ovseg.create_model("clip_dense", clip=str(tmp_path / "odd.pt"), architecture=CONFIG)


def _torch_bytes(state):
    found = io.BytesIO()
    torch.save(state, found)
    return found.getvalue()


def _archive():
    found = io.BytesIO()
    with zipfile.ZipFile(found, "w") as archive:
        archive.writestr("weights/readme.txt", "hello")
    return found.getvalue()


def _packed(state):
    """A checkpoint of torch's whose tensor of zeros is packed a thousand to one."""
    found, whole = io.BytesIO(), zipfile.ZipFile(io.BytesIO(_torch_bytes(state)))
    with zipfile.ZipFile(found, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in whole.namelist():
            archive.writestr(name, whole.read(name))
    return found.getvalue()


NOT_WEIGHTS = [
    (b"", "is empty"),
    (b"\n<!DOCTYPE html><title>404</title>", "is an HTML page"),
    (b"<html>", "is an HTML page"),
    (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
        "is a pointer of git LFS",
    ),
    (gzip.compress(b"x"), "is compressed by gzip"),
    (b'{"a": 1}', "is JSON text"),
    (b"\x93NUMPY\x01\x00", "is an array of numpy"),
    (
        _archive(),
        r"is a zip archive that torch\.save did not write \(1 files: weights/readme\.txt\)",
    ),
    (_packed({"a": torch.zeros(10**6)}), r"says that it unpacks to \d+"),
]


@pytest.mark.third_trial(11)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_is_what_its_first_bytes_say(tiny, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    for data, message in NOT_WEIGHTS:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            ovseg.create_model("pacl_tiny", str(path))
    save_weights(tiny, tmp_path / "other")
    for data in (_torch_bytes(tiny.state_dict()), (tmp_path / "other").read_bytes()):
        path.write_bytes(data)
        assert same(ovseg.create_model("pacl_tiny", str(path)), tiny)


@pytest.mark.third_trial(11)
def test_init_of_a_recipe_reads_them_too(tiny, tmp_path):
    from ovseg.training.recipe import load_recipe
    from ovseg.training.stages import build_model, take_weights

    torch.save(
        {"state_dict": prefixed(tiny.state_dict(), "module._orig_mod.")}, tmp_path / "last.ckpt"
    )
    for part in ("model", "backbone"):
        recipe = load_recipe(
            "clip_scenes", ["model.name=pacl_tiny", f"init.{part}={tmp_path / 'last.ckpt'}"]
        )
        model = build_model(recipe)
        take_weights(model, recipe, tmp_path)
        assert torch.equal(model.backbone.words.weight, tiny.backbone.words.weight)
        assert same(model, tiny) == (part == "model")


def wrappers(model, tmp_path):
    """The model in each wrapper that torch has for one process."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        from torch.distributed.fsdp import fully_shard

        yield "compile", torch.compile(model)
        yield "DataParallel", nn.DataParallel(model)
        yield "AveragedModel", AveragedModel(model)
        yield "DDP", nn.parallel.DistributedDataParallel(model)
        yield "compile of DDP", torch.compile(nn.parallel.DistributedDataParallel(model))
        yield "AveragedModel of compile", AveragedModel(torch.compile(model))
        inner = copy.deepcopy(model)
        inner.embedder = torch.compile(inner.embedder)
        yield "a compiled part", inner
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        sharded = copy.deepcopy(model)
        for block in sharded.blocks:
            fully_shard(block, mesh=mesh)
        yield "fully_shard", sharded
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.third_trial(11)
def test_a_wrapped_model_is_saved_and_used_as_the_bare_one(tiny, tmp_path):
    expected = ovseg.segment(PICTURE, ["gravel", "red seven"], model=tiny).labels
    seen = []
    for name, wrapped in wrappers(tiny, tmp_path):
        folder = tmp_path / name
        assert same(ovseg.from_pretrained(ovseg.save_pretrained(wrapped, folder)), tiny), name
        save_weights(wrapped, tmp_path / "weights.safetensors")
        assert load_tensors(tmp_path / "weights.safetensors").keys() == tiny.state_dict().keys(), (
            name
        )
        for suffix in (".pt", ".safetensors"):
            write_published(wrapped.state_dict(), tmp_path / f"plain{suffix}")
            found = read_published(tmp_path / f"plain{suffix}")
            assert found.keys() == tiny.state_dict().keys(), name
        if name in (
            "DataParallel",
            "AveragedModel",
            "DDP",
            "compile of DDP",
        ):  # what is compiled stays so
            assert isinstance(unwrapped(wrapped), type(tiny)), name
            assert np.array_equal(
                ovseg.segment(PICTURE, ["gravel", "red seven"], model=wrapped).labels, expected
            ), name
        seen.append(name)
    assert len(seen) == 8
    assert plain_state(nn.Sequential(AveragedModel(nn.Linear(2, 2)))).keys() == {
        "0.weight",
        "0.bias",
    }
    compiled = torch.compile(tiny)
    assert unwrapped(compiled) is compiled
