"""Where commands run a model and in which numbers; options of labelling come from the fields of the
three values.
"""

import argparse
import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ovseg.cli import ending
from ovseg.cli.main import main
from ovseg.cli.options import (
    DTYPES,
    add_device,
    add_inference_options,
    dtype_of,
    given_inference_options,
)
from ovseg.data.scenes import Scenes


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "scene.png"
    Image.fromarray(Scenes("digits", "val", 1)[0].image).save(path)
    return str(path)


def parsed(*line):
    parser = argparse.ArgumentParser()
    add_device(parser)
    add_inference_options(parser)
    return parser.parse_args(line)


def test_auto_is_half_precision_on_a_gpu_and_float32_elsewhere(monkeypatch):
    capability = {}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability["now"])
    gpu = torch.device("cuda", 0)
    for capability["now"], kind in (
        ((9, 0), torch.bfloat16),
        ((8, 0), torch.bfloat16),
        ((7, 5), torch.float16),
    ):
        assert dtype_of(parsed(), gpu) == kind
    assert dtype_of(parsed(), torch.device("cpu")) == torch.float32
    for name in DTYPES[1:]:
        assert (
            dtype_of(parsed("--dtype", name), gpu)
            == dtype_of(parsed("--dtype", name), torch.device("cpu"))
            == getattr(torch, name)
        )


def test_the_dtype_is_printed_and_part_of_what_makes_a_result(picture, tmp_path, capsys):
    for i in range(3):
        Image.open(picture).rotate(90 * i).save(tmp_path / f"{i}.png")
    command = [
        "segment",
        "-m",
        "pacl_tiny",
        str(tmp_path),
        "--labels",
        "gravel,grass,a red seven",
        "--format",
        "json",
        "-o",
        str(tmp_path / "out"),
    ]
    command += ["--device", "cpu"]

    def run(*more):
        assert main([*command, *more]) == 0
        return capsys.readouterr()

    plain = run()
    assert (
        "4 pictures into" in plain.out and "runs on" not in plain.err
    )  # float32 on the CPU goes without saying
    scores = {
        row["label"]: row["score"]
        for row in json.loads((tmp_path / "out" / "scene.json").read_text())["labels"]
    }
    half = run("--dtype", "bfloat16")
    assert "pacl_tiny runs on cpu in bfloat16" in half.err and "4 pictures into" in half.out
    others = {
        row["label"]: row["score"]
        for row in json.loads((tmp_path / "out" / "scene.json").read_text())["labels"]
    }
    assert others != scores and others["grass"] == pytest.approx(scores["grass"], abs=0.02)
    assert "4 done before" in run("--dtype", "bfloat16").out
    out = ["--scenes", "3", "--out", str(tmp_path / "eval")]
    assert main(["eval", "segclip_tiny", "--dtype", "bfloat16", *out]) == 0
    found = json.loads((tmp_path / "eval" / "results.json").read_text())["results"][0]
    assert found["protocol"]["dtype"] == "bfloat16" and found["protocol"]["decision"] == "groups"


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")
@pytest.mark.bad_input("command line", "a device that is not there")
def test_a_gpu_that_is_not_there(picture, capsys):
    assert (
        main(["segment", "-m", "pacl_tiny", picture, "--labels", "grass", "--device", "cuda"]) == 2
    )
    assert "device is 'cuda' and torch sees no GPU" in capsys.readouterr().err


def test_every_option_is_a_field(picture, tmp_path, capsys):
    assert given_inference_options(parsed()) == {}
    line = "--crop 24 --scale 40 --activation softmax --top-classes 3 --text-mean raw"
    found = given_inference_options(parsed(*line.split(), "--background", "sand, mu"))
    assert found == {
        "crop": 24,
        "scale": 40.0,
        "activation": "softmax",
        "top_classes": 3,
        "background": ("sand", "mu"),
        "text_mean": "raw",
    }
    command = [
        "segment",
        picture,
        "--labels",
        "gravel,grass",
        "--format",
        "mask",
        "-o",
        str(tmp_path / "out"),
        "-m",
        "segclip_tiny",
    ]
    assert main([*command, "--top-classes", "1", "--resize", "bilinear"]) == 0
    assert (
        len(np.unique(np.asarray(Image.open(tmp_path / "out" / "scene.mask.png")))) == 1
    )  # the one class that may label a group
    assert main([*command, "--refine", "pamr"]) == 2
    assert (
        "an option of the rule of labelling patches and units; this model labels by groups"
        in capsys.readouterr().err
    )


def test_batches_of_an_evaluation_count_the_same(tmp_path):
    tables = []
    for batch in ("1", "4"):
        assert (
            main(
                [
                    "eval",
                    "pacl_tiny",
                    "--scenes",
                    "10",
                    "--batch",
                    batch,
                    "--out",
                    str(tmp_path / batch),
                ]
            )
            == 0
        )
        tables.append(
            np.array(
                json.loads((tmp_path / batch / "results.json").read_text())["results"][0][
                    "confusion"
                ]
            )
        )
    assert np.abs(tables[0] - tables[1]).sum() <= 4 and tables[0].sum() == 10 * 48 * 48  # ties
    assert main(["eval", "pacl_tiny", "--batch", "0"]) == 2


def test_a_reader_that_leaves_between_two_lines(monkeypatch, capfd):
    """As `ovseg info | head -1`: Python forgets the line that could not be written."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        code = main(["info"])
    assert code == ending.NO_READER and capfd.readouterr().err == ""
