"""Print the folders of `ovseg` at a revision as a Markdown table: modules, lines, imports.

    .venv/bin/python scripts/structure.py c002b1a      the structure before
    .venv/bin/python scripts/structure.py HEAD         the structure after

Lines are counted after `ruff format` at 100 columns, whatever the revision was formatted at; what
it does not wrap, docstrings, comments and texts, counts as the lines that it would fill.
"""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path, PurePosixPath

WIDTH = 100
RUFF = str(Path(sys.executable).with_name("ruff"))
FORMAT = (RUFF, "format", "--isolated", "--line-length", str(WIDTH), "-")


def output(*command, text=None):
    """Return what a command prints."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return done.stdout


def imported(tree, parts):
    """Yield the folders of `ovseg` that a module imports from, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or "ovseg" in str(node.module)):
            base = parts[: len(parts) - node.level] if node.level else ()
            whole = (*base, *(node.module or "").split("."))
            whole = tuple(part for part in whole if part)
            for name in node.names:
                target = whole if len(whole) > 1 else (*whole, name.name)
                if target[0] == "ovseg" and len(target) > 1:
                    yield target[1]


def main(revision):
    """Print the table of a revision."""
    names = output("git", "ls-tree", "-r", "--name-only", revision, "ovseg").splitlines()
    sources = [PurePosixPath(name) for name in names if name.endswith(".py")]
    folders = {path.parts[1] for path in sources if len(path.parts) > 2}
    modules, lines, arrows = defaultdict(int), defaultdict(int), defaultdict(set)
    for path in sources:
        source = output("git", "show", f"{revision}:{path}")
        at = path.parts[1] if len(path.parts) > 2 else "(beside)"
        modules[at] += 1
        formatted = output(*FORMAT, text=source).splitlines()
        lines[at] += sum(max(1, -(-len(line) // WIDTH)) for line in formatted)
        arrows[at] |= {name for name in imported(ast.parse(source), path.parts) if name in folders}
    print("| folder | modules | lines | imports from |\n|---|---|---|---|")
    for at in sorted(modules, key=lambda name: (len(arrows[name] - {name}), name)):
        print(f"| {at} | {modules[at]} | {lines[at]} | {', '.join(sorted(arrows[at] - {at}))} |")
    print(f"| all | {sum(modules.values())} | {sum(lines.values())} | |")


if __name__ == "__main__":
    main(sys.argv[1])
