"""Facts read from compiled GPU code: copies and products from Triton's intermediate code and PTX,
instructions from the machine code.
"""

from __future__ import annotations

import itertools
import json
import re
import struct
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

COPIES = ("ttg.async_copy_global_to_local", "ttng.async_tma_copy_global_to_local")
PRODUCTS = ("tt.dot ", "ttng.warp_group_dot ")
# Tensor cores, by the first letters of their instructions.
MMA = ("HGMMA", "HMMA", "DMMA", "IMMA", "QGMMA")


def resources(cubin: bytes, tool: Path) -> dict[str, int]:
    """Return registers and bytes of stack of a thread; what spills is on the stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {"registers": int(registers), "stack": int(stack)}


def code_size(cubin: bytes) -> int:
    """Return the instructions of a cubin, 16 bytes each, from the sizes of its sections."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * entry) for i in range(count)]
    strings = headers[names][4]
    found = 0
    for name, _, _, _, _, size in headers:
        if cubin.startswith(b".text.", strings + name):
            found += size // 16
    return found


def global_loads(ptx: str) -> Counter:
    """Return how many loads there are of each number of bytes."""
    found = Counter()
    pattern = r"ld\.global(?:\.(?!v\d)\w+)*?(?:\.v(\d))?\.[bfsu](\d+)"
    for vector, bits in re.findall(pattern, ptx):
        found[int(vector or 1) * int(bits) // 8] += 1
    return found


def asynchronous_copies(ptx: str) -> Counter:
    """Return how many copies to shared memory a thread starts, of each number of bytes."""
    pattern = r"cp\.async\.c[ag]\.shared\.global[^;]*?\], \[[^;]*?\], (0x[0-9a-f]+|\d+)"
    return Counter(int(size, 0) for size in re.findall(pattern, ptx))


def wgmma(ptx: str) -> Counter:
    """Return how many products of a warp group there are, by rows and columns: ``64x128``."""
    return Counter(f"{m}x{n}" for m, n in re.findall(r"wgmma\.mma_async\S*?\.m(\d+)n(\d+)k", ptx))


def tensor_core(ptx: str) -> str:
    """Return the instruction of the products."""
    return "wgmma" if "wgmma.mma" in ptx else "mma" if "mma.sync" in ptx else ""


def bulk_copies(ptx: str) -> int:
    """Return how many copies of whole tiles, by descriptor, there are."""
    return len(re.findall(r"cp\.async\.bulk\.tensor\S*global\.mbarrier", ptx))


def _size(shape: str) -> int:
    """Return the bytes of a type such as ``128x64xbf16``."""
    *sizes, kind = shape.split("x")
    count = int(kind.strip("abfi")) // 8
    for size in sizes:
        count *= int(size)
    return count


def _flops(line: str) -> int:
    """Return the operations of a product of two tiles."""
    shapes = re.findall(r"(?:memdesc|tensor)<(\d+)x(\d+)x\w+", line)
    return 2 * int(shapes[0][0]) * int(shapes[0][1]) * int(shapes[1][1])


def product_loops(ttgir: str) -> list[dict[str, int]]:
    """Return stages, operations and copied bytes of one turn of every loop that holds a product.

    The stages are 1 + the turns whose copies are started before the loop; 1 where a product waits
    for loads of its own turn. Copies under a condition count as those of every turn. ``inner`` is 0
    for a loop around another one with products, whose own are not counted to it.
    """
    found: list[dict[str, int]] = []
    loops: list[dict[str, int]] = []
    depth = 0
    before = 0
    for line in ttgir.splitlines():
        if "scf.for" in line:
            loop = {"depth": depth, "before": before, "copies": 0, "bytes": 0, "flops": 0}
            loops.append({**loop, "inner": 1})
            before = 0
        depth += line.count("{") - line.count("}")
        if any(copy in line for copy in COPIES):
            before += 1
            if loops:
                loops[-1]["copies"] += 1
                loops[-1]["bytes"] += _copied(line)
        if loops and any(product in line for product in PRODUCTS):
            loops[-1]["flops"] += _flops(line)
        if loops and depth <= loops[-1]["depth"]:
            loop = loops.pop()
            if loop["flops"]:
                ahead = loop["before"] // loop["copies"] if loop["copies"] else 0
                kept = {name: loop[name] for name in ("inner", "flops", "bytes")}
                found.append({"stages": 1 + ahead, **kept})
                for outer in loops:
                    outer["inner"] = 0
            before = 0
    return found


def _copied(line: str) -> int:
    """Return the bytes of a copy, by the type of its destination."""
    destination = line.split("->")[-1]
    return _size(re.search(r"<((?:\d+x)+[a-z]+\d+)", destination).group(1))


def instructions(sass: str) -> list[tuple[int, str, int | None]]:
    """Return address, name and, of a branch, the target of every instruction of one kernel."""
    pattern = r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);"
    found = []
    for address, name, rest in re.findall(pattern, sass, re.MULTILINE):
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        found.append((int(address, 16), name, int(target.group(1), 16) if target else None))
    return found


def _counted(part: list[tuple[int, str, int | None]]) -> dict[str, int]:
    """Return the instructions of a part of a kernel, and those that the model asks for."""
    names = [name for _, name, _ in part]
    return {
        "instructions": len(names),
        "mufu": sum(name.startswith("MUFU") for name in names),
        "mma": sum(name.startswith(MMA) for name in names),
    }


def counts(sass: str, by: str = "instructions") -> dict[str, dict[str, int]]:
    """Return the instructions of one ``step`` of the main loop, of what it does ``sometimes``, of
    what it does once a ``tile``, and of ``all`` of the kernel.

    The main loop is the innermost one with the most products, or where none has any, with the most
    of what ``by`` names; loops without any of that are looked over. What branches within it pass
    over is done sometimes; a part of it that is a quarter of the loop is the end of a tile, in a loop over the steps of all tiles. Where there is none, a tile is the
    rest of the loop around it, or of the kernel.
    """
    code = instructions(sass)
    loops = [(target, at) for at, _, target in code if target is not None and target < at]

    def inside(first: int, last: int) -> list[tuple[int, str, int | None]]:
        return [line for line in code if first <= line[0] <= last]

    found = {loop: _counted(inside(*loop)) for loop in loops}
    known = [loop for loop in loops if found[loop][by]]
    innermost = [
        loop
        for loop in known
        if not any(other != loop and loop[0] <= other[0] <= other[1] <= loop[1] for other in known)
    ]
    if not innermost:
        none = _counted([])
        return {"step": none, "sometimes": none, "tile": _counted(code), "all": _counted(code)}
    main = max(innermost, key=lambda loop: (found[loop]["mma"], found[loop][by]))
    passed = [
        inside(at + 16, target - 16)
        for at, _, target in inside(*main)
        if target is not None and at < target <= main[1] + 16
    ]
    tile = max(passed, key=len, default=[])
    if len(tile) < found[main]["instructions"] // 4:
        tile = []
    sometimes = {line for part in passed for line in part} - set(tile)
    step = [line for line in inside(*main) if line not in sometimes and line not in tile]
    if not tile:
        around = [loop for loop in loops if loop[0] <= main[0] and main[1] <= loop[1]]
        around.remove(main)
        outer = inside(*min(around, key=lambda loop: loop[1] - loop[0])) if around else code
        tile = [line for line in outer if not main[0] <= line[0] <= main[1]]
    return {
        "step": _counted(step),
        "sometimes": _counted(sorted(sometimes)),
        "tile": _counted(tile),
        "all": _counted(code),
    }


def write_counts(path: Path, found: list[dict]) -> None:
    """Write counts of kernels, in place of what the file had of them, ordered by name."""
    before = json.loads(path.read_text()) if path.exists() else []
    names = {row["kernel"] for row in found}
    rows = [row for row in before if row["kernel"] not in names] + found
    rows.sort(key=lambda row: (row["kernel"], row["case"]))
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f"[\n{lines}\n]\n")


def machine_code(path: Path | str, tool: Path, arch: str = "") -> dict[str, str]:
    """Return the machine code of every kernel of a file as text, by its (mangled) name."""
    command = [tool, "-sass", *(["-arch", arch] if arch else []), path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"\n\s*Function : ", text)[1:]
    return {part.split("\n", 1)[0]: part for part in parts}


def gaps_between_copies(sass: str) -> list[int]:
    """Return the instructions from one copy to shared memory to the next."""
    places = [i for i, line in enumerate(instructions(sass)) if line[1].startswith("LDGSTS")]
    return [b - a for a, b in itertools.pairwise(places)]
