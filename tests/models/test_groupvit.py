"""GroupViT: transformers' own model, its folders, here and in the Hub's cache; objective and sizes."""

import json
import re

import pytest
import torch
from hub_stand_in import fill_cache
from torch.nn import functional as F

import ovseg
import ovseg_kernels as ok
from ovseg.data.batches import NounBatch, PairBatch
from ovseg.errors import CheckpointError, InputError
from ovseg.nn.vit_blocks import Packing
from ovseg.systems.groupvit.published import NVIDIA, to_ours, to_theirs
from ovseg.systems.objective import Progress, create_objective

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
TEXT = {
    "vocab_size": 49408,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "depths": [2, 1, 2],
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 8,
    "num_group_tokens": [12, 5, 0],
    "num_output_groups": [12, 5, 5],
}


def theirs(**small):
    """transformers' model, no two tensors alike."""
    torch.manual_seed(0)
    model = transformers.GroupViTModel(transformers.GroupViTConfig(**small)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 2.0)
    return model


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """(transformers' ViT-S, ours from its folder)."""
    model, folder = theirs(), tmp_path_factory.mktemp("groupvit")
    model.save_pretrained(folder)
    return model, ovseg.from_pretrained(folder)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    model = theirs(
        text_config=TEXT, vision_config=VISION, projection_dim=24, projection_intermediate_dim=56
    )
    model.save_pretrained(folder)
    return model, folder


def token_ids(count=4, length=20):
    ids = torch.randint(1, 40000, (count, length), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 49406
    for row, end in enumerate((length - 1, 9, 12, 5)):
        ids[row, end:] = 49407
    return ids


def close(found, expected, tolerance=1e-5):
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"{error:.2e}"


@pytest.mark.parametrize("backend", ["auto", "reference"])
@torch.no_grad()
def test_transformers_own_model(full, backend):
    model, ours = full
    images, ids = (
        torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)),
        token_ids(),
    )
    expected = model(input_ids=ids, pixel_values=images, output_attentions=True)
    with ok.backend(backend):
        features, texts, found = ours(images), ours.encode_text(ids), ours.image(images)
    close(found.groups, expected.vision_model_output.last_hidden_state)
    close(found.pooled, expected.vision_model_output.pooler_output)
    close(F.normalize(features.embedding, dim=-1), expected.image_embeds)
    close(F.normalize(texts, dim=-1), expected.text_embeds)
    close(ours.logit_scale * ours.similarity(features, texts), expected.logits_per_image)
    maps = expected.vision_model_output.attentions
    for stage, map_ in zip(found.stages, maps, strict=True):
        close(stage.soft, map_)
    close(features.soft, maps[1] @ maps[0])
    assert torch.equal(features.index, maps[1].argmax(1).gather(1, maps[0].argmax(1)))
    assert torch.equal(features.tokens[1, 7], features.groups[1, features.index[1, 7]])


@torch.no_grad()
def test_pictures_of_other_sizes(small_folder):
    """transformers resizes the table of positions when its image tower is asked alone."""
    model, folder = small_folder
    ours = ovseg.from_pretrained(folder)
    for size in ((96, 64), (40, 72)):
        images = torch.randn(1, 3, *size)
        expected = model.vision_model.embeddings(images, interpolate_pos_encoding=True)
        close(ours.image.embed(images)[0], expected)
        assert ours(images).grid == (size[0] // 8, size[1] // 8)


def test_names_go_both_ways(full):
    model, ours = full
    state, expected = ovseg.official_state_dict(ours), model.state_dict()
    assert state.keys() == expected.keys() and all(
        torch.equal(state[name], expected[name]) for name in expected
    )
    assert all(
        to_theirs(to_ours(name)) == name
        for name in expected
        if not re.search(r"layers\.\d+\.self_attn\.[qkv]_", name)
    )


# (what is replaced, by what, where it is not): transformers 4.30, convert_groupvit_nvlab_to_hf.py,
# Apache-2.0; in its order.
TRANSFORMERS_TABLE = (
    ("img_encoder.pos_embed", "vision_model.embeddings.position_embeddings", ()),
    ("img_encoder.patch_embed.proj", "vision_model.embeddings.patch_embeddings.projection", ()),
    ("img_encoder.patch_embed.norm", "vision_model.embeddings.layernorm", ()),
    ("img_encoder.layers", "vision_model.encoder.stages", ()),
    ("blocks", "layers", ("res",)),
    ("attn", "self_attn", ("pre_assign",)),
    ("self_attn.proj", "self_attn.out_proj", ()),
    ("pre_assign_attn.attn.proj", "pre_assign_attn.attn.out_proj", ()),
    ("norm1", "layer_norm1", ()),
    ("norm2", "layer_norm2", ("pre_assign",)),
    ("img_encoder.norm", "vision_model.layernorm", ()),
    ("text_encoder.token_embedding", "text_model.embeddings.token_embedding", ()),
    ("text_encoder.positional_embedding", "text_model.embeddings.position_embedding.weight", ()),
    ("text_encoder.transformer.resblocks.", "text_model.encoder.layers.", ()),
    ("ln_1", "layer_norm1", ()),
    ("ln_2", "layer_norm2", ()),
    ("c_fc", "fc1", ()),
    ("c_proj", "fc2", ()),
    ("text_encoder", "text_model", ()),
    ("ln_final", "final_layer_norm", ()),
    ("img_projector.linear_hidden.", "visual_projection.", ()),
    ("img_projector.linear_out.", "visual_projection.3.", ()),
    ("text_projector.linear_hidden", "text_projection", ()),
    ("text_projector.linear_out", "text_projection.3", ()),
)


def by_transformers_table(state):
    found = {}
    for name, tensor in state.items():
        new = name
        for old, replacement, where_not in TRANSFORMERS_TABLE:
            if not any(word in new for word in where_not):
                new = new.replace(old, replacement)
        for packed in ("qkv.", "in_proj_"):
            if packed in name:
                start, kind = new.split(packed)
                found |= {
                    f"{start}{letter}_proj.{kind}": x
                    for letter, x in zip("qkv", tensor.chunk(3), strict=True)
                }
                break
        else:
            found[new] = tensor.squeeze() if "_projection." in new else tensor
    return found


def test_nvidias_own_files(full, tmp_path):
    """As trained: under ``model`` with settings beside it, projectors as convolutions, blocks
    packed, a second temperature.
    """
    from omegaconf import OmegaConf

    model, ours = full
    state = NVIDIA.state(ours)
    expected, found = model.state_dict(), by_transformers_table(state)
    assert found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )
    assert (
        len(state) == 406 and state["img_projector.linear_out.weight"].dim() == 3
    )  # and 407 with the temperature for nouns
    state["multi_label_logit_scale"] = torch.tensor(2.5)
    beside = {
        "optimizer": {"state": {}},
        "epoch": 30,
        "config": OmegaConf.create({"model": {"depths": [6, 3, 3]}}),
    }
    torch.save({"model": state, **beside}, tmp_path / "groupvit.pth")
    for read in (
        ovseg.from_pretrained(str(tmp_path / "groupvit.pth")),
        ovseg.create_model("groupvit_vit_s16", str(tmp_path / "groupvit.pth"), multi_label=True),
    ):
        own = read.state_dict()
        assert own.pop("multi_label_logit_scale", torch.tensor(2.5)).item() == 2.5
        assert (
            all(torch.equal(own[name], x) for name, x in ours.state_dict().items())
            and len(own) == 406
        )
    del state["text_encoder.transformer.resblocks.3.mlp.c_fc.bias"]
    torch.save({"model": {**state, "head": torch.zeros(1)}}, tmp_path / "groupvit.pth")
    with pytest.raises(
        CheckpointError,
        match=r"groupvit_vit_s16 \(1 missing: text_encoder\.transformer\.resblocks\.3\.mlp\.c_fc\.bias; "
        r"1 unexpected: head\)",
    ):
        ovseg.from_pretrained(tmp_path / "groupvit.pth")


def test_a_folder_in_sizes_of_its_own(small_folder, tmp_path):
    """From the folder, by path and by file; saved as ours and read again; with the preset's name."""
    _, folder = small_folder
    picture = torch.randint(0, 255, (3, 70, 90), dtype=torch.uint8)
    first = ovseg.from_pretrained(folder)
    again = ovseg.from_pretrained(first.save_pretrained(tmp_path / "saved"))
    named = ovseg.create_model("groupvit_vit_s16", str(folder))
    file = ovseg.from_pretrained(str(folder / "model.safetensors"))
    labels = [
        ovseg.segment(picture, ["cat", "a wall"], model=one).labels.tolist()
        for one in (first, again, named, file)
    ]
    assert (
        all(one == labels[0] for one in labels) and first.name == again.name == "groupvit_vit_s16"
    )
    assert first.spec.image_size == 64 and first.spec.patch_size == 8 and first.spec.embed_dim == 24
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "groupvit"
    with pytest.raises(
        InputError,
        match=r"holds transformers' groupvit, and the model is segclip_vit_b16; expected groupvit_vit_s16",
    ):
        ovseg.create_model("segclip_vit_b16", str(folder))


def test_from_the_hubs_cache(small_folder, tmp_path, monkeypatch):
    _, folder = small_folder
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    seen = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}
    files = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    fill_cache(
        tmp_path / "hub",
        "nvidia/groupvit",
        {**files, "preprocessor_config.json": json.dumps(seen).encode()},
    )
    model = ovseg.create_model("groupvit_vit_s16", pretrained="hf-hub:nvidia/groupvit")
    assert model.spec.mean == (0.5, 0.4, 0.3) and model.source == "hf-hub:nvidia/groupvit"
    local = ovseg.from_pretrained(folder)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), local.state_dict().values(), strict=True)
    )
    with pytest.raises(ValueError, match="nvidia/elsewhere is not in the cache"):
        ovseg.create_model("groupvit_vit_s16", pretrained="hf-hub:nvidia/elsewhere")


@pytest.mark.parametrize(
    "change,message",
    [
        (
            {"vision_config": {**VISION, "hidden_act": "relu"}},
            r"vision_config\.hidden_act is 'relu', expected 'gelu'",
        ),
        (
            {"vision_config": {**VISION, "assign_eps": 1e-6}},
            r"vision_config\.assign_eps is 1e-06, expected 1\.0",
        ),
        ({"text_config": {**TEXT, "hidden_act": "relu"}}, r"text_config\.hidden_act is 'relu'"),
    ],
)
def test_folders_that_are_not_computed_here(small_folder, change, message, tmp_path):
    _, folder = small_folder
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message):
        ovseg.from_pretrained(tmp_path)


def test_damaged_folders(small_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    _, folder = small_folder
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    key = "vision_model.encoder.stages.0.layers.1.self_attn.k_proj.weight"
    extra = {"text_model.embeddings.position_ids": torch.arange(77)[None]}  # of older versions
    save_file(tensors | extra, tmp_path / "model.safetensors")
    ovseg.from_pretrained(tmp_path)
    save_file(
        {name: x for name, x in tensors.items() if name != key} | {"head.weight": torch.zeros(2)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(
        CheckpointError,
        match=r"1 missing: .*stages\.0\.layers\.1\.self_attn\.qkv\.weight; 3 unexpected: .*head\.weight",
    ):
        ovseg.from_pretrained(tmp_path)


def tiny_batch(model, kind=PairBatch, B=4, **more):
    ids, texts = torch.arange(B), ["a red seven", "gravel", "a blue one on grass", "two"][:B]
    return kind(torch.rand(B, 3, 48, 48), model.tokenizer(texts), ids, ids, **more)


def test_multi_label_is_the_published_sum():
    """Written plainly: a picture against all nouns with three positives, a noun against all
    pictures with one.
    """
    torch.manual_seed(0)
    model = ovseg.create_model("groupvit_tiny", multi_label=True).train()
    nouns = model.tokenizer(["red", "seven", "gravel", "blue", "one", "grass"] * 2).view(4, 3, -1)
    batch = tiny_batch(model, NounBatch, noun_ids=nouns)
    losses = create_objective(model, multi_label=1.0)(batch, Progress(2, 9))
    image = model.image_projector(
        model.image(
            batch.images, [Progress(2, 9).rng("cpu", f"groups_{i}") for i in range(2)]
        ).pooled
    )
    words = model.text_projector(model.text(nouns.flatten(0, 1)).sentence)
    logits = model.noun_scale * F.normalize(image, dim=-1) @ F.normalize(words, dim=-1).T
    target = torch.eye(4).repeat_interleave(3, 1)
    rows = -(target / 3 * logits.log_softmax(1)).sum(1).mean()
    columns = F.cross_entropy(logits.T, torch.arange(4).repeat_interleave(3))
    torch.testing.assert_close(losses["multi_label"], (rows + columns) / 2)
    torch.testing.assert_close(losses["total"], losses["contrastive"] + losses["multi_label"])
    losses["total"].backward()
    assert (
        all(p.grad is not None for _, p in model.trainable)
        and model.multi_label_logit_scale.grad.abs() > 0
    )
    with pytest.raises(
        ValueError, match=r"multi_label is 1\.0 and groupvit_tiny has no temperature for nouns"
    ):
        create_objective(ovseg.create_model("groupvit_tiny"), multi_label=1.0)


def test_texts_alone_and_together_are_the_same():
    """Packed, padded, one by one, in one pass of several lists: one number each."""
    torch.manual_seed(0)
    model = ovseg.create_model("groupvit_tiny")
    ids = model.tokenizer(["a red seven", "gravel", "a photo of two blue things on grass"])
    with torch.no_grad():
        together = model.encode_text(ids)
        for row, expected in zip(ids, together, strict=True):
            torch.testing.assert_close(model.encode_text(row[None])[0], expected)
        padded = model.text(ids, pads=True)
        torch.testing.assert_close(padded.sentence, model.text(ids).sentence)
        parts = model.text.encode_together([ids[:1, :6], ids[1:]])
        torch.testing.assert_close(torch.cat([part.sentence for part in parts]), padded.sentence)
        tokens, seen = parts[1].padded()
        whole, _ = padded.padded()
        torch.testing.assert_close(tokens[seen], whole[1:, : seen.shape[1]][seen])
    assert isinstance(padded.packing, Packing)


@pytest.mark.parametrize(
    "pool,expected", [("mean", lambda x: x.mean(1)), ("max", lambda x: x.max(1).values)]
)
def test_the_picture_from_its_groups(pool, expected):
    found = ovseg.create_model("groupvit_tiny", pool=pool).image(torch.rand(2, 3, 48, 48))
    assert torch.equal(found.pooled, expected(found.groups))


def test_chunks_give_the_whole_batchs_gradient():
    """Projectors run over the whole batch: their statistics are its own, however it is encoded."""
    from ovseg.training.gradients import Gradients

    gradients = []
    for chunk in (None, 2):
        torch.manual_seed(0)
        model = (
            ovseg.create_model("groupvit_tiny").train().double()
        )  # statistics of four rows blow rounding up
        noise = {
            f"groups_{i}": torch.randn(4, G, L, generator=torch.Generator().manual_seed(i))
            for i, (G, L) in enumerate(((16, 144), (8, 16)))
        }
        batch = tiny_batch(model, noise=noise)
        batch.images = batch.images.double()
        Gradients(create_objective(model), chunk=chunk)(batch, Progress())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert (
            float((gradients[1][name] - expected).abs().max())
            <= 1e-6 * float(expected.abs().max()) + 1e-9
        ), name


def test_options_that_cannot_be():
    with pytest.raises(
        ValueError,
        match=r"depths, group_tokens and groups are \[1, 1\], \[8\] and \[8\]; expected a depth",
    ):
        ovseg.create_model("groupvit_tiny", depths=[1, 1], group_tokens=[8], groups=[8])
    with pytest.raises(ValueError, match=r"text.kind is 'words2'; expected one of"):
        ovseg.create_model("groupvit_tiny", text={"kind": "words2"})
    with pytest.raises(ValueError, match="patch_size is 8 and local_depth 3; expected 4"):
        ovseg.create_model("groupvit_tiny", patch_size=8)
    with pytest.raises(ValueError, match=r"backbone.kind is 'tiny'; expected 'grouping'"):
        ovseg.create_model("groupvit_vit_s16", backbone={"kind": "tiny"})
    with pytest.raises(ValueError, match=r"pool is 'sum'; expected one of \['mean', 'max'\]"):
        ovseg.create_model("groupvit_tiny", pool="sum")
    with pytest.raises(ValueError, match="groupvit_tiny has no published layout"):
        ovseg.official_state_dict(ovseg.create_model("groupvit_tiny"))
