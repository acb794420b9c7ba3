"""A benchmark set is one file: made once as CONTRIBUTING.md says, with two classes and four
pictures on disk.
"""

import json

import numpy as np
import pytest
from PIL import Image

from ovseg.cli.main import main
from ovseg.data.benchmark_sets import SETS, SegmentationSet, describe
from ovseg.data.check import check_set
from ovseg.data.class_lists import class_list
from ovseg.data.scene_drawing import background

DESCRIPTION = """\
title: a throw-away set, grass beside gravel
folders: [throw_away]
images: "images/{}.png"
masks:
  - {path: "masks/{}.png", values: {start: 1, ignore: [0]}}
splits:
  val: {list: val.txt, count: 4}
background: false
classes: [grass, stones]
texts: {stones: gravel}
shares: {grass: 0.5, stones: 0.5}
"""


@pytest.fixture
def throw_away(tmp_path):
    """The set, found by its name; in the package its file lies in ovseg/data/sets."""
    folder = tmp_path / "root" / "throw_away"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    truth = np.repeat([[1] * 24 + [2] * 24], 48, 0).astype(np.uint8)
    truth[:2] = 0  # nothing is said about the upper edge
    for i in range(4):
        halves = [
            background("digits", stuff, 48, "val", rng)[:, :24] for stuff in ("grass", "gravel")
        ]
        Image.fromarray(np.concatenate(halves, 1)).save(folder / "images" / f"{i}.png")
        Image.fromarray(truth).save(folder / "masks" / f"{i}.png")
    (folder / "val.txt").write_text("".join(f"{i}\n" for i in range(4)))
    path = tmp_path / "throw_away.yaml"
    path.write_text(DESCRIPTION)
    SETS.register("throw_away", path)
    yield tmp_path / "root"
    SETS.unregister("throw_away")


def test_a_new_benchmark_set_is_one_file(throw_away, tmp_path, capsys):
    assert main(["data", "list"]) == 0 and "throw_away" in capsys.readouterr().out
    data = SegmentationSet("throw_away", throw_away)
    assert len(data) == data.expected == 4 and set(np.unique(data[0][1])) == {-1, 0, 1}
    assert not check_set(data).wrong and check_set(data).shift == 0
    assert describe("throw_away").label_set.texts == (("grass",), ("gravel",)) and class_list(
        "throw_away"
    ).names == ("grass", "stones")
    line = [
        "eval",
        "clip_dense_tiny",
        "--data",
        "throw_away",
        "--root",
        str(throw_away),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(line) == 0 and "throw_away" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]
    assert (
        found["pictures"] == 4
        and set(found["classes"]) == {"grass", "stones"}
        and found["summary"]["miou"] > 60
    )
    assert np.sum(found["confusion"]) == 4 * 46 * 48  # the upper edge is not counted
