"""Wheels for the tests: built, unpacked, and tried where nothing else of the project is seen."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

SMOKE = (
    "import torch, ovseg_kernels as ok; x = ok.patch_text_similarity(torch.randn(2, 3, 4, "
    "requires_grad=True), torch.randn(5, 4));"
    "x.sum().backward(); print(ok.__file__); print(ok.explain('patch_text_similarity').backend)"
)


def python(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def smoke(target, **environment):
    """Import from ``target`` alone, though the checkout is installed in this environment too."""
    path, backend = python(
        "-W",
        "ignore",
        "-c",
        f"import sys; sys.path.insert(0, {str(target)!r}); {SMOKE}",
        **environment,
    ).split()
    assert Path(path).is_relative_to(target)
    return backend


def install(source, out, **environment):
    """(wheel, folder with its files) of an sdist or a checkout."""
    python(
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(out),
        str(source),
        **environment,
    )
    wheel = next(out.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return wheel, out / "site"
