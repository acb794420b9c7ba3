"""Pictures in any form become pixels on the canvas of their windows: read, resized, uploaded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ..data.images import TOO_LARGE, picture_size, read_image, to_tensor
from ..dense import FLOATS, check_dense
from ..errors import InputError
from ..nn.tensors import upload
from ..systems import ModelSpec
from .sources import Source
from .view import Placement, View, place

PIXELS_AHEAD = 96_000_000  # of the pictures that are labelled and of those that are read meanwhile
_HEADER = 1 << 18
_Item = TypeVar("_Item")
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Prepared:
    """A picture before a model has seen it.

    Attributes:
        source: the picture, or its values [3, H, W] uint8 where it came as a tensor.
        pixels: [3, Hc, Wc], uint8 or floats in 0..1.
        placement: of its windows.
        view: by which it was resized and cut.
    """

    source: Image.Image | torch.Tensor
    pixels: torch.Tensor
    placement: Placement
    view: View

    def image(self) -> Image.Image:
        """Return the picture; reads a tensor's device."""
        return self.source if isinstance(self.source, Image.Image) else _to_image(self.source)

    def unit(self, device: torch.device) -> torch.Tensor:
        """Return the picture's values in 0..1, [3, H, W] of its own size."""
        if isinstance(self.source, Image.Image):
            return upload(to_tensor(self.source), device)
        return self.source.to(device) / 255


def prepare(picture: Any, view: View, spec: ModelSpec) -> Prepared:
    """Read and resize one picture in any form that ``read_image`` takes."""
    image = read_image(picture, max_pixels=view.max_pixels)
    placement = _placed((image.height, image.width), view, spec)
    return Prepared(image, resized(image, placement.canvas, view.resize), placement, view)


def _placed(size: tuple[int, int], view: View, spec: ModelSpec) -> Placement:
    return place(size, view, patch=spec.patch_size, trained=spec.image_size, stride=spec.stride)


def pictures_of(images: Any, name: str) -> Iterable[Any]:
    """Return several pictures, which are to be walked over.

    Raises:
        InputError: for one picture, which would be walked over row by row or letter by letter, and
            for what holds none.
    """
    if isinstance(images, torch.Tensor):
        check_dense(name, images, "a list of pictures or a tensor [B, 3, H, W]")
        several = images.dim() == 4
    else:
        one = str | bytes | bytearray | np.ndarray | Mapping | Image.Image
        several = isinstance(images, Iterable) and not isinstance(images, one)
    if several:
        return images
    what = f"a {type(images).__name__}"
    if isinstance(images, torch.Tensor | np.ndarray):
        what += f" of shape {list(images.shape)}"
    elif isinstance(images, str | Path):
        what = repr(str(images))
    raise InputError(
        f"{name} is {what}; expected a list of pictures or a tensor [B, 3, H, W]. One picture: "
        "[picture]; an array [B, H, W, 3]: list(array)"
    )


def prepare_tensors(
    images: torch.Tensor, view: View, spec: ModelSpec
) -> tuple[list[Prepared], torch.Tensor | None]:
    """Resize the pictures of [B, 3, H, W].

    Returns them, and whether a value lies outside of 0..1, as a 0-dim tensor that is not read here.
    They stay on their device, unless bicubic resizing, which is Pillow's, takes them to the CPU.
    Floats are rounded to 1/255, as for pictures in any other form.
    """
    check_dense("images", images, "a list of pictures or a tensor [B, 3, H, W]")
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise InputError(
            f"images has shape {list(images.shape)}; expected [B, 3, H, W] with at least one pixel"
        )
    wrong = None
    if images.dtype in FLOATS:
        wrong = ~((images >= 0) & (images <= 1)).all()  # NaN is neither
        images = (images * 255).round().to(torch.uint8)
    elif images.dtype != torch.uint8:
        raise InputError(f"images has dtype {images.dtype}; expected uint8 or floats in 0..1")
    height, width = images.shape[2:]
    if height * width > view.max_pixels:
        raise InputError(
            f"images is {width}x{height} = {height * width} pixels; the limit is "
            f"{view.max_pixels}: it is too large. " + TOO_LARGE
        )
    placement = _placed((height, width), view, spec)
    size = placement.canvas
    if size == (height, width):
        canvas = list(images)
    elif view.resize == "bilinear":
        canvas = list(
            F.interpolate(images.float() / 255, size, mode="bilinear", align_corners=False)
        )
    else:
        canvas = [resized(_to_image(image), size, "bicubic") for image in images]
    pairs = zip(images, canvas, strict=True)
    return [Prepared(image, pixels, placement, view) for image, pixels in pairs], wrong


def read_ahead(
    items: Iterable[_Item],
    read: Callable[[_Item], _Read],
    batch: int,
    readers: int = 2,
    *,
    weigh: Callable[[_Item], int] | None = None,
) -> Iterator[list[tuple[_Item, _Read]]]:
    """Yield lists of (item, what ``read`` made of it) in their order.

    As many again, no more, are read in threads meanwhile.

    Args:
        items: in any number.
        read: called with each, in a thread.
        batch: the length of a list, at most.
        readers: threads.
        weigh: pixels of an item. Large ones come in shorter lists, and alone where one has half of
            ``PIXELS_AHEAD``.
    """
    coming = iter(items)
    ahead: deque[tuple[_Item, int, Future[_Read]]] = deque()
    next_one: list[tuple[_Item, int]] = []  # taken, and too large to be read yet

    def weight(entries: Iterable[tuple[_Item, int, Future[_Read]]]) -> int:
        return sum(pixels for _, pixels, _ in entries)

    with ThreadPoolExecutor(readers) as pool:
        while True:
            while len(ahead) < 2 * batch:
                next_one = next_one or [
                    (item, 0 if weigh is None else weigh(item)) for item in islice(coming, 1)
                ]
                if not next_one or (ahead and weight(ahead) + next_one[0][1] > PIXELS_AHEAD):
                    break
                item, pixels = next_one.pop()
                ahead.append((item, pixels, pool.submit(read, item)))
            if not ahead:
                return
            some = [ahead.popleft()]
            while ahead and len(some) < batch and weight(some) + ahead[0][1] <= PIXELS_AHEAD // 2:
                some.append(ahead.popleft())
            found = [(item, future.result()) for item, _, future in some]
            some.clear()
            yield found
            del found


def pixels_of(item: Any) -> int:
    """Count the pixels of a picture in any form by its header.

    Returns 0 for what has none, which its reader will say.
    """
    try:
        if isinstance(item, np.ndarray | torch.Tensor):
            return int(np.prod(item.shape)) // 3
        if isinstance(item, Source):
            with open(item.path, "rb") as file:
                file.seek(item.offset or 0)
                item = file.read(_HEADER if item.offset is None else min(item.size, _HEADER))
        elif isinstance(item, str | Path):
            with open(item, "rb") as file:
                item = file.read(_HEADER)
        if isinstance(item, bytes | bytearray):
            return picture_size(bytes(item[:_HEADER]))
        return item.width * item.height if isinstance(item, Image.Image) else 0
    except (OSError, InputError, RuntimeError):  # nested tensors have no shape
        return 0


def resized(picture: Image.Image, canvas: tuple[int, int], how: str) -> torch.Tensor:
    """Resize a picture to [3, Hc, Wc]: uint8, or floats in 0..1 where ``how`` gives them."""
    if picture.size == canvas[::-1]:
        return _to_bytes(picture)
    if how == "bicubic":
        return _to_bytes(picture.resize(canvas[::-1], Image.Resampling.BICUBIC))
    return F.interpolate(to_tensor(picture)[None], canvas, mode="bilinear", align_corners=False)[0]


def _to_bytes(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)


def _to_image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
