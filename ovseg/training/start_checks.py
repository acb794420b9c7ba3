"""Checks of what can be known of a run before its first step, of all its stages.

What cannot be followed is refused, what is hardly meant is said.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from .. import distributed
from ..data.cached_source import uncached
from ..data.sources import ModelInputs, Source, create_source
from ..data.sources.scenes import Options as SceneOptions
from ..errors import CheckpointError, ConfigError, DataError, InputError
from ..systems import OVSegModel
from ..systems.objective import Objective
from . import state as checkpoints
from .feature_cache import check_cache
from .recipe import Recipe, to_dict
from .schedule import misfits
from .stages import (
    BEST,
    PREVIOUS,
    Run,
    build_model,
    build_objective,
    build_optimizer,
    check_batches,
    check_source,
    take_weights,
)
from .state import State

logger = logging.getLogger(__name__)
_MOST_OF_THE_FIRST = 0.5  # share of the first weights in an average that has hardly moved


def check_later_stages(
    stages: Sequence[Recipe], first: int, state: State, run: Run, evaluate: Any = None
) -> None:
    """Build what each later stage is made of, from the first one's model on, and drop it again.

    Random states stay as they are. Their pictures are not read, and scenes not drawn.

    Args:
        stages: of the run.
        first: the number of the stage that begins.
        state: of that stage, ready to begin.
        run: whose folder may hold weights.
        evaluate: the validation; its ``check``, where it has one, is asked for each model.

    Raises:
        ConfigError, InputError, DataError, CheckpointError: as the stage would, and naming it.
    """
    if len(stages) == first + 1:
        return
    device = next(state.objective.parameters()).device
    before = checkpoints.random_state()
    sources = {_key(stages[first]): uncached(state.loader.source)}
    previous = build_model(stages[first])
    for number in range(first + 1, len(stages)):
        stage = stages[number]
        try:
            model = build_model(stage)
            taken = _as_if_validated(stage, validated=evaluate is not None)
            take_weights(model, taken, run.folder, previous)
            objective = build_objective(model.to(device).train(), stage)
            build_optimizer(objective, stage)
            steps = _check_data(stage, objective, sources)
            check_validation(evaluate, model)
        except (ConfigError, InputError, DataError, CheckpointError) as error:
            raise type(error)(f"stages[{number}]: {error}") from error
        warn_of_misfits(stage, steps, f"stages[{number}].")
        previous = model
    checkpoints.set_random_state(before)


def check_validation(evaluate: Any, model: OVSegModel) -> None:
    """Ask a validation whether it can measure ``model``, if it can tell."""
    if evaluate is not None and hasattr(evaluate, "check"):
        evaluate.check(model)


def warn_of_misfits(stage: Recipe, steps: int, prefix: str = "") -> None:
    """Say which numbers of a stage do not fit so many steps."""
    if distributed.is_main():
        for text in (
            *misfits(stage.schedule, stage.optim.lr, steps),
            *_average_misfits(stage.train.ema, steps),
        ):
            logger.warning("%s%s", prefix, text)


def tell_intervals(recipe: Recipe, steps: int) -> None:
    """Say which intervals are longer than the whole run: there is then one, at the end."""
    if not distributed.is_main():
        return
    for name in ("log", "checkpoint", "validation"):
        every = getattr(recipe, name).every_steps
        if every is not None and every > steps:
            logger.info(
                "%s.every_steps is %d and the run has %d steps: only its end has one",
                name,
                every,
                steps,
            )


def check_room(state: State, run: Run, keep: int) -> None:
    """Warn if the disk has no room for the checkpoints that are kept, one more, and the model."""
    model = _bytes(state.objective.state_dict().values())
    trained = [p for group in state.optimizer.param_groups for p in group["params"]]
    moments = 2 if isinstance(state.optimizer, torch.optim.AdamW) else 1
    each = model * (1 if state.average is None else 2) + moments * _bytes(trained)
    missing = keep + 1 - len(checkpoints.complete(run.checkpoints))
    needed = each * max(1, missing) + model
    whole = run.folder.absolute()
    there = next(path for path in (whole, *whole.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if distributed.is_main() and free < needed:
        logger.warning(
            "the disk of %s has %.1f GB free; checkpoints (%.1f GB each, checkpoint.keep=%d) and "
            "the model need %.1f GB",
            run.folder,
            free / 1e9,
            each / 1e9,
            keep,
            needed / 1e9,
        )


def _check_data(stage: Recipe, objective: Objective, sources: dict[str, Source]) -> int:
    """Look at the data of a later stage and return its steps; ``sources`` are there already."""
    options = stage.data
    drawn = isinstance(options, SceneOptions)
    source = sources.get(_key(stage))
    if source is None:
        if drawn:  # all scenes at once: two tell as much
            options = replace(options, train_size=min(2, options.train_size))
        inputs = ModelInputs.of(objective.model)
        source = create_source(options, inputs, seed=stage.train.seed)
        if not drawn:
            sources[_key(stage)] = source
    check_source(source, objective, stage.data.kind)
    check_cache(stage, objective)
    return check_batches(stage.data.train_size if drawn else len(source), stage)


def _key(stage: Recipe) -> str:
    return json.dumps([to_dict(stage)["data"], stage.train.seed], sort_keys=True)


def _as_if_validated(stage: Recipe, *, validated: bool) -> Recipe:
    """Return the stage with ``previous`` in place of ``best``, which fits if that does."""
    for part, source in stage.init.items():
        if source == BEST and not validated:
            raise ConfigError(
                f"init.{part} is 'best' and nothing is validated; expected validation.every_steps, "
                "or 'previous'"
            )
    init = {part: PREVIOUS if source == BEST else source for part, source in stage.init.items()}
    return replace(stage, init=init)


def _average_misfits(decay: float | None, steps: int) -> Iterator[str]:
    """Say that an average of the weights will hardly have moved in so few steps."""
    # The average begins with the first step's weights.
    left = 0.0 if decay is None else decay ** (steps - 1)
    if left > _MOST_OF_THE_FIRST and steps > 1:
        fits = max(0.0, 1 - 3 / steps)  # a twentieth is left
        yield (
            f"train.ema is {decay} and the stage has {steps} steps: {100 * left:.0f} % of the "
            "average, which is what is saved as the model, will be the weights after the first "
            f"step; expected at most {fits:.3g} for so few, or null"
        )


def _bytes(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
