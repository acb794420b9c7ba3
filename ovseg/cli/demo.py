"""The main job on the embedded default: train systems on scenes and compare where they look.

  ovseg demo                                  PACL on real handwritten digits on real textures
  ovseg demo --system segclip                 SegCLIP, into the same table if --out is the same
  ovseg demo --system pacl segclip --data shapes
  ovseg demo --system all                     an hour and more
  ovseg demo --data photos --root PHOTOS      small models on photographs: docs/photos.md

Writes results.json, table.md, gallery.png, loss.png and all runs into --out; nothing is downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .ending import STOPPED, say
from .options import COUNT, INDEX, no_plots

_SCENES = ("digits", "shapes")
# What is of one kind of data alone: the option, and what it is without it.
_OF_SCENES: dict[str, Any] = {"system": ["pacl"], "seed": 0, "train_scenes": None, "scenes": 300}
_OF_PHOTOS: dict[str, Any] = {
    "root": None,
    "seeds": "0",
    "rows": None,
    "limit": None,
    "override": [],
}


def arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    from ..training.demo import demo_systems

    systems = demo_systems()
    sub.add_argument("--data", default="digits", choices=(*_SCENES, "photos"))
    sub.add_argument("--out", help="folder (default: runs/demo_DATA)")
    sub.add_argument("--quiet", action="store_true")
    sub.add_argument(
        "--steps",
        **COUNT,
        nargs="+",
        help="training steps of each row, in order, of all its stages; on photographs one number, "
        "of each stage of every row",
    )
    scenes = sub.add_argument_group("on the embedded scenes")
    scenes.add_argument(
        "--system",
        nargs="+",
        choices=(*systems, "all"),
        help="systems to train (default: pacl). "
        + "; ".join(f"{name}: {system.about}" for name, system in systems.items())
        + "; all: all of them, in one table and one page of pictures",
    )
    scenes.add_argument("--seed", **INDEX, help="(default: 0)")
    scenes.add_argument(
        "--train-scenes", **COUNT, help="scenes to train on (default: those of the recipes)"
    )
    scenes.add_argument("--scenes", **COUNT, help="validation scenes (default: 300)")
    photos = sub.add_argument_group("on photographs")
    photos.add_argument("--root", help="their folder, in the layout of docs/photos.md")
    photos.add_argument("--seeds", help="comma-separated (default: 0)")
    photos.add_argument(
        "--rows", help="comma-separated: " + ", ".join(_photo_rows()) + " (default: all)"
    )
    photos.add_argument("--limit", **COUNT, help="pictures to measure on (default: all)")
    photos.add_argument(
        "--override",
        nargs="+",
        metavar="KEY=VALUE",
        help="of all recipes, as `ovseg train` takes them",
    )


def _photo_rows() -> list[str]:
    from ..training.photos import photo_rows

    return [row.folder for row in photo_rows()]


def run(options: argparse.Namespace) -> int:
    """Train and compare; returns the exit code."""
    from ..errors import InputError
    from ..training.trainer import Interrupted

    photos = options.data == "photos"
    for name in _OF_SCENES if photos else _OF_PHOTOS:
        if getattr(options, name) is not None:
            raise InputError(
                f"--{name.replace('_', '-')} is given and --data is {options.data!r}; expected it "
                f"with {'digits or shapes' if photos else 'photos'}"
            )
    for name, usual in (_OF_PHOTOS if photos else _OF_SCENES).items():
        if getattr(options, name) is None:
            setattr(options, name, usual)
    try:
        return _photos(options) if photos else _scenes(options)
    except Interrupted as error:
        say(f"ovseg demo: {error}; the same command goes on")
        return STOPPED


def _scenes(options: argparse.Namespace) -> int:
    from ..errors import ConfigError
    from ..evaluation.demo import DemoResults
    from ..output_lock import locked_folder
    from ..training.demo import DemoJob, Stage, all_stages, train_stages
    from ..training.hooks import join_curves

    job = DemoJob(
        options.system, options.data, options.out, options.seed, options.steps, options.train_scenes
    )
    out = Path(str(job.out))
    options.held.enter_context(locked_folder(out, "--out", "demo"))
    folders = {stage.title: stage.folder for stage in all_stages()}
    results = DemoResults(
        out, folders, options.data, options.scenes, options.seed, quiet=options.quiet
    )
    if all(stage.title in results.seconds for stage in job.stages):
        raise ConfigError(
            f"{out} holds the results of a demo already; expected a new --out, or remove it"
        )
    no_plots("no loss curve is drawn")

    def measure(stage: Stage, seconds: float) -> None:
        results.measure(stage.title, seconds)
        logs = {title: out / folders[title] / "log.jsonl" for title in results.done}
        join_curves(logs, out / "loss.png")

    train_stages(job, results.done, measure, quiet=options.quiet)
    print(*results.lines(), sep="\n")
    files = (out / "gallery.png", out / "loss.png", out / "results.json")
    print(*(path for path in files if path.exists()), sep="\n")
    print(f"next: ovseg segment --demo --model {out / job.stages[-1].folder}")
    return 0


def _photos(options: argparse.Namespace) -> int:
    from ..errors import InputError
    from ..evaluation.photos import FILES, Measured, PhotoResults
    from ..output_lock import locked_folder
    from ..training.hooks import join_curves
    from ..training.photos import Effort, PhotoJob, PhotoRun, train_runs

    if options.root is None:
        raise InputError(
            "--root is missing; expected the folder of the photographs (docs/photos.md)"
        )
    if options.steps is not None and len(options.steps) > 1:
        raise InputError(f"--steps holds {len(options.steps)} numbers; expected one on photographs")
    job = PhotoJob(
        Path(options.root),
        Path(options.out or "runs/demo_photos"),
        _numbers(options.seeds),
        None if options.rows is None else [name.strip() for name in options.rows.split(",")],
        None if options.steps is None else options.steps[0],
        options.override,
    )
    options.held.enter_context(locked_folder(job.out, "--out", "demo"))
    known = {
        run: Measured(run.row.title, run.seed, run.folder, run.row.supervised) for run in job.runs
    }
    results = PhotoResults(
        job.root, job.out, list(known.values()), options.limit, quiet=options.quiet
    )
    no_plots("no loss curve is drawn")

    def measure(run: PhotoRun, effort: Effort) -> None:
        results.measure(known[run], vars(effort))

    done = [run for run, one in known.items() if one in results.found]
    train_runs(job, done, measure, quiet=options.quiet)
    results.write()
    results.draw()
    logs = {run.row.title: run.folder / "log.jsonl" for run in job.runs if run.seed == job.seeds[0]}
    join_curves(logs, job.out / "loss.png")
    print(results.table())
    print(*(job.out / name for name in FILES if (job.out / name).exists()), sep="\n")
    print(f"next: ovseg segment PICTURE -m {job.runs[0].folder}")
    return 0


def _numbers(text: str) -> list[int]:
    """Return the numbers of ``--seeds``."""
    from ..errors import InputError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--seeds is {text!r}; expected numbers, such as 0,1,2") from error
