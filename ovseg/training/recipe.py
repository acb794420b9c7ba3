"""Recipes: dataclasses are the schema, YAML files the values, ``key=value`` the overrides."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import ConfigError

FOLDER = Path(__file__).parent / "recipes"
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass
class ModelPart:
    name: str = "pacl_tiny"
    options: dict[str, Any] = field(default_factory=dict)
    clip_from: str | None = None  # run or save_pretrained folder of a clip_dense model: its backbone is taken over


@dataclass
class DataPart:
    form: str = "digits"  # of the scenes; or 'folder'
    root: str | None = None  # form=folder: a folder of images with a .txt of captions beside each
    train_size: int = 6000
    val_size: int = 300
    image_size: int = 48
    captions: int = 1  # of each image in a batch; scenes have five
    superpixels: str | None = None  # form=folder: side file of `ovseg data superpixels`; scenes: any word, they are made while drawing
    superpixel_labels: str = "majority"  # of a patch: its most frequent id; "mean": the published integer part of the mean of its ids
    workers: int = 2  # form=folder: processes that decode


@dataclass
class OptimPart:
    lr: float = 5e-4
    weight_decay: float = 0.2
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    lower_lr: float | None = None  # of the parts that a system trains gently; SegCLIP's CLIP trunk
    warmup_steps: int = 60
    warmup_share: float | None = None  # of all steps, in place of warmup_steps; the cosine then begins at its end
    clip_grad: float = 1.0


@dataclass
class TrainPart:
    steps: int = 1000
    batch_size: int = 64
    precision: str = "auto"  # auto: bf16 on GPUs that have it, fp32 elsewhere
    seed: int = 0
    device: str = "auto"


@dataclass
class CheckpointPart:
    every_steps: int = 500
    keep: int = 2


@dataclass
class LogPart:
    every_steps: int = 25


@dataclass
class Recipe:
    """Everything a training run depends on. Unknown keys are errors; every default stands here and nowhere else."""

    model: ModelPart = field(default_factory=ModelPart)
    data: DataPart = field(default_factory=DataPart)
    optim: OptimPart = field(default_factory=OptimPart)
    train: TrainPart = field(default_factory=TrainPart)
    checkpoint: CheckpointPart = field(default_factory=CheckpointPart)
    log: LogPart = field(default_factory=LogPart)


def list_recipes() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by name or file, with overrides such as ``optim.lr=1e-3``.

    Raises:
        ConfigError: for a recipe that does not exist, YAML that cannot be read, unknown keys, values of the wrong kind.
    """
    path = FOLDER / f"{source}.yaml" if str(source) in list_recipes() else Path(source)
    if not path.is_file():
        raise ConfigError(f"recipe is {str(source)!r}; expected a YAML file or one of {list_recipes()}")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r}; expected key=value, e.g. optim.lr=1e-3")
    try:
        loaded = OmegaConf.load(path)
        if not OmegaConf.is_dict(loaded):
            raise ConfigError(f"recipe {path} holds a list; expected a mapping with {[f.name for f in fields(Recipe)]}")
        plain: Any = OmegaConf.to_container(OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides))))
    except (OmegaConfBaseException, ValueError, OSError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {error}") from error
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"recipe {path} is no YAML: {error}") from error
        raise
    _check_keys(plain, Recipe, "")
    try:
        recipe: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), plain))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigError(f"recipe {path}: {key}: {str(error).splitlines()[0]}") from error
    _check_values(recipe)
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(recipe)))


def _check_keys(values: Any, schema: type, prefix: str) -> None:
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'recipe'} is {values!r}; expected a mapping")
    known = {f.name: f for f in fields(schema)}
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1, 0.4)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"expected one of {sorted(known)}"
            raise ConfigError(f"{prefix}{key}: unknown key, {hint}")
        part = known[key].default_factory
        if is_dataclass(part):
            _check_keys(value, part, f"{prefix}{key}.")


def _check_values(recipe: Recipe) -> None:
    positive = {
        "train.steps": recipe.train.steps, "train.batch_size": recipe.train.batch_size, "optim.lr": recipe.optim.lr,
        "optim.clip_grad": recipe.optim.clip_grad, "checkpoint.every_steps": recipe.checkpoint.every_steps,
        "checkpoint.keep": recipe.checkpoint.keep, "log.every_steps": recipe.log.every_steps,
    }
    for key, value in positive.items():
        if not value > 0:
            raise ConfigError(f"{key} is {value}; expected a positive number")
    if recipe.data.superpixel_labels not in ("majority", "mean"):
        raise ConfigError(f"data.superpixel_labels is {recipe.data.superpixel_labels!r}; expected 'majority' or 'mean'")
    if recipe.optim.warmup_share is not None and not 0 < recipe.optim.warmup_share < 1:
        raise ConfigError(f"optim.warmup_share is {recipe.optim.warmup_share}; expected a share between 0 and 1")
    if recipe.optim.lower_lr is not None and not recipe.optim.lower_lr > 0:
        raise ConfigError(f"optim.lower_lr is {recipe.optim.lower_lr}; expected a positive number")
    if recipe.train.precision not in PRECISIONS:
        raise ConfigError(f"train.precision is {recipe.train.precision!r}; expected one of {list(PRECISIONS)}")
