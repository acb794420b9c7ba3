"""transformers' folders in open_clip's layout: the same embeddings as transformers' own models, in
sizes of the folder's own.
"""

import json

import numpy as np
import pytest
import torch
from torch import nn

import ovseg
from ovseg.errors import CheckpointError
from ovseg.systems import from_pretrained
from ovseg.weights.clip import ClipSource, create_clip, find_clip, load_clip
from ovseg.weights.tokenizers import clip_tokenizer
from ovseg.weights.transformers_layout import transformers_config, transformers_state

pytest.importorskip("open_clip", reason="open_clip is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
TEXT = {
    "vocab_size": 90,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 70,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def shaken(model):
    """No two tensors alike, and none at a value that hides a mistake: zero biases, unit gains."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def clip(act="quick_gelu", eos=89, **options):
    text = {**TEXT, "hidden_act": act, "eos_token_id": eos, **options}
    return shaken(
        transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config=text,
                vision_config={**VISION, "hidden_act": act, **options},
                projection_dim=24,
            )
        )
    )


def siglip(act="gelu_pytorch_tanh"):
    config = transformers.SiglipConfig(
        text_config={**TEXT, "hidden_size": 32, "num_attention_heads": 2, "hidden_act": act},
        vision_config={**VISION, "hidden_act": act},
    )
    return shaken(transformers.SiglipModel(config))


def words(folder):
    """A tokenizer of the folder's own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {
        "<pad>": 0,
        "<s>": 1,
        "</s>": 89,
        "<unk>": 3,
        "a": 4,
        "cat": 5,
        "red": 6,
        "wall": 7,
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 89)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    ).save_pretrained(folder)


def ours(model, folder):
    model.save_pretrained(folder)
    words(folder)
    source = find_clip(str(folder))
    found = create_clip(source.architecture).eval()
    load_clip(found, source)
    return found, source.architecture


def embeddings(model, images, ids):
    """transformers', whatever its version wraps them in."""
    found = (model.get_image_features(images), model.get_text_features(input_ids=ids))
    return [getattr(one, "pooler_output", one) for one in found]


@pytest.mark.parametrize(
    "build",
    [
        clip,
        lambda: clip("gelu"),
        lambda: clip("gelu_pytorch_tanh", layer_norm_eps=1e-3),
        lambda: clip(eos=40),
        lambda: clip(eos=2),
        siglip,
        lambda: siglip("gelu"),
    ],
    ids=["quick_gelu", "gelu", "tanh, eps", "eos inside", "old eos", "siglip", "siglip, gelu"],
)
def test_embeddings_are_transformers(build, tmp_path):
    model = build()
    found, architecture = ours(model, tmp_path)
    images, ids = torch.randn(3, 3, 32, 32), torch.randint(3, 39, (4, 16))
    eos = model.config.text_config.eos_token_id
    ids[:, 9] = (
        80 if eos == 2 and not isinstance(model, transformers.SiglipModel) else eos
    )  # with 2 transformers takes the largest
    ids[:, 12:] = 0 if eos < 89 else 88
    with torch.no_grad():
        image, text = embeddings(model, images, ids)
        torch.testing.assert_close(found.encode_image(images), image, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.encode_text(ids), text, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.logit_scale, model.logit_scale.reshape(()), rtol=0, atol=0)
        if getattr(found, "logit_bias", None) is not None:
            torch.testing.assert_close(
                found.logit_bias, model.logit_bias.reshape(()), rtol=0, atol=0
            )
    assert json.loads(json.dumps(architecture))["embed_dim"] == image.shape[1]
    assert clip_tokenizer(architecture)(["a red cat"]).tolist() == [[1, 4, 6, 5, 89] + [0] * 11]


def test_a_folder_of_siglip_is_a_model(tmp_path):
    """From the folder to labels, and from the folder that is saved of it."""
    theirs = siglip()
    theirs.save_pretrained(tmp_path / "theirs")
    words(tmp_path / "theirs")
    model = from_pretrained(str(tmp_path / "theirs"))
    images, ids = torch.randn(2, 3, 32, 32), model.tokenizer(["a red cat", "wall"])
    with torch.no_grad():
        image, text = embeddings(theirs, images, ids)
        torch.testing.assert_close(model(images).embedding, image, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.encode_text(ids), text, rtol=0, atol=1e-5)
    assert model.spec.mean == (0.5, 0.5, 0.5) and float(model.logit_bias.detach()) == pytest.approx(
        float(theirs.logit_bias.detach())
    )
    picture = torch.randint(0, 255, (3, 50, 60), dtype=torch.uint8)
    again = from_pretrained(model.save_pretrained(tmp_path / "ours"))
    found = [ovseg.segment(picture, ["cat", "wall"], model=one).scores for one in (model, again)]
    assert np.array_equal(*found)


def test_coca_without_its_caption_writer(tmp_path):
    import open_clip
    from safetensors.torch import save_file

    words = {"context_length": 77, "vocab_size": 49408, "layers": 1, "heads": 2, "width": 24}
    config = {
        "embed_dim": 24,
        "custom_text": True,
        "text_cfg": {**words, "embed_cls": True, "output_tokens": True, "context_length": 76},
        "multimodal_cfg": {**words, "attn_pooler_heads": 2, "context_length": 76},
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "attn_pooler_queries": 4,
            "output_tokens": True,
        },
    }
    coca = open_clip.CoCa(
        **{key: value for key, value in config.items() if key != "custom_text"}
    ).eval()
    save_file(
        {name: x.contiguous() for name, x in coca.state_dict().items()},
        tmp_path / "open_clip_model.safetensors",
    )
    seen = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": seen})
    )
    model, images = from_pretrained(tmp_path), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = coca.encode_image(images, normalize=False)
        torch.testing.assert_close(model(images).embedding, expected, rtol=0, atol=1e-5)


def test_names_are_open_clips_siglip(tmp_path):
    """The names of ViT-B-16-SigLIP itself, whose tower is timm's and not drawn up by this package."""
    import open_clip

    with torch.device("meta"):
        theirs = open_clip.create_model(
            "ViT-B-16-SigLIP", pretrained=None, load_weights=False, device="meta"
        )
        full = transformers.SiglipModel(transformers.SiglipConfig())
    full.config.save_pretrained(tmp_path)
    (tmp_path / "spiece.model").touch()
    from ovseg.weights.transformers_layout import from_siglip

    found = from_siglip(
        {
            name: torch.empty(tensor.shape, device="meta")
            for name, tensor in full.state_dict().items()
        }
    )
    assert {name: x.shape for name, x in found.items()} == {
        name: x.shape for name, x in theirs.state_dict().items()
    }
    config, known = transformers_config(tmp_path), open_clip.get_model_config("ViT-B-16-SigLIP")
    for key in (
        "context_length",
        "vocab_size",
        "width",
        "heads",
        "layers",
        "no_causal_mask",
        "proj_bias",
        "pool_type",
        "norm_kwargs",
    ):
        assert config["text_cfg"][key] == known["text_cfg"][key], key
    assert config["preprocess_cfg"]["mean"] == (0.5, 0.5, 0.5)


def test_names_are_open_clips_clip(tmp_path):
    import open_clip

    with torch.device("meta"):
        theirs = open_clip.create_model(
            "ViT-L-14-quickgelu", pretrained=None, load_weights=False, device="meta"
        )
        large = {
            "vision_config": {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "patch_size": 14,
            },
            "text_config": {
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_attention_heads": 12,
            },
            "projection_dim": 768,
        }
        full = transformers.CLIPModel(transformers.CLIPConfig(**large))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **large}))
    config = transformers_config(tmp_path)
    config.pop("preprocess_cfg")
    with torch.device("meta"):
        built = open_clip.CLIP(**config)
    shapes = {name: x.shape for name, x in theirs.state_dict().items()}
    assert {name: x.shape for name, x in built.state_dict().items()} == shapes
    from ovseg.weights.transformers_layout import from_clip

    assert {name: x.shape for name, x in from_clip(full.state_dict()).items()} == shapes
    assert (
        built.visual.transformer.resblocks[0].attn.num_heads == 16 and config["quick_gelu"] is True
    )


def test_saved_folders_bring_their_words(tmp_path):
    """The folder that it came from may be gone."""
    clip().save_pretrained(tmp_path / "theirs")
    words(tmp_path / "theirs")
    model = from_pretrained(str(tmp_path / "theirs"))
    expected = model.encode_labels(["cat", "red wall"], ["a {}"])
    folder = model.save_pretrained(tmp_path / "ours")
    (tmp_path / "theirs").rename(tmp_path / "gone")
    folder = folder.rename(tmp_path / "moved")
    again = from_pretrained(folder)
    torch.testing.assert_close(again.encode_labels(["cat", "red wall"], ["a {}"]), expected)
    twice = from_pretrained(again.save_pretrained(tmp_path / "twice"))
    torch.testing.assert_close(twice.encode_labels(["cat", "red wall"], ["a {}"]), expected)


def test_sharded_folders(tmp_path):
    model = clip()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    state = transformers_state(tmp_path)
    torch.testing.assert_close(state["visual.proj"], model.visual_projection.weight.T)


@pytest.mark.parametrize(
    "change,message",
    [
        (
            {"model_type": "siglip2"},
            r"holds transformers' 'siglip2'; expected one of \['clip', 'siglip'\]",
        ),
        (
            {"vision_config": {**VISION, "hidden_act": "relu"}},
            r"vision_config.hidden_act is 'relu'; expected one of \['quick_gelu'",
        ),
        (
            {"vision_config": {**VISION, "hidden_act": "gelu"}},
            "has activation gelu for pictures and quick_gelu for texts",
        ),
    ],
)
@pytest.mark.bad_input("weights", "a folder of another architecture")
def test_folders_that_open_clip_has_no_word_for(change, message, tmp_path):
    clip().save_pretrained(tmp_path)
    words(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(str(tmp_path))


@pytest.mark.bad_input("weights", "a folder that is not whole")
def test_folders_that_are_not_whole(tmp_path):
    clip().save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"a vocabulary of its own and no tokenizer; expected one of tokenizer\.json",
    ):
        from_pretrained(str(tmp_path))
    words(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
        from_pretrained(str(tmp_path))
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "elsewhere")
    del tensors["text_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"has no tensor 'text_projection\.weight'; expected all of transformers' clip",
    ):
        from_pretrained(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "elsewhere").read_bytes()[:5000])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors \(5000 bytes\) is no complete safetensors file"
    ):
        from_pretrained(str(tmp_path))


@pytest.mark.bad_input("weights", "a folder of another architecture")
def test_a_source_of_another_architecture_is_refused():
    small = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"a file does not fit the model"):
        load_clip(
            small,
            ClipSource(lambda: {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, "a file"),
        )
