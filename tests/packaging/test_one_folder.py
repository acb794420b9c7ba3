"""A system is one folder: where the folder of ZegCLIP is deleted, nothing else misses it."""

import os
import shutil
import subprocess
import sys
import textwrap

import pytest
from native_build import ROOT

pytestmark = pytest.mark.slow
WITHOUT = """
    import pathlib, ovseg
    from ovseg.cli.main import main
    from ovseg.systems import list_bundled
    from ovseg.evaluation.protocols import list_protocols
    from ovseg.systems.objective import list_objectives
    from ovseg.training.recipe import list_recipes, load_recipe

    assert pathlib.Path(ovseg.__file__).is_relative_to(pathlib.Path.cwd()), ovseg.__file__
    lists = [ovseg.list_models(), [name for name, tag in list_bundled()], list_objectives(), list_recipes(), list_protocols()]
    assert all(lists) and not any("zegclip" in name for names in lists for name in names), lists
    assert "pacl_tiny" in lists[0] and "pacl_scenes" in lists[3]
    for name in lists[3]:
        load_recipe(name)
    for name, tag in list_bundled():
        ovseg.create_model(name, tag)
    assert main(["models"]) == 0 and main(["info"]) == 0
"""


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """A copy of the tree without ZegCLIP's folder."""
    copy = tmp_path_factory.mktemp("without")
    for name in ("ovseg", "ovseg_kernels", "tests"):
        left_out = shutil.ignore_patterns(
            "__pycache__", "zegclip" if name == "ovseg" else "golden", "cuda_emulation"
        )
        shutil.copytree(ROOT / name, copy / name, ignore=left_out)
    (copy / "tests" / "cuda_emulation").mkdir()
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def python(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_package_works_without_a_system(without):
    said = python(without, "-W", "ignore", "-c", textwrap.dedent(WITHOUT))
    assert "segclip_tiny" in said and "zegclip" not in said


def test_the_other_systems_pass_their_tests(without):
    run = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0")
    said = python(
        without,
        *run,
        "tests/packaging/test_structure.py",
        "tests/models/test_systems.py",
        "-k",
        "structure or pacl or segclip",
    )
    assert " passed" in said and "failed" not in said
