"""`ovseg demo --data photos` on a drawn folder of the same layout: rows, tables, going on, what is
missing.
"""

import json
import shutil

import photographs
import pytest
from PIL import Image

from ovseg.cli.main import main
from ovseg.evaluation import photos as results
from ovseg.training import feature_cache, photos, trainer
from ovseg.training.recipe import load_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    photographs.trunk(folder / "trunk.safetensors")
    return photographs.draw(folder / "root")


@pytest.fixture(autouse=True)
def no_curve_of_each_run(monkeypatch):
    monkeypatch.setattr(trainer, "plot_loss", lambda *values, **options: None)


def command(place, out, *more):
    line = ["demo", "--data", "photos", "--root", str(place), "--out", str(out), "--quiet"]
    overrides = photographs.small(place.parent / "trunk.safetensors")
    return [*line, "--steps", "2", *more, "--override", *overrides]


def test_all_rows(place, tmp_path, capsys, monkeypatch):
    """Every row trains and is measured; the trunk sees each picture once, whoever trains on it."""
    out = tmp_path / "out"
    encoded = []
    encode = feature_cache._Filling._encode
    monkeypatch.setattr(
        feature_cache._Filling,
        "_encode",
        lambda self, batch: (encoded.extend(batch.numbers), encode(self, batch)),
    )
    assert main(command(place, out)) == 0
    shown = capsys.readouterr().out
    rows = photos.photo_rows()
    tree = json.loads((out / "results.json").read_text())
    assert [run["row"] for run in tree["runs"]] == [row.title for row in rows] and len(rows) == 7
    for run in tree["runs"]:
        assert run["training_seconds"] > 0 and run["peak_megabytes"] > 100
        assert {"miou", "pixel_accuracy", "first_name_right"} <= set(run["voc14"]["summary"])
        assert run["voc21"]["partial"] == "6 of 1449" and len(run["voc21"]["classes"]) == 21
        assert run["coco32"]["partial"] == "4 of 5000"
    assert [run["row"] for run in tree["runs"] if run["supervised"]] == [rows[-1].title]
    assert tree["protocols"]["voc21"]["protocol"].startswith("stuff")
    for row in rows:
        assert f"| {row.title} | 1 |" in shown and row.title in (out / "classes.md").read_text()
    for name in results.FILES:
        assert (out / name).exists() and str(out / name) in shown
    assert Image.open(out / "pictures.png").width > 300
    # Captions and names, captions, masks: one folder each, for PACL and MGCA alike.
    assert len(list((out / "cache").iterdir())) == 3
    assert len(encoded) == 20 + 6 + 4
    recipe = load_recipe(out / "pacl_self" / "seed_0" / "config.yaml")
    assert [stage["name"] for stage in recipe.stages] == ["words", "self-training"]
    assert not load_recipe(out / "pacl" / "seed_0" / "config.yaml").stages
    # A second time nothing is trained or measured: the tables are made anew.
    monkeypatch.setattr(trainer, "train", None)
    monkeypatch.setattr(results.PhotoResults, "measure", None)
    monkeypatch.setattr(results.PhotoResults, "draw", lambda self: [])
    assert main(command(place, out)) == 0
    assert capsys.readouterr().out == shown
    assert main([*command(place, out), "optim.lr=1"]) == 2
    assert "was begun with other settings" in capsys.readouterr().err
    assert main(command(place, out, "--limit", "2")) == 2
    assert "was made with other pictures (limit None" in capsys.readouterr().err


def test_a_stopped_demo_goes_on_seed_by_seed(place, tmp_path, capsys, monkeypatch):
    real = trainer.train
    folders = []

    def until_third(recipe, folder, **options):
        folders.append(folder)
        if len(folders) == 3:
            raise KeyboardInterrupt
        return real(recipe, folder, **options)

    monkeypatch.setattr(trainer, "train", until_third)
    out = tmp_path / "out"
    line = command(place, out, "--rows", "masks,pacl", "--seeds", "0,3", "--limit", "2")
    assert main(line) == 130
    rows = json.loads((out / "results.json").read_text())["runs"]
    assert [(row["row"][:4], row["seed"]) for row in rows] == [("PACL", 0), ("280 ", 0)]
    damaged = out / "masks" / "seed_0" / "measures.json"
    whole = damaged.read_text()
    damaged.write_text("{")
    assert main(line) == 1 and "measures.json is damaged" in capsys.readouterr().err
    damaged.write_text(whole)
    assert main(line) == 0
    assert [folder.name for folder in folders] == ["seed_0", "seed_0", *["seed_3"] * 3]
    found = json.loads((out / "results.json").read_text())
    ious = [
        run["voc21"]["summary"]["occurring_miou"] for run in found["runs"] if run["row"][0] == "P"
    ]
    mean, deviation = found["means"]["PACL, captions and names"]["voc21 occurring_miou"]
    assert mean == pytest.approx(sum(ious) / 2, abs=0.01)
    assert deviation == pytest.approx(abs(ious[0] - ious[1]) / 2**0.5, abs=0.01)
    assert f"| {mean:.1f} ± {deviation:.1f} |" in (out / "table.md").read_text()


def test_without_masks_of_coco(place, tmp_path, capsys):
    root = tmp_path / "root"
    shutil.copytree(place, root, ignore=shutil.ignore_patterns("coco_masks"))
    line = command(root, tmp_path / "out", "--rows", "masks", "--limit", "1")
    shutil.copy(place.parent / "trunk.safetensors", tmp_path)
    assert main(line) == 0
    captured = capsys.readouterr()
    assert "coco_masks does not exist: nothing is measured on coco32" in captured.err
    assert "coco32" not in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.bad_input("cli", "demo on photographs")
@pytest.mark.parametrize(
    "change,message",
    [
        (["--root", "none"], "--root 'none' does not exist; expected a folder of photographs"),
        (["--root", "."], "lacks coco_captions/annotations, which these rows need: image_level, "),
        (["--rows", "pacl,nothing"], "--rows names 'nothing'; expected some of image_level, pacl_"),
        (["--seeds", "0,x"], "--seeds is '0,x'; expected numbers, such as 0,1,2"),
        (["--seeds", "1,1"], "--seeds is [1, 1]; expected different numbers"),
        (["--seeds=-1"], "--seeds is -1; expected"),
        (["--steps", "1", "2"], "--steps holds 2 numbers; expected one on photographs"),
        (["--scenes", "3"], "--scenes is given and --data is 'photos'; expected it with digits or"),
        (["--data", "digits"], "--root is given and --data is 'digits'; expected it with photos"),
        (["--override", "no.key=1"], "no: unknown key"),
        (["--override", "data.root=x", "x"], "override 'x'; expected key=value"),
    ],
)
def test_what_cannot_be_followed(place, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    line = ["demo", "--data", "photos", "--root", str(place), "--out", str(tmp_path / "out")]
    assert main([*line, *change]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").rglob("config.yaml"))
    assert main(["demo", "--data", "photos"]) == 2
    assert "--root is missing; expected the folder of the photographs" in capsys.readouterr().err


def test_parts_that_are_not_needed_may_be_missing(place, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(place, root, ignore=shutil.ignore_patterns("voc_names"))
    assert len(photos.PhotoJob(root, tmp_path / "out", names=["pacl_captions", "masks"]).runs) == 2
    with pytest.raises(RuntimeError, match=r"lacks voc_names/names.tsv, which .*: pacl; expected"):
        photos.PhotoJob(root, tmp_path / "out", names=["pacl", "masks"])
