"""Results of several parts have names, unpack as tuples, and go through compile and export."""

import io
import typing

import pytest
import torch

import ovseg_kernels as ok
from ovseg_kernels import results

TOKENS = (torch.randn(2, 3, 4), torch.randn(2, 5, 4))
LOGITS = torch.randn(2, 3, 4, 4)
CASES = {
    "center_assignment": (
        lambda q, k: ok.center_assignment(q, k, k, return_soft=True),
        TOKENS,
        results.CenterAssignment,
    ),
    "without soft": (lambda q, k: ok.center_assignment(q, k, k), TOKENS, results.CenterAssignment),
    "folded_center_assignment": (
        lambda q, k: ok.folded_center_assignment(q, k, torch.eye(4), torch.eye(4)),
        TOKENS,
        results.CenterAssignment,
    ),
    "segclip_center_assignment": (
        lambda q, k: ok.segclip_center_assignment(
            q, k, *(torch.eye(4),) * 2, *(torch.ones(4),) * 4
        ),
        TOKENS,
        results.CenterAssignment,
    ),
    "upsample_mask_loss": (
        lambda x: ok.upsample_mask_loss(x, torch.zeros(2, 8, 8, dtype=torch.int64)),
        (LOGITS,),
        results.MaskLosses,
    ),
    "upsample_argmax": (
        lambda x: ok.upsample_argmax(x, (8, 8), return_value=True),
        (LOGITS,),
        results.LabelMaps,
    ),
    "window_argmax": (
        lambda x: ok.window_argmax(
            x, torch.tensor([[0, 0], [0, 4]]), (8, 8), (8, 12), (8, 8), return_value=True
        ),
        (LOGITS,),
        results.LabelMaps,
    ),
    "select_pixels": (
        lambda x, y: ok.select_pixels(x, y[:, 0], k_pos=2, k_neg=2),
        TOKENS,
        results.SelectedPixels,
    ),
}
NAMES = {
    results.CenterAssignment: ("pooled", "index", "soft"),
    results.MaskLosses: ("focal", "dice", "present"),
    results.LabelMaps: ("labels", "value"),
    results.SelectedPixels: ("positive", "negative"),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_parts_have_names(case, backend):
    call, tensors, kind = CASES[case]
    with ok.backend(backend):
        found = call(*tensors)
    assert type(found) is kind and isinstance(found, tuple) and found._fields == NAMES[kind]
    first, *rest = found
    assert first is found[0] is getattr(found, NAMES[kind][0]) and len(rest) == len(NAMES[kind]) - 1
    assert set(typing.get_type_hints(kind)) == set(NAMES[kind])


@pytest.mark.parametrize("case", CASES)
def test_compiled_and_exported_results_have_them_too(case):
    call, tensors, kind = CASES[case]
    torch._dynamo.reset()
    expected, compiled = (
        call(*tensors),
        torch.compile(call, fullgraph=True, backend="aot_eager")(*tensors),
    )

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return call(*tensors)

    memory = io.BytesIO()
    torch.export.save(torch.export.export(Module(), tensors), memory)
    memory.seek(0)
    exported = torch.export.load(memory).module()(*tensors)
    for found in (compiled, exported):
        assert type(found) is kind
        for a, b in zip(found, expected, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
