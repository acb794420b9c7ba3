"""The start of a stage: model, weights, objective, optimizer and data; and the folder of a run."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from .. import distributed
from ..data.cached_source import CachedSource
from ..data.loader import Loader, batches_of
from ..data.sources import ModelInputs, Source, create_source
from ..environment import environment
from ..errors import CheckpointError, ConfigError, InputError, first_line
from ..paths import no_file
from ..replacing import file_for, folder_for, write_text
from ..systems import OVSegModel, create_model, from_pretrained
from ..systems.loading import asks_size
from ..systems.objective import Objective, create_objective
from ..text_files import records_of
from ..time_limits import data_limit
from ..weights.files import check_fit
from ..weights.pickles import read_published
from ..weights.saving import read_config
from .feature_cache import check_cache
from .recipe import Recipe, differences, hash_of, load_yaml, save_recipe, stages_of, to_dict
from .state import complete, damage, facts_of

logger = logging.getLogger(__name__)
PREVIOUS = "previous"
BEST = "best"
# What a run writes into its folder.
_FOLDERS = ("checkpoints", "model", "best", "validation")
_FILES = ("config.yaml", "env.json", "log.jsonl", "loss.png", "validation.jsonl")


def build_model(recipe: Recipe) -> OVSegModel:
    """Build the model of a stage, without the weights of ``init``."""
    return create_model(recipe.model.name, **recipe.model.options)


def take_weights(
    model: OVSegModel, recipe: Recipe, run: Path, previous: OVSegModel | None = None
) -> None:
    """Take over the weights that ``recipe.init`` names: part of the model -> where from.

    The part is ``model`` or a submodule such as ``backbone``. Where from: a folder of a run, of one
    of its checkpoints or of ``save_pretrained``, a safetensors file, or whatever
    ``from_pretrained`` takes (``ViT-B-16:openai``); ``previous``, the model of the stage before;
    ``best``, the best of it in validation.

    Raises:
        ConfigError: if there is nothing there, or it does not fit; the message names the key.
    """
    for part, source in recipe.init.items():
        if source is None:
            continue
        where = f"init.{part} is {source!r}"
        prefix = "" if part == "model" else f"{part}."
        if not isinstance(source, str) or not source:  # an empty path is the present folder
            raise ConfigError(f"{where}; expected a folder, a file or a name of weights")
        own = {name: x for name, x in model.state_dict().items() if name.startswith(prefix)}
        if not own:
            with_weights = {key.partition(".")[0] for key in model.state_dict()}
            parts = [name for name, _ in model.named_children() if name in with_weights]
            raise ConfigError(
                f"{where}: {recipe.model.name} has no part {part!r}; expected 'model' or one of "
                f"{parts}"
            )
        if source == PREVIOUS:
            if previous is None:
                raise ConfigError(f"{where} and no stage comes before; expected a folder of a run")
            # What its files only name is in the model, for a stage whose files hold it.
            whole = torch.nn.Module.state_dict(previous)
            held = own.keys() | previous.state_dict().keys()
            weights = {name: x.detach().cpu() for name, x in whole.items() if name in held}
        else:
            weights = _weights(str(run / BEST if source == BEST else source), where, own)
        taken = {name: x for name, x in weights.items() if name.startswith(prefix)}
        if asks_size(recipe.model.options):
            taken = model.resize_positions(taken)
        try:
            check_fit(str(source), taken, own)
        except CheckpointError as error:
            raise ConfigError(f"{where}: {error}") from error
        for name, value in taken.items():
            own[name].copy_(value)


def build_objective(model: OVSegModel, recipe: Recipe) -> Objective:
    """Build what trains the model of a stage."""
    return create_objective(model, recipe.objective.name, **recipe.objective.options)


def build_optimizer(objective: Objective, recipe: Recipe) -> torch.optim.Optimizer:
    """Build the optimizer over the model's own groups, and what else the objective trains.

    After sharding: it holds the parameters as they are then.
    """
    optim = recipe.optim
    groups = objective.model.parameter_groups(optim.lr, optim.weight_decay, optim.lower_lr)
    known = {id(p) for group in groups for p in group["params"]}
    others = [p for p in objective.parameters() if p.requires_grad and id(p) not in known]
    groups.append({"params": others, "lr_scale": 1.0, "weight_decay": 0.0})
    # Sharded and whole parameters apart: one fused update takes one kind.
    split = [
        {**group, "params": [p for p in group["params"] if type(p.data) is kind]}
        for group in groups
        for kind in dict.fromkeys(type(p.data) for p in group["params"])
    ]
    if not split:
        raise ConfigError(f"model {recipe.model.name!r} has nothing to train")
    if optim.name == "sgd":
        return torch.optim.SGD(split, lr=optim.lr, momentum=optim.momentum)
    return torch.optim.AdamW(split, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps)


def build_loader(
    recipe: Recipe, objective: Objective, device: torch.device, *, progress: bool
) -> Loader:
    """Build the batches of this process.

    Raises:
        ConfigError: if the objective takes another kind of batch than the data make.
    """
    options = recipe.data
    train = recipe.train
    inputs = ModelInputs.of(objective.model)
    source = create_source(options, inputs, seed=train.seed, progress=progress)
    check_source(source, objective, options.kind)
    check_batches(len(source), recipe)
    if train.cache is not None:
        check_cache(recipe, objective)
        source = CachedSource(source)
    return Loader(
        source,
        train.batch_size,
        seed=train.seed,
        rank=distributed.rank(),
        ranks=distributed.world_size(),
        epochs=train.epochs,
        drop_last=train.drop_last,
        workers=options.workers,
        prefetch=options.prefetch,
        pin_memory=device.type == "cuda",
        timeout=data_limit(),
        tell_signals=True,
    )


def check_source(source: Source, objective: Objective, kind: str) -> None:
    """Raise ConfigError if the data make other batches than the objective takes, or mean others."""
    kinds = objective.batch_types
    if not issubclass(source.batch_type, kinds):
        raise ConfigError(
            f"data.kind is {kind!r}, which gives {source.batch_type.__name__}; the objective "
            f"{type(objective).__name__} expects {' or '.join(one.__name__ for one in kinds)}"
        )
    objective.check_source(source)


def check_batches(pictures: int, recipe: Recipe) -> int:
    """Return the steps of a stage on so many pictures; ConfigError if they make no batch."""
    train = recipe.train
    try:
        ranks = distributed.world_size()
        each = batches_of(pictures, train.batch_size, ranks=ranks, drop_last=train.drop_last)
    except ConfigError as error:
        text = str(error)
        raise ConfigError(f"train.{text}" if text.startswith("batch_size") else text) from error
    return train.steps if train.epochs is None else train.epochs * each


@dataclass
class Run:
    """A folder of a run, as ``find_run`` found it.

    Attributes:
        folder: of the run.
        at: the checkpoint to go on from, if any.
        recipe, key: plain values and their hash, for checkpoints.
        goes_on: whether there is a run in it; otherwise one is begun.
        changed: keys of the recipe that are not what the run was begun with, and may be.
        damaged: checkpoints that ``begin_run`` sets aside.
    """

    folder: Path
    recipe: dict[str, Any]
    key: str
    at: Path | None
    goes_on: bool = False
    changed: tuple[str, ...] = ()
    damaged: tuple[Path, ...] = ()

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def log(self) -> Path:
        """File of the log."""
        return self.folder / "log.jsonl"


def check_names(folder: Path) -> None:
    """Raise InputError if a name of the run's own is taken by something of another kind."""
    for name in _FOLDERS:
        folder_for(folder / name, "run needs a folder, and")
    for name in _FILES:
        file_for(folder / name, "run needs a file, and")


def _check_unused(folder: Path) -> None:
    """Refuse to begin a run where a model of something else would be written over."""
    for name in ("model", BEST):
        if (folder / name).is_dir() and any((folder / name).iterdir()):
            raise ConfigError(
                f"{folder / name} holds files and {folder} no run that wrote them; "
                f"expected a folder without a {name!r}"
            )


def find_run(folder: Path, recipe: Recipe, *, resume: bool | str, allow: Sequence[str] = ()) -> Run:
    """Find out where to begin.

    Nothing is written: that is for ``begin_run``, once the start is certain.

    Raises:
        InputError: if a name that a run needs is taken by something else.
        ConfigError: if the folder holds a run and ``resume`` is false, or none and it is true; if
            it holds one of another recipe, by the name of the first key that differs and that
            ``allow`` does not name.
        CheckpointError: if none of the run's checkpoints is intact.
    """
    if resume not in (True, False, "auto"):
        raise ConfigError(f"resume is {resume!r}; expected True, False or 'auto'")
    check_names(folder_for(folder, "run"))
    begun = _is_begun(folder, resume=resume)
    plain = to_dict(recipe)
    at, damaged = _newest_intact(folder / "checkpoints") if resume else (None, [])
    changed = _changes(folder, plain, at) if resume else []
    for key, before, now in changed:
        if not any(key == name or key.startswith(f"{name}.") for name in allow):
            raise ConfigError(
                f"{key} is {now!r} and the run in {folder} was begun with {before!r}; expected the "
                f"same recipe, a new folder, or --allow {key} to go on with another one"
            )
    keys = tuple(key for key, *_ in changed)
    return Run(folder, plain, hash_of(plain), at, bool(resume) and begun, keys, tuple(damaged))


def _is_begun(folder: Path, *, resume: bool | str) -> bool:
    """Return whether there is a run in the folder, as the main process sees it.

    Raises:
        ConfigError: if there must be one and is none, or must not be and is.
    """
    here = [name for name in ("log.jsonl", "checkpoints") if (folder / name).exists()]
    begun = bool(distributed.broadcast_json(bool(here) or (folder / "config.yaml").exists()))
    if resume is True and not begun:
        raise ConfigError(
            f"{folder} holds no run to go on with; expected the folder of one. Without --resume a "
            "run is begun; --auto-resume goes on where there is one and begins where there is none"
        )
    if not resume and here:
        raise ConfigError(
            f"{folder} holds a run already; expected a new folder, or resume to go on with it"
        )
    if not begun:
        _check_unused(folder)
    return begun


def _changes(folder: Path, plain: dict[str, Any], at: Path | None) -> list[tuple[str, Any, Any]]:
    """Return what differs from the run that is there, as ``differences`` does."""
    saved = folder / "config.yaml"
    if at is None:
        return differences(_saved_recipe(saved), plain) if saved.exists() else []
    facts = facts_of(at)
    changed = differences(facts["recipe"], plain)
    if facts["processes"] != distributed.world_size():
        changed.append(("processes", facts["processes"], distributed.world_size()))
    return changed


def begin_run(run: Run, recipe: Recipe, device: torch.device) -> None:
    """Write ``config.yaml`` and ``env.json``, and put away what is no part of the run any more.

    Called by all processes. Another recipe that was there is kept beside the new one.
    """
    distributed.barrier()  # nobody writes before all have read
    if distributed.is_main():
        run.folder.mkdir(parents=True, exist_ok=True)
        for path in run.damaged:  # not counted among those that are kept, nor looked at again
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        _write_recipe(run, recipe)
        facts_here = {**environment(device), "processes": distributed.world_size()}
        write_text(run.folder / "env.json", json.dumps(facts_here, indent=2))
        facts = None if run.at is None else facts_of(run.at)
        _forget_after(run.log, 0 if facts is None else facts["done"] + facts["step"])
    distributed.barrier()


def _write_recipe(run: Run, recipe: Recipe) -> None:
    """Write ``config.yaml``, and keep another one that was there."""
    saved = run.folder / "config.yaml"
    if saved.exists() and (run.changed or (not run.goes_on and not _is_of(saved, run.recipe))):
        kept = run.folder / f"config.until_{run.at.name if run.at else 'start'}.yaml"
        saved.replace(kept)
        why = "another recipe was here"
        if run.goes_on:
            why = f"going on with another recipe ({', '.join(run.changed)})"
        logger.warning("%s; the old one is kept in %s", why, kept)
    if not saved.exists():
        save_recipe(recipe, saved)


def _is_of(saved: Path, plain: dict[str, Any]) -> bool:
    """Return whether a ``config.yaml`` holds the whole of a recipe."""
    try:
        return not differences(_saved_recipe(saved), plain)
    except CheckpointError:
        return False


def finished(folder: Path, recipe: Recipe) -> int | None:
    """Return the steps of a run by ``recipe`` that has nothing left to do; None if it has.

    Small files alone are read: neither weights nor data.
    """
    try:
        at = complete(folder / "checkpoints")[-1]
        facts = facts_of(at)
        steps = facts["done"] + facts["step"]
        exported = (folder / "model" / "model.safetensors").is_file()
        exported = exported and read_config(folder / "model").get("steps") == steps
    except (IndexError, CheckpointError, OSError):
        return None
    stages = stages_of(recipe)
    last = stages[-1].train
    of = facts["of"] or (last.steps if last.epochs is None else None)  # earlier versions lack it
    changed = differences(facts["recipe"], to_dict(recipe))  # earlier versions lack some keys
    same = not changed and facts["processes"] == distributed.world_size()
    ended = facts["stage"] == len(stages) - 1 and of is not None and facts["step"] >= of
    return steps if same and exported and ended else None


def _newest_intact(folder: Path) -> tuple[Path | None, list[Path]]:
    """Return the newest checkpoint whose files are what was written, and the damaged ones after it.

    The main process looks for them.
    """
    found: list[str] = []
    reasons: dict[str, str] = {}
    for path in reversed(complete(folder)) if distributed.is_main() else ():
        if not (reason := damage(path)):
            found = [str(path)]
            break
        reasons[str(path)] = reason
    found, reasons = distributed.broadcast_json([found, reasons])
    if reasons and not found:
        raise CheckpointError(
            f"no checkpoint in {folder} is intact: {'; '.join(reasons.values())}. Expected one "
            "that is; or a new folder"
        )
    for reason in reasons.values():
        if distributed.is_main():
            logger.warning("damaged, set aside: %s; going on from %s", reason, found[0])
    at = Path(found[0]) if found else None
    if distributed.any_flag(at is not None and not at.is_dir())[0]:
        raise ConfigError(
            "the checkpoint of the main process is not there for all; expected a folder that all "
            "processes see"
        )
    return at, [Path(path) for path in reasons]


def _saved_recipe(path: Path) -> Any:
    """Return the plain values of a ``config.yaml``; CheckpointError if it is damaged."""
    try:
        found: Any = OmegaConf.to_container(load_yaml(path))
        if not isinstance(found, dict) or "model" not in found:
            raise ValueError("it holds no recipe")
    except (OmegaConfBaseException, YAMLError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged: {first_line(error)}; expected the recipe that the run was begun "
            "with"
        ) from error
    return found


def _weights(name: str, where: str, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors that a name of ``init`` stands for; ConfigError, at ``where``, if none."""
    path = Path(name)
    try:
        for file in (path / "model" / "model.safetensors", path / "model.safetensors", path):
            found = read_published(file) if no_file(file) is None else {}
            if any(key.startswith("backbone.") or key in own for key in found):
                return found
        # Whatever -m takes: a name and a tag, the Hub, a checkpoint of open_clip's.
        return from_pretrained(name).state_dict()
    except CheckpointError as error:
        raise ConfigError(f"{where}: {error}") from error
    except InputError as error:
        raise ConfigError(
            f"{where}: {path} does not exist or holds no model.safetensors; expected a folder of a "
            f"run or of save_pretrained, or a model with weights: {error}"
        ) from error


def _forget_after(log: Path, step: int) -> None:
    """Drop log lines that a killed run wrote after its last checkpoint, and a half-written one."""
    if not log.exists():
        return
    entries, damaged = records_of(log)
    if damaged > 1:
        logger.warning("%s: %d lines are damaged and are dropped", log, damaged)
    kept = [
        entry for entry in entries if isinstance(entry.get("step"), int) and entry["step"] < step
    ]
    write_text(log, "".join(json.dumps(entry) + "\n" for entry in kept))
