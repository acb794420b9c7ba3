"""Breaks the kernels, and the systems built on them, on purpose, one fault at a time, and shows
that the suite notices each.

    python scripts/plant_faults.py             # all; half a minute a fault and more
    python scripts/plant_faults.py mask norm   # those whose name holds one of the words
    python scripts/plant_faults.py system      # those in the systems, inference and evaluation
    python scripts/plant_faults.py data:       # those in loader, sources and augmentation
    python scripts/plant_faults.py --green     # the suite is green on this tree
    python scripts/plant_faults.py --green --from "wrong tail"    # go on with this one
    python scripts/plant_faults.py --dry       # plant all, run nothing

The list is scripts/faults/*.yaml. The tool works on a copy of the tracked files. A fault that no
test notices, or whose place is no longer in the source, makes the exit status 1.

A fault is planted by what the code says and not by how it is laid out. In Python it is an
expression, a statement or a keyword argument, compared as ``ast`` reads it, the first such in the
function or class ``within``, which is the end of a qualified name. In C++ and CUDA it is a row of
tokens, the first after those of ``within``; comments and white space do not count.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
LISTS = ROOT / "scripts" / "faults"


@dataclass(frozen=True)
class Fault:
    """In ``file``, the first ``right`` in or after ``within`` becomes ``wrong``; those of
    ``folder`` that match ``tests`` go red.

    Attributes:
        name: unique; ``area: what`` outside the first operators.
        file: the path in the repository.
        within: a function or class of a Python file, or tokens of another; empty for the whole
            file.
        folder: of tests, or a file of them.
        tests: an expression for ``pytest -k``; empty for all.
    """

    name: str
    file: str
    right: str
    wrong: str
    within: str = ""
    folder: str = "tests/ops"
    tests: str = ""


class NotPlanted(Exception):
    """The source holds no such place."""


def faults(folder: Path = LISTS) -> list[Fault]:
    """The whole list, file by file."""
    return [
        Fault(**entry)
        for path in sorted(folder.glob("*.yaml"))
        for entry in yaml.safe_load(path.read_text("utf-8"))
    ]


def planted(fault: Fault, source: str) -> str:
    """``source`` with the fault in it.

    Raises:
        NotPlanted: if there is no place for it, or the result is no Python.
    """
    if not fault.file.endswith(".py"):
        begin, end = _place_among_tokens(fault, source)
        return source[:begin] + fault.wrong + source[end:]
    begin, end, wrapped = _place_in_python(fault, source)
    wrong = f"({fault.wrong})" if wrapped else fault.wrong
    data = source.encode()  # ast counts bytes
    result = (data[:begin] + wrong.encode() + data[end:]).decode()
    try:
        ast.parse(result)
    except SyntaxError as error:
        raise NotPlanted(
            f"{fault.file} is no Python with {fault.wrong!r} in it: {error}"
        ) from error
    return result


def _place_in_python(fault: Fault, source: str) -> tuple[int, int, bool]:
    """Where ``right`` begins and ends, in bytes, and whether it is an expression that another takes
    the place of.
    """
    tree = ast.parse(source)
    scopes = list(_named(tree, fault.within)) if fault.within else [tree]
    if not scopes:
        raise NotPlanted(f"{fault.file} has no function or class {fault.within!r}")
    wanted, expression = _node_of(fault.right)
    kind = (type(wanted), ast.keyword)
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for scope in scopes:
        same = [
            node
            for node in ast.walk(scope)
            if isinstance(node, kind) and _said(node) == _said(wanted)
        ]
        if same:
            first = min(same, key=lambda node: (node.lineno, node.col_offset))
            wrapped = expression and _node_of(fault.wrong)[1]
            return (
                starts[first.lineno - 1] + first.col_offset,
                starts[first.end_lineno - 1] + first.end_col_offset,
                wrapped,
            )
    raise NotPlanted(
        f"{fault.within or 'the module'} of {fault.file} no longer holds {fault.right!r}"
    )


def _named(scope: ast.AST, wanted: str, prefix: str = "") -> Iterator[ast.AST]:
    """The functions and classes whose qualified name ends with ``wanted``, from the outside in."""
    for node in ast.iter_child_nodes(scope):
        inner = prefix
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inner = f"{prefix}.{node.name}"
            if inner.endswith(f".{wanted}"):
                yield node
        yield from _named(node, wanted, inner)


def _node_of(code: str) -> tuple[ast.AST, bool]:
    """The expression or statement that ``code`` is, and whether it is the first; a keyword argument
    reads as an assignment.
    """
    try:
        return ast.parse(code, mode="eval").body, True
    except SyntaxError:
        pass
    try:
        body = ast.parse(code).body
    except SyntaxError:
        body = []
    if len(body) != 1:
        raise ValueError(f"{code!r} is not one expression or statement")
    return body[0], False


def _said(node: ast.AST) -> str:
    """The node as text, without its place and without whether it is read or written; ``x=1`` in a
    call as elsewhere.
    """
    if isinstance(node, ast.keyword) and node.arg is not None:
        node = ast.Assign(targets=[ast.Name(id=node.arg)], value=node.value)
    return re.sub(r", ctx=\w+\(\)", "", ast.dump(node))


_TOKENS = re.compile(
    r'//[^\n]*|/\*.*?\*/|\\\n|"(?:\\.|[^"\\\n])*"|[A-Za-z_]\w*|\.?\d[\w.]*|\S', re.DOTALL
)


def _tokens(code: str) -> list[re.Match]:
    return [
        match for match in _TOKENS.finditer(code) if not match[0].startswith(("//", "/*", "\\\n"))
    ]


def _place_among_tokens(fault: Fault, source: str) -> tuple[int, int]:
    there = _tokens(source)
    words = [match[0] for match in there]
    at = 0
    for wanted in filter(None, (fault.within, fault.right)):
        row = [match[0] for match in _tokens(wanted)]
        found = (i for i in range(at, len(words) - len(row) + 1) if words[i : i + len(row)] == row)
        at = next(found, -1)
        if at < 0:
            raise NotPlanted(f"{fault.file} no longer holds {wanted!r}")
    return there[at].start(), there[at + len(row) - 1].end()


def copy_tree(to: Path) -> None:
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).exists():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    for path in (ROOT / "ovseg_kernels").glob("_C_*.so"):
        shutil.copy2(path, to / "ovseg_kernels" / path.name)


def build_cpu(tree: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests'); from native_build import cmake; from pathlib "
        "import Path\n"
        "cmake(Path('build/cpu')); import shutil; shutil.copy2('build/cpu/lib/_C_cpu.so', "
        "'ovseg_kernels/_C_cpu.so')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)


def suite(tree: Path, folder: str, tests: str) -> tuple[bool, str]:
    """(green, the first failure) of the tests of ``folder`` in ``tree``."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        folder,
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "--no-header",
        "-k",
        tests,
    ]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1, 5) or (done.returncode == 1 and not failed):
        raise RuntimeError(f"the suite did not run:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.returncode != 1, failed.group(1) if failed else ""


def selections(fault: Fault) -> list[str]:
    """The tests of the operator that is broken, which mostly notice, and then all."""
    operator = re.match(r"(?:csrc/|ovseg_kernels/\w+/)(\w+)(?:/|\.py)", fault.file)
    own = fault.folder == "tests/ops" and operator is not None and operator[1] != "common"
    return (
        [" and ".join(filter(None, (f"({fault.tests})" if fault.tests else "", operator[1])))]
        if own
        else []
    ) + [fault.tests]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words", nargs="*", help="faults whose name holds one of them; all if there is none"
    )
    parser.add_argument(
        "--green", action="store_true", help="do not run the suite without a fault first"
    )
    parser.add_argument("--dry", action="store_true", help="plant each and run nothing")
    parser.add_argument(
        "--from", dest="first", metavar="NAME", help="leave out the faults before this one"
    )
    options = parser.parse_args(arguments)
    chosen = [
        f
        for f in faults()
        if not options.words or any(word.lower() in f.name.lower() for word in options.words)
    ]
    if options.first is not None:
        names = [fault.name for fault in chosen]
        if options.first not in names:
            parser.error(f"--from is {options.first!r}; expected one of {', '.join(names)}")
        chosen = chosen[names.index(options.first) :]
    missed = 0
    with tempfile.TemporaryDirectory() as copy:
        tree = Path(copy)
        copy_tree(tree)
        for folder, tests in sorted(
            set() if options.green or options.dry else {(f.folder, f.tests) for f in chosen}
        ):
            green, failed = suite(tree, folder, tests)
            if not green:
                print(f"the suite is red before any fault is planted: {failed}")
                return 1
        for fault in chosen:
            path, began = tree / fault.file, time.perf_counter()
            source = path.read_text()
            try:
                broken = planted(fault, source)
            except NotPlanted as error:
                print(f"{fault.name:34} NOT PLANTED: {error}")
                missed += 1
                continue
            if options.dry:
                continue
            path.write_text(broken)
            if fault.file.endswith("_cpu.cpp"):
                build_cpu(tree)
            for tests in selections(fault):
                green, failed = suite(tree, fault.folder, tests)
                if not green:
                    break
            print(
                f"{fault.name:34} {'MISSED' if green else 'caught by ' + failed} "
                f"({time.perf_counter() - began:.0f} s)",
                flush=True,
            )
            missed += green
            path.write_text(source)
            if fault.file.endswith("_cpu.cpp"):
                build_cpu(tree)
    print(
        f"{len(chosen) - missed} of {len(chosen)} {'can be planted' if options.dry else 'caught'}"
    )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
