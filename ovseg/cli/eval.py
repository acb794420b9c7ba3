"""Measure a model on validation scenes: mIoU of seen, unseen and stuff classes.

  ovseg eval pacl_tiny --data digits
  ovseg eval runs/pacl --data shapes --scenes 300 --out runs/pacl/eval
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", help="a model with bundled weights, or a folder of a run or of save_pretrained")
    sub.add_argument("--data", default="digits", choices=("digits", "shapes"))
    sub.add_argument("--scenes", type=int, default=300)
    sub.add_argument("--seed", type=int, default=0, help="of the validation scenes")
    sub.add_argument("--out", help="folder for results.json and gallery.png")
    sub.add_argument("--device", default="cpu")


def run(options: argparse.Namespace) -> int:
    from ..data.scenes import Scenes
    from ..evaluation.scenes import evaluate_scenes, scene_gallery, scene_table
    from .segment import load_model

    scenes = Scenes(options.data, "val", options.scenes, options.seed)
    model = load_model(options.model, options.device)
    report = evaluate_scenes(model, scenes, keep=10, progress=True)
    print(scene_table([report.summary]))
    width = max(map(len, scenes.vocabulary.classes))
    for name, split, iou in zip(report.scores.classes, scenes.vocabulary.split_of_class, report.scores.iou, strict=True):
        print(f"  {name:{width}} {split:7} {iou:6.2f}")
    if options.out:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        per_class = dict(zip(report.scores.classes, report.scores.iou.round(2).tolist(), strict=True))
        (out / "results.json").write_text(json.dumps({**report.summary, "seed": options.seed, "iou": per_class}, indent=2))
        scene_gallery(scenes, {model.name: report}).save(out / "gallery.png")
        print(out / "results.json", out / "gallery.png", sep="\n")
    return 0
