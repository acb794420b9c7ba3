"""ZegCLIP: the published modules' tensors, prompts as keys and values, names and files, any
vocabulary and size.
"""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import ovseg
import ovseg_kernels as ok
from ovseg.errors import CheckpointError, ConfigError, InputError
from ovseg.inference.queries import EncodedQueries
from ovseg.inference.rules.masks import ClassMasks
from ovseg.inference.view import Placement, window_origins
from ovseg.systems.zegclip.model import ZegCLIP, ZegCLIPOptions
from ovseg.weights.files import load_tensors
from ovseg.weights.pickles import read_published

GOLDEN = Path(__file__).parent.parent / "golden"
SEEN, CLASSES = (0, 1, 3, 4, 6), tuple("abcdefg")


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "zegclip_tiny.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def build(golden, **options):
    architecture = {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {
            "layers": 3,
            "width": 64,
            "head_width": 16,
            "patch_size": 16,
            "image_size": 128,
        },
        "text_cfg": {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2},
    }
    model = ZegCLIP(
        ZegCLIPOptions(
            {"kind": "open_clip", "architecture": architecture},
            image_size=128,
            heads=2,
            dropout=0.0,
            **options,
        )
    )
    state = {
        name.removeprefix("weights/"): tensor
        for name, tensor in golden.items()
        if name.startswith("weights/")
    }
    assert model.published.load(model, state) == []
    model.name, model.config = "zegclip_golden", {}
    return model.eval()


@pytest.fixture(scope="module")
def model(golden):
    return build(golden)


def close(found, expected, tolerance=1e-5):
    """Relative L2."""
    error = float((found.detach() - expected).norm() / expected.norm())
    assert error <= tolerance, f"{error:.2e}"


@torch.no_grad()
def test_features(golden, model):
    for ending, grid in (("", (8, 8)), ("_other", (6, 10))):
        features = model.encode_image(golden[f"in/image{ending}"])
        assert features.grid == grid
        close(features.embedding, golden[f"out/features{ending}/g"])
        close(features.tokens.transpose(1, 2).unflatten(2, grid), golden[f"out/features{ending}/F"])


def prompts_as_tokens(model, images):
    """As published: the prompts are tokens of every block, and replaced before the next."""
    x, _ = model.backbone.sequence(images, model.options.class_weight)
    steps = []
    for block, prompts in zip(model.backbone.vision_blocks, model.prompts(1), strict=True):
        x = block(torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1:]], 1))
        steps.append(x)
        x = torch.cat([x[:, :1], x[:, 1 + prompts.shape[1] :]], 1)
    return x, steps


@torch.no_grad()
def test_blocks(golden, model):
    """After every block, prompts as tokens and as keys and values."""
    x, _ = model.backbone.sequence(golden["in/image"], 2.0)
    _, steps = prompts_as_tokens(model, golden["in/image"])
    for i, (block, prompts) in enumerate(
        zip(model.backbone.vision_blocks, model.prompts(1), strict=True)
    ):
        x = block(x, prefix=prompts)
        expected = golden[f"out/steps/block{i}_image0"]
        close(steps[i][0], expected)
        close(x[0], torch.cat([expected[:1], expected[6:]]))


@pytest.mark.parametrize("name", ["golden", "tiny"])
def test_prompts_as_keys_and_values_are_the_same_numbers(golden, name):
    """The same outputs and the same gradients, on CLIP's blocks and on the tiny ones, with prompts
    of each picture too.
    """
    torch.manual_seed(0)
    one = (
        build(golden).double()
        if name == "golden"
        else ovseg.create_model("zegclip_tiny", dropout=0.0).double()
    )
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    tokens, _ = prompts_as_tokens(one, images)
    x, _ = one.backbone.sequence(images, one.options.class_weight)
    found = one.prompts.run(one.backbone.vision_blocks, x)
    torch.testing.assert_close(found, tokens, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(found)
    parameters = [one.prompts.embeddings, *one.prompts.proj.parameters()]
    ours, theirs = (torch.autograd.grad((y * weights).sum(), parameters) for y in (found, tokens))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    block, each = one.backbone.vision_blocks[0], torch.randn(2, 3, x.shape[2], dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(
            block(x, prefix=each),
            block(torch.cat([x, each], 1))[:, : x.shape[1]],
            rtol=1e-10,
            atol=1e-10,
        )
        kept = block(x, prefix=block.keys_values(block.norm_1(each)))
    torch.testing.assert_close(kept, block(x, prefix=each), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_queries_and_masks(golden, model):
    texts = golden["in/class_embeddings"]
    features = model.encode_image(golden["in/image"])
    queries = model.descriptor(features.embedding, texts)
    close(queries, golden["out/steps/queries_in"])
    for i in (0, 1):
        attn = model.decoder.layers[i].multihead_attn
        q, k = (x.unflatten(2, (2, 16)) for x in (attn.q(queries), attn.k(features.tokens)))
        scores = torch.einsum("bchd,bnhd->bhcn", q, k).mean(1) / 4
        close(scores.unflatten(2, (8, 8)), golden[f"out/steps/mask_{i}"])
        queries = model.decoder.layers[i](queries, features.tokens)
        close(queries, golden[f"out/steps/queries_{i}"])
    close(model.segment_logits(features, texts), golden["out/eval/logits"])


@torch.no_grad()
def test_probabilities(golden, model):
    """The upsampled maps themselves, and what the rule of labelling says of them."""
    features = model.encode_image(golden["in/image"])
    logits = model.segment_logits(features, golden["in/class_embeddings"])
    maps = F.interpolate(logits, (128, 128), mode="bilinear", align_corners=False).sigmoid()
    close(maps[..., 1::4, 2::4], golden["out/eval/prob_transductive_s4"])
    maps[:, list(SEEN)] -= 0.1
    expected = golden["out/eval/prob_inductive"]
    close(maps, expected)
    for i in range(2):
        labels, value = label_map(
            golden,
            features.select(slice(i, i + 1)),
            model,
            Placement((128, 128), (128, 128), (128, 128), None),
        )
        agree(labels, value, expected[i])


def label_map(golden, features, model, placement, penalty=0.1):
    bias = {CLASSES[i]: -penalty for i in SEEN}
    queries = EncodedQueries(CLASSES, golden["in/class_embeddings"], torch.arange(7))
    return ClassMasks(bias=bias).label_map(model, features, queries, placement)


def agree(labels, value, maps):
    """Winner and value; other labels only where the two best are as good as equal."""
    best, second = maps.topk(2, 0).values
    close(value, best)
    differing = labels != maps.argmax(0)
    assert (
        bool((best - second)[differing].lt(1e-4).all()) and float(differing.float().mean()) < 1e-3
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "name,origins",
    [("slide", [[0, 0], [0, 42]]), ("slide2d", [[0, 0], [0, 52], [22, 0], [22, 52]])],
)
@torch.no_grad()
def test_sliding_windows(golden, model, name, origins, backend):
    """Windows of 128, stride 106, of the resized pictures; labels of the size of the originals."""
    picture = golden[f"in/{name}/image_u8"].permute(2, 0, 1)
    canvas, size = tuple(picture.shape[1:]), tuple(golden[f"in/{name}/original_size"].tolist())
    found = window_origins(canvas, (128, 128), (106, 106))
    assert found.tolist() == origins
    windows = torch.stack([picture[:, y : y + 128, x : x + 128] for y, x in origins])
    features = model.encode_image(model.normalize(windows))
    with ok.backend(backend):
        for penalty, kind in ((0.1, "inductive"), (0.0, "transductive")):
            labels, value = label_map(
                golden, features, model, Placement(size, canvas, (128, 128), found), penalty
            )
            expected = golden[f"out/{name}/labels_{kind}"]
            assert float((labels != expected).float().mean()) < 1e-3
            if kind == "inductive":
                maps = golden[f"out/{name}/prob_inductive"]
                close(value if name == "slide" else value[1::4, 2::4], maps.amax(0))


def test_the_official_resize_is_ours(golden):
    """Short side 128, bilinear without antialias: as OpenCV's but for its rounding."""
    from PIL import Image

    from ovseg.inference import View
    from ovseg.inference.reading import resized
    from ovseg.inference.view import place

    original = golden["in/slide/original_u8"]
    placement = place(
        tuple(original.shape[:2]),
        View(short_side=128, resize="bilinear", crop=128, stride=106),
        patch=16,
        trained=128,
    )
    expected = golden["in/slide/image_u8"].permute(2, 0, 1)
    assert placement.canvas == tuple(expected.shape[1:]) and placement.origins.tolist() == [
        [0, 0],
        [0, 42],
    ]
    found = resized(Image.fromarray(original.numpy()), placement.canvas, "bilinear")
    assert float((255 * found - expected).abs().max()) < 1.51


@torch.no_grad()
def test_texts(golden, model):
    found = model.encode_text(golden["in/text/tokens"])
    close(found, golden["out/text/raw"])
    close(F.normalize(found, dim=-1), golden["out/text/normalised"])


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return ovseg.create_model("zegclip_vit_b16")


@pytest.fixture(scope="module")
def published(vit):
    """A file as published: with noise where nothing looks."""
    keys = json.loads((GOLDEN / "zegclip_keys.json").read_text())
    state, dead = ovseg.official_state_dict(vit), keys["dead"]
    generator = torch.Generator().manual_seed(1)
    for name in (
        *dead["never_called"],
        *dead["computed_but_without_effect"],
        *dead["unused_buffer"],
    ):
        state[name] = torch.randn(keys["keys"][name], generator=generator)
    return state


def test_keys_are_the_published_ones(vit, published):
    keys = json.loads((GOLDEN / "zegclip_keys.json").read_text())
    expected = {name: tuple(shape) for name, shape in keys["keys"].items()}
    assert {
        name: tuple(tensor.shape) for name, tensor in ovseg.official_state_dict(vit).items()
    } == expected and len(expected) == 376
    trained = {
        vit.published.to_theirs(name) for name, _ in vit.trainable if name != "prompts.embeddings"
    }
    dead = {name for kind in keys["dead"].values() for name in kind}
    assert (
        trained | {"backbone.prompt_embeddings", "backbone.deep_prompt_embeddings"}
        == set(keys["trainable"]) - dead
    )
    assert sum(p.numel() for _, p in vit.trainable) == 13_821_184 - 5_782_016
    frozen = {
        vit.published.to_theirs(name) for name, p in vit.named_parameters() if not p.requires_grad
    } - {"text_encoder.logit_scale"}
    assert frozen == set(expected) - set(keys["trainable"]) - set(keys["dead"]["unused_buffer"])
    other = copy.deepcopy(vit)
    for p in other.parameters():
        torch.nn.init.zeros_(p)
    assert ovseg.load_official_state_dict(other, published) == []
    for (name, a), b in zip(vit.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b) or name == "backbone.clip.logit_scale", name


def test_what_does_not_fit(vit, published):
    other = copy.deepcopy(vit)
    without = {name: x for name, x in published.items() if not name.startswith("text_encoder.")}
    assert (
        len(ovseg.load_official_state_dict(other, without)) == 149
    )  # classes come as embeddings then
    one_less = {name: x for name, x in published.items() if name != "text_encoder.ln_final.weight"}
    with pytest.raises(CheckpointError, match=r"1 missing: text_encoder\.ln_final\.weight\)"):
        ovseg.load_official_state_dict(other, one_less)
    broken = {name: x for name, x in without.items() if name != "decode_head.q_proj.bias"}
    broken |= {"decode_head.extra": torch.zeros(1), "backbone.proj": torch.zeros(768, 2)}
    expected = r"1 missing: decode_head\.q_proj\.bias; 1 unexpected: decode_head\.extra; 1 of another shape: backbone\.proj"
    with pytest.raises(CheckpointError, match=expected):
        ovseg.load_official_state_dict(other, broken)
    with pytest.raises(CheckpointError, match=r"1 missing: backbone\.deep_prompt_embeddings"):
        ovseg.load_official_state_dict(
            other, {k: x for k, x in without.items() if k != "backbone.deep_prompt_embeddings"}
        )
    with pytest.raises(CheckpointError, match="expected a class token and a square of patches"):
        ovseg.load_official_state_dict(
            other, {**without, "backbone.positional_embedding": torch.zeros(1000, 768)}
        )
    with pytest.raises(CheckpointError, match=r"expected \[1, T, D\] and \[depth - 1, T, D\]"):
        ovseg.load_official_state_dict(
            other, {**without, "backbone.prompt_embeddings": torch.zeros(1, 9, 768)}
        )


def test_dead_tensors_have_no_effect(golden, model):
    """The golden file's own with noise in their place: the same masks, bit for bit."""
    noisy = {name: tensor for name, tensor in golden.items() if name.startswith("weights/")}
    keys = json.loads((GOLDEN / "zegclip_keys.json").read_text())["dead"]
    dead = {f"weights/{name}" for kind in keys.values() for name in kind} & set(noisy)
    assert len(dead) == 31
    found = build({**noisy, **{name: torch.randn_like(noisy[name]) for name in dead}})
    with torch.no_grad():
        masks = [
            one.segment_logits(one(golden["in/image"]), golden["in/class_embeddings"])
            for one in (model, found)
        ]
    assert torch.equal(*masks)
    state = {f"weights/{name}": tensor for name, tensor in ovseg.official_state_dict(model).items()}
    assert set(state) == set(noisy) and all(
        torch.equal(state[name], noisy[name]) for name in set(state) - dead
    )
    assert len(state["weights/decode_head.loss_decode.criterion.empty_weight"]) == 6


def test_convert_and_back(published, tmp_path, capsys):
    """An mmcv file of COCO's size to a folder, and the published layout again."""
    from ovseg.cli.main import main

    coco = {
        **published,
        "backbone.prompt_embeddings": torch.randn(1, 100, 768),
        "backbone.deep_prompt_embeddings": torch.randn(11, 100, 768),
        "decode_head.loss_decode.criterion.empty_weight": torch.ones(157),
    }
    torch.save(
        {
            "meta": {"epoch": 1, "CLASSES": ("a", "b")},
            "state_dict": coco,
            "optimizer": {"state": {}},
        },
        tmp_path / "coco.pth",
    )
    assert (
        main(
            [
                "convert",
                str(tmp_path / "coco.pth"),
                "zegclip_vit_b16",
                "--out",
                str(tmp_path / "folder"),
            ]
        )
        == 0
    )
    loaded = ovseg.from_pretrained(tmp_path / "folder")
    assert loaded.options.prompts == 100 and loaded.options.seen_classes == 156
    direct = ovseg.create_model("zegclip_vit_b16", str(tmp_path / "coco.pth"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.state_dict().values(), direct.state_dict().values(), strict=True)
    )
    assert (
        main(["convert", str(tmp_path / "folder"), "--out", str(tmp_path / "again.safetensors")])
        == 0
    )
    again = read_published(tmp_path / "again.safetensors")
    assert {name: x.shape for name, x in again.items()} == {
        name: x.shape for name, x in coco.items()
    }
    dead = {
        name
        for kind in json.loads((GOLDEN / "zegclip_keys.json").read_text())["dead"].values()
        for name in kind
    }
    assert all(torch.equal(again[name], coco[name]) for name in set(coco) - dead)
    capsys.readouterr()
    with pytest.raises(ValueError, match="zegclip_tiny has no published layout"):
        ovseg.official_state_dict(ovseg.create_model("zegclip_tiny"))


CLIP = "clip_dense_tiny:digits"


def test_files_hold_prompts_and_head_alone(tmp_path):
    torch.manual_seed(0)
    model = ovseg.create_model("zegclip_tiny", clip=CLIP)
    folder = ovseg.save_pretrained(model, tmp_path / "saved")
    stored = load_tensors(folder / "model.safetensors")
    assert (
        set(stored) == {name for name, _ in model.trainable}
        and sum(x.numel() for x in stored.values()) == 121_344
    )
    again = ovseg.from_pretrained(folder)
    assert again.named_clip == CLIP and again.weights_hash() == model.weights_hash()
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    clip = ovseg.from_pretrained(CLIP).backbone
    assert all(
        torch.equal(a, b)
        for a, b in zip(clip.parameters(), model.backbone.parameters(), strict=True)
    )
    half = ovseg.save_pretrained(ovseg.from_pretrained(folder).half(), tmp_path / "half")
    assert ovseg.from_pretrained(half).named_clip == CLIP
    # Without a name the CLIP is in the file; wrappers load what they saved.
    whole = ovseg.create_model("zegclip_tiny")
    assert any(
        name.startswith("backbone.") for name in whole.state_dict()
    ) and whole.load_state_dict(whole.state_dict())
    wrapper = torch.nn.Sequential(pickle.loads(pickle.dumps(copy.deepcopy(model))))
    assert not wrapper.load_state_dict(wrapper.state_dict()).missing_keys
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(
            {name: x for name, x in model.state_dict().items() if name != "descriptor.proj.bias"}
        )


def test_another_clip_is_noticed(tmp_path):
    torch.manual_seed(0)
    clip = ovseg.create_model("clip_dense_tiny")
    ovseg.save_pretrained(clip, tmp_path / "clip")
    folder = ovseg.save_pretrained(
        ovseg.create_model("zegclip_tiny", clip=str(tmp_path / "clip")), tmp_path / "saved"
    )
    assert json.loads((folder / "config.json").read_text())["options"]["clip"] == str(
        tmp_path / "clip"
    )
    assert ovseg.from_pretrained(folder).named_clip == str(tmp_path / "clip")
    with pytest.raises(
        CheckpointError, match="was trained on another CLIP than 'clip_dense_tiny:digits' is now"
    ):
        ovseg.from_pretrained(folder, clip=CLIP)
    with torch.no_grad():
        clip.backbone.cls += 1
    ovseg.save_pretrained(clip, tmp_path / "clip")
    with pytest.raises(CheckpointError, match="was trained on another CLIP"):
        ovseg.from_pretrained(folder)
    with pytest.raises(
        InputError, match="a path of this machine; expected one that others can name"
    ):
        ovseg.create_model("zegclip_tiny", clip=str(tmp_path / "clip")).push_to_hub(
            "me/zegclip", licence="mit"
        )
    with pytest.raises(ConfigError, match="whose towers differ"):
        ovseg.create_model("zegclip_tiny", clip=CLIP, backbone={"width": 32})


def test_a_published_file_over_a_named_clip(golden, tmp_path):
    """The name stays where the file holds that CLIP, and goes where it holds another one."""
    base = build(golden)
    torch.save(dict(base.backbone.clip.state_dict()), tmp_path / "clip.pt")
    architecture = base.options.backbone["architecture"]
    options = {
        "image_size": 128,
        "heads": 2,
        "prompts": 5,
        "architecture": architecture,
        "clip": str(tmp_path / "clip.pt"),
    }
    model = ovseg.create_model("zegclip_vit_b16", **options)
    assert model.named_clip and not any(name.startswith("backbone.") for name in model.state_dict())
    state = ovseg.official_state_dict(base)
    assert ovseg.load_official_state_dict(model, state) == [] and model.named_clip == str(
        tmp_path / "clip.pt"
    )
    again = ovseg.official_state_dict(model)
    assert all(
        torch.equal(again[name], tensor)
        for name, tensor in state.items()
        if "empty_weight" not in name
    )
    state["backbone.conv1.weight"] = state["backbone.conv1.weight"] + 1
    ovseg.load_official_state_dict(model, state)
    assert model.named_clip is None
    again = ovseg.from_pretrained(ovseg.save_pretrained(model, tmp_path / "saved"))
    assert torch.equal(again.backbone.clip.visual.conv1.weight, state["backbone.conv1.weight"])


@torch.no_grad()
def test_what_is_kept_is_made_again():
    """Keys and values of the prompts, and the text's half of the descriptor: computed once, and
    anew after every change.
    """
    torch.manual_seed(0)
    model = ovseg.create_model("zegclip_tiny")
    images, texts = torch.randn(1, 3, 48, 48), F.normalize(torch.randn(5, 64), dim=-1)
    calls = {"prompts": 0}
    real = model.prompts._keys_values

    def counted(blocks):
        calls["prompts"] += 1
        return real(blocks)

    model.prompts._keys_values = counted

    def masks():
        return model.segment_logits(model(images), texts)

    def fresh():
        model.prompts._kept.clear(), model.descriptor._kept.clear()
        return masks()

    first = masks()
    assert torch.equal(first, masks()) and calls["prompts"] == 1
    changes = (
        lambda: model.prompts.embeddings.mul_(2),
        lambda: model.backbone.blocks[0].qkv.weight.mul_(0.5),
        lambda: model.load_state_dict({k: 0.7 * x for k, x in model.state_dict().items()}),
        lambda: model.half().float(),
        lambda: texts.mul_(-1),
        lambda: model.descriptor.proj.weight.add_(0.1),
    )
    for change in changes:
        change()
        found = masks()
        assert not torch.equal(found, first) and torch.equal(found, fresh())
        first = found
    with torch.inference_mode():
        torch.testing.assert_close(model.segment_logits(model(images), texts.clone()), first)
    torch.testing.assert_close(masks(), first)
    with torch.autocast("cpu", torch.bfloat16):
        low = masks()
    assert not torch.equal(low.float(), first) and torch.equal(masks(), first)
    again = pickle.loads(pickle.dumps(model.prompts._kept))
    assert again._last == ([], None) == copy.deepcopy(model.descriptor._kept)._last
    with torch.enable_grad():  # training sees the parameters themselves
        assert model.segment_logits(model(images), texts).requires_grad


def test_options_that_cannot_be():
    for options, message in (
        ({"prompts": 0}, "prompts is 0; expected at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0; expected a share"),
        ({"heads": 5}, "heads is 5; expected a divisor of 64"),
        ({"decoder_layers": 0}, "decoder_layers is 0"),
        ({"backbone": {"depth": 0}}, "the image tower has no blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            ovseg.create_model("zegclip_tiny", **options)
    with pytest.raises(
        ValueError, match="image_size is 500; expected a multiple of the patch, 16 pixels"
    ):
        ovseg.create_model("zegclip_vit_b16", image_size=500, architecture=TINY_CLIP)
    with pytest.raises(ValueError, match="zegclip needs blocks over a class token and patches"):
        ovseg.create_model(
            "zegclip_vit_b16",
            architecture={
                **TINY_CLIP,
                "vision_cfg": {**TINY_CLIP["vision_cfg"], "pool_type": "avg"},
            },
        )


TINY_CLIP = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"layers": 1, "width": 64, "head_width": 16, "patch_size": 16, "image_size": 64},
    "text_cfg": {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


def test_positions_are_resized_once_as_published():
    """224 to 512: bilinear, without antialias, the class token's row as it is; then again for other
    grids.
    """
    torch.manual_seed(0)
    model = ovseg.create_model("zegclip_vit_b16", image_size=160, architecture=TINY_CLIP, heads=2)
    torch.manual_seed(0)
    plain = ovseg.create_model("clip_dense", architecture=TINY_CLIP)
    small, large = (
        one.backbone.clip.visual.positional_embedding.detach() for one in (plain, model)
    )
    maps = small[1:].view(1, 4, 4, 64).permute(0, 3, 1, 2)
    expected = (
        F.interpolate(maps, (10, 10), mode="bilinear", align_corners=False)
        .permute(0, 2, 3, 1)
        .reshape(100, 64)
    )
    torch.testing.assert_close(large, torch.cat([small[:1], expected]))
    assert model.spec.image_size == 160 and model.spec.mean == (0.485, 0.456, 0.406)
    x, grid = model.backbone.sequence(torch.zeros(1, 3, 160, 160), 2.0)
    visual = model.backbone.clip.visual
    torch.testing.assert_close(x[0, 0], visual.ln_pre(2 * visual.class_embedding + large[0]))
    assert grid == (10, 10) and model(torch.zeros(1, 3, 48, 112)).grid == (3, 7)
