"""timm's architectures: their names, sizes, normalisation, and the levels of their features.

What a trunk gives is found out on the meta device, by building it there once and sending two
pictures of other shapes through it: no memory, and no table of what each of timm's families does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import first_line

_SIZED = ("vision_transformer", "eva", "deit")  # timm's files whose ViTs take ``dynamic_img_size``
_PROBES = ((3, 4), (5, 2))  # rows and columns, in coarsest patches


@dataclass(frozen=True)
class Levels:
    """The levels of features that are taken of a trunk.

    Attributes:
        arguments: what timm's factory gets beside the name.
        channels: of each level, the last branch behind them.
        reductions: pixels from place to place in each.
        used: names of the parameters that they depend on.
    """

    arguments: dict[str, Any]
    channels: tuple[int, ...]
    reductions: tuple[int, ...]
    used: frozenset[str]


def import_timm(what: str) -> Any:
    """Import timm, which ``what`` needs, or name the usual cause."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: of a torchvision for another torch
        raise ImportError(
            f"{what} needs timm, which does not import ({first_line(error)}): "
            "pip install 'ovseg-kernels[models]'"
        ) from error
    return timm


def size_arguments(timm: Any, name: str) -> dict[str, Any]:
    """Return the arguments by which timm's model takes pictures of any size."""
    module = getattr(timm.models.model_entrypoint(name.split(".")[0]), "__module__", "")
    return {"dynamic_img_size": True} if module.rsplit(".", 1)[-1] in _SIZED else {}


def normalisation(
    timm: Any, name: str
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return mean and std of RGB in 0..1 that timm states for ``name``.

    A model that was built with weights from a file does not say: timm then puts its usual ones in
    place of the architecture's.
    """
    facts = timm.models.get_pretrained_cfg(name)
    if facts is None:
        facts = timm.models.PretrainedCfg()
    return tuple(facts.mean), tuple(facts.std)


def levels_of(
    name: str, stages: Sequence[int], last: bool, output_stride: int | None = None
) -> Levels:
    """Find out what a trunk gives, once in a process.

    Args:
        name: of timm's.
        stages: the levels, in the order of their depth.
        last: whether its last features are a branch behind them.
        output_stride: pixels from place to place in its coarsest level; None leaves it as it is.

    Raises:
        ValueError: for an unknown name, levels that it does not have, a stride that it cannot have,
            and for a trunk that does not take pictures of any size.
    """
    return _levels(name, tuple(stages), last, output_stride)


@functools.cache
def _levels(name: str, stages: tuple[int, ...], last: bool, output_stride: int | None) -> Levels:
    timm = import_timm("backbone.kind 'timm'")
    if not timm.is_model(name.split(".")[0]):
        close = get_close_matches(name, timm.list_models(), 3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"architecture is {name!r}; expected a name of timm.list_models(){hint}")
    trunk, arguments = _on_meta(timm, name, output_stride)
    known = getattr(trunk, "feature_info", None)
    if not known or not hasattr(trunk, "forward_intermediates"):
        raise ValueError(
            f"architecture is {name!r}, a {type(trunk).__name__} without intermediate features; "
            "expected a model of timm's with forward_intermediates"
        )
    wrong = [stage for stage in stages if not 0 <= stage < len(known)]
    if wrong or not stages or stages != tuple(sorted(set(stages))):
        raise ValueError(
            f"stages is {list(stages)} and architecture {name!r} has {len(known)} levels; expected "
            f"some of 0 to {len(known) - 1}, each once and in order"
        )
    prune(trunk, stages, last)
    reached = known if last else known[: stages[-1] + 1]
    patch = max(int(info["reduction"]) for info in reached)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            channels, reductions, used = _probe(trunk, stages, last, patch)
    # Trunks of one picture size fail in ways of their own.
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"architecture is {name!r}, which does not take pictures of any size "
            f"({first_line(error)}); expected a convolutional trunk, or a ViT that timm resizes"
        ) from error
    return Levels(arguments, channels, reductions, used)


def prune(trunk: Any, stages: Sequence[int], last: bool) -> None:
    """Take off what the levels do not depend on; the last branch needs all but the classifier."""
    if not last:
        trunk.prune_intermediate_layers(list(stages), prune_norm=True, prune_head=True)


def feature_maps(trunk: Any, images: Tensor, stages: Sequence[int], last: bool) -> list[Tensor]:
    """Return the maps [B, D_i, h_i, w_i] of the levels, and of the last branch behind them."""
    found = trunk.forward_intermediates(
        images, indices=list(stages), output_fmt="NCHW", intermediates_only=not last
    )
    if not last:
        return list(found)
    final, maps = found
    if final.dim() == 3:  # a ViT's tokens, after its norm, with a class token before the patches
        h, w = maps[-1].shape[-2:]
        patches = final[:, getattr(trunk, "num_prefix_tokens", 0) :]
        final = patches.transpose(1, 2).unflatten(2, (h, w))
    elif getattr(trunk, "output_fmt", "NCHW") == "NHWC":
        final = final.permute(0, 3, 1, 2)
    return [*maps, final]


def _on_meta(timm: Any, name: str, output_stride: int | None) -> tuple[Any, dict[str, Any]]:
    """Build a trunk without memory; return it and the arguments that made it."""
    arguments = size_arguments(timm, name)
    if output_stride is not None:
        try:
            return _built(timm, name, arguments | {"output_stride": output_stride})
        except TypeError as error:
            if "output_stride" not in str(error):
                raise
        # timm's words differ from family to family.
        except (AssertionError, NotImplementedError, ValueError) as error:
            raise ValueError(
                f"output_stride is {output_stride}, which timm's {name} cannot have; expected 32, "
                "or null for its own"
            ) from error
    trunk, arguments = _built(timm, name, arguments)
    known = getattr(trunk, "feature_info", None)
    own = max((int(info["reduction"]) for info in known or ()), default=output_stride)
    if output_stride not in (None, own):
        raise ValueError(
            f"output_stride is {output_stride} and architecture {name!r}, whose stride timm does "
            f"not change, has {own}; expected null or {own}"
        )
    return trunk, arguments


def _built(timm: Any, name: str, arguments: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    with torch.device("meta"):
        trunk = timm.create_model(name, False, None, num_classes=0, **arguments)
    return trunk.eval(), arguments


def _probe(
    trunk: Any, stages: Sequence[int], last: bool, patch: int
) -> tuple[tuple[int, ...], tuple[int, ...], frozenset[str]]:
    """Return channels, reductions and the names of what the levels depend on.

    Raises:
        RuntimeError: for a grid that does not cover the picture evenly.
    """
    found: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for rows, columns in _PROBES:
        images = torch.empty(1, 3, rows * patch, columns * patch, device="meta")
        maps = feature_maps(trunk, images, stages, last)
        even = [rows * patch / one.shape[2] for one in maps]
        if even != [columns * patch / one.shape[3] for one in maps]:
            raise RuntimeError(f"its grids are {[tuple(one.shape[2:]) for one in maps]}")
        found.add((tuple(one.shape[1] for one in maps), tuple(map(int, even))))
        if any(step != int(step) for step in even) or len(found) > 1:
            raise RuntimeError("its grids differ from picture to picture")
    named = [(name, p) for name, p in trunk.named_parameters() if p.requires_grad]
    total = sum((one.sum() for one in maps), start=torch.zeros((), device="meta"))
    gradients = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    pairs = zip(named, gradients, strict=True)
    channels, reductions = found.pop()
    return channels, reductions, frozenset(name for (name, _), g in pairs if g is not None)
