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

from ..bounds import bounded, check_bounds
from ..data.sources import load_options
from ..errors import ConfigError, first_line
from ..options import check_finite, unknown_key
from ..paths import address, no_file, read_bounded
from ..registration import Registry, yaml_files
from ..replacing import write_text
from ..systems.registry import files_of_systems
from .schedule import Schedule

RECIPES: Registry[Path] = Registry("recipe", lambda: yaml_files(*files_of_systems("recipes")))
_LONGEST = 16 << 20  # bytes of a recipe
# What is of the whole run, and would be passed over in a stage: parts, and which keys of them.
_OF_THE_RUN: dict[str, tuple[str, ...] | None] = {
    "validation": None,
    "checkpoint": None,
    "log": None,
    "train": ("device",),
}


def _positive(default: Any) -> Any:
    """Declare a field of numbers above 0; None stands for none."""
    return bounded(default, low=0, above=True)


@dataclass
class ModelPart:
    """Which model is trained: a name of ``list_models``, and options in place of its own."""

    name: str = "pacl_tiny"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class ObjectivePart:
    """The objective of a recipe: a name of ``ovseg.objectives``, the model's own if None."""

    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class OptimPart:
    """How weights are changed.

    Attributes:
        betas: of adamw.
        eps: of adamw.
        momentum: of sgd.
        lower_lr: of the parts that a system trains gently; SegCLIP's CLIP trunk.
        clip_grad: the largest norm of the gradient.
    """

    name: str = bounded("adamw", one_of=("adamw", "sgd"))
    lr: float = _positive(5e-4)
    weight_decay: float = bounded(0.2, low=0)
    betas: tuple[float, float] = bounded(
        (0.9, 0.98), low=0, high=1, below=True, pair=True, expected="two decays of 0 to below 1"
    )
    eps: float = _positive(1e-6)
    momentum: float = bounded(0.9, low=0, high=1, below=True)
    lower_lr: float | None = _positive(None)
    clip_grad: float | None = _positive(1.0)


@dataclass
class TrainPart:
    """How long is trained, on how many pictures at a time, and where.

    Attributes:
        steps: of the stage.
        epochs: in place of ``steps``: so often over the data.
        batch_size: pictures of a step, over all processes and chunks.
        chunk: pictures of a process that are encoded at a time; every text still meets every
            picture. None: all.
        drop_last: whether the rest of an epoch that fills no batch is left out.
        ema: decay of an average of the weights, which is then what is saved as the model; None: no
            average.
        precision: auto: bf16 on GPUs that have it, fp32 elsewhere.
        parallel: how several processes share the work.
        cache: folder for what a frozen image tower gives of each picture, computed once and read
            in place of pictures; None: the tower sees each picture anew.
        cache_limit: bytes that the folder may hold; None: 20 GiB.
        seed: of weights, data and noise.
        device: auto: a GPU where there is one.
    """

    steps: int = _positive(1000)
    epochs: int | None = _positive(None)
    batch_size: int = _positive(64)
    chunk: int | None = _positive(None)
    drop_last: bool = True
    ema: float | None = bounded(
        None, low=0, above=True, high=1, below=True, expected="a decay between 0 and 1"
    )
    precision: str = bounded("auto", one_of=("auto", "fp32", "bf16", "fp16"))
    parallel: str = bounded("ddp", one_of=("ddp", "fsdp"))
    cache: str | None = None
    cache_limit: int | None = _positive(None)
    seed: int = bounded(0, low=0, high=2**63 - 1)
    device: str = "auto"


@dataclass
class ValidationPart:
    """How the model is measured meanwhile.

    Attributes:
        every_steps: None: not at all.
        data, root, partial: as ``ovseg eval`` takes them; None: the scenes that the recipe trains
            on.
        protocol: of the evaluation.
        limit: pictures; None: all.
    """

    every_steps: int | None = _positive(None)
    data: str | None = None
    root: str | None = None
    partial: bool = False
    protocol: str = "plain"
    limit: int | None = _positive(100)


@dataclass
class CheckpointPart:
    """How often the state is saved, and how many checkpoints are kept."""

    every_steps: int = _positive(500)
    keep: int = _positive(2)


@dataclass
class LogPart:
    """How often a line is logged."""

    every_steps: int = _positive(25)


@dataclass
class Recipe:
    """Everything a training run depends on.

    Unknown keys are errors; defaults stand here and in the options of what is named.

    Attributes:
        init: part of the model -> where its weights come from; ``model`` is the whole. See
            ``stages.take_weights``.
        data: in a file a mapping, ``kind`` and what ``ovseg.data.sources.<kind>.Options`` has; in a
            recipe that was built the options themselves.
        stages: one recipe after another in one run: of each what differs from the rest of this
            file, and a ``name``.
    """

    name: str = ""
    model: ModelPart = field(default_factory=ModelPart)
    init: dict[str, Any] = field(default_factory=dict)
    objective: ObjectivePart = field(default_factory=ObjectivePart)
    data: Any = field(default_factory=lambda: {"kind": "scenes"})
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
    """Load a recipe by name or file.

    Args:
        source: a name of ``list_recipes`` or the path of a YAML file.
        overrides: such as ``optim.lr=1e-3`` or ``stages[0].train.steps=100``.

    Raises:
        ConfigError: for a recipe that does not exist, YAML that cannot be read, unknown keys,
            values of the wrong kind.
    """
    path = RECIPES[str(source)] if str(source) in RECIPES else Path(source)
    if (found := no_file(path)) is not None:
        there = f", which {found}" if os.path.lexists(path) or address(str(source)) else ""
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
    expected = f"expected a mapping with {{}}{[one.name for one in fields(Recipe)]}"
    try:
        loaded = load_yaml(path)
        if not OmegaConf.is_dict(loaded):
            raise ConfigError(f"recipe {path} holds a list; {expected.format('')}")
    except (OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {first_line(error)}") from error
    except YAMLError as error:
        raise ConfigError(f"recipe {path} is no YAML: {first_line(error)}") from error
    if not loaded:
        raise ConfigError(f"recipe {path} is empty; {expected.format('some of ')}")
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
        given = OmegaConf.from_dotlist([f"value={text}"])
        plain: Any = OmegaConf.to_container(given)  # with ${...} as they are
        OmegaConf.update(loaded, key, plain["value"], merge=True, force_add=True)
    except YAMLError as error:
        raise ConfigError(
            f"recipe {path}: override {shown!r} is no YAML: {first_line(error)}"
        ) from error
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
            "expected a key as in the file, and of its stages one that is there: stages[0]"
        ) from error


def build_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Build a recipe of a mapping, and check all of it.

    This is the one place where options are checked: what a recipe holds afterwards is passed on as
    it is.

    Args:
        values: as in a file.
        where: they came from, for messages.

    Raises:
        ConfigError: for unknown keys, values of the wrong kind or out of their bounds.
    """
    _check_keys(values, Recipe, "")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Recipe), values)
        check_finite(OmegaConf.to_container(merged))
        recipe: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigError(f"recipe {where}: {key}: {first_line(error)}") from error
    check_bounds(recipe)
    recipe.schedule.check_against(recipe.optim.lr)
    recipe.data = load_options(recipe.data)
    stages_of(recipe)
    return recipe


def stages_of(recipe: Recipe) -> list[Recipe]:
    """Return what is trained one after another, each a recipe without stages.

    A stage is the file with its own values over it.
    """
    if not recipe.stages:
        return [recipe]
    common = to_dict(recipe)
    del common["stages"], common["init"]
    found = []
    for number, changes in enumerate(recipe.stages):
        if "stages" in changes:
            raise ConfigError(f"stages[{number}].stages: a stage has no stages of its own")
        _check_of_the_run(changes, number)
        under = {
            **common,
            "init": recipe.init if number == 0 else {"model": "previous"},
            "name": f"stage {number + 1}",
        }
        kind = common["data"]["kind"]
        if changes.get("data", {}).get("kind", kind) != kind:
            under["data"] = changes["data"]  # options of one kind mean nothing to another
        try:
            found.append(build_recipe(_merge(under, changes), "of the stage"))
        except ConfigError as error:
            raise ConfigError(f"stages[{number}].{error}") from error
    return found


def _check_of_the_run(changes: dict[str, Any], number: int) -> None:
    """Refuse in a stage what is of the whole run, and would be passed over."""
    for part, keys in _OF_THE_RUN.items():
        given = changes.get(part)
        keys_given = given if isinstance(given, dict) else {}
        named = [key for key in keys_given if keys is None or key in keys]
        if named:
            raise ConfigError(
                f"stages[{number}].{part}.{named[0]}: it is of the whole run; expected "
                f"{part}.{named[0]} beside the stages"
            )


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return plain values, as YAML and JSON hold them."""
    return json.loads(json.dumps(asdict(recipe)))


def to_yaml(recipe: Recipe) -> str:
    """Return a recipe as a file holds it."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(recipe)))


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as YAML."""
    write_text(path, to_yaml(recipe))


def hash_of(recipe: dict[str, Any]) -> str:
    """Return sixteen digits that change with any value of ``to_dict(recipe)``."""
    return hashlib.blake2b(json.dumps(recipe, sort_keys=True).encode(), digest_size=8).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (key, old value, new value) of what two recipes disagree about.

    A key that the old one lacks, as those of earlier versions do, has its default there. A value is
    None where a recipe has no such key.
    """
    return _differences(old, new, _defaults(new), "")


def _differences(
    old: dict[str, Any], new: dict[str, Any], defaults: dict[str, Any], prefix: str
) -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for key in dict.fromkeys((*old, *new)):
        default = defaults.get(key)
        a = old.get(key, default)
        b = new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            below = default if isinstance(default, dict) else {}
            found += _differences(a, b, below, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", a, b))
    return found


def _defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a recipe that says nothing but the kind of its data."""
    data = recipe.get("data")
    kind = data.get("kind") if isinstance(data, dict) else None
    return to_dict(Recipe(data={} if kind is None else load_options({"kind": kind})))


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lay ``over`` over ``under``, mapping by mapping; ``init`` is taken as a whole."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "init"
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _check_keys(values: Any, schema: type, prefix: str) -> None:
    """Refuse keys that a recipe does not have, and lists where it has mappings, or the reverse."""
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'recipe'} is {values!r}; expected a mapping")
    usual = schema()
    known = {one.name: one for one in fields(schema)}
    for key, value in values.items():
        if key not in known:
            raise unknown_key(str(key), known, prefix)
        part = known[key].default_factory
        if is_dataclass(part):
            _check_keys(value, part, f"{prefix}{key}.")
        # OmegaConf does not say which key it is.
        elif isinstance(value, dict) and isinstance(getattr(usual, key), list | tuple):
            raise ConfigError(f"{prefix}{key} is {value!r}; expected a list")
        elif isinstance(value, list) and isinstance(getattr(usual, key), dict):
            raise ConfigError(f"{prefix}{key} is {value!r}; expected a mapping")
    stages = values.get("stages") if schema is Recipe else None
    for number, stage in enumerate(stages if isinstance(stages, list) else []):
        if not isinstance(stage, dict):
            raise ConfigError(f"stages[{number}] is {stage!r}; expected a mapping")
