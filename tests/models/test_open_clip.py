"""The open_clip backbone: our walk over its blocks against its own forward, taps, sizes, stride
trick, templates.
"""

import pytest
import torch
from torch.nn import functional as F

import ovseg
from ovseg.data.batches import PairBatch
from ovseg.data.templates import templates
from ovseg.systems.backbones import build_backbone
from ovseg.systems.objective import create_objective


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ovseg.create_model("pacl_vit_b16")


@pytest.fixture(scope="module")
def theirs(model):
    """open_clip's own module, its own blocks, with the same weights."""
    import open_clip

    clip = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None)
    clip.load_state_dict(model.backbone.clip.state_dict())
    return clip.eval()


@torch.no_grad()
def test_embeddings_are_open_clips(model, theirs):
    images, ids = torch.randn(2, 3, 224, 224), model.tokenizer(["a photo of a cat", "two dogs"])
    torch.testing.assert_close(
        model.backbone.encode_image(images), theirs.encode_image(images), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        model.backbone.clip.encode_image(images), theirs.encode_image(images), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        model.encode_text(ids), theirs.encode_text(ids), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_tokens_are_open_clips_and_the_tap_is_ours(model, theirs):
    """Post-norm tokens equal what open_clip returns with output_tokens, up to where its release
    norms them.
    """
    visual, images = theirs.visual, torch.randn(1, 3, 224, 224)
    before, after = (
        model.backbone.encode_patches(images, tap=tap) for tap in ("pre_norm", "post_norm")
    )
    torch.testing.assert_close(visual.ln_post(before.tokens), after.tokens)
    visual.output_tokens = True
    try:
        _, tokens = visual(images)
    finally:
        visual.output_tokens = False
    distance = [float((tokens - x.tokens).abs().max()) for x in (before, after)]
    assert min(distance) < 1e-4
    assert after.grid == (14, 14) and after.embedding.shape == (1, 768)


@torch.no_grad()
def test_other_sizes_and_the_stride_trick(model):
    assert model.encode_image(torch.randn(1, 3, 160, 256)).grid == (10, 16)
    fine = ovseg.create_model("clip_dense_vit_b16", stride=8)
    features = fine.encode_image(torch.randn(1, 3, 96, 128))
    assert features.grid == ((96 - 16) // 8 + 1, (128 - 16) // 8 + 1)
    assert features.tokens.shape == (1, 11 * 15, 512)


def test_parameter_counts_are_the_papers(model):
    assert sum(p.numel() for p in model.embedder.parameters()) == 1_050_112
    assert model.backbone.token_dim == 768 and model.backbone.embed_dim == 512


def test_a_training_step_reaches_the_embedder_only(model):
    ids = model.tokenizer(["a photo of a cat", "a dog"])
    batch = PairBatch(torch.randn(2, 3, 64, 64), ids, torch.arange(2), torch.arange(2))
    loss = create_objective(model.train())(batch)["total"]
    loss.backward()
    model.eval()
    assert model.embedder.out.weight.grad is not None
    assert all(p.grad is None for p in model.backbone.parameters())


@torch.no_grad()
def test_labels_are_averaged_over_templates(model):
    rows = model.encode_labels(["cat", "dog"], "clip80")
    assert len(templates("clip80")) == 80 and len(templates("pacl7")) == 7
    ids = model.tokenizer([t.replace("{}", "dog") for t in templates("clip80")])
    expected = F.normalize(F.normalize(model.encode_text(ids), dim=-1).mean(0), dim=0)
    torch.testing.assert_close(rows[1], expected)


def test_unsupported_architectures_say_so():
    with pytest.raises(ValueError, match="architecture is 'ViT-X'"):
        build_backbone("open_clip", architecture="ViT-X")
    with pytest.raises(
        ValueError,
        match="VisionTransformerRelPos, whose tables of relative positions are those of one "
        "picture size",
    ):
        build_backbone("open_clip", architecture="vit_relpos_medium_patch16_cls_224")
    with pytest.raises(ValueError, match="stride is 32; expected 1 to 16"):
        build_backbone("open_clip", architecture="ViT-B-16", stride=32)


@pytest.mark.parametrize(
    "value,message",
    [
        ("imagenet", "templates is 'imagenet'; expected one of"),
        ([], "templates is empty"),
        (["a photo"], r"template 'a photo' holds 0 '\{\}'; expected exactly one"),
    ],
)
@pytest.mark.bad_input("models", "templates that cannot be")
def test_bad_templates(value, message):
    with pytest.raises(ValueError, match=message):
        templates(value)
