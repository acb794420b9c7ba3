"""The main job on the embedded default: train a tiny CLIP, then PACL on it, and compare where they look.

Three models: CLIP with the image-level loss, its patches read out as they are; PACL on that CLIP, frozen, as published; and
PACL's objective with nothing frozen.

  ovseg demo                     real handwritten digits on real textures
  ovseg demo --data shapes       drawn shapes
Writes results.json, table.md, gallery.png, loss.png and all runs into --out; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--data", default="digits", choices=("digits", "shapes"))
    sub.add_argument("--out", help="folder (default: runs/demo_DATA)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--steps", type=int, nargs=3, metavar=("CLIP", "PACL", "FULL"), help="training steps of the three models")
    sub.add_argument("--scenes", type=int, default=300, help="validation scenes")
    sub.add_argument("--quiet", action="store_true")


def run(options: argparse.Namespace) -> int:
    from ..data.scenes import Scenes
    from ..errors import ConfigError
    from ..evaluation.scenes import evaluate_scenes, gallery, scene_table
    from ..training.loop import Interrupted, train
    from ..training.plots import join_curves
    from ..training.recipe import load_recipe

    out = Path(options.out or f"runs/demo_{options.data}")
    if (out / "results.json").exists():
        raise ConfigError(f"{out} holds the results of a demo already; expected a new --out, or remove it")
    common = [f"data.form={options.data}", f"train.seed={options.seed}"]
    on_clip = [*common, f"model.clip_from={out / 'clip'}"]
    stages = [
        ("CLIP, image level", out / "clip", load_recipe("clip_scenes", common)),
        ("PACL, CLIP frozen", out / "pacl", load_recipe("pacl_scenes", on_clip)),
        ("PACL, nothing frozen", out / "pacl_full", load_recipe("pacl_full_scenes", on_clip)),
    ]
    scenes = Scenes(options.data, "val", options.scenes, options.seed)
    reports, rows, began = {}, [], time.time()
    for i, (title, run_folder, recipe) in enumerate(stages):
        if options.steps:
            recipe.train.steps = options.steps[i]
        saved = run_folder / "config.yaml"
        if saved.exists() and load_recipe(saved) != recipe:  # another seed or data: going on would mix two runs
            raise ConfigError(f"{run_folder} was begun with other settings; expected a new --out, or the same command again")
        try:
            started = time.time()
            # A demo that was stopped goes on by the same command.
            model = train(recipe, run_folder, resume=True, quiet=options.quiet)
        except Interrupted as error:
            print(f"ovseg demo: {error}; the same command goes on")
            return 143
        report = evaluate_scenes(model, scenes, keep=10, progress=not options.quiet)
        report.summary |= {"model": title, "train_seconds": round(time.time() - started, 1)}
        reports[title] = report
        rows.append(report.summary)
    table = scene_table(rows)
    out.mkdir(parents=True, exist_ok=True)
    gallery(reports).save(out / "gallery.png")
    curve = join_curves({title: folder / "log.jsonl" for title, folder, _ in stages}, out / "loss.png")
    (out / "table.md").write_text(table + "\n")
    ratios = [round(row["seen_miou"] / max(rows[0]["seen_miou"], 1e-9), 2) for row in rows]
    environment = json.loads((out / "pacl" / "env.json").read_text())
    facts = {"data": options.data, "seed": options.seed, "steps": [r.train.steps for *_, r in stages], "rows": rows,
             "seen_miou_over_clip": ratios, "seconds": round(time.time() - began, 1), "environment": environment}
    (out / "results.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(table)
    print(f"\nPACL finds {ratios[1]:.1f} times (frozen) and {ratios[2]:.1f} times (nothing frozen) the seen-object mIoU of the "
          f"image-level CLIP it stands on; {facts['seconds']:.0f} s in all.")
    written = [out / "gallery.png", out / "results.json", out / "pacl" / "model"]
    print(*(written[:1] + ([curve] if curve else []) + written[1:]), sep="\n")
    print(f'next: ovseg segment --demo --model {out / "pacl"}')
    return 0
