"""SegCLIP: the published modules' tensors, names of the published checkpoint, batches, sizes,
parameter groups.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import ovseg
import ovseg_kernels as ok
from ovseg.data.batches import PairBatch
from ovseg.errors import CheckpointError, InputError
from ovseg.inference.queries import EncodedQueries
from ovseg.inference.rules.groups import GroupTables, group_tables
from ovseg.inference.view import Placement
from ovseg.systems.objective import Progress, create_objective
from ovseg.systems.segclip.layers import sincos_positions
from ovseg.systems.segclip.model import SegCLIP, SegCLIPOptions
from ovseg.systems.segclip.objective import superpixel_loss
from ovseg.systems.segclip.published import POSITIONS
from ovseg.weights.pickles import read_published

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "segclip_tiny.npz") as file:
        found = {
            name: torch.from_numpy(file[name])
            for name in file.files
            if file[name].dtype.kind != "U"
        }
        return {**found, "meta/config": json.loads(str(file["meta/config"]))}


def build(golden, **options):
    c = golden["meta/config"]
    architecture = {
        "embed_dim": c["embed_dim"],
        "quick_gelu": True,
        "vision_cfg": {
            "layers": c["first_stage_layers"] + c["second_stage_layers"],
            "width": c["vision_width"],
            "head_width": c["head_dim"],
            "patch_size": c["patch_size"],
            "image_size": c["image_size"],
        },
        "text_cfg": {
            "context_length": c["context_length"],
            "vocab_size": c["vocab_size"],
            "width": c["text_width"],
            "heads": c["text_heads"],
            "layers": c["text_layers"],
        },
    }
    decoder = {
        "width": c["mae_decoder_dim"],
        "depth": c["mae_decoder_depth"],
        "heads": c["mae_decoder_heads"],
    }
    model = SegCLIP(
        SegCLIPOptions(
            {"kind": "open_clip", "architecture": architecture},
            second_stage=c["second_stage_layers"],
            centers=c["group_tokens"],
            cross_layers=c["cross_layers"],
            decoder=decoder,
            **options,
        )
    )
    model.train_parts(list(model.parts()))
    state = {
        name.removeprefix("weights/"): tensor
        for name, tensor in golden.items()
        if name.startswith("weights/")
    }
    assert model.published.load(model, state) == []
    return model.eval()


@pytest.fixture(scope="module")
def model(golden):
    return build(golden)


def close(found, expected, tolerance):
    """Largest difference over the largest value."""
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= tolerance * scale, (
        f"{float((found - expected).abs().max()) / scale:.2e}"
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
@torch.no_grad()
def test_evaluation(golden, model, backend):
    images = golden["in/images"]
    with ok.backend(backend):
        features = model.encode_image(images)
        x, _ = model.embed(images)
        hidden = model.first_blocks(x)
        groups = model.groups(hidden)
    close(features.embedding, golden["out/eval/image_feat"], 1e-5)
    close(features.groups, golden["out/eval/group_feats"], 1e-5)
    close(hidden, golden["out/eval/hidden"], 1e-5)
    close(groups.tokens, golden["out/eval/group_tokens"], 1e-5)
    close(groups.centers, golden["out/eval/centers"], 1e-5)
    close(features.soft, golden["out/eval/soft_map"], 5e-5)
    assert torch.equal(features.index, golden["out/eval/group_index"].long())
    assert torch.equal(features.tokens[1, 7], features.groups[1, features.index[1, 7]])
    text = model.encode_text(golden["in/ids"].long())
    close(text, golden["out/eval/text"], 1e-5)
    close(
        model.logit_scale * model.similarity(features, text).T, golden["out/eval/logits_t2v"], 1e-5
    )


@torch.no_grad()
def test_twice_the_grid(golden, model):
    features = model.encode_image(golden["in/image_2x"])
    close(features.embedding, golden["out/eval2x/image_feat"], 1e-5)
    close(features.groups, golden["out/eval2x/group_feats"], 1e-5)
    close(features.soft, golden["out/eval2x/soft_map"], 5e-5)
    assert torch.equal(features.index, golden["out/eval2x/group_index"].long())


def training_batch(golden):
    noise = {
        "groups": golden["in/gumbel"],
        "kept_groups": golden["in/gumbel_mae"],
        "masking": golden["in/mae_noise"][:, 1:],
    }
    ids = torch.arange(3)
    return PairBatch(
        golden["in/images"],
        golden["in/train_ids"].long(),
        ids,
        ids,
        segments=golden["in/seg_label"].flatten(1),
        noise=noise,
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_training_step(golden, backend):
    model = build(golden).train()
    with ok.backend(backend):
        losses = create_objective(model)(training_batch(golden))
        names = {
            "contrastive": "contrastive",
            "superpixel": "sp_kl",
            "reconstruction": "mae",
            "total": "total",
        }
        for ours, theirs in names.items():
            assert losses[ours].item() == pytest.approx(
                golden[f"out/train/{theirs}"].item(), rel=1e-6
            ), ours
        tensors = dict(model.named_parameters())
        published = {
            name: tensors[key] for key, name in published_names(model).items() if key in tensors
        }
        for loss in ("contrastive", "superpixel", "reconstruction"):
            for key in ("k_conv.weight", "semantic_center"):
                name = f"clip.visual.transformer.semantic_layer2.{key}"
                found = torch.autograd.grad(losses[loss], published[name], retain_graph=True)[0]
                close(found, golden[f"out/train/grad_part/{names[loss]}/{name}"], 1e-4)
        losses["total"].backward()
    checked = 0
    for name in golden:
        if name.startswith("out/train/grad/"):
            close(published[name.removeprefix("out/train/grad/")].grad, golden[name], 1e-4)
            checked += 1
    assert checked == 16


def test_gradient_norms_of_every_parameter(golden):
    model = build(golden).train()
    create_objective(model)(training_batch(golden))["total"].backward()
    names = published_names(model)
    with np.load(GOLDEN / "segclip_tiny.npz") as file:
        norms = dict(
            zip(
                map(str, file["out/train/grad_norm_keys"]),
                file["out/train/grad_norms"].tolist(),
                strict=True,
            )
        )
    seen = 0
    for key, parameter in model.named_parameters():
        expected = norms.pop(names[key])
        if parameter.grad is None:
            assert expected == 0 and names[key] == "clip.visual.class_embedding"
        else:
            assert float(parameter.grad.norm()) == pytest.approx(expected, rel=1e-4, abs=1e-9), (
                names[key]
            )
            seen += 1
    assert not norms and seen == 173


def published_names(model):
    return {name: model.published.to_theirs(name) for name in model.state_dict()}


@torch.no_grad()
def test_masking_and_reconstruction(golden):
    model = build(golden).train()
    x, grid = model.embed(golden["in/images"])
    order = golden["in/mae_noise"][:, 1:].argsort(dim=1, stable=True)
    restore = order.argsort(1)
    assert torch.equal(restore + 1, golden["out/train/mae_ids_restore"][:, 1:].long())
    kept = x.gather(1, order[:, :15, None].expand(-1, -1, x.shape[2]))
    removed = torch.ones(3, 64).scatter(1, order[:, :15], 0)
    assert torch.equal(removed.long(), golden["out/train/mae_mask"][:, 1:].long())
    hidden = model.scatter(kept, golden["in/gumbel_mae"], golden["meta/config"]["gumbel_tau"])
    close(hidden, golden["out/train/mae_hidden"], 1e-5)
    pixels = model.decoder(hidden, restore, grid)
    close(pixels[0], golden["out/train/mae_pred_image0"], 1e-5)
    some = order[:, 15:30]
    torch.testing.assert_close(
        model.decoder(hidden, restore, grid, some),
        pixels.gather(1, some[..., None].expand(-1, -1, 192)),
    )
    torch.testing.assert_close(
        sincos_positions(grid, 64)[None], golden[f"weights/{POSITIONS}"], atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("name", ["seg_random", "seg_mixed"])
@torch.no_grad()
def test_segmentation_of_a_crop(golden, model, name):
    features = model.encode_image(golden["in/images"][:1])
    texts = golden[f"in/{name}".replace("seg_", "seg_text_")]
    table = group_tables(features, texts, float(model.logit_scale), 5, 0.8)
    pixels = ok.upsample_argmax(features.soft.unflatten(2, features.grid), (64, 64))[0]
    stable = golden[f"out/{name}/stable"]
    assert torch.equal(pixels[stable], golden[f"out/{name}/group_of_pixel"].long()[stable])
    close(
        table[0][pixels].permute(2, 0, 1)[:, stable],
        golden[f"out/{name}/class_map"][:, stable],
        1e-5,
    )
    placement = Placement((64, 64), (64, 64), (64, 64), None)
    queries = EncodedQueries(tuple(map(str, range(20))), texts, torch.arange(20))
    labels, _ = GroupTables(background_threshold=0.8).label_map(model, features, queries, placement)
    assert torch.equal(labels[stable].long() + 1, golden[f"out/{name}/labels"].long()[stable])


@torch.no_grad()
def test_sliding_windows(golden, model):
    """Windows in one batch give the labels that crops one by one gave."""
    origins = golden["out/slide/crop_origins"].long()
    windows = torch.stack(
        [golden["in/slide_image"][0, :, y : y + 64, x : x + 64] for y, x in origins.tolist()]
    )
    features = model.encode_image(windows)
    queries = EncodedQueries(tuple(map(str, range(20))), golden["in/slide_text"], torch.arange(20))
    for size, ending in (((80, 112), ""), ((100, 140), "_ori")):
        placement = Placement(size, (80, 112), (64, 64), origins)
        labels, _ = GroupTables(background_threshold=0.8).label_map(
            model, features, queries, placement
        )
        stable = golden[f"out/slide/stable{ending}"]
        assert torch.equal(
            labels[stable].long() + 1, golden[f"out/slide/labels{ending}"].long()[stable]
        )
        assert float(stable.float().mean()) > 0.99


def test_the_published_mixing_of_a_batch(golden):
    model = build(golden, mix_batch=True)
    with torch.no_grad():
        features = model.encode_image(golden["in/images"])
    close(features.embedding, golden["out/compat/eval_image_feat"], 1e-5)
    close(features.groups, golden["out/compat/eval_group_feats"], 1e-5)
    assert torch.equal(features.index, golden["out/compat/eval_group_index"].long())
    losses = create_objective(model.train())(training_batch(golden))
    for ours, theirs in (
        ("contrastive", "contrastive"),
        ("superpixel", "sp_kl"),
        ("reconstruction", "mae"),
        ("total", "total"),
    ):
        assert losses[ours].item() == pytest.approx(
            golden[f"out/compat/{theirs}"].item(), rel=5e-6
        )  # made with an older torch
    losses["total"].backward()
    close(
        model.groups.k_conv.weight.grad,
        golden["out/compat/grad/clip.visual.transformer.semantic_layer2.k_conv.weight"],
        1e-4,
    )
    close(
        model.groups.semantic_center.grad,
        golden["out/compat/grad/clip.visual.transformer.semantic_layer2.semantic_center"],
        1e-4,
    )


@torch.no_grad()
def test_a_batch_is_its_images(golden, model):
    together = model.encode_image(golden["in/images"])
    for i in range(3):
        alone = model.encode_image(golden["in/images"][i : i + 1])
        close(alone.groups[0], together.groups[i], 1e-5)
        assert torch.equal(alone.index[0], together.index[i])


def test_superpixel_loss_is_the_published_product():
    """With the matrix of equal labels, as published; value and gradient in float64."""
    torch.manual_seed(0)
    P = torch.rand(2, 4, 9, dtype=torch.float64, requires_grad=True)
    segments = torch.randint(-3, 4, (2, 9)) * 1000
    p = P.transpose(1, 2)
    E = (segments[:, :, None] == segments[:, None]).double()
    Q = E @ p / E.sum(2, keepdim=True)
    a, b = p.softmax(-1), Q.softmax(-1)
    expected = (b * (b.log() - a.log()) + a * (a.log() - b.log())).mean() / 2
    found = superpixel_loss(P, segments).mean()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, P)[0], torch.autograd.grad(expected, P)[0]
    )
    with pytest.raises(
        InputError,
        match=r"segments is torch.int64 of shape \[2, 8\]; expected integers of \[2, 9\]",
    ):
        superpixel_loss(P, segments[:, :8])


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return ovseg.create_model("segclip_vit_b16")


def test_keys_are_the_published_ones(vit, tmp_path):
    expected = {
        name: tuple(shape)
        for name, shape in json.loads((GOLDEN / "segclip_keys.json").read_text()).items()
    }
    state = ovseg.official_state_dict(vit)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected and len(
        expected
    ) == 415
    torch.save(state, tmp_path / "segclip.bin")
    other = ovseg.create_model("segclip_vit_b16")
    assert ovseg.load_official_state_dict(other, read_published(tmp_path / "segclip.bin")) == []
    assert all(
        torch.equal(a, b)
        for a, b in zip(vit.state_dict().values(), other.state_dict().values(), strict=True)
    )
    # Without the parts that only training needs; with anything else missing, more, or of another
    # shape.
    small = {name: x for name, x in state.items() if not re.search("mae|reconstruct", name)}
    lacking = ovseg.load_official_state_dict(other, small)
    assert len(lacking) == 415 - len(small) - 1 and all(
        "mae" in name or "reconstruct" in name for name in lacking
    )
    broken = {name: x for name, x in small.items() if name != "clip.visual.proj"} | {
        "clip.visual.extra": torch.zeros(1)
    }
    broken["clip.logit_scale"] = torch.zeros(2)
    expected = r"1 missing: clip\.visual\.proj; 1 unexpected: clip\.visual\.extra; 1 of another shape: clip\.logit"
    with pytest.raises(CheckpointError, match=expected):
        ovseg.load_official_state_dict(other, broken)


def test_parameter_groups_are_the_recipes(vit):
    groups = {
        (g["lr_scale"], g["weight_decay"]): g["params"]
        for g in vit.parameter_groups(4e-3, 0.05, 4e-6)
    }
    assert set(groups) == {(1e-3, 0.05), (1e-3, 0.0), (1.0, 0.05), (1.0, 0.0)}
    sizes = {
        scale: sum(p.numel() for (s, _), params in groups.items() if s == scale for p in params)
        / 1e6
        for scale in (1e-3, 1.0)
    }
    assert sizes[1e-3] == pytest.approx(108.97, abs=0.01) and sizes[1.0] == pytest.approx(
        53.67, abs=0.01
    )
    frozen = (
        sum(p.numel() for p in vit.parameters() if not p.requires_grad)
        + sincos_positions((14, 14), 384).numel()
    )
    assert frozen / 1e6 == pytest.approx(26.16, abs=0.01)
    decayed = {id(p) for (_, decay), params in groups.items() if decay for p in params}
    named = dict(vit.named_parameters())
    assert (
        id(named["groups.semantic_center"]) in decayed
        and id(named["backbone.clip.logit_scale"]) in decayed
    )
    assert (
        id(named["groups.norm.bias"]) not in decayed and id(named["groups.norm.weight"]) in decayed
    )


@pytest.mark.parametrize("size", [(224, 224), (448, 448), (336, 448), (100, 250), (16, 32)])
@torch.no_grad()
def test_sizes(vit, size):
    features = vit.encode_image(torch.randn(1, 3, *size))
    grid = (size[0] // 16, size[1] // 16)
    assert (
        features.grid == grid
        and features.soft.shape == (1, 8, grid[0] * grid[1])
        and features.groups.shape == (1, 8, 512)
    )
    assert bool(features.embedding.isfinite().all())


def test_text_of_any_length(vit):
    ids = vit.tokenizer(["a cat", "a photo of a very long street with many cars"])
    with torch.no_grad():
        whole = vit.backbone.clip.encode_text(ids)
        torch.testing.assert_close(vit.encode_text(ids), whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(vit.encode_text(ids[:, :32]), whole, rtol=1e-4, atol=1e-5)


def test_the_scale_stays_below_a_hundred():
    model = ovseg.create_model("segclip_tiny")
    with torch.no_grad():
        model.backbone.logit_scale.fill_(9.0)
    create_objective(model).after_step(Progress())
    assert model.backbone.logit_scale.exp().item() == pytest.approx(100)


def scene_batch(model, **more):
    ids = torch.arange(2)
    return PairBatch(
        torch.randn(2, 3, 48, 48), model.tokenizer(["red seven", "gravel"]), ids, ids, **more
    )


@pytest.mark.bad_input("models", "an option that means nothing")
def test_options_that_cannot_be():
    with pytest.raises(
        ValueError, match="second_stage is 2; expected 0 to 0, the blocks of the backbone"
    ):
        ovseg.create_model("segclip_tiny", second_stage=2)
    model = ovseg.create_model("segclip_tiny")
    with pytest.raises(ValueError, match=r"weights names \['kl'\]; expected some of"):
        create_objective(model, weights={"kl": 1.0})
    with pytest.raises(
        ValueError,
        match=r"objective segclip\.kepd: unknown key, did you mean objective segclip\.kept",
    ):
        create_objective(model, kepd=0.5)
    with pytest.raises(ValueError, match=r"kept is 0\.01; of 144 patches it keeps 0"):
        create_objective(model, kept=0.01)(
            scene_batch(model, segments=torch.zeros(2, 144, dtype=torch.int64))
        )


def test_losses_are_switched_by_their_weights():
    torch.manual_seed(0)
    model = ovseg.create_model("segclip_tiny")
    batch = scene_batch(model, segments=torch.randint(0, 9, (2, 144)))
    losses = create_objective(model, weights={"reconstruction": 0.0, "superpixel": 0.5})(batch)
    assert set(losses) == {"total", "contrastive", "superpixel"}
    torch.testing.assert_close(losses["total"], losses["contrastive"] + 0.5 * losses["superpixel"])
    losses["total"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert F.normalize(model.encode_image(batch.images).embedding, dim=-1).shape == (2, 64)


def test_convert_and_back(vit, tmp_path, capsys):
    from ovseg.cli.main import main

    torch.save(
        {"state_dict": {f"module.{name}": x for name, x in ovseg.official_state_dict(vit).items()}},
        tmp_path / "segclip.bin",
    )
    assert (
        main(
            [
                "convert",
                str(tmp_path / "segclip.bin"),
                "segclip_vit_b16",
                "--out",
                str(tmp_path / "folder"),
            ]
        )
        == 0
    )
    loaded = ovseg.from_pretrained(tmp_path / "folder")
    direct = ovseg.create_model("segclip_vit_b16", str(tmp_path / "segclip.bin"))
    assert torch.equal(direct.groups.semantic_center, loaded.groups.semantic_center)
    assert all(
        torch.equal(a, b)
        for a, b in zip(vit.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    # The same as safetensors is test_zegclip.py's.
    assert main(["convert", str(tmp_path / "folder"), "--out", str(tmp_path / "again.bin")]) == 0
    again = read_published(tmp_path / "again.bin")
    assert set(again) == set(ovseg.official_state_dict(vit)) and torch.equal(
        again["clip.visual.proj"], vit.backbone.clip.visual.proj
    )
    capsys.readouterr()
    assert (
        main(["convert", str(tmp_path / "segclip.bin"), "--out", "x"]) == 2
        and "model is missing" in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="segclip_tiny has no published layout"):
        ovseg.official_state_dict(ovseg.create_model("segclip_tiny"))


class Evil:
    def __reduce__(self):
        return print, ("this must never run",)


@pytest.mark.bad_input("weights", "a checkpoint that would run code")
def test_checkpoints_run_no_code(tmp_path, capsys):
    torch.save({"clip.visual.proj": Evil()}, tmp_path / "evil.bin")
    (tmp_path / "junk.bin").write_bytes(b"junk")
    torch.save([1, 2], tmp_path / "list.bin")
    for name, message in (
        ("evil.bin", "without running code"),
        ("junk.bin", "or is damaged"),
        ("list.bin", "holds no state dict"),
        ("none.bin", "does not exist"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_published(tmp_path / name)
    assert "never" not in capsys.readouterr().out


def test_the_benchmarks_plain_version_is_the_same_model(vit):
    """What the benchmark compares with computes the same loss and labels."""
    from ovseg_benchmarks.whole import segclip as plain

    batch = plain.training_batch(vit, 2, 64)
    ours, theirs = create_objective(vit)(batch)["total"], plain.published_loss(vit, batch)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    texts, origins = F.normalize(torch.randn(6, 512), dim=-1), torch.tensor([[0, 0], [0, 16]])
    placement, pixels = Placement((50, 90), (64, 80), (64, 64), origins), torch.randn(3, 64, 80)
    expected = plain.published_labels(vit, pixels, texts, placement, 0.3)
    with torch.no_grad():
        features = vit.encode_image(torch.stack([pixels[:, :, :64], pixels[:, :, 16:]]))
    queries = EncodedQueries(tuple("abcdef"), texts, torch.arange(6))
    found, _ = GroupTables(background_threshold=0.3).label_map(vit, features, queries, placement)
    assert float((found != expected).float().mean()) < 0.01


def test_nothing_is_left_out_in_silence():
    """A loss with a weight and without its data, and tokens that are no patches."""
    model = ovseg.create_model("segclip_tiny")
    with pytest.raises(
        InputError, match="batch holds no segments and the superpixel loss has a weight"
    ):
        create_objective(model)(scene_batch(model))
    fine, ids = ovseg.create_model("segclip_vit_b16", stride=8), torch.arange(2)
    batch = PairBatch(torch.zeros(2, 3, 64, 64), fine.tokenizer(["a", "b"]), ids, ids)
    with pytest.raises(InputError, match="images give 49 tokens and 16 patches"):
        create_objective(fine, weights={"superpixel": 0.0})(batch)


@torch.no_grad()
def test_the_attention_backend_reaches_every_block(golden, monkeypatch):
    from ovseg.nn import blocks as block

    seen = []
    real = block.attention
    monkeypatch.setattr(
        block, "attention", lambda *a, backend="sdpa", **o: seen.append(backend) or real(*a, **o)
    )
    model = build(golden)
    for one in model.blocks:
        one.attention_backend = "xformers"
    model.encode_image(golden["in/images"])
    model.encode_text(golden["in/ids"].long())
    assert (
        seen == ["xformers"] * (len(model.backbone.vision_blocks) + len(model.backbone.text_blocks))
        and len(seen) > 4
    )
