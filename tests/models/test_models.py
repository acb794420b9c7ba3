"""Systems: outputs, frozen parts, saving and loading, open_clip parity, damaged checkpoints."""

import json
import os

import pytest
import torch
from torch.nn import functional as F

import ovseg
from ovseg.data.batches import PairBatch
from ovseg.data.words import WordTokenizer
from ovseg.errors import CheckpointError, ConfigError, InputError
from ovseg.nn.blocks import attention
from ovseg.nn.vit_blocks import resize_positions
from ovseg.systems.backbones import build_backbone
from ovseg.systems.base import PatchFeatures, check_labels
from ovseg.systems.objective import create_objective

TINY = ("clip_dense_tiny", "pacl_tiny")


def batch(B=4, T=6):
    ids = WordTokenizer()(["a red seven", "gravel", "a blue one"] * (T // 3))
    return PairBatch(torch.randn(B, 3, 48, 48), ids, torch.arange(B), torch.arange(T) % B)


def total(model, data):
    return create_objective(model)(data)["total"]


@pytest.mark.parametrize("name", TINY)
def test_shapes_and_any_picture_size(name):
    model = ovseg.create_model(name)
    for size in ((48, 48), (40, 64), (49, 51)):
        features = model.encode_image(torch.randn(2, 3, *size))
        h, w = features.grid
        assert features.tokens.shape == (2, h * w, 64) and features.embedding.shape == (2, 64)
        texts = model.encode_labels(["a red seven", "gravel"])
        assert model.segment_logits(features, texts).shape == (2, 2, h, w)
        assert model.similarity(features, texts).shape == (2, 2)
    assert type(features) is PatchFeatures


@pytest.mark.parametrize("name", TINY)
def test_a_batch_equals_single_images(name):
    model = ovseg.create_model(name)
    images = torch.randn(3, 3, 48, 48)
    together = model.encode_image(images)
    for i in range(3):
        alone = model.encode_image(images[i : i + 1])
        torch.testing.assert_close(alone.tokens[0], together.tokens[i], rtol=1e-5, atol=1e-5)


def test_the_class_token_alone_is_the_same_number():
    backbone = build_backbone("tiny", depth=2)
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(
        backbone.encode_image(images), backbone.project(backbone.encode_patches(images).embedding)
    )


def test_padding_does_not_change_a_text():
    backbone = build_backbone("tiny")
    ids = backbone.tokenizer(["a red seven"])
    torch.testing.assert_close(backbone.encode_text(ids), backbone.encode_text(ids[:, :6]))


def test_pacl_trains_its_embedder_and_nothing_else():
    model = ovseg.create_model("pacl_tiny").train()
    assert {name.split(".")[0] for name, _ in model.trainable} == {"embedder", "log_scale"}
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for _, p in model.trainable], lr=1.0)
    total(model, batch()).backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.startswith(("embedder", "log_scale")) for name in changed)
    assert not model.backbone.training


@pytest.mark.parametrize("name", TINY)
def test_loss_falls_on_one_batch(name):
    model = ovseg.create_model(name).train()
    optimizer = torch.optim.AdamW([p for _, p in model.trainable], lr=3e-3)
    texts = model.tokenizer(["a red seven", "gravel", "a blue one", "grass"])
    colours = torch.tensor([[2.0, -1, -1], [0, 0, 0], [-1, -1, 2], [-1, 1, -1]])
    data, losses = (
        PairBatch(
            colours[:, :, None, None] + 0.1 * torch.randn(4, 3, 48, 48),
            texts,
            torch.arange(4),
            torch.arange(4),
        ),
        [],
    )
    for _ in range(60):
        loss = total(model, data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_pacl_loss_is_the_papers():
    """All pairs, pooled by the text's own weights, symmetric cross entropy: written out in plain
    torch.
    """
    model = ovseg.create_model("pacl_tiny")
    data = batch(6, 6)
    u = model.encode_image(data.images).tokens
    q = F.normalize(model.encode_text(data.token_ids), dim=-1)
    a = (
        (F.normalize(u, dim=-1)[:, None] @ q.T[None, None]).squeeze(1) / model.temperature
    ).softmax(1)
    phi = (F.normalize(torch.einsum("bnt,bnd->btd", a, u), dim=-1) * q).sum(-1)
    z = model.log_scale.exp() * phi
    expected = (F.cross_entropy(z, torch.arange(6)) + F.cross_entropy(z.T, torch.arange(6))) / 2
    torch.testing.assert_close(total(model, data), expected)
    torch.testing.assert_close(
        model.similarity(data.images, model.encode_text(data.token_ids)), phi
    )


@pytest.mark.parametrize("name", TINY)
def test_save_and_load(name, tmp_path):
    model = ovseg.create_model(name, backbone={"width": 32})
    ovseg.save_pretrained(model, tmp_path / "m", note="test")
    again = ovseg.from_pretrained(tmp_path / "m")
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert json.loads((tmp_path / "m" / "config.json").read_text())["note"] == "test"
    other = ovseg.create_model(name, str(tmp_path / "m"))
    assert other.backbone.token_dim == 32


@pytest.mark.bad_input("weights", "a saved folder that is damaged")
def test_damaged_checkpoints(tmp_path):
    model = ovseg.create_model("pacl_tiny")
    folder = ovseg.save_pretrained(model, tmp_path / "m")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for share in (0.0, 0.3, 0.99):
        weights.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(CheckpointError, match="no complete safetensors file"):
            ovseg.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        ovseg.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        ovseg.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="is not a folder"):
        ovseg.from_pretrained(tmp_path / "nowhere")


def test_a_checkpoint_of_another_model(tmp_path):
    folder = ovseg.save_pretrained(ovseg.create_model("clip_dense_tiny"), tmp_path / "m")
    with pytest.raises(CheckpointError, match="holds a clip_dense_tiny; expected a pacl_tiny"):
        ovseg.create_model("pacl_tiny", str(folder))
    with pytest.raises(CheckpointError, match=r"does not fit the model \(\d+ missing: .*embedder"):
        ovseg.create_model("pacl_tiny", str(folder / "model.safetensors"))


@pytest.mark.bad_input("weights", "a checkpoint that would run code")
def test_pickles_are_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(
        {**ovseg.create_model("pacl_tiny").state_dict(), "more": test_pickles_are_refused}, path
    )
    with pytest.raises(CheckpointError, match="cannot be read without running code"):
        ovseg.create_model("pacl_tiny", str(path))


def test_names_and_options():
    systems = ("clip_dense", "groupvit", "mgca", "ovsegmentor", "pacl", "segclip", "zegclip")
    assert ovseg.list_models("*tiny") == [f"{system}_tiny" for system in systems]
    with pytest.raises(ValueError, match="model is 'sam'; expected one of"):
        ovseg.create_model("sam")
    with pytest.raises(
        ValueError, match="pretrained is 'nowhere'; expected a path that exists or one of the tags"
    ):
        ovseg.create_model("pacl_tiny", "nowhere")
    with pytest.raises(ValueError, match="options of pacl_tiny: colour: unknown key"):
        ovseg.create_model("pacl_tiny", colour="red")
    with pytest.raises(ValueError, match="tap is 'middle'"):
        ovseg.create_model("pacl_tiny", tap="middle")
    with pytest.raises(ValueError, match="registered already"):
        ovseg.register_model("pacl_tiny")(lambda: None)


@pytest.mark.parametrize(
    "labels,message",
    [
        ([], "labels is empty; expected at least one name"),
        (["cat", " "], r"labels\[1\] is blank"),
        (["cat", "dog", "cat"], r"labels\[2\] and labels\[0\] are both 'cat'"),
        ([3], r"labels\[0\] is a int; expected a string"),
    ],
)
@pytest.mark.bad_input("models", "labels that are no names")
def test_bad_labels(labels, message):
    with pytest.raises(InputError, match=message):
        check_labels(labels)


def test_one_string_is_one_label():
    assert check_labels("cat") == ["cat"]


@pytest.mark.bad_input("models", "a tensor that is no batch of pictures")
def test_bad_images():
    model = ovseg.create_model("pacl_tiny")
    with pytest.raises(
        InputError, match=r"images has shape \[3, 48, 48\]; expected \[B, 3, H, W\]"
    ):
        model.encode_image(torch.randn(3, 48, 48))
    with pytest.raises(InputError, match="images has dtype"):
        model.encode_image(torch.zeros(1, 3, 48, 48, dtype=torch.uint8))


def test_positions_are_resized():
    positions = torch.randn(1 + 16, 8)
    assert resize_positions(positions, (4, 4), (4, 4)) is positions
    resized = resize_positions(positions, (4, 4), (6, 9))
    assert resized.shape == (55, 8) and torch.equal(resized[0], positions[0])
    constant = torch.cat([positions[:1], torch.ones(16, 8)])
    torch.testing.assert_close(resize_positions(constant, (4, 4), (7, 3))[1:], torch.ones(21, 8))


def test_attention_backends():
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    mask = torch.rand(1, 1, 5, 5) > 0.3
    mask[..., 0] = True
    expected = ((q @ k.transpose(-1, -2)) / 8**0.5).masked_fill(~mask, float("-inf")).softmax(
        -1
    ) @ v
    torch.testing.assert_close(attention(q, k, v, mask=mask), expected)
    with pytest.raises(ValueError, match="backend is 'flash'"):
        attention(q, k, v, backend="flash")


@pytest.mark.gpu
def test_xformers_equals_sdpa():
    pytest.importorskip("xformers", reason="xformers is not installed")
    q, k, v = (torch.randn(2, 3, 16, 32, device="cuda") for _ in range(3))
    torch.testing.assert_close(
        attention(q, k, v, backend="xformers"), attention(q, k, v), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("tap", ["local", "pre_norm", "post_norm"])
def test_pacl_may_train_the_vision_tower_up_to_the_tap(tap):
    model = ovseg.create_model(
        "pacl_tiny", trained=["embedder", "scale", "vision"], tap=tap
    ).train()
    total(model, batch()).backward()
    assert all(p.grad is not None for _, p in model.trainable)
    assert not any(
        "words" in name or "text" in name or "projection" in name for name, _ in model.trainable
    )
    assert any(name.startswith("backbone.stem") for name, _ in model.trainable)


def test_pacl_may_train_the_texts_too():
    model = ovseg.create_model(
        "pacl_tiny", trained=["embedder", "scale", "vision", "text"], tap="local"
    ).train()
    total(model, batch()).backward()
    assert all(p.grad is not None for _, p in model.trainable)
    assert {"backbone.words.weight", "backbone.text_projection.weight"} <= {
        name for name, _ in model.trainable
    }
    with pytest.raises(ConfigError, match="trained names 'some'; expected some of"):
        ovseg.create_model("pacl_tiny", trained=["some"])


def test_the_xformers_wrapper_through_a_stand_in(monkeypatch):
    """Layout, mask and scale as xformers documents its function; xformers itself has no CPU kernels
    and runs in the GPU check.
    """
    import sys
    import types

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        assert query.dim() == 4 and query.shape[2] == 3  # [B, L, heads, D]
        scores = torch.einsum("bihd,bjhd->bhij", query, key) * (
            query.shape[-1] ** -0.5 if scale is None else scale
        )
        if attn_bias is not None:
            assert attn_bias.shape == scores.shape and attn_bias.dtype == query.dtype
            scores = scores + attn_bias
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), value)

    ops = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    keep = torch.rand(2, 1, 4, 6) > 0.3
    keep[..., 0] = True
    for options in ({}, {"scale": 0.7}, {"mask": keep}, {"mask": torch.randn(4, 6)}):
        torch.testing.assert_close(
            attention(q, k, v, backend="xformers", **options), attention(q, k, v, **options)
        )


@pytest.mark.parametrize("umask,mode", [(0o022, 0o644), (0o027, 0o640)])
def test_who_may_read_saved_weights_is_for_the_umask_to_say(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        ovseg.create_model("pacl_tiny").save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("*.safetensors")} == {
        "model.safetensors": mode
    }
