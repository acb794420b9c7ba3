"""Loss curves of runs.

What happens beside training: the log, the validation, the checkpoints. A hook is called after every
step, and at the end of the run.
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

_COLOURS = (("#9ecae1", "#08519c"), ("#fdae6b", "#a63603"), ("#a1d99b", "#00682a"))


def plot_loss(log: Path, out: Path, title: str = "") -> Path | None:
    """Loss against step from ``log.jsonl``, raw and smoothed.

    None, with a warning, where it cannot be drawn.
    """
    return join_curves({title or "loss": log}, out)


@beside_the_work("loss curve")
def join_curves(logs: dict[str, Path], out: Path) -> Path | None:
    """One panel a run, four side by side."""
    curves = {title: _points(log) for title, log in logs.items()}
    curves = {title: points for title, points in curves.items() if points}
    if not curves:
        return None
    columns, rows = min(4, len(curves)), -(-len(curves) // 4)
    figure = new_figure(figsize=(5.5 * columns, 3.5 * rows))
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(curves) :]:
        axes.remove()
    for axes, (title, points), (pale, strong) in zip(
        panels, curves.items(), _COLOURS * len(curves), strict=False
    ):
        steps, losses = zip(*points, strict=True)
        window = max(
            1, len(losses) // 20
        )  # a centred median: a running mean would trail the drop at the start
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
    entries = [entry for entry in records_of(log)[0] if "skipped" not in entry]
    return [(entry["step"], entry["loss"]) for entry in entries if {"step", "loss"} <= set(entry)]


if TYPE_CHECKING:
    from .trainer import Trainer

logger = logging.getLogger(__name__)
Evaluate = Callable[[OVSegModel, int, Path], dict[str, float]]


@dataclass
class Step:
    """What a step was.

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
    def before_steps(self, trainer: Trainer) -> None:
        """In all processes, before the first step of a stage, or of what is left of it."""

    def after_step(self, trainer: Trainer, step: Step) -> None:
        """In all processes, also after a step that was skipped."""

    def before_failure(self, trainer: Trainer) -> bool:
        """In all processes, between two steps, where the data have failed.

        Returns whether what is trained is saved.
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
        self.now()

    def now(self) -> None:
        """In all processes; only the first call does anything."""
        if not self.done:
            begin_run(self.run, self.recipe, self.device)
            self.done = True


@dataclass
class Log(Hook):
    """A line of JSON every so many steps, and one for every step that was skipped: loss and its
    parts, rate, norm of the gradient, seconds since the run began or went on, pictures a second and
    the share of time spent waiting for data since the last line.
    """

    path: Path
    every: int
    began: float = field(default_factory=time.time)
    _sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    _failed: bool = False

    def after_step(self, trainer: Trainer, step: Step) -> None:
        self._sums = [
            a + b for a, b in zip(self._sums, (step.images, step.seconds, step.waited), strict=True)
        ]
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
            images, seconds, waited = self._sums
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
                    "samples_per_second": round(images / max(seconds, 1e-9), 1),
                    "data_share": round(waited / max(seconds, 1e-9), 4),
                }
            )
            self._sums = [0.0, 0.0, 0.0]

    def _write(self, entry: dict[str, Any]) -> None:
        if not distributed.is_main():
            return
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")
        except (
            OSError
        ) as error:  # a disk that is full for now: the weights are worth more than a line
            if not self._failed:
                logger.warning(
                    "%s cannot be written (%s); training goes on, lines are missing",
                    self.path,
                    error.strerror,
                )
            self._failed = True


@dataclass
class Validation(Hook):
    """Every so many steps and at the end of a stage: figures to ``validation.jsonl``, pictures to
    ``validation/``, and the model to ``best/`` where ``miou`` is the highest of the stage so far.
    What a signal left out is made up for when the run goes on.
    """

    folder: Path
    every: int
    evaluate: Evaluate

    def before_steps(self, trainer: Trainer) -> None:
        of_stage, done = trainer.state.step, trainer.state.done + trainer.state.step
        if of_stage and (of_stage == trainer.steps or done % self.every == 0):
            made = [entry.get("step") for entry in records_of(self._path)[0]]
            if not distributed.broadcast_json(done in made):  # as the main process sees the file
                self._validate(trainer, done)

    def after_step(self, trainer: Trainer, step: Step) -> None:
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
        write_text(
            path,
            "".join(json.dumps(entry) + "\n" for entry in (*before, {"step": done, **figures})),
        )
        logger.info(
            "validation after step %d: %s",
            done,
            ", ".join(f"{name} {value}" for name, value in figures.items()),
        )
        of_stage = [
            entry.get("miou", -math.inf) for entry in before if entry["step"] > trainer.state.done
        ]
        if figures.get("miou", -math.inf) > max(of_stage, default=-math.inf):
            save_pretrained(model, self.folder / BEST, step=done, **figures)


@dataclass
class Checkpoints(Hook):
    """Every so many steps, at the end of a stage, when a signal asks to stop, and before the run
    fails for want of data."""

    run: Run
    every: int
    keep: int
    _saved: int = 0  # steps of the newest checkpoint

    def __post_init__(self) -> None:
        if self.run.at is not None:
            facts = state.facts_of(self.run.at)
            self._saved = facts["done"] + facts["step"]

    def after_step(self, trainer: Trainer, step: Step) -> None:
        if step.last or step.stopping or (step.number + 1) % self.every == 0:
            self._save(trainer)

    def before_failure(self, trainer: Trainer) -> bool:
        steps = trainer.state.done + trainer.state.step
        if steps != self._saved:
            self._save(trainer)
        return steps > 0

    def _save(self, trainer: Trainer) -> None:
        state.save(self.run.checkpoints, trainer.state, self.run.recipe, self.run.key, self.keep)
        self._saved = trainer.state.done + trainer.state.step
