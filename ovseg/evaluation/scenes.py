"""The embedded scenes as a data set to evaluate on, and what only scenes can tell.

``SceneSet`` counts all classes, or the things with the stuff as background. ``UnitCounts`` says how
units of patches cover what is there: too many units a region, and units that hold more than one
region.

    over-segmentation    units a region, each unit counted for the region that is the most
                         frequent in it                                                          (1)
    under-segmentation   share of pixels that are not of their unit's most frequent region       (2)
                         share of regions that are the most frequent of no unit                  (3)

A region is one class's pixels in one picture. (1) is 1, (2) and (3) are 0 where units are the
regions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from .. import distributed
from ..data.benchmark_sets import SetDescription
from ..data.scenes import VOCABULARIES, Scenes
from ..errors import InputError
from ..figures import beside_the_work
from ..inference import Predictor, Segmentation
from ..inference.rules.units import SemanticUnits
from ..inference.segmentation import colour, contact_sheet, legend_of, save_result
from ..systems import OVSegModel
from .evaluate import evaluate
from .metrics import harmonic_mean
from .protocols import protocol
from .report import COLUMNS, Report, rounded, table

SCENE_SETS = tuple(form + ending for form in VOCABULARIES for ending in ("", "_things"))
_IN_A_ROW = 12  # scenes of a contact sheet
_SIDE = 320  # pixels of an example in a gallery, at most


class SceneSet:
    """Validation scenes: ``digits``, ``shapes``, ``digits_things``, ``shapes_things``.

    The last two count all stuff as background.
    """

    def __init__(self, name: str, count: int = 300, seed: int = 0):
        form = name.removesuffix("_things")
        self.things_only = name.endswith("_things")
        self.scenes = Scenes(form, "val", count, seed)
        words = self.scenes.vocabulary
        names = ("background", *words.things) if self.things_only else words.classes
        texts = dict(zip(words.classes, words.prompts, strict=True))
        unseen = tuple(
            name
            for name, split in zip(words.classes, words.split_of_class, strict=True)
            if split == "unseen"
        )
        counted = ", stuff as background" if self.things_only else ""
        title = f"embedded scenes, {form}{counted}, {count} of seed {seed}"
        self.description = SetDescription(
            name,
            title,
            names,
            self.things_only,
            unseen,
            {c: texts[c] for c in names if c in texts},
            {},
            {},
        )

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, i: int) -> tuple[Image.Image, np.ndarray]:
        scene = self.scenes[i]
        truth = scene.mask.astype(np.int64)
        if self.things_only:
            truth = np.where(truth < len(self.scenes.vocabulary.things), truth + 1, 0)
        return Image.fromarray(scene.image), truth


def evaluate_scenes(
    model: OVSegModel, scenes: Scenes, *, keep: int = 0, progress: bool = False
) -> Report:
    """Evaluate with all class names by the protocol ``plain``, and classify by the same texts.

    A picture is classified rightly if the most similar of the things is one that is in it (chance:
    about 1 in their number).
    """
    data = SceneSet(scenes.form, len(scenes), scenes.seed)
    return evaluate_scene_set(model, data, keep=keep, progress=progress)


def evaluate_scene_set(model: OVSegModel, data: SceneSet, *, chosen=None, **options: Any) -> Report:
    """``evaluate``, by ``chosen`` or the protocol ``plain``, and what only scenes can tell."""
    words = data.scenes.vocabulary
    things = set(words.things)
    hits = np.zeros(2, np.int64)  # right, of all pictures with things

    def observe(i: int, predictor: Predictor, found: Segmentation) -> None:
        present = data.scenes[i].things
        best = next(name for name in predictor.classify() if name in things)
        hits[0] += best in present
        hits[1] += bool(present)

    report = evaluate(
        model,
        data,
        chosen or protocol("plain", data.description, model),
        observe=observe,
        **options,
    )
    distributed.all_reduce_sum(hits)
    split = np.array(["stuff" if name not in things else "thing" for name in report.scores.classes])
    matrix = report.scores.matrix[:, : len(split)]
    confused = matrix[split == "thing"]
    splits = zip(words.classes, words.split_of_class, strict=True)
    seen = [name for name, of_class in splits if of_class == "seen"]  # without the stuff
    seen_miou = report.scores.miou_of(seen)
    unseen_miou = report.scores.miou_of(data.description.unseen)
    report.summary |= {
        "seen_miou": rounded(seen_miou),
        "hiou": rounded(harmonic_mean(seen_miou, unseen_miou)),
    }
    if not data.things_only:
        report.summary["stuff_miou"] = rounded(report.scores.miou_of(words.stuff))
    report.summary["things_called_stuff"] = round(
        100 * float(confused[:, split == "stuff"].sum()) / max(1, int(confused.sum())), 2
    )
    report.summary["classification"] = round(100 * int(hits[0]) / max(1, int(hits[1])), 2)
    return report


def scene_sheet(scenes: Scenes) -> Image.Image:
    """Return a contact sheet of scenes with their masks and a legend."""
    names = scenes.vocabulary.classes
    rows: list[list[np.ndarray]] = []
    titles: list[str] = []
    present: set[int] = set()
    for start in range(0, len(scenes), _IN_A_ROW):
        part = scenes[start : start + _IN_A_ROW]
        rows.append([scene.image for scene in part])
        rows.append([colour(scene.mask, len(names)) for scene in part])
        titles += [f"{part[0].index}-{part[-1].index}", "mask"]
        present.update(int(i) for scene in part for i in np.unique(scene.mask))
    return contact_sheet(rows, titles, legend_of(present, names))


def scene_table(rows: list[dict[str, Any]]) -> str:
    """Return the summaries that the demo shows as a Markdown table."""
    shown = ["model", "seen_miou", "unseen_miou", "hiou", "stuff_miou", "things_called_stuff"]
    shown += ["classification", "train_seconds"]
    columns = {name: COLUMNS[name] for name in shown}
    return table(rows, columns)


def gallery(reports: dict[str, Report], count: int = 10, scale: int | None = None) -> Image.Image:
    """Show picture, truth and each prediction of the examples that the reports share.

    A legend names the classes seen there.
    """
    first = next(iter(reports.values()))
    examples = first.examples[:count]
    classes = first.data.classes
    side = max(max(picture.shape[:2]) for picture, _, _ in examples)
    smaller = max(1, side // _SIDE)
    rows = [
        [picture[::smaller, ::smaller] for picture, _, _ in examples],
        [colour(truth[::smaller, ::smaller], len(classes)) for _, truth, _ in examples],
    ]
    for report in reports.values():
        predicted = [labels[::smaller, ::smaller] for _, _, labels in report.examples[:count]]
        rows.append([colour(labels, len(classes)) for labels in predicted])
    maps = [labels for _, *both in examples for labels in both]
    present = {int(i) for labels in maps for i in np.unique(labels) if i >= 0}
    return contact_sheet(
        rows,
        ["image", "truth", *reports],
        legend_of(present, classes),
        scale=scale or max(1, 96 // max(1, side // smaller)),
    )


@beside_the_work("gallery")
def save_gallery(reports: dict[str, Report], out: Path) -> Path | None:
    """Write ``gallery`` as a picture."""
    return save_result(gallery(reports), out)


@dataclass
class UnitCounts:
    """Sums over pictures.

    Attributes:
        pictures: how many.
        units, regions: for (1).
        wrong, pixels: for (2), pixels of another region, of all.
        lost: for (3), regions.
    """

    pictures: int = 0
    units: int = 0
    regions: int = 0
    wrong: int = 0
    pixels: int = 0
    lost: int = 0

    def update(self, units: np.ndarray, truth: np.ndarray) -> None:
        """Add a picture: ``units`` and ``truth`` [H, W] integers; truth below 0 is not counted."""
        if units.shape != truth.shape or units.ndim != 2:
            raise InputError(
                f"units has shape {list(units.shape)} and truth {list(truth.shape)}; expected one "
                "[H, W]"
            )
        kept = truth >= 0
        if not kept.any():
            return
        unit, region = (np.unique(x[kept], return_inverse=True)[1].ravel() for x in (units, truth))
        table = np.zeros((unit.max() + 1, region.max() + 1), np.int64)
        np.add.at(table, (unit, region), 1)
        self.pictures += 1
        self.units += table.shape[0]
        self.regions += table.shape[1]
        self.wrong += int((table.sum(1) - table.max(1)).sum())
        self.pixels += int(table.sum())
        self.lost += table.shape[1] - len(np.unique(table.argmax(1)))

    def summary(self) -> dict[str, float]:
        """Return the figures: ``units`` are those of a picture, (2) and (3) are in percent."""
        return {
            "units": round(self.units / max(1, self.pictures), 2),
            "units_per_region": round(self.units / max(1, self.regions), 2),
            "impure_pixels": round(100 * self.wrong / max(1, self.pixels), 2),
            "lost_regions": round(100 * self.lost / max(1, self.regions), 2),
        }


@torch.no_grad()
def count_units(
    model: OVSegModel, scenes: Scenes, decision: SemanticUnits | None = None
) -> UnitCounts:
    """Count the rule's units on scenes seen whole; units of patches are as large as a patch."""
    decision = decision or SemanticUnits()
    found = UnitCounts()
    predictor = Predictor(model, decision=decision)
    for i in range(len(scenes)):
        scene = scenes[i]
        features = predictor.see([scene.image])[0].features
        units = decision.labels(features).unflatten(1, features.grid)
        whole = F.interpolate(units[None].float(), scene.mask.shape, mode="nearest")[0, 0]
        found.update(whole.long().cpu().numpy(), scene.mask.astype(np.int64))
    return found
