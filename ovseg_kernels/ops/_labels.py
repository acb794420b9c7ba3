"""Argument checks and kernel calls that the operators with label maps share."""

from __future__ import annotations

import torch

from .. import _check, _checking
from .. import _library as lib
from ..reference.patch_text_similarity import accumulation_dtype
from ..reference.upsample_argmax import LABEL_TYPES

LONGEST = 2**31 - 1


def pair(name: str, value: object, meaning: str) -> None:
    parts = value if isinstance(value, (tuple, list)) else ()
    if len(parts) != 2 or not all(
        isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) and n > 0 for n in parts
    ):
        raise ValueError(f"{name} is {value!r}; expected two positive integers, {meaning}")
    if not all(n <= LONGEST for n in parts):
        raise ValueError(
            f"{name} is {value!r}; expected at most {LONGEST} rows and columns, {meaning}"
        )


def answer(
    op: str,
    definition: bool,
    like: torch.Tensor,
    arguments: tuple,
    flags: _checking._Flags | None,
    slot: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels and values of a call, by its ``definition`` or by what the dispatcher has.

    With ``flags`` it also looks for numbers that are refused, and says so at the ``slot``; they
    are sent when all kernels of the call are queued.
    """
    name = op
    if flags is not None:
        name = f"{op}_flagging"
        arguments = (*arguments, flags.found, slot)
    with torch.autocast(lib.autocast_type(like.device), enabled=False):
        kernel = lib.FALLBACKS[name] if definition else getattr(torch.ops.ovseg, name)
        return kernel(*arguments)


def label_rule(
    like_name, like, classes, size, bias, threshold, background, class_labels, label_type
):
    """Check what makes a label of a winning class."""
    pair("size", size, "(H, W)")
    if bias is not None:
        _check.tensor("bias", bias, 1, "[C]")
        _check.shape("bias", bias, (classes,), "one number for each class")
        _check.same("bias", bias, like_name, like, dtype=False)
    if label_type not in LABEL_TYPES:
        raise TypeError(f"label_type is {label_type}; expected one of {list(LABEL_TYPES)}")
    limits = torch.iinfo(label_type)
    _check.integer("background", background, -(2**63))
    if threshold is not None:
        _check.number("threshold", threshold, dtype=accumulation_dtype(like))
        if not limits.min <= background <= limits.max:
            raise ValueError(
                f"background is {background}; expected {limits.min} to {limits.max}, what "
                f"{label_type} holds"
            )
    largest = classes - 1 if class_labels is None else 0
    if class_labels is not None:
        _check.tensor("class_labels", class_labels, 1, "[C]", (torch.int64,))
        _check.shape("class_labels", class_labels, (classes,), "one label for each class")
        _check.same("class_labels", class_labels, like_name, like, dtype=False)
        # int64 holds every label. The other types take what is not looked at as torch's casts do:
        # modulo their range.
        for each in _checking.looked_at(class_labels) if label_type != torch.int64 else []:
            largest = max(largest, int(each.max()))
            if int(each.min()) < limits.min:
                raise ValueError(
                    f"class_labels holds {int(each.min())}; expected {limits.min} to {limits.max}"
                )
    if largest > limits.max:
        raise ValueError(f"the largest label is {largest}; {label_type} holds {limits.max} at most")
