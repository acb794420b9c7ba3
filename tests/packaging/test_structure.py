"""What the layers of the model package promise each other, beside the directions of imports that
import-linter holds.
"""

import re

from native_build import ROOT


def sources(*left_out):
    for path in sorted((ROOT / "ovseg").rglob("*.py")):
        name = path.relative_to(ROOT / "ovseg").as_posix()
        if not name.startswith(left_out):
            yield name, path.read_text()


def test_towers_are_known_to_systems_alone():
    reached = [
        name
        for name, text in sources("systems/", "nn/", "weights/saving.py")
        if re.search(r"(?<!init)\.backbone\b", text)
    ]
    assert not reached


def test_ranks_are_known_to_one_file():
    """Everybody else asks ``ovseg.distributed``; objectives get a group and hand it on."""
    asked = re.compile(r"^\s*(import|from) torch\.distributed", re.MULTILINE)
    known = [name for name, text in sources("distributed.py", "systems/") if asked.search(text)]
    allowed = {
        "training/gradients.py",
        "training/trainer.py",
        "training/state.py",
    }  # wrappers of DDP and FSDP2
    assert set(known) <= allowed, known


def test_rules_do_not_ask_which_system_it_is():
    asking = [
        name
        for name, text in sources("systems/", "nn/")
        if re.search(r"isinstance\(\w*model\w*, (?!str|\(?torch)", text)
    ]
    assert not asking


def test_library_code_does_not_print():
    printing = [name for name, text in sources("cli/") if re.search(r"^\s*print\(", text, re.M)]
    assert not printing


def test_files_of_the_package_are_short():
    assert not {name: count for name, text in sources() if (count := len(text.splitlines())) > 500}


def test_no_two_test_files_have_one_name():
    """pytest would collect only the first of them, here without packages."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(set(names)) == len(names)
