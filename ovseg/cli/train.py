"""Train a model by a recipe.

  ovseg train clip_scenes run=runs/clip
  ovseg train pacl_scenes run=runs/pacl model.clip_from=runs/clip optim.lr=1e-3
  ovseg train my_recipe.yaml run=runs/mine --resume
"""

from __future__ import annotations

import argparse
import sys


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("recipe", help="a recipe's name or a YAML file; `ovseg train list` prints the names")
    sub.add_argument("overrides", nargs="*", help="key=value, and run=FOLDER for the output")
    sub.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint")
    sub.add_argument("--print", action="store_true", dest="show", help="print the resolved recipe and stop")


def run(options: argparse.Namespace) -> int:
    from omegaconf import OmegaConf

    from ..errors import ConfigError
    from ..training.loop import Interrupted, train
    from ..training.recipe import list_recipes, load_recipe

    if options.recipe == "list":
        print(*list_recipes(), sep="\n")
        return 0
    folders = [o.split("=", 1)[1] for o in options.overrides if o.startswith("run=")]
    recipe = load_recipe(options.recipe, [o for o in options.overrides if not o.startswith("run=")])
    if options.show:
        print(OmegaConf.to_yaml(OmegaConf.structured(recipe)), end="")
        return 0
    if not folders:
        raise ConfigError("run is missing: add run=FOLDER, where the checkpoints and the log go")
    try:
        train(recipe, folders[-1], resume=options.resume)
    except Interrupted as error:
        print(f"ovseg train: {error}", file=sys.stderr)
        return 143
    print(f"{folders[-1]}/model: ovseg segment --model {folders[-1]} ...; loss curve: {folders[-1]}/loss.png")
    return 0
