"""ZegCLIP on the command line: evaluation by its protocols, class embeddings, the demo's rows, what
the benchmark compares with.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ovseg
from ovseg.cli.main import main
from ovseg.data.benchmark_sets import SegmentationSet, describe

sys.path.append(str(Path(__file__).parent.parent / "evaluation"))
from miniatures import make

SMALL = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"layers": 2, "width": 64, "head_width": 16, "patch_size": 64, "image_size": 512},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = ovseg.create_model("zegclip_vit_b16", architecture=SMALL, heads=2, prompts=3)
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.multihead_attn.q.weight *= 12
            layer.multihead_attn.k.weight *= 12
    return ovseg.save_pretrained(model, tmp_path_factory.mktemp("zegclip") / "model")


def evaluated(folder, root, out, *more):
    assert (
        main(
            [
                "eval",
                str(folder),
                "--data",
                "voc20",
                "--root",
                str(root),
                "--out",
                str(out),
                "--device",
                "cpu",
                *more,
            ]
        )
        == 0
    )
    return json.loads((out / "results.json").read_text())["results"][0]


def test_eval_gives_the_four_figures(folder, tmp_path, capsys):
    """pAcc, mIoU of seen and of unseen classes, their harmonic mean, from histograms over the whole
    set, as published.
    """
    make(tmp_path, "voc20", 3)
    found = evaluated(folder, tmp_path, tmp_path / "a", "--protocol", "zegclip")
    assert "| aAcc | seen mIoU | unseen mIoU | hIoU |" in capsys.readouterr().out
    model, about = ovseg.from_pretrained(folder), describe("voc20")
    data = SegmentationSet("voc20", tmp_path)
    bias = {name: -0.1 for name in about.classes if name not in about.unseen}
    predictor = ovseg.Predictor(
        model,
        list(about.classes),
        short_side=512,
        long_side=2048,
        resize="bilinear",
        crop=512,
        stride=426,
        templates="zegclip1",
        bias=bias,
    )
    intersect, predicted, labelled = np.zeros(20), np.zeros(20), np.zeros(20)
    for i in range(len(data)):
        image, truth = data[i]
        labels, counted = predictor.set_image(image).predict().labels, truth >= 0
        hit = labels[counted & (labels == truth)]
        for total, some in (
            (intersect, hit),
            (predicted, labels[counted]),
            (labelled, truth[counted]),
        ):
            total += np.bincount(some, minlength=20)
    with np.errstate(invalid="ignore"):
        iou = 100 * intersect / (predicted + labelled - intersect)
    seen, unseen = np.nanmean(iou[:15]), np.nanmean(iou[15:])
    expected = {
        "pixel_accuracy": 100 * intersect.sum() / labelled.sum(),
        "seen_miou": seen,
        "unseen_miou": unseen,
        "hiou": 2 * seen * unseen / (seen + unseen),
    }
    assert {key: found["summary"][key] for key in expected} == pytest.approx(
        expected, abs=0.011
    ) and len(np.flatnonzero(predicted)) > 3
    plain = evaluated(folder, tmp_path, tmp_path / "b", "--protocol", "zegclip_transductive")
    assert plain["confusion"] != found["confusion"]  # 0.1 is much here
    with pytest.raises(SystemExit):
        main(["eval", "--list-protocols"])
    assert "zegclip_transductive" in capsys.readouterr().out


def test_class_embeddings_in_place_of_the_text_tower(folder, tmp_path, capsys):
    make(tmp_path, "voc20", 2)
    model, about = ovseg.from_pretrained(folder), describe("voc20")
    np.save(tmp_path / "voc.npy", model.encode_labels(about.classes, "zegclip1").numpy())
    by_texts = evaluated(folder, tmp_path, tmp_path / "a", "--protocol", "zegclip")
    by_file = evaluated(
        folder,
        tmp_path,
        tmp_path / "b",
        "--protocol",
        "zegclip",
        "--embeddings",
        str(tmp_path / "voc.npy"),
    )
    assert by_file["confusion"] == by_texts["confusion"] and by_file["protocol"]["settings"][
        "embeddings"
    ].endswith("voc.npy")
    assert (
        by_file["protocol"]["class_embeddings"].endswith("voc.npy")
        and by_file["protocol"]["template_texts"] == []
    )
    np.save(
        tmp_path / "noise.npy",
        np.random.default_rng(0).standard_normal((20, 32)).astype(np.float16),
    )
    other = evaluated(
        folder,
        tmp_path,
        tmp_path / "c",
        "--protocol",
        "zegclip",
        "--embeddings",
        str(tmp_path / "noise.npy"),
    )
    assert other["confusion"] != by_texts["confusion"]
    wrong = [
        "eval",
        str(folder),
        "--data",
        "voc20",
        "--root",
        str(tmp_path),
        "--embeddings",
        str(tmp_path / "none.npy"),
    ]
    capsys.readouterr()
    assert main(wrong) == 2 and "none.npy' cannot be read" in capsys.readouterr().err


def test_segment_with_any_words(folder, tmp_path):
    """Non-square pictures, whole and in windows; a threshold leaves pixels without a label."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8)).save(
        tmp_path / "a.png"
    )
    labels = "a purple unicorn,cheese|old cheese,sky"
    common = [
        "segment",
        str(tmp_path / "a.png"),
        "--labels",
        labels,
        "-m",
        str(folder),
        "--device",
        "cpu",
        "--format",
        "mask,json",
    ]
    for i, more in enumerate(
        (
            [],
            ["--short-side", "512", "--crop", "512", "--stride", "426"],
            ["--background-threshold", "0.999"],
        )
    ):
        assert main([*common, "-o", str(tmp_path / f"{i}"), *more]) == 0
        mask = np.asarray(Image.open(next((tmp_path / f"{i}").glob("*.png"))))
        assert mask.shape == (90, 150) and set(np.unique(mask)) <= {0, 1, 2, 255}
        assert (255 in mask) == (i == 2)


def test_demo_trains_the_clip_that_is_not_bundled(tmp_path, capsys, monkeypatch):
    """The bundled CLIP knows no shapes: theirs is trained first, and is in the files.

    With digits: test_demo_of_all_systems.
    """
    from ovseg.training import stages

    real, out = stages.Loader, tmp_path / "shapes"
    monkeypatch.setattr(
        stages, "Loader", lambda *given, workers, **options: real(*given, workers=0, **options)
    )  # slow to start
    shapes = [
        "--train-scenes",
        "64",
        "--scenes",
        "3",
        "--out",
        str(out),
        "--quiet",
        "--data",
        "shapes",
    ]
    assert main(["demo", "--system", "zegclip", "--steps", "1", "2", "2", "2", *shapes]) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    expected = [
        "CLIP, image level",
        "ZegCLIP, inductive",
        "ZegCLIP, transductive",
        "ZegCLIP, all classes seen",
    ]
    assert [
        row["model"] for row in rows
    ] == expected and "| ZegCLIP, transductive |" in capsys.readouterr().out
    clip, model = (
        ovseg.from_pretrained(out / name / "model") for name in ("clip", "zegclip_transductive")
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(clip.backbone.parameters(), model.backbone.parameters(), strict=True)
    )


def test_the_benchmarks_plain_version_is_the_same_model():
    """What the benchmark compares with computes the same loss, gradients and labels."""
    from ovseg_benchmarks.whole import zegclip as plain

    parts = plain.training_parts(9, 96, 0.0)
    found = []
    for which in ("ours", "eager"):
        loss = parts[which]()
        found.append((loss.item(), torch.autograd.grad(loss, parts["leaves"])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-6
