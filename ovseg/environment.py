"""The environment that a result was made in, for the files beside it."""

from __future__ import annotations

import platform
from typing import Any

import torch

from ovseg_kernels import __version__


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return versions, device and threads."""
    device = torch.device(device)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "ovseg": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
    }
