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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from .. import distributed, stop_signals
from ..data.batches import Batch
from ..data.cached_source import CachedSource
from ..data.sources.base import SkipLimit
from ..errors import DataError, InputError
from ..progress import bar
from ..replacing import folder_for
from ..stop_signals import StopRequest
from ..systems import OVSegModel, from_pretrained, save_pretrained
from ..systems.objective import Progress
from . import state as checkpoints
from .feature_cache import Tower, fill_cache
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
    take_weights,
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
    """Train by a recipe; return the model in eval mode.

    Args:
        recipe: of ``load_recipe``.
        run: the folder that is written.
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
        device = distributed.device(recipe.train.device)
        found = find_run(folder_for(run, "run"), recipe, resume=resume, allow=allow)
        intact = found.at is not None and not found.damaged
        if intact and finished(found.folder, recipe) is not None:
            logger.info("%s is done already", found.folder)
            return from_pretrained(found.folder / "model").to(device)
        if not recipe.validation.every_steps:
            evaluate = None
        return _train(recipe, found, device, request, evaluate=evaluate, hooks=hooks, quiet=quiet)


def _train(
    recipe: Recipe,
    run: Run,
    device: torch.device,
    request: StopRequest,
    *,
    evaluate: Evaluate | None,
    hooks: Sequence[Hook],
    quiet: bool,
) -> OVSegModel:
    """Train the stages that are left, and save the model."""
    stages = stages_of(recipe)
    _keep_freed_memory()
    begin = Begin(run, recipe, device)
    beside: list[Hook] = [begin, Log(run.log, recipe.log.every_steps), *hooks]
    if evaluate is not None:
        assert recipe.validation.every_steps is not None
        beside.append(Validation(run.folder, recipe.validation.every_steps, evaluate))
    beside.append(Checkpoints(run, recipe.checkpoint.every_steps, recipe.checkpoint.keep))
    first = 0 if run.at is None else checkpoints.facts_of(run.at)["stage"]
    start = StageStart(first, checkpoint=run.at)
    for stage in stages[first:]:
        trainer = Trainer(stage, run.folder, device, start, stages=len(stages), quiet=quiet)
        if start.number == first:
            _check_start(stages, trainer, run, recipe, evaluate)
        trainer.run(beside, request)
        begin.now()  # also where no step was left
        done = trainer.state.done + trainer.state.step
        start = StageStart(start.number + 1, done, trainer.model_to_use())
    model = start.model
    assert model is not None
    model.eval()
    if distributed.is_main():
        plot_loss(run.log, run.folder / "loss.png", title=recipe.model.name)
        # Last: it says that nothing is left to do.
        facts = {
            "seed": recipe.train.seed,
            "steps": start.done,
            "data": to_dict(stages[-1])["data"],
        }
        save_pretrained(model, run.folder / "model", **facts)
    if distributed.any_flag(_asked(request))[0]:
        raise Interrupted(f"{request} after the last step; the run is complete")
    return model


def _asked(request: StopRequest) -> bool:
    """Return whether this process is to stop.

    For a signal, or because torchrun, which would have passed one on, is gone.
    """
    return bool(request) or distributed.launcher_gone()


def _newest(run: Path) -> str:
    """Say which checkpoint holds after a failure."""
    found = checkpoints.complete(run / "checkpoints")
    if not found:
        return "no checkpoint was written yet, --auto-resume begins anew"
    return f"--resume goes on from {found[-1]}"


def _check_start(
    stages: Sequence[Recipe], trainer: Trainer, run: Run, recipe: Recipe, evaluate: Evaluate | None
) -> None:
    """Look at all that is known before the first step, see ``start_checks``."""
    state = trainer.state
    check_validation(evaluate, state.objective.model)
    prefix = "" if len(stages) == 1 else f"stages[{state.stage}]."
    warn_of_misfits(trainer.recipe, trainer.steps, prefix)
    check_later_stages(stages, state.stage, state, run, evaluate)
    if len(stages) == 1:
        tell_intervals(recipe, trainer.steps)
    check_room(state, run, recipe.checkpoint.keep)


@dataclass(frozen=True)
class StageStart:
    """The state that a stage begins with.

    Attributes:
        number: of the stage, from 0.
        done: steps of the stages before.
        model: of the stage before.
        checkpoint: to go on from.
    """

    number: int = 0
    done: int = 0
    model: OVSegModel | None = None
    checkpoint: Path | None = None


class Trainer:
    """One stage.

    Args:
        recipe: of the stage.
        folder: of the run.
        device: to train on.
        start: what came before.
        stages: how many there are.
        quiet: no progress bar.

    Attributes:
        state: all that is saved.
        steps: of the stage.
        encoding_seconds: that filling the cache of features took.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        device: torch.device,
        start: StageStart = StageStart(),
        *,
        stages: int = 1,
        quiet: bool = False,
    ):
        self.recipe = recipe
        self.device = device
        self.stages = stages
        self.quiet = quiet
        self.first_row = 0  # of this process in the batch of all
        self.encoding_seconds = 0.0
        _seed(recipe.train.seed)  # weights are drawn alike everywhere
        model = build_model(recipe)
        if start.checkpoint is None:
            take_weights(model, recipe, folder, start.model)
        objective = build_objective(model.to(device).train(), recipe).train()
        cast, precision = cast_for(recipe.train.precision, device)
        self.precision = precision
        sharded = recipe.train.parallel == "fsdp" and distributed.world_size() > 1
        average = average_of(model, recipe.train.ema, sharded=sharded)
        self.gradients = Gradients(objective, recipe.train.parallel, recipe.train.chunk, cast)
        show = not quiet and distributed.is_main()
        loader = build_loader(recipe, objective, device, progress=show)
        self.steps = recipe.train.steps if recipe.train.epochs is None else len(loader)
        self.state = State(
            objective,
            build_optimizer(objective, recipe),
            loader,
            SkipLimit(len(loader.source)),
            LossScaler(precision == "fp16"),
            average,
            stage=start.number,
            done=start.done,
            of=self.steps,
        )
        # What is drawn in training, as by dropout, is not alike.
        _seed(distributed.seed_for(recipe.train.seed, distributed.rank()))
        if start.checkpoint is not None:
            checkpoints.restore(start.checkpoint, self.state)

    def run(self, hooks: Sequence[Hook], request: StopRequest) -> None:
        """Make all steps that are left, or those until ``request``."""
        state = self.state
        bad = 0
        self._fill_cache(request)
        show = not self.quiet and distributed.is_main()
        title = self.recipe.model.name
        if self.stages > 1:
            title = f"{self.recipe.name}: {title}"
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
                step.images = images
                step.seconds = time.perf_counter() - began
                step.waited = waited
                for hook in hooks:
                    hook.after_step(self, step)
                bad = 0 if step.finite or step.explained else bad + 1
                if bad == _BAD_IN_A_ROW:
                    raise FloatingPointError(
                        f"{bad} steps in a row up to step {step.number} had no finite loss or "
                        "gradient; see log.jsonl. Lower optim.lr or look at the data"
                    )
                shown.update()
                shown.set_postfix(loss=f"{step.losses['total']:.3f}", refresh=False)
                if step.stopping:
                    raise Interrupted(f"{request} at step {step.number}; saved, go on with resume")

    def _fill_cache(self, request: StopRequest) -> None:
        """Encode the pictures that ``train.cache`` lacks, if a step is left that needs them."""
        source = self.state.loader.source
        if not isinstance(source, CachedSource) or self.state.step >= self.steps:
            return
        before = checkpoints.random_state()
        began = time.perf_counter()
        model = self._whole(self.state.objective.model)
        tower = Tower(model, self.gradients.cast, self.precision)
        show = not self.quiet and distributed.is_main()
        done = fill_cache(source, tower, self.recipe, asked=lambda: _asked(request), show=show)
        checkpoints.set_random_state(before)  # training draws what it would have drawn
        self.encoding_seconds = time.perf_counter() - began
        if not done:
            raise Interrupted(
                f"{request} before step {self.state.done + self.state.step}, while pictures were "
                "encoded; what is encoded stays, the same command goes on"
            )

    def _step(self, batch: Batch, request: StopRequest) -> Step:
        """Make one step: gradient, update, bookkeeping."""
        recipe = self.recipe
        state = self.state
        number = state.done + state.step
        rate = learning_rate(recipe.schedule, recipe.optim.lr, state.step, self.steps)
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        progress = Progress(
            state.step, self.steps, recipe.train.seed, distributed.rank(), first=self.first_row
        )
        state.optimizer.zero_grad(set_to_none=True)
        here = batch.to(self.device, but=state.objective.on_host)
        losses = self.gradients(here, progress, state.scaler.scale)
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
        """Return the next batch, and the pictures in those of all processes.

        There is none if the data of any process has ended.

        Raises:
            DataError: in all processes if one of them has no batch, once what is trained is saved;
                if too many pictures are bad.
        """
        batch = None
        failure = ""
        position = self.state.loader.state_dict()
        try:
            batch = next(batches, None)
        except (DataError, InputError, OSError) as error:
            failure = str(error) or repr(error)
        skipped = () if batch is None else batch.skipped
        # Has it ended, has it failed, how many pictures are bad; then the pictures of each process.
        counts = np.zeros(3 + distributed.world_size(), np.int64)
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
        """Return the trained model, or the average of it; a whole copy where it is sharded."""
        state = self.state
        trained_model: Any = state.objective.model
        if state.average is not None:
            trained_model = state.average.module
        return self._whole(trained_model)

    def _whole(self, trained_model: Any) -> OVSegModel:
        """Return a model, or where the objective is sharded a whole copy of it."""
        if not is_sharded(self.state.objective):
            return trained_model
        tensors = checkpoints.whole(trained_model)
        model = build_model(self.recipe).to(self.device)
        for name, tensor in model.state_dict().items():
            if distributed.is_main():
                tensor.copy_(tensors[name])
            torch.distributed.broadcast(tensor, 0, group=distributed.group())
        return model


def average_of(model: OVSegModel, decay: float | None, *, sharded: bool) -> AveragedModel | None:
    """Return a copy of the model that will follow it; None without a decay.

    It is made before the model itself is sharded.
    """
    if decay is None:
        return None
    if not sharded:
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    # One by one: shards and scalars do not mix in one call.
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(decay), use_buffers=True)
    shard(average.module, average.module.blocks)
    return average


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next step.

    To return it costs a fifth of a CPU step in page faults.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((-1, 2**31 - 1), (-3, 2**30)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(option, value)
