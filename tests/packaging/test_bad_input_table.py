"""The table of bad input in docs/testing.md is what the tests say, and the command that makes it finds what is wrong."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
COMMAND = [sys.executable, str(ROOT / "tests" / "bad_input_table.py")]
_spec = importlib.util.spec_from_file_location("bad_input_table", COMMAND[1])
bad_input_table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bad_input_table)


def test_the_page_is_up_to_date():
    done = subprocess.run([*COMMAND, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


MARKED = """
import pytest

@pytest.mark.bad_input("b", "one | two")
@pytest.mark.parametrize("x", range(3))
def test_a(x): pass

@pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.bad_input("a", "first")), 2])
def test_b(x): pass

@pytest.mark.bad_input({words})
def test_c(): pass
"""


@pytest.fixture
def page(tmp_path, monkeypatch):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{bad_input_table.BEGIN}\nold\n{bad_input_table.END}\nafter\n")
    monkeypatch.setattr(bad_input_table, "PAGE", path)
    monkeypatch.setattr(bad_input_table, "ROOT", tmp_path)
    return path


def test_it_counts_cases_by_area_and_kind(page, monkeypatch):
    cases = {("b", "one | two"): 3, ("a", "first"): 1, ("b", "x"): 1}
    monkeypatch.setattr(bad_input_table, "collect", lambda: cases)
    with pytest.raises(SystemExit, match="5 cases of bad input are marked; expected at least 120"):
        bad_input_table.main([])
    monkeypatch.setattr(bad_input_table, "FEWEST", 5)
    with pytest.raises(SystemExit, match="out of date"):
        bad_input_table.main(["--check"])
    bad_input_table.main([])
    assert page.read_text().splitlines() == [
        "before", bad_input_table.BEGIN, "5 cases of 3 kinds in 2 areas, all held:", "", "| area | what is wrong with the input | cases |",
        "|---|---|---|", "| a | first | 1 |", r"| b | one \| two | 3 |", "| b | x | 1 |", bad_input_table.END, "after"]  # fmt: skip
    bad_input_table.main(["--check"])


def test_it_collects_and_refuses_marks_without_words(tmp_path):
    def found(words):
        (tmp_path / "test_marked.py").write_text(MARKED.replace("{words}", words))
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = bad_input(area, what): x\n")
        code = f"import bad_input_table as t, pathlib; t.ROOT = pathlib.Path({str(tmp_path)!r}); print(dict(t.collect(t.ROOT)))"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests")

    assert found('"b", "x"').stdout.strip() == str({("b", "one | two"): 3, ("a", "first"): 1, ("b", "x"): 1})
    for words in ('"b"', '"b", ""'):
        refused = found(words)
        assert refused.returncode == 1 and "test_c" in refused.stderr and "expected bad_input(area, what)" in refused.stderr
    (tmp_path / "test_broken.py").write_text("import nothing_like_it\n")
    assert "the tests cannot be collected" in found('"b", "x"').stderr
