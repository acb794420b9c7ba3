"""Counts the Triton specialisations that the tests need on a GPU, on a machine without one: what
`gpu_check.sh test` has to compile.

    python tests/packaging/triton_count.py [options of pytest]

A script and not a test: the interpreter, which the tests switch on, replaces the kernels when they
are defined. The tests of the backend `triton` run on CPU tensors; their launchers are called, every
launch is noted by the key that Triton itself would compile for, and the closed form computes what
the test looks at. Prints one JSON object.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "0"  # tests/conftest.py would switch it on

import pytest
import torch
from torch import library
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

OPS = Path(__file__).parents[1] / "ops"
CHUNK = 4  # as scripts/gpu_pytest.py deals tests out
BACKEND = make_backend(GPUTarget("cuda", 90, 32))
binders: dict[str, object] = {}
found: dict[tuple[str, str], str] = {}  # (kernel, key) -> the test that needs it first
shards: dict[int, set] = defaultdict(set)  # of 14 processes -> what its tests need
order: dict[str, int] = {}
broken: set[str] = set()
test = ""


def note(kernel: JITFunction, *args, grid, warmup, **kwargs):
    """In place of a launch."""
    name = kernel.__name__
    if name not in binders:
        binders[name] = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    _, specialization, options = binders[name](*args, **kwargs)
    key = name, f"{specialization} {options}"
    found.setdefault(key, test)
    shards[order[test] // CHUNK % 14].add(key)


def launcher_and_closed_form(name: str):
    """The launcher, for its launches, and then what answers where no kernel is built."""
    from ovseg_kernels import _library
    from ovseg_kernels.triton import IMPLEMENTATIONS

    def call(*args):
        IMPLEMENTATIONS[name](*args)
        return _library.FALLBACKS[name](*args)

    return call


class Stand:
    """Lets the tests of the backend `triton` run here."""

    def pytest_configure(self, config):
        sys.path.insert(0, str(OPS))
        import backends

        from ovseg_kernels import _library
        from ovseg_kernels.triton import KERNELS

        JITFunction.run = note
        real, answers = (
            backends.running_on,
            {name: launcher_and_closed_form(name) for name in KERNELS},
        )

        @contextlib.contextmanager
        def running_on(name: str, seed: int = 0):
            with _library.overriding(answers, ("CPU",)) if name == "triton" else real(name, seed):
                yield

        backends.running_on, backends.device_of = running_on, lambda name: "cpu"
        # One call each: the same launches in a tenth of the time. What these would find out is not
        # asked here.
        torch.autograd.gradcheck = lambda function, inputs, **_: [
            torch.autograd.grad(function(*inputs).sum(), inputs),
            True,
        ][-1]
        library.opcheck = lambda operator, arguments, **_: operator(*arguments)
        torch.compile = lambda function, **_: function
        torch.export.export = lambda module, *_: SimpleNamespace(
            module=lambda: module, graph_module=torch.nn.Module()
        )
        torch.cuda.synchronize = torch.cuda.set_sync_debug_mode = lambda *_: None
        torch.set_num_threads(1)
        torch.testing.assert_close = lambda *_, **__: None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items, config):
        mine = [
            item
            for item in items
            if "gpu" in item.keywords
            and getattr(item, "callspec", None)
            and item.callspec.params.get("backend") == "triton"
        ]
        config.hook.pytest_deselected(items=[item for item in items if item not in mine])
        items[:] = mine
        order.update({item.nodeid.split("/")[-1]: i for i, item in enumerate(mine)})

    def pytest_runtest_logreport(self, report):
        if report.failed:
            broken.add(report.nodeid.split("/")[-1].split("[")[0])

    def pytest_runtest_setup(self, item):
        global test
        test = item.nodeid.split("/")[-1]


def main() -> None:
    options = ["--every-gpu-case", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=line"]
    pytest.main([str(OPS), *sys.argv[1:], *options], plugins=[Stand()])
    for (name, key), needed_by in sorted(found.items()):
        print(name, needed_by, key)
    print(
        json.dumps(
            {
                "broken": sorted(broken),
                "specialisations": len(found),
                "of_the_largest_shard": max(map(len, shards.values())),
                "by_kernel": Counter(name for name, _ in found),
                "by_test": Counter(t.split("[")[0] for t in found.values()),
            }
        )
    )


if __name__ == "__main__":
    main()
