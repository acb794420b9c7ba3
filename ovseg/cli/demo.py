"""The main job on the embedded default: train systems on scenes and compare where they look.

``pacl``: a tiny CLIP with the image-level loss, its patches read out as they are; PACL on that
    CLIP, frozen, as published; PACL's
objective with nothing frozen. ``segclip``, ``groupvit``, ``ovsegmentor`` (both its stages): those
from random weights. ``zegclip``: ZegCLIP on the tiny CLIP, frozen, with the masks of the seen
classes, with self-training on the unseen ones, and with the masks of all. ``mgca``: the
reconstruction of MGCA on the image-level CLIP, frozen. ``all``: all of them, in one table and one
page of pictures.

  ovseg demo                                  PACL on real handwritten digits on real textures
  ovseg demo --system segclip                 SegCLIP, into the same table if --out is the same
  ovseg demo --system pacl segclip --data shapes
  ovseg demo --system all                     an hour and more
Writes results.json, table.md, gallery.png, loss.png and all runs into --out; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..progress import duration
from .ending import STOPPED, say
from .options import at_least, no_plots

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One training run of a system: its row's title, its folder, its recipe, and the folder of the
    CLIP it starts from; ``names_clip``: the data for which the recipe names one itself.
    """

    title: str
    folder: str
    recipe: str
    clip: str | None = None
    names_clip: str | None = None


CLIP = Stage("CLIP, image level", "clip", "clip_scenes")
SYSTEMS = {
    "pacl": (
        CLIP,
        Stage("PACL, CLIP frozen", "pacl", "pacl_scenes", "clip"),
        Stage("PACL, nothing frozen", "pacl_full", "pacl_full_scenes", "clip"),
    ),
    "segclip": (Stage("SegCLIP", "segclip", "segclip_scenes"),),
    "groupvit": (Stage("GroupViT", "groupvit", "groupvit_scenes"),),
    "ovsegmentor": (Stage("OVSegmentor", "ovsegmentor", "ovsegmentor_scenes"),),
    "mgca": (CLIP, Stage("MGCA-style", "mgca", "mgca_scenes", "clip")),
    "zegclip": (
        Stage("ZegCLIP, inductive", "zegclip", "zegclip_scenes", "clip", "digits"),
        Stage(
            "ZegCLIP, transductive",
            "zegclip_transductive",
            "zegclip_transductive_scenes",
            "clip",
            "digits",
        ),
        Stage(
            "ZegCLIP, all classes seen",
            "zegclip_supervised",
            "zegclip_supervised_scenes",
            "clip",
            "digits",
        ),
    ),
}


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--system",
        nargs="+",
        default=["pacl"],
        choices=(*SYSTEMS, "all"),
        help="systems to train (default: pacl)",
    )
    sub.add_argument("--data", default="digits", choices=("digits", "shapes"))
    sub.add_argument("--out", help="folder (default: runs/demo_DATA)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument(
        "--steps",
        type=int,
        nargs="+",
        help="training steps of each row, in order, of all its stages",
    )
    sub.add_argument(
        "--train-scenes", type=int, help="scenes to train on (default: those of the recipes)"
    )
    sub.add_argument("--scenes", type=int, default=300, help="validation scenes")
    sub.add_argument("--quiet", action="store_true")


def run(options: argparse.Namespace) -> int:
    from .. import distributed
    from ..errors import ConfigError
    from ..evaluation.scenes import scene_table
    from ..output_lock import locked_folder
    from ..replacing import file_for, folder_for
    from ..training.trainer import Interrupted, train

    distributed.place()  # variables that do not fit are refused before any work
    at_least(1, options, "steps", "train_scenes", "scenes")
    at_least(0, options, "seed")
    out = folder_for(f"runs/demo_{options.data}" if options.out is None else options.out, "--out")
    systems = SYSTEMS if "all" in options.system else options.system
    stages = list(dict.fromkeys(stage for system in systems for stage in SYSTEMS[system]))
    if CLIP not in stages and any(
        stage.clip and stage.names_clip != options.data for stage in stages
    ):
        stages = [CLIP, *stages]  # the bundled one knows other words
    if options.steps and len(options.steps) != len(stages):
        raise ConfigError(
            f"--steps holds {len(options.steps)} numbers; expected one for each of "
            f"{', '.join(s.title for s in stages)}"
        )
    for name in ("results.json", "table.md", "gallery.png", "loss.png"):
        file_for(out / name, "--out needs a file, and")
    options.held.enter_context(locked_folder(out, "--out", "demo"))
    results = out / "results.json"
    before = _earlier(results)
    if all(stage.title in before for stage in stages):
        raise ConfigError(
            f"{out} holds the results of a demo already; expected a new --out, or remove it"
        )
    recipes = {
        stage: _recipe(stage, options, out, i) for i, stage in enumerate(stages)
    }  # all, before the first of them trains
    no_plots("no loss curve is drawn")
    found = _Found(out, options, {title: row["train_seconds"] for title, row in before.items()})
    for stage, recipe in recipes.items():
        if stage.title in before:
            continue
        started = time.time()
        try:
            # A demo that was stopped goes on by the same command.
            train(recipe, out / stage.folder, resume="auto", quiet=options.quiet)
        except Interrupted as error:
            say(f"ovseg demo: {error}; the same command goes on")
            return STOPPED
        found.seconds[stage.title] = round(time.time() - started, 1)
        found.evaluate(stage)
    rows = [report.summary for report in found.reports.values()]
    print(scene_table(rows))
    ratios = found.facts["seen_miou_over_first"]
    shown = ", ".join(
        f"{row['model']} {ratio:.1f}" for row, ratio in zip(rows[1:], ratios[1:], strict=True)
    )
    compared = f"Seen-object mIoU over that of {rows[0]['model']!r}: {shown}; " if shown else ""
    print(f"\n{compared}{found.facts['seconds']:.0f} s in all.")
    print(
        *(path for path in (out / "gallery.png", out / "loss.png", results) if path.exists()),
        sep="\n",
    )
    print(f"next: ovseg segment --demo --model {out / stages[-1].folder}")
    return 0


@dataclass
class _Found:
    """Results of the demo so far, written after each stage: a demo that is stopped leaves the rows
    that it has.

    Attributes:
        seconds: of training, by the title of each stage that has been trained, in earlier demos
            too.
        reports: by title, in the order of ``SYSTEMS``.
        facts: of ``results.json``.
    """

    out: Path
    options: argparse.Namespace
    seconds: dict[str, float]
    reports: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.time)

    def evaluate(self, last: Stage) -> None:
        """Evaluate what has been trained and is not evaluated yet; write table, pictures, curves,
        and the results at the end.
        """
        from ..data.scenes import Scenes
        from ..evaluation.scenes import evaluate_scenes, save_gallery, scene_table
        from ..replacing import write_text
        from ..systems import from_pretrained
        from ..training.hooks import join_curves

        scenes = Scenes(self.options.data, "val", self.options.scenes, self.options.seed)
        done = [
            stage
            for stage in dict.fromkeys(stage for system in SYSTEMS.values() for stage in system)
            if stage.title in self.seconds
        ]
        for stage in done:  # those of earlier demos too: the pictures need their predictions
            if stage.title not in self.reports:
                model = from_pretrained(self.out / stage.folder / "model")
                report = evaluate_scenes(model, scenes, keep=10, progress=not self.options.quiet)
                report.summary |= {"model": stage.title, "train_seconds": self.seconds[stage.title]}
                self.reports[stage.title] = report
                logger.info(
                    "%s: seen mIoU %s, trained in %s",
                    stage.title,
                    report.summary["seen_miou"],
                    duration(self.seconds[stage.title]),
                )
        self.reports = {stage.title: self.reports[stage.title] for stage in done}
        rows = [report.summary for report in self.reports.values()]
        save_gallery(self.reports, self.out / "gallery.png")
        join_curves(
            {stage.title: self.out / stage.folder / "log.jsonl" for stage in done},
            self.out / "loss.png",
        )
        write_text(self.out / "table.md", scene_table(rows) + "\n")
        seen = [row["seen_miou"] or 0.0 for row in rows]  # None where no class of them occurs
        environment = json.loads((self.out / last.folder / "env.json").read_text())
        self.facts = {
            "data": self.options.data,
            "seed": self.options.seed,
            "rows": rows,
            "seen_miou_over_first": [value / max(seen[0], 1e-9) for value in seen],
            "seconds": round(time.time() - self.began, 1),
            "environment": environment,
        }
        write_text(self.out / "results.json", json.dumps(self.facts, indent=2) + "\n")


def _earlier(results: Path) -> dict[str, dict[str, Any]]:
    """The rows of an earlier demo in the same folder."""
    from ..errors import DataError

    if not results.exists():
        return {}
    try:
        return {row["model"]: row for row in json.loads(results.read_text("utf-8"))["rows"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{results} is damaged ({error!r}); expected the results of a demo. Remove it, or "
            "give a new --out"
        ) from error


def _recipe(stage: Stage, options: argparse.Namespace, out: Path, number: int) -> Any:
    """The recipe of a row, as the options change it; refused where its folder holds another run."""
    from ..errors import ConfigError
    from ..replacing import folder_for
    from ..training.recipe import load_recipe
    from ..training.stages import check_names

    recipe = load_recipe(
        stage.recipe, [*_settings(stage, options.data, out), f"train.seed={options.seed}"]
    )
    if options.steps:
        _shorten(recipe, options.steps[number])
    if options.train_scenes:
        recipe.data.train_size = options.train_scenes
    folder = folder_for(out / stage.folder, "--out needs a folder, and")
    check_names(folder)
    saved = folder / "config.yaml"
    if (
        saved.exists() and load_recipe(saved) != recipe
    ):  # another seed or data: going on would mix two runs
        raise ConfigError(
            f"{folder} was begun with other settings; expected a new --out, or the same command "
            "again"
        )
    return recipe


def _settings(stage: Stage, data: str, out: Path) -> list[str]:
    """What the recipe of a stage is changed to: the data, and the CLIP it starts from."""
    from ..training.recipe import load_recipe

    masks = load_recipe(stage.recipe).data.kind == "masks"
    found = (
        [f"data.set={data}", f"objective.options.classes={data}"]
        if masks
        else [f"data.style={data}"]
    )
    if stage.clip and stage.names_clip != data:
        found += [
            f"init.backbone={out / stage.clip}",
            *(["model.options.clip=null"] if stage.names_clip else []),
        ]
    return found


def _shorten(recipe: Any, steps: int) -> None:
    """So many steps in all; stages keep their shares, and warm-ups theirs of a shorter run."""
    usual = recipe.train.steps
    whole = sum(stage.get("train", {}).get("steps", usual) for stage in recipe.stages) or usual
    recipe.train.steps = steps
    share = min(1.0, steps / whole)
    recipe.schedule.warmup_steps = int(recipe.schedule.warmup_steps * share)
    for stage in recipe.stages:
        part = stage.setdefault("train", {})
        part["steps"] = max(1, part.get("steps", usual) * steps // whole)
        if "steps" in stage.get("schedule", {}):
            stage["schedule"]["steps"] = max(1, stage["schedule"]["steps"] * steps // whole)
        if "warmup_steps" in stage.get("schedule", {}):
            stage["schedule"]["warmup_steps"] = int(stage["schedule"]["warmup_steps"] * share)
