"""The faults of scripts/faults can all be planted in the source as it is; whether each is caught,
`make faults` shows.
"""

import sys

import pytest
from native_build import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from plant_faults import Fault, NotPlanted, faults, planted


def test_planted_faults_can_still_be_planted():
    found, lost = faults(), []
    for fault in found:
        source = (ROOT / fault.file).read_text()
        try:
            if planted(fault, source) == source:
                lost.append(f"{fault.name}: it changes nothing")
        except NotPlanted as error:
            lost.append(f"{fault.name}: {error}")
        if not (ROOT / fault.folder).exists():
            lost.append(f"{fault.name}: there is no {fault.folder}")
    assert not lost, "\n".join(lost)
    assert len({fault.name for fault in found}) == len(found) >= 100


PYTHON = """
def other(a, b):
    return a + b

class Sum:
    def of(self, a, b):
        names = [ 'x',
                  "y" ]
        if a > b: print( a,
                         end = '' )
        return (a
                + b)
"""


@pytest.mark.parametrize(
    "right,wrong,expected",
    [
        ("a + b", "a - b", "return (\n                (a - b))"),
        ('["x", "y"]', "[]", "names = ([])"),
        ('end=""', 'end="!"', 'end="!" )'),
        ('print(a, end="")', "pass", "if a > b: pass"),
        ("return a + b", "return 0", "return 0\n"),
    ],
)
def test_python_is_found_however_it_is_laid_out(right, wrong, expected):
    fault = Fault("", "x.py", right, wrong, within="Sum.of")
    found = planted(fault, PYTHON)
    assert "".join(expected.split()) in "".join(found.split()) and "return a + b\n\nclass" in found
    assert planted(Fault("", "x.py", right, wrong, within="of"), PYTHON) == found


def test_cuda_is_found_however_it_is_laid_out():
    source = "f(a , b); // f(a,b)\nvoid g() {\n  f( a, /* the first */\n    b );\n  wait<1>();\n}\n"
    fault = Fault("", "x.cu", "f(a, b);", "f(b, a);", within="void g()")
    assert (
        planted(fault, source) == "f(a , b); // f(a,b)\nvoid g() {\n  f(b, a);\n  wait<1>();\n}\n"
    )


@pytest.mark.parametrize(
    "fault",
    [
        Fault("", "x.py", "a * b", "a", within="of"),
        Fault("", "x.py", "a + b", "a", within="Sum.to"),
        Fault("", "x.py", "a > b", "pass", within="of"),
        Fault("", "x.cu", "a * b", "a"),
    ],
    ids=["no expression", "no function", "no Python", "no tokens"],
)
def test_what_cannot_be_planted_is_said(fault):
    with pytest.raises(NotPlanted):
        planted(fault, PYTHON)
