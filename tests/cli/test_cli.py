"""The command line: every verb, exit codes, messages on stderr and no traceback."""

import json
import sys

import numpy as np
import pytest
import timm
from PIL import Image
from processor_time import processor_seconds
from safetensors.torch import save_file

from ovseg.cli.main import VERBS, main
from ovseg.data.scenes import Scenes
from ovseg.inference.built_in import scene
from ovseg.inference.segmentation import colour

SMALL = [
    "data.style=shapes",
    "data.train_size=30",
    "train.batch_size=8",
    "train.steps=2",
    "model.options={backbone: {width: 16, embed_dim: 16, local_depth: 1}}",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "clip"
    assert main(["train", "clip_scenes", *SMALL, f"run={folder}"]) == 0
    return folder


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "scene.png"
    Image.fromarray(Scenes("digits", "val", 1)[0].image).save(path)
    return path


def test_bundled_model_segments_from_a_cold_start(picture, tmp_path):
    """The promise of the README, an overlay with legend within 8 seconds: of the processor, as
    other tests run beside this one.
    """
    seconds = []
    for attempt in range(2):  # another chance for the first
        command = [
            sys.executable,
            "-m",
            "ovseg",
            "segment",
            str(picture),
            "--labels",
            "a red seven,gravel",
            "-m",
            "pacl_tiny",
        ]
        command += ["-o", str(tmp_path / str(attempt))]
        spent, done = processor_seconds(command)
        seconds.append(spent)
        assert done.returncode == 0, done.stderr
        if spent < 8:
            break
    overlay = Image.open(tmp_path / str(attempt) / "scene.overlay.png")
    assert overlay.height > overlay.width == 384
    assert min(seconds) < 8, f"{seconds} s"
    assert "knows their words only" in done.stderr


@pytest.mark.bad_input("inference", "pictures that cannot be read")
def test_segment_formats_folders_and_bad_files(run, picture, tmp_path, capsys):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for i in range(3):
        Image.open(picture).save(tmp_path / "in" / "deep" / f"{i}.jpg")
    (tmp_path / "in" / "broken.jpg").write_bytes(b"\xff\xd8\xff junk")
    Image.open(picture).save(tmp_path / "in" / "0.png")  # the stem of another picture
    out = tmp_path / "out"
    options = ["-m", str(run), "-o", str(out), "--format", "overlay,mask,json"]
    code = main(["segment", str(tmp_path / "in"), "--labels", "grass, sand", *options])
    printed = capsys.readouterr()
    assert (
        code == 3
        and "4 pictures" in printed.out
        and "1 skipped" in printed.out
        and "broken.jpg" in printed.err
    )
    assert (
        len(list(out.rglob("*.overlay.png")))
        == len(list(out.rglob("*.mask.png")))
        == len(list(out.rglob("*.json")))
        == 4
    )
    found = json.loads(next(out.rglob("*.json")).read_text())
    assert [row["label"] for row in found["labels"]] == ["grass", "sand"]
    assert sum(row["area"] for row in found["labels"]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "arguments,code,message",
    [
        (["segment", "nowhere.png", "--labels", "cat"], 2, "image 'nowhere.png' does not exist"),
        (["segment", "{picture}", "--labels", ""], 2, r"labels[0] is blank"),
        (["segment", "{picture}", "--labels", "cat,cat"], 2, "are both 'cat'"),
        (["segment", "{picture}"], 2, "no labels: give --labels"),
        (["segment", "--labels", "cat"], 2, "no pictures"),
        (
            ["segment", "{picture}", "--labels-file", "nowhere.txt"],
            2,
            "label file 'nowhere.txt' does not exist",
        ),
        (["segment", "{picture}", "--labels", "cat", "--format", "gif"], 2, "--format holds 'gif'"),
        (
            ["segment", "{picture}", "--labels", "cat", "-m", "sam"],
            2,
            "model is 'sam', no path that exists and no known name",
        ),
        (["train", "clip_scenes"], 2, "run is missing"),
        (["train", "nothing", "run=x"], 2, "recipe is 'nothing'"),
        (
            ["train", "clip_scenes", "optim.lrr=1", "run=x"],
            2,
            "optim.lrr: unknown key, did you mean optim.lr?",
        ),
        (["bench", "nothing"], 2, "op is 'nothing'"),
    ],
)
@pytest.mark.bad_input("command line", "what a command cannot follow")
def test_errors_are_one_line(arguments, code, message, picture, capsys, tmp_path):
    assert main([argument.format(picture=picture) for argument in arguments]) == code
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


@pytest.mark.bad_input("command line", "words that a model does not know")
def test_unknown_words_are_refused_by_name(picture, tmp_path, capsys):
    command = [
        "segment",
        str(picture),
        "--labels",
        "a zebra,gravel",
        "-m",
        "pacl_tiny",
        "-o",
        str(tmp_path / "out"),
    ]
    assert main(command) == 2 and not (tmp_path / "out").exists()
    assert (
        "pacl_tiny does not know: zebra; it was trained on synthetic scenes"
        in capsys.readouterr().err
    )
    assert (
        main([*command, "--allow-unknown"]) == 0
        and "does not know: zebra" in capsys.readouterr().err
    )
    words = ["--background", "wall", "-o", str(tmp_path / "out")]
    assert main(["segment", "--demo", "scene", *words]) == 2
    assert "segclip_tiny does not know: wall" in capsys.readouterr().err


def test_the_demo_draws_a_strip(tmp_path, capsys):
    assert main(["segment", "--demo", "scene", "-o", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "demo.strip.png" in printed
    found, own = np.asarray(Image.open(tmp_path / "demo.strip.png")), scene()
    width = 48 * 7
    panels = [found[26 : 26 + width, 8 + i * (width + 8) :][:, :width] for i in range(3)]
    assert np.array_equal(panels[0][3::7, 3::7], own.image)
    painted = 0.3 * own.image + 0.7 * colour(own.truth, len(own.labels.names))
    assert np.abs(panels[1][3::7, 3::7] - painted).max() <= 0.5
    assert (panels[2] == panels[1]).all(-1).mean() > 0.8  # most pixels are right
    assert len(own.labels.names) == 9 and set(np.unique(own.truth)) == {
        0,
        1,
        own.labels.names.index("brick"),
    }
    other = [
        "segment",
        "--demo",
        "--labels",
        "gravel,grass",
        "-m",
        "clip_dense_tiny",
        "-o",
        str(tmp_path / "b"),
    ]
    assert (
        main(other) == 0 and not (tmp_path / "b" / "demo.strip.png").exists()
    )  # of other labels there is no truth


def test_second_encoder_by_name(picture, tmp_path, capsys):
    command = [
        "segment",
        str(picture),
        "--labels",
        "gravel",
        "-m",
        "clip_dense_tiny",
        "--readout",
        "proxyclip",
        "-o",
        str(tmp_path),
    ]
    weights = tmp_path / "vit.safetensors"
    save_file(
        {
            key: x.contiguous()
            for key, x in timm.create_model("vit_tiny_patch16_224").state_dict().items()
        },
        weights,
    )
    assert main([*command, "--proxy", f"vit_tiny_patch16_224:{weights}"]) == 0
    assert (
        main(
            [
                "eval",
                "clip_dense_tiny",
                "--readout",
                "clip,proxyclip",
                "--proxy",
                f"vit_tiny_patch16_224:{weights}",
                "--scenes",
                "2",
                "--data",
                "shapes",
            ]
        )
        == 0
    )
    assert "clip_dense_tiny proxyclip" in capsys.readouterr().out
    assert (
        main(command) == 2 and "proxy is None; expected a second encoder" in capsys.readouterr().err
    )
    assert main([*command, "--proxy", "vit_tiny_patch16_224", "--offline"]) == 2
    assert "--proxy vit_tiny_patch16_224:FILE" in capsys.readouterr().err


@pytest.mark.bad_input("command line", "a verb or option that does not exist")
def test_usage():
    for arguments in ([], ["fly"], ["segment", "--wings"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    for verb in VERBS:
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0


def test_demo_end_to_end(tmp_path, capsys):
    out = tmp_path / "demo"
    small = [
        "--data",
        "shapes",
        "--train-scenes",
        "200",
        "--scenes",
        "12",
        "--out",
        str(out),
        "--quiet",
    ]
    arguments = ["demo", "--steps", "3", "2", "2", *small]
    assert main(arguments) == 0
    results = json.loads((out / "results.json").read_text())
    assert [row["model"] for row in results["rows"]] == [
        "CLIP, image level",
        "PACL, CLIP frozen",
        "PACL, nothing frozen",
    ]
    assert {"seen_miou", "unseen_miou", "stuff_miou", "hiou", "train_seconds"} <= set(
        results["rows"][0]
    )
    assert Image.open(out / "gallery.png").width > 600 and Image.open(out / "loss.png").width > 600
    assert "| PACL, CLIP frozen |" in capsys.readouterr().out
    assert main(arguments) == 2 and "holds the results of a demo already" in capsys.readouterr().err
    (out / "results.json").unlink()  # as if it had been stopped before the end
    assert (
        main([*arguments, "--seed", "5"]) == 2
        and "was begun with other settings" in capsys.readouterr().err
    )
    assert main(arguments) == 0
    more = ["demo", "--system", "segclip", "--steps", "2", *small]
    assert (
        main(more) == 0 and "| SegCLIP |" in capsys.readouterr().out
    )  # its rows beside the others'
    assert len(json.loads((out / "results.json").read_text())["rows"]) == 4
    assert (
        main(["demo", "--system", "segclip", "--steps", "1", "1", *small]) == 2
        and "--steps holds 2 numbers" in capsys.readouterr().err
    )
    assert (
        main(
            [
                "eval",
                str(out / "pacl"),
                "--data",
                "shapes",
                "--scenes",
                "8",
                "--out",
                str(out / "eval"),
            ]
        )
        == 0
    )
    found = json.loads((out / "eval" / "results.json").read_text())["results"][0]
    assert found["summary"]["model"] == "pacl" and found["protocol"]["model"] == "pacl_tiny"


def test_other_verbs(capsys, tmp_path):
    assert main(["models", "*tiny"]) == 0 and "pacl_tiny" in capsys.readouterr().out
    assert main(["info"]) == 0 and "patch_text_similarity: cpu" in capsys.readouterr().out
    assert main(["train", "list"]) == 0 and "pacl_scenes" in capsys.readouterr().out
    assert (
        main(["train", "pacl_scenes", "--print"]) == 0
        and "weight_decay: 0.02" in capsys.readouterr().out
    )
    assert (
        main(
            [
                "data",
                "browse",
                "--form",
                "digits",
                "--count",
                "14",
                "--out",
                str(tmp_path / "s.png"),
            ]
        )
        == 0
    )
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    assert sheet.shape[0] > 300 and len(np.unique(sheet.reshape(-1, 3), axis=0)) > 500


def test_bench_writes_its_conditions(tmp_path, monkeypatch):
    from ovseg_benchmarks import registry, run

    case = registry.Case(
        "patch_text_similarity",
        "pacl",
        {"B": 3, "T": 4, "N": 5, "D": 6},
        {"temperature": 0.1},
        only=("ovseg", "eager", "eager, chunks of 32 texts", "eager, one image at a time"),
    )
    for module in (registry, run):
        monkeypatch.setattr(module, "CASES", (case,))
    monkeypatch.setattr(run, "_memory_in_subprocess", lambda case, name: None)
    out = tmp_path / "out.json"
    assert main(["bench", "patch_text_similarity", "--json", str(out), "--repeats", "3"]) == 0
    found = json.loads(out.read_text())
    assert found["environment"]["threads"] >= 1 and len(found["rows"]) == 4
    assert all("failed" not in row and row["ms"] > 0 for row in found["rows"])


def test_bench_memory_sees_a_large_allocation():
    """The memory figure is what it says: eager keeps [B, T, N] and [B, T, D], ours does not."""
    from ovseg_benchmarks import run

    case = next(case for case in run.CASES if case.name == "tiny")
    ours, eager = (run._memory_in_subprocess(case, name) for name in ("ovseg", "eager"))
    assert eager > 2 * max(ours, 1)


def test_bench_of_a_whole_picture(tmp_path):
    """The same labels as the procedure of published code, with a model cut to one block."""
    from ovseg_benchmarks.whole import pictures

    rows = pictures.run(repeats=1, out=str(tmp_path / "out.json"), layers=1)
    assert [row["case"] for row in rows] == ["683x512", "640x480"] and json.loads(
        (tmp_path / "out.json").read_text()
    )["rows"] == rows
    assert all(
        row["differing labels"] <= 1e-4 * row["pixels"] and row["labels that occur"] > 1
        for row in rows
    )
    assert main(["bench", "contrastive_loss", "--whole", "pictures"]) == 2
