"""What an evaluation says before anybody believes its figures: thresholds without background, files
in no class, bad protocols.
"""

import numpy as np
import pytest
from miniatures import make
from PIL import Image

import ovseg
from ovseg.cli.main import main
from ovseg.data.benchmark_sets import describe
from ovseg.errors import ConfigError
from ovseg.evaluation.evaluate import evaluate
from ovseg.evaluation.protocols import protocol
from ovseg.evaluation.scenes import SceneSet


def bad(what):
    return pytest.mark.bad_input("data", what)


@pytest.fixture(scope="module")
def model():
    return ovseg.create_model("pacl_tiny", "digits")


@pytest.mark.parametrize(
    "options,said",
    [
        pytest.param(
            {"background_threshold": 0.9},
            "the winner scores below 0.9",
            marks=bad("background threshold without background"),
        ),
        pytest.param(
            {"background_entropy": 0.1, "scale": 10.0},
            "entropy above 0.1 nats",
            marks=bad("a background entropy on such a set"),
        ),
        pytest.param(
            {"background": ("wall",)},
            "one of 1 background texts wins",
            marks=bad("background texts on such a set"),
        ),
        ({}, None),
    ],
)
def test_no_label_where_there_is_no_background_is_told(model, options, said, caplog):
    data = SceneSet("digits", 2)
    report = evaluate(model, data, protocol("plain", data.description, model, **options))
    told = f"digits has no background class, and pixels get no label where {said}: they all count as wrong"
    assert (told in caplog.text) == (said is not None) and (
        "no background class" in caplog.text
    ) == (said is not None)
    if "background_threshold" in options:
        assert report.summary["miou"] == 0
    caplog.clear()
    things = SceneSet("digits_things", 2)
    evaluate(model, things, protocol("plain", things.description, model, **options))
    assert "no background class" not in caplog.text


def test_the_command_tells_it(tmp_path, capsys, caplog):
    command = [
        "eval",
        "pacl_tiny",
        "--data",
        "digits",
        "--scenes",
        "2",
        "--background-threshold",
        "0.9",
    ]
    assert (
        main(command) == 0
        and "digits has no background class" in caplog.text + capsys.readouterr().err
    )


@bad("words of the background that are classes, in a published protocol")
def test_a_published_protocol_with_a_class_among_its_background(model, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "title: mine\nversion: 1\nsource: me\nbackground: [wall, bed, sky]\n"
    )
    chosen = protocol(str(tmp_path / "mine.yaml"), describe("coco_object"), model)
    choices = chosen.choices(model, describe("coco_object"))
    assert chosen.queries.background == ("wall", "sky") and choices["background_texts"] == [
        "wall",
        "sky",
    ]
    assert choices["notes"] == ["left out of the background, being classes: bed"]
    chosen.predictor(model).set_image(np.zeros((48, 48, 3), np.uint8)).predict()


@pytest.mark.parametrize(
    "name,message",
    [
        pytest.param(
            "stray.png",
            "stray.png: a picture in no class's folder",
            marks=bad("imagefolder: a picture beside the class folders"),
        ),
        pytest.param(
            "cat/a.heic",
            "pictures that end in .heic are not read",
            marks=bad("imagefolder: a format that is not read"),
        ),
    ],
)
def test_pictures_that_are_in_no_class_end_it_or_are_left_out(tmp_path, name, message, capsys):
    for one in ("cat/0.png", "dog/0.png"):
        (tmp_path / one).parent.mkdir()
        Image.new("RGB", (48, 48)).save(tmp_path / one)
    (tmp_path / name).write_bytes((tmp_path / "cat/0.png").read_bytes())
    command = ["eval", "pacl_tiny", "--data", "imagefolder", "--root", str(tmp_path)]
    assert (
        main(command) in (1, 2)
        and message in (said := capsys.readouterr().err)
        and "--skip-bad" in said
    )
    assert (
        main([*command, "--skip-bad"]) == 3
        and f"left out: {tmp_path}" in (printed := capsys.readouterr().out)
        and message in printed
    )


@pytest.mark.parametrize(
    "data,message",
    [
        pytest.param(
            b"[" * 100_000, "nested too deeply", marks=bad("a protocol of 100 000 nested brackets")
        ),
        pytest.param(
            b"title: caf\xe9", "is no UTF-8 text", marks=bad("a protocol that is not UTF-8")
        ),
        pytest.param(
            b"like: {name}", "is like itself", marks=bad("a protocol that is like itself")
        ),
        pytest.param(
            b"[title, version]", "describes no protocol", marks=bad("a protocol that is a list")
        ),
        pytest.param(b"42", "describes no protocol", marks=bad("a protocol that is a number")),
        pytest.param(None, "is a folder", marks=bad("a protocol that is a folder")),
    ],
)
def test_protocols_that_cannot_be_read(model, tmp_path, data, message):
    path = tmp_path / "mine.yaml"
    path.mkdir() if data is None else path.write_bytes(data.replace(b"{name}", str(path).encode()))
    with pytest.raises(ConfigError, match=message):
        protocol(str(path), describe("voc20"), model)


@bad("keys that stand twice in a list, evaluated")
def test_a_picture_counts_once(model, tmp_path):
    from ovseg.data.benchmark_sets import SegmentationSet

    make(tmp_path, "voc20", 2)
    path = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
    path.write_text(path.read_text() + "2008_000000\n")
    data = SegmentationSet("voc20", tmp_path)
    assert evaluate(model, data, protocol("plain", data.description, model)).pictures == 2
