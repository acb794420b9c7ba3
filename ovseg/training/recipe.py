"""Recipes: dataclasses are the schema, YAML files the values, ``key=value`` the overrides."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ..data.sources import load_options
from ..errors import ConfigError, first_line
from ..options import check_finite, unknown_key
from ..paths import address, no_file, read_bounded
from ..registration import Registry, yaml_files
from ..replacing import write_text
from ..systems.registry import files_of_systems
from .schedule import Schedule, check_schedule

RECIPES: Registry[Path] = Registry("recipe", lambda: yaml_files(*files_of_systems("recipes")))
_LONGEST = 16 << 20  # bytes of a recipe
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
PARALLEL = ("ddp", "fsdp")
OPTIMIZERS = ("adamw", "sgd")
_OF_THE_RUN: dict[str, tuple[str, ...] | None] = {
    "validation": None,
    "checkpoint": None,
    "log": None,
    "train": ("device",),
}


@dataclass
class ModelPart:
    name: str = "pacl_tiny"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class ObjectivePart:
    """What is trained: a name of ``ovseg.objectives``, the model's own if None."""

    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class OptimPart:
    """``lower_lr``: of the parts that a system trains gently; SegCLIP's CLIP trunk.

    ``momentum``: of sgd.
    """

    name: str = "adamw"
    lr: float = 5e-4
    weight_decay: float = 0.2
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    momentum: float = 0.9
    lower_lr: float | None = None
    clip_grad: float | None = 1.0


@dataclass
class TrainPart:
    """Attributes:
    steps: of the stage.
    epochs: in place of ``steps``: so often over the data.
    batch_size: pictures of a step, over all processes and chunks.
    chunk: pictures of a process that are encoded at a time; every text still meets every picture.
        None: all.
    drop_last: whether the rest of an epoch that fills no batch is left out.
    ema: decay of an average of the weights, which is then what is saved as the model; None: no
        average.
    precision: auto: bf16 on GPUs that have it, fp32 elsewhere.
    parallel: how several processes share the work: ddp, fsdp.
    """

    steps: int = 1000
    epochs: int | None = None
    batch_size: int = 64
    chunk: int | None = None
    drop_last: bool = True
    ema: float | None = None
    precision: str = "auto"
    parallel: str = "ddp"
    seed: int = 0
    device: str = "auto"


@dataclass
class ValidationPart:
    """``data`` and ``root`` as ``ovseg eval`` takes them; None: the scenes that the recipe trains
    on.
    """

    every_steps: int | None = None
    data: str | None = None
    root: str | None = None
    protocol: str = "plain"
    limit: int | None = 100


@dataclass
class CheckpointPart:
    every_steps: int = 500
    keep: int = 2


@dataclass
class LogPart:
    every_steps: int = 25


@dataclass
class Recipe:
    """Everything a training run depends on.

    Unknown keys are errors; defaults stand here and in the options of what is named.

    Attributes:
        init: part of the model -> where its weights come from; ``model`` is the whole. See
            ``stages.start``.
        data: ``kind`` and the options of ``ovseg.data.sources.<kind>``.
        stages: one recipe after another in one run: of each what differs from the rest of this
            file, and a ``name``.
    """

    name: str = ""
    model: ModelPart = field(default_factory=ModelPart)
    init: dict[str, Any] = field(default_factory=dict)
    objective: ObjectivePart = field(default_factory=ObjectivePart)
    data: dict[str, Any] = field(default_factory=lambda: {"kind": "scenes"})
    optim: OptimPart = field(default_factory=OptimPart)
    schedule: Schedule = field(default_factory=Schedule)
    train: TrainPart = field(default_factory=TrainPart)
    validation: ValidationPart = field(default_factory=ValidationPart)
    checkpoint: CheckpointPart = field(default_factory=CheckpointPart)
    log: LogPart = field(default_factory=LogPart)
    stages: list[dict[str, Any]] = field(default_factory=list)


def list_recipes() -> list[str]:
    """Return the names of the recipes in the package, which lie in the folders of the systems."""
    return list(RECIPES)


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by name or file, with overrides such as ``optim.lr=1e-3`` or
    ``stages[0].train.steps=100``.

    Raises:
        ConfigError: for a recipe that does not exist, YAML that cannot be read, unknown keys,
            values of the wrong kind.
    """
    path = RECIPES[str(source)] if str(source) in RECIPES else Path(source)
    if no_file(path) is not None:
        there = f", which {no_file(path)}" if os.path.lexists(path) or address(str(source)) else ""
        raise ConfigError(
            f"recipe is {str(source)!r}{there}; expected a YAML file or one of {list_recipes()}"
        )
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r}; expected key=value, e.g. optim.lr=1e-3")
        if override.endswith("="):  # an unset variable of a script
            raise ConfigError(
                f"override {override!r} has no value; expected key=value, or {override}null for "
                "none"
            )
    try:
        loaded = load_yaml(path)
        if not OmegaConf.is_dict(loaded):
            raise ConfigError(
                f"recipe {path} holds a list; expected a mapping with "
                f"{[f.name for f in fields(Recipe)]}"
            )
    except (OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {first_line(error)}") from error
    except YAMLError as error:
        raise ConfigError(f"recipe {path} is no YAML: {first_line(error)}") from error
    if not loaded:
        raise ConfigError(
            f"recipe {path} is empty; expected a mapping with some of "
            f"{[f.name for f in fields(Recipe)]}"
        )
    for override in overrides:
        _override(loaded, override, path)
    plain: Any = OmegaConf.to_container(loaded)
    return build_recipe(plain, str(path))


def load_yaml(path: Path) -> Any:
    """Return what OmegaConf reads of a plain file of at most ``_LONGEST`` bytes."""
    text = io.StringIO(read_bounded(path, _LONGEST).decode("utf-8"))
    text.name = str(path)  # for messages of YAML's
    return OmegaConf.load(text)


def _override(loaded: Any, override: str, path: Path) -> None:
    """Lay ``key=value`` over a recipe; a mapping over a mapping, key by key.

    A stage is ``stages[0]``.
    """
    key, _, text = override.partition("=")
    shown = override if len(override) <= 100 else f"{override[:100]}..."
    try:
        plain: Any = OmegaConf.to_container(
            OmegaConf.from_dotlist([f"value={text}"])
        )  # with ${...} as they are
        OmegaConf.update(loaded, key, plain["value"], merge=True, force_add=True)
    except (
        OmegaConfBaseException,
        IndexError,
        TypeError,
        ValueError,
        AssertionError,
        RecursionError,
    ) as error:
        raise ConfigError(
            f"recipe {path}: override {shown!r} does not fit the recipe: {first_line(error)}; "
            "expected a key as in the file, "
            "and of its stages one that is there: stages[0]"
        ) from error
    except YAMLError as error:
        raise ConfigError(
            f"recipe {path}: override {shown!r} is no YAML: {first_line(error)}"
        ) from error


def build_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """A checked recipe from a mapping; ``where`` it came from, for messages."""
    _check_keys(values, Recipe, "")
    try:
        recipe: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), values))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigError(f"recipe {where}: {key}: {first_line(error)}") from error
    recipe.data = _plain(load_options(recipe.data))
    _check_values(recipe)
    stages_of(recipe)
    return recipe


def stages_of(recipe: Recipe) -> list[Recipe]:
    """What is trained one after another, each a recipe without stages: the file with the stage's
    own values over it.
    """
    if not recipe.stages:
        return [recipe]
    common = {key: value for key, value in to_dict(recipe).items() if key not in ("stages", "init")}
    found = []
    for number, changes in enumerate(recipe.stages):
        if "stages" in changes:
            raise ConfigError(f"stages[{number}].stages: a stage has no stages of its own")
        _check_of_the_run(changes, number)
        init = recipe.init if number == 0 else {"model": "previous"}
        data = changes.get("data", {})
        fresh = (
            {"data": data}
            if data.get("kind", common["data"]["kind"]) != common["data"]["kind"]
            else {}
        )  # options of another kind
        merged = {**common, "init": init, "name": f"stage {number + 1}", **fresh}
        try:
            stage = build_recipe(_merge(merged, changes), "of the stage")
        except ConfigError as error:
            raise ConfigError(f"stages[{number}].{error}") from error
        found.append(stage)
    return found


def _check_of_the_run(changes: dict[str, Any], number: int) -> None:
    """Refuse in a stage what is of the whole run, and would be passed over."""
    for part, keys in _OF_THE_RUN.items():
        given = changes.get(part)
        named = (
            [key for key in given if keys is None or key in keys] if isinstance(given, dict) else []
        )
        if named:
            raise ConfigError(
                f"stages[{number}].{part}.{named[0]}: it is of the whole run; expected "
                f"{part}.{named[0]} beside the stages"
            )


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain values, as YAML and JSON hold them."""
    return json.loads(json.dumps(asdict(recipe)))


def save_recipe(recipe: Recipe, path: Path) -> None:
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(recipe)))


def hash_of(recipe: dict[str, Any]) -> str:
    """Sixteen digits that change with any value of ``to_dict(recipe)``."""
    return hashlib.blake2b(json.dumps(recipe, sort_keys=True).encode(), digest_size=8).hexdigest()


def differences(
    old: dict[str, Any], new: dict[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of what two recipes disagree about; None where one has no such
    key.
    """
    found: list[tuple[str, Any, Any]] = []
    for key in dict.fromkeys((*old, *new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", a, b))
    return found


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``under``, mapping by mapping; ``init`` is taken as a whole."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "init"
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _plain(options: Any) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(options)))


def _check_keys(values: Any, schema: type, prefix: str) -> None:
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'recipe'} is {values!r}; expected a mapping")
    known = {f.name: f for f in fields(schema)}
    for key, value in values.items():
        if key not in known:
            raise unknown_key(str(key), known, prefix)
        part, usual = known[key].default_factory, getattr(schema(), key)
        if is_dataclass(part):
            _check_keys(value, part, f"{prefix}{key}.")
        elif (isinstance(value, dict) and isinstance(usual, list | tuple)) or (
            isinstance(value, list) and isinstance(usual, dict)
        ):
            expected = (
                "mapping" if isinstance(usual, dict) else "list"
            )  # OmegaConf does not say which key it is
            raise ConfigError(f"{prefix}{key} is {value!r}; expected a {expected}")
    stages = values.get("stages") if schema is Recipe else None
    for number, stage in enumerate(stages if isinstance(stages, list) else []):
        if not isinstance(stage, dict):
            raise ConfigError(f"stages[{number}] is {stage!r}; expected a mapping")


def _check_values(recipe: Recipe) -> None:
    check_finite(to_dict(recipe))
    train, optim = recipe.train, recipe.optim
    positive = {
        "train.steps": recipe.train.steps,
        "train.epochs": recipe.train.epochs,
        "train.batch_size": recipe.train.batch_size,
        "train.chunk": recipe.train.chunk,
        "optim.lr": recipe.optim.lr,
        "optim.lower_lr": recipe.optim.lower_lr,
        "optim.clip_grad": recipe.optim.clip_grad,
        "schedule.steps": recipe.schedule.steps,
        "schedule.power": recipe.schedule.power,
        "checkpoint.every_steps": recipe.checkpoint.every_steps,
        "checkpoint.keep": recipe.checkpoint.keep,
        "log.every_steps": recipe.log.every_steps,
        "validation.every_steps": recipe.validation.every_steps,
        "validation.limit": recipe.validation.limit,
        "optim.eps": optim.eps,
    }
    for key, value in positive.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{key} is {value}; expected a positive number")
    if not 0 <= train.seed < 2**63:
        raise ConfigError(f"train.seed is {train.seed}; expected 0 to {2**63 - 1}")
    if train.ema is not None and not 0 < train.ema < 1:
        raise ConfigError(f"train.ema is {train.ema}; expected a decay between 0 and 1")
    if not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError(
            f"optim.betas is {list(optim.betas)}; expected two decays of 0 to below 1"
        )
    if not 0 <= optim.momentum < 1:
        raise ConfigError(f"optim.momentum is {optim.momentum}; expected 0 to below 1")
    if optim.weight_decay < 0:
        raise ConfigError(f"optim.weight_decay is {optim.weight_decay}; expected 0 or more")
    for key, name, known in (
        ("train.precision", recipe.train.precision, PRECISIONS),
        ("train.parallel", recipe.train.parallel, PARALLEL),
        ("optim.name", recipe.optim.name, OPTIMIZERS),
    ):
        if name not in known:
            raise ConfigError(f"{key} is {name!r}; expected one of {list(known)}")
    check_schedule(recipe.schedule, recipe.optim.lr)
