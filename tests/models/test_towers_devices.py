"""Image towers where they run: nothing waits for the GPU, half precision, compiled, and behind a
predictor.
"""

from unittest import mock

import numpy as np
import pytest
import reduced_towers
import timm
import torch
from reduced_towers import reduced
from unreadable import unreadable_device

import ovseg
from ovseg.nn.readout import READOUTS

NAMES = (
    "ViT-B-16",
    "ViT-L-14-CLIPA",
    "coca_ViT-B-32",
    "ViT-B-16-SigLIP",
    "PE-Core-B-16",
    "EVA02-B-16",
    "MobileCLIP2-B",
    "ViTamin-S",
    "MobileCLIP2-S0",
    "convnext_large_d",
    "RN50",
)
SECOND = {"embed_dim": 32, "depth": 1, "num_heads": 2}
PROXY = {"name": "vit_small_patch14_dinov2"}


def create(name, **options):
    with reduced(name):
        return ovseg.create_model("clip_dense_vit_b16", architecture=name, **options)


def second_encoder():
    """Inside, the ViT of ``proxy`` is small."""
    plain = timm.create_model
    return mock.patch.object(
        timm,
        "create_model",
        lambda name, *a, **k: plain(name, *a, **(k | (SECOND if name == PROXY["name"] else {}))),
    )


def made_there(tensor):
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
    return (
        torch.nn.Parameter(fake, tensor.requires_grad)
        if isinstance(tensor, torch.nn.Parameter)
        else fake
    )


@pytest.mark.parametrize("name", NAMES)
def test_towers_do_not_wait(name, monkeypatch):
    with second_encoder():
        model = create(name, proxy=PROXY)
    with unreadable_device(monkeypatch) as refusing:
        for module in (
            *model.modules(),
            *model.proxy.modules(),
        ):  # timm cannot build on such a device, and parameters cannot move to it
            for tensors in (module._parameters, module._buffers):
                tensors |= {
                    key: made_there(tensor) for key, tensor in tensors.items() if tensor is not None
                }
        images = torch.zeros(2, 3, 96, 128, dtype=torch.uint8, device="cuda")
        ids = torch.zeros(2, model.backbone.clip.context_length, dtype=torch.int64, device="cuda")
        for readout in READOUTS if model.backbone.vision_blocks else ("clip",):
            model.set_readout(readout)
            with refusing, torch.no_grad():
                features = model(model.normalize(images))
                assert (
                    features.tokens.device.type == "cuda"
                    and features.embedding.device.type == "cuda"
                )
        with refusing, torch.no_grad():
            assert model.similarity(model.normalize(images), model.encode_text(ids)).shape == (2, 2)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_half_precision(name):
    with second_encoder():
        model = create(name, proxy=PROXY)
    images = torch.rand(1, 3, 96, 128)
    for readout in READOUTS if model.backbone.vision_blocks else ("clip",):
        model.float().set_readout(readout)
        expected = model(model.normalize(images))
        model.to(torch.bfloat16)
        found = model(model.normalize(images))
        assert found.tokens.dtype == found.embedding.dtype == torch.bfloat16
        assert float((found.tokens - expected.tokens).abs().mean()) < 0.03 * float(
            expected.tokens.abs().mean()
        )  # proxyclip cuts: few jump


@pytest.mark.parametrize(
    "name,readout",
    [
        ("PE-Core-B-16", "naclip"),
        ("ViTamin-S", "clip"),
        ("MobileCLIP2-S0", "clip"),
        ("RN50", "clip"),
    ],
)
@torch.no_grad()
def test_compiled_whole(name, readout):
    model, images = create(name, readout=readout), torch.randn(1, 3, 96, 128)
    torch.compiler.reset()  # what other tests compiled counts against the limit of one function
    found = torch.compile(model, backend="eager", fullgraph=True)(images)
    torch.testing.assert_close(found.tokens, model(images).tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["PE-Core-B-16", "MobileCLIP2-S0", "RN50", "ViTamin-S"])
def test_pictures_of_any_size_are_labelled(name, monkeypatch):
    monkeypatch.setattr(reduced_towers, "WORDS", 49408)  # of the tokenizer
    model = create(name, templates="simple")
    picture = np.random.default_rng(0).integers(0, 256, (101, 150, 3), np.uint8)
    for options in ({}, {"short_side": 128, "crop": 96, "stride": 64}):
        predictor = ovseg.Predictor(model, ["grass", "sand"], **options)
        found = predictor.set_image(picture).predict()
        assert found.labels.shape == (101, 150) and set(np.unique(found.labels)) <= {0, 1}
        assert predictor.classify().keys() == {"grass", "sand"}
