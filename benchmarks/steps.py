"""A training step's loss made in two ways, ``ours`` and ``eager``.

How far they agree, their times turn by turn, and their memory. Parts are a dict of both, functions
without arguments that give the loss, and of the ``leaves`` whose gradients are taken.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ovseg.progress import bar

from .run import _status

WAYS = ("ours", "eager")
Parts = dict[str, Any]


def step_values(parts: Parts) -> dict[str, float]:
    """Return the losses, and how far the gradients are apart."""
    losses = {way: parts[way]() for way in WAYS}
    ours, eager = (torch.autograd.grad(loss, parts["leaves"]) for loss in losses.values())
    # A smaller gradient is 0 in theory.
    worst = max(
        float((a - b).norm() / b.norm())
        for a, b in zip(ours, eager, strict=True)
        if float(b.norm()) > 1e-5
    )
    return {
        **{way: loss.item() for way, loss in losses.items()},
        "largest relative difference of a gradient": worst,
    }


def step_times(parts: Parts, repeats: int) -> dict[str, Any]:
    """Return the times of forward and backward, alternating, the first turn left out."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in bar(range(repeats + 1), unit="turn", desc="times of a step", leave=False):
        for way, values in times.items():
            start = time.perf_counter()
            torch.autograd.grad(parts[way](), parts["leaves"])
            if turn:
                values.append(time.perf_counter() - start)
    ratio = np.array(times["ours"]) / np.array(times["eager"])
    return {
        **{f"{way} ms": round(1e3 * float(np.median(values)), 1) for way, values in times.items()},
        "ratio": round(float(np.median(ratio)), 4),
        "ratio p20-p80": np.percentile(ratio, (20, 80)).round(4).tolist(),
        "repeats": repeats,
    }


def step_memory(small: Parts, parts: Parts, way: str) -> float:
    """Return MiB by which the peak of a forward and backward lies above what was there before.

    ``small`` loads the libraries.
    """
    for some in (small, parts):
        for x in some["leaves"]:
            x.grad = torch.zeros_like(x)  # gradients exist
    small[way]().backward()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    parts[way]().backward()
    return (_status("VmHWM") - before) / 1024


def memory_of_both(module: str, repeats: int) -> dict[str, Any]:
    """Return ``training_memory(way)`` of ``module``, alternating.

    Each time in a process of its own: an allocator keeps some MiB more or less.
    """
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in bar(range(repeats), unit="turn", desc="memory of a step", leave=False):
        for way, values in found.items():
            code = f"from {module} import training_memory; print(training_memory({way!r}))"
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            )
            values.append(float(done.stdout.splitlines()[-1]))
    ratio = np.array(found["ours"]) / np.array(found["eager"])
    least, most = (round(float(x), 4) for x in (ratio.min(), ratio.max()))
    return {
        **{f"{way} extra MiB": round(float(np.median(values)), 1) for way, values in found.items()},
        "ratio of memory": round(float(np.median(ratio)), 4),
        "ratio of memory, least and most": [least, most],
    }
