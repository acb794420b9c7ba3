"""The walk of one picture, docs/walk.md: no question is asked twice on the way from a name to its
files.
"""

from collections import Counter

import pytest
from PIL import Image

import ovseg
from ovseg.cli.main import main
from ovseg.data.scenes import Scenes
from ovseg.inference import jobs, predictor, queries, reading
from ovseg.inference.rules.patches import PatchArgmax
from ovseg.inference.view import View
from ovseg.systems import base

ONCE = (
    "route",
    "check",
    "templates",
    "check_reading",
    "encode_labels",
    "read_image",
    "place",
    "encode",
    "label_map",
)


@pytest.fixture
def entered(monkeypatch):
    """How often each room was entered."""
    found = Counter()

    def watch(place, name, room=None):
        real = getattr(place, name)

        def counted(*arguments, **options):
            found[room or name] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(place, name, counted)

    for place in (queries, base):
        watch(place, "resolve_templates", "templates")
        watch(place, "check_reading")
    for place, name in (
        (predictor, "route"),
        (View, "check"),
        (queries, "encode_labels"),
        (reading, "read_image"),
        (reading, "place"),
        (predictor, "encode"),
        (PatchArgmax, "label_map"),
        (jobs, "fingerprint"),
    ):
        watch(place, name)
    return found


def test_every_room_is_entered_once(tmp_path, entered):
    Image.fromarray(Scenes("digits", "val", 1)[0].image).save(tmp_path / "a.png")
    line = [
        "segment",
        str(tmp_path / "a.png"),
        "--labels",
        "grass,gravel",
        "-m",
        "pacl_tiny",
        "-o",
        str(tmp_path / "out"),
    ]
    assert main(line) == 0
    assert entered == dict.fromkeys(ONCE, 1)  # and no weight is hashed for the journal
    entered.clear()
    ovseg.segment(tmp_path / "a.png", ["grass", "gravel"], model="pacl_tiny")
    assert entered == dict.fromkeys(ONCE, 1)


def test_a_folder_is_asked_for_once(tmp_path, entered):
    """What depends on the labels, the view and the model alone, whatever the number of pictures."""
    for i, scene in enumerate(Scenes("digits", "val", 20)[:]):
        Image.fromarray(scene.image).save(tmp_path / f"{i}.png")
    assert (
        main(
            [
                "segment",
                str(tmp_path),
                "--labels",
                "grass,gravel",
                "-m",
                "pacl_tiny",
                "-o",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    assert {
        name: entered[name]
        for name in ("route", "check", "templates", "check_reading", "fingerprint")
    } == dict.fromkeys(("route", "check", "templates", "check_reading", "fingerprint"), 1)
    assert entered["read_image"] == entered["label_map"] == 20


def test_the_journal_of_a_single_picture_counts_for_nothing(tmp_path, capsys):
    """It names the files that were written over, without a hash of the weights; a folder does the
    picture again.
    """
    for i, scene in enumerate(Scenes("digits", "val", 3)[:]):
        Image.fromarray(scene.image).save(tmp_path / f"{i}.png")
    more = [
        "--labels",
        "grass,gravel",
        "-m",
        "pacl_tiny",
        "-o",
        str(tmp_path / "out"),
        "--format",
        "json",
    ]
    assert main(["segment", str(tmp_path), *more]) == 0
    assert main(["segment", str(tmp_path / "0.png"), *more, "--background-threshold", "0.9"]) == 0
    capsys.readouterr()
    assert main(["segment", str(tmp_path), *more]) == 0
    assert "1 pictures into" in capsys.readouterr().out
