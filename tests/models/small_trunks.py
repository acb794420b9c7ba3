"""Narrow trunks of timm with a small table of vectors, and models upon them, for the tests."""

import torch

import ovseg
from ovseg.data.batches import PairBatch
from ovseg.data.entities import Entities
from ovseg.data.entity_words import EntityTokenizer
from ovseg.systems.backbones import build_backbone

WORDS = {"cat": ["kitten"], "dog": ["hot dog stand"], "person": ["man", "woman"], "sofa": []}
TEXT = {"kind": "vectors", "words": WORDS, "width": 8}
CNN = {"architecture": "test_efficientnet", "stages": [2, 3, 4], "last": True, "image_size": 64}
VIT = {"architecture": "test_vit", "stages": [1, 5], "last": True, "image_size": 64}
CONVNEXT = {"architecture": "test_convnext", "stages": [1, 3], "image_size": 64}


def backbone(options=CNN, **more):
    torch.manual_seed(0)
    found = build_backbone("timm", **{"text": TEXT, **options, **more}).eval()
    with torch.no_grad():  # statistics that are not those of a new batch norm
        for name, x in found.trunk.named_buffers():
            if name.endswith("running_mean"):
                x.normal_(std=0.1)
            elif name.endswith("running_var"):
                x.uniform_(0.5, 2.0)
    return found


def small(system="pacl", **options):
    """A model of the preset on a narrow trunk."""
    options = {"backbone": {"text": TEXT, **CNN, "weights": None}, **options}
    return ovseg.create_model(f"{system}_lite0", **options)


def images(*size, B=2):
    return torch.rand(B, 3, *size, generator=torch.Generator().manual_seed(0)) - 0.5


def batch():
    ids = torch.arange(4)
    tokenizer = EntityTokenizer(Entities(WORDS))
    texts = ["a cat", "two dogs on a sofa", "a man", "a woman with a kitten"]
    return PairBatch(images(64, 64, B=4), tokenizer(texts), ids, ids)
