"""Facts about the native libraries: what they were built from and for.

Imports neither torch nor this package: setup.py runs this file alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
LIBRARIES = ("_C_cpu.so", "_C_cuda.so")


def build_info() -> dict[str, Any]:
    """Return what setup.py wrote when it built the native part; empty if it did not."""
    path = FOLDER / "build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


def source_hash(root: Path) -> str:
    """Return the hash of everything that the native build reads.

    Empty where the sources are not there, as in an installed package.
    """
    files = sorted(
        p for p in (root / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")
    )
    if not files:
        return ""
    digest = hashlib.sha256()
    for path in [root / "CMakeLists.txt", *files]:
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and hash of each library in ``folder``.

    By them build_info.json can be held to the file beside it.
    """
    found = {}
    for path in (folder / name for name in LIBRARIES):
        if path.exists():
            found[path.name] = {
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
            }
    return found


def libc() -> str:
    """Return the C library of this machine: a library built with a newer one may not load."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError, AttributeError):
        return ""


def described(name: str, info: dict[str, Any]) -> bool:
    """Return whether ``info`` is about the file that lies there.

    Told by its size, which costs nothing.
    """
    path, record = FOLDER / name, info.get("libraries", {}).get(name)
    return path.exists() and record is not None and record["bytes"] == path.stat().st_size


def cuda_archs() -> list[str]:
    """Return the architectures of the CUDA library.

    Empty where build_info.json is about another file, and the launch itself must tell.
    """
    info = build_info()
    return info.get("cuda_archs", []) if described("_C_cuda.so", info) else []


def stale(names: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Return, for each library, the reason why it is not known to be this checkout's code."""
    info, here, found = build_info(), source_hash(FOLDER.parent), {}
    there = records(FOLDER)
    for name in names:
        if name not in there:
            found[name] = "not built"
        elif info.get("libraries", {}).get(name) != there[name]:
            found[name] = (
                "build_info.json is about another file: sources and architectures are unknown"
            )
        elif here and info.get("source") != here:
            found[name] = (
                f"built from other sources ({info.get('source', 'unknown')}; this checkout is "
                f"{here})"
            )
    return found
