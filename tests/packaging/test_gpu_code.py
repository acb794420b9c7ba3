"""GPU code on a machine without a GPU: it compiles for real chips, fits their limits, and the
libraries keep their promises.
"""

import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from native_build import ROOT, cmake
from wheels import install, smoke

from ovseg_kernels import _library

ARCHS = ("sm_80", "sm_90a", "sm_120")
no_nvcc = shutil.which("nvcc") is None and "CUDACXX" not in os.environ
needs_nvcc = pytest.mark.skipif(no_nvcc, reason="needs nvcc to compile the CUDA kernels")


def nvidia_tool(name):
    """From the CUDA toolkit, or the copy inside Triton's package."""
    bundled = (
        Path(pytest.importorskip("triton").__file__).parent / "backends" / "nvidia" / "bin" / name
    )
    return shutil.which(name) or str(bundled)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What a wheel of the checkout holds, with CUDA for all three architectures.

    Objects of the install are taken as they are.

    Of several processes that run the tests this one waits meanwhile: the compilers get its core,
    and not those of the others.
    """
    environment = {
        "OVSEG_BUILD_NATIVE": "1",
        "FORCE_CUDA": "1",
        "OVSEG_KEEP_BUILD": "1",
        "TORCH_CUDA_ARCH_LIST": "8.0;9.0a;12.0",
    }
    if "PYTEST_XDIST_WORKER" in os.environ:
        environment |= {"MAX_JOBS": "1", "NVCC_APPEND_FLAGS": "--threads=1"}
    return install(ROOT, tmp_path_factory.mktemp("cuda"), OVSEG_WERROR="1", **environment)[1]


@pytest.fixture(scope="module")
def library(site):
    return site / "ovseg_kernels" / "_C_cuda.so"


@needs_nvcc
def test_wheel_with_cuda(site):
    """Built without a GPU; where there is none the CPU answers."""
    info = json.loads((site / "ovseg_kernels" / "build_info.json").read_text())
    assert info["cuda_archs"] == ["80", "90a", "120"] and "cuda_" in info["cuda"]
    if not torch.cuda.is_available():
        assert smoke(site) == "cpu"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of binutils")
def test_no_function_of_one_instruction_set_answers_for_another(request):
    """A weak symbol outside its namespace would be one copy for all: perhaps the one compiled for
    AVX-512.
    """
    if not no_nvcc:
        request.getfixturevalue("site")  # the build of the wheel writes into the same folder
    objects = list((ROOT / "build").glob("temp.*/cmake/**/*_cpu.cpp.o"))  # of the install
    if not objects:
        cmake(ROOT / "build" / "objects")
        objects = list((ROOT / "build" / "objects").rglob("*_cpu.cpp.o"))
    assert len(objects) >= 20
    for path in objects:
        symbols = subprocess.run(
            ["nm", "-C", str(path)], capture_output=True, text=True, check=True
        ).stdout
        weak = [line for line in symbols.splitlines() if re.search(r" [WVu] ", line)]
        outside = [line for line in weak if not re.search(r"ovseg::(baseline|avx2|avx512)::", line)]
        if "similarity_contrastive_loss" not in str(path) or "_avx" in str(
            path
        ):  # that one is compiled once
            assert not outside, (path, outside)


@pytest.fixture(scope="module")
def usage(library):
    """(kernel, kind) -> arch -> (registers, bytes of stack, bytes of static shared memory), from
    the compiled code.
    """
    text = subprocess.run(
        [nvidia_tool("cuobjdump"), "--dump-resource-usage", str(library)],
        capture_output=True,
        text=True,
        check=True,
    )
    found, arch, name, operators = (
        defaultdict(dict),
        None,
        "",
        "|".join(set(_library.OPERATOR_OF.values())),
    )
    for line in text.stdout.splitlines():
        if match := re.search(r"arch = (\S+)", line):
            arch = match.group(1)
        elif match := re.search(r"Function (\S+):", line):
            name = match.group(1)
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            kernel, rest = re.search(rf"\d((?:{operators})\w*?_kernel)(\S*)", name).groups()
            found[kernel, rest][arch] = tuple(map(int, match.groups()))
    return found


def kind_of(rest: str) -> str:
    """The arithmetic of a kernel, from its mangled template arguments."""
    if "Mma16" in rest or "Tf32" in rest:
        return "tensor core"
    return (
        "double" if re.match(r"I(NS0_(7PoolingINS0_)?(4Kind|10CenterKind)I)?d", rest) else "float"
    )


# Registers of 128 threads: 168 lets three blocks share an SM, 255 two. Stack is what spilled.
BUDGET = {"tensor core": (168, 96), "float": (255, 96), "double": (255, 128)}
SMALL = (
    "norms_kernel",
    "finish_kernel",
    "scalars_kernel",
    "rows_kernel",
    "columns_kernel",
    "contrastive_loss_bwd_kernel",
    "scale_kernel",
    "prepare_kernel",
    "values_kernel",
    "bias_kernel",
)


@needs_nvcc
def test_every_kernel_is_compiled_for_every_architecture(usage):
    written = set()
    for path in [*ROOT.glob("csrc/*/*.cu"), *ROOT.glob("csrc/*/*.cuh")]:
        written |= set(
            re.findall(r"__global__ void (?:__launch_bounds__\(\w+\)\s*)?(\w+)\(", path.read_text())
        )
    assert {kernel for kernel, _ in usage} == written and len(written) >= 16
    for key, by_arch in usage.items():
        assert set(by_arch) == set(ARCHS), key


@needs_nvcc
def test_registers_spills_and_shared_memory_stay_in_budget(usage):
    over = []
    for (kernel, rest), by_arch in usage.items():
        registers_allowed, stack_allowed = BUDGET[kind_of(rest)]
        if kernel.endswith(SMALL) and "pooled" not in kernel:
            registers_allowed, stack_allowed = 64, 0
        if kernel.endswith(
            "fwd_pool_kernel"
        ):  # blocks of one warp; eight loads of 16 bytes wait in 32 registers
            registers_allowed, stack_allowed = (
                128,
                16 if kind_of(rest) == "double" else 0,
            )  # float64's division is a call
        if kernel.endswith(
            "fwd_cancelled_kernel"
        ):  # for the few rows that cancel; two blocks on an SM are enough
            registers_allowed = 255
        if kernel.endswith(
            "patch_norms_kernel"
        ):  # lengths whose squares overflow are scaled on the way; it waits for memory
            registers_allowed, stack_allowed = 96, 8 if kind_of(rest) == "double" else 0
        for arch, (registers, stack, shared) in by_arch.items():
            # Shared memory is dynamic (static_assert in the source: 99 KiB); 1 KiB belongs to the
            # system from sm_90 on.
            if registers > registers_allowed or stack > stack_allowed or shared > 1024:
                over.append(
                    f"{kernel}{rest[:40]} {arch}: {registers} registers, {stack} bytes of stack, "
                    f"{shared} static shared"
                )
    assert not over, "\n".join(over)


@pytest.fixture(scope="module")
def sass(library):
    """architecture -> (mangled name, machine code as text) of every kernel."""
    found = {}
    for arch in ARCHS:
        command = [nvidia_tool("cuobjdump"), "-sass", "-arch", arch, str(library)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[arch] = [
            (part.split("\n", 1)[0], part) for part in re.split(r"\n\s*Function : ", text)[1:]
        ]
    return found


@needs_nvcc
def test_the_center_pool_has_eight_loads_of_16_bytes_under_way(sass):
    """Of each dtype, before the first sum is touched; the narrow twin is for strides that allow no
    such load.
    """
    wide = 0
    for name, part in itertools.chain(*sass.values()):
        if "center_assignment_fwd_pool_kernel" not in name:
            continue
        moves = re.findall(r"\b(?:LDG|LDS|STS)[.\w]*", part)
        loads = [i for i, move in enumerate(moves) if move == "LDG.E.128"]
        assert bool(loads) == ("Li1EEE" not in name) and len(loads) % 8 == 0, (
            name
        )  # some compilers write the loop several times
        if loads:
            assert (
                not {"LDS.128", "STS.128"} & set(moves[loads[0] : loads[7]])
                and "LDG.E.U16" not in moves
            ), name
            wide += 1
    assert wide == 4 * len(ARCHS)


@needs_nvcc
def test_products_copy_16_bytes_with_few_instructions(sass):
    """On sm_90a, where the compiler unrolls the copies of a step: the middle number of instructions
    from one of 16 bytes to the next.
    """
    found = {}
    for name, part in sass["sm_90a"]:
        moves = re.findall(
            r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)", part, re.MULTILINE
        )
        places = [i for i, move in enumerate(moves) if move.startswith("LDGSTS")]
        if places:
            assert all("128" in moves[i] for i in places)
            found[name] = statistics.median(b - a for a, b in itertools.pairwise(places))
    over = {
        name: count for name, count in found.items() if count > 72
    }  # the highest was 65 when this was written
    assert len(found) >= 50 and not over, over


@needs_nvcc
def test_launchers_neither_wait_nor_copy(library):
    """All they want of the CUDA runtime is to launch and to hear of errors: no copy, no allocation,
    no synchronisation.
    """
    objects = list((ROOT / "build").glob("temp.*/cmake/CMakeFiles/_C_cuda.dir/**/*.o"))
    assert len(objects) >= 16
    for path in objects:
        symbols = subprocess.run(
            ["nm", "--undefined-only", str(path)], capture_output=True, text=True, check=True
        ).stdout
        runtime = set(re.findall(r"\bcuda\w+", symbols))
        assert runtime <= {"cudaFuncSetAttribute", "cudaGetErrorString", "cudaGetLastError"}, (
            path,
            runtime,
        )
        assert not re.search(r"aoti_torch_item|aoti_torch_\w*(?:copy|to_device)", symbols), (
            path
        )  # a value read on the host


@needs_nvcc
def test_tensor_cores_are_used(sass):
    """16-bit and tf32 kernels hold HMMA on every architecture; exact float ones hold none, or
    float32 would not be exact.
    """
    for name, part in itertools.chain(*sass.values()):
        if re.search(
            r"patch_text\w*(_fwd|_weights|_vectors|_coefficients|_hessian|_patches|_texts|_gram)_kernel",
            name,
        ):
            expected = kind_of(name.split("_kernel", 1)[1]) == "tensor core"
            assert ("HMMA" in part) == expected, name


@needs_nvcc
@pytest.mark.skipif(
    torch.version.cuda is None, reason="the CUDA library loads only where torch has CUDA"
)
def test_the_library_loads_without_a_gpu(library):
    """Under a torch with CUDA, on a machine without a GPU: it registers, and importing it touches
    no device.
    """
    code = (
        "import torch, ovseg_kernels._library as lib\n"
        f"torch.ops.load_library({str(library)!r})\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print([n for n in lib.SCHEMAS if n not in lib.COMPOSITES and not has(f'ovseg::{n}', "
        "'CUDA')], torch.cuda.is_initialized())"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.stdout.strip() == "[] False", done.stdout + done.stderr


def audit(path):
    """torch-abi-audit's verdict on one library."""
    program = Path(sys.executable).with_name("torch-abi-audit")
    done = subprocess.run(
        [str(program), "--json", "--check", "torch", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.dumps(json.loads(done.stdout))


def python_symbols(path):
    symbols = subprocess.run(
        ["nm", "-DC", "--undefined-only", str(path)], capture_output=True, text=True, check=True
    ).stdout
    return [
        name
        for line in symbols.splitlines()
        if (name := line.split(maxsplit=1)[-1]).startswith(("Py", "_Py"))
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_stable_abi_of_the_cpu_library():
    """No symbol of torch that changes between releases, and none of Python: one binary for all of
    them.
    """
    path = ROOT / "ovseg_kernels" / "_C_cpu.so"
    assert "2.10" in audit(path) and not python_symbols(path)


@needs_nvcc
def test_stable_abi_of_the_cuda_library(library):
    assert "2.10" in audit(library) and not python_symbols(library)


@needs_nvcc
def test_the_selftest_kernels_are_cuda_too(tmp_path):
    """What the emulation is tested with is the same code that a GPU would run."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    source = ROOT / "tests" / "cuda_emulation" / "selftest.cu"
    command = [nvcc, "-std=c++17", "-arch=sm_80", "-c", str(source), "-o", str(tmp_path / "x.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kernels_use_dynamic_shared_memory_only():
    """The emulation guards it and fills it with NaN before every block; a static array it can only
    leave as it was.
    """
    for path in [*ROOT.glob("csrc/**/*.cu"), *ROOT.glob("csrc/**/*.cuh")]:
        code = re.sub(r"#define OVSEG_DYNAMIC_SHARED.*", "", path.read_text())
        assert "__shared__" not in code, path


def test_device_code_never_sees_torch():
    for path in [
        *ROOT.glob("csrc/**/*.cu"),
        *ROOT.glob("csrc/**/*.cuh"),
        *ROOT.glob("csrc/**/*_cuda.h"),
    ]:
        assert not re.search(r"#include.*torch", path.read_text()), path
    for path in ROOT.glob("csrc/**/*"):
        if path.suffix in (".cu", ".cuh", ".h", ".cpp") and path.parent.name != "common":
            assert "asm" not in re.findall(r"\b\w+\b", path.read_text()), (
                f"{path}: inline PTX belongs into csrc/common"
            )


@pytest.fixture(scope="module")
def triton_rows():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = ROOT / "tests" / "packaging" / "triton_gate.py"
    done = subprocess.run(
        [sys.executable, str(script), "80", "90"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_every_triton_kernel_compiles_in_budget(triton_rows):
    written = set()
    for path in ROOT.glob("ovseg_kernels/triton/*.py"):
        written |= set(re.findall(r"def (\w+_kernel)\(", path.read_text()))
    for arch in (80, 90):
        assert {row["kernel"] for row in triton_rows if row["arch"] == arch} == written
    for row in triton_rows:
        assert row["shared"] <= 99 * 1024, row  # what sm_86 to sm_120 have
        assert row["stack"] <= (256 if row["case"].startswith("float64") else 128), (
            row
        )  # float64 is for checking


@pytest.mark.slow
def test_triton_products_are_what_they_should_be(triton_rows):
    """16-bit inputs go to tensor cores; exact float32 never rounds to tf32; addresses are 64-bit."""
    for row in triton_rows:
        if "patch_text" not in row["kernel"]:
            continue
        if row["case"].startswith(("bfloat16", "float16")):
            assert row["tensor_core"] in ("mma", "wgmma"), row
        if row["case"].startswith("float32"):
            assert row["tensor_core"] == "" and not row["tf32"], row
        assert row["global_int64"], row


@pytest.mark.slow
def test_triton_rows_are_copied_while_products_run(triton_rows):
    """Aligned shapes: nothing is read two bytes at a time, and every loop with a product has the
    copies of its next step under way.
    """
    products = set()
    for row in triton_rows:
        if row["case"].startswith("float64"):
            continue  # for checking
        # A gather by pixel, whose indices are 16 bits wide, has no neighbours to read with.
        assert "2" not in row["loads"] or "tables" in row["case"], row
        assert "1" not in row["loads"] or re.search("masked|pairs", row["case"]), (
            row
        )  # masks are bytes
        assert all(count >= 2 for count in row["stages"]), row
        turned = (
            row["tensor_core"] == "wgmma" and row["tf32"]
        )  # such operands are turned on their way, four bytes at a time
        assert (
            not row["stages"] or row["copies"].get("16") or (turned and row["copies"].get("4"))
        ), row
        products |= {row["kernel"]} if row["stages"] else set()
    written = set()
    for path in ROOT.glob("ovseg_kernels/triton/*.py"):
        for name, body in re.findall(
            r"def (\w+_kernel)\((.*?)(?=\n@triton|\n\ndef |\nclass |\Z)",
            path.read_text(),
            re.DOTALL,
        ):
            written |= (
                {name}
                if re.search(r"_dot\(|tl\.dot\(|_scores\(|_cosines\(|_pooled\(|_logits\(", body)
                else set()
            )
    assert products == written and len(products) >= 15


@pytest.mark.slow
def test_the_suite_needs_few_triton_compilations():
    """On a GPU each of them takes about a second of a processor, and `scripts/gpu_check.sh test`
    has minutes for all.
    """
    pytest.importorskip("triton")
    script = ROOT / "tests" / "packaging" / "triton_count.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    counted = json.loads(done.stdout.splitlines()[-1])
    assert set(counted["broken"]) <= {  # after what they launch
        "test_no_synchronisation.py::test_a_graph_of_a_gpu_flags_at_every_replay",
        "test_philox.py::test_triton_equals_python",
    }, counted
    assert 200 <= counted["specialisations"] <= 350, counted
