"""From the host to the device without waiting for it."""

from __future__ import annotations

import torch


def upload(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``x`` on the device. A GPU copies from pinned memory while the host goes on; any other memory of the host makes it wait."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
