"""What our losses are timed beside computes the same losses: held to the definition in float64."""

import sys

import pytest
import torch
from ovseg_benchmarks import contrastive_baselines, registry

from ovseg_kernels.reference.contrastive_loss import contrastive_loss

PAIRS = 301  # more than one block of rows, the last of them ragged


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)


def inputs(kind, dtype, pairs=PAIRS):
    case = registry.Case("contrastive_loss", "x", {"B": pairs, "D": 24}, {"kind": kind})
    found = registry.inputs(case, dtype)
    assert ("logit_bias" in found) == (kind == "sigmoid")
    return case, found


def step(function, tensors):
    loss = function(**tensors)
    return [loss.detach(), *torch.autograd.grad(loss, list(tensors.values()))]


def truth(kind, tensors):
    wide = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}

    def definition(image, text, logit_scale, logit_bias=None):
        bias = image.new_zeros(()) if logit_bias is None else logit_bias
        return contrastive_loss(image, text, logit_scale, bias, None, None, False, kind)

    return step(definition, wide)


def largest_error(found, expected):
    pairs = zip(found, expected, strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contrastive_baselines(kind, dtype):
    case, tensors = inputs(kind, dtype)
    functions = contrastive_baselines.contrastive(case)
    if kind == "softmax":
        functions["small tiles"] = lambda **x: contrastive_baselines.inf_clip(**x, tile=64)
    expected = truth(kind, tensors)
    for name, function in functions.items():
        if name != "siglip-kernel":
            limit = 2e-6 if dtype == torch.float32 else 2e-2
            assert largest_error(step(function, tensors), expected) < limit, name


def test_tiles_and_row_blocks_in_float64():
    """To the last digits: no tile is left out, none is counted twice."""
    _, tensors = inputs("softmax", torch.float64)
    for tile in (7, PAIRS - 1, PAIRS):
        found = step(lambda tile=tile, **x: contrastive_baselines.inf_clip(**x, tile=tile), tensors)
        assert largest_error(found, truth("softmax", tensors)) < 1e-12
    for kind in ("softmax", "sigmoid"):
        case, tensors = inputs(kind, torch.float64)
        rows = contrastive_baselines.contrastive(case)["eager, closed form in row blocks"]
        assert largest_error(step(rows, tensors), truth(kind, tensors)) < 1e-12


def test_siglip_kernel(monkeypatch):
    """Its kernels interpreted, in float16: bfloat16 is wrong there. Its loss has 16 bits."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    pytest.importorskip("siglip_kernel", reason="needs the extra `bench`")
    _, tensors = inputs("sigmoid", torch.float16, pairs=45)
    found = step(contrastive_baselines.siglip_kernel, tensors)
    assert largest_error(found, truth("sigmoid", tensors)) < 2e-3


def test_what_cannot_run_here_says_why(monkeypatch):
    _, tensors = inputs("sigmoid", torch.float32)
    monkeypatch.setattr(contrastive_baselines, "interpreted", lambda: False)
    with pytest.raises(contrastive_baselines.CannotRun, match="needs a GPU"):
        contrastive_baselines.siglip_kernel(**tensors)
    monkeypatch.setattr(contrastive_baselines, "interpreted", lambda: True)
    monkeypatch.setitem(sys.modules, "siglip_kernel", None)
    with pytest.raises(contrastive_baselines.CannotRun, match=r"pip install 'ovseg-kernels\[bench"):
        contrastive_baselines.siglip_kernel(**tensors)
