"""What a user installs: sdist, wheel, an install without a compiler, the binary's ABI, cheap imports, short files."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile

import pytest
from native_build import ROOT, cmake
from wheels import install, python, smoke


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    python("-m", "build", "--sdist", "--no-isolation", "--outdir", str(out), str(ROOT))
    return next(out.glob("*.tar.gz"))


@pytest.mark.slow
def test_wheel_from_the_sdist_beside_a_failing_nvcc(sdist, tmp_path):
    """A header that MANIFEST.in forgets shows here. An nvcc that cannot compile leaves the CPU kernels, unless CUDA was asked for."""
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"CMakeLists.txt", "LICENSE", "csrc/common/gemm.h", "constraints.txt"} <= names
    assert not any(name.endswith((".so", "build_info.json")) for name in names)
    (tmp_path / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "nvcc").chmod(0o755)
    broken = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "CUDACXX": str(tmp_path / "nvcc")}
    wheel, site = install(sdist, tmp_path / "out", OVSEG_BUILD_NATIVE="", FORCE_CUDA="", **broken)
    assert "-py3-none-linux" in wheel.name or "-py3-none-macosx" in wheel.name
    assert smoke(site) == "cpu" and not (site / "ovseg_kernels" / "_C_cuda.so").exists()
    info = json.loads((site / "ovseg_kernels" / "build_info.json").read_text())
    assert info["torch_floor"] == "2.10" and info["cuda"] == "off"
    assert (site / "ovseg" / "training" / "recipes" / "pacl_scenes.yaml").exists()
    assert (site / "ovseg" / "data" / "entity_lists" / "everyday.yaml").exists()
    assert len(list((site / "ovseg" / "checkpoints" / "bundled").glob("*/model.safetensors"))) >= 2
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(tmp_path / "no"), str(sdist)]
    asked = {**os.environ, **broken, "OVSEG_BUILD_NATIVE": "1", "FORCE_CUDA": "1"}
    assert subprocess.run(command, capture_output=True, env=asked, check=False).returncode != 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of binutils")
def test_no_function_of_one_instruction_set_answers_for_another():
    """A weak symbol outside its namespace would be one copy for all: perhaps the one compiled for AVX-512."""
    objects = list((ROOT / "build").glob("temp.*/cmake/**/*_cpu.cpp.o"))  # of the install
    if not objects:
        cmake(ROOT / "build" / "objects")
        objects = list((ROOT / "build" / "objects").rglob("*_cpu.cpp.o"))
    assert len(objects) >= 20
    for path in objects:
        symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        weak = [line for line in symbols.splitlines() if re.search(r" [WVu] ", line)]
        outside = [line for line in weak if not re.search(r"ovseg::(baseline|avx2|avx512)::", line)]
        if "similarity_contrastive_loss" not in str(path) or "_avx" in str(path):  # that one is compiled once
            assert not outside, (path, outside)


@pytest.mark.slow
def test_install_without_any_compiler(sdist, tmp_path):
    """No cmake, no compiler: the build goes on, and the reference answers with a warning."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("uname", "sh"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    _, site = install(sdist, tmp_path, PATH=str(tools), OVSEG_BUILD_NATIVE="", CC="false", CXX="false")
    assert not list((site / "ovseg_kernels").glob("*.so"))
    assert smoke(site) == "reference"
    info = python("-W", "ignore", "-c", f"import sys; sys.path.insert(0, {str(site)!r}); import ovseg_kernels.info as i; print(i.report())")
    assert "not built (_C_cpu.so is not in the package)" in info and "no native library was built" in info


@pytest.mark.slow
def test_pure_python_wheel(sdist, tmp_path):
    wheel, site = install(sdist, tmp_path, OVSEG_BUILD_NATIVE="0")
    assert wheel.name.endswith("-py3-none-any.whl") and smoke(site) == "reference"


def test_imports_are_cheap():
    loaded = python("-c", "import sys, ovseg_kernels; print(sorted(sys.modules))")
    assert not any(f"'{name}'" in loaded for name in ("triton", "torchvision", "matplotlib", "open_clip", "PIL", "omegaconf", "ovseg"))
    loaded = python("-c", "import sys, ovseg; print(sorted(sys.modules))")
    assert not any(f"'{name}'" in loaded for name in ("torchvision", "matplotlib", "open_clip", "transformers", "sklearn", "skimage"))


def test_files_are_short():
    files = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    paths = files.stdout.split() if files.returncode == 0 else []
    long = {p: n for p in paths if p.endswith((".py", ".cpp", ".h", ".cu", ".cuh")) and (ROOT / p).exists()
            and (n := len((ROOT / p).read_text().splitlines())) > (800 if p.startswith("csrc/") else 500)}
    assert not long, f"over 500 lines, 800 for kernels: {long}"


@pytest.mark.parametrize("codes,expected", [
    ("sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 sm_121", "8.0;9.0a;10.0;12.0+PTX"),
    ("sm_80 sm_86 sm_90", "8.0;9.0+PTX"),  # CUDA 12.0; code for Hopper alone has no PTX for later chips
    ("", "8.0;9.0a;10.0;12.0+PTX"),
])  # fmt: skip
def test_default_architectures_are_those_the_compiler_knows(codes, expected):
    code = f"import runpy, setuptools; setuptools.setup = lambda **_: None; print(runpy.run_path('setup.py')['default_archs']({codes!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == expected
