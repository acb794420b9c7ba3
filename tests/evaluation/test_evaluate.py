"""Evaluation end to end on miniature benchmarks: figures against torchmetrics, protocols, sweeps,
bad files, two processes.
"""

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from miniatures import LAYOUTS, make
from PIL import Image
from torchmetrics.functional.classification import multiclass_jaccard_index

import ovseg
from ovseg.cli.main import main
from ovseg.data.benchmark_sets import SegmentationSet, describe
from ovseg.data.labels import LabelSet
from ovseg.data.scenes import Scenes
from ovseg.errors import ConfigError, DataError, InputError
from ovseg.evaluation.evaluate import evaluate
from ovseg.evaluation.protocols import list_protocols, protocol
from ovseg.evaluation.scenes import SceneSet, evaluate_scenes
from ovseg.inference import Predictor

CHOICES = (
    "protocol",
    "source",
    "classes",
    "background",
    "class_texts",
    "template_texts",
    "text_mean",
    "synonyms",
    "resize",
    "seen",
    "normalisation",
    "dtype",
    "decision",
    "scores",
    "bias",
    "present_only",
    "metric",
    "settings",
)


@pytest.fixture(scope="module")
def model():
    return ovseg.create_model("pacl_tiny", "digits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model that is fast: the command's cost is not the network's."""
    torch.manual_seed(0)
    small = ovseg.create_model(
        "clip_dense_tiny", backbone={"width": 16, "embed_dim": 16, "local_depth": 1}
    )
    return ovseg.save_pretrained(small, tmp_path_factory.mktemp("model") / "small")


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_command_on_every_layout(folder, tmp_path, name, capsys):
    truths = make(tmp_path, name)
    out = tmp_path / "out"
    assert (
        main(
            [
                "eval",
                str(folder),
                "--data",
                name,
                "--root",
                str(tmp_path),
                "--out",
                str(out),
                "--boundary",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    tree = json.loads((out / "results.json").read_text())
    found = tree["results"][0]
    assert (
        all(key in found["protocol"] for key in CHOICES)
        and "template_texts" in printed
        and tree["command"]["data"] == name
    )
    data = SegmentationSet(name, tmp_path)
    model, about = ovseg.from_pretrained(folder), data.description
    predictor = Predictor(
        model, about.label_set, background=("background",) if about.background else ()
    )
    guesses = np.stack(
        [predictor.set_image(data[i][0]).predict().labels + int(about.background) for i in range(4)]
    )
    guesses, truths = torch.from_numpy(guesses).long(), torch.from_numpy(truths)
    expected = multiclass_jaccard_index(
        guesses, truths, about.number, average="none", ignore_index=-1
    )
    ious = [found["classes"][c]["iou"] or 0.0 for c in about.classes]
    np.testing.assert_allclose(ious, 100 * expected.numpy(), atol=0.006)
    known = [row["iou"] for row in found["classes"].values() if row["iou"] is not None]
    assert (
        found["summary"]["miou"] == pytest.approx(np.mean(known), abs=0.01)
        and found["pictures"] == 4
    )
    assert (out / "gallery.png").is_file() and len(
        (out / "classes.csv").read_text().splitlines()
    ) == about.number + 1
    unseen = about.unseen
    assert ("hiou" in found["summary"]) == bool(unseen)


@pytest.mark.bad_input("evaluation", "pictures and masks that cannot be read")
def test_bad_files_end_it_or_are_left_out_and_named(folder, tmp_path, capsys):
    make(tmp_path, "voc20", 5)
    masks = tmp_path / "VOCdevkit/VOC2012/SegmentationClass"
    (masks / "2008_000001.png").unlink()
    (masks / "2008_000003.png").write_bytes(b"junk")
    command = [
        "eval",
        str(folder),
        "--data",
        "voc20",
        "--root",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(command) == 1
    assert (
        "2008_000001.png is missing; --skip-bad leaves such pictures out" in capsys.readouterr().err
    )
    assert main([*command, "--skip-bad"]) == 3
    printed = capsys.readouterr().out
    assert printed.count("left out:") == 2 and "2008_000003.png" in printed
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]
    assert found["pictures"] == 3 and len(found["skipped"]) == 2
    shutil.rmtree(tmp_path / "VOCdevkit/VOC2012/JPEGImages")
    assert main([*command, "--skip-bad"]) == 1
    assert "none of 5 pictures could be used" in capsys.readouterr().err


@pytest.mark.third_trial(15)
def test_what_is_left_out_is_told_once_for_all_models(folder, tmp_path, capsys):
    make(tmp_path, "voc20", 2)
    (tmp_path / "VOCdevkit/VOC2012/SegmentationClass/2008_000001.png").unlink()
    assert (
        main(
            [
                "eval",
                str(folder),
                "pacl_tiny",
                "--data",
                "voc20",
                "--root",
                str(tmp_path),
                "--skip-bad",
            ]
        )
        == 3
    )
    assert capsys.readouterr().out.count("left out:") == 1


@pytest.mark.bad_input("evaluation", "pictures and masks of too many pixels")
def test_one_limit_of_pixels(folder, tmp_path, capsys, monkeypatch):
    """``--max-pixels`` is that of the pictures, of the masks and of what is seen; Pillow's own does
    not act.
    """
    make(tmp_path, "voc20", 3)
    command = ["eval", str(folder), "--data", "voc20", "--root", str(tmp_path)]
    assert (
        main([*command, "--max-pixels", "2399"]) == 1
        and "is 60x40 = 2400 pixels; the limit is 2399" in capsys.readouterr().err
    )
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert main([*command, "--max-pixels", "400000000"]) == 0
    monkeypatch.setattr(
        "ovseg.data.benchmark_sets.read_image",
        lambda path, max_pixels: Image.open(path).convert("RGB"),
    )
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(DataError, match=r"mask .* is 60x40; the limit is 2399 pixels"):
        SegmentationSet("voc20", tmp_path, max_pixels=2399)[0]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def one_and_two(command, tmp_path, code=0):
    """The results of one process and of two."""
    assert main([*command, "--out", str(tmp_path / "one")]) == code
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    line = [sys.executable, "-m", "ovseg", *command, "--out", str(tmp_path / "two")]
    children = [
        subprocess.Popen(
            line, stdout=subprocess.PIPE, text=True, env={**os.environ, **place, "RANK": str(rank)}
        )
        for rank in range(2)
    ]
    printed = [child.communicate(timeout=120)[0] for child in children]
    assert (
        [child.returncode for child in children] == [code] * 2
        and "mIoU" in printed[0]
        and printed[1] == ""
    )
    return [
        json.loads((tmp_path / name / "results.json").read_text())["results"][0]
        for name in ("one", "two")
    ]


def test_two_processes_count_what_one_counts(folder, tmp_path):
    """A picture that cannot be read among them."""
    make(tmp_path, "voc21", 7)
    (tmp_path / "VOCdevkit/VOC2012/SegmentationClass/2008_000004.png").write_bytes(b"junk")
    command = [
        "eval",
        str(folder),
        "--data",
        "voc21",
        "--root",
        str(tmp_path),
        "--boundary",
        "--sweep",
        "--skip-bad",
    ]
    one, two = one_and_two(command, tmp_path, 3)
    assert one == two and one["pictures"] == 6


def test_two_processes_classify_what_one_classifies(tmp_path):
    one, two = one_and_two(
        ["eval", "clip_dense_tiny", "--data", "digits", "--scenes", "7"], tmp_path
    )
    assert one == two and one["summary"]["classification"] not in (
        0,
        100,
    )  # the hits of one process alone would give another share


def test_sweep_is_each_threshold_on_its_own(model):
    data = SceneSet("digits_things", 6)
    thresholds = np.array([-0.2, 0.1, 0.25, 0.4, 0.9])
    chosen = protocol("plain", data.description, model)
    report = evaluate(model, data, chosen, thresholds=thresholds)
    for threshold, miou in zip(*report.sweep, strict=True):
        one = evaluate(
            model,
            data,
            protocol("plain", data.description, model, background_threshold=float(threshold)),
        )
        assert one.scores.miou == pytest.approx(miou, abs=1e-9)
    best = report.summary["best_threshold"]
    assert best in thresholds and report.summary["best_miou"] == round(
        float(report.sweep[1].max()), 2
    )
    # The protocol's own threshold still makes the plain figures.
    both = evaluate(
        model,
        data,
        protocol("plain", data.description, model, background_threshold=0.25),
        thresholds=thresholds,
    )
    assert (
        both.scores.miou == pytest.approx(report.sweep[1][2])
        and both.sweep[1].tolist() == report.sweep[1].tolist()
    )
    with pytest.raises(InputError, match="has no background class"):
        evaluate(
            model,
            SceneSet("digits", 2),
            protocol("plain", SceneSet("digits", 2).description, model),
            thresholds=thresholds,
        )


def test_present_only_lets_no_absent_class_win(model):
    data = SceneSet("digits", 8)
    chosen = protocol("plain", data.description, model, present_only=True)
    report = evaluate(model, data, chosen, keep=8)
    assert all(
        set(np.unique(guess)) <= set(np.unique(truth)) for _, truth, guess in report.examples
    )
    assert report.choices["present_only"] and chosen.label == "plain v1*"
    assert (
        report.scores.miou
        > evaluate(model, data, protocol("plain", data.description, model)).scores.miou
    )


@pytest.mark.parametrize("name", list_protocols())
def test_protocols_are_whole(model, name):
    """For each data set they name: labels of the right number, nothing left open, and the values
    that papers give.
    """
    from ovseg.evaluation.protocols import read_protocol

    tree = read_protocol(name)
    grouping = ovseg.create_model("pacl_tiny")
    grouping.decision = tree.get("model", "patches")
    for data in tree["data"] or ("voc21", "ade150"):
        about = describe(data)
        chosen = protocol(name, about, grouping)
        choices = chosen.choices(grouping, about)
        assert (
            len(chosen.labels) == about.number - about.background
            and set(CHOICES) <= set(choices)
            and chosen.label.endswith("v1")
        )
        assert about.background == (choices["background"] != "none: its pixels are not counted")
        assert choices["background"] != "never predicted"
        json.dumps(choices)
        assert not set(chosen.queries.background) & set(chosen.labels.queries)
    if grouping.decision == "groups":
        with pytest.raises(
            ConfigError, match="is made for models that label groups and pacl_tiny labels patches"
        ):
            protocol(name, describe("voc21"), model)


def test_protocols_hold_what_papers_give(model):
    voc21, stuff = describe("voc21"), describe("coco_stuff")
    sclip = protocol("sclip", voc21, model)
    assert (sclip.view.short_side, sclip.view.crop, sclip.view.stride, sclip.decision.scale) == (
        336,
        224,
        112,
        65,
    )
    assert (
        sclip.decision.background_threshold,
        sclip.decision.area_threshold,
        len(sclip.queries.background),
    ) == (0.1, 0.1, 26)
    texts = dict(zip(sclip.labels.names, sclip.labels.texts, strict=True))
    assert len(texts["person"]) == 7 and texts["boat"] == ("ship",) and texts["cat"] == ("cat",)
    assert protocol("sclip", describe("context60"), model).queries.background == ("background",)
    assert protocol("sclip", stuff, model).view.short_side == 448
    masks = ovseg.create_model("zegclip_tiny")
    zeg = protocol("zegclip", stuff, masks)
    assert (
        len(zeg.decision.bias) == 156
        and set(zeg.decision.bias.values()) == {-0.1}
        and "cow" not in zeg.decision.bias
    )
    assert len(zeg.choices(masks, stuff)["template_texts"]) == 15 and (
        zeg.view.crop,
        zeg.view.stride,
    ) == (512, 426)
    assert set(protocol("zegclip_transductive", stuff, masks).decision.bias.values()) == {0.0}
    context = protocol("zegclip", describe("context60_zeroshot"), masks)
    assert (
        len(context.decision.bias) == 50
        and context.decision.bias["background"] == -0.1
        and not context.queries.background
    )
    assert (
        protocol("naclip", voc21, model).view.crop is None
        and protocol("clearclip", voc21, model).view.short_side == 448
    )
    grouping = ovseg.create_model("pacl_tiny")
    grouping.decision = "groups"
    for name, thresholds in (
        ("groupvit", (0.95, 0.35, 0.95)),
        ("segclip", (0.8, 0.25, 0.65)),
        ("ovsegmentor", (0.95, 0.35, 0.9)),
    ):
        found = [
            protocol(name, describe(data), grouping)
            for data in ("voc21", "context60", "coco_object")
        ]
        assert tuple(one.decision.background_threshold for one in found) == thresholds
        assert dict(zip(found[0].labels.names, found[0].labels.texts, strict=True))[
            "tvmonitor"
        ] == ("monitor",)


@pytest.mark.bad_input("evaluation", "a protocol for another set or model")
def test_what_protocols_refuse(model, tmp_path):
    voc20 = describe("voc20")
    for arguments, message in (
        (("slip", voc20), "protocol is 'slip'; expected one of"),
        (("segclip", voc20), "is made for models that label"),
        (("zegclip", voc20), "is made for models that label masks and pacl_tiny labels patches"),
        (("tcl", describe("ade847")), "says nothing about ade847; it is for voc21"),
    ):
        with pytest.raises(ConfigError, match=message):
            protocol(*arguments, model)
    with pytest.raises(InputError, match="labels holds 2 classes; voc20 has 20"):
        protocol("plain", voc20, model, labels=LabelSet.of(["cat", "dog"]))
    changed = protocol("plain", voc20, model, short_side=64)
    assert changed.label == "plain v1*" and changed.changed == ("short_side = 64",)
    (tmp_path / "mine.yaml").write_text(
        "title: mine\nversion: 3\nsource: me\nsettings: {short_side: 40}\n"
    )
    assert protocol(str(tmp_path / "mine.yaml"), voc20, model).label == "mine v3"
    (tmp_path / "mine.yaml").write_text("title: mine\n")
    with pytest.raises(ConfigError, match="describes no protocol"):
        protocol(str(tmp_path / "mine.yaml"), voc20, model)


@pytest.mark.bad_input("evaluation", "a model whose weights are NaN")
def test_a_model_of_nan_is_refused(model, tmp_path):
    """Weights that have become NaN give an error, not a figure."""
    broken = ovseg.create_model("pacl_tiny", "digits")
    with torch.no_grad():
        broken.embedder.out.bias.fill_(float("nan"))
    data = SceneSet("digits", 2)
    with pytest.raises(ValueError, match="NaN"):
        evaluate(broken, data, protocol("plain", data.description, broken))


def test_readouts_on_scenes_in_one_table(tmp_path, capsys):
    command = [
        "eval",
        "clip_dense_tiny",
        "pacl_tiny",
        "--readout",
        "clip,naclip",
        "--data",
        "digits_things",
        "--scenes",
        "4",
        "--sweep",
    ]
    assert main([*command, "--out", str(tmp_path), "--plots"]) == 0
    printed = capsys.readouterr().out
    assert all(
        f"| {row} |" in printed
        for row in ("clip_dense_tiny clip", "clip_dense_tiny naclip", "pacl_tiny")
    )
    for name in (
        "gallery.png",
        "sweep.png",
        "pacl_tiny_confusion.png",
        "clip_dense_tiny_naclip_classes.png",
    ):
        assert Image.open(tmp_path / name).width > 300
    assert (
        main(["eval", "pacl_tiny", "--readout", "clip"]) == 2
        and "is no clip_dense model" in capsys.readouterr().err
    )
    assert (
        main(["eval", "pacl_tiny", "--data", "voc21"]) == 2
        and "--root is missing" in capsys.readouterr().err
    )
    assert (
        main(["eval", "pacl_tiny", "--plots"]) == 2
        and "--out is missing" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--list-protocols"])
    assert stop.value.code == 0 and "sclip        v1" in capsys.readouterr().out


def test_classification(tmp_path, capsys):
    """Scenes of one thing in folders of their names; against a count by hand."""
    from ovseg.data.scenes import Scenes

    scenes = [scene for scene in Scenes("digits", "val", 60) if len(scene.things) == 1][:12]
    for i, scene in enumerate(scenes):
        path = tmp_path / "in" / scene.things[0].replace(" ", "_") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene.image).save(path)
    names = sorted({scene.things[0] for scene in scenes})
    command = [
        "eval",
        "pacl_tiny",
        "--data",
        "imagefolder",
        "--root",
        str(tmp_path / "in"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(command) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]
    predictor = Predictor(ovseg.create_model("pacl_tiny", "digits"), names)
    orders = [list(predictor.set_image(scene.image).classify()) for scene in scenes]
    top = [
        100
        * np.mean(
            [scene.things[0] in order[:k] for scene, order in zip(scenes, orders, strict=True)]
        )
        for k in (1, 5)
    ]
    assert [found["summary"]["top1"], found["summary"]["top5"]] == pytest.approx(top, abs=0.01)
    assert sum(row["pictures"] for row in found["classes"].values()) == 12 and set(
        found["classes"]
    ) == set(names)
    (tmp_path / "in" / "red_zero").mkdir(exist_ok=True)
    (tmp_path / "in" / "red_zero" / "bad.png").write_bytes(b"junk")
    capsys.readouterr()
    assert main(command) == 1 and "bad.png" in capsys.readouterr().err
    assert main([*command, "--skip-bad"]) == 3 and "left out:" in capsys.readouterr().out
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    assert main([*command, "--labels-file", str(tmp_path / "names.txt")]) == 2
    assert main([*command[:-4], "--root", str(tmp_path / "out")]) == 1  # no sub-folders


@pytest.mark.bad_input("evaluation", "a set that is not there")
def test_limit_and_missing_things(model):
    data = SceneSet("shapes", 5)
    chosen = protocol("plain", data.description, model)
    assert evaluate(model, data, chosen, limit=2).pictures == 2
    with pytest.raises(DataError, match="none of 0 pictures"):
        evaluate(model, SceneSet("shapes", 0), chosen)


def test_few_scenes_may_lack_a_split():
    """No class of it in the truth or in the answers: no mean, and none that counts as zero."""
    model = ovseg.create_model("clip_dense_tiny")
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.zero_()  # one class everywhere
    seeds = (Scenes("digits", "val", 1, seed) for seed in range(100))
    held_out = {f"{colour} {kind}" for colour, kind in Scenes("digits").vocabulary.unseen}
    report = evaluate_scenes(
        model, next(scenes for scenes in seeds if not held_out & set(scenes[0].things))
    )
    assert (
        report.summary["unseen_miou"] is None
        and report.summary["hiou"] is None
        and report.summary["seen_miou"] is not None
    )
    assert json.loads(json.dumps(report.to_dict()))["summary"]["hiou"] is None
