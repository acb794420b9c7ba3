"""The mask loss against maps at full size: values, matching, gradients, memory; and the benchmark's
plain versions.
"""

import weakref

import pytest
import torch
from ovseg_benchmarks.whole import ovsegmentor as plain
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ovseg
from ovseg.errors import InputError
from ovseg.inference.queries import EncodedQueries
from ovseg.inference.rules.groups import GroupTables
from ovseg.inference.view import Placement
from ovseg.systems.ovsegmentor.mask_consistency import mask_consistency


def maps(B, G, h, w, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(B + G + h)
    return [scale * torch.randn(B, G, h, w, generator=generator, dtype=dtype) for _ in range(2)]


@pytest.mark.parametrize(
    "shape,size,scale",
    [
        ((3, 8, 14, 14), (224, 224), 1.0),
        ((2, 4, 12, 9), (48, 100), 3.0),
        ((2, 3, 5, 7), (5, 7), 1.0),
        ((40, 2, 3, 4), (17, 29), 0.1),
        ((1, 1, 1, 6), (9, 30), 1.0),
    ],
)
def test_equal_to_maps_at_full_size(shape, size, scale):
    prediction, target = maps(*shape, scale=scale)
    a, b = (prediction.clone().requires_grad_() for _ in range(2))
    found, _ = mask_consistency(a, target, size)
    expected = plain.published_mask_loss(b, target, size)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    weights = torch.rand(shape[0], dtype=torch.float64)
    (found @ weights).backward()
    (expected @ weights).backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9)


def test_matching_finds_a_permutation():
    prediction, _ = maps(5, 6, 8, 8)
    orders = torch.stack(
        [torch.randperm(6, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    )
    shuffled = prediction.gather(1, orders[..., None, None].expand_as(prediction))
    _, match = mask_consistency(prediction, shuffled, (32, 32))
    assert torch.equal(orders.gather(1, match), torch.arange(6).expand(5, 6))


def test_constant_maps_predict_nothing():
    prediction, target = maps(2, 3, 6, 6)
    prediction[0, 1] = 0.5
    prediction.requires_grad_()
    loss, _ = mask_consistency(prediction, target, (24, 24))
    loss.sum().backward()
    assert bool(loss.isfinite().all()) and bool(prediction.grad.isfinite().all())


def test_bad_input():
    prediction, target = maps(2, 3, 6, 6)
    with pytest.raises(
        InputError, match=r"prediction and target have shapes \[2, 3, 6, 6\] and \[2, 2, 6, 6\]"
    ):
        mask_consistency(prediction, target[:, :2], (24, 24))
    with pytest.raises(InputError, match=r"size is \(4, 24\) and the maps are \(6, 6\)"):
        mask_consistency(prediction, target, (4, 24))


class Peak(TorchDispatchMode):
    """The largest sum of bytes of the storages that live at one time, of those made inside."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if (
                isinstance(tensor, torch.Tensor)
                and (key := tensor.untyped_storage().data_ptr())
                and key not in self.live
            ):
                size = self.live[key] = tensor.untyped_storage().nbytes()
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(tensor.untyped_storage(), self.freed, key, size)
        return found

    def freed(self, key, size):
        self.live.pop(key, None)
        self.now -= size


def peak(function, size=128):
    prediction, target = maps(size, 8, 14, 14, torch.float32)
    prediction.requires_grad_()
    with Peak() as mode:
        loss = function(prediction, target, (224, 224)).sum()
        loss.backward()
    return mode.most, loss.item()


def test_extra_memory_is_a_hundredth_of_the_maps():
    """Of all storages that live at once, forward and backward, at the published 128 pictures a
    process.
    """
    mine, loss = peak(lambda *x: mask_consistency(*x)[0])
    other, expected = peak(plain.published_mask_loss, 16)
    assert mine <= 0.01 * 8 * other, f"{mine} bytes, {mine / other / 8:.4f} of the maps"
    assert peak(plain.published_mask_loss, 2)[1] == pytest.approx(
        peak(lambda *x: mask_consistency(*x)[0], 2)[1], rel=1e-5
    )
    assert loss > 0 and expected > 0


SMALL = {
    "width": 64,
    "heads": 4,
    "hidden": 128,
    "depths": [1, 1],
    "group_tokens": [16, 0],
    "groups": [8],
    "projector": 128,
    "embed_dim": 32,
    "image_size": 64,
    "drop_path": 0.0,
}
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


def test_the_benchmarks_plain_versions_are_the_same_model():
    """What the benchmark compares with computes the same labels and losses."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    model = ovseg.create_model("ovsegmentor_vit_b16", stage=1, **SMALL, text=TEXT)
    origins, pixels = torch.tensor([[0, 0], [0, 16]]), torch.randn(3, 64, 80)
    texts = plain.spread_texts(model, 12, pixels[None, :, :, :64])
    placement = Placement((50, 90), (64, 80), (64, 64), origins)
    expected = plain.published_labels(model, pixels, texts, placement, 0.3)
    with torch.no_grad():
        features = model(torch.stack([pixels[:, :, :64], pixels[:, :, 16:]]))
    queries = EncodedQueries(tuple("abcdefghijkl"), texts, torch.arange(12))
    found, _ = GroupTables(background_threshold=0.3).label_map(model, features, queries, placement)
    assert float((found != expected).float().mean()) < 0.01 and len(expected.unique()) > 2
    model.train()
    ids, bert = plain.text_batch(model, 4), plain.plain_bert(model)
    image, groups = torch.randn(4, 64), torch.randn(4, 8, 64)
    ours, theirs = (
        plain.text_loss(model, ids, image, groups),
        plain.published_text_loss(model, bert, ids, image, groups),
    )
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    model.zero_grad()
    ours.backward()
    theirs.backward()
    mine, other = dict(model.text.transformer.named_parameters()), dict(bert.named_parameters())
    name = "encoder.layer.0.attention.self.value.weight"
    assert float((mine[name].grad - other[name].grad).abs().max()) < 1e-4 * float(
        other[name].grad.abs().max()
    )
    assert F.normalize(texts, dim=-1).allclose(texts, atol=1e-6)
