"""Train a model by a recipe.

ovseg train clip_scenes run=runs/clip
ovseg train pacl_scenes run=runs/pacl init.backbone=runs/clip optim.lr=1e-3
ovseg train my_recipe.yaml run=runs/mine --resume
torchrun --nproc-per-node 2 -m ovseg train pacl_scenes run=runs/pacl
                                                one batch shared by two processes
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .ending import STOPPED, say
from .options import no_plots


def arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    sub.add_argument(
        "recipe", help="a recipe's name or a YAML file; `ovseg train list` prints the names"
    )
    sub.add_argument("overrides", nargs="*", help="key=value, and run=FOLDER for the output")
    going_on = sub.add_mutually_exclusive_group()
    going_on.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in the folder, from its newest intact checkpoint",
    )
    going_on.add_argument(
        "--auto-resume",
        action="store_true",
        help="the same where there is a run, else begin one: for jobs that a cluster starts again",
    )
    sub.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="KEY",
        help="with --resume: a key of the recipe that may have changed",
    )
    sub.add_argument(
        "--print", action="store_true", dest="show", help="print the resolved recipe and stop"
    )


def run(options: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    from .. import distributed
    from ..errors import ConfigError
    from ..training.recipe import list_recipes, load_recipe, to_yaml

    distributed.place()  # variables that do not fit are refused before any work
    if options.recipe == "list":
        print(*list_recipes(), sep="\n")
        return 0
    if options.allow and not (options.resume or options.auto_resume):
        raise ConfigError("--allow is given without --resume; expected both, or neither")
    folders = [o.removeprefix("run=") for o in options.overrides if o.startswith("run=")]
    recipe = load_recipe(options.recipe, [o for o in options.overrides if not o.startswith("run=")])
    if options.show:
        print(to_yaml(recipe), end="")
        return 0
    if not folders:
        raise ConfigError("run is missing: add run=FOLDER, where the checkpoints and the log go")
    return _train(options, recipe, folders[-1])


def _train(options: argparse.Namespace, recipe: Any, run: str) -> int:
    """Train into the folder ``run``, or go on there."""
    from .. import distributed, stop_signals
    from ..errors import ProcessError
    from ..evaluation.validation import validation
    from ..output_lock import locked_folder
    from ..replacing import folder_for
    from ..training.stages import finished
    from ..training.trainer import Interrupted, train

    folder = folder_for(run, "run")
    if (options.resume or options.auto_resume) and (steps := finished(folder, recipe)) is not None:
        if distributed.is_main():
            print(f"{folder} is done already, {steps} steps: ovseg segment --model {folder} ...")
        return 0
    no_plots("no loss curve is drawn")
    with stop_signals.noted() as request:
        try:
            distributed.group()  # whoever does not come is known before anything is loaded
        except ProcessError:
            if not (request or distributed.launcher_gone()):
                raise
            say(f"ovseg train: {request} before the first step; nothing new is trained")
            return STOPPED
    options.held.enter_context(locked_folder(folder, "run", "train"))
    try:
        resume = "auto" if options.auto_resume else options.resume
        train(recipe, run, resume=resume, allow=options.allow, evaluate=validation(recipe))
    except Interrupted as error:
        say(f"ovseg train: {error}")
        return STOPPED
    if distributed.is_main():
        curve = Path(run, "loss.png")
        drawn = f"; loss curve: {curve}" if curve.exists() else ""
        print(f"{run}/model: ovseg segment --model {run} ...{drawn}")
    return 0
