"""OVSegmentor: the published modules' tensors, names of the published checkpoints by stage, DINO's
weights, texts without padding.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import ovseg
import ovseg_kernels as ok
from ovseg.data.batches import CrossEntityBatch
from ovseg.errors import CheckpointError
from ovseg.inference.queries import EncodedQueries
from ovseg.inference.rules.groups import GroupTables, group_tables
from ovseg.inference.view import Placement
from ovseg.systems.objective import Progress, create_objective
from ovseg.systems.ovsegmentor.mask_consistency import mask_consistency
from ovseg.systems.ovsegmentor.model import OVSegmentor, OVSegmentorOptions
from ovseg.weights.pickles import read_published

pytest.importorskip("transformers", reason="transformers is not installed")
GOLDEN = Path(__file__).parent.parent / "golden"
TEXT = {
    "kind": "bert",
    "width": 64,
    "heads": 4,
    "depth": 2,
    "hidden": 128,
    "vocab_size": 200,
    "positions": 80,
    "dropout": 0.0,
}
TOWERS = {
    "kind": "grouping",
    "width": 64,
    "heads": 4,
    "hidden": 256,
    "depths": [2, 2],
    "group_tokens": [16, 0],
    "groups": [8],
    "patch_norm": False,
    "drop_path": 0.0,
    "image_size": 112,
    "patch_size": 8,
    "embed_dim": 32,
    "projector": 128,
    "text": TEXT,
}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "ovsegmentor_tiny.npz") as file:
        return {
            name: torch.from_numpy(file[name])
            for name in file.files
            if file[name].dtype.kind != "U"
        }


def weights(golden):
    return {
        name.removeprefix("weights/"): x
        for name, x in golden.items()
        if name.startswith("weights/")
    }


def build(golden, stage=0):
    model = OVSegmentor(OVSegmentorOptions(backbone=TOWERS, stage=stage))
    assert model.published.load(model, weights(golden)) == []
    return model.eval()


@pytest.fixture(scope="module")
def model(golden):
    return build(golden)


def error_of(found, expected):
    """Largest difference over the largest value."""
    return float((found.detach() - expected).abs().max() / expected.abs().max())


def close(found, expected, tolerance, name=""):
    assert error_of(found, expected) <= tolerance, f"{name} {error_of(found, expected):.2e}"


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("picture", ["a", "b"])
@torch.no_grad()
def test_evaluation(golden, model, picture, backend):
    images = golden[f"in/eval/image_{picture}"]
    with ok.backend(backend):
        features, found = model(images), model.image(images)
    expected = {
        name: golden[f"out/eval/{picture}/{name}"]
        for name in (
            "image_x",
            "image_feat",
            "image_x_before_proj",
            "image_feat_before_proj",
            "soft",
            "q",
            "hard_idx",
        )
    }
    for name, tensor in (
        ("image_x", features.embedding),
        ("image_feat", features.groups),
        ("image_x_before_proj", found.pooled),
        ("image_feat_before_proj", found.groups),
    ):
        close(tensor, expected[name], 1e-5, name)
    close(features.soft, expected["soft"][:, 0], 1e-5)
    close(found.stages[0].queries, expected["q"][:, 0], 1e-5)
    assert torch.equal(features.index, expected["hard_idx"].long())


@torch.no_grad()
def test_inside_of_the_image_tower(golden, model):
    x, _ = model.image.embed(golden["in/eval/image_a"])
    x, tokens = model.image.layers[0].tokens(x, None)
    block = model.image.groupings[0]
    centers, normed = block.centers(x, tokens)
    for name, found in (
        ("stage0_x", x[:1]),
        ("stage0_t", tokens),
        ("assign_query", centers),
        ("assign_key", normed[:1]),
        ("group_out", block(x, tokens).tokens),
    ):
        close(found, golden[f"out/eval/a/{name}"], 1e-5, name)
    queries, patches = model.image.first_centers(golden["in/eval/image_a"])
    close(queries, golden["out/eval/a/q"][:, 0], 1e-5)
    assert torch.equal(patches, normed)


@torch.no_grad()
def test_texts(golden, model):
    ids, expected = (
        golden["in/eval/text/input_ids"].long(),
        {
            n: golden[f"out/eval/text/{n}"]
            for n in ("text_x", "text_x_before_proj", "text_feat_before_proj", "text_norm")
        },
    )
    texts, states = model.encode_text(ids), model.text(ids)
    close(texts, expected["text_x"], 1e-5)
    close(F.normalize(texts, dim=-1), expected["text_norm"], 1e-5)
    close(states.sentence, expected["text_x_before_proj"], 1e-5)
    close(model.text(ids, pads=True).padded()[0], expected["text_feat_before_proj"], 1e-5)
    tokens, seen = states.padded()
    close(tokens[seen], expected["text_feat_before_proj"][:, : seen.shape[1]][seen], 1e-5)
    close(model.similarity(golden["in/eval/image_a"], texts), golden["out/eval/logits"], 1e-5)


@torch.no_grad()
def test_segmentation_of_a_window(golden, model):
    crop, texts = golden["in/seg/image"][..., 0:224, 0:224], golden["in/seg/text"]
    features, prefix = model(crop), "out/seg/window/"
    close(features.embedding, golden[f"{prefix}image_x"], 1e-5)
    close(features.groups, golden[f"{prefix}image_feat"], 1e-5)
    pixels = ok.upsample_argmax(features.soft.unflatten(2, features.grid), (224, 224))[0]
    clear = ~torch.from_numpy(
        np.unpackbits(golden[f"{prefix}ambiguous"].numpy())[: 224 * 224]
        .reshape(224, 224)
        .astype(bool)
    )
    assert torch.equal(pixels[clear], golden[f"{prefix}group_idx"].long()[clear])
    scores = group_tables(features, texts, model.logit_scale, 5, 0.95)[0][pixels].permute(2, 0, 1)
    close(scores[:, clear], golden[f"{prefix}scores"][:, clear], 1e-5)
    placement, queries = (
        Placement((224, 224), (224, 224), (224, 224), None),
        EncodedQueries(tuple("t" * 20), texts, torch.arange(20)),
    )
    for name, threshold, shift in (
        ("labels", 0.95, 1),
        ("labels_thr03", 0.3, 1),
        ("labels_nobg", None, 0),
    ):
        labels, _ = GroupTables(background_threshold=threshold).label_map(
            model, features, queries, placement
        )
        assert torch.equal((labels.long() + shift)[clear], golden[prefix + name].long()[clear]), (
            name
        )


@torch.no_grad()
def test_sliding_windows(golden, model):
    """Windows in one batch, encoded once, give what windows one by one gave."""
    image, origins = golden["in/seg/image"], torch.tensor([[0, 0], [0, 56]])
    features = model(torch.cat([image[..., x : x + 224] for _, x in origins.tolist()]))
    queries = EncodedQueries(tuple("t" * 20), golden["in/seg/text"], torch.arange(20))
    for size, name in (((224, 280), "labels"), ((200, 250), "labels_ori")):
        placement = Placement(size, (224, 280), (224, 224), origins)
        labels, _ = GroupTables(background_threshold=0.95).label_map(
            model, features, queries, placement
        )
        assert (
            float((labels.long() + 1 != golden[f"out/seg/slide/{name}"].long()).float().mean())
            <= 1e-4
        )


def training_batch(golden):
    ids = {
        name: golden[f"in/train/{name}/input_ids"].long()
        for name in ("caption", "question", "answer", "entity")
    }
    noise = {
        "groups_0": golden["in/train/noise_online"][:, 0],
        "teacher_0": golden["in/train/noise_teacher"][:, 0],
    }
    pairs = torch.arange(6)
    return CrossEntityBatch(
        golden["in/train/image"],
        ids["caption"],
        pairs,
        pairs,
        noise=noise,
        partner=golden["in/train/cross_image"],
        entity_ids=pairs,
        question_ids=ids["question"],
        answer_ids=ids["answer"],
        entity_token_ids=ids["entity"],
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("stage", [1, 2])
def test_training_step(golden, stage, backend):
    """Losses, gradients and running statistics of a step as published: padding computed, projectors
    over every token.
    """
    model, prefix = build(golden, stage).train(), f"out/stage{stage}/"
    objective, batch = (
        create_objective(model, padding="published", teacher="keep").train(),
        training_batch(golden),
    )
    with ok.backend(backend):
        rows = objective.encode(batch, Progress())
        losses = objective.loss(rows, batch, Progress(), None)
        for ours, theirs in (
            ("contrastive", "matching"),
            ("entity", "entity"),
            ("mask", "mask"),
            ("total", "total"),
        ):
            if ours in losses:
                close(losses[ours], golden[f"{prefix}loss/{theirs}"], 1e-5, ours)
        assert ("mask" in losses) == (stage == 2)
        own = {model.published.to_theirs(name): p for name, p in model.named_parameters()}
        for name in [name for name in golden if name.startswith(f"{prefix}gradmask/")]:
            found = torch.autograd.grad(
                losses["mask"], own[name.removeprefix(f"{prefix}gradmask/")], retain_graph=True
            )[0]
            close(found, golden[name], 2e-5, name)
        losses["total"].backward()
    norm = (
        torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None])
        .sum()
        .sqrt()
    )
    close(norm, golden[f"{prefix}grad_norm_total"], 5e-5)
    checked = [
        name.removeprefix(f"{prefix}grad/") for name in golden if name.startswith(f"{prefix}grad/")
    ]
    assert len(checked) == {1: 30, 2: 11}[stage]
    for name in checked:
        expected = golden[f"{prefix}grad/{name}"]
        close(own[name].grad.view(expected.shape), expected, 5e-5, name)
    state = ovseg.official_state_dict(model)
    buffers = [name for name in golden if name.startswith(f"{prefix}buffer/")]
    assert len(buffers) == 9
    for name in buffers:
        close(
            state[name.removeprefix(f"{prefix}buffer/")].float(), golden[name].float(), 5e-6, name
        )


def test_what_the_training_step_is_made_of(golden):
    model = build(golden, 2).train()
    objective, batch = (
        create_objective(model, padding="published", teacher="keep").train(),
        training_batch(golden),
    )
    rows = objective.encode(batch, Progress())
    expected = {
        name: golden[f"out/stage2/{name}"]
        for name in (
            "M1",
            "M2",
            "match_idx",
            "detached_groups",
            "entity_sim",
            "entity_x",
            "image_feat",
        )
    }
    train = {
        name: golden[f"out/train/{name}"]
        for name in (
            "image_x",
            "text_x",
            "image_x_before_proj",
            "text_x_before_proj",
            "image_feat_before_proj",
            "question_out",
            "question_proj",
            "answer_x",
            "soft_online",
            "hard_idx_online",
        )
    }
    for name, found in (
        ("image_x_before_proj", rows["image"]),
        ("text_x_before_proj", rows["text"]),
        ("image_feat_before_proj", rows["groups"]),
        ("question_out", rows["completed"]),
        ("image_x", model.image_projector(rows["image"])),
        ("text_x", model.text_projector(rows["text"])),
        ("answer_x", model.text_projector(rows["answer"])),
        ("question_proj", model.bridge_projector(rows["completed"])),
    ):
        close(found, train[name], 2e-5, name)
    seen = model.image(batch.images, [batch.noise["groups_0"]]).stages[0]
    close(seen.soft, train["soft_online"][:, 0], 2e-5)
    assert torch.equal(seen.index, train["hard_idx_online"].long())
    other = model.teacher(batch.partner, [batch.noise["teacher_0"]]).stages[0]
    close(other.soft, golden["out/stage2/soft_teacher"][:, 0], 2e-5)
    assert torch.equal(other.index, golden["out/stage2/hard_idx_teacher"].long())
    close(rows["marked"], expected["M1"], 2e-5)
    close(rows["target"], expected["M2"], 2e-5)
    _, match = mask_consistency(
        rows["marked"].unflatten(2, (14, 14)), rows["target"].unflatten(2, (14, 14)), (224, 224)
    )
    assert torch.equal(match, expected["match_idx"].long())
    groups, prompt = model.image_projector(rows["groups"]), model.text_projector(rows["prompt"])
    close(groups, expected["image_feat"], 2e-5)
    close(prompt, expected["entity_x"], 2e-5)
    alike = (groups * prompt[:, None]).sum(-1)
    close(alike, expected["entity_sim"], 2e-5)
    assert torch.equal(
        alike.topk(4, largest=False).indices.sort().values, expected["detached_groups"].long()
    )


def test_padding_costs_nothing_and_changes_nothing(golden):
    """Packed texts give the loss of padded ones under a mask, to 1e-6, whatever they are padded to."""
    batch, losses = training_batch(golden), []
    for length in (24, 77):
        model = build(golden, 2).train()
        for name in ("token_ids", "question_ids", "answer_ids", "entity_token_ids"):
            ids = getattr(batch, name)
            setattr(batch, name, F.pad(ids, (0, length - ids.shape[1])))
        losses.append(create_objective(model, teacher="keep")(batch))
        with torch.no_grad():
            text, question = batch.token_ids, batch.question_ids
            dense = transformers_states(model, question)
            close(model.text(text).sentence, transformers_states(model, text)[:, 0], 1e-6)
            found = model.image(batch.images, [batch.noise["groups_0"]]).groups
            tokens, seen = model.text(question).padded()
            completed = model.entities(dense, found, question != 0)
            close(model.entities(tokens, found, seen), completed, 1e-6)
            answer = model.text_projector(transformers_states(model, batch.answer_ids)[:, 0])
            logits = (
                model.logit_scale
                * F.normalize(model.bridge_projector(completed), dim=-1)
                @ F.normalize(answer, dim=-1).T
            )
            plain = (
                F.cross_entropy(logits, torch.arange(6))
                + F.cross_entropy(logits.T, torch.arange(6))
            ) / 2
            close(losses[-1]["entity"], plain, 5e-6)  # statistics of six rows
    for name, loss in losses[0].items():
        close(losses[1][name], loss.detach(), 1e-6, name)
    published = create_objective(build(golden, 2).train(), padding="published", teacher="keep")(
        batch
    )
    close(losses[0]["contrastive"], published["contrastive"].detach(), 1e-5)
    assert (
        error_of(losses[0]["entity"], published["entity"].detach()) > 1e-3
    )  # its decoder looks at padding


def transformers_states(model, ids):
    """[T, L, D] by transformers' own BertModel."""
    from transformers import BertConfig, BertModel

    o = model.text.options
    bert = BertModel(
        BertConfig(
            vocab_size=o.vocab_size,
            hidden_size=o.width,
            num_hidden_layers=o.depth,
            num_attention_heads=o.heads,
            intermediate_size=o.hidden,
            max_position_embeddings=o.positions,
        )
    ).eval()
    bert.load_state_dict(model.text.transformer.state_dict())
    return bert(ids, attention_mask=(ids != 0).int()).last_hidden_state


def test_the_teacher_follows_and_begins_as_a_copy(golden):
    model = build(golden, 2)
    objective = create_objective(model, momentum=0.75)
    before = [p.clone() for p in model.image.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(model.teacher.parameters(), before, strict=True))
    with torch.no_grad():
        for parameter in model.image.parameters():
            parameter.add_(1.0)
    objective.after_step(Progress())
    for teacher, old in zip(model.teacher.parameters(), before, strict=True):
        torch.testing.assert_close(teacher, old + 0.25)
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_the_teacher_stops_where_it_is_used(golden):
    """No block behind the first grouping block's centers, no gradient."""
    model, ran = build(golden, 2).train(), []
    for name, module in model.teacher.named_modules():
        if re.fullmatch(
            r"layers\.\d+\.blocks\.\d+|norm|layers\.0\.downsample\.(mlp_channels|assign\.v_proj)",
            name,
        ):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    create_objective(model, teacher="keep")(training_batch(golden))["total"].backward()
    assert ran == ["layers.0.blocks.0", "layers.0.blocks.1"]
    assert all(p.grad is None for p in model.teacher.parameters())


def keys():
    return json.loads((GOLDEN / "ovsegmentor_keys.json").read_text())


def test_keys_are_the_published_ones_by_stage():
    found = keys()
    shapes = {name: tuple(shape) for name, shape in found["shapes"].items()}
    for stage, name in ((2, "stage2"), (1, "stage1"), (0, "inference")):
        with torch.device("meta"):
            other = ovseg.create_model("ovsegmentor_vit_b16", stage=stage, device="meta")
        left_out = tuple(found["sets"][name]["without"])
        expected = {key: shape for key, shape in shapes.items() if not key.startswith(left_out)}
        assert {
            key: tuple(x.shape) for key, x in ovseg.official_state_dict(other).items()
        } == expected
        assert len(expected) == found["sets"][name]["keys"] == {2: 650, 1: 459, 0: 408}[stage]
        assert (
            other.published.load(
                other, {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
            )
            == []
        )


def test_checkpoints_as_they_are_published(golden, tmp_path):
    """A dictionary with an omegaconf object and a defaultdict, two-dimensional positions, a table
    of older versions; into each stage.
    """
    from omegaconf import OmegaConf

    state, sizes = weights(golden), {key: value for key, value in TOWERS.items() if key != "kind"}
    state |= {name: state[name][0] for name in keys()["also_accept"]}
    state |= {name: torch.zeros(shape) for name, shape in keys()["ignore_if_present"].items()}
    metrics = defaultdict(float, miou=53.8)
    config = OmegaConf.create(
        {"model": {"type": "x", "depths": [6, 6], "width": "${model.type}", "none": None}}
    )
    torch.save(
        {
            "model": {f"module.{name}": x for name, x in state.items()},
            "config": config,
            "metrics": metrics,
            "epoch": 3,
            "miou": np.float64(1.0),
        },
        tmp_path / "best.pth",
    )
    for stage in (0, 1, 2):
        model = ovseg.create_model(
            "ovsegmentor_vit_b16", str(tmp_path / "best.pth"), stage=stage, **sizes
        )
        found = ovseg.official_state_dict(model)
        assert (
            all(torch.equal(x, golden[f"weights/{name}"]) for name, x in found.items())
            and len(found) == (152, 203, 298)[stage]
        )
    nameless = ovseg.from_pretrained(tmp_path / "best.pth", **sizes)
    assert nameless.name == "ovsegmentor_vit_b16" and nameless.options.stage == 0
    again = ovseg.from_pretrained(nameless.save_pretrained(tmp_path / "saved"))
    assert torch.equal(again.image.pos_embed, golden["weights/img_encoder.pos_embed"])


def test_convert_and_back(golden, tmp_path):
    from ovseg.cli.main import main

    model = ovseg.create_model(
        "ovsegmentor_vit_b16",
        stage=2,
        **{key: value for key, value in TOWERS.items() if key != "kind"},
    )
    model.published.load(model, weights(golden))
    folder = model.save_pretrained(tmp_path / "folder")
    assert main(["convert", str(folder), "--out", str(tmp_path / "again.pth")]) == 0
    again = read_published(tmp_path / "again.pth")
    assert again.keys() == weights(golden).keys() and all(
        torch.equal(x, golden[f"weights/{name}"]) for name, x in again.items()
    )
    with pytest.raises(ValueError, match="ovsegmentor_tiny has no published layout"):
        ovseg.official_state_dict(ovseg.create_model("ovsegmentor_tiny"))


def test_what_does_not_fit_is_refused(golden):
    model, state = build(golden, 1), weights(golden)
    small = {
        name: x
        for name, x in state.items()
        if not name.startswith(("img_encoder_momentum", "bridge", "multimodal"))
    }
    lacking = model.published.load(model, small)
    assert len(lacking) == 51 and all(
        name.startswith(("bridge_projector", "multimodal_groupingblock")) for name in lacking
    )
    broken = {name: x for name, x in small.items() if name != "img_encoder.norm.bias"} | {
        "img_encoder.extra": torch.zeros(1)
    }
    broken["img_encoder.layers.0.downsample.mlp_inter.fc2.weight"] = torch.zeros(16, 32)
    expected = r"1 missing: img_encoder\.norm\.bias; 1 unexpected: img_encoder\.extra; 1 of another shape: img_encoder\.layers\.0\.down"
    with pytest.raises(CheckpointError, match=expected):
        model.published.load(model, broken)


class Evil:
    def __reduce__(self):
        return print, ("this must never run",)


def test_settings_beside_tensors_run_no_code(tmp_path, capsys):
    from omegaconf import OmegaConf

    for config in (Evil(), [OmegaConf.create({"a": 1}), Evil()]):
        torch.save({"model": {"a": torch.zeros(1)}, "config": config}, tmp_path / "evil.pth")
        with pytest.raises(CheckpointError, match="without running code"):
            read_published(tmp_path / "evil.pth")
    torch.save({"model": {"a": OmegaConf.create({"a": 1})}}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_published(tmp_path / "evil.pth")
    assert "never" not in capsys.readouterr().out


def dino_state(prefix="", width=64, depth=4, patches=196):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    vit = timm.models.VisionTransformer(
        img_size=112, patch_size=8, embed_dim=width, depth=depth, num_heads=4, num_classes=0
    )
    state = {name: torch.randn_like(x) for name, x in vit.state_dict().items()}
    state["pos_embed"] = torch.randn(1, patches + 1, width)
    return {prefix + name: x for name, x in state.items()}


@pytest.mark.parametrize("prefix", ["", "module.backbone."])
def test_dino_begins_the_image_tower(tmp_path, prefix):
    state = dino_state(prefix)
    torch.save(state, tmp_path / "dino.pth")
    model = OVSegmentor(OVSegmentorOptions(backbone=TOWERS, dino=str(tmp_path / "dino.pth")))
    own = model.image.state_dict()
    assert torch.equal(own["pos_embed"], state[f"{prefix}pos_embed"][:, 1:])
    assert torch.equal(own["norm.weight"], state[f"{prefix}norm.weight"])
    for number, name in (
        (1, "layers.0.blocks.1"),
        (2, "layers.1.blocks.0"),
        (3, "layers.1.blocks.1"),
    ):
        assert torch.equal(
            own[f"{name}.attn.qkv.weight"], state[f"{prefix}blocks.{number}.attn.qkv.weight"]
        )
    torch.save(dino_state(width=32), tmp_path / "dino.pth")
    with pytest.raises(
        CheckpointError,
        match=r"dino '.*dino\.pth' does not fit the image tower .*expected DINO's ViT of width 64",
    ):
        OVSegmentor(OVSegmentorOptions(backbone=TOWERS, dino=str(tmp_path / "dino.pth")))


def test_bert_begins_the_text_tower(golden, tmp_path):
    """From a folder of transformers, with the heads of its pretraining; the folder that is saved of
    it needs that one no more.
    """
    from transformers import BertConfig, BertForPreTraining

    config = BertConfig(
        vocab_size=200,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=80,
    )
    bert = BertForPreTraining(config).eval()
    bert.save_pretrained(tmp_path / "bert")
    text = {**TEXT, "weights": str(tmp_path / "bert")}
    model = ovseg.create_model(
        "ovsegmentor_vit_b16", **{**{k: v for k, v in TOWERS.items() if k != "kind"}, "text": text}
    )
    ids = torch.randint(1, 200, (3, 9))
    with torch.no_grad():
        torch.testing.assert_close(
            model.text(ids).sentence, bert.bert(ids).last_hidden_state[:, 0], rtol=0, atol=1e-5
        )
    folder = model.save_pretrained(tmp_path / "saved")
    (tmp_path / "bert").rename(tmp_path / "gone")
    assert torch.equal(ovseg.from_pretrained(folder).text(ids).sentence, model.text(ids).sentence)
    with pytest.raises(
        CheckpointError,
        match=r"does not fit the text tower \(\d+ tensors: .*of width 64 and depth 3",
    ):
        ovseg.create_model(
            "ovsegmentor_vit_b16", text={**TEXT, "depth": 3, "weights": str(tmp_path / "gone")}
        )


def test_berts_words(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        "[PAD]": 7,
        "[CLS]": 1,
        "[SEP]": 2,
        "[MASK]": 3,
        "[UNK]": 4,
        "a": 5,
        "cat": 6,
        "bus": 8,
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        mask_token="[MASK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    ).save_pretrained(tmp_path)
    towers = {k: v for k, v in TOWERS.items() if k != "kind"} | {
        "text": {**TEXT, "tokenizer": str(tmp_path), "context_length": 8}
    }
    model = ovseg.create_model("ovsegmentor_vit_b16", **towers)
    assert model.tokenizer(["a cat", "a [MASK]", "a bus a bus a bus a bus a bus"]).tolist() == [
        [1, 5, 6, 2, 0, 0, 0, 0],
        [1, 5, 3, 2, 0, 0, 0, 0],
        [1, 5, 8, 5, 8, 5, 8, 2],
    ]
    missing = ovseg.create_model(
        "ovsegmentor_vit_b16", **(towers | {"text": {**TEXT, "tokenizer": "nobody/nothing"}})
    )
    with pytest.raises(
        ValueError,
        match=r"nobody/nothing is not in the cache .* in a folder that text\.tokenizer names",
    ):
        missing.tokenizer(["a cat"])


def tiny_batch(model, B=4):
    texts = [
        ["a red seven", "a blue one on grass", "gravel", "two on brick"],
        ["a [MASK] seven", "a blue [MASK] on grass", "[MASK]", "two"],
        ["a red", "a one and grass", "gravel", "two"],
        ["red", "one", "gravel", "two"],
    ]
    ids, pairs = [model.tokenizer(some[:B]) for some in texts], torch.arange(B)
    pictures = torch.randint(0, 256, (2, B, 3, 48, 48), dtype=torch.uint8)
    return CrossEntityBatch(
        pictures[0],
        ids[0],
        pairs,
        pairs,
        partner=pictures[1],
        entity_ids=pairs,
        question_ids=ids[1],
        answer_ids=ids[2],
        entity_token_ids=ids[3],
    )


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_tiny_model_trains_in_each_stage(stage):
    torch.manual_seed(0)
    model = ovseg.create_model("ovsegmentor_tiny", stage=stage).train()
    objective, batch = create_objective(model), tiny_batch(model)
    assert (
        objective.batch_types[0].__name__ == ("PairBatch", "EntityBatch", "CrossEntityBatch")[stage]
    )
    losses = objective(batch, Progress(1, 5))
    assert set(losses) == {"total", "contrastive", *("entity", "mask")[:stage]}
    losses["total"].backward()
    assert all(p.grad is not None for _, p in model.trainable)
    assert ("text" in model.options.trained) == (stage < 2)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert model.tokenizer(["[MASK]"])[0, 1] == model.tokenizer(["zzz"])[0, 1]


def test_a_saved_folder_of_training_serves_inference(tmp_path):
    torch.manual_seed(0)
    trained = ovseg.create_model("ovsegmentor_tiny", stage=2)
    folder = trained.save_pretrained(tmp_path / "trained")
    small = ovseg.create_model("ovsegmentor_tiny", str(folder), stage=0)
    assert small.entities is None and small.teacher is None
    assert all(torch.equal(x, trained.state_dict()[name]) for name, x in small.state_dict().items())
    assert ovseg.from_pretrained(folder).options.stage == 2


def test_losses_and_options_that_cannot_be():
    one = ovseg.create_model("ovsegmentor_tiny", stage=1)
    with pytest.raises(
        ValueError,
        match=r"weights gives mask a weight and ovsegmentor_tiny is built for stage 1; expected model\.opt",
    ):
        create_objective(one, weights={"mask": 0.1})
    with pytest.raises(ValueError, match=r"weights names \['masks'\]; expected some of"):
        create_objective(one, weights={"masks": 0.1})
    with pytest.raises(
        ValueError, match=r"padding is 'none'; expected one of \['packed', 'published'\]"
    ):
        create_objective(one, padding="none")
    with pytest.raises(ValueError, match=r"stage is 3; expected 0 \(inference\), 1 or 2"):
        ovseg.create_model("ovsegmentor_tiny", stage=3)
    with pytest.raises(
        ValueError, match=r"group_tokens is \[32, 8, 0\]; expected one stage with group tokens"
    ):
        ovseg.create_model(
            "ovsegmentor_tiny", depths=[0, 0, 0], group_tokens=[32, 8, 0], groups=[32, 8]
        )
    batch = tiny_batch(one)
    batch.question_ids = batch.question_ids[:2]
    with pytest.raises(
        ValueError,
        match=r"the batch has 4 pictures and \{'question': 2, 'answer': 4\}; expected one each a pict",
    ):
        create_objective(one)(batch)
    without = create_objective(one, weights={"entity": 0.0})
    assert (
        set(without(tiny_batch(one))) == {"total", "contrastive"}
        and "entities" not in one.options.trained
    )
