"""The main job on the embedded default: train systems on scenes and compare where they look.

  ovseg demo                                  PACL on real handwritten digits on real textures
  ovseg demo --system segclip                 SegCLIP, into the same table if --out is the same
  ovseg demo --system pacl segclip --data shapes
  ovseg demo --system all                     an hour and more

Writes results.json, table.md, gallery.png, loss.png and all runs into --out; nothing is downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .ending import STOPPED, say
from .options import COUNT, INDEX, no_plots


def arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    from ..training.demo import demo_systems

    systems = demo_systems()
    sub.add_argument(
        "--system",
        nargs="+",
        default=["pacl"],
        choices=(*systems, "all"),
        help="systems to train (default: pacl). "
        + "; ".join(f"{name}: {system.about}" for name, system in systems.items())
        + "; all: all of them, in one table and one page of pictures",
    )
    sub.add_argument("--data", default="digits", choices=("digits", "shapes"))
    sub.add_argument("--out", help="folder (default: runs/demo_DATA)")
    sub.add_argument("--seed", **INDEX, default=0)
    sub.add_argument(
        "--steps",
        **COUNT,
        nargs="+",
        help="training steps of each row, in order, of all its stages",
    )
    sub.add_argument(
        "--train-scenes", **COUNT, help="scenes to train on (default: those of the recipes)"
    )
    sub.add_argument("--scenes", **COUNT, default=300, help="validation scenes")
    sub.add_argument("--quiet", action="store_true")


def run(options: argparse.Namespace) -> int:
    """Train and compare; returns the exit code."""
    from ..errors import ConfigError
    from ..evaluation.demo import DemoResults
    from ..output_lock import locked_folder
    from ..training.demo import DemoJob, Stage, all_stages, train_stages
    from ..training.hooks import join_curves
    from ..training.trainer import Interrupted

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

    try:
        train_stages(job, results.done, measure, quiet=options.quiet)
    except Interrupted as error:
        say(f"ovseg demo: {error}; the same command goes on")
        return STOPPED
    print(*results.lines(), sep="\n")
    files = (out / "gallery.png", out / "loss.png", out / "results.json")
    print(*(path for path in files if path.exists()), sep="\n")
    print(f"next: ovseg segment --demo --model {out / job.stages[-1].folder}")
    return 0
