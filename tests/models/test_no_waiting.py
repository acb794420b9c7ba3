"""No system waits for a GPU between two steps or two pictures: held on a device that cannot be read
(tests/ops/unreadable.py).
"""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from unreadable import backward, unreadable_device

import ovseg
from ovseg.data.batches import EntityBatch, MaskBatch, NounBatch, PairBatch
from ovseg.inference.queries import EncodedQueries
from ovseg.nn import vit_blocks as packing
from ovseg.systems.objective import Progress, create_objective
from ovseg_kernels import _checking

SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 1, "layers": 2},
}
# Stage 2 of OVSegmentor is not here: its masks are matched by the host.
MODELS = [
    *((name, {}, {}) for name in ovseg.list_models("*_tiny")),
    ("clip_dense_vit_b16", {"architecture": SMALL}, {}),
    ("groupvit_tiny", {"multi_label": True}, {"multi_label": 1.0}),
    ("ovsegmentor_tiny", {"stage": 1}, {}),
]


def lengths_of_the_host(monkeypatch):
    """Texts are packed by their lengths, which the host knows; what is on the CPU is fake here as
    well, so they are as long as can be.
    """
    found = packing.places

    def places(keep, whole):
        if keep.device.type != "cpu":
            return found(keep, whole)
        with unset_fake_temporarily():
            *tensors, firsts = found(torch.ones(keep.shape, dtype=torch.bool), whole)
        return *map(keep.fake_mode.from_tensor, tensors), firsts

    monkeypatch.setattr(packing, "places", places)


@pytest.mark.filterwarnings("ignore:.*runs on the reference for cuda")  # as it does where no GPU is
@pytest.mark.parametrize("name,options,losses", MODELS)
def test_nothing_waits_for_the_device(name, options, losses, monkeypatch):
    with unreadable_device(monkeypatch) as refusing:
        monkeypatch.setattr(
            torch.nn.Module, "to", lambda module, *_: module
        )  # fake parameters cannot move: they are made in place
        monkeypatch.setattr(
            torch.nn.init, "trunc_normal_", lambda tensor, *_, **__: tensor
        )  # reads what it drew
        monkeypatch.setattr(
            "ovseg.systems.base.check_reading", lambda *_: None
        )  # compares token ids of the host, which are fake here
        with torch.device("cuda"):
            model = ovseg.create_model(name, **options)
            objective = create_objective(model, **losses).train()
        images = torch.zeros(4, 3, 48, 48, dtype=torch.uint8, device="cuda")
        ids, texts = (
            torch.zeros(4, dtype=torch.int64, device="cuda"),
            torch.zeros(4, 16, dtype=torch.int64),
        )
        lengths_of_the_host(monkeypatch)
        N = (48 // model.spec.patch_size) ** 2
        batch = PairBatch(
            images, texts, ids, ids, segments=torch.zeros(4, N, dtype=torch.int64, device="cuda")
        )
        if objective.batch_types[0] is NounBatch:
            batch = NounBatch(images, texts, ids, ids, noun_ids=texts[:, None].expand(4, 3, 16))
        elif objective.batch_types[0] is EntityBatch:
            batch = EntityBatch(images, texts, ids, ids, question_ids=texts, answer_ids=texts)
        elif objective.batch_types[0] is MaskBatch:
            batch = MaskBatch(images, torch.zeros(4, 48, 48, dtype=torch.int64, device="cuda"))
        batch, texts = (
            batch.to("cuda", but=objective.on_host),
            texts if "token_ids" in objective.on_host else texts.to("cuda"),
        )
        with refusing:
            total = objective(batch, Progress(0, 10, seed=0))["total"]
            assert total.device.type == "cuda" and backward(total) == len(
                [p for p in model.parameters() if p.requires_grad]
            )
            model.eval()
            with torch.no_grad():
                features, asked = model(model.normalize(images)), model.encode_text(texts)
                assert (
                    model.segment_logits(features, asked).device.type
                    == model.similarity(features, asked).device.type
                    == "cuda"
                )
        monkeypatch.setattr(
            _checking, "looks_at_values", lambda x: False
        )  # origins on the CPU are fake here too
        options = [{"background_threshold": 0.3, "bias": {"sand": 0.1}}]
        if model.decision in ("patches", "units"):
            options += [
                {"scale": 40.0, "area_threshold": 0.1},
                {"scale": 40.0, "background_entropy": 1.0},
            ]
        for given in options:
            predictor = ovseg.Predictor(model, **given)
            owners = torch.arange(3, device="cuda")
            queries = EncodedQueries(
                ("sand", "grass", "moss"),
                torch.zeros(3, model.spec.embed_dim, device="cuda"),
                owners,
            )
            prepared = [predictor.prepare(np.zeros((60, 70, 3), np.uint8))]
            with refusing:
                (seen,), allowed = predictor.see(prepared), queries.allowed(["sand"])
                labels, _ = predictor.decision.label_map(
                    model, seen.features, queries, seen.prepared.placement, allowed=allowed
                )
            assert labels.shape == (60, 70)
