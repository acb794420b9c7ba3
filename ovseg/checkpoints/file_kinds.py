"""The kind of a file of weights, by its first bytes: the name may say something else."""

from __future__ import annotations

import zipfile
from pathlib import Path

from ..errors import CheckpointError, NoCheckpoint
from ..paths import as_given, no_file

SAFETENSORS, TORCH = "safetensors", "torch"
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


def weights_format(path: Path) -> str:
    """Return ``safetensors`` or ``torch``, whatever the file is called; of bytes that say nothing,
    what the name says.

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
    """Raises CheckpointError for a zip archive that ``torch.save`` did not write. One that is cut
    is torch's to name."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return
    names = [entry.filename for entry in entries]
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(
            f"{path} is a TorchScript archive, as OpenAI published its models: it holds code, and "
            f"weights are read "
            "without running any. The same weights as safetensors: -m ViT-B-16:openai "
            "(ViT-L-14:openai, ...), or "
            "open_clip_model.safetensors of "
            "https://huggingface.co/timm/vit_base_patch16_clip_224.openai"
        )
    if not any(name.endswith("/data.pkl") for name in names):
        raise CheckpointError(
            f"{path} is a zip archive that torch.save did not write ({len(names)} files: "
            f"{', '.join(names[:3])}); "
            f"{_EXPECTED}"
        )
    size, unpacked = path.stat().st_size, sum(entry.file_size for entry in entries)
    if unpacked > _UNPACKED * size:
        raise CheckpointError(
            f"{path} ({size} bytes) says that it unpacks to {unpacked}; {_EXPECTED}, which packs "
            f"nothing"
        )
