"""The evaluation that training calls every so many steps, as ``validation`` of a recipe asks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import distributed
from ..data.benchmark_sets import SegmentationSet
from ..errors import ConfigError
from ..systems import OVSegModel
from .evaluate import evaluate
from .protocols import Protocol, protocol, read_protocol
from .scenes import SCENE_SETS, SceneSet, evaluate_scene_set, save_gallery

_SCENES = 300  # where the recipe sets no limit
_KEPT = 8  # examples in a picture


def validation(recipe: Any) -> Validation | None:
    """Return what ``validation`` of a recipe describes, None if it asks for none.

    Raises:
        ConfigError: for data that are not named, and for a protocol that does not exist.
    """
    part = recipe.validation
    if part.every_steps is None:
        return None
    name = part.data or getattr(recipe.data, "style", None)
    if name is None:
        raise ConfigError(
            "validation.data is null and the recipe trains on no scenes; expected a benchmark of "
            "`ovseg data list`"
        )
    most = getattr(recipe.data, "max_pixels", None)
    view = {"max_pixels": most} if most else {}
    if name in SCENE_SETS:
        if part.partial:
            raise ConfigError(
                f"validation.partial is True and validation.data is {name!r}, which is drawn; "
                "expected a benchmark"
            )
        data: Any = SceneSet(name, part.limit or _SCENES, recipe.train.seed)
    elif not part.root:
        raise ConfigError(
            f"validation.root is {'null' if part.root is None else repr(part.root)}; expected the "
            f"folder that holds {name}"
        )
    else:
        data = SegmentationSet(name, part.root, "val", partial=part.partial, **view)
    read_protocol(part.protocol)
    return Validation(data, part.protocol, part.limit, recipe.model.name, view)


@dataclass
class Validation:
    """An evaluation as training calls it: (model, step, folder of pictures) -> figures.

    Attributes:
        data: the pictures and their truths.
        protocol: its name.
        limit: of pictures.
        title: of the model, in pictures.
        view: fields of ``View`` that the recipe sets.
    """

    data: Any
    protocol: str
    limit: int | None
    title: str
    view: dict[str, Any] = field(default_factory=dict)

    def check(self, model: OVSegModel) -> Protocol:
        """Return the protocol for a model; refuse one that it is not made for."""
        return protocol(self.protocol, self.data.description, model, **self.view)

    def __call__(self, model: OVSegModel, step: int, folder: Path) -> dict[str, float]:
        """Measure a model; draw what it saw into ``folder``."""
        asked: dict[str, Any] = {"limit": self.limit, "keep": _KEPT, "skip_bad": True}
        if isinstance(self.data, SceneSet):
            report = evaluate_scene_set(model, self.data, chosen=self.check(model), **asked)
        else:
            report = evaluate(model, self.data, self.check(model), **asked)
        if distributed.is_main() and report.examples:
            save_gallery({self.title: report}, folder / f"step_{step:08d}.png")
        figures = report.summary.items()
        return {name: value for name, value in figures if isinstance(value, (int, float))}
