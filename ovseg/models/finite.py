"""Which tensor of a model is no number, asked once its results are none."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..errors import NotFinite


def not_finite(model: nn.Module) -> NotFinite | FloatingPointError:
    """The error for scores that hold NaN: it names the first tensor of the model that holds NaN or an infinity; where none does, the
    numbers grew too large for its dtype."""
    about = getattr(model, "name", "") or type(model).__name__
    for name, x in _weights(model):
        bad = int((~x.isfinite()).sum())
        if bad:
            return NotFinite(f"the scores of {about} hold NaN: its tensor {name} holds NaN or an infinity in {bad} of {x.numel()} places; "
                             "expected finite weights, as of a whole checkpoint")
    dtype = next((str(p.dtype).removeprefix("torch.") for p in model.parameters()), "its dtype")
    return FloatingPointError(f"the scores of {about} hold NaN, and its weights are finite: numbers on the way exceed {dtype}; expected a "
                              "model in float32, or in bfloat16 in place of float16")


def _weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and lasting buffers by name; masks, which hold infinities, are made again and not saved."""
    for part in (model, getattr(model, "proxy", None)):
        for name, x in part.state_dict().items() if part is not None else ():
            if x.is_floating_point():
                yield f"{'' if part is model else 'proxy.'}{name.removeprefix('_orig_mod.')}", x
