"""No system waits for a GPU between two steps or two pictures: held on a device that cannot be read (tests/ops/unreadable.py)."""

import numpy as np
import pytest
import torch
from unreadable import backward, unreadable_device

import ovseg
from ovseg.data.batch_types import MaskBatch, PairBatch
from ovseg.inference.queries import EncodedQueries
from ovseg.objectives import Progress, create_objective
from ovseg_kernels import _checking

SMALL = {"embed_dim": 32, "vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "patch_size": 16},
         "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 1, "layers": 2}}
LENGTHS = pytest.mark.xfail(strict=True, reason="packed texts read the length of the longest from the device, once a step")
MODELS = {**{name: {} for name in ovseg.list_models("*_tiny")}, "clip_dense_vit_b16": {"architecture": SMALL}}


@pytest.mark.filterwarnings("ignore:.*runs on the reference for cuda")  # as it does where no GPU is
@pytest.mark.parametrize("name", [pytest.param(name, marks=LENGTHS) if name in ("groupvit_tiny", "ovsegmentor_tiny") else name
                                  for name in MODELS])
def test_nothing_waits_for_the_device(name, monkeypatch):
    with unreadable_device(monkeypatch) as refusing:
        monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_: module)  # fake parameters cannot move: they are made in place
        monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, *_, **__: tensor)  # reads what it drew
        monkeypatch.setattr("ovseg.models.base.check_reading", lambda *_: None)  # compares token ids of the host, which are fake here
        with torch.device("cuda"):
            model = ovseg.create_model(name, **MODELS[name])
            objective = create_objective(model).train()
        images = torch.zeros(4, 3, 48, 48, dtype=torch.uint8, device="cuda")
        ids, texts = torch.zeros(4, dtype=torch.int64, device="cuda"), torch.zeros(4, 16, dtype=torch.int64, device="cuda")
        N = (48 // model.spec.patch_size) ** 2
        batch = PairBatch(images, texts, ids, ids, segments=torch.zeros(4, N, dtype=torch.int64, device="cuda"))
        if objective.batch_type is MaskBatch:
            batch = MaskBatch(images, torch.zeros(4, 48, 48, dtype=torch.int64, device="cuda"))
        with refusing:
            total = objective(batch, Progress(0, 10, seed=0))["total"]
            assert total.device.type == "cuda" and backward(total) == len([p for p in model.parameters() if p.requires_grad])
            model.eval()
            with torch.no_grad():
                features, asked = model(model.normalize(images)), model.encode_text(texts)
                assert model.segment_logits(features, asked).device.type == model.similarity(features, asked).device.type == "cuda"
        monkeypatch.setattr(_checking, "looks_at_values", lambda x: False)  # origins on the CPU are fake here too
        options = [{"background_threshold": 0.3, "bias": {"sand": 0.1}}]
        if model.decision in ("patches", "units"):
            options += [{"scale": 40.0, "area_threshold": 0.1}, {"scale": 40.0, "background_entropy": 1.0}]
        for given in options:
            predictor = ovseg.Predictor(model, **given)
            owners = torch.arange(3, device="cuda")
            queries = EncodedQueries(("sand", "grass", "moss"), torch.zeros(3, model.spec.embed_dim, device="cuda"), owners)
            prepared = [predictor.prepare(np.zeros((60, 70, 3), np.uint8))]
            with refusing:
                (seen,), allowed = predictor.see(prepared), queries.allowed(["sand"])
                labels, _ = predictor.decision.label_map(model, seen.features, queries, seen.prepared.placement, allowed=allowed)
            assert labels.shape == (60, 70)
