"""python -m ovseg_kernels.info: what was built, for what, what loaded, and why not.

``python -m ovseg_kernels.info --ready`` has exit status 0 if both native libraries are this
checkout's code, load, and run on this GPU.
"""

from __future__ import annotations

import argparse
import platform

import torch

from . import OPERATORS, __version__, _build, _selection, available_backends
from . import _library as lib
from ._backends import forced, select, unsupported


def report() -> str:
    """Return the facts as text."""
    lines = [
        f"ovseg_kernels {__version__}",
        f"  python           {platform.python_version()} on {platform.machine()}, {_build.libc()}",
    ]
    lines.append(
        f"  torch            {torch.__version__}, CUDA {torch.version.cuda or 'none'}, "
        f"{torch.get_num_threads()} threads"
    )
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            lines.append(f"  device {i}         {torch.cuda.get_device_name(i)}, sm_{major}{minor}")
    else:
        lines.append("  device           no GPU is visible to torch")
    lines.append("built")
    built = _build.build_info()
    lines += [
        f"  {key:16} {', '.join(value) if isinstance(value, list) else value}"
        for key, value in built.items()
        if key != "libraries"
    ]
    if not built:
        lines.append(
            "  nothing: no native library was built (no compiler, or OVSEG_BUILD_NATIVE=0)"
        )
    lines.append("libraries")
    stale = _build.stale()
    for name, native in (("_C_cpu.so", lib.CPU), ("_C_cuda.so", lib.CUDA)):
        size = f"{native.path.stat().st_size / 2**20:.1f} MiB, " if native.path.exists() else ""
        # Of an installed package the sources are not there to compare with: nothing is claimed
        # about them.
        checkout = bool(_build.source_hash(_build.FOLDER.parent))
        origin = stale.get(name) or (
            f"built from this checkout ({built['source']})"
            if checkout
            else "as build_info.json says"
        )
        lines.append(
            f"  {name:16} {size}{origin}; "
            f"{'loaded' if native.loaded else f'not loaded: {native.reason}'}"
        )
    lines.append("backends")
    lines += [f"  {name:16} {state}" for name, state in available_backends().items()]
    lines.append(
        f"  forced           {forced()}"
        if forced() != "auto"
        else "  forced           none (OVSEG_BACKEND)"
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines.append(f"operators on {device.type}")
    lines += [f"  {select(op, device)}".replace("\n", "\n  ") for op in OPERATORS]
    if device.type == "cpu":
        lines += _on_a_gpu()
    return "\n".join(lines)


def _on_a_gpu(capability: tuple[int, int] = (9, 0)) -> list[str]:
    """Return what the table of backends says of a GPU that is not here."""
    lines = [f"the same on a GPU of sm_{capability[0]}{capability[1]}, best first"]
    for name in _selection.TABLE:
        rule = _selection.rule(name, capability)
        lines.append(f"  {name}: {', '.join(rule.order)}: {rule.why}")
    return lines


def problems() -> list[str]:
    """Return why the native libraries cannot be used on this machine as they are.

    Empty if they can, wherever they were built.
    """
    found = [f"{name}: {reason}" for name, reason in _build.stale().items()]
    for native in (lib.CPU, lib.CUDA):
        if native.path.exists() and not native.loaded:
            found.append(f"{native.path.name}: {native.reason}")
    if not torch.cuda.is_available():
        return [*found, "no GPU is visible to torch"]
    if not found and (
        reason := unsupported(_build.cuda_archs(), torch.cuda.get_device_capability())
    ):
        found.append(f"_C_cuda.so: {reason}")
    return found


def main() -> int:
    """Print the report, or answer ``--ready``; return the exit status."""
    arguments = argparse.ArgumentParser(
        description="What was built, for what, what loaded, and why not."
    )
    arguments.add_argument(
        "--ready",
        action="store_true",
        help="one line, and exit status 1 if the libraries cannot be used as they are",
    )
    if not arguments.parse_args().ready:
        print(report())
        return 0
    if reasons := problems():
        print("; ".join(reasons))
        return 1
    built = _build.build_info()
    print(
        f"prebuilt libraries accepted: source {built['source']}, "
        f"sm_{', sm_'.join(built['cuda_archs'])}, "
        f"built with torch {built['torch']}, {built['compiler']}, {built['cuda']}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
