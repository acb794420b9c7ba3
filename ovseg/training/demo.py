"""The demo: systems trained on the embedded scenes one after the other.

What a system trains there is the ``demo.yaml`` of its folder:

    order    its place among the systems
    about    what it trains, for ``ovseg demo --help``
    beside   systems whose rows come first
    stages   of each training run: its title in tables, its folder, its recipe; ``clip``, the folder
             of the CLIP that it starts from; ``bundled_clip``, the data for which its recipe names
             a CLIP itself
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import distributed
from ..errors import ConfigError
from ..replacing import file_for, folder_for
from ..systems.registry import files_of_systems
from ..text_files import tree_of
from . import trainer
from .recipe import Recipe, load_recipe
from .stages import check_names


@dataclass(frozen=True)
class Stage:
    """One training run of a system; the attributes are keys of ``demo.yaml``."""

    title: str
    folder: str
    recipe: str
    clip: str | None = None
    bundled_clip: str | None = None

    def starts_from(self, data: str) -> str | None:
        """Return the folder of the CLIP that must be trained before, None without one."""
        return None if self.bundled_clip == data else self.clip


@dataclass(frozen=True)
class DemoSystem:
    """The rows of one system in the demo."""

    about: str
    stages: tuple[Stage, ...]
    beside: tuple[str, ...] = ()
    order: int = 0


def demo_systems() -> dict[str, DemoSystem]:
    """Return what each system trains, by the names of their folders, in order."""
    found = {}
    for path in files_of_systems("demo.yaml"):
        tree = tree_of(path.read_text("utf-8"))
        stages = tuple(Stage(**stage) for stage in tree.pop("stages"))
        beside = tuple(tree.pop("beside", ()))
        found[path.parent.name] = DemoSystem(stages=stages, beside=beside, **tree)
    return dict(sorted(found.items(), key=lambda item: item[1].order))


def all_stages() -> list[Stage]:
    """Return the stages of all systems, in the order of tables."""
    return [stage for system in demo_systems().values() for stage in system.stages]


@dataclass
class DemoJob:
    """A demo: systems that are trained on the scenes, and compared.

    Attributes:
        systems: their names, or ``all``.
        data: form of the scenes.
        out: the folder of the runs and results.
        seed: of all recipes.
        steps: of each row, in order, of all its stages together; None leaves them to the recipes.
        train_scenes: scenes to train on; None leaves them to the recipes.
        stages: what is trained, in order.
    """

    systems: Sequence[str] = ("pacl",)
    data: str = "digits"
    out: str | Path | None = None
    seed: int = 0
    steps: Sequence[int] | None = None
    train_scenes: int | None = None
    stages: list[Stage] = field(init=False)

    def __post_init__(self) -> None:
        distributed.place()  # variables that do not fit are refused before any work
        self.out = folder_for(f"runs/demo_{self.data}" if self.out is None else self.out, "--out")
        known = demo_systems()
        chosen = list(known) if "all" in self.systems else self.systems
        names = {part for name in chosen for part in (*known[name].beside, name)}
        wanted = [stage for name in names for stage in known[name].stages]
        folders = {stage.folder for stage in wanted}
        folders |= {stage.starts_from(self.data) or stage.folder for stage in wanted}
        self.stages = [stage for stage in all_stages() if stage.folder in folders]
        if self.steps and len(self.steps) != len(self.stages):
            raise ConfigError(
                f"--steps holds {len(self.steps)} numbers; expected one for each of "
                f"{', '.join(stage.title for stage in self.stages)}"
            )
        for name in ("results.json", "table.md", "gallery.png", "loss.png"):
            file_for(self.out / name, "--out needs a file, and")

    def folder(self, stage: Stage) -> Path:
        """Return the folder of a run."""
        return Path(str(self.out)) / stage.folder

    def recipes(self) -> dict[Stage, Recipe]:
        """Return the recipe of each row, as the options change it.

        Raises:
            ConfigError: where a folder holds another run.
        """
        return {stage: self._recipe(stage, i) for i, stage in enumerate(self.stages)}

    def _recipe(self, stage: Stage, number: int) -> Recipe:
        recipe = load_recipe(stage.recipe, [*self._changes(stage), f"train.seed={self.seed}"])
        if self.steps:
            shorten(recipe, self.steps[number])
        if self.train_scenes:
            recipe.data.train_size = self.train_scenes
        folder = folder_for(self.folder(stage), "--out needs a folder, and")
        check_names(folder)
        saved = folder / "config.yaml"
        # Another seed or other data: going on would mix two runs.
        if saved.exists() and load_recipe(saved) != recipe:
            raise ConfigError(
                f"{folder} was begun with other settings; expected a new --out, or the same "
                "command again"
            )
        return recipe

    def _changes(self, stage: Stage) -> list[str]:
        """Return the overrides of a stage's recipe: the data, and the CLIP it starts from."""
        changes = [f"data.style={self.data}"]
        if load_recipe(stage.recipe).data.kind == "masks":
            changes = [f"data.set={self.data}", f"objective.options.classes={self.data}"]
        clip = stage.starts_from(self.data)
        if clip is not None:
            changes.append(f"init.backbone={Path(str(self.out)) / clip}")
            if stage.bundled_clip:
                changes.append("model.options.clip=null")
        return changes


def train_stages(
    job: DemoJob,
    done: Collection[str],
    after: Callable[[Stage, float], Any],
    *,
    quiet: bool = False,
) -> None:
    """Train what is not trained yet; a demo that was stopped goes on.

    Args:
        job: what is trained.
        done: titles of the stages that are left out.
        after: called with each stage that has been trained, and its seconds.
        quiet: whether the runs say nothing.

    Raises:
        Interrupted: when a signal has come and the state is saved.
    """
    recipes = job.recipes()  # all, before the first of them trains
    for stage, recipe in recipes.items():
        if stage.title in done:
            continue
        started = time.time()
        trainer.train(recipe, job.folder(stage), resume="auto", quiet=quiet)
        after(stage, round(time.time() - started, 1))


def shorten(recipe: Recipe, steps: int) -> None:
    """Train so many steps in all; stages keep their shares, and warm-ups theirs if it is less."""
    usual = recipe.train.steps
    whole = sum(stage.get("train", {}).get("steps", usual) for stage in recipe.stages) or usual
    recipe.train.steps = steps
    share = min(1.0, steps / whole)
    recipe.schedule.warmup_steps = int(recipe.schedule.warmup_steps * share)
    for stage in recipe.stages:
        part = stage.setdefault("train", {})
        part["steps"] = max(1, part.get("steps", usual) * steps // whole)
        schedule = stage.get("schedule", {})
        if "steps" in schedule:
            schedule["steps"] = max(1, schedule["steps"] * steps // whole)
        if "warmup_steps" in schedule:
            schedule["warmup_steps"] = int(schedule["warmup_steps"] * share)
