"""Maps environment variables to CMake options, runs CMake, and writes build_info.json.

CMakeLists.txt is the build.

OVSEG_BUILD_NATIVE    1: a failing native build is an error; 0: no native build;
                      unset: try, and go on without it
FORCE_CUDA            1 or 0; unset: on if nvcc is found. Never asks for a GPU
TORCH_CUDA_ARCH_LIST  architectures of the CUDA library, e.g. "8.0;9.0a";
                      unset: 8.0;9.0a;10.0;12.0+PTX, those of them that nvcc knows
MAX_JOBS              parallel compilations; unset: min(cores, memory / 4 GB)
OVSEG_WERROR          1: warnings are errors
OVSEG_KEEP_BUILD      1: go on with the objects of an earlier build that was cut short;
                      unset: build everything anew
"""

import base64
import hashlib
import importlib.metadata
import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import ClassVar

import setuptools
from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel  # setuptools 70.1 and later
except ImportError:
    try:
        from wheel.bdist_wheel import bdist_wheel
    except ImportError:  # a new venv of Python 3.11: setuptools 65.5 and no wheel
        bdist_wheel = None

ROOT = Path(__file__).parent.resolve()
# sm_80 code serves 8.6 and 8.9 too; 9.0a is Hopper and nothing else; the last one's PTX serves
# chips to come.
DEFAULT_ARCHS = ("8.0", "9.0a", "10.0", "12.0")


def max_jobs() -> int:
    """Return how many compilations run at once, by MAX_JOBS or by cores and memory."""
    if os.environ.get("MAX_JOBS"):
        return int(os.environ["MAX_JOBS"])
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        memory = 4.0
    return max(1, min(os.cpu_count() or 1, int(memory // 4)))


def use_cuda() -> bool:
    """Return whether to build for CUDA, by FORCE_CUDA or by whether nvcc is found."""
    forced = os.environ.get("FORCE_CUDA")
    return shutil.which("nvcc") is not None if forced in (None, "") else forced == "1"


def nvcc_codes() -> str:
    """Return the chips that the compiler knows, as it lists them: ``sm_80 sm_86 ...``.

    Empty where it cannot be asked.
    """
    done = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def default_archs(codes: str) -> str:
    """Return those of ``DEFAULT_ARCHS`` that are among ``codes``, the last one with PTX.

    All where nothing is known.
    """
    known = {int(code.removeprefix("sm_").rstrip("af")) for code in codes.split()}
    chosen = [
        arch
        for arch in DEFAULT_ARCHS
        if not known or int(arch.rstrip("a").replace(".", "")) in known
    ]
    if not chosen:
        raise RuntimeError(
            f"nvcc compiles for {codes} and for none of {DEFAULT_ARCHS}; expected "
            "TORCH_CUDA_ARCH_LIST to be set"
        )
    # Code for one chip alone ("a") has no PTX that later chips could take.
    return ";".join([*chosen[:-1], chosen[-1].rstrip("a") + "+PTX"])


def first_line(*command: str, last: bool = False) -> str:
    """Return what a compiler says of itself."""
    lines = (
        subprocess.run(command, capture_output=True, text=True, check=False)
        .stdout.strip()
        .split("\n")
    )
    return lines[-1 if last else 0]


class CMakeBuild(build_ext):
    """Builds the shared libraries into ovseg_kernels/.

    They hold no Python symbol and load by torch.ops.load_library.
    """

    def run(self) -> None:
        """Build for CUDA if asked, else for the CPU; go on without where that is allowed."""
        wanted = os.environ.get("OVSEG_BUILD_NATIVE", "")
        if wanted == "0":
            print("OVSEG_BUILD_NATIVE=0: no native library; the reference answers")
            return
        try:
            try:
                self._build(use_cuda())
            except subprocess.CalledProcessError as error:
                if wanted == "1" or not use_cuda() or os.environ.get("FORCE_CUDA") == "1":
                    raise
                print(
                    f"\novseg_kernels: the build with CUDA failed ({error}); "
                    "building for the CPU only.\n"
                    "FORCE_CUDA=1 makes this an error, FORCE_CUDA=0 does not try.\n",
                    file=sys.stderr,
                )
                self._build(False)
        except Exception as error:
            if wanted == "1":
                raise
            print(
                f"\novseg_kernels: the native build failed ({error}).\n"
                "Going on without it: every operator runs on its plain-torch reference.\n"
                "OVSEG_BUILD_NATIVE=1 makes this an error.\n",
                file=sys.stderr,
            )

    def _build(self, cuda: bool) -> None:
        import torch

        began = time.time()
        # Stale files of an editable install must not end in a wheel of another build.
        out = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "ovseg_kernels"
        work = Path(self.build_temp).resolve() / "cmake"
        if os.environ.get("OVSEG_KEEP_BUILD") != "1":
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        torch_root = Path(torch.__file__).parent
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or default_archs(
            nvcc_codes() if cuda else ""
        )
        archs = [arch for arch in archs.replace(" ", ";").replace(",", ";").split(";") if arch]
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "OVSEG_TORCH_INCLUDE": torch_root / "include",
            "OVSEG_TORCH_LIB": torch_root / "lib",
            "OVSEG_OUTPUT": out,
            "OVSEG_CUDA": "ON" if cuda else "OFF",
            "OVSEG_CUDA_ARCHS": ";".join(archs),
            "OVSEG_WERROR": "ON" if os.environ.get("OVSEG_WERROR") == "1" else "OFF",
        }
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        jobs = max_jobs()
        subprocess.check_call(
            ["cmake", str(ROOT), *generator, *(f"-D{k}={v}" for k, v in options.items())], cwd=work
        )
        subprocess.check_call(["cmake", "--build", ".", "--parallel", str(jobs)], cwd=work)
        build = runpy.run_path(str(ROOT / "ovseg_kernels" / "_build.py"))
        info = {
            "torch": torch.__version__,
            "torch_floor": "2.10",
            "source": build["source_hash"](ROOT),
            "libraries": build["records"](out),
            "compiler": first_line(os.environ.get("CXX", "c++"), "--version"),
            "machine": platform.machine(),
            "libc": build["libc"](),
            "instruction_sets": ["baseline", "avx2", "avx512"]
            if platform.machine() in ("x86_64", "AMD64")
            else ["baseline"],
            "cuda": first_line("nvcc", "--version", last=True) if cuda else "off",
            "cuda_archs": [arch.replace(".", "") for arch in archs] if cuda else [],
            "jobs": jobs,
            "seconds": round(time.time() - began, 1),
        }
        (out / "build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def get_outputs(self):
        """Return the files that an install holds of this build."""
        folder = Path(self.build_lib) / "ovseg_kernels"
        return [str(path) for path in folder.glob("_C_*.so")] + [
            str(path) for path in folder.glob("build_info.json")
        ]

    def get_output_mapping(self):
        """Return nothing: the libraries have no source file each."""
        return {}


class PlatformWheel(bdist_wheel or object):
    """py3-none-<platform>: the libraries hold no CPython symbol, one wheel serves every Python."""

    def get_tag(self):
        """Return the tag: of the platform, or of any where there is no native library."""
        if os.environ.get("OVSEG_BUILD_NATIVE") == "0":
            return "py3", "none", "any"
        return "py3", "none", super().get_tag()[2]


class PlainWheel(Command):
    """bdist_wheel where neither setuptools nor ``wheel`` has one.

    It does what `pip install .` asks of it, and no more.
    """

    user_options: ClassVar[list] = [("dist-dir=", "d", "where the wheel goes")]

    def initialize_options(self):
        """Set the options to what setuptools expects before they are read."""
        self.dist_dir = None

    def finalize_options(self):
        """Set the folder of the wheel to ``dist`` where none was named."""
        self.dist_dir = Path(self.dist_dir or "dist")

    def egg2dist(self, egg_info, dist_info):
        """Write METADATA and what stands beside it, from the folder that egg_info made.

        dist_info asks for it.
        """
        dist_info = Path(dist_info)
        shutil.rmtree(dist_info, ignore_errors=True)
        dist_info.mkdir(parents=True)
        head, _, readme = (Path(egg_info) / "PKG-INFO").read_text("utf-8").partition("\n\n")
        requires = importlib.metadata.PathDistribution(Path(egg_info)).requires or ()
        head = "\n".join([head, *(f"Requires-Dist: {requirement}" for requirement in requires)])
        (dist_info / "METADATA").write_text(f"{head}\n\n{readme}", "utf-8")
        for name in ("entry_points.txt", "top_level.txt"):
            shutil.copy(Path(egg_info) / name, dist_info / name)
        shutil.copy(ROOT / "LICENSE", dist_info / "LICENSE")

    def run(self):
        """Build the package and put it into a wheel."""
        self.run_command("build")
        self.run_command("egg_info")
        build = self.get_finalized_command("build")
        site = Path(build.build_lib)
        tag = (
            "py3-none-any"
            if os.environ.get("OVSEG_BUILD_NATIVE") == "0"
            else f"py3-none-{build.plat_name.replace('-', '_')}"
        )
        name = f"ovseg_kernels-{self.distribution.get_version()}"
        dist_info = site / f"{name}.dist-info"
        self.egg2dist(self.get_finalized_command("egg_info").egg_info, dist_info)
        (dist_info / "WHEEL").write_text(
            f"Wheel-Version: 1.0\nGenerator: setup.py\nRoot-Is-Purelib: false\nTag: {tag}\n"
        )
        self.dist_dir.mkdir(parents=True, exist_ok=True)
        files = sorted(path for path in site.rglob("*") if path.is_file())
        wheel = self.dist_dir / f"{name}-{tag}.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            rows = [self._added(archive, path, path.relative_to(site).as_posix()) for path in files]
            record = f"{name}.dist-info/RECORD"
            archive.writestr(record, "".join([*rows, f"{record},,\n"]))
        shutil.rmtree(dist_info)
        self.distribution.dist_files.append(("bdist_wheel", "py3", str(wheel)))

    @staticmethod
    def _added(archive, path, name):
        """Put a file into the wheel; return its line of RECORD."""
        data = path.read_bytes()
        archive.write(path, name)
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        return f"{name},sha256={digest},{len(data)}\n"


if "editable_wheel" in sys.argv and bdist_wheel is None:
    raise SystemExit(
        f"ovseg-kernels: setuptools {setuptools.__version__} makes no editable install "
        "without `wheel`; expected a later one, pip install 'setuptools>=77'"
    )

setup(
    # Found, so that no system is in the source tree alone.
    packages=[
        *find_packages(include=["ovseg", "ovseg.*", "ovseg_kernels", "ovseg_kernels.*"]),
        "ovseg_benchmarks",
        "ovseg_benchmarks.whole",
    ],
    # Before 77 setuptools knows no expression and takes a text.
    **{
        "license_expression"
        if int(setuptools.__version__.partition(".")[0]) >= 77
        else "license": "Apache-2.0"
    },
    ext_modules=[]
    if os.environ.get("OVSEG_BUILD_NATIVE") == "0"
    else [Extension("ovseg_kernels._C_cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel if bdist_wheel else PlainWheel},
)
