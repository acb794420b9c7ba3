"""Readouts on timm's blocks and ProxyCLIP, each against its formula written out element by element,
on random weights.
"""

import copy
from unittest import mock

import pytest
import timm
import torch
from hub_stand_in import fill_cache
from reduced_towers import lively, reduced, twins
from safetensors.torch import save, save_file
from torch.nn import functional as F

import ovseg
from ovseg.errors import CheckpointError, ConfigError, WeightsError
from ovseg.nn.readout import (
    READOUTS,
    ProxyFeatures,
    Readout,
    proxy_attention,
    resolve_readout,
    run_blocks,
)
from ovseg.options import options_of
from ovseg.systems.clip_dense.proxy import ProxyEncoder, ProxyOptions

TOWERS = {
    "rope, q/k norm, layer scale, registers": (
        "PE-Core-B-16",
        {"qk_norm": True, "init_values": 0.3, "num_reg_tokens": 2},
    ),
    "rope by halves": ("PE-Core-B-16", {"rope_rotate_half": True}),
    "rope, norm inside": ("EVA02-B-16", {}),
    "norms after": ("EVA02-E-14", {}),
    "q/k norm, layer scale, registers": (
        "ViT-B-16-SigLIP",
        {"qk_norm": True, "init_values": 0.3, "reg_tokens": 2},
    ),
    "class token": ("MobileCLIP2-L-14", {}),
}
close = {"rtol": 1e-4, "atol": 1e-5}


def before_the_blocks(trunk, images):
    """(tokens, rotary table or None), by timm."""
    x = trunk._pos_embed(trunk.patch_embed(images))
    x, rope = x if isinstance(x, tuple) else (x, None)
    return trunk.norm_pre(x), rope


def call(block, x, rope):
    return block(x) if rope is None else block(x, rope=rope)


def turned(x, rope, half):
    """[N, d]: one head's queries or keys, pair by pair."""
    d, out = x.shape[1], x.clone()
    for i in range(d // 2):
        a, b = (i, i + d // 2) if half else (2 * i, 2 * i + 1)
        out[:, a] = x[:, a] * rope[:, d + a] - x[:, b] * rope[:, a]
        out[:, b] = x[:, b] * rope[:, d + b] + x[:, a] * rope[:, b]
    return out


def heads(block, x, rope, prefix):
    """(normed input, q, k, v) with [heads, L, d] of one picture [L, D], by timm's parameters."""
    attn = block.attn
    normed = x if type(block).__name__ == "EvaBlockPostNorm" else block.norm1(x)
    if attn.qkv is None:
        q, k, v = (layer(normed) for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
    else:
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        q, k, v = (normed @ attn.qkv.weight.T + (0 if bias is None else bias)).chunk(3, -1)
    q, k, v = (torch.stack(t.chunk(attn.num_heads, -1)) for t in (q, k, v))
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        half = attn.rotate_half
        q, k = (
            torch.stack([torch.cat([h[:prefix], turned(h[prefix:], rope, half)]) for h in t])
            for t in (q, k)
        )
    return normed, q, k, v


def out(block, o):
    """o [heads, L, d] as the block adds it."""
    y = block.attn.proj(block.attn.norm(torch.cat(list(o), -1)))
    if type(block).__name__ == "EvaBlockPostNorm":
        return block.norm1(y)
    return (
        block.gamma_1 * y
        if getattr(block, "gamma_1", None) is not None
        else block.ls1(y)
        if hasattr(block, "ls1")
        else y
    )


def feed(block, x):
    if type(block).__name__ == "EvaBlockPostNorm":
        return block.norm2(block.mlp(x))
    y = block.mlp(block.norm2(x))
    return (
        block.gamma_2 * y
        if getattr(block, "gamma_2", None) is not None
        else block.ls2(y)
        if hasattr(block, "ls2")
        else y
    )


def expected(trunk, images, name, side):
    x, rope = before_the_blocks(trunk, images)
    prefix, pictures = trunk.num_prefix_tokens, []
    blocks = list(trunk.blocks)
    if name == "clip":
        for block in blocks:
            x = call(block, x, rope)
        return x[:, prefix:]
    first = 0 if name == "gem" else len(blocks) - 1
    for block in blocks[:first]:
        x = call(block, x, rope)
    if name == "gem":
        path = x
        for block in blocks:
            added = []
            for one in x:
                normed, *qkv = heads(block, one, rope, prefix)
                heat = normed.norm(dim=-1).mean() * qkv[2].shape[-1] ** -0.5
                total = 0
                for t in qkv:
                    t = F.normalize(t, dim=-1)
                    t = F.normalize((heat * t @ t.mT).softmax(-1) @ t, dim=-1)
                    total = total + (heat * t @ t.mT).softmax(-1) @ qkv[2]
                added.append(out(block, total / 3))
            path, x = path + torch.stack(added), call(block, x, rope)
        return path[:, prefix:]
    block = blocks[-1]
    for one in x:
        _, q, k, v = heads(block, one, rope, prefix)
        scale = q.shape[-1] ** -0.5
        if name == "maskclip":
            y = out(block, v)
        elif name == "clearclip":
            y = out(block, (scale * q @ q.mT).softmax(-1) @ v)
        elif name == "sclip":
            y = one + out(
                block, ((scale * q @ q.mT).softmax(-1) + (scale * k @ k.mT).softmax(-1)) @ v
            )
            y = y + feed(block, y)
        else:
            assert name == "naclip"
            near = torch.zeros(len(one), len(one))
            for i in range(side * side):
                for j in range(side * side):
                    distance = (i // side - j // side) ** 2 + (i % side - j % side) ** 2
                    near[prefix + i, prefix + j] = torch.tensor(-distance / 50.0).exp()
            y = out(block, (scale * k @ k.mT + near).softmax(-1) @ v)
        pictures.append(y[prefix:])
    return torch.stack(pictures)


@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_readouts_on_timms_blocks(tower):
    name, beside = TOWERS[tower]
    ours, theirs = twins(name, **beside)
    images = torch.randn(2, 3, ours.image_size, ours.image_size)
    plain = ours.tower.encode(images)
    for readout in (name for name in READOUTS if not READOUTS[name].proxy):
        found = ours.tower.encode(images, READOUTS[readout])
        torch.testing.assert_close(
            found.tokens, expected(theirs.visual.trunk, images, readout, found.grid[0]), **close
        )
        torch.testing.assert_close(found.embedding, plain.embedding, **close)
        assert readout == "clip" or float((found.tokens - plain.tokens).abs().mean()) > 1e-2
    prefix = ours.tower.prefix
    assert prefix == theirs.visual.trunk.num_prefix_tokens and prefix == (
        beside.get("num_reg_tokens", beside.get("reg_tokens", 0)) + (0 if "SigLIP" in name else 1)
    )


def naive_weights(features, beta, gamma):
    """softmax(A) of ProxyCLIP's equations for one picture [N, C], entry by entry."""
    n = len(features)
    s = [
        [
            float(features[i] @ features[j] / features[i].norm() / features[j].norm())
            for j in range(n)
        ]
        for i in range(n)
    ]
    mean = sum(map(sum, s)) / n**2
    weights = torch.zeros(n, n)
    for i in range(n):
        kept = [j for j in range(n) if s[i][j] - beta * mean >= 0]
        for j in kept:
            weights[i, j] = torch.tensor(gamma * (s[i][j] - beta * mean)).exp()
        weights[i] /= weights[i].sum()
    return weights


@torch.no_grad()
def test_proxy_attention_is_its_formula():
    features = torch.randn(2, 12, 5) + 0.4
    found = proxy_attention(features, 1.2, 3.0)
    expected = torch.stack([naive_weights(one, 1.2, 3.0) for one in features])
    torch.testing.assert_close(found, expected)
    assert bool((found == 0).any()) and bool((found.sum(-1) - 1).abs().max() < 1e-5)
    # All alike: nothing is as near as 1.2 times the mean, and nothing is cut.
    torch.testing.assert_close(
        proxy_attention(torch.ones(1, 6, 4), 1.2, 3.0), torch.full((1, 6, 6), 1 / 6)
    )


@pytest.mark.parametrize("name", ["PE-Core-B-16", "ViT-B-16-SigLIP", "EVA02-E-14"])
@pytest.mark.parametrize("finer", [False, True])
@torch.no_grad()
def test_proxyclip_is_its_formula(name, finer):
    ours, theirs = twins(name)
    images = torch.randn(2, 3, ours.image_size, ours.image_size)
    proxy = ProxyFeatures(torch.randn(2, 4 * 5, 8), (4, 5), finer)
    found = ours.tower.encode(images, READOUTS["proxyclip"], proxy)
    trunk = theirs.visual.trunk
    x, rope = before_the_blocks(trunk, images)
    *before, last = trunk.blocks
    for block in before:
        x = call(block, x, rope)
    size = (4, 5) if finer else (3, 3)
    assert found.grid == size
    for b in range(2):
        v = heads(last, x[b], rope, trunk.num_prefix_tokens)[3][:, trunk.num_prefix_tokens :]
        features = proxy.patches[b]
        if finer:
            v = F.interpolate(v.mT.unflatten(2, (3, 3)), size, mode="bilinear").flatten(2).mT
        else:
            features = (
                F.interpolate(features.T.reshape(1, 8, 4, 5), size, mode="bilinear")[0].flatten(1).T
            )
        torch.testing.assert_close(
            found.tokens[b], out(last, naive_weights(features, 1.2, 3.0) @ v), **close
        )
    torch.testing.assert_close(found.embedding, ours.encode_image(images), **close)


def small_encoder(name, **options):
    """A ``ProxyEncoder`` of few, narrow layers."""
    create = timm.create_model
    with mock.patch.object(
        timm,
        "create_model",
        lambda *a, **k: create(*a, **{**k, "embed_dim": 32, "depth": 1, "num_heads": 2}),
    ):
        return ProxyEncoder(ProxyOptions(name, **options))


@pytest.mark.parametrize(
    "name,patch",
    [
        ("vit_small_patch8_224.dino", 8),
        ("vit_small_patch14_dinov2", 14),
        ("vit_small_patch14_reg4_dinov2", 14),
        ("vit_small_patch16_dinov3", 16),
    ],
)
@torch.no_grad()
def test_second_encoders(name, patch):
    encoder = lively(small_encoder(name))
    pixels = torch.rand(1, 3, 3 * patch, 5 * patch)
    mean, std = (
        torch.tensor([0.4, 0.5, 0.6])[:, None, None],
        torch.tensor([0.2, 0.3, 0.4])[:, None, None],
    )
    found = encoder((pixels - mean) / std, mean, std)
    cfg = encoder.vit.pretrained_cfg
    own = (pixels - torch.tensor(cfg["mean"])[:, None, None]) / torch.tensor(cfg["std"])[
        :, None, None
    ]
    assert found.grid == (3, 5) and found.patches.shape == (1, 15, 32)
    torch.testing.assert_close(
        found.patches,
        encoder.vit.forward_features(own)[:, encoder.vit.num_prefix_tokens :],
        **close,
    )
    assert encoder((pixels - mean)[:, :, 3:] / std, mean, std).grid == (3, 5)
    assert not encoder.train().training and not any(p.requires_grad for p in encoder.parameters())


def test_second_encoders_from_files(tmp_path):
    first = lively(small_encoder("vit_small_patch16_dinov3"))
    state = {key: value.contiguous() for key, value in first.vit.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pth")
    for file in ("a.safetensors", "a.pth"):
        again = small_encoder("vit_small_patch16_dinov3", weights=str(tmp_path / file))
        assert all(torch.equal(value, state[key]) for key, value in again.vit.state_dict().items())
    save_file(
        {key: value for key, value in state.items() if "mlp" not in key}, tmp_path / "b.safetensors"
    )
    with pytest.raises(
        CheckpointError, match=r"b.safetensors does not fit timm's vit_small_patch16_dinov3: .*mlp"
    ):
        small_encoder("vit_small_patch16_dinov3", weights=str(tmp_path / "b.safetensors"))
    with pytest.raises(CheckpointError, match=r"c.pth does not exist"):
        small_encoder("vit_small_patch16_dinov3", weights=str(tmp_path / "c.pth"))


def test_a_second_encoder_from_a_file_sees_pictures_as_its_architecture_says(tmp_path):
    name = "vit_small_patch16_224"
    first = lively(small_encoder(name))
    state = {key: value.contiguous() for key, value in first.vit.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    for encoder in (first, small_encoder(name, weights=str(tmp_path / "a.safetensors"))):
        assert encoder.mean.flatten().tolist() == encoder.std.flatten().tolist() == [0.5] * 3


def test_second_encoders_of_timm_come_from_the_cache(tmp_path, monkeypatch):
    """With the classifier they were trained with; where they are not cached one answer is enough."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("OVSEG_CACHE", "off")
    name, repo = "vit_small_patch16_dinov3", "timm/vit_small_patch16_dinov3.lvd1689m"
    with pytest.raises(
        WeightsError, match=rf"{repo} is not in the cache .* may not be asked .*weights: FILE"
    ):  # conftest: offline
        small_encoder(name, weights="timm")
    state = {
        key: value.contiguous()
        for key, value in lively(small_encoder(name)).vit.state_dict().items()
    }
    fill_cache(
        tmp_path,
        repo,
        {
            "model.safetensors": save(
                {**state, "head.weight": torch.ones(7, 32), "head.bias": torch.ones(7)}
            )
        },
    )
    again = small_encoder(name, weights="timm")
    assert all(torch.equal(value, state[key]) for key, value in again.vit.state_dict().items())


def test_second_encoders_that_are_none():
    for options, message in (
        ({"name": "dino"}, "proxy.name is 'dino'; expected the name of a ViT"),
        ({"name": "resnet18"}, "proxy.name is 'resnet18', a ResNet; expected a ViT"),
        ({"grid": "both"}, r"proxy.grid is 'both'; expected one of \['clip', 'finer'\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            ProxyEncoder(options_of(ProxyOptions, options, "proxy"))
    with pytest.raises(
        ConfigError, match="readout is 'proxyclip' and proxy is None; expected a second encoder"
    ):
        ovseg.create_model("clip_dense_tiny", readout="proxyclip")
    with pytest.raises(ConfigError, match=r"proxy.nam: unknown key"):
        ovseg.create_model("clip_dense_tiny", readout="proxyclip", proxy={"nam": "x"})
    with (
        pytest.raises(ValueError, match="proxy is None; expected a second encoder's patches"),
        reduced("ViT-B-16"),
    ):
        model = ovseg.create_model("clip_dense_vit_b16", architecture="ViT-B-16")
        run_blocks(
            model.backbone.vision_blocks, torch.zeros(1, 10, 32), READOUTS["proxyclip"], (3, 3)
        )


@pytest.mark.parametrize(
    "bad,message",
    [
        (
            {"terms": ["proxy", "qq"]},
            r"readout.terms is \['proxy', 'qq'\]; expected some of .*, or 'proxy' alone",
        ),
        ({"terms": ["proxy"]}, "expected depth 1, and no residual"),
        (
            {"terms": ["proxy"], "residual": False, "gamma": 0.0},
            "readout.gamma is 0.0; expected a positive number",
        ),
    ],
)
@pytest.mark.bad_input("models", "a second encoder that cannot be")
def test_bad_settings_of_proxyclip(bad, message):
    with pytest.raises(ValueError, match=message):
        resolve_readout(bad)


@torch.no_grad()
def test_proxyclip_as_a_system(tmp_path):
    """On the bundled model: it stays beside the model, goes where it goes, and is found again from
    a saved folder.
    """
    create = timm.create_model
    with mock.patch.object(
        timm,
        "create_model",
        lambda *a, **k: create(*a, **{**k, "embed_dim": 32, "depth": 1, "num_heads": 2}),
    ):
        encoder = lively(ProxyEncoder(ProxyOptions("vit_small_patch16_dinov3")))
        save_file(
            {key: value.contiguous() for key, value in encoder.vit.state_dict().items()},
            tmp_path / "dino.safetensors",
        )
        proxy = {
            "name": "vit_small_patch16_dinov3",
            "weights": str(tmp_path / "dino.safetensors"),
            "grid": "finer",
        }
        model = ovseg.create_model("clip_dense_tiny", "digits", readout="proxyclip", proxy=proxy)
        images = torch.randn(2, 3, 48, 64)
        found = model.encode_image(images)
        assert found.grid == (12, 16) and bool(found.tokens.isfinite().all())
        inside = {id(p) for p in model.train().parameters()}
        assert (
            not any(p.requires_grad or id(p) in inside for p in model.proxy.parameters())
            and not model.proxy.training
        )
        assert not [key for key in model.state_dict() if "proxy" in key]
        ovseg.save_pretrained(model.eval(), tmp_path / "m")
        again = ovseg.from_pretrained(tmp_path / "m")
        assert torch.equal(again.encode_image(images).tokens, found.tokens)
        assert next(copy.deepcopy(again).double().proxy.parameters()).dtype == torch.float64
        again.set_readout("maskclip")
        assert float((again.encode_image(images).tokens - found.tokens).abs().max()) > 1e-3
        (tmp_path / "dino.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"dino.safetensors does not exist"):
            ovseg.from_pretrained(tmp_path / "m")
        assert ovseg.from_pretrained(tmp_path / "m", proxy=None, readout="clip").proxy is None
        picture = torch.zeros(3, 40, 56, dtype=torch.uint8)
        assert ovseg.Predictor(model, ["grass", "sand"]).set_image(
            picture
        ).predict().labels.shape == (40, 56)
    assert READOUTS["proxyclip"] == Readout(
        ("proxy",), residual=False, mlp=False, beta=1.2, gamma=3.0
    )
