"""Training, top to bottom: recipe in, run folder out; one process or many, one stage or several.

A run folder holds config.yaml, env.json, log.jsonl, loss.png, checkpoints/ and model/ (what
``from_pretrained`` reads); with validation also validation.jsonl, validation/ and best/.

All processes do the same steps. What one of them alone sees, the end of its data, a picture that
cannot be read, a signal, a loss that is not finite, becomes known to all before any acts on it; so
none waits for another that has left.
"""

from __future__ import annotations

import ctypes
import logging
import math
import platform
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from .. import distributed, stop_signals
from ..data.batches import Batch
from ..data.sources.base import SkipLimit
from ..errors import DataError, InputError
from ..progress import bar
from ..replacing import folder_for
from ..stop_signals import StopRequest
from ..systems import OVSegModel, from_pretrained, save_pretrained
from ..systems.objective import Progress
from . import state as checkpoints
from .gradients import Gradients, LossScaler, cast_for, clip, is_sharded, shard, trained
from .hooks import Begin, Checkpoints, Evaluate, Hook, Log, Step, Validation, plot_loss
from .recipe import Recipe, stages_of, to_dict
from .schedule import learning_rate
from .stages import (
    Run,
    build_loader,
    build_model,
    build_objective,
    build_optimizer,
    find_run,
    finished,
    start,
)
from .start_checks import (
    check_later_stages,
    check_room,
    check_validation,
    tell_intervals,
    warn_of_misfits,
)
from .state import State

logger = logging.getLogger(__name__)
_BAD_IN_A_ROW = 10  # steps without a finite loss before the run stops


class Interrupted(Exception):
    """A signal came to one of the processes, see ``stop_signals``; the state is saved."""


def train(
    recipe: Recipe,
    run: str | Path,
    *,
    resume: bool | str = False,
    allow: Sequence[str] = (),
    quiet: bool = False,
    evaluate: Evaluate | None = None,
    hooks: Sequence[Hook] = (),
) -> OVSegModel:
    """Train by ``recipe`` into the folder ``run``; returns the model in eval mode.

    Args:
        resume: go on with the run in the folder, from its newest intact checkpoint; ``"auto"``:
            begin one where there is none. N steps give the same weights, bit for bit on the CPU,
            however often they were interrupted.
        allow: keys of the recipe that may differ from those the run was begun with.
        quiet: no progress bar.
        evaluate: ``(model, step, folder for pictures) -> figures``, called every
            ``validation.every_steps``.
        hooks: called after every step, before the checkpoint.

    Raises:
        ConfigError: if the folder holds a run and ``resume`` is false, none or another one and it
            is true; if it cannot be followed.
        CheckpointError: if the run has checkpoints and none is intact.
        DataError: if there is no next batch; what is trained is saved.
        ProcessError: if another process is gone or does not answer; the newest checkpoint holds.
        Interrupted: after a signal, once the state is saved.
        FloatingPointError: after ten steps in a row without a finite loss.
    """
    with (
        stop_signals.noted(speak=distributed.is_main()) as request,
        distributed.others_watched(lambda: _newest(Path(run))),
    ):
        options: dict[str, Any] = {"resume": resume, "allow": allow, "quiet": quiet}
        return _train(recipe, run, request, evaluate=evaluate, hooks=hooks, **options)


def _train(
    recipe: Recipe,
    run: str | Path,
    request: StopRequest,
    *,
    resume: bool | str,
    allow: Sequence[str],
    quiet: bool,
    evaluate: Evaluate | None,
    hooks: Sequence[Hook],
) -> OVSegModel:
    device = distributed.device(recipe.train.device)
    stages = stages_of(recipe)
    folder = find_run(folder_for(run, "run"), recipe, resume=resume, allow=allow)
    if folder.at is not None and not folder.damaged and finished(folder.folder, recipe) is not None:
        logger.info("%s is done already", folder.folder)
        return from_pretrained(folder.folder / "model").to(device)
    first = 0 if folder.at is None else checkpoints.facts_of(folder.at)["stage"]
    _keep_freed_memory()
    begin = Begin(folder, recipe, device)
    beside: list[Hook] = [begin, Log(folder.log, recipe.log.every_steps), *hooks]
    if recipe.validation.every_steps and evaluate is not None:
        beside.append(Validation(folder.folder, recipe.validation.every_steps, evaluate))
    beside.append(Checkpoints(folder, recipe.checkpoint.every_steps, recipe.checkpoint.keep))
    model: OVSegModel | None = None
    done = 0
    for number in range(first, len(stages)):
        at = folder.at if number == first else None
        trainer = Trainer(
            stages[number],
            folder.folder,
            device,
            number=number,
            stages=len(stages),
            done=done,
            at=at,
            previous=model,
            quiet=quiet,
        )
        if number == first:
            _check_start(stages, trainer, folder, recipe, evaluate)
        trainer.run(beside, request)
        begin.now()  # also where no step was left
        model, done = trainer.model_to_use(), trainer.state.done + trainer.state.step
    assert model is not None
    model.eval()
    if distributed.is_main():
        plot_loss(folder.log, folder.folder / "loss.png", title=recipe.model.name)
        # Last: it says that nothing is left to do.
        data = to_dict(stages[-1])["data"]
        save_pretrained(
            model, folder.folder / "model", seed=recipe.train.seed, steps=done, data=data
        )
    if distributed.any_flag(_asked(request))[0]:
        raise Interrupted(f"{request} after the last step; the run is complete")
    return model


def _asked(request: StopRequest) -> bool:
    """Return whether this process is to stop: for a signal, or because torchrun, which would have
    passed one on, is gone.
    """
    return bool(request) or distributed.launcher_gone()


def _newest(run: Path) -> str:
    """Which checkpoint holds after a failure."""
    found = checkpoints.complete(run / "checkpoints")
    if not found:
        return "no checkpoint was written yet, --auto-resume begins anew"
    return f"--resume goes on from {found[-1]}"


def _check_start(
    stages: Sequence[Recipe], trainer: Trainer, run: Run, recipe: Recipe, evaluate: Evaluate | None
) -> None:
    """Look at all that is known before the first step, see ``start_checks``."""
    validated = evaluate if recipe.validation.every_steps else None
    check_validation(validated, trainer.state.objective.model)
    prefix = "" if len(stages) == 1 else f"stages[{trainer.state.stage}]."
    warn_of_misfits(trainer.recipe, trainer.steps, prefix)
    check_later_stages(stages, trainer.state.stage, trainer.state, run, validated)
    if len(stages) == 1:
        tell_intervals(recipe, trainer.steps)
    check_room(trainer.state, run, recipe.checkpoint.keep)


class Trainer:
    """One stage.

    Args:
        recipe: of the stage.
        folder: of the run.
        number, stages: which stage, of how many.
        done: steps of the stages before.
        at: checkpoint to go on from.
        previous: the model of the stage before.

    Attributes:
        state: all that is saved.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        device: torch.device,
        *,
        number: int = 0,
        stages: int = 1,
        done: int = 0,
        at: Path | None = None,
        previous: OVSegModel | None = None,
        quiet: bool = False,
    ):
        self.recipe, self.device, self.stages, self.quiet = recipe, device, stages, quiet
        _seed(recipe.train.seed)  # weights are drawn alike everywhere
        model = build_model(recipe)
        if at is None:
            start(model, recipe, folder, previous)
        objective = build_objective(model.to(device).train(), recipe).train()
        cast, precision = cast_for(recipe.train.precision, device)
        average = average_of(
            model,
            recipe.train.ema,
            sharded=recipe.train.parallel == "fsdp" and distributed.world_size() > 1,
        )
        self.gradients = Gradients(objective, recipe.train.parallel, recipe.train.chunk, cast)
        loader = build_loader(
            recipe, objective, device, progress=not quiet and distributed.is_main()
        )
        self.state = State(
            objective,
            build_optimizer(objective, recipe),
            loader,
            SkipLimit(len(loader.source)),
            LossScaler(precision == "fp16"),
            average,
            number,
            0,
            done,
        )
        self.steps = self.state.of = (
            recipe.train.steps if recipe.train.epochs is None else len(loader)
        )
        self.first_row = 0  # of this process in the batch of all
        _seed(
            distributed.seed_for(recipe.train.seed, distributed.rank())
        )  # what is drawn in training, dropout, is not
        if at is not None:
            checkpoints.restore(at, self.state)

    def run(self, hooks: Sequence[Hook], request: StopRequest) -> None:
        """Make all steps that are left, or those until ``request``."""
        state, bad = self.state, 0
        show = not self.quiet and distributed.is_main()
        title = (
            self.recipe.model.name
            if self.stages == 1
            else f"{self.recipe.name}: {self.recipe.model.name}"
        )
        for hook in hooks:
            hook.before_steps(self)
        with (
            bar(show=show, initial=state.step, total=self.steps, unit="step", desc=title) as shown,
            state.loader as loader,
        ):
            batches = iter(loader)
            while state.step < self.steps:
                began = time.perf_counter()
                batch, images = self._next(batches, hooks)
                if batch is None:
                    logger.warning("the data ended after %d of %d steps", state.step, self.steps)
                    break
                waited = time.perf_counter() - began
                step = self._step(batch, request)
                step.images, step.seconds, step.waited = images, time.perf_counter() - began, waited
                for hook in hooks:
                    hook.after_step(self, step)
                bad = 0 if step.finite or step.explained else bad + 1
                if bad == _BAD_IN_A_ROW:
                    raise FloatingPointError(
                        f"{bad} steps in a row up to step {step.number} had no finite loss or "
                        "gradient; "
                        "see log.jsonl. Lower optim.lr or look at the data"
                    )
                shown.update()
                shown.set_postfix(loss=f"{step.losses['total']:.3f}", refresh=False)
                if step.stopping:
                    raise Interrupted(f"{request} at step {step.number}; saved, go on with resume")

    def _step(self, batch: Batch, request: StopRequest) -> Step:
        """Gradient, update, bookkeeping."""
        recipe, state, number = self.recipe, self.state, self.state.done + self.state.step
        rate = learning_rate(recipe.schedule, recipe.optim.lr, state.step, self.steps)
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        progress = Progress(
            state.step, self.steps, recipe.train.seed, distributed.rank(), first=self.first_row
        )
        state.optimizer.zero_grad(set_to_none=True)
        losses = self.gradients(
            batch.to(self.device, but=state.objective.on_host), progress, state.scaler.scale
        )
        state.scaler.unscale(trained(state.objective))
        norm = clip(trained(state.objective), recipe.optim.clip_grad)
        numbers = [x.to(self.device, torch.float64) for x in (*losses.values(), norm)]
        *found, norm = torch.stack(numbers).tolist()  # the step's one wait for the device
        values = dict(zip(losses, found, strict=True))
        finite = math.isfinite(values["total"]) and math.isfinite(norm)
        infinite, stopping = distributed.any_flag(not finite, _asked(request))
        if not infinite:  # a step that would write NaN into the weights is left out and counted
            state.optimizer.step()
            state.objective.after_step(progress)
            if state.average is not None:
                state.average.update_parameters(state.objective.model)
        explained = state.scaler.update(not infinite)
        state.step += 1
        return Step(
            number,
            values,
            rate,
            norm,
            finite=not infinite,
            explained=explained,
            last=state.step == self.steps,
            stopping=stopping,
        )

    def _next(self, batches: Iterator[Batch], hooks: Sequence[Hook]) -> tuple[Batch | None, int]:
        """(the next batch, pictures in those of all processes); None if the data of any has ended.

        Raises:
            DataError: in all processes if one of them has no batch, once what is trained is saved;
                if too many pictures are bad.
        """
        batch, failure = None, ""
        position = self.state.loader.state_dict()
        try:
            batch = next(batches, None)
        except (DataError, InputError, OSError) as error:
            failure = str(error) or repr(error)
        skipped = () if batch is None else batch.skipped
        counts = np.zeros(
            3 + distributed.world_size(), np.int64
        )  # and the pictures of each process
        counts[:3] = batch is None, bool(failure), len(skipped)
        counts[3 + distributed.rank()] = 0 if batch is None else len(batch)
        ended, failed, bad, *sizes = distributed.all_reduce_sum(counts).tolist()
        self.first_row = sum(sizes[: distributed.rank()])
        if failed:
            failure = distributed.gather_strings([failure] if failure else [])[0]
            self.state.loader.load_state_dict(position)  # others may have got the batch
            saved = [hook.before_failure(self) for hook in hooks]
            if any(saved):
                steps = self.state.done + self.state.step
                failure = f"{failure}; saved after {steps} steps, --resume goes on"
            raise DataError(failure)
        if bad:
            for line in self.state.skips.add(distributed.gather_strings(list(skipped))):
                logger.warning("skipped: %s", line)
        return (None if ended else batch), sum(sizes)

    def model_to_use(self) -> OVSegModel:
        """The trained model, or the average of it; a whole copy where it is sharded."""
        state = self.state
        trained_model: Any = (
            state.objective.model if state.average is None else state.average.module
        )
        if not is_sharded(state.objective):
            return trained_model
        tensors = checkpoints.whole(trained_model)
        model = build_model(self.recipe).to(self.device)
        for name, tensor in model.state_dict().items():
            if distributed.is_main():
                tensor.copy_(tensors[name])
            torch.distributed.broadcast(tensor, 0, group=distributed.group())
        return model


def average_of(model: OVSegModel, decay: float | None, *, sharded: bool) -> AveragedModel | None:
    """A copy of the model that will follow it; None without a decay.

    Before the model itself is sharded.
    """
    if decay is None:
        return None
    if not sharded:
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    average = AveragedModel(
        model, avg_fn=get_ema_avg_fn(decay), use_buffers=True
    )  # one by one: shards and scalars do not mix in one call
    shard(average.module, average.module.blocks)
    return average


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next step: returning it costs a fifth of a CPU step
    in page faults.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((-1, 2**31 - 1), (-3, 2**30)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(option, value)
