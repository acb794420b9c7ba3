"""Learning rates over the steps of a stage: a curve, and a warm-up before, under or over its
beginning.

With s the step from 0 of S, w the warm-up's steps, t = s / S, and min the lowest rate as a share of
the highest:

    cosine    min + (1 - min) (1 + cos(pi t)) / 2                                              (1)
    poly      min + (1 - min) (1 - t)^power                                                    (2)
    constant  1                                                                                (3)
    warm-up   (s + 1) / w, or from ``warmup_start``: start + (1 - start) s / w                 (4)

``multiply``: warm-up times curve, both from the first step. ``replace``: the warm-up alone, then
    the curve where it stands by then (timm's
``warmup_prefix=False``). ``before``: the warm-up alone, then the whole curve over the steps that
are left, t counted from s + 1 (CLIP's BertAdam, and so SegCLIP).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import ConfigError

KINDS = ("cosine", "poly", "constant")
MODES = ("multiply", "replace", "before")


@dataclass
class Schedule:
    """Attributes:
    kind: of the curve: cosine, poly, constant.
    warmup_steps: w; 0: none.
    warmup_share: w as a share of all steps, in place of ``warmup_steps``.
    warmup_mode: multiply, replace, before.
    warmup_start: rate of the first step as a share of the highest; None: 1 / w.
    min_lr: the lowest rate.
    power: of poly.
    steps: of the curve, where it is longer than the stage: a stage that stops half-way.
    """

    kind: str = "cosine"
    warmup_steps: int = 60
    warmup_share: float | None = None
    warmup_mode: str = "multiply"
    warmup_start: float | None = None
    min_lr: float = 0.0
    power: float = 0.9
    steps: int | None = None


def learning_rate(schedule: Schedule, lr: float, step: int, steps: int) -> float:
    """The rate of a step of ``steps``; ``lr`` is the highest."""
    steps = schedule.steps or steps
    warm = schedule.warmup_steps if schedule.warmup_share is None else schedule.warmup_share * steps
    if schedule.warmup_mode == "before":
        done = step + 1
        if done < warm:
            return lr * _warmup(schedule, step, warm)
        return lr * _curve(schedule, lr, (done - warm) / max(1e-9, steps - warm))
    rising = _warmup(schedule, step, warm) if step < warm else 1.0
    if schedule.warmup_mode == "replace" and step < warm:
        return lr * rising
    return lr * rising * _curve(schedule, lr, step / steps)


def misfits(schedule: Schedule, lr: float, steps: int) -> list[str]:
    """Return what does not go together in a schedule and the steps of its stage, in sentences."""
    found = []
    whole = schedule.steps or steps
    key = "warmup_steps" if schedule.warmup_share is None else "warmup_share"
    warm = schedule.warmup_steps if schedule.warmup_share is None else schedule.warmup_share * whole
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
            "them "
            f"are at schedule.min_lr, {schedule.min_lr:g}; expected {steps} or more, or null"
        )
    return found


def _some(steps: int) -> list[int]:
    """All steps of a short stage, a thousand of a long one."""
    return list(range(0, steps, max(1, steps // 1000)))


def check_schedule(schedule: Schedule, lr: float, prefix: str = "schedule.") -> None:
    """Raises ConfigError for values that make no schedule."""
    if schedule.kind not in KINDS:
        raise ConfigError(f"{prefix}kind is {schedule.kind!r}; expected one of {list(KINDS)}")
    if schedule.warmup_mode not in MODES:
        raise ConfigError(
            f"{prefix}warmup_mode is {schedule.warmup_mode!r}; expected one of {list(MODES)}"
        )
    if schedule.warmup_share is not None and not 0 < schedule.warmup_share < 1:
        raise ConfigError(
            f"{prefix}warmup_share is {schedule.warmup_share}; expected a share between 0 and 1"
        )
    if schedule.warmup_steps < 0:
        raise ConfigError(f"{prefix}warmup_steps is {schedule.warmup_steps}; expected 0 or more")
    if schedule.warmup_start is not None and not 0 <= schedule.warmup_start <= 1:
        raise ConfigError(
            f"{prefix}warmup_start is {schedule.warmup_start}; expected a share of 0 to 1"
        )
    if not 0 <= schedule.min_lr <= lr:
        raise ConfigError(f"{prefix}min_lr is {schedule.min_lr}; expected 0 to optim.lr, {lr}")


def _warmup(schedule: Schedule, step: int, warm: float) -> float:
    if schedule.warmup_start is None:
        return (step + 1) / warm
    return schedule.warmup_start + (1 - schedule.warmup_start) * step / warm


def _curve(schedule: Schedule, lr: float, t: float) -> float:
    t, lowest = min(t, 1.0), schedule.min_lr / lr
    if schedule.kind == "cosine":
        return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * t))
    return lowest + (1 - lowest) * (1 - t) ** schedule.power if schedule.kind == "poly" else 1.0
