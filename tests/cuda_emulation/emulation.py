"""Builds and loads the emulation, and lets the CUDA kernels answer for CPU tensors through it."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ovseg_kernels import _library

ROOT = Path(__file__).parents[2]


def cmake(build: Path, *options: str, targets: tuple[str, ...] = ()) -> str:
    """Configure and build; returns what the compilers printed. Raises RuntimeError with the end of it."""
    program = shutil.which("cmake") or str(Path(sys.executable).with_name("cmake"))
    torch_root = Path(torch.__file__).parent
    common = [f"-DOVSEG_TORCH_INCLUDE={torch_root / 'include'}", f"-DOVSEG_TORCH_LIB={torch_root / 'lib'}", f"-DOVSEG_OUTPUT={build / 'lib'}"]
    generator = ["-G", "Ninja"] if shutil.which("ninja") or Path(sys.executable).with_name("ninja").exists() else []
    if generator and not shutil.which("ninja"):
        common.append(f"-DCMAKE_MAKE_PROGRAM={Path(sys.executable).with_name('ninja')}")
    build.mkdir(parents=True, exist_ok=True)
    for command in (
        [program, "-S", str(ROOT), "-B", str(build), *generator, *common, *options],
        [program, "--build", str(build), "--parallel", "2", *(f"--target={t}" for t in targets), *(["--verbose"] if targets else [])],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[:4])} failed:\n{(done.stdout + done.stderr)[-6000:]}")
    return done.stdout + done.stderr


@functools.cache
def load():
    """The compiled module; built once into build/emulation, again only when a source has changed."""
    import pybind11

    build = ROOT / "build" / "emulation"
    cmake(build, "-DOVSEG_CPU=OFF", "-DOVSEG_EMULATION=ON", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
          f"-DPython_EXECUTABLE={sys.executable}")
    (path,) = (build / "lib").glob("ovseg_cuda_emulation*.so")
    library = torch.library.Library("ovseg_emulated", "DEF")
    for schema in _library.SCHEMAS.values():
        library.define(schema)
    spec = importlib.util.spec_from_file_location("ovseg_cuda_emulation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.library = library  # the schemas live as long as the module
    return module


def guarded(x: torch.Tensor) -> torch.Tensor:
    """A copy of ``x``, strides and all, in memory that ends where the tensor ends."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    memory = torch.from_numpy(load().allocate(extent * x.element_size()))
    copy = memory.view(x.dtype).as_strided(x.shape, x.stride()) if extent else x.clone()
    if extent:
        copy.copy_(x) if 0 not in x.stride() else memory.view(x.dtype).copy_(x.as_strided((extent,), (1,)))
    return copy


def has_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"ovseg_emulated::{name}", "CPU")


def _call(name: str, *args):
    module = load()
    try:
        plain = [guarded(x) if isinstance(x, torch.Tensor) else x for x in args]
        out = getattr(torch.ops.ovseg_emulated, name)(*plain)
        return tuple(x.clone() for x in out) if isinstance(out, tuple) else out.clone()
    finally:
        out = plain = None
        module.release_all()


@contextlib.contextmanager
def emulated_cuda(seed: int = 0) -> Iterator[None]:
    """CUDA kernels answer for CPU tensors; ``seed`` orders the threads."""
    module = load()
    module.set_seed(seed)
    names = [name for name in _library.SCHEMAS if has_kernel(name)]
    with _library.overriding({name: functools.partial(_call, name) for name in names}, ("CPU",)):
        yield
