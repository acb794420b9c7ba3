"""The table of docs/testing.md: which kinds of bad input the suite holds, by area, and in how many cases.

    python tests/bad_input_table.py            writes it
    python tests/bad_input_table.py --check    fails if it is out of date, or holds fewer than 120 cases

A test, or a case of one, says what it holds by ``@pytest.mark.bad_input(area, what)``. The tests are collected, not run.
"""

import argparse
import contextlib
import io
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "testing.md"
BEGIN, END = "<!-- bad input -->", "<!-- /bad input -->"
FEWEST = 120


class Collected:
    """A plugin of pytest that counts marked cases.

    Attributes:
        cases: (area, what) -> how many.
        wrong: marks without the two words.
    """

    def __init__(self):
        self.cases = Counter()
        self.wrong = []

    def pytest_collection_finish(self, session):
        for item in session.items:
            for mark in item.iter_markers("bad_input"):
                if len(mark.args) == 2 and not mark.kwargs and all(isinstance(word, str) and word.strip() for word in mark.args):
                    self.cases[mark.args] += 1
                else:
                    self.wrong.append(f"{item.nodeid}: bad_input{mark.args}; expected bad_input(area, what)")


def collect(folder=ROOT / "tests"):
    """The marked cases below ``folder``."""
    found, printed = Collected(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", str(folder)], plugins=[found])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        sys.exit(f"the tests cannot be collected:\n{printed.getvalue()[-4000:]}")
    if found.wrong:
        sys.exit("\n".join(found.wrong))
    return found.cases


def table(cases):
    """Markdown, one row for an area and a kind."""
    areas = {area for area, _ in cases}
    lines = [f"{sum(cases.values())} cases of {len(cases)} kinds in {len(areas)} areas, all held:", "",
             "| area | what is wrong with the input | cases |", "|---|---|---|"]
    for (area, what), count in sorted(cases.items()):
        lines.append(f"| {area} | {what.replace('|', chr(92) + '|')} | {count} |")
    return "\n".join(lines)


def with_table(page, rows):
    """The page with ``rows`` between the marks."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        sys.exit(f"{PAGE} holds {page.count(BEGIN)} times {BEGIN} and {page.count(END)} times {END}; expected one of each")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{rows}\n{END}{rest.split(END)[1]}"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    cases = collect()
    if sum(cases.values()) < FEWEST:
        sys.exit(f"{sum(cases.values())} cases of bad input are marked; expected at least {FEWEST}")
    page = PAGE.read_text("utf-8")
    fresh = with_table(page, table(cases))
    if options.check:
        if fresh != page:
            sys.exit(f"the table of {PAGE.relative_to(ROOT)} is out of date; expected what python tests/bad_input_table.py writes")
    else:
        PAGE.write_text(fresh, "utf-8")
    print(f"{sum(cases.values())} cases of {len(cases)} kinds")


if __name__ == "__main__":
    main()
