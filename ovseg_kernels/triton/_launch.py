"""What the launchers share: the device of a call, chunks of images, and the grid."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

ACC = {torch.float32: tl.float32, torch.float64: tl.float64}


def on_device(x: torch.Tensor):
    """Triton launches on the current device; the tensors may be on another."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def tiles(count: int, size: int) -> int:
    return triton.cdiv(count, size)


def chunk_size(images: int, bytes_per_image: int, limit: int) -> int:
    """Images at a time, so that what lies between two kernels stays near ``limit`` bytes."""
    return max(1, min(images, limit // max(1, bytes_per_image), 65535))
