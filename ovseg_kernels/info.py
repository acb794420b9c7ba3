"""python -m ovseg_kernels.info: what was built, for what, what loaded, and why not."""

from __future__ import annotations

import platform

import torch

from . import OPERATORS, __version__, available_backends, explain
from ._backends import _forced
from ._library import build_info


def report() -> str:
    """The facts as text."""
    lines = [f"ovseg_kernels {__version__}", f"  python           {platform.python_version()} on {platform.machine()}"]
    lines.append(f"  torch            {torch.__version__}, CUDA {torch.version.cuda or 'none'}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            lines.append(f"  device {i}         {torch.cuda.get_device_name(i)}, sm_{major}{minor}")
    else:
        lines.append("  device           no GPU is visible to torch")
    lines.append("built")
    built = build_info()
    lines += [f"  {key:16} {', '.join(value) if isinstance(value, list) else value}" for key, value in built.items()]
    if not built:
        lines.append("  nothing: no native library was built (no compiler, or OVSEG_BUILD_NATIVE=0)")
    lines.append("backends")
    lines += [f"  {name:16} {state}" for name, state in available_backends().items()]
    lines.append(f"  forced           {_forced}" if _forced != "auto" else "  forced           none (OVSEG_BACKEND)")
    lines.append("operators")
    lines += [f"  {explain(op)}".replace("\n", "\n  ") for op in OPERATORS]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
