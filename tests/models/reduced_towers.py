"""Every architecture of open_clip at a size that builds in a moment: few layers, narrow, few words,
small pictures; else as it is.

``reduced(name)`` puts the smaller configuration under the architecture's own name, so that it is
built by open_clip's own factory.
"""

import contextlib
import copy
import json
from unittest import mock

import open_clip
import open_clip.timm_model
import timm
import torch

WIDTH = 32
WORDS = 64


def configuration(name):
    """(open_clip's configuration made small, what timm is told beside it)."""
    config = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    config["embed_dim"] = WIDTH
    trunk = {}
    if "timm_model_name" in vision:
        trunk = timm_arguments(vision["timm_model_name"])
        vision["image_size"] = trunk.get("img_size", 96)
        if trunk.get("embed_dim", WIDTH) != WIDTH:  # MobileCLIP's stem has one width
            assert vision.get("timm_proj") != "none"
    elif isinstance(vision["layers"], list):
        vision.update(layers=[1, 1, 1, 1], width=8, image_size=64)
    else:
        vision.update(layers=2, width=WIDTH, head_width=16, image_size=3 * vision["patch_size"])
        if vision.get("attentional_pool"):
            vision.update(attn_pooler_queries=3, attn_pooler_heads=2)
    text.update(
        {"width": WIDTH, "heads": 2, "layers": 2, "vocab_size": WORDS}
        if "hf_model_name" not in text
        else {"width": WIDTH}
    )
    if "multimodal_cfg" in config:
        config["multimodal_cfg"].update(
            width=WIDTH, heads=2, layers=1, vocab_size=WORDS, attn_pooler_heads=2
        )
    return config, trunk


def timm_arguments(name):
    if name.startswith("convnext"):
        return {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, WIDTH)}
    if name.startswith("fastvit"):
        stages = 5 if name in ("fastvit_mci3", "fastvit_mci4") else 4
        return {"layers": (1,) * stages, "embed_dims": (8, 8, 16, 32, 32)[:stages]}
    if name.startswith("vitamin"):
        from timm.models.vitamin import VitCfg, VitConvCfg

        stem = VitCfg(
            embed_dim=(8, 8, WIDTH),
            depths=(1, 1, 1),
            stem_width=8,
            conv_cfg=VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
            head_type="1d",
        )
        return {"embed_dim": WIDTH, "depth": 2, "num_heads": 2, "embed_cfg": stem, "img_size": 64}
    if name == "vit_base_mci_224":
        return {"depth": 1, "img_size": 48, "embed_dim": 768}
    if name.startswith("swin"):
        return {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    patch = int(name.split("patch")[1][:2])
    size = {} if "relpos" in name else {"img_size": 3 * patch}
    return {"embed_dim": WIDTH, "depth": 2, "num_heads": 2, **size}


def text_configuration(name, *_, **__):
    """transformers' configuration of a text tower, of the class that the Hub's file names; nothing
    is downloaded.
    """
    import transformers as t

    small = {
        "vocab_size": WORDS,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 40,
    }
    if name == "roberta-base":
        return t.RobertaConfig(**small, pad_token_id=1)
    if name.startswith("xlm-roberta"):
        return t.XLMRobertaConfig(**small, pad_token_id=1)
    if name.startswith("google/mt5"):
        return t.MT5Config(
            vocab_size=WORDS,
            d_model=WIDTH,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_decoder_layers=1,
            num_heads=2,
        )
    assert name.startswith("facebook/nllb")
    return t.M2M100Config(
        vocab_size=WORDS,
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=40,
    )


@contextlib.contextmanager
def reduced(name, **beside):
    """Inside, open_clip's ``name`` is the reduced one; ``beside`` is told to timm as well."""
    config, trunk = configuration(name)
    trunk |= beside
    create = timm.create_model

    def small(model, *options, **arguments):
        return create(
            model,
            *options,
            **(arguments | (trunk if model == config["vision_cfg"].get("timm_model_name") else {})),
        )

    with (
        mock.patch.dict(open_clip.factory._MODEL_CONFIGS, {name: config}),
        mock.patch.object(open_clip.timm_model.timm, "create_model", small),
        mock.patch(
            "open_clip.hf_model.AutoConfig.from_pretrained", text_configuration, create=True
        ),
    ):
        yield config


def key(name):
    """Architectures with the same key are the same model at the reduced size."""
    config, trunk = configuration(name)
    return json.dumps([config, trunk], sort_keys=True, default=repr)


def lively(module):
    """Weights of an order that shows: gains and biases away from one and nothing, no layer scale
    that hides a branch, class tokens and positions that matter.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("logit_scale") or name.endswith("logit_bias"):
                continue
            if (
                parameter.dim() < 2
                or "gamma" in name
                or "token" in name
                or "pos" in name
                or name.endswith("latent")
            ):
                base = (
                    1.0
                    if name.endswith(("weight", "gamma_1", "gamma_2", "gamma", "layer_scale.gamma"))
                    and parameter.dim() < 2
                    else 0.0
                )
                parameter.copy_(base + 0.2 * noise)
            elif parameter.dim() == 2 and min(parameter.shape) > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(1 + 0.2 * torch.rand(buffer.shape, generator=generator))
    return module


def twins(name, **beside):
    """(our backbone, open_clip's own module with the same weights), both at the reduced size."""
    from ovseg.systems.backbones import build_backbone

    with reduced(name, **beside):
        theirs = lively(open_clip.create_model(name, pretrained_text=False)).eval()
        ours = build_backbone("open_clip", architecture=name).eval()
    state = {
        key: copy.copy(value)
        for key, value in theirs.state_dict().items()
        if not key.startswith("text_decoder.")
    }
    ours.clip.load_state_dict(state)
    return ours, theirs
