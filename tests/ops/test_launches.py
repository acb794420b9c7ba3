"""How many kernels a call launches, ours and torch's: the host pays for each, whatever it computes.

The CUDA kernels are counted under the emulation, on tensors of the CPU that are taken for a GPU's.
Triton's launchers run on fake tensors of a GPU without their kernels, and what they ask of torch is
counted there. A torch operator that computes counts as one kernel; views and empty memory are free,
and so is the copy of the flags to the host.
"""

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import emulation
import pytest
import torch
from backends import has
from samples import MAKERS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from unreadable import backward, unreadable_device

from ovseg_kernels import _backends, _checking, _library
from ovseg_kernels.triton import IMPLEMENTATIONS, KERNELS

# Operator and backend -> the kernels of a forward and those of a backward, as (ours, torch's), for
# the first sample of the operator in float16. Fewer are welcome: write the new number.
LAUNCHES = {
    ("patch_text_similarity", "cuda"): ((5, 3), (10, 5)),
    ("patch_text_similarity", "triton"): ((5, 4), (8, 34)),
    ("similarity_contrastive_loss", "cuda"): ((2, 32), (2, 2)),
    ("similarity_contrastive_loss", "triton"): ((2, 32), (1, 6)),
    ("contrastive_loss", "triton"): ((5, 36), (7, 22)),
    ("dense_contrastive_loss", "cuda"): ((5, 68), (3, 52)),
    ("dense_contrastive_loss", "triton"): ((7, 152), (5, 77)),
    ("center_assignment", "cuda"): ((1, 1), (1, 2)),
    ("center_assignment", "triton"): ((2, 1), (2, 10)),
    ("folded_center_assignment", "cuda"): ((1, 14), (1, 22)),
    ("folded_center_assignment", "triton"): ((2, 14), (2, 32)),
    ("segclip_center_assignment", "cuda"): ((1, 19), (1, 31)),
    ("segclip_center_assignment", "triton"): ((3, 19), (4, 45)),
    ("upsample_argmax", "cuda"): ((1, 1),),
    ("window_argmax", "cuda"): ((1, 1),),
    ("upsample_mask_loss", "cuda"): ((2, 7), (1, 4)),
}
FREE = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
    "_reshape_alias",
    "detach_",
    "device",
    "promote_types",
    "scalar_tensor",  # a number for torch.where, which stays on the host
)


class Count(TorchDispatchMode):
    """Counts what torch computes, and calls our kernels by ``answer``."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.ours, self.torch = answer, Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "ovseg":
            with self:
                return self.answer(self, name, func, args)
        if not func.is_view and name not in FREE:
            self.torch[name] += 1
        return func(*args, **(kwargs or {}))

    def take(self):
        counts = sum(self.ours.values()), sum(self.torch.values())
        print(dict(self.ours), dict(self.torch))  # pytest shows it of a test that fails
        self.ours.clear()
        self.torch.clear()
        return counts


def emulated(counting, name, func, args):
    """The CUDA kernel of a schema on copies in guarded memory, which are not counted.

    Nor is a pass that CUDA has no kernel of: Triton's are counted below.
    """
    on_the_cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    if not emulation.has_kernel(name):
        with nullcontext() if name in _library.COMPOSITES else _disable_current_modes():
            return func.redispatch(on_the_cpu, *args)
    module = emulation.load()
    operator = getattr(torch.ops.ovseg_emulated, name).default
    with _disable_current_modes():
        given = [emulation.guarded(x) if isinstance(x, torch.Tensor) else x for x in args]
    module.take_launches()
    out = operator.redispatch(on_the_cpu, *given)
    counting.ours.update(module.take_launches())
    with _disable_current_modes():
        return tuple(x.clone() for x in out) if isinstance(out, tuple) else out.clone()


def launched(counting, name, func, args):
    """Triton's launcher, or the composite of torch calls."""
    if name in KERNELS:
        return IMPLEMENTATIONS[name](*args)
    return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args)


def features_in_16_bits(sample):
    return [
        (x.detach().half() if i < sample.features else x.detach()).requires_grad_(x.requires_grad)
        for i, x in enumerate(sample.tensors)
    ]


def count(sample, counting, gradients):
    """(ours, torch's) of a forward, and of a backward where there is one."""
    tensors = features_in_16_bits(sample)
    sample.call(*tensors)  # makes what is made once, as the memory of flags
    with counting:
        out = sample.call(*tensors)
        found = [counting.take()]
    if not sample.discrete:
        with counting:
            gradients(out, tensors)
            found.append(counting.take())
    return tuple(found)


@pytest.mark.parametrize("op", [op for op in MAKERS if has(op, "cuda")])
def test_kernels_of_a_call_on_cuda(op, monkeypatch):
    """Numbers are not looked at, and checks are left to the device, as they are on a GPU."""
    emulation.load().set_seed(0)
    monkeypatch.setattr(_checking, "looks_at_values", lambda x: False)
    monkeypatch.setattr(_checking, "defers", lambda x: True)
    monkeypatch.setattr(_checking, "capturing", lambda: False)
    monkeypatch.setattr(_checking, "_flags", {})
    monkeypatch.setattr(_checking._Flags, "send", lambda flags: None)

    def gradients(out, tensors):
        torch.autograd.grad(out, tensors, torch.ones_like(out), allow_unused=True)

    sample = MAKERS[op](torch.float32)[0]
    assert count(sample, Count(emulated), gradients) == LAUNCHES[op, "cuda"]


@pytest.mark.filterwarnings("ignore:.*data pointer")  # launchers look at its alignment
@pytest.mark.filterwarnings("ignore:.*runs on the reference for cuda")
@pytest.mark.parametrize("op", [op for op in MAKERS if has(op, "triton")])
def test_kernels_of_a_call_on_triton(op, monkeypatch):
    counting = Count(launched)

    def launch(kernel, *arguments, **options):
        counting.ours[kernel.fn.__name__] += 1

    if _backends.interpreted():
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    else:
        from triton.runtime.jit import JITFunction

        monkeypatch.setattr(JITFunction, "run", launch)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    h100 = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=227 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100)
    with unreadable_device(monkeypatch):
        sample = MAKERS[op](torch.float32, "cuda")[0]
        found = count(sample, counting, lambda out, tensors: backward(out))
    assert found == LAUNCHES[op, "triton"]
