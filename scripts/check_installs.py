"""Install the package in every documented way, each in a fresh virtual environment, and print a
table: way, result, seconds.

    python scripts/check_installs.py                                    all ways; some minutes
    python scripts/check_installs.py isolated stock wheel bare          some; .ci/run does these
    python scripts/check_installs.py --download isolated                with torch, some gigabytes

Run it with the Python of an environment that has torch. Torch and what it needs are then shown to
the fresh environments in place of a download: a folder of links to the installed packages, named by
a .pth file. To a build in isolation pip installs a wheel that holds nothing but such a .pth file,
under torch's name and version. Everything else is installed as a user would. --download does
without both.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLD_SETUPTOOLS = "65.5.0"  # of a new environment of Python 3.11
_TOOLS = (
    "setuptools",
    "wheel",
    "pip",
    "cmake",
    "ninja",
)  # are installed, or missing, as the way has it
_OPERATORS = """
import torch, ovseg_kernels as ok
x = ok.patch_text_similarity(torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4))
x.sum().backward()
print(ok.__file__, ok.explain("patch_text_similarity").backend)
"""


class Failed(Exception):
    """A command that did not do what the way promises."""


@dataclass
class Place:
    """The folders and environments that a check works in.

    Attributes:
        folder: for everything it makes.
        source: a copy of the checkout, so that nothing is left in it.
        shown: the folder of links to torch; None with --download.
        native: the ways that build the native library; others are told to leave it out.
        environments: those made so far, by way.
    """

    folder: Path
    source: Path
    shown: Path | None
    native: tuple[str, ...]
    environments: dict[str, Path] = field(default_factory=dict)

    def environment(self, way: str, *packages: str) -> Path:
        """Make a fresh environment with ``packages``; returns its Python."""
        folder = self.folder / f"env_{way}"
        venv.create(folder, with_pip=True, symlinks=os.name != "nt")
        python = folder / "bin" / "python"
        self.environments[way] = python
        if self.shown is not None:
            site = Path(
                run(
                    [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
                ).strip()
            )
            (site / "shown_torch.pth").write_text(f"{self.shown}\n")
        else:
            pip(python, "install", "torch", "numpy")
        if packages:
            pip(python, "install", *packages)
        return python

    def variables(self, way: str) -> dict[str, str]:
        """Return the environment variables of a build: no CUDA, none of this checkout's builds."""
        found = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("OVSEG_", "PYTHONPATH"))
        }
        found |= {"FORCE_CUDA": "0", "CUDA_VISIBLE_DEVICES": ""}
        return found | ({} if way in self.native else {"OVSEG_BUILD_NATIVE": "0"})


def run(command: list, *, fails: bool = False, **options) -> str:
    """Run a command; returns what it wrote, both streams.

    Raises:
        Failed: if it fails, or with ``fails`` if it does not.
    """
    done = subprocess.run(
        [str(word) for word in command],
        text=True,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )
    if (done.returncode != 0) != fails:
        raise Failed(
            f"exit code {done.returncode} of {' '.join(map(str, command))}\n{done.stdout[-4000:]}"
        )
    return done.stdout


def pip(python: Path, *arguments: str | Path, **options) -> str:
    return run([python, "-m", "pip", "--disable-pip-version-check", *arguments], **options)


# ---- the ways


def isolated(place: Place) -> str:
    """pip install ."""
    python = place.environment("isolated")
    variables = place.variables("isolated")
    if place.shown is not None:
        variables |= _stand_in(place)
    pip(python, "install", place.source, env=variables)
    return _operators(python)


def stock(place: Place) -> str:
    """pip install --no-build-isolation . beside setuptools 65.5, without wheel, cmake and ninja"""
    python = place.environment("stock")
    found = run([python, "-m", "pip", "list", "--format=freeze"])
    if f"setuptools=={OLD_SETUPTOOLS}" not in found:  # a later Python, whose environments have none
        pip(python, "install", f"setuptools=={OLD_SETUPTOOLS}")
    bare_path = {"PATH": str(python.parent)}
    pip(
        python,
        "install",
        "--no-build-isolation",
        place.source,
        env=place.variables("stock") | bare_path,
    )
    return _operators(python)


def prepared(place: Place) -> str:
    """pip install 'setuptools>=77' cmake ninja, then pip install --no-build-isolation ."""
    python = place.environment("prepared", "setuptools>=77", "cmake", "ninja")
    pip(
        python,
        "install",
        "--no-build-isolation",
        place.source,
        env=_with_tools(place, "prepared", python),
    )
    return _operators(python)


def wheel(place: Place) -> str:
    """pip wheel --no-deps ., and the wheel installed in another environment"""
    tools = ("cmake", "ninja") if "wheel" in place.native else ()
    builder = place.environment("wheel_builder", "setuptools>=77", *tools)
    dist = place.folder / "dist_wheel"
    pip(
        builder,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        dist,
        place.source,
        env=_with_tools(place, "wheel", builder),
    )
    python = place.environment("wheel")
    pip(python, "install", next(dist.glob("*.whl")))
    return _operators(python)


def sdist(place: Place) -> str:
    """python -m build --sdist, and pip install --no-build-isolation of the archive"""
    python = place.environment("sdist", "setuptools>=77", "cmake", "ninja", "build")
    dist = place.folder / "dist_sdist"
    run(
        [python, "-m", "build", "--sdist", "--no-isolation", "--outdir", dist, place.source],
        env=_with_tools(place, "sdist", python),
    )
    archive = next(dist.glob("*.tar.gz"))
    pip(python, "install", "--no-build-isolation", archive, env=_with_tools(place, "sdist", python))
    return f"{_operators(python)}; archive of {archive.stat().st_size / 1e6:.1f} MB"


def editable(place: Place) -> str:
    """pip install --no-build-isolation -e ."""
    python = place.environment("editable", "setuptools>=77", "cmake", "ninja")
    copy = place.folder / "editable"
    shutil.copytree(place.source, copy)
    pip(
        python,
        "install",
        "--no-build-isolation",
        "-e",
        copy,
        env=_with_tools(place, "editable", python),
    )
    told = _operators(python)
    where = run([python, "-c", "import ovseg; print(ovseg.__file__)"], cwd=place.folder).strip()
    if not Path(where).is_relative_to(copy):
        raise Failed(f"ovseg is imported from {where}; expected the copy of the checkout")
    return told


def bare(place: Place) -> str:
    """no extras: the operators work, and the commands say in a sentence what they need"""
    python = next(
        (
            place.environments[way]
            for way in ("isolated", "wheel", "prepared")
            if way in place.environments
        ),
        None,
    )
    if python is None:
        wheel(place)
        python = place.environments["wheel"]
    ovseg = python.parent / "ovseg"
    for arguments in (["--version"], ["--help"], ["info"]):
        run([ovseg, *arguments], cwd=place.folder)
    told = run([ovseg, "segment", "picture.png"], fails=True, cwd=place.folder)
    sentence = (
        r"ovseg segment: needs \w+, which is not installed: pip install 'ovseg-kernels\[models\]'\n"
    )
    if not re.fullmatch(sentence, told):
        raise Failed(f"ovseg segment without [models] says {told!r}")
    return told.strip()


def models(place: Place) -> str:
    """pip install '.[models]', and ovseg segment --demo"""
    python = _with_extra(place, "models")
    run(
        [python.parent / "ovseg", "segment", "--demo", "-o", place.folder / "segmented"],
        cwd=place.folder,
    )
    return "ovseg segment --demo"


def train(place: Place) -> str:
    """pip install '.[train]', and two steps with their loss curve"""
    python = _with_extra(place, "train")
    folder = place.folder / "run"
    run(
        [
            python.parent / "ovseg",
            "train",
            "clip_scenes",
            f"run={folder}",
            "train.steps=2",
            "data.train_size=64",
        ],
        cwd=place.folder,
    )
    if not (folder / "loss.png").exists():
        raise Failed("ovseg train drew no loss curve")
    return "ovseg train, with loss.png"


WAYS: dict[str, Callable[[Place], str]] = {
    way.__name__: way
    for way in (isolated, stock, prepared, wheel, sdist, editable, bare, models, train)
}


def _with_tools(place: Place, way: str, python: Path) -> dict[str, str]:
    """The variables of a build with the cmake and ninja of the environment, as where it is
    activated.
    """
    variables = place.variables(way)
    return variables | {"PATH": f"{python.parent}{os.pathsep}{variables['PATH']}"}


def _with_extra(place: Place, extra: str) -> Path:
    python = place.environment(extra, "setuptools>=77", "cmake", "ninja")
    pip(
        python,
        "install",
        "--no-build-isolation",
        "-c",
        place.source / "constraints.txt",
        f"{place.source}[{extra}]",
        env=_with_tools(place, extra, python),
    )
    return python


def _operators(python: Path) -> str:
    """Run an operator and its backward away from the checkout, and the command; returns which
    backend answered.
    """
    told = run([python, "-W", "ignore", "-c", _OPERATORS], cwd="/").split()
    run([python.parent / "ovseg", "--version"], cwd="/")
    return f"operators by {told[-1]}"


# ---- torch, shown
def _needed(
    name: str, found: dict[str, importlib.metadata.Distribution], *, extras: bool = False
) -> None:
    """Add to ``found`` a distribution and what it requires here, without the tools of builds.

    Args:
        extras: what its extras require too: torch asks for cuda-toolkit[cublas,cudart,...].
    """
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in found or key in _TOOLS:
        return
    try:
        found[key] = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return  # of another platform
    for requirement in found[key].requires or ():
        if extras or "extra ==" not in requirement:
            name = re.split(r"[\s<>=!~;(]", requirement, maxsplit=1)[0]
            _needed(name.partition("[")[0], found, extras="[" in name)


def show_torch(folder: Path) -> Path:
    """Fill ``folder`` with links to torch, numpy and what they need, files and metadata, as they
    are installed here.
    """
    found: dict[str, importlib.metadata.Distribution] = {}
    for name in ("torch", "numpy"):
        _needed(name, found)
    for distribution in found.values():
        tops = {
            path.parts[0]
            for path in distribution.files or ()
            if path.parts[0] not in ("..", "__pycache__")
        }
        for top in tops:
            target = Path(str(distribution.locate_file(top)))
            if target.exists() and not (folder / top).exists():
                (folder / top).symlink_to(target)
    return folder


def _stand_in(place: Place) -> dict[str, str]:
    """Make a wheel of torch's name and version that shows the installed one; returns the variables
    by which pip takes it.
    """
    version = f"{importlib.metadata.version('torch').partition('+')[0]}+shown"
    wheels = place.folder / "stand_in"
    wheels.mkdir()
    info = f"torch-{version}.dist-info"
    files = {
        "shown_torch.pth": f"{place.shown}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: check_installs\nRoot-Is-Purelib: "
        "true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(wheels / f"torch-{version}-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
        archive.writestr(f"{info}/RECORD", record)
    constraint = wheels / "constraints.txt"
    constraint.write_text(f"torch=={version}\n")
    links = " ".join(filter(None, (os.environ.get("PIP_FIND_LINKS"), str(wheels))))
    # From 25.3 on pip has a variable of its own for the environments of builds.
    return {
        "PIP_FIND_LINKS": links,
        "PIP_CONSTRAINT": str(constraint),
        "PIP_BUILD_CONSTRAINT": str(constraint),
    }


# ---- the table
def copy_of_checkout(folder: Path) -> Path:
    """Copy what git tracks, and what it would; all but builds where there is no git."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        ignored = shutil.ignore_patterns(
            ".*", "build", "dist", "*.so", "build_info.json", "*.egg-info", "__pycache__"
        )
        return Path(shutil.copytree(ROOT, folder, ignore=ignored))
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = ["| way | what | result | s |", "|---|---|---|---|"]
    lines += [
        f"| {row['way']} | {row['what']} | {row['result']} | {row['seconds']} |" for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """Run the ways that are asked for; 1 if one of them fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "ways", nargs="*", metavar="WAY", help=f"of {', '.join(WAYS)} (default: all)"
    )
    parser.add_argument(
        "--native",
        default=",".join(WAYS),
        metavar="WAYS",
        help="ways that build the native library, comma-separated (default: all)",
    )
    parser.add_argument("--download", action="store_true", help="take torch from the index")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    native = tuple(options.native.split(","))
    for way in (*options.ways, *filter(None, native)):
        if way not in WAYS:
            parser.error(f"way is {way!r}; expected some of {', '.join(WAYS)}")
    rows: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="installs.") as name:
        folder = Path(name)
        (folder / "shown").mkdir()
        shown = None if options.download else show_torch(folder / "shown")
        place = Place(folder, copy_of_checkout(folder / "source"), shown, native)
        for way in options.ways or WAYS:
            began = time.monotonic()
            row = {"way": way, "what": WAYS[way].__doc__, "passed": True}
            try:
                row["result"] = WAYS[way](place)
            except Failed as error:
                print(f"{way}: {error}", file=sys.stderr)
                row |= {"passed": False, "result": f"FAILED: {str(error).splitlines()[0]}"}
            row["seconds"] = round(time.monotonic() - began)
            rows.append(row)
            print(f"{way}: {row['result']}, {row['seconds']} s", file=sys.stderr, flush=True)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
