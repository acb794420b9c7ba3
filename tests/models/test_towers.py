"""Image towers: every architecture of open_clip against open_clip itself, the dense map of every
head, sizes and strides.
"""

import copy

import open_clip
import pytest
import torch
from reduced_towers import configuration, key, lively, reduced, twins
from towers_table import PAGE, build, page, supported

import ovseg
from ovseg.data.batches import PairBatch
from ovseg.errors import InputError
from ovseg.nn import clip_architectures
from ovseg.nn.readout import READOUTS
from ovseg.systems.backbones import build_backbone
from ovseg.systems.objective import create_objective
from ovseg.weights.tokenizers import ClipTokenizer

FIRST = list(
    {key(name): name for name in reversed(open_clip.list_models())}.values()
)  # one of each that differ at the reduced size
NOT = ("swin_base_patch4_window7_224", "vit_relpos_medium_patch16_cls_224")
HEADS = {
    "class token": "ViT-B-16",
    "class token, timm": "EVA02-B-16",
    "norms after": "EVA02-E-14",
    "average": "ViT-L-14-CLIPA",
    "average, timm": "vit_medium_patch16_gap_256",
    "attention": "ViT-B-16-SigLIP",
    "attention, SigLIP 2": "ViT-B-16-SigLIP2",
    "attention over all": "PE-Core-B-16",
    "CoCa": "coca_ViT-B-32",
    "stem, MobileCLIP2": "MobileCLIP2-B",
    "stem": "ViTamin-S",
    "map, MobileCLIP2": "MobileCLIP2-S0",
    "map, norms": "convnext_base_w",
    "map, MLP": "convnext_large_d",
    "ResNet": "RN50",
}
close = {"rtol": 0, "atol": 1e-5}


def ids_of(name, length=20):
    text = configuration(name)[0]["text_cfg"]
    ids = torch.randint(3, 60, (3, text.get("context_length", length)))
    ids[0, 9], ids[1, 5], ids[2, -1] = 63, 63, 63  # where each text ends
    if text.get("pool_type") == "eos":
        ids[ids == 63] = text["eos_id"]
    return ids


@pytest.mark.parametrize("name", [name for name in FIRST if name not in NOT])
@torch.no_grad()
def test_architectures_are_open_clips(name):
    ours, theirs = twins(name)
    size, tower = ours.image_size, ours.tower
    images = torch.randn(2, 3, size, size)
    found, expected = ours.encode_dense(images), theirs.encode_image(images, normalize=False)
    torch.testing.assert_close(found.embedding, expected, **close)
    torch.testing.assert_close(ours.encode_image(images), expected, **close)
    ids = ids_of(name)
    torch.testing.assert_close(
        ours.encode_text(ids), theirs.encode_text(ids, normalize=False), **close
    )
    # The dense map: tokens that are alike, prefix included, are what the pool makes of them.
    token = torch.randn(2, 1, ours.token_dim)
    if name.startswith("RN"):
        tower.visual.attnpool.positional_embedding.zero_()
    alike = token.expand(-1, getattr(tower, "prefix", 0) + 6, -1)
    pooled = tower.pool(alike.mT.unflatten(2, (2, 3)) if hasattr(tower, "features") else alike)
    torch.testing.assert_close(tower.dense(token)[:, 0], pooled, **close)
    # Another size, against open_clip where it takes one.
    other = torch.randn(1, 3, size + 2 * tower.patch_size, size + tower.patch_size)
    found = ours.encode_dense(other)
    assert found.grid == (found.grid[0], found.grid[0] - 1) and found.tokens.shape == (
        1,
        found.grid[0] * found.grid[1],
        ours.embed_dim,
    )
    if hasattr(tower.visual, "trunk"):
        if hasattr(theirs.visual.trunk, "set_input_size"):
            theirs.visual.trunk.set_input_size(tuple(other.shape[-2:]))
        torch.testing.assert_close(
            found.embedding, theirs.encode_image(other, normalize=False), **close
        )


def test_the_table_is_the_page_and_says_what_is_supported():
    assert len(supported()) == len(open_clip.list_models()) - 2 >= 120
    assert {name for name in open_clip.list_models() if name not in supported()} == set(NOT)
    assert {
        name for name in open_clip.list_models() if not clip_architectures.supported(name)
    } == set(NOT)  # what can be named
    assert PAGE.read_text("utf-8") == page(PAGE.read_text("utf-8")), (
        "python tests/models/towers_table.py writes it again"
    )


@pytest.mark.parametrize("name", HEADS.values())
@torch.no_grad()
def test_overlapping_patches(name):
    plain = copy.deepcopy(build(name))
    step = plain.patch_size // 2
    with reduced(name):
        if not plain.tower.overlaps:
            with pytest.raises(
                ValueError,
                match=rf"stride is {step} and the image tower is .*; expected None: a smaller step needs",
            ):
                build_backbone("open_clip", architecture=name, stride=step)
            return
        fine = build_backbone("open_clip", architecture=name, stride=step).eval()
    fine.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, plain.image_size, plain.image_size + plain.patch_size)
    side = 2 * plain.image_size // plain.patch_size - 1
    assert fine.encode_dense(images).grid == (side, side + 2)
    # Its patches are those of the pictures that start half a patch later: the first block's,
    # without positions.
    for parameter, value in fine.named_parameters():
        if parameter.endswith(("pos_embed", "positional_embedding")):
            value.zero_(), dict(plain.named_parameters())[parameter].zero_()
    prefix = fine.tower.prefix
    tokens = fine.tower.sequence(images)[0][:, prefix:].unflatten(1, (side, side + 2))
    moved = plain.tower.sequence(images[:, :, step:-step, step:-step])[0][:, prefix:]
    torch.testing.assert_close(tokens[:, 1::2, 1::2].flatten(1, 2), moved)


def all_alike(backbone, image):
    """Without positions, and with a class token like the picture's patches: every token of a
    picture of one colour is the same.
    """
    visual = getattr(backbone.tower.visual, "trunk", backbone.tower.visual)
    for name, parameter in visual.named_parameters():
        if name.endswith(("pos_embed", "positional_embedding")):
            parameter.zero_()
    patch = (
        visual.patch_embed(image)
        if hasattr(visual, "patch_embed")
        else visual.conv1(image).flatten(2).mT
    )
    token = getattr(visual, "cls_token", getattr(visual, "class_embedding", None))
    if token is not None:
        token.copy_(patch[0, 0])


@pytest.mark.parametrize(
    "head", [head for head in HEADS if not head.startswith(("map", "stem", "ResNet"))]
)  # those pad with nothing
@torch.no_grad()
def test_a_picture_of_one_colour_is_its_patches(head):
    with reduced(HEADS[head]):
        backbone = lively(build_backbone("open_clip", architecture=HEADS[head])).eval()
    image = torch.tensor([0.3, -1.0, 0.7])[:, None, None].expand(
        1, 3, backbone.image_size, backbone.image_size
    )
    all_alike(backbone, image)
    found = backbone.encode_dense(image)
    assert float(found.embedding.abs().mean()) > 0.05
    torch.testing.assert_close(
        found.tokens, found.embedding[:, None].expand_as(found.tokens), **close
    )


@torch.no_grad()
def test_linear_heads_average_their_dense_map():
    for name in ("MobileCLIP2-S0", "vit_medium_patch16_gap_256"):
        ours, _ = twins(name)
        found = ours.encode_dense(torch.randn(2, 3, 2 * ours.image_size, ours.image_size))
        torch.testing.assert_close(found.tokens.mean(1), found.embedding, **close)
        assert float((found.tokens - found.embedding[:, None]).abs().mean()) > 0.01


@torch.no_grad()
def test_resnets_leave_positions_out_of_patches():
    ours, _ = twins("RN50")
    tower, token = ours.tower, torch.randn(1, 1, ours.token_dim)
    pooled = tower.pool(token.mT[..., None].expand(-1, -1, 2, 2))
    assert float((tower.dense(token)[:, 0] - pooled).abs().max()) > 1e-3
    flat = (
        tower.visual.attnpool.v_proj(token) @ tower.visual.attnpool.c_proj.weight.T
        + tower.visual.attnpool.c_proj.bias
    )
    torch.testing.assert_close(tower.dense(token), flat)


@pytest.mark.bad_input("models", "a readout that cannot be")
def test_convolutional_towers_refuse_readouts_by_name():
    for name in ("RN50", "convnext_base", "MobileCLIP2-S0"):
        backbone = build(name)
        for readout in READOUTS:
            if readout != "clip":
                with pytest.raises(
                    ValueError,
                    match=f"readout is '{readout}' and the image tower is .*, convolutional, "
                    "whose last lay",
                ):
                    backbone.check_readout(READOUTS[readout])
        with pytest.raises(ValueError, match="readout is 'maskclip'"):
            backbone.encode_dense(torch.zeros(1, 3, 96, 96), READOUTS["maskclip"])
    with (
        reduced("RN50"),
        pytest.raises(ValueError, match="readout is 'naclip' and the image tower is CLIP's ResNet"),
    ):
        ovseg.create_model("clip_dense_vit_b16", architecture="RN50", readout="naclip")
    with pytest.raises(
        ValueError, match="images have size \\(31, 64\\); expected at least one patch of 32"
    ):
        build("RN50").encode_dense(torch.zeros(1, 3, 31, 64))


def test_systems_on_a_class_token_say_what_they_need():
    for system, name in (
        ("pacl", "ViT-B-16-SigLIP"),
        ("segclip", "RN50"),
        ("pacl", "ViT-L-14-CLIPA"),
        ("segclip", "EVA02-B-16"),
    ):
        message = f"{system} needs blocks over a class token and patches, and architecture '{name}'"
        with reduced(name), pytest.raises(ValueError, match=message):
            ovseg.create_model(f"{system}_vit_b16", architecture=name)
    for ask in (
        lambda b: b.encode_patches(torch.zeros(1, 3, 48, 48)),
        lambda b: b.class_token,
        lambda b: b.new_blocks(1),
    ):
        with pytest.raises(ValueError, match="expected open_clip's ViT pooled by class token"):
            ask(build("ViT-B-16-SigLIP"))


def test_what_the_model_says_of_itself():
    """Normalisation and bias; whatever file the weights come from."""
    half = (0.5, 0.5, 0.5)
    for name, mean, std in (
        ("ViT-B-16-SigLIP2", half, half),
        ("PE-Core-B-16", half, half),
        ("MobileCLIP2-S0", (0, 0, 0), (1, 1, 1)),
        ("ViT-L-14-CLIPA", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("ViT-B-16", open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
    ):
        assert (build(name).image_mean, build(name).image_std) == (mean, std), name
    assert (
        build("ViT-B-16-SigLIP").logit_bias.item() == -10 and build("ViT-B-16").logit_bias is None
    )
    with reduced("PE-Core-B-16"):
        assert build("PE-Core-B-16").tokenizer(["a cat"]).shape == (1, 32)
    small = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 48, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {
            "context_length": 12,
            "vocab_size": 49408,
            "width": 64,
            "heads": 1,
            "layers": 1,
        },
    }
    assert build_backbone("open_clip", architecture=small).tokenizer(["a cat"]).shape == (1, 12)


def test_what_must_be_downloaded_says_so(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        InputError,
        match=r"the tokenizer of 'ViT-B-16-SigLIP' cannot be loaded .* expected a connection",
    ):
        ClipTokenizer("ViT-B-16-SigLIP")(["a cat"])
    with pytest.raises(
        InputError,
        match=r"the text tower's configuration of 'roberta-ViT-B-32' cannot be loaded .* expected a connection",
    ):
        build_backbone("open_clip", architecture="roberta-ViT-B-32")


@pytest.mark.parametrize(
    "name",
    ["ViT-B-16-SigLIP", "PE-Core-B-16", "coca_ViT-B-32", "ViT-L-14-CLIPA", "convnext_base", "RN50"],
)
def test_training_saving_and_copies(name, tmp_path):
    with reduced(name):
        model = ovseg.create_model("clip_dense_vit_b16", architecture=name)
        ids = ids_of(name)
        batch = PairBatch(torch.randn(3, 3, 96, 96), ids, torch.arange(3), torch.arange(3))
        create_objective(model.train())(batch)["total"].backward()
        without = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not without
        assert name != "ViT-B-16-SigLIP" or not model.backbone.logit_bias.requires_grad
        images = torch.randn(1, 3, 96, 128)
        with torch.no_grad():
            expected = model.eval().encode_image(images)
            ovseg.save_pretrained(model, tmp_path / "m")
            again, twin = ovseg.from_pretrained(tmp_path / "m"), copy.deepcopy(model)
            for parameter in model.parameters():
                parameter.zero_()
            for other in (again, twin):
                found = other.encode_image(images)
                assert torch.equal(found.tokens, expected.tokens) and torch.equal(
                    found.embedding, expected.embedding
                )
