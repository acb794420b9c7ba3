"""A new operator, as CONTRIBUTING.md says that one is added: its files beside those of the others,
a line in each list, and the contract tests run on it. ``new_operator`` holds the files: those of
steps 1 to 5, with a kernel for the CPU.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from native_build import ROOT, cmake

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).with_name("new_operator")
SAMPLES = """

def patch_entropy(dtype=torch.float64, device="cpu") -> list[Sample]:
    torch.manual_seed(12)
    scores = leaf(3, 7, dtype=dtype, device=device)
    low = [
        ("patch_entropy", (scores,)),
        ("patch_entropy_backward", (torch.randn(3).to(scores), scores.detach())),
    ]
    return [Sample("patch_entropy", "plain", ok.patch_entropy, (scores,), low)]


MAKERS["patch_entropy"] = patch_entropy
RESIZED["patch_entropy"] = lambda size: (ok.patch_entropy, (torch.randn(size, 5),))
"""
BAD_INPUT = r"""
BAD_INPUT["patch_entropy"] = (
    {"scores": torch.randn(2, 5)},
    [
        ({"scores": torch.randn(5)}, ValueError, r"scores has shape \[5\]; expected 2 dimensions"),
        ({"scores": torch.randn(2, 0)}, ValueError, "expected at least one patch"),
        ({"scores": torch.ones(2, 5, dtype=torch.int64)}, TypeError, "scores has dtype int64"),
    ],
)
"""


def change(path, *changes):
    """Replace each pattern, which must be there once."""
    text = path.read_text()
    for pattern, replacement in changes:
        text, count = re.subn(pattern, replacement, text, flags=re.DOTALL)
        assert count == 1, (path, pattern, count)
    path.write_text(text)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the tree with the operator, the only one of which kernels are compiled there."""
    copy = tmp_path_factory.mktemp("new_operator")
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "build_info.json", "golden")
    for name in ("ovseg_kernels", "csrc", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=left_out)
    for name in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(EXAMPLE, copy, dirs_exist_ok=True)
    change(
        copy / "ovseg_kernels" / "__init__.py",
        ("(?=from .ops.patch_text)", "from .ops.patch_entropy import patch_entropy\n"),
        (r"(?<=OPERATORS = \()", '\n    "patch_entropy",'),
        (r"(?<=__all__ = \[)", '\n    "patch_entropy",'),
    )
    change(
        copy / "CMakeLists.txt",
        (r"set\(OVSEG_OPS .*?\)", "set(OVSEG_OPS patch_entropy)"),
        (r"set\(OVSEG_PER_ISA .*?\)", "set(OVSEG_PER_ISA patch_entropy)"),
    )
    for name, lines in (("samples.py", SAMPLES), ("bad_input.py", BAD_INPUT)):
        with open(copy / "tests" / "ops" / name, "a") as file:
            file.write(lines)
    cmake(copy / "build", source=copy)
    shutil.copy(copy / "build" / "lib" / "_C_cpu.so", copy / "ovseg_kernels")
    return copy


def pytest_in(copy, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = (sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    return subprocess.run(
        [*command, "-n", "0", *arguments],
        capture_output=True,
        text=True,
        cwd=copy,
        env=environment,
    ).stdout


def test_the_contract_holds_for_it(copy):
    """Gradients, opcheck, the error rule in four dtypes, compile, export, autocast, threads, meta
    tensors and refusals, on its CPU kernel and its closed form.
    """
    of_it = "patch_entropy and not emulated and not triton and not definition"
    said = pytest_in(copy, "tests/ops/test_contract.py", "-k", of_it)
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed.group(1)) >= 14 and "failed" not in said, said


def test_a_wrong_kernel_is_noticed(copy):
    """Half of the gradient's second term left out: the error rule and gradcheck say so."""
    source = copy / "csrc" / "patch_entropy" / "patch_entropy_cpu.cpp"
    right = source.read_text()
    library = copy / "ovseg_kernels" / "_C_cpu.so"
    try:
        change(source, (r"\(log_p \+ softmax\.entropy\)", "(log_p + softmax.entropy / 2)"))
        cmake(copy / "build", source=copy)
        library.unlink()  # another process may have it mapped
        shutil.copy(copy / "build" / "lib" / "_C_cpu.so", library)
        said = pytest_in(copy, "tests/ops/test_contract.py", "-k", "patch_entropy and cpu")
        assert "test_error_rule[patch_entropy" in said and "test_gradcheck[patch_entropy" in said
    finally:
        source.write_text(right)
