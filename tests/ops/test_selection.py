"""The table of backends: it lists what exists, and what it says is what runs, pass by pass."""

import functools
from types import SimpleNamespace

import emulation
import pytest
import torch
from backends import patch_the_language_once_a_launch
from samples import MAKERS

import ovseg_kernels as ok
from ovseg_kernels import _backends, _library, _selection
from ovseg_kernels.testing import assert_close_to_truth
from ovseg_kernels.triton import IMPLEMENTATIONS, KERNELS

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("name", [x for x in _library.SCHEMAS if x not in _library.COMPOSITES])
def test_the_table_lists_the_kernels_that_exist(name):
    emulation.load()
    there = {
        backend
        for backend, exists in (
            ("cuda", emulation.has_kernel(name)),
            ("triton", name in KERNELS),
        )
        if exists
    }
    assert _selection.backends_of(name) == there, "ovseg_kernels/_selection.py, TABLE"
    last = _selection.TABLE[name][-1]
    assert last.since == (0, 0) and not last.float64, "the last rule fits everything"
    assert all(rule.why and rule.order for rule in _selection.TABLE[name])


def test_the_table_knows_no_other_passes():
    assert set(_selection.TABLE) <= set(_library.SCHEMAS) - _library.COMPOSITES


def test_rules_are_of_a_capability_and_a_dtype(monkeypatch):
    everywhere = _selection.Rule(("cuda",), "anything")
    hopper = _selection.Rule(("triton",), "from 9.0 on", since=(9, 0))
    exact = _selection.Rule(("cuda", "triton"), "float64", float64=True)
    monkeypatch.setitem(_selection.TABLE, "center_assignment", (exact, hopper, everywhere))
    found = functools.partial(_selection.rule, "center_assignment")
    assert found((8, 6)) is everywhere
    assert found((9, 0)) is found((12, 0)) is hopper
    assert found((9, 0), float64=True) is exact


@pytest.fixture
def gpu(monkeypatch):
    """A GPU is there, with both backends, as far as the choice looks."""
    monkeypatch.setattr(_backends, "_reasons", dict.fromkeys(_backends.BACKENDS, ""))
    monkeypatch.setattr(_backends, "_capability", lambda device: (9, 0))
    return monkeypatch


def where(op, **options):
    return {x.name: x.backend for x in _backends.select(op, GPU, **options).passes}


def test_each_pass_has_its_backend_and_its_reason(gpu):
    names = ("patch_text_similarity", "patch_text_similarity_backward")
    assert where("patch_text_similarity") == dict.fromkeys(names, "triton")
    assert where("patch_text_similarity", float64=True) == dict.fromkeys(names, "cuda")
    gpu.setitem(_selection.TABLE, names[1], (_selection.Rule(("cuda", "triton"), "measured"),))
    choice = _backends.select("patch_text_similarity", GPU)
    assert [x.backend for x in choice.passes] == ["triton", "cuda"]
    assert f"{names[1]} on cuda: measured" in str(choice)
    assert choice.refused["cuda"] == "triton comes first"
    gpu.setitem(_backends._reasons, "triton", "it is not installed")
    assert where("patch_text_similarity") == dict.fromkeys(names, "cuda")
    assert _backends.select("patch_text_similarity", GPU).passes[0].why == (
        "triton comes first and cannot run: it is not installed"
    )
    gpu.setitem(_backends._reasons, "cuda", "it is not built")
    assert where("patch_text_similarity") == dict.fromkeys(names, "reference")


def test_what_is_forced_comes_first_and_not_where_there_is_no_kernel_of_it(gpu):
    """An operator may be built on passes of which one backend has no kernel."""
    gpu.setitem(
        _selection.TABLE, "center_assignment_backward", (_selection.Rule(("triton",), "alone"),)
    )
    with ok.backend("cuda"):
        choice = _backends.select("center_assignment", GPU)
    assert [(x.backend, x.why) for x in choice.passes] == [
        ("cuda", "it is forced"),
        ("triton", "alone"),
    ]
    with ok.backend("triton"):
        assert set(where("center_assignment").values()) == {"triton"}


def test_the_dispatcher_does_what_the_table_says(gpu):
    """In each call, for the dtype and the device of its first tensor."""
    calls = []
    gpu.setitem(_backends.IMPLEMENTATIONS, "contrastive_stats", lambda *_: calls.append("triton"))
    before = SimpleNamespace(call_boxed=lambda *_: calls.append("before"))
    gpu.setattr(torch.library, "get_kernel", lambda *_: before)
    gpu.setitem(
        _selection.TABLE,
        "contrastive_stats",
        (
            _selection.Rule(("cuda", "triton"), "exact", float64=True),
            _selection.Rule(("triton", "cuda"), "fast"),
        ),
    )
    kernel = _backends._asks("contrastive_stats", "CUDA")
    with torch.device("meta"):  # no memory, and for the choice it is a GPU
        single, double = torch.empty(2), torch.empty(2, dtype=torch.float64)
    gpu.setattr(torch.Tensor, "device", GPU)
    for forced, x, answer in (
        ("auto", single, "triton"),
        ("auto", double, "before"),
        ("cuda", single, "before"),
        ("triton", double, "triton"),
        ("reference", single, "before"),
    ):
        gpu.setattr(_backends, "_forced", forced)
        calls.clear()
        kernel(None, x)
        assert calls == [answer], (forced, x.dtype)


def test_nothing_stands_before_a_pass_that_only_cuda_answers(gpu):
    """The library being there, and Triton not being forced."""
    gpu.setattr(_backends, "_no_cuda_library", False)
    assert not _backends._may_be_triton("center_assignment")
    assert _backends._may_be_triton("patch_text_similarity")
    gpu.setattr(_backends, "_no_cuda_library", True)
    assert _backends._may_be_triton("center_assignment")


def on_both(op):
    passes = [name for name, owner in _library.OPERATOR_OF.items() if owner == op]
    passes = [name for name in passes if name in _selection.TABLE]
    return len(passes) > 1 and all(len(_selection.backends_of(name)) == 2 for name in passes)


@pytest.mark.parametrize("forward,backward", [("cuda", "triton"), ("triton", "cuda")])
@pytest.mark.parametrize("op", [op for op in MAKERS if on_both(op)])
def test_a_backward_reads_what_the_other_backend_saved(op, forward, backward):
    """Emulated and interpreted, against the definition in float64."""
    emulation.load().set_seed(0)
    patch_the_language_once_a_launch()
    answers = {}
    for name in _backends._passes_of(op):
        on = backward if name.endswith("_backward") else forward
        cuda = functools.partial(emulation._call, name)
        answers[name] = cuda if on == "cuda" else IMPLEMENTATIONS[name]
    sample = MAKERS[op](torch.float64)[0]

    def run(dtype):
        tensors = [x.detach().float().to(dtype).requires_grad_() for x in sample.tensors]
        out = sample.call(*tensors)
        upstream = torch.linspace(0.5, 1.5, out.numel()).to(out).view(out.shape)
        return [out, *torch.autograd.grad(out, tensors, upstream, materialize_grads=True)]

    with _library.overriding(answers, ("CPU",)):
        found = run(torch.float32)
    with ok.backend("reference"):
        eager, truth = run(torch.float32), run(torch.float64)
    for i, tensors in enumerate(zip(found, eager, truth, strict=True)):
        assert_close_to_truth(f"{sample} tensor {i}", *tensors, torch.float32)
