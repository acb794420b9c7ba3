"""MGCA from the command line: a run and what reads it, the demo of all systems, the benchmark's
plain version.
"""

import json

import pytest
import torch
from PIL import Image

import ovseg
from ovseg.cli.main import main


def test_a_run_from_training_to_labels(tmp_path, capsys):
    run = str(tmp_path / "run")
    train = [
        "train",
        "mgca_scenes",
        f"run={run}",
        "init.backbone=clip_dense_tiny:digits",
        "train.steps=6",
        "train.batch_size=8",
        "data.train_size=64",
        "objective.options.pixel_start=0.5",
    ]
    assert main(train) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"loss", "object", "region"} <= set(rows[-1])
    model = ovseg.from_pretrained(run)
    clip = ovseg.from_pretrained("clip_dense_tiny:digits")
    assert model.name == "mgca_tiny" and model.named_clip is None
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.backbone.parameters(), clip.backbone.parameters(), strict=True)
    )
    out = str(tmp_path / "out")
    assert main(["segment", "--demo", "-m", run, "-o", out, "--unit", "fixed", "--units", "4"]) == 0
    capsys.readouterr()
    assert main(["segment", "--demo", "-m", run, "-o", out, "--unit", "some"]) == 2
    assert "unit is 'some'; expected one of" in capsys.readouterr().err
    assert main(["segment", "--demo", "-m", "segclip_tiny", "-o", out, "--unit", "pixel"]) == 2
    assert "an option of the rule of labelling units" in capsys.readouterr().err
    assert main(["eval", run, "--data", "digits", "--limit", "4"]) == 0
    assert "adaptive, merged at" in capsys.readouterr().out


def test_demo_of_all_systems(tmp_path, capsys, monkeypatch):
    from ovseg.training import stages

    real, out = stages.Loader, tmp_path / "demo"
    monkeypatch.setattr(
        stages, "Loader", lambda *given, workers, **options: real(*given, workers=0, **options)
    )  # slow to start
    steps = ["1", "1", "1", "1", "1", "2", "1", "1", "2", "1"]
    assert (
        main(
            [
                "demo",
                "--system",
                "all",
                "--steps",
                *steps,
                "--train-scenes",
                "64",
                "--scenes",
                "3",
                "--out",
                str(out),
                "--quiet",
            ]
        )
        == 0
    )
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["model"] for row in rows] == [
        "CLIP, image level",
        "PACL, CLIP frozen",
        "PACL, nothing frozen",
        "SegCLIP",
        "GroupViT",
        "OVSegmentor",
        "MGCA-style",
        "ZegCLIP, inductive",
        "ZegCLIP, transductive",
        "ZegCLIP, all classes seen",
    ]
    assert all({"seen_miou", "unseen_miou", "hiou"} <= set(row) for row in rows)
    assert [
        json.loads(line)["stage"]
        for line in (out / "zegclip_transductive" / "log.jsonl").read_text().splitlines()
    ][-1] == 1
    assert (
        "| MGCA-style |" in capsys.readouterr().out and Image.open(out / "gallery.png").height > 600
    )


def test_the_benchmarks_plain_version_is_the_same_loss():
    from ovseg_benchmarks.whole import mgca as plain

    parts = plain.training_parts(3, 7)
    losses = {which: parts[which]() for which in ("ours", "eager")}
    assert losses["ours"].item() == pytest.approx(losses["eager"].item(), rel=1e-5)
    ours, eager = (torch.autograd.grad(loss, parts["leaves"]) for loss in losses.values())
    for a, b in zip(ours, eager, strict=True):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm())
