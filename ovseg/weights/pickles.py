"""Files of published checkpoints, read without running code.

``read_published`` takes ``.safetensors``, or torch's own format with ``weights_only=True`` and no
fallback, as the first bytes of the file say, whatever it is called. What the names mean is
``systems/<system>/published.py``.

GroupViT's family saves ``{"model": tensors, "config": an omegaconf object, "metrics": a
defaultdict, ...}``. torch's own reader, which runs nothing but what builds tensors, refuses such a
file by the names of its classes; here those names, if all of them are settings' and metrics',
stand for stubs that take whatever they are given and keep nothing. No module of theirs is imported.
"""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ..errors import CheckpointError, NoCheckpoint, first_line
from ..paths import as_given, no_file
from ..replacing import replacing
from .files import load_tensors, save_tensors
from .state_dicts import State, plain_names, state_of, whole_tensor

SAFETENSORS = "safetensors"
TORCH = "torch"
_FIRST = 512  # bytes that are looked at
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_UNPACKED = 16  # times its size on the disk: torch packs nothing, so more is a trap
_LFS = "is a pointer of git LFS in place of the file; git lfs pull fetches it"
_HTML = (
    "is an HTML page, as a server sends it in place of a file; expected the file itself, by its "
    "link for downloads"
)
_OTHERS = (
    (b"version https://git-lfs", _LFS),
    (b"\x1f\x8b", "is compressed by gzip; expected it unpacked (gunzip)"),
    (b"BZh", "is compressed by bzip2; expected it unpacked (bunzip2)"),
    (b"\xfd7zXZ", "is compressed by xz; expected it unpacked (unxz)"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd; expected it unpacked (unzstd)"),
    (b"7z\xbc\xaf", "is an archive of 7-Zip; expected it unpacked"),
    (b"Rar!", "is an archive of RAR; expected it unpacked"),
    (b"\x89HDF", "is an HDF5 file, as Keras writes it"),
    (b"GGUF", "is a GGUF file, as llama.cpp reads it"),
    (b"\x93NUMPY", "is an array of numpy"),
    (b"\x89PNG", "is a picture"),
    (b"\xff\xd8\xff", "is a picture"),
)
_EXPECTED = "expected a state dict as safetensors or as torch.save writes it"
# Modules and names of settings and metrics: all else is refused.
_MODULES = ("omegaconf", "typing", "numpy", "enum")
_PLAIN = ("bool", "bytes", "complex", "dict", "float", "int", "list", "set", "str", "tuple")
_NAMES = (
    "collections.defaultdict",
    "operator.getitem",
    "_codecs.encode",
    *(f"builtins.{name}" for name in _PLAIN),
)


def weights_format(path: Path) -> str:
    """Return ``safetensors`` or ``torch``, whatever the file is called.

    Where its bytes say nothing, the name decides.

    Raises:
        NoCheckpoint: if there is no file; CheckpointError: if it is something else, saying what.
    """
    if (what := no_file(path)) is not None:
        raise NoCheckpoint(f"{as_given(path)} {what}; expected a file of weights")
    try:
        with open(path, "rb") as file:
            start = file.read(_FIRST)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not start:
        raise CheckpointError(
            f"{path} is empty, no complete safetensors file and no checkpoint of torch's"
        )
    for first, words in _OTHERS:
        if start.startswith(first):
            raise CheckpointError(f"{path} {words}; {_EXPECTED}")
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        raise CheckpointError(f"{path} {_HTML}")
    if start[257:262] == b"ustar":
        raise CheckpointError(f"{path} is a tar archive; {_EXPECTED}")
    if start.startswith(b"PK\x03\x04"):
        _check_archive(path)
        return TORCH
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _LONGEST_HEADER:
        return SAFETENSORS
    if start[:1] == b"\x80" and start[1:2] <= b"\x05":
        return TORCH  # torch's first format, a pickle
    if start.lstrip().startswith(b"{"):
        raise CheckpointError(f"{path} is JSON text; {_EXPECTED}")
    return SAFETENSORS if path.suffix == ".safetensors" else TORCH


def _check_archive(path: Path) -> None:
    """Refuse a zip archive that ``torch.save`` did not write; one that is cut is torch's to name.

    Raises:
        CheckpointError: saying what it is.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return
    names = [entry.filename for entry in entries]
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(
            f"{path} is a TorchScript archive, as OpenAI published its models: it holds code, and "
            "weights are read without running any. The same weights as safetensors: "
            "-m ViT-B-16:openai (ViT-L-14:openai, ...), or open_clip_model.safetensors of "
            "https://huggingface.co/timm/vit_base_patch16_clip_224.openai"
        )
    if not any(name.endswith("/data.pkl") for name in names):
        raise CheckpointError(
            f"{path} is a zip archive that torch.save did not write ({len(names)} files: "
            f"{', '.join(names[:3])}); {_EXPECTED}"
        )
    size = path.stat().st_size
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > _UNPACKED * size:
        raise CheckpointError(
            f"{path} ({size} bytes) says that it unpacks to {unpacked}; {_EXPECTED}, which packs "
            "nothing"
        )


def read_published(path: str | Path) -> State:
    """Read the tensors of anybody's checkpoint, under plain names.

    They are a state dict, alone or in what a training wraps around it (``state_dicts.py``).

    Raises:
        CheckpointError: if it is missing, damaged, holds more than tensors, or would run code.
    """
    path = Path(path)
    if weights_format(path) == SAFETENSORS:
        return state_of(load_tensors(path), path)
    try:
        tree = _load(path)
    except UnpicklingError as error:
        tree = _without_settings(path, error)
    except Exception as error:  # a damaged or hostile file fails in any way it likes
        raise _unreadable(path, error) from error
    return state_of(tree, path)


def write_published(state: State, path: Path) -> None:
    """Write a bare state dict under plain names, by rename.

    As safetensors, or in torch's format under any other suffix.
    """
    state = plain_names(state)
    if path.suffix == ".safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(state, path)
        return
    with replacing(path) as part:
        torch.save({name: whole_tensor(x).contiguous().clone() for name, x in state.items()}, part)


def _load(path: Path) -> Any:
    with open(path, "rb") as file:  # of a path torch would look at the suffix
        return torch.load(file, map_location="cpu", weights_only=True)


def _without_settings(path: Path, error: UnpicklingError) -> Any:
    """Read a file that torch's reader refuses, if it refuses the classes of settings alone."""
    names = known_names(path)
    if names is None:
        raise _unreadable(path, error) from error
    try:
        return load_with_stubs(path, names)
    except Exception as again:  # as in ``read_published``
        raise _unreadable(path, again) from again


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    """Say why a file is not read: torch's own words advise to run the code that is in it."""
    start = f"{path} cannot be read without running code, or is damaged"
    names = _unknown(path) if isinstance(error, UnpicklingError) else None
    if names:
        what = f"it names {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        return CheckpointError(
            f"{start}: {what}; expected names and tensors alone, as torch.save(model.state_dict(), "
            "PATH) writes them"
        )
    if isinstance(error, UnpicklingError) or "weights_only" in str(error):
        return CheckpointError(
            f"{start}: it holds more than tensors, or is no checkpoint of torch's; expected names "
            "and tensors alone"
        )
    return CheckpointError(f"{start}: {first_line(error)}")


class Stub:
    """In place of an object of another library."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """Take any arguments."""
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        """Take whatever the object was."""


class _Mapping:
    """In place of a class that is filled item by item, as torch's reader fills plain ones alone."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


def known_names(path: Path) -> list[str] | None:
    """List the names in a checkpoint that torch's reader does not know.

    Return None unless all of them are settings' and metrics'.
    """
    names = _unknown(path)
    if not names:
        return None
    known = all(name in _NAMES or name.partition(".")[0] in _MODULES for name in names)
    return names if known else None


def load_with_stubs(path: Path, names: list[str]) -> Any:
    """Read a checkpoint with stubs for these names."""
    stubs = [
        (type("Stub", (_Mapping if name == "collections.defaultdict" else Stub,), {}), name)
        for name in names
    ]
    with torch.serialization.safe_globals(stubs):
        return _load(path)


def _unknown(path: Path) -> list[str] | None:
    """List the names that torch's reader does not know; None where they cannot be listed.

    That is a damaged or hostile file, or torch's first format.
    """
    try:
        with open(path, "rb") as file:
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:
        return None
