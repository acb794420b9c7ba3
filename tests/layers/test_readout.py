"""Dense readouts: each against its formula, written out head by head, on a random ViT-B/16 and the
tiny model.
"""

import pytest
import torch
from torch.nn import functional as F

import ovseg
from ovseg.nn.readout import READOUTS, Readout, gaussian_window, resolve_readout
from ovseg.nn.vit_blocks import resize_positions

OF_CLIP_ALONE = [name for name, readout in READOUTS.items() if not readout.proxy]


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = ovseg.create_model("clip_dense_vit_b16")
    for parameter in model.backbone.clip.visual.parameters():  # biases and norms that matter
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, parameter.mean().item(), 0.2)
    return model


@pytest.fixture(scope="module")
def visual(vit):
    """open_clip's own vision tower, its own blocks, with the same weights."""
    import open_clip

    clip = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None)
    clip.load_state_dict(vit.backbone.clip.state_dict())
    return clip.visual.eval()


IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def parts(block, x):
    """ln_1(x), q, k, v as [B, L, heads, d], by open_clip's own parameters."""
    normed = block.ln_1(x)
    D = x.shape[-1]
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    split = [normed @ weight[i * D : (i + 1) * D].T + bias[i * D : (i + 1) * D] for i in range(3)]
    return normed, [t.unflatten(-1, (block.attn.num_heads, -1)) for t in split]


def scores(a, b):
    return torch.einsum("bihd,bjhd->bhij", a, b)


def applied(block, weights, v):
    """Attention weights [B, heads, L, L] on v, through the output projection."""
    o = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)
    return o @ block.attn.out_proj.weight.T + block.attn.out_proj.bias


def last_input(visual, blocks):
    patches = visual.conv1(IMAGES).flatten(2).transpose(1, 2)
    positions = resize_positions(visual.positional_embedding, (14, 14), (4, 6))
    x = visual.ln_pre(torch.cat([visual.class_embedding.expand(2, 1, -1), patches], 1) + positions)
    for block in blocks:
        x = block(x)
    return x


@torch.no_grad()
def expected(visual, name):
    *before, last = visual.transformer.resblocks
    if name == "gem":
        x = last_input(visual, visual.transformer.resblocks[:-7])
        path = x
        for block in visual.transformer.resblocks[-7:]:
            normed, qkv = parts(block, x)
            inverse = normed.norm(dim=-1).mean(-1)[:, None, None, None] * 64**-0.5
            outputs = []
            for p in qkv:
                p = F.normalize(p, dim=-1)
                p = torch.einsum("bhij,bjhd->bihd", (inverse * scores(p, p)).softmax(-1), p)
                p = F.normalize(p, dim=-1)
                outputs.append(applied(block, (inverse * scores(p, p)).softmax(-1), qkv[2]))
            path = path + sum(outputs) / 3
            x = block(x)
        y = path
    else:
        x = last_input(visual, before)
        _, (q, k, v) = parts(last, x)
        if name == "clip":
            y = last(x)
        elif name == "maskclip":
            y = applied(last, torch.eye(x.shape[1]).expand(2, 12, -1, -1), v)
        elif name == "sclip":
            y = x + applied(
                last, (scores(q, q) / 8).softmax(-1) + (scores(k, k) / 8).softmax(-1), v
            )
            y = y + last.mlp(last.ln_2(y))
        elif name == "clearclip":
            y = applied(last, (scores(q, q) / 8).softmax(-1), v)
        elif name == "naclip":
            near = torch.zeros(25, 25)
            for i in range(24):
                for j in range(24):
                    near[1 + i, 1 + j] = torch.exp(
                        torch.tensor(-((i // 6 - j // 6) ** 2 + (i % 6 - j % 6) ** 2) / 50.0)
                    )
            y = applied(last, (scores(k, k) / 8 + near).softmax(-1), v)
    return visual.ln_post(y[:, 1:]) @ visual.proj


@pytest.mark.parametrize("name", OF_CLIP_ALONE)
@torch.no_grad()
def test_readouts_are_their_formulas(vit, visual, name):
    vit.readout = READOUTS[name]
    found = vit.encode_image(IMAGES)
    torch.testing.assert_close(found.tokens, expected(visual, name), rtol=1e-4, atol=2e-5)
    # The image embedding stays CLIP's own.
    vit.readout = READOUTS["clip"]
    torch.testing.assert_close(
        found.embedding, vit.encode_image(IMAGES).embedding, rtol=1e-4, atol=2e-5
    )


@torch.no_grad()
def test_plain_clip_is_open_clips(vit, visual):
    """Tokens are compared with what open_clip returns with output_tokens, which some releases norm
    and others do not.
    """
    vit.readout = READOUTS["clip"]
    images = torch.randn(1, 3, 224, 224)
    visual.output_tokens = True
    try:
        pooled, tokens = visual(images)
    finally:
        visual.output_tokens = False
    found = vit.encode_image(images)
    torch.testing.assert_close(found.embedding, pooled, rtol=1e-4, atol=1e-5)
    assert (
        min(
            float((found.tokens - x @ visual.proj).abs().max())
            for x in (tokens, visual.ln_post(tokens))
        )
        < 1e-4
    )


@torch.no_grad()
def test_the_readouts_differ(vit):
    tokens = []
    for readout in (READOUTS[name] for name in OF_CLIP_ALONE):
        vit.readout = readout
        tokens.append(F.normalize(vit.encode_image(IMAGES).tokens, dim=-1))
    for i in range(len(tokens)):
        for j in range(i):
            assert float((tokens[i] * tokens[j]).sum(-1).mean()) < 0.999


@pytest.mark.parametrize("name", OF_CLIP_ALONE)
@torch.no_grad()
def test_tiny_models_take_every_readout(name):
    model = ovseg.create_model("clip_dense_tiny", "digits", readout=name)
    features = model.encode_image(torch.randn(2, 3, 40, 56))
    assert features.grid == (10, 14) and bool(features.tokens.isfinite().all())
    one = model.encode_image(torch.randn(2, 3, 40, 56)[:1])
    assert one.tokens.shape == (1, 140, 64)


def test_readouts_survive_saving(tmp_path):
    model = ovseg.create_model("clip_dense_tiny", "digits", readout="naclip")
    ovseg.save_pretrained(model, tmp_path / "m")
    assert ovseg.from_pretrained(tmp_path / "m").readout == READOUTS["naclip"]
    custom = ovseg.create_model(
        "clip_dense_tiny", readout={"terms": ["kk", "vv"], "mean": True, "window_std": 2.0}
    )
    assert custom.readout == Readout(("kk", "vv"), mean=True, window_std=2.0)


@pytest.fixture
def throw_away():
    """The example of CONTRIBUTING.md: patches attend by their values, and nothing is added to the
    result.
    """
    readout = READOUTS.register("throw_away", Readout(("vv",), residual=False, mlp=False))
    yield readout
    READOUTS.unregister("throw_away")


@torch.no_grad()
def test_a_new_readout_is_one_entry(throw_away, tmp_path, vit, visual):
    model = ovseg.create_model("clip_dense_tiny", "digits", readout="throw_away")
    assert model.readout == throw_away
    features = model.encode_image(IMAGES)
    plain = ovseg.create_model("clip_dense_tiny", "digits", readout="clip").encode_image(IMAGES)
    assert features.tokens.shape == plain.tokens.shape and not torch.allclose(
        features.tokens, plain.tokens
    )
    ovseg.save_pretrained(model, tmp_path / "m")
    torch.testing.assert_close(
        ovseg.from_pretrained(tmp_path / "m").encode_image(IMAGES).tokens, features.tokens
    )
    *before, last = visual.transformer.resblocks
    _, (_, _, v) = parts(last, last_input(visual, before))
    by_hand = applied(last, (scores(v, v) / 8).softmax(-1), v)[:, 1:]
    vit.readout = throw_away
    torch.testing.assert_close(
        vit.encode_image(IMAGES).tokens, visual.ln_post(by_hand) @ visual.proj, rtol=1e-4, atol=2e-5
    )


def test_gaussian_window():
    near = gaussian_window((2, 3), 1.0, torch.zeros(()))
    assert near.shape == (7, 7) and float(near[0].sum()) == 0 == float(near[:, 0].sum())
    assert torch.equal(near, near.T) and torch.equal(near.diag()[1:], torch.ones(6))
    assert near[1, 6].item() == pytest.approx(torch.tensor(-2.5).exp().item())  # (0, 0) to (1, 2)


@pytest.mark.parametrize(
    "bad,message",
    [
        ("grandclip", "readout is 'grandclip'; expected one of"),
        ({"term": ["qq"]}, "unknown fields \\['term'\\]"),
        ({"terms": ["qv"]}, "readout.terms is \\['qv'\\]"),
        ({"depth": 2}, "readout.depth is 2; expected 1, or more with parallel=True"),
        ({"window_std": 0.0}, "readout.window_std is 0.0"),
        ({"iterations": 1}, "without 'qk'"),
    ],
)
@pytest.mark.bad_input("models", "a readout that cannot be")
def test_bad_readouts(bad, message):
    with pytest.raises(ValueError, match=message):
        resolve_readout(bad)
