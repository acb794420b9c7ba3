"""``--device``, ``--dtype`` and ``--compile`` of every command that runs a model: where it runs, in which numbers, and how."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", default="auto",
                     help="auto (a GPU where there is one), cpu, cuda, cuda:1; of several processes each takes the GPU of its local rank")
    sub.add_argument("--dtype", default="auto", choices=DTYPES, help="of the model; auto: half precision on a GPU, float32 on the CPU")
    sub.add_argument("--compile", action="store_true", help="torch.compile the model: slow at first, then faster where shapes repeat")


def device_of(options: argparse.Namespace) -> torch.device:
    from .. import distributed

    return distributed.device(options.device)


def dtype_of(options: argparse.Namespace, device: torch.device) -> torch.dtype:
    """What ``--dtype`` says; ``auto`` is bfloat16 on a GPU that has it, float16 on others, float32 on the CPU."""
    import torch

    if options.dtype != "auto":
        return getattr(torch, options.dtype)
    if device.type != "cuda":
        return torch.float32
    # Emulated bfloat16 (before Ampere) is slower than float16.
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def to_device(model: Any, options: argparse.Namespace, *, quiet: bool = False) -> Any:
    """The model on its device in its dtype, which is printed unless that is float32 on the CPU."""
    import torch

    device = device_of(options)
    dtype = dtype_of(options, device)
    if not quiet and (device.type, dtype) != ("cpu", torch.float32):
        print(f"{model.name} runs on {device} in {str(dtype).removeprefix('torch.')}; --device and --dtype change that", file=sys.stderr)
    model = model.to(device, dtype)
    if options.compile:
        model.compile()  # in place: it keeps its name, options and methods
    return model
