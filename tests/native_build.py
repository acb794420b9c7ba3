"""Runs the project's CMake build into build/<name>, for tests that look at what the compilers made."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def cmake(
    build: Path, *options: str, source: Path = ROOT, target: str = "all", jobs: int = 2
) -> str:
    """Configure and build; returns what the compilers printed.

    Raises RuntimeError with the end of it.
    """
    program = shutil.which("cmake") or str(Path(sys.executable).with_name("cmake"))
    torch_root = Path(torch.__file__).parent
    common = [f"-DOVSEG_TORCH_INCLUDE={torch_root / 'include'}"]
    common += [f"-DOVSEG_TORCH_LIB={torch_root / 'lib'}", f"-DOVSEG_OUTPUT={build / 'lib'}"]
    generator = (
        ["-G", "Ninja"]
        if shutil.which("ninja") or Path(sys.executable).with_name("ninja").exists()
        else []
    )
    if generator and not shutil.which("ninja"):
        common.append(f"-DCMAKE_MAKE_PROGRAM={Path(sys.executable).with_name('ninja')}")
    build.mkdir(parents=True, exist_ok=True)
    with open(build.with_suffix(".lock"), "w") as lock:
        fcntl.flock(
            lock, fcntl.LOCK_EX
        )  # several processes run the tests, and each wants this build
        for command in (
            [program, "-S", str(source), "-B", str(build), *generator, *common, *options],
            [program, "--build", str(build), "--parallel", str(jobs), "--target", target],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(
                    f"{' '.join(command[:4])} failed:\n{(done.stdout + done.stderr)[-6000:]}"
                )
    return done.stdout + done.stderr
