"""`ovseg demo --data photos` on a drawn folder of the same layout: rows, tables, going on, what is
missing.
"""

import json
import shutil

import numpy as np
import photographs
import pytest
import torch
from PIL import Image

import ovseg
from ovseg.cli.main import main
from ovseg.evaluation import photos as results
from ovseg.training import photos, trainer
from ovseg.training.recipe import load_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    photographs.trunk(folder / "trunk.safetensors")
    return photographs.draw(folder / "root")


def command(place, out, *more):
    line = ["demo", "--data", "photos", "--root", str(place), "--out", str(out), "--quiet"]
    overrides = photographs.small(place.parent / "trunk.safetensors")
    return [*line, "--steps", "2", *more, "--override", *overrides]


def test_all_rows(place, tmp_path, capsys, monkeypatch):
    """Every row trains and is measured; the trunk sees a picture once for all that train on it."""
    out = tmp_path / "out"
    assert main(command(place, out)) == 0
    shown = capsys.readouterr().out
    rows = photos.photo_rows()
    assert len(rows) == 7
    tree = json.loads((out / "results.json").read_text())
    assert [run["row"] for run in tree["runs"]] == [row.title for row in rows]
    for run in tree["runs"]:
        assert run["training_seconds"] > 0 and run["peak_megabytes"] > 100
        assert {"miou", "pixel_accuracy", "first_name_right"} <= set(run["voc14"]["summary"])
        assert run["voc21"]["partial"] == "6 of 1449" and len(run["voc21"]["classes"]) == 21
        assert run["coco32"]["partial"] == "4 of 5000"
    assert tree["protocols"]["voc21"]["protocol"].startswith("stuff")
    for row in rows:
        assert f"| {row.title} | 1 |" in shown and row.title in (out / "classes.md").read_text()
    for name in results.FILES:
        assert (out / name).exists() and str(out / name) in shown
    assert Image.open(out / "pictures.png").width > 300
    # Captions, captions and names, masks.
    assert len(list((out / "cache").iterdir())) == 3
    two = json.loads((out / "pacl_self" / "seed_0" / "config.yaml.json").read_text()) if 0 else None
    assert two is None
    steps = {
        row.folder: len(load_recipe(out / row.folder / "seed_0" / "config.yaml").stages)
        for row in rows
    }
    assert steps["pacl"] == 0 and steps["pacl_self"] == 2
    # A second time nothing is trained or measured: the tables are made anew.
    monkeypatch.setattr(trainer, "train", None)
    monkeypatch.setattr(results.PhotoResults, "measure", None)
    assert main(command(place, out)) == 0
    assert capsys.readouterr().out == shown
    assert main([*command(place, out), "optim.lr=1"]) == 2
    assert "was begun with other settings" in capsys.readouterr().err
    assert main([*command(place, out, "--limit", "2")]) == 2
    assert "was made with other pictures (limit None" in capsys.readouterr().err
