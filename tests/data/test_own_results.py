"""Results of earlier runs are no inputs of later ones; a user's own pictures are, whatever they are
called.
"""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ovseg.cli.main import main
from ovseg.data.benchmark_sets import SegmentationSet
from ovseg.data.check import check_set
from ovseg.data.folders import look
from ovseg.data.sources.base import ModelInputs
from ovseg.data.sources.folder import FolderPairs
from ovseg.evaluation.classification import ClassFolders
from ovseg.evaluation.plots import plot_bars
from ovseg.inference.segmentation import save_result
from ovseg.inference.sources import find_pictures
from ovseg.training.hooks import plot_loss

trial = pytest.mark.third_trial(4)
SEGMENT = ["-m", "pacl_tiny", "--labels", "grass,sand", "--format", "overlay,mask"]


def picture(path, side=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(side).integers(0, 255, (side, side, 3), np.uint8)).save(
        path
    )
    return path


def names(folder):
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


@trial
@pytest.mark.parametrize(
    "out,given", [(".", "."), (".", "*.png"), ("out", "."), ("out", "**/*.png")]
)
def test_the_same_command_again_finds_the_same_pictures(out, given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    assert main(["segment", given, *SEGMENT, "-o", out]) == 0
    first = names(tmp_path)
    assert len(first) == 7
    capsys.readouterr()
    assert (
        main(["segment", given, *SEGMENT[:-1], "mask", "-o", out, "--overwrite"]) == 0
    )  # of another format
    err = capsys.readouterr().err
    assert names(tmp_path) == first
    assert (
        err.count("4 results of earlier runs of ovseg are left out: ") == 1 and "a.mask.png" in err
    )


@trial
def test_a_users_own_picture_is_read_whatever_it_is_called(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a.overlay.png", "gallery.png", "loss.png", "x.mask.png", "step_00000001.png"):
        picture(tmp_path / "in" / name)
    assert (
        len(find_pictures(["in"])[0]) == len(find_pictures(["in/*"])[0]) == 5
        and capsys.readouterr().err == ""
    )
    assert main(["segment", "in", *SEGMENT, "-o", "o"]) == 0
    assert (tmp_path / "o" / "a.overlay.overlay.png").exists()
    # A result that is named is read: that was asked for.
    assert [source.name for source in find_pictures(["o/a.overlay.overlay.png"])[0]] == [
        "a.overlay.overlay"
    ]


@trial
def test_no_result_replaces_a_picture_that_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.png")
    before = picture(tmp_path / "a.overlay.png").read_bytes()
    assert main(["segment", ".", *SEGMENT, "-o", str(tmp_path)]) == 2
    assert (
        "the result of 'a.png' would be written over 'a.overlay.png', which is a picture to "
        "segment; expected another --out" in capsys.readouterr().err
    )
    assert (
        names(tmp_path) == ["a.overlay.png", "a.png"]
        and (tmp_path / "a.overlay.png").read_bytes() == before
    )


@trial
def test_the_journal_tells_results_that_bear_no_mark(tmp_path):
    result = picture(tmp_path / "out" / "deep" / "a.overlay.png")
    entry = {
        "name": "deep/a",
        "settings": "0",
        "source": [],
        "files": {"a.overlay.png": result.stat().st_size},
    }
    (tmp_path / "out" / "ovseg_segment.jsonl").write_text(json.dumps(entry))
    assert (
        look(tmp_path / "out").results == ["deep/a.overlay.png"]
        and look(tmp_path / "out").pictures == []
    )
    assert look(tmp_path / "out" / "deep").results == ["a.overlay.png"]
    picture(result, 40)  # the user has put another there
    assert look(tmp_path / "out").pictures == ["deep/a.overlay.png"]


@pytest.fixture
def run_inside(tmp_path):
    """Pairs, and in their folder what a run leaves: plots, galleries, a picture of validation, a
    lock, half a file.
    """
    for name in ("a", "b"):
        picture(tmp_path / "root" / "one" / f"{name}.png").with_suffix(".txt").write_text("grass")
    run = tmp_path / "root" / "run"
    image = Image.new("RGB", (20, 20))
    save_result(image, run / "gallery.png")
    save_result(image, run / "validation" / "step_00000010.png")
    (run / "log.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 0.5}\n')
    plot_loss(run / "log.jsonl", run / "loss.png")
    plot_bars({"a": 1.0}, run / "voc20_val.png", "shares")
    (run / ".ovseg.lock").write_text("{}")
    picture(run / ".part.4000000-0123abcd.x.png")
    return tmp_path / "root"


@trial
def test_what_a_run_leaves_in_a_folder_of_data_is_not_read(run_inside, tmp_path, capsys, caplog):
    seen = look(run_inside)
    assert seen.pictures == ["one/a.png", "one/b.png"] and len(seen.results) == 4
    assert seen.hidden == ["run/.part.4000000-0123abcd.x.png"]
    assert (
        f"{run_inside}: 4 results of earlier runs of ovseg are left out: run/gallery.png, "
        f"run/loss.png" in seen.left_out()[0]
    )
    assert "4 results of earlier runs" in look(run_inside / "run").found()
    assert (
        len(FolderPairs(run_inside, ModelInputs(32))) == 2
        and "4 results of earlier runs of ovseg are left out" in caplog.text
    )
    caplog.clear()
    classes = ClassFolders(run_inside)
    assert classes.labels.names == ("one",) and len(classes.items) == 2
    assert "1 folders hold results of ovseg and no picture, and are no classes: run" in caplog.text
    out = run_inside / "x.safetensors"
    for _ in range(2):
        assert (
            main(["data", "superpixels", str(run_inside), "--out", str(out), "--min-size", "4"])
            == 0
        )
        assert "2 pictures cut up" in capsys.readouterr().out


@trial
def test_results_among_the_pictures_of_a_benchmark(tmp_path, caplog):
    (tmp_path / "set.yaml").write_text(
        json.dumps(
            {
                "title": "mine",
                "classes": ["a", "b"],
                "background": False,
                "folders": ["set"],
                "images": "images/{}.png",
                "splits": {"val": {}},
                "masks": [{"path": "masks/{}.png", "values": {"start": 0}}],
            }
        )
    )
    picture(tmp_path / "set" / "images" / "a.png")
    (tmp_path / "set" / "masks").mkdir()
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "set" / "masks" / "a.png")
    save_result(Image.new("RGB", (4, 4)), tmp_path / "set" / "images" / "gallery.png")
    assert len(SegmentationSet(str(tmp_path / "set.yaml"), tmp_path)) == 1
    assert "1 results of earlier runs of ovseg are left out: gallery.png" in caplog.text
    # Masks that segment made are masks.
    shutil.copy(tmp_path / "set" / "masks" / "a.png", tmp_path / "m.png")
    save_result(Image.open(tmp_path / "m.png"), tmp_path / "set" / "masks" / "b.mask.png")
    problems = check_set(SegmentationSet(str(tmp_path / "set.yaml"), tmp_path)).problems
    assert any(problem.endswith("b.mask.png is a mask without a picture") for problem in problems)


@trial
def test_an_evaluation_inside_its_data(tmp_path, capsys):
    for name in ("grass", "sand"):
        picture(tmp_path / name / "a.png")
    found = []
    for _ in range(2):
        command = [
            "eval",
            "pacl_tiny",
            "--data",
            "imagefolder",
            "--root",
            str(tmp_path),
            "--out",
            str(tmp_path / "a_results"),
        ]
        assert main(command) == 0
        found.append(json.loads((tmp_path / "a_results" / "results.json").read_text())["results"])
    assert found[0] == found[1] and found[0][0]["summary"]["classes"] == 2
