"""What a user installs: sdist, wheel, an install without a compiler, the binary's ABI, cheap
imports, short files.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes

import pytest
from native_build import ROOT
from packaging.requirements import Requirement
from wheels import install, python, smoke


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    python("-m", "build", "--sdist", "--no-isolation", "--outdir", str(out), str(ROOT))
    return next(out.glob("*.tar.gz"))


PACKAGES = ("csrc", "ovseg", "ovseg_kernels", "benchmarks")


def test_the_sdist_holds_what_builds(sdist):
    """A header or recipe that MANIFEST.in or pyproject.toml forget shows here; .ci/run compiles a
    copy of the same files.
    """
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {
        "CMakeLists.txt",
        "LICENSE",
        "csrc/common/gemm.h",
        "constraints.txt",
        "setup.py",
        "pyproject.toml",
    } <= names
    assert not any(name.endswith((".so", "build_info.json")) for name in names)
    lost = {
        name for name in tracked(*PACKAGES) if not name.startswith("benchmarks/results/")
    } - names
    assert not lost, lost


CMAKE = """#!/bin/sh
echo "$*" >> {log}
for word in "$@"; do
  case "$word" in
    -DOVSEG_CUDA=ON) touch CMakeCache.txt; exit 1 ;;
    -DOVSEG_OUTPUT=*) test ! -e CMakeCache.txt && echo "${{word#*=}}" > place ;;
    --build) cp {library} "$(cat place)" ;;
  esac
done
"""


def tracked(*folders):
    """The files of the repository below ``folders`` that are here."""
    names = subprocess.run(
        ["git", "ls-files", *folders], capture_output=True, text=True, cwd=ROOT
    ).stdout.split()
    assert names  # without git there is nothing to compare with
    return {name for name in names if (ROOT / name).exists()}


def test_wheel_beside_an_nvcc_that_fails(sdist, tmp_path):
    """CMake with CUDA fails: the CPU kernels are built in an empty folder, unless CUDA was asked
    for. A script stands for CMake.

    The wheel holds every file of the packages, so that a system, a recipe or a set of data cannot
    be in the source tree alone.
    """
    (tmp_path / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    library = ROOT / "ovseg_kernels" / "_C_cpu.so"
    (tmp_path / "cmake").write_text(CMAKE.format(log=tmp_path / "log", library=library))
    for name in ("nvcc", "cmake"):
        (tmp_path / name).chmod(0o755)
    broken = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "OVSEG_KEEP_BUILD": ""}
    wheel, site = install(sdist, tmp_path / "out", OVSEG_BUILD_NATIVE="", FORCE_CUDA="", **broken)
    configured, again, built = (tmp_path / "log").read_text().splitlines()
    assert (
        "-DOVSEG_CUDA=ON" in configured
        and "-DOVSEG_CUDA=OFF" in again
        and built.startswith("--build")
    )
    assert "-py3-none-linux" in wheel.name or "-py3-none-macosx" in wheel.name
    assert smoke(site) == "cpu" and not (site / "ovseg_kernels" / "_C_cuda.so").exists()
    info = json.loads((site / "ovseg_kernels" / "build_info.json").read_text())
    assert info["torch_floor"] == "2.10" and info["cuda"] == "off"
    assert not {name for name in tracked("ovseg", "ovseg_kernels") if not (site / name).exists()}
    systems = subprocess.run(
        [sys.executable, "-c", "from ovseg.systems.registry import SYSTEMS; print(*SYSTEMS)"],
        cwd=site,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert systems == sorted(
        path.parent.name for path in (ROOT / "ovseg" / "systems").glob("*/preset.yaml")
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(tmp_path / "no"),
        str(sdist),
    ]
    asked = {**os.environ, **broken, "OVSEG_BUILD_NATIVE": "1", "FORCE_CUDA": "1"}
    assert subprocess.run(command, capture_output=True, env=asked, check=False).returncode != 0
    assert len((tmp_path / "log").read_text().splitlines()) == 4


@pytest.mark.third_trial(14)
def test_the_sdist_is_small(sdist):
    """Bundled weights are the large part of it: no test, no golden tensor, no picture."""
    with tarfile.open(sdist) as archive:
        sizes = {
            member.name.split("/", 1)[-1]: member.size
            for member in archive.getmembers()
            if member.isfile()
        }
    assert not [
        name
        for name in sizes
        if name.startswith(("tests/", "scripts/")) or name.endswith((".npz", ".png"))
    ]
    large = [name for name, size in sizes.items() if size > 100_000]
    scenes = [name for name in large if ".digits/" in name]
    photos = [name for name in large if ".photos/" in name]
    assert scenes and all(
        re.fullmatch(r"ovseg/systems/\w+/bundled/\w+\.(digits|photos)/model\.safetensors", name)
        for name in large
    )
    assert all(sizes[name] < 2e6 for name in scenes) and sum(sizes[name] for name in scenes) < 6.5e6
    assert sum(sizes[name] for name in photos) < 10e6
    assert sum(sizes.values()) - sum(sizes[name] for name in large) < 3.5e6  # text
    assert sdist.stat().st_size < 7e6 + sum(sizes[name] for name in photos)


@pytest.mark.third_trial(1)
@pytest.mark.parametrize(
    "hidden",
    [
        [],
        ["setuptools.command.bdist_wheel"],
        ["setuptools.command.bdist_wheel", "wheel.bdist_wheel"],
    ],
    ids=["new", "old", "without wheel"],
)
def test_setup_takes_any_bdist_wheel(hidden):
    """That of setuptools, of `wheel`, or its own: the license is named in the words that the
    setuptools there is knows.
    """
    code = f"""
import json, runpy, sys, setuptools
for name in {hidden}:
    sys.modules[name] = None
given = {{}}

setuptools.setup = lambda **options: given.update(options)
setuptools.__version__ = "65.5.0" if {hidden} else setuptools.__version__
runpy.run_path("setup.py")
wheel = given["cmdclass"]["bdist_wheel"]
print(json.dumps([wheel.__name__, wheel.__mro__[1].__module__, given.get("license"), given.get("license_expression")]))
"""
    found = json.loads(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
        ).stdout
    )
    assert found[2:] == ([None, "Apache-2.0"] if not hidden else ["Apache-2.0", None])
    if len(hidden) == 2:
        assert found[0] == "PlainWheel"
    elif not hidden:
        assert found[:2] == ["PlatformWheel", "setuptools.command.bdist_wheel"]


@pytest.mark.third_trial(1)
def test_a_wheel_without_bdist_wheel(tmp_path):
    """setup.py's own: the files, RECORD and METADATA of the one that setuptools makes."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source / name)
    for name in ("ovseg", "ovseg_kernels", "benchmarks"):
        ignored = shutil.ignore_patterns("*.so", "build_info.json", "__pycache__", "*.safetensors")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    code = (
        "import sys; sys.modules['setuptools.command.bdist_wheel'] = "
        "sys.modules['wheel.bdist_wheel'] = None\n"
        "import setuptools.build_meta as build; print(build.build_wheel(sys.argv[1]))"
    )
    names, metadata = [], []
    for way in (code, code.partition("\n")[0].partition(";")[0] + "\n" + code.partition("\n")[2]):
        out = tmp_path / str(len(names))
        out.mkdir()
        subprocess.run(
            [sys.executable, "-c", way, str(out)],
            cwd=source,
            check=True,
            capture_output=True,
            env={**os.environ, "OVSEG_BUILD_NATIVE": "0"},
        )
        wheel = next(out.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            assert archive.testzip() is None
            record = archive.read("ovseg_kernels-0.1.0.dist-info/RECORD").decode().splitlines()
            assert sorted(line.split(",")[0] for line in record) == sorted(archive.namelist())
            metadata.append(
                message_from_bytes(archive.read("ovseg_kernels-0.1.0.dist-info/METADATA"))
            )
            names.append(
                (wheel.name, {name for name in archive.namelist() if "LICENSE" not in name})
            )
    assert names[0] == names[1]
    for key in ("Name", "Version", "Requires-Python", "Provides-Extra"):
        assert metadata[0].get_all(key) == metadata[1].get_all(key)
    requirements = [
        {Requirement(line) for line in one.get_all("Requires-Dist")} for one in metadata
    ]
    assert requirements[0] == requirements[1]


@pytest.mark.slow
def test_install_without_any_compiler(sdist, tmp_path):
    """No cmake, no compiler: the build goes on, and the reference answers with a warning."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("uname", "sh"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    _, site = install(
        sdist, tmp_path, PATH=str(tools), OVSEG_BUILD_NATIVE="", CC="false", CXX="false"
    )
    assert not list((site / "ovseg_kernels").glob("*.so"))
    assert smoke(site) == "reference"
    info = python(
        "-W",
        "ignore",
        "-c",
        f"import sys; sys.path.insert(0, {str(site)!r}); import ovseg_kernels.info as i; "
        "print(i.report())",
    )
    assert (
        "not built (_C_cpu.so is not in the package)" in info
        and "no native library was built" in info
    )


@pytest.mark.slow
def test_pure_python_wheel(sdist, tmp_path):
    wheel, site = install(sdist, tmp_path, OVSEG_BUILD_NATIVE="0")
    assert wheel.name.endswith("-py3-none-any.whl") and smoke(site) == "reference"
    tracked = subprocess.run(
        ["git", "ls-files", "ovseg", "ovseg_kernels"], capture_output=True, text=True, cwd=ROOT
    ).stdout.split()
    lost = {name for name in tracked if (ROOT / name).exists() and not (site / name).exists()}
    assert not lost, lost
    assert list((site / "ovseg").rglob("pacl_scenes.yaml")) and list(
        (site / "ovseg").rglob("everyday.yaml")
    )
    assert len(list((site / "ovseg").rglob("model.safetensors"))) >= 2


def test_imports_are_cheap():
    loaded = python("-c", "import sys, ovseg_kernels; print(sorted(sys.modules))")
    assert not any(
        f"'{name}'" in loaded
        for name in (
            "triton",
            "torchvision",
            "matplotlib",
            "open_clip",
            "PIL",
            "omegaconf",
            "ovseg",
        )
    )
    loaded = python("-c", "import sys, ovseg; print(sorted(sys.modules))")
    assert not any(
        f"'{name}'" in loaded
        for name in ("torchvision", "matplotlib", "open_clip", "transformers", "sklearn", "skimage")
    )


def test_files_are_short():
    """Files of 550 lines at most, and of 800 where kernels, or tables of cases, belong together."""
    long = {}
    for name in tracked("."):
        if name.endswith((".py", ".cpp", ".h", ".cu", ".cuh")):
            most = 800 if name.startswith(("csrc/", "ovseg_kernels/triton/", "tests/")) else 550
            count = len((ROOT / name).read_text().splitlines())
            if count > most:
                long[name] = count
    assert not long


@pytest.mark.parametrize(
    "codes,expected",
    [
        ("sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 sm_121", "8.0;9.0a;10.0;12.0+PTX"),
        (
            "sm_80 sm_86 sm_90",
            "8.0;9.0+PTX",
        ),  # CUDA 12.0; code for Hopper alone has no PTX for later chips
        ("", "8.0;9.0a;10.0;12.0+PTX"),
    ],
)
def test_default_architectures_are_those_the_compiler_knows(codes, expected):
    code = f"import runpy, setuptools; setuptools.setup = lambda **_: None; print(runpy.run_path('setup.py')['default_archs']({codes!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == expected
