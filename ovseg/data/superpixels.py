"""Superpixels of pictures, made once and kept in a compact side file.

Source: Felzenszwalb and Huttenlocher, IJCV 2004, by scikit-image. The file is safetensors: for each
picture its segment ids, deflated, with height and width before them; ids are at most 16 bits. It is
read without running code, and a picture's map is decoded when it is asked for.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import zlib
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bounds import bounded, check_bounds
from ..errors import DataError, InputError
from ..libraries import require
from ..paths import no_file
from ..progress import bar
from ..replacing import file_for, replacing
from .images import MAX_PIXELS, read_image

SHORT_SIDE = 224  # pictures are made smaller before they are cut up
PATCH_RULES = ("majority", "mean")


@dataclass
class SuperpixelOptions:
    """How pictures are cut up.

    Attributes:
        scale, sigma, min_size: of Felzenszwalb's method.
        workers: processes that cut.
        max_pixels: larger pictures are refused.
    """

    scale: float = bounded(224.0, low=0, above=True)
    sigma: float = bounded(0.9, low=0)
    min_size: int = bounded(224, low=1)
    workers: int = bounded(1, low=1, high=1024, integer=True)
    max_pixels: int = MAX_PIXELS


def superpixels(
    image: np.ndarray, *, scale: float = 224.0, sigma: float = 0.9, min_size: int = 224
) -> np.ndarray:
    """Return the segment ids uint16 [H, W] of an RGB picture [H, W, 3]."""
    from skimage.segmentation import felzenszwalb

    found = felzenszwalb(image, scale=scale, sigma=sigma, min_size=min_size)
    if found.max() > 65535:
        raise InputError(
            f"{int(found.max()) + 1} superpixels in one picture; expected at most 65536: raise "
            "scale or min_size"
        )
    return found.astype(np.uint16)


def patch_labels(segments: np.ndarray, patch: int, how: str = "majority") -> np.ndarray:
    """Return one id for each patch [H / patch, W / patch].

    Args:
        segments: [H, W]; rows and columns beyond whole patches are left out.
        patch: side in pixels.
        how: ``majority``: the id that is most frequent in the patch, the smaller one of equals.
            ``mean``: the integer part of the mean of the ids, as published; it often is an id that
            occurs nowhere in the patch.
    """
    if how not in PATCH_RULES:
        raise ValueError(f"how is {how!r}; expected 'majority' or 'mean'")
    h = segments.shape[0] // patch
    w = segments.shape[1] // patch
    cells = (
        segments[: h * patch, : w * patch]
        .reshape(h, patch, w, patch)
        .transpose(0, 2, 1, 3)
        .reshape(h * w, patch * patch)
    )
    if how == "mean":
        return cells.astype(np.int64).mean(1).astype(np.int64).reshape(h, w)
    names, compact = np.unique(cells, return_inverse=True)
    flat = compact.reshape(cells.shape) + np.arange(h * w)[:, None] * len(names)
    counts = np.bincount(flat.ravel(), minlength=h * w * len(names)).reshape(h * w, len(names))
    return names[counts.argmax(1)].astype(np.int64).reshape(h, w)


def stored_key(key: str) -> str:
    """Return a picture's key in the side file, in UTF-8; other bytes of a name are in hex."""
    return os.fsencode(key).decode("utf-8", "backslashreplace")


class SuperpixelFile:
    """A side file of ``write_superpixels``.

    Pickled, it is its path: worker processes open it themselves.
    """

    def __init__(self, path: str | Path):
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        if (what := no_file(path)) is not None:
            raise DataError(
                f"superpixel file {str(path)!r} {what}; expected one of ovseg data superpixels"
            )
        try:
            self._file = safe_open(self.path, framework="np")
            self._keys = set(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise DataError(f"superpixel file {str(path)!r} is damaged: {error}") from error

    def __reduce__(self) -> tuple[type[SuperpixelFile], tuple[Path]]:
        return SuperpixelFile, (self.path,)

    def __contains__(self, key: str) -> bool:
        return stored_key(key) in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, key: str) -> np.ndarray:
        """Decode the segment ids uint16 [H, W] of one picture.

        Raises:
            DataError: if it is not there or damaged.
        """
        if key not in self:
            raise DataError(f"{self.path} holds no superpixels of {key!r}")
        raw = self._file.get_tensor(stored_key(key)).tobytes()
        try:
            height, width = np.frombuffer(raw[:8], np.uint32).tolist()
            data = zlib.decompress(raw[8:], bufsize=2 * height * width + 1)
            return np.frombuffer(data, np.uint16).reshape(height, width)
        except (zlib.error, ValueError) as error:
            raise DataError(
                f"{self.path}: the superpixels of {key!r} are damaged: {error}"
            ) from error


def write_superpixels(
    pictures: Iterable[tuple[str, Path]],
    path: Path,
    options: SuperpixelOptions | None = None,
    *,
    progress: bool = False,
) -> tuple[int, list[str]]:
    """Cut up pictures (key, file) into a side file, which appears by rename.

    Returns:
        How many were cut up, and what could not be, a line each.

    Raises:
        InputError: for options that mean nothing, and a file that cannot be written, before
            anything is cut up.
        DataError: if no picture could be.
        MissingLibrary: without scikit-image.
    """
    from safetensors.numpy import save_file

    require("skimage", "cutting up pictures")
    options = options or SuperpixelOptions()
    check_bounds(options, error=InputError)
    file_for(path, "superpixel file")
    jobs = [(key, file, options) for key, file in pictures]
    found: dict[str, np.ndarray] = {}
    bad: list[str] = []
    processes: Any = nullcontext()
    if options.workers > 1:
        processes = ProcessPoolExecutor(options.workers, initializer=_end_with_parent)
    with processes as pool:
        results = map(_cut, jobs) if pool is None else pool.map(_cut, jobs, chunksize=16)
        try:
            for key, data, error in bar(
                results, total=len(jobs), show=progress, unit="picture", desc="superpixels"
            ):
                stored = stored_key(key)
                if data is None:
                    bad.append(error)
                elif stored in found:
                    bad.append(
                        f"{key!r} and another picture would both be kept as {stored!r}; expected "
                        "names in UTF-8"
                    )
                else:
                    found[stored] = np.frombuffer(data, np.uint8)
        except BrokenProcessPool as error:
            raise DataError(
                f"a process that cuts up pictures was killed after {len(found)} of {len(jobs)}, "
                "often for want of memory; expected fewer workers, or smaller pictures"
            ) from error
    if not found:
        first = f"; the first: {bad[0]}" if bad else ""
        raise DataError(f"none of {len(jobs)} pictures could be cut up{first}")
    facts = {name: str(getattr(options, name)) for name in ("scale", "sigma", "min_size")}
    with replacing(path) as part:
        save_file(found, part, {"method": "felzenszwalb", **facts})
    return len(found), bad


def _end_with_parent() -> None:
    """Let a worker watch the process that it works for.

    One that is killed says nothing, and its workers would wait for ever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _cut(job: tuple[str, Path, SuperpixelOptions]) -> tuple[str, bytes | None, str]:
    """Return the key, what is kept of a picture, and why there is nothing to keep."""
    key, file, options = job
    try:
        image = read_image(file, max_pixels=options.max_pixels)
        factor = min(1.0, SHORT_SIDE / min(image.size))
        width, height = (max(1, round(side * factor)) for side in image.size)
        ids = superpixels(
            np.asarray(image.resize((width, height))),
            scale=options.scale,
            sigma=options.sigma,
            min_size=options.min_size,
        )
    except (InputError, ValueError, MemoryError) as error:
        told = str(error) or type(error).__name__
        return key, None, told if str(file) in told else f"{file}: {told}"
    return key, np.array(ids.shape, np.uint32).tobytes() + zlib.compress(ids.tobytes(), 9), ""
