"""Builds and loads the emulation, and lets the CUDA kernels answer for CPU tensors through it."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterator

import torch
from native_build import ROOT, cmake
from torch import library as torch_library

from ovseg_kernels import _library


@functools.cache
def load():
    """The compiled module; built once into build/emulation, again only when a source has changed."""
    import pybind11

    build = ROOT / "build" / "emulation"
    cmake(
        build,
        "-DOVSEG_CPU=OFF",
        "-DOVSEG_EMULATION=ON",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    )
    (path,) = (build / "lib").glob("ovseg_cuda_emulation*.so")
    schemas = torch_library.Library("ovseg_emulated", "DEF")
    for schema in _library.SCHEMAS.values():
        schemas.define(schema)
    spec = importlib.util.spec_from_file_location("ovseg_cuda_emulation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.schemas = schemas  # they live as long as the module
    return module


def guarded(x: torch.Tensor) -> torch.Tensor:
    """A copy of ``x``, strides and all, in memory that ends where the tensor ends."""
    extent = (
        1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        if x.numel()
        else 0
    )
    if extent > 2**28:
        return x  # a view that spans gigabytes stays where it is
    memory = torch.from_numpy(load().allocate(extent * x.element_size()))
    copy = memory.view(x.dtype).as_strided(x.shape, x.stride()) if extent else x.clone()
    if extent:
        copy.copy_(x) if 0 not in x.stride() else memory.view(x.dtype).copy_(
            x.as_strided((extent,), (1,))
        )
    return copy


def has_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"ovseg_emulated::{name}", "CPU")


def _place(x: torch.Tensor) -> tuple:
    """Return the identity of a tensor's memory, which it keeps when saved for a backward."""
    return x.data_ptr(), x.dtype, x.shape, x.stride()


def _call(name: str, *args):
    module = load()
    try:
        # A tensor that comes twice stays one: kernels look at addresses.
        memory = {_place(x): guarded(x) for x in args if isinstance(x, torch.Tensor)}
        plain = [memory[_place(x)] if isinstance(x, torch.Tensor) else x for x in args]
        op = getattr(torch.ops.ovseg_emulated, name).default
        out = op(*plain)
        for argument, x, copy in zip(op._schema.arguments, args, plain, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                x.copy_(copy)
        return tuple(x.clone() for x in out) if isinstance(out, tuple) else out.clone()
    finally:
        out = plain = copy = memory = None
        module.release_all()


@contextlib.contextmanager
def emulated_cuda(seed: int = 0) -> Iterator[None]:
    """CUDA kernels answer for CPU tensors; ``seed`` orders the threads."""
    module = load()
    module.set_seed(seed)
    names = [name for name in _library.SCHEMAS if has_kernel(name)]
    with _library.overriding({name: functools.partial(_call, name) for name in names}, ("CPU",)):
        yield
