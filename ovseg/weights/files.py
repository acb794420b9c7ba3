"""Files beside and of weights: JSON of bounded length; safetensors, read without running code.

What is written is written by rename, so that a reader sees the old file or the new one. Tensors are
compared with those of a model before they are loaded: names, shapes, kinds of numbers, finiteness.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import CheckpointError, NoCheckpoint
from ..paths import no_file, read_bounded
from ..replacing import replacing
from .state_dicts import State, plain_state, whole_tensor

MOST = 64 << 20  # bytes of JSON; the largest known, indices of tensors, have a few million
_SEAL = "blake2b"  # in the metadata
# Floats of 8 bits mean nothing without the scales that go with them.
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Tables of positions that can be resized.
_POSITIONS = re.compile(
    r"(?!backbone\.text\.)(?!.*\btrunk\.).*(positional_embedding|pos_embed|\.position_embeddings)"
)


def load_json(path: Path) -> Any:
    """Return what a file of JSON holds.

    Raises:
        OSError: if it is not there, no plain file, or too long; ValueError: if it is no JSON in
            UTF-8, or nested too deeply.
    """
    try:
        return json.loads(read_bounded(path, MOST).decode("utf-8"))
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return what a file of JSON holds, names and values.

    Raises:
        CheckpointError: for anything else.
    """
    try:
        found = load_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds {type(found).__name__}; expected names and values")
    return found


def save_tensors(
    tensors: State,
    path: Path,
    metadata: dict[str, str] | None = None,
    *,
    sealed: bool = True,
) -> None:
    """Write a safetensors file.

    Args:
        tensors: by name; sharded ones are put together.
        path: of the file.
        metadata: texts that the file holds beside them.
        sealed: a hash of the tensors goes along, by which ``load_tensors`` finds a flipped bit.
    """
    found = {name: whole_tensor(t).contiguous().clone() for name, t in tensors.items()}
    metadata = {**(metadata or {}), _SEAL: tensors_hash(found)} if sealed else metadata
    with replacing(path) as part:
        try:
            save_file(found, part, metadata)
        except SafetensorError as error:  # no space, say
            raise OSError(f"{path} cannot be written: {error}") from error
        with open(part, "r+b") as file:
            _order(file)
            os.fsync(file.fileno())


def _order(file: BinaryIO) -> None:
    """Sort the metadata, which safetensors writes in any order.

    The same tensors are then the same bytes.
    """
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) <= length:
        file.seek(8)
        file.write(text.ljust(length))


def hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]], size: int = 16) -> str:
    """Hash tensors, each behind a text.

    Args:
        tensors: the text, which says what is to count beside the bytes, and the tensor.
        size: bytes of the hash, which is written in hexadecimal.
    """
    digest = hashlib.blake2b(digest_size=size)
    for head, x in tensors:
        digest.update(head.encode())
        digest.update(bytes_of(x))
    return digest.hexdigest()


def bytes_of(tensor: torch.Tensor) -> Any:
    """Return the bytes of a tensor as an array on the host."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def tensors_hash(tensors: State) -> str:
    """Hash names, kinds of numbers, shapes and bytes."""
    named = sorted(tensors.items())
    return hash_tensors((f"{name} {x.dtype} {list(x.shape)}", x) for name, x in named)


def file_hash(path: Path) -> str:
    """Hash the bytes of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def load_tensors(path: str | Path) -> State:
    """Read all tensors of a safetensors file.

    Raises:
        CheckpointError: if the file is missing, truncated, no safetensors file, or its tensors are
            not those that were written.
    """
    path = Path(path)
    if (what := no_file(path)) is not None:
        raise NoCheckpoint(f"{path} {what}; expected a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            seal = (file.metadata() or {}).get(_SEAL)
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if seal is not None and seal != tensors_hash(found):
            raise CheckpointError(
                f"{path} is damaged: its tensors are not those that were written; expected "
                "another copy of the file"
            )
        return found
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} ({size} bytes) is no complete safetensors file: {error}"
        ) from error


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """Write the tensors of a model, which may be wrapped, under its own names."""
    save_tensors(plain_state(model), path, {"format": "pt"})


def check_fit(
    path: str | Path,
    weights: State,
    own: State,
    what: str = "the model",
    named: Callable[[str], str] = str,
) -> None:
    """Check that weights can be loaded: names, shapes, kinds of numbers, and that they are finite.

    Args:
        path: where they come from, for messages.
        weights: of the file, under the model's names.
        own: of the model.
        what: the model, for messages.
        named: a tensor's name there to its name in the file.

    Raises:
        CheckpointError: if they do not fit, listing what does not by kind.
    """
    missing = sorted(own.keys() - weights.keys())
    unexpected = sorted(weights.keys() - own.keys())
    reshaped = [
        name
        for name in sorted(own.keys() & weights.keys())
        if own[name].shape != weights[name].shape
    ]
    if missing or unexpected or reshaped:
        raise misfit(
            path,
            what,
            [named(name) for name in missing],
            [named(name) for name in unexpected],
            {named(name): (weights[name], own[name]) for name in reshaped},
        )
    check_numbers(path, weights, own, named)


def misfit(
    path: str | Path,
    what: str,
    missing: Sequence[str],
    unexpected: Sequence[str],
    reshaped: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> CheckpointError:
    """Return the error for weights that do not fit.

    Args:
        path: where they come from.
        what: the model.
        missing: names.
        unexpected: names.
        reshaped: name -> the tensor that is given, and the one that is expected.
    """
    shapes = [
        f"{name} {list(given.shape)} instead of {list(own.shape)}"
        for name, (given, own) in reshaped.items()
    ]
    groups = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    text = "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:5])}" for kind, names in groups if names
    )
    start = f"{path} does not fit {what} ({text})"
    if (
        shapes
        and not missing
        and not unexpected
        and all(_POSITIONS.fullmatch(name) for name in reshaped)
    ):
        return CheckpointError(
            f"{start}: positions of another resolution or context; the option image_size=PIXELS "
            "(for texts: context_length=TOKENS) of create_model, from_pretrained or model.options "
            "of a recipe resizes them"
        )
    return CheckpointError(start)


def check_numbers(
    path: str | Path, weights: State, own: State, named: Callable[[str], str] = str
) -> None:
    """Check that tensors hold the kind of numbers that the model's have, and finite ones.

    Where the model's own are not finite, nothing is asked for: a mask may hold -infinity.

    Args:
        path: where they come from, for messages.
        weights: of the file, under the model's names.
        own: of the model.
        named: a tensor's name there to its name in the file.

    Raises:
        CheckpointError: naming the first that does not.
    """
    for name, tensor in weights.items():
        expected = own[name].dtype
        if expected.is_floating_point and tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"{path}: {named(name)} is of {tensor.dtype}; expected {expected}, or another of "
                f"{', '.join(map(str, _FLOATS))}"
            )
        if not expected.is_floating_point and not _are_integers(tensor):
            raise CheckpointError(
                f"{path}: {named(name)} is of {tensor.dtype}; expected whole numbers, {expected}"
            )
    counts = {name: _broken(tensor, own[name]) for name, tensor in weights.items()}
    broken = {name: count for name, count in counts.items() if count}
    if broken:
        name, count = next(iter(broken.items()))
        raise CheckpointError(
            f"{path}: {named(name)} holds {count} numbers of {weights[name].numel()} that are NaN, "
            f"infinite or beyond {own[name].dtype} ({len(broken)} tensors of {len(weights)} do); "
            "expected finite weights"
        )


def _are_integers(tensor: torch.Tensor) -> bool:
    """Return whether a counter or a table of numbers can be read.

    They are integers, or whole numbers in a file whose tensors were all made halves.
    """
    if tensor.is_meta:
        return True
    if tensor.dtype in _FLOATS:
        return bool((tensor == tensor.round()).all()) and not _broken(tensor, tensor.new_zeros(()))
    others = tensor.dtype.is_complex or tensor.dtype.is_floating_point
    return not others and tensor.dtype != torch.bool


def _broken(tensor: torch.Tensor, own: torch.Tensor) -> int:
    """Count the numbers that are not finite in the model's dtype, where its own are.

    One pass, which allocates nothing where all is well.
    """
    if not tensor.is_floating_point() or not own.is_floating_point():
        return 0
    if tensor.numel() == 0 or tensor.is_meta:
        return 0
    low, high = tensor.aminmax()
    most = torch.finfo(own.dtype).max
    if -most <= low.item() and high.item() <= most:
        return 0
    bad = ~(tensor.double().abs() <= most)
    if not hasattr(own, "full_tensor"):  # of a whole model
        bad &= own.detach().to(tensor.device).isfinite()
    return int(bad.sum())
