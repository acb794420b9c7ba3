"""scripts/first_real_run.py: to its end on random weights; its facts decide its exit code; without
weights it says so.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("open_clip", reason="open_clip is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")
PATH = Path(__file__).parents[2] / "scripts" / "first_real_run.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("first_real_run", PATH)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["first_real_run"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["first_real_run"]


def test_random_weights_run_to_the_end(script, tmp_path, capsys):
    assert script.main(["--random-weights", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["picture"] for row in found["pictures"]] == list(script.PHOTOGRAPHS) and len(
        script.PHOTOGRAPHS
    ) == 10
    assert all(row["holds"] is None and row["picture_s"] > 0 for row in found["pictures"])
    page = (tmp_path / "index.html").read_text()
    assert all(
        (tmp_path / f"{name}.png").is_file() and f'src="{name}.png"' in page
        for name in script.PHOTOGRAPHS
    )
    assert (tmp_path / "table.md").read_text().count("not checked") == 10
    assert "facts not checked: random weights know nothing" in capsys.readouterr().out


def test_facts_are_shares_of_regions(script):
    labels = np.zeros((10, 20), dtype=int)
    labels[5:, 10:] = 1
    assert script.Fact("b", (0.5, 0.5, 1, 1)).seen(labels, ["a", "b"]) == 1
    assert script.Fact("b", script.WHOLE).seen(labels, ["a", "b"]) == 0.25
    for names, facts in script.PHOTOGRAPHS.values():
        assert facts and all(
            fact.label in names
            and fact.region[0] < fact.region[2]
            and fact.region[1] < fact.region[3]
            for fact in facts
        )


def test_a_fact_that_does_not_hold_is_an_exit_code(script, tmp_path, monkeypatch, capsys):
    import ovseg

    small = ovseg.create_model("clip_dense", architecture=script.SMALL)
    monkeypatch.setattr("ovseg.systems.default_model", lambda **_: small)
    wrong = {"chelsea": (["cat", "wall"], [script.Fact("cat", script.WHOLE, 1.1)])}
    monkeypatch.setattr(script, "PHOTOGRAPHS", wrong)
    assert script.main(["--out", str(tmp_path)]) == 1
    assert (
        "that do not hold: chelsea" in capsys.readouterr().out
        and "DOES NOT HOLD" in (tmp_path / "table.md").read_text()
    )
    monkeypatch.setattr(
        script,
        "PHOTOGRAPHS",
        {"chelsea": (["cat", "wall"], [script.Fact("cat", script.WHOLE, 0.0)])},
    )
    assert script.main(["--out", str(tmp_path)]) == 0 and "facts hold" in capsys.readouterr().out


@pytest.mark.bad_input("command line", "weights that cannot be had")
def test_without_weights(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert script.main(["--out", str(tmp_path / "out")]) == 2
    assert "is not in the cache" in capsys.readouterr().err
