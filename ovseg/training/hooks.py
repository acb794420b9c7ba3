"""Hooks of the trainer: the log, the validation, the checkpoints, the loss curve.

A hook is called before the first step of a stage and after every step.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import distributed
from ..figures import beside_the_work, new_figure, save_figure
from ..replacing import write_text
from ..systems import OVSegModel, save_pretrained
from ..text_files import records_of
from . import state
from .recipe import Recipe
from .stages import BEST, Run, begin_run

if TYPE_CHECKING:
    from .trainer import Trainer

logger = logging.getLogger(__name__)
Evaluate = Callable[[OVSegModel, int, Path], dict[str, float]]
# Of a curve as it is, and smoothed.
_COLOURS = (("#9ecae1", "#08519c"), ("#fdae6b", "#a63603"), ("#a1d99b", "#00682a"))


@dataclass
class Step:
    """A step that was made, or was left out for an infinite loss.

    Attributes:
        number: from the beginning of the run.
        losses: by name, with ``total``; of the batch of all processes.
        images: pictures, of all processes.
        seconds, waited: that it took, and of them for data.
        finite: whether the weights were changed: no loss or gradient was infinite or NaN.
        explained: whether the scale of fp16 is to blame where they were not.
        last, stopping: of the stage; whether a signal came.
    """

    number: int
    losses: dict[str, float]
    lr: float
    grad_norm: float
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    finite: bool = True
    explained: bool = False
    last: bool = False
    stopping: bool = False


class Hook:
    """Base of what happens beside training; all of it is called in all processes."""

    def before_steps(self, trainer: Trainer) -> None:
        """Act before the first step of a stage, or of what is left of it."""

    def after_step(self, trainer: Trainer, step: Step) -> None:
        """Act after a step, also after one that was skipped."""

    def before_failure(self, trainer: Trainer) -> bool:
        """Act between two steps, where the data have failed.

        Returns:
            Whether what is trained is saved.
        """
        return False


@dataclass
class Begin(Hook):
    """Writes the folder of the run once a step is made: what fails before leaves it as it was."""

    run: Run
    recipe: Recipe
    device: torch.device
    done: bool = False

    def after_step(self, trainer: Trainer, step: Step) -> None:
        """Write the folder after the first step."""
        self.now()

    def now(self) -> None:
        """Write the folder; only the first call does anything."""
        if not self.done:
            begin_run(self.run, self.recipe, self.device)
            self.done = True


@dataclass
class Log(Hook):
    """A line of JSON every so many steps, and one for every step that was skipped.

    It holds loss and its parts, rate, norm of the gradient, seconds since the run began or went on,
    pictures a second and the share of time spent waiting for data since the last line.
    """

    path: Path
    every: int
    began: float = field(default_factory=time.time)
    _images: int = 0  # since the last line
    _seconds: float = 0.0
    _waited: float = 0.0
    _failed: bool = False

    def after_step(self, trainer: Trainer, step: Step) -> None:
        """Count a step, and write a line if it is time."""
        self._images += step.images
        self._seconds += step.seconds
        self._waited += step.waited
        total = step.losses["total"]
        if not step.finite:
            self._write(
                {
                    "step": step.number,
                    "skipped": True,
                    "loss": str(total),
                    "grad_norm": str(step.grad_norm),
                }
            )
        elif step.number % self.every == 0 or step.last:
            seconds = max(self._seconds, 1e-9)
            parts = {name: value for name, value in step.losses.items() if name != "total"}
            stage = {} if trainer.stages == 1 else {"stage": trainer.state.stage}
            self._write(
                {
                    "step": step.number,
                    "loss": total,
                    **parts,
                    **stage,
                    "lr": step.lr,
                    "grad_norm": step.grad_norm,
                    "seconds": round(time.time() - self.began, 3),
                    "samples_per_second": round(self._images / seconds, 1),
                    "data_share": round(self._waited / seconds, 4),
                }
            )
            self._images = 0
            self._seconds = 0.0
            self._waited = 0.0

    def _write(self, entry: dict[str, Any]) -> None:
        if not distributed.is_main():
            return
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:  # a disk that is full: the weights are worth more than a line
            if not self._failed:
                logger.warning(
                    "%s cannot be written (%s); training goes on, lines are missing",
                    self.path,
                    error.strerror,
                )
            self._failed = True


@dataclass
class Validation(Hook):
    """Validates every so many steps and at the end of a stage.

    Figures go to ``validation.jsonl``, pictures to ``validation/``, and the model to ``best/``
    where ``miou`` is the highest of the stage so far. What a signal left out is made up for when
    the run goes on.
    """

    folder: Path
    every: int
    evaluate: Evaluate

    def before_steps(self, trainer: Trainer) -> None:
        """Make up for what was left out."""
        of_stage = trainer.state.step
        done = trainer.state.done + of_stage
        if of_stage and (of_stage == trainer.steps or done % self.every == 0):
            made = [entry.get("step") for entry in records_of(self._path)[0]]
            if not distributed.broadcast_json(done in made):  # as the main process sees the file
                self._validate(trainer, done)

    def after_step(self, trainer: Trainer, step: Step) -> None:
        """Validate if it is time, and no signal came."""
        done = step.number + 1
        if not step.stopping and (step.last or done % self.every == 0):
            self._validate(trainer, done)

    @property
    def _path(self) -> Path:
        return self.folder / "validation.jsonl"

    def _validate(self, trainer: Trainer, done: int) -> None:
        model = trainer.model_to_use()
        was = model.training
        try:
            figures = self.evaluate(model.eval(), done, self.folder / "validation")
        finally:
            model.train(was)
        if not distributed.is_main():
            return
        path = self._path
        # A killed run does some again.
        before = [
            entry
            for entry in records_of(path)[0]
            if isinstance(entry.get("step"), int) and entry["step"] < done
        ]
        entries = [*before, {"step": done, **figures}]
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in entries))
        told = ", ".join(f"{name} {value}" for name, value in figures.items())
        logger.info("validation after step %d: %s", done, told)
        of_stage = [
            entry.get("miou", -math.inf) for entry in before if entry["step"] > trainer.state.done
        ]
        if figures.get("miou", -math.inf) > max(of_stage, default=-math.inf):
            save_pretrained(model, self.folder / BEST, step=done, **figures)


@dataclass
class Checkpoints(Hook):
    """Saves the state every so many steps and at the end of a stage.

    Also when a signal asks to stop, and before the run fails for want of data.
    """

    run: Run
    every: int
    keep: int
    _saved: int = 0  # steps of the newest checkpoint

    def __post_init__(self) -> None:
        if self.run.at is not None:
            facts = state.facts_of(self.run.at)
            self._saved = facts["done"] + facts["step"]

    def after_step(self, trainer: Trainer, step: Step) -> None:
        """Save if it is time."""
        if step.last or step.stopping or (step.number + 1) % self.every == 0:
            self._save(trainer)

    def before_failure(self, trainer: Trainer) -> bool:
        """Save what is not saved yet."""
        steps = trainer.state.done + trainer.state.step
        if steps != self._saved:
            self._save(trainer)
        return steps > 0

    def _save(self, trainer: Trainer) -> None:
        state.save(self.run.checkpoints, trainer.state, self.run.recipe, self.run.key, self.keep)
        self._saved = trainer.state.done + trainer.state.step


def plot_loss(log: Path, out: Path, title: str = "") -> Path | None:
    """Draw loss against step from ``log.jsonl``, raw and smoothed.

    None, with a warning, where it cannot be drawn.
    """
    return join_curves({title or "loss": log}, out)


@beside_the_work("loss curve")
def join_curves(logs: dict[str, Path], out: Path) -> Path | None:
    """Draw one panel a run, four side by side."""
    curves = {title: _points(log) for title, log in logs.items()}
    curves = {title: points for title, points in curves.items() if points}
    if not curves:
        return None
    columns = min(4, len(curves))
    rows = math.ceil(len(curves) / 4)
    figure = new_figure(figsize=(5.5 * columns, 3.5 * rows))
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(curves) :]:
        axes.remove()
    for axes, (title, points), (pale, strong) in zip(
        panels, curves.items(), _COLOURS * len(curves), strict=False
    ):
        steps, losses = zip(*points, strict=True)
        # A centred median: a running mean would trail the drop at the start.
        window = max(1, len(losses) // 20)
        smooth = [
            statistics.median(losses[max(0, i - window) : i + window + 1])
            for i in range(len(losses))
        ]
        axes.plot(steps, losses, color=pale, linewidth=0.8, label="loss")
        axes.plot(steps, smooth, color=strong, linewidth=1.6, label="smoothed")
        axes.set(xlabel="step", ylabel="loss", title=title)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    return save_figure(figure, out, dpi=120)


def _points(log: Path) -> list[tuple[int, float]]:
    """Return (step, loss) of the lines that hold both and are of no skipped step."""
    entries = [entry for entry in records_of(log)[0] if "skipped" not in entry]
    return [(entry["step"], entry["loss"]) for entry in entries if {"step", "loss"} <= set(entry)]
