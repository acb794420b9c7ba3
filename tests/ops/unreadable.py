"""A device that refuses to be read, without a GPU.

Inside ``unreadable_device(...) as refusing`` tensors of torch's FakeTensorMode can be made on
"cuda". They have no numbers: whatever needs one (item, bool, tolist, equal, nonzero, a mask as an
index) raises. Inside ``with refusing:`` so do copies between host and device, unless they come from
pinned memory: all others wait for the GPU.
"""

import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ovseg_kernels import _checking

aten = torch.ops.aten


class Refused(AssertionError):
    pass


class _Copies(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.pinned = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._pin_memory.default:
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (aten._to_copy, aten.copy_):
            source, target = (
                (args[1], args[0]) if func.overloadpacket is aten.copy_ else (args[0], out)
            )
            free = any(source is x for x in self.pinned) and (kwargs or {}).get(
                "non_blocking", False
            )
            if source.device != target.device and not free:
                raise Refused(
                    f"a copy of {list(source.shape)} from {source.device} to {target.device}"
                )
        return out


@contextlib.contextmanager
def unreadable_device(monkeypatch):
    """``monkeypatch``: what would ask CUDA itself is answered for it."""
    monkeypatch.setattr(_checking, "_flags", {})
    monkeypatch.setattr(
        _checking._Flags, "send", lambda flags: None
    )  # makes an event, which needs a GPU; it has a test of its own
    monkeypatch.setattr(_checking, "capturing", lambda: False)
    monkeypatch.setattr(_checking, "defers", lambda x: x.device.type == "cuda")  # fake tensors too
    with FakeTensorMode():
        yield _Copies()


def backward(out):
    """Run every node behind ``out`` once, as autograd's engine would, which asks for a real GPU.

    Returns how many leaves got a gradient.
    """
    order, seen = [], set()

    def visit(node):
        if node is not None and node not in seen:
            seen.add(node)
            for behind, _ in node.next_functions:
                visit(behind)
            order.append(node)

    visit(out.grad_fn)
    grads = {out.grad_fn: {out.output_nr: torch.ones_like(out)}}
    leaves = 0
    for node in reversed(order):
        if node not in grads:
            continue
        if "AccumulateGrad" in node.name():
            leaves += 1
            continue
        given = (grads[node].get(i) for i in range(len(node._input_metadata)))
        found = node.apply(*given) if hasattr(node, "apply") else node(*given)
        found, ahead = found if isinstance(found, tuple) else (found,), node.next_functions
        if hasattr(
            node, "needs_input_grad"
        ):  # a function in Python answers for arguments that are no tensors, too
            found = [
                grad for grad, needed in zip(found, node.needs_input_grad, strict=True) if needed
            ]
            ahead = [place for place in ahead if place[0] is not None]
        for (behind, place), grad in zip(ahead, found, strict=True):
            if behind is not None and grad is not None:
                grad = grad.sum_to_size(behind._input_metadata[place].shape)
                into = grads.setdefault(behind, {})
                into[place] = grad if place not in into else into[place] + grad
    return leaves
