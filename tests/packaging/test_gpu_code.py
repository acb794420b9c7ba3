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

import compiled_code
import gpu_budget
import pytest
import torch
from native_build import ROOT, cmake
from wheels import install, smoke

from ovseg_kernels import _library

ARCHS = ("sm_80", "sm_90a", "sm_120")
# The library, with every kind of arithmetic; for the others the kernels alone, of two kinds.
WHOLE = "sm_90a"
no_nvcc = shutil.which("nvcc") is None and "CUDACXX" not in os.environ
needs_nvcc = pytest.mark.skipif(no_nvcc, reason="needs nvcc to compile the CUDA kernels")


def nvidia_tool(name):
    """From the CUDA toolkit, or the copy inside Triton's package."""
    bundled = (
        Path(pytest.importorskip("triton").__file__).parent / "backends" / "nvidia" / "bin" / name
    )
    return shutil.which(name) or str(bundled)


def alone():
    """Whether no other process of the tests wants the second core."""
    return "PYTEST_XDIST_WORKER" not in os.environ


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What a wheel of the checkout holds, with CUDA for one architecture.

    Objects of the install are taken as they are.

    Of several processes that run the tests this one waits meanwhile: the compilers get its core,
    and not those of the others.
    """
    environment = {
        "OVSEG_BUILD_NATIVE": "1",
        "FORCE_CUDA": "1",
        "OVSEG_KEEP_BUILD": "1",
        "TORCH_CUDA_ARCH_LIST": "9.0a",
    }
    if not alone():
        environment |= {"MAX_JOBS": "1", "NVCC_APPEND_FLAGS": "--threads=1"}
    return install(ROOT, tmp_path_factory.mktemp("cuda"), OVSEG_WERROR="1", **environment)[1]


@pytest.fixture(scope="module")
def library(site):
    return site / "ovseg_kernels" / "_C_cuda.so"


def has_source(path):
    """Whether an object is one of now, and not left by a file that has gone since."""
    operator = path.name.rsplit("_", 1)[0]
    launch = ROOT / "csrc" / operator / f"{operator}_launch.cuh"  # of a kind: CMakeLists.txt
    return (ROOT / path.with_suffix("")).exists() or launch.exists()


@pytest.fixture(scope="module")
def compiled(library):
    """architecture -> files with its code.

    16-bit kinds compile alike, tf32 does as they do, and float64 is for checking: beside the
    library there are the kinds BFloat16 and Float32.
    """
    build = ROOT / "build" / "cuda_kernels"
    options = {"CUDA": "ON", "CPU": "OFF"}
    options |= {"CUDA_ARCHS": "8.0;12.0", "CUDA_KINDS": "BFloat16;Float32"}
    given = [f"-DOVSEG_{name}={value}" for name, value in options.items()]
    cmake(build, *given, target="cuda_kernels", jobs=2 if alone() else 1)
    folder = build / "CMakeFiles" / "cuda_kernels.dir"
    objects = [path for path in folder.rglob("*.o") if has_source(path.relative_to(folder))]
    return {arch: [library] if arch == WHOLE else objects for arch in ARCHS}


@needs_nvcc
def test_wheel_with_cuda(site):
    """Built without a GPU; where there is none the CPU answers."""
    info = json.loads((site / "ovseg_kernels" / "build_info.json").read_text())
    assert info["cuda_archs"] == ["90a"] and "cuda_" in info["cuda"]
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
def usage(compiled):
    """(kernel, kind) -> arch -> (registers, bytes of stack, bytes of static shared memory), from
    the compiled code.
    """
    found = defaultdict(dict)
    operators = "|".join(set(_library.OPERATOR_OF.values()))
    for path in {path for paths in compiled.values() for path in paths}:
        command = [nvidia_tool("cuobjdump"), "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        arch = None
        name = ""
        for line in text.splitlines():
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
SPILLED = gpu_budget.SPILLED
BUDGET = {"tensor core": (168, SPILLED), "float": (255, SPILLED), "double": (255, 128)}
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
            re.findall(
                r"__global__ void (?:__launch_bounds__\([^()]*\)\s*)?(\w+)\(", path.read_text()
            )
        )
    assert len(written) >= 16 and set(gpu_budget.CUDA_SPILLS) <= written
    for arch in ARCHS:
        assert {kernel for (kernel, _), by_arch in usage.items() if arch in by_arch} == written


@needs_nvcc
def test_registers_spills_and_shared_memory_stay_in_budget(usage):
    over = []
    for (kernel, rest), by_arch in usage.items():
        registers_allowed, stack_allowed = BUDGET[kind_of(rest)]
        stack_allowed = max(stack_allowed, gpu_budget.CUDA_SPILLS.get(kernel, (0, ""))[0])
        if kernel.endswith(SMALL) and "pooled" not in kernel:
            registers_allowed, stack_allowed = 64, 0
        if kernel.endswith(
            "fwd_pool_kernel"
        ):  # blocks of one warp; eight loads of 16 bytes wait in 32 registers
            registers_allowed, stack_allowed = (
                128,
                16,
            )  # what lies before the loop over tokens; float64's division is a call
        if kernel.endswith("_few_kernel"):
            # 256 threads: 128 registers let two blocks share an SM. The backward is one on sm_80, whose
            # shared memory holds no second, and where arithmetic is exact.
            registers_allowed = 255 if "bwd" in kernel or kind_of(rest) == "double" else 128
        if kernel.endswith(
            "fwd_cancelled_kernel"
        ):  # for the few rows that cancel; two blocks on an SM are enough
            registers_allowed = 255
        if kernel.endswith(
            "patch_norms_kernel"
        ):  # lengths whose squares overflow are scaled on the way; it waits for memory
            registers_allowed = 96
            stack_allowed = 8
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
def sass(compiled):
    """architecture -> (mangled name, machine code as text) of every kernel."""
    tool = nvidia_tool("cuobjdump")
    found = {}
    for arch, paths in compiled.items():
        codes = [compiled_code.machine_code(path, tool, arch) for path in paths]
        found[arch] = [named for code in codes for named in code.items()]
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
        assert bool(loads) == ("Li1EEE" not in name), name
        if loads:  # sm_120 has the loop several times, and rests of it
            assert len(loads) >= 8, name
            between = moves[loads[0] : loads[7]]  # one read of the weights waits for none of them
            assert "STS.128" not in between and between.count("LDS.128") <= 1, name
            assert "LDG.E.U16" not in moves, name
            wide += 1
    assert wide == 4 + 2 * (len(ARCHS) - 1)  # kinds


@needs_nvcc
def test_products_copy_16_bytes_with_few_instructions(sass):
    """On sm_90a, where the compiler unrolls the copies of a step: the middle number of instructions
    from one of 16 bytes to the next.
    """
    found = {}
    for name, part in sass["sm_90a"]:
        gaps = compiled_code.gaps_between_copies(part)
        if gaps:
            assert not re.search(r"LDGSTS(?!\S*\.128)", part), name
            found[name] = statistics.median(gaps)
    over = {
        name: count for name, count in found.items() if count > 72
    }  # the highest was 65 when this was written
    assert len(found) >= 50 and not over, over


@needs_nvcc
def test_launchers_neither_wait_nor_copy(library):
    """All they want of the CUDA runtime is to launch and to hear of errors: no copy, no allocation,
    no synchronisation.
    """
    folders = list((ROOT / "build").glob("temp.*/cmake/CMakeFiles"))
    objects = [
        path
        for folder in folders
        for target in ("_C_cuda.dir", "cuda_kernels.dir")
        for path in (folder / target).rglob("*.o")
    ]
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
        "import torch, ovseg_kernels, ovseg_kernels._selection as table\n"
        f"torch.ops.load_library({str(library)!r})\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print([n for n in table.TABLE if 'cuda' in table.backends_of(n) and "
        "not has(f'ovseg::{n}', 'CUDA')], torch.cuda.is_initialized())"
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


def triton_gate(*arguments):
    """What tests/packaging/triton_gate.py prints: a row a line."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = ROOT / "tests" / "packaging" / "triton_gate.py"
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def triton_rows():
    return triton_gate()


def written_kernels():
    """Names of the Triton kernels -> their source."""
    found = {}
    for path in ROOT.glob("ovseg_kernels/triton/*.py"):
        pattern = r"def (\w+_kernel)\((.*?)(?=\n@triton|\n\ndef |\nclass |\Z)"
        found |= dict(re.findall(pattern, path.read_text(), re.DOTALL))
    return found


@pytest.mark.slow
def test_every_triton_kernel_compiles_in_budget(triton_rows):
    for arch in (80, 90, 120):
        compiled = {row["kernel"] for row in triton_rows if row["arch"] == arch}
        elsewhere = set() if arch == 90 else set(gpu_budget.HOPPER)
        assert compiled == set(written_kernels()) - elsewhere, arch
    for row in triton_rows:
        shared = 227 if row["arch"] == 90 else 99  # KiB; sm_80 code serves 8.6 and 8.9 too
        assert row["shared"] <= shared * 1024, row
        allowed, _ = gpu_budget.TRITON_SPILLS.get(row["kernel"], (gpu_budget.SPILLED, ""))
        if row["case"].startswith("float64"):
            allowed = gpu_budget.FLOAT64_SPILLED
        assert row["stack"] <= allowed, row


def test_budgets_name_kernels_that_exist():
    names = ("TRITON_SPILLS", "SMALL_TILES", "RARE", "HOPPER", "NARROW_LOADS", "FEW_PROGRAMS")
    named = {kernel for name in names for kernel in getattr(gpu_budget, name)}
    assert named <= set(written_kernels()), named - set(written_kernels())


def of_product_operator(kernel):
    """Whether products bound the operator of a kernel, which is not on the list of exceptions."""
    known = kernel.startswith(gpu_budget.PRODUCT_OPERATORS)
    return known and kernel not in gpu_budget.SMALL_TILES | gpu_budget.RARE


@pytest.mark.slow
def test_products_have_tiles_for_the_hardware(triton_rows):
    """On sm_90, in 16 bits: wgmma of 64 x 128 at least for most of what is multiplied, tiles copied
    by descriptor, and 64 operations for each byte from L2.
    """
    for row in triton_rows:
        hot = row["arch"] == 90 and row["case"].startswith(("bfloat16", "float16"))
        if not (hot and row["stages"] and of_product_operator(row["kernel"])):
            continue
        columns = {shape: int(shape.split("x")[1]) * n for shape, n in row["wgmma"].items()}
        wide = sum(n for shape, n in columns.items() if is_wide(shape))
        assert 0 < sum(columns.values()) <= 2 * wide, row
        assert row["tma"] and "4" not in row["copies"], row
        turns = [gpu_budget.CHANNELS if loop["inner"] else 1 for loop in row["loops"]]
        flops, size = (
            sum(n * loop[name] for n, loop in zip(turns, row["loops"], strict=True))
            for name in ("flops", "bytes")
        )
        assert flops >= gpu_budget.FLOPS_PER_BYTE * size, row


def is_wide(shape):
    """Whether a product of a warp group is at least 64 x 128."""
    rows, columns = map(int, shape.split("x"))
    return rows >= gpu_budget.WGMMA_ROWS and columns >= gpu_budget.WGMMA_COLUMNS


@pytest.mark.slow
def test_the_model_counts_these_kernels(triton_rows):
    """The gate's option --counts makes benchmarks/gpu_counts.json anew where code changes."""
    sizes = defaultdict(set)
    for row in triton_rows:
        sizes[row["kernel"], row["case"], row["arch"]].add(row["size"])
    for row in json.loads((ROOT / "benchmarks" / "gpu_counts.json").read_text()):
        if row["arch"] == 90:
            found = sizes[row["kernel"], row["case"], row["arch"]]
            assert any(abs(size - row["size"]) <= row["size"] // 5 for size in found), (row, found)


@pytest.mark.slow
def test_launches_fill_a_gpu_at_the_stated_shapes():
    """The launchers run on tensors without numbers; the last chunk of a call may be smaller."""
    largest = defaultdict(int)
    for row in triton_gate("--shapes"):
        place = row["case"], row["kernel"]
        largest[place] = max(largest[place], row["programs"])
        if row["kernel"] in gpu_budget.FEW_PROGRAMS:
            continue
        assert largest[place] >= gpu_budget.PROGRAMS, row
    assert {case for case, _ in largest} >= {
        "contrastive_loss 32768 x 512",
        "patch_text_similarity 4096 x 196 x 512",
    }


@pytest.mark.slow
def test_triton_products_are_what_they_should_be(triton_rows):
    """16-bit inputs go to tensor cores; exact float32 never rounds to tf32; addresses are 64-bit."""
    for row in triton_rows:
        if "patch_text" not in row["kernel"] or not row["stages"]:
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
        assert "2" not in row["loads"] or row["kernel"] in gpu_budget.NARROW_LOADS, row
        assert "1" not in row["loads"] or re.search("masked|pairs", row["case"]), (
            row
        )  # masks are bytes
        rare = row["kernel"] in gpu_budget.RARE
        assert rare or all(count >= 2 for count in row["stages"]), row
        # Such operands are turned on their way, four bytes at a time.
        turned = row["tensor_core"] == "wgmma" and row["tf32"] and row["copies"].get("4")
        assert not row["stages"] or row["tma"] or row["copies"].get("16") or turned, row
        products |= {row["kernel"]} if row["stages"] else set()
    parts = "dot|scores|cosines|products|pooled|similarities|projected"
    product = rf"\b(?:_(?:{parts})|tl\.dot)\("
    written = {name for name, body in written_kernels().items() if re.search(product, body)}
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
