"""Look at the embedded data: one contact sheet of scenes with their masks and captions.

  ovseg data browse --form shapes --out scenes.png
"""

from __future__ import annotations

import argparse


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("action", choices=("browse",))
    sub.add_argument("--form", default="digits", choices=("digits", "shapes"))
    sub.add_argument("--split", default="train", choices=("train", "val"))
    sub.add_argument("--count", type=int, default=36)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--out", default="scenes.png")


def run(options: argparse.Namespace) -> int:
    import numpy as np

    from ..data.scenes import Scenes
    from ..inference.pictures import colour, contact_sheet, palette

    scenes = Scenes(options.form, options.split, options.count, options.seed)[:]
    vocabulary = Scenes(options.form, options.split, 0).vocabulary
    count = len(vocabulary.classes)
    rows, titles = [], []
    for start in range(0, len(scenes), 12):
        part = scenes[start : start + 12]
        rows += [[scene.image for scene in part], [colour(scene.mask, count) for scene in part]]
        titles += [f"{part[0].index}-{part[-1].index}", "mask"]
    present = sorted({int(i) for scene in scenes for i in np.unique(scene.mask)})
    legend = [(tuple(int(v) for v in palette(count)[i]), vocabulary.classes[i]) for i in present]
    contact_sheet(rows, titles, legend).save(options.out)
    for scene in scenes[:6]:
        print(f"{scene.index}: {', '.join(scene.things) or 'nothing'} on {scene.stuff}: {[c.text for c in scene.captions]}")
    print(options.out)
    return 0
