"""Bounds on the sizes of a model, looked at before anything is made.

Options may come from a file that somebody else wrote. Their numbers are compared with what a model
of today could have; then the model is built without memory, on the meta device, and counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, first_line

MOST_PARAMETERS = 20_000_000_000
_MOST = 1_000_000  # of any number: words of a vocabulary
_LAYERS = (
    "layers",
    "depth",
    "depths",
    "local_depth",
    "text_depth",
    "decoder_layers",
    "cross_layers",
    "second_stage",
)
_MOST_OF = {  # of numbers by these names, also in lists and mappings of them
    **dict.fromkeys(_LAYERS, 1000),
    **dict.fromkeys(("image_size", "img_size"), 16_384),
    "context_length": 65_536,
    "doublings": 20,
    "patch_size": 1024,
}
_TEXTS = (  # paths and names, which may be digits
    "clip",
    "dino",
    "weights",
    "teacher",
    "tokenizer",
    "hf_tokenizer_name",
    "templates",
    "name",
    "architecture",
)


class SizeError(ConfigError):
    """Options that make no model, or one that is too large."""


def check_sizes(
    options: Mapping[str, Any],
    make: Callable[[], nn.Module],
    where: str,
    most: int = MOST_PARAMETERS,
) -> None:
    """Refuse options that make no model, or one of more than ``most`` numbers.

    Args:
        options: of a model, with those of its parts in them.
        make: builds it, without weights from elsewhere.
        where: before the names in messages.
        most: parameters and numbers in buffers that it may have.

    Raises:
        SizeError: naming the option, or saying how many numbers the model would have.
    """
    numbers = list(_numbers(options))
    for name, value in numbers:
        key = next((part for part in reversed(name.split(".")) if part in _MOST_OF), "")
        limit = _MOST_OF.get(key, _MOST)
        if limit < abs(value) < math.inf:  # what is not finite is the options' to name
            shown = str(value) if abs(value) < 10**20 else f"above {10**20:.0e}"
            raise SizeError(f"{where}: {name} is {shown}; expected at most {limit}")
    if not numbers:
        return
    try:
        with torch.device("meta"):
            model = make()
    # Towers fail in many ways where their sizes do not fit each other.
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
    ) as error:
        if "meta" in str(error):  # a part that cannot be built without memory, of bounded sizes
            return
        what = f"{type(error).__name__}: {first_line(error)}"
        raise SizeError(
            f"{where} make no model ({what}); expected sizes that fit each other"
        ) from error
    count = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if count > most:
        raise SizeError(f"{where} make a model of {count:.3g} numbers; expected at most {most:.3g}")


def _numbers(options: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield name and value of every number, also of one that is written as text."""
    if isinstance(options, Mapping):
        for key, value in options.items():
            yield from _numbers(value, f"{name}.{key}".lstrip("."))
    elif isinstance(options, (list, tuple)):
        for index, value in enumerate(options):
            yield from _numbers(value, f"{name}.{index}")
    elif isinstance(options, (int, float)) and not isinstance(options, bool):
        yield name, options
    elif isinstance(options, str) and name.rsplit(".", 1)[-1] not in _TEXTS:
        digits = options.strip().replace("_", "").lstrip("+-")
        if digits.isdecimal():
            yield name, int(digits[:30])
