"""Learning rates over the steps of a stage: a curve, and a warm-up before, under or over its start.

With s the step from 0 of S, w the warm-up's steps, t = s / S, and min the lowest rate as a share of
the highest:

    cosine    min + (1 - min) (1 + cos(pi t)) / 2                                              (1)
    poly      min + (1 - min) (1 - t)^power                                                    (2)
    constant  1                                                                                (3)
    warm-up   (s + 1) / w, or from ``warmup_start``: start + (1 - start) s / w                 (4)

Three modes put them together. ``multiply``: warm-up times curve, both from the first step.
``replace``: the warm-up alone, then the curve where it stands by then (timm's
``warmup_prefix=False``). ``before``: the warm-up alone, then the whole curve over the steps that
are left, t counted from s + 1 (CLIP's BertAdam, and so SegCLIP).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..bounds import bounded
from ..errors import ConfigError


@dataclass
class Schedule:
    """How the learning rate goes.

    Attributes:
        kind: of the curve.
        warmup_steps: w; 0: none.
        warmup_share: w as a share of all steps, in place of ``warmup_steps``.
        warmup_mode: how warm-up and curve go together.
        warmup_start: rate of the first step as a share of the highest; None: 1 / w.
        min_lr: the lowest rate, no more than ``optim.lr``.
        power: of poly.
        steps: of the curve, where it is longer than the stage: a stage that stops half-way.
    """

    kind: str = bounded("cosine", one_of=("cosine", "poly", "constant"))
    warmup_steps: int = bounded(60, low=0)
    warmup_share: float | None = bounded(
        None, low=0, above=True, high=1, below=True, expected="a share between 0 and 1"
    )
    warmup_mode: str = bounded("multiply", one_of=("multiply", "replace", "before"))
    warmup_start: float | None = bounded(None, low=0, high=1, expected="a share of 0 to 1")
    min_lr: float = 0.0
    power: float = bounded(0.9, low=0, above=True)
    steps: int | None = bounded(None, low=0, above=True)

    def check_against(self, lr: float) -> None:
        """Raise ConfigError if the lowest rate is above ``lr``, the highest."""
        if not 0 <= self.min_lr <= lr:
            raise ConfigError(f"schedule.min_lr is {self.min_lr}; expected 0 to optim.lr, {lr}")

    def warmup(self, steps: int) -> float:
        """Return w for a curve of so many steps."""
        return self.warmup_steps if self.warmup_share is None else self.warmup_share * steps


def learning_rate(schedule: Schedule, lr: float, step: int, steps: int) -> float:
    """Return the rate of a step of ``steps``; ``lr`` is the highest."""
    steps = schedule.steps or steps
    warm = schedule.warmup(steps)
    if schedule.warmup_mode == "before":
        done = step + 1
        if done < warm:
            return lr * _rise(schedule, step, warm)
        return lr * _curve(schedule, lr, (done - warm) / max(1e-9, steps - warm))
    rising = _rise(schedule, step, warm) if step < warm else 1.0
    if schedule.warmup_mode == "replace" and step < warm:
        return lr * rising
    return lr * rising * _curve(schedule, lr, step / steps)


def misfits(schedule: Schedule, lr: float, steps: int) -> list[str]:
    """Return what does not go together in a schedule and the steps of its stage, in sentences."""
    found = []
    whole = schedule.steps or steps
    warm = schedule.warmup(whole)
    key = "warmup_steps" if schedule.warmup_share is None else "warmup_share"
    highest = max(learning_rate(schedule, lr, step, steps) for step in _some(steps))
    value = getattr(schedule, key)
    reached = f"the rate gets up to {highest:.2g} of optim.lr {lr:.2g}"
    if warm > steps:
        found.append(
            f"schedule.{key} is {value}, which is {warm:.0f} steps, and the stage has {steps}: "
            f"{reached}; expected fewer, such as schedule.warmup_steps={steps // 20}"
        )
    elif highest < lr / 2:
        found.append(
            f"schedule.{key} is {value} and the stage has {steps} steps: {reached}; "
            "expected a shorter warm-up, or more steps"
        )
    if schedule.kind != "constant" and whole < steps:
        found.append(
            f"schedule.steps is {whole} and the stage has {steps}: the last {steps - whole} of "
            f"them are at schedule.min_lr, {schedule.min_lr:g}; expected {steps} or more, or null"
        )
    return found


def _some(steps: int) -> list[int]:
    """Return all steps of a short stage, a thousand of a long one."""
    return list(range(0, steps, max(1, steps // 1000)))


def _rise(schedule: Schedule, step: int, warm: float) -> float:
    """Return the share of the highest rate that a step of the warm-up has, equation (4)."""
    if schedule.warmup_start is None:
        return (step + 1) / warm
    return schedule.warmup_start + (1 - schedule.warmup_start) * step / warm


def _curve(schedule: Schedule, lr: float, t: float) -> float:
    """Return the share of the highest rate that the curve has at t, equations (1) to (3)."""
    t = min(t, 1.0)
    lowest = schedule.min_lr / lr
    if schedule.kind == "cosine":
        return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * t))
    if schedule.kind == "poly":
        return lowest + (1 - lowest) * (1 - t) ** schedule.power
    return 1.0
