"""What options may be, declared beside their fields and checked in one place."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest

from ovseg.bounds import bounded, check_bounds
from ovseg.errors import ConfigError, InputError


@dataclass
class Crop:
    scale: tuple[float, float] = bounded((0.5, 1.0), low=0, above=True, high=1, ordered=True)
    sides: tuple[int, int] = bounded((4, 2), low=1, high=8, pair=True, integer=True)


@dataclass
class Options:
    steps: int = bounded(1000, low=1, integer=True)
    rate: float = bounded(0.1, low=0, above=True)
    momentum: float = bounded(0.9, low=0, high=1, below=True)
    share: float = bounded(0.5, low=0, above=True, high=1, below=True)
    weights: dict[str, float] = bounded(default_factory=dict, low=0)
    layers: list[int] = bounded(default_factory=list, low=0, high=12)
    seed: int = bounded(0, low=0, high=2**63 - 1, integer=True)
    kind: str = bounded("cosine", one_of=("cosine", "poly"))
    policy: str | None = bounded(
        None, pattern="rand(-m[0-9])*", expected="a policy such as 'rand-m9'"
    )
    free: float = bounded(-1.0, help="of no account")
    crop: Crop = field(default_factory=Crop)


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("steps", 0, "steps is 0; expected 1 or more"),
        ("steps", 1.5, "steps is 1.5; expected an integer, 1 or more"),
        ("steps", True, "steps is True"),
        ("rate", 0.0, "rate is 0.0; expected a positive number"),
        ("rate", math.nan, "rate is nan"),
        ("rate", math.inf, "rate is inf"),
        ("momentum", 1, "momentum is 1; expected 0 to below 1"),
        ("share", 1, "share is 1; expected above 0 and below 1"),
        ("weights", {"a": 1, "b": -1}, "weights.b is -1; expected 0 or more"),
        ("layers", [1, 13], "layers.1 is 13; expected 0 to 12"),
        ("seed", 2**63, f"seed is {2**63}; expected 0 to {2**63 - 1}"),
        ("kind", "zigzag", r"kind is 'zigzag'; expected one of \['cosine', 'poly'\]"),
        ("policy", "rand-m99", "policy is 'rand-m99'; expected a policy"),
        (
            "crop",
            Crop((0.0, 1.0)),
            r"crop.scale is \[0.0, 1.0\]; expected two numbers in order, above 0 and up to 1",
        ),
        ("crop", Crop((0.9, 0.5)), r"crop.scale is \[0.9, 0.5\]"),
        ("crop", Crop((0.5, 1.5)), r"crop.scale is \[0.5, 1.5\]"),
        ("crop", Crop((0.5, 0.6, 0.7)), r"crop.scale is \[0.5, 0.6, 0.7\]"),
        ("crop", Crop(0.5), "crop.scale is 0.5"),
        ("crop", Crop(sides=(2, 9)), r"crop.sides is \[2, 9\]; expected two integers, 1 to 8"),
    ],
)
def test_what_lies_outside_is_named(name, value, message):
    with pytest.raises(ConfigError, match=rf"^at\.{message}"):
        check_bounds(Options(**{name: value}), "at.")
    with pytest.raises(InputError):
        check_bounds(Options(**{name: value}), error=InputError)


def test_what_lies_inside_passes():
    check_bounds(Options())
    check_bounds(
        Options(
            np.int64(3),
            np.float32(0.5),
            None,
            1e-9,
            {"a": 0},
            [0, None, 12],
            2**63 - 1,
            "poly",
            "rand-m9-m1",
            math.nan,
        )
    )
